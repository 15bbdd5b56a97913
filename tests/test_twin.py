"""An independent twin of the recipe in float64 numpy: the transformer one token at a time, the
optimizer one weight at a time.

model.py is batched, scanned, chunked and sorted; the twin is none of these. It was written from the
recipe (marin #4697, for V2 #4976 and #5951) and takes from the code only the names of weights and
settings, so a slip in one is not a slip in both. The recipe's constants (1.3, 1e4, 1e-5, 1e-6,
every 4th layer) are written out here."""
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import balance
import model
import train

# largest difference over largest value; float32 against float64 leaves 1e-5 [measured]
TOLERANCE = 5e-5
# Five layers: 0, 1 and 2 have a window, 3 is full, and 4, the last, has a window in V1 only.
FIVE = model.ModelConfig(
    vocab_size=61, seq_len=24, hidden_dim=16, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8,
    shared_dim=24, num_experts=8, experts_per_token=2, expert_dim=12, gated_norm_rank=4)
V2 = dataclasses.replace(FIVE, half_rope=True, last_layer_full=True, partial_key_offset=True,
                         combine_sum=2.5, router_z=0.0)
PUBLISHED = dataclasses.replace(V2, partial_key_offset=False, nope_on_full=True, qk_scale=1.5703)
DENSE = dataclasses.replace(FIVE, num_experts=0, experts_per_token=0, expert_dim=0)
CONFIGS = {"v1": FIVE, "v2": V2, "window of 3": dataclasses.replace(FIVE, window=3),
           "the published 67B": PUBLISHED, "dense": DENSE}

# ------------------------------------------------- the twin: x, a, q, k, v are one token's vector

sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
swiglu = lambda x, gate, up, down: (silu(x @ gate) * (x @ up)) @ down
rms = lambda x, eps: x / np.sqrt(np.mean(x * x) + eps)
logsumexp = lambda x: np.log(np.sum(np.exp(x), axis=-1))


def gated_norm(x, w, site):
    n = rms(x, 1e-5) * w[f"{site}_norm_gain_D"]
    return n * sigmoid(silu(n @ w[f"{site}_norm_down_DU"]) @ w[f"{site}_norm_up_UD"])


