"""Scaling laws: fit isoFLOP ladders, forecast a loss before the run, score it after.  Imports no house file.

Run:   python scaling.py               the story in ten seconds: 2.252 was forecast, 2.233 came, and why
       python scaling.py fit RUNS.csv --predict 1e21      also bias register score plan ladder speedup
       python scaling.py figures           configs/ladder: our own ladder, forecast and rungs from its tables
Read:  runs -> shapes and FLOPs -> bowls -> envelope -> uncertainty -> surface -> analysis -> bias
       -> registration -> planning -> speed-up -> pictures -> command line
C training FLOPs   N active parameters (output head in, input embedding out)   D tokens   k = C/(N D), never 6
L(C) = E + A C^-alpha: E asymptote in nats per token, A, alpha.   A star: the compute-optimal point of a C.
Sources: #n is an issue of marin-community/marin; Czech et al. is arXiv 2603.22339."""

import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import re
import runpy
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import scipy
from numpy.polynomial import Polynomial
from scipy.optimize import least_squares, minimize, nnls
from scipy.special import huber, logsumexp
from scipy.stats import linregress, norm, t as student

LEVEL = 0.95            # of every interval but the speed-up's
REFERENCE = 1e20        # C is measured in this unit while fitting, so that A stays a number of ordinary size
VOCAB = 128_256         # Llama-3's, the tokenizer of every public table below
CONVENTIONS = {head: f"C: training FLOPs, 3x forward, causal square counted whole, head {when}; "
                     "N: active parameters, head in, embedding out"
               for head, when in ((False, "only when dense"), (True, "always"))}
UNITS = {"nats": "nats per token", "bpb": "bits per byte"}
MUST_NOT = "this fit must not forecast"                # how the flags begin that `register` refuses


class BadInput(ValueError):
    """A mistake the user can mend, in one line: the place, what was expected, what was found, what to do."""
    def __init__(self, where, expected, found, do):
        super().__init__(" ".join(f"{where}: expected {expected}, found {str(found)[:200]}; do {do}".split()))


def need(ok, *why):
    """Raise BadInput(*why) unless ok."""
    if not ok:
        raise BadInput(*why)


# ------------------------------------------------------------------------------------------------------- runs

@dataclass(frozen=True)
class Run:
    """One finished training run; loss in nats per token (bits per byte after `in_unit`)."""
    flops: float
    params: float
    tokens: float
    loss: float
    budget: float = 0.0             # nominal C of its bowl; 0 until `checked` groups the runs
    kind: str = "isoflop"           # "isoflop" is fitted, "held_out" is an outcome, "excluded" is only kept
    seed: str = ""
    eval: str = ""
    tokenizer: str = ""
    bytes_per_token: float = 0.0    # of the evaluation text; 0 is unknown
    bpb: float = 0.0                # bits per byte as measured, a mean over domains; 0: from the loss
    source: str = ""
    extra: dict = field(default_factory=dict, compare=False)


# {budget: {width: Paloma macro loss}} [cited: #4447 v16, #6074 and #8003 May]. Tokens follow from
# flops_per_token, to 3e-4 of the posted counts (tests); at 1e21 only the last run of each width.
MOE_V16 = {
    1e18: {512: 3.539674, 640: 3.522152, 768: 3.527292, 896: 3.587628, 1024: 3.623152, 1280: 3.748672,
           1536: 3.939782, 1792: 4.121221},
    3e18: {512: 3.414755, 640: 3.367424, 768: 3.339798, 896: 3.345855, 1024: 3.347597, 1280: 3.405738,
           1536: 3.509923, 1792: 3.618996, 2048: 3.737143},
    1e19: {512: 3.332810, 640: 3.248370, 768: 3.209400, 896: 3.164016, 1024: 3.149416, 1280: 3.162015,
           1536: 3.201606, 1792: 3.261857, 2048: 3.329172},
    3e19: {640: 3.170573, 768: 3.114366, 896: 3.051757, 1024: 3.015672, 1280: 3.007957, 1536: 3.006631,
           1792: 3.037368, 2048: 3.070442},
    1e20: {768: 3.056129, 1024: 2.918911, 1280: 2.877778, 1536: 2.850873, 1792: 2.860672, 2048: 2.872195},
    3e20: {1280: 2.787324, 1536: 2.743016, 1792: 2.734173, 2048: 2.722151, 2304: 2.732576},
    1e21: {2048: 2.605977, 2560: 2.598692},
    1e23: {5120: 2.2333362}}                            # the 129B run, after 2.252 had been posted
MOE_MAY = {
    1e18: {512: 3.392345, 768: 3.402113, 1024: 3.471169},
    3e18: {512: 3.269317, 768: 3.220896, 1024: 3.240918, 1280: 3.298348},
    1e19: {512: 3.184254, 768: 3.073707, 1024: 3.042225, 1280: 3.065161},
    3e19: {512: 3.124572, 768: 2.968832, 1024: 2.910512, 1280: 2.904488}}
# [cited: #1337, openathena.ai/blog/delphi] C, D*, N*, loss*, curvature in log10 D of Marin's seven parabolas
DELPHI_VERTICES = ((3.0e18, 1479419846.435, 380691293.436, 3.5861880886, 0.5732953358),
                   (9.0e18, 2898203413.910, 558458701.503, 3.3857490912, 0.5283811119),
                   (1.8e19, 4202416947.878, 753603925.229, 3.2705098588, 0.4649342634),
                   (3.0e19, 5697236384.014, 909880015.607, 3.1949105544, 0.3978805226),
                   (9.0e19, 10246124083.970, 1478431211.248, 3.0410230303, 0.3389222170),
                   (1.8e20, 15402871298.448, 1936095968.268, 2.9463606138, 0.3356739652),
                   (3.0e20, 20875750175.553, 2353770604.589, 2.8829059352, 0.3249631499))
# C, N, D, then the losses (one a seed) of the runs after Delphi's forecast; the last had loss spikes
DELPHI_HELD_OUT = ((1e21, 3383110656, 46256881664, (2.758141, 2.760562, 2.759510)),
                   (1e22, 9714698752, 160369213440, (2.530787, 2.534246, 2.531137)),
                   (1e23, 24963098112, 628172521472, (2.354601,)))
JUNE_ANCHORS = ((2.00e19, 3.2373), (1.31e20, 2.9538), (7.16e20, 2.7515))          # [cited: #6044] C, loss
TABLES = ("moe_v16", "may", "delphi", "june")


def reference(name):
    """Runs of a public table typed above; "delphi" holds vertices and outcomes, "june" three anchors."""
    if name == "delphi":
        return ([Run(C, N, D, L, C, source=name) for C, D, N, L, _ in DELPHI_VERTICES]
                + [Run(C, N, D, L, C, "held_out", str(i), source=name)
                   for C, N, D, losses in DELPHI_HELD_OUT for i, L in enumerate(losses)])
    if name == "june":
        return [Run(C, math.nan, math.nan, L, C, source=name) for C, L in JUNE_ANCHORS]
    table, experts = (MOE_V16, 64) if name == "moe_v16" else (MOE_MAY, 256)
    runs = []
    for C, row in table.items():
        for width, loss in row.items():
            # Marin's own fit leaves 640 and 896 out, for no stated reason; we follow, to reproduce it.
            kind = "held_out" if C > 5e20 else "excluded" if width in (640, 896) else "isoflop"
            sizes = shape(width, experts) | ({"num_layers": 48} if width == 5120 else {})   # rule: 49
            runs.append(Run(C, sweep_params(sizes), C / flops_per_token(sizes, VOCAB), loss, C, kind,
                            source=name, extra={"hidden_dim": width}))
    return runs


def number(text, where, key, low=0.0, high=1e40):
    """`text` as a finite float in (low, high], else BadInput."""
    try:
        value = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    need(low < value <= high, where, f"{key} to be a number above {low:g} and at most {high:g}",
         repr(text)[:40], f"correct {key}")
    return value


# What a table may say: the columns that are numbers, with the open lower and the closed upper end of each
MAY_BE_ZERO = ("num_experts", "experts_per_token", "expert_dim", "shared_dim")
SHAPE_COLUMNS = ("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "seq_len",
                 "gated_norm_rank") + MAY_BE_ZERO
NUMBERS = (dict.fromkeys(("flops", "budget_flops", "params", "tokens"), (1, 1e40))
           | dict(loss=(1e-3, 100), bpb=(0, 100), bytes_per_token=(0, 1e3), vocab_size=(0.99, 1e9))
           | dict.fromkeys(SHAPE_COLUMNS, (0.99, 1e6)) | dict.fromkeys(MAY_BE_ZERO, (-1, 1e6)))
MEASURED, WORDS = ("params", "tokens", "loss", "bytes_per_token", "bpb"), ("kind", "seed", "eval", "tokenizer")


def read_csv(path, head=False):
    """Runs of a table with a header of flops (or budget_flops), params, tokens, loss; other columns are kept.

    head: take C from the column flops_with_head, if there is one. A blank params or tokens is derived from the
    row's hidden_dim, num_experts and other shape columns."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(path, "a UTF-8 table of comma-separated values", error, "export it again") from None
    names = lines[0][1] if lines else []
    if head and "flops_with_head" in names:
        other = {"flops_with_head": "flops", "flops": "flops_without_head"}
        names = [other.get(name, name) for name in names]
    C_column = "flops" if "flops" in names else "budget_flops"
    required = (C_column, "loss") + (() if "hidden_dim" in names else ("params", "tokens"))
    missing = [column for column in required if column not in names]
    need(not missing and len(set(names)) == len(names), path, "columns flops, params, tokens, loss, each once",
         ", ".join(names) or "nothing", f"rename or add {', '.join(missing) or 'what stands twice'}")
    runs = []
    for line, cells in lines[1:]:
        row, where = dict(zip(names, cells)), f"{path} line {line}"
        need(len(cells) == len(names), where, f"{len(names)} cells", len(cells), "quote commas, fill the gaps")
        need(row.get("kind", "") in ("", "isoflop", "held_out", "excluded"), where,
             "kind isoflop, held_out or excluded", row.get("kind"), "correct the cell")
        value = {key: number(row[key], where, key, *ends) for key, ends in NUMBERS.items()
                 if row.get(key) or key in (C_column, "loss")}
        if not {"params", "tokens"} <= value.keys():
            value = derived(value, value[C_column], where) | value
        runs.append(Run(value[C_column], budget=value.get("budget_flops", 0.0), source=str(path),
                        **{key: value[key] for key in MEASURED if key in value},
                        **{key: row[key] for key in WORDS if row.get(key)},
                        extra={key: row[key] for key in names if key not in NUMBERS and key not in WORDS}))
    return runs


def derived(row, C, where):
    """dict(params, tokens) of a table's row by its shape; keys that it leaves blank follow the recipe."""
    given = {key: int(row[key]) for key in SHAPE_COLUMNS if key in row}
    need({"hidden_dim", "num_experts"} <= given.keys(), where,
         "params and tokens, or hidden_dim and num_experts to derive them from",
         f"only {', '.join(row)}", "fill the cells")
    sizes = shape(given["hidden_dim"], given["num_experts"], given.get("head_dim", 128), where) | given
    vocab = int(row.get("vocab_size", VOCAB))
    return dict(params=param_counts(sizes, vocab)["core"] + vocab * sizes["hidden_dim"],
                tokens=C / flops_per_token(sizes, vocab))


