"""Many processes, one run: jax.distributed over gloo on this machine, the same program and flags as on a cluster.

All slow: each process starts, compiles and trains on its own."""
import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

import train
from configs import rundir
from tests.inject import ENVIRONMENT, checksums, command, events, go, saved_steps

pytestmark = pytest.mark.slow
LOST = 75, -signal.SIGABRT      # how a survivor ends: gloo reports a closed connection, or jax a lost heartbeat


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Cluster:
    """N processes of one run. The last may have a fault in it, or other keys."""

    def __init__(self, config, run, n, *fault, keys=(), last=(), folders=(None,) * 9):
        address, self.log = f"localhost:{free_port()}", [run.parent / f"{run.name}-{i}.log" for i in range(n)]
        self.processes = []
        for i in range(n):
            words = command(config, run, *(fault if i == n - 1 else ()), keys=[
                f"--coordinator={address}", f"--processes={n}", f"--process={i}", "--heartbeat_seconds=10", *keys,
                *(last if i == n - 1 else ())])
            self.processes.append(subprocess.Popen(words, env=ENVIRONMENT, stdout=open(self.log[i], "w"),
                                                   stderr=subprocess.STDOUT, cwd=folders[i]))

    def ends(self):
        try:
            return [p.wait(400) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()

    def said(self):
        return "\n".join(f"== process {i}\n{log.read_text()[-3000:]}" for i, log in enumerate(self.log))


def losses(run):
    return np.array([[row["loss"], row["gnorm"]] for row in train.read_rows(run / "metrics.jsonl")])


@pytest.mark.parametrize("n", [2, 4])
def test_n_processes_train_as_one_and_their_checkpoints_are_anyones(run_config, tmp_path, n):
    """n processes x 1 device against 1 process x n devices; then half a run by n is finished by one, and by n."""
    one, many, keys = tmp_path / "one", tmp_path / "many", [f"--devices={n}"]
    assert go(run_config, one, keys=keys).returncode == 0
    cluster = Cluster(run_config, many, n, keys=keys)
    assert cluster.ends() == [0] * n, cluster.said()
    apart = np.abs(losses(one) - losses(many)).max()
    print(f"{n} processes against one: losses and gradient norms differ by at most {apart:.1e}; "
          f"same bits in the last state: {checksums(one) == checksums(many)}")
    assert len(losses(many)) == 12 and apart < 2e-6
    assert "processes " + str(n) in cluster.log[0].read_text()
    assert "step" not in cluster.log[-1].read_text(), "only process 0 speaks"

    half = tmp_path / "half"
    cluster = Cluster(run_config, half, n, "term=6", keys=keys)                 # SIGTERM in one, and all save one step
    assert cluster.ends() == [0] * n, cluster.said()
    (stopped,) = events(half, "stopped")
    assert saved_steps(half)[-1] == stopped["step"] >= 6
    if n == 2:
        assert go(run_config, half, keys=keys).returncode == 0                  # ... and one process goes on from it
    else:
        cluster = Cluster(run_config, half, 2, keys=keys)                       # ... and two with two devices each
        assert cluster.ends() == [0, 0], cluster.said()
    assert events(half, "resume")[0]["step"] == stopped["step"]
    assert np.abs(losses(one) - losses(half)).max() < 2e-6


def test_a_killed_peer_stops_the_others_and_a_restart_resumes(run_config, tmp_path):
    run, keys = tmp_path / "run", ["--devices=2"]
    cluster = Cluster(run_config, run, 2, "kill=6", keys=keys)
    assert cluster.processes[1].wait(400) == -signal.SIGKILL
    began = time.time()
    code, _ = cluster.ends()
    print(f"the survivor ended with {code} after {time.time() - began:.1f} s")
    assert code in LOST, cluster.said()
    assert saved_steps(run) == [4]
    cluster = Cluster(run_config, run, 2, keys=keys)
    assert cluster.ends() == [0, 0], cluster.said()
    assert events(run, "resume")[0]["step"] == 4 and saved_steps(run)[-1] == 12


def test_a_hung_peer_is_reported_by_the_watchdog(run_config, tmp_path):
    """It still sends heartbeats, so only time tells; the others wait for it in a collective and report as well."""
    run, keys = tmp_path / "run", ["--devices=2", "--stuck_minutes=0.2"]
    cluster = Cluster(run_config, run, 2, "stall=6", keys=keys)
    codes = cluster.ends()
    assert set(codes) <= {75, -signal.SIGABRT} and 75 in codes, cluster.said()
    assert "nothing got done for" in cluster.said()


def test_a_part_that_one_process_cannot_read_is_refused_by_all(run_config, tmp_path):
    run, keys = tmp_path / "run", ["--devices=2"]
    cluster = Cluster(run_config, run, 2, keys=keys)
    assert cluster.ends() == [0, 0], cluster.said()
    good = checksums(run)
    for path in (run / "checkpoints/12/state").rglob("*"):
        if path.is_file() and path.parent.parent.name == "ocdbt.process_1":
            os.truncate(path, path.stat().st_size // 2)
    cluster = Cluster(run_config, run, 2, keys=keys)
    assert cluster.ends() == [0, 0], cluster.said()
    assert [e["step"] for e in events(run, "broken_checkpoint")] == [12]
    assert events(run, "resume")[-1]["step"] == 8 and checksums(run) == good


def test_a_refusal_by_process_0_ends_all(run_config, tmp_path):
    run, keys = tmp_path / "run", ["--devices=2"]
    with rundir.folder_lock(run):
        cluster = Cluster(run_config, run, 2, keys=keys)
        codes = cluster.ends()
    assert codes == [2, 2], (codes, cluster.said())
    assert all("is training there" in log.read_text() for log in cluster.log)


@pytest.mark.parametrize("last, words", [(["--seed=1"], "processes 0 and 1 of this run disagree: seed=0 and seed=1"),
                                         (["--mixture=(('/nowhere/*.txt', 1.0),)"], "disagree: mixture="),
                                         (["--devices=4"], "devices: expected the same on all processes")])
def test_processes_that_disagree_all_stop_before_a_step(run_config, tmp_path, record_property, last, words):
    record_property("injected", "processes of one run that disagree")
    run = tmp_path / "run"
    cluster = Cluster(run_config, run, 2, keys=["--devices=2"], last=last)
    codes = cluster.ends()
    assert codes == [2, 2], (codes, cluster.said())
    assert all(words in log.read_text() for log in cluster.log), cluster.said()
    assert not (run / "metrics.jsonl").exists()
    record_property("stopped", "processes of one run that disagree")


def test_what_one_process_lacks_stops_all(run_config, tmp_path):
    """A text that only the second host cannot read."""
    texts = [tmp_path / "here", tmp_path / "there"]
    for folder in texts:
        folder.mkdir()
    (texts[0] / "text.txt").write_text("a b c d e f g h " * 4000)
    keys = ["--devices=2", "--mixture=(('text.txt', 1.0),)", f"--data_dir={tmp_path}/data"]
    cluster = Cluster(run_config, tmp_path / "run", 2, keys=keys, folders=texts)
    assert cluster.ends() == [2, 2], cluster.said()
    assert all("text.txt" in log.read_text() and "process 1" in log.read_text() for log in cluster.log), cluster.said()


def test_checkpoints_on_a_disk_of_its_own_stop_all(run_config, tmp_path, record_property):
    """One path, two folders. The run waited for ever at its first save."""
    record_property("injected", "checkpoints that processes do not share")
    hosts = [tmp_path / "here", tmp_path / "there"]
    for folder in hosts:
        folder.mkdir()
    keys = ["--devices=2", "--checkpoint_dir=/proc/self/cwd/checkpoints"]
    cluster = Cluster(run_config, tmp_path / "run", 2, keys=keys, folders=hosts)
    assert cluster.ends() == [2, 2], cluster.said()
    assert all("one folder for all processes" in log.read_text() for log in cluster.log), cluster.said()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    record_property("stopped", "checkpoints that processes do not share")
