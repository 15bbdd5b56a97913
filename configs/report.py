"""What a run says of itself: lines on the screen, result.json, a sample, a page, one batch.

Run:  python configs/report.py RUN_DIR        write the page anew, as train.py does at a run's end
      python train.py RUN_DIR --sample        continue a text; the run directory is enough
      python train.py CONFIG --replay STEP    print what was in the batch of a step, and its outcome

Read: the screen and the log, result.json, what a run directory keeps, sample, the page, replay.
curves says what is drawn: the numbers of metrics.jsonl and events.jsonl, as they are. A page is
drawn from any files: what cannot be read is left out and counted."""

import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import html
import importlib
import io
import inspect
import json
import math
import re
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

import balance
import data
import model
import scaling
import train
from configs import plan


def describe_keys():
    """The text of --help, read from the comments beside the fields."""
    lines = [train.__doc__]
    pattern = r"^    (\w+): (\w+)(?:\[.*\])?(?: = (.*?))? +# (.*)$"
    for cls in (model.ModelConfig, train.TrainConfig):
        lines += ["", f"{cls.__name__}: {cls.__doc__}"]
        source = re.sub(r"\n {8,}# ", " ", inspect.getsource(cls))      # comments of two lines
        for name, kind, default, text in re.findall(pattern, source, re.MULTILINE):
            lines.append(f"  {f'--{name}={default or kind.upper()}':30s} {text}")
    return "\n".join(lines)


@contextlib.contextmanager
def progress(step, mixture, limit, heartbeat):
    """Yields a function to call with the tokens that an evaluation has just scored. It shows a bar
    on a terminal, else a line a minute, and tells the watchdog that something got done."""
    from tqdm import tqdm
    total, done, said = eval_tokens(mixture, limit), 0, time.monotonic()
    quiet = not (train.is_main_process() and sys.stderr.isatty())

    def scored(tokens):
        nonlocal done, said
        heartbeat()
        done += tokens
        bar.update(tokens)
        if quiet and time.monotonic() > said + 60:
            said = time.monotonic()
            train.log(f"eval {step}: {done:,} of {total:,} tokens")
    with tqdm(total=total, desc=f"eval {step}", unit=" tokens", leave=False, disable=quiet) as bar:
        yield scored


def eval_tokens(mixture, limit):
    """Tokens that an evaluation scores. limit: of each domain, 0 is all."""
    return sum(min(stream.tokens, limit or stream.tokens) for stream in mixture.heldout.values())


def remarks(c, t, mixture, tokens):
    """Lines on what a user might not expect of a run."""
    often = (t.steps - 1) // t.eval_every * eval_tokens(mixture, t.eval_tokens)
    last = eval_tokens(mixture, t.eval_tokens_final)
    if max(often, last) > 0.3 * tokens:         # forward is a third of a training step
        yield (f"note      evaluations score {often + last:,} tokens, {last:,} of them at the end: "
               f"{(often + last) / tokens / 3:.0%} of the training's FLOPs on top; --eval_every, "
               f"--eval_tokens and --eval_tokens_final bound them")
    if mixture.tokenizer.vocab_size < 0.9 * c.vocab_size:
        yield (f"note      {t.tokenizer!r} uses {mixture.tokenizer.vocab_size:,} of the "
               f"{c.vocab_size:,} ids of vocab_size; the rows of the others are never used")


def print_header(c, t, mesh, mixture):
    """The first screen of a run: model, data, optimizer, machine."""
    n, r, tokens = model.count(c), train.rates(c, t), t.steps * t.batch_size * c.seq_len
    for line in (
            f"model     {n.total / 1e6:,.2f} M parameters, {n.active / 1e6:,.2f} M active; "
            f"{n.flops_per_token / 1e6:,.1f} MFLOP a token x {tokens:,} tokens = "
            f"{n.flops_per_token * tokens:.2e} FLOP",
            f"data      {mixture.train_tokens:,} training tokens of "
            f"{mixture.bytes_per_token:.2f} bytes ({tokens / mixture.train_tokens:.2f} epochs), "
            f"held out: {', '.join(mixture.heldout)}; sha256 {mixture.sha256[:12]}",
            f"optimizer {t.optimizer}, rates of recipe {t.recipe}: matrices {r.matrix_lr:.4g}, "
            f"Adam {r.adam_lr:.4g}, beta2 {r.beta2:.4g}, eps {r.eps:.3g}",
            f"machine   {mesh.size} x {mesh.devices.flat[0].device_kind}, processes "
            f"{jax.process_count()}, jax {jax.__version__}, commit {train.git_commit()}",
            *remarks(c, t, mixture, tokens)):
        train.log(line)


def routing(rows, assigned):
    """What a line says of the experts. assigned: assignments of one layer in one step."""
    load = np.stack([row["load_LE"] for row in rows])                   # [steps, L, E]
    violation = np.asarray(balance.max_violation(load))
    sent = assigned * load.shape[1] * len(rows)
    return {"maxvio": float(violation.mean()), "maxvio_L": violation[-1].round(4).tolist(),
            "drop": float(np.sum([row["dropped_L"] for row in rows])) / sent,
            "would_drop": {f"{factor:g}": float(np.mean(balance.drop_fraction(load, factor)))
                           for factor in (1.0, 1.15, 1.33)},
            "dead": int((load[-1] == 0).sum()), "router_z": float(rows[-1]["router_z"]),
            "load_LE": (load[-1] / load[-1].mean(-1, keepdims=True)).round(3).tolist()}


