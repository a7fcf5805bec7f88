"""Trials read by SQL, to show studies of any size without loading all of them.

Optuna's own list creates an object with all attributes for every trial: seconds for 10,000.
"""

import functools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.trial import TrialState

from search.storage.leases import OUT_OF_BOUNDS, STATE, SURPLUS, TRIALS, USER_ATTRIBUTES

# Optuna's own tables, as far as they are read here.
VALUES = sa.table(
    "trial_values", *map(sa.column, ("trial_id", "objective", "value", "value_type"))
)
PARAMS = sa.table(
    "trial_params",
    *map(sa.column, ("param_id", "trial_id", "param_name", "param_value", "distribution_json")),
)
SYSTEM_ATTRIBUTES = sa.table(
    "trial_system_attributes", *map(sa.column, ("trial_id", "key", "value_json"))
)
# The trial's system attribute in which Optuna stores planned parameters.
FIXED = "fixed_params"
# Reason of a row that counts nowhere: beyond the bounds or the budget.
NOT_COUNTED = "not counted"
# Values without a number in SQL; PostgreSQL has a type for their kind.
_INFINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf}
KIND_OF_VALUE = sa.cast(VALUES.c.value_type, sa.String)
_ORDER = sa.case((KIND_OF_VALUE == "INF_NEG", -1), (KIND_OF_VALUE == "INF_POS", 1), else_=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTrial:
    """A stored trial; ``value`` is None if it has none."""

    number: int
    value: float | None
    params: dict[str, Any]
    user_attrs: dict[str, Any]


class Rows:
    """The trials of one study.

    Args:
        engine: The study's database.
        study_id: Optuna's key of the study.
    """

    def __init__(self, engine: sa.Engine, study_id: int) -> None:
        self._engine = engine
        self._mine = TRIALS.c.study_id == study_id

    def of_state(
        self, state: TrialState, keys: Collection[str] | None = None
    ) -> list[StoredTrial]:
        """Every trial in that state, in order of their numbers.

        Args:
            state: Optuna's.
            keys: The attributes that are wanted, which are most of the cost; None for all.
        """
        return self._read(self._select(state).order_by(TRIALS.c.number), keys)

    def best(self) -> StoredTrial | None:
        """The complete trial of lowest value, of equal ones the first; None without any."""
        found = self._read(
            self._select(TrialState.COMPLETE)
            .order_by(_ORDER, VALUES.c.value, TRIALS.c.number)
            .limit(1)
        )
        return found[0] if found else None

    def complete(self) -> dict[int, float]:
        """Number -> value of each complete trial."""
        with self._engine.connect() as connection:
            found = connection.execute(self._select(TrialState.COMPLETE))
            return {row.number: _value(row) for row in found}

    def ranked_after(self, rank: int, most: int, also: int) -> list[int]:
        """Numbers of complete trials after the ``rank`` best: ``most`` at most, and ``also``."""
        place = sa.func.row_number().over(order_by=(_ORDER, VALUES.c.value, TRIALS.c.number))
        ranked = self._select(TrialState.COMPLETE).add_columns(place.label("place")).subquery()
        query = (
            sa.select(ranked.c.number)
            .where(
                ranked.c.place > rank,
                sa.or_(ranked.c.place <= rank + most, ranked.c.number == also),
            )
            .order_by(ranked.c.place)
        )
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def ended(self) -> list[int]:
        """Numbers of trials that will not run again."""
        query = sa.select(TRIALS.c.number).where(
            self._mine, STATE.in_([state.name for state in TrialState if state.is_finished()])
        )
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def count(self) -> int:
        """Trials in any state, planned ones included."""
        query = sa.select(sa.func.count()).select_from(TRIALS).where(self._mine)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def asked(self) -> list[tuple[dict[str, Any], str | None]]:
        """Parameters of each trial, planned or suggested, and why it failed, if it did.

        A row that counts nowhere has the reason ``NOT_COUNTED``.
        """
        keys_of_reasons = ("reason", OUT_OF_BOUNDS, SURPLUS)
        reasons = self._of_mine(USER_ATTRIBUTES, USER_ATTRIBUTES.c.key.in_(keys_of_reasons))
        planned = self._of_mine(SYSTEM_ATTRIBUTES, SYSTEM_ATTRIBUTES.c.key == FIXED)
        has_plan = sa.exists().where(
            SYSTEM_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id, SYSTEM_ATTRIBUTES.c.key == FIXED
        )
        ids = sa.select(TRIALS.c.trial_id).where(self._mine).order_by(TRIALS.c.number)
        with self._engine.connect() as connection:
            keys = list(connection.execute(ids).scalars())
            fixed = {key: each[FIXED] for key, each in _attributes(connection, planned).items()}
            suggested = _params(connection, self._of_mine(PARAMS, ~has_plan))
            why = _attributes(connection, reasons)
        return [
            (fixed.get(key, suggested.get(key, {})), _reason(why[key]) if key in why else None)
            for key in keys
        ]

    def _select(self, state: TrialState) -> sa.Select[Any]:
        value = sa.and_(VALUES.c.trial_id == TRIALS.c.trial_id, VALUES.c.objective == 0)
        return (
            sa.select(
                TRIALS.c.trial_id, TRIALS.c.number, VALUES.c.value, KIND_OF_VALUE.label("kind")
            )
            .select_from(TRIALS.outerjoin(VALUES, value))
            .where(self._mine, sa.literal(state.name) == STATE)
        )

    def _read(
        self, query: sa.Select[Any], keys: Collection[str] | None = None
    ) -> list[StoredTrial]:
        """The trials that ``query`` finds; they are finished, so nothing of them changes."""
        chosen = query.with_only_columns(TRIALS.c.trial_id, maintain_column_froms=True).subquery()
        with self._engine.connect() as connection:
            found = list(connection.execute(query))
            if not found:
                return []
            # By key for one trial, else by the same query: a list may be too long for SQL.
            which: Any = [found[0].trial_id] if len(found) == 1 else sa.select(chosen.c.trial_id)
            stored = sa.select(USER_ATTRIBUTES).where(USER_ATTRIBUTES.c.trial_id.in_(which))
            if keys is not None:
                stored = stored.where(USER_ATTRIBUTES.c.key.in_(keys))
            wants_none = keys is not None and not keys
            attributes = {} if wants_none else _attributes(connection, stored)
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

    def _of_mine(self, table: sa.TableClause, *where: sa.ColumnElement[bool]) -> sa.Select[Any]:
        """Rows of a table that refers to this study's trials."""
        return (
            sa.select(table)
            .select_from(table.join(TRIALS, TRIALS.c.trial_id == table.c.trial_id))
            .where(self._mine, *where)
        )


def _value(row: Any) -> Any:  # noqa: ANN401 - a row of SQLAlchemy's
    return _INFINITE.get(row.kind, row.value)


def _attributes(connection: sa.Connection, query: sa.Select[Any]) -> dict[int, dict[str, Any]]:
    """Attributes by trial."""
    found: dict[int, dict[str, Any]] = {}
    for row in connection.execute(query):
        found.setdefault(row.trial_id, {})[row.key] = json.loads(row.value_json)
    return found


def _reason(attributes: dict[str, Any]) -> str:
    counts = attributes.keys().isdisjoint((OUT_OF_BOUNDS, SURPLUS))
    return str(attributes["reason"]) if counts else NOT_COUNTED


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
