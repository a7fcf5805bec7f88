"""Is the search's best point good, or was it lucky? Candidates and baselines under fresh seeds.

Candidates are the points of lowest posterior mean of a Gaussian process over all evaluations, not
those of lowest value; each trains anew with the same fresh seeds as both baselines. The winner is
the candidate of lowest posterior mean over everything measured; what is said of it rests on the
fresh seeds alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from bdense.errors import InputError
from search.analysis.comparison import (
    ArmResult,
    Comparison,
    compare,
    difference_text,
)
from search.analysis.retraining import fresh_seeds
from search.analysis.surrogate import Evaluation, candidates, posterior_means
from search.errors import NotPlannedError, UnknownStudyError
from search.spec.study_spec import LearnedSpace, StudySpec
from search.storage.rows import StoredTrial
from search.study.arms import PLAIN, UNIFORM, Arm, Planned, PlannedRow
from search.study.retention import keep_too
from search.study.study import Study
from search.study.summary import FID_KEYS, headline, standing

CONFIRM_SUFFIX = ".confirm"
# Attributes of a confirmation: its budget; of how many trials how many candidates were chosen.
KIMG, CHOSEN_AFTER = "kimg", "chosen_after"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a confirmation says.

    Attributes:
        comparison: Candidates and baselines under the fresh seeds.
        winner: The chosen candidate.
        kimg: Budget of each.
        ended: Whether all rows have ended.
    """

    comparison: Comparison
    winner: ArmResult
    kimg: float
    ended: bool

    def lines(self) -> list[str]:
        """For people."""
        return [*self.comparison.table(), self.sentence(), self.comparison.conditions_line()]

    def sentence(self) -> str:
        """The winner in one."""
        comparison, winner = self.comparison, self.winner
        found = winner.summary()
        against = {
            name: comparison.against(winner, baseline)
            for name, baseline in (
                ("plain SFD", comparison.plain),
                ("uniform weights", comparison.uniform),
            )
        }
        judged = [
            f"against {name} {difference_text(pair)}"
            for name, pair in against.items()
            if pair is not None
        ]
        error = "" if found.standard_error is None else f" +- {found.error_text()}"
        return (
            f"confirmed{'' if self.ended else ' so far'} at {self.kimg:g} kimg: "
            f"{winner.arm.name}, mean FID {found.mean:.3f}{error} over {found.n} fresh seeds; "
            + "; ".join(judged)
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the winner, and every arm's FIDs."""
        comparison = self.comparison
        arms = []
        for result in comparison.results:
            found = result.summary()
            pairs = {
                "vs_plain": comparison.against(result, comparison.plain),
                "vs_uniform": comparison.against(result, comparison.uniform),
            }
            arms.append(
                result.arm.as_dict()
                | {"fids": {str(seed): fid for seed, fid in result.fids.items()}}
                | {"mean": found.mean, "n": found.n}
                | ({} if found.standard_error is None else {"std_err": found.standard_error})
                | {"conditions": {key: result.conditions[key] for key in FID_KEYS}}
                | {
                    name: {"mean": p.mean, "low": p.low, "high": p.high, "tie": p.tie}
                    for name, p in pairs.items()
                    if p is not None and p.n > 1
                }
            )
        return {
            "winner": self.winner.arm.as_dict(),
            "kimg": self.kimg,
            "ended": self.ended,
            "arms": arms,
        }


def plan_confirmation(
    study: Study, spec: StudySpec, *, kimg: float, seeds: int, count: int
) -> Planned:
    """The rows that are still to be run: candidates and both baselines, under each fresh seed.

    Called again it adds what is new: more seeds, another budget, and new candidates where the
    search has gone on since.

    Args:
        study: The search.
        spec: Its spec.
        kimg: Budget of each student.
        seeds: How many fresh ones.
        count: Candidates.

    Raises:
        InputError: No trial of the search is complete.
        SpecChangedError: The stored confirmation is of other conditions.
    """
    trials = complete_trials(study)
    name, facts = study.name + CONFIRM_SUFFIX, {"of": study.name}
    planned = Planned.create(study.url, name, "retrain", spec, facts=facts)
    arms = planned.arms or [PLAIN, UNIFORM]
    basis = [len(trials), count]
    if planned.ledger.attribute(CHOSEN_AFTER) != basis:
        known = {arm.trial for arm in arms}
        chosen = choose(study, spec, trials, count)
        arms += [arm for arm in chosen if arm.trial not in known]
    # A new candidate has to have the seeds of those that were there before it.
    known_seeds = {row.seed for row in planned.rows() if row.kimg == float(kimg)}
    rows = [
        PlannedRow(arm=index, seed=seed, kimg=float(kimg), nfe=spec.student.nfe)
        for seed in sorted(known_seeds | set(fresh_seeds(spec, seeds)))
        for index in range(len(arms))
    ]
    planned.plan(arms, rows)
    keep_too(study.trials, [arm.trial for arm in arms if arm.trial is not None])
    planned.ledger.study.set_user_attr(CHOSEN_AFTER, basis)
    planned.ledger.study.set_user_attr(KIMG, float(kimg))
    return planned


def complete_trials(study: Study) -> list[StoredTrial]:
    """The search's complete trials, with what ``arm_of`` asks of them.

    Raises:
        InputError: There is none.
    """
    trials = study.trials.rows(TrialState.COMPLETE, ("a", "b"))
    if not trials:
        raise InputError(
            f"{headline(standing(study))}: there is no point to choose yet; run "
            "bdense-search launch first"
        )
    return trials


def choose(study: Study, spec: StudySpec, trials: Sequence[StoredTrial], count: int) -> list[Arm]:
    """The points of lowest posterior mean, as arms; none that is uniform weights again."""
    uniform = _uniform_of(study, spec)
    found = candidates([*uniform, *_searched(trials)], count, taken=range(len(uniform)))
    return [arm_of(spec, trials[i - len(uniform)]) for i in found]


def arm_of(spec: StudySpec, trial: StoredTrial) -> Arm:
    """A trial's weights as an arm of other studies: (a, b), or how they are learned."""
    attrs = trial.user_attrs
    if isinstance(spec.weights, LearnedSpace):
        params = {**trial.params, "memory": spec.weights.memory}
        name = f"{params['rule']}, strength {params['strength']:.3f}"
    else:
        params = {"a": attrs["a"], "b": attrs["b"]}
        name = f"a {params['a']:.3f}"
    return Arm(name=f"{name} (trial {trial.number})", params=params, trial=trial.number)


def verdict(study: Study) -> Verdict | None:
    """What the study's confirmation says so far; None without one, or before it has a value."""
    try:
        planned = Planned.of(study.url, study.trials.beside(study.name + CONFIRM_SUFFIX))
    except (UnknownStudyError, NotPlannedError):
        return None
    spec = planned.spec(StudySpec)
    kimg = float(planned.ledger.attribute(KIMG) or spec.budget.kimg)
    comparison = compare(planned, kimg=kimg)
    most = max((len(result.fids) for result in comparison.results), default=0)
    # One that failed under a seed, or has not had all of them yet, does not win by the others.
    searched = [r for r in comparison.results if not r.arm.is_baseline and len(r.fids) == most]
    if not searched:
        return None
    means = _pooled_means(study, planned, spec, kimg, searched)
    winner = searched[min(range(len(searched)), key=means.__getitem__)]
    return Verdict(comparison=comparison, winner=winner, kimg=kimg, ended=not planned.left())


def _pooled_means(
    study: Study, planned: Planned, spec: StudySpec, kimg: float, searched: Sequence[ArmResult]
) -> list[float]:
    """Posterior mean of each candidate over all that was measured at that budget."""
    arms, evaluations = planned.arms, []
    if kimg == spec.budget.kimg:
        evaluations += [*_uniform_of(study, spec), *_searched(complete_trials(study))]
    for trial in planned.complete():
        row = PlannedRow.of(trial.params)
        point = point_of(arms[row.arm].params, spec)
        if row.kimg == kimg and point is not None:
            assert trial.value is not None
            evaluations.append(
                Evaluation(point=point, value=trial.value, group=f"seed {row.seed}")
            )
    asked = [point_of(result.arm.params, spec) or {} for result in searched]
    return posterior_means(evaluations, asked)


def point_of(params: Mapping[str, Any], spec: StudySpec) -> dict[str, Any] | None:
    """Where weights lie for the surrogate: the slope a, or a rule and its strength.

    Not b, which Adam does not see: two trials of one a are one student. Uniform weights are
    a = 0; plain SFD, and uniform weights among learned ones, lie nowhere.
    """
    learned = isinstance(spec.weights, LearnedSpace)
    if params.get("method") == "uniform" and not learned:
        return {"a": 0.0}
    names = ("rule", "strength") if learned else ("a",)
    return {name: params[name] for name in names} if names[0] in params else None


def _searched(trials: Sequence[StoredTrial]) -> list[Evaluation]:
    names = [name for name in trials[0].params if name != "b"] if trials else []
    return [
        Evaluation(
            point={name: trial.params[name] for name in names},
            value=float(trial.value or 0.0),
            group="search",
        )
        for trial in trials
    ]


def _uniform_of(study: Study, spec: StudySpec) -> list[Evaluation]:
    """The baseline of uniform weights as one more point of the space: the search measured it."""
    measured: Mapping[str, Any] | None = standing(study).baselines.get("uniform")
    point = point_of(UNIFORM.params, spec)
    if measured is None or point is None:
        return []
    return [Evaluation(point=point, value=float(measured["fid"]), group="search")]
