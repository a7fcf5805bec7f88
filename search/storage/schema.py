"""The study database as a whole: its tables, their version, and the rights of roles.

Optuna's tables have their own versions; ours is in ``bdense_schema``. Opening creates missing
tables. Old ones are upgraded only on demand (``upgrade``), because workers of the old version may
be running.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from optuna.storages import RDBStorage
from psycopg2.errors import InsufficientPrivilege
from psycopg2.extensions import encrypt_password
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from bdense.errors import InputError
from search.errors import StorageError, StorageRefusedError
from search.redaction import redact
from search.storage.engine import (
    UPGRADE,
    cannot_open,
    exclusive,
    one_line,
    open_storage,
    sqlite_file,
)
from search.storage.leases import database_clock
from search.storage.tables import (
    BEGUN,
    LEASE,
    RELEASED,
    STATE,
    SYSTEM_ATTRIBUTES,
    TRIALS,
    has,
)

# Raise it with every change of the tables below, and handle old ones in ``upgrade``.
SCHEMA = 1
_OURS = LEASE.metadata
_VERSION = sa.Table(
    "bdense_schema", _OURS, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False)
)

Access = Literal["read-write", "read-only"]
_RIGHTS = Path(__file__).with_name("roles.sql")
_PRIVILEGES: dict[Access, dict[str, str]] = {
    "read-write": {"tables": "SELECT, INSERT, UPDATE, DELETE", "sequences": "USAGE, SELECT"},
    "read-only": {"tables": "SELECT", "sequences": "SELECT"},
}


def open_tables(url: str) -> RDBStorage:
    """Open a study database and create Optuna's tables and ours if they are missing.

    Raises:
        StorageError: It cannot be opened; a ``StorageRefusedError`` if its tables have another
            version, with the command that upgrades them.
    """
    storage = open_storage(url)
    try:
        with exclusive(storage.engine, "schema"):
            _OURS.create_all(storage.engine)
            require_schema(storage.engine, url)
            if _version_in(storage.engine) is None:  # the tables are new
                _store_version(storage.engine)
    except SQLAlchemyError as error:
        raise cannot_open(url, error) from None
    return storage


def upgrade(url: str) -> list[str]:
    """Bring the tables of an older version to this one's.

    Studies and trials stay. If the table of leases changes, it is created anew; trials that were
    running are then taken over from their checkpoints.

    Returns:
        What was done, a line each.

    Raises:
        StorageError: The database cannot be opened, or belongs to a newer version.
        InputError: Workers hold trials; says how to stop them.
    """
    storage = open_storage(url, skip_compatibility_check=True)
    done = []
    try:
        with exclusive(storage.engine, "schema"):
            require_own(storage.engine, url)
            _OURS.create_all(storage.engine)
            version = _version_in(storage.engine)
            if version is not None and version > SCHEMA:
                raise _other_version(url, version)
            if held := _held(storage.engine):
                raise InputError(
                    f"{held} trials of {redact(url)} are running, perhaps on workers of another "
                    "version; stop them first (bdense-search stop STUDY, or Ctrl-C in each "
                    "launcher), then run this command again"
                )
            before, head = storage.get_current_version(), storage.get_head_version()
            if before != head:
                storage.upgrade()
                done.append(f"Optuna's tables: from {before} to {head}")
            if version != SCHEMA:
                _renew_ours(storage.engine)
                old = "before 1" if version is None else version
                done.append(f"bdense's tables: from {old} to {SCHEMA}")
    except SQLAlchemyError as error:
        raise cannot_open(url, error) from None
    return done or ["the tables have this version already"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A PostgreSQL role and its access; a password of None keeps the role's."""

    name: str
    access: Access
    password: str | None = None


def grant(url: str, roles: Sequence[Role]) -> list[str]:
    """Create missing roles and give them exactly their rights on the study tables (roles.sql).

    PUBLIC loses the right to connect. Other roles keep their rights.

    Args:
        url: A PostgreSQL database, as its owner with the right to create roles.
        roles: The roles.

    Returns:
        Statements for an administrator, if this owner may not alter a role; the roles' rights are
        correct without them.

    Raises:
        InputError: The storage is a file, which has no roles.
        StorageError: The owner may not do that.
    """
    if sqlite_file(url) is not None:
        raise InputError(
            f"{redact(url)} is a SQLite file, which has no roles; leave --writer and --reader "
            "out, or give a PostgreSQL storage"
        )
    engine = open_tables(url).engine
    left: list[str] = []
    try:
        with engine.begin() as connection:
            database = connection.exec_driver_sql("SELECT current_database()").scalar_one()
            quoted = engine.dialect.identifier_preparer.quote_identifier
            for role in roles:
                name = quoted(role.name)
                _make(connection, role, name)
                left += _set_read_only(connection, role, name)
                own = {"database": quoted(database), "role": name, **_PRIVILEGES[role.access]}
                connection.exec_driver_sql(_RIGHTS.read_text().format(**own))
    except SQLAlchemyError as error:
        raise StorageError(
            f"cannot make the roles {', '.join(role.name for role in roles)} in {redact(url)}: "
            f"{one_line(error)}; use the database's owner with the right to make roles "
            "(CREATEROLE), or have its administrator make them and leave the passwords out"
        ) from None
    return left


