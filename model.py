"""The transformer of the recipe: one weight table, one forward pass, one loss.

Run:  python model.py      the weight table of configs/smoke.py, and what is counted from it
Read: ModelConfig -> param_specs -> count -> init -> loss -> forward -> block -> attend -> norms.
All of it runs inside train.py's shard_map: arrays are one device's rows of the batch, weights are
this device's shares until gather_params gathers them. With sharded=False it is a plain program.

B batch  S sequence  T=B*S tokens  D hidden  N query heads  M key/value heads  H head dim
E experts  K experts per token  F expert width  Z shared expert's width  U GatedNorm's rank
V vocabulary  L layers  G=N/M  Q=N*H  P=M*H. A weight's name ends in its axes, without the L of the
stack. c is the ModelConfig."""

import math
import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.ad_checkpoint
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as Spec

import balance
import kernels
import moe

PERIOD = 4      # three layers with a window, then one that sees the whole sequence [marin #4697]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, and the few switches that are rungs of the recipe. To try an idea, edit this file."""
    vocab_size: int                     # V: token ids; the tokenizer may use fewer, never more
    seq_len: int                        # S: tokens per row
    hidden_dim: int                     # D: width of the residual stream
    num_layers: int                     # L: transformer blocks
    num_heads: int                      # N: query heads
    num_kv_heads: int                   # M: key/value heads, a divisor of num_heads
    head_dim: int                       # H: must be even (a multiple of 4 with half_rope)
    shared_dim: int                     # Z: width of the shared expert; the MLP of a dense model
    num_experts: int = 0                # E: routed experts; 0 is the dense model
    experts_per_token: int = 0          # K: routed experts that a token is sent to
    expert_dim: int = 0                 # F: width of one routed expert
    window: int = 0                     # tokens that a window layer sees; 0 means seq_len // 2
    gated_norm_rank: int = 128          # U: bottleneck of the gate on every norm
    qk_scale: float = 1.3               # multiplies the normalized queries [marin #4697]
    rope_theta: float = 10_000.0        # base of RoPE's wavelengths [marin #4697]
    router_z: float = 1e-3              # router z-loss coefficient; V2 sets 0
    logit_z: float = 1e-4               # final-logit z-loss coefficient; V2 sets 0
    balancer: str = "quantile"          # rule that balances experts: a name in balance.RULES
    balancer_rate: float = 0.0          # its step size, if it has one; 0 takes the rule's own
    half_rope: bool = False             # V2: rotate only the first half of each head
    last_layer_full: bool = False       # V2: the last layer sees the whole sequence too
    partial_key_offset: bool = False    # V2: on full layers, half a key is the previous token's
    nope_on_full: bool = False          # the published 67B: no RoPE on full layers [marin #6044]
    combine_sum: float = 0.0            # V2: rescale a token's combine weights to this sum (2.5)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"   # of matmuls; weights are float32
    remat: Literal["block", "attended", "none"] = "block"   # "attended" keeps two states a layer
    capacity_factor: float = 0.0        # rows of a shard's buffer over its mean load; 0 drops none
    exchange: Literal["ring", "ragged"] = "ring"    # how tokens reach other devices' experts
    weights_over: Literal["data", "expert+data"] = "data"   # mesh axes that split layers' matrices

    def __post_init__(self):
        def need(ok, key, expected):
            if not ok:
                raise ValueError(f"{key}: expected {expected}, found {getattr(self, key)!r}")
        for key in ("vocab_size", "seq_len", "hidden_dim", "num_layers", "num_heads",
                    "num_kv_heads", "head_dim", "gated_norm_rank", "rope_theta"):
            need(getattr(self, key) > 0, key, "a positive number")
        for key in ("num_experts", "shared_dim", "window", "router_z", "logit_z", "combine_sum",
                    "capacity_factor", "balancer_rate"):
            need(getattr(self, key) >= 0, key, "zero or a positive number")
        need(self.seq_len > 1, "seq_len", "at least 2")
        need(self.num_heads % self.num_kv_heads == 0, "num_kv_heads",
             f"a divisor of num_heads={self.num_heads}")
        need(self.head_dim % (4 if self.half_rope else 2) == 0, "head_dim",
             "an even number (a multiple of 4 with half_rope)")
        need(self.half_rope or not self.partial_key_offset, "partial_key_offset",
             "False unless half_rope=True (it moves the half that RoPE leaves alone)")
        if self.num_experts:
            need((self.combine_sum > 0) < self.experts_per_token <= self.num_experts,
                 "experts_per_token", f"1 (2 with combine_sum) to num_experts={self.num_experts}")
            need(self.expert_dim > 0, "expert_dim", "a positive number, since num_experts > 0")
        else:
            need(self.experts_per_token == self.expert_dim == 0, "num_experts",
                 "at least 1, since experts_per_token or expert_dim is set")
            need(self.shared_dim > 0, "shared_dim", "a positive number: it is a dense model's MLP")
        balance.rule_named(self.balancer)
        need(self.exchange == "ring" or self.capacity_factor > 0, "capacity_factor",
             "a positive number, since exchange='ragged' receives into buffers of a fixed size")


