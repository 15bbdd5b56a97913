"""Kernels: the few operations in which a mixture-of-experts transformer spends its time.

Run:  python tests/bench.py kernels      every implementation beside its plain twin: errors, times
Read: choose -> attention -> cross_entropy -> grouped_matmul -> expert_mlp ->
      weights on many devices -> the heap of a CPU process.
Each operation has a plain twin with the same signature: the definition. `impl` names an
implementation; an unknown name is an error, and nothing falls back to a slower one in silence.

B batch  S sequence  T=B*S tokens  D hidden  N query heads  M key/value heads  H head dim
E experts  F expert width  R rows of the expert-sorted buffer, a multiple of the row tile
L layers  V vocabulary"""

import ctypes
import importlib.util
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu

PLAIN_LOGITS = 1024 * 128_256   # 0.5 GiB of float32: more are not held at once
MASKED = -1e30                  # not -inf: a token sees itself, but inf - inf would be NaN

dot32 = partial(jnp.dot, preferred_element_type=jnp.float32)            # summed in float32
einsum32 = partial(jnp.einsum, preferred_element_type=jnp.float32)

# What a platform uses for ("attention", "experts"). On a GPU plain XLA: any card, type and size.
BEST = {"cpu": ("chunked", "loop"), "gpu": ("chunked", "tiles"), "tpu": ("splash", "pallas_tpu")}

# Faster kernels for some cards: {("attention" or "experts", name): fits(dtype, *sizes) -> bool}.
# The first that fits is taken. `from configs import hopper` in a config adds those for Hopper.
GPU_KERNELS = {}


@cache
def choose(what, platform, dtype, *sizes):
    """The implementation of "attention" or "experts" for a platform ("cpu", "gpu" or "tpu": of the
    devices compiled for, which jax.default_backend() need not be), a type and sizes. Prints its
    choice where it is not the platform's default."""
    default = BEST[_known("platform", platform, BEST)][("attention", "experts").index(what)]
    for (kind, name), fits in GPU_KERNELS.items():
        if platform == "gpu" and kind == what and fits(dtype, *sizes):
            print(f"kernels   {what} by {name!r}: {dtype}, {sizes}")
            return name
    return default


def misfit(platform, c):
    """Why the kernels of a platform cannot take the sizes of a ModelConfig; None if they can. It
    is asked before anything is traced, by train.make_mesh and by --plan."""
    try:
        if BEST[_known("JAX_PLATFORMS", platform, BEST)][0] == "splash":
            _divisor(c.seq_len, 128, 1024, "seq_len on a TPU")
            if c.num_experts:
                _tpu_block(c.hidden_dim, 1280, c.compute_dtype, "hidden_dim")
    except ValueError as error:
        return str(error)


def _known(what, name, names):
    """The name, if it is one of the names; ValueError if not."""
    if name not in names:
        raise ValueError(f"{what}={name!r}: expected one of {', '.join(map(repr, names))}")
    return name


ROW_TILES = {"loop": (64, 256), "tiles": (128, 512), "pallas_tpu": (256, 256)}     # least, most


