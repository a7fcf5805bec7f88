"""What the doctor looks at in a storage: can it be reached, read and written, and by whose clock.

By connections and SQL of its own: it has an answer where Optuna would refuse to open, and it makes
no file and no table.
"""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from search.doctor.finding import Finding, ok, problem, warning
from search.storage.engine import CONNECT_SECONDS, UPGRADE, one_line, redact, sqlite_file
from search.storage.leases import LEASE
from search.storage.schema import SCHEMA

CLOCK_SECONDS = 5.0
BUSY_SECONDS = 10.0
# Optuna's, as far as a study cannot do without them.
_TABLES = (
    "studies",
    "study_user_attributes",
    "trials",
    "trial_params",
    "trial_values",
    "trial_user_attributes",
)
_VERSIONS = sa.table("bdense_schema", sa.column("version"))
_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")


def engine_of(url: str) -> sa.Engine:
    """Connections to a storage that is there; a SQLite file that is not is not made."""
    path = sqlite_file(url)
    if path is None:
        return sa.create_engine(
            url,
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                "application_name": "bdense doctor",
            },
            poolclass=sa.NullPool,
        )
    file = f"file:{quote(str(path))}?mode=rw"
    return sa.create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(file, uri=True, timeout=BUSY_SECONDS),
        poolclass=sa.NullPool,
    )


def check_storage(url: str, engine: sa.Engine) -> Iterator[Finding]:
    """Reach, schema, rights and clock; the last finding is a problem where no more can be read."""
    path = sqlite_file(url)
    if path is not None and not path.exists():
        yield problem(
            "storage",
            f"there is no database {path}",
            "launch a study, or name its storage by --storage or BDENSE_STORAGE",
        )
        return
    try:
        with engine.connect() as connection:
            tables = set(sa.inspect(connection).get_table_names())
            yield ok("storage", f"{redact(url)} answers, {_server(connection)}")
            missing = [name for name in _TABLES if name not in tables]
            if missing:
                yield problem(
                    "schema",
                    f"the database has no table {missing[0]}, so no study was ever launched in it",
                    "launch one, or check --storage",
                )
                return
            yield from _schema(url, connection, tables)
            yield from _rights(connection, path, tables)
            yield from _clock(connection)
    except SQLAlchemyError as error:
        yield problem(
            "storage",
            f"{redact(url)}: {one_line(error)}",
            "check that the server runs and can be reached, user, database, and the password in "
            "PGPASSWORD or PGPASSFILE"
            if path is None
            else "check that the file is a database, and that it and its folder can be written",
        )


def can_read_studies(engine: sa.Engine) -> bool:
    """Whether the storage has Optuna's tables and lets itself be read."""
    try:
        with engine.connect() as connection:
            connection.execute(
                sa.text("SELECT 1 FROM studies, study_user_attributes, trials LIMIT 1")
            )
    except SQLAlchemyError:
        return False
    return True


def _server(connection: sa.Connection) -> str:
    if connection.dialect.name == "sqlite":
        return f"SQLite {sqlite3.sqlite_version}"
    asked = sa.text(
        "SELECT current_setting('server_version'), current_setting('max_connections')::int, "
        "(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')"
    )
    version, most, now = connection.execute(asked).one()
    return f"PostgreSQL {version}, {now} of {most} connections in use"


def _schema(url: str, connection: sa.Connection, tables: set[str]) -> Iterator[Finding]:
    found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    # Makes nothing: the tables that it would make are there.
    known = RDBStorage(
        url.replace("{", "{{").replace("}", "}}"),
        skip_compatibility_check=True,
        skip_table_creation=True,
        engine_kwargs={"poolclass": sa.NullPool},
    )
    wanted = known.get_head_version()
    if found == wanted:
        yield ok("schema", f"Optuna's tables are of version {found}, as they should be")
    else:
        is_old = found in known.get_all_versions()
        yield problem(
            "schema",
            f"Optuna's tables are of version {found}; this Optuna, {optuna.__version__}, has "
            f"{wanted}",
            UPGRADE if is_old else "update optuna and bdense here",
        )
    if LEASE.name not in tables:
        yield ok("schema", "no study of bdense-search was launched here yet: there are no leases")
        return
    yield from _own_schema(connection, tables)


