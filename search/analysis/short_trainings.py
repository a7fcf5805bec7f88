"""Short trainings inside a search: what is trained next, and for how long.

Length is a coordinate of the surrogate, so a short training tells something of a full one at a
part of its cost. Next comes what tells most for its cost about where the full curve is lowest, as
in multi-fidelity Bayesian optimisation (Klein et al. 2017, arXiv 1605.07079); here by the fall of
a variance in place of an entropy.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from bdense.weights.space import BASELINE
from search.analysis.observations import observed, point_of, spread_points
from search.analysis.surrogate import Array, Observation, Point, Posterior, posterior
from search.spec.study import StudySpec
from search.study.arms import Arm
from search.study.study import Study

NUM_POINTS = 128
# Of the posterior, to see where the curve may be lowest.
NUM_DRAWS = 1024


def most_telling(known: Posterior, num_points: int, costs: Array, pending: Sequence[int]) -> int:
    """Index of the training that tells most for its cost about where the curve is lowest.

    Each training lowers the variance of the full curve at each point. The sum of these, each
    counting by the probability that its point is the lowest, is what it tells.

    Args:
        known: Of m trainings, the first ``num_points`` of which are full ones of all points.
        num_points: Number of the points.
        costs: [m]; infinite for what is not to be chosen.
        pending: Trainings under way. They are treated as measured: how far a variance falls does
            not depend on their values.
    """
    covariance, noise = known.covariance, known.noise**2
    draws = np.random.default_rng(0).multivariate_normal(
        known.means[:num_points], covariance[:num_points, :num_points], NUM_DRAWS, method="eigh"
    )
    lowest = np.bincount(draws.argmin(axis=1), minlength=num_points) / NUM_DRAWS
    for each in pending:
        own = covariance[each]
        covariance = covariance - np.outer(own, own) / (own[each] + noise)
    told = lowest @ covariance[:num_points] ** 2 / (covariance.diagonal() + noise)
    return int((told / costs).argmax())


def next_training(
    observations: Sequence[Observation],
    points: Sequence[Point],
    *,
    length: float,
    whole: Sequence[Point],
    short: Sequence[Point],
    pending: Sequence[tuple[Point, bool]],
) -> tuple[int, bool] | None:
    """What is trained next: the index of a point, and whether for a short time.

    Until there is a surrogate it is the first point that is new, for a short time.

    Args:
        observations: What has been measured.
        points: Spread over the space, in the order of a sequence.
        length: Of a short training, in those of a trial, which is its cost too.
        whole, short: Points planned in full and for a short time. They are not chosen again: all
            have one seed, so their values would be the same.
        pending: Those under way, and whether for a short time.

    Returns:
        None where no point is new.
    """
    n = len(points)
    asked = [*points, *points, *(point for point, _ in pending)]
    is_short = [False] * n + [True] * n + [each for _, each in pending]
    costs = [math.inf if point in whole else 1.0 for point in points]
    costs += [math.inf if point in short else length for point in points]
    costs += [math.inf] * len(pending)
    if not any(map(math.isfinite, costs)):
        return None
    known = None
    if observations:
        logs = [math.log(length) if each else 0.0 for each in is_short]
        known = posterior(observations, asked, logs)
    if known is not None and np.isfinite(known.covariance).all():
        chosen = most_telling(known, n, np.array(costs), range(2 * n, len(asked)))
    else:
        chosen = next(i for i in [*range(n, 2 * n), *range(n)] if math.isfinite(costs[i]))
    return chosen % n, is_short[chosen]


def plan_short(study: Study) -> bool:
    """Plan the next training of a search, if short ones are left: a short one or a trial.

    Where another process plans one at the same time, this one looks again.

    Returns:
        Whether this call planned a short one.
    """
    spec, plan, given = study.spec, study.spec.search, study.given
    assert plan.short is not None
    assert given is not None
    change = plan.changes_when_short(spec)
    assert change is not None
    spread = spread_points(spec, NUM_POINTS)
    while True:
        seen, arms, variants, counts = given.size(), study.arms, study.variants, study.counts()
        rows = [each for each in study.rows() if variants[each[0].variant] == change]
        # Without a trial left, there is nothing to inform.
        if len(rows) >= plan.short.trainings or counts.total >= counts.planned:
            return False
        whole = _places(spec, study.proposed())
        short = _places(spec, [(arms[row.arm].params, ended) for row, ended in rows])
        uniform = _places(spec, [({BASELINE: spec.baselines[-1]}, True)])
        found = next_training(
            observed(study, study.search.rows(keys=())).observations,
            [point for _, point in spread],
            length=plan.short.length,
            whole=[point for point, _ in [*whole, *uniform]],
            short=[point for point, _ in short],
            pending=[
                (point, is_short)
                for places, is_short in ((whole, False), (short, True))
                for point, ended in places
                if not ended
            ],
        )
        if found is None:
            return False
        place, is_short = found
        params = spread[place][0]
        if is_short:
            stored = spec.space.stored(params, spec.resolved.num_branches)
            arm = Arm(name=spec.space.label(params), params=stored)
            if study.plan_row(arm, spec.seeds.training, change, seen=seen):
                return True
        elif study.search.enqueue(params, if_room=True):
            return False


def _places(
    spec: StudySpec, planned: Iterable[tuple[dict[str, Any], bool]]
) -> list[tuple[Point, bool]]:
    """The points of parameters, each with whether it has ended; others are left out."""
    found = []
    for params, ended in planned:
        # Another process may just draw them, or another program have added them.
        with suppress(KeyError, TypeError, ValueError):
            if (point := point_of(spec, params)) is not None:
                found.append((point, ended))
    return found
