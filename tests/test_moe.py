"""The routed experts against the loop over every expert, under kind and unkind routing."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe
from test_kernels import close, normal

D, F = 12, 10


def weights(E):
    return {"router_DE": normal(D, E), "gate_EDF": normal(E, D, F) / 3, "up_EDF": normal(E, D, F) / 3,
            "down_EFD": normal(E, F, D) / 3}


@pytest.mark.parametrize("T, E, K, bias", [
    (40, 8, 2, "none"), (40, 8, 2, "two take all"), (40, 8, 2, "one starves"), (37, 5, 3, "none"),
    (3, 8, 2, "none"), (40, 4, 4, "none"), (200, 4, 1, "two take all"), (64, 1, 1, "none")])
def test_moe_is_its_dense_loop(T, E, K, bias):
    combine_sum = 2.5 if T == 37 else 0.0
    p, x_TD = weights(E), normal(T, D)
    bias_E = {"none": jnp.zeros(E), "two take all": jnp.where(jnp.arange(E) < 2, 50.0, 0.0),
              "one starves": jnp.where(jnp.arange(E) == 1, -50.0, 0.0)}[bias]

    def run(layer):
        def f(x, p):
            y_TD, r, load_E = layer(x, p, bias_E, K, combine_sum)
            return jnp.sum(jnp.sin(y_TD)) + jnp.sum(r.z_T), (y_TD, load_E)
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(x_TD, p)
    fast = run(moe.moe)
    close(fast, run(moe.dense_moe))
    load_E = np.asarray(fast[0][1][1])
    assert load_E.sum() == T * K
    if bias == "one starves" and K < E:
        assert load_E[1] == 0
    if bias == "two take all" and K == 2:
        assert load_E[0] == load_E[1] == T


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
    """No scatter in the gradient of the tokens and the router; that of the experts sums tiles, in kernels.py."""
    p, x_TD = weights(8), normal(40, D)
    f = jax.grad(lambda x, router: jnp.sum(moe.moe(x, {**p, "router_DE": router}, jnp.zeros(8), 2)[0]), (0, 1))
    text = str(jax.make_jaxpr(f)(x_TD, p["router_DE"]))
    assert "scatter" not in text, "a gather in moe.py lost its hand-written transpose"
