"""Students of latents as pipelines of diffusers: the teacher's own, with the student's steps.

The network is the student's; autoencoder, text encoder and tokenizer are the teacher's; the
scheduler is ``StudentScheduler``, whose file goes into the folder. Needs the ``diffusers`` extra.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.linear_steps import LinearSteps, linear_steps
from bdense.diffusion.preconditioning import DDPM
from bdense.diffusion.sampling import Sampler
from bdense.errors import CheckpointError, InputError
from bdense.models.card import EXAMPLE_PROMPTS
from bdense.models.diffusers_files import CONFIG, INDEX, folder_of, read_json
from bdense.models.diffusers_teacher import codec_config, codec_facts, condition_of
from bdense.models.latents import (
    TEXT_ENCODER,
    TOKENIZER,
    TextEncoder,
    load_codec,
    load_text_encoder,
)
from bdense.networks.diffusers_network import DiffusersNetwork
from bdense.networks.diffusers_unet import DiffusersTextUNet, DiffusersUNet
from bdense.networks.dit import DiT

SCHEDULER = "student_scheduler"  # the module, here and in the folder
# Of StableDiffusionPipeline, which a student does not have.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
_IMAGENET = 1000  # DiTPipeline's null class, whatever the network's


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A pipeline of diffusers.

    Attributes:
        codec_part: What it calls its autoencoder.
        guides: Whether a call has a guidance scale.
        scales_noise: Whether it multiplies its noise by the scheduler's first level.
    """

    name: str
    codec_part: str
    example: Mapping[str, Any]
    takes_classes: bool = False
    guides: bool = True
    scales_noise: bool = True


