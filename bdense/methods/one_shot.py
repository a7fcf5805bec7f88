"""One student for a whole space of branch weights, which is told where in it it is trained.

A loss-conditional student (Dosovitskiy & Djolonga 2020, You Only Train Once): for every image
coordinates u of the space are drawn anew, the student is told them through its step condition, and
the image's loss has the weights w_k(u). Told one point, it stands for a student trained there.

B batch, K branches, C channels, H x W pixels, d coordinates.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.step_condition import require_no_condition_yet, with_step_condition
from bdense.errors import InputError
from bdense.methods.method import AnyConfig, Inputs, Method, MethodConfig, Stage, StagePlan
from bdense.randomness import Stream, generator
from bdense.training.stage import Branches, BranchLosses, Update
from bdense.weights.space import Uniform, WeightSpace
from bdense.weights.weighting import BranchWeighting

# The embedding is made for numbers of time stamps, N + 1: cosines and sines of up to 1 radian a
# unit. Over 2 to 8 they tell points apart, and near ones stay alike.
FIRST, SPAN = 2.0, 6.0


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The coordinates of a weight space, as a student is told them.

    Attributes:
        box: [d] the range of each coordinate.
    """

    space: WeightSpace
    num_branches: int
    box: tuple[Uniform, ...]

    def __len__(self) -> int:
        """The number d of coordinates."""
        return len(self.box)

    def draw(self, count: int, seed: int, *index: int) -> Tensor:
        """[B, d] points for the images of a batch, evenly spread along each coordinate.

        A Latin hypercube (McKay et al. 1979): in each coordinate, one image in each B-th part.
        """
        draw = generator(seed, Stream.ONE_SHOT, *index)
        parts = torch.stack([torch.randperm(count, generator=draw) for _ in self.box], dim=1)
        inside = torch.rand(count, len(self), generator=draw, dtype=torch.float64)
        low, high = self._bounds()
        return low + (high - low) * (parts + inside) / count

    def spread(self, count: int) -> Tensor:
        """[count, d] points spread over the box: even steps, of several coordinates Sobol's."""
        if len(self) == 1:
            share = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
        else:
            sobol = torch.quasirandom.SobolEngine(len(self))  # type: ignore[no-untyped-call]
            share = sobol.draw(count, dtype=torch.float64)
        low, high = self._bounds()
        return low + (high - low) * share

    def embedded(self, points: Tensor) -> Tensor:
        """[B, d] float64 points as the student is told them: the box becomes 2 to 8."""
        low, high = self._bounds()
        width = torch.where(high > low, high - low, 1.0)
        return FIRST + SPAN * (points - low) / width

    def weights(self, points: Tensor) -> Tensor:
        """Branch weights at points [B, d], of sum K: their scale is no coordinate.

        Returns:
            [K, B] float64, or [S, K, B] of each of an iteration's S updates.

        Raises:
            InputError: The space has no weights there.
        """
        found = [self._weights(tuple(point)) for point in points.tolist()]
        return torch.stack(found, dim=-1)

    def _weights(self, point: tuple[float, ...]) -> Tensor:
        weights = self.space.weighting(self.space.at(point), self.num_branches).weights()
        return weights * (self.num_branches / weights.sum(-1, keepdim=True))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """[d] and [d] float64."""
        ranges = [(each.low, each.high) for each in self.box]
        low, high = torch.tensor(ranges, dtype=torch.float64).unbind(1)
        return low, high

    def describe(self) -> dict[str, Any]:
        """JSON values; equal descriptions draw equal points."""
        axes = zip(self.space.axes, self.box, strict=True)
        return {"space": self.space.name, **{name: [each.low, each.high] for name, each in axes}}


class OneShotDenoiser(NetworkDenoiser):
    """A one-shot student at given points as an ordinary denoiser; it shares the network.

    Args:
        student: With a step condition.
        embedded: [d] the point of all images, or [B, d] of each of a batch
            (``Coordinates.embedded``).
    """

    def __init__(self, student: NetworkDenoiser, embedded: Tensor) -> None:
        super().__init__(student.model, student.precond)
        self.train(student.training)
        self.execution = student.execution
        self.embedded = embedded

    @property
    def step_condition(self) -> bool:
        """Callers do not pass ``num_points``."""
        return False

    def branches(self, *args: Any, **given: Any) -> Tensor:  # noqa: ANN401
        return super().branches(*args, num_points=self.embedded, **given)


@dataclass(frozen=True, eq=False)
class OneShotLosses:
    """Losses of images that each have branch weights of their own, [K, B]."""

    losses: BranchLosses
    weights: Tensor

    @property
    def per_branch(self) -> Tensor:
        return self.losses.per_branch

    @property
    def keeps_graph(self) -> bool:
        return self.losses.keeps_graph

    def weighted(self, weights: Tensor) -> Tensor:
        """For ``weights`` [K] that scale the images' own, 1 or, of sum 1, 1 / K."""
        return self.losses.weighted(weights.to(self.weights)[:, None] * self.weights)