def read_json(path):
    """The object in a JSON file, else BadInput."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        value = str(error)[:80]
    need(isinstance(value, dict), path, "a JSON object", value, "restore the file")
    return value


def read_run_dir(folder, head=False):
    """The Run of a finished train.py run directory, its C with the head or by train.py's convention; what else
    result.json holds, such as the loss of each domain, the speed and the commit, is kept in `extra`."""
    path = Path(folder) / "result.json"
    need(path.is_file(), folder, "a finished run (result.json)", "none", "let it finish, or leave it out")
    result, train = read_json(path), read_json(Path(folder) / "config.json").get("train")
    with_head = result.pop("flops_with_head", None)
    result |= {"flops": with_head} if head else {}
    known = {key: number(result.pop(key, None), path, key, *NUMBERS[key]) for key in ("flops", *MEASURED)}
    return Run(**known, seed=str(result.pop("seed", "")), eval=str(result.pop("eval", "")), source=str(folder),
               tokenizer=str(train.get("tokenizer", "")) if isinstance(train, dict) else "",
               extra=result | {"run_dir": str(folder)})


def checked(runs, source):
    """The same runs, each with a budget; BadInput for duplicates, several evals, or nothing to fit.

    Runs without a nominal budget are sorted by FLOPs; a gap of more than 25 % begins the next budget."""
    times = Counter((r.flops, r.params, r.tokens, r.seed, r.kind) for r in runs)
    for run, found in times.items():
        need(found == 1, source, "each run once", "C={:g} N={:g} D={:g} seed={} {} twice".format(*run),
             "delete one, or give the repeats their seeds")
    evals = sorted({run.eval for run in runs})
    need(len(evals) < 2, source, "one eval definition", f"{len(evals)}: {evals}", "fit each eval on its own")
    need(any(run.kind == "isoflop" for run in runs), source, "at least one isoFLOP run",
         f"none in {len(runs)} runs", "add the ladder")
    C = np.array(sorted({run.flops for run in runs if not run.budget}))
    groups = np.split(C, np.flatnonzero(np.diff(np.log(C)) > math.log(1.25)) + 1)
    nominal = {c: float(f"{np.exp(np.log(group).mean()):.4g}") for group in groups for c in group}
    return [replace(run, budget=run.budget or nominal[run.flops]) for run in runs]


def in_unit(runs, unit, source):
    """Losses in "nats" per token or "bpb", bits per byte. Tokenizers compare only in the latter: a token that
    spans more bytes costs more nats for the same knowledge of the text."""
    kinds = sorted({(r.tokenizer, round(r.bytes_per_token, 3)) for r in runs})
    need(unit == "bpb" or len(kinds) < 2, source, "one tokenizer for a forecast in nats per token",
         f"{len(kinds)}: {kinds[:3]}", "use --unit bpb, since only bits per byte compare across tokenizers")
    need(unit == "nats" or all(r.bytes_per_token or r.bpb for r in runs), source,
         "bpb or bytes_per_token for every run", "a run without", "add the column")
    per_byte = lambda r: r.bpb or r.loss / math.log(2) / r.bytes_per_token
    return runs if unit == "nats" else [replace(r, loss=per_byte(r)) for r in runs]


# ------------------------------------------------------------------------------------------- shapes and FLOPs

def shape(hidden_dim, experts=64, unit=128, where="hidden_dim", aspect=0.0, group=4, head_dim=0):
    """Config keys of a width by the recipe's rules [cited: #4447]; experts=0 is dense (4x MLP, no GQA).

    unit is the head width and the rounding of the expert width: 128 in the recipe, less on a laptop. aspect is
    the width per layer, for models of two layers and more; 0 is the recipe's rule, one layer up to width 123.
    group is the query heads that share a key/value head, or more where it does not divide them. head_dim: heads
    are no narrower than that, but the narrowest (of 4 k, for half-RoPE) that divide the width."""
    need(hidden_dim >= max(unit, head_dim) and hidden_dim % unit == 0, where,
         f"hidden_dim a positive multiple of {unit}", hidden_dim, "choose such a width, or give head_dim")
    head_dim = next((h for h in range(head_dim, hidden_dim) if hidden_dim % h == 0 and h % 4 == 0),
                    hidden_dim) if head_dim else unit
    heads = hidden_dim // head_dim
    grouped = max([k for k in range(1, heads // group + 1) if heads % k == 0] or [1])
    return dict(hidden_dim=hidden_dim, seq_len=4096, head_dim=head_dim, num_heads=heads,
                num_layers=(max(2, round(hidden_dim / aspect)) if aspect else
                            max(1, round(hidden_dim / (64 + 4 * math.log2(hidden_dim) - 9)))),
                num_kv_heads=grouped if experts else heads, num_experts=experts,
                experts_per_token=min(4, experts),
                expert_dim=math.ceil(hidden_dim / 2 / unit) * unit if experts else 0,
                shared_dim=hidden_dim if experts else 4 * hidden_dim, gated_norm_rank=128)


def flops_per_token(sizes, vocab_size, head=False):
    """Training FLOPs per token: 3x forward, scores over all of seq_len, head only when dense [cited: #4447].

    head: count it in every model. At the recipe's widths it is small change; in a laptop's ladder it is most of
    the smallest models, and dense and sparse ones compare only with it. Norms, gates and the embedding are not
    counted. This is model.count's convention; it is never 6 N."""
    d, s, H, h = sizes["hidden_dim"], sizes["seq_len"], sizes["num_heads"], sizes["head_dim"]
    layer = (6 * d * sizes["expert_dim"] * sizes["experts_per_token"] + 6 * d * sizes["shared_dim"]
             + (2 * d * sizes["num_experts"] if sizes["num_experts"] > 1 else 0)
             + 2 * d * h * (H + 2 * sizes["num_kv_heads"]) + 2 * H * h * d + 4 * s * H * h + 3 * s * H)
    return 3 * (sizes["num_layers"] * layer + (2 * d * vocab_size if head or not sizes["num_experts"] else 0))


def param_counts(sizes, vocab_size):
    """dict(total, active, core) of model.py's network: active holds both embeddings, core neither.

    N in this file is core + vocab_size * hidden_dim: all that a token is multiplied with, hence the head."""
    d, H, h, E = sizes["hidden_dim"], sizes["num_heads"], sizes["head_dim"], sizes["num_experts"]
    norm_and_gate = d + 2 * d * sizes["gated_norm_rank"]
    expert = 3 * d * sizes["expert_dim"]
    shared_by_all = (d * h * (2 * H + 2 * sizes["num_kv_heads"]) + 3 * d * sizes["shared_dim"] + d * E + d * H
                     + 2 * norm_and_gate)
    core = sizes["num_layers"] * (shared_by_all + sizes["experts_per_token"] * expert) + 2 * norm_and_gate
    idle = sizes["num_layers"] * (E - sizes["experts_per_token"]) * expert
    return dict(total=core + idle + 2 * vocab_size * d, active=core + 2 * vocab_size * d, core=core)


def sweep_params(sizes, vocab_size=VOCAB):
    """N as Marin's v16 sweep counted it [derived: it gives the N* posted in #4447]: attention as four full
    squares in spite of GQA, no norms or gates."""
    d = sizes["hidden_dim"]
    return (sizes["num_layers"] * (4 * d * d + 3 * d * sizes["expert_dim"] * sizes["experts_per_token"]
                                   + 3 * d * sizes["shared_dim"] + d * sizes["num_experts"]) + vocab_size * d)


# ------------------------------------------------------------------------------------------------------ bowls

@dataclass(frozen=True)
class Choices:
    """Everything that decides a fit; stored whole in a registration."""
    method: str = "shared"          # a key of METHODS
    axis: str = "tokens"            # the bowl's horizontal axis: tokens | params
    window: float | None = None     # keep only runs within this factor of the vertex
    asymptote: float | None = None  # E; None leaves it free
    space: str = "log"              # residuals of log(L - E), or of L ("linear")
    head: bool = False              # C counts the output head in every model, not only in dense ones


METHODS = {
    # E_c + A_c x^p + B_c x^-q, with p and q common to all budgets. Along an isoFLOP N is C/(kD), so a loss
    # surface has just this form: no bias without noise, and no E that is common to all budgets.
    "shared": "bowls with shared exponents",
    # A quadratic in log x, each budget alone: what everyone uses. The truth is lopsided, so the vertex moves
    # with the sampling (see `bias`). Kept as the baseline. A cubic has less bias and more noise.
    "parabola": "a parabola per budget (biased baseline)", "cubic": "a cubic per budget",
    "best": "lowest run per budget",                # for tables of optima, and for budgets of one run
    "surface": "a global surface"}                  # all runs at once; `surface` says why it is no default


def by_budget(runs):
    """{budget: indices of its runs}, cheapest first."""
    budgets = np.array([r.budget for r in runs])
    return {float(C): np.flatnonzero(budgets == C) for C in np.unique(budgets)}


def columns(runs, *names):
    """One float array per attribute of the runs."""
    return np.array([[getattr(r, name) for r in runs] for name in names], float)


def variable_projection(log_u, log_v, y, groups, start=None):
    """Fit y = E + A u^-p + B v^-q, p and q common to all groups: ((p, q), residuals, [(E, A, B) per group]).

    VPNLS [cited: Czech et al.]: given p and q, non-negative least squares find the rest, so only two numbers
    are searched: on a 32 x 32 grid (if no start), then by Gauss-Newton."""
    def solve(pq):
        terms = np.stack([np.ones_like(y), np.exp(-pq[0] * log_u), np.exp(-pq[1] * log_v)], 1)
        weights, residual = [nnls(terms[rows], y[rows])[0] for rows in groups], np.empty_like(y)
        for rows, EAB in zip(groups, weights):
            residual[rows] = y[rows] - terms[rows] @ EAB
        return residual, weights

    residual = lambda pq: solve(pq)[0]
    tolerance = 1e-15 if start is None else 1e-9
    if start is None:
        grid = np.geomspace(0.03, 1.5, 32)
        start = min(((p, q) for p in grid for q in grid), key=lambda pq: np.sum(residual(pq)**2))
    fit = least_squares(residual, start, "3-point", (0.01, 3), xtol=tolerance, ftol=tolerance, gtol=1e-15)
    return fit.x, *solve(fit.x)


def shared_bowls(x, y, groups, start):
    """([(curve of x = log10 tokens or parameters, its lowest x or None)], (p, q)), a curve per group."""
    middle, log_x = [x[rows].mean() for rows in groups], np.empty_like(x)
    for rows, m in zip(groups, middle):
        log_x[rows] = math.log(10) * (x[rows] - m)
    (p, q), _, weights = variable_projection(-log_x, log_x, y, groups, start)
    found = []
    for m, (E, A, B) in zip(middle, weights):
        curve = lambda z, m=m, E=E, A=A, B=B: E + A * 10**(p * (z - m)) + B * 10**(-q * (z - m))
        two_sided = min(A, B) > 1e-12 * max(A, B, E)
        found.append((curve, m + math.log10(q * B / (p * A)) / (p + q) if two_sided else None))
    return found, (p, q)


def polynomial_bowl(x, y, degree):
    """(curve, its lowest x or None): least squares; of two minima the one nearest the runs."""
    curve = Polynomial.fit(x, y, degree)
    lowest = [z.real for z in curve.deriv().roots() if abs(z.imag) < 1e-9 and curve.deriv(2)(z.real) > 0]
    return curve, min(lowest, key=lambda z: abs(z - x.mean()), default=None)


def vertex(C, runs, tokens, params, loss, curvature=math.nan, flags=(), curve=None):
    """The compute-optimal point of one budget; curvature in loss per square of log10 x."""
    return dict(budget=C, runs=runs, tokens=float(tokens), params=float(params), loss=float(loss),
                curvature=float(curvature), flags=list(flags), _curve=curve)


def bowls(runs, choices, start=None, inside=True):
    """dict(vertices, fitted, unknowns, start): where each budget's bowl is lowest, and how low.

    Raises BadInput for a bowl of too few runs, without a minimum or (if `inside`) with one outside them."""
    groups, axis, least = by_budget(runs), choices.axis, 4 if choices.method == "cubic" else 3
    y, D, N = columns(runs, "loss", "tokens", "params")
    if choices.method == "best":
        lowest = [(C, len(rows), rows[np.argmin(y[rows])]) for C, rows in groups.items()]
        vertices = [vertex(C, count, D[i], N[i], y[i]) for C, count, i in lowest]
        return dict(vertices=vertices, fitted=y, unknowns=len(y), start=None)
    x, other = np.log10([D, N] if axis == "tokens" else [N, D])

    def need_bowl(ok, C, expected, found):
        need(ok, f"{runs[0].source}: budget {C:.3g}", expected, found, "add runs there, or leave it out")

    for C, rows in groups.items():
        distinct = len(np.unique(x[rows].round(5)))
        need_bowl(distinct >= least, C, f"at least {least} runs of different {axis}", distinct)
    if choices.method == "shared":
        enough = 3 * len(groups) + 3                # two shared exponents, and something left for the noise
        need(len(y) >= enough, runs[0].source, f"at least {enough} runs for {len(groups)} shared bowls",
             len(y), "add runs, or use --method parabola")
        found, start = shared_bowls(x, y, list(groups.values()), start)
    else:
        found = [polynomial_bowl(x[rows], y[rows], least - 1) for rows in groups.values()]

    fitted, vertices = np.empty_like(y), []
    for (C, rows), (curve, at) in zip(groups.items(), found):
        need_bowl(at is not None, C, "a bowl that opens upwards", "no minimum")
        sides = {"fewer": np.sum(x[rows] < at), "more": np.sum(x[rows] > at)}
        if inside:
            need_bowl(min(sides.values()), C, "a minimum inside the sampled {}, {:.3g} to {:.3g}".format(
                axis, 10**x[rows].min(), 10**x[rows].max()), f"{10**np.clip(at, -99, 99):.3g}")
        flags = [f"only {n} run with {side} {axis}" for side, n in sides.items() if n < 2]
        fitted[rows], loss = curve(x[rows]), curve(at)
        curvature = (curve(at + 1e-3) - 2 * loss + curve(at - 1e-3)) / 2e-6
        line = Polynomial.fit(x[rows], other[rows], 1)              # the other axis: a line in log-log
        D_star, N_star = (10**at, 10**line(at)) if axis == "tokens" else (10**line(at), 10**at)
        vertices.append(vertex(C, len(rows), D_star, N_star, loss, curvature, flags, curve))
    unknowns = least * len(groups) + 2 * (choices.method == "shared")
    return dict(vertices=vertices, fitted=fitted, unknowns=unknowns, start=start)


def windowed(runs, choices):
    """The runs within choices.window of their bowl's vertex (found from all of them; once, not iterated)."""
    if choices.window is None:
        return runs
    first = replace(choices, method="parabola" if choices.method == "surface" else choices.method)
    centre = {v["budget"]: v[choices.axis] for v in bowls(runs, first)["vertices"]}
    off = lambda r: abs(math.log(getattr(r, choices.axis) / centre[r.budget]))
    return [r for r in runs if off(r) <= math.log(choices.window)]


# --------------------------------------------------------------------------------------------------- envelope

def envelope(C, L, asymptote=None, space="log", where="envelope"):
    """L(C) = E + A C^-alpha through the vertices: dict(E, A, alpha, ssr, space, free).

    In log space each E gives a straight line. A free E is the best of 400 between 0 and 0.95 min L: Marin's
    public forecasts were made so, and the grid's step (0.007) is far below the uncertainty of E."""
    c, L, free = np.log(np.asarray(C) / REFERENCE), np.asarray(L, float), asymptote is None
    need(len(c) >= 3 + free, where, f"at least {3 + free} budgets with E {'free' if free else 'fixed'}",
         len(c), "add budgets" + (", or fix E by --asymptote" if free else ""))
    need(L.min() > 0, where, "vertices of positive loss", L.min(), "check the losses")
    need(free or 0 <= asymptote < L.min(), "--asymptote", f"0 to below the lowest loss {L.min():.4f}",
         asymptote, "lower it")
    E = np.linspace(0, 0.95 * L.min(), 400) if free else np.array([asymptote])
    y, centred = np.log(L - E[:, None]), c - c.mean()
    slope, level = y @ centred / (centred @ centred), y.mean(1)
    squares = np.sum((y - level[:, None] - slope[:, None] * centred)**2, 1)
    i = int(np.argmin(squares))
    E, log_A, alpha, ssr = E[i], level[i] - slope[i] * c.mean(), -slope[i], squares[i]      # A at REFERENCE
    if space == "linear":
        residual = lambda p: (p[0] if free else E) + np.exp(p[-2] - p[-1] * c) - L
        bounds = ([0, -np.inf, -np.inf], [L.min(), np.inf, np.inf]) if free else (-np.inf, np.inf)
        best = least_squares(residual, [E, log_A, alpha][not free:], bounds=bounds, x_scale="jac", ftol=1e-14)
        E, log_A, alpha = best.x if free else (E, *best.x)
        ssr = 2 * best.cost
    need(1e-6 < alpha < 3, where, "a falling loss, alpha in 0..3", f"{alpha:.3g}", "check the runs")
    A = np.exp(log_A + alpha * np.log(REFERENCE))
    return dict(E=float(E), A=float(A), alpha=float(alpha), ssr=float(ssr), space=space, free=free)


def loss_at(law, C):
    """The loss that an envelope or a surface expects from the compute-optimal run of C FLOPs."""
    if "beta" not in law:
        return law["E"] + law["A"] * C**-law["alpha"]
    N, D = surface_optimum(law, C)
    return law["E"] + law["A"] * N**-law["alpha"] + law["B"] * D**-law["beta"]


def power_law(C, y, exact=False):
    """y = coefficient C^exponent by a line in log-log, with a Student-t interval (unless y is exact, where it
    would mean nothing); None for unknown y."""
    if not np.all(np.isfinite(y)) or len(C) < 3:
        return None
    line = linregress(np.log(C), np.log(y))
    half = student.ppf((1 + LEVEL) / 2, len(C) - 2) * line.stderr
    return dict(coefficient=float(np.exp(line.intercept)), exponent=float(line.slope),
                interval=None if exact else [float(line.slope - half), float(line.slope + half)])


# ------------------------------------------------------------------------------------------------ uncertainty

def delta_interval(law, C, L, target):
    """Delta-method Student-t interval for the loss of a new run at `target`; None without spare budgets."""
    spare = len(C) - 2 - law["free"]
    if spare < 1:
        return None

    def slopes(C):
        """dL / d(E, log A, alpha), a row per C, and how many nats one unit of the fit's residual is there."""
        c, height = np.log(C / REFERENCE), loss_at(law, C) - law["E"]
        rows = np.stack([np.ones_like(c), height, -c * height], -1)[..., 0 if law["free"] else 1:]
        return rows, height if law["space"] == "log" else np.ones_like(c)       # of log(L - E), or of L

    (J, nats), (g, nats_there) = slopes(np.asarray(C)), slopes(np.asarray(target))
    J = J / nats[:, None]
    variance = law["ssr"] / spare * (g @ np.linalg.pinv(J.T @ J) @ g + nats_there**2)
    half = student.ppf((1 + LEVEL) / 2, spare) * math.sqrt(variance)
    return [float(loss_at(law, target) - half), float(loss_at(law, target) + half)]


def run_bootstrap(runs, fit, choices, targets, draws=400, seed=0):
    """(intervals or None, share of failed refits): resample the runs' residuals about their bowls, refit all,
    forecast one new run at each target. A refit may put a vertex outside its runs, the first fit may not."""
    residual, spare = columns(runs, "loss")[0] - fit["fitted"], len(runs) - fit["unknowns"]
    if spare < 1:
        return None, 0.0
    residual = (residual - residual.mean()) * math.sqrt(len(runs) / spare)    # fitted ones are too small
    rng, forecasts = np.random.default_rng(seed), []
    for _ in range(draws):
        losses = fit["fitted"] + rng.choice(residual, len(runs))
        sample = [replace(r, loss=float(y)) for r, y in zip(runs, losses)]
        with contextlib.suppress(BadInput):
            law = fit_law(sample, choices, fit["start"], inside=False)["law"]
            forecasts.append([loss_at(law, C) + rng.choice(residual) for C in targets])
    failed = 1 - len(forecasts) / draws
    if failed > 0.5:
        return None, failed
    return np.quantile(forecasts, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T.tolist(), failed


def profile(C, L, targets, space, chosen):
    """Forecasts as a function of an assumed E, and which E the vertices allow (an F test on one parameter).

    The asymptote is most of what nobody knows about an extrapolation: this stands beside every interval."""
    assumed = np.union1d(np.arange(0, 0.95 * min(L), 0.025).round(3), [chosen])
    laws = [envelope(C, L, E, space) for E in assumed]
    spare, least = len(L) - 3, min(law["ssr"] for law in laws)
    limit = least * (1 + student.ppf((1 + LEVEL) / 2, spare)**2 / spare) if spare > 0 else math.inf
    return [dict(E=law["E"], alpha=law["alpha"], ssr=law["ssr"], allowed=bool(law["ssr"] <= limit),
                 losses=[loss_at(law, C) for C in targets]) for law in laws]


def refits(runs, choices, targets, keep):
    """[dict(budget, E, losses at the targets)]: for each budget a fit to the runs that keep(run, budget)."""
    rows = []
    for budget in by_budget(runs):
        with contextlib.suppress(BadInput):                 # too few budgets left for this method: no row
            law = fit_law([r for r in runs if keep(r, budget)], choices)["law"]
            rows.append(dict(budget=budget, E=law["E"], losses=[loss_at(law, C) for C in targets]))
    return rows


def backtest(runs, choices, truth):
    """Fit the budgets up to each one, forecast the later vertices (`truth`): dict(up_to, E, errors in %)."""
    tests, can_decide_E = [], [*by_budget(runs)][3 if choices.asymptote is None else 2:]
    for row in refits(runs, choices, [v["budget"] for v in truth], lambda r, last: r.budget <= last):
        errors = [100 * (v["loss"] / y - 1) for v, y in zip(truth, row["losses"]) if v["budget"] > row["budget"]]
        if errors and row["budget"] in can_decide_E:
            tests.append(dict(up_to=row["budget"], E=row["E"], errors_percent=errors))
    return tests


def bending(tests, vertices, law):
    """Does the ladder bend away from one power law? Four signs and a verdict; seven budgets prove little."""
    several = [test["errors_percent"] for test in tests if len(test["errors_percent"]) > 1]
    same_sign = len({np.sign(e) for errors in several for e in errors}) == 1
    growing = same_sign and all(np.all(np.diff(np.abs(errors)) > 0) for errors in several)
    drift, p = np.diff([test["E"] for test in tests]), math.nan
    one_way = len(drift) > 1 and bool(np.all(drift > 0) or np.all(drift < 0))
    c, y = np.log([v["budget"] for v in vertices]), np.log([v["loss"] - law["E"] for v in vertices])
    if len(c) > 3 and np.all(np.isfinite(y)):               # the t test of a quadratic term in log-log
        weights, covariance = np.polyfit((c - c.mean()) / c.std(), y, 2, cov=True)
        p = float(2 * student.sf(abs(weights[0]) / math.sqrt(max(covariance[0, 0], 1e-300)), len(c) - 3))
    bends = growing or (same_sign and one_way) or p < 0.05
    verdict = "bending suspected" if bends else "no sign of bending" if several else "too few budgets to tell"
    return dict(same_sign=same_sign, growing=bool(growing), E_drifts_one_way=one_way, quadratic_p=p,
                verdict=verdict)


# ---------------------------------------------------------------------------------------------------- surface

def surface(runs, method="vpnls", start=None):
    """(law, fitted): L = E + A N^-alpha + B D^-beta through all runs at once.

    Exact on synthetic data, 13 % off on Marin's ladder, whose budgets differ in more than N and D; never the
    default [derived: `fit DELPHI.csv --method surface`]. "vpnls" minimises squared loss, "huber_lse" a
    Huber loss (1e-3) of log-loss through log-sum-exp (Hoffmann et al.), started from the former."""
    N, D, y = columns(runs, "params", "tokens", "loss")
    need(len(y) >= 6, runs[0].source, "at least 6 runs for a surface", len(y), "add runs")
    log_n, log_d = np.log(N).mean(), np.log(D).mean()           # centred, the two terms are of like size
    u, v = np.log(N) - log_n, np.log(D) - log_d
    (alpha, beta), residual, [(E, A, B)] = variable_projection(u, v, y, [np.arange(len(y))], start)
    need(min(A, B) > 0, runs[0].source, "a loss that falls with N and D", "A or B clipped at 0", "use bowls")
    status = ["E clipped at zero"] * bool(E == 0) + ["exponent at its bound"] * bool(max(alpha, beta) > 2.9)
    if method == "huber_lse":
        model = lambda p: logsumexp([np.full(len(y), p[0]), p[1] - p[3] * u, p[2] - p[4] * v], axis=0)
        best = minimize(lambda p: 1e6 * np.sum(huber(1e-3, model(p) - np.log(y))), method="L-BFGS-B",
                        x0=[*np.log([max(E, 1e-9), A, B]), alpha, beta],
                        options=dict(maxiter=5000, ftol=1e-15))
        (E, A, B), (alpha, beta), residual = np.exp(best.x[:3]), best.x[3:], y - np.exp(model(best.x))
    top = max(r.budget for r in runs)
    k = np.median([r.flops / (r.params * r.tokens) for r in runs if r.budget == top])
    law = dict(E=E, A=A * np.exp(alpha * log_n), B=B * np.exp(beta * log_d), alpha=alpha, beta=beta, k=k,
               ssr=residual @ residual)
    return {key: float(value) for key, value in law.items()} | dict(status=status, free=True), y - residual


def surface_optimum(law, C):
    """(N*, D*) of a surface at C = k N D, k being that of the largest sampled budget."""
    p, q = law["alpha"], law["beta"]
    N = (p * law["A"] / (q * law["B"]))**(1 / (p + q)) * (C / law["k"])**(q / (p + q))
    return N, C / law["k"] / N


def fit_law(runs, choices, start=None, inside=True):
    """dict(law, vertices, fitted, unknowns, start) by the chosen method; start warms up a refit."""
    if choices.method != "surface":
        fit = bowls(runs, choices, start, inside)
        C, L = [v["budget"] for v in fit["vertices"]], [v["loss"] for v in fit["vertices"]]
        return fit | {"law": envelope(C, L, choices.asymptote, choices.space, runs[0].source)}
    law, fitted = surface(runs, start=start)
    vertices = [vertex(C, len(rows), *surface_optimum(law, C)[::-1], loss_at(law, C))
                for C, rows in by_budget(runs).items()]
    return dict(law=law, vertices=vertices, fitted=fitted, unknowns=5, start=(law["alpha"], law["beta"]))


# --------------------------------------------------------------------------------------------------- analysis

def analyse(runs, choices, targets=(), unit="nats", source="runs", draws=400):
    """Everything `fit` reports, as one dict (keys that start with _ are for the pictures).

    Without targets the held-out budgets are forecast. Raises BadInput for whatever the user can mend."""
    runs = in_unit(checked(runs, source), unit, source)
    held = [r for r in runs if r.kind == "held_out"]
    ladder = windowed([r for r in runs if r.kind == "isoflop"], choices)
    fit = fit_law(ladder, choices)
    law, vertices, is_surface = fit["law"], fit["vertices"], choices.method == "surface"
    C, L = [v["budget"] for v in vertices], [v["loss"] for v in vertices]
    targets = list(targets) or sorted({r.budget for r in held}) or [10 * max(C)]
    boot, failed = run_bootstrap(ladder, fit, choices, targets, draws)
    N_star, D_star = (power_law(C, [v[key] for v in vertices], exact=is_surface) for key in ("params", "tokens"))
    curve = [] if is_surface else profile(C, L, targets, choices.space, law["E"])
    allowed = [row for row in curve if row["allowed"]]
    widths = {r.bytes_per_token for r in ladder}
    bytes_per_token = widths.pop() or None if len(widths) == 1 else None

    forecasts = []
    for i, target in enumerate(targets):
        N, D = (p and p["coefficient"] * target**p["exponent"] for p in (N_star, D_star))
        point, ends, ratio = loss_at(law, target), [row["losses"][i] for row in allowed], D / N if N else None
        forecasts.append(dict(
            C=target, loss=point, params=N, tokens=D, tokens_per_param=ratio,
            bytes_per_param=ratio * bytes_per_token if ratio and bytes_per_token else None,
            intervals=dict(run_bootstrap=boot[i] if boot else None,
                           delta_t=None if is_surface else delta_interval(law, C, L, target),
                           asymptote_profile=[min(ends), max(ends)] if ends else None),
            outcomes=[dict(loss=r.loss, seed=r.seed, error_percent=100 * (r.loss / point - 1))
                      for r in held if abs(r.flops / target - 1) < 0.02]))

    # A surface is tested on what the parabolas find at the later budgets, and must not do worse than they do.
    parabola = replace(choices, method="parabola")
    truth = bowls(ladder, parabola, inside=False)["vertices"] if is_surface else vertices
    tests = backtest(ladder, choices, truth)
    flags = doubts(choices, law, vertices, [row["E"] for row in allowed], min(r.loss for r in held or ladder))
    if failed > 0.01:
        flags.append(f"{100 * failed:.0f} % of the bootstrap refits failed")
    size = lambda tests: np.mean([abs(e) for test in tests for e in test["errors_percent"]] or [math.nan])
    if is_surface and (mine := size(tests)) > (theirs := size(backtest(ladder, parabola, truth))):
        flags.append(f"{MUST_NOT}: expanding-window backtest worse than the bowls', {mine:.2f} to "
                     f"{theirs:.2f} %")
    k = [r.flops / (r.params * r.tokens) for r in ladder]
    return dict(
        source=source, choices=asdict(choices), unit=unit, convention=CONVENTIONS[choices.head],
        eval=ladder[0].eval,
        runs=len(ladder), excluded=sum(r.kind == "excluded" for r in runs), k_range=[min(k), max(k)],
        bytes_per_token=bytes_per_token, envelope=law, vertices=vertices, N_star=N_star, D_star=D_star,
        shared_exponents=None if is_surface else fit["start"], forecasts=forecasts, profile=curve,
        surface_by_huber_lse=surface(ladder, "huber_lse")[0] if is_surface else None,
        backtest=tests, bending=bending(tests, vertices, law), flags=flags,
        leave_one_out=refits(ladder, choices, targets, lambda r, dropped: r.budget != dropped),
        rms_residual=math.sqrt(np.mean((columns(ladder, "loss")[0] - fit["fitted"])**2)),
        table=[asdict(r) for r in runs], _runs=ladder, _held=held,
        _left_out=[r for r in runs if r.kind == "excluded"])


def doubts(choices, law, vertices, tenable, lowest):
    """What to know before believing a fit, a line each. tenable: the E that the vertices allow; lowest: the
    best loss that came later, or else was fitted."""
    flags = [f"budget {v['budget']:.3g}: {flag}" for v in vertices for flag in v["flags"]]
    flags += law.get("status", [])
    if choices.method == "parabola":
        flags.append("parabola: its vertices are biased where the bowl is lopsided or off-centre (see: bias)")
    if choices.asymptote is None and not 0.005 < law["E"] / (0.95 * min(v["loss"] for v in vertices)) < 0.995:
        flags.append("E at the edge of its grid: the ladder does not determine it, fix it with --asymptote")
    if tenable and law["E"] not in tenable:
        flags.append(f"the vertices disagree with E = {law['E']:g}: they allow {tenable[0]:.2f} to "
                     f"{tenable[-1]:.2f}")
    if law["E"] > 0.98 * lowest:
        flags.append(f"{MUST_NOT}: E = {law['E']:.4f} lies above the best loss later reached, {lowest:.4f}, "
                     "or less than 2 % below")
    return flags


def plain(value):
    """`value` in JSON types: no numpy, null for NaN and infinity, no keys that start with an underscore."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def near_tenable(r, margin):
    """The rows of the profile up to `margin` beyond the asymptotes that the vertices allow and the one chosen."""
    E = [row["E"] for row in r["profile"] if row["allowed"]] + [r["envelope"]["E"]]
    return [row for row in r["profile"] if min(E) - margin < row["E"] < max(E) + margin]


def report(r):
    """The printed page of an analysis."""
    law, choice = r["envelope"], r["choices"]
    print(f"{r['source']}: {r['runs']} runs in {len(r['vertices'])} budgets, {r['excluded']} excluded; "
          f"{METHODS[choice['method']]} in {choice['axis']}, {UNITS[r['unit']]}\n{r['convention']}"
          + ("; k from {:.2f} to {:.2f}".format(*r["k_range"]) if r["N_star"] else "") +
          "\n\n     C  runs       D*         N*   D*/N*    loss*  curvature")
    for v in r["vertices"]:
        print(f"{v['budget']:8.3g} {v['runs']:3d} {v['tokens']:10.4e} {v['params']:10.4e} "
              f"{v['tokens'] / v['params']:6.1f}  {v['loss']:8.5f} {v['curvature']:8.4f}  "
              + "; ".join(v["flags"]))
    if "beta" in law:
        for name, s in (("VPNLS", law), ("Huber log-sum-exp", r["surface_by_huber_lse"])):
            print("L = {E:.4f} + {A:.5g} N^-{alpha:.4f} + {B:.5g} D^-{beta:.4f}   ".format(**s) + name)
    else:
        print("\nL(C) = {E:.4f} + {A:.2f} C^-{alpha:.5f}".format(**law) + ", E free" * law["free"])
    for name, p in (("N", r["N_star"]), ("D", r["D_star"])):
        if p:
            print(f"{name}* = {p['coefficient']:.4g} C^{p['exponent']:.4f}" + (
                ", exponent within {:.3f} .. {:.3f}".format(*p["interval"]) if p["interval"] else ""))

    for i, f in enumerate(r["forecasts"]):
        print(f"\nforecast at C = {f['C']:.4g}: {f['loss']:.4f}" +
              (f"   N* {f['params']:.3g}, D* {f['tokens']:.3g}" if f["params"] else "") +
              "".join(f", {f[f'{what}_per_param']:.1f} {what} per parameter" for what in ("tokens", "bytes")
                      if f[f"{what}_per_param"]))
        for name, ends in f["intervals"].items():
            print(f"  95 % by {name:18s}" + ("{:.4f} .. {:.4f}".format(*ends) if ends else "none"))
        if values := [row["losses"][i] for row in r["leave_one_out"]]:
            print(f"  leaving out one budget  {min(values):.4f} .. {max(values):.4f}")
        for o in f["outcomes"]:
            print(f"  came out at {o['loss']:.4f}: {o['error_percent']:+.2f} %")

    print("\nforecasts against the assumed asymptote (* where the vertices allow it)" if r["profile"] else "")
    for row in near_tenable(r, 0.2):
        if round(1000 * row["E"]) % 100 == 0:                       # the pictures draw the steps between
            print(f"{'*' if row['allowed'] else ' '} E = {row['E']:.2f}   "
                  + "  ".join(f"{y:.4f}" for y in row["losses"]))
    for row in r["backtest"]:
        print(f"backtest, budgets up to {row['up_to']:.3g}: E = {row['E']:.3f}, later vertices off by "
              + " ".join(f"{e:+.2f}" for e in row["errors_percent"]) + " %")
    print(f"verdict: {r['bending']['verdict']} (quadratic term p = {r['bending']['quadratic_p']:.3f})")
    print("".join(f"flag: {flag}\n" for flag in r["flags"]), end="")


def fit_of(a, targets):
    """What the options that `fit` and `register` share ask for."""
    need(bool(a.table) != bool(a.runs), "fit", "a table or --runs DIR ...", "both or neither", "give one")
    source = f"--runs ({len(a.runs)} directories)" if a.runs else a.table
    runs = ([replace(read_run_dir(folder, a.count_head), source=source) for folder in a.runs] if a.runs
            else reference(a.table) if a.table in TABLES else read_csv(a.table, a.count_head))
    E = None if a.asymptote == "free" else number(a.asymptote, "--asymptote", "E", -1e-12, 100)
    choices = Choices(a.method, a.axis, a.window, E, a.space, a.count_head)
    return analyse(runs, choices, targets, a.unit, source, a.draws)


# ------------------------------------------------------------------------------------------------------- bias

# [cited: Czech et al.] alpha, beta, A, B, E
SURFACES = {"symmetric": (0.31, 0.31, 400, 400, 1.69), "Chinchilla": (0.34, 0.28, 406.4, 410.7, 1.69),
            "asymmetric": (0.465, 0.155, 400, 400, 1.69)}
WIDTHS, SAMPLING = (2, 4, 8, 16), ("centred", "offset 3x", "drift to 3x")
BIAS_BUDGETS, BIAS_TARGET = 10.0**np.arange(17, 22), 1e24


def true_optimum(surface, C):
    """(N*, D*) of L = E + A/N^alpha + B/D^beta on C = 6 N D, the paper's own simplification."""
    return surface_optimum(dict(zip(("alpha", "beta", "A", "B"), surface), k=6), C)


def simulate(surface, width, sampling="centred", budgets=BIAS_BUDGETS, points=15, noise=0.0, rng=None):
    """A ladder with `points` sizes log-spaced within a factor `width` of a centre, maybe off the optimum."""
    (alpha, beta, A, B, E), runs = surface, []
    for i, C in enumerate(budgets):
        off = {"centred": 1, "offset 3x": 3, "drift to 3x": 3**(i / (len(budgets) - 1))}[sampling]     # in D
        for N in true_optimum(surface, C)[0] / off * np.geomspace(1 / width, width, points):
            loss = E + A * N**-alpha + B * (C / 6 / N)**-beta + (rng.normal(0, noise) if noise else 0)
            runs.append(Run(float(C), float(N), float(C / 6 / N), float(loss), float(C), source="simulation"))
    return runs


def extrapolation_error(surface, width, sampling, method):
    """Error in % of D*(1e24) extrapolated from five noise-free budgets 1e17..1e21."""
    vertices = bowls(simulate(surface, width, sampling), Choices(method), inside=False)["vertices"]
    law = power_law(BIAS_BUDGETS, [v["tokens"] for v in vertices])
    found = law["coefficient"] * BIAS_TARGET**law["exponent"]
    return 100 * (found / true_optimum(surface, BIAS_TARGET)[1] - 1)


def vertex_shift(alpha, beta, width, points=15):
    """Relative shift of N* in a centred parabola, in closed form: a bowl is, up to a factor and a constant,
    beta e^(-alpha w) + alpha e^(beta w) with w = ln N/N*, so the shift needs neither A, B, E nor C."""
    w = np.linspace(-math.log(width), math.log(width), points)
    a, b, _ = np.polyfit(w, beta * np.exp(-alpha * w) + alpha * np.exp(beta * w), 2)
    return math.exp(-b / (2 * a)) - 1


def bias(plot):
    """Print and draw what sampling does to a parabola, and does not do to bowls with shared exponents."""
    print(f"Error of D*({BIAS_TARGET:g}) in %, noise-free ladder 1e17..1e21, 15 sizes per budget within a "
          f"factor of its centre\n{'':24s}" + "".join(f"{f'x{w}':>10s}" for w in WIDTHS) + "  shared, worst")
    table = {}
    for name, truth in SURFACES.items():
        for sampling in SAMPLING:
            table[name, sampling] = [extrapolation_error(truth, w, sampling, "parabola") for w in WIDTHS]
            worst = max(abs(extrapolation_error(truth, w, sampling, "shared")) for w in WIDTHS)
            errors = "".join(f"{e:+10.3f}" for e in table[name, sampling])
            print(f"{name:11s}{sampling:13s}{errors}{worst:14.1e}")
    print("\nShift of a centred parabola's N* in %, closed form, the same at every C")
    for name, truth in SURFACES.items():
        print(f"{name:24s}" + "".join(f"{100 * vertex_shift(*truth[:2], w):+10.2f}" for w in WIDTHS))
    for name, truth in SURFACES.items():
        law = surface(simulate(truth, 8, "drift to 3x"))[0]
        worst = max(abs(law[key] / value - 1) for key, value in zip(("alpha", "beta", "A", "B", "E"), truth))
        print(f"VPNLS recovers the {name} surface to a relative {worst:.0e}")
    draw_bias(table, plot)


# ----------------------------------------------------------------------------------------------- registration

def fingerprint(sources):
    """sha256 over the files that a fit read: tables (the public ones stand in this file), run directories."""
    digest = hashlib.sha256()
    for source in sources:
        path = Path(__file__ if source in TABLES else source)
        for file in [path / "config.json", path / "result.json"] if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def seal(record):
    """sha256 of a record without its own seal."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_new(path, text):
    """Write `text` to a path that must not exist yet."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        raise BadInput(path, "a new file", "one that exists", "choose another name") from None


def register(a):
    """Write the forecast that the options of `register` ask for to the new file --out, for good."""
    result, sources = fit_of(a, [a.target]), a.runs or [a.table]
    law, choices, forecast = result["envelope"], result["choices"], result["forecasts"][0] | {"outcomes": []}
    definition = a.eval or result["eval"]
    need(definition, "--eval", "the eval definition (set, seq_len, sequences)", "none", "give it")
    need(definition == result["eval"] or not result["eval"], "--eval", f"that of the runs, {result['eval']}",
         a.eval, "leave it out")
    need(not any(flag.startswith(MUST_NOT) for flag in result["flags"]), result["source"],
         "a fit that may forecast", result["flags"], "take another --method")
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True,
                         text=True, cwd=Path(__file__).parent)
    target = dict(C=a.target, N=a.target_params or forecast["params"],
                  D=a.target_tokens or forecast["tokens"],
                  config=Path(a.target_config).read_text(errors="replace") if a.target_config else None)
    record = plain(dict(
        forecast=forecast, target=target, unit=result["unit"], eval=definition, failure=a.failure,
        known_differences=a.difference, envelope=law, choices=choices, flags=result["flags"],
        form="E + A N^-alpha + B D^-beta" if "beta" in law else "E + A C^-alpha",
        asymptote_policy="free" if choices["asymptote"] is None else "fixed",
        bytes_per_token=result["bytes_per_token"], flops_convention=result["convention"], runs=sources,
        runs_sha256=fingerprint(sources), scaling_sha256=fingerprint([__file__]),
        commit=git.stdout.strip() or "none", date=datetime.now(timezone.utc).isoformat(),
        versions=dict(python=platform.python_version(), numpy=np.__version__, scipy=scipy.__version__)))
    write_new(a.out, json.dumps(record | {"sha256": seal(record)}, indent=1) + "\n")
    print(f"registered {a.out}: {forecast['loss']:.4f} at C = {a.target:.4g}; commit it before the run")
    if "dirty" in record["commit"]:
        print("this checkout has uncommitted changes: commit them too, or the record cannot be scored later")


def score(path, loss=None, run=None):
    """Compare an outcome, a loss or a Run, with the record at `path` and append it to NAME.outcomes.jsonl.

    BadInput if the record, the runs or this file changed, or if the run is not the one that was forecast."""
    need(bool(loss) != bool(run), "score", "--loss X or --run DIR", "both or neither", "give one")
    record = read_json(path)
    need(record.get("sha256") == seal(record), path, "the record as it was registered", "an edited one",
         "git checkout the original")
    for name, files in (("runs", record["runs"]), ("scaling", [__file__])):
        was, found = record[f"{name}_sha256"], "nothing"
        with contextlib.suppress(OSError):
            found = fingerprint(files)
        need(was == found, " ".join(files), f"sha256 {was[:16]} as registered", found[:16],
             f"git checkout {record['commit'][:12]} and score there")
    if run:
        C, width = record["target"]["C"], record["bytes_per_token"]
        need(abs(run.flops / C - 1) < 0.02, run.source, f"C = {C:.4g} within 2 %", f"{run.flops:.4g}",
             "score the right run")
        need(run.eval == record["eval"], run.source, f"eval {record['eval']}", run.eval,
             "evaluate the run as registered")
        need(record["unit"] == "bpb" or not width or abs(run.bytes_per_token / width - 1) < 1e-3, run.source,
             f"{width} bytes per token", run.bytes_per_token,
             "register in --unit bpb, since nats per token do not compare across tokenizers")
        loss = in_unit([run], record["unit"], run.source)[0].loss
    point, intervals = record["forecast"]["loss"], record["forecast"]["intervals"]
    outcome = dict(record=record["sha256"], date=datetime.now(timezone.utc).isoformat(), loss=loss,
                   run=run.source if run else None, error_percent=100 * (loss / point - 1),
                   inside={name: ends[0] <= loss <= ends[1] for name, ends in intervals.items() if ends})
    with Path(path).with_suffix(".outcomes.jsonl").open("a") as file:
        file.write(json.dumps(outcome) + "\n")
    print(f"forecast {point:.4f}, came {loss:.4f} ({record['unit']}, {record['eval']}): "
          f"{outcome['error_percent']:+.2f} %")
    for name, inside in outcome["inside"].items():
        print("  {} {} {:.4f} .. {:.4f}".format("inside " if inside else "OUTSIDE", name, *intervals[name]))


# --------------------------------------------------------------------------------------------------- planning

# What a plan takes from --config, and its values without one; train.py's defaults are the rest of the recipe.
# [assumed: data and tokenizer that need no download]
CARRIED = dict(vocab_size=257, seq_len=4096, head_dim=128, num_experts=64, gated_norm_rank=128,
               mixture=(("books", 1.0),), tokenizer="bytes", recipe="v1")
DERIVED = ("hidden_dim", "num_layers", "head_dim", "num_heads", "num_kv_heads", "expert_dim", "shared_dim",
           "window", "steps", "batch_size", "run_dir")
RATES = ("adam_lr", "hyper_lr", "beta1", "beta2", "eps")        # follow from the size of a run: never carried


def learning_rates(recipe, tokens, batch_tokens, hidden_dim):
    """The RATES that train.py will derive, by heuristic "v1" [cited: #4225] or "v2" [cited: #5951].

    hyper_lr is the relative step of AdamH or MuonH."""
    if recipe == "v1":
        adam = 1.63 * tokens**-0.2813 * hidden_dim**-0.3678 * math.sqrt(batch_tokens / 4096)
        adam, hyper = min(0.05, adam), min(0.05, 13 / 3 * adam)
        eps = 1e-15 * math.sqrt(32 * 4096 * tokens / (batch_tokens * 1.4e9))
    else:
        adam = 0.06602 * tokens**-0.395 * hidden_dim**-0.150 * math.sqrt(batch_tokens)
        hyper, eps = 13 / 3 * adam, 9.676e-18 * math.sqrt(tokens / batch_tokens)
    beta2 = min(0.9999, max(0.95, 0.999**(batch_tokens / 131_072)))
    return dict(zip(RATES, (adam, hyper, 0.9062, beta2, eps)))


def optimal_tokens(C, dense=False, law=None):
    """D*(C) = a C^b by law (a, b), else by the tied-exponent law that chose the 129B shape [cited: #4447] or,
    if dense, Delphi's [cited: #1337]. Far below 1e18 FLOPs the published ones are extrapolated [assumed]."""
    coefficient, exponent = law or ((0.0267196, 0.5800830) if dense else (3.290, 0.5))
    return coefficient * C**exponent


def trained_tokens(keys):
    return keys["steps"] * keys["batch_size"] * keys["seq_len"]


def plan(C, base=(), tokens=None, batch=None, law=None, head=False, aspect=0.0, group=4, unit=0):
    """Config keys of one run: the width whose tokens, C/flops_per_token, come nearest `tokens` or D*(C).

    base: config keys to carry over, without rates, which the heuristic derives. Batch: a power of two, at
    least 32 sequences, for about 2^14 steps [cited: #4447]. unit: widths are its multiples, heads at least
    base's head_dim wide; 0 is the recipe's rule, widths in multiples of that. Raises BadInput for fewer than
    10 steps."""
    base = CARRIED | {key: value for key, value in dict(base).items() if key not in RATES}
    for key in ("head_dim", "num_experts", "seq_len", "vocab_size", "gated_norm_rank"):
        need(type(base[key]) is int and base[key] >= (key != "num_experts"), "--config",
             f"{key} to be a positive integer", base[key], "correct it")
    kept = {key: base[key] for key in ("seq_len", "gated_norm_rank", "experts_per_token") if key in base}
    if not base["num_experts"]:
        kept["experts_per_token"] = 0                   # a dense rung inherits its config from one with experts
    V, S, narrowest = base["vocab_size"], base["seq_len"], base["head_dim"] if unit else 0
    unit = unit or base["head_dim"]
    wanted = tokens or optimal_tokens(C, not base["num_experts"], law)
    grid = [shape(width, base["num_experts"], unit, aspect=aspect, group=group, head_dim=narrowest) | kept
            for width in range(unit, 129 * unit, unit) if width >= narrowest]
    sizes = min(grid, key=lambda s: abs(math.log(C / flops_per_token(s, V, head) / wanted)))
    D = C / flops_per_token(sizes, V, head)
    batch = batch or max(32, 2**math.ceil(math.log2(max(1.0, D / (2**14 * S)))))
    steps = round(D / (batch * S))
    need(steps >= 10, f"C = {C:.3g}", "at least 10 steps", f"{steps} of {batch} x {S} tokens, width "
         f"{sizes['hidden_dim']}", "raise the budget, or lower seq_len in --config")
    return base | sizes | dict(window=S // 2, steps=steps, batch_size=batch)


def config_text(keys, C, path, head=False, parent=None):
    """A config file for train.py: plain assignments, each with where it comes from. parent, a config of this
    repository: import it and assign only what differs."""
    counts, D = param_counts(keys, keys["vocab_size"]), trained_tokens(keys)
    flops = flops_per_token(keys, keys["vocab_size"], head) * D
    rates = learning_rates(keys["recipe"], D, keys["batch_size"] * keys["seq_len"], keys["hidden_dim"])
    rates = rates | {key: keys.get("rate_scale", 1.0) * rates[key] for key in ("adam_lr", "hyper_lr")}
    rates["adam_lr"] *= keys.get("adam_scale", 1.0)
    given = read_config(parent)
    rates = rates | {key: given[key] for key in rates if key in given}
    keys = keys | {"run_dir": f"out/{Path(path).absolute().parent.name}_{Path(path).stem}"}
    lines = [f'"""{counts["total"]:,} parameters, {counts["active"]:,} active; {D:,} tokens.', "",
             f"python train.py {path}", "",
             f"{flops:.4g} training FLOPs, {C:.4g} asked. train.py derives",
             ", ".join(f"{key} {value:.6g}" for key, value in rates.items()) + '."""']
    if parent:
        lines += [f"from {'.'.join(Path(parent).with_suffix('').parts)} import *", ""]
        keys = {key: value for key, value in keys.items() if key not in given or given[key] != value}
    lines += [f"{f'{key} = {value!r}':39s} # [{'derived: scaling.py' if key in DERIVED else 'carried over'}]"
              for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def read_config(path):
    """The plain assignments of a config file, and those it inherits by `from configs.X import *`."""
    try:
        keys = runpy.run_path(str(path)) if path else {}
    except Exception as error:                              # a config is the user's code: anything may happen
        found = f"{type(error).__name__}: {error}"
        raise BadInput(path, "a config of plain assignments", found, "mend it") from None
    return {k: v for k, v in keys.items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}


def ladder(budgets, out, base=(), batch=None, law=None, head=False, aspect=0.0, widths=7, seeds=(0,), parent=None,
           span=4.0, group=4, unit=0):
    """Write an isoFLOP grid of configs to the folder `out`, return the paths: up to `widths` widths whose tokens
    lie evenly (in log) within a factor `span` of D*, or the one at D*; each with every seed. Equal configs are
    kept, different ones refused. parent: a config of this repository that all import; they are named after it."""
    texts = {}
    for C in budgets:
        best = optimal_tokens(C, not (CARRIED | dict(base))["num_experts"], law)
        factors = np.geomspace(1 / span, span, widths) if widths > 1 else [1.0]
        plans = [plan(C, base, best * f, batch, law, head, aspect, group, unit) for f in factors]
        grid = {keys["hidden_dim"]: keys for keys in plans}
        off = np.log([trained_tokens(keys) / best for keys in grid.values()])
        need(widths == 1 or len(grid) >= 5 and min(off) < -0.2 and max(off) > 0.2, f"budget {C:.4g}",
             "at least 5 widths, on both sides of the optimum", sorted(grid),
             "lower head_dim in --config (widths are its multiples), or raise the budget")
        low, centre, high = np.exp([min(off), np.mean(off), max(off)])
        print(f"C = {C:.4g}: widths {sorted(grid)}, tokens {low:.2f} to {high:.2f} of D*, centre {centre:.2f}"
              + ("" if 0.7 < centre < 1.42 else "   (off-centre: beware of parabolas)"))
        for (width, keys), seed in itertools.product(grid.items(), seeds):
            name = f"c{C:.6g}_d{width}".replace("+", "") + (f"_s{seed}" if seed else "")
            path = Path(out) / f"{Path(parent).stem + '_' if parent else ''}{name}.py"
            texts[path] = config_text(keys | ({"seed": seed} if seed else {}), C, path, head, parent)
    for path, text in texts.items():
        need(not path.exists() or path.read_text() == text, path, "the config that this command writes",
             "another", "choose a new --out")
    for path in texts:
        if not path.exists():
            write_new(path, texts[path])
    print(f"{len(texts)} configs in {out}; train those not yet done:  python scaling.py ladder --run {out}")
    return list(texts)


def run_ladder(folder, jobs=1):
    """Train every config of a folder that has no row in its runs.csv, cheapest first, each in its own process,
    `jobs` at a time, and add its row; stop at a failure. A run cut short goes on from its checkpoint."""
    configs = {path: read_config(path) for path in Path(folder).glob("*.py")}
    need(configs, folder, "a folder of configs", "none", "write it: ladder --budgets C ... --out DIR")
    cost = lambda path: (flops_per_token(configs[path], configs[path]["vocab_size"], True)
                         * trained_tokens(configs[path]), path)
    done, failed, adding = finished(folder), threading.Event(), threading.Lock()
    left = [path for path in sorted(configs, key=cost) if path.stem not in done]
    print(f"{folder}: {len(done)} runs done, {len(left)} to go", flush=True)

    def train(path):
        if failed.is_set():
            return
        print(f"{path}", flush=True)
        result = Path(configs[path].get("run_dir", "")) / "result.json"
        command = [sys.executable, str(Path(__file__).parent / "train.py"), str(path)]
        if not result.is_file() and subprocess.run(command).returncode:
            failed.set()
            raise BadInput(path, "train.py to finish", "a failure", "mend it and give this command again")
        with adding:
            add_row(folder, path.stem, read_json(result))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, left))


def finished(folder):
    """{config: its row} of a folder's runs.csv."""
    path = Path(folder) / "runs.csv"
    with contextlib.suppress(FileNotFoundError), path.open(newline="") as file:
        return {row["config"]: row for row in csv.DictReader(file)}
    return {}


def add_row(folder, name, result):
    """Append what came of a run to runs.csv: the loss of each held-out domain in a column of its own."""
    domains = result.pop("domains", {})
    row = {"config": name} | result | {f"loss_{d}": domains[d]["loss"] for d in domains if d != "macro"}
    path = Path(folder) / "runs.csv"
    old = list(finished(folder).values())
    columns = list(dict.fromkeys(itertools.chain(*(old + [row]))))      # a dense model knows no maxvio
    with contextlib.closing(path.with_suffix(".partial").open("w", newline="")) as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(old + [row])
    os.replace(path.with_suffix(".partial"), path)


# --------------------------------------------------------------------------------------------------- speed-up

def speedup(base, variant, E, alpha, noise=0.0):
    """How many times less compute the variant needs for the same loss, and the same in wall-clock time.

    base, variant: lists of (C, loss, tokens per second or nan). A point fixes A = (loss - E) C^alpha; the
    compute speed-up is the ratio of the mean A (geometric) to the power 1/alpha, so several C may mix. Its
    90 % interval is Student-t from the scatter of log A (n points a side leave 2n - 2 degrees of freedom, as
    E and alpha are given), or normal from a known seed noise of the loss; None with neither."""
    base, variant = sides = [np.array(side, float).T for side in (base, variant)]       # rows: C, loss, rate
    lowest, half = min(base[1].min(), variant[1].min()), math.nan
    need(lowest > E, "--asymptote", "E below every loss", f"E = {E} and loss = {lowest}", "lower E")
    logs = [np.log(L - E) + alpha * np.log(C) for C, L, _ in sides]
    shift, spare = (logs[0].mean() - logs[1].mean()) / alpha, logs[0].size + logs[1].size - 2
    if noise:
        variance = sum(np.sum((noise / (L - E) / L.size)**2) for _, L, _ in sides)
        half = norm.ppf(0.95) * math.sqrt(variance) / alpha
    elif spare:
        variance = sum(y.size * y.var() for y in logs) / spare * sum(1 / y.size for y in logs)
        half = student.ppf(0.95, spare) * math.sqrt(variance) / alpha
    wall = shift + np.log(variant[2]).mean() - np.log(base[2]).mean()                       # nan if unknown
    ends = lambda x: [math.exp(x - half), math.exp(x + half)] if math.isfinite(x + half) else None
    return dict(compute=math.exp(shift), compute_interval=ends(shift),
                wall_clock=math.exp(wall) if math.isfinite(wall) else None, wall_clock_interval=ends(wall))


# [cited: openathena.ai/blog/pretraining-speedup] compute and wall-clock gain of each step in Marin's stack, at
# their scale; AdamW -> AdamH is not among them. The last: partial key offset 1.2 times renormalised combine 1.04.
PUBLISHED = {"c_moe_v1": (6.7, 3.6), "d_more_experts": (1.4, 1.3), "e_muonh": (1.3, 1.25),
             "f_attention": (1.25, 1.25)}


def rung_table(folder, law):
    """Rows of dict(rung, loss {budget: mean over seeds}, per_rung, cumulative) of the runs in a folder of rungs,
    the speed-ups as `speedup` gives them over the rung before and over the first, at equal loss.

    law: E and alpha of the ladder, which trains one of the rungs. Wall clock from speed.csv, measured apart on a
    quiet machine: at equal C a run takes C over the FLOPs per second, whatever its width."""
    rate = {}
    with contextlib.suppress(FileNotFoundError), open(Path(folder) / "speed.csv", newline="") as file:
        rate = {row["config"]: float(row["flops_per_second"]) for row in csv.DictReader(file)}
    runs = {}
    for run in read_csv(Path(folder) / "runs.csv", head=True):
        runs.setdefault(re.sub(r"_c[\d.e]+_d\d+(_s\d+)?$", "", run.extra["config"]), []).append(run)
    runs = {rung: checked(runs[rung], f"{folder}: {rung}") for rung in sorted(runs)}
    speed = lambda run: rate.get(re.sub(r"_s\d+$", "", run.extra["config"]), math.nan)
    points = {rung: [(run.flops, run.loss, speed(run)) for run in runs[rung]] for rung in runs}
    table, rungs = [], list(runs)
    for i, rung in enumerate(rungs):
        loss, = columns(runs[rung], "loss")
        row = dict(rung=rung, loss={float(f"{C:.1e}"): float(loss[at].mean())      # the budget asked for
                                    for C, at in by_budget(runs[rung]).items()})
        for key, other in (("per_rung", rungs[max(0, i - 1)]), ("cumulative", rungs[0])):
            row[key] = speedup(points[other], points[rung], law["E"], law["alpha"])
        table.append(row)
    return table


def report_rungs(table):
    """The printed page of a rung table; in brackets 90 % intervals."""
    def cell(found, key):
        if not found[key]:
            return "-"
        ends = found[f"{key}_interval"]
        return f"{found[key]:.2f}" + (" ({:.2f} .. {:.2f})".format(*ends) if ends else "")
    budgets = sorted({C for row in table for C in row["loss"]})
    heads = ("compute", "wall clock", "cumulative compute", "cumulative wall")
    print("\nrung             " + "".join(f"{C:9.2g}" for C in budgets) + "  "
          + "".join(f"{head:22s}" for head in heads) + "published")
    for row in table:
        print(f"{row['rung']:17s}" + "".join(f"{row['loss'].get(C, math.nan):9.4f}" for C in budgets) + "  "
              + "".join(f"{cell(row[kind], key):22s}" for kind in ("per_rung", "cumulative")
                        for key in ("compute", "wall_clock"))
              + "{} {}".format(*PUBLISHED.get(row["rung"], ("-", ""))))


# --------------------------------------------------------------------------------------------------- pictures

BLUE, RED, GREY = "#1f5fa8", "#d62728", "0.45"          # fitted, came later, context


@contextlib.contextmanager
def figure(rows, columns, size, path):
    """A grid of axes, saved to path (its ending chooses the format) when the block is done."""
    need(Path(path).suffix in (".png", ".pdf", ".svg"), path, "a picture ending in .png, .pdf or .svg",
         Path(path).suffix or "none", "rename it")
    import matplotlib                                   # only here: fitting needs no pictures
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "legend.fontsize": 7, "legend.title_fontsize": 7}
    with plt.rc_context(look):
        fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        yield axes.flat
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=200)
        plt.close(fig)
    print(f"saved {path}")


