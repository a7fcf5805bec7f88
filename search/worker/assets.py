"""What a study's rows share: teacher, trajectories, extractor, reference statistics.

Made once, under locks, cached under the runs folder, and read by all workers.
"""

import hashlib
import json
import os
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset, load_dataset
from bdense.data.encoded import encode_dataset
from bdense.data.prompts import read_prompts
from bdense.diffusion.conditions import Conditions, captions
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.pictures import GRID_COLUMNS
from bdense.errors import InputError
from bdense.files import file_lock, write_json
from bdense.methods.method import Inputs, Method, MethodConfig, Recordings, require_shape
from bdense.methods.one_shot import Coordinates, OneShot
from bdense.methods.recordings import TrajectoryStore
from bdense.metrics.extractors import load_extractor
from bdense.metrics.metrics import require_measurable
from bdense.metrics.records import FID, PromptFile
from bdense.metrics.settings import MetricSettings
from bdense.models.card import inherited
from bdense.models.latents import draws_latents, load_codec
from bdense.models.store import denoiser_sha256
from bdense.randomness import Stream, derive_seed
from bdense.weights.space import Uniform
from search.places import cache_folder
from search.spec.contents import fingerprint_of
from search.spec.resolve import execution, method_of, variant
from search.spec.study import StudySpec
from search.study.arms import OneShotTask, Task
from search.worker.evaluator import Evaluator, clip_scorer_of, drawn_prompts, reference_of
from search.worker.teachers import (
    described_shape,
    embedded_prompts,
    load_teacher,
    pipeline_of,
    teacher_name,
)
from search.worker.trainer import Report, Step

_SHOWN = 60  # letters of a prompt
CUT = " [...]"  # in place of the rest


@dataclass(frozen=True, eq=False, kw_only=True)
class Assets:
    """A study's shared parts, in one process's memory.

    Attributes:
        spec: The study, or the variant of it that a row trains in.
        fingerprint: The study's.
        method, config: How students are distilled.
        teacher: On the training device.
        dataset: None where nothing needs one; in latents, if students learn from them.
        evaluator: Measures students and teacher.
        terms: What students' metadata take over from the teacher's, such as its licence.
        metadata: Of the teacher's file.
        teacher_fid: The teacher's FID, where the method measures it.
        conditions: What students are trained under; None is the teacher's own kind.
    """

    spec: StudySpec
    fingerprint: str
    method: Method
    config: MethodConfig
    teacher: NetworkDenoiser
    dataset: Dataset | None
    evaluator: Evaluator
    terms: Mapping[str, Any]
    metadata: Mapping[str, Any]
    teacher_fid: FID | None = None
    conditions: Conditions | None = None

    @property
    def drawing_options(self) -> list[str]:
        """Options that ``bdense sample`` needs beside a student."""
        pipeline = pipeline_of(self.spec) if self.evaluator.codec is not None else None
        options = [("--pipeline", pipeline), ("--prompts", drawn_prompts(self.spec))]
        return [str(word) for option in options if option[1] is not None for word in option]

    @property
    def grid_prompts(self) -> list[str]:
        """Prompts of a sample grid's first row; none where images have no prompts."""
        file = drawn_prompts(self.spec)
        if file is None or self.conditions is None:
            return []
        shown = read_prompts(file)[:GRID_COLUMNS]
        return [textwrap.shorten(each, _SHOWN, placeholder=CUT) for each in shown]

    @property
    def device(self) -> torch.device:
        """The device of the teacher and the trials."""
        return next(self.teacher.parameters()).device

    @property
    def device_name(self) -> str:
        """Name of the GPU, or of the CPU's architecture with the threads of a trial."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

    @property
    def devices(self) -> list[torch.device]:
        """A device for each process that shares a trial's batches."""
        if self.device.type != "cuda":
            return [self.device]
        return [torch.device("cuda", index) for index in range(self.spec.resources.team)]

    def of(self, task: Task) -> "Assets":
        """These assets with a row's own variant and latents.

        Raises:
            InputError: The method refuses the variant.
        """
        spec = variant(self.spec, dict(task.variant))
        found = replace(
            self,
            spec=spec,
            config=self.method.Config.read(spec.method.options, "method"),
            evaluator=replace(self.evaluator, latents=task.latents),
        )
        asked = OneShotTask.of(task.params)
        return found if asked is None else found.one_shot(asked)

    def one_shot(self, asked: OneShotTask) -> "Assets":
        """The assets of the one-shot training: its own method, length and latents.

        Raises:
            InputError: The method has no one-shot student.
        """
        box = tuple(Uniform(low, high) for low, high in asked.box.values())
        coordinates = Coordinates(self.spec.weight_space, self.spec.resolved.num_branches, box)
        latents = derive_seed(self.evaluator.latents, Stream.ONE_SHOT) % 2**31
        return replace(
            self,
            method=OneShot(self.method, coordinates),
            config=self.config.for_one_shot(asked.length),
            evaluator=replace(self.evaluator, latents=latents),
        )

    def inputs(self, seed: int) -> Inputs:
        """Everything that the method's stages learn from, besides the teacher."""
        return Inputs(
            dataset=self.dataset,
            seed=seed,
            recordings=recordings_of(self.spec),
            metadata=self.metadata,
            conditions=self.conditions,
        )

    def store(self, seed: int) -> TrajectoryStore | None:
        """Where the teacher's trajectories for that seed lie, recorded or not yet."""
        inputs = self.inputs(seed)
        if inputs.recordings is None:
            return None
        return self.method.recording(self.config, self.teacher, inputs)


def recordings_of(spec: StudySpec) -> Recordings | None:
    """Where a study's trajectories are recorded; None where they are computed anew each time."""
    if spec.trajectories.mode == "live":
        return None
    return Recordings(root=cache_folder() / "trajectories", dtype=spec.trajectories.dtype)


