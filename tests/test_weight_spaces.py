"""Every weight space, and the log-linear weights themselves."""

import math

import pytest
import torch

from bdense.errors import InputError
from bdense.methods import METHODS
from bdense.weights import WEIGHT_SPACES, space_of
from bdense.weights.free import FreeSpace, PerIntervalSpace
from bdense.weights.learned import RULES, LearnedSpace
from bdense.weights.log_linear import (
    LogLinearSpace,
    LogLinearWeights,
    NormalisedSpace,
    normalised_weights,
    uniform_weights,
)
from bdense.weights.space import Choice, Range, Uniform, require_point
from tests.contracts.weight_spaces import WeightSpaceContract


class TestEverySpace(WeightSpaceContract):
    """Each with a point and another one."""

    @pytest.fixture(
        params=[
            (LogLinearSpace(largest=100.0), {"a": 1.386, "b": -4.274}, {"a": 1.337, "b": -4.195}),
            (NormalisedSpace(a=Range(low=-1.0, high=3.0), largest=3.5), {"a": 0.071}, {"a": 0.5}),
            (
                LearnedSpace(memory=7),
                {"rule": "uncertainty", "strength": 0.5},
                {"rule": "gradient-norm", "strength": 0.5},
            ),
            (
                FreeSpace(),
                {"l_1": -1.0, "l_2": 0.5, "l_3": 2.0},
                {"l_1": 0.5, "l_2": -1.0, "l_3": 2.0},
            ),
            (PerIntervalSpace(), {"a_1": 0.5, "a_2": -0.25}, {"a_1": -0.25, "a_2": 0.5}),
        ],
        ids=lambda each: each[0].name,
    )
    def case(self, request):
        return request.param

    @pytest.fixture
    def space(self, case):
        return case[0]

    @pytest.fixture
    def point(self, case):
        return case[1]

    @pytest.fixture
    def another(self, case):
        return case[2]


# ---- free weights ----


def test_free_weights_have_the_ratios_that_are_asked_for():
    """l = ln 2, ln 3 beside w_K give 2 : 3 : 1, of sum 3."""
    params = {"l_1": math.log(2), "l_2": math.log(3)}
    weights = FreeSpace(branches=3).weighting(params, 3).weights().tolist()
    assert weights == pytest.approx([1.0, 1.5, 0.5])


def test_uniform_weights_are_the_origin_and_slopes_a_line():
    space = FreeSpace(branches=4)
    assert space.coordinates({"baseline": "uniform"}) == (0.0, 0.0, 0.0)
    line = {f"l_{k}": 0.7 * (k - 4) for k in (1, 2, 3)}
    found = space.weighting(line, 4).weights()
    assert found.tolist() == pytest.approx(normalised_weights(0.7, 4)(4).tolist())


def test_free_weights_have_as_many_parameters_as_the_method_asks_for():
    assert [*FreeSpace().of_method(2, 1).distributions()] == ["l_1"]
    with pytest.raises(InputError, match=r"weights\.branches is 4, and the method has 2 branches"):
        FreeSpace(branches=4).of_method(2, 1)
    with pytest.raises(InputError, match="of 4 branches do not fit a method of 2"):
        FreeSpace().weighting({"l_1": 0.0, "l_2": 0.0, "l_3": 0.0}, 2)
    # Of another K they are known, for an arm of another study.
    assert space_of({"l_1": 0.3}).name == "free"


# ---- a slope for each interval ----


def test_each_interval_has_the_weights_of_its_own_slope():
    space = PerIntervalSpace().of_method(4, 3)
    found = space.weighting({"a_1": 0.7, "a_2": 0.0, "a_3": -0.2}, 4).weights().tolist()
    assert found == [normalised_weights(a, 4).values(4) for a in (0.7, 0.0, -0.2)]
    assert found[1] == [1.0] * 4
    assert [sum(row) for row in found] == pytest.approx([4.0] * 3)


def test_uniform_weights_are_slopes_of_zero_and_plain_ones_have_no_place():
    space = PerIntervalSpace(intervals=3)
    assert space.axes == ("a_1", "a_2", "a_3")
    assert space.coordinates({"baseline": "uniform"}) == (0.0, 0.0, 0.0)
    assert space.coordinates({"baseline": "plain"}) is None
    assert space.coordinates({"a_3": 0.3, "a_1": 0.1, "a_2": 0.2}) == (0.1, 0.2, 0.3)
    assert space.coordinates({"a_1": 0.1}) is None


