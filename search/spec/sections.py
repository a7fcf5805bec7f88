"""The sections of a study file, each a class of knobs.

Counts of images are in kimg (thousands), sizes in GiB, times in seconds.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from bdense.data.prompts import PROMPTS
from bdense.errors import InputError
from bdense.execution import CompileMode, Execution
from bdense.knobs import KnobError, Knobs, knob, knob_of
from bdense.methods import StagePlan
from bdense.training.teacher_knobs import TeacherKnobs, TeacherRecipe

SEEDS: dict[str, Any] = {"low": 0, "below": 2**31}  # of knobs that are seeds
# A study with more would never end.
MOST_ROWS, MOST_SEEDS = 1_000_000, 1000

# Images of each FID of a pilot, which decides how many a study takes.
PILOT_IMAGES = 4096
# Images of a FID in the literature.
MOST_IMAGES = 50_000


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a registry by its name, with its own settings beside it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any, key: str) -> Self:  # noqa: ANN401  as YAML has it
        """Read a mapping with a ``name``, or only the name.

        Raises:
            KnobError: It is neither.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls(given)
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            raise KnobError(key, f"must be a mapping with a name and its settings, got {given!r}")
        return cls(given["name"], {key: value for key, value in given.items() if key != "name"})

    def __str__(self) -> str:
        return self.name

    def with_options(self, changes: Mapping[str, Any]) -> Self:
        """This member with some settings replaced."""
        return type(self)(self.name, {**self.options, **changes})


