"""data.py: shuffling, batches, tokenizers, every shard format, every refusal. One slow test downloads."""
import gzip
import json
import os
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
import train
from data import DataError, batch_at, documents, heldout_batches, open_mixture, open_prepared, prepare
from configs import text as readers
from data import shuffled, train_bpe

ROOT = Path(__file__).parent.parent
TEXT = "The naïve café — 你好, 世界! 🙂\n\n  two  spaces\tand a tab\r\n"
TEXT += "\n".join(f"line {i} of it" for i in range(2000))


@pytest.fixture
def corpus(tmp_path):
    """30 documents of very different lengths, prepared as bytes."""
    (tmp_path / "d").mkdir()
    for i in range(30):
        (tmp_path / "d" / f"{i:02}.txt").write_text(f"document {i}: " + "abcdefg " * (7 * i + 1))
    return prepare((f"{tmp_path}/d/*.txt",), "bytes", tmp_path / "corpus")


def mix(*sources, tokenizer="bytes", data_dir="unused", vocab=257, seq_len=16):
    mixture = tuple((str(source), 1.0) for source in sources)
    return open_mixture(mixture, tokenizer, data_dir, vocab, seq_len)


def stream(ids, parts=3):
    return data.TokenStream(np.array_split(np.asarray(ids, np.uint16), parts), 1.0)


def fake_mixture(lengths, weights):
    """Sources whose ids count up, so that an id tells its source and place."""
    tok = data.load_tokenizer("bytes")
    sources = [data.Source(f"s{k}", data.TokenStream([np.arange(n) + 1_000_000 * (k + 1)], 1.0), {}, "")
               for k, n in enumerate(lengths)]
    weights = np.array(weights) / sum(weights)
    return data.Mixture(sources, weights, tok, "", {}, sum(lengths), 1.0, 2048)


# The shuffle and the batches --------------------------------------------------------------------------------

def test_the_shuffle_is_a_permutation_for_every_length():
    for n in [*range(1, 130), 1000, 4095, 4096, 4097, 100_003]:
        assert (np.sort(shuffled(np.arange(n), n, np.uint64(n))) == np.arange(n)).all(), n


def test_the_shuffle_mixes_and_depends_on_its_key_and_needs_no_table():
    n = 50_000
    a, b = (shuffled(np.arange(n), n, data.shuffle_key(seed)) for seed in (0, 1))
    assert abs(np.abs(a - np.arange(n)).mean() / n - 1 / 3) < 0.01 and (a == b).sum() < 20
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.02
    big = shuffled(np.arange(100_000), 4_400_000_000_007, data.shuffle_key(0))
    assert len(set(big.tolist())) == 100_000 and 0 <= big.min() and big.max() < 4_400_000_000_007


def test_a_batch_is_a_pure_function_and_rows_are_slices_of_it():
    m = fake_mixture([5000, 3000], [2, 1])
    whole = batch_at(m, 7, 12, 16, seed=3)
    for rows in (slice(4, 8), range(4, 8)):
        for a, b in zip(batch_at(m, 7, 12, 16, seed=3, rows=rows), whole):
            assert (a == b[4:8]).all() and a.dtype == b.dtype
    assert (batch_at(m, 7, 12, 16, seed=4).tokens_BS != whole.tokens_BS).any()
    # the same positions, cut into steps of another size: the batch size does not change the order
    a = np.concatenate([batch_at(m, s, 6, 16, seed=3).tokens_BS for s in (14, 15)])
    assert (a == whole.tokens_BS).all() and (whole.targets_BS[:, :-1] == whole.tokens_BS[:, 1:]).all()


def test_every_window_comes_once_per_epoch_and_epochs_differ():
    m = fake_mixture([16 * 100 + 9], [1])                        # 100 windows and a tail that never comes
    starts = np.concatenate([batch_at(m, s, 10, 16, 0).tokens_BS[:, 0] for s in range(20)]) - 1_000_000
    epochs = starts.reshape(2, 100)
    assert (np.sort(epochs) == 16 * np.arange(100)).all() and (epochs[0] != epochs[1]).any()


def test_every_batch_holds_its_sources_in_their_shares():
    mixture = fake_mixture([10_000, 20_000, 5_000], (0.55, 0.35, 0.10))
    for step in range(300):
        source = batch_at(mixture, step, 16, 8, seed=0).tokens_BS[:, 0] // 1_000_000 - 1
        share = np.bincount(source, minlength=3) / 16
        assert np.abs(share - mixture.weights).max() < 2 / 16, step


