"""One trial: branch weights -> student -> FID; what goes wrong becomes a named state.

A trial's folder holds its checkpoint, then pictures, the student and ``result.json``. The result
is written before it is told, so that whoever takes over a finished trial only tells.
"""

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bdense.branches import export_branch
from bdense.cards import write_card
from bdense.checkpoints import save_denoiser
from bdense.denoiser import NetworkDenoiser
from bdense.errors import BdenseError, NonFiniteError, StoppedError
from bdense.files import atomic_write
from bdense.metrics import FID, Metrics, measure_images
from bdense.sampling import draw_images, save_grid
from bdense.sfd import IterationReport
from bdense.sharing import distill_on
from search.database.ledger import Claim, FailureReason, Holding, Ledger
from search.database.room import is_full_disk, no_room
from search.database.storage import redact
from search.errors import LeaseLostError, StorageError
from search.records.folders import GRID, WEIGHTS_PLOT, row_folder
from search.records.retention import CHECKPOINT, IDENTITY, RESULT, STUDENT, drop_checkpoints
from search.records.trial_log import LOG_FILE, Note, TrialLog, is_noted, shortened, unnoted
from search.service_log import speaking_of
from search.showing.live import attach_pictures
from search.trials.assets import Assets
from search.trials.engine import branches_and_weights, student_sampler, training_config
from search.trials.pruning import Judge, OnTheWay, PrunedError
from search.trials.traced_weights import TracedWeights, draw_history

_log = logging.getLogger(__name__)

