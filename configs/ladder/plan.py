"""Plan runs, one or a whole isoFLOP grid, and train the grid.

    python scaling.py plan --flops 1e15 --config configs/smoke.py             the compute-optimal run of a budget
    python scaling.py ladder --budgets 3e13 1e14 3e14 --config configs/smoke.py --out ladder.csv
    python scaling.py ladder --run ladder.csv --jobs 2                        trains what is not yet done

A ladder is a table, one row a run: `python train.py BASE OVERRIDES` trains it, and its results fill the
rest of the row. `scaling.py fit ladder.csv` reads the same table. To try an idea at every size, copy the
rows of a ladder, change their base, and blank the results."""

import fcntl
import math
import os
import runpy
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import scaling  # noqa: E402
from scaling import BadInput  # noqa: E402
from scaling import need  # noqa: E402
from scaling import number  # noqa: E402


# --------------------------------------------------------------------------------------------- one run

@dataclass(frozen=True)
class Rule:
    """How a budget and a width become a run; the defaults are the recipe's [cited: marin #4447]."""
    batch: int = 0          # sequences; 0: a power of two, at least 32, for about 2^14 steps
    law: tuple = ()         # (a, b) of D* = a C^b; (): a published one
    head: bool = False      # C counts the output head in every model, not only in dense ones
    aspect: float = 0.0     # width per layer, for models of two layers and more; 0: the recipe's rule
    layers: int = 0         # depth of every model; 0: grows with the width
    heads: int = 0          # of every model, of equal parts of the width or of head_dim; 0: as many as fit
    group: int = 4          # query heads that share a key/value head, or more where it does not divide
    unit: int = 0           # widths are its multiples, and heads no narrower than head_dim; 0: head_dim


def width_step(head_dim, rule):
    """(widths are multiples of this, the least width). Of rule.heads each has a multiple of 4, for half-RoPE."""
    if rule.heads:
        step = math.lcm(rule.unit or 1, 4 * rule.heads)
        return step, step
    return rule.unit or head_dim, max(rule.unit, head_dim)


