"""The recipe in PyTorch: a second witness for every number, and a rival for our speed on a CPU.

Needs torch.

    pip install torch==2.13.0
    python tests/peer_torch.py                                largest deviations, then the speeds
    python tests/peer_torch.py configs/smoke.py --rounds=20   the speed of one config only

Written from the recipe (marin #4697, for V2 #4976 and #5951) for eager PyTorch on a CPU, not from
model.py, of which it takes the names of the weights. It has both models, both fits of the rates,
and V1's optimizer. Nothing in it is slow on purpose: experts run as a loop over sorted slices, or
in torch._grouped_mm if that is quicker here, attention in the fused kernel, the optimizer on lists
of tensors.

B batch  S sequence  T tokens  D hidden  N query heads  M key/value heads  G=N/M  H head dim
E experts  K experts per token  V vocabulary  L layers."""
import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import balance  # noqa: E402
import data  # noqa: E402
import kernels  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402


# ------------------------------------------------------------------------------------------ weights

def from_numpy(weights):
    """model.py's tree as torch leaves; the stacked layers become a list of dicts."""
    leaf = lambda w: torch.tensor(np.asarray(w), requires_grad=True)
    top = {name: leaf(w) for name, w in weights.items() if name != "layers"}
    L = len(next(iter(weights["layers"].values())))
    layers = [{name: leaf(w[i]) for name, w in weights["layers"].items()} for i in range(L)]
    return top | {"layers": layers}


def to_numpy(weights, what=lambda w: w):
    """The inverse, of `what` of every leaf (itself, its gradient)."""
    array = lambda w: what(w).detach().numpy().copy()
    layers = weights["layers"]
    return {name: array(w) for name, w in weights.items() if name != "layers"} | {
        "layers": {name: np.stack([array(p[name]) for p in layers]) for name in layers[0]}}


def from_public(folder):
    """(config, weights, bias_LE) of a directory in Marin's public schema, read by the names that
    snowball.py gives (#7227) and with torch's own reader: no line of configs/convert.py."""
    from safetensors.torch import load_file
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    said = json.loads(Path(folder, "config.json").read_text())
    c = model.ModelConfig(
        vocab_size=said["vocab_size"], seq_len=said["max_position_embeddings"],
        hidden_dim=said["hidden_size"], num_layers=said["num_hidden_layers"],
        num_heads=said["num_attention_heads"], num_kv_heads=said["num_key_value_heads"],
        head_dim=said["head_dim"], shared_dim=said["shared_expert_intermediate_size"],
        num_experts=said["num_experts"], experts_per_token=said["num_experts_per_tok"],
        expert_dim=said["moe_intermediate_size"], window=said["sliding_window"],
        qk_scale=said["qk_mult"], rope_theta=said["rope_theta"], half_rope=True, nope_on_full=True,
        last_layer_full=True, combine_sum=2.5, router_z=0.0)
    matrix = lambda name: found.pop(f"{name}.weight").mT
    def norm(site, gain, gate):
        return {f"{site}_norm_gain_D": found.pop(f"{gain}.weight"),
                f"{site}_norm_down_DU": matrix(f"{gate}.down_proj"),
                f"{site}_norm_up_UD": matrix(f"{gate}.up_proj")}
    layers = []
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        layers.append(
            norm("attn", f"{at}input_layernorm", f"{at}attn_gated_norm")
            | norm("mlp", f"{at}post_attention_layernorm", f"{at}mlp_gated_norm")
            | {ours: matrix(at + theirs) for ours, theirs in {
                "query_DQ": "self_attn.q_proj", "key_DP": "self_attn.k_proj",
                "value_DP": "self_attn.v_proj", "out_QD": "self_attn.o_proj",
                "head_gate_DN": "self_attn.attn_gate", "router_DE": "mlp.router",
                "gate_EDF": "mlp.experts.gate_proj", "up_EDF": "mlp.experts.up_proj",
                "down_EFD": "mlp.experts.down_proj", "shared_gate_DZ": "shared_expert.gate_proj",
                "shared_up_DZ": "shared_expert.up_proj",
                "shared_down_ZD": "shared_expert.down_proj"}.items()})
    w = (norm("embed", "model.embed_norm", "model.embed_gated_norm")
         | norm("final", "model.norm", "model.final_gated_norm")
         | {"embed_VD": found.pop("model.embed_tokens.weight"), "head_DV": matrix("lm_head"),
            "layers": layers})
    bias_LE = torch.stack([found.pop(f"model.layers.{i}.mlp.router.bias")
                           for i in range(c.num_layers)])
    assert not found, sorted(found)
    return c, w, bias_LE


