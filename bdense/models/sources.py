"""Load a model from a public name, a file, a folder or a hub id."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import CheckpointError, InputError
from bdense.models.diffusers_teacher import TORCH_FILES, is_hub_id, read_diffusers
from bdense.models.public import (
    CHECKPOINTS,
    HUB_CHECKPOINTS,
    HubCheckpoint,
    PublicFile,
    published_as,
    resolve_checkpoint,
)
from bdense.models.store import HEADER_KEY, load_denoiser

# The weights in a folder that ``export_folder`` writes.
MODEL_FILE = "model.safetensors"


def load_model(source: str | Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """The denoiser in eval mode, and its metadata.

    Args:
        source: Name of a published checkpoint (downloaded once), a file of ours, EDM's or SFD's,
            a folder of ``export_folder`` or in diffusers' format, or OWNER/NAME on the Hugging
            Face hub.

    Returns:
        The denoiser and its metadata; these have ``licence``, an SPDX identifier, only if known.

    Raises:
        InputError: It is none of these, or cannot be downloaded or read.
    """
    name = str(source)
    if name in CHECKPOINTS:
        denoiser, metadata = load_denoiser(CHECKPOINTS[name].fetch())
        return denoiser, metadata | _terms(CHECKPOINTS[name])
    path = Path(source)
    on_hub = is_hub_id(name) and not path.exists()
    if on_hub and path.parent.is_dir():
        raise InputError(
            f"there is no file {name}; it is not taken for a hub id because {path.parent} is a "
            "folder here"
        )
    if _is_ours(path / MODEL_FILE):
        return load_denoiser(path / MODEL_FILE)
    if path.is_dir() or on_hub:
        denoiser, metadata = read_diffusers(source)
        known = HUB_CHECKPOINTS.get(name) if on_hub else None
        return denoiser, metadata | (_terms(known) if known is not None else {})
    file = resolve_checkpoint(path)
    if file.suffix in TORCH_FILES:
        raise CheckpointError(
            f"{file} has a format that is not read; give .safetensors of bdense, .pkl of EDM or "
            "SFD, a folder of bdense or in diffusers' format, a hub id, or a public name"
        )
    denoiser, metadata = load_denoiser(file)
    if (published := published_as(path)) is not None:
        metadata = _terms(published) | metadata
    return denoiser, metadata


def _is_ours(file: Path) -> bool:
    """Whether a folder's weights are ours; a damaged file counts, so that the error names it."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return HEADER_KEY in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return True


def _terms(published: PublicFile | HubCheckpoint) -> dict[str, str]:
    return {
        "source": published.name,
        "url": published.url,
        "licence": published.licence,
        "citation": published.citation,
    }
