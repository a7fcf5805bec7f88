"""What a study's fingerprint is made of: all that changes a number, and nothing else."""

import re
import shutil
from pathlib import Path

import pytest
from search.spec.model_spec import flatten
from search.spec.study_file import read_spec

from bdense import NUMERICS
from bdense.files import sha256_file
from tests.studies import LEARNED, NORMALISED, STUDIES, spec


def zipped(path: Path, content: bytes = b"an archive") -> str:
    path.write_bytes(content)
    return f"zip:{path}"


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "another"},
        {"budget__trials": 32},
        {"weights__a": {"low": 0.0, "high": 1.0}},
        {"weights__b": {"low": -1.0, "high": 1.0}},
        {"weights__largest": 8.0},
        {"sampler": {"name": "gp", "startup_trials": 3}},
        {"seeds": {"sampler": 9}},
        {"resources": {"cpus": 2, "threads": 2, "lease_seconds": 10, "max_attempts": 5}},
        {"resources": {"gpus": 1, "compile": True, "channels_last": True}},
        {"resources": {"gpus": 0.5}},
        {"precision": "float32"},
        {"trajectories": {"mode": "live"}},
        {"trajectories": {"mode": "live", "dtype": "float16"}},
        {"trajectories": {"max_gib": 1.0}},
        {"evaluation__batch": 32},
        {"evaluation__metrics": ["fid", "kid", "prc"]},
        {"keep_students": 1},
        {"student__method": "sfd-bdense"},  # the default, spelt out
        {"teacher__train__flip": False},
        {"teacher__train__precond": None, "teacher__train__loss": None},
        {"student__solver": {"name": "dpmpp", "order": 3}},
    ],
)
def test_what_leaves_the_numbers_alone_leaves_the_fingerprint_alone(keys):
    assert spec(**keys).conditions() == spec().conditions()
    assert spec(**keys).fingerprint() == spec().fingerprint()


@pytest.mark.parametrize(
    ("keys", "differs"),
    [
        ({"data": "cifar10"}, {"data"}),
        ({"precision": "bfloat16"}, {"precision"}),
        ({"teacher__train__kimg": 11}, {"teacher.train.kimg"}),
        (
            {"teacher__train__network__model_channels": 12},
            {"teacher.train.network.model_channels"},
        ),
        ({"teacher__train__seed": 1}, {"teacher.train.seed"}),
        ({"teacher__train__precond": {"name": "cosine"}}, {"teacher.train.precond.name"}),
        ({"teacher__train__loss": "snr"}, {"teacher.train.loss"}),
        ({"teacher__train__flip": True}, {"teacher.train.flip"}),
        ({"teacher__train__clip": 1}, {"teacher.train.clip"}),
        ({"student__nfe": 3}, {"student.nfe"}),
        ({"student__substeps": 3}, {"student.substeps"}),
        ({"student__afs": False}, {"student.afs"}),
        ({"student__solver": {"order": 2}}, {"student.solver.order"}),
        ({"student__solver": {"name": "heun"}}, {"student.solver.name", "student.solver.order"}),
        ({"student__solver": {"thresholding": True}}, {"student.solver.thresholding"}),
        ({"student__schedule": {"rho": 5}}, {"student.schedule.rho"}),
        ({"weights": NORMALISED}, {"weights.parameterisation"}),
        (
            {"weights": "learned"},
            {"weights.parameterisation", "weights.memory", "weights.rules"},
        ),
        ({"budget__lr": 1e-4}, {"budget.lr"}),
        ({"budget__kimg": 5.12}, {"budget.kimg"}),
        ({"budget__batch": 128}, {"budget.batch"}),
        ({"evaluation__images": 512}, {"evaluation.images"}),
        ({"evaluation__extractor": "inception"}, {"evaluation.extractor"}),
        ({"seeds": {"training": 1}}, {"seeds.training"}),
        ({"seeds": {"evaluation": 1}}, {"seeds.evaluation"}),
        ({"trajectories": {"dtype": "float16"}}, {"trajectories.dtype"}),
        # Dropout differs with the number of devices that share a batch.
        ({"resources": {"gpus": 2}}, {"resources.gpus"}),
    ],
)
def test_what_changes_the_numbers_changes_the_fingerprint(keys, differs):
    before, after = spec().conditions(), spec(**keys).conditions()
    assert {key for key in before | after if before.get(key) != after.get(key)} == differs
    assert spec(**keys).fingerprint() != spec().fingerprint()


