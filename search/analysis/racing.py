"""Replicates raced inside a search: which point is trained next under which further seed.

Intensification as in SMAC (Hutter, Hoos & Leyton-Brown 2011): the leader, which has the most
seeds, gets its next one first; others follow, up to as many. A point that is worse than the best
beyond the noise gets none. Seeds are those of the baselines, in order, so that differences are
paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from search.analysis.observations import observed, trial_arm
from search.analysis.paired import CONFIDENCE
from search.analysis.surrogate import candidates, posterior
from search.storage.queries import StoredTrial
from search.study.retention import keep_too
from search.study.study import Study

# A difference of more standard deviations than this is no noise.
BEYOND_NOISE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A point of the race.

    Attributes:
        trial: Number of its trial, which is its training under the first seed.
        mean: Posterior mean of its FID, less the lowest one's.
        error: Standard deviation of that difference.
        seeds: Those it was planned for, the first among them.
        ended: How many of them have ended.
    """

    trial: int
    mean: float
    error: float
    seeds: frozenset[int]
    ended: int


def next_replicate(
    contenders: Sequence[Contender], seeds: Sequence[int]
) -> tuple[Contender, int] | None:
    """The contender that is trained next, and under which seed; None where none is worth it.

    Args:
        contenders: By posterior mean, the lowest first.
        seeds: All there are, the trials' own first.
    """
    # Without those that are worse than the lowest beyond the noise.
    racing = [each for each in contenders if each.mean <= BEYOND_NOISE * each.error]
    if not racing:
        return None
    # The lowest of the points with the most seeds.
    leader = max(racing, key=lambda each: len(each.seeds))
    for each in (leader, *racing):
        most = len(seeds) if each is leader else len(leader.seeds)
        # At once as many more as have ended: 1, 2, 4, ...
        if len(each.seeds) < min(most, 2 * each.ended):
            return each, next(seed for seed in seeds if seed not in each.seeds)
    return None


def plan_replicate(study: Study) -> bool:
    """Plan the next replicate of a search, if its share of the budget has one left.

    That share grows with the trials that have ended. What is planned follows from what is stored:
    of two processes at once one plans, and where one dies the next plans the same.

    Returns:
        Whether this call planned one.
    """
    spec, given = study.spec, study.given
    assert given is not None
    seen, plan, counts = given.size(), spec.search, study.search.counts()
    arms, rows = study.arms, study.rows()
    spent = sum(arms[row.arm].trial is not None for row, _ in rows)
    earned = plan.race * min(counts.ended, plan.points) // plan.points
    left = plan.trials - counts.started
    trials = study.search.rows(keys=())
    if spent >= min(earned, left) or not trials:
        return False
    chosen = next_replicate(contenders_of(study, trials), spec.baseline_seeds)
    if chosen is None:
        return False
    contender, seed = chosen
    trial = next(each for each in trials if each.number == contender.trial)
    keep_too(study.search, [trial.number])
    return study.plan_row(trial_arm(spec, trial), seed, seen=seen)


def contenders_of(study: Study, trials: Sequence[StoredTrial]) -> list[Contender]:
    """Complete trials by posterior mean; of points that are nearly one, the better.

    Uniform weights do not race, having all seeds, but may be the lowest.
    """
    now = observed(study, trials)
    found = candidates(now.observations, len(trials), among=now.trials, taken=now.baseline)
    if not found:
        return []
    points = [now.observations[index].point for index in [*found, *now.baseline]]
    known = posterior(now.observations, points)
    means, errors = known.above(int(known.means.argmin()))
    arms, rows, first = study.arms, study.rows(), study.spec.seeds.training
    contenders = []
    for place, index in enumerate(found):
        number = trials[index - now.trials.start].number
        own = [(row.seed, ended) for row, ended in rows if arms[row.arm].trial == number]
        contenders.append(
            Contender(
                trial=number,
                mean=float(means[place]),
                error=float(errors[place]),
                seeds=frozenset({first, *(seed for seed, _ in own)}),
                ended=1 + sum(ended for _, ended in own),
            )
        )
    return contenders
