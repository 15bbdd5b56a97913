"""Mixture of experts: route, dispatch, compute, combine.

Run:  python moe.py          one layer against its definition, with even and with extreme loads
Read: route -> dispatch -> spread and combine -> moe. The definition is dense_moe. Then, for many
      devices: ring, ragged.
Every token chooses its K experts, so loads differ. On one device every choice is computed, whatever
the loads are. Between devices, with a capacity, buffers have a fixed size: the rest is dropped.

T tokens  D hidden  E experts  K experts per token  F expert width  P devices that share the experts
A = T*K assignments: the j-th choice of token t is assignment t*K + j
R rows of the buffer that is sorted by expert and padded to tiles
c is the ModelConfig. Lower case (t, e) is this device's share, only inside shard_map."""

import math
from functools import partial
from typing import NamedTuple

import jax.ad_checkpoint
import jax.numpy as jnp
from jax import lax

import balance
import kernels


class RouterStats(NamedTuple):
    """What balancing and the log read, for one layer; model.forward stacks it over layers."""
    load_E: jax.Array           # int32, assignments of this device's tokens to each expert
    margin_TE: jax.Array        # float32, score + bias - cutoff: see balance.select
    z_T: jax.Array              # float32, squared log-sum-exp of the logits: the router z-loss
    dropped: jax.Array          # int32, assignments that did not fit, to be summed over devices
    prob_TE: jax.Array | None   # float32, softmax of the logits, if the rule has an auxiliary loss


def route(x_TD, router_DE, bias_E, c):
    """Choose every token's experts and weigh them: (expert_TK int32, weight_TK float32, stats).

    The bias decides which experts are chosen and does not touch their weights: sigmoids of the
    logits, with c.combine_sum rescaled so that a token's K weights add up to it (2.5 in V2). All in
    float32, since bfloat16 logits would tie. An expert id of E is an empty slot.
    [sigmoid weights: marin #4697; combine_sum: #5951; z-loss: ST-MoE, arXiv 2202.08906]"""
    # HIGHEST, or a TPU multiplies float32 in bfloat16 and a GPU in TF32
    logits_TE = jnp.dot(x_TD.astype(jnp.float32), router_DE, precision=lax.Precision.HIGHEST)
    E = logits_TE.shape[1]
    expert_TK, margin_TE = balance.select(c.balancer, logits_TE, bias_E, c.experts_per_token)
    expert_TK = jax.ad_checkpoint.checkpoint_name(expert_TK, "sent")  # remat keeps how ties fell
    # picked by compare and sum: the gradient of an index would be a scatter
    chosen_TKE = expert_TK[:, :, None] == jnp.arange(E)
    logit_TK = jnp.sum(jnp.where(chosen_TKE, logits_TE[:, None, :], 0.0), axis=-1)
    weight_TK = jnp.where(expert_TK < E, jax.nn.sigmoid(logit_TK), 0.0)
    if c.combine_sum:       # by logarithms: of logits below -45 the square of the sum is 0
        log_TK = jnp.where(expert_TK < E, jax.nn.log_sigmoid(logit_TK), kernels.MASKED)
        weight_TK = jnp.where(expert_TK < E, c.combine_sum * jax.nn.softmax(log_TK, axis=-1), 0.0)
    has_loss = balance.RULES[c.balancer].loss is not None
    return expert_TK, weight_TK, RouterStats(
        load_E=count_loads(expert_TK, E), margin_TE=margin_TE, dropped=jnp.int32(0),
        z_T=jax.nn.logsumexp(logits_TE, axis=-1) ** 2,
        prob_TE=jax.nn.softmax(logits_TE, axis=-1) if has_loss else None)


def count_loads(expert_TK, E):
    """Assignments per expert, int32 [E]. By comparison: a histogram would be a scatter."""
    return jnp.sum(expert_TK.reshape(-1, 1) == jnp.arange(E), axis=0, dtype=jnp.int32)


class Dispatch(NamedTuple):
    """Where every assignment is in the buffer, in both directions. Integers, without gradient."""
    row_TK: jax.Array           # the row of each assignment
    token_R: jax.Array          # the token in each row; T in rows of padding
    assignment_R: jax.Array     # the assignment in each row; A in rows of padding
    tile_expert: jax.Array      # [R/tile], the expert that owns each tile; E for tiles left over