@pytest.mark.parametrize("weights", [[1], [0.7, 0.2, 0.1], [1, 1, 1], [0.95, 0.03, 0.02]])
def test_mixture_shares_are_exact_within_one_row(weights):
    m = fake_mixture([2000] * len(weights), weights)
    for steps in (32, 64, 320):                                  # of 64 rows: whole blocks of 2048
        ids = np.concatenate([batch_at(m, s, 64, 8, 0).tokens_BS[:, 0] for s in range(steps)])
        share = np.bincount(ids // 1_000_000 - 1, minlength=len(weights))
        assert (np.abs(share - m.weights * steps * 64) <= 1).all()


def test_each_source_of_a_mixture_keeps_its_own_epochs():
    m = fake_mixture([8 * 40 + 1, 8 * 64 + 1], [3, 5])
    ids = np.concatenate([batch_at(m, s, 64, 8, 0).tokens_BS[:, 0] for s in range(32)])
    for k, count in ((0, 40), (1, 64)):
        mine = (ids[ids // 1_000_000 == k + 1] % 1_000_000) // 8
        seen = np.bincount(mine, minlength=count)
        assert seen.max() - seen.min() <= 1


def test_segments_targets_and_weights_by_hand():
    ids = data.TokenStream([np.array([1, 2, 9, 3, 9, 9, 4])], 1.0)
    (batch,) = heldout_batches(ids, 1, 6, eot=9)
    assert batch.tokens_BS.tolist() == [[1, 2, 9, 3, 9, 9]]
    assert batch.targets_BS.tolist() == [[2, 9, 3, 9, 9, 4]]
    assert batch.segments_BS.tolist() == [[1, 1, 1, 2, 2, 3]]
    assert batch.weights_BS.tolist() == [[1, 1, 0, 1, 0, 0]]
    assert batch.segments_BS.dtype == np.int32 and batch.weights_BS.dtype == np.float32


@pytest.mark.parametrize("tokens", [2, 9, 33, 64, 65, 66, 100])
def test_heldout_batches_score_every_target_exactly_once(tokens):
    ids = np.arange(1, tokens + 1)
    ids[5::11] = 999                                             # some documents end
    seen, positions = [], []
    for batch in heldout_batches(stream(ids), 4, 8, eot=999):
        assert all(a.shape == (4, 8) for a in batch)
        real = batch.segments_BS != 0
        seen += batch.targets_BS[real].tolist()
        positions += batch.tokens_BS[real].tolist()
        assert (batch.weights_BS == (real & (batch.tokens_BS != 999))).all()
    assert seen == ids[1:].tolist() and positions == ids[:-1].tolist()


def test_heldout_batches_stop_at_the_limit():
    batches = heldout_batches(stream(np.arange(1000)), 4, 8, eot=5000, limit_tokens=77)
    assert np.concatenate([b.targets_BS[b.segments_BS > 0] for b in batches]).tolist() == list(range(1, 78))


def test_a_stream_reads_across_shard_borders():
    s = stream(np.arange(50), parts=7)
    for start in range(50):
        assert s.read(start, 20).tolist() == list(range(start, min(50, start + 20)))


# Tokenisers -------------------------------------------------------------------------------------------------

def test_bpe_is_deterministic_round_trips_and_merges_newlines():
    a, b = train_bpe([TEXT], 400), train_bpe([TEXT], 400)
    assert a.sha256 == b.sha256 and a.vocab_size == 400 and a.eot == 399 and len(a.pieces) == 399
    assert a.decode(a.encode(TEXT)) == TEXT and len(a.encode(TEXT)) < len(TEXT.encode()) / 2
    assert b".\n\n" in train_bpe(["one.\n\ntwo.\n\n" * 50], 262).pieces
    assert train_bpe([TEXT], 399).pieces == a.pieces[:-1]        # the smaller is a prefix of the larger


def test_bpe_merges_the_most_frequent_pair_and_breaks_ties_downwards():
    assert train_bpe(["ab ab ab cd cd"], 258).pieces[256] == b"ab"
    assert train_bpe(["zy\nzy\nba\nba\n"], 258).pieces[256] == b"ba"


@pytest.mark.parametrize("make", [lambda: data.load_tokenizer("bytes"), lambda: train_bpe([TEXT], 300)])
def test_bytes_V_counts_the_bytes_of_the_text(make):
    tok = make()
    ids = tok.encode(TEXT)
    assert tok.bytes_V[ids].sum() == len(TEXT.encode()) and tok.bytes_V[tok.eot] == 0
    assert tok.bytes_V.dtype == np.int32 and tok.bytes_V.shape == (tok.vocab_size,)
    assert tok.decode([*tok.encode("a"), tok.eot, 10**6, 0xC3 if tok.name == "bytes" else 10**6]) == \
        "a<|end_of_text|>\ufffd\ufffd"
    assert tok.eot not in tok.encode("<|end_of_text|>")


def test_long_texts_are_cut_without_changing_a_token(monkeypatch):
    tok, text = train_bpe([TEXT], 300), TEXT * 20
    cut = tok.encode(text)
    monkeypatch.setattr(data, "PIECE", 1 << 30)
    assert tok.encode(text) == cut
    monkeypatch.undo()
    spaces = " " * 1_500_000                                     # tiktoken alone dies of this
    assert tok.decode(tok.encode(spaces)) == spaces


def test_lone_surrogates_are_question_marks_in_every_step(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"row {i} \ud800 " * 9}) + "\n" for i in range(40)))
    m = mix(tmp_path / "a.jsonl", tokenizer="bpe:270", data_dir=tmp_path, vocab=270)
    assert "row 1 ? row 1 ? " in m.tokenizer.decode(m.sources[0].train.read(0, 10**4))


def test_a_tokenizer_survives_saving_and_a_foreign_vocabulary_says_what_it_lacks(tmp_path):
    tok = train_bpe([TEXT], 300)
    tok.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.tiktoken"):
        assert data.load_tokenizer(path).sha256 == tok.sha256
    (tmp_path / "tokenizer.tiktoken.json").unlink()
    with pytest.raises(DataError, match=r"299 ranks is none of .*tokenizer.tiktoken.json"):
        data.load_tokenizer(tmp_path)
    facts, side = {**tok.facts}, tmp_path / "tokenizer.tiktoken.json"
    for key, value in (("eot", "last"), ("eot", 298), ("vocab_size", 299), ("pattern", "("),
                       ("vocab_size", 10**12), ("pattern", r"\X")):
        side.write_text(json.dumps({**facts, key: value}))
        with pytest.raises(DataError, match="tokenizer.tiktoken.*expected"):
            data.load_tokenizer(tmp_path)
    lines = (tmp_path / "tokenizer.tiktoken").read_bytes().splitlines()
    (tmp_path / "cut.tiktoken").write_bytes(b"\n".join(lines[7:]))
    (tmp_path / "bad.tiktoken").write_bytes(b"no base64!\n")
    for name, says in (("cut", "299|292 ranks"), ("bad", "lines of base64"), ("none", "no such vocabulary")):
        with pytest.raises(DataError, match=says):
            data.load_tokenizer(tmp_path / f"{name}.tiktoken")
    with pytest.raises(DataError, match="at least 258"):
        mix(ROOT / "data.py", tokenizer="bpe:12")
    with pytest.raises(DataError, match="repeats only enough"):
        train_bpe(["abc abc"], 4096)


# Preparation ------------------------------------------------------------------------------------------------

