"""One row of a promotion: a chain of progressive distillation, each round measured when done.

The row's folder holds each round's student, pictures and FID; whoever takes the row over goes on
after the last round that is there, from the checkpoint of the one that was under way.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.schedules import Levels
from bdense.files import atomic_write, file_lock
from bdense.methods.distill import TrainedStage, distill
from bdense.methods.method import Inputs, StagePlan
from bdense.methods.progressive import Progressive, pd_sampler
from bdense.metrics.extractors import Extractor, load_extractor
from bdense.metrics.references import Reference
from bdense.models.sources import load_model
from bdense.models.store import denoiser_sha256
from bdense.training.loop import IterationReport
from bdense.weights.weighting import FixedWeights
from search.spec.promotion_spec import PromotionSpec
from search.storage.engine import cache_folder
from search.study.arms import Arm
from search.study.folders import GRID
from search.study.progress_text import evaluating, in_round, training
from search.study.trial_log import Note, TrialLog, is_noted, shortened, unnoted
from search.worker.assets import (
    Report,
    load_data,
    load_reference,
    prepare_models,
    teacher_and_terms,
)
from search.worker.chain_engine import (
    chain_schedule,
    chain_weights,
    require_levels_known,
    round_config,
)
from search.worker.chain_estimate import chain_memory
from search.worker.engine import architecture, execution
from search.worker.evaluation import measure
from search.worker.result import below_runs, provenance, read_result, take_folder, write_result


@dataclass(frozen=True, eq=False)
class ChainAssets:
    """A promotion's shared parts, in one process's memory.

    ``terms`` is what its students' metadata take over from the teacher's; ``teacher_fid`` that of
    the teacher at the chain's first number of steps, with its conditions.
    """

    spec: PromotionSpec
    fingerprint: str
    teacher: NetworkDenoiser
    schedule: Levels
    dataset: Dataset
    extractor: Extractor
    reference: Reference
    terms: Mapping[str, Any]
    teacher_fid: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """Where rows run."""
        return next(self.teacher.parameters()).device


def prepare_chain(
    spec: PromotionSpec, device: torch.device, report: Report, *, together: int | None = None
) -> None:
    """Make teacher, extractor and reference, and measure the teacher, or find them in the cache.

    Args:
        spec: The promotion.
        device: Where its chains run.
        report: Called with the progress.
        together: Chains at once on this machine, for which its memory has to suffice; None asks
            for no room.

    Raises:
        InputError: Something the user gave cannot be had or does not fit, or memory is too little.
    """
    execution(spec).require(device)
    if together is not None:
        memory = chain_memory(spec, architecture(spec), device)
        memory.require_room(spec, device, together)
    teacher = prepare_models(spec, device, report)
    if spec.teacher.checkpoint is not None:
        require_levels_known(spec, load_model(spec.teacher.checkpoint)[1], teacher)
    teacher.require_levels(chain_schedule(spec, teacher))
    dataset = load_data(spec)
    if teacher.label_dim and dataset is not None:
        dataset.require_labels(teacher.label_dim)
    _load(spec, device, report)


def load_chain(spec: PromotionSpec, device: torch.device) -> ChainAssets:
    """Everything ``prepare_chain`` made, from the cache."""
    return _load(spec, device, lambda *_: None)


def _load(spec: PromotionSpec, device: torch.device, report: Report) -> ChainAssets:
    dataset = load_data(spec)
    assert dataset is not None  # a promotion always uses data
    teacher, terms = teacher_and_terms(spec, dataset, device)
    extractor = load_extractor(spec.evaluation.extractor, cache=cache_folder(), device=device)
    assets = ChainAssets(
        spec=spec,
        fingerprint=spec.fingerprint(),
        teacher=teacher,
        schedule=chain_schedule(spec, teacher),
        dataset=dataset,
        extractor=extractor,
        reference=load_reference(spec, dataset, extractor),
        terms=terms,
        teacher_fid={},
    )
    return replace(assets, teacher_fid=_teacher_fid(assets, report))


def _teacher_fid(assets: ChainAssets, report: Report) -> dict[str, Any]:
    """The teacher's FID at the chain's first number of steps: measured once and cached."""
    spec = assets.spec
    steps, evaluation = spec.chain.first, spec.evaluation
    key = {
        "teacher": denoiser_sha256(assets.teacher),
        "schedule": assets.schedule.describe(),
        "steps": steps,
        "clip": spec.clip_samples,
        "images": evaluation.images,
        "extractor": assets.extractor.sha256,
        "reference": spec.conditions().get("evaluation.reference", assets.dataset.sha256),
        "seed": spec.seeds.evaluation,
        "precision": spec.precision,
        "numerics": NUMERICS,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / "teacher-fids" / f"{digest}.json"
    with file_lock(path.with_suffix(".lock")):
        return _read_or_make(
            path,
            lambda: _measured(
                assets,
                assets.teacher,
                steps,
                training_seed=None,
                on_image=lambda done: report(
                    "teacher FID", done, evaluation.images, f"at {steps} steps"
                ),
                check=lambda: None,
                grid_path=path.with_suffix(".png"),
            ),
        )


def _read_or_make(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A FID with its conditions from its file, or measured now and kept there."""
    if not path.exists():
        fid = make()
        with atomic_write(path) as scratch:
            scratch.write_text(json.dumps(fid))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def train_and_measure(
    assets: ChainAssets,
    arm: Arm,
    seed: int,
    folder: Path,
    *,
    check: Callable[[], None],
    report: Callable[[str], None],
    on_fid: Callable[[int, float], None],
    log: TrialLog | None = None,
) -> dict[str, Any]:
    """Distil a chain with an arm's weights and measure each round.

    Args:
        assets: What the promotion's rows share.
        arm: How the branches are weighed.
        seed: Of the training.
        folder: Where rounds, pictures and the result go.
        check: Called every update; what it raises ends the work.
        report: Called with a short text on the progress.
        on_fid: Called with the steps and FID of the teacher, then of each round; a converting
            round has the teacher's steps.
        log: The row's.

    Returns:
        ``value`` (the last round's FID) and ``attrs`` (what the row stores), JSON-able.
    """
    spec = assets.spec
    identity = {"params": arm.params, "seed": seed, "fingerprint": assets.fingerprint}
    take_folder(folder, identity)
    note: Note = unnoted if log is None else log.open()
    if (done := read_result(folder, identity)) is not None:
        return done
    weights = chain_weights(arm, spec.chain.substeps)
    fids: dict[int, dict[str, Any]] = {}
    seconds = {"student_seconds": 0.0, "evaluation_seconds": 0.0}
    on_fid(spec.chain.first, float(assets.teacher_fid["value"]))
    started = time.perf_counter()
    for round_ in _rounds(
        assets, arm, seed, weights, folder, check=check, report=report, note=note
    ):
        trained = time.perf_counter()
        seconds["student_seconds"] += trained - started
        fids[round_.plan.nfe] = fid = _round_fid(
            assets, round_, seed, check=check, report=report, note=note
        )
        on_fid(round_.plan.nfe, float(fid["value"]))
        started = time.perf_counter()
        seconds["evaluation_seconds"] += started - trained
    last = spec.chain.last
    attrs: dict[str, Any] = {
        "arm": arm.name,
        **{key: arm.params[key] for key in ("method", "a", "b") if key in arm.params},
        "weights": weights.tolist(),
        "fid": fids[last],
        "fids": {str(steps): fid for steps, fid in fids.items()},
        "teacher_fid": dict(assets.teacher_fid),
        **provenance(
            assets.fingerprint,
            {"training": seed, "evaluation": spec.seeds.evaluation},
            assets.device,
        ),
        "timings": {name: round(value, 3) for name, value in seconds.items()},
        "student": below_runs(folder / f"{last:05d}.safetensors"),
    }
    return write_result(folder, identity, fids[last]["value"], attrs)