def scientific(C):
    """3e+18 as a figure writes it."""
    digits, power = f"{C:.2e}".split("e")
    return "$" + (rf"{float(digits):g}\times" if float(digits) != 1 else "") + rf"10^{{{int(power)}}}$"


def draw_bowls(ax, r):
    """Every run of the ladder, the curve through each budget, its vertex, and what was excluded."""
    axis, shades = r["choices"]["axis"], np.linspace(0.1, 0.9, len(r["vertices"]))
    for i, (v, shade) in enumerate(zip(r["vertices"], shades)):
        x, y = columns([q for q in r["_runs"] if q.budget == v["budget"]], axis, "loss")
        colour = (0.15, 0.75 * shade, 1 - 0.75 * shade)             # from blue to green with the budget
        ax.plot(x, y, "o", ms=3, color=colour)
        ax.annotate(scientific(v["budget"]), max(zip(x, y)), (5, 4 if i % 2 else -4), va="center", fontsize=7,
                    color=colour, textcoords="offset points")       # up and down, so that neighbours part
        ax.plot(v[axis], v["loss"], "*", ms=9, color=colour, mec="k", mew=0.5)
        if v["_curve"]:
            z = np.linspace(np.log10(x.min()), np.log10(x.max()), 100)
            ax.plot(10**z, v["_curve"](z), lw=1, color=colour)
    if r["_left_out"]:
        ax.plot(*columns(r["_left_out"], axis, "loss"), "o", ms=3, mfc="none", color="0.7",
                label="excluded from the fit")
        ax.legend()
    ax.set(xscale="log", ylabel=f"macro loss ({UNITS[r['unit']]})",
           title="isoFLOP bowls, $C$ in FLOPs (stars: vertices)",
           xlabel="training tokens $D$" if axis == "tokens" else "active parameters $N$")
    ax.margins(x=0.16)
    ax.set_visible(bool(np.isfinite([v[axis] for v in r["vertices"]]).any()))


