"""The transformer of the recipe: one weight table, one forward pass, one loss.     Imports: moe, kernels.

Read: ModelConfig -> table -> count -> init -> loss -> forward -> block -> attend -> the small functions.
Everything runs inside train.py's shard_map: arrays are one device's rows of the batch, weights are this
device's shares until `wake` gathers them. With axis=None the same code is a plain one-device program.

B batch  S sequence  T=B*S tokens  D hidden  N query heads  M key/value heads  H head dim  Q=N*H  P=M*H
E experts  K experts per token  F expert width  Z shared-expert width  U GatedNorm bottleneck  V vocabulary
L layers  G=N/M query heads per key/value head.  A weight's name ends in its axes, but for the L of the stack."""

import math
import zlib
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as Spec

import kernels
import moe

PERIOD = 4      # layers 0,1,2 attend to a window, layer 3 to the whole sequence, and so on


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
    shared_dim: int                     # Z: width of the always-on SwiGLU; the whole MLP when num_experts = 0
    num_experts: int = 0                # E: routed experts; 0 is the dense model
    experts_per_token: int = 0          # K: routed experts a token is sent to
    expert_dim: int = 0                 # F: width of one routed expert
    window: int = 0                     # tokens a local layer sees; 0 means seq_len // 2, as the 129B run had it
    gated_norm_rank: int = 128          # U: bottleneck of the gate on every norm
    qk_scale: float = 1.3               # multiplies the normalised queries [cited: marin #4697]
    rope_theta: float = 10_000.0        # base of RoPE's wavelengths [cited: marin #4697]
    router_z: float = 1e-3              # router z-loss coefficient; V2 sets 0
    logit_z: float = 1e-4               # final-logit z-loss coefficient
    balancer: str = "quantile"          # rule that keeps experts evenly loaded: a name in moe.BALANCERS
    balancer_rate: float = 0.0          # of a rule that has one; 0 takes its own from balance.RULES
    half_rope: bool = False             # V2: rotate only the first half of each head
    last_layer_full: bool = False       # V2: the last layer sees the whole sequence, as every fourth one does
    partial_key_offset: bool = False    # V2: on full layers, the unrotated half of a key is the previous token's
    combine_sum: float = 0.0            # V2: rescale a token's K combine weights to this sum (2.5); 0 leaves them
    compute_dtype: str = "float32"      # "float32" or "bfloat16"; weights, norms, router and loss stay float32
    remat: str = "block"                # "block" recomputes each layer in the backward pass; "none" stores it
    capacity_factor: float = 0.0        # rows of an expert shard's buffer over its mean load; 0: nothing drops
    exchange: str = "ring"              # how tokens reach other chips' experts: "ring" or "ragged"; see moe.py

    def __post_init__(self):
        def need(ok, key, expected):
            if not ok:
                raise ValueError(f"{key}: expected {expected}, found {getattr(self, key)!r}")
        for key in ("vocab_size", "seq_len", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                    "gated_norm_rank"):
            need(getattr(self, key) > 0, key, "a positive number")
        need(self.rope_theta > 0, "rope_theta", "a positive number")
        for key in ("num_experts", "shared_dim", "window", "router_z", "logit_z", "combine_sum",
                    "capacity_factor"):
            need(getattr(self, key) >= 0, key, "zero or a positive number")
        need(self.seq_len > 1, "seq_len", "at least 2")
        need(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"a divisor of num_heads={self.num_heads}")
        need(self.head_dim % (4 if self.half_rope else 2) == 0, "head_dim", "an even number (of 4 with half_rope)")
        need(not self.partial_key_offset or self.half_rope, "partial_key_offset",
             "False unless half_rope=True (it moves the half that RoPE leaves alone)")
        if self.num_experts:
            need(1 <= self.experts_per_token <= self.num_experts, "experts_per_token",
                 f"1 to num_experts={self.num_experts}")
            need(self.expert_dim > 0, "expert_dim", "a positive number, since num_experts > 0")
        else:
            need(self.experts_per_token == 0 and self.expert_dim == 0, "num_experts",
                 "at least 1, since experts_per_token or expert_dim is set")
            need(self.shared_dim > 0, "shared_dim", "a positive number: it is the whole MLP of a dense model")
        need(self.balancer in moe.BALANCERS, "balancer", f"one of {', '.join(moe.BALANCERS)}")
        need(self.balancer_rate >= 0, "balancer_rate", "zero or a positive number")
        need(self.compute_dtype in ("float32", "bfloat16"), "compute_dtype", "'float32' or 'bfloat16'")
        need(self.remat in ("block", "none"), "remat", "'block' or 'none'")
        need(self.exchange in moe.EXCHANGES, "exchange", " or ".join(map(repr, moe.EXCHANGES)))
        need(self.exchange == "ring" or self.capacity_factor > 0, "capacity_factor",
             "a positive number, since exchange='ragged' receives into buffers of a fixed size")

    @property
    def local_window(self):
        return self.window or self.seq_len // 2


