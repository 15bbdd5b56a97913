"""How many times less compute a variant needs for the same loss, and how many times less time.

    python scaling.py speedup --base C,LOSS[,FLOPS_PER_SECOND] ... --variant ... \\
        --asymptote E --alpha ALPHA --eval NAME

The rungs of this folder are compared so; see figures.py."""

import math
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scaling  # noqa: E402


def speedup(base, variant, E, alpha, noise=0.0, freedom=math.inf):
    """dict(compute, wall_clock) and their 90 % intervals, keys compute_interval and wall_clock_interval.

    base, variant: lists of (C, loss, rate or nan). The rate is FLOPs a second, or tokens a second if both sides
    take equal FLOPs a token. A point fixes A = (loss - E) C^alpha;
    the speed-up is the ratio of the geometric mean A to the power 1/alpha, so several C may mix. Its
    interval is Student-t from the scatter of log A (n points a side leave 2n - 2 degrees of freedom,
    as E and alpha are given), or from a seed noise of the loss that is known to some degrees of freedom.
    What is not known is None.
    """
    points = [np.array(side, float).T for side in (base, variant)]      # rows: C, loss, rate
    lowest = min(losses.min() for _, losses, _ in points)
    scaling.need(lowest > E, "--asymptote", "E below every loss", f"E = {E} and loss = {lowest}", "lower E")
    logs = [np.log(L - E) + alpha * np.log(C) for C, L, _ in points]
    shift = (logs[0].mean() - logs[1].mean()) / alpha
    wall = shift + np.log(points[1][2]).mean() - np.log(points[0][2]).mean()
    spare, half = logs[0].size + logs[1].size - 2, math.nan
    if noise:
        variance = sum(np.sum((noise / (L - E) / L.size)**2) for _, L, _ in points)
        half = stats.t.ppf(0.95, freedom) * math.sqrt(variance) / alpha
    elif spare:
        variance = sum(y.size * y.var() for y in logs) / spare * sum(1 / y.size for y in logs)
        half = stats.t.ppf(0.95, spare) * math.sqrt(variance) / alpha

    found = {}
    for name, x in (("compute", shift), ("wall_clock", wall)):
        found[name] = math.exp(x) if math.isfinite(x) else None
        found[f"{name}_interval"] = None
        if math.isfinite(x + half):
            found[f"{name}_interval"] = [math.exp(x - half), math.exp(x + half)]
    return found


def point(text):
    """(C, loss, rate or nan) of C,LOSS or C,LOSS,FLOPS_PER_SECOND."""
    C, loss, *rate = [scaling.number(part) for part in text.split(",")]
    (rate,) = rate or [math.nan]
    return C, loss, rate


def speedup_command(a):
    result = speedup(a.base, a.variant, a.asymptote, a.alpha, a.noise)
    print(f"E = {a.asymptote} and alpha = {a.alpha}, for eval {a.eval}")
    for key in ("compute", "wall_clock"):
        if result[key]:
            ends = result[f"{key}_interval"]
            span = "{:.4f} .. {:.4f}".format(*ends) if ends else "none: give more points or --noise"
            print(f"{key:10s} speed-up {result[key]:.4f}   90 % interval {span}")


def add_commands(command):
    """Add `speedup` to the commands of scaling.py."""
    add = command("speedup", speedup_command, "learning speed-up of a variant at equal loss")
    for side in ("base", "variant"):
        add(f"--{side}", type=point, nargs="+", required=True, metavar="C,LOSS[,FLOPS_PER_SECOND]",
            help=f"finished runs of the {side}")
    add("--asymptote", type=scaling.not_negative, required=True, help="E of the eval that --eval names")
    add("--alpha", type=scaling.number, required=True, help="of the same law")
    add("--eval", required=True, help="what E, alpha and the losses were measured on")
    add("--noise", type=scaling.number, default=0.0, help="standard deviation of the loss between seeds")


if __name__ == "__main__":
    sys.exit(scaling.main(["speedup", *sys.argv[1:]]))
