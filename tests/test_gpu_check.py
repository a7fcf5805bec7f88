"""``make gpu-check`` where there is no GPU."""

import math
import sys

import pytest
import torch

from benchmarks import gpu_check

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the GPU")


@NO_GPU
def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "GPU" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["waits", "images", "statistics", "kernel_choice", "recordings", "latents"]
)
def test_its_lines_run_on_the_cpu(monkeypatch, line):
    """Each ends in a table of numbers, but for waits, which a CPU does not have."""
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--cpu"])
    monkeypatch.setattr(gpu_check, "PAIRS", 1)
    found = getattr(gpu_check, line)(gpu_check._options(), torch.device("cpu"))
    rows = [row.strip("| ").split(" | ") for row in found.splitlines() if row.startswith("|")]
    assert len(rows) > 2
    cells = [cell for row in rows[2:] for cell in row[1:] if cell not in ("yes", "no")]
    assert {cell == "-" for cell in cells} <= {line == "waits", False}
    assert all(math.isfinite(float(cell)) for cell in cells if cell != "-")
