"""Many devices: the mesh, expert parallelism against one device, the plan, and the programs for real pods."""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as Spec

import kernels
import moe
import train
from test_kernels import close, normal
from test_moe import weights
from test_train import config, load, run_steps, text                                        # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent
T, E, K, D = 48, 8, 2, 12
SKEW = {"even": jnp.zeros(E), "two take all": jnp.where(jnp.arange(E) < 2, 50.0, 0.0)}


X_TD, WEIGHTS = normal(T, D), weights(E)


def on_devices(P, exchange, factor, bias_E):
    """The value, gradients, loads and drops of one MoE layer on P devices, put together as one device has them."""
    mesh = jax.make_mesh((P,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:P])

    def layer(x, p):
        def f(x, p):
            y_TD, r, load_E, dropped = moe.parallel_moe(x, p, bias_E, K, 0.0, "expert", exchange, factor)
            return jnp.sum(jnp.sin(y_TD)) + jnp.sum(r.z_T), (y_TD, load_E, dropped)
        (_, (y_TD, *counts)), (dx, dp) = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(x, p)
        dp["router_DE"] = lax.psum(dp["router_DE"], "expert")
        return y_TD, dx, dp, lax.psum(counts, "expert")
    specs = {name: Spec() if name == "router_DE" else Spec("expert") for name in WEIGHTS}
    run = jax.shard_map(layer, mesh=mesh, in_specs=(Spec("expert"), specs), check_vma=False,
                        out_specs=(Spec("expert"), Spec("expert"), specs, Spec()))
    return jax.jit(run)(X_TD, WEIGHTS)


@pytest.mark.parametrize("P, exchange, factor, skew", [
    (1, "ring", 0.0, "even"), (2, "ring", 2.0, "even"), (4, "ring", 4.0, "two take all"), (8, "ring", 8.0, "even"),
    (2, "ring", 0.0, "two take all"), (8, "ring", 0.0, "two take all"), (8, "ring", 0.0, "even"),
    (1, "ragged", 1.0, "even"), (2, "ragged", 2.0, "two take all"), (4, "ragged", 4.0, "even"),
    (8, "ragged", 8.0, "two take all"), (8, "ragged", 8.0, "even")])
def test_sharing_experts_changes_nothing_when_nothing_overflows(P, exchange, factor, skew):
    """Outputs and the gradients of tokens, router and experts are those of one device, which never drops."""
    y_TD, dx, dp, (load_E, dropped) = on_devices(P, exchange, factor, SKEW[skew])

    def f(x, p):
        y_TD, r, load_E = moe.moe(x, p, SKEW[skew], K)
        return jnp.sum(jnp.sin(y_TD)) + jnp.sum(r.z_T), (y_TD, load_E)
    grad = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))
    (_, (want_y, want_load)), (want_dx, want_dp) = grad(X_TD, WEIGHTS)
    close((y_TD, dx, dp), (want_y, want_dx, want_dp))
    assert load_E.tolist() == want_load.tolist() and int(dropped) == 0


