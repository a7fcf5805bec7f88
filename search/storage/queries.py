"""Read a study's trials by SQL: counts, running trials, results.

Optuna's own list creates an object with all attributes for every trial: seconds for 10,000.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.storage.engine import open_reading, retrying
from search.storage.leases import Leases, RunningRow
from search.storage.own_study import DEFAULT_TTL_SECONDS, find_study, require_file
from search.storage.tables import (
    FIXED,
    FOREIGN,
    KIND_OF_VALUE,
    LEFT_OUT,
    PARAMS,
    STATE,
    SYSTEM_ATTRIBUTES,
    TRIALS,
    USER_ATTRIBUTES,
    VALUES,
    attributes_by_owner,
    has,
)

_T = TypeVar("_T")

# Reason of a row that counts nowhere (``LEFT_OUT``).
NOT_COUNTED = "not counted"
# Values without a number in SQL; PostgreSQL has a type for their kind.
_INFINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf}
_LOWEST_FIRST = (
    sa.case((KIND_OF_VALUE == "INF_NEG", -1), (KIND_OF_VALUE == "INF_POS", 1), else_=0),
    VALUES.c.value,
)
_ENDED = [state.name for state in TrialState if state.is_finished()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Number of trials by state, without those refused as out of bounds."""

    planned: int
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int

    @classmethod
    def of(cls, states: Mapping[str, int], *, budget: int) -> Self:
        """Counts, from the number of trials in each of Optuna's states."""
        return cls(
            planned=max(budget, sum(states.values()) - states["WAITING"]),
            complete=states["COMPLETE"],
            pruned=states["PRUNED"],
            failed=states["FAIL"],
            running=states["RUNNING"],
            waiting=states["WAITING"],
        )

    @property
    def started(self) -> int:
        """Trials that have ended, or run."""
        return self.ended + self.running

    @property
    def total(self) -> int:
        """Trials that there are, whatever their state."""
        return self.started + self.waiting

    @property
    def ended(self) -> int:
        """Trials that will not run again."""
        return self.complete + self.pruned + self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTrial:
    """A stored trial; ``value`` is None if it has none."""

    number: int
    value: float | None
    params: dict[str, Any]
    user_attrs: dict[str, Any]