def draw_envelope(ax, r, as_error=False):
    """The law through the vertices, its bands, the forecasts, and in red what came later; as losses, or in %
    of the forecast, where the bands can be seen."""
    law, forecasts = r["envelope"], r["forecasts"]
    C, L = (np.array([v[key] for v in r["vertices"]]) for key in ("budget", "loss"))
    grid = np.geomspace(C.min() / 1.5, 1.5 * max([f["C"] for f in forecasts] + [C.max()]), 80)
    height = lambda c, y: 100 * (y / loss_at(law, c) - 1) if as_error else y
    is_surface = "beta" in law
    ax.plot(grid, height(grid, loss_at(law, grid)), color=BLUE, lw=1.3, label="surface" if is_surface else
            f"$L = {law['E']:.3f} + {law['A']:.4g}\\,C^{{-{law['alpha']:.4f}}}$")
    if not is_surface and delta_interval(law, C, L, grid[0]):
        bands = np.transpose([delta_interval(law, C, L, c) for c in grid])
        ax.fill_between(grid, *(height(grid, edge) for edge in bands), color=BLUE, alpha=0.15, lw=0,
                        label="95 % delta/Student-t")
    if forecasts[0]["intervals"]["run_bootstrap"]:
        at, *ends = np.transpose([(f["C"], *f["intervals"]["run_bootstrap"]) for f in forecasts])
        low, high = (height(at, edge) for edge in ends)
        ax.errorbar(at, (low + high) / 2, (high - low) / 2, fmt="none", color=BLUE, capsize=3,
                    label="forecast, 95 % run bootstrap")
    ax.plot(C, height(C, L), "o", ms=4, color=BLUE, label="vertices (fitted)")
    if r["_held"]:
        later, losses = columns(r["_held"], "flops", "loss")
        ax.plot(later, height(later, losses), "*", ms=9, color=RED, label="came later (not fitted)")
    ax.set(xscale="log", xlabel="training compute $C$ (FLOPs)")
    if as_error:
        ax.set(ylabel="distance from the forecast (%)", title="the same, as an error")
    else:
        ax.set(ylabel=f"macro loss ({UNITS[r['unit']]})", title="compute-optimal loss")
        ax.legend()


