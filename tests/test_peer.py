"""The model against its PyTorch twin: a second witness, written from the recipe (see peer_torch.py)."""
import pytest

import model

pytest.importorskip("torch", reason="the PyTorch twin needs torch: pip install torch==2.13.0")
import peer_torch  # noqa: E402

TOLERANCE = 1e-4    # largest difference over largest value, both sides in float32


@pytest.mark.slow
@pytest.mark.parametrize("name", peer_torch.SHAPES)
def test_the_torch_twin_agrees(name):
    found = peer_torch.deviations(model.ModelConfig(**peer_torch.TINY | peer_torch.SHAPES[name]), seed=1)
    assert all(error < TOLERANCE for error in found.values()), {k: v for k, v in found.items() if v >= TOLERANCE}
