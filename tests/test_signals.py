"""What befalls the process that trains: signals in any rhythm, screens that close, nights asleep, quotas.

The slow tests put each of these into a real run; it must end as an undisturbed one, bit for bit, or save and stop."""
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

import data
import train
from configs import process, report
from tests.inject import ENVIRONMENT, STEPS, command, events, go, outcome, saved_steps

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def handlers_as_before():
    """A stopped run leaves its handlers, since its process is about to end. This one is not."""
    before = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------ signals

@pytest.mark.parametrize("number", process.STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_signal_is_told_once_it_came_and_ten_more_do_not_kill(number):
    with process.stop_signals() as stop_signal:
        assert stop_signal(0) is None
        for _ in range(10):
            signal.raise_signal(number)
        assert stop_signal(1) == number
    signal.raise_signal(number)                 # on the way out: nothing may disturb the end of the process
    assert stop_signal(2) == number


def test_handlers_are_restored_after_a_training_without_a_signal_and_nohup_is_respected():
    mine = lambda number, frame: None
    signal.signal(signal.SIGTERM, mine)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)                                            # as nohup does
    with process.stop_signals() as stop_signal:
        signal.raise_signal(signal.SIGHUP)
        assert stop_signal(0) is None
    assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_later_it_is_another_signal(monkeypatch):
    came, clock = [], [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: clock[0])
    process.catch_signals(lambda number, frame: came.append(clock[0]))
    for clock[0] in (100.0, 100.3, 101.2, 102.1, 103.5, 103.6):
        signal.raise_signal(signal.SIGINT)
    assert came == [100.0, 103.5], "each within a second of the one before is the same one"


@slow
def test_a_second_ctrl_c_kills_and_time_asleep_is_not_a_stuck_step():
    """One process that does nothing: stopped for longer than its watchdog waits, then ctrl-C twice."""
    program = ("import time, sys\nfrom configs import process\n"
               "with process.watchdog(1.5, lambda: print('stuck', flush=True)) as beat, process.stop_signals() as stop:\n"
               "    print('ready', flush=True)\n    time.sleep(4.2 if 'stuck' in sys.argv else 0.3)\n"
               "    while True:\n        beat()\n        time.sleep(0.1)\n")
    start = lambda *words: subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE,
                                            stderr=subprocess.PIPE, text=True, cwd=train.__file__.rpartition("/")[0])
    asleep, hung = start(), start("stuck")
    assert asleep.stdout.readline() == "ready\n"
    asleep.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    asleep.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert asleep.poll() is None, "time asleep does not count"
    for pause in (0.1, 1.5, 0):
        assert asleep.poll() is None, "two within a second do not kill"
        asleep.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert asleep.wait(timeout=10) == -signal.SIGINT
    said, stacks = hung.communicate(timeout=20)
    assert hung.returncode == 75 and said == "ready\nstuck\n" and "most recent call first" in stacks


@slow
@pytest.mark.parametrize("fault, name", [("hup=5", "SIGHUP at a step"), ("terms=6", "SIGTERM ten times in a second")])
def test_other_signals_save_and_exit_with_0(run_config, plain, record_property, tmp_path, fault, name):
    record_property("injected", name)
    run = tmp_path / "run"
    done = go(run_config, run, fault)
    assert done.returncode == 0, done.stderr
    (stopped,) = events(run, "stopped")
    assert saved_steps(run)[-1] == stopped["step"] < STEPS and "saved. Run the same command" in done.stdout
    assert go(run_config, run).returncode == 0
    assert outcome(run) == outcome(plain)
    record_property("survived", name)


# ------------------------------------------------------------------------------------------------------ screens