@pytest.mark.parametrize("P, factor, skew", [(2, 1.0, "two take all"), (4, 1.0, "even"), (8, 1.25, "even")])
def test_overflow_drops_the_last_in_expert_order_and_both_exchanges_agree(P, factor, skew):
    """Against the definition in numpy: of a shard's choices, by expert and then by token, the first C count."""
    runs = {name: on_devices(P, name, factor, SKEW[skew]) for name in moe.EXCHANGES}
    (y_TD, *_, (_, dropped)), p = runs["ring"], WEIGHTS
    r = jax.tree.map(np.asarray, moe.route(X_TD, p["router_DE"], SKEW[skew], K))
    capacity, kept_TK = math.ceil(factor * (T // P * K)), np.zeros((T, K), bool)
    for shard in range(P):
        on_shard = [(e, t, j) for (t, j), e in np.ndenumerate(r.expert_TK) if e * P // E == shard]
        for _, t, j in sorted(on_shard)[:capacity]:
            kept_TK[t, j] = True
    assert 0 < int(dropped) == (~kept_TK).sum(), "the case must overflow"
    gate_TE = np.zeros((T, E))
    np.put_along_axis(gate_TE, r.expert_TK, r.gate_TK * kept_TK, 1)
    h_ETF = jax.nn.silu(X_TD @ p["gate_EDF"]) * (X_TD @ p["up_EDF"])
    close(y_TD, np.einsum("TE,ETD->TD", gate_TE, h_ETF @ p["down_EFD"]))
    for a, b in zip(jax.tree.leaves(runs["ring"]), jax.tree.leaves(runs["ragged"]), strict=True):
        close(a, b)


@pytest.mark.parametrize("capacity", [3, 40, 1000])
def test_ragged_plans_fit_together(capacity):
    """On every device: chunks do not overlap where they land, both sides agree on sizes, `back` undoes `there`,
    and offsets are the sender's view (a receiver-local view fails the second assertion)."""
    rng, S, tile = np.random.default_rng(3), 4, 8
    load_SE = jnp.asarray(rng.integers(0, 12, (S, E)) * (rng.random((S, E)) < 0.7), jnp.int32)
    plans = [jax.tree.map(np.asarray, moe.ragged_plan(load_SE, capacity, tile, me)) for me in range(S)]
    e, rows = E // S, moe.ragged_rows(capacity, E // S, tile)
    for me, (there, back, tile_expert) in enumerate(plans):
        landed = np.full(rows, -1)
        for sender in range(S):
            theirs = plans[sender][0]
            for j in range(e):
                chunk = me * e + j
                a, n = theirs.to[chunk], theirs.size[chunk]
                assert n == there.arriving[sender * e + j]
                assert (landed[a:a + n] == -1).all() and (tile_expert[np.arange(a, a + n) // tile] == j).all()
                landed[a:a + n] = sender
                assert (back.start[sender * e + j], back.size[sender * e + j]) == (a, n)
                assert back.to[sender * e + j] == theirs.start[chunk]
        assert (landed >= 0).sum() == min(capacity, load_SE[:, me * e:(me + 1) * e].sum())
        assert landed[-1] == -1 and set(tile_expert.tolist()) - {e} == set(range(e)), "each owns a tile; e: nobody"
        assert back.arriving.tolist() == there.size.tolist()


# ------------------------------------------------------------------------------------------------- whole steps

@pytest.mark.parametrize("mesh", [
    pytest.param(dict(replicas=2, expert_parallel=2), marks=pytest.mark.slow),
    pytest.param(dict(expert_parallel=4, exchange="ragged", capacity_factor=4.0), marks=pytest.mark.slow),
    pytest.param(dict(replicas=2, expert_parallel=4, accumulate=1), marks=pytest.mark.slow)], ids=str)
def test_one_device_equals_eight_on_every_mesh(config, mesh):                                 # noqa: F811
    """Losses within 2e-6 of one device, the same bias and the same weights, over six steps."""
    (want, one), (got, eight) = (run_steps(*load(config, devices=n, **keys), 6)
                                 for n, keys in ((1, {}), (8, mesh)))
    assert np.abs(got - want).max() < 2e-6
    np.testing.assert_allclose(one.bias_LE, eight.bias_LE, atol=1e-4)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
    gate_LEDF = eight.params["layers"]["gate_EDF"]
    c, t = load(config, devices=8, **mesh)
    share = 8 // t.replicas                             # experts over "expert", D over "data"
    assert gate_LEDF.addressable_shards[0].data.size == gate_LEDF.size // share


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(expert_parallel=2), dict()], ids=str)
def test_muonh_deals_whole_matrices_and_stays_the_same(config, mesh):                          # noqa: F811
    """E = 4 divides over 2 x 4? No: layers are dealt, padded; with experts over 2 alone they are split as well."""
    keys = dict(optimizer="muonh", recipe="v2", steps=3)
    (want, one), (got, eight) = (run_steps(*load(config, devices=n, **keys, **more), 3)
                                 for n, more in ((1, {}), (8, mesh)))
    np.testing.assert_allclose(got, want, atol=2e-4)                                # bfloat16 Newton-Schulz
    # rounding may turn the sign of a gradient near zero, and Adam's first steps are signs: hence a rare exception
    for a, b in zip(map(np.asarray, jax.tree.leaves(one.params)), map(np.asarray, jax.tree.leaves(eight.params))):
        assert np.mean(np.abs(a - b) > 2e-2 * np.abs(a).max()) < 1e-3


def test_a_stack_is_dealt_by_expert_or_by_padded_layer():
    mesh = AbstractMesh((1, 4, 2), train.MESH)
    shapes = [(3, 16, 8, 8), (3, 6, 8, 8), (3, 8, 8), (8, 8)]
    dealt = [train.deal(jnp.zeros(shape), mesh) for shape in shapes]
    assert [x.shape for x, _ in dealt] == [(3, 16, 8, 8), (4, 6, 8, 8), (4, 8, 8), (8, 8)]
    assert [s for _, s in dealt] == [Spec(None, ("expert", "data")), Spec("data", "expert"), Spec("data"), Spec()]
