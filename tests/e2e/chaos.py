"""Faults against a launch that runs for real, every few trials one, drawn by a seed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from search.storage.engine import FROZEN_SECONDS
from search.storage.ledger import Ledger
from search.storage.own_study import BASELINES_SUFFIX
from search.study.trial_log import LOG_FILE, read_log
from tests.conftest import Postgres

# A lease's shortest. What is frozen or cut off longer loses its trial.
LEASE_SECONDS = 10.0
AWAY_SECONDS = 10.0
MOST_HEADLESS_SECONDS = 120.0  # it forgives its rows first, by a database that may be away too
MOST_AIMING_SECONDS = 5.0
MOST_FROZEN_SECONDS = FROZEN_SECONDS + 3 * LEASE_SECONDS
# Trials that complete between two faults: in the first round, and in later ones, as many faults
# cost a start of Ray.
TRIALS_APART = 1, 8
MOST_PAUSE_SECONDS = 1.0
# The other kinds cost a start of Ray, which tells nothing more of the study.
_TWICE = ("worker killed", "worker frozen", "PostgreSQL restarted")


@dataclass
class Network:
    """A namespace whose only way to the machine is one cable; what runs in it has no other."""

    name: str
    here: str
    there: str
    cable: str

    def command(self) -> list[str]:
        """In front of a command that is to run there."""
        return ["ip", "netns", "exec", self.name]

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing comes through; addresses stay, as of a switch that is off."""
        _ip("link", "set", self.cable, "down")
        try:
            yield
        finally:
            _ip("link", "set", self.cable, "up")


