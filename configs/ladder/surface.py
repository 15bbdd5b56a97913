"""One surface L(N, D) through all runs of a table, and why it is not what scaling.py forecasts with.

    python configs/ladder/surface.py TABLE              both fits, by squared loss and by Huber loss
    python scaling.py fit TABLE --method surface        the first, with bootstrap and warnings

Both are exact on synthetic data (tests/test_scaling.py). On Delphi, whose budgets differ in more than
N and D, the surface by squared loss puts E at 2.62, above losses reached later, and is 14 % off at
1e23 FLOPs. `scaling.py register` refuses it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import optimize
from scipy import special

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scaling  # noqa: E402


@dataclass(frozen=True)
class Surface:
    """L(N, D) = E + A N^-alpha + B D^-beta, with C = k N D."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    k: float = 6.0

    def optimum(self, C):
        """(N*, D*) of a budget."""
        share = 1 / (self.alpha + self.beta)
        ratio = self.alpha * self.A / (self.beta * self.B)
        N = ratio**share * (C / self.k)**(self.beta * share)
        return N, C / self.k / N

    def loss_of(self, N, D):
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    def loss(self, C):
        """The loss of the compute-optimal run of C FLOPs."""
        return self.loss_of(*self.optimum(C))

    def __str__(self):
        return "L = {E:.4f} + {A:.5g} N^-{alpha:.4f} + {B:.5g} D^-{beta:.4f}".format(**vars(self))


def fit_surface(runs, start=None, robust=False):
    """The scaling.Fit of a Surface to all runs at once by squared loss (VPNLS, arXiv 2603.22339).

    robust: go on from there with a Huber loss (1e-3) of the log-loss by log-sum-exp [arXiv
    2203.15556]. k is that of the largest budget. start: (alpha, beta) of an earlier fit."""
    N, D, y = scaling.columns_of(runs, "params", "tokens", "loss")
    source = runs[0].source
    scaling.need(len(y) >= 6, source, "at least 6 runs for a surface", len(y), "add runs")
    log_n, log_d = np.log(N).mean(), np.log(D).mean()
    u, v = np.log(N) - log_n, np.log(D) - log_d             # centered: terms of like size
    (alpha, beta), residual, [(E, A, B)] = scaling.variable_projection(u, v, y, [np.arange(len(y))], start)
    scaling.need(min(A, B) > 0, source, "a loss that falls with N and D", "A or B at 0",
                 "use another --method")
    if robust:
        def log_loss(p):
            return special.logsumexp([np.full(len(y), p[0]), p[1] - p[3] * u, p[2] - p[4] * v], axis=0)

        first = [*np.log([max(E, 1e-9), A, B]), alpha, beta]
        best = optimize.minimize(lambda p: 1e6 * np.sum(special.huber(1e-3, log_loss(p) - np.log(y))),
                                 first, method="L-BFGS-B", options=dict(maxiter=5000, ftol=1e-15)).x
        (E, A, B), (alpha, beta) = np.exp(best[:3]), best[3:]
        residual = y - np.exp(log_loss(best))
    top = max(r.budget for r in runs)
    k = np.median([r.flops / (r.params * r.tokens) for r in runs if r.budget == top])
    numbers = E, A * np.exp(alpha * log_n), B * np.exp(beta * log_d), alpha, beta, k
    law = Surface(*map(float, numbers))
    optima = []
    for C, rows in scaling.by_budget(runs).items():
        N_star, D_star = law.optimum(C)
        optima.append(scaling.Optimum(C, len(rows), D_star, N_star, law.loss(C)))
    return scaling.Fit(law, optima, [], y - residual, 5, (law.alpha, law.beta))


def main(table):
    runs = scaling.checked(scaling.read_csv(table, grid=False), table)
    for name, robust in (("squared loss", False), ("Huber loss", True)):
        print(f"{fit_surface([run for run in runs if run.kind == 'isoflop'], robust=robust).law}   by {name}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(2)
    sys.exit(scaling.guarded("surface.py", lambda: main(sys.argv[1])))
