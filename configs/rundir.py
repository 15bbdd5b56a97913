"""Whether a run may start in its directories: whose they are, what they hold, what has changed.

Nothing that a run has written is cut, overwritten or continued as another run. Before a step is
taken, config.json, the records of the checkpoints, the events and the command are compared. Where
they disagree the program stops, names both sides and says what to do."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

import data
import model
import train

# ------------------------------------------------------------------------------ one owner at a time

LOCKS = {}                          # {lock file that this process holds: what it wrote there}
NO_LOCKS = errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK


def lock_file(folder):
    """The path of a directory's lock, the same however the directory is spelled."""
    return (folder if "://" in str(folder) else Path(folder).resolve()) / "lock"


def lock_owner(path):
    """What a lock file says."""
    return path.read_bytes().decode(errors="replace") if path.exists() else "none"


@contextlib.contextmanager
def folder_lock(folder, key="run_dir"):
    """Make a directory and hold its lock. ConfigError if another process trains there. Where there
    are no locks, as in a bucket, the older of two trainers finds out at its next save."""
    path, file = lock_file(folder), contextlib.nullcontext()
    ours = path in LOCKS                                            # run_dir is checkpoint_dir
    owner = f"process {os.getpid()} of {os.uname().nodename} since {time.ctime()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "://" in str(path):
            raise OSError(errno.ENOTSUP, "a bucket")
        file = open(path, "a")
        if not ours:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # ends with the process
    except BlockingIOError:
        raise train.ConfigError(f"{folder}: another process is training there ({lock_owner(path)}"
                                f"); wait for it, stop it, or choose another --{key}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            train.refuse(key, "a directory that can be written",
                         f"{folder} ({error.strerror})")
        train.log(f"lock      {folder}: no locks here ({error.strerror}). If another process "
                  f"starts to train here, this one stops at its next save")
    path.write_text(owner)
    LOCKS[path] = owner
    try:
        with file:
            yield
    finally:
        if not ours:
            LOCKS.pop(path, None)


def check_lock(folder):
    """Before a write: ConfigError if the lock of the directory was taken from this process."""
    path = lock_file(folder)
    if path in LOCKS:
        try:
            found = lock_owner(path)
        except Exception as error:                  # a bucket out of reach; the save will tell
            if "://" not in str(path):
                raise
            return train.log(f"warning   {path} cannot be read ({train.one_line(error)}); going on")
        if found != LOCKS[path]:
            train.refuse(path, f"the lock of {LOCKS[path]}", found, "another process may train "
                         "there, so this one writes no more; what was saved is sound")


# ----------------------------------------------------------------------- many processes, one answer

def everywhere(call):
    """call() in every process of a run, and its value. If one is refused, all are, and alike."""
    if not jax.distributed.is_initialized():
        return call()
    value, why = None, ""
    try:
        value = call()
    except (train.ConfigError, data.DataError) as error:
        why = str(error)
    for number, reason in enumerate(train.gather(why)):
        if reason:
            jax.distributed.shutdown()          # waits until all are here: none is lost to another
            raise train.ConfigError(reason + (f" (process {number})" if number else ""))
    return value


def agree(facts):
    """ConfigError if the processes of a run differ in {name: value}."""
    places = ("data_dir", "compiled_dir")       # these may differ from host to host
    all_facts = train.gather({key: facts[key] for key in sorted(facts) if key not in places})
    for number, theirs in enumerate(all_facts):
        for key, ours in all_facts[0].items():
            if theirs.get(key) != ours:
                raise train.ConfigError(
                    f"processes 0 and {number} of this run disagree: {key}={ours!r} and {key}="
                    f"{theirs.get(key)!r}; start the same code on the same data, with one command")


