"""What a distillation method is: a config of knobs, a plan of stages, and the stages themselves.

A method is one file: a ``MethodConfig`` with its knobs, a ``Stage`` that the training loop runs,
and a ``Method`` that makes the stages. Its name goes into ``bdense.methods.METHODS``, or into an
entry point of the group ``bdense.methods``.
"""

import abc
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeAlias

from bdense.arguments import require_types
from bdense.data.datasets import Dataset
from bdense.diffusion.conditions import Conditions
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.grid_knobs import GridKnobs
from bdense.diffusion.guidance import no_null, null_for
from bdense.diffusion.preconditioning import levels_on
from bdense.diffusion.sampling import Sampler, levels_of, samplers_from, served_metadata
from bdense.diffusion.schedules import Schedule
from bdense.errors import InputError
from bdense.files import plain_json
from bdense.knobs import KnobError, Knobs, knob, knobs_of
from bdense.methods import YOUNGER
from bdense.methods import StagePlan as StagePlan
from bdense.models.latents import draws_latents
from bdense.training.optimisation import OptimisationConfig
from bdense.training.stage import Stateless, Training
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

    @property
    def num_branches(self) -> int:
        """K with dense supervision."""
        return 1

    @property
    def num_intervals(self) -> int:
        """S, the intervals that every iteration trains, by an update each; 1 where they vary."""
        return 1

    def for_one_shot(self, length: float) -> Self:
        """The config of a one-shot training, ``length`` times as long.

        See ``bdense.methods.one_shot``. A method whose losses take weights [K, B] overrides it.

        Raises:
            InputError: No student of the method, or of these knobs, can be told its weights.
        """
        raise InputError(
            "a one-shot search weighs each image by itself, and this method has no losses of "
            "single images; choose sfd or progressive, or search without one_shot"
        )

    @classmethod
    def usual(cls, metadata: Mapping[str, Any], teacher: NetworkDenoiser) -> dict[str, Any]:
        """Knobs that the teacher settles where they are not given, such as noise levels.

        Args:
            metadata: Of its file; a student's names its own levels.
        """
        return {}

    def as_dict(self) -> dict[str, Any]:
        """The knobs as ``read`` takes them and a file holds them: lists stand for tuples."""
        return plain_json(asdict(self))

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

    def require_guidable(self, teacher: NetworkDenoiser, metadata: Mapping[str, Any]) -> None:
        """Refuse guidance of a teacher that was not trained for it."""
        network = teacher.model
        if metadata.get("guidance", bool(network.text_dim) or network.has_null_class):
            return
        for name in ("guidance_teacher", "guidance_student"):
            if (scale := getattr(self, name)) != 1:
                raise no_null(scale, name)

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

    def levels_for(self, teacher: NetworkDenoiser) -> Schedule:
        """The noise levels, discrete ones in the teacher's own times."""
        levels = levels_on(self.levels, teacher.precond)
        assert isinstance(levels, Schedule)
        return levels

    @classmethod
    def usual(cls, metadata: Mapping[str, Any], teacher: NetworkDenoiser) -> dict[str, Any]:
        """The noise levels that the teacher knows; no analytical first step for one of latents.

        The analytical slope is that of data of mean 0 and variance 1, which latents need not be.
        """
        levels = levels_of(metadata, teacher.precond)
        # A student's steps are known from its sampler.
        if "afs" not in knobs_of(cls) or samplers_from(metadata):
            return levels
        return {**levels, "afs": False} if draws_latents(teacher, metadata) else levels


@dataclass(frozen=True, slots=True)
class Recordings:
    """Where a teacher's trajectories are recorded once, to be shared by many students.

    Attributes:
        root: Folder; each recording has a folder of its own in it.
    """

    root: Path
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        require_types(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """What stages learn from besides the teacher.

    Attributes:
        seed: Seed of batches, noise and dropout.
        recordings: Where a method that can record its teacher's trajectories keeps them; None
            computes them anew for each student.
        metadata: Of the first teacher's file; a student's names its levels.
        conditions: Override the teacher's own, for example with prompts.
    """

    dataset: Dataset | None = None
    seed: int = 0
    recordings: Recordings | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
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

    def conditions_for(self, teacher: NetworkDenoiser) -> Conditions:
        """The kind of condition of a batch."""
        return teacher.conditions if self.conditions is None else self.conditions


def require_pixels(
    config: "MethodConfig",
    of_pixels: Mapping[str, Collection[object]],
    teacher: NetworkDenoiser,
    metadata: Mapping[str, Any],
) -> None:
    """Refuse settings that only make sense for pixels with a teacher of latents.

    Args:
        of_pixels: Values of its knobs.
    """
    if not draws_latents(teacher, metadata):
        return
    for name, values in of_pixels.items():
        if (value := getattr(config, name)) in values:
            said = str(value).lower()
            raise KnobError(name, f"{said} is for pixels, and the teacher works on latents")


def require_shape(dataset: Dataset, shape: tuple[int, ...]) -> None:
    """Refuse a data set whose images are not of the teacher's shape (C, H, W)."""
    if dataset.shape != shape:
        given, wanted = (" x ".join(map(str, each)) for each in (dataset.shape, shape))
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


class MethodStage(Stateless, abc.ABC):
    """A stage with the sizes of its config, which has ``num_updates``, too.

    It keeps nothing between iterations, unless it overrides what ``Stateless`` does.
    """

    config: AnyConfig

    @property
    @abc.abstractmethod
    def sampler(self) -> Sampler:
        """How its student draws images."""

    @property
    def num_updates(self) -> int:
        return int(self.config.num_updates)

    @property
    def num_branches(self) -> int:
        return int(self.config.num_branches)

    @property
    def batch_size(self) -> int:
        return int(self.config.batch)

    @property
    def dropout(self) -> bool:
        return bool(self.config.dropout)

    @property
    def optimisation(self) -> AnyConfig:
        return self.config

    def metadata(self) -> dict[str, Any]:
        return served_metadata([self.sampler])


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
    def check(
        self, config: AnyConfig, teacher: NetworkDenoiser, metadata: Mapping[str, Any]
    ) -> None:
        """Refuse a teacher that cannot be distilled so, before anything is spent.

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
            teacher: The student of the stage before, or the first teacher; on the device to train
                on.
        """

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
