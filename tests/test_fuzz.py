"""Malformed input of every format this project reads, by hypothesis: a valid file is damaged, then read.

What may happen: the reader's own one-line error, or a result. A result must be right as far as anyone can tell:
where a hash stands over the file it is the original, else its ids lie in the vocabulary, its numbers are in range,
its texts are strings. Any other exception, a hang or unbounded memory is a bug. 40 cases a format in the quick
tests, 10,000 in the slow ones (20 minutes of one core). Needs hypothesis (pip install hypothesis); without it all
is skipped."""
import gzip
import json
import math
import re
import resource
import signal
import struct
import unittest.mock
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st

import data
import scaling
import train
from test_train import CONFIG, load

KNOWN = data.DataError, scaling.BadInput, train.ConfigError
SECONDS, BYTES = 20, 3 << 30            # that one case may take: no hang, no unbounded memory

# ------------------------------------------------------------------------------------------------------- damage

TOKENS = [b"", b"\x00", b"\xff\xfe", b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"x"',
          b"99999999999999999999", b"\n", b",", b'"', b"[" * 2000, b"(" * 300, b"-" * 5000, "é".encode(),
          struct.pack("<i", -1), struct.pack("<q", 2**62), struct.pack("<i", 20240801)]
EDIT = st.tuples(st.sampled_from(["flip", "cut", "insert", "replace", "delete", "repeat"]),
                 st.floats(0, 1, exclude_max=True), st.integers(0, 2**16), st.sampled_from(TOKENS))


def damaged(blob, edits):
    """A byte string after some edits, each at a place given as a share of the length."""
    blob = bytearray(blob)
    for kind, share, number, token in edits:
        at, n = int(share * len(blob)), 1 + number % 40
        if kind == "flip" and blob:
            blob[at] ^= 1 << number % 8
        elif kind == "cut":
            del blob[at:]
        elif kind == "insert":
            blob[at:at] = token
        elif kind == "replace":
            blob[at:at + max(1, len(token))] = token
        elif kind == "delete":
            del blob[at:at + n]
        elif kind == "repeat":
            blob[at:at] = blob[at:at + n] * (1 + number % 3)
    return bytes(blob)


LEAF = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.integers(-2**70, 2**70), st.floats(),
                 st.text(max_size=5), st.sampled_from([[], {}, "train-00000.bin", "../x", "<u2", ">f8", "O"]))
CHANGE = st.tuples(st.integers(0, 2**16), st.sampled_from(["set", "drop", "wrap"]), LEAF)


def altered(value, changes):
    """A JSON value after some changes of its parts: another leaf, a part gone, a part one level deeper."""
    value = json.loads(json.dumps(value))
    for number, kind, new in changes:
        places = []

        def visit(node):
            for key in list(node if isinstance(node, dict) else range(len(node))):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    visit(node[key])
        visit(value)
        if places:
            node, key = places[number % len(places)]
            if kind == "drop":
                del node[key]
            else:
                node[key] = [node[key]] if kind == "wrap" else new
    return json.dumps(value).encode()


# ------------------------------------------------------------------------------------------------------ formats

class Format:
    """A file to damage, how to read it, and what must hold of a result."""

    def __init__(self, path, read, holds=lambda result, blob: True):
        self.path, self.read, self.holds, self.good = Path(path), read, holds, Path(path).read_bytes()
        result = read()
        assert holds(result, self.good), "the undamaged file is read"

    def case(self, blob):
        self.path.write_bytes(blob)
        try:
            result = self.read()
        except KNOWN as error:
            lines = str(error).splitlines()
            assert len(lines) == 1 and len(lines[0]) < 3000, f"not one line: {str(error)[:500]!r}"
        else:
            assert self.holds(result, blob), "a wrong result, silently"


def in_vocabulary(source, _):
    for stream in (source.train, *source.heldout.values()):
        ids = stream.read(0, stream.tokens)
        assert len(ids) == stream.tokens > 0 and ids.dtype == np.int32 and 0 <= ids.min() and ids.max() < 257
        assert math.isfinite(stream.bytes_per_token)
    return True


def strings(texts, _):
    return all(isinstance(text, str) and (domain is None or isinstance(domain, str)) for domain, text in texts)


