"""The search for coefficients c_1..c_K, of sum 1, of a student's branches; K branches."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bdense.errors import NonFiniteError

# How far the first simplex reaches along each coordinate.
_FIRST_STEP = 0.1


def search_coefficients(
    measure: Callable[[Sequence[float]], float], num_branches: int, evaluations: int
) -> list[float]:
    """The coefficients of the lowest value that Nelder and Mead's simplex (1965) meets.

    It starts at branch K and moves c_1..c_{K-1}; c_K is the rest of the sum.

    Args:
        measure: Of c_1..c_K, such as a FID on latents that are always the same. A
            ``NonFiniteError`` counts as infinity.
        num_branches: K, at least 2.
        evaluations: Calls of ``measure`` at most.

    Returns:
        c_1..c_K.
    """
    from scipy.optimize import minimize

    found: dict[tuple[float, ...], float] = {}

    def value(free: NDArray[np.float64]) -> float:
        c = (*free.tolist(), 1 - math.fsum(free))
        try:
            found[c] = measure(c)
        except NonFiniteError:
            found[c] = math.inf
        return found[c]

    start = np.zeros(num_branches - 1)
    simplex = np.vstack([start, -_FIRST_STEP * np.eye(num_branches - 1)])
    options = {"initial_simplex": simplex, "maxfev": evaluations, "xatol": 1e-3, "fatol": 0.0}
    minimize(value, start, method="Nelder-Mead", options=options)
    best = min(found, key=found.__getitem__)
    return list(best)
