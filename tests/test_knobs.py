"""One declaration of each setting: class, files, options, errors, documentation; registries."""

import argparse
import importlib
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from bdense.errors import InputError
from bdense.knob_options import add_options, from_options, options_of
from bdense.knobs import KnobError, Knobs, KnobsError, knob
from bdense.registry import Registry
from tests.goldens import ROOT
from tests.plugins import install
from tests.study_reference import page

STUDY = ROOT / "docs/study.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels(Knobs):
    heading: ClassVar[str] = "sampling"

    kind: Literal["polynomial", "logsnr"] = knob("polynomial", "spacing")
    rho: float = knob(7.0, "exponent", above=0)
    low: float = knob(0.1, "last level", above=0)
    high: float = knob(80.0, "first level", above=0)

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.low >= self.high:
            raise KnobError("low", f"must be below high {self.high:g}, got {self.low:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(Knobs):
    heading: ClassVar[str] = "training"

    lr: float = knob(1e-2, "step size of any", above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(Training):
    heading: ClassVar[str] = "model"

    steps: int = knob(help="how | many", low=1, high=9, metavar="K")
    lr: float = knob(1e-3, "step size", above=0)
    share: float = knob(0.5, "50% of it", above=0, below=1)
    betas: tuple[float, float] = knob((0.9, 0.999), "Adam's", low=0, below=1)
    sides: tuple[int, ...] = knob((), "sides", low=1)
    metrics: tuple[Literal["fid", "kid"], ...] = knob(("fid",), "what to measure")
    optimizer: Literal["adam", "sgd"] = knob("adam", "optimiser")
    colour: str = knob("red", "colour", choices=("red", "blue"))
    clip: float | None = knob(None, "largest norm", above=0, none="no limit")
    gpus: Literal["auto"] | float = knob("auto", "GPUs", low=0)
    afs: bool = knob(True, "first step for nothing")
    flip: bool = knob(False, "mirror half of the images")
    folder: Path | None = knob(None, "folder")
    prompt: str = knob("", "prompt", metavar="TEXT")
    levels: Levels = knob(Levels(rho=5.0), "noise levels")
    network: dict[str, Any] = knob({}, "a network's own options")


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Config)
    return parser.parse_args([str(each) for each in arguments])


def built(*arguments: object) -> Config:
    return from_options(Config, parsed("--steps", 3, *arguments))


# ---- the class ----


def test_values_are_taken_as_their_types():
    config = Config(steps=2, lr=1, betas=[0, 0.5], sides=[8, 4], folder="here", gpus=2)
    assert (config.lr, config.betas, config.sides) == (1.0, (0.0, 0.5), (8, 4))
    assert [type(each) for each in (config.lr, *config.betas, config.gpus)] == [float] * 4
    assert config.folder == Path("here")


def test_mutable_defaults_are_not_shared():
    one, other = Config(steps=1), Config(steps=1)
    one.network["side"] = 8
    assert other.network == {}


WRONG = [
    ("steps", 0, "must be a whole number from 1 to 9, got 0"),
    ("steps", 10, "got 10"),
    ("steps", 2.0, "got 2.0"),
    ("steps", True, "got True"),
    ("steps", None, "got None"),
    ("lr", 0.0, "must be a number above 0, got 0.0"),
    ("lr", float("nan"), "got nan"),
    ("lr", float("inf"), "got inf"),
    ("lr", False, "got False"),
    ("share", 1.0, "must be a number above 0 and below 1, got 1.0"),
    ("betas", (0.9,), "must be a list of 2 numbers of at least 0 and below 1, got (0.9,)"),
    ("betas", (0.9, 1.0), "got (0.9, 1.0)"),
    ("sides", (8, 0), "must be a list of whole numbers of at least 1, got (8, 0)"),
    ("metrics", ("fid", "kit"), "must be a list of fid, kid, got ('fid', 'kit')"),
    ("optimizer", "adan", "must be one of adam, sgd, got 'adan'; did you mean adam?"),
    ("colour", "green", "must be one of red, blue, got 'green'"),
    ("clip", -1, "must be a number above 0, or none (no limit), got -1"),
    ("gpus", "all", "must be auto or a number of at least 0, got 'all'"),
    ("gpus", -1, "got -1"),
    ("afs", 1, "must be true or false, got 1"),
    ("folder", 1, "must be a path, or none, got 1"),
    ("levels", 7, "must be a mapping, got 7"),
    ("network", [1], "must be a mapping, got [1]"),
]


@pytest.mark.parametrize(("name", "value", "problem"), WRONG)
def test_other_values_are_refused_by_name(name, value, problem):
    with pytest.raises(KnobError) as caught:
        Config(**{"steps": 1, name: value})
    assert caught.value.name == name
    assert problem in str(caught.value)
    with pytest.raises(KnobError) as caught:
        Config.read({"steps": 1, name: value}, "method")
    assert str(caught.value).startswith(f"method.{name} must be ")


def test_all_that_is_wrong_is_told_also_by_another_process():
    with pytest.raises(KnobsError) as caught:
        Config.read_all({"steps": 0, "lr": -1, "stpes": 2, "betas": "x"}, "method")
    told = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert [error.name for error in told.errors] == [
        "method.stpes",
        "method.lr",
        "method.steps",
        "method.betas",
    ]
    assert str(told) == str(caught.value) == "\n".join(map(str, told.errors))


# ---- files ----


def test_a_mapping_is_read():
    config = Config.read({"steps": 4, "lr": "5e-4", "levels": {"high": 9}, "clip": "none"})
    # YAML takes 5e-4 for a text. What a nested mapping leaves out is as the outer default has it.
    assert (config.steps, config.lr, config.clip) == (4, 5e-4, None)
    assert config.levels == Levels(rho=5.0, high=9.0)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "method.steps is missing: how | many"),
        ({"steps": 1, "stpes": 2}, "method.stpes is unknown; did you mean steps?"),
        ({"steps": 1, "q": 2}, "method.q is unknown; known: lr, steps, share"),
        ({"steps": 1, "levels": {"rho": 0}}, "method.levels.rho must be a number above 0, got 0"),
        ({"steps": 1, "levels": {"rhp": 1}}, "method.levels.rhp is unknown; did you mean rho?"),
        ({"steps": 1, "levels": {"low": 99}}, "method.levels.low must be below high 80, got 99"),
        ({"steps": 1, "lr": "5e"}, "method.lr must be a number above 0, got 5e"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(tree, message):
    with pytest.raises(KnobError) as caught:
        Config.read(tree, "method")
    assert str(caught.value).startswith(message)


# ---- options ----


def test_options_give_what_the_class_gives():
    assert built() == Config(steps=3)
    given = built(
        *("--lr", "5e-4", "--betas", 0, 0.5, "--sides", "8,4", "--metrics", "kid,", "fid"),
        *("--optimizer", "sgd", "--clip", 2, "--gpus", 1, "--no-afs", "--flip"),
        *("--folder", "here", "--levels", "logsnr", "--rho", 3),
    )
    assert given == Config(
        steps=3,
        lr=5e-4,
        betas=(0.0, 0.5),
        sides=(8, 4),
        metrics=("kid", "fid"),
        optimizer="sgd",
        clip=2.0,
        gpus=1.0,
        afs=False,
        flip=True,
        folder=Path("here"),
        levels=Levels(kind="logsnr", rho=3.0),
    )
    assert built("--clip", "none", "--gpus", "auto") == Config(steps=3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--steps", "0"), "--steps must be a whole number from 1 to 9, got 0"),
        (("--steps", "2.5"), "got 2.5"),
        (("--lr", "nan"), "--lr must be a number above 0, got nan"),
        (("--lr", "none"), "--lr must be a number above 0, got none"),
        (("--betas", "0.1", "x"), "got 0.1 x"),
        (
            ("--betas", "0.1"),
            "--betas must be a list of 2 numbers of at least 0 and below 1, got 0.1",
        ),
        (("--sides", "8", "0"), "--sides must be a list of whole numbers of at least 1, got 8 0"),
        (("--metrics", "kit"), "--metrics must be a list of fid, kid, got kit"),
        (("--optimizer", "sgb"), "one of adam, sgd, got sgb; did you mean sgd?"),
        (("--gpus", "-1"), "--gpus must be auto or a number of at least 0, got -1"),
        (("--rho", "0"), "--rho must be a number above 0, got 0"),
        (("--levels", "karras"), "--levels must be one of polynomial, logsnr, got karras"),
        (("--low", "99"), "--low must be below high 80, got 99"),
        (("--folder", ""), "--folder must be a path, or none, got ''"),
    ],
)
def test_options_that_cannot_be_are_refused_by_their_own_name(arguments, line):
    parser = argparse.ArgumentParser()
    add_options(parser, Config)
    with pytest.raises(KnobError) as caught:
        built(*arguments)
    said = str(caught.value.spelt(options_of(parser)))
    assert line in said
    assert said.startswith(arguments[0] + " must be ")


