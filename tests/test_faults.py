"""Every fault is put into a real run of train.py in a process of its own; nothing may be lost.

After a fault either the same command ends in the state and the logged losses of an undisturbed run, bit for bit
("survived"), or the program stops with one clear line, a non-zero exit code and every earlier good checkpoint in
place ("stopped"). Anything else is "lost" and fails. Tests say so with record_property; the counts are printed at the
end of the session.
pytest tests/test_faults.py runs a few; -m "slow or not slow" runs them all: minutes."""
import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import data
import train
from configs import report, rundir
from tests.inject import ENVIRONMENT, SAVE, STEPS, checksums, command, events, go, outcome, saved_steps

ROOT = Path(__file__).resolve().parent.parent
slow = pytest.mark.slow


def stopped(done, code, words):
    """A code of its own, and a clear line after which nothing is printed."""
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-800:]}\n{done.stderr[-2000:]}"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and re.search(words, last), last


def goes_on(run_config, run, plain, keys=()):
    """The same command once more ends exactly where the undisturbed run ended."""
    again = go(run_config, run, keys=keys)
    assert again.returncode == 0, again.stderr[-3000:]
    assert outcome(run) == outcome(plain)
    return again


def copy(plain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / "lock").unlink()
    return run


# ------------------------------------------------------------------------------------- processes that are ended

RNG = random.Random(20261124)
KILLS = [f"kill={step}" for step in sorted(RNG.sample(range(1, STEPS + 1), 10))]


@slow
@pytest.mark.parametrize("fault", [*KILLS, *(f"kill-in-save={i}" for i in (1, 2, 3)),
                                   *(f"kill-in-eval={i}" for i in (1, 2))])
def test_kill_9(run_config, plain, record_property, tmp_path, fault):
    name = "kill -9 " + {"kill": "at a step", "kill-in-save": "during a save",
                         "kill-in-eval": "during an evaluation"}[fault.partition("=")[0]]
    record_property("injected", name)
    assert go(run_config, tmp_path / "run", fault).returncode == -signal.SIGKILL
    goes_on(run_config, tmp_path / "run", plain)
    record_property("survived", name)


@slow
@pytest.mark.parametrize("fault", ["term=1", "term=5", "term=8", "int=7", "term-in-save=1", "term-in-save=2",
                                   "term-in-save=3", "term-in-eval=1", "term-in-eval=2"])