def foreign(folder, kind):
    ids = np.random.default_rng(0).integers(0, 256, 3000).astype("<u2")
    if kind == "megatron":
        (folder / "m.bin").write_bytes(ids.tobytes())
        lengths = np.array([1000, 2000], "<i4")
        (folder / "m.idx").write_bytes(
            struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 2, 3) + lengths.tobytes()
            + np.array([0, 2000], "<i8").tobytes() + np.arange(3, dtype="<i8").tobytes())
        source = f"megatron:{folder}/m"
    else:
        head = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0") if kind == "llmc" else b""
        (folder / "x.bin").write_bytes(head + ids.tobytes())
        source = f"{kind}:{folder}/x.bin" + "?dtype=uint16" * (kind == "olmo")
    tok = data.load_tokenizer("bytes")

    def read():
        with unittest.mock.patch.object(data, "load_tokenizer", lambda _: tok):  # it is half of a case's time
            return data.open_mixture(((source, 1.0),), "bytes", folder, 257, 16, quiet=True).sources[0]
    return read


def prepared(folder):
    """A small corpus, and the ids that it holds: whatever is read must be these, as hashes stand over them."""
    (folder / "d").mkdir()
    for i in range(25):
        (folder / "d" / f"{i:02}.txt").write_text(f"document {i}: " + "abcdefg " * (3 * i + 1))
    corpus = data.prepare((f"{folder}/d/*.txt",), "bpe:270", folder / "corpus", quiet=True)
    read = lambda: data.open_prepared(corpus, quiet=True)
    all_ids = lambda source: {name: stream.read(0, stream.tokens).tolist() for name, stream in
                              {None: source.train, **source.heldout}.items()}
    good = all_ids(read())

    def the_same(source, _):
        found = all_ids(source)
        # a manifest has no hash over itself: a split may be renamed in it or lost, tokens cannot change
        return found.get(None) == good[None] and all(ids in good.values() for ids in found.values())
    return corpus, read, the_same


def vocabulary(tok, _):
    ids = tok.encode("abc é")
    return tok.decode(ids) == "abc é" and len(tok.pieces) <= tok.eot < tok.vocab_size > max(ids)


def a_wheel(folder):
    """A wheel in the cache; pinned by no hash, so that damage has to be noticed by the zip itself."""
    place = folder / "wheels" / "thing==1.0"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "thing-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for i in range(22):
            wheel.writestr(f"thing/{i}.py", f"x = {i}\n" * 20)
        wheel.writestr("../../escaped.py", "y = 1\n")
    return place / "thing-1.0-py3-none-any.whl", lambda: list(data.documents("pip:thing==1.0", folder))


def right_config(result, _):
    c, t = result
    for cfg in (c, t):
        for key in cfg.__dataclass_fields__:
            assert type(getattr(cfg, key)) is train.KEYS[key], key
    return c.vocab_size > 0 and t.steps > 0 and t.batch_size % t.accumulate == 0


def right_rows(rows, _):
    return all(isinstance(row, dict) for row in rows)


def right_runs(runs, _):
    return all(run.flops > 0 and run.params > 0 and run.tokens > 0 and 0 < run.loss <= 100 for run in runs)