def as_plain(value: Any) -> Any:  # noqa: ANN401  any part of a spec
    """Dataclasses as mappings, members with their name among their settings, tuples as lists."""
    if isinstance(value, Member):
        return {"name": value.name, **as_plain(value.options)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {each.name: as_plain(getattr(value, each.name)) for each in fields}
    if isinstance(value, Mapping):
        return {key: as_plain(each) for key, each in value.items()}
    return [as_plain(each) for each in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTraining(TeacherKnobs):
    """A small teacher trained on the study's data, once, and cached."""

    threads: int = knob(1, "CPU threads; they decide the last bits of the weights", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec(Knobs):
    """A checkpoint, a training, or a recipe."""

    checkpoint: str | None = knob(
        None,
        "a file (our safetensors, pickle of EDM or SFD), a folder of bdense or in diffusers' "
        "format, or the name of a published one, which is downloaded once; it settles noise "
        "levels that are not given",
    )
    train: TeacherTraining | None = knob(None, "how to train one on the study's own data")
    recipe: TeacherRecipe | None = knob(
        None,
        "a small teacher that is made here once: latent-digits, of latents of the digits, "
        "conditioned on prompts such as `a three`",
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        given = [name for name in ("checkpoint", "train", "recipe") if getattr(self, name)]
        if len(given) > 1:
            raise InputError(
                "give one of checkpoint: FILE, train: {...} and recipe: NAME, got "
                f"{' and '.join(given)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec(Knobs):
    """How a student is judged: FID of so many images against the study's data, or a file."""

    images: Literal["auto"] | int = knob(
        MOST_IMAGES,
        f"images drawn of each student; auto, of a search: {PILOT_IMAGES} to {MOST_IMAGES}, so "
        "many that the latents' noise is half of the training seeds' or less, which a pilot "
        "measures first: plain distillation and uniform weights under three seeds",
        low=2,
    )
    extractor: str = knob(
        "inception",
        "feature network: inception, dinov2, torchscript:FILE (a program, which each worker runs: "
        "trust its source), or a small classifier trained once "
        "here (digits-, fashion-mnist-, cifar10-classifier)",
    )
    batch: int = knob(128, "images drawn at a time", low=1)
    metrics: tuple[Literal["fid", "kid", "prc"], ...] = knob(
        ("fid",), "what is measured; must include fid, which a search minimises"
    )
    reference: str | None = knob(
        None,
        "EDM's .npz of statistics in place of the data set's: a file, or the name of a public one",
    )
    prompts: str | None = knob(
        None,
        f"{PROMPTS}, of a text-conditional teacher: image i has prompt i, from the start again "
        "after the last",
        none="the study's prompts",
    )
    clip_score: str | None = knob(
        None,
        "CLIP model that scores each student's images against their prompts, beside the FID: a "
        "folder or hub id, such as openai/clip-vit-base-patch16",
    )
    guidance: float | None = knob(
        None,
        "classifier-free guidance when sampling, of students that were distilled without: twice "
        "the network evaluations, unless it is 0 or 1",
        none="the method's guidance_student",
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if "fid" not in self.metrics:
            raise InputError(f"metrics {list(self.metrics)} lack fid, which is searched for")
        if self.reference is not None and set(self.metrics) != {"fid"}:
            raise InputError(
                f"metrics {list(self.metrics)} beside fid need single reference images, which a "
                "reference file lacks; drop them, or drop reference to compare with data"
            )

    @property
    def num_images(self) -> int:
        """Images drawn of each student; of auto the pilot's, which are the least."""
        return self.images if isinstance(self.images, int) else PILOT_IMAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcesSpec(Knobs):
    """What one trial holds, how it computes, and when its worker counts as lost."""

    cpus: float = knob(1.0, "CPUs of a trial", above=0)
    gpus: Literal["auto"] | float = knob(
        "auto",
        "GPUs of a trial: auto (one, where there are any), a share of one, or a whole number of "
        "one machine's, which then share every batch",
        low=0,
    )
    threads: int = knob(1, "CPU threads of a trial", low=1)
    deterministic: bool = knob(False, "use only torch's deterministic algorithms")
    compile: bool = knob_of(Execution, "compile", False)
    compile_mode: CompileMode = knob_of(Execution, "compile_mode", "default")
    channels_last: bool = knob_of(Execution, "channels_last", False)
    gradient_checkpointing: bool = knob_of(Execution, "gradient_checkpointing", False)
    checkpoint_seconds: float = knob(60.0, "seconds between checkpoints of a training", above=0)
    lease_seconds: float = knob(60.0, "seconds after which a silent worker counts as lost", low=10)
    max_attempts: int = knob(3, "times a trial is started before it counts as poisoned", low=1)
    log: tuple[str, ...] = knob(
        (),
        "what else records each trial, but not a one-shot training: tensorboard:DIR, "
        "wandb[:PROJECT], mlflow[:URI], or a tracker of another package; a run is called "
        "STUDY/NUMBER",
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        gpus = self.gpus
        if gpus != "auto" and gpus > 1 and gpus % 1:
            raise KnobError(
                "gpus",
                f"{gpus:g} is neither a share of one GPU nor a whole number of them; give 0 to 1, "
                f"{int(gpus)} or {int(gpus) + 1}",
            )

    @property
    def team(self) -> int:
        """GPUs that share a trial's batches; 1 also for a trial without any."""
        return 1 if self.gpus == "auto" else max(1, int(self.gpus))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsSpec(Knobs):
    """Seeds of a search: all trials share training seed and latents."""

    training: int = knob(0, "seed of each training", **SEEDS)
    evaluation: int = knob(0, "seed of the latents that images are drawn from", **SEEDS)
    sampler: int = knob(0, "seed of the sampler", **SEEDS)

    def following(self, count: int) -> list[int]:
        """The training seed and those after it."""
        return [(self.training + index) % 2**31 for index in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoriesSpec(Knobs):
    """Teacher trajectories, of methods that can record them."""

    mode: Literal["recorded", "live"] = knob(
        "recorded", "record once and share, or compute anew in every trial"
    )
    dtype: Literal["float32", "float16"] = knob("float32", "number format of the recorded states")
    max_gib: float = knob(32.0, "most GiB to record for a seed", above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmSpec(Knobs):
    """How the best weights are confirmed under fresh seeds."""

    candidates: int = knob(
        3,
        "number of points to try: those of lowest posterior mean over all evaluations",
        low=1,
        high=MOST_ROWS,
    )
    seeds: int = knob(
        3, "number of fresh seeds, 3 or more, of training and latents", low=3, high=MOST_SEEDS
    )
    method: dict[str, Any] = knob(
        {},
        "settings of the method that differ from the search's, such as kimg of the budget the "
        "winner will be used at, since the best weights move with it",
    )


# Where no other number is asked for: seeds of a transfer or a promotion, weights of a transfer.
FRESH_SEEDS, TRANSFERRED = ConfirmSpec().seeds, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(Knobs):
    """What the engine knows of a spec, readable without torch."""

    title: str = knob(help="the method's short name for people, such as SFD")
    num_branches: int = knob(help="K")
    # Studies of older versions do not have it, nor a space that depends on it.
    num_intervals: int = knob(1, "S, the intervals that every iteration trains")
    batch: int = knob(help="images an update")
    needs_data: bool = knob(help="whether students learn from the data itself")
    stages: tuple[StagePlan, ...] = knob(help="of the method, in order")
