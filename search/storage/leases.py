"""Leases: which process works on which running trial, timed by the database's clock.

A lease ends when its worker finishes or releases the trial, when it is not renewed in time, or at
once when its own machine sees that the process is dead. ``attempt`` is its fencing token: it only
grows, and a worker with an old token cannot write.
"""

import dataclasses
import functools
import math
import os
import socket
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from search.storage.tables import (
    FOREIGN,
    LEASE,
    RELEASED,
    SERVER,
    STATE,
    STUDY_ATTRIBUTES,
    TRIALS,
)

_PROGRESS_CHARACTERS = 200
# At most as many attempts are forgiven as there were.
_FORGIVEN_ONE_MORE = sa.case(
    (LEASE.c.forgiven < LEASE.c.attempt, LEASE.c.forgiven + 1), else_=LEASE.c.forgiven
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One trial, held by this process until it is finished, released or lost.

    ``attempt`` is the fencing token, 1 for the first run. ``tries`` is the number of attempts so
    far that count against the trial; interrupted ones do not.
    """

    trial_id: int
    number: int
    params: Mapping[str, Any]
    attempt: int
    tries: int
    owner: str
    adopted: bool


@dataclass(frozen=True, slots=True)
class Process:
    """Identity of one process, unique over all machines and all time."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Self:
        """This process; without /proc the fields that need it are empty."""
        pid = os.getpid()
        boot, namespace = _place(pid)
        return cls(socket.gethostname(), boot, namespace, pid, _start_time(pid) or "")

    def is_seen_dead(self) -> bool:
        """Whether it ran under this kernel and pid namespace and is gone.

        False if that is unknown: then its lease ends by the clock.
        """
        place = (self.boot, self.pid_namespace)
        if not (place == _place(os.getpid()) and all(place) and self.started):
            return False
        started = _start_time(self.pid)
        return _is_gone(self.pid) if started is None else started != self.started


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRow:
    """A trial in state RUNNING and its lease; the defaults mean that no worker took it yet.

    Attributes:
        owner: Of the lease, see ``Claim``; empty where it was released.
        seconds: Time since the claim.
        adoptable: Whether another worker may take it over.
    """

    trial_id: int
    number: int
    owner: str = ""
    attempt: int = 0
    forgiven: int = 0
    progress: str = ""
    seconds: float = 0.0
    process: Process | None = None
    adoptable: bool = True

    @property
    def worker(self) -> str:
        """host:pid; empty where no worker has it."""
        return f"{self.process.host}:{self.process.pid}" if self.process and self.owner else ""


class Leases:
    """The lease rows of one study.

    Args:
        engine: The study's database.
        study_id: Optuna's key of the study.
        ttl: Seconds that a lease lasts without renewal.
    """

    def __init__(self, engine: sa.Engine, study_id: int, ttl: float) -> None:
        self.ttl = ttl
        self._engine = engine
        self._study_id = study_id
        self._postgres = engine.dialect.name == "postgresql"
        self._clock = database_clock(engine)
        self._ahead: float | None = None  # the server's clock, of this process's

    def sweep(self, connection: sa.Connection) -> None:
        """Delete leases of finished trials, left by workers that died after finishing them."""
        running = sa.exists().where(TRIALS.c.trial_id == LEASE.c.trial_id, STATE == "RUNNING")
        connection.execute(sa.delete(LEASE).where(~running))

    def note_server(self, connection: sa.Connection) -> None:
        """Remember when this start of the server, or this boot, was first seen to serve.

        The server's start time will not do: recovery after a crash follows it and may take longer
        than a lease lasts.
        """
        insert = postgresql.insert if self._postgres else sqlite.insert
        started = _SERVER_START if self._postgres else _BOOT
        seen = self._clock if self._postgres else _WALL - _SINCE_BOOT
        known = insert(SERVER).values(started=started, seen=seen).on_conflict_do_nothing()
        connection.execute(known)
        if self._postgres:
            self._note_jump(connection)

    def _note_jump(self, connection: sa.Connection) -> None:
        """Give live workers time to renew where the server's clock has jumped ahead.

        Known by this process's own clock, which stands while its machine sleeps.
        """
        now = connection.execute(sa.select(self._clock)).scalar_one()
        ahead, self._ahead = now - time.monotonic(), self._ahead
        if self._ahead is not None and ahead - self._ahead > self.ttl / 3:
            mine = SERVER.c.started == _SERVER_START
            connection.execute(sa.update(SERVER).where(mine).values(seen=self._clock))
        self._ahead = ahead

    def running(self, connection: sa.Connection) -> list[RunningRow]:
        """Every running trial of the study, lowest number first."""
        rows = connection.execute(
            sa.select(
                TRIALS.c.trial_id.label("trial"),
                TRIALS.c.number,
                self._clock.label("now"),
                self._serving().label("serving"),
                *LEASE.c,
            )
            .select_from(TRIALS.outerjoin(LEASE, LEASE.c.trial_id == TRIALS.c.trial_id))
            .where(TRIALS.c.study_id == self._study_id, STATE == "RUNNING", ~FOREIGN)
            .order_by(TRIALS.c.number)
        )
        return [self._running_row(row) for row in rows.mappings()]

    def count_begun(self, connection: sa.Connection) -> int:
        """Trials that ever started, including those that count nowhere."""
        return connection.execute(
            sa.select(sa.func.count())
            .select_from(TRIALS)
            .where(TRIALS.c.study_id == self._study_id, STATE != "WAITING")
        ).scalar_one()

    def take(self, connection: sa.Connection, row: RunningRow, owner: str) -> bool:
        """Make this process the worker of ``row``; False if another one came first."""
        values = {
            "owner": owner,
            "attempt": row.attempt + 1,
            "forgiven": row.forgiven,
            "claimed": self._clock,
            "expires": self._clock + self.ttl,
            "progress": "",
            **dataclasses.asdict(Process.current()),
        }
        insert = postgresql.insert if self._postgres else sqlite.insert
        written = connection.execute(
            insert(LEASE)
            .values(trial_id=row.trial_id, **values)
            .on_conflict_do_update(
                index_elements=[LEASE.c.trial_id],
                set_=values,
                where=LEASE.c.attempt == row.attempt,
            )
        )
        return written.rowcount == 1

    def renew(self, claim: Claim) -> bool:
        """Make the lease last a full ``ttl`` from now; False if it is lost."""
        return self._write(self._renewal(), claim)

    def renew_and_read(self, claim: Claim, progress: str | None, key: str) -> tuple[bool, str]:
        """Like ``renew``; also returns an attribute of the study, as JSON or ''."""
        stored = (
            sa.select(STUDY_ATTRIBUTES.c.value_json)
            .where(STUDY_ATTRIBUTES.c.study_id == self._study_id, STUDY_ATTRIBUTES.c.key == key)
            .scalar_subquery()
        )
        asking = self._fenced(self._renewal(progress), claim).returning(stored.label("stored"))
        with self._engine.begin() as connection:
            found = connection.execute(asking).one_or_none()
        return found is not None, (found and found.stored) or ""

    def _renewal(self, progress: str | None = None) -> sa.Update:
        values: dict[str, Any] = {"expires": self._clock + self.ttl}
        if progress is not None:
            values["progress"] = progress[:_PROGRESS_CHARACTERS]
        return sa.update(LEASE).values(values)

    def release(self, claim: Claim, *, forgive: bool) -> bool:
        """Let another worker take the trial over at once; False if the lease is lost."""
        forgiven = _FORGIVEN_ONE_MORE if forgive else LEASE.c.forgiven
        values = {"expires": RELEASED, "owner": "", "forgiven": forgiven}
        return self._write(sa.update(LEASE).values(values), claim)

    def forgive(self, connection: sa.Connection) -> None:
        """Do not count the current attempts of the study's running trials against them.

        Released trials were forgiven when they were released, or count.
        """
        mine = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == self._study_id)
        connection.execute(
            sa.update(LEASE)
            .where(LEASE.c.trial_id.in_(mine), LEASE.c.expires != RELEASED)
            .values(forgiven=_FORGIVEN_ONE_MORE)
        )

    def drop(self, claim: Claim) -> None:
        """Delete the lease if it is still the claim's."""
        self._write(sa.delete(LEASE), claim)

    def _write(self, statement: sa.Update | sa.Delete, claim: Claim) -> bool:
        with self._engine.begin() as connection:
            return connection.execute(self._fenced(statement, claim)).rowcount == 1

    def _fenced(self, statement: Any, claim: Claim) -> Any:  # noqa: ANN401  an update or a delete
        return statement.where(
            LEASE.c.trial_id == claim.trial_id,
            LEASE.c.owner == claim.owner,
            LEASE.c.attempt == claim.attempt,
        )

    def _running_row(self, row: sa.RowMapping) -> RunningRow:
        if row["owner"] is None:
            return RunningRow(trial_id=row["trial"], number=row["number"])
        process = Process(*(row[each.name] for each in dataclasses.fields(Process)))
        # After an outage leases look expired until their owners have had time to renew them.
        has_expired = row["serving"] > self.ttl and row["expires"] < row["now"]
        return RunningRow(
            trial_id=row["trial"],
            number=row["number"],
            owner=row["owner"],
            attempt=row["attempt"],
            forgiven=row["forgiven"],
            progress=row["progress"],
            seconds=row["now"] - row["claimed"],
            process=process,
            adoptable=has_expired or row["expires"] == RELEASED or process.is_seen_dead(),
        )

    def _serving(self) -> sa.ColumnElement[float]:
        """Seconds since this start of the server was first seen; infinite for SQLite."""
        if not self._postgres:
            return sa.literal(math.inf)
        seen = sa.select(SERVER.c.seen).where(SERVER.c.started == _SERVER_START).scalar_subquery()
        return sa.func.coalesce(self._clock - seen, 0.0)


