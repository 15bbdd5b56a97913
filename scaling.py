"""Scaling laws: fit isoFLOP ladders, forecast a loss before the run, score it after.  Imports no house file.

Run:   python scaling.py               the story in ten seconds: 2.252 was forecast, 2.233 came, and why
       python scaling.py fit RUNS.csv --predict 1e21      also bias register score plan ladder speedup
Read:  runs -> shapes and FLOPs -> bowls -> envelope -> surface -> uncertainty -> analysis -> bias
       -> registration -> planning -> speed-up -> pictures -> command line
C training FLOPs   N active parameters (output head in, input embedding out)   D tokens   k = C/(N D), never 6
L(C) = E + A C^-alpha: E asymptote in nats per token, A, alpha.   A star: the compute-optimal point of a C.
Sources: #n is an issue of marin-community/marin; Czech et al. is arXiv 2603.22339."""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import platform
import runpy
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import scipy
from scipy.optimize import least_squares, minimize, nnls
from scipy.special import huber, logsumexp
from scipy.stats import linregress, norm, t as student

LEVEL = 0.95            # of every interval but the speed-up's
REFERENCE = 1e20        # C is measured in this unit while fitting, so that A stays a number of ordinary size
VOCAB = 128_256         # Llama-3's, the tokenizer of every public table below
CONVENTION = ("C: training FLOPs, 3x forward, causal square counted whole, head only when dense; "
              "N: active parameters, head in, embedding out")
MUST_NOT = "this fit must not forecast"                # how the flags begin that `register` refuses


class BadInput(ValueError):
    """A mistake the user can mend, in one line: the place, what was expected, what was found, what to do."""
    def __init__(self, where, expected, found, do):
        super().__init__(" ".join(f"{where}: expected {expected}, found {str(found)[:200]}; do {do}".split()))


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
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if isinstance(text, bool) or not low < value <= high:
        raise BadInput(where, f"{key} to be a number above {low:g} and at most {high:g}", repr(text)[:40],
                       f"correct {key}")
    return value


SHAPE_COLUMNS = ("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "seq_len",
                 "gated_norm_rank", "num_experts", "experts_per_token", "expert_dim", "shared_dim")
MAY_BE_ZERO = SHAPE_COLUMNS[-4:]
KNOWN_COLUMNS = SHAPE_COLUMNS + ("flops", "budget_flops", "params", "tokens", "loss", "kind", "seed", "eval",
                                 "tokenizer", "bytes_per_token", "bpb", "vocab_size")


def read_csv(path):
    """Runs of a table with a header of flops (or budget_flops), params, tokens, loss; other columns are kept.

    A blank params or tokens is derived from the row's hidden_dim, num_experts and other shape columns."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(path, "a UTF-8 table of comma-separated values", error, "export it again") from None
    head = [name.strip() for name in rows[0]] if rows else []
    C_column = "flops" if "flops" in head else "budget_flops"
    missing = [c for c in (C_column, "loss") if c not in head]
    missing += [c for c in ("params", "tokens") if c not in head and "hidden_dim" not in head]
    if missing or len(set(head)) < len(head):
        raise BadInput(path, "columns flops, params, tokens, loss, each once", ", ".join(head) or "nothing",
                       f"rename or add {', '.join(missing) or 'what stands twice'}")
    runs = []
    for line, cells in enumerate(rows[1:], 2):
        where = f"{path} line {line}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(head):
            raise BadInput(where, f"{len(head)} cells", len(cells), "quote commas, fill the gaps")
        row = {key: cell.strip() for key, cell in zip(head, cells)}
        cell = lambda key, low=0.0, high=1e40: (number(row[key], where, key, low, high)
                                                if row.get(key) else None)
        C, N, D = number(row[C_column], where, C_column, 1), cell("params", 1), cell("tokens", 1)
        if not (N and D):
            given = {key: int(cell(key, -1 if key in MAY_BE_ZERO else 0.99, 1e6))
                     for key in SHAPE_COLUMNS if row.get(key)}
            if not {"hidden_dim", "num_experts"} <= given.keys():
                raise BadInput(where, "params and tokens, or hidden_dim and num_experts to derive them from",
                               "neither", "fill them in")
            if given["hidden_dim"] % (head_dim := given.get("head_dim", 128)):
                raise BadInput(where, f"a multiple of {head_dim}", row["hidden_dim"], "give head_dim")
            sizes = shape(given["hidden_dim"], given["num_experts"], head_dim) | given
            vocab = int(cell("vocab_size", 0.99, 1e9) or VOCAB)
            N = N or param_counts(sizes, vocab)["core"] + vocab * sizes["hidden_dim"]
            D = D or C / flops_per_token(sizes, vocab)
        if (row.get("kind") or "isoflop") not in ("isoflop", "held_out", "excluded"):
            raise BadInput(where, "kind isoflop, held_out or excluded", row["kind"], "correct the cell")
        given = {key: row[key] for key in ("kind", "seed", "eval", "tokenizer") if row.get(key)}
        given |= dict(budget=cell("budget_flops", 1) or 0.0, bpb=cell("bpb", 0, 100) or 0.0,
                      bytes_per_token=cell("bytes_per_token", 0, 1e3) or 0.0,
                      extra={key: row[key] for key in head if key not in KNOWN_COLUMNS})
        runs.append(Run(C, N, D, number(row["loss"], where, "loss", 1e-3, 100), source=str(path), **given))
    return runs


def read_json(path):
    """The object in a JSON file, else BadInput."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(path, "a JSON object", str(error)[:80], "restore the file") from None
    if not isinstance(value, dict):
        raise BadInput(path, "a JSON object", type(value).__name__, "restore the file")
    return value


def read_run_dir(folder):
    """The Run of a finished train.py run directory (its result.json and config.json)."""
    path = Path(folder) / "result.json"
    if not path.is_file():
        raise BadInput(folder, "a finished run (result.json)", "none", "let the run finish, or leave it out")
    result, train = read_json(path), read_json(Path(folder) / "config.json").get("train")
    known = {key: number(result.get(key), path, key, *((1e-3, 100) if key == "loss" else (0, 1e40)))
             for key in ("flops", "params", "tokens", "loss", "bytes_per_token", "bpb")}
    return Run(**known, seed=str(result.get("seed", "")), source=str(folder), extra={"run_dir": str(folder)},
               eval=json.dumps(result.get("eval", ""), sort_keys=True).strip('"'),
               tokenizer=str(train.get("tokenizer", "")) if isinstance(train, dict) else "")


def checked(runs, source):
    """The same runs, each with a budget; BadInput for duplicates, several evals, or nothing to fit.

    Runs without a nominal budget join the bowl of the cheapest run within 25 % of them."""
    seen, groups = set(), []
    for run in runs:
        same = (run.flops, run.params, run.tokens, run.seed, run.kind)
        if same in seen and run.params == run.params:
            raise BadInput(source, "each run once", f"C={run.flops:g} N={run.params:g} D={run.tokens:g} "
                           f"seed={run.seed or 'blank'} twice", "delete one, or give the repeats their seeds")
        seen.add(same)
    if len(evals := sorted({run.eval for run in runs})) > 1:
        raise BadInput(source, "one eval definition", f"{len(evals)}: {evals}", "fit each eval on its own")
    if not any(run.kind == "isoflop" for run in runs):
        raise BadInput(source, "at least one isoFLOP run", f"none in {len(runs)} runs", "add the ladder")
    for run in sorted((r for r in runs if not r.budget), key=lambda r: r.flops):
        if not groups or run.flops > 1.25 * groups[-1][0].flops:
            groups.append([])
        groups[-1].append(run)
    mean = lambda group: math.exp(np.mean([math.log(r.flops) for r in group]))
    nominal = {id(r): float(f"{mean(group):.4g}") for group in groups for r in group}
    return [replace(run, budget=run.budget or nominal[id(run)]) for run in runs]


