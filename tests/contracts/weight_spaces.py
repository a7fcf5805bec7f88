"""What every weight space promises; subclass it and give a ``space`` and a ``point`` fixture.

``point`` is a draw from the space's distributions that may be trained, ``another`` one whose
weights differ.
"""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bdense.errors import InputError
from bdense.weights.space import (
    BASELINE,
    PLAIN,
    UNIFORM,
    BranchWeights,
    Choice,
    Uniform,
    require_point,
)
from bdense.weights.weighting import Observed

NUM_BRANCHES = 4


def weights_of(space, params: Mapping[str, Any]) -> BranchWeights:
    """w_1..w_K, or each interval's, after an update that sees branches of different losses."""
    weighting = space.weighting(params, NUM_BRANCHES)
    seen = torch.arange(1.0, weighting.num_branches + 1)
    gradients = {"gradient_norms": seen.square(), "cosines": seen / len(seen)}
    weighting.observe(Observed(losses=seen, progress=0.5, **gradients))
    return weighting.weights().tolist()


class WeightSpaceContract:
    """Distributions, weights, coordinates, labels and what results store."""

    def test_its_name_is_that_of_the_registry(self, space):
        from bdense.weights import WEIGHT_SPACES

        assert WEIGHT_SPACES[space.name] is type(space)

    def test_it_has_defaults(self, space):
        assert type(space)().distributions().keys() == space.distributions().keys()

    def test_it_is_imported_without_torch(self, space):
        module = type(space).__module__
        code = f"import sys, {module}; print('torch' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "False"

    def test_a_draw_is_one_of_its_distributions(self, space, point):
        distributions = space.distributions()
        assert point.keys() == distributions.keys()
        for name, distribution in distributions.items():
            assert isinstance(distribution, Uniform | Choice)
            distribution.require(name, point[name])
        assert space.reads(point)

    def test_weights_are_positive_finite_and_k_of_them(self, space, point):
        values = torch.tensor(weights_of(space, point))
        assert values.dim() in (1, 2)
        assert values.shape[-1] == NUM_BRANCHES
        assert bool((values > 0).all())
        assert bool(values.isfinite().all())
        assert space.weighting(point, NUM_BRANCHES).weights().dtype == torch.float64
        assert space.excess(point, NUM_BRANCHES) <= 0

    def test_the_same_parameters_give_the_same_weights(self, space, point, another):
        assert weights_of(space, point) == weights_of(space, dict(point))
        assert weights_of(space, point) != weights_of(space, another)

    def test_coordinates_and_labels_tell_points_apart(self, space, point, another):
        assert space.label(point) != space.label(another)
        if space.axes:
            here, there = space.coordinates(point), space.coordinates(another)
            assert len(here) == len(there) == len(space.axes)
            assert here != there
        else:
            assert space.coordinates(point) is None

    def test_it_is_told_by_its_coordinates_or_says_that_it_cannot(self, space, point):
        try:
            box = space.box
        except InputError:
            return  # and a study of it is refused
        for share in (0.0, 0.3, 1.0):
            told = tuple(each.low + share * (each.high - each.low) for each in box)
            params = space.at(told)
            assert params.keys() == point.keys()
            assert space.coordinates(params) == told
            assert not space.weighting(params, NUM_BRANCHES).learns

    def test_what_is_stored_gives_the_same_weights_without_the_study(self, space, point):
        stored = space.stored(point, NUM_BRANCHES)
        plain = type(space)()
        assert plain.reads(stored)
        assert weights_of(plain, stored) == weights_of(space, point)
        assert plain.stored(stored, NUM_BRANCHES) == stored

    @pytest.mark.parametrize(("baseline", "branches"), [(PLAIN, 1), (UNIFORM, NUM_BRANCHES)])
    def test_baselines_are_arms_of_every_space(self, space, baseline, branches):
        params = {BASELINE: baseline}
        assert space.reads(params)
        assert weights_of(space, params) == [1.0] * branches
        assert space.excess(params, NUM_BRANCHES) == 0
        assert space.stored(params, NUM_BRANCHES) == params
        assert baseline in space.label(params)
        place = space.coordinates(params)
        assert place is None or len(place) == len(space.axes)

    def test_parameters_of_another_space_are_refused(self, space):
        foreign = {"no_parameter_of_any_space": 1.0}
        assert not space.reads(foreign)
        with pytest.raises(InputError, match="no_parameter_of_any_space"):
            space.weighting(foreign, NUM_BRANCHES)
        with pytest.raises(InputError, match="no_parameter_of_any_space"):
            require_point(space, foreign, NUM_BRANCHES)

    def test_a_point_of_the_space_may_be_asked_for(self, space, point):
        assert require_point(space, point, NUM_BRANCHES) == point

    def test_it_can_be_searched(self, space):
        space.check(NUM_BRANCHES)
        assert not space.is_one_point
        assert space.identity()["name"] == space.name
