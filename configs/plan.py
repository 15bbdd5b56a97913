"""What a run costs on hardware that is not here: memory, traffic and time, by arithmetic or by compiling.

Run:  python train.py CONFIG --plan [--compile] [--key=value ...]       (or python configs/plan.py CONFIG ...)

--plan is arithmetic on the weight table: seconds, on any machine. --compile asks the real TPU compiler, which
needs libtpu (pip install "jax[tpu]") and no TPU; tests/hlo.py reads what it made. Both read the config key
`topology`.
A plan is a lower bound of time and memory, and says what it assumes; TPUs and single GPU nodes.
Read: traffic, plan, show_plan, compile_layout; layout.py has the network and the search."""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as Spec

import kernels
import model
import train
from configs import launch, layout
from tests import hlo
from train import MESH

GIB = 2**30


class Chip(NamedTuple):
    kinds: tuple            # what jax calls the device
    flops: float            # dense bfloat16 FLOPs a second
    memory: float           # bytes of its memory
    bandwidth: float        # bytes a second of that memory
    link: float             # bytes a second, one direction of one ICI link (a torus axis has two);
                            # of a GPU: to all others of its node, NVLink through a switch or PCIe
    outside: float = 0.0    # bytes a second to other slices, over the data center's network
    compiler: dict = {}     # what libtpu must know besides the shape
    tf32: float = 0.0       # FLOPs a second of float32 products as XLA makes them on a GPU: TF32


# [cited: Google's and NVIDIA's data sheets, dense rates, half of what is printed "with sparsity";
# "How to scale your model" for the networks; NVIDIA's Ada white paper for the RTX 4090]
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1.228e12, 45e9, 6.25e9,
               {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 0.819e12, 45e9, 3.125e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 2.765e12, 90e9, 6.25e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * 2**30, 1.640e12, 90e9, 12.5e9),
    "a100": Chip(("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, 2.039e12, 300e9, tf32=156e12),
    "a100_40gb": Chip(("NVIDIA A100-SXM4-40GB",), 312e12, 40e9, 1.555e12, 300e9, tf32=156e12),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3.35e12, 450e9, tf32=494e12),
    "h100_pcie": Chip(("NVIDIA H100 PCIe",), 756e12, 80e9, 2.0e12, 64e9, tf32=378e12),
    "h100_nvl": Chip(("NVIDIA H100 NVL",), 835e12, 94e9, 3.9e12, 64e9, tf32=417e12),
    "gh200": Chip(("NVIDIA GH200 480GB",), 990e12, 96e9, 4.0e12, 450e9, tf32=495e12),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 4.8e12, 450e9, tf32=494e12),
    "b200": Chip(("NVIDIA B200",), 2250e12, 180e9, 7.7e12, 900e9, tf32=1125e12),
    "rtx4090": Chip(("NVIDIA GeForce RTX 4090",), 165.2e12, 24 * 2**30, 1.008e12, 32e9, tf32=82.6e12),
}
# {(kind, compute_dtype): FLOPs a second}. A TPU's rate for float32 hangs on its precision: not here
PEAK_FLOPS = {(kind, dtype): flops for chip in CHIPS.values() for kind in chip.kinds
              for dtype, flops in (("bfloat16", chip.flops), ("float32", chip.tf32)) if flops}
NODE = 8                # GPUs that one node has at most; networks between nodes are not modeled
# MFU of mixtures of experts that is reached elsewhere: 14 to 17 % by Marin's 129B, 21.5 % by its
# 67B, both on TPU v4 [cited: marin #4697, #6044]
REACHED = 0.20
TOKENIZED = 1.5e6       # bytes of text that a core turns into tokens in a second [measured: data.py prepare, 2 cores]


def is_gpu(name):
    return not name.startswith("v")


def platform_of(name):
    return "cpu" if name == "cpu" else "gpu" if is_gpu(name) else "tpu"