def shared(checkpoints, seconds=60):
    """ConfigError unless all processes of a run see the lock that process 0 has just written there. Each writes
    its part of a checkpoint: on disks of their own the first save would wait for ever for the others' parts."""
    path, end = lock_file(checkpoints.folder), time.monotonic() + seconds
    owner = train.gather(LOCKS.get(path))[0]
    while checkpoints.reach(lambda: lock_owner(path)) != owner:     # a network's disk may show a new file late
        if time.monotonic() > end:
            train.refuse("checkpoint_dir", "one folder for all processes, on a network's disk or gs://",
                         f"{checkpoints.folder} on {os.uname().nodename}, without the lock of {owner}",
                         "choose a folder that all hosts see")
        time.sleep(1)


# ---------------------------------------------------------------------------------- what a run is

IMMUTABLE = ("optimizer", "batch_size", "seed")     # of the training
# of the model; the 129B run took up "ragged" late [marin #4697]
RUNTIME = ("exchange", "remat", "weights_over")
SHAPING = ("steps", "recipe", "adam_lr", "matrix_lr", "lr_scale", "adam_lr_scale", "weight_decay",
           "beta1", "beta2", "eps", "momentum", "schedule", "warmup", "decay", "min_lr_ratio",
           "clip", "skip_sigma", "init_from", "keep_optimizer")   # may change while steps are left


IMPORTS = "configs.hopper", "tests.rivals"      # what a config adds kernels and rules with


def describe_run(c, t):
    """The content of config.json, but for "data", the hash of what is trained on."""
    versions = {package.__name__: package.__version__ for package in (jax, np, optax)}
    code = [path.read_bytes() for path in sorted(Path(train.__file__).parent.glob("*.py"))]
    return {"model": dataclasses.asdict(c), "train": json.loads(json.dumps(dataclasses.asdict(t))),
            "data": "", "counts": model.count(c)._asdict(), "commit": train.git_commit(),
            "code": hashlib.sha256(b"".join(code)).hexdigest()[:12],
            "imports": [name for name in IMPORTS if name in sys.modules],
            "versions": versions | {"python": sys.version.split()[0]}}


def identity(config):
    """Of the content of a config.json, what must not change within a run."""
    fixed = {key: value for key, value in config["model"].items() if key not in RUNTIME}
    return fixed | {key: config["train"][key] for key in IMMUTABLE} | {"data": config["data"]}


def flat(config):
    """Of the content of a config.json, all that is chosen, and what ran it: {name: value}."""
    rest = {key: config[key] for key in ("data", "commit", "code") if key in config}
    return config["model"] | config["train"] | config["versions"] | rest


KINDS = {key.name: {int: (int,), float: (int, float), bool: (bool,), tuple: (list,)}.get(key.type, (str,))
         for config in (model.ModelConfig, train.TrainConfig) for key in dataclasses.fields(config)}


def whole(config):
    """Whether this is the content of a config.json, and each key has a value of its kind. One that
    lacks a part raises KeyError, TypeError or AttributeError."""
    chosen = config["model"] | config["train"]
    return (isinstance(config["data"], str) and bool(identity(config) and flat(config))
            and all(type(chosen[key]) in KINDS[key] for key in chosen.keys() & KINDS))


