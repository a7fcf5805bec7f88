"""Network and sampler of an SFD checkpoint (zju-pi/diff-sampler, sfd-main).

Such a file has the modules and the options of the distillation, but not the network's arguments,
which the reference hard-codes for each data set. They are derived from the modules, so that any
size loads; names and shapes of all weights are compared afterwards.
"""

from typing import Any

from torch import Tensor

from bdense.diffusion.sampling import Sampler
from bdense.diffusion.schedules import Schedule
from bdense.errors import CheckpointError, InputError
from bdense.models.edm_pickle import ForeignNetwork

# Every network of the reference has these layers, but only those distilled with a step condition
# use them; teachers' files do not have them.
_STEP_LAYERS = ("map_step_layer0.", "map_step_layer1.", "affine_step.")
# SFD-v draws its number of time stamps from these, regardless of the options.
_SFD_V_POINTS = range(4, 8)


def network_options(foreign: ForeignNetwork) -> dict[str, Any]:
    """Arguments of the network, like the ``init_kwargs`` of an EDM file.

    Raises:
        CheckpointError: The modules are not those of a DDPM++ or ADM network.
    """
    try:
        return _read_off(foreign)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"the modules of this {foreign.class_name} are not those of an SFD network "
            f"({type(error).__name__}: {error})"
        ) from error


def _read_off(foreign: ForeignNetwork) -> dict[str, Any]:
    modules = foreign.modules
    model_type = modules["model"].class_name
    channels = modules["model.map_noise"].attributes["num_channels"]
    # The encoder's blocks in order, as in "model.enc.32x32_block0".
    blocks: dict[int, list[dict[str, Any]]] = {}
    for name, module in modules.items():
        where, _, block = name.rpartition(".")
        if where == "model.enc" and "_block" in block:
            blocks.setdefault(int(block.split("x")[0]), []).append(module.attributes)
    first = next(iter(blocks.values()))
    embedding = modules["model.map_layer1"].attributes["out_features"]
    augment = modules.get("model.map_augment")
    return {
        "model_type": model_type,
        **{name: foreign.attributes[name] for name in ("img_resolution", "img_channels")},
        "label_dim": foreign.attributes["label_dim"],
        "augment_dim": augment.attributes["in_features"] if augment else 0,
        "model_channels": channels,
        "channel_mult": [level[0]["out_channels"] // channels for level in blocks.values()],
        "channel_mult_emb": embedding // channels,
        "num_blocks": len(first),
        "attn_resolutions": [side for side, level in blocks.items() if level[0]["num_heads"]],
        "dropout": first[0]["dropout"],
        "label_dropout": modules["model"].attributes["label_dropout"],
        "step_condition": step_condition(foreign),
    }


def step_condition(foreign: ForeignNetwork) -> bool:
    """Whether the student is told its number of time stamps, according to the file's flag.

    The reference's second stage trains with its teacher's condition but writes the flag of its
    command line. Its sampler follows the flag, and so does this.
    """
    assert foreign.training_kwargs is not None
    return bool(foreign.training_kwargs.get("use_step_condition"))


def used_weights(foreign: ForeignNetwork) -> dict[str, Tensor]:
    """The weights, without step layers if the student was trained without them."""
    if step_condition(foreign):
        return foreign.state_dict
    return {
        name: value
        for name, value in foreign.state_dict.items()
        if not any(layer in name for layer in _STEP_LAYERS)
    }


def student_samplers(foreign: ForeignNetwork) -> list[Sampler]:
    """The samplers that the student was distilled for: Euler steps on its own grids.

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
        several = step_condition(foreign) and not training.get("is_second_stage")
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
