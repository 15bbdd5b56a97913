"""What the TPU compiler makes of the kernels, without a TPU: ahead-of-time compilation with libtpu.

Run:  python tests/test_tpu.py v4 v5p v6e    FLOPs over useful ones, temporary memory, largest array
Compiling proves that the kernels lower, that their blocks fit VMEM and what memory the program
needs; it is not a timing. Shapes are one chip's share of the 129B run: 16,384 tokens, 16 of 64
experts (EP4), bfloat16."""
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHIPS = {"v4": ("v4:2x2x1", {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}),
         "v5p": ("v5p:2x2x1", {}), "v6e": ("v6e:2x2", {})}
T, D, F, E, K, V, ROWS = 16_384, 5120, 2560, 16, 4, 128_256, 65_536
S, N, M, H = 4096, 40, 10, 128


def programs(mesh):
    """name -> (function, shapes of its arguments, useful FLOPs): forward and backward of every
    kernel."""
    from types import SimpleNamespace

    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    import balance
    import kernels
    import moe
    half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    index = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    def backward(f, wrt):
        total = lambda *args: jnp.sum(f(*args).astype(jnp.float32))
        return lambda *args: jax.value_and_grad(total, wrt)(*args)

    def layer(exchange):
        """The whole layer on 4 chips, 16 experts each: tokens and experts are split over the axis
        "expert"."""
        c = SimpleNamespace(experts_per_token=K, combine_sum=0.0, balancer="quantile",
                            exchange=exchange, capacity_factor=1.25)

        def f(x, router, gate, up, down):
            p = {"router_DE": router, "gate_EDF": gate, "up_EDF": up, "down_EFD": down}
            return moe.moe(x, p, jnp.zeros(4 * E), c, "expert", "tpu")[0]
        split = PartitionSpec("expert")
        shared = jax.shard_map(f, mesh=mesh, out_specs=split, check_vma=False,
                               in_specs=(split, PartitionSpec(), split, split, split))
        router = jax.ShapeDtypeStruct((D, 4 * E), jnp.float32)
        shapes = (half(4 * T, D), router, half(4 * E, D, F), half(4 * E, D, F), half(4 * E, F, D))
        return backward(shared, (0, 1, 2, 3, 4)), shapes, 18 * T * K * D * F

    def product(D, F):
        def f(x, w, tile):
            return kernels.grouped_matmul(x, w, tile, "pallas_tpu", "tpu")
        shapes = half(ROWS, D), half(E, D, F), index(ROWS // 256)
        return backward(f, (0, 1)), shapes, 6 * ROWS * D * F

    def loss(impl):
        f = lambda x, head, target: sum(kernels.cross_entropy(x, head, target, impl))
        return backward(f, (0, 1)), (half(T, D), half(D, V), index(T)), 6 * T * D * V

    def attention(impl, window):
        def ours(q, k, v, segment):
            return kernels.attention(q, k, v, segment, window, impl, "tpu")

        def xla(q, k, v, segment):
            same = segment[:, :, None] == segment[:, None, :]
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, mask=same[:, None],
                                                implementation="xla")
        shapes = half(2, S, N, H), half(2, S, M, H), half(2, S, M, H), index(2, S)
        f = backward(xla if impl == "xla" else ours, (0, 1, 2))
        return f, shapes, 12 * 2 * S * S * N * H

    scores = jax.ShapeDtypeStruct((48, T, 64), jnp.float32)
    bias = jax.ShapeDtypeStruct((48, 64), jnp.float32)

    def count(margin, bias):
        return balance.update("quantile", margin, jnp.ones(T, bool), bias, 4, platform="tpu")
    return {
        "product up": product(D, F),
        "product down": product(F, D),
        "layer ring": layer("ring"),
        "layer ragged": layer("ragged"),
        "loss plain": loss("plain"),
        "loss vocabulary": loss("vocabulary"),
        "attention xla": attention("xla", S),
        "attention splash": attention("splash", S),
        "attention splash window": attention("splash", S // 2),
        "balancing": (count, (scores, bias), 2 * 48 * T * 15 * 64),
    }


def compile_all(chip, names):
    """{name: {"flops": over useful, "temp": GiB, "largest": elements of an array, "square": S x S?,
    "seconds"}}"""
    # read when jax and libtpu load: no TPU here, no metadata server, other tests may compile too
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
                   "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    name, options = CHIPS[chip]
    four = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    mesh = Mesh(np.array(four[:4]), ("expert",))
    results = {}
    for name, (f, shapes, useful) in programs(mesh).items():
        if names and name not in names:
            continue
        t0 = time.perf_counter()
        # a kernel runs on one chip; the layer splits the first axis of all but the router
        here = mesh if name.startswith("layer") else Mesh(np.array(four[:1]), ("expert",))
        place = NamedSharding(here, PartitionSpec())
        split = NamedSharding(here, PartitionSpec("expert"))
        args = [jax.ShapeDtypeStruct(s.shape, s.dtype,
                                     sharding=place if s.dtype == np.float32 else split)
                for s in shapes]
        compiled = jax.jit(f).lower(*args).compile()
        shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
        arrays = {tuple(map(int, dims.split(","))) for dims in shapes}
        results[name] = {
            "flops": compiled.cost_analysis()["flops"] / useful,
            "temp": compiled.memory_analysis().temp_size_in_bytes / 2**30,
            "largest": max(int(np.prod(a, dtype=np.int64)) for a in arrays),
            "square": any(a.count(S) > 1 for a in arrays),
            "seconds": round(time.perf_counter() - t0, 1)}
        print(json.dumps({name: results[name]}), flush=True)
    return results


@functools.cache
def compiled(chip, *names):
    """The results of another process: libtpu must find its settings before jax is imported."""
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU's compiler; no TPU")
    command = [sys.executable, __file__, chip, "--only=" + ",".join(names)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {name: result for line in lines for name, result in line.items()}


def test_the_grouped_matmul_compiles_for_v4_and_does_no_extra_work():
    """The one compilation of the quick set, and the tightest: v4 has 16 MiB of VMEM and two cores a
    chip."""
    assert compiled("v4", "product up")["product up"]["flops"] <= 1.01


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_grouped_matmuls_do_no_extra_work(chip):
    r = compiled(chip)
    assert max(r["product up"]["flops"], r["product down"]["flops"]) <= 1.01


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_the_moe_layer_does_at_most_a_third_more_than_useful_work(chip):
    """Executed: XLA's count, in which a Pallas kernel counts every tile of the buffer, used or not.
    Useful: 3 matrices x 3 passes of the T*K assignments."""
    r = compiled(chip)
    for name in ("layer ring", "layer ragged"):
        assert r[name]["flops"] <= 1.35, name
        assert r[name]["largest"] < E * T * D, f"{name}: every expert's view of every token"


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_the_loss_never_holds_tokens_by_vocabulary(chip):
    r = compiled(chip)
    assert r["loss vocabulary"]["largest"] < T * V <= r["loss plain"]["largest"]
    assert r["loss vocabulary"]["temp"] <= 0.15 * r["loss plain"]["temp"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_attention_never_holds_a_square(chip):
    r = compiled(chip)
    for name in ("attention splash", "attention splash window"):
        assert not r[name]["square"], name
        assert r[name]["temp"] <= 0.1 * r["attention xla"]["temp"], name


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_balancing_holds_no_copy_of_the_scores_for_each_candidate(chip):
    """Fifteen comparisons of every score, held at once, would be fifteen times the scores."""
    scores_gib = 4 * 48 * T * 64 / 2**30
    assert compiled(chip)["balancing"]["temp"] < 3 * scores_gib


if __name__ == "__main__":
    only = [a.removeprefix("--only=") for a in sys.argv[1:] if a.startswith("--only=")]
    for chip in (a for a in sys.argv[1:] if not a.startswith("--")):
        print(chip)
        compile_all(chip, set(filter(None, only[0].split(","))) if only else set())
