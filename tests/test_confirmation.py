"""Which points are tried again, which of them wins, and what is said of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bdense.errors import InputError
from bdense.weights import WEIGHT_SPACES
from bdense.weights.space import PLAIN, UNIFORM, Choice, WeightSpace
from bdense.weights.weighting import FixedWeights
from search.analysis.confirmation import choose, confirmed_arm, require_trials, verdict
from search.analysis.plans import at_another_k, fresh_seeds, plan_confirmation
from search.study.arms import ROW_SPACE, Arm, ArmRow
from search.study.study import Study
from search.study.summary import baselines_of, failures
from tests.measured import (
    VALLEY,
    command,
    copy_storage,
    finish,
    open_once,
    plan_promotion,
    refused,
    search,
)
from tests.studies import LEARNED, NORMALISED, changed, of_kind, promotion, spec, write

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
    "plain": {1: 11.0, 2: 10.5, 3: 11.5},
    "uniform": {1: 10.8, 2: 9.8, 3: 10.5},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The search of ``TRIALS``, its confirmation planned, and complete: each made once."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        open_once(patch)
        search(f"sqlite:///{folder / 'searched.db'}", TRIALS, uniform=10.6)
        url = copy_storage(folder / "searched.db", folder / "planned.db")
        confirmation(Study.open(url, "digits"))
        url = copy_storage(folder / "planned.db", folder / "confirmed.db")
        finish(Study.open(url, "digits.confirm"), fresh)
    return folder


@pytest.fixture
def planned(url, tmp_path, made) -> Study:
    """The confirmation of that search, with three candidates and none of their rows begun."""
    copy_storage(made / "planned.db", tmp_path / "study.db")
    return Study.open(url, "digits.confirm")


@pytest.fixture
def confirmed(url, tmp_path, made) -> Study:
    """The search whose confirmation is complete."""
    copy_storage(made / "confirmed.db", tmp_path / "study.db")
    return Study.open(url, "digits")


def confirmation(study: Study, **asked: Any) -> Study:
    return plan_confirmation(study, **{"method": {}, "seeds": 3, "count": 3, **asked})


def slope(arm: Arm) -> float:
    return next(a for i, a in enumerate(NOISY) if i == arm.trial)


def fresh(arm: Arm, row: ArmRow) -> float:
    return FRESH[arm.baseline or slope(arm)][row.seed]


def slopes(planned: Study) -> list[float]:
    return [slope(arm) for arm in planned.arms[2:]]


def left(study: Study) -> list[ArmRow]:
    return [row for row, ended in study.rows() if not ended]


# ---- which points ----


def test_candidates_are_those_of_lowest_posterior_mean_not_of_lowest_value(url):
    """One on the far flank was lucky: 8.5 where its neighbours have 10 and 12."""
    bowl = {a: 9.0 + (a - 1.25) ** 2 for a in NOISY} | {2.5: 8.5}
    study = search(url, [({"a": a}, value) for a, value in bowl.items()], uniform=10.56)
    planned = confirmation(study)
    assert slopes(planned) == [1.25, 1.0, 1.5]
    assert [arm.baseline for arm in planned.arms] == ["plain", "uniform", None, None, None]
    assert study.search.best().params == {"a": 2.5}


def test_fresh_seeds_are_none_of_the_search_s():
    assert fresh_seeds(spec(), 3) == [1, 2, 3]
    assert fresh_seeds(spec(seeds={"training": 2, "evaluation": 1}), 3) == [0, 3, 4]
    assert fresh_seeds(spec(), 2, used=[1, 3]) == [2, 4]


def test_uniform_weights_are_a_point_of_the_surrogate_and_no_candidate(url):
    """Nor is a trial beside it: a = 0.003 would be uniform weights under another name."""
    valley = [({"a": a}, 9.0 + (a + 0.1) ** 2) for a in (-0.5, 0.003, 0.5, 1.0, 2.0, 3.0)]
    study = search(url, valley, uniform=8.99)
    assert [arm.trial for arm in confirmation(study).arms[2:]] == [0, 2, 3]


def test_the_baseline_s_value_moves_the_candidates(url):
    """High at a = 0, it makes the trials beside it less likely than those of the other side."""
    study = search(url, [({"a": a}, 9.0) for a in (-0.25, 0.25, 1.5, 1.75)], uniform=13.0)
    assert {arm.trial for arm in choose(study, require_trials(study), 2)} == {2, 3}


def test_trials_of_one_slope_are_one_candidate_whatever_their_scale(url):
    """Adam does not see b: the second would be the first once more."""
    points = [(1.25, -6.0), (1.25, -1.0), (0.5, -3.0), (2.0, -3.0), (-0.5, -2.0)]
    trials = [({"a": a, "b": b}, 9.0 + (a - 1.1) ** 2) for a, b in points]
    study = search(url, trials, study=spec())
    found = choose(study, require_trials(study), 3)
    assert [arm.trial for arm in found] == [0, 2, 3]
    assert found[0].params == {"a": 1.25, "b": -6.0}


def test_learned_weights_are_confirmed_as_a_rule_with_its_memory(url):
    points = [("uncertainty", -0.5), ("uncertainty", 0.5), ("gradient-norm", 0.5)]
    trials = [({"rule": r, "strength": s}, 9.0 + i) for i, (r, s) in enumerate(points)]
    study = search(url, trials, study=spec(weights=LEARNED))
    planned = confirmation(study, count=1)
    params = {"rule": "uncertainty", "strength": -0.5, "memory": 100}
    name = "uncertainty, strength -0.500 (trial 0)"
    assert planned.arms[2:] == [Arm(name=name, params=params, trial=0)]
    finish(planned, lambda arm, row: 10.0 - row.arm)
    assert verdict(study).winner.arm == planned.arms[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes(WeightSpace):
    """One of some shapes, as another package may bring it: no numbers, no geometry."""

    name: ClassVar[str] = "shapes"

    def distributions(self) -> Mapping[str, Choice]:
        return {"shape": Choice(("rising", "falling", "peak"))}

    def own_weighting(self, params: Mapping[str, Any], num_branches: int) -> FixedWeights:
        k = torch.arange(1.0, num_branches + 1)
        return FixedWeights(
            {"rising": k, "falling": k.flip(0), "peak": k * k.flip(0)}[params["shape"]]
        )


def test_weights_without_coordinates_are_ranked_by_value_and_won_by_mean(
    url, tmp_path, monkeypatch
):
    monkeypatch.setitem(WEIGHT_SPACES._builtin, "shapes", f"{__name__}:Shapes")
    trials = [({"shape": s}, v) for s, v in (("rising", 9.0), ("falling", 8.0), ("peak", 8.5))]
    study = search(url, trials, study=spec(weights={"name": "shapes"}))
    planned = confirmation(study, count=2)
    assert [arm.params for arm in planned.arms[2:]] == [{"shape": "falling"}, {"shape": "peak"}]
    finish(planned, lambda arm, row: 10.0 - row.arm)
    assert verdict(study).winner.arm.name == "shape peak (trial 2)"
    assert json.loads(command("best", "digits", "--json").out)["best"]["shape"] == "falling"
    assert command("report", "digits", "--out", tmp_path / "shown").status == 0
    promoted = plan_promotion(url, promotion(), confirmed_arm(study), seeds=[0])
    assert promoted.arms[2].params == {"shape": "peak"}
    assert at_another_k(promoted.arms[2], 4, 2) == ""


# ---- asked again ----


def test_more_candidates_are_the_next_best(confirmed):
    planned = confirmation(confirmed, count=4)
    assert slopes(planned)[:3] == [1.25, 1.0, 1.5]
    assert left(planned) == [ArmRow(arm=5, seed=seed) for seed in (1, 2, 3)]


def test_a_search_that_went_on_adds_its_new_candidates(searched):
    planned = confirmation(searched, count=1, seeds=1)
    assert [arm.trial for arm in planned.arms[2:]] == [3]
    finish(planned, lambda arm, row: 10.0 - row.arm)
    # Now lower in the valley than any before.
    extended = search(searched.url, [*VALLEY, ({"a": 1.0}, 8.0)])
    again = confirmation(extended, count=1, seeds=1)
    assert [arm.trial for arm in again.arms[2:]] == [3, 6]
    assert left(again) == [ArmRow(arm=3, seed=1)]
    finish(again, lambda arm, row: 5.0)
    assert verdict(extended).winner.arm.trial == 6


def test_another_budget_keeps_both_apart(confirmed):
    """At 5 kimg the order is the reverse, and nothing of the search counts there."""
    assert slope(verdict(confirmed).winner.arm) == 1.25
    second = confirmation(confirmed, method={"kimg": 5.0}, seeds=2)
    assert len(left(second)) == 10
    assert verdict(confirmed) is None
    finish(second, lambda arm, row: row.seed / 8 + (8.0 if arm.baseline else 7.0 - slope(arm)))
    found = verdict(confirmed)
    assert (slope(found.winner.arm), found.budget, found.ended) == (1.5, "5 kimg", True)
    assert found.winner.values == {1: 5.625, 2: 5.75}
    assert found.comparison.baseline(PLAIN).values == {1: 8.125, 2: 8.25}
    # And back, by the search's own number too: what was measured is still there.
    assert confirmation(confirmed, method={"kimg": 2.56}).left() == 0
    found = verdict(confirmed)
    assert (slope(found.winner.arm), found.budget) == (1.25, "2.56 kimg")
    assert found.comparison.baseline(PLAIN).values == FRESH["plain"]


def test_without_a_trial_there_is_nothing_to_confirm(url):
    study = search(url, [])
    with pytest.raises(InputError, match=r"0 of 1 trials .* no point to choose"):
        confirmation(study)
    with pytest.raises(InputError, match=r"0 of 1 trials .* run bdense-search launch first"):
        confirmed_arm(study)


# ---- the verdict ----


def test_the_winner_is_by_everything_measured_not_by_the_fresh_mean_alone(confirmed):
    """1.5 has the lower mean of three, but the search's values around speak for 1.25."""
    found = verdict(confirmed)
    means = {slope(r.arm): r.mean().mean for r in found.comparison.results[2:]}
    assert min(means, key=means.get) == 1.5
    assert slope(found.winner.arm) == 1.25
    assert confirmed_arm(confirmed) == found.winner.arm
    # What is said of it rests on the fresh seeds: -1.3, -1.9, -2.0 against plain, 11 its mean.
    assert found.winner.values == FRESH[1.25]
    pair = found.comparison.against(found.winner, found.comparison.baseline(PLAIN))
    assert (pair.mean, pair.relative) == pytest.approx((-5.2 / 3, -5.2 / 33))
    reach = 4.302653 * (0.43 / 3 / 3) ** 0.5  # variance (0.1878 + 0.0278 + 0.0711) / 2
    assert (pair.low, pair.high) == pytest.approx((-5.2 / 3 - reach, -5.2 / 3 + reach), rel=1e-5)
    for words in ("a 1.250 (trial 6)", "9.267", "-1.73 [-2.67, -0.79]", "-1.10 [-1.35, -0.85]"):
        assert words in found.sentence()


