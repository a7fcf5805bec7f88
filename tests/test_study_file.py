"""Files of studies and promotions: read whole or refused, their files found from any folder."""

from pathlib import Path

import pytest
from search.spec.study_file import as_yaml, read_any, read_promotion, read_spec

from search.errors import SpecError
from tests.studies import CHAIN, promotion, spec, write


def zipped(path: Path, content: bytes = b"an archive") -> str:
    path.write_bytes(content)
    return f"zip:{path}"


NAMED = {
    "teacher": {"checkpoint": "edm-cifar10-32x32-uncond-vp"},
    "evaluation__reference": "cifar10-32x32",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [unclosed", "is not valid YAML: "),
        ("- a\n- list", "must be a mapping of keys such as name, data"),
        ("", "must be a mapping of keys"),
        ("!!python/object/apply:os.system [true]", "is not valid YAML: could not determine a con"),
    ],
)
def test_a_file_that_is_no_study_is_named(tmp_path, text, expected):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        read_spec(path)
    assert str(error.value).startswith(f"{path} {expected}")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none\.yaml cannot be read: .*No such file"):
        read_spec(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match=r"cannot be read: .*Is a directory"):
        read_spec(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"bytes\.yaml cannot be read: .*codec"):
        read_spec(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"teacher": {"checkpoint": "no.pkl"}}, "teacher.checkpoint: there is no file no.pkl"),
        (
            {"evaluation__extractor": "torchscript:no.pt"},
            "evaluation.extractor: there is no file no.pt",
        ),
        ({"data": "zip:no.zip"}, "data: there is no file no.zip"),
        ({"data": "folder:nowhere@32"}, "data: there is no folder nowhere"),
    ],
)
def test_a_missing_file_of_a_study_is_named(tmp_path, keys, expected):
    path = write(tmp_path, **keys)
    with pytest.raises(SpecError) as error:
        read_spec(path)
    # What may be a name lists the names after it.
    assert str(error.value).split(", nor a public one")[0] == f"{path}: {expected}"


@pytest.mark.parametrize("weights", [{"weights__largest": 8.0}, {"weights": "learned"}])
def test_the_resolved_study_is_the_same_study(tmp_path, weights):
    first = read_spec(write(tmp_path, **weights))
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml(first))
    assert read_spec(again) == first
    assert read_spec(again).fingerprint() == first.fingerprint()


def test_files_are_found_from_any_folder(tmp_path, monkeypatch):
    """Workers start in folders of their own."""
    (tmp_path / "teacher.pkl").write_bytes(b"a teacher")
    (tmp_path / "features.pt").write_bytes(b"features")
    (tmp_path / "refs.npz").write_bytes(b"statistics")
    path = write(
        tmp_path,
        teacher={"checkpoint": "teacher.pkl"},
        evaluation__extractor="torchscript:features.pt",
        evaluation__reference="refs.npz",
    )
    monkeypatch.chdir(tmp_path)
    found = read_spec(path)
    monkeypatch.chdir("/")
    assert found.teacher.checkpoint == str(tmp_path / "teacher.pkl")
    assert found.evaluation.extractor == f"torchscript:{tmp_path / 'features.pt'}"
    assert found.evaluation.reference == str(tmp_path / "refs.npz")
    assert found.fingerprint() == found.fingerprint()


def test_data_files_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    zipped(tmp_path / "set.zip")
    monkeypatch.chdir(tmp_path)
    archive, folder = (
        read_spec(write(tmp_path, data=data)) for data in ("zip:set.zip", "folder:images@32")
    )
    assert archive.data == f"zip:{tmp_path / 'set.zip'}"
    assert folder.data == f"folder:{tmp_path / 'images'}@32"
    assert read_spec(write(tmp_path, data="digits@16")).data == "digits@16"


