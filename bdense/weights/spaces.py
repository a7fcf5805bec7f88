"""Branch weights w_1..w_K: how much each of the teacher's intermediate states counts.

B-DENSE, appendix A.1: log w_k = a k + b. k counts from 1; branch K is the interval's end point.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bdense.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLinearWeights:
    """w_k = exp(a k + b).

    a = 0 weighs all branches alike; a -> inf leaves the end point alone, which is plain
    distillation. b scales the whole loss, which Adam's update does not see.
    """

    a: float
    b: float = 0.0

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(
                    f"branch weight {name} must be a finite number, got {getattr(self, name)}"
                )

    def __call__(self, num_branches: int) -> Tensor:
        """[K] float64 weights; positive as far as float64 reaches."""
        if num_branches < 1:
            raise InputError(f"num_branches (K) must be at least 1, got {num_branches}")
        k = torch.arange(1, num_branches + 1, dtype=torch.float64)
        return torch.exp(self.a * k + self.b)


def uniform_weights() -> LogLinearWeights:
    """w_k = 1 for every branch."""
    return LogLinearWeights(a=0.0, b=0.0)


def normalised_weights(a: float, num_branches: int) -> LogLinearWeights:
    """The weights of slope ``a`` whose sum is K: b = ln K - ln sum_k exp(a k).

    One number decides them, and (a, b) stays defined, so both parameterisations compare.
    """
    if not math.isfinite(a):
        raise InputError(f"branch weight a must be a finite number, got {a}")
    if num_branches < 1:
        raise InputError(f"num_branches (K) must be at least 1, got {num_branches}")
    k = torch.arange(1, num_branches + 1, dtype=torch.float64)
    b = math.log(num_branches) - float(torch.logsumexp(a * k, dim=0))
    return LogLinearWeights(a=a, b=b)


def sum_to_one(weights: Tensor) -> Tensor:
    """[K] the same weights over their sum, which is what a clipped gradient compares fairly.

    Raises:
        InputError: They have no positive, finite sum.
    """
    total = float(weights.sum())
    if not 0 < total < math.inf:
        raise InputError(f"branch weights {weights.tolist()} have no positive, finite sum")
    return weights / total
