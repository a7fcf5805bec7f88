"""The parameters of all registered weight spaces as knobs; does not import torch."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from bdense.knobs import Knobs, from_options, knob, knobs_of
from bdense.weights import WEIGHT_SPACES
from bdense.weights.spaces import Choice, WeightSpace


def parameter_knobs(
    heading: str, usual: Mapping[str, Any] | None = None, names: Mapping[str, str] | None = None
) -> type[Knobs]:
    """A class with an optional knob for each parameter of the registered spaces.

    Args:
        heading: Of the group in help.
        usual: What a parameter is where it is left out, for help.
        names: Of knobs that are not called as their parameter.
    """
    spaces = [WEIGHT_SPACES[name]() for name in WEIGHT_SPACES]
    fields = {}
    for parameter in dict.fromkeys(name for space in spaces for name in space.distributions()):
        having = [space for space in spaces if parameter in space.distributions()]
        distribution = having[0].distributions()[parameter]
        kind: Any = float
        if isinstance(distribution, Choice):
            kind = Literal[distribution.options]
        declared = knob(
            None,
            f"{_help(having[0], parameter)} ({', '.join(space.name for space in having)})",
            none=f"{usual[parameter]:g}" if usual and parameter in usual else "",
        )
        name = (names or {}).get(parameter, parameter)
        fields[name] = (name, kind | None, declared)
    return dataclasses.make_dataclass(
        "WeightParameters",
        fields.values(),
        bases=(Knobs,),
        namespace={"heading": heading},
        frozen=True,
        slots=True,
        kw_only=True,
    )


def given_parameters(knobs: type[Knobs], options: argparse.Namespace) -> dict[str, Any]:
    """The parameters on the command line, by the names of their knobs."""
    values = from_options(knobs, options)
    named = {name: getattr(values, name) for name in knobs_of(knobs)}
    return {name: value for name, value in named.items() if value is not None}


def _help(space: WeightSpace, parameter: str) -> str:
    """The help of the space's knob of that name, or of its plural."""
    known = knobs_of(type(space))
    declared = known.get(parameter) or known.get(f"{parameter}s")
    return declared.help if declared is not None else f"{parameter} of the weights"
