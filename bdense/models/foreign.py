"""Denoisers out of the pickles of EDM and SFD, once the restricted reader has taken them apart."""

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

# Class in an EDM file: our preconditioning, and the network where the file names none.
EDM_CLASSES = {
    "EDMPrecond": ("edm", "DhariwalUNet"),
    "VPPrecond": ("vp", "SongUNet"),
    "VEPrecond": ("ve", "SongUNet"),
    "iDDPMPrecond": ("iddpm", "DhariwalUNet"),
}
# Where EDM's defaults are not ours: its files leave out arguments that were not given.
EDM_DEFAULTS: dict[str, dict[str, Any]] = {"SongUNet": {"channel_mult": (1, 2, 2, 2)}}


def load_foreign(path: Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """A denoiser in eval mode and what its pickle says of it.

    An SFD student comes with ``sampler`` and ``nfe``, as ``bdense distill`` writes them.

    Raises:
        CheckpointError: The file is no such pickle, or its weights do not fit.
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
    return fill(denoiser, _without_levels(weights, denoiser), f"the {foreign.class_name}")


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