def rope(x, position, half_rope):
    rotated = len(x) // 2 if half_rope else len(x)
    out = x.copy()
    for i in range(rotated // 2):
        j, angle = i + rotated // 2, position * 1e4 ** (-2 * i / rotated)
        out[i] = x[i] * np.cos(angle) - x[j] * np.sin(angle)
        out[j] = x[i] * np.sin(angle) + x[j] * np.cos(angle)
    return out


def attention(a, p, segment, i, c):
    """What the attention of layer i adds to each token of a row; a[t] is token t, normed and
    gated."""
    S, N, M, H = len(a), c.num_heads, c.num_kv_heads, c.head_dim
    full = i % 4 == 3 or (c.last_layer_full and i == c.num_layers - 1)  # the second in V2 only
    window = c.seq_len if full else c.window or c.seq_len // 2
    query = [(a[t] @ p["query_DQ"]).reshape(N, H) for t in range(S)]
    key = [(a[t] @ p["key_DP"]).reshape(M, H) for t in range(S)]
    value = [(a[t] @ p["value_DP"]).reshape(M, H) for t in range(S)]
    if c.partial_key_offset and full:
        own = [k.copy() for k in key]
        for t in range(S):
            starts = t == 0 or segment[t - 1] != segment[t]
            key[t][:, H // 2:] = 0 if starts else own[t - 1][:, H // 2:]
    scale, turned = 1.5703 if c.nope_on_full else 1.3, not (full and c.nope_on_full)
    turn = lambda x, t: rope(rms(x, 1e-6), t * turned, c.half_rope)         # angle 0: not at all
    query = [[scale * turn(q, t) for q in query[t]] for t in range(S)]
    key = [[turn(k, t) for k in key[t]] for t in range(S)]
    added = []
    for t in range(S):
        heads = []
        for n in range(N):
            m = n // (N // M)                   # consecutive query heads share a key/value head
            seen = [j for j in range(t + 1)
                    if t - j < window and segment[j] == segment[t]]
            chance = np.exp([query[t][n] @ key[j][m] / np.sqrt(H) for j in seen])
            y = sum(e * value[j][m] for e, j in zip(chance / np.sum(chance), seen))
            v = value[t][m]
            y = y - (y @ v) / (v @ v + 1e-6) * v        # exclusive self-attention
            heads.append(2 * sigmoid(a[t] @ p["head_gate_DN"][:, n]) * y)
        added.append(np.concatenate(heads) @ p["out_QD"])
    return added


def experts(x, p, score_E, bias_E, c):
    """What the routed experts add to one token: the bias chooses, the weights do not see it."""
    chosen = np.argsort(-(score_E + bias_E))[:c.experts_per_token]
    weight = sigmoid(score_E[chosen])
    if c.combine_sum:
        weight = weight * c.combine_sum / np.sum(weight)
    return sum(w * swiglu(x, p["gate_EDF"][e], p["up_EDF"][e], p["down_EFD"][e])
               for w, e in zip(weight, chosen))


@functools.lru_cache
def twin(c):
    """Everything the twin says about `problem(c)`."""
    *weights, batch = problem(c)
    w, bias_LE = jax.tree.map(np.float64, weights)
    B, S = batch["tokens"].shape
    L, E, K = c.num_layers, c.num_experts, c.experts_per_token
    logit_BSV, score_LBSE = np.zeros((B, S, c.vocab_size)), np.zeros((L, B, S, E))
    for b in range(B):
        x = [gated_norm(w["embed_VD"][token], w, "embed") for token in batch["tokens"][b]]
        for i in range(L):
            p = {name: stack[i] for name, stack in w["layers"].items()}
            normed = [gated_norm(x[t], p, "attn") for t in range(S)]
            added = attention(normed, p, batch["segments"][b], i, c)
            for t in range(S):
                x[t] = x[t] + added[t]
                n = gated_norm(x[t], p, "mlp")
                shared = p["shared_gate_DZ"], p["shared_up_DZ"], p["shared_down_ZD"]
                x[t] = x[t] + swiglu(n, *shared)
                if E:
                    score_LBSE[i, b, t] = n @ p["router_DE"]
                    x[t] = x[t] + experts(n, p, score_LBSE[i, b, t], bias_LE[i], c)
        logit_BSV[b] = [gated_norm(x[t], w, "final") @ w["head_DV"] for t in range(S)]

    z_BS, weight = logsumexp(logit_BSV), batch["weights"]
    nll_BS = z_BS - np.take_along_axis(logit_BSV, batch["targets"][:, :, None], axis=2)[:, :, 0]
    loss = np.sum(weight * (nll_BS + c.logit_z * z_BS**2)) / np.sum(weight)
    said = {"logits": logit_BSV, "loss": loss}
    if E:
        real = batch["segments"] != 0
        said["loss"] += c.router_z * np.mean([np.mean(logsumexp(s)[real] ** 2) for s in score_LBSE])
        biased = score_LBSE + bias_LE[:, None, None, :]
        cutoff = np.sort(biased, axis=-1)[..., [E - K - 1]]             # the (K+1)-th largest
        margin, q = biased - cutoff, int(np.sum(real)) * K // E
        beta = np.array([[np.sort(m[real][:, e])[-q] for e in range(E)] for m in margin])
        beta = beta - bias_LE
        said |= {"z": logsumexp(score_LBSE) ** 2, "margin": margin,
                 "load": np.sum(biased > cutoff, axis=(1, 2)),          # padding is routed too
                 "next bias": -(beta - beta.mean(axis=1, keepdims=True))}
    return said


# --------------------------------------------------------------------- the twin's optimizer: AdamH

def peak_rates(c, t):
    """(Adam's rate, the matrices' rate, Adam's epsilon): Marin's fits of April (V1) and May (V2),
    capped alike."""
    batch = t.batch_size * c.seq_len
    tokens = t.steps * batch
    if t.recipe == "v1":
        rows = batch / 4096
        adam = 1.63 * tokens**-0.2813 * c.hidden_dim**-0.3678 * np.sqrt(rows)
        epsilon = 1e-15 * np.sqrt(32 * tokens / (rows * 1.4e9))
    else:
        adam = 0.06602 * tokens**-0.395 * c.hidden_dim**-0.150 * np.sqrt(batch)
        epsilon = 9.676e-18 * np.sqrt(tokens / batch)
    return min(adam, 0.05), min(13 / 3 * adam, 0.05), epsilon


def rate_over_peak(t, before):
    """The rate of the step that follows `before` others, over its peak: the first step has rate
    0."""
    warm = int(t.warmup * t.steps)
    if before < warm:
        return before / warm
    return 1 - (1 - t.min_lr_ratio) * (before - warm) / (t.steps - warm)


def group(name, c):
    """Whose gradients a weight's gradient is clipped with. A dense model's MLP is one of the
    matrices."""
    if name.endswith("gain_D") or name in ("embed_VD", "router_DE", "head_gate_DN"):
        return "adam"
    expert = name in ("gate_EDF", "up_EDF", "down_EFD") or name.startswith("shared_")
    return "experts" if expert and c.num_experts else "matrices"


def flat(weights):
    """{name: array} of every weight; those of the layers are stacked, as in model.py."""
    return {name: w for name, w in weights.items() if name != "layers"} | weights["layers"]


def trained(c, t, weights, gradients):
    """The weights after one step for each of the gradients."""
    ws = {name: np.float64(w) for name, w in flat(weights).items()}
    m, v = dict.fromkeys(ws, 0.0), dict.fromkeys(ws, 0.0)
    adam_rate, matrix_rate, epsilon = peak_rates(c, t)
    length = lambda w: np.sqrt(np.sum(w * w, axis=(-2, -1), keepdims=True))     # of every matrix
    for before, gs in enumerate(gradients):
        norm = {}
        for name, g in gs.items():
            norm[group(name, c)] = np.hypot(norm.get(group(name, c), 0), np.linalg.norm(g))
        for name, w in ws.items():
            g = gs[name] * min(1, t.clip / norm[group(name, c)])
            m[name] = t.beta1 * m[name] + (1 - t.beta1) * g
            v[name] = t.beta2 * v[name] + (1 - t.beta2) * g * g
            u = m[name] / (1 - t.beta1 ** (before + 1))
            u = u / (np.sqrt(v[name] / (1 - t.beta2 ** (before + 1))) + epsilon)
            if group(name, c) == "adam":
                ws[name] = w - adam_rate * rate_over_peak(t, before) * u
            else:
                step = matrix_rate * rate_over_peak(t, before)
                moved = w - step * length(w) * u / length(u)
                ws[name] = moved * length(w) / length(moved)
    return ws


# ---------------------------------------------------------------------------------- the comparison

def problem(c):
    """Weights that leave no term idle, a bias, a batch with padding and a document that is longer
    than the window of 12."""
    rng = np.random.default_rng(0)
    w = model.map_params(
        lambda path, w: rng.normal(w.init == "ones", 0.3, w.shape).astype(np.float32), c)
    bias_LE = rng.normal(0, 0.3, (c.num_layers, c.num_experts)).astype(np.float32)
    tokens = rng.integers(0, c.vocab_size, (2, c.seq_len + 1))
    rows = [7, 10, 4, 3], [2, 20, 0, 2]                 # 43 real tokens: 43 * 2 / 8 is not whole
    segments = np.stack([np.repeat([1, 2, 3, 0], row) for row in rows])
    joined = segments == np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return w, bias_LE, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments,
                        "weights": (joined & (segments != 0)).astype(np.float32)}


update_bias = jax.jit(balance.update, static_argnums=(0, 4))


@pytest.fixture
def errors(totals_of):
    """errors(c, given=c): per quantity, the largest distance of model.py's, with the config
    `given`, from that of the twin of c, over the largest value."""
    def measure(c, given=None):
        def run(w, bias_LE, batch):         # a new function, so that jit knows no unpatched model
            forward, kept = model.forward, []

            def spy(*args):                 # one forward pass for loss and logits
                kept.extend(forward(*args))
                return kept
            with mock.patch.object(model, "forward", spy):
                objective, _ = model.loss(w, bias_LE, batch, totals_of(batch), given or c)
            return objective, *kept
        w, bias_LE, batch = jax.tree.map(jnp.asarray, problem(c))
        objective, x_TD, stats = jax.jit(run)(w, bias_LE, batch)
        got, want = {"logits": x_TD @ w["head_DV"], "loss": objective}, twin(c)
        if c.num_experts:
            real_T = batch["segments"].reshape(-1) != 0
            bias, _ = update_bias("quantile", stats.margin_TE, real_T, bias_LE,
                                  c.experts_per_token)
            got |= {"z": stats.z_T, "margin": stats.margin_TE, "load": stats.load_E,
                    "next bias": bias}
        assert set(got) == set(want)
        return {k: np.max(np.abs(np.reshape(got[k], want[k].shape) - want[k]))
                / np.max(np.abs(want[k])) for k in got}
    return measure


@pytest.mark.parametrize("name", ["v1", "v2", "dense",
                                  pytest.param("the published 67B", marks=pytest.mark.slow),
                                  pytest.param("window of 3", marks=pytest.mark.slow)])
def test_the_model_equals_its_twin(name, errors):
    found = errors(CONFIGS[name])
    assert found.pop("load", 0) == 0, "some token chose other experts"
    assert all(error < TOLERANCE for error in found.values()), found


# Every term in two layers, one with a window and one full, quick to compile.
TWO = dataclasses.replace(V2, num_layers=2, router_z=1e-3, remat="none")
# name: another config for model.py; or where to patch it, and what replaces f
MUTANTS = {
    "qk_scale": dict(qk_scale=1.0),
    "theta": dict(rope_theta=5e3),
    "combine_sum": dict(combine_sum=2.4),
    "window": dict(window=11),
    "no RoPE on full layers": dict(nope_on_full=True),
    "router z": dict(router_z=0.0),
    "logit z": dict(logit_z=0.0),
    "the last layer has a window": dict(last_layer_full=False),
    "the last layer has a window, with key offset": (
        model.kernels, "attention",
        lambda f: lambda q, k, v, seg, window, **more: f(q, k, v, seg, 12, **more)),
    "every layer is full, with key offset": (model, "sees_all", lambda f: lambda c, i: True),
    "XSA off": (model, "exclusive_self_attention", lambda f: lambda y, v: f(y, 0 * v)),
    "head gate without its 2": (model, "attend", lambda f: lambda *a: f(*a) / 2),
    "GatedNorm without gate": (
        model, "gated_norm",
        lambda f: lambda x, p, site: model.rms_norm(x, 1e-5, p[f"{site}_norm_gain_D"])),
    "key offset off": (model, "key_offset", lambda f: lambda k, segment_BS: k),
    "key offset across documents": (
        model, "key_offset", lambda f: lambda k, segment_BS: f(k, 0 * segment_BS)),
    "no QK-norm": (
        model, "rms_norm", lambda f: lambda x, eps, *gain: x if eps == 1e-6 else f(x, eps, *gain)),
    "the bias does not choose": (
        model.moe, "moe", lambda f: lambda x, p, bias_E, *a, **k: f(x, p, 0 * bias_E, *a, **k))}


QUICK_MUTANTS = ("combine_sum", "XSA off", "head gate without its 2", "GatedNorm without gate")


@pytest.mark.parametrize("name", [name if name in QUICK_MUTANTS else
                                  pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS])
def test_the_twin_notices_a_mutant_of_the_model(name, errors, monkeypatch):
    given, mutant = TWO, MUTANTS[name]
    if isinstance(mutant, dict):
        given = dataclasses.replace(TWO, **mutant)
    else:
        where, what, change = mutant
        monkeypatch.setattr(where, what, change(getattr(where, what)))
    found = errors(TWO, given)
    assert any(error > 5 * TOLERANCE for error in found.values()), found


# -------------------------------------------------------------------- the optimizer's comparison

# Of the first five steps the first has rate 0, the fourth the peak and the fifth a little less.
V1_STEPS = train.TrainConfig(mixture=(("none", 1.0),), tokenizer="bytes", steps=20, batch_size=3,
                             warmup=0.15, clip=0.3, beta2=0.95)
V2_STEPS = dataclasses.replace(V1_STEPS, recipe="v2")   # V2's rates and epsilon; the cap binds
STEPS = {"v1": (FIVE, V1_STEPS), "dense": (DENSE, V1_STEPS), "v2's rates": (FIVE, V2_STEPS)}


def optimizer_errors(c, t):
    """Per weight, the distance between what train.py's optimizer and the twin make of it, over the
    largest move."""
    w, *_ = problem(c)
    rng, optimizer = np.random.default_rng(1), train.make_optimizer(c, t)

    def gradient(w):
        # A weight's gradients have another size at each step: nothing else shows how they are
        # clipped, because AdamH takes only their direction.
        return (10 ** rng.uniform(-2, 1) * rng.normal(size=w.shape)).astype(np.float32)
    gradients = [jax.tree.map(gradient, w) for _ in range(5)]
    update = jax.jit(optimizer.update)
    now, state = w, optimizer.init(w)
    for g in gradients:
        updates, state = update(g, state, now)
        now = jax.tree.map(np.add, now, updates)
    before, got, want = flat(w), flat(now), trained(c, t, w, [flat(g) for g in gradients])
    return {name: np.max(np.abs(got[name] - want[name])) / np.max(np.abs(want[name] - before[name]))
            for name in want}


@pytest.mark.parametrize("name", STEPS)
def test_the_optimizer_equals_its_twin(name):
    found = optimizer_errors(*STEPS[name])
    assert all(error < TOLERANCE for error in found.values()), found


def mlp_with_the_experts(f):
    """A weight table that calls a dense model's MLP an expert."""
    def specs(c):
        said = f(c)
        return said | {"layers": {
            name: w._replace(group="shared") if name.startswith("shared_") else w
            for name, w in said["layers"].items()}}
    return specs


def without_cap(f):
    return lambda c, t: f(c, t)._replace(matrix_lr=13 / 3 * f(c, t).adam_lr)


def adamh_groups(**owners):
    return lambda groups: groups | {"adamh": groups["adamh"] | owners}


OPTIMIZER_MUTANTS = {       # name: the case of STEPS, where to patch, and what replaces f
    "the shared expert with the matrices": ("v1", train, "GROUPS", adamh_groups(shared="adamh")),
    "a dense MLP not with the matrices": ("dense", model, "param_specs", mlp_with_the_experts),
    "the first step has a rate": (
        "v1", train, "lr_multiplier", lambda f: lambda t, step: f(t, step + 1)),
    "v2's rates without a cap": ("v2's rates", train, "rates", without_cap),
    "one clip for all": ("v1", train, "GROUPS", adamh_groups(expert="adamh", shared="adamh"))}


@pytest.mark.parametrize("name", [name if name == "one clip for all" else
                                  pytest.param(name, marks=pytest.mark.slow)
                                  for name in OPTIMIZER_MUTANTS])
def test_the_twin_notices_a_mutant_of_the_optimizer(name, monkeypatch):
    case, where, what, change = OPTIMIZER_MUTANTS[name]
    monkeypatch.setattr(where, what, change(getattr(where, what)))
    found = optimizer_errors(*STEPS[case])
    assert any(error > 5 * TOLERANCE for error in found.values()), found


# ---------------------------------------------------------------------------- the gain, in bfloat16

def share_rounded_otherwise():
    """The share of gated_norm's bfloat16 results that are not the float64 result, rounded once."""
    rng = np.random.default_rng(2)
    x_TD = jnp.asarray(rng.normal(size=(64, 32)), jnp.bfloat16)
    gain_D = rng.normal(1, 0.3, 32).astype(np.float32)
    closed_DU = np.zeros((32, 4), jnp.bfloat16)             # the gate: sigmoid(0) halves, exactly
    p = {"x_norm_gain_D": gain_D, "x_norm_down_DU": closed_DU, "x_norm_up_UD": closed_DU.T}
    got = model.gated_norm(x_TD, p, "x")
    want = np.array([rms(np.float64(x), 1e-5) * gain_D / 2 for x in x_TD]).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    return np.mean(np.asarray(got) != want)


def test_the_gain_multiplies_before_the_result_is_rounded():
    assert share_rounded_otherwise() < 0.01


def test_a_gain_after_the_cast_would_be_noticed(monkeypatch):
    late = lambda f: lambda x, eps, gain=1.0: (f(x, eps) * gain).astype(x.dtype)
    monkeypatch.setattr(model, "rms_norm", late(model.rms_norm))
    assert share_rounded_otherwise() > 0.1
