"""One trial: branch weights -> student -> FID; what goes wrong becomes a named state.

A trial's folder holds its checkpoint, then pictures, the student and ``result.json``. The result
is written before it is told, so that whoever takes over a finished trial only tells.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import BdenseError, NonFiniteError, StoppedError, is_out_of_memory
from bdense.methods.sfd import SFDStage
from bdense.metrics.metrics import FID
from bdense.models.cards import write_card
from bdense.models.store import save_denoiser
from bdense.training.loop import IterationReport, train
from bdense.weights.weighting import FixedWeights
from search.errors import LeaseLostError, StorageError, UnpreparedError
from search.log import speaking_of
from search.report.live import attach_pictures
from search.storage.disk import disk_error, is_full_disk
from search.storage.engine import redact
from search.storage.ledger import Claim, FailureReason, Holding, Ledger
from search.study.folders import GRID, WEIGHTS_PLOT, row_folder
from search.study.progress_text import evaluating, training
from search.study.retention import CHECKPOINT, STUDENT, drop_checkpoints
from search.study.trial_log import Note, TrialLog, is_noted, shortened, unnoted
from search.worker.assets import Assets
from search.worker.engine import branches_and_weights, student_sampler, training_config
from search.worker.evaluation import measure
from search.worker.pruning import Judge, OnTheWay, PrunedError
from search.worker.result import (
    below_runs,
    package_versions,
    provenance,
    read_result,
    take_folder,
    write_result,
)
from search.worker.traced_weights import TracedWeights, draw_history

_log = logging.getLogger(__name__)


def bring_to_an_end(
    ledger: Ledger,
    claim: Claim,
    work: Callable[[Holding, Path, TrialLog], dict[str, Any]],
    *,
    fingerprint: str,
    asked: float,
) -> None:
    """Do a claimed row's work and tell its result, or why there is none, or give it back.

    Args:
        ledger: The study's.
        claim: What is worked on.
        work: From the held lease, the row's folder and its log to ``value``, the FID, and
            ``attrs``, what the row stores.
        fingerprint: Of the conditions.
        asked: ``time.perf_counter()`` when the claim was asked for.

    Raises:
        LeaseLostError: Another worker took it over; nothing was told.
        StorageError: The database stayed away; the trial is taken over once it is back.
        StoppedError: Somebody asked it to end; the trial was given back.
        UnpreparedError: This machine cannot work on it; the trial was given back.
    """
    study = ledger.study.study_name
    with speaking_of(study=study, trial=claim.number, attempt=claim.attempt):
        log = TrialLog(row_folder(study, claim.number))
        before = {"from_attempt": claim.attempt - 1} if claim.adopted else {}
        log("adopted" if before else "claimed", params=dict(claim.params), **before)
        try:
            _bring(ledger, claim, work, log, fingerprint=fingerprint, asked=asked)
        finally:
            log.open()  # where it ended before anybody looked at the folder


def _bring(
    ledger: Ledger,
    claim: Claim,
    work: Callable[[Holding, Path, TrialLog], dict[str, Any]],
    log: TrialLog,
    *,
    fingerprint: str,
    asked: float,
) -> None:
    folder = row_folder(ledger.study.study_name, claim.number)

    def fail(reason: FailureReason, detail: str) -> None:
        _fail(ledger, claim, fingerprint, reason, detail)
        log("failed", level=logging.WARNING, reason=reason, error=redact(detail))
        drop_checkpoints(folder)

    try:
        with ledger.holding(claim) as holding:
            result = work(holding, folder, log)
        attrs = result["attrs"] | {"tries": claim.tries}
        attrs["timings"]["service_seconds"] = _service_seconds(asked, result)
        # Now: a finished trial takes no more of them.
        with ledger.holding(claim):
            attach_pictures(ledger, claim, folder, result["value"], attrs)
        if result["value"] is None:
            ledger.prune(claim, attrs)
            log("pruned", reason=attrs["reason"])
        else:
            ledger.complete(claim, result["value"], attrs)
            log("complete", fid=result["value"])
    except StoppedError:
        ledger.release(claim, interrupted=True)
        log("released", why="stopped")
        raise
    except (LeaseLostError, StorageError) as error:
        # Not the trial's fault; its result lies in its folder for whoever takes it over.
        log("lost", level=logging.WARNING, error=str(error))
        raise
    except UnpreparedError as error:
        ledger.release(claim, interrupted=True)
        log("released", level=logging.WARNING, why=redact(str(error)))
        raise
    except NonFiniteError as error:
        fail("diverged", str(error))
    except BdenseError as error:
        fail("error", str(error))
    except Exception as error:
        if is_out_of_memory(error):
            # The same anywhere, and the memory is free again.
            what = "\n".join(str(error).splitlines()[:1])
            fail("out of memory", f"{what}; use a smaller batch or give trials more memory")
            return
        if (refusal := disk_error(error)) is not None:
            # Nor the trial's fault; any other row would fail for it too.
            ledger.release(claim, interrupted=True)
            why = "disk full" if is_full_disk(error) else "no access"
            log("released", level=logging.WARNING, why=why)
            raise refusal from error
        _log.exception("trial %d, attempt %d", claim.number, claim.attempt)
        if claim.tries < ledger.max_attempts:
            ledger.release(claim)
            why = redact(f"{type(error).__name__}: {error}")
            log("released", level=logging.WARNING, why=why)
        else:
            fail("error", f"{type(error).__name__}: {error}")


def train_and_measure(
    assets: Assets,
    params: Mapping[str, Any],
    folder: Path,
    *,
    check: Callable[[], None],
    report: Callable[[str], None],
    judge: Judge | None = None,
    log: TrialLog | None = None,
) -> dict[str, Any]:
    """Train a student with these parameters and measure its FID.

    Args:
        assets: What the study's trials share.
        params: A trial's a (and b), its rule and strength, or a baseline's method.
        folder: Where the checkpoint, the student and the result go.
        check: Called every iteration and for every batch of images drawn or judged; what it raises
            ends the work.
        report: Called with a short text on the progress.
        judge: Told the FIDs on the way, and asked whether to end there; None looks at none.
        log: The row's.

    Returns:
        ``value`` (the FID, None where the judge ended it) and ``attrs`` (what the row stores),
        JSON-able; read from the folder if a worker before got that far.
    """
    spec = assets.spec
    identity = {"params": dict(params), "fingerprint": assets.fingerprint}
    take_folder(folder, identity)
    note: Note = unnoted if log is None else log.open()
    if (done := read_result(folder, identity)) is not None:
        return done
    num_branches, weights = branches_and_weights(spec, params)
    weighting = weights if isinstance(weights, TracedWeights) else weights(num_branches)
    way = OnTheWay(assets, folder, judge, check=check, report=report) if judge else None
    started = time.perf_counter()
    branched = _train(assets, weighting, folder, way, check=check, report=report, note=note)
    trained = time.perf_counter()
    looked = way.seconds if way is not None else 0.0
    seconds = {"student_seconds": round(trained - started - looked, 3)}
    attrs: dict[str, Any] = {
        "weights": _values(weighting).tolist(),
        **provenance(assets.fingerprint, spec.seeds.model_dump(), assets.device),
        "timings": seconds,
    }
    if isinstance(weights, TracedWeights):
        attrs |= _drawn(weights, folder / WEIGHTS_PLOT)
    elif "method" not in params:
        attrs |= {"a": weights.a, "b": weights.b}
    if way is not None:
        attrs["intermediate"] = way.found
        seconds["looks_seconds"] = round(looked, 3)
    if branched is None:
        assert way is not None  # who else ends it
        return write_result(folder, identity, None, attrs | way.ended())
    student, images = export_branch(branched), spec.evaluation.images
    note("evaluating", images=images)
    measured = measure(
        assets,
        student,
        student_sampler(spec),
        images=images,
        metrics=spec.evaluation.metrics,
        training_seed=spec.seeds.training,
        on_image=lambda done: report(evaluating(done, images)),
        check=check,
        grid_path=folder / GRID,
    )
    seconds["evaluation_seconds"] = round(time.perf_counter() - trained, 3)
    attrs |= {**measured.as_dict(), "student": below_runs(folder / STUDENT)}
    _save(folder / STUDENT, student, assets, params, weighting, measured.fid)
    return write_result(folder, identity, measured.fid.value, attrs)


def _train(
    assets: Assets,
    weighting: torch.Tensor | TracedWeights,
    folder: Path,
    way: OnTheWay | None,
    *,
    check: Callable[[], None],
    report: Callable[[str], None],
    note: Note,
) -> NetworkDenoiser | None:
    """The student with its branches, whose training a checkpoint in the folder resumes.

    None where a look ended it.
    """

    def on_iteration(done: IterationReport) -> None:
        if isinstance(weighting, TracedWeights):
            weighting.note(done)
        _note_training(note, done)
        report(training(done.iteration + 1, done.iterations, done.loss))
        check()  # the last: a checkpoint that it makes holds this iteration too

    with contextlib.suppress(PrunedError):
        stage = SFDStage(
            config=training_config(assets.spec),
            trajectories=assets.trajectories,
            start=assets.teacher,
            seed=assets.spec.seeds.training,
        )
        return train(
            stage,
            weighting if isinstance(weighting, TracedWeights) else FixedWeights(weighting),
            devices=assets.devices,
            checkpoint=folder / CHECKPOINT,
            checkpoint_seconds=assets.spec.resources.checkpoint_seconds,
            on_iteration=on_iteration,
            on_save=lambda done: note("checkpoint", iteration=done),
            evaluations=way.looks if way else None,
        )
    return None


def _note_training(note: Note, done: IterationReport) -> None:
    """A line for some iterations, evenly spread: losses by interval and branch, [S, K]."""
    if is_noted(done.iteration, done.iterations):
        note(
            "training",
            iteration=done.iteration + 1,
            iterations=done.iterations,
            loss=shortened(done.loss),
            branch_losses=shortened(done.branch_losses),
            weights=shortened(done.weights),
            lr=done.lr,
        )


def _drawn(weights: TracedWeights, path: Path) -> dict[str, Any]:
    """What a trial stores of weights that it learned, with their picture in ``path``."""
    history = weights.history()
    draw_history(history, f"{weights.rule}, strength {weights.strength:.3g}", path)
    return {
        "rule": weights.rule,
        "strength": weights.strength,
        "weights_over_time": history,
        "weights_plot": below_runs(path),
    }


def _values(weighting: torch.Tensor | TracedWeights) -> torch.Tensor:
    """[K]: weights that were given, or those that were learned last."""
    return weighting.weights() if isinstance(weighting, TracedWeights) else weighting


def _save(
    path: Path,
    student: NetworkDenoiser,
    assets: Assets,
    params: Mapping[str, Any],
    weighting: torch.Tensor | TracedWeights,
    fid: FID,
) -> None:
    """The student's file, and its card beside it."""
    spec = assets.spec
    metadata = {
        "kind": "student",
        **assets.terms,
        "method": params.get("method", spec.student.method),
        "study": spec.name,
        "params": dict(params),
        "weights": _values(weighting).tolist(),
        "fingerprint": assets.fingerprint,
        "seeds": {"training": spec.seeds.training, "evaluation": spec.seeds.evaluation},
        "sampler": student_sampler(spec).describe(),
        "precision": spec.precision,
        "fid": fid.as_dict(),
    }
    if isinstance(weighting, TracedWeights):
        metadata["weighting"] = weighting.describe()
    save_denoiser(path, student, metadata)
    write_card(path, student, metadata)


def _service_seconds(asked: float, result: Mapping[str, Any]) -> float:
    """Time between asking for the trial and telling its result that bdense did not take."""
    timings = result["attrs"]["timings"]
    inside = sum(seconds for name, seconds in timings.items() if name != "service_seconds")
    # A result taken over was computed by another worker, before this one asked.
    return round(max(time.perf_counter() - asked - float(inside), 0.0), 3)


def _fail(
    ledger: Ledger, claim: Claim, fingerprint: str, reason: FailureReason, detail: str
) -> None:
    attrs: dict[str, Any] = {"fingerprint": fingerprint, "versions": package_versions()}
    ledger.fail(claim, reason, detail, attrs)