# -------------------------------------------------------------------------------------------- the weight table

class Weight(NamedTuple):
    shape: tuple
    spec: Spec              # axes split over the mesh's "data" (FSDP) and "expert"; Spec() is one copy each
    kind: str               # "matrix", "expert", "shared", "head", "adam": train.py maps kinds to optimizers
    init: str = "normal"    # "normal": 0.5/sqrt(D), cut at 3 sigma; "ones"; "zeros"


def table(c):
    """Every weight of the model, one line each: nested dict of Weight. All else is a walk over this table.

    Sharded weights are cast to the compute type and gathered when used (`wake`); the small replicated ones
    (gains, router, head gate) stay in float32. Embedding, router, head gate and gains are "adam".
    "data" splits the last axis but one where sizes allow: the last one, cut to 40 of 5,120, would be padded back
    to 128 lanes in a TPU's memory, 3.2 times its size."""
    V, D, L, N, E, F, Z, U = (c.vocab_size, c.hidden_dim, c.num_layers, c.num_heads, c.num_experts, c.expert_dim,
                              c.shared_dim, c.gated_norm_rank)
    Q, P = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    rows, cols, each = Spec(None, "data", None), Spec(None, None, "data"), Spec(None, "expert", "data", None)
    norm = lambda site: {
        f"{site}_norm_gain_D":  Weight((L, D),       Spec(), "adam", "ones"),
        f"{site}_norm_down_DU": Weight((L, D, U),    rows,   "matrix"),
        f"{site}_norm_up_UD":   Weight((L, U, D),    cols,   "matrix"),
    }
    layers = norm("attn") | norm("mlp") | {
        "query_DQ":       Weight((L, D, Q),    rows,   "matrix"),
        "key_DP":         Weight((L, D, P),    rows,   "matrix"),
        "value_DP":       Weight((L, D, P),    rows,   "matrix"),
        "out_QD":         Weight((L, Q, D),    rows,   "matrix"),
        "head_gate_DN":   Weight((L, D, N),    Spec(), "adam", "zeros"),
    }
    mlp = "shared" if E else "matrix"       # beside routed experts it is clipped with them
    if Z:
        layers |= {
            "shared_gate_DZ": Weight((L, D, Z),    rows,   mlp),
            "shared_up_DZ":   Weight((L, D, Z),    rows,   mlp),
            "shared_down_ZD": Weight((L, Z, D),    rows,   mlp),
        }
    if E:
        layers |= {
            "router_DE":      Weight((L, D, E),    Spec(), "adam"),
            "gate_EDF":       Weight((L, E, D, F), each,   "expert"),
            "up_EDF":         Weight((L, E, D, F), each,   "expert"),
            "down_EFD":       Weight((L, E, F, D), each,   "expert"),
        }
    return {
        "embed_VD":           Weight((V, D), Spec(None, "data"), "adam"),
        "embed_norm_gain_D":  Weight((D,),   Spec(),             "adam", "ones"),
        "embed_norm_down_DU": Weight((D, U), Spec("data", None), "matrix"),
        "embed_norm_up_UD":   Weight((U, D), Spec(None, "data"), "matrix"),
        "layers":             layers,
        "final_norm_gain_D":  Weight((D,),   Spec(),             "adam", "ones"),
        "final_norm_down_DU": Weight((D, U), Spec("data", None), "matrix"),
        "final_norm_up_UD":   Weight((U, D), Spec(None, "data"), "matrix"),
        "head_DV":            Weight((D, V), Spec("data", None), "head"),
    }


