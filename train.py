"""Training: one config file in, one finished run directory out.

Run:  python train.py configs/smoke.py [--key=value ...]    train, evaluate, report; can be resumed
      python train.py RUN_DIR                               resume the run of that directory
      python train.py RUN_DIR --sample --prompt="ROMEO."    continue a text; needs no data
      python train.py --compare RUN_DIR RUN_DIR ...         what differs, and what came of it
      python train.py CONFIG --replay 120                   show the batch of step 120
      python train.py CONFIG --fresh                        move an old run aside and start anew
      python train.py CONFIG --plan [--compile] [--search]  what a run costs (configs/plan.py)
      ... --coordinator=HOST:PORT --processes=N --process=I       one of N; a TPU pod needs no flags
      python train.py --help                                every key, its default, its meaning
Read: config, mesh, optimizer, step, batches, evaluation, checkpoint, run directory, main.
A step depends only on state and batch, a batch only on seed and step: a restored state resumes.
B batch  S sequence  A microbatches  L layers  E experts  K experts per token"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import json
import logging
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Literal, NamedTuple

try:
    import fcntl                    # noqa: F401  (configs/rundir.py needs it)
except ImportError:
    raise SystemExit("train.py: needs Linux or macOS; on Windows run it in WSL") from None

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as Spec

import balance
import data
import kernels
import model
import scaling


# ---------------------------------------------------------------------------------------- config

class ConfigError(ValueError):
    """A mistake in what the user gave, in one line whatever it quotes. Exit code 2."""
    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


class Diverged(RuntimeError):
    """Training must not go on: update after update is not finite. Exit code 3."""


class CorruptCheckpoint(RuntimeError):
    """There are checkpoints, and none can be trusted. Nothing has been touched. Exit code 4."""


class TemporaryError(RuntimeError):
    """What failed may work the next time, and what was saved is sound. Exit code 75."""


ANEW = "choose another --run_dir, or add --fresh, which moves the old run aside"


def refuse(where, expected, found, advice=""):
    """Raise ConfigError, which main prints as one line."""
    raise ConfigError(f"{where}: expected {expected}, found {found}" + (advice and f"; {advice}"))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. 0 in adam_lr, matrix_lr, beta2 or eps: what the recipe's heuristic says."""
    mixture: tuple                      # ((source, weight), ...); data.py says what a source can be
    tokenizer: str                      # "bytes", "bpe:N" (trained here) or a .tiktoken file
    steps: int                          # optimizer steps
    batch_size: int                     # B: sequences per step, over devices and microbatches
    accumulate: int = 1                 # A: microbatches per step; changes memory, not the result
    seed: int = 0                       # of the weights and the data order
    data_dir: str = "out/data"          # prepared corpora, and what was downloaded for them
    run_dir: str = ""                   # where the run is kept; "" is out/<name of the config file>
    recipe: Literal["v1", "v2"] = "v1"  # defaults (RECIPES) and heuristic of the rates
    init_from: str = ""                 # begin with the weights of a run, RUN@STEP, or a directory
    init_tokenizer: Literal["same", "any"] = "same"     # "any": even if they had another one
    keep_optimizer: bool = False        # go on with its moments and its step too: a branch
    optimizer: Literal["adamh", "muonh", "adamw"] = "adamh"     # "adamw": a baseline, no sphere
    adam_lr: float = 0.0                # peak rate of embedding, router, gates and gains
    matrix_lr: float = 0.0              # of matrices: relative step on the sphere; "adamw": adam_lr
    lr_scale: float = 1.0             # multiplies both rates of the heuristic
    adam_lr_scale: float = 1.0             # multiplies adam_lr of the heuristic once more
    weight_decay: float = 0.1           # of "adamw", times the rate [cited: nanoGPT]
    beta1: float = 0.9062               # of Adam's first moment [cited: marin #4697]
    beta2: float = 0.0                  # of Adam's second moment
    eps: float = 0.0                    # of Adam's denominator
    momentum: float = 0.95              # of MuonH [cited: marin #5596]
    schedule: Literal["linear", "wsd"] = "linear"               # "wsd" holds the peak in between
    warmup: float = 0.1                 # share of the steps that warms up
    decay: float = 0.2                  # share of the steps that decays, for "wsd"
    min_lr_ratio: float = 0.0           # last rate over peak rate
    clip: float = 1.0                   # largest gradient norm of each optimizer group; 0 is off
    compiled_dir: str = "out/compiled"  # compiled programs, for a quick second start; "" is off
    devices: int = 0                    # 0: all accelerators, or CPU devices that fit the batch
    replicas: int = 1                   # mesh axis "replica": copies of weights; 0: one a device
    expert_parallel: int = 1            # mesh axis "expert": devices that share a layer's experts
    expert_block: str = ""              # their block of a TPU's torus, "2x2x2"; "": jax chooses one
    topology: str = ""                  # for --plan: "h100:8", "v4:8x8x16", slices: "2xv5p:8x8x8"
    peak_flops: float = 0.0             # of one device, for MFU; 0: from the table of known chips
    log_every: int = 10                 # steps between log lines
    eval_every: int = 200               # steps between evaluations; the last step has one
    eval_tokens: int = 32_768           # of each held-out domain, before the last step
    eval_tokens_final: int = 0          # the same after the last step; 0: all of it
    save_every: int = 500               # steps between checkpoints; the last step has one
    save_minutes: float = 0.0           # also save after so many minutes, at a log line; 0 is off
    keep: int = 2                       # newest checkpoints that are kept
    keep_every: int = 0                 # keep for good the checkpoints of its multiples; 0 is none
    checkpoint_dir: str = ""            # also gs://BUCKET/PATH; "" is run_dir/checkpoints
    max_skips: int = 5                  # updates skipped in a row that end the run
    skip_sigma: float = 0.0             # also skip losses or norms so many sigma high; 0 is off
    stuck_minutes: float = 60.0         # without a step done: stacks, exit code 75; 0 is off
    heartbeat_seconds: int = 100        # a peer silent for so long is lost; all others stop
    prompt: str = "\n"                  # how the sample begins
    sample_tokens: int = 200            # length of the sample; 0 is no sample
    sample_seed: int = 0                # another number, another sample
    temperature: float = 0.8            # of the sample; 0 takes the likeliest token
    top_k: int = 0                      # the sample draws from so many likeliest tokens; 0: all

    def __post_init__(self):
        def need(holds, expected, *keys):
            for key in keys:
                if not holds(getattr(self, key)):
                    raise ValueError(f"{key}: expected {expected}, found {getattr(self, key)!r}")
        numeric = [f.name for f in dataclasses.fields(self) if f.type in (int, float)]
        need(lambda x: x > 0, "a positive number", "steps", "batch_size", "accumulate", "log_every",
             "eval_every", "eval_tokens", "save_every", "keep", "expert_parallel", "max_skips",
             "heartbeat_seconds", "lr_scale", "adam_lr_scale")
        need(lambda x: x >= 0, "zero or a positive number", *numeric)
        need(lambda x: x <= 1, "a number from 0 to 1", "warmup", "decay", "min_lr_ratio")
        need(lambda x: x < 2**63, "a number below 2**63", "seed", "sample_seed")
        need(lambda x: x < 2**31, "a number below 2**31", "steps", "batch_size")
        need(lambda x: x < 1, "a number from 0 to below 1", "beta1", "beta2", "momentum")
        need(lambda x: self.schedule == "linear" or self.warmup + x <= 1, "at most 1 - warmup",
             "decay")
        need(lambda x: int(x * self.steps) < self.steps, "a share with a step after it", "warmup")
        need(lambda x: self.init_from or not x, "False unless init_from is set", "keep_optimizer")
        need(lambda x: self.batch_size % x == 0, f"a divisor of batch_size={self.batch_size}",
             "accumulate")
        need(lambda x: x and all(map(is_source, x)), 'pairs such as (("books", 1.0),)', "mixture")


