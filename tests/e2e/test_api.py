"""The search from Python by real launches: a script, interrupted, and the notebook of docs/."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.e2e.study import Workplace, wait_until
from tests.goldens import ROOT
from tests.programs import score, written

pytestmark = pytest.mark.slow

# Without a guarded main module, as scripts and cells are written.
SCRIPT = """
import search

study = search.open_study("losses.yaml")
study.run(workers=1)
print(study.best.value, study.confirm(candidates=1, workers=1).sentence())
"""


def environment() -> dict[str, str]:
    """Of a user; Ray's workers are not put behind what else this machine does."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BDENSE_", "RAY_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean | {"RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT), "PATH": path}


def start(folder: Path) -> subprocess.Popen[str]:
    """A script whose process group is its own, as that of a terminal's command or a kernel."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=environment(),
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_script_is_interrupted_and_goes_on(tmp_path):
    written(tmp_path, "waits", plan={"trials": 1, "replicates": 1})
    place = Workplace(tmp_path, tmp_path / "cache")
    step = place.runs / "losses.baselines" / "00000" / "work" / "step"
    with start(tmp_path) as script:
        try:
            wait_until(
                lambda: script.poll() is not None or (step.exists() and step.read_text() == "2")
            )
            assert script.poll() is None, script.communicate()[1]
            os.killpg(script.pid, signal.SIGINT)  # Ray's processes get it, too
            _, err = script.communicate(timeout=300)
        finally:
            script.kill()
    assert script.returncode != 0
    assert err.splitlines()[-1].startswith("KeyboardInterrupt")
    assert step.read_text() == "3"  # it has saved
    (tmp_path / "gate").touch()
    with start(tmp_path) as again:
        out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    (trial,) = place.rows("losses")
    value, _, sentence = out.partition(" ")
    assert float(value) == trial.value == score(**trial.params)
    assert "over 3 fresh seeds; against defaults" in sentence


def test_the_notebook_runs(tmp_path, monkeypatch):
    for name in ("docs", "studies/any-trainer"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("studies/any-trainer/losses.yaml", "studies/any-trainer/train.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(ROOT / "docs/notebook.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path / "docs")}}
    NotebookClient(book, timeout=600, resources=where).execute()
    outputs = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    assert outputs[-1][0]["data"]["text/plain"] == "True"
    pictures = [each for cell in outputs for each in cell if "image/png" in each.get("data", {})]
    assert len(pictures) == 3
    assert any("text/html" in each.get("data", {}) for each in outputs[2])
    assert any("defaults" in each["data"]["text/markdown"] for each in outputs[5])
