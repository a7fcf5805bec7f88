"""Rows that another program put into a study of ours count in no result and break nothing."""

import contextlib
import json
import math
import warnings

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from search.spec.space import make_sampler, search_space
from search.storage.engine import open_storage
from search.storage.ledger import Done
from search.storage.own_study import BASELINES_SUFFIX
from search.study.arms import ROW_SPACE
from search.study.study import Study
from tests.contracts.scene import take
from tests.measured import VALLEY, command, refused, search
from tests.students import keep

VERBS = (["best"], ["status"], ["trials"], ["export", "--trial", "3"], ["report"], ["doctor"])
A = FloatDistribution(-10.0, 10.0)


def add_foreign(url: str) -> None:
    """What ``add_trial``, ``ask``, ``enqueue_trial`` and ``tell`` leave, in both studies."""
    storage = open_storage(url)
    own = optuna.load_study(study_name="digits", storage=storage)
    for value in (0.5, math.inf, -math.inf):
        own.add_trial(create_trial(value=value, params={"a": 9.0}, distributions={"a": A}))
    own.add_trial(create_trial(state=TrialState.FAIL))
    own.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.1}))
    other = {"params": {"a": "x"}, "distributions": {"a": CategoricalDistribution(["x"])}}
    with contextlib.suppress(ValueError):  # SQLite and PostgreSQL refuse another kind of a
        own.add_trial(create_trial(value=0.25, **other))
    own.ask()
    own.enqueue_trial({"a": "nonsense"})
    given = optuna.load_study(study_name=f"digits{BASELINES_SUFFIX}", storage=storage)
    given.add_trial(create_trial(value=0.5))
    given.ask()
    given.enqueue_trial({"a": 1.0})


@pytest.fixture
def study(either_url, tmp_path, monkeypatch) -> Study:
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    found = search(either_url, VALLEY)
    keep(found)
    return found


def test_foreign_rows(study, tmp_path):
    url, own = study.url, len(VALLEY)

    def shown(*verb: str) -> object:
        answer = command(*verb, "digits", "--json", "--storage", url)
        assert answer.status == 0, answer.err
        assert verb != ("trials",) or ("foreign" in answer.err) == bool(study.search.foreign())
        return json.loads(answer.out)

    before = [shown(verb) for verb in ("best", "status", "trials")]
    add_foreign(url)
    assert [shown(verb) for verb in ("best", "status", "trials")] == before
    assert len(study.search.foreign()) >= 6
    assert own in study.search.foreign()

    for verb, *options in VERBS:
        at = {"export": [str(tmp_path / "model")], "report": ["--out", str(tmp_path / "report")]}
        answer = command(verb, "digits", *at.get(verb, []), *options, "--storage", url)
        assert "Traceback" not in answer.err
        assert answer.status == (0 if verb != "doctor" else answer.status), answer
        if verb in ("status", "doctor", "trials"):
            said = answer.err if verb == "trials" else answer.out
            assert f"{own} (complete)" in said, verb
    line = refused(command("logs", "digits", str(own), "--storage", url))
    assert line.startswith(f"row {own} of digits is another program's")
    (listed,) = json.loads(command("list", "--json", "--storage", url).out)
    assert (listed["trials"]["complete"], listed["best_fid"]) == (own, min(v for _, v in VALLEY))


def test_a_search_goes_on_past_foreign_rows(study):
    """They take no part of the budget, no sampler sees them, and no worker takes one."""
    add_foreign(study.url)
    ledger, space = study.search, search_space(study.spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ledger.claim(space, lambda offset: make_sampler(study.spec, offset)) == Done()
        study.plan(study.arms, study.spec.baseline_seeds)
        assert ledger.counts().planned == len(VALLEY)
        ledger.change("budget", lambda budget: budget + 1)
        claim = take(ledger, space=space)
    foreign = set(ledger.foreign())
    assert claim.number not in foreign
    assert {trial.number for trial in ledger.study.get_trials(states=(TrialState.COMPLETE,))} == {
        *range(len(VALLEY))
    }
    assert -0.5 <= claim.params["a"] <= 3.0
    ledger.complete(claim, 10.0, {})
    assert ledger.counts().complete == len(VALLEY) + 1
    study.given.claim(ROW_SPACE, None)
    assert study.left() == 0
