"""Where studies live: a SQLite file on one machine, or a PostgreSQL server for several."""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import random
import re
import sqlite3
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from bdense.files import file_lock
from search.errors import StorageError, StorageFullError, StorageRefusedError
from search.places import runs_folder
from search.redaction import redact, redact_url
from search.storage.leases import add_clock
from search.storage.mounts import refuse_network_file_system

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Errors of a database, through Optuna or not.
DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError)

ACCEPTED_FORMS = (
    "sqlite:///folder/file.db (relative to the current folder), sqlite:////absolute/file.db "
    "or postgresql://user@host:5432/database (password in PGPASSWORD or PGPASSFILE)"
)
BUSY_SECONDS = 30
# How long calls are repeated after the first failure.
PATIENCE_SECONDS = 300.0
CONNECT_SECONDS = 5
ANSWER_SECONDS = 30
# The server ends a transaction whose process is frozen or cut off for this long; otherwise others
# would wait for its locks for ever. Samplers compute, and Optuna loads trials, in a transaction.
FROZEN_SECONDS = 120
_AGAIN = "check that it runs, then run the same command again: it continues"
UPGRADE = "end its workers, then renew them by: bdense-search storage upgrade"

# Explicit, because postgresql:// alone means another driver from SQLAlchemy 2.1 on.
_POSTGRES_DRIVER = "postgresql+psycopg2"
_POSTGRES_NAMES = ("postgresql", _POSTGRES_DRIVER)
_SQLITE_NAMES = ("sqlite", "sqlite+pysqlite")
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 10.0
# Its own generator: a database hiccup must not change seeded draws.
_jitter = random.Random()

# Keys of libpq in a URL's query whose values are secrets, not paths.
_SECRETS = (
    *("password", "sslpassword", "oauth_client_secret"),
    *("scram_client_key", "scram_server_key"),
)
# Refusals of a server when a connection starts; psycopg2 does not pass on their error codes.
_TURNED_AWAY = re.compile(
    r"password authentication failed|(?:peer|ident) authentication failed|no password supplied"
    r"|no pg_hba\.conf entry|is not permitted to log in|permission denied for database"
    r"|(?:role|database) \".*\" does not exist",
    re.IGNORECASE,
)
# Advice by the server's error code: insufficient_privilege, read_only_sql_transaction,
# undefined_table, undefined_column.
_REFUSALS = {
    "42501": "the user may not do that: let the database's owner run bdense-search storage "
    "init, with --writer or --reader for this user",
    "25006": "transactions are read-only here: use the primary server if this is a standby, or a "
    "user that may write (bdense-search storage init, with --writer), or else reset "
    "default_transaction_read_only, which server, database, user or PGOPTIONS set to on",
    "42P01": "it holds no studies yet: launch one, or run bdense-search storage init",
    "42703": "a table there is another program's: give the studies a database of their own",
}
_DISK_FULL = "53100"
# PostgreSQL's quotation of a query, with a caret below what is wrong.
_QUERY = re.compile(r"\nLINE \d+: .*(\n *\^)?")
# SQLite has one code for both.
_SQLITE_REFUSALS = {"no such table": "42P01", "no such column": "42703"}


def resolve_storage_url(given: str | None) -> str:
    """The storage to use: ``given``, else ``$BDENSE_STORAGE``, else a SQLite file under the runs.

    The URL names its driver and has an absolute path, so that it holds for a worker in another
    folder. It may contain a password: show ``redact`` of it.

    Raises:
        StorageRefusedError: The form of the URL is not accepted; lists those that are.
    """
    asked = given or os.environ.get("BDENSE_STORAGE")
    if not asked:
        return f"sqlite:///{runs_folder().resolve() / 'bdense.db'}"
    url = _parse(asked)
    if url.drivername in _SQLITE_NAMES:
        path = _sqlite_database(url, asked).resolve()
        return f"sqlite:///{path}"
    return url.set(drivername=_POSTGRES_DRIVER).render_as_string(hide_password=False)


def without_password(url: str) -> str:
    """A resolved URL without secrets, safe to pass on."""
    # URL.set ignores None.
    bare = make_url(url)._replace(password=None).difference_update_query(_SECRETS)
    return bare.render_as_string(hide_password=False)


