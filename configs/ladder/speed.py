"""Step times of the rungs, all in one process, in turns, so that they compare:  python configs/ladder/speed.py

Give it a quiet machine: what else runs there ends up in the numbers, and the runs' own tokens per second hold
whatever the machine did on their day. Every config of rung_runs/ with seed 0 takes a few steps in each of 12
rounds; its time is the smallest. Writes rung_runs/speed.csv, which `scaling.py figures` reads."""
import csv
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "rung_runs"
sys.path.insert(0, str(FOLDER.parents[2]))

import jax          # noqa: E402

import data         # noqa: E402
import kernels      # noqa: E402
import model        # noqa: E402
import train        # noqa: E402

ROUNDS, STEPS = 12, 3


def runner(path):
    """A function that takes STEPS steps of a config; and its FLOPs a step."""
    c, t = train.load_config(path)
    mesh, mixture = train.make_mesh(c, t), train.open_data(c, t)
    state = jax.jit(lambda: train.make_state(c, t, jax.random.key(0)),
                    out_shardings=train.state_shardings(c, t, mesh))()
    step = train.make_train_step(c, t, mesh)
    rows = data.batch_at(mixture, 0, t.batch_size, c.seq_len, t.seed, train.rows_here(t.batch_size, mesh))
    batch = train.put(rows, mesh, t.accumulate)

    def run():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        return metrics
    jax.block_until_ready(run())                        # compiles
    return run, model.count(c).mfu_flops * t.batch_size * c.seq_len


if __name__ == "__main__":
    paths = [path for path in sorted(FOLDER.glob("*.py")) if "_s" not in path.stem.rpartition("_d")[2]]
    runners = {path.stem: runner(path) for path in paths}
    train.fill_holes()                                  # as train.py does after its first step
    times = kernels.stopwatch({name: run for name, (run, _) in runners.items()}, ROUNDS)
    best = {name: seconds / STEPS for name, seconds in times.items()}
    with open(FOLDER / "speed.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["config", "milliseconds", "flops_per_second", "commit"])
        for name, (_, flops) in runners.items():
            table.writerow([name, f"{1e3 * best[name]:.3f}", f"{flops / best[name]:.6g}", train.git_commit()])
            print(f"{name:40s} {1e3 * best[name]:8.1f} ms  {flops / best[name] / 1e9:7.2f} GFLOP/s")
