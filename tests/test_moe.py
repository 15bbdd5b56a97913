"""The routed experts against the loop over every expert, under kind and unkind routing."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe
from test_kernels import close, normal, rng

D, F = 12, 10


def weights(E):
    return {"router_DE": normal(D, E), "gate_EDF": normal(E, D, F) / 3, "up_EDF": normal(E, D, F) / 3,
            "down_EFD": normal(E, F, D) / 3}


@pytest.mark.parametrize("T, E, K, bias, impl", [
    (40, 8, 2, "none", None), (40, 8, 2, "two take all", None), (40, 8, 2, "one starves", None),
    (37, 5, 3, "none", None), (3, 8, 2, "none", None), (40, 4, 4, "none", None), (200, 4, 1, "two take all", None),
    (64, 1, 1, "none", None), (40, 8, 2, "two take all", "pallas_tpu"), (40, 8, 2, "one starves", "tiles")])
def test_moe_is_its_dense_loop(T, E, K, bias, impl):
    combine_sum = 2.5 if T == 37 else 0.0
    p, x_TD = weights(E), normal(T, D)
    bias_E = {"none": jnp.zeros(E), "two take all": jnp.where(jnp.arange(E) < 2, 50.0, 0.0),
              "one starves": jnp.where(jnp.arange(E) == 1, -50.0, 0.0)}[bias]

    def run(layer):
        def f(x, p):
            y_TD, r, load_E = layer(x, p, bias_E, K, combine_sum)
            return jnp.sum(jnp.sin(y_TD)) + jnp.sum(r.z_T), (y_TD, load_E)
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(x_TD, p)
    fast = run(functools.partial(moe.moe, impl=impl))
    close(fast, run(moe.dense_moe))
    load_E = np.asarray(fast[0][1][1])
    assert load_E.sum() == T * K
    if bias == "one starves" and K < E:
        assert load_E[1] == 0
    if bias == "two take all" and K == 2:
        assert load_E[0] == load_E[1] == T


def test_the_order_of_experts_does_not_matter():
    p, x_TD, order = weights(8), normal(60, D), jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    bias_E = normal(8)
    mixed = {k: w[:, order] if k == "router_DE" else w[order] for k, w in p.items()}
    run = lambda p, bias: jax.value_and_grad(lambda x: jnp.sum(jnp.sin(moe.moe(x, p, bias, 2)[0])))(x_TD)
    close(run(mixed, bias_E[order]), run(p, bias_E))


def test_one_bad_token_stays_one_bad_token():
    """A NaN in the last token must not reach rows of padding (an index past the end that is clamped would bring
    it there, and NaN * 0 is NaN), nor any other token, forward or backward."""
    p, x_TD = weights(8), normal(40, D)
    def others(x_TD):
        y_TD = moe.moe(x_TD, p, jnp.zeros(8), 2)[0]
        return jnp.sum(y_TD[:-1]), y_TD
    f = jax.value_and_grad(others, has_aux=True)
    (_, want), dwant = f(x_TD)
    (_, got), dgot = f(x_TD.at[-1].set(jnp.nan))
    close((got[:-1], dgot[:-1]), (want[:-1], dwant[:-1]))
    assert not np.isfinite(np.asarray(got[-1])).any()
    d = moe.dispatch(moe.route(x_TD, p["router_DE"], jnp.zeros(8), 2).expert_TK, 8)
    x_RD = np.asarray(moe.spread(x_TD.at[-1].set(jnp.nan), d))
    assert (x_RD[np.asarray(d.token_R) == 40] == 0).all() and np.isnan(x_RD).all(axis=1).sum() == 2


def test_what_stands_in_padding_is_never_heard():
    """Garbage in rows of padding of the experts' output, as an unwritten tail would have, changes nothing."""
    expert_TK, gate_TK = jnp.asarray(rng.integers(0, 4, (30, 1)), jnp.int32), normal(30, 1)
    d = moe.dispatch(expert_TK, 4, tile=8)
    y_RD, g_TD = normal(len(d.token_R), D), normal(30, D)
    bad_RD = jnp.where((d.token_R == 30)[:, None], jnp.nan, y_RD)
    got, vjp = jax.vjp(lambda y, gate: moe.combine(y, gate, d), bad_RD, gate_TK)
    want, vjp_want = jax.vjp(lambda y, gate: moe.combine(y, gate, d), y_RD, gate_TK)
    close((got, vjp(g_TD)), (want, vjp_want(g_TD)))


