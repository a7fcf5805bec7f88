"""Knobs: each setting declared once, as a dataclass field with its default, range and help.

Command-line options, the keys of study files, error messages and the reference pages are all made
from these declarations::

    @dataclass(frozen=True, slots=True, kw_only=True)
    class SFDConfig(Knobs):
        nfe: int = knob(2, "network evaluations an image", low=1)

A knob holds an int, float, bool, str or Path, a ``Literal``, a tuple of these, a mapping, or
another ``Knobs`` class; or one of several of these, ``None`` among them.
"""

import contextlib
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    TypedDict,
    Union,
    Unpack,
    get_args,
    get_origin,
)

from bdense.errors import InputError, did_you_mean

# What stands for None on the command line and in documentation.
NONE = "none"
_KEY = "knob"

Form: TypeAlias = Literal["positional", "flag", "commas", "repeated"]


class KnobError(InputError):
    """A knob is missing, unknown, of another type or out of range.

    Attributes:
        name: The knob by its dotted name, as in ``lr`` or ``method.lr``.
        problem: What is wrong with it; follows the name in the message. Other knobs in it stand
            between backticks.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"

    def spelt(self, options: Mapping[str, str]) -> "KnobError":
        """The error with knobs spelt as a command's options."""
        problem = re.sub(r"`(\w+)`", lambda found: options.get(found[1], found[0]), self.problem)
        return KnobError(options.get(self.name, self.name), problem)


class KnobsError(InputError):
    """Several knobs are wrong; a line for each."""

    def __init__(self, errors: Sequence[KnobError]) -> None:
        super().__init__(errors)  # what a process pickles
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


class _WrongTypeError(Exception):
    """A value cannot be taken for one of a type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One setting of a ``Knobs`` class.

    Attributes:
        type: Its annotation without ``None``.
        default: ``dataclasses.MISSING`` where it must be given.
        optional: Whether ``None`` is a value.
        low, high: Smallest and largest number, both allowed.
        above, below: Bounds that are not allowed themselves.
        choices: All values there are; empty where they are not listed.
        metavar: What stands for the value in help.
        none: Meaning of ``None``, if not obvious; None: help does not mention it.
        form: How the command line spells it, if not as ``add_options`` says: an argument without
            an option, a bool without --no-NAME, a tuple as words between commas, or as the option
            given several times.
        short: Another spelling of the option.
        heading: What it is listed under in the command's help; empty for none.
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
    none: str | None = ""
    form: Form | None = None
    short: str = ""
    heading: str = ""

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def values(self) -> str:
        """Type and range, for people."""
        if self.choices:
            several = get_origin(self.type) is tuple
            known = f"{'a list' if several else 'one'} of {', '.join(map(str, self.choices))}"
        else:
            known = " ".join(filter(None, (_type_text(self.type), self._range())))
        return f"{known}, or {NONE}" if self.optional and self.form != "positional" else known

    def text(self, value: Any) -> str:  # noqa: ANN401  of the knob's type
        """A value, for people: as the command line has it, but for ``none``'s meaning."""
        return self.none or NONE if value is None else as_text(value)

    def accept(self, value: Any) -> Any:  # noqa: ANN401  whatever was given
        """The value as the knob's type; an int does for a float, and a list for a tuple.

        Raises:
            KnobError: It is of another type or out of range.
        """
        return self._converted(_as_type, value, repr(value))

    def parse(self, text: str | Sequence[str]) -> Any:  # noqa: ANN401  of the knob's type
        """The value that a text stands for, or several texts for a tuple.

        Raises:
            KnobError: It stands for no value of the type, or one out of range.
        """
        written = text if isinstance(text, str) else " ".join(text)
        value = None if written == NONE and self.optional else text
        return self._converted(_from_text, value, written or "''")

    def nests(self, given: object) -> bool:
        """Whether a mapping is given for a class of knobs."""
        return is_knobs(self.type) and isinstance(given, Mapping)

    def merged(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """A mapping with what it leaves out of a default instance."""
        if not isinstance(usual := self.default, Knobs):
            return given
        return {name: getattr(usual, name) for name in knobs_of(type(usual))} | dict(given)

    def _converted(self, convert: Any, given: Any, shown: str) -> Any:  # noqa: ANN401
        if given is None and self.optional:
            return None
        if isinstance(given, Mapping):
            given = self.merged(given)
        try:
            value = convert(self.type, given)
        except _WrongTypeError:
            raise self._refusal(given, shown) from None
        except KnobError as error:  # of a class of knobs
            raise KnobError(f"{self.name}.{error.name}", error.problem) from error
        parts = value if isinstance(value, tuple) else (value,)
        if self.choices and not set(parts) <= set(self.choices):
            raise self._refusal(given, shown)
        if not all(map(self._contains, parts)):
            raise self._refusal(given, shown)
        return value

    def _refusal(self, given: object, shown: str) -> KnobError:
        meaning = f" ({self.none})" if self.optional and self.none else ""
        hint = did_you_mean(given, self.choices)
        return KnobError(self.name, f"must be {self.values}{meaning}, got {shown}{hint}")

    def _contains(self, value: object) -> bool:
        if not is_number(value):
            return True
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _range(self) -> str:
        if self.low is not None and self.high is not None:
            return f"from {_number(self.low)} to {_number(self.high)}"
        words = ("of at least", "of at most", "above", "below")
        bounds = zip(words, (self.low, self.high, self.above, self.below), strict=True)
        return " and ".join(
            f"{word} {_number(bound)}" for word, bound in bounds if bound is not None
        )


class KnobOptions(TypedDict, total=False):
    """What ``knob`` takes beside default and help; see ``Knob``."""

    low: float | None
    high: float | None
    above: float | None
    below: float | None
    choices: tuple[Any, ...]
    metavar: str | None
    none: str | None
    form: Form | None
    short: str


def knob(
    default: Any = dataclasses.MISSING,  # noqa: ANN401  of the field's type
    help: str = "",
    **options: Unpack[KnobOptions],
) -> Any:  # noqa: ANN401  as dataclasses.field does
    """A field of a ``Knobs`` class. A ``Literal`` gives its choices."""
    about = {"help": help, **options}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata={_KEY: about})
    return field(default=default, metadata={_KEY: about})