@torch.no_grad()
def greedy(w, bias_LE, c, prompt, n):
    """The prompt's n likeliest next tokens, one after another, each from the whole text anew."""
    tokens = [*prompt]
    for _ in range(n):
        row = dataclasses.replace(c, seq_len=len(tokens), window=c.window or c.seq_len // 2)
        batch = {"tokens": torch.tensor([tokens]), "segments": torch.ones(1, len(tokens), dtype=int)}
        tokens.append(int(forward(w, bias_LE, batch, row)[0][-1].argmax()))
    return tokens[len(prompt):]


# ------------------------------------------------------------------------------------------ forward

def gated_norm(x_TD, w, site):
    n_TD = F.rms_norm(x_TD, x_TD.shape[-1:], w[f"{site}_norm_gain_D"], 1e-5)
    return n_TD * torch.sigmoid(F.silu(n_TD @ w[f"{site}_norm_down_DU"]) @ w[f"{site}_norm_up_UD"])


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate) * (x @ up)) @ down


def rope(x_BNSH, cos_SH, sin_SH):
    """cos and sin of each half are there twice; the sine's first half is negative. V2: they cover
    half of a head."""
    rotated = cos_SH.shape[-1]
    if rotated < x_BNSH.shape[-1]:
        turned = rope(x_BNSH[..., :rotated], cos_SH, sin_SH)
        return torch.cat((turned, x_BNSH[..., rotated:]), dim=-1)
    a, b = x_BNSH.chunk(2, dim=-1)
    return torch.addcmul(x_BNSH * cos_SH, torch.cat((b, a), dim=-1), sin_SH)


def key_offset(k_BSMH, segment_BS):
    """V2: the second half of a key is that of the token before, or zero where a document begins."""
    own, other = k_BSMH.chunk(2, dim=-1)
    before = torch.zeros_like(other)
    before[:, 1:] = other[:, :-1] * (segment_BS[:, 1:] == segment_BS[:, :-1])[:, :, None, None]
    return torch.cat((own, before), dim=-1)


