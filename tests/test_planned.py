"""Studies of planned rows: what is added, what is refused, what stays as it was."""

import json
import math

import optuna
import pytest
from search.spec.study_spec import StudySpec
from search.study.opening import open_record, open_search_named

from search.errors import NotPlannedError, SpecChangedError, UnknownStudyError
from search.storage.ledger import Claim, Ledger
from search.study.arms import PLAIN, SPACES, UNIFORM, Arm, Planned, PlannedRow
from search.study.study import Study
from tests.measured import copy_storage, empty_storage, finish, normalised, open_once, search
from tests.studies import promotion

OURS = Arm(name="a 1.000 (trial 3)", params={"a": 1.0, "b": -2.0}, trial=3)
ARMS = [PLAIN, UNIFORM, OURS]


@pytest.fixture
def url(tmp_path, tmp_path_factory, monkeypatch) -> str:
    open_once(monkeypatch)
    return copy_storage(empty_storage(tmp_path_factory.getbasetemp()), tmp_path / "study.db")


def create(url: str, *, study=None, facts=None) -> Planned:
    given, of = study or normalised(), facts or {"of": "digits"}
    return Planned.create(url, "digits.confirm", "retrain", given, facts=of)


def rows(*seeds: int, arms: int = 3) -> list[PlannedRow]:
    return [
        PlannedRow(arm=arm, seed=seed, kimg=2.56, nfe=2) for seed in seeds for arm in range(arms)
    ]


def claim_next(planned: Planned) -> Claim:
    claim = planned.ledger.claim(SPACES[planned.kind], None)
    assert isinstance(claim, Claim)
    return claim


def by_arm(arm: Arm, row: PlannedRow) -> float:
    return 10.0 + row.arm + row.seed / 8


@pytest.mark.parametrize(
    "row", [PlannedRow(arm=2, seed=7), PlannedRow(arm=0, seed=1, kimg=2.56, nfe=3)]
)
def test_a_row_is_its_parameters(row):
    assert PlannedRow.of(row.params()) == row
    assert None not in row.params().values()


def test_rows_are_taken_in_their_order_and_keep_their_parameters(url):
    planned = create(url)
    planned.plan(ARMS, rows(1, 2))
    assert planned.unfinished() == rows(1, 2)
    assert (planned.left(), planned.ledger.budget) == (6, 6)
    assert finish(planned, by_arm) == rows(1, 2)
    assert planned.unfinished() == []
    trials = planned.ledger.study.trials
    assert [trial.value for trial in trials] == [
        10 + arm + s / 8 for s in (1, 2) for arm in (0, 1, 2)
    ]
    assert [trial.user_attrs["arm"] for trial in trials[:3]] == [arm.name for arm in ARMS]
    assert planned.headline() == (
        "digits.confirm: 6 of 6 rows complete, 0 pruned, 0 failed, 0 running"
    )


def test_a_row_is_unfinished_until_it_has_ended(url):
    planned = create(url)
    planned.plan(ARMS, rows(1))
    claim = claim_next(planned)
    assert planned.unfinished() == rows(1)
    planned.ledger.fail(claim, "diverged", "the loss is not finite", {})
    assert planned.unfinished() == rows(1)[1:]


def test_planned_again_only_what_is_new_is_added(url):
    """More seeds, another arm: the rows that are there stay."""
    planned = create(url)
    planned.plan(ARMS, rows(1))
    finish(planned, by_arm)
    again = create(url)
    again.plan(ARMS, rows(1, 2))
    assert again.unfinished() == rows(2)
    fourth = Arm(name="a 2.000 (trial 5)", params={"a": 2.0, "b": -4.0}, trial=5)
    again.plan([*ARMS, fourth], rows(1, 2, arms=4))
    assert again.arms == [*ARMS, fourth]
    new = [*rows(2), *(PlannedRow(arm=3, seed=s, kimg=2.56, nfe=2) for s in (1, 2))]
    assert again.unfinished() == new
    assert again.rows() == [*rows(1), *new]
    assert (again.ledger.budget, again.left()) == (8, 5)


@pytest.mark.parametrize(
    ("reason", "anew"),
    [("diverged", []), ("error", rows(1, arms=1)), ("out of memory", rows(1, arms=1))],
)
def test_a_row_that_failed_is_tried_anew_where_the_user_can_mend_it(url, reason, anew):
    planned = create(url)
    planned.plan(ARMS, rows(1))
    planned.ledger.fail(claim_next(planned), reason, "it did not work", {})
    finish(planned, by_arm)
    planned.plan(ARMS, rows(1))
    assert planned.unfinished() == anew
    assert finish(planned, by_arm) == anew
    planned.plan(ARMS, rows(1))
    assert planned.left() == 0


def test_two_budgets_that_nearly_agree_are_two_rows(url):
    """Comparisons take them for two, so planning must not take them for one."""
    planned = create(url)
    budgets = (2.56, math.nextafter(2.56, 3.0))
    for kimg in budgets:
        planned.plan(ARMS, [PlannedRow(arm=0, seed=1, kimg=kimg, nfe=2)])
    assert [row.kimg for row in planned.unfinished()] == list(budgets)
    finish(planned, by_arm)
    assert [trial.params["kimg"] for trial in planned.ledger.study.trials] == list(budgets)


