"""Options for the branch weights of every registered weight space; does not import torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bdense.errors import InputError
from bdense.knob_options import spelt_options
from bdense.knobs import KnobError, Knobs, knob, knobs_of
from bdense.weights import WEIGHT_SPACES
from bdense.weights.parameters import SET_HELP, given_parameters, parameter_knobs
from bdense.weights.space import BASELINE, PLAIN, Choice, WeightSpace

if TYPE_CHECKING:
    from bdense.weights.weighting import BranchWeighting

_HEADING = "branch weights"
# Parameters whose option has another name, and the defaults of those that may be left out.
_OPTIONS = {"rule": "learn"}
_USUAL: Mapping[str, Any] = {"a": 0.0, "b": 0.0, "strength": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOptions(Knobs):
    """Whether there are branch weights, and of which space."""

    heading: ClassVar[str] = _HEADING

    plain: bool = knob(
        False,
        "one branch, supervised at the end point alone: distil without B-DENSE",
    )
    weights: str | None = knob(
        None,
        f"weight space: {', '.join(WEIGHT_SPACES)}",
        none="the first of them that has the parameters given",
    )
    set: tuple[str, ...] | None = knob(
        None, SET_HELP, metavar="NAME=VALUE", none=None, form="repeated"
    )


def parameter_options() -> type[Knobs]:
    """The parameters as options of ``bdense distill``."""
    return parameter_knobs(_HEADING, usual=_USUAL, names=_OPTIONS)


def chosen_weighting(
    own: WeightOptions, parameters: Knobs, num_branches: int, num_intervals: int
) -> Callable[[], "BranchWeighting"]:
    """A function that makes the branch weights that were asked for, new ones at each call."""
    given = _given(parameters, own.set or ())
    if own.plain:
        asked = given | ({"weights": own.weights} if own.weights else {})
        if asked:
            raise InputError(
                f"--plain leaves one branch, which has no weight, got {_spelt(asked)}; drop one"
            )
        space = _space(None, {}, num_branches, num_intervals)
        params: dict[str, Any] = {BASELINE: PLAIN}
    else:
        space = _space(own.weights, given, num_branches, num_intervals)
        distributions = space.distributions()
        params = {name: given.get(name, _USUAL.get(name)) for name in distributions}
        for name, value in params.items():
            knob = f"--set {name}=" if space.by_method else _OPTIONS.get(name, name)
            if value is None:
                raise KnobError(knob, f"is missing: the weights {space.name} need it")
            if isinstance(value, str) and not isinstance(distributions[name], Choice):
                raise KnobError(knob, f"must be a number, got {value}")
    try:
        space.weighting(params, num_branches)
    except KnobError as error:
        raise KnobError(_OPTIONS.get(error.name, error.name), error.problem) from error
    return lambda: space.weighting(params, num_branches)


def _given(parameters: Knobs, assigned: Iterable[str]) -> dict[str, Any]:
    """The parameters on the command line, by the spaces' names for them."""
    names = {option: parameter for parameter, option in _OPTIONS.items()}
    given = given_parameters(parameters, assigned)
    return {names.get(option, option): value for option, value in given.items()}


def _space(
    name: str | None, given: Mapping[str, Any], num_branches: int, num_intervals: int
) -> WeightSpace:
    """The space that was named, or the first that has these parameters."""
    asked = WEIGHT_SPACES if name is None else [name]
    for space in [WEIGHT_SPACES[each]() for each in asked]:
        if name is not None or not space.by_method:
            fitted: WeightSpace = space.of_method(num_branches, num_intervals)
            if given.keys() <= fitted.distributions().keys():
                return fitted
    if name is not None:
        own = ", ".join(fitted.distributions())
        raise InputError(f"the weights {name} do not have {_spelt(given)}; here they have {own}")
    raise InputError(
        f"no weight space has {_spelt(given)}; there are {', '.join(WEIGHT_SPACES)}, and --help "
        "has the options of each"
    )


def _spelt(given: Mapping[str, Any]) -> str:
    own = {name: _OPTIONS.get(name, name) for name in given}
    options = knobs_of(parameter_options()).keys() | knobs_of(WeightOptions).keys()
    words = [
        spelt_options({own[name]: value}) if own[name] in options else f"--set {name}={value}"
        for name, value in given.items()
    ]
    return " ".join(words)