def stream_of(path):
    return open(path, "w", encoding="ascii")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_screen_that_is_full_closed_or_ascii_never_raises(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    shut = stream_of(tmp_path / "shut")
    number = shut.fileno()
    for stream in (stream_of("/dev/full"), open(writer, "w"), stream_of(tmp_path / "plain")):
        screen = process.Screen(stream, stream.fileno())
        for _ in range(3):
            print("naïve 日本 \udcff", file=screen, flush=True)
        stream.close()                          # as at the end of the process: the flush does not fail either
    assert (tmp_path / "plain").read_bytes().splitlines()[0] == rb"na\xefve \u65e5\u672c \udcff"
    screen = process.Screen(shut, number)
    shut.close()
    print("after", file=screen, flush=True)


def test_what_a_closed_stream_leaves_is_no_number_for_a_file(tmp_path):
    """With `2>&-` the next file that is opened would be number 2, and libraries would write into it."""
    number = os.open(tmp_path / "x", os.O_CREAT)
    os.close(number)
    screen = process.Screen(None, number)
    other = os.open(tmp_path / "y", os.O_CREAT)
    assert other != number and os.path.sameopenfile(number, os.open(os.devnull, os.O_WRONLY))
    print("nobody reads this", file=screen, flush=True)
    os.close(other)


def test_what_is_printed_is_kept_in_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.keep_line, "file", tmp_path / "log.txt")
    train.log("step 1, é")
    train.print_error("the reason")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "step 1, é\ntrain.py: the reason\n"
    monkeypatch.setattr(train.keep_line, "file", Path("/dev/full"))
    train.log("a full disk")
    assert capsys.readouterr().out == "step 1, é\na full disk\n"


@slow
@pytest.mark.parametrize("streams, name", [
    ("2>&- | head -n 2", "stdout into head, stderr closed"), ("<&- >&- 2>&-", "all three streams closed"),
    ("> /dev/full 2>&1", "stdout and stderr on a full disk, ASCII only")])
def test_a_screen_that_closes_does_not_end_a_training(run_config, plain, record_property, tmp_path, streams, name):
    record_property("injected", name)
    run, ascii = tmp_path / "rün", dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    words = command(run_config, run, keys=["--sample_tokens=2", "--prompt=naïve", "--temperature=0.0"])
    script = "set -o pipefail; " + " ".join(f"'{word}'" for word in words) + f" {streams}"
    environment = ENVIRONMENT | (ascii if "full" in streams else {})
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(run) == outcome(plain)
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert f"step {STEPS}/{STEPS}" in log and "done in" in log and "naïve" in (run / "sample.txt").read_text(encoding="utf-8")
    record_property("survived", name)


# --------------------------------------------------------------------------------------------- long evaluations

def test_an_evaluation_beats_after_every_batch_and_says_a_line_a_minute(monkeypatch, capsys):
    mixture = types.SimpleNamespace(heldout={"a": types.SimpleNamespace(tokens=1000), "b": types.SimpleNamespace(tokens=50)})
    clock, beats = [0.0], []
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    with report.progress(7, mixture, 500, lambda: beats.append(clock[0])) as scored:
        for clock[0] in (10.0, 50.0, 61.0, 70.0, 121.5):
            scored(100)
    assert beats == [10.0, 50.0, 61.0, 70.0, 121.5]
    assert capsys.readouterr().out == "eval 7: 300 of 550 tokens\neval 7: 500 of 550 tokens\n"


