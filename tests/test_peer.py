"""The model and the optimizer against their PyTorch twin, peer_torch.py."""
import dataclasses

import pytest

import kernels
import model
import train

pytest.importorskip("torch", reason="the PyTorch twin needs torch: pip install torch==2.13.0")
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
