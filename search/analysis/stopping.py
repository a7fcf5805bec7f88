"""Whether more search could still beat the noise.

Makarova et al. 2022 (A. Makarova, H. Shen, V. Perrone, A. Klein, J. B. Faddoul, A. Krause, M.
Seeger, C. Archambeau, *Automatic Termination for Hyperparameter Optimization*): stop when an upper
bound on what is left to gain falls below the noise of a measurement. Optuna's own terminator, of
the same paper, is deprecated since 4.9. Here the curve is over what ``confirm``'s is over: the
slope alone where the space has a and b, which Adam does not see.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from search.analysis.confirmation import point_of
from search.analysis.surrogate import Evaluation, posterior
from search.spec.study_spec import StudySpec
from search.storage.ledger import ENDED_EARLY, Ledger

# The rest of a space is asked at so many points in all, a regular grid of them.
GRID_POINTS = 1024
DEVIATIONS = 2.0
# A process of more costs too much for every claim: the lowest stand for all.
MOST = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a search may still gain.

    Attributes:
        best: The lowest posterior mean at a measured point.
        gain: By how much the FID may be lower elsewhere, at two standard deviations; relative.
    """

    best: float
    gain: float


def room_left(
    evaluations: Sequence[Evaluation],
    space: Mapping[str, BaseDistribution],
    allowed: Callable[[dict[str, Any]], bool] = lambda _: True,
) -> Room | None:
    """What the curve through the evaluations still allows in the space.

    Args:
        evaluations: Of one training seed.
        space: Where the search looks; what the evaluations' points do not name counts for nothing.
        allowed: Whether a point of it may be trained at all.

    Returns:
        None where a curve has too little to go by: all at one point.
    """
    points = [dict(each.point) for each in evaluations]
    if all(point == points[0] for point in points):
        return None
    names = list(points[0])
    allowed_points = (point for point in _grid(space) if allowed(point))
    projected = dict.fromkeys(tuple(point[name] for name in names) for point in allowed_points)
    elsewhere = [dict(zip(names, values, strict=True)) for values in projected]
    means, deviations = posterior(evaluations, [*points, *elsewhere])
    best = float(means[: len(points)].min())
    lowest = float((means - DEVIATIONS * deviations).min())
    return Room(best=best, gain=(best - lowest) / abs(best))


class StopRule:
    """A study's rule, asked before each claim; works once for each newly completed trial.

    Args:
        spec: The study.
        space: What it samples.
        allowed: Whether a point of it may be trained at all.
    """

    def __init__(
        self,
        spec: StudySpec,
        space: Mapping[str, BaseDistribution],
        allowed: Callable[[dict[str, Any]], bool],
    ) -> None:
        self._spec = spec
        self._stop = spec.stop
        self._space = space
        self._allowed = allowed
        self._least = max(spec.stop.min_trials, spec.sampler.startup_trials)
        self._seen = 0

    def __call__(self, ledger: Ledger) -> None:
        """End the search if the rule says so: what runs is finished, nothing new is asked.

        A study is ended so once: whoever extends it afterwards has that budget run. Trials that
        somebody planned come first.
        """
        if self._stop.rule == "none":
            return
        counts = ledger.counts()
        begun = counts.ended + counts.running
        if counts.complete in (0, self._seen) or counts.waiting or begun >= counts.planned:
            return
        self._seen = counts.complete
        if counts.complete < self._least or ledger.attribute(ENDED_EARLY) is not None:
            return
        room = room_left(self._evaluations(ledger), self._space, self._allowed)
        if room is not None and room.gain < self._stop.noise:
            ledger.end_early(
                f"more search may lower the FID by {room.gain:.2%} at most, less than its noise "
                f"of {self._stop.noise:.2%} (stop.noise)"
            )

    def _evaluations(self, ledger: Ledger) -> list[Evaluation]:
        rows = ledger.rows(TrialState.COMPLETE, keys=())
        rows.sort(key=lambda row: row.value or 0.0)
        return [
            Evaluation(point=point, value=row.value or 0.0, group="search")
            for row in rows[:MOST]
            if (point := point_of(row.params, self._spec)) is not None
        ]


def _grid(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """A regular grid over the space, its corners included."""
    floats = [each for each in space.values() if isinstance(each, FloatDistribution)]
    wide = sum(each.low < each.high for each in floats)
    each_way = round(GRID_POINTS ** (1 / max(wide, 1)))
    axes: list[list[Any]] = []
    for distribution in space.values():
        if isinstance(distribution, CategoricalDistribution):
            axes.append(list(distribution.choices))
        else:
            assert isinstance(distribution, FloatDistribution)  # the two kinds there are
            low, high = distribution.low, distribution.high
            axes.append([low] if low == high else np.linspace(low, high, each_way).tolist())
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
