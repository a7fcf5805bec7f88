"""Is the search's best point good, or was it lucky? Candidates and baselines under fresh seeds.

Candidates are the points of lowest posterior mean of a Gaussian process over all evaluations, not
those of lowest value. They and both baselines are trained under the same fresh seeds. The winner
has the lowest posterior mean over everything measured; claims about it rest on the fresh seeds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bdense.errors import InputError
from search.analysis.comparison import (
    ArmResult,
    Comparison,
    compare,
    difference_text,
    replicates_of,
)
from search.analysis.observations import observed, point_of, row_observations, trial_arm
from search.analysis.surrogate import candidates, posterior_means
from search.errors import UnconfirmedError
from search.spec.study import StudySpec
from search.storage.queries import StoredTrial
from search.study.arms import Arm
from search.study.study import JUDGED, Study
from search.study.summary import Summary, headline, judged_by_mean, summary_of

CONFIRM_SUFFIX = ".confirm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of a confirmation: its rows, the winner among them, whether all rows ended.

    ``spec`` is the search's.
    """

    comparison: Comparison
    winner: ArmResult
    spec: StudySpec
    ended: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings that each student was trained with."""
        return {**self.spec.method.options, **self.comparison.variant}

    @property
    def budget(self) -> str:
        """What each student was trained for, such as ``12.8 kimg``."""
        return self.spec.workload.budget(self.settings)

    def lines(self) -> list[str]:
        """For people."""
        return [*self.comparison.table(), self.sentence(), self.comparison.conditions_line()]

    def sentence(self) -> str:
        """The winner in one."""
        comparison, winner = self.comparison, self.winner
        metric = comparison.metric
        found = winner.mean()
        judged = [
            f"against {baseline.arm.name} {difference_text(pair, metric)}"
            for baseline in map(comparison.baseline, comparison.baselines)
            if baseline is not None and (pair := comparison.against(winner, baseline)) is not None
        ]
        error = "" if found.standard_error is None else f" +- {found.error_text(metric.form)}"
        return (
            f"confirmed{'' if self.ended else ' so far'} at {self.budget}: {winner.arm.name}, "
            f"mean {metric.name} {metric.text(found.mean)}{error} over {found.n} fresh seeds; "
            + ("; ".join(judged) or "no baseline is complete to judge it by")
        )

    def as_dict(self) -> dict[str, Any]:
        """As ``confirm --json`` prints it: the winner, and every arm's figures."""
        comparison = self.comparison
        changed = {name: v for name, v in comparison.variant.items() if name != "kimg"}
        return {
            "winner": self._arm(self.winner.arm),
            **({"kimg": self.settings["kimg"]} if "kimg" in self.settings else {}),
            **({"method": changed} if changed else {}),
            "ended": self.ended,
            "arms": [self._result(each) for each in comparison.results],
        }

    def _result(self, result: ArmResult) -> dict[str, Any]:
        comparison, found = self.comparison, result.mean()
        others = {f"vs_{name}": comparison.baseline(name) for name in comparison.baselines}
        pairs = {name: comparison.against(result, other) for name, other in others.items()}
        return {
            **self._arm(result.arm),
            f"{comparison.metric.key}s": {str(s): value for s, value in result.values.items()},
            "mean": found.mean,
            "n": found.n,
            **({} if found.standard_error is None else {"std_err": found.standard_error}),
            "conditions": result.figure.conditions(),
            **{
                name: {"mean": p.mean, "low": p.low, "high": p.high, "tie": p.tie}
                for name, p in pairs.items()
                if p is not None and p.deviation is not None
            },
        }

    def _arm(self, arm: Arm) -> dict[str, Any]:
        """An arm for scripts; plain distillation under its method's name."""
        if arm.baseline is None:
            return asdict(arm)
        return asdict(arm) | {"params": {"method": self.spec.baseline_key(arm.baseline)}}


