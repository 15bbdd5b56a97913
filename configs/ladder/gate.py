"""Is an idea better? Train base and variant alike at two budgets, and say whether it holds.

    python scaling.py gate my_config.py                     a config: the base's keys with some changed
    python scaling.py gate --optimizer=muonh --warmup=0.01  keys of the command line
    python scaling.py gate my_idea.patch                    a diff of this checkout (git diff > my_idea.patch)
    python scaling.py gate ../my_fork                       another checkout: the same config, edited code
    python scaling.py gate ../my_fork --budgets 3e11 1e12 3e12 --seeds 4 --json verdict.json

Both sides get the same seeds (each budget its own), the same order of the data, the sizes that suit the
base and, at each budget, the same training FLOPs by their own model.count. Losses are compared in pairs of
equal seeds; the ladder's law turns a loss into compute. Step times are measured in turns, on a machine that
should be quiet. Runs are kept in --out, a row of runs.csv each, under the name of their code and config,
and are not trained again. One process trains all seeds of a side and budget, see worker.py.

Verdict: "holds" if even the lower 95 % bound of the compute speed-up over all budgets is above 1 and each
budget has a speed-up; "does not hold" if the upper bound is below WORTH, or if training diverges; else
"undecided". Choose the seeds before you look: who adds seeds until it is decided sees a variant that is
worth nothing "hold" in 9 of 100 cases instead of 4 [simulated].
Exit codes: 0 holds, 1 does not hold, 3 undecided, 2 bad input. How often it errs: calibrate.py."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
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
RULE = plan.Rule(batch=16, law=(0.1267, 0.5933), head=True, unit=8, aspect=32.0, group=1)  # the rungs'
WORTH = 1.05                            # a speed-up below this is not worth an edit [assumed]
VERDICTS = {"holds": 0, "does not hold": 1, "undecided": 3}


# -------------------------------------------------------------------------------- what one side is

class Side(NamedTuple):
    """Code, config and keys of the base or of the variant."""
    checkout: Path                      # whose train.py runs
    config: str
    keys: tuple                         # --key=value
    name: str                           # how its runs and its verdict are called


def sides_of(words, base, out):
    """(base, variant) from what stands on the command line."""
    keys = tuple(word for word in words if word.startswith("--"))
    rest = [word for word in words if not word.startswith("--")]
    need(len(rest) + len(keys) >= 1 and len(rest) <= 1, "gate", "a config, a patch, a checkout or --key=value",
         " ".join(words) or "nothing", "see scaling.py gate --help")
    code = frozen(ROOT, out)
    own = Side(code, str(code / base), (), Path(base).stem)
    name = "_".join([*(Path(word).resolve().stem for word in rest), *(word[2:] for word in keys)])
    name = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in name)
    if not rest:
        return own, own._replace(keys=keys, name=name)
    fork = Path(rest[0]).resolve()
    need(fork.exists(), rest[0], "a config, a patch, a checkout or --key=value", "no such file", "correct it")
    if fork.is_file() and fork.suffix not in (".patch", ".diff"):
        return own, Side(code, str(fork), keys, name)
    need(fork.is_file() or (fork / "train.py").is_file() and (fork / base).is_file(), rest[0],
         f"a checkout with train.py and {base}", "none", "name the top folder of the fork")
    code = frozen(fork, out) if fork.is_dir() else frozen(ROOT, out, fork)
    return own, Side(code, str(code / base), keys, name)


def frozen(checkout, out, patch=None):
    """A copy of the code of a checkout, with a patch applied if given, in a folder of `out` that is named
    by its content: you can go on editing while runs wait for their turn."""
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        scratch = Path(scratch) / "code"
        scratch.mkdir()
        for path in Path(checkout).glob("*.py"):
            shutil.copy2(path, scratch)
        for part in ("configs", "tests"):
            shutil.copytree(Path(checkout) / part, scratch / part,
                            ignore=shutil.ignore_patterns("__pycache__", "*.png", "*.csv", "test_*"))
        if patch:
            # git must not find the repository around the folder: it would skip what lies outside
            apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(scratch.parent)}
            done = subprocess.run(["git", "apply", str(patch)], cwd=scratch, env=apart, capture_output=True, text=True)
            need(done.returncode == 0, patch, "a patch that fits this checkout", done.stderr.strip(),
                 "make it anew by git diff")
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        texts = [str(path.relative_to(scratch)).encode() + path.read_bytes() for path in files]
        content = hashlib.sha256(b"".join(texts))
        folder = out / f"code-{content.hexdigest()[:12]}"
        with contextlib.suppress(OSError):          # it is there already
            os.rename(scratch, folder)
    return folder


class Worker:
    """Asks one side's own code, in a process of its own: see worker.py. It starts when it is first asked."""

    def __init__(self, side):
        self.side, self.process = side, None

    def ask(self, name, words, *more):
        """What a method of worker.Runs returns. BadInput if the code cannot give an answer."""
        if not self.process:
            program = [sys.executable, str(Path(__file__).with_name("worker.py")), str(self.side.checkout),
                       self.side.config]
            self.process = subprocess.Popen(program, cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE)
        with contextlib.suppress(BrokenPipeError):      # it has died: there is no answer either
            self.process.stdin.write(json.dumps([name, [[*words, *self.side.keys], *more]]) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        need(line, self.side.name, f"an answer to {name} from this code", "a failure", "see the lines above")
        said = json.loads(line)
        need("error" not in (said if isinstance(said, dict) else ()), self.side.name, "a config that trains",
             isinstance(said, dict) and said.get("error"), "correct it")
        return said

    def close(self):
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()


# ---------------------------------------------------------------------------------- what is trained

class Budget(NamedTuple):
    """How one side spends C training FLOPs."""
    side: Side
    worker: Worker
    C: float
    label: str                          # of its runs, without the seed
    words: list                         # sizes and steps
    flops: float                        # of a step, by its own count


def planned(worker, C, sizes):
    """A Budget of a worker's side: as many steps as C takes by its own count."""
    flops = worker.ask("count", plan.words_of(sizes | {"steps": 1000}))["flops"]
    steps = round(C / flops)
    need(steps >= 10, f"C = {C:.3g}", "at least 10 steps", steps, "raise the budget")
    words = plan.words_of(sizes | {"steps": steps})
    label = f"{worker.side.name[:60]}-{worker.ask('count', words)['code']}_c{C:.6g}".replace("+", "")
    return Budget(worker.side, worker, C, label, words, flops)


def seeds_of(C, n):
    """n seeds of a budget, its own: equal seeds begin with equal weights, and then the gains of the base over
    itself at two budgets were no two measurements but one (correlation 0.93 over 47 pairs) [measured]."""
    first = 1000 * (zlib.crc32(f"{C:.6g}".encode()) % 100_000)
    return range(first, first + n)


def row_of(budget, seed):
    """The row of the table for one seed of a Budget."""
    steps = int(budget.words[-1].partition("=")[2])
    return {"config": f"{budget.label}_s{seed}", "base": budget.side.config, "checkout": str(budget.side.checkout),
            "overrides": " ".join([*budget.words, *budget.side.keys]), "flops": f"{steps * budget.flops:.6g}",
            "seed": str(seed), "loss": "", "bpb": ""}


class Table:
    """runs.csv of --out: a row for each run, written as a whole when one ends."""

    def __init__(self, out):
        self.path = Path(out) / "runs.csv"
        self.rows = plan.rows_by_name(self.path)[1]

    def losses(self, budget, seeds):
        """The rows of a Budget, trained where they are missing."""
        for seed in seeds:
            row = row_of(budget, seed)
            if row["config"] not in self.rows:
                print(f"training {row['config']}", flush=True)
                row |= budget.worker.ask("train", budget.words, seed, seed)
                row["loss"] = "diverged" if row["loss"] is None else row["loss"]
                plan.put_rows(self.path, row)            # other gates add rows, too
                self.rows[row["config"]] = row
        return [self.rows[f"{budget.label}_s{seed}"] for seed in seeds]


def train_pairs(a, budgets):
    """Train both sides at every budget; return {label of a Budget: its rows by seed}. With --minutes as many
    seeds as fit in, two at least: their number does not depend on losses."""
    table, began = Table(a.out), time.monotonic()
    with ThreadPoolExecutor(a.jobs) as pool:
        for seeds in itertools.count(1) if a.minutes else [a.seeds]:
            found = list(pool.map(lambda budget: table.losses(budget, seeds_of(budget.C, seeds)), budgets))
            spent = (time.monotonic() - began) / 60
            if not a.minutes or seeds > 1 and spent * (seeds + 1) / seeds > a.minutes:
                return {budget.label: rows for budget, rows in zip(budgets, found)}


def step_times(budgets, rounds=8, steps=4):
    """Seconds of a step of each Budget, in turns: the smallest of some rounds."""
    best = [math.inf] * len(budgets)
    for _ in range(rounds):
        for i, budget in enumerate(budgets):
            best[i] = min(best[i], budget.worker.ask("seconds", budget.words, steps))
    return best


# ------------------------------------------------------------------------------------ what it means

def compare(budgets, law):
    """The statistics of a gate. budgets: {C: (losses of the base, of the variant)}, in pairs of equal
    seeds. law: E and alpha of loss = E + A C^-alpha, in the unit of the losses.

    The noise of a pair is pooled over budgets, relative to loss - E, because that is what the law
    turns into compute. Budgets differ in noise, so that its degrees of freedom are Satterthwaite's.
    Returns a dict; its speed-ups are exp of log_gain, its bounds one-sided."""
    gains, spreads, free = {}, [], 0
    for C, (base, variant) in sorted(budgets.items()):
        base, variant = np.array(base, float), np.array(variant, float)
        need(min(*base, *variant) > law.E, f"C = {C:.3g}", f"losses above E = {law.E:.3f} of the ladder's law",
             f"{min(*base, *variant):.3f}", "name another law with --law E ALPHA")
        log_gain = (np.log(base - law.E) - np.log(variant - law.E)) / law.alpha         # of each pair
        gains[C] = log_gain
        spreads.append(float(np.sum((log_gain - log_gain.mean()) ** 2)))
        free += log_gain.size - 1
    need(free >= 1, "gate", "two seeds or more at a budget", "one", "raise --seeds")
    sd = math.sqrt(sum(spreads) / free)
    uneven = sum(spread**2 / max(1, gain.size - 1) for spread, gain in zip(spreads, gains.values()))
    t = stats.t.ppf(0.95, sum(spreads) ** 2 / uneven if uneven else free)
    rows = []
    for C, log_gain in gains.items():
        base, variant = map(np.array, budgets[C])
        mean, half = log_gain.mean(), t * sd / math.sqrt(log_gain.size)
        difference = variant - base
        rows.append({"flops": C, "seeds": int(log_gain.size), "base": float(base.mean()),
                     "variant": float(variant.mean()), "difference": float(difference.mean()),
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
    if found["verdict"] == "undecided" and found["at_least"] <= 1:
        found["more_seeds"] = more_seeds(mean, sd, every.size, len(rows))
    return found


def verdict(found):
    """See the first lines of this file."""
    if found["at_least"] > 1 and all(row["speedup"] > 1 for row in found["budgets"]):
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

def unit_of(texts, names):
    """The key under which the losses of both sides compare: nats per token if they have one tokenizer,
    else bits per byte. BadInput if they are not scored on the same text."""
    need(texts[0]["heldout"] == texts[1]["heldout"], names[1], f"the held-out text of {names[0]}", "another",
         "give both sides the same held-out text")
    return "loss" if texts[0]["tokenizer"] == texts[1]["tokenizer"] else "bpb"


def gate(a):
    """Train, compare, print; returns the exit code."""
    need(not a.law or a.law[1] > 0, "--law", "E and an ALPHA above 0", a.law, "correct it")
    sides, workers = sides_of(a.fork + a.rest, a.base, a.out), []
    try:
        widths, config = plan.widths_of(ROOT / a.base, RULE)
        budgets = []                                    # base and variant in turns
        for C in sorted(a.budgets):
            workers += [Worker(side) for side in sides]
            sizes = plan.plan(C, widths, config, RULE)
            sizes.pop("steps")
            budgets += [planned(worker, C, sizes | {"eval_tokens_final": a.eval_tokens}) for worker in workers[-2:]]
        base, variant = budgets[-2:]
        codes = [budget.label.rpartition("-")[2] for budget in (base, variant)]
        need(codes[0] != codes[1], sides[1].name, "another code or config than the base's", "the same",
             "edit it, and give the command again")
        sources = [budget.worker.ask("count", budget.words)["source"] for budget in (base, variant)]
        if sources[0] != sources[1]:
            print("warning       it has another train.loop or train.train, which the gate does not run")
        unit = unit_of([budget.worker.ask("text", budget.words) for budget in (base, variant)],
                       [side.name for side in sides])
        found = train_pairs(a, budgets)
        lost = [(budget.side, row["config"]) for budget in budgets for row in found[budget.label]
                if row["loss"] == "diverged"]
        if lost:
            need(lost[0][0] == sides[1], lost[0][1], "a base that trains", "divergence", "mend it")
            print(f"{lost[0][1]}: update after update is not finite\nverdict       does not hold")
            return VERDICTS["does not hold"]
        facts = [budget.worker.ask("look", budget.words) for budget in (base, variant)]
        return conclude(a, budgets, found, unit, facts, step_times([base, variant]))
    finally:
        for worker in workers:
            worker.close()


def conclude(a, budgets, runs, unit, facts, seconds):
    """Print the table and the verdict; returns the exit code. budgets: base and variant in turns, the
    largest last. runs: of train_pairs. facts, seconds: of each side's step at the largest."""
    losses = {base.C: tuple([float(run[unit]) for run in runs[side.label]] for side in (base, variant))
              for base, variant in zip(budgets[::2], budgets[1::2])}
    law = scaling.Law(a.law[0], 1.0, a.law[1]) if a.law else figures.registered_law()
    if unit == "bpb":
        first = runs[budgets[0].label][0]
        scale = float(first["bpb"]) / float(first["loss"])
        law = scaling.Law(law.E * scale, law.A * scale, law.alpha)
    base, variant = budgets[-2:]
    found = compare(losses, law)
    clock = seconds[0] / seconds[1] * variant.flops / base.flops
    found |= {"name": variant.side.name, "against": base.side.name, "unit": unit, "losses": losses,
              "wall_clock": found["budgets"][-1]["speedup"] * clock, "step_seconds": seconds,
              "memory_bytes": [fact["memory"] for fact in facts],
              "executed_over_counted": [fact["executed"] / side.flops for fact, side in zip(facts, (base, variant))]}
    show(found)
    if a.json:
        Path(a.json).parent.mkdir(parents=True, exist_ok=True)
        Path(a.json).write_text(json.dumps(scaling.plain(found), indent=1) + "\n")
    return VERDICTS[found["verdict"]]


def show(found):
    """Print what was found."""
    unit = "nats" if found["unit"] == "loss" else "bits per byte"
    print(f"{found['name']} against {found['against']}; a difference below zero is better")
    for row in found["budgets"]:
        error = f" +- {row['standard_error']:.4f}" if row["standard_error"] is not None else ""
        print(f"C = {row['flops']:.3g}   {row['seeds']} seeds   {row['variant']:.4f} - {row['base']:.4f} = "
              f"{row['difference']:+.4f}{error} {unit}   compute speed-up {row['speedup']:.3f}, "
              f"at least {row['at_least']:.3f}")
    print(f"all budgets   compute speed-up {found['speedup']:.3f}, {found['at_least']:.3f} to "
          f"{found['at_most']:.3f} (each bound holds in 95 of 100 cases)"
          + (f"; it changes by a factor of {found['trend']:.3f} per tenfold compute"
             if found["trend"] else ""))
    ours, theirs = found["step_seconds"]
    print(f"wall clock    speed-up {found['wall_clock']:.3f} at the largest budget; a step takes "
          f"{1e3 * theirs:.1f} ms, the base's {1e3 * ours:.1f} ms, in turns")
    base, fork = (size / 2**20 for size in found["memory_bytes"])
    print(f"memory        {fork:.0f} MiB a step, the base {base:.0f} MiB")
    base, fork = found["executed_over_counted"]
    if fork > 1.05 * base:
        print(f"warning       it executes {fork:.2f} times the FLOPs that its model.count says, the base "
              f"{base:.2f} times: the comparison favors it by {fork / base:.2f}")
    more = f": needs {found['more_seeds']} more seeds" if found["more_seeds"] else ""
    if found["verdict"] == "undecided" and not more:
        more = ": its budgets contradict each other, add a larger one"
    print(f"verdict       {found['verdict']}{more}")


def add_commands(command):
    """Add `gate` to the commands of scaling.py."""
    add = command("gate", gate, "train base and variant alike, and say whether an idea holds", __doc__)
    add("fork", nargs="*", help="a config, a patch, or the folder of another checkout; and --key=value")
    add("--base", default=BASE, help="the config that it is compared with (%(default)s)")
    add("--budgets", type=scaling.number, nargs="+", default=BUDGETS, metavar="C", help="training FLOPs (3e11 1e12)")
    add("--seeds", type=scaling.count, default=3, metavar="N", help="of each side at each budget (%(default)s)")
    add("--minutes", type=scaling.number, metavar="M", help="instead: as many seeds as fit in, two at least")
    add("--eval-tokens", type=int, default=0, metavar="N", help="of each held-out domain; 0 is all (%(default)s)")
    add("--jobs", type=scaling.count, default=2, metavar="N", help="runs at a time, one core each (%(default)s)")
    add("--law", type=scaling.not_negative, nargs=2, metavar=("E", "ALPHA"), help="instead of the ladder's")
    add("--out", default="out/gate", metavar="DIR", help="keeps the runs (%(default)s)")
    add("--json", metavar="FILE", help="everything, as JSON")
