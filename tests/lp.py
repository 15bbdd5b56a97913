"""The linear program behind quantile balancing, solved exactly. Tests hold balance.py to it.

Run:  python tests/lp.py     three pairs of order statistics descend beside the optimum, 5 seconds
All of it is float64 numpy, and none of it runs in training.

T tokens  E experts  K experts per token   q = T*K/E   s_TE scores   alpha_T, beta_E dual variables
The program and its dual D(alpha, beta) are described in balance.py."""

import sys

import numpy as np

STALL = np.array([      # scores on which the published pair stalls at 62; K = 2, the optimum is 60
    [12.0, 2, 1, 2],
    [8, 8, 4, 0],
    [7, 6, 8, 7],
    [13, 1, 8, 0],
])


def lp_optimum(s_TE, K):
    """(optimal value, x_TE) by scipy's HiGHS. It takes minutes at 65,536 variables.

    The matrix is the incidence matrix of a bipartite graph. That is totally unimodular, so every
    vertex is 0/1 and no integer solver is needed. If E does not divide T*K, loads may be floor(q)
    or ceil(q)."""
    from scipy import sparse
    from scipy.optimize import linprog
    T, E = s_TE.shape
    tokens = sparse.kron(sparse.eye(T), np.ones((1, E)))
    experts = sparse.kron(np.ones((1, T)), sparse.eye(E))
    most, least = -(-T * K // E), T * K // E
    found = linprog(
        -s_TE.ravel(), bounds=(0, 1), method="highs",
        A_eq=tokens, b_eq=np.full(T, K),
        A_ub=sparse.vstack([experts, -experts]), b_ub=np.repeat([most, -least], E))
    if found.status != 0:
        raise RuntimeError(f"lp_optimum: HiGHS found no optimum: {found.message}")
    return -found.fun, found.x.reshape(T, E)


def largest(x, k, axis):
    """The k-th largest along an axis, which is kept with length 1; -inf past the end."""
    if k > x.shape[axis]:
        return np.full_like(np.take(x, [0], axis), -np.inf)
    place = x.shape[axis] - k
    return np.take(np.partition(x, place, axis), [place], axis)


def dual(s_TE, beta_E, K, alpha_T1=None):
    """D(alpha, beta), by default with the best alpha for this beta. No assignment is worth more."""
    if alpha_T1 is None:
        alpha_T1 = largest(s_TE - beta_E, K + 1, 1)
    T, E = s_TE.shape
    slack = np.maximum(0, s_TE - alpha_T1 - beta_E).sum()
    return slack + K * alpha_T1.sum() + T * K / E * beta_E.sum()


def alternate(s_TE, beta_E, K, row=0.0, column=1.0):
    """One alternation -> (alpha_T1, beta_E).

    Any point of [(K+1)-th, K-th] is a best alpha, any point of [(q+1)-th, q-th] a best beta; `row`
    and `column` say where between them to go. (0, 1) is balance.quantile. (0, 0) is the published
    pair, which can stall. (.5, .5) ends with loads of exactly q."""
    def between(x, k, at, axis):
        return (1 - at) * largest(x, k + 1, axis) + at * largest(x, k, axis)

    q = s_TE.shape[0] * K // s_TE.shape[1]
    alpha_T1 = between(s_TE - beta_E, K, row, 1)
    return alpha_T1, between(s_TE - alpha_T1, q, column, 0)[0]


def descend(s_TE, K, row, column, optimum, most=300):
    """Alternate from beta = 0 until the dual is optimal: (its gap after each, the last beta_E)."""
    beta_E = np.zeros(s_TE.shape[1])
    gaps = []
    while len(gaps) < most and not (gaps and gaps[-1] < 1e-9):
        alpha_T1, beta_E = alternate(s_TE, beta_E, K, row, column)
        gaps.append(dual(s_TE, beta_E, K, alpha_T1) - optimum)
    return np.array(gaps), beta_E


def certificate(s_TE, bias_E, K):
    """The value of the assignment "top K of s + bias" if it is provably optimal, else None.

    If its loads are all exactly q, then for every feasible x': its value = sum x(s+bias) - q sum
    bias >= sum x'(s+bias) - q sum bias = the value of x'. No solver is needed, and it does not
    matter where the bias came from."""
    T, E = s_TE.shape
    x_TE = np.zeros(s_TE.shape)
    chosen_TK = np.argsort(-(s_TE + bias_E), axis=1, kind="stable")[:, :K]
    np.put_along_axis(x_TE, chosen_TK, 1.0, axis=1)
    if (x_TE.sum(0) * E != T * K).any():
        return None
    return float((x_TE * s_TE).sum())


def scores(T, E, seed):
    """Random scores [T,E] of experts that are not equally popular."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((T, E)) + rng.standard_normal(E)


def main():
    K = 2
    for name, s_TE in (("64 tokens, 8 experts", scores(64, 8, 0)), ("4 tokens, 4 experts", STALL)):
        optimum, _ = lp_optimum(s_TE, K)
        print(f"{name}, K = {K}. Optimum by HiGHS: {optimum:.6f}")
        print(f"  {'alpha, beta':34s}dual - optimum after 1, 2, ... alternations")
        for pair, row, column in (("(K+1)-th, q-th: balance.quantile", 0, 1),
                                  ("midpoints", 0.5, 0.5),
                                  ("(K+1)-th, (q+1)-th: as published", 0, 0)):
            gaps, beta_E = descend(s_TE, K, row, column, optimum)
            found = certificate(s_TE, -beta_E, K)
            end = f"certified optimal: {found:.6f}" if found else "loads are not all q"
            print(f"  {pair:34s}" + " ".join(f"{max(gap, 0):.4f}" for gap in gaps[:8]) + f"  {end}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"lp.py: expected no arguments, found {' '.join(sys.argv[1:])!r}", file=sys.stderr)
        sys.exit(2)
    main()