def test_a_prepared_corpus_holds_its_text_exactly_and_holds_out_whole_documents(corpus, tmp_path):
    source, tok = open_prepared(corpus), data.load_tokenizer(corpus)
    texts = {path.read_text() for path in (tmp_path / "d").iterdir()}
    split = {name: tok.decode(s.read(0, s.tokens)).split("<|end_of_text|>")[:-1]
             for name, s in {"train": source.train, **source.heldout}.items()}
    assert {*split["train"]} | {*split["d"]} == texts and not {*split["train"]} & {*split["d"]}
    manifest = json.loads((corpus / "manifest.json").read_text())
    counts = [manifest["train"]["documents"], manifest["heldout"]["d"]["documents"]]
    assert counts == [*map(len, split.values())]
    assert manifest["train"]["bytes"] == sum(len(t.encode()) for t in split["train"])


def test_equal_documents_never_land_on_both_sides(tmp_path):
    rows = [json.dumps({"text": f"text {i % 40}"}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    sides = list(documents(f"{tmp_path}/a.jsonl", tmp_path))
    train, held = ({t for d, t in sides if (d is None) == side} for side in (True, False))
    assert held and train and not held & train


def test_files_named_heldout_are_held_out_and_nothing_else_is(tmp_path):
    (tmp_path / "c").mkdir()
    for name, n in (("train", 50), ("heldout", 3), ("more", 30)):
        rows = [json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(n)]
        (tmp_path / "c" / f"{name}.jsonl").write_text("".join(rows))
    found = list(documents(f"{tmp_path}/c/*.jsonl", tmp_path))
    assert [text for domain, text in found if domain == "c"] == [f"heldout {i}" for i in range(3)]
    assert [text for domain, text in found if domain is None] == [
        *(f"more {i}" for i in range(30)), *(f"train {i}" for i in range(50))]


def test_shards_split_and_are_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 500)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 60}) + "\n" for i in range(50)))
    source = open_prepared(prepare((f"{tmp_path}/a.jsonl",), "bytes", tmp_path / "out"))
    assert len(source.train.parts) > 10 and max(map(len, source.train.parts)) <= 500
    assert data.load_tokenizer("bytes").decode(source.train.read(0, 10**6)).count("<|end_of_text|>") >= 45


def test_preparing_again_is_a_no_op_until_the_text_changes(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("hello there\n" * 100)
    out = prepare((str(text),), "bytes", tmp_path / "out")
    before = (out / "manifest.json").stat().st_mtime_ns
    assert prepare((str(text),), "bytes", out) == out
    assert (out / "manifest.json").stat().st_mtime_ns == before
    text.write_text("something else\n" * 100)
    with pytest.raises(DataError, match="made from other sources"):
        prepare((str(text),), "bytes", out)
    first = mix(text, data_dir=tmp_path / "cache")
    text.write_text("and again new\n" * 100)
    assert mix(text, data_dir=tmp_path / "cache").sha256 != first.sha256         # not the stale shards


def test_an_interrupted_preparation_leaves_nothing_finished(tmp_path, monkeypatch):
    def breaks(path):
        yield from (f"document {i} " * 50 for i in range(2000))
        raise KeyboardInterrupt
    monkeypatch.setattr(readers, "read_file", breaks)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(KeyboardInterrupt):
        prepare((f"{tmp_path}/a.txt",), "bytes", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / "out.partial-1234").mkdir()                      # what kill -9 leaves is not looked at
    with pytest.raises(DataError, match="no manifest.json"):
        open_prepared(tmp_path / "out.partial-1234")


def test_one_bpe_serves_all_sources_and_prepared_directories_join_with_it(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT + name * 999)
    sources = ((f"{tmp_path}/a.txt", 2), (f"{tmp_path}/b.txt", 1))
    m = open_mixture(sources, "bpe:300", tmp_path / "cache", 300, 16)
    assert [s.name for s in m.sources] == ["a", "b"] == list(m.heldout)
    assert m.weights.tolist() == [2 / 3, 1 / 3]
    assert m.tokenizer.vocab_size == 300 and 1 < m.bytes_per_token < 5
    assert open_mixture(sources, "bpe:300", tmp_path / "cache", 300, 16).sha256 == m.sha256
    folder = str(next(p for p in (tmp_path / "cache").iterdir() if p.name.startswith("a-")))
    again = mix(folder, tokenizer=folder, vocab=300)
    assert again.tokenizer.sha256 == m.tokenizer.sha256
    twice = mix(folder, folder, tokenizer=folder, vocab=300)
    assert len(twice.heldout) == 2                               # a name that is taken gets a prefix
    with pytest.raises(DataError, match="made with tokenizer bpe300 .* found bytes"):
        mix(folder, tokenizer="bytes")


def test_gz_zst_and_parquet(tmp_path):
    rows = [{"text": f"row {i} é " * 20} for i in range(30)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "plain.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    want = [text for _, text in documents(f"{tmp_path}/plain.jsonl", tmp_path)]
    assert want == [row["text"] for row in rows]
    assert [text for _, text in documents(f"{tmp_path}/a.jsonl.gz", tmp_path)] == want
    for module, name in (("zstandard", "b.jsonl.zst"), ("pyarrow", "c.parquet")):
        try:
            __import__(module)
        except ImportError:
            (tmp_path / name).write_bytes(b"some bytes")
            with pytest.raises(DataError, match=f"pip install -U .{module}"):
                list(documents(f"{tmp_path}/{name}", tmp_path))
            continue
        if module == "zstandard":
            (tmp_path / name).write_bytes(__import__(module).ZstdCompressor().compress(lines))
        else:
            import pyarrow.parquet
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        assert [text for _, text in documents(f"{tmp_path}/{name}", tmp_path)] == want


def test_wheels_and_hugging_face_without_a_network(tmp_path, monkeypatch):
    folder = tmp_path / "wheels" / "toy==1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as z:
        for i in range(30):
            z.writestr(f"toy/m{i}.py", f"x = {i // 2}  # every text twice\n")
        z.writestr("../../escape.py", "never unpacked")
        z.writestr("toy/blob.so", b"\xff\xfe")
        link = zipfile.ZipInfo("toy/link.py")
        link.external_attr = 0o120777 << 16                      # a symbolic link, whose content is its target
        z.writestr(link, "/etc/passwd")
        z.writestr("toy/latin.py", b"\xe9\xe8")
    texts = [text for _, text in documents("pip:toy==1.0", tmp_path)]
    joined = "".join(texts)
    assert joined.count("twice") == 15 and "never unpacked" in joined and "passwd" not in joined and not list(tmp_path.rglob("*.py"))
    with pytest.raises(DataError, match="sha256 [0-9a-f]{64} instead of 00ff"):
        list(documents("pip:toy==1.0#sha256=00ff", tmp_path))
    with pytest.raises(DataError, match="expected pip:NAME==VERSION"):
        list(documents("pip:--index-url=http://evil==1", tmp_path))
    monkeypatch.setattr(readers.subprocess, "run", lambda *a, **k: types.SimpleNamespace(
        returncode=1, stderr="noise\nERROR: No matching distribution found for gone==1.0\n"))
    with pytest.raises(DataError, match="could not fetch gone==1.0 .*No matching.*run: python"):
        list(documents("pip:gone==1.0", tmp_path))
    assert not (tmp_path / "wheels" / "gone==1.0").exists()

    rows = [{"body": f"row {i}"} for i in range(25)]
    fake = types.SimpleNamespace(load_dataset=lambda *a, **k: iter(rows), __version__="4.0.0")
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(list(documents("hf:org/set::body", tmp_path))) == 25
    with pytest.raises(DataError, match="hf:org/set: expected strings under 'text'"):
        list(documents("hf:org/set", tmp_path))
    fake.__version__ = "2.14.0"
    with pytest.raises(DataError, match="hf:org/set: datasets is 2.14.0; run: pip install -U .datasets>=4"):
        list(documents("hf:org/set", tmp_path))


def test_stdlib_needs_no_network_and_holds_out_whole_files(tmp_path):
    counts = Counter(domain for domain, _ in documents("stdlib", tmp_path))
    assert counts[None] > 300 and 0.003 < counts["stdlib"] / counts[None] < 0.06


# Shards of others -------------------------------------------------------------------------------------------

IDS = np.concatenate([np.arange(200), [256], np.arange(199)])   # 400 ids, one eot of the bytes tokenizer


def raw(folder, blob, kind="nanogpt", name="a.bin", suffix=""):
    (folder / name).write_bytes(blob)
    return f"{kind}:{folder}/{name}{suffix}"


def llmc(folder, ids, magic=20240520, version=1, count=None, dtype="<u2", name="a.bin", kind="llmc"):
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, len(ids) if count is None else count
    return raw(folder, head.tobytes() + np.asarray(ids, dtype).tobytes(), kind, name)


def megatron(folder, ids, code=8, dtype="<u2", lengths=(200, 200), index=1 << 20):
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), 3)
    index = (head + np.array(lengths, "<i4").tobytes() + bytes(8 * len(lengths) + 24))[:index]
    (folder / "m.idx").write_bytes(index)
    (folder / "m.bin").write_bytes(np.asarray(ids, dtype).tobytes())
    return f"megatron:{folder}/m"


