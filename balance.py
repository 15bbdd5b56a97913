"""Load balancing of experts: quantile balancing, two textbook rules, and measures of balance.

Run:  python balance.py      the dual falls to its optimum and the loads even out, in a few seconds
Read: Rule -> top_k -> kth_largest -> the rules -> select, update, auxiliary_loss -> the measures.
More rules: tests/rivals.py. Their comparison: tests/arena.py. The program's solver: tests/lp.py.

T tokens  E experts  K experts per token  L layers  C candidates   q = T*K/E, an even load
s_TE router scores   alpha_T a token's cutoff   beta_E an expert's threshold   bias_E = -beta_E
margin_TE = s + bias - alpha"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The assignment that maximizes total score subject to "K experts per token, q tokens per expert" is
# a linear program. Its dual is
#     D(alpha, beta) = sum_ij max(0, s_ij - alpha_i - beta_j) + K sum alpha + q sum beta,
# convex, and each block has a closed form: for fixed beta the best alpha_i is an order statistic of
# row i, for fixed alpha the best beta_j is an order statistic of column j. Quantile balancing takes
# one such alternation per training step, started from the last beta. There is no step size, no loss
# term and no other hyperparameter.
# [Su, kexue.fm 11619; as trained by Marin, openathena.ai/blog/quantile-balancing]
#
# The bias is state, not a parameter: one float32 array [L,E] in the train state, touched by no
# gradient and no optimizer. It is added to the router's scores when experts are chosen, and never
# when their outputs are mixed.


class Rule(NamedTuple):
    """How experts are chosen and how balance is kept. Each field is described in its comment."""
    # (logits_TE, bias_E, K) -> (expert_TK, margin_TE); an expert id of E: no expert in this slot
    select: Callable
    # (margin_LTE, valid_T, bias_LE, K, axis, rate, platform) -> new bias_LE; None: it never moves
    next_bias: Callable | None = None
    rate: float = 0.0               # the default step size of a rule that has one
    # (prob_LTE, margin_LTE, valid_T, tokens, K, axis, rate) -> this device's share; None: no loss
    loss: Callable | None = None
    memory: int = 0     # arrays [L,E], zeros at first: next_bias takes them last, returns them last


def top_k(score_TE, bias_E, K):
    """The K experts with the largest score + bias, best first: (expert_TK int32, margin_TE).

    alpha is the (K+1)-th largest score + bias. A positive margin says "chosen", and the cutoff's
    own margin is exactly 0; s - alpha alone would round, and loads could not be counted from it."""
    value_TK1, expert_TK1 = small_top_k(score_TE + bias_E, K + 1)
    return expert_TK1[:, :K], (score_TE + bias_E) - value_TK1[:, K:]


def sigmoid_top_k(logits_TE, bias_E, K):
    """top_k of sigmoid(logits), between 0 and 1: what rules with a fixed step size need."""
    return top_k(jax.nn.sigmoid(logits_TE), bias_E, K)


def small_top_k(x_TE, k):
    """lax.top_k for a small k: (values, indices int32), both [T,k]; of equals the first is first.

    NaN counts as infinity. Inside a loop over layers lax.top_k sorts the whole row: on a CPU that
    took 29 of the 80 ms of a step with 64 experts, and this takes 1 [measured: LOG.md]."""
    x_TE = jnp.where(jnp.isnan(x_TE), jnp.inf, x_TE)
    E = x_TE.shape[1]
    column_E = jnp.arange(E, dtype=jnp.int32)
    left_TE, values, indices = True, [], []
    for _ in range(k):
        value_T = jnp.max(x_TE, axis=1, initial=-jnp.inf, where=left_TE)
        here_TE = (x_TE == value_T[:, None]) & left_TE
        index_T = jnp.min(jnp.where(here_TE, column_E, E), axis=1)
        left_TE = left_TE & (column_E != index_T[:, None])
        values.append(value_T)
        indices.append(index_T)
    return jnp.stack(values, axis=1), jnp.stack(indices, axis=1)


# ------------------------------------------------------------- an exact order statistic, pooled

def kth_largest(x_LTE, valid_T, k, axis=None, platform="cpu"):
    """The k-th largest of x over the valid tokens, for each layer and expert: [L,E], bit-exact.

    It decides the 32 bits of the answer's integer key from the top: a bit stays set if at least k
    tokens reach the candidate. That needs no sort and no scatter, and because counts are integers,
    the answer does not depend on how tokens lie on devices or in microbatches. Each round is ONE
    psum of int32 [C,L,E] for all layers. k: int32 scalar, 1 <= k <= valid tokens. axis: mesh axes
    over which tokens are split, None on one device."""
    # each round is a wait for all devices of a pod; on a CPU every comparison costs [measured]
    bits = 4 if platform == "tpu" else 1
    key_LTE = jnp.where(valid_T[None, :, None], _sortable(x_LTE), 0)    # padding is below all
    def decide(i, best_LE):
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        step_C = jnp.arange(1, 2**bits, dtype=jnp.uint32) << shift
        candidate_CLE = best_LE | step_C[:, None, None]
        count_CLE = jnp.sum(key_LTE >= candidate_CLE[:, :, None], axis=2, dtype=jnp.int32)
        enough_CLE = _sum_devices(count_CLE, axis) >= k
        return jnp.max(jnp.where(enough_CLE, candidate_CLE, best_LE), axis=0)
    start_LE = jnp.zeros((x_LTE.shape[0], x_LTE.shape[2]), jnp.uint32)
    return _unsortable(lax.fori_loop(0, 32 // bits, decide, start_LE))


def _sortable(x):
    """Float32 to uint32 such that x < y as floats exactly when key(x) < key(y) as integers."""
    sign = jnp.uint32(1 << 31)
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(bits == sign, 0, bits)         # -0.0 is +0.0; x + 0.0 would lose subnormals
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _unsortable(key):
    bits = jnp.where(key >> 31 == 1, key ^ jnp.uint32(1 << 31), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _sum_devices(x, axis):
    return x if axis is None else lax.psum(x, axis)


def even_load(tokens, K, E):
    """q = max(1, floor(tokens * K / E)), on a reduced fraction: 300M tokens x 8 overflows int32."""
    common = math.gcd(K, E)
    k, e = K // common, E // common
    return jnp.maximum(1, (tokens // e) * k + (tokens % e) * k // e)


# ------------------------------------------------------------------------------------- the rules

def quantile(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """bias <- -(beta - mean(beta)): beta_j is the q-th largest s - alpha, over all devices.

    That is the q-th largest margin minus the old bias, so the old bias is replaced, not moved. This
    pair of order statistics, (K+1)-th and q-th, reaches the program's optimum; the published pair,
    (K+1)-th and (q+1)-th, can stall short of it (python tests/arena.py failures)."""
    q = even_load(_sum_devices(jnp.sum(valid_T, dtype=jnp.int32), axis), K, bias_LE.shape[1])
    return centered(bias_LE - kth_largest(margin_LTE, valid_T, q, axis, platform))


def quantile_local(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """The mean of the devices' own quantiles, weighted by their tokens. The 129B run took the plain
    mean [cited: marin #4697]. Unlike `quantile` it depends on how tokens are split over devices."""
    here = jnp.sum(valid_T, dtype=jnp.int32)
    share = here / _sum_devices(here, axis)
    q = even_load(here, K, bias_LE.shape[1])
    own_LE = kth_largest(margin_LTE, valid_T, q, platform=platform)
    mean_LE = _sum_devices(jnp.where(here > 0, own_LE * share, 0.0), axis)
    return centered(bias_LE - mean_LE)


def sign(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """A step of fixed size toward the even load: loss-free balancing [cited: arXiv 2408.15664]."""
    return centered(bias_LE - rate * jnp.sign(excess_load(margin_LTE, valid_T, K, axis)))


def excess_load(margin_LTE, valid_T, K, axis):
    """Load over even load, minus 1, from the tokens of all devices: float32 [L,E]."""
    load_LE, tokens = _sum_devices((loads(margin_LTE, valid_T), jnp.sum(valid_T)), axis)
    return load_LE * (margin_LTE.shape[2] / K) / tokens - 1.0


def centered(bias_LE):
    """Mean 0 in each layer. Otherwise thresholds drift, unseen by the loads, by .008 a step at
    16,384 tokens [measured: numpy, E=64, K=4]."""
    return bias_LE - jnp.mean(bias_LE, axis=1, keepdims=True)


def aux_global(prob_LTE, margin_LTE, valid_T, tokens, K, axis, rate):
    """The load-balancing loss, rate * sum_l E sum_j f_j P_j [cited: Switch, arXiv 2101.03961].

    P_j is the mean router probability of expert j, the only part with a gradient, f_j its share of
    the assignments on all devices [cited: arXiv 2501.11873]. Even loads give `rate` per layer. With
    gradient accumulation f counts the current microbatch: the whole batch is not known yet."""
    here = jnp.sum(valid_T, dtype=jnp.int32)
    load_LE, here = _sum_devices((loads(margin_LTE, valid_T), here), axis)
    f_LE = load_LE / jnp.maximum(here * K, 1)
    P_LE = jnp.sum(jnp.where(valid_T[:, None], prob_LTE, 0.0), axis=1) / tokens
    return rate * prob_LTE.shape[2] * jnp.sum(lax.stop_gradient(f_LE) * P_LE)


RULES = {                                               # `balancer` in a config
    "quantile": Rule(top_k, quantile),
    "quantile_local": Rule(top_k, quantile_local),
    "sign": Rule(sigmoid_top_k, sign, 1e-3),            # rate [cited: arXiv 2408.15664]
    "aux_global": Rule(top_k, None, 1e-2, aux_global),  # rate [cited: arXiv 2101.03961]
    "none": Rule(top_k),
}
# a rule whose choice looks at later tokens -> the rule that evaluation and sampling use instead
NON_CAUSAL = {}


# --------------------------------------------------------------------------- what training calls

def rule_named(name):
    """RULES[name], or a ValueError that says what there is."""
    if name not in RULES:
        raise ValueError(f"balancer: expected one of {', '.join(RULES)}, found {name!r}; "
                         "`from tests import rivals` in the config adds the rules of that file")
    return RULES[name]


def select(rule, logits_TE, bias_E, K):
    """Choose experts: (expert_TK int32, E in an empty slot; margin_TE float32). No gradient passes.

    K = E chooses everything and has nothing to balance; its margins are zero."""
    known = rule_named(rule)
    logits_TE = lax.stop_gradient(logits_TE).astype(jnp.float32)
    if K < logits_TE.shape[1]:
        return known.select(logits_TE, bias_E, K)
    expert_TK = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), logits_TE.shape)
    return expert_TK, jnp.zeros_like(logits_TE)


