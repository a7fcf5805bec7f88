"""The state of all studies for Prometheus: text at /metrics, computed by SQL on request.

The number of queries does not grow with the number of trials.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeAlias

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from search.errors import StorageError
from search.spec.metric import FID_METRIC, Metric
from search.storage.leases import database_clock
from search.storage.own_study import BASELINES_SUFFIX
from search.storage.queries import read_trials, trials_in
from search.storage.schema import has_tables
from search.storage.studies import read_studies
from search.storage.tables import LEASE, RELEASED, STATE, TRIALS
from search.study.arms import Arm, ArmRow
from search.study.catalogue import metric_of
from search.study.study import ARMS, SPEC

PATH = "/metrics"
STATES = ("complete", "pruned", "failed", "running", "waiting")

Application: TypeAlias = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def mount(application: Application, storage: RDBStorage) -> Application:
    """The application with ``/metrics`` of the storage's studies added."""
    registry = CollectorRegistry()
    registry.register(Studies(storage.engine))
    metrics: Application = make_wsgi_app(registry)

    def routed(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != PATH:
            return application(environ, start_response)
        try:
            if not has_tables(storage.engine):
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"bdense-search launched no study in this database\n"]
            return metrics(environ, start_response)
        except (SQLAlchemyError, StorageError):
            # The driver's message may name hosts and users.
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"the study database does not answer\n"]

    return routed


class Studies(Collector):
    """Gauges of every study that bdense-search made in a database, baselines' own included."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        studies = read_studies(self._engine, (ARMS, SPEC))
        with self._engine.connect() as connection:
            claimed = _claimed(connection, database_clock(self._engine))
        now = datetime.now(UTC)
        planned = _gauge("bdense_trials_planned", "Trials to run in all.")
        trials = _gauge("bdense_trials", "Trials by state.", "state")
        lowest = _gauge("bdense_best_fid", "Lowest FID of a search's complete trials.")
        baselines = _gauge("bdense_baseline_fid", "FID of a search's baselines.", "baseline")
        best_of = _gauge("bdense_best_value", "Best metric of a search of a program's.", "metric")
        defaults = _gauge(
            "bdense_baseline_value", "Metric of a program's baseline.", "baseline", "metric"
        )
        metrics = {study.name: metric_of(study) for study in studies}
        lease = _gauge(
            "bdense_oldest_lease_seconds", "Time since the claim of the longest running trial."
        )
        overdue = _gauge(
            "bdense_leases_overdue", "Running trials whose worker did not renew its lease in time."
        )
        since = _gauge("bdense_seconds_since_completion", "Time since a trial last ended.")
        for study in studies:
            name = study.name
            planned.add_metric([name], study.counts.planned)
            for word in STATES:
                trials.add_metric([name, word], getattr(study.counts, word))
            are_baselines = name.endswith(BASELINES_SUFFIX)
            metric = metrics.get(name.removesuffix(BASELINES_SUFFIX), FID_METRIC)
            if study.best is not None and ARMS not in study.attributes and not are_baselines:
                _add_value(lowest, best_of, [name], metric, study.best)
            if are_baselines and ARMS in study.attributes:
                arms = [Arm(**each).baseline for each in study.attributes[ARMS]]
                complete = trials_in(TrialState.COMPLETE).where(TRIALS.c.study_id == study.key)
                # Rows come in order: of each baseline its first, under the seed of the trials.
                first: dict[int, float] = {}
                with self._engine.connect() as connection:
                    rows = read_trials(connection, complete, ())
                for row in rows:
                    if not (own := ArmRow(**row.params)).variant:  # short trainings have one
                        first.setdefault(own.arm, row.value or 0.0)
                for arm, value in first.items():
                    if (baseline := arms[arm]) is not None:
                        labels = [name.removesuffix(BASELINES_SUFFIX), baseline]
                        _add_value(baselines, defaults, labels, metric, value)
            if study.key in claimed:
                oldest, late = claimed[study.key]
                lease.add_metric([name], oldest)
                overdue.add_metric([name], late)
            if study.ended is not None:
                since.add_metric([name], (now - study.ended).total_seconds())
        yield from (planned, trials, lowest, baselines, best_of, defaults, lease, overdue, since)


def _gauge(name: str, help_: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_, labels=["study", *labels])


def _add_value(
    fids: GaugeMetricFamily,
    values: GaugeMetricFamily,
    labels: list[str],
    metric: Metric,
    value: float,
) -> None:
    """Add a FID to its gauge, or a program's metric to the one that has its name as a label."""
    if metric == FID_METRIC:
        fids.add_metric(labels, value)
    else:
        values.add_metric([*labels, metric.name], value)


def _claimed(
    connection: sa.Connection, clock: sa.ColumnElement[float]
) -> dict[int, tuple[float, int]]:
    """By study: seconds since the oldest claim of a running trial, and overdue leases."""
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
