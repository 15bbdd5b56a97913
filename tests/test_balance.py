"""Quantile balancing: its mathematics, the linear program as oracle, the exact order statistic, and
the update on devices. What holds for every rule is in test_rivals.py."""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

import balance
import data
import moe
import train
from configs import report
from tests import lp
from tests.lp import scores


@functools.partial(jax.jit, static_argnums=(2, 3))
def _alternate(s, bias, K, centered):
    _, margin = balance.select("quantile", s, bias, K)
    valid = jnp.ones(len(s), bool)
    if centered:
        return balance.update("quantile", margin[None], valid, bias[None], K)[0][0]
    q = len(s) * K // s.shape[1]
    return bias - balance.kth_largest(margin[None], valid, q)[0]


def alternate(s, bias, K, centered=True):
    """The bias after one update from scores s [T,E] on bias [E], as numpy."""
    s, bias = jnp.asarray(s, jnp.float32), jnp.asarray(bias, jnp.float32)
    return np.asarray(_alternate(s, bias, K, centered))


def choice(s, bias, K):
    s, bias = jnp.asarray(s, jnp.float32), jnp.asarray(bias, jnp.float32)
    return np.asarray(balance.select("quantile", s, bias, K)[0])


update = jax.jit(balance.update, static_argnums=(0, 4), static_argnames="rate")
kth_largest = jax.jit(balance.kth_largest)


def dyadic(T, E, seed):
    """Scores and a bias on a grid of 1/64: float32 sums of them are exact, so identities hold to
    the bit."""
    rng = np.random.default_rng(seed)
    s, bias = rng.standard_normal((T, E)), rng.standard_normal(E)
    return np.round(s * 64) / 64, np.round(bias * 64) / 64


# ------------------------------------------------------------------------- choosing experts

