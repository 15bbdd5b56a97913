"""Laws of a whole training curve: how the loss follows the learning rate, step by step.

    python scaling.py curves RUN [RUN ...] --hold RUN       fit both laws to some runs, forecast others
    python scaling.py curves RUN [RUN ...] --collapse       E from compute-optimal runs of several sizes
    python scaling.py curves RUN [RUN ...] --gap --ladder runs.csv      training loss beside held-out loss
    python scaling.py curves RUN [RUN ...] --collapse --hold RUN --until 0.3     the end of a run from its first 30 %
    python scaling.py curves RUN [RUN ...] --hold RUN --until 0.3 --ladder runs.csv     its held-out loss at the end
    ... --target 3e14 --register FILE.json                  and locked in a file for `score`

RUN is a run directory, finished or not, or a table of several that `curves RUN ... --out=TABLE.csv` wrote.
Without --collapse or --ladder the runs have one size; schedules may differ. Loss is the mean training loss between
two rows of metrics.jsonl, which is that of unseen text as long as no text is read twice.
    annealing    L = E + A S^-a - C Q       S: sum of the rates; Q: sum of how much they have fallen, each
                 drop fading by 0.999 a step [arXiv 2408.11029]
    multipower   L = E + A S^-a - B sum_k (drop at k) (1 - (1 + c rate_k^-g S_k)^-b)    S_k: the sum of the
                 rates since k [arXiv 2503.12811]
Letters: R rows of a curve."""

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import optimize
from scipy import signal
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scaling  # noqa: E402
from configs.ladder import plan  # noqa: E402
from scaling import need  # noqa: E402
from scaling import number  # noqa: E402

FADE = 0.999            # of a drop of the rate, a step [cited: arXiv 2408.11029]
SKIP = 0.1              # the share of a run that is not fitted: warm-up and the first fall
COLUMNS = ["run", "step", "steps", "rate", "loss"]


@dataclass(frozen=True)
class Curve:
    """A run as its rows say: the rate of each row's step and the mean loss since the row before."""
    run: str
    step_R: np.ndarray
    rate_R: np.ndarray          # of the matrices; zero at the end of most schedules
    loss_R: np.ndarray
    steps: int                  # of the whole run; the last row is earlier if it goes on

    def fitted_R(self):
        """Which rows a law is fitted to."""
        return self.step_R > SKIP * self.steps


def read_curve(folder):
    """The Curve of a run directory of train.py."""
    import train                                        # and with it jax: a table needs neither
    folder = Path(folder)
    config = scaling.read_json(folder / "config.json")
    rows = [row for row in train.read_rows(folder / "metrics.jsonl") if row.get("mean_loss")]
    need(len(rows) >= 8, folder, "at least 8 rows with mean_loss in metrics.jsonl", len(rows),
         "train with a smaller --log_every")
    step_R, rate_R, loss_R = np.array([[row[key] for row in rows] for key in ("step", "lr", "mean_loss")], float)
    return Curve(str(folder), step_R, rate_R, loss_R, config["train"]["steps"])


def read_curves(names):
    """The Curves of run directories and of tables."""
    curves = []
    for name in names:
        if Path(name).is_dir():
            curves.append(read_curve(name))
            continue
        _, rows = scaling.read_table(name, *COLUMNS)
        for run in dict.fromkeys(row["run"] for row in rows):
            own = [[number(row[key], f"{name} {run}", key, -1) for key in COLUMNS[1:]]
                   for row in rows if row["run"] == run]
            step_R, steps_R, rate_R, loss_R = np.array(own).T
            need((np.diff(step_R) > 0).all(), name, f"steps of {run} that rise", "a run twice", "delete the repeat")
            curves.append(Curve(run, step_R, rate_R, loss_R, int(steps_R[0])))
    return curves


def table_rows(run, steps, points):
    """The rows of a table for the curve of a run. points: (step, rate, loss) of each."""
    return [dict(zip(COLUMNS, (run, f"{step:.0f}", steps, f"{rate:.6g}", f"{loss:.5f}")))
            for step, rate, loss in points]


