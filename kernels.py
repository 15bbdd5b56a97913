"""Kernels: the three operations in which a MoE transformer spends its time.            Imports: jax only.

Run:  python kernels.py            every fast path beside its plain twin: values, gradients, time
Read: attention -> cross_entropy -> grouped_matmul -> the demonstration.
Each has a plain twin with the same signature, which is the definition; `impl` names the implementation
and an unknown name is an error: nothing here falls back to something slower behind your back.

B batch  S sequence  T=B*S tokens  D hidden  N query heads  M key/value heads  H head dim
E experts  R rows of the expert-sorted buffer, a multiple of the row tile  F expert width  V vocabulary"""

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30      # not -inf: a softmax row is never empty (a token sees itself), but inf - inf would be NaN


# ------------------------------------------------------------------------------------------------- attention

def attention(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, impl="chunked"):
    """Causal attention with a sliding window and document masking.

    Position i sees j when 0 <= i-j < window and both are in the same document (equal segment ids).
    N query heads share M key/value heads in consecutive groups of N/M. Scores are scaled by 1/sqrt(H);
    softmax in float32. impl: "plain" (the definition), "chunked". Returns [B,S,N,H]."""
    if impl == "plain":
        return _attend(q_BSNH, k_BSMH, v_BSMH, segment_BS, segment_BS, 0, window)
    if impl == "chunked":
        return _attention_chunked(q_BSNH, k_BSMH, v_BSMH, segment_BS, window)
    raise ValueError(f"attention impl={impl!r}: expected 'plain' or 'chunked'")


def _attend(q_BQNH, k_BJMH, v_BJMH, segment_BQ, segment_BJ, offset, window):
    """Softmax attention of Q queries on J keys; query 0 stands `offset` positions after key 0.

    Scores lie with keys in rows and the queries of a whole head group in columns, [J, G*Q], G = N/M: one
    matmul a key head, and the softmax reduces over rows, which XLA's CPU backend vectorises and a reduction
    along the last axis it does not."""
    B, Q, N, H = q_BQNH.shape
    J, M = k_BJMH.shape[1:3]
    G = N // M
    q_BMXH = q_BQNH.reshape(B, Q, M, G, H).transpose(0, 2, 3, 1, 4).reshape(B, M, G * Q, H) * H**-0.5
    k_BMJH, v_BMJH = k_BJMH.transpose(0, 2, 1, 3), v_BJMH.transpose(0, 2, 1, 3)
    score = jnp.einsum("BMJH,BMXH->BMJX", k_BMJH, q_BMXH, preferred_element_type=jnp.float32)
    distance = offset + jnp.arange(Q)[None, :] - jnp.arange(J)[:, None]                             # J,Q
    visible = (distance >= 0) & (distance < window) & (segment_BJ[:, :, None] == segment_BQ[:, None, :])
    # added, not selected: a sum needs no second pass in the backward direction
    score += jnp.tile(jnp.where(visible, 0.0, MASKED), (1, 1, G))[:, None]
    weight = jax.nn.softmax(score, axis=-2).astype(v_BJMH.dtype)
    y_BMXH = jnp.einsum("BMJX,BMJH->BMXH", weight, v_BMJH)
    return y_BMXH.reshape(B, M, G, Q, H).transpose(0, 3, 1, 2, 4).reshape(B, Q, N, H)


def _attention_chunked(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, chunk=64):
    """Queries in chunks; each chunk touches only the keys that it can see.

    The plain form computes S*S scores and throws more than half away. Here chunk c reads keys from
    (start - window + 1), rounded down to a chunk, to its own end: S*S/2 for full attention, about
    S*window for a local layer. chunk=64: fastest of 32, 64, 128, 256 for S=256, H=32 on a 2-core CPU
    [measured]; below it the loop overhead wins, above it the masked triangle."""
    S = q_BSNH.shape[1]
    outs = []
    for start in range(0, S, chunk):
        end = min(start + chunk, S)
        first = max(0, start - window + 1) // chunk * chunk
        outs.append(_attend(q_BSNH[:, start:end], k_BSMH[:, first:end], v_BSMH[:, first:end],
                            segment_BS[:, start:end], segment_BS[:, first:end], start - first, window))
    return jnp.concatenate(outs, axis=1)


# -------------------------------------------------------------------------------- linear + softmax + entropy

def cross_entropy(x_TD, head_DV, target_T, impl="chunked", chunk=1024):
    """Next-token loss straight from the last hidden state: (nll_T, lse_T), both float32, in nats.

    nll is -log softmax(x @ head)[target]; lse, the log of the normaliser, is what a z-loss squares.
    The logits are computed in the input's type and accumulated and normalised in float32.
    impl: "plain" holds [T,V] logits (7.8 GiB in float32 for 16,384 tokens of V=128,256);
    "chunked" holds [chunk,V] of them and computes them again in the backward pass: one extra pass over
    the head, V*D*2 FLOPs a token. `chunk` need not divide T."""
    if impl == "plain":
        return _token_losses(x_TD, head_DV, target_T)
    if impl != "chunked":
        raise ValueError(f"cross_entropy impl={impl!r}: expected 'plain' or 'chunked'")
    T, D = x_TD.shape
    if T <= chunk:
        return _token_losses(x_TD, head_DV, target_T)
    pad = -T % chunk
    x_CTD = jnp.pad(x_TD, ((0, pad), (0, 0))).reshape(-1, chunk, D)
    target_CT = jnp.pad(target_T, (0, pad)).reshape(-1, chunk)
    wide_DV = head_DV.astype(jnp.float32)                       # so that its gradient adds up in float32
    losses = jax.checkpoint(lambda x, target: _token_losses(x, wide_DV.astype(x.dtype), target))
    _, (nll, lse) = lax.scan(lambda carry, xs: (carry, losses(*xs)), None, (x_CTD, target_CT))
    return nll.reshape(-1)[:T], lse.reshape(-1)[:T]


