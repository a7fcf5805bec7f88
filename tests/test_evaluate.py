"""One row's work, whatever the method: trained, measured, stopped, taken over, pruned."""

import json

import pytest

from bdense.data.datasets import load_dataset
from bdense.diffusion.sampling import draw_images, sampler_from
from bdense.errors import InputError, StoppedError
from bdense.metrics.references import dataset_reference, write_reference
from bdense.models.card import model_card
from bdense.models.store import denoiser_sha256, load_denoiser, load_tensors, save_denoiser
from bdense.weights.log_linear import normalised_weights
from search.study.notes import trial_note
from search.study.progress_text import share_done
from search.study.results import TrialResult
from search.study.retention import CHECKPOINT, RESULT, STUDENT
from search.study.trial_log import LOG_FILE, read_log
from search.study.wording import weights_text
from search.worker.pruning import INTERMEDIATE_FILE
from tests.plugins import line_tracker
from tests.rows import (
    CONSISTENCY,
    PD,
    SFD,
    SLOPE,
    FakeJudge,
    InterruptedRunError,
    comparable,
    interrupted_after,
    loaded,
    run,
    task,
)
from tests.small import small_teacher

__all__ = ["line_tracker"]

EACH_METHOD = pytest.mark.parametrize(
    "tree", [SFD, PD, CONSISTENCY], ids=lambda t: t["method"]["name"]
)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch, shared_cache) -> None:
    """The digits classifier is trained once for all tests."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(shared_cache))


# ---- what a row leaves ----


@EACH_METHOD
def test_the_last_students_file_says_how_it_was_made_and_draws_what_was_measured(tmp_path, tree):
    assets, folder, told = loaded(tree), tmp_path / "study/00000", []
    found = run(assets, folder, task(SLOPE, seed=3, latents=5), report=told.append)
    assert found.value == found.fid.value > 0
    assert found.fid.seeds == {"training": 3, "evaluation": 5}
    student, metadata = load_denoiser(tmp_path / found.student)
    assert metadata["fid"] == found.fid.as_dict()
    assert metadata["seeds"] == {"training": 3, "evaluation": 5}
    assert (metadata["params"], metadata["study"]) == (SLOPE, assets.spec.name)
    assert metadata["method"].endswith("-bdense")
    assert student.num_branches == 1
    sampler = sampler_from(metadata["sampler"])
    assert sampler.nfe == found.fid.nfe == assets.spec.resolved.stages[-1].nfe
    assert draw_images(student, sampler, 2, seed=0).shape == (2, 1, 8, 8)
    count = sum(p.numel() for p in assets.teacher.parameters())
    assert sum(p.numel() for p in student.parameters()) == count
    assert not list(folder.glob("*training*"))
    assert not (folder / CHECKPOINT).exists()
    progress = [share_done(text) for text in told]
    assert progress == sorted(progress)
    assert 0 < progress[0] < 0.3
    assert progress[-1] == 1.0


def test_a_method_of_stages_keeps_each_student_with_its_fid_and_pictures(tmp_path):
    assets, judge = loaded(PD), FakeJudge(prunes=False)
    found = run(assets, tmp_path / "study/00000", judge=judge)
    assert list(found.fids) == ["4", "2"]
    assert found.fids["2"] == found.fid
    assert found.teacher_fid == assets.teacher_fid
    assert (found.teacher_fid.nfe, found.teacher_fid.seeds) == (8, {"evaluation": 0})
    values = [found.teacher_fid.value, *(fid.value for fid in found.fids.values())]
    assert judge.told == list(enumerate(values))
    names = {path.name for path in (tmp_path / "study/00000").iterdir()}
    each = {
        f"0000{n}{end}"
        for n in (2, 4)
        for end in (".safetensors", ".md", ".fid.json", "-samples.png")
    }
    assert names == each | {"log.jsonl", "result.json", "trial.json"}


def test_a_teacher_that_predicts_otherwise_is_converted_in_a_stage_of_its_own(tmp_path):
    assets = loaded(PD, method__prediction_type="epsilon", method__until=4)
    found = run(assets, tmp_path / "study/00000")
    assert list(found.fids) == ["8", "4"]
    assert found.fids["8"].value != found.teacher_fid.value
    student = load_denoiser(tmp_path / found.student)[0]
    assert student.precond.prediction_type == "epsilon"


@EACH_METHOD
@pytest.mark.parametrize("baseline", ["plain", "uniform"])
def test_a_baseline_has_one_branch_or_equal_weights(tmp_path, tree, baseline):
    assets = loaded(tree)
    found = run(assets, tmp_path / "study/00000", task({"baseline": baseline}))
    branches = 1 if baseline == "plain" else assets.spec.resolved.num_branches
    # As the loss uses them: PD divides them by their sum.
    each = 1 / branches if assets.config.rescale_weights else 1.0
    assert found.weights == [each] * branches
    assert found.parameters == {}
    method = load_denoiser(tmp_path / found.student)[1]["method"]
    assert method.endswith("-bdense") == (baseline == "uniform")


def test_a_row_with_a_slope_for_each_interval_tells_each_intervals_weights(tmp_path):
    params = {"a_1": 0.5, "a_2": 0.0}
    assets = loaded(SFD, weights={"name": "per-interval"})
    found = run(assets, tmp_path / "study/00000", task(params))
    branches = assets.spec.resolved.num_branches
    assert found.weights == [normalised_weights(a, branches).values(branches) for a in (0.5, 0.0)]
    assert TrialResult.of(found.value, found.attrs()).weights == found.weights
    assert found.parameters == params
    metadata = load_denoiser(tmp_path / found.student)[1]
    assert metadata["weights"] == found.weights
    first, second = (", ".join(f"{w:.4g}" for w in row) for row in found.weights)
    card = (tmp_path / found.student).with_suffix(".md").read_text()
    assert f"| branch weights | {first}; {second}, by interval |" in card
    note = trial_note("trial 0", found, [])
    for row in (first, second):
        assert f"| {row.replace(', ', ' | ')} |" in note
    assert weights_text(found.weights).endswith(" | " + " ".join(["1"] * branches))


def test_a_row_stores_the_metrics_it_was_asked_for(tmp_path, monkeypatch):
    # A hundred subsets take a quarter of a minute.
    monkeypatch.setattr("bdense.metrics.metrics.KID_SUBSETS", 2)
    asked = {"evaluation__images": 1000, "evaluation__metrics": ["fid", "kid", "prc"]}
    found = run(loaded(SFD, **asked), tmp_path / "s/00000")
    kid, prc = found.kid.as_dict(), found.prc.as_dict()
    assert kid["mean"] > kid["std"] > 0
    assert (kid["subsets"], kid["subset_size"], prc["neighbours"]) == (2, 1000, 5)
    assert 0 <= prc["precision"] <= 1
    # What the study optimises is the same number without them.
    alone = run(loaded(SFD, evaluation__images=1000), tmp_path / "s/00001")
    assert (alone.fid, alone.kid, alone.prc) == (found.fid, None, None)


def test_a_variant_trains_under_other_settings_of_the_method(tmp_path):
    assets = loaded(SFD)
    found = run(assets, tmp_path / "s/00000", task(variant={"nfe": 3, "kimg": 0.064}))
    assert found.fid.nfe == 3
    assert load_denoiser(tmp_path / found.student)[1]["training"]["kimg"] == 0.064
    with pytest.raises(InputError, match=r"kimgs"):
        run(assets, tmp_path / "s/00001", task(variant={"kimgs": 1}))


@pytest.mark.parametrize("rule", ["gradient-norm", "anneal"])
def test_learned_weights_keep_their_history_also_after_an_interruption(tmp_path, rule):
    learned = {"rule": rule, "strength": 1.5}
    weights = {"name": "learned", "rules": [rule], "strength": {"low": 0.0, "high": 1.5}}
    keys = {"weights": weights, "resources__checkpoint_seconds": 1e-9}
    assets, place = loaded(SFD, **keys), tmp_path / "s/00001"
    expected = run(assets, tmp_path / "s/00000", task(learned))
    with pytest.raises(InterruptedRunError):
        run(assets, place, task(learned), check=interrupted_after(2))
    found = run(assets, place, task(learned))
    assert comparable(found) == comparable(expected)
    assert found.parameters == learned | {"memory": 100}
    assert found.weights_over_time.iterations == [0, 1, 2, 3]
    assert found.weights_over_time.weights[-1] == pytest.approx(found.weights, abs=1e-6)
    assert (tmp_path / found.weights_plot).stat().st_size > 1000
    metadata = load_denoiser(place / STUDENT)[1]
    assert metadata["weighting"] == learned | {"memory": 100}
    given = run(loaded(SFD), tmp_path / "s/00002")
    assert (given.weights_over_time, given.weights_plot) == (None, None)


def test_a_student_carries_its_teachers_licence(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_denoiser(path, small_teacher(), {"licence": "CC-BY-NC-SA-4.0", "source": "edm-x"})
    run(loaded(SFD, teacher={"checkpoint": str(path)}), tmp_path / "s/00000")
    student, metadata = load_denoiser(tmp_path / "s/00000" / STUDENT)
    assert (metadata["licence"], metadata["teacher"]) == ("CC-BY-NC-SA-4.0", "edm-x")
    card = (tmp_path / "s/00000" / STUDENT).with_suffix(".md").read_text()
    assert card == model_card(STUDENT, student, metadata)
    assert card.startswith("---\nlicense: cc-by-nc-sa-4.0\n")


def test_a_reference_file_takes_the_data_sets_place(tmp_path, digits_extractor, shared_cache):
    digits = dataset_reference(load_dataset("digits"), digits_extractor, cache=shared_cache)
    path = tmp_path / "digits.npz"
    write_reference(path, digits.statistics, "digits", digits_extractor)
    by_file = run(loaded(SFD, evaluation__reference=str(path)), tmp_path / "s/00000").fid
    by_data = run(loaded(SFD), tmp_path / "s/00001").fid
    assert by_file.value == by_data.value
    assert by_file.reference.startswith("digits.npz:")


# ---- stopped and taken over ----


@pytest.mark.parametrize(
    ("tree", "checks"),
    [*((SFD, n) for n in (0, 2, 4, 6)), *((PD, n) for n in (2, 5, 9)), (CONSISTENCY, 2)],
    ids=lambda value: value["method"]["name"] if isinstance(value, dict) else str(value),
)
def test_a_row_that_is_taken_over_ends_the_same_bit_for_bit(tmp_path, tree, checks):
    """Stopped in training, drawing and judging, of PD in either stage."""
    keys = {"resources__checkpoint_seconds": 1e-9}
    assets, folder = loaded(tree, **keys), tmp_path / "s/00001"
    expected = run(assets, tmp_path / "s/00000")
    texts: list[str] = []
    with pytest.raises(InterruptedRunError):
        run(assets, folder, check=interrupted_after(checks), report=texts.append)
    assert not (folder / RESULT).exists()
    found = run(assets, folder, report=texts.append)
    assert comparable(found) == comparable(expected)
    sha = [denoiser_sha256(load_denoiser(tmp_path / r.student)[0]) for r in (found, expected)]
    assert sha[0] == sha[1]
    # Nothing that was saved is done again: at most the update that was stopped.
    total = sum(stage.num_updates for stage in assets.spec.resolved.stages)
    trained = [text for text in texts if "training" in text]
    assert total <= len(trained) <= total + 1
    again = run(assets, folder, check=interrupted_after(0))
    assert comparable(again) == comparable(expected)


def test_a_stop_saves_just_there_and_the_log_tells_of_every_update(tmp_path):
    assets = loaded(PD, resources__checkpoint_seconds=1e6)
    folder, texts = tmp_path / "s/00000", []

    def check() -> None:
        if any(each.startswith("stage 2/2: training 3/5") for each in texts):
            raise StoppedError("enough")

    with pytest.raises(StoppedError):
        run(assets, folder, check=check, report=texts.append)
    found = run(assets, folder)
    events, _ = read_log(folder / LOG_FILE)
    assert [(e["event"], e["stage"], e.get("iteration")) for e in events] == [
        *(("training", "00004", i) for i in range(1, 6)),
        ("checkpoint", "00004", 5),
        ("evaluating", "00004", None),
        ("stage", "00004", None),
        *(("training", "00002", i) for i in range(1, 4)),
        ("checkpoint", "00002", 3),
        *(("training", "00002", i) for i in (4, 5)),
        ("checkpoint", "00002", 5),
        ("evaluating", "00002", None),
        ("stage", "00002", None),
    ]
    assert len(events[0]["branch_losses"][0]) == 2
    assert events[-1]["fid"] == found.value


def test_a_finished_training_is_only_evaluated_by_its_next_worker(tmp_path):
    """Checks: 4 updates, then a batch of images drawn."""
    assets, place, texts = loaded(SFD), tmp_path / "s/00000", []
    with pytest.raises(InterruptedRunError):
        run(assets, place, check=interrupted_after(5))
    assert load_tensors(place / CHECKPOINT)[1]["iteration"] == 4
    run(assets, place, report=texts.append)
    assert texts == ["evaluating 128/256 images", "evaluating 256/256 images"]


def test_a_folder_of_another_row_is_moved_aside(tmp_path):
    assets, place = loaded(SFD), tmp_path / "s/00000"
    first = run(assets, place)
    other = run(assets, place, task({"a": 0.5}))
    assert other.value != first.value
    (aside,) = place.parent.glob("00000.*")
    assert json.loads((aside / RESULT).read_text())["value"] == first.value


# ---- intermediate evaluations ----

AT = {
    "plan": {
        "trials": 4,
        "replicates": 1,
        "at": [0.25, 0.5],
        "images": 64,
        "pruner": {"name": "MedianPruner"},
    }
}


def test_intermediate_fids_change_nothing_and_are_told_with_their_conditions(tmp_path):
    assets, judge = loaded(SFD, **AT), FakeJudge()
    found = run(assets, tmp_path / "s/00000", judge=judge)
    assert found.value == run(loaded(SFD), tmp_path / "s/00001").value
    each = found.intermediate
    assert [(i.fraction, i.trained_images, i.fid.images) for i in each] == [
        (0.25, 32, 64),
        (0.5, 64, 64),
    ]
    assert judge.told == [(i.trained_images, i.fid.value) for i in each]
    assert found.fid.images == 256
    # A baseline is measured to its end alone.
    quiet = FakeJudge(prunes=False)
    run(assets, tmp_path / "s/00002", task({"baseline": "plain"}), judge=quiet)
    assert quiet.told == []


def test_a_rows_trackers_are_told_all_and_change_nothing(tmp_path, line_tracker):
    """One that cannot start costs the row nothing."""
    log = (f"lines:{tmp_path / 'told'}", "lines:/no/such/folder/told")
    plain, tracked, untracked = (
        run(
            loaded(SFD, **AT, resources__log=places),
            tmp_path / f"s/{number:05d}",
            judge=FakeJudge(),
        )
        for number, places in enumerate([(), log[:1], log[1:]])
    )
    for found in (tracked, untracked):
        assert (found.value, found.intermediate) == (plain.value, plain.intermediate)
    start, *told, end = map(json.loads, (tmp_path / "told").read_text().splitlines())
    assert (start[1], start[2]["params"], end) == ("s/00001", SLOPE, ["end", False])
    measured = [each[2:] for each in told if each[0] == "evaluation"]
    values = [{"intermediate_fid": each.fid.value} for each in plain.intermediate]
    assert measured == [[1, values[0]], [2, values[1]], [4, {"fid": plain.value}]]
    assert [each[2] for each in told if each[0] == "update"] == [1, 2, 3, 4]


def test_a_pruned_row_says_where_and_why_and_keeps_its_picture(tmp_path):
    assets, place = loaded(SFD, **AT), tmp_path / "s/00000"
    found = run(assets, place, judge=FakeJudge(ends_at=(32,)))
    assert (found.value, found.fid, found.student) == (None, None, None)
    assert found.pruned_at == 0.25
    assert "MedianPruner" in found.reason
    assert len(found.intermediate) == 1
    assert (place / "samples.png").exists()
    assert not (place / CHECKPOINT).exists()
    # Not judged again, by when others may have made it look better.
    assert comparable(run(assets, place, judge=FakeJudge())) == comparable(found)


def test_a_stage_that_is_poor_ends_the_stages_after_it(tmp_path):
    plan = {"trials": 2, "pruner": {"name": "MedianPruner"}}
    found = run(loaded(PD, plan=plan), tmp_path / "s/00000", judge=FakeJudge(ends_at=(1,)))
    assert found.value is None
    assert list(found.fids) == ["4"]
    assert not (tmp_path / "s/00000/00002.safetensors").exists()


def test_intermediate_fids_are_kept_for_whoever_takes_over(tmp_path):
    assets, judge, place = loaded(SFD, **AT), FakeJudge(), tmp_path / "s/00001"
    expected = run(assets, tmp_path / "s/00000", judge=judge)
    # Checks: an update, 64 images drawn and judged, an update, the second evaluation begun.
    with pytest.raises(InterruptedRunError):
        run(assets, place, judge=FakeJudge(), check=interrupted_after(4))
    assert len(json.loads((place / INTERMEDIATE_FILE).read_text())) == 1
    again = FakeJudge()
    assert comparable(run(assets, place, judge=again)) == comparable(expected)
    assert again.told == judge.told[1:]
