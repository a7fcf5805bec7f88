"""A study's teacher: read, or trained once and cached; its pipeline, and prompts for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdense import NUMERICS
from bdense.data.datasets import Dataset
from bdense.data.prompts import read_prompts
from bdense.diffusion.conditions import Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.files import UNFINISHED, atomic_write, file_lock, sha256_model
from bdense.models.diffusers_files import folder_of
from bdense.models.latents import (
    TEXT_ENCODER,
    TOKENIZER,
    TextEncoder,
    drawn_shape,
    load_text_encoder,
)
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

_PROMPTS_AT_ONCE = 256


def load_teacher(
    spec: StudySpec, dataset: Dataset | None, device: torch.device, report: Report
) -> tuple[NetworkDenoiser, Mapping[str, Any]]:
    """The teacher, set to the spec's precision, and its metadata."""
    if spec.teacher.recipe is not None:
        report(Step.TEACHER, 0, 1, f"{spec.teacher.recipe}, made once")
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
    return cache_folder() / "teachers" / f"{dataset.name}-{fingerprint_of(key)}.safetensors"


def _train_and_cache(
    training: TeacherTraining, dataset: Dataset, device: torch.device, path: Path, report: Report
) -> None:
    unfinished = path.with_suffix(UNFINISHED)
    config = teacher_config(training)
    # The number of threads decides the last bits; trials have their own.
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    teacher = train_teacher(
        dataset,
        config,
        device=device,
        checkpoint=unfinished,
        on_iteration=lambda done, total, loss: report(
            Step.TEACHER, done, total, f"loss {loss:.3f}"
        ),
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
    """A file's prompts as the teacher reads them; guidance leads away from the empty one.

    They are embedded once and kept: a worker maps the file, and reads the rows that it needs.
    """
    texts = [*read_prompts(file), ""]
    parts = [sha256_model(pipeline / part) for part in (TEXT_ENCODER, TOKENIZER)]
    path = cache_folder() / "prompts" / f"{fingerprint_of({'texts': texts, 'by': parts})}.npy"
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
            report(Step.PROMPTS, min(some.stop, len(texts)), len(texts), remark)
        rows.flush()
