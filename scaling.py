"""Scaling laws: fit a ladder of small runs, forecast a larger run, score the forecast later.

Run:  python scaling.py                     Marin's 129B forecast, recomputed in seconds
      python scaling.py fit RUNS.csv --predict 1e21        (--help lists the other commands)
Read: rates -> runs -> fits -> analysis -> registration -> command line
C training FLOPs   N active parameters (head in, embedding out)   D tokens   k = C/(N D), not 6
L(C) = E + A C^-alpha; E is the irreducible loss.   A star marks a budget's compute-optimal run.
More commands of this file, in configs/ladder beside their data: plan.py (plan and ladder),
speedup.py, gate.py, curves.py, figures.py (pictures), bias.py and surface.py (L(N, D)).
[marin #n] is an issue of github.com/marin-community/marin; README lists the other tags."""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy        # its parts are loaded when used, so that train.py starts 1 s earlier [measured]
from numpy.polynomial import Polynomial

LEVEL = 0.95            # of every interval but the speed-up's
REFERENCE = 1e20        # C is fitted in this unit, so that A stays a number of ordinary size
UNITS = {"nats": "nats per token", "bpb": "bits per byte"}
ROOT = Path(__file__).resolve().parent
PUBLIC = ROOT / "configs" / "ladder" / "public"     # published tables, each with its source


class BadInput(ValueError):
    """A mistake that the user can correct, in one line."""
    def __init__(self, where, expected, found, do):
        line = f"{where}: expected {expected}, found {str(found)[:200]}; {do}"
        super().__init__(" ".join(line.split()))


def need(ok, where, expected, found, do):
    """Raise BadInput unless ok."""
    if not ok:
        raise BadInput(where, expected, found, do)


# ------------------------------------------------------------------------------------------ rates

class Rates(NamedTuple):
    adam_lr: float          # of embedding, router, gates and gains
    matrix_lr: float        # the relative step of a matrix on the hypersphere
    beta2: float            # of Adam
    eps: float              # of Adam


def heuristic(recipe, tokens, tokens_per_batch, hidden_dim):
    """Rates from the size of a run: its tokens, its tokens per batch and its width.

    "v1": Marin's fit of April 2026 to 186 AdamH runs (R2 = 0.995), used by the 129B run
    [marin #4225]. "v2": the refit of May 2026 for MuonH (17 cells, R2 = 0.996) [marin #5951].
    Both were fitted at 4,096 tokens a sequence and at least 32 sequences a batch. Neither rate
    passes 0.05, in either recipe."""
    if recipe == "v1":
        sequences = tokens_per_batch / 4096
        adam_lr = 1.63 * tokens**-0.2813 * hidden_dim**-0.3678 * sequences**0.5
        eps = 1e-15 * (32 * tokens / (sequences * 1.4e9))**0.5
    else:
        adam_lr = 0.06602 * tokens**-0.395 * hidden_dim**-0.150 * tokens_per_batch**0.5
        eps = 9.676e-18 * (tokens / tokens_per_batch)**0.5
    beta2 = 0.999**(tokens_per_batch / 131_072)         # a constant half-life in tokens
    beta2 = min(max(beta2, 0.95), 0.9999)
    return Rates(min(adam_lr, 0.05), min(13 / 3 * adam_lr, 0.05), beta2, eps)


# ------------------------------------------------------------------------------------------- runs

@dataclass(frozen=True)
class Run:
    """One finished training run; loss in nats per token (bits per byte after `in_unit`)."""
    flops: float
    params: float = math.nan
    tokens: float = math.nan
    loss: float = math.nan
    budget: float = 0.0             # nominal C of its isoFLOP curve; 0 until `checked` groups runs
    kind: str = "isoflop"           # "isoflop": fitted; "held_out": an outcome; "excluded": kept
    seed: str = ""
    eval: str = ""
    tokenizer: str = ""
    bytes_per_token: float = 0.0    # of the evaluation text; 0 is unknown
    bpb: float = 0.0                # bits per byte, a mean over domains; 0: from the loss
    source: str = ""
    extra: dict = field(default_factory=dict, compare=False)


# The columns that are numbers, with the open lower and the closed upper end of each
NUMBERS = {"flops": (1, 1e40), "budget_flops": (1, 1e40), "params": (1, 1e40), "tokens": (1, 1e40),
           "loss": (1e-3, 100), "bpb": (0, 100), "bytes_per_token": (0, 1e3)}
WORDS = ("kind", "seed", "eval", "tokenizer")
PLANNED = ("base", "overrides", "planned_flops", "width", "note")   # what a ladder adds to results


def number(text, where="command line", key="the value", low=0.0, high=1e40):
    """`text` as a finite float in (low, high], else BadInput."""
    try:
        value = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    need(low < value <= high, where, f"{key} to be a number above {low:g} and at most {high:g}",
         repr(text)[:40], f"correct {key}; write plain digits, such as 1.15e7")
    return value


def find_table(name):
    """The file of a table: a path, a path from the repository's root, or a public table's name."""
    places = (Path(name), ROOT / name, PUBLIC / f"{name}.csv")
    return next((path for path in places if path.is_file()), Path(name))


