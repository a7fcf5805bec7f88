"""What every trial of a study shares: teacher, trajectories, extractor, reference statistics.

Made once, under locks, cached under the runs folder, and read by all workers.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset, load_dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.files import file_lock
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.trajectories import LiveTrajectories, Trajectories
from bdense.metrics.extractors import Extractor, load_extractor
from bdense.metrics.metrics import MetricSettings, require_measurable
from bdense.metrics.references import Reference, dataset_reference, read_reference
from bdense.models.cards import inherited
from bdense.models.public import resolve_reference
from bdense.models.sources import load_model
from bdense.models.store import denoiser_sha256, load_denoiser, save_denoiser
from bdense.training.teacher import teacher_data, train_teacher
from search.spec.model_spec import ModelSpec, TeacherTraining
from search.spec.study_spec import StudySpec
from search.storage.engine import cache_folder
from search.worker.engine import (
    architecture,
    execution,
    student_grid,
    teacher_config,
    teacher_solver,
    training_config,
)
from search.worker.memory import trial_memory

# Called with what is being made, how much is done, of how much, and a remark.
Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True, eq=False)
class Assets:
    """A study's shared parts, in one process's memory.

    ``terms`` is what its students' metadata take over from the teacher's: licence and such.
    """

    spec: StudySpec
    fingerprint: str
    teacher: NetworkDenoiser
    trajectories: Trajectories
    store: TrajectoryStore | None
    extractor: Extractor
    reference: Reference
    terms: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """Where trials run."""
        return next(self.teacher.parameters()).device

    @property
    def devices(self) -> list[torch.device]:
        """One for each process that shares a trial's batches."""
        if self.device.type != "cuda":
            return [self.device]
        return [torch.device("cuda", index) for index in range(self.spec.resources.team)]


def use_device(spec: ModelSpec, *, foretold: bool = False) -> torch.device:
    """Set this process up as the spec asks, and say where its trials run.

    Args:
        spec: Of the trials.
        foretold: They run elsewhere or later: the CPU does for GPUs that are not here.

    Raises:
        InputError: The spec asks for a number of GPUs, which its trials hold here, and torch can
            use none.
    """
    torch.set_num_threads(spec.resources.threads)
    # cuBLAS reads this when it starts; without it some of its kernels refuse to be deterministic.
    if spec.resources.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(spec.resources.deterministic)
    gpus = spec.resources.gpus
    if gpus != 0 and torch.cuda.is_available():
        return torch.device("cuda")
    if gpus not in (0, "auto") and not foretold:
        cuda = torch.version.cuda
        build = f"is built for CUDA {cuda}" if cuda else "is built without CUDA"
        raise InputError(
            f"resources.gpus is {gpus:g}, and on {platform.node()} torch can use no GPU: torch "
            f"{torch.__version__} {build}; install a torch for that machine's driver (nvidia-smi "
            "names both), or set resources.gpus to 0 to train on CPUs"
        )
    return torch.device("cpu")


def prepare(
    spec: StudySpec, device: torch.device, report: Report, *, together: int | None = None
) -> None:
    """Make teacher, extractor and what is known of the reference, or find them in the cache.

    Args:
        spec: The study.
        device: Where its trials run.
        report: Called with the progress.
        together: Trials at once on this machine, whose memory is then to suffice for them; None
            asks for no room.

    Raises:
        InputError: The device does not compute ``precision``, has too little memory, or something
            the user gave cannot be had or does not fit.
    """
    execution(spec).require(device)
    if together is not None:
        memory = trial_memory(spec, architecture(spec), device)
        memory.require_room(spec, device, together)
    teacher = prepare_models(spec, device, report)
    if spec.trajectories.mode == "recorded":
        trajectory_store(spec, teacher).require_room(round(spec.trajectories.max_gib * 2**30))


def prepare_models(spec: ModelSpec, device: torch.device, report: Report) -> NetworkDenoiser:
    """Make extractor and reference, and the teacher, which is returned.

    Raises:
        InputError: Something the user gave cannot be had or does not fit.
    """
    dataset, evaluation = load_data(spec), spec.evaluation
    report("features", 0, 1, evaluation.extractor)
    extractor = load_extractor(evaluation.extractor, cache=cache_folder(), device=device)
    reference = load_reference(spec, dataset, extractor)
    try:
        require_measurable(evaluation.metrics, MetricSettings(), evaluation.images, reference)
    except InputError as error:
        raise InputError(
            f"{error} (a study chooses evaluation.images and evaluation.metrics alone)"
        ) from error
    teacher = load_teacher(spec, dataset, device, report)
    if dataset is not None and tuple(teacher.image_shape) != tuple(dataset.images.shape[1:]):
        raise InputError(
            f"the teacher makes images of {teacher.image_shape} (channels, height, width) and "
            f"{spec.data} holds {tuple(dataset.images.shape[1:])}; choose another data or teacher"
        )
    return teacher


