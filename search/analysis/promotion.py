"""The winner's weights at work: progressive distillation with them, or SFD trained again.

Both beside their baselines, under the same seeds for all, as a study of planned rows.
"""

import math
from collections.abc import Sequence

from bdense.errors import InputError
from bdense.weights.spaces import LogLinearWeights
from search.analysis.confirmation import CONFIRM_SUFFIX, verdict
from search.analysis.retraining import fresh_seeds
from search.errors import UnknownStudyError
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_spec import StudySpec
from search.study.arms import PLAIN, UNIFORM, Arm, Planned, PlannedRow
from search.study.study import Study
from search.study.summary import in_short, standing

SFD_SUFFIX = ".promote"
PLAIN_PD = Arm(name="plain PD", params={"method": "pd"})
# Of a promoted arm, by the parameters that its weights follow from.
GIVEN = ("a", "b")


def confirmed_arm(study: Study) -> Arm:
    """The confirmed winner.

    Raises:
        InputError: There is none yet, or the confirmation has not ended.
    """
    found = verdict(study)
    way_out = f"run bdense-search confirm {study.name} first, or give weights by --weights A,B"
    if found is None:
        best = standing(study).best
        if best is None:
            raise InputError(
                f"no trial of study {study.name} is complete, so there is nothing to promote; run "
                "bdense-search launch first, or give weights by --weights A,B"
            )
        raise InputError(
            f"study {study.name} has no confirmed winner, only a best of n ({in_short(best)}) "
            f"that may have been lucky; {way_out}"
        )
    if not found.ended:
        raise InputError(f"the confirmation of study {study.name} has not ended; {way_out}")
    return found.winner.arm


def given_arm(text: str) -> Arm:
    """``A,B`` of the command line.

    Raises:
        InputError: It is no pair of finite numbers.
    """
    parts = text.split(",")
    try:
        a, b = (float(part) for part in (*parts, *["0"] * (2 - len(parts))))
    except ValueError as error:
        raise InputError(
            f"--weights {text} is no A,B of log w_k = a k + b; give two numbers, as in "
            "--weights 1.386,-4.274"
        ) from error
    if not (math.isfinite(a) and math.isfinite(b)):
        raise InputError(f"--weights {text} must be finite numbers")
    return Arm(name=f"a {a:.3f} (given)", params={"a": a, "b": b})


def said_of_weights(arm: Arm, searched_at: int | None, substeps: int) -> str:
    """What the same (a, b) means at another K, in words."""
    searched, values = LogLinearWeights(a=arm.params["a"]), _literally(arm, substeps)
    weights = " ".join(f"{value / sum(values):.3g}" for value in values)
    here = f"w_{substeps}/w_1 = {searched.last_to_first(substeps):.4g} at K = {substeps}"
    if searched_at is None or searched_at == substeps:
        return f"{_formula(arm)}: {here}; rescaled to sum 1: {weights}"
    there = f"w_{searched_at}/w_1 = {searched.last_to_first(searched_at):.4g} at the search's "
    return (
        f"{_formula(arm)}: {there}K = {searched_at} becomes {here}, taken literally; rescaled to "
        f"sum 1: {weights}"
    )


def said_of_budget(study: Study, kimg: float) -> str:
    """A line where the weights were confirmed at another budget; the best ones move with it."""
    found = verdict(study)
    if found is None or found.kimg == kimg:
        return ""
    return (
        f"these weights were confirmed at {found.kimg:g} kimg and are used at {kimg:g}: the best "
        f"ones move with the budget; confirm them there by --kimg {kimg:g}\n"
    )


def plan_progressive(
    url: str, spec: PromotionSpec, arm: Arm, *, of: str | None, seeds: Sequence[int]
) -> Planned:
    """Chains still to be run: plain, uniform and the promoted weights, under each seed.

    Args:
        url: The storage.
        spec: The promotion.
        arm: What is promoted.
        of: Name of the search it comes from.
        seeds: Of the training.

    Raises:
        InputError: The weights are learned while training, which PD does not, or their sum is no
            positive, finite number.
        SpecChangedError: A promotion of that name has other conditions or weights.
    """
    _require_given(arm, "progressive distillation")
    _require_sum(arm, spec.chain.substeps)
    facts = {"of": of, **arm.params}
    planned = Planned.create(url, spec.name, "progressive", spec, facts=facts)
    arms = planned.arms or [PLAIN_PD, UNIFORM, arm]
    planned.plan(
        arms, [PlannedRow(arm=index, seed=seed) for seed in seeds for index in range(len(arms))]
    )
    return planned


def plan_retraining(
    study: Study,
    spec: StudySpec,
    arm: Arm,
    *,
    nfes: Sequence[int],
    kimg: float,
    seeds: int,
) -> Planned:
    """Students of SFD still to be trained, at a budget of their own: the same arms, for each NFE.

    Args:
        study: The search.
        spec: Its spec.
        arm: What is promoted.
        nfes: Network evaluations, a student of its own for each.
        kimg: Budget of each.
        seeds: How many fresh ones.

    Raises:
        SpecChangedError: The stored promotion is of other conditions.
    """
    name, facts = study.name + SFD_SUFFIX, {"of": study.name}
    planned = Planned.create(study.url, name, "retrain", spec, facts=facts)
    arms, places = planned.with_arms([PLAIN, UNIFORM, arm])
    # Nor the seeds that the winner was chosen by.
    used = seeds_of(study.url, study.name + CONFIRM_SUFFIX)
    rows = [
        PlannedRow(arm=place, seed=seed, kimg=float(kimg), nfe=nfe)
        for nfe in nfes
        for seed in fresh_seeds(spec, seeds, used)
        for place in places
    ]
    planned.plan(arms, rows)
    return planned


def seeds_of(url: str, name: str) -> set[int]:
    """Training seeds of a study of planned rows; none where there is no such study."""
    try:
        return {row.seed for row in Planned.open(url, name).rows()}
    except UnknownStudyError:
        return set()


def _require_given(arm: Arm, where: str) -> None:
    if not arm.params.keys() >= set(GIVEN):
        raise InputError(
            f"the weights of {arm.name} are learned while training, which {where} does not do; "
            "give fixed ones by --weights A,B"
        )


def _require_sum(arm: Arm, substeps: int) -> None:
    """Rescaled to sum 1 they must be numbers."""
    if not 0 < sum(_literally(arm, substeps)) < math.inf:
        raise InputError(
            f"the weights of {arm.name}, {_formula(arm)}, have no positive, finite sum at K = "
            f"{substeps}; give others by --weights A,B"
        )


def _formula(arm: Arm) -> str:
    a, b = arm.params["a"], arm.params["b"]
    return f"log w_k = {a:.4g} k {'-' if b < 0 else '+'} {abs(b):.4g}"


def _literally(arm: Arm, substeps: int) -> list[float]:
    """w_1 .. w_K."""
    return LogLinearWeights(a=arm.params["a"], b=arm.params["b"]).values(substeps)