@contextlib.contextmanager
def network(number: int) -> Iterator[Network]:
    """A namespace of its own; needs root."""
    name, cable, end = f"bdense{number}", f"bd{number}a", f"bd{number}b"
    net = Network(name, f"10.213.{number}.1", f"10.213.{number}.2", cable)
    _ip("netns", "add", name)
    try:
        _ip("link", "add", cable, "type", "veth", "peer", "name", end)
        _ip("link", "set", end, "netns", name)
        _ip("addr", "add", f"{net.here}/24", "dev", cable)
        _ip("link", "set", cable, "up")
        for command in (
            ("addr", "add", f"{net.there}/24", "dev", end),
            ("link", "set", end, "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", name, *command)
        yield net
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", cable)
        _ip("netns", "del", name)


def can_cut_networks() -> bool:
    """Whether this machine lets us make network namespaces."""
    try:
        with network(os.getpid() % 250):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@dataclass
class Supervisor:
    """Gives one command again until it ends with status 0, as ``restart: on-failure`` does.

    Attributes:
        ended: Status and stderr of each time, in order.
    """

    command: Sequence[str]
    folder: Path
    environment: dict[str, str]
    ended: list[tuple[int, str]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def keep_running(self) -> bool:
        """Start it where it does not run; False once it has ended well."""
        if self.process is None:
            self._start()
            return True
        if self.process.poll() is None:
            return True
        err = (self.folder / "stderr").read_text()
        self.ended.append((self.process.returncode, err))
        status, self.process = self.process.returncode, None
        return status != 0

    @property
    def pid(self) -> int | None:
        """Of the command as it runs now."""
        return self.process.pid if self.process and self.process.poll() is None else None

    def _start(self) -> None:
        with (self.folder / "stderr").open("w") as err, (self.folder / "stdout").open("w") as out:
            self.process = subprocess.Popen(
                list(self.command),
                cwd=self.folder,
                env=self.environment,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )


@dataclass
class Chaos:
    """What goes wrong.

    Every second kill meets a worker in the midst of its training, and every second freeze lasts
    until the trial is lost, so that each run has both; the others come at any moment.

    Attributes:
        runs: Folder of the launch's studies.
        hits: How often each kind of fault struck something that was at work.
        fenced: How many frozen workers had lost their trial when they were thawed.
        log: Seconds since the start and what was done, for whoever reads a failure.
    """

    seed: int
    url: str
    study: str
    runs: Path
    launch: Supervisor
    postgres: Postgres
    network: Network | None
    hits: Counter[str] = field(default_factory=Counter)
    fenced: int = 0
    log: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    _draw: random.Random = field(init=False)
    _ledgers: dict[str, Ledger] = field(init=False)
    _next: list[str] = field(default_factory=list)
    _frozen: dict[int, threading.Timer] = field(default_factory=dict)
    _headless: tuple[int, str, float] | None = None
    _complete: int = 0
    _due: float = 0.0

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self._ledgers = {
            name: Ledger.open(self.url, name, budget=None)
            for name in (self.study, self.study + BASELINES_SUFFIX)
        }

    @property
    def kinds(self) -> dict[str, Callable[[], bool]]:
        """What can go wrong; each returns whether it struck."""
        kinds = {
            "worker killed": self._kill_worker,
            "launcher killed": self._kill_launcher,
            "PostgreSQL restarted": self._restart,
            "database away": self._away,
            "Ray's head killed": self._kill_head,
            "worker frozen": self._freeze,
        }
        if self.network is not None:
            kinds["network cut"] = self._cut
        return kinds

    @property
    def round(self) -> int:
        """Faults until each kind has struck."""
        return len(self.kinds) + len(_TWICE)

    def strike_if_due(self, complete: int) -> None:
        """The next fault, once enough trials are complete and at a moment that is drawn.

        All kinds come in a drawn order, some of them twice, then in another.
        """
        self._see_launcher_end()
        is_first = sum(self.hits.values()) < self.round
        if complete < self._complete + TRIALS_APART[not is_first] or time.monotonic() < self._due:
            return
        if not self._next:
            self._next = [*sorted(self.kinds), *_TWICE]
            self._draw.shuffle(self._next)
        kind = self._next[-1]
        if self.kinds[kind]():
            self._next.pop()
            self.hits[kind] += 1
            self._complete = complete
            self._note(kind)
        self._due = time.monotonic() + self._draw.uniform(0.0, MOST_PAUSE_SECONDS)

    def end(self) -> None:
        """Thaw what is frozen."""
        for pid, timer in list(self._frozen.items()):
            timer.cancel()
            _signal(pid, signal.SIGCONT)

    def _note(self, text: str) -> None:
        self.log.append(f"{time.monotonic() - self.started:6.1f} s  {text}")

    def _owners(self) -> dict[int, Path]:
        """Processes that hold a trial, or held it when they died, and the trials' folders."""
        return {
            int(row.worker.rpartition(":")[2]): self.runs / name / f"{row.number:05d}"
            for name, ledger in self._ledgers.items()
            for row in ledger.running()
            if row.worker
        }

    def _workers(self) -> list[int]:
        """Those that live and are not frozen."""
        pids = self._owners()
        return [pid for pid in pids if pid not in self._frozen and Path(f"/proc/{pid}").exists()]

    def _kill_worker(self) -> bool:
        aimed = self.hits["worker killed"] % 2 == 0
        workers = self._training() if aimed else self._workers()
        return bool(workers) and _signal(self._draw.choice(workers), signal.SIGKILL)

    def _training(self) -> list[int]:
        """Workers that just now saved a part of their training."""
        until = time.monotonic() + MOST_AIMING_SECONDS
        while time.monotonic() < until:
            awake, folders = self._workers(), self._owners()
            if saved := [pid for pid in awake if pid in folders and _has_saved(folders[pid])]:
                return saved
            time.sleep(0.01)
        return []

    def _kill_launcher(self) -> bool:
        pid = self.launch.pid
        return bool(self._workers()) and pid is not None and _signal(pid, signal.SIGKILL)

    def _restart(self) -> bool:
        if not self._workers():
            return False
        self.postgres.control("restart", "-m", "immediate")
        return True

    def _away(self) -> bool:
        if not self._workers():
            return False
        self.postgres.control("stop", "-m", "immediate")
        time.sleep(AWAY_SECONDS)
        self.postgres.control("start")
        return True

    def _kill_head(self) -> bool:
        """Of Ray's two parts that a cluster cannot be without, one or the other."""
        launcher = self.launch.pid
        if not self._workers() or launcher is None:
            return False
        part = self._draw.choice(["gcs_server", "raylet"])
        for pid in children(launcher):
            if Path(_arguments(pid)[0]).name == part and _signal(pid, signal.SIGKILL):
                self._headless = (launcher, part, time.monotonic())
                return True
        return False

    def _see_launcher_end(self) -> None:
        """It is to notice by itself that Ray's head is gone."""
        if self._headless is None:
            return
        launcher, part, since = self._headless
        seconds = time.monotonic() - since
        if self.launch.pid != launcher:
            self._note(f"launcher gone {seconds:.1f} s after {part}")
            self._headless = None
        else:
            assert seconds < MOST_HEADLESS_SECONDS, f"the launcher outlives {part}"

    def _freeze(self) -> bool:
        aimed = self.hits["worker frozen"] % 2 == 0
        workers = self._workers()
        if len(workers) < (2 if aimed else 1):  # somebody must be awake to take its trial
            return False
        pid = self._draw.choice(workers)
        if not _signal(pid, signal.SIGSTOP):
            return False
        held = pid in self._owners()  # or it had told its result just before
        self._frozen[pid] = threading.Timer(LEASE_SECONDS + 4, self._thaw, [pid, held])
        if not aimed:
            self._frozen[pid].start()
            return True
        until = time.monotonic() + MOST_FROZEN_SECONDS
        while pid in self._owners() and time.monotonic() < until:
            time.sleep(0.2)
        return self._thaw(pid, held)

    def _thaw(self, pid: int, held: bool) -> bool:
        """Whether it lives, and has lost the trial that it held when it froze."""
        lost = False
        # The database may be away just now.
        with contextlib.suppress(Exception):
            lost = held and pid not in self._owners()
        lost = _signal(pid, signal.SIGCONT) and lost
        if lost:
            self.fenced += 1
            self._note(f"worker {pid} thaws without its trial")
        self._frozen.pop(pid, None)
        return lost

    def _cut(self) -> bool:
        if self.network is None or not self._workers():
            return False
        seconds = self._draw.choice([5.0, LEASE_SECONDS + 4])
        with self.network.cut():
            time.sleep(seconds)
        self._note(f"network was cut for {seconds:g} s")
        return True


def children(pid: int) -> list[int]:
    """Processes that a process started itself."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def end_all(mark: str) -> None:
    """Kill every process whose environment holds ``mark``: this test's own and no other."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                _signal(int(entry.parent.name), signal.SIGKILL)


def _has_saved(folder: Path) -> bool:
    """Whether the last thing that a trial did was to save its training, with more to come."""
    trained, last = ([{}, {}] + read_log(folder / LOG_FILE)[0])[-2:]
    at, of = last.get("iteration", 0), trained.get("iterations", 0)
    return last.get("event") == "checkpoint" and at < of


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return [""]


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def measure_calmly(
    study: Path, points: Sequence[float], folder: Path, parts: int = 2
) -> dict[float, float]:
    """FID of each point by a trial's own function, in processes that nothing happens to.

    Args:
        study: Its file; teacher and trajectories are in the cache that the environment names.
        points: Values of a.
        folder: For the trials' files.
        parts: Processes at once.
    """
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.e2e.chaos",
                str(study),
                str(folder),
                *map(str, points[part::parts]),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(parts)
    ]
    found: dict[float, float] = {}
    for process in processes:
        out, _ = process.communicate(timeout=1200)
        assert process.returncode == 0
        found |= {float(a): value for a, value in json.loads(out)}
    return found


def _measure(study: Path, folder: Path, points: Sequence[float]) -> None:
    from search.spec.file import read_spec
    from search.study.arms import Task
    from search.worker.assets import load, use_device
    from tests.rows import run

    spec = read_spec(study)
    assets, seeds = load(spec, use_device(spec)), spec.seeds
    found = []
    for a in points:
        task = Task(params={"a": a}, seed=seeds.training, latents=seeds.evaluation)
        result = run(assets, folder / repr(a), task)
        found.append((a, result.value))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _measure(Path(sys.argv[1]), Path(sys.argv[2]), [float(a) for a in sys.argv[3:]])
