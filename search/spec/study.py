"""A study: what is distilled by which method, what is searched, how it is judged, what it costs.

One file, whatever the method and whether points are searched or given arms are measured. A
misspelt key is an error and a parsed spec never changes. Counts of images are in kimg (thousands),
sizes in GiB, times in seconds.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bdense import NUMERICS
from bdense.data.names import LABELS_FILE, image_files, labels_beside, split_format, split_side
from bdense.files import sha256_file
from bdense.models.public import REFERENCES, published_checkpoint
from bdense.weights import WEIGHT_SPACES
from bdense.weights.spaces import WeightSpace

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kimg = Annotated[float, Field(ge=0.001, allow_inf_nan=False)]  # one image or more
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
# Of bdense.execution.PRECISIONS, which needs torch.
Precision = Literal["float32", "tf32", "bfloat16", "float16"]

# Folders under the runs that all studies share (search.storage.engine, search.study.artifacts).
TAKEN_NAMES = ("artifacts", "cache")


class Strict(BaseModel):
    """A misspelt key is an error, and a parsed spec never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Member(BaseModel):
    """A member of a registry by its name, with its own settings beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Its settings, without the name."""
        return dict(self.model_extra or {})

    def with_options(self, changes: dict[str, Any]) -> Self:
        """The same member with some settings replaced."""
        return type(self)(name=self.name, **{**self.options, **changes})


class TeacherTraining(Strict):
    """A small teacher trained on the study's data, once, and cached.

    Attributes:
        precond: Name and options of a variance-preserving process, cosine or ddpm, to train on;
            unset: EDM's levels.
        loss: How the levels of that process count; unset: by what the network predicts.
        flip: Mirror every other image, by chance.
        clip: Largest norm of the gradient.
    """

    network: dict[str, Any] = Field(default_factory=dict)
    kimg: Kimg
    batch: Count = 256
    lr: Positive = 2e-3
    warmup_kimg: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10
    ema_halflife_kimg: Kimg = 10
    seed: Seed = 0
    threads: Count = 1
    precond: dict[str, Any] | None = None
    loss: Literal["constant", "snr", "snr_trunc", "v"] | None = None
    flip: bool = False
    clip: Positive | None = None


class TeacherSpec(Strict):
    """Either a checkpoint or a training recipe.

    Attributes:
        checkpoint: A file (our safetensors, pickle of EDM or SFD), or the name of a published one,
            which is downloaded once.
        train: How to train one on the study's own data.
    """

    checkpoint: str | None = None
    train: TeacherTraining | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.checkpoint is None) == (self.train is None):
            raise ValueError("give either checkpoint: FILE or train: {...}, one of the two")
        return self


class EvaluationSpec(Strict):
    """How a student is judged: FID of so many images against the study's data, or a file.

    Attributes:
        metrics: What is measured of each trial; the FID, which is searched for, always is.
        reference: EDM's .npz of statistics in place of the data set's, which then only trains: a
            file, or the name of one of EDM's fid-refs.
    """

    images: Annotated[int, Field(ge=2)] = 50_000
    extractor: str = "inception"
    batch: Count = 128
    metrics: tuple[Literal["fid", "kid", "prc"], ...] = ("fid",)
    reference: str | None = None

    @model_validator(mode="after")
    def _with_the_fid(self) -> Self:
        if "fid" not in self.metrics:
            raise ValueError(f"metrics {list(self.metrics)} lack fid, which is searched for")
        if self.reference is not None and set(self.metrics) != {"fid"}:
            raise ValueError(
                f"metrics {list(self.metrics)} beside fid need single reference images, which a "
                "reference file lacks; drop them, or drop reference to compare with data"
            )
        return self


class ResourcesSpec(Strict):
    """What one trial holds, how it computes, and when its worker counts as lost.

    Attributes:
        gpus: ``auto`` (one, where there are any), a share of one, or a whole number of one
            machine's, which then share every batch.
        compile: Compile networks by torch.compile; moves numbers by rounding.
        channels_last: NHWC memory; moves numbers by rounding.
    """

    cpus: Positive = 1
    gpus: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "auto"
    threads: Count = 1
    deterministic: bool = False
    compile: bool = False
    channels_last: bool = False
    checkpoint_seconds: Positive = 60
    lease_seconds: Annotated[float, Field(ge=10, allow_inf_nan=False)] = 60
    max_attempts: Count = 3

    @field_validator("gpus")
    @classmethod
    def _a_share_or_whole_ones(cls, gpus: Literal["auto"] | float) -> Literal["auto"] | float:
        if gpus != "auto" and gpus > 1 and gpus % 1:
            raise ValueError(
                f"{gpus:g} is neither a share of one GPU nor a whole number of them; give 0 to 1, "
                f"{int(gpus)} or {int(gpus) + 1}"
            )
        return gpus

    @property
    def team(self) -> int:
        """GPUs that share a trial's batches; 1 also for a trial without any."""
        return 1 if self.gpus == "auto" else max(1, int(self.gpus))