@pytest.mark.parametrize("E, k", [(8, 1), (8, 8), (64, 5)])
def test_small_top_k_is_top_k_with_ties_and_infinities(E, k):
    x = np.round(np.random.default_rng(E).standard_normal((300, E)) * 4) / 4 + 0.0
    x = jnp.asarray(x, jnp.float32)
    x = x.at[1].set(2.5).at[2].set(-jnp.inf).at[3, 1:].set(-jnp.inf).at[4, E // 2].set(jnp.inf)
    ours = jax.jit(balance.small_top_k, static_argnums=1)(x, k)
    for mine, theirs in zip(ours, jax.lax.top_k(x, k)):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    assert balance.small_top_k(x.at[5, 2].set(jnp.nan), k)[1][5, 0] == 2


def test_select_is_brute_force():
    rng = np.random.default_rng(1)
    s = rng.standard_normal((50, 6)).astype(np.float32)
    bias = rng.standard_normal(6).astype(np.float32)
    expert, margin = balance.select("quantile", jnp.asarray(s), jnp.asarray(bias), 2)
    order = np.argsort(-(s + bias), axis=1)
    assert (np.asarray(expert) == order[:, :2]).all()
    cutoff = np.take_along_axis(s + bias, order[:, 2:3], 1)
    np.testing.assert_array_equal(np.asarray(margin), (s + bias) - cutoff)
    count = balance.loads(margin[None], jnp.arange(50) < 40)[0]
    assert count.tolist() == np.bincount(order[:40, :2].ravel(), minlength=6).tolist()


def test_one_expert_few_tokens_and_many_tokens():
    assert (alternate(np.ones((5, 1)), np.zeros(1), 1) == 0).all()              # one expert
    assert np.isfinite(alternate(scores(2, 64, 0), np.zeros(64), 4)).all()      # q < 1
    value, x = lp.lp_optimum(scores(10, 4, 0), 1)               # 10 tokens, 4 experts: q = 2.5
    assert set(np.round(x.sum(0), 9)) == {2.0, 3.0} and np.allclose(x, np.round(x))
    tokens, K, E = 402_653_184, 8, 384                          # tokens * K overflows int32
    assert int(balance.even_load(jnp.int32(tokens), K, E)) == tokens * K // E


def test_a_broken_margin_keeps_the_bias_of_its_layer():
    margin = jax.random.normal(jax.random.key(0), (2, 80, 8)).at[0, 3, 1].set(-jnp.nan)
    new, kept = balance.update("quantile", margin, jnp.ones(80, bool), jnp.ones((2, 8)), 2)
    assert kept.tolist() == [True, False] and (new[0] == 1).all() and not (new[1] == 1).all()


def test_no_gradient_reaches_the_bias_and_no_weight_depends_on_it(routing):
    x = jnp.asarray(scores(20, 6, 1), jnp.float32)
    router = jnp.asarray(scores(6, 8, 2), jnp.float32)

    def total(bias):
        _, weights, _ = moe.route(x, router, bias, routing(2))
        return weights.sum(), weights

    f = jax.jit(jax.grad(total, has_aux=True))
    slope, weights = f(jnp.zeros(8))
    assert (slope == 0).all()
    np.testing.assert_array_equal(weights, f(jnp.full(8, 2.0))[1])      # an equal shift


def test_an_unknown_rule_is_refused_and_the_message_says_where_others_are():
    margin, valid, bias = jnp.zeros((1, 2, 3)), jnp.ones(2, bool), jnp.zeros((1, 3))
    for call in (lambda: balance.update("quantille", margin, valid, bias, 1),
                 lambda: balance.select("quantille", margin[0], bias[0], 1),
                 lambda: balance.auxiliary_loss("quantille", margin, margin, valid, 2.0, 1)):
        with pytest.raises(ValueError, match="one of quantile, .*'quantille'.*tests import rivals"):
            call()


# ------------------------------------------------------------------------- the mathematics

def test_the_thresholds_split_every_column_at_q():
    s, q = scores(64, 8, 0), 64 * 2 // 8
    margin = s - lp.largest(s, 3, 1)
    above, at = lp.largest(margin, q + 1, 0), lp.largest(margin, q, 0)
    assert (np.sum(margin > above, axis=0) == q).all()
    assert (np.sum(margin >= at, axis=0) == q).all()


@pytest.mark.parametrize("row, column", [(0, 0), (0, 1), (0.5, 0.5), (1, 0), (0.3, 0.8)])
def test_the_dual_never_rises_in_a_half_step(row, column):
    s, beta, value = scores(64, 8, 1), np.zeros(8), np.inf
    for _ in range(12):
        alpha, new = lp.alternate(s, beta, 2, row, column)
        for now in (lp.dual(s, beta, 2, alpha), lp.dual(s, new, 2, alpha)):
            assert now <= value + 1e-9
            value = now
        beta = new


def test_no_assignment_is_worth_more_than_the_dual():
    s, rng, (T, E, K) = scores(24, 8, 2), np.random.default_rng(0), (24, 8, 2)
    bounds = [lp.dual(s, size * rng.standard_normal(E), K) for size in (0, 1, 5)]
    for _ in range(200):    # token i takes 2i, 2i+1 of a shuffled ring of experts: loads are equal
        ring, order = rng.permutation(E), rng.permutation(T)
        value = sum(s[order[i], ring[(i * K + j) % E]] for i in range(T) for j in range(K))
        assert value <= min(bounds)


def test_shifts_and_scales_of_scores_move_the_bias_alike():
    (s, bias), rng = dyadic(64, 8, 5), np.random.default_rng(6)
    base = alternate(s, bias, 2, False)
    per_token, per_expert = rng.integers(-4, 5, (64, 1)), rng.integers(-4, 5, 8)
    np.testing.assert_array_equal(alternate(s + per_token, bias, 2, False), base)
    np.testing.assert_array_equal(alternate(s, bias + 3, 2, False), base + 3)
    np.testing.assert_array_equal(choice(s, bias + 3, 2), choice(s, bias, 2))
    moved = alternate(s + per_expert, bias - per_expert, 2, False)
    np.testing.assert_array_equal(moved, base - per_expert)
    np.testing.assert_array_equal(alternate(4 * s, 4 * bias, 2, False), 4 * base)
    centered = alternate(s, bias, 2)
    np.testing.assert_allclose(centered, base - base.mean(), atol=1e-6)
    assert abs(centered.mean()) < 1e-6


def test_the_order_of_tokens_and_experts_does_not_matter():
    s, bias = scores(64, 8, 3), np.random.default_rng(3).standard_normal(8)
    tokens = np.random.default_rng(4).permutation(64)
    experts = np.random.default_rng(5).permutation(8)
    base = alternate(s, bias, 2, False)
    np.testing.assert_array_equal(alternate(s[tokens], bias, 2, False), base)
    np.testing.assert_array_equal(alternate(s[:, experts], bias[experts], 2, False), base[experts])


def test_the_update_is_monotone_and_never_amplifies():
    rng = np.random.default_rng(7)
    for _ in range(20):
        s, low = rng.standard_normal((64, 8)), rng.standard_normal(8)
        high = low + np.abs(rng.standard_normal(8)) * rng.integers(0, 2, 8)
        a, b = alternate(s, low, 2, False), alternate(s, high, 2, False)
        assert (a <= b).all()
        assert np.abs(a - b).max() <= np.abs(np.float32(high) - np.float32(low)).max() + 1e-6


def test_where_the_published_pair_does_not_move():
    s, beta, (T, E, K) = scores(256, 16, 4), np.zeros(16), (256, 16, 2)
    q, seen = T * K // E, set()
    for _ in range(6):
        order = np.argsort(-(s - beta), axis=1)
        load = np.bincount(order[:, :K].ravel(), minlength=E)
        next_in = np.bincount(order[:, K], minlength=E)
        still = (load <= q) & (q < load + next_in)
        _, new = lp.alternate(s, beta, K, column=0.0)
        np.testing.assert_array_equal(np.isclose(new, beta, rtol=0, atol=1e-12), still)
        seen |= set(still.tolist())
        beta = new + 0.1 * np.random.default_rng(q).standard_normal(E)          # away from ties
    assert seen == {True, False}


# ------------------------------------------------------------------------- the order statistic

@pytest.mark.parametrize("shape", [(1, 7, 3), (2, 64, 5), (3, 1000, 2)])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros of both signs", "huge and tiny"])
def test_kth_largest_is_a_partition_to_the_bit(shape, kind):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    x = {"normal": x,
         "ties": np.round(x),
         "zeros of both signs": np.where(x > 0.5, 0.0, np.where(x < -0.5, -0.0, x)),
         "huge and tiny": x * 10.0 ** rng.integers(-40, 38, shape)}[kind].astype(np.float32)
    x.reshape(-1)[:2] = [np.inf, -np.inf]
    for k in {1, 2, shape[1] // 2, shape[1]}:
        want = np.partition(x, shape[1] - k, axis=1)[:, shape[1] - k]
        assert (kth_largest(jnp.asarray(x), jnp.ones(shape[1], bool), k) == want).all()


def test_four_bits_a_round_as_on_a_tpu_give_the_same():
    x, valid = jax.random.normal(jax.random.key(0), (2, 50, 3)), jnp.arange(50) < 45
    want = balance.kth_largest(x, valid, 7)
    np.testing.assert_array_equal(balance.kth_largest(x, valid, 7, platform="tpu"), want)


# ------------------------------------------------------------------------- the optimum

# T, E, K, seed: s[0,0], optimum by HiGHS, greedy loads; midpoints: alternations to a gap below 1e-9
# and the gaps after 1..5; (K+1, q): alternations; (K+1, q+1): last gap (0: reaches it) and loads.
# These numbers were computed independently of this code.
SEEDED = {
    (8, 4, 2, 0): (-0.033495, 8.742860494, [1, 4, 4, 7], 3, [.5527, .0507, 0], 2, 0, [4, 5, 5, 2]),
    (8, 4, 2, 1): (-0.032021, 19.533311917, [0, 7, 4, 5], 3, [1.5692, .0446, 0], 4, .02062,
                   [3, 5, 4, 4]),
    (12, 4, 1, 0): (1.927365, 16.014428701, [5, 7, 0, 0], 5, [1.8936, .7276, .2323, .0331, 0], 3,
                    0, None),
    (12, 4, 1, 1): (0.939332, 10.857651237, [2, 5, 5, 0], 4, [.8079, .0347, .0097, 0], 3, .0655,
                    None),
    (24, 8, 2, 0): (1.212561, 53.232065477, [17, 3, 0, 17, 0, 1, 1, 9], 6,
                    [4.2009, .829, .3262, .1327, .016], 7, .06975, [8, 6, 6, 6, 5, 6, 5, 6]),
    (24, 8, 2, 1): (1.307739, 29.399318953, [16, 0, 1, 1, 15, 6, 8, 1], 11,
                    [4.9228, .8844, .3581, .1911, .1196], 12, .6822, None),
    (64, 8, 2, 0): (-0.418228, 166.838360043, [1, 6, 25, 3, 44, 45, 1, 3], 5,
                    [16.2506, .6322, .1197, .0138, 0], 6, .1136, None),
    (64, 8, 2, 1): (2.018699, 127.090511612, [52, 1, 1, 6, 27, 15, 23, 3], 7,
                    [12.0085, .3283, .0674, .0307, .0122], 6, .1686, None),
    (256, 16, 2, 0): (-1.839037, 842.689120475, None, 11, [48.98, 1.987, .2588, .0554, .0165], 19,
                      .6218, None),
    (256, 16, 2, 1): (-0.671200, 814.921338081, None, 33, [50.94, 2.018, .5063, .2049, .0827], 44,
                      .4284, None)}


@pytest.mark.parametrize("T, E, K, seed", SEEDED)
def test_each_pair_of_order_statistics_ends_where_it_should(T, E, K, seed):
    (corner, optimum, greedy, middle_steps, middle_gaps,
     our_steps, last_gap, last_loads) = SEEDED[T, E, K, seed]
    s = scores(T, E, seed)

    def count(beta):
        order = np.argsort(-(s - beta), axis=1, kind="stable")
        return np.bincount(order[:, :K].ravel(), minlength=E)

    value, x = lp.lp_optimum(s, K)
    assert s[0, 0] == pytest.approx(corner, abs=1e-6)
    assert value == pytest.approx(optimum, abs=1e-8)
    assert np.allclose(x, np.round(x), atol=1e-9), "the vertex is integral"
    assert greedy is None or count(np.zeros(E)).tolist() == greedy

    gaps, beta = lp.descend(s, K, 0.5, 0.5, value)              # midpoints end with loads of q
    assert len(gaps) == middle_steps
    np.testing.assert_allclose(gaps[:5], middle_gaps[:len(gaps)], rtol=1e-3, atol=6e-5)
    assert (count(beta) == T * K // E).all()
    assert lp.certificate(s, -beta, K) == pytest.approx(value, abs=1e-8)

    gaps, beta = lp.descend(s, K, 0, 1, value)      # ours: optimal, but for ties at the cutoff
    assert len(gaps) == our_steps and np.abs(count(beta) - T * K // E).max() <= 2

    gaps, beta = lp.descend(s, K, 0, 0, value)                  # the published pair
    assert gaps[-1] == pytest.approx(last_gap, rel=1e-3, abs=1e-9)
    assert last_loads is None or count(beta).tolist() == last_loads


# K, greedy value, optimum (unique, by brute force), the experts of each row, the dual after each
# midpoint alternation, the scores
INTEGER = {
    "6 tokens, 3 experts": (1, 61, 57, [1, 2, 0, 0, 1, 2], [58, 57], [
        [11, 9, 8], [9, 9, 9], [13, 0, 4], [10, 2, 3], [10, 8, 5], [5, 6, 8]]),
    "4 tokens, 4 experts": (2, 66, 60, [(0, 3), (1, 2), (1, 3), (0, 2)], [64, 60.125, 60], [
        [12, 2, 1, 2], [8, 8, 4, 0], [7, 6, 8, 7], [13, 1, 8, 0]]),
    "6 tokens, 4 experts": (2, 87, 82, [(1, 3), (0, 2), (0, 3), (0, 1), (2, 3), (1, 2)], [83, 82], [
        [10, 8, 0, 8], [8, 5, 6, 2], [13, 0, 2, 3], [9, 4, 1, 0], [4, 0, 1, 9], [5, 6, 7, 2]])}


def best_assignment(s, K):
    """Value of the best assignment with K experts a token and equal loads, by trying them all."""
    q, best = len(s) * K // s.shape[1], -np.inf
    rows = list(itertools.combinations(range(s.shape[1]), K))
    for chosen in itertools.product(rows, repeat=len(s)):
        if (np.bincount(np.concatenate(chosen), minlength=s.shape[1]) == q).all():
            best = max(best, sum(s[i, j] for i, row in enumerate(chosen) for j in row))
    return best


@pytest.mark.parametrize("name", INTEGER)
def test_small_programs_are_solved_as_by_brute_force(name):
    K, greedy, optimum, rows, duals, s = INTEGER[name]
    s = np.array(s, float)
    if name != "6 tokens, 4 experts":           # 46,656 assignments: the small two are enough
        assert best_assignment(s, K) == optimum
    value, x = lp.lp_optimum(s, K)
    assert value == pytest.approx(optimum, abs=1e-9)
    assert np.sort(s, 1)[:, -K:].sum() == greedy
    assert [tuple(np.nonzero(row > 0.5)[0]) for row in x] == [tuple(np.ravel(row)) for row in rows]
    gaps, _ = lp.descend(s, K, 0.5, 0.5, optimum)
    np.testing.assert_allclose(gaps + optimum, duals, atol=1e-9)

    bias, values = np.zeros(s.shape[1]), []     # the training code, in float32 and centered
    for _ in range(8):
        bias = alternate(s, bias, K)
        values.append(lp.dual(s, -bias.astype(float), K))
    assert values[-1] == pytest.approx(optimum, abs=1e-4)
    assert all(b <= a + 1e-4 for a, b in zip(values, values[1:])), "the dual must never rise"


def test_the_published_pair_stalls_and_ours_does_not():
    alpha, beta = lp.alternate(lp.STALL, np.zeros(4), 2, 0, 0)
    assert alpha.ravel().tolist() == [2, 4, 7, 1] and beta.tolist() == [4, 0, 0, -1]
    gaps, _ = lp.descend(lp.STALL, 2, 0, 0, 60)
    assert len(gaps) == 300 and set(gaps) == {2.0}
    gaps, _ = lp.descend(lp.STALL, 2, 0, 1, 60)
    assert gaps[-1] == 0


def test_a_certificate_needs_no_solver_and_no_balancer():
    """Sign steps that reach equal loads have found the optimum; unequal loads certify nothing."""
    s, bias = scores(24, 8, 0), np.zeros(8)
    assert lp.certificate(s, bias, 2) is None
    for _ in range(20_000):
        load = np.bincount(np.argsort(-(s + bias), 1)[:, :2].ravel(), minlength=8)
        if (load == 6).all():
            break
        bias -= 1e-3 * np.sign(load - 6)
    assert lp.certificate(s, bias, 2) == pytest.approx(SEEDED[24, 8, 2, 0][1], abs=1e-8)


# ------------------------------------------------------------------------- convergence

def violations(batches, K):
    """MaxVio of each batch under the bias that the batches before it made."""
    bias, found = jnp.zeros(batches[0].shape[1]), []
    for s in batches:
        load, bias = balance.step(jnp.asarray(s, jnp.float32), bias, K)
        found.append(float(balance.max_violation(load)))
    return np.array(found)


def test_a_cold_start_balances_in_a_few_updates():
    violation = violations([scores(2048, 64, 0)] * 11, 4)
    assert violation[0] > 2 and violation[1] < 0.5 and violation[2] < 0.15
    assert violation[3] < 0.10 and violation[10] < 0.05


def test_on_new_batches_the_violation_stays_near_the_sampling_floor():
    rng = np.random.default_rng(4)
    popular = rng.standard_normal(64)
    batches = [rng.standard_normal((2048, 64)) + popular for _ in range(15)]
    assert violations(batches, 4)[5:].mean() < 1.5 * balance.sampling_floor(2048, 64, 4)


# ------------------------------------------------------------------------- devices, faults, state

def on_devices(n, rule, margin, valid, bias, K):
    devices = jax.devices()[:n]
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    f = jax.shard_map(
        lambda m, v, b: balance.update(rule, m, v, b, K, "data")[0], mesh=mesh,
        in_specs=(Spec(None, "data"), Spec("data"), Spec()), out_specs=Spec(), check_vma=False)
    return np.asarray(jax.jit(f)(margin, valid, bias))


@pytest.mark.parametrize("rule", ["quantile", "sign"])
def test_the_update_is_the_same_to_the_bit_on_any_number_of_devices_and_in_any_order(rule):
    rng = np.random.default_rng(7)
    margin = jnp.asarray(rng.random((3, 96, 8)) - np.linspace(0.3, 0.9, 8), jnp.float32)
    valid, bias = jnp.asarray(rng.random(96) < 0.8), jnp.zeros((3, 8))
    results = [on_devices(n, rule, margin, valid, bias, 2) for n in (1, 8)]
    assert all((r == results[0]).all() for r in results) and np.ptp(results[0]) > 0
    order = rng.permutation(96)                     # any order, so any split into microbatches
    assert (on_devices(8, rule, margin[:, order], valid[order], bias, 2) == results[0]).all()


def test_local_quantiles_depend_on_the_number_of_devices():
    margin, valid = jax.random.normal(jax.random.key(0), (1, 96, 8)), jnp.ones(96, bool)
    bias = jnp.zeros((1, 8))
    one, eight = (on_devices(n, "quantile_local", margin, valid, bias, 2) for n in (1, 8))
    np.testing.assert_array_equal(one, on_devices(1, "quantile", margin, valid, bias, 2))
    by_hand = np.sort(np.asarray(margin).reshape(8, 12, 8), axis=1)[:, 12 - 12 * 2 // 8].mean(0)
    np.testing.assert_allclose(eight[0], by_hand.mean() - by_hand, atol=1e-6)
    assert np.abs(one - eight).max() > 0.01


def test_one_sign_step_by_hand():
    load = np.array([6, 4, 1, 1])                               # of 6 tokens, K = 2: q = 3
    margin = jnp.asarray(np.arange(6)[:, None] < load, jnp.float32)[None] - 0.5
    for rate, want in ((0.0, 1e-3), (0.5, 0.5)):
        step, _ = update("sign", margin, jnp.ones(6, bool), jnp.zeros((1, 4)), 2, rate=rate)
        direction = np.sign(load - 3)
        np.testing.assert_allclose(step[0], -want * direction, rtol=1e-6)


def test_all_padding_keeps_the_bias():
    old = jnp.full((1, 4), 7.0)
    new, kept = update("quantile", jnp.ones((1, 8, 4)), jnp.zeros(8, bool), old, 1)
    assert (new == old).all() and kept.all()


def aux_shares(n, rule, prob, margin):
    """The sum of n devices' shares of the loss."""
    devices = jax.devices()[:n]
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    def share(m, p):
        valid = jnp.ones(m.shape[1], bool)
        return jax.lax.psum(balance.auxiliary_loss(rule, p, m, valid, 32.0, 2, "data"), "data")

    f = jax.shard_map(share, mesh=mesh, in_specs=Spec(None, "data"), out_specs=Spec(),
                      check_vma=False)
    return float(jax.jit(f)(margin, prob))


def test_the_auxiliary_loss_does_not_depend_on_the_number_of_devices():
    margin, prob = (jax.random.normal(jax.random.key(i), (2, 32, 8)) for i in (0, 1))
    margin += jnp.repeat(jnp.arange(4), 8)[None, :, None] * jnp.linspace(-1, 1, 8)  # uneven devices
    prob = jax.nn.softmax(prob)
    one, four = (aux_shares(n, "aux_global", prob, margin) for n in (1, 4))
    assert one == pytest.approx(four, rel=1e-6) and one > 0


def test_the_auxiliary_loss_by_hand_and_its_descent():
    rng, (L, T, E, K) = np.random.default_rng(0), (2, 40, 8, 2)
    logits = rng.standard_normal((L, T, E)) + rng.standard_normal(E)
    logits = jnp.asarray(logits, jnp.float32)
    valid = jnp.arange(T) < 30

    def loss(logits, rule="aux_global", rate=0.0):
        margin = jnp.stack([balance.select(rule, x, jnp.zeros(E), K)[1] for x in logits])
        prob = jax.nn.softmax(logits)
        return balance.auxiliary_loss(rule, prob, margin, valid, 30.0, K, rate=rate)

    def greedy_load(x):
        return np.bincount(np.argsort(-x, 1)[:, :K].ravel(), minlength=E)

    want = 0.0
    for x in np.asarray(logits)[:, :30]:
        probability = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        want += 1e-2 * E * greedy_load(x) / (30 * K) @ probability.mean(0)
    value, slope = jax.jit(jax.value_and_grad(loss))(logits)
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert float(loss(logits, rate=0.5)) == pytest.approx(50 * want, rel=1e-5)
    assert loss(logits, "quantile") == 0.0
    slope = np.asarray(slope)
    assert (slope[:, 30:] == 0).all()
    load = greedy_load(np.asarray(logits[0, :30]))
    assert slope[0].sum(0)[load.argmax()] > 0 > slope[0].sum(0)[load.argmin()]


def test_load_statistics_by_hand():
    load = jnp.asarray([[4.0, 4, 4, 4], [16, 0, 0, 0], [6, 4, 4, 2]])
    np.testing.assert_allclose(balance.max_violation(load), [0, 3, 0.5])
    np.testing.assert_allclose(balance.drop_fraction(load, 1.0), [0, 12 / 16, 2 / 16])
    np.testing.assert_allclose(balance.drop_fraction(load, 1.25), [0, 11 / 16, 1 / 16])
    assert balance.sampling_floor(4096, 8, 8) == 0.0


# ------------------------------------------------------------------------- in training

def synthetic(c, t):
    """A batch of random tokens in rows of one document each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, c.vocab_size, (t.batch_size, c.seq_len + 1)).astype(np.int32)
    segments = np.ones((t.batch_size, c.seq_len), np.int32)
    return data.Batch(tokens[:, :-1], tokens[:, 1:], segments, segments.astype(np.float32))


def load(config, **keys):
    return train.load_config(config, [f"--{k}={v}" for k, v in keys.items()])


def test_the_bias_is_state_without_an_optimizer(config):
    c, t = load(config)
    state = jax.eval_shape(lambda: train.make_state(c, t, jax.random.key(0)))
    moments = {leaf.shape for leaf in jax.tree.leaves(state.opt)}
    assert state.bias_LE.shape == (c.num_layers, c.num_experts)
    assert state.bias_LE.shape not in moments


@pytest.mark.slow
def test_evaluation_uses_the_bias(config):
    c, t = load(config, devices=2)
    mesh = train.make_mesh(c, t)
    params = jax.jit(lambda: train.make_state(c, t, jax.random.key(0)).params)()
    score = train.make_eval_step(c, mesh, np.ones(c.vocab_size))
    batch = train.to_global_batch(synthetic(c, t), mesh)
    bias = jnp.tile(jnp.linspace(-1, 1, c.num_experts), (c.num_layers, 1))
    nats = [jax.device_get(score(params, b, batch))[0] for b in (bias, bias, 0 * bias)]
    assert nats[0] == nats[1] != nats[2]
    # (that a run saves, restores and continues bit for bit is tested in test_run.py)


def test_a_kept_bias_is_an_event(config, tmp_path):
    c, t = load(config)
    mesh = train.make_mesh(c, t)
    log = report.Log(tmp_path, c, t, mesh, 0, rows_of=None)
    row = {"loss": 1.0, "gnorm": 1.0, "lr_multiplier": 1.0, "router_z": 0.0, "skipped": False,
           "load_LE": np.ones((c.num_layers, c.num_experts)), "dropped_L": np.zeros(c.num_layers)}
    for step, kept in ((1, 0), (2, 2), (3, 0)):
        log.step(step, row | {"bias_kept": kept}, step == 3)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event.pop("time") > 0 for event in events] == [True]
    assert events == [{"event": "bias_kept", "step": 2, "layers": 2}]


@pytest.mark.slow
def test_no_collective_of_the_update_is_in_the_layer_loop(config):
    """In the step compiled for eight devices the loop over layers has no integer all-reduce, and
    the loop of kth_largest exactly one, of the counts of all layers together."""
    c, t = load(config, num_layers=8, devices=8)
    mesh = train.make_mesh(c, t)
    step = train.make_train_step(c, t, mesh)
    batch = train.to_global_batch(synthetic(c, t), mesh)
    hlo = step.lower(train.abstract_state(c, t, mesh), batch).compile().as_text()
    bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.M | re.S))
    loops = re.findall(r"while\(.*body=%?([\w.\-]+)", hlo)

    def within(name):                               # the body and all that it calls
        text = bodies[name]
        called = re.findall(r"(?:to_apply|body|condition|calls)=%?([\w.\-]+)", text)
        return text + "".join(within(n) for n in called if n in bodies)

    def reduces(text):
        return [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]

    counts = rf"s32\[(?:1,)?{c.num_layers},{c.num_experts}\]"
    bisections = [b for b in loops if any(re.search(counts, line) for line in reduces(bodies[b]))]
    assert len(bisections) == 1 and len(reduces(bodies[bisections[0]])) == 1
    layer_loops = [b for b in loops if re.search(r" (dot|custom-call)\(", within(b))]
    assert layer_loops, "found no loop over layers in the compiled step"
    assert not [line for b in layer_loops for line in reduces(within(b)) if "s32[" in line]
