"""Every balancing rule compared: one small model, the same data and seeds, trained under each.

Run:  python tests/arena.py                     all rules and sign@0.01, three seeds: about an hour
      python tests/arena.py quantile sign sign@0.01 --seeds=1      these rules; @ gives the rate
      python tests/arena.py failures            what does not work, beside what does: a minute
      python tests/arena.py animate out/RUN     each expert's load over a run, as a GIF
Runs are kept in --out (out/arena). Finished ones are read again and stopped ones continue, so one
more rule or seed costs only its own runs. The table is printed; the picture is OUT/arena.png.

T tokens  E experts  K experts per token  L layers"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import balance
import train
from configs import rundir
from tests import lp
from tests import rivals

CAPACITIES = ("1", "1.15", "1.33")      # of `would_drop` in metrics.jsonl


class BadInput(ValueError):
    """What the user gave cannot be compared. main prints it as one line and exits with 2."""


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# ------------------------------------------------------------------------------------ training

def split(label):
    """'sign@0.01' -> ('sign', 0.01); 'sign' -> ('sign', 0.0), the rule's own rate."""
    rule, _, rate = label.partition("@")
    if rule not in balance.RULES:
        raise BadInput(f"rule: expected one of {', '.join(balance.RULES)}, found {rule!r}")
    try:
        return rule, float(rate or 0)
    except ValueError:
        raise BadInput(f"{label}: expected a number after @, found {rate!r}") from None


def train_once(label, seed, config, out):
    """Train as train.py does, unless this run is finished. Returns the run's directory."""
    rule, rate = split(label)
    run = Path(out, f"{label}-seed{seed}")
    keys = {"balancer": rule, "balancer_rate": rate, "seed": seed, "run_dir": run.resolve()}
    if (run / "result.json").exists():
        c, t = train.load_config(str(config), [f"--{key}={value}" for key, value in keys.items()])
        now, was = rundir.describe_run(c, t), json.loads((run / "config.json").read_text())
        for key in (key for part in ("model", "train") for key in now[part]
                    if key != "run_dir" and was[part].get(key, now[part][key]) != now[part][key]):
            raise BadInput(f"{run}: was trained with another {key} than {config} has; give another --out")
        return run
    print(f"training {run}", flush=True)
    command = [sys.executable, "train.py", str(Path(config).resolve())]
    command += [f"--{key}={value}" for key, value in keys.items()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise BadInput(f"{run}: train.py ended with {ended.returncode}: {ended.stderr[-300:]}")
    return run


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def setting(run):
    """What all runs of a comparison must share: the config without what the arena varies."""
    config = json.loads((run / "config.json").read_text())
    for part in ("model", "train"):
        for key in ("balancer", "balancer_rate", "seed", "run_dir"):
            config[part].pop(key, None)
    return {part: config[part] for part in ("model", "train", "data")}


def measure(run):
    """The numbers of one run, for the table and the picture."""
    result = json.loads((run / "result.json").read_text())
    every = json.loads((run / "config.json").read_text())["train"]["log_every"]
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] % every == 0]    # not where it was stopped
    late = [row for row in rows if row["step"] > 0.9 * rows[-1]["step"]]
    measured = {
        "loss": result["loss"], "bpb": result["bpb"],
        "floor": result["maxvio_floor"],
        "maxvio_run": np.mean([row["maxvio"] for row in rows]),
        "maxvio_end": result["maxvio"],
        "dead": max(row["dead"] for row in rows),
        "ms": 1e3 * min(row["seconds"] for row in rows),
        "steps": [row["step"] for row in rows],
        "maxvio": [row["maxvio"] for row in rows],
    }
    for capacity in CAPACITIES:
        measured[capacity] = np.mean([row["would_drop"][capacity] for row in late])
    return measured


def compare(labels, seeds, config, out):
    """Train what is missing. {label: {quantity: array over seeds}}."""
    table, shared = {label: [] for label in labels}, None
    for seed in range(seeds):
        for label in labels:
            run = train_once(label, seed, config, out)
            shared = shared or setting(run)
            if setting(run) != shared:
                raise BadInput(f"{run}: expected the config of the other runs, found another: "
                               "delete the runs of one of them, or give another --out")
            table[label].append(measure(run))
    return {label: {key: np.array([run[key] for run in runs]) for key in runs[0]}
            for label, runs in table.items()}


