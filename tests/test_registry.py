"""Members by name, built in or of another package."""

import importlib

import pytest

from bdense.errors import InputError
from bdense.registry import Registry

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
    info = tmp_path / "shapes_of_others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shapes-of-others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[bdense.shapes]\ncircle = shapes_of_others:Circle\nsquare = shapes_of_others:Square\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("added")
def test_another_package_adds_members():
    assert list(SHAPES) == ["fraction", "circle", "square"]
    assert SHAPES["circle"].__name__ == "Circle"
    with pytest.raises(InputError, match="'square' of the package shapes-of-others cannot be lo"):
        SHAPES["square"]
