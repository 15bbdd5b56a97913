"""The pictures and tables of this folder, from its committed tables.

    python configs/ladder/figures.py                    draws ladder.png and rungs.png
    python configs/ladder/figures.py configs/ladder/third       the third ladder's ladder.png
    python configs/ladder/figures.py --markdown         prints the tables that README.md pastes
    python scaling.py fit TABLE --plot FILE             the picture of any fit

An outcome is drawn against the forecast that was registered for it, never against a later one."""

import contextlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scaling  # noqa: E402
from configs.ladder import curves  # noqa: E402
from configs.ladder.speedup import speedup  # noqa: E402

LADDER = Path(__file__).resolve().parent
BLUE, RED, GRAY = "#1f5fa8", "#d62728", "0.45"          # fitted or forecast, observed later, published
# Compute and wall-clock gain over the rung before, in Marin's stack at 1e18 FLOPs and more [cited:
# openathena.ai/blog/pretraining-speedup]. The last is partial key offset 1.2 x renormalized combine 1.04.
PUBLISHED = {"c_moe_v1": (6.7, 3.6), "d_more_experts": (1.4, 1.3), "e_muonh": (1.3, 1.25),
             "f_attention": (1.25, 1.25)}
NAMES = {"a_dense_adamw": "dense, AdamW, tuned rate", "b_dense_adamh": "dense, AdamH",
         "c_moe_v1": "MoE V1: 16 experts, quantile balancing", "d_more_experts": "64 experts",
         "e_muonh": "MuonH", "f_attention": "V2's attention"}


# ----------------------------------------------------------------------------------------- the tables

def forecasts(folder=LADDER):
    """dict(name, C, law, form, forecast, interval, outcomes) of every registered record, the first ones first.

    law: None for a forecast from a run's own beginning. interval: the run bootstrap's, or that record's only one.
    outcomes: (loss, error in %) of every run that was scored with the record."""
    found = []
    for path in (folder / "hero").glob("*.json"):
        record, outcomes = scaling.read_json(path), []
        with contextlib.suppress(FileNotFoundError):
            lines = path.with_suffix(".outcomes.jsonl").read_text().splitlines()
            outcomes = [(scored["loss"], scored["error_percent"]) for scored in map(json.loads, lines)
                        if scored["record"] == record["sha256"]]
        law, intervals = record.get("envelope"), record["forecast"]["intervals"]
        if law:
            law = scaling.Law(*(law[key] for key in ("E", "A", "alpha")))
        found.append(dict(name=path.stem, C=record["target"]["C"], law=law, date=record["date"],
                          form=f"$E$ = {law.E:.2f}" if law else "curve, first {:.0%}".format(
                              float(record["form"].split()[-1])),
                          forecast=record["forecast"]["loss"], outcomes=outcomes,
                          interval=intervals.get("run_bootstrap", [*intervals.values()][0]) or (math.nan, math.nan)))
    return sorted(found, key=lambda record: (record["C"], record["date"]))


def ladder_fit(folder=LADDER, draws=400):
    """The analysis of a ladder's runs with E free, as scaling.analyse gives it."""
    tables = [path for path in (folder / "isoflop" / "runs.csv", folder / "runs.csv") if path.is_file()]
    scaling.need(tables, folder, "isoflop/runs.csv or runs.csv", "none", "name the folder of a ladder")
    runs = scaling.read_csv(tables[0], head=True)
    targets = [record["C"] for record in forecasts(folder)] or [1e14]
    return scaling.analyse(runs, scaling.FitConfig(head=True), sorted(set(targets)),
                           source=str(tables[0]), draws=draws)


def rung_tables(folder=LADDER):
    """The tables of rungs in a ladder's folder: in the second ladder's shapes, and in the third's."""
    paths = [path for path in (folder / "rung_runs" / "runs.csv", folder / "third" / "rungs.csv") if path.is_file()]
    return [path for path in paths if any(row["loss"] for row in scaling.read_table(path, "loss")[1])]