def row_tile(impl, rows, E):
    """Rows of a tile. moe.dispatch pads each of E experts, which share `rows` rows, to whole tiles.
    Small tiles waste fewer rows (half a tile an expert, on average), large ones make better
    matmuls. A quarter of the mean load is best on a 2-core CPU: 256 of 64, 128 and 256 for 1,024
    rows an expert, 64 of 32 to 256 for 256 rows [measured]. On an H100 "tiles" takes 5.9 ms with
    512 rows, 8.8 with 256, 15.4 with 128: it copies a matrix for every tile [measured:
    tests/gpu.py]. On a TPU 256 pads the 129B shape by 3 %, 512 would pad it by 6 %."""
    least, most = ROW_TILES.get(impl, (64, 256))
    quarter = max(1, rows // (4 * E))
    power = 2 ** (quarter.bit_length() - 1)
    return max(least, min(most, power))


# ---------------------------------------------------------------------------------- attention

def attention(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, impl=None, platform="cpu"):
    """Causal grouped-query attention with a sliding window and document masking. Returns [B,S,N,H].
    Position i sees position j when 0 <= i-j < window and both are in the same document (equal
    segment ids). N query heads share M key/value heads in consecutive groups of N/M [grouped-query
    attention, arXiv 2305.13245]. Scores are scaled by 1/sqrt(H). The softmax is in float32. impl:
    "plain"    the definition, all S*S scores
    "chunked"  queries in chunks, each with the keys that it can see; XLA, so it runs everywhere
    "splash"   JAX's TPU kernel: no S*S array, masked blocks are skipped"""
    impl = impl or choose("attention", platform, q_BSNH.dtype.name, q_BSNH.shape[3])
    attend = ATTENTION[_known("attention impl", impl, ATTENTION)]
    return attend(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform)


def _visible(segment_BC, segment_BJ, offset, window):
    """Which keys a query sees, [B,C,J]. Query 0 comes `offset` positions after key 0."""
    C, J = segment_BC.shape[1], segment_BJ.shape[1]
    distance_CJ = offset + jnp.arange(C)[:, None] - jnp.arange(J)
    near_CJ = (distance_CJ >= 0) & (distance_CJ < window)
    return near_CJ & (segment_BC[:, :, None] == segment_BJ[:, None, :])


def _attention_plain(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform):
    B, S, N, H = q_BSNH.shape
    M = k_BSMH.shape[2]
    q_BSMGH = q_BSNH.reshape(B, S, M, N // M, H)
    score_BMGSJ = einsum32("BSMGH,BJMH->BMGSJ", q_BSMGH, k_BSMH)
    visible_BSJ = _visible(segment_BS, segment_BS, 0, window)
    score_BMGSJ = jnp.where(visible_BSJ[:, None, None], score_BMGSJ * H**-0.5, MASKED)
    weight_BMGSJ = jax.nn.softmax(score_BMGSJ, axis=-1).astype(v_BSMH.dtype)
    return jnp.einsum("BMGSJ,BJMH->BSMGH", weight_BMGSJ, v_BSMH).reshape(B, S, N, H)


def _attention_chunked(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform):
    """A chunk of queries reads the keys from (its start - window + 1), rounded down to a chunk, to
    its own end: S*S/2 scores for full attention, about S*window with a window. 64 is the fastest
    of 32 to 256 for S=256, H=32 on a 2-core CPU [measured]; accelerators want large products."""
    S, outs = q_BSNH.shape[1], []
    chunk = 64 if platform == "cpu" else 512
    for start in range(0, S, chunk):
        end = min(start + chunk, S)
        first = max(0, start - window + 1) // chunk * chunk
        queries = slice(start, end)
        keys = slice(first, end)
        outs.append(_attend(q_BSNH[:, queries], k_BSMH[:, keys], v_BSMH[:, keys],
                            segment_BS[:, queries], segment_BS[:, keys], start - first, window))
    return jnp.concatenate(outs, axis=1)


# Attention of C queries on J keys. Scores have the keys in rows and the queries of all G = N/M
# heads of a key head in columns, [J, X = G*C]: one matmul a key head, and a softmax over rows,
# which XLA's CPU backend vectorizes. The gradient is written out: the row sums of weight * dweight
# are also those of y * dy. It takes 0.86 of autodiff's time at the sizes of configs/laptop.py
# [measured].

@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(*arguments):
    return _attend_forward(*arguments)[0]


def _attend_forward(q_BCNH, k_BJMH, v_BJMH, segment_BC, segment_BJ, offset, window):
    H = q_BCNH.shape[3]
    M = k_BJMH.shape[2]
    q_BMXH = _group_heads(q_BCNH, M) * H**-0.5
    k_BMJH = k_BJMH.swapaxes(1, 2)
    v_BMJH = v_BJMH.swapaxes(1, 2)
    score_BMJX = einsum32("BMJH,BMXH->BMJX", k_BMJH, q_BMXH)
    visible_BJC = _visible(segment_BC, segment_BJ, offset, window).swapaxes(1, 2)
    # added, not selected: a sum needs no second pass in the backward direction
    mask_BJC = jnp.where(visible_BJC, 0.0, MASKED)
    mask_BJX = jnp.tile(mask_BJC, (1, 1, q_BCNH.shape[2] // M))
    score_BMJX += mask_BJX[:, None]
    weight_BMJX = jax.nn.softmax(score_BMJX, axis=-2).astype(v_BJMH.dtype)
    y_BMXH = jnp.einsum("BMJX,BMJH->BMXH", weight_BMJX, v_BMJH)
    residuals = q_BMXH, k_BMJH, v_BMJH, weight_BMJX, y_BMXH
    return _ungroup_heads(y_BMXH, q_BCNH.shape[1]), residuals


def _attend_backward(offset, window, residuals, dy_BCNH):
    q_BMXH, k_BMJH, v_BMJH, weight_BMJX, y_BMXH = residuals
    C = dy_BCNH.shape[1]
    H = dy_BCNH.shape[3]
    dy_BMXH = _group_heads(dy_BCNH, k_BMJH.shape[1])
    dweight_BMJX = einsum32("BMJH,BMXH->BMJX", v_BMJH, dy_BMXH)
    sum_BMX = jnp.sum(dy_BMXH.astype(jnp.float32) * y_BMXH, axis=-1)
    dscore_BMJX = weight_BMJX * (dweight_BMJX - sum_BMX[:, :, None, :])
    dscore_BMJX = dscore_BMJX.astype(k_BMJH.dtype)
    dq_BMXH = jnp.einsum("BMJX,BMJH->BMXH", dscore_BMJX, k_BMJH) * H**-0.5
    dk_BMJH = jnp.einsum("BMJX,BMXH->BMJH", dscore_BMJX, q_BMXH)
    dv_BMJH = jnp.einsum("BMJX,BMXH->BMJH", weight_BMJX, dy_BMXH)
    dk_BJMH = dk_BMJH.swapaxes(1, 2)
    dv_BJMH = dv_BMJH.swapaxes(1, 2)
    return _ungroup_heads(dq_BMXH, C), dk_BJMH, dv_BJMH, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _group_heads(q_BCNH, M):
    """Queries of the heads that share a key head, side by side: [B,C,N,H] -> [B,M,G*C,H]."""
    B, C, N, H = q_BCNH.shape
    return q_BCNH.reshape(B, C, M, N // M, H).transpose(0, 2, 3, 1, 4).reshape(B, M, -1, H)


def _ungroup_heads(q_BMXH, C):
    B, M, X, H = q_BMXH.shape
    return q_BMXH.reshape(B, M, X // C, C, H).transpose(0, 3, 1, 2, 4).reshape(B, C, -1, H)


def _attention_splash(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform):
    """The mask is an object that is asked block by block, never an [S,S] array. Blocks of 1,024
    take half the memory of 512 in the backward pass [measured: AOT]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    B, S, N, H = q_BSNH.shape
    M = k_BSMH.shape[2]
    block = _divisor(S, 128, 1024, "attention impl='splash': sequence length")
    if window < S:              # LocalMask counts the keys to the left, without the query's own
        mask = masks.LocalMask((S, S), (window - 1, 0), 0)
    else:
        mask = masks.CausalMask((S, S))
    sizes = splash.BlockSizes(block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
                              block_q_dq=block, block_kv_dq=block)
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (N // M)), interpret=platform == "cpu", block_sizes=sizes)
    q_BSMGH = (q_BSNH * H**-0.5).reshape(B, S, M, N // M, H)
    q_BMGSH = q_BSMGH.transpose(0, 2, 3, 1, 4)
    k_BMSH = k_BSMH.swapaxes(1, 2)
    v_BMSH = v_BSMH.swapaxes(1, 2)
    # one kernel call for each key head serves its G query heads
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    segments = splash.SegmentIds(segment_BS, segment_BS)
    y_BMGSH = jax.vmap(heads)(q_BMGSH, k_BMSH, v_BMSH, segments)
    return y_BMGSH.transpose(0, 3, 1, 2, 4).reshape(B, S, N, H).astype(q_BSNH.dtype)


ATTENTION = {"plain": _attention_plain, "chunked": _attention_chunked, "splash": _attention_splash}


def _divisor(size, unit, most, what):
    """The largest multiple of `unit`, `most` at most, that divides `size`: a kernel's block."""
    for block in range(most - most % unit, 0, -unit):
        if size % block == 0:
            return block
    raise ValueError(f"{what}: expected a multiple of {unit}, found {size}")


# ----------------------------------------------------------------- linear + softmax + cross-entropy

def cross_entropy(x_TD, head_DV, target_T, impl=None, chunk=4096):
    """Next-token loss straight from the last hidden state: (nll_T, lse_T), both float32, in nats.

    nll is -log softmax(x @ head)[target]. lse is the log of the normalizer, which a z-loss squares.
    Logits are computed in the input's type, accumulated and normalized in float32. impl:
    "plain"       all [T,V] logits at once: 7.8 GiB for 16,384 tokens of V=128,256
    "vocabulary"  `chunk` words at a time; the backward pass computes the logits again, 2*D*V FLOPs
                  more a token: 0.39 GiB of temporaries at those sizes [measured: TPU, AOT]
    "plain" is taken if all logits fit PLAIN_LOGITS; `chunk` need not divide V; large T cut it."""
    T, V = x_TD.shape[0], head_DV.shape[1]
    impl = impl or ("plain" if T * V <= PLAIN_LOGITS else "vocabulary")
    _known("cross_entropy impl", impl, ("plain", "vocabulary"))
    if impl == "vocabulary" and V > (block := min(chunk, PLAIN_LOGITS // T // 128 * 128 or 128)):
        return _by_vocabulary(x_TD, head_DV, target_T, block)
    return _token_losses(x_TD, head_DV, target_T)


def _token_losses(x_TD, head_DV, target_T):
    logits_TV = dot32(x_TD, head_DV)
    lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
    # compare and sum, not an index: its gradient is then a compare too, not a scatter into [T,V]
    hit_TV = target_T[:, None] == jnp.arange(head_DV.shape[1])
    return lse_T - jnp.sum(jnp.where(hit_TV, logits_TV, 0.0), axis=-1), lse_T


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_vocabulary(*arguments):
    return _by_vocabulary_forward(*arguments)[0]


def _words(i, x_TD, head_DV, block):
    """The i-th block of words: (number of the first, numbers of all, columns of the head). The last
    block is moved back to end at V, because padding the head would copy it."""
    start = jnp.minimum(i * block, head_DV.shape[1] - block)
    head_DW = lax.dynamic_slice_in_dim(head_DV, start, block, axis=1).astype(x_TD.dtype)
    return start, start + jnp.arange(block), head_DW


def _by_vocabulary_forward(x_TD, head_DV, target_T, block):
    """An online softmax: the running maximum and sum of exponentials, block after block."""
    def step(carry, i):
        top_T, sum_T, hit_T = carry
        _, word_W, head_DW = _words(i, x_TD, head_DV, block)
        new_W = word_W >= i * block                             # no earlier block had them
        logits_TW = dot32(x_TD, head_DW)
        logits_TW = jnp.where(new_W, logits_TW, MASKED)
        next_T = jnp.maximum(top_T, jnp.max(logits_TW, axis=1))
        exp_TW = jnp.exp(logits_TW - next_T[:, None])
        sum_T = sum_T * jnp.exp(top_T - next_T)
        sum_T += jnp.sum(exp_TW, axis=1)
        hit_TW = new_W & (target_T[:, None] == word_W)
        hit_T += jnp.sum(jnp.where(hit_TW, logits_TW, 0), axis=1)
        return (next_T, sum_T, hit_T), None
    zero_T = jnp.zeros(x_TD.shape[0])
    blocks = jnp.arange(-(-head_DV.shape[1] // block))
    (top_T, sum_T, hit_T), _ = lax.scan(step, (zero_T + MASKED, zero_T, zero_T), blocks)
    lse_T = top_T + jnp.log(sum_T)
    return (lse_T - hit_T, lse_T), (x_TD, head_DV, target_T, lse_T)


def _by_vocabulary_backward(block, residuals, gradients):
    x_TD, head_DV, target_T, lse_T = residuals
    dnll_T, dlse_T = gradients
    def step(carry, i):
        dx_TD, dhead_DV = carry
        start, word_W, head_DW = _words(i, x_TD, head_DV, block)
        logits_TW = dot32(x_TD, head_DW)
        softmax_TW = jnp.exp(logits_TW - lse_T[:, None])
        hit_TW = target_T[:, None] == word_W
        d_TW = (dnll_T + dlse_T)[:, None] * softmax_TW - dnll_T[:, None] * hit_TW
        d_TW = jnp.where(word_W >= i * block, d_TW, 0).astype(x_TD.dtype)
        dx_TD += dot32(d_TW, head_DW.T)
        # every column gets one block's sum over all tokens, and zeros from a block that overlaps it
        dhead_DW = dot32(x_TD.T, d_TW).astype(head_DV.dtype)
        dhead_DW += lax.dynamic_slice_in_dim(dhead_DV, start, block, axis=1)
        dhead_DV = lax.dynamic_update_slice_in_dim(dhead_DV, dhead_DW, start, axis=1)
        return (dx_TD, dhead_DV), None
    zeros = jnp.zeros(x_TD.shape, jnp.float32), jnp.zeros_like(head_DV)
    (dx_TD, dhead_DV), _ = lax.scan(step, zeros, jnp.arange(-(-head_DV.shape[1] // block)))
    return dx_TD.astype(x_TD.dtype), dhead_DV, None


_by_vocabulary.defvjp(_by_vocabulary_forward, _by_vocabulary_backward)


# ------------------------------------------------------------------------------ grouped matmul
# moe.dispatch sorts rows by expert and pads every expert to whole tiles. So a tile of rows belongs
# to one expert, and its number is all that a kernel needs; rows of padding are zero, inputs and
# gradients alike. Tiles left over come last and carry the number E. Every expert owns at least one
# tile, so every expert's weight gradient is written.

def grouped_matmul(x_RD, w_EDF, tile_expert, impl, platform="cpu"):
    """Every tile of rows times the matrix of its expert: [R,D] x [E,D,F] -> [R,F], in x's type,
    summed in float32.
    tile_expert: int32 [R/tile], ascending: the expert that owns each tile of R/len(tile_expert)
    consecutive rows, or E for a tile without an owner. impl:
    "plain"       every row times every expert, then select: E times the work, the definition
    "tiles"       a batched matmul with a weight matrix gathered for every tile; XLA only, so it
                  runs everywhere
    "pallas_tpu"  the TPU kernels below"""
    _known("grouped_matmul impl", impl, ("plain", *GROUPED))
    if impl == "plain":
        every_REF = jnp.einsum("RD,EDF->REF", x_RD, w_EDF)
        row_expert = jnp.repeat(tile_expert, x_RD.shape[0] // tile_expert.shape[0])
        owner_RE = row_expert[:, None] == jnp.arange(w_EDF.shape[0])
        chosen_REF = jnp.where(owner_RE[:, :, None], every_REF, 0)
        return jnp.sum(chosen_REF, axis=1)
    return _grouped(x_RD, w_EDF, tile_expert, impl, platform == "cpu")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x_RD, w_EDF, tile_expert, impl, interpret):
    """Two products serve forward and backward: `matmul` gives y = x w[e] and dx = g w[e]^T,
    `weight_grad` gives dw[e], the sum of x^T g over the tiles of e, in float32."""
    matmul, _ = GROUPED[impl]
    return matmul(x_RD, w_EDF, tile_expert, False, interpret)


def _grouped_backward(impl, interpret, residuals, g_RF):
    x_RD, w_EDF, tile_expert = residuals
    matmul, weight_grad = GROUPED[impl]
    dx_RD = matmul(g_RF, w_EDF, tile_expert, True, interpret)
    like_w = jax.ShapeDtypeStruct(w_EDF.shape, w_EDF.dtype)
    return dx_RD, weight_grad(x_RD, g_RF, tile_expert, like_w, interpret), None


_grouped.defvjp(lambda *args: (_grouped(*args), args[:3]), _grouped_backward)


def _tiles_matmul(x_RD, w_EDF, tile_expert, transpose_w, interpret):
    x_nrD = x_RD.reshape(tile_expert.shape[0], -1, x_RD.shape[1])
    w_nDF = jnp.take(w_EDF, tile_expert, axis=0, mode="fill", fill_value=0)    # no owner: zeros
    product = "nrF,nDF->nrD" if transpose_w else "nrD,nDF->nrF"
    return jnp.einsum(product, x_nrD, w_nDF).reshape(x_RD.shape[0], -1)


def _tiles_weight_grad(x_RD, g_RF, tile_expert, like_w, interpret):
    x_nrD, g_nrF = (a.reshape(tile_expert.shape[0], -1, a.shape[1]) for a in (x_RD, g_RF))
    each_nDF = einsum32("nrD,nrF->nDF", x_nrD, g_nrF)
    sum_EDF = jnp.zeros(like_w.shape, jnp.float32).at[tile_expert].add(each_nDF, mode="drop")
    return sum_EDF.astype(like_w.dtype)


# The TPU kernels. tile_expert is prefetched to scalar memory: the block of weights to load is known
# before its tile is reached. The two cores of a v4 chip share the grid axes marked parallel.

def _tpu_block(size, most, dtype, what):
    """A block along an axis: up to `most` bfloat16 numbers, half as many float32 ones. 256 rows by
    1,280 by 1,280 (1,280 by 640 for the weight gradient) fill the 16 MiB of fast memory of a v4
    core; blocks of 128 would load 5 times the bytes [measured: AOT]."""
    most = most * 2 // jnp.dtype(dtype).itemsize
    if size <= most:
        return size
    return _divisor(size, 128, most, f"grouped_matmul impl='pallas_tpu': {what}")


def _tpu_matmul(x_RC, w_EDF, tile_expert, transpose_w, interpret):
    R, C = x_RC.shape
    E, D, F = w_EDF.shape
    O = D if transpose_w else F                     # C columns in, O columns out
    tiles, dtype = tile_expert.shape[0], x_RC.dtype
    c = _tpu_block(C, 1280, dtype, "width of the input")
    o = _tpu_block(O, 1280, dtype, "width of the output")
    r, steps = R // tiles, C // c
    def kernel(tile_expert, x, w, y, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)
        @pl.when(tile_expert[pl.program_id(1)] < E)
        def _():
            contract = (((1,), (1 if transpose_w else 0,)), ((), ()))
            total[...] += lax.dot_general(x[...], w[...], contract,
                                          preferred_element_type=jnp.float32)
        @pl.when(pl.program_id(2) == steps - 1)
        def _():
            y[...] = total[...].astype(y.dtype)
    def w_block(j, i, k, tile_expert):
        e = jnp.minimum(tile_expert[i], E - 1)
        return (e, j, k) if transpose_w else (e, k, j)
    return _tpu_call(
        kernel, jax.ShapeDtypeStruct((R, O), dtype), interpret, grid=(O // o, tiles, steps),
        in_specs=[pl.BlockSpec((r, c), lambda j, i, k, te: (i, k)),
                  pl.BlockSpec((None, o, c) if transpose_w else (None, c, o), w_block)],
        out_specs=pl.BlockSpec((r, o), lambda j, i, k, te: (i, j)),
        total=(r, o), flops=2 * R * D * F,
        elements=O // o * R * C + tiles * D * F + R * O)(tile_expert, x_RC, w_EDF)


def _tpu_weight_grad(x_RD, g_RF, tile_expert, like_w, interpret):
    E, D, F = like_w.shape
    R, tiles = x_RD.shape[0], tile_expert.shape[0]
    d = _tpu_block(D, 1280, x_RD.dtype, "D")
    f = _tpu_block(F, 640, x_RD.dtype, "F")
    r = R // tiles
    def kernel(tile_expert, x, g, dw, total):
        i = pl.program_id(2)
        e = tile_expert[i]
        @pl.when((i == 0) | (tile_expert[jnp.maximum(i - 1, 0)] != e))
        def _():
            total[...] = jnp.zeros_like(total)
        @pl.when(e < E)             # tiles without an owner come last and change nothing
        def _():
            contract = (((0,), (0,)), ((), ()))
            total[...] += lax.dot_general(x[...], g[...], contract,
                                          preferred_element_type=jnp.float32)
        next_e = tile_expert[jnp.minimum(i + 1, tiles - 1)]
        @pl.when((e < E) & ((i == tiles - 1) | (next_e != e)))
        def _():
            dw[...] = total[...].astype(dw.dtype)
    return _tpu_call(
        kernel, like_w, interpret, grid=(D // d, F // f, tiles),
        in_specs=[pl.BlockSpec((r, d), lambda j, k, i, te: (i, j)),
                  pl.BlockSpec((r, f), lambda j, k, i, te: (i, k))],
        out_specs=pl.BlockSpec((None, d, f), lambda j, k, i, te: (jnp.minimum(te[i], E - 1), j, k)),
        total=(d, f), flops=2 * R * D * F,
        elements=F // f * R * D + D // d * R * F + E * D * F)(tile_expert, x_RD, g_RF)


def _tpu_call(kernel, out, interpret, grid, in_specs, out_specs, total, flops, elements):
    """What both kernels share: a float32 accumulator in fast memory, the last axis in order."""
    size = elements * jnp.dtype(out.dtype).itemsize
    return pl.pallas_call(
        kernel, out_shape=out, interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(total, jnp.float32)]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=size))


GROUPED = {                     # name: (matmul, weight_grad), the two products of _grouped
    "tiles": (_tiles_matmul, _tiles_weight_grad),
    "pallas_tpu": (_tpu_matmul, _tpu_weight_grad),
}


# ---------------------------------------------------------------------------------- the experts

def expert_mlp(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert, impl, platform="cpu", weight_R1=1):
    """The SwiGLU of every row's expert: (silu(x gate) * (x up)) down, [R,D] -> [R,D] [arXiv
    2002.05202], times weight_R1.

    Rows and tile_expert as in grouped_matmul. impl: "loop", or the name of a grouped_matmul,
    applied three times. "loop" visits the tiles once and does everything for a tile while it is in
    the cache, forward and backward. It stops at the last tile that belongs to an expert. For CPUs:
    0.22 to 0.26 of the time of a dense einsum over all experts, 1.0 to 1.6 of torch._grouped_mm's,
    over the machines that were tried [measured: python tests/bench.py moe]."""
    weighted = lambda h_RF: (weight_R1 * h_RF).astype(h_RF.dtype)
    if impl == "loop":
        return weighted(_expert_loop(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert))
    multiply = partial(grouped_matmul, tile_expert=tile_expert, impl=impl, platform=platform)
    h_RF = weighted(jax.nn.silu(multiply(x_RD, gate_EDF)) * multiply(x_RD, up_EDF))
    return multiply(h_RF, down_EFD)


@jax.custom_vjp
def _expert_loop(*arguments):
    return _expert_loop_forward(*arguments)[0]


def _for_each_tile(step, start, tile_expert, E, R):
    """step(carry, expert, read, write) for every tile of R rows that has an owner. read(a_RX) gives
    the tile's rows of an array, write(a_RX, a_rX) replaces them."""
    rows = R // tile_expert.shape[0]
    def tile(i, carry):
        def read(a_RX):
            return lax.dynamic_slice_in_dim(a_RX, i * rows, rows)
        def write(a_RX, a_rX):
            return lax.dynamic_update_slice_in_dim(a_RX, a_rX.astype(a_RX.dtype), i * rows, 0)
        return step(carry, tile_expert[i], read, write)
    return lax.fori_loop(0, jnp.sum(tile_expert < E), tile, start)


def _expert_loop_forward(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert):
    E, D, F = gate_EDF.shape
    both_EDF = jnp.concatenate([gate_EDF, up_EDF], axis=2)              # one product instead of two
    def step(carry, e, read, write):
        y_RD, h_RF = carry
        h_rF = dot32(read(x_RD), both_EDF[e])
        a_rF = (jax.nn.silu(h_rF[:, :F]) * h_rF[:, F:]).astype(x_RD.dtype)
        return write(y_RD, jnp.dot(a_rF, down_EFD[e])), write(h_RF, h_rF)
    zeros = jnp.zeros_like(x_RD), jnp.zeros((x_RD.shape[0], 2 * F), x_RD.dtype)
    y_RD, h_RF = _for_each_tile(step, zeros, tile_expert, E, x_RD.shape[0])
    return y_RD, (x_RD, h_RF, both_EDF, down_EFD, tile_expert)


def _expert_loop_backward(residuals, dy_RD):
    x_RD, h_RF, both_EDF, down_EFD, tile_expert = residuals
    E, F, D = down_EFD.shape
    def add(dw, e, part):                           # in place; .at[e].add would be a scatter
        return lax.dynamic_update_index_in_dim(dw, dw[e] + part, e, axis=0)
    def step(carry, e, read, write):
        dx_RD, dboth_EDF, ddown_EFD = carry
        x_rD, dy_rD, h_rF = read(x_RD), read(dy_RD), read(h_RF).astype(jnp.float32)
        gate_rF, up_rF = h_rF[:, :F], h_rF[:, F:]
        sigmoid_rF = jax.nn.sigmoid(gate_rF)
        silu_rF = gate_rF * sigmoid_rF
        da_rF = dot32(dy_rD, down_EFD[e].T)
        dsilu_rF = sigmoid_rF + silu_rF * (1 - sigmoid_rF)
        dh_rF = jnp.concatenate([da_rF * up_rF * dsilu_rF, da_rF * silu_rF], axis=1)
        dh_rF = dh_rF.astype(x_RD.dtype)
        a_rF = (silu_rF * up_rF).astype(x_RD.dtype)
        ddown_EFD = add(ddown_EFD, e, dot32(a_rF.T, dy_rD))
        dboth_EDF = add(dboth_EDF, e, dot32(x_rD.T, dh_rF))
        return write(dx_RD, dot32(dh_rF, both_EDF[e].T)), dboth_EDF, ddown_EFD
    zeros = (jnp.zeros_like(x_RD), jnp.zeros(both_EDF.shape, jnp.float32),
             jnp.zeros(down_EFD.shape, jnp.float32))
    dx_RD, dboth_EDF, ddown_EFD = _for_each_tile(step, zeros, tile_expert, E, x_RD.shape[0])
    dgate_EDF, dup_EDF = jnp.split(dboth_EDF.astype(both_EDF.dtype), 2, axis=2)
    return dx_RD, dgate_EDF, dup_EDF, ddown_EFD.astype(down_EFD.dtype), None


_expert_loop.defvjp(_expert_loop_forward, _expert_loop_backward)


# -------------------------------------------------------------------- weights on many devices
# Inside shard_map every device holds its share of a weight. It gathers the others' shares when it
# needs the weight, and the gradient comes back summed and scattered (FSDP) [arXiv 2304.11277].

# XLA's CPU backend lacks this operation of moe's ragged exchange; tests/ragged.py emulates it there
RAGGED_ALL_TO_ALL = {"gpu": lax.ragged_all_to_all, "tpu": lax.ragged_all_to_all}
LARGE_VOCABULARY = 32_768       # above it the gradients of embedding and head need special care


def single_device(axis):
    """Whether there is nothing to exchange over the axis; False is a program without a mesh."""
    return not axis or lax.axis_size(axis) == 1


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(w, axis, split, dtype):
    """A weight in the compute type, whole, from every device's share of it along its axis `split`.

    Its gradient is summed over devices in float32 and scattered. Plain autodiff would sum in the
    compute type, and bfloat16 sums stop growing at 256 equal terms."""
    if single_device(axis):
        return w.astype(dtype)
    return lax.all_gather(w.astype(dtype), axis, axis=split, tiled=True)


def _gather_backward(axis, split, dtype, _, g):
    d = g.shape[split] // (1 if single_device(axis) else lax.axis_size(axis))
    # split 0 is the head's; the gradient of the embedding comes from embed
    chunks = _num_chunks(g.shape[1], d, axis) if g.ndim == 2 and split == 0 else 1
    if chunks == 1:
        return (_reduce_scatter(g, axis, split),)
    g_nCdV = g.reshape(-1, chunks, d // chunks, g.shape[1])
    def chunk(i):
        g_ndV = lax.dynamic_index_in_dim(g_nCdV, i, 1, keepdims=False)
        return _reduce_scatter(g_ndV.reshape(-1, g.shape[1]), axis, 0)
    return (lax.map(chunk, jnp.arange(chunks)).reshape(d, -1),)


gather_weight.defvjp(lambda *args: (gather_weight(*args), None), _gather_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed(w_Vd, token_T, axis, dtype):
    """The tokens' rows of the embedding in the compute type, [T,D], from this device's columns.

    The gradient sums over every occurrence of a token, in float32 from there to the optimizer."""
    return jnp.take(gather_weight(w_Vd, axis, 1, dtype), token_T, axis=0)


def _embed_backward(axis, dtype, residuals, g_TD):
    (V, d), token_T = residuals
    chunks = _num_chunks(V, d, axis)
    def chunk(g_Tnd):
        g_TD = g_Tnd.reshape(len(g_Tnd), -1)
        g_VD = jnp.zeros((V, g_TD.shape[1]), jnp.float32).at[token_T].add(g_TD)
        return _reduce_scatter(g_VD, axis, 1)
    g_TnCd = g_TD.astype(jnp.float32).reshape(len(g_TD), -1, chunks, d // chunks)
    return jnp.moveaxis(lax.map(chunk, jnp.moveaxis(g_TnCd, 2, 0)), 0, 1).reshape(V, d), None


embed.defvjp(lambda w_Vd, token_T, *static: (embed(w_Vd, token_T, *static), (w_Vd.shape, token_T)),
             _embed_backward)


def _reduce_scatter(g, axis, split):
    """This device's share along `split` of a weight's gradient, summed over devices in float32.

    The TPU compiler scatters a sum only if it can cut the other axis into pieces and if the split
    axis does not lie along the lanes. With 128,256 = 768 x 167 words, laid out by the loops that
    made them, the gradients of embedding and head meet neither condition: every chip would sum them
    whole, 10 GB a step and as much memory again [measured: LOG.md]. So a large vocabulary is
    padded, to 131,072, and the split axis is made the outer one."""
    g = g.astype(jnp.float32)
    if single_device(axis):
        return g
    if len(g) == 1:                     # libtpu 0.0.42 sums a single expert's whole [measured]
        return _reduce_scatter(g[0], axis, split - 1)[None]
    words = g.shape[1 - split] if g.ndim == 2 else 0
    if words > LARGE_VOCABULARY:
        padding = [(0, 0)] * 2
        padding[1 - split] = (0, -words % 4096)
        g = with_layout_constraint(jnp.pad(g, padding), Layout((split, 1 - split)))
    share = lax.psum_scatter(g, axis, scatter_dimension=split, tiled=True)
    if words > LARGE_VOCABULARY:        # without the barrier libtpu 0.0.42 stops with an error
        share = lax.slice_in_dim(lax.optimization_barrier(share), 0, words, axis=1 - split)
    return share


def _num_chunks(words, d, axis):
    """In how many chunks, one after the other, a large vocabulary's gradient is summed: at once it
    is 2.5 GiB in float32, and padded again. No chunk is below the 40 rows a chip that v4 is known
    to scatter."""
    return 4 if words > LARGE_VOCABULARY and d % 160 == 0 and not single_device(axis) else 1


# ----------------------------------------------------------------------- the heap of a CPU process
# XLA's CPU backend takes all temporaries of a step from malloc. glibc makes that slow in two ways,
# which these functions undo; elsewhere they do nothing. A step of configs/smoke.py on a quiet pair
# of cores: 168 to 173 ms with both, 215 to 218 with the first alone, 218 to 229 with neither;
# malloc_trim in the place of the second gives 206 to 209 [measured: LOG.md].

def keep_freed_memory():
    """Let a process whose only devices are CPUs keep what it frees.
    Past 32 MB glibc maps the block of temporaries for every step anew, and the kernel clears it
    page by page: 59,449 page faults a step. One arena that neither maps nor trims has none
    [measured]."""
    plugins = any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    if not plugins or jax.config.jax_platforms == "cpu":
        libc.mallopt(-8, 1)             # M_ARENA_MAX
        libc.mallopt(-4, 0)             # M_MMAP_MAX
        libc.mallopt(-1, -1)            # M_TRIM_THRESHOLD


_filled = []        # the pieces of the heap that fill_holes holds: they belong to the process


def fill_holes():
    """Occupy the free pieces, up to 1 MB each, that compiling leaves between used ones on the heap.

    Compiling configs/smoke.py leaves 40,000, and every allocation of a step walks lists of them
    while the other threads wait for the one arena. It takes no memory that the process did not
    hold."""
    class Info(ctypes.Structure):               # struct mallinfo2 [glibc 2.33, malloc.h]
        _fields_ = [("others", ctypes.c_size_t * 9), ("keepcost", ctypes.c_size_t)]
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype = Info
    except (OSError, AttributeError):
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    while _filled:
        libc.free(_filled.pop())
    size = 1 << 20
    while size >= 1024:
        last_hole = libc.sbrk(None) - libc.mallinfo2().keepcost     # the heap beyond is untouched
        while (piece := libc.malloc(size)) and piece < last_hole:
            _filled.append(piece)
        libc.free(piece)
        size = size * 7 // 8


if __name__ == "__main__":
    from tests import bench
    bench.bench_kernels()
