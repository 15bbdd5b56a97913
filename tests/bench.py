"""One stopwatch and one roofline for kernels, moe and balance.

Run:  python tests/bench.py kernels              every fast path beside the plain one
      python tests/bench.py moe                  one layer beside its rivals, even and uneven loads
      python tests/bench.py balance              the exact order statistic beside sorts, histograms
      python tests/bench.py roofline --chip=v4   FLOPs, bytes and bound of each kernel, 129B shape
Each of the first three takes a minute or two. Ratios of times depend on the machine.

T tokens  D hidden  E experts  K experts per token  F expert width  L layers  V vocabulary
R rows of the expert-sorted buffer   S sequence  N query heads  M key/value heads  H head dim"""

import argparse
import json
import math
import statistics
import sys
import time
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import balance
import kernels
import moe
from configs import plan
from tests import lp
from tests import rivals

# bytes a second of one chip's high-bandwidth memory
BANDWIDTH = {name: plan.CHIPS[name].bandwidth for name in ("v4", "v5e", "v5p", "v6e", "h100", "h200")}


def stopwatch(forms, repeats=10, budget=math.inf):
    """{name: least seconds} of {name: function without arguments}, all forms in turn.

    Taking turns, whatever disturbs the machine disturbs them alike. A form stops once it has used
    `budget` seconds. Prints a warning where the median is 1.3 times the least [assumed]."""
    seconds = {name: [] for name in forms}
    for form in forms.values():
        jax.block_until_ready(form())                           # compiled and warm
    for _ in range(repeats):
        for name, form in forms.items():
            if sum(seconds[name]) < budget:
                start = time.perf_counter()
                jax.block_until_ready(form())
                seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        least, median = min(taken), statistics.median(taken)
        if median > 1.3 * least:
            print(f"warning: a noisy machine: {name} took {least * 1e3:.1f} ms at best and "
                  f"{median * 1e3:.1f} ms in the median; run again when it is quiet")
    return {name: min(taken) for name, taken in seconds.items()}


def with_gradients(f, *args, fixed=()):
    """A function without arguments: the value and gradients of a scalar f(*args, *fixed), compiled.

    `fixed` has no gradient, but it is an argument: XLA would compute with a constant at compile
    time, and what is sorted or gathered by it would not be timed."""
    compiled = jax.jit(jax.value_and_grad(f, argnums=range(len(args))))
    return partial(compiled, *args, *fixed)


def relative_errors(got, want):
    """Largest distance over largest value, leaf by leaf."""
    return [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]


def ragged_dot(x_RD, w_EDF, tile_expert):
    """kernels.grouped_matmul by jax's own. On CPU and GPU it does E times the useful work, and in
    the weight gradient on TPU v4 to v6e too [measured: AOT, jax 0.10.2, libtpu 0.0.42]."""
    tile = x_RD.shape[0] // tile_expert.shape[0]
    tiles_E = jnp.sum(tile_expert[:, None] == jnp.arange(w_EDF.shape[0]), axis=0, dtype=jnp.int32)
    return lax.ragged_dot(x_RD, w_EDF, tiles_E * tile)


# ------------------------------------------------------------------------------------ kernels

