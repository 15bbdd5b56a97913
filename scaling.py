"""Scaling laws: fit isoFLOP ladders, forecast a loss before the run, score it after.   Imports no house file.

Run:   python scaling.py                 the story in a minute: 2.252 forecast, 2.233 came, and why that was luck
       python scaling.py fit RUNS.csv --predict 1e21        also: bias register score plan ladder speedup (--help)
Read:  runs -> shapes and FLOPs -> bowls -> envelope -> surface -> uncertainty -> forecast -> bias
       -> registration -> planning -> speed-up -> pictures -> command line.
C training FLOPs   N active parameters (output head in, input embedding out)   D tokens   k = C/(N D), never 6
L(C) = E + A C^-alpha: E asymptote (nats per token), A, alpha.   A star marks the compute-optimal point of a C.
Sources: #n is an issue of marin-community/marin; Czech et al. is arXiv 2603.22339."""

import argparse
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

LEVEL = 0.95            # of every interval, unless a line says otherwise
REFERENCE = 1e20        # C is measured in this unit while fitting, so that A stays a number of ordinary size
CONVENTION = ("C: training FLOPs, 3x forward, causal square counted whole, head only when dense. "
              "N: active parameters, head in, embedding out")


class BadInput(ValueError):
    """A mistake that the user can mend: one line that names the place, what was expected, found, and what to do."""
    def __init__(self, where, expected, found, do):
        one_line = " ".join(f"{where}: expected {expected}, found {found}; do {do}".split())
        super().__init__(one_line if len(one_line) < 600 else one_line[:597] + "...")


# -------------------------------------------------------------------------------------------------------- runs

@dataclass(frozen=True)
class Run:
    """One finished training run; loss is in nats per token (or bits per byte after `in_unit`)."""
    flops: float
    params: float
    tokens: float
    loss: float
    budget: float = 0.0             # nominal C of its isoFLOP bowl; 0 until `budgeted` groups the runs
    kind: str = "isoflop"           # "isoflop" is fitted, "held_out" is an outcome, "excluded" is only kept
    seed: str = ""
    eval: str = ""
    tokenizer: str = ""
    bytes_per_token: float = 0.0    # of the evaluation text; 0 is unknown
    source: str = ""
    extra: dict = field(default_factory=dict, compare=False)


# [cited: #4447, the v16 sweep; #6074 and #8003, the May sweep] budget | width tokens(- not posted) Paloma macro
# loss; ...   The last row holds only each width's final run; 2.646478 and 2.624797 were the first attempts.
MOE_V16 = """
1e18 | 512 3822845952 3.539674; 640 2272788480 3.522152; 768 1594884096 3.527292; 896 969670656 3.587628
     | 1024 736886784 3.623152; 1280 437518336 3.748672; 1536 261095424 3.939782; 1792 181141504 4.121221
3e18 | 512 11468275712 3.414755; 640 6818627584 3.367424; 768 4784914432 3.339798
     | 896 2908880896 3.345855; 1024 2210660352 3.347597; 1280 1312423936 3.405738
     | 1536 783417344 3.509923; 1792 543424512 3.618996; 2048 364904448 3.737143
1e19 | 512 38227935232 3.332810; 640 22728933376 3.248370; 768 15949365248 3.209400
     | 896 9696182272 3.164016; 1024 7368736768 3.149416; 1280 4374528000 3.162015
     | 1536 2611609600 3.201606; 1792 1811152896 3.261857; 2048 1216479232 3.329172
3e19 | 640 68185751552 3.170573; 768 47848620032 3.114366; 896 29088546816 3.051757
     | 1024 22106079232 3.015672; 1280 13123715072 3.007957; 1536 7834697728 3.006631
     | 1792 5433589760 3.037368; 2048 3649437696 3.070442
1e20 | 768 - 3.056129; 1024 - 2.918911; 1280 - 2.877778; 1536 - 2.850873; 1792 - 2.860672; 2048 - 2.872195
3e20 | 1280 - 2.787324; 1536 - 2.743016; 1792 - 2.734173; 2048 - 2.722151; 2304 - 2.732576
1e21 | 2048 - 2.605977; 2560 - 2.598692"""
MOE_MAY = """
1e18 | 512 3771465728 3.392345; 768 1577058304 3.402113; 1024 729808896 3.471169
3e18 | 512 11314135040 3.269317; 768 4730650624 3.220896; 1024 2189426688 3.240918; 1280 1301282816 3.298348
1e19 | 512 37717278720 3.184254; 768 15770583040 3.073707; 1024 7298613248 3.042225; 1280 4337434624 3.065161
3e19 | 512 113151836160 3.124572; 768 47314894848 2.968832; 1024 21895315456 2.910512; 1280 13014401024 2.904488"""
# [cited: #1337, openathena.ai/blog/delphi] C, D*, N*, loss*, curvature in log10 D of Marin's seven parabolas
DELPHI_VERTICES = ((3.0e18, 1479419846.435, 380691293.436, 3.5861880886, 0.5732953358),
                   (9.0e18, 2898203413.910, 558458701.503, 3.3857490912, 0.5283811119),
                   (1.8e19, 4202416947.878, 753603925.229, 3.2705098588, 0.4649342634),
                   (3.0e19, 5697236384.014, 909880015.607, 3.1949105544, 0.3978805226),
                   (9.0e19, 10246124083.970, 1478431211.248, 3.0410230303, 0.3389222170),
                   (1.8e20, 15402871298.448, 1936095968.268, 2.9463606138, 0.3356739652),
                   (3.0e20, 20875750175.553, 2353770604.589, 2.8829059352, 0.3249631499))
# C, N, D, seed, loss of the runs that came after the forecast; the last one had loss spikes [cited: #1337]
DELPHI_HELD_OUT = ((1e21, 3383110656, 46256881664, "default", 2.758141),
                   (1e21, 3383110656, 46256881664, "42", 2.760562), (1e21, 3383110656, 46256881664, "62746", 2.759510),
                   (1e22, 9714698752, 160369213440, "default", 2.530787),
                   (1e22, 9714698752, 160369213440, "42", 2.534246), (1e22, 9714698752, 160369213440, "62746", 2.531137),
                   (1e23, 24963098112, 628172521472, "default", 2.354601))
JUNE_ANCHORS = ((2.00e19, 3.2373), (1.31e20, 2.9538), (7.16e20, 2.7515))        # [cited: #6044] C, loss; no N, D
HERO = (1e23, 5120, 2.2333362)          # [cited: #4447] C, width, Paloma macro of the 129B run, after 2.252 was posted
# [cited: #5951] C, loss, tokens per second of the four compute-optimal rungs that gate every change of the recipe
V16_RUNGS = ((2.19e17, 3.8104, 405630), (1.70e18, 3.4339, 273532), (9.00e18, 3.1605, 175165), (2.83e19, 3.0065, 128277))
MAY_RUNGS = ((3.82e17, 3.5422, 433986), (2.81e18, 3.2273, 294726), (1.16e19, 3.0195, 219720), (3.46e19, 2.8857, 171912))


def reference(name):
    """Runs of a public table typed above: "moe_v16", "may", "delphi" (vertices and outcomes) or "june" (anchors)."""
    if name == "delphi":
        return ([Run(C, N, D, L, C, source=name) for C, D, N, L, _ in DELPHI_VERTICES]
                + [Run(C, N, D, L, C, "held_out", seed, source=name) for C, N, D, seed, L in DELPHI_HELD_OUT])
    if name == "june":
        return [Run(C, math.nan, math.nan, L, C, source=name) for C, L in JUNE_ANCHORS]
    experts, runs, C = {"moe_v16": 64, "may": 256}[name], [], 0.0
    for line in (MOE_V16 if name == "moe_v16" else MOE_MAY).split("\n")[1:]:
        C = float(line.split("|")[0].strip() or C)
        for width, tokens, loss in (cell.split() for cell in line.split("|")[1].split(";")):
            sizes = shape(int(width), experts)
            # Widths 640 and 896 were left out of Marin's own fit, without a stated reason; we follow to reproduce it.
            kind = "held_out" if C > 5e20 else "excluded" if width in ("640", "896") and name == "moe_v16" else "isoflop"
            runs.append(Run(C, sweep_params(sizes, 128_256), float(tokens) if tokens != "-"
                            else C / flops_per_token(sizes, 128_256), float(loss), C, kind, source=name,
                            extra={"hidden_dim": int(width), "tokens_posted": tokens != "-"}))
    if name == "moe_v16":
        C, width, loss = HERO
        sizes = shape(width, 64) | {"num_layers": 48}          # the heuristic says 49; the run had 48
        runs.append(Run(C, sweep_params(sizes, 128_256), C / flops_per_token(sizes, 128_256), loss, C, "held_out",
                        source=name, extra={"hidden_dim": width, "tokens_posted": False}))
    return runs


def number(text, where, key, low=0.0, high=1e40):
    """`text` as a finite float in (low, high], else BadInput."""
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if isinstance(text, bool) or not low < value <= high:
        raise BadInput(where, f"{key} to be a number above {low:g} and at most {high:g}", repr(text)[:40],
                       f"correct {key} or delete the run")
    return value


SHAPE_COLUMNS = ("hidden_dim", "num_experts", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "experts_per_token", "expert_dim", "shared_dim", "gated_norm_rank", "seq_len")
MAY_BE_ZERO = ("num_experts", "experts_per_token", "expert_dim", "shared_dim")
KNOWN_COLUMNS = ("flops", "budget_flops", "params", "tokens", "loss", "kind", "seed", "eval", "tokenizer",
                 "bytes_per_token", "vocab_size") + SHAPE_COLUMNS


