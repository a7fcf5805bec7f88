"""StudySpec: what to distil, what to search, how to judge it, what it may cost.

A misspelt key is an error and a parsed spec never changes. Counts of
images are given in kimg (thousands), sizes in GiB, times in seconds.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bdense import NUMERICS
from bdense.data_names import LABELS_FILE, image_files, labels_beside, split_format, split_side
from bdense.files import sha256_file
from bdense.public import CHECKPOINTS, REFERENCES
from bdense.solver_names import SolverName, refuse_thresholding, solver_order

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kimg = Annotated[float, Field(ge=0.001, allow_inf_nan=False)]  # one image or more
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """A misspelt key is an error, and a parsed spec never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FloatRange(Strict):
    """A closed interval to sample from; low = high fixes the value."""

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]

    @model_validator(mode="after")
    def _not_upside_down(self) -> "FloatRange":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; swap them")
        return self


class TeacherTraining(Strict):
    """A small EDM teacher trained on the study's data, once, and cached."""

    network: dict[str, Any] = Field(default_factory=dict)
    kimg: Kimg
    batch: Count = 256
    lr: Positive = 2e-3
    warmup_kimg: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10
    ema_halflife_kimg: Kimg = 10
    seed: Seed = 0
    threads: Count = 1


class TeacherSpec(Strict):
    """Either a checkpoint or a training recipe.

    Attributes:
        checkpoint: A file (our safetensors, pickle of EDM or SFD), or the name of a published one,
            which is downloaded once.
        train: How to make one of the study's own data.
    """

    checkpoint: str | None = None
    train: TeacherTraining | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TeacherSpec":
        if (self.checkpoint is None) == (self.train is None):
            raise ValueError("give either checkpoint: FILE or train: {...}, one of the two")
        return self


class SolverSpec(Strict):
    """The teacher's solver."""

    name: SolverName = "dpmpp"
    order: int | None = Field(
        default=None, validate_default=True, description="of ipndm and dpmpp; unset: the highest"
    )
    thresholding: bool = False

    @field_validator("order")
    @classmethod
    def _one_that_the_solver_has(cls, order: int | None, info: ValidationInfo) -> int | None:
        # Without a name there is a mistake to report already.
        return solver_order(info.data["name"], order) if "name" in info.data else order

    @field_validator("thresholding")
    @classmethod
    def _of_a_solver_that_has_it(cls, thresholding: bool, info: ValidationInfo) -> bool:
        if thresholding and "name" in info.data:
            refuse_thresholding(info.data["name"])
        return thresholding


class ScheduleSpec(Strict):
    """Spacing of the noise levels."""

    kind: Literal["polynomial", "logsnr", "time_uniform"] = "polynomial"
    rho: Positive = 7.0
    sigma_min: Positive = 0.006
    sigma_max: Positive = 80.0

    @model_validator(mode="after")
    def _decreasing(self) -> "ScheduleSpec":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}"
            )
        return self


class StudentSpec(Strict):
    """What is distilled: method, network evaluations an image, sub-steps, first step."""

    method: Literal["sfd-bdense"] = "sfd-bdense"
    nfe: Count
    substeps: Annotated[int, Field(ge=1, description="K")] = 4
    afs: bool = True
    solver: SolverSpec = Field(default_factory=SolverSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)


# Which parameterisation has a key that another lacks: such a key is no misspelling.
_WEIGHT_KEYS = {
    "a": "log-linear or normalised",
    "b": "log-linear",
    "largest": "log-linear or normalised",
    "rules": "learned",
    "strength": "learned",
    "memory": "learned",
}


class WeightSpace(Strict):
    """Where a study looks for branch weights; the three below are the ones there are."""

    @model_validator(mode="before")
    @classmethod
    def _no_keys_of_another(cls, given: Any) -> Any:  # noqa: ANN401  as YAML has it
        for key in sorted(_WEIGHT_KEYS.keys() & set(given)) if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(
                    f"{given['parameterisation']} weights have no {key}; drop it or use "
                    f"{_WEIGHT_KEYS[key]}"
                )
        return given


