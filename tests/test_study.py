"""A study's record in its storage: made, joined or refused, its arms and tasks."""

import json
import math

import pytest
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from psycopg2 import DatabaseError
from sqlalchemy.exc import OperationalError

from bdense.weights.space import BASELINE, UNIFORM
from search.errors import (
    NoSearchError,
    OutdatedStudyError,
    SpecChangedError,
    UnknownStudyError,
)
from search.spec.space import search_space
from search.storage.ledger import Claim, Ledger
from search.study.arms import ROW_SPACE, Arm, ArmRow, Task, baseline_arms
from search.study.study import FORMAT, SPEC, Study
from tests.measured import complete, created, finish
from tests.studies import KINDS, METHODS, NORMALISED, of_kind, spec

OURS = Arm(name="a 1.000 (trial 3)", params={"a": 1.0, "b": -2.0}, trial=3)
UNIFORM_ARM = Arm(name="uniform weights", params={BASELINE: UNIFORM})
BOTH_PLANS = (("sfd", "search"), ("progressive", "arms"))
OTHER = Arm(name="a 2.000 (trial 5)", params={"a": 2.0, "b": -4.0}, trial=5)


@pytest.fixture
def study(url) -> Study:
    """Given arms, of which none is planned yet."""
    return Study.create(url, spec(of_kind("progressive", "arms")), of="digits")


def three(study: Study) -> list[Arm]:
    return [*baseline_arms(study.spec), OURS]


def rows(*seeds: int, arms: int = 3, variant: int = 0) -> list[ArmRow]:
    return [ArmRow(arm=arm, seed=seed, variant=variant) for seed in seeds for arm in range(arms)]


def unfinished(study: Study) -> list[ArmRow]:
    return [row for row, ended in study.rows() if not ended]


def take(study: Study) -> Claim:
    """The next given arm, else the next point."""
    claim = study.given.claim(ROW_SPACE, None)
    if not isinstance(claim, Claim):
        claim = study.search.claim(search_space(study.spec), RandomSampler)
    assert isinstance(claim, Claim)
    return claim


def by_arm(arm: Arm, row: ArmRow) -> float:
    return 10.0 + row.arm + row.seed / 8


def again(study: Study, **keys) -> Study:
    """Launch again, with a changed file."""
    method, plan = study.name.split("-")
    of = keys.pop("of", study.of)
    return Study.create(study.url, spec(of_kind(method, plan), **keys), of=of)


# ---- given arms ----


def test_rows_are_taken_in_their_order_and_keep_their_parameters(study):
    arms = three(study)
    study.plan(arms, [1, 2])
    assert unfinished(study) == rows(1, 2)
    assert (study.left(), study.main.budget, study.has_started()) == (6, 6, False)
    assert finish(study, by_arm) == rows(1, 2)
    assert (unfinished(study), study.left(), study.has_started()) == ([], 0, True)
    trials = [trial for _, _, trial in study.complete_arms()]
    assert [trial.value for trial in trials] == [
        10 + arm + s / 8 for s in (1, 2) for arm in (0, 1, 2)
    ]
    assert [trial.user_attrs["arm"] for trial in trials[:3]] == [arm.name for arm in arms]
    assert (study.counts().complete, study.counts().planned) == (6, 6)


def test_planned_again_only_what_is_new_is_added(study):
    """More seeds, another arm, other settings: the rows that are there stay."""
    study.plan(three(study), [1])
    finish(study, by_arm)
    joined = Study.open(study.url, study.name)
    joined.plan(three(study), [1, 2])
    assert unfinished(joined) == rows(2)
    joined.plan([OTHER], [1, 2])
    assert joined.arms == [*three(study), OTHER]
    new = [*rows(2), *(ArmRow(arm=3, seed=s) for s in (1, 2))]
    assert unfinished(joined) == new
    joined.plan(three(study)[:2], [1], [{"batch": 32}, {}])
    assert joined.variants == [{}, {"batch": 32}]
    assert unfinished(joined) == [*new, *rows(1, arms=2, variant=1)]
    assert [row for row, _ in joined.rows()] == [*rows(1), *unfinished(joined)]
    assert (joined.main.budget, joined.left()) == (10, 7)


@pytest.mark.parametrize(
    ("reason", "anew"),
    [("diverged", []), ("error", rows(1, arms=1)), ("out of memory", rows(1, arms=1))],
)
def test_a_row_that_failed_is_tried_anew_where_the_user_can_mend_it(url, reason, anew):
    study = Study.create(url, spec(of_kind("sfd", "arms")))
    study.plan(three(study), [1])
    study.given.fail(take(study), reason, "it did not work", {})
    finish(study, by_arm)
    study.plan(three(study), [1])
    assert unfinished(study) == anew
    assert finish(study, by_arm) == anew
    study.plan(three(study), [1])
    assert study.left() == 0


