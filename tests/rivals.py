"""Ten more rules of balancing. Importing this file adds them to balance.RULES and NON_CAUSAL.

A config gets them by the line `from tests import rivals`, as configs/arena.py does. They are here
to be compared (python tests/arena.py); we recommend none of them.

L layers  T tokens  E experts  K experts per token  S slots   margin_TE = score + bias - alpha, as
balance.py has it"""

import jax
import jax.numpy as jnp
from jax import lax

import balance

BINS = 10_000           # of quantile_hist [cited: openathena.ai/blog/quantile-balancing]
K3_BINS = 1_000         # of quantile_k3 [cited: Kimi K3; TransformerEngine #3395]
SINKHORN_ROUNDS = 30    # [assumed]
BIP_ROUNDS = 4          # [assumed]; the paper, arXiv 2502.15451, tries several


# -------------------------------------------------------------------- quantiles from a histogram

def histogram_quantile(x_LTE, valid_T, q, low_L, high_L, bins, axis=None):
    """About the q-th largest (q may be fractional) of x, from equal bins on [low, high]: [L,E].

    One psum of int32 [L,E,bins], then a straight line inside the bin where the count from above
    crosses q, so the error is at most one bin width. The counts are summed in int32: a running sum
    in float32 stops being exact at 2**24."""
    L, T, E = x_LTE.shape
    tiny = jnp.finfo(jnp.float32).tiny
    high_L11 = high_L[:, None, None]
    width_L11 = jnp.maximum((high_L - low_L) / bins, tiny)[:, None, None]

    place = (high_L11 - x_LTE) / width_L11                          # the largest x is in bin 0
    place = jnp.clip(jnp.where(jnp.isfinite(place), place, 0), 0, bins - 1).astype(jnp.int32)
    index = (jnp.arange(L)[:, None, None], jnp.arange(E), place)
    one_or_zero = valid_T[None, :, None].astype(jnp.int32)
    count_LEb = jnp.zeros((L, E, bins), jnp.int32).at[index].add(one_or_zero)
    if axis is not None:
        count_LEb = lax.psum(count_LEb, axis)

    until_LEb = jnp.cumsum(count_LEb, axis=2)
    crossing = jnp.sum(until_LEb < q, axis=2, keepdims=True)
    inside = jnp.take_along_axis(count_LEb, crossing, axis=2)
    before = jnp.take_along_axis(until_LEb, crossing, axis=2) - inside
    share = (q - before) / jnp.maximum(inside, 1)
    return (high_L11 - (crossing + share) * width_L11)[:, :, 0]


def min_and_max(x_LTE, valid_T, axis=None):
    """Smallest and largest valid x of each layer, over all devices: [L], [L]. One outlier shows."""
    valid = valid_T[None, :, None]
    low_L = jnp.min(jnp.where(valid, x_LTE, jnp.inf), axis=(1, 2))
    high_L = jnp.max(jnp.where(valid, x_LTE, -jnp.inf), axis=(1, 2))
    if axis is None:
        return low_L, high_L
    return lax.pmin(low_L, axis), lax.pmax(high_L, axis)


