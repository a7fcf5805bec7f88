"""Installs a package that adds members to the registries, as pip would."""

import importlib
from pathlib import Path

import pytest

ENTRY_POINTS = """
[bdense.networks]
PatchNetwork = tests.example_package:PatchNetwork
[bdense.stochastic_solvers]
renoise = tests.example_package:Renoise
[bdense.weights]
end-point = tests.example_weights:EndPoint
"""


@pytest.fixture
def example_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's members, installed for this process."""
    install(tmp_path / "site", "bdense-example", ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()


@pytest.fixture
def line_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``lines:FILE`` as a tracker, installed for this process."""
    members = "[bdense.trackers]\nlines = tests.example_tracker:Lines\n"
    install(tmp_path / "trackers", "bdense-lines", members)
    monkeypatch.syspath_prepend(tmp_path / "trackers")
    importlib.invalidate_caches()


def install(folder: Path, package: str, entry_points: str) -> None:
    """Write what pip leaves of a package beside its code, in a folder on the path."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
