"""The transformer: counts against the published runs, who sees what by gradient, every rung."""
import csv
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

import kernels
import model

ROOT = Path(__file__).resolve().parent.parent
DENSE = dict(num_experts=0, experts_per_token=0, expert_dim=0)
OFFSET = dict(half_rope=True, last_layer_full=True, partial_key_offset=True)
RUNGS = {
    "v1": {},
    "v2": OFFSET | dict(combine_sum=2.5, router_z=0.0),
    "dense": DENSE,
    "no shared expert": dict(shared_dim=0),
    "bfloat16": dict(compute_dtype="bfloat16"),
    "no remat": dict(remat="none"),
    "half rope": dict(half_rope=True),
    "last layer full": dict(last_layer_full=True),
    "partial key offset": OFFSET,
    "combine sum": dict(combine_sum=2.5),
    "every expert for every token": dict(experts_per_token=8),
    "four layers": dict(num_layers=4),
    "five layers": dict(num_layers=5)}
QUICK = ("v1",)


MADE = {}


def init(c):
    """model.init's weights, made once for all configs with the same table of weights."""
    table = c.hidden_dim, str(model.param_specs(c))
    if table not in MADE:
        MADE[table] = jax.jit(model.init, static_argnums=0)(c, jax.random.key(0))
    return MADE[table]


loss = jax.jit(model.loss, static_argnums=4)
logits = jax.jit(model.logits, static_argnums=4)


def lively(c, seed=0):
    """Weights twice as large as model.init's, every zero or one stirred, so that no term of the model is
    idle. They are drawn by numpy, because compiling model.init takes longer than any test."""
    rng = np.random.default_rng(seed)
    mean = {"normal": 0.0, "zeros": 0.0, "ones": 2.0}
    def draw(path, w):
        deviation = c.hidden_dim**-0.5 if w.init == "normal" else 0.1
        return jnp.asarray(mean[w.init] + deviation * rng.standard_normal(w.shape), jnp.float32)
    return model.map_params(draw, c)


def bias_of(c):
    return jax.random.normal(jax.random.key(9), (c.num_layers, c.num_experts)) * 0.1


# ----------------------------------------------------------------------------------------- counts

def public(**sizes):
    """A config of the public runs' vocabulary, sequence and norm, with these sizes."""
    return model.ModelConfig(**dict(vocab_size=128_256, seq_len=4096, head_dim=128,
                                    experts_per_token=4, gated_norm_rank=128) | sizes)


def test_the_129b_run_is_counted_as_published():
    n = model.count(public(hidden_dim=5120, num_layers=48, num_heads=40, num_kv_heads=10,
                           shared_dim=5120, num_experts=64, expert_dim=2560))
    billions = [f"{x / 1e9:.2f}" for x in (n.total, n.active, n.core, n.params)]
    assert billions == ["129.18", "15.94", "14.62", "15.28"]
    assert f"{n.flops_per_token / 3:.4e}" == "3.3022e+10"
    assert int(1e23 / n.flops_per_token / (2048 * 4096)) == 120_332


def test_the_67b_run_is_counted_as_published():
    n = model.count(public(seq_len=8192, hidden_dim=2560, num_layers=26, num_heads=20,
                           num_kv_heads=5, shared_dim=2560, num_experts=256, expert_dim=1280))
    assert f"{n.total / 1e9:.2f} {n.core / 1e9:.2f} {n.params / 1e9:.2f}" == "67.08 2.01 2.34"


def recipe_shape(width):
    """The recipe's shape of a width: the depth rule, heads, GQA 4:1, expert and shared widths.
    [marin, heuristic.py]"""
    heads = width // 128
    kv_heads = max(m for m in range(1, heads + 1) if heads % m == 0 and m <= max(1, heads / 4))
    return dict(num_layers=round(width / (64 + 4 * math.log2(width) - 9)), num_heads=heads,
                num_kv_heads=kv_heads, expert_dim=math.ceil(width / 256) * 128, shared_dim=width)


def posted(name):
    """(budget in FLOPs, width, experts, tokens) of every public run whose tokens were posted."""
    columns = "budget_flops", "hidden_dim", "num_experts", "posted_tokens"
    with open(ROOT / "configs/ladder/public" / f"{name}.csv") as f:
        for row in csv.DictReader(line for line in f if line[0] != "#"):
            if row["posted_tokens"]:
                yield tuple(float(row[key]) for key in columns)


