"""The process that trains: the cores it may use, streams that close, signals, steps without end.

Used by train.py. Nothing of it depends on what is trained."""

import contextlib
import faulthandler
import glob
import math
import os
import signal
import threading
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils

STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU


def usable_cores(root="/sys/fs/cgroup", proc="/proc/self/cgroup"):
    """How many cores this process may keep busy: its affinity, and the quota of its container."""
    if not hasattr(os, "sched_getaffinity"):                        # not Linux
        return os.cpu_count() or 1
    cores, own = len(os.sched_getaffinity(0)), []
    with contextlib.suppress(OSError):
        own = Path(proc).read_text().rpartition("::")[2].strip("/\n").split("/")
    old = [Path(root, "cpu", f"cpu.cfs_{word}_us") for word in ("quota", "period")]     # cgroup v1
    new = [[Path(root, *own[:depth], "cpu.max")] for depth in range(len(own) + 1)]
    for files in (old, *new):
        with contextlib.suppress(OSError, ValueError):              # no such file, or "max 100000"
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
            if quota > 0:
                cores = min(cores, max(1, quota // period))
    return cores


class Screen:
    """Stands for stdout or stderr, which can be closed, full, a pipe that nobody reads, or ASCII.

    None of that may end a training: what cannot be written is lost, and all that follows it."""

    def __init__(self, stream, number):
        if stream is None:                      # closed by the caller
            try:
                os.fstat(number)
            except OSError:                     # no file may get its number
                self.discard(number)
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        self.stream, self.number = stream, number

    def discard(self, number):
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)

    def attempt(self, what, *arguments):
        try:
            return what(*arguments)
        except (OSError, ValueError):
            self.discard(self.number)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def catch_signals(act, numbers=STOP_SIGNALS):
    """Call act(number, frame) when one comes from now on. Returns the handlers so far.

    Shells, wrappers and schedulers all pass a signal on: within a second of the last it is the same
    one. SIGHUP stays ignored under nohup."""
    last = -math.inf

    def catch(number, frame):
        nonlocal last
        repeated, last = time.monotonic() < last + 1, time.monotonic()
        if not repeated:
            act(number, frame)
    return {number: signal.signal(number, catch) for number in numbers
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}


@contextlib.contextmanager
def stop_signals():
    """Yields a function of the step that returns the signal on which to save and stop, or None.

    After the first signal only ctrl-C, a second or more later, does something: it kills. Of many
    processes jax makes all stop at the same step, on a SIGTERM."""
    caught, many = [], jax.process_count() > 1

    def stop(number, frame):
        if caught and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)
        if many:
            signal.raise_signal(signal.SIGTERM)

    def stop_signal(step):
        if many:
            return multihost_utils.reached_preemption_sync_point(step) and signal.SIGTERM or None
        return caught[0] if caught else None
    old = catch_signals(stop, STOP_SIGNALS[many:])          # SIGTERM is jax's own then
    try:
        yield stop_signal
    finally:
        for number, handler in old.items() if not caught else ():   # else the process is ending
            signal.signal(number, handler)


@contextlib.contextmanager
def watchdog(seconds, say):
    """Yields a function to call whenever something got done. If it is not called for so long, all
    stacks are printed, say() is called, and the process exits with 75. A wedged chip looks like a
    step without end.

    It counts a hundred waits of its own, not the clock: a night asleep (ctrl-Z) is one of them."""
    beat, over = threading.Event(), threading.Event()

    def watch():
        waits = 0
        while waits < 100:
            waits = 0 if beat.wait(seconds / 100) else waits + 1
            if over.is_set():
                return
            beat.clear()
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback()
        with contextlib.suppress(Exception):
            say()
        os._exit(75)
    if seconds:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield beat.set
    finally:
        over.set()
        beat.set()


def probe(folder):
    """Make a folder of etils.epath, write a file there and remove it. Raises whatever forbids it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"probe-{jax.process_index()}"
    path.write_text("")
    path.unlink()


def take_paths_literally():
    """Let epath, and so orbax, look into a folder called [x]: it would take the name for a pattern,
    find nothing, and leave arrays behind that cannot be read."""
    from etils.epath import backend

    def find(path):
        folder, pattern = os.path.split(path)
        return glob.glob(os.path.join(glob.escape(folder), pattern))
    backend.os_backend.glob = find


def within(seconds, act):
    """What act() returns. TimeoutError after so long: a library of buckets can try for ever."""
    outcome = []

    def work():
        try:
            outcome.append((act(), None))
        except Exception as error:
            outcome.append((None, error))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    result, error = outcome[0] if outcome else (None, TimeoutError(f"no answer in {seconds} s"))
    if error:
        raise error
    return result
