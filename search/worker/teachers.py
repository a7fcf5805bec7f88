"""A study's teacher: read, or trained once and cached; its pipeline, and prompts for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset
from bdense.data.encoded import embed_prompts
from bdense.data.prompts import read_prompts
from bdense.diffusion.conditions import Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.files import UNFINISHED, file_lock
from bdense.models.diffusers_files import folder_of
from bdense.models.latents import drawn_shape
from bdense.models.store import denoiser_sha256, load_denoiser, load_stored, save_denoiser
from bdense.models.zoo import CONVERTED_CHECKPOINTS, HUB_CHECKPOINTS
from bdense.training.latent_digits import latent_digits
from bdense.training.teacher import teacher_data, train_teacher
from search.places import cache_folder
from search.spec.contents import fingerprint_of
from search.spec.resolve import execution, meta_teacher, teacher_config
from search.spec.sections import TeacherTraining
from search.spec.study import StudySpec
from search.worker.trainer import Report, Step


def load_teacher(
    spec: StudySpec, dataset: Dataset | None, device: torch.device, report: Report
) -> tuple[NetworkDenoiser, Mapping[str, Any]]:
    """The teacher, set to the spec's precision, and its metadata."""
    if spec.teacher.recipe is not None:
        report(Step.TEACHER, 0, 1, f"{spec.teacher.recipe}, made once")
        teacher, known = load_stored(latent_digits(cache_folder()))
    elif spec.teacher.checkpoint is not None:
        teacher, known = load_stored(spec.teacher.checkpoint)
        for part in known.get("ignored", ()):
            report(Step.LOADING, 1, 1, f"its {part} is not loaded")
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
    return cache_folder() / "teachers" / f"{dataset.name}-{fingerprint_of(key)}.safetensors"


def _train_and_cache(
    training: TeacherTraining, dataset: Dataset, device: torch.device, path: Path, report: Report
) -> None:
    unfinished = path.with_suffix(UNFINISHED)
    config = teacher_config(training)
    # The number of threads decides the last bits; trials have their own.
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    try:
        teacher = train_teacher(
            dataset,
            config,
            device=device,
            checkpoint=unfinished,
            on_iteration=lambda done, total, loss: report(
                Step.TEACHER, done, total, f"loss {loss:.3f}"
            ),
        )
    finally:
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


def teacher_name(spec: StudySpec) -> str:
    """A name for cards, where the teacher's own file does not say."""
    name = spec.teacher.checkpoint or spec.teacher.recipe
    return f"trained on {spec.data}" if name is None else Path(name).name


def described_shape(spec: StudySpec) -> tuple[int, int, int]:
    """(C, H, W) of the teacher's images."""
    return drawn_shape(*meta_teacher(spec))


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


def embedded_prompts(pipeline: Path, file: str, report: Report) -> Prompts:
    """A file's prompts as the teacher reads them; guidance leads away from the empty one."""
    texts = read_prompts(file)

    def embedded(done: int, cut: int) -> None:
        remark = f"{cut} longer than the encoder reads, cut" if cut else ""
        report(Step.PROMPTS, done, len(texts) + 1, remark)

    return embed_prompts(texts, pipeline, cache_folder(), on_prompt=embedded)