def test_the_public_ladder_s_token_counts_follow_from_its_budgets():
    """Budget over FLOPs per token gives the tokens that each of Marin's runs was trained on.
    [marin #4447, #6074]"""
    runs = [*posted("moe_v16"), *posted("may")]
    assert len(runs) >= 49
    for budget, width, experts, tokens in runs:
        c = public(num_experts=int(experts), hidden_dim=int(width), **recipe_shape(int(width)))
        flops = model.count(c).flops_per_token
        assert budget / flops == pytest.approx(tokens, rel=3e-4), (budget, width)


@pytest.mark.parametrize("rung", RUNGS)
def test_counts_are_the_sizes_of_the_arrays(rung, tiny):
    c = dataclasses.replace(tiny, **RUNGS[rung])
    params = jax.eval_shape(lambda: model.init(c, jax.random.key(0)))
    n = model.count(c)
    assert n.total == sum(w.size for w in jax.tree.leaves(params))
    experts = sum(w.size for name, w in params["layers"].items()
                  if name in ("gate_EDF", "up_EDF", "down_EFD"))
    idle = experts - experts * c.experts_per_token // max(1, c.num_experts)
    assert n.active == n.total - idle
    assert n.core == n.active - params["embed_VD"].size - params["head_DV"].size


def test_init_is_a_truncated_normal_of_the_stated_width(tiny):
    c = dataclasses.replace(tiny, hidden_dim=64, num_heads=8, num_layers=1)
    params, std = init(c), 0.5 / math.sqrt(64)
    for name in ("embed_VD", "head_DV"):
        assert float(jnp.std(params[name])) == pytest.approx(std, rel=0.05)
        assert float(jnp.max(jnp.abs(params[name]))) <= 3 * std
    assert (params["layers"]["head_gate_DN"] == 0).all()
    assert (params["final_norm_gain_D"] == 1).all()
    other = init(dataclasses.replace(c, num_experts=4))
    same = other["layers"]["query_DQ"] == params["layers"]["query_DQ"]
    assert same.all(), "a weight's draw depends on its name only"


# ------------------------------------------------------------------------------------ who sees what

@pytest.mark.parametrize("rung", ["v1", *(pytest.param(rung, marks=pytest.mark.slow)
                                          for rung in ("dense", "v2", "no shared expert"))])
def test_a_position_depends_on_its_own_document_s_past_and_nothing_else(rung, tiny):
    """The gradient of one position's logits with respect to every input embedding: exactly zero
    after it and outside its document, not zero before it. Every expert sees one token at a time,
    and the bias is frozen."""
    c = dataclasses.replace(tiny, remat="none", **RUNGS[rung])
    if rung in ("v1", "v2"):
        c = dataclasses.replace(c, num_layers=5)            # window, full and remainder layers
    params, bias_LE = lively(c), bias_of(c)
    tokens = jnp.arange(c.seq_len)[None] % c.vocab_size     # all different: rows of the table
    segments = jnp.where(jnp.arange(c.seq_len) < 9, 1, 2)[None]
    direction_V = jax.random.normal(jax.random.key(5), (c.vocab_size,))

    @jax.jit
    def sensitivity(position):
        def f(table):
            weights = {**params, "embed_VD": table}
            return model.logits(weights, bias_LE, tokens, segments, c, at=position)
        pull = jax.vjp(f, params["embed_VD"])[1]
        return jnp.abs(pull(direction_V)[0])[:c.seq_len].sum(-1)

    for position in (0, 8, 9, 15, 23):
        seen = np.asarray(sensitivity(position)) > 0
        start = 0 if position < 9 else 9
        assert not seen[position + 1:].any(), "the future leaks"
        assert not seen[:start].any(), "another document leaks"
        assert seen[start:position + 1].all(), "the past is not read"


@pytest.mark.parametrize("layers, last_layer_full, reach", [
    (4, False, 24), pytest.param(1, False, 3, marks=pytest.mark.slow),
    pytest.param(1, True, 24, marks=pytest.mark.slow), pytest.param(2, False, 5, marks=pytest.mark.slow),
    pytest.param(2, True, 24, marks=pytest.mark.slow)])
