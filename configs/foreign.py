"""Token shards of other projects, memory-mapped as they are: nanoGPT, llm.c, Megatron, OLMo.

data.open_mixture comes here for a source such as llmc:'fineweb/*.bin'. Files whose names say so are
held out: the last of the words train, training, val, valid, validation, test, eval and dev counts.
"""
import os
import re
from pathlib import Path

import numpy as np

import data
from configs.text import matches
from data import need, reading

# The dtype of ids by llm.c's magic and version (GPT-2, Llama 3) and by Megatron's code
DTYPES = {(20240520, 1): "uint16", (20240801, 7): "uint32", 4: "int32", 5: "int64", 8: "uint16"}
LLAMA3_BEGIN = 128000                    # llm.c puts it before each document of Llama-3 ids
LOOK = 1 << 22                           # ids that are searched for the border of a document


def megatron_index(path):
    """PREFIX.idx -> (dtype, the position after each document's last id)."""
    index = np.memmap(path, mode="r")
    magic, _, code, n, documents = np.frombuffer(index, "S9,<u8,u1,<u8,<u8", 1)[0].tolist()
    dtype = DTYPES[code if magic == b"MMIDIDX" else magic]
    lengths = np.frombuffer(index, "<i4", n, 34)
    if lengths.min() < 0:
        raise ValueError(f"a length of {lengths.min()}")
    ends = np.cumsum(lengths, dtype=np.int64)
    if len(index) >= 34 + 12 * n + 8 * documents:            # a document may be several sequences
        firsts = np.frombuffer(index, "<i8", documents, 34 + 12 * n)
        if documents > 1 and firsts[0] == 0 and firsts[-1] == n and (np.diff(firsts) > 0).all():
            ends = ends[firsts[1:] - 1]
    return dtype, ends


def open_shard(kind, path, dtype):
    """A shard -> (ids, what TokenStream takes as `starts`)."""
    offset, count, starts = 0, None, None
    with reading(path, data.FOREIGN[kind]):
        if kind == "llmc":               # 256 int32, the third the number of tokens, then the ids
            magic, version, count = np.fromfile(path, "<i4", 3).tolist()
            offset, dtype = 1024, DTYPES[magic, version]
        elif kind == "megatron":
            dtype, ends = megatron_index(Path(path).with_suffix(".idx"))
            count, starts = int(ends[-1]), np.unique(np.append(0, ends[:-1]))
        found = (os.path.getsize(path) - offset) / np.dtype(dtype).itemsize
        promise = "expected whole" if count is None else f"its header promises {count:,}"
        need(0 < found == (int(found) if count is None else count), f"{path}: {promise} tokens, found {found:,}")
        ids = np.memmap(path, dtype, "r", offset)
    if kind == "llmc" and dtype == "uint32" and (ids[:LOOK] == LLAMA3_BEGIN).any():
        starts = LLAMA3_BEGIN
    need(len(ids) == 1 or ids[1:8192:2].any() or not ids[:8192:2].any(),
         f"{path}: every other id is 0, as of wider ids; for uint32: olmo:GLOB?dtype=uint32")
    return ids, starts


def is_heldout(path):
    """Whether the name of a file says that it is no training data."""
    words = re.findall("(?<![a-z])(train|training|val|valid|validation|test|eval|dev)(?![a-z])",
                       os.path.basename(path).lower())
    return bool(words) and not words[-1].startswith("train")


def stream_of(shards, tok):
    """[(ids, starts), ...] -> TokenStream. Each file begins a document."""
    parts, starts = zip(*shards)
    first = np.cumsum([0, *map(len, parts)])
    if isinstance(starts[0], np.ndarray):
        starts = [np.concatenate([own + place for own, place in zip(starts, first)])]
    return data.TokenStream(parts, float(tok.bytes_V[parts[0][:1_000_000]].mean()), starts[0])


def open_foreign(source, tok, name):
    """Shards of another project -> data.Source of that name. Documents are told apart by what the
    format says: lengths, an id before each, or else the eot of tok, a Tokenizer. If no file is held
    out by its name, the last 1 % of the last one is. Raises DataError."""
    (kind, pattern), dtype = data.source_type(source), "uint16"
    if kind == "olmo":
        pattern, _, dtype = pattern.rpartition("?dtype=")
        need(dtype in ("uint16", "uint32"), f"{source}: expected its dtype; add ?dtype=uint32")
    left, facts, files, shards, heldout = data.CHECK_BYTES, [], {}, [], {}
    for path in matches(pattern + ".bin" if kind == "megatron" else pattern, data.log):
        index = [Path(path).with_suffix(".idx")] if kind == "megatron" else []
        files |= {str(file): data.FileState.of(file, left > 0) for file in (path, *index)
                  if os.path.exists(file)}
        ids, starts = open_shard(kind, path, dtype)
        low, high = (ids.min(), ids.max()) if left > 0 else (0, 0)
        need(0 <= low and high < tok.vocab_size, f"{path}: holds ids {low} to {high}, but "
             f"{tok.name} has 0 to {tok.vocab_size - 1}; is it of another tokenizer or dtype?")
        left -= ids.nbytes
        facts.append([is_heldout(path), *(files[str(file)].sha256 for file in (path, *index))])
        if is_heldout(path):
            heldout[os.path.basename(path)] = ids, starts
        else:
            shards.append((ids, starts))
    need(shards, f"{source}: every name says val, test or the like, so none is left to train on; "
         "name more")
    if not heldout:
        (ids, starts), path = shards[-1], ids.filename
        cut = len(ids) - max(2, len(ids) // 100)
        need(cut > 0, f"{path}: expected more than 2 tokens, found {len(ids)}; name larger files")
        before = after = starts
        if isinstance(starts, np.ndarray):
            before, after = starts[starts < cut], np.append(0, starts[starts > cut] - cut)
        shards[-1] = ids[:cut], before
        heldout[f"the last 1 % of {os.path.basename(path)}"] = ids[cut:], after
    train = stream_of(shards, tok)
    sample = train.read(0, LOOK + 1)
    if not train.last_of_document(0, sample, tok.eot).any():
        data.log(f"{source}: no border of documents (id {tok.eot}) in its first {len(sample):,} "
                 "ids, so every row counts as one document; is it of another tokenizer?")
    data.log(f"{source}: held out: {', '.join([*heldout][:9])}{', ...' * (len(heldout) > 9)}")
    return data.Source(name, train, {name: stream_of([*heldout.values()], tok)},
                       data.digest(facts, 64), files)
