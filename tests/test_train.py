"""Training: config, heuristics, optimizers, the step on one and eight devices, resume, and every bad input."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

import data
import model
import train

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
mixture = (({text!r}, 1.0),)
tokenizer = "bytes"
vocab_size = 257
seq_len = 32
hidden_dim = 16
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 8
shared_dim = 16
num_experts = 4
experts_per_token = 2
expert_dim = 8
gated_norm_rank = 4
steps = 6
batch_size = 8
warmup = 0.2
log_every = 2
eval_every = 4
save_every = 3
sample_tokens = 4
data_dir = {cache!r}
compiled_dir = {compiled!r}
run_dir = {run!r}
"""


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Thirty documents of nonsense with some structure, one file."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioubcdfglmnprst"), rng.integers(2, 7))) for _ in range(200)]
    folder = tmp_path_factory.mktemp("text")
    with open(folder / "nonsense.jsonl", "w") as f:
        for _ in range(30):
            f.write(json.dumps({"text": " ".join(rng.choice(words, rng.integers(50, 300)))}) + "\n")
    return folder


@pytest.fixture
def config(text, tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(text=str(text / "nonsense.jsonl"), cache=str(text / "cache"),
                                  compiled=str(text / "compiled"),
                                  run=str(tmp_path / "run")))
    return path


def load(config, **keys):
    return train.load_config(config, [f"--{k}={v}" for k, v in keys.items()])


def synthetic(c, t, step):
    """A batch of random tokens as data.batch_at would give it, and less even: documents end, rows are padded by
    different lengths and one is nearly empty, so that a mean of the devices' means is not the mean."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, c.vocab_size, (t.batch_size, c.seq_len + 1)).astype(np.int32)
    ends = rng.random((t.batch_size, c.seq_len)) < 0.1
    length_B = rng.integers(c.seq_len // 2, c.seq_len + 1, (t.batch_size, 1))
    length_B[0] = 2
    segments = np.where(np.arange(c.seq_len) < length_B, np.cumsum(ends, 1) - ends + 1, 0).astype(np.int32)
    return data.Batch(tokens[:, :-1], tokens[:, 1:], segments, ((segments != 0) & ~ends).astype(np.float32))


def run_steps(c, t, steps, seed=0):
    """The states' losses over some steps of synthetic data, and the last state."""
    mesh = train.make_mesh(c, t)
    state = jax.jit(lambda: train.make_state(c, t, jax.random.key(seed)),
                    out_shardings=train.state_shardings(c, t, mesh))()
    step, losses = train.make_train_step(c, t, mesh), []
    for i in range(steps):
        state, metrics = step(state, train.put(synthetic(c, t, i), mesh, t.accumulate))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


