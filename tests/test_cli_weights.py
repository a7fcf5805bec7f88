"""Branch weights on the command line: any registered space's parameters, or none with --plain."""

import math

import pytest
import torch

from bdense.cli import make_parser
from bdense.errors import InputError
from bdense.knob_options import from_options
from bdense.verbs.weight_options import WeightOptions, chosen_weighting, parameter_options
from bdense.weights.log_linear import LogLinearWeights, normalised_weights
from bdense.weights.weighting import BranchWeighting, LearnedWeights
from tests.plugins import example_package

__all__ = ["example_package"]


def weighting(*arguments: object, branches: int = 4, intervals: int = 2) -> BranchWeighting:
    """What ``bdense distill`` trains K branches with, in S intervals."""
    given = ["distill", "teacher", "--out", "x", *map(str, arguments)]
    options = make_parser(given).parse_args(given)
    parameters = from_options(parameter_options(), options)
    own = from_options(WeightOptions, options)
    return chosen_weighting(own, parameters, branches, intervals)()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), LogLinearWeights(a=0.0)(4)),
        (("--a", 1.5), LogLinearWeights(a=1.5)(4)),
        (("--a", -0.5, "--b", -2), LogLinearWeights(a=-0.5, b=-2.0)(4)),
        (("--weights", "log-linear", "--b", 1), LogLinearWeights(a=0.0, b=1.0)(4)),
        (("--weights", "normalised", "--a", 1.5), normalised_weights(1.5, 4)(4)),
        (("--plain",), LogLinearWeights(a=0.0)(1)),
    ],
)
def test_weights_that_are_given(arguments, expected):
    assert torch.equal(weighting(*arguments).weights(), expected)


def test_weights_that_are_learned():
    learned = weighting("--learn", "uncertainty")
    assert isinstance(learned, LearnedWeights)
    assert learned.describe() == {"rule": "uncertainty", "strength": 1.0, "memory": 100}
    other = weighting("--weights", "learned", "--strength", -1, "--learn", "gradient-norm")
    assert other.describe() == {"rule": "gradient-norm", "strength": -1.0, "memory": 100}


@pytest.mark.usefixtures("example_package")
def test_a_space_of_another_package_has_its_options(capsys):
    assert weighting("--end", 3).weights().tolist() == [1, 1, 1, 3]
    assert weighting("--a", 1).weights().tolist() == LogLinearWeights(a=1.0)(4).tolist()
    with pytest.raises(InputError, match="end is missing: the weights end-point need it"):
        weighting("--weights", "end-point")
    with pytest.raises(InputError, match=r"has --a 1 --end 3; .* end-point"):
        weighting("--a", 1, "--end", 3)
    with pytest.raises(SystemExit, match="0"):
        make_parser(["distill"]).parse_args(["distill", "--help"])
    assert "weight of branch K (end-point)" in " ".join(capsys.readouterr().out.split())


def test_free_weights_are_set_by_name_for_any_number_of_branches():
    given = ("--weights", "free", "--set", f"l_1={math.log(3)}")
    assert weighting(*given, branches=2).weights().tolist() == pytest.approx([1.5, 0.5])
    with pytest.raises(InputError, match=r"--set l_2= is missing"):
        weighting(*given, branches=3)
    with pytest.raises(InputError, match=r"--set l_1= must be a number, got high"):
        weighting("--weights", "free", "--set", "l_1=high", branches=2)
    with pytest.raises(InputError, match="2 branches or more"):
        weighting("--weights", "free", branches=1)


def test_slopes_are_set_by_name_for_any_number_of_intervals():
    given = ("--weights", "per-interval", "--set", "a_1=0.5", "--set", "a_2=0")
    expected = [normalised_weights(a, 4).values(4) for a in (0.5, 0.0)]
    assert weighting(*given).weights().tolist() == expected
    with pytest.raises(InputError, match=r"--set a_3= is missing"):
        weighting(*given, intervals=3)
    with pytest.raises(InputError, match="per-interval needs a method"):
        weighting(*given, intervals=1)


@pytest.mark.parametrize("given", [(), ("--a", 1), ("--learn", "anneal")])
def test_one_branch_takes_the_weights_of_the_other_spaces(given):
    assert len(weighting(*given, branches=1).weights()) == 1
