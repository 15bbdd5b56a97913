"""Training: one config file in, one finished run directory out.        Imports: model, balance, data.

Run:  python train.py configs/smoke.py [--key=value ...]     train, evaluate, sample, draw; resumes by itself
      python train.py configs/smoke.py --sample --prompt="ROMEO."           continue a text from a checkpoint
      python train.py configs/moe_129b.py --plan [--compile]        what it costs; through the TPU's compiler too
      python train.py configs/smoke.py --replay 120                        what was in the batch of step 120
      ... --coordinator=HOST:PORT --processes=N --process=I      one of N processes; a TPU pod needs no flags
      python train.py --help                                               every key, its default, its meaning
Read: main (the table of contents) is last; before it, in its order: config, mesh, optimizer, step, checkpoint,
evaluation, sampling, the log, the report, the plan.
The state is (step, params, opt, bias_LE); the step is one pure function of state and batch; the batch is a
pure function of (seed, step). So resuming is restoring a state and going on.

B batch  S sequence  A microbatches  L layers  E experts  K experts per token"""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import faulthandler
import fcntl
import functools
import glob
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import typing
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as Spec

import balance
import data
import kernels
import model
from model import ModelConfig


# ------------------------------------------------------------------------------------------------------ config

class ConfigError(ValueError):
    """A mistake in what the user gave. main prints it as one line and exits with 2."""


class Halted(RuntimeError):
    """Training must not go on: updates without end that are not finite. One line, exit code 3."""


class Unsound(RuntimeError):
    """There are checkpoints and none can be trusted. Nothing has been touched. One line, exit code 4."""


class TryAgain(RuntimeError):
    """What failed may work the next time, and what was saved is sound. One line, exit code 75 (EX_TEMPFAIL)."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Zero in adam_lr, hyper_lr, beta2 and eps means: from the recipe's scaling heuristic."""
    mixture: tuple                      # ((source, weight), ...); data.py says what a source can be
    tokenizer: str                      # "bytes", "bpe:N" (trained on the mixture) or a .tiktoken file
    steps: int                          # optimizer steps
    batch_size: int                     # B: sequences per step, over all devices and microbatches
    accumulate: int = 1                 # A: microbatches per step; changes memory, not the result
    seed: int = 0                       # of the weights, the data order and the sample
    data_dir: str = "out/data"          # prepared corpora, and what was downloaded for them
    run_dir: str = ""                   # where the run is kept; "" is out/<name of the config file>
    recipe: str = "v1"                  # fit that gives rates, beta2 and eps: "v1" for AdamH, "v2" for MuonH
    optimizer: str = "adamh"            # "adamh", "muonh" (matrices by MuonH, the head by AdamH), "adamw" (plain:
    #                                     every weight at adam_lr, matrices decayed; a baseline); see recipe
    adam_lr: float = 0.0                # peak rate of embedding, router, gates and gains
    hyper_lr: float = 0.0               # peak rate of matrices: the relative step on the hypersphere
    rate_scale: float = 1.0             # multiplies both rates of the heuristic: its refit for another scale
    adam_scale: float = 1.0             # and Adam's once more
    weight_decay: float = 0.1           # of "adamw", times the rate [cited: nanoGPT]; the others need none
    beta1: float = 0.9062               # of Adam's first moment [cited: marin #4697]
    beta2: float = 0.0                  # of Adam's second moment
    eps: float = 0.0                    # of Adam's denominator
    momentum: float = 0.95              # of MuonH [cited: marin #5596]
    schedule: str = "linear"            # "linear" (warm up, then decay to the end) or "wsd" (hold between them)
    warmup: float = 0.1                 # share of the steps that warms up
    decay: float = 0.2                  # share of the steps that decays, for "wsd"
    min_lr_ratio: float = 0.0           # last rate over peak rate
    clip: float = 1.0                   # largest gradient norm of each optimizer group; 0 is off
    compiled_dir: str = "out/compiled"  # compiled programs, kept so that a second start is quick; "" is off
    devices: int = 0                    # 0: all accelerators, or as many CPU devices as cores can share the batch
    replicas: int = 1                   # mesh axis "replica": copies of the weights: one a slice; 0: one a device
    expert_parallel: int = 1            # mesh axis "expert": devices that share one layer's experts
    topology: str = ""                  # hardware for --plan: "v4:8x8x16", "2xv5p:8x8x8" (two slices), "h200:1"
    published: str = ""                 # what others report of this run; --plan prints it beside its own numbers
    peak_flops: float = 0.0             # of one device, for MFU; 0: from the table of known chips
    log_every: int = 10                 # steps between log lines
    eval_every: int = 200               # steps between evaluations; the last step always is one
    eval_tokens: int = 32_768           # of each held-out domain, but all of it at the end
    save_every: int = 500               # steps between checkpoints; the last step always is one
    save_minutes: float = 0.0           # and after so many minutes, at the next log line; 0 is off
    keep: int = 2                       # newest checkpoints that are kept
    keep_every: int = 0                 # a checkpoint at every multiple of this step is kept for good; 0 is none
    checkpoint_dir: str = ""            # where they are kept, also gs://BUCKET/PATH; "" is run_dir/checkpoints
    max_skips: int = 5                  # updates skipped in a row (see `guard`) that end the run
    skip_sigma: float = 0.0             # also skip a loss or gradient norm so many sigma high; 0 is off: a spike
    #                                     is a symptom, and skipping cured none for Marin [cited: marin #1368]
    stuck_minutes: float = 60.0         # without a step done: print all stacks, exit with 75; 0 is off
    heartbeat_seconds: int = 100        # without a sign of life: a peer is lost, and all others stop
    prompt: str = "\n"                  # how the sample begins
    sample_tokens: int = 200            # length of the sample; 0 is no sample
    temperature: float = 0.8            # of the sample; 0 takes the likeliest token

    def __post_init__(self):
        def need(ok, key, expected):
            if not ok:
                raise ValueError(f"{key}: expected {expected}, found {getattr(self, key)!r}")
        for key in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_tokens", "save_every",
                    "keep", "expert_parallel", "max_skips", "heartbeat_seconds"):
            need(getattr(self, key) > 0, key, "a positive number")
        for key, names in {"recipe": ("v1", "v2"), "optimizer": ("adamh", "muonh", "adamw"),
                           "schedule": ("linear", "wsd")}.items():
            need(getattr(self, key) in names, key, " or ".join(map(repr, names)))
        need(self.rate_scale > 0, "rate_scale", "a positive number")
        need(self.adam_scale > 0, "adam_scale", "a positive number")
        for key in ("adam_lr", "hyper_lr", "weight_decay", "eps", "clip", "devices", "replicas", "peak_flops",
                    "sample_tokens", "temperature", "save_minutes", "keep_every", "skip_sigma", "stuck_minutes"):
            need(getattr(self, key) >= 0, key, "zero or a positive number")
        for key in ("warmup", "decay", "min_lr_ratio"):
            need(0 <= getattr(self, key) <= 1, key, "a number from 0 to 1")
        for key in ("beta1", "beta2", "momentum"):
            need(0 <= getattr(self, key) < 1, key, "a number from 0 to below 1")
        need(self.schedule == "linear" or self.warmup + self.decay <= 1, "decay",
             f"at most 1 - warmup = {1 - self.warmup:g}")
        need(int(self.warmup * self.steps) < self.steps, "warmup", "a share that leaves a step after the warm-up")
        need(self.batch_size % self.accumulate == 0, "accumulate", f"a divisor of batch_size={self.batch_size}")
        need(len(self.mixture) > 0 and all(
            isinstance(m, tuple) and len(m) == 2 and isinstance(m[0], str) and isinstance(m[1], (int, float))
            and m[1] > 0 for m in self.mixture), "mixture", 'pairs such as (("books", 1.0),), weights above 0')


KEYS = {name: hint for cls in (ModelConfig, TrainConfig) for name, hint in typing.get_type_hints(cls).items()}


def check(key, value, where):
    """The value, if key exists and takes it (an int may stand for a float); else ConfigError."""
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, 1)
        raise ConfigError(f"{where}: unknown config key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")
                          + "  (python train.py --help lists all keys)")
    if typing.get_origin(KEYS[key]) is typing.Literal:
        return value
    if KEYS[key] is float and type(value) is int:
        value = float(value)
    if type(value) is not KEYS[key]:
        raise ConfigError(f"{where}: {key}: expected {KEYS[key].__name__}, found {value!r}")
    if KEYS[key] is float and not math.isfinite(value):
        raise ConfigError(f"{where}: {key}: expected a finite number, found {value!r}")
    return value


