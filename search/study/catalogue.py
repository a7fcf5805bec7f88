"""``list``: the studies of a storage, their kind, progress and best value."""

import json
from collections.abc import Sequence
from typing import Any

from search.spec.metric import Metric
from search.storage.engine import open_reading, retrying, sqlite_file
from search.storage.own_study import BASELINES_SUFFIX
from search.storage.studies import StoredStudy, read_studies
from search.study.study import ARMS, SPEC
from search.study.summary import counts_json
from search.study.wording import align

_HEADER = ("study", "kind", "method", "complete", "failed", "running", "best", "last change")


def list_studies(url: str) -> list[StoredStudy]:
    """The studies of a storage by name, without those that only hold another's baselines.

    Raises:
        StorageError: The database cannot be opened.
    """
    path = sqlite_file(url)
    if path is not None and not path.exists():
        return []
    engine = open_reading(url).engine
    found = retrying(lambda: read_studies(engine, (ARMS, SPEC)))
    return [study for study in found if not study.name.endswith(BASELINES_SUFFIX)]


def studies_json(studies: Sequence[StoredStudy]) -> list[dict[str, Any]]:
    """What ``list --json`` prints: times in UTC, null for what is missing."""
    return [
        {
            "study": study.name,
            "kind": _kind(study),
            "method": _method(study).get("name"),
            "trials": counts_json(study.counts),
            **_best(study),
            "started": study.started and study.started.isoformat(timespec="seconds"),
            "changed": study.changed and study.changed.isoformat(timespec="seconds"),
        }
        for study in studies
    ]


def studies_table(studies: Sequence[StoredStudy]) -> list[str]:
    """A header and a line for each study, times in this machine's zone."""
    return align([_HEADER, *map(_cells, studies)])


def _cells(study: StoredStudy) -> tuple[str, ...]:
    counts, metric = study.counts, metric_of(study)
    return (
        study.name,
        _kind(study),
        _method(study).get("name") or "-",
        f"{counts.complete}/{counts.planned}",
        str(counts.failed),
        str(counts.running),
        "-" if study.best is None else f"{metric.name} {metric.text(study.best)}",
        "-" if study.changed is None else f"{study.changed.astimezone():%Y-%m-%d %H:%M}",
    )


def _kind(study: StoredStudy) -> str:
    """``search``, or ``arms`` for a study of given arms."""
    return "arms" if ARMS in study.attributes else "search"


def _best(study: StoredStudy) -> dict[str, Any]:
    """The best value by its metric's key, for scripts."""
    metric = metric_of(study)
    if metric.is_fid:
        return {"best_fid": study.best}
    return {"metric": metric.name, "best_value": study.best}


def metric_of(study: StoredStudy) -> Metric:
    """What a study's rows are judged by, of which ``SPEC`` was read."""
    return Metric.of(_method(study))


def _method(study: StoredStudy) -> dict[str, Any]:
    """The stored method; empty for a study that is incomplete, or was not upgraded."""
    method: dict[str, Any] = json.loads(study.attributes.get(SPEC, "{}")).get("method", {})
    return method
