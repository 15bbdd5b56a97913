"""Runs train.py with one fault in it:      python tests/inject.py FAULT=WHEN CONFIG [--key=value ...]

The program is untouched: a fault sits in a function of data.py, of orbax or of the standard library that train.py
calls, and strikes at its WHEN-th call. tests/test_faults.py lists what must come of each."""
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data


def at_call(module, name, when, strike):
    """Let strike(function, arguments) stand in for calls number `when` (a number, or FIRST-LAST) of a function."""
    first, _, last = when.partition("-")
    function, calls = getattr(module, name), [0]

    def struck(*args, **kwargs):
        calls[0] += 1
        due = int(first) <= calls[0] <= int(last or first)
        return strike(lambda: function(*args, **kwargs)) if due else function(*args, **kwargs)
    setattr(module, name, struck)


def send(number):
    def strike(call):
        result = call()
        os.kill(os.getpid(), number)
        return result
    return strike


def full_disk(call):
    """No file may grow past 100 bytes from here on: what a full disk does, for a user without a disk to fill."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return call()


def full_disk_for_a_while(call):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    manager = full_disk(call)
    try:
        ocp.CheckpointManager.wait_until_finished(managers[-1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return manager


def weights(value):
    def strike(call):
        batch = call()
        return batch._replace(weights_BS=batch.weights_BS * value)
    return strike


def noise(call):
    """A batch of another language: every token is one that the text does not have."""
    batch = call()
    return batch._replace(tokens_BS=batch.tokens_BS * 0 + 200, targets_BS=batch.targets_BS * 0 + 201)


def stall(call):
    time.sleep(1000)


name, _, when = sys.argv[1].partition("=")
sys.argv = [str(ROOT / "train.py"), *sys.argv[2:]]
if name in ("kill", "term", "int", "nan", "inf", "noise", "stall"):
    at_call(data, "batch_at", when, {"kill": send(signal.SIGKILL), "term": send(signal.SIGTERM),
                                     "int": send(signal.SIGINT), "nan": weights(float("nan")),
                                     "inf": weights(float("inf")), "noise": noise, "stall": stall}[name])
elif name in ("kill-in-eval", "term-in-eval"):
    at_call(data, "heldout_batches", when, send(signal.SIGKILL if name[0] == "k" else signal.SIGTERM))
elif name in ("kill-in-save", "term-in-save", "full-in-save", "full-from-save"):
    import orbax.checkpoint as ocp
    managers, init = [], ocp.CheckpointManager.__init__
    ocp.CheckpointManager.__init__ = lambda self, *a, **k: (managers.append(self), init(self, *a, **k))[1]
    at_call(ocp.CheckpointManager, "save", when, {
        "kill-in-save": send(signal.SIGKILL), "term-in-save": send(signal.SIGTERM),
        "full-in-save": full_disk_for_a_while, "full-from-save": full_disk}[name])
elif name in ("kill-in-preparation", "term-in-preparation", "full-in-preparation"):
    at_call(data._Shards, "write", when, {"kill-in-preparation": send(signal.SIGKILL),
                                          "term-in-preparation": send(signal.SIGTERM),
                                          "full-in-preparation": full_disk}[name])
elif name == "clock":                       # runs backwards, a hundred times as fast
    start, forward = time.time(), time.time
    time.time = lambda: start - 100 * (forward() - start)
else:
    sys.exit(f"inject.py: unknown fault {name!r}")
runpy.run_path(sys.argv[0], run_name="__main__")