def use_device(spec: StudySpec) -> torch.device:
    """Configure torch as the spec asks, and return the device that trials run on.

    Raises:
        InputError: The spec asks for GPUs, and torch can use none.
    """
    torch.set_num_threads(spec.resources.threads)
    # cuBLAS reads this when it starts; without it some of its kernels refuse to be deterministic.
    if spec.resources.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(spec.resources.deterministic)
    gpus = spec.resources.gpus
    if gpus != 0 and torch.cuda.is_available():
        return torch.device("cuda")
    if gpus not in (0, "auto"):
        cuda = torch.version.cuda
        build = f"is built for CUDA {cuda}" if cuda else "is built without CUDA"
        raise InputError(
            f"resources.gpus is {gpus:g}, and on {platform.node()} torch can use no GPU: torch "
            f"{torch.__version__} {build}; install a torch for that machine's driver (nvidia-smi "
            "names both), or set resources.gpus to 0 to train on CPUs"
        )
    return torch.device("cpu")


def load(spec: StudySpec, device: torch.device, report: Report | None = None) -> Assets:
    """A resolved study's shared parts, made now or read from the cache.

    ``report`` is called with the progress.

    Raises:
        InputError: The device does not compute ``precision``, or a file or name that the user
            gave is missing or does not fit.
    """
    execution(spec).require(device)
    report = report or (lambda *_: None)
    assert spec.data is not None or not spec.uses_data
    dataset = load_dataset(spec.data) if spec.data is not None and spec.uses_data else None
    evaluation = spec.evaluation
    report(Step.FEATURES, 0, 1, evaluation.extractor)
    extractor = load_extractor(evaluation.extractor, cache=cache_folder(), device=device)
    reference = reference_of(spec, dataset, extractor)
    try:
        # Without a data set the teacher's file says the shape.
        shape = dataset.images.shape[1:] if dataset is not None else described_shape(spec)
        require_measurable(
            evaluation.metrics,
            MetricSettings(),
            evaluation.num_images,
            reference,
            tuple(shape),
            extractor,
        )
    except InputError as error:
        raise InputError(
            f"{error} (a study chooses evaluation.images and evaluation.metrics alone)"
        ) from error
    teacher, known = load_teacher(spec, dataset, device, report)
    pipeline = pipeline_of(spec)
    method, config = method_of(spec)
    method.check(config, teacher, known)
    codec, conditions, drawn_under, prompts = None, None, None, None
    if pipeline is not None and draws_latents(teacher, known):
        codec = load_codec(pipeline).to(device)
        if method.needs_data and dataset is not None:
            dataset = _encoded(dataset, spec, pipeline, device, report)
    elif dataset is not None:
        require_shape(dataset, teacher.image_shape)
    if pipeline is not None and spec.prompts is not None:
        conditions = embedded_prompts(pipeline, spec.prompts, report)
        own = spec.evaluation.prompts
        drawn_under = conditions if own is None else embedded_prompts(pipeline, own, report)
        file = own or spec.prompts
        prompts = PromptFile.of(file, read_prompts(file))
    assets = Assets(
        spec=spec,
        fingerprint=spec.fingerprint(),
        method=method,
        config=config,
        teacher=teacher,
        dataset=dataset,
        evaluator=Evaluator(
            spec.evaluation,
            extractor,
            reference,
            spec.seeds.evaluation,
            conditions=drawn_under,
            prompts=prompts,
            codec=codec,
            clip=clip_scorer_of(spec, device),
        ),
        metadata=known,
        terms=inherited(known, teacher_name(spec)),
        conditions=conditions,
    )
    return replace(assets, teacher_fid=_teacher_fid(assets, report))


def _encoded(
    dataset: Dataset, spec: StudySpec, pipeline: Path, device: torch.device, report: Report
) -> Dataset:
    """The data set in the teacher's latents; the study's prompts must be its captions."""
    if spec.prompts is not None:
        captions(len(read_prompts(spec.prompts)), dataset)
    count = len(dataset.images)
    return encode_dataset(
        dataset,
        pipeline,
        cache_folder(),
        device,
        lambda done: report(Step.DATA, done, count, f"of {dataset.name}"),
    )


def _teacher_fid(assets: Assets, report: Report) -> FID | None:
    """The teacher's FID by the method's own sampler: measured once and cached."""
    sampler = assets.method.teacher_sampler(assets.config, assets.teacher)
    if sampler is None:
        return None
    spec, evaluator = assets.spec, assets.evaluator
    key = {
        "teacher": denoiser_sha256(assets.teacher),
        "sampler": evaluator.guided(sampler).describe(),
        "evaluation": {
            "images": spec.evaluation.num_images,
            "extractor": evaluator.extractor.sha256,
            "reference": [
                evaluator.reference.name,
                hashlib.sha256(evaluator.reference.statistics.mu.tobytes()).hexdigest(),
            ],
            "latents": evaluator.latents,
            **({} if evaluator.conditions is None else evaluator.conditions.describe()),
            **({} if evaluator.codec is None else {"codec": evaluator.codec.describe()}),
        },
        "precision": spec.precision,
        "numerics": NUMERICS,
    }
    path = cache_folder() / "teacher-fids" / f"{fingerprint_of(key)}.json"
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            total = spec.evaluation.num_images
            found = evaluator.measure(
                assets.teacher,
                sampler,
                training_seed=None,
                on_image=lambda done: report(
                    Step.TEACHER_FID, done, total, f"at {sampler.nfe} evaluations"
                ),
                check=lambda: None,
                grid_path=path.with_suffix(".png"),
            )
            write_json(path, found.fid.as_dict())
        return FID.read(json.loads(path.read_text()))
