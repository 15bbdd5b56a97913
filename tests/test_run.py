"""Runs from config to report: the run directory, resuming, and every bad input."""
import dataclasses
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import data
import kernels
import model
import train
from configs import process, report

ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------- whole runs

@pytest.fixture
def saved(load):
    """saved(config, **keys): the newest state of a run."""
    return lambda config, **keys: restored(*load(config, **keys))


def restored(c, t):
    return train.Checkpoints(t).restore(c, t, train.make_mesh(c, t))


def drawn_is_what_was_logged(run, result):
    """Every curve of the report is a column of metrics.jsonl or the evaluations; the speed is result.json's."""
    rows, events = train.read_rows(run / "metrics.jsonl"), train.read_rows(run / "events.jsonl")
    drawn = report.curves(rows, events, result["maxvio_floor"])
    columns = {"training, one batch": "loss", "training, moving average": "ema", "matrices (relative step)": "lr",
               "Adam": "adam_lr", "one batch": "gnorm", "mean over layers": "maxvio"}
    for label, key in columns.items():
        (curve,) = (lines[label] for lines in drawn.values() if label in lines)
        assert curve == ([row["step"] for row in rows], [row[key] for row in rows]), label
    speed = drawn["tokens per second"][f"median {result['tokens_per_second']:,.0f}"]
    assert speed[1] == [row["tokens_per_second"] for row in rows]
    evals = [event for event in events if event["event"] == "eval"]
    for title, unit in (("loss, nats per token", "loss"), ("held-out text, bits per byte", "bpb")):
        curve = drawn[title]["held out: nonsense"]
        assert curve == ([e["step"] for e in evals], [e["domains"]["nonsense"][unit] for e in evals])


