"""Branch weights on the command line: any registered space's parameters, or none with --plain."""

import importlib

import pytest
import torch

from bdense.cli import make_parser
from bdense.errors import InputError
from bdense.verbs.weight_options import chosen_weighting
from bdense.weights.spaces import LogLinearWeights, normalised_weights
from bdense.weights.weighting import BranchWeighting, LearnedWeights
from tests.plugins import install


def weighting(*arguments: object) -> BranchWeighting:
    """What ``bdense distill`` trains K = 4 branches with."""
    given = ["distill", "teacher", "--out", "x", *map(str, arguments)]
    return chosen_weighting(make_parser(given).parse_args(given), 4)()


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


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A package with a weight space of its own."""
    (tmp_path / "steps_of_others.py").write_text(
        """
from dataclasses import dataclass
from typing import ClassVar
from bdense.knobs import knob
from bdense.weights.spaces import Range, Uniform, WeightSpace

@dataclass(frozen=True, slots=True, kw_only=True)
class Steps(WeightSpace):
    name: ClassVar[str] = "steps"
    height: Range = knob(Range(low=1, high=9), "weight of the last branch, the others have 1")

    def distributions(self):
        return {"height": Uniform(self.height.low, self.height.high)}

    def own_weighting(self, params, num_branches):
        import torch
        from bdense.weights.weighting import FixedWeights
        weights = torch.ones(num_branches, dtype=torch.float64)
        weights[-1] = params["height"]
        return FixedWeights(weights)
"""
    )
    install(tmp_path, "steps-of-others", "[bdense.weights]\nsteps = steps_of_others:Steps\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("added")
def test_a_space_of_another_package_has_its_options(capsys):
    assert weighting("--height", 3).weights().tolist() == [1, 1, 1, 3]
    assert weighting("--a", 1).weights().tolist() == LogLinearWeights(a=1.0)(4).tolist()
    with pytest.raises(InputError, match="--height is missing: the weights steps need it"):
        weighting("--weights", "steps")
    with pytest.raises(InputError, match=r"has --a 1 --height 3; .* steps: --height$"):
        weighting("--a", 1, "--height", 3)
    with pytest.raises(SystemExit, match="0"):
        make_parser(["distill"]).parse_args(["distill", "--help"])
    assert "weight of the last branch, the others have 1 (steps)" in " ".join(
        capsys.readouterr().out.split()
    )