def in_unit(runs, unit, source):
    """Losses in "nats" per token or "bpb", bits per byte. Tokenizers compare only in the latter: a token that
    spans more bytes costs more nats for the same knowledge of the text."""
    kinds = sorted({(r.tokenizer, round(r.bytes_per_token, 3)) for r in runs})
    if unit == "nats" and len(kinds) > 1:
        raise BadInput(source, "one tokenizer for a forecast in nats per token", f"{len(kinds)}: {kinds[:3]}",
                       "use --unit bpb, since only bits per byte compare across tokenizers")
    if unit == "bpb" and any(not (r.bytes_per_token or r.bpb) for r in runs):
        raise BadInput(source, "bpb or bytes_per_token for every run", "a run without", "add the column")
    per_byte = lambda r: r.bpb or r.loss / math.log(2) / r.bytes_per_token
    return runs if unit == "nats" else [replace(r, loss=per_byte(r)) for r in runs]


# ------------------------------------------------------------------------------------------- shapes and FLOPs

def shape(hidden_dim, experts=64, unit=128):
    """Config keys of a width by the recipe's rules [cited: #4447]; experts=0 is dense (4x MLP, no GQA).

    unit is the head width and the rounding of the expert width: 128 in the recipe, less on a laptop."""
    if hidden_dim < unit or hidden_dim % unit:
        raise BadInput("hidden_dim", f"a positive multiple of {unit}", hidden_dim, "choose such a width")
    heads = hidden_dim // unit
    grouped = max([k for k in range(1, heads // 4 + 1) if heads % k == 0] or [1])    # 4:1 where 4 divides
    return dict(hidden_dim=hidden_dim, seq_len=4096, head_dim=unit, num_heads=heads,
                num_layers=max(1, round(hidden_dim / (64 + 4 * math.log2(hidden_dim) - 9))),
                num_kv_heads=grouped if experts else heads, num_experts=experts,
                experts_per_token=min(4, experts),
                expert_dim=math.ceil(hidden_dim / 2 / unit) * unit if experts else 0,
                shared_dim=hidden_dim if experts else 4 * hidden_dim, gated_norm_rank=128)


def flops_per_token(sizes, vocab_size):
    """Training FLOPs per token: 3x forward, scores over all of seq_len, head only when dense [cited: #4447].

    Norms, gates and the embedding are not counted. This is model.count's convention; it is never 6 N."""
    d, s, H, h = sizes["hidden_dim"], sizes["seq_len"], sizes["num_heads"], sizes["head_dim"]
    layer = (6 * d * sizes["expert_dim"] * sizes["experts_per_token"] + 6 * d * sizes["shared_dim"]
             + (2 * d * sizes["num_experts"] if sizes["num_experts"] > 1 else 0)
             + 2 * d * h * (H + 2 * sizes["num_kv_heads"]) + 2 * H * h * d + 4 * s * H * h + 3 * s * H)
    return 3 * (sizes["num_layers"] * layer + (0 if sizes["num_experts"] else 2 * d * vocab_size))


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
    method: str = "shared"          # shared | parabola | cubic | best (lowest run) | surface
    axis: str = "tokens"            # the bowl's horizontal axis: tokens | params
    window: float | None = None     # keep only runs within this factor of the vertex
    asymptote: float | None = None  # E; None leaves it free
    space: str = "log"              # residuals of log(L - E), or of L ("linear")


def best_coefficients(exponents, log_u, log_v, y, groups):
    """Per group the non-negative (E, A, B) of E + A u^-p + B v^-q that fits y best, and all residuals."""
    columns = np.stack([np.ones_like(y), np.exp(-exponents[0] * log_u), np.exp(-exponents[1] * log_v)], 1)
    residual, coefficients = np.empty_like(y), []
    for rows in groups:
        coefficients.append(nnls(columns[rows], y[rows])[0])
        residual[rows] = y[rows] - columns[rows] @ coefficients[-1]
    return residual, coefficients


def variable_projection(log_u, log_v, y, groups, start=None):
    """((p, q), residuals, coefficients), p and q common to all groups, by VPNLS [cited: Czech et al.]: given
    them the rest is linear, so two numbers are searched: a 32 x 32 grid (if no start), then Gauss-Newton."""
    residual = lambda pq: best_coefficients(pq, log_u, log_v, y, groups)[0]
    tolerance = 1e-15 if start is None else 1e-9
    if start is None:
        grid = np.geomspace(0.03, 1.5, 32)
        start = min(((p, q) for p in grid for q in grid), key=lambda pq: np.sum(residual(pq)**2))
    fit = least_squares(residual, start, "3-point", (0.01, 3), xtol=tolerance, ftol=tolerance, gtol=1e-15)
    return fit.x, *best_coefficients(fit.x, log_u, log_v, y, groups)


def by_budget(runs):
    """{budget: indices of its runs}, cheapest first."""
    budgets = np.array([r.budget for r in runs])
    return {float(C): np.flatnonzero(budgets == C) for C in np.unique(budgets)}


def bad_bowl(runs, C, expected, found):
    return BadInput(f"{runs[0].source}: budget {C:.3g}", expected, found, "add runs there, or leave it out")


LEAST = {"parabola": 3, "shared": 3, "cubic": 4, "best": 1}     # runs that a bowl needs; its parameters


def curves(runs, choices, x, y, groups, start):
    """Per budget (curve of z = log10 x, its lowest z), and the shared exponents if there are any.

    parabola  a quadratic in z, each budget alone: what everyone uses. The truth is lopsided, so the
              vertex moves with the sampling (see `bias`). Kept as the baseline.
    cubic     one more degree: less bias, more noise.
    shared    E_c + A_c x^p + B_c x^-q, with p and q common to all budgets. Along an isoFLOP N is C/(kD), so a
              loss surface has just this form; no bias without noise, and no E common to all budgets.
    best      the lowest run as it is; for tables of optima, and for budgets of one run."""
    found, middle = [], {C: x[rows].mean() for C, rows in groups.items()}
    if choices.method == "shared":
        if len(y) < (need := 3 * len(groups) + 3):
            raise BadInput(runs[0].source, f"at least {need} runs for {len(groups)} shared bowls", len(y),
                           "add runs, or use --method parabola")
        log_x = math.log(10) * (x - [middle[r.budget] for r in runs])
        (p, q), _, weights = variable_projection(-log_x, log_x, y, list(groups.values()), start)
        for (C, m), (E, A, B) in zip(middle.items(), weights):
            if min(A, B) <= 1e-12 * max(A, B, E):
                raise bad_bowl(runs, C, "an interior minimum", "a bowl that only falls or only rises")
            found.append((lambda z, m=m, E=E, A=A, B=B: E + A * 10**(p * (z - m)) + B * 10**(-q * (z - m)),
                          m + math.log10(q * B / (p * A)) / (p + q)))
        return found, (p, q)
    for C, rows in groups.items():
        if choices.method == "best":
            i = rows[np.argmin(y[rows])]
            found.append((None, x[i]))
            continue
        curve = np.polynomial.Polynomial.fit(x[rows], y[rows], LEAST[choices.method] - 1)
        lowest = [z.real for z in curve.deriv().roots() if abs(z.imag) < 1e-9 and curve.deriv(2)(z.real) > 0]
        if not lowest:
            raise bad_bowl(runs, C, "a bowl that opens upwards", "no minimum")
        found.append((curve, min(lowest, key=lambda z: abs(z - middle[C]))))
    return found, None


def bowls(runs, choices, start=None, inside=True):
    """dict(vertices, fitted, unknowns, start): where each budget's bowl is lowest, and how low.

    Raises BadInput for a bowl of too few runs, without a minimum or (if `inside`) with one outside them."""
    groups, y, least = by_budget(runs), np.array([r.loss for r in runs]), LEAST[choices.method]
    N, D = np.log10([r.params for r in runs]), np.log10([r.tokens for r in runs])
    x, other = (D, N) if choices.axis == "tokens" else (N, D)
    for C, rows in groups.items():
        if least > 1 and (few := len(np.unique(np.round(x[rows], 5)))) < least:
            raise bad_bowl(runs, C, f"at least {least} runs of different {choices.axis}", few)
        if np.ptp(x[rows]) > 6:
            raise bad_bowl(runs, C, f"{choices.axis} within a factor of 1e6", f"1e{np.ptp(x[rows]):.0f}")
    found, start = curves(runs, choices, x, y, groups, start)
    fitted, vertices = y.copy(), []
    for (C, rows), (curve, at) in zip(groups.items(), found):
        sides = [int(np.sum(x[rows] < at)), int(np.sum(x[rows] > at))]
        if curve is None:
            loss, curvature, flags = y[rows].min(), math.nan, []
            slope, level = 0.0, other[rows[np.argmin(y[rows])]]
        else:
            if inside and 0 in sides:
                ends = f"{10**x[rows].min():.3g} to {10**x[rows].max():.3g}"
                raise bad_bowl(runs, C, f"a minimum inside the sampled {choices.axis}, {ends}",
                               f"{10**min(99, max(-99, at)):.3g}")
            fitted[rows], loss = curve(x[rows]), curve(at)
            curvature = (curve(at + 1e-3) - 2 * loss + curve(at - 1e-3)) / 2e-6
            flags = [f"only {n} run with {side} {choices.axis}"
                     for n, side in zip(sides, ("fewer", "more")) if n < 2]
            slope, level = np.polyfit(x[rows], other[rows], 1)     # the other axis: a line in log-log
        stars = [10**float(at), 10**float(slope * at + level)]
        D_star, N_star = stars if choices.axis == "tokens" else stars[::-1]
        vertices.append(dict(budget=C, runs=len(rows), tokens=D_star, params=N_star, loss=float(loss),
                             curvature=float(curvature), flags=flags, _curve=curve))
    unknowns = least * len(groups) + (0 if start is None else 2)
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
    if len(c) < 3 + free:
        raise BadInput(where, f"at least {3 + free} budgets with E {'free' if free else 'fixed'}", len(c),
                       "add budgets" + (", or fix E by --asymptote" if free else ""))
    if not free and not 0 <= asymptote < L.min():
        raise BadInput("--asymptote", f"0 to below the lowest loss {L.min():.4f}", asymptote, "lower it")
    E = np.linspace(0, 0.95 * L.min(), 400) if free else np.array([asymptote])
    y, centred = np.log(L - E[:, None]), c - c.mean()
    slope, level = y @ centred / (centred @ centred), y.mean(1)
    ssr = np.sum((y - level[:, None] - slope[:, None] * centred)**2, 1)
    i = int(np.argmin(ssr))
    E, log_A, alpha, ssr = E[i], level[i] - slope[i] * c.mean(), -slope[i], ssr[i]      # A here at REFERENCE
    if space == "linear":
        given = lambda p: (p[0] if free else E) + np.exp(p[-2] - p[-1] * c) - L
        bounds = ([0, -np.inf, -np.inf], [L.min(), np.inf, np.inf]) if free else (-np.inf, np.inf)
        best = least_squares(given, [E, log_A, alpha][not free:], bounds=bounds, x_scale="jac", ftol=1e-14)
        *new_E, log_A, alpha = best.x
        E, ssr = new_E[0] if free else E, 2 * best.cost
    if not 1e-6 < alpha < 3:
        raise BadInput(where, "a falling loss, alpha in 0..3", f"{alpha:.3g}", "check the runs")
    A = np.exp(log_A + alpha * np.log(REFERENCE))
    return dict(E=float(E), A=float(A), alpha=float(alpha), ssr=float(ssr), space=space, free=free)


def loss_at(law, C):
    """The loss that an envelope or a surface expects from the compute-optimal run of C FLOPs."""
    if "beta" not in law:
        return law["E"] + law["A"] * C**-law["alpha"]
    N, D = surface_optimum(law, C)
    return law["E"] + law["A"] * N**-law["alpha"] + law["B"] * D**-law["beta"]


def power_law(C, y):
    """y = coefficient C^exponent by a line in log-log, with a Student-t interval; None for unknown y."""
    if not np.all(np.isfinite(y)) or len(C) < 3:
        return None
    line = linregress(np.log(C), np.log(y))
    if not abs(line.slope) < 5:
        raise BadInput("N* and D*", "exponents within 5 of 0", f"{line.slope:.3g}", "check params and tokens")
    half = student.ppf((1 + LEVEL) / 2, len(C) - 2) * line.stderr
    return dict(coefficient=float(np.exp(line.intercept)), exponent=float(line.slope),
                interval=[float(line.slope - half), float(line.slope + half)])


# ---------------------------------------------------------------------------------------------------- surface

def surface(runs, method="vpnls", start=None):
    """(law, fitted): L = E + A N^-alpha + B D^-beta through all runs at once.

    Exact on synthetic data, 13 % off on Marin's ladder, whose budgets differ in more than N and D; never the
    default [derived: `fit DELPHI.csv --method surface`]. "vpnls" minimises squared loss, "huber_lse" a
    Huber loss (1e-3) of log-loss through log-sum-exp (Hoffmann et al.), started from the former."""
    N, D, y = (np.array([getattr(r, key) for r in runs], float) for key in ("params", "tokens", "loss"))
    if len(y) < 6 or not all(np.ptp(np.log10(x)) < 12 for x in (N, D)):
        raise BadInput(runs[0].source, "at least 6 runs of plausible params and tokens", len(y), "add runs")
    log_n, log_d = np.log(N).mean(), np.log(D).mean()
    u, v = np.log(N) - log_n, np.log(D) - log_d
    (alpha, beta), residual, [(E, A, B)] = variable_projection(u, v, y, [np.arange(len(y))], start)
    if min(A, B) <= 0:
        raise BadInput(runs[0].source, "a loss that falls with N and D", "A or B clipped at 0", "use bowls")
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
    vertices = []
    for C, rows in by_budget(runs).items():
        N, D = surface_optimum(law, C)
        vertices.append(dict(budget=C, runs=len(rows), tokens=D, params=N, loss=loss_at(law, C),
                             curvature=math.nan, flags=[], _curve=None))
    return dict(law=law, vertices=vertices, fitted=fitted, unknowns=5, start=(law["alpha"], law["beta"]))


# ------------------------------------------------------------------------------------------------ uncertainty

def delta_interval(law, C, L, target, level=LEVEL):
    """Delta-method Student-t interval for the loss of a new run at `target`; None without spare budgets."""
    c, at, spare = np.log(np.asarray(C) / REFERENCE), math.log(target / REFERENCE), len(C) - 2 - law["free"]
    if spare < 1:
        return None
    height = lambda c: loss_at(law, np.exp(c) * REFERENCE) - law["E"]
    d_parameters = lambda c: np.stack([np.ones_like(c), height(c), -c * height(c)])         # E, log A, alpha
    gradient = lambda c: d_parameters(c)[0 if law["free"] else 1:]
    weight = height if law["space"] == "log" else np.ones_like     # log(L - E) has residuals of L / height
    J, g = (gradient(c) / weight(c)).T, gradient(np.array(at))
    variance = law["ssr"] / spare * (g @ np.linalg.pinv(J.T @ J) @ g + weight(np.array(at))**2)
    half = student.ppf((1 + level) / 2, spare) * math.sqrt(variance)
    return [float(loss_at(law, target) - half), float(loss_at(law, target) + half)]


def run_bootstrap(runs, fit, choices, targets, draws=400, seed=0, level=LEVEL):
    """(intervals or None, share of failed refits): resample the runs' residuals about their bowls, refit all,
    forecast one new run at each target. A refit may put a vertex outside its runs, the first fit may not."""
    residual, spare = np.array([r.loss for r in runs]) - fit["fitted"], len(runs) - fit["unknowns"]
    if choices.method == "best" or spare < 1:
        return None, 0.0
    residual = (residual - residual.mean()) * math.sqrt(len(runs) / spare)    # fitted ones are too small
    rng, forecasts = np.random.default_rng(seed), []
    for _ in range(draws):
        losses = fit["fitted"] + rng.choice(residual, len(runs))
        sample = [replace(r, loss=float(y)) for r, y in zip(runs, losses)]
        try:
            law = fit_law(sample, choices, fit["start"], inside=False)["law"]
        except BadInput:
            continue
        forecasts.append([loss_at(law, C) + rng.choice(residual) for C in targets])
    failed = 1 - len(forecasts) / draws
    if failed > 0.5:
        return None, failed
    return np.quantile(forecasts, [(1 - level) / 2, (1 + level) / 2], axis=0).T.tolist(), failed


def profile(C, L, targets, space, chosen, level=LEVEL):
    """Forecasts as a function of an assumed E, and which E the vertices allow (an F test on one parameter).

    The asymptote is most of what nobody knows about an extrapolation: this stands beside every interval."""
    assumed = np.union1d(np.arange(0, 0.95 * min(L), 0.025).round(3), [chosen])
    laws = [envelope(C, L, E, space) for E in assumed]
    spare, least = len(L) - 3, min(law["ssr"] for law in laws)
    limit = least * (1 + student.ppf((1 + level) / 2, spare)**2 / spare) if spare > 0 else math.inf
    return [dict(E=law["E"], alpha=law["alpha"], ssr=law["ssr"], allowed=bool(law["ssr"] <= limit),
                 losses=[loss_at(law, C) for C in targets]) for law in laws]


def refits(runs, choices, targets, keep):
    """[(tag, E, losses at the targets)] of refits to the runs that keep(run, tag) holds, budget by budget."""
    rows = []
    for tag in by_budget(runs):
        try:
            law = fit_law([r for r in runs if keep(r, tag)], choices)["law"]
        except BadInput:                                    # too few budgets left for this method: no row
            continue
        rows.append((tag, law["E"], [loss_at(law, C) for C in targets]))
    return rows


def backtest(runs, choices, truth):
    """Fit the budgets up to each one, forecast the later vertices (`truth`): dict(up_to, E, errors in %)."""
    later = lambda C: [v for v in truth if v["budget"] > C]
    first = [*by_budget(runs)][:4 - (choices.asymptote is not None)][-1]       # fewer budgets decide no E
    rows = refits(runs, choices, [v["budget"] for v in truth], lambda r, last: r.budget <= last)
    errors = lambda C, L: [100 * (v["loss"] / y - 1) for v, y in zip(later(C), L[-len(later(C)):])]
    return [dict(up_to=C, E=E, errors_percent=errors(C, L)) for C, E, L in rows if C >= first and later(C)]


def bending(rows, vertices, law):
    """Does the ladder bend away from one power law? Four signs and a verdict; seven budgets prove little."""
    several = [row["errors_percent"] for row in rows if len(row["errors_percent"]) > 1]
    same_sign = bool(several) and len({np.sign(e) for errors in several for e in errors}) == 1
    growing = same_sign and all(np.all(np.diff(np.abs(errors)) > 0) for errors in several)
    drift, p = np.diff([row["E"] for row in rows]), math.nan
    one_way = len(drift) > 1 and bool(np.all(drift > 0) or np.all(drift < 0))
    c, y = np.log([v["budget"] for v in vertices]), np.log([v["loss"] - law["E"] for v in vertices])
    if len(c) > 3 and np.all(np.isfinite(y)):
        weights, covariance = np.polyfit((c - c.mean()) / c.std(), y, 2, cov=True)
        p = float(2 * student.sf(abs(weights[0]) / math.sqrt(max(covariance[0, 0], 1e-300)), len(c) - 3))
    bends = growing or (same_sign and one_way) or p < 0.05
    verdict = "bending suspected" if bends else "no sign of bending" if several else "too few budgets to tell"
    return dict(same_sign=same_sign, growing=bool(growing), E_drifts_one_way=one_way, quadratic_p=p,
                verdict=verdict)


# --------------------------------------------------------------------------------------------------- analysis

def doubts(choices, law, vertices, allowed, later):
    """What to know before believing a fit, a line each; `allowed`: the tenable rows of its profile."""
    flags = [f"budget {v['budget']:.3g}: {flag}" for v in vertices for flag in v["flags"]]
    flags += law.get("status", [])
    if choices.method == "parabola":
        flags.append("parabola: its vertices are biased where the bowl is lopsided or off-centre (see: bias)")
    if choices.asymptote is None and not 0.005 < law["E"] / (0.95 * min(v["loss"] for v in vertices)) < 0.995:
        flags.append("E at the edge of its grid: the ladder does not determine it, fix it with --asymptote")
    if allowed and law["E"] not in (tenable := [row["E"] for row in allowed]):
        flags.append(f"the vertices disagree with E = {law['E']:g}: they allow {tenable[0]:.2f} to "
                     f"{tenable[-1]:.2f}")
    lowest = min(r.loss for r in later)
    if law["E"] > 0.98 * lowest:
        flags.append(f"{MUST_NOT}: E = {law['E']:.4f} lies above the best loss later reached, {lowest:.4f}, "
                     "or less than 2 % below")
    return flags


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
    N_star, D_star = (power_law(C, [v[key] for v in vertices]) for key in ("params", "tokens"))
    curve = [] if is_surface else profile(C, L, targets, choices.space, law["E"])
    allowed = [row for row in curve if row["allowed"]]
    widths = {r.bytes_per_token for r in ladder}
    bytes_per_token = widths.pop() or None if len(widths) == 1 else None
    forecasts = []
    for i, target in enumerate(targets):
        N, D = (p["coefficient"] * target**p["exponent"] if p else None for p in (N_star, D_star))
        point, ends = loss_at(law, target), [row["losses"][i] for row in allowed]
        forecasts.append(dict(
            C=target, loss=point, params=N, tokens=D, tokens_per_param=D / N if N and D else None,
            bytes_per_param=D / N * bytes_per_token if N and D and bytes_per_token else None,
            intervals=dict(run_bootstrap=boot[i] if boot else None,
                           delta_t=None if is_surface else delta_interval(law, C, L, target),
                           asymptote_profile=[min(ends), max(ends)] if ends else None),
            outcomes=[dict(loss=r.loss, seed=r.seed, error_percent=100 * (r.loss / point - 1))
                      for r in held if abs(r.flops / target - 1) < 0.02]))
    parabola = replace(choices, method="parabola")
    truth = bowls(ladder, parabola, inside=False)["vertices"] if is_surface else vertices
    tests = backtest(ladder, choices, truth)
    flags = doubts(choices, law, vertices, allowed, held or ladder)
    if failed > 0.01:
        flags.append(f"{100 * failed:.0f} % of the bootstrap refits failed")
    if is_surface:
        size = lambda rows: np.mean([abs(e) for row in rows for e in row["errors_percent"]] or [math.nan])
        mine, theirs = size(tests), size(backtest(ladder, parabola, truth))
        if mine > theirs:
            flags.append(f"{MUST_NOT}: expanding-window backtest worse than the bowls', {mine:.2f} to "
                         f"{theirs:.2f} %")
    k = [r.flops / (r.params * r.tokens) for r in ladder]
    return dict(
        source=source, choices=asdict(choices), unit=unit, convention=CONVENTION, eval=ladder[0].eval,
        runs=len(ladder), excluded=sum(r.kind == "excluded" for r in runs), k_range=[min(k), max(k)],
        bytes_per_token=bytes_per_token, envelope=law, vertices=vertices, N_star=N_star, D_star=D_star,
        shared_exponents=None if is_surface else fit["start"], forecasts=forecasts,
        surface_by_huber_lse=surface(ladder, "huber_lse")[0] if is_surface else None, profile=curve,
        backtest=tests, bending=bending(tests, vertices, law), flags=flags,
        leave_one_out=[dict(dropped=tag, E=E, losses=losses) for tag, E, losses in
                       refits(ladder, choices, targets, lambda r, dropped: r.budget != dropped)],
        rms_residual=float(np.sqrt(np.mean((np.array([r.loss for r in ladder]) - fit["fitted"])**2))),
        table=[dict(C=r.flops, N=r.params, D=r.tokens, loss=r.loss, seed=r.seed, kind=r.kind) | r.extra
               for r in runs],
        _runs=ladder, _held=held)


def plain(value):
    """`value` in JSON types: no numpy, null for NaN and infinity, no keys that start with an underscore."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(r):
    """The printed page of an analysis."""
    law, choice = r["envelope"], r["choices"]
    label = {"parabola": "a parabola per budget (biased baseline)", "shared": "bowls with shared exponents",
             "cubic": "a cubic per budget", "best": "lowest run per budget", "surface": "a global surface"}
    print(f"{r['source']}: {r['runs']} runs in {len(r['vertices'])} budgets, {r['excluded']} excluded; "
          f"{label[choice['method']]} in {choice['axis']}, {r['unit']}\n{CONVENTION};"
          " k from {:.2f} to {:.2f}\n\n".format(*r["k_range"]) +
          "     C  runs       D*         N*   D*/N*    loss*  curvature")
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
            print(f"{name}* = {p['coefficient']:.4g} C^{p['exponent']:.4f}, exponent within "
                  "{:.3f} .. {:.3f}".format(*p["interval"]))
    for i, f in enumerate(r["forecasts"]):
        ratio = "".join(f", {f[f'{what}_per_param']:.1f} {what} per parameter" for what in ("tokens", "bytes")
                        if f[f"{what}_per_param"])
        print(f"\nforecast at C = {f['C']:.4g}: {f['loss']:.4f}" +
              (f"   N* {f['params']:.3g}, D* {f['tokens']:.3g}{ratio}" if ratio else ""))
        for name, ends in f["intervals"].items():
            print(f"  95 % by {name:18s}" + ("{:.4f} .. {:.4f}".format(*ends) if ends else "none"))
        if values := [row["losses"][i] for row in r["leave_one_out"]]:
            print(f"  leaving out one budget  {min(values):.4f} .. {max(values):.4f}")
        for o in f["outcomes"]:
            print(f"  came out at {o['loss']:.4f}: {o['error_percent']:+.2f} %")
    near = [row["E"] for row in r["profile"] if row["allowed"]] + [law["E"]]
    print("\nforecasts against the assumed asymptote (* where the vertices allow it)" if r["profile"] else "")
    for row in r["profile"]:
        if min(near) - 0.2 < row["E"] < max(near) + 0.2 and abs((row["E"] + 0.05) % 0.1 - 0.05) < 1e-9:
            print(f"{'*' if row['allowed'] else ' '} E = {row['E']:.2f}   "
                  + "  ".join(f"{y:.4f}" for y in row["losses"]))
    for row in r["backtest"]:
        print(f"backtest, budgets up to {row['up_to']:.3g}: E = {row['E']:.3f}, later vertices off by "
              + " ".join(f"{e:+.2f}" for e in row["errors_percent"]) + " %")
    print(f"verdict: {r['bending']['verdict']} (quadratic term p = {r['bending']['quadratic_p']:.3f})")
    print("".join(f"flag: {flag}\n" for flag in r["flags"]), end="")


# ------------------------------------------------------------------------------------------------------- bias

# [cited: Czech et al.] alpha, beta, A, B, E
SURFACES = {"symmetric": (0.31, 0.31, 400, 400, 1.69), "Chinchilla": (0.34, 0.28, 406.4, 410.7, 1.69),
            "asymmetric": (0.465, 0.155, 400, 400, 1.69)}
WIDTHS, SAMPLING = (2, 4, 8, 16), ("centred", "offset 3x", "drift to 3x")
BIAS_BUDGETS, BIAS_TARGET = 10.0**np.arange(17, 22), 1e24


def true_optimum(surface, C):
    """(N*, D*) of L = E + A/N^alpha + B/D^beta on C = 6 N D, the paper's own simplification."""
    alpha, beta, A, B, _ = surface
    N = (alpha * A / (beta * B))**(1 / (alpha + beta)) * (C / 6)**(beta / (alpha + beta))
    return N, C / 6 / N


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
    """sha256 over what a fit read: tables (in a file, or typed above) or run directories of train.py."""
    digest = hashlib.sha256()
    for source in sources:
        if source in TABLES:
            digest.update(repr(reference(source)).encode())
            continue
        path = Path(source)
        for part in [path / "config.json", path / "result.json"] if path.is_dir() else [path]:
            digest.update(part.read_bytes())
    return digest.hexdigest()


def own_hash():
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def seal(record):
    """sha256 of a record without its own seal."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def git(*words):
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "none"


def write_new(path, text):
    """Write `text` to a path that must not exist yet."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        raise BadInput(path, "a new file", "one that exists", "choose another name") from None


def register(result, sources, target, eval_definition, failure, differences, out):
    """Write the forecast for `target` (dict C, N, D, config) to the new file `out`, for good."""
    if any(flag.startswith(MUST_NOT) for flag in result["flags"]):
        raise BadInput(result["source"], "a fit that may forecast", result["flags"], "take another --method")
    forecast = result["forecasts"][0] | {"outcomes": []}
    record = plain(dict(
        forecast=forecast, target=target, unit=result["unit"], eval=eval_definition, failure=failure,
        known_differences=differences, bytes_per_token=result["bytes_per_token"], choices=result["choices"],
        form="E + A N^-alpha + B D^-beta" if "beta" in result["envelope"] else "E + A C^-alpha",
        asymptote_policy="free" if result["choices"]["asymptote"] is None else "fixed",
        envelope=result["envelope"], flags=result["flags"], flops_convention=CONVENTION, runs=sources,
        runs_sha256=fingerprint(sources), scaling_sha256=own_hash(), commit=git("rev-parse", "HEAD"),
        uncommitted_changes=git("status", "--porcelain"), date=datetime.now(timezone.utc).isoformat(),
        versions=dict(python=platform.python_version(), numpy=np.__version__, scipy=scipy.__version__)))
    write_new(out, json.dumps(record | {"sha256": seal(record)}, indent=1) + "\n")
    print(f"registered {out}: {forecast['loss']:.4f} at C = {target['C']:.4g}; commit it before the run")


def score(path, loss=None, run=None):
    """Compare an outcome with the record at `path` and append it to NAME.outcomes.jsonl.

    BadInput if the record, the runs or this file changed, or if the run is not the one that was forecast."""
    record = read_json(path)
    if record.get("sha256") != seal(record):
        raise BadInput(path, "the record as it was registered", "an edited one", "git checkout the original")
    try:
        now = fingerprint(record["runs"])
    except OSError:
        now = "nothing"
    for name, was, found in ((" ".join(record["runs"]), record["runs_sha256"], now),
                             ("scaling.py", record["scaling_sha256"], own_hash())):
        if was != found:
            raise BadInput(name, f"sha256 {was[:16]} as registered", found[:16],
                           f"git checkout {record['commit'][:12]} and score there")
    if run:
        C, known = record["target"]["C"], record["bytes_per_token"]
        if abs(run.flops / C - 1) > 0.02:
            raise BadInput(run.source, f"C = {C:.4g} within 2 %", f"{run.flops:.4g}", "score the right run")
        if run.eval != record["eval"]:
            raise BadInput(run.source, f"eval {record['eval']}", run.eval, "evaluate the run as registered")
        if record["unit"] == "nats" and known and abs(run.bytes_per_token / known - 1) > 1e-3:
            raise BadInput(run.source, f"{known:.4f} bytes per token", f"{run.bytes_per_token:.4f}",
                           "register in --unit bpb, since nats per token do not compare across tokenizers")
        loss = in_unit([run], record["unit"], run.source)[0].loss
    point, intervals = record["forecast"]["loss"], record["forecast"]["intervals"]
    outcome = dict(record=record["sha256"], date=datetime.now(timezone.utc).isoformat(), loss=loss,
                   run=run.source if run else None, error_percent=100 * (loss / point - 1),
                   inside={name: ends[0] <= loss <= ends[1] for name, ends in intervals.items() if ends})
    with Path(path).with_suffix(".outcomes.jsonl").open("a") as file:
        file.write(json.dumps(outcome) + "\n")
    print(f"forecast {point:.4f}, came {loss:.4f}: {outcome['error_percent']:+.2f} %")
    for name, inside in outcome["inside"].items():
        print("  {} {} {:.4f} .. {:.4f}".format("inside " if inside else "OUTSIDE", name, *intervals[name]))


# --------------------------------------------------------------------------------------------------- planning

# What a plan carries over from --config, and its values without one [cited: the V1 recipe, #4697; data small]
CARRIED = dict(vocab_size=257, seq_len=4096, gated_norm_rank=128, half_rope=False, partial_key_offset=False,
               combine_sum=0.0, router_z=1e-3, logit_z=1e-4, compute_dtype="float32", remat="block",
               mixture=(("books", 1.0),), tokenizer="bytes", accumulate=1, seed=0, recipe="v1",
               optimizer="adamh", schedule="linear", warmup=0.1, clip=1.0, min_lr_ratio=0.0, num_experts=64,
               head_dim=128)


DERIVED = SHAPE_COLUMNS + ("window", "steps", "batch_size", "run_dir")


def learning_rates(recipe, tokens, batch_tokens, hidden_dim):
    """dict(adam_lr, hyper_lr, beta1, beta2, eps) by heuristic "v1" [cited: #4225] or "v2" [cited: #5951].

    hyper_lr is the relative step of AdamH or MuonH. Batches are in tokens (V1's 32 rows: 32 x 4096)."""
    if recipe == "v1":
        adam = 1.63 * tokens**-0.2813 * hidden_dim**-0.3678 * math.sqrt(batch_tokens / 4096)
        adam, hyper = min(0.05, adam), min(0.05, 13 / 3 * adam)
        eps = 1e-15 * math.sqrt(32 * 4096 * tokens / (batch_tokens * 1.4e9))
    else:
        adam = 0.06602 * tokens**-0.395 * hidden_dim**-0.150 * math.sqrt(batch_tokens)
        hyper, eps = 13 / 3 * adam, 9.676e-18 * math.sqrt(tokens / batch_tokens)
    return dict(adam_lr=adam, hyper_lr=hyper, beta1=0.9062, eps=eps,
                beta2=min(0.9999, max(0.95, 0.999**(batch_tokens / 131_072))))


def optimal_tokens(C, dense=False, law=None):
    """D*(C) by a law of one's own, else by the tied-exponent law that chose the 129B shape [cited: #4447] or,
    if dense, Delphi's [cited: #1337]. Far below 1e18 FLOPs the published ones are extrapolated [assumed]."""
    if law:
        return law["coefficient"] * C**law["exponent"]
    return 0.0267196 * C**0.5800830 if dense else 3.290 * math.sqrt(C)


def trained_tokens(keys):
    return keys["steps"] * keys["batch_size"] * keys["seq_len"]


def plan(C, base=(), tokens=None, batch=None, law=None):
    """Config keys of one run: the width whose tokens, C/flops_per_token, come nearest `tokens` or D*(C).

    base: config keys to carry over, without rates, which the heuristic derives. Batch: a power of two, at
    least 32 sequences, for about 2^14 steps [cited: #4447]. Raises BadInput for fewer than 10 steps."""
    base = CARRIED | {k: v for k, v in dict(base).items() if k not in ("adam_lr", "hyper_lr", "beta2", "eps")}
    for key in ("head_dim", "num_experts", "seq_len", "vocab_size", "gated_norm_rank"):
        if type(base[key]) is not int or base[key] < (key != "num_experts"):
            raise BadInput("--config", f"{key} to be a positive integer", base[key], "correct it")
    kept = {key: base[key] for key in ("seq_len", "gated_norm_rank", "experts_per_token") if key in base}
    unit, V, S = base["head_dim"], base["vocab_size"], base["seq_len"]
    wanted = tokens or optimal_tokens(C, not base["num_experts"], law)
    grid = [shape(width, base["num_experts"], unit) | kept for width in range(unit, 129 * unit, unit)]
    sizes = min(grid, key=lambda s: abs(math.log(C / flops_per_token(s, V) / wanted)))
    D = C / flops_per_token(sizes, V)
    batch = batch or max(32, 2**math.ceil(math.log2(max(1.0, D / (2**14 * S)))))
    if (steps := round(D / (batch * S))) < 10:
        raise BadInput(f"C = {C:.3g}", "at least 10 steps", f"{steps} of {batch} x {S} tokens, width "
                       f"{sizes['hidden_dim']}", "raise the budget, or lower seq_len in --config")
    return base | sizes | dict(window=S // 2, steps=steps, batch_size=batch)


def config_text(keys, C, path):
    """A config file for train.py: plain assignments, each with where it comes from."""
    counts, D = param_counts(keys, keys["vocab_size"]), trained_tokens(keys)
    rates = learning_rates(keys["recipe"], D, keys["batch_size"] * keys["seq_len"], keys["hidden_dim"])
    keys = keys | {"run_dir": f"out/{Path(path).parent.name}_{Path(path).stem}"}
    C_now = flops_per_token(keys, keys["vocab_size"]) * D
    lines = [f'"""{counts["total"]:,} parameters, {counts["active"]:,} active; {D:,} tokens.', "",
             f"python train.py {path}", "", f"{C_now:.4g} training FLOPs, {C:.4g} asked. train.py derives",
             ", ".join(f"{key} {value:.6g}" for key, value in rates.items()) + '."""']
    for key, value in keys.items():
        tag = "derived: scaling.py" if key in DERIVED and key not in CARRIED else "carried over"
        lines.append(f"{f'{key} = {value!r}':40s}# [{tag}]")
    return "\n".join(lines) + "\n"


def read_config(path):
    """The plain assignments of a config file, and those it inherits by `from configs.X import *`."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        keys = runpy.run_path(str(path))
    except Exception as error:                              # a config is the user's code: anything may happen
        found = f"{type(error).__name__}: {error}"
        raise BadInput(path, "a config of plain assignments", found, "mend it") from None
    finally:
        sys.path.pop(0)
    return {k: v for k, v in keys.items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}


def ladder(budgets, out, base=(), per_budget=7, span=4.0, law=None):
    """Write an isoFLOP grid of configs to the folder `out`, return the paths: widths whose tokens lie
    evenly (in log) within a factor `span` of D*. Identical configs are kept, different ones refused."""
    texts = {}
    for C in budgets:
        best = optimal_tokens(C, not (CARRIED | dict(base))["num_experts"], law)
        plans = [plan(C, base, best * factor, law=law) for factor in np.geomspace(1 / span, span, per_budget)]
        grid = {keys["hidden_dim"]: keys for keys in plans}
        off = [math.log(trained_tokens(keys) / best) for keys in grid.values()]
        if len(grid) < 4 or not min(off) < -0.2 < 0.2 < max(off):
            raise BadInput(f"budget {C:.3g}", "at least 4 widths on both sides of the optimum", sorted(grid),
                           "lower head_dim in --config (widths are its multiples), or raise the budget")
        low, centre, high = np.exp([min(off), np.mean(off), max(off)])
        print(f"C = {C:.3g}: widths {sorted(grid)}, tokens {low:.2f} to {high:.2f} of D*, centre {centre:.2f}"
              + ("" if 0.7 < centre < 1.42 else "   (off-centre: beware of parabolas)"))
        for width, keys in grid.items():
            path = Path(out) / f"c{C:.2g}_d{width}.py".replace("+", "")
            texts[path] = config_text(keys, C, path)
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise BadInput(path, "the config that this command writes", "another", "choose a new --out")
    for path, text in texts.items():
        if not path.exists():
            write_new(path, text)
    print(f"{len(texts)} configs in {out}; train those not yet done:  python scaling.py ladder --run {out}")
    return list(texts)


def run_ladder(folder):
    """Train every config of a folder that has no result.json yet, one after the other; stop at a failure."""
    configs = sorted(Path(folder).glob("*.py"))
    if not configs:
        raise BadInput(folder, "a folder of configs", "none", "write it: ladder --budgets C ... --out DIR")
    for i, path in enumerate(configs, 1):
        done = (Path(read_config(path).get("run_dir", "")) / "result.json").is_file()
        print(f"[{i}/{len(configs)}] {path}{' done' if done else ''}", flush=True)
        command = [sys.executable, str(Path(__file__).parent / "train.py"), str(path)]
        if not done and subprocess.run(command).returncode:
            raise BadInput(path, "train.py to finish", "a failure", "mend it and give this command again")


# --------------------------------------------------------------------------------------------------- speed-up

def speedup(base, variant, E, alpha, noise=0.0, level=0.90):
    """How many times less compute the variant needs for the same loss, and the same in wall-clock time.

    base, variant: lists of (C, loss, tokens per second or nan). A point fixes A = (loss - E) C^alpha; the
    compute speed-up is the ratio of the mean A (geometric) to the power 1/alpha, so several C may mix. Its
    interval is Student-t from the scatter of log A (n points a side leave 2n - 2 degrees of freedom, as E and
    alpha are given), or normal from a known seed noise of the loss; None with neither."""
    for C, loss, _ in base + variant:
        if loss <= E:
            raise BadInput("--asymptote", "E below every loss", f"E = {E} and loss = {loss}", "lower E")
    logs = [np.array([math.log((L - E) * C**alpha) for C, L, _ in points]) for points in (base, variant)]
    shift, spare = (logs[0].mean() - logs[1].mean()) / alpha, len(base) + len(variant) - 2
    if abs(shift) > 50:
        raise BadInput("speedup", "a ratio below e^50", f"e^{shift:.0f}", "check alpha and the losses")
    half = math.nan
    if noise:
        variance = sum((noise / (L - E) / len(side))**2 for side in (base, variant) for _, L, _ in side)
        half = norm.ppf((1 + level) / 2) * math.sqrt(variance) / alpha
    elif spare:
        variance = sum(np.sum((y - y.mean())**2) for y in logs) / spare * (1 / len(base) + 1 / len(variant))
        half = student.ppf((1 + level) / 2, spare) * math.sqrt(variance) / alpha
    rates = [np.mean(np.log([rate for _, _, rate in side])) for side in (base, variant)]    # nan if unknown
    faster = float(rates[1] - rates[0])
    ends = lambda x: [math.exp(x - half), math.exp(x + half)] if math.isfinite(x + half) else None
    return dict(compute=math.exp(shift), compute_interval=ends(shift),
                wall_clock=math.exp(shift + faster) if math.isfinite(faster) else None,
                wall_clock_interval=ends(shift + faster))


# --------------------------------------------------------------------------------------------------- pictures

BLUE, RED, GREY = "#1f5fa8", "#d62728", "0.45"          # fitted, came later, context


def figure(rows, columns, size, path, draw):
    """Draw on a grid of axes with draw(axes) and save to path, whose ending chooses the format."""
    import matplotlib                                   # only here: fitting needs no pictures
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "legend.fontsize": 7, "legend.title_fontsize": 7}
    with plt.rc_context(look):
        fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        try:
            draw(axes.flat)
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(path, dpi=200)
        except ValueError as error:
            raise BadInput(path, "a picture ending such as .png or .pdf", error, "rename it") from None
        finally:
            plt.close(fig)
    print(f"saved {path}")


def draw_fit(r, path):
    """Bowls; envelope; distance from it, with bands; forecast against assumed E. In red what came later."""
    law, axis, forecasts, last = r["envelope"], r["choices"]["axis"], r["forecasts"], r["forecasts"][-1]
    C, L = (np.array([v[key] for v in r["vertices"]]) for key in ("budget", "loss"))
    later = np.array([(q.flops, q.loss) for q in r["_held"]]).reshape(-1, 2)
    grid = np.geomspace(C.min() / 1.5, 1.5 * max([f["C"] for f in forecasts] + [C.max()]), 80)
    error = lambda c, y: 100 * (np.asarray(y) / loss_at(law, np.asarray(c)) - 1)
    unit = "nats per token" if r["unit"] == "nats" else "bits per byte"

    def draw(axes):
        bowl, whole, zoom, asymptote = axes
        for v, shade in zip(r["vertices"], np.linspace(0.1, 0.9, len(C))):
            here = [q for q in r["_runs"] if q.budget == v["budget"]]
            colour = (0.15, 0.75 * shade, 1 - 0.75 * shade)
            x = np.array([getattr(q, axis) for q in here])
            bowl.plot(x, [q.loss for q in here], "o", ms=3, color=colour, label=f"{v['budget']:.2g}")
            bowl.plot(v[axis], v["loss"], "*", ms=9, color=colour, mec="k", mew=0.5)
            if v["_curve"]:
                z = np.linspace(np.log10(x.min()), np.log10(x.max()), 100)
                bowl.plot(10**z, v["_curve"](z), lw=1, color=colour)
        bowl.set(xscale="log", ylabel=f"macro loss ({unit})", title="isoFLOP bowls (stars: vertices)",
                 xlabel="training tokens $D$" if axis == "tokens" else "active parameters $N$")
        bowl.legend(title="budget $C$ (FLOPs)")
        name = f"$L = {law['E']:.3f} + {law['A']:.4g}\\,C^{{-{law['alpha']:.4f}}}$"
        whole.plot(grid, loss_at(law, grid), color=BLUE, lw=1.3, label="surface" if "beta" in law else name)
        zoom.axhline(0, color=BLUE, lw=1.3)
        if "beta" not in law and (bands := [delta_interval(law, C, L, c) for c in grid])[0]:
            low, high = (error(grid, edge) for edge in np.transpose(bands))
            zoom.fill_between(grid, low, high, color=BLUE, alpha=0.15, lw=0, label="95 % delta/Student-t")
        label = "forecast, 95 % run bootstrap"
        for f in forecasts:
            if ends := f["intervals"]["run_bootstrap"]:
                bars = np.abs(error([f["C"]] * 2, ends))[:, None]
                zoom.errorbar(f["C"], 0, bars, fmt="s", ms=4, mfc="w", color=BLUE, capsize=3, label=label)
                label = None
        for ax, height in ((whole, lambda c, y: y), (zoom, error)):
            ax.plot(C, height(C, L), "o", ms=4, color=BLUE, label="vertices (fitted)")
            if len(later):
                ax.plot(*later.T[:1], height(*later.T), "*", ms=9, color=RED, label="came later (not fitted)")
            ax.set(xscale="log", xlabel="training compute $C$ (FLOPs)")
            ax.legend()
        whole.set(ylabel=f"macro loss ({unit})", title="compute-optimal loss")
        zoom.set(ylabel="distance from the forecast (%)", title="the same, as an error")
        allowed = [row["E"] for row in r["profile"] if row["allowed"]]
        near = [min(allowed + [law["E"]]) - 0.3, max(allowed + [law["E"]]) + 0.4]
        rows = [(row["E"], row["losses"][-1]) for row in r["profile"] if near[0] < row["E"] < near[1]]
        asymptote.plot(*np.array(rows).reshape(-1, 2).T, color=BLUE, label="forecast given $E$")
        if allowed:
            asymptote.axvspan(allowed[0], allowed[-1], color=BLUE, alpha=0.12, lw=0,
                              label="$E$ that the vertices allow (95 %)")
        asymptote.plot(law["E"], last["loss"], "s", color=BLUE, mfc="w", label=f"{last['loss']:.4f} fitted")
        for o in last["outcomes"][:1]:
            asymptote.axhline(o["loss"], color=RED, lw=1.2, label=f"{o['loss']:.4f} came (not fitted)")
        asymptote.set(xlabel=f"assumed asymptote $E$ ({unit})", title="what the asymptote decides",
                      ylabel=f"loss at $C$ = {last['C']:.2g} ({unit})")
        asymptote.legend()
    figure(2, 2, (9, 7), path, draw)


def draw_bias(table, path):
    """Error of the extrapolated D* against the width of the sampled bowl, one panel per kind of sampling."""
    def draw(axes):
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
    figure(1, 3, (9.9, 3.6), path, draw)


# ----------------------------------------------------------------------------------------------- command line

def story():
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


def point(text, E):
    """One speed-up point: C,LOSS or C,LOSS,TOKENS_PER_SECOND, or A=VALUE for a law with E and alpha."""
    try:
        if text.startswith("A="):
            return 1.0, E + number(text[2:], "speedup", "A"), math.nan
        C, loss, *rate = (number(part, "speedup", "each part") for part in text.split(","))
        return C, loss, *(rate or [math.nan])[:1]
    except (BadInput, TypeError, ValueError):
        raise BadInput("speedup", "C,LOSS or C,LOSS,TOKENS_PER_SECOND or A=VALUE", text,
                       "write e.g. 3.82e17,3.5422,433986") from None


class Parser(argparse.ArgumentParser):
    def error(self, message):                           # one line, like every other complaint
        raise BadInput("command line", "the options of --help", message, f"see {self.prog} --help")


def positive(text):
    return number(text, "command line", "the value")


def whole(text):
    return int(number(text, "command line", "the value", 0.99, 1e9))


def parser():
    top = Parser(prog="scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", parser_class=Parser)
    fit = commands.add_parser("fit", help="fit a ladder and forecast")
    reg = commands.add_parser("register", help="fit, and lock one forecast in a file")
    for p in (fit, reg):
        p.add_argument("table", nargs="?", help=f"a CSV, or a public table: {', '.join(TABLES)}")
        p.add_argument("--runs", nargs="+", metavar="DIR", help="finished runs of train.py instead")
        p.add_argument("--x", dest="axis", choices=("tokens", "params"), default="tokens")
        p.add_argument("--method", choices=(*LEAST, "surface"), default="shared")
        p.add_argument("--window", type=positive, metavar="F", help="only runs this near the vertex")
        p.add_argument("--asymptote", default="free", help="E: free or a value")
        p.add_argument("--fit-space", dest="space", choices=("log", "linear"), default="log")
        p.add_argument("--unit", choices=("nats", "bpb"), default="nats")
        p.add_argument("--draws", type=whole, default=400, help="bootstrap refits")
    fit.add_argument("--predict", type=positive, action="append", default=[], metavar="C")
    fit.add_argument("--json", metavar="FILE|-")
    fit.add_argument("--plot", metavar="FILE")
    reg.add_argument("--target", type=positive, required=True, metavar="C")
    reg.add_argument("--target-params", type=positive, metavar="N", help="default: N* of the fit")
    reg.add_argument("--target-tokens", type=positive, metavar="D", help="default: D* of the fit")
    reg.add_argument("--target-config", help="the config that will be run; its text is stored")
    reg.add_argument("--eval", help="eval definition; default: the runs' own")
    reg.add_argument("--failure", default="outside the run-bootstrap interval", help="what is a miss")
    reg.add_argument("--difference", action="append", default=[], help="known difference; repeatable")
    reg.add_argument("--out", required=True, help="prereg/NAME.json")
    p = commands.add_parser("bias", help="recompute and draw the bias study")
    p.add_argument("--plot", default="out/bias.png")
    p = commands.add_parser("score", help="compare an outcome with a registration")
    p.add_argument("record")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--loss", type=positive, help="in the record's unit")
    which.add_argument("--run", metavar="DIR")
    one = commands.add_parser("plan", help="the compute-optimal config of a budget")
    one.add_argument("--flops", type=positive, required=True, metavar="C")
    one.add_argument("--batch", type=whole, help="sequences, instead of the rule")
    one.add_argument("--out", help="the config file to write; default configs/plan_C.py")
    many = commands.add_parser("ladder", help="write, or train, an isoFLOP grid of configs")
    many.add_argument("--budgets", type=positive, nargs="+", metavar="C")
    many.add_argument("--out", help="folder for the configs")
    many.add_argument("--run", metavar="DIR", help="train what is not yet done in this folder")
    for p in (one, many):
        p.add_argument("--config", help="carry data, tokenizer, experts, head_dim, seq_len over from it")
        p.add_argument("--law", metavar="FIT.json", help="D* from a `fit --json`, not the published law")
    p = commands.add_parser("speedup", help="learning speed-up of a variant at equal loss")
    for side in ("--base", "--variant"):
        p.add_argument(side, nargs="+", required=True, help="C,LOSS[,TOKENS_PER_SECOND] ... or A=VALUE")
    p.add_argument("--asymptote", type=positive, required=True, help="E of the eval that --eval names")
    p.add_argument("--alpha", type=positive, required=True)
    p.add_argument("--eval", required=True, help="what E, alpha and the losses were measured on")
    p.add_argument("--noise", type=positive, default=0.0, help="standard deviation of the loss between seeds")
    return top


def run(words):
    """One command. Raises BadInput."""
    a = parser().parse_args(words)
    if a.command is None:
        story()
    elif a.command in ("fit", "register"):
        if bool(a.table) == bool(a.runs):
            raise BadInput("command line", "a table or --runs DIR ...", "both or neither", "give one")
        sources = a.runs or [a.table]
        runs = ([read_run_dir(folder) for folder in sources] if a.runs
                else reference(a.table) if a.table in TABLES else read_csv(a.table))
        E = None if a.asymptote == "free" else number(a.asymptote, "--asymptote", "E", -1e-12, 100)
        result = analyse(runs, Choices(a.method, a.axis, a.window, E, a.space),
                         a.predict if a.command == "fit" else [a.target], a.unit, " ".join(sources), a.draws)
        if a.command == "register":
            if not (definition := a.eval or result["eval"]):
                raise BadInput("--eval", "the eval definition (set, seq_len, sequences)", "none", "give it")
            f = result["forecasts"][0]
            config = Path(a.target_config).read_text(errors="replace") if a.target_config else None
            target = dict(C=a.target, N=a.target_params or f["params"], D=a.target_tokens or f["tokens"],
                          config=config)
            register(result, sources, target, definition, a.failure, a.difference, a.out)
            return
        with contextlib.redirect_stdout(sys.stderr if a.json == "-" else sys.stdout):
            if a.plot:
                draw_fit(result, a.plot)
        if a.json != "-":
            report(result)
        if a.json:
            text = json.dumps(plain(result), indent=1, allow_nan=False)
            print(text) if a.json == "-" else Path(a.json).write_text(text + "\n")
    elif a.command == "bias":
        bias(a.plot)
    elif a.command == "score":
        score(a.record, a.loss, read_run_dir(a.run) if a.run else None)
    elif a.command in ("plan", "ladder"):
        base = read_config(a.config) if a.config else {}
        law = None
        if a.law:
            if not isinstance(law := read_json(a.law).get("D_star"), dict):
                raise BadInput(a.law, "a D_star law", "none", "write one with: fit ... --json FILE")
            law = {key: number(law.get(key), a.law, key, *ends)
                   for key, *ends in (("coefficient", 0, 1e40), ("exponent", -5, 5))}
        if a.command == "plan":
            path = a.out or f"configs/plan_{a.flops:.2g}.py".replace("+", "")
            text = config_text(plan(a.flops, base, batch=a.batch, law=law), a.flops, path)
            write_new(path, text)
            print(text + f"written to {path}")
        elif a.run:
            run_ladder(a.run)
        elif a.budgets and a.out:
            ladder(a.budgets, a.out, base, law=law)
        else:
            raise BadInput("ladder", "--budgets C ... --out DIR, or --run DIR", "neither", "give one")
    else:
        base, variant = ([point(text, a.asymptote) for text in side] for side in (a.base, a.variant))
        r = speedup(base, variant, a.asymptote, a.alpha, a.noise)
        print(f"E = {a.asymptote} and alpha = {a.alpha}, for eval {a.eval}")
        for key in ("compute", "wall_clock"):
            if r[key]:
                ends = r[f"{key}_interval"]
                span = "{:.4f} .. {:.4f}".format(*ends) if ends else "none: give more points or --noise"
                print(f"{key:10s} speed-up {r[key]:.4f}   90 % interval {span}")


def main(words):
    """Exit status of one command: 0, or 2 after one line on stderr about what the user can mend."""
    try:
        run(words)
        return 0
    except BadInput as error:
        print(f"scaling.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"scaling.py: {error.filename or 'output'}: expected a path to read or write, found "
              f"{error.strerror}; do check it", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
