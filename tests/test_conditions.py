"""What a study's fingerprint is made of: all that changes a number, and nothing else."""

import re
import shutil
from typing import Any

import pytest

from bdense import NUMERICS
from bdense.files import sha256_file
from bdense.knobs import knobs_of
from bdense.methods import METHODS as BUILT_IN
from bdense.methods import YOUNGER
from search.spec.file import parse
from search.spec.resolve import variant
from search.spec.study import StudySpec
from tests.studies import KINDS, LEARNED, METHODS, PLANS, changed, of_kind, spec


def given(**keys: Any) -> StudySpec:
    """As parsed: nothing is looked into that the conditions do not need."""
    return parse(changed(**keys), source="study.yaml")


def differing(one: StudySpec, other: StudySpec) -> set[str]:
    before, after = one.conditions(), other.conditions()
    assert (one.fingerprint() == other.fingerprint()) == (before == after)
    return {key for key in before | after if before.get(key) != after.get(key)}


# Of a study of any method and plan.
LEFT_ALONE = [
    {"name": "another"},
    {"resources": {"cpus": 2, "threads": 2, "lease_seconds": 10, "max_attempts": 5}},
    {"resources": {"gpus": 0.5, "compile": True, "channels_last": True}},
    {"resources": {"gradient_checkpointing": True}},
    {"precision": "float32"},
    {"trajectories": {"mode": "live", "max_gib": 1.0}},
    {"trajectories": {"mode": "live", "dtype": "float16"}},
    {"evaluation__batch": 32},
    {"evaluation__metrics": ["fid", "prc"]},
    {"keep_students": 1},
    {"confirm": {"seeds": 5}},
    {"method__optimizer": "adam"},  # the default, spelt out
    {"teacher__train__flip": False},
]
# Of a search, whose plan may grow, and of given arms, to which more may be added.
OF_A_PLAN = {
    "search": [
        {"plan__trials": 32},
        {"weights__a": {"low": 0.0, "high": 1.0}},
        {"weights__largest": 8.0},
        {"plan__sampler": {"name": "RandomSampler"}},
        {"seeds": {"sampler": 9}},
    ],
    "arms": [
        {"plan__seeds": [7]},
        {"plan__arms": ["plain"]},
        {"weights": "learned"},
        {"seeds": {"training": 9}},
    ],
}


@pytest.mark.parametrize(("method", "plan"), KINDS)
def test_what_leaves_the_numbers_alone_leaves_the_fingerprint_alone(method, plan):
    tree = of_kind(method, plan)
    before = spec(tree)
    for keys in LEFT_ALONE + OF_A_PLAN[plan]:
        after = spec(tree, **keys)
        assert after.conditions() == before.conditions(), keys
        assert after.fingerprint() == before.fingerprint()


