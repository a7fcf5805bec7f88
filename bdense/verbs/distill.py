"""``bdense distill``: students of a teacher, by any method, plain or with B-DENSE."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bdense.command import Force, kept_in
from bdense.data.datasets import Dataset, image_shape, load_dataset
from bdense.data.encoded import encode_dataset
from bdense.diffusion.conditions import captions
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.epd import EPD, no_table, write_table
from bdense.diffusion.sampling import Sampler
from bdense.execution import Execution
from bdense.files import UNFINISHED, plain_json, require_output
from bdense.knobs import KnobError, Knobs
from bdense.methods import METHODS
from bdense.methods.distill import TrainedStage, keep_student
from bdense.methods.distill import distill as distill_stages
from bdense.methods.method import Inputs, MethodConfig, StagePlan, require_shape
from bdense.metrics.extractors import load_extractor
from bdense.metrics.records import PromptFile
from bdense.metrics.references import dataset_reference
from bdense.models.card import inherited
from bdense.models.latents import drawn_shape, draws_latents
from bdense.models.store import load_stored
from bdense.training.loop import IterationReport
from bdense.training.tracking import Tracking
from bdense.verbs.common import (
    WEIGHTS,
    Interrupt,
    Progress,
    chosen_hardware,
    require_model_out,
    say_ignored,
)
from bdense.verbs.evaluation import FIDEvaluation, no_kept_fid
from bdense.verbs.options import IMAGES, DistillOptions, Evaluation, Hardware, Logging
from bdense.verbs.sample import chosen_prompts, codec_of, conditions_of, require_pipeline
from bdense.verbs.weight_options import WeightOptions, chosen_weighting

# Endings of what lies beside a student: its FID, and the table of a learned solver.
_FID, _TABLE = ".fid.json", ".epd.json"


def distill(
    own: DistillOptions,
    replacing: Force,
    logging: Logging,
    weights: WeightOptions,
    parameters: Knobs,
    read_config: Callable[..., MethodConfig],
    evaluation: Evaluation,
    execution: Execution,
    hardware: Hardware,
) -> None:
    """Run the verb."""
    method = METHODS[own.method]()
    config = read_config()
    weighting = chosen_weighting(weights, parameters, config.num_branches, config.num_intervals)
    device = chosen_hardware(execution, hardware)
    texts = chosen_prompts(own.prompts)
    dataset = None
    if method.needs_data or evaluation.extractor is not None:
        dataset = load_dataset(own.data)
    else:
        image_shape(own.data)  # not needed, but a misspelt one is refused all the same
    teacher, known = load_stored(own.teacher)
    say_ignored(own.teacher, known)
    # A student that is distilled further keeps its own knobs, unless an option changes them.
    config = read_config(**method.Config.usual(known, teacher))
    learned = dataset if method.needs_data else None
    if learned is not None and draws_latents(teacher, known):
        method.check(config, teacher, known)
        require_shape(learned, drawn_shape(teacher, known))
        _require_describing(teacher, learned, texts)
        learned = _encoded(learned, own.teacher, evaluation.cache, device)
    conditions = conditions_of(teacher, own.teacher, texts, cache=evaluation.cache)
    teacher.to(device).execute(execution)
    # Several stages: a folder of students. One: a file, and its checkpoint beside it.
    names = [plan.name for plan in method.plan(config, teacher)]
    several = any(names)
    folder = own.out if several else own.out.parent
    interrupt = Interrupt()
    progress = _StageProgress(interrupt, own.out, several=several)
    if not several:  # students of other runs are refused below
        require_model_out(own.out, force=replacing.force, inputs=[own.teacher])
    stages = distill_stages(
        method,
        teacher,
        config,
        weighting,
        Inputs(dataset=learned, seed=own.seed, metadata=known, conditions=conditions),
        folder=folder,
        name=own.out.stem,
        replace=replacing.force,
        keep_branches=own.keep_branches,
        metadata={
            **inherited(known, Path(own.teacher).name),
            **({} if learned is None else {"data": learned.name}),
        },
        on_iteration=progress,
    )
    if several:  # after all refusals, as it makes the folder
        require_output(own.out, folder=True, force=replacing.force)
    stems = [name or own.out.stem for name in names]
    _require_places_beside(folder, stems, own, evaluation, replacing)
    fids = None
    if evaluation.extractor is not None and dataset is not None:
        extractor = load_extractor(evaluation.extractor, cache=evaluation.cache, device=device)
        fids = FIDEvaluation(
            extractor=extractor,
            reference=dataset_reference(dataset, extractor, cache=evaluation.cache),
            image_shape=drawn_shape(teacher, known),
            images=evaluation.images or IMAGES,
            conditions=conditions,
            prompts=None if own.prompts is None else PromptFile.of(own.prompts, texts),
            codec=codec_of(teacher, known, own.teacher, device),
        )
    elif evaluation.images is not None:
        raise KnobError("images", "needs `extractor`, which measures the FID")
    sampler = method.teacher_sampler(config, teacher)

    def measured(name: str, model: NetworkDenoiser, sampler: Sampler) -> dict[str, Any]:
        assert fids is not None
        show = Progress(interrupt, "this FID was not measured; finished students are kept")
        counted = show.counting(fids.images, "images drawn")
        path = folder / f"{name}{_FID}"
        return fids.kept(path, model, sampler, seed=own.seed, on_image=counted)

    settings = plain_json({"method": own.method, "seed": own.seed, **asdict(config)})
    with interrupt, Tracking(logging.log, own.out.stem, settings) as tracking:
        progress.tracking = tracking
        if fids is not None and sampler is not None:
            print(f"teacher: {own.teacher}", flush=True)
            print(json.dumps(measured("teacher", teacher, sampler)["fid"]), flush=True)
        for done in stages:
            assert done.path is not None
            _write_table(done, done.path)
            print(f"{done.plan.label}: {done.path}", flush=True)
            if fids is not None:
                found = measured(done.path.stem, done.student, done.sampler)
                # An earlier call may have written it to the student's file and card.
                if (metadata := {**done.metadata, **found}) != done.metadata:
                    keep_student(done.path, done.student, None, metadata)
                print(json.dumps(found["fid"]), flush=True)
                tracking.evaluation(done.plan.name, {"fid": found["fid"]["value"]})


def _require_describing(
    teacher: NetworkDenoiser, dataset: Dataset, prompts: Sequence[str]
) -> None:
    """Refuse conditions that do not describe the images, before anything is encoded."""
    if prompts:
        captions(len(prompts), dataset)
    else:
        teacher.conditions.require(dataset)


def _require_places_beside(
    folder: Path,
    stems: Sequence[str],
    own: DistillOptions,
    evaluation: Evaluation,
    replacing: Force,
) -> None:
    """Refuse to replace others' files by what is written beside students."""
    beside: dict[str, Callable[[Path], str]] = {}
    if own.method == EPD.name:
        beside |= {f"{stem}{_TABLE}": no_table for stem in stems}
    if evaluation.extractor is not None:
        beside |= {f"{stem}{_FID}": no_kept_fid for stem in ("teacher", *stems)}
    for file, problem in beside.items():
        require_output(folder / file, problem=problem, force=replacing.force)


