"""configs/launch.py against a fake gcloud on PATH: what it would ask for, and what it does when a run ends."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import launch

# Writes its words to calls. `describe` answers with the next line of states, a look at the run with the next line
# of looks, a start with the next exit code of starts; the last line stays. A look "none" is a worker that does not
# answer. With a file `real` beside it, commands for workers run here in worker/.
FAKE = r'''#!/usr/bin/env bash
cd "$(dirname "$0")"
{ printf '%s\x1f' "$@"; printf '\x1e'; } > "call.$$"; cat "call.$$" >> calls; rm "call.$$"    # one write: some run at once
next() { head -n 1 "$1"; [[ $(wc -l < "$1") -gt 1 ]] && sed -i 1d "$1"; true; }
if [[ -f real && "$*" == *--command=* ]]; then
    for word in "$@"; do case $word in --command=*) cd worker; exec bash -c "${word#--command=}" ;; esac; done
fi
case "$*" in
    *"yaml(state)"*) echo "state:"; echo "  message: Quota limit TPUS exceeded" ;;
    *describe*) next states ;;
    *"cat moe/code"*) look=$(next looks); [[ $look == none ]] && exit 1; echo "$look" ;;
    *"nohup bash"*) exit "$(next starts)" ;;
esac
'''
ZONE = "us-central2-b"
ON_BUCKET = "--checkpoint_dir=gs://bucket/run"


@pytest.fixture
def launch_py(tmp_path, monkeypatch, capfd):
    """A function of words: (exit code, calls of gcloud as lists of words, stdout, stderr). The repository is one of
    its own, with one commit and one config."""
    if not shutil.which("git"):
        pytest.skip("git is not on PATH")
    repo, fake = tmp_path / "repo", tmp_path / "gcloud"
    (repo / "configs").mkdir(parents=True)
    (repo / "configs/tiny.py").write_text("steps = 1\n")
    (repo / ".gitignore").write_text("out/\n")
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launch, "ROOT", repo)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "a@b")

    def commit():
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
            subprocess.run(["git", *words], cwd=repo, check=True)

    def run(*words, states=("ACTIVE",), looks=("0",), starts=("0",)):
        for name, lines in dict(states=states, looks=looks, starts=starts, calls=()).items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        try:
            code = launch.main(list(words))
        except SystemExit as error:
            code = error.code
        calls = [call.split("\x1f")[:-1] for call in (tmp_path / "calls").read_text().split("\x1e")[:-1]]
        return code, calls, *capfd.readouterr()
    commit()
    run.repo, run.commit, run.folder = repo, commit, tmp_path
    return run


def started(calls):
    return sum("nohup bash" in " ".join(call) for call in calls)


# ------------------------------------------------------------------------------------------- names of pods

@pytest.mark.parametrize("name, shape", [
    ("v4-8", "v4:2x2x1"), ("v4-64", "v4:2x4x4"), ("v4-128", "v4:4x4x4"), ("v4-2048", "v4:8x8x16"),
    ("v4-384", "v4:4x4x12"), ("v5p-3072", "v5p:8x12x16"), ("v5p-10368", "v5p:12x12x36"),
    ("v5p-12288", "v5p:16x16x24"), ("v5litepod-16", "v5e:4x4"), ("v6e-1", "v6e:1x1"), ("v6e-256", "v6e:16x16")])
def test_a_pod_has_two_names(name, shape):
    """Shapes from the tables of cloud.google.com/tpu/docs/v4, v5p, v5e and v6e."""
    assert launch.read_type(name) == launch.read_type(shape) == (1, name, shape)
    assert launch.read_type(f"2x{shape}") == (2, name, shape)


@pytest.mark.parametrize("word", ["v4-2047", "v4-100", "v4-0", "v4-16384", "v5p-99999999", "v6e-12", "v5litepod-512",
                                  "v4:8x8x15", "v4:1x4x256", "h100", "v4", "v4-", "v4:8xx8", "0xv4-8", ""])
def test_a_pod_that_google_does_not_have_is_refused(word):
    with pytest.raises(launch.argparse.ArgumentTypeError, match="expected .*found"):
        launch.read_type(word)


# ------------------------------------------------------------------------------------------------ the words

EVERY = {"create": ["v4-2048"], "status": [], "setup": [], "run": ["configs/tiny.py"], "logs": [], "stop": [],
         "keep": ["v4-2048", "3", "configs/tiny.py"], "delete": []}


@pytest.mark.parametrize("verb", EVERY)
def test_dry_run_anywhere_prints_and_calls_nothing(launch_py, verb):
    words = [verb, "big", ZONE, *EVERY[verb]]
    for place in range(len(words) + 1):
        code, calls, out, err = launch_py(*words[:place], "--dry-run", *words[place:])
        assert code == 0 and not calls, (place, err)
        assert out.startswith("gcloud compute tpus ") and f"--zone={ZONE}" in out
    assert not (launch_py.repo / "out").exists(), "nothing is remembered of it"


def test_dry_run_of_keep_prints_the_whole_cycle(launch_py):
    _, _, out, _ = launch_py("keep", "big", ZONE, *EVERY["keep"], "--spot", "--slices=2", "--dry-run")
    asked = re.findall(r"^gcloud compute tpus (\S+ \S+)", out, re.M)
    assert asked == ["queued-resources describe", *["tpu-vm ssh"] * 3, "queued-resources delete",
                     "queued-resources create", *["tpu-vm scp"] * 2, *["tpu-vm ssh"] * 2]
    assert "--node-count=2 --node-prefix=big --spot" in out


@pytest.mark.parametrize("verb", EVERY)
def test_every_word_that_a_verb_does_not_know_is_refused(launch_py, verb):
    words = [verb, "big", ZONE, *EVERY[verb]]
    for wrong in ([*words, "--dryrun"], [*words, "-n"], [*words, "more"], words[:-1],
                  ["", *words], [verb, "", *words[2:]],
                  [*words[:2], "", *words[3:]], [*words[:-1], ""], [verb, "Big", *words[2:]], [*words, "--slices=0"],
                  [*words, "--slices=two"], [verb], [*words, "--pause"]):
        code, calls, _, err = launch_py(*wrong)
        assert code == 2 and not calls and ("usage: launch.py" in err or "found" in err), wrong


@pytest.mark.parametrize("words, says", [
    ([], "create  NAME ZONE TYPE"), (["fly", "a", "b"], "invalid choice: 'fly'"),
    (["create", "a", "b", "h100"], "TYPE: expected v4-N"), (["run", "moe", ZONE], "required: CONFIG"),
    (["keep", "moe", ZONE, "v4-2048"], "required: RETRIES, CONFIG"),
    (["keep", "moe", ZONE, "v4-2048", "configs/tiny.py", "--a=1"], "RETRIES: expected a whole number"),
    (["keep", "moe", ZONE, "v4-2048", "x", "configs/tiny.py"], "RETRIES: expected a whole number, found 'x'"),
    (["run", "moe", ZONE, "configs/nope.py"], "CONFIG: expected a file of commit"),
    (["keep", "moe", ZONE, "v4-2048", "3", "configs/tiny.py", "--fresh"], "--fresh: expected with `run` only"),
    (["run", "moe", ZONE, "configs/tiny.py", "--steps", "3"], "expected --key=value after CONFIG, found '--steps'")])
def test_mistakes_are_told_before_anything_is_sent(launch_py, words, says):
    code, calls, out, err = launch_py(*words)
    assert code == 2 and says in out + err and not calls


@pytest.mark.parametrize("words", [["--help"], ["-h", "delete"], ["delete", "-h"], ["delete", "big", ZONE, "--help"],
                                   ["run", "big", ZONE, "configs/tiny.py", "--help"]])
def test_help_helps_wherever_it_stands(launch_py, words):
    code, calls, out, _ = launch_py(*words)
    assert code == 0 and not calls and out.startswith("usage: launch.py")


# ------------------------------------------------------------------------------------------- verb by verb

def test_a_pod_of_two_spot_slices_is_asked_for_and_remembered_until_it_is_deleted(launch_py):
    code, ((*words,),), _, _ = launch_py("create", "big", "us-east5-a", "v5p-1024", "--spot", "--slices=2")
    assert code == 0
    assert " ".join(words) == ("compute tpus queued-resources create big --accelerator-type=v5p-1024 "
                               "--runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=big --spot "
                               "--zone=us-east5-a")
    file = launch_py.repo / "out/pods/us-east5-a/big.json"
    assert json.loads(file.read_text()) == {"kind": "v5p-1024", "spot": True, "slices": 2}
    _, calls, _, _ = launch_py("stop", "big", "us-east5-a")
    assert [call[4] for call in calls] == ["big-0", "big-1"] or {call[4] for call in calls} == {"big-0", "big-1"}
    kept = file.read_text()
    file.write_text(kept[:9])
    code, calls, _, said = launch_py("stop", "big", "us-east5-a")
    assert code == 2 and not calls and "big.json: expected what `create` was told" in said
    file.write_text(kept)
    code, ((*words,),), _, _ = launch_py("delete", "big", "us-east5-a")
    assert words[3:6] == ["delete", "big", "--force"] and code == 0 and not file.exists()


def test_one_slice_is_a_node_of_its_own_name(launch_py):
    _, ((*words,),), _, _ = launch_py("create", "one", ZONE, "v4:2x2x2")
    assert "--accelerator-type=v4-16" in words and "--node-id=one" in words and "--spot" not in words


def test_status_says_why_a_pod_failed(launch_py):
    assert launch_py("status", "big", ZONE)[2].split() == ["ACTIVE"]
    _, _, out, _ = launch_py("status", "big", ZONE, states=["FAILED"])
    assert out.startswith("FAILED ") and "Quota limit" in out


def test_logs_may_follow(launch_py):
    for words, tail in ((["--follow"], "tail -n 40 -F moe/log.txt"), ([], "tail -n 40 moe/log.txt")):
        code, ((*call,),), _, _ = launch_py("logs", "big", ZONE, *words)
        assert code == 0 and f"--command={tail}" in call and "--worker=0" in call


def test_setup_ships_the_commit_and_says_what_it_lacks(launch_py):
    code, calls, _, _ = launch_py("setup", "big", ZONE)
    assert code == 0 and [call[3] for call in calls] == ["scp", "ssh"] and "--worker=all" in calls[1]
    (launch_py.repo / "configs/tiny.py").write_text("steps = 2\n")
    (launch_py.repo / "new.py").touch()
    (launch_py.repo / "notes.txt").touch()
    for verb in ("setup", "run", "keep"):
        code, calls, _, err = launch_py(verb, "big", ZONE, *EVERY[verb])
        assert code == 2 and not calls
        assert "not committed, so a pod does not get it: configs/tiny.py, new.py;" in err
    code, calls, _, err = launch_py("setup", "big", ZONE, "--allow-dirty")
    assert code == 0 and len(calls) == 2 and "configs/tiny.py, new.py" in err
    launch_py.commit()
    _, _, _, err = launch_py("run", "big", ZONE, "configs/tiny.py", ON_BUCKET)
    assert re.search("the pod has commit .* HEAD is .*; `setup` ships HEAD", err)


def test_without_git_what_ships_a_commit_says_so_and_the_rest_works(launch_py):
    shutil.rmtree(launch_py.repo / ".git")
    for verb in EVERY:
        code, calls, _, err = launch_py(verb, "big", ZONE, *EVERY[verb])
        if verb in ("setup", "run", "keep"):
            assert code == 2 and not calls and "expected a git repository, found none" in err
        else:
            assert code == 0 and calls, (verb, err)


def test_a_checkpoint_directory_on_each_host_is_warned_of(launch_py):
    assert "each host saves to a disk of its own" in launch_py("run", "big", ZONE, "configs/tiny.py")[3]
    assert not launch_py("run", "big", ZONE, "configs/tiny.py", ON_BUCKET)[3]
    (launch_py.repo / "configs/tiny.py").write_text('checkpoint_dir = "gs://bucket/run"\n')
    launch_py.commit()
    assert not launch_py("run", "big", ZONE, "configs/tiny.py")[3]


# ------------------------------------------------------------------------------------------- on a worker

@pytest.fixture
def worker(launch_py):
    """The folder moe of a worker whose commands run here, with a python that says its words and ends with 3."""
    if not Path("/proc/sys/kernel/random/boot_id").exists():
        pytest.skip("a worker is Linux, and has /proc")
    moe, python = launch_py.folder / "worker/moe", launch_py.folder / "worker/venv/bin/python"
    moe.mkdir(parents=True)
    python.parent.mkdir(parents=True)
    (launch_py.folder / "real").touch()

    def install(text):
        python.write_text(f"#!/bin/bash\n{text}\n")
        python.chmod(0o755)
    install('for word in "$@"; do echo "[$word]"; done; exit 3')
    return moe, install


def wait_for(file):
    for _ in range(100):
        if file.exists():
            return file.read_text().strip()
        time.sleep(0.05)
    raise AssertionError(f"{file} did not come")


def test_every_worker_gets_the_same_command_word_for_word(launch_py, worker):
    """The command arrives whole through gcloud, ssh and nohup; process id and exit code are left on the worker."""
    awkward = [ON_BUCKET, "--prompt=it's \"so\" $HOME", "--mixture=((\"a b/*.txt\", 1.0),)", "--stop=\n -x"]
    worker, _ = worker
    code, calls, _, err = launch_py("run", "big", ZONE, "configs/tiny.py", *awkward)
    assert code == 0 and "--worker=all" in calls[-1], err
    assert wait_for(worker / "code") == "3"
    words = "".join(f"[{word}]\n" for word in ["train.py", "configs/tiny.py", *awkward])
    assert (worker / "log.txt").read_text() == words
    assert re.fullmatch(r"\d+ \d* [0-9a-f-]{36}", (worker / "pid").read_text().strip())


def test_a_process_that_is_ours_is_ended_and_another_never(launch_py, worker):
    """Numbers begin anew after a reboot: moe/pid names the boot and the time when the process began."""
    worker, install = worker
    install("echo 'step 1'; trap 'echo stopped after step 7; saved; exit 0' TERM; while true; do sleep 0.05; done")
    look = lambda: subprocess.run(["bash", "-c", launch.LOOK], cwd=worker.parent, capture_output=True,
                                  text=True).stdout.strip()
    assert launch_py("run", "big", ZONE, "configs/tiny.py")[0] == 0 and look() == "alive"
    mine = (worker / "pid").read_text()
    other = subprocess.Popen(["sleep", "60"])
    try:
        _, began, boot = mine.split()
        for pid in (f"{other.pid}", f"{other.pid} {began} {boot}", f"{other.pid} {began} another-boot", f"{other.pid}  "):
            (worker / "pid").write_text(f"{pid}\n")
            assert look() == "gone"
            assert launch_py("stop", "big", ZONE)[0] == 0 and other.poll() is None
    finally:
        other.kill()
    (worker / "pid").write_text(mine)
    (worker / "stop").unlink()
    os.kill(int(mine.split()[0]), signal.SIGTERM)           # from the host, which goes away: not done
    assert wait_for(worker / "code") == "143" and look() == "143"


def test_a_run_that_was_stopped_by_us_stays_stopped(launch_py, worker):
    worker, install = worker
    install("trap 'echo stopped after step 7; exit 0' TERM; while true; do sleep 0.05; done")
    launch_py("run", "big", ZONE, "configs/tiny.py")
    launch_py("stop", "big", ZONE)
    assert wait_for(worker / "code") == "0"
    look = subprocess.run(["bash", "-c", launch.LOOK], cwd=worker.parent, capture_output=True, text=True).stdout
    assert look == "stopped\n"


# ------------------------------------------------------------------------------------------------- keep

def kept(launch_py, *options, **answers):
    return launch_py("keep", "big", ZONE, "v4-2048", "2", "configs/tiny.py", ON_BUCKET, "--pause=0", *options,
                     **answers)


@pytest.mark.parametrize("looks, tries, ends", [
    (["0"], 1, 0), (["alive", "none", "75", "none", "134", "alive", "0"], 3, 0), (["3"], 1, 3), (["4"], 1, 4),
    (["130"], 1, 130), (["137", "143", "75"], 3, 75), (["stopped"], 1, 0),
    (["gone", "alive", "0"], 2, 0),                         # a host that was started again
    (["none"], 3, 75)])                                     # worker 0 never answers
def test_keep_starts_again_after_what_is_worth_it(launch_py, looks, tries, ends):
    code, calls, _, err = kept(launch_py, looks=looks)
    assert (code, started(calls)) == (ends, tries), err


def test_a_start_that_fails_is_a_try(launch_py):
    code, calls, _, err = kept(launch_py, starts=["1", "255", "0"])
    assert code == 0 and started(calls) == 3 and "try 0 ended with a start that failed" in err
    assert sum(call[3] == "scp" for call in calls) == 2, "a worker that cannot start may lack the code"


@pytest.mark.parametrize("created, options, asks", [
    (["--spot", "--slices=2"], [], ["--spot", "--node-count=2", "--node-prefix=big"]),
    ([], [], ["--node-id=big"]), (None, ["--spot"], ["--spot", "--node-id=big"]), (None, [], ["--node-id=big"])])
def test_a_preempted_pod_is_asked_for_as_it_was_created(launch_py, created, options, asks):
    if created is not None:
        launch_py("create", "big", ZONE, "v4:8x8x16", *created)
    code, calls, _, err = kept(launch_py, *options, looks=["none", "0"], states=[
        "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"])
    assert code == 0, err
    assert [call[3] for call in calls if call[3] in ("delete", "create")] == ["delete", "create"]
    (create,) = [call for call in calls if call[3] == "create"]
    found = [word for word in create if re.match("--(spot|node)", word)]
    assert sorted(found) == sorted(asks) and "--accelerator-type=v4-2048" in create
    assert any(call[3] == "scp" for call in calls), "the new machines are set up"


@pytest.mark.parametrize("states", [["FAILED"], ["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "CREATING", "FAILED"]])
def test_a_failed_pod_ends_keep_with_the_reason(launch_py, states):
    code, _, _, err = kept(launch_py, states=states, looks=["none", "0"])
    assert code == 1 and "big FAILED: state: message: Quota limit TPUS exceeded" in err


def test_keep_does_not_mix_up_pods(launch_py):
    launch_py("create", "big", ZONE, "v4-1024")
    code, calls, _, err = kept(launch_py)
    assert code == 2 and not calls and "TYPE: expected v4-1024" in err
    assert kept(launch_py, states=[""])[0] == 2
    code, calls, _, err = launch_py("keep", "other", ZONE, "v4-8", "1", "configs/tiny.py", states=[""])
    assert code == 1 and not started(calls) and "`create` it first" in err


def test_keep_ships_the_commit_that_it_began_with(launch_py):
    launch_py("create", "big", ZONE, "v4-2048")
    launch_py("setup", "big", ZONE)
    first = json.loads((launch_py.repo / f"out/pods/{ZONE}/big.json").read_text())["commit"]
    (launch_py.repo / "configs/tiny.py").write_text("steps = 2\n")
    launch_py.commit()
    archived = []
    real, launch.git = launch.git, lambda *words: (archived.append(words[-1]) if words[0] == "archive" else real(*words))
    try:
        assert kept(launch_py, looks=["none", "0"], states=["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"])[0] == 0
    finally:
        launch.git = real
    assert archived == [first]


def test_the_program_runs_alone(tmp_path):
    """Without jax and from another folder, as on a laptop."""
    done = subprocess.run([sys.executable, "-S", "-I", launch.__file__, "create", "a", "b", "v6e-8", "--dry-run"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--accelerator-type=v6e-8" in done.stdout, done.stderr