def load_config(path, overrides=()):
    """Run a config file of plain assignments, apply --key=value, return (ModelConfig, TrainConfig).

    Names that begin with _ and imported modules are not keys. A config is Python code: run only your own."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: expected a config file, found none; configs/ holds the ready ones")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(f"{path}: not a runnable config file: {type(error).__name__}: {error}") from None
    skip = (types.ModuleType, types.FunctionType, type)
    values = {k: check(k, v, path) for k, v in names.items() if k[0] != "_" and not isinstance(v, skip)}
    for argument in overrides:
        match = re.fullmatch(r"--(\w+)=(.*)", argument, re.DOTALL)
        if not match:
            raise ConfigError(f"command line: expected --key=value, found {argument!r}")
        key, text = match.groups()
        try:
            value = text if KEYS.get(key) is str else ast.literal_eval(text)
        except Exception:               # whatever is no Python literal is a word
            value = text
        values[key] = check(key, value, "command line")
    values.setdefault("run_dir", "")
    values["run_dir"] = values["run_dir"] or f"out/{Path(path).stem}"
    configs = []
    for cls in (ModelConfig, TrainConfig):
        fields = dataclasses.fields(cls)
        for missing in (f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values):
            raise ConfigError(f"{path}: missing config key '{missing}' of {cls.__name__}; add {missing} = ...")
        try:
            configs.append(cls(**{f.name: values[f.name] for f in fields if f.name in values}))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    if configs[0].balancer == "aux_global" and configs[1].accumulate > 1:
        raise ConfigError(f"{path}: accumulate: expected 1, since balancer='aux_global' needs the whole batch's "
                          f"loads before its first gradient, found {configs[1].accumulate}")
    return tuple(configs)


def describe_keys():
    """The text of --help, read from the comments beside the fields: one place to write, none to forget."""
    lines = [__doc__.split("\n\nB batch")[0], ""]
    for cls in (ModelConfig, TrainConfig):
        lines += [f"{cls.__name__}: {cls.__doc__}"]
        field = re.compile(r"^    (\w+): (\w+)(?: = (.*?))? +# (.*)$", re.MULTILINE)
        for name, kind, default, text in field.findall(inspect.getsource(cls)):
            lines.append(f"  {f'--{name}={default or kind.upper()}':30s} {text}")
        lines.append("")
    return "\n".join(lines)


class Rates(NamedTuple):
    adam_lr: float
    hyper_lr: float
    beta2: float
    eps: float


def heuristic(recipe, tokens, tokens_per_batch, hidden_dim):
    """Learning rates, beta2 and eps from the size of the run.

    v1: Marin's fit of April 2026 to 186 AdamH runs (R2 = 0.995, #4225), the 129B run's numbers.
    v2: the refit of May 2026 for MuonH (17 cells, R2 = 0.996, #5951).
    Both were fitted at 4,096 tokens a sequence and batches of 32 sequences and more."""
    T, D, sequences = tokens, hidden_dim, tokens_per_batch / 4096
    if recipe == "v1":
        adam_lr = 1.63 * T**-0.2813 * D**-0.3678 * sequences**0.5
        eps = 1e-15 * (32 * T / (sequences * 1.4e9)) ** 0.5
    else:
        adam_lr = 0.06602 * T**-0.395 * D**-0.150 * tokens_per_batch**0.5
        eps = 9.676e-18 * (T / tokens_per_batch) ** 0.5
    beta2 = min(max(0.999 ** (tokens_per_batch / 131_072), 0.95), 0.9999)     # a constant half-life in tokens
    return Rates(min(adam_lr, 0.05), min(13 / 3 * adam_lr, 0.05), beta2, eps)


# -------------------------------------------------------------------------------------------- mesh

MESH = ("replica", "data", "expert")    # tokens are split over all three; model.param_specs says
#                                         what splits weights


def mesh_shape(t, n):
    """{axis: length} of the mesh of n devices."""
    copies = t.replicas or n // t.expert_parallel
    return dict(zip(MESH, (copies, n // copies // t.expert_parallel, t.expert_parallel)))


def mesh_error(c, t, n):
    """Why n devices cannot share this model and this batch, in one line; None if they can."""
    least = max(1, t.replicas) * t.expert_parallel
    if n % least:
        return f"devices: expected a multiple of replicas x expert_parallel = {least}, found {n}"
    rows = t.batch_size // t.accumulate
    if rows % n:
        return f"batch_size / accumulate: expected a multiple of the {n} devices, found {rows}"
    size = mesh_shape(t, n)

    def check(path, w):
        for axis, length in zip(w.spec, w.shape):
            if axis and length % size[axis]:
                return (f"{path} {w.shape}: expected axes that divide over the mesh, found "
                        f"{length} over {size[axis]} of {axis!r}; use other sizes, replicas or "
                        "expert_parallel")
    return next(iter(jax.tree.leaves(model.map_params(check, c))), None)


def local_devices(c, t):
    """The devices of this machine that the run uses: all accelerators, or as many CPU devices as
    cores can share the batch. XLA's CPU backend runs most operations on one core, so one device for
    each core keeps all of them busy."""
    def most_that_fit(most):
        return max((n for n in range(1, most + 1) if not mesh_error(c, t, n)), default=most)

    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):            # Linux: those that this process may use
        cores = len(os.sched_getaffinity(0))
    kernels.keep_freed_memory()
    try:
        jax.config.update("jax_num_cpu_devices", t.devices or most_that_fit(cores))
    except RuntimeError:
        pass                    # a backend already runs (tests): take the devices that it has
    if t.compiled_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(t.compiled_dir).resolve()))
    devices = jax.devices()
    cpu = devices[0].platform == "cpu"
    n = t.devices or (most_that_fit(len(devices)) if cpu else len(devices))
    if n > len(devices):
        raise ConfigError(f"devices: expected at most {len(devices)} ({devices[0].device_kind}), "
                          f"found {n}")
    return devices[:n]


def make_mesh(c, t, devices=None):
    """The devices as replica x data x expert: copies (one for each slice, say), FSDP shares,
    experts.

    "expert" comes last, so that neighbors share experts. mesh_utils lays the axes along a TPU's
    torus. Raises ConfigError if the devices cannot share the model or the batch."""
    devices = local_devices(c, t) if devices is None else devices
    if reason := mesh_error(c, t, len(devices)):
        raise ConfigError(reason)
    shape = tuple(mesh_shape(t, len(devices)).values())
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1 and shape[0] % slices:
        raise ConfigError(f"replicas: expected a multiple of the {slices} slices, found {shape[0]}")
    if slices > 1:              # each slice has its own replicas: only their sums leave it
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH, axis_types=(AxisType.Auto,) * 3)


# --------------------------------------------------------------------------------------- optimizer

def rates(c, t):
    """The peak rates, beta2 and eps: scaling.heuristic's, with whatever the config sets instead."""
    batch_tokens = t.batch_size * c.seq_len
    fit = heuristic(t.recipe, t.steps * batch_tokens, batch_tokens, c.hidden_dim)
    fit = fit._replace(adam_lr=t.rate_scale * t.adam_scale * fit.adam_lr,
                       hyper_lr=t.rate_scale * fit.hyper_lr)
    return Rates(*(getattr(t, name) or value for name, value in fit._asdict().items()))


def lr_multiplier(t, step):
    """The learning rate over its peak, for the step that follows `step` others: up in
    int(warmup * steps) steps, then down to min_lr_ratio. The first step of a warm-up has rate 0.
    [levanter, optim/config.py]"""
    warm = int(t.warmup * t.steps)
    down = t.steps - warm if t.schedule == "linear" else int(t.decay * t.steps)
    parts = (optax.linear_schedule(0.0, 1.0, warm), optax.constant_schedule(1.0),
             optax.linear_schedule(1.0, t.min_lr_ratio, down))
    return optax.join_schedules(parts, (warm, t.steps - down))(step)


class HyperballState(NamedTuple):
    count: jax.Array
    direction: typing.Any


def matrix_norm(w):
    """Frobenius norm of every matrix of a stack: over the last two axes, so per layer and
    expert."""
    return jnp.sqrt(jnp.sum(w * w, axis=(-2, -1), keepdims=True))


def hyperball(direction, rate):
    """Keep every matrix on the sphere of its initial norm and move along it: the H of AdamH and
    MuonH.

    `direction` is any optax transformation; of its output u only the direction counts. The step is
    `rate` times the matrix's own norm along -u, then the matrix is scaled back to that norm. So the
    rate is a relative step, the same for every size of matrix; weight decay has nothing to do, and
    no norm can run away. The floor of 1e-10 keeps a zero gradient from becoming NaN. [marin
    #4697]"""
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


# One triple (a, b, c) for each iteration of X <- aX + (bA + cAA)X, A = XX': five steps take every
# singular value from (0, 1] to near 1. [levanter's muon, "quintic"]
NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))


def orthogonalize(m, mesh=None, spec=None):
    """Roughly the orthogonal matrix nearest to each matrix of a stack, by Newton-Schulz in bfloat16
    [Muon, kellerjordan.github.io/posts/muon].

    On a mesh the matrices, which are split as `spec` says, are first redistributed so that each
    device holds whole ones: their products then need no sums over devices, which would be gigabytes
    a step. Two all-to-alls. The 1e-8 keeps a zero matrix from becoming NaN."""
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


# Which optimizer owns which group of model.param_specs. V1 clips experts, routed and shared, as a
# group of their own. [marin #4697. Two of Marin's quirks are not kept: the substring that sent one
# GatedNorm to Adam, and stacked gains in the matrix group]
GROUPS = {
    "adamh": {"adam": "adam", "matrix": "adamh", "head": "adamh",
              "expert": "adamh_expert", "shared": "adamh_expert"},
    "muonh": {"adam": "adam", "matrix": "muonh", "head": "adamh",
              "expert": "muonh", "shared": "muonh"},
    "adamw": {"adam": "adam", "matrix": "adamw", "head": "adamw",
              "expert": "adamw", "shared": "adamw"},
}


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
        return hyperball(direction, lambda step: r.hyper_lr * lr_multiplier(t, step))

    adam = optax.scale_by_adam(t.beta1, r.beta2, r.eps)
    muon = optax.chain(optax.trace(t.momentum, nesterov=True), optax.stateless(orthogonal))
    down = optax.scale_by_learning_rate(lambda step: r.adam_lr * lr_multiplier(t, step))
    rules = {"adam": optax.chain(adam, down),
             "adamw": optax.chain(adam, optax.add_decayed_weights(t.weight_decay), down),
             "adamh": ball(adam), "adamh_expert": ball(adam), "muonh": ball(muon)}
    clip = optax.clip_by_global_norm(t.clip) if t.clip else optax.identity()
    labels = model.map_params(lambda _, w: GROUPS[t.optimizer][w.group], c)
    return optax.multi_transform({k: optax.chain(clip, rule) for k, rule in rules.items()}, labels)


# -------------------------------------------------------------------------------------------- step

class State(NamedTuple):
    step: jax.Array             # int32, optimizer steps taken
    params: dict                # float32, the tree of model.param_specs
    opt: typing.Any             # optax state
    bias_LE: jax.Array          # float32, the balancing bias in use: the only one there is
    history_2W: jax.Array       # float32, loss and gradient norm of the last W steps; -1: not yet


WINDOW = 128                    # W [OLMo-core's SkipStepOptimizer]


def accept_step(t, state, loss, gnorm):
    """Whether a step's update may be taken, and the new history_2W.

    An update that is not finite never may. With skip_sigma, neither may one whose loss or gradient
    norm is more than so many standard deviations above its mean over the last W steps, once half of
    them are known. Outliers enter the history, so a new level is accepted in time."""
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
    """The state before the first step. A dense model has one idle expert's bias: orbax refuses
    empty arrays."""
    params = model.init(c, key)
    return State(jnp.zeros((), jnp.int32), params, make_optimizer(c, t).init(params),
                 jnp.zeros((c.num_layers, max(1, c.num_experts)), jnp.float32),
                 -jnp.ones((2, WINDOW), jnp.float32))


def abstract_state(c, t, mesh):
    """Shapes, types and shardings of a state that need not exist: an optimizer moment is split like
    its weight, all else is copied."""
    shapes = jax.eval_shape(lambda: make_state(c, t, jax.random.key(0)))
    specs = model.map_params(lambda _, w: w.spec, c)
    copies = jax.tree.map(lambda _: Spec(), shapes)
    opt = optax.tree_map_params(
        make_optimizer(c, t), lambda a, spec: a if masked(a) else spec, shapes.opt, specs,
        transform_non_params=lambda _: Spec(), is_leaf=masked)
    placed = copies._replace(params=specs, opt=opt)
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
        shapes, placed)


def state_shardings(c, t, mesh):
    return jax.tree.map(lambda a: a.sharding, abstract_state(c, t, mesh))


def merge_microbatches(stats):
    """RouterStats of A microbatches, stacked, as those of one batch: tokens end to end, counts
    summed."""
    def tokens(x_ALT):
        A, L, T, *rest = x_ALT.shape
        return jnp.moveaxis(x_ALT, 0, 1).reshape(L, A * T, *rest)
    return stats._replace(load_E=stats.load_E.sum(0), dropped=stats.dropped.sum(0),
                          margin_TE=tokens(stats.margin_TE), z_T=tokens(stats.z_T), prob_TE=None)