def walk(f, c):
    """The table with every Weight w at path p replaced by f(p, w); p is such as "layers/query_DQ"."""
    return jax.tree_util.tree_map_with_path(lambda path, w: f(path_name(path), w), table(c),
                                            is_leaf=lambda x: isinstance(x, Weight))


def path_name(path):
    """The dictionary keys of a pytree path, joined: "layers/query_DQ"."""
    return "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))


class Counts(NamedTuple):
    total: int              # every parameter
    active: int             # what one token uses: all but the experts it was not sent to
    core: int               # active without embedding and head
    flops_per_token: int    # training FLOPs as the budgets count them (no head in an MoE): C = this * tokens
    mfu_flops: int          # the same with the head always counted: what MFU divides by

    @property
    def params(self):
        """Active with the head and without the embedding: N of the scaling fits."""
        return self.core + (self.active - self.core) // 2


def count(c):
    """Parameters and training FLOPs per token of a config, from the weight table.

    FLOPs: 3x the forward pass; attention scores over the full S, not halved for causality and not cut to the
    window (Marin's convention, so that budgets compare); embedding, norms and gates not counted. Executed
    FLOPs differ: windows and causality save, rematerialisation and padding cost."""
    sizes = walk(lambda path, w: (math.prod(w.shape), w.kind), c)
    leaves = jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple))
    total = sum(n for n, _ in leaves)
    routed = sum(n for n, kind in leaves if kind == "expert")
    active = total - routed + (routed * c.experts_per_token // c.num_experts if c.num_experts else 0)
    D, S, N, H, M = c.hidden_dim, c.seq_len, c.num_heads, c.head_dim, c.num_kv_heads
    layer = (6 * D * c.expert_dim * c.experts_per_token + 6 * D * c.shared_dim + 2 * D * H * (N + 2 * M)
             + 2 * N * H * D + 4 * S * N * H + 3 * S * N)
    if c.num_experts > 1:                                       # a single expert needs no router
        layer += 2 * D * c.num_experts
    forward, head = c.num_layers * layer, 2 * D * c.vocab_size
    return Counts(total, active, active - 2 * c.vocab_size * D,
                  3 * (forward + (0 if c.num_experts else head)), 3 * (forward + head))


def init(c, key):
    """Fresh weights, float32. Each weight's key comes from its name: adding one does not change the others."""
    def one(path, w):
        if w.init != "normal":
            return (jnp.ones if w.init == "ones" else jnp.zeros)(w.shape, jnp.float32)
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return jax.random.truncated_normal(own, -3.0, 3.0, w.shape, jnp.float32) * (0.5 * c.hidden_dim**-0.5)
    return walk(one, c)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(w, axis, split, dtype):
    """All-gather of a weight's shares in the compute type; its gradient is summed over devices in float32.

    Plain autodiff would reduce-scatter in the compute type, and bfloat16 sums stop growing at 256 equal terms."""
    return lax.all_gather(w.astype(dtype), axis, axis=split, tiled=True)


LARGE_VOCABULARY = 32_768      # words from which the gradients of embedding and head are summed with care


def share_of_sum(g, axis, split):
    """This device's share along `split` of a weight's gradient, summed over devices in float32.

    The TPU compiler scatters a sum only if it can cut the other axis into pieces and if the split one does not lie
    along the lanes. With 128,256 = 768 x 167 words, and laid out by the loops that made them, the gradients of
    embedding and head are neither: every chip would sum them whole, 10 GB a step and as much memory again
    [measured: LOG.md]. So a large vocabulary is padded, to 131,072, and the split axis made the outer one."""
    g = g.astype(jnp.float32)
    words = g.shape[1 - split] if g.ndim == 2 else 0
    if words <= LARGE_VOCABULARY:
        return lax.psum_scatter(g, axis, scatter_dimension=split, tiled=True)
    g = jnp.pad(g, [(0, 0) if i == split else (0, -words % 4096) for i in range(2)])
    g = with_layout_constraint(g, Layout((split, 1 - split)))
    share = lax.psum_scatter(g, axis, scatter_dimension=split, tiled=True)
    share = lax.optimization_barrier(share)         # libtpu 0.0.42 stops with an error if it may join the slices
    return lax.slice_in_dim(share, 0, words, axis=1 - split)


def pieces_of(words, d, axis):
    """In how many pieces, one after the other, a large vocabulary's gradient is summed: at once it is 2.5 GiB in
    float32, and padded again. No piece below the 40 rows a chip that v4 is known to scatter; a device alone has
    nothing to sum."""
    return 4 if words > LARGE_VOCABULARY and d % 160 == 0 and not alone(axis) else 1


def gather_gradient(axis, split, dtype, _, g):
    d = g.shape[split] // lax.axis_size(axis)
    # split 0: the head. The embedding, cut the other way, has its gradient from lookup
    pieces = pieces_of(g.shape[1], d, axis) if g.ndim == 2 and split == 0 else 1
    if pieces == 1:
        return share_of_sum(g, axis, split),
    g_ = g.reshape(-1, pieces, d // pieces, g.shape[1])
    piece = lambda i: share_of_sum(lax.dynamic_index_in_dim(g_, i, 1, False).reshape(-1, g.shape[1]), axis, 0)
    return lax.map(piece, jnp.arange(pieces)).reshape(d, -1),


gather.defvjp(lambda w, axis, split, dtype: (gather(w, axis, split, dtype), None), gather_gradient)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(w_Vd, tokens_T, axis, dtype):
    """The tokens' rows of the embedding in the compute type, [T,D], from this device's columns of it.

    The gradient sums over every place where a token stands: in float32 from there to the optimizer."""
    return jnp.take(whole(w_Vd, axis, 1, dtype), tokens_T, axis=0)


def lookup_gradient(axis, dtype, saved, g_TD):
    (V, d), tokens_T = saved
    pieces = pieces_of(V, d, axis)
    def piece(g_Td):
        g_VD = jnp.zeros((V, g_Td[0].size), jnp.float32).at[tokens_T].add(g_Td.reshape(len(g_Td), -1))
        return g_VD if alone(axis) else share_of_sum(g_VD, axis, 1)
    g_ = jnp.moveaxis(g_TD.astype(jnp.float32).reshape(len(g_TD), -1, pieces, d // pieces), 2, 0)
    return jnp.moveaxis(lax.map(piece, g_), 0, 1).reshape(V, d), None


lookup.defvjp(lambda w, tokens_T, axis, dtype: (lookup(w, tokens_T, axis, dtype), (w.shape, tokens_T)),
              lookup_gradient)


def whole(w, axis, split, dtype):
    return w.astype(dtype) if alone(axis) else gather(w, axis, split, dtype)


def alone(axis):
    return axis is None or lax.axis_size(axis) == 1


def wake(weights, names, c, axis):
    """FSDP: this device's shares of the named weights, cast to the compute type and gathered whole over `axis`.

    Backward, each device receives the summed gradient of its own share and nothing else. The small weights that
    every device holds whole stay in float32. A stacked weight comes with L already taken off by the scan."""
    def one(name):
        w, spec = weights[name], names[name].spec
        return whole(w, axis, spec.index("data") - (len(spec) - w.ndim), c.compute_dtype) if "data" in spec else w
    return {name: one(name) for name in weights if not isinstance(weights[name], dict)}


# ---------------------------------------------------------------------------------------------- loss, forward

def loss(params, bias_LE, batch, norm, c, axis=None, platform="cpu"):
    """What is minimised, over this device's rows: mean next-token loss + z-losses.

    batch: dict of tokens, targets, segments [B,S] int32 and weights [B,S] float32 (0 where there is nothing to
    predict: padding, and the step across a document border). norm: the weight sum and the count of real tokens
    of the WHOLE batch over all devices and microbatches, so that shares add up to the mean however it is cut.
    Returns (scalar, stats); stats["nll"] is the summed weighted loss in nats, without z-losses."""
    x_TD, routed = forward(params, bias_LE, batch["tokens"], batch["segments"], c, axis, platform)
    awake = wake({"head_DV": params["head_DV"]}, table(c), c, axis)
    nll_T, lse_T = kernels.cross_entropy(x_TD, awake["head_DV"], batch["targets"].reshape(-1), platform=platform)
    weight_T = batch["weights"].reshape(-1)
    nll = jnp.sum(weight_T * nll_T)
    objective = (nll + c.logit_z * jnp.sum(weight_T * lse_T**2)) / norm["weight"]
    if c.num_experts:
        real_T = (batch["segments"].reshape(-1) != 0).astype(jnp.float32)
        objective += c.router_z * jnp.mean(jnp.sum(routed["z_LT"] * real_T, axis=1)) / norm["tokens"]
    return objective, {"nll": nll, "nll_T": nll_T, **routed}


def counting(platform):
    """How balance.qth_largest counts there: (function, bits decided a round). A TPU's kernel reads the scores once
    a round, so it decides more bits a round; on a CPU every comparison costs."""
    return partial(kernels.count_reaching, platform=platform), 4 if platform == "tpu" else 1


def logits(params, bias_LE, tokens_BS, segment_BS, c, at=slice(None), platform="cpu"):
    """Float32 logits [T,V] of every position, or of position `at`: for sampling and tests, on one device."""
    x_TD, _ = forward(params, bias_LE, tokens_BS, segment_BS, c, platform=platform)
    return jnp.dot(x_TD[at], params["head_DV"].astype(c.compute_dtype), preferred_element_type=jnp.float32)


def forward(params, bias_LE, tokens_BS, segment_BS, c, axis=None, platform="cpu"):
    """Tokens to the last hidden state, normalised and ready for the head: [B,S] -> ([T,D], routing record).

    The record holds, for every layer, margin_LTE and load_LE (what balancing reads) and z_LT; empty if dense.
    Layers are stacked and scanned, PERIOD at a time, so that local and full attention are different static
    programs and neither pays for the other; a remainder (6 layers = 4 + 2) is unrolled at the end."""
    top = wake({k: params[k] for k in params if k not in ("embed_VD", "head_DV")}, table(c), c, axis)
    x_TD = lookup(params["embed_VD"], tokens_BS.reshape(-1), axis, c.compute_dtype)
    x_TD = gated_norm(x_TD, top["embed_norm_gain_D"], top["embed_norm_down_DU"], top["embed_norm_up_UD"])
    rotation = rope_angles(c)

    def layer(x_TD, p, bias_E, i):
        run = lambda x_TD, p, bias_E: block(x_TD, p, bias_E, segment_BS, rotation, c, axis, platform,
                                            full=sees_all(c, i))
        return (jax.checkpoint(run) if c.remat == "block" else run)(x_TD, p, bias_E)

    def period(x_TD, stacked):
        records = []
        for i in range(PERIOD):
            x_TD, record = layer(x_TD, *jax.tree.map(lambda w: w[i], stacked), i)
            records.append(record)
        return x_TD, jax.tree.map(lambda *r: jnp.stack(r), *records)

    stacked, whole = (params["layers"], bias_LE), c.num_layers // PERIOD
    records = []
    if whole:
        folded = jax.tree.map(lambda w: w[:whole * PERIOD].reshape(whole, PERIOD, *w.shape[1:]), stacked)
        x_TD, record = lax.scan(period, x_TD, folded)
        records.append(jax.tree.map(lambda r: r.reshape(whole * PERIOD, *r.shape[2:]), record))
    for i in range(whole * PERIOD, c.num_layers):
        x_TD, record = layer(x_TD, *jax.tree.map(lambda w: w[i], stacked), i)
        records.append(jax.tree.map(lambda r: r[None], record))
    x_TD = gated_norm(x_TD, top["final_norm_gain_D"], top["final_norm_down_DU"], top["final_norm_up_UD"])
    return x_TD, jax.tree.map(lambda *r: jnp.concatenate(r), *records)


def sees_all(c, i):
    """Whether layer i attends to the whole sequence: every fourth does; in V2 so does the last.
    [cited: marin #4697; for V2 #4976]"""
    return i % PERIOD == PERIOD - 1 or c.last_layer_full and i == c.num_layers - 1


def block(x_TD, p, bias_E, segment_BS, rotation, c, axis, platform, full):
    """One layer: attention, then shared expert and routed experts side by side on the same normed input."""
    p = wake(p, table(c)["layers"], c, axis)
    with jax.named_scope("attention"):
        a_TD = gated_norm(x_TD, p["attn_norm_gain_D"], p["attn_norm_down_DU"], p["attn_norm_up_UD"])
        x_TD = x_TD + attend(a_TD, p, segment_BS, rotation, c, platform, full)
    with jax.named_scope("mlp"):
        m_TD = gated_norm(x_TD, p["mlp_norm_gain_D"], p["mlp_norm_down_DU"], p["mlp_norm_up_UD"])
        record = {}
        if c.shared_dim:
            h_TZ = jax.nn.silu(m_TD @ p["shared_gate_DZ"]) * (m_TD @ p["shared_up_DZ"])
            x_TD = x_TD + h_TZ @ p["shared_down_ZD"]
        if c.num_experts:
            routing = (m_TD, p, bias_E, c.experts_per_token, c.combine_sum)
            if axis is None:
                y_TD, r, load_E = moe.moe(*routing, platform, balancer=c.balancer)
                dropped = jnp.int32(0)
            else:
                y_TD, r, load_E, dropped = moe.parallel_moe(*routing, "expert", c.exchange, c.capacity_factor,
                                                            platform, c.balancer)
            x_TD = x_TD + y_TD
            record = {"margin_LTE": r.margin_TE, "load_LE": load_E, "z_LT": r.z_T, "dropped_L": dropped}
            if c.balancer.startswith("aux"):
                record["prob_LTE"] = r.prob_TE
    return x_TD, record


def attend(a_TD, p, segment_BS, rotation, c, platform, full):
    """Grouped-query attention with QK-norm, RoPE, exclusive self-attention and a gate per head."""
    B, S = segment_BS.shape
    N, M, H = c.num_heads, c.num_kv_heads, c.head_dim
    q_BSNH = (a_TD @ p["query_DQ"]).reshape(B, S, N, H)
    k_BSMH = (a_TD @ p["key_DP"]).reshape(B, S, M, H)
    v_BSMH = (a_TD @ p["value_DP"]).reshape(B, S, M, H)
    if c.partial_key_offset and full:
        k_BSMH = key_offset(k_BSMH, segment_BS)
    q_BSNH = rope(rms(q_BSNH, 1e-6), rotation) * c.qk_scale
    k_BSMH = rope(rms(k_BSMH, 1e-6), rotation)
    y_BSNH = kernels.attention(q_BSNH, k_BSMH, v_BSMH, segment_BS, S if full else c.local_window,
                               platform=platform)

    # Exclusive self-attention: remove from each head's output its part along the token's own value vector;
    # what a token is, the residual stream already carries. In float32, and as einsums: the same lines with
    # broadcasting and jnp.sum are 10 times slower on CPU, forward and backward [measured].
    y, v = y_BSNH.reshape(-1, M, N // M, H).astype(jnp.float32), v_BSMH.reshape(-1, M, H).astype(jnp.float32)
    unit = v / (jnp.einsum("TMH,TMH->TM", v, v)[:, :, None] + 1e-6)
    y = y - jnp.einsum("TMG,TMH->TMGH", jnp.einsum("TMGH,TMH->TMG", y, v), unit)
    gate_TN = 2 * jax.nn.sigmoid(a_TD.astype(jnp.float32) @ p["head_gate_DN"])       # starts at 1: zeros init
    y_TNH = y.reshape(-1, N, H) * gate_TN[:, :, None]
    return y_TNH.reshape(-1, N * H).astype(a_TD.dtype) @ p["out_QD"]


# ----------------------------------------------------------------------------------------- the small functions

def rms(x, eps, gain=1.0):
    """gain * x over its root mean square along the last axis. In float32 until the result is cast to x's type:
    the recipe multiplies by the gain before it rounds."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps) * gain).astype(x.dtype)


def gated_norm(x_TD, gain_D, down_DU, up_UD):
    """RMSNorm with a gain, then a learned gate on every channel: n * sigmoid(silu(n down) up).
    [arXiv 2601.22966; eps 1e-5 as the run had it]"""
    n_TD = rms(x_TD, 1e-5, gain_D)
    return n_TD * jax.nn.sigmoid(jax.nn.silu(n_TD @ down_DU) @ up_UD)


def rope_angles(c):
    """Cosine and signed sine of each position's rotation, for both halves of what is rotated: [S,2,rotated/2]."""
    rotated = c.head_dim // 2 if c.half_rope else c.head_dim
    speed = c.rope_theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angle = jnp.arange(c.seq_len, dtype=jnp.float32)[:, None] * speed[None, :]
    return jnp.stack([jnp.cos(angle)] * 2, axis=1), jnp.stack([-jnp.sin(angle), jnp.sin(angle)], axis=1)


def rope(x_BSNH, rotation):
    """Rotate dimension i with dimension i + rotated/2; dimensions past `rotated` are left alone (half-RoPE).

    The two halves are an axis of length 2 that is turned round: taking them apart and concatenating them again
    costs 3 times as much on a CPU, forward and backward [measured]."""
    cos, sin = (r[None, :x_BSNH.shape[1], None] for r in rotation)                      # float32, and so is `pair`
    rotated = 2 * cos.shape[-1]
    pair = x_BSNH[..., :rotated].astype(jnp.float32).reshape(*x_BSNH.shape[:-1], 2, -1)
    turned = (pair * cos + pair[..., ::-1, :] * sin).reshape(*x_BSNH.shape[:-1], rotated).astype(x_BSNH.dtype)
    return turned if rotated == x_BSNH.shape[-1] else jnp.concatenate([turned, x_BSNH[..., rotated:]], axis=-1)


def key_offset(k_BSMH, segment_BS):
    """Partial key offset: the half of each key that RoPE leaves alone is taken from the token before, so that a
    single layer can look for "what came after this token". Zero at the start of a document, where the token
    before belongs to somebody else."""
    half = k_BSMH.shape[-1] // 2
    before = jnp.pad(k_BSMH[:, :-1, :, half:], ((0, 0), (1, 0), (0, 0), (0, 0)))
    same = segment_BS == jnp.pad(segment_BS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.concatenate([k_BSMH[..., :half], jnp.where(same[:, :, None, None], before, 0)], axis=-1)
