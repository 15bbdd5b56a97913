"""The page of a run and the comparison of runs, from files made by hand: nothing is trained here."""
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import data
import model
import train
from configs import compare, report
from tests import inject

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 40, 4
PLAIN = dict(steps=STEPS, batch_size=8, warmup=0.25, log_every=EVERY, matrix_lr=0.02, adam_lr=0.004)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def metrics(t, steps=range(EVERY, STEPS + 1, EVERY), better=0.0):
    """Rows as Log writes them: the rate of step n is lr_multiplier of the n - 1 steps before it."""
    rng = np.random.default_rng(0)
    return [dict(step=n, loss=6 - n / 20 - better, ema=6.1 - n / 20 - better, gnorm=0.5, skipped=0,
                 lr=t.matrix_lr * float(train.lr_multiplier(t, n - 1)),
                 adam_lr=t.adam_lr * float(train.lr_multiplier(t, n - 1)), tokens=256 * n, flops=1e6 * n,
                 tokens_per_second=1000.0, seconds=0.256, steps=EVERY, time=1.7e9 + n, maxvio=1 / n, drop=0.01,
                 load_LE=rng.uniform(0.5, 1.5, (2, 4)).round(3).tolist()) for n in steps]


def scores(step, better=0.0):
    return {name: {"loss": 6 - step / 20 - better, "bpb": 3 - step / 40 - better, "tokens": 9, "bytes": 9}
            for name in ("plays", "macro")}


@pytest.fixture
def make_run(tmp_path, config):
    """make_run(name, better=0.0, **keys): a finished run directory, written without training."""
    def make(name, better=0.0, **keys):
        run = tmp_path / name
        run.mkdir(parents=True)
        c, t = train.load_config(config, [f"--{k}={v}" for k, v in (PLAIN | keys).items()])
        t = dataclasses.replace(t, run_dir=str(run))
        (run / "config.json").write_text(json.dumps(dict(
            model=vars(c), train=vars(t), data="ab" * 32, counts=model.count(c)._asdict(), commit="1234567",
            versions=dict(jax="0", python="3"))))
        (run / "metrics.jsonl").write_text(lines(metrics(t, better=better)))
        events = [dict(event="start", step=0, time=1.7e9),
                  *(dict(event="eval", step=n, domains=scores(n, better), time=1.7e9 + n) for n in (20, 40)),
                  dict(event="done", step=STEPS, time=1.7e9 + 60)]
        (run / "events.jsonl").write_text(lines(events))
        (run / "result.json").write_text(json.dumps(dict(
            loss=4.0 - better, bpb=2.0 - better, flops=1e9, seconds=12.0, tokens_per_second=1000.0, maxvio=0.03,
            maxvio_floor=0.02, domains=scores(STEPS, better))))
        (run / "sample.txt").write_text("Once upon a time")
        return run
    return make


class Page(HTMLParser):
    """What a browser would see: the tags, and the text outside of them."""
    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.captions = [], "", []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, text):
        if self.tags[-1] == "figcaption" and text.strip():
            self.captions.append(text)
        if self.tags[-1] != "style":
            self.text += text + "\n"


def draw(run):
    """The page of a run. Every warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.report(run)
    return Page(run / "report.html")


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without pictures, for tests of the rest: a picture takes a second."""
    monkeypatch.setattr(report, "draw_curves", lambda *_: {})
    monkeypatch.setattr(report, "draw_experts", lambda plt, rows, path: path.write_bytes(b""))


# ------------------------------------------------------------------------------------------------ the page