@pytest.mark.parametrize(
    ("keys", "differs"),
    [
        ({"data": "digits@8"}, "data"),
        ({"precision": "bfloat16"}, "precision"),
        ({"teacher__train__kimg": 11}, "teacher.train.kimg"),
        ({"teacher__train__network__model_channels": 12}, "teacher.train.network.model_channels"),
        ({"teacher__train__seed": 1}, "teacher.train.seed"),
        (
            {"teacher__train__precond__prediction_type": "sample"},
            "teacher.train.precond.prediction_type",
        ),
        ({"teacher__train__flip": True}, "teacher.train.flip"),
        ({"evaluation__images": 512}, "evaluation.images"),
        ({"evaluation__extractor": "inception"}, "evaluation.extractor"),
        ({"trajectories": {"dtype": "float16"}}, "trajectories.dtype"),
        # Dropout differs with the number of devices that share a batch.
        ({"resources": {"gpus": 2}}, "resources.gpus"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_changes_the_numbers_changes_the_fingerprint(method, keys, differs):
    tree = changed(of_kind(method, "arms"), teacher__train__precond={"name": "cosine"})
    assert differing(spec(tree), spec(tree, **keys)) == {differs}


@pytest.mark.parametrize("method", METHODS)
def test_every_knob_of_the_method_is_a_condition(method):
    """A new one is a condition by itself."""
    study = spec(of_kind(method, "search"))
    conditions = study.conditions()
    # But for what is younger than stored studies and at its default, and a file, whose content is.
    younger = {"tail", "epd_table", *YOUNGER}
    names = {"name", *knobs_of(BUILT_IN[method].Config)} - younger
    assert {key for key in conditions if key.startswith("method.")} == {
        f"method.{name}" for name in names
    }
    assert differing(study, variant(study, {"tail": 0.25})) == {"method.tail"}
    guided = variant(study, {"guidance_teacher": 2.0})
    assert differing(study, guided) == {"method.guidance_teacher"}
    assert differing(study, variant(study, {"accumulate": 2})) == {"method.accumulate"}
    assert differing(study, variant(study, {"lr": 1e-4})) == {"method.lr"}
    assert differing(study, variant(study, {"batch": 32})) == {"method.batch"}


@pytest.mark.parametrize("method", METHODS)
def test_the_seeds_of_a_search_are_conditions_and_of_given_arms_the_latents(method):
    search, arms = (of_kind(method, plan) for plan in PLANS)
    for key in ("training", "evaluation"):
        assert differing(spec(search), spec(search, seeds={key: 1})) == {f"seeds.{key}"}
    assert differing(spec(arms), spec(arms, seeds={"evaluation": 1})) == {"latents"}
    assert differing(spec(arms), spec(arms, plan__latents="fresh")) == {"latents"}


def test_of_learned_weights_memory_and_rules_are_conditions_and_the_bounds_are_not():
    """Trials of other rules would compare, but no Optuna study takes other choices."""
    learned = spec(weights="learned")
    assert differing(spec(), learned) == {"weights.name", "weights.memory", "weights.rules"}
    bounded = spec(weights={**LEARNED, "strength": {"low": 0.0, "high": 1.0}})
    assert bounded.fingerprint() == learned.fingerprint()
    for other in ({"memory": 200}, {"rules": ["uncertainty"]}):
        assert spec(weights={**LEARNED, **other}).fingerprint() != learned.fingerprint()


def test_the_engines_numerics_are_a_condition():
    assert spec().conditions()["numerics"] == NUMERICS
    assert re.fullmatch("[0-9a-f]{16}", spec().fingerprint())


@pytest.mark.parametrize(
    "section",
    [
        lambda path: {"teacher": {"checkpoint": str(path)}},
        lambda path: {"evaluation__extractor": f"torchscript:{path}"},
        lambda path: {"evaluation__reference": str(path)},
        lambda path: {"data": f"zip:{path}@64"},
    ],
    ids=["checkpoint", "extractor", "reference", "archive"],
)
def test_a_files_content_counts_not_where_it_lies(tmp_path, section):
    one, copy, other = (tmp_path / name for name in ("one", "copy", "other"))
    one.write_bytes(b"weights")
    shutil.copy(one, copy)
    other.write_bytes(b"others")
    studies = [given(**section(path)) for path in (one, copy, other)]
    marks = [study.fingerprint() for study in studies]
    assert marks[0] == marks[1] != marks[2]
    for path, study in zip((one, copy, other), studies, strict=True):
        assert sha256_file(path) in str(study.conditions())
        assert str(tmp_path) not in str(study.conditions())


def test_labels_beside_idx_images_are_part_of_them(tmp_path):
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(b"pixels")
    alone = given(data=f"idx:{images}").conditions()["data"]
    assert alone == f"idx:{sha256_file(images)}"
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(b"classes")
    assert given(data=f"idx:{images}").conditions()["data"] == f"{alone}+{sha256_file(labels)}"


def test_a_folder_is_known_by_its_images_names_and_sizes(tmp_path):
    def folder(name: str, **files: bytes) -> str:
        for file, content in files.items():
            path = tmp_path / name / file.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return given(data=f"folder:{tmp_path / name}").fingerprint()

    images = {"cats__a_png": b"12345", "dogs__b_png": b"123"}
    mark = folder("one", **images)
    assert folder("two", **images, notes_txt=b"no image") == mark
    marks = {
        mark,
        folder("longer", **images | {"dogs__b_png": b"1234"}),
        folder("renamed", cats__a_png=b"12345", dogs__c_png=b"123"),
        folder("more", **images, dogs__c_png=b"123"),
        folder("labelled", **images, dataset_json=b"{}"),
        folder("labelled otherwise", **images, dataset_json=b"[]"),
    }
    assert len(marks) == 6
