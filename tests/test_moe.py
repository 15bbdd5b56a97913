"""The routed experts of one layer against the loop over every expert, even and extreme loads."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe

D = 12


@pytest.mark.parametrize("T, E, K, bias, impl", [
    (40, 8, 2, "none", None),
    (40, 8, 2, "two take all", None),
    (40, 8, 2, "one starves", None),
    (37, 5, 3, "none", None),
    (3, 8, 2, "none", None),
    (200, 4, 1, "two take all", None),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (40, 4, 4, "none", None), (64, 1, 1, "none", None))),
    (40, 8, 2, "two take all", "pallas_tpu"),
    (40, 8, 2, "one starves", "tiles"),
    (40, 8, 2, "none", "padded")])
def test_the_sparse_layer_equals_the_dense_loop(T, E, K, bias, impl, layer_weights, normal, routing,
                                                close):
    """Outputs, loads, and the gradients of tokens, router and experts."""
    c = routing(K, combine_sum=2.5 if T == 37 else 0.0)
    p, x_TD = layer_weights(E), normal(T, D)
    bias_E = {"none": jnp.zeros(E),
              "two take all": jnp.where(jnp.arange(E) < 2, 50.0, 0.0),
              "one starves": jnp.where(jnp.arange(E) == 1, -50.0, 0.0)}[bias]

    def run(layer):
        def f(x, p):
            y_TD, stats = layer(x, p, bias_E, c)
            return jnp.sum(jnp.sin(y_TD)) + jnp.sum(stats.z_T), (y_TD, stats.load_E)
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(x_TD, p)
    # "padded": as on a TPU, where F = 10 becomes 256; the implementation is one that a CPU has
    padded = dict(impl="tiles", platform="tpu") if impl == "padded" else dict(impl=impl)
    fast = run(functools.partial(moe.moe, **padded))
    close(fast, run(moe.dense_moe))
    load_E = np.asarray(fast[0][1][1])
    assert load_E.sum() == T * K
    if bias == "one starves":
        assert load_E[1] == 0
    if bias == "two take all" and K == 2:
        assert load_E[0] == load_E[1] == T


def test_the_order_of_experts_does_not_matter(layer_weights, normal, routing, close):
    p, x_TD, bias_E = layer_weights(8), normal(60, D), normal(8)
    order = jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    mixed = {k: w[:, order] if k == "router_DE" else w[order] for k, w in p.items()}

    def run(p, bias_E):
        f = lambda x: jnp.sum(jnp.sin(moe.moe(x, p, bias_E, routing(2))[0]))
        return jax.jit(jax.value_and_grad(f))(x_TD)
    close(run(mixed, bias_E[order]), run(p, bias_E))


def test_a_bad_token_does_not_spread(layer_weights, normal, routing, close):
    """A NaN in the last token must reach no rows of padding (an index past the end that is clamped
    would bring it there, and NaN * 0 is NaN), and no other token, forward or backward."""
    p, x_TD, c = layer_weights(8), normal(40, D), routing(2)

    def others(x_TD):
        y_TD = moe.moe(x_TD, p, jnp.zeros(8), c)[0]
        return jnp.sum(y_TD[:-1]), y_TD
    f = jax.jit(jax.value_and_grad(others, has_aux=True))
    bad_TD = x_TD.at[-1].set(jnp.nan)
    (_, want), dwant = f(x_TD)
    (_, got), dgot = f(bad_TD)
    close((got[:-1], dgot[:-1]), (want[:-1], dwant[:-1]))
    assert not np.isfinite(np.asarray(got[-1])).any()

    expert_TK, *_ = moe.route(x_TD, p["router_DE"], jnp.zeros(8), c)
    d = jax.jit(moe.dispatch, static_argnums=1)(expert_TK, 8)
    x_RD = np.asarray(moe.spread(bad_TD, d))
    assert (x_RD[np.asarray(d.token_R) == 40] == 0).all()
    assert np.isnan(x_RD).all(axis=1).sum() == 2


def test_garbage_in_rows_of_padding_changes_nothing(rng, normal, close):
    """NaN in the padding of the experts' output, as memory that no kernel wrote would have."""
    expert_TK = jnp.asarray(rng.integers(0, 4, (30, 1)), jnp.int32)
    d = jax.jit(moe.dispatch, static_argnums=(1, 2))(expert_TK, 4, 8)
    weight_TK, y_RD, g_TD = normal(30, 1), normal(len(d.token_R), D), normal(30, D)
    bad_RD = jnp.where((d.token_R == 30)[:, None], jnp.nan, y_RD)

    @jax.jit
    def run(y_RD):
        weighted = lambda y_RD, weight_TK: moe.combine(y_RD * moe.spread_weights(weight_TK, d), d)
        y_TD, vjp = jax.vjp(weighted, y_RD, weight_TK)
        return y_TD, vjp(g_TD)
    close(run(bad_RD), run(y_RD))


