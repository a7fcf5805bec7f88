"""What a search has measured, as observations of its surrogate.

Earlier searches may be its priors. One may be wrong here, under another budget or teacher: each is
a group with an offset of its own, and where it disagrees with the study's values it is discounted.
Another length of training is a further coordinate, so that it counts as far as lengths agree.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import TrialState

from bdense.weights.space import BASELINE
from search.analysis.surrogate import Observation, posterior
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


def point_of(spec: StudySpec, params: dict[str, Any]) -> dict[str, float] | None:
    """Coordinates of weights for the surrogate; None where they have none, as plain ones."""
    space = spec.space
    at = space.coordinates(params)
    return None if at is None else dict(zip(space.axes, at, strict=True))


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
    """The baseline, the complete trials in order, replicates once there are any, and priors."""
    baseline, searched = _baseline_of(study), _searched(study.spec, trials)
    last = len(baseline) + len(searched)
    return Observed(
        observations=[
            *baseline,
            *searched,
            *_replicated(study),
            *_priors(study, [*baseline, *searched]),
        ],
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


def row_observations(
    spec: StudySpec, rows: Iterable[tuple[Arm, ArmRow, StoredTrial]]
) -> list[Observation]:
    """Complete rows of arms that have coordinates, a group for each seed."""
    return [
        Observation(point=point, value=spec.metric.loss(trial.value), group=f"seed {row.seed}")
        for arm, row, trial in rows
        if (point := point_of(spec, arm.params)) is not None and trial.value is not None
    ]


def prior_trials(study: Study, name: str) -> list[tuple[StoredTrial, Observation]]:
    """A prior's complete trials, one group; none where it was deleted since."""
    prior = study.sibling(name)
    if prior is None:
        return []
    trials = prior.search.rows(TrialState.COMPLETE, ())
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