def read_csv(path, loss_column="loss"):
    """Runs of a table with a header of flops (or budget_flops), params, tokens, loss; other columns are kept.

    A blank params or tokens is derived from the row's hidden_dim and num_experts (and any other shape column)."""
    try:
        rows = list(csv.reader(io.StringIO(Path(path).read_bytes().decode("utf-8-sig"), newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(path, "a UTF-8 table of comma-separated values", error, "export the table again") from None
    head = [name.strip() for name in rows[0]] if rows else []
    C_column = "flops" if "flops" in head else "budget_flops"
    missing = [c for c in (C_column, loss_column) if c not in head]
    missing += [c for c in ("params", "tokens") if c not in head and "hidden_dim" not in head]
    if missing or len(set(head)) < len(head):
        raise BadInput(path, f"columns flops, params, tokens, {loss_column}, each once", ", ".join(head) or "nothing",
                       f"rename or add {', '.join(missing) or 'what stands twice'}")
    runs = []
    for line, cells in enumerate(rows[1:], 2):
        where = f"{path} line {line}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(head):
            raise BadInput(where, f"{len(head)} cells", len(cells), "quote commas inside cells, fill the gaps")
        row = {key: cell.strip() for key, cell in zip(head, cells)}
        C = number(row[C_column], where, C_column, 1)
        given = {key: int(number(row[key], where, key, -1 if key in MAY_BE_ZERO else 0.99, 1e6))
                 for key in SHAPE_COLUMNS if row.get(key)}
        vocab, sizes = int(number(row.get("vocab_size") or 128_256, where, "vocab_size")), None
        if not (row.get("params") and row.get("tokens")):
            if not {"hidden_dim", "num_experts"} <= given.keys():
                raise BadInput(where, "params and tokens, or a shape (hidden_dim, num_experts) to derive them from",
                               "neither", "fill them in")
            sizes = shape(given["hidden_dim"], given["num_experts"], given.get("head_dim", 128)) | given
        runs.append(Run(
            C, number(row["params"], where, "params", 1) if row.get("params")
            else param_counts(sizes, vocab)["core"] + vocab * sizes["hidden_dim"],
            number(row["tokens"], where, "tokens", 1) if row.get("tokens") else C / flops_per_token(sizes, vocab),
            number(row[loss_column], where, loss_column, 1e-3, 100),
            number(row["budget_flops"], where, "budget_flops", 1) if row.get("budget_flops") else 0.0,
            row.get("kind") or "isoflop", row.get("seed", ""), row.get("eval", ""), row.get("tokenizer", ""),
            number(row["bytes_per_token"], where, "bytes_per_token", 0, 1e3) if row.get("bytes_per_token") else 0.0,
            str(path), {key: row[key] for key in head if key not in KNOWN_COLUMNS + (loss_column,)}))
        if runs[-1].kind not in ("isoflop", "held_out", "excluded"):
            raise BadInput(where, "kind isoflop, held_out or excluded", runs[-1].kind, "correct the cell")
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
    result, config = read_json(path), read_json(Path(folder) / "config.json")
    known = {key: number(result.get(key), path, key, *((1e-3, 100) if key == "loss" else (0, 1e40)))
             for key in ("flops", "params", "tokens", "loss", "bytes_per_token")}
    train = config.get("train") if isinstance(config.get("train"), dict) else {}
    return Run(**known, seed=str(result.get("seed", "")), eval=json.dumps(result.get("eval", ""), sort_keys=True),
               tokenizer=str(train.get("tokenizer", "")), source=str(folder), extra={"run_dir": str(folder)})


def checked(runs, source):
    """The same runs, each with a budget, or BadInput: duplicates, several evals, nothing to fit.

    Runs without a nominal budget join the bowl of the cheapest run within 25 % of them."""
    seen = {}
    for run in runs:
        if (same := (run.flops, run.params, run.tokens, run.seed, run.kind)) in seen and run.params == run.params:
            raise BadInput(source, "each run once", f"C={run.flops:g} N={run.params:g} D={run.tokens:g} "
                           f"seed={run.seed or 'blank'} twice", "delete one, or give the repeats their seeds")
        seen[same] = run
    if len(evals := {run.eval for run in runs}) > 1:
        raise BadInput(source, "one eval definition", f"{len(evals)}: {sorted(evals)}", "fit each eval on its own")
    if not any(run.kind == "isoflop" for run in runs):
        raise BadInput(source, "at least one isoFLOP run", f"{len(runs)} runs, none of that kind", "add the ladder")
    groups = []
    for run in sorted((r for r in runs if not r.budget), key=lambda r: r.flops):
        if not groups or run.flops > 1.25 * groups[-1][0].flops:
            groups.append([])
        groups[-1].append(run)
    nominal = {id(r): float(f"{np.exp(np.mean([np.log(s.flops) for s in g])):.4g}") for g in groups for r in g}
    return [replace(run, budget=run.budget or nominal[id(run)]) for run in runs]


def in_unit(runs, unit, source):
    """Losses in "nats" per token or in "bpb", bits per byte. Several tokenizers are comparable only in the latter,
    since a token that spans more bytes costs more nats for the same knowledge of the text."""
    kinds = {(r.tokenizer, round(r.bytes_per_token, 3)) for r in runs}
    if unit == "nats" and len(kinds) > 1:
        raise BadInput(source, "one tokenizer for a forecast in nats per token", f"{len(kinds)} (tokenizer, bytes per "
                       f"token): {sorted(kinds)[:3]}", "use --unit bpb: only bits per byte compare across tokenizers")
    if unit == "bpb" and any(not r.bytes_per_token for r in runs):
        raise BadInput(source, "bytes_per_token for every run", "a run without", "add the column")
    return runs if unit == "nats" else [replace(r, loss=r.loss / math.log(2) / r.bytes_per_token) for r in runs]


# -------------------------------------------------------------------------------------------- shapes and FLOPs

def shape(hidden_dim, experts=64, unit=128):
    """Config keys of a width by the recipe's rules [cited: #4447]; experts=0 is the dense twin (4x MLP, no GQA).

    unit is the head width and the rounding of the expert width: 128 in the recipe, less on a laptop."""
    if hidden_dim < unit or hidden_dim % unit:
        raise BadInput("hidden_dim", f"a positive multiple of {unit}", hidden_dim, "choose such a width")
    heads = hidden_dim // unit
    kv = max([k for k in range(1, heads // 4 + 1) if heads % k == 0] or [1])      # the recipe's 4:1 where it divides
    return dict(hidden_dim=hidden_dim, seq_len=4096, head_dim=unit, num_heads=heads,
                num_layers=max(1, round(hidden_dim / (64 + 4 * math.log2(hidden_dim) - 9))),
                num_kv_heads=kv if experts else heads, num_experts=experts, experts_per_token=min(4, experts),
                expert_dim=math.ceil(hidden_dim / 2 / unit) * unit if experts else 0,
                shared_dim=hidden_dim if experts else 4 * hidden_dim, gated_norm_rank=128)


def flops_per_token(sizes, vocab_size):
    """Training FLOPs per token: 3x forward, scores over the whole seq_len, head only when dense [cited: #4447].

    Norms, gates and the embedding are not counted. This is model.count's convention; it is never 6 N."""
    d, s, H, h = sizes["hidden_dim"], sizes["seq_len"], sizes["num_heads"], sizes["head_dim"]
    layer = (6 * d * sizes["expert_dim"] * sizes["experts_per_token"] + 6 * d * sizes["shared_dim"]
             + (2 * d * sizes["num_experts"] if sizes["num_experts"] > 1 else 0)
             + 2 * d * h * (H + 2 * sizes["num_kv_heads"]) + 2 * H * h * d + 4 * s * H * h + 3 * s * H)
    return 3 * (sizes["num_layers"] * layer + (0 if sizes["num_experts"] else 2 * d * vocab_size))


def param_counts(sizes, vocab_size):
    """dict(total, active, core) of model.py's network: active has both embeddings, core neither.

    N everywhere in this file is core + vocab_size * hidden_dim: every weight a token meets, the head included."""
    d, H, h, E = sizes["hidden_dim"], sizes["num_heads"], sizes["head_dim"], sizes["num_experts"]
    gated = d + 2 * d * sizes["gated_norm_rank"]                        # one gain and one GatedNorm
    expert = 3 * d * sizes["expert_dim"]
    always = (d * h * (2 * H + 2 * sizes["num_kv_heads"]) + 3 * d * sizes["shared_dim"] + d * E + d * H + 2 * gated)
    core = sizes["num_layers"] * (always + sizes["experts_per_token"] * expert) + 2 * gated
    idle = sizes["num_layers"] * (E - sizes["experts_per_token"]) * expert
    return dict(total=core + idle + 2 * vocab_size * d, active=core + 2 * vocab_size * d, core=core)


def sweep_params(sizes, vocab_size):
    """Active parameters as Marin's v16 sweep counted them [derived: the count that gives the N* posted in #4447]:
    attention as four full squares in spite of GQA, no norms or gates."""
    d = sizes["hidden_dim"]
    return (sizes["num_layers"] * (4 * d * d + 3 * d * sizes["expert_dim"] * sizes["experts_per_token"]
                                   + 3 * d * sizes["shared_dim"] + d * sizes["num_experts"]) + vocab_size * d)


# ------------------------------------------------------------------------------------------------------- bowls

@dataclass(frozen=True)
class Choices:
    """Everything that decides a fit; stored whole in a registration."""
    method: str = "shared"          # shared | parabola (the biased habit) | cubic | surface | best (lowest run)
    axis: str = "tokens"            # the bowl's horizontal axis: tokens | params
    window: float | None = None     # keep only runs within this factor of the vertex
    asymptote: float | None = None  # E; None leaves it free
    space: str = "log"              # residuals of log(L - E), or of L ("linear")


def best_coefficients(exponents, log_u, log_v, y, groups):
    """Per group the non-negative (E, A, B) of E + A u^-p + B v^-q that fits y best, and all residuals."""
    columns = np.stack([np.ones_like(y), np.exp(-exponents[0] * log_u), np.exp(-exponents[1] * log_v)], 1)
    residual, coefficients = np.empty_like(y), []
    for rows in groups:
        w, _ = nnls(columns[rows], y[rows])
        residual[rows] = y[rows] - columns[rows] @ w
        coefficients.append(w)
    return residual, coefficients


def variable_projection(log_u, log_v, y, groups, start=None):
    """Exponents (p, q) common to all groups, by VPNLS [cited: Czech et al.]: given (p, q) the rest is linear, so only
    two numbers are searched: a 32 x 32 grid (unless start is given), then Gauss-Newton on the projected residual."""
    residual = lambda pq: best_coefficients(pq, log_u, log_v, y, groups)[0]
    tolerance = 1e-9 if start is not None else 1e-15
    if start is None:
        grid = np.geomspace(0.03, 1.5, 32)
        start = min(((p, q) for p in grid for q in grid), key=lambda pq: np.sum(residual(pq)**2))
    fit = least_squares(residual, start, "3-point", bounds=(0.01, 3), xtol=tolerance, ftol=tolerance, gtol=1e-15)
    return fit.x, *best_coefficients(fit.x, log_u, log_v, y, groups)


def by_budget(runs):
    """{budget: indices of its runs}, cheapest first."""
    budgets = np.array([r.budget for r in runs])
    return {float(C): np.flatnonzero(budgets == C) for C in np.unique(budgets)}


def refuse_bowl(runs, C, rows, expected, found):
    raise BadInput(f"{runs[rows[0]].source}: budget {C:.3g}", expected, found, "add runs there, or leave the budget out")


def bowls(runs, choices, start=None, inside=True):
    """One vertex per budget: where the isoFLOP bowl is lowest along the chosen axis, and how low.

    parabola  a quadratic in log10 x for each budget alone. Everyone uses it; the truth is steeper on one side, so the
              vertex moves with the sampling (see `bias`). Kept as the baseline.
    cubic     one more degree: less bias, more noise.
    shared    E_c + A_c x^p + B_c x^-q with p and q common to all budgets, the rest free per budget. Along an isoFLOP
              N is C/(kD), so this is the true form of a loss surface; no bias without noise, and no global E.
    best      the lowest run of each budget, as it is; for tables of optima.
    Returns dict(vertices, fitted, unknowns, start). Raises BadInput for a bowl without a minimum, or (if `inside`)
    with one outside the sampled range."""
    groups, y = by_budget(runs), np.array([r.loss for r in runs])
    x = np.log10([getattr(r, choices.axis) for r in runs])
    other = np.log10([r.params if choices.axis == "tokens" else r.tokens for r in runs])
    fitted, vertices = y.copy(), []
    least = {"parabola": 3, "shared": 3, "cubic": 4, "best": 1}[choices.method]
    for C, rows in groups.items():
        if len(rows) < least or (least > 1 and len(np.unique(np.round(x[rows], 5))) < least):
            refuse_bowl(runs, C, rows, f"at least {least} runs of different {choices.axis} for a {choices.method}",
                        len(rows))
        if np.ptp(x[rows]) > 6:
            refuse_bowl(runs, C, rows, f"{choices.axis} within a factor of a million", f"1e{np.ptp(x[rows]):.0f}")
    mid = {C: x[rows].mean() for C, rows in groups.items()}
    if choices.method == "shared":
        if len(y) <= 3 * len(groups) + 2:
            raise BadInput(runs[0].source, f"more than {3 * len(groups) + 2} runs for {len(groups)} shared bowls", len(y),
                           "add runs, or use --method parabola")
        log_x = math.log(10) * (x - np.array([mid[r.budget] for r in runs]))
        start, residual, weights = variable_projection(-log_x, log_x, y, list(groups.values()), start)
        fitted = y - residual
    for i, (C, rows) in enumerate(groups.items()):
        curve = None
        if choices.method == "best":
            at = x[rows[np.argmin(y[rows])]]
            low, curvature = float(y[rows].min()), math.nan
        elif choices.method == "shared":
            (E, A, B), (p, q) = weights[i], start
            if min(A, B) <= 1e-12 * max(A, B, E):
                refuse_bowl(runs, C, rows, "an interior minimum", "a bowl that only falls or only rises")
            at = mid[C] + math.log10(q * B / (p * A)) / (p + q)
            curve = lambda z, w=(E, A, B), m=mid[C]: w[0] + w[1] * 10**(p * (z - m)) + w[2] * 10**(-q * (z - m))
            low = float(curve(at))
            curvature = math.log(10)**2 / 2 * (p * p * A * 10**(p * (at - mid[C])) + q * q * B * 10**(-q * (at - mid[C])))
        else:
            curve_fit = np.polynomial.Polynomial.fit(x[rows], y[rows], least - 1)
            fitted[rows] = curve_fit(x[rows])
            roots = [r.real for r in curve_fit.deriv().roots() if abs(r.imag) < 1e-9 and curve_fit.deriv(2)(r.real) > 0]
            if not roots:
                refuse_bowl(runs, C, rows, "a bowl that opens upwards", "no minimum")
            at, curve = min(roots, key=lambda r: abs(r - mid[C])), curve_fit
            low, curvature = float(curve(at)), float(curve_fit.deriv(2)(at)) / 2
        if inside and least > 1 and not x[rows].min() <= at <= x[rows].max():
            refuse_bowl(runs, C, rows, f"a minimum inside the sampled {choices.axis} "
                        f"{10**x[rows].min():.3g}..{10**x[rows].max():.3g}", f"{float(10**np.clip(at, -99, 99)):.3g}")
        line = np.polyfit(x[rows], other[rows], 1) if least > 1 else (0, other[rows[np.argmin(y[rows])]])
        pair = (float(10**at), float(10**np.polyval(line, at)))          # the other axis: a straight line in log-log
        vertex = dict(budget=C, runs=len(rows), loss=low, curvature=float(curvature),
                      flags=[f"fewer than two runs on the side of {side} {choices.axis}" for side, n in
                             (("fewer", np.sum(x[rows] < at)), ("more", np.sum(x[rows] > at))) if n < 2 <= least])
        vertex["tokens"], vertex["params"] = pair if choices.axis == "tokens" else pair[::-1]
        vertices.append(vertex | {"_curve": curve})
    unknowns = least * len(groups) + (2 if choices.method == "shared" else 0)
    return dict(vertices=vertices, fitted=fitted, unknowns=unknowns, start=start)


def windowed(runs, choices):
    """The runs within choices.window of their bowl's vertex (found from all of them; once, not iterated)."""
    if choices.window is None:
        return runs
    first = replace(choices, method="parabola" if choices.method == "surface" else choices.method)
    centre = {v["budget"]: v[choices.axis] for v in bowls(runs, first)["vertices"]}
    return [r for r in runs if abs(math.log(getattr(r, choices.axis) / centre[r.budget])) <= math.log(choices.window)]


# ---------------------------------------------------------------------------------------------------- envelope

def envelope(C, L, asymptote=None, space="log"):
    """L(C) = E + A C^-alpha through the vertices: dict(E, A, alpha, ssr, space, free).

    In log space each E gives a straight line; a free E is the best of 400 between 0 and 0.95 min L, because that is
    how Marin's public forecasts were made and the grid's step (0.007) is far below the uncertainty of E."""
    c, L = np.log(np.asarray(C) / REFERENCE), np.asarray(L, float)
    free = asymptote is None
    if len(c) < (need := 4 if free else 3):
        raise BadInput("envelope", f"at least {need} budgets with E {'free' if free else 'fixed'}", len(c),
                       "add budgets" + (", or fix it: --asymptote VALUE" if free else ""))
    if not free and not 0 <= asymptote < L.min():
        raise BadInput("--asymptote", f"0 or more, below the lowest loss {L.min():.4f}", asymptote, "lower it")
    E = np.linspace(0, 0.95 * L.min(), 400) if free else np.array([asymptote])
    y, centred = np.log(L - E[:, None]), c - c.mean()
    slope, level = y @ centred / (centred @ centred), y.mean(1)
    ssr = np.sum((y - level[:, None] - slope[:, None] * centred)**2, 1)
    i = int(np.argmin(ssr))
    theta = np.array([E[i], level[i] - slope[i] * c.mean(), -slope[i]])          # E, log A at REFERENCE, alpha
    if space == "linear":
        miss = lambda p: (p[0] if free else asymptote) + np.exp(p[-2] - p[-1] * c) - L
        best = least_squares(miss, theta[0 if free else 1:], x_scale="jac", xtol=1e-12, ftol=1e-14,
                             bounds=([0, -np.inf, -np.inf], [L.min(), np.inf, np.inf]) if free else (-np.inf, np.inf))
        theta[0 if free else 1:] = best.x
        ssr[i] = 2 * best.cost
    if not 1e-6 < theta[2] < 3:
        raise BadInput("envelope", "a loss that falls with compute, alpha in 0..3", f"alpha = {theta[2]:.3g}", "check the runs")
    return dict(E=float(theta[0]), A=float(np.exp(theta[1] + theta[2] * np.log(REFERENCE))), alpha=float(theta[2]),
                ssr=float(ssr[i]), space=space, free=free)


def loss_at(law, C):
    """The loss that an envelope or a surface expects from the compute-optimal run of C FLOPs."""
    if "beta" in law:
        N, D = surface_optimum(law, C)
        return law["E"] + law["A"] * N**-law["alpha"] + law["B"] * D**-law["beta"]
    return law["E"] + law["A"] * C**-law["alpha"]


def power_law(C, y):
    """y = coefficient C^exponent by least squares in log-log, with a Student-t interval; None where y is unknown."""
    if not np.all(np.isfinite(y)) or len(C) < 3:
        return None
    line = linregress(np.log(C), np.log(y))
    if not abs(line.slope) < 5:
        raise BadInput("N* and D*", "exponents between -5 and 5", f"{line.slope:.3g}", "check params and tokens of the runs")
    half = student.ppf((1 + LEVEL) / 2, len(C) - 2) * line.stderr
    return dict(coefficient=float(np.exp(line.intercept)), exponent=float(line.slope),
                exponent_interval=[float(line.slope - half), float(line.slope + half)])


# ----------------------------------------------------------------------------------------------------- surface

def surface(runs, method="vpnls", start=None):
    """L = E + A N^-alpha + B D^-beta through all runs at once. Unbiased on synthetic data, and 13 % off on Marin's
    ladders, whose budgets differ in more than N and D; so it is never the default forecaster [derived: `fit delphi`].

    "vpnls" minimises squared loss; "huber_lse" Huber(1e-3) of log-loss (Hoffmann et al.), started from the former."""
    N, D, y = (np.array([getattr(r, key) for r in runs], float) for key in ("params", "tokens", "loss"))
    if len(y) < 6 or not all(np.ptp(np.log10(x)) < 12 for x in (N, D)):
        raise BadInput(runs[0].source, "at least 6 runs with plausible params and tokens for a surface", len(y), "add runs")
    log_n, log_d = np.log(N).mean(), np.log(D).mean()
    u, v = np.log(N) - log_n, np.log(D) - log_d
    (alpha, beta), residual, [(E, A, B)] = variable_projection(u, v, y, [np.arange(len(y))], start)
    status = [name for name, bad in (("E, A or B clipped at zero", min(E, A, B) == 0),
                                     ("exponent at its bound", not 0.011 < min(alpha, beta) <= max(alpha, beta) < 2.9)) if bad]
    if method == "huber_lse" and min(E, A, B) > 0:
        model = lambda p: logsumexp([np.full(len(y), p[0]), p[1] - p[3] * u, p[2] - p[4] * v], axis=0)
        fit = minimize(lambda p: np.sum(huber(1e-3, model(p) - np.log(y))) * 1e6, [*np.log([E, A, B]), alpha, beta],
                       method="L-BFGS-B", options=dict(maxiter=5000, ftol=1e-15, gtol=1e-10))
        (E, A, B), (alpha, beta), residual = np.exp(fit.x[:3]), fit.x[3:], y - np.exp(model(fit.x))
    largest = max(r.budget for r in runs)
    k = float(np.median([r.flops / (r.params * r.tokens) for r in runs if r.budget == largest]))
    return dict(E=float(E), A=float(A * np.exp(alpha * log_n)), B=float(B * np.exp(beta * log_d)), alpha=float(alpha),
                beta=float(beta), k=k, ssr=float(residual @ residual), status=status), y - residual


def surface_optimum(law, C):
    """(N*, D*) of a surface at C = k N D, k being that of the largest sampled budget."""
    p, q = law["alpha"], law["beta"]
    N = (p * law["A"] / (q * law["B"]))**(1 / (p + q)) * (C / law["k"])**(q / (p + q))
    return N, C / law["k"] / N


def fit_law(runs, choices, start=None, inside=True):
    """dict(law, vertices, fitted, unknowns, start) by the chosen method; start warms up a refit."""
    if choices.method != "surface":
        bowl = bowls(runs, choices, start, inside)
        law = envelope([v["budget"] for v in bowl["vertices"]], [v["loss"] for v in bowl["vertices"]],
                       choices.asymptote, choices.space)
        return bowl | {"law": law}
    law, fitted = surface(runs, start=start)
    vertices = []
    for C, rows in by_budget(runs).items():
        if min(law["A"], law["B"]) <= 0:
            refuse_bowl(runs, C, rows, "a surface that falls with N and with D", "A or B clipped at zero")
        N, D = surface_optimum(law, C)
        vertices.append(dict(budget=C, runs=len(rows), loss=loss_at(law, C), curvature=math.nan, flags=[], params=N,
                             tokens=D, _curve=None))
    return dict(law=law, vertices=vertices, fitted=fitted, unknowns=5, start=[law["alpha"], law["beta"]])


# ------------------------------------------------------------------------------------------------- uncertainty

def delta_interval(law, C, L, target, level=LEVEL):
    """Delta-method Student-t interval for the loss of a new run at `target`; None without spare budgets."""
    c, L, at = np.log(np.asarray(C) / REFERENCE), np.asarray(L), math.log(target / REFERENCE)
    height = lambda c: loss_at(law, np.exp(c) * REFERENCE) - law["E"]
    gradient = lambda c: np.stack([np.ones_like(c), height(c), -c * height(c)])[0 if law["free"] else 1:]
    spare = len(c) - 2 - law["free"]
    if spare < 1:
        return None
    weight = height(c) if law["space"] == "log" else np.ones_like(c)    # a log residual is a loss residual / height
    J = (gradient(c) / weight).T
    g = gradient(np.array(at))
    variance = law["ssr"] / spare * (g @ np.linalg.pinv(J.T @ J) @ g + (height(at) if law["space"] == "log" else 1)**2)
    half = student.ppf((1 + level) / 2, spare) * math.sqrt(variance)
    middle = loss_at(law, target)
    return [float(middle - half), float(middle + half)]


def run_bootstrap(runs, fit, choices, targets, draws=400, seed=0, level=LEVEL):
    """Resample the runs' residuals about their bowls, refit everything, forecast one new run: intervals per target.

    Returns (intervals or None, share of refits that failed, draws x targets)."""
    losses = np.array([r.loss for r in runs])
    residual, spare = losses - fit["fitted"], len(runs) - fit["unknowns"]
    if choices.method == "best" or spare < 1:
        return None, 0.0, None
    residual = (residual - residual.mean()) * math.sqrt(len(runs) / spare)     # fitted residuals are too small
    rng, forecasts = np.random.default_rng(seed), []
    for _ in range(draws):
        sample = fit["fitted"] + rng.choice(residual, len(runs))
        try:
            law = fit_law([replace(r, loss=float(y)) for r, y in zip(runs, sample)], choices, fit["start"], False)["law"]
            forecasts.append([loss_at(law, C) + rng.choice(residual) for C in targets])
        except BadInput:
            continue
    if len(forecasts) < draws / 2:
        return None, 1 - len(forecasts) / draws, None
    edges = np.quantile(forecasts, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [[float(a), float(b)] for a, b in edges.T], 1 - len(forecasts) / draws, np.array(forecasts)


def profile(C, L, targets, space, chosen, level=LEVEL):
    """Forecasts as a function of an assumed E, and which E the vertices allow (an F test on one parameter).

    The asymptote is most of what nobody knows about an extrapolation, so this stands beside every interval."""
    laws = [envelope(C, L, E, space) for E in np.union1d(np.arange(0, 0.95 * min(L), 0.025), [chosen])]
    least, spare = min(law["ssr"] for law in laws), len(L) - 3
    limit = least * (1 + student.ppf((1 + level) / 2, spare)**2 / spare) if spare > 0 else math.inf
    return [dict(E=law["E"], A=law["A"], alpha=law["alpha"], ssr=law["ssr"], allowed=bool(law["ssr"] <= limit),
                 losses=[loss_at(law, C) for C in targets]) for law in laws]


def backtest(runs, choices, truth):
    """Fit the first k budgets only, forecast the vertices (`truth`) of the rest: rows of dict(k, E, errors in %)."""
    budgets, rows = sorted(by_budget(runs)), []
    for k in range(3 if choices.asymptote is not None else 4, len(budgets)):
        try:
            law = fit_law([r for r in runs if r.budget <= budgets[k - 1]], choices)["law"]
        except BadInput:
            continue
        errors = [100 * (v["loss"] / loss_at(law, v["budget"]) - 1) for v in truth if v["budget"] > budgets[k - 1]]
        rows.append(dict(budgets=k, E=law["E"], errors_percent=errors))
    return rows


def bending(rows, vertices, law):
    """Does the ladder bend away from one power law? Three signs and a verdict; none is proof with seven budgets."""
    several = [row["errors_percent"] for row in rows if len(row["errors_percent"]) > 1]
    one_sign = bool(several) and len({np.sign(e) for errors in several for e in errors}) == 1
    growing = one_sign and all(np.all(np.diff(np.abs(errors)) > 0) for errors in several)
    drift = np.diff([row["E"] for row in rows])
    c, y = np.log([v["budget"] for v in vertices]), np.log([v["loss"] - law["E"] for v in vertices])
    p = math.nan
    if len(c) > 3:
        c = (c - c.mean()) / c.std()
        weights, covariance = np.polyfit(c, y, 2, cov=True)
        p = float(2 * student.sf(abs(weights[0]) / math.sqrt(max(covariance[0, 0], 1e-300)), len(c) - 3))
    signs = dict(same_sign=one_sign, growing=bool(growing), E_drifts_one_way=bool(len(drift) > 1 and
                 (np.all(drift > 0) or np.all(drift < 0))), quadratic_p=p)
    bends = growing or (one_sign and signs["E_drifts_one_way"]) or p < 0.05
    return signs | {"verdict": "bending suspected" if bends else "no sign of bending" if several
                    else "too few budgets to tell"}


# ---------------------------------------------------------------------------------------------------- forecast

def analyse(runs, choices, targets=(), unit="nats", source="runs", draws=400):
    """Everything `fit` reports, as one JSON-ready dict (keys starting with _ are for the pictures).

    Raises BadInput for anything a user can mend. Without targets the held-out budgets are forecast."""
    runs = in_unit(checked(runs, source), unit, source)
    held = [r for r in runs if r.kind == "held_out"]
    ladder = windowed([r for r in runs if r.kind == "isoflop"], choices)
    fit = fit_law(ladder, choices)
    law, vertices = fit["law"], fit["vertices"]
    C, L = [v["budget"] for v in vertices], [v["loss"] for v in vertices]
    targets = list(targets) or sorted({r.budget for r in held}) or [10 * max(C)]
    boot, failed, _ = run_bootstrap(ladder, fit, choices, targets, draws)
    is_surface = choices.method == "surface"
    N_star, D_star = (power_law(C, [v[key] for v in vertices]) for key in ("params", "tokens"))
    curve = [] if is_surface else profile(C, L, targets, choices.space, law["E"])
    k = [r.flops / (r.params * r.tokens) for r in ladder if math.isfinite(r.params * r.tokens)]
    widths = {r.bytes_per_token for r in ladder if r.bytes_per_token}
    bytes_per_token = widths.pop() if len(widths) == 1 else None
    forecasts = []
    for i, target in enumerate(targets):
        allowed = [row["losses"][i] for row in curve if row["allowed"]]
        N, D = (law["coefficient"] * target**law["exponent"] if law else None for law in (N_star, D_star))
        point = loss_at(law, target)
        forecasts.append(dict(
            C=target, loss=point, params=N, tokens=D, tokens_per_param=D / N if N and D else None,
            bytes_per_param=D / N * bytes_per_token if N and D and bytes_per_token else None,
            intervals=dict(run_bootstrap=boot[i] if boot else None,
                           delta_t=None if is_surface else delta_interval(law, C, L, target),
                           asymptote_profile=[min(allowed), max(allowed)] if allowed else None),
            outcomes=[dict(loss=r.loss, seed=r.seed, params=r.params, tokens=r.tokens,
                           error_percent=100 * (r.loss / point - 1)) for r in held if abs(r.flops / target - 1) < 0.02]))
    left_out = []
    for dropped in C:
        try:
            one = fit_law([r for r in ladder if r.budget != dropped], choices, fit["start"])["law"]
            left_out.append(dict(dropped=dropped, E=one["E"], losses=[loss_at(one, target) for target in targets]))
        except BadInput:
            continue
    truth = fit_law(ladder, replace(choices, method="parabola"))["vertices"] if is_surface else vertices
    rows = backtest(ladder, choices, truth)
    flags = [f"budget {v['budget']:.3g}: {flag}" for v in vertices for flag in v["flags"]]
    flags += [f"{100 * failed:.0f} % of the bootstrap refits failed"] * (failed > 0.01)
    if choices.method == "parabola":
        flags.append("parabola: vertices are biased wherever the bowl is asymmetric or off-centre (see: bias)")
    if law.get("free") and not 0.005 < law["E"] / (0.95 * min(L)) < 0.995:
        flags.append("E at the edge of its grid: the ladder does not determine it; fix it with --asymptote")
    allowed = [row["E"] for row in curve if row["allowed"]]
    if allowed and law["E"] not in allowed:
        flags.append(f"the vertices disagree with E = {law['E']:g}: they allow {min(allowed):.2f} to {max(allowed):.2f}")
    later = [r.loss for r in held] or [min(r.loss for r in ladder)]
    if law["E"] > 0.98 * min(later):
        flags.append(f"E = {law['E']:.4f} lies {'above' if law['E'] > min(later) else 'at'} the best loss later reached, "
                     f"{min(later):.4f}: this fit must not forecast")
    if is_surface:
        error = lambda rows: np.mean([abs(e) for row in rows for e in row["errors_percent"]] or [math.nan])
        mine, theirs = error(rows), error(backtest(ladder, replace(choices, method="parabola"), truth))
        if mine > theirs:
            flags.append(f"expanding-window backtest worse than the bowls' ({mine:.2f} against {theirs:.2f} %)")
        flags += law["status"]
    return dict(
        source=source, choices=asdict(choices), unit=unit, convention=CONVENTION, runs=len(ladder),
        excluded=sum(r.kind == "excluded" for r in runs), k_range=[min(k), max(k)] if k else None, envelope=law,
        vertices=vertices, exponents=None if is_surface else fit["start"], N_star=N_star, D_star=D_star,
        bytes_per_token=bytes_per_token, eval=ladder[0].eval, forecasts=forecasts, profile=curve, leave_one_out=left_out,
        backtest=rows, bending=bending(rows, vertices, law), flags=flags,
        rms_residual=float(np.sqrt(np.mean((np.array([r.loss for r in ladder]) - fit["fitted"])**2))),
        table=[dict(C=r.flops, N=r.params, D=r.tokens, loss=r.loss, seed=r.seed, kind=r.kind) | r.extra for r in runs],
        _runs=ladder, _held=held)


def plain(value):
    """`value` with only JSON types: no numpy, no NaN (null instead), no keys that start with an underscore."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def report(r):
    """The printed page of an analysis."""
    choice, law, unit = r["choices"], r["envelope"], {"nats": "nats per token", "bpb": "bits per byte"}[r["unit"]]
    label = {"parabola": "parabola per budget (biased baseline)", "shared": "bowls with shared exponents",
             "cubic": "cubic per budget", "best": "lowest run per budget", "surface": "global surface"}[choice["method"]]
    print(f"{r['source']}: {r['runs']} runs in {len(r['vertices'])} budgets ({r['excluded']} excluded); {label} in "
          f"{choice['axis']}, loss in {unit}\n{CONVENTION}")
    if r["k_range"]:
        print("k = C/(N D) from {:.2f} to {:.2f}".format(*r["k_range"]))
    print("\n     C   runs         D*         N*  D*/N*     loss*  curvature")
    for v in r["vertices"]:
        print(f"{v['budget']:8.3g} {v['runs']:3d} {v['tokens']:12.4e} {v['params']:10.4e} {v['tokens'] / v['params']:6.1f}"
              f"  {v['loss']:8.5f} {v['curvature']:9.4f}  {'; '.join(v['flags'])}")
    if "beta" in law:
        print("\nL = {E:.4f} + {A:.5g} N^-{alpha:.4f} + {B:.5g} D^-{beta:.4f}".format(**law))
    else:
        print("\nL(C) = {E:.4f} + {A:.2f} C^-{alpha:.5f}".format(**law) + (", E free" if law["free"] else ", E given"))
    for name in ("N", "D"):
        if p := r[f"{name}_star"]:
            print("{}* = {:.4g} C^{:.4f}   exponent {:.0f} % interval {:.3f}..{:.3f}".format(
                name, p["coefficient"], p["exponent"], 100 * LEVEL, *p["exponent_interval"]))
    for i, f in enumerate(r["forecasts"]):
        ratio = "".join(f", {f[key]:.1f} {name} per parameter" for key, name in
                        (("tokens_per_param", "tokens"), ("bytes_per_param", "bytes")) if f[key])
        print(f"\nforecast at C = {f['C']:.4g}: {f['loss']:.4f}" + (f"   N* {f['params']:.3g}, D* {f['tokens']:.3g}{ratio}"
                                                                     if f["params"] and f["tokens"] else ""))
        for name, ends in f["intervals"].items():
            print(f"  {name:18s}" + ("{:.4f} .. {:.4f}".format(*ends) if ends else "none"))
        for o in f["outcomes"]:
            print(f"  came out at {o['loss']:.4f}: {o['error_percent']:+.2f} % from the forecast  {o['seed']}")
        if values := [row["losses"][i] for row in r["leave_one_out"]]:
            print(f"  leaving out one budget: {min(values):.4f} .. {max(values):.4f}")
    allowed = [row["E"] for row in r["profile"] if row["allowed"]] + [law["E"]]
    print("\nforecast against the asymptote that one assumes (* = the vertices allow it)")
    for row in r["profile"]:
        if min(allowed) - 0.2 < row["E"] < max(allowed) + 0.2 and abs((row["E"] + 0.05) % 0.1 - 0.05) < 1e-9:
            print(f"{'*' if row['allowed'] else ' '} E = {row['E']:.2f}   " + "  ".join(f"{y:.4f}" for y in row["losses"]))
    for row in r["backtest"]:
        print(f"backtest, first {row['budgets']} budgets: E = {row['E']:.3f}, later vertices off by "
              + " ".join(f"{e:+.2f}" for e in row["errors_percent"]) + " %")
    print(f"verdict: {r['bending']['verdict']} (quadratic term p = {r['bending']['quadratic_p']:.3f})")
    print("\n".join(f"flag: {flag}" for flag in r["flags"]))


# -------------------------------------------------------------------------------------------------------- bias

# [cited: Czech et al., table of loss surfaces] alpha, beta, A, B, E
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
    """An isoFLOP ladder: `points` sizes log-spaced within a factor `width` of a centre that may lie off the optimum."""
    alpha, beta, A, B, E = surface
    runs = []
    for i, C in enumerate(budgets):
        off = {"centred": 1, "offset 3x": 3, "drift to 3x": 3**(i / (len(budgets) - 1))}[sampling]   # in D, so N / off
        for N in true_optimum(surface, C)[0] / off * np.geomspace(1 / width, width, points):
            loss = E + A * N**-alpha + B * (C / 6 / N)**-beta + (rng.normal(0, noise) if noise else 0)
            runs.append(Run(float(C), float(N), float(C / 6 / N), float(loss), float(C), source="simulation"))
    return runs


def extrapolation_error(surface, width, sampling, method):
    """Error in % of D*(1e24) extrapolated from five noise-free budgets 1e17..1e21."""
    vertices = bowls(simulate(surface, width, sampling), Choices(method), inside=False)["vertices"]
    law = power_law(BIAS_BUDGETS, [v["tokens"] for v in vertices])
    return 100 * (law["coefficient"] * BIAS_TARGET**law["exponent"] / true_optimum(surface, BIAS_TARGET)[1] - 1)


def vertex_shift(alpha, beta, width, points=15):
    """Relative shift of N* in a centred parabola, in closed form: at every budget the bowl is, up to a factor and a
    constant, beta e^(-alpha w) + alpha e^(beta w) with w = ln N/N*; so the shift needs neither A, B, E nor C."""
    w = np.linspace(-math.log(width), math.log(width), points)
    a, b, _ = np.polyfit(w, beta * np.exp(-alpha * w) + alpha * np.exp(beta * w), 2)
    return math.exp(-b / (2 * a)) - 1


def bias(plot="out/bias.png"):
    """Print and draw what sampling does to a parabola and does not do to bowls with shared exponents."""
    print(f"Error of D*({BIAS_TARGET:g}) in %, noise-free ladder 1e17..1e21, 15 sizes per budget within a factor of the "
          f"centre (Czech et al.)\n{'':24s}" + "".join(f"{f'x{w}':>10s}" for w in WIDTHS) + "    shared bowls, worst")
    table = {}
    for name, surface_ in SURFACES.items():
        for sampling in SAMPLING:
            table[name, sampling] = [extrapolation_error(surface_, w, sampling, "parabola") for w in WIDTHS]
            worst = max(abs(extrapolation_error(surface_, w, sampling, "shared")) for w in WIDTHS)
            print(f"{name:11s}{sampling:13s}" + "".join(f"{e:+10.3f}" for e in table[name, sampling]) + f"{worst:14.1e}")
    print("\nshift of a centred parabola's N* in %, closed form (the same at every C)")
    for name, (alpha, beta, *_) in SURFACES.items():
        print(f"{name:24s}" + "".join(f"{100 * vertex_shift(alpha, beta, w):+10.2f}" for w in WIDTHS))
    for name, truth in SURFACES.items():
        law = surface(simulate(truth, 8, "drift to 3x"))[0]
        worst = max(abs(law[key] / value - 1) for key, value in zip(("alpha", "beta", "A", "B", "E"), truth))
        print(f"VPNLS recovers the {name} surface to {worst:.0e} of its value")
    draw_bias(table, plot)


# ------------------------------------------------------------------------------------------------ registration

def fingerprint(sources):
    """sha256 over the files behind a fit: tables (in a file, or typed above) or train.py run directories."""
    digest = hashlib.sha256()
    for source in sources:
        if source in TABLES:
            digest.update(repr(reference(source)).encode())
            continue
        inside = [Path(source) / name for name in ("config.json", "result.json")] if Path(source).is_dir() else [Path(source)]
        digest.update(b"".join(path.read_bytes() for path in inside))
    return digest.hexdigest()


def own_hash():
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def git(*words):
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "none"


def seal(record):
    return hashlib.sha256(json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True).encode()).hexdigest()


def register(result, sources, target, eval_definition, failure, differences, out):
    """Write the forecast for `target` (dict C, N, D, config) to the new file `out`; BadInput if it exists."""
    forecast = next(f for f in result["forecasts"] if f["C"] == target["C"])
    record = plain(dict(
        forecast=forecast | {"outcomes": []}, target=target, unit=result["unit"], eval=eval_definition,
        bytes_per_token=result["bytes_per_token"], failure=failure, known_differences=differences,
        form="L(C) = E + A C^-alpha" if result["choices"]["method"] != "surface" else "E + A N^-alpha + B D^-beta",
        asymptote_policy="fixed" if result["choices"]["asymptote"] is not None else "free", choices=result["choices"],
        envelope=result["envelope"], flags=result["flags"], flops_convention=CONVENTION, runs=sources,
        runs_sha256=fingerprint(sources), scaling_sha256=own_hash(), commit=git("rev-parse", "HEAD"),
        uncommitted=git("status", "--porcelain") not in ("", "none"), date=datetime.now(timezone.utc).isoformat(),
        versions=dict(python=platform.python_version(), numpy=np.__version__, scipy=scipy.__version__)))
    record["sha256"] = seal(record)
    write_new(out, json.dumps(record, indent=1) + "\n")
    print(f"registered {out}: {forecast['loss']:.4f} at C = {target['C']:.4g}, sha256 {record['sha256'][:16]}; "
          "commit it before the run's first step")


def score(path, loss=None, run=None):
    """Compare an outcome with the record at `path`, append it to NAME.outcomes.jsonl, return it.

    BadInput if the record, the runs file or this file changed, or if the run is not the one that was forecast."""
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
    if run is not None:
        if abs(run.flops / record["target"]["C"] - 1) > 0.02:
            raise BadInput(run.source, f"C = {record['target']['C']:.4g} within 2 %", f"{run.flops:.4g}",
                           "score the run that was forecast")
        if run.eval.strip('"') != record["eval"]:
            raise BadInput(run.source, f"eval {record['eval']}", run.eval, "evaluate the run as registered")
        known = record["bytes_per_token"]
        if record["unit"] == "nats" and known and abs(run.bytes_per_token / known - 1) > 1e-3:
            raise BadInput(run.source, f"{known:.4f} bytes per token", f"{run.bytes_per_token:.4f}",
                           "register in --unit bpb: nats per token do not compare across tokenizers")
        loss = run.loss if record["unit"] == "nats" else run.loss / math.log(2) / run.bytes_per_token
    forecast = record["forecast"]
    outcome = dict(record=record["sha256"], date=datetime.now(timezone.utc).isoformat(), loss=loss,
                   run=run.source if run else None, error_percent=100 * (loss / forecast["loss"] - 1),
                   inside={name: ends[0] <= loss <= ends[1] for name, ends in forecast["intervals"].items() if ends})
    with Path(path).with_suffix(".outcomes.jsonl").open("a") as file:
        file.write(json.dumps(outcome) + "\n")
    print(f"forecast {forecast['loss']:.4f}, came {loss:.4f}: {outcome['error_percent']:+.2f} %")
    for name, inside in outcome["inside"].items():
        print("  {} {} {:.4f} .. {:.4f}".format("inside " if inside else "OUTSIDE", name, *forecast["intervals"][name]))
    return outcome


def write_new(path, text):
    """Write `text` to a path that must not exist yet."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        raise BadInput(path, "a new file", "one that exists", "choose another name") from None


# ---------------------------------------------------------------------------------------------------- planning

CARRIED = dict(vocab_size=257, seq_len=4096, gated_norm_rank=128, half_rope=False, partial_key_offset=False,
               combine_sum=0.0, router_z=1e-3, logit_z=1e-4, compute_dtype="float32", remat="block",
               mixture=(("books", 1.0),), tokenizer="bytes", accumulate=1, seed=0, recipe="v1", optimizer="adamh",
               schedule="linear", warmup=0.1, clip=1.0, min_lr_ratio=0.0)      # [cited: the V1 recipe, #4697], sizes small


def learning_rates(recipe, tokens, batch_tokens, hidden_dim):
    """dict(adam_lr, hyper_lr, beta1, beta2, eps) by heuristic "v1" [cited: #4225] or "v2" [cited: #5951].

    hyper_lr is the relative step of AdamH or MuonH. Batches are in tokens: V1's 32 sequences are 32 x 4096."""
    if recipe == "v1":
        adam = 1.63 * tokens**-0.2813 * hidden_dim**-0.3678 * math.sqrt(batch_tokens / 4096)
        adam, hyper = min(0.05, adam), min(0.05, 13 / 3 * adam)
        eps = 1e-15 * math.sqrt(32 * 4096 * tokens / (batch_tokens * 1.4e9))
    else:
        adam = 0.06602 * tokens**-0.395 * hidden_dim**-0.150 * math.sqrt(batch_tokens)
        hyper, eps = 13 / 3 * adam, 9.676e-18 * math.sqrt(tokens / batch_tokens)
    return dict(adam_lr=adam, hyper_lr=hyper, beta1=0.9062, eps=eps,
                beta2=min(0.9999, max(0.95, 0.999**(batch_tokens / 131_072))))


def optimal_tokens(C, dense=False, fit=None):
    """D*(C): from a `fit --json` of one's own, else the law that chose the 129B shape, tied exponents [cited: #4447],
    or Delphi's [cited: #1337]. Far below 1e18 the published laws are extrapolated: [assumed]."""
    if fit:
        return fit["D_star"]["coefficient"] * C**fit["D_star"]["exponent"]
    return 0.0267196 * C**0.5800830 if dense else 3.290 * math.sqrt(C)


def plan(C, hidden_dim=None, tokens=None, base=(), batch=None, fit=None):
    """Config keys of one run of C FLOPs: the width whose tokens C/flops_per_token come nearest D*(C), unless given.

    base is a dict of config keys to carry over. Batch: a power of two, at least 32 rows, so that steps stay near 2^14
    [cited: #4447]. Raises BadInput for a budget that no width fits."""
    base = CARRIED | dict(base)
    unit, experts = base.get("head_dim", 128), base.get("num_experts", 64)
    kept = {k: base[k] for k in ("seq_len", "gated_norm_rank", "experts_per_token") if k in base}
    sizes_of = lambda d: shape(d, experts, unit) | kept
    cost = lambda d: flops_per_token(sizes_of(d), base["vocab_size"])
    wanted = tokens or optimal_tokens(C, experts == 0, fit)
    widths = [hidden_dim] if hidden_dim else range(unit, 129 * unit, unit)
    width = min(widths, key=lambda d: abs(math.log(C / cost(d) / wanted)))
    D = C / cost(width)
    batch = batch or max(32, 2**math.ceil(math.log2(max(1.0, D / (2**14 * base["seq_len"])))))
    steps = round(D / (batch * base["seq_len"]))
    if steps < 10:
        raise BadInput(f"C = {C:.3g}", "at least 10 steps", f"{steps} of {batch} x {base['seq_len']} tokens at width {width}",
                       "raise the budget, or lower seq_len, head_dim or the batch")
    derived = sizes_of(width) | dict(window=base["seq_len"] // 2, steps=steps, batch_size=batch)
    return {key: value for key, value in base.items() if key not in derived} | derived


def config_text(keys, C, command):
    """A config file for train.py: plain assignments, each number with where it comes from."""
    counts = param_counts(keys, keys["vocab_size"])
    D = keys["steps"] * keys["batch_size"] * keys["seq_len"]
    rates = learning_rates(keys["recipe"], D, keys["batch_size"] * keys["seq_len"], keys["hidden_dim"])
    carried = CARRIED.keys() | {"num_experts", "experts_per_token", "head_dim"}
    lines = [f'"""{counts["total"]:,} parameters, {counts["active"]:,} active; {D:,} tokens.   {command}', "",
             f"C = {flops_per_token(keys, keys['vocab_size']) * D:.4g} training FLOPs, planned {C:.4g}. train.py will derive "
             + " ".join(f"{k}={v:.6g}" for k, v in rates.items()) + '."""']
    return "\n".join(lines + [f"{key} = {value!r}".ljust(40) + ("  # [carried over]" if key in carried else
                              "  # [assumed: name]" if key == "run_dir" else "  # [derived: scaling.py plan]")
                              for key, value in keys.items()]) + "\n"


def read_config(path):
    """The plain assignments of a config file, with what it inherits by `from configs.X import *`."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        keys = runpy.run_path(str(path))
    except Exception as error:                              # a config is the user's own code: anything may go wrong
        raise BadInput(path, "a config of plain assignments", f"{type(error).__name__}: {error}", "mend it") from None
    finally:
        sys.path.pop(0)
    return {k: v for k, v in keys.items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}


def ladder(budgets, out, base, per_budget=7, span=4.0, fit=None):
    """Write an isoFLOP grid of configs to the folder `out`: at each budget, widths whose tokens lie evenly (in log)
    within a factor `span` of D*. Existing identical configs are kept, differing ones refused. Returns the paths."""
    texts = {}
    for C in budgets:
        best = optimal_tokens(C, (CARRIED | base).get("num_experts", 64) == 0, fit)
        grid = {}
        for factor in np.geomspace(1 / span, span, per_budget):
            keys = plan(C, tokens=best * factor, base=base, fit=fit)
            grid[keys["hidden_dim"]] = keys
        offs = [math.log(k["steps"] * k["batch_size"] * k["seq_len"] / best) for k in grid.values()]
        if len(grid) < 4 or min(offs) > -0.2 or max(offs) < 0.2:
            raise BadInput(f"budget {C:.3g}", "at least 4 widths on both sides of the optimum", f"widths {sorted(grid)}",
                           "lower head_dim in the --config (widths are multiples of it), or raise the budget")
        centre = math.exp(np.mean(offs))
        print(f"C = {C:.3g}: widths {sorted(grid)}, tokens {math.exp(min(offs)):.2f}..{math.exp(max(offs)):.2f} of D*, "
              f"centre {centre:.2f}" + ("  (off-centre: a parabola would be biased)" if abs(math.log(centre)) > 0.35 else ""))
        for width, keys in grid.items():
            name = f"c{C:.2g}_d{width}".replace("+", "")
            texts[Path(out) / f"{name}.py"] = config_text(keys | {"run_dir": f"runs/{Path(out).name}/{name}"}, C,
                                                          f"python train.py {Path(out) / name}.py")
    for path, text in texts.items():
        if path.exists() and path.read_text() != text:
            raise BadInput(path, "the config that this command writes, or none", "a different one", "choose another --out")
    for path, text in texts.items():
        if not path.exists():
            write_new(path, text)
    print(f"{len(texts)} configs in {out}; run what is not yet done:  python scaling.py ladder --run {out}")
    return list(texts)


def run_ladder(folder):
    """Train every config of a folder that has no result.json yet, one after the other; stop at the first failure."""
    configs = [(path, Path(read_config(path).get("run_dir", ""))) for path in sorted(Path(folder).glob("*.py"))]
    if not configs:
        raise BadInput(folder, "a folder of configs", "none", "write it with: scaling.py ladder --budgets ... --out DIR")
    for i, (path, run_dir) in enumerate(configs, 1):
        done = (run_dir / "result.json").is_file()
        print(f"[{i}/{len(configs)}] {path} {'done' if done else ''}", flush=True)
        if not done and subprocess.run([sys.executable, str(Path(__file__).parent / "train.py"), str(path)]).returncode:
            raise BadInput(path, "train.py to finish", "a failure", "mend it and give this command again")


# ---------------------------------------------------------------------------------------------------- speed-up

def speedup(base, variant, E, alpha, noise=0.0, level=0.90):
    """How many times less compute the variant needs for the same loss, and the same in wall-clock time.

    base, variant: lists of (C, loss, tokens per second or nan). Each point fixes A = (loss - E) C^alpha; the compute
    speed-up is the ratio of the geometric means to the power 1/alpha, whatever C they were measured at. The interval
    is Student-t from the scatter of log A about its mean, or from a known seed noise in loss; None if neither."""
    for C, loss, _ in base + variant:
        if loss <= E:
            raise BadInput("--asymptote", f"E below every loss (lowest {min(p[1] for p in base + variant)})", E, "lower it")
    logs = [np.array([math.log((L - E) * C**alpha) for C, L, _ in points]) for points in (base, variant)]
    shift = (logs[0].mean() - logs[1].mean()) / alpha
    tps = [np.mean(np.log([p[2] for p in points])) for points in (base, variant)]       # nan if any is not known
    freedom = len(base) + len(variant) - 2
    if noise:
        sd = math.sqrt(sum((noise / (L - E))**2 / len(points)**2 for points in (base, variant) for _, L, _ in points))
        half = norm.ppf((1 + level) / 2) * sd / alpha
    elif freedom > 0:
        sd = math.sqrt(sum(np.sum((y - y.mean())**2) for y in logs) / freedom * (1 / len(base) + 1 / len(variant)))
        half = student.ppf((1 + level) / 2, freedom) * sd / alpha
    else:
        half = math.nan
    wall = math.exp(shift + tps[1] - tps[0]) if np.all(np.isfinite(tps)) else None
    interval = [math.exp(shift - half), math.exp(shift + half)] if math.isfinite(half) else None
    return dict(compute=math.exp(shift), interval=interval, level=level, wall_clock=wall,
                wall_clock_interval=[wall * end / math.exp(shift) for end in interval] if wall and interval else None)


# ---------------------------------------------------------------------------------------------------- pictures

BLUE, RED, GREY = "#1f5fa8", "#d62728", "0.45"          # fitted, came later, context


def figure(columns, path, draw, width=4.6):
    """Draw on a row of axes with draw(axes) and save to path (the ending chooses the format)."""
    import matplotlib                                   # only here: fitting needs no pictures
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        fig, axes = plt.subplots(1, columns, figsize=(width * columns, 3.6), layout="constrained", squeeze=False)
        draw(axes[0])
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(path, dpi=200)
        except ValueError as error:
            raise BadInput(path, "a picture ending such as .png or .pdf", error, "rename it") from None
        finally:
            plt.close(fig)
    print(f"saved {path}")


def draw_fit(r, path):
    """Three panels: the bowls, the envelope, and the distance from it with bands; in red what came later."""
    law, runs, vertices, axis = r["envelope"], r["_runs"], r["vertices"], r["choices"]["axis"]
    C, L = (np.array([v[key] for v in vertices]) for key in ("budget", "loss"))
    later = np.array([(q.flops, q.loss) for q in r["_held"]]).reshape(-1, 2)
    grid = np.geomspace(C.min() / 1.5, 1.5 * max([f["C"] for f in r["forecasts"]] + [C.max()]), 80)
    loss_label = f"macro loss ({'nats per token' if r['unit'] == 'nats' else 'bits per byte'})"

    def draw(axes):
        bowl, whole, zoom = axes
        colours = __import__("matplotlib").colormaps["viridis"](np.linspace(0.05, 0.85, len(vertices)))
        for v, colour in zip(vertices, colours):
            here = [q for q in runs if q.budget == v["budget"]]
            x = np.array([getattr(q, axis) for q in here])
            bowl.plot(x, [q.loss for q in here], "o", ms=3, color=colour, label=f"{v['budget']:.2g}")
            bowl.plot(v[axis], v["loss"], "*", ms=9, color=colour, mec="k", mew=0.5)
            if v["_curve"]:
                z = np.linspace(np.log10(x.min()), np.log10(x.max()), 100)
                bowl.plot(10**z, v["_curve"](z), lw=1, color=colour)
        bowl.set(ylabel=loss_label, title="isoFLOP bowls (stars: vertices)",
                 xlabel="training tokens $D$" if axis == "tokens" else "active parameters $N$")
        bowl.legend(title="budget $C$ (FLOPs)", fontsize=7, title_fontsize=7)
        whole.plot(grid, [loss_at(law, c) for c in grid], color=BLUE, lw=1.3, label="fitted surface" if "beta" in law else
                   f"$L = {law['E']:.3f} + {law['A']:.4g}\\,C^{{-{law['alpha']:.4f}}}$")
        whole.set(ylabel=loss_label, title="compute-optimal loss")
        zoom.axhline(0, color=BLUE, lw=1.3)
        bands = [delta_interval(law, C, L, c) if "beta" not in law else None for c in grid]
        if all(bands):
            low, high = (np.array(edge) / [loss_at(law, c) for c in grid] * 100 - 100 for edge in np.transpose(bands))
            zoom.fill_between(grid, low, high, color=BLUE, alpha=0.15, lw=0, label="95 % delta/Student-t, new run")
        for f in r["forecasts"]:
            if ends := f["intervals"]["run_bootstrap"]:
                zoom.errorbar(f["C"], 0, np.abs(np.array([ends]).T / f["loss"] - 1) * 100, fmt="s", ms=4, mfc="w", color=BLUE,
                              capsize=3, label="forecast, 95 % run bootstrap" if f is r["forecasts"][0] else None)
        for ax, distance in ((whole, lambda c, y: y), (zoom, lambda c, y: 100 * (y / [loss_at(law, q) for q in c] - 1))):
            ax.plot(C, distance(C, L), "o", ms=4, color=BLUE, label="vertices (fitted)")
            if len(later):
                ax.plot(later[:, 0], distance(*later.T), "*", ms=9, color=RED, label="came later (not fitted)", zorder=5)
            ax.set(xlabel="training compute $C$ (FLOPs)")
            ax.legend(fontsize=7)
        zoom.set(ylabel="distance from the forecast (%)", title="the same, as an error")
        for ax in axes:
            ax.set_xscale("log")
    figure(3, path, draw, 3.9)


def draw_profile(r, path, i=-1):
    """The forecast as a function of the assumed E, with the E that the vertices allow and the outcome."""
    f, law = r["forecasts"][i], r["envelope"]
    allowed = [row["E"] for row in r["profile"] if row["allowed"]]
    rows = [row for row in r["profile"] if min(allowed + [law["E"]]) - 0.3 < row["E"] < max(allowed + [law["E"]]) + 0.4]

    def draw(axes):
        ax, E = axes[0], [row["E"] for row in rows]
        ax.plot(E, [row["losses"][i] for row in rows], color=BLUE, label="forecast given $E$")
        if allowed:
            ax.axvspan(min(allowed), max(allowed), color=BLUE, alpha=0.12, lw=0, label="$E$ allowed by the vertices (95 %, F)")
        ax.plot(law["E"], f["loss"], "s", color=BLUE, mfc="w",
                label=f"{'free' if law['free'] else 'fixed'} $E$ = {law['E']:.3f}: {f['loss']:.4f}")
        for o in f["outcomes"][:1]:
            ax.axhline(o["loss"], color=RED, lw=1.2, label=f"came out at {o['loss']:.4f}")
        ax.set(xlabel="assumed asymptote $E$ (nats per token)", ylabel=f"loss at $C$ = {f['C']:.2g} FLOPs (nats per token)",
               title="what the asymptote decides")
        ax.legend(fontsize=7)
    figure(1, path, draw)


def draw_bias(table, path):
    """Error of the extrapolated D* against the width of the sampled bowl, one panel per kind of sampling."""
    def draw(axes):
        for ax, sampling in zip(axes, SAMPLING):
            for name, colour, marker in zip(SURFACES, (GREY, BLUE, RED), "^os"):
                ax.plot(WIDTHS, table[name, sampling], marker + "-", ms=4, lw=1.2, color=colour, label=f"parabola, {name}")
            ax.axhline(0, color="k", lw=1, ls="--", label="shared bowls (all, < $10^{-6}$ %)")
            ax.set(xscale="log", ylim=(-27, 38), xlabel="sampled within a factor of the centre", title=sampling)
            ax.set_xticks(WIDTHS, [f"{w}x" for w in WIDTHS])
            ax.minorticks_off()
        axes[0].set_ylabel("error of $D^*$ at $10^{24}$ FLOPs (%)")
        axes[0].legend(fontsize=7)
    figure(3, path, draw, 3.3)


# ------------------------------------------------------------------------------------------------ command line

TABLES = ("moe_v16", "may", "delphi", "june")


def story():
    """The demonstration: Marin's posted forecast, how far the asymptote moved it, and the bias of the usual bowl."""
    print("1. Marin's 129B MoE. Ladder 1e18..3e20, parabolas in active parameters, E fixed at 1.6 (#4447).\n")
    choices = Choices("parabola", "params", asymptote=1.6)
    posted = analyse(reference("moe_v16"), choices, source="moe_v16")
    report(posted)
    draw_fit(posted, "out/forecast.png")
    print("\n2. The same vertices under other assumptions, at C = 1e23 (2.2333 came)")
    for label, other in (("E fixed at 1.6, as posted", choices), ("E free", replace(choices, asymptote=None)),
                         ("E free, shared bowls", Choices("shared", "params")), ("E free, lowest runs", Choices("best"))):
        law = fit_law([r for r in checked(reference("moe_v16"), "") if r.kind == "isoflop"], other)["law"]
        print(f"   {label:27s} E = {law['E']:.4f}   {loss_at(law, 1e23):.4f}   ({100 * (HERO[2] / loss_at(law, 1e23) - 1):+.2f} %)")
    draw_profile(posted, "out/profile.png")
    print("\n3. Why the usual bowl is biased.\n")
    bias("out/bias.png")


def point(text, E, alpha):
    """One speed-up point: C,LOSS or C,LOSS,TOKENS_PER_SECOND, or A=VALUE for a whole law with the same E and alpha."""
    try:
        if text.startswith("A="):
            return 1.0, E + float(text[2:]), math.nan
        C, loss, *tps = map(float, text.split(","))
        if min(C, loss, *tps) > 0 and max(C, loss, *tps) < 1e40 and len(tps) < 2:
            return C, loss, *(tps or [math.nan])
    except ValueError:
        pass
    raise BadInput("speedup", "C,LOSS or C,LOSS,TOKENS_PER_SECOND or A=VALUE", text, "write e.g. 3.82e17,3.5422,433986")


class Parser(argparse.ArgumentParser):
    def error(self, message):                           # one line, like every other complaint
        raise BadInput("command line", "the options of --help", message, f"see: python scaling.py {self.prog.split()[-1]} --help")


def positive(text):
    return number(text, "command line", "the value", 0)


def whole(text):
    return int(number(text, "command line", "the value", 0.99, 1e9))


def parser():
    top = Parser(prog="scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", parser_class=Parser)
    for name, what in (("fit", "fit a ladder and forecast"), ("register", "fit, and lock one forecast in a file")):
        p = commands.add_parser(name, help=what)
        p.add_argument("table", nargs="?", help=f"a CSV, or a public table: {', '.join(TABLES)}")
        p.add_argument("--runs", nargs="+", metavar="DIR", help="finished run directories of train.py, instead of a table")
        p.add_argument("--x", dest="axis", choices=("tokens", "params"), default="tokens")
        p.add_argument("--method", choices=("shared", "parabola", "cubic", "surface", "best"), default="shared")
        p.add_argument("--window", type=positive, help="only runs within this factor of the vertex")
        p.add_argument("--asymptote", default="free", help="E: free or a value")
        p.add_argument("--fit-space", dest="space", choices=("log", "linear"), default="log")
        p.add_argument("--unit", choices=("nats", "bpb"), default="nats")
        p.add_argument("--loss-column", default="loss")
        p.add_argument("--draws", type=whole, default=400, help="bootstrap refits")
    p.add_argument("--target", type=positive, required=True, metavar="C")
    p.add_argument("--target-params", type=positive, metavar="N")
    p.add_argument("--target-tokens", type=positive, metavar="D")
    p.add_argument("--target-config", help="the config file that will be run; its text is stored")
    p.add_argument("--eval", help="eval definition; by default the runs' own")
    p.add_argument("--failure", default="outside the run-bootstrap interval", help="what will count as a miss")
    p.add_argument("--difference", action="append", default=[], help="known difference from the ladder; repeatable")
    p.add_argument("--out", required=True, help="prereg/NAME.json")
    p = commands.choices["fit"]
    p.add_argument("--predict", type=positive, action="append", default=[], metavar="C")
    p.add_argument("--json", metavar="FILE|-")
    p.add_argument("--plot", metavar="FILE")
    p = commands.add_parser("bias", help="recompute and draw the bias study")
    p.add_argument("--plot", default="out/bias.png")
    p = commands.add_parser("score", help="compare an outcome with a registration")
    p.add_argument("record")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--loss", type=positive)
    which.add_argument("--run", metavar="DIR")
    p = commands.add_parser("plan", help="the compute-optimal config of a budget")
    p.add_argument("--flops", type=positive, required=True, metavar="C")
    p.add_argument("--hidden", type=whole, help="width, instead of the optimum")
    p.add_argument("--batch", type=whole, help="sequences, instead of the rule")
    p.add_argument("--out", help="the config file to write")
    q = commands.add_parser("ladder", help="write, or run, an isoFLOP grid of configs")
    q.add_argument("--budgets", type=positive, nargs="+", metavar="C")
    q.add_argument("--per-budget", type=whole, default=7)
    q.add_argument("--out", help="folder for the configs")
    q.add_argument("--run", metavar="DIR", help="train what is not yet done in this folder")
    for p in (p, q):
        p.add_argument("--config", help="config file to carry data, tokenizer, experts, head_dim and seq_len over from")
        p.add_argument("--law", metavar="FIT.json", help="D* from a `fit --json` of your own instead of the published law")
    p = commands.add_parser("speedup", help="learning speed-up of a variant at equal loss")
    p.add_argument("--base", nargs="+", required=True, help="C,LOSS[,TOKENS_PER_SECOND] ... or A=VALUE")
    p.add_argument("--variant", nargs="+", required=True)
    p.add_argument("--asymptote", type=float, required=True, help="E of the eval named by --eval")
    p.add_argument("--alpha", type=positive, required=True)
    p.add_argument("--eval", required=True, help="which eval E, alpha and the losses belong to")
    p.add_argument("--noise", type=float, default=0.0, help="standard deviation of the loss between seeds")
    return top


def run(words):
    """One command. Raises BadInput."""
    a = parser().parse_args(words)
    if a.command is None:
        story()
    elif a.command in ("fit", "register"):
        if bool(a.table) == bool(a.runs):
            raise BadInput("command line", "a table or --runs DIR ...", "both" if a.table else "neither", "give one of them")
        source = a.table or " ".join(a.runs)
        runs = [read_run_dir(d) for d in a.runs] if a.runs else reference(a.table) if a.table in TABLES else \
            read_csv(a.table, a.loss_column)
        E = None if a.asymptote == "free" else number(a.asymptote, "--asymptote", "E", -1e-12, 100)
        targets = a.predict if a.command == "fit" else [a.target]
        result = analyse(runs, Choices(a.method, a.axis, a.window, E, a.space), targets, a.unit, source, a.draws)
        if a.command == "register":
            if not (definition := a.eval or result["eval"].strip('"')):
                raise BadInput("--eval", "the eval definition (set, seq_len, sequences)", "none", "say what will be measured")
            f = result["forecasts"][0]
            register(result, a.runs or [a.table], dict(C=a.target, N=a.target_params or f["params"], D=a.target_tokens or f["tokens"],
                                  config=Path(a.target_config).read_text() if a.target_config else None),
                     definition, a.failure, a.difference, a.out)
            return
        if a.json != "-":
            report(result)
        if a.plot:
            draw_fit(result, a.plot)
        if a.json:
            text = json.dumps(plain(result), indent=1, allow_nan=False)
            print(text) if a.json == "-" else Path(a.json).write_text(text + "\n")
    elif a.command == "bias":
        bias(a.plot)
    elif a.command == "score":
        score(a.record, a.loss, read_run_dir(a.run) if a.run else None)
    elif a.command in ("plan", "ladder"):
        base = read_config(a.config) if a.config else {}
        fit = read_json(a.law) if a.law else None
        if fit and not isinstance(fit.get("D_star"), dict):
            raise BadInput(a.law, "the output of fit --json with a D_star law", "none", "write it with: fit ... --json FILE")
        if a.command == "plan":
            keys = plan(a.flops, a.hidden, None, base, a.batch, fit)
            name = a.out or f"configs/plan_{a.flops:.2g}.py".replace("+", "")
            text = config_text(keys | {"run_dir": f"runs/{Path(name).stem}"}, a.flops, f"python train.py {name}")
            write_new(name, text)
            print(text + f"written to {name}")
        elif a.run:
            run_ladder(a.run)
        elif a.budgets and a.out:
            ladder(a.budgets, a.out, base, a.per_budget, fit=fit)
        else:
            raise BadInput("ladder", "--budgets C ... --out DIR, or --run DIR", "neither", "give one")
    else:
        r = speedup(*([point(text, a.asymptote, a.alpha) for text in points] for points in (a.base, a.variant)),
                    a.asymptote, a.alpha, a.noise)
        ends = lambda pair: "{:.3f}..{:.3f}".format(*pair) if pair else "none (one point each: give --noise or more points)"
        print(f"E = {a.asymptote} and alpha = {a.alpha} for eval {a.eval}\ncompute speed-up    {r['compute']:.4f}   90 % "
              f"interval {ends(r['interval'])}")
        if r["wall_clock"]:
            print(f"wall-clock speed-up {r['wall_clock']:.4f}   90 % interval {ends(r['wall_clock_interval'])}")


def main(words):
    """Exit status of one command: 0, or 2 with one line on stderr for whatever the user can mend."""
    try:
        run(words)
    except BadInput as error:
        print(f"scaling.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"scaling.py: {error.filename}: expected a path to read or write, found {error.strerror}; do check the path",
              file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
