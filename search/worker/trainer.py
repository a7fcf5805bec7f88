"""The seam between a worker and what trains its rows: a distillation, or a program of the user's.

A worker claims rows, holds their leases and stores their results, and knows of neither.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from search.spec.distillation import DistillationWorkload
from search.spec.program import CommandWorkload
from search.spec.study import StudySpec
from search.spec.workload import Workload
from search.study.arms import Task
from search.study.results import TrialResult
from search.study.study import Study
from search.study.trial_log import TrialLog
from search.worker.judge import Judge

_TRAINERS: Mapping[type[Workload], str] = {
    DistillationWorkload: "search.worker.distillation:Distillation",
    CommandWorkload: "search.worker.command:Command",
}


class Step(StrEnum):
    """A step of the preparations, as the launch shows it."""

    WAITING = "waiting for a free worker"
    FEATURES = "feature extractor"
    PROMPTS = "embedding prompts"
    DATA = "encoding the data set"
    LOADING = "loading the teacher"
    TEACHER = "training the teacher"
    TEACHER_FID = "measuring the teacher"
    TRAJECTORIES = "recording trajectories"


# Called with the step, how much of it is done, of how much, and a remark.
Report = Callable[[Step, int, int, str], None]


@dataclass(frozen=True, slots=True)
class Preparation:
    """A preparing task's message to the launcher: ``done`` of ``total`` of a step."""

    step: Step
    done: int
    total: int
    remark: str = ""

    @property
    def counted(self) -> str:
        """The step, and how much of it is done."""
        return f"{self.step} {self.done}/{self.total}" if self.total > 1 else self.step

    @property
    def text(self) -> str:
        """For people."""
        return self.counted + (f", {self.remark}" if self.remark else "")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One worker's attempt at a row.

    Attributes:
        task: The row's weights and seeds.
        folder: Where checkpoints, models and the result go.
        check: Called every now and then; an error of its ends the work, after a checkpoint.
        report: Called with a short text on the progress.
        judge: Gets intermediate values and may end the row.
        log: The row's log.
    """

    task: Task
    folder: Path
    check: Callable[[], None]
    report: Callable[[str], None]
    judge: Judge
    log: TrialLog


class Trainer(Protocol):
    """What trains and measures the rows of one study, in one worker."""

    @classmethod
    def prepare(cls, study: Study, together: int, report: Report) -> Iterator[Preparation]:
        """Make what the rows share, once for all workers, and check that this machine can.

        Args:
            together: Rows at once on one machine.
            report: Called with the progress, from inside a step.

        Raises:
            InputError: This machine lacks something.
        """

    @classmethod
    def open(cls, study: Study, spec: StudySpec) -> "Trainer":
        """Load what the rows of the study share, under that spec of it.

        Raises:
            InputError: This machine lacks something, or has it otherwise than the study.
        """

    @classmethod
    def cost_lines(cls, spec: StudySpec, workers: int | None) -> list[str]:
        """What a resolved study would cost with so many rows at once, in lines for people."""

    @classmethod
    def fetch(cls, spec: StudySpec) -> Iterator[str]:
        """Download what the rows need, as far as missing; a line for each part.

        Raises:
            InputError: Something cannot be downloaded; says where to put it by hand.
        """

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the conditions under which this process measures."""

    def ready(self, task: Task) -> None:
        """Make what this row needs and other rows may use, while its lease is held.

        Raises:
            UnpreparedError: This machine cannot.
        """

    def run(self, attempt: Attempt) -> TrialResult:
        """Train and measure a row, or go on where an earlier attempt's checkpoint ends.

        Returns:
            The result; read from the folder if an earlier attempt wrote it.

        Raises:
            NonFiniteError: It diverged.
            BdenseError: It failed, and would fail again.
        """


def trainer_of(spec: StudySpec) -> type[Trainer]:
    """What trains a study's rows; only what distils imports torch."""
    found: type[Trainer] = pkgutil.resolve_name(_TRAINERS[type(spec.workload)])
    return found