_KINDS = {
    DiffusersTextUNet.kind: _Kind(
        name="StableDiffusionPipeline",
        codec_part="vae",
        example={"prompt": list(EXAMPLE_PROMPTS)},
    ),
    DiT.kind: _Kind(
        name="DiTPipeline",
        codec_part="vae",
        example={"class_labels": [0, 1]},
        takes_classes=True,
        scales_noise=False,
    ),
    DiffusersUNet.kind: _Kind(
        name="LDMPipeline", codec_part="vqvae", example={"batch_size": 4}, guides=False
    ),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentPipeline:
    """A student with what its pipeline has beside it, all of it checked.

    Attributes:
        teacher: Folder of the teacher's pipeline.
        call: Arguments of the pipeline that draw as the student was measured.
        codec: Facts of the autoencoder, as in a teacher's metadata.
        steps: As it was measured with.
    """

    denoiser: NetworkDenoiser
    teacher: Path
    kind: _Kind
    call: Mapping[str, Any]
    codec: Mapping[str, Any]
    steps: LinearSteps
    text: TextEncoder | None

    @property
    def name(self) -> str:
        """diffusers' class of the pipeline."""
        return self.kind.name

    @property
    def facts(self) -> dict[str, Any]:
        """What the student's metadata have to say of the teacher's pipeline."""
        condition = condition_of(self.denoiser.model)
        return {"codec": self.codec} | ({"condition": condition} if condition else {})

    @property
    def example(self) -> dict[str, Any]:
        """Arguments of a call that draws images."""
        return {**self.kind.example, **self.call}

    def write(self, folder: Path) -> None:
        """Write everything but the card into an empty folder."""
        import diffusers

        network: Any = self.denoiser.model
        part, codec_part = network.part, self.kind.codec_part
        codec: Any = load_codec(self.teacher)
        network.inner.save_pretrained(folder / part)
        codec.model.save_pretrained(folder / codec_part)
        parts: dict[str, Any] = {
            part: ["diffusers", network.kind],
            codec_part: ["diffusers", type(codec.model).__name__],
            "scheduler": self.write_scheduler(folder),
        }
        if self.text is not None:
            self.text.model.save_pretrained(folder / TEXT_ENCODER)
            self.text.tokenizer.save_pretrained(folder / TOKENIZER)
            parts[TEXT_ENCODER] = ["transformers", type(self.text.model).__name__]
            parts[TOKENIZER] = ["transformers", type(self.text.tokenizer).__name__]
            parts |= {key: [None, None] for key in _LEFT_OUT}
            parts["requires_safety_checker"] = False
        if self.kind.takes_classes and (labels := self._labels()):
            parts["id2label"] = labels
        for file in folder.glob(f"*/{CONFIG}"):
            config = read_json(file)
            config.pop("_name_or_path", None)  # where it was loaded from on this machine
            file.write_text(json.dumps(config, indent=2) + "\n")
        version = {"_class_name": self.name, "_diffusers_version": diffusers.__version__}
        (folder / INDEX).write_text(json.dumps(version | parts, indent=2) + "\n")

    def write_scheduler(self, folder: Path) -> list[str]:
        """Write the scheduler with its file; returns its module and class."""
        from bdense.models import student_scheduler

        scheduler = student_scheduler.StudentScheduler(**self._scheduler_options())
        scheduler.save_pretrained(folder / "scheduler")
        shutil.copyfile(student_scheduler.__file__, folder / "scheduler" / f"{SCHEDULER}.py")
        return [SCHEDULER, type(scheduler).__name__]

    def _labels(self) -> Mapping[str, Any]:
        """The names of the classes, if the teacher's pipeline has them."""
        file = self.teacher / INDEX
        labels = read_json(file).get("id2label") if file.is_file() else None
        return labels if isinstance(labels, dict) else {}

    def _scheduler_options(self) -> dict[str, Any]:
        """Of ``StudentScheduler``: the steps in the coordinates z that the network sees."""
        steps, precond = self.steps, self.denoiser.precond
        assert isinstance(precond, DDPM)
        # As a denoiser in float32 computes its times.
        levels = torch.tensor(steps.levels, dtype=torch.float32)
        root = [(1 + level**2) ** 0.5 for level in steps.levels]  # x = root z
        after = [*root[1:], 1.0]  # the last state is x itself
        return {
            "timesteps": precond.time(levels).tolist(),
            "sigmas": steps.levels,
            "start": steps.start / root[0],
            # It passes its noise on as it is.
            "scales_first_input": not self.kind.scales_noise,
            "state_factors": [
                k * here / there
                for k, here, there in zip(steps.state_factors, root, after, strict=True)
            ],
            "noise_factors": [
                [c / there for c in row]
                for row, there in zip(steps.noise_factors, after, strict=True)
            ],
            "fresh_noise_factors": [
                g / there for g, there in zip(steps.fresh_noise_factors, after, strict=True)
            ],
            "prediction_type": precond.prediction_type,
        }


def latent_pipeline(
    denoiser: NetworkDenoiser, sampler: Sampler, teacher: str | Path
) -> LatentPipeline:
    """A student's pipeline, before anything is written.

    Args:
        denoiser: Of latents and of one branch.
        sampler: Its ``measured_sampler``.
        teacher: Folder or hub id of the teacher's pipeline, or of another with the same
            autoencoder and text encoder.

    Raises:
        InputError: diffusers has no pipeline that draws this student's images, or the teacher's
            lacks a part.
    """
    network, precond = denoiser.model, denoiser.precond
    if not isinstance(network, DiffusersNetwork) or not isinstance(precond, DDPM):
        raise InputError(
            f"pipelines of latents take networks {', '.join(_KINDS)} with precond ddpm, but "
            f"the student is a {denoiser.describe()['network']} with precond {precond.name}; "
            "export it with export_folder"
        )
    kind = _KINDS[network.kind]
    steps = linear_steps(sampler)
    _require_condition(network, kind, sampler.guidance)
    folder = folder_of(teacher)
    found = codec_config(folder)
    if found is None:
        raise CheckpointError(
            f"{folder} has no autoencoder (vae or vqvae) for the student's pipeline; give the "
            "folder of the teacher's whole pipeline"
        )
    codec = codec_facts(network, found)
    if "shift_factor" in codec:
        raise InputError(
            f"the autoencoder of {folder} shifts its latents by {codec['shift_factor']}, which "
            f"{kind.name} does not; export the student with export_folder"
        )
    guidance = {"guidance_scale": sampler.guidance} if kind.guides else {}
    return LatentPipeline(
        denoiser=denoiser,
        teacher=folder,
        kind=kind,
        call={"num_inference_steps": len(steps.levels), **guidance},
        codec=codec,
        steps=steps,
        text=load_text_encoder(folder, network.text_dim) if network.text_dim else None,
    )


def _require_condition(network: DiffusersNetwork, kind: _Kind, guidance: float) -> None:
    """Refuse conditions and guidance that the pipeline cannot be called with."""
    if guidance < 1:
        raise InputError(
            f"the student is guided by {guidance:g}, and {kind.name} guides by 1 or more; distil "
            "it with another guidance_student or measure it at another guidance, or export it "
            "with export_folder"
        )
    if network.label_dim and not kind.takes_classes:
        raise InputError(
            f"the student has {network.label_dim} classes, but {kind.name} takes no class; export "
            "it with export_folder"
        )
    if kind.takes_classes and guidance != 1 and network.label_dim != _IMAGENET:
        raise InputError(
            f"the student is guided by {guidance:g} and has {network.label_dim} classes, but "
            f"{kind.name} guides only networks of {_IMAGENET}; export it with export_folder"
        )
