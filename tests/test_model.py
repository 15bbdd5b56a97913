"""The transformer: counts against the published run, causality and isolation by gradient, every rung."""
import csv
import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as Spec

import model

ROOT = Path(__file__).resolve().parent.parent
TINY = model.ModelConfig(vocab_size=61, seq_len=24, hidden_dim=16, num_layers=2, num_heads=4, num_kv_heads=2,
                         head_dim=8, shared_dim=24, num_experts=8, experts_per_token=2, expert_dim=12,
                         gated_norm_rank=4)
RUNGS = {
    "v1": {}, "no remat": {"remat": "none"}, "dense": dict(num_experts=0, experts_per_token=0, expert_dim=0),
    "half_rope": dict(half_rope=True), "last_layer_full": dict(last_layer_full=True),
    "pko": dict(half_rope=True, last_layer_full=True, partial_key_offset=True),
    "combine_sum": dict(combine_sum=2.5), "no shared expert": dict(shared_dim=0),
    "k = e": dict(experts_per_token=8),
    "four layers": dict(num_layers=4), "five layers": dict(num_layers=5),
    "bfloat16": dict(compute_dtype="bfloat16"),
    "v2": dict(half_rope=True, last_layer_full=True, partial_key_offset=True, combine_sum=2.5, router_z=0.0)}


@functools.lru_cache
def init(c):
    return jax.jit(model.init, static_argnums=0)(c, jax.random.key(0))


loss = jax.jit(model.loss, static_argnums=4)
logits = jax.jit(model.logits, static_argnums=4)


def lively(c, seed=0):
    """Weights with every zero or one stirred, so that no term of the model is idle."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: 2 * w + 0.1 * rng.standard_normal(w.shape, np.float32), init(c))


def batch_of(c, B=2, seed=0, documents=True):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, c.vocab_size, (B, c.seq_len + 1))
    segments = np.cumsum(rng.random((B, c.seq_len)) < (0.1 if documents else 0), axis=1) + 1
    return {k: jnp.asarray(v) for k, v in dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segments=segments,
                                               weights=np.ones(segments.shape, np.float32)).items()}


def norm_of(batch):
    return {"weight": jnp.sum(batch["weights"]), "tokens": jnp.sum(batch["segments"] != 0).astype(jnp.float32)}


def bias_of(c):
    return jax.random.normal(jax.random.key(9), (c.num_layers, c.num_experts)) * 0.1


# ------------------------------------------------------------------------------------------------------ counts

def big(**sizes):
    return dataclasses.replace(TINY, **sizes)


MOE_129B = big(vocab_size=128_256, seq_len=4096, hidden_dim=5120, num_layers=48, num_heads=40, num_kv_heads=10,
               head_dim=128, shared_dim=5120, num_experts=64, experts_per_token=4, expert_dim=2560,
               gated_norm_rank=128)


def test_the_129b_run_is_counted_as_published():
    n = model.count(MOE_129B)
    billions = [f"{x / 1e9:.2f}" for x in (n.total, n.active, n.core, n.params)]
    assert billions == ["129.18", "15.94", "14.62", "15.28"]
    assert f"{n.flops_per_token / 3:.4e}" == "3.3022e+10"
    assert int(1e23 / n.flops_per_token / (2048 * 4096)) == 120_332


def test_the_67b_run_is_counted_as_published():
    n = model.count(big(vocab_size=128_256, seq_len=8192, hidden_dim=2560, num_layers=26, num_heads=20,
                        num_kv_heads=5, head_dim=128, shared_dim=2560, num_experts=256, experts_per_token=4,
                        expert_dim=1280,
                        gated_norm_rank=128))
    assert f"{n.total / 1e9:.2f} {n.core / 1e9:.2f} {n.params / 1e9:.2f}" == "67.08 2.01 2.34"


def recipe_shape(width):
    """The recipe's shape of a width: depth rule, heads, GQA 4:1, expert and shared widths. [marin heuristic.py]"""
    heads = width // 128
    kv_heads = max(m for m in range(1, heads + 1) if heads % m == 0 and m <= max(1, heads / 4))
    return dict(num_layers=round(width / (64 + 4 * math.log2(width) - 9)), num_heads=heads, num_kv_heads=kv_heads,
                head_dim=128, expert_dim=math.ceil(width / 256) * 128, shared_dim=width)