def read_table(name, *wanted):
    """(columns, rows) of a CSV; a row is {column: cell}. Lines that begin with # are comments.
    Cells are separated by commas or, where the header has none, by semicolons or tabs. BadInput
    without the wanted columns."""
    try:
        with open(find_table(name), encoding="utf-8-sig", newline="") as file:
            head = next((line for line in file if line.strip() and line[0] != "#"), "")
            mark = next((mark for mark in ",;\t" if mark in head), ",")
            file.seek(0)
            table = csv.reader(file, delimiter=mark, strict=True)
            lines = [[cell.strip() for cell in cells] for cells in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(name, "a UTF-8 table of comma-separated values", error, "export it")
    lines = [cells for cells in lines if any(cells) and not cells[0].startswith("#")]
    columns = lines[0] if lines else []
    need(len(set(columns)) == len(columns), name, "each column once", columns, "rename one")
    need({*wanted} <= {*columns}, name, f"columns {', '.join(wanted)}", columns or "nothing",
         "add those that it lacks")
    for i, cells in enumerate(lines[1:]):
        need(len(cells) == len(columns), f"{name} row {i + 1}", f"{len(columns)} cells", len(cells),
             "quote commas and fill the gaps")
    return columns, [dict(zip(columns, cells)) for cells in lines[1:]]


def run_from(row, required, where, source, head):
    """The Run of a table's row or a result.json; keys that are not its own are kept in `extra`."""
    row = dict(row)
    with_head = row.pop("flops_with_head", None)        # train.py writes both
    if head and with_head:
        row["flops"] = with_head
    known, extra = {}, {}
    for key, value in row.items():
        if key not in NUMBERS and key not in WORDS:
            extra[key] = value
        elif value not in ("", None):
            known[key] = str(value) if key in WORDS else number(value, where, key, *NUMBERS[key])
    for key in required:
        number(known.get(key), where, key, *NUMBERS[key])
    known.setdefault("flops", known.get("budget_flops"))
    known["flops"] = known["flops"] or 6 * known["params"] * known["tokens"]
    need(known.get("kind", "isoflop") in ("isoflop", "held_out", "excluded"), where,
         "kind isoflop, held_out or excluded", known.get("kind"), "correct it")
    budget = known.pop("budget_flops", 0.0)
    return Run(budget=budget, source=str(source), extra=extra, **known)


def read_csv(name, head=False, rename=(), grid=True):
    """Runs of a table with columns flops (or budget_flops), loss, params and tokens (or neither).

    head: C is the column flops_with_head, if any. What a ladder has not trained is left out.
    rename: {name here: name in the table}. Without a grid params are required, flops are not:
    C = 6 N D for a table without them."""
    columns, rows = read_table(name)
    for key, theirs in dict(rename).items():
        need(theirs in columns and key not in columns, "--columns", f"one of {columns}, as a new "
             f"{key}", theirs, "correct the pair")
        columns[columns.index(theirs)] = key
        rows = [row | {key: row[theirs]} for row in rows]
    required = ["budget_flops" if {*columns} & {"budget_flops", "flops"} == {"budget_flops"}
                else "flops", "loss"]
    if not grid or "params" in columns or "tokens" in columns:
        required += ["params", "tokens"]
    if not grid and required[0] not in columns:
        required.pop(0)
    missing = [key for key in required if key not in columns]
    way = "" if "flops" not in missing else " (C = 6 N D would be 6 * params * tokens)"
    need(not missing, name, "columns flops, params, tokens and loss", columns or "nothing",
         f"rename or add {', '.join(missing)}{way}, or say --columns "
         + ",".join(f"{key}=YOURS" for key in missing))
    return [run_from(row, required, f"{name} row {i + 1}", name, head)
            for i, row in enumerate(rows) if row["loss"] or not row.get("overrides")]


def read_json(path):
    """The object in a JSON file, else BadInput."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        value = str(error)[:80]
    need(isinstance(value, dict), path, "a JSON object", value, "restore the file")
    return value


def read_run_dir(folder, head=False):
    """The Run of a finished run directory of train.py. head: C counts the output head."""
    path = Path(folder) / "result.json"
    need(path.is_file(), folder, "a finished run (result.json)", "none", "let it finish")
    config, row = read_json(Path(folder) / "config.json"), read_json(path)
    own = [config.get(key) for key in ("model", "train", "counts")]
    model, train, counts = (part if isinstance(part, dict) else {} for part in own)
    with contextlib.suppress(KeyError, TypeError):      # of other makers, or an older version
        tokens = train["steps"] * train["batch_size"] * model["seq_len"]
        made_by = dict(tokens=tokens, params=counts["params"], seed=train["seed"],
                       flops=counts["flops_per_token"] * tokens)
        for key, value in made_by.items():
            need(row.get(key) == value, path, f"{key} {value}, as config.json says", row.get(key),
                 "let the run finish: the result is older than the config")
    row |= {"run_dir": str(folder), "tokenizer": train.get("tokenizer", "")}
    return run_from(row, NUMBERS.keys() - {"budget_flops"}, path, folder, head)


def check_sizes(runs, source):
    """BadInput if FLOPs, parameters and tokens of some runs do not go together: C = k N D, where k
    is near 6 and changes slowly with N."""
    if not runs:
        return
    N = np.array([run.params for run in runs])
    D = np.array([run.tokens for run in runs])
    k = np.array([run.flops for run in runs]) / N / D
    for run, own in zip(runs, k):
        need(0.5 <= own <= 60, source, "k = C/(N D) near 6 for every run",
             f"C = {run.flops:.4g}, N = {run.params:.4g}, D = {run.tokens:.4g}: k = {own:.2g}",
             "check the units (are params in millions?) and the order of the columns")
    need(np.median(D / N) >= 0.2, source, "more tokens than parameters in most runs",
         f"{np.median(D / N):.2g} tokens per parameter",
         "are the columns params and tokens swapped?")
    if len({*N}) > 2:
        line = np.polyfit(np.log(N), np.log(k), 1)
        off = np.abs(np.log(k) - np.polyval(line, np.log(N)))
        need(off.max() < math.log(1.6), source, "a C/(N D) that changes slowly with N",
             f"{k.min():.3g} to {k.max():.3g}",
             "check the unit of flops in every row")


def checked(runs, source):
    """The same runs, each with a budget; BadInput for duplicates, several evals, nothing to fit.

    Runs without a nominal budget are sorted by FLOPs; a gap of over 25 % begins the next one."""
    times = Counter((r.flops, r.params, r.tokens, r.seed, r.kind) for r in runs)
    for run, found in times.items():
        need(found == 1, source, "each run once", run, "delete one, or give the repeats seeds")
    check_sizes([run for run in runs if math.isfinite(run.params * run.tokens)], source)
    evals = sorted({run.eval for run in runs})
    need(len(evals) < 2, source, "one eval definition", evals, "fit each on its own")
    need(any(run.kind == "isoflop" for run in runs), source, "at least one isoFLOP run",
         f"none in {len(runs)} runs", "add the ladder")
    C = np.array(sorted({run.flops for run in runs if not run.budget}))
    groups = np.split(C, np.flatnonzero(np.diff(np.log(C)) > math.log(1.25)) + 1)
    nominal = {c: float(f"{np.exp(np.log(group).mean()):.4g}") for group in groups for c in group}
    return [replace(run, budget=run.budget or nominal[run.flops]) for run in runs]


def in_unit(runs, unit, source):
    """The runs with losses in "nats" per token or in "bpb", bits per byte. Only the latter compare
    across tokenizers: a token that spans more bytes costs more nats for the same knowledge."""
    if unit == "nats":
        kinds = {(r.tokenizer, round(r.bytes_per_token, 3)) for r in runs}
        need(len(kinds) < 2, source, "one tokenizer for a forecast in nats per token",
             sorted(kinds), "use --unit bpb, which compares across tokenizers")
        return runs
    need(all(r.bytes_per_token or r.bpb for r in runs), source,
         "bpb or bytes_per_token for every run", "a run without", "add the column")
    return [replace(r, loss=r.bpb or r.loss / math.log(2) / r.bytes_per_token) for r in runs]


# ------------------------------------------------------------------------------------------- fits

METHODS = {
    # E_c + A_c x^p + B_c x^-q, p and q common to all budgets. Along an isoFLOP N is C/(kD), so a
    # loss surface has exactly this form: no bias without noise, and E may differ by budget.
    "shared": "isoFLOP curves with shared exponents",
    # A quadratic in log x for each budget is what most people use. The true curve is lopsided, so
    # its minimum moves with the sampling (configs/ladder/bias.py). Kept as the baseline.
    "parabola": "a parabola per budget (biased baseline)",
    "best": "lowest run per budget",        # for tables of optima, and budgets of one run
    "surface": "a global surface"}          # of all runs; configs/ladder/surface.py says why not


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a fit; a registration stores it whole."""
    method: str = "shared"          # a key of METHODS
    axis: str = "tokens"            # horizontal axis of the curves: "tokens" or "params"
    asymptote: float | None = None  # E; None leaves it free
    head: bool = False              # C counts the output head in every model, not only dense ones


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal point of one budget."""
    budget: float
    runs: int
    tokens: float
    params: float
    loss: float


@dataclass(frozen=True)
class Fit:
    law: object             # Law, or the Surface of configs/ladder/surface.py
    optima: list            # an Optimum for each budget
    curves: list            # loss as a function of log10 x for each budget, or nothing
    fitted: np.ndarray      # the loss that the fit gives for each run
    unknowns: int           # fitted numbers
    start: object           # exponents from which a refit can start, or None


def by_budget(runs):
    """{budget: indices of its runs}, cheapest first."""
    budgets = np.array([r.budget for r in runs])
    return {float(C): np.flatnonzero(budgets == C) for C in np.unique(budgets)}


def columns_of(rows, *names):
    """One float array per attribute of runs or optima."""
    return np.array([[getattr(row, name) for row in rows] for name in names], float)


def variable_projection(log_u, log_v, y, groups, start=None):
    """Fit y = E + A u^-p + B v^-q with p and q common to all groups of indices.

    Returns (p, q), the residuals, and (E, A, B) of each group. Given p and q, non-negative least
    squares find the rest, so only two numbers are searched: on a 32 x 32 grid (without a start),
    then by Gauss-Newton. This is VPNLS [arXiv 2603.22339], extended to groups."""
    def solve(pq):
        terms = np.stack([np.ones_like(y), np.exp(-pq[0] * log_u), np.exp(-pq[1] * log_v)], 1)
        weights = [scipy.optimize.nnls(terms[rows], y[rows])[0] for rows in groups]
        residual = np.empty_like(y)
        for rows, EAB in zip(groups, weights):
            residual[rows] = y[rows] - terms[rows] @ EAB
        return residual, weights
    tolerance = 1e-9 if start else 1e-15
    if not start:
        grid = np.geomspace(0.03, 1.5, 32)
        start = min(((p, q) for p in grid for q in grid), key=lambda pq: np.sum(solve(pq)[0]**2))
    fit = scipy.optimize.least_squares(lambda pq: solve(pq)[0], start, "3-point", (0.01, 3),
                                 xtol=tolerance, ftol=tolerance, gtol=1e-15)
    return fit.x, *solve(fit.x)


def shared_curves(x, y, groups, start):
    """([(curve, its lowest x or None) of each group], (p, q)); x is log10 of tokens or params."""
    middles = [x[rows].mean() for rows in groups]
    log_x = np.empty_like(x)
    for rows, middle in zip(groups, middles):
        log_x[rows] = math.log(10) * (x[rows] - middle)     # centered: terms of like size
    (p, q), _, weights = variable_projection(-log_x, log_x, y, groups, start)
    def curve_of(middle, E, A, B):
        return lambda z: E + A * 10**(p * (z - middle)) + B * 10**(-q * (z - middle))
    found = []
    for middle, (E, A, B) in zip(middles, weights):
        two_sided = min(A, B) > 1e-12 * max(A, B, E)
        lowest = middle + math.log10(q * B / (p * A)) / (p + q) if two_sided else None
        found.append((curve_of(middle, E, A, B), lowest))
    return found, (p, q)


def parabola(x, y):
    """(curve, its lowest x or None) by least squares."""
    curve = Polynomial.fit(x, y, 2)
    return curve, curve.deriv().roots()[0] if curve.deriv(2)(0) > 0 else None


def isoflop_fit(runs, config, start=None, inside=True):
    """A Fit without a law: the minimum of each budget's isoFLOP curve.

    Raises BadInput for a budget of too few runs, without a minimum, or (if `inside`) with one
    outside its runs. start: the shared exponents of an earlier fit."""
    groups, shared, tokens = by_budget(runs), config.method == "shared", config.axis == "tokens"
    y, D, N = columns_of(runs, "loss", "tokens", "params")
    if config.method == "best":
        lowest = {C: rows[np.argmin(y[rows])] for C, rows in groups.items()}
        optima = [Optimum(C, len(groups[C]), D[i], N[i], y[i]) for C, i in lowest.items()]
        return Fit(None, optima, [], y, len(y), None)
    x, other = np.log10([D, N] if tokens else [N, D])
    name, do = runs[0].source, "add runs there, or leave it out"
    for C, rows in groups.items():
        sizes = len(set(x[rows][np.isfinite(x[rows])].round(5)))
        need(sizes >= 3, f"{name}: budget {C:.3g}", f"3 runs of different {config.axis}", sizes, do)
    enough = 3 * len(groups) + 3            # two shared exponents, and something for the noise
    need(len(y) >= enough or not shared, name, f"{enough} runs for {len(groups)} shared curves",
         len(y), "add runs, or use --method parabola")
    if shared:
        found, start = shared_curves(x, y, list(groups.values()), start)
    else:
        found = [parabola(x[rows], y[rows]) for rows in groups.values()]
    optima, fitted = [], np.empty_like(y)
    for (C, rows), (curve, at) in zip(groups.items(), found):
        where = f"{name}: budget {C:.3g}"
        need(at is not None, where, "an isoFLOP curve that opens upwards", "no minimum", do)
        need(not inside or min(x[rows]) < at < max(x[rows]), where,
             f"a minimum inside the sampled {config.axis}", f"one at 10^{at:.4g}", do)
        across = Polynomial.fit(x[rows], other[rows], 1)(at)        # a line in log-log
        D_star, N_star = (10**at, 10**across) if tokens else (10**across, 10**at)
        fitted[rows] = curve(x[rows])
        optima.append(Optimum(C, len(rows), D_star, N_star, curve(at)))
    curves = [curve for curve, _ in found]
    return Fit(None, optima, curves, fitted, 3 * len(groups) + 2 * shared, start)


@dataclass(frozen=True)
class Law:
    """L(C) = E + A C^-alpha."""
    E: float
    A: float
    alpha: float
    ssr: float = 0.0        # sum of squared residuals of log(L - E)
    free: bool = False      # E was fitted, too

    def loss(self, C):
        return self.E + self.A * C**-self.alpha

    def __str__(self):
        return f"L(C) = {self.E:.4f} + {self.A:.2f} C^-{self.alpha:.5f}" + ", E free" * self.free


def loss_law(C, L, asymptote=None, where="the law"):
    """The Law through the optima's losses, by least squares in log(L - E); asymptote fixes E.

    Given E this is a straight line. A free E is the best of 400 between 0 and 0.95 min L: Marin's
    public forecasts were made so, and the grid's step (0.007) is far below E's uncertainty."""
    c, L, free = np.log(np.asarray(C) / REFERENCE), np.asarray(L, float), asymptote is None
    need(len(c) >= 3 + free, where, f"at least {3 + free} budgets", len(c),
         "add budgets" + ", or fix E by --asymptote" * free)
    need(L.min() > 0, where, "optima of positive loss", L.min(), "check the losses")
    need(free or 0 <= asymptote < L.min(), "--asymptote",
         f"0 to below the lowest loss {L.min():.4f}", asymptote, "lower it")
    E = np.linspace(0, 0.95 * L.min(), 400) if free else np.array([asymptote])
    y, centered = np.log(L - E[:, None]), c - c.mean()
    slope, level = y @ centered / (centered @ centered), y.mean(1)
    squares = np.sum((y - level[:, None] - slope[:, None] * centered)**2, 1)
    i = int(np.argmin(squares))
    alpha = -slope[i]
    need(1e-6 < alpha < 3, where, "a falling loss, alpha in 0..3", alpha, "check the runs")
    A = np.exp(level[i] + alpha * (c.mean() + np.log(REFERENCE)))
    return Law(float(E[i]), float(A), float(alpha), float(squares[i]), free)


def power_law(C, y):
    """y = coefficient C^exponent by a line in log-log, and a Student-t interval of the exponent."""
    if not np.all(np.isfinite(y)) or len(C) < 3:
        return None
    line = scipy.stats.linregress(np.log(C), np.log(y))
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, len(C) - 2) * line.stderr
    return dict(coefficient=np.exp(line.intercept), exponent=line.slope,
                low=line.slope - half, high=line.slope + half)


def fit_law(runs, config, start=None, inside=True):
    """The Fit by the chosen method. A refit begins from start and may put optima outside runs."""
    if config.method == "surface":
        from configs.ladder import surface
        return surface.fit_surface(runs, start)
    fit = isoflop_fit(runs, config, start, inside)
    C, L = columns_of(fit.optima, "budget", "loss")
    return replace(fit, law=loss_law(C, L, config.asymptote, runs[0].source))


def run_bootstrap(runs, fit, config, targets, draws=400, seed=0):
    """A 95 % interval for one new run at each target, or Nones: resample the runs' residuals about
    the fit, refit everything, and forecast. More than 5 % of refits that fail give none. A budget
    of 8 runs draws from its own, for noise depends on it [measured: configs/ladder/third]."""
    residual, spare = columns_of(runs, "loss")[0] - fit.fitted, len(runs) - fit.unknowns
    if spare < 1:
        return [None] * len(targets)
    # Residuals of a fit are smaller than the noise: it has bent towards each run.
    residual = (residual - residual.mean()) * math.sqrt(len(runs) / spare)
    rng, forecasts = np.random.default_rng(seed), []
    groups = [*by_budget(runs).values()]
    own = [rows for rows in groups if len(rows) >= 8]
    last = residual[groups[-1]] if len(groups[-1]) >= 8 else residual
    for _ in range(draws):
        losses = fit.fitted + rng.choice(residual, len(runs))
        for rows in own:
            losses[rows] = fit.fitted[rows] + rng.choice(residual[rows], len(rows))
        sample = [replace(r, loss=float(y)) for r, y in zip(runs, losses)]
        with contextlib.suppress(BadInput):
            # A resampled curve may have its minimum outside its runs, the fitted one may not.
            law = fit_law(sample, config, fit.start, inside=False).law
            forecasts.append([law.loss(C) + rng.choice(last) for C in targets])
    if len(forecasts) < 0.95 * draws:
        return [None] * len(targets)
    return np.quantile(forecasts, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T.tolist()


def profile(C, L, targets, chosen):
    """Forecasts as a function of an assumed E, and which E the optima allow (an F test).

    E is most of what nobody knows about an extrapolation: this stands beside every interval."""
    assumed = np.union1d(np.arange(0, 0.95 * min(L), 0.025).round(3), [chosen])
    laws = [loss_law(C, L, E) for E in assumed]
    spare, least = len(L) - 3, min(law.ssr for law in laws)
    limit = math.inf
    if spare:
        limit = least * (1 + scipy.stats.t.ppf((1 + LEVEL) / 2, spare)**2 / spare)
    return [dict(E=law.E, allowed=law.ssr <= limit, losses=[law.loss(C) for C in targets])
            for law in laws]


def backtest(runs, config, optima):
    """Fit the budgets up to each one and forecast the later optima: errors in %."""
    tests, first = [], 3 if config.asymptote is None else 2     # fewer do not decide the law
    for last in [*by_budget(runs)][first:-1]:
        with contextlib.suppress(BadInput):
            law = fit_law([r for r in runs if r.budget <= last], config).law
            errors = [100 * (v.loss / law.loss(v.budget) - 1) for v in optima if v.budget > last]
            tests.append(dict(up_to=last, E=law.E, errors_percent=errors))
    return tests


# --------------------------------------------------------------------------------------- analysis

def analyse(runs, config, targets=(), unit="nats", source="runs", draws=400):
    """Everything that `fit` reports, as a dict; without targets the held-out budgets are forecast.

    "ladder" are the runs that were fitted, "lowest" is the best loss observed later, or else
    fitted; a fit whose E contradicts it is not "sound". "N_star" and "D_star" are power laws."""
    from configs.ladder import outlier
    runs = in_unit(checked(runs, source), unit, source)
    held = [r for r in runs if r.kind == "held_out"]
    ladder = [r for r in runs if r.kind == "isoflop"]
    fit = fit_law(ladder, config)
    C, L, N, D = columns_of(fit.optima, "budget", "loss", "params", "tokens")
    N_star, D_star = power_law(C, N), power_law(C, D)
    targets = list(targets) or sorted({r.budget for r in held}) or [10 * float(max(C))]
    curve = profile(C, L, targets, fit.law.E) if config.method != "surface" else []
    bootstrap = run_bootstrap(ladder, fit, config, targets, draws)
    forecasts = []
    for i, target in enumerate(targets):
        loss = fit.law.loss(target)
        N, D = (p and p["coefficient"] * target**p["exponent"] for p in (N_star, D_star))
        ends = [row["losses"][i] for row in curve if row["allowed"]]
        intervals = dict(run_bootstrap=bootstrap[i],
                         asymptote_profile=[min(ends), max(ends)] if ends else None)
        outcomes = [dict(loss=r.loss, seed=r.seed, error_percent=100 * (r.loss / loss - 1))
                    for r in held if abs(r.flops / target - 1) < 0.02]
        forecasts.append(dict(C=target, loss=loss, params=N, tokens=D, intervals=intervals,
                              outcomes=outcomes))
    lowest = min(r.loss for r in held or ladder)
    return dict(source=source, config=config, unit=unit, runs=runs, ladder=ladder, fit=fit,
                outlier=outlier.suspect(ladder, fit, config, targets), targets=targets,
                N_star=N_star, D_star=D_star, forecasts=forecasts, profile=curve, lowest=lowest,
                backtest=backtest(ladder, config, fit.optima), sound=fit.law.E <= 0.98 * lowest)


def warnings_of(r):
    """What to know before believing a fit, a line each."""
    E, lines = r["fit"].law.E, []
    if r["config"].method == "parabola":
        lines.append("a parabola's minimum is biased where the curve is lopsided or off-center")
    edge = E / min(v.loss for v in r["fit"].optima)
    if r["config"].asymptote is None and not 0.005 < edge < 0.945:
        lines.append("E is at the edge of its grid: the ladder does not determine it")
    allowed = [row["E"] for row in r["profile"] if row["allowed"]]
    if allowed and E not in allowed:
        lines.append(f"E = {E:g} is not allowed by the optima: {allowed[0]:g} to {allowed[-1]:g}")
    if r["outlier"]:
        run, times = r["outlier"]["run"], r["outlier"]["times"]
        losses = " ".join(f"{loss:.4f}" for loss in r["outlier"]["losses"])
        lines.append(f"the run at C = {run.flops:.4g}, N = {run.params:.4g} with loss "
                     f"{run.loss:.4g} is {times:.0f} standard errors off the others; "
                     f"without it: {losses}")
    top, bottom = max(r["fit"].optima, key=lambda v: v.budget), r["fit"].optima[0]
    for C in r["targets"]:
        if not bottom.budget <= C <= 1000 * top.budget:
            lines.append(f"C = {C:.4g} is far outside the runs, {bottom.budget:.3g} to "
                         f"{top.budget:.3g}")
    if r["unit"] == "nats" and max(run.loss for run in r["ladder"]) > 12:
        lines.append("losses above 12 nats per token: are they perplexities?")
    if not r["sound"]:
        lines.append(f"this fit must not forecast: E = {E:.4f} is above the best loss observed, "
                     f"{r['lowest']:.4f}, or less than 2 % below")
    return lines


def report_forecast(f):
    """Print one forecast, its intervals and its outcomes."""
    N, D = f["params"], f["tokens"]
    star = f"   N* {N:.3g}, D* {D:.3g}, {D / N:.1f} tokens per parameter" if N else ""
    print(f"forecast at C = {f['C']:.4g}: {f['loss']:.4f}{star}")
    for name, ends in f["intervals"].items():
        print(f"  95 % by {name:18s}" + ("{:.4f} .. {:.4f}".format(*ends) if ends else "none"))
    for outcome in f["outcomes"]:
        print("  observed {loss:.4f}: {error_percent:+.2f} %".format(**outcome))


def report(r):
    """Print an analysis."""
    fit, config = r["fit"], r["config"]
    head = "always" if config.head else "only when dense"
    print(f"{r['source']}: {len(r['ladder'])} of {len(r['runs'])} runs; {METHODS[config.method]}, "
          f"by {config.axis}; {UNITS[r['unit']]}; C counts the head {head}\n\n"
          "     C  runs       D*         N*   D*/N*    loss*")
    for v in fit.optima:
        print(f"{v.budget:8.3g} {v.runs:3d} {v.tokens:10.4e} {v.params:10.4e} "
              f"{v.tokens / v.params:6.1f}  {v.loss:8.5f}")
    print(f"\n{fit.law}")
    for name in ("N_star", "D_star"):
        if r[name]:
            print(name[0] + "* = {coefficient:.4g} C^{exponent:.4f}, exponent within {low:.3f} .. "
                  "{high:.3f}".format(**r[name]))
    for f in r["forecasts"]:
        report_forecast(f)
    for row in r["profile"]:
        if row["allowed"] and round(1000 * row["E"]) % 100 == 0:        # every fourth row
            losses = "  ".join(f"{y:.4f}" for y in row["losses"])
            print(f"if E = {row['E']:.2f}, which the optima allow: {losses}")
    for row in r["backtest"]:
        errors = " ".join(f"{e:+.2f}" for e in row["errors_percent"])
        print(f"backtest up to {row['up_to']:.3g}: E = {row['E']:.3f}, later errors {errors} %")
    for line in warnings_of(r):
        print(f"warning: {line}")


def plain(value):
    """A value in JSON types: null for NaN and for functions."""
    def convert(x):                                     # of numpy, or a dataclass
        known = isinstance(x, (np.ndarray, np.generic))
        return x.tolist() if known else getattr(x, "__dict__", None)
    return json.loads(json.dumps(value, default=convert), parse_constant=lambda _: None)


# ----------------------------------------------------------------------------------- registration

def csv_text(columns, rows):
    """A table as it is written: rows are dicts, and what a row lacks is blank."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def data_sha256(sources):
    """sha256 of what a fit read: the files of run directories, or the results in tables, without
    what a ladder plans: a record holds while its table grows rows or columns for that."""
    digest = hashlib.sha256()
    for source in sources:
        if Path(source).is_dir():
            for name in ("config.json", "result.json"):
                digest.update((Path(source) / name).read_bytes())
            continue
        columns, rows = read_table(source)
        results = [row for row in rows if row.get("loss") or not row.get("overrides")]
        digest.update(csv_text([key for key in columns if key not in PLANNED], results).encode())
    return digest.hexdigest()


def seal(record):
    """sha256 of a record without its own seal."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_new(path, text):
    """Write `text` to a path that must not exist yet."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.{os.getpid()}.partial")     # a full disk leaves no half of a file
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, path)
    except FileExistsError:
        raise BadInput(path, "a new file", "one that exists", "choose another name") from None
    finally:
        partial.unlink(missing_ok=True)