def rung_points(table):
    """{rung: [(budget asked for, (C, loss, FLOPs per second or nan))]} of a table of rungs.

    The rate is FLOPs per second from speed.csv beside it, measured apart on a quiet machine: at equal C a
    run takes C over it, whatever its width."""
    speeds = table.parent / "speed.csv"
    times = scaling.read_table(speeds)[1] if speeds.is_file() else []
    rate, points = {row["config"]: float(row["flops_per_second"]) for row in times}, {}
    for run in scaling.read_csv(table, head=True):
        name = run.extra["config"]
        parts = re.fullmatch(r"(.+)_c([\d.e]+)_d\d+(?:_s\d+)?", name)
        scaling.need(parts, table, "names such as c_moe_v1_c3e12_d64", name, "rename the row")
        rung, budget = parts.groups()
        speed = rate.get(re.sub(r"_s\d+$", "", name), math.nan)
        points.setdefault(rung, []).append((float(budget), (run.flops, run.loss, speed)))
    return {rung: points[rung] for rung in sorted(points)}


def rung_law(tables):
    """The law of the first rung's losses in all tables of rung_points, E free: the compute it needs to reach a loss."""
    first = [point for points in tables for point in next(iter(points.values()))]
    by_budget = {C: [point for at, point in first if at == C] for C, _ in first}
    means = [np.mean([point[:2] for point in points], axis=0) for points in by_budget.values()]
    return scaling.loss_law(*np.transpose(means), where="the first rung")


def rung_table(points, law):
    """{rung: {budget: dict(loss)}} of what rung_points gave: the mean over seeds, and what `speedup` gives over
    the first rung at equal loss. Intervals are those of the noise that the seeds of all rungs have at a budget, or
    where that is not known of the two rungs' own seeds."""
    base, table = points[next(iter(points))], {}
    for rung in points:
        table[rung] = {}
        for budget in sorted({C for C, _ in points[rung]} & {C for C, _ in base}):
            sides = [[point for C, point in side if C == budget] for side in (base, points[rung])]
            table[rung][budget] = dict(loss=float(np.mean([loss for _, loss, _ in sides[1]])),
                                       **speedup(*sides, law.E, law.alpha, *seed_noise(points, budget)))
    return table


def seed_noise(points, budget):
    """(standard deviation of the loss between a rung's seeds at a budget, its degrees of freedom); zeros where
    fewer than five are left."""
    groups = [[loss for C, (_, loss, _) in side if C == budget] for side in points.values()]
    spare = sum(len(losses) - 1 for losses in groups if losses)
    squares = sum(len(losses) * np.var(losses) for losses in groups if losses)
    return (math.sqrt(squares / spare), spare) if spare >= 5 else (0.0, 0)


def rung_results(folder=LADDER):
    """(the law by which rungs are compared, {table: what rung_table gives})."""
    points = {path: rung_points(path) for path in rung_tables(folder)}
    law = rung_law(points.values())
    return law, {path: rung_table(found, law) for path, found in points.items()}


def published_gains(rungs):
    """{rung: Marin's (compute, wall clock) gain over the first one} of those that have one."""
    gains = np.cumprod([PUBLISHED.get(rung, (1, 1)) for rung in rungs], axis=0)
    return {rung: gain for rung, gain in zip(rungs, gains) if rung in PUBLISHED}


def registered_law(folder=LADDER):
    """The law by which the gate compares: the last record's, or the ladder's own fit without records."""
    laws = [record["law"] for record in forecasts(folder) if record["law"]]
    return laws[-1] if laws else ladder_fit(folder, draws=1)["fit"].law


