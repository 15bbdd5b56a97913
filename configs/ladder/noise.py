"""How far seeds lie apart, and how well a ladder with this noise can forecast.

    python configs/ladder/noise.py TABLE [TABLE ...]                     spread of the seeds of each run
    python configs/ladder/noise.py TABLE [TABLE ...] --against TABLE     what one more setting changes
    python configs/ladder/noise.py --budgets 3e11 3e12 3e13 --noise 0.1 --targets 3e14 9e14

The last form is arithmetic: the standard deviation of a forecast, in % of the loss, if each vertex of
the ladder has `--noise` % of it, one number for all budgets or one for each [derived: delta method, as for any
least-squares fit]. The noise of the run that is forecast comes on top."""

import argparse
import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scaling  # noqa: E402
from configs.ladder import plan  # noqa: E402
from scaling import need  # noqa: E402


def seed_spread(rows):
    """[(planned FLOPs, width, name without the seed, {seed: loss})] of a table's runs that have several seeds."""
    groups = {}
    for row in rows:
        if row["loss"]:
            name, (words, seed) = re.sub(r"_s\d+$", "", row["config"]), plan.without_seed(row["overrides"])
            key = float(row["planned_flops"]), int(row["width"]), row["base"], words
            groups.setdefault(key, (name, {}))[1][seed] = float(row["loss"])
    return [(*key[:2], name, losses) for key, (name, losses) in sorted(groups.items()) if len(losses) > 1]


def deviation(losses):
    """(standard deviation, its own standard error) in % of the mean."""
    percent = 100 * np.std(losses, ddof=1) / np.mean(losses)
    return percent, percent / math.sqrt(2 * (len(losses) - 1))


def pooled(groups):
    """The standard deviation in % over some groups of seeds, which have different means."""
    freedom = sum(len(losses) - 1 for losses in groups)
    return math.sqrt(sum((len(losses) - 1) * deviation(losses)[0]**2 for losses in groups) / freedom)


def shared(groups):
    """The part in % of that deviation which a seed has in common at different widths, from {seed: loss} of each
    width: the root of their mean covariance. More seeds average it in a vertex, more widths do not."""
    total = freedom = 0
    for a, b in itertools.combinations(groups, 2):
        seeds = sorted(a.keys() & b.keys())
        if len(seeds) > 1:
            off = [[losses[seed] / np.mean([losses[s] for s in seeds]) - 1 for seed in seeds] for losses in (a, b)]
            total, freedom = total + 1e4 * float(np.dot(*off)), freedom + len(seeds) - 1
    return math.sqrt(max(0.0, total / freedom)) if freedom else 0.0


def against(rows, others):
    """[(FLOPs, width, setting, seeds, mean difference of the loss in %)] of runs that have one word more than
    runs with the same seeds."""
    base = {(row["base"], *plan.without_seed(row["overrides"])): float(row["loss"]) for row in rows if row["loss"]}
    found = {}
    for row in others:
        words, seed = plan.without_seed(row["overrides"])
        for word in words:
            key = row["base"], tuple(w for w in words if w != word), seed
            if row["loss"] and key in base:
                group = float(row["planned_flops"]), int(row["width"]), word
                found.setdefault(group, []).append(100 * (float(row["loss"]) / base[key] - 1))
    return [(*group, len(percent), float(np.mean(percent))) for group, percent in sorted(found.items())]


def forecast_deviation(budgets, noise, target, E, alpha, free=True):
    """Standard deviation in % of the loss at a target, forecast from one vertex a budget whose deviation is
    `noise` % of it (a number, or one for each), by a fit of log(L - E) as in scaling.loss_law. The unit of loss
    makes L - E one at 1e12 FLOPs.

    d log(L - E) = da - c d alpha + dE / (L - E) at every budget, with c = log(C / 1e12): least squares give
    (da, d alpha, dE) from the errors of the vertices, and those the error at the target."""
    def columns(C):
        c = np.log(np.asarray(C, float) / 1e12)
        gap = np.exp(-alpha * c)
        return gap, np.stack([np.ones_like(c), -c, 1 / gap], -1)[..., :3 if free else 2]
    gap, J = columns(budgets)
    target_gap, at = columns(target)
    weights = target_gap * at @ np.linalg.pinv(J)
    return float(np.linalg.norm(weights * noise * (E + gap) / gap) / (E + target_gap))


def main(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE")
    parser.add_argument("--against", metavar="TABLE", help="runs with one more setting than those of the tables")
    parser.add_argument("--budgets", type=float, nargs="+", default=[])
    parser.add_argument("--targets", type=float, nargs="+", default=[])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.1], help="%% of the loss, of a vertex (0.1)")
    parser.add_argument("--asymptote", type=float, default=0.82, help="E (%(default)s)")
    parser.add_argument("--gap", type=float, default=2.65, help="L - E at 1e12 FLOPs (%(default)s)")
    parser.add_argument("--alpha", type=float, default=0.103, help="(%(default)s)")
    a = parser.parse_args(words)
    need(a.tables or a.targets and not a.against, "command line", "a table, or --budgets and --targets", "neither",
         "give one")
    need(not a.targets or len(set(a.budgets)) >= 3, "--budgets", "three or more", a.budgets, "add some")
    need(len(a.noise) in (1, len(a.budgets)), "--noise", "one number, or one for each of --budgets", a.noise,
         "correct it")
    if a.against:
        rows = [row for table in a.tables for row in plan.planned_rows(table, "width")]
        for C, width, word, seeds, percent in against(rows, plan.planned_rows(a.against, "width")):
            print(f"{C:.3g}, width {width}, {word}: {percent:+.2f} %, {seeds} seeds")
        return 0
    for table in a.tables:
        groups = seed_spread(plan.planned_rows(table, "width"))
        print(f"{table}\n\n| C | width | runs | seeds | mean loss | deviation, % |\n|---|---|---|---|---|---|")
        for C, width, name, by_seed in groups:
            losses = [*by_seed.values()]
            percent, error = deviation(losses)
            print(f"| {C:.3g} | {width} | {name} | {len(losses)} | {np.mean(losses):.4f} "
                  f"| {percent:.2f} +- {error:.2f} |")
        for C in sorted({group[0] for group in groups}):
            of_C = [losses for budget, _, _, losses in groups if budget == C]
            every = pooled([[*losses.values()] for losses in of_C])
            print(f"{C:.3g}: {every:.2f} % over all its sizes, {shared(of_C):.2f} % shared by the widths of a seed")
    for target in a.targets:
        free, fixed = (forecast_deviation(a.budgets, np.asarray(a.noise), target, a.asymptote / a.gap, a.alpha, way)
                       for way in (True, False))
        print(f"{target:.3g}: {free:.2f} % with E free, {fixed:.2f} % with E fixed")
    return 0


if __name__ == "__main__":
    sys.exit(scaling.guarded("noise.py", lambda: main(sys.argv[1:])))
