"""What a search has measured, as observations of its surrogate.

Earlier searches may be its priors. One may be wrong here, under another budget or teacher: each is
a group with an offset of its own, and where it disagrees with the study's values it is discounted.
Another length of training is a further coordinate, so that it counts as far as lengths agree.
Short trainings of the search itself have that coordinate, and a level of their own.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bdense.weights.space import BASELINE, Choice
from search.analysis.surrogate import Observation, Point, posterior
from search.spec.study import StudySpec
from search.storage.queries import StoredTrial
from search.study.arms import Arm, ArmRow
from search.study.study import Study
from search.study.summary import baselines_of

# Values of a study's own before a prior is compared with them.
MIN_OWN = 4
_SEARCH = "search"  # the group of the trials, which share one training seed


def trial_arm(spec: StudySpec, trial: StoredTrial) -> Arm:
    """A trial's weights as an arm."""
    space = spec.space
    return Arm(
        name=f"{space.label(trial.params)} (trial {trial.number})",
        params=space.stored(trial.params, spec.resolved.num_branches),
        trial=trial.number,
    )


def point_of(spec: StudySpec, params: dict[str, Any]) -> Point | None:
    """Coordinates of weights for the surrogate; None where they have none, as plain ones."""
    space = spec.space
    at = space.coordinates(params)
    return None if at is None else dict(zip(space.axes, at, strict=True))


def spread_points(spec: StudySpec, count: int) -> list[tuple[dict[str, Any], Point]]:
    """``count`` points, evenly spread over the space, and their coordinates.

    Fewer where some lie beyond its bound, have no coordinates or come twice.
    """
    from scipy.stats.qmc import Sobol

    space, drawn = spec.space, spec.space.distributions()
    found = []
    for place in Sobol(len(drawn), scramble=False).random(count).tolist():
        params: dict[str, Any] = {
            name: each.options[int(share * len(each.options))]
            if isinstance(each, Choice)
            else each.at(share)
            for share, (name, each) in zip(place, drawn.items(), strict=True)
        }
        point = point_of(spec, params)
        is_within = space.excess(params, spec.resolved.num_branches) <= 0
        if point is not None and is_within and (params, point) not in found:
            found.append((params, point))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a search has measured, lower values being better.

    ``baseline``, of the one baseline that is a point of the space, and ``trials`` are indices of
    its observations.
    """

    observations: list[Observation]
    baseline: range
    trials: range


def observed(study: Study, trials: Sequence[StoredTrial]) -> Observed:
    """The baseline, the complete trials in order, replicates, short trainings and priors."""
    baseline, searched = _baseline_of(study), _searched(study.spec, trials)
    own, last = [*baseline, *searched], len(baseline) + len(searched)
    return Observed(
        observations=[*own, *_replicated(study), *_short(study), *_priors(study, own)],
        baseline=range(len(baseline)),
        trials=range(len(baseline), last),
    )


def _searched(spec: StudySpec, trials: Sequence[StoredTrial]) -> list[Observation]:
    metric = spec.metric
    return [
        Observation(
            point=point_of(spec, trial.params) or {},
            value=metric.loss(float(trial.value or 0.0)),
            group=_SEARCH,
        )
        for trial in trials
    ]


def _baseline_of(study: Study) -> list[Observation]:
    """Uniform weights, or a program's defaults, which the search measured, as one more point."""
    spec = study.spec
    name = spec.baselines[-1]
    measured, point = baselines_of(study).get(name), point_of(spec, {BASELINE: name})
    if measured is None or point is None:
        return []
    return [Observation(point=point, value=spec.metric.loss(measured.value), group=_SEARCH)]


def _replicated(study: Study) -> list[Observation]:
    """Rows under the further seeds; of uniform weights alone they would tell nothing."""
    if not any(arm.trial is not None for arm in study.arms):
        return []
    spec = study.spec
    rows = [each for each in study.complete_arms() if each[1].seed != spec.seeds.training]
    return row_observations(spec, rows)


def _short(study: Study) -> list[Observation]:
    """Short trainings, on a level of their own."""
    spec, variants = study.spec, study.variants
    found: list[Observation] = []
    for place, change in list(enumerate(variants))[1:]:
        rows = [each for each in study.complete_arms() if each[1].variant == place]
        length = log_length(change, spec.method.options)
        found += row_observations(spec, rows, f"short {place}", length)
    return found


def row_observations(
    spec: StudySpec,
    rows: Iterable[tuple[Arm, ArmRow, StoredTrial]],
    group: str = "seed",
    length: float = 0.0,
) -> list[Observation]:
    """Complete rows of arms that have coordinates, a group for each seed."""
    return [
        Observation(
            point=point,
            value=spec.metric.loss(trial.value),
            group=f"{group} {row.seed}",
            log_length=length,
        )
        for arm, row, trial in rows
        if (point := point_of(spec, arm.params)) is not None and trial.value is not None
    ]


def prior_trials(study: Study, name: str) -> list[tuple[StoredTrial, Observation]]:
    """A prior's complete trials, one group; none where it was deleted since."""
    prior = study.sibling(name)
    if prior is None:
        return []
    trials = prior.search.rows(keys=())
    measured = _searched(study.spec, trials)
    length = log_length(prior.spec.method.options, study.spec.method.options)
    return [
        (trial, replace(each, group=f"prior {name}", log_length=length))
        for trial, each in zip(trials, measured, strict=True)
    ]


def log_length(method: Mapping[str, Any], of: Mapping[str, Any]) -> float:
    """Logarithm of the ratio of two trainings' lengths; 0 of a method without ``kimg``."""
    return math.log(method["kimg"] / of["kimg"]) if "kimg" in method.keys() & of.keys() else 0.0


def _priors(study: Study, own: Sequence[Observation]) -> list[Observation]:
    """Priors whose noise is as large as they disagree with a study's own values."""
    found: list[Observation] = []
    for name in study.spec.search.prior:
        prior = [each for _, each in prior_trials(study, name)]
        # The whole prior counts as one value with that error.
        noise = disagreement(prior, own) * math.sqrt(len(prior)) if prior else 0.0
        found += [replace(each, noise=noise) for each in prior]
    return found


def disagreement(prior: Sequence[Observation], own: Sequence[Observation]) -> float:
    """Standard deviation of a study's values about a prior's curve, beyond what noise explains.

    The level is free; 0 while the study has too few values to tell.
    """
    if len(own) < MIN_OWN:
        return 0.0
    known = posterior(prior, [each.point for each in own])
    off = statistics.variance(
        each.value - mean for each, mean in zip(own, known.means.tolist(), strict=True)
    )
    expected = known.noise**2 + float(known.covariance.diagonal().mean())
    return math.sqrt(max(0.0, off - expected)) if math.isfinite(expected) else math.sqrt(off)