def test_a_page_says_what_a_reader_asks_first(make_run):
    run = make_run("my run")
    events = train.read_rows(run / "events.jsonl")
    events.insert(2, dict(event="config_changed", keys={"log_every": [2, 4]}, time=1.7e9 + 21))
    events.insert(3, dict(event="skip", step=22, why="not finite", time=1.7e9 + 22))
    (run / "events.jsonl").write_text(lines(events))
    page = draw(run)
    assert "<title>my run: a training run</title>" in (run / "report.html").read_text()
    assert [name for name, _ in report.facts(report.read_files(run))] == [
        "Model", "Data", "Training", "Result", "Speed", "Balance", "Time", "Code"]
    for words in ("40 of 40 steps of 8 x 32 tokens", "4.0000 nats per token, 2.0000 bits per byte; held out: plays",
                  "1,000 tokens per second", "MaxVio 0.030 over the last tenth, 0.020 for independent tokens; 1.0 %",
                  "2023-11-14 22:13:20 UTC to 2023-11-14 22:14:20 UTC; 0 times resumed, 1 updates skipped",
                  "commit 1234567", "Once upon a time", "2023-11-14 22:13:42 UTC"):
        assert words in page.text, words
    assert "not known" not in page.text
    # an own caption for each picture; changed keys first; the raw files last and folded
    assert len(page.captions) == page.tags.count("img") == 7
    for word in ("busiest expert", "relative step", "each byte", "mean load"):
        assert any(word in caption for caption in page.captions), word
    order = ["Keys changed on the way", "Keys of this run", "matrix_lr\n0.02\n0.0", "has none", "config.json"]
    places = [page.text.index(words) for words in order]
    assert places == sorted(places) and page.tags.count("details") == 3
    assert "beta1\n" not in page.text.partition("Events")[0], "a default is no key of this run"
    assert not re.search(r"17\d{8}", page.text.partition("result.json")[0]), "no unix times above the raw files"
    for name in ("training.png", "experts.png"):
        assert (run / "plots" / name).stat().st_size > 1000


HOSTILE = "<script>document.title='owned'</script>&\"'$x_{$"


def test_nothing_in_a_page_is_run_and_dollars_are_no_formula(make_run, monkeypatch):
    run = make_run("<script>&$a_{$")
    text = (run / "events.jsonl").read_text().replace('"plays"', json.dumps(HOSTILE + "\ud800 語"))
    (run / "events.jsonl").write_text(text)
    for name in ("config.json", "result.json"):
        changed = json.loads((run / name).read_text())
        changed["train" if "train" in changed else "domains"][HOSTILE] = HOSTILE
        changed["commit"] = HOSTILE
        (run / name).write_text(json.dumps(changed))
    (run / "sample.txt").write_text(HOSTILE)
    (run / "diff.patch").write_text(HOSTILE)
    page = draw(run)
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 3
    monkeypatch.setattr(report, "draw_curves", lambda *_: {})
    out = run.parent / "both.html"
    assert compare.main([str(run), str(make_run("b")), f"--out={out}"]) == 0
    assert "script" not in Page(out).tags


STRANGE = ['{"note": "of my own"}', "no json", "[1, 2]", "null", '{"step": "7"}', '{"step": 1e999}', '{"step": true}',
           '{"step": -3}', '{"step": ' + "9" * 400 + '}', '{"event": "eval"}', '{"event": "eval", "step": 20}',
           '{"event": "eval", "step": 20, "domains": {"plays": 3}}', '{"event": 5, "step": 4}',
           '{"event": "eval", "step": 22, "domains": {"other": {"loss": 3.0, "bpb": "x"}}}', "[" * 4000,
           '{"event": "config_changed", "keys": [1]}', '{"event": "resume", "step": "x", "time": 1e300}',
           '{"event": "config_changed", "keys": {"steps": 3}, "time": "now"}', '{"step": 8, "load_LE": [[1], [2, 3]]}']


def test_a_page_survives_any_line_in_the_logs(make_run):
    run = make_run("run")
    for name in ("metrics.jsonl", "events.jsonl"):
        good = (run / name).read_text().splitlines()
        (run / name).write_bytes(("\n".join([*STRANGE, *good, *STRANGE]) + "\n").encode() + b"\xff\xfe{")
    page = draw(run)
    files = report.read_files(run)
    assert [row["step"] for row in files.rows] == list(range(EVERY, STEPS + 1, EVERY))
    drawn = report.curves(files.rows, files.events)
    assert drawn["held-out text, bits per byte"] == {"held out: plays": ([20, 40], [2.5, 2.0])}
    assert drawn["loss, nats per token"]["held out: other"] == ([22], [3.0]), "another set of domains"
    assert drawn["loss, nats per token"]["training, one batch"][1][1] == 5.6, "a line of another kind for step 8"
    left_out = "metrics.jsonl: 39 of 49 lines cannot be used and were left out."
    assert left_out in page.text and "evaluations have no losses" in page.text, files.notes


