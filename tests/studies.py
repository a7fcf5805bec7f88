"""A study and a promotion as mappings, to be changed key by key."""

import copy
from pathlib import Path
from typing import Any

import yaml
from search.spec.promotion_spec import PromotionSpec
from search.spec.study_file import parse_promotion, parse_spec
from search.spec.study_spec import StudySpec

from tests.goldens import ROOT

# Those that come along.
PROMOTIONS = sorted((ROOT / "studies").glob("promote-*.yaml"))
STUDIES = sorted(set((ROOT / "studies").glob("*.yaml")) - set(PROMOTIONS))

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
# A chain of two rounds, 8 -> 4 -> 2.
CHAIN: dict[str, Any] = {
    "name": "promote-digits",
    "data": "digits",
    "teacher": {
        "train": {
            "network": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
            "kimg": 10,
            "precond": {"name": "cosine", "prediction_type": "v_prediction"},
        }
    },
    "chain": {"first": 8, "last": 2},
    "round": {"updates": 10, "batch": 64, "lr": 3e-4},
    "evaluation": {"images": 256, "extractor": "digits-classifier"},
}
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


def spec(**keys: Any) -> StudySpec:
    return parse_spec(changed(**keys), source="study.yaml")


def promotion(**keys: Any) -> PromotionSpec:
    return parse_promotion(changed(CHAIN, **keys), source="promotion.yaml")


def write(folder: Path, tree: dict[str, Any] = STUDY, /, **keys: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(changed(tree, **keys)))
    return path
