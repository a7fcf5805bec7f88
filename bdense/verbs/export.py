"""``bdense export``: write a student as a folder: diffusers' pipeline, adapters, or a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.pictures import save_grid
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.files import require_new
from bdense.knobs import KnobError
from bdense.metrics.classifiers import add_classifier
from bdense.metrics.records import FID
from bdense.models.card import EXAMPLE_PROMPTS
from bdense.models.diffusers_export import add_pipeline, export_pipeline
from bdense.models.folder import SAMPLE_COUNT, SAMPLE_SEED, SAMPLES, Picture, export_folder
from bdense.models.hub import HubRepository, pushable_later
from bdense.models.latents import draws_latents
from bdense.models.lora_export import export_lora
from bdense.models.store import load_stored
from bdense.verbs.common import chosen_device
from bdense.verbs.options import Cache, Drawing, ExportOptions, Hardware
from bdense.verbs.sample import chosen_drawer, missing_pipeline


def export(own: ExportOptions, kept: Cache, hardware: Hardware) -> None:
    """Run the verb."""
    device = chosen_device(hardware)
    if own.push is not None and own.lora:
        raise KnobError("push", "uploads whole models; drop it, or `lora`")
    hub = None if own.push is None else HubRepository(own.push)
    if hub is not None:
        hub.require_new()
    student, metadata = load_stored(own.student)
    if not student.samplers:
        raise InputError(f"{own.student} is a teacher; draw with its own pipeline instead")
    if own.pipeline is None and draws_latents(student, metadata):
        raise missing_pipeline(own.student)
    metadata.pop("identity", None)
    if hub is not None:
        with pushable_later(own.out, own.push):
            require_new(own.out)
        _export_model(own, student, metadata, kept.cache, device)
    elif own.lora:
        if own.pipeline is None:
            raise KnobError(
                "lora", f"is for a student of latents, and {own.student} draws pixels; drop it"
            )
        export_lora(own.out, student, metadata, teacher=own.pipeline)
    else:
        export_pipeline(own.out, student, metadata, teacher=own.pipeline)
    print(own.out)
    if hub is not None:
        with pushable_later(own.out, own.push):
            print(hub.push(own.out))


def _export_model(
    own: ExportOptions,
    student: NetworkDenoiser,
    metadata: Mapping[str, Any],
    cache: Path,
    device: torch.device,
) -> None:
    """Write a model folder, with what it takes to measure its FID again."""

    def finish(folder: Path) -> None:
        add_pipeline(folder, student, metadata, teacher=own.pipeline)
        if (fid := metadata.get("fid")) is not None:
            add_classifier(folder, FID.read(fid), cache)

    def samples(path: Path) -> None:
        prompts = [*EXAMPLE_PROMPTS] if student.model.text_dim else []
        drawing = Drawing(pipeline=own.pipeline)
        drawer = chosen_drawer(own.student, drawing, prompts, device, Execution(), cache=cache)
        save_grid(drawer.draw(SAMPLE_COUNT, SAMPLE_SEED), path)

    pictures: dict[str, Picture] = {}
    if draws_latents(student, metadata):
        pictures[SAMPLES] = samples
    export_folder(own.out, student, metadata, pictures=pictures, finish=finish)
