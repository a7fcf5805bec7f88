"""All there is to say of a study, read once: for the dashboard's notes and plots, and the report.

Reads the storage alone.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import optuna
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from search.analysis.comparison import Comparison, compare
from search.analysis.confirmation import Verdict, verdict
from search.report.chain_report import chain_chart, chain_conditions, chain_rows
from search.report.charts import Chart
from search.report.plots import arms_of, study_charts
from search.storage.engine import retrying
from search.storage.settings import CHANGES
from search.study.arms import Planned, PlannedRow
from search.study.study import FINGERPRINT, SPEC, Study
from search.study.summary import Standing, complete_trials, failed_rows, failures, standing

# From this many complete trials on the best tenth is more than one or two of them.
FEWEST_FOR_IMPORTANCE = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One look at a search.

    Attributes:
        now: Counts, best trial and baselines.
        trials: The complete ones, as ``complete_trials`` has them, each with ``searched`` (names
            of its parameters), ``hours`` (from the study's first start to its end) and
            ``timings`` (seconds by what they went to).
        spec: As YAML.
        fingerprint: Of the conditions.
        verdict: Of the confirmation, where there is one.
        importance: Share of each parameter; empty where it would say nothing.
        importance_remark: Why so, or "".
        failures: A line for each failed baseline and trial.
        changes: ``time``, ``key``, ``old`` and ``new`` of each setting that was changed.
        written: When this was read, UTC.
    """

    now: Standing
    trials: Sequence[dict[str, Any]]
    spec: str
    fingerprint: str
    verdict: Verdict | None
    importance: Mapping[str, float]
    importance_remark: str
    failures: Sequence[str]
    changes: Sequence[Mapping[str, Any]]
    written: str

    def charts(self) -> list[Chart]:
        """Its plots; none before a trial is complete."""
        if not self.trials:
            return []
        return study_charts(self.trials, self.now.baselines, self.importance)

    def confidence(self) -> str:
        """How much the best is to be trusted."""
        if self.verdict is not None:
            return self.verdict.sentence()
        return "one training seed, not confirmed: the lowest of several noisy values"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOverview:
    """One look at planned rows.

    Attributes:
        planned: The study.
        comparison: Its arms; of a chain, at the last number of steps.
        budgets: (title, comparison) for each budget and NFE; of a chain, none.
        tables: (title, rows of cells with a header) of the results.
        conditions: What its FIDs have in common.
        spec, fingerprint, failures, changes, written: As of ``Overview``.
    """

    planned: Planned
    comparison: Comparison
    budgets: Sequence[tuple[str, Comparison]]
    tables: Sequence[tuple[str, Sequence[tuple[str, ...]]]]
    conditions: Sequence[str]
    spec: str
    fingerprint: str
    failures: Sequence[str]
    changes: Sequence[Mapping[str, Any]]
    written: str

    def charts(self) -> list[Chart]:
        """Its plots; none before a row is complete."""
        if not self.comparison.results:
            return []
        if self.planned.kind == "progressive":
            return [chain_chart(self.planned)]
        return [
            arms_of(found, f"FID of each arm, {title}", f"arms-{index}")
            for index, (title, found) in enumerate(self.budgets)
        ]


def overview_of(study: Study) -> Overview:
    """Read a search."""
    record = study.trials.study
    attributes = retrying(lambda: record.user_attrs)
    importance, remark = importance_in(record)
    now, found = standing(study), verdict(study)
    if now.best is not None and found is not None and found.ended:
        is_winner = found.winner.arm.trial == now.best["number"]
        now = replace(now, best=now.best | {"confirmed": is_winner})
    return Overview(
        now=now,
        trials=_with_times(complete_trials(study), _trials(record)),
        spec=spec_yaml(attributes.get(SPEC, "{}")),
        fingerprint=str(attributes.get(FINGERPRINT, "")),
        verdict=found,
        importance=importance,
        importance_remark=remark,
        failures=failures(study),
        changes=list(attributes.get(CHANGES, [])),
        written=_now(),
    )


def planned_overview_of(planned: Planned) -> PlannedOverview:
    """Read planned rows."""
    record = planned.ledger.study
    attributes = retrying(lambda: record.user_attrs)
    is_chain = planned.kind == "progressive"
    budgets = [] if is_chain else by_budget(planned)
    tables: list[tuple[str, Sequence[tuple[str, ...]]]]
    if is_chain:
        tables, told = [("", chain_rows(planned))], chain_conditions(planned)
    else:
        tables = [(title, found.rows()) for title, found in budgets]
        told = list(dict.fromkeys(found.conditions_line() for _, found in budgets))
    return PlannedOverview(
        planned=planned,
        comparison=compare(planned),
        budgets=budgets,
        tables=tables,
        conditions=told,
        spec=spec_yaml(planned.spec_json),
        fingerprint=str(attributes.get(FINGERPRINT, "")),
        failures=failed_rows(planned.ledger, "row"),
        changes=list(attributes.get(CHANGES, [])),
        written=_now(),
    )


def by_budget(planned: Planned) -> list[tuple[str, Comparison]]:
    """The complete rows compared at each budget and NFE that rows were trained for."""
    rows = {(r.kimg, r.nfe) for r in (PlannedRow.of(t.params) for t in planned.complete())}
    return [
        (f"{kimg:g} kimg, NFE {nfe}", compare(planned, kimg=kimg, nfe=nfe))
        for kimg, nfe in sorted(rows, key=lambda pair: (pair[1] or 0, pair[0] or 0))
    ]


def importance_in(record: optuna.Study) -> tuple[dict[str, float], str]:
    """Share of each parameter in the FID by PED-ANOVA, or none and why."""
    trials = [trial for trial in _trials(record) if trial.state == TrialState.COMPLETE]
    names = sorted({name for trial in trials for name in trial.params})
    if len(names) == 1:
        return {}, f"No importance: {names[0]} is the only parameter that is searched."
    if len(trials) < FEWEST_FOR_IMPORTANCE:
        return {}, (
            f"No importance of the parameters yet: {len(trials)} complete trials say too little, "
            f"{FEWEST_FOR_IMPORTANCE} are needed."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return dict(retrying(lambda: optuna.importance.get_param_importances(record))), ""
        except (ValueError, RuntimeError) as error:
            return {}, f"No importance of the parameters: {error}"


def spec_yaml(text: str) -> str:
    """A stored spec as a study file would have it."""
    dumped: str = yaml.safe_dump(json.loads(text), sort_keys=False, allow_unicode=True)
    return dumped


def _with_times(
    complete: Sequence[dict[str, Any]], trials: Sequence[FrozenTrial]
) -> list[dict[str, Any]]:
    starts = [trial.datetime_start for trial in trials if trial.datetime_start is not None]
    by_number = {trial.number: trial for trial in trials}
    found = []
    for each in complete:
        trial = by_number.get(each["number"])
        if trial is None or trial.datetime_complete is None:
            continue  # it ended between two looks
        hours = (trial.datetime_complete - min(starts)).total_seconds() / 3600
        timings = trial.user_attrs.get("timings", {})
        own = {"searched": tuple(trial.params), "hours": hours, "timings": timings}
        found.append(each | own)
    return found


def _trials(record: optuna.Study) -> list[FrozenTrial]:
    return retrying(lambda: record.get_trials(deepcopy=False))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