# (label, rung, FLOPs, width or 0, what varies, what is fixed) of the pilot's table
PILOT = (("MoE V1, both rates x", "c_moe_v1", 2e11, 24, "both", {}),
         ("dense by AdamH, both rates x", "b_dense_adamh", 2e11, 24, "both", {}),
         ("dense by AdamW, rate x", "a_dense_adamw", 2e11, 24, "both", {}),
         ("dense by AdamW, rate x", "a_dense_adamw", 1.6e12, 48, "both", {}),
         ("MoE V1, sequences a batch (rates x 4)", "c_moe_v1", 2e11, 24, "batch_size", {"both": "4"}),
         ("MoE V1, beta2 (rates x 4)", "c_moe_v1", 2e11, 24, "beta2", {"both": "4"}),
         ("MoE V1, width (rates x 4)", "c_moe_v1", 2e11, 0, "width", {"both": "4"}),
         ("dense by AdamW, width (rate x 8)", "a_dense_adamw", 2e11, 0, "width", {"both": "8"}),
         ("MoE V1, Adam/matrices x", "c_moe_v1", 2e11, 24, "pair", {}),
         ("MoE V1, Adam/matrices x", "c_moe_v1", 1.6e12, 48, "pair", {}),
         ("MoE V1, beta2 (8/1)", "c_moe_v1", 1.6e12, 48, "beta2", {"pair": "8/1"}),
         ("MoE V1, width (8/1)", "c_moe_v1", 1.6e12, 0, "width", {"pair": "8/1"}),
         ("MoE V1, width 96, Adam/matrices x", "c_moe_v1", 6.7e12, 96, "pair", {}),
         ("dense by AdamH, Adam/matrices x", "b_dense_adamh", 1.6e12, 48, "pair", {}),
         ("MuonH, 64 experts, Adam/matrices x", "e_muonh", 2e11, 24, "pair", {}),
         ("MuonH, 64 experts, Adam/matrices x", "e_muonh", 1.6e12, 48, "pair", {}))


def pilot_table(folder=LADDER):
    """[(label, FLOPs, {value: loss})] of pilot.csv: one line for each thing that was varied alone."""
    _, rows = scaling.read_table(folder / "pilot.csv")
    for row in rows:
        row["beta2"] = row["command"].partition("--beta2=")[2].split(" ")[0] or "0.9999"
        row["pair"] = "/".join(re.findall(r"(?:adam|hyper) x([\d.]+)", row["what"]))
        row["both"] = "" if row["pair"] else f"{float(row['rate_scale']):g}"
    table = []
    for label, rung, C, width, key, fixed in PILOT:
        fixed = {"batch_size": "16", "beta2": "0.9999", "width": str(width)} | fixed
        fixed.pop(key, None)
        found = {row[key]: float(row["loss"]) for row in rows if row[key]
                 and Path(row["config"]).stem == rung and abs(float(row["flops"]) / C - 1) < 0.01
                 and all(row[name] == value for name, value in fixed.items())}
        order = sorted(found, key=lambda value: [float(part) for part in value.split("/")])
        table.append((label, C, {value: found[value] for value in order}))
    return table


# ----------------------------------------------------------------------------------------- as markdown

def markdown(columns, rows):
    """A table in markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def rung_cell(found):
    """A rung's loss at a budget, and its speed-ups in compute and wall clock as far as they were measured."""
    if not found:
        return ""
    gains = [f"{found[key]:.2f}" for key in ("compute", "wall_clock") if found[key]]
    return ", ".join([f"{found['loss']:.3f}", *gains])


def print_rungs(law, tables):
    """One table of all rungs: first the second ladder's shapes, then, with a star, the third's."""
    columns = [(table, C, star) for table, star in zip(tables.values(), ("", "*"))
               for C in sorted({C for by_budget in table.values() for C in by_budget})]
    rungs = [*next(iter(tables.values()))]
    theirs = published_gains(rungs)
    print(f"Rungs: loss, speed-up over the first in compute and wall clock at equal loss, by {law}\n")
    print(markdown(["rung", *(f"{C:.1e}".replace("+", "").replace(".0e", "e") + star for _, C, star in columns),
                    "published"],
                   [(NAMES.get(rung, rung), *(rung_cell(table.get(rung, {}).get(C)) for table, C, _ in columns),
                     "{:.1f}, {:.1f}".format(*theirs[rung]) if rung in theirs else "") for rung in rungs]))
    for path, table in tables.items():
        C = max(table[next(iter(table))])
        for rung, by_budget in table.items():
            if ends := by_budget.get(C, {}).get("compute_interval"):
                print("{}, {:.1e}: {} {:.2f} ({:.2f} to {:.2f}, 90 %)".format(
                    path.parent.name, C, NAMES.get(rung, rung), by_budget[C]["compute"], *ends))


