"""Knobs as options of the command line, and as tables of the reference pages."""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from bdense.knobs import Knob, KnobError, Knobs, as_text, is_knobs, is_union, knobs_of

# A nested knob of this name is spelt as the class around it: --schedule, not --kind.
_CHOOSING = ("name", "kind")
C = TypeVar("C", bound=Knobs)


def add_options(parser: argparse.ArgumentParser, *configs: type[Knobs]) -> None:
    """An option for each knob of these classes, under their headings.

    ``num_steps`` becomes --num-steps, a bool --name and --no-name, a tuple takes words between
    commas or spaces, and "none" stands for None. A nested class gives an option for each of its
    knobs, and its ``name`` or ``kind`` is spelt as the class. Mappings are for files only. What
    is not given is absent from the namespace, which ``from_options`` reads.
    """
    headings: dict[str, argparse._ActionsContainer] = {"": parser}
    for config in configs:
        for name, known in _single_knobs(config).items():
            if not _has_option(known):
                continue
            if known.heading not in headings:
                headings[known.heading] = parser.add_argument_group(known.heading)
            names, about = _argument(name, known)
            headings[known.heading].add_argument(*names, **about)


def from_options(config: type[C], options: argparse.Namespace, **usual: Any) -> C:  # noqa: ANN401
    """The class with the options that were given.

    Args:
        usual: Knobs that have no option, or another default than the class has.

    Raises:
        KnobError: A value is of another type or out of range.
    """
    tree = dict(usual)
    for name, each in _single_knobs(config).items():
        if name in options and _has_option(each):
            _put(tree, name, each, getattr(options, name))
    return config.read(tree)


def options_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The options that ``add_options`` has added, by the dotted names of their knobs."""
    return {
        each.dest: next((n for n in each.option_strings if n.startswith("--")), str(each.metavar))
        for each in parser._actions
        if each.option_strings or each.metavar
    }


def option_names(config: type[Knobs]) -> frozenset[str]:
    """Every spelling of the options that ``add_options`` makes of a class."""
    knobs = _single_knobs(config)
    negated = (f"--no-{_option(name)[2:]}" for name, each in knobs.items() if each.type is bool)
    return frozenset([*map(_option, knobs), *negated])


def spelt_options(values: Mapping[str, Any]) -> str:
    """Knobs and their values, as the command line has them: ``--rho 7 --no-afs``."""
    return " ".join(
        ("--" if value else "--no-") + _option(name)[2:]
        if isinstance(value, bool)
        else f"{_option(name)} {as_text(value)}"
        for name, value in values.items()
    )


def _put(tree: dict[str, Any], name: str, known: Knob, given: Any) -> None:  # noqa: ANN401
    """Enter what was given for a knob under its dotted name."""
    *outer, last = name.split(".")
    for each in outer:
        tree = tree.setdefault(each, {})
    if isinstance(given, str) and known.metavar != "TEXT":
        given = os.path.expanduser(given)  # a shell leaves the ~ of --out=~/x
    try:
        words = given.split(",") if known.form == "commas" else given
        if isinstance(given, list) and known.form is None:  # 2,3 or 2 3
            words = [part for word in given for part in word.split(",") if part]
        tree[last] = words if isinstance(words, bool) else known.parse(words)
    except KnobError as error:
        raise KnobError(name, error.problem) from error


def _single_knobs(config: type[Knobs], prefix: str = "", usual: object = None) -> dict[str, Knob]:
    """All knobs by dotted name, those of nested classes in place of the class.

    Args:
        prefix: In front of its knobs' names.
        usual: An instance of it whose values are the defaults.
    """
    found = {}
    for name, declared in knobs_of(config).items():
        default = getattr(usual, name) if isinstance(usual, config) else declared.default
        known = dataclasses.replace(declared, default=default)
        if is_knobs(known.type):
            inner = _single_knobs(known.type, f"{prefix}{name}.", known.default)
            for path, each in inner.items():
                found[path] = dataclasses.replace(each, heading=each.heading or known.heading)
        else:
            found[prefix + name] = known
    return found


def _has_option(known: Knob) -> bool:
    return (get_origin(known.type) or known.type) is not dict


def _option(name: str) -> str:
    """``num_steps`` as --num-steps, ``schedule.rho`` as --rho, ``schedule.kind`` as --schedule.

    ``class_``, which Python would not have without the line, is --class.
    """
    *outer, last = name.split(".")
    word = outer[-1] if outer and last in _CHOOSING else last
    return "--" + word.rstrip("_").replace("_", "-")


def _argument(name: str, known: Knob) -> tuple[list[str], dict[str, Any]]:
    """Names and other arguments of ``add_argument`` for a knob."""
    unsaid = known.required or known.default is False
    unsaid = unsaid or (known.default is None and known.none is None)
    default = "" if unsaid else known.text(known.default)
    about: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": (known.help + (f" (default: {default})" if default else "")).replace("%", "%%"),
    }
    listed = "{" + ",".join(map(str, known.choices)) + "}" if known.choices else None
    metavar = {"metavar": known.metavar or listed or _metavar(known.type)}
    if known.form == "positional":
        return [name], about | metavar | ({} if known.required else {"nargs": "?"})
    about |= {"dest": name, "required": known.required}
    names = [*filter(None, [known.short]), _option(name)]
    if known.type is bool:
        flag = known.form == "flag"
        return names, about | {"action": "store_true" if flag else argparse.BooleanOptionalAction}
    kinds = get_args(known.type) if is_union(known.type) else (known.type,)
    if known.form == "repeated":
        about["action"] = "append"
    elif known.form is None and any(get_origin(kind) is tuple for kind in kinds):
        about["nargs"] = "+"  # a wrong number of them is refused as other values are
    return names, about | metavar


def _metavar(kind: Any) -> str:  # noqa: ANN401
    inner = get_args(kind)[0] if get_args(kind) else kind
    return {int: "N", float: "X", Path: "PATH"}.get(inner, "NAME")


def reference(config: type[Knobs]) -> str:
    """A Markdown table of a class's knobs: name, values, default, what it does."""
    rows = [("knob", "values", "default", "what it does"), ("---",) * 4]
    for name, known in _single_knobs(config).items():
        default = "must be given" if known.required else known.text(known.default)
        rows.append((f"`{name}`", known.values, default, known.help))
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