def test_a_window_layer_sees_its_window_and_a_full_layer_everything(layers, last_layer_full, reach,
                                                                    tiny):
    """A window of 3 holds the token itself. In V1, fewer than four layers are all window layers."""
    c = dataclasses.replace(tiny, num_layers=layers, window=3, remat="none",
                            last_layer_full=last_layer_full)
    params, tokens = lively(c), jnp.arange(c.seq_len)[None]

    def f(table):
        weights = {**params, "embed_VD": table}
        return jnp.sum(model.logits(weights, bias_of(c), tokens, jnp.ones_like(tokens), c, at=23)
                       ** 2)
    gradient = jax.jit(jax.grad(f))(params["embed_VD"])
    seen = np.asarray(jnp.abs(gradient).sum(-1)[:24]) > 0
    assert seen.tolist() == [i > 23 - reach for i in range(24)]


@pytest.mark.parametrize("last_layer_full", [False, True])
def test_keys_are_offset_on_full_layers_only(last_layer_full, tiny, batch_of, totals_of,
                                             monkeypatch):
    c = dataclasses.replace(tiny, num_layers=6, half_rope=True, partial_key_offset=True,
                            last_layer_full=last_layer_full, remat="none")
    windows, offsets, attention, offset = [], [], kernels.attention, model.key_offset

    def spy_attention(q, k, v, segment_BS, window, **more):
        windows.append(window)
        return attention(q, k, v, segment_BS, window, **more)

    def spy_offset(*args):
        offsets.append(len(windows))
        return offset(*args)
    monkeypatch.setattr(kernels, "attention", spy_attention)
    monkeypatch.setattr(model, "key_offset", spy_offset)
    batch = batch_of(c)
    jax.eval_shape(lambda: model.loss(lively(c), bias_of(c), batch, totals_of(batch), c))
    full = [i for i, window in enumerate(windows) if window == c.seq_len]
    assert offsets == full == ([3, 5] if last_layer_full else [3]), windows


@pytest.mark.slow
def test_only_relative_positions_matter(tiny):
    """A row of one document twice gives the same logits in both copies: RoPE's scores depend on
    distance only."""
    half = jax.random.randint(jax.random.key(1), (12,), 0, tiny.vocab_size)
    tokens = jnp.concatenate([half, half])[None]
    segments = jnp.repeat(jnp.asarray([1, 2]), 12)[None]
    out = logits(lively(tiny), bias_of(tiny), tokens, segments, tiny)
    np.testing.assert_allclose(out[:12], out[12:], atol=2e-5)


def test_the_key_offset_looks_one_back_but_not_into_another_document():
    k = jnp.arange(1.0, 5)[None, :, None, None] * jnp.ones((1, 4, 1, 4))
    got = model.key_offset(k, jnp.asarray([[1, 1, 2, 2]]))[0, :, 0]
    assert got.tolist() == [[1, 1, 0, 0], [2, 2, 1, 1], [3, 3, 0, 0], [4, 4, 3, 3]]


def test_exclusive_self_attention_leaves_nothing_along_the_token_s_own_value(normal):
    y_BSNH, v_BSMH = normal(2, 5, 4, 8), normal(2, 5, 2, 8)
    y_TNH = np.asarray(model.exclusive_self_attention(y_BSNH, v_BSMH))
    v_TNH = np.repeat(np.asarray(v_BSMH).reshape(10, 2, 8), 2, axis=1)
    along = np.sum(y_TNH * v_TNH, axis=-1) / np.sum(v_TNH**2, axis=-1)
    assert np.abs(along).max() < 1e-5
    removed = np.asarray(y_BSNH).reshape(10, 4, 8) - y_TNH          # and nothing else is removed
    share = np.sum(removed * v_TNH, axis=-1, keepdims=True) / np.sum(v_TNH**2, -1, keepdims=True)
    np.testing.assert_allclose(removed, share * v_TNH, atol=1e-5)


# --------------------------------------------------------------------------------------- every rung

@pytest.mark.parametrize("rung", [rung if rung in QUICK else
                                  pytest.param(rung, marks=pytest.mark.slow) for rung in RUNGS])
