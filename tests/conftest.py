"""Eight CPU devices for every test, the repository on the path, slow tests only on request, and the
fixtures that several test files share. A fixture that is a function says its arguments."""
import json
import os
import signal
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

# Tests compile far more than they compute. XLA's older CPU code generator takes 2.8 s of CPU time
# for the smallest train step, the new one 6.2 [measured, jax 0.10.2 and 0.11.2]. What is compiled
# twice is taken from a cache that lives as long as the session. Processes that tests start inherit
# the environment, not the cache.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                           " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"    # eight CPU devices, whatever else the machine has
signal.signal(signal.SIGHUP, signal.SIG_DFL)        # nohup ignores it, and what tests start inherits that
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.devices()       # start the backend now: train.make_mesh must find these eight devices

import data
import model
import train
from tests import inject
from tests import ragged         # noqa: F401  (moe.py's ragged exchange on CPU devices)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; `pytest -m slow`")
    config.addinivalue_line("markers", "endurance: not part of CI; `pytest -m endurance`")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        for item in items:
            for name in {"slow", "endurance"} & set(item.keywords):
                item.add_marker(pytest.mark.skip(reason=f"{name}: run with `pytest -m {name}`"))


# ------------------------------------------------------------------- a tiny run: text and config

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
            document = " ".join(rng.choice(words, rng.integers(50, 300)))
            f.write(json.dumps({"text": document}) + "\n")
    return folder


@pytest.fixture
def config(text, tmp_path):
    """The path of a config that trains in seconds."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(
        text=str(text / "nonsense.jsonl"), cache=str(text / "cache"),
        compiled=str(text / "compiled"), run=str(tmp_path / "run")))
    return path


def load_config(config, **keys):
    return train.load_config(config, [f"--{key}={value}" for key, value in keys.items()])


def random_batch(c, t, step):
    """A batch of random tokens as data.batch_at would give it, and less even.

    Documents end, rows are padded by different lengths and one is nearly empty, so that a mean of
    the devices' means is not the mean."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, c.vocab_size, (t.batch_size, c.seq_len + 1)).astype(np.int32)
    ends = rng.random((t.batch_size, c.seq_len)) < 0.1
    length_B1 = rng.integers(c.seq_len // 2, c.seq_len + 1, (t.batch_size, 1))
    length_B1[0] = 2
    document = np.cumsum(ends, axis=1) - ends + 1
    segments = np.where(np.arange(c.seq_len) < length_B1, document, 0).astype(np.int32)
    weights = ((segments != 0) & ~ends).astype(np.float32)
    return data.Batch(tokens[:, :-1], tokens[:, 1:], segments, weights)


def train_steps(c, t, steps, seed=0):
    mesh = train.make_mesh(c, t)
    make = jax.jit(lambda: train.make_state(c, t, jax.random.key(seed)),
                   out_shardings=train.state_shardings(c, t, mesh))
    state, step, losses = make(), train.make_train_step(c, t, mesh), []
    for i in range(steps):
        batch = train.to_global_batch(random_batch(c, t, i), mesh, t.accumulate)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


def compare_bits(a, b):
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    for (path, x), y in pairs:
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), jax.tree_util.keystr(path))


@pytest.fixture(scope="session")
def load():
    """load(config, **keys): the two configs of a file, with keys overridden."""
    return load_config


@pytest.fixture(scope="session")
def synthetic():
    """synthetic(c, t, step): a batch of random tokens, documents and padding."""
    return random_batch


@pytest.fixture(scope="session")
def run_steps():
    """run_steps(c, t, steps, seed=0): the losses of some steps on synthetic batches, the state."""
    return train_steps


@pytest.fixture(scope="session")
def assert_same_bits():
    """assert_same_bits(a, b): every leaf of two trees is equal, bit by bit."""
    return compare_bits


# ----------------------------------------------------------------------------------------- numbers

def compare(got, want, tolerance=2e-5, floor=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        largest = float(jnp.max(jnp.abs(b)) + floor)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)


@pytest.fixture(scope="session")
def close():
    """close(got, want): the leaves of two trees differ by rounding, relative to the largest."""
    return compare


@pytest.fixture
def rng():
    """A fresh generator for every test, so that no test's numbers depend on another test."""
    return np.random.default_rng(0)


@pytest.fixture
def normal(rng):
    """normal(*shape): float32 numbers of a standard normal, from this test's generator."""
    return lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)


# ------------------------------------------------------------------------ a tiny model, and a layer

@pytest.fixture(scope="session")
def tiny():
    """The smallest ModelConfig in which no two sizes are equal that could be mixed up."""
    return model.ModelConfig(
        vocab_size=61, seq_len=24, hidden_dim=16, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, shared_dim=24, num_experts=8, experts_per_token=2, expert_dim=12,
        gated_norm_rank=4)


def documents_batch(c, B=2, seed=0, documents=True):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, c.vocab_size, (B, c.seq_len + 1))
    borders = rng.random((B, c.seq_len)) < (0.1 if documents else 0)
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
              "segments": np.cumsum(borders, axis=1) + 1,
              "weights": np.ones(borders.shape, np.float32)}
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@pytest.fixture(scope="session")
def batch_of():
    """batch_of(c, B=2, seed=0, documents=True): a batch without padding, every token scored."""
    return documents_batch


@pytest.fixture(scope="session")
def totals_of():
    """totals_of(batch): what model.loss divides by."""
    return lambda batch: {
        "weight": jnp.sum(batch["weights"]),
        "tokens": jnp.sum(batch["segments"] != 0).astype(jnp.float32)}


@pytest.fixture
def layer_weights(normal):
    """layer_weights(E, D=12, F=10): the weights of one layer's router and experts."""
    def weights(E, D=12, F=10):
        return {"router_DE": normal(D, E), "gate_EDF": normal(E, D, F) / 3,
                "up_EDF": normal(E, D, F) / 3, "down_EFD": normal(E, F, D) / 3}
    return weights


@pytest.fixture(scope="session")
def routing():
    """routing(K, combine_sum=0.0, ...): what moe.py reads of a ModelConfig."""
    def settings(K, combine_sum=0.0, balancer="quantile", exchange="ring", capacity_factor=0.0):
        return types.SimpleNamespace(experts_per_token=K, combine_sum=combine_sum,
                                     balancer=balancer, exchange=exchange,
                                     capacity_factor=capacity_factor)
    return settings


# --------------------------------------------------------------- runs in processes of their own

@pytest.fixture(scope="session")
def run_config(text, tmp_path_factory):
    """The path of a config of 12 steps, for runs with faults in them: see inject.KEYS."""
    path = tmp_path_factory.mktemp("faults") / "tiny.py"
    path.write_text(CONFIG.format(
        text=str(text / "nonsense.jsonl"), cache=str(text / "cache"),
        compiled=str(text / "compiled"), run="unused") + inject.KEYS)
    return path


@pytest.fixture(scope="session")
def plain(run_config):
    """The run directory of run_config, trained without a fault."""
    run = run_config.parent / "plain"
    done = inject.go(run_config, run)
    assert done.returncode == 0, done.stderr
    return run


def pytest_terminal_summary(terminalreporter):
    """Print the table of tests/README.md, from what tests said with record_property(outcome, fault)."""
    reports = [r for some in terminalreporter.stats.values() for r in some if getattr(r, "when", "") == "call"]
    counts = Counter(said for report in reports for said in report.user_properties
                     if said[0] in ("injected", "survived", "stopped"))
    if counts:
        terminalreporter.write_line("\n" + "\n".join(inject.table(counts)))