def assert_same_bits(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


# -------------------------------------------------------------------------------------------------- heuristics

def test_the_129b_rates_come_out_of_the_v1_heuristic():
    r = train.heuristic("v1", 120_332 * 2048 * 4096, 2048 * 4096, 5120)
    assert f"{r.adam_lr:.7f} {r.matrix_lr:.7f} {r.beta2:.2f} {r.eps:.4e}" == "0.0013392 0.0058031 0.95 3.3565e-15"


def test_the_67b_rates_come_out_of_the_v2_heuristic():
    """Marin's 10T run before its batch change: muonh .003733, adam .000861 at 4096 sequences of 8192."""
    r = train.heuristic("v2", 157_500 * 8192 * 8192, 4096 * 8192, 2560)
    assert r.matrix_lr == pytest.approx(0.003733, rel=0.03) and r.adam_lr == pytest.approx(0.000861, rel=0.03)
    assert train.heuristic("v2", 1e12, 1e6, 512).matrix_lr == pytest.approx(
        18.31 * 1e12**-0.395 * 512**-0.15 * (1e6 / 4096) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_no_heuristic_gives_a_rate_above_its_cap(recipe):
    r = train.heuristic(recipe, 1e4, 2048, 64)                  # Adam's rate is below the cap, the matrices' above
    assert r.adam_lr < 0.05 < 13 / 3 * r.adam_lr and r.matrix_lr == 0.05
    assert train.heuristic(recipe, 1e2, 2048, 64)[:2] == (0.05, 0.05)


def test_a_rate_in_the_config_replaces_the_heuristic(config):
    c, t = load(config, adam_lr=0.5, beta2=0.9)
    assert train.rates(c, t).adam_lr == 0.5 and train.rates(c, t).beta2 == 0.9
    assert train.rates(c, t).matrix_lr == train.rates(*load(config)).matrix_lr


def shares(config, steps, at, **keys):
    _, t = load(config, steps=steps, **keys)
    return [float(train.lr_share(t, step)) for step in at]


def test_schedules(config):
    """The first step has rate 0, the last one a rate above the floor; the warm-up has int(share * steps) steps."""
    linear = shares(config, 400, (0, 20, 39, 40, 220, 399), warmup=0.1)             # smoke.py's
    np.testing.assert_allclose(linear, [0, 0.5, 39 / 40, 1, 0.5, 1 / 360], atol=1e-6)
    floor = shares(config, 100, (0, 10, 55, 99), warmup=0.1, min_lr_ratio=0.1)
    np.testing.assert_allclose(floor, [0, 1, 0.55, 0.11], atol=1e-6)
    wsd = shares(config, 100, (0, 9, 10, 50, 80, 90, 99), warmup=0.1, schedule="wsd", decay=0.2, min_lr_ratio=0.1)
    np.testing.assert_allclose(wsd, [0, 0.9, 1, 1, 1, 0.55, 0.145], atol=1e-6)
    cut = shares(config, 39, (0, 2, 3), warmup=0.1)                                 # 3.9 steps are 3
    np.testing.assert_allclose(cut, [0, 2 / 3, 1], atol=1e-6)
    assert shares(config, 100, (0,), warmup=0.0) == [1]
    assert shares(config, 100, (0, 99), warmup=0.0, schedule="wsd", decay=0.0) == [1, 1]


def test_a_run_of_one_step_learns_or_is_refused(config):
    c, t = load(config, steps=1)
    before = jax.jit(model.init, static_argnums=0)(c, jax.random.key(0))
    _, state = run_steps(c, t, 1)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, state.params)
    assert float(train.lr_share(t, 0)) == 1 and all(jax.tree.leaves(moved))
    for steps in (1, 6):
        with pytest.raises(train.ConfigError, match="warmup"):
            load(config, steps=steps, warmup=1.0)


# -------------------------------------------------------------------------------------------------- optimizers

def test_adamh_is_its_formula():
    """Two updates of a stack of expert matrices against the recipe's formula in numpy."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2, 3, 4, 5))
    rule = train.hyperball(optax.scale_by_adam(0.9, 0.99, 1e-12), lambda step: 0.1 / (step + 1))
    params, m, v, want = jnp.asarray(w, jnp.float32), 0, 0, w
    state = rule.init(params)
    for i in range(2):
        g = rng.standard_normal(w.shape)
        updates, state = rule.update(jnp.asarray(g, jnp.float32), state, params)
        params = params + updates
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        u = (m / (1 - 0.9 ** (i + 1))) / (np.sqrt(v / (1 - 0.99 ** (i + 1))) + 1e-12)
        norm = lambda x: np.sqrt((x * x).sum((-2, -1), keepdims=True))
        moved = want - 0.1 / (i + 1) * norm(want) * u / norm(u)
        want = moved * norm(want) / norm(moved)
    np.testing.assert_allclose(params, want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(norm(np.asarray(params)), norm(w), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (3, 6, 16), (2, 3, 20, 5)])
def test_orthogonalize_takes_singular_values_to_one(shape):
    m = jax.random.normal(jax.random.key(0), shape)
    values = np.linalg.svd(np.asarray(train.orthogonalize(m), np.float64), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    turned = np.asarray(train.orthogonalize(m.mT).mT)
    np.testing.assert_allclose(turned, train.orthogonalize(m), atol=0.03)           # bfloat16


@pytest.mark.parametrize("optimizer", ["adamh", pytest.param("muonh", marks=pytest.mark.slow)])
def test_groups_own_what_the_recipe_says_and_norms_never_move(config, optimizer):
    c, t = load(config, optimizer=optimizer)
    start = jax.jit(model.init, static_argnums=0)(c, jax.random.key(0))
    losses, state = run_steps(c, t, 5)
    kinds = model.walk(lambda path, w: w.kind, c)
    for (path, before), after, kind in zip(jax.tree_util.tree_leaves_with_path(start),
                                           jax.tree.leaves(state.params), jax.tree.leaves(kinds)):
        assert (np.asarray(before) != np.asarray(after)).any(), f"{path} did not train"
        if kind != "adam":
            np.testing.assert_allclose(train.matrix_norm(after), train.matrix_norm(before), rtol=1e-5)
    moments = {model.path_name(p).partition("/")[0] for p, leaf in jax.tree_util.tree_leaves_with_path(state.opt)
               if leaf.ndim > 1}
    assert moments == ({"adam", "adamh", "adamh_expert"} if optimizer == "adamh" else {"adam", "adamh", "muonh"})


def test_muonh_is_its_formula():
    """Two updates against the recipe in numpy, with an exact polar factor in place of Newton-Schulz."""
    rng = np.random.default_rng(0)
    w, momentum = rng.standard_normal((2, 4, 6)), 0
    muon = optax.chain(optax.trace(0.95, nesterov=True), optax.stateless(
        lambda ms, _: jax.tree.map(train.orthogonalize, ms)))
    rule, want = train.hyperball(muon, lambda step: 0.1), w
    params, norm = jnp.asarray(w, jnp.float32), lambda x: np.sqrt((x * x).sum((-2, -1), keepdims=True))
    state = rule.init(params)
    for _ in range(2):
        g = rng.standard_normal(w.shape)
        updates, state = rule.update(jnp.asarray(g, jnp.float32), state, params)
        params = params + updates
        momentum = 0.95 * momentum + g
        left, _, right = np.linalg.svd(0.95 * momentum + g, full_matrices=False)
        u = left @ right
        moved = want - 0.1 * norm(want) * u / norm(u)
        want = moved * norm(want) / norm(moved)
    # Newton-Schulz leaves singular values in 0.7..1.2: directions agree to a few per cent of the step of 0.1
    assert norm(np.asarray(params) - want).max() < 0.05 * norm(w).max() * 0.2
    np.testing.assert_allclose(norm(np.asarray(params)), norm(w), rtol=1e-5)


@pytest.mark.parametrize("change, owners", [
    ([], {"adam": ("embed_VD", "router_DE", "gain_D", "head_gate_DN"),
          "experts": ("_EDF", "_EFD", "shared_gate_DZ", "shared_up_DZ", "shared_down_ZD")}),
    (["--num_experts=0", "--experts_per_token=0", "--expert_dim=0"],
     {"adam": ("embed_VD", "gain_D", "head_gate_DN")})], ids=["moe", "dense"])
def test_clipping_is_per_group_and_clips(change, owners):
    """Each group's gradient is scaled to norm `clip` by its own norm, and by nobody else's. The groups are Adam's
    weights, the experts (routed and shared), and all other matrices."""
    tiny = ["--clip=1.0", "--num_layers=1", "--vocab_size=8", "--hidden_dim=32", "--shared_dim=32"]
    c, t = train.load_config(ROOT / "configs/smoke.py", tiny + change)
    params = jax.jit(model.init, static_argnums=0)(c, jax.random.key(0))
    optimizer = train.make_optimizer(c, t)
    update, start = jax.jit(optimizer.update), optimizer.init(params)
    names = [model.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    group = {name: next((g for g, ends in owners.items() if name.endswith(ends)), "matrices") for name in names}

    def moments(size):
        """Adam's first moment of every weight, after one gradient that is size[its group] everywhere."""
        grads = jax.tree_util.tree_map_with_path(
            lambda path, w: jnp.full_like(w, size[group[model.path_name(path)]]), params)
        _, state = update(grads, start, params)
        return {model.path_name(path).partition("/")[2]: leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(state)
                if ".mu" in jax.tree_util.keystr(path)}

    plain = dict.fromkeys(group.values(), 1.0)
    for spiked in plain:
        before, after = moments(plain), moments(plain | {spiked: 1e6})
        for name in names:
            if group[name] != spiked:
                assert_same_bits(before[name], after[name])
        norm = np.sqrt(sum(np.sum(np.square(after[n], dtype=np.float64)) for n in names if group[n] == spiked))
        assert norm == pytest.approx((1 - t.beta1) * t.clip, rel=1e-4), "clipped, then (1 - beta1) of it"


def test_moments_are_sharded_like_their_weights(config):
    c, t = load(config, devices=2)
    shardings = train.state_shardings(c, t, train.make_mesh(c, t))
    specs, checked = model.walk(lambda path, w: w.spec, c), 0
    by_name = {model.path_name(p): spec for p, spec in jax.tree_util.tree_leaves_with_path(
        specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))}
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings.opt):
        name = model.path_name(path).partition("/")[2]
        if name:
            assert sharding.spec == by_name[name], name
            checked += 1
    assert checked == 2 * len(by_name), "Adam keeps two moments of every weight"


