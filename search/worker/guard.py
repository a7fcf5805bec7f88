"""Runs one program for a worker, and ends it with all its children when the worker is gone.

A process of its own, so that a worker that is killed leaves no program behind that would write
into a checkpoint which the next worker's program reads. It runs by its path and needs the standard
library alone.

Its argument is an ``Order`` as JSON. On its standard input ``ASK`` has the program asked to save
and end, as SIGTERM, SIGINT and SIGHUP do; ``KILL`` and the end of the input have it killed. It
prints an ``Outcome`` as JSON.

Where the guard itself is killed, the program dies with it, and the next guard of the folder kills
what the program has left behind: on Linux, whatever has ``MARK`` in its environment.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

ASK, KILL = b"a", b"k"
# Files of a row's folder: what a program is given and writes, and the logs of its outputs.
GIVEN_FILE, METRIC_FILE, VALUES_FILE = "given.json", "metric.json", "values.jsonl"
OUT_FILE, ERR_FILE, LOCK_FILE = "stdout.log", "stderr.log", "program.lock"
# Names what a program was given, to it and to all that it starts.
MARK = "BDENSE_TRIAL"
_POLL_SECONDS = 0.05
_DRAIN_SECONDS = 1.0
_TAIL_BYTES = 4096
_READ_BYTES = 65536
# Of Linux' prctl.
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to run.

    Attributes:
        words: The program's path and its arguments.
        cwd: Where it is started.
        signal: Name of the signal that asks it to save and end, without SIG.
        grace_seconds: Time for it to save and end.
        folder: The row's. A metric of an earlier attempt is deleted, half a line of its values is
            cut off, and the lock file is locked while the program lives.
        most_bytes: Size of each output's log, which keeps the end of it in two files.
    """

    words: list[str]
    cwd: str
    signal: str
    grace_seconds: float
    folder: str
    most_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: Its exit status; the negative number of the signal that ended it. None where it
            did not run.
        hindered: Why it did not: it could not be started; its lock could not be had; the guard
            was asked to end while it waited for an earlier worker's program.
        killed: Whether it had to be killed.
        children: Whether children of it were left, and killed.
        last_words: The end of its standard error, or the error that hindered it.
    """

    status: int | None
    hindered: Literal["", "start", "lock", "asked"] = ""
    killed: bool = False
    children: bool = False
    last_words: str = ""


class _Kept:
    """A log file of bounded size: its current half, and the half before it."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._half = path, max(most_bytes // 2, 1)
        self.tail = b""

    def write(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-_TAIL_BYTES:]
        with contextlib.suppress(OSError):  # a full disk must not end the program
            size = self._path.stat().st_size if self._path.exists() else 0
            if size and size + len(data) > self._half:
                self._path.replace(self._path.with_suffix(f".1{self._path.suffix}"))
            with self._path.open("ab") as file:
                file.write(data[-self._half :])


class _Guard:
    def __init__(self, order: Order) -> None:
        self._order, self._folder = order, Path(order.folder)
        self._kept = {
            name: _Kept(self._folder / name, order.most_bytes) for name in (OUT_FILE, ERR_FILE)
        }
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ, "orders")
        self._deadline: float | None = None
        self._asked = self._ends = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        self._asked = True

    def run(self) -> Outcome:
        order, given = self._order, str(self._folder / GIVEN_FILE)
        try:
            if not self._locked():
                return Outcome(status=None, hindered="asked")
        except OSError as error:
            why = f"{self._folder / LOCK_FILE} cannot be locked: {error.strerror}"
            return Outcome(status=None, hindered="lock", last_words=why)
        _prctl(_SET_CHILD_SUBREAPER, 1)
        _end_marked(given)
        try:
            (self._folder / METRIC_FILE).unlink(missing_ok=True)
            _cut_half_a_line(self._folder / VALUES_FILE)
            program = subprocess.Popen(
                order.words,
                cwd=order.cwd,
                env={**os.environ, MARK: given},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  there is one thread
            )
        except OSError as error:
            why = f"{error.filename or order.words[0]}: {error.strerror}"
            return Outcome(status=None, hindered="start", last_words=why)
        for name, pipe in ((OUT_FILE, program.stdout), (ERR_FILE, program.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, name)
        killed = self._follow(program)
        children = _end_group(program.pid) and not killed
        self._drain()
        last_words = self._kept[ERR_FILE].tail.decode(errors="replace")
        return Outcome(
            status=program.returncode, killed=killed, children=children, last_words=last_words
        )

    def _locked(self) -> bool:
        """Wait until the program of an earlier worker has ended; False where asked to end."""
        self._lock = (self._folder / LOCK_FILE).open("a")  # until this process ends
        while not (self._ends or self._asked):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._select()
            else:
                return True
        return False

    def _follow(self, program: subprocess.Popen[bytes]) -> bool:
        """Follow the program to its end; whether it was killed."""
        killed = False
        while program.poll() is None:
            if self._asked and self._deadline is None:
                self._deadline = time.monotonic() + self._order.grace_seconds
                _signal_group(program.pid, signal.Signals[f"SIG{self._order.signal}"])
            self._select()
            late = self._deadline is not None and time.monotonic() > self._deadline
            if (self._ends or late) and not killed:
                killed = True
                _signal_group(program.pid, signal.SIGKILL)
        return killed

    def _select(self) -> None:
        for key, _ in self._selector.select(_POLL_SECONDS):
            data = self._read(key.fileobj)
            if key.data != "orders":
                self._kept[key.data].write(data)
            elif data == ASK:
                self._ask()
            else:
                self._ends = True

    def _read(self, file: Any) -> bytes:  # noqa: ANN401  as selectors have it
        try:
            data = os.read(file if isinstance(file, int) else file.fileno(), _READ_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            self._selector.unregister(file)
        return data

    def _drain(self) -> None:
        """Read what is left in the pipes, which an escaped child may hold open."""
        deadline, watched = time.monotonic() + _DRAIN_SECONDS, self._selector.get_map()
        while any(each.data in self._kept for each in watched.values()):
            if time.monotonic() > deadline:
                return
            self._select()


def _end_group(group: int) -> bool:
    """Kill the rest of a program's process group and descendants; whether there were any."""
    # Those that have ended were not left behind.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    found = _signal_group(group, signal.SIGKILL)
    # Descendants whose parents are gone are this process's children, whatever their group.
    for _ in range(1000):
        children = _children()
        if not children:
            break
        found = True
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
    return found


def _end_marked(given: str) -> None:
    """Kill the processes that an earlier program of the folder left when its guard was killed."""
    mark = f"{MARK}={given}".encode()
    while found := [pid for pid in _marked(mark) if pid != os.getpid()]:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _marked(mark: bytes) -> Iterator[int]:
    """Pids whose environment has the mark; a zombie has no environment."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if mark in environment.read_bytes().split(b"\0"):
                yield int(environment.parent.name)


def _cut_half_a_line(path: Path) -> None:
    """Cut off an unfinished last line, which a killed writer leaves."""
    if path.is_file():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)


def _children() -> list[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    try:
        return [int(word) for word in listed.read_text().split()]
    except (OSError, ValueError):
        return []


def _signal_group(group: int, number: signal.Signals) -> bool:
    """Signal a process group; whether it has any process."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS says so of a group of zombies
        return False
    return True


def _die_with_parent() -> None:
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    outcome = _Guard(Order(**json.loads(sys.argv[1]))).run()
    sys.stdout.write(json.dumps(dataclasses.asdict(outcome)))