def test_settings_that_nearly_agree_are_two(study):
    """Comparisons take them for two, so planning must not take them for one."""
    rates = (1e-3, math.nextafter(1e-3, 1.0))
    for lr in rates:
        study.plan([UNIFORM_ARM], [1], [{"lr": lr}])
    finish(study, by_arm)
    assert [trial.user_attrs["variant"]["lr"] for _, _, trial in study.complete_arms()] == list(
        rates
    )


def test_arms_that_another_command_added_meanwhile_are_not_written_over(study, monkeypatch):
    """A row names its arm by its place."""
    theirs, extend = Study.open(study.url, study.name), Ledger.extend_list

    def late(ledger, key, values):
        monkeypatch.setattr(Ledger, "extend_list", extend)
        theirs.plan([OTHER], [1])
        return extend(ledger, key, values)

    monkeypatch.setattr(Ledger, "extend_list", late)
    with pytest.raises(SpecChangedError, match="has added arms"):
        study.plan(three(study), [1])
    assert study.arms == [OTHER]
    study.plan(three(study), [1])
    assert study.arms == [OTHER, *three(study)]
    assert [row.arm for row in unfinished(study)] == [0, 1, 2, 3]


@pytest.mark.parametrize("latents", ["shared", "fresh"])
def test_a_task_is_what_its_row_asks_for(url, latents):
    tree = of_kind("sfd", "arms")
    given = spec(tree, plan__latents=latents, seeds={"evaluation": 9})
    study = Study.create(url, given)
    study.plan([OURS, UNIFORM_ARM], [5], [{}, {"kimg": 5.12}])
    judged = 9 if latents == "shared" else 5
    asked = {"params": OURS.params, "seed": 5, "latents": judged, "arm": OURS.name}
    assert study.task(study.given, take(study).params) == Task(**asked)
    take(study)
    assert study.task(study.given, take(study).params) == Task(**asked, variant={"kimg": 5.12})
    # What all arms of a seed and a variant share.
    assert study.tasks_left() == [
        Task(params={}, seed=5, latents=judged),
        Task(params={}, seed=5, latents=judged, variant={"kimg": 5.12}),
    ]


# ---- a study of any kind ----


@pytest.mark.parametrize(("method", "plan"), KINDS)
def test_a_study_is_what_its_launch_stored(url, method, plan):
    given = spec(of_kind(method, plan))
    created(url, given)
    study = Study.open(url, given.name)
    assert study.spec == given
    assert study.is_search == (plan == "search")
    assert [arm.name for arm in study.arms] == [f"plain {given.resolved.title}", "uniform weights"]
    seeds = [0] if plan == "search" else [0, 1]
    assert unfinished(study) == rows(*seeds, arms=2)
    attributes = study.main.study.user_attrs
    assert attributes["fingerprint"] == given.fingerprint()
    assert json.loads(attributes["conditions"]) == given.conditions()
    assert study.main.study.metric_names == ["FID"]
    assert finish(study, by_arm) == rows(*seeds, arms=2)
    assert [arm.baseline for arm in study.arms] == ["plain", "uniform"]


@pytest.mark.parametrize(("method", "plan"), BOTH_PLANS)
def test_asking_again_is_no_change_of_the_study(url, method, plan):
    """Its budget stays for those who work on it meanwhile, and there is nothing to record."""
    given = spec(of_kind(method, plan))
    study = created(url, given)
    finish(study, by_arm, most=1)
    before = (study.main.budget, study.rows())
    joined = created(url, given)
    assert (joined.main.budget, joined.rows()) == before
    assert "changes" not in joined.main.study.user_attrs


@pytest.mark.parametrize(("method", "plan"), BOTH_PLANS)
def test_what_leaves_numbers_alone_may_change_and_is_recorded(url, method, plan):
    study = created(url, spec(of_kind(method, plan)))
    finish(study, by_arm, most=1)
    again(study, resources={"lease_seconds": 30, "max_attempts": 5, "threads": 2})
    assert Ledger.open(url, study.name, budget=None).ttl == 30
    changes = study.main.study.user_attrs["changes"]
    assert [(c["key"], c["old"], c["new"]) for c in changes] == [
        ("ttl", 60.0, 30.0),
        ("max_attempts", 3, 5),
        ("resources.threads", 1, 2),
    ]


@pytest.mark.parametrize(("method", "plan"), BOTH_PLANS)
def test_other_conditions_are_refused_once_a_row_was_begun(url, method, plan):
    study = created(url, spec(of_kind(method, plan)))
    before = unfinished(study)
    take(study)
    with pytest.raises(SpecChangedError) as error:
        again(study, method__lr=1e-3, evaluation__images=512)
    told = str(error.value)
    assert study.name in told
    assert f"method.lr: {study.spec.method.options['lr']} stored, 0.001 given" in told
    assert "evaluation.images: 256 stored, 512 given" in told
    assert unfinished(study) == before


