"""The parameters of all registered weight spaces as options; does not import torch."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from bdense.errors import InputError
from bdense.knobs import Knobs, knob, knobs_of
from bdense.weights import WEIGHT_SPACES
from bdense.weights.space import Choice, WeightSpace

SET_HELP = "value of a parameter of the weight space, as in --set l_1=0.5; once for each parameter"


def parameter_knobs(
    heading: str,
    *,
    usual: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    taken: Collection[str] = (),
) -> type[Knobs]:
    """A class with an optional knob for each parameter of the registered spaces.

    Parameters that depend on the method have none, nor do those of another package whose name
    cannot be an option's or is ``taken``; --set gives them.

    Args:
        usual: What a parameter is where it is left out, for help.
        names: Of knobs that are not called as their parameter.
        taken: Names of the command's other knobs.
    """
    spaces = [space for each in WEIGHT_SPACES.values() if not (space := each()).by_method]
    fields = {}
    for parameter in dict.fromkeys(name for space in spaces for name in space.distributions()):
        name = (names or {}).get(parameter, parameter)
        if not name.isidentifier() or name in taken:
            continue
        having = [space for space in spaces if parameter in space.distributions()]
        is_word = isinstance(having[0].distributions()[parameter], Choice)
        # Which words a space takes is the space's to say: a study may search fewer.
        kind: Any = str if is_word else float
        declared = knob(
            None,
            f"{_help(having[0], parameter)} ({', '.join(space.name for space in having)})",
            none=f"{usual[parameter]:g}" if usual and parameter in usual else "",
        )
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


def given_parameters(parameters: Knobs, assigned: Iterable[str] = ()) -> dict[str, Any]:
    """The parameters on the command line, by the names of their knobs.

    Args:
        assigned: Each NAME=VALUE of --set; a value that is a number becomes one.

    Raises:
        InputError: One is given twice, or is not NAME=VALUE.
    """
    named = {name: getattr(parameters, name) for name in knobs_of(type(parameters))}
    given = {name: value for name, value in named.items() if value is not None}
    for text in assigned:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"--set must be NAME=VALUE, got {text}")
        if name in given:
            raise InputError(f"parameter {name} is given twice; give it once")
        given[name] = _number(value)
    return given


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _help(space: WeightSpace, parameter: str) -> str:
    """The help of the space's knob of that name, or of its plural."""
    known = knobs_of(type(space))
    declared = known.get(parameter) or known.get(f"{parameter}s")
    return declared.help if declared is not None else f"{parameter} of the weights"
