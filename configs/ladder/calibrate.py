"""Is the gate right? Base against base, variants of known worth, and the ideas that were tried.

    python configs/ladder/calibrate.py aa        base against base, 40 times at a tiny size: aa.csv
    python configs/ladder/calibrate.py known     the gate's verdict on each variant of KNOWN: verdicts.csv
    python configs/ladder/calibrate.py ideas     and on each patch in ideas/; words that follow are names of
                                                 variants, to judge no others, and options of the gate
    python configs/ladder/calibrate.py show      the tables, from these two files

All can be stopped and go on: a row is written as each run ends. They need the corpus, see corpus.py.

Two runs of one code with one seed are equal to the bit, so the base meets itself with the same data and
other initial weights: its true speed-up is 1, and pairs differ as they would after a harmless edit. At most
LIMIT of 40 gates may say "holds"; 2 are to be expected."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

import scaling  # noqa: E402
from configs.ladder import figures  # noqa: E402
from configs.ladder import gate  # noqa: E402
from configs.ladder import plan  # noqa: E402

GATES, SEEDS, LIMIT = 40, 3, 3
AA_BUDGETS = 1.5e9, 3e9                 # 15 and 30 steps of 4 sequences at width 16: about a second each
AA_RULE = replace(gate.RULE, batch=4)
AA_TOKENS = 2_048                       # of each held-out domain
AA, VERDICTS = FOLDER / "aa.csv", FOLDER / "verdicts.csv"
IDEAS = "configs/ladder/ideas"

# name: (words of the gate, what is known). The rungs' table says so of MuonH with its rates (1.17 to 1.20 at
# 3e11 to 1.7e12, with 64 experts) and of 4 times the experts (1.03 to 1.24); the pilot's of rates 4 times off.
KNOWN = {
    "MuonH": (["--recipe=v2", "--adam_lr_scale=16"], "holds"),
    "twice the experts": (["--num_experts=32"], "holds from 1e12 on"),
    "no QK-norm": (["configs/ladder/ideas/no_qk_norm.patch"], "does not hold"),
    "rates 4 times higher": (["--lr_scale=4"], "does not hold"),
    "rates 4 times lower": (["--lr_scale=0.25"], "does not hold"),
}


# ------------------------------------------------------------------------------ base against base

def trainer(C):
    """A function (seed, key of the weights) -> held-out loss of the base at a budget."""
    widths, config = plan.widths_of(ROOT / gate.BASE, AA_RULE)
    sizes = plan.plan(C, widths, config, AA_RULE) | {"eval_tokens_final": AA_TOKENS}
    worker = gate.Worker(gate.Side(ROOT, str(ROOT / gate.BASE), (), "base"))
    return lambda seed, key: worker.ask("train", plan.words_of(sizes), seed, key)["loss"]


def base_against_base():
    """Fill aa.csv: a row for each run, in the order of the gates."""
    done = {(row["gate"], row["flops"], row["seed"], row["side"]) for row in read(AA)}
    runs = {}
    for number in range(GATES):
        for C in AA_BUDGETS:
            for seed in gate.seeds_of(C, SEEDS * GATES)[SEEDS * number:SEEDS * (number + 1)]:
                for side in ("base", "variant"):
                    if (str(number), f"{C:g}", str(seed), side) in done:
                        continue
                    runs[C] = runs.get(C) or trainer(C)
                    loss = runs[C](seed, seed + 500 * (side == "variant"))
                    scaling.need(loss, f"gate {number}", "a loss", "a run that diverged", "lower the rates")
                    add(AA, {"gate": number, "flops": f"{C:g}", "seed": seed, "side": side, "loss": f"{loss:.6f}"})
        print(f"gate {number}: {verdicts_of(read(AA))[-1]['verdict']}", flush=True)


def verdicts_of(rows):
    """What the gate finds in every whole gate of aa.csv."""
    gates, law = {}, figures.registered_law()
    for row in rows:
        C = gates.setdefault(row["gate"], {}).setdefault(float(row["flops"]), {"base": [], "variant": []})
        C[row["side"]].append(float(row["loss"]))
    whole = [found for found in gates.values() if len(found) == len(AA_BUDGETS) and all(
        len(losses) == SEEDS for sides in found.values() for losses in sides.values())]
    return [gate.compare({C: (sides["base"], sides["variant"]) for C, sides in found.items()}, law)
            for found in whole]


# -------------------------------------------------------------------------------- through the gate

def judge(tried, options):
    """Run the gate on {name: (words, what is known)} and write each verdict into verdicts.csv."""
    named = {name: tried[name] for name in tried if name in options}
    options = [word for word in options if word not in tried]
    tried = named or tried
    for name, (words, known) in tried.items():
        path = ROOT / "out/gate" / f"{name.replace(' ', '_')}.json"
        path.unlink(missing_ok=True)
        code = scaling.main(["gate", *words, *options, "--json", str(path)])
        if code == 2:
            return 2
        # without a file training diverged
        found = row_of(json.loads(path.read_text())) if path.is_file() else {
            "verdict": "does not hold", "budgets": ""}
        rows = {(row["name"], row["budgets"]): row for row in read(VERDICTS)}
        rows[name, found["budgets"]] = {"name": name, "words": " ".join([*words, *options]), "known": known} | found
        columns = dict.fromkeys(key for row in rows.values() for key in row)
        plan.write_table(VERDICTS, [*columns], [*rows.values()])
        print()
    return 0


def row_of(found):
    """What verdicts.csv keeps of a gate's JSON."""
    return {"verdict": found["verdict"], "more_seeds": found["more_seeds"] or "",
            "seeds": found["budgets"][0]["seeds"], "budgets": " ".join(f"{row['flops']:g}" for row in found["budgets"]),
            "differences": " ".join(f"{row['difference']:.4f}" for row in found["budgets"]),
            "standard_errors": " ".join(f"{row['standard_error']:.4f}" for row in found["budgets"]),
            "speedups": " ".join(f"{row['speedup']:.3f}" for row in found["budgets"]),
            "speedup": f"{found['speedup']:.3f}", "at_least": f"{found['at_least']:.3f}",
            "at_most": f"{found['at_most']:.3f}", "wall_clock": f"{found['wall_clock']:.3f}"}