@functools.cache
def at_hand(advice):
    """The topology of this machine: its GPUs, its TPU, or its CPU, whose rate of products is measured."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                               text=True, timeout=20, check=True).stdout.splitlines()
        names = [name.strip() for name in names if name.strip() and not name.startswith("No devices")]
        if names:
            known = [key for key, chip in CHIPS.items() if names[0] in chip.kinds]
            if not known:
                train.refuse("topology", "a chip in the table of configs/plan.py", names[0], advice)
            return f"{known[0]}:{len(names)}"
    if word := os.environ.get("TPU_ACCELERATOR_TYPE"):
        return word
    if importlib.util.find_spec("libtpu") and any(Path("/dev").glob("accel[0-9]*")):
        train.refuse("topology", "the shape of this TPU's slice", "none", advice)
    a, seconds = np.ones((1024, 1024), np.float32), []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    rate, memory = 2 * 1024**3 / min(seconds), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    CHIPS["cpu"] = Chip(("cpu",), rate, float(memory), 10e9, 10e9, tf32=rate)
    return "cpu:1"


def parse_topology(t):
    """(slices, chip name, (x, y, z) of one slice) of `topology`: "2xv5p:8x8x8" is two slices, and
    "v4-2048", Google's name, is "v4:8x8x16"."""
    word, examples = t.topology, "--topology=h100:8, v6e:2x4, v4:8x8x16 (or v4-2048) or 2xv5p:8x8x8"
    word = word or at_hand(f"add {examples}")
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*)(:|-)(\d+(?:x\d+)*)", word)
    if found and (found[2] == "v5litepod" or found[3] == "-" and found[2] in {"v5e", *launch.KINDS}):
        try:
            word = "{0}x{2}".format(*launch.read_type(word))
        except argparse.ArgumentTypeError as error:
            raise train.ConfigError(f"topology: {error}") from None
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+?):([1-9]\d*(?:x[1-9]\d*)*)", word)
    if not match or match[2] not in CHIPS:
        train.refuse("topology", f"one such as {examples}, of the chips {', '.join(CHIPS)}", repr(word))
    slices, name, shape = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
    if is_gpu(name) and (slices > 1 or len(shape) > 1 or shape[0] > NODE):
        train.refuse("topology", f"{name}:1 to {name}:{NODE}, the GPUs of one node", repr(word),
                     "networks between GPU nodes are not modeled")
    return slices, name, shape


@functools.cache
def weight_classes(c):
    """{(kind of weight, whether layers have it, mesh axes that split it, the order of its gathers): elements}."""
    sums = collections.defaultdict(int)

    def add(path, w):
        kind = "experts" if w.group == "expert" else "other weights"
        split = frozenset(jax.tree.leaves(tuple(w.spec)))
        sums[kind, path.startswith("layers/"), split, tuple(axis for _, axis in w.gathers())] += math.prod(w.shape)
    model.map_params(add, c)
    return dict(sums)


def traffic(c, t, size):
    """Bytes that each chip receives in a step, {(mesh axis, what): bytes}. size: {mesh axis: length}.

    Per microbatch: a split weight is gathered forward, and again backward under remat; its gradient is
    reduce-scattered in float32. Once a step: gradients are all-reduced over the axes that copy their weight. Tokens
    go to experts and back, in both directions of differentiation, and there once more under remat."""
    width, again, received = jnp.dtype(c.compute_dtype).itemsize, c.remat != "none", collections.defaultdict(float)
    for (kind, layered, split, gathers), elements in weight_classes(c).items():
        for axis in split - set(gathers):
            elements /= size[axis]
        for axis in reversed(gathers):
            moved = t.accumulate * elements * (1 - 1 / size[axis])
            received[axis, f"{kind}, gathered"] += (1 + (again and layered)) * width * moved
            received[axis, f"{kind}, gradients"] += 4 * moved
            elements /= size[axis]
        for axis in set(MESH) - split:
            received[axis, "gradients of copies"] += 8 * elements * (1 - 1 / size[axis])
    P = size["expert"]
    if c.num_experts and P > 1:
        tokens = t.batch_size * c.seq_len / math.prod(size.values())    # a chip's, all microbatches
        copies, row = P - 1, (4 + again) * c.hidden_dim * width
        if c.exchange == "ragged":      # with a row goes its weight: one number, 128 lanes on a TPU
            copies = (P - 1) / P * c.experts_per_token * min(1, c.capacity_factor)
            row += 2 * 4 * 128
        received["expert", f"tokens, by {c.exchange}"] += c.num_layers * tokens * copies * row
    return {key: amount for key, amount in received.items() if amount}