def sqlite_file(url: str) -> Path | None:
    """Database file of a SQLite URL; None for a server's."""
    parsed = _parse(url)
    return _sqlite_database(parsed, url) if parsed.drivername in _SQLITE_NAMES else None


def open_storage(
    url: str, *, reading: bool = False, skip_compatibility_check: bool = False
) -> RDBStorage:
    """Open the database; creates its file, folder and Optuna's tables if missing.

    Args:
        url: As accepted by ``resolve_storage_url``.
        reading: Refuse writes, and create nothing.
        skip_compatibility_check: Also open tables of another version of Optuna.

    Raises:
        StorageError: It cannot be opened; one line with what to check, without a password. A
            ``StorageRefusedError`` if trying later will not help.
    """
    resolved = resolve_storage_url(url)
    path = sqlite_file(resolved)
    # Optuna calls str.format on its URL, so braces in a password or a path must be escaped.
    make = functools.partial(
        RDBStorage,
        resolved.replace("{", "{{").replace("}", "}}"),
        skip_compatibility_check=skip_compatibility_check,
        skip_table_creation=reading,
    )
    try:
        if path is None:
            return _open_postgres(make, resolved, reading=reading)
        refuse_network_file_system(path)
        return _open_sqlite(make, path, reading=reading)
    except (*DATABASE_ERRORS, OSError, RuntimeError) as error:
        # RuntimeError: Optuna found a schema of another version.
        raise cannot_open(resolved, error) from None


def open_reading(url: str) -> RDBStorage:
    """Open an existing database so that it refuses writes; raises as ``open_storage``."""
    return open_storage(url, reading=True)


@contextlib.contextmanager
def exclusive(engine: Engine, *names: str) -> Iterator[Connection]:
    """Hold the locks of these names across all processes that use this database.

    PostgreSQL: an advisory lock that ends with the transaction of the yielded connection, so that
    writes become visible when the lock is freed. SQLite: a lock on ``<database>.lock``, the same
    for all names, not a transaction, which would block Optuna's own connection; each statement is
    committed by itself. Both locks are freed when their holder dies.
    """
    if engine.dialect.name == "sqlite":
        with (
            file_lock(Path(f"{engine.url.database}.lock")),
            engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        ):
            yield connection
        return
    with engine.begin() as connection:
        for name in names:
            digest = hashlib.sha256(f"bdense {name}".encode()).digest()
            key = int.from_bytes(digest[:8], "big", signed=True)
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield connection


def retrying(call: Callable[[], _T]) -> _T:
    """Call, and call again while the database is away.

    ``call`` must be safe to repeat: it may have taken effect even if it raised.

    Raises:
        StorageFullError: The database's disk is full, which waiting does not change.
        StorageRefusedError: The user has no right to do that.
        StorageError: The database did not come back in time.
    """
    deadline: float | None = None
    delay = _FIRST_DELAY_SECONDS
    while True:
        try:
            return call()
        except DATABASE_ERRORS as error:
            if _code(error) == _DISK_FULL:
                raise as_storage_error(error) from None
            if refused := _refusal_of(error):
                raise StorageRefusedError(f"{one_line(error)}; {refused}") from None
            if not is_transient(error):
                raise
            message = one_line(error)
        now = time.monotonic()
        if deadline is None:
            deadline = now + PATIENCE_SECONDS
            _log.warning("the study database does not answer, trying again: %s", message)
        if now >= deadline:
            raise StorageError(
                f"the study database did not answer for {PATIENCE_SECONDS:g} seconds: {message}; "
                f"{_AGAIN}"
            )
        time.sleep(min(delay * _jitter.uniform(0.5, 1.0), max(deadline - now, 0.0)))
        delay = min(2 * delay, _LONGEST_DELAY_SECONDS)


def is_transient(error: BaseException) -> bool:
    """Whether the database may answer the same call a little later."""
    error = _cause(error)
    if isinstance(error, PoolTimeoutError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorname", "")
        return code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_CANTOPEN"))
    return error.connection_invalidated or isinstance(
        error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)
    )


