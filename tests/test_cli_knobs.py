"""Every option of every verb: values out of range or of another type are refused by its name."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from bdense.cli import VERBS
from bdense.knobs import Knob, knobs_of
from bdense.methods import METHODS
from tests.commands import bdense, refused

# What must be given besides --out.
REQUIRED = {"progressive": ("--steps", "8", "--until", "4")}


def commands() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each verb with what it must be given; ``distill`` once for each method."""
    for verb, each in VERBS.items():
        model = ("none.safetensors",) if each.positional else ()
        for method in METHODS if verb == "distill" else ("",):
            chosen = ("--method", method, *REQUIRED.get(method, ())) if method else ()
            yield verb, (*model, *chosen)


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
    return wrong + [f"{bound + by:g}" for bound, by in beyond.items() if bound is not None]


OPTIONS = [
    pytest.param(verb, given, name, value, id=f"{' '.join((verb, *given[1:3]))} {name} {value}")
    for verb, given in commands()
    for config in VERBS[verb].configs(given)
    for name, known in knobs_of(config).items()
    if name not in VERBS[verb].skip
    for value in wrong_values(known)
]


@pytest.mark.parametrize(("verb", "given", "name", "value"), OPTIONS)
def test_other_values_are_refused(verb, given, name, value, tmp_path):
    option = "--" + name.rstrip("_").replace("_", "-")
    out = () if verb == "fid" else ("--out", tmp_path / "x.safetensors")
    line = refused(bdense(verb, *given, *out, option, value))
    assert line.startswith(f"{option} must be "), line
    assert f"got {value}" in line
    assert list(tmp_path.iterdir()) == []


def test_every_verb_is_walked():
    walked = {param.values[0] for param in OPTIONS}
    assert walked == set(VERBS) - {"convert"}  # whose only option is a path
    assert len(OPTIONS) > 300