def test_of_learned_weights_memory_and_rules_are_conditions_and_the_bounds_are_not():
    """Trials of other rules would compare, but no Optuna study takes other choices."""
    learned = spec(weights="learned")
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
    ],
    ids=["checkpoint", "extractor", "reference"],
)
def test_a_files_content_counts_not_where_it_lies(tmp_path, section):
    one, copy, other = (tmp_path / name for name in ("one", "copy", "other"))
    one.write_bytes(b"weights")
    shutil.copy(one, copy)
    other.write_bytes(b"others")
    studies = [spec(**section(path)) for path in (one, copy, other)]
    marks = [study.fingerprint() for study in studies]
    assert marks[0] == marks[1] != marks[2]
    for path, study in zip((one, copy, other), studies, strict=True):
        assert sha256_file(path) in str(study.conditions())
        assert str(tmp_path) not in str(study.conditions())


def test_the_conditions_of_the_digits_study_have_these_names():
    """A name more or less is another fingerprint: no study stored before would go on."""
    digits = next(path for path in STUDIES if path.stem == "digits-nfe2")
    assert sorted(read_spec(digits).conditions()) == [
        "budget.batch",
        "budget.kimg",
        "budget.lr",
        "data",
        "evaluation.extractor",
        "evaluation.images",
        "numerics",
        "seeds.evaluation",
        "seeds.training",
        "student.afs",
        "student.method",
        "student.nfe",
        "student.schedule.kind",
        "student.schedule.rho",
        "student.schedule.sigma_max",
        "student.schedule.sigma_min",
        "student.solver.name",
        "student.solver.order",
        "student.solver.thresholding",
        "student.substeps",
        "teacher.checkpoint",
        "teacher.train.batch",
        "teacher.train.ema_halflife_kimg",
        "teacher.train.kimg",
        "teacher.train.lr",
        "teacher.train.network.attn_resolutions",
        "teacher.train.network.channel_mult",
        "teacher.train.network.dropout",
        "teacher.train.network.model_channels",
        "teacher.train.network.num_blocks",
        "teacher.train.seed",
        "teacher.train.threads",
        "teacher.train.warmup_kimg",
        "trajectories.dtype",
        "weights.parameterisation",
    ]


def test_an_archives_content_is_the_condition(tmp_path):
    data = zipped(tmp_path / "a.zip")
    digest = sha256_file(tmp_path / "a.zip")
    assert spec(data=data).conditions()["data"] == f"zip:{digest}"
    assert spec(data=f"{data}@64").conditions()["data"] == f"zip:{digest}@64"
    same, other = zipped(tmp_path / "b.zip"), zipped(tmp_path / "c.zip", b"another")
    assert spec(data=same).fingerprint() == spec(data=data).fingerprint()
    assert spec(data=other).fingerprint() != spec(data=data).fingerprint()


def test_labels_beside_idx_images_are_part_of_them(tmp_path):
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(b"pixels")
    alone = spec(data=f"idx:{images}").conditions()["data"]
    assert alone == f"idx:{sha256_file(images)}"
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(b"classes")
    assert spec(data=f"idx:{images}").conditions()["data"] == f"{alone}+{sha256_file(labels)}"


def test_a_folder_is_known_by_its_images_names_and_sizes(tmp_path):
    def folder(name: str, **files: bytes) -> str:
        for file, content in files.items():
            path = tmp_path / name / file.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return spec(data=f"folder:{tmp_path / name}").fingerprint()

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


def test_flattening_by_hand():
    tree = {"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f": None}
    assert flatten(tree) == {"a.b": 1, "a.c.d": [2], "e": {}, "f": None}