def test_every_rung_has_a_finite_loss_and_a_gradient_for_every_weight(rung, tiny, batch_of,
                                                                      totals_of):
    c = dataclasses.replace(tiny, **RUNGS[rung])
    batch = batch_of(c)

    def f(params):
        return model.loss(params, bias_of(c), batch, totals_of(batch), c)
    (objective, (_, stats)), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(lively(c))
    assert jnp.isfinite(objective)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(g).all() and (jnp.abs(g) > 0).any(), jax.tree_util.keystr(path)
    if c.num_experts:
        assert (stats.load_E.sum(1) == batch["tokens"].size * c.experts_per_token).all()
    else:
        assert stats is None


def test_the_loss_of_a_fresh_model_is_log_v(tiny, batch_of, totals_of):
    """The head's standard deviation is small and nothing is known yet."""
    batch = batch_of(tiny, B=8)
    totals = totals_of(batch)
    _, (nll, _) = loss(init(tiny), jnp.zeros((2, 8)), batch, totals, tiny)
    assert float(nll / totals["weight"]) == pytest.approx(math.log(61), rel=0.05)


@pytest.mark.slow
def test_remat_changes_memory_and_no_number(tiny, batch_of, totals_of):
    batch, params, results = batch_of(tiny), lively(tiny), []
    for remat in ("block", "attended", "none"):
        c = dataclasses.replace(tiny, remat=remat)
        f = lambda p: model.loss(p, bias_of(c), batch, totals_of(batch), c)[0]
        results.append(jax.jit(jax.value_and_grad(f))(params))
    for a, b, c in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # sums that cancel: 2e-7 of 0.2
        np.testing.assert_allclose(a, c, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_gradients_are_float32_gradients_within_rounding(tiny, batch_of, totals_of):
    """Sums over tokens and tiles must not be taken in bfloat16, where they stop growing at 256
    equal terms."""
    c = dataclasses.replace(tiny, seq_len=512, num_experts=2, experts_per_token=1)
    batch, params = batch_of(c, B=8, documents=False), init(c)
    batch["tokens"] = batch["tokens"] % 2               # two rows of the embedding get it all

    def gradient(c):
        f = lambda p: model.loss(p, jnp.zeros((2, 2)), batch, totals_of(batch), c)[0]
        return jax.jit(jax.grad(f))(params)
    exact_grads = gradient(c)
    rounded_grads = gradient(dataclasses.replace(c, compute_dtype="bfloat16"))
    pairs = zip(jax.tree_util.tree_leaves_with_path(exact_grads), jax.tree.leaves(rounded_grads))
    for (path, exact), rounded in pairs:
        error = jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)
        assert error < 0.06, (jax.tree_util.keystr(path), float(error))


def test_the_loss_is_its_definition(tiny, batch_of, totals_of):
    """Against plain logits: cross-entropy over weighted tokens, plus both z-losses over real
    tokens."""
    c = dataclasses.replace(tiny, router_z=0.3, logit_z=0.2)
    batch, params = batch_of(c), lively(c)
    batch["segments"] = batch["segments"].at[1, 20:].set(0)
    batch["weights"] = (batch["segments"] != 0).astype(jnp.float32).at[0, 3].set(0.0)
    objective, (got_nll, stats) = loss(params, bias_of(c), batch, totals_of(batch), c)
    logits_TV = logits(params, bias_of(c), batch["tokens"], batch["segments"], c)
    logits_BSV = logits_TV.reshape(2, c.seq_len, -1)
    lse = jax.nn.logsumexp(logits_BSV, axis=-1)
    nll = lse - jnp.take_along_axis(logits_BSV, batch["targets"][..., None], -1)[..., 0]
    w, real = batch["weights"], batch["segments"] != 0
    want = (jnp.sum(w * nll) + 0.2 * jnp.sum(w * lse**2)) / jnp.sum(w)
    want += 0.3 * jnp.mean(jnp.sum(stats.z_T * real.reshape(-1), axis=1)) / jnp.sum(real)
    np.testing.assert_allclose(objective, want, rtol=1e-5)
    np.testing.assert_allclose(got_nll, jnp.sum(w * nll), rtol=1e-5)


