"""What a distillation method is: a config of knobs, a plan of stages, and the stages themselves.

A method is one file: a ``MethodConfig`` with its knobs, a ``Stage`` that the training loop runs,
and a ``Method`` that makes the stages. Its name goes into ``bdense.methods.METHODS``, or into an
entry point of the group ``bdense.methods``.
"""

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

from bdense.arguments import require_types
from bdense.data.datasets import Dataset
from bdense.diffusion.conditions import Conditions
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.grid_knobs import GridKnobs
from bdense.diffusion.guidance import no_null, null_for
from bdense.diffusion.sampling import Sampler, levels_of
from bdense.errors import InputError
from bdense.knobs import KnobError, Knobs, knob
from bdense.methods import YOUNGER
from bdense.methods.plan import StagePlan as StagePlan
from bdense.models.latents import draws_latents
from bdense.training.optimisation import OptimisationConfig
from bdense.training.stage import Training
from bdense.weights.weighting import BranchWeighting

if TYPE_CHECKING:
    from bdense.methods.recordings import TrajectoryStore

# Each method takes only its own config, which the base class cannot express.
AnyConfig: TypeAlias = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig(OptimisationConfig):
    """The knobs that every method has; a method adds its own and may change the defaults."""

    batch: int = knob(128, "images in each iteration", low=1)
    dropout: bool = knob(True, "train with the teacher's own dropout")

    def __post_init__(self) -> None:
        OptimisationConfig.__post_init__(self)
        if self.batch % self.accumulate:
            raise KnobError(
                "accumulate",
                f"{self.accumulate} parts cannot share batch={self.batch} equally; choose a "
                "divisor of it",
            )

    def told(self, length: float) -> Self:
        """For a one-shot student (``bdense.methods.one_shot``): so many times as long.

        A method whose losses take weights [K, B] overrides it.

        Raises:
            InputError: No student of the method, or of these knobs, can be told its weights.
        """
        raise InputError(
            "a one-shot search weighs each image by itself, and this method has no losses of "
            "single images; choose sfd or progressive, or search without one_shot"
        )

    def as_dict(self) -> dict[str, Any]:
        """The knobs as ``read`` takes them and a file holds them: lists stand for tuples."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def identity(self) -> dict[str, Any]:
        """``as_dict`` without those of ``YOUNGER`` that change nothing."""
        return {
            name: value
            for name, value in self.as_dict().items()
            if (name, value) not in YOUNGER.items()
        }


# Without slots, so that it can be the second base of a class that has them.
@dataclass(frozen=True, kw_only=True)
class GuidanceKnobs(Knobs):
    """Classifier-free guidance in training; a student is sampled at its own."""

    heading: ClassVar[str] = "guidance"

    guidance_teacher: float = knob(
        1.0,
        "classifier-free guidance of the teacher, of a model with a null condition; 1 is the "
        "condition alone",
    )
    guidance_student: float = knob(
        1.0,
        "classifier-free guidance of the student, in training and sampling; where it is neither 1 "
        "nor 0, each of its predictions costs two network evaluations",
    )

    def require_null(self, conditions: Conditions) -> None:
        """Raise an ``InputError`` where a scale needs a null condition and there is none."""
        for scale in (self.guidance_teacher, self.guidance_student):
            null_for(scale, conditions)

    def require_guidable(self, teacher: NetworkDenoiser, known: Mapping[str, Any]) -> None:
        """Refuse guidance of a teacher that was not trained for it.

        Args:
            teacher: The first teacher.
            known: Metadata of its file.
        """
        network = teacher.model
        if known.get("guidance", bool(network.text_dim) or network.has_null_class):
            return
        for name in ("guidance_teacher", "guidance_student"):
            if (scale := getattr(self, name)) != 1:
                raise KnobError(name, str(no_null(scale)))

    def require_one_call(self) -> None:
        """Refuse a guided student where each image is told its weights."""
        if self.guidance_student not in (0, 1):
            raise KnobError(
                "guidance_student",
                f"{self.guidance_student:g}: a student cannot be told its weights under guidance; "
                "take 1",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GridConfig(MethodConfig, GridKnobs):
    """The knobs of a method of one stage that follows its teacher along a grid of levels."""

    kimg: float = knob(200.0, "training length in thousands of images", low=0.001, high=10**9)

    @property
    def images(self) -> int:
        """``kimg`` in images."""
        return round(self.kimg * 1000)

    @property
    def num_updates(self) -> int:
        """ceil(images / batch)."""
        return -(-self.images // self.batch)


@dataclass(frozen=True, slots=True)
class Recordings:
    """Where a teacher's trajectories are recorded once, to be shared by many students.

    Attributes:
        root: Folder; each recording has a folder of its own in it.
        dtype: ``float32`` or ``float16``.
    """

    root: Path
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """What stages learn from besides the teacher.

    Attributes:
        dataset: For methods that need data.
        seed: Seed of batches, noise and dropout.
        recordings: Where a method that can record its teacher's trajectories keeps them; None
            computes them anew for each student.
        known: Metadata of the first teacher's file; a student's names its levels.
        conditions: In place of the teacher's own, such as prompts.
    """

    dataset: Dataset | None = None
    seed: int = 0
    recordings: Recordings | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        require_types(self)

    def require_dataset(self, method: str) -> Dataset:
        """The data set.

        Raises:
            InputError: There is none.
        """
        if self.dataset is None:
            raise InputError(f"method {method} learns from images; give a data set (data)")
        return self.dataset


def require_images(dataset: Dataset, teacher: NetworkDenoiser, conditions: Conditions) -> None:
    """Refuse a data set of other images than the teacher's, or without its conditions.

    Raises:
        InputError: Says in what they differ.
    """
    require_shape(dataset, teacher)
    conditions.require(dataset)


def require_pixels(
    config: "MethodConfig",
    of_pixels: Mapping[str, Collection[object]],
    teacher: NetworkDenoiser,
    known: Mapping[str, Any],
) -> None:
    """Refuse settings that make sense of pixels alone for a teacher of latents.

    Args:
        config: Of a method.
        of_pixels: Values of its knobs.
        teacher: The first teacher.
        known: Metadata of its file.
    """
    if not draws_latents(teacher, known):
        return
    for name, values in of_pixels.items():
        if (value := getattr(config, name)) in values:
            said = str(value).lower()
            raise KnobError(name, f"{said} is for pixels, and the teacher works on latents")


def require_shape(dataset: Dataset, teacher: NetworkDenoiser) -> None:
    """Refuse a data set of images of another shape than the teacher's."""
    require_same_shape(dataset, dataset.shape, teacher.image_shape)