def update(rule, margin_LTE, valid_T, bias_LE, K, axis=None, rate=0.0, platform="cpu"):
    """This step's margins -> (the next step's bias_LE, kept_L: layers that kept their old bias).

    Call it once, after all layers: the layer loop has no collective of it, nothing waits for it. A
    layer with a margin that is not finite keeps its bias, so that a NaN does not outlive its step.
    bias_LE: alone, or (bias_LE, *memory). rate: 0 takes the rule's own. axis: see kth_largest."""
    known = rule_named(rule)
    if K == margin_LTE.shape[2] or known.next_bias is None:
        return bias_LE, jnp.zeros(len(margin_LTE), bool)
    broken_L = jnp.any(~jnp.isfinite(margin_LTE) & valid_T[:, None], (1, 2)).astype(jnp.int32)
    here = jnp.sum(valid_T, dtype=jnp.int32)
    tokens, broken_L = _sum_devices((here, broken_L), axis)
    alone = not isinstance(bias_LE, tuple)
    old = (bias_LE, *[jnp.zeros_like(bias_LE)] * known.memory) if alone else bias_LE
    args = margin_LTE, valid_T, old[0], K, axis, rate or known.rate, platform, *old[1:]
    new = jnp.stack(jax.tree.leaves(known.next_bias(*args)))
    kept_L = (broken_L > 0) | (tokens == 0) | ~jnp.all(jnp.isfinite(new), axis=(0, 2))
    new = tuple(jnp.where(kept_L[:, None], jnp.stack(old), new))
    return new[0] if alone else new, kept_L