def register(a):
    """Write the forecast that the options of `register` ask for to the new file --out, for good."""
    need(a.method != "surface", "--method", "isoFLOP curves", "surface, 14 % off at 1e23 on Delphi",
         "take another method")
    r, sources = fit_of(a, [a.target]), a.runs or [a.table]
    run, law = r["ladder"][0], r["fit"].law
    definition = a.eval or run.eval
    need(definition, "--eval", "the eval definition (set, seq_len, sequences)", "none", "give it")
    need(run.eval in ("", definition), "--eval", f"that of the runs, {run.eval}", a.eval, "omit it")
    need(r["sound"], r["source"], f"E over 2 % below the lowest loss, {r['lowest']:.4f}", law.E,
         "lower --asymptote")
    forecast = r["forecasts"][0] | {"outcomes": []}
    target = dict(C=a.target, N=forecast["params"], D=forecast["tokens"],
                  config=a.target_config and Path(a.target_config).read_text(errors="replace"))
    write_record(a.out, dict(
        forecast=forecast, target=target, unit=r["unit"], eval=definition, failure=a.failure,
        known_differences=a.difference, form="E + A C^-alpha", envelope=law, choices=r["config"],
        flags=warnings_of(r), bytes_per_token=run.bytes_per_token or None, runs=sources))