def knob_of(cls: type["Knobs"], name: str, default: Any, **about: Any) -> Any:  # noqa: ANN401
    """A knob of another class with its own default; None stands for that class's default.

    ``about`` replaces arguments of ``knob``.
    """
    (declared,) = (each for each in dataclasses.fields(cls) if each.name == name)
    none = {"none": as_text(declared.default)} if default is None is not declared.default else {}
    return field(default=default, metadata={_KEY: declared.metadata[_KEY] | none | about})


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """A frozen dataclass whose fields are knobs; values out of their ranges are refused.

    A subclass with a ``__post_init__`` of its own calls ``Knobs.__post_init__(self)`` in it.

    Attributes:
        heading: What the knobs that a class declares first are listed under in help.
    """

    heading: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, known in knobs_of(type(self)).items():
            object.__setattr__(self, name, known.accept(getattr(self, name)))

    @classmethod
    def read(cls, tree: Mapping[str, Any], where: str = "") -> Self:
        """From a mapping of plain values, as files hold them.

        Args:
            tree: Names to values. Lists stand for tuples, and a text for the number that it
                spells: YAML takes 5e-4 for a text.
            where: The mapping's own name, put in front of each knob's in errors: ``method``.

        Raises:
            KnobError: A name is unknown, a value missing, of another type or out of range.
        """
        try:
            return cls.read_all(tree, where)
        except KnobsError as error:
            raise error.errors[0] from error

    @classmethod
    def read_all(cls, tree: Mapping[str, Any], where: str = "") -> Self:
        """As ``read``, but the error names every single knob that is wrong.

        Raises:
            KnobsError: See there.
        """
        known = knobs_of(cls)
        found = list(cls._problems(tree))
        try:
            if not found:
                return cls(
                    **{
                        name: known[name].parse(value) if isinstance(value, str) else value
                        for name, value in tree.items()
                    }
                )
        except KnobError as error:
            found.append(error)
        front = f"{where}." if where else ""
        raise KnobsError([KnobError(front + error.name, error.problem) for error in found])

    @classmethod
    def _problems(cls, tree: Mapping[str, Any]) -> Iterator[KnobError]:
        """An error for each wrong knob, nested ones included."""
        known = knobs_of(cls)
        for name in tree:
            if name not in known:
                hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
                yield KnobError(str(name), f"is unknown{hint}")
        for name, each in known.items():
            if name not in tree:
                if each.required:
                    yield KnobError(name, f"is missing: {each.help}")
                continue
            value = tree[name]
            inner = list(each.type._problems(each.merged(value))) if each.nests(value) else []
            yield from (KnobError(f"{name}.{error.name}", error.problem) for error in inner)
            try:
                if not inner:
                    convert = each.parse if isinstance(value, str) else each.accept
                    convert(value)
            except KnobError as error:
                yield error