@dataclass(frozen=True, eq=False)
class OneShotUpdate:
    """An update in which the student is called with each image's point.

    Attributes:
        embedded: [B, d] the points.
        weights: [K, B] branch weights there.
    """

    update: Update
    embedded: Tensor
    weights: Tensor

    @property
    def stream(self) -> tuple[int, ...]:
        return self.update.stream

    @property
    def where(self) -> Mapping[str, int]:
        return self.update.where

    def __call__(self, branches: Branches) -> OneShotLosses:
        at_points = functools.partial(branches, num_points=self.embedded)
        return OneShotLosses(self.update(at_points), self.weights)


@dataclass(frozen=True, eq=False, kw_only=True)
class OneShotStage:
    """A method's stage whose student is told its weights; what is not here is that stage's own.

    Attributes:
        make: Makes the method's own stage for a teacher.
        teacher: Of the stage; a ``OneShotDenoiser`` where it is told the images' points, too.
        start: What the student starts as, with a step condition.
        index: Keeps the draws of several stages of one seed apart.
    """

    coordinates: Coordinates
    make: Callable[[NetworkDenoiser], Stage]
    teacher: NetworkDenoiser
    start: NetworkDenoiser
    index: int
    stage: Stage = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage", self.make(self.teacher))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever a stage has
        if name == "stage":  # not there yet, as in unpickling
            raise AttributeError(name)
        return getattr(self.stage, name)

    @property
    def kind(self) -> str:
        return f"{self.stage.kind}-one-shot"

    def metadata(self) -> dict[str, Any]:
        return self.stage.metadata() | {"one_shot": self.coordinates.describe()}

    def batch(self, iteration: int, images: slice) -> tuple[Any, Tensor]:
        """The method's batch, and [B, d] the images' points."""
        points = self.coordinates.draw(self.batch_size, self.seed, self.index, iteration)
        return self.stage.batch(iteration, images), points[images]

    def updates(self, iteration: int, batch: tuple[Any, Tensor]) -> Iterator[OneShotUpdate]:
        own_batch, points = batch
        embedded, weights = self.coordinates.embedded(points), self.coordinates.weights(points)
        if isinstance(self.teacher, OneShotDenoiser):
            self.teacher.embedded = embedded
        for index, update in enumerate(self.stage.updates(iteration, own_batch)):
            yield OneShotUpdate(
                update, embedded, weights if weights.dim() == 2 else weights[index]
            )

    def describe(self, weighting: BranchWeighting) -> dict[str, Any]:
        return self.stage.describe(weighting) | _described(self.coordinates)

    def on(self, device: torch.device) -> "OneShotStage":
        return replace(self, teacher=self.teacher.on(device), start=self.start.on(device))


class OneShot(Method):
    """A method whose students are told their weights.

    Its config is ``for_one_shot`` of the method's.

    Args:
        method: Any with losses of single images.
        coordinates: Of the weight space.
    """

    name: ClassVar[str] = "one-shot"
    title: ClassVar[str] = "one-shot"
    paper: ClassVar[str] = "You Only Train Once (Dosovitskiy & Djolonga 2020)"
    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, method: Method, coordinates: Coordinates) -> None:
        self.method, self.coordinates = method, coordinates

    def student_at(self, student: NetworkDenoiser, point: tuple[float, ...]) -> OneShotDenoiser:
        """The student told one point of the space, [d]."""
        points = torch.tensor([point], dtype=torch.float64)
        return OneShotDenoiser(student, self.coordinates.embedded(points)[0])

    def plan(
        self, config: AnyConfig, teacher: NetworkDenoiser | None = None
    ) -> tuple[StagePlan, ...]:
        return self.method.plan(config, teacher)

    def check(
        self, config: AnyConfig, teacher: NetworkDenoiser, metadata: Mapping[str, Any]
    ) -> None:
        self.method.check(config, teacher, metadata)
        if teacher.step_condition:
            raise InputError(
                "the teacher has a step condition already, through which a one-shot student would "
                "be told its weights; give a teacher without, or search without one_shot"
            )
        require_no_condition_yet(teacher, len(self.coordinates))

    def stage(
        self, plan: StagePlan, teacher: NetworkDenoiser, config: AnyConfig, inputs: Inputs
    ) -> Stage:
        make = functools.partial(self._own_stage, plan, config, inputs)
        if not plan.branched:
            return make(teacher)
        if teacher.step_condition:  # the student of the stage before
            start: NetworkDenoiser = teacher
            teacher = OneShotDenoiser(teacher, torch.full((len(self.coordinates),), FIRST))
        else:
            start = with_step_condition(teacher, seed=inputs.seed, values=len(self.coordinates))
        stage = OneShotStage(
            coordinates=self.coordinates, make=make, teacher=teacher, start=start, index=plan.nfe
        )
        return cast("Stage", stage)

    def _own_stage(
        self, plan: StagePlan, config: AnyConfig, inputs: Inputs, teacher: NetworkDenoiser
    ) -> Stage:
        return self.method.stage(plan, teacher, config, _live(inputs))

    def identity(
        self,
        config: AnyConfig,
        teacher: NetworkDenoiser,
        inputs: Inputs,
        weighting: BranchWeighting,
    ) -> dict[str, Any]:
        own = self.method.identity(config, teacher, _live(inputs), weighting)
        return own | _described(self.coordinates)


def _described(coordinates: Coordinates) -> dict[str, Any]:
    return {f"one_shot.{name}": value for name, value in coordinates.describe().items()}


def _live(inputs: Inputs) -> Inputs:
    """Without recordings: no other student would use them."""
    return replace(inputs, recordings=None)