def print_law(optima, records):
    """The law of the optima, E free, and that of the optima and what was observed at larger C; distances from both."""
    runs = {(r["C"], loss) for r in records for loss, _ in r["outcomes"]}       # each once
    seen = [(C, float(np.mean([loss for at, loss in runs if at == C]))) for C in sorted({C for C, _ in runs})]
    last = max([optima[-1][0], *(r["C"] for r in records)])
    for name, points in (("Optima", optima), ("With what was observed", optima + seen)):
        C, L = np.transpose(points)
        law = scaling.loss_law(C, L)
        off = ", ".join(f"{percent:+.2f}" for percent in 100 * (L / law.loss(C) - 1))
        print(f"{name}: {law}, off by {off} %; {law.loss(last):.4f} at {last:.3g}\n")


def print_markdown(folder=LADDER):
    """Every table of README.md. Only the folder of the rungs has a pilot and rungs."""
    rungs = rung_tables(folder)
    if rungs:
        print("Pilot: loss by what was varied\n")
        print(markdown(["what", "FLOPs", "value: loss"], [
            (label, f"{C:.2g}".replace("+", ""), ", ".join(f"{value}: {loss:.3f}" for value, loss in found.items()))
            for label, C, found in pilot_table(folder)]))
    fit, records = ladder_fit(folder, draws=1), forecasts(folder)
    print("Ladder: the optimum of each budget\n")
    print(markdown(["C", "runs", "D*", "N*", "loss*"], [
        (f"{v.budget:.2g}", str(v.runs), f"{v.tokens:.2e}", f"{v.params:.2e}", f"{v.loss:.3f}")
        for v in fit["fit"].optima]))
    print("D* grows as C^{exponent:.3f} ({low:.3f} to {high:.3f}).\n".format(**fit["D_star"]))
    print_law([(v.budget, v.loss) for v in fit["fit"].optima], records)

    print("Forecasts: registered, observed\n")
    rows = []
    for r in records:
        low, high = r["interval"]
        for loss, error in r["outcomes"] or [(math.nan, math.nan)]:
            inside = "inside" if low <= loss <= high else "outside"
            outcome = [f"{loss:.4f}", f"{error:+.2f} %, {inside}"] if loss > 0 else ["", ""]
            rows.append((f"`{r['name']}`", f"{r['C']:.1e}".replace("+", ""), r["form"].replace("$", ""),
                         f"{r['forecast']:.4f}", f"{low:.4f} to {high:.4f}", *outcome))
    print(markdown(["record", "C", "law", "forecast", "95 %", "observed", "error"], rows))
    if rungs:
        print_rungs(*rung_results(folder))


# ----------------------------------------------------------------------------------------- the pictures

@contextlib.contextmanager
def figure(rows, columns, size, path):
    """A grid of axes, saved to path (its ending chooses the format) when the block is done."""
    ending = Path(path).suffix
    scaling.need(ending in (".png", ".pdf", ".svg"), path, "a picture ending in .png, .pdf or .svg",
                 ending or "none", "rename it")
    plt = scaling.pyplot()
    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "legend.fontsize": 7, "legend.title_fontsize": 7}
    with plt.rc_context(look):
        fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        yield np.ravel(axes)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=110)
        plt.close(fig)
    print(f"saved {path}")


def scientific(C):
    """3e+18 as a figure writes it."""
    digits, power = f"{C:.2e}".split("e")
    times = "" if float(digits) == 1 else rf"{float(digits):g}\times"
    return rf"${times}10^{{{int(power)}}}$"


def budget_color(i, budgets):
    """From blue for the smallest budget to green for the largest."""
    shade = 0.1 + 0.8 * i / max(1, budgets - 1)
    return 0.15, 0.75 * shade, 1 - 0.75 * shade


