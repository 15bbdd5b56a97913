"""configs/launch.sh against a fake gcloud on PATH: what it would ask for, and what it does when a run ends."""
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "configs" / "launch.sh"
# Writes its words to calls. `describe` answers with the next line of states, `cat moe/code` with the
# next line of codes; a line "none" is a worker that does not answer, a command for a worker runs here in worker/
FAKE = r'''#!/usr/bin/env bash
cd "$(dirname "$0")"
printf '%s\x1f' "$@" >> calls; printf '\x1e' >> calls
next() { head -n 1 "$1"; [[ $(wc -l < "$1") -gt 1 ]] && sed -i 1d "$1"; true; }
case "$*" in
    *describe*) next states ;;
    *"cat moe/code"*) code=$(next codes); [[ $code == none ]] && exit 1; echo "$code" ;;
    *"nohup bash"*) for word in "$@"; do
        case $word in --command=*) bash -c "cd worker; ${word#--command=}" ;; esac; done ;;
esac
'''


@pytest.fixture
def launch(tmp_path):
    fake = tmp_path / "gcloud"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    (tmp_path / "worker/moe").mkdir(parents=True)
    (tmp_path / "worker/venv/bin").mkdir(parents=True)
    python = tmp_path / "worker/venv/bin/python"                # what a worker trains with: says its arguments
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\nexit 3\n')
    python.chmod(0o755)

    def run(*words, states=("ACTIVE",), codes=("0",), before=()):
        (tmp_path / "states").write_text("\n".join(states) + "\n")
        (tmp_path / "codes").write_text("\n".join(codes) + "\n")
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["bash", SCRIPT, *before, *words], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
        return done, [call.split("\x1f")[:-1] for call in (tmp_path / "calls").read_text().split("\x1e")[:-1]]
    run.worker = tmp_path / "worker"
    return run


def test_a_pod_of_two_spot_slices_is_asked_for(launch):
    done, ((*words,),) = launch("create", "big", "us-east5-a", "v5p-1024", "--spot", "--slices=2")
    assert done.returncode == 0
    assert " ".join(words) == ("compute tpus queued-resources create big --accelerator-type=v5p-1024 "
                               "--runtime-version=v2-alpha-tpuv5 --node-count=2 --spot --node-prefix=big "
                               "--zone=us-east5-a")


def test_dry_run_prints_and_calls_nothing(launch):
    for verb in (["create", "v4-2048"], ["status"], ["setup"], ["run", "configs/smoke.py"], ["logs"], ["stop"],
                 ["keep", "v4-2048", "3", "configs/smoke.py"], ["delete"]):
        done, calls = launch("--dry-run", verb[0], "big", "us-central2-b", *verb[1:])
        assert done.returncode == 0 and not calls, (verb, done.stderr)
        assert done.stdout.startswith("gcloud compute tpus ") and "us-central2-b" in done.stdout


def test_every_worker_gets_the_same_command_word_for_word(launch):
    """The command arrives whole through gcloud, ssh and nohup; process id and exit code are left on the worker."""
    awkward = ["configs/smoke.py", "--prompt=it's \"so\" $HOME", "--mixture=((\"a b/*.txt\", 1.0),)"]
    done, calls = launch("run", "big", "us-central2-b", *awkward)
    assert done.returncode == 0 and "--worker=all" in calls[-1]
    moe = launch.worker / "moe"
    for _ in range(100):
        if (moe / "code").exists() and (moe / "code").read_text():
            break
        subprocess.run(["sleep", "0.1"])
    assert (moe / "log.txt").read_text().splitlines() == [f"[{word}]" for word in ["train.py", *awkward]]
    assert (moe / "code").read_text() == "3\n" and (moe / "pid").read_text().strip().isdigit()


@pytest.mark.parametrize("codes, tries, ends", [(["0"], 1, 0), (["75", "none", "134", "0"], 3, 0), (["3"], 1, 3),
                                                (["4"], 1, 4), (["137", "143", "75"], 3, 75)])
def test_keep_starts_again_after_what_is_worth_it(launch, codes, tries, ends):
    done, calls = launch("keep", "big", "us-central2-b", "v4-2048", "2", "configs/smoke.py", codes=codes,
                         before=["--pause=0"])
    assert done.returncode == ends, done.stderr
    assert sum("nohup bash" in " ".join(call) for call in calls) == tries


def test_keep_asks_for_a_new_pod_when_the_old_is_preempted(launch):
    done, calls = launch("keep", "big", "us-central2-b", "v4-2048", "2", "configs/smoke.py", before=["--pause=0"],
                         states=["ACTIVE", "SUSPENDED", "SUSPENDED", "SUSPENDED", "PROVISIONING", "ACTIVE"],
                         codes=["none", "0"])
    assert done.returncode == 0, done.stderr
    verbs = [call[2:4] for call in calls if call[2] == "queued-resources" and call[3] != "describe"]
    assert verbs == [["queued-resources", "delete"], ["queued-resources", "create"]]
    assert "--spot" in next(call for call in calls if call[3] == "create")
    assert any(call[3] == "scp" for call in calls), "the new machines are set up"


@pytest.mark.parametrize("words, says", [([], "create  NAME ZONE TYPE"), (["fly", "a", "b"], "expected create"),
                                         (["create", "a", "b", "h100"], "TYPE: expected v4-N")])
def test_mistakes_are_one_line_or_the_usage(launch, words, says):
    done, calls = launch(*words)
    assert done.returncode == 2 and says in done.stderr and not calls