class SearchPlan(Strict):
    """Points proposed by a sampler, beside plain distillation and uniform weights.

    Attributes:
        trials: Points in all.
        sampler: A class of ``optuna.samplers`` and its arguments; its seed is ``seeds.sampler``.
        pruner: A class of ``optuna.pruners`` and its arguments, asked at each intermediate FID.
        at: Fractions of the training after which the student is measured, ascending; a method of
            several stages is measured after each of them.
        images: Drawn for each intermediate FID; unset: ``evaluation.images``.
    """

    trials: Count
    sampler: Member = Member(name="TPESampler")
    pruner: Member | None = None
    at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    images: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _intermediate_evaluations(self) -> Self:
        if list(self.at) != sorted(set(self.at)):
            raise ValueError(f"at {list(self.at)} must ascend, each fraction once; sort it")
        if self.images is not None and not self.at:
            raise ValueError(
                f"images {self.images} are drawn at no fraction of the budget; give at: [...] or "
                "drop images"
            )
        return self


class ArmsPlan(Strict):
    """Given arms, each trained under each seed.

    Attributes:
        arms: ``plain``, ``uniform``, a mapping of weight parameters (a, b; rule, strength), or
            ``{winner_of: STUDY}``, another study's confirmed winner.
        seeds: Training seeds, the same for all arms.
        latents: ``shared``: all rows are judged on the latents of ``seeds.evaluation``; ``fresh``:
            each seed on its own.
    """

    arms: tuple[Literal["plain", "uniform"] | dict[str, Any], ...] = ("plain", "uniform")
    seeds: tuple[Seed, ...] = (0, 1, 2)
    latents: Literal["shared", "fresh"] = "shared"

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)} must name one seed or more, each once")
        return seeds


class SeedsSpec(Strict):
    """One training seed and one set of latents for all trials of a search; the sampler's seed."""

    training: Seed = 0
    evaluation: Seed = 0
    sampler: Seed = 0


class TrajectoriesSpec(Strict):
    """Teacher trajectories: recorded once and shared, or computed anew in every trial."""

    mode: Literal["recorded", "live"] = "recorded"
    dtype: Literal["float32", "float16"] = "float32"
    max_gib: Positive = 32.0


class ConfirmSpec(Strict):
    """How the best weights are told from lucky ones: fresh seeds, the same for all.

    Attributes:
        candidates: Points of the search with the lowest posterior mean.
        seeds: Fresh training seeds, and latents, each.
        method: Settings of the method that differ from the search's, such as ``kimg`` of the
            budget the winner will be used at, since the best weights move with it.
    """

    candidates: Count = 3
    seeds: Annotated[int, Field(ge=3)] = 3
    method: dict[str, Any] = Field(default_factory=dict)


class StageFacts(Strict):
    """What is known of a stage before it is trained, as ``bdense.methods.method.StagePlan``."""

    name: str
    label: str
    num_updates: int
    nfe: int
    branched: bool


class Facts(Strict):
    """What the engine says of a spec, so that others need not load torch to know it.

    Attributes:
        title: The method's short name for people, such as SFD.
        num_branches: K.
        batch: Images an update.
        needs_data: Whether students learn from the data itself.
        stages: Of the method, in order.
    """

    title: str
    num_branches: int
    batch: int
    needs_data: bool
    stages: tuple[StageFacts, ...]


