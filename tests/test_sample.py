"""Sampling with a cache against the definition: all logits anew for every token."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import model
from configs import sample

BYTES = data.load_tokenizer("bytes")
V1 = model.ModelConfig(
    vocab_size=300, seq_len=24, hidden_dim=16, num_layers=5, num_heads=4, num_kv_heads=2,
    head_dim=8, shared_dim=24, num_experts=8, experts_per_token=2, expert_dim=12, window=5,
    gated_norm_rank=4)
V2 = dict(half_rope=True, last_layer_full=True, combine_sum=2.5)
CONFIGS = {
    "two layers": dataclasses.replace(V1, num_layers=2, partial_key_offset=True, **V2),
    "v1": V1, "v2": dataclasses.replace(V1, partial_key_offset=True, **V2),
    "the published 67B": dataclasses.replace(V1, nope_on_full=True, qk_scale=1.5703, **V2),
    "dense": dataclasses.replace(V1, num_experts=0, experts_per_token=0, expert_dim=0),
    "no shared expert": dataclasses.replace(V1, shared_dim=0)}


def weights(c):
    """Weights that leave no term idle, and a bias that changes the choice of experts."""
    rng = np.random.default_rng(0)
    draw = lambda path, w: rng.normal(w.init == "ones", 0.3, w.shape).astype(np.float32)
    bias_LE = rng.normal(0, 0.5, (c.num_layers, max(1, c.num_experts))).astype(np.float32)
    return jax.tree.map(jnp.asarray, (model.map_params(draw, c), bias_LE))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_with_a_cache_are_those_of_the_whole_text(name):
    c = CONFIGS[name]
    params, bias_LE = weights(c)
    tokens = np.random.default_rng(1).integers(0, c.vocab_size, c.seq_len)
    want = jax.jit(lambda p: model.logits(p, bias_LE, tokens[None], np.ones((1, c.seq_len), np.int32),
                                          c))(params)
    top, layers = sample.unstack(params, bias_LE, c)
    step = jax.jit(sample.advance, static_argnums=(6, 7))
    arrays, angles = sample.empty(c), model.rope_angles(c)
    for position, token in enumerate(tokens):
        got, arrays = step(top, layers, arrays, token, position, angles, c, "cpu")
        assert np.max(np.abs(got - want[position])) < 2e-5 * np.max(np.abs(want)), position
    assert [len(keys) for keys, *_ in arrays] == {"two layers": [5, 24], "v2": [5, 5, 5, 24, 24]}.get(
        name, [5, 5, 5, 24, 24 if c.last_layer_full else 5])


def test_greedy_text_is_that_of_the_definition_and_goes_on_past_seq_len():
    c = CONFIGS["two layers"]
    params, bias_LE = weights(c)
    text = sample.make_sampler(c, BYTES, temperature=0)(params, bias_LE, "abc", 50)
    tokens = [*b"abc"]
    row = jax.jit(lambda tokens, n: model.logits(
        params, bias_LE, tokens[None], (jnp.arange(24) < n)[None].astype(jnp.int32), c, at=n - 1))
    while len(tokens) < 24:
        padded = np.array(tokens + [0] * (24 - len(tokens)), np.int32)
        tokens.append(int(jnp.argmax(row(padded, len(tokens))[:257])))
    assert text.startswith(BYTES.decode(tokens)) and len(tokens) == 24
    assert text == sample.make_sampler(c, BYTES, top_k=1)(params, bias_LE, "abc", 50)


@pytest.mark.slow
def test_seeds_and_the_start_of_a_document():
    c = CONFIGS["two layers"]
    params, bias_LE = weights(c)
    draw = sample.make_sampler(c, BYTES, top_k=5)
    one, same, other = (draw(params, bias_LE, "", 30, seed) for seed in (0, 0, 1))
    assert one == same != other and "<|end_of_text|>" not in one