def draw_isoflop(ax, r):
    """Every run of the ladder, the curve through each budget, its optimum, and what was excluded."""
    axis, fit = r["config"].axis, r["fit"]
    for i, v in enumerate(fit.optima):
        x, y = scaling.columns_of([run for run in r["ladder"] if run.budget == v.budget], axis, "loss")
        color = budget_color(i, len(fit.optima))
        ax.plot(x, y, "o", ms=3, color=color)
        ax.plot(getattr(v, axis), v.loss, "*", ms=9, color=color, mec="k", mew=0.5)
        ax.annotate(scientific(v.budget), max(zip(x, y)), (5, 4 if i % 2 else -4), va="center", fontsize=7,
                    color=color, textcoords="offset points")        # up and down, so that neighbors part
        if fit.curves:
            z = np.linspace(np.log10(x.min()), np.log10(x.max()), 100)
            ax.plot(10**z, fit.curves[i](z), lw=1, color=color)
    if excluded := [run for run in r["runs"] if run.kind == "excluded"]:
        ax.plot(*scaling.columns_of(excluded, axis, "loss"), "o", ms=3, mfc="none", color="0.7",
                label="excluded from the fit")
        ax.legend()
    ax.set(xscale="log", ylabel=f"macro loss ({scaling.UNITS[r['unit']]})",
           title="isoFLOP curves, $C$ in FLOPs (stars: optima)",
           xlabel="training tokens $D$" if axis == "tokens" else "active parameters $N$")
    ax.margins(x=0.16)
    ax.set_visible(bool(np.isfinite([getattr(v, axis) for v in fit.optima]).any()))


def draw_law(ax, r, as_error=False):
    """A fit through its optima, its forecasts and, in red, what was observed; as losses, or in % of the
    fit, where the intervals can be seen."""
    law = r["fit"].law
    C, L = scaling.columns_of(r["fit"].optima, "budget", "loss")
    grid = np.geomspace(C.min() / 1.5, 1.5 * max(C.max(), *(f["C"] for f in r["forecasts"])), 80)

    def height(c, y):
        return 100 * (y / law.loss(c) - 1) if as_error else y

    ax.plot(grid, height(grid, law.loss(grid)), color=BLUE, lw=1.3, label="fit")
    ax.plot(C, height(C, L), "o", ms=4, color=BLUE, label="optima (fitted)")
    for i, f in enumerate(r["forecasts"]):
        if f["intervals"]["run_bootstrap"]:
            low, high = height(f["C"], np.array(f["intervals"]["run_bootstrap"]))
            ax.errorbar(f["C"], (low + high) / 2, (high - low) / 2, fmt="none", color=BLUE, capsize=3,
                        label="" if i else "forecast, 95 % run bootstrap")
        for j, outcome in enumerate(f["outcomes"]):
            ax.plot(f["C"], height(f["C"], outcome["loss"]), "*", ms=9, color=RED,
                    label="" if i or j else "observed (not fitted)")
    ax.set(xscale="log", xlabel="training compute $C$ (FLOPs)")
    if as_error:
        ax.set(ylabel="distance from the fit (%)", title="the same, as an error")
    else:
        ax.set(ylabel=f"macro loss ({scaling.UNITS[r['unit']]})", title="compute-optimal loss")
        ax.legend()


def draw_profile(ax, r, marks=()):
    """The last forecast as a function of the assumed E; marks: (E, loss, label) of registered ones."""
    last = r["forecasts"][-1]
    ax.plot([row["E"] for row in r["profile"]], [row["losses"][-1] for row in r["profile"]], color=BLUE)
    if allowed := [row["E"] for row in r["profile"] if row["allowed"]]:
        ax.axvspan(allowed[0], allowed[-1], color=BLUE, alpha=0.12, lw=0,
                   label="$E$ that the optima allow (95 %)")
        ax.set_xlim(max(0, allowed[0] - 0.3), allowed[-1] + 0.3)
        inside = [row["losses"][-1] for row in r["profile"] if row["E"] <= allowed[-1] + 0.3
                  and row["E"] >= allowed[0] - 0.3]
        ax.set_ylim(min(inside) - 0.02, max(inside) + 0.02)
    for E, loss, label in marks or [(r["fit"].law.E, last["loss"], f"{last['loss']:.4f} forecast")]:
        ax.plot(E, loss, "s", color=BLUE, mfc="w", label=label)
    for outcome in last["outcomes"][:1]:
        ax.axhline(outcome["loss"], color=RED, lw=1.2, label=f"{outcome['loss']:.4f} observed")
    ax.set(xlabel=f"assumed $E$ ({scaling.UNITS[r['unit']]})", title="what the irreducible loss decides",
           ylabel=f"macro loss at $C$ = {scientific(last['C'])} FLOPs")
    ax.legend()
    ax.set_visible(bool(r["profile"]))                  # a surface has no profile