def knobs_of(cls: type) -> Mapping[str, Knob]:
    """The knobs of a class by name, in the order of their declaration."""
    return _declared(cls)


@functools.cache
def _declared(cls: Any) -> Mapping[str, Knob]:  # noqa: ANN401  mypy: a type is not hashable
    hints = typing.get_type_hints(cls)
    found = {}
    for each in dataclasses.fields(cls):
        about = each.metadata.get(_KEY)
        if about is None:
            continue
        kind, optional = _without_none(hints[each.name])
        *_, first = (b for b in cls.__mro__ if each.name in vars(b).get("__annotations__", {}))
        default = each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        found[each.name] = Knob(
            name=each.name,
            type=kind,
            default=default,
            optional=optional,
            heading=first.heading,
            **{"choices": _choices(kind)} | about,
        )
    return types.MappingProxyType(found)


def is_number(value: object) -> typing.TypeGuard[float]:
    """Whether it is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


# ---- types ----


def as_text(value: Any) -> str:  # noqa: ANN401
    """A value as the command line and YAML have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(as_text, value)) or NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def _without_none(hint: Any) -> tuple[Any, bool]:  # noqa: ANN401  an annotation
    if not is_union(hint):
        return hint, False
    others = tuple(each for each in get_args(hint) if each is not types.NoneType)
    return Union[others], len(others) < len(get_args(hint))  # noqa: UP007  of a tuple


def is_union(hint: Any) -> bool:  # noqa: ANN401
    """Whether an annotation is of several types."""
    return get_origin(hint) in (Union, types.UnionType)


def is_knobs(kind: Any) -> bool:  # noqa: ANN401
    """Whether a type is a class of knobs."""
    return isinstance(kind, type) and issubclass(kind, Knobs)


def _choices(kind: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """All values of a ``Literal``, or of each part of a tuple of them."""
    if get_origin(kind) is tuple:
        return _choices(get_args(kind)[0])
    if is_union(kind):
        each = list(map(_choices, get_args(kind)))
        return sum(each, ()) if all(each) else ()
    return get_args(kind) if get_origin(kind) is Literal else ()


def _parts(kind: Any, given: Sequence[Any]) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401
    """Each part of what is given for a tuple, with its type."""
    kinds = get_args(kind)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(given)
    if len(kinds) != len(given):
        raise _WrongTypeError
    return zip(kinds, given, strict=True)


def _as_type(kind: Any, value: Any) -> Any:  # noqa: ANN401
    """The value itself, or what it stands for where the type has another form."""
    if is_union(kind):
        return _first_that_takes(_as_type, kind, value)
    if get_origin(kind) is Literal:
        matches = value in get_args(kind)
    elif get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise _WrongTypeError
        return tuple(_as_type(each, part) for each, part in _parts(kind, value))
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # hundreds of digits
            raise _WrongTypeError from None
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif is_knobs(kind) and isinstance(value, Mapping):
        return kind.read(value)
    elif kind in (int, float):
        matches = isinstance(value, kind) and not isinstance(value, bool)
    else:
        matches = isinstance(value, get_origin(kind) or kind)
    if not matches:
        raise _WrongTypeError
    return value


def _from_text(kind: Any, text: str | Sequence[str]) -> Any:  # noqa: ANN401
    if is_union(kind):
        return _first_that_takes(_from_text, kind, text)
    words = [text] if isinstance(text, str) else text
    if get_origin(kind) is tuple:
        return tuple(_from_text(each, word) for each, word in _parts(kind, words))
    if len(words) == 1:
        if get_origin(kind) is Literal:
            named = {str(choice): choice for choice in get_args(kind)}
            if words[0] in named:
                return named[words[0]]
        elif kind in (int, float, str) or (kind is Path and words[0]):
            with contextlib.suppress(ValueError):
                return kind(words[0])
    raise _WrongTypeError


def _first_that_takes(convert: Any, union: Any, given: Any) -> Any:  # noqa: ANN401
    for kind in get_args(union):
        try:
            return convert(kind, given)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


_NAMES: Mapping[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
}


def _type_text(kind: Any, *, several: bool = False) -> str:  # noqa: ANN401
    """A type, for people: of one value or of several."""
    if is_union(kind):
        kinds = [each for each in get_args(kind) if each is not int or float not in get_args(kind)]
        return " or ".join(_type_text(each, several=several) for each in kinds)
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        first, *_, last = get_args(kind)
        count = "" if last is Ellipsis else f"{len(get_args(kind))} "
        return f"a list of {count}{_type_text(first, several=True)}"
    return _NAMES.get(kind, ("a mapping", "mappings"))[several]
