#!/usr/bin/env bash
# One run on a TPU pod, driven from a laptop that has gcloud:   bash configs/launch.sh [--dry-run] VERB NAME ZONE ...
#
#   create  NAME ZONE TYPE [--spot] [--slices=N]   ask for a pod (v4-2048, v5p-1024, v6e-256); N slices over DCN
#   status  NAME ZONE                              WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED (preempted), ...
#   setup   NAME ZONE                              this commit, Python and packages onto every worker
#   run     NAME ZONE CONFIG [--key=value ...]     train.py in the background, the same command on every worker
#   logs    NAME ZONE                              what worker 0 printed last; only process 0 prints
#   stop    NAME ZONE                              SIGTERM to every worker: all save at the same step, exit code 0
#   keep    NAME ZONE TYPE RETRIES CONFIG ...      run, and start again after what is worth it (see `again`)
#   delete  NAME ZONE                              give the machines back; they cost money until then
#
# --dry-run before the verb prints every gcloud command and runs none. Checkpoints must live in a bucket that all
# workers reach: --checkpoint_dir=gs://BUCKET/RUN, in the zone's region. The images ship Python 3.10 and train.py needs 3.11, so
# `setup` makes its own environment. Slices of one request are NAME-0, NAME-1, ...; the verbs address all of them.
set -euo pipefail

dry= pause=60
while [[ ${1-} == --* ]]; do case $1 in
    --dry-run) dry=1 ;;
    --pause=*) pause=${1#*=} ;;     # seconds between looks, for `keep`
    *) echo "launch.sh: expected --dry-run or --pause=SECONDS before the verb, found $1" >&2; exit 2 ;;
esac; shift; done
[[ $# -ge 3 ]] || { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }
verb=$1 name=$2 zone=$3; shift 3
cd "$(dirname "$0")/.."

gc() { if [[ $dry ]]; then printf 'gcloud'; printf ' %q' "$@"; echo; else gcloud "$@"; fi }
tpu() { gc compute tpus "$@" --zone="$zone"; }
nodes() {       # one slice is a node called NAME, of several each is NAME-i
    local found=""
    [[ $dry ]] || found=$(gcloud compute tpus tpu-vm list --zone="$zone" --filter="name~^$name(-[0-9]+)?\$" \
                          --format="value(name)")
    echo "${found:-$name}"
}
on() {          # on WORKER COMMAND: at the same time on all slices, for they wait for each other
    local pids=() failed=0
    for node in $(nodes); do tpu tpu-vm ssh "$node" --worker="$1" --command="$2" & pids+=($!); done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return $failed
}
state() { tpu queued-resources describe "$name" --format="value(state.state)"; }

create() {
    local type=$1 image="" options=(--node-id="$name"); shift
    case $type in   # runtime images for jax [cited: cloud.google.com/tpu/docs/runtimes]
        v5p-*) image=v2-alpha-tpuv5 ;;  v5litepod-*) image=v2-alpha-tpuv5-lite ;;  v6e-*) image=v2-alpha-tpuv6e ;;
        v4-*) image=tpu-ubuntu2204-base ;;
        *) echo "launch.sh: TYPE: expected v4-N, v5p-N, v5litepod-N or v6e-N, found $type" >&2; exit 2 ;;
    esac
    for word in "$@"; do case $word in
        --spot) options+=(--spot) ;;
        --slices=*) options=("${options[@]/--node-id=$name/--node-count=${word#*=}}" --node-prefix="$name") ;;
        *) echo "launch.sh: create: expected --spot or --slices=N, found $word" >&2; exit 2 ;;
    esac; done
    tpu queued-resources create "$name" --accelerator-type="$type" --runtime-version="$image" "${options[@]}"
}

setup() {
    local archive; archive=$(mktemp -u).tar.gz
    git archive --format=tar.gz -o "$archive" HEAD
    for node in $(nodes); do tpu tpu-vm scp "$archive" "$node:repo.tar.gz" --worker=all; done
    rm -f "$archive"
    on all 'mkdir -p moe && tar xzf repo.tar.gz -C moe && python3 -m pip install --quiet --user uv &&
        python3 -m uv venv --quiet --allow-existing --python=3.12 venv &&
        python3 -m uv pip install --quiet --python venv/bin/python -r moe/requirements.txt "jax[tpu]" gcsfs'
}

run() {         # what an earlier start left behind holds the chips, so it is ended first, by its recorded id
    local words inner; words=$(printf ' %q' "$@")
    inner=$(printf %q "../venv/bin/python train.py$words & echo \$! > pid; wait \$!; echo \$? > code")
    on all "cd moe && if [ -f pid ]; then kill \$(cat pid) 2>/dev/null || true; fi
        while [ -f pid ] && kill -0 \$(cat pid) 2>/dev/null; do sleep 1; done; rm -f code
        nohup bash -c $inner >> log.txt 2>&1 < /dev/null &"
}

again() {       # 75 try again, 134 a peer was lost, 137 and 143 killed: restart resumes. All else needs a person
    [[ " 75 134 137 143 " == *" $1 "* ]]
}

keep() {
    local type=$1 retries=$2 code; shift 2
    [[ $dry ]] && { state; run "$@"; return; }
    for ((try = 0; try <= retries; try++)); do
        if [[ $(state) == SUSPENDED* || $(state) == FAILED* ]]; then       # preempted: nothing of it comes back
            tpu queued-resources delete "$name" --force --quiet
            create "$type" --spot
            until [[ $(state) == ACTIVE* ]]; do sleep "$pause"; done
            setup
        fi
        run "$@"
        until code=$(tpu tpu-vm ssh "$(nodes | head -n 1)" --worker=0 --command='cat moe/code' 2>/dev/null) ||
              [[ $(state) == SUSPENDED* ]]; do sleep "$pause"; done
        echo "launch.sh: try $try ended with ${code:-a preemption}"
        [[ $code == 0 ]] && return 0
        [[ -z $code ]] || again "$code" || return "$code"
        on all 'kill $(cat moe/pid) 2>/dev/null || true' || true
    done
    echo "launch.sh: gave up after $retries retries" >&2
    return 75
}

case $verb in
    create|run|keep) "$verb" "$@" ;;
    setup) setup ;;
    status) state ;;
    logs) tpu tpu-vm ssh "$(nodes | head -n 1)" --worker=0 --command='tail -n 40 moe/log.txt' ;;
    stop) on all 'kill $(cat moe/pid)' ;;
    delete) tpu queued-resources delete "$name" --force ;;
    *) echo "launch.sh: expected create, status, setup, run, logs, stop, keep or delete, found $verb" >&2; exit 2 ;;
esac