def has_tables(engine: sa.Engine) -> bool:
    """Whether a database has bdense's tables, beside Optuna's."""
    return sa.inspect(engine).has_table(LEASE.name)


def require_schema(engine: sa.Engine, url: str) -> None:
    """Refuse tables of another version; a database without tables passes.

    Raises:
        StorageRefusedError: The version differs; names the command that upgrades the tables.
    """
    require_own(engine, url)
    if not sa.inspect(engine).has_table(_VERSION.name):
        return
    version = _version_in(engine)
    if version is not None and version != SCHEMA:
        raise _other_version(url, version)


def require_own(engine: sa.Engine, url: str) -> None:
    """Refuse a table of another program that has the name of one of ours.

    Raises:
        StorageRefusedError: There is one.
    """
    inspector = sa.inspect(engine)
    for table in filter(lambda each: inspector.has_table(each.name), _OURS.sorted_tables):
        there = {column["name"] for column in inspector.get_columns(table.name)}
        # The key of each has been the same since the first version.
        if not {column.name for column in table.primary_key} <= there:
            raise StorageRefusedError(
                f"{redact(url)} has a table {table.name} of another program, with the columns "
                f"{', '.join(sorted(there))}; give bdense a database of its own, or rename it"
            )


def _renew_ours(engine: sa.Engine) -> None:
    """Make our tables anew, and mark running trials that had a lease as begun here.

    Otherwise their rows only matter to running workers, and there are none.
    """
    begun = sa.select(TRIALS.c.trial_id, sa.literal(BEGUN), sa.literal("true")).where(
        STATE == "RUNNING",
        TRIALS.c.trial_id.in_(sa.select(LEASE.c.trial_id)),
        ~has(SYSTEM_ATTRIBUTES, BEGUN),
    )
    names = ["trial_id", "key", "value_json"]
    with engine.begin() as connection:
        connection.execute(sa.insert(SYSTEM_ATTRIBUTES).from_select(names, begun))
    _OURS.drop_all(engine)
    _OURS.create_all(engine)
    _store_version(engine)


def _version_in(engine: sa.Engine) -> int | None:
    with engine.connect() as connection:
        version: int | None = connection.scalar(sa.select(sa.func.max(_VERSION.c.version)))
    return version


def _store_version(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(_VERSION).values(version=SCHEMA))


def _held(engine: sa.Engine) -> int:
    """Number of leases that have not run out, so that their owners may be alive."""
    live = (LEASE.c.expires > database_clock(engine), LEASE.c.expires != RELEASED)
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).where(*live)).scalar_one()


def _make(connection: sa.Connection, role: Role, quoted: str) -> None:
    there = connection.execute(
        sa.text("SELECT 1 FROM pg_roles WHERE rolname = :name"), {"name": role.name}
    ).scalar()
    if there is None:
        connection.exec_driver_sql(f"CREATE ROLE {quoted} LOGIN")
    if role.password is not None:
        # Hashed here, because statements may appear in the server's log.
        driver: Any = connection.connection.driver_connection
        verifier = encrypt_password(role.password, role.name, driver, "scram-sha-256")
        connection.exec_driver_sql(f"ALTER ROLE {quoted} PASSWORD '{verifier}'")


def _set_read_only(connection: sa.Connection, role: Role, name: str) -> list[str]:
    """Set whether the role's transactions are read-only; a statement that the owner may not give.

    An owner who may not alter roles may still grant rights, and without this setting a reader has
    no right to write either. So it is altered only if it differs.
    """
    settings = connection.execute(
        sa.text("SELECT rolconfig FROM pg_roles WHERE rolname = :name"), {"name": role.name}
    ).scalar_one()
    setting = "default_transaction_read_only"
    values = dict(each.split("=", 1) for each in settings or ())
    reads = role.access == "read-only"
    if (values.get(setting, "off") == "on") == reads:
        return []
    statement = f"ALTER ROLE {name} " + (f"SET {setting} = on" if reads else f"RESET {setting}")
    try:
        with connection.begin_nested():
            connection.exec_driver_sql(statement)
    except ProgrammingError as error:
        if not (reads and isinstance(error.orig, InsufficientPrivilege)):
            raise
        return [statement]
    return []


def _other_version(url: str, version: int) -> StorageRefusedError:
    is_newer = version > SCHEMA
    age, way_out = ("a newer", "update bdense here") if is_newer else ("an older", UPGRADE)
    return StorageRefusedError(
        f"the tables of {redact(url)} belong to {age} bdense (version {version}, this one has "
        f"{SCHEMA}); {way_out}"
    )