def auxiliary_loss(rule, prob_LTE, margin_LTE, valid_T, tokens, K, axis=None, rate=0.0):
    """This device's share of the rule's loss; 0.0 where it has none. tokens: of the whole batch."""
    known = rule_named(rule)
    if known.loss is None:
        return 0.0
    return known.loss(prob_LTE, margin_LTE, valid_T, tokens, K, axis, rate or known.rate)


# --------------------------------------------------------------------------- how balanced is it

def loads(margin_LTE, valid_T):
    """Valid tokens of this device per expert, int32 [L,E]. A tie with the cutoff does not count."""
    return jnp.sum((margin_LTE > 0) & valid_T[:, None], axis=1, dtype=jnp.int32)


def max_violation(load_LE):
    """MaxVio of each layer: largest over mean load, minus 1. 0 is perfect, E/K - 1 collapse. [L]"""
    return jnp.max(load_LE, axis=-1) / jnp.mean(load_LE, axis=-1) - 1.0


def drop_fraction(load_LE, capacity_factor):
    """Share of assignments above capacity_factor * mean load: what fixed buffers would drop. [L]"""
    mean_L1 = jnp.mean(load_LE, axis=-1, keepdims=True)
    over_LE = jnp.maximum(0.0, load_LE - capacity_factor * mean_L1)
    return jnp.sum(over_LE, axis=-1) / jnp.sum(load_LE, axis=-1)