def make_train_step(c, t, mesh, platform=None):
    """The jitted (state, batch) -> (state, metrics). batch: dict of [A,B/A,S] arrays, B/A split
    over the mesh. platform: that of the mesh's devices, unless another is compiled for.

    Forward, backward and balancing run inside one shard_map, where every collective is a line of
    code: all_gather and reduce_scatter in kernels.gather_weight, the exchanges in moe, the psums
    below, the psum of counts in balance. The optimizer runs outside, on whole arrays; its norms are
    sums over split axes, for which XLA adds one small all-reduce each."""
    specs = model.map_params(lambda _, w: w.spec, c)
    optimizer = make_optimizer(c, t, mesh)
    platform = platform or mesh.devices.flat[0].platform

    def sum_copies(g, spec):
        """Sum a gradient over the mesh axes that copy its weight. Over those that split it, the
        transposes of gathers and exchanges have summed."""
        return lax.psum(g, tuple(axis for axis in MESH if axis not in spec))

    def gradients(params, bias_LE, batch):
        totals = lax.psum({"weight": jnp.sum(batch["weights"]),
                           "tokens": jnp.sum(batch["segments"] != 0).astype(jnp.float32)}, MESH)

        def objective(params, rows):
            return model.loss(params, bias_LE, rows, totals, c, True, platform)

        def microbatch(total, rows):
            (_, record), grads = jax.value_and_grad(objective, has_aux=True)(params, rows)
            return jax.tree.map(jnp.add, total, grads), record

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, (nll_A, stats) = lax.scan(microbatch, zeros, batch)
        grads = jax.tree.map(sum_copies, grads, specs)
        metrics = {"loss": lax.psum(jnp.sum(nll_A), MESH) / totals["weight"]}
        if stats is not None:
            stats, real_T = merge_microbatches(stats), batch["segments"].reshape(-1) != 0
            load_LE, dropped_L, z = lax.psum(
                (stats.load_E, stats.dropped, jnp.sum(stats.z_T * real_T)), MESH)
            bias_LE, kept_L = balance.update(c.balancer, stats.margin_TE, real_T, bias_LE,
                                             c.experts_per_token, MESH, c.balancer_rate, platform)
            metrics |= {"load_LE": load_LE, "dropped_L": dropped_L, "bias_kept": jnp.sum(kept_L),
                        "router_z": z / (c.num_layers * totals["tokens"])}
        return grads, bias_LE, metrics

    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(specs, Spec(), Spec(None, MESH)),
                            out_specs=(specs, Spec(), Spec()), check_vma=False)

    def train_step(state, batch):
        grads, bias_LE, metrics = sharded(state.params, state.bias_LE, batch)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        gnorm = optax.tree.norm(grads)
        good, history_2W = accept_step(t, state, metrics["loss"], gnorm)
        # XLA fuses this choice into the update itself, so it costs no pass over memory
        params, opt, bias_LE = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt, bias_LE),
            (state.params, state.opt, state.bias_LE))
        metrics |= {"gnorm": gnorm, "lr_multiplier": lr_multiplier(t, state.step), "skipped": ~good}
        return State(state.step + 1, params, opt, bias_LE, history_2W), metrics

    shardings = state_shardings(c, t, mesh), NamedSharding(mesh, Spec())
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


def local_rows(batch_size, mesh, accumulate=1):
    """Which rows of the global batch this process feeds to its devices, microbatch by
    microbatch."""
    shape = (accumulate, batch_size // accumulate)
    sharding = NamedSharding(mesh, Spec(None, MESH))
    places = sharding.addressable_devices_indices_map(shape).values()
    mine = sorted({row for _, rows in places for row in range(shape[1])[rows]})
    return np.arange(batch_size).reshape(shape)[:, mine].reshape(-1)


def to_global_batch(batch, mesh, accumulate=1):
    """This process's rows of a data.Batch as a dict of global arrays [A,B/A,S] on their devices."""
    arrays = {"tokens": batch.tokens_BS, "targets": batch.targets_BS, "segments": batch.segments_BS,
              "weights": batch.weights_BS.astype(np.float32)}
    sharding = NamedSharding(mesh, Spec(None, MESH))

    def place(x_BS):
        x_ABS = x_BS.reshape(accumulate, -1, x_BS.shape[-1])
        return jax.make_array_from_process_local_data(sharding, x_ABS)
    return {name: place(x_BS) for name, x_BS in arrays.items()}


# -------------------------------------------------------------------------------------- evaluation

def serving(c):
    """The config of evaluation and sampling: nothing is dropped, and no token's experts depend on
    other tokens, whatever training does. A held-out loss must not depend on who shares a batch."""
    causal = balance.NON_CAUSAL.get(c.balancer, c.balancer)
    return dataclasses.replace(c, capacity_factor=0.0, exchange="ring", balancer=causal)


def make_eval_step(c, mesh, bytes_V):
    """The jitted (params, bias_LE, batch) -> summed nats, scored tokens and their bytes. The bias
    is only read."""
    c, platform = serving(c), mesh.devices.flat[0].platform
    bytes_V = jnp.zeros(c.vocab_size).at[:len(bytes_V)].set(bytes_V)    # unused ids have 0 bytes

    def score(params, bias_LE, batch):
        rows = {k: v[0] for k, v in batch.items()}
        nll_T, _, _ = model.token_losses(params, bias_LE, rows, c, True, platform)
        weights, sizes = rows["weights"], bytes_V[rows["targets"]]
        nats = jnp.sum(weights.reshape(-1) * nll_T)
        return lax.psum((nats, jnp.sum(weights), jnp.sum(sizes * weights)), MESH)

    specs = model.map_params(lambda _, w: w.spec, c)
    return jax.jit(jax.shard_map(score, mesh=mesh, in_specs=(specs, Spec(), Spec(None, MESH)),
                                 out_specs=Spec(), check_vma=False))


def evaluate(state, eval_step, mixture, c, t, mesh, limit=None):
    """Loss of every held-out domain, {name: {"loss": nats per token, "bpb": bits per byte, ...}},
    and their unweighted mean as "macro". Bits per byte compare across tokenizers; nats do not."""
    rows = t.batch_size // t.accumulate
    here, domains = local_rows(rows, mesh), {}
    for name, stream in mixture.heldout.items():
        sums = np.zeros(3)
        for batch in data.heldout_batches(stream, rows, c.seq_len, mixture.tokenizer.eot, limit):
            batch = to_global_batch(data.Batch(*(array[here] for array in batch)), mesh)
            sums += np.array([float(x) for x in eval_step(state.params, state.bias_LE, batch)])
        nats, tokens, size = sums
        domains[name] = {"loss": nats / tokens, "bpb": nats / math.log(2) / size,
                         "tokens": int(tokens), "bytes": int(size)}
    macro = {key: float(np.mean([d[key] for d in domains.values()])) for key in ("loss", "bpb")}
    return domains | {"macro": macro}


# ---------------------------------------------------------------------------------------- sampling

def make_sampler(c, t, tokenizer):
    """A function (params, bias_LE, prompt, n, seed) -> text, on one device. There is no cache:
    every token runs the last seq_len tokens again. It is slow, and meant for a look."""
    c, one = serving(c), jax.devices()[0]

    @jax.jit
    def next_token(params, bias_LE, window_S, length, key):
        segment_S = (jnp.arange(c.seq_len) < length).astype(jnp.int32)
        logits_V = model.logits(params, bias_LE, window_S[None], segment_S[None], c, at=length - 1,
                                platform=one.platform)
        logits_V = jnp.where(jnp.arange(c.vocab_size) < tokenizer.vocab_size, logits_V, -jnp.inf)
        if t.temperature == 0:
            return jnp.argmax(logits_V)
        return jax.random.categorical(key, logits_V / t.temperature)

    def sample(params, bias_LE, prompt, n, seed=0):
        params, bias_LE = jax.device_put((params, bias_LE), one)
        tokens = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eot]
        for i in range(n):
            window_S, recent = np.zeros(c.seq_len, np.int32), tokens[-c.seq_len:]
            window_S[:len(recent)] = recent
            key = jax.random.fold_in(jax.random.key(seed), i)
            new = int(next_token(params, bias_LE, window_S, len(recent), key))
            if new == tokenizer.eot:
                break
            tokens.append(new)
        return tokenizer.decode(tokens)
    return sample


# -------------------------------------------------------------------------------------------------- checkpoint

def leaves_by_name(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fingerprint(x):
    """32 bits of an array's bits and their places: exact, and the same however the array lies on devices.

    Each element is mixed with its place by a one-to-one function (murmur3's finaliser) and all are summed modulo
    2**32. So any change of one element is seen for certain, any other with probability 1 - 2**-32."""
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):        # counted axis by axis: a flat view would gather a split array
        place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits ^= place * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ bits >> shift) * jnp.uint32(factor)
    return jnp.sum(bits, dtype=jnp.uint32)


@jax.jit
def fingerprints(leaves):
    """Of every leaf, in order, [leaves]; and whether all of them are finite."""
    return (jnp.stack([fingerprint(x) for x in leaves]),
            jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves if x.dtype != jnp.int32])))


