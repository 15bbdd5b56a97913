"""One run on a TPU pod, driven from a laptop that has gcloud and git. It needs no jax.

  create  NAME ZONE TYPE [--spot]    ask for a pod: v4-2048 (or v4:8x8x16), v5p-1024, v6e-256
  status  NAME ZONE                  WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED (preempted), ...
  setup   NAME ZONE                  the commit HEAD, Python and packages onto every worker
  run     NAME ZONE CONFIG [--key=value ...]     train.py in the background on every worker
  logs    NAME ZONE [--follow]       what worker 0 printed last; only process 0 prints
  stop    NAME ZONE                  SIGTERM to every worker: all save at the same step
  keep    NAME ZONE TYPE RETRIES CONFIG [--key=value ...]    run, and again after what time cures
  delete  NAME ZONE                  give the machines back; they cost money until then

--dry-run, anywhere, prints every gcloud command and runs none. --slices=N: the pod is N slices,
NAME-0, NAME-1, ... What `create` was told is kept in out/pods/ZONE/NAME.json, for the other verbs
and for `keep`, which asks for a preempted pod again. Checkpoints belong in a bucket that all
workers reach, in the zone's region: --checkpoint_dir=gs://BUCKET/RUN. The images ship Python 3.10
and train.py needs 3.11, so `setup` makes its own environment."""
import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AGAIN = (75, 134, 137, 143)     # try again, a peer was lost, killed: repeating resumes
PATIENCE = 10                   # looks in a row without an answer that `keep` bears


class Refused(Exception):
    """Its text says why nothing more is done. Exit code 2, or 1 if the command line was right."""


def say(line):
    print(f"launch.py: {line}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- the two names of a pod

# kind: TensorCores that its size counts per chip, most chips of a slice, runtime image for jax
# [cited: cloud.google.com/tpu/docs/v4, v5p, v5e, v6e and runtimes]
KINDS = {"v4": (2, 4096, "tpu-ubuntu2204-base"), "v5p": (2, 6144, "v2-alpha-tpuv5"),
         "v5litepod": (1, 256, "v2-alpha-tpuv5-lite"), "v6e": (1, 256, "v2-alpha-tpuv6e")}
SHAPES = {2: {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)},
          1: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
              256: (16, 16)}}


