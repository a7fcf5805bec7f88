"""Short trainings inside a search: what is trained next, and for how long.

Length is a coordinate of the surrogate, so a short training tells something of a full one at a
part of its cost. Next comes what tells most for its cost about where the full curve is lowest, as
in multi-fidelity Bayesian optimisation (Klein et al. 2017, arXiv 1605.07079); here by the fall of
a variance in place of an entropy.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from optuna.trial import TrialState

from search.analysis.observations import observed, point_of, spread_points
from search.analysis.surrogate import Array, Observation, Point, Posterior, posterior
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
        pending: Trainings under way, whose values are not known, but what they will tell is.
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
) -> tuple[int, bool]:
    """What is trained next: the index of a point, and whether for a short time.

    Until there is a surrogate it is the next of the points, for a short time.

    Args:
        observations: What has been measured.
        points: Spread over the space, in the order of a sequence.
        length: Of a short training, in those of a trial, which is its cost too.
        whole, short: Points trained in full and for a short time, those under way among them;
            under its seed, a second training would give the same value.
        pending: Points under way, and whether for a short time.
    """
    n, first = len(points), (len(short) % len(points), True)
    asked = [*points, *points, *(point for point, _ in pending)]
    is_short = [False] * n + [True] * n + [each for _, each in pending]
    if not observations:
        return first
    known = posterior(observations, asked, [math.log(length) if s else 0.0 for s in is_short])
    if not np.isfinite(known.covariance).all():
        return first
    costs = [math.inf if point in whole else 1.0 for point in points]
    costs += [math.inf if point in short else length for point in points]
    costs += [math.inf] * len(pending)
    chosen = most_telling(known, n, np.array(costs), range(2 * n, len(asked)))
    return chosen % n, is_short[chosen]


def plan_short(study: Study) -> bool:
    """Plan the next training of a search, if short ones are left: a short one or a trial.

    Of two processes at once one plans.

    Returns:
        Whether this call planned a short one.
    """
    spec, plan, given = study.spec, study.spec.search, study.given
    assert plan.short is not None
    assert given is not None
    change = plan.changes_when_short(spec)
    assert change is not None
    seen, arms, variants = given.size(), study.arms, study.variants
    rows = [each for each in study.rows() if variants[each[0].variant] == change]
    trials, pending = study.search.rows(TrialState.COMPLETE, ()), study.pending()
    counts = study.search.counts()
    # Without a trial left, there is nothing to inform.
    if len(rows) >= plan.short.trainings or counts.ended + len(pending) >= plan.points:
        return False

    def places(params: Iterable[dict[str, Any]]) -> list[Point]:
        return [point for each in params if (point := point_of(spec, each)) is not None]

    spread = spread_points(spec, NUM_POINTS)
    under_way = [(point, False) for point in places(pending)]
    under_way += [
        (point, True) for point in places(arms[row.arm].params for row, ended in rows if not ended)
    ]
    place, is_short = next_training(
        observed(study, trials).observations,
        [point for _, point in spread],
        length=plan.short.length,
        whole=places([*(trial.params for trial in trials), *pending]),
        short=places(arms[row.arm].params for row, _ in rows),
        pending=under_way,
    )
    params = spread[place][0]
    if not is_short:
        study.search.enqueue(params)
        return False
    stored = spec.space.stored(params, spec.resolved.num_branches)
    arm = Arm(name=spec.space.label(params), params=stored)
    return study.plan_row(arm, spec.seeds.training, change, seen=seen)