def test_sigterm_saves_and_exits_with_0(run_config, plain, record_property, tmp_path, fault):
    run, kind = tmp_path / "run", fault.partition("=")[0]
    name = {"term": "SIGTERM at a step", "int": "ctrl-C at a step", "term-in-save": "SIGTERM during a save",
            "term-in-eval": "SIGTERM during an evaluation"}[kind]
    record_property("injected", name)
    done = go(run_config, run, fault)
    last = fault in ("term-in-save=3", "term-in-eval=2")            # after the last step: nothing is left to save
    assert done.returncode == (130 if fault == "term-in-eval=2" else 0), done.stderr
    assert last or "saved. Run the same command to go on" in done.stdout
    assert saved_steps(run)[-1] == events(run, "stopped")[0]["step"] if not last else STEPS
    goes_on(run_config, run, plain)
    record_property("survived", name)


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("share", [RNG.random() for _ in range(6)], ids=lambda s: f"{s:.2f}")
def test_signals_at_random_moments(run_config, plain, record_property, tmp_path, number, share):
    """Wherever the process happens to be: imports, compilation, steps, saves, evaluation, the report."""
    name = f"{number.name} at a random moment of the process"
    record_property("injected", name)
    run, began = tmp_path / "run", time.time()
    process = subprocess.Popen(command(run_config, run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    time.sleep(share * 12)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    print(f"{number.name} after {share * 12:.1f} s of {time.time() - began:.1f}: exit {process.returncode}")
    assert process.returncode in ((0, 130, -signal.SIGTERM) if number == signal.SIGTERM else (0, -signal.SIGKILL))
    goes_on(run_config, run, plain)
    record_property("survived", name)


@slow
@pytest.mark.parametrize("fault, code", [("kill-in-preparation=7", -signal.SIGKILL),
                                         ("term-in-preparation=9", 130)])
def test_signals_during_preparation(run_config, plain, record_property, tmp_path, fault, code):
    name = ("kill -9" if fault[0] == "k" else "SIGTERM") + " during data preparation"
    record_property("injected", name)
    keys = [f"--data_dir={tmp_path / 'data'}"]
    assert go(run_config, tmp_path / "run", fault, keys=keys).returncode == code
    assert not list(tmp_path.glob("data/*/manifest.json")), "half a corpus does not look like a whole one"
    goes_on(run_config, tmp_path / "run", plain, keys)
    record_property("survived", name)


# ------------------------------------------------------------------------------------------- broken checkpoints

def flip_in_array(part):
    """One bit of one array of the newest checkpoint, rewritten by orbax: the file is whole, the value is not."""
    def harm(folder):
        import orbax.checkpoint as ocp
        state = folder / "state"
        handler = ocp.StandardCheckpointer()
        leaves = {name: np.array(x) for name, x in handler.restore(state.resolve()).items()}
        name = next(n for n in leaves if n.startswith(f".{part}") and leaves[n].ndim)
        bits = leaves[name].view(np.uint8).reshape(-1)
        bits[len(bits) // 2] ^= 1
        shutil.rmtree(state)
        handler.save(state.resolve(), leaves)
        handler.wait_until_finished()
        handler.close()
    return harm


def flip_at_random(seed):
    """One bit of the newest checkpoint's largest file of array data."""
    def harm(folder):
        path = max((p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"),
                   key=lambda p: p.stat().st_size)
        blob, rng = bytearray(path.read_bytes()), random.Random(seed)
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        path.write_bytes(blob)
    return harm


def flip_in_file(name):
    def harm(folder):
        for path in sorted(folder.rglob(name)):
            blob = bytearray(path.read_bytes())
            blob[len(blob) // 2] ^= 1
            path.write_bytes(blob)
    return harm


def truncate(folder):
    """Every part of the arrays by half: a single one, even the largest, can be one that nothing reads."""
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def lose(pattern):
    def harm(folder):
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return harm


HARM = {"truncated": [truncate],
        "bit-flipped in a parameter": [flip_in_array("params")],
        "bit-flipped in the optimizer state": [flip_in_array("opt")],
        "bit-flipped in the balancing bias": [flip_in_array("bias_LE")],
        "bit-flipped anywhere in its data": [flip_at_random(seed) for seed in range(6)],
        "bit-flipped in its metadata": [flip_in_file(n) for n in ("metadata", "_METADATA", "manifest.ocdbt",
                                                                  "_sharding", "_CHECKPOINT_METADATA")],
        "with a missing part": [lose("state/ocdbt.process_0"), lose("state/d"), lose("state"), lose("record")],
        "with a missing commit mark": [lose("commit_success.txt"), lose("*/commit_success.txt")]}
CASES = [(name, i) for name, harms in HARM.items() for i in range(len(harms))]


@slow
@pytest.mark.parametrize("name, i", CASES)
def test_the_newest_checkpoint_is_broken(run_config, plain, record_property, tmp_path, name, i):
    """It is named, kept, and the one before it is used."""
    record_property("injected", f"newest checkpoint {name}")
    run = copy(plain, tmp_path)
    HARM[name][i](run / "checkpoints" / str(STEPS))
    goes_on(run_config, run, plain)
    broken = events(run, "broken_checkpoint")
    kept = list(run.glob(f"checkpoints/broken-{STEPS}-*"))
    assert len(broken) == len(kept) == (saved_steps(run) == [4, 8, 12] and len(broken))
    if "bit-flipped in a p" in name or "opt" in name or "bias" in name:
        assert broken[0]["step"] == STEPS and "altered since it was written" in broken[0]["why"]
        assert events(run, "resume")[-1]["step"] == STEPS - SAVE
    record_property("survived", f"newest checkpoint {name}")


@slow
def test_all_checkpoints_are_broken(run_config, plain, record_property, tmp_path):
    """The program stops and touches nothing, so that a person can look."""
    record_property("injected", "all checkpoints broken")
    run = copy(plain, tmp_path)
    for step in (4, 8, 12):
        truncate(run / "checkpoints" / str(step))
    files = lambda: {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("lock", "log.txt")}
    before = files()
    stopped(go(run_config, run), 4, "none of 3 checkpoints can be trusted, and nothing was touched. step 12: .*8: ")
    assert files() == before
    record_property("stopped", "all checkpoints broken")


# --------------------------------------------------------------------------------------------------- full disks

@slow
@pytest.mark.parametrize("fault", ["full-in-save=1", "full-in-save=2", "full-in-save=3"])
def test_a_full_disk_during_a_save(run_config, plain, record_property, tmp_path, fault):
    """The run goes on and says so; only a failure of the first or the last save ends it, with 75."""
    record_property("injected", "disk full during a save, for a while")
    run = tmp_path / "run"
    done = go(run_config, run, fault)
    if fault[-1] == "1":
        stopped(done, 75, "the first checkpoint could not be written, so nothing would be kept")
        assert saved_steps(run) in ([], [4]) and not (run / "result.json").exists()
    elif fault[-1] == "3":
        stopped(done, 75, "the last checkpoint could not be written")
        # orbax may fail at a note that it writes after the commit: then 12 is there too, to be judged by its proof
        assert saved_steps(run) in ([4, 8], [4, 8, 12])
    else:
        assert done.returncode == 0 and "a checkpoint could not be written" in done.stdout, done.stderr
    assert len(events(run, "save_failed")) == 1
    goes_on(run_config, run, plain)
    assert not list(run.glob("checkpoints/*tmp*")), "what was half written is cleared away"
    record_property("survived", "disk full during a save, for a while")


@slow
def test_a_disk_that_stays_full(run_config, plain, record_property, tmp_path):
    record_property("injected", "disk full from a save on")
    run = tmp_path / "run"
    stopped(go(run_config, run, "full-from-save=2"), 75, "could not be written|cannot be written .File")
    assert saved_steps(run) == [4]
    goes_on(run_config, run, plain)
    record_property("survived", "disk full from a save on")


def test_a_log_that_cannot_be_written_is_named_and_the_exit_code_needs_no_stderr(run_config, tmp_path, monkeypatch):
    with pytest.raises(train.TemporaryError, match="nowhere/events.jsonl: cannot be written .No such file"):
        train.log_event(tmp_path / "nowhere", "start")
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))
    assert train.main([str(run_config), "--stepz=1"]) == 2


@slow
def test_a_full_disk_during_preparation(run_config, plain, record_property, tmp_path):
    record_property("injected", "disk full during data preparation")
    keys = [f"--data_dir={tmp_path / 'data'}"]
    done = go(run_config, tmp_path / "run", "full-in-preparation=2", keys=keys)
    stopped(done, 2, "cannot be written .File too large")
    assert not list((tmp_path / "data").iterdir()), "nothing half done is left"
    goes_on(run_config, tmp_path / "run", plain, keys)
    record_property("survived", "disk full during data preparation")


# ------------------------------------------------------------------------------------------ logs, clocks, locks

@slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_log_torn_in_the_middle_of_a_line(run_config, plain, record_property, tmp_path, name):
    record_property("injected", "metrics or events torn in a line")
    run = copy(plain, tmp_path)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    blob = (run / name).read_bytes()
    (run / name).write_bytes(blob[:len(blob) * 9 // 10] + b"\xff\x00")
    (run / "result.json").unlink()
    goes_on(run_config, run, plain)
    assert all(json.loads(line) for line in (run / name).read_text().splitlines())
    record_property("survived", "metrics or events torn in a line")


@slow
def test_a_clock_that_goes_backwards(run_config, plain, record_property, tmp_path):
    record_property("injected", "clock going backwards")
    done = go(run_config, tmp_path / "run", "clock=1")
    assert done.returncode == 0 and outcome(tmp_path / "run") == outcome(plain), done.stderr
    assert saved_steps(tmp_path / "run") == [4, 8, 12]
    record_property("survived", "clock going backwards")


def test_a_second_trainer_is_refused(tmp_path):
    """Quick form: the lock is held by this process. The slow form below has two real trainers."""
    tmp_path.joinpath("lock").write_text("process 7")
    with open(tmp_path / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(train.ConfigError, match="another process is training there .process 7.*--checkpoint_dir"):
            with rundir.folder_lock(tmp_path, "checkpoint_dir"):
                pass
    with rundir.folder_lock(tmp_path), rundir.folder_lock(tmp_path / "." / ""):     # run_dir is checkpoint_dir
        assert rundir.lock_file(tmp_path) in rundir.LOCKS
    assert not rundir.LOCKS


@pytest.mark.parametrize("harm", [Path.unlink, lambda lock: lock.write_bytes(b"process 7\xff"),
                                  lambda lock: lock.rename(lock.with_name("lock-2"))])
def test_a_lock_that_was_taken_away_ends_all_writing(tmp_path, harm):
    with rundir.folder_lock(tmp_path):
        train.log_event(tmp_path, "start")
        harm(tmp_path / "lock")
        with pytest.raises(train.ConfigError, match="lock: expected the lock of process .*this one writes no more"):
            train.log_event(tmp_path, "saved")
    assert [e["event"] for e in train.read_rows(tmp_path / "events.jsonl")] == ["start"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    with rundir.folder_lock(tmp_path):
        with rundir.folder_lock(tmp_path):
            pass
        (tmp_path / "lock").write_text("process 7 of another machine")
        rundir.LOCKS[rundir.lock_file(tmp_path)] = "process 6"                      # ... that started before
        with pytest.raises(train.ConfigError, match="found process 7"):
            rundir.check_lock(tmp_path)
    assert "no locks here (" in capsys.readouterr().out


@slow
def test_two_trainers_on_one_run_directory(run_config, plain, record_property, tmp_path):
    record_property("injected", "two trainers on one run directory")
    run = tmp_path / "run"
    first = subprocess.Popen(command(run_config, run, "stall=6"), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        while len(train.read_rows(run / "metrics.jsonl")) < 4:
            time.sleep(0.2)
        stopped(go(run_config, run), 2, "another process is training there")
        other = [f"--checkpoint_dir={run}/checkpoints"]
        stopped(go(run_config, tmp_path / "other", keys=other), 2, "training there.*another --checkpoint_dir")
    finally:
        first.kill()
        first.wait()
    goes_on(run_config, run, plain)
    record_property("stopped", "two trainers on one run directory")


@slow
def test_a_lock_that_is_removed_stops_the_trainer(run_config, plain, record_property, tmp_path):
    record_property("injected", "lock file removed while a trainer works")
    run = tmp_path / "run"
    stopped(go(run_config, run, "lock-removed=7"), 2, "this one writes no more")
    assert saved_steps(run) == [4] and [r["step"] for r in train.read_rows(run / "metrics.jsonl")] == [*range(1, 7)]
    goes_on(run_config, run, plain)
    record_property("stopped", "lock file removed while a trainer works")


@slow
def test_a_run_whose_checkpoints_are_not_found_is_not_begun_anew(run_config, plain, record_property, tmp_path):
    """The command without its --checkpoint_dir, then with other rates on those checkpoints, then as it was."""
    for name in ("checkpoints not found", "checkpoints of another run"):
        record_property("injected", name)
    run, keys = tmp_path / "run", [f"--checkpoint_dir={tmp_path}/states"]
    assert go(run_config, run, "kill=11", keys=keys).returncode == -signal.SIGKILL
    before = (run / "metrics.jsonl").read_bytes()
    stopped(go(run_config, run), 2, f"was saved.*none in {run}/checkpoints.*it was {tmp_path}/states.*--fresh")
    stopped(go(run_config, tmp_path / "b", keys=[*keys, "--matrix_lr=0.1"]), 2,
            "states: holds a run with matrix_lr=0.0, found matrix_lr=0.1; its checkpoints are of the run in")
    assert (run / "metrics.jsonl").read_bytes() == before and not (tmp_path / "b" / "config.json").exists()
    again = go(run_config, run, keys=keys)
    assert again.returncode == 0 and "now in metrics-ahead.jsonl; those steps are taken again" in again.stdout
    assert checksums(run, folder=tmp_path / "states") == checksums(plain)
    for name in ("checkpoints not found", "checkpoints of another run"):
        record_property("stopped", name)


# ----------------------------------------------------------------------------- whether a run may start: no training

MIXTURE = data.Mixture([], None, None, "0" * 64, {}, 0, 1.0, 2048)
START = {"steps": 40, "save_every": 5}


def hand_made(config, run, saved=(), written=True, rows=0, files=(), **keys):
    """A run directory with records of checkpoints, and no arrays. keys: what the run had been started with."""
    c, t = train.load_config(config, [f"--{k}={v}" for k, v in (START | {"run_dir": run} | keys).items()])
    now = rundir.describe_run(c, t) | {"data": MIXTURE.sha256}
    for step in saved:
        record = Path(train.Checkpoints(t).folder, f"{step}/record/metadata")
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"step": step, "config": now, "arrays": {".step": 7}}))
    Path(t.run_dir).mkdir(parents=True, exist_ok=True)
    if written:
        Path(t.run_dir, "config.json").write_text(json.dumps(now))
    logged = {"metrics.jsonl": train.json_lines({"step": i + 1} for i in range(rows))}
    for name, text in (logged | dict(files)).items():
        Path(t.run_dir, name).write_text(text)
    return Path(t.run_dir)


def start(config, run, **keys):
    """What train.train checks before it restores a state."""
    c, t = train.load_config(config, [f"--{k}={v}" for k, v in (START | {"run_dir": run} | keys).items()])
    checkpoints = train.Checkpoints(t)
    now = rundir.check_run(c, t, MIXTURE, checkpoints)
    rundir.check_start(t, now, checkpoints)
    rundir.write_config(c, t, now, checkpoints)


SAVED = {"events.jsonl": '{"event": "saved", "step": 20}\n'}
REFUSED = {
    "no checkpoint any more": (dict(rows=23, files=SAVED), {}, "state of step 20 was saved, the last row of "
                               "metrics.jsonl is of step 23.*found none in"),
    "no checkpoint and no events any more": (dict(rows=23), {}, "last row of metrics.jsonl is of step 23.*found none in"),
    "a finished run without checkpoints": (dict(rows=40, files={"result.json": "{}"}), {},
                                           "none in .*configs/report.py"),
    "a finished run, other rates": (dict(saved=[40]), dict(matrix_lr=0.001),
                                    "matrix_lr=0.0, found matrix_lr=0.001; it is finished.*raise --steps"),
    "a run cut short": (dict(saved=[20]), dict(steps=20), "steps=40, found steps=20; it is finished"),
    "checkpoints of another run": (dict(saved=[20], written=False, checkpoint_dir="X"),
                                   dict(run_dir="b", checkpoint_dir="X", adam_lr=0.1), "X: holds a run with adam_lr=0.0"),
    "checkpoints of another run, beside a config.json": (
        dict(saved=[20], run_dir="a", checkpoint_dir="X", matrix_lr=0.2), dict(checkpoint_dir="X"), "are of the run in a"),
    "checkpoints of another model": (dict(saved=[20], written=False, head_dim=16), {}, "head_dim=16, found head_dim=8"),
    "damaged, and no record": (dict(written=False, files={"config.json": "{"}), {}, "expected the config of a run")}


@pytest.mark.parametrize("name", REFUSED)
def test_a_start_that_disagrees_with_its_directories_is_refused_and_changes_nothing(
        run_config, tmp_path, monkeypatch, name):
    made, now, words = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    hand_made(run_config, **{"run": "run"} | made)
    if "beside" in name:
        hand_made(run_config, "run")
    files = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    before = files()
    with pytest.raises(train.ConfigError, match=words) as error:
        start(run_config, **{"run": "run"} | now)
    said = str(error.value)
    assert "delete" not in said and ("--run_dir" in said or "--checkpoint_dir" in said)
    assert files() == before


def test_other_text_is_refused_by_the_name_of_its_mixture(run_config, tmp_path, monkeypatch):
    run = hand_made(run_config, tmp_path / "run", saved=[20])
    monkeypatch.setitem(globals(), "MIXTURE", MIXTURE._replace(sha256="1" * 64))
    words = "mixture=.*nonsense.*sha256 000000000000.*found mixture=.*111111111111"
    with pytest.raises(train.ConfigError, match=words):
        start(run_config, run)


GOES_ON = {
    "killed before the first save": (dict(rows=7), {}, ""),
    "other rates while steps are left": (dict(saved=[20]), dict(matrix_lr=0.001), "matrix_lr: 0.0 -> 0.001"),
    "more steps": (dict(saved=[40]), dict(steps=80), r"steps: 40 -> 80(.|\n)*rates  .*after step 40 .*0.00 -> 0."),
    "the same run elsewhere": (dict(saved=[20], checkpoint_dir="X"), dict(run_dir="b", checkpoint_dir="X"), ""),
    "a damaged config.json": (dict(saved=[20], written=False, files={"config.json": ""}), {}, "restored .*step 20"),
    "how it is computed": (dict(saved=[40]), dict(remat="block", devices=2, log_every=7), "remat: 'none' -> 'block'")}


@pytest.mark.parametrize("name", GOES_ON)
def test_a_start_that_goes_on_says_what_has_changed(run_config, tmp_path, monkeypatch, capsys, name):
    made, now, words = GOES_ON[name]
    monkeypatch.chdir(tmp_path)
    run = hand_made(run_config, **{"run": "run"} | made)
    Path("b").mkdir()
    start(run_config, **{"run": "run"} | now)
    assert re.search(words, capsys.readouterr().out)
    if words:
        assert "config" in train.read_rows(run / "events.jsonl")[0]["event"]


def test_other_code_and_versions_are_told(run_config, tmp_path, monkeypatch, capsys):
    run = hand_made(run_config, tmp_path / "run", saved=[20], steps=20)
    monkeypatch.setattr(train, "git_commit", lambda: "abcdef1-dirty")
    monkeypatch.setattr(train.optax, "__version__", "9.9")
    before = rundir.read_config(run)
    start(run_config, run, steps=20)
    assert rundir.read_config(run)["commit"] == before["commit"], "no step is left: those that were taken count"
    capsys.readouterr()
    (run / "events.jsonl").unlink()
    start(run_config, run)
    said = capsys.readouterr().out
    assert re.search("changed .*commit: '.*' -> 'abcdef1-dirty'", said) and "-> '9.9'" in said
    (event,) = events(run, "config_changed")
    assert event["keys"].keys() == {"commit", "optax", "steps"}


def test_every_key_may_change_in_one_way():
    """A new key of TrainConfig has to be put into one of the lists, or named here as one that shapes nothing."""
    free = {"mixture", "tokenizer", "accumulate", "data_dir", "run_dir", "compiled_dir", "devices", "replicas",
            "expert_parallel", "expert_block", "topology", "peak_flops", "log_every", "eval_every", "eval_tokens",
            "save_every", "save_minutes", "keep", "keep_every", "checkpoint_dir", "max_skips", "stuck_minutes",
            "heartbeat_seconds", "prompt", "sample_tokens", "sample_seed", "temperature", "top_k", "eval_tokens_final",
            "init_tokenizer"}
    fields = {field.name for field in train.dataclasses.fields(train.TrainConfig)}
    assert fields == free | set(rundir.SHAPING) | set(rundir.IMMUTABLE)
    assert len(free) + len(rundir.SHAPING) + len(rundir.IMMUTABLE) == len(fields)


def test_fresh_moves_a_run_aside_and_results_keep_their_steps(run_config, tmp_path):
    run = hand_made(run_config, tmp_path / "run", saved=[20, 40], rows=3, files=SAVED | {"note.txt": "mine"})
    c, t = train.load_config(run_config)
    for name in ("result.json", "report.html", "sample.txt"):
        (run / name).write_text(json.dumps({"tokens": 40 * t.batch_size * c.seq_len}))
    rundir.keep_results(run, 40, 40)
    assert (run / "result.json").exists(), "no step is left: they are this run's"
    rundir.keep_results(run, 45, 80)
    (run / "result.json").write_text("{}")
    rundir.keep_results(run, 40, 80)
    kept = {"result-step40.json", "report-step40.html", "sample-step40.txt", "result-step40-again.json"}
    assert kept < {path.name for path in run.iterdir()} and not (run / "result.json").exists()
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    rundir.move_aside(run, run / "checkpoints")
    assert sorted(path.name[:4] for path in run.iterdir()) == ["note", "old-"]
    (old,) = run.glob("old-*")
    after = {path.relative_to(old): path.read_bytes() for path in old.rglob("*") if path.is_file()}
    assert after | {Path("note.txt"): b"mine"} == before
    start(run_config, run)


def test_a_bucket_that_does_not_answer_is_no_damage(run_config, tmp_path, monkeypatch):
    """A checkpoint that cannot be read for now must not be moved aside: the run ends with 75."""
    _, t = train.load_config(run_config, [f"--run_dir={tmp_path / 'run'}"])
    checkpoints, wanted = train.Checkpoints(t), {"w": jax.ShapeDtypeStruct((1,), np.float32)}
    for text, later in (("UNAVAILABLE: 503 from storage", True), ("DATA_LOSS: checksum", False)):
        class Handler:
            def restore(self, *arguments, text=text, **keys):
                raise ValueError(text)
        monkeypatch.setattr(checkpoints.ocp, "StandardCheckpointHandler", Handler)
        monkeypatch.setattr(checkpoints, "record", lambda step: {"arrays": {"w": 1}})
        if later:
            with pytest.raises(train.TemporaryError, match="step 3 could not be read now.*UNAVAILABLE"):
                checkpoints.read(3, wanted)
        else:
            assert checkpoints.read(3, wanted) == (None, f"ValueError: {text}")


def test_a_lock_in_a_bucket_out_of_reach_ends_no_training(monkeypatch, capsys):
    """What cannot be read for now is told; the save itself decides. On a disk it is an error."""
    class Bucket(type(Path())):
        def read_bytes(self):
            raise OSError("503")

        def exists(self):
            return True

    for name in ("gs://b/r", "/b/r"):
        path = Bucket("/lock")
        monkeypatch.setattr(rundir, "lock_file", lambda folder: path)
        monkeypatch.setattr(Bucket, "__str__", lambda self, name=name: f"{name}/lock")
        monkeypatch.setattr(rundir, "LOCKS", {path: "ours"})
        if name[0] == "/":
            with pytest.raises(OSError, match="503"):
                rundir.check_lock(name)
        else:
            rundir.check_lock(name)
            assert "gs://b/r/lock cannot be read" in capsys.readouterr().out


def test_a_folder_may_be_locked_twice_by_its_own_process(tmp_path):
    """--fresh with checkpoint_dir = run_dir: the inner lock must not let the outer one go."""
    with rundir.folder_lock(tmp_path):
        for _ in range(2):
            with rundir.folder_lock(tmp_path, "checkpoint_dir"):
                rundir.check_lock(tmp_path)
        assert rundir.lock_file(tmp_path) in rundir.LOCKS
        (tmp_path / "lock").write_text("another")
        with pytest.raises(train.ConfigError, match="found another"):
            rundir.check_lock(tmp_path)


def test_a_replay_is_of_the_run_whose_directory_it_names(run_config, tmp_path, capsys):
    """A damaged config.json is borne; that of a run with another seed would show batches that never were."""
    run, words = tmp_path / "run", [str(run_config), f"--run_dir={tmp_path / 'run'}", "--replay=2"]
    run.mkdir()
    (run / "config.json").write_text("")
    assert train.main(words) == 0
    c, t = train.load_config(run_config, [f"--run_dir={run}"])
    config = rundir.describe_run(c, t) | {"data": train.open_data(c, t).sha256}
    (run / "config.json").write_text(json.dumps(config))
    assert train.main(words) == 0 and train.main([*words, "--seed=5"]) == 2
    assert "its batches were made by that" in capsys.readouterr().err


def test_metrics_that_disagree_with_the_checkpoint_are_told_and_kept(run_config, tmp_path, capsys):
    c, t = train.load_config(run_config)
    row = dict(loss=3.0, ema=3.0, gnorm=1.0, skipped=0, lr=0.1, adam_lr=0.1, tokens_per_second=9.0)
    rows = [row | {"seconds": 0.1, "steps": 1} | {"step": i} for i in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text(train.json_lines(rows))
    report.Log(tmp_path, c, t, None, 7, None)
    assert not capsys.readouterr().out and not (tmp_path / "events.jsonl").exists()
    report.Log(tmp_path, c, t, None, 5, None)
    assert "later than step 5: 2" in capsys.readouterr().out and events(tmp_path, "metrics_ahead")[0]["steps"] == [6, 7]
    assert train.read_rows(tmp_path / "metrics-ahead.jsonl") == rows[5:]
    (tmp_path / "metrics.jsonl").write_text(train.json_lines([rows[0], rows[4]]))
    report.Log(tmp_path, c, t, None, 5, None)
    assert "covers 2 of 5 steps" in capsys.readouterr().out and events(tmp_path, "metrics_lost")[0]["steps"] == 3


def test_processes_of_one_run_that_disagree_are_refused(monkeypatch):
    monkeypatch.setattr(train, "gather", lambda facts: [facts, facts | {"seed": 1}])
    with pytest.raises(train.ConfigError, match="processes 0 and 1 of this run disagree: seed=0 and seed=1"):
        rundir.agree({"seed": 0, "data_dir": "x"})
    monkeypatch.setattr(train, "gather", lambda facts: [facts, facts])
    rundir.agree({"seed": 0})


def test_processes_with_checkpoints_on_disks_of_their_own_are_refused(run_config, tmp_path, monkeypatch):
    """tests/test_processes.py has the run, which once hung at its first save."""
    here, there = (train.Checkpoints(train.load_config(run_config, [f"--run_dir={tmp_path / name}"])[1])
                   for name in "ab")
    with rundir.folder_lock(here.folder):
        rundir.shared(here, seconds=0)
        (owner,) = train.gather(rundir.LOCKS[here.folder / "lock"])
        monkeypatch.setattr(train, "gather", lambda value: [owner, value])
        with pytest.raises(train.ConfigError, match=f"one folder for all processes.*{tmp_path}/b/.*{owner}; choose"):
            rundir.shared(there, seconds=0)
        there.folder.mkdir(parents=True)
        threading.Timer(0.5, lambda: (there.folder / "lock").write_text(owner)).start()
        rundir.shared(there, seconds=30)


def test_what_counts_has_been_synced(run_config, tmp_path, monkeypatch):
    """Files and the names of files, before a name says that they are whole."""
    run, done, fsync = tmp_path / "run", [], os.fsync
    c, t = train.load_config(run_config, [f"--run_dir={run}"])
    w = jax.numpy.ones(3)
    state = train.State(jax.numpy.int32(0), {"w": w}, {"m": w}, w, w)
    run.mkdir()
    monkeypatch.setattr(os, "fsync", lambda n: (done.append(os.readlink(f"/proc/self/fd/{n}")), fsync(n)))
    train.write(run / "config.json", "{}")
    assert done == [str(run / "config.tmp"), str(run)]
    checkpoints = train.Checkpoints(t)
    checkpoints.open()
    del done[:]
    assert checkpoints.save(state, {}) == "" and checkpoints.wait() == ""
    checkpoints.close()
    folder = run / "checkpoints"
    early = {path.replace(".orbax-checkpoint-tmp", "") for path in done if "checkpoint-tmp" in path}
    files = {str(path) for path in folder.rglob("*")}
    assert files - early == {f"{folder}/0/commit_success.txt"}
    assert f"{folder}/0/commit_success.txt" in done and done[-1] == str(folder)


@slow
def test_arrays_of_other_code_are_not_called_damaged(run_config, plain, tmp_path):
    run = copy(plain, tmp_path)
    for step in (4, 8, 12):
        path = run / f"checkpoints/{step}/record/metadata"
        record = json.loads(path.read_text())
        record["arrays"][".params['gain_D']"] = record["arrays"].pop(".params['head_DV']")
        path.write_text(json.dumps(record))
    c, t = train.load_config(run_config, [f"--run_dir={run}"])
    with pytest.raises(train.ConfigError, match="only this code has .*head_DV.*, only the checkpoint has .*gain_D"):
        train.Checkpoints(t).restore(c, t, train.make_mesh(c, t))


@pytest.mark.parametrize("keys, words", [
    (["--devices=100000", "--batch_size=100000"], "at most 1024 on a CPU, found 100000"),
    (["--vocab_size=1000000000000"], "memory: expected .* GiB for weights")])
def test_what_no_machine_has_is_refused_before_it_is_waited_for(run_config, tmp_path, capsys, keys, words):
    assert train.main([str(run_config), f"--run_dir={tmp_path / 'run'}", *keys]) == 2
    assert re.search(words, capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------- shards

def shards(tmp_path, kind):
    """A mixture of shards of another project, ids 0..255 at random, and how to write it down."""
    ids = np.random.default_rng(0).integers(0, 256, 20_000).astype("<u2")
    path = tmp_path / f"{kind}_000.bin"
    head = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0") if kind == "llmc" else b""
    path.write_bytes(head + ids.tobytes())
    return path, f"{kind}:{tmp_path}/{kind}_*.bin"


def edit(offset, new):
    def harm(path):
        blob = bytearray(path.read_bytes())
        blob[offset:offset + len(new)] = new
        path.write_bytes(blob)
    return harm


cut = lambda path: path.write_bytes(path.read_bytes()[:-7])
SHARD_FAULTS = {
    "shard truncated": [("llmc", cut, "promises 20,000 tokens"), ("nanogpt", cut, "expected whole tokens, found 19,996.5"),
                        ("prepared", cut, "expected .* bytes, found")],
    "shard with the wrong magic": [("llmc", edit(0, b"\1\2\3\4"), "expected llm.c's magic")],
    "shard with an id >= vocab": [("llmc", edit(2000, b"\xff\xff"), "65535, but bytes has 0 to 256"),
                                  ("nanogpt", edit(2000, b"\xff\xff"), "65535, but bytes has 0 to 256")],
    "shard replaced after the manifest": [("prepared", edit(100, b"x"), "its content has changed")]}


@slow
@pytest.mark.parametrize("fault, i", [(name, i) for name in SHARD_FAULTS for i in range(len(SHARD_FAULTS[name]))])
def test_broken_shards_are_refused_before_the_first_step(run_config, plain, record_property, tmp_path, fault, i):
    """In the middle of a run: it stops, its checkpoints stay, and with the shard mended it goes on."""
    record_property("injected", fault)
    kind, harm, words = SHARD_FAULTS[fault][i]
    run, keys = tmp_path / "run", [f"--data_dir={tmp_path / 'data'}"]
    if kind != "prepared":
        path, source = shards(tmp_path, kind)
        keys += [f"--mixture=(({source!r}, 1.0),)"]
    assert go(run_config, run, "term=6", keys=keys).returncode == 0
    if kind == "prepared":
        path = next((tmp_path / "data").glob("*/train-*.bin"))
    good, before = path.read_bytes(), checksums(run, 6)
    harm(path)
    stopped(go(run_config, run, keys=keys), 2, words)
    assert saved_steps(run) == [4, 6] and checksums(run, 6) == before
    path.write_bytes(good)
    assert go(run_config, run, keys=keys).returncode == 0
    record_property("stopped", fault)


# --------------------------------------------------------------------------- what is not finite, and what spikes

@pytest.fixture(scope="session")
def setup(run_config):
    c, t = train.load_config(run_config)
    mesh = train.make_mesh(c, t)
    return c, t, mesh, train.make_train_step(c, t, mesh)


def begin(c, t, mesh):
    return jax.jit(lambda: train.make_state(c, t, jax.random.key(0)),
                   out_shardings=train.state_shardings(c, t, mesh))()


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=slow)])
def test_a_loss_that_is_not_finite_leaves_the_state_alone(setup, value, synthetic, assert_same_bits):
    c, t, mesh, step = setup
    state, _ = step(begin(c, t, mesh), train.to_global_batch(synthetic(c, t, 0), mesh))
    before = jax.tree.map(np.array, state)
    batch = synthetic(c, t, 1)
    state, metrics = step(state, train.to_global_batch(batch._replace(weights_BS=batch.weights_BS * value), mesh))
    assert bool(metrics["skipped"]) and not np.isfinite(float(metrics["loss"]))
    assert_same_bits(before[1:], state[1:])
    assert int(state.step) == int(before.step) + 1
    state, metrics = step(state, train.to_global_batch(batch, mesh))
    assert not bool(metrics["skipped"]) and (np.asarray(state.bias_LE) != before.bias_LE).any()


@slow
def test_a_gradient_that_is_not_finite_leaves_the_state_alone(setup, monkeypatch, synthetic, assert_same_bits):
    """The loss is sound, its gradient is not: an infinity enters one weight's gradient on the way back."""
    c, t, mesh, _ = setup
    poison = jax.custom_vjp(lambda w: w)
    poison.defvjp(lambda w: (w, None), lambda _, g: (g.at[(0,) * g.ndim].set(np.inf),))
    loss = train.model.loss
    monkeypatch.setattr(train.model, "loss", lambda params, *rest: loss(
        params | {"final_norm_gain_D": poison(params["final_norm_gain_D"])}, *rest))
    state = begin(c, t, mesh)
    before = jax.tree.map(np.array, state)
    state, metrics = train.make_train_step(c, t, mesh)(state, train.to_global_batch(synthetic(c, t, 0), mesh))
    assert np.isfinite(float(metrics["loss"])) and not np.isfinite(float(metrics["gnorm"]))
    assert bool(metrics["skipped"])
    assert_same_bits(before[1:], state[1:])


def test_the_outlier_rule_by_hand(run_config):
    """6 sigma over 128 steps, after 64 of them; an outlier enters the window, what is not finite does not."""
    c, t = train.load_config(run_config, ["--skip_sigma=6.0"])
    rng = np.random.default_rng(0)
    state = train.State(0, None, None, None, -np.ones((2, train.WINDOW), np.float32))
    check = jax.jit(lambda state, loss, gnorm: train.accept_step(t, state, loss, gnorm))
    history = []
    for step in range(300):
        loss, gnorm = 3 + 0.1 * rng.standard_normal(2)
        loss += {40: 5, 150: 5, 151: 0.45}.get(step, 0)
        gnorm += {200: 5}.get(step, 0)
        loss = {250: np.nan}.get(step, loss)
        good, recent = check(state, np.float32(loss), np.float32(gnorm))
        expected = np.isfinite(loss)
        window = np.array(history[-train.WINDOW:], np.float32)
        if expected and len(history) >= 64:
            expected = ((loss, gnorm) <= window.mean(0) + 6 * window.std(0, ddof=1)).all()
        assert bool(good) == expected, step
        assert (not expected) == (step in (150, 200, 250))
        history.append((loss, gnorm) if np.isfinite(loss) else history[-train.WINDOW])
        state = state._replace(step=step + 1, history_2W=np.asarray(recent))
    off = train.load_config(run_config)[1]
    assert bool(jax.jit(lambda s: train.accept_step(off, s, 1e9, 1e9))(state)[0]), "off unless asked for"


@slow
@pytest.mark.parametrize("fault", ["nan=6", "inf=6", "nan=6-7"])
def test_a_bad_batch_is_skipped_named_and_can_be_replayed(run_config, plain, record_property, tmp_path, fault):
    record_property("injected", "loss or gradient not finite")
    run = tmp_path / "run"
    done = go(run_config, run, fault, keys=["--max_skips=3"])
    assert done.returncode == 0, done.stderr
    skips = events(run, "skip")
    assert [e["step"] for e in skips] == ([6, 7] if fault[-1] == "7" else [6]) and skips[0]["why"] == "not finite"
    assert len(skips[0]["rows"]) == 8 and skips[0]["rows"][0][0] == "nonsense"
    rows = {r["step"]: r for r in train.read_rows(run / "metrics.jsonl")}
    assert rows[6]["loss"] is None and rows[6]["skipped"] == 1 and rows[12]["loss"] < rows[1]["loss"]
    replay = go(run_config, run, keys=["--replay", "6"])
    assert replay.returncode == 0 and replay.stdout.startswith("step 6: 8 rows of 32 tokens")
    first = skips[0]["rows"][0]
    assert f"row    0  {first[0]} window {first[1]}  " in replay.stdout and '"event": "skip"' in replay.stdout
    record_property("survived", "loss or gradient not finite")


@slow
def test_bad_batches_in_a_row_end_the_run_with_3(run_config, plain, record_property, tmp_path):
    record_property("injected", "not finite, many steps in a row")
    run = tmp_path / "run"
    stopped(go(run_config, run, "nan=6-12", keys=["--max_skips=3"]), 3, "step 8: the loss is nan.*3 times in a row")
    assert saved_steps(run) == [4], "step 8, the third bad one, is not saved"
    goes_on(run_config, run, plain)
    record_property("survived", "not finite, many steps in a row")


@slow
def test_an_outlier_is_skipped_if_asked_for(run_config, record_property, tmp_path):
    keys = ["--steps=100", "--skip_sigma=6.0", "--save_every=1000", "--eval_every=1000"]
    record_property("injected", "loss spike (skip_sigma=6)")
    assert go(run_config, tmp_path / "run", "noise=90", keys=keys).returncode == 0
    assert [(e["step"], e["why"]) for e in events(tmp_path / "run", "skip")] == [(90, "an outlier")]
    record_property("survived", "loss spike (skip_sigma=6)")


def test_a_state_that_is_not_finite_never_becomes_a_checkpoint(run_config, tmp_path, setup):
    c, t, mesh, _ = setup
    t = train.dataclasses.replace(t, run_dir=str(tmp_path / "run"))
    state = begin(c, t, mesh)
    state = state._replace(params=state.params | {"head_DV": state.params["head_DV"].at[0, 0].set(np.nan)})
    checkpoints = train.Checkpoints(t)
    checkpoints.open()
    with pytest.raises(train.Diverged, match="the state is not finite"):
        checkpoints.save(state, {})
    checkpoints.close()
    assert checkpoints.steps() == []


# ------------------------------------------------------------------------------------- checksums and restore

@pytest.mark.parametrize("shape, dtype", [((), np.int32), ((7,), np.float32), ((6, 8), np.float32),
                                          ((4, 8, 16), np.uint16), ((2, 8, 4, 2), np.int32)])
def test_a_checksum_sees_every_bit_and_no_mesh(shape, dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, dtype=np.uint8)
    x = bits.view(dtype).reshape(shape)
    mark = jax.jit(train.checksum)
    want = 0                                                     # by hand, an element at a time
    for i, word in enumerate(x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").tolist()):
        word ^= i * 0x9E3779B9 & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            word = (word ^ word >> shift) * factor & 0xFFFFFFFF
        want = want + word & 0xFFFFFFFF
    assert int(mark(x)) == want
    for i in rng.integers(0, bits.size * 8, 40):                 # any flipped bit changes it
        flipped = bits.copy()
        flipped[i // 8] ^= 1 << i % 8
        assert int(mark(flipped.view(dtype).reshape(shape))) != want
    for n, axis in ((2, 1), (4, 1), (8, 1), (2, 0), (4, 2)):     # the same on every mesh
        if axis < len(shape) and shape[axis] % n == 0:
            spec = jax.sharding.PartitionSpec(*[None] * axis, "data")
            mesh = jax.make_mesh((n,), ("data",), devices=jax.devices()[:n])
            assert int(mark(jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)))) == want


@slow
def test_a_state_is_restored_onto_other_meshes_bit_for_bit(run_config, plain, tmp_path, assert_same_bits):
    run, states = copy(plain, tmp_path), []
    for devices in (1, 2, 8):
        c, t = train.load_config(run_config, [f"--run_dir={run}", f"--devices={devices}"])
        state = train.Checkpoints(t).restore(c, t, train.make_mesh(c, t))
        assert int(state.step) == STEPS
        assert len(state.params["embed_VD"].sharding.device_set) == devices
        states.append(jax.tree.map(np.asarray, state))
    assert_same_bits(states[0], states[1])
    assert_same_bits(states[0], states[2])


def test_which_checkpoints_are_kept(run_config, tmp_path, setup):
    """The newest two, and for good every fourth step."""
    c, t, mesh, _ = setup
    t = train.dataclasses.replace(t, run_dir=str(tmp_path / "run"), keep=2, keep_every=4)
    checkpoints, state = train.Checkpoints(t), begin(c, t, mesh)
    checkpoints.open()
    for step in range(1, 8):
        assert checkpoints.save(state._replace(step=np.int32(step)), {}) == ""
    checkpoints.close()
    assert saved_steps(tmp_path / "run") == [4, 6, 7]


@slow
def test_checkpoints_by_time_and_by_step(run_config, plain, tmp_path):
    """A save is due at the first log line after so many minutes, and at every step that is kept for good."""
    keys = ["--save_every=1000", "--save_minutes=0.00001", "--log_every=4", "--keep=1", "--keep_every=6"]
    assert go(run_config, tmp_path / "run", keys=keys).returncode == 0
    assert saved_steps(tmp_path / "run") == [6, 12] and checksums(tmp_path / "run") == checksums(plain)
    assert go(run_config, tmp_path / "more", keys=[*keys, "--keep=4"]).returncode == 0
    assert saved_steps(tmp_path / "more") == [4, 6, 8, 12]


@slow
def test_a_new_machine_finds_the_config_in_the_checkpoints(run_config, plain, tmp_path):
    """With checkpoint_dir in a bucket the run directory is gone with the machine, the run is not."""
    c, t = train.load_config(run_config, [f"--run_dir={tmp_path}/new", f"--checkpoint_dir={plain}/checkpoints"])
    mixture = train.open_data(c, t)
    assert rundir.check_run(c, t, mixture, train.Checkpoints(t))["data"] == mixture.sha256
    c = train.dataclasses.replace(c, head_dim=16)
    with pytest.raises(train.ConfigError, match="holds a run with head_dim=8, found head_dim=16"):
        rundir.check_run(c, t, mixture, train.Checkpoints(t))


def test_buckets_are_not_paths(run_config):
    t = train.load_config(run_config, ["--checkpoint_dir=gs://bucket/run/checkpoints"])[1]
    assert str(train.Checkpoints(t).folder) == "gs://bucket/run/checkpoints"


# ----------------------------------------------------------------------------------- exit codes and stuck steps

@slow
def test_a_stuck_step_is_reported_with_stacks(run_config, record_property, tmp_path):
    record_property("injected", "a step without end")
    done = go(run_config, tmp_path / "run", "stall=6", keys=["--stuck_minutes=0.5"])
    assert done.returncode == 75 and "nothing got done for" in done.stderr
    assert 'inject.py", line' in done.stderr and "in stall" in done.stderr, "the stack says where"
    assert events(tmp_path / "run", "stuck") and saved_steps(tmp_path / "run") == [4]
    record_property("stopped", "a step without end")


@pytest.mark.parametrize("step, words", [("0", "expected a step from 1 to 12"), ("x", "invalid int value: 'x'"),
                                         ("99", "found 99")])
def test_replay_refuses_what_is_no_step(run_config, capsys, step, words):
    assert train.main([str(run_config), f"--replay={step}"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--coordinator=localhost:1"], ["--processes=2", "--process=0"],
                                   ["--coordinator=localhost:1", "--processes=2", "--process=2"],
                                   ["--coordinator=localhost:1", "--process=0"]])
def test_half_a_cluster_is_refused(run_config, capsys, flags):
    assert train.main([str(run_config), *flags]) == 2
    assert "expected all three" in capsys.readouterr().err


# --------------------------------------------------------------------------------- determinism, and what it costs

@slow
@pytest.mark.parametrize("keys", [["--accumulate=2"], ["--devices=2"], ["--devices=4", "--accumulate=2"]],
                         ids=lambda keys: " ".join(keys))
def test_a_resume_on_another_split_stays_within_2e_6(run_config, plain, tmp_path, keys):
    """Sums in another order: not the same bits, the same numbers. The data order is the same in any case."""
    run = tmp_path / "run"
    assert go(run_config, run, "term=6").returncode == 0
    assert go(run_config, run, keys=keys).returncode == 0
    here, there = (np.array([[r["loss"], r["gnorm"]] for r in train.read_rows(d / "metrics.jsonl")])
                   for d in (run, plain))
    print(f"resumed with {' '.join(keys)}: losses and gradient norms within {np.abs(here - there).max():.1e}")
    assert len(here) == STEPS and np.abs(here - there).max() < 2e-6


@slow
def test_the_same_command_twice_gives_the_same_bits(run_config, plain, tmp_path):
    assert go(run_config, tmp_path / "run").returncode == 0
    assert outcome(tmp_path / "run") == outcome(plain)


@slow
def test_memory_is_flat_over_2000_steps(run_config, tmp_path):
    """With 200 log lines, 20 checkpoints and 10 evaluations on the way; sampled from outside, once a second."""
    run, pages = tmp_path / "run", []
    process = subprocess.Popen(command(run_config, run, keys=["--steps=2000", "--log_every=10", "--save_every=100",
                                                          "--eval_every=200"]), env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL)
    while process.poll() is None:
        rows = train.read_rows(run / "metrics.jsonl")           # readable while it is written
        if rows and rows[-1]["step"] < 2000:
            pages.append((rows[-1]["step"], int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])))
        time.sleep(1)
    assert process.returncode == 0
    step, resident = np.array(pages, float).T
    resident *= os.sysconf("SC_PAGE_SIZE") / 2**20
    late = step > 1000
    slope = np.polyfit(step[late], resident[late], 1)[0] * 1000
    print(f"resident memory {resident[late].min():.0f} to {resident[late].max():.0f} MiB after step 1,000, "
          f"{slope:+.1f} MiB per 1,000 steps ({late.sum()} samples)")
    assert slope < 8, "MiB per 1,000 steps"


@slow
def test_logging_and_checkpoints_cost_less_than_2_percent(tmp_path, synthetic):
    """Of the time of a step of configs/smoke.py at its own settings, as CPU time of all threads: writing a line
    every log_every steps, and checksuming and writing a checkpoint every save_every steps. The parts of one
    process in turns, so that what else the machine does slows all of them alike."""
    c, t = train.load_config(ROOT / "configs/smoke.py", [f"--run_dir={tmp_path / 'run'}", "--devices=2"])
    jax.config.update("jax_disable_most_optimizations", False)          # a slow step would flatter the shares
    try:
        mesh = train.make_mesh(c, t)
        state = jax.jit(lambda: train.make_state(c, t, jax.random.key(0)),
                        out_shardings=train.state_shardings(c, t, mesh))()
        step, checkpoints = train.make_train_step(c, t, mesh), train.Checkpoints(t)
        cost = {"step": [], "line": [], "save": []}
        (tmp_path / "run").mkdir()
        checkpoints.open()
        log = report.Log(tmp_path / "run", c, t, mesh, 0, None)

        def clock(name, call):
            began = time.process_time()
            result = call()
            cost[name].append(time.process_time() - began)
            return result
        for i in range(1, 1 + 4 * t.log_every):
            batch = train.to_global_batch(synthetic(c, t, i), mesh)
            state, metrics = clock("step", lambda: jax.block_until_ready(step(state, batch)))
            if i % t.log_every:
                log.step(i, metrics, False, print)
            else:
                clock("line", lambda: log.step(i, metrics, True, print))
                clock("save", lambda: (checkpoints.save(state, {}), checkpoints.wait()))
        checkpoints.close()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    typical = {name: float(np.median(times[1:])) for name, times in cost.items()}
    share = {"line": typical["line"] / t.log_every / typical["step"],
             "save": typical["save"] / t.save_every / typical["step"]}
    print(f"CPU seconds: step {typical['step']:.3f}, log line {typical['line']:.4f}, "
          f"checkpoint {typical['save']:.3f}; share of the steps: logging {share['line']:.2%}, "
          f"checkpoints {share['save']:.2%}")
    assert share["line"] + share["save"] < 0.02
