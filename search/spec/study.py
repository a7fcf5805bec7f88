"""A study: what is distilled by which method, what is searched, how it is judged, what it costs.

One form for all methods, for searches and for given arms. A misspelt key is an error and a parsed
spec never changes. Counts of images are in kimg (thousands), sizes in GiB, times in seconds.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from bdense import NUMERICS
from bdense.data.names import (
    LABELS_FILE,
    PROMPTS,
    image_files,
    labels_beside,
    split_fit,
    split_format,
)
from bdense.errors import InputError
from bdense.execution import Execution, Precision
from bdense.files import sha256_file, sha256_model, split_column
from bdense.knobs import KnobError, Knobs, knob, knob_of, knobs_of
from bdense.methods import YOUNGER
from bdense.models.zoo import PROMPT_SETS, PUBLIC_MODELS, REFERENCES
from bdense.training.teacher_knobs import TeacherKnobs, TeacherRecipe
from bdense.weights import WEIGHT_SPACES, space_of
from bdense.weights.spaces import PLAIN, UNIFORM, SearchSpace, WeightSpace
from search.errors import SpecError
from search.spec.command import (
    COMMAND,
    DEFAULTS,
    NOT_FOR_PROGRAMS,
    CommandConfig,
    NamedSpace,
    command_contents,
    refuse_foreign,
)

_SEEDS: dict[str, Any] = {"low": 0, "below": 2**31}

# Short for a search of its one-shot training's best points.
ONE_SHOT_PLAN = "one-shot"

# Folders under the runs that all studies share (search.storage.engine, search.study.artifacts).
TAKEN_NAMES = ("artifacts", "cache")


# Of a pilot, which decides how many a study takes.
PILOT_IMAGES = 4096

# A study from before a knob is a study at its default, under the same fingerprint.
_YOUNGER = {"tail": None, **YOUNGER}


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a registry by its name, with its own settings beside it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any, key: str) -> Self:  # noqa: ANN401  as YAML has it
        """From a mapping with a ``name``, or the name alone.

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
class Metric:
    """What a study's trials are judged by.

    Attributes:
        name: In texts and on axes.
        key: In JSON.
        maximise: Whether more is better.
    """

    name: str = "FID"
    key: str = "fid"
    maximise: bool = False

    @classmethod
    def of(cls, method: Mapping[str, Any]) -> Self:
        """Of a resolved method, its name among its settings."""
        if method.get("name") != COMMAND:
            return cls()
        maximise = method.get("direction") == "maximise"
        return cls(name=str(method.get("metric")), key="value", maximise=maximise)

    def loss(self, value: float) -> float:
        """The value, or its negative, so that lower is better."""
        return -value if self.maximise else value

    @property
    def form(self) -> str:
        """Format of a value for people: a program's may be of any size."""
        return ".3f" if self.key == "fid" else ".4g"

    @property
    def form_of_difference(self) -> str:
        """The same of a difference of two."""
        return "+.2f" if self.key == "fid" else "+.3g"

    def text(self, value: float) -> str:
        """A value for people."""
        return f"{value:{self.form}}"

    @property
    def best(self) -> str:
        """What the best of several values is, in a word."""
        return "highest" if self.maximise else "lowest"

    @property
    def plural(self) -> str:
        """Several of its values."""
        return f"{self.name}s" if self.key == "fid" else f"values of {self.name}"