def draw_asymptote(ax, r):
    """The last forecast as a function of the assumed E."""
    last, near = r["forecasts"][-1], near_tenable(r, 0.3)
    ax.plot([row["E"] for row in near], [row["losses"][-1] for row in near], color=BLUE,
            label="forecast given $E$")
    if allowed := [row["E"] for row in near if row["allowed"]]:
        ax.axvspan(allowed[0], allowed[-1], color=BLUE, alpha=0.12, lw=0,
                   label="$E$ that the vertices allow (95 %)")
    ax.plot(r["envelope"]["E"], last["loss"], "s", color=BLUE, mfc="w", label=f"{last['loss']:.4f} fitted")
    for outcome in last["outcomes"][:1]:
        ax.axhline(outcome["loss"], color=RED, lw=1.2, label=f"{outcome['loss']:.4f} came (not fitted)")
    ax.set(xlabel=f"assumed asymptote $E$ ({UNITS[r['unit']]})", title="what the asymptote decides",
           ylabel=f"macro loss at $C$ = {scientific(last['C'])} FLOPs")
    ax.legend()
    ax.set_visible(bool(near))                          # a surface has no profile


def draw_fit(r, path):
    """Bowls; envelope; distance from it, with bands; forecast against assumed E."""
    with figure(2, 2, (9, 7), path) as (bowl, whole, zoom, asymptote):
        draw_bowls(bowl, r)
        draw_envelope(whole, r)
        draw_envelope(zoom, r, as_error=True)
        draw_asymptote(asymptote, r)


