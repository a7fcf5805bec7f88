"""When a search has nothing left to find: no point could still beat the arm that is used anyway.

A gain smaller than the least detectable difference is noise.
"""

import math
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np

from bdense.weights.space import PLAIN, UNIFORM
from search.analysis.comparison import Comparison, compare
from search.analysis.observations import observed, point_of, spread_points
from search.analysis.racing import BEYOND_NOISE, plan_replicate
from search.analysis.recommendation import noise_of, recommend
from search.analysis.short_trainings import plan_short
from search.analysis.surrogate import posterior
from search.study.study import Study

# Complete trials for each coordinate before the rule is asked: fewer do not show a valley.
MIN_TRIALS = 8
# Points of the space that it looks at.
NUM_POINTS = 512
ENDED_EARLY = "ended_early"  # the study's attribute


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestGain:
    """What the best point may still gain, as the study's attribute and ``best --json`` hold it.

    Attributes:
        arm: Name of the recommended arm.
        gain: Upper bound of its FID less that of any point, at 97.5 %.
        least_difference: See ``search.analysis.recommendation.Noise``.
        trials: Complete trials behind it.
    """

    arm: str
    gain: float
    least_difference: float
    trials: int

    def text(self) -> str:
        """For people, where it ended the search."""
        return (
            f"the search ended after {self.trials} complete trials: no point can be expected to "
            f"beat {self.arm} by more than {self.gain:.2g}, and the least difference that the "
            f"study can tell is {self.least_difference:.2g}; to search on, launch it with "
            "plan.stop: false"
        )

    @classmethod
    def of(cls, study: Study) -> Self | None:
        """What ended a search before its last trial; None where nothing did, or of given arms."""
        if not study.is_search:
            return None
        stored = study.search.attribute(ENDED_EARLY)
        is_over = stored is not None and study.search.budget < study.spec.search.points
        return cls(**stored) if is_over else None


def largest_gain(study: Study) -> LargestGain | None:
    """What a search may still gain; None before all baselines and enough trials have ended."""
    spec, comparison, arms = study.spec, compare(study), study.arms
    # With fewer seeds the least difference would be far larger.
    if any(arms[row.arm].baseline and not ended for row, ended in study.rows()):
        return None
    least, best = noise_of(comparison).least_difference, recommend(comparison)
    trials = study.search.rows(keys=())
    if least is None or best is None or len(trials) < MIN_TRIALS * len(spec.space.axes):
        return None
    now = observed(study, trials)
    if not now.baseline:
        return None
    own = point_of(spec, best.arm.params)
    reference = now.observations[now.baseline[0]].point if own is None else own
    spread = [point for _, point in spread_points(spec, NUM_POINTS)]
    points = [reference, *spread, *(now.observations[i].point for i in now.trials)]
    means, errors = posterior(now.observations, points).above(0)
    shift, error = (0.0, 0.0) if own is not None else _plain_less_uniform(comparison)
    gains = shift - means + BEYOND_NOISE * np.hypot(errors, error)
    return LargestGain(
        arm=best.arm.name,
        gain=float(gains.max()),
        least_difference=least,
        trials=len(trials),
    )


def _plain_less_uniform(comparison: Comparison) -> tuple[float, float]:
    """Mean and standard error of the difference: plain students are no point of a space."""
    plain, uniform = comparison.baseline(PLAIN), comparison.baseline(UNIFORM)
    assert plain is not None
    found = comparison.against(plain, uniform)
    # The least difference is known, so this is.
    assert found is not None
    assert found.deviation is not None
    return found.mean, found.deviation / math.sqrt(found.n)


def stop_or_plan(study: Study) -> bool:
    """End a search that has nothing left to find, else plan a replicate or a short training.

    Workers call it between rows, and a launch before its first one.

    Returns:
        Whether a row was planned.
    """
    plan = study.spec.plan
    if LargestGain.of(study) is not None:
        return False
    if plan.stop:
        found = largest_gain(study)
        if found is not None and found.gain < found.least_difference:  # that would be noise
            study.search.change(ENDED_EARLY, lambda _: asdict(found))
            study.search.start_no_more()
            return False
    if plan.race > 0 and plan_replicate(study):
        return True
    return plan.short is not None and plan_short(study)
