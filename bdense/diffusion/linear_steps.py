"""The steps of a sampler as numbers, where they are sums of the state and of predicted noises.

With e_j = (x_j - D(x_j; t_j)) / t_j, the noise that call j of the network predicts, the state of
the next call is x_{i+1} = k_i x_i + sum_{j <= i} c_ij e_j + g_i z_i, z_i new unit noise. All
solvers here have this form except those that clip or threshold.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bdense.diffusion.guidance import calls
from bdense.diffusion.sampling import Sampler
from bdense.errors import InputError

_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSteps:
    """n calls of the network, and the image behind the last; in coordinates x.

    Attributes:
        levels: [n] sigma that each call is told.
        start: The first call's state is unit noise times this.
        state_factors: [n] k_i.
        noise_factors: [n] rows of i + 1 numbers, c_ij.
        fresh_noise_factors: [n] g_i; 0 where the solver draws nothing.
    """

    levels: list[float]
    start: float
    state_factors: list[float]
    noise_factors: list[list[float]]
    fresh_noise_factors: list[float]


def linear_steps(sampler: Sampler) -> LinearSteps:
    """The sampler's own walk, on vectors whose entries stand for the noises.

    Raises:
        InputError: Its steps are not linear, such as those of a solver that clips.
    """
    levels, states = _walk(sampler, 1.0)
    _, doubled = _walk(sampler, 2.0)
    if not torch.allclose(doubled, 2 * states, rtol=1e-9, atol=1e-9):
        raise _not_linear(sampler)
    n = len(levels)
    states[states.abs() < _ROUNDING * states.abs().max()] = 0
    steps = LinearSteps(
        levels=levels,
        start=float(states[0, 0]),
        state_factors=[],
        noise_factors=[],
        fresh_noise_factors=[],
    )
    for i, (now, after) in enumerate(itertools.pairwise(states)):
        k = after[0] / now[0]
        left = after - k * now
        left[left.abs() < _ROUNDING * states.abs().max()] = 0
        drawn = left[1 + n :].nonzero().flatten().tolist()
        if len(drawn) > 1 or any(now[1 + n + each] != 0 for each in drawn):
            raise _not_linear(sampler)
        steps.state_factors.append(float(k))
        steps.noise_factors.append(left[1 : i + 2].tolist())
        steps.fresh_noise_factors.append(float(left[1 + n :].sum()))
    return steps


def _walk(sampler: Sampler, unit: float) -> tuple[list[float], Tensor]:
    """Levels of the n calls, and [n + 1, 1 + n + N] states: first noise, predicted, drawn ones."""
    n = sampler.nfe // calls(sampler.guidance)
    first = torch.zeros(1, 1, 1, 1 + n + sampler.num_intervals, dtype=torch.float64)
    levels: list[float] = []
    states: list[Tensor] = []

    def basis(index: int) -> Tensor:
        vector = torch.zeros_like(first)
        vector[..., index] = unit
        return vector

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        # Several states at once are as many calls, one after another.
        sigmas = sigma.to(x).expand(len(x))
        found = []
        for state, level in zip(x, sigmas, strict=True):
            found.append(state[None] - level * basis(1 + len(levels)))
            levels.append(float(level))
            states.append(state.flatten())
        return torch.cat(found)

    end = sampler(denoise, basis(0), lambda interval: basis(1 + n + interval))
    return levels, torch.stack([*states, end.flatten()])


def _not_linear(sampler: Sampler) -> InputError:
    return InputError(
        f"the steps of {sampler.solver.name} ({sampler.solver.describe()}) are not sums of states "
        "and predicted noises, such as of a solver that clips or thresholds"
    )