def draw_bias(table, path):
    """Error of the extrapolated D* against the width of the sampled bowl, one panel per kind of sampling."""
    with figure(1, 3, (9.9, 3.6), path) as axes:
        for ax, sampling in zip(axes, SAMPLING):
            for name, colour, marker in zip(SURFACES, (GREY, BLUE, RED), "^os"):
                ax.plot(WIDTHS, table[name, sampling], marker + "-", ms=4, lw=1.2, color=colour,
                        label=f"parabola, {name}")
            ax.axhline(0, color="k", lw=1, ls="--", label="shared bowls, all three (< $10^{-6}$ %)")
            ax.set(xscale="log", ylim=(-27, 38), xlabel="sampled within this factor", title=sampling)
            ax.set_xticks(WIDTHS, WIDTHS)
            ax.minorticks_off()
        axes[0].set_ylabel("error of $D^*$ at $10^{24}$ FLOPs (%)")
        axes[0].legend()


def draw_rungs(table, path):
    """Cumulative compute and wall-clock speed-up over the first rung, with intervals; Marin's in grey."""
    names = [row["rung"][2:].replace("_", " ") for row in table]
    with figure(1, 2, (9, 3.4), path) as axes:
        for ax, key, k in zip(axes, ("compute", "wall_clock"), (0, 1)):
            at = np.arange(len(table))
            y = np.array([row["cumulative"][key] or math.nan for row in table])
            ends = [row["cumulative"][f"{key}_interval"] or (v, v) for row, v in zip(table, y)]
            ax.errorbar(at, y, np.abs(np.transpose(ends) - y), fmt="o-", color=BLUE, capsize=3, label="here, 90 %")
            theirs = np.cumprod([PUBLISHED.get(row["rung"], (1, 1))[k] for row in table])
            ax.plot(at, theirs, "s--", color=GREY, ms=4, label="published, at 1e18 FLOPs and more")
            ax.axhline(1, color="k", lw=0.6)
            ax.set_xticks(at, names, rotation=25, ha="right")
            ax.set(yscale="log", ylabel=f"{key.replace('_', '-')} speed-up over {names[0]}")
            ax.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", *"1248", "16"])
            ax.minorticks_off()
            ax.set_ylim(0.8 * np.nanmin([y, theirs]), 1.25 * np.nanmax([y, theirs]))
        axes[0].legend()