def shape_of(kind, size):
    """The chips along each axis of a slice: (8, 8, 16) for "v4", 2048; None if there is no such
    size. Of cubes of 4 x 4 x 4, Google's default is the shape that is nearest to a cube."""
    cores, most, _ = KINDS[kind]
    chips, odd = divmod(size, cores)
    if cores == 1 or chips < 64 or chips % 64 or chips > most or odd:
        return None if odd else SHAPES[cores].get(chips)
    cubes = range(1, chips // 64 + 1)
    sides = [(a, b, len(cubes) // (a * b)) for a in cubes if a**3 <= len(cubes) for b in cubes
             if a <= b and a * b * b <= len(cubes) and len(cubes) % (a * b) == 0]
    return tuple(4 * n for n in min(sides, key=sum))


def read_type(word):
    """(slices, "v4-2048", "v4:8x8x16") of a pod by either name, also with "2x" before it.
    ArgumentTypeError says why there is no such pod."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(v4|v5p|v5e|v5litepod|v6e)(?:-(\d+)|:(\d+(?:x\d+)*))", word)
    if not match:
        raise argparse.ArgumentTypeError(f"expected v4-N, v5p-N, v5litepod-N or v6e-N, or a shape as in "
                                         f"v4:8x8x16, found {word!r}")
    slices, kind, size, shape = match.groups()
    kind = kind.replace("v5e", "v5litepod")
    told = tuple(map(int, shape.split("x"))) if shape else ()
    size = int(size) if size else math.prod(told) * KINDS[kind][0]
    known = shape_of(kind, size)
    if not known or told and sorted(told) != sorted(known):
        all_sizes = "8, 16, 32, 64 or a multiple of 128" if KINDS[kind][0] == 2 else list(SHAPES[1])
        raise argparse.ArgumentTypeError(f"expected {kind}-N with N = {all_sizes}, in Google's shape"
                                         + f" {known} for this size" * bool(known) + f", found {word!r}")
    return int(slices or 1), f"{kind}-{size}", f"{kind.replace('litepod', 'e')}:{'x'.join(map(str, known))}"


# ------------------------------------------------------------------------------ what a worker does

# A process is ours if it began when moe/pid says, since the boot that moe/pid names: after a reboot
# its number may be anybody's. `finish` gives it five minutes to save.
OURS = """started() { sed 's/.*) //' "/proc/$1/stat" | cut -d' ' -f20; } 2>/dev/null
ours() { read -r p began boot < pid && [ -n "$began" ] && [ "$began" = "$(started "$p")" ] &&
    [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ]; } 2>/dev/null
finish() { ours || return 0; kill "$p"
    for i in $(seq 300); do ours || return 0; sleep 1; done; kill -9 "$p"
    for i in $(seq 60); do ours || return 0; sleep 1; done; }
"""
SETUP = """mkdir -p moe && tar xzf repo.tar.gz -C moe && python3 -m pip install --quiet --user uv &&
python3 -m uv venv --quiet --allow-existing --python=3.12 venv &&
python3 -m uv pip install --quiet --python venv/bin/python -r moe/requirements.txt "jax[tpu]" gcsfs"""
STOP = f"""{OURS}cd moe && touch stop && if ours; then kill "$p"; else echo "nothing to stop"; fi"""
LOOK = f"""{OURS}if [ -f moe/code ] && [ -f moe/stop ]; then echo stopped; exit 0; fi
cat moe/code 2>/dev/null && exit 0
cd moe && if ours; then echo alive; else echo gone; fi"""


def start_script(words):
    """What an earlier start left behind holds the chips, so it is ended first. moe/code gets the
    exit code of the newest start; 143 if the run saved on a SIGTERM that came from the host, not from `stop`."""
    inner = f"""{OURS}../venv/bin/python train.py {shlex.join(words)} & p=$!
me="$p $(started $p) $(cat /proc/sys/kernel/random/boot_id)"; echo "$me" > pid.new; mv pid.new pid
wait $p; code=$?
[ $code = 0 ] && [ ! -f stop ] && tail -n 3 log.txt | grep -q '^stopped after' && code=143
[ "$(cat pid)" = "$me" ] && echo $code > code.new && mv code.new code"""
    return f"""{OURS}cd moe && finish && rm -f code pid stop || exit 1
nohup bash -c {shlex.quote(inner)} >> log.txt 2>&1 < /dev/null &
for i in $(seq 50); do [ -s pid ] && break; sleep 0.1; done"""


# ------------------------------------------------------------------------------ what gcloud is asked

class Pod:
    """A queued resource and its slices. With `dry` its commands are printed and not run."""
    def __init__(self, name, zone, kind, spot, slices, commit, dry):
        self.name, self.zone, self.kind, self.spot, self.slices = name, zone, kind, spot, slices
        self.commit, self.dry, self.bare = commit, dry, False   # bare: it lacks our code
        self.nodes = [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]

    def start(self, *words, **how):
        command = ["gcloud", "compute", "tpus", *words, f"--zone={self.zone}"]
        if self.dry:
            print(shlex.join(command), flush=True)
        return subprocess.Popen(["true"] if self.dry else command, text=True, **how)

    def request(self, verb, *words):
        return self.start("queued-resources", verb, self.name, *words).wait()

    def on(self, worker, command):
        """0 if a command went well on all slices, at the same time: they wait for each other."""
        running = [self.start("tpu-vm", "ssh", node, f"--worker={worker}", f"--command={command}")
                   for node in self.nodes]
        return max([abs(process.wait()) for process in running])        # -9: killed here

    def ask(self, *words):
        """What a command prints; "" if it fails."""
        process = self.start(*words, stdout=subprocess.PIPE)
        return process.communicate()[0].strip() * (process.returncode == 0)

    def state(self, what="value(state.state)"):
        """ACTIVE, SUSPENDED, ...; "" without an answer. "yaml(state)" also gives the reason."""
        words = self.ask("queued-resources", "describe", self.name, f"--format={what}")
        return "ACTIVE" if self.dry else " ".join(words.split())

    def look(self):
        """Exit code of the run on worker 0, or alive, gone, stopped; "" without an answer."""
        return self.ask("tpu-vm", "ssh", self.nodes[0], "--worker=0", f"--command={LOOK}").split("\n")[-1]

    def create(self):
        several = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        nodes = several if self.slices > 1 else [f"--node-id={self.name}"]
        image = KINDS[self.kind.split("-")[0]][2]
        return self.request("create", f"--accelerator-type={self.kind}", f"--runtime-version={image}",
                            *nodes, *["--spot"] * self.spot)

    def setup(self):
        with tempfile.TemporaryDirectory() as folder:
            archive = f"{folder}/repo.tar.gz"
            if not self.dry:
                git("archive", "--format=tar.gz", "-o", archive, self.commit)
            sent = [abs(self.start("tpu-vm", "scp", archive, f"{node}:repo.tar.gz", "--worker=all").wait())
                    for node in self.nodes]
        return max(sent) or self.on("all", SETUP)


# ------------------------------------------------------------------------------ what the laptop knows

def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"git {words[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.rstrip()


def committed(allow_dirty):
    """The commit that HEAD is; refused if something is changed that it lacks."""
    if not (ROOT / ".git").exists():
        raise Refused(f"{ROOT}: expected a git repository, found none; a pod gets a commit: git clone it, "
                      "or git init and commit what you have")
    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=all").split("\n")
               if line[:2] != "??" or line.endswith(".py")]
    if any(changed):
        missed = f"not committed, so a pod does not get it: {', '.join(changed)}"
        if not allow_dirty:
            raise Refused(f"{missed}; commit it, or go on without it by --allow-dirty")
        say(missed)
    return git("rev-parse", "HEAD")


def check_run(config, words, commit):
    """The words of train.py; refused if a word is no key or the commit has no such config."""
    for word in words:
        if word != "--fresh" and not re.match(r"--\w+=", word):
            raise Refused(f"expected --key=value after CONFIG, found {word!r}")
    try:
        text = git("show", f"{commit}:{Path(config).as_posix()}")
    except Refused:
        raise Refused(f"CONFIG: expected a file of commit {commit[:9]}, such as configs/moe_129b.py, "
                      f"found {config!r}; commit it, and `setup` again") from None
    if not re.search(r"""checkpoint_dir *= *["']?gs://""", "\n".join([text, *words])):
        say("warning: no --checkpoint_dir=gs://BUCKET/RUN: each host saves to a disk of its own, "
            "and what is there is lost with the pod")
    return [Path(config).as_posix(), *words]


# ---------------------------------------------------------------------------------------------- keep

def begin(pod, words, pause):
    """Start the run once the pod is ACTIVE; a preempted one is asked for again, once a try. Returns
    "" or what went wrong. Refused if the request FAILED: time does not cure that."""
    before, silent, asked = "", 0, False
    while (now := pod.state()) != "ACTIVE":
        if now == "FAILED":
            raise Refused(f"{pod.name} FAILED: {pod.state('yaml(state)')}", 1)
        if silent == PATIENCE or now == "SUSPENDED" and asked:
            return "a pod that was lost again" if now else "no answer from gcloud"
        if now == "SUSPENDED":
            pod.request("delete", "--force", "--quiet")
            asked = pod.bare = True
            if not any(pod.create() == 0 or time.sleep(pause) for _ in range(PATIENCE)):
                raise Refused(f"{pod.name} was preempted and could not be asked for again", 1)
        elif now not in ("", before):
            say(f"{pod.name} is {now}")
        before, silent = now, 0 if now else silent + 1
        time.sleep(pause)
    if pod.bare and pod.setup():
        return "a setup that failed"
    pod.bare = pod.on("all", start_script(words)) != 0
    return "a start that failed" * pod.bare


def watch(pod, pause):
    """The exit code of the run once it has one, or in words how it was lost."""
    ends, silent = {"stopped": 0, "gone": "no process: its host was started again"}, 0
    while silent < PATIENCE:
        answer = pod.look()
        if answer.isdigit() or answer in ends:
            return ends[answer] if answer in ends else int(answer)
        silent = 0 if answer else silent + 1
        if not answer and (now := pod.state()) not in ("", "ACTIVE"):
            return f"a pod that is {now}"
        time.sleep(pause)
    return "no answer from worker 0"


def keep(pod, words, retries, pause):
    """Run until it is done, 1 + retries times at most. The exit code."""
    if "--fresh" in words:
        raise Refused("--fresh: expected with `run` only, for `keep` repeats its command", 2)
    if pod.dry:
        begin(pod, words, 0)
        pod.look()
        print("# after a preemption, before the next try:")
        return pod.request("delete", "--force", "--quiet") or pod.create() or pod.setup()
    if not pod.state():
        raise Refused(f"{pod.name}: gcloud says nothing of it in {pod.zone}; `create` it first", 1)
    for attempt in range(retries + 1):
        end = begin(pod, words, pause) or watch(pod, pause)
        say(f"try {attempt} ended with {end}")
        if isinstance(end, int) and end not in AGAIN:
            return end
        time.sleep(pause)
    say(f"gave up after {retries} retries")
    return 75


# ---------------------------------------------------------------------------------------------- main

def matching(pattern, expected, kind=str):
    """For argparse: a word that is all of a pattern, as a `kind`."""
    def convert(word):
        if not re.fullmatch(pattern, word):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {word!r}")
        return kind(word)
    return convert


ID = dict(type=matching("[a-z][a-z0-9-]*", "lower-case letters, digits and hyphens"))
SWITCH = dict(action="store_true")
TAKES = {"NAME": ID, "ZONE": ID, "TYPE": dict(type=read_type), "CONFIG": dict(type=matching(".+", "a file")),
         "RETRIES": dict(type=matching(r"\d{1,6}", "a whole number", int)),
         "--slices": dict(type=matching(r"[1-9]\d{0,3}", "a whole number from 1", int)),
         "--pause": dict(type=matching(r"\d+(\.\d+)?", "seconds between looks", float), default=60.0),
         "--spot": SWITCH, "--follow": SWITCH, "--allow-dirty": SWITCH}
VERBS = {"create": "TYPE --spot", "status": "", "setup": "--allow-dirty", "run": "CONFIG --allow-dirty",
         "logs": "--follow", "stop": "", "keep": "TYPE RETRIES CONFIG --spot --pause --allow-dirty",
         "delete": ""}


def read_words(words):
    """(what argparse made of them, the words after CONFIG). Exit code 2 with a usage otherwise."""
    parser = argparse.ArgumentParser("launch.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, takes in VERBS.items():
        one = verbs.add_parser(verb, allow_abbrev=False)
        for name in ["NAME", "ZONE", *takes.split(), "--slices"]:
            one.add_argument(name, **TAKES[name])
    if not words:
        parser.exit(2, parser.format_help())
    given, keys = parser.parse_known_args([word for word in words if word != "--dry-run"])
    if keys and "CONFIG" not in given:
        verbs.choices[given.verb].error(f"not known here: {shlex.join(keys)}")
    return given, keys


def act(given, keys, dry):
    """Do what one command line says. The exit code."""
    file = ROOT / "out/pods" / given.ZONE / f"{given.NAME}.json"
    try:
        known = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        raise Refused(f"{file}: expected what `create` was told, found a damaged file; delete it, and give TYPE "
                      "and --slices again") from None
    several, kind, _ = getattr(given, "TYPE", (1, known.get("kind"), ""))
    if given.verb == "create":
        known = {}
    elif (known.get("kind") or kind) != kind:
        raise Refused(f"TYPE: expected {known['kind']}, as {file} has it, found {kind}")
    told = {"kind": kind, "spot": getattr(given, "spot", False) or known.get("spot", False),
            "slices": given.slices or known.get("slices") or several}
    ships = hasattr(given, "allow_dirty")
    head = committed(given.allow_dirty) if ships else None
    commit = head if given.verb == "setup" else known.get("commit", head)
    if ships and commit != head:
        say(f"the pod has commit {commit[:9]}, HEAD is {head[:9]}; `setup` ships HEAD")
    pod = Pod(given.NAME, given.ZONE, *told.values(), commit, dry)
    words = check_run(given.CONFIG, keys, commit) if "CONFIG" in given else []

    def remember(failed, facts):
        if not failed and not dry:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".partial").write_text(json.dumps(facts))
            file.with_suffix(".partial").replace(file)
        return failed
    if given.verb == "create":
        return remember(pod.create(), told)
    if given.verb == "setup":
        return remember(pod.setup(), told | {"commit": head})
    if given.verb == "run":
        return pod.on("all", start_script(words))
    if given.verb == "keep":
        say(f"after a preemption {given.NAME} is asked for again: {pod.slices} x {kind}, "
            + ("spot" if pod.spot else "on demand"))
        return keep(pod, words, given.RETRIES, given.pause)
    if given.verb == "status":
        state = pod.state()
        if not dry:
            print(state, pod.state("yaml(state)") if state in ("FAILED", "SUSPENDED") else "")
        return int(not state)
    if given.verb == "logs":
        command = f"tail -n 40 {'-F ' * given.follow}moe/log.txt"
        return pod.start("tpu-vm", "ssh", pod.nodes[0], "--worker=0", f"--command={command}").wait()
    if given.verb == "stop":
        return pod.on("all", STOP)
    failed = pod.request("delete", "--force")
    if not failed and not dry:
        file.unlink(missing_ok=True)
    return failed


def main(words):
    """The exit code."""
    try:
        return act(*read_words(words), "--dry-run" in words)
    except Refused as error:
        say(error.args[0])
        return (error.args[1:] or [2])[0]
    except FileNotFoundError as error:
        say(f"{error.filename}: not found on PATH; launch.py needs gcloud (cloud.google.com/sdk) and git")
        return 2
    except KeyboardInterrupt:
        say("interrupted; what runs on the pod goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
