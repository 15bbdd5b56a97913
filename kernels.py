"""Kernels: the few operations in which a MoE transformer spends its time.            Imports: jax only.

Run:  python kernels.py                                    every fast path beside its plain twin: errors, time
      python kernels.py roofline --chip v4|v5p|v6e|h200    FLOPs, bytes and bound of each at the 129B shape
Read: best -> attention -> cross_entropy -> grouped_matmul -> experts -> count_reaching -> the two reports.
Each has a plain twin with the same signature, which is the definition; `impl` names the implementation
and an unknown name is an error: nothing here falls back to something slower behind your back. Without a
name, `best` says what the target platform uses: "cpu", "tpu" or "gpu", handed down from train.py's mesh.

B batch  S sequence  T=B*S tokens  D hidden  N query heads  M key/value heads  H head dim  V vocabulary
E experts  F expert width  R rows of the expert-sorted buffer, a multiple of the row tile  L layers"""

from functools import cache
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOGITS = 1024 * 128_256  # float32 logits held at once by "chunked" cross-entropy, 0.5 GiB
MASKED = -1e30      # not -inf: a softmax row is never empty (a token sees itself), but inf - inf would be NaN


class Impl(NamedTuple):
    attention: str
    cross_entropy: str
    grouped_matmul: str
    experts: str
    count: str
    row_tile: int       # the most rows of one expert that a kernel takes at a time; see row_tile


BEST = {
    "cpu": Impl("chunked", "chunked", "tiles", "loop", "plain", 256),
    "tpu": Impl("splash", "vocabulary", "pallas_tpu", "pallas_tpu", "pallas_tpu", 256),
    "gpu": Impl("chunked", "chunked", "tiles", "tiles", "plain", 512),
}


def best(platform):
    """The implementations that a target platform uses. The platform is that of the devices the program is
    compiled FOR (mesh.devices.flat[0].platform): under ahead-of-time compilation it differs from
    jax.default_backend(). Kernels written for another platform run in interpret mode where platform="cpu"."""
    if platform not in BEST:
        raise ValueError(f"platform={platform!r}: expected one of {', '.join(map(repr, BEST))}")
    return BEST[platform]


