"""Models and other tensors: our safetensors files, and whatever else a model is loaded from."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser, restore
from bdense.diffusion.sampling import as_measured, samplers_from
from bdense.errors import CheckpointError, InputError, listed
from bdense.files import atomic_write, header_of, require_no_page
from bdense.models.diffusers_files import MODEL_FILE, TORCH_FILES, folder_of, is_hub_id
from bdense.models.diffusers_teacher import read_diffusers
from bdense.models.edm import load_foreign
from bdense.models.zoo import (
    CHECKPOINTS,
    CONVERTED_CHECKPOINTS,
    HUB_CHECKPOINTS,
    PUBLIC_MODELS,
    resolve_checkpoint,
)

HEADER_KEY = "bdense"
FORMAT = 1
# Errors of a disk or its server that may pass; the file may be intact.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENOMEM, errno.EAGAIN)

_MOST_LETTERS, _MOST_TENSORS = 2**22, 100_000
_MOST_NAMED = 6  # settings in which two runs differ


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata (JSON values) as one safetensors file."""
    header = {HEADER_KEY: json.dumps({"format": FORMAT, **metadata})}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as scratch:
        try:
            save_file(on_cpu, scratch, metadata=header)
        except SafetensorError as error:
            raise _system_error(error, path) from error


def _system_error(error: Exception, path: Path) -> Exception:
    """The operating system's error, such as a full disk, which safetensors only quotes."""
    if (found := re.search(r"os error (\d+)", str(error))) is None:
        return error
    number = int(found[1])
    return OSError(number, os.strerror(number), str(path))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that ``save_tensors`` wrote.

    Raises:
        CheckpointError: The file is missing, cut short, or not one of ours.
        OSError: The disk or its server does not answer at the moment.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys()
            # It would be read as far more than its bytes.
            if len(header.get(HEADER_KEY, "")) > _MOST_LETTERS or len(names) > _MOST_TENSORS:
                raise CheckpointError(
                    f"{path}: its header has more than {_MOST_LETTERS} letters or {_MOST_TENSORS} "
                    "tensors; no model's has"
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        fault = _system_error(error, path)
        if isinstance(fault, OSError) and fault.errno in _PASSING:
            raise fault from error
        require_no_page(path)
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); it is another kind of file, or cut "
            "short: fetch or make it again"
        ) from error
    if HEADER_KEY not in header:
        raise CheckpointError(
            f"{path} is a safetensors file without a {HEADER_KEY!r} header, so bdense did not "
            f"write it (header keys: {sorted(header)})"
        )
    try:
        metadata = json.loads(header[HEADER_KEY])
    except RecursionError as error:
        raise CheckpointError(f"{path}: its {HEADER_KEY!r} header is nested too deeply") from error
    except json.JSONDecodeError:
        metadata = None
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path}: its {HEADER_KEY!r} header is damaged, or bdense did not write it; fetch or "
            "make the file again"
        )
    if (found := metadata.pop("format", None)) != FORMAT:
        raise CheckpointError(
            f"{path} has format {found!r}, and this version reads {FORMAT}; use a bdense that "
            "reads it"
        )
    return tensors, metadata


def other_run(path: Path, identity: Mapping[str, Any]) -> str:
    """Why a file is not the model of the run with this identity; "" if it is.

    Args:
        identity: What the file's metadata have as ``identity``: flat JSON values.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get(HEADER_KEY, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict) or "architecture" not in stored:
        return "is not a model that bdense wrote"
    kept = stored.get("identity")
    if not isinstance(kept, dict):
        return "is a model without a record of its settings"
    keys = kept.keys() | identity.keys()
    differing = sorted(
        {key.removeprefix("config.") for key in keys if kept.get(key) != identity.get(key)}
    )
    if not differing:
        return ""
    return f"is the model of another run (differs in: {listed(differing, _MOST_NAMED)})"


def save_denoiser(path: Path, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> None:
    """Write a denoiser with its architecture and ``metadata``."""
    save_tensors(path, denoiser.state_dict(), {**metadata, "architecture": denoiser.describe()})


def load_denoiser(path: Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """A denoiser in eval mode and its metadata, from our safetensors or a pickle of EDM or SFD.

    The metadata of an SFD student have ``sampler``, as ``bdense distill`` writes it, and ``nfe``
    if it serves several.

    Raises:
        CheckpointError: The file is not such a checkpoint, or its weights do not fit.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        denoiser, metadata = load_foreign(path)
        denoiser.samplers = tuple(samplers_from(metadata))
        return denoiser, metadata
    tensors, metadata = load_tensors(path)
    if "architecture" not in metadata:
        raise CheckpointError(f"{path} holds {metadata.get('kind', 'tensors')}, not a denoiser")
    with header_of(path):
        denoiser = restore(metadata.pop("architecture"), tensors, "the file")
        denoiser.samplers = tuple(samplers_from(metadata))
    return denoiser, metadata


def load_model(source: str | Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """A model from a public name, a file, a folder or a hub id.

    Args:
        source: Name of a published checkpoint (downloaded once), a file of ours, EDM's or SFD's,
            a folder of ``export_folder`` or in diffusers' format, or OWNER/NAME of either on the
            Hugging Face hub.

    Returns:
        The denoiser in eval mode and its metadata; these have ``licence``, an SPDX identifier,
        only if known. A student's ``samplers``, also those of its metadata, draw as its FID was
        measured: at the guidance of a study's ``evaluation.guidance``.

    Raises:
        InputError: It is something else, or cannot be downloaded or read.
    """
    denoiser, stored = load_stored(source)
    with header_of(Path(source)):
        metadata = as_measured(stored)
        denoiser.samplers = tuple(samplers_from(metadata))
    return denoiser, metadata


def load_stored(source: str | Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """As ``load_model``, but a student draws as it was distilled, from which training goes on."""
    name, path = str(source), Path(source)
    if not name:  # which Path takes for the current folder
        raise InputError("the name of the model is empty; give a file, a folder or a public name")
    if name in CHECKPOINTS:
        denoiser, metadata = load_denoiser(CHECKPOINTS[name].fetch())
        return denoiser, metadata | _terms(name)
    if name in CONVERTED_CHECKPOINTS:
        denoiser, metadata = read_diffusers(CONVERTED_CHECKPOINTS[name].fetch())
        return denoiser, metadata | _terms(name)
    on_hub = is_hub_id(name) and not path.exists()
    if on_hub and path.parent.is_dir():
        raise InputError(
            f"there is no file {name}; it is not taken for a hub id because {path.parent} is a "
            "folder here"
        )
    folder = folder_of(name) if on_hub else path
    try:
        if _is_ours(folder / MODEL_FILE):
            return load_denoiser(folder / MODEL_FILE)
        if folder.is_dir():
            denoiser, metadata = read_diffusers(source, folder)
            known = on_hub and name in HUB_CHECKPOINTS
            return denoiser, metadata | (_terms(name) if known else {})
    except CheckpointError as error:
        if not on_hub:
            raise
        # By the id that was given, not its place in the cache.
        raise CheckpointError(str(error).replace(str(folder), name)) from error
    file = resolve_checkpoint(path)
    if file.suffix in TORCH_FILES:
        raise CheckpointError(
            f"{file} has a format that is not read; give .safetensors of bdense, .pkl of EDM or "
            "SFD, a folder of bdense or in diffusers' format, a hub id, or a public name"
        )
    denoiser, metadata = load_denoiser(file)
    # A published file keeps its name in any folder.
    if path.suffix == ".pkl" and path.stem in CHECKPOINTS:
        metadata = _terms(path.stem) | metadata
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


def _terms(name: str) -> dict[str, str]:
    published = PUBLIC_MODELS[name]
    return {
        "source": published.name,
        "url": published.url,
        "licence": published.licence,
        "citation": published.citation,
    }


def denoiser_sha256(denoiser: NetworkDenoiser) -> str:
    """Hex digest of a denoiser's architecture and weights."""
    digest = hashlib.sha256(json.dumps(denoiser.describe(), sort_keys=True).encode())
    for name, value in sorted(denoiser.state_dict().items()):
        digest.update(name.encode())
        # Flat: a 1 x 1 kernel in NHWC memory is contiguous but has strides that view refuses.
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
