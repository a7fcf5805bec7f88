"""What every kind of study file says: data, teacher, how students are judged, what a row holds.

A misspelt key is an error and a parsed spec never changes. Counts of images are given in kimg
(thousands), sizes in GiB, times in seconds.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bdense import NUMERICS
from bdense.data.names import LABELS_FILE, image_files, labels_beside, split_format, split_side
from bdense.files import sha256_file
from bdense.models.public import REFERENCES, published_checkpoint

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kimg = Annotated[float, Field(ge=0.001, allow_inf_nan=False)]  # one image or more
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
# bdense.execution.PRECISIONS, spelt out: a launcher reads studies without torch.
Precision = Literal["float32", "tf32", "bfloat16", "float16"]


# What lies beside the studies' folders under the runs (search.storage.engine and
# search.study.artifacts name them).
TAKEN_NAMES = ("artifacts", "cache")


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
    # bdense.diffusion.snr_weights.LOSSES, spelt out: a launcher reads studies without torch.
    loss: Literal["constant", "snr", "snr_trunc", "v"] | None = None
    flip: bool = False
    clip: Positive | None = None


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


class ModelSpec(Strict):
    """A file whose rows are students of one teacher, judged alike.

    Attributes:
        data: What a teacher is trained on and the FID's reference; not needed where both are
            there already, as ``teacher.checkpoint`` and ``evaluation.reference``.
        precision: What the teacher, the student's training and its images are computed in, as in
            ``bdense.execution``; features and their statistics are float32 in any case.
    """

    # Whether students learn from the data themselves.
    needs_data: ClassVar[bool] = False

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
    data: str | None = None
    teacher: TeacherSpec
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    precision: Precision = "float32"
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)

    @field_validator("name")
    @classmethod
    def _has_a_folder_of_its_own(cls, name: str) -> str:
        if name in TAKEN_NAMES:
            raise ValueError(
                f"{name!r} is a folder under the runs that all studies share; choose another name"
            )
        return name

    @model_validator(mode="after")
    def _has_the_data_it_needs(self) -> Self:
        if self.needs_data and self.data is None:
            raise ValueError("data is missing; name the data set whose images are learned from")
        if self.uses_data and self.data is None:
            missing = "teacher.checkpoint" if self.teacher.train else "evaluation.reference"
            raise ValueError(
                "data is missing; name a data set, or leave it out and give both "
                f"teacher.checkpoint and evaluation.reference (missing: {missing})"
            )
        return self

    @property
    def uses_data(self) -> bool:
        """Whether anything needs the data set: students or teacher to learn, or the reference."""
        made = self.teacher.train is not None or self.evaluation.reference is None
        return self.needs_data or made

    def conditions(self) -> dict[str, Any]:
        """What changes a row's number, flat: ``section.key`` -> value."""
        return flatten(self._conditions())

    def fingerprint(self) -> str:
        """16 hex digits over ``conditions``."""
        text = json.dumps(self.conditions(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _conditions(self) -> dict[str, Any]:
        """The conditions that all kinds have: data, teacher, evaluation, numerics, precision."""
        kept = self.model_dump(include={"teacher", "evaluation"}, mode="json")
        kept["numerics"] = NUMERICS
        # Studies from before there was a choice keep their fingerprint.
        if self.precision != "float32":
            kept["precision"] = self.precision
        if self.teacher.train is not None:
            for name in ("precond", "loss", "flip", "clip"):
                if not kept["teacher"]["train"][name]:
                    del kept["teacher"]["train"][name]
        if self.data is not None:
            kept["data"] = _content_of(self.data)
        # A file's content counts, not where it lies; a published one is what its name says,
        # whether it is here yet or not.
        teacher = self.teacher.checkpoint
        if teacher is not None and published_checkpoint(teacher) is not None:
            kept["teacher"] = {"checkpoint": teacher}
        elif teacher is not None:
            kept["teacher"] = {"checkpoint_sha256": sha256_file(Path(teacher))}
        kind, _, file = self.evaluation.extractor.partition(":")
        for name in ("batch", "metrics", "reference"):
            del kept["evaluation"][name]
        if self.evaluation.reference in REFERENCES:
            kept["evaluation"]["reference"] = self.evaluation.reference
        elif self.evaluation.reference is not None:
            kept["evaluation"]["reference"] = sha256_file(Path(self.evaluation.reference))
        if file:
            kept["evaluation"]["extractor"] = f"{kind}:{sha256_file(Path(file))}"
        return kept


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