# ----------------------------------------------------------------------------------------- two laws

def last_R(curve, tail=0.05):
    """Which rows are of the last share of the steps that there are: where a curve ends."""
    return curve.step_R > (1 - tail) * curve.step_R[-1]


def final_loss(curve):
    """The mean loss at the end of a curve."""
    return float(curve.loss_R[last_R(curve)].mean())


def middle_R(curve):
    """The step in the middle of each row's steps: there a mean belongs."""
    return (curve.step_R + np.r_[0, curve.step_R[:-1]]) / 2


def rates_of(curve):
    """The rate of every step up to the last row, a line between rows; step 0 has the rate 0."""
    return np.interp(np.arange(1, 1 + curve.step_R[-1]), np.r_[0, curve.step_R], np.r_[0, curve.rate_R])


def annealing_terms(rates, at_R):
    """(S, Q) at some steps: the sum of the rates, and that of their faded drops."""
    drops = np.maximum(0, -np.diff(rates, prepend=rates[0]))
    fallen = np.cumsum(signal.lfilter([1], [1, -FADE], drops))
    at = np.clip(at_R.astype(int), 1, len(rates)) - 1
    return np.cumsum(rates)[at], fallen[at]


def multipower_term(rates, at_R, c, g, b, parts=200):
    """The sum over drops, at some steps. Drops are gathered in `parts` parts of the run."""
    edges = np.unique(np.linspace(0, len(rates), parts + 1).astype(int))
    total = np.r_[0, np.cumsum(rates)]
    drops = np.maximum(0, -np.diff(rates, prepend=rates[0]))
    drop_P = np.add.reduceat(drops, edges[:-1])
    middle_P = (edges[:-1] + edges[1:]) // 2
    rate_P = np.maximum(rates[np.minimum(middle_P, len(rates) - 1)], 1e-6 * rates.max())
    since_RP = np.maximum(0, total[np.clip(at_R.astype(int), 0, len(rates))][:, None] - total[middle_P])
    return ((1 - (1 + c * rate_P**-g * since_RP)**-b) * drop_P).sum(1)


@dataclass(frozen=True)
class CurveLaw:
    """A law with its numbers: weights of (1, S^-a, the term of the drops), and the powers."""
    name: str
    E: float
    A: float
    B: float
    powers: tuple               # a, and for "multipower" c, g, b
    error: float = 0.0          # root mean square of the residuals, nats

    def loss_R(self, rates, at_R):
        """The loss at some steps of a run with these rates."""
        return terms(self.name, self.powers, rates, at_R) @ [self.E, self.A, self.B]

    def __str__(self):
        powers = " ".join(f"{name} {p:.3g}" for name, p in zip("acgb", self.powers))
        return f"{self.name}: E {self.E:.4f}, A {self.A:.4g}, B {self.B:.4g}, {powers}; residual {self.error:.4f}"


def terms(name, powers, rates, at_R):
    """The columns [R,3] whose sum, weighted by (E, A, B), is the loss."""
    S, Q = annealing_terms(rates, at_R)
    drop = Q if name == "annealing" else multipower_term(rates, at_R, *powers[1:])
    return np.stack([np.ones_like(S), S**-powers[0], -drop], 1)


STARTS = {"annealing": [(a,) for a in (0.2, 0.5, 1.0)],
          "multipower": [(a, 1.0, 0.5, b) for a in (0.3, 0.7) for b in (0.3, 0.7)]}
LIMITS = {"annealing": ([0.01], [3]), "multipower": ([0.01, 1e-4, 0.0, 0.01], [3, 1e4, 1.5, 3])}