class LedgerReader:
    """The trials of one study, read-only. Use ``open_reading``."""

    def __init__(
        self, storage: RDBStorage, study: optuna.Study, attributes: Mapping[str, Any]
    ) -> None:
        self.storage = storage
        self.study = study
        self.ttl = float(attributes.get("ttl", DEFAULT_TTL_SECONDS))
        self._leases = Leases(storage.engine, study._study_id, self.ttl)
        self._mine = TRIALS.c.study_id == study._study_id
        maximises = retrying(lambda: study.direction) is StudyDirection.MAXIMIZE
        best = map(sa.desc, _LOWEST_FIRST) if maximises else _LOWEST_FIRST
        self._best_first = (*best, TRIALS.c.number)

    @classmethod
    def open_reading(cls, url: str, study_name: str) -> Self:
        """A study whose database connection refuses writes.

        Raises:
            StorageError: The database cannot be opened.
            UnknownStudyError: There is no such study.
        """
        require_file(url, study_name)
        storage = open_reading(url)
        return cls._of(storage, retrying(partial(find_study, storage, study_name)))

    def sibling(self, study_name: str) -> Self:
        """Another study of the same database, through the same connections.

        Raises:
            UnknownStudyError: There is no such study.
        """
        return self._of(self.storage, retrying(partial(find_study, self.storage, study_name)))

    @classmethod
    def _of(cls, storage: RDBStorage, study: optuna.Study) -> Self:
        return cls(storage, study, retrying(lambda: study.user_attrs))

    @property
    def name(self) -> str:
        """Name of the Optuna study."""
        return self.study.study_name

    @property
    def key(self) -> int:
        """Optuna's key of the study."""
        return self.study._study_id

    @property
    def budget(self) -> int:
        """Trials to run in all, as currently stored: another launcher may change it."""
        return int(self.attribute("budget"))

    def attribute(self, key: str) -> Any:  # noqa: ANN401  as JSON has it
        """An attribute of the study, as currently stored; None without it."""
        return self.attributes().get(key)

    def attributes(self) -> dict[str, Any]:
        """The attributes of the study, as currently stored."""
        return retrying(lambda: self.study.user_attrs)

    def counts(self) -> Counts:
        """Number of trials by state."""
        budget = self.budget
        return self._reading(lambda connection: self.counts_in(connection, budget))

    def counts_in(self, connection: sa.Connection, budget: int) -> Counts:
        """``counts`` through an open connection, where the budget is known."""
        return Counts.of(count_states(connection, self._mine)[self.key], budget=budget)

    def running(self) -> list[RunningRow]:
        """Running trials that a worker took, by number."""
        return [row for row in self.running_rows() if row.process is not None]

    def running_rows(self) -> list[RunningRow]:
        """The running trials with their leases, lowest number first."""
        return self._reading(self._leases.running)

    def held(self) -> int:
        """Number of trials that have a live worker, as far as that is known."""
        rows = self.running_rows()
        return sum(row.process is not None and not row.adoptable for row in rows)

    def state_of(self, number: int) -> TrialState | None:
        """The state of a trial; None where there is no such trial."""
        query = sa.select(STATE).where(self._mine, TRIALS.c.number == number)
        found = self._rows(query)
        return TrialState[found[0][0]] if found else None

    def size(self) -> int:
        """Number of trials, whatever their state."""
        return self._numbers(sa.select(sa.func.count()).where(self._mine))[0]

    def foreign(self) -> dict[int, TrialState]:
        """Number -> state of the trials that something else than bdense-search put there."""
        query = sa.select(TRIALS.c.number, STATE.label("state")).where(self._mine, FOREIGN)
        found = self._rows(query.order_by(TRIALS.c.number))
        return {row.number: TrialState[row.state] for row in found}

    def rows(
        self, keys: Collection[str] | None = None, *, state: TrialState = TrialState.COMPLETE
    ) -> list[StoredTrial]:
        """Every complete trial, or in another state, by number; does not load the others.

        Args:
            keys: Attributes to read, which are most of the cost; None for all.
            state: Optuna's state.
        """
        query = trials_in(state).where(self._mine).order_by(TRIALS.c.number)
        return self._read(query, keys)

    def asked(self) -> list[dict[str, Any]]:
        """Parameters of each trial, by number: planned ones, else suggested ones."""
        return [params for params, _ in retrying(self._asked_and_why)]

    def complete_values(self) -> dict[int, float]:
        """Number -> value of each complete trial."""
        return {row.number: _value(row) for row in self._rows(self._complete())}

    def ranked_after(self, rank: int, most: int, also: int) -> list[int]:
        """Complete trials after the ``rank`` best, best first: at most ``most``, and ``also``."""
        place = sa.func.row_number().over(order_by=self._best_first).label("place")
        ranked = self._complete().add_columns(place).subquery()
        wanted = sa.or_(ranked.c.place <= rank + most, ranked.c.number == also)
        query = sa.select(ranked.c.number).where(ranked.c.place > rank, wanted)
        return self._numbers(query.order_by(ranked.c.place))

    def ended(self) -> list[int]:
        """Numbers of trials that will not run again."""
        ended = sa.select(TRIALS.c.number).where(self._mine, STATE.in_(_ENDED), ~FOREIGN)
        return self._numbers(ended)

    def best(self) -> StoredTrial | None:
        """The complete trial of the best value, the first of equal ones; None without any."""
        found = self._read(self._complete().order_by(*self._best_first).limit(1))
        return found[0] if found else None

    def complete_row(self, number: int) -> StoredTrial:
        """The complete trial of that number, which there must be."""
        (found,) = self._read(self._complete().where(TRIALS.c.number == number))
        return found

    def differing_versions(self) -> list[str]:
        """A line for each package of which trials used several versions."""
        first = sa.func.min(TRIALS.c.number).label("first")
        query = (
            self._of_mine(USER_ATTRIBUTES, USER_ATTRIBUTES.c.key == "versions")
            .with_only_columns(
                USER_ATTRIBUTES.c.value_json, first, sa.func.count().label("trials")
            )
            .group_by(USER_ATTRIBUTES.c.value_json)
            .order_by(first)
        )
        counted: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for row in self._rows(query):
            for package, version in json.loads(row.value_json).items():
                counted[package][version] += row.trials
        return [
            f"{package} differs between trials: "
            + ", ".join(f"{version} in {number}" for version, number in versions.items())
            for package, versions in counted.items()
            if len(versions) > 1
        ]

    def _asked_and_why(self) -> list[tuple[dict[str, Any], str | None]]:
        """Parameters of each trial, planned or suggested, and why it failed, if it did.

        A row that counts nowhere has the reason ``NOT_COUNTED``. An error of the database is not
        retried, so that it can be called under the study's lock.
        """
        reasons = self._of_mine(USER_ATTRIBUTES, USER_ATTRIBUTES.c.key == "reason")
        planned = self._of_mine(SYSTEM_ATTRIBUTES, SYSTEM_ATTRIBUTES.c.key == FIXED)
        ids = sa.select(TRIALS.c.trial_id, sa.cast(LEFT_OUT, sa.Boolean).label("left_out"))
        ids = ids.where(self._mine).order_by(TRIALS.c.number)
        with self.storage.engine.connect() as connection:
            keys = {row.trial_id: row.left_out for row in connection.execute(ids)}
            asked = _params(connection, self._of_mine(PARAMS, ~has(SYSTEM_ATTRIBUTES, FIXED)))
            for key, each in attributes_by_owner(connection, planned).items():
                asked[key] = each[FIXED]
            why = attributes_by_owner(connection, reasons)
        return [
            (asked.get(key, {}), NOT_COUNTED if left_out else why.get(key, {}).get("reason"))
            for key, left_out in keys.items()
        ]

    def _complete(self) -> sa.Select[Any]:
        return trials_in(TrialState.COMPLETE).where(self._mine)

    def _of_mine(self, table: sa.TableClause, *where: sa.ColumnElement[bool]) -> sa.Select[Any]:
        """Rows of a table that refers to this study's trials."""
        return (
            sa.select(table)
            .select_from(table.join(TRIALS, TRIALS.c.trial_id == table.c.trial_id))
            .where(self._mine, *where)
        )

    def _reading(self, read: Callable[[sa.Connection], _T]) -> _T:
        def attempt() -> _T:
            with self.storage.engine.connect() as connection:
                return read(connection)

        return retrying(attempt)

    def _rows(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        return self._reading(lambda connection: connection.execute(query).all())

    def _numbers(self, query: sa.Select[Any]) -> list[int]:
        return [number for (number,) in self._rows(query)]

    def _read(
        self, query: sa.Select[Any], keys: Collection[str] | None = None
    ) -> list[StoredTrial]:
        return self._reading(lambda connection: read_trials(connection, query, keys))


def read_trials(
    connection: sa.Connection, query: sa.Select[Any], keys: Collection[str] | None
) -> list[StoredTrial]:
    """The trials that a query of ``trials_in`` finds, which have ended: nothing of them changes.

    ``keys`` are the attributes to read; None is all.
    """
    chosen = query.with_only_columns(TRIALS.c.trial_id, maintain_column_froms=True).subquery()
    found = list(connection.execute(query))
    if not found:
        return []
    # One trial by its key, several by the same query: a list may be too long for SQL.
    which: Any = [found[0].trial_id] if len(found) == 1 else sa.select(chosen.c.trial_id)
    stored = sa.select(USER_ATTRIBUTES).where(USER_ATTRIBUTES.c.trial_id.in_(which))
    if keys is not None:
        stored = stored.where(USER_ATTRIBUTES.c.key.in_(keys))
    attributes = attributes_by_owner(connection, stored) if keys is None or keys else {}
    params = _params(connection, sa.select(PARAMS).where(PARAMS.c.trial_id.in_(which)))
    return [
        StoredTrial(
            number=row.number,
            value=_value(row),
            params=params.get(row.trial_id, {}),
            user_attrs=attributes.get(row.trial_id, {}),
        )
        for row in found
    ]


def count_states(
    connection: sa.Connection, *where: sa.ColumnElement[bool]
) -> Mapping[int, Mapping[str, int]]:
    """Trials of each study in each of Optuna's states, without those that count nowhere."""
    counted = connection.execute(
        sa.select(TRIALS.c.study_id, STATE.label("state"), sa.func.count().label("trials"))
        .where(~LEFT_OUT, *where)
        .group_by(TRIALS.c.study_id, STATE)
    )
    none = {state.name: 0 for state in TrialState}
    found: dict[int, dict[str, int]] = defaultdict(none.copy)
    for row in counted:
        found[row.study_id][row.state] = row.trials
    return found


def asked_of(trial: FrozenTrial) -> dict[str, Any]:
    """A trial's parameters; Optuna stores those of a waiting trial elsewhere."""
    asked: dict[str, Any] = trial.system_attrs.get(FIXED, trial.params)
    return asked


def trials_in(state: TrialState) -> sa.Select[Any]:
    """A query for key, number and value of the trials in a state, of all studies, no foreign."""
    value = sa.and_(VALUES.c.trial_id == TRIALS.c.trial_id, VALUES.c.objective == 0)
    return (
        sa.select(TRIALS.c.trial_id, TRIALS.c.number, VALUES.c.value, KIND_OF_VALUE.label("kind"))
        .select_from(TRIALS.outerjoin(VALUES, value))
        .where(sa.literal(state.name) == STATE, ~FOREIGN)
    )


def _value(row: Any) -> Any:  # noqa: ANN401 - a row of SQLAlchemy's
    return _INFINITE.get(row.kind, row.value)


def _params(connection: sa.Connection, query: sa.Select[Any]) -> dict[int, dict[str, Any]]:
    """Parameters by trial, in the order of their suggestion."""
    found: dict[int, dict[str, Any]] = {}
    for row in connection.execute(query.order_by(PARAMS.c.param_id)):
        value = _distribution(row.distribution_json).to_external_repr(row.param_value)
        found.setdefault(row.trial_id, {})[row.param_name] = value
    return found


@functools.lru_cache(maxsize=256)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)
