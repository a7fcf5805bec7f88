"""What the training loop trains: a stage, its updates, and their losses by branch.

B batch, K branches, C channels, H x W pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.execution import moved
from bdense.training.optimisation import OptimisationConfig
from bdense.weights.weighting import BranchWeighting

# ``NetworkDenoiser.branches`` of the student, or the same wrapped for several devices.
Branches = Callable[..., Tensor]


class BranchLosses(Protocol):
    """The losses of one update."""

    @property
    def per_branch(self) -> Tensor:
        """[K], differentiable, unweighted, mean over the batch."""

    @property
    def keeps_graph(self) -> bool:
        """Whether later updates of the iteration go backwards through this one's graph, too."""

    def weighted(self, weights: Tensor) -> Tensor:
        """The 0-dim loss to minimise, for weights [K] float64.

        Methods of which a student can be told its weights take [K, B], each image's own, too.
        """


class Update(Protocol):
    """One optimiser step, or a part of it: the forward pass of the branches and their losses."""

    @property
    def stream(self) -> tuple[int, ...]:
        """Names the dropout draws of this update among those of the stage's seed."""

    @property
    def where(self) -> Mapping[str, int]:
        """Where in its iteration an error occurred, such as ``{"interval": 1}``."""

    def __call__(self, branches: Branches) -> BranchLosses:
        """Call the student once; called again, it computes the same."""


class Training(Protocol):
    """A stage as the loop sees it; it travels to other processes by pickle."""

    @property
    def kind(self) -> str:
        """The kind of training, for checkpoints: ``sfd``, for example."""

    @property
    def num_updates(self) -> int:
        """Iterations of the loop."""

    @property
    def num_branches(self) -> int:
        """K with dense supervision; every stage can be trained with one branch, too."""

    @property
    def batch_size(self) -> int:
        """B, images an iteration, over all devices."""

    @property
    def start(self) -> NetworkDenoiser:
        """What the student starts as: one branch, on the device to train on."""

    @property
    def seed(self) -> int:
        """Seed of dropout."""

    @property
    def dropout(self) -> bool:
        """Whether the student trains with the dropout of its network."""

    @property
    def optimisation(self) -> OptimisationConfig:
        """Optimiser, step size, clipping, averaging."""

    def batch(self, iteration: int, images: slice) -> Any:  # noqa: ANN401  the stage's own
        """Some images of that iteration's batch; it depends on (seed, iteration) alone."""

    def updates(self, iteration: int, batch: Any) -> Iterator[Update]:  # noqa: ANN401
        """The updates of one iteration.

        Each is called, and the optimiser has made its step, before the next is asked for. Where
        gradients are accumulated, the batches of all parts are asked side by side. Neither they
        nor ``batch`` wait for a GPU (``bdense.execution.moved``).
        """

    def end(self, iteration: int) -> None:
        """Called after the last update of an iteration, before a checkpoint."""

    def describe(self, weighting: BranchWeighting) -> dict[str, Any]:
        """What must agree for a checkpoint to belong to the same run, as JSON values, flat."""

    def on(self, device: torch.device) -> Self:
        """This stage with its networks on another device."""

    def begin(self, student: NetworkDenoiser) -> None:
        """Called once with the student, branches and all, before it is trained or resumed."""

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps beside student and optimiser, such as a target network."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave."""


class Stateless:
    """A stage that keeps nothing between iterations."""

    def begin(self, student: NetworkDenoiser) -> None:
        """Nothing to do."""

    def end(self, iteration: int) -> None:
        """Nothing to do."""

    def state(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to put back."""


@dataclass(frozen=True, eq=False)
class BranchMeans:
    """[K] losses, each a mean over the batch."""

    per_branch: Tensor
    keeps_graph: bool = field(default=False, kw_only=True)

    def weighted(self, weights: Tensor) -> Tensor:
        return (moved(weights, self.per_branch) * self.per_branch).sum()


@dataclass(frozen=True, eq=False)
class ImageLosses:
    """Losses that are means over images.

    Attributes:
        per_image: [K, B], differentiable, unweighted.
    """

    keeps_graph: ClassVar[bool] = False

    per_image: Tensor

    @property
    def per_branch(self) -> Tensor:
        return self.per_image.mean(1)

    def image_weights(self, weights: Tensor) -> Tensor:
        """[K, 1] or [K, B] weights of each image's branches, for w_k [K] or [K, B] float64."""
        return weights if weights.dim() == 2 else weights[:, None]

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum over the branches, mean over the images."""
        losses = self.per_image
        return (moved(self.image_weights(weights), losses) * losses).sum(0).mean()