def fit_curves(curves, name):
    """The CurveLaw of one size through all its curves, by least squares. Given the powers the rest is linear
    and not negative, so that only the powers are searched [as in scaling.variable_projection]."""
    parts = [(rates_of(curve), middle_R(curve)[curve.fitted_R()]) for curve in curves]
    y = np.concatenate([curve.loss_R[curve.fitted_R()] for curve in curves])
    need(len(y) >= 12, curves[0].run, "at least 12 rows to fit", len(y), "lower --log_every")

    def solve(powers):
        x = np.concatenate([terms(name, powers, *part) for part in parts])
        scale = np.abs(x).max(0) + 1e-300
        weights = optimize.nnls(x / scale, y)[0] / scale
        return weights, x @ weights - y
    fits = [optimize.least_squares(lambda powers: solve(powers)[1], start, bounds=LIMITS[name], x_scale=start)
            for start in STARTS[name]]
    best = min(fits, key=lambda fit: fit.cost)
    weights, residual = solve(best.x)
    return CurveLaw(name, *map(float, weights), tuple(best.x), float(np.sqrt(np.mean(residual**2))))


# ----------------------------------------------------------------------------------------- collapse

SHARES = np.linspace(0.05, 0.95, 37)    # of a run's steps


def normalized(curves, E):
    """(L - E) / (final - E) of each curve at SHARES of its steps [arXiv 2507.02119]."""
    return np.array([np.interp(SHARES, middle_R(curve) / curve.steps, curve.loss_R - E) / (final_loss(curve) - E)
                     for curve in curves])


def spread(curves, E):
    """How far normalized curves lie apart: a standard deviation, the mean over the last 70 %."""
    return float(np.std(normalized(curves, E), axis=0)[SHARES > 0.3].mean())


def collapse_E(curves):
    """The E at which the curves lie closest, of 200 below the lowest loss."""
    lowest = min(curve.loss_R.min() for curve in curves)
    return min(np.linspace(0, 0.95 * lowest, 200), key=lambda E: spread(curves, E))


def begun_R(curve, until):
    """Which rows are of the second half of the first share `until` of the run."""
    share_R = middle_R(curve) / curve.steps
    known_R = (share_R > until / 2) & (share_R <= until)
    need(known_R.sum() >= 3, curve.run, f"3 rows between {until / 2:.0%} and {until:.0%} of its steps",
         int(known_R.sum()), "let it go on, or take a larger --until")
    return known_R


def end_of(curve, curves, E, until):
    """The final loss of a curve from its first share `until`, if it collapses onto the others. Of what is known
    the last half counts."""
    shape = normalized(curves, E).mean(0)
    known_R, share_R = begun_R(curve, until), middle_R(curve) / curve.steps
    return float(E + np.mean((curve.loss_R[known_R] - E) / np.interp(share_R[known_R], SHARES, shape)))


# -------------------------------------------------------------------- a held-out loss while a run goes on

def rows_of(curves, tables):
    """The row of each curve's run in the ladder's tables, which has its held-out loss."""
    rows = {}
    for table in tables:
        for row in scaling.read_table(table, "config", "base", "overrides", "planned_flops", "width", "loss")[1]:
            folder = plan.run_dir_of(row["overrides"])
            need(folder not in rows or not row["loss"], table, "each --run_dir once", folder, "leave a table out")
            rows |= {folder: row} if row["loss"] else {}
    missing = [curve.run for curve in curves if curve.run not in rows]
    need(not missing, ", ".join(tables), "a row with a loss for every run", f"none for {', '.join(missing)}",
         "name the runs as their --run_dir does, from the checkout")
    return [rows[curve.run] for curve in curves]


def heldout_end(curve, curves, losses, until):
    """The held-out loss at the end of a curve, from its first share `until`. losses: of the others, held out.

    Logarithms of the two lie near a line [measured: third/hero_curves.csv from third/curves.csv, 1.7 % too high from
    the first 30 %, 2.5 % from 10]; a collapse, whose shape does not change with the size, is 3.4 and 16 % too low."""
    begun, *others = [math.log(c.loss_R[begun_R(c, until)].mean()) for c in (curve, *curves)]
    slope, level = np.polyfit(others, np.log(losses), 1)
    return math.exp(level + slope * begun)