@pytest.mark.parametrize("key, value", [("load_LE", None), ("maxvio", "x"), ("loss", []), ("tokens_per_second", None),
                                        ("gnorm", 0.0), ("lr", True), ("load_LE", [[1.0] * 4] * 3), ("ema", 1e200)])
def test_one_damaged_key_leaves_a_hole_and_is_counted(make_run, key, value):
    run = make_run("run")
    rows = train.read_rows(run / "metrics.jsonl")
    rows[3][key] = value
    rows[5]["no_" + key] = rows[5].pop(key)
    (run / "metrics.jsonl").write_text(lines(rows))
    files = report.read_files(run)
    honest = key == "gnorm" or value is None and key != "load_LE"       # a number, or known not to be finite
    assert any(f"metrics.jsonl: {1 if honest else 2} of 10 rows lack" in note for note in files.notes), files.notes
    lengths = {len(x) for panel in report.curves(files.rows, files.events).values() for x, _ in panel.values()}
    assert len(report.loads(files.rows)[0]) == (8 if key == "load_LE" else 10) and lengths <= {1, 2, 8, 9, 10}


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"train": 5, "model": [], "counts": "x", "domains": 3}', ""])
def test_a_page_survives_any_result_and_config(make_run, undrawn, damage):
    run = make_run("run")
    for name in ("result.json", "config.json"):
        (run / name).write_text(damage)
    page = draw(run)
    assert page.text.count("not known") >= 5
    assert damage.startswith('{"') or page.text.count("left out") == 2


@pytest.mark.parametrize("rows", [0, 1])
def test_a_short_run_is_drawn_without_a_warning(make_run, rows):
    run = make_run("run")
    short = train.read_rows(run / "metrics.jsonl")[:rows]
    (run / "metrics.jsonl").write_text(lines(short))
    assert draw(run).tags.count("img") == (7 if rows else 0)


def test_the_command_of_a_page(make_run, undrawn, capsys):
    assert report.main([str(make_run("run"))]) == 0 and "report.html" in capsys.readouterr().out
    for words in ([], ["/nowhere"], ["a", "b"]):
        assert report.main(words) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_learning_rates_are_those_of_every_step(make_run):
    """Also if the settings changed on the way: each held from the step on after which it was resumed."""
    run = make_run("run")
    rates = report.rates_of_every_step(report.read_files(run))
    steps, lr = rates["matrices (relative step)"]
    assert list(steps) == list(range(1, STEPS + 1)), "warm-up is ten steps, of which the log has two"
    assert lr[0] == 0 and lr[10] == pytest.approx(0.02) and np.allclose(np.diff(lr[:11]), 0.002)
    for row in train.read_rows(run / "metrics.jsonl"):
        assert lr[row["step"] - 1] == pytest.approx(row["lr"], rel=1e-5)
        assert rates["Adam"][1][row["step"] - 1] == pytest.approx(row["adam_lr"], rel=1e-5)

    events = train.read_rows(run / "events.jsonl")
    events[2:2] = [dict(event="config_changed", keys={"steps": [20, 40], "jax": ["1", "2"]}),
                   dict(event="resume", step=20), dict(event="config_changed", keys={"matrix_lr": [0.04, 0.02]}),
                   dict(event="resume", step=30)]
    (run / "events.jsonl").write_text(lines(events))
    _, changed = report.rates_of_every_step(report.read_files(run))["matrices (relative step)"]
    t = train.load_config(run)[1]
    share = lambda steps: np.array([float(train.lr_multiplier(dataclasses.replace(t, steps=steps), n))
                                    for n in range(steps)])
    want = np.concatenate([0.04 * share(20), 0.04 * share(40)[20:30], 0.02 * share(40)[30:]])
    np.testing.assert_allclose(changed, want, rtol=1e-5, atol=1e-9)


