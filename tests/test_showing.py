"""What a launch keeps in the dashboard: notes and pictures; none of it is in the way."""

import shutil
import threading
from pathlib import Path

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard import get_note
from optuna_dashboard._note import get_note_from_system_attrs

from search.report import live as showing
from search.report.dashboard_texts import save_texts
from search.report.live import Showing, attach_pictures, show
from search.report.notes import timings_text
from search.report.overview import importance_in
from search.storage.ledger import Ledger
from search.study.artifacts import artifact_store
from search.study.folders import pictures, row_folder
from search.study.study import Study
from tests.test_report import attributes, baseline_space, finish, take, trial

TIMINGS = {"student_seconds": 61.0, "evaluation_seconds": 2.25, "service_seconds": 0.04}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One complete trial (a 1.0, 12.5) of a budget of 4, both baselines; runs of its own."""
    folder = tmp_path_factory.mktemp("showing")
    with pytest.MonkeyPatch.context() as patch:
        in_folder(patch, folder)
        url = f"sqlite:///{folder / 'study.db'}"
        finish(Ledger.open(url, "digits", budget=4), 1.0, 12.5)
        baselines = Ledger.open(url, "digits.baselines", budget=2)
        for method, value, weights in (("sfd", 13.0, [1.0]), ("uniform", 13.28, [1.0] * 4)):
            claim = take(baselines, baseline_space(), {"method": method})
            complete(baselines, claim, value, attributes(value, weights))
    return folder


@pytest.fixture
def study(made, tmp_path, monkeypatch) -> Study:
    """A copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    in_folder(monkeypatch, tmp_path)
    return Study.open(f"sqlite:///{tmp_path / 'study.db'}", "digits")


def in_folder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("BDENSE_RUNS", str(folder / "runs"))
    patch.delenv("BDENSE_ARTIFACTS", raising=False)


def complete(ledger: Ledger, claim, value: float, attrs: dict) -> None:
    """As a worker does it, with a grid."""
    folder = row_folder(ledger.study.study_name, claim.number)
    folder.mkdir(parents=True)
    (folder / "samples.png").write_bytes(b"grid of %d" % claim.number)
    attach_pictures(ledger, claim, folder, value, attrs)
    ledger.complete(claim, value, attrs)


def note_of(ledger: Ledger, trial_id: int) -> str:
    return get_note(optuna.Trial(ledger.study, trial_id))


def artifacts_of(ledger: Ledger, trial_id: int) -> dict[str, bytes]:
    frozen, store = ledger.storage.get_trial(trial_id), artifact_store()
    return {
        meta.filename: store.open_reader(meta.artifact_id).read()
        for meta in get_all_artifact_meta(frozen, storage=ledger.storage)
    }


def test_a_trial_has_its_pictures_and_a_note(study):
    ledger = study.trials
    claim = trial(ledger, 0.5)
    attrs = attributes(11.0, [1.0, 1.6, 2.7, 4.5]) | {"a": 0.5, "b": -1.0, "timings": TIMINGS}
    complete(ledger, claim, 11.0, attrs)
    assert artifacts_of(ledger, claim.trial_id) == {"samples.png": b"grid of 1"}
    (meta,) = get_all_artifact_meta(
        ledger.storage.get_trial(claim.trial_id), storage=ledger.storage
    )
    study_id = ledger.study._study_id
    note = note_of(ledger, claim.trial_id)
    assert note.startswith("## trial 1\n\n**FID 11.0000** of 4096 images at NFE 2, features of ")
    assert "| 1 | 1.6 | 2.7 | 4.5 |" in note
    assert "with a = 0.50000, b = -1.00000" in note
    assert "training 1 min 01 s, evaluation 2.2 s, service 0.0 s" in note
    assert f"![](/artifacts/{study_id}/{claim.trial_id}/{meta.artifact_id})" in note


def test_a_baseline_has_them_too(study):
    assert study.baselines is not None
    trial_id = study.baselines.storage.get_all_trials(study.baselines.study._study_id)[0]._trial_id
    assert artifacts_of(study.baselines, trial_id) == {"samples.png": b"grid of 0"}
    assert note_of(study.baselines, trial_id).startswith("## plain SFD\n\n**FID 13.0000**")


def test_a_chain_has_those_of_every_round_the_last_first(tmp_path):
    for name in ("00004-samples.png", "00002-samples.png", "other.png"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in pictures(tmp_path)] == ["00002-samples.png", "00004-samples.png"]


def test_learned_weights_have_their_plot_beside_the_grid(tmp_path):
    for name in ("weights.png", "samples.png"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in pictures(tmp_path)] == ["samples.png", "weights.png"]


@pytest.mark.parametrize("place", ["/dev/null/artifacts", "gs://unknown"])
def test_a_store_that_cannot_be_had_costs_the_pictures_not_the_fid(
    study, monkeypatch, caplog, place
):
    monkeypatch.setenv("BDENSE_ARTIFACTS", place)
    ledger = study.trials
    claim = trial(ledger, 0.5)
    complete(ledger, claim, 11.0, attributes(11.0, [1.0] * 4))
    assert ledger.counts().complete == 2
    assert ledger.study.best_value == 11.0
    assert "pictures of trial 1 could not be stored" in caplog.text
    assert note_of(ledger, claim.trial_id).startswith("## trial 1\n\n**FID 11.0000**")