def row_tile(platform, rows, E):
    """Rows of a tile, to whole numbers of which moe.dispatch pads each of E experts that share `rows` rows.

    Small tiles waste fewer rows (half a tile an expert, on average), large ones make better matmuls. On a 2-core
    CPU a quarter of the mean load is best: 256 of 64, 128, 256 for 1,024 rows an expert; 64 of 32 to 256 for 256
    rows, and of 32, 64, 128 for 128 rows [measured]. TPU: 256, 3 % of padding and not the 6 % of 512 at the 129B
    shape. GPU: a quarter of the mean load too, from 128 to 512 rows, because "tiles" copies a matrix per tile
    [assumed; tests/gpu.py measures it]."""
    most, least = best(platform).row_tile, {"cpu": 64, "gpu": 128}
    if platform not in least:
        return most
    return max(least[platform], min(most, 2 ** ((rows // (4 * E)).bit_length() - 1)))


# Expert implementations that beat the default of "gpu" where they run: (name, least compute capability, types,
# number that must divide D and F). The first that fits is taken. Empty until tests/gpu.py has measured one.
GPU_EXPERTS = ()


@cache
def gpu_experts(dtype, D, F):
    """The name of the expert implementation for this GPU, this type and these widths; prints what it chose."""
    card = (0, 0)                                   # compiling for a GPU that is not here: assume nothing
    if jax.default_backend() == "gpu":
        card = tuple(int(n) for n in jax.devices()[0].compute_capability.split("."))

    fits = lambda least, dtypes, unit: card >= least and dtype in dtypes and not (D % unit or F % unit)
    names = [name for name, *needs in GPU_EXPERTS if fits(*needs)]
    chosen = names[0] if names else best("gpu").experts
    print(f"experts: {chosen!r} for {dtype}, D={D}, F={F}, compute capability {card[0]}.{card[1]}")
    return chosen


# ------------------------------------------------------------------------------------------------- attention

def attention(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, impl=None, platform="cpu"):
    """Causal attention with a sliding window and document masking. Returns [B,S,N,H].

    Position i sees j when 0 <= i-j < window and both are in the same document (equal segment ids).
    N query heads share M key/value heads in consecutive groups of N/M. Scores are scaled by 1/sqrt(H);
    softmax in float32. impl:
    "plain"    the definition, all S*S scores
    "chunked"  queries in chunks, each with the keys it can see: CPU, and what GPUs use here
    "splash"   JAX's TPU kernel: no S*S array, masked blocks skipped; interpret mode on platform "cpu"
    "cudnn"    cuDNN's flash attention, documents as an explicit [B,1,S,S] mask, which costs it more than half
               its speed [jax PR 35114]. Not the default: tests/gpu.py measures it"""
    impl = impl or best(platform).attention
    if impl == "plain":
        return _attend(q_BSNH, k_BSMH, v_BSMH, segment_BS, segment_BS, 0, window)
    if impl == "chunked":
        chunk = {} if platform == "cpu" else {"chunk": 512}     # a GPU wants few large products
        return _attention_chunked(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, **chunk)
    if impl == "splash":
        return _attention_splash(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform == "cpu")
    if impl == "cudnn":
        same_B1SS = (segment_BS[:, :, None] == segment_BS[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q_BSNH, k_BSMH, v_BSMH, mask=same_B1SS, is_causal=True,
                                            local_window_size=(window - 1, 0),
                                            implementation="xla" if platform == "cpu" else "cudnn")
    raise ValueError(f"attention impl={impl!r}: expected 'plain', 'chunked', 'splash' or 'cudnn'")


def _attend(q_BQNH, k_BJMH, v_BJMH, segment_BQ, segment_BJ, offset, window):
    """Softmax attention of Q queries on J keys; query 0 stands `offset` positions after key 0.

    Scores lie with keys in rows and the queries of a whole head group in columns, [J, G*Q], G = N/M: one
    matmul a key head, and the softmax reduces over rows, which XLA's CPU backend vectorises and a reduction
    along the last axis it does not."""
    return _attend_chunk_forward(q_BQNH, k_BJMH, v_BJMH, segment_BQ, segment_BJ, offset, window)[0]


def _weights(q_BMXH, k_BMJH, segment_BQ, segment_BJ, offset, window):
    """Softmax of masked scores, float32 [B,M,J,G*Q]."""
    Q, J = segment_BQ.shape[1], segment_BJ.shape[1]
    score_BMJX = jnp.einsum("BMJH,BMXH->BMJX", k_BMJH, q_BMXH, preferred_element_type=jnp.float32)
    distance = offset + jnp.arange(Q)[None, :] - jnp.arange(J)[:, None]                             # J,Q
    visible = (distance >= 0) & (distance < window) & (segment_BJ[:, :, None] == segment_BQ[:, None, :])
    # added, not selected: a sum needs no second pass in the backward direction
    score_BMJX += jnp.tile(jnp.where(visible, 0.0, MASKED), (1, 1, q_BMXH.shape[2] // Q))[:, None]
    return jax.nn.softmax(score_BMJX, axis=-2)


def _group(q_BQNH, M):
    """Queries of the heads that share a key head, side by side: [B,Q,N,H] -> [B,M,G*Q,H]."""
    B, Q, N, H = q_BQNH.shape
    return q_BQNH.reshape(B, Q, M, N // M, H).transpose(0, 2, 3, 1, 4).reshape(B, M, -1, H)


def _ungroup(q_BMXH, Q):
    B, M, X, H = q_BMXH.shape
    return q_BMXH.reshape(B, M, X // Q, Q, H).transpose(0, 3, 1, 2, 4).reshape(B, Q, -1, H)


# The same with the gradient written out: the softmax's row sums of weight * dweight, [J,X] of them, are also those
# of y * dy, [X,H], and no product is laid out for a transposed operand that has a plain one. 0.86 of the time
# that autodiff's takes, forward and backward, at the sizes of configs/laptop.py [measured].

@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend_chunk(q_BQNH, k_BJMH, v_BJMH, segment_BQ, segment_BJ, offset, window):
    return _attend_chunk_forward(q_BQNH, k_BJMH, v_BJMH, segment_BQ, segment_BJ, offset, window)[0]


def _attend_chunk_forward(q_BQNH, k_BJMH, v_BJMH, segment_BQ, segment_BJ, offset, window):
    H, M = q_BQNH.shape[3], k_BJMH.shape[2]
    q_BMXH = _group(q_BQNH, M) * H**-0.5
    k_BMJH, v_BMJH = k_BJMH.transpose(0, 2, 1, 3), v_BJMH.transpose(0, 2, 1, 3)
    weight_BMJX = _weights(q_BMXH, k_BMJH, segment_BQ, segment_BJ, offset, window).astype(v_BJMH.dtype)
    y_BMXH = jnp.einsum("BMJX,BMJH->BMXH", weight_BMJX, v_BMJH)
    return _ungroup(y_BMXH, q_BQNH.shape[1]), (q_BMXH, k_BMJH, v_BMJH, weight_BMJX, y_BMXH)


def _attend_chunk_backward(offset, window, residuals, dy_BQNH):
    q_BMXH, k_BMJH, v_BMJH, weight_BMJX, y_BMXH = residuals
    Q, H = dy_BQNH.shape[1], dy_BQNH.shape[3]
    dy_BMXH = _group(dy_BQNH, k_BMJH.shape[1])
    dweight_BMJX = jnp.einsum("BMJH,BMXH->BMJX", v_BMJH, dy_BMXH, preferred_element_type=jnp.float32)
    mean_BMX = jnp.sum(dy_BMXH.astype(jnp.float32) * y_BMXH, axis=-1)
    dscore_BMJX = (weight_BMJX * (dweight_BMJX - mean_BMX[:, :, None, :])).astype(k_BMJH.dtype)
    dq_BMXH = jnp.einsum("BMJX,BMJH->BMXH", dscore_BMJX, k_BMJH) * H**-0.5
    dk_BMJH = jnp.einsum("BMJX,BMXH->BMJH", dscore_BMJX, q_BMXH)
    dv_BMJH = jnp.einsum("BMJX,BMXH->BMJH", weight_BMJX, dy_BMXH)
    return _ungroup(dq_BMXH, Q), dk_BMJH.transpose(0, 2, 1, 3), dv_BMJH.transpose(0, 2, 1, 3), None, None


_attend_chunk.defvjp(_attend_chunk_forward, _attend_chunk_backward)


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
        outs.append(_attend_chunk(q_BSNH[:, start:end], k_BSMH[:, first:end], v_BSMH[:, first:end],
                                  segment_BS[:, start:end], segment_BS[:, first:end], start - first, window))
    return jnp.concatenate(outs, axis=1)


def _attention_splash(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, interpret):
    """The mask is an object that is asked block by block, never an [S,S] array; one kernel call per key head
    serves its G query heads. Blocks of 1,024: half the memory of 512 for the backward pass [measured: AOT]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    B, S, N, H = q_BSNH.shape
    M = k_BSMH.shape[2]
    block = _divisor(S, 128, 1024, "attention impl='splash': sequence length")
    # LocalMask counts the keys to the left without the query's own; window >= S sees everything before it
    mask = masks.LocalMask((S, S), (window - 1, 0), 0) if window < S else masks.CausalMask((S, S))
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (N // M)), interpret=interpret,
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
                                      block_q_dq=block, block_kv_dq=block))
    q_BMGSH = (q_BSNH * H**-0.5).reshape(B, S, M, N // M, H).transpose(0, 2, 3, 1, 4)
    k_BMSH, v_BMSH = k_BSMH.transpose(0, 2, 1, 3), v_BSMH.transpose(0, 2, 1, 3)
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    y_BMGSH = jax.vmap(heads)(q_BMGSH, k_BMSH, v_BMSH, splash.SegmentIds(segment_BS, segment_BS))
    return y_BMGSH.transpose(0, 3, 1, 2, 4).reshape(B, S, N, H).astype(q_BSNH.dtype)


def _divisor(size, unit, most, what):
    """A kernel's block along an axis: the largest multiple of `unit` that divides `size` and is at most `most`."""
    for block in range(most - most % unit, 0, -unit):
        if size % block == 0:
            return block
    raise ValueError(f"{what}: expected a multiple of {unit}, found {size}")


# -------------------------------------------------------------------------------- linear + softmax + entropy

def cross_entropy(x_TD, head_DV, target_T, impl=None, platform="cpu", chunk=None):
    """Next-token loss straight from the last hidden state: (nll_T, lse_T), both float32, in nats.

    nll is -log softmax(x @ head)[target]; lse, the log of the normaliser, is what a z-loss squares.
    The logits are computed in the input's type and accumulated and normalised in float32. impl:
    "plain"       holds [T,V] logits: 7.8 GiB in float32 for 16,384 tokens of V=128,256
    "chunked"     `chunk` (1,024 at V=128,256: LOGITS) tokens at a time; the backward pass computes their logits
                  again, 2*D*V FLOPs more a token. As "plain" if all tokens fit
    "vocabulary"  `chunk` (4,096) words at a time for all tokens, with the same extra pass, from the saved lse. It
                  adds up the tokens' gradient, [T,D], where "chunked" adds up the head's, [D,V], in float32:
                  .39 GiB of temporaries against 2.47 and 7.83 for "plain" on a TPU at these sizes [measured: AOT]
    `chunk` need not divide T or V."""
    impl = impl or best(platform).cross_entropy
    (T, D), V = x_TD.shape, head_DV.shape[1]
    if impl not in ("plain", "chunked", "vocabulary"):
        raise ValueError(f"cross_entropy impl={impl!r}: expected 'plain', 'chunked' or 'vocabulary'")
    chunk = chunk or {"plain": 0, "chunked": max(1, LOGITS // V), "vocabulary": 4096}[impl]
    if impl == "plain" or impl == "chunked" and T <= chunk or impl == "vocabulary" and V <= chunk:
        return _token_losses(x_TD, head_DV, target_T)
    if impl == "vocabulary":
        return _by_vocabulary(x_TD, head_DV, target_T, chunk)
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


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_vocabulary(x_TD, head_DV, target_T, block):
    return _by_vocabulary_forward(x_TD, head_DV, target_T, block)[0]


def _vocabulary_block(i, x_TD, head_DV, block):
    """Logits of the i-th block of words, the words' numbers, and which of them no earlier block had: the last
    block is moved back to end at V, since padding the head would copy it."""
    start = jnp.minimum(i * block, head_DV.shape[1] - block)
    head_DW = lax.dynamic_slice_in_dim(head_DV, start, block, axis=1).astype(x_TD.dtype)
    word_W = start + jnp.arange(block)
    return jnp.dot(x_TD, head_DW, preferred_element_type=jnp.float32), head_DW, start, word_W, word_W >= i * block


def _by_vocabulary_forward(x_TD, head_DV, target_T, block):
    def step(carry, i):
        top_T, sum_T, hit_T = carry
        logits_TW, _, _, word_W, new_W = _vocabulary_block(i, x_TD, head_DV, block)
        logits_TW = jnp.where(new_W, logits_TW, MASKED)
        next_T = jnp.maximum(top_T, jnp.max(logits_TW, axis=1))
        sum_T = sum_T * jnp.exp(top_T - next_T) + jnp.sum(jnp.exp(logits_TW - next_T[:, None]), axis=1)
        hit_TW = new_W & (target_T[:, None] == word_W)
        return (next_T, sum_T, hit_T + jnp.sum(jnp.where(hit_TW, logits_TW, 0), axis=1)), None

    zeros, blocks = jnp.zeros(x_TD.shape[0]), jnp.arange(-(-head_DV.shape[1] // block))
    (top_T, sum_T, hit_T), _ = lax.scan(step, (zeros + MASKED, zeros, zeros), blocks)
    lse_T = top_T + jnp.log(sum_T)
    return (lse_T - hit_T, lse_T), (x_TD, head_DV, target_T, lse_T)


def _by_vocabulary_backward(block, residuals, gradients):
    x_TD, head_DV, target_T, lse_T = residuals
    dnll_T, dlse_T = gradients

    def step(carry, i):
        dx_TD, dhead_DV = carry
        logits_TW, head_DW, start, word_W, new_W = _vocabulary_block(i, x_TD, head_DV, block)
        d_TW = ((dnll_T + dlse_T)[:, None] * jnp.exp(logits_TW - lse_T[:, None])
                - dnll_T[:, None] * (target_T[:, None] == word_W))
        d_TW = jnp.where(new_W, d_TW, 0).astype(x_TD.dtype)
        dx_TD += jnp.dot(d_TW, head_DW.T, preferred_element_type=jnp.float32)
        # every column gets one block's sum over all tokens, and zeros from a block that overlaps it
        dhead_DW = jnp.dot(x_TD.T, d_TW, preferred_element_type=jnp.float32).astype(head_DV.dtype)
        dhead_DW += lax.dynamic_slice_in_dim(dhead_DV, start, block, axis=1)
        return (dx_TD, lax.dynamic_update_slice_in_dim(dhead_DV, dhead_DW, start, axis=1)), None

    start = jnp.zeros(x_TD.shape, jnp.float32), jnp.zeros_like(head_DV)
    (dx_TD, dhead_DV), _ = lax.scan(step, start, jnp.arange(-(-head_DV.shape[1] // block)))
    return dx_TD.astype(x_TD.dtype), dhead_DV, None


_by_vocabulary.defvjp(_by_vocabulary_forward, _by_vocabulary_backward)


# -------------------------------------------------------------------------------------------- grouped matmul
# moe.dispatch sorts rows by expert and pads every expert to whole tiles, so a tile of rows never straddles two
# experts: one expert number per tile is all that a kernel needs, nothing is masked inside a tile, and rows of
# padding are zero, inputs and gradients alike. Tiles that nobody needed stand at the end and carry the number E:
# all their rows are padding. Every expert owns a tile, so every expert's weight gradient is written.

def grouped_matmul(x_RD, w_EDF, tile_expert, impl=None, platform="cpu"):
    """Every row tile times the matrix of its expert: [R,D] x [E,D,F] -> [R,F], in x's type, summed in float32.

    tile_expert: int32 [R/tile], ascending: the expert that owns each tile of R/len(tile_expert) consecutive
    rows, E for a tile of nobody. impl:
    "plain"       every row times every expert, then select: E times the work, the definition
    "tiles"       a weight matrix gathered for every tile and a batched matmul: plain XLA, for any size, type and
                  card. It copies a matrix per tile
    "pallas_tpu"  the TPU kernels below; in interpret mode on platform "cpu"
    "ragged_dot"  jax.lax.ragged_dot, for comparison only: in silence it does E times the useful work on CPU
                  and GPU, and in the weight gradient on TPU v4 to v6e [jax 0.10.2, libtpu 0.0.42: AOT]"""
    impl = impl or best(platform).grouped_matmul
    tiles, E = tile_expert.shape[0], w_EDF.shape[0]
    if impl == "plain":
        row_expert = jnp.repeat(tile_expert, x_RD.shape[0] // tiles)
        every_REF = jnp.einsum("RD,EDF->REF", x_RD, w_EDF)
        chosen_RE = row_expert[:, None] == jnp.arange(E)[None, :]
        return jnp.sum(jnp.where(chosen_RE[:, :, None], every_REF, 0), axis=1)
    if impl == "ragged_dot":
        rows_E = jnp.sum(tile_expert[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32) * (x_RD.shape[0] // tiles)
        return lax.ragged_dot(x_RD, w_EDF, rows_E)
    if impl in PAIRS:
        return _grouped(x_RD, w_EDF, tile_expert, impl, platform == "cpu")
    raise ValueError(f"grouped_matmul impl={impl!r}: expected 'plain', 'ragged_dot' or one of "
                     + ", ".join(map(repr, PAIRS)))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x_RD, w_EDF, tile_expert, impl, interpret):
    """Two products serve forward and backward. `rows`: each tile times its matrix, or, sideways, its transpose,
    which is dx = g w[e]^T. `outer`: dw[e], the sum of x^T g over the tiles of e, in float32."""
    rows, _ = PAIRS[impl]
    return rows(x_RD, w_EDF, tile_expert, False, interpret)


def _grouped_backward(impl, interpret, residuals, g_RF):
    x_RD, w_EDF, tile_expert = residuals
    rows, outer = PAIRS[impl]
    dw_EDF = outer(x_RD, g_RF, tile_expert, w_EDF, interpret)
    return rows(g_RF, w_EDF, tile_expert, True, interpret), dw_EDF, None


_grouped.defvjp(lambda x, w, tile_expert, impl, interpret: (_grouped(x, w, tile_expert, impl, interpret),
                                                            (x, w, tile_expert)), _grouped_backward)


def _tiles_rows(x_RD, w_EDF, tile_expert, sideways, interpret):
    x_nrD = x_RD.reshape(tile_expert.shape[0], -1, x_RD.shape[1])
    w_nDF = jnp.take(w_EDF, tile_expert, axis=0, mode="fill", fill_value=0)          # nobody's matrix is zero
    return jnp.einsum("nrF,nDF->nrD" if sideways else "nrD,nDF->nrF", x_nrD, w_nDF).reshape(x_RD.shape[0], -1)


def _tiles_outer(x_RD, g_RF, tile_expert, w_EDF, interpret):
    x_nrD, g_nrF = (a.reshape(tile_expert.shape[0], -1, a.shape[1]) for a in (x_RD, g_RF))
    each_nDF = jnp.einsum("nrD,nrF->nDF", x_nrD, g_nrF, preferred_element_type=jnp.float32)
    return jnp.zeros(w_EDF.shape, jnp.float32).at[tile_expert].add(each_nDF, mode="drop").astype(w_EDF.dtype)


# -------------------------------------------------------------------------------- grouped matmul: Pallas, TPU
# tile_expert is prefetched to scalar memory, so that the block of weights to load is known before the tile is
# reached. A v4 chip is two cores behind one program ("megacore"): a grid axis marked parallel is split over them.

def _axis_block(size, most, dtype, what):
    """A block along an axis: up to `most` numbers of bfloat16, half as many of float32. With 256 rows, 1280 each
    way, and 1280 by 640 for the weight gradient, kernels fill the 16 MiB of fast memory of a v4 core; blocks of
    128 would load 5 times the bytes [measured: AOT]. A short axis is one block."""
    most = most * 2 // jnp.dtype(dtype).itemsize
    return size if size <= most else _divisor(size, 128, most, f"grouped_matmul impl='pallas_tpu': {what}")


def _tpu_rows(x_RC, w_EDF, tile_expert, sideways, interpret):
    (R, C), (E, D, F), tiles = x_RC.shape, w_EDF.shape, tile_expert.shape[0]
    O, dtype = (D if sideways else F), x_RC.dtype
    c, o = _axis_block(C, 1280, dtype, "width of the input"), _axis_block(O, 1280, dtype, "width of the output")
    r, steps = R // tiles, C // c

    def kernel(tile_expert, x, w, y, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(tile_expert[pl.program_id(1)] < E)
        def _():
            total[...] += lax.dot_general(x[...], w[...], (((1,), (1 if sideways else 0,)), ((), ())),
                                          preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == steps - 1)
        def _():
            y[...] = total[...].astype(y.dtype)

    expert = lambda i, tile_expert: jnp.minimum(tile_expert[i], E - 1)
    w_spec = (pl.BlockSpec((None, o, c), lambda j, i, k, te: (expert(i, te), j, k)) if sideways else
              pl.BlockSpec((None, c, o), lambda j, i, k, te: (expert(i, te), k, j)))
    size = jnp.dtype(dtype).itemsize
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((R, O), dtype), interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(O // o, tiles, steps),
            in_specs=[pl.BlockSpec((r, c), lambda j, i, k, te: (i, k)), w_spec],
            out_specs=pl.BlockSpec((r, o), lambda j, i, k, te: (i, j)),
            scratch_shapes=[pltpu.VMEM((r, o), jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * R * D * F, transcendentals=0,
                                      bytes_accessed=size * (O // o * R * C + tiles * D * F + R * O)),
    )(tile_expert, x_RC, w_EDF)


def _tpu_outer(x_RD, g_RF, tile_expert, w_EDF, interpret):
    R, tiles, (E, D, F) = x_RD.shape[0], tile_expert.shape[0], w_EDF.shape
    d, f, r = _axis_block(D, 1280, x_RD.dtype, "D"), _axis_block(F, 640, x_RD.dtype, "F"), R // tiles

    def kernel(tile_expert, x, g, dw, total):
        i = pl.program_id(2)
        e = tile_expert[i]

        @pl.when((i == 0) | (tile_expert[jnp.maximum(i - 1, 0)] != e))
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(e < E)                                         # tiles of nobody come last and change nothing
        def _():
            total[...] += lax.dot_general(x[...], g[...], (((0,), (0,)), ((), ())),
                                          preferred_element_type=jnp.float32)

        @pl.when((e < E) & ((i == tiles - 1) | (tile_expert[jnp.minimum(i + 1, tiles - 1)] != e)))
        def _():
            dw[...] = total[...].astype(dw.dtype)

    size = jnp.dtype(x_RD.dtype).itemsize
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((E, D, F), w_EDF.dtype), interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(D // d, F // f, tiles),
            in_specs=[pl.BlockSpec((r, d), lambda j, k, i, te: (i, j)),
                      pl.BlockSpec((r, f), lambda j, k, i, te: (i, k))],
            out_specs=pl.BlockSpec((None, d, f), lambda j, k, i, te: (jnp.minimum(te[i], E - 1), j, k)),
            scratch_shapes=[pltpu.VMEM((d, f), jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * R * D * F, transcendentals=0,
                                      bytes_accessed=size * (F // f * R * D + D // d * R * F + E * D * F)),
    )(tile_expert, x_RD, g_RF)


# implementation: (rows, outer), the two products of _grouped
PAIRS = {"tiles": (_tiles_rows, _tiles_outer), "pallas_tpu": (_tpu_rows, _tpu_outer)}


# ------------------------------------------------------------------------------------------------ the experts

def experts(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert, impl=None, platform="cpu"):
    """The SwiGLU of every row's expert: (silu(x gate) * (x up)) down, [R,D] -> [R,D].

    Rows and tile_expert as in grouped_matmul. impl: "loop", or the name of a grouped_matmul, applied three
    times. "loop" walks the tiles once and does everything for a tile while it is in the cache, forward and
    backward; it stops at the last tile that belongs to an expert. For CPUs:
    0.26 of the dense einsum's time, 0.09 of ragged_dot's, 1.5 of torch._grouped_mm's [measured: python moe.py]"""
    if impl is None and platform == "gpu":
        impl = gpu_experts(x_RD.dtype.name, *gate_EDF.shape[1:])

    impl = impl or best(platform).experts
    if impl == "loop":
        return _experts_loop(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert)
    multiply = lambda x, w: grouped_matmul(x, w, tile_expert, impl, platform)
    return multiply(jax.nn.silu(multiply(x_RD, gate_EDF)) * multiply(x_RD, up_EDF), down_EFD)


@jax.custom_vjp
def _experts_loop(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert):
    return _experts_loop_forward(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert)[0]


def _walk(step, start, tile_expert, E, r):
    """step(carry, expert, rows, put) for every tile of r rows that has an expert: rows(a) reads the tile of an
    [R,...] array, put(a, tile) writes it, in place."""
    def tile(i, carry):
        rows = lambda a_RX: lax.dynamic_slice_in_dim(a_RX, i * r, r)
        put = lambda a_RX, a_rX: lax.dynamic_update_slice_in_dim(a_RX, a_rX.astype(a_RX.dtype), i * r, 0)
        return step(carry, tile_expert[i], rows, put)
    return lax.fori_loop(0, jnp.sum(tile_expert < E), tile, start)


def _experts_loop_forward(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert):
    E, D, F = gate_EDF.shape
    both_EDF = jnp.concatenate([gate_EDF, up_EDF], axis=2)                          # one product instead of two

    def step(carry, e, rows, put):
        y_RD, h_RF = carry
        h_rF = jnp.dot(rows(x_RD), both_EDF[e], preferred_element_type=jnp.float32)
        a_rF = (jax.nn.silu(h_rF[:, :F]) * h_rF[:, F:]).astype(x_RD.dtype)
        return put(y_RD, jnp.dot(a_rF, down_EFD[e])), put(h_RF, h_rF)

    start = jnp.zeros_like(x_RD), jnp.zeros((x_RD.shape[0], 2 * F), x_RD.dtype)
    y_RD, h_RF = _walk(step, start, tile_expert, E, x_RD.shape[0] // tile_expert.shape[0])
    return y_RD, (x_RD, h_RF, both_EDF, down_EFD, tile_expert)


def _experts_loop_backward(residuals, dy_RD):
    x_RD, h_RF, both_EDF, down_EFD, tile_expert = residuals
    E, F, D = down_EFD.shape
    product = lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32)

    def add(dw, e, part):                                       # in place; .at[e].add would be a scatter
        return lax.dynamic_update_index_in_dim(dw, dw[e] + part, e, axis=0)

    def step(carry, e, rows, put):
        dx_RD, dboth_EDF, ddown_EFD = carry
        x_rD, dy_rD, h_rF = rows(x_RD), rows(dy_RD), rows(h_RF).astype(jnp.float32)
        gate_rF, up_rF = h_rF[:, :F], h_rF[:, F:]
        share_rF = jax.nn.sigmoid(gate_rF)
        silu_rF = gate_rF * share_rF
        da_rF = product(dy_rD, down_EFD[e].T)
        dgate_rF = da_rF * up_rF * (share_rF + silu_rF * (1 - share_rF))
        dh_rF = jnp.concatenate([dgate_rF, da_rF * silu_rF], axis=1).astype(x_RD.dtype)
        ddown_EFD = add(ddown_EFD, e, product((silu_rF * up_rF).astype(x_RD.dtype).T, dy_rD))
        dboth_EDF = add(dboth_EDF, e, product(x_rD.T, dh_rF))
        return put(dx_RD, product(dh_rF, both_EDF[e].T)), dboth_EDF, ddown_EFD

    start = jnp.zeros_like(x_RD), jnp.zeros(both_EDF.shape, jnp.float32), jnp.zeros(down_EFD.shape, jnp.float32)
    dx_RD, dboth_EDF, ddown_EFD = _walk(step, start, tile_expert, E, x_RD.shape[0] // tile_expert.shape[0])
    dboth_EDF = dboth_EDF.astype(both_EDF.dtype)
    return dx_RD, dboth_EDF[:, :, :F], dboth_EDF[:, :, F:], ddown_EFD.astype(down_EFD.dtype), None


_experts_loop.defvjp(_experts_loop_forward, _experts_loop_backward)


# ------------------------------------------------------------------------------------------ counting scores

def count_reaching(key_LTE, tried_CLE, impl=None, platform="cpu"):
    """How many tokens reach each tried key: uint32 [L,T,E] and [C,L,E] -> int32 [C,L,E], key >= tried.

    The inner step of quantile balancing: balance.qth_largest decides the bits of an order statistic by such
    counts. Counting against several candidates while the keys pass by reads them fewer times: C = 15 decides
    4 bits a pass, 8 passes instead of 32. impl: "plain", "pallas_tpu" (interpret mode on platform "cpu")."""
    impl = impl or best(platform).count
    if impl == "plain":
        return jnp.sum(key_LTE >= tried_CLE[:, :, None], axis=2, dtype=jnp.int32)
    if impl != "pallas_tpu":
        raise ValueError(f"count_reaching impl={impl!r}: expected 'plain' or 'pallas_tpu'")
    (L, T, E), C = key_LTE.shape, tried_CLE.shape[0]
    t = _divisor(T, 8, 1024, "count_reaching impl='pallas_tpu': tokens") if T > 1024 else T

    def kernel(key, tried, count):
        @pl.when(pl.program_id(1) == 0)
        def _():
            count[...] = jnp.zeros_like(count)
        for c in range(C):
            reached_tE = key[...] >= tried[c:c + 1, :]
            count[c:c + 1, :] += jnp.sum(reached_tE.astype(jnp.int32), axis=0, keepdims=True)

    # TPUs compare signed integers: turning the top bit keeps the order
    signed = lambda x: lax.bitcast_convert_type(x ^ jnp.uint32(1 << 31), jnp.int32)
    once = pl.BlockSpec((None, C, E), lambda l, i: (l, 0, 0))
    return pl.pallas_call(
        kernel, grid=(L, T // t), interpret=platform == "cpu",
        out_shape=jax.ShapeDtypeStruct((L, C, E), jnp.int32),
        in_specs=[pl.BlockSpec((None, t, E), lambda l, i: (l, i, 0)), once], out_specs=once,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * L * T * C * E, transcendentals=0,
                                      bytes_accessed=4 * L * E * (T + 2 * C)),
    )(signed(key_LTE), signed(tried_CLE).swapaxes(0, 1)).swapaxes(0, 1)


# ------------------------------------------------------------------------------------------ python kernels.py

def stopwatch(forms, repeats=10):
    """{name: seconds} of {name: function without arguments}: the least of `repeats` runs, all forms in turn, so
    that whatever disturbs the machine disturbs them alike. Prints a warning where it was disturbed much."""
    import statistics
    import time
    seconds = {name: [] for name in forms}
    for f in forms.values():
        jax.block_until_ready(f())                              # compiled and warm
    for _ in range(repeats):
        for name, f in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(f())
            seconds[name].append(time.perf_counter() - start)
    for name, all_of in seconds.items():
        if statistics.median(all_of) > 1.3 * min(all_of):
            print(f"warning: a noisy machine: {name} took {min(all_of) * 1e3:.1f} ms at best and "
                  f"{statistics.median(all_of) * 1e3:.1f} ms in the median; run again when it is quiet")
    return {name: min(all_of) for name, all_of in seconds.items()}


def _demonstrate():
    key = iter(jax.random.split(jax.random.key(0), 32))
    normal = lambda *shape: jax.random.normal(next(key), shape)
    B, S, N, M, H, W = 8, 512, 4, 2, 32, 256
    segment_BS = jnp.cumsum(jax.random.bernoulli(next(key), 0.01, (B, S)), axis=1)
    T, D, V, E, F, r = 2048, 128, 8192, 8, 64, 64
    tile_expert = jnp.repeat(jnp.arange(E), 4 * T // (E * r))
    x_RD, target_T = normal(4 * T, D), jax.random.randint(next(key), (T,), 0, V)
    cases = {       # name: (function of (impl, differentiable arguments), arguments, fast implementations)
        f"attention S={S}": (lambda impl, q, k, v: attention(q, k, v, segment_BS, S, impl),
                             (normal(B, S, N, H), normal(B, S, M, H), normal(B, S, M, H)), ["chunked"]),
        f"attention S={S} window={W}": (lambda impl, q, k, v: attention(q, k, v, segment_BS, W, impl),
                                        (normal(B, S, N, H), normal(B, S, M, H), normal(B, S, M, H)), ["chunked"]),
        f"cross_entropy T={T} V={V}": (lambda impl, x, head: cross_entropy(x, head, target_T, impl)[0],
                                       (normal(T, D), normal(D, V) * D**-0.5), ["chunked", "vocabulary"]),
        f"grouped_matmul R={4 * T} E={E}": (lambda impl, x, w: grouped_matmul(x, w, tile_expert, impl),
                                            (x_RD, normal(E, D, F) * D**-0.5), ["tiles", "ragged_dot"]),
        f"experts R={4 * T} E={E}": (lambda impl, *a: experts(*a, tile_expert, impl), (
            x_RD, *(normal(E, *shape) * shape[0]**-0.5 for shape in ((D, F), (D, F), (F, D)))), ["loop", "tiles"]),
    }
    print(f"forward and backward, float32, {jax.devices()[0].device_kind}; best of 10, interleaved")
    print(f"{'kernel':30s} {'implementation':14s} {'ms':>8s} {'x plain':>8s}   relative errors: value, gradients")
    for name, (f, args, fast) in cases.items():
        def run(impl):
            g = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(impl, *a))), argnums=range(len(args))))
            return lambda: g(*args)
        forms = {impl: run(impl) for impl in ("plain", *fast)}
        truth, times = jax.tree.leaves(forms["plain"]()), stopwatch(forms)
        for impl in forms:
            errors = [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
                      for a, b in zip(jax.tree.leaves(forms[impl]()), truth)]
            print(f"{name:30s} {impl:14s} {times[impl] * 1e3:8.1f} {times[impl] / times['plain']:8.2f}   "
                  + " ".join(f"{e:.0e}" for e in errors if impl != "plain"))


CHIPS = {       # bfloat16 FLOP/s and bytes/s of high-bandwidth memory of one chip [cited: the makers' data sheets]
    "v4": (275e12, 1.228e12), "v5p": (459e12, 2.765e12), "v6e": (918e12, 1.640e12), "h200": (989e12, 4.8e12)}


def roofline(chip):
    """Rows (kernel, model FLOPs, FLOPs in view, executed FLOPs, bytes) of one chip's share of the 129B run, of one
    layer and of the head: 16,384 tokens, forward and backward without rematerialisation, bfloat16.

    Model: as model.count has it, 3 times the forward products and attention over all S*S scores; MFU divides by
    these. In view: only scores that causality and the window let through. Executed: what the TPU kernels do:
    whole blocks of scores, 9 products of them where autodiff needs 6; logits twice; half a tile of padding an
    expert. Bytes: every operand, as often as the kernel's grid streams it; a GPU's cache saves some of that."""
    T, S, D, N, M, H, E, K, F, V, L = 16_384, 4096, 5120, 40, 10, 128, 64, 4, 2560, 128_256, 48
    tpu = chip != "h200"
    rows, block = [], 1024
    for name, window in ("attention, full", S), ("attention, window 2048", S // 2):
        pairs = sum(min(i + 1, window) for i in range(S)) * T // S
        seen = sum(1 for i in range(S // block) for j in range(i + 1) if i * block - (j + 1) * block < window)
        scores = 2 * N * H * (seen * block**2 * T // S)         # FLOPs of one product of all scores in use
        read = 2 * T * (N + 2 * M) * H * (2 + 7)                # q, k, v, output and their gradients, some twice
        rows.append((name, 12 * T * S * N * H, 12 * pairs * N * H, 9 * scores, read))
    R, local = 65_536, E // 4                                   # EP4: a chip computes T*K rows for 16 experts
    tile = row_tile("tpu" if tpu else "gpu", R, local)
    padded = R + local * tile // 2
    for name, d, f in ("experts, gate and up", D, 2 * F), ("experts, down", F, D):
        o = 1280 if tpu else 256                                # columns of an output block
        sweep = lambda a, b: 2 * (padded * a * (b // o) + padded // tile * a * b + padded * b)
        outer = 2 * (padded * d * (f // 640) + padded * f * (d // 1280) + local * d * f)
        rows.append((name, 6 * R * d * f, 6 * R * d * f, 6 * padded * d * f, sweep(d, f) + sweep(f, d) + outer))
    streams = -(-V // 4096)
    rows.append(("loss over 128,256 words", 6 * T * D * V, 6 * T * D * V, 8 * T * D * V,
                 2 * (3 * D * V + 3 * streams * T * D) + 4 * 2 * streams * T * D))
    passes = 8 if tpu else 32
    rows.append(("counts, one layer's balancing", 0, 0, 2 * T * E * (15 * 8 if tpu else 32), 4 * T * E * passes))
    return rows


def _print_roofline(chip):
    peak, bandwidth = CHIPS[chip]
    print(f"{chip}: {peak / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s, {peak / bandwidth:.0f} FLOP a byte; "
          "16,384 tokens of the 129B model, bfloat16,")
    print("forward and backward of one layer, and of the head. TFLOP; arithmetic, not a measurement.")
    print(f"{'kernel':30s} {'model':>7s} {'in view':>8s} {'executed':>9s} {'GB':>7s} {'FLOP/B':>7s} {'ms':>7s} "
          f"{'bound':>8s} {'MFU at most':>12s}")
    for name, model_flops, in_view, executed, size in roofline(chip):
        compute, memory = executed / peak, size / bandwidth
        time = max(compute, memory)
        print(f"{name:30s} {model_flops / 1e12:7.2f} {in_view / 1e12:8.2f} {executed / 1e12:9.3f} "
              f"{size / 1e9:7.2f} {executed / size:7.0f} {time * 1e3:7.2f} "
              f"{'compute' if compute >= memory else 'memory':>8s} {model_flops / peak / time:12.0%}")
    print("MFU counts `model`: all S*S scores, no logits twice. Attention that skips what is masked passes 100 %.")


def main(arguments):
    import sys
    if not arguments:
        return _demonstrate()
    if len(arguments) == 3 and arguments[:2] == ["roofline", "--chip"] and arguments[2] in CHIPS:
        return _print_roofline(arguments[2])
    print(f"kernels.py: expected nothing or `roofline --chip {'|'.join(CHIPS)}`, found {' '.join(arguments)!r}",
          file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    import sys
    main(sys.argv[1:])
