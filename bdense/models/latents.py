"""Autoencoders and text encoders, which surround a denoiser of latents in a pipeline's folder.

Needs the ``diffusers`` extra, which has transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.codecs import Autoencoder, Codec, Pixels
from bdense.diffusion.conditions import Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import CheckpointError, InputError
from bdense.models.diffusers_files import (
    CONFIG,
    load_part,
    load_processor,
    load_transformers,
    pipeline_folder,
    read_json,
)
from bdense.models.diffusers_teacher import codec_config, codec_facts
from bdense.networks.diffusers_network import require_diffusers
from bdense.networks.diffusers_unet import DiffusersUNet

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"


def draws_latents(model: NetworkDenoiser, metadata: Mapping[str, Any]) -> bool:
    """Whether the model draws latents."""
    return model.model.latent or "codec" in metadata


def known_shape(
    model: NetworkDenoiser, metadata: Mapping[str, Any]
) -> tuple[int, int, int] | None:
    """``drawn_shape``, or None for latents whose autoencoder is not known."""
    channels, height, width = model.image_shape
    if not draws_latents(model, metadata):
        return channels, height, width
    codec = metadata.get("codec", {})
    if not {"image_channels", "enlarges"} <= codec.keys():
        return None
    enlarges = codec["enlarges"]
    return codec["image_channels"], enlarges * height, enlarges * width


def drawn_shape(model: NetworkDenoiser, metadata: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of a model's images, decoded where it draws latents.

    Raises:
        InputError: It draws latents, and its autoencoder is not known.
    """
    if (shape := known_shape(model, metadata)) is None:
        raise InputError(
            "the model draws latents, and its autoencoder is not known; give the folder of its "
            "whole pipeline"
        )
    return shape


def load_codec(source: str | Path) -> Codec:
    """The autoencoder of a folder or hub id in diffusers' format; pixels for a model of those.

    A folder of ``export_folder`` is read for the pipeline in it.

    Raises:
        CheckpointError: A model of latents has none there, or one that is not read.
        InputError: diffusers is not installed, or the hub cannot be reached.
    """
    require_diffusers()
    import diffusers

    folder = pipeline_folder(source)
    if (found := codec_config(folder)) is None:
        models = [folder / part / CONFIG for part in (".", "unet", "transformer")]
        kinds = [read_json(file).get("_class_name") for file in models if file.is_file()]
        if kinds == [DiffusersUNet.kind]:
            return Pixels()
        raise CheckpointError(
            f"{folder} has no autoencoder (vae or vqvae), without which latents are no images; "
            "give the folder of the whole pipeline"
        )
    part, config = found
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise CheckpointError(
            f"{part / CONFIG} scales each channel of its latents by itself (latents_mean, "
            "latents_std), which is not read"
        )
    model = load_part(
        getattr(diffusers, config["_class_name"]), part, low_cpu_mem_usage=False
    ).requires_grad_(False)
    shift = model.config.get("shift_factor") or 0.0
    return Autoencoder(model, float(model.config.scaling_factor), float(shift))


def require_own_codec(
    model: NetworkDenoiser, metadata: Mapping[str, Any], source: str | Path
) -> None:
    """Refuse a pipeline whose autoencoder is another than that of the model's latents.

    Weights are not compared: whoever trains a decoder of the same latents may use it.

    Raises:
        CheckpointError: It is of another class, scale, shift or size.
    """
    if (part := codec_config(pipeline_folder(source))) is None:
        return
    known, found = metadata.get("codec", {}), codec_facts(model.model, part)
    if known.get("scaling_factor") is not None:
        known, found = ({"shift_factor": 0.0, **each} for each in (known, found))
    differing = [
        f"{name} {found[name]}, not {value}"
        for name, value in known.items()
        if value is not None and name in found and found[name] != value
    ]
    if differing:
        raise CheckpointError(
            f"the autoencoder of {source} is another than that of the model's latents "
            f"({'; '.join(differing)}); give the pipeline of its teacher"
        )


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Prompts to what a text-conditional network sees: L tokens of E channels."""

    tokenizer: Any
    model: Any

    @property
    def length(self) -> int:
        """L, the tokens of a prompt, its start and end among them."""
        most = int(self.model.config.max_position_embeddings)
        return min(most, int(self.tokenizer.model_max_length))

    @property
    def width(self) -> int:
        """E, the channels of a token."""
        return int(self.model.config.hidden_size)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """[n, L] int64; what is longer is cut, what is shorter is filled up."""
        ids: Tensor = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    def too_long(self, prompts: Sequence[str]) -> list[int]:
        """Which prompts are cut: their numbers, from 0."""
        ids = self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [i for i, row in enumerate(ids) if len(row) > self.length]

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """[n, L, E] float32: the last hidden states, after the final norm."""
        ids = self.tokens(prompts).to(next(self.model.parameters()).device)
        return torch.cat([self.model(part).last_hidden_state for part in torch.split(ids, 64)])

    def prompts(self, prompts: Sequence[str], negative: str = "") -> Prompts:
        """The condition, which guidance leads away from ``negative``.

        Raises:
            InputError: There are no prompts.
        """
        if not prompts:
            raise InputError("there are no prompts; give one or more")
        return Prompts(self.embed(prompts).cpu(), self.embed([negative]).cpu())


def load_text_encoder(source: str | Path, width: int | None = None) -> TextEncoder:
    """The tokenizer and text encoder of a folder or hub id in diffusers' format.

    A folder of ``export_folder`` is read for the pipeline in it.

    Args:
        width: E that the network takes; None takes any.

    Raises:
        CheckpointError: They are missing there, not CLIP's, or of another width.
        InputError: A library is not installed, or the hub cannot be reached.
    """
    require_diffusers()
    folder = pipeline_folder(source)
    for part in (TEXT_ENCODER, TOKENIZER):
        if not (folder / part).is_dir():
            raise CheckpointError(
                f"{folder} has no {part}, which prompts need; give the whole pipeline's folder"
            )
    model = load_transformers("CLIPTextModel", folder / TEXT_ENCODER, "prompts")
    encoder = TextEncoder(load_processor("CLIPTokenizer", folder / TOKENIZER), model)
    if width not in (None, encoder.width):
        raise CheckpointError(
            f"{folder / TEXT_ENCODER} makes tokens of {encoder.width} channels, and the network "
            f"takes {width}; give the pipeline of its teacher"
        )
    return encoder
