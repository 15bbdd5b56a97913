"""Train the rows of a table in few processes: one for all seeds of a shape, which compiles once.

    python configs/ladder/seeds.py TABLE [--share=I/N] [--curves=TABLE.csv]

For tables of many small runs, of which `scaling.py ladder --run` spends most of its time on starting, compiling
and drawing pages. A row gets the losses that `python train.py BASE OVERRIDES` gives, to the bit, but no run directory.
Several processes may work on one table: --share=0/2 and --share=1/2 take every other shape. --curves: a table for
`scaling.py curves`, which the training losses are added to."""

import argparse
import collections
import fcntl
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import scaling  # noqa: E402
from configs.ladder import curves  # noqa: E402
from configs.ladder import gate  # noqa: E402
from configs.ladder import plan  # noqa: E402


def shapes(table):
    """{(base, words without the seed): rows without a loss} of a table, the cheapest first."""
    rows, found = plan.planned_rows(table), collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: scaling.number(row["planned_flops"], table, "planned_flops")):
        waiting = found[row["base"], plan.without_seed(row["overrides"])[0]]    # also of shapes that are done:
        waiting += [] if row["loss"] else [row]                                 # the shares must not move
    return found


def keep_curve(path, run, curve):
    """Append the curve of a run to a table of `scaling.py curves`, which may be new, while others do so."""
    text = scaling.csv_text(curves.COLUMNS, curves.table_rows(run, curve[-1][0], curve))
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        new = file.seek(0, os.SEEK_END) == 0
        file.write(text if new else text.split("\n", 1)[1])


def main(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("--share", default="0/1", metavar="I/N")
    parser.add_argument("--curves", default="", metavar="TABLE.csv")
    a = parser.parse_args(words)
    number, of = map(int, a.share.split("/")) if re.fullmatch(r"\d{1,4}/\d{1,4}", a.share) else (0, 0)
    scaling.need(number < of, "--share", "I/N with I below N, such as 0/2", a.share, "correct it")
    for (base, words), rows in [*shapes(a.table).items()][number::of]:
        worker = gate.Worker(gate.Side(ROOT, base, (), "this code"))
        for row in rows:
            found = worker.ask("run", words, plan.without_seed(row["overrides"])[1])
            curve = found.pop("curve", [])              # none of a run that ended early
            if a.curves and curve:
                keep_curve(a.curves, plan.run_dir_of(row["overrides"]), curve)
            scaling.need(found["loss"] is not None, row["config"], "a loss", "a run that diverged", "lower its rates")
            plan.put_rows(a.table, row | found)
            print(f"{row['config']}: {found['loss']:.4f} in {found['seconds']:.0f} s", flush=True)
        worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(scaling.guarded("seeds.py", lambda: main(sys.argv[1:])))
