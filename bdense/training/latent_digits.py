"""``latent-digits``: a small text-conditional latent teacher of the 8x8 digits, trained here once.

A pipeline folder in diffusers' format with all the parts of Stable Diffusion: a variational
autoencoder, CLIP's tokenizer and text encoder (of random, frozen weights: ten prompts need no
more), and a U-Net that reads the prompts by cross-attention. It is there to try latents, prompts
and guidance on a laptop, in minutes and without a download. n images, B batch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bdense.data.datasets import Dataset, load_dataset, to_float
from bdense.diffusion.conditions import TensorCondition
from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.files import atomic_folder, file_lock
from bdense.models.diffusers_files import INDEX
from bdense.models.latents import load_codec, load_text_encoder
from bdense.networks.diffusers_network import require_diffusers
from bdense.networks.diffusers_unet import DiffusersTextUNet
from bdense.randomness import Stream, generator, one_thread, seeded
from bdense.training.loop import train
from bdense.training.teacher import NoisyBatch, TeacherConfig, TeacherStage, draw_levels
from bdense.weights.weighting import FixedWeights

# Another number where a change below changes the weights.
_FOLDER = "teachers/latent-digits-1"
_CPU = torch.device("cpu")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a {word}" for word in _WORDS)
_SIDE, _LATENT_SIDE, _LATENT_CHANNELS, _WIDTH, _TOKENS = 8, 4, 4, 32, 6
_AUTOENCODER = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [16, 32],
    "latent_channels": _LATENT_CHANNELS,
    "norm_num_groups": 8,
    "sample_size": _SIDE,
}
_UNET = {
    "sample_size": _LATENT_SIDE,
    "in_channels": _LATENT_CHANNELS,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": _WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
# Stable Diffusion's noise process.
_PROCESS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
ARCHITECTURE: Mapping[str, Any] = {
    "precond": "ddpm",
    **_PROCESS,
    "network": "UNet2DConditionModel",
    "config": {"img_channels": _LATENT_CHANNELS, "unet": _UNET},
}
# What ``read_diffusers`` finds in the folder.
KNOWN: Mapping[str, Any] = {
    "codec": {"class": "AutoencoderKL", "image_channels": 1, "enlarges": _SIDE // _LATENT_SIDE},
    "condition": "text",
    "guidance": True,
    "levels": {"sigma_min": 0.1},  # as of Stable Diffusion's students
}
_CODEC_UPDATES, _CODEC_BATCH, _CODEC_LR, _KL = 600, 128, 2e-3, 1e-4
# One image in so many is learned without its prompt, for guidance.
_UNPROMPTED = 10


def latent_digits(cache: Path, config: TeacherConfig | None = None) -> Path:
    """The pipeline's folder in ``cache``, trained if missing (a few minutes on one core).

    Args:
        config: Of the U-Net's training, whose number of updates bounds the autoencoder's too;
            the recipe's by default.

    Raises:
        InputError: diffusers or transformers is not installed.
    """
    require_diffusers()
    folder = cache / _FOLDER
    with file_lock(folder.with_suffix(".lock")):
        if not (folder / INDEX).is_file():
            with atomic_folder(folder) as scratch, one_thread():
                _make(scratch, config or _TRAINING)
    return folder


_TRAINING = TeacherConfig(
    kimg=250.0, batch=256, lr=2e-3, ema_halflife_kimg=20.0, precond={"name": "ddpm", **_PROCESS}
)


def _make(folder: Path, config: TeacherConfig) -> None:
    import diffusers

    digits = load_dataset("digits")
    _write_codec(folder / "vae", digits, min(_CODEC_UPDATES, config.iterations))
    _write_text_encoder(folder)
    diffusers.DDIMScheduler(
        **_PROCESS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    network = _trained(folder, digits, config).model
    assert isinstance(network, DiffusersTextUNet)
    network.unet.save_pretrained(folder / "unet")
    parts = {
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    about = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    # Last: a folder with an index is complete.
    (folder / INDEX).write_text(json.dumps(about | parts, indent=2))


def _write_codec(folder: Path, digits: Dataset, updates: int) -> None:
    """Train the autoencoder: squared error, and a little of the divergence from unit normals."""
    import diffusers

    images = to_float(digits.images)
    with seeded(_CPU, 0, Stream.INITIALISATION):
        model = diffusers.AutoencoderKL(**_AUTOENCODER)
    optimizer = torch.optim.Adam(model.parameters(), lr=_CODEC_LR)
    for update in range(updates):
        draw = generator(0, Stream.CODEC, update)
        x = images[torch.randint(len(images), (_CODEC_BATCH,), generator=draw)]
        latents = model.encode(x).latent_dist
        decoded = model.decode(latents.sample(generator=draw)).sample
        loss = F.mse_loss(decoded, x) + _KL * latents.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = _CODEC_LR * (1 - update / updates)
    with torch.no_grad():
        spread = model.encode(images).latent_dist.mode().std().item()
    model.register_to_config(scaling_factor=1 / spread)
    model.save_pretrained(folder)


def _write_text_encoder(folder: Path) -> None:
    """CLIP's tokenizer of the words alone, and a text encoder of random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: dict[str, None] = {}
    for word in _WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges[f"{pieces[0]} {pieces[1]}"] = None
            pieces[:2] = ["".join(pieces[:2])]
    vocabulary += [merge.replace(" ", "") for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    place = folder / "tokenizer"
    place.mkdir(parents=True)
    (place / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": _TOKENS})
    )
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=_TOKENS,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
        initializer_range=0.5,  # at CLIP's 0.02 the words would hardly differ
    )
    with seeded(_CPU, 1, Stream.INITIALISATION):
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")


@dataclass(frozen=True, eq=False, kw_only=True)
class _PromptedLatents(TeacherStage):
    """Denoising score matching of latents under their prompts.

    Attributes:
        latents: [n, c, h, w].
        texts: [11, L, E] embeddings of the prompts and of the empty one.
    """

    latents: Tensor
    texts: Tensor

    def __post_init__(self) -> None:
        """The data set's labels choose the prompts."""

    def batch(self, iteration: int, images: slice) -> NoisyBatch:
        draw = generator(self.seed, Stream.TEACHER_BATCH, iteration)
        count = self.batch_size
        index = torch.randint(len(self.latents), (count,), generator=draw)
        prompts = self.dataset.require_labels(len(PROMPTS))[index]
        unprompted = torch.randint(_UNPROMPTED, (count,), generator=draw) == 0
        prompts = torch.where(unprompted, len(PROMPTS), prompts)
        clean = self.latents[index]
        noise = torch.randn(clean.shape, generator=draw)
        sigma = draw_levels(self.config, draw, noise)
        return NoisyBatch(
            clean=clean[images],
            noise=noise[images],
            sigma=sigma[images],
            condition=TensorCondition("text", self.texts[prompts[images]]),
        )


def _trained(folder: Path, digits: Dataset, config: TeacherConfig) -> NetworkDenoiser:
    codec, encoder = load_codec(folder), load_text_encoder(folder)
    with seeded(_CPU, config.seed, Stream.INITIALISATION):
        start = build_denoiser(dict(ARCHITECTURE))
    stage = _PromptedLatents(
        config=config,
        dataset=digits,
        start=start,
        latents=codec.encode(to_float(digits.images)),
        texts=encoder.embed([*PROMPTS, ""]),
    )
    return train(stage, FixedWeights(torch.ones(1)))