# --------------------------------------------------------------------------------- the weight table

class Weight(NamedTuple):
    shape: tuple
    spec: Spec              # axes split over "data" (FSDP) and "expert"; Spec() is a whole copy
    group: str              # "matrix", "expert", "shared", "head", "adam": see train.GROUPS
    init: str = "normal"    # "normal": 0.5/sqrt(D), cut at 3 sigma [marin #4697]; "ones"; "zeros"

    def gathers(self):
        """[(axis to gather, mesh axis)] in that order; an expert stays on its device. Axes count
        from the end, because inside the layer scan the stack's leading L is gone."""
        split = {i: jax.tree.leaves(axes) for i, axes in enumerate(self.spec, -len(self.spec))}
        return [(i, name) for i in split if "data" in split[i] for name in reversed(split[i])]


def param_specs(c):
    """Every weight of the model, one line each: a nested dict of Weight. All else is derived from
    it.

    Split weights are cast to the compute type and gathered when used (gather_params). The small
    ones that every device holds whole (gains, router, head gate) stay in float32. "data" splits the
    last axis but one where sizes allow: the last one, cut to 40 of 5,120, would be padded back to
    128 lanes in a TPU's memory, 3.2 times its size."""
    V, D, L, N, E, F, Z, U = (c.vocab_size, c.hidden_dim, c.num_layers, c.num_heads, c.num_experts,
                              c.expert_dim, c.shared_dim, c.gated_norm_rank)
    Q, P = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    each, split = Spec(None, "expert", "data", None), tuple(c.weights_over.split("+"))
    rows, cols = Spec(None, split, None), Spec(None, None, split)
    def gated_norm_weights(site):
        return {
            f"{site}_norm_gain_D":  Weight((L, D),       Spec(), "adam", "ones"),
            f"{site}_norm_down_DU": Weight((L, D, U),    rows,   "matrix"),
            f"{site}_norm_up_UD":   Weight((L, U, D),    cols,   "matrix"),
        }
    layers = gated_norm_weights("attn") | gated_norm_weights("mlp") | {
        "query_DQ":       Weight((L, D, Q),    rows,   "matrix"),
        "key_DP":         Weight((L, D, P),    rows,   "matrix"),
        "value_DP":       Weight((L, D, P),    rows,   "matrix"),
        "out_QD":         Weight((L, Q, D),    rows,   "matrix"),
        "head_gate_DN":   Weight((L, D, N),    Spec(), "adam", "zeros"),
    }
    shared = "shared" if E else "matrix"        # beside routed experts it is clipped with them
    if Z:
        layers |= {
            "shared_gate_DZ": Weight((L, D, Z),    rows,   shared),
            "shared_up_DZ":   Weight((L, D, Z),    rows,   shared),
            "shared_down_ZD": Weight((L, Z, D),    rows,   shared),
        }
    if E:
        layers |= {
            "router_DE":      Weight((L, D, E),    Spec(), "adam"),
            "gate_EDF":       Weight((L, E, D, F), each,   "expert"),
            "up_EDF":         Weight((L, E, D, F), each,   "expert"),
            "down_EFD":       Weight((L, E, F, D), each,   "expert"),
        }
    return {
        "embed_VD":           Weight((V, D), Spec(None, split), "adam"),
        "embed_norm_gain_D":  Weight((D,),   Spec(),             "adam", "ones"),
        "embed_norm_down_DU": Weight((D, U), Spec(split, None), "matrix"),
        "embed_norm_up_UD":   Weight((U, D), Spec(None, split), "matrix"),
        "layers":             layers,
        "final_norm_gain_D":  Weight((D,),   Spec(),             "adam", "ones"),
        "final_norm_down_DU": Weight((D, U), Spec(split, None), "matrix"),
        "final_norm_up_UD":   Weight((U, D), Spec(None, split), "matrix"),
        "head_DV":            Weight((D, V), Spec(split, None), "head"),
    }


