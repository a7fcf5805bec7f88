"""Public networks and reference statistics: addresses, licences, downloads.

A network's architecture is here too, so that its cost is known before a download. NOTICE has the
licences in words. Importing this does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdense.downloads import fetch
from bdense.errors import InputError, did_you_mean, extra
from bdense.files import user_folder
from bdense.models.diffusers_files import INDEX

# "All material, including source code and pre-trained models" (NVlabs/edm, README.md, License, at
# 008a4e5).
EDM_LICENCE = "CC-BY-NC-SA-4.0"
EDM_CITATION = (
    "Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, "
    "arXiv 2206.00364"
)
_EDM_FILES = "https://nvlabs-fi-cdn.nvidia.com/edm"


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A published file.

    Attributes:
        licence: SPDX identifier.
        sha256: Hex digest, if known from a third party; the publisher states none.
        size: Bytes, if known likewise.
        image_bytes: About as many, of the images that lie in it beside statistics.
    """

    name: str
    url: str
    licence: str = EDM_LICENCE
    citation: str = EDM_CITATION
    sha256: str | None = None
    size: int | None = None
    image_bytes: int = 0

    @property
    def path(self) -> Path:
        """Path of the downloaded file, or of one put there by hand."""
        return checkpoint_folder() / self.url.rsplit("/", 1)[1]

    @property
    def is_here(self) -> bool:
        """Whether it has been fetched."""
        return self.path.is_file()

    def fetch(self) -> Path:
        """Its path; downloads the file if missing.

        Raises:
            InputError: It cannot be downloaded, or another file is there.
        """
        try:
            return fetch(self.url, self.path, what=self.name, sha256=self.sha256, size=self.size)
        except InputError as error:
            # A file given by path is not compared with the published one.
            raise InputError(
                f"{error}, or give a file by its path (BDENSE_CHECKPOINTS names another folder)"
            ) from error


@dataclass(frozen=True, kw_only=True)
class PublicCheckpoint(PublicFile):
    """A published network; ``architecture`` describes it to ``build_denoiser``."""

    architecture: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubCheckpoint:
    """A published network that huggingface_hub downloads and caches.

    Attributes:
        name: OWNER/NAME on the hub.
        architecture: Description for ``build_denoiser``.
        part: Folder of its network.
        known: What ``read_diffusers`` finds of the rest, for a model of latents.
    """

    name: str
    licence: str
    citation: str
    architecture: Mapping[str, Any]
    part: str = "."
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Its page."""
        return f"https://huggingface.co/{self.name}"

    @property
    def path(self) -> Path:
        """Its folder in huggingface_hub's cache, below $HF_HOME.

        Raises:
            InputError: huggingface_hub is not installed.
        """
        with extra("diffusers", f"{self.name} of the Hugging Face hub"):
            from huggingface_hub import constants, file_download
        folder: str = file_download.repo_folder_name(repo_id=self.name, repo_type="model")
        return Path(constants.HF_HUB_CACHE, folder)

    @property
    def is_here(self) -> bool:
        """Whether its weights are downloaded."""
        return any(self.path.glob(f"snapshots/*/{self.part}/diffusion_pytorch_model.*"))


@dataclass(frozen=True, kw_only=True)
class ConvertedCheckpoint(HubCheckpoint):
    """A published network that a user first converts to a folder in diffusers' format."""

    address: str
    how: str

    @property
    def url(self) -> str:
        return self.address

    @property
    def path(self) -> Path:
        """The folder that it is expected in."""
        return checkpoint_folder() / self.name

    @property
    def is_here(self) -> bool:
        return (self.path / INDEX).is_file()

    def text(self) -> str:
        """How it gets there."""
        return f"the folder {self.path}, made from {self.address}: {self.how}"

    def fetch(self) -> Path:
        """Its folder.

        Raises:
            InputError: It is not there.
        """
        if not self.is_here:
            raise InputError(f"{self.name} needs {self.text()}")
        return self.path


def checkpoint_folder() -> Path:
    """$BDENSE_CHECKPOINTS, or a folder in the user's cache."""
    return user_folder("BDENSE_CHECKPOINTS", "checkpoints")


def resolve_checkpoint(name_or_path: str | Path) -> Path:
    """The given file, or the published one of that name, downloaded if missing.

    Raises:
        InputError: There is no such file or name, or it cannot be downloaded.
    """
    return _resolve(name_or_path, CHECKPOINTS, "checkpoint")


def resolve_reference(name_or_path: str | Path) -> Path:
    """Like ``resolve_checkpoint``, for .npz files of reference statistics (EDM's fid-refs)."""
    return _resolve(name_or_path, REFERENCES, "reference")


def _resolve(name_or_path: str | Path, table: Mapping[str, PublicFile], what: str) -> Path:
    # A public name wins over a file of that name in the current folder.
    if str(name_or_path) in table:
        return table[str(name_or_path)].fetch()
    path = Path(name_or_path)
    if not path.exists():
        is_path = bool(path.suffix) or len(path.parts) > 1
        close = did_you_mean(path.name, table)
        hint = close or f"; public are {', '.join(table)}"
        public = "" if is_path and not close else f", and no public one of that name{hint}"
        raise InputError(f"there is no {what} file {path}{public}")
    return path