def agreed(fine):
    """Whether all processes say so: what each has read for itself is decided on together."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils
    return bool(multihost_utils.process_allgather(np.array(fine)).all())


def without_echoes(unraisable, show=sys.unraisablehook):
    """A sys.unraisablehook. When a write fails, tensorstore's threads go on and report each further piece to an
    event loop that orbax has closed: hundreds of stacks that say nothing. When a read fails, the coroutines of the
    further arrays that fail are dropped, each with its stack. The failure itself is an event, or one line."""
    if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(unraisable.object):
        show(unraisable)


class Checkpoints:
    """Whole states by orbax: asynchronous, sharded, on a disk or in a bucket (gs://).

    orbax restores a flipped bit without a word, so each checkpoint carries a proof: its step, the run's config
    and the fingerprint of every array. Only a state that matches its proof is sound, on whatever mesh it is
    restored. Broken ones are kept, named in .broken, and moved aside when another one is sound."""

    def __init__(self, t):
        import orbax.checkpoint as ocp
        from etils import epath
        logging.getLogger("absl").setLevel(logging.CRITICAL)    # what orbax logs with stacks is one line here
        sys.unraisablehook = without_echoes
        self.ocp, self.t, self.manager, self.broken, self.at, self.failed = ocp, t, None, {}, None, False
        self.folder = epath.Path(t.checkpoint_dir or Path(t.run_dir, "checkpoints").resolve())

    def steps(self):
        """Of all checkpoints that were committed, sound or not, newest first."""
        found = self.folder.iterdir() if self.folder.exists() else ()
        return sorted((int(path.name) for path in found if re.fullmatch("[0-9]+", path.name)
                       and self.ocp.utils.is_checkpoint_finalized(path)), reverse=True)

    def newest(self):
        return next(iter(self.steps()), None)

    def proof(self, step):
        """What was written beside the arrays. Raises ValueError if it is not whole."""
        try:
            record = json.loads((self.folder / str(step) / "proof" / "metadata").read_text())
            proof, found = record["proof"], zlib.crc32(json.dumps(record["proof"], sort_keys=True).encode())
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"its proof cannot be read ({one_line(error)})") from None
        if found != record.get("crc32") or proof["step"] != step:
            raise ValueError("its proof has been altered")
        return proof

    def config(self):
        """The config.json of the newest checkpoint whose proof is whole, or None."""
        for step in self.steps():
            with contextlib.suppress(ValueError):
                return self.proof(step)["config"]

    def restore(self, c, t, mesh):
        """The newest sound state, or None if there is no checkpoint at all. Raises Unsound if none is sound."""
        target = abstract_state(c, t, mesh)
        target_by_name = leaves_by_name(target)
        for step in self.steps():
            why = proof = leaves = None
            try:
                proof = self.proof(step)["arrays"]
                # the handler itself: around it orbax has a barrier at which the others would wait for one that
                # could not read its part
                leaves = self.ocp.StandardCheckpointHandler().restore(
                    self.folder / str(step) / "state", args=self.ocp.args.StandardRestore(target_by_name))
            except Exception as error:                      # whatever orbax and tensorstore raise about damage
                why = one_line(error)
            if agreed(why is None):
                found = np.asarray(fingerprints([leaves[name] for name in target_by_name])[0]).tolist()
                bad = [n for n, mark in zip(target_by_name, found) if proof.get(n) != mark]
                if not bad:
                    self.at = step
                    return jax.tree.unflatten(jax.tree.structure(target), [leaves[n] for n in target_by_name])
                why = f"altered since it was written: {', '.join(bad[:3])}" + ", ..." * (len(bad) > 3)
            self.broken[step] = why or "another process could not read its part"
        if self.broken:
            raise Unsound(f"{self.folder}: none of {len(self.broken)} checkpoints can be trusted, and nothing was "
                          f"touched. " + "; ".join(f"step {s}: {w}" for s, w in self.broken.items())
                          + ". To start anew choose another --run_dir")

    def open(self):
        """Make ready to write: clear what killed writers left, move broken checkpoints aside, delete none."""
        policies = self.ocp.checkpoint_managers
        keep = [policies.LatestN(self.t.keep)]
        keep += [policies.EveryNSteps(self.t.keep_every)] if self.t.keep_every else []
        options = self.ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=not self.failed, enable_async_checkpointing=True,
            preservation_policy=policies.AnyPreservationPolicy(keep))
        try:
            for step in self.broken if leads() else ():
                if (self.folder / str(step)).exists():
                    (self.folder / str(step)).rename(self.folder / f"broken-{step}-{time.time_ns()}")
            agreed(True)                                    # the others wait for that
            self.manager = self.ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise ConfigError(f"checkpoint_dir: expected a directory that can be written, found {self.folder} "
                              f"({error.strerror})") from None

    def save(self, state, config):
        """Begin to write a state. Returns what went wrong with the one before, or "". Halted if not finite."""
        step, leaves = int(state.step), leaves_by_name(state)
        if step == self.at:
            return ""
        marks, finite = fingerprints(list(leaves.values()))
        if not finite:
            raise Halted(f"step {step}: the state is not finite, though every update was; not saved")
        wrong = self.settle()
        self.sweep()
        proof = {"step": step, "config": config, "arrays": dict(zip(leaves, np.asarray(marks).tolist()))}
        record = {"proof": proof, "crc32": zlib.crc32(json.dumps(proof, sort_keys=True).encode())}
        args, self.at = self.ocp.args, step
        try:
            self.manager.save(step, args=args.Composite(state=args.StandardSave(leaves),
                                                        proof=args.JsonSave(record)))
        except Exception as error:
            wrong = self.give_up(error)
        return wrong

    def settle(self):
        """Wait until what save began is written. Returns what went wrong, or ""."""
        try:
            if self.manager:
                self.manager.wait_until_finished()
            return ""
        except Exception as error:                          # a full disk, a bucket out of reach
            return self.give_up(error)

    def give_up(self, error):
        """A manager does not recover from a failed write: take another, and clear away what is half written."""
        wrong, self.at, self.failed = f"step {self.at}: {one_line(error)}", None, True
        with contextlib.suppress(Exception):
            self.manager.close()
        self.open()
        return wrong

    def sweep(self):
        """Remove what a failed write left half done. Its threads may still be at it: then the next time."""
        for path in self.folder.glob("*.orbax-checkpoint-tmp*") if leads() and self.failed else ():
            with contextlib.suppress(OSError):
                path.rmtree(missing_ok=True)

    def close(self):
        if self.manager:
            self.settle()
            self.manager.close()
            self.sweep()


# ----------------------------------------------------------------------------------------------- run directory

def leads():
    """Whether this is the one process that prints and writes files; every process writes its share of a state."""
    return jax.process_index() == 0


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def writing(path):
    """An OSError inside becomes one line that names the file: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        raise TryAgain(f"{path}: cannot be written ({error.strerror}); what was saved before is sound, and the "
                       f"same command goes on") from None


def append(path, row):
    if leads():
        with writing(path), open(path, "a") as f:
            f.write(json.dumps(row) + "\n")


def read_rows(path):
    """The rows of a .jsonl file; a line that a crash cut short or that is damaged is left out."""
    rows = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step", 0), int)]


def write_whole(path, text):
    """Replace a file in one motion: a reader sees the old text or the new one, never half."""
    if leads():
        with writing(path):
            Path(path).with_suffix(".tmp").write_text(text)
            Path(path).with_suffix(".tmp").replace(path)


def write_rows(path, rows):
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def only_trainer(run):
    """Hold the lock of a run directory. Raises ConfigError if another process trains there."""
    if not leads():
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / "lock", "a+")
    except OSError as error:
        raise ConfigError(f"run_dir: expected a directory that can be written, found {run} "
                          f"({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)        # goes with the process, however it ends
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(f"{run}: {lock.read().strip() or 'another process'} is training there; wait for it, "
                              f"stop it, or choose another --run_dir") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


@functools.cache
def git_commit():
    """The commit of this code, "-dirty" if a Python file has changed since: tables of results may grow."""
    git = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    try:
        found = git(["git", "describe", "--always"]).stdout.strip()
        changed = found and git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
        return found + "-dirty" * bool(changed) or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


FIXED = ("optimizer", "batch_size", "seed")     # with model and data: what one run cannot change on its way
FREE = ("exchange", "remat")        # of the model: how it is computed, not what. The 129B run went from ring to
#                                     ragged on its way [cited: marin #4697]


def check_run(c, t, mixture, checkpoints):
    """The content of config.json, after making sure that the run in run_dir, if there is one, is this one.

    Reads only; raises ConfigError naming the key that differs."""
    run, step, old = Path(t.run_dir), checkpoints.newest(), None
    now = {"model": dataclasses.asdict(c), "train": json.loads(json.dumps(dataclasses.asdict(t))),
           "data": mixture.sha256, "counts": model.count(c)._asdict(), "commit": git_commit(),
           "versions": {m.__name__: m.__version__ for m in (jax, np, optax)} | {"python": sys.version.split()[0]}}
    try:                        # a new machine has no config.json yet, and finds it in the checkpoints
        there = (run / "config.json").exists()
        old = json.loads((run / "config.json").read_text()) if there else checkpoints.config()
        if old is not None:
            pairs = [(k, old["model"].get(k), v) for k, v in now["model"].items() if k not in FREE]
            pairs += [(k, old["train"].get(k), now["train"][k]) for k in FIXED]
            pairs += [("data", old["data"], now["data"])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{run / 'config.json'}: expected the config of a run, found something else; "
                          f"choose another --run_dir") from None
    if old is not None:
        for key, then, wanted in pairs:
            if then != wanted:
                raise ConfigError(f"{run}: holds a run with {key}={then!r}, found {key}={wanted!r}; a run cannot "
                                  f"change this on its way: choose another --run_dir, or delete this one")
    if step is not None and step > t.steps:
        raise ConfigError(f"steps: expected at least {step}, where the run in {run} stands, found {t.steps}")
    return now


def write_run(run, now):
    """Write config.json; what changed since the last start becomes an event and a printed line."""
    if (run / "config.json").exists():
        old = json.loads((run / "config.json").read_text())
        changed = {k: [old[part].get(k), v] for part in ("model", "train") for k, v in now[part].items()
                   if old[part].get(k) != v}
        if changed:
            append(run / "events.jsonl", {"event": "config_changed", "keys": changed, "time": time.time()})
            say("changed   " + ", ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in changed.items()))
    write_whole(run / "config.json", json.dumps(now, indent=1))


# --------------------------------------------------------------------------------------------------------- log

class Log:
    """Metrics of every step, fetched from the devices once per line, so that logging never stalls a step."""

    def __init__(self, run, c, t, mesh, start, rows_of):
        self.file, self.events = run / "metrics.jsonl", run / "events.jsonl"
        self.c, self.t, self.rows_of = c, t, rows_of
        numbers = {"step", "skipped", "lr", "adam_lr", "tokens_per_second", "seconds", "steps"}
        number = lambda x: isinstance(x, int | float) and math.isfinite(x)      # json.loads takes NaN for a number
        whole = lambda row: (all(number(row.get(k)) for k in numbers) and
                             all(row.get(k, "") is None or number(row.get(k)) for k in ("loss", "ema", "gnorm")))
        kept = [row for row in read_rows(self.file) if whole(row) and row["step"] <= start]  # the rest comes again
        write_rows(self.file, kept)
        self.ema = kept[-1]["ema"] if kept else None
        self.in_row, self.skipped = 0, sum(row.get("skipped", 0) for row in kept)
        self.device = mesh.local_devices[0]
        self.peak = (t.peak_flops or PEAK_FLOPS.get(self.device.device_kind, 0.0)) * mesh.size
        self.rates, self.count, self.tokens = rates(c, t), model.count(c), t.batch_size * c.seq_len
        self.pending, self.since = [], time.perf_counter()

    def step(self, step, metrics, due, say):
        """Keep a step's metrics; when a line is due, write it. Raises Halted after max_skips skips in a row."""
        self.pending.append(metrics)
        if not due:
            return
        rows = jax.device_get(self.pending)
        seconds, self.pending = (time.perf_counter() - self.since) / len(rows), []
        for i, (loss, gnorm) in enumerate((float(r["loss"]), float(r["gnorm"])) for r in rows):
            if rows[i]["skipped"]:
                self.skip(step - len(rows) + 1 + i, loss, gnorm)
            else:
                self.in_row, self.ema = 0, loss if self.ema is None else 0.95 * self.ema + 0.05 * loss
            if rows[i].get("bias_kept"):
                append(self.file.parent / "events.jsonl", {"event": "bias_kept", "step": step - len(rows) + 1 + i,
                                                            "layers": int(rows[i]["bias_kept"])})
        last, speed = rows[-1], self.tokens / seconds
        finite = lambda x: x if math.isfinite(x) else None                  # JSON knows no nan
        row = {"step": step, "loss": finite(loss), "ema": self.ema, "gnorm": finite(gnorm),
               "skipped": sum(int(r["skipped"]) for r in rows),
               "lr": self.rates.hyper_lr * float(last["lr_multiplier"]),
               "adam_lr": self.rates.adam_lr * float(last["lr_multiplier"]),
               "tokens": step * self.tokens, "flops": step * self.tokens * self.count.flops_per_token,
               "tokens_per_second": speed, "seconds": seconds, "steps": len(rows), "time": time.time()}
        if self.c.num_experts:
            row |= self.routing(rows)
        append(self.file, row)
        mfu = f"{100 * self.count.mfu_flops * speed / self.peak:.1f}%" if self.peak else "-"
        balanced = f"maxvio {row['maxvio']:.2f} drop {100 * row['drop']:.1f}% | " if self.c.num_experts else ""
        eta = int(seconds * (self.t.steps - step))
        say(f"step {step:>{len(str(self.t.steps))}}/{self.t.steps} {100 * step / self.t.steps:5.1f}% | "
            f"loss {loss:.3f} ema {self.ema or math.nan:.3f} | lr {row['lr']:.1e} | gnorm {gnorm:.2f} | "
            f"{speed / 1e3:.1f} ktok/s | {seconds * 1e3:.0f} ms | mfu {mfu} | {balanced}{self.memory()} | "
            f"skip {self.skipped} | eta {eta // 60}m{eta % 60:02d}s")
        self.since = time.perf_counter()

    def skip(self, step, loss, gnorm):
        """An update that was not taken becomes an event that names its rows; too many in a row end the run."""
        self.in_row, self.skipped = self.in_row + 1, self.skipped + 1
        why = "an outlier" if math.isfinite(loss + gnorm) else "not finite"
        append(self.events, {"event": "skip", "step": step, "why": why, "loss": str(loss), "gnorm": str(gnorm),
                             "rows": self.rows_of(step), "time": time.time()})
        if self.in_row >= self.t.max_skips:
            raise Halted(f"step {step}: the loss is {loss}, the gradient norm {gnorm}: {why}, {self.in_row} times "
                         f"in a row; none of these updates was taken. Look at the batch with --replay {step}, or "
                         f"lower the rates")

    def routing(self, rows):
        load = np.stack([r["load_LE"] for r in rows])                   # [steps since the last line, L, E]
        violation = np.asarray(balance.max_violation(load))
        drops = {f"{f:g}": float(np.mean(balance.drop_fraction(load, f))) for f in (1.0, 1.15, 1.33)}
        sent = self.tokens * self.c.experts_per_token * self.c.num_layers * len(rows)
        return {"maxvio": float(violation.mean()), "maxvio_L": violation[-1].round(4).tolist(),
                "drop": float(np.sum([r["dropped_L"] for r in rows])) / sent, "would_drop": drops,
                "dead": int((load[-1] == 0).sum()), "router_z": float(rows[-1]["router_z"]),
                "load_LE": (load[-1] / load[-1].mean(-1, keepdims=True)).round(3).tolist()}

    def memory(self):
        stats = self.device.memory_stats()
        if stats:
            return f"hbm {stats['peak_bytes_in_use'] / 2**30:.1f}/{stats['bytes_limit'] / 2**30:.0f}G"
        import resource                                                 # a CPU device has no memory of its own
        return f"mem {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}G"


# ------------------------------------------------------------------------------------------------------ report

def report(run):
    """Draw run/plots/*.png from the run's own files and put them, with result and config, into report.html."""
    import base64
    import html

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config, rows = json.loads((run / "config.json").read_text()), read_rows(run / "metrics.jsonl")
    events = read_rows(run / "events.jsonl")
    evals = {e["step"]: e["domains"] for e in events if e["event"] == "eval"}
    m, t, step = config["model"], config["train"], [row["step"] for row in rows]
    if not rows:
        return                                                          # metrics.jsonl was taken away
    (run / "plots").mkdir(exist_ok=True)

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    loss, held, rate, norm, speed, routing = axes.flat
    loss.plot(step, [row["loss"] for row in rows], lw=0.6, alpha=0.5, label="training, one batch")
    loss.plot(step, [row["ema"] for row in rows], label="training, moving average")
    for name in (name for name in next(iter(evals.values()), {}) if name != "macro"):
        loss.plot(list(evals), [e[name]["loss"] for e in evals.values()], "o-", ms=4, label=f"held out: {name}")
        held.plot(list(evals), [e[name]["bpb"] for e in evals.values()], "o-", ms=4, label=name)
    rate.plot(step, [row["lr"] for row in rows], label="matrices (relative step)")
    rate.plot(step, [row["adam_lr"] for row in rows], label="Adam group")
    norm.semilogy(step, [row["gnorm"] for row in rows])
    speed.plot(step, [row["tokens_per_second"] / 1e3 for row in rows])
    loss.set(title="loss", ylabel="nats per token")
    held.set(title="held-out text", ylabel="bits per byte")
    rate.set(title="learning rates")
    norm.set(title="gradient norm", xlabel="step")
    speed.set(title="throughput", ylabel="thousand tokens per second", xlabel="step", ylim=(0, None))
    if m["num_experts"]:
        floor = balance.sampling_floor(t["batch_size"] * m["seq_len"], m["num_experts"], m["experts_per_token"])
        routing.semilogy(step, [row["maxvio"] for row in rows], label="mean over layers")
        routing.axhline(floor, color="black", ls=":", lw=0.8, label="floor for independent tokens")
        routing.set(title="MaxVio: largest load over mean load, minus 1", xlabel="step")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(run / "plots/training.png", dpi=110)
    plt.close(figure)

    if m["num_experts"]:
        load = np.array([row["load_LE"] for row in rows])               # [lines, L, E]; 1 is the mean load
        figure, axes = plt.subplots(load.shape[1], 1, figsize=(10, 1 + 0.9 * load.shape[1]), sharex=True,
                                    squeeze=False, layout="constrained")
        for i, axis in enumerate(axes[:, 0]):
            picture = axis.imshow(load[:, i].T, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r",
                                  interpolation="nearest", extent=(step[0], step[-1], load.shape[2] - 0.5, -0.5))
            axis.set(ylabel=f"layer {i}", yticks=())
        axes[-1, 0].set(xlabel="step")
        figure.colorbar(picture, ax=axes, label="load of each expert over the mean")
        figure.savefig(run / "plots/experts.png", dpi=110)
        plt.close(figure)

    image = lambda p: f'<img src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">'
    block = lambda title, text: f"<h2>{title}</h2><pre>{html.escape(text)}</pre>"
    parts = [block(p.stem, p.read_text()) for p in (run / "result.json", run / "sample.txt") if p.exists()]
    pictures = [image(p) for p in sorted((run / "plots").glob("*.png"), reverse=True)]
    parts += [block("config", json.dumps(config, indent=1)), block("events", "\n".join(map(json.dumps, events)))]
    style = "<style>body{font-family:sans-serif;max-width:75em;margin:2em auto}img{max-width:100%}</style>"
    write_whole(run / "report.html", f"<!doctype html><meta charset='utf-8'>{style}"
                f"<h1>{html.escape(str(run))}</h1>{''.join(pictures + parts)}")


# -------------------------------------------------------------------------------------------------------- plan
# --plan is arithmetic on the weight table: what a run costs on hardware that is not here. --plan --compile asks
# the real TPU compiler, which needs no TPU. Both read `topology`.

class Chip(NamedTuple):
    kinds: tuple            # what jax calls the device
    flops: float            # dense bfloat16 FLOPs a second
    memory: float           # bytes of HBM
    link: float             # bytes a second, one direction of one ICI link; a torus axis has two per chip
    outside: float          # bytes a second to other slices, over the data center's network
    compiler: dict          # what libtpu must know besides the shape


CHIPS = {       # [cited: vendors' data sheets for FLOPs and memory, "How to scale your model" for the networks]
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 45e9, 6.25e9,
               {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 45e9, 3.125e9, {}),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 90e9, 6.25e9, {}),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * 2**30, 90e9, 12.5e9, {}),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 0.0, 0.0, {}),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 0.0, 0.0, {}),
}
PEAK_FLOPS = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds}


