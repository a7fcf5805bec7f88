"""Branch weights that are learned while the student trains, beside those that are given.

B-DENSE (arXiv 2602.15971) leaves learning them to future work. Both rules here keep a running
mean of one number per branch, its scale s_k, and set

    w_k = K s_k^-strength / sum_j s_j^-strength,

so their sum is K, as in the normalised search. strength 0 is uniform, 1 the rule itself, below 0
its reverse. K branches.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bdense.errors import InputError
from bdense.weights.rules import RULES, require_strength

# Without AFS a branch may start at its target, where its L1 loss is rounding noise. No scale
# counts as smaller than this share of the largest.
SMALLEST_SCALE = 1e-3


class BranchWeighting(Protocol):
    """Where an update's branch weights come from."""

    @property
    def num_branches(self) -> int:
        """K."""

    @property
    def learns(self) -> bool:
        """Whether the weights change in training."""

    @property
    def needs_gradients(self) -> bool:
        """Whether ``observe`` wants each branch's gradient norm."""

    def observe(self, losses: Tensor, gradient_norms: Tensor | None) -> None:
        """See an update's branches before it is made.

        Args:
            losses: [K], unweighted, on the training device.
            gradient_norms: [K], of the unweighted losses at the features that all
                branches share.
        """

    def weights(self) -> Tensor:
        """[K] float64 w_1..w_K of the next update."""

    def state(self) -> dict[str, Tensor]:
        """What ``restore`` needs to go on as if never stopped."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``."""

    def describe(self) -> dict[str, Any]:
        """Plain values; equal descriptions make equal runs."""


@dataclass(frozen=True, eq=False)
class FixedWeights:
    """Weights that were given."""

    learns: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    values: Tensor

    def __post_init__(self) -> None:
        # Converted here once, not at every update.
        object.__setattr__(self, "values", self.values.double())
        usable = (self.values >= 0) & self.values.isfinite()
        if self.values.dim() != 1 or not bool(usable.all() and self.values.any()):
            raise InputError(
                f"branch weights must be finite numbers >= 0, one for each branch and not all 0, "
                f"got {self.values.tolist()}"
            )

    @property
    def num_branches(self) -> int:
        return len(self.values)

    def observe(self, losses: Tensor, gradient_norms: Tensor | None) -> None:
        pass

    def weights(self) -> Tensor:
        return self.values

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"fixed": self.values.tolist()}


@dataclass(eq=False)
class LearnedWeights:
    """Weights from a running scale of each branch; uniform until the first update is seen.

    ``uncertainty``: s_k is the branch's mean L1 loss. With |r| Laplace distributed at a scale of
    its own, the likelihood sum_k |r_k| / s_k + ln s_k is best there (Kendall et al. 2018, arXiv
    1705.07115, eq. 7, with L1 for L2 and the optimum in closed form).

    ``gradient-norm``: s_k is the norm of the branch's gradient at the features that all branches
    share, the head's input, so that w_k makes these norms equal (Chen et al. 2018, arXiv
    1711.02257, without its training rates).

    Attributes:
        num_branches: K.
        rule: One of ``RULES``.
        strength: Exponent of 1 / s_k.
        memory: Updates over which an old one's share in s_k falls to 1 / e.
    """

    learns: ClassVar[bool] = True

    num_branches: int
    _: KW_ONLY
    rule: str
    strength: float = 1.0
    memory: int = 100

    def __post_init__(self) -> None:
        if self.num_branches < 1:
            raise InputError(f"num_branches (K) must be at least 1, got {self.num_branches}")
        if self.rule not in RULES:
            raise InputError(f"weight rule {self.rule!r} is unknown; choose from {list(RULES)}")
        require_strength(self.strength)
        if self.memory < 1:
            raise InputError(f"weight memory must be at least 1 update, got {self.memory}")
        self._sum: Tensor | None = None
        self._seen = 0.0

    @property
    def needs_gradients(self) -> bool:
        return self.rule == "gradient-norm"

    def observe(self, losses: Tensor, gradient_norms: Tensor | None) -> None:
        signal = gradient_norms if self.needs_gradients else losses
        assert signal is not None
        keep = 1 - 1 / self.memory
        before = torch.zeros_like(signal, dtype=torch.float64) if self._sum is None else self._sum
        self._sum = keep * before + signal
        self._seen = keep * self._seen + 1

    def weights(self) -> Tensor:
        if self._sum is None:
            return torch.ones(self.num_branches, dtype=torch.float64)
        scale = self._sum / self._seen
        scale = scale.maximum(SMALLEST_SCALE * scale.max()).clamp(
            min=torch.finfo(scale.dtype).tiny
        )
        return self.num_branches * torch.softmax(-self.strength * scale.log(), dim=0)

    def state(self) -> dict[str, Tensor]:
        if self._sum is None:
            return {}
        return {"sum": self._sum, "seen": torch.tensor(self._seen, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._sum, self._seen = state["sum"], float(state["seen"])

    def describe(self) -> dict[str, Any]:
        return {"rule": self.rule, "strength": self.strength, "memory": self.memory}
