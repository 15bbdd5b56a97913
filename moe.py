"""Mixture of experts: route, dispatch, compute, combine.                     Imports: kernels, balance.

Run:  python moe.py                one layer beside its rivals, then under kind and unkind routing: times, errors
Read: route -> dispatch -> gather and scatter-free gradients -> moe.         Truth: dense_moe.
Then, for many devices: parallel_moe -> ring, ragged. Token-choice; on one device every token reaches its K
experts, whatever the loads are; between devices as long as the fixed buffers last (capacity_factor).

T tokens  D hidden  E experts  K experts per token  F expert width
A = T*K assignments (token t's j-th choice is number t*K+j)   R rows of the expert-sorted, tile-padded buffer"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import balance
import kernels


class Routing(NamedTuple):
    expert_TK: jax.Array        # int32, K distinct experts, best first
    gate_TK: jax.Array          # float32, how loudly each is heard
    margin_TE: jax.Array        # float32, what balance.update reads
    z_T: jax.Array              # float32, squared log-sum-exp of the router logits, the router z-loss
    prob_TE: jax.Array          # float32, softmax of the router logits: only the auxiliary losses read it


def route(x_TD, router_DE, bias_E, K, combine_sum=0.0, balancer="quantile"):
    """Who is called, and how loudly. The bias decides who; it never touches how loudly.

    combine_sum = 0 uses sigmoid(logit) as it is (recipe V1); a positive value rescales the K weights of a
    token to that sum (2.5 in V2). Everything in float32: bfloat16 logits would tie."""
    # HIGHEST: the default float32 product of a TPU or a GPU multiplies in bfloat16 or TF32
    logits_TE = jnp.dot(x_TD.astype(jnp.float32), router_DE, precision=lax.Precision.HIGHEST)
    expert_TK, margin_TE = balance.select(logits_TE, bias_E, K, balancer)
    # picked by compare-and-sum: the gradient of an index would be a scatter
    chosen_TKE = expert_TK[:, :, None] == jnp.arange(logits_TE.shape[1])
    pick = lambda x_TE: jnp.sum(jnp.where(chosen_TKE, x_TE[:, None, :], 0.0), axis=-1)
    gate_TK = jax.nn.sigmoid(pick(logits_TE))
    if balancer == "threshold" and K < logits_TE.shape[1]:          # a slot below the threshold is silent
        gate_TK = jnp.where(pick(margin_TE) > 0, gate_TK, 0.0)
    if combine_sum:
        total_T1 = jnp.sum(gate_TK, axis=-1, keepdims=True)
        gate_TK = gate_TK * combine_sum / jnp.where(total_T1 > 0, total_T1, 1.0)
    return Routing(expert_TK, gate_TK, margin_TE, jax.nn.logsumexp(logits_TE, axis=-1) ** 2,
                   jax.nn.softmax(logits_TE, axis=-1))


class Dispatch(NamedTuple):
    row_TK: jax.Array           # the row of the sorted buffer that holds each assignment
    token_R: jax.Array          # the token that stands in each row; T in rows of padding
    choice_R: jax.Array         # the assignment in each row; A in rows of padding
    tile_expert: jax.Array      # [R/tile] the expert that owns each tile of rows; E for tiles that nobody needs
    load_E: jax.Array           # int32, assignments per expert


def tile_layout(load_E, tile, R):
    """The first row of every expert in a buffer of R rows, and the owner of each tile: (start_E, [R/tile]).

    Every expert owns at least one tile, so a weight-gradient kernel that writes per tile leaves no expert
    unwritten. Tiles that are left over at the end carry E: they cost no products."""
    tiles_E = jnp.maximum(1, -(-load_E // tile))
    last_E = jnp.cumsum(tiles_E)
    tile_expert = jnp.sum(jnp.arange(R // tile)[:, None] >= last_E[None, :], axis=1, dtype=jnp.int32)
    return (last_E - tiles_E) * tile, tile_expert


def dispatch(expert_TK, E, tile=64, capacity=None, skip=0):
    """Sort assignments by expert and pad every expert to whole tiles. All integers, no gradient.

    An id of E means "not here". Of the others, in the order of their experts and then of their tokens, `skip`
    are passed over, `capacity` (None: all) get rows, and the rest are dropped. Whatever gets no row points to
    the last row, which is always padding: it reads zeros, and adds to nothing.

    One sort of packed keys, expert * A + assignment: stable, and cheaper than an argsort. Loads are counted
    by comparison (a histogram is a scatter). R = capacity rounded up to a tile, plus E tiles, is static,
    enough for any loads, and a row more than they fill."""
    T, K = expert_TK.shape
    A, flat_A = T * K, expert_TK.reshape(-1)
    capacity = A if capacity is None else capacity
    if (E + 1) * A >= 2**31:
        raise ValueError(f"dispatch: {E} experts x {A} assignments overflow the int32 sort key: more devices")
    R = (-(-capacity // tile) + E) * tile
    order_A = lax.sort(flat_A * A + jnp.arange(A, dtype=jnp.int32)) % A     # sorted position -> assignment
    load_E = jnp.sum(flat_A[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)

    first_E = jnp.cumsum(load_E) - load_E                       # first sorted position of each expert
    passed_E = jnp.clip(skip - first_E, 0, load_E)              # its assignments before and after what gets rows
    kept_E = jnp.clip(skip + capacity - first_E, 0, load_E) - passed_E
    start_E, tile_expert = tile_layout(kept_E, tile, R)
    first_E = first_E + passed_E

    expert_R = jnp.repeat(jnp.minimum(tile_expert, E - 1), tile)
    place_R = jnp.arange(R) - start_E[expert_R]                 # how many of this expert's rows stand before
    filled_R = place_R < kept_E[expert_R]
    choice_R = jnp.where(filled_R, order_A[jnp.where(filled_R, first_E[expert_R] + place_R, 0)], A)
    sorted_expert_A = jnp.minimum(flat_A[order_A], E - 1)
    row_of_sorted_A = start_E[sorted_expert_A] + jnp.arange(A) - first_E[sorted_expert_A]
    has_row_A = (jnp.arange(A) >= skip) & (jnp.arange(A) < jnp.minimum(skip + capacity, jnp.sum(load_E)))
    _, row_A = lax.sort((order_A, jnp.where(has_row_A, row_of_sorted_A, R - 1)), num_keys=1)    # sorted back
    return Dispatch(row_A.reshape(T, K), choice_R // K, choice_R, tile_expert, load_E)


# ------------------------------------------------------------------------- gathers, in both directions
# Spreading tokens to rows and collecting rows to tokens are each other's transpose. Autodiff would turn each
# gather into a scatter-add; because `row_TK` and `token_R` are inverse maps, both directions can be gathers.

def _rows(table, index):
    """table[index], with zeros where index is one past the end."""
    return jnp.take(table, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x_TD, d):
    """Copy every token to the rows of its K experts: [T,D] -> [R,D]; padding rows are zero."""
    return _rows(x_TD, d.token_R)


def _spread_backward(d, g_RD):
    g_TD = sum(g_RD[d.row_TK[:, j]].astype(jnp.float32) for j in range(d.row_TK.shape[1]))
    return g_TD.astype(g_RD.dtype), None


spread.defvjp(lambda x_TD, d: (spread(x_TD, d), d), _spread_backward)


@jax.custom_vjp
def combine(y_RD, gate_TK, d):
    """Sum every token's K expert outputs, weighted, in float32: [R,D], [T,K] -> [T,D]."""
    y_TD = sum(gate_TK[:, j, None] * y_RD[d.row_TK[:, j]] for j in range(d.row_TK.shape[1]))
    return y_TD.astype(y_RD.dtype)