def hardware(t):
    """What `topology` names: (slices, chip name, (x, y, z) of one slice). "2xv5p:8x8x8" is two slices."""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w+):(\d+(?:x\d+)*)", t.topology)
    if not match or match[2] not in CHIPS:
        raise ConfigError(f"topology: expected such as 'v4:8x8x16', '2xv5p:8x8x8' or 'h200:1', of the chips "
                          f"{', '.join(CHIPS)}; found {t.topology!r}")
    return int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))


def traffic(c, t, size):
    """Bytes that each chip receives in a step, as ((mesh axis, what), bytes) pairs. size: of the mesh axes.

    Per microbatch: a weight split over "data" is gathered forward, and again backward under remat; its gradient
    is reduce-scattered in float32. Once a step: gradients are all-reduced over the axes that copy their weight.
    Tokens go to experts and back, in both directions of differentiation."""
    half = jnp.dtype(c.compute_dtype).itemsize
    again = c.remat == "block"
    d, P, out = size["data"], size["expert"], {}
    def add(axis, what, amount):
        out[axis, what] = out.get((axis, what), 0.0) + amount
    def weight(path, w):
        elements = math.prod(w.shape) / (P if "expert" in w.spec else 1)
        if "data" in w.spec:
            kind = "experts" if w.group == "expert" else "other weights"
            gathers = 2 if again and path.startswith("layers/") else 1
            add("data", f"{kind}, gathered", gathers * t.accumulate * elements * half * (d - 1) / d)
            add("data", f"{kind}, gradients", t.accumulate * elements * 4 * (d - 1) / d)
            elements /= d
        for axis in MESH:
            if axis not in w.spec:
                add(axis, "gradients of copies", 2 * elements * 4 * (size[axis] - 1) / size[axis])
    model.map_params(weight, c)
    if c.num_experts and P > 1:
        tokens = t.batch_size * c.seq_len / math.prod(size.values())            # a chip's, over all microbatches
        passes = 4 + again if c.exchange == "ring" else 4 + 2 * again
        rows = (P - 1) if c.exchange == "ring" else (P - 1) / P * c.experts_per_token * min(1, c.capacity_factor)
        add("expert", f"tokens, by {c.exchange}", passes * c.num_layers * tokens * rows * c.hidden_dim * half)
    return {key: amount for key, amount in out.items() if amount}


def axis_rates(chip, slices, shape, size):
    """Bytes a second that a chip can receive along each mesh axis: both directions of each torus axis that the
    mesh axis fills, one link along a part of a torus axis, the data center's network between slices."""
    rate, left = {}, [(length, 2 if length > 2 else 1) for length in shape]         # (chips in a row, links)
    for axis in reversed(MESH):
        n = size[axis] // (slices if axis == "replica" else 1)
        sets = (s for k in range(1, len(left) + 1) for s in itertools.combinations(left, k)
                if math.prod(length for length, _ in s) == n)
        if fills := next(sets, None):
            rate[axis] = chip.link * max(1, sum(links for _, links in fills))
            for dimension in fills:
                left.remove(dimension)
        else:
            rate[axis] = chip.link
            if part := next((d for d in left if d[0] % n == 0), None):
                left[left.index(part)] = part[0] // n, 0
    return rate | ({"replica": chip.outside} if slices > 1 else {})


def hops(n):
    """How much longer an all-to-all takes along n chips in a line or ring than its received bytes say.

    What a gather passes on it also keeps; an all-to-all passes bytes on for others. On a ring, the n * V that
    all chips send travel n / 4 links on average over the 2 n links: V n / 8 each, of which n - 1 of n arrive."""
    return n * n / (4 * (n - 1))