def make(name, folder):
    """The Format of a name, in a folder of its own."""
    if name in ("nanogpt", "llmc", "olmo"):
        read = foreign(folder, name)
        return Format(folder / "x.bin", read, in_vocabulary)
    if name in ("megatron .bin", "megatron .idx"):
        read = foreign(folder, "megatron")
        return Format(folder / f"m{name[-4:]}", read, in_vocabulary)
    if name.startswith("prepared"):
        corpus, read, the_same = prepared(folder)
        path = {"manifest.json": "manifest.json", "shard": "train-00000.bin", "tokenizer": "tokenizer.tiktoken",
                "tokenizer.json": "tokenizer.tiktoken.json"}[name.partition(" ")[2]]
        return Format(corpus / path, read, the_same)
    if name.startswith("text"):
        kind, lines = name.partition(" ")[2], [f"text {i} of é" * 5 for i in range(30)]
        body = "\n".join(json.dumps({"text": line}) for line in lines) if "jsonl" in kind else "\n".join(lines)
        path = folder / f"t{kind}"
        if kind.endswith(".gz"):
            path.write_bytes(gzip.compress(body.encode()))
        elif kind.endswith(".zst"):
            path.write_bytes(pytest.importorskip("zstandard").compress(body.encode()))
        elif kind == ".parquet":
            arrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"text": lines}), path)
        else:
            path.write_text(body)
        return Format(path, lambda: list(data.documents(str(path), folder)), strings)
    if name == "tiktoken":
        corpus, _, _ = prepared(folder)
        return Format(corpus / "tokenizer.tiktoken", lambda: data.load_tokenizer(corpus), vocabulary)
    if name == "wheel":
        return Format(*a_wheel(folder), strings)
    if name == "config":
        path = folder / "c.py"
        path.write_text(CONFIG.format(text="t.txt", cache="cache", compiled="", run="run"))
        return Format(path, lambda: train.load_config(path), right_config)
    if name == "metrics":
        path, c, t = folder / "metrics.jsonl", *tiny(folder)
        rows = [dict(step=i, loss=3.0, ema=3.0, gnorm=1.0, skipped=0, lr=0.1, adam_lr=0.1, tokens=i, flops=1,
                     tokens_per_second=9.0, seconds=0.1, steps=1, time=1.0, maxvio=0.1, load_LE=[[1.0] * 4] * 2)
                for i in range(1, 6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])

        def read():
            log = train.Log(folder, c, t, mesh, 4, None)
            assert log.ema is None or math.isfinite(log.ema)
            return train.read_rows(path)
        return Format(path, read, right_rows)
    if name == "run config.json":
        c, t = tiny(folder)
        mixture = data.Mixture([], None, None, "0" * 64, {}, 0, 1.0, 2048)
        checkpoints = train.Checkpoints(t)
        now = train.check_run(c, t, mixture, checkpoints)
        Path(t.run_dir).mkdir()
        path = Path(t.run_dir, "config.json")
        path.write_text(json.dumps(now))

        def read():
            checked = train.check_run(c, t, mixture, checkpoints)
            return checked
        return Format(path, read, lambda result, _: result == now)
    if name == "checkpoint proof":
        c, t = tiny(folder)
        path = Path(t.run_dir, "checkpoints/4/proof/metadata")
        path.parent.mkdir(parents=True)
        (path.parent.parent / "commit_success.txt").touch()
        proof = {"step": 4, "config": {"model": {}}, "arrays": {".step": 7}}
        crc = train.zlib.crc32(json.dumps(proof, sort_keys=True).encode())
        path.write_text(json.dumps({"proof": proof, "crc32": crc}))

        def read():
            try:
                return train.Checkpoints(t).proof(4)
            except ValueError as error:
                raise train.ConfigError(str(error)) from None
        return Format(path, read, lambda result, _: result == proof)
    if name == "run table .csv":
        path = folder / "runs.csv"
        path.write_text("flops,params,tokens,loss,seed,bytes_per_token\n" + "".join(
            f"{C},{N},{C / 6 / N},{3 + (math.log(N) - 12)**2 / 50:.5f},0,3.5\n"
            for C in (1e15, 1e16) for N in (1e5, 2e5, 4e5, 8e5)))
        return Format(path, lambda: scaling.checked(scaling.read_csv(path), str(path)), right_runs)
    if name == "run result.json":
        (folder / "config.json").write_text(json.dumps({"train": {"tokenizer": "bytes"}}))
        (folder / "result.json").write_text(json.dumps(dict(
            flops=1e15, params=1e5, tokens=1e9, loss=3.0, bpb=1.0, bytes_per_token=3.5, seed=0, eval="e")))
        return Format(folder / "result.json", lambda: [scaling.read_run_dir(folder)], right_runs)
    if name == "registration":
        path, arguments = folder / "r.json", ["register", "moe_v16", "--method", "parabola", "--x", "params",
                                              "--asymptote", "1.6", "--draws", "2", "--target", "1e23"]
        assert scaling.main([*arguments, "--eval", "Paloma macro", "--out", str(path)]) == 0
        good = json.loads(path.read_text())
        return Format(path, lambda: scaling.score(path, loss=2.2), lambda _, blob: json.loads(blob) == good)
    raise KeyError(name)


def tiny(folder):
    path = folder / "c.py"
    path.write_text(CONFIG.format(text="t.txt", cache="cache", compiled="", run=str(folder / "run")))
    return load(path)


BINARY = ["nanogpt", "llmc", "olmo", "megatron .bin", "megatron .idx", "prepared shard", "wheel"]
TEXTUAL = ["prepared manifest.json", "prepared tokenizer", "prepared tokenizer.json", "tiktoken", "text .txt",
           "text .jsonl", "text .jsonl.gz", "text .txt.zst", "text .parquet", "config", "metrics",
           "run config.json", "checkpoint proof", "run table .csv", "run result.json", "registration"]
