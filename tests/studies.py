"""Study files as mappings, to be changed key by key, and the resolved specs that they make."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.spec.file import parse
from search.spec.resolve import resolve
from search.spec.study import StudySpec
from tests.goldens import ROOT

# Those that come along.
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))

# A search of SFD's weights.
STUDY: dict[str, Any] = {
    "name": "digits",
    "data": "digits",
    "teacher": {
        "train": {
            "network": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
            "kimg": 10,
        }
    },
    "method": {
        "name": "sfd",
        "nfe": 2,
        "substeps": 4,
        "afs": True,
        "kimg": 2.56,
        "batch": 64,
        "lr": 5e-4,
    },
    "weights": {
        "name": "log-linear",
        "a": {"low": -0.5, "high": 3.0},
        "b": {"low": -6.0, "high": 0.0},
    },
    "plan": {"trials": 4, "replicates": 1},
    "evaluation": {"images": 256, "extractor": "digits-classifier"},
}
NORMALISED = {"name": "normalised", "a": {"low": -0.5, "high": 3.0}}
LEARNED = {"name": "learned"}
# Progressive distillation in two rounds, 8 -> 4 -> 2, under given arms.
PROMOTION: dict[str, Any] = {
    "name": "promote-digits",
    "data": "digits",
    "teacher": {
        "train": {
            "network": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
            "kimg": 10,
            "precond": {"name": "cosine", "prediction_type": "v_prediction"},
        }
    },
    "method": {
        "name": "progressive",
        "steps": 8,
        "until": 2,
        "updates": 10,
        "batch": 64,
        "lr": 3e-4,
    },
    "plan": {"arms": ["plain", "uniform"], "seeds": [0, 1]},
    "evaluation": {"images": 256, "extractor": "digits-classifier"},
}
CONSISTENCY = {"name": "consistency", "steps": 4, "substeps": 2, "kimg": 2.56, "batch": 64}
# Method and plan of a study: each method, searched and with given arms.
METHODS, PLANS = ("sfd", "progressive", "consistency"), ("search", "arms")
KINDS = tuple((method, plan) for method in METHODS for plan in PLANS)
REMOVED = object()


def changed(tree: dict[str, Any] = STUDY, /, **keys: Any) -> dict[str, Any]:
    """``tree`` with dotted keys (two underscores for a dot) set, or ``REMOVED``."""
    tree = copy.deepcopy(tree)
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


def of_kind(method: str, plan: str) -> dict[str, Any]:
    """A study of that method and plan; searches are over a alone."""
    tree = changed(PROMOTION if method == "progressive" else STUDY, name=f"{method}-{plan}")
    tree["weights"] = NORMALISED
    if method == "consistency":
        tree["method"] = CONSISTENCY
    return changed(tree, plan=(STUDY if plan == "search" else PROMOTION)["plan"])


def spec(tree: dict[str, Any] = STUDY, /, **keys: Any) -> StudySpec:
    """The study of that mapping, resolved, as a launch has it."""
    return _resolved(json.dumps(changed(tree, **keys)), Path.cwd())


@functools.cache
def _resolved(tree: str, folder: Path) -> StudySpec:
    """A mapping as JSON; ``folder`` is what relative files in it are relative to."""
    return resolve(parse(json.loads(tree), source="study.yaml"), source="study.yaml")


def promotion(**keys: Any) -> StudySpec:
    """``PROMOTION``, changed and resolved."""
    return spec(PROMOTION, **keys)


def resolve_here(patch: pytest.MonkeyPatch) -> None:
    """Let ``read_spec`` work in this process, which has loaded torch anyway."""
    patch.setattr("search.spec.file.in_child", lambda call: call())


def write(folder: Path, tree: dict[str, Any] = STUDY, /, **keys: Any) -> Path:
    """A study's file."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(changed(tree, **keys)))
    return path
