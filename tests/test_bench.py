"""The stopwatch and the roofline of tests/bench.py."""

import jax
import pytest

import model
from tests import bench


def test_the_stopwatch_times_every_form_and_stops_at_the_budget():
    calls = {"slow": 0, "quick": 0}

    def form(name, seconds):
        def run():
            calls[name] += 1
            bench.time.sleep(seconds)
            return jax.numpy.zeros(1)
        return run

    best = bench.stopwatch({"slow": form("slow", 0.05), "quick": form("quick", 0.0)}, 5, budget=0.1)
    assert best["slow"] >= 0.05 > best["quick"]
    assert calls["quick"] == 6 and calls["slow"] <= 4          # one call compiles


def test_every_form_of_a_kernel_can_be_traced():
    """What `bench.py kernels` times, without the time."""
    for name, (forms, args) in bench.kernel_cases().items():
        sizes = {form: jax.tree.map(lambda a: a.shape, jax.eval_shape(run, *args)) for form, run in forms.items()}
        assert len(forms) >= 2 and len({*map(str, sizes.values())}) == 1, (name, sizes)


@pytest.mark.parametrize("chip", bench.BANDWIDTH)
def test_the_roofline_counts_what_the_model_counts(chip):
    """Model FLOPs of a layer's scores, its experts and the head are those of model.count."""
    c = model.ModelConfig(
        vocab_size=128_256, seq_len=4096, hidden_dim=5120, num_layers=1, num_heads=40,
        num_kv_heads=10, head_dim=128, shared_dim=5120, num_experts=64, experts_per_token=4,
        expert_dim=2560)
    rows = {name: flops for name, flops, *_ in bench.roofline(chip)}
    D, S = c.hidden_dim, c.seq_len
    not_kernels = (6 * D * 5120 + 2 * D * 128 * (40 + 20) + 2 * 40 * 128 * D + 3 * S * 40
                   + 2 * D * 64)
    experts = rows["experts, gate and up"] + rows["experts, down"]
    ours = rows["attention, full"] + experts + rows["loss over 128,256 words"]
    assert ours / 16_384 + 3 * not_kernels == model.count(c).mfu_flops
    for name, model_flops, in_view, executed, moved in bench.roofline(chip):
        assert in_view <= model_flops and moved > 0
        assert executed >= in_view, name