def _own_schema(connection: sa.Connection, tables: set[str]) -> Iterator[Finding]:
    version = None
    if _VERSIONS.name in tables:
        version = connection.execute(sa.select(sa.func.max(_VERSIONS.c.version))).scalar()
    have = {column["name"] for column in sa.inspect(connection).get_columns(LEASE.name)}
    other = sorted(have ^ {column.name for column in LEASE.columns})
    if version is not None and version > SCHEMA:
        yield problem(
            "schema",
            f"bdense's tables are of version {version}, this bdense has {SCHEMA}",
            "update bdense here",
        )
    elif other or (version is not None and version < SCHEMA):
        of = "before 1" if version is None else str(version)
        which = f", table {LEASE.name} differs in {', '.join(other)}" if other else ""
        yield problem(
            "schema",
            f"bdense's tables are of version {of}, this bdense has {SCHEMA}{which}",
            UPGRADE,
        )
    else:
        yield ok("schema", f"bdense's tables are of version {SCHEMA}, as they should be")


def _rights(connection: sa.Connection, path: Path | None, tables: set[str]) -> Iterator[Finding]:
    if path is not None:
        yield _may_write_file(connection, path)
        return
    if connection.execute(sa.text("SELECT pg_is_in_recovery()")).scalar_one():
        yield problem(
            "rights", "the server is a standby, which nobody can write", "name the primary"
        )
        return
    read_only = connection.execute(sa.text("SHOW default_transaction_read_only")).scalar_one()
    user = connection.execute(sa.text("SELECT current_user")).scalar_one()
    asked = sa.text("SELECT has_table_privilege(quote_ident(:table), :right)")
    lacking = [
        f"{right} on {table}"
        for table in sorted({*_TABLES, *tables} & {*_TABLES, LEASE.name, "bdense_server"})
        for right in _RIGHTS
        if not connection.execute(asked, {"table": table, "right": right}).scalar_one()
    ]
    if (
        LEASE.name not in tables
        and not connection.execute(
            sa.text("SELECT has_schema_privilege(current_schema(), 'CREATE')")
        ).scalar_one()
    ):
        lacking.append("CREATE in the schema")
    if lacking or read_only == "on":
        what = f"lacks {lacking[0]}" if lacking else "is set to read only"
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        yield problem(
            "rights",
            f"user {user} {what}{more}: it can look, and launch nothing",
            "launch as a user who may write, or let the database's owner give the command "
            "bdense-search storage init --writer for this one",
        )
    else:
        yield ok("rights", f"user {user} may write")


def _may_write_file(connection: sa.Connection, path: Path) -> Finding:
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql("ROLLBACK")
        check = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    except SQLAlchemyError as error:
        said = one_line(error)
        if "locked" in said:
            return warning(
                "rights", f"{path} has been locked for {BUSY_SECONDS:g} s", "look again"
            )
        return problem(
            "rights",
            f"{path} cannot be written: {said}",
            "check the rights of the file and its folder, and that the disk is not mounted "
            "read-only",
        )
    if check != "ok":
        return problem("storage", f"{path} is damaged: {check}", "restore it from a backup")
    return ok("rights", f"{path} can be written")


def _clock(connection: sa.Connection) -> Iterator[Finding]:
    if connection.dialect.name == "sqlite":
        return
    before = time.time()
    there = float(
        connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
    )
    apart = there - (before + time.time()) / 2
    if abs(apart) > CLOCK_SECONDS:
        yield warning(
            "clock",
            f"the database's clock is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} "
            "this machine's",
            "leases go by the database's alone; set the clocks, or the times shown are wrong",
        )
    else:
        yield ok("clock", f"the database's is {abs(apart):.1f} s from this machine's")
