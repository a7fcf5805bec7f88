"""Where studies stand, for Prometheus: text at /metrics, computed by SQL as it is asked for.

A few queries over the whole database and a few for each study's baselines, whatever its trials:
an index does the counting.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from search.storage.leases import (
    LEASE,
    LEFT_OUT,
    RELEASED,
    STATE,
    STUDIES,
    STUDY_ATTRIBUTES,
    TRIALS,
    database_clock,
)
from search.storage.rows import KIND_OF_VALUE, VALUES, Rows
from search.study.study import ARMS, BASELINES_SUFFIX

PATH = "/metrics"
# Optuna's states in the words of ``status``.
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}

Application: TypeAlias = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def mount(application: Application, storage: RDBStorage) -> Application:
    """The same application with ``/metrics`` of the storage's studies."""
    registry = CollectorRegistry()
    registry.register(Studies(storage.engine))
    metrics: Application = make_wsgi_app(registry)

    def routed(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != PATH:
            return application(environ, start_response)
        try:
            return metrics(environ, start_response)
        except SQLAlchemyError:
            # What the driver says may name hosts and users; the log of the server has it.
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"the study database does not answer\n"]

    return routed


@dataclass(frozen=True, slots=True)
class _Study:
    """One study of ours: its key in the database, its name, and what it says of itself."""

    key: int
    name: str
    attributes: Mapping[str, str]

    @property
    def is_search(self) -> bool:
        """Whether its values compare: neither baselines nor planned rows."""
        return ARMS not in self.attributes and not self.name.endswith(BASELINES_SUFFIX)


class Studies(Collector):
    """Gauges of every study that bdense-search made in a database, baselines' own included."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What there is now.

        Raises:
            SQLAlchemyError: The database does not answer.
        """
        with self._engine.connect() as connection:
            studies = _studies(connection)
            counts = _counts(connection)
            best = _best(connection)
            claimed = _claimed(connection, database_clock(self._engine))
            ended = _ended(connection)
        now = datetime.now(UTC).replace(tzinfo=None)
        planned = _gauge("bdense_trials_planned", "Trials to run in all.")
        trials = _gauge("bdense_trials", "Trials by state.", "state")
        lowest = _gauge("bdense_best_fid", "Lowest FID of a search's complete trials.")
        baselines = _gauge("bdense_baseline_fid", "FID of a search's baselines.", "method")
        lease = _gauge(
            "bdense_oldest_lease_seconds", "Time since the claim of the longest running trial."
        )
        overdue = _gauge(
            "bdense_leases_overdue", "Running trials whose worker did not renew its lease in time."
        )
        since = _gauge("bdense_seconds_since_completion", "Time since a trial last ended.")
        for study in studies:
            name = study.name
            planned.add_metric([name], float(study.attributes["budget"]))
            for state, word in STATES.items():
                trials.add_metric([name, word], counts.get((study.key, state.name), 0))
            if study.is_search and study.key in best:
                lowest.add_metric([name], best[study.key])
            if name.endswith(BASELINES_SUFFIX):
                for row in Rows(self._engine, study.key).of_state(TrialState.COMPLETE, ()):
                    labels = [name.removesuffix(BASELINES_SUFFIX), str(row.params["method"])]
                    baselines.add_metric(labels, row.value or 0.0)
            if study.key in claimed:
                oldest, late = claimed[study.key]
                lease.add_metric([name], oldest)
                overdue.add_metric([name], late)
            if study.key in ended:
                since.add_metric([name], (now - ended[study.key]).total_seconds())
        yield from (planned, trials, lowest, baselines, lease, overdue, since)


def _gauge(name: str, help_: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_, labels=["study", *labels])


def _studies(connection: sa.Connection) -> list[_Study]:
    attributes: dict[int, dict[str, str]] = {}
    for row in connection.execute(
        sa.select(STUDY_ATTRIBUTES).where(STUDY_ATTRIBUTES.c.key.in_(("budget", ARMS)))
    ):
        attributes.setdefault(row.study_id, {})[row.key] = row.value_json
    found = connection.execute(sa.select(STUDIES).order_by(STUDIES.c.study_name))
    return [
        _Study(row.study_id, row.study_name, attributes[row.study_id])
        for row in found
        if "budget" in attributes.get(row.study_id, {})
    ]


def _counts(connection: sa.Connection) -> dict[tuple[int, str], int]:
    """Trials by study and state, without those that count nowhere."""
    rows = connection.execute(
        sa.select(TRIALS.c.study_id, STATE.label("state"), sa.func.count().label("trials"))
        .where(~LEFT_OUT)
        .group_by(TRIALS.c.study_id, STATE)
    )
    return {(row.study_id, row.state): row.trials for row in rows}


def _best(connection: sa.Connection) -> dict[int, float]:
    rows = connection.execute(
        sa.select(TRIALS.c.study_id, sa.func.min(VALUES.c.value).label("value"))
        .select_from(TRIALS.join(VALUES, VALUES.c.trial_id == TRIALS.c.trial_id))
        .where(STATE == "COMPLETE", VALUES.c.objective == 0, KIND_OF_VALUE == "FINITE")
        .group_by(TRIALS.c.study_id)
    )
    return {row.study_id: row.value for row in rows}


def _claimed(
    connection: sa.Connection, clock: sa.ColumnElement[float]
) -> dict[int, tuple[float, int]]:
    """Seconds since the oldest claim of a trial that runs, and how many leases are overdue."""
    late = sa.case((LEASE.c.expires < clock, 1), else_=0)
    rows = connection.execute(
        sa.select(
            TRIALS.c.study_id,
            (clock - sa.func.min(LEASE.c.claimed)).label("oldest"),
            sa.func.sum(late).label("late"),
        )
        .select_from(TRIALS.join(LEASE, LEASE.c.trial_id == TRIALS.c.trial_id))
        .where(STATE == "RUNNING", LEASE.c.expires != RELEASED)
        .group_by(TRIALS.c.study_id)
    )
    return {row.study_id: (row.oldest, row.late) for row in rows}


def _ended(connection: sa.Connection) -> dict[int, datetime]:
    """When a trial of each study last ended, in UTC."""
    rows = connection.execute(
        sa.select(TRIALS.c.study_id, sa.func.max(TRIALS.c.datetime_complete).label("last"))
        .where(TRIALS.c.datetime_complete.is_not(None))
        .group_by(TRIALS.c.study_id)
    )
    return {row.study_id: row.last for row in rows}
