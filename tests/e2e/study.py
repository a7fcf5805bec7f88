"""A study small enough for tests: real digits, real Ray, real torch, seconds a trial."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import FrozenTrial

from search.analysis.plans import plan_given
from search.errors import UnknownStudyError
from search.storage.engine import resolve_storage_url
from search.storage.leases import RunningRow
from search.storage.ledger import Ledger
from search.study.study import Study
from search.worker.ray_tasks import WorkerConfig, slot
from tests.commands import Answer
from tests.measured import command, refused
from tests.studies import resolve_here, spec

SMALL: dict[str, Any] = {
    "name": "small",
    "data": "digits",
    "teacher": {
        "train": {
            "network": {
                "model_channels": 8,
                "channel_mult": [1, 2],
                "num_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "kimg": 0.256,
            "batch": 64,
            "ema_halflife_kimg": 0.1,
        }
    },
    "method": {"name": "sfd", "nfe": 2, "substeps": 4, "kimg": 2.56, "batch": 64, "lr": 5e-4},
    "weights": {"name": "normalised", "a": {"low": -0.5, "high": 3.0}},
    "plan": {"trials": 3, "replicates": 1},
    "evaluation": {"images": 64, "batch": 64, "extractor": "digits-classifier"},
    "resources": {"checkpoint_seconds": 0.2, "lease_seconds": 10},
}


def small_study(**sections: Any) -> dict[str, Any]:
    """``SMALL`` with some sections updated."""
    study = json.loads(json.dumps(SMALL))
    for name, value in sections.items():
        if isinstance(value, dict) and value.get("name") in (
            None,
            study.get(name, {}).get("name"),
        ):
            study[name] = study.get(name, {}) | value
        else:
            study[name] = value
    return study


@dataclass
class Workplace:
    """A folder to run the command in, as a user would; teacher and features are shared."""

    folder: Path
    cache: Path
    storage: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    _watched: dict[str, Ledger] = field(default_factory=dict, repr=False)

    def write(self, study: dict[str, Any]) -> Path:
        path = self.folder / f"{study['name']}.yaml"
        path.write_text(yaml.safe_dump(study))
        return path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def url(self) -> str:
        return resolve_storage_url(self.storage or f"sqlite:///{self.runs}/bdense.db")

    @property
    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BDENSE_", "RAY_"))}
        # Beside other tests, workers that make way for them would starve.
        mine = {"BDENSE_CACHE": str(self.cache), "RAY_worker_niceness": "0", **self.extra}
        if self.storage is not None:
            mine["BDENSE_STORAGE"] = self.storage
        return clean | mine

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "search", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str | Path, timeout: float = 1800) -> subprocess.CompletedProcess:
        with self.start(*arguments) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def command(self, *arguments: str | Path) -> Answer:
        """What the command answers in this process, which has loaded torch anyway."""
        with contextlib.chdir(self.folder), self.patched() as patch:
            resolve_here(patch)
            return command(*arguments)

    def done(self, *arguments: str | Path) -> str:
        """What a command printed that succeeds."""
        answer = self.command(*arguments)
        assert answer.status == 0, answer.err
        return answer.out

    def refused(self, *arguments: str | Path) -> str:
        """The one line of a mistake."""
        return refused(self.command(*arguments))

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        return json.loads(self.done(*arguments, "--json"))

    def ran(self, *arguments: str | Path) -> str:
        """What a process printed that works on a study to its end."""
        answer = self.run(*arguments)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    @contextlib.contextmanager
    def patched(self) -> Iterator[pytest.MonkeyPatch]:
        """The user's environment in this process."""
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - self.environment.keys():
                patch.delenv(name)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield patch

    def work(self, tree: dict[str, Any], points: Sequence[dict[str, float]] = ()) -> Study:
        """Bring a study to its end in this process, without Ray."""
        with self.patched() as patch:
            patch.setenv("BDENSE_RUNS", str(self.runs))
            asked = spec(tree)
            make = Study.create if asked.is_search else plan_given
            study = make(self.url, asked)
            for point in points:
                study.search.enqueue(point)
            worker = WorkerConfig(
                study=study.name, storage=study.url, runs=str(self.runs), cache=str(self.cache)
            )
            assert slot({"worker": worker, "mark": str(self.folder / "mark")}) == {"error": None}
        return study

    def ledger(self, name: str) -> Ledger:
        return Ledger.open(self.url, name, budget=None)

    def rows(self, name: str) -> list[FrozenTrial]:
        """Complete rows, and no others."""
        trials = self.ledger(name).study.get_trials(deepcopy=False)
        assert {trial.state.name for trial in trials} == {"COMPLETE"}
        return trials

    def fids(self, name: str = "small") -> dict[float, float]:
        """Of a search: by a, each once."""
        trials = self.rows(name)
        found = {trial.params["a"]: trial.value for trial in trials}
        assert len(found) == len(trials), "a parameter twice"
        return found

    def _running(self, name: str) -> Sequence[RunningRow]:
        """None where there is no such study yet."""
        if self.storage is None and not (self.runs / "bdense.db").exists():
            return ()
        with contextlib.suppress(UnknownStudyError):
            # Asked again and again, and opening one costs more than a look.
            if name not in self._watched:
                self._watched[name] = self.ledger(name)
            return self._watched[name].running()
        return ()

    def worker_at(self, progress: str, *names: str, row: int | None = None) -> tuple[int, int]:
        """Process and row of a worker whose progress begins so, once there is one."""

        def found() -> tuple[int, int] | None:
            for each in [each for name in names for each in self._running(name)]:
                # One that was given back keeps its progress and has no owner.
                is_there = each.worker and each.progress.startswith(progress)
                if is_there and row in (None, each.number):
                    return int(each.worker.rpartition(":")[2]), each.number
            return None

        return wait_until(found, what=f"a row at {progress!r}")


def wait_until(condition: Callable[[], Any], *, seconds: float = 900, what: str = "") -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.1)
    return answer


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