class LogLinearSpace(WeightSpace):
    """log w_k = a k + b: the paper's."""

    parameterisation: Literal["log-linear"]
    a: FloatRange
    b: FloatRange
    largest: Positive | None = Field(
        default=None, description="bound on max_k w_k; a suggestion beyond it is not trained"
    )


class NormalisedSpace(WeightSpace):
    """log w_k = a k + b, with b such that the weights' sum is K."""

    parameterisation: Literal["normalised"]
    a: FloatRange
    largest: Positive | None = Field(default=None, description="as in log-linear")


class LearnedSpace(WeightSpace):
    """Weights that follow the student's own losses or gradients while it trains.

    Attributes:
        rules: What a branch's scale is; one or more to choose from.
        strength: Exponent of 1 / scale: 0 is uniform, 1 the rule itself, below 0 its reverse.
        memory: Updates over which an old one's share in the scale falls to 1 / e.
    """

    parameterisation: Literal["learned"]
    # bdense.weighting.RULES, spelt out: a launcher reads studies without torch.
    rules: tuple[Literal["uncertainty", "gradient-norm"], ...] = ("uncertainty", "gradient-norm")
    strength: FloatRange = FloatRange(low=-1.0, high=1.5)
    memory: Count = 100

    @field_validator("rules")
    @classmethod
    def _each_once(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        if not rules or len(set(rules)) < len(rules):
            raise ValueError(
                f"{list(rules)} must name one rule or more, each once; leave it out for all"
            )
        return rules

    @property
    def is_one_point(self) -> bool:
        """Whether all trials would be the same."""
        return len(self.rules) == 1 and self.strength.low == self.strength.high


WeightsSpec = Annotated[
    LogLinearSpace | NormalisedSpace | LearnedSpace, Field(discriminator="parameterisation")
]


class BudgetSpec(Strict):
    """What a study may cost."""

    trials: Count
    kimg: Kimg
    batch: Count = 128
    lr: Positive = 5e-5

    @property
    def images(self) -> int:
        """Training images a trial."""
        return round(self.kimg * 1000)


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
    def _the_fid_is_searched_for(self) -> "EvaluationSpec":
        if "fid" not in self.metrics:
            raise ValueError(f"metrics {list(self.metrics)} lack fid, which is searched for")
        if self.reference is not None and set(self.metrics) != {"fid"}:
            raise ValueError(
                f"metrics {list(self.metrics)} beside fid need single reference images, which a "
                "reference file lacks; drop them, or drop reference to compare with data"
            )
        return self


class SamplerSpec(Strict):
    """Who proposes: TPE (the paper's), a Gaussian process, or chance."""

    name: Literal["tpe", "gp", "random"] = "tpe"
    startup_trials: Count = 10


class SeedsSpec(Strict):
    """One training seed and one set of latents for all trials: common random numbers."""

    training: Seed = 0
    evaluation: Seed = 0
    sampler: Seed = 0


class TrajectoriesSpec(Strict):
    """Teacher trajectories: recorded once and shared, or walked live by every trial."""

    mode: Literal["recorded", "live"] = "recorded"
    dtype: Literal["float32", "float16"] = "float32"
    max_gib: Positive = 32.0


class ResourcesSpec(Strict):
    """What one trial holds, how it computes, and when its worker counts as lost.

    Attributes:
        gpus: ``auto`` (one, where there are any), a share of one, or a whole number of one
            machine's, which then share every batch.
        compile: Networks by torch.compile; moves numbers by rounding.
        channels_last: NHWC memory, likewise.
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


class StudySpec(Strict):
    """A whole study.

    Attributes:
        data: What a teacher is trained on and the FID's reference; not needed where both are
            there already, as ``teacher.checkpoint`` and ``evaluation.reference``.
        precision: What the teacher, the student's training and its images are computed in, as in
            ``bdense.execution``; features and their statistics are float32 in any case.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
    data: str | None = None
    teacher: TeacherSpec
    student: StudentSpec
    weights: WeightsSpec
    budget: BudgetSpec
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    seeds: SeedsSpec = Field(default_factory=SeedsSpec)
    # bdense.execution.PRECISIONS, spelt out: a launcher reads studies without torch.
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    trajectories: TrajectoriesSpec = Field(default_factory=TrajectoriesSpec)
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)
    keep_students: Annotated[int, Field(ge=1)] = 3

    @field_validator("weights", mode="before")
    @classmethod
    def _learned_in_a_word(cls, given: Any) -> Any:  # noqa: ANN401  as YAML has it
        if given == "learned":
            return {"parameterisation": "learned"}
        if isinstance(given, str):
            raise ValueError(
                f"{given!r} alone says too little; give a mapping with parameterisation: ..., "
                "or the word learned for its defaults"
            )
        return given

    @model_validator(mode="after")
    def _has_the_data_it_needs(self) -> "StudySpec":
        if self.uses_data and self.data is None:
            missing = "teacher.checkpoint" if self.teacher.train else "evaluation.reference"
            raise ValueError(
                "data is missing; name a data set, or leave it out and give both "
                f"teacher.checkpoint and evaluation.reference (missing: {missing})"
            )
        return self

    @model_validator(mode="after")
    def _gpus_share_a_batch_equally(self) -> "StudySpec":
        if self.budget.batch % self.resources.team:
            raise ValueError(
                f"budget.batch {self.budget.batch} cannot be shared equally by resources.gpus "
                f"{self.resources.team}; choose a multiple, or other gpus"
            )
        return self

    @property
    def uses_data(self) -> bool:
        """Whether anything needs the data set: the teacher's training, or the reference."""
        return self.teacher.train is not None or self.evaluation.reference is None

    def conditions(self) -> dict[str, Any]:
        """What changes a trial's number, flat: ``section.key`` -> value (SPEC contract 6).

        Trial count, bounds, sampler, trajectory mode and resources may change, but for the number
        of GPUs that share a batch; these may not.
        """
        kept = self.model_dump(
            include={"data", "teacher", "student", "budget", "evaluation", "seeds"}, mode="json"
        )
        del kept["budget"]["trials"], kept["seeds"]["sampler"], kept["evaluation"]["batch"]
        kept["weights"] = {"parameterisation": self.weights.parameterisation}
        if isinstance(self.weights, LearnedSpace):
            # Optuna holds a categorical parameter to its first choices, in their order.
            kept["weights"] |= {"memory": self.weights.memory, "rules": list(self.weights.rules)}
        # Live trajectories are rounded to no stored type.
        recorded = self.trajectories.mode == "recorded"
        kept["trajectories"] = {"dtype": self.trajectories.dtype if recorded else "float32"}
        kept["numerics"] = NUMERICS
        # Studies from before there was a choice keep their fingerprint.
        if self.precision != "float32":
            kept["precision"] = self.precision
        if self.data is None:
            del kept["data"]
        else:
            kept["data"] = _content_of(self.data)
        # Each of several GPUs draws the dropout of its own share of a batch.
        if self.resources.team > 1:
            kept["resources"] = {"gpus": self.resources.team}
        # A file's content counts, not where it lies; a published one is what its name says,
        # whether it is here yet or not.
        if self.teacher.checkpoint in CHECKPOINTS:
            kept["teacher"] = {"checkpoint": self.teacher.checkpoint}
        elif self.teacher.checkpoint is not None:
            kept["teacher"] = {"checkpoint_sha256": sha256_file(Path(self.teacher.checkpoint))}
        kind, _, file = self.evaluation.extractor.partition(":")
        del kept["evaluation"]["metrics"], kept["evaluation"]["reference"]
        if self.evaluation.reference in REFERENCES:
            kept["evaluation"]["reference"] = self.evaluation.reference
        elif self.evaluation.reference is not None:
            kept["evaluation"]["reference"] = sha256_file(Path(self.evaluation.reference))
        if file:
            kept["evaluation"]["extractor"] = f"{kind}:{sha256_file(Path(file))}"
        return flatten(kept)

    def fingerprint(self) -> str:
        """16 hex digits over ``conditions``."""
        text = json.dumps(self.conditions(), sort_keys=True)
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