def attention(a_TD, p, masks, segment_BS, rotation, full, c):
    """masks: additive [B,1,S,S], 0 where a query sees a key; one for full layers (True), one for
    window layers."""
    N, M, H = c.num_heads, c.num_kv_heads, c.head_dim
    heads = lambda name, n: (a_TD @ p[name]).view(-1, c.seq_len, n, H)
    k_BSMH, v_BSMH = heads("key_DP", M), heads("value_DP", M)
    if c.partial_key_offset and full:
        k_BSMH = key_offset(k_BSMH, segment_BS)
    turn = (lambda x_BNSH: x_BNSH) if full and c.nope_on_full else lambda x: rope(x, *rotation)
    qk_norm = lambda x_BSNH: turn(F.rms_norm(x_BSNH, (H,), eps=1e-6).transpose(1, 2))
    q_BNSH, k_BMSH = qk_norm(heads("query_DQ", N)) * c.qk_scale, qk_norm(k_BSMH)
    y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BMSH, v_BSMH.transpose(1, 2),
                                            attn_mask=masks[full], enable_gqa=N != M)
    y, v = y_BNSH.transpose(1, 2).reshape(-1, M, N // M, H), v_BSMH.reshape(-1, M, 1, H)
    # exclusive self-attention: y - (y.v) v / (v.v + 1e-6), then one gate per head, which is 1 when
    # its weights are 0
    y = y - (y * v).sum(-1, keepdim=True) * (v / ((v * v).sum(-1, keepdim=True) + 1e-6))
    gate_TN = 2 * torch.sigmoid(a_TD @ p["head_gate_DN"])
    return (y.reshape(-1, N, H) * gate_TN[:, :, None]).reshape(-1, N * H) @ p["out_QD"]


def experts_loop(x_RD, p, load):
    experts = zip(x_RD.split(load.tolist()), p["gate_EDF"], p["up_EDF"], p["down_EFD"])
    return torch.cat([swiglu(*expert) for expert in experts])


def experts_grouped(x_RD, p, load):
    ends = torch.cumsum(load, 0, dtype=torch.int32)
    gate = torch._grouped_mm(x_RD, p["gate_EDF"], ends)
    h = F.silu(gate) * torch._grouped_mm(x_RD, p["up_EDF"], ends)
    return torch._grouped_mm(h, p["down_EFD"], ends)


def moe(x_TD, p, bias_E, c, experts):
    """Returns what the experts add, the router logits and the margins that balancing reads."""
    K, E = c.experts_per_token, c.num_experts
    score_TE = x_TD @ p["router_DE"]
    with torch.no_grad():
        value_TK1, expert_TK1 = torch.topk(score_TE + bias_E, K + 1)
        expert_TK, margin_TE = expert_TK1[:, :K], score_TE - value_TK1[:, K:]
        flat = expert_TK.reshape(-1)
        order_A = torch.argsort(flat)
        token_A, load_E = order_A // K, torch.bincount(flat, minlength=E)
    weight_TK = torch.sigmoid(score_TE.gather(1, expert_TK))
    if c.combine_sum:
        weight_TK = weight_TK * (c.combine_sum / weight_TK.sum(dim=1, keepdim=True))
    y_AD = experts(x_TD[token_A], p, load_E) * weight_TK.reshape(-1)[order_A][:, None]
    return torch.zeros_like(x_TD).index_add(0, token_A, y_AD), score_TE, margin_TE


def forward(w, bias_LE, batch, c, experts=experts_loop):
    """(logits [T,V], router logits per layer, margins per layer)."""
    S, H = c.seq_len, c.head_dim
    segment_BS, position = batch["segments"], torch.arange(S)
    distance, masks = position[:, None] - position[None, :], {}
    full = [i % 4 == 3 or (c.last_layer_full and i == c.num_layers - 1)
            for i in range(c.num_layers)]
    for kind in set(full):
        near = distance < (S if kind else c.window or S // 2)
        seen = (distance >= 0) & near & (segment_BS[:, :, None] == segment_BS[:, None, :])
        masks[kind] = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)[:, None]
    rotated = H // 2 if c.half_rope else H
    angle = position[:, None] * c.rope_theta ** (-torch.arange(0, rotated, 2) / rotated)
    rotation = angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)

    x_TD = gated_norm(F.embedding(batch["tokens"].reshape(-1), w["embed_VD"]), w, "embed")
    scores, margins = [], []
    for i, p in enumerate(w["layers"]):
        a_TD = gated_norm(x_TD, p, "attn")
        x_TD = x_TD + attention(a_TD, p, masks, segment_BS, rotation, full[i], c)
        m_TD = gated_norm(x_TD, p, "mlp")
        x_TD = x_TD + swiglu(m_TD, p["shared_gate_DZ"], p["shared_up_DZ"], p["shared_down_ZD"])
        if c.num_experts:
            y_TD, score_TE, margin_TE = moe(m_TD, p, bias_LE[i], c, experts)
            x_TD = x_TD + y_TD
            scores.append(score_TE)
            margins.append(margin_TE)
    return gated_norm(x_TD, w, "final") @ w["head_DV"], scores, margins


def objective(logits_TV, scores, batch, c):
    """Mean next-token loss, and the z-losses: final logits over scored tokens, router over real
    ones."""
    weight_T, real_T = batch["weights"].reshape(-1), (batch["segments"] != 0).reshape(-1)
    lse_T = torch.logsumexp(logits_TV, dim=-1)
    nll_T = lse_T - logits_TV.gather(1, batch["targets"].reshape(-1, 1)).squeeze(1)
    total = (weight_T * (nll_T + c.logit_z * lse_T**2)).sum() / weight_T.sum()
    for score_TE in scores:
        z_T = torch.logsumexp(score_TE, dim=-1) ** 2
        total = total + c.router_z / c.num_layers * (z_T * real_T).sum() / real_T.sum()
    return total


