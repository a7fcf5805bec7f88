"""``bdense distill``: students of a teacher, by any method, plain or with B-DENSE."""

import argparse
import json
from pathlib import Path

import torch

from bdense.data.datasets import Dataset, load_dataset
from bdense.knobs import KnobError, from_options
from bdense.methods import METHODS
from bdense.methods.distill import TrainedStage, keep_student
from bdense.methods.distill import distill as distill_stages
from bdense.methods.method import Inputs, StagePlan
from bdense.metrics.extractors import load_extractor
from bdense.metrics.references import dataset_reference
from bdense.models.card import inherited
from bdense.models.store import load_model
from bdense.training.loop import IterationReport
from bdense.verbs.common import Progress, chosen_hardware, require_writable, unfinished
from bdense.verbs.fid import KeptFIDs
from bdense.verbs.options import IMAGES, DistillOptions, Evaluation
from bdense.verbs.sample import chosen_prompts, conditions_of
from bdense.verbs.weight_options import chosen_weighting


def distill(options: argparse.Namespace) -> None:
    """Run the verb."""
    own, evaluation = from_options(DistillOptions, options), from_options(Evaluation, options)
    method = METHODS[own.method]()
    config = from_options(method.Config, options)
    weighting = chosen_weighting(
        options, method.num_branches(config), method.num_intervals(config)
    )
    device, execution = chosen_hardware(options)
    texts = chosen_prompts(None, own.prompts)
    dataset = None
    if method.needs_data or evaluation.extractor is not None:
        dataset = load_dataset(own.data)
    teacher, known = load_model(own.teacher)
    # A student that is distilled further keeps its own knobs, unless an option changes them.
    config = from_options(method.Config, options, **method.usual(known))
    if evaluation.extractor is not None and "levels" in known:
        raise KnobError(
            "--extractor", "measures images, and a student of this teacher draws latents; drop it"
        )
    conditions = conditions_of(teacher, own.teacher, texts)
    teacher.to(device).execute(execution)
    # Several stages: a folder of students. One: a file, and its checkpoint beside it.
    several = any(plan.name for plan in method.plan(config, teacher))
    stages = distill_stages(
        method,
        teacher,
        config,
        weighting,
        Inputs(dataset=dataset, seed=own.seed, known=known, conditions=conditions),
        folder=own.out if several else None,
        checkpoint=None if several else unfinished(own.out),
        keep_branches=own.keep_branches,
        metadata={
            **({"data": dataset.name} if method.needs_data and dataset is not None else {}),
            **inherited(known, Path(own.teacher).name),
        },
        on_iteration=_StageProgress(),
    )
    folder = own.out if several else own.out.parent
    fids = _kept_fids(evaluation, dataset, device, folder, own.seed)
    require_writable(own.out, folder=several)
    sampler = method.teacher_sampler(config, teacher)
    if fids is not None and sampler is not None:
        print(f"teacher: {own.teacher}", flush=True)
        print(json.dumps(fids.fid("teacher", teacher, sampler)), flush=True)
    for done in stages:
        path = done.path or _keep(own.out, done)
        print(f"{done.plan.label}: {path}", flush=True)
        if fids is not None:
            print(json.dumps(fids.fid(path.stem, done.student, done.sampler)), flush=True)


def _keep(path: Path, done: TrainedStage) -> Path:
    """Write a single student with its card, and delete its checkpoint."""
    keep_student(path, done.student, done.branched, done.metadata)
    unfinished(path).unlink(missing_ok=True)
    return path


def _kept_fids(
    evaluation: Evaluation, dataset: Dataset | None, device: torch.device, folder: Path, seed: int
) -> KeptFIDs | None:
    """The FIDs that --extractor asks for; None without it."""
    if evaluation.extractor is None or dataset is None:
        if evaluation.images is not None:
            raise KnobError("--images", "needs --extractor, which measures the FID")
        return None
    extractor = load_extractor(evaluation.extractor, cache=evaluation.cache, device=device)
    return KeptFIDs(
        folder=folder,
        dataset=dataset,
        extractor=extractor,
        reference=dataset_reference(dataset, extractor, cache=evaluation.cache),
        images=evaluation.images or IMAGES,
        seed=seed,
    )


class _StageProgress:
    """Progress of one stage after the other."""

    def __init__(self) -> None:
        self._plan: StagePlan | None = None
        self._show = Progress()

    def __call__(self, plan: StagePlan, done: IterationReport) -> None:
        """Report how far the stage is."""
        if plan != self._plan:
            self._plan, self._show = plan, Progress()
        remark = f"{plan.label}, loss {done.loss:.4g}"
        self._show(done.iteration + 1, done.iterations, remark)