# ----------------------------------------------------------------------------------------------- command line

def figures(folder, draws=400):
    """Recompute and draw all that a ladder's folder holds: isoflop/runs.csv, the registered forecast hero/*.json
    with what came of it in hero/runs.csv, rungs in rung_runs/. Returns (analysis, rung table or None)."""
    folder = Path(folder)
    runs, targets, choices, unit = read_csv(folder / "isoflop" / "runs.csv", True), [], Choices(head=True), "nats"
    for path in sorted((folder / "hero").glob("*.json")):
        record = read_json(path)
        targets, unit = [*targets, record["target"]["C"]], record["unit"]
        choices = Choices(**record["choices"])
    if (folder / "hero" / "runs.csv").is_file():
        runs += [replace(run, kind="held_out") for run in read_csv(folder / "hero" / "runs.csv", True)]
    result = analyse(runs, choices, targets, unit, str(folder), draws)
    report(result)
    draw_fit(result, folder / "ladder.png")
    table = None
    if (folder / "rung_runs" / "runs.csv").is_file():
        table = rung_table(folder / "rung_runs", result["envelope"])
        report_rungs(table)
        draw_rungs(table, folder / "rungs.png")
    return result, table


def story(_):
    """The demonstration: Marin's posted forecast, what the asymptote did to it, the bias of parabolas."""
    print("1. Marin's 129B MoE: ladder 1e18..3e20, parabolas in active parameters, E fixed at 1.6 (#4447).\n")
    choices = Choices("parabola", "params", asymptote=1.6)
    posted = analyse(reference("moe_v16"), choices, source="moe_v16")
    report(posted)
    draw_fit(posted, "out/forecast.png")
    came = MOE_V16[1e23][5120]
    print(f"\n2. The same runs under other assumptions, at C = 1e23, where {came:.4f} came.")
    for label, other in (("parabolas, E fixed at 1.6", choices),
                         ("parabolas, E free", replace(choices, asymptote=None)),
                         ("shared bowls, E free", Choices("shared", "params")),
                         ("lowest runs, E free", Choices("best"))):
        law = fit_law(posted["_runs"], other)["law"]
        y = loss_at(law, 1e23)
        print(f"   {label:28s} E = {law['E']:.4f}   {y:.4f}   ({100 * (came / y - 1):+.2f} %)")
    print("\n3. Why the usual bowl is biased.\n")
    bias("out/bias.png")


