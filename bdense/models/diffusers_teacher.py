"""DDPM teachers in diffusers' format: a folder, or an id on the Hugging Face hub.

A ``UNet2DModel`` and its scheduler's configuration, in one folder (google/ddpm-cifar10-32) or in
``unet`` and ``scheduler`` below it. Needs the ``diffusers`` extra, also for teachers that were
converted to safetensors.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from bdense.diffusion.denoiser import NetworkDenoiser, without_memory
from bdense.diffusion.preconditioning import DDPM
from bdense.errors import CheckpointError, InputError
from bdense.networks import DiffusersUNet
from bdense.networks.diffusers_unet import require_diffusers, unet_options

HUB = "https://huggingface.co"
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Endings of torch pickles, which are not read.
TORCH_FILES = (".bin", ".ckpt", ".pt", ".pth")
_MODEL, _CONFIG, _SCHEDULER = "UNet2DModel", "config.json", "scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model"
_MOST_MODULES = 10_000
# For schedulers saved before a key existed, or left at its default.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DDPM)}


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form OWNER/NAME; a file ending means a file."""
    files = (".pkl", ".safetensors", *TORCH_FILES)
    return bool(_HUB_ID.fullmatch(source)) and Path(source).suffix not in files


def read_diffusers(source: str | Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """The denoiser of a diffusers folder or hub id, in eval mode, and its metadata.

    Args:
        source: A folder as ``save_pretrained`` writes it, or OWNER/NAME on the hub.

    Returns:
        The denoiser, and metadata: ``source``, ``class`` of the model, ``scheduler``; ``licence``
        if its README.md has one; ``clip_sample`` if the scheduler clips predictions to that range
        (this project's solvers do not).

    Raises:
        CheckpointError: It is not such a folder, or its model or scheduler is not supported.
        InputError: diffusers is not installed, or the hub cannot be reached.
    """
    require_diffusers()
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    model_folder, scheduler_file = _find(folder)
    config = _read_json(model_folder / _CONFIG)
    if config.get("_class_name") != _MODEL:
        raise CheckpointError(
            f"{model_folder / _CONFIG} describes a {config.get('_class_name')}; "
            f"this version reads {_MODEL} (unconditional pixel models, and those with classes)"
        )
    precond, facts = _scheduler(scheduler_file)
    # Record an id, but not a path of this machine.
    name = folder.resolve().name if Path(source).is_dir() else str(source)
    metadata = {"source": name, "class": _MODEL, **facts}
    if licence := _licence(folder / "README.md"):
        metadata["licence"] = licence
    return _denoiser(model_folder, config, precond), metadata


def _denoiser(folder: Path, config: dict[str, Any], precond: DDPM) -> NetworkDenoiser:
    import torch
    from diffusers import UNet2DModel

    options = unet_options(config)
    with without_memory(_MOST_MODULES):
        values = sum(value.numel() for value in DiffusersUNet(options).parameters())
    size = sum(file.stat().st_size for file in folder.glob(f"{_WEIGHTS}*"))
    # A value takes 2 bytes or more. If there is no file, diffusers names it.
    if 0 < size < values:
        raise CheckpointError(
            f"{folder} describes {values} weights, but its weights file has {size} bytes"
        )
    try:
        # diffusers' loader knows the weights' names of its older versions.
        loaded = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"diffusers cannot load {folder} ({reason})") from error
    with torch.random.fork_rng(devices=[]):
        network = DiffusersUNet(options)
    network.unet.load_state_dict(loaded.state_dict())
    return NetworkDenoiser(network, precond).eval()


def _find(folder: Path) -> tuple[Path, Path]:
    """The model's folder and the scheduler's file."""
    for model, scheduler in (("unet", "scheduler"), (".", ".")):
        if (folder / model / _CONFIG).is_file():
            file = folder / scheduler / _SCHEDULER
            if file.is_file():
                return folder / model, file
            raise CheckpointError(
                f"{folder} has a model but no {file.relative_to(folder)}, which defines its noise "
                "levels; save the whole pipeline, or the scheduler beside the model"
            )
    raise CheckpointError(
        f"{folder} is not a diffusers folder: it has neither unet/{_CONFIG} nor {_CONFIG}; give "
        "a folder that save_pretrained wrote"
    )


def _scheduler(file: Path) -> tuple[DDPM, dict[str, Any]]:
    config = _read_json(file)
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise CheckpointError(
            f"{file} describes a {name}, but only {' and '.join(SCHEDULERS)} are supported; make "
            "one of them from its config and save that in its place"
        )
    if config.get("rescale_betas_zero_snr"):
        raise CheckpointError(
            f"{file} has rescale_betas_zero_snr, which is not supported: its last level is pure "
            "noise, which has no sigma"
        )
    try:
        precond = DDPM(**{key: config.get(key, value) for key, value in _DEFAULTS.items()})
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    facts: dict[str, Any] = {"scheduler": name}
    if config.get("thresholding"):
        facts["thresholding"] = True
    elif config.get("clip_sample", True):
        facts["clip_sample"] = config.get("clip_sample_range", 1.0)
    return precond, facts


def _from_hub(source: str) -> Path:
    """A folder with the needed files of a hub repository; huggingface_hub caches and resumes."""
    from huggingface_hub import snapshot_download

    if not is_hub_id(source):
        raise CheckpointError(f"{source} is neither a diffusers folder nor a hub id OWNER/NAME")
    texts = [*(f"{part}{_CONFIG}" for part in ("", "unet/")), "README.md"]
    texts += [_SCHEDULER, f"scheduler/{_SCHEDULER}"]
    try:
        for ending in ("safetensors", "bin"):
            weights = [f"{part}{_WEIGHTS}.{ending}" for part in ("", "unet/")]
            folder = Path(snapshot_download(source, allow_patterns=texts + weights))
            if any(folder.rglob(f"{_WEIGHTS}.{ending}")):
                break
    # huggingface_hub raises OSErrors and ValueErrors for repositories, files and names.
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot fetch {source} from the Hugging Face hub ({reason}); fetch "
            f"{HUB}/{source} by hand into a folder and give the folder"
        ) from error
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} does not hold a configuration")
    return found


def _licence(readme: Path) -> str | None:
    """``license:`` in a model card's front matter."""
    if not readme.is_file():
        return None
    text = readme.read_text(errors="replace")
    front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front, re.MULTILINE)
    # Our own cards have `unknown` without a licence.
    return found[1] if found and found[1] != "unknown" else None
