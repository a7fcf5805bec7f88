"""Finds golden files, and what a test needs from them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.models.store import load_denoiser

ROOT = Path(__file__).parents[1]
GOLDENS = Path(os.environ.get("BDENSE_GOLDENS", ROOT / "../shared/goldens"))
SFD = GOLDENS / "sfd"
PD = GOLDENS / "pd"


def discover(
    pattern: str, folder: Path = SFD, *, where: Callable[[Path], bool] = lambda path: True
) -> list[Any]:
    """Test parameters, one for each file that matches; a skip with its reason where none does.

    Args:
        pattern: Of the name.
        folder: Where to look.
        where: What the file must be like besides, such as by its ``settings``.
    """
    found = [path for path in sorted(folder.glob(pattern)) if where(path)]
    if not found:
        reason = f"no golden file {folder.name}/{pattern} under BDENSE_GOLDENS={GOLDENS}"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id=pattern)]
    return [pytest.param(path, id=path.name) for path in found]


def settings(path: Path) -> dict[str, Any]:
    """The JSON beside a golden file."""
    return json.loads(path.with_suffix(".json").read_text())


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a golden file."""
    return load_file(path.with_suffix(".safetensors"))


def golden_network(name: str) -> NetworkDenoiser:
    """The network of that name, such as ``edm-song-tiny``."""
    return load_denoiser(SFD / f"{name}.nosrc.pkl")[0]


def close(actual: torch.Tensor, golden: torch.Tensor, *, rtol_of_max: float = 0, atol: float = 0):
    """Assert |actual - golden| <= atol + rtol_of_max * max |golden|, and say by how much not."""
    assert actual.shape == golden.shape
    error = (actual.double() - golden.double()).abs().max().item()
    bound = atol + rtol_of_max * golden.double().abs().max().item()
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"
