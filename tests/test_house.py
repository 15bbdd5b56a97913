"""The house: its files, its doors, its line lengths."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOORS = {                       # who may import whom
    "kernels": set(),
    "balance": set(),
    "moe": {"kernels", "balance"},
    "model": {"moe", "kernels"},
    "data": set(),
    "train": {"model", "data", "balance"},
    "scaling": set(),
}
FREE = {                        # what a file may import besides the house and the standard library, at the top
    "kernels": {"jax"}, "balance": {"jax", "numpy"}, "moe": {"jax"}, "model": {"jax"},
    "data": {"numpy", "regex", "tiktoken", "tqdm"},
    "train": {"jax", "numpy", "optax"},
    "scaling": {"numpy", "scipy"},
}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_the_house_is_these_seven_files():
    assert {p.stem for p in ROOT.glob("*.py")} == set(DOORS)


@pytest.mark.parametrize("room", DOORS)
def test_a_room_opens_only_its_doors(room):
    tree = ast.parse((ROOT / f"{room}.py").read_text())
    assert set(imports(tree)) & set(DOORS) <= DOORS[room]
    through = [f"{node.value.id}.{node.attr}" for node in ast.walk(tree) if isinstance(node, ast.Attribute)
               and isinstance(node.value, ast.Name) and {node.value.id, node.attr} <= set(DOORS)]
    assert not set(through) - {"model.model", "moe.moe"}, "a room is entered through another one"


@pytest.mark.parametrize("room", DOORS)
def test_optional_packages_are_imported_lazily(room):
    import sys
    tree = ast.parse((ROOT / f"{room}.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert set(imports(tree)) - set(sys.stdlib_module_names) - set(DOORS) <= FREE[room]


@pytest.mark.parametrize("path", [p for p in ROOT.glob("**/*.py") if not {"out", ".venv"} & set(p.parts)],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_fit_a_page(path):
    long = [i + 1 for i, line in enumerate(path.read_text().splitlines()) if len(line) > 115]
    assert not long, f"{path.name}: lines {long} pass 115 characters"