def _combine_backward(residuals, g_TD):
    y_RD, gate_TK, d = residuals
    dy_RD = _rows(gate_TK.reshape(-1), d.choice_R)[:, None] * _rows(g_TD, d.token_R)
    g_TD = g_TD.astype(jnp.float32)     # summing [R,D] and looking up afterwards takes 3 times as long on a CPU
    dgate_TK = jnp.stack([jnp.sum(g_TD * y_RD[d.row_TK[:, j]], axis=-1) for j in range(d.row_TK.shape[1])], axis=1)
    return dy_RD.astype(y_RD.dtype), dgate_TK, None


combine.defvjp(lambda y_RD, gate_TK, d: (combine(y_RD, gate_TK, d), (y_RD, gate_TK, d)), _combine_backward)


# ------------------------------------------------------------------------------------------------ the layer

def experts(x_RD, p, tile_expert, platform="cpu", impl=None):
    """Every row through the SwiGLU of its expert: [R,D] -> [R,D]. Zero rows stay zero."""
    gate_EDF, up_EDF, down_EFD = p["gate_EDF"], p["up_EDF"], p["down_EFD"]
    if platform == "tpu" and gate_EDF.shape[2] % 128:
        # F = 1,600 of the 32B run: the kernels' blocks are multiples of 128. Zero columns add nothing, and at a
        # multiple of 256 (1,792, 12 % more products) blocks stay large
        wide = -gate_EDF.shape[2] % 256
        gate_EDF, up_EDF = (jnp.pad(w, ((0, 0), (0, 0), (0, wide))) for w in (gate_EDF, up_EDF))
        down_EFD = jnp.pad(down_EFD, ((0, 0), (0, wide), (0, 0)))
    with jax.named_scope("experts"):
        return kernels.experts(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert, impl, platform)


