"""Load balancing of experts: quantile balancing, its rivals, the linear program behind. Imports: jax, numpy.

Run:  python balance.py                 the program solved before your eyes: out/balance.png, under a minute
      python balance.py failures | bench | arena | animate out/RUN      see the last section
Read: select -> qth_largest -> update -> estimators -> rivals -> how balanced is it -> the program -> runs.
The bias is state, not a parameter: one float32 array [L,E] in the train state, touched by no gradient and no
optimizer, added to the router's scores when experts are chosen and never when their outputs are mixed.

T tokens  E experts  K experts per token  L layers   q = T*K/E, the load every expert should carry
s_TE router scores   alpha_T a token's cutoff   beta_E an expert's threshold   bias_E = -beta_E"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The assignment that maximises total score subject to "K experts per token, q tokens per expert" is a linear
# program. Its dual is   D(alpha, beta) = sum_ij max(0, s_ij - alpha_i - beta_j) + K sum alpha + q sum beta,
# convex, and each block has a closed form: for fixed beta the best alpha_i is an order statistic of row i, for
# fixed alpha the best beta_j is an order statistic of column j. Quantile balancing takes one such alternation
# per training step, started from the last beta. There is no rate, no loss term and no other hyperparameter.
# [Su, kexue.fm 11619; as trained by Marin, openathena.ai/blog/quantile-balancing]
#
# Its rivals fit the same frame, so they share one interface. Every rule chooses experts by score + bias; a rule
# is where its bias comes from. `select` makes the choice, `update` makes the next bias, `auxiliary` the loss term
# of the two rules that have one. All read the same statistic: margins, each score minus its token's cutoff.

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

    Returns expert_TK int32, the K experts with the largest score + bias, and margin_TE float32, score minus
    alpha, where alpha_T is the (K+1)-th largest of score + bias: one top-(K+1) serves both. So margin + bias > 0
    says "chosen". K = E chooses everything and has nothing to balance; its margins are zero.
    "threshold" has no cutoff (alpha = 0) and no fixed K: its tokens get min(E, 2K) slots, best first, and
    moe.route silences those where margin + bias <= 0."""
    score_TE = lax.stop_gradient(logits_TE).astype(jnp.float32)
    if rule in SIGMOID:
        score_TE = jax.nn.sigmoid(score_TE)
    T, E = score_TE.shape
    if K == E:
        return jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), (T, E)), jnp.zeros_like(score_TE)
    if rule == "threshold":
        return lax.top_k(score_TE + bias_E, min(E, 2 * K))[1], score_TE
    if rule in LEAKS:
        bias_E = bias_within_batch(rule, score_TE, bias_E, K)
    value_TK1, expert_TK1 = lax.top_k(score_TE + bias_E, K + 1)
    alpha_T1 = value_TK1[:, K:] if rule != "bip" else jnp.maximum(0.0, value_TK1[:, K:])
    return expert_TK1[:, :K], score_TE - alpha_T1


# ------------------------------------------------------------------------------- the exact, pooled estimator

