"""Build denoisers from pickles of EDM and SFD, which the restricted reader has parsed."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser, fill
from bdense.diffusion.preconditioning import IDDPM, PRECONDITIONINGS
from bdense.diffusion.sampling import served_metadata
from bdense.errors import CheckpointError, InputError
from bdense.models import sfd_checkpoints
from bdense.models.edm_pickle import ForeignNetwork, read_edm_pickle

# Class in an EDM file: our preconditioning, and the network if the file names none.
EDM_CLASSES = {
    "EDMPrecond": ("edm", "DhariwalUNet"),
    "VPPrecond": ("vp", "SongUNet"),
    "VEPrecond": ("ve", "SongUNet"),
    "iDDPMPrecond": ("iddpm", "DhariwalUNet"),
}
# EDM's defaults that differ from ours: its files omit arguments that were not given.
EDM_DEFAULTS: dict[str, dict[str, Any]] = {"SongUNet": {"channel_mult": (1, 2, 2, 2)}}


def load_foreign(path: Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """A denoiser in eval mode and its metadata, from a pickle of EDM or SFD.

    The metadata of an SFD student have ``sampler`` and ``nfe``, as ``bdense distill`` writes them.

    Raises:
        CheckpointError: The file is not such a pickle, or its weights do not fit.
    """
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
    """The denoiser that a pickle of EDM or SFD describes, in float32 and in eval mode.

    Raises:
        CheckpointError: This version does not support its preconditioning or network.
        InputError: Its options are not valid.
    """
    if foreign.class_name not in EDM_CLASSES:
        raise CheckpointError(
            f"a {foreign.class_name} is not supported; this version reads {', '.join(EDM_CLASSES)}"
        )
    precond, usual_network = EDM_CLASSES[foreign.class_name]
    options, weights = foreign.init_kwargs, foreign.state_dict
    if foreign.training_kwargs is not None:
        options = sfd_checkpoints.network_options(foreign)
        weights = sfd_checkpoints.used_weights(foreign)
    # The module's attribute, if there is one, is what the arguments resulted in.
    columns = {
        field.name: foreign.attributes.get(field.name, options.get(field.name, field.default))
        for field in fields(PRECONDITIONINGS[precond])
    }
    network = options.get("model_type", usual_network)
    # Not arguments of our network: half precision is not a property of the weights, and a schedule
    # has its own levels.
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
    return fill(denoiser, _without_levels(weights, denoiser), f"the {foreign.class_name}")


def _without_levels(weights: dict[str, Tensor], denoiser: NetworkDenoiser) -> dict[str, Tensor]:
    """The weights without an iDDPM file's noise levels, which we compute."""
    if not isinstance(denoiser.precond, IDDPM) or "u" not in weights:
        return weights
    ours, stored = torch.tensor(denoiser.precond.levels()), weights["u"]
    # The file's levels come from a float32 recursion that loses 3 digits of the lowest ones.
    if ours.shape != stored.shape or not torch.allclose(stored.float(), ours, rtol=0.01):
        raise CheckpointError(
            f"the noise levels u of the iDDPMPrecond are not those of C_1, C_2 and M: "
            f"{stored.numel()} from {float(stored.max()):.4g} down, expected {ours.numel()} from "
            f"{float(ours.max()):.4g}"
        )
    return {name: value for name, value in weights.items() if name != "u"}