def test_a_pruned_trial_has_a_note_without_a_fid(study):
    ledger = study.trials
    claim = trial(ledger, 0.5)
    folder = Path("nowhere")
    why = {"reason": "median: FID 30.000 of 64 images <b>", "pruned_at": 0.25}
    attach_pictures(
        ledger, claim, folder, None, {"weights": [1.0, 2.0], "timings": TIMINGS, **why}
    )
    ledger.prune(claim, {})
    note = note_of(ledger, claim.trial_id)
    assert note.startswith(
        "## trial 1\n\n**Pruned at 0.25 of its budget**: median: FID 30.000 of 64 images "
        "\\<b\\>\n\n| w\\_1 | w\\_2 |"
    )
    assert "**FID" not in note


def test_the_study_has_a_note(study):
    show(study)
    note = get_note(study.trials.study)
    assert note.startswith(
        "# digits\n\n**Best: FID 12.500**, trial 0, a 1.000; one training seed, not confirmed"
    )
    assert "1 of 4 trials complete, 0 pruned, 0 failed, 0 running" in note
    assert "| plain SFD | 13.000 | - | - | - | end point alone |" in note
    assert "| best of 1 (trial 0) | 12.500 | -3.8 % | 1.000 | -1.000 |" in note
    # The best trial was told without a grid, the baselines were not.
    assert note.count("![](/artifacts/") == 2


def test_before_any_trial_there_is_a_note(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    Ledger.open(url, "digits", budget=4)
    study = Study.open(url, "digits")
    show(study)
    assert "0 of 4 trials complete" in get_note(study.trials.study)


def test_they_are_written_when_trials_have_ended_and_not_too_often(study, monkeypatch):
    written = Showing(study)
    written.refresh()
    first = get_note(study.trials.study)
    assert "1 of 4 trials complete" in first
    finish(study.trials, 0.5, 11.0)
    written.refresh()  # at once: not yet
    assert get_note(study.trials.study) == first
    monkeypatch.setattr(showing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(showing, "_SHARE", 0.0)
    soon = Showing(study)
    soon.refresh()
    assert "2 of 4 trials complete" in get_note(study.trials.study)
    versions = study.trials.storage.get_study_system_attrs(study.trials.study._study_id)
    soon.refresh()  # nothing has ended since
    again = study.trials.storage.get_study_system_attrs(study.trials.study._study_id)
    assert again == versions


def test_at_the_end_they_are_written_whenever_the_last_time_was(study):
    written = Showing(study)
    written.refresh()
    finish(study.trials, 0.5, 11.0)
    written.finish()
    assert "**Best: FID 11.000**" in get_note(study.trials.study)


def test_what_goes_wrong_ends_no_launch(study, caplog):
    """Such as another program's row in the same study."""
    study.trials.study.add_trial(optuna.trial.create_trial(value=1.0))
    Showing(study).refresh()
    Showing(study).finish()
    assert "the study's note could not be stored" in caplog.text


def test_what_is_shorter_leaves_nothing_of_what_was_longer(study):
    """Texts are stored in pieces; the dashboard puts together all that there are."""
    ledger, study_id = study.trials, study.trials.study._study_id
    for note in ("x" * 5000, "short"):
        save_texts(ledger.storage, study_id, note)
        assert get_note(ledger.study) == note


def test_a_note_of_one_trial_is_of_no_other_and_not_the_study_s(study):
    ledger, study_id = study.trials, study.trials.study._study_id
    notes = {1: "first", 11: "eleventh", None: "study", 111: ""}
    for trial_id, note in notes.items():
        save_texts(ledger.storage, study_id, note, trial_id=trial_id)
    stored = ledger.storage.get_study_system_attrs(study_id)
    for trial_id, note in notes.items():
        found = get_note_from_system_attrs(stored, trial_id)
        assert found["body"] == note
        assert found["version"] >= 1


@pytest.mark.parametrize(
    "server", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
)
def test_two_launchers_write_the_same_note_at_once(server, request, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    if server == "postgres":
        url = request.getfixturevalue("postgres").new_database()
    study_id = Ledger.open(url, "digits", budget=1).study._study_id
    together, failed = threading.Barrier(3), []

    def write(letter: str) -> None:
        storage = Ledger.open(url, "digits", budget=None).storage
        together.wait()
        try:
            for length in (5000, 10, 3000):
                save_texts(storage, study_id, letter * length)
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


def test_importance_says_why_there_is_none(study):
    record = study.trials.study
    found, why = importance_in(record)
    assert found == {}
    assert why == (
        "No importance of the parameters yet: 1 complete trials say too little, 20 are needed."
    )
    only = optuna.create_study()
    only.add_trials(
        optuna.trial.create_trial(
            params={"a": i / 30},
            distributions={"a": optuna.distributions.FloatDistribution(0, 1)},
            value=float(i),
        )
        for i in range(30)
    )
    assert importance_in(only) == ({}, "No importance: a is the only parameter that is searched.")


def test_importance_is_of_the_parameter_that_matters():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(
        lambda t: (t.suggest_float("a", -1, 1)) ** 2 + 0 * t.suggest_float("b", -6, 0),
        n_trials=40,
    )
    found, why = importance_in(study)
    assert why == ""
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["a"] > 0.8 > 0.2 > found["b"]


def test_seconds_are_told_as_people_say_them():
    assert timings_text(TIMINGS) == "training 1 min 01 s, evaluation 2.2 s, service 0.0 s"
    assert timings_text({"looks_seconds": 3.0}) == "looks 3.0 s"
    assert timings_text({}) == ""