@pytest.mark.parametrize("T, E, K", [(1, 4, 2), (40, 8, 2), (129, 3, 2), (64, 16, 4)])
def test_dispatch_gives_every_assignment_one_row_of_its_expert(T, E, K, rng):
    expert_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    plan = jax.jit(moe.dispatch, static_argnums=1)
    d = jax.tree.map(np.asarray, plan(jnp.asarray(expert_TK), E))
    assert sorted(d.assignment_R[d.assignment_R < T * K].tolist()) == list(range(T * K))
    rows = d.row_TK.reshape(-1)
    assert (d.assignment_R[rows] == np.arange(T * K)).all()
    assert (d.token_R[rows] == np.arange(T * K) // K).all()
    tile = len(d.token_R) // len(d.tile_expert)
    assert (d.tile_expert[rows // tile] == expert_TK.reshape(-1)).all()
    assert set(range(E)) <= set(d.tile_expert.tolist()), "no tile, so no weight gradient"
    assert (d.token_R[d.assignment_R == T * K] == T).all()


def test_the_example_in_dispatch_s_docstring():
    d = moe.dispatch(jnp.asarray([[1], [0], [1]]), 2, tile=2)
    assert d.row_TK.tolist() == [[2], [0], [3]]
    assert d.token_R.tolist() == [1, 3, 0, 2, 3, 3, 3, 3]
    assert d.tile_expert.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("skip, capacity", [(0, 20), (7, 20), (60, 40), (0, 80)])
def test_dispatch_keeps_a_window_of_the_sorted_assignments(skip, capacity, rng):
    """Of the assignments that are here, by expert and then by token: `skip` are passed over, the
    next `capacity` get rows, all others point to a last row that is padding."""
    expert_TK = rng.integers(0, 5, (40, 2)).astype(np.int32)            # 4 stands for "not here"
    here = sorted((e, a) for a, e in enumerate(expert_TK.reshape(-1)) if e < 4)
    want = {a for _, a in here[skip:skip + capacity]}
    plan = jax.jit(moe.dispatch, static_argnums=(1, 2, 3))
    d = jax.tree.map(np.asarray, plan(jnp.asarray(expert_TK), 4, 8, capacity, skip))
    assert {a for a in d.assignment_R.tolist() if a < 80} == want
    last = len(d.token_R) - 1
    for a, row in enumerate(d.row_TK.reshape(-1).tolist()):
        assert d.assignment_R[row] == a if a in want else row == last
    assert d.token_R[last] == 40


def test_ties_choose_the_lower_expert_and_still_k_of_them(layer_weights, routing):
    expert_TK, _, _ = moe.route(jnp.zeros((5, D)), layer_weights(6)["router_DE"], jnp.zeros(6),
                                routing(3))
    assert np.asarray(expert_TK).tolist() == [[0, 1, 2]] * 5


def test_the_bias_chooses_experts_and_does_not_change_their_weights(layer_weights, normal, routing,
                                                                    close):
    x_TD, p, c = normal(50, D), layer_weights(6), routing(2)
    plain_TK, _, _ = moe.route(x_TD, p["router_DE"], jnp.zeros(6), c)
    expert_TK, weight_TK, _ = moe.route(x_TD, p["router_DE"], jnp.arange(6) * 0.3, c)
    assert (np.asarray(plain_TK) != np.asarray(expert_TK)).any()
    logits_TE = np.asarray(x_TD @ p["router_DE"])
    close(weight_TK, 1 / (1 + np.exp(-np.take_along_axis(logits_TE, np.asarray(expert_TK), 1))))
    gradient = jax.grad(lambda b: jnp.sum(moe.moe(x_TD, p, b, c)[0] ** 2))(jnp.zeros(6))
    assert np.asarray(gradient).tolist() == [0.0] * 6


def test_combine_weights_are_rescaled_to_their_sum(layer_weights, normal, routing, close):
    _, weight_TK, _ = moe.route(normal(50, D), layer_weights(6)["router_DE"], jnp.zeros(6),
                                routing(3, combine_sum=2.5))
    close(jnp.sum(weight_TK, axis=1), jnp.full(50, 2.5))


def test_too_many_assignments_for_the_sort_key_are_refused():
    with pytest.raises(ValueError, match="overflow"):
        jax.eval_shape(lambda e: moe.dispatch(e, 1 << 12),
                       jax.ShapeDtypeStruct((1 << 18, 2), jnp.int32))


def test_tokens_move_by_gathers_in_both_directions(layer_weights, normal, routing):
    """No scatter in the gradient of the tokens, the router or the experts."""
    p, x_TD = layer_weights(8), normal(40, D)

    def f(x, p):
        return jnp.sum(moe.moe(x, p, jnp.zeros(8), routing(2))[0])
    text = str(jax.make_jaxpr(jax.grad(f, (0, 1)))(x_TD, p))
    assert "scatter" not in text, "a gather in moe.py lost its hand-written transpose"


def test_weights_that_add_up_to_a_constant_survive_very_negative_logits(routing):
    """Logits of -60: the sum of the sigmoids is 1e-26, whose square is 0 in float32, and at -120 it is 0 itself."""
    for level in (0.0, -60.0, -120.0):
        def first(router_DE):
            weight_TK = moe.route(jnp.ones((1, 1)), router_DE, jnp.zeros(3), routing(2, combine_sum=2.5))[1]
            return weight_TK[0, 0], weight_TK
        gradient, weight_TK = jax.grad(first, has_aux=True)(level + jnp.asarray([[0.5, -0.5, -3.0]]))
        assert float(weight_TK.sum()) == pytest.approx(2.5) and weight_TK[0, 0] > weight_TK[0, 1] > 0
        assert np.isfinite(gradient).all() and gradient[0, 0] > 0.1 and gradient[0, 2] == 0