def muon_groups(t):
    return tuple(group for group, rule in train.GROUPS[t.optimizer].items() if rule == "muonh")


def seen(c, full):
    """The share of a layer's blocks of 1,024 x 1,024 scores that the kernel computes: a causal band."""
    n = max(1, c.seq_len // 1024)
    width = n if full else min(n, (c.window or c.seq_len // 2) // 1024 + 1)
    return sum(min(i + 1, width) for i in range(n)) / n**2


@functools.cache
def executed_flops(c, muon, tokens, parts, platform="tpu"):
    """FLOPs of products and kernels that a step executes a token; tests/hlo.py counts them in the traced program.

    A layer's products once forward, twice backward, and once more under remat, but for the last products of experts
    and shared expert, which no gradient needs, and with "attended" that of attention. Scores: 2 products forward, 7
    backward. The head's logits are computed again. muon: Newton-Schulz, 5 times 3 products a matrix. tokens: of a
    step, parts: (devices x microbatches, devices that share experts). Every expert may fill one tile of rows more."""
    D, N, M, H, Z, again = c.hidden_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.shared_dim, c.remat != "none"
    wide = c.expert_dim + (-c.expert_dim % 256 if c.expert_dim % 128 else 0)
    rows, assigned = 0.0, tokens // parts[0] * c.experts_per_token
    if assigned:
        each = c.num_experts // parts[1]
        tile = kernels.row_tile(kernels.BEST[platform][1], assigned, each)
        rows = c.experts_per_token * ((c.capacity_factor or 1.0) + each * tile / assigned)
    last = 2 * D * (wide * rows + Z) + (2 * N * H * D if c.remat == "attended" else 0)
    products = 2 * D * H * (2 * N + 2 * M) + 6 * D * (wide * rows + Z) + 2 * D * (c.num_experts + N) \
        + 8 * D * c.gated_norm_rank
    flops = c.num_layers * (3 * products + again * (products - last)) + 8 * D * c.vocab_size
    for i in range(c.num_layers):
        flops += (2 * (1 + again) + 7) * 2 * c.seq_len * N * H * seen(c, model.sees_all(c, i))
    if muon:
        def newton_schulz(_, w):
            if w.group not in muon:
                return 0
            m, n = sorted(w.shape[-2:])
            return math.prod(w.shape[:-2]) * 10 * (2 * m * m * n + m**3)
        flops += sum(jax.tree.leaves(model.map_params(newton_schulz, c))) / tokens
    return flops


def product_seconds(c, t, machine):
    """Seconds of a step's products at the peak of its chips: by the model's own count, and as executed. machine:
    (slices, name, shape), as parse_topology gives it."""
    slices, name, shape = machine
    chip, chips, tokens = CHIPS[name], slices * math.prod(shape), t.batch_size * c.seq_len
    peak = chip.tf32 if is_gpu(name) and c.compute_dtype == "float32" else chip.flops
    executed = executed_flops(c, muon_groups(t), tokens, (chips * t.accumulate, t.expert_parallel), platform_of(name))
    each = tokens / chips / (t.peak_flops or peak)
    return each * model.count(c).mfu_flops, each * executed


def states_kept(c):
    """How many hidden states of each layer the forward pass keeps."""
    return ("none", "block", "attended").index(c.remat)


def plan(c, t):
    """The cost of a run on its `topology`, as a dict of numbers; see show_plan for words and units."""
    slices, name, shape = parse_topology(t)
    chip, chips = CHIPS[name], slices * math.prod(shape)
    if reason := train.mesh_error(c, t, chips) or kernels.misfit(platform_of(name), c):
        raise train.ConfigError(reason)
    if train.mesh_shape(t, chips)["replica"] % slices:
        train.refuse("replicas", f"a multiple of the {slices} slices", t.replicas or chips)
    size, tokens = train.mesh_shape(t, chips), t.batch_size * c.seq_len
    mesh = AbstractMesh(tuple(size.values()), MESH, axis_types=(AxisType.Auto,) * 3)
    state = train.abstract_state(c, t, mesh)

    def bytes_held(tree):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                   for x in jax.tree.leaves(tree))

    weights = bytes_held(state.params)
    inputs = states_kept(c) * c.num_layers * tokens / t.accumulate / chips * c.hidden_dim
    received, gpu = traffic(c, t, size), is_gpu(name)
    seconds = dict.fromkeys((axis for axis in MESH if size[axis] > 1), 0.0)
    rates = layout.network(name, chip, slices, shape, size, t.expert_block)
    seconds |= layout.seconds(received, rates)
    ideal, executed = product_seconds(c, t, (slices, name, shape))
    bounds = {"overlapped": max(executed, *seconds.values(), 0.0),
              "one after the other": executed + sum(seconds.values())}
    if seconds and not gpu:
        bounds[layout.ONE_RING] = executed + sum(layout.seconds(received, rates, ring=True).values())
    if not seconds:
        bounds = {"one chip": executed}
    reached = min(REACHED, ideal / max(bounds.values()))
    return {"chips": chips, "mesh": size, "tokens_per_step": tokens, "tokens": tokens * t.steps,
            "count": model.count(c), "received": received, "seconds": seconds, "ideal": ideal,
            "memory": {"weights": weights, "moments": bytes_held(state.opt),
                       "gradients": weights * (2 if t.accumulate > 1 else 1),
                       "layer inputs": inputs * jnp.dtype(c.compute_dtype).itemsize},
            "dropped": layout.expected_drop(c, size["expert"], tokens // chips // t.accumulate),
            "reached": reached, "executed": executed, "step": bounds,
            "checkpoint": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)),
            "mfu": {how: ideal / bound for how, bound in bounds.items()}}


def short(x, unit=1.0):
    """A number in words: two decimals, or two digits if it is small."""
    x = x / unit
    return f"{x:,.2f}" if x >= 0.1 or not x else f"{x:.2g}"


def show_plan(c, t, compile_too=False, mfu=None):
    """--plan: print `plan`, in seconds, on any machine; --compile: then compile. mfu: what the user hopes for. The
    exit code."""
    if mfu is not None and not 0 < mfu <= 1:
        train.refuse("--mfu", "a share of the peak such as 0.3", mfu)
    jax.config.update("jax_platforms", "cpu")       # a TPU that is here has no part in this
    p, (_, name, _) = plan(c, t), parse_topology(t)
    check_kernels(c, name)
    chip, n, least = CHIPS[name], p["count"], sum(p["memory"].values())
    print(f"model     {short(n.total, 1e9)} B parameters, {short(n.active, 1e9)} B active; "
          f"{short(n.flops_per_token, 1e9)} GFLOP a token, {short(n.mfu_flops, 1e9)} with the head (MFU)")
    print(f"run       {t.steps:,} steps x {p['tokens_per_step']:,} tokens = {p['tokens']:.3e} tokens, "
          f"{n.flops_per_token * p['tokens']:.2e} FLOP")
    print(f"machine   {p['chips']:,} x {name} ({t.topology or 'at hand'}): "
          + " x ".join(f"{axis} {length}" for axis, length in p["mesh"].items())
          + f"; {p['tokens_per_step'] // p['chips']:,} tokens a chip and step, accumulate {t.accumulate}")
    print(f"memory    {least / GIB:.2f} of {chip.memory / GIB:.0f} GiB a chip, "
          + " + ".join(f"{what} {amount / GIB:.2f}" for what, amount in p["memory"].items())
          + "; and a layer at work (--compile)")
    for (axis, what), amount in p["received"].items():
        print(f"traffic   {axis:8s} {what:28s} {short(amount, 1e9):>9s} GB a step and chip")
    print(f"time      {short(p['ideal'])} s of model FLOPs at the peak, {short(p['executed'])} s with "
          f"recomputation" + "".join(f", {axis} {short(s)} s" for axis, s in p["seconds"].items()))
    rows = [("bound", how, seconds, p["mfu"][how]) for how, seconds in p["step"].items()]
    rows.append(("likely", "at the MFU of others", p["ideal"] / p["reached"], p["reached"]))
    if mfu:
        rows[-1] = "asked", "at the MFU you name", p["ideal"] / mfu, mfu
    for what, how, seconds, mfu in rows:
        hours = seconds * t.steps / 3600
        print(f"{what:9s} {how:22s} {short(seconds):>6s} s a step, MFU {100 * mfu:.1f} %, "
              f"{short(hours)} hours, {short(hours * p['chips'])} chip-hours")
    width = 2 if c.vocab_size <= 65536 else 4
    kept = t.keep + (t.steps // t.keep_every if t.keep_every else 0)
    print(f"data      {short(p['tokens'] * width, 1e9)} GB of shards ({width} bytes a token) on every host "
          "if no token comes twice, and the text that they are made of")
    text = p["tokens"] * (1 if t.tokenizer == "bytes" else 4)
    print(f"tokens    {short(text / TOKENIZED / 3600)} core-hours to make them of {short(text, 1e9)} GB of text, at "
          f"{TOKENIZED / 1e6:g} MB a second and core [measured] and 4 bytes a token [assumed]")
    if c.num_experts and p["mesh"]["expert"] > 1:
        print(f"balance   {c.num_experts // p['mesh']['expert']} experts a shard, capacity {c.capacity_factor:g}: "
              f"{100 * p['dropped']:.2f} % of the assignments dropped [expected]")
    print(f"saves     {short(p['checkpoint'], 1e9)} GB a checkpoint (weights and optimizer), "
          f"{short(p['checkpoint'] * kept, 1e9)} GB for the {kept} that are kept")
    how = "TF32" if is_gpu(name) else "one bfloat16 pass (XLA's default)"
    how = "full" if name == "cpu" else how
    how = "bfloat16" if c.compute_dtype == "bfloat16" else f"float32 in {how}"
    print(f"assumes   products in {how} and links at the rates of the data sheets; no time for text, "
          "evaluation, checkpoints and restarts")
    fit = "state and layer inputs fit"
    if least > chip.memory:
        fit = (f"does not fit: {(least - chip.memory) / GIB:.1f} GiB too much. Try more chips, a larger "
               f"--accumulate or --remat=block")
    print(f"verdict   {fit}")
    return compile_layout(c, t)[0] if compile_too else 0


def check_kernels(c, name):
    """ConfigError if a kernel cannot take the model's sizes: one layer, traced without data."""
    one, shape = dataclasses.replace(c, num_layers=1), jax.ShapeDtypeStruct
    batch = dict.fromkeys(("tokens", "targets", "segments"), shape((1, c.seq_len), jnp.int32))
    batch["weights"] = shape((1, c.seq_len), jnp.float32)

    def loss(params, batch):
        bias_LE = jnp.zeros((1, c.num_experts))
        return model.loss(params, bias_LE, batch, {"weight": 1.0, "tokens": 1}, one, platform="tpu")
    try:
        if not is_gpu(name):                # a GPU runs plain XLA where no kernel fits
            jax.eval_shape(loss, jax.eval_shape(lambda: model.init(one, jax.random.key(0))), batch)
    except ValueError as error:
        raise train.ConfigError(f"no kernel of {name} takes these sizes: {error}; seq_len, and wide "
                                "hidden_dim and expert_dim, must be multiples of 128") from None


def compile_layout(c, t):
    """Trace the train step and compile it for `topology` by libtpu, without a TPU. Print memory, traffic, bounds and
    a verdict (tests/hlo.py). Returns (the exit code, what compile_best prints or None if it does not fit)."""
    slices, name, shape = parse_topology(t)
    if is_gpu(name):
        train.refuse("topology", "a TPU to compile for", repr(t.topology), "on a GPU run the config there")
    from jax.experimental import topologies
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"              # libtpu must not look for a TPU, nor
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"      # lock the one that two compilations do not share
    told = CHIPS[name].compiler | ({"num_slices": slices} if slices > 1 else {})
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{'x'.join(map(str, shape))}", **told)
    except Exception as error:
        raise train.ConfigError(f"topology: {t.topology!r} cannot be compiled for ({train.one_line(error)}); it "
                          f"takes: pip install 'jax[tpu]'") from None
    mesh, began = train.make_mesh(c, t, described.devices), time.time()
    place = NamedSharding(mesh, Spec(None, MESH))
    whole = jax.ShapeDtypeStruct((t.accumulate, t.batch_size // t.accumulate, c.seq_len), jnp.int32,
                                 sharding=place)
    batch = dict.fromkeys(("tokens", "targets", "segments"), whole)
    batch["weights"] = whole.update(dtype=jnp.float32)
    try:
        traced = train.make_train_step(c, t, mesh).trace(train.abstract_state(c, t, mesh), batch)
    except ValueError as error:             # a kernel that cannot take these sizes
        raise train.ConfigError(f"no kernel of {name} takes this step: {error}") from None
    model_flops = model.count(c).mfu_flops * t.batch_size * c.seq_len / mesh.size
    executed = hlo.traced_flops(traced.jaxpr.jaxpr, mesh.size) / model_flops
    print(f"traced    in {time.time() - began:.0f} s; executes {executed:.2f} x the model's FLOPs "
          f"(matmuls and kernels of the traced program, loops times their length)", flush=True)
    planned, chip = sum(traffic(c, t, mesh.shape).values()), CHIPS[name]
    code, used, blob = hlo.compile_and_report(traced, mesh, chip.memory, planned)
    if blob is None:
        return code, None
    ideal, size = model_flops / (t.peak_flops or chip.flops), dict(mesh.shape)
    rates = layout.network(name, chip, slices, shape, size, t.expert_block)
    found, mfu = hlo.collectives(blob, size), {}
    for how, ring in (("one after the other", False), (layout.ONE_RING, True)):
        spent = sum(x.times * layout.collective_seconds(x, rates, ring) for x in found)
        mfu[how] = ideal / (executed * ideal + spent)
    line = hlo.Timeline(blob, size, lambda x: layout.collective_seconds(x, rates), chip.flops)
    apart = line.computed + sum(x.times * layout.collective_seconds(x, rates) for x in found)
    # kernels that give no FLOPs are not in the timeline: only what it hides is taken from it
    mfu["as scheduled"] = ideal / (ideal / mfu["one after the other"] - max(0.0, apart - line.total))
    for how, share in mfu.items():
        print(f"bound     {how:22s} {ideal / share:6.2f} s a step, MFU {100 * share:.1f} %, of the compiled program")
    return code, {"memory": used, "executed": executed, "mfu": mfu}


if __name__ == "__main__":
    sys.exit(train.main([*sys.argv[1:], "--plan"]))
