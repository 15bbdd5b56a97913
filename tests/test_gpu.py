"""What GPUs run, proven without one: the whole train step lowers for them, and the candidates are right.

A GPU measures the rest: tests/gpu.py."""
import dataclasses
import json
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import kernels
import train
from configs import hopper

ROOT = Path(__file__).resolve().parent.parent
H100 = "NVIDIA H100 80GB HBM3"


def lowered(f, *args):
    """The text of f lowered for CUDA."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name, dtype", [
    ("smoke", "float32"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("gpu_h200", "bfloat16"), ("smoke", "bfloat16"), ("laptop", "float32"), ("laptop", "bfloat16"),
        ("gpu_h200", "float32")))])
def test_the_train_step_lowers_for_every_gpu(name, dtype):
    """At the sizes of the config. No kernel of any one generation of cards may be in it."""
    c, t = train.load_config(str(ROOT / "configs" / f"{name}.py"))
    c = dataclasses.replace(c, compute_dtype=dtype)
    mesh = train.make_mesh(c, t, jax.devices()[:1])
    ints = jax.ShapeDtypeStruct((t.accumulate, t.batch_size // t.accumulate, c.seq_len), jnp.int32)
    weights = jax.ShapeDtypeStruct(ints.shape, jnp.float32)
    batch = {"tokens": ints, "targets": ints, "segments": ints, "weights": weights}

    traced = train.make_train_step(c, t, mesh, "gpu").trace(train.abstract_state(c, t, mesh), batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.dot_general" in text
    assert "mosaic" not in text and "triton" not in text and "tpu_custom_call" not in text
    if dtype == "bfloat16":
        assert "xbf16>" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_faster_kernel_is_chosen_only_where_it_fits(dtype, monkeypatch, capsys):
    """Card, type and widths must be what it needs; one line says what was chosen."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(compute_capability="9.0")])
    kernels.choose.cache_clear()
    fits = dtype == "bfloat16"
    assert kernels.choose("experts", "gpu", dtype, 512, 256) == ("hopper" if fits else "tiles")
    assert kernels.choose("experts", "gpu", dtype, 512, 320) == "tiles"
    assert kernels.choose("attention", "gpu", dtype, 128) == ("packed" if fits else "chunked")
    assert len(capsys.readouterr().out.splitlines()) == 2 * fits
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(compute_capability="10.0")])
    kernels.choose.cache_clear()
    assert kernels.choose("experts", "gpu", dtype, 512, 256) == "tiles"
    kernels.choose.cache_clear()


def test_without_a_gpu_nothing_is_assumed_of_the_card():
    assert kernels.choose("experts", "gpu", "bfloat16", 512, 256) == "tiles"


def problem(tile, D, F, dtype, seed=0):
    """Rows of four experts in six tiles, the last of nobody: x, w and tile_expert."""
    rng = np.random.default_rng(seed)
    tile_expert = jnp.asarray([0, 1, 1, 2, 3, 4], jnp.int32)
    x = jnp.asarray(rng.standard_normal((6 * tile, D)), dtype) * (jnp.repeat(tile_expert, tile) < 4)[:, None]
    return x.astype(dtype), jnp.asarray(rng.standard_normal((4, D, F)) * D**-0.5, dtype), tile_expert


def errors(impl, x, w, tile_expert):
    """Of value and gradients against the plain twin, over the largest value; rows of padding have no gradient."""
    tile = x.shape[0] // tile_expert.shape[0]
    real = (jnp.repeat(tile_expert, tile) < 4)[:, None]

    def run(impl):
        def total(x, w):
            y = jnp.where(real, kernels.grouped_matmul(x, w, tile_expert, impl), 0)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y
        grads, y = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, w)
        return [a.astype(jnp.float32) for a in (y, *grads)]
    return [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(run(impl), run("plain"))]


