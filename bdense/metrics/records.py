"""Records of measured metrics: values with the conditions that they depend on."""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from bdense.arguments import require_types

# Values are compared only where these agree.
_COMPARED = ("extractor_sha256", "reference", "images", "nfe")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """Prompts that images were drawn under.

    Attributes:
        file: Name of their file, with the column of a table, or their public name.
        sha256: Hex digest of the prompts, a line each: that of a plain file without blank lines.

    Raises:
        InputError: A value has another type.
    """

    file: str
    sha256: str
    count: int

    def __post_init__(self) -> None:
        require_types(self)

    @classmethod
    def of(cls, source: str, prompts: Sequence[str]) -> Self:
        """Of what ``read_prompts`` reads from ``source``."""
        lines = "".join(f"{prompt}\n" for prompt in prompts)
        digest = hashlib.sha256(lines.encode()).hexdigest()
        return cls(file=Path(source).name, sha256=digest, count=len(prompts))

    def text(self) -> str:
        """For people."""
        plural = "s" * (self.count != 1)
        return f"{self.count} prompt{plural} of {self.file} ({self.sha256[:8]})"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Values of a metric with all conditions that they depend on.

    Attributes:
        nfe: Network evaluations per image.
        images: Number of generated images.
        extractor: Name of the feature network; only ``inception`` gives what papers call FID.
        extractor_sha256: Hex digest of its weights.
        reference: Name of the reference set.
        reference_images: Number of its images; None if a statistics file does not have it.
        seeds: By name, such as ``training`` and ``evaluation``.
    """

    VALUES: ClassVar[tuple[str, ...]]

    nfe: int
    images: int
    extractor: str
    extractor_sha256: str
    reference: str
    reference_images: int | None
    seeds: dict[str, int]

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """From ``as_dict``, of another version too: what is not known here is dropped."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: stored[name] for name in known & stored.keys()})

    def as_dict(self) -> dict[str, Any]:
        """The values that are known, then their conditions, as plain values for JSON."""
        values = {name: getattr(self, name) for name in self.VALUES}
        known = {name: value for name, value in values.items() if value not in (None, [])}
        return known | self.conditions()

    def conditions(self) -> dict[str, Any]:
        """Everything but the values."""
        return {name: value for name, value in asdict(self).items() if name not in self.VALUES}

    def differing(self, other: "Measurement") -> list[str]:
        """Conditions that keep two values from being compared."""
        return [key for key in _COMPARED if getattr(self, key) != getattr(other, key)]


@dataclass(frozen=True, kw_only=True)
class FID(Measurement):
    """A Frechet distance; its ``value`` is 0 if the statistics are equal.

    Attributes:
        noise: Standard error of ``value`` from the draw of the latents, see ``image_effects``; of
            a difference of two students of the same latents it is smaller.
        effects: [``GROUPS``] what each group of images adds, see ``grouped_effects``.
        prompts: Those of the images; None where they have none.
        guidance: When sampling; None where it is 1.
        decoded: What an autoencoder made the images of: ``x``, the state at the sampler's last
            level, and not z = x / sqrt(1 + sigma^2); None where the model draws images.

    Older results have no noise, effects, prompts, guidance or decoded.
    """

    VALUES = ("value", "noise", "effects")
    metric: ClassVar[str] = "FID"

    value: float
    noise: float | None = None
    effects: list[float] = field(default_factory=list, repr=False)
    prompts: PromptFile | None = None
    guidance: float | None = None
    decoded: str | None = None

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """From ``as_dict``, of another version too: what is not known here is dropped."""
        if (prompts := stored.get("prompts")) is None:
            return super().read(stored)
        known = {each.name: prompts[each.name] for each in fields(PromptFile)}
        return super().read({**stored, "prompts": PromptFile(**known)})

    def conditions(self) -> dict[str, Any]:
        """Everything but the values; what only some FIDs have is left out of the others."""
        found = super().conditions().items()
        own = ("prompts", "guidance", "decoded")
        return {name: value for name, value in found if value is not None or name not in own}

    def differing(self, other: "Measurement") -> list[str]:
        """Conditions that keep two values from being compared; prompts where both say theirs."""
        own, others = self.prompts, other.prompts if isinstance(other, FID) else None
        differ = own is not None and others is not None and own.sha256 != others.sha256
        return super().differing(other) + ["prompts"] * differ

    def in_short(self) -> str:
        """Its conditions for people: what a table of several has in common."""
        return (
            f"{self.images} images at NFE {self.nfe}, features of {self.extractor}, against "
            f"{self.reference}{self._under()}"
        )

    def in_full(self) -> str:
        """Its conditions for people, as a single FID is never shown without them."""
        guided = "" if self.guidance is None else f" and guidance {self.guidance:g}"
        seeds = ", ".join(f"{what} {seed}" for what, seed in self.seeds.items())
        return (
            f"of {self.images} images at NFE {self.nfe}{guided}, features of "
            f"{self.extractor} ({self.extractor_sha256[:8]}), against {self.reference_images} of "
            f"{self.reference}{self._under()}, seeds: {seeds}"
        )

    def _under(self) -> str:
        return "" if self.prompts is None else f", under {self.prompts.text()}"

    def noise_of_difference(self, other: "FID") -> float | None:
        """Standard error of the difference of two students of the same latents, from these.

        None where one has no effects, or other groups.
        """
        if not self.effects or len(self.effects) != len(other.effects):
            return None
        apart = [a - b for a, b in zip(self.effects, other.effects, strict=True)]
        return statistics.stdev(apart) / math.sqrt(len(apart))


@dataclass(frozen=True, kw_only=True)
class KID(Measurement):
    """A kernel distance, unbiased: around 0 for equal distributions, and may be negative.

    Attributes:
        mean: Over the subsets.
        std: Over the subsets; not the standard error of the mean.
    """

    VALUES = ("mean", "std")

    mean: float
    std: float
    subsets: int
    subset_size: int
    subset_seed: int


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall(Measurement):
    """Precision and recall.

    Attributes:
        precision: Share of the generated images inside the real ones' balls.
        recall: Share of the real images inside the generated ones' balls.
        neighbours: k; a ball reaches from an image to its k-th neighbour in its own set.
    """

    VALUES = ("precision", "recall")

    precision: float
    recall: float
    neighbours: int


@dataclass(frozen=True, kw_only=True)
class CLIPScore(Measurement):
    """How well images fit their prompts, 0 to 100; the extractor is the CLIP model.

    Attributes:
        value: Mean over the images.
        noise: Standard error of ``value``.
    """

    VALUES = ("value", "noise")

    value: float
    noise: float
    prompts: int

    def text(self) -> str:
        """For people, with its conditions."""
        return (
            f"CLIP score {self.value:.2f} +- {self.noise:.2g} ({self.images} images, "
            f"{self.prompts} prompts, {self.extractor})"
        )


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of one set of images; None if not asked for."""

    fid: FID
    kid: KID | None = None
    prc: PrecisionRecall | None = None
    clip_score: CLIPScore | None = None

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """From ``as_dict``."""
        kinds: dict[str, type[Measurement]] = {
            "fid": FID,
            "kid": KID,
            "prc": PrecisionRecall,
            "clip_score": CLIPScore,
        }
        found = {name: stored[name] for name in kinds if stored.get(name) is not None}
        read: dict[str, Any] = {name: kinds[name].read(each) for name, each in found.items()}
        return cls(**read)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Each measured metric by name, as plain values for JSON."""
        measured = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: each.as_dict() for name, each in measured.items() if each is not None}
