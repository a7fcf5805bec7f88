"""Every option of every verb: values out of range or of another type are refused by its name."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

import bdense.cli
import search.cli
from bdense.knobs import Knob, knobs_of
from bdense.methods import METHODS
from tests import commands, measured

COMMANDS = {"bdense": bdense.cli.VERBS, "bdense-search": search.cli.VERBS}
# What must be given besides the positional arguments.
REQUIRED = {"progressive": ("--steps", "8", "--until", "4"), "transfer": ("--to", "none.yaml")}
POSITIONAL = {"action": "init", "trial": None}


def walked() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Each verb with what it must be given; ``distill`` once for each method."""
    for command, verbs in COMMANDS.items():
        for verb in verbs:
            for method in METHODS if verb == "distill" else ("",):
                chosen = ("--method", method) if method else ()
                yield command, verb, (*chosen, *REQUIRED.get(method or verb, ()))


def kinds(hint: Any) -> set[Any]:
    """A type, and those inside it."""
    return {hint}.union(*map(kinds, get_args(hint)))


def wrong_values(known: Knob) -> list[str]:
    """Texts that the knob refuses; none if it takes any text."""
    if known.choices:
        return ["nonsense"]
    numbers = kinds(known.type) & {int, float}
    if not numbers:
        return []
    whole = numbers == {int}
    wrong = ["many", "nan", "2.5" if whole else "inf"]
    step = 1 if whole else 1e-4
    beyond = {known.low: -step, known.high: step, known.above: 0, known.below: 0}
    return wrong + [str(bound + by) for bound, by in beyond.items() if bound is not None]


def options() -> Iterator[Any]:
    """Each verb with what it must be given, one of its options and a value that it refuses."""
    for command, verb, given in walked():
        known = {}
        for config in COMMANDS[command][verb].configs_for(given):
            known |= knobs_of(config)
        positional = [
            POSITIONAL.get(n, "none.yaml") for n, k in known.items() if k.form == "positional"
        ]
        placed = [*filter(None, positional), *given]
        if "out" in known and known["out"].required:
            placed += ["--out", "none/x.safetensors"]
        for name, each in known.items():
            if each.form == "positional":
                continue
            wrong = wrong_values(each)
            for value in dict.fromkeys((*wrong[:1], *wrong[-1:])):
                label = f"{verb} {' '.join(given[:2])} {name} {value}"
                yield pytest.param(command, verb, placed, name, value, id=label)


OPTIONS = list(options())


@pytest.mark.parametrize(("command", "verb", "given", "name", "value"), OPTIONS)
def test_other_values_are_refused(command, verb, given, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = "--" + name.rstrip("_").replace("_", "-")
    arguments = (verb, *given, option, value)
    if command == "bdense":
        line = commands.refused(commands.bdense(*arguments))
    else:
        line = measured.refused(measured.command(*arguments))
    assert line.startswith(f"{option} must be "), line
    assert f"got {value}" in line
    assert list(tmp_path.iterdir()) == []


def test_every_verb_is_walked():
    seen = {param.values[1] for param in OPTIONS}
    of_text = {"convert", "stop", "list", "status", "trials", "best", "report", "delete", "doctor"}
    of_text |= {"fetch", "storage"}
    assert seen == {verb for verbs in COMMANDS.values() for verb in verbs} - of_text
    assert len(OPTIONS) > 200
