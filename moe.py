"""Mixture of experts: route, dispatch, compute, combine.                     Imports: kernels, balance.

Run:  python moe.py                one layer against its twin, then against every harder routing; time
Read: route -> dispatch -> gather and scatter-free gradients -> moe.         Truth: dense_moe.
Token-choice and dropless: every token reaches its K experts, whatever the loads are.

T tokens  D hidden  E experts  K experts per token  F expert width
A = T*K assignments (token t's j-th choice is number t*K+j)   R rows of the expert-sorted, tile-padded buffer"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import balance
import kernels

TILE = 64       # rows per tile. Small tiles waste fewer padding rows (E*TILE at most), large ones make better
                # matmuls; 64 beat 128 at 4,096 assignments on a 2-core CPU (9.1 against 14.1 ms [measured])


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
    tile_expert: jax.Array      # [R/TILE] the expert that owns each tile of rows
    load_E: jax.Array           # int32, assignments per expert


def dispatch(expert_TK, E):
    """Sort assignments by expert and pad every expert to whole tiles. All integers, no gradient.

    One sort of packed keys, expert * A + assignment: stable, and cheaper than an argsort. Loads are counted
    by comparison (a histogram is a scatter). Every expert owns at least one tile, so a weight-gradient
    kernel that writes per tile leaves no expert unwritten. R = A rounded up to a tile, plus E tiles, is
    enough for any loads, and static."""
    T, K = expert_TK.shape
    A, flat_A = T * K, expert_TK.reshape(-1)
    if E * A >= 2**31:
        raise ValueError(f"dispatch: {E} experts x {A} assignments overflow the int32 sort key; use more devices")
    R = (-(-A // TILE) + E) * TILE
    order_A = lax.sort(flat_A * A + jnp.arange(A, dtype=jnp.int32)) % A     # sorted position -> assignment
    load_E = jnp.sum(flat_A[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)

    tiles_E = jnp.maximum(1, -(-load_E // TILE))
    first_E = jnp.cumsum(load_E) - load_E                       # first sorted position of each expert
    start_E = (jnp.cumsum(tiles_E) - tiles_E) * TILE            # first row of each expert
    tile_expert = jnp.sum(jnp.arange(R // TILE)[:, None] >= jnp.cumsum(tiles_E)[None, :], axis=1)
    tile_expert = jnp.minimum(tile_expert, E - 1).astype(jnp.int32)         # unused tiles at the end: zero rows

    expert_R = jnp.repeat(tile_expert, TILE)
    place_R = jnp.arange(R) - start_E[expert_R]                 # how many of this expert's rows stand before
    filled_R = place_R < load_E[expert_R]
    choice_R = jnp.where(filled_R, order_A[jnp.where(filled_R, first_E[expert_R] + place_R, 0)], A)
    sorted_expert_A = flat_A[order_A]
    row_of_sorted_A = start_E[sorted_expert_A] + jnp.arange(A) - first_E[sorted_expert_A]
    _, row_A = lax.sort((order_A, row_of_sorted_A), num_keys=1)             # inverse permutation, by sorting back
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
    return sum(g_RD[d.row_TK[:, j]] for j in range(d.row_TK.shape[1])), None


spread.defvjp(lambda x_TD, d: (spread(x_TD, d), d), _spread_backward)


@jax.custom_vjp
def combine(y_RD, gate_TK, d):
    """Sum every token's K expert outputs, weighted, in float32: [R,D], [T,K] -> [T,D]."""
    y_TD = sum(gate_TK[:, j, None] * y_RD[d.row_TK[:, j]] for j in range(d.row_TK.shape[1]))
    return y_TD.astype(y_RD.dtype)


