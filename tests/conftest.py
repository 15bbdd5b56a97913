"""Eight CPU devices for every test, the repository on the path, slow tests only on request (pytest -m slow)."""
import os
import sys
import tempfile
from pathlib import Path

# Tests compile far more than they compute. XLA's older CPU code generator takes 2.8 s for the smallest train step
# (CPU time) where the new one takes 6.2 [measured, jax 0.10.2 and 0.11.2]; what is compiled twice is taken from a
# cache that lives as long as the session. Processes that tests start inherit the environment, not the cache.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                           " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")

import jax
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
