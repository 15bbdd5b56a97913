"""Two runs or more beside each other: what was different, and what came of it.

Run:  python train.py --compare RUN_DIR RUN_DIR ... [--out=FILE.html]

Prints the keys that differ and the losses at equal steps, and writes a page with the curves of all
runs in each panel: out/compare-NAME-NAME.html, unless --out says where. Only an older comparison is
replaced by it. Reads run directories, finished or not, and writes nothing into them."""

import collections
import contextlib
import json
import re
import string
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import scaling
import train
from configs import convert
from configs import report

MARK = "<!-- a comparison of train.py -->"
PLACES = ("run_dir", "checkpoint_dir", "data_dir", "compiled_dir")      # differ, and mean nothing
STEPS = 8                       # rows of the table of losses, the end not counted
# each panel: title, caption, and {name: (steps, values)} of a run's Files
PANELS = (
    ("training loss, moving average", "Nats per token of the training text of each run.",
     lambda f: {"": report.series(f.rows, "ema")}),
    ("held-out text, bits per byte",
     "Mean over the held-out domains. It compares runs of different tokenizers; lower is better.",
     lambda f: report.held_out(f.events, "bpb", macro=True)),
    ("learning rate of the matrices",
     "Of every step. A relative step: by what share of its norm a matrix moves.",
     lambda f: {"": (report.rates_of_every_step(f) or {}).get("matrices (relative step)")
                or report.series(f.rows, "lr")}),
    ("gradient norm (log scale)", "Of all weights, before clipping.",
     lambda f: {"": report.series(f.rows, "gnorm")}),
    ("tokens per second", "Between two log lines; machines may differ.",
     lambda f: {"": report.series(f.rows, "tokens_per_second")}),
    ("MaxVio (log scale)", "How far the busiest expert is above the mean load; mean over layers.",
     lambda f: {"": report.series(f.rows, "maxvio")}))


def read_runs(folders):
    """{letter: Files}. Raises ConfigError unless they are two run directories or more."""
    if not 2 <= len(folders) <= len(string.ascii_uppercase):
        train.refuse("--compare", "two run directories or more (26 at most)", len(folders))
    found = {}
    for letter, folder in zip(string.ascii_uppercase, map(Path, folders)):
        if not folder.is_dir() or not (folder / "config.json").is_file():
            train.refuse(folder, "a run directory, with config.json", "none")
        if folder.resolve() in [files.run.resolve() for files in found.values()]:
            train.refuse("--compare", "each run once", folder)
        found[letter] = report.read_files(folder)
        if not found[letter].rows:
            train.refuse(folder, "a run that has logged a step", "no usable row in metrics.jsonl")
    return found


def flat(files):
    """{key: value} of all that can make two runs differ."""
    config = files.config
    keys = {key: value for part in ("model", "train", "versions")
            for key, value in report.part_of(config, part).items() if key not in PLACES}
    patches = sorted(path.read_text("utf-8", "replace") for path in files.run.glob("diff*.patch"))
    changed = data.digest(patches) if patches else None
    with contextlib.suppress(data.DataError, OSError):
        found = convert.tokenizer_hash(files.run)
        keys["tokenizer"] = f"sha256 {found[:12]}" if found else keys.get("tokenizer")
    return keys | {"data (sha256)": str(config.get("data"))[:12], "commit": config.get("commit"),
                   "changes since (sha256 of diff.patch)": changed}


def differing(runs):
    """[(key, value of each run)], and how many keys are equal. A key that is missing is "-"."""
    keys = {letter: flat(files) for letter, files in runs.items()}
    rows = [(key, *(own.get(key) for own in keys.values()))
            for key in dict.fromkeys(key for own in keys.values() for key in own)]
    rows = [(key, *("-" if x is None else json.dumps(x).strip('"') for x in cells))
            for key, *cells in rows]
    different = [row for row in rows if len(set(row[1:])) > 1]
    return different, len(rows) - len(different)


def at_equal_steps(columns, most=STEPS):
    """[(step, value of each run)] at steps that all have. columns: {step: value} of each run."""
    shared = sorted(set.intersection(*map(set, columns)))
    kept = sorted({shared[round(i * (len(shared) - 1) / (most - 1))] for i in range(most)}
                  if len(shared) > most else shared)
    return [(step, *(column[step] for column in columns)) for step in kept]