def error_of(curves, losses, budgets, until):
    """The standard deviation of log(loss / forecast): each budget is forecast from the others, and counts once.
    nan if there are less than three."""
    if len({*budgets}) < 3:
        return math.nan
    squares = []
    for budget in dict.fromkeys(budgets):
        others, theirs = zip(*[(c, x) for c, x, b in zip(curves, losses, budgets) if b != budget])
        squares.append(np.mean([math.log(loss / heldout_end(curve, others, theirs, until))**2
                                for curve, loss, b in zip(curves, losses, budgets) if b == budget]))
    return math.sqrt(np.mean(squares))


def stage(a, curve, curves):
    """Forecast a run's held-out loss from its beginning; print it, and with --register lock it in a file."""
    rows = rows_of(curves, a.ladder)
    losses = [number(row["loss"], row["config"], "loss") for row in rows]
    budgets = [number(row["planned_flops"], row["config"], "planned_flops") for row in rows]
    share = a.until if curve.step_R[-1] >= a.until * curve.steps else curve.step_R[-1] / curve.steps
    error, loss = error_of(curves, losses, budgets, share), heldout_end(curve, curves, losses, share)
    half = stats.t.ppf(0.975, max(1, len({*budgets}) - 1)) * error      # cautious: of so few, one degree less
    ends = [loss * math.exp(sign * half) for sign in (-1, 1)]
    print(f"  {curve.run}: {loss:.4f} held out ({ends[0]:.4f} to {ends[1]:.4f}), from its first {share:.1%}; "
          f"each budget from the others: {100 * error:.2f} % off")
    if a.register:
        need(a.target, "--target", "the FLOPs of the held run", "none", "give them")
        need(error > 0, "--ladder", "runs of three budgets or more", len({*budgets}), "name more")
        same = {(row["eval"], row["bytes_per_token"]) for row in rows}
        need(len(same) == 1, ", ".join(a.ladder), "one eval definition", sorted(same),
             "take runs that were scored alike")
        forecast = dict(C=a.target, loss=loss, intervals={"each budget from the others, 95 %": ends}, outcomes=[])
        scaling.write_record(a.register, dict(
            forecast=forecast, target=dict(C=a.target, run=curve.run), unit="nats", eval=rows[0]["eval"],
            choices=dict(head=a.count_head), failure="outside the interval, or off by 1 % or more",
            known_differences=a.difference,
            form=f"a line between the logarithms of known and held-out loss, first {share:.4f}",
            curve=[curve.step_R, curve.loss_R],
            bytes_per_token=number(rows[0]["bytes_per_token"], a.ladder[0], "bytes_per_token"),
            runs=[*a.ladder, *a.runs]))


def tell_gap(curves, tables):
    """Print, for each kind of run, the end of the training loss and the held-out loss in the same shares of domains.

    A gap, where no text was read before, tells that training text repeats itself (`corpus.py --repeats`)."""
    kinds = {}
    for curve, row in zip(curves, rows_of(curves, tables)):
        _, t = plan.load(row["base"], {}, shlex.split(row["overrides"]))
        need(isinstance(t.mixture, tuple), row["base"], "a mixture of several domains", t.mixture, "name another run")
        names, shares = zip(*t.mixture)
        held = np.average([number(row.get(f"loss_{Path(name).parent.name}"), row["config"]) for name in names],
                          weights=shares)
        kind = number(row["planned_flops"], row["config"]), int(number(row["width"], row["config"])), row["base"]
        kinds.setdefault(kind, []).append((final_loss(curve), held))
    for (C, width, base), losses in sorted(kinds.items()):
        train, held = np.mean(losses, axis=0)
        print(f"{Path(base).stem}, {C:.3g}, width {width}, {len(losses)} seeds: training {train:.3f}, "
              f"held out {held:.3f}, gap {held - train:.3f}")


# ------------------------------------------------------------------------------------- command line

def tell(curve, forecast):
    """Print a forecast of a curve's end, and what came if the run is over."""
    line = f"  {curve.run}: forecast {forecast:.4f}"
    if curve.step_R[-1] == curve.steps:
        observed = final_loss(curve)
        line += f", observed {observed:.4f}, {100 * (observed / forecast - 1):+.2f} %"
    print(line)


