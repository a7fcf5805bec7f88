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
from search.storage.engine import (
    UPGRADE,
    cannot_open,
    exclusive,
    one_line,
    open_storage,
    open_to_upgrade,
    redact,
    sqlite_file,
)
from search.storage.leases import LEASE, RELEASED, database_clock

# Raise it with every change of the tables below, and handle old ones in ``upgrade``.
SCHEMA = 1
_OURS = LEASE.metadata
_VERSION = sa.Table(
    "bdense_schema", _OURS, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False)
)

Access = Literal["read-write", "read-only"]
# On tables, then on the sequences that number their rows.
_GRANTS: dict[Access, tuple[str, str]] = {
    "read-write": ("SELECT, INSERT, UPDATE, DELETE", "USAGE, SELECT"),
    "read-only": ("SELECT", "SELECT"),
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
            _make_or_check(storage.engine, url)
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
    storage = open_to_upgrade(url)
    done = []
    try:
        with exclusive(storage.engine, "schema"):
            held = _held(storage.engine)
            if held:
                raise InputError(
                    f"{held} trials of {redact(url)} are being worked on, by workers of another "
                    "version perhaps; end them first (bdense-search stop STUDY, or Ctrl-C in each "
                    "launch), then give this command again"
                )
            before, head = storage.get_current_version(), storage.get_head_version()
            if before != head:
                storage.upgrade()
                done.append(f"Optuna's tables: from {before} to {head}")
            done += _upgrade_ours(storage.engine, url)
    except SQLAlchemyError as error:
        raise cannot_open(url, error) from None
    return done or ["the tables are of this version already"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A PostgreSQL role and its access; a password of None keeps the role's."""

    name: str
    access: Access
    password: str | None = None


def grant(url: str, roles: Sequence[Role]) -> list[str]:
    """Create missing roles and give them exactly their rights on the study tables.

    PUBLIC loses the right to connect. Other roles keep the rights they have.

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
            name = engine.dialect.identifier_preparer.quote_identifier
            connection.exec_driver_sql(f"REVOKE ALL ON DATABASE {name(database)} FROM PUBLIC")
            connection.exec_driver_sql("REVOKE ALL ON SCHEMA public FROM PUBLIC")
            for role in roles:
                _make(connection, role)
                left += _set_read_only(connection, role, name(role.name))
                for statement in _rights(role, name(database), name(role.name)):
                    connection.exec_driver_sql(statement)
    except SQLAlchemyError as error:
        raise StorageError(
            f"cannot make the roles {', '.join(role.name for role in roles)} in {redact(url)}: "
            f"{one_line(error)}; use the database's owner with the right to make roles "
            "(CREATEROLE), or have its administrator make them and leave the passwords out"
        ) from None
    return left


def read_password(path: Path) -> str:
    """A password from its file, without the line's end.

    Raises:
        InputError: It cannot be read, or is empty.
    """
    try:
        password = path.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the password file {path} cannot be read: {error}") from error
    if not password:
        raise InputError(f"the password file {path} is empty; write the password into it")
    return password


def require_schema(engine: sa.Engine, url: str) -> None:
    """Refuse tables of another version; a database without tables passes.

    Raises:
        StorageRefusedError: They have another version; names the command that upgrades them.
    """
    version = None
    if sa.inspect(engine).has_table(_VERSION.name):
        with engine.connect() as connection:
            version = _stored_version(connection)
    if version is None and _differs(engine):  # of the time before there were versions
        raise StorageRefusedError(_old(url, "before 1"))
    if version is not None and version < SCHEMA:
        raise StorageRefusedError(_old(url, str(version)))
    if version is not None and version > SCHEMA:
        raise StorageRefusedError(_newer(url, version))


def _make_or_check(engine: sa.Engine, url: str) -> None:
    _OURS.create_all(engine)
    require_schema(engine, url)
    with engine.begin() as connection:
        if _stored_version(connection) is None:  # all was made just now
            connection.execute(sa.insert(_VERSION).values(version=SCHEMA))


def _upgrade_ours(engine: sa.Engine, url: str) -> list[str]:
    _VERSION.create(engine, checkfirst=True)
    with engine.begin() as connection:
        version = _stored_version(connection)
    if version is not None and version > SCHEMA:
        raise StorageRefusedError(_newer(url, version))
    if version == SCHEMA and not _differs(engine):
        return []
    # Their rows only matter to running workers, and there are none.
    _OURS.drop_all(engine)
    _OURS.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(_VERSION).values(version=SCHEMA))
    return [f"bdense's tables: from {'before 1' if version is None else version} to {SCHEMA}"]


def _stored_version(connection: sa.Connection) -> int | None:
    version: int | None = connection.execute(
        sa.select(sa.func.max(_VERSION.c.version))
    ).scalar_one()
    return version


def _differs(engine: sa.Engine) -> bool:
    """Whether one of our tables has other columns than in this version."""
    inspector = sa.inspect(engine)
    return any(
        {column["name"] for column in inspector.get_columns(table.name)} != set(table.c.keys())
        for table in _OURS.sorted_tables
        if inspector.has_table(table.name)
    )


def _held(engine: sa.Engine) -> int:
    """Number of leases that have not run out, so that their owners may be alive."""
    inspector = sa.inspect(engine)
    if not inspector.has_table(LEASE.name):
        return 0
    if not {"expires"} <= {column["name"] for column in inspector.get_columns(LEASE.name)}:
        return 0
    # An old table may lack other columns.
    expires = sa.column("expires", sa.Double)
    leases = sa.table(LEASE.name, expires)
    with engine.connect() as connection:
        return connection.execute(
            sa.select(sa.func.count())
            .select_from(leases)
            .where(expires > database_clock(engine), expires != RELEASED)
        ).scalar_one()


def _make(connection: sa.Connection, role: Role) -> None:
    quoted = connection.dialect.identifier_preparer.quote_identifier(role.name)
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
    """Make a reader's transactions read-only by the role's setting; a writer's are not.

    The setting is read first: an owner who may not alter roles may still grant rights. Without
    the setting a reader has no right to write either.
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


def _rights(role: Role, database: str, name: str) -> list[str]:
    tables, sequences = _GRANTS[role.access]
    return [
        f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {name}",
        f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM {name}",
        f"GRANT CONNECT ON DATABASE {database} TO {name}",
        f"GRANT USAGE ON SCHEMA public TO {name}",
        f"GRANT {tables} ON ALL TABLES IN SCHEMA public TO {name}",
        f"GRANT {sequences} ON ALL SEQUENCES IN SCHEMA public TO {name}",
        # For tables that a later upgrade creates.
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE ALL ON TABLES FROM {name}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE ALL ON SEQUENCES FROM {name}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT {tables} ON TABLES TO {name}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT {sequences} ON SEQUENCES TO {name}",
    ]


def _old(url: str, version: str) -> str:
    return (
        f"the tables of {redact(url)} are of an older bdense (version {version}, this one has "
        f"{SCHEMA}); {UPGRADE}"
    )


def _newer(url: str, version: int) -> str:
    return (
        f"the tables of {redact(url)} are of a newer bdense (version {version}, this one has "
        f"{SCHEMA}); update bdense here"
    )