def database_clock(engine: sa.Engine) -> sa.ColumnElement[float]:
    """Seconds since 1970 by the database's clock, the only clock that leases use.

    On SQLite it goes on evenly from the first claim since boot, whatever is done to the machine's
    clock, and stands while the machine sleeps, so that no live worker loses its lease by that.
    """
    if engine.dialect.name == "postgresql":
        return _seconds("extract(epoch from clock_timestamp())")
    at_boot = sa.select(SERVER.c.seen).where(SERVER.c.started == _BOOT).scalar_subquery()
    return sa.func.coalesce(at_boot, _WALL - _SINCE_BOOT) + _SINCE_BOOT


def add_clock(connection: sqlite3.Connection) -> None:
    """Give a connection the functions of ``database_clock``."""
    boot = _place(os.getpid())[0].replace("-", "")
    # Without a name of the boot an earlier boot's count could not be told apart: use the clock.
    since_boot = time.monotonic if boot else time.time
    connection.create_function("bdense_since_boot", 0, since_boot)
    connection.create_function("bdense_boot", 0, lambda: float(int(boot[:12] or "0", 16)))


def _seconds(sql: str) -> sa.ColumnElement[float]:
    return sa.cast(sa.literal_column(sql), sa.Double)


_WALL = _seconds("(julianday('now') - 2440587.5) * 86400.0")
_SINCE_BOOT, _BOOT = _seconds("bdense_since_boot()"), _seconds("bdense_boot()")
_SERVER_START = _seconds("extract(epoch from pg_postmaster_start_time())")


@functools.lru_cache(maxsize=1)
def _place(pid: int) -> tuple[str, str]:
    """Boot id and pid namespace of this process; its ``pid`` makes a fork look again."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "", ""


def _start_time(pid: int) -> str | None:
    """Clock ticks from boot to the start of a process; empty for a zombie.

    None if it cannot be read: there is no such process, or /proc hides other users' processes.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The command name in parentheses may hold anything: count fields after the last parenthesis.
    fields = stat.rpartition(")")[2].split()
    dead = fields[0] in ("Z", "X")
    return "" if dead else fields[19]


def _is_gone(pid: int) -> bool:
    """Whether no process has that pid; other users' processes count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
