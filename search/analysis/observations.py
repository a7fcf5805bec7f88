"""What a search has measured, as observations of its surrogate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bdense.weights.spaces import BASELINE, UNIFORM
from search.analysis.surrogate import Observation
from search.spec.study import StudySpec
from search.storage.queries import StoredTrial
from search.study.arms import Arm, ArmRow
from search.study.study import Study
from search.study.summary import baselines_of

_SEARCH = "search"  # the group of the trials, which share one training seed


def arm_of(spec: StudySpec, trial: StoredTrial) -> Arm:
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
    """What a search has measured; ``uniform`` and ``trials`` are indices of its observations."""

    observations: list[Observation]
    uniform: range
    trials: range


def observed(study: Study, trials: Sequence[StoredTrial]) -> Observed:
    """Uniform weights, the complete trials in order, and replicates once there are any."""
    uniform, searched = _uniform_of(study), _searched(study.spec, trials)
    last = len(uniform) + len(searched)
    return Observed(
        observations=[*uniform, *searched, *_replicated(study)],
        uniform=range(len(uniform)),
        trials=range(len(uniform), last),
    )


def _searched(spec: StudySpec, trials: Sequence[StoredTrial]) -> list[Observation]:
    return [
        Observation(
            point=point_of(spec, trial.params) or {},
            value=float(trial.value or 0.0),
            group=_SEARCH,
        )
        for trial in trials
    ]


def _uniform_of(study: Study) -> list[Observation]:
    """The baseline of uniform weights, which the search measured, as one more point."""
    measured, point = baselines_of(study).get(UNIFORM), point_of(study.spec, {BASELINE: UNIFORM})
    if measured is None or point is None:
        return []
    return [Observation(point=point, value=measured.fid, group=_SEARCH)]


def _replicated(study: Study) -> list[Observation]:
    """Rows under the further seeds; of uniform weights alone they would tell nothing."""
    spec, arms, found = study.spec, study.arms, []
    if not any(arm.trial is not None for arm in arms):
        return []
    for trial in study.complete_rows():
        row = ArmRow.of(trial.params)
        point = point_of(spec, arms[row.arm].params)
        if row.seed != spec.seeds.training and point is not None:
            assert trial.value is not None
            found.append(Observation(point=point, value=trial.value, group=f"seed {row.seed}"))
    return found
