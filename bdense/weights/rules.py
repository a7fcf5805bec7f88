"""The rules that branch weights are learned by; does not import torch."""

from typing import Literal, get_args

from bdense.knobs import KnobError

Rule = Literal["uncertainty", "gradient-norm"]
RULES: tuple[Rule, ...] = get_args(Rule)
MAX_STRENGTH = 10.0


def require_strength(strength: float) -> None:
    """Raise a ``KnobError`` for an exponent beyond ``MAX_STRENGTH``, or NaN."""
    if not abs(strength) <= MAX_STRENGTH:
        raise KnobError(
            "strength", f"must lie in -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}, got {strength}"
        )
