"""Which points are tried again, which of them wins, and what is said of it."""

import json
import re
from pathlib import Path

import pytest
from search.analysis.promotion import confirmed_arm
from search.analysis.retraining import fresh_seeds, variant, variants
from search.spec.study_spec import StudySpec

from bdense.errors import InputError
from search.analysis.confirmation import (
    choose,
    complete_trials,
    plan_confirmation,
    point_of,
    verdict,
)
from search.report.report_files import write_planned_report
from search.study.arms import PLAIN, SPACES, UNIFORM, Arm, Planned, PlannedRow
from search.study.study import Study
from tests.measured import (
    command,
    copy_storage,
    empty_storage,
    finish,
    normalised,
    open_once,
    refused,
    search,
)
from tests.studies import LEARNED, NORMALISED, spec, write

# A valley around a = 1.25 with noise of 0.4; uniform weights (a = 0) have 10.6.
NOISY = {
    **{-0.5: 12.9, -0.25: 10.2, 0.25: 10.2, 0.5: 9.3, 0.75: 9.1, 1.0: 9.0, 1.25: 8.2, 1.5: 9.0},
    **{1.75: 8.9, 2.0: 10.9, 2.25: 10.1, 2.5: 10.4, 3.0: 11.9},
}
TRIALS = [({"a": a}, value) for a, value in NOISY.items()]
# By slope and fresh seed; the mean is lowest at 1.5, by 0.1.
FRESH = {
    1.25: {1: 9.7, 2: 8.6, 3: 9.5},
    1.0: {1: 9.5, 2: 8.8, 3: 9.8},
    1.5: {1: 9.8, 2: 8.6, 3: 9.1},
}
PLAIN_FIDS, UNIFORM_FIDS = {1: 11.0, 2: 10.5, 3: 11.5}, {1: 10.8, 2: 9.8, 3: 10.5}
FEW = [({"a": a}, 9.0 + (a - 1.1) ** 2) for a in (-0.5, 0.25, 0.75, 1.25, 2.0, 3.0)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The search of ``TRIALS``, its confirmation planned, and complete: each made once."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        open_once(patch)
        make_storages(folder)
    return folder


def make_storages(folder: Path) -> None:
    search(f"sqlite:///{folder / 'searched.db'}", TRIALS, uniform=10.6)
    url = copy_storage(folder / "searched.db", folder / "planned.db")
    confirmation(Study.open(url, "digits"))
    url = copy_storage(folder / "planned.db", folder / "confirmed.db")
    finish(Planned.open(url, "digits.confirm"), fresh)


@pytest.fixture
def url(tmp_path, tmp_path_factory, monkeypatch) -> str:
    """An empty storage, which the command uses."""
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_STORAGE", f"sqlite:///{tmp_path / 'study.db'}")
    open_once(monkeypatch)
    return copy_storage(empty_storage(tmp_path_factory.getbasetemp()), tmp_path / "study.db")


@pytest.fixture
def searched(url, tmp_path, made) -> Study:
    copy_storage(made / "searched.db", tmp_path / "study.db")
    return Study.open(url, "digits")


@pytest.fixture
def planned(url, tmp_path, made) -> Planned:
    """The confirmation of that search, with three candidates and none of their rows begun."""
    copy_storage(made / "planned.db", tmp_path / "study.db")
    return Planned.open(url, "digits.confirm")


@pytest.fixture
def confirmed(url, tmp_path, made) -> Study:
    copy_storage(made / "confirmed.db", tmp_path / "study.db")
    return Study.open(url, "digits")


def confirmation(study: Study, of: StudySpec | None = None, **changes):
    asked = {"kimg": 2.56, "seeds": 3, "count": 3, **changes}
    return plan_confirmation(study, of or normalised(), **asked)


def slope(arm: Arm) -> float:
    return next(a for i, a in enumerate(NOISY) if i == arm.trial)


def fresh(arm: Arm, row: PlannedRow) -> float:
    if arm == PLAIN:
        return PLAIN_FIDS[row.seed]
    return UNIFORM_FIDS[row.seed] if arm == UNIFORM else FRESH[slope(arm)][row.seed]


def longer(arm: Arm, row: PlannedRow) -> float:
    """At another budget: 8 plain, and the less the steeper."""
    return row.seed / 8 + (8.0 if arm.is_baseline else 7.0 - slope(arm))


def slopes(planned) -> list[float]:
    return [slope(arm) for arm in planned.arms[2:]]


# ---- which points ----


def test_candidates_are_those_of_lowest_posterior_mean_not_of_lowest_value(url):
    """One on the far flank was lucky: 8.5 where its neighbours have 10 and 12."""
    bowl = {a: 9.0 + (a - 1.25) ** 2 for a in NOISY} | {2.5: 8.5}
    study = search(url, [({"a": a}, value) for a, value in bowl.items()], uniform=10.56)
    planned = confirmation(study)
    assert slopes(planned) == [1.25, 1.0, 1.5]
    assert planned.arms[:2] == [PLAIN, UNIFORM]
    best = study.trials.study.best_trial
    assert best.params == {"a": 2.5}


def test_each_trains_under_the_same_fresh_seeds(planned):
    assert planned.name == "digits.confirm"
    assert planned.unfinished() == [
        PlannedRow(arm=arm, seed=seed, kimg=2.56, nfe=2) for seed in (1, 2, 3) for arm in range(5)
    ]
    assert planned.facts == {"of": "digits"}


def test_fresh_seeds_are_none_of_the_search_s():
    assert fresh_seeds(spec(), 3) == [1, 2, 3]
    assert fresh_seeds(spec(seeds={"training": 2, "evaluation": 1}), 3) == [0, 3, 4]


def test_a_row_trains_as_the_search_did_but_for_what_it_says():
    study = normalised()
    row = PlannedRow(arm=2, seed=5, kimg=7.5, nfe=3)
    other = variant(study, row)
    changed = {
        key: value for key, value in other.conditions().items() if study.conditions()[key] != value
    }
    assert changed == {
        "budget.kimg": 7.5,
        "seeds.training": 5,
        "seeds.evaluation": 5,
        "student.nfe": 3,
    }
    assert variant(study, PlannedRow(arm=2, seed=0)) == study


def test_each_variant_is_made_once(planned):
    made = variants(planned, normalised())
    assert [(s.seeds.training, s.budget.kimg) for s in made] == [(1, 2.56), (2, 2.56), (3, 2.56)]
    finish(planned, fresh, most=5)
    assert [s.seeds.training for s in variants(planned, normalised())] == [2, 3]


def test_uniform_weights_are_a_point_of_the_surrogate_and_no_candidate(url):
    """Nor is a trial beside it: a = 0.003 would be uniform weights under another name."""
    valley = [({"a": a}, 9.0 + (a + 0.1) ** 2) for a in (-0.5, 0.003, 0.5, 1.0, 2.0, 3.0)]
    study = search(url, valley, uniform=8.99)
    assert [arm.trial for arm in confirmation(study).arms[2:]] == [0, 2, 3]


def test_the_baseline_s_value_moves_the_candidates(url):
    """High at a = 0, it makes the trials beside it less likely than those of the other side."""
    study = search(url, [({"a": a}, 9.0) for a in (-0.25, 0.25, 1.5, 1.75)], uniform=13.0)
    trials = complete_trials(study)
    assert {arm.trial for arm in choose(study, normalised(), trials, 2)} == {2, 3}


@pytest.mark.parametrize(
    ("weights", "params", "point"),
    [
        (NORMALISED, {"a": 1.0, "b": -2.0}, {"a": 1.0}),
        (NORMALISED, {"method": "uniform"}, {"a": 0.0}),
        (NORMALISED, {"method": "sfd"}, None),
        (LEARNED, {"method": "uniform"}, None),
        (
            LEARNED,
            {"rule": "uncertainty", "strength": 1.0, "memory": 100},
            {"rule": "uncertainty", "strength": 1.0},
        ),
    ],
)
def test_where_weights_lie_for_the_surrogate(weights, params, point):
    assert point_of(params, spec(weights=weights)) == point


def test_trials_of_one_slope_are_one_candidate_whatever_their_scale(url):
    """Adam does not see b: the second would be the first once more."""
    points = [(1.25, -6.0), (1.25, -1.0), (0.5, -3.0), (2.0, -3.0), (-0.5, -2.0)]
    trials = [({"a": a, "b": b}, 9.0 + (a - 1.1) ** 2) for a, b in points]
    study = search(url, trials, study=spec())
    found = choose(study, spec(), complete_trials(study), 3)
    assert [arm.trial for arm in found] == [0, 2, 3]
    assert found[0].params == {"a": 1.25, "b": -6.0}


def test_learned_weights_are_confirmed_as_a_rule_with_its_memory(url):
    learned = spec(weights=LEARNED)
    points = [("uncertainty", -0.5), ("uncertainty", 0.5), ("gradient-norm", 0.5)]
    trials = [({"rule": r, "strength": s}, 9.0 + i) for i, (r, s) in enumerate(points)]
    planned = confirmation(search(url, trials, study=learned), learned, count=1)
    assert planned.arms[2:] == [
        Arm(
            name="uncertainty, strength -0.500 (trial 0)",
            params={"rule": "uncertainty", "strength": -0.5, "memory": 100},
            trial=0,
        )
    ]
    finish(planned, lambda arm, row: 10.0 - row.arm)
    assert verdict(Study.open(url, "digits")).winner.arm == planned.arms[2]


def test_an_arm_holds_the_weights_that_its_trial_had(searched):
    """Normalised, b follows from a and K; elsewhere the pair is taken literally."""
    planned = confirmation(searched, count=1)
    (arm,) = planned.arms[2:]
    assert (arm.name, arm.trial) == ("a 1.250 (trial 6)", 6)
    trial = searched.trials.study.trials[6]
    assert arm.params == {"a": 1.25, "b": trial.user_attrs["b"]}


# ---- asked again ----


def test_more_seeds_add_rows(confirmed):
    planned = confirmation(confirmed, seeds=5)
    assert planned.unfinished() == [
        PlannedRow(arm=arm, seed=seed, kimg=2.56, nfe=2) for seed in (4, 5) for arm in range(5)
    ]


def test_asked_again_alike_nothing_is_added(confirmed):
    planned = confirmation(confirmed)
    assert (planned.left(), len(planned.arms)) == (0, 5)


def test_more_candidates_are_the_next_best(confirmed):
    planned = confirmation(confirmed, count=4)
    assert slopes(planned)[:3] == [1.25, 1.0, 1.5]
    assert len(planned.arms) == 6
    assert planned.unfinished() == [PlannedRow(arm=5, seed=s, kimg=2.56, nfe=2) for s in (1, 2, 3)]


def test_a_search_that_went_on_adds_its_new_candidates(url):
    study = search(url, FEW)
    planned = confirmation(study, count=1, seeds=1)
    assert [arm.trial for arm in planned.arms[2:]] == [3]
    finish(planned, lambda arm, row: 10.0 - row.arm)
    # Now lower in the valley than any before.
    extended = search(url, [*FEW, ({"a": 1.0}, 8.0)])
    again = confirmation(extended, count=1, seeds=1)
    assert [arm.trial for arm in again.arms[2:]] == [3, 6]
    assert again.unfinished() == [PlannedRow(arm=3, seed=1, kimg=2.56, nfe=2)]
    finish(again, lambda arm, row: 5.0)
    assert verdict(extended).winner.arm.trial == 6


def test_another_budget_keeps_both_apart(confirmed):
    """At 5 kimg the order is the reverse, and nothing of the search counts there."""
    assert slope(verdict(confirmed).winner.arm) == 1.25
    second = confirmation(confirmed, kimg=5.0, seeds=2)
    assert [row.kimg for row in second.unfinished()] == [5.0] * 10
    assert verdict(confirmed) is None
    finish(second, longer)
    found = verdict(confirmed)
    assert (slope(found.winner.arm), found.kimg, found.ended) == (1.5, 5.0, True)
    assert found.winner.fids == {1: 5.625, 2: 5.75}
    assert found.comparison.plain.fids == {1: 8.125, 2: 8.25}
    # And back: what was measured is still there.
    assert confirmation(confirmed).left() == 0
    found = verdict(confirmed)
    assert (slope(found.winner.arm), found.kimg) == (1.25, 2.56)
    assert found.comparison.plain.fids == PLAIN_FIDS


def test_without_a_trial_there_is_nothing_to_confirm(url):
    study = search(url, [])
    with pytest.raises(InputError, match=r"study digits: 0 of 1 trials .* no point to choose"):
        confirmation(study)
    with pytest.raises(InputError, match=r"no trial of study digits is complete, .* launch fir"):
        confirmed_arm(study)


# ---- the verdict ----


def test_the_winner_is_by_everything_measured_not_by_the_fresh_mean_alone(confirmed):
    """1.5 has the lower mean of three, but the search's values around speak for 1.25."""
    found = verdict(confirmed)
    means = {slope(r.arm): r.summary().mean for r in found.comparison.results[2:]}
    assert min(means, key=means.get) == 1.5
    assert slope(found.winner.arm) == 1.25
    assert confirmed_arm(confirmed) == found.winner.arm
    # What is said of it rests on the fresh seeds: -1.3, -1.9, -2.0 against plain, 11 its mean.
    assert found.winner.fids == FRESH[1.25]
    pair = found.comparison.against(found.winner, found.comparison.plain)
    assert pair.mean == pytest.approx(-5.2 / 3)
    assert pair.relative == pytest.approx(-5.2 / 33)
    reach = 4.302653 * (0.43 / 3 / 3) ** 0.5  # variance (0.1878 + 0.0278 + 0.0711) / 2
    assert (pair.low, pair.high) == pytest.approx((-5.2 / 3 - reach, -5.2 / 3 + reach), rel=1e-5)


def test_the_verdict_in_words_and_for_scripts(confirmed):
    found = verdict(confirmed)
    assert found.lines()[-2] == (
        "confirmed at 2.56 kimg: a 1.250 (trial 6), mean FID 9.267 +- 0.338 over 3 fresh seeds; "
        "against plain SFD -15.8 %, -1.73 [-2.67, -0.79]; against uniform weights "
        "-10.6 %, -1.10 [-1.35, -0.85]"
    )
    told = json.loads(json.dumps(found.as_dict()))
    assert told["winner"]["trial"] == 6
    assert (told["kimg"], told["ended"]) == (2.56, True)
    assert [arm["name"] for arm in told["arms"]][:3] == [
        "plain SFD",
        "uniform weights",
        "a 1.250 (trial 6)",
    ]
    ours = told["arms"][2]
    assert ours["fids"] == {"1": 9.7, "2": 8.6, "3": 9.5}
    assert ours["vs_uniform"]["mean"] == pytest.approx(-1.1)
    assert ours["vs_uniform"]["tie"] is False
    assert (ours["n"], ours["std_err"]) == (3, pytest.approx(0.338, abs=1e-3))
    assert ours["conditions"]["images"] == 256
    assert "vs_plain" not in told["arms"][0]


def test_until_all_rows_have_ended_nothing_is_promoted(planned):
    study = Study.open(planned.url, "digits")
    assert verdict(study) is None
    with pytest.raises(InputError) as error:
        confirmed_arm(study)
    assert str(error.value) == (
        "study digits has no confirmed winner, only a best of n (a 1.250) that may have been "
        "lucky; run bdense-search confirm digits first, or give weights by --weights A,B"
    )
    finish(planned, fresh, most=5)
    found = verdict(study)
    assert not found.ended
    assert found.lines()[-2].startswith("confirmed so far at 2.56 kimg: a 1.250 (trial 6), ")
    assert "; against plain SFD -11.8 %, -1.30 [one seed], tie" in found.lines()[-2]
    with pytest.raises(InputError, match="confirmation of study digits has not ended; run bdense"):
        confirmed_arm(study)


def test_a_candidate_that_failed_under_a_seed_does_not_win_by_the_others(planned):
    study = Study.open(planned.url, "digits")
    finish(planned, fresh, most=2)
    claim = planned.ledger.claim(SPACES["retrain"], None)
    planned.ledger.fail(claim, "diverged", "the loss is not finite", {})
    finish(planned, fresh)
    found = verdict(study)
    assert found.ended
    assert slope(found.winner.arm) == 1.0
    assert 1.25 in {slope(result.arm) for result in found.comparison.results[2:]}


# ---- on the command line ----


def test_best_says_when_no_winner_is_confirmed(searched):
    before = command("best", "digits")
    assert before.out.splitlines()[-1] == "No winner is confirmed: bdense-search confirm digits"
    assert json.loads(command("best", "digits", "--json").out)["confirmed"] is None


def test_best_names_the_confirmed_winner(confirmed):
    after = command("best", "digits").out
    assert "confirmed at 2.56 kimg: a 1.250 (trial 6), mean FID 9.267" in after
    assert "No winner is confirmed" not in after
    told = json.loads(command("best", "digits", "--json").out)
    assert told["confirmed"]["winner"]["trial"] == 6
    assert told["best"]["confirmed"] is False


def test_a_confirmation_whose_spec_is_another_versions_is_named(confirmed, tmp_path):
    planned = Planned.open(confirmed.url, "digits.confirm")
    stored = json.loads(planned.spec_json)
    stored["budget"]["wings"] = 2
    planned.ledger.study.set_user_attr("spec", json.dumps(stored))
    for verb in (("best", "digits"), ("report", "digits", "--out", tmp_path / "shown")):
        assert refused(command(*verb)) == (
            "this bdense cannot read the study's spec (digits.confirm: budget.wings: Extra inputs "
            "are not permitted); use the version that launched it"
        )


def test_of_a_confirmation_that_is_complete_the_verdict_is_told(confirmed):
    """No Ray is started for it."""
    answer = command("confirm", "digits")
    assert answer.status == 0
    assert answer.err == "digits.confirm is complete; nothing is left to do\n"
    headline, *_, conditions, hint = answer.out.splitlines()
    assert headline == "digits.confirm: 15 of 15 rows complete, 0 pruned, 0 failed, 0 running"
    assert conditions.startswith("FID: 256 images at NFE 2, features of digits-classifier")
    assert hint == "promote it:   bdense-search promote digits --to PROMOTION.yaml"
    told = json.loads(command("confirm", "digits", "--json").out)
    assert told == verdict(confirmed).as_dict()


def test_a_confirmation_s_own_name_works_where_a_study_s_does(searched, tmp_path):
    planned = confirmation(searched, count=1, seeds=1)
    claim = planned.ledger.claim(SPACES["retrain"], None)
    planned.ledger.fail(claim, "diverged", "the loss is not finite at iteration 3", {})
    finish(planned, fresh)
    status = command("status", "digits.confirm")
    assert status.out.splitlines() == [
        "digits.confirm: 2 of 3 rows complete, 0 pruned, 1 failed, 0 running",
        "row 0 (plain SFD, seed 1) failed, diverged: the loss is not finite at iteration 3",
    ]
    assert json.loads(command("status", "digits.confirm", "--json").out) == {
        "study": "digits.confirm",
        "trials": {"planned": 3, "complete": 2, "pruned": 0, "failed": 1, "running": 0},
    }
    report = command("report", "digits.confirm", "--out", tmp_path / "shown")
    shown = tmp_path / "shown"
    assert report.out == f"{shown / 'report.html'}\n{shown / 'report.md'}\n"
    page = (tmp_path / "shown" / "report.md").read_text()
    assert page.startswith("# digits.confirm\n\ndigits.confirm: 2 of 3 rows complete")
    assert "2.56 kimg, NFE 2\n" in page
    assert "a 1.250 (trial 6)" in page
    assert refused(command("best", "digits.confirm")) == (
        "'digits.confirm' is no search but planned rows (retrain); give the search itself: digits"
    )


def test_the_trajectories_of_each_seed_are_cleaned(planned, tmp_path):
    place = tmp_path / "runs" / "cache" / "trajectories"
    folders = [place / name for name in ("of-seed-1", "of-seed-2", "of-the-search")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "shard").write_bytes(bytes(2**19))
    planned.ledger.study.set_user_attr("trajectories", list(map(str, folders[:2])))
    expected = "1.0 MiB of trajectories deleted\n"
    assert command("clean", "digits.confirm").out == expected
    assert [folder.exists() for folder in folders] == [False, False, True]
    assert command("clean", "digits.confirm").out == expected.replace("1.0", "0.0")


def test_a_report_of_rows_at_two_budgets_has_a_table_of_each_and_each_arms_grid(
    searched, tmp_path
):
    finish(confirmation(searched, count=1, seeds=1), fresh)
    planned = confirmation(searched, kimg=5.0, count=1, seeds=1)
    finish(planned, lambda arm, row: 7.0 + row.arm)
    grid = tmp_path / "runs/digits.confirm/00003/samples.png"
    grid.parent.mkdir(parents=True)
    grid.write_bytes(b"of plain SFD at the last budget, seed 1")
    page = write_planned_report(planned, tmp_path / "shown")
    text = page.read_text()
    assert text.index("2.56 kimg, NFE 2\n") < text.index("5 kimg, NFE 2\n")
    assert "![plain SFD, seed 1](samples-0.png)" in text
    assert (
        page.parent / "samples-0.png"
    ).read_bytes() == b"of plain SFD at the last budget, seed 1"
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == ["arms-0.png", "arms-1.png", "samples-0.png"]
    assert all((page.parent / name).stat().st_size for name in pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("confirm", "nobody"), "no study 'nobody' in sqlite:///"),
        (
            ("confirm", "digits.confirm"),
            "'digits.confirm' is no search but planned rows (retrain)",
        ),
        (("confirm", "digits.baselines"), "give the study itself: 'digits'"),
        (("confirm", "absent.yaml"), "the study file absent.yaml cannot be read"),
    ],
)
def test_what_cannot_be_confirmed_is_refused(planned, arguments, message):
    assert message in refused(command(*arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kimg", "0.0001"), "--kimg: must lie in 0.001..1e9, got 0.0001"),
        (("--kimg", "inf"), "--kimg: must lie in 0.001..1e9, got inf"),
        (("--kimg", "nan"), "--kimg: must lie in 0.001..1e9, got nan"),
        (("--seeds", "2"), "--seeds: must be 3 or more, got 2"),
        (("--candidates", "-1"), "--candidates: must be 1 or more, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(url, options, message):
    """A row beyond its distribution's bounds would be given a value by chance."""
    answer = command("confirm", "digits", *options)
    assert answer.status == 2
    assert message in answer.err
    assert "Traceback" not in answer.err


def test_a_file_that_is_not_what_was_searched_is_refused(searched, tmp_path):
    path = write(tmp_path, weights=NORMALISED, budget__lr=1e-3)
    assert refused(command("confirm", path)) == (
        "study 'digits' exists under other conditions, so its numbers would not compare "
        "(budget.lr: 0.0005 stored, 0.001 given); rename the study or restore the file"
    )