def draw_fit(r, path):
    """What `scaling.py fit --plot` draws: curves; law; distance from it; forecast by the assumed E."""
    with figure(2, 2, (9, 7), path) as (curves, whole, zoom, profile):
        draw_isoflop(curves, r)
        draw_law(whole, r)
        draw_law(zoom, r, as_error=True)
        draw_profile(profile, r)


def draw_registered(ax, records, optima):
    """The registered laws, each forecast by one, and what was observed. records: those with a law."""
    C = np.array([v.budget for v in optima])
    ax.plot(C, [v.loss for v in optima], "o", ms=4, color=BLUE, label="optima (fitted)")
    last, laws = max(record["C"] for record in records), [record["law"] for record in records]
    for style, E in zip(("-", "--", ":"), dict.fromkeys(law.E for law in laws)):
        law = next(law for law in laws if law.E == E)
        grid = np.geomspace(C.min() / 1.5, 1.5 * last, 80)
        ax.plot(grid, law.loss(grid), style, color=BLUE, lw=1.2, label=f"registered with $E$ = {E:.2f}")
    for i, record in enumerate(records):
        ax.plot(record["C"], record["forecast"], "s", ms=5, color=BLUE, mfc="w",
                label="" if i else "forecast")
        for j, (loss, _) in enumerate(record["outcomes"]):
            ax.plot(record["C"], loss, "*", ms=9, color=RED, label="" if i or j else "observed")
    ax.set(xscale="log", xlabel="training compute $C$ (FLOPs)", ylabel="macro loss (nats per token)",
           title="the registered laws")
    ax.legend()


def draw_errors(ax, records):
    """Each outcome against its own registered forecast, whose interval is the bar."""
    at = range(len(records))
    for i, record in zip(at, records):
        low, high = (100 * (end / record["forecast"] - 1) for end in record["interval"])
        ax.errorbar(i, (low + high) / 2, (high - low) / 2, fmt="none", color=BLUE, capsize=4,
                    label="" if i else "95 %")
        for j, (_, error) in enumerate(record["outcomes"]):
            ax.plot(i, error, "*", ms=10, color=RED, label="" if i or j else "observed")
            ax.annotate(f"{error:+.2f} %", (i, error), (8, 0), fontsize=8, va="center", textcoords="offset points")
    ax.axhline(0, color=BLUE, lw=1.2, label="registered forecast")
    ax.set_xticks(at, [record["name"].removeprefix("forecast_").replace("_", "\n")
                       + f"\n{record['form']}" for record in records], fontsize=7)
    ax.set(ylabel="distance from its forecast (%)", title="each outcome against its own forecast, made before the run")
    ax.set_xlim(-0.5, len(records) - 0.2)
    ax.set_ylim(top=1.3 * ax.get_ylim()[1])             # room for the legend
    ax.legend(loc="upper center", ncols=3)


def draw_collapse(ax, tables):
    """The training curves of runs near the optimum, a color a budget: (L - E) / (end - E)."""
    found = [curve for curve in curves.read_curves(tables) if curve.step_R[-1] == curve.steps]
    E, by_budget = curves.collapse_E(found), {}
    for curve in found:
        by_budget.setdefault(float(re.search(r"_c([\de.]+)_d", curve.run)[1]), []).append(curve)
    for i, budget in enumerate(sorted(by_budget)):
        for j, curve in enumerate(by_budget[budget]):
            fitted_R = curve.fitted_R()
            y = (curve.loss_R - E) / (curves.final_loss(curve) - E)
            ax.plot((curves.middle_R(curve) / curve.steps)[fitted_R], y[fitted_R], lw=0.6,
                    color=budget_color(i, len(by_budget)), label="" if j else scientific(budget))
    ax.set(xlabel="share of the run", ylabel="(loss - $E$) / (its end - $E$)",
           title=f"training losses lie closest at $E$ = {E:.2f}: {100 * curves.spread(found, E):.1f} %")
    ax.legend(title="$C$ (FLOPs)")