def shape(width, experts, head_dim, rule=Rule()):
    """Config keys of a width by the recipe's rules [cited: marin #4447]; experts = 0 is dense (4x MLP).

    With rule.unit the heads are the narrowest, of head_dim and more and in fours for half-RoPE, that
    divide the width. With rule.layers and rule.heads width is the only dial, and heads have at least head_dim."""
    unit, least = width_step(head_dim, rule)
    need(width >= least and width % unit == 0, "hidden_dim",
         f"a multiple of {unit}, at least {least}", width, "choose such a width")
    if rule.heads:
        head_dim = max(head_dim, width // rule.heads)
    elif rule.unit:
        head_dim = next((h for h in range(head_dim, width) if width % h == 0 and h % 4 == 0), width)
    heads = rule.heads or width // head_dim
    layers = max(1, round(width / (64 + 4 * math.log2(width) - 9)))
    if rule.aspect:
        layers = max(2, round(width / rule.aspect))
    layers = rule.layers or layers
    sizes = dict(hidden_dim=width, num_layers=layers, num_heads=heads)
    if not experts:
        return sizes | dict(num_kv_heads=heads, head_dim=head_dim, shared_dim=4 * width)
    kv_heads = max([n for n in range(1, heads // rule.group + 1) if heads % n == 0] or [1])
    expert_dim = width // 2 if rule.heads else math.ceil(width / 2 / unit) * unit
    return sizes | dict(num_kv_heads=kv_heads, head_dim=head_dim, expert_dim=expert_dim, shared_dim=width)


def words_of(keys):
    """Config keys as arguments of train.py."""
    return [f"--{key}={value}" for key, value in keys.items()]


def load(base, keys, words=()):
    """(ModelConfig, TrainConfig) of a config file with some keys replaced, else BadInput."""
    import train                                        # and with it jax: only planning needs them
    try:
        return train.load_config(base, [*words_of(keys), *words])
    except ValueError as error:
        raise BadInput(base, "a config of train.py", error, "correct it") from None


def widths_of(base, rule):
    """([(config keys, FLOPs per token)] of up to 128 widths, the base's ModelConfig at the first)."""
    import model
    try:
        given = runpy.run_path(str(base))
    except Exception as error:                          # a config is the user's code: anything may happen
        raise BadInput(base, "a config of plain assignments", repr(error), "correct it") from None
    experts, head_dim = given.get("num_experts", 0), given.get("head_dim", 128)
    unit, least = width_step(head_dim, rule)
    shapes = [shape(width, experts, head_dim, rule) for width in range(unit, 129 * unit, unit) if width >= least]
    config, _ = load(base, {"steps": 1000, "batch_size": given.get("batch_size", 32)} | shapes[0])
    counts = [model.count(replace(config, **keys)) for keys in shapes]
    flops = [n.mfu_flops if rule.head else n.flops_per_token for n in counts]
    return list(zip(shapes, flops)), config


def optimal_tokens(C, dense=False, law=()):
    """D*(C) = a C^b by law (a, b), else by the law that chose the 129B shape [cited: marin #4447] or, if
    dense, by Delphi's [cited: marin #1337]. Far below 1e18 FLOPs both are extrapolated [assumed]."""
    coefficient, exponent = law or ((0.0267196, 0.5800830) if dense else (3.290, 0.5))
    return coefficient * C**exponent


def plan(C, widths, config, rule=Rule(), factor=1.0):
    """Config keys of one run: the width whose tokens, C over FLOPs per token, come nearest factor x D*.

    widths, config: from `widths_of`. Raises BadInput for fewer than 10 steps."""
    tokens = factor * optimal_tokens(C, not config.num_experts, rule.law)
    sizes, flops = min(widths, key=lambda pair: abs(math.log(C / pair[1] / tokens)))
    D, S = C / flops, config.seq_len
    need(D < 3 * tokens, f"C = {C:.3g}", f"a width for its {tokens:.3g} tokens among {len(widths)}",
         f"{D:.3g} tokens at the widest, {sizes['hidden_dim']}", "choose a larger --unit")
    batch = rule.batch or max(32, 2**math.ceil(math.log2(max(1.0, D / (2**14 * S)))))
    steps = round(D / (batch * S))
    need(steps >= 10, f"C = {C:.3g}", "at least 10 steps", f"{steps} of {batch} x {S} tokens, width "
         f"{sizes['hidden_dim']}", "raise the budget, or lower seq_len in --config")
    return sizes | dict(steps=steps, batch_size=batch)


def config_text(C, keys, base, path):
    """A config file for train.py: every key that is not at its default, and where it comes from."""
    lines = [f'"""The compute-optimal run of {C:.4g} FLOPs by scaling.py, from {base}.', "",
             f'    python train.py {path}"""', ""]
    for config in load(base, keys | {"run_dir": f"out/{Path(path).stem}"}):
        for key in fields(config):
            value = getattr(config, key.name)
            if value != key.default:
                tag = "derived: scaling.py" if key.name in keys else f"carried over from {base}"
                lines.append(f"{f'{key.name} = {value!r}':39s} # [{tag}]")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------ the ladder

def plan_ladder(budgets, out, base, rule=Rule(), widths=7, span=4.0, seeds=(0,)):
    """Add an isoFLOP grid to the table `out`, a row for each run; return the names of its runs.

    Up to `widths` widths a budget, whose tokens lie evenly (in log) within a factor `span` of D*, or the
    one at D*, each with every seed. A row that is there must say the same, and keeps its results."""
    need(Path(out).suffix == ".csv", "--out", "the name of a table, such as ladder.csv", out, "add .csv")
    grid, config = widths_of(base, rule)
    table, new, names = rows_by_name(out)[1], [], []
    label = Path(out).stem if Path(out).stem != "runs" else Path(out).absolute().parent.name
    for C in budgets:
        factors = np.geomspace(1 / span, span, widths) if widths > 1 else [1.0]
        runs = [plan(C, grid, config, rule, factor) for factor in factors]
        runs = {keys["hidden_dim"]: keys for keys in runs}
        best = optimal_tokens(C, not config.num_experts, rule.law)
        off = np.log([keys["steps"] * keys["batch_size"] * config.seq_len / best for keys in runs.values()])
        need(widths == 1 or len(runs) >= 5 and min(off) < -0.2 and max(off) > 0.2, f"budget {C:.4g}",
             "at least 5 widths, on both sides of the optimum", sorted(runs),
             "lower head_dim in --config (widths are its multiples), or raise the budget")
        low, center, high = np.exp([min(off), np.mean(off), max(off)])
        print(f"C = {C:.4g}: widths {sorted(runs)}, tokens {low:.2f} to {high:.2f} of D*, center "
              f"{center:.2f}" + ("" if 0.7 < center < 1.42 else "   (off-center: beware of parabolas)"))
        for width, keys in runs.items():
            for seed in seeds:
                end = f"_s{seed}" if seed else ""
                name = f"{Path(base).stem}_c{C:.6g}_d{width}{end}".replace("+", "")
                own = keys | ({"seed": seed} if seed else {}) | {"run_dir": f"out/{label}_{name}"}
                row = {"config": name, "base": str(base), "overrides": shlex.join(words_of(own)),
                       "planned_flops": f"{C:g}".replace("+", ""), "width": str(width), "note": "", "loss": ""}
                new += [row] if name not in table else []
                old = table.setdefault(name, row)
                same = all(old[key] == row[key] for key in ("base", "overrides"))
                need(same, f"{out}: {name}", "the run that this command plans", "another", "choose a new --out")
                names.append(name)
    put_rows(out, *new)
    print(f"{len(names)} runs in {out}; train those not yet done:  "
          f"python scaling.py ladder --run {shlex.quote(str(out))}")
    return names


def write_table(path, columns, rows):
    """Write a table as a whole or not at all."""
    partial = Path(path).with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(scaling.csv_text(columns, rows))
    os.replace(partial, path)


def rows_by_name(path, *wanted):
    """(columns, {name: row}) of a table with names in the column config. Unless other columns are wanted, it
    need not exist yet."""
    there = wanted or Path(path).is_file()
    columns, rows = scaling.read_table(path, "config", *wanted) if there else ([], [])
    table = {row["config"]: row for row in rows}
    need(len(table) == len(rows), path, "each name in the column config once",
         f"{len(table)} names in {len(rows)} rows", "rename the others")
    return columns, table


def planned_rows(path, *more):
    """The rows of a ladder's table, each name once. more: other columns that are needed."""
    return [*rows_by_name(path, "base", "overrides", "planned_flops", "loss", *more)[1].values()]


def put_rows(path, *rows):
    """Write rows into a table, in the place of those with their names, while others write other rows."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(Path(path).with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # threads wait too: each has opened the file for itself
        columns, table = rows_by_name(path)
        table |= {row["config"]: row for row in rows}
        columns = dict.fromkeys([*columns, *(key for row in table.values() for key in row)])
        write_table(path, [*columns], [*table.values()])


def without_seed(overrides):
    """(the words of a row that its other seeds share, its seed)."""
    words = shlex.split(overrides)
    seeds = [int(word.partition("=")[2]) for word in words if word.startswith("--seed=")]
    return tuple(word for word in words if not word.startswith(("--seed=", "--run_dir="))), sum(seeds)


def run_dir_of(overrides):
    """The --run_dir of a row; "" if it has none."""
    return next((word.partition("=")[2] for word in shlex.split(overrides) if word.startswith("--run_dir=")), "")


NOT_TRAINING = {"run_dir", "data_dir", "compiled_dir", "checkpoint_dir", "devices", "replicas", "topology",
                "expert_parallel", "accumulate", "peak_flops", "log_every", "eval_every", "eval_tokens",
                "save_every", "save_minutes", "keep", "keep_every", "stuck_minutes", "heartbeat_seconds",
                "prompt", "sample_tokens", "temperature", "exchange", "remat", "weights_over",
                "expert_block"}


def need_same(base, words, folder):
    """BadInput if the run in `folder` was trained by another config than the row's."""
    import json
    from dataclasses import asdict
    was, now = scaling.read_json(folder / "config.json"), [asdict(part) for part in load(base, {}, words)]
    for part, values in zip(("model", "train"), json.loads(json.dumps(now))):
        for key, value in values.items():
            before = (was.get(part) or {}).get(key, value)
            need(key in NOT_TRAINING or before == value, folder, f"a run with {key}={value!r}, as its row says",
                 f"{before!r}", "give the row another --run_dir")


def run_ladder(path, jobs=1):
    """Train every run of a ladder's table that has no loss, cheapest first, each in its own process,
    `jobs` at a time, and fill in its row; stop at a failure. A run cut short goes on from its checkpoint."""
    rows = planned_rows(path)
    left = [row for row in rows if not row["loss"]]
    left.sort(key=lambda row: (number(row["planned_flops"], path, "planned_flops"), row["config"]))
    print(f"{path}: {len(rows) - len(left)} runs done, {len(left)} to go", flush=True)
    failed = threading.Event()

    def train(row):
        try:
            if not failed.is_set():
                train_row(path, row)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, left))


def train_row(path, row):
    """Train the run of a row in its own process, and fill the row in."""
    words = shlex.split(row["overrides"])
    folder = run_dir_of(row["overrides"])
    need(folder, f"{path}: {row['config']}", "a --run_dir among the overrides", words, "add it")
    result = Path(folder) / "result.json"
    if result.parent.is_dir() and any(result.parent.glob("*.json")):
        need_same(row["base"], words, result.parent)
    print(row["config"], flush=True)
    command = [sys.executable, str(ROOT / "train.py"), row["base"], *words]
    if not result.is_file() and subprocess.run(command).returncode:
        raise BadInput(row["config"], "train.py to finish", "a failure", "correct it and give this command again")
    found = scaling.read_json(result)
    number(found.get("loss"), result, "loss")
    domains = found.pop("domains", {})
    domains.pop("macro", None)
    found |= {f"loss_{name}": domain["loss"] for name, domain in domains.items()}
    found["eval_bytes"] = sum(domain.get("bytes", 0) for domain in domains.values())
    put_rows(path, row | found)


# ---------------------------------------------------------------------------------------- command line

def rule_of(a):
    return Rule(a.batch, tuple(a.law), a.count_head, a.aspect, a.layers, a.heads, a.group, a.unit)


def plan_command(a):
    need(a.config, "--config", "the base, such as configs/smoke.py", "none", "give it")
    path = a.out or f"plan_{a.flops:.6g}.py".replace("+", "")
    widths, config = widths_of(a.config, rule_of(a))
    text = config_text(a.flops, plan(a.flops, widths, config, rule_of(a)), a.config, path)
    if a.out:
        scaling.write_new(path, text)
    print(text + (f"written to {path}" if a.out else "not written: --out FILE does"))


def ladder_command(a):
    need(a.run or a.budgets and a.out, "ladder", "--budgets C ... --out TABLE.csv, or --run TABLE.csv",
         "neither", "give one")
    if a.run:
        run_ladder(a.run, a.jobs)
    else:
        need(a.config, "--config", "the base, such as configs/smoke.py", "none", "give it")
        plan_ladder(a.budgets, a.out, a.config, rule_of(a), a.widths, a.span, a.seeds)


def add_planning(add):
    """The options that `plan` and `ladder` share."""
    add("--config", help="the base, for all but the sizes")
    add("--batch", type=scaling.count, default=0, metavar="B", help="sequences, instead of the rule")
    add("--law", type=number, nargs=2, default=(), metavar=("a", "b"), help="D* = a C^b, as `fit` prints it")
    add("--count-head", action="store_true", help="C with the output head in every model")
    add("--aspect", type=number, default=0.0, metavar="R", help="width per layer, instead of the rule")
    add("--layers", type=scaling.count, default=0, metavar="L", help="depth of every model")
    add("--heads", type=scaling.count, default=0, metavar="N", help="heads of every model")
    add("--group", type=scaling.count, default=4, metavar="N", help="query heads a key/value head")
    add("--unit", type=scaling.count, default=0, metavar="U",
        help="widths in multiples of it, heads of head_dim or wider")


def add_commands(command):
    """Add `plan` and `ladder` to the commands of scaling.py."""
    add = command("plan", plan_command, "the compute-optimal config of a budget")
    add("--flops", type=number, required=True, metavar="C", help="the budget")
    add("--out", help="the config file to write; without it nothing is written")
    add_planning(add)
    add = command("ladder", ladder_command, "plan an isoFLOP grid as a table of runs, or train it")
    add("--budgets", type=number, nargs="+", metavar="C", help="training FLOPs")
    add("--out", metavar="TABLE.csv", help="the table that gets a row for each run")
    add("--run", metavar="TABLE.csv", help="train what has no loss yet in this table")
    add("--jobs", type=scaling.count, default=1, metavar="N", help="runs at a time, for devices = 1")
    add("--widths", type=scaling.count, default=7, metavar="N", help="per budget; 1 is the optimum alone")
    add("--span", type=number, default=4.0, metavar="R", help="their tokens: from D*/R to R D*")
    add("--seeds", type=int, nargs="+", default=[0], help="of each width")
    add_planning(add)
