"""All there is to measure on one GPU, in one command of at most 8 minutes: a table, and a JSON.

Run:  python tests/gpu.py --prepare                     beforehand, with a network: the text for b and e (out/gpu_data)
      python tests/gpu.py --out=DIR --minutes=8         on the card: the table, DIR/gpu.json after every row
      python tests/gpu.py --parts=c,d --only=c:triton   some parts; of c only the cases whose name holds a word
      python tests/gpu.py --dry                         every part with tiny sizes on a CPU
Read: SIZES -> the parts a to e, each a table of cases -> worker -> main.

Parts: a  every implementation against its plain twin        b  smoke.py for 100 steps against the CPU's losses
       c  grouped matmul and the expert layer                d  attention and the loss
       e  gpu_h200.py for 30 steps, beside the PyTorch twin
Every part runs in processes of its own. A case that fails, hangs or kills its process becomes a row that says
so, and the next case goes on. Parts run from the most valuable down; what no longer fits is named.

B batch  S sequence  N query heads  M key/value heads  H head dim  T tokens  D hidden  F expert width  E experts
R rows, sorted by expert  V vocabulary"""
import argparse
import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
DATA = ROOT / "out" / "gpu_data"
PEAK = 989e12       # bfloat16 FLOP/s of an H100 or H200, SXM, dense [cited: NVIDIA H100 data sheet]

SIZES = {
    "card": dict(T=32_768, D=2048, F=1024, E=64, K=4, B=4, S=4096, N=16, M=4, H=128, window=2048, document=1024,
                 V=32_768, head_D=1024, rows=8, micro=4, steps=30, peer_rows=4, smoke=100),
    "dry": dict(T=256, D=64, F=32, E=4, K=2, B=2, S=64, N=4, M=2, H=16, window=32, document=20,
                V=512, head_D=32, rows=1, micro=1, steps=2, peer_rows=1, smoke=2)}


# ------------------------------------------------------------------------------------------------- stopwatches

def median_seconds(run, wait, least=0.05, batches=5):
    """Seconds of one run(): the median of some batches, each of as many runs as fill `least` seconds."""
    wait(run())
    wait(run())
    start = time.perf_counter()
    wait(run())
    count = max(1, min(50, math.ceil(least / (time.perf_counter() - start))))
    seconds = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(count):
            last = run()
        wait(last)
        seconds.append((time.perf_counter() - start) / count)
    return statistics.median(seconds)


def compiled(f, *args, options=None):
    """f, compiled for arguments like these. options: compiler options."""
    import jax
    return jax.jit(f).lower(*args).compile(compiler_options=options)


def time_jax(f, *args):
    """Milliseconds of f(*args); f is compiled first, unless it already is."""
    import jax
    run = f if isinstance(f, jax.stages.Compiled) else compiled(f, *args)
    return 1e3 * median_seconds(lambda: run(*args), jax.block_until_ready)


def time_torch(f):
    import torch
    wait = (lambda _: torch.cuda.synchronize()) if torch.cuda.is_available() else (lambda _: None)
    return 1e3 * median_seconds(f, wait)


def forward_backward(f):
    """(cotangent, *args) -> (value, gradients of args)."""
    import jax
    def run(g, *args):
        y, pull = jax.vjp(f, *args)
        return y, pull(g)
    return run


# ------------------------------------------------------------------------------------ c: rows sorted by expert

