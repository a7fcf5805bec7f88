"""Rows that are runs of a program of the user's; see docs/any-trainer.md. Imports no torch.

A row's folder holds what the program is given and what it writes. ``FOLDER`` in it is the
program's own: its checkpoint stays there when another worker takes the row over.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bdense.errors import BdenseError, NonFiniteError
from bdense.files import write_json
from bdense.knobs import is_number
from search.errors import LeaseLostError, SpecChangedError, UnpreparedError
from search.spec.command import command_line, require_runnable
from search.spec.contents import fingerprint_of
from search.spec.program import CommandWorkload
from search.spec.study import StudySpec
from search.study.arms import Task
from search.study.folders import PROGRAM_FOLDER
from search.study.results import Score, TrialResult
from search.study.study import Study
from search.worker import guard
from search.worker.guard import ERR_FILE, GIVEN_FILE, METRIC_FILE, VALUES_FILE, Order, Outcome
from search.worker.judge import PrunedError
from search.worker.result import provenance, stored_or_made
from search.worker.trainer import Attempt, Preparation, Report

POLL_SECONDS = 0.1
_SHELL_ADDS = 128  # to the number of a signal that ended a command
_LAST_LINES, _LAST_CHARACTERS = 10, 1500
_MOST_METRIC_BYTES, _MOST_LINE_BYTES = 2**20, 2**16
# What opens the study's database or Ray's cluster is not for the program.
_KEPT_BACK = (
    "BDENSE_STORAGE",
    "PGPASSWORD",
    "PGPASSFILE",
    "PGSERVICEFILE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
)


class ProgramError(BdenseError):
    """The program failed, or wrote no usable metric."""


class ProgramDiedError(Exception):
    """The program died early by itself; it is tried again from its checkpoint."""


@dataclass(frozen=True, eq=False)
class Command:
    """See ``search.worker.trainer.Trainer``."""

    spec: StudySpec
    conditions: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the files that the worker found as it started."""
        return fingerprint_of(self.conditions)

    @classmethod
    def prepare(cls, study: Study, together: int, report: Report) -> Iterator[Preparation]:
        cls.open(study, study.spec)
        yield from ()

    @classmethod
    def open(cls, study: Study, spec: StudySpec) -> Self:
        workload = CommandWorkload(spec)
        require_runnable(workload.config, workload.space.distributions())
        return cls(spec, spec.conditions())

    @classmethod
    def cost_lines(cls, spec: StudySpec, workers: int | None) -> list[str]:
        run = command_line(CommandWorkload(spec).config)
        return [f"rows: {spec.plan.num_rows(spec)}, each a run of {run}"]

    @classmethod
    def fetch(cls, spec: StudySpec) -> Iterator[str]:
        """Nothing: a program sees to its own downloads."""
        yield from ()

    def ready(self, task: Task) -> None:
        pass

    def run(self, attempt: Attempt) -> TrialResult:
        def make() -> TrialResult:
            row = _Row(self, attempt)
            self._require_same_files()
            try:
                return row.run()
            finally:  # also where it failed: the change may be why
                self._require_same_files()

        return stored_or_made(attempt, self.fingerprint, make)

    def _require_same_files(self) -> None:
        """Refuse to measure a program that was edited since the worker started."""
        try:
            now = self.spec.conditions()
        except OSError as error:
            raise SpecChangedError(
                f"study {self.spec.name!r}: {error.filename} cannot be read any more "
                f"({error.strerror}); restore it and launch again"
            ) from error
        both = self.conditions.keys() | now.keys()
        changed = [key for key in sorted(both) if self.conditions.get(key) != now.get(key)]
        if changed:
            raise SpecChangedError(
                f"study {self.spec.name!r}: the program's files were edited while it ran "
                f"({', '.join(changed)}), so its numbers would not compare; restore the files, or "
                "rename the study, and launch again"
            )