@torch.no_grad()
def next_bias(margins, batch, c):
    """Each expert's q-th largest margin over real tokens, negated and centered."""
    real_T = (batch["segments"] != 0).reshape(-1)
    margin_LET = torch.stack(margins)[:, real_T].transpose(1, 2).contiguous()
    n = margin_LET.shape[-1]
    q = max(1, n * c.experts_per_token // c.num_experts)
    beta_LE = margin_LET.kthvalue(n - q + 1).values
    return beta_LE.mean(dim=1, keepdim=True) - beta_LE


# ---------------------------------------------------------------------------------- AdamH and Adam

class Rates(NamedTuple):
    adam_lr: float
    matrix_lr: float
    beta2: float
    eps: float


def rates(c, t):
    """Peak rates, beta2 and epsilon from the size of the run (V1: #4225, V2: #5951), or as the
    config sets them."""
    batch = t.batch_size * c.seq_len
    tokens, sequences = t.steps * batch, batch / 4096
    if t.recipe == "v1":
        adam = 1.63 * tokens**-0.2813 * c.hidden_dim**-0.3678 * sequences**0.5
        eps = 1e-15 * (32 * tokens / (sequences * 1.4e9)) ** 0.5
    else:
        adam = 0.06602 * tokens**-0.395 * c.hidden_dim**-0.150 * batch**0.5
        eps = 9.676e-18 * (tokens / batch) ** 0.5
    matrix = min(13 / 3 * adam, 0.05) * t.lr_scale
    adam = min(adam, 0.05) * t.lr_scale * t.adam_lr_scale
    beta2 = min(max(0.999 ** (sequences / 32), 0.95), 0.9999)
    return Rates(t.adam_lr or adam, t.matrix_lr or matrix, t.beta2 or beta2, t.eps or eps)


def lr_multiplier(t, before):
    """The linear schedule: the rate over its peak, for the step that follows `before` others."""
    warm = int(t.warmup * t.steps)
    return float(np.interp(before, [0, warm, t.steps], [0, 1, t.min_lr_ratio])) if warm else (
        1 - (1 - t.min_lr_ratio) * before / t.steps)


class Optimizer:
    """Adam for embedding, router, head gates and gains; Adam's direction on the hypersphere for
    every matrix.

    The gradient of each group is clipped to norm `clip`: Adam's weights, the experts (routed and
    shared), and the other matrices, to which a dense model's MLP belongs."""

    def __init__(self, w, r, t):
        self.r, self.t, self.steps = r, t, 0
        self.groups = {"adam": [], "matrix": [], "expert": []}
        for names in (w, *w["layers"]):
            for name, leaf in names.items():
                if name == "layers":
                    continue
                expert = "router_DE" in names and (leaf.ndim == 3 or name.startswith("shared_"))
                group = "expert" if expert else "matrix"
                if name in ("embed_VD", "router_DE", "head_gate_DN") or leaf.ndim == 1:
                    group = "adam"
                self.groups[group].append(leaf)
        self.moments = {group: [[torch.zeros_like(w) for w in ws] for _ in "mv"]
                        for group, ws in self.groups.items()}

    @torch.no_grad()
    def step(self, multiplier):
        self.steps += 1
        for group, ws in self.groups.items():
            if not ws:
                continue
            gs, (m, v) = [w.grad for w in ws], self.moments[group]
            if self.t.clip:
                norm = torch.stack(torch._foreach_norm(gs)).norm()
                torch._foreach_mul_(gs, torch.clamp(self.t.clip / norm, max=1.0))
            torch._foreach_lerp_(m, gs, 1 - self.t.beta1)
            torch._foreach_mul_(v, self.r.beta2)
            torch._foreach_addcmul_(v, gs, gs, 1 - self.r.beta2)
            u = torch._foreach_div(v, 1 - self.r.beta2**self.steps)
            torch._foreach_sqrt_(u)
            torch._foreach_add_(u, self.r.eps)
            torch._foreach_reciprocal_(u)
            torch._foreach_mul_(u, m)
            torch._foreach_div_(u, 1 - self.t.beta1**self.steps)
            if group == "adam":
                torch._foreach_add_(ws, u, alpha=-self.r.adam_lr * multiplier)
                continue
            length = lambda x: torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
            for w, u in zip(ws, u):
                radius = length(w)
                scale = radius / length(u).clamp(min=1e-10)
                w.addcmul_(u, scale, value=-self.r.matrix_lr * multiplier)
                w.mul_(radius / length(w).clamp(min=1e-10))


class Trainer:
    """Weights, optimizer and balancing bias; step(batch) is one training step. compiled: forward and
    backward by torch.compile (inductor, which needs a C++ compiler); the optimizer stays eager."""

    def __init__(self, c, t, weights, experts=experts_loop, compiled=False):
        self.c, self.t, self.experts = c, t, experts
        self.forward = torch.compile(forward) if compiled else forward
        self.w = from_numpy(weights)
        self.optimizer = Optimizer(self.w, rates(c, t), t)
        self.bias_LE = torch.zeros(c.num_layers, c.num_experts)

    def gradients(self, batch):
        """Fills the .grad of every weight; returns loss, logits and the next bias."""
        for w in sum(self.optimizer.groups.values(), []):
            w.grad = None
        logits_TV, scores, margins = self.forward(self.w, self.bias_LE, batch, self.c, self.experts)
        loss = objective(logits_TV, scores, batch, self.c)
        loss.backward()
        bias_LE = next_bias(margins, batch, self.c) if margins else self.bias_LE
        return loss.detach(), logits_TV, bias_LE

    def step(self, batch):
        loss, _, self.bias_LE = self.gradients(batch)
        self.optimizer.step(lr_multiplier(self.t, self.optimizer.steps))
        return loss


# ----------------------------------------------------------------------------------- the comparison

TINY = dict(vocab_size=61, seq_len=24, hidden_dim=16, num_layers=5, num_heads=4, num_kv_heads=2,
            head_dim=8, shared_dim=24, num_experts=8, experts_per_token=2, expert_dim=12,
            gated_norm_rank=4)
SHAPES = {      # sizes that differ from TINY's
    "five layers": {},
    "one expert per token": dict(num_experts=6, experts_per_token=1, num_heads=3, num_kv_heads=3,
                                 num_layers=2, head_dim=6, window=5),
    "half of the experts": dict(num_experts=10, experts_per_token=5, num_heads=8, num_kv_heads=2,
                                num_layers=4, hidden_dim=20, seq_len=33),
    "V2's model": dict(half_rope=True, last_layer_full=True, partial_key_offset=True,
                       combine_sum=2.5, router_z=0.0),
    "the published 67B's model": dict(half_rope=True, last_layer_full=True, nope_on_full=True,
                                      combine_sum=2.5, router_z=0.0, qk_scale=1.5703),
    "dense": dict(num_experts=0, experts_per_token=0, expert_dim=0, num_layers=2)}


def problem(c, rows, seed, padding=True):
    """Weights that leave no term idle, a bias, and rows of documents that end in padding: all
    numpy."""
    rng = np.random.default_rng(seed)
    w = model.map_params(
        lambda path, w: rng.normal(w.init == "ones", 0.25, w.shape).astype(np.float32), c)
    bias_LE = rng.normal(0, 0.2, (c.num_layers, c.num_experts)).astype(np.float32)
    tokens = rng.integers(0, c.vocab_size, (rows, c.seq_len + 1))
    segments = 1 + np.cumsum(rng.random((rows, c.seq_len)) < 0.1, axis=1)
    if padding:
        segments[np.arange(c.seq_len) >= c.seq_len - rng.integers(0, 6, (rows, 1))] = 0
    inside = np.pad(segments[:, 1:], ((0, 0), (0, 1))) == segments      # the last has no next one
    return w, bias_LE, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments,
                        "weights": (inside & (segments != 0)).astype(np.float32)}