def confirmation_of(study: Study) -> Study | None:
    """A search's confirmation; None without one."""
    return study.sibling(study.name + CONFIRM_SUFFIX)


def verdict(study: Study) -> Verdict | None:
    """The confirmation's result so far; None without one, or before a candidate has a value."""
    confirmation = confirmation_of(study)
    if confirmation is None or confirmation.is_search:
        return None
    spec = study.spec
    judged = int(confirmation.main.attribute(JUDGED) or 0)
    comparison = compare(confirmation, variant=judged)
    most = max((len(result.figures) for result in comparison.results), default=0)
    # A candidate that lacks a seed's value must not win by its other seeds.
    searched = [r for r in comparison.results if r.arm.baseline is None and len(r.figures) == most]
    if not searched:
        return None
    means = _pooled_means(study, confirmation, judged, searched)
    winner = searched[min(range(len(searched)), key=means.__getitem__)]
    ended = not confirmation.left()
    return Verdict(comparison=comparison, winner=winner, spec=spec, ended=ended)


def judged_summary(study: Study) -> tuple[Summary, Verdict | None]:
    """A search's summary, which knows its best and whether that is confirmed, and the verdict."""
    now, found = summary_of(study), verdict(study)
    if (replicates := replicates_of(study)) is not None:
        places = (each.arm.trial for each in replicates.results)
        now = judged_by_mean(study, now, next(each for each in places if each is not None))
    if now.best is not None and found is not None and found.ended:
        now = replace(now, confirmed=found.winner.arm.trial == now.best.number)
    return now, found


def confirmed_arm(study: Study) -> Arm:
    """The confirmed winner.

    Raises:
        UnconfirmedError: There is none yet, or the confirmation has not ended.
        InputError: No trial of the search is complete.
    """
    found = verdict(study)
    way_out = f"run bdense-search confirm {study.name} first"
    if found is None:
        require_trials(study)
        raise UnconfirmedError(
            f"study {study.name} has no confirmed winner, only a best of n that may have been "
            f"lucky; {way_out}"
        )
    if not found.ended:
        raise UnconfirmedError(f"the confirmation of study {study.name} has not ended; {way_out}")
    return found.winner.arm


def require_trials(study: Study) -> list[StoredTrial]:
    """The search's complete trials.

    Raises:
        InputError: There is none.
    """
    trials = study.search.rows(keys=())
    if not trials:
        raise InputError(
            f"{headline(study)}: there is no point to choose yet; run bdense-search launch first"
        )
    return trials


def choose(study: Study, trials: Sequence[StoredTrial], count: int) -> list[Arm]:
    """The points of lowest posterior mean, as arms, without one that repeats uniform weights.

    In a space without coordinates they are those of lowest value.
    """
    spec = study.spec
    if not spec.space.axes:
        loss = spec.metric.loss
        ranked = sorted(trials, key=lambda trial: (loss(trial.value or 0.0), trial.number))
        return [trial_arm(spec, trial) for trial in ranked[:count]]
    now = observed(study, trials)
    found = candidates(now.observations, count, among=now.trials, taken=now.baseline)
    return [trial_arm(spec, trials[index - now.trials.start]) for index in found]


def _pooled_means(
    study: Study, confirmation: Study, judged: int, searched: Sequence[ArmResult]
) -> list[float]:
    """Posterior mean of each candidate over all that was measured at that budget.

    In a space without coordinates it is the mean over the fresh seeds.
    """
    spec = study.spec
    if not spec.space.axes:
        return [spec.metric.loss(result.mean().mean) for result in searched]
    rows = [each for each in confirmation.complete_arms() if each[1].variant == judged]
    evaluations = row_observations(spec, rows)
    if not confirmation.variants[judged]:
        evaluations = [*observed(study, require_trials(study)).observations, *evaluations]
    asked = [point_of(spec, result.arm.params) or {} for result in searched]
    return posterior_means(evaluations, asked)