def test_a_result_survives_a_damaged_row(config, load, tmp_path, capsys):
    """write_result ends a run of days: a row without MaxVio must not cost it."""
    c, t = load(config, **PLAIN)
    run = tmp_path / "run"
    run.mkdir()
    mixture = data.Mixture([], None, None, "0" * 64, {}, 0, 1.0, 2048)
    rows = metrics(dataclasses.replace(t, matrix_lr=0.02, adam_lr=0.004))
    del rows[-1]["maxvio"]
    rows[-3]["seconds"] = "x"
    for left, maxvio in ((rows, None), (rows[:-1] + [rows[-1] | {"maxvio": 0.5}], 0.5), ([], None)):
        (run / "metrics.jsonl").write_text(lines(left))
        result = report.write_result(c, t, run, mixture, scores(STEPS))
        assert result["maxvio"] == maxvio and json.loads((run / "result.json").read_text()) == result
        assert result["tokens_per_second"] == (1000.0 if left else None)
        assert result["seconds"] == pytest.approx(0.256 * EVERY * 9 if left else 0)


# ---------------------------------------------------------------------------------------------- the comparison

def test_a_comparison_says_what_differs_and_what_came_of_it(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = make_run("a/run"), make_run("b/_fast", better=0.25, adam_lr=0.008, log_every=8)
    (b / "metrics.jsonl").write_text(lines(train.read_rows(b / "metrics.jsonl")[1::2]))
    (b / "diff.patch").write_text("+ an idea\n")
    before = {path: path.read_bytes() for run in (a, b) for path in run.rglob("*") if path.is_file()}
    assert train.main(["--compare", str(a), str(b)]) == 0
    said, out = capsys.readouterr().out, tmp_path / "out/compare-run-_fast.html"
    rows = [line.split() for line in said.splitlines()]
    assert ["adam_lr", "0.004", "0.008"] in rows and ["log_every", "4", "8"] in rows
    assert not any(row[:1] == ["run_dir"] or row[:1] == ["seed"] for row in rows)
    assert any(row[:2] == ["changes", "since"] and row[-2] == "-" for row in rows), "two dirty runs can be told apart"
    assert ["step", "8", "5.7000", "5.4500"] in rows and ["step", "40", "4.1000", "3.8500"] in rows
    assert ["step", "20", "5.0000", "4.7500"] in rows and not ["step", "4"] in [row[:2] for row in rows]
    assert rows.count(["at", "the", "end", "4.0000", "3.7500"]) == rows.count(["at", "the", "end", "2.0000", "1.7500"])
    assert str(out.relative_to(tmp_path)) in said
    page = Page(out)
    assert page.tags.count("img") == len(page.captions) == 6 and "Comparison: run, _fast" in page.text
    assert "adam_lr\n0.004\n0.008" in page.text
    assert {path: path.read_bytes() for path in before} == before, "no run is written to"
    assert train.main([str(a), "--compare", str(b)]) == 0, "its own page may be written anew"


def test_equal_steps_are_few_and_shared():
    columns = [dict.fromkeys(range(0, 1000, 3), 1.0), dict.fromkeys(range(0, 900, 2), 2.0)]
    rows = compare.at_equal_steps(columns)
    assert len(rows) == compare.STEPS and rows[0] == (0, 1.0, 2.0) and rows[-1] == (894, 1.0, 2.0)
    assert all(step % 6 == 0 for step, *_ in rows)
    assert compare.at_equal_steps([{1: 0.5}, {2: 0.5}]) == []


@pytest.mark.parametrize("words, said", [
    (["{a}"], "--compare: expected two run directories or more"),
    ([], "--compare: expected two run directories or more"),
    (["{a}", "/nowhere"], "/nowhere: expected a run directory, with config.json, found none"),
    (["{a}", "{a}/../a"], "--compare: expected each run once"),
    (["{a}", "{b}", "--fast"], "--compare: expected run directories and --out=FILE.html, found --fast"),
    (["{a}", "{b}", "--out={a}/report.html"], "a new file or an older comparison"),
    (["{a}", "{b}", "--out={a}/metrics.jsonl"], "--out: expected the name of a file that ends in .html"),
    (["{a}", "{empty}"], "empty: expected a run that has logged a step"),
])
def test_a_bad_comparison_is_one_line_and_exit_code_2(make_run, capsys, words, said):
    a, b, empty = make_run("a"), make_run("b"), make_run("empty")
    (a / "report.html").write_text("mine")
    (empty / "metrics.jsonl").write_text("{}\n")
    assert train.main(["--compare", *(word.format(a=a, b=b, empty=empty) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and (a / "report.html").read_text() == "mine"


def test_a_tokenizer_has_one_name_in_a_comparison(make_run, capsys):
    """A run that took the tokenizer of another by its directory, as fine-tuning does, and one with its own."""
    a, b, c = (make_run(name, tokenizer=tokenizer) for name, tokenizer in
               (("a", "bpe:265"), ("b", "out/a"), ("c", "bpe:265")))
    for run, text in ((a, "the cat and the hat "), (b, "the cat and the hat "), (c, "another text ")):
        report.keep_sources(run, data.train_bpe([text * 40], 265), 0)
    assert train.main(["--compare", str(a), str(b), f"--out={a.parent}/c.html"]) == 0
    assert "tokenizers differ" not in capsys.readouterr().out
    assert train.main(["--compare", str(a), str(c), f"--out={a.parent}/c.html"]) == 0
    assert "tokenizers differ" in capsys.readouterr().out


def test_a_comparison_survives_any_line(make_run, undrawn, capsys):
    a, b = make_run("a"), make_run("b")
    for name in ("metrics.jsonl", "events.jsonl"):
        (a / name).write_text((a / name).read_text() + "\n".join(STRANGE) + "\n")
    for name in ("config.json", "result.json"):
        (b / name).write_text('{"train": [], "model": 5}')
    assert train.main(["--compare", str(a), str(b), f"--out={a.parent}/c.html"]) == 0
    said = capsys.readouterr().out
    assert "A: metrics.jsonl: 19 of 29 lines cannot be used" in said and "tokenizers differ" in said


# ------------------------------------------------------------------------------- what a run directory keeps

def test_the_page_of_a_folder_that_is_no_run_is_not_drawn(tmp_path, capsys):
    (tmp_path / "report.html").write_text("a thesis")
    assert report.main([str(tmp_path)]) == 2 and "with config.json or" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "a thesis"


def test_a_run_directory_imports_again_what_its_config_imported(tmp_path, monkeypatch):
    """Kernels of configs.hopper and rules of tests.rivals: without them it would go on by others, or not at all."""
    config, imported = {"model": {}, "train": {"mixture": [["x", 1.0]], "checkpoint_dir": ""}}, []
    (tmp_path / "config.json").write_text(json.dumps(config | {"imports": ["tests.rivals", "os"]}))
    monkeypatch.setattr(report.importlib, "import_module", imported.append)
    report.read_run(tmp_path)
    assert imported == ["tests.rivals"]


def test_a_run_directory_keeps_its_tokenizer_and_notices_damage(tmp_path):
    t = train.TrainConfig((("x", 1.0),), "bpe:300", steps=9, batch_size=1, run_dir=str(tmp_path))
    assert report.kept_tokenizer(t) is None, "a run of before"
    made = data.train_bpe(["the cat and the hat and the bat " * 40], 265)
    report.keep_sources(tmp_path, made, 0)
    kept = report.kept_tokenizer(t)
    assert kept.sha256 == made.sha256 and kept.encode("the hat") == made.encode("the hat")
    file = tmp_path / "tokenizer.tiktoken"
    first = file.stat().st_mtime_ns
    report.keep_sources(tmp_path, made, 4)
    assert file.stat().st_mtime_ns == first, "not written again"
    rows = file.read_text().splitlines()
    rows[260], rows[261] = rows[261].split()[0] + " 260", rows[260].split()[0] + " 261"
    file.write_text("\n".join(rows) + "\n")
    with pytest.raises(data.DataError, match="cut short or altered"):
        report.kept_tokenizer(t)
    other = tmp_path / "bytes"
    other.mkdir()
    report.keep_sources(other, data.load_tokenizer("bytes"), 0)
    assert not list(other.glob("tokenizer*")), "bytes need none"


def test_changes_of_the_code_are_kept_once_and_cut_if_long(tmp_path, monkeypatch):
    tokenizer, said = data.load_tokenizer("bytes"), [""]
    monkeypatch.setattr(train, "git", lambda *words: said[0])
    kept = lambda: sorted(path.name for path in tmp_path.glob("*.patch"))
    report.keep_sources(tmp_path, tokenizer, 0)
    assert kept() == [], "a clean tree"
    for text, start, names in (("+ one\n", 0, ["diff.patch"]), ("+ one\n", 5, ["diff.patch"]),
                               ("+ two\n", 9, ["diff-9.patch", "diff.patch"]),
                               ("+ three\n", 9, ["diff-9-again.patch", "diff-9.patch", "diff.patch"])):
        said[0] = text
        report.keep_sources(tmp_path, tokenizer, start)
        assert kept() == names
    assert (tmp_path / "diff.patch").read_text() == "+ one\n" and (tmp_path / "diff-9.patch").read_text() == "+ two\n"
    said[0] = "+" * 3_000_000
    report.keep_sources(tmp_path, tokenizer, 12)
    cut = (tmp_path / "diff-12.patch").read_text()
    assert len(cut) < 1_000_200 and "3,000,000 characters of sha256" in cut


def test_an_archive_knows_its_commit(tmp_path, monkeypatch):
    """As on a pod, where launch.sh unpacks `git archive` and no repository is."""
    if not shutil.which("git") or not train.git("rev-parse", "HEAD"):
        pytest.skip("git has no repository here")
    for command in (["git", "init", "-q"], ["git", "add", "-A"],
                    ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"],
                    ["git", "archive", "--format=tar", "-o", "a.tar", "HEAD"]):
        for name in (".gitattributes", ".commit"):
            shutil.copy(ROOT / name, tmp_path)
        subprocess.run(command, cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "a.tar") as archive:
        written = archive.extractfile(".commit").read().decode()
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path, text=True)
    assert written == head, "git archive writes the commit"
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    train.git_commit.cache_clear()
    assert train.git_commit() == head.strip(), "in a checkout, git says it"
    train.git_commit.cache_clear()
    (tmp_path / ".commit").write_text("abc1234\n")
    assert train.git_commit() == "abc1234"
    train.git_commit.cache_clear()
    (tmp_path / ".commit").unlink()
    shutil.rmtree(tmp_path / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert train.git_commit() == "unknown"
    train.git_commit.cache_clear()


# --------------------------------------------------------------------- a run directory is enough: slow, with a run

@pytest.fixture
def moved(plain, tmp_path, monkeypatch):
    """A copy of a run in another place, where its data are not. Its tokenizer is no common one: it names byte b
    by 255 - b, so text can be read and written only by what the run directory keeps."""
    run = tmp_path / "elsewhere" / "copy"
    shutil.copytree(plain, run)
    facts = {"name": "backwards", "pattern": data.LLAMA3, "pieces": data.SINGLE_BYTES[::-1], "eot": 256}
    report.keep_sources(run, data.Tokenizer(vocab_size=257, **facts), 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "open_mixture", lambda *_, **__: pytest.fail("opened the data"))
    return run


@pytest.mark.slow
def test_a_sample_needs_nothing_but_the_run_directory(moved, capsys):
    def sample(*words):
        assert train.main([str(moved), "--sample", "--compiled_dir=", *words]) == 0
        return capsys.readouterr()
    one, again, other = (sample("--prompt=to be", "--sample_tokens=20", f"--sample_seed={seed}") for seed in (1, 1, 2))
    assert one.out == again.out != other.out and one.out.startswith("to be") and len(one.out) > 15
    assert one.err == f"sample    {moved}, step 12, prompt of 5 tokens\n"
    long = sample("--prompt=" + "word " * 20, "--sample_tokens=3")
    assert long.out.startswith("word " * 20) and "prompt of 100 tokens, of which the model sees the last 32" in long.err
    empty = sample("--prompt=", "--sample_tokens=9", "--top_k=3")
    assert "end_of_text" not in empty.out and "prompt of 0 tokens" in empty.err
    config = moved.parent / "tiny.py"           # today's way: the config says only which run it is
    text = json.loads((moved / "config.json").read_text())["train"]["mixture"]
    config.write_text(f"mixture = {text}\n".replace("[[", "((").replace("]]", "),)") +
                      "tokenizer = 'bytes'\nsteps = 1\nbatch_size = 1\nvocab_size = 300\nhidden_dim = 8\n"
                      "num_layers = 1\nnum_heads = 1\nnum_kv_heads = 1\nhead_dim = 8\nshared_dim = 8\nseq_len = 16\n")
    words = ["--prompt=to be", "--sample_tokens=20", "--sample_seed=1"]
    assert train.main([str(config), "--sample", f"--run_dir={moved}", "--compiled_dir=", *words]) == 0
    assert capsys.readouterr().out == one.out
    for file in moved.glob("tokenizer.*"):
        file.unlink()
    assert sample(*words).out != one.out, "the tokenizer was that of the run directory"
    for key, words in (("seq_len=512", "seq_len: expected 32, as in"), ("seed=1", "seed: expected 0, as in")):
        assert train.main([str(moved), "--sample", f"--{key}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and "--sample_seed=N" in line


@pytest.mark.slow
def test_a_run_directory_is_enough_to_go_on(plain, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(plain, run)
    shutil.rmtree(run / "checkpoints" / str(inject.STEPS))
    done = subprocess.run([sys.executable, ROOT / "train.py", run], capture_output=True, text=True, timeout=600,
                          env=inject.ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0 and "resumed after step 8" in done.stdout, done.stderr
    assert inject.outcome(run) == inject.outcome(plain)


@pytest.mark.parametrize("content, words", [
    (None, "config.json: expected the config of a run, found none"), ("{", "found JSONDecodeError"), ("[]", "found "),
    ('{"model": {"stepz": 1}, "train": {"mixture": [], "checkpoint_dir": ""}}', "unknown config key 'stepz'"),
    ('{"model": {}, "train": {"mixture": 3}}', "found TypeError")])
def test_a_directory_that_is_no_run_is_one_line(tmp_path, capsys, content, words):
    if content:
        (tmp_path / "config.json").write_text(content)
    for word in (tmp_path, tmp_path / "config.json"):
        assert train.main([str(word), "--sample"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert [path.name for path in tmp_path.iterdir()] == (["config.json"] if content else [])


def test_checkpoints_are_found_where_the_run_is_now(make_run, tmp_path):
    """checkpoint_dir of config.json holds while it exists; a copy that has its own uses these."""
    (tmp_path / "far").mkdir()
    run = make_run("run", checkpoint_dir=str(tmp_path / "far"))
    assert train.load_config(run)[1].checkpoint_dir == str(tmp_path / "far")
    (run / "checkpoints").mkdir()
    assert train.load_config(run)[1].checkpoint_dir == str(tmp_path / "far")
    (tmp_path / "far").rmdir()
    shutil.move(run, tmp_path / "moved")
    c, t = train.load_config(tmp_path / "moved/config.json", ["--steps=50"])
    assert (t.run_dir, t.checkpoint_dir, t.steps) == (str(tmp_path / "moved"), "", 50)
    assert train.Checkpoints(t).folder == tmp_path / "moved/checkpoints"
    assert t.mixture[0][1] == 1.0 and type(t.mixture[0]) is tuple


# ------------------------------------------------------------------------------------------- in a browser

@pytest.mark.slow
def test_both_pages_in_a_browser(make_run, tmp_path):
    """Chromium draws them: no script runs, every picture loads, nothing is wider than the window."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on PATH (apt-get install chromium)")
    run, other = make_run(HOSTILE.replace("/", "")), make_run("other", better=0.2)
    (run / "sample.txt").write_text(HOSTILE + "\n" + "word" * 500)
    report.report(run)
    assert compare.main([str(run), str(other), f"--out={tmp_path}/compare.html"]) == 0
    look = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
            "--window-size=900,1400"]
    measure = ("<script>document.title += '|' + [document.documentElement.scrollWidth <= innerWidth, "
               "[...document.images].every(i => i.naturalWidth > 300), document.images.length]</script>")
    for page, title, images in ((run / "report.html", "a training run", 7),
                                (tmp_path / "compare.html", "Comparison: ", 6)):
        copy = tmp_path / "copy.html"
        copy.write_text(page.read_text() + measure)
        seen = subprocess.run([*look, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
        (found,) = re.findall("<title>(.*?)</title>", seen.stdout)
        assert title in found and found.endswith(f"|true,true,{images}"), found
        picture = tmp_path / f"{page.stem}.png"
        subprocess.run([*look, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
        import matplotlib.image
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert pixels.shape[:2] == (1400, 900) and 0.01 < (pixels < 0.9).mean() < 0.5 and math.isfinite(pixels.std())