def test_arms_that_another_command_added_meanwhile_are_not_written_over(url):
    """A row names its arm by its place."""
    mine, theirs = create(url), create(url)
    arms, places = mine.with_arms(ARMS)
    assert (arms, places) == (ARMS, [0, 1, 2])
    other = Arm(name="a 2.000 (trial 5)", params={"a": 2.0, "b": -4.0}, trial=5)
    theirs.plan([PLAIN, UNIFORM, other], rows(1))
    with pytest.raises(SpecChangedError, match=r"has added arms to 'digits\.confirm' meanwh"):
        mine.plan(arms, rows(1))
    assert mine.arms == [PLAIN, UNIFORM, other]
    assert mine.with_arms(ARMS) == ([PLAIN, UNIFORM, other, OURS], [0, 1, 3])


def test_asking_again_is_no_change_of_the_study(url):
    """Its budget stays for those who work on it meanwhile, and there is nothing to record."""
    planned = create(url)
    planned.plan(ARMS, rows(1, 2))
    finish(planned, by_arm, most=1)
    create(url)
    assert planned.ledger.budget == 6
    assert "changes" not in planned.ledger.study.user_attrs
    assert planned.arms == ARMS
    assert planned.facts == {"of": "digits"}


def test_resources_may_change(url):
    planned = create(url)
    planned.plan(ARMS, rows(1))
    finish(planned, by_arm, most=1)
    create(url, study=normalised(resources={"lease_seconds": 30, "max_attempts": 5}))
    assert (Ledger.open(url, planned.name, budget=None).ttl) == 30
    changes = planned.ledger.study.user_attrs["changes"]
    assert [(c["key"], c["old"], c["new"]) for c in changes] == [
        ("ttl", 60.0, 30.0),
        ("max_attempts", 3, 5),
    ]


def test_other_conditions_or_facts_are_refused_once_a_row_was_begun(url):
    planned = create(url)
    planned.plan(ARMS, rows(1))
    planned.ledger.claim(SPACES["retrain"], None)
    with pytest.raises(SpecChangedError) as error:
        create(url, study=normalised(budget__lr=1e-3), facts={"of": "faces"})
    assert str(error.value) == (
        "'digits.confirm' exists under other conditions, so its numbers would not compare "
        "(budget.lr: 0.0005 stored, 0.001 given; of: 'digits' stored, 'faces' given); restore "
        "the file, or give another name (promote has --name)"
    )
    assert planned.arms == ARMS


def test_until_then_a_mistake_may_be_mended_and_nothing_of_it_is_left(url):
    """The old plan's weights would be trained under the new one's name."""
    planned = create(url, facts={"of": "digits", "a": 1.0})
    planned.plan(ARMS, rows(1, 2))
    mended = create(url, facts={"of": "digits", "a": 2.0})
    assert (mended.arms, mended.unfinished()) == ([], [])
    mended.plan(ARMS[:2], rows(1, arms=2))
    assert (mended.facts["a"], mended.ledger.budget) == (2.0, 2)
    assert finish(mended, by_arm) == rows(1, arms=2)


def test_a_study_whose_maker_was_killed_is_made_whole_by_the_next(url):
    Ledger.open(url, "digits.confirm", budget=1)
    with pytest.raises(UnknownStudyError, match=r"'digits\.confirm' is half made; the same "):
        Planned.open(url, "digits.confirm")
    planned = create(url)
    planned.plan(ARMS, rows(1))
    assert finish(Planned.open(url, "digits.confirm"), by_arm) == rows(1)


def test_a_search_is_no_planned_study_nor_the_reverse(url):
    study = search(url, [({"a": 1.0}, 9.0)])
    with pytest.raises(NotPlannedError, match="study 'digits' is a search, not a list of plann"):
        Planned.open(url, "digits")
    with pytest.raises(NotPlannedError, match="study 'digits' is a search"):
        Planned.create(url, "digits", "retrain", normalised(), facts={})
    assert study.trials.budget == 1
    create(url).plan(ARMS, rows(1))
    assert isinstance(open_record(url, "digits"), Study)
    record = open_record(url, "digits.confirm")
    assert isinstance(record, Planned)
    assert (record.kind, record.unfinished()) == ("retrain", rows(1))
    with pytest.raises(UnknownStudyError) as error:
        open_search_named(url, "digits.confirm")
    assert str(error.value) == (
        "'digits.confirm' is no search but planned rows (retrain); give the search itself: digits"
    )
    with pytest.raises(UnknownStudyError, match="give the study itself: 'digits'"):
        open_record(url, "digits.baselines")


def test_a_search_does_not_take_the_name_of_planned_rows(url):
    """Neither begun nor waiting rows are mixed with a search's trials."""
    planned = Planned.create(url, "promote-digits", "progressive", promotion(), facts={})
    planned.plan(ARMS, [PlannedRow(arm=0, seed=0)])
    spec_json = planned.spec_json
    with pytest.raises(SpecChangedError, match=r"'promote-digits' .* planned rows, .* another "):
        Study.create(url, normalised(name="promote-digits"))
    assert planned.spec_json == spec_json
    assert planned.unfinished() == [PlannedRow(arm=0, seed=0)]


def test_an_unknown_one_is_not_made_by_looking(url):
    search(url, [({"a": 1.0}, 9.0)])
    with pytest.raises(UnknownStudyError, match=r"no study 'digits\.confirm' in sqlite:///"):
        Planned.open(url, "digits.confirm")
    assert optuna.get_all_study_names(url) == ["digits", "digits.baselines"]


def test_what_workers_read_is_what_was_stored(url):
    planned = create(url)
    attributes = planned.ledger.study.user_attrs
    assert json.loads(planned.spec_json)["name"] == "digits"
    assert planned.spec(StudySpec) == normalised()
    assert attributes["fingerprint"] == normalised().fingerprint()
    assert json.loads(attributes["conditions"]) == normalised().conditions()
    assert planned.ledger.study.metric_names == ["FID"]
