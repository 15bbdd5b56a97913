"""A run looked at: its own files drawn and put into one page, and the batch of one of its steps.

Run:  python configs/report.py RUN_DIR          write the page anew; train.py does it at the end of a run
      python train.py CONFIG --replay STEP    print what was in the batch of a step, and what came of it

curves says what is drawn: the numbers of metrics.jsonl and events.jsonl, as they are."""

import base64
import html
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import data
import train


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
             "learning rates": {"matrices (relative step)": column("lr"), "Adam": column("adam_lr")},
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
    load = np.array([row["load_LE"] for row in rows])               # [rows, L, E]; 1 is the mean load
    _, layers, experts = load.shape
    figure, axes = plt.subplots(layers, 1, figsize=(10, 1 + 0.9 * layers), sharex=True, squeeze=False,
                                layout="constrained")
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
    import matplotlib                               # MERGE: plt = scaling.pyplot()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, events = train.read_rows(run / "metrics.jsonl"), train.read_rows(run / "events.jsonl")
    result = json.loads((run / "result.json").read_text())
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
            text = html.escape((run / name).read_text())
            parts.append(f"<h2>{name}</h2><pre>{text}</pre>")
    train.write(run / "report.html", "".join(parts))


def replay(c, t, step):
    """--replay STEP: print what was in the batch of that step, and what came of it."""
    if not 1 <= step <= t.steps:
        train.refuse("--replay", f"a step from 1 to {t.steps}", step)
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