def posted(name):
    """(budget in FLOPs, width, experts, tokens) of every public run whose tokens were posted."""
    with open(ROOT / "configs/ladder/public" / f"{name}.csv") as f:
        for row in csv.DictReader(line for line in f if line[0] != "#"):
            if row["posted_tokens"]:
                yield tuple(float(row[key]) for key in ("budget_flops", "hidden_dim", "num_experts", "posted_tokens"))


def test_the_token_counts_of_the_public_ladder():
    """Budget over FLOPs per token gives the tokens that each of Marin's runs was trained on. [marin #4447, #6074]"""
    runs = [*posted("moe_v16"), *posted("may")]
    assert len(runs) >= 49
    for budget, width, experts, tokens in runs:
        c = big(vocab_size=128_256, seq_len=4096, gated_norm_rank=128, num_experts=int(experts), experts_per_token=4,
                hidden_dim=int(width), **recipe_shape(int(width)))
        assert budget / model.count(c).flops_per_token == pytest.approx(tokens, rel=3e-4), (budget, width)


@pytest.mark.parametrize("rung", RUNGS)
def test_counts_are_the_arrays(rung):
    c = dataclasses.replace(TINY, **RUNGS[rung])
    params, n = init(c), model.count(c)
    assert n.total == sum(w.size for w in jax.tree.leaves(params))
    experts = sum(w.size for k, w in params["layers"].items() if k in ("gate_EDF", "up_EDF", "down_EFD"))
    assert n.active == n.total - (experts - experts * c.experts_per_token // max(1, c.num_experts))
    assert n.core == n.active - params["embed_VD"].size - params["head_DV"].size


def test_init_is_a_truncated_normal_of_the_stated_width():
    c = dataclasses.replace(TINY, hidden_dim=64, num_heads=8)
    params, std = init(c), 0.5 / math.sqrt(64)
    for name in ("embed_VD", "head_DV"):
        assert float(jnp.std(params[name])) == pytest.approx(std, rel=0.05)
        assert float(jnp.max(jnp.abs(params[name]))) <= 3 * std
    assert (params["layers"]["head_gate_DN"] == 0).all() and (params["final_norm_gain_D"] == 1).all()
    other = init(dataclasses.replace(c, num_experts=4))
    same = other["layers"]["query_DQ"] == params["layers"]["query_DQ"]
    assert same.all(), "a weight's draw hangs on its name only"


# ------------------------------------------------------------------------------------------- who sees what

@pytest.mark.parametrize("rung", ["v1", "dense", *(pytest.param(r, marks=pytest.mark.slow)
                                                  for r in ("v2", "no shared expert"))])
def test_causality_and_document_isolation_by_gradient(rung):
    """The gradient of one position's logits with respect to every input embedding: zero, exactly, after it and
    outside its document, and not zero before it. Experts see one token each, and the bias is frozen."""
    c = dataclasses.replace(TINY, **RUNGS[rung])
    if rung in ("v1", "v2"):
        c = dataclasses.replace(c, num_layers=5)                              # local, full and remainder layers
    params = lively(c)
    tokens = jnp.arange(c.seq_len)[None] % c.vocab_size                       # distinct tokens: rows of the table
    segments = jnp.where(jnp.arange(c.seq_len) < 9, 1, 2)[None]

    @jax.jit
    def sensitivity(position):
        f = lambda table: model.logits({**params, "embed_VD": table}, bias_of(c), tokens, segments, c, at=position)
        pull = jax.vjp(f, params["embed_VD"])[1]
        return jnp.abs(pull(jax.random.normal(jax.random.key(5), (c.vocab_size,)))[0])[:c.seq_len].sum(-1)

    for position in (0, 8, 9, 15, 23):
        seen = np.asarray(sensitivity(position)) > 0
        start = 0 if position < 9 else 9
        assert not seen[position + 1:].any(), "the future leaks"
        assert not seen[:start].any(), "another document leaks"
        assert seen[start:position + 1].all(), "the past is not read"


@pytest.mark.parametrize("layers, last_layer_full, reach", [
    (1, False, 3), (2, False, 5), (4, False, 24), (1, True, 24), (2, True, 24)])
def test_a_local_layer_sees_its_window_and_a_full_layer_everything(layers, last_layer_full, reach):
    """A window of 3 holds the token itself. In V1, fewer than four layers see the whole sequence nowhere."""
    c = dataclasses.replace(TINY, num_layers=layers, window=3, last_layer_full=last_layer_full)
    params, tokens = lively(c), jnp.arange(c.seq_len)[None]
    f = lambda table: jnp.sum(model.logits({**params, "embed_VD": table}, bias_of(c), tokens,
                                           jnp.ones_like(tokens), c, at=23) ** 2)
    seen = np.asarray(jnp.abs(jax.jit(jax.grad(f))(params["embed_VD"])).sum(-1)[:24]) > 0
    assert seen.tolist() == [i > 23 - reach for i in range(24)]


@pytest.mark.parametrize("last_layer_full", [False, True])
def test_keys_are_offset_on_full_layers_only(last_layer_full, monkeypatch):
    c = dataclasses.replace(TINY, num_layers=6, half_rope=True, partial_key_offset=True,
                            last_layer_full=last_layer_full)
    windows, offsets, attention, offset = [], [], model.kernels.attention, model.key_offset
    monkeypatch.setattr(model.kernels, "attention", lambda q, k, v, seg, window, **more: (
        windows.append(window), attention(q, k, v, seg, window, **more))[1])
    monkeypatch.setattr(model, "key_offset", lambda *a: (offsets.append(len(windows)), offset(*a))[1])
    batch = batch_of(c)
    jax.eval_shape(lambda: model.loss(init(c), bias_of(c), batch, norm_of(batch), dataclasses.replace(
        c, remat="none")))
    full = [i for i, window in enumerate(windows) if window == c.seq_len]
    assert offsets == full == ([3, 5] if last_layer_full else [3]), windows


def test_relative_positions_only():
    """RoPE scores hang on distance, so a row of one repeated document gives the same logits in both copies."""
    c = dataclasses.replace(TINY, seq_len=24)
    half = jax.random.randint(jax.random.key(1), (12,), 0, c.vocab_size)
    segments = jnp.repeat(jnp.asarray([1, 2]), 12)[None]
    out = logits(lively(c), bias_of(c), jnp.concatenate([half, half])[None], segments, c)
    np.testing.assert_allclose(out[:12], out[12:], atol=2e-5)


def test_key_offset_looks_one_back_but_not_into_another_document():
    k = jnp.arange(1.0, 5)[None, :, None, None] * jnp.ones((1, 4, 1, 4))
    got = model.key_offset(k, jnp.asarray([[1, 1, 2, 2]]))[0, :, 0]
    assert got.tolist() == [[1, 1, 0, 0], [2, 2, 1, 1], [3, 3, 0, 0], [4, 4, 3, 3]]


# ------------------------------------------------------------------------------------------------- every rung

QUICK = ("v1", "v2", "dense", "no shared expert", "bfloat16")


@pytest.mark.parametrize("rung", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in RUNGS])
def test_every_rung_has_a_finite_loss_and_a_gradient_for_every_weight(rung):
    c = dataclasses.replace(TINY, **RUNGS[rung])
    batch = batch_of(c)
    f = lambda p: model.loss(p, bias_of(c), batch, norm_of(batch), c)
    (objective, stats), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(lively(c))
    assert jnp.isfinite(objective)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(g).all() and (jnp.abs(g) > 0).any(), jax.tree_util.keystr(path)
    if c.num_experts:
        assert (stats["load_LE"].sum(1) == batch["tokens"].size * c.experts_per_token).all()