def test_a_run_directory_is_complete_and_resume_is_bit_equal_to_a_straight_run(
        config, tmp_path, monkeypatch, load, saved, assert_same_bits):
    config.write_text(config.read_text() + "num_layers = 1\ndevices = 2\n")     # quicker
    straight = train.train(*load(config))
    run = tmp_path / "run"
    for name in ("config.json", "metrics.jsonl", "events.jsonl", "result.json", "sample.txt", "report.html",
                 "plots/training.png", "plots/experts.png"):
        assert (run / name).stat().st_size > 0, name
    assert [r["step"] for r in train.read_rows(run / "metrics.jsonl")] == [2, 3, 4, 6]
    assert {e["event"] for e in train.read_rows(run / "events.jsonl")} == {"start", "saved", "eval", "done"}
    assert straight["tokens"] == 6 * 8 * 32 and set(straight["domains"]) == {"nonsense", "macro"}

    drawn_is_what_was_logged(run, straight)
    monkeypatch.setattr(report, "report", lambda run: None)         # once is enough

    # the same run, stopped by a signal during step 4, then started again with the same command
    cut = str(tmp_path / "cut")
    batch_at = data.batch_at

    def interrupting(mixture, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(mixture, step, *rest)
    monkeypatch.setattr(data, "batch_at", interrupting)
    assert train.train(*load(config, run_dir=cut)) is None
    monkeypatch.setattr(data, "batch_at", batch_at)
    resumed = train.train(*load(config, run_dir=cut))
    assert resumed["domains"] == straight["domains"]
    assert_same_bits(saved(config), saved(config, run_dir=cut))
    rows = [train.read_rows(Path(d) / "metrics.jsonl") for d in (run, cut)]
    logged = [[(r["step"], r["loss"], r["ema"]) for r in of_run] for of_run in rows]
    assert logged[0] == logged[1]
    assert [e["event"] for e in train.read_rows(Path(cut) / "events.jsonl")] == [
        "start", "saved", "stopped", "resume", "saved", "eval", "done"]

    # a finished run started again trains no further; how it is computed may change, and is noted; what may not
    before = (run / "metrics.jsonl").read_text()
    again = train.train(*load(config, remat="none"))
    assert again["domains"] == straight["domains"]
    assert (run / "metrics.jsonl").read_text() == before
    (changed,) = (e["keys"] for e in train.read_rows(run / "events.jsonl") if e["event"] == "config_changed")
    assert changed == {"remat": ["block", "none"]}
    recorded = (run / "config.json").read_text()
    for change, words in ((dict(num_layers=2), "holds a run with num_layers=1, found num_layers=2"),
                          (dict(optimizer="muonh"), "holds a run with optimizer='adamh', found optimizer='muonh'"),
                          (dict(batch_size=16), "holds a run with batch_size=8, found batch_size=16"),
                          (dict(steps=5), "steps: expected at least 6, reached by the run in .*, found 5")):
        with pytest.raises(train.ConfigError, match=words):
            train.train(*load(config, **change))
    assert (run / "config.json").read_text() == recorded, "a refusal writes nothing"


@pytest.mark.slow
def test_a_branch_begins_where_it_left_its_source_and_misses_no_metrics(config, tmp_path, load, capsys):
    assert train.train(*load(config, devices=2))
    keys = dict(devices=2, run_dir=tmp_path / "branch", init_from=f"{tmp_path / 'run'}@3", keep_optimizer=True)
    assert train.train(*load(config, **keys, schedule="wsd", decay=0.5))
    told = capsys.readouterr().out
    assert "branch, started after step 3" in told and "metrics.jsonl covers" not in told
    assert [row["step"] for row in train.read_rows(tmp_path / "branch" / "metrics.jsonl")] == [4, 6]
    assert train.train(*load(config, **keys, schedule="wsd", decay=0.5))
    told = capsys.readouterr().out
    assert "branch, resumed after step 6" in told and "metrics.jsonl covers" not in told


@pytest.mark.parametrize("change", [
    pytest.param(dict(num_experts=0, experts_per_token=0, expert_dim=0), id="dense", marks=pytest.mark.slow),
    pytest.param(dict(optimizer="muonh", recipe="v2", num_layers=1), id="muonh", marks=pytest.mark.slow),
    pytest.param(dict(compute_dtype="bfloat16"), id="bfloat16", marks=pytest.mark.slow)])
def test_other_rungs_run_save_and_resume(config, change, load, saved):
    assert train.train(*load(config, steps=3, devices=2, **change))["loss"] < 6
    assert train.train(*load(config, steps=4, devices=2, **change))["loss"] < 6
    state = saved(config, steps=4, devices=2, **change)
    assert int(state.step) == 4 and all(w.dtype == jnp.float32 for w in jax.tree.leaves(state.params))


def test_a_loss_that_is_not_finite_halts_with_code_3_and_leaves_no_checkpoint(config, monkeypatch, capsys, load):
    init = model.init
    monkeypatch.setattr(model, "init", lambda c, key: jax.tree.map(lambda w: w * jnp.nan, init(c, key)))
    assert train.main([str(config), "--max_skips=2", "--num_layers=1", "--devices=2"]) == 3
    assert "step 2: the loss is nan" in capsys.readouterr().err
    assert train.Checkpoints(load(config)[1]).steps() == []


# --------------------------------------------------------------------------------------- configs and bad input

SCRIPTS = {"compare", "convert", "foreign", "hopper", "launch", "layout", "plan", "process", "report", "rundir", "sample",
           "text"}                                                                                      # no configs
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.py")) if path.stem not in SCRIPTS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_its_state_builds(path):
    """The whole state of every config as shapes and shardings, without a byte of memory."""
    c, t = train.load_config(path)
    state = jax.eval_shape(lambda: train.make_state(c, t, jax.random.key(0)))
    assert sum(w.size for w in jax.tree.leaves(state.params)) == model.count(c).total
    assert state.bias_LE.shape == (c.num_layers, c.num_experts)
    mesh = AbstractMesh((t.replicas, 8, t.expert_parallel), train.MESH)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(train.state_shardings(c, t, mesh))):
        sharding.shard_shape(leaf.shape)                                             # raises if it does not divide


