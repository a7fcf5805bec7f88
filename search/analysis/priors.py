"""Earlier searches as priors of a new one: which may be used, and the points that they propose.

How they enter its surrogate: ``search.analysis.observations``.
"""

import contextlib
import json
from typing import Any

from bdense.errors import InputError
from bdense.weights.space import require_point
from search.analysis.observations import prior_trials
from search.analysis.surrogate import Observation, candidates
from search.errors import NoSearchError, SpecError, UnknownStudyError
from search.spec.study import StudySpec
from search.storage.queries import StoredTrial
from search.study.study import CONDITIONS, Study

FIRST_POINTS = 3  # of the priors, tried before any other
_SEEDED = "seeded_from"  # the study's attribute: priors whose points were planned
# Another length of training moves the best weights a little; the rest is another problem.
_MAY_DIFFER = ("method.kimg",)
_COMPARED = ("data", "prompts", "teacher.", "method.", "weights.")


def require_priors(url: str, spec: StudySpec) -> list[str]:
    """Check a search's priors before anything is planned.

    Returns:
        A line for each, for people.

    Raises:
        InputError: A prior does not exist or has no complete trial, its space has other
            coordinates, or it is of another data set, teacher or method and
            ``plan.prior_other`` does not allow that.
    """
    return [_checked(url, spec, name) for name in spec.search.prior]


def _checked(url: str, spec: StudySpec, name: str) -> str:
    if name == spec.name:
        raise SpecError(f"plan.prior: {name} is the study itself; name earlier ones")
    try:
        prior = Study.open(url, name, reading=True)
        trials = prior.search.rows(keys=())
    except (UnknownStudyError, NoSearchError) as error:
        raise SpecError(f"plan.prior: {error}") from error
    if not trials:
        raise SpecError(f"plan.prior: study {name} has no complete trial yet; leave it out")
    if prior.spec.space.axes != spec.space.axes:
        raise SpecError(
            f"plan.prior: study {name} searched {prior.spec.space.name} weights, whose "
            f"coordinates are others than those of {spec.space.name}; leave it out"
        )
    differing = _differing(prior, spec)
    if differing and not spec.search.prior_other:
        raise SpecError(
            f"plan.prior: study {name} differs in {', '.join(differing)}; leave it out, or use it "
            "all the same by plan.prior_other: true"
        )
    other = f", which differs in {', '.join(differing)}" if differing else ""
    return f"prior: {len(trials)} trials of study {name}{other}"


def _differing(prior: Study, spec: StudySpec) -> list[str]:
    """Conditions of the problem itself that a prior has otherwise."""
    old, new = json.loads(prior.main.attribute(CONDITIONS)), spec.conditions()
    return [
        key
        for key in sorted(old.keys() | new.keys())
        if key.startswith(_COMPARED) and key not in _MAY_DIFFER and old.get(key) != new.get(key)
    ]


def plan_first_points(study: Study) -> None:
    """Plan the points of lowest posterior mean over the priors, if any, each prior's once."""
    spec = study.spec
    planned = set(study.main.attribute(_SEEDED) or [])
    new = [name for name in spec.plan.prior if name not in planned]
    if not new:
        return
    found: list[tuple[StoredTrial, Observation]] = []
    for name in new:
        found += prior_trials(study, name)
    points: list[dict[str, Any]] = []
    for index in candidates([each for _, each in found], len(found)) if found else ():
        params = found[index][0].params
        with contextlib.suppress(InputError):  # out of this search's bounds
            points.append(require_point(spec.space, params, spec.resolved.num_branches))
    for point in points[: min(FIRST_POINTS, spec.search.points)]:
        study.search.enqueue(point)
    study.search.change(_SEEDED, lambda stored: sorted({*(stored or []), *spec.search.prior}))