FID_METRIC = Metric()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec(Knobs):
    """How a student is judged: FID of so many images against the study's data, or a file."""

    images: Literal["auto"] | int = knob(
        50_000,
        f"images drawn of each student; auto: {PILOT_IMAGES} or more, so many that the latents' "
        "noise is half of the training seeds' or less, which a pilot measures first: plain "
        "distillation and uniform weights under three seeds",
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
        # Of two seeds the least difference is 12.7 standard deviations: any search would end.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts(Knobs):
    """What is known of a stage before it is trained, see ``bdense.methods.method.StagePlan``."""

    name: str = knob()
    label: str = knob()
    num_updates: int = knob()
    nfe: int = knob()
    branched: bool = knob()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(Knobs):
    """What the engine knows of a spec, for those that run without torch."""

    title: str = knob(help="the method's short name for people, such as SFD")
    num_branches: int = knob(help="K")
    # Studies of older versions do not have it, nor a space that depends on it.
    num_intervals: int = knob(1, "S, the intervals that every iteration trains")
    batch: int = knob(help="images an update")
    needs_data: bool = knob(help="whether students learn from the data itself")
    stages: tuple[StageFacts, ...] = knob(help="of the method, in order")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec(Knobs):
    """A whole study."""

    name: str = knob(help="lower-case letters, digits and hyphens; also its folder under runs/")
    data: str | None = knob(
        None,
        "what a teacher is trained on and the FID's reference: a name, or folder:, zip:, idx: and "
        "a path; not needed where teacher.checkpoint and evaluation.reference are there and the "
        "method does not learn from data",
    )
    prompts: str | None = knob(
        None,
        f"{PROMPTS}, of a text-conditional teacher: each is as likely in every batch; a method "
        "that learns from images takes them for the captions of the data set's images, or of its "
        "classes, in their order",
    )
    teacher: TeacherSpec = knob(
        TeacherSpec(), "whose steps are distilled; must be given, but for method command"
    )
    method: Member = knob(
        help="a distillation method's name and its settings, or command and a program of yours"
    )
    weights: Member = knob(
        Member("normalised"),
        "a weight space's name and its settings; of method command each weight by its name",
    )
    plan: SearchPlan | ArmsPlan = knob(
        help="a search (trials, ..., or the word one-shot) or given arms (arms, ...)"
    )
    evaluation: EvaluationSpec = knob(EvaluationSpec(), "how students are judged")
    precision: Precision = knob(
        "float32",
        "number format of teacher, training and sampling; features are always float32",
    )
    seeds: SeedsSpec = knob(SeedsSpec(), "seeds of a search")
    trajectories: TrajectoriesSpec = knob(TrajectoriesSpec(), "the teacher's trajectories")
    resources: ResourcesSpec = knob(ResourcesSpec(), "resources of a trial")
    keep_students: int = knob(3, "how many of a search's best students stay on the disk", low=1)
    confirm: ConfirmSpec = knob(ConfirmSpec(), "how a search's best is confirmed")
    # Written by search.spec.resolve, never by users: no knob.
    facts: Facts | None = None

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.name in TAKEN_NAMES:
            raise KnobError(
                "name",
                f"{self.name!r} is a folder under the runs that all studies share; choose another",
            )
        known = self.baselines
        for arm in () if self.is_search else self.given.arms:
            if isinstance(arm, str) and arm not in known:
                raise KnobError(
                    "plan.arms", f"must be {', '.join(known)} or a mapping, got {arm!r}"
                )
        if self.is_command:
            _ = self.program  # refuses its settings
            refuse_foreign(self)
        elif not self.teacher.is_given:
            raise KnobError(
                "teacher",
                "is missing: give one of checkpoint: FILE, train: {...} and recipe: NAME, got "
                "none of them",
            )

    @classmethod
    def read(cls, tree: Mapping[str, Any], where: str = "") -> Self:
        """As ``Knobs.read``, but the error has a line for each section with a mistake."""
        values, problems = dict(tree), []
        facts = values.pop("facts", None)
        for name, known in knobs_of(cls).items():
            try:
                if name in values:
                    values[name] = _section(name, values[name])
                    known.accept(values[name])
            except InputError as error:
                problems.append(str(SpecError.under(name, error)))
        try:
            # Finds keys that are unknown or missing.
            if not problems or values.keys() - knobs_of(cls).keys():
                spec = super(StudySpec, cls).read(values, where)
                return spec if facts is None else replace(spec, facts=Facts.read(facts))
        except InputError as error:
            problems.append(str(error))
        raise InputError("\n".join(dict.fromkeys(problems)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which ``read`` accepts."""
        plain: dict[str, Any] = as_plain(self)
        if self.is_command:
            for name in NOT_FOR_PROGRAMS:
                del plain[name]
        return plain

    @property
    def is_command(self) -> bool:
        """Whether trials are runs of a program of the user's, and nothing is distilled."""
        return self.method.name == COMMAND

    @property
    def program(self) -> CommandConfig:
        """The program of method ``command``."""
        return CommandConfig.read(self.method.options, "method")

    @property
    def metric(self) -> Metric:
        """What rows are judged by."""
        return Metric.of({"name": COMMAND, **self.program.as_dict()} if self.is_command else {})

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines, the simplest first; each has an arm."""
        return (DEFAULTS,) if self.is_command else (PLAIN, UNIFORM)

    @property
    def space(self) -> SearchSpace:
        """Where weights are searched, read from ``weights``."""
        return self.named_space if self.is_command else self.weight_space

    @property
    def named_space(self) -> NamedSpace:
        """The weights of method ``command``.

        Raises:
            KnobError: ``weights`` are branch weights, or are not of this form.
        """
        if self.weights.name != NamedSpace.name:
            raise KnobError(
                "weights",
                f"must be the weights of the program by their names, got {self.weights}; give "
                "{NAME: {low: ..., high: ..., default: ...}}",
            )
        return NamedSpace.read(self.weights.options)

    def space_of(self, params: Mapping[str, Any]) -> SearchSpace:
        """The space of an arm's parameters, which another study may have found.

        Raises:
            InputError: No space has them.
        """
        return self.named_space if self.is_command else space_of(params)

    def require_fitting(self, params: Mapping[str, Any]) -> None:
        """Raise an ``InputError`` for an arm's parameters that this study has no use for."""
        if self.is_command:
            self.named_space.require_fitting(params)
            return
        facts = self.resolved
        space_of(params).require_fitting(params, facts.num_branches, facts.num_intervals)

    @property
    def weight_space(self) -> WeightSpace:
        """The space of branch weights of a distillation.

        Raises:
            InputError: There is no such space, or it refuses a setting.
        """
        if self.weights.name == NamedSpace.name:
            raise KnobError(
                "weights",
                f"must be a mapping with a name and its settings, got {self.weights.options!r}; "
                "only method command has weights by names of your own",
            )
        member: WeightSpace = WEIGHT_SPACES[self.weights.name].read(
            self.weights.options, "weights"
        )
        if self.facts is None:
            return member
        return member.of_method(self.facts.num_branches, self.facts.num_intervals)

    def with_images(self, images: int) -> Self:
        """This study with a number in place of ``evaluation.images: auto``."""
        if self.evaluation.images != "auto":
            return self
        return replace(self, evaluation=replace(self.evaluation, images=images))

    @property
    def is_search(self) -> bool:
        """Whether points are proposed, rather than arms given."""
        return isinstance(self.plan, SearchPlan)

    @property
    def baseline_seeds(self) -> list[int]:
        """Training seeds of a search's baselines, that of the trials first."""
        first = self.seeds.training
        return [(first + index) % 2**31 for index in range(self.search.replicates)]

    @property
    def planned_rows(self) -> int:
        """Trials of a search with its baselines, or given arms under all seeds and variants."""
        if self.is_search:
            return self.search.trials + len(self.baselines) * self.search.replicates
        given = self.given
        return len(given.arms) * len(given.seeds) * len(given.variants)

    @property
    def search(self) -> SearchPlan:
        """The plan of a search."""
        assert isinstance(self.plan, SearchPlan)
        return self.plan

    @property
    def given(self) -> ArmsPlan:
        """The plan of given arms."""
        assert isinstance(self.plan, ArmsPlan)
        return self.plan

    @property
    def fresh_latents(self) -> bool:
        """Whether each training seed is judged on latents of its own."""
        return not self.is_search and self.given.latents == "fresh"

    @property
    def resolved(self) -> Facts:
        """The engine's facts, which every stored spec has."""
        assert self.facts is not None
        return self.facts

    @property
    def uses_data(self) -> bool:
        """Whether students, teacher or the FID's reference need the data set."""
        made = self.teacher.train is not None or self.evaluation.reference is None
        return made or (self.facts is not None and self.facts.needs_data)

    def conditions(self, contents: Mapping[str, str] | None = None) -> dict[str, Any]:
        """All that changes a row's FID, flat: ``section.key`` -> value.

        Trial count, bounds, sampler, pruner, mode of trajectories and resources may change, except
        the number of GPUs that share a batch. ``contents`` of None reads the files.
        """
        if contents is None:
            contents = self.contents()
        if self.is_command:
            return {**flatten(self._command_conditions()), **contents}
        kept: dict[str, Any] = {
            "numerics": NUMERICS,
            "evaluation": {
                name: value
                for name in ("images", "guidance")
                if (value := getattr(self.evaluation, name)) is not None
            },
            # A table counts by its content, see ``contents``.
            "method": {
                name: value
                for name, value in as_plain(self.method).items()
                if (name, value) not in _YOUNGER.items() and name != "epd_table"
            },
        }
        if self.teacher.train is not None:
            kept["teacher"] = {"train": as_plain(self.teacher.train)}
        if self.teacher.recipe is not None:
            kept["teacher"] = {"recipe": self.teacher.recipe}
        if self.precision != "float32":
            kept["precision"] = self.precision
        if self.is_search:
            seeds = {"training": self.seeds.training, "evaluation": self.seeds.evaluation}
            kept |= {"weights": self.space.identity(), "seeds": seeds}
        else:
            kept["latents"] = "fresh" if self.fresh_latents else self.seeds.evaluation
        if self.trajectories.mode == "recorded" and self.trajectories.dtype != "float32":
            kept["trajectories"] = {"dtype": self.trajectories.dtype}
        if self.resources.team > 1:
            kept["resources"] = {"gpus": self.resources.team}
        return {**flatten(kept), **contents}

    def _command_conditions(self) -> dict[str, Any]:
        """What decides the metric of a program, beside its files."""
        kept: dict[str, Any] = {"method": self.program.identity()}
        if self.is_search:
            seeds = {"training": self.seeds.training, "evaluation": self.seeds.evaluation}
            kept |= {"weights": self.space.identity(), "seeds": seeds}
        else:
            kept["latents"] = "fresh" if self.fresh_latents else self.seeds.evaluation
        return kept

    def fingerprint(self) -> str:
        """16 hex digits over ``conditions``."""
        return fingerprint_of(self.conditions())

    def contents(self) -> dict[str, str]:
        """Data, teacher, extractor and reference by their key among the conditions.

        Files are identified by their digest, published ones by their name.
        """
        if self.is_command:
            return command_contents(self)
        kind, _, file = self.evaluation.extractor.partition(":")
        extractor = f"{kind}:{sha256_file(Path(file))}" if file else self.evaluation.extractor
        found = {"evaluation.extractor": extractor}
        if self.data is not None:
            found["data"] = _content_of(self.data)
        if (checkpoint := self.teacher.checkpoint) is not None:
            if checkpoint in PUBLIC_MODELS:
                found["teacher.checkpoint"] = checkpoint
            else:
                found["teacher.checkpoint_sha256"] = sha256_model(Path(checkpoint))
        if (reference := self.evaluation.reference) is not None:
            is_name = reference in REFERENCES
            found["evaluation.reference"] = reference if is_name else sha256_file(Path(reference))
        if (table := self.method.options.get("epd_table")) is not None:
            found["method.epd_table_sha256"] = sha256_file(Path(table))
        if self.prompts is not None:
            found["prompts_sha256"] = _content_of_prompts(self.prompts)
        if self.evaluation.prompts is not None:
            found["evaluation.prompts_sha256"] = _content_of_prompts(self.evaluation.prompts)
        return found


def fingerprint_of(conditions: Mapping[str, Any]) -> str:
    """16 hex digits over flat conditions."""
    text = json.dumps(conditions, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _section(name: str, given: Any) -> Any:  # noqa: ANN401  as YAML has it
    """``method``, ``weights`` and ``plan`` as their classes; other sections as given."""
    if (
        name == "weights"
        and isinstance(given, Mapping)
        and isinstance(given.get("name", {}), Mapping)  # a weight called name, which is refused
    ):
        return Member(NamedSpace.name, dict(given))
    if name in ("method", "weights"):
        return Member.of(given, name)
    if name == "plan":
        given = spelt_plan(given)
        if not isinstance(given, Mapping):
            raise KnobError(
                name, f"must be {ONE_SHOT_PLAN} or a mapping with trials or arms, got {given!r}"
            )
        if "arms" in given:
            return ArmsPlan.read(given)
        members = {key: given[key] for key in ("sampler", "pruner") if given.get(key) is not None}
        if given.get("one_shot") is not None and "trials" not in given:
            known = knobs_of(SearchPlan)["one_shot"].accept(given["one_shot"])
            given = {**given, "trials": known.best}
        return SearchPlan.read(
            {**given, **{key: Member.of(each, key) for key, each in members.items()}}
        )
    return given


def spelt_plan(given: Any) -> Any:  # noqa: ANN401  as YAML has it
    """``plan``, with a mapping in place of the word for one."""
    return {"one_shot": {}} if given == ONE_SHOT_PLAN else given


def _content_of(data: str) -> str:
    """A data set's name, or the digest of its files."""
    source, fit = split_fit(data)
    if (found := split_format(source)) is None:
        return data
    kind, path = found[0], Path(found[1]).expanduser()
    if kind == "folder":
        content = _digest_of_folder(path)
    else:
        labels = labels_beside(path) if kind == "idx" else None
        content = "+".join(sha256_file(file) for file in (path, labels) if file is not None)
    return f"{kind}:{content}" if fit is None else f"{kind}:{content}@{fit}"


def _content_of_prompts(prompts: str) -> str:
    """A public name, or the digest of a file of prompts and the column that is read of it."""
    if prompts in PROMPT_SETS:
        return prompts
    file, column = split_column(prompts)
    return sha256_file(file) if column is None else f"{sha256_file(file)}:{column}"


def _digest_of_folder(folder: Path) -> str:
    """Hex digest over the images' names and sizes, and the labels.

    Pixels take minutes to read at every launch, and modification times change with every copy.
    """
    files = [(name, (folder / name).stat().st_size) for name in image_files(folder)]
    labels = folder / LABELS_FILE
    known = [files, sha256_file(labels) if labels.is_file() else None]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
