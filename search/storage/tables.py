"""The tables of a study database: ours, and Optuna's with the columns that are read here."""

import json
from typing import Any

import sqlalchemy as sa
from optuna.trial import FrozenTrial

LEASE = sa.Table(
    "bdense_lease",
    sa.MetaData(),
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("forgiven", sa.Integer, nullable=False),
    sa.Column("claimed", sa.Double, nullable=False),  # seconds since 1970 by the database's clock
    sa.Column("expires", sa.Double, nullable=False),  # likewise; RELEASED: free at once
    sa.Column("progress", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("boot", sa.Text, nullable=False),
    sa.Column("pid_namespace", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("started", sa.Text, nullable=False),
)
RELEASED = 0.0

# A row for each start of a PostgreSQL server: when a claim first saw it serve. Beside a SQLite
# file a row for each boot of its machine: the clock at that boot, as the first claim knew it.
SERVER = sa.Table(
    "bdense_server",
    LEASE.metadata,
    sa.Column("started", sa.Double, primary_key=True),
    sa.Column("seen", sa.Double, nullable=False),
)

# User attributes of trials that were never trained and count nowhere: beyond the bound on the
# largest weight, or beyond the budget.
OUT_OF_BOUNDS = "out_of_bounds"
SURPLUS = "surplus"

# Optuna's tables, with the columns that are read here.
TRIALS = sa.table(
    "trials",
    *map(sa.column, ("trial_id", "number", "study_id", "state")),
    sa.column("datetime_start", sa.DateTime),  # both in UTC
    sa.column("datetime_complete", sa.DateTime),
)
# PostgreSQL has a type for the state, which does not compare with text.
STATE = sa.cast(TRIALS.c.state, sa.String)
STUDIES = sa.table("studies", *map(sa.column, ("study_id", "study_name")))


def _attributes(name: str, owner: str) -> sa.TableClause:
    return sa.table(name, *map(sa.column, (owner, "key", "value_json")))


USER_ATTRIBUTES = _attributes("trial_user_attributes", "trial_id")
SYSTEM_ATTRIBUTES = _attributes("trial_system_attributes", "trial_id")
STUDY_ATTRIBUTES = _attributes("study_user_attributes", "study_id")
STUDY_SYSTEM_ATTRIBUTES = _attributes("study_system_attributes", "study_id")
# PostgreSQL has a type for directions, too.
DIRECTIONS = sa.table("study_directions", *map(sa.column, ("study_id", "direction")))
DIRECTION = sa.cast(DIRECTIONS.c.direction, sa.String)
VALUES = sa.table(
    "trial_values", *map(sa.column, ("trial_id", "objective", "value", "value_type"))
)
PARAMS = sa.table(
    "trial_params",
    *map(sa.column, ("param_id", "trial_id", "param_name", "param_value", "distribution_json")),
)
# The trial's system attribute in which Optuna stores planned parameters.
FIXED = "fixed_params"
KIND_OF_VALUE = sa.cast(VALUES.c.value_type, sa.String)
INTERMEDIATE_VALUES = sa.table("trial_intermediate_values", *map(sa.column, ("trial_id", "step")))

# System attributes of the trials that bdense-search began, and of those that it finished.
BEGUN, ENDED = "bdense:begun", "bdense:ended"
# User attributes, one of which has each trial that a version without these finished.
ENDED_BEFORE = ("fingerprint", "reason", OUT_OF_BOUNDS, SURPLUS)


def has(table: sa.TableClause, *keys: str) -> sa.ColumnElement[bool]:
    """Whether a trial has one of these attributes, of its row of ``TRIALS``."""
    there = (table.c.trial_id == TRIALS.c.trial_id, table.c.key.in_(keys))
    return sa.exists(sa.select(1).where(*there).correlate(TRIALS))


# Trials that something else began or finished, as ``study.add_trial`` does: they count nowhere.
FOREIGN = sa.case(
    (STATE == "WAITING", sa.false()),
    (
        STATE == "RUNNING",
        ~sa.or_(
            has(SYSTEM_ATTRIBUTES, BEGUN),
            sa.exists(sa.select(1).where(LEASE.c.trial_id == TRIALS.c.trial_id).correlate(TRIALS)),
        ),
    ),
    else_=~sa.or_(has(SYSTEM_ATTRIBUTES, ENDED), has(USER_ATTRIBUTES, *ENDED_BEFORE)),
)
# Trials that count nowhere: in no result, no budget and no count of states.
LEFT_OUT = sa.or_(has(USER_ATTRIBUTES, OUT_OF_BOUNDS, SURPLUS), FOREIGN)


def is_own(ended: FrozenTrial) -> bool:
    """``~FOREIGN`` for a finished trial that Optuna has read."""
    return ENDED in ended.system_attrs or not ended.user_attrs.keys().isdisjoint(ENDED_BEFORE)


def attributes_by_owner(
    connection: sa.Connection, query: sa.Select[Any]
) -> dict[int, dict[str, Any]]:
    """Attributes by trial or study.

    The query selects the owner's id, the attribute's name and its JSON value, in this order.
    """
    found: dict[int, dict[str, Any]] = {}
    for owner, key, value in connection.execute(query):
        found.setdefault(owner, {})[key] = json.loads(value)
    return found
