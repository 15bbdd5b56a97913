"""Build the ladder's reference corpus from corpus.txt: code, documentation, books, fixed by hash.

    python configs/ladder/corpus.py [--out=out/ladder_corpus]
    python configs/ladder/corpus.py --repeats       what share of the training text of OUT repeats itself

Writes train.jsonl and heldout.jsonl in OUT/PART for each part of the list, and OUT/report.json. A
mixture names a part as 'out/ladder_corpus/code/*.jsonl'. The steps are: gather the documents, drop
repeated ones, hold some out, remove from training every span of lines that a held-out document has
(decontamination), and compare the hash of the text with the list. It takes two minutes on two cores
and keeps wheels in out/data. A list has lines of PART ENDINGS SOURCE, with - for all endings; the
line "text sha256 HASH" fixes the result; # begins a comment.
"""
import argparse
import collections
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import data  # noqa: E402
import scaling  # noqa: E402
from configs.text import SOURCE_LIKE, wheel_texts  # noqa: E402

SPAN_BYTES = 50             # no held-out document shares a span of lines this long with training
REST_BYTES = 200            # shorter rests of a cut document go [cited: arXiv 2005.14165, C]
HELD_BYTES = 300_000        # held out of each part, in documents of 2 to 50 kB [assumed: evaluation
#                             must stay cheap beside a run of a million tokens]


def spans(text):
    """The shortest spans of at least SPAN_BYTES from each line of a text: (span, first, last line).

    Lines count without surrounding blanks, and empty ones not at all, so indentation hides nothing.
    Two texts share a span of lines of SPAN_BYTES or more exactly if they share one of these."""
    lines = [(i, stripped) for i, line in enumerate(text.split("\n")) if (stripped := line.strip())]
    for at, (first, span) in enumerate(lines):
        last = first
        while len(span) < SPAN_BYTES and len(span.encode("utf-8", "replace")) < SPAN_BYTES:
            at += 1
            if at == len(lines):
                break
            last, line = lines[at]
            span += "\n" + line
        else:
            yield span, first, last


def decontaminate(text, shared):
    """What is left of a text without the lines of the spans in `shared`, as a list of documents.

    Each stretch of REST_BYTES or more becomes a document, because joining lines that were
    apart could create a new shared span."""
    struck = set()
    for span, first, last in spans(text):
        if span in shared:
            struck.update(range(first, last + 1))
    if not struck:
        return [text]
    stretches = itertools.groupby(enumerate(text.split("\n")), lambda line: line[0] in struck)
    rests = ["\n".join(line for _, line in lines) for gone, lines in stretches if not gone]
    return [rest for rest in rests if len(rest.encode("utf-8", "replace")) >= REST_BYTES]


def repeats(texts):
    """The share of the spans of some documents that two of them or more have."""
    owner, times = {}, collections.Counter()    # by the hash of a span; owner: a document, None if there are several
    for i, text in enumerate(texts):
        for span, _, _ in spans(text):
            key = hash(span)
            times[key] += 1
            if owner.setdefault(key, i) != i:
                owner[key] = None
    return sum(n for key, n in times.items() if owner[key] is None) / max(1, times.total())


def read_list(path):
    """A list -> ({part: [(endings, source), ...]}, sha256 or "")."""
    parts, sha256 = collections.defaultdict(list), ""
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        data.need(len(fields) == 3,
                  f"{path} line {number}: expected PART ENDINGS SOURCE, found {line[:60]!r}")
        if fields[:2] == ["text", "sha256"]:
            sha256 = fields[2]
        else:
            parts[fields[0]].append((fields[1], fields[2]))
    return dict(parts), sha256


def gather(listed, cache, seen):
    """The documents of one part as (held out?, text). seen: the digests of all documents so far."""
    rows = []                           # held out (None: not known yet), digest, text
    for endings, source in listed:
        kind, rest = data.source_type(source)
        data.need(kind in ("pip", *data.BOOKS), f"{source}: expected pip:... or books")
        if kind == "pip":
            wanted = SOURCE_LIKE if endings == "-" else tuple(endings.split(","))
            found = ((None, text) for text in wheel_texts(rest, cache, wanted))
        else:
            found = ((domain is not None, text) for domain, text in data.documents(source, cache))
        for held, text in found:
            digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            if digest not in seen and 0 < len(text) < 1 << 20 or kind != "pip":
                seen.add(digest)
                rows.append([held, digest, text])
    if all(held is None for held, _, _ in rows):             # hold out those of the lowest hashes
        taken = 0
        for row in sorted(rows, key=lambda row: row[1]):
            row[0] = taken < HELD_BYTES and 2000 <= len(row[2]) < 50_000
            taken += row[0] * len(row[2])
    return [(bool(held), text) for held, _, text in rows]


def build(listed, out, cache):
    """Build the corpus of the list file `listed` in the new directory `out`; return its report."""
    parts, sha256 = read_list(listed)
    seen, total, report = set(), hashlib.sha256(), {}
    texts = {part: gather(sources, cache, seen) for part, sources in parts.items()}
    heldout = [text for rows in texts.values() for held, text in rows if held]
    shared = {span for text in heldout for span, _, _ in spans(text)}
    with data.atomic_directory(out) as scratch:
        for part, rows in texts.items():
            (scratch / part).mkdir()
            sizes = collections.Counter()
            with (open(scratch / part / "train.jsonl", "w") as train,
                  open(scratch / part / "heldout.jsonl", "w") as rest):
                for held, text in rows:
                    name, file = ("held-out", rest) if held else ("training", train)
                    if not held:
                        sizes["training bytes before decontamination"] += len(text.encode())
                    for piece in [text] if held else decontaminate(text, shared):
                        total.update(json.dumps([held, piece]).encode())
                        file.write(json.dumps({"text": piece}) + "\n")
                        sizes[f"{name} bytes"] += len(piece.encode())
                        sizes[f"{name} documents"] += 1
            report[part] = dict(sizes)
            data.log(f"{part}: " + ", ".join(f"{n:,} {what}" for what, n in sizes.items()))
        report["sha256"] = total.hexdigest()
        (scratch / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        data.need(report["sha256"] == (sha256 or report["sha256"]),
                  f"{listed}: expected text sha256 {sha256}, found {report['sha256']}; "
                  "a source differs from the one that was recorded")
    return report


def main(args):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", default=os.path.relpath(FOLDER / "corpus.txt"))
    parser.add_argument("--out", type=Path, default=Path("out/ladder_corpus"))
    parser.add_argument("--cache", default="out/data", help="keeps wheels/ (default %(default)s)")
    parser.add_argument("--repeats", action="store_true", help="read OUT instead of building it")
    args = parser.parse_args(args)
    if args.repeats:
        paths = sorted(args.out.glob("*/train.jsonl"))
        data.need(paths, f"{args.out}: expected */train.jsonl, found none; build the corpus first")
        for path in paths:
            texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
            print(f"{path.parent.name}: {100 * repeats(texts):.1f} % of its spans are in two documents or more")
        return
    data.need(not args.out.exists(), f"{args.out}: exists already; delete it to build anew")
    report = build(args.list, args.out, args.cache)
    print(f"text sha256 {report['sha256']}")


if __name__ == "__main__":
    sys.exit(scaling.guarded("corpus.py", lambda: main(sys.argv[1:]), data.DataError))