def _rounds(
    assets: ChainAssets,
    arm: Arm,
    seed: int,
    weights: torch.Tensor,
    folder: Path,
    *,
    check: Callable[[], None],
    report: Callable[[str], None],
    note: Note,
) -> Iterator[TrainedStage]:
    spec = assets.spec

    def on_iteration(plan: StagePlan, done: IterationReport) -> None:
        _note_training(note, plan.nfe, done, weights)
        text = training(done.iteration + 1, done.iterations, done.loss)
        report(_in_round(spec, plan.nfe, text))
        check()

    return distill(
        Progressive(),
        assets.teacher,
        round_config(spec),
        lambda: FixedWeights(weights),
        Inputs(dataset=assets.dataset, seed=seed),
        folder=folder,
        metadata={
            **assets.terms,
            "study": spec.name,
            "method": {"pd": "pd", "uniform": "pd-uniform"}.get(
                arm.params.get("method", ""), "pd-bdense"
            ),
            "params": arm.params,
            "seeds": {"training": seed, "evaluation": spec.seeds.evaluation},
            "fingerprint": assets.fingerprint,
        },
        checkpoint_seconds=spec.resources.checkpoint_seconds,
        on_iteration=on_iteration,
        on_save=lambda plan, done: note("checkpoint", steps=plan.nfe, iteration=done),
    )


