"""Faster kernels for GPUs, each for some cards only: import this module in a config to have them.

    from configs import hopper        # as configs/gpu_h200.py does

kernels.choose then takes "hopper" for experts and "packed" for attention on compute capability 9.0 (H100,
H200), in bfloat16, at widths that fit, and prints that it did. "triton", "mgpu" and "cudnn" are known by name.
Measured by tests/gpu.py; the table is in tests/README.md.
Read: triton -> mgpu -> hopper (three grouped matmuls) -> attention by cuDNN -> the tables.

D hidden  F expert width  E experts  R rows, sorted by expert  C width of the input  O width of the output
B batch  S sequence  N query heads  M key/value heads  H head dim"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

import kernels


def tiles_of(tile_expert, E):
    """How many tiles each expert owns: int32 [E]."""
    return jnp.sum(tile_expert[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)


# ------------------------------------------------------------------------------------ triton: Ampere and later
# Pallas lowers to Triton, which XLA carries: no CUDA toolchain is needed. One program computes one block of the
# output. A block is the largest power of two that divides its axis, at most what TRITON says.

TRITON = {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 3}    # tests/gpu.py tries others

def _power(size, most, what):
    block = min(size & -size, most)
    if block < 16:
        raise ValueError(f"grouped_matmul impl='triton': {what}: expected a multiple of 16, found {size}")
    return block


def _triton_call(body, grid, out_shape, interpret, block, *arguments):
    """Small blocks, and float32, whose products are not for tensor cores, get half of the warps and two stages."""
    from jax.experimental.pallas import triton
    full = block == TRITON["rows"] * TRITON["columns"] and out_shape.dtype != jnp.float32
    warps = TRITON["warps"] if full else 4
    parameters = triton.CompilerParams(num_warps=warps, num_stages=TRITON["stages"] if full else 2)
    return pl.pallas_call(body, grid=grid, out_shape=out_shape, interpret=interpret,
                          compiler_params=parameters)(*arguments)


def _product(a, b, dimensions):
    """a times b over the named axes, summed in float32; float32 inputs stay float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def triton_rows(x_RC, w_EDF, tile_expert, transpose_w, interpret):
    """Each tile of rows times its expert's matrix, or, transpose_w, times its transpose: [R,C] -> [R,O]."""
    (R, C), (E, D, F) = x_RC.shape, w_EDF.shape
    O, tile = (D if transpose_w else F), R // tile_expert.shape[0]
    narrow = 2 if x_RC.dtype == jnp.float32 else 1
    r, o = _power(tile, TRITON["rows"] // narrow, "tile"), _power(O, TRITON["columns"] // narrow, "width out")
    c = _power(C, TRITON["depth"] // narrow, "width in")
    columns = O // o

    def body(tile_expert, x, w, y):
        i, j = pl.program_id(0) // columns, pl.program_id(0) % columns     # programs side by side share rows
        owner = tile_expert[i * r // tile]
        e = jnp.minimum(owner, E - 1)

        def step(k, total):
            x_rc = x[pl.ds(i * r, r), pl.ds(k * c, c)]
            if transpose_w:
                return total + _product(x_rc, w[e, pl.ds(j * o, o), pl.ds(k * c, c)], ((1,), (1,)))
            return total + _product(x_rc, w[e, pl.ds(k * c, c), pl.ds(j * o, o)], ((1,), (0,)))

        steps = (owner < E).astype(jnp.int32) * (C // c)     # a tile of nobody costs nothing
        total = lax.fori_loop(0, steps, step, jnp.zeros((r, o), jnp.float32))
        y[pl.ds(i * r, r), pl.ds(j * o, o)] = total.astype(y.dtype)

    out_shape = jax.ShapeDtypeStruct((R, O), x_RC.dtype)
    return _triton_call(body, (R // r * columns,), out_shape, interpret, r * o, tile_expert, x_RC, w_EDF)


def triton_outer(x_RD, g_RF, tile_expert, w_EDF, interpret):
    """dw[e], the sum of x^T g over the rows of e: [E,D,F], in the type of w."""
    R, (E, D, F) = x_RD.shape[0], w_EDF.shape
    tile = R // tile_expert.shape[0]
    narrow = 2 if x_RD.dtype == jnp.float32 else 1
    d, f = _power(D, TRITON["rows"] // narrow, "D"), _power(F, TRITON["columns"] // narrow, "F")
    r = _power(tile, TRITON["depth"] // narrow, "tile")
    tiles_E = tiles_of(tile_expert, E)
    steps_E = tiles_E * (tile // r)
    first_E = jnp.cumsum(steps_E) - steps_E

    def body(first_E, steps_E, x, g, dw):
        j, rest = pl.program_id(0) % (F // f), pl.program_id(0) // (F // f)
        i, e = rest % (D // d), rest // (D // d)
        first = first_E[e]

        def step(k, total):
            rows = pl.ds((first + k) * r, r)
            return total + _product(x[rows, pl.ds(i * d, d)], g[rows, pl.ds(j * f, f)], ((0,), (0,)))

        total = lax.fori_loop(0, steps_E[e], step, jnp.zeros((d, f), jnp.float32))
        dw[e, pl.ds(i * d, d), pl.ds(j * f, f)] = total.astype(dw.dtype)

    out_shape = jax.ShapeDtypeStruct((E, D, F), w_EDF.dtype)
    grid = (E * (D // d) * (F // f),)
    return _triton_call(body, grid, out_shape, interpret, d * f, first_E, steps_E, x_RD, g_RF)


# --------------------------------------------------------------------- mgpu: what jax ships for Hopper, bfloat16
# jax.experimental.pallas.ops.gpu.ragged_dot_mgpu and its transpose. Block sizes are tests/gpu.py's to try.

MGPU_ROWS = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 8}
MGPU_OUTER = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 8}


def _mgpu_check(tile, dtype, D, F):
    if tile % 128 or dtype != jnp.bfloat16 or D % 128 or F % 128:
        raise ValueError("grouped_matmul impl='mgpu': expected bfloat16, rows in tiles of a multiple of 128 and "
                         f"widths that are multiples of 128, found {dtype}, {tile}, {D} and {F}")


@functools.cache
def _once(f, **given):
    """f with these arguments, as one function that jax traces and lowers once: a kernel takes seconds to lower, and
    a model calls it in every layer."""
    return jax.jit(functools.partial(f, **given))


def _fitting(blocks, n):
    """The blocks, with groups of columns that n columns fill."""
    groups = max(1, min(blocks["grid_block_n"], n // blocks["block_n"]))
    return blocks | {"grid_block_n": groups}


def mgpu_rows(x_RC, w_EDF, tile_expert, transpose_w, interpret):
    """As triton_rows. The last expert owns the tiles of nobody, whose rows are zero: the kernel leaves rows without
    an owner unwritten."""
    E, D, F = w_EDF.shape
    R, tile = x_RC.shape[0], x_RC.shape[0] // tile_expert.shape[0]
    if interpret:
        return kernels.GROUPED["tiles"][0](x_RC, w_EDF, tile_expert, transpose_w, interpret)

    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu
    _mgpu_check(tile, x_RC.dtype, D, F)
    rows_E = tiles_of(tile_expert, E) * tile
    rows_E = rows_E.at[-1].add(R - jnp.sum(rows_E))
    blocks = _fitting(MGPU_ROWS, D if transpose_w else F)
    return _once(ragged_dot_mgpu.ragged_dot, transpose_rhs=transpose_w, **blocks)(x_RC, w_EDF, group_sizes=rows_E)


def mgpu_outer(x_RD, g_RF, tile_expert, w_EDF, interpret):
    """As triton_outer."""
    E, D, F = w_EDF.shape
    tile = x_RD.shape[0] // tile_expert.shape[0]
    if interpret:
        return kernels.GROUPED["tiles"][1](x_RD, g_RF, tile_expert, w_EDF, interpret)

    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu
    _mgpu_check(tile, x_RD.dtype, D, F)
    multiply = _once(transposed_ragged_dot_mgpu.transposed_ragged_dot, **_fitting(MGPU_OUTER, F))
    dw_EDF = multiply(x_RD, g_RF, group_sizes=tiles_of(tile_expert, E) * tile)
    return dw_EDF.astype(w_EDF.dtype)


# ------------------------------------------------------------------------- hopper: ours, Mosaic GPU, bfloat16
# One persistent block per multiprocessor takes output tiles of 128 x 256 in turn. In it one warpgroup fetches
# (TMA) while two multiply (wgmma), 128 columns each; results leave through shared memory in 32-column slices.

WARPGROUP = 128     # rows and columns that one warpgroup accumulates in registers
SLICE = 32          # columns stored at a time: 4 fetched blocks of depth 64 leave 16 KiB of shared memory


def _turned(ref):
    """The transpose of a reference: a method since jax 0.11, a function before."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    if jax.__version_info__ >= (0, 11):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def _hopper_kernel(body, out_shape, interpret, *arguments):
    from jax.experimental.pallas import mosaic_gpu as plgpu
    if interpret:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams      # no public name in 0.10.2
    return plgpu.kernel(
        body, out_type=out_shape, grid=(2 if interpret else 132,), grid_names=("sm",),      # as an H200 has
        num_threads=3, thread_name="wg", interpret=InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*arguments)


def _hopper_tile(depth, left_spec, right_spec, multiply, out, place):
    """One 128 x 256 output tile: accumulate `depth` fetched pairs of blocks in float32, then store."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    half = lax.axis_index("wg")

    def compute(pipeline):
        def accumulate(total):
            pipeline(total)
            done = total[...].astype(out.dtype)
            for c in range(0, WARPGROUP, SLICE):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out[half] = done[:, c:c + SLICE]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out.at[half], place(half * WARPGROUP + c))
        pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP, WARPGROUP)))

    def step(_, left, right, total):
        multiply(total, left, right, pl.ds(half * WARPGROUP, WARPGROUP))
        plgpu.wgmma_wait(0)
        return total

    return plgpu.emit_pipeline_warp_specialized(
        step, grid=(depth,), in_specs=[left_spec, right_spec], memory_registers=40, wg_axis="wg",
        num_compute_wgs=2, max_concurrent_steps=4, compute_context=compute)


def _hopper_check(tile, dtype, **sizes):
    if tile != WARPGROUP or dtype != jnp.bfloat16:
        raise ValueError(f"grouped_matmul impl='hopper': expected bfloat16 rows in tiles of {WARPGROUP}, "
                         f"found {dtype} in tiles of {tile}")
    for name, size in sizes.items():
        kernels._divisor(size, 256, size, f"grouped_matmul impl='hopper': {name}")


@functools.partial(jax.jit, static_argnums=(3, 4))
def hopper_rows(x_RC, w_EDF, tile_expert, transpose_w, interpret):
    from jax.experimental.pallas import mosaic_gpu as plgpu
    (R, C), (E, D, F), tiles = x_RC.shape, w_EDF.shape, tile_expert.shape[0]
    r, O = R // tiles, (D if transpose_w else F)
    _hopper_check(r, x_RC.dtype, D=D, F=F)

    def multiply(total, x, w, half):
        plgpu.wgmma(total, x, _turned(w.at[half]) if transpose_w else w.at[:, half])

    def body(tile_expert, x, w, y):
        def scope(out):
            @plgpu.nd_loop((tiles, O // (2 * WARPGROUP)), collective_axes="sm")
            def _(info):
                i, j = info.index
                e = jnp.minimum(tile_expert[i], E - 1)          # rows of nobody are zero, with any matrix
                w_spec = (plgpu.BlockSpec((2 * WARPGROUP, 64), lambda k: (j, k)) if transpose_w else
                          plgpu.BlockSpec((64, 2 * WARPGROUP), lambda k: (k, j)))
                place = lambda c: y.at[pl.ds(i * r, r), pl.ds(j * 2 * WARPGROUP + c, SLICE)]
                x_spec = plgpu.BlockSpec((r, 64), lambda k: (i, k))
                _hopper_tile(C // 64, x_spec, w_spec, multiply, out, place)(x, w.at[e])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.run_scoped(scope, plgpu.SMEM((2, WARPGROUP, SLICE), x.dtype), collective_axes="wg")

    if transpose_w and interpret:          # the interpreter cannot transpose a reference (jax 0.10.2)
        return hopper_rows(x_RC, w_EDF.swapaxes(1, 2), tile_expert, False, True)
    return _hopper_kernel(body, jax.ShapeDtypeStruct((R, O), x_RC.dtype), interpret, tile_expert, x_RC, w_EDF)


def hopper_outer(x_RD, g_RF, tile_expert, like_w, interpret):
    """As triton_outer."""
    return _hopper_outer(x_RD, g_RF, tile_expert, like_w.shape, like_w.dtype, interpret)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _hopper_outer(x_RD, g_RF, tile_expert, shape, dtype, interpret):
    from jax.experimental.pallas import mosaic_gpu as plgpu
    R, tiles, (E, D, F) = x_RD.shape[0], tile_expert.shape[0], shape
    r = R // tiles
    _hopper_check(r, x_RD.dtype, D=D, F=F)
    tiles_E = tiles_of(tile_expert, E)
    start_E = jnp.cumsum(tiles_E) - tiles_E

    def multiply(total, x, g, half):
        plgpu.wgmma(total, x if interpret else _turned(x), g.at[:, half])

    def body(tiles_E, start_E, x, g, dw):
        def scope(out):
            @plgpu.nd_loop((E, D // WARPGROUP, F // (2 * WARPGROUP)), collective_axes="sm")
            def _(info):
                e, i, j = info.index
                first = start_E[e] * (r // 64)
                x_spec = (plgpu.BlockSpec((WARPGROUP, 64), lambda k: (i, first + k)) if interpret else
                          plgpu.BlockSpec((64, WARPGROUP), lambda k: (first + k, i)))
                g_spec = plgpu.BlockSpec((64, 2 * WARPGROUP), lambda k: (first + k, j))
                place = lambda c: dw.at[e, pl.ds(i * WARPGROUP, WARPGROUP), pl.ds(j * 2 * WARPGROUP + c, SLICE)]
                _hopper_tile(tiles_E[e] * (r // 64), x_spec, g_spec, multiply, out, place)(x, g)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.run_scoped(scope, plgpu.SMEM((2, WARPGROUP, SLICE), dw.dtype), collective_axes="wg")

    x = x_RD.T if interpret else x_RD
    return _hopper_kernel(body, jax.ShapeDtypeStruct(shape, dtype), interpret, tiles_E, start_E, x, g_RF)


# ------------------------------------------------------------------------------------------ attention by cuDNN

def cudnn_attention(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform="gpu"):
    """kernels.attention by cuDNN, documents as a [B,1,S,S] mask, which costs it more than half its speed [jax PR
    35114]. float16 or bfloat16, on Ampere and later."""
    same_B1SS = (segment_BS[:, :, None] == segment_BS[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BSNH, k_BSMH, v_BSMH, mask=same_B1SS, is_causal=True,
                                        local_window_size=(window - 1, 0),
                                        implementation="xla" if platform == "cpu" else "cudnn")


# cuDNN takes several documents a row as a list of offsets, on Hopper and later. The list has a fixed length, which
# costs time: 1.5 ms with 32 and 3.8 with 128 at S=4096 [measured: H100]. A batch in which a row has more documents
# goes to cudnn_attention, with the documents as a mask: exact as well, 4.6 ms.

def packed_attention(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform="gpu", documents=32):
    """kernels.attention for bfloat16 on Hopper: documents as offsets, no [S,S] mask if they fit. [B,S,N,H]."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn        # jax.nn does not pass the offsets on
    S = q_BSNH.shape[1]
    first_BS = jnp.concatenate([jnp.ones_like(segment_BS[:, :1], bool),
                                segment_BS[:, 1:] != segment_BS[:, :-1]], axis=1)
    start_BS = jnp.sort(jnp.where(first_BS, jnp.arange(S, dtype=jnp.int32), S), axis=1)
    start_BS = jnp.pad(start_BS, ((0, 0), (0, max(0, documents + 1 - S))), constant_values=S)
    start_BX = start_BS[:, :documents + 1]
    length_BX = start_BX[:, 1:] - start_BX[:, :-1]
    length_BX = jnp.where(length_BX > 0, length_BX, -1)
    offset_BX = jnp.where(start_BX < S, start_BX, -1)
    offset_BX = offset_BX.at[:, -1].set(-1)

    def packed(q, k, v):
        return cudnn.dot_product_attention(
            q, k, v, q_seqlen=length_BX, kv_seqlen=length_BX, q_offsets=offset_BX, kv_offsets=offset_BX,
            scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL,
            sliding_window_length=window if window < S else None)

    def masked(q, k, v):
        return cudnn_attention(q, k, v, segment_BS, window)

    fits = jnp.max(jnp.sum(first_BS, axis=1)) <= documents
    return lax.cond(fits, packed, masked, q_BSNH, k_BSMH, v_BSMH)


# ------------------------------------------------------------------------------------- the tables of kernels.py

kernels.GROUPED |= {"triton": (triton_rows, triton_outer), "mgpu": (mgpu_rows, mgpu_outer),
                    "hopper": (hopper_rows, hopper_outer)}
kernels.ROW_TILES |= {"triton": (128, 128), "mgpu": (128, 128), "hopper": (WARPGROUP, WARPGROUP)}
kernels.ATTENTION |= {"cudnn": cudnn_attention, "packed": packed_attention}


def on_hopper(unit):
    """Whether a kernel for bfloat16, whose sizes must be multiples of unit, runs on the card at hand. Without one,
    when a program is only lowered, nothing is assumed of the card."""
    def fits(dtype, *sizes):
        if jax.default_backend() != "gpu" or jax.devices()[0].compute_capability != "9.0":
            return False
        return dtype == "bfloat16" and not any(size % unit for size in sizes)
    return fits


kernels.GPU_KERNELS |= {("experts", "hopper"): on_hopper(256), ("attention", "packed"): on_hopper(8)}
kernels.choose.cache_clear()