def losses(runs):
    """{title: [(where, value of each run as text)]}: at equal steps, and at the end."""
    found = {}
    for title, of, key in (
            ("training loss, moving average", lambda f: report.series(f.rows, "ema"), "ema"),
            ("held-out loss, nats per token", lambda f: report.held_out(
                f.events, "loss", macro=True).get("held out: macro", ((), ())), "loss"),
            ("held-out text, bits per byte", lambda f: report.held_out(
                f.events, "bpb", macro=True).get("held out: macro", ((), ())), "bpb")):
        columns = [dict(zip(*of(files))) for files in runs.values()]
        rows = [(f"step {step}", *cells) for step, *cells in at_equal_steps(columns)]
        last = [report.number(files.result.get(key)) for files in runs.values()]
        if key == "ema":
            last = [column[max(column)] if column else None for column in columns]
        rows.append(("at the end", *last))
        found[title] = [(name, *("-" if x is None else f"{x:.4f}" for x in cells))
                        for name, *cells in rows]
    return found


def warnings_of(runs, different):
    """Sentences on what must not be read out of the table."""
    keys = {row[0] for row in different}
    if keys & {"tokenizer", "vocab_size"}:
        yield "The tokenizers differ: compare bits per byte, not nats."
    if keys & {"data (sha256)", "mixture"}:
        yield "The data differ: held-out losses are of the same text only if the sources are."
    if keys & {"batch_size", "seq_len"}:
        yield "A step is not the same number of tokens in these runs: equal steps are unequal data."
    if keys & {"steps"}:
        yield "The runs differ in length, so their learning rates differ at equal steps."
    unfinished = [letter for letter, files in runs.items() if not files.result]
    if unfinished:
        yield f"Not finished: {', '.join(unfinished)}."
    for letter, files in runs.items():
        for note in files.notes:
            yield f"{letter}: {note}"


def text_table(rows, head):
    """Columns of text, the first to the left, the others to the right; long cells are cut."""
    cut = lambda cell: cell if len(cell) <= 40 else cell[:39] + "…"
    rows = [[cut(report.clean(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows)


def panels(runs):
    """{title: {label: (steps, values)}}: what report.draw_curves draws, one line for each run."""
    found = {}
    for title, _, lines in PANELS:
        drawn = {f"{letter} {files.run.resolve().name}": line for letter, files in runs.items()
                 for line in lines(files).values() if len(line[0])}
        if drawn:
            found[title] = drawn
    return found


def place_of(runs, out):
    """Where the page goes. ConfigError if something else is there."""
    names = "-".join(re.sub(r"[^\w.]+", "_", files.run.resolve().name) for files in runs.values())
    path = Path(out or f"out/compare-{names[:120]}.html").expanduser()
    if path.is_dir() or path.suffix != ".html":
        train.refuse("--out", "the name of a file that ends in .html", path)
    if path.exists() and MARK not in path.read_text("utf-8", "replace"):
        train.refuse("--out", "a new file or an older comparison", f"{path}, which is neither",
                     "choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        train.refuse("--out", "a directory that can be written", f"{path} ({error.strerror})")
    return path


def main(words):
    """--compare. words: run directories, and --out=FILE. Returns the exit code."""
    outs = [word[6:] for word in words if word.startswith("--out=")]
    folders = [word for word in words if not word.startswith("--out=")]
    if strange := [word for word in folders if word.startswith("-")]:
        train.refuse("--compare", "run directories and --out=FILE.html", strange[0])
    runs = read_runs(folders)
    path, head = place_of(runs, outs[-1] if outs else ""), list(runs)
    different, equal = differing(runs)
    tables, said = losses(runs), list(warnings_of(runs, different))
    print("\n".join(f"{letter}  {report.clean(files.run)}" for letter, files in runs.items()))
    print(f"\n{text_table(different, [f'key ({equal} others are equal)', *head])}")
    for title, rows in tables.items():
        print(f"\n{text_table(rows, [title, *head])}")
    print("\n" + "\n".join(said))
    title = "Comparison: " + ", ".join(files.run.resolve().name for files in runs.values())
    about = collections.defaultdict(list)
    for letter, files in runs.items():
        about["run"].append(str(files.run))
        for name, sentence in report.facts(files):
            about[name].append(sentence)
    drawn = panels(runs)
    pictures = report.draw_curves(scaling.pyplot(), drawn)
    captions = {title: caption for title, caption, _ in PANELS}
    parts = [MARK, report.table([(name, *cells) for name, cells in about.items()], ["", *head])]
    parts += [f'<p class="note">{report.esc(sentence)}</p>' for sentence in said]
    parts += [f"<h2>Keys that differ</h2><p>{equal} others are equal.</p>",
              report.table(different, ["key", *head]),
              '<h2>Losses at equal steps</h2><div class="side">',
              *(report.table(rows, [name, *head], numbers=True) for name, rows in tables.items()),
              '</div><h2>Curves</h2><div class="figures">',
              *(report.figure(png, name, captions[name]) for name, png in pictures.items()),
              "</div>"]
    train.write(path, report.page(title, *parts))
    print(f"see {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (train.ConfigError, train.TemporaryError, scaling.BadInput) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
