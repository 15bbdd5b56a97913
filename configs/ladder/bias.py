"""How the choice of runs biases an isoFLOP parabola, but not a fit with shared exponents.

    python scaling.py bias                          the table, and out/bias.png

Noise-free ladders are simulated from three known surfaces and the optimum is extrapolated to 1e24
FLOPs; the surfaces and the 36 entries are those of Czech et al., arXiv 2603.22339."""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scaling  # noqa: E402
from configs.ladder import figures  # noqa: E402
from configs.ladder import surface  # noqa: E402

Surface = surface.Surface
# [cited: arXiv 2603.22339] E, A, B, alpha, beta
SURFACES = {"symmetric": Surface(1.69, 400, 400, 0.31, 0.31),
            "Chinchilla": Surface(1.69, 406.4, 410.7, 0.34, 0.28),
            "asymmetric": Surface(1.69, 400, 400, 0.465, 0.155)}
WIDTHS = (2, 4, 8, 16)
SAMPLING = ("centered", "offset 3x", "drift to 3x")
BUDGETS = 10.0**np.arange(17, 22)
TARGET = 1e24


def simulate(truth, width, sampling="centered", budgets=BUDGETS, points=15, noise=0.0, rng=None):
    """A ladder with `points` sizes log-spaced within a factor `width` of a center, maybe off D*."""
    runs = []
    for i, C in enumerate(budgets):
        off = {"centered": 1, "offset 3x": 3, "drift to 3x": 3**(i / (len(budgets) - 1))}[sampling]
        for N in truth.optimum(C)[0] / off * np.geomspace(1 / width, width, points):
            D = C / truth.k / N
            loss = truth.loss_of(N, D) + (rng.normal(0, noise) if noise else 0)
            runs.append(scaling.Run(float(C), float(N), float(D), float(loss), float(C), source="simulation"))
    return runs


def extrapolation_error(truth, width, sampling, method):
    """Error in % of D*(1e24) extrapolated from five noise-free budgets, 1e17 to 1e21."""
    fit = scaling.isoflop_fit(simulate(truth, width, sampling), scaling.FitConfig(method), inside=False)
    law = scaling.power_law(BUDGETS, [v.tokens for v in fit.optima])
    found = law["coefficient"] * TARGET**law["exponent"]
    return 100 * (found / truth.optimum(TARGET)[1] - 1)


def minimum_shift(truth, width, points=15):
    """Relative shift of N* in a centered parabola, in closed form.

    An isoFLOP curve is, up to a factor and a constant, beta e^(-alpha w) + alpha e^(beta w) with
    w = ln N/N*, so the shift needs neither A, B, E nor C."""
    w = np.linspace(-math.log(width), math.log(width), points)
    curve = truth.beta * np.exp(-truth.alpha * w) + truth.alpha * np.exp(truth.beta * w)
    a, b, _ = np.polyfit(w, curve, 2)
    return math.exp(-b / (2 * a)) - 1


def bias_table():
    """{(surface, sampling): errors in % of the parabola at each width}, and the worst shared error."""
    table = {(name, sampling): [extrapolation_error(truth, width, sampling, "parabola") for width in WIDTHS]
             for name, truth in SURFACES.items() for sampling in SAMPLING}
    shared = max(abs(extrapolation_error(truth, width, sampling, "shared"))
                 for truth in SURFACES.values() for sampling in SAMPLING for width in WIDTHS)
    return table, shared


def draw(table, path):
    """Error of the extrapolated D* against the sampled width, one panel per kind of sampling."""
    ends = 1.1 * min(map(min, table.values())), 1.1 * max(map(max, table.values()))
    with figures.figure(1, 3, (9.9, 3.6), path) as axes:
        for ax, sampling in zip(axes, SAMPLING):
            for name, marker in zip(SURFACES, "^os"):
                ax.plot(WIDTHS, table[name, sampling], marker + "-", ms=4, label=f"parabola, {name}")
            ax.axhline(0, color="k", lw=1, ls="--", label="shared exponents, all three")
            ax.set(xscale="log", xlabel="sampled within this factor", title=sampling, ylim=ends)
            ax.set_xticks(WIDTHS, WIDTHS)
            ax.minorticks_off()
        axes[0].set_ylabel("error of $D^*$ at $10^{24}$ FLOPs (%)")
        axes[0].legend()


def bias_command(a):
    table, shared = bias_table()
    print(f"Error of D*({TARGET:g}) in % by parabolas: noise-free ladder of 1e17 to 1e21 FLOPs, 15 sizes "
          f"a budget within a factor of its center\n{'':24s}" + "".join(f"{f'x{w}':>10s}" for w in WIDTHS))
    for (name, sampling), errors in table.items():
        print(f"{name:11s}{sampling:13s}" + "".join(f"{error:+10.3f}" for error in errors))
    print(f"By shared exponents the largest of the {len(table) * len(WIDTHS)} errors is {shared:.1e} %.")
    print("\nShift of a centered parabola's N* in %, in closed form, the same at every C")
    for name, truth in SURFACES.items():
        shifts = "".join(f"{100 * minimum_shift(truth, width):+10.2f}" for width in WIDTHS)
        print(f"{name:24s}{shifts}")
    draw(table, a.plot)


def add_commands(command):
    """Add `bias` to the commands of scaling.py."""
    add = command("bias", bias_command, "recompute and draw the bias study")
    add("--plot", default="out/bias.png", metavar="FILE", help="the picture (%(default)s)")


if __name__ == "__main__":
    sys.exit(scaling.main(["bias", *sys.argv[1:]]))