def test_the_last_evaluation_can_be_bounded_and_a_long_one_is_said_before(config, load):
    c, t = load(config)
    mixture = train.open_data(c, t)
    (tokens,) = (stream.tokens for stream in mixture.heldout.values())
    trained = t.steps * t.batch_size * c.seq_len
    (line,) = report.remarks(c, t, mixture, trained)
    assert f"{tokens:,} of them at the end: " in line and "--eval_tokens_final" in line
    bounded = load(config, eval_tokens_final=100, eval_every=6)
    assert not list(report.remarks(*bounded, mixture, trained))
    assert report.eval_tokens(mixture, 100) == 100 and report.eval_tokens(mixture, 0) == tokens
    mesh, batches = train.make_mesh(c, t), []
    count = lambda params, bias, batch: (1.0, float(batch["weights"].sum()), 1.0)
    state = types.SimpleNamespace(params=None, bias_LE=None)
    for limit in (100, 0):
        found = train.evaluate(state, count, mixture, c, t, mesh, limit, batches.append)["nonsense"]["tokens"]
        assert found == sum(b.weights_BS.sum() for b in data.heldout_batches(
            mixture.heldout["nonsense"], t.batch_size, c.seq_len, mixture.tokenizer.eot, limit))
    assert len(batches) == 1 + -(-(tokens - 1) // (t.batch_size * c.seq_len))


def test_ids_that_are_never_used_are_said(config, load):
    c, t = load(config, vocab_size=2048, eval_tokens_final=1, eval_every=100)
    lines = list(report.remarks(c, t, train.open_data(c, t), 10**9))
    assert lines == ["note      'bytes' uses 257 of the 2,048 ids of vocab_size; the rows of the others are never used"]


# ------------------------------------------------------------------------------------------------------- quotas

@pytest.mark.parametrize("limits, cores", [({"": "max 100000"}, 16), ({"": "200000 100000"}, 2), ({"": "50000 100000"}, 1),
                                           ({"a/b": "350000 100000", "": "max 100000"}, 3), ({"a": "rubbish"}, 16),
                                           ({"a": "400000 100000", "a/b": "700000 100000"}, 4), ({}, 16)])
def test_cores_are_those_of_the_quota(tmp_path, monkeypatch, limits, cores):
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for folder, text in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(text + "\n")
    (tmp_path / "self").write_text("9:name=systemd:/\n1:cpu:/x\n0::/a/b\n")
    assert process.usable_cores(tmp_path, tmp_path / "self") == cores
    assert process.usable_cores(tmp_path / "nowhere", tmp_path / "nowhere") == 16
    (tmp_path / "cpu").mkdir()                                                              # the older cgroups
    for name, text in (("quota", "-1"), ("period", "100000")):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(text + "\n")
    assert process.usable_cores(tmp_path, tmp_path / "self") == cores
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    assert process.usable_cores(tmp_path, tmp_path / "self") == 1


def test_a_bucket_that_does_not_answer_is_given_up():
    with pytest.raises(TimeoutError, match="no answer in 0.1 s"):
        process.within(0.1, threading.Event().wait)
    assert process.within(5, lambda: 7) == 7
    with pytest.raises(KeyError):
        process.within(5, lambda: {}["x"])


# -------------------------------------------------------------------------------------------- memory and speed

def test_memory_and_speed_are_given_in_the_right_unit(config, load, monkeypatch):
    usage = types.SimpleNamespace(ru_maxrss=3 * 2**30)
    monkeypatch.setattr(report.resource, "getrusage", lambda _: usage)
    device = types.SimpleNamespace(memory_stats=lambda: None, device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(report.sys, "platform", "darwin")
    assert report.memory_in_use(device) == "mem 3.0G", "bytes on macOS"
    usage.ru_maxrss = 3 * 2**20
    monkeypatch.setattr(report.sys, "platform", "linux")
    assert report.memory_in_use(device) == "mem 3.0G", "KiB elsewhere"
    mesh = types.SimpleNamespace(local_devices=[device], size=1)
    row = dict(step=1, tokens_per_second=1e6, loss=1.0, ema=1.0, gnorm=1.0, seconds=1.0, lr=0.1, maxvio=0.0, drop=0.0)
    knows = lambda **keys: " mfu " in report.line(*load(config, **keys), mesh, row, 0)
    assert knows(compute_dtype="bfloat16") and knows(peak_flops=1e12)
    device.device_kind = "TPU v4"
    assert not knows(), "float32 is not measured against the peak of bfloat16"
    device.device_kind = "NVIDIA H100 from another planet"
    assert not knows(compute_dtype="bfloat16")