def test_a_fresh_model_knows_nothing():
    """At initialisation the loss is about log V: the head's std is small and nothing is known."""
    batch = batch_of(TINY, B=8)
    nll = loss(init(TINY), jnp.zeros((2, 8)), batch, norm_of(batch), TINY)[1]["nll"]
    assert float(nll / norm_of(batch)["weight"]) == pytest.approx(math.log(61), rel=0.05)


def test_remat_changes_memory_not_numbers():
    batch, params = batch_of(TINY), lively(TINY)
    results = []
    for remat in ("block", "none"):
        c = dataclasses.replace(TINY, remat=remat)
        f = lambda p: model.loss(p, bias_of(c), batch, norm_of(batch), c)[0]
        results.append(jax.jit(jax.value_and_grad(f))(params))
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)      # sums that cancel: 2e-7 apart, of up to 0.2


@pytest.mark.slow
def test_bfloat16_gradients_are_float32_gradients_within_rounding():
    """Sums over tokens and tiles must not be taken in bfloat16, where they stop growing at 256 equal terms."""
    c = dataclasses.replace(TINY, seq_len=512, num_experts=2, experts_per_token=1)
    batch, params = batch_of(c, B=8, documents=False), init(c)
    batch["tokens"] = batch["tokens"] % 2                                 # two rows of the embedding get it all
    grads = [jax.jit(jax.grad(lambda p: model.loss(p, jnp.zeros((2, 2)), batch, norm_of(batch), v)[0]))(params)
             for v in (c, dataclasses.replace(c, compute_dtype="bfloat16"))]
    for (path, exact), rounded in zip(jax.tree_util.tree_leaves_with_path(grads[0]), jax.tree.leaves(grads[1])):
        error = jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)
        assert error < 0.06, (jax.tree_util.keystr(path), float(error))