def _token_losses(x_TD, head_DV, target_T):
    logits_TV = jnp.dot(x_TD, head_DV, preferred_element_type=jnp.float32)
    lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
    # compare-and-sum, not an index: its gradient is then a compare too, not a scatter into [T,V]
    hit_TV = target_T[:, None] == jnp.arange(head_DV.shape[1])[None, :]
    return lse_T - jnp.sum(jnp.where(hit_TV, logits_TV, 0.0), axis=-1), lse_T


# -------------------------------------------------------------------------------------------- grouped matmul

def grouped_matmul(x_RD, w_EDF, tile_expert, impl="tiles"):
    """Every row tile times the matrix of its expert: [R,D] x [E,D,F] -> [R,F].

    tile_expert: int [R/tile], the expert that owns each tile of R/len(tile_expert) consecutive rows.
    moe.dispatch sorts rows by expert and pads every expert to whole tiles, so a tile never straddles two
    experts, nothing is masked inside a tile, and rows of padding are zero.
    impl: "plain" multiplies every row by every expert and selects (E times the work: the definition);
    "tiles" gathers one weight matrix per tile and runs a batched matmul, the fastest exact form measured
    on CPU (148 ms against 160 for a loop over tiles and 79 for one plain matmul of the same FLOPs, forward
    and backward, T=4096 D=256 E=16 K=4 F=128). It holds a copy of a matrix per tile: right for small experts
    on a CPU, hopeless at the 129B shape. jax.lax.ragged_dot is not offered: on CPU it does E times
    the work in silence."""
    tiles = tile_expert.shape[0]
    if impl == "plain":
        row_expert = jnp.repeat(tile_expert, x_RD.shape[0] // tiles)
        every_REF = jnp.einsum("RD,EDF->REF", x_RD, w_EDF)
        chosen_RE = row_expert[:, None] == jnp.arange(w_EDF.shape[0])[None, :]
        return jnp.einsum("REF,RE->RF", every_REF, chosen_RE.astype(x_RD.dtype))
    if impl == "tiles":
        x_tiles = x_RD.reshape(tiles, -1, x_RD.shape[1])
        w_tiles = w_EDF.astype(jnp.float32)[tile_expert].astype(w_EDF.dtype)      # so gradients add up in float32
        return jnp.einsum("nrD,nDF->nrF", x_tiles, w_tiles).reshape(x_RD.shape[0], -1)
    raise ValueError(f"grouped_matmul impl={impl!r}: expected 'plain' or 'tiles'")


# ------------------------------------------------------------------------------------------ python kernels.py

def _demonstrate():
    import time

    key = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *shape: jax.random.normal(next(key), shape)
    B, S, N, M, H, W = 8, 256, 4, 2, 32, 128
    segment_BS = jnp.cumsum(jax.random.bernoulli(next(key), 0.01, (B, S)), axis=1)
    T, D, V, E, F, tile = 2048, 128, 2048, 8, 64, 64
    R = 2 * T + E * tile
    x_RD = normal(R, D)
    tile_expert = jnp.sort(jax.random.randint(next(key), (R // tile,), 0, E))
    target_T = jax.random.randint(next(key), (T,), 0, V)
    cases = {       # name: (function of (impl, differentiable arguments), arguments, fast implementation)
        f"attention S={S} window={W}": (
            lambda impl, q, k, v: attention(q, k, v, segment_BS, W, impl),
            (normal(B, S, N, H), normal(B, S, M, H), normal(B, S, M, H)), "chunked"),
        f"cross_entropy T={T} V={V}": (
            lambda impl, x, head: cross_entropy(x, head, target_T, impl, chunk=512)[0],
            (normal(T, D), normal(D, V) * D**-0.5), "chunked"),
        f"grouped_matmul R={R} E={E}": (
            lambda impl, x, w: grouped_matmul(x, w, tile_expert, impl),
            (x_RD, normal(E, D, F) * D**-0.5), "tiles"),
    }
    print(f"forward and backward, float32, {jax.devices()[0].device_kind}; best of 10, interleaved")
    print(f"{'kernel':32s} {'plain ms':>9s} {'fast ms':>9s} {'ratio':>6s}   relative errors: value, gradients")
    for name, (f, args, fast) in cases.items():
        def run(impl):
            return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(impl, *a))), argnums=range(len(args))))
        forms = {impl: run(impl) for impl in ("plain", fast)}
        leaves = {impl: jax.tree.leaves(g(*args)) for impl, g in forms.items()}
        best = dict.fromkeys(forms, float("inf"))
        for _ in range(10):
            for impl, g in forms.items():
                t0 = time.perf_counter()
                jax.block_until_ready(g(*args))
                best[impl] = min(best[impl], time.perf_counter() - t0)
        errors = [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a)))
                  for a, b in zip(leaves["plain"], leaves[fast])]
        print(f"{name:32s} {best['plain'] * 1e3:9.1f} {best[fast] * 1e3:9.1f} {best[fast] / best['plain']:6.2f}   "
              + " ".join(f"{e:.0e}" for e in errors))


if __name__ == "__main__":
    _demonstrate()
