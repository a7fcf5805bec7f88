"""Checkpoints and exports: safetensors, their metadata in the header, appearing by one rename."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdense import sfd_checkpoints
from bdense.denoiser import NetworkDenoiser, build_denoiser
from bdense.edm_pickle import ForeignNetwork, read_edm_pickle
from bdense.errors import CheckpointError, InputError
from bdense.files import atomic_write
from bdense.preconditioning import IDDPM, PRECONDITIONINGS
from bdense.sampling import samplers_from, served_metadata

HEADER_KEY = "bdense"
FORMAT = 1
# Class in an EDM file: our preconditioning, and the network where the file names none.
EDM_CLASSES = {
    "EDMPrecond": ("edm", "DhariwalUNet"),
    "VPPrecond": ("vp", "SongUNet"),
    "VEPrecond": ("ve", "SongUNet"),
    "iDDPMPrecond": ("iddpm", "DhariwalUNet"),
}
# Where EDM's defaults are not ours: its files leave out arguments that were not given.
EDM_DEFAULTS: dict[str, dict[str, Any]] = {"SongUNet": {"channel_mult": (1, 2, 2, 2)}}
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
    """A denoiser in eval mode and its metadata, from our safetensors or a pickle of EDM or SFD.

    The metadata of an SFD student has its ``sampler``, as ``bdense distill`` writes it, and its
    ``nfe`` where it serves several.

    Raises:
        CheckpointError: The file is no such checkpoint, or its weights do not fit.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        return _load_foreign(path)
    tensors, metadata = load_tensors(path)
    if "architecture" not in metadata:
        raise CheckpointError(f"{path} holds {metadata.get('kind', 'tensors')}, not a denoiser")
    with _header_of(path):
        denoiser = build_denoiser(metadata.pop("architecture"))
        samplers_from(metadata)
    return _fill(denoiser, tensors, str(path)), metadata


@contextlib.contextmanager
def _header_of(path: Path) -> Iterator[None]:
    """What a header makes no sense of, said with the file's name."""
    try:
        yield
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # All that numbers and texts in each other's place can lead to.
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"{path} has a damaged header ({error!r}); fetch or make it again"
        ) from error


def _load_foreign(path: Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    foreign = read_edm_pickle(path)
    metadata: dict[str, Any] = {
        "source": path.name,
        "class": foreign.class_name,
        "embedded_source_bytes": foreign.embedded_source_bytes,
    }
    try:
        denoiser = denoiser_from_edm(foreign)
        if foreign.training_kwargs is None:
            return denoiser, metadata
        return denoiser, metadata | {
            "kind": "student",
            "method": "sfd",
            "training": foreign.training_kwargs,
            **served_metadata(sfd_checkpoints.student_samplers(foreign)),
        }
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def denoiser_from_edm(foreign: ForeignNetwork) -> NetworkDenoiser:
    """The denoiser a pickle of EDM or SFD describes, in float32 and in eval mode.

    Raises:
        CheckpointError: Its preconditioning or network is not built in this version.
        InputError: Its options make no network.
    """
    if foreign.class_name not in EDM_CLASSES:
        raise CheckpointError(
            f"no denoiser is built from a {foreign.class_name}; "
            f"this version builds {', '.join(EDM_CLASSES)}"
        )
    precond, usual_network = EDM_CLASSES[foreign.class_name]
    options, weights = foreign.init_kwargs, foreign.state_dict
    if foreign.training_kwargs is not None:
        options = sfd_checkpoints.network_options(foreign)
        weights = sfd_checkpoints.used_weights(foreign)
    # The module's own attribute is what the file's arguments came to.
    columns = {
        field.name: foreign.attributes.get(field.name, options.get(field.name, field.default))
        for field in fields(PRECONDITIONINGS[precond])
    }
    network = options.get("model_type", usual_network)
    # Not the network's: half precision is no property of the weights, and a schedule states its
    # own levels.
    others = {"model_type", "use_fp16", "sigma_min", "sigma_max", *columns}
    given = {name: value for name, value in options.items() if name not in others}
    denoiser = build_denoiser(
        {
            "precond": precond,
            **columns,
            "network": network,
            "config": EDM_DEFAULTS.get(network, {}) | given,
        }
    )
    return _fill(denoiser, _without_levels(weights, denoiser), f"the {foreign.class_name}")


def _without_levels(weights: dict[str, Tensor], denoiser: NetworkDenoiser) -> dict[str, Tensor]:
    """The weights without the noise levels that an iDDPM file keeps and we compute."""
    if not isinstance(denoiser.precond, IDDPM) or "u" not in weights:
        return weights
    ours, stored = torch.tensor(denoiser.precond.levels()), weights["u"]
    # The file's come from a float32 recursion that loses 3 digits of the lowest levels.
    if ours.shape != stored.shape or not torch.allclose(stored.float(), ours, rtol=0.01):
        raise CheckpointError(
            f"the noise levels u of the iDDPMPrecond are not those of C_1, C_2 and M: "
            f"{stored.numel()} from {float(stored.max()):.4g} down, expected {ours.numel()} from "
            f"{float(ours.max()):.4g}"
        )
    return {name: value for name, value in weights.items() if name != "u"}


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
        # Flat: a 1 x 1 kernel in NHWC memory counts as contiguous with strides no view accepts.
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
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
            saved = {kind: tensors[f"adam.{kind}.{name}"] for kind in ADAM_TENSORS}
            step = saved.pop("step").to(device=parameter.device, dtype=torch.float32)
            # The moments in the parameter's own memory layout, which a file does not keep: fused
            # Adam pairs them up by their place in memory.
            moments = {kind: _like(value, parameter) for kind, value in saved.items()}
            optimizer.state[parameter] = {"step": step, **moments}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """float32, on the parameter's device and in its memory layout."""
    return torch.empty_like(parameter, dtype=torch.float32, requires_grad=False).copy_(value)