def test_until_then_a_mistake_may_be_mended_and_nothing_of_it_is_left(study):
    """The old plan's weights would be trained under the new one's name."""
    study.plan(three(study), [1, 2])
    mended = again(study, method__lr=1e-3, of="faces")
    assert (mended.arms, mended.rows()) == ([], [])
    mended.plan(three(study)[:2], [1])
    assert (mended.of, mended.main.budget) == ("faces", 2)
    assert finish(mended, by_arm) == rows(1, arms=2)
    with pytest.raises(SpecChangedError, match="of: 'faces' stored, 'digits' given"):
        again(study, method__lr=1e-3, of="digits")


def test_a_search_that_is_mended_keeps_the_points_that_were_asked_for(url):
    study = Study.create(url, spec(of_kind("sfd", "search")))
    study.search.enqueue({"a": 1.5})
    mended = again(study, method__lr=1e-3, plan__trials=7)
    assert (mended.spec.method.options["lr"], mended.main.budget) == (1e-3, 7)
    assert unfinished(mended) == rows(0, arms=2)
    finish(mended, by_arm)
    assert take(mended).params == {"a": 1.5}


def test_intermediate_fids_of_other_images_are_refused(url):
    """The pruner would compare them; before the first row there are none."""
    tree = of_kind("sfd", "search")
    Study.create(url, spec(tree, plan__at=[0.5], plan__images=32))
    study = Study.create(url, spec(tree, plan__at=[0.5], plan__images=64))
    take(study)
    again(study, plan__at=[0.5], plan__images=64, plan__pruner={"name": "MedianPruner"})
    again(study)
    for other in ({"plan__at": [0.25]}, {"plan__at": [0.5], "plan__images": 128}):
        with pytest.raises(SpecChangedError, match=r"plan\.at \[0\.5\] of 64 images stored"):
            again(study, **other)


@pytest.mark.parametrize(("method", "plan"), BOTH_PLANS)
def test_a_study_whose_maker_was_killed_is_made_whole_by_the_next(url, method, plan):
    given = spec(of_kind(method, plan))
    Ledger.open(url, given.name, budget=1)
    with pytest.raises(UnknownStudyError, match="is incomplete; run the command"):
        Study.open(url, given.name)
    study = created(url, given)
    assert len(finish(Study.open(url, given.name), by_arm)) == len(study.rows())


def test_a_study_is_made_through_hiccups_of_the_database(url, monkeypatch):
    store, failed = RDBStorage.set_study_user_attr, set[str]()

    def once_away(storage, study_id, key, value) -> None:
        if key not in failed:
            failed.add(key)
            raise OperationalError("", {}, DatabaseError("gone"), connection_invalidated=True)
        store(storage, study_id, key, value)

    monkeypatch.setattr("search.storage.engine._FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(RDBStorage, "set_study_user_attr", once_away)
    of = spec(of_kind("sfd", "search"))
    assert Study.create(url, of).spec == of
    assert {SPEC, FORMAT, "of"} <= failed


def test_a_search_takes_no_name_of_given_arms_nor_the_reverse(url):
    """Neither begun nor waiting rows are mixed."""
    for plan, other in (("search", "arms"), ("arms", "search")):
        study = created(url, spec(of_kind("sfd", plan)))
        before = study.main.attribute(SPEC), study.rows()
        with pytest.raises(SpecChangedError, match=r"another name"):
            Study.create(url, spec(of_kind("progressive", other), name=study.name))
        assert (study.main.attribute(SPEC), study.rows()) == before


def test_a_command_for_searches_names_the_search_of_given_arms(url):
    study = Study.create(url, spec(of_kind("sfd", "arms")), of="digits")
    with pytest.raises(NoSearchError, match="give the search itself: digits"):
        _ = study.search
    created(url, spec(of_kind("sfd", "search")))
    with pytest.raises(UnknownStudyError, match="give the study itself: 'sfd-search'"):
        Study.open(url, "sfd-search.baselines")


@pytest.mark.parametrize("stored", [None, 1])
def test_a_study_of_an_older_version_names_the_command_that_brings_it_over(url, stored):
    study = Study.create(url, spec(weights=NORMALISED))
    study.main.study.set_user_attr(FORMAT, stored)
    for opened in (lambda: Study.open(url, "digits"), lambda: Study.create(url, study.spec)):
        with pytest.raises(OutdatedStudyError, match="bdense-search storage upgrade"):
            opened()


# ---- rows with results ----


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_of_a_search_is_trained_under_its_seeds(url, method):
    given = spec(of_kind(method, "search"), seeds={"training": 3, "evaluation": 4})
    study = Study.create(url, given)
    finish(study, by_arm)
    claim = take(study)
    task = study.task(study.search, claim.params)
    assert task == Task(params=dict(claim.params), seed=3, latents=4)
    complete(study, study.search, claim, 2.0)
    (row,) = study.search.rows()
    assert (row.value, row.params) == (2.0, dict(claim.params))
    assert sorted(row.user_attrs.get("fids", {})) == sorted(
        str(stage.nfe) for stage in given.resolved.stages if stage.name
    )
