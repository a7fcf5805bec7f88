"""Studies of given arms that are made from others: confirmations, transfers, promotions.

All are arms under seeds, and differ only in which arms, under whose conditions.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bdense.knobs import KnobError
from bdense.weights import space_of
from bdense.weights.space import SearchSpace
from search.analysis.confirmation import (
    CONFIRM_SUFFIX,
    choose,
    confirmation_of,
    confirmed_arm,
    require_trials,
    verdict,
)
from search.spec.study import StudySpec
from search.study.arms import Arm, arms_study, baseline_arms
from search.study.retention import keep_too
from search.study.study import CHOSEN_AFTER, JUDGED, Study

PROMOTE_SUFFIX, FROM = ".promote", ".from."


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedArms:
    """What a study of given arms is made of.

    Attributes:
        spec: Its name and conditions.
        arms, seeds, variants: Each arm is trained under each seed and each changed setting of the
            method.
        of: Name of the search that the arms come from.
        chosen_after: Of a confirmation, numbers of trials and candidates at the choice.

    Raises:
        InputError: The study has no use for an arm's weights, such as of other branches.
    """

    spec: StudySpec
    arms: Sequence[Arm]
    seeds: Sequence[int]
    variants: Sequence[Mapping[str, Any]] = ({},)
    of: str | None
    chosen_after: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm.baseline is None:
                self.spec.require_fitting(arm.params)

    def store(self, url: str) -> Study:
        """The study with these rows planned, in a storage.

        Raises:
            SpecChangedError: The stored study is of other conditions.
        """
        study = Study.create(url, self.spec, of=self.of)
        study.plan(self.arms, self.seeds, self.variants)
        return study

    def as_spec(self) -> StudySpec:
        """The spec that a study file with these arms would have."""
        plan = replace(
            self.spec.given,
            arms=tuple(arm.baseline or arm.params for arm in self.arms),
            seeds=tuple(self.seeds),
            variants=tuple(map(dict, self.variants)),
        )
        return replace(self.spec, plan=plan)


def confirmation_arms(
    study: Study, *, method: Mapping[str, Any], seeds: int, count: int
) -> PlannedArms:
    """Candidates and the baselines under fresh seeds, and what is stored of them already.

    Called again it adds what is new: more seeds, another budget, and new candidates where the
    search has gone on since.

    Args:
        study: The search.
        method: Settings of the method, where they differ from the search's.
        seeds: Number of fresh seeds.
        count: Number of candidates.

    Raises:
        InputError: No trial of the search is complete.
    """
    trials, stored = require_trials(study), confirmation_of(study)
    change, planned = differing(study.spec, method), set(fresh_seeds(study.spec, seeds))
    arms, chosen_after = baseline_arms(study.spec), None
    if stored is not None:
        arms, chosen_after = stored.arms or arms, stored.main.attribute(CHOSEN_AFTER)
        # A new candidate has to have the seeds of those that were there before it.
        variants = stored.variants
        planned |= {row.seed for row, _ in stored.rows() if variants[row.variant] == change}
    if chosen_after != [len(trials), count]:
        known = {arm.trial for arm in arms}
        arms += [arm for arm in choose(study, trials, count) if arm.trial not in known]
    return PlannedArms(
        spec=arms_study(study.spec, study.name + CONFIRM_SUFFIX),
        arms=arms,
        seeds=sorted(planned),
        variants=[change],
        of=study.name,
        chosen_after=(len(trials), count),
    )


def plan_confirmation(study: Study, *, method: Mapping[str, Any], seeds: int, count: int) -> Study:
    """Store ``confirmation_arms``, which the search then keeps the students of."""
    asked = confirmation_arms(study, method=method, seeds=seeds, count=count)
    confirmation = asked.store(study.url)
    keep_too(study.search, [arm.trial for arm in asked.arms if arm.trial is not None])
    judged = confirmation.variants.index(dict(asked.variants[0]))
    confirmation.main.store({CHOSEN_AFTER: asked.chosen_after, JUDGED: judged})
    return confirmation


def transfer_arms(study: Study, to: StudySpec, *, top: int, seeds: int) -> PlannedArms:
    """A study's top weights, taken literally, and the baselines, under another's conditions.

    Args:
        study: Where the weights were found.
        to: Under whose conditions they are measured.
        top: Number of weights, by the lowest posterior mean.
        seeds: Number of fresh seeds.

    Raises:
        InputError: No trial of the study is complete, both are one, or weights do not fit.
    """
    if to.name == study.name:
        raise KnobError(
            "to", f"names study {study.name} itself; give another's file, or confirm it instead"
        )
    arms = [*baseline_arms(to), *choose(study, require_trials(study), top)]
    spec = arms_study(to, f"{to.name}{FROM}{study.name}")
    return PlannedArms(spec=spec, arms=arms, seeds=fresh_seeds(to, seeds), of=study.name)


def plan_given(url: str, spec: StudySpec) -> Study:
    """The arms that a study's file names.

    Raises:
        InputError: An arm is none, or a study that one is the winner of has none.
        SpecChangedError: The stored study has other conditions.
    """
    plan = spec.given
    arms = [_named(url, spec, each) for each in plan.arms]
    named = [each for each in plan.arms if isinstance(each, dict)]
    of = next((str(each["winner_of"]) for each in named if "winner_of" in each), None)
    asked = PlannedArms(spec=spec, arms=arms, seeds=plan.seeds, variants=plan.variants, of=of)
    return asked.store(url)


def fresh_seeds(spec: StudySpec, count: int, used: Collection[int] = ()) -> list[int]:
    """The lowest seeds that neither the search nor ``used`` has."""
    seen = {*spec.baseline_seeds, spec.seeds.evaluation, *used}
    return [seed for seed in range(count + len(seen)) if seed not in seen][:count]


def arm_from(text: str) -> Arm:
    """``A,B`` of the command line.

    Raises:
        InputError: It is no pair of finite numbers.
    """
    parts = text.split(",")
    try:
        a, b = (float(part) for part in (*parts, *["0"] * (2 - len(parts))))
    except ValueError as error:
        problem = f"{text} is no A,B of log w_k = a k + b; give two numbers, as in 1.386,-4.274"
        raise KnobError("weights", problem) from error
    if not (math.isfinite(a) and math.isfinite(b)):
        raise KnobError("weights", f"must be finite numbers, got {text}")
    params = {"a": a, "b": b}
    return _given(space_of(params), params)


def at_another_k(arm: Arm, searched_at: int, num_branches: int) -> str:
    """What an arm's weights mean at another K, in words; "" where they mean the same."""
    if searched_at == num_branches:
        return ""
    return space_of(arm.params).at_another_k(arm.params, searched_at, num_branches)


