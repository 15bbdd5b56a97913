"""Load balancing of experts: quantile balancing, its rivals, the linear program behind. Imports: jax, numpy.

Run:  python balance.py                 the program solved before your eyes: out/balance.png, under a minute
      python balance.py failures | bench | arena | animate out/RUN      see the last section
Read: select -> qth_largest -> update -> estimators -> rivals -> how balanced is it -> the program -> runs.
The bias is state, not a parameter: one float32 array [L,E] in the train state, touched by no gradient and no
optimizer, added to the router's scores when experts are chosen and never when their outputs are mixed.

T tokens  E experts  K experts per token  L layers  C tried keys   q = T*K/E, the load every expert should carry
s_TE router scores   alpha_T a token's cutoff   beta_E an expert's threshold   bias_E = -beta_E
margin_TE = s + bias - alpha"""

import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as Spec

# The assignment that maximises total score subject to "K experts per token, q tokens per expert" is a linear
# program. Its dual is   D(alpha, beta) = sum_ij max(0, s_ij - alpha_i - beta_j) + K sum alpha + q sum beta,
# convex, and each block has a closed form: for fixed beta the best alpha_i is an order statistic of row i, for
# fixed alpha the best beta_j is an order statistic of column j. Quantile balancing takes one such alternation
# per training step, started from the last beta. There is no rate, no loss term and no other hyperparameter.
# [Su, kexue.fm 11619; as trained by Marin, openathena.ai/blog/quantile-balancing]
#
# Its rivals fit the same frame, so they share one interface. Every rule chooses experts by score + bias; a rule
# is where its bias comes from. `select` makes the choice, `update` makes the next bias, `auxiliary` the loss term
# of the two rules that have one. All read the same statistic, margins: how far score + bias is above the cutoff.

RULES = {                           # `balancer` in a config -> its rate, unless `balancer_rate` says another
    "quantile": 0.0,                # the order statistic of all tokens on all devices, exact: ours
    "quantile_local": 0.0,          # mean of the devices' own order statistics: the 129B run [cited: marin #4697]
    "quantile_hist": 0.0,           # pooled histogram, 10,000 bins over the live range: its successor [cited]
    "quantile_k3": 0.0,             # pooled histogram of sigmoid scores, 1,000 bins [cited: Kimi K3; TE #3395]
    "quantile_ema": 0.1,            # moves a tenth of the way: a moving average of .9 [cited: Megatron #5349]
    "none": 0.0,
    "aux_micro": 1e-2,              # loss on each device's microbatch [cited: Switch, 2101.03961]
    "aux_global": 1e-2,             # the same loss on loads of the whole batch [cited: 2501.11873]
    "sign": 1e-3,                   # loss-free: a fixed step towards the mean load [cited: 2408.15664]
    "sign_rms": 1e-2,               # steps scaled to that RMS [Su, kexue.fm 10757; rate assumed]
    "proportional": 2e-2,           # steps in proportion to the excess load [cited: 2408.15664; rate assumed]
    "bip": 0.0,                     # inequalities, solved in the batch that they route [cited: 2502.15451]
    "sinkhorn": 0.0,                # doubly stochastic plan of the batch [cited: S-BASE, 2202.01169]
    "threshold": 0.1,               # no K: an expert answers every token above its threshold [Su, kexue.fm 11626]
}
SIGMOID = {"quantile_k3", "sign", "sign_rms", "proportional", "bip"}    # on sigmoid scores; all others: logits
LEAKS = {"sinkhorn": "none", "bip": "sign"}     # a token's experts depend on tokens after it; so evaluation and
                                                # serving use a rule that looks at the token alone, same scores
BINS, K3_BINS = 10_000, 1_000


def select(logits_TE, bias_E, K, rule="quantile"):
    """Choose experts and measure every score against its token's cutoff.

    Returns expert_TK int32, the K experts with the largest score + bias, and margin_TE float32, score + bias -
    alpha, where alpha_T is the (K+1)-th largest of score + bias: one top-(K+1) serves both. Positive says chosen,
    and the cutoff's own margin is 0 to the bit (s - alpha alone rounds, and loads could not be counted from it).
    K = E chooses everything and has nothing to balance; its margins are zero.
    "threshold" has no cutoff (alpha = 0) and no fixed K: its tokens get min(E, 2K) slots, best first, and
    moe.route silences those whose margin is not positive."""
    score_TE = lax.stop_gradient(logits_TE).astype(jnp.float32)
    if rule in SIGMOID:
        score_TE = jax.nn.sigmoid(score_TE)
    T, E = score_TE.shape
    if K == E:
        return jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), (T, E)), jnp.zeros_like(score_TE)
    if rule == "threshold":
        return top_few(score_TE + bias_E, min(E, 2 * K))[1], score_TE + bias_E
    used_E = bias_within_batch(rule, score_TE, bias_E, K) if rule in LEAKS else bias_E
    value_TK1, expert_TK1 = top_few(score_TE + used_E, K + 1)
    alpha_T1 = value_TK1[:, K:] if rule != "bip" else jnp.maximum(0.0, value_TK1[:, K:])
    return expert_TK1[:, :K], (score_TE + bias_E) - alpha_T1


