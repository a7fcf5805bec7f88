"""Small pipelines of latents with random weights, as their folders."""

import json
from pathlib import Path

import torch

from bdense.training.latent_digits import _write_text_encoder as write_text_encoder

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
CODEC = {
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TEXT_WIDTH = 32  # of latent-digits


def save(folder: Path, pipeline: str, **parts: object) -> Path:
    """A folder of these parts, each a model or a scheduler."""
    index = {"_class_name": pipeline}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options):
    from diffusers import DDIMScheduler

    given = {"beta_schedule": beta_schedule, "beta_start": beta_start, "beta_end": beta_end}
    return DDIMScheduler(**given | options)


def new_stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **UNET,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(**CODEC)
    made = scheduler(prediction_type=prediction_type)
    save(folder, "StableDiffusionPipeline", unet=unet, vae=vae, scheduler=made)
    write_text_encoder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def new_dit(folder: Path, classes: int = 1000) -> Path:
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=classes,
    )
    made = scheduler("linear", 0.0001, 0.02)
    vae = AutoencoderKL(**CODEC)
    return save(folder, "DiTPipeline", transformer=transformer, vae=vae, scheduler=made)


def new_ldm(folder: Path, classes: int | None = None) -> Path:
    from diffusers import UNet2DModel, VQModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        **UNET,
        out_channels=4,
        attention_head_dim=4,
        num_class_embeds=classes,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    vqvae = VQModel(**CODEC, num_vq_embeddings=32, scaling_factor=1.0)
    made = scheduler(beta_start=0.0015, beta_end=0.0195)
    return save(folder, "LDMPipeline", unet=unet, vqvae=vqvae, scheduler=made)