def kernel_cases():
    """{name: ({implementation: function of the arguments}, arguments)}; "plain" is the truth."""
    key = iter(jax.random.split(jax.random.key(0), 32))
    normal = lambda *shape: jax.random.normal(next(key), shape)
    B, S, N, M, H, window = 8, 512, 4, 2, 32, 256
    segment_BS = jnp.cumsum(jax.random.bernoulli(next(key), 0.01, (B, S)), axis=1)
    T, D, V, E, F, tile = 2048, 128, 8192, 8, 64, 64
    R = 4 * T
    tile_expert = jnp.repeat(jnp.arange(E), R // (E * tile))
    target_T = jax.random.randint(next(key), (T,), 0, V)
    x_RD = normal(R, D)
    weights = [normal(E, *shape) * shape[0]**-0.5 for shape in ((D, F), (D, F), (F, D))]

    def attention(impl, window):
        return lambda q, k, v: kernels.attention(q, k, v, segment_BS, window, impl)

    def cross_entropy(impl):
        return lambda x, head: kernels.cross_entropy(x, head, target_T, impl)[0]

    def matmul(impl):
        return lambda x, w: kernels.grouped_matmul(x, w, tile_expert, impl)

    def experts(impl):
        return lambda *args: kernels.expert_mlp(*args, tile_expert, impl)

    heads = normal(B, S, N, H), normal(B, S, M, H), normal(B, S, M, H)
    cases = {
        f"attention S={S}": ({impl: attention(impl, S) for impl in ("plain", "chunked")}, heads),
        f"attention S={S} window={window}": (
            {impl: attention(impl, window) for impl in ("plain", "chunked")}, heads),
        f"cross_entropy T={T} V={V}": (
            {impl: cross_entropy(impl) for impl in ("plain", "vocabulary")},
            (normal(T, D), normal(D, V) * D**-0.5)),
        f"grouped_matmul R={R} E={E}": (
            {impl: matmul(impl) for impl in ("plain", "tiles")}
            | {"lax.ragged_dot": lambda x, w: ragged_dot(x, w, tile_expert)}, (x_RD, weights[0])),
        f"experts R={R} E={E}": (
            {impl: experts(impl) for impl in ("plain", "loop", "tiles")}, (x_RD, *weights)),
    }
    return cases


def bench_kernels():
    print(f"forward and backward, float32, {jax.devices()[0].device_kind}; best of 10, interleaved")
    print(f"{'kernel':30s} {'implementation':14s} {'ms':>8s} {'x plain':>8s}   "
          "relative errors: value, gradients")
    for name, (forms, args) in kernel_cases().items():
        runs = {impl: with_gradients(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), *args)
                for impl, f in forms.items()}
        truth, times = runs["plain"](), stopwatch(runs)
        for impl, run in runs.items():
            errors = relative_errors(run(), truth) if impl != "plain" else []
            print(f"{name:30s} {impl:14s} {times[impl] * 1e3:8.1f} "
                  f"{times[impl] / times['plain']:8.2f}   "
                  + " ".join(f"{error:.0e}" for error in errors))


# ------------------------------------------------------------------------------------ moe

def routed(multiply):
    """The experts of moe.moe, routing given, computed by multiply(rows, weights, tile_expert)."""
    def layer(x_TD, gate_TK, gate, up, down, expert_TK, cotangent_TD):
        E = gate.shape[0]
        d = moe.dispatch(expert_TK, E, kernels.row_tile("loop", expert_TK.size, E))
        y_RD = multiply(moe.spread(x_TD, d), (gate, up, down), d.tile_expert)
        return jnp.vdot(moe.combine(y_RD * moe.spread_weights(gate_TK, d), d), cotangent_TD)
    return layer


def by_kernel(impl):
    return lambda x_RD, weights, tile_expert: kernels.expert_mlp(x_RD, *weights, tile_expert, impl)


def by_ragged_dot(x_RD, weights, tile_expert):
    gate, up, down = weights
    h_RF = jax.nn.silu(ragged_dot(x_RD, gate, tile_expert)) * ragged_dot(x_RD, up, tile_expert)
    return ragged_dot(h_RF, down, tile_expert)


def dense_einsum(x_TD, gate_TK, gate, up, down, expert_TK, cotangent_TD):
    """Every token through every expert."""
    chosen_TKE = expert_TK[:, :, None] == jnp.arange(gate.shape[0])
    gate_TE = jnp.sum(jnp.where(chosen_TKE, gate_TK[:, :, None], 0), axis=1)
    h_ETF = jax.nn.silu(jnp.einsum("TD,EDF->ETF", x_TD, gate))
    h_ETF = h_ETF * jnp.einsum("TD,EDF->ETF", x_TD, up)
    return jnp.vdot(jnp.einsum("ETF,EFD,TE->TD", h_ETF, down, gate_TE), cotangent_TD)


