"""A study as a mapping, to be changed key by key."""

import copy
from pathlib import Path
from typing import Any

import yaml

from search.spec import StudySpec
from search.study_file import parse_spec
from tests.goldens import ROOT

STUDIES = sorted((ROOT / "studies").glob("*.yaml"))

STUDY: dict[str, Any] = {
    "name": "digits",
    "data": "digits",
    "teacher": {"train": {"network": {"model_channels": 8, "channel_mult": [1, 2]}, "kimg": 10}},
    "student": {"nfe": 2, "substeps": 4, "afs": True},
    "weights": {
        "parameterisation": "log-linear",
        "a": {"low": -0.5, "high": 3.0},
        "b": {"low": -6.0, "high": 0.0},
    },
    "budget": {"trials": 4, "kimg": 2.56, "batch": 64, "lr": 5e-4},
    "evaluation": {"images": 256, "extractor": "digits-classifier"},
}
NORMALISED = {"parameterisation": "normalised", "a": {"low": -0.5, "high": 3.0}}
LEARNED = {"parameterisation": "learned"}
REMOVED = object()


def changed(**keys: Any) -> dict[str, Any]:
    """``STUDY`` with dotted keys (two underscores for a dot) set, or ``REMOVED``."""
    tree = copy.deepcopy(STUDY)
    for key, value in keys.items():
        *sections, last = key.split("__")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        if value is REMOVED:
            del section[last]
        else:
            section[last] = value
    return tree


def spec(**keys: Any) -> StudySpec:
    return parse_spec(changed(**keys), source="study.yaml")


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(changed(**keys)))
    return path
