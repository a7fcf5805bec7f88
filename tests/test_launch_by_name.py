"""``bdense-search launch NAME``: a study that is in the storage goes on without its file."""

import pytest

from search import cli
from search.study.arms import ROW_SPACE
from search.study.study import Study
from tests.measured import search
from tests.reported import reported


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))


def launch(url: str, *options: str) -> int:
    return cli.main(["launch", *options, "--storage", url])


def test_a_complete_study_is_shown(url, capsys):
    study = search(url, [({"a": 1.0}, 12.5)])
    assert launch(url, study.name) == 0
    out, err = capsys.readouterr()
    assert "12.500" in out
    assert f"launch {study.name} --trials 2" in out
    assert "complete" in err


def test_a_name_that_the_storage_lacks_is_refused(url, capsys):
    search(url, [({"a": 1.0}, 12.5)])
    assert launch(url, "digitz") == 2
    assert "digitz" in capsys.readouterr().err


def test_a_row_of_given_arms_that_can_be_mended_is_planned_again_once(url):
    study = reported(url, "sfd-arms")  # one row diverged, which it would again
    study.plan(study.arms[:1], [8])
    claim = study.given.claim(ROW_SPACE, None)
    study.given.fail(claim, "error", "a file was missing", {})
    assert study.left() == 0
    for _ in range(2):
        study.plan_failed_again()
        assert study.left() == 1
    assert study.given.claim(ROW_SPACE, None).params == claim.params


def test_given_arms_have_no_number_of_trials(url, capsys):
    study = reported(url, "sfd-arms")
    assert launch(url, study.name, "--trials", "5") == 2
    assert "--trials 5" in capsys.readouterr().err
    assert Study.open(url, study.name).counts() == study.counts()