def fit_command(a):
    result = fit_of(a, a.predict)
    with contextlib.redirect_stdout(sys.stderr if a.json == "-" else sys.stdout):
        report(result)
        if a.plot:
            draw_fit(result, a.plot)
    if a.json:
        text = json.dumps(plain(result), indent=1, allow_nan=False) + "\n"
        Path(a.json).parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.write(text) if a.json == "-" else Path(a.json).write_text(text)


def score_command(a):
    head = read_json(a.record).get("choices", {}).get("head", False)
    score(a.record, a.loss, a.run and read_run_dir(a.run, head))


def plan_command(a):
    path = a.out or f"configs/plan_{a.flops:.6g}.py".replace("+", "")
    keys = plan(a.flops, read_config(a.config), None, a.batch, a.law, a.count_head, a.aspect, a.group,
                a.unit)
    text = config_text(keys, a.flops, path)
    write_new(path, text)
    print(text + f"written to {path}")


def ladder_command(a):
    need(a.run or a.budgets and a.out, "ladder", "--budgets C ... --out DIR, or --run DIR", "neither",
         "give one")
    if a.run:
        run_ladder(a.run, a.jobs)
    else:
        ladder(a.budgets, a.out, read_config(a.config), a.batch, a.law, a.count_head, a.aspect, a.widths, a.seeds,
               a.config if a.inherit else None, a.span, a.group, a.unit)


def speedup_command(a):
    result = speedup(a.base, a.variant, a.asymptote, a.alpha, a.noise)
    print(f"E = {a.asymptote} and alpha = {a.alpha}, for eval {a.eval}")
    for key in ("compute", "wall_clock"):
        if result[key]:
            ends = result[f"{key}_interval"]
            span = "{:.4f} .. {:.4f}".format(*ends) if ends else "none: give more points or --noise"
            print(f"{key:10s} speed-up {result[key]:.4f}   90 % interval {span}")


def positive(text):
    return number(text, "command line", "the value")


def count(text):
    return int(number(text, "command line", "the value", 0.99, 1e9))


def point(text):
    """(C, loss, tokens per second or nan) of a speed-up's C,LOSS or C,LOSS,TOKENS_PER_SECOND."""
    C, loss, *rate = [positive(part) for part in text.split(",")]
    (rate,) = rate or [math.nan]
    return C, loss, rate


class Parser(argparse.ArgumentParser):
    def error(self, message):                           # one line, like every other complaint
        raise BadInput("command line", "the options of --help", message, f"see {self.prog} --help")


def parser():
    top = Parser(prog="scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.set_defaults(do=story)
    commands = top.add_subparsers(parser_class=Parser)

    def command(name, do, purpose, *parents):
        p = commands.add_parser(name, help=purpose, description=purpose, parents=parents)
        p.set_defaults(do=do)
        return p.add_argument

    fitting, planning = Parser(add_help=False), Parser(add_help=False)          # what two commands share
    add = fitting.add_argument
    add("table", nargs="?", help=f"a CSV, or a public table: {', '.join(TABLES)}")
    add("--runs", nargs="+", metavar="DIR", help="finished runs of train.py instead")
    add("--x", dest="axis", choices=("tokens", "params"), default="tokens", help="the bowls' axis")
    add("--method", choices=METHODS, default="shared")
    add("--window", type=positive, metavar="F", help="only runs within this factor of the vertex")
    add("--asymptote", default="free", help="E: free or a value")
    add("--fit-space", dest="space", choices=("log", "linear"), default="log")
    add("--unit", choices=UNITS, default="nats", help="of the loss; bpb is bits per byte")
    add("--count-head", action="store_true", help="C with the output head in every model")
    add("--draws", type=count, metavar="N", default=400, help="bootstrap refits")
    add = planning.add_argument
    add("--config", help="carry data, tokenizer, experts, head_dim, seq_len over from it")
    add("--batch", type=count, metavar="B", help="sequences, instead of the rule; the 129B run forced 2048")
    add("--law", type=positive, nargs=2, metavar=("a", "b"), help="D* = a C^b, as `fit` prints it")
    add("--count-head", action="store_true", help="C with the output head in every model")
    add("--aspect", type=positive, default=0.0, metavar="R", help="width per layer, instead of the recipe's rule")
    add("--group", type=count, default=4, metavar="N", help="query heads a key/value head; 1 is no grouping")
    add("--unit", type=count, default=0, metavar="U", help="widths in multiples of it, heads of head_dim or wider")

    add = command("fit", fit_command, "fit a ladder and forecast", fitting)
    add("--predict", type=positive, nargs="+", action="extend", default=[], metavar="C", help="repeatable")
    add("--json", metavar="FILE|-")
    add("--plot", metavar="FILE")
    add = command("bias", lambda a: bias(a.plot), "recompute and draw the bias study")
    add("--plot", default="out/bias.png")
    add = command("register", register, "fit, and lock one forecast in a file", fitting)
    add("--target", type=positive, required=True, metavar="C")
    add("--target-params", type=positive, metavar="N", help="default: N* of the fit")
    add("--target-tokens", type=positive, metavar="D", help="default: D* of the fit")
    add("--target-config", help="the config that will be run; its text is stored")
    add("--eval", help="eval definition; default: the runs' own")
    add("--failure", default="outside the run-bootstrap interval", help="what is a miss")
    add("--difference", action="append", default=[], help="known difference; repeatable")
    add("--out", required=True, help="prereg/NAME.json")
    add = command("score", score_command,
                  "compare an outcome with a registration")
    add("record")
    add("--loss", type=positive, help="in the record's unit")
    add("--run", metavar="DIR", help="a finished run of train.py instead")
    add = command("plan", plan_command, "the compute-optimal config of a budget", planning)
    add("--flops", type=positive, required=True, metavar="C")
    add("--out", help="the config file to write; default configs/plan_C.py")
    add = command("ladder", ladder_command, "write, or train, an isoFLOP grid of configs", planning)
    add("--budgets", type=positive, nargs="+", metavar="C")
    add("--out", help="folder for the configs")
    add("--jobs", type=count, default=1, metavar="N", help="runs at a time, for configs with devices = 1")
    add("--widths", type=count, default=7, metavar="N", help="per budget; 1 is the optimum alone")
    add("--span", type=positive, default=4.0, metavar="R", help="their tokens: from D*/R to R D*")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--inherit", action="store_true", help="configs that import --config, instead of copying it")
    add("--run", metavar="DIR", help="train what is not yet done in this folder")
    add = command("figures", lambda a: figures(a.folder), "recompute and draw a ladder's folder from its tables")
    add("folder", nargs="?", default="configs/ladder")
    add = command("speedup", speedup_command, "learning speed-up of a variant at equal loss")
    for side in ("--base", "--variant"):
        add(side, type=point, nargs="+", required=True, metavar="C,LOSS[,TOKENS_PER_SECOND]")
    add("--asymptote", type=positive, required=True, help="E of the eval that --eval names")
    add("--alpha", type=positive, required=True)
    add("--eval", required=True, help="what E, alpha and the losses were measured on")
    add("--noise", type=positive, default=0.0, help="standard deviation of the loss between seeds")
    return top


def main(words):
    """Exit status of one command: 0, or 2 after one line on stderr about what the user can mend."""
    try:
        a = parser().parse_args(words)
        a.do(a)
        return 0
    except BadInput as error:
        complaint = error
    except BrokenPipeError:                             # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        complaint = BadInput("python", "the packages of requirements.txt", error, "pip install -r it")
    except OSError as error:
        complaint = BadInput(error.filename or "output", "a usable path", error.strerror, "check it")
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        complaint = BadInput("input", "numbers of ordinary size", error, "check every column")
    print(f"scaling.py: {complaint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
