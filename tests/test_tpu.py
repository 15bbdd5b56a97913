"""What the TPU compiler makes of the kernels, without a TPU: ahead-of-time compilation with the pinned libtpu.

Run:  python tests/test_tpu.py v4 v5p v6e        the table: FLOPs over useful ones, temporary memory, largest array
Compiling proves that the kernels lower, that their blocks fit VMEM and what memory the program needs; it is not a
timing. Shapes are one chip's share of the 129B run: 16,384 tokens, 16 of 64 experts (EP4), bfloat16."""
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
T, D, F, E, K, V, S, N, M, H, ROWS = 16_384, 5120, 2560, 16, 4, 128_256, 4096, 40, 10, 128, 65_536


def programs(mesh):
    """name -> (function, shapes of its arguments, useful FLOPs): forward and backward of every kernel."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    import kernels
    import moe
    half, whole = (lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)), jnp.int32
    index = lambda *shape: jax.ShapeDtypeStruct(shape, whole)

    def backward(f, wrt):
        return lambda *args: jax.value_and_grad(lambda *args: jnp.sum(f(*args).astype(jnp.float32)), wrt)(*args)

    def layer(exchange):
        """The whole layer on 4 chips, 16 experts each: tokens and experts are split over the axis "expert"."""
        def f(x, router, gate, up, down):
            p = {"router_DE": router, "gate_EDF": gate, "up_EDF": up, "down_EFD": down}
            return moe.parallel_moe(x, p, jnp.zeros(4 * E), K, 0.0, "expert", exchange, 1.25, "tpu")[0]
        split = PartitionSpec("expert")
        shared = jax.shard_map(f, mesh=mesh, in_specs=(split, PartitionSpec(), split, split, split),
                               out_specs=split, check_vma=False)
        shapes = (half(4 * T, D), jax.ShapeDtypeStruct((D, 4 * E), jnp.float32), half(4 * E, D, F),
                  half(4 * E, D, F), half(4 * E, F, D))
        return backward(shared, (0, 1, 2, 3, 4)), shapes, 18 * T * K * D * F

    def product(impl, D, F):
        f = backward(lambda x, w, tile: kernels.grouped_matmul(x, w, tile, impl, "tpu"), (0, 1))
        return f, (half(ROWS, D), half(E, D, F), index(ROWS // 256)), 6 * ROWS * D * F

    def loss(impl, chunk):
        f = lambda x, head, target: sum(kernels.cross_entropy(x, head, target, impl, "tpu", chunk=chunk))
        return backward(f, (0, 1)), (half(T, D), half(D, V), index(T)), 6 * T * D * V

    def attention(impl, window):
        f = lambda q, k, v, segment: kernels.attention(q, k, v, segment, window, impl, "tpu")
        def xla(q, k, v, segment):
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, mask=(
                segment[:, :, None] == segment[:, None, :])[:, None], implementation="xla")
        return (backward(xla if impl == "xla" else f, (0, 1, 2)),
                (half(2, S, N, H), half(2, S, M, H), half(2, S, M, H), index(2, S)), 12 * 2 * S * S * N * H)

    count = lambda key, tried: kernels.count_reaching(key, tried, None, "tpu")
    unsigned = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.uint32)
    return {
        "product up": product("pallas_tpu", D, F),
        "product down": product("pallas_tpu", F, D),
        "product ragged_dot": product("ragged_dot", D, F),
        "layer ring": layer("ring"),
        "layer ragged": layer("ragged"),
        "loss plain": loss("plain", 0),
        "loss chunked": loss("chunked", 1024),
        "loss vocabulary": loss("vocabulary", 4096),
        "attention xla": attention("xla", S),
        "attention splash": attention("splash", S),
        "attention splash window": attention("splash", S // 2),
        "count": (count, (unsigned(48, T, 64), unsigned(15, 48, 64)), 2 * 48 * T * 15 * 64),
    }


def compile_all(chip, names):
    """{name: {"flops": over useful, "temp": GiB, "largest": elements of an array, "square": S x S?, "seconds"}}"""
    # read when jax and libtpu load: no TPU here, no metadata server, and other tests may be compiling too
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
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
        # a kernel runs on one chip; the layer splits tokens and experts, the first axis of all but the router
        here = mesh if name.startswith("layer") else Mesh(np.array(four[:1]), ("expert",))
        place = NamedSharding(here, PartitionSpec())
        split = NamedSharding(here, PartitionSpec("expert"))
        args = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place if s.dtype == np.float32 else split)
                for s in shapes]
        compiled = jax.jit(f).lower(*args).compile()
        shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
        arrays = {tuple(map(int, dims.split(","))) for dims in shapes}
        results[name] = {
            "flops": compiled.cost_analysis()["flops"] / useful,
            "temp": compiled.memory_analysis().temp_size_in_bytes / 2**30,
            "largest": max(int(np.prod(a, dtype=np.int64)) for a in arrays),
            "square": any(a.count(S) > 1 for a in arrays), "seconds": round(time.perf_counter() - t0, 1)}
        print(json.dumps({name: results[name]}), flush=True)
    return results


@functools.cache
def compiled(chip, *names):
    """The results of another process: libtpu must find its settings before jax is imported."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'libtpu==0.0.42.*' (compiles; no TPU wanted)")
    command = [sys.executable, __file__, chip, "--only=" + ",".join(names)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    return {k: v for line in run.stdout.splitlines() if line.startswith("{") for k, v in json.loads(line).items()}


def test_the_grouped_matmul_compiles_for_v4_and_does_no_extra_work():
    """The one compilation of the quick set, and the tightest: v4 has 16 MiB of VMEM and two cores a chip."""
    assert compiled("v4", "product up")["product up"]["flops"] <= 1.01


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_grouped_matmuls_do_no_extra_work(chip):
    r = compiled(chip)
    assert max(r["product up"]["flops"], r["product down"]["flops"]) <= 1.01


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_the_moe_layer_does_at_most_a_third_more_than_useful_work(chip):
    """Executed: XLA's count, in which a Pallas kernel stands with every tile of the buffer, used or not. Useful:
    3 matrices x 3 passes of the T*K assignments."""
    r = compiled(chip)
    for name in ("layer ring", "layer ragged"):
        assert r[name]["flops"] <= 1.35, name
        assert r[name]["largest"] < E * T * D, f"{name}: an array as large as every expert's view of every token"


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_the_loss_never_holds_tokens_by_vocabulary(chip):
    """A TPU uses "vocabulary". "chunked" adds up the head's gradient in float32: 2.4 GiB of temporaries."""
    r = compiled(chip)
    assert r["loss chunked"]["largest"] < T * V and r["loss vocabulary"]["largest"] < T * V
    assert r["loss vocabulary"]["temp"] <= 0.15 * r["loss plain"]["temp"]
    assert r["loss chunked"]["temp"] <= 0.35 * r["loss plain"]["temp"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_attention_never_holds_a_square(chip):
    r = compiled(chip)
    for name in ("attention splash", "attention splash window"):
        assert not r[name]["square"], name
        assert r[name]["temp"] <= 0.1 * r["attention xla"]["temp"], name


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_counting_scores_compiles(chip):
    assert compiled(chip)["count"]["flops"] > 0


if __name__ == "__main__":
    only = [a.removeprefix("--only=") for a in sys.argv[1:] if a.startswith("--only=")]
    for chip in (a for a in sys.argv[1:] if not a.startswith("--")) :
        print(chip)
        compile_all(chip, set(filter(None, only[0].split(","))) if only else set())