def load(spec: StudySpec, device: torch.device, *, record: bool = False) -> Assets:
    """Everything ``prepare`` and the recording made, from the cache.

    Args:
        spec: The study.
        device: Where its trials run.
        record: Record what is missing of the trajectories, in place of refusing to go on.
    """
    dataset = load_data(spec)
    teacher, terms = teacher_and_terms(spec, dataset, device)
    extractor = load_extractor(spec.evaluation.extractor, cache=cache_folder(), device=device)
    store = trajectory_store(spec, teacher)
    recorded = spec.trajectories.mode == "recorded"
    if recorded and record and store.missing():
        store.record()
    return Assets(
        spec=spec,
        fingerprint=spec.fingerprint(),
        teacher=teacher,
        trajectories=store.open() if recorded else store.live,
        store=store if recorded else None,
        extractor=extractor,
        reference=load_reference(spec, dataset, extractor),
        terms=terms,
    )


def load_data(spec: ModelSpec) -> Dataset | None:
    """The study's data set; None where teacher and reference are there without it."""
    if not spec.uses_data:
        return None
    assert spec.data is not None  # a spec that uses data names it
    return load_dataset(spec.data)


def load_reference(spec: ModelSpec, dataset: Dataset | None, extractor: Extractor) -> Reference:
    """What the study's images are compared with: its file, or its data set seen once."""
    if spec.evaluation.reference is not None:
        return read_reference(resolve_reference(spec.evaluation.reference), extractor)
    assert dataset is not None
    with_features = set(spec.evaluation.metrics) != {"fid"}
    return dataset_reference(dataset, extractor, cache=cache_folder(), with_features=with_features)


def load_teacher(
    spec: ModelSpec, dataset: Dataset | None, device: torch.device, report: Report | None = None
) -> NetworkDenoiser:
    """The study's teacher: its checkpoint, or trained here once and cached."""
    return teacher_and_terms(spec, dataset, device, report)[0]


def teacher_and_terms(
    spec: ModelSpec, dataset: Dataset | None, device: torch.device, report: Report | None = None
) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """The teacher, which computes as the spec asks, and what students' metadata take over."""
    teacher, known = _stored_teacher(spec, dataset, device, report)
    terms = inherited(known, Path(spec.teacher.checkpoint or f"trained on {spec.data}").name)
    # For float32 too: by itself torch has a GPU round the products of convolutions.
    return teacher.to(device).execute(execution(spec)), terms


def _stored_teacher(
    spec: ModelSpec, dataset: Dataset | None, device: torch.device, report: Report | None
) -> tuple[NetworkDenoiser, dict[str, Any]]:
    if spec.teacher.checkpoint is not None:
        return load_model(spec.teacher.checkpoint)
    assert spec.teacher.train is not None
    assert dataset is not None
    path = _teacher_path(spec.teacher.train, dataset)
    if not path.exists():
        with file_lock(path.with_suffix(".lock")):
            if not path.exists():
                _train_and_cache(spec.teacher.train, dataset, device, path, report)
    return load_denoiser(path)


def trajectory_store(spec: StudySpec, teacher: NetworkDenoiser) -> TrajectoryStore:
    """Where the teacher's trajectories for this study lie, recorded or not yet."""
    live = LiveTrajectories(
        teacher=teacher,
        grid=student_grid(spec),
        solver=teacher_solver(spec),
        batch=spec.budget.batch,
        count=training_config(spec).num_updates,
        seed=spec.seeds.training,
    )
    return TrajectoryStore(live, cache_folder() / "trajectories", spec.trajectories.dtype)


def _teacher_path(training: TeacherTraining, dataset: Dataset) -> Path:
    config = teacher_config(training)
    key = {
        "config": config.as_dict(),
        "threads": training.threads,
        **teacher_data(config, dataset),
        "numerics": NUMERICS,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "teachers" / f"{dataset.name}-{digest}.safetensors"


def _train_and_cache(
    training: TeacherTraining,
    dataset: Dataset,
    device: torch.device,
    path: Path,
    report: Report | None,
) -> None:
    unfinished = path.with_suffix(".training.safetensors")

    def on_iteration(done: int, total: int, loss: float) -> None:
        if report is not None:
            report("teacher", done, total, f"loss {loss:.3f}")

    config = teacher_config(training)
    # Of its own: the threads decide the last bits, and the trials have theirs.
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    teacher = train_teacher(
        dataset, config, device=device, checkpoint=unfinished, on_iteration=on_iteration
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
