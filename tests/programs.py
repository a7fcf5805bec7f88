"""A program as a user of method ``command`` has one, and studies of it, worked on without Ray."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from search.analysis.plans import plan_given
from search.places import cache_folder, runs_folder
from search.spec.file import parse
from search.spec.study import StudySpec
from search.storage.stop_flags import Launch
from search.study.folders import row_folder
from search.study.study import Study
from search.worker.ray_tasks import WorkerConfig, WorkerError, slot

# Counts to STEPS, keeps its step when asked to end, and writes a bowl of its weights. What else it
# does it is told by words.
PROGRAM = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

given = json.loads(Path(os.environ["BDENSE_TRIAL"]).read_text())
folder, params, told = Path(given["folder"]), given["params"], sys.argv[1:]
kept = folder / "step"
first = int(kept.read_text()) if kept.exists() else 0
asked = []

def is_open():  # to all, or to those with a low y
    gate = Path("gate")
    return gate.exists() and params["y"] <= float(gate.read_text() or "inf")

signal.signal(signal.SIGTERM, lambda *_: None if "deaf" in told else asked.append(1))
with (folder / "starts").open("a") as file:
    file.write(f"{first} {os.getpid()}\\n")
if "forks" in told:
    for own in (False, True):
        sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
        child = subprocess.Popen(sleeper, start_new_session=own, stdout=subprocess.DEVNULL)
        with (folder / "children").open("a") as file:
            file.write(f"{child.pid}\\n")
if "chatty" in told:
    for line in range(20000):
        print(f"line {line} " + "x" * 100, flush=False)
for word, line in {"last-nan": '{"step": 1, "value": NaN}', "last-word": "loss 3"}.items():
    if word in told:
        Path(given["values"]).write_text(line + "\\n")
for step in range(first, 4):
    if "values" in told:
        with Path(given["values"]).open("a") as file:
            value = 10 - step + params["y"]
            file.write(json.dumps({"step": step, "value": value}) + "\\n")
    while "waits" in told and step == 2 and not asked and not is_open():
        time.sleep(0.01)
    scratch = folder / "step.new"
    scratch.write_text(str(step + 1))
    scratch.replace(kept)
    if asked and (step > 1 or "waits" not in told):  # one that waits was asked in its third step
        sys.exit(0)
if "fails" in told:
    sys.stderr.write("first words\\nValueError: the data are bad\\n")
    sys.exit(3)
if "dies" in told:
    os.kill(os.getpid(), signal.SIGSEGV)
loss = (params["x"] - 1) ** 2 + (params["y"] - 0.5) ** 2 + given["seed"] / 64
result = {"loss": -loss if "negative" in told else loss, "steps": 4 - first}
if "folder" in told:
    Path(given["result"]).mkdir()
    sys.exit(0)
if "pipe" in told:
    os.mkfifo(given["result"])
    sys.exit(0)
text = {"nan": '{"loss": NaN}', "list": "[1.0]", "word": '{"loss": "low"}', "half": '{"lo'}
text["huge"] = '{"loss": 1' + "0" * 400 + "}"
for word in told:
    if word in text:
        Path(given["result"]).write_text(text[word])
        sys.exit(0)
if "silent" not in told:
    Path(given["result"]).write_text(json.dumps(result))
"""
WEIGHTS = {
    "x": {"low": 0.1, "high": 10, "log": True, "default": 2},
    "y": {"low": 0, "high": 2, "default": 1},
}


def written(folder: Path, *told: str, **keys: Any) -> Path:
    """A study file of the program beside it, the method's and the file's ``keys`` changed."""
    (folder / "program.py").write_text(PROGRAM)
    method = {
        "name": "command",
        "run": [sys.executable, "program.py", *told],
        "grace_seconds": 20,
        **keys.pop("method", {}),
    }
    tree = {
        "name": "losses",
        "method": method,
        "weights": WEIGHTS,
        "plan": {"trials": 2, "replicates": 1},
        "resources": {"lease_seconds": 10, "gpus": 0},
    }
    path = folder / "losses.yaml"
    path.write_text(yaml.safe_dump(tree | keys))
    return path


def spec_of(path: Path) -> StudySpec:
    """A study file's, resolved as a launch does."""
    return parse(yaml.safe_load(path.read_text()), str(path)).workload.resolve(str(path))


def planned(url: str, path: Path) -> Study:
    """The study of a file, as a launch plans it."""
    spec = spec_of(path)
    return Study.create(url, spec) if spec.is_search else plan_given(url, spec)


def worker_config(study: Study) -> WorkerConfig:
    """A worker's settings with the folders of this process."""
    runs, cache = str(runs_folder().resolve()), str(cache_folder().resolve())
    launch = Launch.begin(study.ledgers)
    return WorkerConfig(study=study.name, storage=study.url, runs=runs, cache=cache, launch=launch)


def end_of_work(study: Study) -> WorkerError | None:
    """What one worker in this process could not go on for."""
    mark = row_folder(study.name, 0).parent.parent / "mark"
    with patch.dict(os.environ):  # which a worker sets for its process
        return slot({"worker": worker_config(study), "mark": str(mark)})["error"]


def work(study: Study) -> Study:
    """Bring a study's rows to their end by one worker in this process."""
    assert end_of_work(study) is None
    return study


def row(study: Study, number: int, *parts: str) -> Path:
    """A file in a row's folder."""
    return row_folder(study.name, number).joinpath(*parts)


def program_file(study: Study, number: int, name: str) -> str:
    """What the program of a row wrote into its own folder."""
    return row(study, number, "work", name).read_text()


def score(x: float, y: float, seed: int = 0) -> float:
    """What the program writes."""
    return (x - 1) ** 2 + (y - 0.5) ** 2 + seed / 64


def given_to(study: Study, number: int) -> dict[str, Any]:
    """What a row's program was given."""
    found: dict[str, Any] = json.loads(row(study, number, "given.json").read_text())
    return found
