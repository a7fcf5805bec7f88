"""Teachers in diffusers' format: a folder, or an id on the Hugging Face hub.

A network and the configuration of its scheduler, in a pipeline's folder (``unet`` or
``transformer`` beside ``scheduler``) or both in one (google/ddpm-cifar10-32): a ``UNet2DModel`` of
pixels or latents, the ``UNet2DConditionModel`` of Stable Diffusion 1 and 2, or a
``DiTTransformer2DModel``. Needs the ``diffusers`` extra, also for teachers that were converted to
safetensors.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdense.diffusion.denoiser import NetworkDenoiser, without_memory
from bdense.diffusion.preconditioning import DDPM, make_preconditioning
from bdense.diffusion.sampling import samplers_from
from bdense.errors import CheckpointError, InputError
from bdense.files import header_of, require_no_page
from bdense.models.diffusers_files import (
    CONFIG,
    INDEX,
    LORA_WEIGHTS,
    METADATA,
    MODEL_FILE,
    WEIGHTS,
    folder_of,
    is_pushed,
    load_part,
    public_name,
    read_json,
)
from bdense.networks import Network
from bdense.networks.diffusers_network import DiffusersNetwork, require_diffusers
from bdense.networks.diffusers_unet import DiffusersTextUNet, DiffusersUNet
from bdense.networks.dit import DiT

NETWORKS: Mapping[str, type[DiffusersNetwork]] = {
    network.kind: network for network in (DiffusersUNet, DiffusersTextUNet, DiT)
}
PIPELINES = (
    "DDPMPipeline",
    "DDIMPipeline",
    "LDMPipeline",
    "StableDiffusionPipeline",
    "DiTPipeline",
)
# They share the fields of the noise process, and its defaults; other fields concern sampling.
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
# Class name in the published DiT configs.
_FORMER_DIT = ("Transformer2DModel", "ada_norm_zero")
# Folders of the autoencoder, and its classes.
CODEC_PARTS, CODECS = ("vae", "vqvae"), ("AutoencoderKL", "VQModel")
# Their scaling_factor in configurations of before it was saved.
_SCALE = 0.18215
_SCHEDULER = "scheduler_config.json"
# In the metadata of an exported student: what follows from the rest, and what of its architecture
# is not an option of its preconditioning.
_DERIVED = (
    "file",
    "image_shape",
    "latent_shape",
    "classes",
    "parameters",
    "weights_sha256",
    "architecture",
    "pipeline_call",
)
_NOT_PRECOND = ("precond", "network", "config", "num_branches")
# The last level of the students of Stable Diffusion (Zhou et al. 2024).
_SIGMA_MIN = 0.1
# For schedulers saved before a key existed, or left at its default.
_PROCESS = {
    field.name: field.default
    for field in dataclasses.fields(DDPM)
    if field.name != "learned_variance"
}


def read_diffusers(
    source: str | Path, folder: Path | None = None, *, weights: bool = True
) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """The denoiser of a diffusers folder or hub id, in eval mode, and its metadata.

    Args:
        source: A folder as ``save_pretrained`` writes it, or OWNER/NAME on the hub.
        folder: Where it was fetched to; None fetches it.
        weights: Read them; else the denoiser is on the meta device.

    Returns:
        The denoiser, and metadata: ``source``, ``class`` of the model, ``scheduler``; ``licence``
        if its README.md has one; ``clip_sample`` if the scheduler clips predictions to that range
        (this project's solvers do not). Of a model of latents ``codec``, the class of its
        autoencoder, how latents are scaled and what images it makes, if it is in the folder;
        ``condition``, whether it takes ``guidance``, usual ``levels``; and ``ignored``, parts
        that are never loaded. A student that ``export_pipeline`` wrote has its own metadata.

    Raises:
        CheckpointError: It is not such a folder, or its pipeline, model, weights or scheduler are
            not supported.
        InputError: diffusers is not installed, or the hub cannot be reached.
    """
    require_diffusers()
    folder = folder or folder_of(source)
    if (folder / LORA_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} holds only adapters (LoRA), which diffusers adds to a pipeline; export "
            "the student without --lora to draw from it here"
        )
    ignored = _require_pipeline(folder)
    model_folder = _model_folder(folder)
    config = read_json(model_folder / CONFIG)
    kind = str(config.get("_class_name", config.get("model_type")))  # of transformers
    if (kind, config.get("norm_type")) == _FORMER_DIT:
        kind = DiT.kind
    if kind not in NETWORKS:
        raise CheckpointError(
            f"{model_folder / CONFIG} describes a {kind}; this version reads {', '.join(NETWORKS)}"
        )
    scheduler_file = (folder if model_folder == folder else folder / "scheduler") / _SCHEDULER
    if not scheduler_file.is_file():
        raise CheckpointError(
            f"{folder} has a model but no {scheduler_file.relative_to(folder)}, which defines its "
            "noise levels; save the whole pipeline, or the scheduler beside the model"
        )
    if (folder / METADATA).is_file():
        return _exported(folder, NETWORKS[kind], model_folder, config, weights=weights)
    codec = codec_config(folder)
    is_latent = codec is not None or kind != DiffusersUNet.kind
    precond, facts = _scheduler(scheduler_file, is_latent=is_latent)
    # Record an id, but not a path of this machine.
    metadata = {"source": public_name(source, folder), "class": kind, **facts}
    if licence := _licence(folder / "README.md"):
        metadata["licence"] = licence
    denoiser = _denoiser(NETWORKS[kind], model_folder, config, precond, weights=weights)
    if is_latent:
        metadata |= _latent_facts(denoiser, codec) | ({"ignored": ignored} if ignored else {})
    return denoiser, metadata


def _exported(
    folder: Path,
    network_class: type[DiffusersNetwork],
    model_folder: Path,
    config: dict[str, Any],
    *,
    weights: bool,
) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """A student that ``export_pipeline`` wrote, and its metadata."""
    file = folder / METADATA
    known = read_json(file)
    with header_of(file):
        options = {
            key: value for key, value in known["architecture"].items() if key not in _NOT_PRECOND
        }
        precond = make_preconditioning(DDPM.name, options)
        assert isinstance(precond, DDPM)
        denoiser = _denoiser(network_class, model_folder, config, precond, weights=weights)
        metadata = {key: value for key, value in known.items() if key not in _DERIVED}
        denoiser.samplers = tuple(samplers_from(metadata))
    return denoiser, metadata


def _require_pipeline(folder: Path) -> list[str]:
    """Refuse other pipelines; returns the parts of this one that are never loaded."""
    if not (folder / INDEX).is_file():
        return []
    index = read_json(folder / INDEX)
    if (kind := index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(
            f"{folder / INDEX} describes a {kind}; this version reads {', '.join(PIPELINES)}"
        )
    part = index.get("safety_checker")
    return ["safety_checker"] if isinstance(part, list) and part[:1] != [None] else []


def codec_config(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and configuration of a pipeline's autoencoder, if it has one.

    Raises:
        CheckpointError: Its class is not read.
    """
    for name in CODEC_PARTS:
        if (folder / name / CONFIG).is_file():
            config = read_json(folder / name / CONFIG)
            if config.get("_class_name") not in CODECS:
                raise CheckpointError(
                    f"{folder / name / CONFIG} describes a {config.get('_class_name')}; this "
                    f"version reads {' and '.join(CODECS)}"
                )
            return folder / name, config
    return None


def codec_facts(network: Network, codec: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """What ``metadata["codec"]`` says of an autoencoder.

    Raises:
        CheckpointError: It makes latents of other channels than the network takes.
    """
    folder, config = codec
    if (channels := config.get("latent_channels")) != network.img_channels:
        raise CheckpointError(
            f"{folder / CONFIG} makes latents of {channels} channels, and the network takes "
            f"{network.img_channels}; put the autoencoder of this network there"
        )
    return {
        "class": config["_class_name"],
        "scaling_factor": config.get("scaling_factor", _SCALE),
        "image_channels": config.get("out_channels", 3),
        "enlarges": 2 ** (len(config.get("block_out_channels", [0])) - 1),
        **({"shift_factor": shift} if (shift := config.get("shift_factor")) else {}),
    }


def condition_of(network: Network) -> str | None:
    """What ``metadata["condition"]`` says of a network."""
    return "text" if network.text_dim else "classes" if network.label_dim else None


def _latent_facts(
    denoiser: NetworkDenoiser, codec: tuple[Path, dict[str, Any]] | None
) -> dict[str, Any]:
    network = denoiser.model
    facts = {} if codec is None else {"codec": codec_facts(network, codec)}
    condition = condition_of(network)
    lowest = denoiser.precond.sigma_min
    return {
        **facts,
        **({"condition": condition} if condition else {}),
        "guidance": bool(network.text_dim) or network.has_null_class,
        "levels": {
            "sigma_min": max(lowest, _SIGMA_MIN) if condition else lowest,
            "sigma_max": denoiser.precond.sigma_max,
        },
    }


def _denoiser(
    network_class: type[DiffusersNetwork],
    folder: Path,
    config: dict[str, Any],
    precond: DDPM,
    *,
    weights: bool,
) -> NetworkDenoiser:
    import diffusers

    with header_of(folder / CONFIG):
        channels, predicted = config.get("in_channels"), config.get("out_channels")
        # Improved DDPM's networks and DiTs predict a variance as well.
        outputs = 2 if channels and predicted == 2 * channels else 1
        options = network_class.accepted(config, outputs=outputs)
        precond = dataclasses.replace(precond, learned_variance=outputs == 2)
        with without_memory():
            skeleton = network_class(options, outputs=outputs)
            values = sum(value.numel() for value in skeleton.parameters())
    files = list(folder.glob(f"{WEIGHTS}*"))
    for each in files:
        require_no_page(each)
    size = sum(each.stat().st_size for each in files)
    # A value takes 2 bytes or more. If there is no file, diffusers names it.
    if 0 < size < values:
        raise CheckpointError(
            f"{folder} describes {values} weights, but its weights file has {size} bytes; "
            "fetch or save it again"
        )
    if not weights:
        return NetworkDenoiser(skeleton, precond).eval()
    loaded = load_part(getattr(diffusers, network_class.kind), folder, low_cpu_mem_usage=False)
    with torch.random.fork_rng(devices=[]):
        network = network_class(options, outputs=outputs)
    network.inner.load_state_dict(loaded.state_dict())
    return NetworkDenoiser(network, precond).eval()


def _model_folder(folder: Path) -> Path:
    for place in (folder / "unet", folder / "transformer", folder):
        if (place / CONFIG).is_file():
            if place == folder and is_pushed(folder):
                raise CheckpointError(
                    f"{folder} is a model folder without its weights, {MODEL_FILE}; fetch or "
                    "export it again"
                )
            return place
    raise CheckpointError(
        f"{folder} is not a diffusers folder: it has neither unet/{CONFIG} nor {CONFIG}, nor "
        f"transformer/{CONFIG}; give a folder that save_pretrained wrote"
    )


def _scheduler(file: Path, *, is_latent: bool) -> tuple[DDPM, dict[str, Any]]:
    config = read_json(file)
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise CheckpointError(
            f"{file} describes a {name}, but only {', '.join(SCHEDULERS)} are supported; make "
            "one of them from its config and save that in its place"
        )
    try:
        precond = DDPM(**{key: config.get(key, value) for key, value in _PROCESS.items()})
        if config.get("rescale_betas_zero_snr"):
            precond = _zero_snr(precond)
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    facts: dict[str, Any] = {"scheduler": name}
    if is_latent:
        if precond.prediction_type == "sample":
            raise CheckpointError(
                f"{file} has prediction_type 'sample', which is not read of models of latents; "
                "known are epsilon and v_prediction"
            )
        return precond, facts
    if config.get("thresholding"):
        facts["thresholding"] = True
    elif config.get("clip_sample", True):
        facts["clip_sample"] = config.get("clip_sample_range", 1.0)
    return precond, facts


def _zero_snr(precond: DDPM) -> DDPM:
    """The process whose last level is pure noise, without that level, which has no sigma.

    sqrt(alpha_bar) is shifted and scaled to end in 0 and to begin as it was (Lin et al. 2023,
    arXiv 2305.08891, algorithm 1).
    """
    if precond.prediction_type == "epsilon":
        raise CheckpointError(
            "rescale_betas_zero_snr does not go with prediction_type epsilon, as the noise in "
            "pure noise says nothing of an image; give a model of v_prediction, or set "
            "rescale_betas_zero_snr to false if this one was trained without it"
        )
    count = precond.num_train_timesteps
    root = precond.log_alpha_bar(torch.arange(count, dtype=torch.float64)).exp().sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = torch.cat([root.new_ones(1), root[:-1] ** 2])
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()
    return dataclasses.replace(precond, num_train_timesteps=count - 1, trained_betas=tuple(betas))


def _licence(readme: Path) -> str | None:
    """``license:`` in a model card's front matter."""
    if not readme.is_file():
        return None
    text = readme.read_text(errors="replace")
    front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front, re.MULTILINE)
    # Our own cards have `unknown` without a licence.
    return found[1] if found and found[1] != "unknown" else None