def draw_ladder(folder=LADDER, draws=400):
    """ladder.png: the isoFLOP curves, the registered laws, each error, and the collapse or what E decides."""
    by_law = [record for record in forecasts(folder) if record["law"]]
    r = ladder_fit(folder, 1 if by_law else draws)      # records bring their own intervals
    if not by_law:
        draw_fit(r, folder / "ladder.png")
        return
    last = [record for record in by_law if record["C"] == r["forecasts"][-1]["C"]]
    with figure(2, 2, (9, 7), folder / "ladder.png") as (isoflop, laws, errors, profile):
        draw_isoflop(isoflop, r)
        draw_registered(laws, by_law, r["fit"].optima)
        draw_errors(errors, by_law)                     # those from a run's own beginning are far off
        if tables := sorted(folder.glob("*curves.csv")):
            draw_collapse(profile, tables)
            return
        draw_profile(profile, r, [(record["law"].E, record["forecast"],
                                   f"{record['name']}: {record['forecast']:.4f}") for record in last])
        for loss, _ in last[0]["outcomes"]:
            profile.axhline(loss, color=RED, lw=1.2, label=f"{loss:.4f} observed")
        profile.legend()


def draw_rungs(tables, path):
    """Speed-up over the first rung at equal loss against compute, a line a rung; squares: Marin's, at 1e18 FLOPs.

    The second ladder's shapes are dotted: at them the last rung has no layer that sees the whole sequence."""
    rungs = [*next(iter(tables.values()))]
    theirs, names = published_gains(rungs), [rung[2:].replace("_", " ") for rung in rungs]
    with figure(1, 2, (9, 3.8), path) as axes:
        for ax, key, k in zip(axes, ("compute", "wall_clock"), (0, 1)):
            for i, rung in enumerate(rungs[1:], 1):
                color = ("0.5", "C0", "C1", "C2", "C3")[(i - 1) % 5]
                for table, style in zip(tables.values(), ("-",) if len(tables) == 1 else (":", "-")):
                    draw_gains(ax, table.get(rung, {}), key, 1.05**(i - 3), style, color, names[i])
                if rung in theirs:
                    ax.plot(1e18, theirs[rung][k], "s", color=color, ms=5, mfc="w")
            ax.axhline(1, color="k", lw=0.6)
            ax.set(xscale="log", yscale="log", xlabel="training compute $C$ (FLOPs); squares: published",
                   title=f"{key.replace('_', '-')} speed-up over {names[0]}")
            ax.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", *"1248", "16"])
            ax.minorticks_off()
        axes[0].legend()


def draw_gains(ax, by_budget, key, shift, style, color, name):
    """One rung's speed-ups with their 90 % intervals; shift: a factor of C that keeps the bars of rungs apart."""
    gains = {C: gain for C, gain in by_budget.items() if gain[key]}
    if not gains:
        return
    C, y = shift * np.array([*gains], float), np.array([gain[key] for gain in gains.values()])
    ends = np.array([gain[f"{key}_interval"] or (gain[key],) * 2 for gain in gains.values()])
    solid = style == "-"
    ax.errorbar(C, y, np.abs(ends.T - y), fmt="o" + style, ms=4 if solid else 2, capsize=2,
                lw=1.2 if solid else 0.8, color=color, label=name if solid else "")


def figures_command(a):
    folder = Path(a.folder)
    if a.markdown:
        print_markdown(folder)
        return
    draw_ladder(folder, a.draws)
    if rung_tables(folder):
        draw_rungs(rung_results(folder)[1], folder / "rungs.png")


def add_commands(command):
    """Add `figures` to the commands of scaling.py."""
    add = command("figures", figures_command, "draw or print what a ladder's folder holds")
    add("folder", nargs="?", default=str(LADDER), help="with isoflop/, hero/ and rung_runs/ (%(default)s)")
    add("--markdown", action="store_true", help="print the tables instead")
    add("--draws", type=scaling.count, metavar="N", default=400, help="bootstrap refits")


if __name__ == "__main__":
    sys.exit(scaling.main(["figures", *sys.argv[1:]]))