def _combine_backward(residuals, g_TD):
    y_RD, gate_TK, d = residuals
    gate_R = _rows(gate_TK.reshape(-1), d.choice_R)
    dy_RD = gate_R[:, None] * _rows(g_TD, d.token_R)
    g_TD = g_TD.astype(jnp.float32)
    dgate_TK = jnp.stack([jnp.sum(g_TD * y_RD[d.row_TK[:, j]], axis=-1) for j in range(d.row_TK.shape[1])], axis=1)
    return dy_RD.astype(y_RD.dtype), dgate_TK, None


combine.defvjp(lambda y_RD, gate_TK, d: (combine(y_RD, gate_TK, d), (y_RD, gate_TK, d)), _combine_backward)


# ------------------------------------------------------------------------------------------------ the layer

def moe(x_TD, p, bias_E, K, combine_sum=0.0, balancer="quantile", impl="tiles"):
    """The routed experts of one layer: [T,D] -> ([T,D], routing, load_E).

    p: router_DE, gate_EDF, up_EDF, down_EFD (SwiGLU experts). The shared expert is the model's business."""
    E = p["router_DE"].shape[1]
    with jax.named_scope("route"):
        r = route(x_TD, p["router_DE"], bias_E, K, combine_sum, balancer)
        d = dispatch(r.expert_TK, E)
    with jax.named_scope("experts"):
        x_RD = spread(x_TD, d)
        h_RF = (jax.nn.silu(kernels.grouped_matmul(x_RD, p["gate_EDF"], d.tile_expert, impl))
                * kernels.grouped_matmul(x_RD, p["up_EDF"], d.tile_expert, impl))
        y_RD = kernels.grouped_matmul(h_RF, p["down_EFD"], d.tile_expert, impl)
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


# ------------------------------------------------------------------------------------------- python moe.py

def _demonstrate():
    import time

    T, D, E, K, F = 2048, 128, 16, 4, 64
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {"router_DE": (D, E), "gate_EDF": (E, D, F), "up_EDF": (E, D, F), "down_EFD": (E, F, D)}
    p = {k: jax.random.normal(key, shape) * 0.05 for key, (k, shape) in zip(keys, shapes.items())}
    x_TD = jax.random.normal(keys[4], (T, D))
    shrug = jnp.zeros(E)
    skew = jnp.where(jnp.arange(E) < K, 100.0, 0.0)             # K experts take every token, E-K get none
    _, margin_TE = balance.select(x_TD @ p["router_DE"], shrug, K)
    fair = balance.next_bias(margin_TE[None], jnp.ones(T, bool), shrug[None], K)[0]

    def run(layer):
        return jax.jit(jax.value_and_grad(
            lambda x, p, bias: jnp.sum(jnp.sin(layer(x, p, bias, K)[0])), argnums=(0, 1)))
    forms = {"moe": run(moe), "dense_moe": run(dense_moe)}
    print(f"T={T} D={D} E={E} K={K} F={F}, forward and backward, {jax.devices()[0].device_kind}; best of 10")
    print(f"{'routing':22s} {'smallest, largest load':>24s} {'moe ms':>8s} {'dense ms':>9s} {'ratio':>6s}   error")
    for name, bias in {"no balancing": shrug, "quantile balancing": fair, f"{K} experts take all": skew}.items():
        load = dispatch(route(x_TD, p["router_DE"], bias, K).expert_TK, E).load_E
        out = {k: jax.tree.leaves(f(x_TD, p, bias)) for k, f in forms.items()}
        error = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(*out.values()))
        best = dict.fromkeys(forms, float("inf"))
        for _ in range(10):
            for k, f in forms.items():
                t0 = time.perf_counter()
                jax.block_until_ready(f(x_TD, p, bias))
                best[k] = min(best[k], time.perf_counter() - t0)
        a, b = best["moe"] * 1e3, best["dense_moe"] * 1e3
        print(f"{name:22s} {f'{load.min()}, {load.max()}':>24s} {a:8.1f} {b:9.1f} {a / b:6.2f}   {error:.0e}")


if __name__ == "__main__":
    _demonstrate()
