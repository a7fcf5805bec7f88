"""The step condition of SFD-v: one student for several numbers of steps (Zhou et al. 2024).

The network's input N + 1, the sampler's number of time stamps, has its own layers: ``map_step``,
``map_step_layer0``, ``map_step_layer1``, and in each block ``affine_step``; in a network of
diffusers ``affine_step`` adds to each of its time embeddings. A one-shot student
(``bdense.methods.one_shot``) gets the branch weights that it is trained under through them.
"""

from typing import Literal

import torch

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.errors import CheckpointError, InputError
from bdense.networks.layers import UNetBlock
from bdense.networks.step_embedding import StepShift
from bdense.randomness import Stream, seeded

Start = Literal["teacher", "random"]


def with_step_condition(
    denoiser: NetworkDenoiser, *, start: Start = "teacher", seed: int, values: int = 1
) -> NetworkDenoiser:
    """A copy of the denoiser with the layers of the step condition.

    Args:
        denoiser: Without step condition; it is not changed. Branches are kept.
        start: ``teacher``: the blocks' new layers are zero, so that the copy equals the denoiser
            at any N until it is trained. ``random``: they start as the reference's do, and the
            copy differs from the denoiser at once.
        seed: Of the new layers.
        values: Numbers that the condition consists of.

    Raises:
        InputError: The denoiser has a step condition already, or its network can have none.
    """
    # Drawn on the CPU, and from other numbers than a teacher of the same seed started with.
    cpu = torch.device("cpu")
    with seeded(cpu, seed, Stream.INITIALISATION, 1):
        conditioned = _built(denoiser, values)
    if start == "random":
        with seeded(cpu, seed, Stream.INITIALISATION, 2):
            _draw_block_layers(conditioned)
    conditioned.to(next(denoiser.parameters())).train(denoiser.training)
    result = conditioned.load_state_dict(denoiser.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("map_step" in key or "affine_step" in key for key in result.missing_keys)
    return conditioned.execute(denoiser.execution)


def require_no_condition_yet(denoiser: NetworkDenoiser, values: int = 1) -> None:
    """Raise the errors of ``with_step_condition`` without taking memory."""
    with torch.device("meta"):
        _built(denoiser, values)


def _built(denoiser: NetworkDenoiser, values: int) -> NetworkDenoiser:
    """A new denoiser with the layers of the condition."""
    if denoiser.step_condition:
        raise InputError(
            "the denoiser has a step condition already; use it as it is, or start from the "
            "teacher it was made of"
        )
    description = denoiser.describe()
    several = {"step_values": values} if values > 1 else {}
    description["config"] = description["config"] | {"step_condition": True, **several}
    try:
        return build_denoiser(description)
    except CheckpointError as error:
        raise InputError(
            f"a {description['network']} takes no step condition, which students of several "
            f"numbers of steps and one-shot searches need ({error})"
        ) from error


def _draw_block_layers(denoiser: NetworkDenoiser) -> None:
    for block in denoiser.modules():
        if isinstance(block, UNetBlock) and block.affine_step is not None:
            block.affine_step.reset_parameters()
        elif isinstance(block, StepShift):
            block.draw()
