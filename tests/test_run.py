"""Runs from config to report: the run directory, resuming, and every bad input."""
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import data
import model
import train
from configs import report

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

SCRIPTS = {"hopper", "plan", "report", "rundir"}          # in configs/, and no configs
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
    (None, "expected a config file, found none"),
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
