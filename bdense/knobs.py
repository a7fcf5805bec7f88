"""Knobs: each setting declared once, as a dataclass field with its default, range and help.

The command line, study files, error messages and the reference page are all made from these
declarations::

    @dataclass(frozen=True, slots=True, kw_only=True)
    class SFDConfig(Knobs):
        nfe: int = knob(2, "network evaluations an image", low=1)
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, Union, get_args, get_origin

from bdense.errors import InputError

_KEY = "knob"


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One setting of a ``Knobs`` class.

    Attributes:
        name: The field's name.
        type: Its annotation, ``None`` taken out of a union.
        default: ``dataclasses.MISSING`` where it must be given.
        optional: Whether ``None`` is a value.
        help: What it does, in words that fit behind "--name".
        low, high: Smallest and largest value, both allowed.
        above, below: Bounds that are not allowed themselves.
        choices: All values there are; empty where they are not counted.
        metavar: What stands for the value in help.
    """

    name: str
    type: Any
    default: Any
    optional: bool
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    metavar: str | None = None

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def range(self) -> str:
        """Its range for people; empty where every value of the type will do."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        bounds = {
            "at least": self.low,
            "at most": self.high,
            "above": self.above,
            "below": self.below,
        }
        return " and ".join(
            f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None
        )

    def require(self, value: Any) -> None:  # noqa: ANN401  of whatever type the user gave
        """Refuse a value outside the range.

        Raises:
            InputError: It is; the message names the knob, the value and the range.
        """
        if value is None and self.optional:
            return
        if self.choices:
            if value not in self.choices:
                close = difflib.get_close_matches(str(value), list(map(str, self.choices)), 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise InputError(f"{self.name} must be {self.range}, got {value!r}{hint}")
            return
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                self._require_number(number, value)

    def _require_number(self, number: float, given: object) -> None:
        inside = (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )
        if not inside:
            raise InputError(f"{self.name} must be {self.range or 'finite'}, got {given}")


def knob(
    default: Any = dataclasses.MISSING,  # noqa: ANN401  of the field's type
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] = (),
    metavar: str | None = None,
) -> Any:  # noqa: ANN401  as dataclasses.field does
    """A field of a ``Knobs`` class; arguments as of ``Knob``. A ``Literal`` gives its choices."""
    told = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "choices": choices,
        "metavar": metavar,
    }
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata={_KEY: told})
    return field(default=default, metadata={_KEY: told})


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """A frozen dataclass whose fields are knobs; values outside their ranges are refused."""

    def __post_init__(self) -> None:
        for name, known in knobs_of(type(self)).items():
            known.require(getattr(self, name))

    @classmethod
    def read(cls, tree: Mapping[str, Any], where: str = "") -> Self:
        """From a mapping of plain values, as files hold them.

        Args:
            tree: Names to values; lists stand for tuples.
            where: What the mapping is, in front of each name in errors, such as ``method``.

        Raises:
            InputError: A name is unknown, a value missing, of another type or out of range.
        """
        known = knobs_of(cls)
        prefix = f"{where}." if where else ""
        for name in tree:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                raise InputError(f"{prefix}{name} is unknown; {hint}")
        if missing := [n for n, each in known.items() if each.required and n not in tree]:
            raise InputError(f"{prefix}{missing[0]} is missing: {known[missing[0]].help}")
        values = {n: _typed(known[n], value, prefix) for n, value in tree.items()}
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{prefix}{error}") from error


def knobs_of(cls: type) -> dict[str, Knob]:
    """The knobs of a class by name, in the order of their declaration."""
    hints = typing.get_type_hints(cls)
    found = {}
    for each in dataclasses.fields(cls):
        told = each.metadata.get(_KEY)
        if told is None:
            continue
        kind, optional = _without_none(hints[each.name])
        choices = told["choices"] or (get_args(kind) if get_origin(kind) is Literal else ())
        default = each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        found[each.name] = Knob(
            name=each.name,
            type=kind,
            default=default,
            optional=optional,
            **told | {"choices": choices},
        )
    return found


def _without_none(hint: Any) -> tuple[Any, bool]:  # noqa: ANN401  an annotation
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    others = tuple(each for each in get_args(hint) if each is not type(None))
    return (others[0] if len(others) == 1 else Union[others]), len(others) < len(get_args(hint))  # noqa: UP007


def _typed(known: Knob, value: Any, prefix: str) -> Any:  # noqa: ANN401  as a file has it
    """The value as the knob's type, where a file can only write a relative of it."""
    if value is None and known.optional:
        return None
    kind, origin = known.type, get_origin(known.type)
    wrong = InputError(f"{prefix}{known.name} must be {_called(kind)}, got {value!r}")
    if isinstance(kind, type) and issubclass(kind, Knobs):
        if isinstance(value, Mapping):
            return kind.read(value, prefix + known.name)
        if not isinstance(value, kind):
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        return tuple(value)
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong
        return float(value)
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise wrong
    if kind in (bool, str, dict) and not isinstance(value, kind):
        raise wrong
    return value


def _called(kind: Any) -> str:  # noqa: ANN401  an annotation
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if get_origin(kind) is tuple:
        return "a list"
    if isinstance(kind, type) and issubclass(kind, Knobs):
        return f"a mapping of {', '.join(knobs_of(kind))}"
    return names.get(kind, "a mapping" if get_origin(kind) is dict or kind is dict else str(kind))
