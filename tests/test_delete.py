"""``bdense-search delete``: rows, folders and pictures of one study, after a question."""

import dataclasses

import optuna
import pytest

from search import cli
from search.analysis.confirmation import CONFIRM_SUFFIX
from search.storage.engine import open_storage
from search.study.artifacts import artifact_store, attach, is_stored
from search.study.folders import row_folder
from search.study.study import Study
from tests.measured import created, search
from tests.reported import reported, take
from tests.studies import spec

POINTS = [({"a": 1.0}, 12.5), ({"a": 0.5}, 11.0)]


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("BDENSE_ARTIFACTS", raising=False)


@pytest.fixture
def study(url) -> Study:
    made = search(url, POINTS)
    folder = row_folder(made.name, 0)
    folder.mkdir(parents=True)
    (folder / "student.safetensors").write_bytes(b"a student")
    return made


def delete(url: str, study: Study, *options: str) -> int:
    return cli.main(["delete", study.name, "--storage", url, *options])


def names(url: str) -> set[str]:
    return {each.study_name for each in optuna.get_all_study_summaries(open_storage(url))}


def test_the_study_goes_with_its_files_and_no_other_does(url, study):
    other = created(url, spec(name="other"))
    confirmation = created(url, dataclasses.replace(spec(), name=study.name + CONFIRM_SUFFIX))
    assert delete(url, study, "--yes") == 0
    left = {ledger.study.study_name for ledger in other.ledgers}
    assert names(url) == left
    assert confirmation.name not in left
    assert not row_folder(study.name, 0).parent.exists()


def test_pictures_go_too(url, study, tmp_path):
    picture = tmp_path / "samples.png"
    picture.write_bytes(b"a picture")
    plan = dataclasses.replace(study.spec.search, trials=len(POINTS) + 1)
    study = Study.create(url, dataclasses.replace(study.spec, plan=plan))
    claim, store = take(study, {"a": 0.1}), artifact_store()
    (identity,) = attach(study.search.storage, claim.trial_id, [picture], store).values()
    study.search.prune(claim, {})
    assert is_stored(store, identity)
    assert delete(url, study, "--yes") == 0
    assert not is_stored(store, identity)


def test_without_a_yes_nothing_goes(url, study, capsys, monkeypatch):
    assert delete(url, study) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer in ("", "n", "no way"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert delete(url, study) == 0
    assert study.name in names(url)
    assert (row_folder(study.name, 0) / "student.safetensors").exists()
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert delete(url, study) == 0
    assert names(url) == set()


def test_a_running_trial_forbids_it(url, capsys):
    study = reported(url, "sfd-search")
    assert delete(url, study, "--yes") == 2
    assert f"stop {study.name}" in capsys.readouterr().err
    assert study.name in names(url)
