"""Is an idea better? Train base and variant alike at two budgets, and say whether it holds.

    python scaling.py gate my_config.py                     a config: the base's keys with some changed
    python scaling.py gate --optimizer=muonh --warmup=0.01  keys of the command line
    python scaling.py gate ../my_fork                       another checkout: the same config, edited code
    python scaling.py gate ../my_fork --budgets 3e11 1e12 3e12 --seeds 4 --json verdict.json

Both sides get the same seeds, the same order of the data and, at each budget, the same training FLOPs
by their own model.count. Losses are compared in pairs of equal seeds; the ladder's law turns a loss into
compute. Step times are measured in turns. Runs are kept in --out, a row each, and are not trained again.

Verdict: "holds" if even the lower 95 % bound of the compute speed-up over all budgets is above 1 and no
budget speaks against it; "does not hold" if the upper bound is below WORTH; else "undecided".
Exit codes: 0 holds, 1 does not hold, 3 undecided, 2 bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import scaling  # noqa: E402
from configs.ladder import figures  # noqa: E402
from configs.ladder import plan  # noqa: E402
from scaling import need  # noqa: E402

BASE = "configs/ladder/rungs/c_moe_v1.py"
BUDGETS = 3e11, 1e12
WORTH = 1.05                            # a speed-up below this is not worth an edit [assumed]
VERDICTS = {"holds": 0, "does not hold": 1, "undecided": 3}


# -------------------------------------------------------------------------------- what one side is

class Side(NamedTuple):
    """Code, config and keys of the base or of the variant."""
    checkout: Path                      # whose train.py runs
    config: str
    keys: tuple                         # --key=value


def sides_of(words, base):
    """(base, variant) from what stands on the command line."""
    keys = tuple(word for word in words if word.startswith("--"))
    rest = [word for word in words if not word.startswith("--")]
    need(len(rest) + len(keys) >= 1 and len(rest) <= 1, "gate", "a config, a checkout or --key=value",
         " ".join(words) or "nothing", "see scaling.py gate --help")
    own, fork = Side(ROOT, str(ROOT / base), ()), Path(rest[0]).resolve() if rest else ROOT
    if not rest:
        return own, own._replace(keys=keys)
    if fork.is_dir():
        need((fork / "train.py").is_file() and (fork / base).is_file(), rest[0],
             f"a checkout with train.py and {base}", "none", "name the top folder of the fork")
        return own, Side(fork, str(fork / base), keys)
    need(fork.is_file(), rest[0], "a config, a checkout or --key=value", "no such file", "correct it")
    return own, Side(ROOT, str(fork), keys)


# A process of one side's own code: for each line of JSON on its input, one on its output.
WORKER = """
import json, sys, time
checkout, config = sys.argv[1:3]
sys.path.insert(0, checkout)
import jax
import data, model, train
from tests import hlo
for line in sys.stdin:
    keys, take = json.loads(line)
    if take == 0:                       # a new run: what it costs by its own count
        try:
            c, t = train.load_config(config, keys)
        except ValueError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            continue
        n, tokens = model.count(c), t.batch_size * c.seq_len
        said = {"flops": n.mfu_flops * tokens, "total": n.total, "tokens": tokens}
    elif take == 1:                     # make its step, once, and look at it
        mesh = train.make_mesh(c, t)
        state = jax.jit(lambda: train.make_state(c, t, jax.random.key(0)),
                        out_shardings=train.state_shardings(c, t, mesh))()
        mixture = train.open_data(c, t)
        rows = data.batch_at(mixture, 0, t.batch_size, c.seq_len, t.seed)
        batch = train.to_global_batch(rows, mesh, t.accumulate)
        step = train.make_train_step(c, t, mesh)
        traced = step.trace(state, batch)
        memory = traced.lower().compile().memory_analysis()
        said = {"executed": hlo.traced_flops(traced.jaxpr.jaxpr) * mesh.size,
                "tokenizer": mixture.tokenizer.sha256, "bytes_per_token": mixture.bytes_per_token,
                "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes}
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
    else:                               # the seconds of a step
        start = time.perf_counter()
        for _ in range(take):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        said = {"seconds": (time.perf_counter() - start) / take}
    print(json.dumps(said), flush=True)
"""


class Worker:
    """Asks one side's own code, in a process of its own."""

    def __init__(self, side):
        words = [sys.executable, "-c", WORKER, str(side.checkout), side.config]
        self.side, self.process = side, subprocess.Popen(
            words, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, take, keys=()):
        """Send a request, see WORKER, and return the answer. BadInput if the code cannot give one."""
        self.process.stdin.write(json.dumps([[*keys, *self.side.keys], take]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        need(line, self.side.config, "a step of this code", "a failure", "see the lines above")
        said = json.loads(line)
        need("error" not in said, self.side.config, "a config of train.py", said.get("error"), "correct it")
        return said

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------- what is trained

def planned(side, worker, C, sizes, seeds, out, name):
    """Rows of the table for one side and budget: as many steps as C takes by the side's own count."""
    cost = worker.ask(0, plan.words_of(sizes | {"steps": 1000}))
    steps = round(C / cost["flops"])
    need(steps >= 10, f"C = {C:.3g}", "at least 10 steps", steps, "raise the budget")
    rows = []
    for seed in seeds:
        label = f"{name}_c{C:.6g}_s{seed}".replace("+", "")
        keys = sizes | {"steps": steps, "seed": seed, "run_dir": str(Path(out).resolve() / label)}
        rows.append({"config": label, "base": side.config, "checkout": str(side.checkout),
                     "overrides": " ".join([*plan.words_of(keys), *side.keys]),
                     "planned_flops": f"{steps * cost['flops']:.6g}", "loss": "", "seed": str(seed)})
    return rows, cost


def step_times(workers, rounds=8, steps=4):
    """Seconds of a step of each worker, in turns: the smallest of some rounds."""
    best = [math.inf] * len(workers)
    for _ in range(rounds):
        for i, worker in enumerate(workers):
            best[i] = min(best[i], worker.ask(steps)["seconds"])
    return best


# ------------------------------------------------------------------------------------ what it means

def compare(budgets, law):
    """The statistics of a gate. budgets: {C: (losses of the base, of the variant)}, in pairs of equal
    seeds. law: E and alpha of loss = E + A C^-alpha, in the unit of the losses.

    The noise of a pair is pooled over budgets, relative to loss - E, because that is what the law
    turns into compute. Returns a dict; its speed-ups are exp of log_gain, its bounds one-sided."""
    gains, spread, free = {}, 0.0, 0
    for C, (base, variant) in sorted(budgets.items()):
        base, variant = np.array(base, float), np.array(variant, float)
        need(min(*base, *variant) > law.E, f"C = {C:.3g}", f"losses above E = {law.E:.3f} of the ladder's law",
             f"{min(*base, *variant):.3f}", "name another law with --law E ALPHA")
        log_gain = (np.log(base - law.E) - np.log(variant - law.E)) / law.alpha         # of each pair
        gains[C] = log_gain
        spread += float(np.sum((log_gain - log_gain.mean()) ** 2))
        free += log_gain.size - 1
    need(free >= 1, "gate", "two seeds or more at a budget", "one", "raise --seeds")
    sd, t = math.sqrt(spread / free), stats.t.ppf(0.95, free)
    rows = []
    for C, log_gain in gains.items():
        base, variant = map(np.array, budgets[C])
        mean, half = log_gain.mean(), t * sd / math.sqrt(log_gain.size)
        difference = variant - base
        rows.append({"flops": C, "seeds": int(log_gain.size), "difference": float(difference.mean()),
                     "standard_error": float(difference.std(ddof=1) / math.sqrt(difference.size))
                     if difference.size > 1 else None, "speedup": math.exp(mean),
                     "at_least": math.exp(mean - half), "at_most": math.exp(mean + half)})
    every = np.concatenate([*gains.values()])
    mean, half = every.mean(), t * sd / math.sqrt(every.size)
    slope = None
    if len(rows) > 1:
        x = np.log10([row["flops"] for row in rows])
        slope = float(np.polyfit(x, [math.log(row["speedup"]) for row in rows], 1)[0])
    found = {"budgets": rows, "speedup": math.exp(mean), "at_least": math.exp(mean - half),
             "at_most": math.exp(mean + half), "pair_sd": sd, "more_seeds": None,
             "trend": None if slope is None else math.exp(slope)}
    found["verdict"] = verdict(found)
    if found["verdict"] == "undecided":
        found["more_seeds"] = more_seeds(mean, sd, every.size, len(rows))
    return found


def verdict(found):
    """See the first lines of this file."""
    if found["at_least"] > 1 and all(row["at_most"] > 1 for row in found["budgets"]):
        return "holds"
    return "does not hold" if found["at_most"] < WORTH else "undecided"


def more_seeds(mean, sd, runs, budgets):
    """How many more seeds at each budget would decide, if mean and noise stay as they are."""
    distance = max(mean, math.log(WORTH) - mean)            # to the nearer of the two decisions
    for seeds in range(runs // budgets + 1, 1000):
        n = seeds * budgets
        if stats.t.ppf(0.95, n - budgets) * sd / math.sqrt(n) < distance:
            return seeds - runs // budgets
    return 1000


# --------------------------------------------------------------------------------------- the command

def unit_of(results):
    """The key under which losses of both sides compare: nats if tokenizers are equal, else bits per byte."""
    evals = {row["eval"] for row in results}
    sizes = {row["eval_bytes"] for row in results}
    need(len(sizes) == 1, "gate", "one held-out text", f"texts of {sorted(sizes)} bytes",
         "give both sides the same mixture")
    return "loss" if len(evals) == 1 else "bpb"


def gate(a):
    """Train, compare, print; returns the exit code."""
    base, variant = sides_of(a.fork + a.rest, a.base)
    workers, rule = [Worker(base), Worker(variant)], plan.Rule(batch=16, head=True, unit=8, aspect=28.0)
    try:
        widths, config = plan.widths_of(ROOT / a.base, rule)
        table, rows, costs = Path(a.out) / "runs.csv", [], {}
        for C in a.budgets:
            sizes = plan.plan(C, widths, config, rule)
            sizes.pop("steps")
            for side, worker, name in zip((base, variant), workers, ("base", variant_name(a))):
                more, costs[name] = planned(side, worker, C, sizes, range(a.seeds), a.out, name)
                rows += more
        merge(table, rows)
        plan.run_ladder(table, a.jobs)
        for worker in workers:
            worker.facts = worker.ask(1)
        seconds = step_times(workers)
    finally:
        for worker in workers:
            worker.close()
    _, done = scaling.read_table(table)
    return conclude(a, {row["config"]: row for row in done}, rows, workers, seconds, costs)


def variant_name(a):
    """A name for files: of the fork, and of what its keys are."""
    words = [Path(word).stem if not word.startswith("--") else word[2:] for word in a.fork + a.rest]
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in "_".join(words))


def merge(path, rows):
    """Add rows to a table; those that are there keep their results, if they say the same."""
    columns, table = ["config", "base", "checkout", "overrides", "planned_flops", "loss", "seed"], {}
    if Path(path).is_file():
        columns, old = scaling.read_table(path)
        table = {row["config"]: row for row in old}
    for row in rows:
        old = table.setdefault(row["config"], row)
        same = all(old[key] == row[key] for key in ("base", "checkout", "overrides"))
        need(same, f"{path}: {row['config']}", "the run that this command plans", "another",
             "choose another --out")
    plan.write_table(path, columns, [*table.values()])


def conclude(a, done, rows, workers, seconds, costs):
    """Print the table and the verdict; returns the exit code."""
    done = {row["config"]: done[row["config"]] for row in rows}
    key, budgets = unit_of([*done.values()]), {}
    for C in a.budgets:
        ends = [f"_c{C:.6g}_s{seed}".replace("+", "") for seed in range(a.seeds)]
        budgets[C] = tuple([float(done[name + end][key]) for end in ends]
                           for name in ("base", variant_name(a)))
    law = scaling.Law(a.law[0], 1.0, a.law[1]) if a.law else figures.registered_law()
    if key == "bpb":
        scale = float(done[rows[0]["config"]]["bpb"]) / float(done[rows[0]["config"]]["loss"])
        law = scaling.Law(law.E * scale, law.A * scale, law.alpha)
    found = compare(budgets, law)
    clock = seconds[0] / seconds[1] * costs[variant_name(a)]["flops"] / costs["base"]["flops"]
    facts = [worker.facts for worker in workers]
    found |= {"unit": key, "wall_clock": found["speedup"] * clock, "step_seconds": seconds,
              "memory_bytes": [fact["memory"] for fact in facts],
              "executed_over_counted": [fact["executed"] / cost["flops"]
                                        for fact, cost in zip(facts, costs.values())]}
    show(found, variant_name(a))
    if a.json:
        scaling.write_new(a.json, json.dumps(scaling.plain(found), indent=1) + "\n")
    return VERDICTS[found["verdict"]]


def show(found, name):
    """Print what was found."""
    unit = "nats" if found["unit"] == "loss" else "bits per byte"
    print(f"{name} against the base; a difference below zero is better")
    for row in found["budgets"]:
        error = f" +- {row['standard_error']:.4f}" if row["standard_error"] is not None else ""
        print(f"C = {row['flops']:.3g}   {row['seeds']} seeds   difference {row['difference']:+.4f}{error} "
              f"{unit}   compute speed-up {row['speedup']:.3f}, at least {row['at_least']:.3f}")
    print(f"all budgets   compute speed-up {found['speedup']:.3f}, {found['at_least']:.3f} to "
          f"{found['at_most']:.3f} (each bound holds in 95 of 100 cases)"
          + (f"; it changes by a factor of {found['trend']:.3f} per tenfold compute"
             if found["trend"] else ""))
    ours, theirs = found["step_seconds"]
    print(f"wall clock    speed-up {found['wall_clock']:.3f}; a step takes {1e3 * theirs:.1f} ms, the base's "
          f"{1e3 * ours:.1f} ms, in turns")
    base, fork = (size / 2**20 for size in found["memory_bytes"])
    print(f"memory        {fork:.0f} MiB a step, the base {base:.0f} MiB")
    base, fork = found["executed_over_counted"]
    if fork > 1.05 * base:
        print(f"warning       it executes {fork:.2f} times the FLOPs that its model.count says, the base "
              f"{base:.2f} times: the comparison favors it by {fork / base:.2f}")
    more = f": needs {found['more_seeds']} more seeds" if found["more_seeds"] else ""
    print(f"verdict       {found['verdict']}{more}")


def add_commands(command):
    """Add `gate` to the commands of scaling.py."""
    add = command("gate", gate, "train base and variant alike, and say whether an idea holds")
    add("fork", nargs="*", help="a config, or the folder of another checkout; and --key=value")
    add("--base", default=BASE, help="the config that it is compared with (%(default)s)")
    add("--budgets", type=scaling.number, nargs="+", default=BUDGETS, metavar="C", help="training FLOPs")
    add("--seeds", type=scaling.count, default=3, metavar="N", help="of each side at each budget")
    add("--jobs", type=scaling.count, default=2, metavar="N", help="runs at a time, one core each")
    add("--law", type=scaling.number, nargs=2, metavar=("E", "ALPHA"), help="instead of the ladder's")
    add("--out", default="out/gate", metavar="DIR", help="keeps the runs (%(default)s)")
    add("--json", metavar="FILE", help="everything, as JSON")