JSON = [n for n in TEXTUAL if "json" in n and "jsonl" not in n or n in ("registration", "checkpoint proof")]


@pytest.fixture(autouse=True)
def bounded():
    """No case may hang or eat the machine's memory."""
    def late(*_):
        raise TimeoutError(f"a case took more than {SECONDS} s of CPU time")
    old, limit = signal.signal(signal.SIGPROF, late), resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limit)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, old)


def fuzz(format, cases, strategy, apply):
    count = 0

    @settings(max_examples=cases, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(edits):
        nonlocal count
        count += 1
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        format.case(apply(edits))
        signal.setitimer(signal.ITIMER_PROF, 0)
    run()
    return count


@pytest.mark.parametrize("key", ["ema", "lr", "loss"])
@pytest.mark.parametrize("value", ["NaN", "1e999"])
def test_a_metrics_row_that_is_no_number_is_left_out(key, value, tmp_path):
    format = make("metrics", tmp_path)      # found by the 10,000 cases: json.loads takes NaN for a number
    rows = format.good.splitlines()
    rows[3] = json.dumps(json.loads(rows[3]) | {key: "X"}).replace('"X"', value).encode()
    format.case(b"\n".join(rows) + b"\n")
    assert [row["step"] for row in train.read_rows(format.path)] == [1, 2, 3]


CASES = [pytest.param(40, id="quick"), pytest.param(10_000, id="slow", marks=pytest.mark.slow)]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("name", BINARY + TEXTUAL)
def test_a_damaged_file_is_refused_in_one_line_or_read_right(name, cases, tmp_path, capsys):
    format, half = make(name, tmp_path), cases // 2 if name in JSON else 0
    edits, changes = st.lists(EDIT, min_size=1, max_size=4), st.lists(CHANGE, min_size=1, max_size=3)
    count = fuzz(format, cases - half, edits, lambda edits: damaged(format.good, edits))
    if half:
        value = json.loads(format.good)
        count += fuzz(format, half, changes, lambda changes: altered(value, changes))
    assert count >= cases
    if cases > 1000:
        with capsys.disabled():
            print(f"\n{name}: {count:,} cases")


@pytest.mark.parametrize("cases", CASES)
def test_config_values_from_the_command_line(cases, tmp_path):
    tiny(tmp_path)
    keys = st.sampled_from(sorted(train.KEYS) + ["stepz", "", "é"])
    values = st.one_of(st.text(max_size=20), LEAF.map(repr), st.sampled_from(["(" * 300, "-" * 9000, "{[]: 1}",
                       "1_0", "b'x'", "()", "((),)", "(('a', 1.0),)", "0x10", "1e400", "nan", "None", "''"]))

    @settings(max_examples=cases, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(keys, values), min_size=1, max_size=3))
    def run(pairs):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            assert right_config(train.load_config(tmp_path / "c.py", [f"--{k}={v}" for k, v in pairs]), None)
        except train.ConfigError as error:
            assert len(str(error).splitlines()) <= 1 + str(pairs).count("\\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
    run()


@pytest.mark.parametrize("cases", CASES)
def test_the_words_of_the_command_line(cases):
    words = st.one_of(st.text(max_size=8), st.sampled_from(["--sample", "--replay", "--replay=", "--process", "--",
                      "-", "--coordinator=x", "--processes=2", "--process=0", "--steps=3"]))

    @settings(max_examples=cases, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(words, max_size=6))
    def run(words):
        flags, rest = train.split_flags(words)
        assert set(flags) <= set(train.FLAGS) and all(word in words for word in rest)
    run()


def test_no_member_of_an_archive_leaves_its_folder_and_nothing_is_run(tmp_path):
    path, read = a_wheel(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    texts = [text for _, text in read()]
    assert any("y = 1" in text for text in texts), "it is read, as text"
    assert sorted(p for p in tmp_path.rglob("*")) == before and not (tmp_path.parent / "escaped.py").exists()
    for file in ("data.py", "train.py", "scaling.py"):
        source = (Path(data.__file__).parent / file).read_text()
        assert not re.search(r"pickle|extractall|np\.load\(|(?<!literal_)(?<!\w)(eval|exec)\(", source), file


def test_a_download_with_another_hash_is_refused(tmp_path):
    a_wheel(tmp_path)
    with pytest.raises(data.DataError, match="expected sha256 0000, found"):
        list(data.documents("pip:thing==1.0#sha256=0000", tmp_path))
