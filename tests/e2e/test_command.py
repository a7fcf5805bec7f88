"""The example of docs/any-trainer.md by a real launch, whose worker and program are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from search.study.trial_log import LOG_FILE, read_log
from tests.e2e.study import Workplace, wait_until
from tests.goldens import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.faults]

EXAMPLE = ROOT / "studies/any-trainer"
STEPS = "60"


def example(folder: Path) -> Path:
    """The example's files, with one trial and short trainings."""
    for name in ("losses.yaml", "train.py"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    path = folder / "losses.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["plan"] = {"trials": 1, "replicates": 1}
    tree["method"]["run"] = [sys.executable, *tree["method"]["run"][1:], "--steps", STEPS]
    tree["resources"] |= {"lease_seconds": 10}
    path.write_text(yaml.safe_dump(tree))
    return path


def by_hand(folder: Path, weights: dict[str, float]) -> float:
    """The metric of a training that nothing interrupts."""
    folder.mkdir()
    result = folder / "metric.json"
    known = {"FOLDER": folder, "RESULT": result, "VALUES": folder / "values.jsonl", "SEED": "0"}
    words = [word for name, value in weights.items() for word in (f"--{name}", repr(value))]
    subprocess.run(
        [sys.executable, EXAMPLE / "train.py", *words, "--steps", STEPS],
        env=os.environ | {f"BDENSE_{name}": str(value) for name, value in known.items()},
        check=True,
    )
    return json.loads(result.read_text())["error_rate"]


def test_a_killed_worker_s_training_goes_on_from_its_checkpoint(tmp_path):
    # Ray would put its workers behind all else that this machine does.
    place = Workplace(tmp_path, tmp_path / "cache")
    with place.start("launch", example(tmp_path), "--workers", "1") as launch:
        try:
            worker, number = place.worker_at("step 50", "any-trainer.baselines", "any-trainer")
            os.kill(worker, signal.SIGKILL)
            out, err = launch.communicate(timeout=600)
        finally:
            launch.kill()
    assert launch.returncode == 0, err
    assert "error_rate" in out
    assert "FID" not in out
    baselines, trials = (place.rows(name) for name in ("any-trainer.baselines", "any-trainer"))
    usual = {"pixels": 1.0, "edges": 1.0, "classes": 0.01}
    found = [(usual, baselines[0]), (trials[0].params, trials[0])]
    for index, (weights, row) in enumerate(found):
        assert row.value == by_hand(tmp_path / f"alone-{index}", weights)
    events = read_log(place.runs / "any-trainer.baselines" / f"{number:05d}" / LOG_FILE)[0]
    assert [each["event"] for each in events][:3] == ["claimed", "started", "adopted"]
    # Nothing is left of the killed worker's program.
    wait_until(lambda: not running("train.py", tmp_path), seconds=60)


def running(name: str, folder: Path) -> list[int]:
    """Processes of a program whose working folder that is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            is_ours = (process / "cwd").readlink() == folder
        except OSError:
            continue
        if is_ours and name.encode() in words:
            found.append(int(process.name))
    return found
