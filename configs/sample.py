"""Continue a text, one token at a time, with a cache of keys and values.

    python train.py RUN_DIR --sample --prompt="ROMEO."          also a directory of convert.py

Needs weights, a config and a tokenizer, never the corpus. What a token costs does not grow with the
text: a window layer keeps its window, a full layer the last seq_len tokens, and of the experts only
the K that a token is sent to are read. The definition is model.logits over the whole text; equal
tokens at temperature 0 are tested.
Read: from_weights -> make_sampler -> advance -> layer -> Cache.   C rows of a cache; other letters as in model.py."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import data
import kernels
import model
import moe
import train


class Cache:
    """What earlier tokens left for one layer: keys and values [C,M,H], where the row of position p
    is p % C, and the half of the last key that the next one takes over [M,H/2]."""

    def __init__(self, arrays, position):
        self.keys, self.values, self.half = arrays
        self.position = position

    def key_offset(self, k_BSMH, segment_BS):
        """model.key_offset of one token: the half is the one that the token before left."""
        half = k_BSMH.shape[-1] // 2
        before, self.half = self.half, k_BSMH[0, 0, :, half:]
        return jnp.concatenate([k_BSMH[..., :half], before[None, None]], axis=-1)

    def attention(self, q_BSNH, k_BSMH, v_BSMH, segment_BS, window, platform):
        """kernels.attention of one token, which first puts its own key and value in the cache."""
        C, M, H = self.keys.shape
        row = self.position % C
        self.keys = lax.dynamic_update_slice(self.keys, k_BSMH[0], (row, 0, 0))
        self.values = lax.dynamic_update_slice(self.values, v_BSMH[0], (row, 0, 0))
        q_MGH = q_BSNH.reshape(M, -1, H)
        score_MGC = kernels.einsum32("MGH,CMH->MGC", q_MGH, self.keys) * H**-0.5
        written_C = jnp.arange(C) <= self.position
        weight_MGC = jax.nn.softmax(jnp.where(written_C, score_MGC, kernels.MASKED), axis=-1)
        y_MGH = jnp.einsum("MGC,CMH->MGH", weight_MGC.astype(self.values.dtype), self.values)
        return y_MGH.reshape(q_BSNH.shape)


def empty(c):
    """The arrays of every layer's Cache before the first token."""
    def one(i):
        C = c.seq_len if model.sees_all(c, i) else min(c.window or c.seq_len // 2, c.seq_len)
        zeros = lambda *shape: jnp.zeros((*shape, c.num_kv_heads, c.head_dim), c.compute_dtype)
        return zeros(C), zeros(C), zeros()[:, c.head_dim // 2:]
    return [one(i) for i in range(c.num_layers)]


def layer(x_TD, p, bias_E, cache, rotation, full, c, platform):
    """model.block for one token: the same, but for the experts, of which only K are read."""
    one = jnp.ones((1, 1), jnp.int32)
    a_TD = model.gated_norm(x_TD, p, "attn")
    x_TD = x_TD + model.attend(a_TD, p, one, rotation, full, c, platform, cache)
    m_TD = model.gated_norm(x_TD, p, "mlp")
    if c.shared_dim:
        h_TZ = jax.nn.silu(m_TD @ p["shared_gate_DZ"]) * (m_TD @ p["shared_up_DZ"])
        x_TD = x_TD + h_TZ @ p["shared_down_ZD"]
    if c.num_experts:
        expert_TK, weight_TK, _ = moe.route(m_TD, p["router_DE"], bias_E, c)
        gate_KDF, up_KDF, down_KFD = (jnp.take(p[name], expert_TK[0], axis=0, mode="clip")
                                      for name in ("gate_EDF", "up_EDF", "down_EFD"))
        h_KF = (jax.nn.silu(jnp.einsum("TD,KDF->KF", m_TD, gate_KDF))
                * jnp.einsum("TD,KDF->KF", m_TD, up_KDF))
        y_KD = kernels.einsum32("KF,KFD->KD", h_KF, down_KFD)
        x_TD = x_TD + (weight_TK @ y_KD).astype(x_TD.dtype)
    return x_TD


def advance(top, layers, arrays, token, position, angles, c, platform):
    """One token more: (float32 logits [V] of the next one, the new arrays of all caches). angles:
    model.rope_angles of a sequence that is long enough."""
    x_TD = kernels.embed(top["embed_VD"], token[None], None, c.compute_dtype)
    x_TD, new = model.gated_norm(x_TD, top, "embed"), []
    rotation = [table[position][None] for table in angles]
    for i, (p, bias_E) in enumerate(layers):
        full, cache = model.sees_all(c, i), Cache(arrays[i], position)
        turn = None if full and c.nope_on_full else rotation
        x_TD = layer(x_TD, p, bias_E, cache, turn, full, c, platform)
        new.append((cache.keys, cache.values, cache.half))
    x_TD = model.gated_norm(x_TD, top, "final")
    return jnp.dot(x_TD[0], top["head_DV"], preferred_element_type=jnp.float32), new


def unstack(params, bias_LE, c):
    """(the weights outside the layers, [(weights, bias) of each layer]), in the compute type."""
    specs = model.param_specs(c)
    top = {name: w for name, w in params.items() if name not in ("layers", "embed_VD")}
    top = model.gather_params(top, specs, c, False) | {"embed_VD": params["embed_VD"]}
    stack = model.gather_params(params["layers"], specs["layers"], c, False)
    return top, [(jax.tree.map(lambda w: w[i], stack), bias_LE[i]) for i in range(c.num_layers)]


def make_sampler(c, tokenizer, temperature=0.8, top_k=0):
    """A function (params, bias_LE, prompt, n, seed) -> text of prompt and n more tokens, on one
    device. It stops at the end of a document. An empty prompt is the start of a document.
    temperature 0 takes the likeliest token; top_k > 0 chooses among so many likeliest."""
    c, one = train.serving(c), jax.devices()[0]
    def pick(logits_V, key):
        logits_V = jnp.where(jnp.arange(c.vocab_size) < tokenizer.vocab_size, logits_V, -jnp.inf)
        if temperature == 0:
            return jnp.argmax(logits_V)
        if top_k:
            least = lax.top_k(logits_V, min(top_k, tokenizer.vocab_size))[0][-1]
            logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
        return jax.random.categorical(key, logits_V / temperature)
    def step(weights, arrays, token, position, angles, key):
        logits_V, arrays = advance(*weights, arrays, token, position, angles, c, one.platform)
        return pick(logits_V, key), arrays
    step = jax.jit(step, donate_argnums=1)
    def sample(params, bias_LE, prompt, n, seed=0):
        params, bias_LE = jax.device_put((params, bias_LE), one)
        weights = jax.jit(unstack, static_argnums=2)(params, bias_LE, c)
        tokens = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eot]
        read, length = len(tokens), len(tokens) + n
        angles = model.rope_angles(dataclasses.replace(c, seq_len=max(c.seq_len, length)))
        arrays = empty(c)
        for position in range(length - 1):
            key = jax.random.fold_in(jax.random.key(seed), max(0, position + 1 - read))
            new, arrays = step(weights, arrays, tokens[position], position, angles, key)
            if position + 1 < read:
                continue
            if int(new) == tokenizer.eot:
                break
            tokens.append(int(new))
        return tokenizer.decode(itertools.dropwhile(lambda i: i == tokenizer.eot, tokens))
    return sample


def from_weights(folder, overrides):
    """--sample of a directory of safetensors. ConfigError for keys that do not belong to a sample, and
    if the directory names no tokenizer or another model's."""
    from configs import convert
    weights, keys = convert.open_weights(folder), dict(map(train.read_override, overrides))
    takes = "prompt", "sample_tokens", "sample_seed", "temperature", "top_k", "tokenizer"
    if other := sorted(keys.keys() - {*takes}):
        train.refuse("command line", f"only the keys {', '.join(takes)} beside {folder}", other[0])
    name = keys.get("tokenizer") or convert.tokenizer_name(folder)
    if not name:
        train.refuse(folder, "a tokenizer.tiktoken", "none", "name one with --tokenizer=")
    defaults = dict(mixture=(("none", 1.0),), steps=1, batch_size=1, tokenizer=str(name))
    try:
        t, tokenizer = train.TrainConfig(**defaults | keys), data.load_tokenizer(name)
    except ValueError as error:
        raise train.ConfigError(f"command line: {error}") from None
    if tokenizer.vocab_size > weights.config.vocab_size:
        train.refuse("tokenizer", f"at most {weights.config.vocab_size} ids, as {folder} has",
                     f"{tokenizer.vocab_size} of {tokenizer.name}")
    stacks = {}
    for path, layer, _ in weights.names:
        stacks.setdefault(path, []).append(weights.read(path, layer))
    layered = lambda path: path.startswith("layers/")
    params = model.map_params(
        lambda path, _: np.stack(stacks[path]) if layered(path) else stacks[path][0], weights.config)
    bias_LE = np.stack(stacks.get("bias_LE", [np.zeros(1)] * weights.config.num_layers))
    draw = make_sampler(weights.config, tokenizer, t.temperature, t.top_k)
    train.log(draw(params, bias_LE, t.prompt, t.sample_tokens, t.sample_seed))
    return 0