# ------------------------------------------------------------------------------------------ tables

def read(path):
    return scaling.read_table(path)[1] if path.is_file() else []


def add(path, row):
    """Write a row behind the others, the names of the columns first."""
    new = not path.is_file()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, [*row], lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(row)


def show():
    """Print both tables; return 1 if base against base holds too often."""
    found = verdicts_of(read(AA))
    count = {name: sum(row["verdict"] == name for row in found) for name in gate.VERDICTS}
    below = sum(row["at_least"] < 1 for row in found)
    print(f"Base against base, {len(found)} gates of {SEEDS} seeds at C = "
          + " and ".join(f"{C:g}" for C in AA_BUDGETS) + ": " + ", ".join(f"{name} {n}" for name, n in count.items())
          + f"; the lower bound is below 1, correctly, in {below}\n")
    columns = "variant", "known", "budgets", "verdict", "speed-up, bounds", "by budget", "difference in nats"
    print(figures.markdown([*columns], [
        (row["name"], row["known"], row["budgets"].replace("+", "").replace(" ", ", "),
         row["verdict"] + (f", {row['more_seeds']} more seeds" if row["more_seeds"] else ""),
         f"{row['speedup']}, {row['at_least']} to {row['at_most']}", row["speedups"].replace(" ", ", "),
         ", ".join(f"{float(difference):+.4f}" for difference in row["differences"].split()))
        for row in read(VERDICTS)]))
    return int(count["holds"] > LIMIT)


def main(words):
    what, *options = words or ["--help"]
    if what == "aa":
        base_against_base()
        return show()
    if what in ("known", "ideas"):
        patches = {path.stem: ([str(path.relative_to(ROOT))], "") for path in sorted((ROOT / IDEAS).glob("*.patch"))}
        known = {words[0] for words, _ in KNOWN.values()}
        ideas = {name: tried for name, tried in patches.items() if tried[0][0] not in known}
        return judge(KNOWN if what == "known" else ideas, options)
    if what == "show":
        return show()
    print(__doc__)
    return 0 if what in ("--help", "-h") else 2


if __name__ == "__main__":
    sys.exit(scaling.guarded("calibrate.py", lambda: main(sys.argv[1:])))