def _note_training(note: Note, steps: int, done: IterationReport, weights: torch.Tensor) -> None:
    """A line for some updates of a round, evenly spread: losses by branch, as one interval's."""
    if is_noted(done.iteration, done.iterations):
        note(
            "training",
            steps=steps,
            iteration=done.iteration + 1,
            iterations=done.iterations,
            loss=shortened(done.loss),
            branch_losses=shortened(done.branch_losses),
            weights=[shortened(weights)],
            lr=done.lr,
        )


def _in_round(spec: PromotionSpec, steps: int, text: str) -> str:
    """Progress of the round that goes down to that many steps.

    A converting round is part of the first.
    """
    students = round_config(spec).rounds
    place = students.index(steps) + 1 if steps in students else 1
    return in_round(place, len(students), text)


def _round_fid(
    assets: ChainAssets,
    round_: TrainedStage,
    seed: int,
    *,
    check: Callable[[], None],
    report: Callable[[str], None],
    note: Note,
) -> dict[str, Any]:
    """A round's FID with its conditions, from its file or measured now."""
    assert round_.path is not None
    student = round_.path
    path = student.with_suffix(".fid.json")
    count = assets.spec.evaluation.images

    def make() -> dict[str, Any]:
        note("evaluating", steps=round_.plan.nfe, images=count)
        fid = _measured(
            assets,
            round_.student,
            round_.plan.nfe,
            training_seed=seed,
            on_image=lambda done: report(
                _in_round(assets.spec, round_.plan.nfe, evaluating(done, count))
            ),
            check=check,
            grid_path=student.with_name(f"{student.stem}-{GRID}"),
        )
        note("round", steps=round_.plan.nfe, fid=fid["value"])
        return fid

    return _read_or_make(path, make)


def _measured(
    assets: ChainAssets,
    denoiser: NetworkDenoiser,
    steps: int,
    *,
    training_seed: int | None,
    on_image: Callable[[int], None],
    check: Callable[[], None],
    grid_path: Path,
) -> dict[str, Any]:
    """A model's FID in that many steps with its conditions, as ``measure`` finds it."""
    return measure(
        assets,
        denoiser,
        pd_sampler(assets.schedule, steps, clip=assets.spec.clip_samples),
        images=assets.spec.evaluation.images,
        training_seed=training_seed,
        on_image=on_image,
        check=check,
        grid_path=grid_path,
    ).fid.as_dict()