def moe(x_TD, p, bias_E, K, combine_sum=0.0, platform="cpu", impl=None, balancer="quantile"):
    """The routed experts of one layer: [T,D] -> ([T,D], routing, load_E).

    platform: what the program is compiled for; impl: a grouped_matmul by name, None for the platform's best.
    p: router_DE, gate_EDF, up_EDF, down_EFD (SwiGLU experts). The shared expert is the model's business."""
    E = p["router_DE"].shape[1]
    with jax.named_scope("route"):
        r = route(x_TD, p["router_DE"], bias_E, K, combine_sum, balancer)
        d = dispatch(r.expert_TK, E, kernels.row_tile(platform, r.expert_TK.size, E))
    y_RD = experts(spread(x_TD, d), p, d.tile_expert, platform, impl)
    with jax.named_scope("combine"):
        return combine(y_RD, r.gate_TK, d), r, d.load_E


def dense_moe(x_TD, p, bias_E, K, combine_sum=0.0, balancer="quantile"):
    """The definition: every expert sees every token, and the K chosen are kept. E/K times the work."""
    r = route(x_TD, p["router_DE"], bias_E, K, combine_sum, balancer)
    y_TD = jnp.zeros_like(x_TD)
    for e in range(p["router_DE"].shape[1]):
        weight_T = jnp.sum(jnp.where(r.expert_TK == e, r.gate_TK, 0.0), axis=-1)
        h_TF = jax.nn.silu(x_TD @ p["gate_EDF"][e]) * (x_TD @ p["up_EDF"][e])
        y_TD += weight_T[:, None].astype(x_TD.dtype) * (h_TF @ p["down_EFD"][e])
    load_E = jnp.sum(r.expert_TK[:, :, None] == jnp.arange(p["router_DE"].shape[1]), axis=(0, 1))
    return y_TD, r, load_E


# ----------------------------------------------------------------------------------------- expert parallelism
# Inside shard_map, P devices of the mesh axis `axis` share a layer's experts, e = E/P each, and t tokens lie on
# each. A shard computes at most C = ceil(capacity_factor * t*K) rows over all its experts together. What comes
# later, in the order of its experts and within an expert of the tokens' devices, is dropped: it adds nothing
# and the other gates are not rescaled. Both exchanges drop the same assignments. [cited: marin #4016, #4017]

def parallel_moe(x_TD, p, bias_E, K, combine_sum, axis, exchange, capacity_factor, platform="cpu",
                 balancer="quantile"):
    """`moe` on one of the devices that share the experts: [t,D] -> ([t,D], routing, load_E, rows dropped here).

    p holds the whole router and this device's e experts. load_E: choices of this device's t tokens."""
    E, P = p["router_DE"].shape[1], lax.axis_size(axis)
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r}: expected one of {', '.join(map(repr, EXCHANGES))}")
    if P == 1:
        return *moe(x_TD, p, bias_E, K, combine_sum, platform, balancer=balancer), jnp.int32(0)
    with jax.named_scope("route"):
        r = route(x_TD, p["router_DE"], bias_E, K, combine_sum, balancer)
        load_E = jnp.sum(r.expert_TK.reshape(-1, 1) == jnp.arange(E), axis=0, dtype=jnp.int32)
    capacity = math.ceil(capacity_factor * r.expert_TK.size)
    y_TD, dropped = EXCHANGES[exchange](x_TD, p, r, capacity, axis, platform)
    return y_TD, r, load_E, dropped