def to_torch(batch):
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in batch.items()}


def deviations(c, seed=0, rows=3, steps=4, given=None):
    """{quantity: largest difference over largest value} between the peer and us, from the same
    weights in float32.

    Quantities: logits, loss, the gradient of every weight, the next balancing bias; the rates; and
    every weight after `steps` steps of the optimizer, as the share of what the steps moved. given:
    the config that model.py gets, if not c."""
    # at the heuristic's beta2, 0.9999, the bias correction 1 - beta2 is good to 1e-4 in float32
    t = train.TrainConfig(mixture=(("none", 1.0),), tokenizer="bytes", steps=20, batch_size=rows,
                          clip=0.3, beta2=0.95, recipe="v2" if c.last_layer_full else "v1")
    theirs, c = c, given or c
    w, bias_LE, batch = problem(c, rows, seed)
    peer = Trainer(theirs, t, w)
    peer.bias_LE = torch.from_numpy(bias_LE)
    rows_of = jax.tree.map(jax.numpy.asarray, batch)
    real = rows_of["segments"] != 0
    totals = {"weight": rows_of["weights"].sum(), "tokens": real.sum().astype(np.float32)}

    def objective(w):
        return model.loss(w, bias_LE, rows_of, totals, c)
    ours = jax.jit(jax.value_and_grad(objective, has_aux=True))
    optimizer = train.make_optimizer(c, t)
    update = jax.jit(optimizer.update)

    def far(a, b):
        apart = np.max(np.abs(np.asarray(a) - np.asarray(b)))
        return float(apart / max(np.max(np.abs(a)), 1e-30))

    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {"/".join(key.key for key in path): x for path, x in leaves}

    (loss, (_, stats)), grads = ours(w)
    peer_loss, peer_logits, peer_bias = peer.gradients(to_torch(batch))
    logits = jax.jit(
        lambda w: model.logits(w, bias_LE, rows_of["tokens"], rows_of["segments"], c))(w)
    found = {"logits": far(logits, peer_logits.detach()), "loss": far(loss, peer_loss)}
    peer_grads = flat(to_numpy(peer.w, lambda w: w.grad))
    found |= {f"gradient of {name}": far(g, peer_grads[name]) for name, g in flat(grads).items()}
    if c.num_experts:
        bias, _ = balance.update(c.balancer, stats.margin_TE, real.reshape(-1), bias_LE,
                                 c.experts_per_token)
        found["next bias"] = far(bias, peer_bias)
    found["rates"] = max(far(a, b) for a, b in zip(train.rates(c, t), peer.optimizer.r))
    opt, now, rng = optimizer.init(w), w, np.random.default_rng(seed)
    for _ in range(steps):
        peer.gradients(to_torch(batch))
        # Both get the same gradients, so that no sign near 0 is at stake. Their sizes differ from
        # step to step, or else nothing would show which weights are clipped together: AdamH takes
        # only a gradient's direction.
        size = {name: 10 ** rng.uniform(-2, 1) for name in (*w, *w["layers"])}
        for weights in (peer.w, *peer.w["layers"]):
            for name, weight in weights.items():
                if name != "layers":
                    weight.grad *= size[name]
        updates, opt = update(to_numpy(peer.w, lambda w: w.grad), opt, now)
        now = jax.tree.map(np.add, now, updates)
        peer.optimizer.step(lr_multiplier(t, peer.optimizer.steps))
    moved = flat(to_numpy(peer.w))
    found |= {f"step of {name}": far(x - flat(w)[name], moved[name] - flat(w)[name])
              for name, x in flat(now).items()}
    return found


