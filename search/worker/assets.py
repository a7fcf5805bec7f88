"""What a study's rows share: teacher, trajectories, extractor, reference statistics.

Made once, under locks, cached under the runs folder, and read by all workers.
"""

import hashlib
import json
import os
import platform
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset, load_dataset
from bdense.data.encoded import encode_dataset
from bdense.diffusion.codecs import Codec
from bdense.diffusion.conditions import Conditions, Prompts, captions
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.sampling import GRID_COLUMNS, Sampler, draw_images, save_grid
from bdense.errors import InputError
from bdense.files import atomic_write, file_lock, sha256_model
from bdense.methods import METHODS
from bdense.methods.method import Inputs, Method, MethodConfig, Recordings, require_shape
from bdense.methods.one_shot import Coordinates, OneShot
from bdense.methods.recordings import TrajectoryStore
from bdense.metrics.clip_score import CLIPScorer, load_clip_scorer
from bdense.metrics.extractors import Extractor, load_extractor
from bdense.metrics.metrics import measure_images, require_measurable
from bdense.metrics.records import FID, Metrics, PromptFile
from bdense.metrics.references import Reference, dataset_reference, read_reference
from bdense.metrics.settings import MetricSettings
from bdense.metrics.setup import Setup
from bdense.models.card import inherited
from bdense.models.diffusers_files import folder_of
from bdense.models.latents import (
    TEXT_ENCODER,
    TOKENIZER,
    TextEncoder,
    drawn_shape,
    draws_latents,
    load_codec,
    load_text_encoder,
    read_prompts,
)
from bdense.models.store import denoiser_sha256, load_denoiser, load_stored, save_denoiser
from bdense.models.zoo import CONVERTED_CHECKPOINTS, HUB_CHECKPOINTS, resolve_reference
from bdense.randomness import Stream, derive_seed
from bdense.training.latent_digits import latent_digits
from bdense.training.teacher import teacher_data, train_teacher
from bdense.weights.space import Uniform
from search.spec.resolve import describe_teacher, execution, teacher_config, variant
from search.spec.sections import EvaluationSpec, TeacherTraining
from search.spec.study import StudySpec
from search.storage.engine import cache_folder
from search.study.arms import ONE_SHOT, Task
from search.worker.trainer import Report

