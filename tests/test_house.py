"""The size and the structure of the program: what README promises as "read in an afternoon".

Tokens are Python's, without comments, docstrings and line structure."""
import ast
import io
import re
import runpy
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = {"train": 1250, "scaling": 950, "data": 800, "kernels": 700, "model": 430, "moe": 360,
         "balance": 320}
ALL_LINES, ALL_TOKENS = 5000, 46_000
HEART_LINES, HEART_TOKENS = 1450, 14_000
COLUMNS, FUNCTION_LINES, TOKENS_A_LINE = 100, 70, 10.5
# the heart: three files, and of train.py these sections and the function `loop`
HEART_FILES, HEART_SECTIONS = ("model", "moe", "balance"), ("mesh", "optimizer", "step")

# who may import whom when loaded; a later import, inside a function, may be one of LAZY
IMPORTS = {
    "kernels": set(),
    "balance": {"kernels"},
    "moe": {"balance", "kernels"},
    "model": {"balance", "kernels", "moe"},
    "data": set(),
    "scaling": set(),
    "train": {"balance", "data", "kernels", "model", "scaling"},
}
LAZY = {"scaling": {"model"}}
THIRD_PARTY = {
    "kernels": {"jax"}, "balance": {"jax", "numpy"}, "moe": {"jax"}, "model": {"jax"},
    "data": {"numpy", "regex", "tiktoken", "tqdm"},
    "train": {"jax", "numpy", "optax"},
    "scaling": {"numpy", "scipy"},
}


def source(name):
    return (ROOT / f"{name}.py").read_text()


def docstrings(tree):
    """The numbers of the lines that docstrings occupy."""
    lines = set()
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(node):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def token_lines(text):
    """The line of every token that counts. An f-string is one token, as Python 3.11 has it; later
    versions give its parts."""
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
               tokenize.ENCODING, tokenize.ENDMARKER}
    prose, lines, inside = docstrings(ast.parse(text)), [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        inside -= kind == "FSTRING_END"
        ends = kind == "FSTRING_END"
        if not inside and not ends and token.type not in skipped and token.start[0] not in prose:
            lines.append(token.start[0])
        inside += kind == "FSTRING_START"
    return lines


def size(text, spans=None):
    """(lines, tokens, tokens per non-blank line) of a text, or of its spans of lines."""
    lines, tokens = text.splitlines(), token_lines(text)
    spans = spans or [(1, len(lines))]
    inside = lambda line: any(first <= line <= last for first, last in spans)
    filled = sum(bool(line.strip()) for i, line in enumerate(lines, 1) if inside(i))
    counted = sum(inside(line) for line in tokens)
    return sum(last - first + 1 for first, last in spans), counted, counted / filled


def heart_of_train():
    """The spans of lines of train.py that belong to the heart."""
    text = source("train")
    banners = [(i, match[1].strip()) for i, line in enumerate(text.splitlines(), 1)
               if (match := re.match(r"# -{10,} (.+)$", line))]
    ends = [i - 1 for i, _ in banners[1:]] + [len(text.splitlines())]
    spans = {name: (i, end) for (i, name), end in zip(banners, ends) if name in HEART_SECTIONS}
    missing = set(HEART_SECTIONS) - set(spans)
    assert not missing, f"train.py has no section {missing}; its sections: {dict(banners)}"
    loops = [(node.lineno, node.end_lineno) for node in ast.parse(text).body
             if isinstance(node, ast.FunctionDef) and node.name == "loop"]
    assert loops, "train.py has no function `loop`"
    return [*spans.values(), *loops]


def table():
    """{file: (lines, tokens, tokens per line)}, the sum and the heart; and the same as text."""
    sizes = {name: size(source(name)) for name in LINES}
    heart = [sizes[name] for name in HEART_FILES]
    try:
        heart.append(size(source("train"), heart_of_train()))
    except AssertionError:
        heart.append(sizes["train"])
    parts = {"all seven": sizes.values(), "the heart": heart}
    limits = {"all seven": (ALL_LINES, ALL_TOKENS), "the heart": (HEART_LINES, HEART_TOKENS)}
    sizes = sizes | {name: (sum(s[0] for s in part), sum(s[1] for s in part), 0)
                     for name, part in parts.items()}
    rows = [f"\n{'':10s} {'lines':>6s} {'limit':>6s} {'tokens':>7s} {'limit':>7s} {'a line':>7s}"]
    for name, (lines, tokens, ratio) in sizes.items():
        most_lines, most_tokens = limits.get(name, (LINES.get(name), ""))
        rows.append(f"{name:10s} {lines:6d} {most_lines:6d} {tokens:7d} {most_tokens:>7} "
                    + (f"{ratio:7.2f}" if ratio else ""))
    return sizes, "\n".join(rows)


# ------------------------------------------------------------------------------------------- sizes

def test_every_file_keeps_its_number_of_lines():
    sizes, text = table()
    over = [name for name, most in LINES.items() if sizes[name][0] > most]
    assert not over, text


def test_the_seven_files_together_keep_their_size():
    sizes, text = table()
    lines, tokens, _ = sizes["all seven"]
    assert lines <= ALL_LINES and tokens <= ALL_TOKENS, text


def test_the_heart_keeps_its_size():
    heart_of_train()
    sizes, text = table()
    lines, tokens, _ = sizes["the heart"]
    assert lines <= HEART_LINES and tokens <= HEART_TOKENS, text


def test_no_file_is_packed():
    sizes, text = table()
    over = [name for name in LINES if sizes[name][2] > TOKENS_A_LINE]
    assert not over, f"more than {TOKENS_A_LINE} tokens a non-blank line: {over}{text}"


@pytest.mark.parametrize("name", LINES)
def test_lines_and_functions_are_short(name):
    text = source(name)
    wide = [f"{name}.py:{i}" for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]
    assert not wide, f"lines of more than {COLUMNS} columns: {wide}"
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1}"
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno + 1 > FUNCTION_LINES]
    assert not long, f"functions of more than {FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("name", LINES)