def read_config(run):
    """The content of a run directory's config.json; None if there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError,
                             AttributeError):
        config = json.loads(Path(run, "config.json").read_bytes())
        return config if whole(config) else None


def newest_record(checkpoints):
    """The newest record of a checkpoint that can be read, or None."""
    for step in checkpoints.steps():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            record = checkpoints.record(step)
            if whole(record["config"]):
                return record


def compare(place, then, now, keys, why):
    """ConfigError if two contents of config.json differ in one of the keys."""
    old, new = flat(then), flat(now)
    for key in keys:
        if old.get(key) != new.get(key):
            sides = [f"{key}={config.get(key)!r}" for config in (old, new)]
            if key == "data":
                sides = [f"mixture={config.get('mixture')}, tokenizer={config.get('tokenizer')!r} "
                         f"(sha256 {config[key][:12]})" for config in (old, new)]
            raise train.ConfigError(
                f"{place}: holds a run with {sides[0]}, found {sides[1]}; {why}")


# --------------------------------------------------------------------------------- before a start

def check_run(c, t, mixture, checkpoints):
    """The content of config.json. Writes nothing; ConfigError if run_dir or checkpoint_dir holds
    another run."""
    now = describe_run(c, t) | {"data": mixture.sha256}
    file, steps = Path(t.run_dir, "config.json"), checkpoints.steps()
    written, record = read_config(t.run_dir), newest_record(checkpoints)
    saved = record and record["config"]
    if file.exists() and not (written or saved):
        train.refuse(file, "the config of a run", "something else", train.ANEW)
    for place, then in ((t.run_dir, written), (checkpoints.folder, saved)):
        if then:
            compare(place, then, now, identity(now), f"a run cannot change this: {train.ANEW}")
    if steps and steps[0] > t.steps:
        train.refuse("steps", f"at least {steps[0]}, reached by the run in {t.run_dir}", t.steps,
                     train.ANEW)
    return now


def check_start(t, now, checkpoints):
    """Before a step: ConfigError if checkpoints are lost or another run's, or if no step is left
    and the config is not the one that the run was trained with. Writes nothing."""
    run, folder, record = Path(t.run_dir), checkpoints.folder, newest_record(checkpoints)
    rows, events = (train.read_rows(run / name) for name in ("metrics.jsonl", "events.jsonl"))
    reached = max((event.get("step", 0) for event in events if event.get("event") in
                   ("saved", "stopped", "resume", "done")), default=0)
    written = read_config(run) or ((run / "config.json").exists() and now)
    last = rows[-1].get("step", 0) if rows else 0
    if written and not any(event.get("event") == "save_failed" for event in events):
        every = written["train"].get("save_every", t.save_every)
        # a save begins when the one before it is done
        reached = reached or (last > 2 * every) * every
    if not checkpoints.steps() and (reached or (run / "result.json").exists()):
        where = written["train"].get("checkpoint_dir") if written else ""
        train.refuse(run, f"a checkpoint (a state of step {reached or last} was saved, the last "
                     f"row of metrics.jsonl is of step {last})", f"none in {folder}",
                     "to go on, give the --checkpoint_dir that has them"
                     + (f" (it was {where})" if where else "") + "; to draw the page of a finished "
                     f"run again, run python configs/report.py {run}; for a new run, {train.ANEW}")
    if record:
        then = record["config"]
        keys = [key for key in SHAPING if key in then["train"]]
        if not written or written["train"].get("run_dir") != then["train"].get("run_dir"):
            compare(folder, then, now, keys, f"its checkpoints are of the run in "
                    f"{then['train'].get('run_dir')}: go on with the keys of that run, or choose "
                    f"another --checkpoint_dir for {run}")
        if record["step"] == t.steps:
            compare(run, then, now, keys, f"it is finished, and no step is left that could use "
                    f"this: for more steps raise --steps, else {train.ANEW}")


def enter(c, t, mixture, checkpoints, stack, fresh):
    """Lock the directories of a run, until the ExitStack ends, and check that it may start."""
    from configs import process
    run, folder = Path(t.run_dir), checkpoints.folder
    agree({"data": mixture.sha256})
    if train.is_main_process():
        if "://" in str(folder):
            checkpoints.reach(lambda: process.probe(folder))        # within a minute, or one line
        stack.enter_context(folder_lock(run))
        if fresh:
            with folder_lock(folder, "checkpoint_dir"):
                move_aside(run, folder)
        stack.enter_context(folder_lock(folder, "checkpoint_dir"))
        check_start(t, check_run(c, t, mixture, checkpoints), checkpoints)


def check_memory(c, t, mesh):
    """ConfigError if this machine cannot hold the state and its gradients: on a CPU, XLA would wait
    for ever for memory that it cannot have."""
    size = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
               for a in jax.tree.leaves(train.abstract_state(c, t, mesh))) * len(mesh.local_devices)
    try:
        if mesh.devices.flat[0].platform == "cpu":
            np.empty(size * 4 // 3, np.uint8)       # asks for it, and touches none of it
    except MemoryError:
        train.refuse("memory", f"{size * 4 / 3 / 2**30:.1f} GiB for weights, gradients and moments",
                     "less", "choose a smaller model")


RUN_FILES = ("config.json", "*.jsonl", "result*.json", "report*.html", "sample*.txt", "log.txt",
             "plots", "tokenizer.tiktoken*", "diff*.patch", "checkpoints")


def move_aside(run, folder):
    """--fresh: what a run has left in run_dir and checkpoint_dir goes into a folder old-<now>."""
    old = time.strftime("old-%Y%m%d-%H%M%S")
    for place, patterns in ((run, RUN_FILES), (folder, ("[0-9]*", "broken-*"))):
        for path in [path for pattern in patterns for path in place.glob(pattern)]:
            (place / old).mkdir(exist_ok=True)
            path.rename(place / old / path.name)
            train.log(f"fresh     {path} is now {place / old / path.name}")


def saver(run, checkpoints, config, kept):
    """A function that begins to save a state, and says what came of that. kept: whether one is
    saved already; if the first one cannot be, the run ends, for nothing would be kept of it."""
    told = None
    def save(state):
        nonlocal kept, told
        check_lock(checkpoints.folder)
        if train.is_main_process():
            data.to_disk(run / "metrics.jsonl", run / "events.jsonl", run)
        before = checkpoints.saved
        if failed := checkpoints.save(state, config) or not kept and checkpoints.wait():
            train.log_event(run, "save_failed", why=failed)
            if not kept:
                raise train.TemporaryError(f"{checkpoints.folder}: the first checkpoint could not "
                                           f"be written, so nothing would be kept ({failed})")
            train.log(f"warning   a checkpoint could not be written ({failed}); going on")
        else:
            done = before if kept else checkpoints.saved        # the first one has been waited for
            if done not in (None, told) and (before != checkpoints.saved):
                train.log_event(run, "saved", step=done)
            told = done
        kept = True
    return save


def keep_results(run, step, steps):
    """Before a run goes on: results of an earlier end get its number of steps into their names."""
    if step == steps:
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        config, result = read_config(run), json.loads((run / "result.json").read_bytes())
        step = result["tokens"] // config["train"]["batch_size"] // config["model"]["seq_len"]
    tag = f"step{step}"
    while (run / f"result-{tag}.json").exists():
        tag += "-again"
    for path in [run / name for name in ("result.json", "report.html", "sample.txt")]:
        if train.is_main_process() and path.exists():
            path.rename(path.with_stem(f"{path.stem}-{tag}"))
            train.log(f"results   {path} is now {path.stem}-{tag}{path.suffix}")


def write_config(c, t, now, checkpoints):
    """Write config.json; what changed since the last start becomes an event and a printed line."""
    run, record, old = Path(t.run_dir), newest_record(checkpoints), read_config(t.run_dir)
    if record and not old and (run / "config.json").exists():
        train.log_event(run, "config_restored", step=record["step"])
        train.log(f"restored  {run}/config.json was damaged; the record of the checkpoint of step "
                  f"{record['step']} holds it too")
    before, after = flat(old or (record or {"config": now})["config"]), flat(now)
    changed = {k: [before[k], v] for k, v in after.items() if before.get(k, v) != v}
    if changed:
        train.log_event(run, "config_changed", keys=changed)
        train.log("changed   " + ", ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in changed.items()))
    if record and changed.keys() & set(SHAPING):
        then = dataclasses.replace(t, **{k: before[k] for k in SHAPING if k in before})
        peaks = [f"{a:.3g} -> {b:.3g}" for a, b in zip(train.rates(c, then), train.rates(c, t))]
        share = [float(train.lr_multiplier(x, record["step"])) for x in (then, t)]
        train.log(f"rates     peaks of Adam {peaks[0]}, of matrices {peaks[1]}; after step "
                  f"{record['step']} they follow the new schedule: {share[0]:.2f} -> "
                  f"{share[1]:.2f} of the peak")
    if old and record and record["step"] == t.steps:        # finished, by that code
        now = now | {key: old[key] for key in ("commit", "code", "versions") if key in old}
    train.write(run / "config.json", json.dumps(now, indent=1))