def map_params(f, c):
    """The weight table with f(p, w) for every Weight w at a path p, such as "layers/query_DQ"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: f("/".join(key.key for key in path), w), param_specs(c),
        is_leaf=lambda x: isinstance(x, Weight))


class Counts(NamedTuple):
    total: int              # every parameter
    active: int             # what one token uses: all but the experts it was not sent to
    core: int               # active without embedding and head
    flops_per_token: int    # training FLOPs as the budgets count them (no head in an MoE)
    mfu_flops: int          # the same with the head always counted: what MFU divides by

    @property
    def params(self):
        """Active with the head and without the embedding: N of the scaling fits."""
        return self.core + (self.active - self.core) // 2


def count(c):
    """Parameters and training FLOPs per token of a config, from the weight table.

    FLOPs: 3 times the forward pass. Attention scores count over the full S, not halved for
    causality and not cut to the window; embedding, norms and gates do not count (Marin's
    convention, so that budgets compare). Executed FLOPs differ: windows save, rematerialization and
    padding cost."""
    sizes = {"expert": 0}
    def add(_, w):
        sizes[w.group] = sizes.get(w.group, 0) + math.prod(w.shape)
    map_params(add, c)
    D, S, N, H, M = c.hidden_dim, c.seq_len, c.num_heads, c.head_dim, c.num_kv_heads
    total, routed = sum(sizes.values()), sizes["expert"]
    active = total - routed + routed * c.experts_per_token // max(1, c.num_experts)
    mlp = 6 * D * (c.expert_dim * c.experts_per_token + c.shared_dim)
    attention = 2 * D * H * (N + 2 * M) + 2 * N * H * D + 4 * S * N * H + 3 * S * N
    router = 2 * D * c.num_experts if c.num_experts > 1 else 0
    layers, head = c.num_layers * (mlp + attention + router), 2 * D * c.vocab_size
    return Counts(total, active, active - 2 * c.vocab_size * D,
                  3 * (layers + (0 if c.num_experts else head)), 3 * (layers + head))


def init(c, key):
    """Fresh float32 weights. A weight's key comes from its name: adding one changes no other."""
    def one(path, w):
        if w.init != "normal":
            return jnp.full(w.shape, float(w.init == "ones"), jnp.float32)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        unit = jax.random.truncated_normal(own, -3.0, 3.0, w.shape, jnp.float32)
        return unit * (0.5 * c.hidden_dim**-0.5)
    return map_params(one, c)


def gather_params(params, specs, c, sharded):
    """FSDP: the weights in the compute type, gathered from the devices' shares."""
    return {name: gather(w, specs[name].gathers(), c, sharded) for name, w in params.items()}


def gather(w, gathers, c, sharded):
    """One of these weights. Backward, each device receives the summed gradient of its own share."""
    for axis, mesh in gathers:
        w = kernels.gather_weight(w, sharded and mesh, w.ndim + axis, c.compute_dtype)
    return w


# ------------------------------------------------------------------------------------ loss, forward

