"""Earlier searches as priors: which are refused, what they propose, and how far they count."""

from dataclasses import replace

import numpy as np
import pytest

from bdense.errors import InputError
from search.analysis.confirmation import choose, require_trials
from search.analysis.observations import disagreement, observed
from search.analysis.priors import plan_first_points, require_priors
from search.analysis.surrogate import Observation, posterior_means
from search.study.study import Study
from tests.measured import command, normalised, refused, search
from tests.studies import LEARNED, changed, spec, write

PLACES = [-0.5, 0.25, 0.75, 1.25, 2.0, 3.0]
PLAN = {"trials": 6, "replicates": 1, "prior": ["early"]}


def curve(a: float, lowest: float = 1.1) -> float:
    return 9.0 + (a - lowest) ** 2


def early(url: str, **keys) -> Study:
    """A search whose lowest point is a = 1.25, then a = 0.75."""
    trials = [({"a": a}, curve(a)) for a in PLACES]
    return search(url, trials, study=normalised(name="early", **keys))


def of(places: list[float], lowest: float, group: str, *, level: float = 0.0, noise: float = 0.02):
    own = np.random.default_rng(len(places))
    return [
        Observation(
            point={"a": a}, value=curve(a, lowest) + level + noise * own.normal(), group=group
        )
        for a in places
    ]


def test_the_best_points_of_a_prior_are_planned_first_and_once(url):
    early(url)
    study = Study.create(url, normalised(plan=PLAN))
    for _ in range(2):
        plan_first_points(study)
        assert [asked["a"] for asked in study.search.asked()] == [1.25, 0.75, 0.25]
    # Points beyond this search's bounds are left out.
    narrow = {"name": "normalised", "a": {"low": 1.0, "high": 3.0}}
    other = Study.create(url, spec(name="narrow", weights=narrow, plan=PLAN))
    plan_first_points(other)
    assert [asked["a"] for asked in other.search.asked()] == [1.25, 2.0, 3.0]


def test_a_prior_counts_in_the_choice_of_candidates(url):
    """Both points have one value here; beside the prior's valley the one in it is the better."""
    early(url)
    points = [({"a": a}, 9.5) for a in (2.6, 1.0)]
    plain = search(url, points, study=normalised(name="plain"), uniform=10.2)
    assert choose(plain, require_trials(plain), 1)[0].trial == 0
    study = search(url, points, study=normalised(plan={**PLAN, "trials": 2}), uniform=10.2)
    assert choose(study, require_trials(study), 1)[0].trial == 1
    assert len(observed(study, require_trials(study)).observations) == 3 + len(PLACES)


def test_a_prior_s_level_is_free_and_its_shape_is_not(url):
    prior = of(np.linspace(-0.5, 3, 12).tolist(), 1.1, "prior early", level=5.0)
    places = np.linspace(-0.4, 2.9, 6).tolist()
    agreeing = disagreement(prior, of(places, 1.1, "search"))
    opposed = disagreement(prior, of(places, 2.5, "search"))
    assert agreeing < 0.1
    # Apart by (a - 2.5)^2 - (a - 1.1)^2 = 5.04 - 2.8 a, whose deviation is 2.8 times that of a.
    assert opposed == pytest.approx(2.8 * np.std(places, ddof=1), rel=0.1)
    assert disagreement(prior, of(places[:3], 2.5, "search")) == 0.0


def test_noise_of_its_own_takes_a_prior_s_weight_away():
    """Of twelve values at a wrong valley and six of the study's own, the own ones decide."""
    own = of(np.linspace(-0.5, 3, 6).tolist(), 2.5, "search")
    prior = of(np.linspace(-0.4, 2.9, 12).tolist(), 1.1, "prior early")
    asked = [{"a": a} for a in np.linspace(-0.5, 3, 36).tolist()]

    def lowest(noise: float) -> float:
        told = [replace(each, noise=noise) for each in prior]
        means = posterior_means([*own, *told], asked)
        return asked[means.index(min(means))]["a"]

    assert lowest(0.0) < 2.1
    assert lowest(disagreement(prior, own) * 12**0.5) == pytest.approx(2.5, abs=0.15)


def test_trainings_of_another_length_inform_as_far_as_they_agree():
    """A third as long: beside few own values the prior's valley counts, beside six their own."""

    def lowest(prior: list[Observation], own: list[Observation]) -> float:
        asked = [{"a": a} for a in np.linspace(-0.5, 3, 36).tolist()]
        means = posterior_means([*own, *prior], asked)
        return asked[means.index(min(means))]["a"]

    prior = [
        replace(each, log_length=-np.log(3))
        for each in of(np.linspace(-0.4, 2.9, 12).tolist(), 1.1, "prior early", level=5.0)
    ]
    ends = of([-0.5, 3.0], 1.1, "search")
    assert lowest(prior, ends) == pytest.approx(1.1, abs=0.3)
    opposed = of(np.linspace(-0.5, 3, 6).tolist(), 2.5, "search")
    assert lowest(prior, opposed) == pytest.approx(2.5, abs=0.2)
    # As one more search of the study's own length, the twelve would have outvoted the six.
    assert lowest([replace(each, log_length=0.0) for each in prior], opposed) < 2.1


def test_the_length_of_a_prior_is_told_in_the_study_s(url):
    early(url, method__kimg=0.64)
    trials = [({"a": a}, curve(a)) for a in (0.3, 0.9, 1.4, 2.2)]
    study = search(url, trials, study=normalised(plan=PLAN, method__kimg=2.56), uniform=10.2)
    told = observed(study, require_trials(study)).observations
    assert [each.log_length for each in told[:5]] == [0.0] * 5
    assert [each.log_length for each in told[5:]] == pytest.approx([np.log(0.25)] * 6)


@pytest.mark.parametrize(
    ("plan", "keys", "named"),
    [
        ({"prior": ["nobody"]}, {}, "plan.prior: no study 'nobody'"),
        ({"prior": ["digits"]}, {}, "plan.prior: digits is the study itself"),
        ({"prior": ["early.confirm"]}, {}, "plan.prior: no study 'early.confirm'"),
        ({}, {"weights": LEARNED}, "plan.prior: study early searched normalised weights"),
        (
            {},
            {"method__lr": 1e-3},
            r"plan.prior: study early differs in method.lr; .*prior_other",
        ),
        ({}, {"teacher__train__kimg": 20}, r"differs in teacher.train.kimg; "),
    ],
)
def test_a_prior_that_cannot_be_used_is_refused_before_anything_is_planned(
    url, tmp_path, plan, keys, named
):
    early(url)
    tree = changed(weights=keys.pop("weights", {"name": "normalised"}), plan=PLAN | plan, **keys)
    with pytest.raises(InputError, match=named) as caught:
        require_priors(url, spec(tree))
    assert refused(command("launch", write(tmp_path, tree))) == str(caught.value)
    assert Study.open(url, "early").sibling("digits") is None


def test_another_problem_is_a_prior_where_that_is_asked_for_and_said(url):
    early(url)
    (line,) = require_priors(url, normalised(plan=PLAN, method__kimg=5.12))
    assert line == "prior: 6 trials of study early"
    (line,) = require_priors(url, normalised(plan=PLAN | {"prior_other": True}, method__lr=1e-3))
    assert line == "prior: 6 trials of study early, which differs in method.lr"


def test_a_prior_without_a_result_is_refused(url):
    search(url, [], study=normalised(name="early"))
    with pytest.raises(InputError, match=r"plan.prior: study early has no complete trial"):
        require_priors(url, normalised(plan=PLAN))