def test_there_are_as_many_slopes_as_the_method_trains_intervals():
    assert [*PerIntervalSpace().of_method(4, 3).distributions()] == ["a_1", "a_2", "a_3"]
    with pytest.raises(InputError, match=r"weights\.intervals is 2, and the method trains 3"):
        PerIntervalSpace(intervals=2).of_method(4, 3)
    with pytest.raises(InputError, match=r"per-interval needs a method .* choose normalised"):
        PerIntervalSpace().of_method(4, 1)
    params = {"a_1": 0.1, "a_2": 0.2}
    with pytest.raises(InputError, match="of 2 intervals do not fit a method that trains 1 "):
        PerIntervalSpace().require_fitting(params, 4, 1)
    PerIntervalSpace().require_fitting(params, 2, 2)
    # Of another S they are known, for an arm of another study.
    assert space_of({"a_1": 0.3}).name == "per-interval"


@pytest.mark.parametrize(
    ("method", "knobs", "intervals"),
    [
        ("sfd", {"nfe": 3}, 3),
        ("sfd", {"nfe": 3, "afs": False}, 3),
        ("sfd", {"nfe": 1}, 1),
        ("sfd", {"nfe": [2, 3]}, 1),
        ("progressive", {"steps": 8, "until": 4}, 1),
        ("consistency", {}, 1),
    ],
)
def test_a_method_tells_how_many_intervals_every_iteration_trains(method, knobs, intervals):
    made = METHODS[method]()
    assert made.Config.read(knobs).num_intervals == intervals


# ---- log-linear weights ----


@pytest.mark.parametrize("a", [-2.0, 0.0, 1.386, 3.0])
@pytest.mark.parametrize("num_branches", [1, 2, 4, 16])
def test_weights_are_exp_of_a_k_plus_b(a, num_branches):
    k = torch.arange(1, num_branches + 1, dtype=torch.float64)
    given = LogLinearWeights(a=a, b=-1.5)
    expected = torch.exp(a * k - 1.5).tolist()
    assert given.values(num_branches) == pytest.approx(expected, rel=1e-12)
    assert given(num_branches).tolist() == given.values(num_branches)
    ratio = expected[-1] / expected[0]
    assert given.last_to_first(num_branches) == pytest.approx(ratio, rel=1e-12)
    assert sum(normalised_weights(a, num_branches).values(num_branches)) == pytest.approx(
        num_branches
    )


@pytest.mark.parametrize("a", [-300.0, 0.0, 300.0])
def test_normalised_weights_of_steep_slopes_are_finite(a):
    """One branch has all of the sum K = 4, or each has its 1."""
    largest = max(normalised_weights(a, 4).values(4))
    assert largest == pytest.approx(4.0 if a else 1.0)
    assert LogLinearWeights(a=800.0, b=-800.0).values(2) == [1.0, math.inf]
    assert LogLinearWeights(a=800.0).last_to_first(2) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_need_finite_numbers(bad):
    with pytest.raises(InputError, match="weight a must be a finite number"):
        normalised_weights(bad, 4)
    with pytest.raises(InputError, match="weight b must be a finite number"):
        LogLinearWeights(a=0.0, b=bad)


@pytest.mark.parametrize("bad", [0, -1, 10**12, "4", 2.5, True])
def test_branches_are_counted_by_a_whole_number(bad):
    for make in (uniform_weights(), lambda k: normalised_weights(0.0, k)):
        with pytest.raises(InputError, match=r"num_branches .*must .*, got"):
            make(bad)


# ---- reading ----


def test_spaces_are_read_from_plain_mappings():
    read = LogLinearSpace.read({"a": {"low": -0.5, "high": 3}, "b": {"low": -4, "high": -4}})
    assert read.distributions() == {"a": Uniform(-0.5, 3.0), "b": Uniform(-4.0, -4.0)}
    learned = LearnedSpace.read({"rules": ["gradient-norm"], "strength": {"low": 1, "high": 1}})
    assert learned.distributions() == {
        "rule": Choice(("gradient-norm",)),
        "strength": Uniform(1.0, 1.0),
    }
    assert learned.is_one_point
    assert learned.needs_gradients
    assert not LearnedSpace(rules=("uncertainty",)).needs_gradients
    aligned = LearnedSpace.read({"rules": ["alignment"], "strength": {"low": 0, "high": 2}})
    assert aligned.needs_gradients
    with pytest.raises(InputError, match=r"strength -1 would reverse the rule anneal"):
        LearnedSpace.read({"rules": ["uncertainty", "anneal"]})