def top_few(x_TE, k):
    """lax.top_k for a small k: (values, indices int32), [T,k] each, the first of equals first (-0.0 equals 0.0).

    One pass for a maximum and one for where it stands, k times. lax.top_k sorts the whole row where it stands in
    a loop over layers: on a CPU 29 of the 80 ms of a step with 64 experts, this 1 [measured: LOG.md]. NaN
    counts as infinity."""
    x_TE = jnp.where(jnp.isnan(x_TE), jnp.inf, x_TE)
    column_E, left_TE, values, indices = jnp.arange(x_TE.shape[1], dtype=jnp.int32), True, [], []
    for _ in range(k):
        value_T = jnp.max(x_TE, axis=1, initial=-jnp.inf, where=left_TE)
        here_TE = (x_TE == value_T[:, None]) & left_TE
        index_T = jnp.min(jnp.where(here_TE, column_E, x_TE.shape[1]), axis=1)
        left_TE = left_TE & (column_E != index_T[:, None])
        values, indices = [*values, value_T], [*indices, index_T]
    return jnp.stack(values, axis=1), jnp.stack(indices, axis=1)


# ------------------------------------------------------------------------------- the exact, pooled estimator

def _sortable(x):
    """Float32 to uint32 such that x < y as floats exactly when key(x) < key(y) as integers."""
    bits, sign = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32), jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, 0, bits)                     # -0.0 is +0.0; x + 0.0 would flush subnormals too
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _unsortable(key):
    bits = jnp.where(key >> 31 == 1, key & jnp.uint32((1 << 31) - 1), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def count_reaching(key_LTE, tried_CLE):
    """How many tokens' keys reach each of C tried keys: [L,T,E], [C,L,E] -> int32 [C,L,E]."""
    return jnp.sum(key_LTE >= tried_CLE[:, :, None, :], axis=2, dtype=jnp.int32)


def qth_largest(x_LTE, valid_T, q, axis=None, count=count_reaching, bits=1):
    """The q-th largest of x over the valid tokens, for each layer and expert: [L,E], exact to the bit.

    Found by deciding the 32 bits of the answer's integer key from the top: a bit stays set if at least q
    tokens reach the candidate. 32 passes of compare and count need no sort and no scatter, and because the
    counts are integers the answer does not depend on how tokens lie on devices or in microbatches.
    `axis`: mesh axes over which tokens are split; None on one device. Each round is ONE psum of int32 [L,E]
    for all layers together, so depth does not multiply the rounds. q: int32 scalar, 1 <= q <= valid tokens.
    `bits` decided per round (a divisor of 32): 4 are 8 rounds of 15 candidates, for machines where a round costs
    more than a comparison (a kernel that reads keys once, a pod whose latency rules); on CPU 1 is fastest.
    `count` is the function that counts this device's share; the default is the truth for any kernel."""
    key_LTE = jnp.where(valid_T[None, :, None], _sortable(x_LTE), 0)      # padding sorts below every real number

    def decide(i, best_LE):
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        tried_CLE = best_LE | (jnp.arange(1, 2**bits, dtype=jnp.uint32)[:, None, None] << shift)
        reached = count(key_LTE, tried_CLE)
        if axis is not None:
            reached = lax.psum(reached, axis)                            # the balancer's only communication
        return jnp.max(jnp.where(reached >= q, tried_CLE, best_LE), axis=0)

    start_LE = jnp.zeros((x_LTE.shape[0], x_LTE.shape[2]), jnp.uint32)
    return _unsortable(lax.fori_loop(0, 32 // bits, decide, start_LE))


def rank(tokens, K, E):
    """q = max(1, floor(tokens * K / E)) on reduced fractions: 46M tokens x 8 would overflow int32."""
    k, e = K // math.gcd(K, E), E // math.gcd(K, E)
    return jnp.maximum(1, (tokens // e) * k + (tokens % e) * k // e)


def update(rule, margin_LTE, valid_T, bias_LE, K, axis=None, rate=0.0, count=count_reaching, bits=1):
    """This step's margins -> (the next step's bias_LE, kept_L: layers that kept their old bias).

    Call it once, after all layers: no collective of it stands in the layer loop, and nothing waits for its result
    before the next step. "quantile": bias <- -(beta - mean(beta)), beta_j the q-th largest of s - alpha, which is
    the q-th largest margin minus the old bias: a full replacement. With the (K+1)-th row cutoff of `select` this
    is the pair of order statistics that reaches the program's optimum; the published (K+1, q+1) pair can stall
    short of it (failures).
    Centring removes the one direction that the loads do not see, in which beta would drift (+.008 a step at 16,384
    tokens [measured: numpy, E=64, K=4]).
    A layer with a margin that is not finite keeps its old bias: a NaN logit must not outlive its step, and an
    infinite one must not move a rank. `rate`: 0 takes the rule's own.
    `axis`, `count`, `bits`: as in qth_largest."""
    everywhere = lambda x: x if axis is None else lax.psum(x, axis)
    L, _, E = margin_LTE.shape
    if rule not in RULES:
        raise ValueError(f"balancer: expected one of {', '.join(RULES)}, found {rule!r}")
    if K == E or rule in ("none", "aux_micro", "aux_global", "sinkhorn"):
        return bias_LE, jnp.zeros(L, bool)
    rate = rate or RULES[rule]
    here = jnp.sum(valid_T, dtype=jnp.int32)
    broken_L = jnp.sum(~jnp.isfinite(margin_LTE) & valid_T[:, None], axis=(1, 2), dtype=jnp.int32)
    tokens, broken_L = everywhere((here, broken_L))
    q = rank(tokens, K, E)

    if rule in ("quantile", "quantile_ema", "threshold"):
        new_LE = bias_LE - qth_largest(margin_LTE, valid_T, q, axis, count, bits)
    elif rule == "quantile_local":
        own_LE = qth_largest(margin_LTE, valid_T, rank(here, K, E))
        new_LE = bias_LE - everywhere(jnp.where(here > 0, own_LE * (here / tokens), 0.0))
    elif rule == "quantile_hist":
        x_LTE = margin_LTE - bias_LE[:, None]                           # s - alpha
        low_L, high_L = live_range(x_LTE, valid_T, axis)
        new_LE = -histogram_quantile(x_LTE, valid_T, tokens * (K / E), low_L, high_L, BINS, axis)
    elif rule == "quantile_k3":
        x_LTE = margin_LTE - bias_LE[:, None]       # sigmoids lie in [0,1], so none of these can leave this range:
        low_L, high_L = -1.0 - jnp.max(bias_LE, axis=1), 1.0 - jnp.min(bias_LE, axis=1)
        new_LE = -histogram_quantile(x_LTE, valid_T, tokens * (K / E), low_L, high_L, K3_BINS, axis)
    elif rule == "bip":
        next_LE = qth_largest(margin_LTE, valid_T, jnp.minimum(q + 1, tokens), axis)
        new_LE = -jnp.maximum(0.0, next_LE - bias_LE)
    else:
        excess_LE = everywhere(loads(margin_LTE, valid_T)) * (E / K) / tokens - 1.0
        rms_L1 = jnp.sqrt(jnp.mean(excess_LE**2, axis=1, keepdims=True))
        new_LE = bias_LE - rate * {"sign": jnp.sign(excess_LE), "proportional": excess_LE,
                                   "sign_rms": excess_LE / jnp.maximum(rms_L1, 1e-9)}[rule]
    if rule not in ("bip", "threshold"):            # for these two the level itself decides something
        new_LE = new_LE - jnp.mean(new_LE, axis=1, keepdims=True)
    if rule in ("quantile_ema", "threshold"):
        new_LE = bias_LE + rate * (new_LE - bias_LE)
    kept_L = (broken_L > 0) | (tokens == 0) | ~jnp.all(jnp.isfinite(new_LE), axis=1)
    return jnp.where(kept_L[:, None], bias_LE, new_LE), kept_L


def next_bias(margin_LTE, valid_T, bias_LE, K, axis=None):
    """The recipe's rule alone: update("quantile", ...) without the flag."""
    return update("quantile", margin_LTE, valid_T, bias_LE, K, axis)[0]


# ------------------------------------------------------------------------------------------- other estimators

def live_range(x_LTE, valid_T, axis=None):
    """Smallest and largest valid x of each layer, over all devices: [L], [L]. One outlier stretches it."""
    valid = valid_T[None, :, None]
    low_L = jnp.min(jnp.where(valid, x_LTE, jnp.inf), axis=(1, 2))
    high_L = jnp.max(jnp.where(valid, x_LTE, -jnp.inf), axis=(1, 2))
    return (low_L, high_L) if axis is None else (lax.pmin(low_L, axis), lax.pmax(high_L, axis))


def histogram_quantile(x_LTE, valid_T, q, low_L, high_L, bins, axis=None):
    """About the q-th largest (q may be fractional) of x, from `bins` equal bins on [low, high]: [L,E].

    One psum of int32 [L,E,bins], then a straight line inside the bin where the count from above crosses q: the
    error is at most one bin width. Summed in int32: a float32 running sum of counts stops being exact at 2**24."""
    L, T, E = x_LTE.shape
    width_L = jnp.maximum((high_L - low_L) / bins, jnp.finfo(jnp.float32).tiny)
    place = (high_L[:, None, None] - x_LTE) / width_L[:, None, None]
    place = jnp.clip(jnp.where(jnp.isfinite(place), place, 0), 0, bins - 1).astype(jnp.int32)   # largest x: bin 0
    seat = (jnp.arange(L)[:, None, None], jnp.arange(E), place)
    tally = jnp.zeros((L, E, bins), jnp.int32).at[seat].add(valid_T[None, :, None].astype(jnp.int32))
    tally = tally if axis is None else lax.psum(tally, axis)
    until = jnp.cumsum(tally, axis=2)
    crossing = jnp.sum(until < q, axis=2, keepdims=True)
    inside = jnp.take_along_axis(tally, crossing, axis=2)
    before = jnp.take_along_axis(until, crossing, axis=2) - inside
    share = (q - before) / jnp.maximum(inside, 1)
    return (high_L[:, None, None] - (crossing + share) * width_L[:, None, None])[:, :, 0]


# ------------------------------------------------------------------------------------------------- the rivals

def bias_within_batch(rule, score_TE, bias_E, K):
    """The bias that balances the very batch that it routes, on one device's rows. Not causal (LEAKS).

    sinkhorn: alternate scaling of rows and columns of exp(score); top-K of the plan is top-K of score + log column
    factor. bip: the program with <= for =, so alpha, beta >= 0, four rounds from the last bias [assumed; the paper
    tries several]. Padding, unknown here, is counted."""
    T, E = score_TE.shape
    if rule == "sinkhorn":
        def scale(_, v_E):
            u_T = jax.nn.logsumexp(score_TE + v_E, axis=1, keepdims=True)
            return -jax.nn.logsumexp(score_TE - u_T, axis=0)
        return lax.fori_loop(0, 30, scale, jnp.zeros(E))

    def clamped(_, bias_E):
        alpha_T1 = jnp.maximum(0.0, top_few(score_TE + bias_E, K + 1)[0][:, K:])
        beta_LE = qth_largest((score_TE - alpha_T1)[None], jnp.ones(T, bool), min(T, T * K // E + 1))
        return -jnp.maximum(0.0, beta_LE[0])
    return lax.fori_loop(0, 4, clamped, bias_E)


def auxiliary(rule, prob_LTE, margin_LTE, valid_T, tokens, K, axis=None, rate=0.0):
    """The load-balancing loss sum_l E sum_j f_j P_j, times its rate: this device's share, so that shares add up.

    P_j: mean router probability of expert j, the only part with a gradient. f_j: its share of the assignments, in
    this device's microbatch ("aux_micro") or over all devices ("aux_global", one psum of int32 [L,E]). `tokens`:
    valid tokens of the whole batch. Even loads give 1 per layer. Zero for every other rule."""
    if rule not in ("aux_micro", "aux_global"):
        return 0.0
    E = prob_LTE.shape[2]
    load_LE, here = loads(margin_LTE, valid_T), jnp.sum(valid_T, dtype=jnp.int32)
    if rule == "aux_global" and axis is not None:
        load_LE, here = lax.psum((load_LE, here), axis)
    f_LE = load_LE / jnp.maximum(here * K, 1)
    P_LE = jnp.sum(jnp.where(valid_T[:, None], prob_LTE, 0.0), axis=1) / tokens
    return (rate or RULES[rule]) * E * jnp.sum(lax.stop_gradient(f_LE) * P_LE)


# ----------------------------------------------------------------------------------------- how balanced is it

def loads(margin_LTE, valid_T):
    """Valid tokens of this device that chose each expert, int32 [L,E]. One that ties with its cutoff counts as not
    chosen, wherever top_k put it."""
    return jnp.sum((margin_LTE > 0) & valid_T[:, None], axis=1, dtype=jnp.int32)


def max_violation(load_LE):
    """MaxVio of each layer: largest load over mean load, minus 1. 0 is perfect, E/K - 1 is collapse. [L]"""
    return jnp.max(load_LE, axis=-1) / jnp.mean(load_LE, axis=-1) - 1.0


def drop_fraction(load_LE, capacity_factor):
    """Share of assignments above capacity_factor * mean load per expert: what fixed buffers would drop. [L]"""
    over = jnp.maximum(0.0, load_LE - capacity_factor * jnp.mean(load_LE, axis=-1, keepdims=True))
    return jnp.sum(over, axis=-1) / jnp.sum(load_LE, axis=-1)


def sampling_floor(tokens, E, K):
    """MaxVio that remains on fresh, independent tokens even with the best bias: 0.7 sqrt(4 ln E (1-K/E) / q).

    Loads are then binomial counts, and both the bias and the load come from samples of `tokens`. The constant
    was measured for one alternation per step at E=64, K=4, 1,024 to 65,536 tokens; real text is clustered by
    document, so a few times this floor is what a perfect balancer shows on small batches."""
    return 0.7 * math.sqrt(4 * math.log(E) * (1 - K / E) / (tokens * K / E)) if 1 < E > K else 0.0


# ------------------------------------------------------------------------------------------------ the program
# The truth to which the rest is held, in float64 numpy. None of it runs in training.

def lp_optimum(s_TE, K):
    """(optimal value, x_TE) of the linear program, by scipy's HiGHS. Minutes at 65,536 variables.

    Its matrix is the incidence matrix of a bipartite graph: totally unimodular, so every vertex is 0/1 and no
    integer solver is needed. If E does not divide T*K, loads may be floor(q) or ceil(q)."""
    from scipy import sparse
    from scipy.optimize import linprog
    T, E = s_TE.shape
    tokens = sparse.kron(sparse.eye(T), np.ones((1, E)))
    experts = sparse.kron(np.ones((1, T)), sparse.eye(E))
    found = linprog(-s_TE.ravel(), bounds=(0, 1), A_eq=tokens, b_eq=np.full(T, K),
                    A_ub=sparse.vstack([experts, -experts]),
                    b_ub=np.repeat([-(-T * K // E), -(T * K // E)], E), method="highs")
    if found.status != 0:
        raise RuntimeError(f"lp_optimum: HiGHS found no optimum: {found.message}")
    return -found.fun, found.x.reshape(T, E)


def largest(x, r, axis):
    """The r-th largest along an axis (kept, with length 1); -inf past the end."""
    if r > x.shape[axis]:
        return np.full_like(np.take(x, [0], axis), -np.inf)
    return np.take(np.partition(x, x.shape[axis] - r, axis), [x.shape[axis] - r], axis)


def dual(s_TE, beta_E, K, alpha_T1=None):
    """D(alpha, beta), by default with the best alpha for this beta. No feasible assignment is worth more."""
    alpha_T1 = largest(s_TE - beta_E, K + 1, 1) if alpha_T1 is None else alpha_T1
    return (np.maximum(0, s_TE - alpha_T1 - beta_E).sum() + K * alpha_T1.sum()
            + s_TE.shape[0] * K / s_TE.shape[1] * beta_E.sum())


def alternate(s_TE, beta_E, K, row=0.0, column=1.0):
    """One alternation -> (alpha_T1, beta_E). Any point of [(K+1)-th, K-th] is a best alpha, any point of
    [(q+1)-th, q-th] a best beta; `row` and `column` say where in them to stand. (0, 1) is `update`, (0, 0) as
    published, which can stall; (.5, .5) ends with loads of exactly q."""
    q = s_TE.shape[0] * K // s_TE.shape[1]
    stand = lambda x, r, at, axis: (1 - at) * largest(x, r + 1, axis) + at * largest(x, r, axis)
    alpha_T1 = stand(s_TE - beta_E, K, row, 1)
    return alpha_T1, stand(s_TE - alpha_T1, q, column, 0)[0]


def certificate(s_TE, bias_E, K):
    """The value of the assignment "top K of s + bias" if it is provably optimal, else None.

    If its loads are all exactly q, then for every feasible x': value = sum x(s+bias) - q sum bias
    >= sum x'(s+bias) - q sum bias = value of x'. No solver, and no matter where the bias came from."""
    x_TE = np.zeros(s_TE.shape)
    np.put_along_axis(x_TE, np.argsort(-(s_TE + bias_E), axis=1, kind="stable")[:, :K], 1.0, axis=1)
    return float((x_TE * s_TE).sum()) if (x_TE.sum(0) * s_TE.shape[1] == s_TE.shape[0] * K).all() else None


# ------------------------------------------------------------------------------------------------------- runs
# python balance.py                  four pictures of the method: out/balance.png
# python balance.py failures         what does not work, each next to what does: seconds
# python balance.py bench            the exact statistic against sort, top_k, quantile and histograms
# python balance.py arena            a small model under every rule, three seeds: a table, out/arena/arena.png
# python balance.py animate out/RUN  every expert's load over a run's steps: out/RUN/plots/load.gif

@partial(jax.jit, static_argnums=(2, 3, 4))
def _step(s_TE, bias_E, K, rule="quantile", rate=0.0):
    """One layer on one device: (load_E under this bias, the next bias)."""
    expert_TK, margin_TE = select(s_TE, bias_E, K, rule)
    new_LE, _ = update(rule, margin_TE[None], jnp.ones(len(s_TE), bool), bias_E[None], K, None, rate)
    return jnp.bincount(expert_TK.reshape(-1), length=s_TE.shape[1]), new_LE[0]


def _pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _online(batches, K, step=_step, gain=1.0):
    """MaxVio of each batch under the bias that the batches before it made; and the last bias."""
    bias_E, violation = jnp.zeros(batches[0].shape[1]), []
    for s_TE in batches:
        load_E, new_E = step(jnp.asarray(s_TE, jnp.float32), bias_E, K)
        bias_E = bias_E + gain * (new_E - bias_E)
        violation.append(float(max_violation(load_E)))
    return np.array(violation), bias_E


STALL = np.array([[12., 2, 1, 2], [8, 8, 4, 0], [7, 6, 8, 7], [13, 1, 8, 0]])         # K = 2, optimum 60


def failures():
    """Yield (what is tried, what is measured, its value, the recipe's value): smaller is better."""
    T, E, K = 2048, 32, 2
    rng = np.random.default_rng(0)
    taste_E = rng.standard_normal(E)
    batches = [(rng.standard_normal((T, E)) + taste_E).astype(np.float32) for _ in range(40)]
    seen, valid_T = jnp.asarray(batches[0]), jnp.ones(T, bool)

    skewed = [s + 3 * taste_E for s in batches]
    yield ("a step of twice the length (g = 2)", "MaxVio on new batches",
           *(_online(skewed, K, gain=g)[0][-20:].mean() for g in (2.0, 1.0)))

    def stuck(column):
        beta_E = np.zeros(4)
        for _ in range(100):
            _, beta_E = alternate(STALL, beta_E, 2, column=column)
        return dual(STALL, beta_E, 2) - lp_optimum(STALL, 2)[0]
    yield "the published pair, (q+1)-th largest", "dual - optimum after 100 alternations", stuck(0.0), stuck(1.0)

    loud = [12 * s for s in batches]
    k3 = lambda s_TE, bias_E, K: _step(s_TE, bias_E, K, "quantile_k3")
    yield ("a histogram of saturated sigmoids", "MaxVio on new batches, logits x 12",
           *(_online(loud, K, step)[0][-20:].mean() for step in (k3, _step)))

    @partial(jax.jit, static_argnums=2)
    def coarse(s_TE, bias_E, K):
        expert_TK, margin_TE = select(s_TE, bias_E, K)
        s_LTE = (margin_TE - bias_E)[None]
        beta_LE = histogram_quantile(s_LTE, valid_T, T * K / E, *live_range(s_LTE, valid_T), 1000)
        return jnp.bincount(expert_TK.reshape(-1), length=E), jnp.mean(beta_LE) - beta_LE[0]
    outlier = [seen.at[0, 0].set(-1e3)] * 10                                # one score of one token
    yield ("a live histogram, 1,000 bins, one outlier", "MaxVio in the batch, 10 alternations",
           _online(outlier, K, coarse)[0][-1], _online(outlier, K)[0][-1])

    pads = seen.at[T // 2:].set(seen[0])                                    # half of the rows are the same padding
    def masked(real_T):
        def step(s_TE, bias_E, K):
            expert_TK, margin_TE = select(s_TE, bias_E, K)
            return (jnp.bincount(expert_TK[:T // 2].reshape(-1), length=E),
                    update("quantile", margin_TE[None], real_T, bias_E[None], K)[0][0])
        return _online([pads] * 10, K, jax.jit(step, static_argnums=2))[0][-1]
    yield ("padding left in the statistic", "MaxVio of real tokens, 10 alternations", masked(valid_T),
           masked(jnp.arange(T) < T // 2))

    @partial(jax.jit, static_argnums=2)
    def adrift(s_TE, bias_E, K):
        expert_TK, margin_TE = select(s_TE, bias_E, K)
        return (jnp.bincount(expert_TK.reshape(-1), length=E),
                bias_E - qth_largest(margin_TE[None], valid_T, T * K // E)[0])
    level = lambda step: abs(float(jnp.mean(_online(batches, K, step)[1])))
    yield "a bias that is not centred", "size of its mean after 40 steps", level(adrift), level(_step)

    topic = np.repeat(2 * rng.standard_normal((16, E)), T // 16, axis=0)    # sixteen sequences, a topic each
    @partial(jax.jit, static_argnums=2)
    def chunked(s_TE, bias_E, K):
        expert_TK, margin_TE = select(s_TE, bias_E, K)
        local = lambda m_LTE: update("quantile_local", m_LTE, valid_T[:T // 16], bias_E[None], K, "device")[0]
        new_LE = jax.vmap(local, axis_name="device", out_axes=None)(margin_TE.reshape(16, 1, -1, E))
        return jnp.bincount(expert_TK.reshape(-1), length=E), new_LE[0]
    clustered = [seen + topic] * 10
    yield ("the mean of sixteen devices' quantiles", "MaxVio in the batch, 10 alternations",
           _online(clustered, K, chunked)[0][-1], _online(clustered, K)[0][-1])

    def revival(rule, most=1000):
        bias_E, dead = jnp.zeros(E), seen.at[:, 5].add(-50.0)
        for steps in range(most):
            load_E, bias_E = _step(dead, bias_E, K, rule)
            if load_E[5] >= T * K / E / 2:
                break
        return float(steps)
    yield "reviving a dead expert by sign steps", "updates to half its share", revival("sign"), revival("quantile")


def _print_failures():
    print(f"{'what is tried':44s}{'what is measured':44s}{'value':>9s}{'recipe':>9s}")
    for name, quantity, bad, good in failures():
        print(f"{name:44s}{quantity:44s}{bad:9.3g}{good:9.3g}", flush=True)


def _demonstrate():
    plt = _pyplot()
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), layout="constrained")

    # 1. the program: how far the dual stands above the optimum
    rng = np.random.default_rng(0)
    s_TE, K = rng.standard_normal((64, 8)) + rng.standard_normal(8), 2
    optimum, _ = lp_optimum(s_TE, K)
    print(f"64 tokens, 8 experts, K = 2. Optimum of the linear program by HiGHS: {optimum:.6f}")
    for name, row, column in (("(K+1)-th, q-th: update", 0, 1), ("midpoints", 0.5, 0.5), ("as published", 0, 0)):
        beta_E, gap = np.zeros(8), []
        for _ in range(13):
            gap.append(dual(s_TE, beta_E, K) - optimum)
            _, beta_E = alternate(s_TE, beta_E, K, row, column)
        found = certificate(s_TE, -beta_E, K)
        print(f"  {name:24s} dual - optimum " + " ".join(f"{max(g, 0):.4f}" for g in gap[:8])
              + (f"; certified optimal at {found:.6f}" if found else "; loads are not exactly q"))
        axes[0, 0].semilogy(np.maximum(gap, 1e-6), "o-", ms=4, label=name)
    axes[0, 0].set(title="the dual falls to the optimum of the LP", xlabel="alternations", ylabel="dual - optimum")
    axes[0, 0].legend()

    # 2. one batch, alternation by alternation     3. training: every batch is new
    T, E, K = 4096, 64, 4
    taste_E, floor = rng.standard_normal(E), sampling_floor(T, E, K)
    batches = [rng.standard_normal((T, E)) + taste_E for _ in range(30)]
    bias_E = jnp.zeros(E)
    print(f"\n{T} tokens, {E} experts, K = {K}; each should get q = {T * K // E}")
    print("alternations   MaxVio   dead experts")
    for i in range(11):
        load_E, bias_E = _step(jnp.asarray(batches[0], jnp.float32), bias_E, K)
        if i in (0, 1, 2, 3, 10):
            print(f"{i:12d} {max_violation(load_E):8.3f} {int((load_E == 0).sum()):14d}")
            axes[0, 1].plot(np.sort(np.asarray(load_E))[::-1], label=f"{i} alternations")
    axes[0, 1].axhline(T * K / E, color="black", lw=0.8, ls=":")
    axes[0, 1].set(title="one batch: loads even out", xlabel="expert, sorted by load", ylabel="tokens")
    axes[0, 1].legend()
    print(f"\nNew batches, one update after each; sampling floor of MaxVio {floor:.3f}")
    for label in ("quantile", "quantile_ema", "proportional", "sign@0.01", "none"):
        rule, _, rate = label.partition("@")
        violation, _ = _online(batches, K, partial(_step, rule=rule, rate=float(rate or 0)))
        print(f"  {label:14s} first five {violation[:5].round(2)}, last ten {violation[-10:].mean():.3f}")
        axes[0, 2].semilogy(violation, label=label)
    axes[0, 2].axhline(floor, color="black", lw=0.8, ls=":", label="sampling floor")
    axes[0, 2].set(title="new batches: the old bias routes", xlabel="updates", ylabel="MaxVio")
    axes[0, 2].legend()
    sizes = (256, 1024, 4096, 16384)
    late = [_online([rng.standard_normal((m, E)) + taste_E for _ in range(12)], K)[0][-8:].mean() for m in sizes]
    axes[0, 3].loglog(sizes, late, "o", label="quantile")
    axes[0, 3].loglog(sizes, [sampling_floor(m, E, K) for m in sizes], "k:", label="sampling floor")
    axes[0, 3].set(title="what is left is sampling noise", xlabel="tokens per batch", ylabel="MaxVio")
    axes[0, 3].legend()

    # 4. three experts in the plane: a score is the nearness of a centre, a bias moves two borders at once
    centre_ED = np.array([[-1.0, -0.6], [1.0, -0.6], [0.0, 1.1]])
    clouds = (((-1.2, -0.7), 0.5, 400), ((0.8, 0.9), 0.7, 120), ((-0.2, -0.2), 1.0, 80))
    token_TD = np.concatenate([rng.normal(middle, width, (n, 2)) for middle, width, n in clouds])
    grid = np.stack(np.meshgrid(*[np.linspace(-3, 3, 200)] * 2), -1)
    score = lambda x: -((x[..., None, :] - centre_ED) ** 2).sum(-1)
    bias_E, colours = jnp.zeros(3), plt.cm.Set2(range(3))
    for i in range(9):
        load_E, new_E = _step(jnp.asarray(score(token_TD), jnp.float32), bias_E, 1)
        if i in (0, 1, 2, 8):
            axis = axes[1, (0, 1, 2, 8).index(i)]
            area = colours[np.argmax(score(grid) + np.asarray(bias_E), -1)]
            axis.imshow(area, origin="lower", extent=(-3, 3, -3, 3))
            axis.plot(*token_TD.T, "k.", ms=2)
            axis.plot(*centre_ED.T, "w^", ms=9, mec="black")
            axis.set(title=f"{i} alternations: loads {', '.join(map(str, load_E.tolist()))}", xticks=(), yticks=())
        bias_E = new_E
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/balance.png", dpi=100)
    print("wrote out/balance.png")


def _fastest(forms, budget=4.0):
    """Least seconds of each {name: compiled function}: ten interleaved rounds, fewer once it used up `budget`."""
    best, used = dict.fromkeys(forms, math.inf), dict.fromkeys(forms, 0.0)
    for _ in range(10):
        for name in (n for n in forms if used[n] < budget):
            start = time.perf_counter()
            jax.block_until_ready(forms[name]())
            best[name] = min(best[name], time.perf_counter() - start)
            used[name] += time.perf_counter() - start
    return best


def _bench(sizes=((4096, 64, 4), (65536, 64, 4), (65536, 256, 8), (65536, 384, 8))):
    try:
        jax.config.update("jax_num_cpu_devices", 2)             # as train.py splits a batch over two cores
    except RuntimeError:
        pass                                                                # a backend runs: take what there is
    print(f"The q-th largest of every column, float32 [T,E], q = T*K/E, on one {jax.devices()[0].device_kind}.\n"
          "Times over the bisection's own; error: largest distance from np.partition.")
    for T, E, K in sizes:
        q, valid_T = T * K // E, jnp.ones(T, bool)
        x_LTE = jax.random.normal(jax.random.key(0), (1, T, E))
        rows = {
            "bisection, exact": lambda x: qth_largest(x, valid_T, q),
            "histogram, 1,000 bins": lambda x: histogram_quantile(x, valid_T, q, *live_range(x, valid_T), 1000),
            "histogram, 10,000 bins": lambda x: histogram_quantile(x, valid_T, q, *live_range(x, valid_T), BINS),
            "lax.top_k(q)": lambda x: lax.top_k(jnp.swapaxes(x, 1, 2), q)[0][:, :, -1],
            "jnp.sort": lambda x: jnp.sort(x, axis=1)[:, T - q],
            "jnp.quantile": lambda x: jnp.quantile(x, (T - q) / (T - 1), axis=1)}
        # jit with the data as an argument: a closed-over constant would be folded away
        forms = {name: partial(jax.jit(f), x_LTE) for name, f in rows.items()}
        truth = largest(np.asarray(x_LTE[0]), q, 0)
        error = {name: float(np.abs(np.asarray(f()) - truth).max()) for name, f in forms.items()}
        forms["np.partition, outside XLA"] = lambda: largest(np.asarray(x_LTE[0]), q, 0)
        best = _fastest(forms)
        print(f"\nT = {T:,}, E = {E}, q = {q:,}: {best['bisection, exact'] * 1e3:.1f} ms")
        for name, seconds in best.items():
            print(f"  {name:28s}{seconds / best['bisection, exact']:8.2f} x   error {error.get(name, 0.0):.1e}")
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    print(f"\nShare of a training step: update on {mesh.size} device(s), over the fastest logged step of a run")
    for name, (L, T, E, K) in {"smoke": (4, 2048, 8, 2), "laptop": (6, 4096, 16, 2)}.items():
        f = lambda m_LTE, bias_LE: update("quantile", m_LTE, jnp.ones(m_LTE.shape[1], bool), bias_LE, K, "data")[0]
        f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(Spec(None, "data"), Spec()), out_specs=Spec(),
                                  check_vma=False))
        margin_LTE = jax.random.normal(jax.random.key(0), (L, T, E))
        margin_LTE = jax.device_put(margin_LTE, NamedSharding(mesh, Spec(None, "data")))
        f = partial(f, margin_LTE, jnp.zeros((L, E)))
        f()
        ms = 1e3 * _fastest({"": f})[""]
        step = min((row["seconds"] for row in _rows(Path("out", name, "metrics.jsonl"))), default=math.nan)
        print(f"  configs/{name}.py: {ms:.2f} ms, {ms / step / 10:.2f} % of {step * 1e3:.0f} ms (nan: no run)")


def _arena(config="configs/arena.py", seeds=3, folder="out/arena"):
    """Train the same model on the same data under every rule, as train.py would; finished runs are kept."""
    plt = _pyplot()
    labels, results, lines, setting = [*RULES, "sign@0.01"], {}, {}, None
    for seed in range(seeds):
        for label in labels:
            rule, _, rate = label.partition("@")
            run = Path(folder, f"{label}-seed{seed}")
            keys = {"balancer": rule, "balancer_rate": float(rate or 0), "seed": seed, "run_dir": run}
            if not (run / "result.json").exists():
                print(run, flush=True)
                command = [sys.executable, "train.py", config, *(f"--{k}={v}" for k, v in keys.items())]
                ended = subprocess.run(command, capture_output=True, text=True)
                if ended.returncode:
                    raise ValueError(f"{run}: train.py ended with {ended.returncode}: {ended.stderr[-300:]}")
            made = json.loads((run / "config.json").read_text())
            fixed = [made["data"]] + [{k: v for k, v in made[part].items() if k not in keys}
                                      for part in ("model", "train")]
            setting = setting or fixed
            if fixed != setting:
                raise ValueError(f"{run}: expected the config of the other runs, found another; delete it")
            results[label, seed] = json.loads((run / "result.json").read_text())
            lines[label, seed] = _rows(run / "metrics.jsonl")
    steps, floor = setting[2]["steps"], results["quantile", 0]["maxvio_floor"]

    def column(label, f):
        return np.array([f(results[label, seed], lines[label, seed]) for seed in range(seeds)])
    late = lambda rows, f: np.mean([f(row) for row in rows if row["step"] > 0.9 * steps])
    table = {label: {
        "loss": column(label, lambda r, rows: r["loss"]), "bpb": column(label, lambda r, rows: r["bpb"]),
        "all": column(label, lambda r, rows: np.mean([row["maxvio"] for row in rows])).mean() / floor,
        "end": column(label, lambda r, rows: r["maxvio"]) / floor,
        **{f: column(label, lambda r, rows: late(rows, lambda row: row["would_drop"][f])).mean()
           for f in ("1", "1.15", "1.33")},
        "dead": column(label, lambda r, rows: max(row["dead"] for row in rows)).mean(),
        "ms": 1e3 * column(label, lambda r, rows: min(row["seconds"] for row in rows)).min()} for label in labels}
    base = table["quantile"]
    print(f"\n{config}: {steps} steps, {seeds} seeds, same data and seeds for all. loss: held-out nats per token; "
          f"difference to\nquantile, seed by seed, with its standard error. MaxVio over its sampling floor of "
          f"{floor:.3f}; drop and MaxVio\nend: last tenth of the run. dead: most at any line. step: fastest line. "
          "* looks ahead in training")
    print(f"{'rule':16s}{'loss':>7s}{'difference':>18s}{'bits/byte':>10s}{'MaxVio run':>11s}{'end':>6s}"
          f"{'drop 1.0':>10s}{'1.15':>7s}{'1.33':>7s}{'dead':>6s}{'step ms':>8s}")
    for label, row in sorted(table.items(), key=lambda item: item[1]["loss"].mean()):
        gap = row["loss"] - base["loss"]
        error = gap.std(ddof=1) / seeds**0.5 if seeds > 1 else math.nan
        print(f"{label + '*' * (label in LEAKS):16s}{row['loss'].mean():7.4f}{gap.mean():+9.4f} +- {error:.4f}"
              f"{row['bpb'].mean():10.4f}{row['all']:11.1f}{row['end'].mean():6.1f}{row['1']:10.1%}"
              f"{row['1.15']:7.1%}{row['1.33']:7.1%}{row['dead']:6.1f}{row['ms']:8.0f}")
    better = lambda key: ", ".join(n for n in labels[1:] if (table[n][key] < base[key]).all()) or "none"
    print(f"better than quantile with every seed, in loss: {better('loss')}; in last MaxVio: {better('end')}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for i, label in enumerate(labels):
        style = dict(color=plt.cm.tab20(i), lw=2.5 if label == "quantile" else 1.2)
        every = np.mean([[row["maxvio"] for row in lines[label, seed]] for seed in range(seeds)], axis=0)
        left.semilogy([row["step"] for row in lines[label, 0]], every, label=label, **style)
        end, loss = table[label]["end"].mean(), table[label]["loss"]
        right.errorbar(end, loss.mean(), loss.std(), fmt="o", color=style["color"])
        right.annotate(label, (end, loss.mean()), xytext=(4, 3), textcoords="offset points", fontsize=8)
    left.axhline(floor, color="black", ls=":", lw=0.8)
    left.set(title="MaxVio, mean of seeds and layers; dotted: sampling floor", xlabel="step")
    left.legend(ncols=2, fontsize=7)
    right.set(title="held-out loss and its spread over seeds", xscale="log", ylabel="nats per token",
              xlabel="MaxVio at the end, over its floor")
    figure.savefig(Path(folder, "arena.png"), dpi=110)
    print(f"wrote {folder}/arena.png")


def _animate(run, frames=80):
    """run/metrics.jsonl -> run/plots/load.gif: one row a layer, one cell an expert, one frame a logged step."""
    plt = _pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter
    log = Path(run, "metrics.jsonl")
    rows = [row for row in _rows(log) if "load_LE" in row]
    if not rows:
        raise ValueError(f"{log}: expected lines with load_LE, as train.py writes for experts, found none")
    rows = rows[::-(-len(rows) // frames)]
    load = np.array([row["load_LE"] for row in rows])                       # [frames, L, E]; 1 is the mean load
    step, violation = [row["step"] for row in rows], load.max(-1).mean(-1) - 1
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.5), height_ratios=(2, 1), layout="constrained")
    picture = top.imshow(load[0], vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    figure.colorbar(picture, ax=top, label="load over the mean")
    top.set(xlabel="expert", ylabel="layer", yticks=range(load.shape[1]))
    bottom.semilogy(step, np.maximum(violation, 1e-3), lw=1)
    dot, = bottom.plot([], [], "o")
    bottom.set(xlabel="step", ylabel="MaxVio")

    def draw(i):
        picture.set_data(load[i])
        dot.set_data([step[i]], [max(violation[i], 1e-3)])
        top.set_title(f"step {step[i]}: MaxVio {violation[i]:.2f}")
    out = Path(run, "plots", "load.gif")
    out.parent.mkdir(exist_ok=True)
    FuncAnimation(figure, draw, len(rows)).save(out, PillowWriter(fps=10), dpi=80)
    print(f"wrote {out}, {len(rows)} frames")


def main(arguments):
    verbs = {(): _demonstrate, ("failures",): _print_failures, ("bench",): _bench, ("arena",): _arena}
    try:
        if arguments[:1] == ["animate"] and len(arguments) == 2:
            _animate(arguments[1])
        elif tuple(arguments) in verbs:
            verbs[tuple(arguments)]()
        else:
            raise ValueError(f"expected failures, bench, arena, animate RUN or nothing, found {arguments}")
    except ValueError as error:
        print(f"balance.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