def require_same_shape(dataset: Dataset, theirs: Sequence[int], own: Sequence[int]) -> None:
    """Refuse a data set whose (C, H, W) is not the teacher's."""
    if tuple(theirs) != tuple(own):
        given, wanted = (" x ".join(map(str, shape)) for shape in (theirs, own))
        raise InputError(
            f"data {dataset.name} has images of {given}, and the teacher is a network for "
            f"{wanted}; give the data set that it was trained on, with the same padding"
        )


class Stage(Training, Protocol):
    """One training of a method."""

    @property
    def sampler(self) -> Sampler:
        """How its student draws images."""

    def metadata(self) -> dict[str, Any]:
        """Metadata of the student's file, with its ``sampler``, as JSON values."""


class Method(abc.ABC):
    """A distillation method; its ``config`` arguments are of its own ``Config``."""

    name: ClassVar[str]
    title: ClassVar[str]  # for people, such as SFD
    paper: ClassVar[str]  # its full name and source, for model cards
    Config: ClassVar[type[MethodConfig]]
    needs_data: ClassVar[bool] = False

    @abc.abstractmethod
    def plan(
        self, config: AnyConfig, teacher: NetworkDenoiser | None = None
    ) -> tuple[StagePlan, ...]:
        """The stages in order; with a teacher, those that it needs."""

    @abc.abstractmethod
    def num_branches(self, config: AnyConfig) -> int:
        """K with dense supervision."""

    def num_intervals(self, config: AnyConfig) -> int:
        """S, the intervals that every iteration trains, by an update each; 1 where they vary."""
        return 1

    @abc.abstractmethod
    def check(self, config: AnyConfig, teacher: NetworkDenoiser, known: Mapping[str, Any]) -> None:
        """Refuse a teacher that cannot be distilled so, before anything is spent.

        Args:
            config: Of the method.
            teacher: The first teacher.
            known: Metadata of its file.

        Raises:
            InputError: Levels, steps or the prediction type do not fit, or the teacher is itself
                a student where the method takes none.
        """

    @abc.abstractmethod
    def stage(
        self, plan: StagePlan, teacher: NetworkDenoiser, config: AnyConfig, inputs: Inputs
    ) -> Stage:
        """One stage.

        Args:
            plan: Which one.
            teacher: The student of the stage before, or the first teacher; on the device to train
                on.
            config: Of the method.
            inputs: What is learned from besides.
        """

    def usual(self, known: Mapping[str, Any], teacher: NetworkDenoiser) -> dict[str, Any]:
        """Knobs that the teacher settles where they are not given: noise levels that it knows.

        Args:
            known: Metadata of its file; a student names its own levels.
            teacher: The first teacher.
        """
        return levels_of(known, teacher.precond) if issubclass(self.Config, GridKnobs) else {}

    def teacher_sampler(self, config: AnyConfig, teacher: NetworkDenoiser) -> Sampler | None:
        """How the teacher itself is measured beside its students; None: it is not."""
        return None

    def recording(
        self, config: AnyConfig, teacher: NetworkDenoiser, inputs: Inputs
    ) -> "TrajectoryStore | None":
        """What can be recorded beforehand, with ``inputs.recordings``; None: nothing."""
        return None

    def identity(
        self,
        config: AnyConfig,
        teacher: NetworkDenoiser,
        inputs: Inputs,
        weighting: BranchWeighting,
    ) -> dict[str, Any]:
        """What must agree for kept students to belong to the same run: flat JSON values."""
        first = self.plan(config, teacher)[0]
        return self.stage(first, teacher, config, inputs).describe(weighting)
