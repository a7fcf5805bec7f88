"""What each workload and each plan promise to the rest of a study."""

import pytest

from bdense.errors import InputError
from bdense.knobs import knobs_of
from search.analysis.plans import plan_given
from search.spec.study import StudySpec
from search.study.arms import baseline_arms
from search.study.study import Study
from tests.programs import spec_of, written
from tests.studies import of_kind, spec

SEARCH = {"trials": 5, "replicates": 2, "race": 1}


@pytest.fixture(params=["sfd", "progressive", "command"])
def search(request, tmp_path) -> StudySpec:
    if request.param == "command":
        return spec_of(written(tmp_path, plan=SEARCH))
    return spec(of_kind(request.param, "search"), plan=SEARCH)


@pytest.fixture
def arms(search) -> StudySpec:
    plan = {"arms": list(search.baselines), "seeds": [3, 4]}
    tree = search.as_dict() | {"name": "arms", "plan": plan}
    return StudySpec.read(tree).workload.resolve("arms")


def test_a_stored_spec_lacks_what_its_workload_does_not_use(search):
    stored, unused = search.as_dict(), set(search.workload.unused)
    assert stored.keys() == knobs_of(StudySpec).keys() - unused | {"facts"}
    assert StudySpec.read(stored) == search


def test_files_and_settings_are_conditions_under_keys_of_their_own(search):
    contents = search.workload.contents()
    assert contents
    assert contents.items() <= search.conditions().items()
    assert not contents.keys() & search.conditions({}).keys()


def test_each_baseline_is_an_arm_with_a_name_of_its_own(search):
    arms = baseline_arms(search)
    assert tuple(arm.baseline for arm in arms) == search.baselines
    assert len({arm.name for arm in arms}) == len(arms)


def test_a_variant_has_only_settings_of_the_method(search):
    assert search.workload.variant({}) is search
    with pytest.raises(InputError, match=r"confirm\.method\.nothing "):
        search.workload.variant({"nothing": 1}, "confirm.method")


def test_a_plan_has_as_many_rows_as_are_planned(url, search, arms):
    study, given = Study.create(url, search), plan_given(url, arms)
    assert study.left() == search.plan.num_rows(search) - search.plan.race
    assert study.baselines.counts().planned == len(search.baselines) * search.plan.num_seeds
    assert given.counts().planned == arms.plan.num_rows(arms)
    assert (study.noun, given.noun, given.baselines) == ("trial", "row", None)


def test_arms_are_measured_under_the_conditions_of_their_search(search, arms):
    own = {key for key in search.conditions() if key.startswith(("weights.", "seeds."))}
    assert own
    left = {key: value for key, value in search.conditions().items() if key not in own}
    assert arms.conditions() == left | {"latents": 0}
