"""What a launch keeps in the dashboard: notes and pictures; none of it is in the way."""

import dataclasses
import math
import shutil
import threading
from pathlib import Path

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard import get_note
from optuna_dashboard._note import get_note_from_system_attrs

from search.report import live
from search.report.live import NoteWriter, write_note
from search.report.overview import overview_of
from search.storage.ledger import Ledger
from search.study.arms import ROW_SPACE
from search.study.artifacts import artifact_store
from search.study.folders import LOSS_PLOT, pictures
from search.study.markdown import escaped
from search.study.notes import attach_pictures, save_note, trial_note
from search.study.plot import draw_losses
from search.study.results import TrialResult
from search.study.study import Study
from search.study.summary import failures, headline
from search.study.trial_log import TrialLog
from tests.measured import complete, created, open_once, result
from tests.reported import PLOTS, remarks, reported, shown, spec_of, take

TIMINGS = {"student_seconds": 61.0, "evaluation_seconds": 2.25, "service_seconds": 0.04}
POINT = {"a": 0.5, "b": -1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One complete trial (a 1.0, 12.5) of 4; both baselines, with pictures; runs of its own."""
    folder = tmp_path_factory.mktemp("showing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDENSE_RUNS", str(folder / "runs"))
        open_once(patch)
        study = created(f"sqlite:///{folder / 'study.db'}", spec_of("sfd-search"))
        for value in (13.0, 13.28):
            shown(study, study.given, study.given.claim(ROW_SPACE, None), value)
        complete(study, study.search, take(study, {"a": 1.0, "b": -1.0}), 12.5)
    return folder


@pytest.fixture
def study(made, tmp_path, monkeypatch) -> Study:
    """A copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("BDENSE_ARTIFACTS", raising=False)
    open_once(monkeypatch)
    return Study.open(f"sqlite:///{tmp_path / 'study.db'}", "sfd-search")


def end_another(study: Study) -> None:
    complete(study, study.search, take(study, POINT), 11.0)


def note_of(ledger: Ledger, trial_id: int) -> str:
    return get_note(optuna.Trial(ledger.study, trial_id))


def artifacts_of(ledger: Ledger, trial_id: int) -> dict[str, bytes]:
    frozen, store = ledger.storage.get_trial(trial_id), artifact_store()
    return {
        meta.filename: store.open_reader(meta.artifact_id).read()
        for meta in get_all_artifact_meta(frozen, storage=ledger.storage)
    }


# ---- a row's ----


def test_a_trial_has_its_pictures_and_a_note(study):
    ledger, claim = study.search, take(study, POINT)
    shown(study, ledger, claim, 11.0, timings=TIMINGS)
    assert artifacts_of(ledger, claim.trial_id) == {"samples.png": b"grid of 1"}
    (meta,) = get_all_artifact_meta(
        ledger.storage.get_trial(claim.trial_id), storage=ledger.storage
    )
    note = note_of(ledger, claim.trial_id)
    assert note.startswith("## trial 1\n\n**FID 11.0000** of 256 images at NFE 2, features of ")
    assert "| 0.6065 | 1 | 1.649 | 2.718 |" in note
    assert "\n\na 0.500, b -1.000\n\n" in note
    assert "training 1 min 01 s, evaluation 2.2 s, service 0.0 s" in note
    assert "bdense sample /" in note
    assert f"{claim.number:05d}/student.safetensors --out samples.png" in note
    address = f"/artifacts/{ledger.study._study_id}/{claim.trial_id}/{meta.artifact_id}"
    assert f"![]({address})" in note


def test_a_row_of_several_stages_tells_the_fid_of_each(url):
    study = created(url, spec_of("progressive-arms"))
    claim = study.given.claim(ROW_SPACE, None)
    shown(study, study.given, claim, 9.0)
    note = note_of(study.given, claim.trial_id)
    assert note.startswith("## plain PD, seed 0\n\n**FID 9.0000**")
    assert "| NFE | FID |\n| --- | --- |\n| 4 | 8.000 |\n| 2 | 9.000 |" in note


def test_pictures_are_those_of_every_stage_the_last_first_then_the_weights(tmp_path):
    for name in ("00004-samples.png", "00002-samples.png", "other.png", "weights.png"):
        (tmp_path / name).write_bytes(b"")
    stages = ["00002-samples.png", "00004-samples.png"]
    assert [path.name for path in pictures(tmp_path)] == [*stages, "weights.png"]
    (tmp_path / "samples.png").write_bytes(b"")
    assert pictures(tmp_path)[0].name == "samples.png"


@pytest.mark.parametrize("place", ["/dev/null/artifacts", "gs://unknown"])
def test_a_store_that_cannot_be_had_costs_the_pictures_not_the_fid(
    study, monkeypatch, caplog, place
):
    monkeypatch.setenv("BDENSE_ARTIFACTS", place)
    claim = take(study, POINT)
    shown(study, study.search, claim, 11.0)
    assert study.search.counts().complete == 2
    assert study.search.study.best_value == 11.0
    assert "pictures of trial 1 could not be stored" in caplog.text
    assert "**FID 11.0000**" in note_of(study.search, claim.trial_id)


def test_a_pruned_trial_has_a_note_without_a_fid(study):
    claim = take(study, POINT)
    reason = "MedianPruner: FID 30.000 of 64 images <b>"
    found = result(study, study.search, claim, 30.0)
    found = dataclasses.replace(found, value=None, fid=None, reason=reason, pruned_at=0.25)
    attach_pictures(study.search, claim, Path("nowhere"), found)
    note = note_of(study.search, claim.trial_id)
    assert f"**Pruned at 0.25 of its budget**: {escaped(reason)}" in note
    assert "**FID" not in note


def test_the_name_of_a_program_s_parameter_is_escaped_once():
    row = TrialResult.of(1.0, {"parameters": {"lr_x": 0.1}})
    assert "| lr\\_x |" in trial_note("trial 0", row, [])


def test_losses_are_drawn_from_the_log_and_a_diverged_one_left_out(tmp_path):
    draw_losses(tmp_path)
    assert not (tmp_path / LOSS_PLOT).exists()
    log = TrialLog(tmp_path).open()
    for iteration, loss in ((1, 4.0), (2, 2.0), (2, 2.0), (3, math.nan)):
        log("training", iteration=iteration, iterations=3, loss=loss)
    draw_losses(tmp_path)
    assert pictures(tmp_path) == [tmp_path / LOSS_PLOT]


# ---- a study's ----


@pytest.mark.parametrize("kind", PLOTS)
def test_a_study_of_any_kind_has_a_note(url, kind):
    study = reported(url, kind)
    write_note(study)
    note, overview = get_note(study.main.study), overview_of(study)
    assert note.startswith(f"# {kind}\n")
    for line in (headline(study), *failures(study), *remarks(overview)):
        assert escaped(line) in note
    for row in overview.table():
        assert " | ".join(map(escaped, row)) in note


def test_a_search_s_note_has_the_grids_that_there_are(study):
    """The best trial has no grid, the baselines have."""
    write_note(study)
    note = get_note(study.search.study)
    assert "**Lowest of the trials: FID 12.500**, trial 0, a 1.000" in note
    assert note.index("**Recommended: ") < note.index("**Lowest of the trials: ")
    assert note.count("![](/artifacts/") == 2


def test_grids_of_prompted_students_tell_their_prompts(study):
    """On the page of a trial, of its study, and in the report."""
    told = ["a two", "a three"]
    ledger, claim = study.search, take(study, POINT)
    shown(study, ledger, claim, 11.0, prompts=told)
    assert "First row: a two, a three." in note_of(ledger, claim.trial_id)
    write_note(study)
    assert "First row: a two, a three." in get_note(study.search.study)
    shown(study, ledger, take(study, POINT | {"a": 0.7}), 11.0)
    assert "First row" not in note_of(ledger, claim.trial_id + 1)


def test_of_several_stages_the_note_shows_the_last_ones_grid(study, tmp_path):
    ledger, claim = study.search, take(study, POINT)
    for name in ("00032-samples.png", "00004-samples.png"):
        (tmp_path / name).write_bytes(name.encode())
    found = result(study, ledger, claim, 11.0)
    attach_pictures(ledger, claim, tmp_path, found)
    ledger.complete(claim, 11.0, found.attrs())
    write_note(study)
    stored = get_all_artifact_meta(
        ledger.storage.get_trial(claim.trial_id), storage=ledger.storage
    )
    ids, note = {meta.filename: meta.artifact_id for meta in stored}, get_note(ledger.study)
    assert f"/{ids['00004-samples.png']})" in note
    assert ids["00032-samples.png"] not in note


def test_they_are_written_when_rows_have_ended_and_not_too_often(study, monkeypatch):
    written = NoteWriter(study)
    written.refresh()
    first = get_note(study.search.study)
    assert "1 of 4 trials complete" in first
    end_another(study)
    written.refresh()  # at once: not yet
    assert get_note(study.search.study) == first
    written.finish()  # at the end in any case
    assert "2 of 4 trials complete" in get_note(study.search.study)
    monkeypatch.setattr(live, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(live, "_SHARE", 0.0)
    soon = NoteWriter(study)
    soon.refresh()
    versions = study.search.storage.get_study_system_attrs(study.search.study._study_id)
    soon.refresh()  # nothing has ended since
    again = study.search.storage.get_study_system_attrs(study.search.study._study_id)
    assert again == versions


def test_the_end_of_a_confirmation_renews_the_search_s_note_too(confirmed):
    NoteWriter(Study.open(confirmed.url, "digits.confirm")).finish()
    note = get_note(confirmed.search.study)
    assert "confirmed at 2.56 kimg" in note
    assert "Under fresh seeds" in note


def test_what_goes_wrong_ends_no_launch(study, caplog):
    """Such as a row that lacks its FID."""
    lacking = optuna.trial.create_trial(value=1.0, user_attrs={"fingerprint": ""})
    study.search.study.add_trial(lacking)
    NoteWriter(study).refresh()
    NoteWriter(study).finish()
    assert "the study's note could not be stored" in caplog.text


# ---- how they are stored ----


def test_notes_of_trials_and_study_are_apart_and_a_shorter_one_leaves_no_piece(study):
    """Texts are stored in pieces; the dashboard joins all that there are."""
    ledger, study_id = study.search, study.search.study._study_id
    for note in ("x" * 5000, "short"):
        save_note(ledger.storage, study_id, note)
        assert get_note(ledger.study) == note
    notes = {1: "first", 11: "eleventh", None: "study", 111: ""}
    for trial_id, note in notes.items():
        save_note(ledger.storage, study_id, note, trial_id=trial_id)
    stored = ledger.storage.get_study_system_attrs(study_id)
    for trial_id, note in notes.items():
        found = get_note_from_system_attrs(stored, trial_id)
        assert found["body"] == note
        assert found["version"] >= 1


def test_two_launchers_write_the_same_note_at_once(either_url):
    url = either_url
    study_id = Ledger.open(url, "digits", budget=1).study._study_id
    together, failed = threading.Barrier(3), []

    def write(letter: str) -> None:
        storage = Ledger.open(url, "digits", budget=None).storage
        together.wait()
        try:
            for length in (5000, 10, 3000):
                save_note(storage, study_id, letter * length)
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    stored = Ledger.open(url, "digits", budget=None).storage.get_study_system_attrs(study_id)
    note = get_note_from_system_attrs(stored, None)
    assert note["body"] in ("a" * 3000, "b" * 3000, "c" * 3000)
    assert note["version"] == 9