def our_step(c, t, batch):
    """A function that takes one of our training steps, on all devices that train.py would use."""
    mesh = train.make_mesh(c, t)
    shardings = train.state_shardings(c, t, mesh)
    make = jax.jit(lambda: train.make_state(c, t, jax.random.key(0)), out_shardings=shardings)
    state, step = make(), train.make_train_step(c, t, mesh)
    integers = (batch[name].astype(np.int32) for name in ("tokens", "targets", "segments"))
    rows = data.Batch(*integers, batch["weights"])

    def run():
        nonlocal state
        state, metrics = step(state, train.to_global_batch(rows, mesh, t.accumulate))
        return metrics["loss"]
    return run


def work(run):
    """Be a runner: for every line on standard input, take so many steps and answer with the seconds
    of one."""
    for _ in range(3):
        float(run())                                            # compiles, and fills the caches
    kernels.fill_holes()                                        # as train.py after its first step
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            last = run()
        float(last)                                             # waits for our devices
        print((time.perf_counter() - start) / int(line), flush=True)


def race(commands, rounds, steps):
    """{name: seconds of one step}, the best of `rounds`. Each command is a process that calls
    `work`. They take turns and sleep meanwhile: in one process the threads and the memory of one
    library slow down the other."""
    runners = {name: subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for name, words in commands.items()}
    for runner in runners.values():
        while runner.stdout.readline().strip() != "ready":
            if runner.poll() is not None:
                sys.exit(f"a runner ended with {runner.returncode}")
    best = dict.fromkeys(runners, math.inf)
    for _ in range(rounds):
        for name, runner in runners.items():
            print(steps, file=runner.stdin, flush=True)
            best[name] = min(best[name], float(runner.stdout.readline()))
    for runner in runners.values():
        runner.stdin.close()
        runner.wait()
    return best