def test_names_are_no_files_and_stand_for_themselves(tmp_path, monkeypatch):
    """Whether they are downloaded yet or not, and wherever to."""
    monkeypatch.setenv("BDENSE_CHECKPOINTS", str(tmp_path / "public"))
    found = read_spec(write(tmp_path, **NAMED))
    assert found.teacher.checkpoint == "edm-cifar10-32x32-uncond-vp"
    assert found.evaluation.reference == "cifar10-32x32"
    conditions = found.conditions()
    assert conditions["teacher.checkpoint"] == "edm-cifar10-32x32-uncond-vp"
    assert conditions["evaluation.reference"] == "cifar10-32x32"
    assert not (tmp_path / "public").exists()
    other = spec(**NAMED | {"teacher": {"checkpoint": "edm-cifar10-32x32-cond-vp"}})
    assert other.fingerprint() != found.fingerprint()


def test_a_model_on_the_hub_is_a_name_too(tmp_path):
    hub = {"checkpoint": "google/ddpm-cifar10-32"}
    assert read_spec(write(tmp_path, teacher=hub)).teacher.checkpoint == hub["checkpoint"]
    found = read_promotion(write(tmp_path, CHAIN, teacher=hub, data="cifar10"))
    assert found.teacher.checkpoint == hub["checkpoint"]
    other = write(tmp_path, teacher={"checkpoint": "google/ddpm-cat-256"})
    with pytest.raises(SpecError, match=r"no file google/ddpm-cat-256, nor .*/ddpm-cifar10-32\)$"):
        read_spec(other)


def test_a_name_that_is_none_lists_them(tmp_path):
    path = write(tmp_path, teacher={"checkpoint": "edm-cifar"})
    with pytest.raises(SpecError, match=r"there is no file edm-cifar, .*edm-ffhq-64x64-uncond-vp"):
        read_spec(path)


def test_a_folder_is_to_be_converted_first(tmp_path):
    (tmp_path / "ddpm").mkdir()
    path = write(tmp_path, teacher={"checkpoint": str(tmp_path / "ddpm")})
    with pytest.raises(SpecError, match=r"is a folder; .*bdense convert .*ddpm --out"):
        read_spec(path)


# ---- promotions ----


def test_a_chain_tells_a_promotion_from_a_study(tmp_path):
    assert read_any(write(tmp_path)) == spec()
    assert read_any(write(tmp_path, CHAIN)) == promotion()


def test_the_other_kind_of_file_is_told_where_it_goes(tmp_path):
    path = write(tmp_path, CHAIN)
    with pytest.raises(SpecError) as error:
        read_spec(path)
    assert str(error.value) == (
        f"{path} is a promotion, not a study: it has a chain; give it to `bdense-search promote "
        f"STUDY --to {path}`"
    )
    path = write(tmp_path)
    with pytest.raises(SpecError) as error:
        read_promotion(path)
    assert str(error.value) == (
        f"{path} is a study, not a promotion: it has a student and no chain; give it to "
        f"`bdense-search launch {path}`"
    )


def test_a_promotion_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"^the promotion file .*none\.yaml cannot be read: "):
        read_promotion(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(SpecError, match=r"a mapping of keys such as name, data, teacher, chain$"):
        read_promotion(tmp_path / "list.yaml")


def test_a_promotions_files_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "teacher.pkl").write_bytes(b"a teacher")
    zipped(tmp_path / "set.zip")
    path = write(tmp_path, CHAIN, teacher={"checkpoint": "teacher.pkl"}, data="zip:set.zip")
    monkeypatch.chdir(tmp_path)
    found = read_any(path)
    assert found.teacher.checkpoint == str(tmp_path / "teacher.pkl")
    assert found.data == f"zip:{tmp_path / 'set.zip'}"


@pytest.mark.parametrize("schedule", ["native", {"kind": "logsnr"}])
def test_the_resolved_promotion_is_the_same_promotion(tmp_path, schedule):
    first = read_promotion(write(tmp_path, CHAIN, schedule=schedule))
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml(first))
    assert read_any(again) == first
    assert read_any(again).fingerprint() == first.fingerprint()


def test_a_value_of_several_kinds_has_one_line(tmp_path):
    path = write(tmp_path, resources={"gpus": -1})
    with pytest.raises(SpecError) as error:
        read_spec(path)
    assert str(error.value) == (
        f"{path}: resources.gpus: Input should be 'auto' or greater than or equal to 0, got -1"
    )