@pytest.mark.parametrize("D, F, tile", [(128, 64, 128), (192, 96, 64), (48, 32, 16)])
def test_the_triton_kernels_in_interpret_mode(D, F, tile):
    assert max(errors("triton", *problem(tile, D, F, jnp.float32))) < 1e-5


@pytest.mark.slow
def test_the_hopper_kernels_in_interpret_mode():
    assert max(errors("hopper", *problem(128, 256, 256, jnp.bfloat16))) < 0.02


@pytest.mark.parametrize("impl, call", [("triton", "__gpu"), ("mgpu", "mosaic_gpu"), ("hopper", "mosaic_gpu")])
def test_the_candidates_lower_for_cuda(impl, call, monkeypatch, capsys):
    """Checks types, layouts and the size of shared memory; a GPU is needed to compile what comes out."""
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, debug=impl == "triton"))
    card = types.SimpleNamespace(core_count=132)        # jax's transposed kernel asks the first device
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda *a: devices(*a) if a or impl != "mgpu" else [card])
    *_, tile_expert = problem(128, 16, 16, jnp.bfloat16)
    x = jax.ShapeDtypeStruct((6 * 128, 2048), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4, 2048, 1024), jnp.bfloat16)
    def f(x, w):
        y, pull = jax.vjp(lambda x, w: kernels.grouped_matmul(x, w, tile_expert, impl, "gpu"), x, w)
        return y, pull(y)

    device = jax.sharding.AbstractDevice(device_kind=H100, num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        assert lowered(f, x, w).count(f"@{call}") >= 3
    printed = capsys.readouterr().out
    assert '"scf.for"' not in printed           # MLIR prints a module in this form if it is not valid
    assert impl != "triton" or "scf.for" in printed


def test_widths_that_the_candidates_cannot_take_are_refused():
    x, w, tile_expert = problem(8, 32, 32, jnp.float32)
    with pytest.raises(ValueError, match="tiles of 128, found float32 in tiles of 8"):
        kernels.grouped_matmul(x, w, tile_expert, "hopper", "gpu")
    with pytest.raises(ValueError, match="impl='mgpu': expected bfloat16"):
        kernels.grouped_matmul(x, w, tile_expert, "mgpu", "gpu")
    with pytest.raises(ValueError, match="impl='triton': tile: expected a multiple of 16, found 8"):
        kernels.grouped_matmul(x, w, tile_expert, "triton", "gpu")


def test_packed_attention_tells_cudnn_where_documents_begin(monkeypatch):
    """Lengths and offsets of the documents of each row, in the form that cuDNN's sequence packing takes."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    seen = {}
    monkeypatch.setattr(cudnn, "dot_product_attention", lambda q, k, v, **given: seen.update(given) or q)
    segment = jnp.asarray([[1, 1, 2, 2, 2, 3, 0, 0], [1] * 8])
    q = jnp.zeros((2, 8, 2, 16), jnp.bfloat16)
    with jax.disable_jit():
        hopper.packed_attention(q, q, q, segment, 4, documents=5)
    assert seen["q_seqlen"].tolist() == [[2, 3, 1, 2, -1], [8, -1, -1, -1, -1]]
    assert seen["q_offsets"].tolist() == [[0, 2, 5, 6, -1, -1], [0, -1, -1, -1, -1, -1]]
    assert seen["sliding_window_length"] == 4

    seen.clear()
    monkeypatch.setattr(hopper, "cudnn_attention", lambda *_: "cudnn")
    with jax.disable_jit():                                     # four documents, a list of three: another way
        assert hopper.packed_attention(q, q, q, segment, 4, documents=3) == "cudnn"
    assert not seen


@pytest.mark.slow
def test_the_measurements_run_dry(tmp_path):
    """Every part of tests/gpu.py, tiny, on a CPU: no row is wrong and none has failed."""
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "tests/gpu.py", "--prepare"], cwd=ROOT, check=True, timeout=600)
    command = [sys.executable, "tests/gpu.py", "--dry", f"--out={tmp_path}", "--minutes=35"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"][0] for row in rows} == set("abcde")
