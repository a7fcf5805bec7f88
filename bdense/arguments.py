"""Arguments of the public functions and values, checked against their annotations.

A text stands for a path or a device, and numpy's numbers for Python's. Containers are not looked
into.
"""

import functools
import inspect
import numbers
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

from bdense.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
# What a value of a type may be as well.
_ALSO: Mapping[Any, tuple[type, ...]] = {int: (numbers.Integral,), float: (numbers.Real,)}
# Types, by name so that torch is not imported, that are made of a text.
_OF_TEXT = ("Path", "device")
_PLAIN = (str, bytes, numbers.Number, list, tuple, dict, Path, types.NoneType)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with an InputError that names an argument of another type than annotated."""
    # The module of the return annotation may not be imported yet.
    given = {name: each for name, each in function.__annotations__.items() if name != "return"}
    holder = type("", (), {"__annotations__": given})
    hints = typing.get_type_hints(holder, inspect.unwrap(function).__globals__)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # Python's own words, which name the function
            return function(*args, **kwargs)
        for name, given in bound.arguments.items():
            hint = hints.get(name, Any)
            kinds = [each for each in (hint, *get_args(hint)) if isinstance(each, type)]
            of_text = [each for each in kinds if each.__name__ in _OF_TEXT]
            if of_text and str not in kinds and isinstance(given, str):
                bound.arguments[name] = of_text[0](given)
            else:
                _require(function.__name__, name, given, hint)
                # Of numpy, say.
                if isinstance(given, numbers.Integral) and not isinstance(given, int):
                    bound.arguments[name] = int(given)
                elif isinstance(given, numbers.Real) and not isinstance(given, int | float):
                    bound.arguments[name] = float(given)
        return function(*bound.args, **bound.kwargs)

    return call


def require_types(value: Any) -> None:  # noqa: ANN401  a dataclass
    """Raise an InputError that names a field of a dataclass of another type than annotated."""
    cls: type = type(value)
    for name, hint in _hints(cls).items():
        _require(cls.__name__, name, getattr(value, name), hint)


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:  # noqa: ANN401  a class
    fields = inspect.signature(cls).parameters
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if name in fields}


def _require(whose: str, name: str, value: object, hint: Any) -> None:  # noqa: ANN401
    if not _fits(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) else re.sub(r"\b(\w+\.)+", "", str(hint))
        raise InputError(
            f"{whose}: {name} must be {wanted}, got {type(value).__name__} {reprlib.repr(value)}"
        )


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401  an annotation
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if origin is typing.Literal:
        return value in get_args(hint)
    kind = origin or hint
    if kind is Any or not isinstance(kind, type):
        return True
    if getattr(kind, "_is_protocol", False) and not kind.__module__.startswith("collections"):
        return not isinstance(value, _PLAIN)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is Sequence and isinstance(value, str):
        return False
    return isinstance(value, (kind, *_ALSO.get(kind, ())))