# Network options of EDM's train.py, lines 112-145, and of the table "exact training
# configurations" in its README.md (commit 008a4e5).
_DDPMPP = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 128,
}
_NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "model_channels": 128,
}
_CIFAR10 = {
    "img_resolution": 32,
    "channel_mult": [2, 2, 2],
    "dropout": 0.13,
    "augment_dim": 9,
}
_FFHQ = {"img_resolution": 64, "channel_mult": [1, 2, 2, 2], "dropout": 0.05, "augment_dim": 9}
_AFHQV2 = _FFHQ | {"dropout": 0.25}
_IMAGENET = {
    "img_resolution": 64,
    "label_dim": 1000,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "dropout": 0.1,
}

# NVIDIA publishes no hashes. These are from other projects, which check their copies against them
# (looked up 2026-11): the unconditional one from an ECT study, in its download_checkpoint.sh
# (variable ECT_EDM_CHECKPOINT_SHA256); the conditional one, its size and the statistics from
# mlperf-edu, in constants EDM_CIFAR10_CHECKPOINT_SHA256, _BYTES and
# EDM_CIFAR10_FID_REFERENCE_SHA256. None were found for the others, so they are not checked.
_PINS: dict[str, dict[str, Any]] = {
    "edm-cifar10-32x32-uncond-vp": {
        "sha256": "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
    },
    "edm-cifar10-32x32-cond-vp": {
        "sha256": "b27385e4f2f8d4d1e2e2c03864c5a9574a0c58ba81eb11625ae6d15c401f4796",
        "size": 223_183_453,
    },
    "cifar10-32x32": {
        "sha256": "4ada108cdfd8e43409ed427f5f76631beac9b9617cdcaf416d41b1e161d85969",
    },
}


def _edm(name: str, network: str, **config: Any) -> PublicCheckpoint:  # noqa: ANN401  EDM's options
    return PublicCheckpoint(
        name=name,
        url=f"{_EDM_FILES}/pretrained/{name}.pkl",
        **_PINS.get(name, {}),
        architecture={
            "precond": "edm",
            "sigma_data": 0.5,
            "network": network,
            "config": {"img_channels": 3, **config},
        },
    )


CHECKPOINTS: Mapping[str, PublicCheckpoint] = {
    checkpoint.name: checkpoint
    for checkpoint in (
        _edm("edm-cifar10-32x32-uncond-vp", "SongUNet", **_DDPMPP, **_CIFAR10),
        _edm("edm-cifar10-32x32-uncond-ve", "SongUNet", **_NCSNPP, **_CIFAR10),
        _edm("edm-cifar10-32x32-cond-vp", "SongUNet", **_DDPMPP, **_CIFAR10, label_dim=10),
        _edm("edm-cifar10-32x32-cond-ve", "SongUNet", **_NCSNPP, **_CIFAR10, label_dim=10),
        _edm("edm-ffhq-64x64-uncond-vp", "SongUNet", **_DDPMPP, **_FFHQ),
        _edm("edm-ffhq-64x64-uncond-ve", "SongUNet", **_NCSNPP, **_FFHQ),
        _edm("edm-afhqv2-64x64-uncond-vp", "SongUNet", **_DDPMPP, **_AFHQV2),
        _edm("edm-afhqv2-64x64-uncond-ve", "SongUNet", **_NCSNPP, **_AFHQV2),
        _edm("edm-imagenet-64x64-cond-adm", "DhariwalUNet", **_IMAGENET),
    )
}

_LDM_CITATION = (
    "Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, "
    "arXiv 2112.10752"
)
_ADM_CITATION = "Dhariwal & Nichol 2021, Diffusion Models Beat GANs, arXiv 2105.05233"
_COCO_CITATION = "Lin et al. 2014, Microsoft COCO: Common Objects in Context, arXiv 1405.0312"
_DDPM_PROCESS = {
    "precond": "ddpm",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}