# ---------------------------------------------------------------------------------------------------- the step

def test_one_device_equals_eight(config):
    """Losses within 2e-6; not bit-equal, because sums are taken in another order. 50 steps: below."""
    runs = {n: run_steps(*load(config, devices=n), 6) for n in (1, 8)}
    difference = np.abs(runs[1][0] - runs[8][0]).max()
    assert difference < 2e-6, difference
    np.testing.assert_allclose(runs[1][1].bias_LE, runs[8][1].bias_LE, atol=1e-4)


@pytest.mark.slow
def test_losses_hang_on_no_mesh_and_no_split_of_the_batch(config, capsys):
    """The bound that README states, measured: every loss of 50 steps, on other devices and in other microbatches,
    is within 2e-6 of one device's, relative to it."""
    splits = [dict(devices=2), dict(devices=4), dict(devices=8), dict(devices=8, expert_parallel=4),
              dict(devices=8, replicas=2, expert_parallel=2), dict(accumulate=4), dict(devices=2, accumulate=2)]
    want = run_steps(*load(config, **dict(devices=1, steps=50)), 50)[0]
    apart = {}
    for split in splits:
        got = run_steps(*load(config, **dict(devices=1, steps=50) | split), 50)[0]
        apart[str(split)] = float(np.max(np.abs(got - want) / want))
    with capsys.disabled():
        print("\nlargest relative difference of a loss over 50 steps against one device:", *(
            f"  {difference:.1e}  {split}" for split, difference in apart.items()), sep="\n")
    assert max(apart.values()) < 2e-6


