"""Studies with FIDs that are chosen, not measured: no training, no Ray."""

import functools
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage

from bdense.metrics.records import FID
from bdense.weights import space_of
from search.analysis.plans import PlannedArms, plan_confirmation, plan_given, transfer_arms
from search.cli import main
from search.spec.resolve import variant
from search.spec.space import search_space
from search.spec.study import StudySpec
from search.storage.engine import open_storage
from search.storage.ledger import Claim, Ledger
from search.storage.schema import open_tables
from search.study.arms import ROW_SPACE, Arm, ArmRow, baseline_arms
from search.study.results import TrialResult
from search.study.study import Study
from tests.commands import Answer, answered
from tests.commands import refused as refused
from tests.studies import NORMALISED, spec

TEACHER_FID = 3.0
STUDENT = "student.safetensors"
PLAIN_FID, UNIFORM_FID = 12.0, 11.0


def normalised(**keys: Any) -> StudySpec:
    """A search over a in [-0.5, 3]."""
    return spec(weights=NORMALISED, **keys)


def fid(value: float, *, nfe: int = 2, **seeds: int) -> dict[str, Any]:
    """As rows store it."""
    return FID(
        value=value,
        noise=0.2,
        effects=[0.5, -0.5],
        images=256,
        reference="digits",
        reference_images=1797,
        extractor="digits-classifier",
        extractor_sha256="0" * 64,
        nfe=nfe,
        seeds=seeds,
    ).as_dict()


def result(study: Study, ledger: Ledger, claim: Claim, value: float) -> TrialResult:
    """The result of a claimed row whose FID is ``value``.

    Of a method of several stages ``value`` is the last one's, and each one before has 1 less.
    """
    task = study.task(ledger, claim.params)
    own = study.spec
    changed = variant(own, dict(task.variant))
    stages, branches = changed.resolved.stages, changed.resolved.num_branches
    space = space_of(task.params, own.space if own.is_search else None)
    seeds = {"training": task.seed, "evaluation": task.latents}
    fids = {
        str(stage.nfe): FID.read(fid(value - after, nfe=stage.nfe, **seeds))
        for stage, after in zip(stages, reversed(range(len(stages))), strict=True)
    }
    several = len(stages) > 1
    file = f"{stages[-1].name}.safetensors" if several else STUDENT
    first = changed.method.options.get("steps")
    return TrialResult(
        value=value,
        fingerprint=own.fingerprint(),
        seeds=seeds,
        versions={},
        device="a CPU",
        worker="host:1",
        timings={},
        weights=space.weighting(task.params, branches).weights().tolist(),
        parameters={} if "baseline" in task.params else space.stored(task.params, branches),
        fid=fids[str(stages[-1].nfe)],
        fids=fids if several else {},
        teacher_fid=FID.read(fid(TEACHER_FID, nfe=first, evaluation=task.latents))
        if first
        else None,
        student=f"{ledger.study.study_name}/{claim.number:05d}/{file}",
        arm=task.arm,
        variant=dict(task.variant),
    )


def complete(study: Study, ledger: Ledger, claim: Claim, value: float) -> None:
    """Finish a claimed row with a chosen FID."""
    ledger.complete(claim, value, result(study, ledger, claim, value).attrs())


def created(url: str, study: StudySpec) -> Study:
    """The study as a launch makes it, its given arms planned."""
    return Study.create(url, study) if study.is_search else plan_given(url, study)


def plan_transfer(study: Study, to: StudySpec, *, top: int, seeds: int) -> Study:
    """Top weights under another study's conditions, planned."""
    return transfer_arms(study, to, top=top, seeds=seeds).store(study.url)


def plan_promotion(
    url: str,
    of: StudySpec,
    arm: Arm,
    *,
    seeds: Sequence[int],
    search: str | None = "digits",
    variants: Any = ({},),
) -> Study:
    """Promoted weights, planned."""
    arms = [*baseline_arms(of), arm]
    return PlannedArms(spec=of, arms=arms, seeds=seeds, variants=variants, of=search).store(url)


def finish(
    study: Study, value: Callable[[Arm, ArmRow], float], *, most: int = 1000
) -> list[ArmRow]:
    """Complete the rows of given arms that are left, or so many of them; says which."""
    assert study.given is not None
    done: list[ArmRow] = []
    while len(done) < most:
        claim = study.given.claim(ROW_SPACE, None)
        if not isinstance(claim, Claim):
            break
        row = ArmRow(**claim.params)
        complete(study, study.given, claim, value(study.arms[row.arm], row))
        done.append(row)
    return done


def statements(study: Study, call: Callable[[], object]) -> int:
    """How many statements a call sends to the study's database."""
    engine, sent = study.main.storage.engine, list[object]()

    def note(*asked: object) -> None:
        sent.append(asked[2])

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        call()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    return len(sent)


def search(
    url: str,
    trials: Sequence[tuple[Mapping[str, Any], float]],
    *,
    study: StudySpec | None = None,
    plain: float = PLAIN_FID,
    uniform: float = UNIFORM_FID,
) -> Study:
    """A search whose trials, parameters and FID, are complete, as are its baselines.

    One that exists is extended by those that it lacks.
    """
    study = study or normalised()
    plan = replace(study.search, trials=max(1, len(trials)))
    study = replace(study, plan=plan)
    record = Study.create(url, study)
    finish(record, lambda arm, _: plain if arm.baseline == "plain" else uniform)
    for params, value in trials[record.search.counts().complete :]:
        record.search.enqueue(params)
        claim = record.search.claim(search_space(study), RandomSampler)
        assert isinstance(claim, Claim)
        assert dict(claim.params) == dict(params)
        complete(record, record.search, claim, value)
    return record


def made_once(folder: Path, name: str, make: Callable[[str], object]) -> Path:
    """A read-only storage's file, made at the first call."""
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
        planned = plan_confirmation(study, method={}, seeds=3, count=2)
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


def open_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Let ledgers trust the tables that they find, and never wait for the disk."""

    def quickly(url: str) -> RDBStorage:
        storage = open_storage(url, skip_compatibility_check=True)
        if storage.engine.dialect.name == "sqlite":
            sa.event.listen(storage.engine, "connect", _do_not_sync)
        return storage

    patch.setattr("search.storage.ledger.open_tables", quickly)


def _do_not_sync(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")


def copy_storage(source: Path, target: Path) -> str:
    """Copy a SQLite file without writers, with its log; URL of the copy."""
    for end in ("", "-wal"):
        Path(f"{target}{end}").unlink(missing_ok=True)
        if Path(f"{source}{end}").exists():
            shutil.copyfile(f"{source}{end}", f"{target}{end}")
    return f"sqlite:///{target}"


def command(*arguments: object) -> Answer:
    """Run ``bdense-search`` in this process."""
    return answered(main, *arguments)
