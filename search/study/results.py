"""Results of rows; the database and ``result.json`` hold them as mappings.

A row is judged by one figure: a student by its FID, a program's run by the score that it writes.
"""

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeAlias

from bdense.errors import InputError
from bdense.metrics.records import FID, KID, CLIPScore, PrecisionRecall
from bdense.weights.space import BranchWeights
from search.study.folders import named_file

# Parameters of our own weight spaces; those of others are under "parameters".
PARAMETERS = ("a", "b", "rule", "strength", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a program of the user's says of its run.

    Attributes:
        value: The study's metric.
        metric: Its name.
        seeds: That the program was given.
        others: Other numbers that it wrote, by name.
    """

    value: float
    metric: str
    seeds: dict[str, int]
    others: dict[str, float] = field(default_factory=dict)

    # What only a FID has.
    nfe: ClassVar[None] = None
    images: ClassVar[None] = None
    noise: ClassVar[None] = None

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """Read what ``as_dict`` made."""
        return cls(**stored)

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, **self.conditions()}

    def conditions(self) -> dict[str, Any]:
        return {"metric": self.metric, "seeds": self.seeds, "others": self.others}

    def in_short(self) -> str:
        return "as the program wrote it"

    def in_full(self) -> str:
        others = [f"{name} {value:.4g}" for name, value in self.others.items()]
        return ", ".join([f"as the program wrote it, seed {self.seeds['training']}", *others])

    def differing(self, other: Self, /) -> list[str]:
        # The study's fingerprint holds the rest.
        return [] if self.metric == other.metric else ["metric"]

    def noise_of_difference(self, other: Self, /) -> None:
        return


# What a row is judged by: a value, and the conditions that it depends on.
Judged: TypeAlias = FID | Score


@dataclass(frozen=True, slots=True, kw_only=True)
class IntermediateFID:
    """A FID in the midst of a training.

    Attributes:
        fraction: Of the training's updates.
        trained_images: Images trained on until then.
    """

    fraction: float
    trained_images: int
    fid: FID

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """Read what ``as_dict`` made."""
        fid = FID.read({**stored, "value": stored["fid"]})
        return cls(fraction=stored["fraction"], trained_images=stored["trained_images"], fid=fid)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form that attributes and files store."""
        when = {"fraction": self.fraction, "trained_images": self.trained_images}
        return {**when, "fid": self.fid.value, **self.fid.conditions()}


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A point of a one-shot curve.

    Attributes:
        params: Of the weight space, as a trial has them.
        coordinates: By axis.
        fid: Of the one-shot student told this point.
        error: Standard error of its difference from the curve's lowest FID, over the latents that
            both share; None where that is not known.
    """

    params: dict[str, Any]
    coordinates: list[float]
    fid: float
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """FIDs that one student has where it is told its weights (``bdense.methods.one_shot``).

    Attributes:
        axes: Names of the coordinates.
        points: In the order of their measurement.
        conditions: Of the FIDs, as ``Measurement.conditions`` has them.
    """

    axes: list[str]
    points: list[CurvePoint]
    conditions: dict[str, Any]

    @property
    def ranked(self) -> list[CurvePoint]:
        """The lowest FID first."""
        return sorted(self.points, key=lambda each: each.fid)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """Read what ``as_dict`` made."""
        return cls(**{**stored, "points": [CurvePoint(**each) for each in stored["points"]]})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class WeightHistory:
    """How learned weights changed.

    Attributes:
        iterations: [n], 0-based.
        weights: [n][K].
    """

    iterations: list[int]
    weights: list[list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


# How fields that are no plain values are read.
_READ: dict[str, Callable[[Any], Any]] = {
    "fid": FID.read,
    "score": Score.read,
    "fids": lambda stored: {nfe: FID.read(fid) for nfe, fid in stored.items()},
    "teacher_fid": FID.read,
    "curve": Curve.read,
    "kid": KID.read,
    "prc": PrecisionRecall.read,
    "clip_score": CLIPScore.read,
    "intermediate": lambda stored: [IntermediateFID.read(one) for one in stored],
    "weights_over_time": lambda stored: WeightHistory(**stored),
}


def _as_stored(value: Any) -> Any:  # noqa: ANN401  any field of a result
    """The JSON form of a field."""
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _as_stored(each) for key, each in value.items()}
    return [_as_stored(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """The result of a row.

    Attributes:
        value: The FID of the last stage, the lowest of a one-shot training's curve, or a
            program's metric; None where the row was pruned.
        weights: w_1..w_K, of learned weights the last; a list for each interval where they differ.
        parameters: Of the weight space, such as a and b; empty for a baseline.
        fid: Of the last stage; None where the row was pruned before it.
        score: Of a program's run.
        fids: Of each stage of a method of several, by NFE, in the order of training.
        teacher_fid: Of the teacher, where the method measures it.
        curve: Of a one-shot training, which has no ``fid`` of its own.
        kid, prc, clip_score: Of the last stage, where they were measured.
        intermediate: Each intermediate evaluation, in order.
        weights_over_time: Of learned weights.
        weights_plot, student: Files, as study/number/file.
        drawing_options: What ``bdense sample`` needs beside the student, such as prompts.
        prompts: Of the first row of the sample grid.
        arm: Name of a given arm.
        variant: The method's settings that differ from the study's.
        fingerprint, seeds, versions, device, worker: How and where it was made.
        timings: Seconds by what they were spent on.
        pruned_at, reason: Where and why it was pruned.
    """

    value: float | None
    fingerprint: str
    seeds: dict[str, int]
    versions: dict[str, str]
    device: str
    worker: str
    timings: dict[str, float]
    weights: BranchWeights = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    fid: FID | None = None
    score: Score | None = None
    fids: dict[str, FID] = field(default_factory=dict)
    teacher_fid: FID | None = None
    curve: Curve | None = None
    kid: KID | None = None
    prc: PrecisionRecall | None = None
    clip_score: CLIPScore | None = None
    intermediate: list[IntermediateFID] = field(default_factory=list)
    weights_over_time: WeightHistory | None = None
    weights_plot: str | None = None
    student: str | None = None
    drawing_options: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    arm: str | None = None
    variant: dict[str, Any] = field(default_factory=dict)
    pruned_at: float | None = None
    reason: str | None = None

    @property
    def figure(self) -> Judged | None:
        """What it is judged by; None where it was pruned, and of a one-shot training."""
        return self.fid or self.score

    def fid_at(self, nfe: int | None) -> FID | None:
        """The FID of the stage of that NFE; None is the last."""
        return self.fid if nfe is None else self.fids.get(str(nfe))

    def attrs(self) -> dict[str, Any]:
        """The attributes of its row; what is empty is left out."""
        found: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name == "value" or value in (None, {}, []):
                continue
            if each.name == "parameters":
                found |= {name: one for name, one in value.items() if name in PARAMETERS}
                value = {name: one for name, one in value.items() if name not in PARAMETERS}
                if not value:
                    continue
            found[each.name] = _as_stored(value)
        return found

    @classmethod
    def of(cls, value: float | None, attrs: Mapping[str, Any]) -> Self:
        """Read a row's value and attributes."""
        known = {each.name for each in dataclasses.fields(cls)}
        own = {name: attrs[name] for name in known & attrs.keys()}
        own |= {name: read(own[name]) for name, read in _READ.items() if name in own}
        named = {name: attrs[name] for name in PARAMETERS if name in attrs}
        own["parameters"] = named | own.get("parameters", {})
        missing: dict[str, Any] = dict.fromkeys(("fingerprint", "device", "worker"), "")
        missing |= {name: {} for name in ("seeds", "versions", "timings")}
        return cls(**{**missing, **own, "value": value})


def sample_command(result: TrialResult) -> str:
    """A line that draws images with a row's student, with the path of its file; "" without one."""
    if result.student is None:
        return ""
    try:
        words = ["bdense", "sample", str(named_file(result.student).resolve())]
    except InputError:  # rows are not trusted
        return ""
    return shlex.join([*words, *result.drawing_options, "--out", "samples.png"])
