"""Quantile balancing: the router's load balancer, an exact solver step of a linear program. Imports: jax only.

Run:  python balance.py            loads evening out, alternation by alternation; writes out/balance.png
Read: select -> qth_largest -> next_bias -> how balanced is it -> the demonstration.
The bias is state, not a parameter: one float32 array [L,E] in the train state, touched by no gradient and no
optimizer, added to the router's logits when experts are chosen and never when their outputs are mixed.

T tokens  E experts  K experts per token  L layers   q = T*K/E, the load every expert should carry
s_TE router logits (the scores)   alpha_T a token's cutoff   beta_E an expert's threshold   bias_E = -beta_E"""

import math

import jax
import jax.numpy as jnp
from jax import lax

# The assignment that maximises total score subject to "K experts per token, q tokens per expert" is a linear
# program. Its dual is   D(alpha, beta) = sum_ij max(0, s_ij - alpha_i - beta_j) + K sum alpha + q sum beta,
# convex, and each block has a closed form: for fixed beta the best alpha_i is an order statistic of row i, for
# fixed alpha the best beta_j is an order statistic of column j. Quantile balancing takes one such alternation
# per training step, started from the last beta. There is no rate, no loss term and no other hyperparameter.
# [Su, kexue.fm 11619; as trained by Marin, openathena.ai/blog/quantile-balancing]


def select(logits_TE, bias_E, K):
    """Choose experts and measure every score against its token's cutoff.

    Returns expert_TK int32, the K experts with the largest logit + bias, and margin_TE float32, logit minus
    alpha, where alpha_T is the (K+1)-th largest of logit + bias: one top-(K+1) serves both. K = E chooses
    everything and has nothing to balance; its margins are zero, which leaves the bias where it is."""
    logits_TE = lax.stop_gradient(logits_TE).astype(jnp.float32)
    T, E = logits_TE.shape
    if K == E:
        return jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), (T, E)), jnp.zeros_like(logits_TE)
    value_TK1, expert_TK1 = lax.top_k(logits_TE + bias_E, K + 1)
    return expert_TK1[:, :K], logits_TE - value_TK1[:, K:]


def _sortable(x):
    """Float32 to uint32 such that x < y as floats exactly when key(x) < key(y) as integers."""
    bits, sign = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32), jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, 0, bits)                     # -0.0 is +0.0; x + 0.0 would flush subnormals too
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _unsortable(key):
    bits = jnp.where(key >> 31 == 1, key & jnp.uint32((1 << 31) - 1), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def qth_largest(x_LTE, valid_T, q, axis=None):
    """The q-th largest of x over the valid tokens, for each layer and expert: [L,E], exact to the bit.

    Found by deciding the 32 bits of the answer's integer key from the top: a bit stays set if at least q
    tokens reach the candidate. 32 passes of compare and count need no sort and no scatter, and because the
    counts are integers the answer does not depend on how tokens lie on devices or in microbatches.
    `axis`: mesh axes over which tokens are split; None on one device. Each round is ONE psum of int32 [L,E]
    for all layers together, so depth does not multiply the rounds. q: int32 scalar, 1 <= q <= valid tokens."""
    key_LTE = jnp.where(valid_T[None, :, None], _sortable(x_LTE), 0)      # padding sorts below every real number

    def decide(i, best_LE):
        candidate_LE = best_LE | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        count_LE = jnp.sum(key_LTE >= candidate_LE[:, None, :], axis=1, dtype=jnp.int32)
        if axis is not None:
            count_LE = lax.psum(count_LE, axis)                          # the balancer's only communication
        return jnp.where(count_LE >= q, candidate_LE, best_LE)

    start_LE = jnp.zeros((x_LTE.shape[0], x_LTE.shape[2]), jnp.uint32)
    return _unsortable(lax.fori_loop(0, 32, decide, start_LE))


def next_bias(margin_LTE, valid_T, bias_LE, K, axis=None):
    """The bias for the next step, from this step's margins: bias <- -(beta - mean(beta)), a full replacement.

    beta_j is the q-th largest margin of expert j, q = max(1, floor(valid tokens * K / E)): with the (K+1)-th
    row cutoff of `select` this is the pair of order statistics that reaches the program's optimum; the
    published (K+1, q+1) pair can stall short of it. Centring removes the one direction that the loads do not
    see, in which beta would drift (+.008 a step at 16,384 tokens [measured: numpy, E=64, K=4]).
    A layer whose new bias is not finite keeps its old one: a NaN logit must not outlive its step."""
    E = margin_LTE.shape[2]
    if K == E:
        return bias_LE
    tokens = jnp.sum(valid_T, dtype=jnp.int32)
    if axis is not None:
        tokens = lax.psum(tokens, axis)
    g = math.gcd(K, E)                                                   # tokens * K / E without int32 overflow
    q = jnp.maximum(1, (tokens // (E // g)) * (K // g) + (tokens % (E // g)) * (K // g) // (E // g))
    beta_LE = qth_largest(margin_LTE, valid_T, q, axis)
    new_LE = jnp.mean(beta_LE, axis=1, keepdims=True) - beta_LE
    sound = jnp.all(jnp.isfinite(new_LE), axis=1, keepdims=True) & (tokens > 0)
    return jnp.where(sound, new_LE, bias_LE)


# ----------------------------------------------------------------------------------------- how balanced is it

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


# ------------------------------------------------------------------------------------------ python balance.py

def _demonstrate():
    from pathlib import Path

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    T, E, K = 4096, 64, 4
    rng = np.random.default_rng(0)
    taste_E = rng.standard_normal(E)                                 # some experts are liked by every token
    batch = lambda: jnp.asarray(rng.standard_normal((T, E)) + taste_E, jnp.float32)
    load_of = lambda s, bias: jnp.bincount(select(s, bias, K)[0].reshape(-1), length=E)
    seen, fresh, valid = batch(), batch(), jnp.ones(T, bool)

    print(f"{T} tokens choose {K} of {E} experts; every expert should get q = {T * K // E}.")
    print("alternations   MaxVio, same batch   MaxVio, next batch   dead experts")
    bias, history = jnp.zeros(E), []
    for step in range(11):
        load, ahead = load_of(seen, bias), load_of(fresh, bias)
        history.append((np.sort(np.asarray(load))[::-1], float(max_violation(load)), float(max_violation(ahead))))
        if step in (0, 1, 2, 3, 5, 10):
            print(f"{step:12d} {history[-1][1]:20.3f} {history[-1][2]:20.3f} {int((load == 0).sum()):14d}")
        bias = next_bias(select(seen, bias, K)[1][None], valid, bias[None], K)[0]
    floor = sampling_floor(T, E, K)
    print(f"sampling floor of the next batch: {floor:.3f}. In training one alternation per step is enough.")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for step in (0, 1, 2, 10):
        left.plot(history[step][0], label=f"{step} alternations")
    left.axhline(T * K / E, color="black", lw=0.8, ls=":")
    left.set(xlabel="expert, sorted by load", ylabel="tokens", title="expert loads evening out")
    left.legend()
    right.semilogy([h[1] for h in history], "o-", label="same batch")
    right.semilogy([h[2] for h in history], "s-", label="next batch")
    right.axhline(floor, color="black", lw=0.8, ls=":", label="sampling floor")
    right.set(xlabel="alternations", ylabel="MaxVio", title="largest load over mean load, minus 1")
    right.legend()
    figure.tight_layout()
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/balance.png", dpi=120)
    print("wrote out/balance.png")


if __name__ == "__main__":
    _demonstrate()