def loads(s, seed=0):
    """Rows of each expert, multiples of 16 that sum to T*K: the largest about half above the mean."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.5, 1.5, s["E"])
    total = s["T"] * s["K"] // 16
    load = np.maximum(1, np.floor(share / share.sum() * total)).astype(int)
    load[0] += total - load.sum()
    return load * 16


def layout(load, tile):
    """(R, tile_expert, the first row of each expert), as moe.dispatch lays them out."""
    tiles = np.maximum(1, -(-load // tile))
    total = int(load.sum()) // tile + len(load)
    owner = np.repeat(np.arange(len(load) + 1), [*tiles, total - tiles.sum()])
    return total * tile, owner.astype(np.int32), (np.cumsum(tiles) - tiles) * tile


def expert_inputs(s, tile, dtype, seed=0):
    """x [R,D] with zero rows of padding, w [E,D,F], the cotangent g [R,F], tile_expert, the rows that are real."""
    import jax
    import jax.numpy as jnp
    load = loads(s)
    R, owner, first = layout(load, tile)
    real = np.zeros(R, bool)
    for start, rows in zip(first, load):
        real[start:start + rows] = True
    keys = jax.random.split(jax.random.key(seed), 3)
    mask = jnp.asarray(real)[:, None]
    x = jnp.where(mask, jax.random.normal(keys[0], (R, s["D"]), dtype), 0)
    g = jnp.where(mask, jax.random.normal(keys[1], (R, s["F"]), dtype), 0)
    w = jax.random.normal(keys[2], (s["E"], s["D"], s["F"]), dtype) * s["D"] ** -0.5
    return x, w, g, jnp.asarray(owner), first, load


def relative(got, want):
    """The largest difference over the largest value."""
    import jax.numpy as jnp
    got, want = (a.astype(jnp.float32) for a in (got, want))
    return float(jnp.max(jnp.abs(got - want)) / jnp.maximum(jnp.max(jnp.abs(want)), 1e-30))


def product_case(s, impl, tile, options=None, **blocks):
    """One grouped matmul, forward and backward, and its error at the first and the last expert."""
    import jax.numpy as jnp
    import kernels
    tune(impl, blocks)
    x, w, g, owner, first, load = expert_inputs(s, tile, jnp.bfloat16)
    f = lambda x, w: kernels.grouped_matmul(x, w, owner, impl, platform())
    both = compiled(forward_backward(f), g, x, w, options=options)
    y, (dx, dw) = both(g, x, w)
    worst = 0.0
    for e in (0, s["E"] - 1):
        rows = slice(int(first[e]), int(first[e] + load[e]))
        a, b, c = (m.astype(jnp.float32) for m in (x[rows], w[e], g[rows]))
        exact = lambda p, q: jnp.dot(p, q, precision="highest")
        errors = (relative(y[rows], exact(a, b)), relative(dx[rows], exact(c, b.T)), relative(dw[e], exact(a.T, c)))
        worst = max(worst, *(math.inf if math.isnan(error) else error for error in errors))
    del y, dx, dw
    useful = 2 * s["T"] * s["K"] * s["D"] * s["F"]
    ms, forward_ms = time_jax(both, g, x, w), time_jax(compiled(f, x, w, options=options), x, w)
    return dict(ms=ms, forward_ms=forward_ms, tflops=3 * useful / ms / 1e9, error=worst, rows=int(x.shape[0]))


def plain_case(s):
    """One plain matmul of as many FLOPs."""
    import jax
    import jax.numpy as jnp
    x = jax.random.normal(jax.random.key(0), (s["T"] * s["K"], s["D"]), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (s["D"], s["F"]), jnp.bfloat16)
    g = jax.random.normal(jax.random.key(2), (s["T"] * s["K"], s["F"]), jnp.bfloat16)
    ms = time_jax(forward_backward(jnp.dot), g, x, w)
    return dict(ms=ms, forward_ms=time_jax(jnp.dot, x, w), tflops=6 * x.size * s["F"] / ms / 1e9)


def layer_case(s, impl, tile, **blocks):
    """The whole SwiGLU of the experts, forward and backward."""
    import jax
    import jax.numpy as jnp
    import kernels
    tune(impl, blocks)
    x, gate, _, owner, *_ = expert_inputs(s, tile, jnp.bfloat16)
    up = jax.random.normal(jax.random.key(7), gate.shape, gate.dtype) * s["D"] ** -0.5
    down = jax.random.normal(jax.random.key(8), (s["E"], s["F"], s["D"]), gate.dtype) * s["F"] ** -0.5
    f = lambda x, gate, up, down: kernels.expert_mlp(x, gate, up, down, owner, impl, platform())
    ms = time_jax(forward_backward(f), x, x, gate, up, down)
    return dict(ms=ms, tflops=18 * s["T"] * s["K"] * s["D"] * s["F"] / ms / 1e9)


def tune(impl, blocks):
    """Set the block sizes of a candidate in configs/hopper.py; what `blocks` does not name is as it was there."""
    from configs import hopper
    for table, prefix in (hopper.TRITON, ""), (hopper.MGPU_ROWS, ""), (hopper.MGPU_OUTER, "outer_"):
        first = FIRST.setdefault(id(table), dict(table))
        table.update(first)
        table.update({name: blocks[prefix + name] for name in first if prefix + name in blocks})


FIRST = {}          # the block sizes as configs/hopper.py has them


def cases_c(s):
    import kernels
    rows = s["T"] * s["K"]
    default = kernels.BEST["gpu"][1]
    product = lambda impl, tile=128, **more: functools.partial(product_case, s, impl, tile, **more)
    layer = lambda impl, tile=128, **more: functools.partial(layer_case, s, impl, tile, **more)
    wide = dict(rows=128, columns=256, depth=64, warps=8, stages=3)
    cases = {
        "plain matmul": functools.partial(plain_case, s),
        f"default ({default})": product(default, kernels.row_tile(default, rows, s["E"])),
        "hopper": product("hopper"),
        "layer hopper": layer("hopper"),
        "triton 128x128 s3": product("triton", rows=128, columns=128, depth=64, warps=8, stages=3),
        "triton 128x128 w4 s4": product("triton", rows=128, columns=128, depth=64, warps=4, stages=4),
        "triton 128x256 s3": product("triton", **wide),
        "mgpu 128x128 s4": product("mgpu"),
        "mgpu 128x128 s6": product("mgpu", max_concurrent_steps=6, outer_max_concurrent_steps=6,
                                   grid_block_n=2, outer_grid_block_n=2),
        "mgpu 64x256 s4": product("mgpu", block_m=64, block_n=256, grid_block_n=4, outer_block_k=128,
                                   outer_max_concurrent_steps=2),
        "layer default": layer(default, kernels.row_tile(default, rows, s["E"])),
        "layer triton 128x128": layer("triton", rows=128, columns=128, depth=64, warps=8, stages=3),
        "layer mgpu": layer("mgpu"),
        "tiles of 128": product("tiles", 128),
        "tiles of 256": product("tiles", 256),
    }
    if dry():                                   # its interpreter needs minutes; tests/test_gpu.py has a case
        cases = {name: case for name, case in cases.items() if "hopper" not in name}
    return cases


def cases_c_torch(s):
    import torch
    import torch.nn.functional as F
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    grouped = getattr(F, "grouped_mm", None)
    grouped = (lambda x, w, ends: F.grouped_mm(x, w, offs=ends)) if grouped else torch._grouped_mm
    useful = 2 * s["T"] * s["K"] * s["D"] * s["F"]

    def timed(f, inputs, factor):
        for tensor in inputs:
            tensor.requires_grad_(True)
        g = torch.ones_like(f())
        def both():
            for tensor in inputs:
                tensor.grad = None
            y = f()
            y.backward(g)
            return y
        with torch.no_grad():
            ms_forward = time_torch(f)
        ms = time_torch(both)
        return dict(ms=ms, forward_ms=ms_forward, tflops=3 * factor * useful / ms / 1e9)

    def product():
        x, w = make(s["T"] * s["K"], s["D"]), make(s["E"], s["D"], s["F"])
        ends = torch.tensor(np.cumsum(loads(s)), device=device, dtype=torch.int32)
        return timed(lambda: grouped(x, w, ends), [x, w], 1)

    def layer():
        x, gate, up = make(s["T"] * s["K"], s["D"]), make(s["E"], s["D"], s["F"]), make(s["E"], s["D"], s["F"])
        down = make(s["E"], s["F"], s["D"])
        ends = torch.tensor(np.cumsum(loads(s)), device=device, dtype=torch.int32)
        f = lambda: grouped(F.silu(grouped(x, gate, ends)) * grouped(x, up, ends), down, ends)
        return timed(f, [x, gate, up, down], 3)

    def plain():
        x, w = make(s["T"] * s["K"], s["D"]), make(s["D"], s["F"])
        return timed(lambda: x @ w, [x, w], 1)

    return {"torch grouped_mm": product, "layer torch grouped_mm": layer, "torch plain matmul": plain}


# -------------------------------------------------------------------------------------- d: attention, the loss

def documents(s, seed=0):
    """Segment ids [B,S]: documents of s["document"] tokens on average."""
    begins = np.random.default_rng(seed).random((s["B"], s["S"])) < 1 / s["document"]
    return (1 + np.cumsum(begins, axis=1)).astype(np.int32)


def seen_pairs(s, window):
    """Pairs of a query and a key in all rows that causality and the window let through, documents aside."""
    return s["B"] * sum(min(i + 1, window) for i in range(s["S"]))


TRUTH = {}          # what several cases are compared with, computed once in a worker


def attention_case(s, attend, window):
    import jax
    import jax.numpy as jnp
    import kernels
    shape = lambda heads: (s["B"], s["S"], heads, s["H"])
    keys = jax.random.split(jax.random.key(0), 4)
    q, g = (jax.random.normal(key, shape(s["N"]), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, shape(s["M"]), jnp.bfloat16) for key in keys[2:])
    segment = jnp.asarray(documents(s))
    f = lambda q, k, v: attend(q, k, v, segment, window)
    if window not in TRUTH:                     # of the first row, in float32
        exact = lambda q, k, v: kernels.attention(q, k, v, segment[:1], window, "chunked", platform())
        TRUTH[window] = jax.jit(exact)(*(a[:1].astype(jnp.float32) for a in (q, k, v)))
    forward = compiled(f, q, k, v)
    error = relative(forward(q, k, v)[:1], TRUTH[window])
    flops = 12 * seen_pairs(s, window) * s["N"] * s["H"]
    ms = time_jax(forward_backward(f), g, q, k, v)
    return dict(ms=ms, forward_ms=time_jax(forward, q, k, v), tflops=flops / ms / 1e9, error=error)


def loss_case(s, impl):
    import jax
    import jax.numpy as jnp
    import kernels
    x = jax.random.normal(jax.random.key(0), (s["T"], s["head_D"]), jnp.bfloat16)
    head = jax.random.normal(jax.random.key(1), (s["head_D"], s["V"]), jnp.bfloat16) * s["head_D"] ** -0.5
    target = jnp.arange(s["T"]) % s["V"]
    f = lambda x, head: jnp.mean(kernels.cross_entropy(x, head, target, impl)[0])
    ms = time_jax(jax.value_and_grad(f, (0, 1)), x, head)
    return dict(ms=ms, tflops=6 * x.size * s["V"] / ms / 1e9)


def cases_d(s):
    from configs import hopper
    import kernels
    named = lambda impl: lambda q, k, v, seg, window: kernels.attention(q, k, v, seg, window, impl, platform())
    def packed(most):
        return lambda q, k, v, seg, window: hopper.packed_attention(q, k, v, seg, window, "gpu", most)
    def alone(q, k, v, seg, window):            # no documents: what cuDNN would do at best
        import jax
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(window - 1, 0),
                                            implementation="xla" if dry() else "cudnn")
    cases = {}
    for window in (s["S"], s["window"]):
        name = f"window {window}" if window < s["S"] else "full"
        case = functools.partial(attention_case, s)
        cases |= {
            f"{name}: default": functools.partial(case, named(None), window),
            f"{name}: cuDNN, 32 documents packed": functools.partial(case, packed(32), window),
            f"{name}: cuDNN, documents as a mask": functools.partial(case, named("cudnn"), window),
            f"{name}: cuDNN, no documents (wrong)": functools.partial(case, alone, window)}
        if dry():
            cases = {k: v for k, v in cases.items() if "packed" not in k}
    return cases | {f"loss {impl}": functools.partial(loss_case, s, impl)
                    for impl in ("plain", "vocabulary")}


def flex(segment, window, compiled):
    """(q, k, v as [B,heads,S,H]) -> [B,N,S,H] with torch's flex_attention: documents and a window. On a CPU it has no
    backward pass: there, an explicit mask."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    def visible(b, h, i, j):
        return (i >= j) & (i - j < window) & (segment[b, i] == segment[b, j])
    B, S = segment.shape
    if segment.device.type == "cpu":
        i = torch.arange(S)
        near = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < window)
        seen = (near & (segment[:, :, None] == segment[:, None, :]))[:, None]
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    mask = create_block_mask(visible, B, None, S, S, device=segment.device.type)
    attend = torch.compile(flex_attention) if compiled else flex_attention
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True)


