"""Weights that leave and come back: configs/convert.py against the model and against the library."""
import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import data
import model
import train
from configs import convert, report, sample

safetensors = pytest.importorskip("safetensors", reason="needs: pip install safetensors")
from safetensors.numpy import load_file, save_file  # noqa: E402

TINY = dict(vocab_size=300, seq_len=24, hidden_dim=16, num_layers=5, num_heads=4, num_kv_heads=2,
            head_dim=8, shared_dim=24, num_experts=8, experts_per_token=2, expert_dim=12)
PUBLISHED = model.ModelConfig(**TINY, **convert.FAMILY, qk_scale=1.5703274, router_z=0.0)
OTHERS = {"v1": model.ModelConfig(**TINY, gated_norm_rank=4),
          "dense": model.ModelConfig(**TINY | dict(num_experts=0, experts_per_token=0,
                                                   expert_dim=0), gated_norm_rank=4)}


def save(c, folder, step=3):
    """A run directory with a checkpoint of random weights and bias. Returns its state."""
    t = train.TrainConfig(mixture=(("none", 1.0),), tokenizer="bytes", steps=9, batch_size=8,
                          run_dir=str(folder))
    mesh = train.make_mesh(c, t)
    state = jax.jit(lambda: train.make_state(c, t, jax.random.key(1)),
                    out_shardings=train.state_shardings(c, t, mesh))()
    bias = jax.random.normal(jax.random.key(2), state.bias_LE.shape)
    state = state._replace(step=np.int32(step), bias_LE=bias)
    config = {"model": dataclasses.asdict(c), "train": dataclasses.asdict(t)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints = train.Checkpoints(t)
    checkpoints.open()
    assert not checkpoints.save(state, config) and not checkpoints.wait()
    checkpoints.close()
    return state


def assert_equal(weights, state):
    """Every weight and the bias, bit by bit."""
    whole = train.leaves_by_name(jax.device_get(state))
    for path, layer, shape in weights.names:
        want = whole[convert.leaf_name(path)]
        want = want if layer is None else want[layer]
        assert want.shape == tuple(shape)
        np.testing.assert_array_equal(weights.read(path, layer), want, f"{path} {layer}")
        index = tuple(slice(n // 2, None) for n in shape)
        np.testing.assert_array_equal(weights.read(path, layer, index), want[index])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(run directory, its state, the public directory made of it) of a model with a public name."""
    folder = tmp_path_factory.mktemp("published")
    state = save(PUBLISHED, folder / "run")
    assert convert.main([str(folder / "run"), f"--to={folder / 'public'}"]) is None
    return folder / "run", state, folder / "public"


def test_there_and_back_is_bit_equal(published, tmp_path):
    run, state, public = published
    assert_equal(convert.open_weights(run), state)
    assert_equal(convert.open_weights(f"{run}@3"), state)
    assert_equal(convert.open_weights(run / "checkpoints"), state)
    weights = convert.open_weights(public)
    assert_equal(weights, state)
    assert weights.config == dataclasses.replace(PUBLISHED, window=12)      # seq_len // 2, said
    assert convert.main([str(public), f"--to={tmp_path / 'ours'}"]) is None
    assert_equal(convert.open_weights(tmp_path / "ours"), state)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_without_a_public_name_gets_our_schema(name, tmp_path):
    state = save(OTHERS[name], tmp_path / "run")
    assert convert.main([str(tmp_path / "run"), f"--to={tmp_path / 'ours'}"]) is None
    assert json.loads((tmp_path / "ours/config.json").read_text())["schema"] == convert.OURS
    weights = convert.open_weights(tmp_path / "ours")
    assert_equal(weights, state)
    assert weights.config == OTHERS[name]


def test_the_library_reads_what_the_public_schema_says(published):
    _, state, public = published
    found, layers = load_file(public / "model.safetensors"), state.params["layers"]
    np.testing.assert_array_equal(found["model.layers.4.self_attn.q_proj.weight"],
                                  layers["query_DQ"][4].T)
    np.testing.assert_array_equal(found["model.layers.0.mlp.experts.down_proj.weight"][7],
                                  layers["down_EFD"][0, 7].T)
    np.testing.assert_array_equal(found["model.layers.2.mlp.router.bias"], state.bias_LE[2])
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], state.params["embed_VD"])
    config = json.loads((public / "config.json").read_text())
    assert not convert.ALIASES.keys() & config.keys()
    assert config["initializer_range"] == 0.125 and config["qk_mult"] == 1.5703274


def test_bfloat16_rounds_the_weights_and_leaves_the_bias(published, tmp_path):
    run, state, _ = published
    assert convert.main([str(run), f"--to={tmp_path / 'half'}", "--dtype=bfloat16"]) is None
    weights, want = convert.open_weights(tmp_path / "half"), state.params["head_DV"]
    np.testing.assert_array_equal(weights.read("head_DV", None),
                                  want.astype("bfloat16").astype(np.float32))
    np.testing.assert_array_equal(weights.read("bias_LE", 1), state.bias_LE[1])

    tensors = load_file(tmp_path / "half/model.safetensors")        # Marin's exporter rounds it too
    save_file({name: x.astype("bfloat16") for name, x in tensors.items()},
              tmp_path / "half/model.safetensors")
    np.testing.assert_array_equal(convert.open_weights(tmp_path / "half").read("bias_LE", 1),
                                  state.bias_LE[1].astype("bfloat16").astype(np.float32))


@pytest.mark.slow
def test_a_converted_directory_can_be_sampled_from(published, tmp_path, capsys):
    """As the run can, with the same text; its tokenizer is in it."""
    _, state, source = published
    public = tmp_path / "public"
    shutil.copytree(source, public)
    words = ["--sample", "--prompt=ab", "--sample_tokens=9", "--temperature=0"]
    assert train.main([str(public), *words]) == 0
    want = sample.make_sampler(PUBLISHED, data.load_tokenizer("bytes"), temperature=0)(
        state.params, state.bias_LE, "ab", 9)
    assert want in capsys.readouterr().out
    (tmp_path / "310").mkdir()
    words310 = [" ".join(f"w{i}x{7 * i}" for i in range(999))]
    report.keep_sources(tmp_path / "310", data.train_bpe(words310, 310), 0)
    for wrong, message in (("--temperature=-1", "temperature: expected zero"), ("--seq_len=64", "found seq_len"),
                           (f"--tokenizer={tmp_path / '310'}", "at most 300 ids")):
        assert train.main([str(public), *words[:3], wrong]) == 2 and message in capsys.readouterr().err
    (public / "config.json").write_text((public / "config.json").read_text().replace("bytes", "x"))
    assert train.main([str(public), *words]) == 2
    assert "expected a tokenizer.tiktoken, found none" in capsys.readouterr().err


def test_many_files_with_an_index_and_experts_one_by_one(published, tmp_path, monkeypatch):
    run, state, public = published
    monkeypatch.setattr(convert, "FILE_BYTES", 20_000)
    assert convert.main([str(run), f"--to={tmp_path / 'many'}"]) is None
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert_equal(convert.open_weights(tmp_path / "many"), state)
    next((tmp_path / "many").glob("model-00002-*")).unlink()
    with pytest.raises(train.ConfigError, match="the file model-00002-of.* that .*index.json names"):
        convert.open_weights(tmp_path / "many")

    single = {}
    for name, x in load_file(public / "model.safetensors").items():
        if ".experts." in name:
            single |= {name.replace(".experts.", f".experts.{e}."): x[e].copy() for e in range(8)}
        else:
            single[name] = x
    (tmp_path / "single").mkdir()
    save_file(single, tmp_path / "single/model.safetensors")
    shutil.copy(public / "config.json", tmp_path / "single")
    assert_equal(convert.open_weights(tmp_path / "single"), state)


def test_names_with_an_at_and_damage_are_told(published, tmp_path):
    run, _, public = published
    with pytest.raises(train.ConfigError, match="sign@0.01-seed0: expected a checkpoint"):
        convert.open_weights(tmp_path / "sign@0.01-seed0")
    shutil.copytree(public, tmp_path / "public")
    (tmp_path / "public/model.safetensors.index.json").write_text('{"weight_map"')
    with pytest.raises(train.ConfigError, match="index.json: expected a weight_map"):
        convert.open_weights(tmp_path / "public")
    (tmp_path / "public/model.safetensors.index.json").unlink()
    shutil.copy(public / "model.safetensors", tmp_path / "public/model-00002-of-00002.safetensors")
    with pytest.raises(train.ConfigError, match="in one file, found it in"):
        convert.open_weights(tmp_path / "public")
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints/3/state").rglob("d/*"):
        path.write_bytes(b"")
    weights = convert.open_weights(tmp_path / "run")
    with pytest.raises(train.ConfigError, match="as it was saved, found"):
        weights.read(*weights.names[0][:2])


ROUTER = "model.layers.1.mlp.router"
QUERY = "model.layers.0.self_attn.q_proj.weight"
BAD_TENSORS = {     # the message, and what is done to the tensors
    f"expected a tensor {QUERY}, found none": lambda x: x.pop(QUERY),
    "expected a tensor .*experts.0.up_proj.weight, found none": lambda x: x.pop(
        "model.layers.0.mlp.experts.up_proj.weight"),
    "expected no other tensors, found lm_head.bias and 0 more": lambda x: x.update(
        {"lm_head.bias": np.zeros(3, np.float32)}),
    rf"{QUERY}: expected shape \[32, 16\], found \[16, 32\]": lambda x: x.update(
        {QUERY: x[QUERY].T.copy()}),
    f"{QUERY}: expected F32 or BF16, found F64": lambda x: x.update(
        {QUERY: x[QUERY].astype(np.float64)}),
    f"{ROUTER}.bias: expected F32 or BF16, found F16": lambda x: x.update(
        {f"{ROUTER}.bias": x[f"{ROUTER}.bias"].astype(np.float16)}),
}
BAD_CONFIGS = {
    "expected the spelling 'hidden_size', found 'hidden_dim'": dict(hidden_dim=16),
    "expected grugmoe_artifact_schema_version 1, found 2": dict(grugmoe_artifact_schema_version=2),
    "expected model_type 'grug_moe', found 'llama'": dict(model_type="llama"),
    "expected rms_norm_eps 1e-05, found 1e-06": dict(rms_norm_eps=1e-6),
    "num_kv_heads: expected a divisor": dict(num_key_value_heads=3),
    "expected the config of a model, found KeyError: 'num_experts'": dict(num_experts=None),
}


@pytest.mark.parametrize("message", [*BAD_TENSORS, *BAD_CONFIGS, "expected a whole .safetensors"])
def test_bad_weights_are_refused_in_one_line_and_nothing_is_written(message, published, tmp_path,
                                                                    capsys):
    bad = tmp_path / "bad"
    shutil.copytree(published[2], bad)
    file = bad / "model.safetensors"
    if message in BAD_TENSORS:
        tensors = load_file(file)
        BAD_TENSORS[message](tensors)
        save_file(tensors, file)
    elif message in BAD_CONFIGS:
        config = json.loads((bad / "config.json").read_text()) | BAD_CONFIGS[message]
        config = {key: value for key, value in config.items() if value is not None}
        (bad / "config.json").write_text(json.dumps(config))
    else:
        file.write_bytes(file.read_bytes()[:-5])
    assert convert.main([str(bad), f"--to={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(train.ConfigError, match=message):
        convert.open_weights(bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_an_altered_checkpoint_and_an_old_directory_are_refused(published, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(published[0], run)
    record = run / "checkpoints/3/record/metadata"
    facts = json.loads(record.read_text())
    facts["arrays"][".params['layers']['key_DP']"] ^= 1
    record.write_text(json.dumps(facts))
    for words, message in (
            ([str(run), f"--to={tmp_path / 'out'}"], "layers/key_DP as it was saved"),
            ([str(published[0]), f"--to={run}"], "expected a new directory"),
            ([f"{run}@4", f"--to={tmp_path / 'out'}"], r"a checkpoint of step 4.*found steps \[3\]"),
            ([str(tmp_path / "none"), f"--to={tmp_path / 'out'}"], "expected a checkpoint.*found none")):
        assert convert.main(words) == 2
        found = capsys.readouterr().err
        assert re.search(message, found) and found.count("\n") == 1, found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_sums_of_parts_are_the_checksum_of_the_whole(parts):
    x = np.random.default_rng(0).normal(size=(10, 3, 2)).astype(np.float32)
    each = 10 // parts
    sums = [int(train.checksum(x[i:i + each], i * 6)) for i in range(0, 10, each)]
    assert sum(sums) % 2**32 == int(train.checksum(x))


# ------------------------------------------------------------------------------------- --init_from

def begun(c, source, steps=9, **keys):
    """The first State of a run of model c that begins from a source."""
    t = train.TrainConfig(mixture=(("none", 1.0),), tokenizer="bytes", steps=steps, batch_size=8,
                          init_from=str(source), **keys)
    return train.first_state(c, t, train.make_mesh(c, t), data.load_tokenizer("bytes"))


@pytest.mark.parametrize("source", ["run", "public", *(pytest.param(source, marks=pytest.mark.slow)
                                                      for source in ("run@3", "run/checkpoints"))])
def test_a_run_begins_with_the_weights_of_another(published, source, assert_same_bits):
    run, state, _ = published
    new = begun(PUBLISHED, run.parent / source)
    assert_same_bits((state.params, state.bias_LE), (new.params, new.bias_LE))
    assert int(new.step) == 0 and not jax.tree.leaves(new.opt)[1].any()


def test_a_branch_keeps_moments_and_step(published, assert_same_bits):
    run, state, _ = published
    new = begun(PUBLISHED, run, keep_optimizer=True, schedule="wsd")
    assert_same_bits(state, new)


def test_what_does_not_fit_is_named(published, tmp_path):
    run, *_ = published
    wider = dataclasses.replace(PUBLISHED, hidden_dim=32, num_heads=8)
    for c, keys, message in (
            (wider, {}, r"init_from: embed_VD: expected shape \(300, 32\), found \(300, 16\) in .*"
                        r"it has hidden_dim=16, num_heads=4"),
            (OTHERS["v1"], {}, "init_from: embed_norm_down_DU: expected shape .*gated_norm_rank=128"),
            (PUBLISHED, dict(keep_optimizer=True, optimizer="adamw"), "this optimizer"),
            (PUBLISHED, dict(keep_optimizer=True, steps=3), "a step below steps=3, found .* step 3")):
        with pytest.raises(train.ConfigError, match=message):
            begun(c, run, **keys)
    with pytest.raises(ValueError, match="keep_optimizer: expected False unless init_from"):
        begun(PUBLISHED, "", keep_optimizer=True)


def test_another_tokenizer_is_refused_unless_asked_for(published, tmp_path, capsys):
    run, state, _ = published
    config = json.loads((run / "config.json").read_text())
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    tokenizer = data.train_bpe(["a b a b a b " * 9, "to be or not to be " * 9], 258)
    tokenizer.save(copy)
    config["train"]["tokenizer"] = "bpe:258"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(train.ConfigError, match="expected the tokenizer of .*found bytes"):
        begun(PUBLISHED, copy)
    new = begun(PUBLISHED, copy, init_tokenizer="any")
    assert "begins    with the weights of" in capsys.readouterr().out
    np.testing.assert_array_equal(new.params["head_DV"], state.params["head_DV"])