@dataclass(eq=False)
class _Row:
    """One run of the program."""

    trainer: Command
    attempt: Attempt

    def __post_init__(self) -> None:
        spec, attempt = self.trainer.spec, self.attempt
        self.task, self.folder, self.log = attempt.task, attempt.folder.resolve(), attempt.log
        workload = CommandWorkload(spec)
        self.config = CommandWorkload(workload.variant(self.task.variant)).config
        self.values = _Values(self.folder / VALUES_FILE)
        self.weights = workload.space.values(self.task.params)

    def run(self) -> TrialResult:
        """Start the program and follow it to its end."""
        started, score = time.perf_counter(), None
        reason: str | None = None
        (self.folder / PROGRAM_FOLDER).mkdir(parents=True, exist_ok=True)
        try:
            with _Program(self._order(), self._environment()) as program:
                outcome = self._followed(program)
            score = self._score(outcome)
        except PrunedError as error:
            reason = error.reason
        return TrialResult(
            value=None if score is None else score.value,
            score=score,
            parameters=self.weights,
            arm=self.task.arm,
            variant=dict(self.task.variant),
            reason=reason,
            timings={"student_seconds": round(time.perf_counter() - started, 3)},
            **provenance(self.trainer.fingerprint, self._seeds, _device()),
        )

    def _followed(self, program: "_Program") -> Outcome:
        """Follow the program to its end. On a stop it saves first, unless the lease is lost."""
        self.log("started", program=self.config.words(self._named))
        self.attempt.report("running")
        try:
            while (outcome := program.ended(POLL_SECONDS)) is None:
                for step, value in self._new_values():
                    if self.attempt.judge(step, value):
                        pruner, metric = self.trainer.spec.search.pruner, self.config.metric
                        raise PrunedError(f"{pruner}: {metric} {value:.4g} at step {step}")
                self.attempt.check()
        except (LeaseLostError, ProgramDiedError):
            # Another worker's program may need the folder at any moment, or this one is gone.
            raise
        except Exception:
            self._end(program)
            raise
        # It has been trained to its end: nothing is left to prune.
        for step, value in self._new_values():
            self.attempt.judge.store(step, value)
        return outcome

    def _end(self, program: "_Program") -> None:
        """Ask the program to save and end, and wait until it has."""
        program.ask()
        while (outcome := program.ended(POLL_SECONDS)) is None:
            try:
                self.attempt.check()
            except LeaseLostError:
                raise
            except Exception:  # noqa: BLE001  why it is ended
                pass
        named = f"SIG{self.config.checkpoint_on}"
        if outcome.hindered:
            return
        if outcome.killed:
            self.log("killed", why=f"it ignored {named} for {self.config.grace_seconds:g} s")
        else:
            self.log("checkpoint", after=named, status=outcome.status)

    def _new_values(self) -> Iterator[tuple[int, float]]:
        for step, value in self.values.new():
            self.attempt.report(f"step {step}, {self.config.metric} {value:.4g}")
            if not math.isfinite(value):
                raise NonFiniteError(f"{self.config.metric} is {value} at step {step}")
            yield step, value

    def _score(self, outcome: Outcome) -> Score:
        """The score that the program wrote.

        Raises:
            ProgramError: It failed, or wrote no metric, or another form.
            NonFiniteError: The metric is not finite.
            ProgramDiedError: A signal ended it, or it saved and ended before its metric.
            UnpreparedError: The folder cannot be locked.
        """
        said = _last_lines(outcome.last_words)
        if outcome.children:
            self.log("children", why="the program left children behind, which were killed")
        name = " ".join(self.config.run[:2])
        if outcome.hindered == "lock":
            raise UnpreparedError(f"{said}; put the runs on a file system that has locks")
        if outcome.hindered == "asked":
            raise ProgramDiedError(f"a signal ended the guard of {name} before it was started")
        if outcome.status is None:
            raise ProgramError(f"{name} cannot be started: {said}")
        where = self.folder / ERR_FILE
        if (number := _signal_of(outcome.status)) is not None:
            hint = ", perhaps for want of memory" if number is signal.SIGKILL else ""
            if outcome.killed:
                hint = f" after it ignored SIG{self.config.checkpoint_on}, sent to its guard"
            raise ProgramDiedError(
                f"{name} was ended by {number.name}{hint}; the end of {where}: {said or 'nothing'}"
            )
        if outcome.status > 0:
            raise ProgramError(
                f"{name} ended with exit status {outcome.status}; the end of {where}: "
                f"{said or 'nothing'}"
            )
        return self._read_score()

    def _read_score(self) -> Score:
        path, metric = self.folder / METRIC_FILE, self.config.metric
        if not path.exists():
            # What keeps a checkpoint may have been asked to save by someone else.
            kept = any((self.folder / PROGRAM_FOLDER).iterdir())
            raise (ProgramDiedError if kept else ProgramError)(
                f"the program ended without a metric; it must write {{{metric!r}: NUMBER}} as "
                "JSON to the file that BDENSE_RESULT names"
            )
        _require_file(path)
        try:
            with path.open("rb") as file:
                found = json.loads(file.read(_MOST_METRIC_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise ProgramError(f"{path} is not JSON ({error}); write a mapping") from error
        if not isinstance(found, dict) or not is_number(found.get(metric)):
            shown = json.dumps(found)[:100]
            raise ProgramError(f"{path} must be a mapping with a number {metric!r}, got {shown}")
        value = _as_float(found.pop(metric))
        if not math.isfinite(value):
            raise NonFiniteError(f"the program wrote {metric} {value}")
        others = {
            str(name): number
            for name, each in found.items()
            if is_number(each) and math.isfinite(number := _as_float(each))
        }
        return Score(value=value, metric=metric, seeds=self._seeds, others=others)

    @property
    def _seeds(self) -> dict[str, int]:
        return {"training": self.task.seed, "evaluation": self.task.latents}

    @property
    def _named(self) -> Mapping[str, object]:
        """Values of the words in braces."""
        folder, result = self.folder / PROGRAM_FOLDER, self.folder / METRIC_FILE
        return {**self.weights, "seed": self.task.seed, "folder": folder, "result": result}

    def _order(self) -> Order:
        config = self.config
        return Order(
            words=[config.program(), *config.words(self._named)[1:]],
            cwd=str(config.cwd),
            signal=config.checkpoint_on,
            grace_seconds=config.grace_seconds,
            folder=str(self.folder),
            most_bytes=round(config.log_mib * 2**20),
        )

    def _environment(self) -> dict[str, str]:
        """The worker's environment with the program's inputs, which are written to a file too.

        The guard adds the name of that file.
        """
        folder, task = self.folder, self.task
        given: dict[str, Any] = {
            "study": self.trainer.spec.name,
            "arm": task.arm,
            "params": self.weights,
            "seed": task.seed,
            "evaluation_seed": task.latents,
            "folder": str(folder / PROGRAM_FOLDER),
            "result": str(folder / METRIC_FILE),
            "values": str(folder / VALUES_FILE),
        }
        write_json(folder / GIVEN_FILE, given, indent=1)
        kept_back = (*_KEPT_BACK, guard.MARK)
        kept = {name: value for name, value in os.environ.items() if name not in kept_back}
        return kept | {
            "BDENSE_PARAMS": json.dumps(self.weights),
            "BDENSE_SEED": str(task.seed),
            "BDENSE_FOLDER": given["folder"],
            "BDENSE_RESULT": given["result"],
            "BDENSE_VALUES": given["values"],
            "OMP_NUM_THREADS": str(self.trainer.spec.resources.threads),
        }


class _Program:
    """A program under its guard; leaving the block kills it if it still runs."""

    def __init__(self, order: Order, environment: Mapping[str, str]) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, json.dumps(dataclasses.asdict(order))],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the worker
        )
        self._is_over = False
        self._selector = selectors.DefaultSelector()
        assert self._guard.stdout is not None
        self._selector.register(self._guard.stdout, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        if not self._is_over:
            self._guard.communicate(guard.KILL)

    def ended(self, seconds: float) -> Outcome | None:
        """How the program ended; None if it still runs after that time."""
        if not self._selector.select(seconds):
            return None
        said, _ = self._guard.communicate()
        self._is_over = True
        if not said:
            raise ProgramDiedError("the program's guard was killed, and the program with it")
        return Outcome(**json.loads(said))

    def ask(self) -> None:
        """Ask the program to save and end; after the grace it is killed."""
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just ended
            self._guard.stdin.write(guard.ASK)
            self._guard.stdin.flush()


class _Values:
    """Intermediate values that a program appends to a file: a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> Iterator[tuple[int, float]]:
        """Steps and values since the last call; a program that goes on repeats some.

        Raises:
            ProgramError: A line has another form.
        """
        if not self._path.exists():
            return
        _require_file(self._path)
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0  # a program that was started again wrote it anew
            file.seek(self._offset)
            while (line := file.readline(_MOST_LINE_BYTES)).endswith(b"\n"):
                self._offset += len(line)
                if line.strip():
                    yield self._read(line.strip())
        if len(line) == _MOST_LINE_BYTES:
            raise self._wrong_form(line)

    def _read(self, line: bytes) -> tuple[int, float]:
        try:
            found: Any = json.loads(line)
            step, value = found["step"], found["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            step = value = None
        if type(step) is not int or step < 0 or not is_number(value):
            raise self._wrong_form(line)
        return step, _as_float(value)

    def _wrong_form(self, line: bytes) -> ProgramError:
        shown = line[:100].decode(errors="replace")
        return ProgramError(
            f'{self._path} must have lines as {{"step": 1, "value": 0.5}}, got {shown}'
        )


def _signal_of(status: int) -> signal.Signals | None:
    """The signal that ended a program, or a shell's last command; None if none did."""
    number = -status if status < 0 else status - _SHELL_ADDS
    return signal.Signals(number) if number in set(signal.Signals) else None


def _require_file(path: Path) -> None:
    """Refuse anything but a regular file: reading a pipe would block."""
    if not path.is_file():
        raise ProgramError(f"{path} is not a regular file; write one, and rename it into place")


def _as_float(value: float) -> float:
    """As a float; a whole number beyond its range becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:])[-_LAST_CHARACTERS:]


def _device() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"{platform.machine()} CPU" if not visible else f"GPU {visible}"
