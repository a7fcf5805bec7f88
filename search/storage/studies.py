"""All studies of a storage at once: a few queries, however many trials they have."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from search.storage.queries import Counts, count_states
from search.storage.schema import has_tables
from search.storage.tables import (
    DIRECTION,
    DIRECTIONS,
    FOREIGN,
    KIND_OF_VALUE,
    STATE,
    STUDIES,
    STUDY_ATTRIBUTES,
    TRIALS,
    VALUES,
    attributes_by_owner,
)

_BUDGET = "budget"  # every study that bdense-search made has one


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStudy:
    """One study, without its trials.

    Attributes:
        key: Optuna's key of the study.
        name: Its name.
        attributes: Those asked for, as far as the study has them.
        counts: Trials by state.
        best: Lowest finite value of a complete trial, or the highest of a study that maximises;
            None without any.
        started: When its first trial started, in UTC; None before that.
        ended: When a trial last ended, in UTC.
        changed: When a trial last started or ended, in UTC.
    """

    key: int
    name: str
    attributes: dict[str, Any]
    counts: Counts
    best: float | None
    started: datetime | None
    ended: datetime | None
    changed: datetime | None


def read_studies(engine: sa.Engine, attributes: Collection[str] = ()) -> list[StoredStudy]:
    """The studies that bdense-search made, by name, with these of their attributes.

    None in a database of Optuna's alone.
    """
    if not has_tables(engine):
        return []
    with engine.connect() as connection:
        names = {row.study_id: row.study_name for row in connection.execute(sa.select(STUDIES))}
        wanted = sorted({_BUDGET, *attributes})
        stored = attributes_by_owner(
            connection, sa.select(STUDY_ATTRIBUTES).where(STUDY_ATTRIBUTES.c.key.in_(wanted))
        )
        states = count_states(connection)
        best = _best(connection)
        times = _times(connection)
    found = []
    for key, name in sorted(names.items(), key=lambda item: item[1]):
        if _BUDGET not in stored.get(key, {}):
            continue
        started, last_start, ended = times.get(key, (None, None, None))
        found.append(
            StoredStudy(
                key=key,
                name=name,
                attributes={a: v for a, v in stored[key].items() if a in attributes},
                counts=Counts.of(states[key], budget=int(stored[key][_BUDGET])),
                best=best.get(key),
                started=started,
                ended=ended,
                changed=max(filter(None, (last_start, ended)), default=None),
            )
        )
    return found


def _best(connection: sa.Connection) -> dict[int, float]:
    rows = connection.execute(
        sa.select(
            TRIALS.c.study_id,
            sa.func.min(VALUES.c.value).label("lowest"),
            sa.func.max(VALUES.c.value).label("highest"),
        )
        .select_from(TRIALS.join(VALUES, VALUES.c.trial_id == TRIALS.c.trial_id))
        .where(STATE == "COMPLETE", VALUES.c.objective == 0, KIND_OF_VALUE == "FINITE", ~FOREIGN)
        .group_by(TRIALS.c.study_id)
    )
    asked = sa.select(DIRECTIONS.c.study_id).where(DIRECTION == "MAXIMIZE")
    maximised = set(connection.execute(asked).scalars())
    return {row.study_id: row.highest if row.study_id in maximised else row.lowest for row in rows}


def _times(connection: sa.Connection) -> dict[int, tuple[datetime | None, ...]]:
    """First start, last start and last end of each study's trials."""
    start, end = TRIALS.c.datetime_start, TRIALS.c.datetime_complete
    rows = connection.execute(
        sa.select(
            TRIALS.c.study_id, sa.func.min(start), sa.func.max(start), sa.func.max(end)
        ).group_by(TRIALS.c.study_id)
    )
    return {
        key: tuple(time and time.replace(tzinfo=UTC) for time in times) for key, *times in rows
    }