def torch_grouped_mm(x_TD, gate_TK, weights, expert_TK, cotangent_TD):
    """The same in PyTorch, sorted and multiplied by torch._grouped_mm; None without PyTorch."""
    try:
        import torch
    except ImportError:
        print("torch is not installed, so torch._grouped_mm is left out (pip install torch)")
        return None
    tensor = lambda a: torch.tensor(np.asarray(a))
    leaves = [tensor(a).requires_grad_() for a in (x_TD, gate_TK, *weights)]
    x, gates, gate, up, down = leaves
    E, K = gate.shape[0], expert_TK.shape[1]
    flat, cotangent = tensor(expert_TK).long().reshape(-1), tensor(cotangent_TD)

    def run():
        order = torch.argsort(flat)
        ends = torch.bincount(flat, minlength=E).cumsum(0).to(torch.int32)
        multiply = lambda rows, w: torch._grouped_mm(rows, w, offs=ends)
        rows = x[order // K]
        h = torch.nn.functional.silu(multiply(rows, gate)) * multiply(rows, up)
        y = multiply(h, down) * gates.reshape(-1)[order][:, None]
        total = (torch.zeros_like(x).index_add(0, order // K, y) * cotangent).sum()
        return total, torch.autograd.grad(total, leaves)
    return run


def bench_moe():
    T, D, E, K, F = 4096, 256, 16, 4, 128
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = {"router_DE": (D, E), "gate_EDF": (E, D, F), "up_EDF": (E, D, F),
              "down_EFD": (E, F, D)}
    p = {name: jax.random.normal(key, shape) * shape[-2]**-0.5
         for key, (name, shape) in zip(keys, shapes.items())}
    x_TD, cotangent_TD = jax.random.normal(keys[4], (T, D)), jax.random.normal(keys[5], (T, D))
    zero_E = jnp.zeros(E)
    _, even_E = balance.step(x_TD @ p["router_DE"], zero_E, K)
    c = types.SimpleNamespace(experts_per_token=K, combine_sum=0.0, balancer="quantile",
                              capacity_factor=0.0)
    expert_TK, weight_TK, _ = moe.route(x_TD, p["router_DE"], even_E, c)
    weights = p["gate_EDF"], p["up_EDF"], p["down_EFD"]
    given = x_TD, weight_TK, *weights

    def one_expert(rows_RD, gate, up, down):        # as many products, and nothing else
        return jnp.sum(((rows_RD @ gate) * (rows_RD @ up)) @ down)

    def ours(multiply):
        return with_gradients(routed(multiply), *given, fixed=(expert_TK, cotangent_TD))

    of_one = [w[0] for w in weights]
    forms = {
        "loop (the default)": ours(by_kernel("loop")),
        "tiles": ours(by_kernel("tiles")),
        "dense einsum": with_gradients(dense_einsum, *given, fixed=(expert_TK, cotangent_TD)),
        "lax.ragged_dot": ours(by_ragged_dot),
        "bare matmuls": with_gradients(one_expert, jnp.tile(x_TD, (K, 1)), *of_one),
    }
    by_torch = torch_grouped_mm(x_TD, weight_TK, weights, expert_TK, cotangent_TD)
    forms |= {"torch._grouped_mm": by_torch} if by_torch else {}

    kind = jax.devices()[0].device_kind
    print(f"T={T} D={D} E={E} K={K} F={F}, float32, {kind}; best of 10, interleaved")
    print("The experts of one layer, routing given, forward and backward:")
    times = stopwatch(forms)
    for name, seconds in times.items():
        share = times["loop (the default)"] / seconds
        print(f"  {name:20s} {seconds * 1e3:8.1f} ms   the default takes {share:5.2f} of it")
    bench_routings(x_TD, p, c, cotangent_TD, even_E)


def bench_routings(x_TD, p, c, cotangent_TD, even_E):
    """The whole layer beside its definition, for even and uneven loads."""
    E, K = even_E.shape[0], c.experts_per_token
    biases = {"no balancing": jnp.zeros(E), "quantile balancing": even_E,
              f"{K} experts take all": jnp.where(jnp.arange(E) < K, 100.0, 0.0)}

    def run(layer):
        return jax.jit(jax.value_and_grad(
            lambda x, p, bias: jnp.vdot(layer(x, p, bias, c)[0], cotangent_TD), argnums=(0, 1)))

    fast, dense = run(moe.moe), run(moe.dense_moe)
    print("The whole layer against dense_moe, forward and backward:")
    times = stopwatch({name: partial(fast, x_TD, p, bias) for name, bias in biases.items()})
    for name, bias in biases.items():
        expert_TK = moe.route(x_TD, p["router_DE"], bias, c)[0]
        load_E = jnp.bincount(expert_TK.reshape(-1), length=E)
        error = max(relative_errors(fast(x_TD, p, bias), dense(x_TD, p, bias)))
        print(f"  {name:20s} {times[name] * 1e3:8.1f} ms   loads {load_E.min()} to {load_E.max()}, "
              f"error {error:.0e}")


# ------------------------------------------------------------------------------------ balance

def bench_order_statistic(T, E, K):
    q, valid_T = T * K // E, jnp.ones(T, bool)
    x_LTE = jax.random.normal(jax.random.key(0), (1, T, E))

    def histogram(x, bins):
        return rivals.histogram_quantile(x, valid_T, q, *rivals.min_and_max(x, valid_T), bins)

    rows = {
        "bisection, exact": lambda x: balance.kth_largest(x, valid_T, q),
        "histogram, 1,000 bins": partial(histogram, bins=1_000),
        "histogram, 10,000 bins": partial(histogram, bins=10_000),
        "lax.top_k(q)": lambda x: lax.top_k(jnp.swapaxes(x, 1, 2), q)[0][:, :, -1],
        "jnp.sort": lambda x: jnp.sort(x, axis=1)[:, T - q],
        "jnp.quantile": lambda x: jnp.quantile(x, (T - q) / (T - 1), axis=1),
    }
    # the data is an argument of the compiled function: a closed-over constant would be folded away
    forms = {name: partial(jax.jit(f), x_LTE) for name, f in rows.items()}
    truth = lp.largest(np.asarray(x_LTE[0]), q, 0)
    error = {name: float(np.abs(np.asarray(f()) - truth).max()) for name, f in forms.items()}
    forms["np.partition, outside XLA"] = lambda: lp.largest(np.asarray(x_LTE[0]), q, 0)
    best = stopwatch(forms, budget=4.0)
    ours = best["bisection, exact"]
    print(f"\nT = {T:,}, E = {E}, q = {q:,}: {ours * 1e3:.1f} ms")
    for name, seconds in best.items():
        print(f"  {name:28s}{seconds / ours:8.2f} x   error {error.get(name, 0.0):.1e}")


def bench_update(name, L, T, E, K):
    """balance.update on all devices, over the fastest logged step of out/NAME."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    def update(margin_LTE, bias_LE):
        valid_T = jnp.ones(margin_LTE.shape[1], bool)
        return balance.update("quantile", margin_LTE, valid_T, bias_LE, K, "data")[0]

    f = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(Spec(None, "data"), Spec()),
                              out_specs=Spec(), check_vma=False))
    margin_LTE = jax.random.normal(jax.random.key(0), (L, T, E))
    margin_LTE = jax.device_put(margin_LTE, NamedSharding(mesh, Spec(None, "data")))
    ms = 1e3 * stopwatch({name: partial(f, margin_LTE, jnp.zeros((L, E)))})[name]
    log = Path("out", name, "metrics.jsonl")
    if not log.exists():
        print(f"  configs/{name}.py: {ms:.2f} ms ({log} is missing: no share of a step)")
        return
    step = 1e3 * min(json.loads(line)["seconds"] for line in log.read_text().splitlines())
    print(f"  configs/{name}.py: {ms:.2f} ms, {ms / step:.2%} of {step:.0f} ms")


def bench_balance():
    jax.config.update("jax_num_cpu_devices", 2)     # as train.py splits a batch over two cores
    print("The q-th largest of every column, float32 [T,E], q = T*K/E, on one "
          f"{jax.devices()[0].device_kind}.\nTimes over the bisection's own; error: largest "
          "distance from np.partition.")
    for T, E, K in ((4096, 64, 4), (65536, 64, 4), (65536, 256, 8), (65536, 384, 8)):
        bench_order_statistic(T, E, K)
    print(f"\nShare of a training step: update on {jax.device_count()} device(s), over the fastest "
          "logged step of a run")
    bench_update("smoke", 4, 2048, 8, 2)
    bench_update("laptop", 6, 4096, 16, 2)


# ------------------------------------------------------------------------------------ roofline

def roofline(chip):
    """Rows (kernel, model FLOPs, FLOPs in view, executed FLOPs, bytes) of one chip's share of the
    129B run, of one layer and of the head: 16,384 tokens, forward and backward without
    rematerialization, bfloat16.

    Model: as model.count has it, 3 times the forward products, with attention over all S*S scores;
    MFU divides by these. In view: only scores that causality and the window let through. Executed:
    what the TPU kernels do, which is whole blocks of scores, 9 products of them where autodiff
    needs 6, logits twice, and half a tile of padding an expert. Bytes: every operand as often as
    the kernel's grid streams it; a GPU's cache saves some of that."""
    T, S, D, N, M, H, E, K, F, V = 16_384, 4096, 5120, 40, 10, 128, 64, 4, 2560, 128_256
    tpu = chip not in ("h100", "h200")
    rows, block = [], 1024
    for name, window in ("attention, full", S), ("attention, window 2048", S // 2):
        pairs = sum(min(i + 1, window) for i in range(S)) * T // S
        seen = sum(1 for i in range(S // block) for j in range(i + 1)
                   if i * block - (j + 1) * block < window)
        scores = 2 * N * H * (seen * block**2 * T // S)     # FLOPs of one product of all in use
        read = 2 * T * (N + 2 * M) * H * (2 + 7)        # q, k, v, output, gradients, some twice
        rows.append((name, 12 * T * S * N * H, 12 * pairs * N * H, 9 * scores, read))

    R, local = T * K, E // 4                            # EP4: a chip has T*K rows for 16 experts
    tile = kernels.row_tile("pallas_tpu" if tpu else "tiles", R, local)
    padded = R + local * tile // 2
    out = 1280 if tpu else 256                          # columns of an output block

    def sweep(a, b):
        return 2 * (padded * a * (b // out) + padded // tile * a * b + padded * b)

    for name, d, f in ("experts, gate and up", D, 2 * F), ("experts, down", F, D):
        outer = 2 * (padded * d * (f // 640) + padded * f * (d // 1280) + local * d * f)
        flops = 6 * R * d * f
        moved = sweep(d, f) + sweep(f, d) + outer
        rows.append((name, flops, flops, 6 * padded * d * f, moved))

    streams = -(-V // 4096)
    head = 6 * T * D * V
    moved = 2 * (3 * D * V + 3 * streams * T * D) + 4 * 2 * streams * T * D
    rows.append(("loss over 128,256 words", head, head, 8 * T * D * V, moved))
    rounds, candidates = (8, 15) if tpu else (32, 1)    # as balance.kth_largest
    rows.append(("counts, one layer's balancing", 0, 0, 2 * T * E * candidates * rounds,
                 4 * T * E * rounds))
    return rows


def print_roofline(chip):
    peak, bandwidth = plan.CHIPS[chip].flops, BANDWIDTH[chip]
    print(f"{chip}: {peak / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s, "
          f"{peak / bandwidth:.0f} FLOP a byte; 16,384 tokens of the 129B model, bfloat16,\n"
          "forward and backward of one layer, and of the head. TFLOP; arithmetic, not measured.")
    print(f"{'kernel':30s} {'model':>7s} {'in view':>8s} {'executed':>9s} {'GB':>7s} "
          f"{'FLOP/B':>7s} {'ms':>7s} {'bound':>8s} {'MFU at most':>12s}")
    for name, model_flops, in_view, executed, moved in roofline(chip):
        compute, memory = executed / peak, moved / bandwidth
        seconds = max(compute, memory)
        bound = "compute" if compute >= memory else "memory"
        print(f"{name:30s} {model_flops / 1e12:7.2f} {in_view / 1e12:8.2f} {executed / 1e12:9.3f} "
              f"{moved / 1e9:7.2f} {executed / moved:7.0f} {seconds * 1e3:7.2f} {bound:>8s} "
              f"{model_flops / peak / seconds:12.0%}")
    print("MFU counts `model`, with all S*S scores and the logits once. So attention that skips "
          "what is masked can pass 100 %.")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "moe", "balance", "roofline"))
    parser.add_argument("--chip", choices=[chip for chip in BANDWIDTH if chip in plan.CHIPS])
    given = parser.parse_args(arguments)
    if (given.what == "roofline") != (given.chip is not None):
        parser.error("--chip belongs to roofline, and roofline needs it")
    if given.what == "roofline":
        print_roofline(given.chip)
    else:
        {"kernels": bench_kernels, "moe": bench_moe, "balance": bench_balance}[given.what]()


if __name__ == "__main__":
    main(sys.argv[1:])
