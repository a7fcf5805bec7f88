"""A weight space of another package, which loads no torch before it is used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bdense.knobs import knob
from bdense.weights.space import Range, Uniform, WeightSpace

if TYPE_CHECKING:
    from bdense.weights.weighting import BranchWeighting


@dataclass(frozen=True, slots=True, kw_only=True)
class EndPoint(WeightSpace):
    """The end point weighs ``end``, all other branches 1."""

    name: ClassVar[str] = "end-point"

    end: Range = knob(Range(low=1.0, high=10.0), "weight of branch K")

    def distributions(self) -> Mapping[str, Uniform]:
        return {"end": Uniform(self.end.low, self.end.high)}

    def own_weighting(self, params: Mapping[str, Any], num_branches: int) -> "BranchWeighting":
        import torch

        from bdense.weights.weighting import FixedWeights

        values = [1.0] * (num_branches - 1) + [params["end"]]
        return FixedWeights(torch.tensor(values, dtype=torch.float64))