# ------------------------------------------------------------------------------------ the report

def print_table(table, base, seeds):
    floor = table[base]["floor"][0]
    print(f"""
{seeds} seed(s), the same data and seeds for all rules. loss: held-out nats per token. difference:
to {base}, seed by seed, with its standard error if there is more than one seed. MaxVio: over its
sampling floor of {floor:.3f}, mean of the run and last tenth. drop: what buffers of that capacity
would lose in the last tenth. dead: most experts without a token at any line. step: fastest line.
*: the rule looks ahead in training""")
    print(f"{'rule':16s}{'loss':>7s}{'difference':>19s}{'bits/byte':>10s}{'MaxVio run':>11s}"
          f"{'end':>6s}{'drop 1.0':>10s}{'1.15':>7s}{'1.33':>7s}{'dead':>6s}{'step ms':>8s}")
    for label, row in sorted(table.items(), key=lambda item: item[1]["loss"].mean()):
        mean = {key: value.mean() for key, value in row.items() if value.ndim == 1}
        gap = row["loss"] - table[base]["loss"]
        error = f" +- {gap.std(ddof=1) / seeds**0.5:.4f}" if seeds > 1 else ""
        drops = f"{mean['1']:10.1%}{mean['1.15']:7.1%}{mean['1.33']:7.1%}"
        star = "*" if split(label)[0] in balance.NON_CAUSAL else ""
        print(f"{label + star:16s}{mean['loss']:7.4f}{f'{gap.mean():+.4f}{error}':>19s}"
              f"{mean['bpb']:10.4f}{mean['maxvio_run'] / floor:11.1f}"
              f"{mean['maxvio_end'] / floor:6.1f}{drops}{mean['dead']:6.1f}{row['ms'].min():8.0f}")
    if seeds > 1:
        for name, key in (("loss", "loss"), ("final MaxVio", "maxvio_end")):
            better = [label for label in table if (table[label][key] < table[base][key]).all()]
            print(f"lower {name} than {base} with every seed: {', '.join(better) or 'none'}")


def draw(table, seeds, path):
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for i, (label, row) in enumerate(table.items()):
        color, width = plt.cm.tab20(i % 20), 2.5 if label == "quantile" else 1.2
        maxvio = row["maxvio"].mean(axis=0)
        left.semilogy(row["steps"][0], maxvio, label=label, color=color, lw=width)
        end, loss = (row["maxvio_end"] / row["floor"]).mean(), row["loss"]
        right.errorbar(end, loss.mean(), loss.std(ddof=1) if seeds > 1 else None, fmt="o",
                       color=color)
        right.annotate(label, (end, loss.mean()), xytext=(4, 3), textcoords="offset points",
                       fontsize=8)
    floor = next(iter(table.values()))["floor"][0]
    left.axhline(floor, color="black", ls=":", lw=0.8)
    left.set(title="MaxVio, mean of layers and seeds; dotted: sampling floor", xlabel="step")
    left.legend(ncols=2, fontsize=7)
    spread = " and its spread over seeds" if seeds > 1 else ", one seed"
    right.set(title=f"held-out loss{spread}", xscale="log", ylabel="nats per token",
              xlabel="MaxVio at the end, over its floor")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def arena(labels, seeds, config, out):
    labels = list(dict.fromkeys(labels)) or [*balance.RULES, "sign@0.01"]
    for label in labels:
        split(label)
    if seeds < 1:
        raise BadInput(f"--seeds: expected at least 1, found {seeds}")
    table = compare(labels, seeds, config, out)
    base = "quantile" if "quantile" in table else labels[0]
    print_table(table, base, seeds)
    draw(table, seeds, Path(out, "arena.png"))


# ------------------------------------------------------------------------------------ failures
# What does not work, each beside the recipe, on one layer and one device: 2,048 tokens, 32 experts.

T, E, K = 2048, 32, 2
Q = T * K // E