def other_budget(study: Study, method: Mapping[str, Any]) -> str:
    """A warning where weights were confirmed under other settings, else ""."""
    found = verdict(study)
    if found is None or dict(found.comparison.variant) == differing(study.spec, method):
        return ""
    settings = ", ".join(f"{name} {value}" for name, value in method.items())
    return (
        f"these weights were confirmed at {found.budget} and are used at "
        f"{settings or 'the settings of the search'}: the best ones move with that; confirm them "
        "there"
    )


def differing(spec: StudySpec, method: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not the study's own."""
    own = spec.method.options
    return {name: value for name, value in method.items() if own.get(name) != value}


def _named(url: str, spec: StudySpec, given: str | Mapping[str, Any]) -> Arm:
    if isinstance(given, str):
        return next(arm for arm in baseline_arms(spec) if arm.baseline == given)
    if "winner_of" in given:
        return confirmed_arm(Study.open(url, given["winner_of"]))
    return given_arm(spec, given)


def given_arm(spec: StudySpec, params: Mapping[str, Any]) -> Arm:
    """The arm of given parameters, of any space of weights.

    Raises:
        InputError: No space has them.
    """
    space = spec.workload.space_of(params)
    return _given(space, space.stored(params, spec.resolved.num_branches))


def _given(space: SearchSpace, params: Mapping[str, Any]) -> Arm:
    """An arm with parameters in their stored form, so that equal weights are one arm."""
    return Arm(name=f"{space.label(params)} (given)", params=dict(params))
