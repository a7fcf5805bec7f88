"""Installs a package that adds members to the registries, as pip would."""

import importlib
from pathlib import Path

import pytest

MEMBERS = {
    "bdense.networks": {"PatchNetwork": "example_package:PatchNetwork"},
    "bdense.stochastic_solvers": {"renoise": "example_package:Renoise"},
    "bdense.weights": {"end-point": "example_weights:EndPoint"},
    "bdense.methods": {"long-sfd": "example_package:LongSFD"},
}


def write_metadata(folder: Path, package: str) -> None:
    """What pip leaves of a package beside its code.

    Args:
        folder: On the path of the interpreter that is to find it.
        package: Where the modules of ``MEMBERS`` are.
    """
    info = folder / "bdense_example-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bdense-example\nVersion: 1.0\n")
    lines = []
    for group, named in MEMBERS.items():
        lines += [f"[{group}]", *(f"{name} = {package}.{at}" for name, at in named.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def example_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's members, installed for this process."""
    write_metadata(tmp_path / "site", "tests")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