def test_the_verdict_for_scripts(confirmed):
    told = json.loads(command("confirm", "digits", "--json").out)
    assert told == verdict(confirmed).as_dict()
    assert (told["winner"]["trial"], told["kimg"], told["ended"]) == (6, 2.56, True)
    plain, uniform, ours, *_ = told["arms"]
    assert (plain["name"], plain["params"]) == ("plain SFD", {"method": "sfd"})
    assert (uniform["name"], uniform["params"]) == ("uniform weights", {"method": "uniform"})
    assert ours["fids"] == {"1": 9.7, "2": 8.6, "3": 9.5}
    assert ours["vs_uniform"]["mean"] == pytest.approx(-1.1)
    assert ours["vs_uniform"]["tie"] is False
    assert (ours["n"], ours["std_err"]) == (3, pytest.approx(0.338, abs=1e-3))
    assert ours["conditions"]["images"] == 256
    assert "vs_plain" not in plain
    assert json.loads(command("best", "digits", "--json").out)["confirmed"] == told


def test_a_search_of_another_method_is_confirmed(url):
    of = spec(of_kind("progressive", "search"))
    study = search(url, VALLEY, study=of)
    planned = confirmation(study, method={"updates": 20}, count=1)
    finish(planned, lambda arm, row: 10.0 - row.arm + row.seed / 8)
    found = verdict(study)
    assert (found.winner.arm.trial, found.comparison.stage) == (3, "00002")
    assert "against plain PD -19.5 %, -2.00" in found.sentence()
    told = found.as_dict()
    assert (told["method"], "kimg" in told) == ({"updates": 20}, False)
    assert told["arms"][0]["params"] == {"method": "progressive"}


