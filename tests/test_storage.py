"""Storage URLs, errors without passwords, and patience with a database that is away."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError, ProgrammingError

import search.storage.engine
from search import cli
from search.errors import StorageError, StorageRefusedError
from search.places import runs_folder
from search.redaction import redact, redact_url
from search.storage.engine import (
    exclusive,
    is_transient,
    one_line,
    open_storage,
    resolve_storage_url,
    retrying,
    sqlite_file,
    without_password,
)
from search.worker.ray_tasks import worker_storage

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("BDENSE_STORAGE", raising=False)
    monkeypatch.delenv("BDENSE_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_where_the_storage_is(tmp_path, monkeypatch):
    """An absolute path, which means the same in another folder; an URL with all its parts."""
    assert resolve_storage_url(None) == f"sqlite:///{tmp_path}/runs/bdense.db"
    monkeypatch.setenv("BDENSE_RUNS", "elsewhere")
    assert resolve_storage_url(None) == f"sqlite:///{tmp_path}/elsewhere/bdense.db"
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    monkeypatch.setenv("BDENSE_RUNS", "~nobody-of-that-name/runs")
    assert runs_folder() == Path("~nobody-of-that-name/runs")
    monkeypatch.setenv("BDENSE_RUNS", "~/runs")
    assert resolve_storage_url(None) == f"sqlite:///{tmp_path}/home/runs/bdense.db"
    monkeypatch.setenv("BDENSE_STORAGE", "postgresql://me@db/studies")
    assert resolve_storage_url(None) == "postgresql+psycopg2://me@db/studies"
    parts = f"me:{SECRET}@db:5433/studies?sslmode=require"
    for given, url, path in (
        ("sqlite:////data/x.db", "sqlite:////data/x.db", "/data/x.db"),
        ("sqlite:///a/b.db", f"sqlite:///{tmp_path}/a/b.db", f"{tmp_path}/a/b.db"),
        ("sqlite:///~/b.db", f"sqlite:///{tmp_path}/home/b.db", f"{tmp_path}/home/b.db"),
        (f"postgresql://{parts}", f"postgresql+psycopg2://{parts}", None),
    ):
        assert resolve_storage_url(given) == resolve_storage_url(url) == url
        assert sqlite_file(url) == (path and Path(path))


@pytest.mark.parametrize(
    "url",
    [
        "runs/bdense.db",
        "postgres://me@db/studies",
        "postgresql+psycopg://me@db/studies",
        "postgresql://me@db:port/studies",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x.db?uri=true",
        "postgresql://me@db/studies?dsn=port%3D5433",
        f"mysql://me:{SECRET}@db/studies",
        f"me:{SECRET}@db/studies",
        f"postgresql:/me:{SECRET}@db/studies",
        f"postgresql://me:{SECRET} 2@db:x/studies",
        f"host=db password={SECRET} user=me",
        f"sqlite:///file:x.db?password={SECRET}",
        f"postgresql://me@db/studies?dsn=port%3D5433+password%3D{SECRET}",
    ],
)
def test_other_forms_are_refused_with_those_that_are_not(url):
    with pytest.raises(StorageRefusedError) as caught:
        resolve_storage_url(url)
    message = str(caught.value)
    for part in (
        redact_url(url),
        "sqlite:///folder/file.db",
        "postgresql://user@host:5432/database",
    ):
        assert part in message
    assert SECRET not in message
    assert "\n" not in message


def test_an_at_sign_in_a_password_is_refused_with_its_escape():
    with pytest.raises(StorageRefusedError, match=r"\*\*\*.* %40") as caught:
        resolve_storage_url(f"postgresql://me:p@{SECRET}@db/studies")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"postgresql://me:{SECRET}@db/x", "postgresql://me:***@db/x"),
        (f"a postgresql://me:{SECRET}@db/x b", "a postgresql://me:***@db/x b"),
        (f"postgresql://me:{SECRET}:@/@db/x", "postgresql://me:***@db/x"),
        (f"postgresql://me:my {SECRET} 2@db/x", "postgresql://me:***@db/x"),
        (f"host=db password={SECRET} user=me", "host=db password=*** user=me"),
        (f"password = '{SECRET} \\' 2' user=me", "password = *** user=me"),
        (
            f"postgresql://db/x?user=me&password={SECRET}&a=b",
            "postgresql://db/x?user=me&password=***&a=b",
        ),
        (f"PGPASSWORD={SECRET} psql", "PGPASSWORD=*** psql"),
        (f"postgresql://db/x?sslpassword={SECRET}&a=b", "postgresql://db/x?sslpassword=***&a=b"),
        (f"postgresql://db/x?scram_client_key={SECRET}", "postgresql://db/x?scram_client_key=***"),
        ("postgresql://me@db:5432/x", "postgresql://me@db:5432/x"),
        ("sqlite:////data/a@b:c.db", "sqlite:////data/a@b:c.db"),
        ("own.yaml:2:1: data: no folder x; NAME@SIDE pads",) * 2,
        ('FATAL: password authentication failed for user "me"',) * 2,
    ],
)
def test_redact(text, expected):
    assert redact(text) == expected


def test_a_servers_error_is_told_without_its_query():
    said = 'relation "x" does not exist\nLINE 2: FROM x \n             ^\n'
    error = ProgrammingError("SELECT 1 FROM x", {}, psycopg2.ProgrammingError(said))
    assert one_line(error) == 'relation "x" does not exist'


SECRETS = (
    *("password", "sslpassword", "oauth_client_secret"),
    *("scram_client_key", "scram_server_key"),
)


@pytest.mark.parametrize(
    "given",
    [
        f"postgresql://me:{SECRET}@db/studies?sslmode=require",
        *(f"postgresql://me@db/studies?{key}={SECRET}&sslmode=require" for key in SECRETS),
        f"postgresql://me@db/studies?sslmode=require&password=%26{SECRET}%20%27{SECRET}",
        f"postgresql://me:{SECRET}@db/studies?password={SECRET}&sslmode=require&password={SECRET}",
    ],
)
def test_what_is_handed_on_and_what_is_shown_hold_no_secret(given, monkeypatch):
    url = resolve_storage_url(given)
    assert SECRET in url
    handed_on = without_password(url)
    assert handed_on == "postgresql+psycopg2://me@db/studies?sslmode=require"
    assert SECRET not in redact(given)
    assert SECRET not in redact(url)
    # A worker finds what it was not told in its own environment.
    monkeypatch.setenv("BDENSE_STORAGE", given)
    assert worker_storage(handed_on) == url
    assert worker_storage(handed_on.replace("studies", "others")) == handed_on.replace(
        "studies", "others"
    )


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@db/studies",
        f"postgresql://me@db/studies?password={SECRET}",
        f"postgresql://me@db/studies?sslmode=require&sslpassword={SECRET}",
    ],
)
def test_a_secret_among_the_arguments_is_moved_to_the_environment(url, joined, monkeypatch):
    started = []

    def start(_: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", start)
    monkeypatch.setenv("BDENSE_STORAGE", "")  # the test's to restore
    with pytest.raises(SystemExit):
        cli.main(["status", "digits", *([f"--storage={url}"] if joined else ["--storage", url])])
    (arguments,) = started
    assert arguments[-2:] == ["status", "digits"]
    assert SECRET not in " ".join(arguments)
    assert os.environ["BDENSE_STORAGE"] == resolve_storage_url(url)


def test_sqlite_is_opened_for_many_processes(tmp_path):
    url = resolve_storage_url("sqlite:///new/folder/{odd} name.db")
    storage = open_storage(url)
    assert (tmp_path / "new" / "folder" / "{odd} name.db").is_file()
    with storage.engine.connect() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "busy_timeout", "foreign_keys")
        }
    assert pragma == {"journal_mode": "wal", "busy_timeout": 30_000, "foreign_keys": 1}
    open_storage(url)


@pytest.mark.parametrize(
    ("place", "said"),
    [("notes.db", "file is not a database; check that"), ("notes.db/study.db", "notes.db")],
)
def test_a_file_that_cannot_be_opened_is_named(tmp_path, place, said):
    (tmp_path / "notes.db").write_text("these are not the bytes of a database, " * 40)
    with pytest.raises(StorageError, match="cannot open the study database sqlite:") as caught:
        open_storage(f"sqlite:///{tmp_path}/{place}")
    assert said in str(caught.value)


def test_an_unreachable_server_is_one_line_without_its_password():
    with pytest.raises(StorageError) as caught:
        open_storage(f"postgresql://me:{SECRET}@127.0.0.1:1/studies")
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    assert message.startswith(
        "cannot open the study database postgresql+psycopg2://me:***@127.0.0.1:1/studies: "
    )
    assert not isinstance(caught.value, StorageRefusedError)  # it may come back
    assert "Connection refused" in message
    assert "check that the server runs" in message


@pytest.mark.postgres
class TestOnPostgres:
    @pytest.fixture
    def locked(self, postgres) -> str:
        """URL, without a password, of a user who needs one."""
        url = postgres.new_database()
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            connection.execute(sa.text(f"CREATE ROLE locked LOGIN SUPERUSER PASSWORD '{SECRET}'"))
        rules = postgres.data / "pg_hba.conf"
        trusting = rules.read_text()
        rules.write_text(f"local all locked scram-sha-256\n{trusting}")
        postgres.control("reload")
        yield postgres.url(sa.engine.make_url(url).database, user="locked")
        rules.write_text(trusting)
        postgres.control("reload")
        with engine.begin() as connection:
            connection.execute(sa.text("DROP OWNED BY locked; DROP ROLE locked"))
        engine.dispose()

    @pytest.mark.parametrize("where", ["file", "query"])
    def test_the_password_may_come_from_a_file_or_the_query(
        self, locked, tmp_path, monkeypatch, where
    ):
        monkeypatch.delenv("PGPASSWORD", raising=False)
        given = locked if where == "file" else f"{locked}&password={SECRET}"
        if where == "file":
            passwords = tmp_path / "pgpass"
            passwords.write_text(f"*:*:*:locked:{SECRET}\n")
            passwords.chmod(0o600)
            monkeypatch.setenv("PGPASSFILE", str(passwords))
        monkeypatch.setenv("BDENSE_STORAGE", given)
        told = without_password(resolve_storage_url(given))
        assert told == locked
        storage = open_storage(worker_storage(told))
        assert storage.get_all_studies() == []
        storage.engine.dispose()

    @pytest.mark.parametrize("where", ["environment", "url", "query"])
    def test_a_wrong_password_is_one_line_without_it(self, locked, where, monkeypatch):
        url = locked
        if where == "environment":
            monkeypatch.setenv("PGPASSWORD", "wrong-one")
        elif where == "url":
            url = locked.replace("//locked@", "//locked:wrong-one@")
        else:
            url = f"{locked}&password=wrong-one"
        with pytest.raises(StorageRefusedError) as caught:
            open_storage(url)
        message = str(caught.value)
        assert 'password authentication failed for user "locked"' in message
        assert "the password in PGPASSWORD or PGPASSFILE" in message
        assert "wrong-one" not in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("database", "user", "said"),
        [
            ("nowhere", "postgres", 'database "nowhere" does not exist'),
            ("postgres", "nobody", 'role "nobody" does not exist'),
        ],
    )
    def test_what_does_not_exist_is_named(self, postgres, database, user, said):
        with pytest.raises(StorageRefusedError, match=said):
            open_storage(postgres.url(database, user=user))

    def test_a_frozen_transaction_keeps_nobody_waiting_for_ever(self, postgres, monkeypatch):
        """As of a worker that is stopped between the renewal of its lease and the commit."""
        url = postgres.new_database()
        open_storage(url).engine.dispose()  # which makes the tables, and may take longer
        monkeypatch.setattr(search.storage.engine, "FROZEN_SECONDS", 2)
        storage = open_storage(url)
        row = sa.text("UPDATE version_info SET version_info_id = version_info_id")
        with storage.engine.connect() as frozen, storage.engine.connect() as other:
            frozen.execute(row)
            other.execute(sa.text("SET statement_timeout = '60s'"))
            other.execute(row)  # once the server has ended the first
            other.commit()
            with pytest.raises(OperationalError) as cut_off:
                frozen.execute(row)
            assert is_transient(cut_off.value)
        storage.engine.dispose()

    @pytest.mark.parametrize("by", ["url", "environment"])
    def test_who_falls_silent_is_cut_off_and_settings_of_the_users_own_stay(
        self, postgres, monkeypatch, by
    ):
        """By the kernel and the server: nothing here can show a network that is gone."""
        url = postgres.new_database()
        given = "-c work_mem=5MB"
        if by == "environment":
            monkeypatch.setenv("PGOPTIONS", given)
        else:
            url = sa.make_url(url).update_query_dict({"options": given}).render_as_string()
        storage = open_storage(url)
        with exclusive(storage.engine, "a study") as connection:
            names = ("work_mem", "idle_in_transaction_session_timeout", "application_name")
            shown = [connection.exec_driver_sql(f"SHOW {n}").scalar_one() for n in names]
            sent = connection.connection.driver_connection.info.dsn_parameters
        assert shown == ["5MB", "2min", "bdense"]
        assert (sent["tcp_user_timeout"], sent["keepalives_idle"]) == ("30000", "30")
        storage.engine.dispose()


def test_a_call_is_repeated_until_the_database_is_back():
    answers = iter([_lost(psycopg2.OperationalError("server closed the connection")), None])

    def call() -> str:
        if (error := next(answers)) is not None:
            raise error
        return "here"

    assert retrying(call) == "here"
    assert list(answers) == []


def test_patience_ends_with_one_line_without_a_password(monkeypatch):
    def call() -> None:
        raise _lost(psycopg2.OperationalError(f"postgresql://me:{SECRET}@db/x\nis away"))

    monkeypatch.setattr("search.storage.engine.PATIENCE_SECONDS", 0.3)
    with pytest.raises(StorageError) as caught:
        retrying(call)
    message = str(caught.value)
    assert "for 0.3 seconds: postgresql://me:***@db/x is away; check that it runs" in message


def test_a_mistake_of_ours_is_not_repeated():
    calls = []

    def call() -> None:
        calls.append(None)
        raise ProgrammingError("SELECT x", {}, psycopg2.ProgrammingError("no column x"))

    with pytest.raises(ProgrammingError):
        retrying(call)
    assert len(calls) == 1


def test_what_is_worth_waiting_for(tmp_path):
    assert is_transient(_lost(psycopg2.OperationalError("the database system is starting up")))
    assert is_transient(_caused(_lost(psycopg2.OperationalError("gone"))))
    assert not is_transient(_caused(ProgrammingError("", {}, psycopg2.ProgrammingError("typo"))))
    assert not is_transient(StorageInternalError("no cause"))
    assert not is_transient(_lost(sqlite3.OperationalError("no such table: trials")))
    path = tmp_path / "busy.db"
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with engine.connect() as connection, pytest.raises(OperationalError) as caught:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    assert is_transient(caught.value)
    holder.close()


def test_the_lock_keeps_other_processes_out(tmp_path):
    """Eight increments by four processes, each a read and a write apart."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    program = (
        "import sys, time; from pathlib import Path\n"
        "from search.storage.engine import exclusive, open_storage\n"
        "engine = open_storage(sys.argv[1]).engine; counter = Path(sys.argv[2])\n"
        "for _ in range(2):\n"
        "    with exclusive(engine, 'a study'):\n"
        "        seen = int(counter.read_text()); time.sleep(0.05)\n"
        "        counter.write_text(str(seen + 1))\n"
    )
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path}/study.db", str(counter)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert counter.read_text() == "8"


def _lost(error: Exception) -> OperationalError:
    return OperationalError("SELECT 1", {}, error)


def _caused(error: Exception) -> StorageInternalError:
    wrapped = StorageInternalError("An exception is raised during the commit.")
    wrapped.__cause__ = error
    return wrapped