def speed(paths, rounds):
    print(f"whole training step, random tokens; best of {rounds} rounds of 10 steps, in turns, "
          f"a process each; jax {jax.__version__}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    print(f"{'config':20s} {'tokens':>7s} {'ours ms':>8s} {'torch loop':>11s} {'grouped':>8s} {'compiled':>9s}   "
          "ours over the faster eager torch, over the compiled one")
    for path in paths:
        c, t = train.load_config(path)
        names = ["ours", "loop", "compiled"] + (["grouped"] if c.num_experts else [])
        commands = {name: [Path(__file__), path, f"--runner={name}"] for name in names}
        ms = {name: 1e3 * s for name, s in race(commands, rounds, steps=10).items()}
        tokens, fastest = t.batch_size * c.seq_len, min(ms["loop"], ms.get("grouped", math.inf))
        print(f"{path:20s} {tokens:7,} {ms['ours']:8.1f} {ms['loop']:11.1f} "
              f"{ms.get('grouped', math.nan):8.1f} {ms['compiled']:9.1f}   {fastest / ms['ours']:.2f} x and "
              f"{ms['compiled'] / ms['ours']:.2f} x its tokens per second ({tokens / ms['ours']:.1f} ktok/s)", flush=True)


def runner(name, path):
    """What takes a step of a config: "ours", or the peer with experts as "loop" or "grouped"; or "compiled": by
    torch.compile, but for the experts' products, as grouped_mm (torch 2.13 cannot compile them for a CPU)."""
    c, t = train.load_config(path)
    _, _, batch = problem(c, t.batch_size, 0, padding=False)
    w = jax.tree.map(np.asarray, model.init(c, jax.random.key(0))) if name != "ours" else None
    if name == "ours":
        return our_step(c, t, batch)
    experts = {"loop": experts_loop, "grouped": experts_grouped, "compiled": torch.compiler.disable(experts_grouped)}
    peer = Trainer(c, t, w, experts[name], name == "compiled")
    rows = to_torch(batch)
    return lambda: peer.step(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*",
                        help="whose speed is compared; smoke and laptop by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runner", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # before torch's threads have arenas of their own; torch gains from it as we do
    kernels.keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if options.runner:
        return work(runner(options.runner, options.configs[0]))
    if not options.configs:
        print("largest deviation, over the largest value (float32)")
        for name, sizes in SHAPES.items():
            found = deviations(model.ModelConfig(**TINY | sizes))
            worst = []
            for kind in ("logits", "loss", "next bias", "gradient", "rates", "step"):
                errors = [error for k, error in found.items() if k.startswith(kind)]
                worst.append(f"{kind} {max(errors, default=math.nan):.0e}")
            print(f"{name:24s}" + "  ".join(worst), flush=True)
    speed(options.configs or ["configs/smoke.py", "configs/laptop.py"], options.rounds)


if __name__ == "__main__":
    main()
