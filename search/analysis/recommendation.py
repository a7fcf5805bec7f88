"""Which arm to use, and how small a difference a study can tell.

The recommended arm is the simplest one that ties with the best: plain distillation is simpler than
uniform weights, and these than searched ones.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from bdense.weights.spaces import PLAIN, UNIFORM
from search.analysis.comparison import ArmResult, Comparison, compare, difference_text
from search.analysis.confirmation import Verdict
from search.analysis.paired import CONFIDENCE, Paired
from search.study.arms import Arm
from search.study.study import Study

_SIMPLEST_FIRST = (PLAIN, UNIFORM, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Noise of the difference of two students of one training seed and the same latents.

    Attributes:
        latents: Its standard deviation over latents; None where results do not hold their
            images' effects.
        seeds: Its standard deviation over training seeds; None without replicates.
        replicates: Seeds that it was measured from.
        images: Images of each FID; None where there is none.
    """

    latents: float | None
    seeds: float | None
    replicates: int
    images: int | None = None

    @property
    def least_difference(self) -> float | None:
        """The smallest difference that is told from noise, at 95 %; None if noise is not known."""
        if self.seeds is None:
            return None
        from scipy.stats import t

        return float(
            t.ppf((1 + CONFIDENCE) / 2, self.replicates - 1)
            * math.hypot(self.seeds, self.latents or 0.0)
        )

    @property
    def balanced_images(self) -> int | None:
        """Images that would make the latents' part half of the seeds'; None where it is already.

        The standard deviation falls with the square root of the images.
        """
        if not (self.seeds and self.latents and self.images) or self.latents <= self.seeds / 2:
            return None
        return math.ceil(self.images * (2 * self.latents / self.seeds) ** 2 / 1024) * 1024

    def as_dict(self) -> dict[str, float | None]:
        """As ``best --json`` prints it."""
        return {
            "latents": self.latents,
            "seeds": self.seeds,
            "least_difference": self.least_difference,
        }

    def text(self) -> str:
        """For people."""
        least = self.least_difference
        if least is None:
            return "the noise of these FIDs is not known; plan.replicates: 3 measures it"
        parts = [f"training seeds {self.seeds:.2g}"]
        parts += [] if self.latents is None else [f"latents {self.latents:.2g}"]
        more = self.balanced_images
        way_out = (
            f"; evaluation.images: {more} in a new study would make the latents' half of the "
            "seeds'"
        )
        return (
            f"least difference that this study can tell: {least:.2g} (standard deviations: "
            f"{', '.join(parts)}; {self.replicates} replicates)" + way_out * (more is not None)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The arm to use.

    Attributes:
        arm: Which one.
        fid: Its mean over the seeds.
        interval: Its paired difference from plain distillation; None for plain itself.
        why: In words.
    """

    arm: Arm
    fid: float
    interval: Paired | None
    why: str

    def text(self) -> str:
        """For people."""
        return f"recommended: {self.arm.name}, mean FID {self.fid:.3f}; {self.why}"

    def as_dict(self) -> dict[str, Any]:
        """As ``best --json`` prints it."""
        interval = self.interval
        known = interval is not None and interval.n > 1
        return {
            "arm": self.arm.baseline or self.arm.name,
            "params": self.arm.params,
            "fid": self.fid,
            "interval": [interval.low, interval.high] if interval is not None and known else None,
            "why": self.why,
        }


def assess(study: Study, found: Verdict | None) -> tuple[Noise, Recommendation | None]:
    """The noise of a search, and the arm to use by its confirmation, else by its baselines."""
    baselines = compare(study)
    return noise_of(baselines), recommend(baselines if found is None else found.comparison)


def assessment(noise: Noise, recommended: Recommendation | None) -> list[str]:
    """Both for people."""
    if recommended is None:
        return ["no arm is recommended before a baseline is complete"]
    return [noise.text(), recommended.text()]


def noise_of(comparison: Comparison) -> Noise:
    """The noise of a difference, from the baselines under their seeds."""
    plain, uniform = comparison.plain, comparison.uniform
    if plain is None or uniform is None or comparison.differing:
        return Noise(latents=None, seeds=None, replicates=0)
    shared = sorted(plain.values.keys() & uniform.values.keys())
    apart = [uniform.values[seed] - plain.values[seed] for seed in shared]
    pairs = ((uniform.fids[seed], plain.fids[seed]) for seed in shared)
    errors = [e for a, b in pairs if (e := a.noise_of_difference(b)) is not None]
    return Noise(
        latents=math.sqrt(statistics.fmean(e**2 for e in errors)) if errors else None,
        seeds=statistics.stdev(apart) if len(apart) > 1 else None,
        replicates=len(apart),
        images=plain.conditions.images,
    )


def recommend(comparison: Comparison) -> Recommendation | None:
    """The simplest arm that the one of lowest mean does not beat; None before a baseline has FIDs.

    An arm that lacks a seed's FID is left out: it must not win by its other seeds. With one seed,
    whose noise is not known, the lowest FID is taken.
    """
    if comparison.plain is None and comparison.uniform is None:
        return None
    most = max(len(each.fids) for each in comparison.results)
    whole = [each for each in comparison.results if len(each.fids) == most]
    reasons = [
        f"{each.arm.name}: {len(each.fids)} of {most} seeds"
        for each in comparison.results
        if each not in whole
    ]
    best = min(whole, key=lambda each: each.mean().mean)
    simplest_first = sorted(whole, key=lambda each: _SIMPLEST_FIRST.index(each.arm.baseline))
    # In order, so that of equal means the best itself ends the search.
    chosen = next(each for each in simplest_first if not _is_beaten(comparison, each, best))
    for other in simplest_first:
        if (pair := comparison.against(other, best)) is not None:
            # One seed has no interval to tie in.
            how = "a tie with" if pair.tie and pair.n > 1 else "worse than"
            reasons.append(_said(other, how, best, pair))
    if comparison.differing:
        reasons.append("these FIDs do not compare, see above")
    return Recommendation(
        arm=chosen.arm,
        fid=chosen.mean().mean,
        interval=comparison.against(chosen, comparison.plain),
        why="; ".join(reasons) or f"{chosen.arm.name} alone is complete",
    )


def _is_beaten(comparison: Comparison, one: ArmResult, best: ArmResult) -> bool:
    pair = comparison.against(best, one)
    if pair is None:
        return False
    return pair.high < 0 if pair.n > 1 else pair.mean < 0


def _said(one: ArmResult, how: str, other: ArmResult, pair: Paired) -> str:
    difference = difference_text(pair).removesuffix(", tie")
    return f"{one.arm.name}: {how} {other.arm.name} ({difference})"