def ring(x_TD, p, r, capacity, axis, platform):
    """Gather the tokens of all P devices, compute what is for the experts here, sum each token's outputs at home.

    Moves P times t tokens whatever K is, so it suits few devices and is the simpler twin of `ragged`.
    capacity = 0 drops nothing: the rows are worked off in waves of t*K, as many as the fullest shard needs; the
    worst routing needs P of them (one buffer for it would be P times as large, 2.5 GiB at the 129B shape)."""
    e, P, (t, K) = p["gate_EDF"].shape[0], lax.axis_size(axis), r.expert_TK.shape
    tile = kernels.row_tile(platform, t * K, e)
    x_GD, gate_GK, expert_GK = (lax.all_gather(a, axis, tiled=True) for a in (x_TD, r.gate_TK, r.expert_TK))
    expert_GK = expert_GK - e * lax.axis_index(axis)                        # G = P*t gathered tokens
    expert_GK = jnp.where((expert_GK >= 0) & (expert_GK < e), expert_GK, e)
    arrived = jnp.sum(expert_GK < e)

    def wave(x_GD, gate_GK, p, skip):
        d = dispatch(expert_GK, e, tile, capacity or t * K, skip)
        return combine(experts(spread(x_GD, d), p, d.tile_expert, platform), gate_GK, d)

    if capacity:
        y_GD = wave(x_GD, gate_GK, p, 0)
    else:
        def add(y_GD, skip):
            more = lambda y_GD: y_GD + wave(x_GD, gate_GK, p, skip)
            return lax.cond(skip < arrived, more, lambda y_GD: y_GD, y_GD), None
        y_GD, _ = lax.scan(jax.checkpoint(add), jnp.zeros(x_GD.shape, jnp.float32), t * K * jnp.arange(P))
    # at most K of the P terms are not zero, so summing in the compute type loses what one rounding loses
    y_TD = lax.psum_scatter(y_GD.astype(x_TD.dtype), axis, scatter_dimension=0, tiled=True)
    return y_TD, jnp.maximum(0, arrived - capacity) if capacity else jnp.int32(0)


class Chunks(NamedTuple):
    """One device's part of a ragged all-to-all: [E] chunks of rows to send, e for each device in turn, and how
    long the chunks are that it receives. `to` counts rows in the RECEIVER's buffer although the sender says it:
    Marin passed the receiver's own view, and their run diverged 1,250 steps later. [cited: marin #4867]"""
    start: jax.Array            # first row of each chunk, here
    size: jax.Array             # rows of each chunk
    to: jax.Array               # first row of each chunk on its receiver
    arriving: jax.Array         # rows of each chunk that comes in, ordered by (sender, chunk)


def ragged_plan(load_SE, capacity, tile, me):
    """Where every row goes, from how many rows each sender has for each expert: (there, back, tile_expert).

    `there` takes sorted, packed rows (dispatch with tile 1) to the tile-padded buffer of their expert's shard;
    `back` is its inverse: who sent a chunk receives it where it came from."""
    S, E = load_SE.shape
    e = E // S
    load_PN = load_SE.T.reshape(S, e * S)                       # by shard; in a shard by expert, then by sender
    before_PN = jnp.cumsum(load_PN, axis=1) - load_PN
    kept_PeS = jnp.clip(capacity - before_PN, 0, load_PN).reshape(S, e, S)
    layout = lambda kept_e: tile_layout(kept_e, tile, ragged_rows(capacity, e, tile))
    start_Pe, tile_expert_P = jax.vmap(layout)(jnp.sum(kept_PeS, axis=2))
    row_PeS = start_Pe[:, :, None] + jnp.cumsum(kept_PeS, axis=2) - kept_PeS
    kept_SE, row_SE = (a.reshape(E, S).T for a in (kept_PeS, row_PeS))
    packed_SE = jnp.maximum(1, load_SE)
    origin_SE = jnp.cumsum(packed_SE, axis=1) - packed_SE
    mine = lambda a_SE: lax.dynamic_slice_in_dim(a_SE, e * me, e, axis=1).reshape(-1)
    there = Chunks(origin_SE[me], kept_SE[me], row_SE[me], mine(kept_SE))
    back = Chunks(mine(row_SE), mine(kept_SE), mine(origin_SE), kept_SE[me])
    return there, back, tile_expert_P[me]