def as_storage_error(error: BaseException) -> StorageError:
    """A database's error as one for the user, where it is not retried."""
    if _code(error) == _DISK_FULL:
        return StorageFullError(
            f"the disk of the study database is full: {one_line(error)}; make room, then run the "
            "same command again: it continues from what was stored before"
        )
    return StorageError(f"the study database: {one_line(error)}; {_refusal_of(error) or _AGAIN}")


def one_line(error: BaseException) -> str:
    """The message of the database's driver, on one line and without a password."""
    cause = _cause(error)
    said = _QUERY.sub("", str(getattr(cause, "orig", None) or cause))
    return redact(" ".join(said.split()))


def _cause(error: BaseException) -> BaseException:
    """What Optuna wrapped in its own error, else the error itself."""
    wrapped = isinstance(error, StorageInternalError) and error.__cause__ is not None
    return error.__cause__ if wrapped else error  # type: ignore[return-value]


def _connect_for_writing(*args: Any, **kwargs: Any) -> sqlite3.Connection:  # noqa: ANN401
    """A connection as sqlite3 makes it, which checks foreign keys: SQLite does so on request."""
    connection = sqlite3.Connection(*args, **kwargs)
    add_clock(connection)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _connect_for_reading(database: str, **kwargs: Any) -> sqlite3.Connection:  # noqa: ANN401
    """A connection that refuses writes, also where this user may not write the folder.

    SQLite opens a database in WAL mode by files beside it. Where they cannot be made, no other
    process of this user's rights writes, and a database whose log is empty is read as it is.
    """
    connection = sqlite3.Connection(database, **kwargs)
    add_clock(connection)
    connection.execute("PRAGMA query_only = ON")
    try:
        connection.execute("SELECT 1 FROM sqlite_master").close()
    except sqlite3.OperationalError:
        connection.close()
        log = Path(f"{database}-wal")
        if log.exists() and log.stat().st_size:
            raise
        address = f"file:{urllib.parse.quote(database)}?mode=ro&immutable=1"
        connection = sqlite3.Connection(address, **kwargs | {"uri": True})
        add_clock(connection)
    return connection


def _open_sqlite(make: Callable[..., RDBStorage], path: Path, *, reading: bool) -> RDBStorage:
    factory = _connect_for_reading if reading else _connect_for_writing
    engine = {"echo": False, "connect_args": {"timeout": BUSY_SECONDS, "factory": factory}}
    if reading:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; launch a study first")
        storage = make(engine_kwargs=engine)
        _watch_file(storage.engine, path, "put it back, and start again")
        return storage
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(Path(f"{path}.lock")):
        # The switch to WAL ignores the busy timeout, so it is done once, under the lock.
        _switch_to_wal(path)
        storage = make(engine_kwargs=engine)
    _watch_file(
        storage.engine,
        path,
        "nothing more can be stored: put it back, or launch the study again",
    )
    return storage


def _watch_file(engine: Engine, path: Path, way_out: str) -> None:
    """Refuse to go on in a database whose file was deleted or replaced since it was opened."""

    def identity() -> tuple[int, int] | None:
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    opened = identity()

    def check(*_: object) -> None:
        if identity() != opened:
            raise StorageRefusedError(
                f"the study database {path} was deleted or replaced while it was in use; {way_out}"
            )

    # Before it connects, too: SQLite would make the file anew, and empty.
    for event in ("do_connect", "checkout"):
        sqlalchemy.event.listen(engine, event, check)


def _switch_to_wal(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.Error as error:
        raise OSError(f"{path.name}: {error}") from error


def _open_postgres(make: Callable[..., RDBStorage], url: str, *, reading: bool) -> RDBStorage:
    connect_args: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        # Keepalives pause while sent data is not acknowledged: on a network that is silently gone
        # the kernel would resend it for a quarter of an hour.
        "tcp_user_timeout": 1000 * ANSWER_SECONDS,
        "application_name": "bdense",
        "options": _session_settings(url, reading=reading),
    }
    gate = sqlalchemy.create_engine(
        url, connect_args=connect_args, poolclass=sqlalchemy.pool.NullPool
    )
    # Two launchers on an empty database would both create the tables, and one would fail.
    with exclusive(gate, "schema"):
        return make(
            engine_kwargs={
                "echo": False,
                "connect_args": connect_args,
                "pool_pre_ping": True,
                "pool_size": 2,
                "max_overflow": 2,
                "pool_recycle": 1800,
            }
        )