_LATENT_PROCESS = _DDPM_PROCESS | {"beta_schedule": "scaled_linear"}
_KL = {"class": "AutoencoderKL", "scaling_factor": 0.18215, "image_channels": 3}
_DDPM = HubCheckpoint(
    name="google/ddpm-cifar10-32",
    licence="Apache-2.0",
    citation="Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239",
    # Its scheduler_config.json and config.json; without the class and version of the library.
    architecture={
        **_DDPM_PROCESS,
        "network": "UNet2DModel",
        "config": {
            "img_channels": 3,
            "unet": {
                "act_fn": "silu",
                "attention_head_dim": None,
                "block_out_channels": [128, 256, 256, 256],
                "center_input_sample": False,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2],
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "in_channels": 3,
                "layers_per_block": 2,
                "mid_block_scale_factor": 1,
                "norm_eps": 1e-6,
                "norm_num_groups": 32,
                "sample_size": 32,
                "time_embedding_type": "positional",
                "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            },
        },
    },
)
_STABLE_DIFFUSION = HubCheckpoint(
    name="stable-diffusion-v1-5/stable-diffusion-v1-5",
    licence="creativeml-openrail-m",
    citation=_LDM_CITATION,
    part="unet",
    architecture={
        **_LATENT_PROCESS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "network": "UNet2DConditionModel",
        "config": {
            "img_channels": 4,
            "unet": {
                "sample_size": 64,
                "in_channels": 4,
                "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
                "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
                "block_out_channels": [320, 640, 1280, 1280],
                "layers_per_block": 2,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
            },
        },
    },
    known={
        "codec": {**_KL, "enlarges": 8},
        "condition": "text",
        "guidance": True,
        "levels": {"sigma_min": 0.1, "sigma_max": 14.614641229333609},
    },
)
_DIT = HubCheckpoint(
    name="facebook/DiT-XL-2-256",
    licence="cc-by-nc-4.0",
    citation="Peebles & Xie 2022, Scalable Diffusion Models with Transformers, arXiv 2212.09748",
    part="transformer",
    architecture={
        **_DDPM_PROCESS,
        "learned_variance": True,
        "network": "DiTTransformer2DModel",
        "config": {
            "img_channels": 4,
            "transformer": {
                "sample_size": 32,
                "in_channels": 4,
                "num_layers": 28,
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "patch_size": 2,
                "num_embeds_ada_norm": 1000,
            },
        },
    },
    known={
        "codec": {**_KL, "enlarges": 8},
        "condition": "classes",
        "guidance": True,
        "levels": {"sigma_min": 0.1, "sigma_max": 157.40728081040737},
    },
)
_LSUN_BEDROOM = ConvertedCheckpoint(
    name="ldm-lsun-bedroom-256",
    licence="MIT",
    citation=_LDM_CITATION,
    address="https://ommer-lab.com/files/latent-diffusion/lsun_bedrooms.zip",
    how="diffusers' script convert_ldm_original_checkpoint_to_diffusers.py writes unet, vqvae and "
    "scheduler of it",
    part="unet",
    architecture={
        **_LATENT_PROCESS,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "network": "UNet2DModel",
        "config": {
            "img_channels": 3,
            "unet": {
                "sample_size": 64,
                "in_channels": 3,
                "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
                "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
                "block_out_channels": [224, 448, 672, 896],
                "layers_per_block": 2,
                "attention_head_dim": 32,
            },
        },
    },
    known={
        "codec": {"class": "VQModel", "scaling_factor": 1.0, "image_channels": 3, "enlarges": 4},
        "guidance": False,
        "levels": {"sigma_min": 0.03875891355636926, "sigma_max": 83.82249447302878},
    },
)
HUB_CHECKPOINTS: Mapping[str, HubCheckpoint] = {
    each.name: each for each in (_DDPM, _STABLE_DIFFUSION, _DIT)
}
CONVERTED_CHECKPOINTS: Mapping[str, ConvertedCheckpoint] = {_LSUN_BEDROOM.name: _LSUN_BEDROOM}

# All published networks.
PUBLIC_MODELS: Mapping[str, PublicCheckpoint | HubCheckpoint] = {
    **CHECKPOINTS,
    **HUB_CHECKPOINTS,
    **CONVERTED_CHECKPOINTS,
}

_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
_COCO = "https://github.com/boomb0om/text2image-benchmark/releases/download/v0.0.1"
# By name: those of EDM; of guided-diffusion (ADM); and of MS-COCO's validation set.
REFERENCES: Mapping[str, PublicFile] = {
    **{
        name: PublicFile(name=name, url=f"{_EDM_FILES}/fid-refs/{name}.npz", **_PINS.get(name, {}))
        for name in ("cifar10-32x32", "ffhq-64x64", "afhqv2-64x64", "imagenet-64x64")
    },
    **{
        name: PublicFile(
            name=name,
            url=f"{_ADM}/{place}.npz",
            licence="MIT",
            citation=_ADM_CITATION,
            image_bytes=10_000 * 256 * 256 * 3,
        )
        for name, place in (
            ("imagenet-256x256", "imagenet/256/VIRTUAL_imagenet256_labeled"),
            ("lsun-bedroom-256x256", "lsun/bedroom/VIRTUAL_lsun_bedroom256"),
        )
    },
    "ms-coco-val2014": PublicFile(
        name="ms-coco-val2014",
        url=f"{_COCO}/MS-COCO_val2014_fid_stats.npz",
        licence="unknown",
        citation=_COCO_CITATION,
    ),
}

# Tables of captions; their column is ``text``.
PROMPT_SETS: Mapping[str, PublicFile] = {
    "ms-coco-val2014-30k": PublicFile(
        name="ms-coco-val2014-30k",
        url=f"{_COCO}/MS-COCO_val2014_30k_captions.csv",
        licence="CC-BY-4.0",
        citation=_COCO_CITATION,
    )
}
