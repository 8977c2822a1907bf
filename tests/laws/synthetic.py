"""Runs of a law that is known: a grid of sizes and budgets with noise, no model anywhere."""

import numpy as np

from assay.laws.law import Law
from assay.laws.points import Points

TRUE = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def runs(law: Law = TRUE, noise: float = 0.01, seed: int = 0, budgets: int = 9, sizes: int = 9) -> Points:
    """Sizes of one grid, on each of several budgets those within a factor of 6 of the best; C = 6 N D."""
    flops = 10 ** np.linspace(18, 22, budgets)
    grid = np.geomspace(law.best_params(flops[0]) / 6, law.best_params(flops[-1]) * 6, 2 * budgets + sizes)
    rows = []
    for c in flops:
        best = law.best_params(float(c))
        rows += [(n, c / (6 * n), c) for n in grid if best / 6.1 <= n <= best * 6.1]
    n, d, c = np.array(rows).T
    scatter = np.exp(np.random.default_rng(seed).normal(0.0, noise, len(n)))
    return Points(n, d, c, law.loss(n, d) * scatter)