def quantile_hist(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """The quantile from 10,000 bins over the range that the scores have in this batch."""
    x_LTE = margin_LTE - bias_LE[:, None]                           # s - alpha
    low_L, high_L = min_and_max(x_LTE, valid_T, axis)
    q = all_tokens(valid_T, axis) * (K / bias_LE.shape[1])
    return balance.centered(-histogram_quantile(x_LTE, valid_T, q, low_L, high_L, BINS, axis))


def quantile_k3(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """The quantile from 1,000 bins over the range that sigmoid scores can have at all."""
    x_LTE = margin_LTE - bias_LE[:, None]                           # s - alpha
    low_L = -1.0 - jnp.max(bias_LE, axis=1)
    high_L = 1.0 - jnp.min(bias_LE, axis=1)
    q = all_tokens(valid_T, axis) * (K / bias_LE.shape[1])
    return balance.centered(-histogram_quantile(x_LTE, valid_T, q, low_L, high_L, K3_BINS, axis))


def quantile_ema(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """A moving average of the exact quantile [cited: NVIDIA/Megatron-LM #5349, with .9]."""
    new_LE = balance.quantile(margin_LTE, valid_T, bias_LE, K, axis, rate, platform)
    return bias_LE + rate * (new_LE - bias_LE)


def all_tokens(valid_T, axis):
    here = jnp.sum(valid_T, dtype=jnp.int32)
    return here if axis is None else lax.psum(here, axis)


# ---------------------------------------------------------------------------------- other steps

def sign_rms(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """The excess load scaled to a root mean square of `rate` [Su, kexue.fm 10757; rate assumed]."""
    excess_LE = balance.excess_load(margin_LTE, valid_T, K, axis)
    rms_L1 = jnp.sqrt(jnp.mean(excess_LE**2, axis=1, keepdims=True))
    return balance.centered(bias_LE - rate * (excess_LE / jnp.maximum(rms_L1, 1e-9)))


def proportional(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """A step in proportion to the excess load [cited: arXiv 2408.15664; rate assumed]."""
    return balance.centered(bias_LE - rate * balance.excess_load(margin_LTE, valid_T, K, axis))


def heavy_ball(margin_LTE, valid_T, bias_LE, K, axis, rate, platform, speed_LE):
    """`proportional` with momentum: a rule with a memory of one array [rate and .9 assumed]."""
    speed_LE = 0.9 * speed_LE + balance.excess_load(margin_LTE, valid_T, K, axis)
    return balance.centered(bias_LE - rate * speed_LE), speed_LE


def aux_micro(prob_LTE, margin_LTE, valid_T, tokens, K, axis, rate):
    """The auxiliary loss with the loads of this device's microbatch [cited: arXiv 2101.03961]."""
    return balance.aux_global(prob_LTE, margin_LTE, valid_T, tokens, K, None, rate)


# ------------------------------------------------------------- rules that see the batch they route

def bip_select(logits_TE, bias_E, K):
    """Binary integer programming [cited: arXiv 2502.15451]: the program with <= for =, so that
    alpha, beta >= 0, solved on this device's rows from the last bias. Padding is counted."""
    score_TE = jax.nn.sigmoid(logits_TE)
    T, E = score_TE.shape

    def alternate(_, bias_E):
        value_TK1, _ = balance.small_top_k(score_TE + bias_E, K + 1)
        alpha_T1 = jnp.maximum(0.0, value_TK1[:, K:])
        next_place = min(T, T * K // E + 1)
        beta_LE = balance.kth_largest((score_TE - alpha_T1)[None], jnp.ones(T, bool), next_place)
        return -jnp.maximum(0.0, beta_LE[0])

    solved_E = lax.fori_loop(0, BIP_ROUNDS, alternate, bias_E)
    value_TK1, expert_TK1 = balance.small_top_k(score_TE + solved_E, K + 1)
    alpha_T1 = jnp.maximum(0.0, value_TK1[:, K:])
    return expert_TK1[:, :K], (score_TE + bias_E) - alpha_T1


def bip_bias(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """Not centered: the level decides which tokens get fewer than K experts."""
    tokens = all_tokens(valid_T, axis)
    next_place = jnp.minimum(balance.even_load(tokens, K, bias_LE.shape[1]) + 1, tokens)
    next_LE = balance.kth_largest(margin_LTE, valid_T, next_place, axis, platform)
    return -jnp.maximum(0.0, next_LE - bias_LE)


def sinkhorn_select(score_TE, bias_E, K):
    """The top K of a doubly stochastic plan [cited: S-BASE, arXiv 2202.01169]: rows and columns of
    exp(score) are scaled in turn. The plan's top K is the top K of score + log column factor."""
    def scale(_, factor_E):
        row_T1 = jax.nn.logsumexp(score_TE + factor_E, axis=1, keepdims=True)
        return -jax.nn.logsumexp(score_TE - row_T1, axis=0)

    factor_E = lax.fori_loop(0, SINKHORN_ROUNDS, scale, jnp.zeros(score_TE.shape[1]))
    return balance.top_k(score_TE, factor_E, K)


# ------------------------------------------------------------------------------------- no fixed K

def threshold_select(score_TE, bias_E, K):
    """An expert answers every token above its threshold [Su, kexue.fm 11626]. The cutoff is 0.

    A token gets min(E, 2K) slots, best first; slots whose margin is not positive have expert E."""
    E = score_TE.shape[1]
    margin_TS, expert_TS = balance.small_top_k(score_TE + bias_E, min(E, 2 * K))
    return jnp.where(margin_TS > 0, expert_TS, E), score_TE + bias_E


def threshold_bias(margin_LTE, valid_T, bias_LE, K, axis, rate, platform):
    """A step toward the exact quantile; not centered, since the level decides how many answer."""
    q = balance.even_load(all_tokens(valid_T, axis), K, bias_LE.shape[1])
    new_LE = bias_LE - balance.kth_largest(margin_LTE, valid_T, q, axis, platform)
    return bias_LE + rate * (new_LE - bias_LE)


RIVALS = {
    "quantile_hist": balance.Rule(balance.top_k, quantile_hist),
    "quantile_k3": balance.Rule(balance.sigmoid_top_k, quantile_k3),
    "quantile_ema": balance.Rule(balance.top_k, quantile_ema, rate=0.1),
    "aux_micro": balance.Rule(balance.top_k, loss=aux_micro, rate=1e-2),
    "sign_rms": balance.Rule(balance.sigmoid_top_k, sign_rms, rate=1e-2),
    "proportional": balance.Rule(balance.sigmoid_top_k, proportional, rate=2e-2),
    "heavy_ball": balance.Rule(balance.sigmoid_top_k, heavy_ball, rate=2e-3, memory=1),
    "bip": balance.Rule(bip_select, bip_bias),
    "sinkhorn": balance.Rule(sinkhorn_select),
    "threshold": balance.Rule(threshold_select, threshold_bias, rate=0.1),
}
balance.RULES |= RIVALS
balance.NON_CAUSAL |= {"sinkhorn": "none", "bip": "sign"}   # rules with the same scores, causal