def test_every_public_function_has_a_docstring(name):
    found = [node.name for node in ast.parse(source(name)).body
             if isinstance(node, ast.FunctionDef)
             and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not found, f"{name}.py: no docstring: {', '.join(found)}"


def test_readme_and_log_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    assert len((ROOT / "LOG.md").read_bytes()) <= 15 * 1024


# --------------------------------------------------------------------------------------- structure

def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_there_is_no_module_beside_the_seven():
    assert {path.stem for path in ROOT.glob("*.py")} == set(LINES)


@pytest.mark.parametrize("name", LINES)
def test_a_file_imports_only_what_the_graph_allows(name):
    tree = ast.parse(source(name))
    loaded = set(imports(tree.body))
    main = [node for node in tree.body if isinstance(node, ast.If)]     # python NAME.py
    shown = set(imports(ast.walk(ast.Module(main, [])))) & set(LINES)
    later = set(imports(ast.walk(tree))) & set(LINES) - loaded - shown
    assert loaded & set(LINES) <= IMPORTS[name]
    assert later <= IMPORTS[name] | LAZY.get(name, set())
    assert loaded - set(sys.stdlib_module_names) - set(LINES) <= THIRD_PARTY[name], (
        "other packages are imported where they are used")


@pytest.mark.parametrize("name", LINES)
def test_no_file_reaches_one_module_through_another(name):
    """moe.balance.select would hide an import; model.model is a name of ours, not a way through."""
    through = [f"{node.value.id}.{node.attr}" for node in ast.walk(ast.parse(source(name)))
               if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
               and {node.value.id, node.attr} <= set(LINES) and node.value.id != node.attr]
    assert not through, through


def rival_rules():
    """The names of the balancing rules in tests/rivals.py, and of those of balance.py that are not
    the default."""
    import balance
    from tests import rivals
    return (set(balance.RULES) | set(rivals.RIVALS)) - {"quantile", "none"}


@pytest.mark.parametrize("name", ["model", "moe", "train"])
def test_no_balancing_rule_is_special_outside_balance(name):
    """No string names a rival rule, and no branch or call looks at the name of a rule."""
    tree = ast.parse(source(name))
    prose = docstrings(tree)
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
               and isinstance(node.value, str) and node.lineno not in prose}
    named = sorted(strings & rival_rules())
    assert not named, f"{name}.py names {named}"

    def is_balancer(node):
        return isinstance(node, ast.Attribute) and node.attr == "balancer"

    def compares(node):             # c.balancer == ..., but not c.balancer in balance.RULES
        return (isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq))
                and any(map(is_balancer, (node.left, *node.comparators))))

    def asks(node):                 # c.balancer.startswith(...)
        return (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and is_balancer(node.func.value))
    branches = [node.lineno for node in ast.walk(tree) if compares(node) or asks(node)]
    assert not branches, f"{name}.py looks at a rule's name in lines {branches}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_no_test_imports_a_test_module(path):
    """What several test files need is a fixture in conftest.py or a helper module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(alias.name for alias in node.names)]
    forbidden = [name for name in found if name.split(".")[-1].startswith("test_")
                 or name.split(".")[-1] == "conftest"]
    assert not forbidden, forbidden


@pytest.mark.parametrize("name", ["balance", "moe", "model"])
def test_a_file_that_shows_itself_has_help_and_refuses_other_words(name, monkeypatch, capsys):
    for words, code, says in ((["--help"], 0, f"python {name}.py"), (["arena"], 2, "arguments: arena")):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        assert ended.value.code == code and says in "".join(capsys.readouterr())
