"""What is lost when something dies: Optuna's heartbeats, Ray Tune's restore, and bdense-search.

``python -m benchmarks.faults_vs_peers`` gives each the same planned points, on PostgreSQL, two
at a time. A trial is a count of steps, saved after each, and does not import torch. Meanwhile the
same faults strike at the same pace, in an order drawn by a seed. Whatever ends by an error is
started again, as ``restart: on-failure`` does; each way is set up as its documentation says:

- Optuna: two processes of ``study.optimize``; heartbeats of 2 s, given up after 10 s, tried again
  by RetryHeartbeatStaleTrialCallback, which finds its checkpoint by the trial that was given up.
- Ray Tune: OptunaSearch on the same database, ``max_failures=-1``, a checkpoint a step, and
  ``Tuner.restore`` once the driver has died.
- bdense-search: a study of method ``command``, leases of 10 s.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import ray
import sqlalchemy
import yaml
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from benchmarks.common import parser, publish, table
from benchmarks.counting import LEASE_SECONDS, STEP, STEPS, STUDY, WORKERS
from benchmarks.servers import Server, postgres

FROZEN_SECONDS, AWAY_SECONDS = 16.0, 10.0
PAUSE = (8.0, 16.0)  # seconds between two faults
MOST_FAILURES = 8  # starts in a row that bring no step: nobody gives the command again for ever
KINDS = ("worker killed", "worker frozen", "all killed", "database restarted", "database away")
SYSTEMS = ("optuna", "tune", "bdense")


@dataclass
class Contest:
    """One way, from its first start to its end.

    Attributes:
        system: Which.
        url: Its database.
        folder: Its files.
        trials: How many are planned.
        server: The database's server.
        step_seconds: Length of a step.
    """

    system: str
    url: str
    folder: Path
    trials: int
    server: Server
    step_seconds: float
    processes: list[subprocess.Popen[bytes] | None] = field(default_factory=list)
    failures: int = 0
    restarts: int = 0
    _seen: int = 0

    def prepare(self) -> None:
        """Plan the points."""
        if self.system == "bdense":
            self._plan()
            return
        study = optuna.create_study(study_name=STUDY, storage=RDBStorage(self.url))
        if self.system == "optuna":  # OptunaSearch is given them
            for x in range(self.trials):
                study.enqueue_trial({"x": x})
        self.processes = [None] * (WORKERS if self.system == "optuna" else 1)

    def _plan(self) -> None:
        file = self.folder / f"{STUDY}.yaml"
        here = [sys.executable, "-m", "benchmarks.counting", "program"]
        tree = {
            "name": STUDY,
            "method": {
                "name": "command",
                "run": [*here, str(self.folder)],
                "metric": "loss",
            },
            "weights": {"x": {"low": 0, "high": max(self.trials - 1, 1), "default": 0}},
            "plan": {"trials": self.trials, "replicates": 1},
            "resources": {"gpus": 0, "lease_seconds": LEASE_SECONDS, "max_attempts": 1000},
        }
        file.write_text(yaml.safe_dump(tree))
        from search.spec.file import read_spec
        from search.study.study import Study

        study = Study.create(self.url, read_spec(file))
        for x in range(self.trials):
            study.search.enqueue({"x": float(x)})
        self.processes = [None]

    def command(self) -> list[str]:
        """What is started, and started again."""
        if self.system == "bdense":
            options = ["launch", str(self.folder / f"{STUDY}.yaml"), "--workers", str(WORKERS)]
            return [sys.executable, "-m", "search", *options]
        here = [sys.executable, "-m", "benchmarks.counting", self.system]
        return [*here, str(self.folder), self.url, str(self.trials)]

    def is_over(self) -> bool:
        """Starts what ended by an error; whether all have ended well, or were given up."""
        for i, process in enumerate(self.processes):
            if process is not None and process.poll() is None:
                continue
            if process is not None and process.returncode == 0:
                continue
            if process is not None:
                self.restarts += 1
                self.failures = 0 if len(self.lines()) > self._seen else self.failures + 1
                self._seen = len(self.lines())
            if self.failures >= MOST_FAILURES:
                return True
            environment = {**os.environ, "RAY_TMPDIR": str(self.folder / "r"), **self._mine()}
            with (self.folder / f"output-{i}").open("ab") as output:
                self.processes[i] = subprocess.Popen(
                    self.command(),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
        return all(process and process.poll() == 0 for process in self.processes)

    def _mine(self) -> dict[str, str]:
        own = {"BDENSE_STORAGE": self.url, "BDENSE_RUNS": str(self.folder / "runs")}
        return own | {"RAY_worker_niceness": "0", STEP: str(self.step_seconds)}

    def lines(self) -> list[tuple[str, int, list[int]]]:
        """Steps: trial, step, and the processes that the trial needs, the worker first."""
        log = self.folder / "log"
        return [tuple(json.loads(line)) for line in log.open()] if log.exists() else []

    def strike(self, kind: str, draw: random.Random) -> bool:
        """Whether there was something to strike."""
        busy = {needed[0]: needed for _, _, needed in self.lines()[-4 * WORKERS :]}
        alive = [pid for pid in busy if Path(f"/proc/{pid}").exists()]
        if not alive:
            return False
        if kind == "worker killed":
            _signal(draw.choice(alive), signal.SIGKILL)
        elif kind == "worker frozen":
            frozen = busy[draw.choice(alive)]
            for each in frozen:
                _signal(each, signal.SIGSTOP)
            time.sleep(FROZEN_SECONDS)
            for each in frozen:
                _signal(each, signal.SIGCONT)
        elif kind == "all killed":
            self.kill_all()
        elif kind == "database restarted":
            self.server.control("restart", "-m", "immediate")
        else:
            self.server.control("stop", "-m", "immediate")
            time.sleep(AWAY_SECONDS)
            self.server.control("start")
        return True

    def kill_all(self) -> None:
        """As a machine that loses its power."""
        mark = f"RAY_TMPDIR={self.folder / 'r'}".encode()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in entry.read_bytes():
                    _signal(int(entry.parent.name), signal.SIGKILL)

    def result(self) -> tuple[object, ...]:
        """Planned, complete, twice, lost, failed, stuck, and seconds computed again."""
        rows = optuna.load_study(study_name=STUDY, storage=RDBStorage(self.url)).trials
        complete = Counter(row.params.get("x") for row in rows if row.state == TrialState.COMPLETE)
        states = Counter(row.state for row in rows)
        steps = [line[:2] for line in self.lines()]
        again = (len(steps) - len(set(steps))) * self.step_seconds
        return (
            self.trials,
            len(complete),
            sum(complete.values()) - len(complete),
            self.trials - len(complete),
            states[TrialState.FAIL],
            states[TrialState.RUNNING],
            f"{again:.1f}",
        )


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def contest(system: str, server: Server, seed: int, given: argparse.Namespace) -> list[object]:
    """One row of the table."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="bf-", ignore_cleanup_errors=True) as name:
        database = server.new_database()
        one = Contest(system, database, Path(name), given.trials, server, given.step_seconds)
        one.prepare()
        began, hits, kinds = time.monotonic(), Counter[str](), list[str]()
        due: float | None = None
        while not one.is_over() and time.monotonic() - began < given.limit:
            now = time.monotonic()
            if due is None and one.lines():
                due = now + draw.uniform(*PAUSE)
            if due is not None and now >= due:
                if not kinds:
                    kinds = list(KINDS)
                    draw.shuffle(kinds)
                if one.strike(kinds[-1], draw):
                    hits[kinds.pop()] += 1
                    due = time.monotonic() + draw.uniform(*PAUSE)
            time.sleep(0.1)
        seconds = time.monotonic() - began
        ended = one.is_over() and one.failures < MOST_FAILURES
        one.kill_all()
        sys.stderr.write(f"{system}, seed {seed}: {dict(hits)}, {one.restarts} restarts\n")
        faults = sum(hits.values())
        return [system, seed, faults, *one.result(), "yes" if ended else "no", f"{seconds:.0f}"]


def main() -> None:
    """All ways under all seeds."""
    options = parser(__doc__)
    options.add_argument("--trials", type=int, default=30)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--systems", nargs="+", default=[*SYSTEMS], choices=SYSTEMS)
    options.add_argument("--step-seconds", type=float, default=0.25)
    options.add_argument("--limit", type=float, default=900.0, help="seconds for each")
    given = options.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with postgres(100) as server:
        version = server.version()
        rows = [
            contest(system, server, seed, given)
            for seed in given.seeds
            for system in given.systems
        ]
    header = ["way", "seed", "faults", "planned", "complete", "twice", "lost", "failed rows"]
    header += ["stuck", "seconds computed again", "ended by itself", "seconds"]
    versions = ", ".join(
        f"{each.__name__} {each.__version__}" for each in (optuna, ray, sqlalchemy)
    )
    body = (
        f"{versions}, {version}. A trial is {STEPS} steps of {given.step_seconds:g} s; "
        f"{WORKERS} at a time.\n\n{table(header, rows)}"
    )
    publish("faults_vs_peers", body, write=given.write)


if __name__ == "__main__":
    main()