def memory_in_use(device):
    """The most memory that was in use: of the device, or of the process if it is a CPU."""
    if stats := device.memory_stats():
        used, limit = stats["peak_bytes_in_use"], stats["bytes_limit"]
        return f"hbm {used / 2**30:.1f}/{limit / 2**30:.0f}G"
    unit = 2**30 if sys.platform == "darwin" else 2**20         # bytes on macOS, else KiB
    return f"mem {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f}G"


def line(c, t, mesh, row, skipped):
    """What is printed of a row of metrics.jsonl. skipped: updates skipped so far."""
    step, steps, speed = row["step"], t.steps, row["tokens_per_second"]
    device = mesh.local_devices[0]
    loss, ema, gnorm = (math.nan if row[key] is None else row[key]
                        for key in ("loss", "ema", "gnorm"))
    known = plan.PEAK_FLOPS.get((device.device_kind, c.compute_dtype), 0.0)
    peak = (t.peak_flops or known) * mesh.size
    eta = int(row["seconds"] * (steps - step))
    parts = [f"step {step:>{len(str(steps))}}/{steps} {100 * step / steps:5.1f}%",
             f"loss {loss:.3f} ema {ema:.3f}", f"lr {row['lr']:.1e}", f"gnorm {gnorm:.2f}",
             f"{speed / 1e3:.1f} ktok/s"]
    if peak:
        parts.append(f"mfu {100 * model.count(c).mfu_flops * speed / peak:.1f}%")
    if c.num_experts:
        parts.append(f"maxvio {row['maxvio']:.2f} drop {100 * row['drop']:.1f}%")
    parts.append(memory_in_use(device))
    if skipped:
        parts.append(f"skip {skipped}")
    return " | ".join([*parts, f"eta {eta // 60}m{eta % 60:02d}s"])


def is_metrics(row):
    """Whether a row of metrics.jsonl has the numbers that a resumed run and the report need."""
    numbers = ("step", "skipped", "lr", "adam_lr", "tokens_per_second", "seconds", "steps")
    try:
        maybe = [row[key] for key in ("loss", "ema", "gnorm") if row[key] is not None]
        return all(map(math.isfinite, maybe + [row[key] for key in numbers]))
    except (KeyError, TypeError, OverflowError):
        return False


class Log:
    """Metrics of every step, fetched from the devices once a line, so that no step waits."""

    def __init__(self, run, c, t, mesh, start, rows_of):
        self.run, self.c, self.t, self.mesh, self.rows_of = run, c, t, mesh, rows_of
        rows, kept, ahead = train.read_rows(run / "metrics.jsonl"), [], []
        for row in rows:
            (kept if is_metrics(row) and row["step"] <= start else ahead).append(row)
        if ahead:
            train.write(run / "metrics-ahead.jsonl", train.json_lines(ahead), append=True)
            train.log_event(run, "metrics_ahead", steps=[row.get("step") for row in ahead])
            train.log(f"metrics   rows that are damaged or later than step {start}: {len(ahead)}, "
                      f"now in metrics-ahead.jsonl; those steps are taken again")
        train.write(run / "metrics.jsonl", train.json_lines(kept))
        begun = [event.get("step", 0) for event in train.read_rows(run / "events.jsonl")
                 if event.get("event") == "start"]      # not 0 if the run is a branch of another
        known, taken = sum(row["steps"] for row in kept), start - (begun[-1] if begun else 0)
        if known != taken:
            train.log_event(run, "metrics_lost", steps=taken - known)
            train.log(f"metrics   metrics.jsonl covers {known} of {taken} steps; averages, times "
                      f"and pictures are of these only")
        self.ema = kept[-1]["ema"] if kept else None
        self.skipped, self.skipped_in_row = sum(row["skipped"] for row in kept), 0
        self.rates, self.count = train.rates(c, t), model.count(c)
        self.tokens = t.batch_size * c.seq_len
        self.pending, self.since = [], time.perf_counter()

    def step(self, step, metrics, due, *_):
        """Keep a step's metrics; when a line is due, write it. Raises Diverged, see `follow`."""
        self.pending.append(metrics)
        if not due:
            return
        rows, self.pending = jax.device_get(self.pending), []
        seconds = (time.perf_counter() - self.since) / len(rows)
        for number, row in enumerate(rows, step - len(rows) + 1):
            self.follow(number, row)
        loss, gnorm, share = (float(rows[-1][key]) for key in ("loss", "gnorm", "lr_multiplier"))
        taken = [float(row["loss"]) for row in rows if not row["skipped"]]
        new = {"step": step, "loss": loss if math.isfinite(loss) else None, "ema": self.ema,
               "mean_loss": float(np.mean(taken)) if taken else None,
               "gnorm": gnorm if math.isfinite(gnorm) else None,
               "skipped": sum(int(row["skipped"]) for row in rows),
               "lr": self.rates.matrix_lr * share, "adam_lr": self.rates.adam_lr * share,
               "tokens": step * self.tokens, "tokens_per_second": self.tokens / seconds,
               "flops": step * self.tokens * self.count.flops_per_token,
               "seconds": seconds, "steps": len(rows), "time": time.time()}
        if self.c.num_experts:
            new |= routing(rows, self.tokens * self.c.experts_per_token)
        train.write(self.run / "metrics.jsonl", train.json_lines([new]), append=True)
        train.log(line(self.c, self.t, self.mesh, new, self.skipped))
        self.since = time.perf_counter()

    def follow(self, step, row):
        """Average the loss. A skipped update is an event; Diverged after max_skips in a row."""
        loss, gnorm = float(row["loss"]), float(row["gnorm"])
        if row.get("bias_kept"):
            train.log_event(self.run, "bias_kept", step=step, layers=int(row["bias_kept"]))
        if not row["skipped"]:
            self.ema = loss if self.ema is None else 0.95 * self.ema + 0.05 * loss
            self.skipped_in_row = 0
            return
        self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
        why = "an outlier" if math.isfinite(loss + gnorm) else "not finite"
        train.log_event(self.run, "skip", step=step, why=why, loss=str(loss), gnorm=str(gnorm),
                        rows=self.rows_of(step))
        if self.skipped_in_row >= self.t.max_skips:
            raise train.Diverged(f"step {step}: the loss is {loss}, the gradient norm {gnorm}: {why}, "
                                 f"{self.skipped_in_row} times in a row; none was taken. "
                                 f"Look at the batch with --replay {step}, or lower the rates")