def test_a_home_is_found_behind_an_equals_sign(monkeypatch, tmp_path):
    """Where a shell leaves the ~ as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert built("--folder=~/x").folder == tmp_path / "x"
    assert built("--folder=~nobody-of-that-name/x").folder == Path("~nobody-of-that-name/x")
    assert built("--prompt", "~/ by the sea").prompt == "~/ by the sea"


def test_a_knob_without_an_option_is_given_by_the_caller():
    options, network = parsed("--steps", 4), {"depth": 2}
    assert from_options(Config, options, network=network) == Config(steps=4, network=network)


# ---- documentation ----


# ---- the reference page of the study file ----


def test_the_tables_are_those_of_the_code():
    """To renew the page: BDENSE_WRITE_DOCS=1 pytest tests/test_knobs.py."""
    text, line, tables = STUDY.read_text().partition("\n---\n\n")
    if os.environ.get("BDENSE_WRITE_DOCS"):
        tables = page()
        STUDY.write_text(text + line + tables)
    assert tables == page()


# ---- members by name ----


SHAPES: Registry[type] = Registry("shape", "bdense.shapes", {"fraction": "fractions:Fraction"})


def test_a_member_is_imported_when_asked_for():
    from fractions import Fraction

    assert SHAPES["fraction"] is Fraction
    assert (list(SHAPES), "fraction" in SHAPES, "circle" in SHAPES) == (["fraction"], True, False)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(InputError, match="no shape is called 'fractoin'; there are fraction; did"):
        SHAPES["fractoin"]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A package that brings two shapes, one of which cannot be imported."""
    (tmp_path / "shapes_of_others.py").write_text("class Circle: ...\n")
    members = "circle = shapes_of_others:Circle\nsquare = shapes_of_others:Square\n"
    install(tmp_path, "shapes-of-others", f"[bdense.shapes]\n{members}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("added")
def test_another_package_adds_members():
    assert list(SHAPES) == ["fraction", "circle", "square"]
    assert SHAPES["circle"].__name__ == "Circle"
    with pytest.raises(InputError, match="'square' of the package shapes-of-others cannot be lo"):
        SHAPES["square"]
