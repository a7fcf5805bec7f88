"""The step condition of SFD-v: one student for several numbers of steps (Zhou et al. 2024).

The network's input N + 1, the sampler's number of time stamps, has its own layers: ``map_step``,
``map_step_layer0``, ``map_step_layer1``, and in each block ``affine_step``.
"""

from typing import Literal

import torch

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.errors import CheckpointError, InputError
from bdense.networks.layers import UNetBlock
from bdense.randomness import Stream, seeded

Start = Literal["teacher", "random"]


def with_step_condition(
    denoiser: NetworkDenoiser, *, start: Start = "teacher", seed: int
) -> NetworkDenoiser:
    """A copy of the denoiser with the layers of the step condition.

    Args:
        denoiser: Without step condition; it is not changed. Branches are kept.
        start: ``teacher``: the blocks' new layers are zero, so that the copy equals the denoiser
            at any N until it is trained. ``random``: they start as the reference's do, and the
            copy differs from the denoiser at once.
        seed: Of the new layers.

    Raises:
        InputError: The denoiser has a step condition already, or its network can have none.
    """
    if denoiser.step_condition:
        raise InputError(
            "the denoiser has a step condition already; use it as it is, or start from the "
            "teacher it was made of"
        )
    description = denoiser.describe()
    description["config"] = description["config"] | {"step_condition": True}
    # Drawn on the CPU, and from other numbers than a teacher of the same seed started with.
    cpu = torch.device("cpu")
    with seeded(cpu, seed, Stream.INITIALISATION, 1):
        try:
            conditioned = build_denoiser(description)
        except CheckpointError as error:
            raise InputError(
                f"a {description['network']} takes no step condition; distil it for one number "
                f"of steps ({error})"
            ) from error
    if start == "random":
        with seeded(cpu, seed, Stream.INITIALISATION, 2):
            _draw_block_layers(conditioned)
    conditioned.to(next(denoiser.parameters())).train(denoiser.training)
    result = conditioned.load_state_dict(denoiser.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("map_step" in key or "affine_step" in key for key in result.missing_keys)
    return conditioned.execute(denoiser.execution)


def _draw_block_layers(denoiser: NetworkDenoiser) -> None:
    for block in denoiser.modules():
        if isinstance(block, UNetBlock) and block.affine_step is not None:
            block.affine_step.reset_parameters()