def sampling_floor(tokens, E, K):
    """MaxVio that remains on new, independent tokens even with the best bias.

    0.7 was measured for one update per step at E=64, K=4, 1,024 to 65,536 tokens. Real text is
    clustered by document, so a perfect balancer shows a few times this floor on small batches."""
    if not 1 < E > K:
        return 0.0
    return 0.7 * math.sqrt(4 * math.log(E) * (1 - K / E) / (tokens * K / E))


# ----------------------------------------------------------------------------- python balance.py

@partial(jax.jit, static_argnums=(2, 3, 4))
def step(s_TE, bias_E, K, rule="quantile", rate=0.0):
    """One layer on one device: (load_E under this bias, the next bias_E)."""
    T, E = s_TE.shape
    expert_TK, margin_TE = select(rule, s_TE, bias_E, K)
    new_LE, _ = update(rule, margin_TE[None], jnp.ones(T, bool), bias_E[None], K, rate=rate)
    return jnp.bincount(expert_TK.reshape(-1), length=E), new_LE[0]


def demonstrate():
    """One batch, update by update, beside scipy's solver (bias = -beta); then new batches."""
    from scipy.optimize import linear_sum_assignment
    rng = np.random.default_rng(0)
    s_TE = (rng.standard_normal((64, 8)) + rng.standard_normal(8)).astype(np.float32)
    seats_TT = np.repeat(s_TE, 8, axis=1)                   # K = 1: each expert is q = 8 seats
    optimum = seats_TT[linear_sum_assignment(seats_TT, maximize=True)].sum()
    print(f"64 tokens, 8 experts, K = 1: the best even assignment is worth {optimum:.4f} (scipy)")
    bias_E = jnp.zeros(8)
    for i in range(8):
        load_E, new_E = step(s_TE, bias_E, 1)
        alpha_T1 = np.sort(s_TE + bias_E, axis=1)[:, -2:-1]
        dual = np.maximum(0, s_TE + bias_E - alpha_T1).sum() + alpha_T1.sum() - 8 * bias_E.sum()
        print(f"after {i} updates: dual - optimum {dual - optimum:8.4f}, loads {load_E}")
        bias_E = new_E
    T, E, K, bias_E = 4096, 64, 4, jnp.zeros(64)
    popular_E = rng.standard_normal(E)
    print(f"New batches of {T} tokens, {E} experts, K = {K}; floor {sampling_floor(T, E, K):.3f}")
    for i in range(6):
        load_E, bias_E = step(jnp.asarray(rng.standard_normal((T, E)) + popular_E), bias_E, K)
        print(f"after {i} updates: MaxVio {max_violation(load_E):6.3f}")


if __name__ == "__main__":
    import argparse
    argparse.ArgumentParser(usage=__doc__).parse_args()      # --help, and no other word
    demonstrate()
