"""One training over several devices of a machine: each process takes its share of every batch.

torch's DistributedDataParallel averages the gradients. B batch.
"""

from dataclasses import dataclass

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdense.errors import InputError


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one training, seen from one of them.

    Attributes:
        rank: This one, counted from 0.
        size: How many.
    """

    rank: int
    size: int

    @classmethod
    def alone(cls) -> "Team":
        """A training in this process only."""
        return cls(0, 1)

    @property
    def leads(self) -> bool:
        """Whether this one saves and reports."""
        return self.rank == 0

    @property
    def own_index(self) -> tuple[int, ...]:
        """What sets this process' dropout apart; nothing where there is one process."""
        return () if self.size == 1 else (self.rank,)

    def share_of(self, batch: int) -> slice:
        """This process' images of a batch.

        Raises:
            InputError: The batch cannot be shared equally.
        """
        if batch % self.size:
            raise InputError(
                f"batch={batch} cannot be shared by {self.size} devices; choose a multiple"
            )
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the team."""
        if self.size == 1:
            return module
        # EDM's augmentation layer has no part in distillation.
        return DistributedDataParallel(module, find_unused_parameters=True)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the team; the same on all."""
        if self.size == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total / self.size