def write_record(path, record):
    """Lock a forecast in a new file: with the digest of the runs that it read, the date, a seal."""
    record = plain(record | dict(
        runs_sha256=data_sha256(record["runs"]),
        scaling_sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),     # no condition
        date=datetime.now(timezone.utc).isoformat()))
    write_new(path, json.dumps(record | {"sha256": seal(record)}, indent=1) + "\n")
    loss, C = record["forecast"]["loss"], record["target"]["C"]
    print(f"registered {path}: {loss:.4f} at C = {C:.4g}; commit it before the run")


def outcome_of(record, run):
    """The loss of a Run in the record's unit; BadInput if it is not the run that was forecast."""
    C, width = record["target"]["C"], record["bytes_per_token"]
    need(abs(run.flops / C - 1) < 0.02, run.source, f"C = {C:.4g} within 2 %", f"{run.flops:.4g}",
         "score the right run")
    need(run.eval == record["eval"], run.source, f"eval {record['eval']}", run.eval,
         "evaluate the run as registered")
    same = record["unit"] == "bpb" or not width or abs(run.bytes_per_token / width - 1) < 1e-3
    need(same, run.source, f"{width} bytes per token", run.bytes_per_token,
         "register in --unit bpb, which compares across tokenizers")
    return in_unit([run], record["unit"], run.source)[0].loss


