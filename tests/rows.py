"""One row of a small real study in this process: no Ray, and a database only where asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from search.spec.study import StudySpec
from search.study.arms import Task
from search.study.results import TrialResult
from search.study.trial_log import TrialLog
from search.worker.assets import Assets, load
from search.worker.evaluate import evaluate
from search.worker.trainer import Attempt
from tests.studies import NORMALISED, PROMOTION, STUDY, changed, spec

CPU = torch.device("cpu")
# Four updates of 32 digits, by a teacher of as many; trajectories computed live.
SFD: dict[str, Any] = changed(
    STUDY,
    teacher__train__kimg=0.128,
    teacher__train__batch=32,
    method__kimg=0.128,
    method__batch=32,
    weights=NORMALISED,
    trajectories={"mode": "live"},
    resources={"gpus": 0},
)
# 8 -> 4 -> 2 steps, five updates each.
PD: dict[str, Any] = changed(
    PROMOTION,
    teacher__train__kimg=0.128,
    teacher__train__batch=32,
    method__updates=5,
    method__batch=32,
    evaluation__images=64,
    evaluation__batch=32,
    weights=NORMALISED,
    plan={"trials": 2, "replicates": 1},
    resources={"gpus": 0, "checkpoint_seconds": 1e-9},
)
CONSISTENCY: dict[str, Any] = changed(
    SFD,
    method={"name": "consistency", "steps": 4, "substeps": 2, "kimg": 0.128, "batch": 32},
    resources={"gpus": 0, "checkpoint_seconds": 1e-9},
)
SLOPE = {"a": 1.0}


class InterruptedRunError(Exception):
    """Ends a row's work from outside."""


def interrupted_after(checks: int) -> Callable[[], None]:
    """A ``check`` that ends the work once it was asked so often."""
    left = iter(range(checks))

    def check() -> None:
        if next(left, None) is None:
            raise InterruptedRunError

    return check


def loaded(tree: dict[str, Any], /, **keys: Any) -> Assets:
    """What the rows of that study share."""
    study: StudySpec = spec(tree, **keys)
    return load(study, CPU)


def task(params: dict[str, Any] = SLOPE, **fields: Any) -> Task:
    """Under seed 0, judged on the latents of seed 0."""
    return Task(**{"params": params, "seed": 0, "latents": 0} | fields)


@dataclass
class FakeJudge:
    """Records intermediate FIDs, and ends the row at given ones."""

    prunes: bool = True
    ends_at: tuple[int, ...] = ()
    told: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, step: int, fid: float) -> bool:
        self.told.append((step, fid))
        return step in self.ends_at


def run(
    assets: Assets,
    folder: Path,
    of: Task | None = None,
    *,
    check: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda _: None,
    judge: FakeJudge | None = None,
) -> TrialResult:
    """Work on a row."""
    attempt = Attempt(
        task=of or task(),
        folder=folder,
        check=check,
        report=report,
        judge=judge or FakeJudge(prunes=False),
        log=TrialLog(folder),
    )
    return evaluate(assets, attempt)


def comparable(result: TrialResult) -> TrialResult:
    """Without what tells where and how fast it was made."""
    plot = {} if result.weights_plot is None else {"weights_plot": ""}
    return replace(result, timings={}, worker="", student="", **plot)