PACKAGES = ("bdense", "torch", "numpy", "optuna", "ray", "sqlalchemy", "torch-fidelity")


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
        if is_full_disk(error):
            # Nor the trial's fault; any other row would fail for it too.
            ledger.release(claim, interrupted=True)
            log("released", level=logging.WARNING, why="disk full")
            raise no_room(error) from error
        _log.exception("trial %d, attempt %d", claim.number, claim.attempt)
        if claim.tries < ledger.max_attempts:
            ledger.release(claim)
            why = redact(f"{type(error).__name__}: {error}")
            log("released", level=logging.WARNING, why=why)
        else:
            fail("error", f"{type(error).__name__}: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU or torch's allocator on the CPU had no memory to give."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def evaluate(
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

    def on_iteration(done: IterationReport) -> None:
        if isinstance(weighting, TracedWeights):
            weighting.note(done)
        note_training(note, done)
        report(f"training {done.iteration + 1}/{done.iterations}, loss {done.loss:.3g}")
        check()  # the last: a checkpoint that it makes holds this iteration too

    way = OnTheWay(assets, folder, judge, check=check, report=report) if judge else None
    branched: NetworkDenoiser | None = None
    started = time.perf_counter()
    with contextlib.suppress(PrunedError):
        branched = distill_on(
            assets.devices,
            assets.teacher,
            assets.trajectories,
            training_config(spec, num_branches),
            weighting,
            checkpoint=folder / CHECKPOINT,
            checkpoint_seconds=spec.resources.checkpoint_seconds,
            on_iteration=on_iteration,
            on_save=lambda done: note("checkpoint", iteration=done),
            looks=way.looks if way else None,
        )
    trained = time.perf_counter()
    values = weighting.weights() if isinstance(weighting, TracedWeights) else weighting
    seconds = {"student_seconds": round(trained - started, 3)}
    attrs: dict[str, Any] = {
        "weights": values.tolist(),
        "fingerprint": assets.fingerprint,
        "seeds": spec.seeds.model_dump(),
        "versions": package_versions(),
        "timings": seconds,
        "device": device_name(assets.device),
        "worker": f"{platform.node()}:{os.getpid()}",
    }
    if isinstance(weights, TracedWeights):
        attrs |= _drawn(weights, folder / WEIGHTS_PLOT)
    elif "method" not in params:
        attrs |= {"a": weights.a, "b": weights.b}
    if way is not None:
        attrs["intermediate"] = way.found
        seconds["student_seconds"] = round(trained - started - way.seconds, 3)
        seconds["looks_seconds"] = round(way.seconds, 3)
    if branched is None:
        assert way is not None  # who else ends it
        return _kept(folder, {"value": None, "attrs": attrs | way.ended(), "identity": identity})
    student = export_branch(branched)
    note("evaluating", images=spec.evaluation.images)
    measured = measure(assets, student, check=check, report=report, grid_path=folder / GRID)
    fid = measured.fid
    seconds["evaluation_seconds"] = round(time.perf_counter() - trained, 3)
    attrs |= {**measured.as_dict(), "student": below_runs(folder / STUDENT)}
    metadata = _student_metadata(assets, params, values, fid)
    if isinstance(weights, TracedWeights):
        metadata["weighting"] = weights.describe()
    save_denoiser(folder / STUDENT, student, metadata)
    write_card(folder / STUDENT, student, metadata)
    return _kept(folder, {"value": fid.value, "attrs": attrs, "identity": identity})


def _kept(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The result, written into the folder; the checkpoint is of no use any more."""
    with atomic_write(folder / RESULT) as scratch:
        scratch.write_text(json.dumps(result))
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return result


def note_training(note: Note, done: IterationReport) -> None:
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


def below_runs(path: Path) -> str:
    """A trial's file as the study's rows name it: study/number/file."""
    return str(Path(*path.parts[-3:]))


def read_result(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a worker before computed for this very trial, if it got that far."""
    path = folder / RESULT
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["identity"] == identity else None


def take_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make sure that what lies in a trial's folder is this trial's.

    A study that was deleted from its database, or lives in another one under the same name,
    leaves folders behind; theirs is moved aside, never taken for ours.
    """
    ours = json.dumps(identity, sort_keys=True)
    mark = folder / IDENTITY
    if _holds_more_than_a_log(folder) and (not mark.exists() or mark.read_text() != ours):
        aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
        _log.warning("%s holds another study's trial; moved to %s", folder, aside.name)
        folder.rename(aside)
    if not mark.exists():
        with atomic_write(mark) as scratch:
            scratch.write_text(ours)


def _holds_more_than_a_log(folder: Path) -> bool:
    return folder.exists() and any(path.name != LOG_FILE for path in folder.iterdir())


def measure(
    assets: Assets,
    student: NetworkDenoiser,
    *,
    check: Callable[[], None],
    report: Callable[[str], None],
    grid_path: Path,
) -> Metrics:
    """A student's images, on the study's latents; leaves a grid of the first 64 of them."""
    spec = assets.spec
    sampler = student_sampler(spec)
    count = spec.evaluation.images

    def on_image(done: int) -> None:
        check()
        report(f"evaluating {done}/{count} images")

    images = draw_images(
        student,
        sampler,
        count,
        seed=spec.seeds.evaluation,
        batch=spec.evaluation.batch,
        on_image=on_image,
    )
    save_grid(images[:64], grid_path)
    return measure_images(
        images,
        assets.extractor,
        assets.reference,
        metrics=spec.evaluation.metrics,
        nfe=sampler.nfe,
        seeds={"training": spec.seeds.training, "evaluation": spec.seeds.evaluation},
        on_image=lambda _: check(),
    )


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version()
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or what kind of CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _student_metadata(
    assets: Assets, params: Mapping[str, Any], weights: torch.Tensor, fid: FID
) -> dict[str, Any]:
    return {
        "kind": "student",
        **assets.terms,
        "method": params.get("method", assets.spec.student.method),
        "study": assets.spec.name,
        "params": dict(params),
        "weights": weights.tolist(),
        "fingerprint": assets.fingerprint,
        "seeds": {
            "training": assets.spec.seeds.training,
            "evaluation": assets.spec.seeds.evaluation,
        },
        "sampler": student_sampler(assets.spec).describe(),
        "precision": assets.spec.precision,
        "fid": fid.as_dict(),
    }


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
