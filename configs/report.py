"""What a run says of itself: lines on the screen, result.json, a page of pictures, one batch.

Run:  python configs/report.py RUN_DIR        write the page anew, as train.py does at a run's end
      python train.py CONFIG --replay STEP    print what was in the batch of a step, and its outcome

curves says what is drawn: the numbers of metrics.jsonl and events.jsonl, as they are."""

import base64
import contextlib
import html
import inspect
import json
import math
import re
import resource
import sys
import time
from pathlib import Path

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
        yield (f"note      evaluations score {often:,} tokens and the last one {last:,}: "
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
    mfu = f"{100 * model.count(c).mfu_flops * speed / peak:.1f}%" if peak else "-"
    eta = int(row["seconds"] * (steps - step))
    parts = [f"step {step:>{len(str(steps))}}/{steps} {100 * step / steps:5.1f}%",
             f"loss {loss:.3f} ema {ema:.3f}", f"lr {row['lr']:.1e}", f"gnorm {gnorm:.2f}",
             f"{speed / 1e3:.1f} ktok/s", f"{row['seconds'] * 1e3:.0f} ms", f"mfu {mfu}"]
    if c.num_experts:
        parts.append(f"maxvio {row['maxvio']:.2f} drop {100 * row['drop']:.1f}%")
    parts += [memory_in_use(device), f"skip {skipped}", f"eta {eta // 60}m{eta % 60:02d}s"]
    return " | ".join(parts)


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
        known = sum(row["steps"] for row in kept)
        if known != start:
            train.log_event(run, "metrics_lost", steps=start - known)
            train.log(f"metrics   metrics.jsonl covers {known} of {start} steps; averages, times "
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
        new = {"step": step, "loss": loss if math.isfinite(loss) else None, "ema": self.ema,
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


def write_result(c, t, run, mixture, domains):
    """Write result.json: what scaling.py reads, and what a table may quote."""
    n, rows = model.count(c), train.read_rows(run / "metrics.jsonl")
    tokens = t.steps * t.batch_size * c.seq_len
    speeds = [row["tokens_per_second"] for row in rows]
    part = f"first {t.eval_tokens_final:,} tokens of" if t.eval_tokens_final else "whole"
    result = {"flops": n.flops_per_token * tokens, "flops_with_head": n.mfu_flops * tokens,
              "params": n.params, "total_params": n.total, "tokens": tokens, **domains["macro"],
              "domains": domains, "bytes_per_token": mixture.bytes_per_token, "seed": t.seed,
              "commit": train.git_commit(), "tokens_per_second": float(np.median(speeds)),
              "seconds": sum(row["seconds"] * row["steps"] for row in rows),
              "eval": f"{part} held-out domains, seq_len {c.seq_len}, data {mixture.sha256[:16]}"}
    if c.num_experts:
        last = np.mean([row["maxvio"] for row in rows if row["step"] > 0.9 * t.steps])
        floor = balance.sampling_floor(t.batch_size * c.seq_len, c.num_experts, c.experts_per_token)
        result |= {"maxvio": float(last), "maxvio_floor": floor}
        train.log(f"balance   MaxVio {last:.3f} over the last tenth of the run; {floor:.3f} for "
                  f"independent tokens")
    train.write(run / "result.json", json.dumps(result, indent=1))
    return result


def curves(rows, events, floor=None):
    """{title: {label: (steps, values)}}. floor: MaxVio of tokens that choose independently."""
    evals = [event for event in events if event["event"] == "eval"]
    domains = [name for name in evals[0]["domains"] if name != "macro"] if evals else []

    def column(key):
        return [row["step"] for row in rows], [row[key] for row in rows]

    def held_out(unit):
        steps = [event["step"] for event in evals]
        return {f"held out: {name}": (steps, [event["domains"][name][unit] for event in evals])
                for name in domains}

    speed = np.median(column("tokens_per_second")[1])
    training = {"training, one batch": column("loss"), "training, moving average": column("ema")}
    drawn = {"loss, nats per token": training | held_out("loss"),
             "held-out text, bits per byte": held_out("bpb"),
             "learning rates": {"matrices (relative step)": column("lr"),
                                "Adam": column("adam_lr")},
             "gradient norm (log scale)": {"one batch": column("gnorm")},
             "tokens per second": {f"median {speed:,.0f}": column("tokens_per_second")}}
    if floor:
        drawn["MaxVio (log scale)"] = {
            "mean over layers": column("maxvio"),
            "floor for independent tokens": (column("step")[0], [floor] * len(rows))}
    return drawn


def draw_curves(plt, panels, path):
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        for label, (x, y) in lines.items():
            axis.plot(x, y, "o-" if "held out" in label else "-", ms=4, lw=1, label=label)
        axis.set(title=title, xlabel="step", yscale="log" if "log" in title else "linear")
        if lines:
            axis.legend()
    axes[1, 1].set_ylim(0, None)
    axes[1, 2].set_visible(len(panels) == 6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_experts(plt, rows, path):
    """The load of every expert of every layer over time."""
    load = np.array([row["load_LE"] for row in rows])       # [rows, L, E]; 1 is the mean load
    _, layers, experts = load.shape
    figure, axes = plt.subplots(layers, 1, figsize=(10, 1 + 0.9 * layers), sharex=True,
                                squeeze=False, layout="constrained")
    for layer, axis in enumerate(axes.flat):
        extent = rows[0]["step"], rows[-1]["step"], experts - 0.5, -0.5
        image = axis.imshow(load[:, layer].T, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r",
                            interpolation="nearest", extent=extent)
        axis.set(ylabel=f"layer {layer}", yticks=())
    axis.set(xlabel="step")
    figure.colorbar(image, ax=axes, label="load of each expert over the mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(run):
    """Write run/plots/*.png and run/report.html from the files in a run directory."""
    plt = scaling.pyplot()
    rows, events = train.read_rows(run / "metrics.jsonl"), train.read_rows(run / "events.jsonl")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    (run / "plots").mkdir(exist_ok=True)
    panels = curves(rows, events, result.get("maxvio_floor"))
    draw_curves(plt, panels, run / "plots/training.png")
    if "load_LE" in rows[-1]:
        draw_experts(plt, rows, run / "plots/experts.png")
    parts = [f"<!doctype html><meta charset='utf-8'><h1>{html.escape(str(run))}</h1>"]
    for path in sorted((run / "plots").glob("*.png"), reverse=True):
        image = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<img style="max-width:100%" src="data:image/png;base64,{image}">')
    for name in ("result.json", "sample.txt", "config.json", "events.jsonl"):
        if (run / name).exists():
            text = html.escape((run / name).read_text(encoding="utf-8"))
            parts.append(f"<h2>{name}</h2><pre>{text}</pre>")
    train.write(run / "report.html", "".join(parts))


def replay(c, t, step):
    """--replay STEP: print what was in the batch of that step, and what came of it."""
    steps, file = t.steps, Path(t.run_dir, "config.json")
    if file.exists():
        steps = json.loads(file.read_text(encoding="utf-8"))["train"]["steps"]
    if not 1 <= step <= steps:
        train.refuse("--replay", f"a step from 1 to {steps}", step)
    mixture = train.open_data(c, t)
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
    report(Path(sys.argv[1]))
