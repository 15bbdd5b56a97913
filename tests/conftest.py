"""Eight CPU devices for every test, the repository on the path, slow tests only on request (pytest -m slow)."""
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)      # tests compile far more than they compute
jax.devices()                   # start the backend now: train.make_mesh must find these eight, not choose its own


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes instead of seconds; run with `pytest -m slow`")
    config.addinivalue_line("markers", "endurance: an hour in all, not part of CI; run with `pytest -m endurance`")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        for item in items:
            for name in {"slow", "endurance"} & set(item.keywords):
                item.add_marker(pytest.mark.skip(reason=f"{name}: run with `pytest -m {name}`"))