def chosen(a):
    """(curves, held) that the options name, if the options go together."""
    do = "see the head of curves.py"
    need(not a.register or a.ladder and len(a.hold) == 1 and not a.gap, "--register", "--ladder and one --hold",
         "something else", do)
    need(not a.ladder or (a.gap or a.hold) and not a.collapse, "--ladder", "--gap, or --hold", "something else", do)
    need(not a.gap or a.ladder, "--gap", "--ladder", "none", do)
    need(a.asymptote is None or a.collapse, "--asymptote", "--collapse", "none", do)
    curves, held = read_curves(a.runs), read_curves(a.hold)
    need(curves, a.runs[0], "a curve", "none", "name a table with rows")
    names = [curve.run for curve in curves + held]
    need(len({*names}) == len(names), a.runs[0], "each run once", f"{len(names)} curves of {len({*names})}", "drop one")
    unfinished = [curve.run for curve in curves if curve.step_R[-1] < curve.steps]
    need(a.out or not unfinished, a.runs[0], "runs that have ended", unfinished, "name those that go on by --hold")
    return curves, held


def curves_command(a):
    curves, held = chosen(a)
    if a.out:
        rows = [row for curve in curves + held
                for row in table_rows(curve.run, curve.steps, zip(curve.step_R, curve.rate_R, curve.loss_R))]
        scaling.write_new(a.out, scaling.csv_text(COLUMNS, rows))
        return
    if a.gap:
        tell_gap(curves, a.ladder)
        return
    if a.collapse:
        need(len(curves) >= 2, "--collapse", "two runs or more", len(curves), "name more")
        best, lowest = collapse_E(curves) if a.asymptote is None else a.asymptote, min(map(final_loss, curves))
        need(best < lowest, "--asymptote", f"below the lowest final loss, {lowest:.4f}", best, "lower it")
        for E in (0.0, best):
            print(f"E = {E:.3f}: normalized curves lie {100 * spread(curves, E):.2f} % apart")
        for curve in held:
            tell(curve, end_of(curve, curves, best, a.until))
        return
    if a.ladder:
        for curve in held:
            stage(a, curve, curves)
        return
    for curve in held:
        need(curve.step_R[-1] == curve.steps, curve.run, "a run that has ended, whose rates are all known",
             "one that goes on", "forecast it by --ladder")
    for name in STARTS:
        law = fit_curves(curves, name)
        print(law)
        for curve in held:
            tell(curve, float(law.loss_R(rates_of(curve), middle_R(curve)[last_R(curve)]).mean()))


def add_commands(command):
    """Add `curves` to the commands of scaling.py."""
    add = command("curves", curves_command, "laws of whole training curves, and E from their collapse")
    add("runs", nargs="+", metavar="RUN", help="run directories of one size, or a table of curves")
    add("--hold", nargs="+", default=[], metavar="RUN", help="forecast these")
    add("--collapse", action="store_true", help="E from compute-optimal runs of several sizes")
    add("--gap", action="store_true", help="with --ladder: how far held-out loss is above training loss")
    add("--asymptote", type=scaling.asymptote, metavar="E", help="with --collapse, instead of the best")
    add("--until", type=scaling.number, default=0.3, metavar="SHARE", help="of a held run that is known (%(default)s)")
    add("--ladder", nargs="+", metavar="TABLE", help="with --hold: the runs' tables, for the end of the held one")
    add("--difference", action="append", default=[], help="known difference, for the record; repeatable")
    add("--register", metavar="FILE", help="with --ladder: lock that forecast in a new file")
    add("--target", type=scaling.number, metavar="C", help="with --register: FLOPs of the held run")
    add("--count-head", action="store_true", help="with --register: C counts the output head")
    add("--out", metavar="TABLE.csv", help="the curves as a new table")


if __name__ == "__main__":
    sys.exit(scaling.main(["curves", *sys.argv[1:]]))
