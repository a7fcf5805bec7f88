"""Students as low-rank adapters of their teachers (LoRA), which diffusers loads.

What training by adapters changed of a layer is a product B A, found again as the singular vectors
of the difference of the weights: of the adapters' rank in attention, and in the head, which is
trained in full, of one row for each output channel. Needs the ``diffusers`` and ``lora`` extras.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError, listed
from bdense.files import require_new
from bdense.models.diffusers_export import write_pipeline
from bdense.models.diffusers_files import LORA_WEIGHTS, folder_of, public_name
from bdense.models.diffusers_teacher import read_diffusers
from bdense.models.folder import measured_sampler, require_one_branch
from bdense.models.latent_pipeline import latent_pipeline

_PIPELINE = "StableDiffusionPipeline"


def export_lora(
    folder: Path, denoiser: NetworkDenoiser, metadata: Mapping[str, Any], *, teacher: str | Path
) -> tuple[Path, ...]:
    """Write a student of Stable Diffusion as adapters; the folder appears whole or not at all.

    ``pipeline.load_lora_weights(folder)`` makes the student's network of the teacher's, and the
    scheduler in the folder takes its steps, as in the card.

    Args:
        denoiser: A student of one branch, trained with ``lora_rank``.
        teacher: Folder or hub id of the pipeline that it is a student of.

    Returns:
        The files.

    Raises:
        InputError: The folder exists, the student differs from the teacher in what no adapter
            holds, or is another kind of network; checked before anything is written.
    """
    folder = Path(folder)
    require_new(folder)
    require_one_branch(denoiser)
    place = folder_of(teacher)
    pipeline = latent_pipeline(denoiser, measured_sampler(metadata), place)
    if pipeline.name != _PIPELINE:
        raise InputError(
            f"{pipeline.name} loads no adapters, only {_PIPELINE} does; export the student as a "
            "whole pipeline, without lora"
        )
    adapters = _adapters(denoiser, read_diffusers(teacher, place)[0])
    known = {"teacher": public_name(teacher, place), **metadata}

    def write(scratch: Path) -> None:
        from diffusers import StableDiffusionPipeline

        StableDiffusionPipeline.save_lora_weights(
            scratch, unet_lora_layers=adapters, weight_name=LORA_WEIGHTS
        )
        pipeline.write_scheduler(scratch)

    return write_pipeline(folder, denoiser, known, pipeline, write, lora=True)


def low_rank(change: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """B [m, r] and A [r, n] whose product is a change of weights [m, n], float64.

    The rank r is the least that leaves no more than ``rounding`` of it, by Frobenius' norm.
    """
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    # What is left without the first r values, for r = 0, 1, ...
    rest = values.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = int((rest > rounding).sum())
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _adapters(student: NetworkDenoiser, teacher: NetworkDenoiser) -> dict[str, Tensor]:
    """lora_A and lora_B of each layer that differs, all of the highest rank found."""
    if student.model.describe() != teacher.model.describe():
        raise InputError(
            "the student's network has another size than the teacher's; give the pipeline that it "
            "was distilled from"
        )
    before, pairs, others = teacher.state_dict(), {}, []
    for name, weight in student.state_dict().items():
        if torch.equal(weight, before[name]):
            continue
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or weight.dim() not in (2, 4):
            others.append(name)
            continue
        was = before[name].double().flatten(1)
        # Merged weights are rounded to float32.
        rounding = torch.finfo(torch.float32).eps * float(was.norm())
        b, a = low_rank(weight.double().flatten(1) - was, rounding)
        pairs[layer.removeprefix(f"model.{student.model.part}.")] = (b, a, weight.shape)
    if others:
        raise InputError(
            f"{len(others)} of the student's weights have changed and are in no adapter: "
            f"{listed(others)}; distil it with lora_rank from this teacher, or export the whole "
            "pipeline"
        )
    if not pairs:
        raise InputError("the student is its teacher; train it first")
    rank = max(1, *(a.shape[0] for _, a, _ in pairs.values()))
    found = {}
    for layer, (b, a, shape) in pairs.items():
        # One rank for all layers: their scale, alpha / rank, is 1 in every version of diffusers.
        padded = torch.zeros(rank, a.shape[1]), torch.zeros(b.shape[0], rank)
        padded[0][: len(a)], padded[1][:, : b.shape[1]] = a, b
        kernel = shape[2:]
        found[f"{layer}.lora_A.weight"] = padded[0].reshape(rank, *shape[1:])
        found[f"{layer}.lora_B.weight"] = padded[1].reshape(*padded[1].shape, *(1 for _ in kernel))
    return found
