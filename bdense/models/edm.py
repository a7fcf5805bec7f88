"""Denoisers from pickles of EDM and SFD (zju-pi/diff-sampler, sfd-main), read by ``pickles``.

An SFD file has the modules and the options of the distillation, but not the network's arguments,
which the reference hard-codes for each data set. They are derived from the modules, so that any
size loads; names and shapes of all weights are compared afterwards.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser, restore
from bdense.diffusion.preconditioning import IDDPM, PRECONDITIONINGS, make_preconditioning
from bdense.diffusion.sampling import Sampler, served_metadata
from bdense.diffusion.schedules import Schedule
from bdense.errors import CheckpointError, InputError
from bdense.files import header_of
from bdense.models.pickles import ForeignNetwork, read_edm_pickle

# Class in an EDM file: our preconditioning, and the network if the file names none.
EDM_CLASSES = {
    "EDMPrecond": ("edm", "DhariwalUNet"),
    "VPPrecond": ("vp", "SongUNet"),
    "VEPrecond": ("ve", "SongUNet"),
    "iDDPMPrecond": ("iddpm", "DhariwalUNet"),
}
# EDM's defaults that differ from ours: its files omit arguments that were not given.
EDM_DEFAULTS: dict[str, dict[str, Any]] = {"SongUNet": {"channel_mult": (1, 2, 2, 2)}}
# Every network of SFD has these layers, but only those distilled with a step condition use them;
# teachers' files do not have them.
_STEP_LAYERS = ("map_step_layer0.", "map_step_layer1.", "affine_step.")
# SFD-v draws its number of time stamps from these, regardless of the options.
_SFD_V_POINTS = range(4, 8)


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
    with header_of(path):
        denoiser = denoiser_from_edm(foreign)
        if foreign.training_kwargs is not None:
            metadata |= {
                "kind": "student",
                "method": "sfd",
                "paper": "Simple and Fast Distillation (SFD, arXiv 2409.19681)",
                "training": foreign.training_kwargs,
                **served_metadata(student_samplers(foreign)),
            }
    return denoiser, metadata


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
        options = _network_options(foreign)
        if not options["step_condition"]:
            weights = {
                name: value
                for name, value in weights.items()
                if not any(layer in name for layer in _STEP_LAYERS)
            }
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
    config = EDM_DEFAULTS.get(network, {}) | given
    description = {"precond": precond, **columns, "network": network, "config": config}
    column = make_preconditioning(precond, columns)
    if isinstance(column, IDDPM):
        weights = _without_levels(weights, column)
    return restore(description, weights, f"the {foreign.class_name}")


def _without_levels(weights: dict[str, Tensor], column: IDDPM) -> dict[str, Tensor]:
    """The weights without an iDDPM file's noise levels, which we compute."""
    if "u" not in weights:
        return weights
    ours, stored = torch.tensor(column.levels()), weights["u"]
    # The file's levels come from a float32 recursion that loses 3 digits of the lowest ones.
    if ours.shape != stored.shape or not torch.allclose(stored.float(), ours, rtol=0.01):
        raise CheckpointError(
            f"the noise levels u of the iDDPMPrecond are not those of C_1, C_2 and M: "
            f"{stored.numel()} from {float(stored.max()):.4g} down, expected {ours.numel()} from "
            f"{float(ours.max()):.4g}"
        )
    return {name: value for name, value in weights.items() if name != "u"}


def _network_options(foreign: ForeignNetwork) -> dict[str, Any]:
    """Arguments of an SFD file's network, like the ``init_kwargs`` of an EDM file."""
    modules = foreign.modules
    try:
        model = modules["model"]
        channels = modules["model.map_noise"].attributes["num_channels"]
        embedding = modules["model.map_layer1"].attributes["out_features"]
        augment = modules.get("model.map_augment")
        # The encoder's blocks in order, as in "model.enc.32x32_block0".
        blocks: dict[int, list[dict[str, Any]]] = {}
        for name, module in modules.items():
            where, _, block = name.rpartition(".")
            if where == "model.enc" and "_block" in block:
                blocks.setdefault(int(block.split("x")[0]), []).append(module.attributes)
        first = next(iter(blocks.values()), [])
        return {
            "model_type": model.class_name,
            "img_resolution": foreign.attributes["img_resolution"],
            "img_channels": foreign.attributes["img_channels"],
            "label_dim": foreign.attributes["label_dim"],
            "augment_dim": augment.attributes["in_features"] if augment else 0,
            "model_channels": channels,
            "channel_mult": [level[0]["out_channels"] // channels for level in blocks.values()],
            "channel_mult_emb": embedding // channels,
            "num_blocks": len(first),
            "attn_resolutions": [side for side, level in blocks.items() if level[0]["num_heads"]],
            "dropout": first[0]["dropout"],
            "label_dropout": model.attributes["label_dropout"],
            "step_condition": _step_condition(foreign),
        }
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"the modules of this {foreign.class_name} are not those of an SFD network "
            f"({type(error).__name__}: {error})"
        ) from error


def _step_condition(foreign: ForeignNetwork) -> bool:
    """Whether the student's input includes its number of time stamps, by the file's flag.

    The reference's second stage trains with its teacher's condition but writes the flag of its
    command line. Its sampler follows the flag, and so does this.
    """
    assert foreign.training_kwargs is not None
    return bool(foreign.training_kwargs.get("use_step_condition"))


def student_samplers(foreign: ForeignNetwork) -> list[Sampler]:
    """The samplers that an SFD student was distilled for: Euler steps on its own grids.

    Raises:
        CheckpointError: The options name a sampler that this version does not have.
    """
    training = foreign.training_kwargs
    assert training is not None
    try:
        schedule = Schedule(
            kind=training["schedule_type"],
            rho=float(training["schedule_rho"]),
            sigma_min=float(training["sigma_min"]),
            sigma_max=float(training["sigma_max"]),
        )
        several = _step_condition(foreign) and not training.get("is_second_stage")
        # The reference counts time stamps, one more than there are intervals.
        return [
            Sampler(num_intervals=int(points) - 1, afs=bool(training["afs"]), schedule=schedule)
            for points in (_SFD_V_POINTS if several else [training["num_steps"]])
        ]
    except KeyError as error:
        raise CheckpointError(f"training_kwargs of this SFD student lack {error}") from error
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"training_kwargs of this SFD student name no sampler of this version: {error}"
        ) from error
