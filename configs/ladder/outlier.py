"""The run that drags a fit: `scaling.py fit` names it in a warning."""

import contextlib
import math

import numpy as np
from scipy import stats

import scaling


def suspect(runs, fit, config, targets):
    """The run that the fit of all others contradicts most, or None if chance explains it.

    Every run is left out once. A diverged run at an edge bends the curve to itself and has a small
    residual, so the drop of all squared residuals is judged: a Student-t of the left-out run."""
    squares = np.sum((scaling.columns_of(runs, "loss")[0] - fit.fitted)**2)
    spare, found = len(runs) - fit.unknowns - 1, []
    for i in range(len(runs) if spare > 1 else 0):
        rest = runs[:i] + runs[i + 1:]
        with contextlib.suppress(scaling.BadInput):
            other = scaling.fit_law(rest, config, fit.start, inside=False)
            left = np.sum((scaling.columns_of(rest, "loss")[0] - other.fitted)**2)
            found.append((math.sqrt(max(squares / max(left, 1e-20) - 1, 0) * spare), i))
    times, i = max(found, default=(0, 0))
    if stats.t.sf(times, max(spare, 1)) * len(runs) > 1e-3:
        return None
    with contextlib.suppress(scaling.BadInput):                 # afresh: its own start was bent, too
        law = scaling.fit_law(runs[:i] + runs[i + 1:], config, inside=False).law
        return dict(run=runs[i], times=times, losses=[law.loss(C) for C in targets])
