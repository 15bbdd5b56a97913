"""Quantile balancing against brute force, by its exact properties, and on vectors whose optimum is known."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as Spec

import balance


def alternate(s, bias, K):
    """One update from scores s [T,E] on bias [E]."""
    s, bias = jnp.asarray(s, jnp.float32), jnp.asarray(bias, jnp.float32)
    margin = balance.select(s, bias, K)[1]
    return balance.next_bias(margin[None], jnp.ones(len(s), bool), bias[None], K)[0]


def loads(s, bias, K):
    return np.bincount(np.asarray(balance.select(jnp.asarray(s, jnp.float32), bias, K)[0]).reshape(-1),
                       minlength=s.shape[1])


def dual(s, beta, K):
    """The LP's dual objective at beta, with the best alpha for it."""
    alpha = np.sort(s - beta, axis=1)[:, ::-1][:, K:K + 1]
    return np.maximum(0, s - alpha - beta).sum() + K * alpha.sum() + len(s) * K / s.shape[1] * beta.sum()


@pytest.mark.parametrize("shape", [(1, 7, 3), (2, 64, 5), (3, 1000, 2)])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros of both signs", "huge and tiny"])
def test_qth_largest_is_a_partition_to_the_bit(shape, kind):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    x = {"normal": x, "ties": np.round(x),
         "zeros of both signs": np.where(x > 0.5, 0.0, np.where(x < -0.5, -0.0, x)),
         "huge and tiny": x * 10.0 ** rng.integers(-40, 38, shape)}[kind].astype(np.float32)
    x.reshape(-1)[:2] = [np.inf, -np.inf]
    T = shape[1]
    for q in {1, 2, T // 2, T}:
        want = np.partition(x, T - q, axis=1)[:, T - q]
        got = np.asarray(balance.qth_largest(jnp.asarray(x), jnp.ones(T, bool), q))
        assert (got == want).all()


def test_select_is_brute_force():
    rng = np.random.default_rng(1)
    s, bias = rng.standard_normal((50, 6)).astype(np.float32), rng.standard_normal(6).astype(np.float32)
    expert, margin = balance.select(jnp.asarray(s), jnp.asarray(bias), 2)
    order = np.argsort(-(s + bias), axis=1)
    assert (np.asarray(expert) == order[:, :2]).all()
    np.testing.assert_array_equal(np.asarray(margin), s - np.take_along_axis(s + bias, order[:, 2:3], 1))


def test_the_new_bias_is_the_order_statistics():
    rng = np.random.default_rng(2)
    s, bias, K = rng.standard_normal((40, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32), 2
    alpha = np.sort(s + bias, axis=1)[:, ::-1][:, K]
    beta = np.sort(s - alpha[:, None], axis=0)[::-1][40 * K // 8 - 1]          # the q-th largest margin
    np.testing.assert_allclose(alternate(s, bias, K), beta.mean() - beta, atol=1e-6)


# Optimum by brute force over all feasible assignments; all three are unique.
VECTORS = {
    "A": (1, 57, [[11, 9, 8], [9, 9, 9], [13, 0, 4], [10, 2, 3], [10, 8, 5], [5, 6, 8]]),
    "B": (2, 60, [[12, 2, 1, 2], [8, 8, 4, 0], [7, 6, 8, 7], [13, 1, 8, 0]]),
    "C": (2, 82, [[10, 8, 0, 8], [8, 5, 6, 2], [13, 0, 2, 3], [9, 4, 1, 0], [4, 0, 1, 9], [5, 6, 7, 2]])}


def best_assignment(s, K):
    """Value of the best assignment with K experts a token and equal loads, by trying all of them."""
    q, best = len(s) * K // s.shape[1], -np.inf
    rows = list(itertools.combinations(range(s.shape[1]), K))
    for choice in itertools.product(rows, repeat=len(s)):
        if (np.bincount(np.concatenate(choice), minlength=s.shape[1]) == q).all():
            best = max(best, sum(s[i, j] for i, row in enumerate(choice) for j in row))
    return best


@pytest.mark.parametrize("name", VECTORS)
def test_the_integer_vectors_reach_their_optimum(name):
    K, optimum, s = VECTORS[name]
    s = np.array(s, np.float32)
    if name != "C":                                             # 46,656 assignments: the small two are enough
        assert best_assignment(s, K) == optimum
    bias, values = jnp.zeros(s.shape[1]), []
    for _ in range(8):
        bias = alternate(s, bias, K)
        values.append(dual(s, -np.asarray(bias), K))
    assert values[-1] == pytest.approx(optimum, abs=1e-4)
    assert all(b <= a + 1e-4 for a, b in zip(values, values[1:])), "the dual must never rise"


def test_a_cold_start_balances():
    rng = np.random.default_rng(0)
    s = rng.standard_normal((4096, 64)) + rng.standard_normal(64)
    bias, violation = jnp.zeros(64), []
    for _ in range(10):
        bias = alternate(s, bias, 4)
        violation.append(float(balance.max_violation(loads(s, bias, 4))))
    assert violation[0] < 0.5 and violation[1] < 0.15 and violation[2] < 0.10 and violation[9] < 0.05


def test_a_dead_expert_lives_after_one_update():
    rng = np.random.default_rng(3)
    s = rng.standard_normal((4096, 64))
    s[:, 5] -= 50
    assert loads(s, jnp.zeros(64), 4)[5] == 0
    assert loads(s, alternate(s, jnp.zeros(64), 4), 4)[5] > 200                # q = 256


def test_online_violation_stays_near_the_sampling_floor():
    rng = np.random.default_rng(4)
    offset, bias, violation = rng.standard_normal(64), jnp.zeros(64), []
    for step in range(25):
        s = rng.standard_normal((4096, 64)) + offset
        violation.append(float(balance.max_violation(loads(s, bias, 4))))      # the old bias routes ...
        bias = alternate(s, bias, 4)                                            # ... the new one replaces it
    assert np.mean(violation[5:]) < 1.5 * balance.sampling_floor(4096, 64, 4)


def test_shifts_of_tokens_and_experts_do_what_the_program_says():
    rng = np.random.default_rng(5)
    s, bias = np.round(rng.standard_normal((64, 8)) * 64) / 64, np.round(rng.standard_normal(8) * 64) / 64
    bias -= bias.mean()
    per_token, per_expert = rng.integers(-4, 5, (64, 1)), rng.integers(-4, 5, 8)
    base = np.asarray(alternate(s, bias, 2))
    np.testing.assert_allclose(alternate(s + per_token, bias, 2), base, atol=1e-6)
    moved = alternate(s + per_expert, bias - per_expert, 2)
    np.testing.assert_allclose(moved, base - (per_expert - per_expert.mean()), atol=1e-6)
    np.testing.assert_allclose(alternate(s, bias + 3, 2), base, atol=1e-6)
    assert abs(float(base.mean())) < 1e-6, "the bias is centred"


def test_padding_of_any_content_changes_nothing():
    rng = np.random.default_rng(6)
    margin = rng.standard_normal((2, 60, 8)).astype(np.float32)
    want = balance.next_bias(jnp.asarray(margin), jnp.ones(60, bool), jnp.zeros((2, 8)), 2)
    for content in (0.0, 1e30, -1e30, np.inf, np.nan):
        padded = np.concatenate([margin, np.full((2, 20, 8), content, np.float32)], axis=1)
        got = balance.next_bias(jnp.asarray(padded), jnp.arange(80) < 60, jnp.zeros((2, 8)), 2)
        np.testing.assert_array_equal(got, want)


def test_the_statistic_is_the_same_on_any_number_of_devices():
    rng = np.random.default_rng(7)
    margin, valid = jnp.asarray(rng.standard_normal((3, 96, 8)), jnp.float32), jnp.asarray(rng.random(96) < 0.8)
    results = []
    for n in (1, 2, 4, 8):
        mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
        f = jax.shard_map(lambda m, v, b: balance.next_bias(m, v, b, 2, "data"), mesh=mesh,
                          in_specs=(Spec(None, "data"), Spec("data"), Spec()), out_specs=Spec(), check_vma=False)
        results.append(np.asarray(jax.jit(f)(margin, valid, jnp.zeros((3, 8)))))
    assert all((r == results[0]).all() for r in results)
    np.testing.assert_allclose(results[0], balance.next_bias(margin, valid, jnp.zeros((3, 8)), 2), atol=1e-6)


def test_k_equal_e_has_nothing_to_balance():
    s, bias = jnp.ones((5, 3)), jnp.asarray([1.0, 2.0, 3.0])
    expert, _ = balance.select(s, bias, 3)
    assert sorted(np.asarray(expert)[0].tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(alternate(s, bias, 3), bias)


def test_fewer_assignments_than_experts():
    s = np.random.default_rng(8).standard_normal((2, 64))
    assert np.isfinite(np.asarray(alternate(s, np.zeros(64), 4))).all()


def test_a_nan_logit_does_not_reach_the_bias():
    margin = jnp.zeros((2, 8, 4)).at[0, :, 1].set(jnp.nan).at[1].set(jax.random.normal(jax.random.key(0), (8, 4)))
    old = jnp.full((2, 4), 7.0)
    new = np.asarray(balance.next_bias(margin, jnp.ones(8, bool), old, 1))
    assert (new[0] == 7).all() and np.isfinite(new[1]).all() and (new[1] != 7).any()


def test_all_padding_keeps_the_bias():
    old = jnp.full((1, 4), 7.0)
    np.testing.assert_array_equal(balance.next_bias(jnp.ones((1, 8, 4)), jnp.zeros(8, bool), old, 1), old)


def test_rank_arithmetic_does_not_overflow():
    """46M tokens x 8 of 384 experts passes 2**31; q is computed on reduced fractions."""
    import math
    tokens, K, E = 46_137_344, 8, 384
    g = math.gcd(K, E)
    k, e = K // g, E // g
    assert (tokens // e) * k + (tokens % e) * k // e == tokens * K // E


def test_load_statistics_by_hand():
    load = jnp.asarray([[4.0, 4, 4, 4], [16, 0, 0, 0], [6, 4, 4, 2]])
    np.testing.assert_allclose(balance.max_violation(load), [0, 3, 0.5])
    np.testing.assert_allclose(balance.drop_fraction(load, 1.0), [0, 12 / 16, 2 / 16])
    np.testing.assert_allclose(balance.drop_fraction(load, 1.25), [0, 11 / 16, 1 / 16])
    assert balance.sampling_floor(4096, 8, 8) == 0.0