def _encoded(dataset: Dataset, teacher: str, cache: Path, device: torch.device) -> Dataset:
    """The data set in the latents of the teacher's pipeline."""
    require_pipeline(teacher)
    show = Progress().counting(len(dataset.images), "images encoded")
    return encode_dataset(dataset, teacher, cache, device, show)


def _write_table(done: TrainedStage, path: Path) -> None:
    """Write the table of a learned solver beside its student."""
    if isinstance(done.sampler.solver, EPD):
        about = {name: done.metadata[name] for name in ("teacher", "teacher_sha256", "training")}
        write_table(path.with_suffix(_TABLE), done.sampler, about)


class _StageProgress:
    """Progress of one stage after the other."""

    def __init__(self, interrupt: Interrupt, out: Path, *, several: bool) -> None:
        self._interrupt, self._out, self._several = interrupt, out, several
        self._plan: StagePlan | None = None
        self._show = Progress()
        self.tracking = Tracking()

    def __call__(self, plan: StagePlan, done: IterationReport) -> None:
        """Report how far the stage is."""
        if plan != self._plan:
            path = self._out / f"{plan.name}{WEIGHTS}" if self._several else self._out
            self._plan = plan
            self._show = Progress(self._interrupt, kept_in(path.with_suffix(UNFINISHED)))
        self.tracking.iteration(plan.name, done)
        remark = f"{plan.label}, loss {done.loss:.4g}"
        self._show(done.iteration + 1, done.iterations, remark)
