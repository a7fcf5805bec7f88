"""Searches and planned rows with FIDs that are chosen, not measured: no training, no Ray."""

import contextlib
import functools
import io
import shutil
import signal
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_spec import LearnedSpace, StudySpec
from search.worker.engine import given_weights

from bdense.metrics.metrics import FID
from search.analysis.confirmation import plan_confirmation
from search.cli import main
from search.spec.space import baseline_space, search_space
from search.storage.ledger import Claim, Ledger
from search.storage.schema import open_tables
from search.study.arms import SPACES, Arm, Planned, PlannedRow
from search.study.study import SPEC, Study
from tests.commands import Answer
from tests.studies import NORMALISED, spec

TEACHER_FID = 3.0
STUDENT = "student.safetensors"


def normalised(**keys: Any) -> StudySpec:
    """A search over a in [-0.5, 3]."""
    return spec(weights=NORMALISED, **keys)


def fid(value: float, *, nfe: int = 2, **seeds: int) -> dict[str, Any]:
    """As rows store it."""
    return FID(
        value=value,
        images=256,
        reference="digits",
        reference_images=1797,
        extractor="digits-classifier",
        extractor_sha256="0" * 64,
        nfe=nfe,
        seeds=seeds,
    ).as_dict()


def search(
    url: str,
    trials: Sequence[tuple[Mapping[str, Any], float]],
    *,
    study: StudySpec | None = None,
    plain: float = 12.0,
    uniform: float = 11.0,
) -> Study:
    """A search whose trials, parameters and FID, are complete, as are its baselines.

    One that exists is extended by those that it lacks.
    """
    study = study or normalised()
    budget = study.budget.model_copy(update={"trials": max(1, len(trials))})
    study = study.model_copy(update={"budget": budget})
    record = Study.create(url, study)
    assert record.baselines is not None
    while isinstance(claim := record.baselines.claim(baseline_space(), None), Claim):
        value = plain if claim.params["method"] == "sfd" else uniform
        _complete(record.baselines, claim, value, study, [1.0] * 4)
    for params, value in trials[record.trials.counts().complete :]:
        record.trials.enqueue(params)
        claim = record.trials.claim(search_space(study), RandomSampler)
        assert isinstance(claim, Claim)
        assert dict(claim.params) == params
        if isinstance(study.weights, LearnedSpace):
            _complete(record.trials, claim, value, study, [1.0] * 4, **params)
        else:
            weights = given_weights(params, study.student.substeps)
            values = weights(study.student.substeps).tolist()
            _complete(record.trials, claim, value, study, values, a=weights.a, b=weights.b)
    return record


def made_once(folder: Path, name: str, make: Callable[[str], object]) -> Path:
    """A storage's file that the first who asks for it makes; nobody else may write to it."""
    path = folder / f"{name}.db"
    if not path.exists():
        with pytest.MonkeyPatch.context() as patch:
            open_once(patch)
            make(f"sqlite:///{path}")
    return path


# Of six points a = 1.25 (trial 3) is the lowest, then a = 0.75 (trial 2).
VALLEY = [({"a": a}, 9.0 + (a - 1.1) ** 2) for a in (-0.5, 0.25, 0.75, 1.25, 2.0, 3.0)]


def searched_valley(folder: Path) -> Path:
    """The search of ``VALLEY``, complete."""
    return made_once(folder, "searched", lambda url: search(url, VALLEY))


def confirmed_valley(folder: Path) -> Path:
    """With its confirmation, at its own budget: of two candidates trial 2 is the better one."""

    def make(url: str) -> None:
        copy_storage(searched_valley(folder), folder / "confirmed.db")
        study = Study.open(url, "digits")
        planned = plan_confirmation(study, normalised(), kimg=2.56, seeds=3, count=2)
        finish(planned, lambda arm, row: 12.0 - row.arm + row.seed / 8)

    return made_once(folder, "confirmed", make)


def empty_storage(folder: Path) -> Path:
    """All tables and no study."""
    return made_once(folder, "empty", lambda url: Ledger.open(url, "none", budget=1).delete())


def open_once(patch: pytest.MonkeyPatch) -> None:
    """Let a test open each database but once, and never wait for the disk."""

    @functools.cache
    def quickly(url: str) -> RDBStorage:
        storage = open_tables(url)
        sa.event.listen(storage.engine, "connect", _do_not_sync)
        storage.engine.dispose()
        return storage

    patch.setattr("search.storage.ledger.open_tables", quickly)


def _do_not_sync(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")


def copy_storage(source: Path, target: Path) -> str:
    """A SQLite file that nobody writes to, with what is not in it yet; URL of the copy."""
    for end in ("", "-wal"):
        Path(f"{target}{end}").unlink(missing_ok=True)
        if Path(f"{source}{end}").exists():
            shutil.copyfile(f"{source}{end}", f"{target}{end}")
    return f"sqlite:///{target}"


def _complete(
    ledger: Ledger,
    claim: Claim,
    value: float,
    study: StudySpec,
    weights: list[float],
    **attrs: Any,
) -> None:
    seeds = study.seeds
    measured = fid(
        value, nfe=study.student.nfe, training=seeds.training, evaluation=seeds.evaluation
    )
    file = f"{ledger.study.study_name}/{claim.number:05d}/{STUDENT}"
    ledger.complete(claim, value, {"fid": measured, "weights": weights, "student": file, **attrs})


def finish(
    planned: Planned, value: Callable[[Arm, PlannedRow], float], *, most: int = 1000
) -> list[PlannedRow]:
    """Complete the rows that are left, or so many of them, with chosen FIDs; says which.

    A chain's FID is ``value`` at its last number of steps and 1 less at each one before.
    """
    attributes = planned.ledger.study.user_attrs
    done: list[PlannedRow] = []
    while len(done) < most:
        claim = planned.ledger.claim(SPACES[planned.kind], None)
        if not isinstance(claim, Claim):
            break
        row = PlannedRow.of(claim.params)
        arm, folder = planned.arms[row.arm], f"{planned.name}/{claim.number:05d}"
        last = value(arm, row)
        attrs: dict[str, Any] = {"arm": arm.name}
        if planned.kind == "retrain":
            assert row.nfe is not None
            measured = fid(last, nfe=row.nfe, training=row.seed, evaluation=row.seed)
            attrs |= {"fid": measured, "kimg": row.kimg, "student": f"{folder}/{STUDENT}"}
        else:
            chain = PromotionSpec.model_validate_json(attributes[SPEC]).chain
            fids = {}
            for steps in reversed(chain.steps[1:]):
                fids[steps] = fid(last, nfe=steps, training=row.seed, evaluation=0)
                last -= 1
            attrs |= {
                "fid": fids[chain.last],
                "fids": {str(n): fids[n] for n in sorted(fids, reverse=True)},
                "teacher_fid": fid(TEACHER_FID, nfe=chain.first, evaluation=0),
                "student": f"{folder}/{chain.last:05d}.safetensors",
            }
        planned.ledger.complete(claim, attrs["fid"]["value"], attrs)
        done.append(row)
    return done


def command(*arguments: object) -> Answer:
    """Run ``bdense-search`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as usage:
            status = int(usage.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
    return Answer(status, out.getvalue(), err.getvalue())


def refused(answer: Answer) -> str:
    """The one line of a mistake: exit status 2, nothing on stdout."""
    assert (answer.status, answer.out) == (2, ""), answer
    (line,) = answer.err.splitlines()
    assert line.startswith("bdense-search: ")
    return line.removeprefix("bdense-search: ")
