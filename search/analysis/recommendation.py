"""Which arm to use, and how small a difference a study can tell.

The recommended arm is the simplest one that ties with the best: plain distillation is simpler than
uniform weights, and these than searched ones.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from search.analysis.comparison import ArmResult, Comparison, difference_text
from search.analysis.paired import CONFIDENCE, Paired
from search.spec.metric import Metric
from search.spec.sections import MOST_IMAGES
from search.study.arms import Arm


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Noise of the difference of two trials of one training seed and the same latents.

    Attributes:
        metric: What is noisy.
        latents: Its standard deviation over latents; None where results do not hold their
            images' effects.
        seeds: Its standard deviation over training seeds; None without replicates, and where they
            all have one value.
        replicates: Seeds that it was measured from.
        images: Images of each FID; None where there is none.
    """

    metric: Metric
    latents: float | None
    seeds: float | None
    replicates: int
    images: int | None

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
        needed = self._needed_images
        return None if needed is None else math.ceil(needed / 1024) * 1024

    @property
    def _needed_images(self) -> float | None:
        if not (self.seeds and self.latents and self.images) or self.latents <= self.seeds / 2:
            return None
        return self.images * (2 * self.latents / self.seeds) ** 2

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
            if self.replicates >= 2:
                why = f"no two of {self.replicates} replicates differ"
            elif self.metric.is_fid:
                why = "plan.replicates: 3 measures it"
            else:  # a program has one baseline, and a difference needs a second arm
                why = "plan.replicates: 3 and plan.race: 2 measure it"
            return f"the noise of these {self.metric.plural} is not known; {why}"
        parts = [f"training seeds {self.seeds:.2g}"]
        parts += [] if self.latents is None else [f"latents {self.latents:.2g}"]
        way_out, needed = "", self._needed_images
        if needed is not None and (self.images or 0) < MOST_IMAGES:
            most = min(self.balanced_images or MOST_IMAGES, MOST_IMAGES)
            images = f"evaluation.images: {most} in a new study would"
            way_out = (
                f"; {images} bring the latents' part down to half of the seeds' part"
                if needed <= MOST_IMAGES
                else f"; even {images} not bring the latents' part down to half of the seeds' part"
            )
        return (
            f"least difference in {self.metric.name} that this study can tell: {least:.2g} "
            "(standard deviations of a difference: "
            f"{', '.join(parts)}; {self.replicates} replicates){way_out}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The arm to use.

    Attributes:
        arm: Which one.
        metric: What it is judged by.
        value: Its mean over the seeds.
        interval: Its paired difference from the first baseline; None for that itself.
        why: In words.
    """

    arm: Arm
    metric: Metric
    value: float
    interval: Paired | None
    why: str

    def text(self) -> str:
        """For people."""
        mean = f"mean {self.metric.name} {self.metric.text(self.value)}"
        return f"recommended: {self.arm.name}, {mean}; {self.why}"

    def as_dict(self) -> dict[str, Any]:
        """As ``best --json`` prints it."""
        interval = self.interval
        known = interval is not None and interval.deviation is not None
        return {
            "arm": self.arm.baseline or self.arm.name,
            "params": self.arm.params,
            self.metric.key: self.value,
            "interval": [interval.low, interval.high] if interval is not None and known else None,
            "why": self.why,
        }


def noise_of(comparison: Comparison) -> Noise:
    """The noise of a difference, from the baselines under their seeds.

    Of a study with one baseline it is that of its difference from the most replicated point.
    """
    metric, names = comparison.metric, comparison.baselines
    one, other = comparison.baseline(names[0]), comparison.baseline(names[-1])
    if len(names) == 1:
        other = next((each for each in comparison.results if each.arm.baseline is None), None)
    pair = None if other is None else comparison.against(other, one)
    if one is None or other is None or pair is None:
        return Noise(metric=metric, latents=None, seeds=None, replicates=0, images=None)
    shared = one.values.keys() & other.values.keys()
    figures: dict[int, Any] = dict(one.figures)  # of the same kind as the other's
    found = (other.figures[seed].noise_of_difference(figures[seed]) for seed in shared)
    errors = [error for error in found if error is not None]
    return Noise(
        metric=metric,
        latents=math.sqrt(statistics.fmean(e**2 for e in errors)) if errors else None,
        seeds=pair.deviation,
        replicates=pair.n,
        images=one.figure.images,
    )


def recommend(comparison: Comparison) -> Recommendation | None:
    """The simplest arm that the one of the best mean does not beat; None before a baseline's.

    An arm that lacks a seed's figure is left out: it must not win by its other seeds. With one
    seed, whose noise is not known, the best figure is taken.
    """
    metric, simplest = comparison.metric, (*comparison.baselines, None)
    if not any(each.arm.baseline for each in comparison.results):
        return None
    most = max(len(each.figures) for each in comparison.results)
    whole = [each for each in comparison.results if len(each.figures) == most]
    reasons = [
        f"{each.arm.name}: {len(each.figures)} of {most} seeds"
        for each in comparison.results
        if each not in whole
    ]
    best = min(whole, key=lambda each: metric.loss(each.mean().mean))
    simplest_first = sorted(whole, key=lambda each: simplest.index(each.arm.baseline))
    # In order, so that of equal means the best itself ends the search.
    chosen = next(each for each in simplest_first if not _is_beaten(comparison, each, best))
    for other in simplest_first:
        if (pair := comparison.against(other, best)) is not None:
            # One seed has no interval to tie in.
            how = "a tie with" if pair.tie and pair.n > 1 else "worse than"
            difference = difference_text(pair, metric).removesuffix(", tie")
            reasons.append(f"{other.arm.name}: {how} {best.arm.name} ({difference})")
    if comparison.differing:
        reasons.append(f"these {metric.plural} do not compare, see above")
    return Recommendation(
        arm=chosen.arm,
        metric=metric,
        value=chosen.mean().mean,
        interval=comparison.against(chosen, comparison.baseline(comparison.baselines[0])),
        why="; ".join(reasons) or f"{chosen.arm.name} alone is complete",
    )


def _is_beaten(comparison: Comparison, one: ArmResult, best: ArmResult) -> bool:
    pair = comparison.against(best, one)
    if pair is None:
        return False
    # Where more is better, the best one's difference is above 0.
    loss = comparison.metric.loss
    least = max(loss(pair.low), loss(pair.high)) if pair.n > 1 else loss(pair.mean)
    return least < 0
