"""Eight CPU devices for every test, the repository on the path, slow tests only on request (pytest -m slow)."""
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Tests compile far more than they compute. XLA's older CPU code generator takes 2.8 s for the smallest train step
# (CPU time) where the new one takes 6.2 [measured, jax 0.10.2 and 0.11.2]; what is compiled twice is taken from a
# cache that lives as long as the session. Processes that tests start inherit the environment, not the cache.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                           " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.devices()                   # start the backend now: train.make_mesh must find these eight, not choose its own


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes instead of seconds; run with `pytest -m slow`")
    config.addinivalue_line("markers", "endurance: what is not part of CI; run with `pytest -m endurance`")


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


# --------------------------------------------------------------- runs in processes of their own

from tests import ragged          # noqa: E402, F401  (moe.py's exchange on CPU devices)
from tests import inject          # noqa: E402  (needs the path and the devices that are set above)

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