def score(path, loss=None, run=None):
    """Compare an outcome, a loss or a Run, with a record; append it to NAME.outcomes.jsonl.

    BadInput if the record or its data changed, or if the run is not the one that was forecast."""
    need(bool(loss) != bool(run), "score", "--loss X or --run DIR", "both or neither", "give one")
    record = read_json(path)
    need(record.get("sha256") == seal(record), path, "the record as registered", "an edited one",
         "restore the original")
    for keys in ("forecast loss", "forecast intervals", "target C", "unit", "eval", "runs",
                 "runs_sha256", "bytes_per_token"):
        value = record
        for key in keys.split():
            need(isinstance(value, dict) and key in value, path, f"the key {keys}", "none",
                 "restore the original")
            value = value[key]
    found = "nothing"
    with contextlib.suppress(OSError):                  # the table is gone
        found = data_sha256(record["runs"])
    was = record["runs_sha256"]
    need(was == found, " ".join(record["runs"]), f"results of sha256 {was[:16]}", found[:16],
         "git checkout the table")
    if run:
        loss = outcome_of(record, run)
    point, intervals = record["forecast"]["loss"], record["forecast"]["intervals"]
    inside = {name: ends[0] <= loss <= ends[1] for name, ends in intervals.items() if ends}
    outcome = dict(record=record["sha256"], date=datetime.now(timezone.utc).isoformat(), loss=loss,
                   run=run and run.source, error_percent=100 * (loss / point - 1), inside=inside)
    with Path(path).with_suffix(".outcomes.jsonl").open("a") as file:
        file.write(json.dumps(outcome) + "\n")
    print(f"forecast {point:.4f}, observed {loss:.4f} ({record['unit']}, {record['eval']}): "
          f"{outcome['error_percent']:+.2f} %")
    for name, hit in inside.items():
        where = "inside " if hit else "OUTSIDE"
        print(f"  {where} {name} {intervals[name][0]:.4f} .. {intervals[name][1]:.4f}")


