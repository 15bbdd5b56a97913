"""When a model learns to copy from its context:  python configs/ladder/copying.py CONFIG [--key=value ...]

Trains a config and scores, 20 times in the run, rows whose second half repeats the first. The first half is random
held-out tokens, so only context predicts the second. LOG.md has what it printed for rungs/a_dense_adamw.py, with the
overrides of its rows at 3e13 and 1e14 in third/rungs.csv, and the tokens that third.py takes to begin, with

    --hidden_dim=64 --num_layers=2 --num_heads=2 --num_kv_heads=2 --head_dim=32 --expert_dim=32 --shared_dim=64
    --steps=1568 --batch_size=12

With these third/pilot.py, which lacks the key offset, never begins."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax          # noqa: E402
import numpy as np  # noqa: E402

import data         # noqa: E402
import kernels      # noqa: E402
import scaling      # noqa: E402
import train        # noqa: E402


def repeated_rows(mixture, rows, half, seed=0):
    """(tokens, targets), each [rows, 2 half]: random held-out tokens, twice."""
    ids = np.concatenate([stream.read(0, 4000) for stream in mixture.heldout.values()])
    ids = ids[ids != mixture.tokenizer.eot]
    x = np.random.default_rng(seed).choice(ids, (rows, half)).astype(np.int32)
    return np.concatenate([x, x], 1), np.concatenate([x[:, 1:], x, x[:, :1]], 1)


def main(config, words):
    c, t = train.load_config(config, words)
    mesh, mixture = train.make_mesh(c, t), train.open_data(c, t)
    step, state = train.make_train_step(c, t, mesh), train.first_state(c, t, mesh, mixture.tokenizer)
    score, half = train.make_eval_step(c, mesh, mixture.tokenizer.bytes_V), c.seq_len // 2
    tokens, targets = repeated_rows(mixture, t.batch_size, half)
    at = np.arange(2 * half)

    def loss(which):
        weights = np.broadcast_to(which, tokens.shape).astype(np.float32)
        batch = train.to_global_batch(data.Batch(tokens, targets, np.ones_like(tokens), weights), mesh)
        nats, count, _ = score(state.params, state.bias_LE, batch)
        return float(nats / count)

    for i in range(t.steps):
        rows = data.batch_at(mixture, i, t.batch_size, c.seq_len, t.seed)
        state, metrics = step(state, train.to_global_batch(rows, mesh, t.accumulate))
        if i == 0:
            jax.block_until_ready(metrics)
            kernels.fill_holes()
        if (i + 1) % max(1, t.steps // 20) == 0:
            seen = (i + 1) * t.batch_size * c.seq_len
            print(f"step {i + 1}, {seen / 1e6:.2f} million tokens: first half {loss(at < half - 1):.2f}, "
                  f"its repetition {loss((at >= half) & (at < 2 * half - 1)):.2f} nats", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    arguments, words = parser.parse_known_args()
    sys.exit(scaling.guarded("copying.py", lambda: main(arguments.config, words), train.ConfigError, data.DataError))
