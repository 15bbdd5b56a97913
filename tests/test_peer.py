"""The model and the optimizer against their PyTorch twin, peer_torch.py."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
import model
import train

pytest.importorskip("torch", reason="the PyTorch twin needs torch: pip install torch==2.13.0")
import torch  # noqa: E402
from configs import convert  # noqa: E402
from tests import peer_torch  # noqa: E402

TOLERANCE = 1e-4    # largest difference over largest value, both sides in float32


def config_of(name):
    return model.ModelConfig(**peer_torch.TINY | peer_torch.SHAPES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", peer_torch.SHAPES)
def test_model_and_optimizer_equal_the_torch_twin(name):
    found = peer_torch.deviations(config_of(name), seed=1)
    assert all(error < TOLERANCE for error in found.values()), {
        quantity: error for quantity, error in found.items() if error >= TOLERANCE}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_converted_directory_is_the_same_model_to_torch(seed, tmp_path, monkeypatch):
    """Random small shapes, through safetensors.torch alone: logits, and greedy tokens."""
    pytest.importorskip("safetensors")
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 3]))
    c = model.ModelConfig(
        vocab_size=50 + seed, seq_len=24, hidden_dim=int(rng.choice([16, 24])),
        num_layers=int(rng.integers(2, 7)), num_heads=2 * heads, num_kv_heads=heads, head_dim=8,
        shared_dim=20, num_experts=6, experts_per_token=2, expert_dim=10, window=7,
        qk_scale=1.5703274, router_z=0.0, **convert.FAMILY)
    w, bias_LE, batch = peer_torch.problem(c, 2, seed)
    def read(path, layer, index=None):
        leaf = bias_LE if path == "bias_LE" else functools.reduce(dict.get, path.split("/"), w)
        return leaf if layer is None else leaf[layer]
    monkeypatch.setattr(convert, "open_weights",
                        lambda source: convert.Weights(c, read, tmp_path, 1, {}))
    convert.convert("weights of this test", tmp_path / "public")
    theirs, peer_w, peer_bias = peer_torch.from_public(tmp_path / "public")
    assert theirs == c
    with torch.no_grad():
        want = peer_torch.forward(peer_w, peer_bias, peer_torch.to_torch(batch), theirs)[0].numpy()
    got = np.asarray(jax.jit(functools.partial(model.logits, c=c))(
        w, bias_LE, batch["tokens"], batch["segments"]))
    assert np.max(np.abs(got - want)) < TOLERANCE * np.max(np.abs(want))

    tokens, length = np.zeros((1, c.seq_len), np.int32), 4
    tokens[0, :length] = batch["tokens"][0, :length]
    step = jax.jit(lambda tokens, n: jnp.argmax(model.logits(
        w, bias_LE, tokens, (jnp.arange(c.seq_len) < n)[None].astype(jnp.int32), c, at=n - 1)))
    for n in range(length, c.seq_len):
        tokens[0, n] = step(tokens, n)
    assert peer_torch.greedy(peer_w, peer_bias, theirs, tokens[0, :length].tolist(),
                             c.seq_len - length) == tokens[0, length:].tolist()


def with_window_of_four(f):
    return lambda q, k, v, segment_BS, window, **more: f(q, k, v, segment_BS, 4, **more)


def without_cap(f):
    return lambda c, t: f(c, t)._replace(matrix_lr=13 / 3 * f(c, t).adam_lr)


V1 = model.ModelConfig(**peer_torch.TINY | dict(num_layers=2))
V2 = dataclasses.replace(config_of("V2's model"), num_layers=2, window=4)
# name: model, the quantity that tells; and another config, or where to patch and what replaces f
MUTANTS = {
    "V2's last layer has a window": (V2, "logits", dict(last_layer_full=False)),
    "V2's last layer has a window, with key offset": (
        V2, "logits", (kernels, "attention", with_window_of_four)),
    "V2's rates without a cap": (V2, "rates", (train, "rates", without_cap)),
    "the shared expert with the matrices": (V1, "step of layers/shared_up_DZ", (
        train, "GROUPS", lambda f: f | {"adamh": f["adamh"] | {"shared": "adamh"}})),
    "the first step has a rate": (V1, "step of head_DV", (
        train, "lr_multiplier", lambda f: lambda t, step: f(t, step + 1)))}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_torch_twin_notices_a_mutant(name, monkeypatch):
    c, quantity, mutant = MUTANTS[name]
    given = dataclasses.replace(c, **mutant) if isinstance(mutant, dict) else c
    if given is c:
        where, what, change = mutant
        monkeypatch.setattr(where, what, change(getattr(where, what)))
    assert peer_torch.deviations(c, given=given)[quantity] > 5 * TOLERANCE