def _sortable(x):
    """Float32 to uint32 such that x < y as floats exactly when key(x) < key(y) as integers."""
    bits, sign = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32), jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, 0, bits)                     # -0.0 is +0.0; x + 0.0 would flush subnormals too
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _unsortable(key):
    bits = jnp.where(key >> 31 == 1, key & jnp.uint32((1 << 31) - 1), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def count_reaching(key_LTE, tried):
    """How many tokens' keys reach each tried key: [L,T,E], [*,L,E] -> int32 [*,L,E]."""
    return jnp.sum(key_LTE >= tried[:, :, None, :], axis=2, dtype=jnp.int32)


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
        tried = best_LE | (jnp.arange(1, 2**bits, dtype=jnp.uint32)[:, None, None] << shift)
        reached = count(key_LTE, tried)
        if axis is not None:
            reached = lax.psum(reached, axis)                            # the balancer's only communication
        return jnp.max(jnp.where(reached >= q, tried, best_LE), axis=0)

    start_LE = jnp.zeros((x_LTE.shape[0], x_LTE.shape[2]), jnp.uint32)
    return _unsortable(lax.fori_loop(0, 32 // bits, decide, start_LE))


def rank(tokens, K, E):
    """q = max(1, floor(tokens * K / E)) on reduced fractions: 46M tokens x 8 would overflow int32."""
    k, e = K // math.gcd(K, E), E // math.gcd(K, E)
    return jnp.maximum(1, (tokens // e) * k + (tokens % e) * k // e)


def update(rule, margin_LTE, valid_T, bias_LE, K, axis=None, rate=0.0):
    """This step's margins -> (the next step's bias_LE, kept_L: layers that kept their old bias).

    Call it once, after all layers: no collective of it stands in the layer loop, and nothing waits for its result
    before the next step. For "quantile" the bias is replaced, not moved: bias <- -(beta - mean(beta)), beta_j
    the q-th largest margin of expert j. With the (K+1)-th row cutoff of `select` this is the pair of order
    statistics that reaches the program's optimum; the published (K+1, q+1) pair can stall short of it (failures).
    Centring removes the one direction that the loads do not see, in which beta would drift (+.008 a step at 16,384
    tokens [measured: numpy, E=64, K=4]).
    A layer with a margin that is not finite keeps its old bias: a NaN logit must not outlive its step, and an
    infinite one must not move a rank. `rate`: 0 takes the rule's own. `axis`: as in qth_largest."""
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

    if rule in ("quantile", "quantile_ema"):
        new_LE = -qth_largest(margin_LTE, valid_T, q, axis)
    elif rule == "quantile_local":
        beta_LE = qth_largest(margin_LTE, valid_T, rank(here, K, E))
        new_LE = -everywhere(jnp.where(here > 0, beta_LE * (here / tokens), 0.0))
    elif rule == "quantile_hist":
        new_LE = -histogram_quantile(margin_LTE, valid_T, tokens * (K / E), *live_range(margin_LTE, valid_T, axis),
                                     BINS, axis)
    elif rule == "quantile_k3":                     # sigmoids lie in [0,1], so no margin can leave this range
        low_L, high_L = -1.0 - jnp.max(bias_LE, axis=1), 1.0 - jnp.min(bias_LE, axis=1)
        new_LE = -histogram_quantile(margin_LTE, valid_T, tokens * (K / E), low_L, high_L, K3_BINS, axis)
    elif rule == "bip":
        new_LE = -jnp.maximum(0.0, qth_largest(margin_LTE, valid_T, jnp.minimum(q + 1, tokens), axis))
    elif rule == "threshold":
        new_LE = -qth_largest(margin_LTE, valid_T, q, axis)
    else:
        excess_LE = everywhere(loads(margin_LTE, valid_T, bias_LE)) * (E / K) / tokens - 1.0
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
        alpha_T1 = jnp.maximum(0.0, lax.top_k(score_TE + bias_E, K + 1)[0][:, K:])
        beta_LE = qth_largest((score_TE - alpha_T1)[None], jnp.ones(T, bool), min(T, T * K // E + 1))
        return -jnp.maximum(0.0, beta_LE[0])
    return lax.fori_loop(0, 4, clamped, bias_E)


def auxiliary(rule, prob_LTE, margin_LTE, bias_LE, valid_T, tokens, K, axis=None, rate=0.0):
    """The load-balancing loss sum_l E sum_j f_j P_j, times its rate: this device's share, so that shares add up.

    P_j: mean router probability of expert j, the only part with a gradient. f_j: its share of the assignments, in
    this device's microbatch ("aux_micro") or over all devices ("aux_global", one psum of int32 [L,E]). `tokens`:
    valid tokens of the whole batch. Even loads give 1 per layer. Zero for every other rule."""
    if rule not in ("aux_micro", "aux_global"):
        return 0.0
    E = prob_LTE.shape[2]
    load_LE, here = loads(margin_LTE, valid_T, bias_LE), jnp.sum(valid_T, dtype=jnp.int32)
    if rule == "aux_global" and axis is not None:
        load_LE, here = lax.psum((load_LE, here), axis)
    f_LE = load_LE / jnp.maximum(here * K, 1)
    P_LE = jnp.sum(jnp.where(valid_T[:, None], prob_LTE, 0.0), axis=1) / tokens
    return (rate or RULES[rule]) * E * jnp.sum(lax.stop_gradient(f_LE) * P_LE)


# ----------------------------------------------------------------------------------------- how balanced is it

def loads(margin_LTE, valid_T, bias_LE):
    """Valid tokens of this device that chose each expert, read off the margins: int32 [L,E]. A token that ties
    with its cutoff to the bit is not counted."""
    return jnp.sum((margin_LTE + bias_LE[:, None] > 0) & valid_T[:, None], axis=1, dtype=jnp.int32)


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


def dual(s_TE, beta_E, K):
    """D(alpha, beta) with the best alpha for this beta; no feasible assignment is worth more."""
    alpha_T1 = largest(s_TE - beta_E, K + 1, 1)
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