def cases_d_torch(s):
    import torch
    import torch.nn.functional as F
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = lambda heads: torch.randn(s["B"], heads, s["S"], s["H"], device=device, dtype=torch.bfloat16)

    def run(attend, window):
        q, k, v = (make(heads).requires_grad_(True) for heads in (s["N"], s["M"], s["M"]))
        g = make(s["N"])
        def both():
            for tensor in (q, k, v):
                tensor.grad = None
            y = attend(q, k, v)
            y.backward(g)
            return y
        with torch.no_grad():
            ms_forward = time_torch(lambda: attend(q, k, v))
        ms = time_torch(both)
        return dict(ms=ms, forward_ms=ms_forward, tflops=12 * seen_pairs(s, window) * s["N"] * s["H"] / ms / 1e9)

    segment = torch.tensor(documents(s), device=device)
    sdpa = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    cases = {}
    for window in (s["S"], s["window"]):
        name = f"window {window}" if window < s["S"] else "full"
        cases[f"{name}: torch flex_attention"] = lambda window=window: run(flex(segment, window, not dry()), window)
    return cases | {"full: torch flash, no documents (wrong)": lambda: run(sdpa, s["S"])}


# ------------------------------------------------------------------------- a: every implementation and its twin

def twin_case(f, impl, args, dtype, group):
    """Errors of value and gradients of f(impl, *args) in `dtype` against "plain" in float32, full precision, from
    the same rounded inputs; and the plain twin's own in `dtype`, which is what rounding alone does."""
    import jax
    import jax.numpy as jnp
    rounded = [a.astype(dtype) for a in args]
    def errors(impl, truth):
        y, grads = jax.jit(lambda *a: run(impl, *a))(*rounded)
        return [relative(y, truth[0]), *(relative(a, b) for a, b in zip(grads, truth[1]))]
    def run(impl, *a):
        def total(*a):
            y = f(impl, *a)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y
        _, pull, y = jax.vjp(total, *a, has_aux=True)
        return y, pull(jnp.float32(1))
    if (group, dtype) not in TRUTH:
        with jax.default_matmul_precision("highest"):
            exact = [a.astype(jnp.float32) for a in rounded]
            truth = jax.jit(lambda *a: run("plain", *a))(*exact)
        TRUTH[group, dtype] = truth, errors("plain", truth)
    truth, rounding = TRUTH[group, dtype]
    got = errors(impl, truth)
    bad = any(math.isnan(e) for e in got) or max(got) > 4 * max(rounding) + (0.01 if dtype == "float32" else 0.03)
    return dict(value=got[0], gradients=max(got[1:]), plain=max(rounding), verdict="WRONG" if bad else "right")