def dispatch(expert_TK, E, tile=64, capacity=None, skip=0):
    """Sort assignments by expert and pad every expert to whole tiles.

    An id of E means "not here". Of the others, in the order of their experts and then of their
    tokens, the first `skip` are passed over, the next `capacity` (None: all) get rows, and the rest
    are dropped. What gets no row points to the last row, which is always padding: it reads zeros
    and adds to nothing. R is static, enough for any loads, with one row to spare. Example: experts
    [[1], [0], [1]] with E=2 and tile=2 give row_TK [[2], [0], [3]], token_R [1, 3, 0, 2, 3, 3, 3,
    3] and tile_expert [0, 1, 2, 2]. Raises ValueError if the sort key does not fit int32."""
    T, K = expert_TK.shape
    A, flat_A = T * K, expert_TK.reshape(-1)
    if (E + 1) * A >= 2**31:
        raise ValueError(f"dispatch: {E} experts x {A} assignments overflow the int32 sort key: "
                         "use more devices")
    capacity = A if capacity is None else capacity
    R = buffer_rows(capacity, E, tile)
    # one sort of packed keys is stable, and cheaper than an argsort
    order_A = lax.sort(flat_A * A + jnp.arange(A, dtype=jnp.int32)) % A     # position -> assignment
    load_E = count_loads(expert_TK, E)
    # of each expert: its first position, how many are passed over, how many get rows
    first_E = jnp.cumsum(load_E) - load_E               # position of each expert's first assignment
    skipped_E = jnp.clip(skip - first_E, 0, load_E)
    kept_E = jnp.clip(skip + capacity - first_E, 0, load_E) - skipped_E
    first_kept_E = first_E + skipped_E
    start_E, tile_expert = tile_layout(kept_E, tile, R)

    # from rows to assignments
    expert_R = jnp.repeat(jnp.minimum(tile_expert, E - 1), tile)
    rank_R = jnp.arange(R) - start_E[expert_R]          # this row's place within its expert
    filled_R = rank_R < kept_E[expert_R]
    position_R = jnp.where(filled_R, first_kept_E[expert_R] + rank_R, 0)
    assignment_R = jnp.where(filled_R, order_A[position_R], A)

    # from assignments to rows: in sorted order first, then sorted back
    position_A = jnp.arange(A)
    expert_A = jnp.minimum(flat_A[order_A], E - 1)
    row_A = start_E[expert_A] + position_A - first_kept_E[expert_A]
    end = jnp.minimum(skip + capacity, jnp.sum(load_E))
    has_row_A = (position_A >= skip) & (position_A < end)
    _, row_A = lax.sort((order_A, jnp.where(has_row_A, row_A, R - 1)), num_keys=1)
    return Dispatch(row_A.reshape(T, K), assignment_R // K, assignment_R, tile_expert)


def buffer_rows(capacity, E, tile):
    """Rows of a buffer for `capacity` rows of E experts in whole tiles, at least one each."""
    return (-(-capacity // tile) + E) * tile


def tile_layout(load_E, tile, R):
    """(first row of every expert in a buffer of R rows, each tile's owner): [E], [R/tile].

    Every expert owns at least one tile, so that a kernel that writes weight gradients by tile
    leaves no expert unwritten. Tiles left over at the end carry E: they cost no products."""
    tiles_E = jnp.maximum(1, -(-load_E // tile))
    end_E = jnp.cumsum(tiles_E)
    tile_expert = jnp.sum(jnp.arange(R // tile)[:, None] >= end_E, axis=1, dtype=jnp.int32)
    return (end_E - tiles_E) * tile, tile_expert


# --------------------------------------------------------------------- gathers, in both directions
# Spreading tokens to rows and collecting rows to tokens are each other's transpose. Autodiff would
# turn each gather into a scatter-add. row_TK and token_R are inverse maps, so both can be gathers.

def _take_rows(table, index):
    """table[index], with zeros where the index is one past the end."""
    return jnp.take(table, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x_TD, d):
    """Copy every token to the rows of its experts: [T,D] -> [R,D]. Rows of padding are zero."""
    return _take_rows(x_TD, d.token_R)


def _spread_backward(d, g_RD):
    K = d.row_TK.shape[1]
    g_TD = sum(g_RD[d.row_TK[:, j]].astype(jnp.float32) for j in range(K))
    return g_TD.astype(g_RD.dtype), None


spread.defvjp(lambda x_TD, d: (spread(x_TD, d), d), _spread_backward)


@jax.custom_vjp
def combine(y_RD, d):
    """Sum every token's K rows, in float32: [R,D] -> [T,D]. It is the transpose of spread."""
    return _spread_backward(d, y_RD)[0]


combine.defvjp(lambda y_RD, d: (combine(y_RD, d), d), lambda d, g_TD: (spread(g_TD, d), None))


@jax.custom_vjp
def spread_weights(weight_TK, d):
    """Every row's combine weight: [T,K] -> [R,1]. 0 in rows of padding."""
    return _take_rows(weight_TK.reshape(-1, 1), d.assignment_R)


spread_weights.defvjp(lambda weight_TK, d: (spread_weights(weight_TK, d), d),
                      lambda d, g_R1: (g_R1[d.row_TK, 0], None))


# ---------------------------------------------------------------------------------------- the layer

def moe(x_TD, p, bias_E, c, axis=None, platform="cpu", impl=None):
    """The routed experts of one layer: [T,D] -> ([T,D], RouterStats). The model adds the shared
    one.

    p: router_DE whole, and gate_EDF, up_EDF, down_EFD, of which this device holds E/P along the
    mesh axis `axis` (None: all of them, without a mesh). impl: a kernels.expert_mlp by name."""
    (D, E), F = p["router_DE"].shape, p["gate_EDF"].shape[2]
    impl = impl or kernels.choose("experts", platform, x_TD.dtype.name, D, F)
    with jax.named_scope("route"):
        expert_TK, weight_TK, stats = route(x_TD, p["router_DE"], bias_E, c)
    if not kernels.single_device(axis):
        capacity = math.ceil(c.capacity_factor * expert_TK.size)
        y_TD, dropped = EXCHANGES[c.exchange](
            x_TD, p, expert_TK, weight_TK, capacity, axis, platform, impl)
        return y_TD, stats._replace(dropped=dropped)
    with jax.named_scope("route"):
        d = dispatch(expert_TK, E, kernels.row_tile(impl, expert_TK.size, E))
    y_RD = experts(spread(x_TD, d), spread_weights(weight_TK, d), p, d.tile_expert, platform, impl)
    with jax.named_scope("combine"):
        return combine(y_RD, d), stats


def experts(x_RD, weight_R1, p, tile_expert, platform, impl):
    """Every row through the SwiGLU of its expert, times weight_R1: [R,D] -> [R,D]. Zero rows stay
    zero. Weighed before the last product (but by "loop" after it), so that its result, which comes
    back from another device, is not computed again for the gradient of the weights."""
    gate_EDF, up_EDF, down_EFD = p["gate_EDF"], p["up_EDF"], p["down_EFD"]
    if platform == "tpu" and gate_EDF.shape[2] % 128:
        # F = 1,600 of the 32B run: blocks are multiples of 128. Zero columns add nothing, and at
        # a multiple of 256 (1,792, 12 % more products) blocks stay large
        wide = -gate_EDF.shape[2] % 256
        gate_EDF, up_EDF = (jnp.pad(w, ((0, 0), (0, 0), (0, wide))) for w in (gate_EDF, up_EDF))
        down_EFD = jnp.pad(down_EFD, ((0, 0), (0, wide), (0, 0)))
    with jax.named_scope("experts"):
        return kernels.expert_mlp(x_RD, gate_EDF, up_EDF, down_EFD, tile_expert, impl, platform,
                                  weight_R1)


def dense_moe(x_TD, p, bias_E, c):
    """The definition of `moe`: every expert sees every token. E/K times the work."""
    expert_TK, weight_TK, stats = route(x_TD, p["router_DE"], bias_E, c)
    y_TD = jnp.zeros_like(x_TD)
    for e in range(p["router_DE"].shape[1]):
        weight_T = jnp.sum(jnp.where(expert_TK == e, weight_TK, 0.0), axis=-1)
        h_TF = jax.nn.silu(x_TD @ p["gate_EDF"][e]) * (x_TD @ p["up_EDF"][e])
        y_TD += weight_T[:, None].astype(x_TD.dtype) * (h_TF @ p["down_EFD"][e])
    return y_TD, stats


# ------------------------------------------------------------------------------- expert parallelism
# P devices of a mesh axis share a layer's experts, e = E/P each, and t tokens are on each. A shard
# computes at most `capacity` = ceil(capacity_factor * t*K) rows over all its experts together. What
# comes later, in the order of its experts and then of the tokens' devices, is dropped: it adds
# nothing and the other weights are not rescaled. Both exchanges drop the same. [marin #4016, #4017]

def ring(x_tD, p, expert_tK, weight_tK, capacity, axis, platform, impl):
    """Gather the tokens of all P devices, compute what is for the experts here, sum each token's
    outputs on its own device: (y_tD, rows dropped here). P times t tokens move, whatever K is.

    capacity = 0 drops nothing: rows are computed in waves of t*K, as many as the fullest shard
    needs. One buffer for the worst routing would be P times as large, 2.5 GiB at the 129B shape."""
    e, P, (t, K) = p["gate_EDF"].shape[0], lax.axis_size(axis), expert_tK.shape
    tile = kernels.row_tile(impl, t * K, e)
    gather = partial(lax.all_gather, axis_name=axis, tiled=True)
    x_TD, weight_TK, expert_TK = gather(x_tD), gather(weight_tK), gather(expert_tK)
    local_TK = expert_TK - e * lax.axis_index(axis)
    local_TK = jnp.where((local_TK >= 0) & (local_TK < e), local_TK, e)
    arrived = jnp.sum(local_TK < e)

    def wave(x_TD, weight_TK, p, skip):
        d = dispatch(local_TK, e, tile, capacity or t * K, skip)
        weight_R1 = spread_weights(weight_TK, d)
        return combine(experts(spread(x_TD, d), weight_R1, p, d.tile_expert, platform, impl), d)

    if capacity:
        y_TD, dropped = wave(x_TD, weight_TK, p, 0), jnp.maximum(0, arrived - capacity)
    else:
        @jax.checkpoint
        def add_wave(y_TD, skip):
            more = lambda y_TD: y_TD + wave(x_TD, weight_TK, p, skip)
            return lax.cond(skip < arrived, more, lambda y_TD: y_TD, y_TD), None
        y_TD, dropped = jnp.zeros(x_TD.shape, jnp.float32), jnp.int32(0)
        y_TD, _ = lax.scan(add_wave, y_TD, t * K * jnp.arange(P))
    # at most K of the P terms are not zero, so a sum in the compute type loses what rounding loses
    y_tD = lax.psum_scatter(y_TD.astype(x_tD.dtype), axis, scatter_dimension=0, tiled=True)
    return y_tD, dropped


def ragged(x_tD, p, expert_tK, weight_tK, capacity, axis, platform, impl):
    """Send each row to its expert and back, and no other: (y_tD, rows of ours that were dropped).
    capacity > 0, since rows arrive in buffers of a fixed size (ModelConfig checks it)."""
    e, E, me = p["gate_EDF"].shape[0], p["router_DE"].shape[1], lax.axis_index(axis)
    tile = kernels.row_tile(impl, expert_tK.size, e)
    d = dispatch(expert_tK, E, tile=1)
    load_SE = lax.all_gather(count_loads(expert_tK, E), axis)
    there, back, tile_expert = ragged_plan(load_SE, capacity, tile, me)
    rows_here, rows_there = len(d.token_R), buffer_rows(capacity, e, tile)
    x_RD, weight_R1 = (send(a, there, back, (rows_here, rows_there), axis, platform)
                       for a in (spread(x_tD, d), spread_weights(weight_tK, d)))
    weight_R1 = jax.ad_checkpoint.checkpoint_name(weight_R1, "sent")    # small: not sent again
    y_RD = experts(x_RD, weight_R1, p, tile_expert, platform, impl)
    y_AD = send(y_RD, back, there, (rows_there, rows_here), axis, platform)
    return combine(y_AD, d), jnp.sum(load_SE[me]) - jnp.sum(there.send_sizes)


class SendPlan(NamedTuple):
    """One device's part of lax.ragged_all_to_all: [E] chunks of rows, e for each device in turn.

    The sender says where in the RECEIVER's buffer its chunk goes (output_offsets). Marin passed the
    receiver's own view, and their run diverged 1,250 steps later. [marin #4867]"""
    input_offsets: jax.Array        # first row of each chunk, here
    send_sizes: jax.Array           # rows of each chunk
    output_offsets: jax.Array       # first row of each chunk on its receiver
    recv_sizes: jax.Array           # rows of each chunk that arrives, ordered by (sender, chunk)


def ragged_plan(load_SE, capacity, tile, me):
    """(there, back, tile_expert), from the rows that each sender S has for each expert; P is the
    shard that receives. `there` takes sorted, packed rows (dispatch with tile 1) to the tile-padded
    buffer of their expert's shard, and `back` takes them back."""
    S, E = load_SE.shape
    e = E // S
    load_PN = load_SE.T.reshape(S, e * S)           # N = e*S, in a shard by expert, then by sender
    before_PN = jnp.cumsum(load_PN, axis=1) - load_PN
    kept_PeS = jnp.clip(capacity - before_PN, 0, load_PN).reshape(S, e, S)
    layout = partial(tile_layout, tile=tile, R=buffer_rows(capacity, e, tile))
    start_Pe, tile_expert_P = jax.vmap(layout)(jnp.sum(kept_PeS, axis=2))
    row_PeS = start_Pe[:, :, None] + jnp.cumsum(kept_PeS, axis=2) - kept_PeS
    kept_SE, row_SE = (a.reshape(E, S).T for a in (kept_PeS, row_PeS))
    packed_SE = jnp.maximum(1, load_SE)
    origin_SE = jnp.cumsum(packed_SE, axis=1) - packed_SE

    def mine(a_SE):
        return lax.dynamic_slice_in_dim(a_SE, e * me, e, axis=1).reshape(-1)
    # what a sender says of its chunks is indexed by the sender, also where they go
    there = SendPlan(origin_SE[me], kept_SE[me], row_SE[me], mine(kept_SE))
    back = SendPlan(mine(row_SE), mine(kept_SE), mine(origin_SE), kept_SE[me])
    return there, back, tile_expert_P[me]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def send(x_RD, there, back, rows, axis, platform):
    """Send chunks of rows to other devices. rows: how many the buffers (here, there) have."""
    out_RD = jnp.zeros((rows[1], x_RD.shape[1]), x_RD.dtype)
    return kernels.RAGGED_ALL_TO_ALL[platform](
        x_RD, out_RD, there.input_offsets, there.send_sizes, there.output_offsets,
        there.recv_sizes, axis_name=axis)


def _send_backward(rows, axis, platform, plans, g_RD):
    there, back = plans
    return send(g_RD, back, there, rows[::-1], axis, platform), None, None


send.defvjp(lambda x, there, back, *static: (send(x, there, back, *static), (there, back)),
            _send_backward)


EXCHANGES = {"ring": ring, "ragged": ragged}


# ------------------------------------------------------------------------------------ python moe.py

if __name__ == "__main__":
    import argparse
    import model
    import train
    argparse.ArgumentParser(usage=__doc__).parse_args()      # --help, and no other word
    config, _ = train.load_config("configs/smoke.py")
    weights = jax.tree.map(lambda w: w[0], model.init(config, jax.random.key(0))["layers"])
    states_TD = jax.random.normal(jax.random.key(1), (1024, config.hidden_dim))
    for bias in jnp.zeros(config.num_experts), 100.0 * jnp.arange(config.num_experts):
        fast_TD, routed = moe(states_TD, weights, bias, config)
        slow_TD, _ = dense_moe(states_TD, weights, bias, config)
        print("loads", routed.load_E, "largest error", jnp.max(jnp.abs(fast_TD - slow_TD)))