@pytest.mark.parametrize("T, E, K", [(1, 4, 2), (40, 8, 2), (129, 3, 2), (64, 16, 4)])
def test_dispatch_places_every_assignment_once(T, E, K):
    rng = np.random.default_rng(1)
    expert_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    d = jax.tree.map(np.asarray, moe.dispatch(jnp.asarray(expert_TK), E))
    assert d.load_E.tolist() == np.bincount(expert_TK.reshape(-1), minlength=E).tolist()
    assert sorted(d.choice_R[d.choice_R < T * K].tolist()) == list(range(T * K))
    rows = d.row_TK.reshape(-1)
    assert (d.choice_R[rows] == np.arange(T * K)).all() and (d.token_R[rows] == np.arange(T * K) // K).all()
    assert (d.tile_expert[rows // (len(d.token_R) // len(d.tile_expert))] == expert_TK.reshape(-1)).all()
    assert set(range(E)) <= set(d.tile_expert.tolist()), "an expert without a tile would have no weight gradient"
    assert (d.token_R[d.choice_R == T * K] == T).all()


def test_ties_choose_the_lower_expert_and_still_k_of_them():
    r = moe.route(jnp.zeros((5, D)), weights(6)["router_DE"], jnp.zeros(6), 3)
    assert np.asarray(r.expert_TK).tolist() == [[0, 1, 2]] * 5


def test_the_bias_chooses_but_is_not_heard():
    x_TD, p = normal(50, D), weights(6)
    plain, pushed = (moe.route(x_TD, p["router_DE"], b, 2) for b in (jnp.zeros(6), jnp.arange(6) * 0.3))
    logits_TE = np.asarray(x_TD @ p["router_DE"])
    assert (np.asarray(plain.expert_TK) != np.asarray(pushed.expert_TK)).any()
    want = 1 / (1 + np.exp(-np.take_along_axis(logits_TE, np.asarray(pushed.expert_TK), 1)))
    close(pushed.gate_TK, want)
    gradient = jax.grad(lambda b: jnp.sum(moe.moe(x_TD, p, b, 2)[0] ** 2))(jnp.zeros(6))
    assert np.asarray(gradient).tolist() == [0.0] * 6


def test_combine_weights_rescale_to_their_sum():
    r = moe.route(normal(50, D), weights(6)["router_DE"], jnp.zeros(6), 3, combine_sum=2.5)
    close(jnp.sum(r.gate_TK, axis=1), jnp.full(50, 2.5))


def test_too_many_assignments_for_the_sort_key_are_refused():
    with pytest.raises(ValueError, match="overflow"):
        jax.eval_shape(lambda e: moe.dispatch(e, 1 << 12), jax.ShapeDtypeStruct((1 << 18, 2), jnp.int32))


def test_tokens_move_by_gathers_in_both_directions():
    """No scatter in the gradient of the tokens, the router or the experts."""
    p, x_TD = weights(8), normal(40, D)
    f = jax.grad(lambda x, router: jnp.sum(moe.moe(x, {**p, "router_DE": router}, jnp.zeros(8), 2)[0]), (0, 1))
    text = str(jax.make_jaxpr(f)(x_TD, p["router_DE"]))
    everything = jax.grad(lambda p: jnp.sum(moe.moe(x_TD, p, jnp.zeros(8), 2)[0]))
    text += str(jax.make_jaxpr(everything)(p))
    assert "scatter" not in text, "a gather in moe.py lost its hand-written transpose"
