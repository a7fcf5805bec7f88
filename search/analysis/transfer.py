"""The best weights of one study under another's conditions (B-DENSE, table 4)."""

from bdense.errors import InputError
from search.analysis.confirmation import choose, complete_trials
from search.analysis.retraining import fresh_seeds
from search.spec.study_spec import StudySpec
from search.study.arms import PLAIN, UNIFORM, Planned, PlannedRow
from search.study.study import Study

INFIX = ".from."


def transfer_name(to: str, study: str) -> str:
    """Name of the study that holds a transfer's rows."""
    return f"{to}{INFIX}{study}"


def plan_transfer(
    study: Study, spec: StudySpec, to: StudySpec, *, top: int, seeds: int
) -> Planned:
    """Rows still to be run: the study's top weights, literally, and both baselines of the other.

    Args:
        study: Where the weights were found.
        spec: Its spec.
        to: Under whose conditions they are measured.
        top: How many, by the lowest posterior mean.
        seeds: How many fresh ones, the same for all.

    Raises:
        InputError: No trial of the study is complete, or both are one.
        SpecChangedError: The stored transfer is of other conditions.
    """
    if to.name == study.name:
        raise InputError(
            f"--to names study {study.name} itself; give another's file, or confirm it instead"
        )
    trials = complete_trials(study)
    name, facts = transfer_name(to.name, study.name), {"of": study.name}
    planned = Planned.create(study.url, name, "retrain", to, facts=facts)
    arms, places = planned.with_arms([PLAIN, UNIFORM, *choose(study, spec, trials, top)])
    rows = [
        PlannedRow(arm=place, seed=seed, kimg=float(to.budget.kimg), nfe=to.student.nfe)
        for seed in fresh_seeds(to, seeds)
        for place in places
    ]
    planned.plan(arms, rows)
    return planned