def facts_of(c, t, mixture):
    """What result.json says of a run that its config and data decide."""
    n, tokens = model.count(c), t.steps * t.batch_size * c.seq_len
    part = f"first {t.eval_tokens_final:,} tokens of" if t.eval_tokens_final else "whole"
    return {"flops": n.flops_per_token * tokens, "flops_with_head": n.mfu_flops * tokens,
            "params": n.params, "total_params": n.total, "tokens": tokens,
            "bytes_per_token": mixture.bytes_per_token, "seed": t.seed, "commit": train.git_commit(),
            "eval": f"{part} held-out domains, seq_len {c.seq_len}, data {mixture.sha256[:16]}"}


def write_result(c, t, run, mixture, domains):
    """Write result.json: what scaling.py reads, and what a table may quote."""
    rows = list(filter(is_metrics, train.read_rows(run / "metrics.jsonl")))
    speeds = [row["tokens_per_second"] for row in rows]
    result = facts_of(c, t, mixture) | domains["macro"] | {
        "domains": domains, "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "seconds": sum(row["seconds"] * row["steps"] for row in rows)}
    if c.num_experts:
        last = [value for row in rows if row["step"] > 0.9 * t.steps
                if (value := number(row.get("maxvio"))) is not None]
        last = float(np.mean(last)) if last else None
        floor = balance.sampling_floor(t.batch_size * c.seq_len, c.num_experts, c.experts_per_token)
        result |= {"maxvio": last, "maxvio_floor": floor}
        known = "unknown" if last is None else f"{last:.3f}"
        train.log(f"balance   MaxVio {known} over the last tenth of the run; {floor:.3f} for "
                  f"independent tokens")
    train.write(run / "result.json", json.dumps(result, indent=1))
    return result


# --------------------------------------------------------------- what a run directory keeps, sample

def keep_sources(run, tokenizer, start):
    """Keep in the run directory what only this machine has: the tokenizer, and as diff.patch how
    the code differs from its commit. start: the step after which this process goes on."""
    if tokenizer.sha256 != data.load_tokenizer("bytes").sha256:
        facts = tokenizer.facts | {"sha256": tokenizer.sha256}
        keep_text(run / "tokenizer.tiktoken.json", json.dumps(facts, indent=1) + "\n")
        keep_text(run / "tokenizer.tiktoken", tokenizer.rank_lines.decode())
    diff = train.git("diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", "--", "*.py")
    if len(diff) > MOST_DIFF:
        diff = (f"{diff[:MOST_DIFF]}\n... cut: {len(diff):,} characters of sha256 "
                f"{hashlib.sha256(diff.encode()).hexdigest()}\n")
    if diff and diff not in [path.read_text("utf-8", "replace") for path in run.glob("diff*.patch")]:
        name = "diff"
        while (run / f"{name}.patch").exists():
            name = f"diff-{start}" if name == "diff" else f"{name}-again"
        train.write(run / f"{name}.patch", diff)


MOST_DIFF = 1_000_000           # characters


def keep_text(path, text):
    """Write a file, unless it holds this text already."""
    if not path.exists() or path.read_text("utf-8", "replace") != text:
        train.write(path, text)


def read_run(run):
    """The keys of a run directory, wherever it is now: it may have been moved or copied."""
    from configs import rundir
    try:
        config = json.loads((run / "config.json").read_text("utf-8"))
        values = config["model"] | config["train"] | {"run_dir": str(run)}
        values["mixture"] = tuple(map(tuple, values["mixture"]))
        for name in rundir.IMPORTS:
            if name in config.get("imports", ()):       # its kernels or rules
                importlib.import_module(name)
        here = (run / "checkpoints").is_dir() and not Path(values["checkpoint_dir"]).is_dir()
        return values | {"checkpoint_dir": ""} if here else values
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = "none" if isinstance(error, FileNotFoundError) else train.one_line(error)
        train.refuse(run / "config.json", "the config of a run", found)


def kept_tokenizer(t):
    """The tokenizer that the run directory keeps; None if it keeps none. DataError if damaged."""
    run = Path(t.run_dir)
    if not (run / "tokenizer.tiktoken").exists():
        plain = t.tokenizer == "bytes" and (run / "config.json").exists()
        return data.load_tokenizer("bytes") if plain else None
    tokenizer = data.load_tokenizer(run)
    facts = read_object(run / "tokenizer.tiktoken.json", [])
    data.need(facts.get("sha256", tokenizer.sha256) == tokenizer.sha256,
              f"{run}/tokenizer.tiktoken: altered since it was kept; copy it from a sound run")
    return tokenizer


def sample(c, t, overrides):
    """--sample: continue t.prompt from the newest sound checkpoint. The run directory is enough;
    a config file only says which one it is. Raises ConfigError if there is nothing to sample."""
    from configs import rundir
    from configs import sample as sampling
    if Path(t.run_dir, "config.json").exists():
        (c, t), own = train.load_config(t.run_dir, overrides), train.load_config(t.run_dir)
        asked, kept = (rundir.identity({"model": vars(c), "train": vars(t), "data": ""})
                       for c, t in ((c, t), own))
        for key in (key for key in asked if asked[key] != kept[key]):
            train.refuse(key, f"{kept[key]!r}, as in {t.run_dir}", repr(asked[key]),
                         "--sample_seed=N gives another text; a prompt may be longer than seq_len")
    checkpoints = train.Checkpoints(t)
    if not checkpoints.steps():
        train.refuse(t.run_dir, "a run with a checkpoint", f"none in {checkpoints.folder}",
                     "train it first, or give --checkpoint_dir")
    tokenizer = kept_tokenizer(t)
    if tokenizer is None:               # an older run, or checkpoints without a run directory
        mixture = train.open_data(c, t)
        rundir.check_run(c, t, mixture, checkpoints)
        tokenizer = mixture.tokenizer
    one = dataclasses.replace(t, devices=1, replicas=1, expert_parallel=1)
    state = checkpoints.restore(c, t, train.make_mesh(train.serving(c), one))
    for step, why in checkpoints.broken.items():
        print(f"broken    checkpoint of step {step}: {why}", file=sys.stderr)
    length = len(tokenizer.encode(t.prompt))
    seen = f", of which the model sees the last {c.seq_len}" if length > c.seq_len else ""
    print(f"sample    {t.run_dir}, step {int(state.step)}, prompt of {length} tokens{seen}",
          file=sys.stderr)
    text = sampling.make_sampler(c, tokenizer, t.temperature, t.top_k)(
        state.params, state.bias_LE, t.prompt, t.sample_tokens or 200, t.sample_seed)
    train.log(text)
    return 0


# -------------------------------------------------------------------------- the page: reading files

def number(x):
    """x as a float, if it is a number that can be drawn; else None."""
    fine = isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e30
    return float(x) if fine else None


def as_step(x):
    """x, if it can be the number of a step; else -1."""
    return x if isinstance(x, int) and number(x) is not None else -1


def clean(text):
    """Any text as what a file in UTF-8 can hold: lone surrogates become "?"."""
    return str(text).encode("utf-8", "replace").decode()


def dig(value, *path):
    """value[path[0]][path[1]]..., or None where there is no such thing."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def part_of(value, key):
    """value[key] if that is a dict, else {}."""
    found = dig(value, key)
    return found if isinstance(found, dict) else {}


class Files(NamedTuple):
    """What the files of a run directory say, and what of them cannot be read or drawn."""
    run: Path
    config: dict
    result: dict
    rows: list              # of metrics.jsonl, by step, each step once
    events: list            # of events.jsonl, as written
    notes: list             # of sentences


def read_object(path, notes):
    """The object in a JSON file, {} if there is none. What is wrong with it goes into notes."""
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
        if isinstance(value, dict):
            return value
        notes.append(f"{path.name} holds no JSON object and was left out.")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read and was left out ({type(error).__name__}).")
    return {}


def read_log(path, good, notes):
    """The rows of a .jsonl file that are good. How many lines were left out goes into notes."""
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    rows = [row for row in train.read_rows(path) if good(row)] if text else []
    if lost := sum(bool(line.strip()) for line in text.splitlines()) - len(rows):
        notes.append(f"{path.name}: {lost} of {lost + len(rows)} lines cannot be used and were "
                     f"left out.")
    return rows


def read_files(run):
    """The Files of a run directory. Any content of any file will do."""
    notes = []
    config, result = (read_object(run / name, notes) for name in ("config.json", "result.json"))
    steps = number(dig(config, "train", "steps")) or math.inf
    rows = read_log(run / "metrics.jsonl", lambda row: 0 < as_step(row.get("step")) <= steps and
                    any(number(row.get(key)) is not None for key in DRAWN), notes)
    events = read_log(run / "events.jsonl", lambda row: isinstance(row.get("event"), str), notes)
    by_step = {row["step"]: row for row in sorted(rows, key=is_metrics)}
    if len(by_step) < len(rows):
        notes.append(f"metrics.jsonl: {len(rows) - len(by_step)} rows are of a step that has "
                     f"another row; the last whole one was drawn.")
    rows = [by_step[step] for step in sorted(by_step)]
    wanted = [*DRAWN, "maxvio", "load_LE"] if any("load_LE" in row for row in rows) else DRAWN
    holes = sum(any(row.get(key, "") is not None and number(row.get(key)) is None
                    for key in wanted if key != "load_LE") for row in rows)
    if holes:
        notes.append(f"metrics.jsonl: {holes} of {len(rows)} rows lack a number, which was not "
                     f"drawn.")
    if broken := sum("load_LE" in wanted for _ in rows) - len(loads(rows)[0]):
        notes.append(f"metrics.jsonl: {broken} of {len(rows)} rows lack the loads of the experts, "
                     f"or have those of another model.")
    asked = sum(event["event"] == "eval" for event in events)
    if broken := asked - len(evaluations(events)):
        notes.append(f"events.jsonl: {broken} of {asked} evaluations have no losses.")
    return Files(run, config, result, rows, events, notes)


DRAWN = ("loss", "ema", "gnorm", "lr", "adam_lr", "tokens_per_second")


def evaluations(events):
    """[(step, {domain: {"loss": nats, "bpb": bits per byte}})]: what can be drawn, by step."""
    found = {}
    for event in events:
        step, domains = number(event.get("step")), event.get("domains")
        if event["event"] != "eval" or step is None or not isinstance(domains, dict):
            continue
        scores = {name: {unit: value for unit in ("loss", "bpb")
                         if (value := number(dig(score, unit))) is not None}
                  for name, score in domains.items()}
        if scores := {name: score for name, score in scores.items() if score}:
            found[event["step"]] = scores
    return sorted(found.items())


def loads(rows):
    """(steps [rows], loads [rows, L, E]) of the rows that have them in the commonest shape."""
    found = []
    for row in rows:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            load = np.asarray(row.get("load_LE"), float)
            if load.ndim == 2 and load.size and np.isfinite(load).all():
                found.append((row["step"], load))
    shapes = collections.Counter(load.shape for _, load in found).most_common(1)
    found = [(step, load) for step, load in found if load.shape == shapes[0][0]]
    return [step for step, _ in found], np.array([load for _, load in found])


# ------------------------------------------------------------------------------- the page: pictures

CAPTIONS = {
    "loss, nats per token":
        "Cross-entropy of the next token. One batch is noisy; the moving average forgets 5 % a "
        "step. Held-out text is never trained on.",
    "held-out text, bits per byte":
        "The loss of held-out text for each byte of it. Unlike nats per token, it can be compared "
        "between tokenizers. Lower is better.",
    "learning rates":
        "Of every step. The rate of the matrices is a relative step: by what share of its own norm "
        "an optimizer step moves a matrix. Adam trains the rest.",
    "gradient norm (log scale)":
        "Norm of the gradient of all weights, before it is clipped. A spike is a batch unlike the "
        "others.",
    "tokens per second":
        "Tokens trained in a second, between two log lines. Evaluations do not count.",
    "MaxVio (log scale)":
        "How far the busiest expert is above the mean load: 0.1 is 10 %. Tokens that chose "
        "independently among equal experts would come to the floor.",
    "experts":
        "The load of every expert over time, one band for each layer and one line in it for each "
        "expert. White is the mean load, blue is less, red is more; the darkest red is twice the "
        "mean or above."}


def series(rows, key):
    """(steps, values) of a column of metrics.jsonl; NaN where the value was not finite."""
    seen = [row for row in rows if key in row and
            (row[key] is None or number(row[key]) is not None)]
    return [row["step"] for row in seen], [math.nan if row[key] is None else row[key]
                                           for row in seen]


def held_out(events, unit, macro=False):
    """{domain: (steps, values)} of the evaluations; of their mean alone, or of all but the mean."""
    found, scores = {}, evaluations(events)
    for name in dict.fromkeys(name for _, domains in scores for name in domains):
        points = [(step, domains[name][unit]) for step, domains in scores
                  if unit in domains.get(name, {})]
        if points and (name == "macro") == macro:
            found[f"held out: {name}"] = tuple(map(list, zip(*points)))
    return found


def curves(rows, events, floor=None, rates=None):
    """{title: {label: (steps, values)}}. floor: MaxVio of tokens that choose independently.
    rates: {label: (steps, values)} of every step, else those of the log lines are drawn."""
    speeds = series(rows, "tokens_per_second")
    speed = f"median {np.median(speeds[1]):,.0f}" if speeds[1] else "none"
    training = {"training, one batch": series(rows, "loss"),
                "training, moving average": series(rows, "ema")}
    drawn = {"loss, nats per token": training | held_out(events, "loss"),
             "held-out text, bits per byte": held_out(events, "bpb"),
             "learning rates": rates or {"matrices (relative step)": series(rows, "lr"),
                                         "Adam": series(rows, "adam_lr")},
             "gradient norm (log scale)": {"one batch": series(rows, "gnorm")},
             "tokens per second": {speed: speeds}}
    maxvio = series(rows, "maxvio")
    if maxvio[0]:
        drawn["MaxVio (log scale)"] = {"mean over layers": maxvio}
        if floor := number(floor):
            drawn["MaxVio (log scale)"]["floor for independent tokens"] = (
                maxvio[0], [floor] * len(maxvio[0]))
    return drawn


def rates_of_every_step(files):
    """{label: (steps, rates)} exactly as train.lr_multiplier says, with what was changed on the way
    from the step on from which it held. None if the files do not tell."""
    try:
        c, t = train.load_config(files.run)
        pieces, last = [], files.rows[-1]["step"]
        for event in reversed(files.events):            # back to the settings of the first start
            if event["event"] in ("start", "resume"):
                pieces.append((event["step"], c, t))
            elif event["event"] == "config_changed":
                before = {key: values[0] for key, values in event["keys"].items()}
                c, t = (dataclasses.replace(x, **{k: before[k] for k in before.keys() & vars(x)})
                        for x in (c, t))
        found, step = np.full((2, last), np.nan), np.arange(last)
        for start, c, t in reversed(pieces):
            peak = train.rates(c, t)
            share = np.asarray(jax.jit(functools.partial(train.lr_multiplier, t))(step))
            found[:, start:] = np.outer((peak.matrix_lr, peak.adam_lr), share[start:])
        return {label: (step + 1, rates) for label, rates in
                zip(("matrices (relative step)", "Adam"), found)} if pieces else None
    except (train.ConfigError, ValueError, TypeError, LookupError, AttributeError,
            ArithmeticError, MemoryError):
        return None


def label_of(name):
    """A name as matplotlib shows it as it is: not as a formula, and not too long."""
    name = clean(name).replace("\n", " ")
    return (name if len(name) <= 40 else name[:39] + "…").replace("$", r"\$")


def draw_panel(axis, title, lines):
    """One panel. A log scale, if the title has it, needs a value above zero."""
    log = "log" in title and any(y > 0 for _, ys in lines.values() for y in ys)
    for label, (x, y) in lines.items():
        y = [value if value > 0 or not log else math.nan for value in y]
        dots = len(x) < 25 or "held out" in label
        axis.plot(x, y, "o-" if dots else "-", ms=4, lw=1, label=label_of(label))
    axis.set(title=label_of(title), xlabel="step", yscale="log" if log else "linear")
    if log:                     # 0.2 instead of 2 x 10^-1, and not all of them
        low, high = axis.get_ylim()
        digits = "12357" if high > 5 * low else "123456789"
        short = lambda tick, _: f"{tick:g}" if f"{tick:e}"[0] in digits else ""
        axis.yaxis.set_major_formatter(short)
        axis.yaxis.set_minor_formatter(short)
    if title == "tokens per second":
        axis.set_ylim(0, None)
    if handles := axis.get_legend_handles_labels()[0]:
        axis.legend(handles=handles[:10], fontsize="small")


def draw_curves(plt, panels, path=None):
    """Draw all panels, into one picture at path. Returns {title: PNG} of each alone."""
    figure = plt.figure(figsize=(13, 6.5), dpi=110, layout="constrained")
    parts = figure.subfigures(2, 3).flat
    for part, (title, lines) in zip(parts, panels.items()):
        draw_panel(part.subplots(), title, lines)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")      # a name in letters that the font lacks
        figure.canvas.draw()
    pixels, pictures = np.asarray(figure.canvas.buffer_rgba()), {}
    if path:
        plt.imsave(path, pixels)
    plt.close(figure)
    cells = [cell for row in np.array_split(pixels, 2) for cell in np.array_split(row, 3, axis=1)]
    for title, cell in zip(panels, cells):
        plt.imsave(pictures.setdefault(title, io.BytesIO()), cell, format="png")
    return {title: picture.getvalue() for title, picture in pictures.items()}


def draw_experts(plt, rows, path):
    """The load of every expert of every layer over time."""
    steps, load = loads(rows)                               # [rows, L, E]; 1 is the mean load
    _, layers, experts = load.shape
    first, last = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else steps[0] - 1, steps[-1]
    place = np.linspace(first, last, min(1000, max(1, int(last - first))) + 1)[1:]
    load = load[np.searchsorted(steps, place).clip(max=len(steps) - 1)]     # a row ends its steps
    figure, axes = plt.subplots(layers, 1, figsize=(10, 1 + 0.9 * layers), sharex=True,
                                squeeze=False, layout="constrained")
    for layer, axis in enumerate(axes.flat):
        extent = first, last, experts - 0.5, -0.5
        image = axis.imshow(load[:, layer].T, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r",
                            interpolation="nearest", extent=extent)
        axis.set(ylabel=f"layer {layer}", yticks=())
    axis.set(xlabel="step")
    figure.colorbar(image, ax=axes, label="load over mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------------- the page: text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1320px; margin: 2em auto;
       padding: 0 1em }
h1 { margin-bottom: 0 }  h2 { margin-top: 2em }
.path, figcaption, .note { color: #555 }
table { border-collapse: collapse; margin: .5em 0 }
th, td { text-align: left; vertical-align: top; padding: .2em 1.2em .2em 0;
         border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
th { font-weight: 600; white-space: nowrap }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1em }
.side { display: flex; flex-wrap: wrap; gap: 1em 1.5em; align-items: flex-start }
figure { margin: 0 }  figcaption { font-size: 13px }
img { max-width: 100% }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .8em }
details { margin: .5em 0 }  summary { cursor: pointer }
"""
MOST_TEXT = 200_000             # characters of a file that a page shows


def esc(text):
    return html.escape(clean(text))


def table(rows, head=(), numbers=False):
    """An HTML table. The first cell of a row is its name; all are escaped here."""
    mark = ' class="number"' if numbers else ""
    lines = ["<tr>" + "".join(f"<th{mark if i else ''}>{esc(cell)}</th>"
                              for i, cell in enumerate(head)) + "</tr>"] if head else []
    for name, *cells in rows:
        cells = "".join(f"<td{mark}>{esc(cell)}</td>" for cell in cells)
        lines.append(f"<tr><th>{esc(name)}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def figure(png, title, caption):
    image = base64.b64encode(png).decode()
    return (f'<figure><img alt="{esc(title)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{esc(caption)}</figcaption></figure>")


def page(title, *parts):
    """A page of its own: no script, nothing from elsewhere."""
    return (f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{esc(title)}</title>"
            f"<style>{STYLE}</style><h1>{esc(title)}</h1>" + "\n".join(parts) + "</html>\n")


def raw(path):
    """The text of a file, folded away, if there is one."""
    if not path.is_file():
        return ""
    text = path.read_text("utf-8", "replace")
    shown = text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}\n... {len(text):,} characters"
    return f"<details><summary>{esc(path.name)}</summary><pre>{esc(shown)}</pre></details>"


def date(seconds):
    """A time of time.time() as a date."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError, TypeError):
        return f"unknown ({seconds})"


def count_of(n):
    """A large number in millions or billions."""
    return f"{n / 1e9:,.2f} B" if n >= 1e9 else f"{n / 1e6:,.2f} M"


def facts(files):
    """[(name, sentence)]: eight facts of a run; "not known" where the files do not say."""
    config, result, rows, events = files.config, files.result, files.rows, files.events
    counts, model_, train_ = (config.get(key) for key in ("counts", "model", "train"))
    kinds = collections.Counter(event["event"] for event in events)
    names = [name for name in part_of(result, "domains") if name != "macro"]

    def balance_():
        if not model_["num_experts"]:
            return "no experts: a dense model"
        drop = [x for row in rows[-len(rows) // 10:] if (x := number(row.get("drop"))) is not None]
        dropped = f"; {100 * np.mean(drop):.1f} % of assignments dropped" if drop else ""
        return (f"MaxVio {result['maxvio']:.3f} over the last tenth, {result['maxvio_floor']:.3f} "
                f"for independent tokens{dropped}")
    def code():
        versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
        patch = ", with diff.patch" if (files.run / "diff.patch").exists() else ""
        return f"commit {config['commit']}{patch}; {versions}"
    sentences = {
        "Model": lambda: (
            f"{count_of(counts['total'])} parameters, {count_of(counts['active'])} active; "
            f"{model_['num_layers']} layers of width {model_['hidden_dim']}, "
            f"{model_['num_experts']} experts, {model_['experts_per_token']} for each token"),
        "Data": lambda: (
            ", ".join(f"{name} ({weight:g})" for name, weight in train_["mixture"])
            + f"; tokenizer {train_['tokenizer']}; sha256 {config['data'][:12]}"),
        "Training": lambda: (
            f"{rows[-1]['step']:,} of {train_['steps']:,} steps of {train_['batch_size']} x "
            f"{model_['seq_len']} tokens; "
            f"{count_of(rows[-1]['step'] * train_['batch_size'] * model_['seq_len'])} in all"),
        "Result": lambda: (
            f"{result['loss']:.4f} nats per token, {result['bpb']:.4f} bits per byte; held out: "
            f"{', '.join(names)}"),
        "Speed": lambda: (
            f"{result['flops']:.3g} FLOP in {result['seconds']:,.0f} s of training; "
            f"{result['tokens_per_second']:,.0f} tokens per second"),
        "Balance": balance_,
        "Time": lambda: (
            f"{date(events[0]['time'])} to {date(events[-1]['time'])}; {kinds['resume']} times "
            f"resumed, {kinds['skip']} updates skipped"),
        "Code": code}
    found = {}
    for name, sentence in sentences.items():
        try:
            found[name] = sentence()
        except (TypeError, ValueError, AttributeError, LookupError,
                ArithmeticError):
            found[name] = "not known"
    return list(found.items())


def own_keys(config):
    """[(key, value, default)] of the keys whose value is not the default of the run's recipe; those
    that have no default come last."""
    recipe, found = train.RECIPES.get(str(dig(config, "train", "recipe")), {}), []
    for part, cls in (("model", model.ModelConfig), ("train", train.TrainConfig)):
        defaults = {f.name: "has none" if f.default is dataclasses.MISSING else f.default
                    for f in dataclasses.fields(cls) if f.name != "run_dir"}
        defaults |= {key: value for key, value in recipe.items() if key in defaults}
        for key, value in part_of(config, part).items():
            if key in defaults and value != defaults[key]:
                found.append((key, json.dumps(value), defaults[key]))
    return sorted(found, key=lambda row: row[2] == "has none")


def changes(events):
    """[(key, date, before, after)] of what was changed when the run was resumed."""
    return [(key, date(event.get("time")), *pair) for event in events
            if event["event"] == "config_changed" and isinstance(event.get("keys"), dict)
            for key, pair in event["keys"].items() if isinstance(pair, list) and len(pair) == 2]


def history(events, most=100):
    """[(date, event, what is said of it)] of the newest events that are no evaluations."""
    told = [event for event in events if event["event"] != "eval"][-most:]
    def rest(event):
        text = ", ".join(f"{key} {value}" for key, value in event.items()
                         if key not in ("event", "time", "keys"))
        return text if len(text) <= 300 else text[:299] + "…"
    return [(date(event.get("time")), event["event"], rest(event)) for event in told]


def report(run):
    """Write run/plots/*.png and run/report.html from the files in a run directory."""
    run, plt = Path(run), scaling.pyplot()
    files = read_files(run)
    (run / "plots").mkdir(exist_ok=True)
    parts = [f'<p class="path">{esc(run)}</p>', table(facts(files))]
    parts += [f'<p class="note">{esc(note)}</p>' for note in files.notes]
    if files.rows:
        panels = curves(files.rows, files.events, files.result.get("maxvio_floor"),
                        rates_of_every_step(files))
        pictures = draw_curves(plt, panels, run / "plots/training.png")
        parts += ['<h2>Curves</h2><div class="figures">',
                  *(figure(png, title, CAPTIONS[title]) for title, png in pictures.items()),
                  "</div>"]
    if loads(files.rows)[0]:
        draw_experts(plt, files.rows, run / "plots/experts.png")
        parts += ["<h2>Experts</h2>", figure((run / "plots/experts.png").read_bytes(),
                                             "load of the experts", CAPTIONS["experts"])]
    if changed := changes(files.events):
        parts += ["<h2>Keys changed on the way</h2>",
                  table(changed, ("key", "when", "before", "after"))]
    if own := own_keys(files.config):
        parts += ["<h2>Keys of this run</h2><p>All others are the default of its recipe.</p>",
                  table(own, ("key", "value", "default"))]
    if (run / "sample.txt").is_file():
        text = (run / "sample.txt").read_text("utf-8", "replace")[:MOST_TEXT]
        parts += ["<h2>Sample</h2>", f"<pre>{esc(text)}</pre>"]
    if told := history(files.events):
        parts += ["<h2>Events</h2>", table(told, ("time", "event", "")), "<h2>Files</h2>"]
    parts += [raw(run / name) for name in ("result.json", "config.json", "events.jsonl")]
    parts += [raw(path) for path in sorted(run.glob("diff*.patch"))]
    train.write(run / "report.html", page(f"{run.resolve().name}: a training run", *parts))


def main(arguments):
    """python configs/report.py RUN_DIR. Returns the exit code."""
    files = "config.json", "metrics.jsonl", "events.jsonl"
    if len(arguments) != 1 or not any(Path(arguments[0], name).is_file() for name in files):
        print(f"report.py: expected one run directory, with {' or '.join(files)}, found {arguments}", file=sys.stderr)
        return 2
    try:
        report(arguments[0])
    except (train.TemporaryError, scaling.BadInput, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(f"see {Path(arguments[0], 'report.html')}")
    return 0


# ---------------------------------------------------------------------------------------- one batch


def replay(c, t, step):
    """--replay STEP: print what was in the batch of that step, and what came of it."""
    from configs import rundir
    kept, written = read_object(Path(t.run_dir, "config.json"), []), rundir.read_config(t.run_dir)
    steps = max(0, as_step(dig(kept, "train", "steps"))) or t.steps
    if not 1 <= step <= steps:
        train.refuse("--replay", f"a step from 1 to {steps}", step)
    mixture = train.open_data(c, t)
    if written:
        now = rundir.describe_run(c, t) | {"data": mixture.sha256}
        rundir.compare(t.run_dir, written, now, rundir.identity(now), "its batches were made by that")
    batch = data.batch_at(mixture, step - 1, t.batch_size, c.seq_len, t.seed)
    print(f"step {step}: {t.batch_size} rows of {c.seq_len} tokens, "
          f"{int(batch.weights_BS.sum()):,} scored")
    rows = data.rows_of(mixture, step - 1, t.batch_size, c.seq_len, t.seed)
    for b, (name, window) in enumerate(rows):
        ids, documents = batch.tokens_BS[b], batch.segments_BS[b].max()
        print(f"row {b:4d}  {name} window {window:,}  {int(batch.weights_BS[b].sum())} scored, "
              f"{documents} documents, {len(np.unique(ids))} distinct  "
              f"{mixture.tokenizer.decode(ids[:48])!r}")
    for name in ("metrics.jsonl", "events.jsonl"):
        for row in train.read_rows(Path(t.run_dir, name)):
            if row.get("step") == step:
                short = {key: value for key, value in row.items() if key not in ("rows", "load_LE")}
                print(f"{name}: {json.dumps(short)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