def test_an_auxiliary_loss_is_added_to_the_objective_and_not_to_the_nll(tiny, batch_of, totals_of):
    """Switch's loss, rate * sum over layers of E * sum over experts of f P, from the logits'
    softmax."""
    plain = dataclasses.replace(tiny, balancer="none")
    batch, params = batch_of(tiny), lively(tiny)
    found = {}
    for c in (plain, dataclasses.replace(tiny, balancer="aux_global", balancer_rate=0.5)):
        found[c.balancer] = loss(params, bias_of(c), batch, totals_of(batch), c)
    (without, (nll, _)), (objective, (same_nll, stats)) = found["none"], found["aux_global"]
    share_LE = stats.load_E / jnp.sum(stats.load_E, axis=1, keepdims=True)
    want = 0.5 * 8 * jnp.sum(share_LE * jnp.mean(stats.prob_TE, axis=1))
    np.testing.assert_allclose(objective - without, want, rtol=1e-5)
    np.testing.assert_allclose(nll, same_nll, rtol=1e-6)


@pytest.mark.parametrize("change, words", [
    (dict(num_kv_heads=3), "num_kv_heads: expected a divisor of num_heads=4, found 3"),
    (dict(head_dim=7), "head_dim"),
    (dict(experts_per_token=9), r"experts_per_token: expected 1 \(2 with combine_sum\) to num_experts=8"),
    (dict(experts_per_token=1, combine_sum=2.5), "2 with combine_sum"),
    (dict(partial_key_offset=True), "partial_key_offset"),
    (dict(num_experts=0), "num_experts"),
    (dict(balancer="fate"), "balancer: expected one of"),
    (dict(vocab_size=0), "vocab_size")])
def test_contradictory_sizes_are_named(change, words, tiny):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(tiny, **change)


# ------------------------------------------------------------------------- weights on many devices

def eight_devices():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])


@pytest.mark.parametrize("shape, split", [
    ((16, 400), 0), ((1280, 330), 0), ((400, 16), 1), ((16, 24), 0), ((4, 16, 24), 1)])
def test_each_device_gets_its_share_of_the_summed_gradient(shape, split, monkeypatch):
    """The gradient is that of whole weights on one device, also where it is padded for the sum
    because the vocabulary is large, and where it is summed in four chunks (the second shape)."""
    monkeypatch.setattr(kernels, "LARGE_VOCABULARY", 256)
    spec = Spec(*("data" if i == split else None for i in range(len(shape))))
    w = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (8,))          # every device has another gradient

    def f(w, x):
        return jnp.sum(jnp.sin(kernels.gather_weight(w, "data", split, jnp.float32) + x[0]))
    sharded = jax.shard_map(jax.grad(f), mesh=eight_devices(), in_specs=(spec, Spec("data")),
                            out_specs=spec, check_vma=False)
    want = sum(jnp.cos(w + shift) for shift in x)
    np.testing.assert_allclose(jax.jit(sharded)(w, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V, D", [
    (330, 1280), (330, 24), (24, 16)])              # in four chunks; in one; a small vocabulary
def test_the_embedding_s_gradient_sums_over_occurrences_and_devices(V, D, monkeypatch):
    """Against indexing the whole table on one device. Some words occur many times, others never."""
    monkeypatch.setattr(kernels, "LARGE_VOCABULARY", 256)
    w = jax.random.normal(jax.random.key(0), (V, D))
    x = jax.random.normal(jax.random.key(1), (8 * 40, D))
    tokens = jax.random.randint(jax.random.key(2), (8 * 40,), 0, V)
    tokens = tokens.at[5:50].set(7).at[100].set(V - 1)

    def f(w, x, tokens, axis="data"):
        return jnp.sum(jnp.sin(kernels.embed(w, tokens, axis, jnp.float32)) * x)
    columns = Spec(None, "data")
    many = jax.shard_map(jax.grad(f), mesh=eight_devices(), out_specs=columns, check_vma=False,
                         in_specs=(columns, Spec("data"), Spec("data")))
    want = jax.grad(lambda w: jnp.sum(jnp.sin(w[tokens]) * x))(w)
    np.testing.assert_allclose(jax.jit(many)(w, x, tokens), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.grad(f)(w, x, tokens, None), want, rtol=1e-5, atol=1e-5)
