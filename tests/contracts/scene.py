"""One study with real processes on it, and what must hold of it at the end."""

import contextlib
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import sqlalchemy as sa
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from search.storage.engine import open_storage, sqlite_file
from search.storage.ledger import Claim, Done, Ledger, Wait
from search.storage.queries import Counts
from tests.contracts import ledger_worker
from tests.contracts.ledger_worker import SPACE, objective

STUDY = "digits"
PATIENCE_SECONDS = 120.0
LONG_TTL = 60.0  # longer than any test: what is adopted earlier was adopted at once


# Workers are forked from a process that has imported their program.
multiprocessing.get_context("forkserver").set_forkserver_preload([ledger_worker.__name__])


class Forked(ForkServerProcess):
    """A real process with the methods of ``Popen`` that tests need."""

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode

    def send_signal(self, signal: int) -> None:
        os.kill(self.pid, signal)


@dataclass
class Scene:
    """One study, its folder, and the processes that work on it."""

    url: str
    folder: Path
    processes: list[Forked | subprocess.Popen] = field(default_factory=list)

    def open(self, **settings) -> Ledger:
        return Ledger.open(self.url, STUDY, **{"budget": None, **settings})

    def start(self, *options: str) -> Forked:
        """Start the program of this suite: a worker, or with ``--workers`` a launcher."""
        command = (self.url, STUDY, str(self.folder), *options)
        process = Forked(target=ledger_worker.run_apart, args=command)
        process.start()
        self.processes.append(process)
        return process

    def start_program(self, *options: str) -> subprocess.Popen:
        """Start it as a user would, who imports everything anew."""
        process = subprocess.Popen(
            [sys.executable, "-m", ledger_worker.__name__, STUDY, str(self.folder), *options],
            env={**os.environ, "BDENSE_STORAGE": self.url},
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def steps(self, number: int) -> list[dict[str, int]]:
        """Every step that was computed for a trial, in order, by whom."""
        log = self.folder / str(number) / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @contextlib.contextmanager
    def held_up(self) -> Iterator[None]:
        """Nobody gets beyond the middle of a trial, however far apart workers started."""
        gate = self.folder / ledger_worker.GATE
        gate.touch()
        yield
        gate.unlink()

    def freeze(self, process: Forked) -> None:
        """Stop it where it stands, but not in a write to SQLite, which keeps everybody out."""
        path = sqlite_file(self.url)
        with contextlib.closing(sqlite3.connect(path or ":memory:", timeout=30)) as database:
            database.execute("BEGIN IMMEDIATE")
            process.send_signal(signal.SIGSTOP)

    def attempts(self, number: int) -> int:
        """The last attempt that computed a step of a trial; 0 where none did."""
        return max((line["attempt"] for line in self.steps(number)), default=0)

    def wait_for_step(self, step: int, trials: int = 1) -> None:
        def reached() -> bool:
            logs = [self.steps(int(log.parent.name)) for log in self.folder.glob("*/log")]
            return sum(len(log) >= step for log in logs) >= trials

        wait_until(reached)

    def settle(self) -> Counts:
        """Finish what is left, then hold the study against what it promises at its end."""
        ledger = self.open()
        wait_until(lambda: finish_one(ledger) is None)
        counts = ledger.counts()
        assert (counts.running, counts.waiting) == (0, 0)
        assert counts.planned == counts.complete + counts.pruned + counts.failed
        assert counts.planned == ledger.budget
        pairs = [(trial.params["a"], trial.params["b"]) for trial in ledger.study.trials]
        assert len(set(pairs)) == len(pairs)
        for trial in ledger.study.trials:
            if trial.state is TrialState.COMPLETE:
                assert trial.value == objective(trial.params)
        assert lease_rows(self.url) == []
        return counts

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def lease_rows(url: str) -> list[tuple[int, int]]:
    storage = open_storage(url)
    with storage.engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT trial_id, attempt FROM bdense_lease"))
        return [tuple(row) for row in rows]


def expire_leases(url: str) -> None:
    """As if nobody had renewed one for a long time."""
    with open_storage(url).engine.begin() as connection:
        connection.execute(sa.text("UPDATE bdense_lease SET expires = expires - 1000"))


def take(ledger: Ledger, constraint=None, *, space=SPACE) -> Claim:
    claim = ledger.claim(space, RandomSampler, constraint)
    assert isinstance(claim, Claim), claim
    return claim


def take_once_free(ledger: Ledger) -> Claim:
    """The next trial, as soon as its last worker's lease lets it go."""
    found: list[Claim | Wait | Done] = []

    def is_taken() -> bool:
        found.append(ledger.claim(SPACE, RandomSampler))
        return isinstance(found[-1], Claim)

    wait_until(is_taken)
    return found[-1]


def complete(ledger: Ledger, claim: Claim) -> None:
    ledger.complete(claim, objective(dict(claim.params)), {})


def finish_one(ledger: Ledger) -> Claim | Wait | None:
    claim = ledger.claim(SPACE, RandomSampler)
    if isinstance(claim, Done):
        return None
    if isinstance(claim, Claim):
        complete(ledger, claim)
    return claim