@pytest.mark.parametrize(
    ("name", "tree", "message"),
    [
        ("normalised", {"a": {"low": 2.0, "high": 1.0}}, "weights.a.low 2 is above high 1"),
        ("normalised", {"a": {"low": 3.0}}, "weights.a.low 3 is above high 2"),
        ("normalised", {"b": {"low": 0.0, "high": 1.0}}, "weights.b is unknown"),
        ("learned", {"rules": []}, r"weights.rules \[\] must name one rule or more"),
        ("learned", {"rules": ["uncertainty"] * 2}, "weights.rules .* each once"),
        ("learned", {"rules": ["loss"]}, "weights.rules must be a list of uncertainty, gradient-"),
        (
            "learned",
            {"strength": {"low": 0.0, "high": 12.0}},
            r"weights.strength must lie in -10\.\.10, got 12",
        ),
    ],
)
def test_what_does_not_fit_is_named(name, tree, message):
    with pytest.raises(InputError, match=message):
        WEIGHT_SPACES[name].read(tree, "weights")


# ---- bounds ----


def test_the_excess_is_measured_from_the_largest_weight():
    """a < 0 makes w_1 the largest, a > 0 w_K."""
    bounded = LogLinearSpace(largest=2.0)
    assert bounded.excess({"a": math.log(2), "b": -math.log(2)}, 4) == pytest.approx(8 - 2)
    assert bounded.excess({"a": -1.0, "b": 1.0}, 4) == pytest.approx(1 - 2)
    # w_4 = 4 * 27 / (1 + 3 + 9 + 27).
    normalised = NormalisedSpace(largest=3.0)
    assert normalised.excess({"a": math.log(3)}, 4) == pytest.approx(2.7 - 3)
    assert LogLinearSpace().excess({"a": 100.0, "b": 100.0}, 4) == 0


def test_a_bound_that_excludes_the_whole_space_is_refused():
    with pytest.raises(InputError, match=r"largest 0.5 rules out .* largest weight is 1;"):
        NormalisedSpace(largest=0.5).check(4)
    # The least of max w_k is w_1 at the lower bounds: exp(-0.5 - 6).
    with pytest.raises(InputError, match=r"largest weight is 0\.001503;"):
        LogLinearSpace(largest=1e-3).check(4)


@pytest.mark.parametrize(
    ("space", "params", "message"),
    [
        (NormalisedSpace(), {"a": 5.0}, "a 5 lies outside weights.a, -1 to 2"),
        (NormalisedSpace(), {"a": math.nan}, "a nan lies outside"),
        (NormalisedSpace(), {"a": "x"}, "a must be a number, got 'x'"),
        (NormalisedSpace(), {"a": 1.0, "b": 0.0}, "have the parameters a, got a, b"),
        (NormalisedSpace(largest=2.0), {"a": 2.0}, r"a 2\.000 exceed the bound .* by 1\.46"),
        (LearnedSpace(), {"rule": "loss", "strength": 0.0}, "rule must be .*, got loss"),
    ],
)
def test_points_outside_the_space_are_refused(space, params, message):
    with pytest.raises(InputError, match=message):
        require_point(space, params, 4)


# ---- values ----


def test_learned_weights_have_the_memory_of_their_space():
    learned = LearnedSpace(memory=7).weighting({"rule": RULES[1], "strength": -0.5}, 3)
    assert learned.describe() == {"rule": RULES[1], "strength": -0.5, "memory": 7}


def test_coordinates_leave_out_what_adam_does_not_see():
    assert LogLinearSpace().coordinates({"a": 1.0, "b": -4.0}) == (1.0,)
    assert NormalisedSpace().coordinates({"baseline": "uniform"}) == (0.0,)
    assert NormalisedSpace().coordinates({"baseline": "plain"}) is None
    learned = LearnedSpace()
    assert learned.axes == ("strength", "uncertainty", "gradient-norm")
    assert learned.coordinates({"rule": "gradient-norm", "strength": 0.5}) == (0.5, 0.0, 1.0)


def test_weights_found_elsewhere_belong_to_the_space_that_reads_them():
    own = NormalisedSpace(largest=3.0)
    assert space_of({"a": 1.0}, own) is own
    assert space_of({"a": 1.0, "b": 0.0}) == LogLinearSpace()
    learned = {"rule": RULES[0], "strength": 1.0, "memory": 5}
    assert space_of(learned, own) == LearnedSpace()
    with pytest.raises(InputError, match="no weight space has the parameters c"):
        space_of({"c": 1.0}, own)