def batches():
    """Forty batches of scores, the popularity of their experts, and a topic for each sequence."""
    rng = np.random.default_rng(0)
    popular_E = rng.standard_normal(E)
    scores = [(rng.standard_normal((T, E)) + popular_E).astype(np.float32) for _ in range(40)]
    topic_TE = np.repeat(2 * rng.standard_normal((16, E)), T // 16, axis=0)
    return scores, popular_E, topic_TE


def online(scores, K, step=balance.step, gain=1.0):
    """MaxVio of each batch under the bias that the batches before it made; and the last bias."""
    bias_E, violation = jnp.zeros(scores[0].shape[1]), []
    for s_TE in scores:
        load_E, new_E = step(jnp.asarray(s_TE, jnp.float32), bias_E, K)
        bias_E = bias_E + gain * (new_E - bias_E)
        violation.append(float(balance.max_violation(load_E)))
    return np.array(violation), bias_E


def step_with(next_bias, counted=slice(None)):
    """A step like balance.step with its own (margin_TE, bias_E, K) -> the next bias_E."""
    @partial(jax.jit, static_argnums=2)
    def step(s_TE, bias_E, K):
        expert_TK, margin_TE = balance.select("quantile", s_TE, bias_E, K)
        load_E = jnp.bincount(expert_TK[counted].reshape(-1), length=E)
        return load_E, next_bias(margin_TE, bias_E, K)
    return step


def quantile_of(margin_TE, bias_E, K, valid_T):
    return balance.update("quantile", margin_TE[None], valid_T, bias_E[None], K)[0][0]


def steps_of_twice_the_length():
    scores, popular_E, _ = batches()
    skewed = [s_TE + 3 * popular_E for s_TE in scores]
    twice, once = (online(skewed, K, gain=gain)[0][-20:].mean() for gain in (2.0, 1.0))
    return "MaxVio on new batches", twice, once


def the_published_pair():
    def gap(column):
        beta_E = np.zeros(4)
        for _ in range(100):
            _, beta_E = lp.alternate(lp.STALL, beta_E, 2, column=column)
        return lp.dual(lp.STALL, beta_E, 2) - lp.lp_optimum(lp.STALL, 2)[0]
    return "dual - optimum after 100 alternations", gap(0.0), gap(1.0)


def a_histogram_of_saturated_sigmoids():
    loud = [12 * s_TE for s_TE in batches()[0]]
    histogram = partial(balance.step, rule="quantile_k3")
    bad, good = (online(loud, K, step)[0][-20:].mean() for step in (histogram, balance.step))
    return "MaxVio on new batches, logits x 12", bad, good


def a_histogram_and_one_outlier():
    def from_bins(margin_TE, bias_E, K):
        x_LTE, valid_T = (margin_TE - bias_E)[None], jnp.ones(T, bool)
        low_L, high_L = rivals.min_and_max(x_LTE, valid_T)
        beta_LE = rivals.histogram_quantile(x_LTE, valid_T, Q, low_L, high_L, 1000)
        return jnp.mean(beta_LE) - beta_LE[0]
    outlier = [jnp.asarray(batches()[0][0]).at[0, 0].set(-1e3)] * 10     # one score of one token
    bad, good = online(outlier, K, step_with(from_bins))[0][-1], online(outlier, K)[0][-1]
    return "MaxVio in the batch, 10 updates", bad, good


def padding_in_the_statistic():
    first = jnp.asarray(batches()[0][0])
    pads = [first.at[T // 2:].set(first[0])] * 10       # half of the rows are the same padding

    def violation(valid_T):
        step = step_with(partial(quantile_of, valid_T=valid_T), counted=slice(T // 2))
        return online(pads, K, step)[0][-1]
    bad, good = violation(jnp.ones(T, bool)), violation(jnp.arange(T) < T // 2)
    return "MaxVio of real tokens, 10 updates", bad, good


def a_bias_that_is_not_centered():
    def uncentered(margin_TE, bias_E, K):
        return bias_E - balance.kth_largest(margin_TE[None], jnp.ones(T, bool), Q)[0]
    scores, _, _ = batches()
    bad, good = (abs(float(jnp.mean(online(scores, K, step)[1])))
                 for step in (step_with(uncentered), balance.step))
    return "size of its mean after 40 steps", bad, good


def the_mean_of_sixteen_devices_quantiles():
    def local(margin_TE, bias_E, K):
        def update(margin_LTE):
            valid_T, old_LE = jnp.ones(T // 16, bool), bias_E[None]
            return balance.update("quantile_local", margin_LTE, valid_T, old_LE, K, "device")[0]
        device = jax.vmap(update, axis_name="device", out_axes=None)
        return device(margin_TE.reshape(16, 1, -1, E))[0]
    scores, _, topic_TE = batches()
    clustered = [scores[0] + topic_TE] * 10
    bad, good = online(clustered, K, step_with(local))[0][-1], online(clustered, K)[0][-1]
    return "MaxVio in the batch, 10 updates", bad, good


def reviving_a_dead_expert_by_sign_steps():
    dead_TE = jnp.asarray(batches()[0][0]).at[:, 5].add(-50.0)

    def updates(rule, most=1000):
        bias_E = jnp.zeros(E)
        for i in range(most):
            load_E, bias_E = balance.step(dead_TE, bias_E, K, rule)
            if load_E[5] >= Q / 2:
                break
        return float(i)
    return "updates to half its share", updates("sign"), updates("quantile")


FAILURES = {        # what is tried -> () -> (what is measured, its value, the recipe's value)
    "steps of twice the length (g = 2)": steps_of_twice_the_length,
    "the published pair, (q+1)-th largest": the_published_pair,
    "a histogram of saturated sigmoids": a_histogram_of_saturated_sigmoids,
    "1,000 bins over the range, one outlier": a_histogram_and_one_outlier,
    "padding left in the statistic": padding_in_the_statistic,
    "a bias that is not centered": a_bias_that_is_not_centered,
    "the mean of sixteen devices' quantiles": the_mean_of_sixteen_devices_quantiles,
    "reviving a dead expert by sign steps": reviving_a_dead_expert_by_sign_steps,
}


def print_failures():
    print(f"{'what is tried':40s}{'what is measured':40s}{'value':>9s}{'recipe':>9s}")
    for name, failure in FAILURES.items():
        quantity, bad, good = failure()
        print(f"{name:40s}{quantity:40s}{bad:9.3g}{good:9.3g}", flush=True)


# ------------------------------------------------------------------------------------ animation

def animate(run, frames=80):
    """RUN/metrics.jsonl -> RUN/plots/load.gif: a row a layer, a cell an expert, a frame a line."""
    plt = pyplot()
    from matplotlib.animation import FuncAnimation
    from matplotlib.animation import PillowWriter
    log = Path(run, "metrics.jsonl")
    rows = [row for row in read_rows(log) if "load_LE" in row]
    if not rows:
        raise BadInput(f"{log}: expected lines with load_LE, as train.py writes them, found none")
    rows = rows[::-(-len(rows) // frames)]
    load = np.array([row["load_LE"] for row in rows])       # [frames,L,E]; 1 is the mean load
    step, violation = [row["step"] for row in rows], load.max(-1).mean(-1) - 1
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.5), height_ratios=(2, 1),
                                         layout="constrained")
    picture = top.imshow(load[0], vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    figure.colorbar(picture, ax=top, label="load over the mean")
    top.set(xlabel="expert", ylabel="layer", yticks=range(load.shape[1]))
    bottom.semilogy(step, np.maximum(violation, 1e-3), lw=1)
    dot, = bottom.plot([], [], "o")
    bottom.set(xlabel="step", ylabel="MaxVio")

    def show(i):
        picture.set_data(load[i])
        dot.set_data([step[i]], [max(violation[i], 1e-3)])
        top.set_title(f"step {step[i]}: MaxVio {violation[i]:.2f}")

    out = Path(run, "plots", "load.gif")
    out.parent.mkdir(exist_ok=True)
    FuncAnimation(figure, show, len(rows)).save(out, PillowWriter(fps=10), dpi=80)
    print(f"wrote {out}, {len(rows)} frames")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", help="rules, or `failures`, or `animate RUN`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", default=ROOT / "configs" / "arena.py")
    parser.add_argument("--out", default="out/arena")
    given = parser.parse_args(arguments)
    try:
        if given.rules == ["failures"]:
            print_failures()
        elif given.rules[:1] == ["animate"] and len(given.rules) == 2:
            animate(given.rules[1])
        else:
            arena(given.rules, given.seeds, given.config, given.out)
    except BadInput as error:
        print(f"arena.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