def is_source(pair):
    """Whether it is a name with a positive weight."""
    name, weight = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, 0)
    return isinstance(name, str) and isinstance(weight, int | float) and weight > 0


# Defaults that belong to a recipe; a line of the config wins. [cited: marin #4697 and #5951]
RECIPES = {
    "v1": {},
    "v2": dict(optimizer="muonh", warmup=0.01, clip=0.0, min_lr_ratio=0.05, router_z=0.0,
               logit_z=0.0)}
KEYS = typing.get_type_hints(model.ModelConfig) | typing.get_type_hints(TrainConfig)


# what nanoGPT calls them
SYNONYMS = {"learning_rate": "adam_lr' and 'matrix_lr", "max_iters": "steps",
            "block_size": "seq_len", "n_embd": "hidden_dim", "out_dir": "run_dir"}


def check(key, value, where):
    """The value, if the key takes it (an int may stand for a float); else ConfigError."""
    if key not in KEYS:
        near = [SYNONYMS[key]] if key in SYNONYMS else difflib.get_close_matches(key, KEYS, 1)
        hint = f"did you mean '{near[0]}'?" if near else "python train.py --help lists all keys"
        own = "" if where == "command line" else f"; a name of your own begins with _: _{key}"
        raise ConfigError(f"{where}: unknown config key '{key}'; {hint}{own}")
    kind, choices = KEYS[key], typing.get_args(KEYS[key])
    if key == "mixture" and isinstance(value, str):
        value = ((value, 1.0),)
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if choices and value not in choices:
        refuse(f"{where}: {key}", " or ".join(map(repr, choices)), repr(value))
    if not choices and type(value) is not kind:
        refuse(f"{where}: {key}", kind.__name__, repr(value))
    if kind is float and not math.isfinite(value):
        refuse(f"{where}: {key}", "a finite number", repr(value))
    if key == "tokenizer":
        value = os.path.expanduser(value)
    return check_path(key, value, where) if key.endswith("_dir") else value


def check_path(key, path, where):
    """A path with its ~ replaced, and absolute if gs:// will do. ConfigError for other URLs."""
    path = os.path.expanduser(path)
    url, bucket = re.match(r"\w\w+:/", path), key in ("checkpoint_dir", "compiled_dir")
    if path.startswith("~") or url and not (bucket and path.startswith("gs://")):
        refuse(f"{where}: {key}", "a directory" + " or gs://BUCKET/PATH" * bucket, repr(path),
               "only --checkpoint_dir can be in a bucket" if url and not bucket else "")
    return os.path.abspath(path) if path and bucket and not url else path


def read_override(argument, following="VALUE"):
    """(key, value) of a --key=value. A value that is no Python literal is a word."""
    match = re.fullmatch(r"--(\w+)=(.*)", argument, re.DOTALL)
    if not match:
        key, _, value = argument.lstrip("-").replace("-", "_").partition("=")
        if key not in KEYS and argument.startswith("-"):
            check(key, value, "command line")       # says what is near
        advice = f"write --{key}={value or following}" if key in KEYS else "quote spaces"
        refuse("command line", "--key=value", repr(argument), advice)
    key, value = match.groups()
    if KEYS.get(key) is not str:
        with contextlib.suppress(Exception):
            value = ast.literal_eval(value)
    return key, check(key, value, "command line")


