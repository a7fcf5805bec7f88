"""Results of rows; the database and ``result.json`` hold them as mappings."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

# Parameters of our own weight spaces; those of others are under "parameters".
PARAMETERS = ("a", "b", "rule", "strength", "memory")
METRICS = ("kid", "prc")
# Of a FID, beside its conditions.
FIGURES = ("value", "noise", "effects")
# FIDs are compared only where these agree.
COMPARED_KEYS = ("extractor_sha256", "reference", "images", "nfe")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredFID:
    """A FID with the conditions it was measured under.

    Attributes:
        nfe: Network evaluations an image.
        images: Number of images drawn, compared with ``reference_images`` of ``reference``.
        seeds: Of ``evaluation`` (the latents) and ``training`` (absent for a teacher).
        noise: Standard error from the latents; None in results of older versions.
        effects: What each group of images adds, see ``bdense.metrics.metrics.grouped_effects``.
        stored: The whole mapping it was read from.
    """

    value: float
    nfe: int
    images: int
    extractor: str
    extractor_sha256: str
    reference: str
    reference_images: int
    seeds: dict[str, int]
    noise: float | None = None
    effects: Sequence[float] = field(default=(), repr=False)
    stored: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """From ``bdense``'s FID as a mapping."""
        known = {each.name for each in dataclasses.fields(cls)} - {"stored"}
        return cls(**{name: stored[name] for name in known & stored.keys()}, stored=dict(stored))

    def as_dict(self) -> dict[str, Any]:
        """The mapping it was read from."""
        return self.stored

    def conditions(self) -> dict[str, Any]:
        """All but the value and its noise."""
        names = [each.name for each in dataclasses.fields(self)]
        return {n: getattr(self, n) for n in names if n not in (*FIGURES, "stored")}

    def differing(self, other: "MeasuredFID") -> list[str]:
        """Conditions that keep two FIDs from being compared."""
        return [key for key in COMPARED_KEYS if getattr(self, key) != getattr(other, key)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """The result of a row.

    Attributes:
        value: The FID of the last stage; None where the row was pruned.
        weights: w_1..w_K, of learned weights the last.
        parameters: Of the weight space, such as a and b; empty for a baseline.
        fid: Of the last stage; None where the row was pruned before it.
        fids: Of each stage of a method of several, by NFE, in the order of training.
        teacher_fid: Of the teacher, where the method measures it.
        metrics: kid and prc, where they were measured.
        intermediate: Each intermediate evaluation: fraction, trained_images, fid and conditions.
        weights_over_time: Of learned weights: iterations [n] and weights [n][K].
        weights_plot, student: Files, as study/number/file.
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
    weights: list[float] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    fid: MeasuredFID | None = None
    fids: dict[str, MeasuredFID] = field(default_factory=dict)
    teacher_fid: MeasuredFID | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    intermediate: list[dict[str, Any]] = field(default_factory=list)
    weights_over_time: dict[str, list[Any]] | None = None
    weights_plot: str | None = None
    student: str | None = None
    arm: str | None = None
    variant: dict[str, Any] = field(default_factory=dict)
    pruned_at: float | None = None
    reason: str | None = None

    def attrs(self) -> dict[str, Any]:
        """As the row's attributes hold it; what is empty is left out."""
        found: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name == "value" or value in (None, {}, []):
                continue
            if each.name == "parameters":
                found |= {name: one for name, one in value.items() if name in PARAMETERS}
                if own := {name: one for name, one in value.items() if name not in PARAMETERS}:
                    found["parameters"] = own
            elif each.name == "metrics":
                found |= value
            elif each.name in ("fid", "teacher_fid"):
                found[each.name] = value.as_dict()
            elif each.name == "fids":
                found["fids"] = {key: fid.as_dict() for key, fid in value.items()}
            else:
                found[each.name] = value
        return found

    @classmethod
    def of(cls, value: float | None, attrs: Mapping[str, Any]) -> Self:
        """From a row's value and attributes."""
        known = {each.name for each in dataclasses.fields(cls)}
        own = {name: attrs[name] for name in known & attrs.keys()}
        for name in ("fid", "teacher_fid"):
            if name in own:
                own[name] = MeasuredFID.of(own[name])
        if "fids" in own:
            own["fids"] = {key: MeasuredFID.of(fid) for key, fid in own["fids"].items()}
        named = {name: attrs[name] for name in PARAMETERS if name in attrs}
        own["parameters"] = named | own.get("parameters", {})
        own["metrics"] = {name: attrs[name] for name in METRICS if name in attrs}
        missing: dict[str, Any] = dict.fromkeys(("fingerprint", "device", "worker"), "")
        missing |= {name: {} for name in ("seeds", "versions", "timings")}
        return cls(**{**missing, **own, "value": value})