@pytest.mark.parametrize("arguments, words", [
    (["--num_expert=8"], "unknown config key 'num_expert'; did you mean 'num_experts'?"),
    (["--steps=many"], "steps: expected int, found 'many'"),
    (["--steps=1.5"], "steps: expected int, found 1.5"),
    (["--steps=True"], "steps: expected int, found True"),
    (["--adam_lr=inf"], "adam_lr: expected float, found 'inf'"),
    (["--adam_lr=1e999"], "adam_lr: expected a finite number"),
    (["--adam_lr=-1.0"], "adam_lr: expected zero or a positive number, found -1.0"),
    (["--recipe=v3"], "recipe: expected 'v1' or 'v2', found 'v3'"),
    (["--processes=two"], "argument --processes: invalid int value: 'two'"),
    (["--steps", "5"], "expected --key=value, found '--steps'"),
    (["--steps=0"], "steps: expected a positive number, found 0"),
    (["--optimizer=adam"], "optimizer: expected 'adamh' or 'muonh' or 'adamw', found 'adam'"),
    (["--accumulate=3"], "accumulate: expected a divisor of batch_size=8, found 3"),
    (["--sample_seed=9223372036854775808"], "sample_seed: expected a number below 2**63"),
    (["--schedule=wsd", "--warmup=0.9"], "decay: expected at most 1 - warmup"),
    (["--num_heads=3", "--num_kv_heads=2"], "num_kv_heads: expected a divisor of num_heads=3"),
    (["--mixture=()"], "mixture: expected pairs"),
    (["--mixture=(('x', -1.0),)"], "mixture: expected pairs"),
    (["--mixture=(('/nowhere/*.txt', 1.0),)"], "/nowhere"),
    (["--tokenizer=/nowhere.tiktoken"], "nowhere.tiktoken"),
    (["--vocab_size=100"], "vocab_size"),
    (["--devices=3"], "batch_size / accumulate: expected a multiple of the 3 devices, found 8"),
    (["--devices=99"], "devices: expected at most"),
    (["--run_dir=/proc/nothing"], "run_dir: expected a directory that can be written"),
    (["--sample"], "expected a run with a checkpoint, found none"),
])
def test_bad_input_is_one_line_and_exit_code_2(config, capsys, arguments, words):
    assert train.main([str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error.strip().splitlines()[-1] and "Traceback" not in error
    assert not (config.parent / "run" / "metrics.jsonl").exists(), "refused before anything was written"


@pytest.mark.parametrize("text, words", [
    (None, "expected a config file or a run directory, found none"),
    ("steps = (", "SyntaxError"),
    ("steps = 1 / 0", "ZeroDivisionError"),
    ("stepz = 5", "unknown config key 'stepz'; did you mean 'steps'?"),
    ("steps = 5", "missing config key 'vocab_size' of ModelConfig"),
    ("steps = '5'", "steps: expected int, found '5'"),
])
def test_a_bad_config_file_is_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    assert train.main([str(path)]) == 2
    assert words in capsys.readouterr().err


def test_a_broken_run_directory_is_refused(config, capsys):
    run = config.parent / "run"
    run.mkdir()
    (run / "config.json").write_text("{")
    assert train.main([str(config)]) == 2
    assert "config.json: expected the config of a run" in capsys.readouterr().err


def test_a_recipe_sets_defaults_and_a_line_of_the_config_wins(config, load):
    c, t = load(config, recipe="v2")
    assert (t.optimizer, t.clip, t.min_lr_ratio, c.router_z, c.logit_z) == ("muonh", 0.0, 0.05, 0.0, 0.0)
    assert t.warmup == 0.2, "the config says so"
    c, t = load(config, recipe="v2", optimizer="adamh", logit_z=1e-4, clip=1.0)
    assert (t.optimizer, t.clip, t.min_lr_ratio, c.router_z, c.logit_z) == ("adamh", 1.0, 0.05, 0.0, 1e-4)
    assert load(config) == load(config, recipe="v1") and load(config)[1].optimizer == "adamh"


def test_configs_can_build_on_one_another(config, monkeypatch, load):
    child = config.parent / "child.py"
    child.write_text("from tiny import *\nsteps = 9\n")
    monkeypatch.syspath_prepend(config.parent)
    assert load(child)[1].steps == 9


def test_help_lists_every_key_with_default_and_meaning(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for cls in (model.ModelConfig, train.TrainConfig):
        for field in dataclasses.fields(cls):
            line = next(line for line in text.splitlines() if line.strip().startswith(f"--{field.name}="))
            assert len(line.split(maxsplit=1)[1]) > 3, f"{field.name} has no meaning"


@pytest.mark.parametrize("key", ["run_dir", "data_dir", "compiled_dir", "checkpoint_dir"])
def test_a_path_is_what_the_user_means_and_never_a_folder_called_gs_or_tilde(config, load, key, monkeypatch, tmp_path):
    """On the command line and in the config alike."""
    monkeypatch.setenv("HOME", "/home/müller")
    monkeypatch.chdir(tmp_path)
    bucket = key in ("compiled_dir", "checkpoint_dir")
    whole = str(tmp_path / "sub dir [1] é") if bucket else "sub dir [1] é"
    for given, meant in (("~/x", "/home/müller/x"), ("~", "/home/müller"), ("/a~b/c", "/a~b/c"), ("sub dir [1] é", whole),
                         ("gs://bucket/x", bucket and "gs://bucket/x"), ("gs:/bucket/x", None), ("s3://bucket/x", None),
                         ("hdfs://x", None), ("~nobody-of-that-name/x", None)):
        other = config.parent / "other.py"
        other.write_text(config.read_text() + f"{key} = {given!r}\n", encoding="utf-8")
        for where, path, keys in (("command line", config, {key: given}), (other, other, {})):
            if meant:
                assert getattr(load(path, **keys)[1], key) == meant
            else:
                with pytest.raises(train.ConfigError, match=f"{where}: {key}: expected a directory.*, found "):
                    load(path, **keys)
    assert load(config, checkpoint_dir="")[1].checkpoint_dir == "", "the default is a folder of the run"


def test_a_checkpoint_dir_that_cannot_be_written_is_refused_before_training(config, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert train.main([str(config), f"--checkpoint_dir={tmp_path}/file/x"]) == 2
    assert "checkpoint_dir: expected a directory that can be written" in capsys.readouterr().err
    t = train.load_config(config, ["--checkpoint_dir=gs://no-such-bucket-xyz/r"])[1]
    checkpoints = train.Checkpoints(t)
    def no_answer(seconds, act):
        raise TimeoutError(f"no answer in {seconds} s")
    monkeypatch.setattr(process, "within", no_answer)
    with pytest.raises(train.TemporaryError, match="gs://no-such-bucket-xyz/r: TimeoutError: no answer in 60 s"):
        checkpoints.steps()


@pytest.mark.parametrize("name", ["a [1] ~é", "[*]", "{a,b}?"])
def test_a_checkpoint_in_any_folder_can_be_read_again(tmp_path, name):
    """Orbax used to take [1] for a pattern, find none of what it had written, and leave it unreadable."""
    t = types.SimpleNamespace(run_dir=str(tmp_path / name), checkpoint_dir="", keep=2, keep_every=0)
    checkpoints = train.Checkpoints(t)
    checkpoints.open()
    leaves = {"w": jnp.arange(6.0)}
    assert checkpoints.attempt(lambda: checkpoints.manager.save(3, args=checkpoints.ocp.args.Composite(
        state=checkpoints.ocp.args.StandardSave(leaves), record=checkpoints.ocp.args.JsonSave(
            {"step": 3, "config": {"seed": 0}, "arrays": {"w": int(train.checksum(leaves["w"]))}})))) == ""
    checkpoints.close()
    assert checkpoints.steps() == [3]
    found, why = train.Checkpoints(t).read(3, {"w": jax.ShapeDtypeStruct((6,), jnp.float32)})
    assert not why and (found[0] == leaves["w"]).all()


@pytest.mark.slow
def test_a_first_save_that_fails_ends_the_run(config, capsys, monkeypatch):
    """Orbax raises ValueError for a path that it does not like, and would do so at every save."""
    import orbax.checkpoint as ocp
    def fail(self, *args, **kwargs):
        raise ValueError("Checkpoint path should be absolute")
    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    assert train.main([str(config), "--num_layers=1", "--devices=1", "--save_every=1"]) == 75
    assert "the first checkpoint could not be written, so nothing would be kept" in capsys.readouterr().err
    assert len(train.read_rows(config.parent / "run" / "metrics.jsonl")) == 1


def test_a_config_may_import_loop_and_compute(config, load, tmp_path, monkeypatch):
    (config.parent / "base.py").write_text(config.read_text() + "batch_size = 16\n")
    child = config.parent / "child.py"
    child.write_text("from math import sqrt, pi\nimport os.path as where\nfrom base import *\nimport math\n"
                     "def half(x):\n    return x // 2\nfor i, (j, k) in ((1, (2, 3)),):\n    num_layers = i\n"
                     "_mine = 5\ntable = {1: 2}\nsteps = half(int(sqrt(100)) + _mine)\nwith open(__file__) as f:\n    pass\n")
    before = list(sys.path)
    c, t = load(child)
    assert (c.num_layers, t.steps, t.batch_size) == (1, 7, 16) and sys.path == before
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "base.py").write_text(config.read_text() + "batch_size = 24\n")
    (other / "child.py").write_text("from base import *\n")
    assert load(other / "child.py")[1].batch_size == 24, "a base of the same name in another folder is another base"


@pytest.mark.parametrize("line, words", [
    ("my_rate = 3", "unknown config key 'my_rate'; .*; a name of your own begins with _: _my_rate"),
    ("stepz = [5]", "unknown config key 'stepz'; did you mean 'steps'?"),
    ("learning_rate = 1e-3", "did you mean 'adam_lr' and 'matrix_lr'?"),
    ("import sys; sys.exit(0)", "not a runnable config file: SystemExit"),
    ("batch_size = 7\naccumulate = 2", "tiny.py: accumulate: expected a divisor of batch_size=7"),
    ("from nowhere import x", "ModuleNotFoundError")])
def test_a_name_that_is_no_key_is_a_typo(config, load, line, words):
    config.write_text(config.read_text() + line + "\n")
    with pytest.raises(train.ConfigError, match=words):
        load(config)


@pytest.mark.parametrize("arguments, words", [
    (["smoke"], r"smoke: expected a config file or a run directory, found none; did you mean .*configs/smoke.py\?"),
    (["configs/smok.py"], r"did you mean .*configs/smoke.py\?"),
    (["--config=configs/smoke.py"], r"did you mean .*configs/smoke.py\?"),
    (["--steps=3"], "expected a config file or a run directory, found none; it comes first"),
    (["gs://b/x.py"], "expected a config file or a run directory, found none"),
    (["CONFIG", "--steps", "3"], "found '--steps'; write --steps=3"),
    (["CONFIG", "--batch-size=16"], "write --batch_size=16"),
    (["CONFIG", "steps=3"], "write --steps=3"),
    (["CONFIG", "--seed"], "write --seed=VALUE"),
    (["CONFIG", "--learning_rate=0.1"], "unknown config key 'learning_rate'; did you mean 'adam_lr' and 'matrix_lr'.$"),
    (["CONFIG", "--learning_rate", "0.1"], "did you mean 'adam_lr' and 'matrix_lr'"),
    (["CONFIG", "--experts_per_token=5"], r"experts_per_token: expected 1 \(2 with combine_sum\) to num_experts=4, found 5"),
    (["CONFIG", "--mfu=0.3"], "--mfu: expected together with --plan"),
    (["CONFIG", "--search=0"], "--search: expected together with --plan"),
    (["CONFIG", "--steps=3000000000"], r"steps: expected a number below 2\*\*31"),
    (["CONFIG", "--adam_lr=1" + 310 * "0"], "adam_lr: expected float"),
    (["CONFIG", "--coordinator=localhost", "--processes=2", "--process=0"], "expected all three: HOST:PORT, N, I < N"),
    (["CONFIG", "--batch_size=0"], "command line: batch_size: expected a positive number"),
    (["CONFIG", "--replay"], "argument --replay: expected a value, found nothing"),
    (["CONFIG", "--compute_dtype=bf16"], "command line: compute_dtype: expected 'float32' or 'bfloat16'")])
def test_a_command_line_that_is_almost_right_is_told_what_to_write(config, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(ROOT)
    assert train.main([str(config) if word == "CONFIG" else word for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


def test_replay_counts_the_steps_of_the_run_not_of_the_config(config, capsys):
    run = config.parent / "run"
    run.mkdir()
    (run / "config.json").write_text('{"train": {"steps": 2}}')
    assert train.main([str(config), "--replay=3"]) == 2
    assert "--replay: expected a step from 1 to 2, found 3" in capsys.readouterr().err
    assert train.main([str(config), "--steps=4", "--replay", "2"]) == 0
    assert capsys.readouterr().out.startswith("step 2: 8 rows of 32 tokens")


@pytest.mark.parametrize("platform, keys, words", [
    ("tpu", dict(seq_len=1000), "seq_len on a TPU: expected a multiple of 128, found 1000"),
    ("tpu", dict(seq_len=1024, hidden_dim=1300), "hidden_dim: expected a multiple of 128, found 1300"),
    ("METAL", {}, "JAX_PLATFORMS='METAL': expected one of 'cpu', 'gpu', 'tpu'"),
    ("tpu", dict(seq_len=1024), None), ("gpu", {}, None), ("cpu", {}, None),
    ("tpu", dict(seq_len=1024, hidden_dim=1300, num_experts=0, experts_per_token=0, expert_dim=0), None)])
def test_what_a_kernel_cannot_take_is_one_line(config, load, platform, keys, words):
    c, t = load(config, **keys)
    device = types.SimpleNamespace(platform=platform, device_kind=platform)
    if words:
        with pytest.raises(train.ConfigError, match=words):
            train.make_mesh(c, t, [device])
    assert kernels.misfit(platform, c) is None or words


def test_the_plan_says_what_a_kernel_cannot_take(config, capsys):
    assert train.main([str(config), "--plan", "--topology=v4:2x2x1", "--seq_len=1000"]) == 2
    assert capsys.readouterr().err == "train.py: seq_len on a TPU: expected a multiple of 128, found 1000\n"


def test_help_joins_a_comment_of_two_lines(monkeypatch):
    source = ("class C:\n    steps: int = 3               # how many,\n"
              "                                 # and no more\n    seed: int = 0                # other\n")
    monkeypatch.setattr(report.inspect, "getsource", lambda cls: source)
    text = report.describe_keys()
    assert re.search(r"--steps=3 +how many, and no more\n", text) and re.search(r"--seed=0 +other", text)


def test_windows_is_refused_in_one_line():
    program = "import sys; sys.modules['fcntl'] = None; import train"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "train.py: needs Linux or macOS; on Windows run it in WSL\n" and done.returncode


def test_libtpu_without_a_tpu_is_not_asked(monkeypatch):
    """Its five lines of complaint open every run otherwise."""
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda key, value: asked.append((key, value)))
    monkeypatch.setattr(train.Path, "glob", lambda self, pattern: [])
    flags, t = types.SimpleNamespace(coordinator=None, processes=None, process=None), types.SimpleNamespace(
        heartbeat_seconds=100)
    for installed, want in ((("libtpu",), [("jax_platforms", "cpu")]), (("libtpu", "jax_plugins"), []), ((), [])):
        asked.clear()
        monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: name in installed or None)
        monkeypatch.setattr(train.jax, "config", types.SimpleNamespace(jax_platforms=None, update=lambda *a: asked.append(a)))
        train.init_distributed(flags, t)
        assert asked == want, installed


@pytest.mark.slow
def test_the_command_line_in_a_process_of_its_own(config):
    """Exit codes as a shell sees them, and a run from nothing to a report."""
    program = [sys.executable, str(ROOT / "train.py")]
    run = lambda *words: subprocess.run([*program, *words], capture_output=True, text=True)
    done = run(str(config), "--devices=2")
    assert done.returncode == 0 and "step 6/6 100.0% | loss" in done.stdout and "maxvio" in done.stdout
    sample = run(str(config), "--devices=2", "--sample", "--prompt=abc")
    assert sample.returncode == 0 and sample.stdout.startswith("abc")
    assert run(str(config), "--stepz=1").returncode == 2