def plan(c, t):
    """The cost of a run on its `topology`, as a dict of numbers; see show_plan for words and units."""
    slices, name, shape = hardware(t)
    chip, n, chips = CHIPS[name], model.count(c), slices * math.prod(shape)
    if reason := mesh_error(c, t, chips):
        raise ConfigError(reason)
    if chips > 1 and not chip.link:
        raise ConfigError(f"topology: expected one {name} at most, found {chips}: GPU networks are not modelled")
    size = mesh_shape(t, chips)
    mesh = AbstractMesh(tuple(size.values()), MESH, axis_types=(AxisType.Auto,) * 3)
    state = jax.eval_shape(lambda: make_state(c, t, jax.random.key(0)))
    share = lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    held = lambda tree, s: sum(jax.tree.leaves(jax.tree.map(share, tree, s)))
    shardings = state_shardings(c, t, mesh)
    weights = held(state.params, shardings.params)
    tokens = t.batch_size * c.seq_len
    inputs = (c.num_layers if c.remat == "block" else 0) * (tokens / t.accumulate / chips) * c.hidden_dim
    received = traffic(c, t, size)
    rate = axis_rates(chip, slices, shape, size)
    seconds = {axis: sum(amount * (hops(size[axis]) if "ragged" in what else 1)
                         for (a, what), amount in received.items() if a == axis) / rate[axis]
               for axis in MESH if chips > 1 and size[axis] > 1}
    ideal = n.mfu_flops * tokens / chips / chip.flops
    executed = ideal * (4 / 3 if c.remat == "block" else 1)
    bounds = {"overlapped": max(executed, *seconds.values(), 0.0),
              "one after the other": executed + sum(seconds.values())}
    return {"chips": chips, "chip": name, "mesh": size, "tokens_per_step": tokens, "tokens": tokens * t.steps,
            "total": n.total, "active": n.active, "flops_per_token": n.flops_per_token, "mfu_flops": n.mfu_flops,
            "memory": {"weights": weights, "moments": held(state.opt, shardings.opt),
                       "gradients": weights * (2 if t.accumulate > 1 else 1),
                       "layer inputs": inputs * jnp.dtype(c.compute_dtype).itemsize},
            "received": received, "seconds": seconds, "ideal": ideal, "executed": executed,
            "step": bounds, "mfu": {how: ideal / s for how, s in bounds.items()}}


def show_plan(c, t, compile_too=False):
    """--plan: print `plan`, in seconds, on any machine; --compile: then `compile_plan`. Returns the exit code."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"                  # libtpu must not look for a TPU, nor jax start one
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"          # nor lock the TPU that two compilations do not share
    jax.config.update("jax_platforms", "cpu")
    p, (slices, name, shape) = plan(c, t), hardware(t)
    chip, size, total = CHIPS[name], p["mesh"], p["flops_per_token"] * p["tokens"]
    print(f"model     {p['total'] / 1e9:.2f} B parameters, {p['active'] / 1e9:.2f} B active; "
          f"{p['flops_per_token'] / 1e9:.2f} GFLOP a token, {p['mfu_flops'] / 1e9:.2f} with the head (MFU)")
    print(f"run       {t.steps:,} steps x {p['tokens_per_step']:,} tokens = {p['tokens']:.3e} tokens = "
          f"{total:.2e} FLOP")
    print(f"machine   {p['chips']:,} x {name} ({t.topology}): " + " x ".join(f"{a} {n}" for a, n in size.items())
          + f"; {p['tokens_per_step'] // p['chips']:,} tokens a chip and step, {t.accumulate} microbatch"
          + ("es" if t.accumulate > 1 else ""))
    gib, least = 2**30, sum(p["memory"].values())
    print(f"memory    {least / gib:.2f} of {chip.memory / gib:.0f} GiB a chip, "
          + " + ".join(f"{what} {amount / gib:.2f}" for what, amount in p["memory"].items())
          + (f": {(least - chip.memory) / gib:.1f} too much. {remedy(c, t)}" if least > chip.memory else
             "; and a layer at work" + " (--compile)" * bool(chip.link)))
    for (axis, what), amount in p["received"].items():
        if amount > 1e6:
            print(f"traffic   {axis:8s} {what:28s} {amount / 1e9:9.2f} GB a step and chip")
    print(f"time      {p['ideal']:.2f} s of model FLOPs at the peak, {p['executed']:.2f} s with recomputation; "
          + ", ".join(f"{axis} {s:.2f} s" for axis, s in p["seconds"].items()))
    for how, seconds in p["step"].items():
        print(f"bound     {how:20s} {seconds:6.2f} s a step, MFU {100 * p['mfu'][how]:.1f} %, "
              + (f"{seconds * t.steps / 86_400:.1f} days" if seconds * t.steps > 2e5 else
                 f"{seconds * t.steps / 3600:.1f} hours"))
    if t.published:
        print(f"published {t.published}")
    return compile_plan(c, t) if compile_too else 0


def traced_flops(jaxpr, devices=1):
    """Matmul FLOPs of a traced program on one device: loops times their length, the costlier branch of a cond,
    kernels by `kernel_flops`. XLA's cost analysis counts a loop body once, whatever its length."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [j for v in eqn.params.values() for j in (v if isinstance(v, (tuple, list)) else (v,))]
        inner = [getattr(j, "jaxpr", j) for j in inner]
        inner = [j for j in inner if hasattr(j, "eqns")]
        name = eqn.primitive.name
        if name == "dot_general":
            ((contracted, _), _), lhs = eqn.params["dimension_numbers"], eqn.invars[0].aval
            inner_product = math.prod(lhs.shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner_product / devices
        elif name == "pallas_call":
            total += kernel_flops(eqn) / devices
        elif name == "cond":
            total += max(traced_flops(j, devices) for j in inner)
        else:
            times = eqn.params.get("length", 1) if name == "scan" else 1
            total += times * sum(traced_flops(j, 1 if name == "shard_map" else devices) for j in inner)
    return total


def kernel_flops(eqn):
    """Of one Pallas call: its own estimate (our kernels: every tile of the buffer, in use or not), or, for splash
    attention, which gives none, the products of its body times the grid steps that do not skip.

    A causal mask with or without a window is a band of blocks: row i of n sees min(i + 1, width) of them, where
    the grid is `width` wide; so does column i from the end, for the kernel of dk and dv."""
    if estimate := eqn.params.get("cost_estimate"):
        return estimate.flops
    grid, name = eqn.params["grid_mapping"].grid, eqn.params["name"] or ""
    steps = math.prod(grid)
    if name.startswith("splash"):
        n, width = grid[-3 if "dkv" in name else -2], grid[-1]
        steps = steps // (n * width) * sum(min(i + 1, width) for i in range(n))
    return steps * traced_flops(eqn.params["jaxpr"])


class Collective(NamedTuple):
    op: str             # "all-gather", ...
    axis: str           # mesh axes of its groups, "data" or "replica+data+expert"; "" if they are no such axes
    times: int          # how often a step runs it: the product of the loops around it
    received: float     # bytes that a chip receives each time
    arrays: int         # how many at once: the compiler joins small ones
    scope: str          # where in the program it comes from
    wrong: str = ""     # what `misplaced` has against it


def collectives(text, size):
    """Every collective of a compiled program (its HLO text), with the loops in which it stands.

    A program for several slices is that of one of them: its groups name the devices of one slice, and what it sums
    over slices goes through the hosts, as a `send` for "megascale" instead of an all-reduce. A reduce-scatter of
    shares that do not fill tiles is written as a fusion of pad, all-reduce and slice, and run as a reduce-scatter
    of padded shares: by the same emitter, AllReduceScatterFusion, as the others."""
    bodies, lines, scatters = {}, [], set()         # {computation: its lines}; {fusions that are reduce-scatters}
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            bodies[match[1]] = lines = []
        elif line.startswith("  "):
            lines.append(line)

    times = dict.fromkeys(bodies, 0)                                        # how often a step runs each
    called = re.compile(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)")
    def visit(name, factor):
        times[name] += factor
        for line in bodies[name]:
            if " while(" in line:                       # a counter ends it: the largest constant of its condition
                condition, body = (re.search(rf"{k}=%?([\w.\-]+)", line)[1] for k in ("condition", "body"))
                visit(body, factor * max(map(int, re.findall(r" constant\((\d+)\)", "".join(bodies[condition]))),
                                         default=1))
            else:
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                callees = called.findall(line) + (re.findall(r"%([\w.\-]+)", branches[1]) if branches else [])
                callees += re.findall(r"to_apply=%?([\w.\-]+)", line) if " call(" in line else []
                scatters.update(callees if "AllReduceScatterFusion" in line else ())
                for callee in callees:
                    visit(callee, factor)
    visit(re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)[1], 1)

    devices = re.search(r"num_partitions=(\d+)", text)
    slices = math.prod(size.values()) // int(devices[1]) if devices else 1
    shape = size["replica"] // slices, size["data"], size["expert"]
    ids = np.arange(math.prod(shape)).reshape(shape)
    axes = {}                                                               # {groups of devices: mesh axes}
    for some in (some for k in (1, 2, 3) for some in itertools.combinations(range(3), k)):
        groups = np.moveaxis(ids, some, range(-len(some), 0)).reshape(-1, math.prod(ids.shape[i] for i in some))
        real = "+".join(MESH[i] for i in some if ids.shape[i] > 1)
        axes.setdefault(frozenset(map(frozenset, groups.tolist())), real)
    def axis_of(line):
        if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
            grid = np.arange(ids.size).reshape([int(i) for i in match[3].split(",")])
            grid = grid.transpose([int(i) for i in match[4].split(",")]) if match[4] else grid
            groups = grid.reshape(int(match[1]), int(match[2])).tolist()
        elif match := re.search(r"replica_groups=\{(\{.*?\})\}", line):
            groups = [[int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", match[1])]
        else:
            return "", ids.size
        return axes.get(frozenset(map(frozenset, groups)), ""), len(groups[0])

    kind = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) (all-gather|reduce-scatter|all-reduce|all-to-all|"
                      r"collective-permute|ragged-all-to-all|send)(-start)?\(")
    bytes_of, found = {"bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}, []
    for name, line in ((name, line) for name in bodies if times[name] for line in bodies[name]):
        if match := kind.match(line):
            sizes = [bytes_of.get(dtype, 4) * math.prod(int(i) for i in dims.split(",") if i)
                     for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])]
            amount, (axis, n), op = max(sizes) if match[3] else sum(sizes), axis_of(line), match[2]
            if op == "send":
                if "megascale" not in line:
                    continue
                amount, axis, n, op = max(sizes), "replica", slices, "all-reduce"
            if name in scatters and op == "all-reduce":
                amount, op = amount / n, "reduce-scatter"
            scale = {"reduce-scatter": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
            scope = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(op, axis, times[name], amount * scale.get(op, (n - 1) / n),
                                    len(sizes), scope[1] if scope else ""))
    return found


SUMMED = "summed whole, where its share was asked for"
ASKS = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "psum": "all-reduce"}      # {line: op}