def test_the_loss_is_its_definition():
    """Against plain logits: cross-entropy over weighted tokens, plus both z-losses over real tokens."""
    c = dataclasses.replace(TINY, router_z=0.3, logit_z=0.2)
    batch, params = batch_of(c), lively(c)
    batch["segments"] = batch["segments"].at[1, 20:].set(0)
    batch["weights"] = (batch["segments"] != 0).astype(jnp.float32).at[0, 3].set(0.0)
    objective, stats = loss(params, bias_of(c), batch, norm_of(batch), c)
    z_BSV = logits(params, bias_of(c), batch["tokens"], batch["segments"], c).reshape(2, c.seq_len, -1)
    lse = jax.nn.logsumexp(z_BSV, axis=-1)
    nll = lse - jnp.take_along_axis(z_BSV, batch["targets"][..., None], -1)[..., 0]
    w, real = batch["weights"], batch["segments"] != 0
    want = (jnp.sum(w * nll) + 0.2 * jnp.sum(w * lse**2)) / jnp.sum(w)
    forward = jax.jit(model.forward, static_argnums=4)
    _, record = forward(params, bias_of(c), batch["tokens"], batch["segments"], c)
    want += 0.3 * jnp.mean(jnp.sum(record["z_LT"] * real.reshape(-1), 1)) / jnp.sum(real)
    np.testing.assert_allclose(objective, want, rtol=1e-5)
    np.testing.assert_allclose(stats["nll"], jnp.sum(w * nll), rtol=1e-5)


@pytest.mark.parametrize("change, words", [
    (dict(num_kv_heads=3), "num_kv_heads: expected a divisor of num_heads=4, found 3"),
    (dict(head_dim=7), "head_dim"), (dict(experts_per_token=9), "experts_per_token: expected 1 to num_experts=8"),
    (dict(partial_key_offset=True), "partial_key_offset"), (dict(num_experts=0), "num_experts"),
    (dict(compute_dtype="float16"), "compute_dtype"), (dict(remat="all"), "remat"),
    (dict(vocab_size=0), "vocab_size")])
def test_contradictory_sizes_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("shape, split", [((16, 40_000), 0), ((1280, 33_000), 0), ((40_000, 16), 1), ((16, 24), 0),
                                          ((4, 16, 24), 1)])             # the second: four pieces
def test_each_device_gets_its_share_of_the_summed_gradient(shape, split):
    """Padded for the sum where the vocabulary is large: the gradient is that of whole weights on one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    spec = Spec(*("data" if i == split else None for i in range(len(shape))))
    w, x = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), (8, *shape))

    def loss(w, x):
        return jnp.sum(jnp.sin(model.gather(w, "data", split, jnp.float32)) * x[0])
    grads = jax.jit(jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(spec, Spec("data")), out_specs=spec,
                                  check_vma=False))(w, x)
    np.testing.assert_allclose(grads, jnp.cos(w) * x.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V, D", [(33_000, 1280), (33_000, 24), (24, 16)])    # four pieces; whole; small
def test_a_lookup_s_gradient_sums_over_places_and_devices(V, D):
    """Against a gather from the whole table on one device; words that stand many times, and nowhere."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    w, x = jax.random.normal(jax.random.key(0), (V, D)), jax.random.normal(jax.random.key(1), (8 * 40, D))
    tokens = jax.random.randint(jax.random.key(2), (8 * 40,), 0, V).at[5:50].set(7).at[100].set(V - 1)

    def loss(w, x, tokens, axis="data"):
        return jnp.sum(jnp.sin(model.lookup(w, tokens, axis, jnp.float32)) * x)
    cut = Spec(None, "data")
    many = jax.jit(jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(cut, Spec("data"), Spec("data")),
                                 out_specs=cut, check_vma=False))(w, x, tokens)
    plain = jax.grad(lambda w: jnp.sum(jnp.sin(w[tokens]) * x))(w)
    np.testing.assert_allclose(many, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(w, x, tokens, None), plain, rtol=1e-5, atol=1e-5)
