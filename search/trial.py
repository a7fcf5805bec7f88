"""One trial: branch weights -> student -> FID; what goes wrong becomes a named state.

A trial's folder holds its checkpoint, then pictures, the student and ``result.json``. The result
is written before it is told, so that whoever takes over a finished trial only tells.
"""

import errno
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
from bdense.cards import card_path, write_card
from bdense.checkpoints import save_denoiser
from bdense.denoiser import NetworkDenoiser
from bdense.errors import BdenseError, NonFiniteError
from bdense.files import atomic_write
from bdense.metrics import FID, Metrics, measure_images
from bdense.sampling import draw_images, save_grid
from bdense.sfd import IterationReport
from bdense.sharing import distill_on
from search.assets import Assets
from search.engine import branches_and_weights, student_sampler, training_config
from search.errors import DiskFullError, LeaseLostError, StorageError
from search.ledger import Claim, FailureReason, Holding, Ledger
from search.storage import runs_folder
from search.traced_weights import TracedWeights, draw_history

_log = logging.getLogger(__name__)

PACKAGES = ("bdense", "torch", "numpy", "optuna", "ray", "sqlalchemy", "torch-fidelity")
IDENTITY, RESULT, STUDENT, CHECKPOINT, GRID, WEIGHTS_PLOT = (
    "trial.json",
    "result.json",
    "student.safetensors",
    "checkpoint.safetensors",
    "samples.png",
    "weights.png",
)


def trial_folder(study_name: str, number: int) -> Path:
    """Where a trial keeps its files: by study and number, never by process."""
    return runs_folder() / study_name / f"{number:05d}"


def bring_to_an_end(
    ledger: Ledger,
    claim: Claim,
    work: Callable[[Holding, Path], dict[str, Any]],
    *,
    fingerprint: str,
    asked: float,
) -> None:
    """Do a claimed row's work and tell its result, or why there is none, or give it back.

    Args:
        ledger: The study's.
        claim: What is worked on.
        work: From the held lease and the row's folder to ``value``, the FID, and ``attrs``, what
            the row stores.
        fingerprint: Of the conditions.
        asked: ``time.perf_counter()`` when the claim was asked for.

    Raises:
        LeaseLostError: Another worker took it over; nothing was told.
        StorageError: The database stayed away; the trial is taken over once it is back.
    """
    fail = functools.partial(_fail, ledger, claim, fingerprint)
    try:
        with ledger.holding(claim) as holding:
            result = work(holding, trial_folder(ledger.study.study_name, claim.number))
        attrs = result["attrs"] | {"tries": claim.tries}
        attrs["timings"]["service_seconds"] = _service_seconds(asked, result)
        ledger.complete(claim, result["value"], attrs)
    except (LeaseLostError, StorageError):
        # Not the trial's fault; its result lies in its folder for whoever takes it over.
        raise
    except NonFiniteError as error:
        fail("diverged", str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        fail("out of memory", f"{error}; use a smaller batch or give trials more memory")
    except BdenseError as error:
        fail("error", str(error))
    except Exception as error:
        if is_full_disk(error):
            # Nor the trial's fault; any other row would fail for it too.
            ledger.release(claim, interrupted=True)
            raise DiskFullError(
                f"no space is left where runs are kept ({runs_folder().resolve()}): {error}; free "
                "some and give the same command again: it carries on from what was saved last"
            ) from error
        _log.exception("trial %d, attempt %d", claim.number, claim.attempt)
        if claim.tries < ledger.max_attempts:
            ledger.release(claim)
        else:
            fail("error", f"{type(error).__name__}: {error}")


def is_full_disk(error: BaseException) -> bool:
    """Whether there was no space left to write to."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def evaluate(
    assets: Assets,
    params: Mapping[str, Any],
    folder: Path,
    *,
    check: Callable[[], None],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Train a student with these parameters and measure its FID.

    Args:
        assets: What the study's trials share.
        params: A trial's a (and b), its rule and strength, or a baseline's method.
        folder: Where the checkpoint, the student and the result go.
        check: Called every iteration; what it raises ends the work.
        report: Called with a short text on the progress.

    Returns:
        ``value`` (the FID) and ``attrs`` (what the row stores), JSON-able; read from the folder
        if a worker before got that far.
    """
    spec = assets.spec
    identity = {"params": dict(params), "fingerprint": assets.fingerprint}
    take_folder(folder, identity)
    if (done := read_result(folder, identity)) is not None:
        return done
    num_branches, weights = branches_and_weights(spec, params)
    weighting = weights if isinstance(weights, TracedWeights) else weights(num_branches)

    def on_iteration(done: IterationReport) -> None:
        check()
        if isinstance(weighting, TracedWeights):
            weighting.note(done)
        report(f"training {done.iteration + 1}/{done.iterations}, loss {done.loss:.3g}")

    started = time.perf_counter()
    branched = distill_on(
        assets.devices,
        assets.teacher,
        assets.trajectories,
        training_config(spec, num_branches),
        weighting,
        checkpoint=folder / CHECKPOINT,
        checkpoint_seconds=spec.resources.checkpoint_seconds,
        on_iteration=on_iteration,
    )
    trained = time.perf_counter()
    student = export_branch(branched)
    measured = measure(assets, student, check=check, report=report, grid_path=folder / GRID)
    fid = measured.fid
    evaluated = time.perf_counter()
    values = weighting.weights() if isinstance(weighting, TracedWeights) else weighting
    attrs: dict[str, Any] = {
        "weights": values.tolist(),
        **measured.as_dict(),
        "fingerprint": assets.fingerprint,
        "seeds": spec.seeds.model_dump(),
        "versions": package_versions(),
        "timings": {
            "student_seconds": round(trained - started, 3),
            "evaluation_seconds": round(evaluated - trained, 3),
        },
        "student": below_runs(folder / STUDENT),
        "device": device_name(assets.device),
        "worker": f"{platform.node()}:{os.getpid()}",
    }
    if isinstance(weights, TracedWeights):
        attrs |= _drawn(weights, folder / WEIGHTS_PLOT)
    elif "method" not in params:
        attrs |= {"a": weights.a, "b": weights.b}
    metadata = _student_metadata(assets, params, values, fid)
    if isinstance(weights, TracedWeights):
        metadata["weighting"] = weights.describe()
    save_denoiser(folder / STUDENT, student, metadata)
    write_card(folder / STUDENT, student, metadata)
    result = {"value": fid.value, "attrs": attrs, "identity": identity}
    with atomic_write(folder / RESULT) as scratch:
        scratch.write_text(json.dumps(result))
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return result


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
    if folder.exists() and (not mark.exists() or mark.read_text() != ours):
        aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
        _log.warning("%s holds another study's trial; moved to %s", folder, aside.name)
        folder.rename(aside)
    if not mark.exists():
        with atomic_write(mark) as scratch:
            scratch.write_text(ours)


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


def keep_best_students(ledger: Ledger, keep: int) -> None:
    """Delete the student files of all but the best ``keep`` complete trials."""
    study = ledger.study
    values = {t.number: t.value for t in study.get_trials(deepcopy=False) if t.value is not None}
    for number in sorted(values, key=values.__getitem__)[keep:]:
        student = trial_folder(study.study_name, number) / STUDENT
        for path in (student, card_path(student)):
            path.unlink(missing_ok=True)