def misplaced(found):
    """Those of a MiB and more that no line of the program asks for where they stand, with `wrong` filled in.

    The layer loop holds gathers and gradient sums of weights over "data" and the exchange over "expert"; after it
    come the psums of gradients of copies. Outside of shard_map only norms are summed (bytes) and MuonH deals whole
    matrices out. A padded reduce-scatter names no line, nor do the permutes that move its shares into place, nor
    the all-reduce that the compiler makes of some: SUMMED. Psums of gradients that it joins with norms may bear
    the name of a norm.
    For several slices it takes sums over slices and axes apart and drops the names of all that stands once: what
    is left to judge there is the layer loop, SUMMED, and the bytes in all."""
    sliced = any(x.axis == "replica" and x.op == "all-reduce" and not x.scope for x in found)
    inside = {("all-gather", "data"), ("reduce-scatter", "data"), ("all-gather", "expert"),
              ("reduce-scatter", "expert"), ("ragged-all-to-all", "expert")}
    def why(x):
        asked = [op for line, op in ASKS.items() if x.scope.rpartition("/")[2].startswith(line)]
        if x.op == "all-reduce" and not x.scope and x.axis in ("data", "expert"):
            return SUMMED
        if x.op == "collective-permute" and not x.scope:
            return ""                                   # moves the shares of a padded reduce-scatter into place
        if x.times > 1:
            return "" if (x.op, x.axis) in inside else "not of the layer loop"
        if x.op == "reduce-scatter" and not x.scope:
            return ""
        if "shard_map" in x.scope:
            return "" if asked == [x.op] else "not what its line asks for"
        joined = x.arrays > 1 and x.op == "all-reduce" and x.scope.endswith("reduce_sum")
        return "" if joined or "orthogonalize" in x.scope or sliced and not x.scope else "no line asks for it"
    return [x._replace(wrong=why(x)) for x in found if x.received >= 2**20 and why(x)]


def tally(found, key):
    """[(key, runs a step, bytes a step)] of collectives, those with most bytes first."""
    sums = {}
    for x in found:
        runs, amount = sums.get(key(x), (0, 0.0))
        sums[key(x)] = runs + x.times, amount + x.times * x.received
    return sorted(((k, *both) for k, both in sums.items()), key=lambda row: -row[2])


def compile_plan(c, t):
    """--plan --compile: the whole train step through the TPU compiler for `topology`, with libtpu and no TPU."""
    slices, name, shape = hardware(t)
    if not name.startswith("v"):
        raise ConfigError(f"topology: expected a TPU to compile for, found {t.topology!r}: no GPU compiler works "
                          f"without its GPU; run the config there")
    from jax.experimental import topologies
    chip, began, gib = CHIPS[name], time.time(), 2**30
    try:
        told = chip.compiler | ({"num_slices": slices} if slices > 1 else {})
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{'x'.join(map(str, shape))}", **told)
    except Exception as error:
        raise ConfigError(f"topology: {t.topology!r} is not to be had ({str(error).splitlines()[0][:200]}); "
                          f"it takes: pip install 'jax[tpu]'") from None
    mesh = make_mesh(c, t, described.devices)
    types = {"tokens": jnp.int32, "targets": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}
    rows = {k: jax.ShapeDtypeStruct((t.accumulate, t.batch_size // t.accumulate, c.seq_len), dtype,
                                    sharding=NamedSharding(mesh, Spec(None, MESH))) for k, dtype in types.items()}
    traced = make_train_step(c, t, mesh).trace(abstract_state(c, t, mesh), rows)
    model_flops = model.count(c).mfu_flops * t.batch_size * c.seq_len / mesh.size
    executed = traced_flops(traced.jaxpr.jaxpr, mesh.size) / model_flops
    lowered = traced.lower()
    print(f"traced    in {time.time() - began:.0f} s; executes {executed:.2f} x the model's FLOPs (matmuls and "
          f"kernels of the traced program, loops times their length)", flush=True)
    began = time.time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = (re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))             # or without the state:
                or re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G", str(error)))
        if not used:
            raise
        print(f"verdict   does not fit: {used[1]} GiB of {used[2]} a chip, {float(used[1]) - float(used[2]):.1f} "
              f"too much. {remedy(c, t)}")
        return 1
    m = compiled.memory_analysis()
    used = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    print(f"compiled  in {time.time() - began:.0f} s for {mesh.size:,} x {mesh.devices.flat[0].device_kind}, "
          f"jax {jax.__version__}: " + " x ".join(f"{a} {n}" for a, n in mesh.shape.items()))
    print(f"memory    {used / gib:.2f} GiB of {chip.memory / gib:.0f} a chip, {100 * used / chip.memory:.0f} %: "
          f"state {m.argument_size_in_bytes / gib:.2f}, temporary {m.temp_size_in_bytes / gib:.2f}")
    well, words = judge(collectives(compiled.as_text(), dict(mesh.shape)), sum(traffic(c, t, mesh.shape).values()))
    fit = "fits" if used < 0.85 * chip.memory else f"fits, but above 85 %. {remedy(c, t)}"
    if used > chip.memory:
        fit = f"does not fit: {(used - chip.memory) / gib:.1f} GiB too much. {remedy(c, t)}"
    print(f"verdict   {fit}; {words}")
    return 0 if well and used < 0.85 * chip.memory else 1


def judge(found, planned):
    """Print a table of collectives and those that are misplaced. Returns (whether all is well, that in words):
    well is also a tenth of the bytes in sums that the compiler put for reduce-scatters."""
    print(f"traffic   {'axis':24s} {'operation':20s} where {'runs a step':>12s} {'GB received a chip':>19s}")
    for (axis, op, loop), runs, amount in tally(found, lambda x: (x.axis, x.op, x.times > 1)):
        print(f"          {axis or 'other':24s} {op:20s} {'loop' if loop else 'once'} {runs:13,} "
              f"{amount / 1e9:19.3f}")
    everything, stray = sum(x.times * x.received for x in found), misplaced(found)
    print(f"          together {everything / 1e9:.1f} GB; --plan says {planned / 1e9:.1f}")
    for (why, op, axis, scope), runs, amount in tally(stray, lambda x: (x.wrong, x.op, x.axis, x.scope[-60:])):
        print(f"stray     {op} over {axis or 'other'}, {runs} a step, {amount / 1e9:.1f} GB, {why} {scope}")
    if not stray:
        return True, "every collective is where it should be"
    share = sum(x.times * x.received for x in stray) / everything
    return (share < 0.1 and all(x.wrong == SUMMED for x in stray),
            f"{100 * share:.1f} % of the bytes move in collectives that nobody asked for")


def remedy(c, t):
    """What to change in a config that does not fit. More microbatches shrink all but the state."""
    p = plan(c, t)
    state = sum(amount for what, amount in p["memory"].items() if what != "layer inputs")
    rows, room = t.batch_size // t.accumulate // p["chips"], 0.85 * CHIPS[p["chip"]].memory - state
    return ("Try " + (f"--accumulate={2 * t.accumulate}" if rows > 1 and room > 0 else "more chips")
            + (", --remat=block" if c.remat != "block" else ""))


# -------------------------------------------------------------------------------------------------------- main

def say(line):
    """Print a line to stdout without tearing the progress bar on stderr."""
    from tqdm import tqdm
    if leads():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def stop_signals():
    """Inside, a first SIGTERM or ctrl-C is appended to the list that this yields, and a second one kills.

    One of many processes leaves SIGTERM to jax, which makes all of them stop at the same step; see `stopping`."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    watched = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    old = {s: signal.signal(s, catch) for s in watched}
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def stopping(i, caught):
    """The signal on which to save and stop at step i, or None; the same on all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(i) else None
    return caught[0] if caught else None


@contextlib.contextmanager
def watchdog(minutes, events):
    """Yields a function to call whenever something got done. Not called for `minutes`, a process ends itself with
    exit code 75, all stacks on stderr: on a pod a lost peer or a wedged chip looks like a step without end."""
    last, over = [time.monotonic()], threading.Event()

    def watch():
        while not over.wait(min(6 * minutes, 10)):
            if (still := time.monotonic() - last[0]) > 60 * minutes:
                faulthandler.dump_traceback()
                complain(f"nothing got done for {still:.0f} s (stuck_minutes={minutes:g}); the stacks are above. "
                         f"What was saved is sound, and the same command goes on")
                with contextlib.suppress(TryAgain):
                    append(events, {"event": "stuck", "seconds": round(still), "time": time.time()})
                os._exit(75)
    if minutes:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield lambda: last.__setitem__(0, time.monotonic())
    finally:
        over.set()


def train(c, t):
    """Run or resume a run to its end. Returns what result.json says, or None if a signal stopped it."""
    began, run = time.time(), Path(t.run_dir)
    mesh = make_mesh(c, t)                                                                  # where
    mixture = open_data(c, t)                                                               # on what
    with (only_trainer(run), contextlib.closing(Checkpoints(t)) as checkpoints,
          watchdog(t.stuck_minutes, run / "events.jsonl") as alive):
        now = check_run(c, t, mixture, checkpoints)
        state = checkpoints.restore(c, t, mesh)                                             # from which point
        write_rows(run / "events.jsonl", read_rows(run / "events.jsonl"))                   # mend a torn line
        write_run(run, now)
        introduce(c, t, mesh, mixture)
        note = lambda event, **facts: append(run / "events.jsonl", dict(event=event, **facts, time=time.time()))
        for step, why in checkpoints.broken.items():
            note("broken_checkpoint", step=step, why=why)
            say(f"broken    checkpoint of step {step}: {why}; kept as broken-{step}-..., an older one is used")
        checkpoints.open()
        if state is None:
            state = jax.jit(lambda: make_state(c, t, jax.random.key(t.seed)),
                            out_shardings=state_shardings(c, t, mesh))()
        start = int(state.step)
        note("resume" if start else "start", step=start)
        say(f"run       {run}, " + (f"resumed after step {start}" if start else "started"))
        log = Log(run, c, t, mesh, start, functools.partial(rows_of, mixture, c, t))
        score = make_eval_step(c, mesh, mixture.tokenizer.bytes_V)

        def hold_out(state, step, limit=None):
            domains = evaluate(state, score, mixture, c, t, mesh, limit)
            note("eval", step=step, domains=domains)
            say(f"eval {step:>{len(str(t.steps))}} | " + " | ".join(
                f"{name} {d['loss']:.4f} nats {d['bpb']:.4f} bpb" for name, d in domains.items()))
            alive()
            return domains

        def save(state):
            if failed := checkpoints.save(state, now):
                note("save_failed", why=failed)
                say(f"warning   a checkpoint could not be written ({failed}); the older ones are there, going on")

        state, signal_number = loop(c, t, mesh, mixture, state, save, log, hold_out, alive)
        if failed := checkpoints.settle():
            note("save_failed", why=failed)
        if checkpoints.at != int(state.step):
            raise TryAgain(f"the last checkpoint could not be written (see {run}/events.jsonl); the older ones "
                           f"are there, and the same command goes on from them")
        if signal_number:
            note("stopped", signal=signal_number, step=int(state.step))
            say(f"stopped by signal {signal_number} after step {int(state.step)}; saved. The same command goes on")
            return None

        domains = hold_out(state, t.steps)                                                  # what came of it
        if not leads():
            return None
        result = conclude(c, t, run, mixture, domains)
        if t.sample_tokens and jax.process_count() == 1:        # one device samples, and has to hold the weights
            sample = make_sampler(c, t, mixture.tokenizer)
            text = sample(state.params, state.bias_LE, t.prompt, t.sample_tokens, t.seed)
            write_whole(run / "sample.txt", text)
            say(f"sample\n{text}\n")
        note("done", step=t.steps)
        report(run)
    say(f"done in {time.time() - began:.0f} s, {result['seconds']:.0f} of them training; everything is in {run}: "
        f"see {run}/report.html")
    return result


