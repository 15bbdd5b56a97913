"""Puts a fault into a real run, and reads what came of it.

Run:  python tests/inject.py FAULT=WHEN CONFIG [--key=value ...]      train.py with one fault in it

The program is untouched. A fault is put into a function of data.py, of orbax or of the standard library that
train.py calls, and strikes at its WHEN-th call (a number, or FIRST-LAST). tests/test_faults.py says what must
come of each. It and tests/test_processes.py use the functions above main as a module."""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import train

STEPS, SAVE = 12, 4             # of a run with faults in it, and between its checkpoints
KEYS = f"""
num_layers = 1
steps = {STEPS}
log_every = 1
eval_every = 6
save_every = {SAVE}
keep = 3
remat = "none"
sample_tokens = 0
devices = 1
"""
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def command(config, run, *fault, keys=()):
    """The words that train a config in a run directory, with a fault or without."""
    script = [ROOT / "tests" / "inject.py", *fault] if fault else [ROOT / "train.py"]
    return [str(word) for word in (sys.executable, *script, config, f"--run_dir={run}", *keys)]


def go(config, run, *fault, keys=()):
    """Run that command to its end."""
    return subprocess.run(command(config, run, *fault, keys=keys), capture_output=True, text=True,
                          timeout=600, env=ENVIRONMENT)


def checksums(run, step=STEPS, folder=None):
    """The checksums of all arrays of a checkpoint, as written beside them. folder: checkpoint_dir."""
    folder = folder or run / "checkpoints"
    return json.loads((folder / str(step) / "record" / "metadata").read_text())["arrays"]


def outcome(run):
    """All that must be the same: the last state, and the loss of every step."""
    rows = train.read_rows(run / "metrics.jsonl")
    result = json.loads((run / "result.json").read_text())
    return checksums(run), [(r["step"], r["loss"], r["gnorm"], r["ema"]) for r in rows], result["domains"]


def events(run, kind):
    return [event for event in train.read_rows(run / "events.jsonl") if event["event"] == kind]


def saved_steps(run):
    folder = run / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def table(counts):
    """The lines of the table in tests/README.md. counts: {(outcome, fault): n}; "injected" is an outcome too."""
    lines = ["| fault | injected | survived, bit-equal | stopped with a reason | lost |", "|---|---|---|---|---|"]
    for name in [*dict.fromkeys(fault for _, fault in counts), "all"]:
        injected, survived, stopped = (
            sum(n for (how, fault), n in counts.items() if how == wanted and name in (fault, "all"))
            for wanted in ("injected", "survived", "stopped"))
        lost = injected - survived - stopped
        lines.append(f"| {name} | {injected} | {survived} | {stopped} | {lost} |")
    return lines


# ----------------------------------------------------------------------------------------------- the faults

def at_call(module, name, when, strike):
    """Let strike(function) stand in for calls number `when` of a function."""
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


def send_often(number):
    """Ten times within a second, from outside of the main thread: wrapper and scheduler both forward it."""
    def often():
        for _ in range(10):
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    def strike(call):
        threading.Thread(target=often, daemon=True).start()
        return call()
    return strike


def full_disk(call):
    """No file may grow past 100 bytes from here on: what a full disk does, for a user without a disk to fill."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return call()


def full_disk_for_a_while(managers, wait):
    """A disk that is full until the write of the last of these managers has ended."""
    def strike(call):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        result = full_disk(call)
        try:
            wait(managers[-1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return result
    return strike


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


def lose_lock(call):
    """Remove the lock file of the run directory, as people do with lock files."""
    (run,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--run_dir=")]
    Path(run, "lock").unlink()
    return call()


def inject(name, when):
    at_batch = {"kill": send(signal.SIGKILL), "term": send(signal.SIGTERM), "int": send(signal.SIGINT),
                "hup": send(signal.SIGHUP), "terms": send_often(signal.SIGTERM),
                "nan": weights(float("nan")), "inf": weights(float("inf")), "noise": noise, "stall": stall,
                "lock-removed": lose_lock}
    at_eval = {"kill-in-eval": send(signal.SIGKILL), "term-in-eval": send(signal.SIGTERM)}
    at_write = {"kill-in-preparation": send(signal.SIGKILL), "term-in-preparation": send(signal.SIGTERM),
                "full-in-preparation": full_disk}
    if name in at_batch:
        at_call(data, "batch_at", when, at_batch[name])
    elif name in at_eval:
        at_call(data, "heldout_batches", when, at_eval[name])
    elif name in at_write:
        at_call(data.ShardWriter, "write", when, at_write[name])
    elif name.endswith("-save"):
        import orbax.checkpoint as ocp
        managers, init = [], ocp.CheckpointManager.__init__

        def remember(self, *args, **kwargs):
            managers.append(self)
            init(self, *args, **kwargs)
        ocp.CheckpointManager.__init__ = remember
        wait = ocp.CheckpointManager.wait_until_finished
        at_call(ocp.CheckpointManager, "save", when, {
            "kill-in-save": send(signal.SIGKILL), "term-in-save": send(signal.SIGTERM),
            "full-in-save": full_disk_for_a_while(managers, wait), "full-from-save": full_disk}[name])
    elif name == "clock":                       # runs backwards, a hundred times as fast
        start, forward = time.time(), time.time
        time.time = lambda: start - 100 * (forward() - start)
    else:
        sys.exit(f"inject.py: unknown fault {name!r}")


if __name__ == "__main__":
    name, _, when = sys.argv[1].partition("=")
    inject(name, when)
    sys.argv = [str(ROOT / "train.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
