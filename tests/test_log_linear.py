"""Branch weights without torch: those of the engine, and steep ones that have no numbers."""

import math

import pytest

from bdense.weights.spaces import LogLinearWeights, normalised_weights
from search.spec.log_linear import branch_weights, equivalent_b, last_to_first


@pytest.mark.parametrize("a", [-2.0, 0.0, 1.386, 3.0])
@pytest.mark.parametrize("num_branches", [1, 2, 4, 16])
def test_they_are_the_engines(a, num_branches):
    given = LogLinearWeights(a=a, b=-1.5)(num_branches)
    assert branch_weights(a, -1.5, num_branches) == pytest.approx(given.tolist(), rel=1e-12)
    ratio = float(given[-1] / given[0])
    assert last_to_first(a, num_branches) == pytest.approx(ratio, rel=1e-12)
    b = normalised_weights(a, num_branches).b
    assert equivalent_b(a, num_branches) == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("a", [-300.0, 0.0, 300.0])
def test_the_equivalent_b_of_steep_slopes_is_finite(a):
    """One branch has all of the sum K = 4, or each has its 1."""
    largest = max(a * k + equivalent_b(a, 4) for k in (1, 4))
    assert largest == pytest.approx(math.log(4) if a else 0.0)


def test_what_is_beyond_float64_is_infinite():
    assert branch_weights(800.0, -800.0, 2) == [1.0, math.inf]
    assert last_to_first(800.0, 2) == math.inf
