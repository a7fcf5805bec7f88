"""Branch weights w_k: the spaces they are searched in and how they are applied."""

from collections.abc import Mapping
from typing import Any

from bdense.errors import InputError
from bdense.registry import Registry
from bdense.weights.space import WeightSpace

WEIGHT_SPACES: Registry[type[WeightSpace]] = Registry(
    "weight space",
    "bdense.weights",
    {
        "log-linear": "bdense.weights.log_linear:LogLinearSpace",
        "normalised": "bdense.weights.log_linear:NormalisedSpace",
        "free": "bdense.weights.free:FreeSpace",
        "per-interval": "bdense.weights.free:PerIntervalSpace",
        "learned": "bdense.weights.learned:LearnedSpace",
    },
)


def space_of(params: Mapping[str, Any], own: WeightSpace | None = None) -> WeightSpace:
    """The space that parameters belong to, for weights that were found in another study.

    Args:
        params: As in ``WeightSpace``.
        own: Preferred, where it reads them.

    Raises:
        InputError: No registered space reads them.
    """
    if own is not None and own.reads(params):
        return own
    for name in WEIGHT_SPACES:
        space = WEIGHT_SPACES[name]()
        if space.reads(params):
            return space
    raise InputError(
        f"no weight space has the parameters {', '.join(params) or '(none)'}; known spaces are "
        f"{', '.join(WEIGHT_SPACES)}"
    )
