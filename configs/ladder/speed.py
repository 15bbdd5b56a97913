"""Step times of the rungs, all in one process, in turns, so that they compare.

    python configs/ladder/speed.py [TABLE]              (configs/ladder/rung_runs/runs.csv)

Give it a quiet machine: what else runs there ends up in the numbers, and the runs' own tokens per second
depend on what the machine did that day. Every row of the table with seed 0 takes a few steps in each of
12 rounds, and its time is the smallest. Puts them into speed.csv beside the table, which figures.py reads."""
import shlex
import sys
import time
from pathlib import Path

LADDER = Path(__file__).resolve().parent
sys.path.insert(0, str(LADDER.parents[1]))

import jax          # noqa: E402

import data         # noqa: E402
import model        # noqa: E402
import scaling      # noqa: E402
import train        # noqa: E402
from configs.ladder import plan  # noqa: E402

ROUNDS, STEPS = 12, 3


def runner(base, overrides):
    """A function that takes STEPS steps of a run; and its FLOPs a step, the head counted."""
    c, t = train.load_config(base, shlex.split(overrides))
    mesh, mixture = train.make_mesh(c, t), train.open_data(c, t)
    state = jax.jit(lambda: train.make_state(c, t, jax.random.key(0)),
                    out_shardings=train.state_shardings(c, t, mesh))()
    step = train.make_train_step(c, t, mesh)
    rows = data.batch_at(mixture, 0, t.batch_size, c.seq_len, t.seed, train.local_rows(t.batch_size, mesh))
    batch = train.to_global_batch(rows, mesh, t.accumulate)

    def run():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    run()                                               # compiles
    return run, model.count(c).mfu_flops * t.batch_size * c.seq_len


def main(words):
    scaling.need(len(words) < 2, "command line", "a table", " ".join(words), "name one")
    table = Path(*words or [LADDER / "rung_runs" / "runs.csv"])
    _, rows = scaling.read_table(table, "config", "base", "overrides")
    runners = {row["config"]: runner(row["base"], row["overrides"])
               for row in rows if not plan.without_seed(row["overrides"])[1]}
    scaling.need(runners, table, "rows with seed 0", "none", "add one")
    best = dict.fromkeys(runners, float("inf"))
    for _ in range(ROUNDS):
        for name, (run, _) in runners.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - start) / STEPS)
    times = [dict(config=name, milliseconds=f"{1e3 * best[name]:.3f}", flops_per_second=f"{flops / best[name]:.6g}",
                  commit=train.git_commit()) for name, (_, flops) in runners.items()]
    for name, (_, flops) in runners.items():
        print(f"{name:40s} {1e3 * best[name]:8.1f} ms  {flops / best[name] / 1e9:7.2f} GFLOP/s")
    plan.put_rows(table.parent / "speed.csv", *times)


if __name__ == "__main__":
    sys.exit(scaling.guarded("speed.py", lambda: main(sys.argv[1:]), train.ConfigError, data.DataError))