# ----------------------------------------------------------------------------------- command line

def pyplot():
    """matplotlib.pyplot, drawing to files; BadInput says how to install it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise BadInput("pictures", "matplotlib", error, "pip install matplotlib") from None
    return plt


def story(_):
    """Marin's forecast of the 129B run, and what the irreducible loss decides."""
    config = FitConfig("parabola", "params", asymptote=1.6)
    posted = analyse(read_csv("moe_v16"), config, source="moe_v16")
    print(f"Marin's 129B mixture of experts, forecast from {len(posted['ladder'])} runs of 1e18 to "
          f"3e20 FLOPs [marin #4447]\n{posted['fit'].law}")
    report_forecast(posted["forecasts"][-1])
    print("\nThe same runs under other assumptions:")
    for label, other in (("parabolas, E fixed at 1.6", config),
                         ("parabolas, E free", FitConfig("parabola", "params")),
                         ("shared exponents, E free", FitConfig("shared", "params")),
                         ("lowest runs, E free", FitConfig("best"))):
        law = fit_law(posted["ladder"], other).law
        print(f"  {label:26s} E = {law.E:.4f}   L(1e23) = {law.loss(1e23):.4f}")


def fit_of(a, targets):
    """The analysis that the options shared by `fit` and `register` ask for."""
    need(bool(a.table) != bool(a.runs), "fit", "a table or --runs DIR ...", "both or neither",
         "give one")
    need(a.method != "surface" or a.asymptote is None, "--asymptote", "a --method that can fix E",
         a.method, "leave one out")
    config, source = FitConfig(a.method, a.axis, a.asymptote, a.count_head), a.table
    if a.runs:
        source = f"--runs ({len(a.runs)} directories)"
        runs = [replace(read_run_dir(path, a.count_head), source=source) for path in a.runs]
    else:
        runs = read_csv(a.table, a.count_head, a.columns, a.method != "surface")
    return analyse(runs, config, targets, a.unit, source, a.draws)


