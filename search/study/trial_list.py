"""``trials``: each row of a study that was started, as a table, as CSV or as JSON."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from optuna.trial import TrialState

from bdense.weights.space import BranchWeights, by_interval
from search.spec.metric import Metric
from search.storage.ledger import Ledger
from search.storage.tables import SURPLUS
from search.study.arms import ONE_SHOT, ArmRow
from search.study.study import Study
from search.study.wording import align

_STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)
_NAMES = {TrialState.FAIL: "failed"}
_READ = ("timings", "reason", "student", "weights", "tries", "worker", SURPLUS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRow:
    """One row.

    Attributes:
        study: Name of the Optuna study that holds it: the study's own, or its baselines'.
        number: In that study.
        state: complete, pruned, failed or running.
        arm: Name of a given arm; None for a point that was sampled.
        params: Parameters of the weights.
        seed: Of the training.
        variant: Settings of the method that differ from the study's.
        weights: w_1..w_K, a list for each interval where they differ; empty where it is not
            complete.
        metric: What it is judged by.
        value: Of that; None where it is not complete, and of a one-shot training, which has a
            curve.
        seconds: Spent on it by its last worker; None where it is not complete.
        tries: Attempts that counted against it; None where it has not ended.
        reason: Why it failed or was pruned.
        student: Its file below the runs.
        worker: Who finished it.
    """

    study: str
    number: int
    state: str
    arm: str | None
    params: dict[str, Any]
    seed: int
    variant: dict[str, Any]
    weights: BranchWeights
    metric: Metric
    value: float | None
    seconds: float | None
    tries: int | None
    reason: str | None
    student: str | None
    worker: str | None

    def as_dict(self) -> dict[str, Any]:
        """The form that ``trials --json`` prints."""
        return {key: getattr(self, name) for key, name in keys_of(self.metric).items()}


def keys_of(metric: Metric) -> dict[str, str]:
    """The keys of ``ListedRow.as_dict``, and the names of their fields."""
    names = [each.name for each in fields(ListedRow) if each.name != "metric"]
    return {metric.key if name == "value" else name: name for name in names}


def list_rows(study: Study) -> list[ListedRow]:
    """The rows of a study, its baselines first, by number."""
    return [row for ledger in reversed(study.ledgers) for row in _rows_of(study, ledger)]


def rows_csv(rows: Sequence[ListedRow]) -> str:
    """A header and a line for each row; each parameter and weight has a column."""
    params = list(dict.fromkeys(name for row in rows for name in row.params))
    variants = list(dict.fromkeys(name for row in rows for name in row.variant))
    branches = max((len(w) for row in rows for w in by_interval(row.weights)), default=0)
    lines = []
    for row in rows:
        values = row.as_dict()
        del values["params"], values["weights"], values["variant"]
        lines.append(
            values
            | {name: row.params.get(name) for name in params}
            | {name: row.variant.get(name) for name in variants}
            | _weight_cells(row.weights, branches)
        )
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, dict.fromkeys(name for line in lines for name in line))
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def _weight_cells(weights: BranchWeights, branches: int) -> dict[str, float | None]:
    """w_k, or w_n_k of interval n; branch K is the last, also of a student that has no other."""
    rows = by_interval(weights)
    cells: dict[str, float | None] = {}
    for n, row in enumerate(rows, 1):
        interval = f"{n}_" if len(rows) > 1 else ""
        padded = [None] * (branches - len(row)) + row
        cells |= {f"w_{interval}{k}": weight for k, weight in enumerate(padded, 1)}
    return cells


def rows_table(study: Study, rows: Sequence[ListedRow]) -> list[str]:
    """A header and a line for each row."""
    spec = study.spec
    space = spec.space
    cells = [("trial", "state", spec.metric.name, "seconds", "seed", "weights")]
    for row in rows:
        changed = [f"{name} {value}" for name, value in row.variant.items()]
        label = ", ".join([row.arm or space.label(row.params), *changed])
        cells.append(
            (
                str(row.number) if row.study == study.name else f"baseline {row.number}",
                row.state,
                "-" if row.value is None else row.metric.text(row.value),
                "-" if row.seconds is None else f"{row.seconds:.0f}",
                str(row.seed),
                label if row.reason is None else f"{label}: {row.reason}",
            )
        )
    return align(cells)


def _rows_of(study: Study, ledger: Ledger) -> Iterator[ListedRow]:
    # Read once: a study may have 10,000 rows.
    spec, arms, variants = study.spec, study.arms, study.variants
    metric, seed = spec.metric, spec.seeds.training
    found = [
        (trial, state)
        for state in _STATES
        for trial in ledger.rows(_READ, state=state)
        if SURPLUS not in trial.user_attrs
    ]
    for trial, state in sorted(found, key=lambda each: each[0].number):
        own: dict[str, Any] = {"arm": None, "params": trial.params, "seed": seed, "variant": {}}
        value = trial.value if state is TrialState.COMPLETE else None
        if ledger is study.given:
            row = ArmRow(**trial.params)
            arm, variant = arms[row.arm], variants[row.variant]
            own = {"arm": arm.name, "params": arm.params, "seed": row.seed, "variant": variant}
            if ONE_SHOT in arm.params:
                own["params"], value = {}, None
        stored = trial.user_attrs
        timings = stored.get("timings")
        yield ListedRow(
            **own,
            study=ledger.name,
            number=trial.number,
            state=_NAMES.get(state, state.name.lower()),
            weights=list(stored.get("weights", [])),
            metric=metric,
            value=value,
            seconds=None if timings is None else sum(timings.values()),
            tries=stored.get("tries"),
            reason=stored.get("reason"),
            student=stored.get("student"),
            worker=stored.get("worker"),
        )