class StudySpec(Strict):
    """A whole study.

    Attributes:
        data: What a teacher is trained on and the FID's reference; not needed where both are
            there already, as ``teacher.checkpoint`` and ``evaluation.reference``, and the method
            does not learn from data.
        precision: What the teacher, the student's training and its images are computed in;
            features and their statistics are float32 in any case.
        method: A distillation method's name and its settings.
        weights: A weight space's name and its settings.
        facts: Written by ``search.spec.resolve``, which also fills in the method's defaults.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=128)]
    data: str | None = None
    teacher: TeacherSpec
    method: Member
    weights: Member = Member(name="normalised")
    plan: SearchPlan | ArmsPlan
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    precision: Precision = "float32"
    seeds: SeedsSpec = Field(default_factory=SeedsSpec)
    trajectories: TrajectoriesSpec = Field(default_factory=TrajectoriesSpec)
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)
    keep_students: Count = 3
    confirm: ConfirmSpec = Field(default_factory=ConfirmSpec)
    facts: Facts | None = None

    @field_validator("name")
    @classmethod
    def _has_a_folder_of_its_own(cls, name: str) -> str:
        if name in TAKEN_NAMES:
            raise ValueError(
                f"{name!r} is a folder under the runs that all studies share; choose another name"
            )
        return name

    @field_validator("weights", mode="before")
    @classmethod
    def _in_a_word(cls, given: Any) -> Any:  # noqa: ANN401  as YAML has it
        return {"name": given} if isinstance(given, str) else given

    @field_validator("plan", mode="before")
    @classmethod
    def _one_plan(cls, given: Any) -> Any:  # noqa: ANN401  as YAML has it
        if isinstance(given, dict):
            return (ArmsPlan if "arms" in given else SearchPlan).model_validate(given)
        return given

    @property
    def space(self) -> WeightSpace:
        """Where weights are searched, read from ``weights``."""
        member: WeightSpace = WEIGHT_SPACES[self.weights.name].read(
            self.weights.options, "weights"
        )
        return member

    @property
    def is_search(self) -> bool:
        """Whether points are proposed, rather than arms given."""
        return isinstance(self.plan, SearchPlan)

    @property
    def search(self) -> SearchPlan:
        """The plan of a search."""
        assert isinstance(self.plan, SearchPlan)
        return self.plan

    @property
    def resolved(self) -> Facts:
        """The engine's facts, which every stored spec has."""
        assert self.facts is not None
        return self.facts

    @property
    def uses_data(self) -> bool:
        """Whether anything needs the data set: students or teacher to learn, or the reference."""
        made = self.teacher.train is not None or self.evaluation.reference is None
        return made or (self.facts is not None and self.facts.needs_data)

    def conditions(self, contents: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What changes a row's number, flat: ``section.key`` -> value.

        Trial count, bounds, sampler, pruner, mode of trajectories and resources may change, but
        for the number of GPUs that share a batch.

        Args:
            contents: As of ``contents``, where they are known; None reads the files.
        """
        kept: dict[str, Any] = {
            "numerics": NUMERICS,
            "evaluation": {"images": self.evaluation.images},
            "method": self.method.model_dump(mode="json"),
        }
        if self.teacher.train is not None:
            kept["teacher"] = self.teacher.model_dump(mode="json", exclude={"checkpoint"})
        if self.precision != "float32":
            kept["precision"] = self.precision
        if isinstance(self.plan, SearchPlan):
            kept["weights"] = self.space.identity()
            kept["seeds"] = self.seeds.model_dump(include={"training", "evaluation"})
        else:
            shared = self.plan.latents == "shared"
            kept["latents"] = self.seeds.evaluation if shared else "fresh"
        if self.trajectories.mode == "recorded" and self.trajectories.dtype != "float32":
            kept["trajectories"] = {"dtype": self.trajectories.dtype}
        if self.resources.team > 1:
            kept["resources"] = {"gpus": self.resources.team}
        return {**flatten(kept), **(self.contents() if contents is None else contents)}

    def fingerprint(self) -> str:
        """16 hex digits over ``conditions``."""
        return fingerprint_of(self.conditions())

    def contents(self) -> dict[str, str]:
        """What data, teacher, extractor and reference are, by their key among the conditions.

        A file is its content, not where it lies; a published one is what its name says.
        """
        kind, _, file = self.evaluation.extractor.partition(":")
        extractor = f"{kind}:{sha256_file(Path(file))}" if file else self.evaluation.extractor
        found = {"evaluation.extractor": extractor}
        if self.data is not None:
            found["data"] = _content_of(self.data)
        if (checkpoint := self.teacher.checkpoint) is not None:
            if published_checkpoint(checkpoint) is not None:
                found["teacher.checkpoint"] = checkpoint
            else:
                found["teacher.checkpoint_sha256"] = sha256_file(Path(checkpoint))
        if (reference := self.evaluation.reference) is not None:
            is_name = reference in REFERENCES
            found["evaluation.reference"] = reference if is_name else sha256_file(Path(reference))
        return found


def fingerprint_of(conditions: Mapping[str, Any]) -> str:
    """16 hex digits over flat conditions."""
    text = json.dumps(conditions, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content_of(data: str) -> str:
    """A data set by what is in it: a name stands for itself, for a path its files."""
    source, side = split_side(data)
    if (found := split_format(source)) is None:
        return data
    kind, path = found[0], Path(found[1]).expanduser()
    if kind == "folder":
        content = _digest_of_folder(path)
    else:
        labels = labels_beside(path) if kind == "idx" else None
        content = "+".join(sha256_file(file) for file in (path, labels) if file is not None)
    return f"{kind}:{content}" if side is None else f"{kind}:{content}@{side}"


def _digest_of_folder(folder: Path) -> str:
    """Hex digest over the images' names and sizes, and the labels.

    Not over the pixels, which take minutes to read and are asked for by every launch and worker;
    nor over times of modification, which differ wherever the folder is copied to.
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