def run_config(path):
    """{name: value} of what a config file sets. Not of names that begin with _, of imports, of
    loop variables, and of functions and the like."""
    folder, before = os.path.dirname(os.path.abspath(path)), set(sys.modules)
    sys.path.insert(0, folder)                      # for `from base import *`
    try:
        names = runpy.run_path(str(path))
        tree = [*ast.walk(ast.parse(Path(path).read_bytes()))]
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: not a runnable config file: {one_line(error)}") from None
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:      # another folder may have another base.py
            if Path(folder, f"{name}.py").exists():
                del sys.modules[name]
    other = {alias.asname or alias.name for node in tree for alias in getattr(node, "names", ())
             if isinstance(alias, ast.alias)}
    other |= {name.id for node in tree if isinstance(node, ast.For)
              for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    plain = int | float | str | tuple | list
    return {key: value for key, value in names.items() if key in KEYS or
            key[0] != "_" and key not in other and isinstance(value, plain)}


def load_config(path, overrides=()):
    """(ModelConfig, TrainConfig) of a config file of plain assignments or of a run directory, with
    --key=value applied. A config file is code: run only yours."""
    from configs import report
    path = os.path.expanduser(path)
    run = Path(path).parent if Path(path).name == "config.json" else Path(path)
    if not run.is_dir() and not Path(path).is_file():
        ready = {file.stem: file for file in Path(__file__).parent.glob("configs/*.py")}
        near = difflib.get_close_matches(Path(path.split("=")[-1]).stem, ready, 1)
        hint = (f"did you mean {os.path.relpath(ready[near[0]])}?" if near else
                "it comes first; configs/ holds the ready ones")
        refuse(path, "a config file or a run directory", "none", hint)
    values = report.read_run(run) if run.is_dir() else run_config(path)
    values = {key: check(key, value, path) for key, value in values.items()}
    told = dict(map(read_override, overrides, [*overrides[1:], "VALUE"]))
    values |= told
    values = RECIPES[values.get("recipe", "v1")] | values
    values["run_dir"] = values.get("run_dir") or f"out/{Path(path).stem}"
    configs = []
    for cls in (model.ModelConfig, TrainConfig):
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ConfigError(f"{path}: missing config key '{field.name}' of {cls.__name__}")
        own = values.keys() & cls.__dataclass_fields__
        try:
            configs.append(cls(**{key: values[key] for key in own}))
        except ValueError as error:
            where = "command line" if str(error).split(":")[0] in told else path
            raise ConfigError(f"{where}: {error}") from None
    return tuple(configs)


# -------------------------------------------------------------------------------------------- mesh

MESH = ("replica", "data", "expert")    # they split tokens; model.param_specs: which split weights


def mesh_shape(t, n):
    """{axis: length} of the mesh of n devices."""
    copies = t.replicas or n // t.expert_parallel
    return dict(zip(MESH, (copies, n // copies // t.expert_parallel, t.expert_parallel)))


def mesh_error(c, t, n):
    """Why n devices cannot share this model and this batch, in one line; None if they can."""
    least, rows = max(1, t.replicas) * t.expert_parallel, t.batch_size // t.accumulate
    if n % least:
        return f"devices: expected a multiple of replicas x expert_parallel = {least}, found {n}"
    if rows % n:
        return f"batch_size / accumulate: expected a multiple of the {n} devices, found {rows}"
    size = mesh_shape(t, n)
    def uneven(path, w):
        for axis, length in zip(w.spec, w.shape):
            if length % (parts := math.prod(size[name] for name in jax.tree.leaves(axis))):
                return (f"{path} {w.shape}: expected axes that divide over the mesh, found {length}"
                        f" over {parts} of {axis!r}; use other sizes or another mesh")
    return next(iter(jax.tree.leaves(model.map_params(uneven, c))), None)


def use_cpu_devices(n):
    """Let jax make n devices of this machine's CPU, unless it has made them already."""
    if n > 1024:                                    # they take memory and threads, and minutes
        refuse("devices", "at most 1024 on a CPU", n)
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", n)


def local_devices(c, t):
    """The devices of this machine that the run uses: all accelerators; or as many CPU devices as
    can share the batch, at most one a core: XLA runs most operations of a CPU on one core."""
    def most_that_fit(most):
        return max((n for n in range(1, most + 1) if not mesh_error(c, t, n)), default=most)
    from configs import process
    kernels.keep_freed_memory()
    use_cpu_devices(t.devices or most_that_fit(process.usable_cores()))
    if t.compiled_dir:
        jax.config.update("jax_compilation_cache_dir", t.compiled_dir)
    devices = jax.devices()
    most = len(devices)
    n = t.devices or (most_that_fit(most) if devices[0].platform == "cpu" else most)
    if n > most or len({d.process_index for d in devices[:n]}) < jax.process_count():
        refuse("devices", f"at most {most} ({devices[0].device_kind}), some of each process", n)
    return devices[:n]


def make_mesh(c, t, devices=None):
    """The devices as replica x data x expert: copies of the weights, FSDP shares, experts.
    mesh_utils lays the axes along a TPU's torus; "expert" comes last, so that neighbors share
    experts. Raises ConfigError if the devices cannot share the model or the batch."""
    devices = local_devices(c, t) if devices is None else devices
    if reason := mesh_error(c, t, len(devices)) or kernels.misfit(devices[0].platform, c):
        raise ConfigError(reason)
    if c.exchange == "ragged" and devices[0].platform not in kernels.RAGGED_ALL_TO_ALL:
        refuse("exchange", "'ring' on a CPU", "'ragged', which XLA lacks there")
    shape = tuple(mesh_shape(t, len(devices)).values())
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if shape[0] % slices:
        refuse("replicas", f"a multiple of the {slices} slices", shape[0])
    if t.expert_block:
        from configs import layout
        grid = layout.torus_grid(t.expert_block, shape, devices)
    elif slices > 1:            # each slice has its own replicas: only their sums leave it
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH, axis_types=(AxisType.Auto,) * 3)


# --------------------------------------------------------------------------------------- optimizer

def rates(c, t):
    """The peak rates, beta2 and eps: scaling.heuristic's, with whatever the config sets instead."""
    batch_tokens = t.batch_size * c.seq_len
    fit = scaling.heuristic(t.recipe, t.steps * batch_tokens, batch_tokens, c.hidden_dim)
    adam_lr = t.adam_lr or t.lr_scale * t.adam_lr_scale * fit.adam_lr
    matrix_lr = adam_lr if t.optimizer == "adamw" else t.lr_scale * fit.matrix_lr
    return scaling.Rates(adam_lr, t.matrix_lr or matrix_lr, t.beta2 or fit.beta2, t.eps or fit.eps)


def lr_multiplier(t, step):
    """The learning rate over its peak after `step` steps: up in int(warmup * steps) of them, from
    0, then down to min_lr_ratio. [levanter, optim/config.py]"""
    warm = int(t.warmup * t.steps)
    down = t.steps - warm if t.schedule == "linear" else int(t.decay * t.steps)
    parts = (optax.linear_schedule(0.0, 1.0, warm), optax.constant_schedule(1.0),
             optax.linear_schedule(1.0, t.min_lr_ratio, down))
    return optax.join_schedules(parts, (warm, t.steps - down))(step)


class HyperballState(NamedTuple):
    count: jax.Array
    direction: typing.Any


def matrix_norm(w):
    """Frobenius norm over the last two axes: of every matrix of a stack, per layer and expert."""
    return jnp.sqrt(jnp.sum(w * w, axis=(-2, -1), keepdims=True))


def hyperball(direction, rate):
    """Move every matrix along the sphere of its initial norm: the H of AdamH and MuonH.
    Of the output u of `direction`, an optax transformation, only the direction counts. A step is
    `rate` times the matrix's own norm along -u; then the matrix is scaled back to that norm. So the
    rate is relative, the same for every size of matrix, and weight decay has nothing to do. The
    floor of 1e-10 keeps a zero gradient from becoming NaN. [marin #4697]"""
    def init(params):
        return HyperballState(jnp.zeros((), jnp.int32), direction.init(params))
    def update(grads, state, params):
        us, inner = direction.update(grads, state.direction, params)
        def move(w, u):
            norm = matrix_norm(w)
            moved = w - rate(state.count) * norm * u / jnp.maximum(matrix_norm(u), 1e-10)
            return moved * norm / jnp.maximum(matrix_norm(moved), 1e-10) - w
        return jax.tree.map(move, params, us), HyperballState(state.count + 1, inner)
    return optax.GradientTransformation(init, update)


# One (a, b, c) for each iteration of X <- aX + (bA + cAA)X, A = XX': five take every singular value
# from (0, 1] to near 1. [levanter's muon, "quintic"]
NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))


def orthogonalize(m, mesh=None, spec=None):
    """Roughly the orthogonal matrix nearest to each matrix of a stack, by Newton-Schulz in bfloat16
    [Muon, kellerjordan.github.io/posts/muon]. The 1e-8 keeps a zero matrix from becoming NaN.
    On a mesh two all-to-alls lead from `spec` to whole matrices and back: products of split ones
    would need sums over devices, gigabytes a step."""
    x = (m / (matrix_norm(m) + 1e-8)).astype(jnp.bfloat16)
    if mesh is not None:
        x, whole = shard_by_matrix(x, mesh)
        x = lax.with_sharding_constraint(x, NamedSharding(mesh, whole))
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT                                     # the shorter side is squared
    for a, b, c in NEWTON_SCHULZ:
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    x = x if wide else x.mT
    if mesh is not None:
        x = lax.with_sharding_constraint(x, NamedSharding(mesh, spec))[:m.shape[0]]
    return x.astype(m.dtype)


def shard_by_matrix(x, mesh):
    """(x, spec) so that "data" splits a stack into whole matrices: by expert if they divide, else
    by layer, padded with zero matrices to a multiple. A single matrix is copied."""
    if x.ndim == 2:
        return x, Spec()
    if x.ndim == 4 and x.shape[1] % (mesh.shape["expert"] * mesh.shape["data"]) == 0:
        return x, Spec(None, ("expert", "data"))
    padding = [(0, -x.shape[0] % mesh.shape["data"])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding), Spec("data", "expert") if x.ndim == 4 else Spec("data")


# Which rule owns which group of model.param_specs. V1 clips routed and shared experts as a group of
# their own. [marin #4697, without two quirks of Marin's: a substring that sent one GatedNorm to
# Adam, and stacked gains among the matrices]
GROUPS = {
    "adamh": dict(adam="adam", matrix="adamh", head="adamh", expert="adamh_expert",
                  shared="adamh_expert"),
    "muonh": dict(adam="adam", matrix="muonh", head="adamh", expert="muonh", shared="muonh"),
    "adamw": dict(adam="adam", matrix="adamw", head="adamw", expert="adamw", shared="adamw")}


def masked(leaf):
    """Whether a leaf stands for a weight of another group, as optax.multi_transform marks it."""
    return isinstance(leaf, optax.MaskedNode)


def make_optimizer(c, t, mesh=None):
    """The optax transformation of all weights: clip, direction and step, group by group."""
    specs, r = model.map_params(lambda _, w: w.spec, c), rates(c, t)
    @jax.named_scope("orthogonalize")
    def orthogonal(ms, _):
        one = lambda m, spec: m if masked(m) else orthogonalize(m, mesh, spec)
        return jax.tree.map(one, ms, specs, is_leaf=masked)
    def ball(direction):
        return hyperball(direction, lambda step: r.matrix_lr * lr_multiplier(t, step))
    adam = optax.scale_by_adam(t.beta1, r.beta2, r.eps)
    muon = optax.chain(optax.trace(t.momentum, nesterov=True), optax.stateless(orthogonal))
    lr = lambda peak: optax.scale_by_learning_rate(lambda step: peak * lr_multiplier(t, step))
    rules = {"adam": optax.chain(adam, lr(r.adam_lr)),
             "adamw": optax.chain(adam, optax.add_decayed_weights(t.weight_decay), lr(r.matrix_lr)),
             "adamh": ball(adam), "adamh_expert": ball(adam), "muonh": ball(muon)}
    clip = optax.clip_by_global_norm(t.clip) if t.clip else optax.identity()
    labels = model.map_params(lambda _, w: GROUPS[t.optimizer][w.group], c)
    return optax.multi_transform({k: optax.chain(clip, rule) for k, rule in rules.items()}, labels)


# -------------------------------------------------------------------------------------------- step

WINDOW = 128                    # W [OLMo-core's SkipStepOptimizer]


class State(NamedTuple):
    step: jax.Array             # int32, optimizer steps taken
    params: dict                # float32, the tree of model.param_specs
    opt: typing.Any             # optax state
    bias_LE: jax.Array          # float32, the balancing bias in use: the only one there is
    history_2W: jax.Array       # float32, loss and gradient norm of the last W steps; -1: not yet
    memory: tuple = ()          # float32 arrays [L,E], what a balancing rule keeps beside its bias


def accept_step(t, state, loss, gnorm):
    """Whether a step's update may be taken, and the new history_2W. An update that is not
    finite never may. With skip_sigma, neither may one whose loss or gradient norm is more than so
    many standard deviations above its mean over the last W steps, once half of them are known.
    Outliers enter the history, so a new level is accepted in time."""
    now_2, history = jnp.stack([loss, gnorm]), state.history_2W
    good = finite = jnp.all(jnp.isfinite(now_2))
    if t.skip_sigma:
        known = history >= 0
        count_2 = jnp.maximum(known.sum(axis=1), 2)
        mean_2 = jnp.sum(history, axis=1, where=known) / count_2
        squares_2 = jnp.sum((history - mean_2[:, None]) ** 2, axis=1, where=known)
        limit_2 = mean_2 + t.skip_sigma * jnp.sqrt(squares_2 / (count_2 - 1))
        good &= jnp.all((count_2 < WINDOW // 2) | (now_2 <= limit_2))
    return good, jnp.where(finite, history.at[:, state.step % WINDOW].set(now_2), history)


def make_state(c, t, key):
    """The state before step 1. orbax refuses empty arrays: a dense model has one expert's bias."""
    params, memory = model.init(c, key), balance.RULES[c.balancer].memory
    bias_LE, *memory = jnp.zeros((1 + memory, c.num_layers, max(1, c.num_experts)))
    return State(jnp.zeros((), jnp.int32), params, make_optimizer(c, t).init(params), bias_LE,
                 -jnp.ones((2, WINDOW), jnp.float32), tuple(memory))


def first_state(c, t, mesh, tokenizer):
    """The state before a run's first step: fresh, or begun from the weights of t.init_from."""
    if t.init_from:
        from configs import convert
        return convert.begin(c, t, mesh, tokenizer)
    make = functools.partial(make_state, c, t)      # without the key: one program for all seeds
    return jax.jit(make, out_shardings=state_shardings(c, t, mesh))(jax.random.key(t.seed))


def abstract_state(c, t, mesh):
    """A state's shapes, types and shardings: moments are split like weights, the rest is copied."""
    shapes = jax.eval_shape(lambda: make_state(c, t, jax.random.key(0)))
    specs = model.map_params(lambda _, w: w.spec, c)
    opt = optax.tree_map_params(
        make_optimizer(c, t), lambda a, spec: a if masked(a) else spec, shapes.opt, specs,
        transform_non_params=lambda _: Spec(), is_leaf=masked)
    placed = State(Spec(), specs, opt, Spec(), Spec(), tuple(Spec() for _ in shapes.memory))
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
        shapes, placed)


def state_shardings(c, t, mesh):
    """The State of NamedShardings of a state on the mesh."""
    return jax.tree.map(lambda a: a.sharding, abstract_state(c, t, mesh))


def merge_microbatches(stats):
    """RouterStats of A stacked microbatches as one batch's: tokens in a row, counts summed."""
    def tokens(x_ALT):
        A, L, T, *rest = x_ALT.shape
        return jnp.moveaxis(x_ALT, 0, 1).reshape(L, A * T, *rest)
    return stats._replace(load_E=stats.load_E.sum(0), dropped=stats.dropped.sum(0),
                          margin_TE=tokens(stats.margin_TE), z_T=tokens(stats.z_T), prob_TE=None)


def make_train_step(c, t, mesh, platform=None):
    """The jitted (state, batch) -> (state, metrics). batch: dict of [A,B/A,S] arrays, B/A split
    over the mesh. platform: that of the mesh's devices, unless another is compiled for.
    Forward, backward and balancing run inside one shard_map, where every collective is a line of
    code: all_gather and reduce_scatter in kernels.gather_weight, exchanges in moe, psums here and
    in balance. The optimizer runs outside, on whole arrays; XLA adds one small all-reduce for each
    of its norms."""
    specs, optimizer = model.map_params(lambda _, w: w.spec, c), make_optimizer(c, t, mesh)
    platform = platform or mesh.devices.flat[0].platform

    def sum_copies(g, spec):
        """Sum a gradient over the axes that copy its weight; others the transposes have summed."""
        split = jax.tree.leaves(tuple(spec))
        return lax.psum(g, tuple(axis for axis in MESH if axis not in split))
    def gradients(params, bias, batch):                 # bias: (bias_LE, *memory)
        totals = lax.psum({"weight": jnp.sum(batch["weights"]),
                           "tokens": jnp.sum(batch["segments"] != 0).astype(jnp.float32)}, MESH)
        def objective(params, rows):
            return model.loss(params, bias[0], rows, totals, c, True, platform)
        def microbatch(total, rows):
            (_, record), grads = jax.value_and_grad(objective, has_aux=True)(params, rows)
            return jax.tree.map(jnp.add, total, grads), record

        grads, (nll_A, stats) = lax.scan(microbatch, jax.tree.map(jnp.zeros_like, params), batch)
        grads = jax.tree.map(sum_copies, grads, specs)
        metrics = {"loss": lax.psum(jnp.sum(nll_A), MESH) / totals["weight"]}
        if stats is not None:
            stats, real_T = merge_microbatches(stats), batch["segments"].reshape(-1) != 0
            load_LE, dropped_L, z = lax.psum(
                (stats.load_E, stats.dropped, jnp.sum(stats.z_T * real_T)), MESH)
            bias, kept_L = balance.update(c.balancer, stats.margin_TE, real_T, bias,
                                          c.experts_per_token, MESH, c.balancer_rate, platform)
            metrics |= {"load_LE": load_LE, "dropped_L": dropped_L, "bias_kept": jnp.sum(kept_L),
                        "router_z": z / (c.num_layers * totals["tokens"])}
        return grads, bias, metrics
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(specs, Spec(), Spec(None, MESH)),
                            out_specs=(specs, Spec(), Spec()), check_vma=False)
    def train_step(state, batch):
        grads, bias, metrics = sharded(state.params, (state.bias_LE, *state.memory), batch)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params, gnorm = optax.apply_updates(state.params, updates), optax.tree.norm(grads)
        good, history_2W = accept_step(t, state, metrics["loss"], gnorm)
        # XLA fuses this choice into the update itself, so it costs no pass over memory
        new, old = (params, opt, bias), (state.params, state.opt, (state.bias_LE, *state.memory))
        params, opt, (bias_LE, *memory) = jax.tree.map(functools.partial(jnp.where, good), new, old)
        metrics |= {"gnorm": gnorm, "lr_multiplier": lr_multiplier(t, state.step), "skipped": ~good}
        return State(state.step + 1, params, opt, bias_LE, history_2W, tuple(memory)), metrics
    shardings = state_shardings(c, t, mesh), NamedSharding(mesh, Spec())
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


# ------------------------------------------------------------------------------------------ batches

def local_rows(batch_size, mesh, accumulate=1):
    """Which rows of the global batch this process feeds to its devices, by microbatch."""
    shape, sharding = (accumulate, batch_size // accumulate), NamedSharding(mesh, Spec(None, MESH))
    places = sharding.addressable_devices_indices_map(shape).values()
    mine = sorted({row for _, rows in places for row in range(shape[1])[rows]})
    return np.arange(batch_size).reshape(shape)[:, mine].reshape(-1)


def to_global_batch(batch, mesh, accumulate=1):
    """This process's rows of a data.Batch as a dict of global arrays [A,B/A,S] on their devices."""
    arrays = {"tokens": batch.tokens_BS, "targets": batch.targets_BS, "segments": batch.segments_BS,
              "weights": batch.weights_BS.astype(np.float32)}
    place = functools.partial(jax.make_array_from_process_local_data,
                              NamedSharding(mesh, Spec(None, MESH)))
    return {k: place(x.reshape(accumulate, -1, x.shape[-1])) for k, x in arrays.items()}


# -------------------------------------------------------------------------------------- evaluation

def serving(c):
    """The config of evaluation and sampling: no token's loss may depend on who shares its batch."""
    causal = balance.NON_CAUSAL.get(c.balancer, c.balancer)
    return dataclasses.replace(c, capacity_factor=0.0, exchange="ring", balancer=causal)


def make_eval_step(c, mesh, bytes_V):
    """The jitted (params, bias_LE, batch) -> summed nats, scored tokens and their bytes."""
    c, platform = serving(c), mesh.devices.flat[0].platform
    specs = model.map_params(lambda _, w: w.spec, c)
    bytes_V = jnp.zeros(c.vocab_size).at[:len(bytes_V)].set(bytes_V)    # unused ids have 0 bytes
    def score(params, bias_LE, batch):
        rows = {k: v[0] for k, v in batch.items()}
        nll_T, _, _ = model.token_losses(params, bias_LE, rows, c, True, platform)
        weights, sizes = rows["weights"], bytes_V[rows["targets"]]
        nats = jnp.sum(weights.reshape(-1) * nll_T)
        return lax.psum((nats, jnp.sum(weights), jnp.sum(sizes * weights)), MESH)
    return jax.jit(jax.shard_map(score, mesh=mesh, in_specs=(specs, Spec(), Spec(None, MESH)),
                                 out_specs=Spec(), check_vma=False))


def evaluate(state, eval_step, mixture, c, t, mesh, limit=None, done=lambda tokens: None):
    """Loss of every held-out domain, {name: {"loss": nats per token, "bpb": bits per byte, ...}},
    and their unweighted mean as "macro". Bits per byte compare across tokenizers; nats do not.
    done is told, batch by batch, how many tokens have been scored."""
    rows = t.batch_size // t.accumulate
    here, domains = local_rows(rows, mesh), {}
    for name, stream in mixture.heldout.items():
        sums = np.zeros(3)
        for batch in data.heldout_batches(stream, rows, c.seq_len, mixture.tokenizer.eot, limit):
            batch = to_global_batch(data.Batch(*(array[here] for array in batch)), mesh)
            sums += np.array([float(x) for x in eval_step(state.params, state.bias_LE, batch)])
            done(rows * c.seq_len)
        nats, tokens, size = sums
        domains[name] = {"loss": nats / tokens, "bpb": nats / math.log(2) / size,
                         "tokens": int(tokens), "bytes": int(size)}
    macro = {key: float(np.mean([d[key] for d in domains.values()])) for key in ("loss", "bpb")}
    return domains | {"macro": macro}


# ------------------------------------------------------------------------------------ checkpoint

def leaves_by_name(tree):
    """{path: leaf}, in the order of the tree's leaves."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def checksum(x, first=0):
    """32 bits of an array's bits and their places, exact and the same on every mesh. Each element
    is mixed with its place by a one-to-one function (the last step of murmur3), and all are summed
    modulo 2**32: a change of one element is seen always, any other almost always. first: the place
    of the first element, for a part of an array: the sums of the parts are the whole's."""
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.full(x.shape, first % 2**32, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):        # a flat view would gather a split array
        place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits ^= place * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ bits >> shift) * jnp.uint32(factor)
    return jnp.sum(bits, dtype=jnp.uint32)


@jax.jit
def checksums(leaves):
    """Of every leaf, in order, [leaves]; and whether all of them are finite."""
    finite = [jnp.all(jnp.isfinite(x)) for x in leaves if x.dtype != jnp.int32]
    return jnp.stack([checksum(x) for x in leaves]), jnp.all(jnp.stack(finite))


def all_agree(fine):
    """Whether all processes say so: what each has read for itself is decided on together."""
    return bool(multihost_utils.process_allgather(np.array(fine)).all())


def gather(value):
    """[value of process 0, value of process 1, ...], of anything that JSON can hold."""
    if not jax.distributed.is_initialized():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, max(sizes) - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


UNFINISHED = "*.orbax-checkpoint-tmp*"
TRANSIENT = re.compile("RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED")


class Checkpoints:
    """Whole states, written by orbax: asynchronous, sharded, on a disk or in a bucket (gs://).
    orbax restores a flipped bit silently, so each has a record: its step, the run's config and a
    checksum of every array. A state that does not match its record is named in `broken`,
    {step: why}, and moved aside once another one is used."""

    def __init__(self, t):
        import orbax.checkpoint as ocp
        from configs import process
        from etils import epath
        process.take_paths_literally()
        self.ocp, self.t, self.manager, self.broken = ocp, t, None, {}
        self.saved = None                       # step that was last restored or given to orbax
        self.folder = epath.Path(t.checkpoint_dir or Path(t.run_dir, "checkpoints").resolve())

    def steps(self):
        """Of all checkpoints that were committed, sound or not, newest first."""
        found = self.folder.iterdir() if self.reach(self.folder.exists) else ()
        return sorted((int(path.name) for path in found if re.fullmatch("[0-9]+", path.name)
                       and self.ocp.utils.is_checkpoint_finalized(path)), reverse=True)

    def reach(self, act):
        """What act() returns, if the folder can be reached in a minute and allows it."""
        from configs import process
        try:
            return process.within(60, act)
        except (TimeoutError, ConnectionError) as error:
            raise TemporaryError(f"checkpoint_dir: {self.folder}: {one_line(error)}") from None
        except Exception as error:
            refuse("checkpoint_dir", "a directory or bucket that can be read and written",
                   f"{self.folder} ({one_line(error)})")

    def record(self, step):
        """{"step": step, "config": dict, "arrays": {name: checksum}}. ValueError if damaged."""
        try:
            record = json.loads((self.folder / str(step) / "record" / "metadata").read_bytes())
            if record["step"] == step and record["config"].keys() and record["arrays"].keys():
                return record
            raise ValueError("it has been altered")
        except Exception as error:              # whatever damage to a small file can lead to
            raise ValueError(f"its record cannot be read ({one_line(error)})") from None

    def read(self, step, wanted):
        """(leaves, "") of one checkpoint; or (None, why it is not to be trusted), for all processes
        alike. TemporaryError if time cures it. wanted: {name: ShapeDtypeStruct}."""
        why, later, args = "", False, self.ocp.args.StandardRestore(wanted)
        try:
            # The handler itself: the manager's restore has a barrier, at which the other processes
            # would wait for one that could not read its part.
            handler, sums = self.ocp.StandardCheckpointHandler(), self.record(step)["arrays"]
            if wanted.keys() != sums.keys():
                raise ConfigError(f"only this code has {sorted(wanted.keys() - sums.keys())}, only "
                                  f"the checkpoint has {sorted(sums.keys() - wanted.keys())}")
            leaves = handler.restore(self.folder / str(step) / "state", args=args)
        except Exception as error:              # whatever orbax and tensorstore raise about damage
            why, later = one_line(error), bool(TRANSIENT.search(str(error)))
        if not all_agree(not later):
            raise TemporaryError(f"{self.folder}: step {step} could not be read now, nothing was "
                                 f"touched ({why or 'another process'}); repeat the command")
        if not all_agree(not why):
            return None, why or "another process could not read its part"
        leaves = [leaves[name] for name in wanted]
        found = np.asarray(checksums(leaves)[0]).tolist()
        bad = [name for name, mark in zip(wanted, found) if sums.get(name) != mark]
        if bad:                     # and its leaves are let go: the next state needs their room
            return None, f"altered since it was written: {', '.join(bad[:3])}"
        return leaves, ""

    def restore(self, c, t, mesh):
        """The newest sound state, None if there is no checkpoint, or CorruptCheckpoint."""
        target = abstract_state(c, t, mesh)
        for step in self.steps():
            leaves, why = self.read(step, leaves_by_name(target))
            if not why:
                self.saved = step
                return jax.tree.unflatten(jax.tree.structure(target), leaves)
            self.broken[step] = why
        if self.broken:
            why = "; ".join(f"step {step}: {why}" for step, why in self.broken.items())
            if "ConfigError" in why:
                refuse(self.folder, "the arrays of this code", why, f"use that code, or {ANEW}")
            raise CorruptCheckpoint(
                f"{self.folder}: none of {len(self.broken)} checkpoints can be trusted, and "
                f"nothing was touched. {why}. To start anew, {ANEW}")

    def open(self, clean=True):
        """Get ready to write: clear what killed writers left, move broken checkpoints aside."""
        from configs import process
        if clean:
            self.reach(lambda: process.probe(self.folder))
        while self.broken:
            path = self.folder / str(self.broken.popitem()[0])
            if is_main_process():
                path.rename(f"{path.parent}/broken-{path.name}-{time.time_ns()}")
        all_agree(True)                         # the others wait for that
        # threads that make directories would wait for minutes for one that could not
        mode = self.ocp.AsyncOptions(create_directories_asynchronously=False,
                                     post_finalization_callback=self.sync)
        options = self.ocp.CheckpointManagerOptions(
            max_to_keep=self.t.keep, keep_period=self.t.keep_every or None,
            cleanup_tmp_directories=clean, async_options=mode)
        self.manager = self.ocp.CheckpointManager(self.folder, options=options)

    def sync(self, pattern=UNFINISHED, files="**/*"):
        """Called when all files of a checkpoint are written, and before it is committed."""
        for path in Path(self.folder).glob(pattern):            # none in a bucket
            data.to_disk(*path.glob(files), path, path.parent)

    def save(self, state, config):
        """Begin to write a state. Returns what went wrong, with it or with the last one, or "".
        Raises Diverged if the state is not finite."""
        step, leaves, args = int(state.step), leaves_by_name(state), self.ocp.args
        if step == self.saved:
            return ""
        sums, finite = checksums(list(leaves.values()))
        if not finite:
            raise Diverged(f"step {step}: the state is not finite, but every update was; not saved")
        arrays = dict(zip(leaves, np.asarray(sums).tolist()))
        record = args.JsonSave({"step": step, "config": config, "arrays": arrays})
        items = args.Composite(state=args.StandardSave(leaves), record=record)
        wrong, self.saved = self.wait(), step
        return self.attempt(lambda: self.manager.save(step, args=items)) or wrong

    def wait(self):
        """Wait until what save began is on the disk. Returns what went wrong, or ""."""
        def finish():
            self.manager.wait_until_finished()
            self.sync(str(self.saved), "*.txt")                 # the commit mark
        return self.attempt(finish)

    def attempt(self, write):
        """Run a write of orbax. Returns what went wrong (a full disk, a bucket out of reach), or
        "". A manager whose write failed never writes again: clear up and take a new one."""
        try:
            write()
            return ""
        except Exception as error:
            wrong, self.saved = f"step {self.saved}: {one_line(error)}", None
        for path in self.folder.glob(UNFINISHED) if is_main_process() else ():
            with contextlib.suppress(OSError):  # its threads may still write: so clean=False
                path.rmtree(missing_ok=True)
        self.open(clean=False)
        return wrong

    def close(self):
        if self.manager:
            self.wait()
            self.manager.close()


# --------------------------------------------------------------------------------- run directory

def is_main_process():
    """Whether this process prints and writes files. Checkpoints are written by every process."""
    return jax.process_index() == 0


def one_line(error):
    """An exception as one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def write(path, text, append=False):
    """Append to a file; or replace it in one motion that outlives a loss of power, so that a reader
    never sees half of it."""
    if not is_main_process():
        return
    from configs import rundir
    rundir.check_lock(Path(path).parent)
    try:
        target = Path(path) if append else Path(path).with_suffix(".tmp")
        with open(target, "ab" if append else "wb") as file:
            file.write(text.encode(errors="replace"))
        if not append:
            data.to_disk(target)
            target.replace(path)
            data.to_disk(target.parent)
    except OSError as error:
        raise TemporaryError(f"{path}: cannot be written ({error.strerror}); what was saved before "
                             f"is sound, and the same command goes on") from None


def json_lines(rows):
    """The text of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_rows(path):
    """The rows of a .jsonl file. A line that a crash cut short or that is damaged is left out."""
    rows, text = [], Path(path).read_bytes() if Path(path).exists() else b""
    for line in text.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [r for r in rows if isinstance(r, dict) and isinstance(r.get("step", 0), int)]


def log_event(run, event, **facts):
    """Append to the run's events.jsonl."""
    row = {"event": event, **facts, "time": time.time()}
    write(run / "events.jsonl", json_lines([row]), append=True)


def git(*words):
    """What git says of this code; "" without git, or outside of a repository."""
    try:
        return subprocess.check_output(["git", *words], cwd=Path(__file__).parent, timeout=10,
                                       stderr=subprocess.DEVNULL).decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def git_commit():
    """The commit of this code, with "-dirty" if a Python file has changed since. In an archive
    .commit says it: git writes it there."""
    file = Path(__file__).with_name(".commit")
    if file.exists() and not (archived := file.read_text().strip()).startswith("$Format"):
        return archived
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return (git("describe", "--always").strip() or "unknown") + ("-dirty" if changed else "")


# ------------------------------------------------------------------------------------------ main

def log(line):
    """Print a line without tearing the progress bar, and keep it; only the main process does."""
    from tqdm import tqdm
    if is_main_process():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        keep_line(line)


def keep_line(line):
    """Append a line to log.txt of the run, if one is under way: a screen can close."""
    with contextlib.suppress(OSError):
        with open(keep_line.file or os.devnull, "a", encoding="utf-8", errors="replace") as file:
            file.write(line + "\n")


keep_line.file = None


def print_error(line):
    """The one line that says why. On a full disk it may be lost; the exit code still says it."""
    with contextlib.suppress(OSError):
        print(f"train.py: {line}", file=sys.stderr, flush=True)
    keep_line(f"train.py: {line}")


def stuck(run, t):
    """What the watchdog says before it ends the process with 75."""
    seconds = round(60 * t.stuck_minutes)
    print_error(f"nothing got done for {seconds} s (stuck_minutes={t.stuck_minutes:g}); the stacks "
                f"are above. What was saved is sound. Run the same command to go on")
    log_event(run, "stuck", seconds=seconds)


def train(c, t, fresh=False):
    """Run or resume a run to its end. Returns what result.json says; None if a signal came."""
    from configs import process, report, rundir, sample
    began, run, config = time.time(), Path(t.run_dir), rundir.describe_run(c, t)
    rundir.everywhere(lambda: rundir.agree(rundir.flat(config)))
    mesh, mixture = rundir.everywhere(lambda: (make_mesh(c, t), open_data(c, t)))
    config["data"] = mixture.sha256
    with (contextlib.ExitStack() as stack, contextlib.closing(Checkpoints(t)) as checkpoints,
          process.watchdog(60 * t.stuck_minutes, lambda: stuck(run, t)) as heartbeat):
        rundir.everywhere(lambda: rundir.enter(c, t, mixture, checkpoints, stack, fresh))
        rundir.everywhere(lambda: rundir.shared(checkpoints))
        rundir.check_memory(c, t, mesh)
        keep_line.file = run / "log.txt"
        state = checkpoints.restore(c, t, mesh)
        write(run / "events.jsonl", json_lines(read_rows(run / "events.jsonl")))    # no torn line
        rundir.write_config(c, t, config, checkpoints)
        report.print_header(c, t, mesh, mixture)
        for step, why in checkpoints.broken.items():
            log_event(run, "broken_checkpoint", step=step, why=why)
            log(f"broken    checkpoint of step {step}: {why}; kept as broken-{step}-...")
        checkpoints.open()
        resumed = state is not None
        state = state or first_state(c, t, mesh, mixture.tokenizer)
        start = int(state.step)
        report.keep_sources(run, mixture.tokenizer, start)
        rundir.keep_results(run, start, t.steps)
        log_event(run, "resume" if resumed else "start", step=start)
        log(f"run       {run}, {'resumed' if resumed else 'started'}"
            + (f" after step {start}" if start else ""))
        metrics_log = report.Log(run, c, t, mesh, start, lambda step: data.rows_of(
            mixture, step - 1, t.batch_size, c.seq_len, t.seed))
        eval_step = make_eval_step(c, mesh, mixture.tokenizer.bytes_V)
        def run_eval(state, step, limit):
            with report.progress(step, mixture, limit, heartbeat) as done:
                domains = evaluate(state, eval_step, mixture, c, t, mesh, limit, done)
            log_event(run, "eval", step=step, domains=domains)
            log(f"eval {step:>{len(str(t.steps))}} | " + " | ".join(
                f"{name} {d['loss']:.4f} nats {d['bpb']:.4f} bpb" for name, d in domains.items()))
            return domains
        save = rundir.saver(run, checkpoints, config, resumed)
        with process.stop_signals() as stop_signal:
            state, number = loop(c, t, mesh, mixture, state, save, metrics_log, run_eval, heartbeat,
                                 stop_signal)
            if failed := checkpoints.wait():
                log_event(run, "save_failed", why=failed)
            number = number or stop_signal(t.steps)
        if checkpoints.saved != int(state.step):
            raise TemporaryError(f"the last checkpoint could not be written; "
                                 f"the same command goes on from an older one; see {run}")
        if number:
            log_event(run, "stopped", signal=int(number), step=int(state.step))
            log(f"stopped after step {int(state.step)}; saved. Run the same command to go on")
            return None
        domains = run_eval(state, t.steps, t.eval_tokens_final)
        if not is_main_process():
            return None
        result = report.write_result(c, t, run, mixture, domains)
        if t.sample_tokens and jax.process_count() == 1:    # one device has to hold all weights
            draw = sample.make_sampler(c, mixture.tokenizer, t.temperature, t.top_k)
            text = draw(state.params, state.bias_LE, t.prompt, t.sample_tokens, t.sample_seed)
            write(run / "sample.txt", text)
            log(f"sample\n{text}\n")
        log_event(run, "done", step=t.steps)
        report.report(run)
    log(f"done in {time.time() - began:.0f} s, {result['seconds']:.0f} s of training in all: see "
        f"{run}/report.html")
    return result


def loop(c, t, mesh, mixture, state, save, metrics_log, run_eval, heartbeat, stop_signal):
    """Take the steps that are left -> (the last state, the signal that stopped it or None)."""
    from tqdm import tqdm
    train_step, start, saved = make_train_step(c, t, mesh), int(state.step), time.monotonic()
    here, cpu = local_rows(t.batch_size, mesh, t.accumulate), mesh.devices.flat[0].platform == "cpu"
    progress = tqdm(total=t.steps, initial=start, disable=not sys.stderr.isatty())
    with progress:
        for i in range(start, t.steps):
            rows = data.batch_at(mixture, i, t.batch_size, c.seq_len, t.seed, here)
            state, metrics = train_step(state, to_global_batch(rows, mesh, t.accumulate))
            step, stop = i + 1, stop_signal(i)
            if cpu and i == start:                      # the step has just been compiled
                jax.block_until_ready(metrics)
                kernels.fill_holes()
            due = bool(stop) or step == t.steps or step % t.save_every == 0
            if t.keep_every:
                due |= step % t.keep_every == 0
            if t.save_minutes and step % t.log_every == 0:
                due |= not all_agree(time.monotonic() - saved < 60 * t.save_minutes)
            metrics_log.step(step, metrics, due or step % t.log_every == 0)     # may raise
            progress.update()
            if due:
                data.check_unchanged(mixture)
                save(state)
                saved = time.monotonic()
            heartbeat()
            if stop:
                return state, stop
            if step % t.eval_every == 0 and step < t.steps:
                paused = time.perf_counter()
                run_eval(state, step, t.eval_tokens)
                if cpu and step - start <= t.eval_every:        # the first of this process
                    kernels.fill_holes()
                metrics_log.since += time.perf_counter() - paused   # an evaluation is no step time
    return state, None


def open_data(c, t):
    """The data.Mixture of a run, prepared if need be."""
    return data.open_mixture(t.mixture, t.tokenizer, t.data_dir, c.vocab_size, seq_len=c.seq_len)


def read_flags(words):
    """(flags that are no config keys, the words that are left)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("sample", "plan", "compile", "fresh"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--search", type=int, nargs="?", const=10)
    numbers = dict.fromkeys(("replay", "processes", "process"), int)
    for name, kind in (numbers | dict(mfu=float, coordinator=str)).items():
        parser.add_argument(f"--{name}", type=kind)
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        why = str(error).replace("one argument", "a value, found nothing")
        raise ConfigError(f"command line: {why}") from None


def init_distributed(flags, t):
    """Join the other processes of this run. On a TPU they find each other, elsewhere by flags."""
    told, seconds = [flags.coordinator, flags.processes, flags.process], t.heartbeat_seconds
    tpu = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    libtpu, plugins = map(importlib.util.find_spec, ("libtpu", "jax_plugins"))
    if libtpu and not (tpu or plugins or jax.config.jax_platforms):
        jax.config.update("jax_platforms", "cpu")       # libtpu would complain in five lines
    if told != [None] * 3:
        if None in told or ":" not in told[0] or not 0 <= flags.process < flags.processes:
            refuse("--coordinator, --processes, --process", "all three: HOST:PORT, N, I < N", told)
        use_cpu_devices(max(1, t.devices // flags.processes))
        jax.distributed.initialize(*told, heartbeat_timeout_seconds=seconds)
        n = len(jax.devices())      # so that make_mesh takes these, and does not ask for its own
        if n != flags.processes * len(jax.local_devices()):
            jax.distributed.shutdown()
            refuse("devices", "the same on all processes",
                   f"{len(jax.local_devices())} of {n} on process {flags.process}")
    elif tpu and libtpu:
        jax.distributed.initialize(heartbeat_timeout_seconds=seconds)


# README.md says what to do about each; tests/test_faults.py brings each about
EXIT_CODES = {ConfigError: 2, data.DataError: 2, Diverged: 3, CorruptCheckpoint: 4,
              TemporaryError: 75, OSError: 75, scaling.BadInput: 2}


def main(arguments):
    """Returns the exit code: 0 if done or saved on a signal; others come with one line."""
    from configs import compare, layout, plan, report, sample
    if not arguments or {"--help", "-h"} & set(arguments):
        print(report.describe_keys())
        return 0
    logging.getLogger("absl").setLevel(logging.CRITICAL)    # orbax logs stacks; ours is one line
    keep_line.file = None
    try:
        if "--compare" in arguments:
            return compare.main([word for word in arguments if word != "--compare"])
        flags, overrides = read_flags(arguments[1:])
        if flags.sample and [*Path(arguments[0]).expanduser().glob("*.safetensors")]:
            return sample.from_weights(arguments[0], overrides)
        c, t = load_config(arguments[0], overrides)
        for name, without in (("compile", False), ("search", None), ("mfu", None)):
            if getattr(flags, name) is not without and not flags.plan:
                refuse(f"--{name}", "together with --plan", "it alone", "it would train")
        if flags.plan:
            if flags.search:
                return layout.show_search(c, t, flags.search, flags.compile)
            return plan.show_plan(c, t, flags.compile, flags.mfu)
        if flags.replay is not None:
            return report.replay(c, t, flags.replay)
        if flags.sample:
            return report.sample(c, t, overrides)
        init_distributed(flags, t)
        train(c, t, flags.fresh)
        return 0
    except tuple(EXIT_CODES) as error:
        print_error(one_line(error) if isinstance(error, OSError) else error)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            print_error(f"out of memory; choose a larger --accumulate or a smaller model "
                        f"({one_line(error)})")
            return 2
        if jax.process_count() == 1:
            raise
        print_error(f"a peer is lost, or the network: {one_line(error)}")
        return 75
    except KeyboardInterrupt:
        print_error("interrupted; what was saved is there. Run the same command to go on")
        return 130


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]              # what configs/ imports
    if sys.getfilesystemencoding() != "utf-8":      # so that paths mean the same to all libraries
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.argv])
    from configs import process
    sys.stdout, sys.stderr = process.Screen(sys.stdout, 1), process.Screen(sys.stderr, 2)
    process.catch_signals(signal.default_int_handler)           # outside of stop_signals
    # after a failed read or write, threads of orbax report to a closed event loop, with stacks
    sys.unraisablehook = lambda e, show=sys.unraisablehook: "is closed" in str(e) or show(e)
    code = main(sys.argv[1:])
    process.catch_signals(lambda number, frame: None)
    if not code and jax.distributed.is_initialized():
        jax.distributed.shutdown()                              # leaves when all peers are done
    # a normal exit would wait for lost peers and failed writes, which print lines of their own
    sys.stdout.flush()
    os._exit(code)
