"""The study database: tables of another version, roles and what they may not do."""

import subprocess

import pytest
import sqlalchemy as sa
from optuna.samplers import RandomSampler

from bdense.errors import InputError
from search import cli
from search.doctor import rights
from search.errors import StorageError, StorageRefusedError
from search.storage.engine import (
    open_reading,
    open_storage,
    resolve_storage_url,
    without_password,
)
from search.storage.ledger import Claim, Ledger
from search.storage.schema import SCHEMA, Role, grant, open_tables, upgrade
from search.study.catalogue import list_studies
from search.study.study import Study
from search.verbs.storage import read_password
from search.worker import ray_tasks
from search.worker.ray_tasks import WorkerConfig, WorkerError, slot
from tests.contracts.ledger_worker import SPACE
from tests.contracts.scene import expire_leases, take, take_once_free
from tests.studies import spec

PASSWORD = "it's 50 % \\ secret"


@pytest.fixture
def url(either_new_url) -> str:
    return either_new_url


def execute(url: str, *statements: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def select(url: str, query: str, **values: str) -> list:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = list(connection.execute(sa.text(query), values).scalars())
    engine.dispose()
    return found


def version(url: str) -> list[int]:
    return select(url, "SELECT version FROM bdense_schema")


def rights_on_a_new_table(url: str, role: str) -> set[str]:
    """Of a table that the owner makes now, as an upgrade does."""
    execute(url, "CREATE TABLE later (x int)")
    query = "SELECT has_table_privilege(:role, 'later', :right)"
    rights = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE")
    return {right for right in rights if select(url, query, role=role, right=right) == [True]}


def claimed(url: str, **settings) -> tuple[Ledger, Claim]:
    ledger = Ledger.open(url, "digits", budget=2, **settings)
    return ledger, take(ledger)


@pytest.fixture
def refusal(monkeypatch, tmp_path):
    """What a worker on a storage says that does not wait for it."""

    def wait(_: float) -> None:
        raise AssertionError("it waits, though nothing would come of it")

    def of(storage: str) -> WorkerError:
        told = WorkerConfig(
            study="digits",
            storage=without_password(resolve_storage_url(storage)),
            runs=str(tmp_path / "runs"),
            cache=str(tmp_path / "cache"),
        )
        monkeypatch.setenv("BDENSE_STORAGE", storage)
        for name in ("BDENSE_RUNS", "BDENSE_CACHE", "BDENSE_ARTIFACTS", "BDENSE_LOG"):
            monkeypatch.setenv(name, "")  # the test's to restore
        with monkeypatch.context() as patch:
            patch.setattr(ray_tasks.time, "sleep", wait)
            found: WorkerError = slot({"worker": told, "mark": str(tmp_path / "mark")})["error"]
        return found

    return of


def test_tables_without_a_version_get_one(url):
    """Their maker died before it was stored."""
    ledger, claim = claimed(url)
    execute(url, "DROP TABLE bdense_schema")
    assert Ledger.open(url, "digits", budget=None).running()[0].number == claim.number
    assert version(url) == [SCHEMA]
    ledger.complete(claim, 1.0, {})


def test_old_tables_are_refused_until_they_are_upgraded(url, refusal):
    ledger, claim = claimed(url)
    ledger.complete(claim, 1.5, {"kept": True})
    execute(url, "UPDATE bdense_schema SET version = 0")
    assert "belong to an older bdense" in refusal(url).message
    with pytest.raises(StorageRefusedError, match="bdense-search storage upgrade"):
        Ledger.open(url, "digits", budget=None)

    assert [line.partition(":")[0] for line in upgrade(url)] == ["bdense's tables"]
    assert version(url) == [SCHEMA]
    again = Ledger.open(url, "digits", budget=None)
    assert [(t.value, t.user_attrs["kept"]) for t in again.study.trials] == [(1.5, True)]
    assert isinstance(again.claim(SPACE, RandomSampler), Claim)


def test_a_newer_versions_tables_are_left_alone(url, refusal):
    open_tables(url)
    execute(url, "UPDATE bdense_schema SET version = 7")
    assert "belong to a newer bdense" in refusal(url).message
    for refused in (open_tables, upgrade):
        with pytest.raises(StorageError, match=r"newer bdense \(version 7, .* update bdense here"):
            refused(url)
    assert version(url) == [7]


def test_a_table_of_another_program_is_named_and_stays(url):
    """``storage upgrade`` would drop old ones of ours."""
    open_storage(url).engine.dispose()
    execute(url, "CREATE TABLE bdense_lease (flat INTEGER, tenant TEXT)")
    execute(url, "INSERT INTO bdense_lease VALUES (7, 'B. Dense')")
    for call in (lambda: Ledger.open(url, "digits", budget=1), lambda: upgrade(url)):
        with pytest.raises(StorageRefusedError, match=r"bdense_lease .*flat, tenant"):
            call()
    with open_storage(url).engine.connect() as connection:
        kept = connection.exec_driver_sql("SELECT flat FROM bdense_lease").scalar_one()
    assert kept == 7


def test_a_table_of_another_program_under_optunas_name_is_no_matter_of_the_network(url):
    execute(url, "CREATE TABLE studies (x INTEGER)")
    for call in (lambda: list_studies(url), lambda: Ledger.open(url, "x", budget=1)):
        with pytest.raises(StorageRefusedError, match=r"a database of their own|no studies yet"):
            call()


@pytest.mark.postgres
def test_an_empty_database_says_that_it_holds_no_studies(postgres):
    with pytest.raises(StorageRefusedError, match="no studies yet: launch one"):
        list_studies(postgres.new_database())


@pytest.mark.postgres
def test_a_database_that_is_read_only_by_default_is_no_matter_of_rights(postgres):
    url = postgres.new_database()
    claimed(url)
    name = sa.make_url(url).database
    execute(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(StorageRefusedError, match="default_transaction_read_only"):
        Ledger.open(url, "digits", budget=9)
    (finding,) = [each for each in rights(url, open_reading(url)) if each.level == "problem"]
    assert "default_transaction_read_only" in finding.text


def test_an_upgrade_waits_for_workers_and_not_for_leases_that_ran_out(url):
    claimed(url, ttl=60)
    execute(url, "UPDATE bdense_schema SET version = 0")
    with pytest.raises(InputError, match=r"1 trials of .* stop STUDY"):
        upgrade(url)
    expire_leases(url)
    upgrade(url)
    assert version(url) == [SCHEMA]
    assert upgrade(url) == ["the tables have this version already"]
    assert Ledger.open(url, "digits", budget=None).claim(SPACE, RandomSampler).number == 0


def test_an_upgrade_keeps_what_an_older_version_left_running(url):
    """That version marked no trial, so that only its lease says whose the trial is."""
    ledger, claim = claimed(url)
    ledger.release(claim)
    execute(
        url,
        "DELETE FROM trial_system_attributes WHERE key = 'bdense:begun'",
        "UPDATE bdense_schema SET version = 0",
    )
    upgrade(url)
    again = Ledger.open(url, "digits", budget=None)
    assert again.foreign() == {}
    assert again.claim(SPACE, RandomSampler).number == claim.number


def test_an_upgrade_waits_for_workers_whose_machine_has_slept(tmp_path):
    """A file's clock stands meanwhile, and so do its leases."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    claimed(url, ttl=60)
    execute(
        url,
        "UPDATE bdense_schema SET version = 0",
        "UPDATE bdense_server SET seen = seen - 3600",
        "UPDATE bdense_lease SET expires = expires - 3600",
    )
    with pytest.raises(InputError, match="1 trials"):
        upgrade(url)
    assert version(url) == [0]


def test_optunas_old_tables_name_our_command_and_are_upgraded(url, capsys, refusal):
    open_tables(url)
    execute(url, "UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    assert "bdense-search storage upgrade" in refusal(url).message
    assert cli.main(["status", "digits", "--storage", url]) == 2
    said = capsys.readouterr().err
    assert "bdense-search storage upgrade" in said
    assert said.count("\n") == 1
    assert cli.main(["storage", "upgrade", "--storage", url]) == 0
    assert "Optuna's tables: from v3.0.0.d to v3.2.0.a" in capsys.readouterr().out
    assert cli.main(["storage", "init", "--storage", url]) == 0


def test_a_reader_of_a_file_cannot_write(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(StorageError, match="launch a study first"):
        open_reading(url)
    open_tables(url)
    storage = open_reading(url)
    assert storage.get_all_studies() == []
    with (
        storage.engine.connect() as connection,
        pytest.raises(sa.exc.OperationalError, match="readonly"),
    ):
        connection.exec_driver_sql("DELETE FROM studies")


def test_roles_of_a_file_are_refused_before_it_is_made(tmp_path, capsys):
    storage = f"sqlite:///{tmp_path}/a.db"
    assert cli.main(["storage", "init", "--reader", "me", "--storage", storage]) == 2
    assert "which has no roles; leave --writer and --reader out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_files_is_named(capsys):
    """/proc: for root too."""
    assert cli.main(["status", "digits", "--storage", "sqlite:////proc/runs/study.db"]) == 2
    assert cli.main(["storage", "init", "--storage", "sqlite:////proc/runs/study.db"]) == 2
    assert "check that the folder can be written" in capsys.readouterr().err


def test_passwords_from_files(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "good").write_text("two words\n")
    assert read_password(tmp_path / "good") == "two words"
    with pytest.raises(InputError, match="is empty; write the password into it"):
        read_password(tmp_path / "empty")
    with pytest.raises(InputError, match="cannot be read"):
        read_password(tmp_path / "none")


@pytest.mark.postgres
class TestRoles:
    """Owner, writer, reader on a server that asks everybody but the owner for a password."""

    @pytest.fixture
    def roles(self, postgres, tmp_path):
        url = postgres.new_database()
        name = sa.engine.make_url(url).database
        rules = postgres.data / "pg_hba.conf"
        trusting = rules.read_text()
        rules.write_text(f"local {name} rw_{name},ro_{name} scram-sha-256\n{trusting}")
        postgres.control("reload")
        for kind in ("rw", "ro"):
            (tmp_path / kind).write_text(f"{PASSWORD}\n")
        options = ("--writer", f"rw_{name}", "--writer-password-file", str(tmp_path / "rw"))
        options += ("--reader", f"ro_{name}", "--reader-password-file", str(tmp_path / "ro"))
        assert cli.main(["storage", "init", "--storage", url, *options]) == 0
        yield url, postgres.url(name, user=f"rw_{name}"), postgres.url(name, user=f"ro_{name}")
        rules.write_text(trusting)
        postgres.control("reload")
        for role in (f"rw_{name}", f"ro_{name}"):
            execute(url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")

    def test_the_writer_runs_a_study_and_makes_no_tables(self, roles, monkeypatch):
        _, writer, _ = roles
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        ledger, claim = claimed(writer)
        ledger.report(claim, 1, 2.0)
        ledger.complete(claim, 1.5, {"a": 1})
        assert ledger.counts().complete == 1
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied for schema public"):
            execute(writer, "CREATE TABLE mine (x int)")
        with pytest.raises(sa.exc.ProgrammingError, match="must be owner"):
            execute(writer, "DROP TABLE bdense_lease")

    def test_the_reader_looks_and_changes_nothing(self, roles, monkeypatch, capsys):
        url, _, reader = roles
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        Study.create(url, spec())
        claimed(url)
        assert cli.main(["status", "digits", "--storage", reader, "--json"]) == 0
        assert '"running": 1' in capsys.readouterr().out
        with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"):
            execute(reader, "DELETE FROM trials")
        with pytest.raises(sa.exc.DBAPIError, match="permission denied for table trials"):
            execute(reader, "SET TRANSACTION READ WRITE; DELETE FROM trials")
        # The dashboard's way in is closed by the server, whatever the role.
        storage = open_reading(url)
        with (
            storage.engine.connect() as connection,
            pytest.raises(sa.exc.DBAPIError, match="read-only transaction"),
        ):
            connection.exec_driver_sql("DELETE FROM trials")
        storage.engine.dispose()

    def test_a_reader_who_launches_is_told_who_can_help(self, roles, monkeypatch):
        _, _, reader = roles
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        with pytest.raises(StorageError, match="bdense-search storage init, with --writer"):
            Ledger.open(reader, "new", budget=3)

    def test_roles_change_places(self, roles, monkeypatch):
        """Each has then the other's rights, also on tables that come later, and no more."""
        url, writer, reader = roles
        first, second = (sa.engine.make_url(each).username for each in (writer, reader))
        grant(url, [Role(name=second, access="read-write"), Role(name=first, access="read-only")])
        assert rights_on_a_new_table(url, second) == {"SELECT", "INSERT", "UPDATE", "DELETE"}
        execute(url, "DROP TABLE later")
        assert rights_on_a_new_table(url, first) == {"SELECT"}
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        ledger, claim = claimed(reader)
        ledger.complete(claim, 1.5, {"a": 1})
        assert Ledger.open_reading(writer, "digits").counts().complete == 1
        with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"):
            execute(writer, "DELETE FROM trials")
        for taken in ("DELETE FROM trials", "SELECT nextval('trials_trial_id_seq')"):
            with pytest.raises(sa.exc.DBAPIError, match="permission denied for"):
                execute(writer, f"SET TRANSACTION READ WRITE; {taken}")

    def test_an_owner_who_may_not_alter_roles_grants_to_those_that_are_there(
        self, postgres, tmp_path, capsys
    ):
        """As of a managed server, where the provider makes the roles."""
        url = postgres.new_database()
        name = sa.engine.make_url(url).database
        owner, writer, reader = (f"{kind}_{name}" for kind in ("own", "w", "r"))
        execute(url, *(f"CREATE ROLE {role} LOGIN" for role in (owner, writer, reader)))
        execute(url, f"ALTER DATABASE {name} OWNER TO {owner}")
        try:
            theirs = postgres.url(name, user=owner)
            options = ("--writer", writer, "--reader", reader)
            assert cli.main(["storage", "init", "--storage", theirs, *options]) == 0
            assert capsys.readouterr().out.splitlines()[1:] == [
                f"{writer} may read-write",
                f"{reader} may read-only",
                "for the database's administrator, optional: "
                f'ALTER ROLE "{reader}" SET default_transaction_read_only = on',
            ]
            ledger, claim = claimed(postgres.url(name, user=writer))
            ledger.complete(claim, 1.5, {"a": 1})
            looking = Ledger.open_reading(postgres.url(name, user=reader), "digits")
            assert looking.counts().complete == 1
            with pytest.raises(sa.exc.DBAPIError, match="permission denied for table trials"):
                execute(postgres.url(name, user=reader), "DELETE FROM trials")
            # With the statement given, nothing is left.
            execute(url, f'ALTER ROLE "{reader}" SET default_transaction_read_only = on')
            assert cli.main(["storage", "init", "--storage", theirs, *options]) == 0
            assert "administrator" not in capsys.readouterr().out
        finally:
            for role in (owner, writer, reader):
                execute(url, f"REASSIGN OWNED BY {role} TO postgres", f"DROP OWNED BY {role}")
                execute(url, f"DROP ROLE {role}")

    @pytest.mark.parametrize(
        ("password", "said"),
        [
            (None, "no password supplied"),
            ("wrong", "password authentication failed for user"),
        ],
    )
    def test_a_worker_that_is_not_let_in_says_so_at_once(
        self, roles, refusal, password, said, monkeypatch
    ):
        _, writer, _ = roles
        monkeypatch.setenv("PGPASSFILE", "/dev/null")
        monkeypatch.delenv("PGPASSWORD", raising=False)
        if password is not None:
            monkeypatch.setenv("PGPASSWORD", password)
        found = refusal(writer)
        assert found.is_input_error
        assert said in found.message
        assert "the password in PGPASSWORD or PGPASSFILE" in found.message
        nowhere = sa.make_url(writer).set(database="nowhere", username="postgres")
        missing = refusal(nowhere.render_as_string(hide_password=False)).message
        assert 'database "nowhere" does not exist' in missing

    def test_a_stranger_is_kept_out(self, roles, postgres, refusal):
        url, _, _ = roles
        execute(url, "CREATE ROLE stranger LOGIN")
        name = sa.engine.make_url(url).database
        try:
            theirs, why = postgres.url(name, user="stranger"), f'denied for database "{name}"'
            with pytest.raises(StorageRefusedError, match=f"permission {why}"):
                open_storage(theirs)
            assert why in refusal(theirs).message
        finally:
            execute(url, "DROP ROLE stranger")

    def test_an_empty_database_without_rights_names_the_command(self, postgres):
        url = postgres.new_database()
        name = sa.engine.make_url(url).database
        execute(url, "CREATE ROLE guest LOGIN")
        try:
            with pytest.raises(StorageRefusedError, match="bdense-search storage init") as caught:
                open_tables(postgres.url(name, user="guest"))
            assert "permission denied for schema public" in str(caught.value)
        finally:
            execute(url, "DROP ROLE guest")

    def test_no_password_is_in_the_servers_catalogue_or_log(self, roles, postgres):
        url, _, _ = roles
        name = sa.engine.make_url(url).database
        query = "SELECT rolpassword FROM pg_authid WHERE rolname = :name"
        (stored,) = select(url, query, name=f"rw_{name}")
        assert stored.startswith("SCRAM-SHA-256$")
        assert PASSWORD not in (postgres.data / "log").read_text()


@pytest.mark.postgres
def test_a_study_is_restored_from_its_backup_and_carried_on(postgres, tmp_path):
    """As docs/running.md says: pg_dump while it runs, pg_restore into an empty database."""
    url, copy = postgres.new_database(), postgres.new_database()
    ledger, first = claimed(url, ttl=1)
    ledger.complete(first, 1.5, {"kept": [1, 2]})
    second = ledger.claim(SPACE, RandomSampler)
    ledger.report(second, 3, 2.5)
    dump = tmp_path / "study.dump"

    def tool(name: str, database: str, *options: str) -> None:
        socket = sa.engine.make_url(url).query["host"]
        named = sa.engine.make_url(database).database
        command = [postgres.bin / name, "-h", socket, "-U", "postgres", "-d", named, *options]
        subprocess.run(command, check=True, capture_output=True)

    tool("pg_dump", url, "--format=custom", f"--file={dump}")
    ledger.complete(second, 9.0, {})  # after the backup: lost with the server
    tool("pg_restore", copy, "--no-owner", "--exit-on-error", str(dump))

    restored = Ledger.open(copy, "digits", budget=None)
    assert [(t.value, t.user_attrs["kept"]) for t in restored.study.trials[:1]] == [(1.5, [1, 2])]
    counts = restored.counts()
    assert (counts.planned, counts.complete, counts.running) == (2, 1, 1)
    expire_leases(copy)
    taken = take_once_free(restored)
    assert (taken.number, taken.params, taken.attempt) == (1, second.params, 2)
    restored.complete(taken, 2.0, {})
    assert restored.counts().complete == 2