def fit_command(a):
    """Fit, print, and write what the options ask for."""
    r = fit_of(a, a.predict)
    with contextlib.redirect_stdout(sys.stderr if a.json == "-" else sys.stdout):
        report(r)
        if a.plot:
            from configs.ladder import figures
            figures.draw_fit(r, a.plot)
    text = json.dumps(plain(r | {"warnings": warnings_of(r)}), indent=1) + "\n"
    if a.json == "-":
        sys.stdout.write(text)
    elif a.json:
        write_new(a.json, text)


def score_command(a):
    """Score an outcome given as a number or as a run directory."""
    head = read_json(a.record).get("choices", {}).get("head", False)
    score(a.record, a.loss, a.run and read_run_dir(a.run, head))


def count(text):
    """A whole number of 1 or more, from text."""
    return int(number(text, low=0.99, high=1e9))


def pairs(text):
    """{ours: theirs} of flops=train_flops,loss=val_loss."""
    names = dict(pair.partition("=")[::2] for pair in text.split(","))
    need(names.keys() <= {*NUMBERS, *WORDS}, "--columns", f"names of {[*NUMBERS, *WORDS]}", text,
         "write ours=theirs")
    return names


def not_negative(text):
    """0 or a positive number, from text."""
    return number(text, low=-1e-12)


