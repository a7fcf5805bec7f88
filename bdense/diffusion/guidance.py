"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

F = F(null) + s (F(condition) - F(null)). D is affine in F, so that it holds for D alike. B batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.conditions import Condition, Conditions
from bdense.errors import InputError, ShapeError
from bdense.knobs import KnobError

# D(x; sigma, condition): a denoiser, or all its branches; [B, C, H, W] and [] or [B] to [B, ...].
Conditional = Callable[..., Tensor]


def guided(denoiser: Conditional, scale: float, null: Condition | None) -> Conditional:
    """D at a guidance scale: a denoiser of the same arguments.

    It calls ``denoiser`` once: on a batch of 2 B, without and with the condition, or of B where
    the scale is 1 (the condition alone) or 0 (none).

    Args:
        denoiser: ``NetworkDenoiser.forward`` or ``branches``, with the condition as arguments.
        null: One row or B, that stands for no condition; needed where the scale is not 1.

    Raises:
        InputError: There is no null, or a call has no condition.
        ShapeError: The condition of a call has another shape than the null.
    """
    if scale == 1:
        return denoiser
    if null is None:
        raise no_null(scale)
    without = null.arguments()

    def call(x: Tensor, sigma: Tensor, **given: Any) -> Tensor:  # noqa: ANN401  of the denoiser
        count = len(x)
        nulls = {name: _rows(name, value, count) for name, value in without.items()}
        if scale == 0:
            return denoiser(x, sigma, **given | nulls)
        both = dict(given)
        for name, value in nulls.items():
            if given.get(name) is None:
                raise InputError(
                    f"guidance {scale:g} needs a condition, and {name} is not given; give it, or "
                    "leave guidance at 1"
                )
            rows = _rows(name, given[name], count)
            if rows.shape != value.shape:
                raise ShapeError(
                    f"{name} {list(rows.shape)} and its null {list(value.shape)} must have the "
                    "same shape; embed both alike"
                )
            both[name] = torch.cat([value.to(rows), rows])
        levels = torch.cat([sigma, sigma]) if sigma.dim() and len(sigma) == count else sigma
        unguided, conditional = denoiser(torch.cat([x, x]), levels, **both).chunk(2)
        return unguided + scale * (conditional - unguided)

    return call


def calls(scale: float) -> int:
    """Network evaluations that one evaluation of D costs: 2, or 1 at scales 1 and 0."""
    return 1 if scale in (0, 1) else 2


def null_for(scale: float, conditions: Conditions, like: Tensor | None = None) -> Condition | None:
    """The null that a scale needs; None where it needs none.

    Args:
        like: A tensor, on whose device and in whose type it is wanted.

    Raises:
        InputError: The network has learned none.
    """
    if scale == 1:
        return None
    if (null := conditions.null()) is None:
        raise no_null(scale)
    return null if like is None else null.to(like)


def no_null(scale: float, knob: str = "guidance") -> KnobError:
    """Of a network without a null condition."""
    return KnobError(
        knob,
        f"{scale:g} needs a network that was trained without its condition too (a null class, an "
        "empty prompt), and this one was not; leave it at 1",
    )


def _rows(name: str, value: Tensor, count: int) -> Tensor:
    if len(value) not in (1, count):
        raise ShapeError(f"{name} has {len(value)} rows for {count} images")
    return value.expand(count, *value.shape[1:])
