"""The sections of a study file, each a class of knobs.

Counts of images are in kimg (thousands), sizes in GiB, times in seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from bdense.data.prompts import PROMPTS
from bdense.errors import InputError
from bdense.execution import CompileMode, Execution
from bdense.knobs import KnobError, Knobs, knob, knob_of, knobs_of
from bdense.methods.plan import StagePlan
from bdense.training.teacher_knobs import TeacherKnobs, TeacherRecipe

_SEEDS: dict[str, Any] = {"low": 0, "below": 2**31}

# Short for a search of its one-shot training's best points.
ONE_SHOT_PLAN = "one-shot"
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

    @property
    def is_given(self) -> bool:
        """Whether there is one, as every method but ``command`` needs."""
        return any(getattr(self, name) is not None for name in knobs_of(type(self)))


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
class OneShotSpec(Knobs):
    """One student told its weights is trained first; the best points of its curve are trials."""

    length: float = knob(3.0, "length of its training, in those of a trial", above=0)
    points: int | None = knob(
        None,
        "points of the space at which it is measured, on latents that no trial is judged on",
        low=2,
        none="13, or 16 for each coordinate of several",
    )
    best: int = knob(3, "points of the lowest FID that become trials, before others", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan(Knobs):
    """Points proposed by a sampler, beside plain distillation and uniform weights."""

    trials: int = knob(help="trials in all, counting those that are done", low=1)
    one_shot: OneShotSpec | None = knob(
        None,
        "ask one training for the whole curve of FIDs first; `plan: one-shot` is {one_shot: {}}, "
        "whose trials are its best points alone",
    )
    replicates: int = knob(
        3,
        "training seeds of plain distillation and uniform weights, seeds.training and those after "
        "it; from 2 on a study knows its noise, and how small a difference it can tell",
        low=1,
    )
    race: int = knob(
        0,
        "how many of the trials are replicates: the most promising points under the further seeds "
        "of the baselines, in place of new points; needs replicates from 2 on",
        low=0,
    )
    stop: bool = knob(
        False,
        "end the search once no point could still beat the recommended arm by more than the least "
        "difference that the study can tell; needs replicates from 3 on",
    )
    prior: tuple[str, ...] = knob(
        (),
        "earlier searches in the storage: their best points are tried first, and their trials "
        "count in the surrogate, less where they disagree",
    )
    prior_other: bool = knob(
        False, "use priors of another data set, teacher, method or weight space too"
    )
    sampler: Member = knob(
        Member("TPESampler"),
        "a class of optuna.samplers and its arguments; its seed is seeds.sampler",
    )
    pruner: Member | None = knob(
        None,
        "a class of optuna.pruners and its arguments, asked at each intermediate FID; needs at, "
        "or a method of several stages",
    )
    at: tuple[float, ...] = knob(
        (),
        "fractions of the training after which the student is measured, ascending; a method of "
        "several stages is measured after each of them",
        above=0,
        below=1,
    )
    images: int | None = knob(
        None, "images drawn for each intermediate FID", low=2, none="evaluation.images"
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.one_shot is not None and self.trials < self.one_shot.best:
            raise KnobError(
                "trials",
                f"{self.trials} are fewer than the best points of the one-shot search, "
                f"one_shot.best {self.one_shot.best}; raise one or lower the other",
            )
        if list(self.at) != sorted(set(self.at)):
            raise KnobError("at", f"{list(self.at)} must ascend, each fraction once; sort it")
        if self.images is not None and not self.at:
            raise KnobError(
                "images",
                f"{self.images} are drawn at no fraction of the training; give at: [...] or drop "
                "images",
            )
        # With two seeds the least difference is 12.7 standard deviations: any search would end.
        for name, fewest in (("race", 2), ("stop", 3)):
            if getattr(self, name) and self.replicates < fewest:
                raise KnobError(
                    name,
                    f"needs the noise of several seeds, and replicates is {self.replicates}; "
                    f"raise replicates to {fewest} or more, or drop {name}",
                )
        if self.race >= self.trials:
            raise KnobError(
                "race",
                f"{self.race} of {self.trials} trials leaves no new point; lower race or raise "
                "trials",
            )

    @property
    def points(self) -> int:
        """Trials that are new points."""
        return self.trials - self.race


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmsPlan(Knobs):
    """Given arms, each trained under each seed."""

    arms: tuple[str | dict[str, Any], ...] = knob(
        ("plain", "uniform"),
        "plain, uniform, a mapping of weight parameters (a, b; rule, strength), or {winner_of: "
        "STUDY}, another study's confirmed winner; of method command defaults, or a mapping of "
        "all its weights",
    )
    seeds: tuple[int, ...] = knob((0, 1, 2), "training seeds, the same for all arms", **_SEEDS)
    variants: tuple[dict[str, Any], ...] = knob(
        ({},), "settings of the method that differ from the study's: arms are trained under each"
    )
    latents: Literal["shared", "fresh"] = knob(
        "shared",
        "shared: all rows are judged on the latents of seeds.evaluation; fresh: each seed on its "
        "own",
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise KnobError("seeds", f"{list(self.seeds)} must name one seed or more, each once")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsSpec(Knobs):
    """Seeds of a search: all trials share training seed and latents."""

    training: int = knob(0, "seed of each training", **_SEEDS)
    evaluation: int = knob(0, "seed of the latents that images are drawn from", **_SEEDS)
    sampler: int = knob(0, "seed of the sampler", **_SEEDS)

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
        3, "number of points to try: those of lowest posterior mean over all evaluations", low=1
    )
    seeds: int = knob(3, "number of fresh seeds, 3 or more, of training and latents", low=3)
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