def test_until_all_rows_have_ended_nothing_is_confirmed(planned):
    study = Study.open(planned.url, "digits")
    assert verdict(study) is None
    with pytest.raises(InputError, match="has no confirmed winner, only a best of n"):
        confirmed_arm(study)
    finish(planned, fresh, most=5)
    found = verdict(study)
    assert not found.ended
    assert found.sentence().startswith("confirmed so far at 2.56 kimg: a 1.250 (trial 6), ")
    assert "; against plain SFD -11.8 %, -1.30 [one seed], tie" in found.sentence()
    with pytest.raises(InputError, match="confirmation of study digits has not ended"):
        confirmed_arm(study)


def test_a_candidate_that_failed_under_a_seed_does_not_win_by_the_others(planned):
    finish(planned, fresh, most=2)
    claim = planned.given.claim(ROW_SPACE, None)
    planned.given.fail(claim, "diverged", "the loss is not finite", {})
    finish(planned, fresh)
    found = verdict(Study.open(planned.url, "digits"))
    assert found.ended
    assert slope(found.winner.arm) == 1.0
    assert 1.25 in {slope(result.arm) for result in found.comparison.results[2:]}


# ---- on the command line ----


def test_replicates_of_the_baselines_tell_how_small_a_difference_a_search_can_tell(url):
    """Their own seeds: fresh ones of a confirmation come after them. A failed one is told."""
    study = Study.create(url, spec(weights=NORMALISED, plan={"trials": 1, "replicates": 3}))
    assert study.spec.baseline_seeds == [0, 1, 2]
    assert fresh_seeds(study.spec, 3) == [3, 4, 5]
    gain = {0: 1.0, 1: 2.0, 2: 3.0}
    finish(study, lambda arm, row: 9.0 - gain[row.seed] * (arm.baseline == UNIFORM), most=5)
    claim = study.given.claim(ROW_SPACE, None)
    study.given.fail(claim, "diverged", "the loss is not finite", {})
    assert failures(study) == ["uniform weights, seed 2 failed, diverged: the loss is not finite"]
    assert {name: each.value for name, each in baselines_of(study).items()} == {
        PLAIN: 9.0,
        UNIFORM: 8.0,
    }
    told = json.loads(command("best", study.name, "--json").out)
    # Differences of -1 and -2: a standard deviation of 1 / sqrt(2), with one degree of freedom.
    assert told["noise"]["seeds"] == pytest.approx(0.5**0.5)
    assert told["noise"]["least_difference"] == pytest.approx(12.706 * 0.5**0.5, rel=1e-4)
    assert told["recommended"]["arm"] == PLAIN  # uniform weights lack a seed


def test_best_says_whether_a_winner_is_confirmed(confirmed, made, tmp_path):
    after = command("best", "digits").out
    assert verdict(confirmed).sentence() in after
    assert json.loads(command("best", "digits", "--json").out)["best"]["confirmed"] is True
    assert "not confirmed" not in after
    copy_storage(made / "searched.db", tmp_path / "study.db")
    before = command("best", "digits")
    assert "No winner is confirmed: bdense-search confirm digits" in before.out.splitlines()
    assert json.loads(command("best", "digits", "--json").out)["confirmed"] is None


def test_settings_that_the_method_does_not_have_are_refused_before_anything_is_planned(url):
    search(url, VALLEY, study=spec(of_kind("progressive", "search")))
    assert "method.kimg is unknown" in refused(
        command("confirm", "progressive-search", "--kimg", "5")
    )
    assert Study.open(url, "progressive-search").sibling("progressive-search.confirm") is None


def test_a_file_that_is_not_what_was_searched_is_refused(searched, tmp_path):
    path = write(tmp_path, changed(weights=NORMALISED, method__lr=1e-3))
    assert "(method.lr: 0.0005 stored, 0.001 given)" in refused(command("confirm", path))