_GRID_IMAGES = 64
_SHOWN = 60  # letters of a prompt
CUT = " [...]"  # in place of the rest
_PROMPTS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures every model of a study under the same conditions, from the same latents.

    Attributes:
        spec: Number of images, and the metrics.
        extractor: Feature network, also of the reference.
        reference: What images are compared with.
        latents: Seed of the noise that images are drawn from.
        conditions: What images are drawn under, such as prompts; None is the model's own kind.
        prompts: What the conditions are made of; None where they are none.
        codec: What makes images of latents; None where models draw images.
        clip: Scores images against their prompts; None does not.
    """

    spec: EvaluationSpec
    extractor: Extractor
    reference: Reference
    latents: int
    conditions: Conditions | None = None
    prompts: PromptFile | None = None
    codec: Codec | None = None
    clip: CLIPScorer | None = None

    def measure(
        self,
        denoiser: NetworkDenoiser,
        sampler: Sampler,
        *,
        training_seed: int | None,
        on_image: Callable[[int], None],
        check: Callable[[], None],
        images: int | None = None,
        grid_path: Path | None = None,
    ) -> Metrics:
        """Draw a model's images and measure them.

        Args:
            denoiser: A student, or the teacher.
            sampler: How it draws.
            training_seed: The student's; None for a teacher, which rows of all seeds share.
            on_image: Called with the number of images drawn so far.
            check: Called for every batch of images drawn or measured; an error of its ends the
                work.
            images: Number of images of an intermediate evaluation, which measures the FID alone;
                None is the study's.
            grid_path: Where a grid of the first 64 images goes; None writes none.

        Raises:
            NonFiniteError: An image, a feature or a distance is not finite.
        """

        def on_drawn(done: int) -> None:
            check()
            on_image(done)

        sampler = self.guided(sampler)
        drawn = draw_images(
            denoiser,
            sampler,
            images or self.spec.num_images,
            seed=self.latents,
            batch=self.spec.batch,
            conditions=self.conditions,
            codec=self.codec,
            on_image=on_drawn,
        )
        if grid_path is not None:
            save_grid(drawn[:_GRID_IMAGES], grid_path)
        trained = {} if training_seed is None else {"training": training_seed}
        return measure_images(
            drawn,
            self.extractor,
            self.reference,
            metrics=self.spec.metrics if images is None else ("fid",),
            nfe=sampler.nfe,
            seeds={**trained, "evaluation": self.latents},
            prompts=self.prompts,
            clip=self.clip if images is None else None,
            on_image=lambda _: check(),
        )

    def guided(self, sampler: Sampler) -> Sampler:
        """The sampler at the study's guidance, where it has one of its own when sampling."""
        scale = self.spec.guidance
        return sampler if scale is None else replace(sampler, guidance=scale)

    def setup(self, denoiser: NetworkDenoiser) -> Setup:
        """What a model's FID is measured with, in this process."""
        found = Setup.of(denoiser, self.reference, self.spec.batch, NUMERICS)
        return replace(found, guidance=self.spec.guidance)


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
        known: Metadata of the teacher's file.
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
    known: Mapping[str, Any]
    teacher_fid: FID | None = None
    conditions: Conditions | None = None

    @property
    def drawing_options(self) -> list[str]:
        """What ``bdense sample`` needs beside a student."""
        asked = self.spec.evaluation
        pipeline = pipeline_of(self.spec) if self.evaluator.codec is not None else None
        options = {
            "--pipeline": pipeline,
            "--prompts": asked.prompts or self.spec.prompts,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return [str(word) for option in given.items() for word in option]

    @property
    def grid_prompts(self) -> list[str]:
        """Of the first row of a sample grid; none where images have no prompts."""
        file = self.spec.evaluation.prompts or self.spec.prompts
        if file is None or self.conditions is None:
            return []
        shown = read_prompts(file)[:GRID_COLUMNS]
        return [textwrap.shorten(each, _SHOWN, placeholder=CUT) for each in shown]

    @property
    def device(self) -> torch.device:
        """Where trials run."""
        return next(self.teacher.parameters()).device

    @property
    def device_name(self) -> str:
        """The GPU, or the machine's kind and the threads of a trial."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

    @property
    def devices(self) -> list[torch.device]:
        """One for each process that shares a trial's batches."""
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
        asked = task.params.get(ONE_SHOT)
        return found if asked is None else found.one_shot(asked)

    def one_shot(self, asked: Mapping[str, Any]) -> "Assets":
        """For the study's one-shot training: method, length, and latents of its own.

        Args:
            asked: What the arm's ``one_shot`` holds, see ``search.study.arms.one_shot_arm``.

        Raises:
            InputError: The method has no one-shot student.
        """
        box = tuple(Uniform(low, high) for low, high in asked["box"].values())
        coordinates = Coordinates(self.spec.weight_space, self.spec.resolved.num_branches, box)
        latents = derive_seed(self.evaluator.latents, Stream.ONE_SHOT) % 2**31
        return replace(
            self,
            method=OneShot(self.method, coordinates),
            config=self.config.told(asked["length"]),
            evaluator=replace(self.evaluator, latents=latents),
        )

    def inputs(self, seed: int) -> Inputs:
        """What the method's stages learn from, besides the teacher."""
        recorded = self.spec.trajectories.mode == "recorded"
        root, dtype = cache_folder() / "trajectories", self.spec.trajectories.dtype
        return Inputs(
            dataset=self.dataset,
            seed=seed,
            recordings=Recordings(root=root, dtype=dtype) if recorded else None,
            known=self.known,
            conditions=self.conditions,
        )

    def store(self, seed: int) -> TrajectoryStore | None:
        """Where the teacher's trajectories for that seed lie, recorded or not yet."""
        inputs = self.inputs(seed)
        if inputs.recordings is None:
            return None
        return self.method.recording(self.config, self.teacher, inputs)


def use_device(spec: StudySpec) -> torch.device:
    """Configure torch as the spec asks; the device that trials run on.

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
    """Teacher, extractor, reference and the teacher's FID, made now or read from the cache.

    Args:
        spec: The study, resolved.
        device: Where its trials run.
        report: Called with the progress.

    Raises:
        InputError: The device does not compute ``precision``, or a file or name that the user
            gave is missing or does not fit.
    """
    execution(spec).require(device)
    report = report or (lambda *_: None)
    assert spec.data is not None or not spec.uses_data
    dataset = load_dataset(spec.data) if spec.data is not None and spec.uses_data else None
    evaluation = spec.evaluation
    report("features", 0, 1, evaluation.extractor)
    extractor = load_extractor(evaluation.extractor, cache=cache_folder(), device=device)
    reference = _reference(spec, dataset, extractor)
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
    teacher, known = _teacher(spec, dataset, device, report)
    pipeline = pipeline_of(spec)
    method = METHODS[spec.method.name]()
    config = method.Config.read(spec.method.options, "method")
    method.check(config, teacher, known)
    codec, conditions, drawn_under, prompts = None, None, None, None
    if pipeline is not None and draws_latents(teacher, known):
        codec = load_codec(pipeline).to(device)
        if method.needs_data and dataset is not None:
            dataset = _encoded(dataset, spec, pipeline, device, report)
    elif dataset is not None:
        require_shape(dataset, teacher)
    if pipeline is not None and spec.prompts is not None:
        conditions = _prompts(pipeline, spec.prompts, report)
        own = spec.evaluation.prompts
        drawn_under = conditions if own is None else _prompts(pipeline, own, report)
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
            clip=_clip_scorer(spec, device),
        ),
        known=known,
        terms=inherited(known, _teacher_name(spec)),
        conditions=conditions,
    )
    return replace(assets, teacher_fid=_teacher_fid(assets, report))


def _teacher_name(spec: StudySpec) -> str:
    """For cards, where the teacher's own file does not say."""
    name = spec.teacher.checkpoint or spec.teacher.recipe
    return f"trained on {spec.data}" if name is None else Path(name).name


def described_shape(spec: StudySpec) -> tuple[int, int, int]:
    """(C, H, W) of the teacher's images."""
    described, known = describe_teacher(spec)
    with torch.device("meta"):
        return drawn_shape(build_denoiser(described), known)


def pipeline_of(spec: StudySpec) -> Path | None:
    """The folder of the teacher's pipeline in diffusers' format; None where it has none."""
    if spec.teacher.recipe is not None:
        return latent_digits(cache_folder())
    checkpoint = spec.teacher.checkpoint
    if checkpoint is None:
        return None
    if checkpoint in CONVERTED_CHECKPOINTS:
        return CONVERTED_CHECKPOINTS[checkpoint].fetch()
    if checkpoint in HUB_CHECKPOINTS:
        return folder_of(checkpoint)
    return Path(checkpoint) if Path(checkpoint).is_dir() else None


def _encoded(
    dataset: Dataset, spec: StudySpec, pipeline: Path, device: torch.device, report: Report
) -> Dataset:
    """The data set in the teacher's latents, whose captions the study's prompts must be."""
    if spec.prompts is not None:
        captions(len(read_prompts(spec.prompts)), dataset)
    count = len(dataset.images)
    return encode_dataset(
        dataset,
        pipeline,
        cache_folder(),
        device,
        lambda done: report("latents", done, count, f"of {dataset.name}"),
    )


def _clip_scorer(spec: StudySpec, device: torch.device) -> CLIPScorer | None:
    if (model := spec.evaluation.clip_score) is None:
        return None
    file = spec.evaluation.prompts or spec.prompts
    return load_clip_scorer(model, [] if file is None else read_prompts(file), device)


def _prompts(pipeline: Path, file: str, report: Report) -> Prompts:
    """A file's prompts as the teacher reads them; guidance leads away from the empty one.

    They are embedded once and kept: a worker maps the file, and reads the rows that it needs.
    """
    texts = [*read_prompts(file), ""]
    parts = [sha256_model(pipeline / part) for part in (TEXT_ENCODER, TOKENIZER)]
    path = cache_folder() / "prompts" / f"{_digest({'texts': texts, 'by': parts})}.npy"
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            _embed(load_text_encoder(pipeline), texts, path, report)
    rows = torch.from_numpy(np.load(path, mmap_mode="c"))
    return Prompts(rows[:-1], rows[-1:])


def _embed(encoder: TextEncoder, texts: Sequence[str], path: Path, report: Report) -> None:
    cut = len(encoder.too_long(texts))
    remark = f"{cut} longer than {encoder.length} tokens, cut" if cut else ""
    shape = (len(texts), encoder.length, encoder.width)
    with atomic_write(path) as scratch:
        rows = np.lib.format.open_memmap(scratch, "w+", "float32", shape)
        for first in range(0, len(texts), _PROMPTS_AT_ONCE):
            some = slice(first, first + _PROMPTS_AT_ONCE)
            rows[some] = encoder.embed(texts[some]).numpy()
            report("prompts", min(some.stop, len(texts)), len(texts), remark)
        rows.flush()


def _reference(spec: StudySpec, dataset: Dataset | None, extractor: Extractor) -> Reference:
    """Statistics of the study's reference file, or of its data set."""
    if spec.evaluation.reference is not None:
        return read_reference(resolve_reference(spec.evaluation.reference), extractor)
    assert dataset is not None
    with_features = set(spec.evaluation.metrics) != {"fid"}
    return dataset_reference(dataset, extractor, cache=cache_folder(), with_features=with_features)


def _teacher(
    spec: StudySpec, dataset: Dataset | None, device: torch.device, report: Report
) -> tuple[NetworkDenoiser, Mapping[str, Any]]:
    """The teacher, set to the spec's precision, and its metadata."""
    if spec.teacher.recipe is not None:
        report("teacher", 0, 1, f"{spec.teacher.recipe}, made once")
        teacher, known = load_stored(latent_digits(cache_folder()))
    elif spec.teacher.checkpoint is not None:
        teacher, known = load_stored(spec.teacher.checkpoint)
    else:
        assert spec.teacher.train is not None
        assert dataset is not None
        path = _teacher_path(spec.teacher.train, dataset)
        if not path.exists():
            with file_lock(path.with_suffix(".lock")):
                if not path.exists():
                    _train_and_cache(spec.teacher.train, dataset, device, path, report)
        teacher, known = load_denoiser(path)
    # For float32 too: by default torch lets a GPU compute convolutions in TF32.
    return teacher.to(device).execute(execution(spec)), known


def _teacher_path(training: TeacherTraining, dataset: Dataset) -> Path:
    config = teacher_config(training)
    key = {
        "config": config.as_dict(),
        "threads": training.threads,
        **teacher_data(config, dataset),
        "numerics": NUMERICS,
    }
    return cache_folder() / "teachers" / f"{dataset.name}-{_digest(key)}.safetensors"


def _train_and_cache(
    training: TeacherTraining, dataset: Dataset, device: torch.device, path: Path, report: Report
) -> None:
    unfinished = path.with_suffix(".training.safetensors")
    config = teacher_config(training)
    # The number of threads decides the last bits; trials have their own.
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    teacher = train_teacher(
        dataset,
        config,
        device=device,
        checkpoint=unfinished,
        on_iteration=lambda done, total, loss: report("teacher", done, total, f"loss {loss:.3f}"),
    )
    torch.set_num_threads(threads)
    metadata = {
        "kind": "teacher",
        "data": dataset.name,
        "data_sha256": dataset.sha256,
        "training": config.as_dict(),
        "weights_sha256": denoiser_sha256(teacher),
    }
    save_denoiser(path, teacher, metadata)
    unfinished.unlink(missing_ok=True)


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
    path = cache_folder() / "teacher-fids" / f"{_digest(key)}.json"
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            total = spec.evaluation.num_images
            found = evaluator.measure(
                assets.teacher,
                sampler,
                training_seed=None,
                on_image=lambda done: report(
                    "teacher FID", done, total, f"at {sampler.nfe} evaluations"
                ),
                check=lambda: None,
                grid_path=path.with_suffix(".png"),
            )
            with atomic_write(path) as scratch:
                scratch.write_text(json.dumps(found.fid.as_dict()))
        return FID.read(json.loads(path.read_text()))


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
