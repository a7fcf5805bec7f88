"""Branch weights log w_k = a k + b for whoever must not load torch; k = 1..K.

Students are trained with those of ``bdense.weights.spaces``.
"""

import math


def branch_weights(a: float, b: float, num_branches: int) -> list[float]:
    """w_1 .. w_K, infinite where they are beyond float64."""
    return [_exp(a * k + b) for k in range(1, num_branches + 1)]


def last_to_first(a: float, num_branches: int) -> float:
    """w_K / w_1, likewise."""
    return _exp(a * (num_branches - 1))


def equivalent_b(a: float, num_branches: int) -> float:
    """The b that makes the weights' sum K."""
    largest = max(a * k for k in (1, num_branches))
    total = math.fsum(math.exp(a * k - largest) for k in range(1, num_branches + 1))
    return math.log(num_branches) - largest - math.log(total)


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf
