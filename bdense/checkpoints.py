"""Checkpoints and exports: safetensors, their metadata in the header, appearing by one rename."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdense.denoiser import NetworkDenoiser, build_denoiser
from bdense.edm_pickle import ForeignNetwork, read_edm_pickle
from bdense.errors import CheckpointError
from bdense.files import atomic_write

HEADER_KEY = "bdense"
FORMAT = 1
ADAM_TENSORS = ("step", "exp_avg", "exp_avg_sq")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able metadata as one safetensors file."""
    header = {HEADER_KEY: json.dumps({"format": FORMAT, **metadata})}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as scratch:
        save_file(on_cpu, scratch, metadata=header)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that ``save_tensors`` wrote.

    Raises:
        CheckpointError: The file is missing, cut short, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); it may be cut short: fetch or make "
            "it again"
        ) from error
    if HEADER_KEY not in header:
        raise CheckpointError(
            f"{path} is a safetensors file without a {HEADER_KEY!r} header; this project did not "
            f"write it (header keys: {sorted(header)})"
        )
    try:
        metadata = json.loads(header[HEADER_KEY])
    except json.JSONDecodeError:
        metadata = None
    if not isinstance(metadata, dict) or metadata.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} has a format this version does not read; upgrade bdense")
    return tensors, metadata


def save_denoiser(path: Path, denoiser: NetworkDenoiser, metadata: Mapping[str, Any]) -> None:
    """Write a denoiser with what is needed to build it again, and ``metadata`` beside that."""
    save_tensors(path, denoiser.state_dict(), {**metadata, "architecture": denoiser.describe()})


def load_denoiser(path: Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """A denoiser in eval mode and its metadata, from our safetensors or from an EDM pickle.

    Raises:
        CheckpointError: The file is no such checkpoint, or its weights do not fit.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        foreign = read_edm_pickle(path)
        return denoiser_from_edm(foreign), {"source": path.name}
    tensors, metadata = load_tensors(path)
    if "architecture" not in metadata:
        raise CheckpointError(f"{path} holds {metadata.get('kind', 'tensors')}, not a denoiser")
    denoiser = build_denoiser(metadata.pop("architecture"))
    return _fill(denoiser, tensors, str(path)), metadata


def denoiser_from_edm(foreign: ForeignNetwork) -> NetworkDenoiser:
    """The denoiser an EDM pickle describes, in eval mode.

    Raises:
        CheckpointError: Its preconditioning or network is not built in this version.
    """
    options = dict(foreign.init_kwargs)
    network = options.pop("model_type", "DhariwalUNet")
    options.pop("use_fp16", None)
    precond = {"EDMPrecond": "edm"}.get(foreign.class_name, foreign.class_name)
    sigma_data = foreign.attributes.get("sigma_data", 0.5)
    # These bound the levels the network was trained for; a schedule states its own.
    for bound in ("sigma_min", "sigma_max", "sigma_data"):
        options.pop(bound, None)
    description = {
        "precond": precond,
        "sigma_data": sigma_data,
        "network": network,
        "config": options,
    }
    return _fill(build_denoiser(description), foreign.state_dict, foreign.class_name)


def _fill(denoiser: NetworkDenoiser, tensors: dict[str, Tensor], source: str) -> NetworkDenoiser:
    expected = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        missing = sorted(expected.keys() - found.keys())[:3]
        extra = sorted(found.keys() - expected.keys())[:3]
        shapes = sorted(k for k in expected.keys() & found.keys() if expected[k] != found[k])[:3]
        raise CheckpointError(
            f"the weights of {source} do not fit the network they describe: "
            f"missing {missing}, not expected {extra}, of another shape {shapes}"
        )
    denoiser.load_state_dict(tensors)
    return denoiser.eval()


def denoiser_sha256(denoiser: NetworkDenoiser) -> str:
    """Hex digest of a denoiser's architecture and weights."""
    digest = hashlib.sha256(json.dumps(denoiser.describe(), sort_keys=True).encode())
    for name, value in sorted(denoiser.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adam_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter name, for exact resumption."""
    return {
        f"adam.{kind}.{name}": optimizer.state[parameter][kind]
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
        for kind in ADAM_TENSORS
    }


def restore_adam(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what ``adam_tensors`` gave."""
    for name, parameter in module.named_parameters():
        if f"adam.step.{name}" in tensors:
            optimizer.state[parameter] = {
                kind: tensors[f"adam.{kind}.{name}"].to(
                    device=parameter.device, dtype=torch.float32
                )
                for kind in ADAM_TENSORS
            }