def ragged_rows(capacity, e, tile):
    return (-(-capacity // tile) + e) * tile                    # as dispatch has it


def ragged(x_TD, p, r, capacity, axis, platform):
    """Send each row to its expert and back, no more: lax.ragged_all_to_all moves about K of the P*t rows."""
    e, E = p["gate_EDF"].shape[0], p["router_DE"].shape[1]
    if not capacity:
        raise ValueError("exchange='ragged': expected capacity_factor > 0, since it receives into fixed buffers")
    tile, me = kernels.row_tile(platform, r.expert_TK.size, e), lax.axis_index(axis)
    d = dispatch(r.expert_TK, E, tile=1)
    there, back, tile_expert = ragged_plan(lax.all_gather(d.load_E, axis), capacity, tile, me)
    rows = (len(d.token_R), ragged_rows(capacity, e, tile))
    x_RD = send(spread(x_TD, d), there, back, rows, axis, platform)
    y_RD = experts(x_RD, p, tile_expert, platform)
    y_AD = send(y_RD, back, there, rows[::-1], axis, platform)
    dropped = jnp.sum(d.load_E) - jnp.sum(there.size)
    return combine(y_AD, r.gate_TK, d), dropped


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def send(x_RD, there, back, rows, axis, platform):
    """Chunks of rows to other devices; the gradient is sent back. rows: of the buffers (here, there)."""
    out_RD = jnp.zeros((rows[1], x_RD.shape[1]), x_RD.dtype)
    move = emulated_ragged_all_to_all if platform == "cpu" else lax.ragged_all_to_all
    return move(x_RD, out_RD, *there, axis_name=axis)


send.defvjp(lambda x, there, back, *static: (send(x, there, back, *static), (there, back)),
            lambda rows, axis, platform, plans, g: (send(g, *plans[::-1], rows[::-1], axis, platform), None, None))


def emulated_ragged_all_to_all(x_RD, out_RD, start, size, to, arriving, axis_name):
    """lax.ragged_all_to_all as its documentation defines it, by gathering everything: XLA's CPU backend has no
    such operation. It reads the senders' offsets and never `arriving`, which a test checks against `size`."""
    me, P = lax.axis_index(axis_name), lax.axis_size(axis_name)
    x_SRD = lax.all_gather(x_RD, axis_name)
    mine = lambda a: lax.dynamic_slice_in_dim(lax.all_gather(a, axis_name).reshape(P, P, -1), me, 1, 1).reshape(-1)
    start, size, to = mine(start), mine(size), mine(to)                     # of the chunks that come here
    row_R = jnp.arange(out_RD.shape[0])[:, None]
    hit_RC = (row_R >= to) & (row_R < to + size)                            # at most one chunk covers a row
    sender = jnp.arange(len(to)) // (len(to) // P)
    source_R = jnp.sum(jnp.where(hit_RC, sender * x_RD.shape[0] + start + row_R - to, 0), axis=1)
    rows_RD = x_SRD.reshape(-1, x_RD.shape[1])[source_R]
    return jnp.where(jnp.any(hit_RC, axis=1)[:, None], rows_RD, out_RD)


EXCHANGES = {"ring": ring, "ragged": ragged}
BALANCERS = tuple(balance.RULES)


# ------------------------------------------------------------------------------------------- python moe.py

def _rivals(x_TD, p, expert_TK, gate_TK, cotangent_TD):
    """{name: function without arguments}: the same layer, routing given, forward and backward, in other ways."""
    (T, D), (E, _, F), K = x_TD.shape, p["gate_EDF"].shape, expert_TK.shape[1]
    weights = p["gate_EDF"], p["up_EDF"], p["down_EFD"]

    def routed(impl):
        def f(x_TD, gate_TK, gate, up, down):
            d = dispatch(expert_TK, E, kernels.row_tile("cpu", T * K, E))
            y_RD = kernels.experts(spread(x_TD, d), gate, up, down, d.tile_expert, impl)
            return jnp.vdot(combine(y_RD, gate_TK, d), cotangent_TD)
        return f

    def dense(x_TD, gate_TK, gate, up, down):
        gate_TE = jnp.sum(jnp.where(expert_TK[:, :, None] == jnp.arange(E), gate_TK[:, :, None], 0), axis=1)
        h_ETF = jax.nn.silu(jnp.einsum("TD,EDF->ETF", x_TD, gate)) * jnp.einsum("TD,EDF->ETF", x_TD, up)
        return jnp.vdot(jnp.einsum("ETF,EFD,TE->TD", h_ETF, down, gate_TE), cotangent_TD)

    def bare(rows_RD, gate, up, down):                # as many products, by one expert, and nothing else
        return jnp.sum(((rows_RD @ gate) * (rows_RD @ up)) @ down)

    def jitted(f, *args):
        g = jax.jit(jax.value_and_grad(f, argnums=range(len(args))))
        return lambda: g(*args)

    given = x_TD, gate_TK, *weights
    forms = {"loop (the default)": jitted(routed("loop"), *given), "tiles": jitted(routed("tiles"), *given),
             "dense einsum": jitted(dense, *given), "lax.ragged_dot": jitted(routed("ragged_dot"), *given),
             "bare matmuls": jitted(bare, jnp.tile(x_TD, (K, 1)), *(w[0] for w in weights))}
    try:
        import numpy as np
        import torch
    except ImportError:
        print("torch is not installed: no column for it (pip install torch)")
        return forms
    tensor = lambda a: torch.tensor(np.asarray(a))
    x, gates, *matrices = leaves = [tensor(a).requires_grad_() for a in given]
    flat, cotangent = tensor(expert_TK).long().reshape(-1), tensor(cotangent_TD)

    def grouped_mm():
        order = torch.argsort(flat)
        ends = torch.bincount(flat, minlength=E).cumsum(0).to(torch.int32)
        multiply = lambda rows, w: torch._grouped_mm(rows, w, offs=ends)
        rows = x[order // K]
        h = torch.nn.functional.silu(multiply(rows, matrices[0])) * multiply(rows, matrices[1])
        y = multiply(h, matrices[2]) * gates.reshape(-1)[order][:, None]
        total = (torch.zeros_like(x).index_add(0, order // K, y) * cotangent).sum()
        return total, torch.autograd.grad(total, leaves)
    return forms | {"torch._grouped_mm": grouped_mm}


def _demonstrate():
    T, D, E, K, F = 4096, 256, 16, 4, 128
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = {"router_DE": (D, E), "gate_EDF": (E, D, F), "up_EDF": (E, D, F), "down_EFD": (E, F, D)}
    p = {k: jax.random.normal(key, shape) * shape[-2]**-0.5 for key, (k, shape) in zip(keys, shapes.items())}
    x_TD, cotangent_TD = jax.random.normal(keys[4], (T, D)), jax.random.normal(keys[5], (T, D))
    shrug = jnp.zeros(E)
    skew = jnp.where(jnp.arange(E) < K, 100.0, 0.0)             # K experts take every token, E-K get none
    _, margin_TE = balance.select(x_TD @ p["router_DE"], shrug, K)
    fair = balance.next_bias(margin_TE[None], jnp.ones(T, bool), shrug[None], K)[0]

    print(f"T={T} D={D} E={E} K={K} F={F}, float32, {jax.devices()[0].device_kind}; best of 10, interleaved")
    print("The experts of one layer, routing given, forward and backward:")
    r = route(x_TD, p["router_DE"], fair, K)
    times = kernels.stopwatch(_rivals(x_TD, p, r.expert_TK, r.gate_TK, cotangent_TD))
    ours = times["loop (the default)"]
    for name, seconds in times.items():
        print(f"  {name:20s} {seconds * 1e3:8.1f} ms   the default takes {ours / seconds:5.2f} of it")

    print("The whole layer against dense_moe, forward and backward:")
    run = lambda layer: jax.jit(jax.value_and_grad(
        lambda x, p, bias: jnp.vdot(layer(x, p, bias, K)[0], cotangent_TD), argnums=(0, 1)))
    fast, dense = run(moe), run(dense_moe)
    routings = {"no balancing": shrug, "quantile balancing": fair, f"{K} experts take all": skew}
    times = kernels.stopwatch({name: lambda bias=bias: fast(x_TD, p, bias) for name, bias in routings.items()})
    for name, bias in routings.items():
        load = dispatch(route(x_TD, p["router_DE"], bias, K).expert_TK, E).load_E
        pairs = zip(jax.tree.leaves(fast(x_TD, p, bias)), jax.tree.leaves(dense(x_TD, p, bias)))
        error = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
        print(f"  {name:20s} {times[name] * 1e3:8.1f} ms   loads {load.min()} to {load.max()}, error {error:.0e}")


if __name__ == "__main__":
    _demonstrate()