U2, U4 = IDS.astype("<u2").tobytes(), IDS.astype("<u4").tobytes()
FOREIGN = {
    "nanogpt": lambda d: raw(d, U2),
    "olmo": lambda d: raw(d, U4, "olmo", "part-0.npy", "?dtype=uint32"),
    "llmc v1": lambda d: llmc(d, IDS),
    "llmc v7": lambda d: llmc(d, IDS, 20240801, 7, dtype="<u4"),
    "megatron uint16": lambda d: megatron(d, IDS),
    "megatron int32": lambda d: megatron(d, IDS, 4, "<i4"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_shards_are_read_as_written(tmp_path, kind):
    m = mix(FOREIGN[kind](tmp_path))
    (source,) = m.sources
    held = m.heldout[source.name]
    assert [*source.train.read(0, 400), *held.read(0, 400)] == IDS.tolist() and held.tokens == 4
    row = np.concatenate([b.segments_BS for b in [batch_at(m, s, 4, 16, 0) for s in range(6)]])
    assert row.max() == 2 and row.min() == 1


def test_foreign_files_named_val_are_held_out_and_never_trained_on(tmp_path):
    for name in ("x_train_1", "x_train_2", "x_val_1"):
        llmc(tmp_path, IDS[:300], name=f"{name}.bin")
    m = mix(f"llmc:{tmp_path}/*.bin")
    assert m.train_tokens == 600 and [s.tokens for s in m.heldout.values()] == [300]


def test_ids_above_65535_survive(tmp_path):
    tok = data.load_tokenizer("bytes")
    pieces = tok.pieces + [b"%d" % i for i in range(1_000_000, 1_070_000)]
    big = data.Tokenizer("big", data.LLAMA3, pieces, len(pieces), len(pieces) + 1)
    (tmp_path / "big").mkdir()
    big.save(tmp_path / "big")
    ids = np.arange(65_000, 70_000)
    m = mix(llmc(tmp_path, ids, 20240801, 7, dtype="<u4"), tokenizer=tmp_path / "big", vocab=big.vocab_size)
    assert m.sources[0].train.read(0, 4000).tolist() == ids[:4000].tolist()
    (tmp_path / "t.txt").write_text("plain text\n" * 50)
    made = prepare((f"{tmp_path}/t.txt",), tmp_path / "big", tmp_path / "made")
    source = open_prepared(made)
    assert source.train.parts[0].dtype == np.uint32
    assert source.train.read(0, 9999).max() == big.eot == len(pieces) > 65_535


# Refusals: each names the file or the key and says what to do ----------------------------------------------

FILES = [
    ("nothing*.txt", None, "no such source and no such file"),
    ("empty.txt", b"", "empty.txt.*: the file is empty"),
    ("latin.txt", b"caf\xe9 " * 40, "latin.txt: expected UTF-8 text"),
    ("a.docx", b"x", "a.docx: expected .txt"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl line 2: expected .*JSONDecodeError"),
    ("nokey.jsonl", b'{"body": "a"}\n', "nokey.jsonl line 1: .*KeyError.'text'"),
    ("number.jsonl", b'{"text": 3}\n', 'number.jsonl line 1: .*TypeError.*"int"'),
    ("list.jsonl", b'[1]\n', "list.jsonl line 1: expected .*TypeError"),
    ("blank.jsonl", b'\n\n', "blank.jsonl: no text in it"),
    ("cut.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 999)[:40], "cut.jsonl.gz"),
    ("not.txt.gz", b"plain", "not.txt.gz: .*BadGzipFile"),
    ("short.txt", b"tiny", "training tokens, but one window of seq_len=16 takes 17"),
]


@pytest.mark.parametrize("name, blob, says", FILES, ids=[row[0] for row in FILES])
def test_bad_text_is_refused_by_name(tmp_path, name, blob, says):
    path = tmp_path / name
    if blob is not None:
        path.write_bytes(blob)
    with pytest.raises(DataError, match=says) as error:
        mix(path, data_dir=tmp_path / "cache")
    assert "\n" not in str(error.value) and name in str(error.value)
    assert name == "short.txt" or not list(tmp_path.glob("cache/*/manifest.json"))


SHARDS = {
    "a.npy: expected its dtype": lambda d: raw(d, U4, "olmo", "a.npy"),
    "expected llm.c's magic and version.*found .*123, 1": lambda d: llmc(d, IDS, 123),
    "expected llm.c's magic and version.*found .*20240801, 1": lambda d: llmc(d, IDS, 20240801, 1),
    "expected llm.c's magic and version.*found .*0, 0": lambda d: raw(d, bytes(100), "llmc"),
    "a.bin: .*its header promises 1,000 tokens, found 238": lambda d: llmc(d, IDS[:238], count=1000),
    "a.bin: .*its header promises 0 tokens, found 0": lambda d: llmc(d, []),
    "a.bin: holds ids 0 to 55432": lambda d: llmc(d, IDS, kind="nanogpt"),
    "a.bin: expected whole tokens, found .*5": lambda d: raw(d, U2 + b"x"),
    "a.bin: holds ids 1 to 257, but bytes has 0 to 256": lambda d: raw(d, (IDS + 1).astype("<u2").tobytes()),
    "m.bin: holds ids -256 to 0": lambda d: megatron(d, -IDS, 4, "<i4"),
    "m.bin: .* promises 500 tokens, found 400": lambda d: megatron(d, IDS, lengths=(200, 300)),
    "m.bin: expected PREFIX.bin and a whole PREFIX.idx": lambda d: megatron(d, IDS, index=38),
    "a.bin: expected PREFIX.bin and a whole.*FileNotFound": lambda d: raw(d, U2, "megatron")[:-4],
    "a.bin: every other id is 0.*olmo:GLOB.dtype=uint32": lambda d: raw(d, U4),
    "a.npy: every other id is 0": lambda d: raw(d, U4, "olmo", "a.npy", "?dtype=uint16"),
    "no such source and no such file": lambda d: f"nanogpt:{d}/*.bin",
    "a.bin.*: the file is empty": lambda d: raw(d, b""),
    "none is left to train on": lambda d: llmc(d, IDS, name="x_val_0.bin"),
    "a.bin: expected more than 2 tokens, found 2": lambda d: raw(d, U2[:4]),
    "8 training tokens, but one window of seq_len=16 takes 17": lambda d: raw(d, U2[:20]),
    "no manifest.json": lambda d: str(d),
}


@pytest.mark.parametrize("says", SHARDS)
def test_bad_shards_are_refused_by_name(tmp_path, says):
    with pytest.raises(DataError, match=says) as error:
        mix(SHARDS[says](tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def edit(corpus, split=None, **keys):
    """Change keys of the manifest, or of one split in it."""
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text())
    (manifest[split] if split else manifest).update(keys)
    path.write_text(json.dumps(manifest))


def flip(path):
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


DAMAGE = {
    "train-00000.bin: expected .* bytes, found 0": lambda c: (c / "train-00000.bin").unlink(),
    "train-00000.bin: expected .* bytes, found 9": lambda c: (c / "train-00000.bin").write_bytes(bytes(9)),
    "train-00000.bin: its content has changed": lambda c: flip(c / "train-00000.bin"),
    "heldout-d-00000.bin: its content has changed": lambda c: flip(c / "heldout-d-00000.bin"),
    "no manifest.json": lambda c: (c / "manifest.json").unlink(),
    "manifest.json: expected .*JSONDecodeError": lambda c: (c / "manifest.json").write_text('{"request": '),
    "manifest.json: expected .*TypeError": lambda c: (c / "manifest.json").write_text("[]"),
    "manifest.json: expected .*KeyError": lambda c: edit(c, train={}),
    "manifest.json: expected .*ZeroDivision": lambda c: edit(c, "train", shards=[]),
    "expected format 1, found 99": lambda c: edit(c, request={"format": 99}),
    "tokenizer.tiktoken: not what made this": lambda c: train_bpe([TEXT], 300).save(c),
    "manifest.json: expected .*operand.*str": lambda c: edit(c, "train", bytes="5"),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_corpus_is_refused_by_name(corpus, says):
    mix(corpus)
    DAMAGE[says](corpus)
    with pytest.raises(DataError, match=says) as error:
        mix(corpus)
    assert "\n" not in str(error.value) and str(corpus) in str(error.value)


def test_a_vocabulary_too_small_for_the_model_and_nonsense_mixtures_are_refused(corpus):
    with pytest.raises(DataError, match="vocab_size=256: .* 257 or more"):
        mix(corpus, vocab=256)
    for mixture in (None, (), ("books",), (("books",),), (("books", 1, 2),), (("books", 0),),
                    (("books", float("nan")),), (("books", "1"),), ((3, 1),)):
        with pytest.raises(DataError, match="mixture: expected"):
            open_mixture(mixture, "bytes", "unused", 257, 16)
    with pytest.raises(DataError, match="no text here to train it on"):
        mix(corpus, tokenizer="bpe:300")
    with pytest.raises(DataError, match="manifest.json.*: cannot be written"):
        mix(ROOT / "data.py", data_dir=corpus / "manifest.json")


# What must stay as it was ------------------------------------------------------------------------------------

def keep_times(path, change):
    """Change a file and put its times back, as cp -p and rsync -t do."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_the_fingerprint_covers_content_roles_and_weights(tmp_path, monkeypatch):
    ids = np.arange((1 << 20) + 5000, dtype=np.uint16) % 250
    for name in ("ng_1", "ng_2"):
        (tmp_path / f"{name}.bin").write_bytes(ids.tobytes())
    source = f"nanogpt:{tmp_path}/*.bin"
    first = mix(source).sha256
    assert mix(source).sha256 == first
    changed = ids.copy()
    changed[1 << 20:] = 9                                        # all that the first 2^20 ids do not show
    keep_times(tmp_path / "ng_2.bin", lambda path: path.write_bytes(changed.tobytes()))
    assert mix(source).sha256 != first
    with monkeypatch.context() as patched:
        patched.setattr(data, "CHECK_BYTES", 0)                  # then samples stand for all
        sampled = mix(source).sha256
        (tmp_path / "ng_2.bin").write_bytes(ids.tobytes())
        assert mix(source).sha256 != sampled
    (tmp_path / "ng_2.bin").rename(tmp_path / "ng_2_val.bin")
    assert mix(source).sha256 != first
    (tmp_path / "ng_2_val.bin").rename(tmp_path / "ng_2x.bin")
    open_with = lambda *weights: open_mixture(
        [(f"nanogpt:{tmp_path}/ng_{name}.bin", w) for name, w in zip(("1", "2x"), weights)], "bytes", "", 257, 16)
    assert open_with(1, 2).sha256 == open_with(2, 4).sha256 != open_with(1, 3).sha256


def test_shards_that_change_while_in_use_are_noticed(corpus, tmp_path):
    llmc(tmp_path, IDS)
    for source, path in ((corpus, corpus / "train-00000.bin"), (f"llmc:{tmp_path}/a.bin", tmp_path / "a.bin")):
        m = mix(source)
        data.check_unchanged(m)
        os.utime(path)                                           # another time and the same content
        data.check_unchanged(m)
        keep_times(path, flip)
        with pytest.raises(DataError, match=f"{path.name}: was altered while in use"):
            data.check_unchanged(m)
        flip(path)
        data.check_unchanged(m)
        os.truncate(path, path.stat().st_size // 2)              # reading it would be SIGBUS
        with pytest.raises(DataError, match=f"{path.name}: cut short while in use"):
            m.sources[0].train.read(0, 16)


def test_a_run_on_altered_shards_stops_before_it_saves(config, load, tmp_path, monkeypatch):
    """The loop with a step that does nothing: it saves after step 3, the shard changes, step 6 would save."""
    c, t = load(config, data_dir=tmp_path / "cache")
    monkeypatch.setattr(train, "make_train_step", lambda *args: lambda state, batch: (state, {}))
    monkeypatch.setattr(train, "to_global_batch", lambda batch, *args: batch)
    monkeypatch.setattr(train.kernels, "fill_holes", lambda: None)
    log, mixture, saved = types.SimpleNamespace(step=lambda *args: None, since=0), train.open_data(c, t), []

    def save(state):
        saved.append(state)
        flip(Path(next(iter(mixture.files))))
    with pytest.raises(DataError, match="was altered while in use"):
        train.loop(c, t, train.make_mesh(c, t), mixture, types.SimpleNamespace(step=0), save, log,
                   lambda *args: None, lambda: None, lambda step: None)
    assert len(saved) == 1


def test_text_rewritten_with_equal_size_and_times_is_prepared_again(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("hello there\n" * 100)
    first = mix(text, data_dir=tmp_path / "cache").sha256
    keep_times(text, lambda path: path.write_text("HELLO THERE\n" * 100))
    assert mix(text, data_dir=tmp_path / "cache").sha256 != first


def test_a_vocabulary_cut_after_a_line_is_refused(tmp_path):
    train_bpe([TEXT], 300).save(tmp_path)
    path, side = tmp_path / "tokenizer.tiktoken", tmp_path / "tokenizer.tiktoken.json"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:270]))
    facts = json.loads(side.read_text())
    for sha256 in ({}, {"sha256": facts.pop("sha256")}):         # as before there was one, and now
        side.write_text(json.dumps(facts | sha256))
        with pytest.raises(DataError, match="tokenizer.tiktoken: not what tokenizer.tiktoken.json says"):
            data.load_tokenizer(tmp_path)


def test_what_a_killed_maker_left_is_removed_and_a_live_ones_is_not(tmp_path):
    host, dead = os.uname().nodename, subprocess.Popen(["true"])
    dead.wait()
    names = [f"out.partial-{host}-{pid}-0123abcd" for pid in (dead.pid, os.getpid())]
    names += [f"out.partial-elsewhere-{dead.pid}-0123abcd", f"other.partial-{host}-{dead.pid}-0123abcd"]
    for name in names:
        (tmp_path / name).mkdir()
    with data.atomic_directory(tmp_path / "out") as scratch:
        (scratch / "file").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names[1:]}


def test_shards_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(data.os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")),
                                                          real(handle)))
    (tmp_path / "a.txt").write_text(TEXT)
    prepare((f"{tmp_path}/a.txt",), "bytes", tmp_path / "out")
    names = [Path(path).name for path in synced]
    assert {"train-00000.bin", "manifest.json", "tokenizer.tiktoken"} <= {*names[:-2]}
    assert names[-2].startswith("out.partial-") and synced[-1] == str(tmp_path)


# What foreign shards mean ------------------------------------------------------------------------------------

def documents_a_row(m, seq_len):
    return batch_at(m, 0, 4, seq_len, 0).segments_BS.max(1)


def test_llama3_shards_of_llmc_begin_documents_with_an_id_of_their_own(tmp_path):
    tok = data.load_tokenizer("bytes")
    pieces = tok.pieces + [b"%d" % i for i in range(1_000_000, 1_000_000 + 128_000 - 256)]
    data.Tokenizer("llama3", data.LLAMA3, pieces, 128001, 128256).save(tmp_path)
    ids = np.tile(np.append(128000, np.arange(49)), 40)
    for name in ("fw_train_000000.bin", "fw_val_000000.bin"):
        source = llmc(tmp_path, ids, 20240801, 7, dtype="<u4", name=name).replace(name, "fw_*.bin")
    m = mix(source, tokenizer=tmp_path, vocab=128256, seq_len=200)
    assert documents_a_row(m, 200).tolist() == [4] * 4 and m.heldout["fw"].tokens == 2000
    batch = batch_at(m, 0, 4, 200, 0)
    assert ((batch.weights_BS == 0) == (batch.targets_BS == 128000)).all() and (batch.weights_BS == 0).any()


@pytest.mark.parametrize("firsts", [None, [*range(0, 21, 2)]])
def test_megatron_lengths_are_the_borders_of_documents(tmp_path, firsts):
    ids = np.arange(1000) % 200
    source = megatron(tmp_path, ids, lengths=[50] * 20)
    if firsts:                                                   # two sequences a document
        head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 20, len(firsts))
        (tmp_path / "m.idx").write_bytes(head + np.full(20, 50, "<i4").tobytes() + bytes(160)
                                         + np.array(firsts, "<i8").tobytes())
    m = mix(source, seq_len=200)
    assert documents_a_row(m, 200).tolist() == [2 if firsts else 4] * 4
    (held,) = heldout_batches(m.heldout["m"], 1, 16, eot=256)
    assert held.segments_BS[0, :9].tolist() == [1] * 9


def test_shards_without_any_border_are_told(tmp_path, capsys):
    mix(raw(tmp_path, (IDS % 200).astype("<u2").tobytes()))
    assert "no border of documents (id 256)" in capsys.readouterr().err
    mix(raw(tmp_path, U2))
    found = capsys.readouterr().err
    assert "no border" not in found and "held out: the last 1 % of a.bin" in found


def test_names_that_say_held_out():
    from configs.foreign import is_heldout
    assert all(map(is_heldout, ["eval.bin", "test.bin", "dev.bin", "VAL.bin", "x_Val_1.bin", "valid.npy", "a-validation"]))
    assert not any(map(is_heldout, ["train_valencia.bin", "val-train.bin", "devices.bin", "latest.bin", "validity.bin"]))


# Names, files and folders ------------------------------------------------------------------------------------

def test_names_are_distinct_and_none_is_train_or_macro(tmp_path):
    assert data.names_of(["notes/*.md", "notes/*.txt", "books"]) == ["notes_md", "notes_txt", "books"]
    assert data.names_of(["a/notes.txt", "b/notes.txt"]) == ["notes_a", "notes_b"]
    assert data.names_of(["train.txt", "x/macro.txt"]) == ["files_train", "files_macro"]
    (tmp_path / "n").mkdir()
    for name in ("a.md", "a.txt"):
        (tmp_path / "n" / name).write_text(TEXT + name)
    m = mix(f"{tmp_path}/n/*.md", f"{tmp_path}/n/*.txt", data_dir=tmp_path / "cache")
    assert [*m.heldout] == [s.name for s in m.sources] == ["n_md", "n_txt"]


def test_the_share_that_is_held_out_does_not_hang_on_the_first_documents():
    for seed in range(30):
        held = [domain for domain, _ in data.hold_out((f"{seed} {i}" for i in range(400)), "x") if domain]
        assert 1 <= len(held) <= 17                              # of 400: 6.25 expected, and one more


def test_each_folder_and_file_is_read_once_whatever_links_there_are(tmp_path, monkeypatch):
    (tmp_path / "loop" / "sub").mkdir(parents=True)
    for i, folder in enumerate(("", "sub")):
        (tmp_path / "loop" / folder / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "loop" / "sub" / "up").symlink_to("..")
    (tmp_path / "loop" / "again").symlink_to("sub")
    (tmp_path / "loop" / "same.txt").symlink_to("0.txt")
    wanted = [f"{tmp_path}/loop/{name}" for name in ("0.txt", "sub/1.txt")]
    for pattern in ("loop/**/*.txt", "loop", "loo*/**"):
        assert sorted(map(os.path.realpath, readers.matches(f"{tmp_path}/{pattern}"))) == wanted
    monkeypatch.chdir(tmp_path)
    assert readers.matches("**/1.txt") and len(readers.matches("**/*.txt")) == 2


def test_folders_strings_brackets_and_empty_files_are_taken(tmp_path, capsys):
    folder = tmp_path / "my notes"
    folder.mkdir()
    (folder / "a [draft].txt").write_text(TEXT)
    (folder / "b.MD").write_text("b" * 99)
    (folder / "image.png").write_bytes(b"\xff")
    (folder / "__init__.py").write_bytes(b"")
    m = open_mixture(str(folder), "bytes", tmp_path / "cache", 257, 16)
    assert m.sources[0].name == "my_notes" and m.train_tokens > 0.95 * len(TEXT)
    assert "of 3 files 1 are empty" in capsys.readouterr().err
    assert len(list(documents(f"{folder}/a [draft].txt", tmp_path))) == 2
    with pytest.raises(DataError, match="no manifest.json.*no text in it"):
        (tmp_path / "none").mkdir()
        readers.matches(str(tmp_path / "none"))
    with pytest.raises(DataError, match="holds tokens, no text"):
        documents(str(prepare((str(folder),), "bytes", tmp_path / "made")), tmp_path)


def test_a_mixture_may_be_one_source(config, load):
    assert load(config, mixture="../my notes")[1].mixture == (("../my notes", 1.0),)


def test_marks_borders_and_long_files(tmp_path, monkeypatch):
    (tmp_path / "marks.txt").write_bytes(b"<|endoftext|>\r\none\r\n<|endoftext|>\r\n<|endoftext|>\r\ntwo\r\n<|endoftext|>")
    assert [text.strip() for text in readers.read_file(str(tmp_path / "marks.txt"))] == ["", "one", "", "two"]
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"one\n<|endoftext|>\ntwo <|endoftext|>\n<|endoftext|>\n")
    assert list(readers.read_file(str(tmp_path / "bom.txt"))) == ["one", "two <|endoftext|>", ""]
    monkeypatch.setattr(readers, "LONGEST", 100)
    text = "é line of text\n" * 99 + "x" * 500
    (tmp_path / "long.TXT").write_text(text)
    found = list(readers.read_file(str(tmp_path / "long.TXT")))
    assert "".join(found) == text and max(map(len, found)) == 100 and found[1].startswith("\né")


def test_a_cut_zst_file_is_refused_and_several_frames_are_read(tmp_path):
    pack = pytest.importorskip("zstandard").compress
    rng, path = np.random.default_rng(0), tmp_path / "x.txt.zst"
    text = "".join(map(chr, rng.integers(97, 123, 300_000)))
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"aside"
    path.write_bytes(pack(text[:100_000].encode()) + pack(b"") + skippable + pack(text[100_000:].encode()))
    assert "".join(readers.read_file(str(path))) == text
    for share in (0.3, 0.5, 0.99):
        blob = pack(text.encode())
        path.write_bytes(blob[:int(share * len(blob))])
        with pytest.raises(DataError, match="x.txt.zst: cut short"):
            list(readers.read_file(str(path)))


@pytest.mark.parametrize("unit", ["lines of text\r\n", "a paragraph on one line\n\n", "no line ends at all "])
@pytest.mark.parametrize("pattern", [data.LLAMA3, data.GPT2])
def test_cuts_change_no_token(unit, pattern, monkeypatch):
    tok = train_bpe([unit * 99], 265)
    tok = data.Tokenizer("x", pattern, tok.pieces, tok.eot, tok.vocab_size)
    text = unit * 40
    whole = tok.encode(text)
    monkeypatch.setattr(data, "PIECE", 64)
    assert tok.encode(text) == whole and len(list(data.pieces_of(text))) > 5


def test_bpe_is_quick_on_text_without_spaces():
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 200_000))
    began = time.process_time()
    assert train_bpe([text], 512).vocab_size == 512 and time.process_time() - began < 20     # was minutes


def test_the_vocabularies_of_tiktoken_by_name(monkeypatch):
    ranks = {piece: i for i, piece in enumerate(data.SINGLE_BYTES)}
    found = types.SimpleNamespace(_mergeable_ranks=ranks, _pat_str=data.LLAMA3, eot_token=256, n_vocab=300)
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: {"r50k_base": found}[name])
    tok = data.load_tokenizer("gpt2")
    assert (tok.name, tok.eot, tok.vocab_size) == ("gpt2", 256, 300)
    def offline(name):
        raise OSError("no route to host")
    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match="cl100k_base: expected the vocabulary, from the network.*go online"):
        data.load_tokenizer("cl100k_base")


@pytest.mark.slow
def test_a_large_text_is_prepared_in_little_memory(tmp_path):
    with open(tmp_path / "big.txt", "w") as file:
        for i in range(50):
            file.write(f"{i} some words that repeat, and a number {i * i}\n" * (10**6 // 48))
    # not ru_maxrss, which a child takes over from a parent that holds much
    script = ("import data, re, sys; data.prepare((sys.argv[1],), 'bytes', sys.argv[2]);"
              "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "big.txt", tmp_path / "out"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500 * 1024                         # kB; these 50 MB took 1 GB


# The command line -------------------------------------------------------------------------------------------

def command(*args):
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, args)], capture_output=True, text=True)


def test_the_command_line_prepares_checks_and_prints(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    done = command("prepare", tmp_path / "a.txt", "--tokenizer=bpe:300", f"--out={tmp_path}/out")
    assert done.returncode == 0 and "training tokens of" in done.stderr, done.stderr
    assert "train: " in command("check", tmp_path / "out").stdout
    parts = [subprocess.run([sys.executable, ROOT / "data.py", "text", tmp_path / "a.txt", f"--split={s}"],
                            capture_output=True).stdout for s in ("train", "a")]
    assert parts[0][:-1] + parts[1][:-1] == (tmp_path / "a.txt").read_bytes()


@pytest.mark.parametrize("line", ["check nowhere", "prepare none.txt --out=x", "prepare stdlib", "nonsense",
                                  "text none.txt", "prepare stdlib --tokenizer=x --out=y", "text"])
def test_the_command_line_fails_with_one_line_and_status_2(line):
    done = command(*line.split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("data.py: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_books_are_the_recorded_ones(tmp_path):
    texts = list(documents("books", tmp_path))
    size = lambda domain: sum(len(text.encode()) for d, text in texts if d == domain)
    assert len(texts) == 38 + 66
    assert [*map(size, (None, "shakespeare", "kjv"))] == [8_792_382, 502_654, 209_813]


def test_the_demonstration_shows_tokens_and_a_batch():
    done = command()
    assert done.returncode == 0 and all(f"{name}=array([[" in done.stdout for name in data.Batch._fields)


def test_rows_of_names_the_sources_of_windows_at():
    m = fake_mixture([5000, 3000], [2, 1])
    source_B, window_B = data.windows_at(m, 7, 12, 16, seed=3)
    assert data.rows_of(m, 7, 12, 16, seed=3) == [[f"s{k}", int(w)] for k, w in zip(source_B, window_B)]