def asymptote(text):
    """E from text: None if it is to be fitted."""
    return None if text == "free" else number(text, "--asymptote", "E", -1e-12, 100)


class Parser(argparse.ArgumentParser):
    def error(self, message):                           # one line, like every other complaint
        raise BadInput("command line", "the options of --help", message, f"see {self.prog} --help")


def parser():
    """The parser of every command, those of configs/ladder included."""
    from configs.ladder import bias, curves, figures, gate, plan, speedup   # they import this
    top = Parser(prog="scaling.py", description=__doc__,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    top.set_defaults(do=story)
    commands = top.add_subparsers(parser_class=Parser)
    def command(name, do, purpose, text=None):
        sub = commands.add_parser(name, help=purpose, description=text or purpose,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(do=do)
        return sub.add_argument
    add = command("fit", fit_command, "fit a ladder and forecast")
    add_fitting(add)
    add("--predict", type=number, nargs="+", action="extend", default=[], metavar="C", help="FLOPs")
    add("--json", metavar="FILE|-", help="everything, as JSON")
    add("--plot", metavar="FILE", help="a picture: .png, .pdf or .svg")
    add = command("register", register, "fit, and lock one forecast in a file")
    add_fitting(add)
    add("--target", type=number, required=True, metavar="C", help="FLOPs of the run to come")
    add("--target-config", help="the config that will be run; its text is stored")
    add("--eval", help="eval definition; default: the runs' own")
    add("--failure", default="outside the run-bootstrap interval", help="what is a miss")
    add("--difference", action="append", default=[], help="known difference; repeatable")
    add("--out", required=True, help="the new file, such as prereg/NAME.json")
    add = command("score", score_command, "compare an outcome with a registration")
    add("record", help="the file that `register` wrote")
    add("--loss", type=number, help="in the record's unit")
    add("--run", metavar="DIR", help="a finished run of train.py instead")
    for study in (plan, speedup, gate, curves, bias, figures):
        study.add_commands(command)
    return top


def add_fitting(add):
    """The options that `fit` and `register` share."""
    tables = ", ".join(sorted(path.stem for path in PUBLIC.glob("*.csv")))
    add("table", nargs="?", help=f"a CSV, or a public table: {tables}")
    add("--runs", nargs="+", metavar="DIR", help="finished runs of train.py instead")
    add("--columns", type=pairs, default={}, metavar="flops=YOURS,...",
        help="your names of the columns flops, params and tokens (plain numbers), loss (nats per "
        "token), or seed, eval, kind, tokenizer, bytes_per_token, bpb, budget_flops")
    add("--x", dest="axis", choices=("tokens", "params"), default="tokens", help="of the curves")
    add("--method", choices=METHODS, default="shared", help="how to fit (%(default)s)")
    add("--asymptote", type=asymptote, default="free", help="E: free or a value")
    add("--unit", choices=UNITS, default="nats", help="of the loss; bpb is bits per byte")
    add("--count-head", action="store_true", help="C with the output head in every model")
    add("--draws", type=count, metavar="N", default=400, help="bootstrap refits")


def guarded(name, do, *mistakes):
    """Exit status of do(): what it returns, 0 if that is None, or 2 after one line on stderr about
    what to correct. mistakes: exceptions that say it, beside BadInput."""
    try:
        return do() or 0
    except (BadInput, *mistakes) as error:
        complaint = error
    except BrokenPipeError:                             # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        complaint = BadInput(error.filename or "output", "a usable path", error.strerror, "check")
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        complaint = BadInput("input", "numbers of ordinary size", error, "check every column")
    print(f"{name}: {complaint}", file=sys.stderr)
    return 2


def main(words):
    """Exit status of one command: as `guarded` says; `gate` also returns 1 and 3."""
    def do():
        a, a.rest = parser().parse_known_args(words)
        takes = a.do.__name__ == "gate"                 # --key=value
        need(takes or not a.rest, "command line", "the options of --help", " ".join(a.rest),
             "see --help")
        return a.do(a)
    return guarded("scaling.py", do)


if __name__ == "__main__":
    import scaling                  # the one copy that scripts of configs/ladder import, too
    sys.exit(scaling.main(sys.argv[1:]))