def loss(params, bias_LE, batch, totals, c, sharded=False, platform="cpu"):
    """What is minimized, over this device's rows: mean next-token loss, z-losses, auxiliary loss.

    batch: tokens, targets, segments [B,S] int32 and weights [B,S] float32 (0 where there is nothing
    to predict: padding, and the step across a document border). totals: "weight", the weights' sum,
    and "tokens", the count of real tokens, of the WHOLE batch over all devices and microbatches, so
    that shares add up to the mean however the batch is cut.
    Returns (scalar, (nll, stats)): the summed weighted loss in nats without z-losses, and the
    RouterStats of all layers, None for a dense model."""
    nll_T, lse_T, stats = token_losses(params, bias_LE, batch, c, sharded, platform)
    weight_T, real_T = batch["weights"].reshape(-1), batch["segments"].reshape(-1) != 0
    nll = jnp.sum(weight_T * nll_T)
    objective = (nll + c.logit_z * jnp.sum(weight_T * lse_T**2)) / totals["weight"]
    if stats is not None:
        z = jnp.mean(jnp.sum(stats.z_T * real_T, axis=1)) / totals["tokens"]
        axes = ("replica", "data", "expert") if sharded else None
        objective += c.router_z * z + balance.auxiliary_loss(
            c.balancer, stats.prob_TE, stats.margin_TE, real_T, totals["tokens"],
            c.experts_per_token, axes, c.balancer_rate)
    return objective, (nll, stats)


def token_losses(params, bias_LE, batch, c, sharded=False, platform="cpu"):
    """Every position's loss and log-normalizer in nats, float32 [T] each, and the RouterStats."""
    x_TD, stats = forward(params, bias_LE, batch["tokens"], batch["segments"], c, sharded, platform)
    head = gather_params({"head_DV": params["head_DV"]}, param_specs(c), c, sharded)["head_DV"]
    target_T = batch["targets"].reshape(-1)
    nll_T, lse_T = kernels.cross_entropy(x_TD, head, target_T)
    return nll_T, lse_T, stats


def logits(params, bias_LE, tokens_BS, segment_BS, c, at=slice(None), platform="cpu"):
    """Float32 logits [T,V] of the positions `at`, on one device: for sampling and tests."""
    x_TD, _ = forward(params, bias_LE, tokens_BS, segment_BS, c, platform=platform)
    head_DV = params["head_DV"].astype(c.compute_dtype)
    return jnp.dot(x_TD[at], head_DV, preferred_element_type=jnp.float32)


