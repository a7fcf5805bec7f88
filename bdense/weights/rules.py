"""The rules that branch weights are learned by; does not import torch."""

from typing import Literal, get_args

from bdense.knobs import KnobError

ScaleRule = Literal["uncertainty", "gradient-norm"]
Rule = Literal[ScaleRule, "alignment", "anneal"]
SCALE_RULES: tuple[Rule, ...] = get_args(ScaleRule)
RULES: tuple[Rule, ...] = get_args(Rule)
GRADIENT_RULES: tuple[Rule, ...] = ("gradient-norm", "alignment")
MAX_STRENGTH = 10.0


def require_strength(strength: float, rule: str | None = None) -> None:
    """Raise a ``KnobError`` for an exponent beyond ``MAX_STRENGTH`` or that the rule lacks."""
    if not abs(strength) <= MAX_STRENGTH:
        raise KnobError(
            "strength", f"must lie in -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}, got {strength}"
        )
    if strength < 0 and rule not in (None, *SCALE_RULES):
        raise KnobError(
            "strength",
            f"{strength:g} would reverse the rule {rule}, which has no reverse; let it be 0 or "
            "more",
        )