def cases_a(s):
    import jax
    import jax.numpy as jnp
    from configs import hopper
    import kernels
    key = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *shape: jax.random.normal(next(key), shape)
    small = dry()
    B, S, N, M, H, T, D, V = (1, 64, 2, 1, 16, 64, 32, 96) if small else (2, 1024, 4, 2, 64, 2048, 256, 5000)
    E, F, tile = (4, 32, 16) if small else (8, 384, 128)
    segment = jnp.asarray(documents(dict(B=B, S=S, document=S / 5)))
    owner = jnp.asarray([0, 0, 1, 2, 2, 3, E, E] if small else [0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 7, E, E], jnp.int32)
    real = (jnp.repeat(owner, tile) < E)[:, None]
    x = normal(owner.size * tile, D)
    q, k, v = normal(B, S, N, H), normal(B, S, M, H), normal(B, S, M, H)
    target = jnp.arange(T) % V
    gate, up, down = normal(E, D, F) * D**-0.5, normal(E, D, F) * D**-0.5, normal(E, F, D) * F**-0.5

    def attention(window):
        def f(impl, q, k, v):
            if impl.startswith("packed"):       # "packed 2": more documents than the list takes
                return hopper.packed_attention(q, k, v, segment, window, "gpu", 2 if impl.endswith("2") else 32)
            return kernels.attention(q, k, v, segment, window, impl, platform())
        return f

    def loss(impl, x, head):
        return jnp.stack(kernels.cross_entropy(x, head, target, impl, 700))

    def product(impl, x, w):
        return jnp.where(real, kernels.grouped_matmul(jnp.where(real, x, 0), w, owner, impl, platform()), 0)

    def layer(impl, x, gate, up, down):
        y = kernels.expert_mlp(jnp.where(real, x, 0), gate, up, down, owner, impl, platform())
        return jnp.where(real, y, 0)

    wanted = []         # (name, function, arguments, implementation, types, what they share a truth with)
    both, half = ("float32", "bfloat16"), ("bfloat16",)
    for impl, types in ("chunked", both), ("cudnn", half if not small else both), ("packed", () if small else half), \
            ("packed 2", () if small else half):
        wanted += [(f"attention {impl}, window {w}", attention(w), (q, k, v), impl, types, f"attention {w}")
                   for w in (S, S // 4)]
    inputs = normal(T, D), normal(D, V) * D**-0.5
    wanted += [(f"loss {impl}", loss, inputs, impl, both, "loss")
               for impl in ("vocabulary",)]
    for impl, types in ("tiles", both), ("triton", both), ("mgpu", half), ("hopper", half):
        if small and impl == "hopper":
            continue                            # its interpreter needs minutes; tests/test_gpu.py has one case
        widths = (gate, up, down)
        if impl == "hopper":                    # needs multiples of 256
            widths = (normal(E, D, 512) * D**-0.5, normal(E, D, 512) * D**-0.5, normal(E, 512, D) * 512**-0.5)
        wanted += [(f"product {impl}", product, (x, widths[0]), impl, types, f"product {widths[0].shape}"),
                   (f"experts {impl}", layer, (x, *widths), impl, types, f"experts {widths[0].shape}")]

    cases = {f"{name}, {dtype}": functools.partial(twin_case, f, impl, args, dtype, group)
             for name, f, args, impl, types, group in wanted for dtype in types}
    def balancing():
        import balance
        margin, bias = jax.random.normal(jax.random.key(1), (2, 512, 8)), jnp.zeros((2, 8))
        f = lambda device: balance.update("quantile", *(jax.device_put(a, device) for a in (
            margin, jnp.ones(512, bool), bias)), 2)[0]
        right = (np.asarray(f(jax.devices()[0])) == np.asarray(f(jax.devices("cpu")[0]))).all()
        return dict(verdict="right" if right else "WRONG")
    return cases | {"balancing": balancing}


# ------------------------------------------------------------------------------------- b: a run beside the CPU's

def prepared():
    """The mixture and the tokenizer in out/gpu_data, as overrides for train.py: prepared directories."""
    folders = sorted(p for p in DATA.glob("*-bpe2048-*") if (p / "manifest.json").exists())
    if len(folders) < 2:
        raise FileNotFoundError(f"{DATA.relative_to(ROOT)}: no prepared text; run python tests/gpu.py --prepare")
    weight = {"kjv": 0.45, "shakespeare": 0.55}
    mixture = tuple((str(p.relative_to(ROOT)), weight[p.name.split("-")[0]]) for p in folders)
    return [f"--mixture={mixture!r}", f"--tokenizer={mixture[0][0]}"]


def smoke_losses(where, steps, folder):
    """(losses of every step, seconds of the whole command) of configs/smoke.py, on "cpu" or "gpu"; a process of train.py."""
    run = Path(folder) / f"smoke-{where}"
    subprocess.run(["rm", "-rf", str(run)], check=True)
    command = [sys.executable, "train.py", "configs/smoke.py", f"--steps={steps}", "--sample_tokens=0",
               "--log_every=1", "--eval_tokens=4096", f"--run_dir={run}", *prepared()]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if where == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"train.py on the {where} ended with {done.returncode}: {lines[-1][:300]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], time.time() - started


def cases_b(s, folder):
    def compare():
        steps = s["smoke"]
        found = {}
        threads = [threading.Thread(target=lambda w=w: found.__setitem__(w, attempt(w))) for w in ("cpu", "gpu")]
        def attempt(where):
            try:
                return smoke_losses("cpu" if dry() else where, steps, Path(folder) / where)
            except Exception as error:
                return error
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for where, answer in found.items():
            if isinstance(answer, Exception):
                raise answer
        (cpu, cpu_seconds), (gpu, gpu_seconds) = found["cpu"], found["gpu"]
        gap = np.abs(np.array(cpu) - np.array(gpu))
        return dict(steps=len(gpu), first_gap=float(gap[0]), worst_gap=float(gap.max()), last_cpu=cpu[-1],
                    last_gpu=gpu[-1], cpu_s=cpu_seconds, gpu_s=gpu_seconds)
    return {"smoke.py, losses on GPU and CPU": compare}


# ----------------------------------------------------------------------------------------- e: one billion weights

def h200_config(s):
    """configs/gpu_h200.py, its batch cut to s["micro"] microbatches of its own size; tiny for --dry."""
    import train
    overrides = [f"--batch_size={s['rows'] * s['micro']}", f"--accumulate={s['micro']}", f"--steps={s['steps']}"]
    if dry():
        overrides += ["--hidden_dim=32", "--num_layers=2", "--num_heads=2", "--num_kv_heads=1", "--head_dim=16",
                      "--shared_dim=32", "--num_experts=4", "--experts_per_token=2", "--expert_dim=16",
                      "--seq_len=64", "--vocab_size=2048", "--window=32", "--gated_norm_rank=8"]
    return train.load_config(str(ROOT / "configs" / "gpu_h200.py"), overrides)


def text_batches(c, rows):
    """Batches of [rows,S] from the prepared text; random tokens in documents if there is none."""
    import data
    try:
        mixture, tokenizer = (word.partition("=")[2] for word in prepared())
        sources = ast.literal_eval(mixture)
        opened = data.open_mixture(sources, tokenizer, DATA, c.vocab_size, c.seq_len)
        return lambda step: data.batch_at(opened, step, rows, c.seq_len, 0), "text, bpe of 2,048"
    except FileNotFoundError:
        rng = np.random.default_rng(0)
        def batch(step):
            ids = rng.integers(0, c.vocab_size, (rows, c.seq_len + 1), dtype=np.int32)
            ids = np.where(rng.random(ids.shape) < 1e-3, 0, ids)
            return data.make_batch(ids, ids[:, :-1] == 0)
        return batch, "random tokens"


def ours_case(s, plain=False, seconds=30):
    """Train gpu_h200.py for some steps; throughput over the steps after the second. plain: without configs/hopper.py."""
    import jax
    import kernels
    import model
    import train
    c, t = h200_config(s)
    if plain:
        kernels.GPU_KERNELS.clear()
    c = dataclasses.replace(c, compute_dtype="bfloat16")
    mesh = train.make_mesh(c, t, jax.devices()[:1])
    shardings = train.state_shardings(c, t, mesh)
    batch, kind = text_batches(c, t.batch_size)
    state = jax.jit(lambda: train.make_state(c, t, jax.random.key(0)), out_shardings=shardings)()
    step = train.make_train_step(c, t, mesh)
    began, times, losses = time.perf_counter(), [], []
    while len(times) < s["steps"] and (len(times) < 4 or time.perf_counter() - began < seconds):
        rows = train.to_global_batch(batch(len(times)), mesh, t.accumulate)
        start = time.perf_counter()
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    second = statistics.median(times[2:] or times[1:])
    rate = t.batch_size * c.seq_len / second
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return dict(tokens_per_s=rate, mfu=model.count(c).mfu_flops * rate / PEAK, step_ms=second * 1e3,
                gib=memory / 2**30, compile_s=times[0], steps=len(times), loss=losses[-1], data=kind)


def cases_e(s):
    if dry():
        return {}
    return {"ours, hopper and packed": functools.partial(ours_case, s)}


def cases_e_more(s):
    return {"ours, plain XLA": functools.partial(ours_case, s, True)}


def peer_case(s, seconds=30):
    """The PyTorch twin (tests/peer_torch.py): eager, bfloat16 autocast, grouped_mm, flex_attention."""
    import types

    import torch
    import torch.nn.functional as F

    import model
    from tests import peer_torch
    c, t = h200_config(s)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = s["rows"] * s["micro"]
    batch, kind = text_batches(c, total)
    some = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype(np.float32)     # drawing 1.2 B takes long
    w = model.map_params(lambda path, w: np.ones(w.shape, np.float32) if w.init == "ones" else np.resize(some, w.shape), c)
    rows = batch(0)
    names = dict(tokens=rows.tokens_BS, targets=rows.targets_BS, segments=rows.segments_BS, weights=rows.weights_BS)
    if device == "cuda":
        torch.set_default_device("cuda")
    pieces = []
    for first in range(0, total, s["peer_rows"]):
        part = {k: torch.tensor(v[first:first + s["peer_rows"]], device=device) for k, v in names.items()}
        pieces.append({k: v.long() if k != "weights" else v for k, v in part.items()})
    layers = c.num_layers
    windows = [c.seq_len if model.sees_all(c, i) else c.window or c.seq_len // 2 for i in range(layers)]

    def attention_of(piece):
        attend = {window: flex(piece["segments"], window, device == "cuda") for window in set(windows)}
        order = iter(windows)
        return lambda q, k, v, attn_mask=None, enable_gqa=False: attend[next(order)](*(
            a.to(torch.bfloat16) for a in (q, k, v)))

    def grouped(x_RD, p, load):
        ends = torch.cumsum(load, 0, dtype=torch.int32)
        x, gate, up, down = (a.to(torch.bfloat16) for a in (x_RD, p["gate_EDF"], p["up_EDF"], p["down_EFD"]))
        h = F.silu(torch._grouped_mm(x, gate, ends)) * torch._grouped_mm(x, up, ends)
        return torch._grouped_mm(h, down, ends).to(x_RD.dtype)

    peer = peer_torch.Trainer(c, t, w, grouped)

    def step():
        for leaf in sum(peer.optimizer.groups.values(), []):
            leaf.grad = None
        for piece in pieces:
            shim = types.SimpleNamespace(**vars(F))
            shim.scaled_dot_product_attention = attention_of(piece)
            peer_torch.F = shim
            with torch.autocast(device, torch.bfloat16):
                logits, scores, margins = peer_torch.forward(peer.w, peer.bias_LE, piece, c, grouped)
                loss = peer_torch.objective(logits.float(), scores, piece, c) / len(pieces)
            loss.backward()
        peer.bias_LE = peer_torch.next_bias([m.float() for m in margins], piece, c)
        peer.optimizer.step(0.5)
        return float(loss) * len(pieces)

    began, times = time.perf_counter(), []
    while len(times) < s["steps"] and (len(times) < 4 or time.perf_counter() - began < seconds):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    second = statistics.median(times[2:] or times[1:])
    rate = total * c.seq_len / second
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return dict(tokens_per_s=rate, mfu=model.count(c).mfu_flops * rate / PEAK, step_ms=second * 1e3,
                gib=memory / 2**30, compile_s=times[0], steps=len(times), loss=loss, data=kind)


def cases_e_torch(s):
    return {"torch twin": functools.partial(peer_case, s)}


# ----------------------------------------------------------------------------------- workers and their keeper

PARTS = {       # worker: (what makes its cases, the most seconds of a case), from the most valuable down
    "c": (cases_c, 60), "c_torch": (cases_c_torch, 40), "d": (cases_d, 60), "a": (cases_a, 60),
    "d_torch": (cases_d_torch, 90), "e": (cases_e, 170), "e_torch": (cases_e_torch, 120),
    "b": (cases_b, 150), "e_more": (cases_e_more, 170)}


def dry():
    return "--dry" in sys.argv


def platform():
    """What kernels are compiled for here. "cpu" interprets the Pallas kernels."""
    return "cpu" if dry() else "gpu"


def first_line(error):
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return lines[0][:300]


def work(part, options):
    """Be a worker: run the named cases, or all; print a line of JSON before and after each."""
    say = lambda **facts: print("ROW " + json.dumps(facts), flush=True)
    make, sizes = PARTS[part][0], SIZES["dry" if dry() else "card"]
    cases = make(sizes, options.out) if part == "b" else make(sizes)
    chosen = [word.partition(":")[2] for word in options.only.split(",") if word.partition(":")[0] == part]
    names = [name for name in cases if not chosen or any(word in name for word in chosen)]
    say(names=names)
    for name in names[options.skip:]:
        say(start=name)
        try:
            say(case=name, **cases[name]())
        except Exception as error:
            say(case=name, error=first_line(error))


def read_lines(stream, lines):
    for line in stream:
        lines.put(line)
    lines.put(None)


def keep(part, options, deadline, record):
    """Run a worker through all its cases, start it anew after a case that killed it or took too long."""
    most = PARTS[part][1] * (6 if dry() else 1)         # two slow cores, perhaps busy
    skip, log = 0, Path(options.out) / f"worker-{part}.log"
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if part == "a":                             # many small programs: correctness needs no autotuning
        environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    if part.endswith("torch") or dry():
        environment |= {"JAX_PLATFORMS": "cpu", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    while True:
        words = [sys.executable, "-u", __file__, f"--worker={part}", f"--skip={skip}", f"--out={options.out}"]
        words += ["--dry"] * dry() + [f"--only={options.only}"] * bool(options.only)
        with log.open("a") as errors:
            child = subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                     stderr=errors, start_new_session=True)
        lines, names, running = queue.Queue(), None, None
        threading.Thread(target=read_lines, args=(child.stdout, lines), daemon=True).start()
        fate = None
        while fate is None:
            try:
                line = lines.get(timeout=max(0.1, min(most + 30 * (names is None), deadline - time.time())))
            except queue.Empty:
                os.killpg(child.pid, signal.SIGKILL)            # and what it has started
                fate = "out of time" if time.time() >= deadline - 0.2 else f"took over {most} s"
                break
            if line is None:
                fate = "" if not child.wait() else f"its process ended with {child.returncode}"
            elif line.startswith("ROW "):
                row = json.loads(line[4:])
                names, running = row.get("names", names), row.get("start", running)
                if "case" in row:
                    skip, running = skip + 1, None
                    record(part, row.pop("case"), row)
        child.wait()
        if not fate:
            return
        last = log.read_text().strip().splitlines()[-1:] or [""]
        record(part, running or "(the worker's start)", dict(error=f"{fate}: {last[0][:200]}"))
        skip += 1
        if names is None or fate == "out of time" or skip >= len(names):
            for name in (names or [])[skip:]:
                record(part, name, dict(error="no time left"))
            return


def versions():
    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or "none"
    except (OSError, subprocess.TimeoutExpired):
        card = "none"
    names = "jax", "jaxlib", "torch", "triton", "optax", "orbax-checkpoint"
    return dict(card=card, python=sys.version.split()[0], date=time.strftime("%Y-%m-%d"),
                **{name: version(name) for name in names})


def missing():
    """Packages that are not here, in one list; without torch only its parts are left out."""
    needs = {"jax": "jax", "optax": "optax", "orbax.checkpoint": "orbax-checkpoint", "tiktoken": "tiktoken",
             "regex": "regex", "tqdm": "tqdm", "scipy": "scipy", "matplotlib": "matplotlib", "torch": "torch"}
    if not dry():
        needs["jax_plugins"] = "jax[cuda13]"
    def found(module):
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            return False
    return [package for module, package in needs.items() if not found(module)]


def show(value):
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


def line_of(part, name, row):
    return f"{part:8s} {name:44s} " + "  ".join(f"{k} {show(v)}" for k, v in row.items())


def prepare():
    """Tokenize smoke's two books with its vocabulary, into out/gpu_data; about 8 MB."""
    import data
    import train
    c, t = train.load_config(str(ROOT / "configs" / "smoke.py"))
    data.open_mixture(t.mixture, t.tokenizer, DATA, c.vocab_size, c.seq_len)
    subprocess.run(["rm", "-rf", str(DATA / "wheels")], check=True)
    size = sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file())
    print(f"{DATA.relative_to(ROOT)}: {size / 1e6:.1f} MB; carry this folder to the machine with the GPU")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/gpu")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--parts", default="c,d,a,e,b")
    parser.add_argument("--only", default="", help="PART:WORD,...: of that part only cases whose name holds one of its words")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    letters, known = options.parts.split(","), {*PARTS} | {part[0] for part in PARTS}
    if not {*letters} <= known:
        parser.error(f"--parts: expected some of {', '.join(sorted(known))}, found {options.parts}")
    began = time.time()
    options.out = str(Path(options.out).resolve())
    Path(options.out).mkdir(parents=True, exist_ok=True)
    if options.worker:
        return work(options.worker, options)

    gone = [] if options.prepare else missing()
    if gone:
        print("missing packages: " + ", ".join(gone), flush=True)
    if set(gone) - {"torch"}:
        sys.exit(2)
    if options.prepare:
        return prepare()

    about, rows, table = versions(), [], Path(options.out) / "gpu.json"
    if table.exists():                                      # of an earlier call, whose minutes were paid for
        table.rename(table.with_name(f"gpu-{int(table.stat().st_mtime)}.json"))
    print("  ".join(f"{k} {v}" for k, v in about.items()), flush=True)

    def record(part, name, row):
        rows.append(dict(part=part, case=name, **row))
        print(line_of(part, name, row), flush=True)
        table.write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n")

    deadline = began + 60 * options.minutes
    for part in (p for p in PARTS if p in letters or p[0] in letters):
        if part.endswith("torch") and "torch" in gone:
            record(part, "all", dict(error="torch is missing"))
            continue
        if time.time() > deadline - 15:
            record(part, "all", dict(error="no time left"))
            continue
        start = time.time()
        keep(part, options, deadline, record)
        print(f"{part:8s} took {time.time() - start:.0f} s; {deadline - time.time():.0f} s left", flush=True)

    print(f"\n{about['card']}, {about['date']}, jax {about['jax']}, torch {about['torch']}; {options.out}/gpu.json")
    plain = next((r["ms"] for r in rows if r["case"] == "plain matmul" and "ms" in r), None)
    for row in rows:
        if plain and row["part"].startswith("c") and "ms" in row:
            share = plain / row["ms"] * (3 if "layer" in row["case"] else 1)
            print(f"{row['case']:34s} {row['ms']:8.2f} ms  {row['tflops']:6.0f} TFLOP/s  {share:.2f} of the plain matmul")
    wrong = [r["case"] for r in rows if r.get("verdict") == "WRONG"]
    failed = [f"{r['part']} {r['case']}" for r in rows if "error" in r and isinstance(r["error"], str)]
    print(f"{len(rows)} rows; wrong: {', '.join(wrong) or 'none'}; failed: {', '.join(failed) or 'none'}")
    sys.exit(1 if wrong or (dry() and failed) else 0)


if __name__ == "__main__":
    main()