def forward(params, bias_LE, tokens_BS, segment_BS, c, sharded=False, platform="cpu"):
    """Tokens to the last hidden state, ready for the head: [B,S] -> ([T,D], RouterStats or None).
    Layers are stacked and scanned, PERIOD at a time, so that window and full attention are
    different static programs. What is left over (6 layers = 4 + 2) follows one by one."""
    specs = param_specs(c)
    norms = {name: w for name, w in params.items() if "_norm_" in name}
    top = gather_params(norms, specs, c, sharded)
    *first, (_, last) = specs["embed_VD"].gathers()
    embed_VD = gather(params["embed_VD"], first, c, sharded)
    x_TD = kernels.embed(embed_VD, tokens_BS.reshape(-1), sharded and last, c.compute_dtype)
    x_TD = gated_norm(x_TD, top, "embed")
    rotation = rope_angles(c)
    def layer(x_TD, weights, i):
        def run(x_TD, p, bias_E):
            p, full = gather_params(p, specs["layers"], c, sharded), sees_all(c, i)
            turn = None if full and c.nope_on_full else rotation
            return block(x_TD, p, bias_E, segment_BS, turn, full, c, sharded, platform)
        kept = jax.checkpoint_policies.save_only_these_names(c.remat, "sent")
        return (run if c.remat == "none" else jax.checkpoint(run, policy=kept))(x_TD, *weights)
    def layers(x_TD, stacked, numbers):
        stats = []
        for place, i in enumerate(numbers):
            x_TD, some = layer(x_TD, jax.tree.map(lambda w: w[place], stacked), i)
            stats.append(some)
        return x_TD, jax.tree.map(lambda *some: jnp.stack(some), *stats)
    scanned, left, stats = c.num_layers // PERIOD * PERIOD, c.num_layers % PERIOD, []
    stacked = params["layers"], bias_LE
    if scanned:
        folded = jax.tree.map(
            lambda w: w[:scanned].reshape(scanned // PERIOD, PERIOD, *w.shape[1:]), stacked)
        x_TD, some = lax.scan(lambda x, weights: layers(x, weights, range(PERIOD)), x_TD, folded)
        stats.append(jax.tree.map(lambda s: s.reshape(scanned, *s.shape[2:]), some))
    if left:
        rest = jax.tree.map(lambda w: w[scanned:], stacked)
        x_TD, some = layers(x_TD, rest, range(scanned, c.num_layers))
        stats.append(some)
    return gated_norm(x_TD, top, "final"), jax.tree.map(lambda *some: jnp.concatenate(some), *stats)


def sees_all(c, i):
    """Whether layer i attends to the whole sequence: every fourth does. In V2 so does the last,
    which is never inside the scan unless it is a fourth one. [marin #4697; V2: #4976]"""
    return i % PERIOD == PERIOD - 1 or c.last_layer_full and i == c.num_layers - 1


def block(x_TD, p, bias_E, segment_BS, rotation, full, c, sharded=False, platform="cpu"):
    """One layer: attention, then the shared expert and the routed experts side by side on the same
    normed input [shared expert: DeepSeekMoE, arXiv 2401.06066]. Returns (x_TD, RouterStats or
    None)."""
    with jax.named_scope("attention"):
        y_TD = attend(gated_norm(x_TD, p, "attn"), p, segment_BS, rotation, full, c, platform)
        x_TD = jax.ad_checkpoint.checkpoint_name(x_TD + y_TD, "attended")
    with jax.named_scope("mlp"):
        m_TD, stats = gated_norm(x_TD, p, "mlp"), None
        if c.shared_dim:
            h_TZ = jax.nn.silu(m_TD @ p["shared_gate_DZ"]) * (m_TD @ p["shared_up_DZ"])
            x_TD = x_TD + h_TZ @ p["shared_down_ZD"]
        if c.num_experts:
            y_TD, stats = moe.moe(m_TD, p, bias_E, c, "expert" if sharded else None, platform)
            x_TD = x_TD + y_TD
    return x_TD, stats


def attend(a_TD, p, segment_BS, rotation, full, c, platform="cpu", cache=None):
    """Grouped-query attention with QK-norm [arXiv 2010.04245], RoPE, exclusive self-attention and a
    gate per head [marin #4697]. cache: when sampling, the tokens before (configs/sample.py)."""
    B, S = segment_BS.shape
    q_BSNH = (a_TD @ p["query_DQ"]).reshape(B, S, c.num_heads, c.head_dim)
    k_BSMH = (a_TD @ p["key_DP"]).reshape(B, S, c.num_kv_heads, c.head_dim)
    v_BSMH = (a_TD @ p["value_DP"]).reshape(B, S, c.num_kv_heads, c.head_dim)
    if c.partial_key_offset and full:
        k_BSMH = (cache.key_offset if cache else key_offset)(k_BSMH, segment_BS)
    q_BSNH = rope(rms_norm(q_BSNH, 1e-6), rotation) * c.qk_scale
    k_BSMH = rope(rms_norm(k_BSMH, 1e-6), rotation)
    window = S if full else c.window or c.seq_len // 2
    attention = cache.attention if cache else kernels.attention
    y_BSNH = attention(q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform=platform)
    y_TNH = exclusive_self_attention(y_BSNH, v_BSMH)
    gate_TN = 2 * jax.nn.sigmoid(a_TD.astype(jnp.float32) @ p["head_gate_DN"])      # 1 at the start
    y_TNH = y_TNH * gate_TN[:, :, None]
    return y_TNH.reshape(B * S, -1).astype(a_TD.dtype) @ p["out_QD"]


def exclusive_self_attention(y_BSNH, v_BSMH):
    """Remove from each head's output its part along the token's own value: float32 [T,N,H].

    What a token is, the residual stream already carries [arXiv 2603.09078]. As einsums: the same
    lines with broadcasting and jnp.sum take 10 times as long on a CPU, forward and backward
    [measured]."""
    B, S, N, H = y_BSNH.shape
    M = v_BSMH.shape[2]
    y_TMGH = y_BSNH.reshape(-1, M, N // M, H).astype(jnp.float32)
    v_TMH = v_BSMH.reshape(-1, M, H).astype(jnp.float32)
    # 1e-6 as the run had it [marin #4697]
    unit_TMH = v_TMH / (jnp.einsum("TMH,TMH->TM", v_TMH, v_TMH)[:, :, None] + 1e-6)
    along_TMG = jnp.einsum("TMGH,TMH->TMG", y_TMGH, v_TMH)
    y_TMGH = y_TMGH - jnp.einsum("TMG,TMH->TMGH", along_TMG, unit_TMH)
    return y_TMGH.reshape(B * S, N, H)


# ------------------------------------------------------------------------------ norms, RoPE, offset

def rms_norm(x, eps, gain=1.0):
    """gain * x over its root mean square along the last axis, in float32 until the result is cast
    to x's type: the recipe multiplies by the gain before it rounds."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain).astype(x.dtype)


def gated_norm(x_TD, p, site):
    """RMSNorm with a gain, then a learned gate on every channel: n * sigmoid(silu(n down) up).
    [arXiv 2601.22966; eps 1e-5: marin #4697]"""
    n_TD = rms_norm(x_TD, 1e-5, p[f"{site}_norm_gain_D"])
    h_TU = jax.nn.silu(n_TD @ p[f"{site}_norm_down_DU"])
    return n_TD * jax.nn.sigmoid(h_TU @ p[f"{site}_norm_up_UD"])


def rope_angles(c):
    """Cosine and signed sine of each position's rotation, for both halves of the rotated
    dimensions: float32 [S,2,rotated/2] each [RoPE: arXiv 2104.09864; V2 rotates half of each head:
    marin #4946]."""
    rotated = c.head_dim // 2 if c.half_rope else c.head_dim
    speed = c.rope_theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angle = jnp.arange(c.seq_len, dtype=jnp.float32)[:, None] * speed
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos, cos], axis=1), jnp.stack([-sin, sin], axis=1)


def rope(x_BSNH, rotation):
    """Rotate dimension i with dimension i + rotated/2. Dimensions past `rotated` stay as they are,
    and all of them if rotation is None [NoPE: arXiv 2305.19466].

    The two halves are an axis of length 2 that is reversed: taking them apart and concatenating
    them again costs 3 times as much on a CPU, forward and backward [measured]."""
    if rotation is None:
        return x_BSNH
    cos, sin = (r[None, :x_BSNH.shape[1], None] for r in rotation)
    rotated = 2 * cos.shape[-1]
    pair = x_BSNH[..., :rotated].astype(jnp.float32).reshape(*x_BSNH.shape[:-1], 2, -1)
    turned = (pair * cos + pair[..., ::-1, :] * sin).reshape(*x_BSNH.shape[:-1], rotated)
    turned = turned.astype(x_BSNH.dtype)
    if rotated == x_BSNH.shape[-1]:
        return turned
    return jnp.concatenate([turned, x_BSNH[..., rotated:]], axis=-1)


def key_offset(k_BSMH, segment_BS):
    """Partial key offset: the half of each key that RoPE leaves alone is the previous token's, so
    that one layer can look for "what came after this token". Zero at the start of a document, where
    the previous token belongs to another one. [marin #4802, #4976]"""
    half = k_BSMH.shape[-1] // 2
    before = jnp.pad(k_BSMH[:, :-1, :, half:], ((0, 0), (1, 0), (0, 0), (0, 0)))
    same = segment_BS == jnp.pad(segment_BS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    before = jnp.where(same[:, :, None, None], before, 0)
    return jnp.concatenate([k_BSMH[..., :half], before], axis=-1)


if __name__ == "__main__":
    import argparse
    import train
    argparse.ArgumentParser(usage=__doc__).parse_args()      # --help, and no other word
    config, _ = train.load_config("configs/smoke.py")
    map_params(lambda path, w: print(f"{path:26s}{w.shape!s:22s}", *w[1:]), config)
    print(count(config))