@pytest.mark.slow
def test_accumulation_does_not_change_the_result(config):
    (a, one), (b, four) = (run_steps(*load(config, accumulate=n, devices=2), 6) for n in (1, 4))
    np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(one.bias_LE, four.bias_LE, atol=1e-5)
    for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params)):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.slow
def test_the_same_run_twice_is_bit_equal(config):
    (a, one), (b, two) = (run_steps(*load(config, devices=2), 5) for _ in range(2))
    assert a.tolist() == b.tolist()
    assert_same_bits(one, two)


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart(config):
    c, t = load(config, steps=150, hidden_dim=32, batch_size=2, devices=1, matrix_lr=0.05, adam_lr=0.02)
    mesh = train.make_mesh(c, t)
    state = jax.jit(lambda: train.make_state(c, t, jax.random.key(0)))()
    step = train.make_train_step(c, t, mesh)
    batch = train.put(synthetic(c, t, 0), mesh)
    for _ in range(t.steps):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.5, "from log 257 = 5.5"


def test_the_bias_routes_one_step_late_and_none_leaves_it_at_zero(config):
    _, balanced = run_steps(*load(config, devices=2), 3)
    _, free = run_steps(*load(config, devices=2, balancer="none"), 3)
    assert float(jnp.abs(balanced.bias_LE).max()) > 0 and float(jnp.abs(free.bias_LE).max()) == 0
    first = [run_steps(*load(config, devices=2, balancer=b), 1)[0][0] for b in ("quantile", "none")]
    assert first[0] == first[1], "the first step routes on the initial bias, whatever the balancer"


def test_evaluation_reads_and_never_writes(config):
    c, t = load(config, devices=2)
    mesh = train.make_mesh(c, t)
    mixture = data.open_mixture(t.mixture, t.tokenizer, t.data_dir, c.vocab_size, seq_len=c.seq_len, quiet=True)
    _, state = run_steps(c, t, 2)
    before = jax.tree.map(np.array, state)
    score = train.make_eval_step(c, mesh, jnp.asarray(mixture.tokenizer.bytes_V, jnp.float32))
    first, second = (train.evaluate(state, score, mixture, c, t, mesh) for _ in range(2))
    assert first == second
    assert_same_bits(before, state)
    (domain,) = mixture.heldout
    # bytes tokenizer: every scored token is one byte but the ends of documents, which stand for none
    d, ends = first[domain], sum((p == mixture.tokenizer.eot).sum() for p in mixture.heldout[domain].parts)
    assert d["bytes"] == d["tokens"] - ends and first["macro"]["loss"] == d["loss"]
    assert d["bpb"] == pytest.approx(d["loss"] * d["tokens"] / d["bytes"] / np.log(2), rel=1e-6)


def test_sampling_continues_the_prompt_and_is_reproducible(config):
    c, t = load(config, temperature=0.0)
    sample = train.make_sampler(c, t, data.load_tokenizer("bytes"))
    params, bias_LE = jax.jit(model.init, static_argnums=0)(c, jax.random.key(0)), jnp.zeros((2, 4))
    long = sample(params, bias_LE, "to be or not to be, that is", 40)                # past the window of 32
    assert long.startswith("to be or not to be, that is") and len(long) > 40
    assert long == sample(params, bias_LE, "to be or not to be, that is", 40)