def _session_settings(url: str, *, reading: bool) -> str:
    """Options of a connection, added to those that the user sets by libpq's means."""
    settings = {
        "idle_in_transaction_session_timeout": f"{FROZEN_SECONDS}s",
        # On the server's side, for a client that silently disappears.
        "tcp_keepalives_idle": 30,
        "tcp_keepalives_interval": 10,
        "tcp_keepalives_count": 3,
    }
    if reading:
        settings["default_transaction_read_only"] = "on"
    asked = make_url(url).normalized_query.get("options") or [os.environ.get("PGOPTIONS", "")]
    return " ".join([*asked, *(f"-c {name}={value}" for name, value in settings.items())])


def _parse(given: str) -> URL:
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise _bad_url(given) from None
    # A dsn is a connection string inside the URL (psycopg2); ``redact`` does not look into it.
    if url.drivername not in _POSTGRES_NAMES + _SQLITE_NAMES or "dsn" in url.query:
        raise _bad_url(given)
    if "@" in (url.host or ""):
        raise StorageRefusedError(
            f"storage URL {redact_url(given)} has an @ inside its password; write it as %40, "
            "or leave the password to PGPASSWORD or PGPASSFILE"
        )
    return url


def _sqlite_database(url: URL, given: str) -> Path:
    database = url.database or ""
    if not database or database == ":memory:" or database.startswith("file:") or url.query:
        raise StorageRefusedError(
            f"storage URL {redact_url(given)} does not name a SQLite file, which workers need "
            f"because they are separate processes; give {ACCEPTED_FORMS}"
        )
    return Path(os.path.expanduser(database))


def _bad_url(given: str) -> StorageRefusedError:
    return StorageRefusedError(
        f"storage URL {redact_url(given)} (or BDENSE_STORAGE) has an unknown form; give "
        f"{ACCEPTED_FORMS}"
    )


def cannot_open(url: str, error: BaseException) -> StorageError:
    """An error that says why a database cannot be opened and what to do, on one line."""
    parsed = make_url(url)
    said = one_line(error)
    queried = (value for key in _SECRETS for value in parsed.normalized_query.get(key, ()))
    for secret in filter(None, (parsed.password, *queried)):
        said = said.replace(secret, "***")
    kind = StorageRefusedError if _is_final(error) else StorageError
    advice = _advice(parsed, error, said)
    return kind(f"cannot open the study database {redact(url)}: {said}; {advice}")


def _is_final(error: BaseException) -> bool:
    """Whether opening would fail again later."""
    error = _cause(error)
    if isinstance(error, OSError):
        return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
    if isinstance(error, DBAPIError):
        return bool(_refusal_of(error)) or bool(_TURNED_AWAY.search(str(error.orig)))
    return isinstance(error, RuntimeError)  # tables of another version of Optuna


def _advice(url: URL, error: BaseException, said: str) -> str:
    if isinstance(error, RuntimeError):
        # Optuna names its own upgrade command if the tables are old.
        is_old = "storage upgrade" in said
        return f"for a study database: {UPGRADE}" if is_old else "update optuna and bdense here"
    if refused := _refusal_of(error):
        return refused
    if url.drivername in _SQLITE_NAMES:
        return "check that the folder can be written, the disk has room and the file is a database"
    return (
        "check that the server runs and can be reached from here, that user and database "
        "exist, and the password in PGPASSWORD or PGPASSFILE"
    )


def _refusal_of(error: BaseException) -> str:
    """What to do where the server refused a statement; "" of other errors."""
    return _REFUSALS.get(_code(error), "")


def _code(error: BaseException) -> str:
    """PostgreSQL's code of a database's error; "" where it has none."""
    origin = getattr(_cause(error), "orig", None)
    if not isinstance(origin, sqlite3.Error):
        return str(getattr(origin, "pgcode", None) or "")
    if getattr(origin, "sqlite_errorname", "") == "SQLITE_FULL":
        return _DISK_FULL
    return _SQLITE_REFUSALS.get(str(origin).partition(":")[0], "")
