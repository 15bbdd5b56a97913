"""Trains and measures runs of one checkout for the gate: a line of JSON in, a line of JSON out.

    python configs/ladder/worker.py CHECKOUT CONFIG

A request is [name of a method of Runs, its arguments]. One process trains all seeds of a run, so it
compiles once. It uses CHECKOUT's own load_config, model.count, data, make_state, make_train_step and
evaluate. What a fork changes in train.loop or train.train is not seen; `source` tells the gate so."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace


@functools.cache
def meaning(path):
    """A text that changes with what a file does. Comments do not count, docstrings do."""
    return ast.dump(ast.parse(Path(path).read_bytes()))


def digest(paths, config):
    """8 letters that change with what these files do and with the config that was read."""
    return hashlib.sha256("\n".join([*map(meaning, sorted(paths)), config]).encode()).hexdigest()[:8]


def loaded(folder):
    """The files of a folder that this process has imported, such as rivals.py for a config."""
    files = [getattr(module, "__file__", None) for module in [*sys.modules.values()]]
    return {file for file in files if file and Path(folder) in Path(file).parents and not file.endswith("hlo.py")}


def curve_of(losses, c, t):
    """[step, rate of the matrices, mean loss since the row before] every t.log_every steps, as in metrics.jsonl.
    losses: None for a skipped update."""
    ends, rate = [*range(t.log_every, t.steps, t.log_every), t.steps], train.rates(c, t).matrix_lr
    parts = [[float(x) for x in losses[first:end] if x is not None] for first, end in zip([0, *ends], ends)]
    return [[end, rate * float(train.lr_multiplier(t, end - 1)), float(np.mean(part))]
            for end, part in zip(ends, parts) if part]


class Runs:
    """What can be asked. words: --key=value of a run, without its seed."""

    def __init__(self, checkout, config):
        self.checkout, self.config, self.kept = checkout, config, {}

    def count(self, words):
        """What a step costs, by this code's own count; and the digest of code and config."""
        c, t = train.load_config(self.config, words)
        n = model.count(c)
        t_anywhere = dataclasses.replace(t, run_dir="", data_dir="", compiled_dir="", checkpoint_dir="")
        return {"flops": n.mfu_flops * t.batch_size * c.seq_len,
                "code": digest(loaded(self.checkout), repr((c, t_anywhere))),
                "source": inspect.getsource(train.loop) + inspect.getsource(train.train)}

    def program(self, words):
        """Config, data and the compiled functions of a run."""
        if tuple(words) not in self.kept:
            c, t = train.load_config(self.config, words)
            if t.init_from:
                raise ValueError("init_from: expected '', found a run; the gate trains from the start")
            mesh, mixture = train.make_mesh(c, t), train.open_data(c, t)
            self.kept[tuple(words)] = SimpleNamespace(
                c=c, t=t, mesh=mesh, mixture=mixture, step=train.make_train_step(c, t, mesh),
                score=train.make_eval_step(c, mesh, mixture.tokenizer.bytes_V),
                make=jax.jit(functools.partial(train.make_state, c, t),
                             out_shardings=train.state_shardings(c, t, mesh)))
        return self.kept[tuple(words)]

    def begin(self, p, key):
        """The state before the first step. key: the seed of the weights."""
        return p.make(jax.random.key(key))

    def batch(self, p, i, seed):
        rows = data.batch_at(p.mixture, i, p.t.batch_size, p.c.seq_len, seed)
        return train.to_global_batch(rows, p.mesh, p.t.accumulate)

    def text(self, words):
        """Which tokenizer, and the held-out text that is scored, whatever tokens stand for it."""
        p, digest = self.program(words), hashlib.sha256()
        for name, stream in sorted(p.mixture.heldout.items()):
            ids = stream.read(0, stream.tokens)
            digest.update(repr((name, p.mixture.tokenizer.decode(ids), p.t.eval_tokens_final)).encode())
        return {"tokenizer": p.mixture.tokenizer.sha256, "heldout": digest.hexdigest()}

    def train(self, words, seed, key, losses=None):
        """Train one run and score it. seed: of the data; key: of the weights; losses: a list that gets the loss
        of every step. A run ends early, with a loss of null, where train.py would: after max_skips updates in
        a row that are not finite."""
        p = self.program(words)
        state, start, skips = self.begin(p, key), time.perf_counter(), 0
        for i in range(p.t.steps):
            state, metrics = p.step(state, self.batch(p, i, seed))
            if losses is not None:
                losses.append(None if metrics["skipped"] else metrics["loss"])
            if i == 0:                  # the step, or an evaluation, has just been compiled: see train.loop
                jax.block_until_ready(metrics)
                kernels.fill_holes()
            skips = skips + 1 if metrics["skipped"] else 0
            if skips >= p.t.max_skips:
                return {"loss": None, "bpb": None, "seconds": time.perf_counter() - start}
        seconds = time.perf_counter() - start
        domains = train.evaluate(state, p.score, p.mixture, p.c, p.t, p.mesh, p.t.eval_tokens_final)
        macro = domains["macro"] if math.isfinite(domains["macro"]["loss"]) else {"loss": None, "bpb": None}
        return macro | {"seconds": seconds} | {
            f"loss_{name}": domain["loss"] for name, domain in domains.items() if name != "macro"}

    def run(self, words, seed):
        """What a ladder's table says of a run, and its curve; without one it ended early."""
        from configs import report                      # not before: the digest is of what training imports
        p = self.program(words)
        facts = report.facts_of(p.c, dataclasses.replace(p.t, seed=seed), p.mixture)
        losses = []
        found = facts | self.train(words, seed, seed, losses)
        return found | {"curve": curve_of(losses, p.c, p.t)} if len(losses) == p.t.steps else found

    def look(self, words):
        """FLOPs that the traced step executes, and the memory of the compiled one, in bytes."""
        p = self.program(words)
        traced = p.step.trace(self.begin(p, 0), self.batch(p, 0, 0))
        memory = traced.lower().compile().memory_analysis()
        return {"executed": hlo.traced_flops(traced.jaxpr.jaxpr) * p.mesh.size,
                "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes}

    def seconds(self, words, steps):
        """Of a step, as a mean over some."""
        p = self.program(words)
        if not hasattr(p, "state"):
            p.batch = self.batch(p, 0, 0)
            p.state, _ = p.step(self.begin(p, 0), p.batch)
        jax.block_until_ready(p.state)
        start = time.perf_counter()
        for _ in range(steps):
            p.state, metrics = p.step(p.state, p.batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    checkout, config = sys.argv[1:]
    sys.path[0] = checkout
    import jax
    import numpy as np

    import data
    import kernels
    import model
    import train
    from tests import hlo
    answers, runs = sys.stdout, Runs(checkout, config)
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            name, arguments = json.loads(line)
            try:
                said = getattr(runs, name)(*arguments)
            except (ValueError, OSError, data.DataError) as error:
                said = {"error": " ".join(str(error).split())}
            print(json.dumps(said), file=answers, flush=True)