def loop(c, t, mesh, mixture, state, save, log, hold_out, alive):
    """One pure function, again and again. Returns the last state and the signal that ended it early, or None."""
    from tqdm import tqdm
    train_step, start, saved = make_train_step(c, t, mesh), int(state.step), time.monotonic()
    here = local_rows(t.batch_size, mesh, t.accumulate)
    cpu = mesh.devices.flat[0].platform == "cpu"
    with stop_signals() as caught, tqdm(total=t.steps, initial=start, disable=not sys.stderr.isatty()) as bar:
        for i in range(start, t.steps):
            rows = data.batch_at(mixture, i, t.batch_size, c.seq_len, t.seed, here)
            state, metrics = train_step(state, to_global_batch(rows, mesh, t.accumulate))
            step, stop = i + 1, stopping(i, caught)
            if cpu and i == start:                                              # it has just been compiled
                jax.block_until_ready(metrics)
                kernels.fill_holes()
            due = step == t.steps or step % t.save_every == 0 or t.keep_every > 0 == step % t.keep_every
            if t.save_minutes and step % t.log_every == 0:
                due |= not agreed(time.monotonic() - saved < 60 * t.save_minutes)
            log.step(step, metrics, stop or due or step % t.log_every == 0, say)    # may end the run, unsaved
            bar.update()
            if stop or due:
                save(state)
                saved = time.monotonic()
            alive()
            if stop and step < t.steps:
                return state, int(stop)
            if step % t.eval_every == 0 and step < t.steps:
                paused = time.perf_counter()
                hold_out(state, step, t.eval_tokens)
                if cpu and step - start <= t.eval_every:                        # the first of this process
                    kernels.fill_holes()
                log.since += time.perf_counter() - paused                       # an evaluation is no step time
    return state, None


def rows_of(mixture, c, t, step):
    """Of what the batch of a step is made: [[source, window], ...]."""
    source_B, window_B = data.windows_at(mixture, step - 1, t.batch_size, c.seq_len, t.seed)
    return [[mixture.sources[k].name, int(w)] for k, w in zip(source_B, window_B)]


def open_data(c, t):
    return data.open_mixture(t.mixture, t.tokenizer, t.data_dir, c.vocab_size, seq_len=c.seq_len)


def introduce(c, t, mesh, mixture):
    """The first screen: model, data, optimizer, machine."""
    n, r, tokens = model.count(c), rates(c, t), t.steps * t.batch_size * c.seq_len
    say(f"model     {n.total / 1e6:,.2f} M parameters, {n.active / 1e6:,.2f} M active; "
        f"{n.flops_per_token / 1e6:,.1f} MFLOP a token x {tokens:,} tokens = "
        f"{n.flops_per_token * tokens:.2e} FLOP")
    say(f"data      {mixture.train_tokens:,} training tokens of {mixture.bytes_per_token:.2f} bytes "
        f"({tokens / mixture.train_tokens:.2f} epochs), held out: {', '.join(mixture.heldout)}; "
        f"sha256 {mixture.sha256[:12]}")
    say(f"optimizer {t.optimizer}, rates of recipe {t.recipe}: matrices {r.hyper_lr:.4g}, Adam {r.adam_lr:.4g}, "
        f"beta2 {r.beta2:.4g}, eps {r.eps:.3g}")
    say(f"machine   {mesh.size} x {mesh.devices.flat[0].device_kind}, processes {jax.process_count()}, "
        f"jax {jax.__version__}, commit {git_commit()}")


def conclude(c, t, run, mixture, domains):
    """Write result.json: what scaling.py reads, and what a table may quote."""
    n, rows, tokens = model.count(c), read_rows(run / "metrics.jsonl"), t.steps * t.batch_size * c.seq_len
    result = {"flops": n.flops_per_token * tokens, "flops_with_head": n.mfu_flops * tokens, "params": n.params,
              "total_params": n.total, "tokens": tokens, "loss": domains["macro"]["loss"],
              "bpb": domains["macro"]["bpb"], "domains": domains,
              "bytes_per_token": mixture.bytes_per_token, "seed": t.seed, "commit": git_commit(),
              "seconds": sum(row["seconds"] * row["steps"] for row in rows),
              "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
              "eval": f"whole held-out domains, seq_len {c.seq_len}, data {mixture.sha256[:16]}"}
    if c.num_experts:
        last = float(np.mean([row["maxvio"] for row in rows if row["step"] > 0.9 * t.steps]))
        floor = balance.sampling_floor(t.batch_size * c.seq_len, c.num_experts, c.experts_per_token)
        result |= {"maxvio": last, "maxvio_floor": floor}
        say(f"balance   MaxVio {last:.3f} over the last tenth of the run, {last / max(floor, 1e-9):.1f} x the "
            f"sampling floor of {floor:.3f}")
    write_whole(run / "result.json", json.dumps(result, indent=1))
    return result


def sample_from(c, t):
    """--sample: restore the newest sound checkpoint of the run and continue t.prompt."""
    mesh, mixture, checkpoints = make_mesh(c, t), open_data(c, t), Checkpoints(t)
    if checkpoints.newest() is None:
        raise ConfigError(f"{t.run_dir}: expected a run with a checkpoint, found none; train it first")
    check_run(c, t, mixture, checkpoints)
    state = checkpoints.restore(c, t, mesh)
    print(make_sampler(c, t, mixture.tokenizer)(state.params, state.bias_LE, t.prompt, t.sample_tokens, t.seed))


def replay(c, t, step):
    """--replay STEP: build the batch of that step once more and print what was in it, and what came of it."""
    if not step.isdecimal() or not 1 <= int(step) <= t.steps:
        raise ConfigError(f"--replay: expected a step from 1 to {t.steps}, found {step}")
    mixture, step = open_data(c, t), int(step)
    batch = data.batch_at(mixture, step - 1, t.batch_size, c.seq_len, t.seed)
    count_V = np.bincount(batch.tokens_BS.reshape(-1), minlength=c.vocab_size)
    piece = lambda ids: repr(mixture.tokenizer.decode(ids))
    print(f"step {step}: {t.batch_size} rows of {c.seq_len} tokens, {int(batch.weights_BS.sum()):,} scored, "
          f"{int(batch.segments_BS.max(1).sum()):,} documents, {int((count_V > 0).sum()):,} distinct tokens")
    print("most frequent: " + ", ".join(f"{piece([i])} x {count_V[i]:,}" for i in np.argsort(-count_V)[:8]))
    for b, (name, window) in enumerate(rows_of(mixture, c, t, step)):
        ids = batch.tokens_BS[b]
        top = np.bincount(ids).argmax()
        print(f"row {b:4d}  {name} window {window:,}  {int(batch.weights_BS[b].sum())} scored, "
              f"{batch.segments_BS[b].max()} documents, {len(np.unique(ids))} distinct, {piece([top])} x "
              f"{int((ids == top).sum())}  {piece(ids[:48])}")
    for name in ("metrics.jsonl", "events.jsonl"):
        for row in read_rows(Path(t.run_dir, name)):
            if row.get("step") == step:
                print(f"{name}: " + json.dumps({k: v for k, v in row.items() if k not in ("rows", "load_LE")}))


FLAGS = {"sample": False, "plan": False, "compile": False,                     # name: does a value follow
         "replay": True, "coordinator": True, "processes": True, "process": True}


def split_flags(words):
    """What is no config key, --flag, --flag=value or --flag value, as a dict; and the words that are left."""
    given, rest, words = {}, [], list(words)
    while words:
        key, equals, value = words[0].removeprefix("--").partition("=")
        if key not in FLAGS:
            rest.append(words[0])
        elif FLAGS[key] and not equals and len(words) > 1:
            given[key] = words.pop(1)
        else:
            given[key] = value
        del words[0]
    return given, rest


def meet_peers(flags, t):
    """Join the other processes of this run. Those of a TPU find each other, all others are told by flags."""
    named = [flags[key] for key in ("coordinator", "processes", "process") if key in flags]
    if named:
        if len(named) < 3 or not (named[1] + named[2]).isdecimal() or not int(named[2]) < int(named[1]):
            raise ConfigError(f"--coordinator=HOST:PORT --processes=N --process=I: expected all three, I below N, "
                              f"found {' '.join(named)!r}")
        jax.config.update("jax_num_cpu_devices", max(1, t.devices // int(named[1])))
        jax.distributed.initialize(named[0], int(named[1]), int(named[2]),
                                   heartbeat_timeout_seconds=t.heartbeat_seconds)
        jax.devices()               # so that make_mesh takes these, and does not ask for its own
    elif glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*") and importlib.util.find_spec("libtpu"):
        jax.distributed.initialize(heartbeat_timeout_seconds=t.heartbeat_seconds)


# README.md says what to do about each, tests/test_faults.py brings each about
EXIT_CODES = {ConfigError: 2, data.DataError: 2, Halted: 3, Unsound: 4, TryAgain: 75, OSError: 75}


def complain(line):
    """Print the one line that says why. If stderr lies on the disk that is full, the exit code still says it."""
    with contextlib.suppress(OSError):
        print(f"train.py: {line}", file=sys.stderr, flush=True)


def main(arguments):
    """Returns the exit code: 0 is done, or saved on a signal; all others come with one line that says why."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(describe_keys())
        return 0
    try:
        flags, overrides = split_flags(arguments[1:])
        if "compile" in flags and "plan" not in flags:
            raise ConfigError("--compile: expected together with --plan, found it alone; it would train")
        c, t = load_config(arguments[0], overrides)
        if "plan" in flags:
            return show_plan(c, t, "compile" in flags)
        if "replay" in flags:
            replay(c, t, flags["replay"])
            return 0
        meet_peers(flags, t)
        (sample_from if "sample" in flags else train)(c, t)
        return 0
    except tuple(EXIT_CODES) as error:
        complain(one_line(error) if isinstance(error, OSError) else error)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        complain(f"a peer is lost, or the network: {one_line(error)}")
        return 75
    except KeyboardInterrupt:
        complain("interrupted; what was saved is there, and the same command goes on")
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as ctrl-C, where stop_signals does not rule
    code = main(sys.argv[1:])
    if code:                    # a goodbye would wait for peers that wait for this process, or for threads of a
        with contextlib.suppress(OSError):      # failed write, and let them speak after the line that counts
            sys.stdout.flush()
        os._exit(code)
