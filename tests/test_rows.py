"""Trials read by SQL against Optuna's own list of them, on both databases."""

import math
from collections.abc import Iterator
from unittest.mock import ANY

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event

from benchmarks.large_study import fill
from search.errors import StorageError, UnknownStudyError
from search.spec.space import search_space
from search.storage.engine import open_storage
from search.storage.ledger import Claim, Ledger
from search.storage.queries import StoredTrial, asked_of
from search.storage.schema import Role, grant
from search.storage.tables import BEGUN, ENDED
from search.study.results import TrialResult
from search.study.study import Study
from search.study.summary import best_json, complete_trials, counts_json, failures, summary_of
from tests.contracts.scene import take
from tests.e2e.study import Workplace
from tests.measured import finish, normalised

DISTRIBUTIONS = {
    "a": FloatDistribution(-1.0, 3.0),
    "arm": IntDistribution(0, 10),
    "rule": CategoricalDistribution(("min-snr", 'quoted " \n', None, 3, True)),
    "fine": FloatDistribution(1e-9, 1.0, log=True),
}
OWN = {BEGUN: True, ENDED: True}  # marks of trials that are not foreign
# Values as the database has them in more than one way.
VALUES = (12.5, 11.0, 11.0, -0.0, 1e300, math.inf, -math.inf, 0.1 + 0.2)
ATTRIBUTES = (
    {},
    {"fid": {"value": 11.0, "seeds": {"training": 0}}, "weights": [0.1, 1.0, 7.4]},
    {"reason": "diverged", "error": "<b>'\"\\\n</b>", "none": None},
)


@pytest.fixture
def url(either_url) -> str:
    return either_url


def varied() -> Iterator[FrozenTrial]:
    """Trials in every state, with parameters of every kind, and of equal value."""
    for i in range(40):
        params = {"a": i / 11 - 1, "arm": i % 11, "fine": 10.0 ** -(i % 9)}
        params |= {"rule": DISTRIBUTIONS["rule"].choices[i % 5]}
        names = list(params)[: 1 + i % 4]
        state = list(TrialState)[i % 5]
        valued = state is TrialState.COMPLETE or (state is TrialState.PRUNED and i % 2)
        waits = state is TrialState.WAITING
        yield create_trial(
            state=state,
            value=VALUES[(i // 5) % len(VALUES)] if valued else None,
            params={} if waits else {name: params[name] for name in names},
            distributions={} if waits else {name: DISTRIBUTIONS[name] for name in names},
            user_attrs=ATTRIBUTES[i % 3],
            # What was planned, in a running or finished trial too.
            system_attrs=OWN | ({"fixed_params": {"a": i / 7 - 1}} if waits or i % 3 == 0 else {}),
            intermediate_values={1: 3.0, 2: 4.0} if i % 4 == 0 else {},
        )


@pytest.fixture
def ledger(url) -> Ledger:
    """A study of varied trials beside another one in one database, whose trials are between."""
    varied_study, other = (Ledger.open(url, name, budget=50) for name in ("varied", "other"))
    for trial in varied():
        varied_study.study.add_trial(trial)
        other.study.add_trial(create_trial(value=-1e301, system_attrs=OWN))
    return varied_study


def row_of(trial: FrozenTrial) -> StoredTrial:
    names = ("number", "value", "params", "user_attrs")
    return StoredTrial(**{name: getattr(trial, name) for name in names})


def test_trials_are_optunas(ledger):
    """Of each state, with all attributes, some, or as they were asked for; ranks of all values."""
    for state in TrialState:
        theirs = [row_of(t) for t in ledger.study.get_trials(states=(state,))]
        found = ledger.rows(state=state)
        assert found == theirs
        assert len(found) == 8
        assert [list(row.params) for row in found] == [list(row.params) for row in theirs]

    found = ledger.rows(("weights", "error", "no such"), state=TrialState.PRUNED)
    theirs = ledger.study.get_trials(states=(TrialState.PRUNED,))
    assert [row.user_attrs for row in found] == [
        {key: t.user_attrs[key] for key in ("weights", "error") if key in t.user_attrs}
        for t in theirs
    ]
    assert sorted(len(row.user_attrs) for row in found)[-1] == 1
    assert [row.params for row in found] == [t.params for t in theirs]

    complete = ledger.study.get_trials(states=(TrialState.COMPLETE,))
    ranked = [t.number for t in sorted(complete, key=lambda t: (t.value, t.number))]
    assert len(ranked) == 8
    for rank in (0, 1, 3, 7, 8, 20):
        for most in (0, 2, 100):
            expected = ranked[rank : rank + most]
            assert ledger.ranked_after(rank, most, also=-1) == expected
            last = {ranked[-1]} & set(ranked[rank:]) - set(expected)
            assert ledger.ranked_after(rank, most, also=ranked[-1]) == [*expected, *last]
    running = ledger.study.get_trials(states=(TrialState.RUNNING,))[0].number
    assert ledger.ranked_after(8, 5, also=running) == []

    trials = ledger.study.get_trials(deepcopy=False)
    asked = [(asked_of(trial), trial.user_attrs.get("reason")) for trial in trials]
    assert ledger._asked_and_why() == asked
    assert len(asked) == 40


def test_of_equal_values_the_first_is_best_and_a_pruned_one_never(url):
    ledger = Ledger.open(url, "digits", budget=5)
    assert ledger.best() is None
    ledger.study.add_trial(create_trial(state=TrialState.PRUNED, value=1.0, system_attrs=OWN))
    assert ledger.best() is None
    for value in (12.0, 11.0, math.nextafter(11.0, 12.0), 11.0):
        ledger.study.add_trial(create_trial(value=value, system_attrs=OWN))
    best = ledger.best()
    assert (best.number, best.value) == (2, 11.0)


@pytest.fixture
def study(url) -> Study:
    """A search of 60 trials as a search stores them, some of which failed, and its baselines."""
    of = normalised(plan__trials=100)
    study = Study.create(url, of)
    fill(study, open_storage(url), of, 50)
    for _ in range(3):
        claim = take(study.trials, space=search_space(of))
        study.trials.fail(claim, "diverged", "the loss is not finite", {})
    study.trials.prune(take(study.trials, space=search_space(of)), {})
    fill(study, open_storage(url), of, 10)
    finish(study, lambda *_: 13.0)
    return study


def test_what_is_shown_of_a_study_is_what_optuna_lists(study):
    trials = study.trials.study.get_trials()
    complete = [t for t in trials if t.state is TrialState.COMPLETE]
    best = min(complete, key=lambda t: (t.value, t.number))
    now = summary_of(study)
    assert list(counts_json(now.counts).values()) == [100, 60, 1, 3, 0]
    shown = best_json(now)["best"]
    assert (shown["number"], shown["fid"]) == (best.number, best.value)
    assert {key: shown[key] for key in ("a", "b", "weights", "student")} == {
        key: best.user_attrs[key] for key in ("a", "b", "weights", "student")
    }
    assert shown["a"] == best.params["a"]
    assert [(t.number, t.value) for t in complete_trials(study)] == [
        (t.number, t.value) for t in complete
    ]
    assert [each.value for each in now.baselines.values()] == [13.0, 13.0]
    assert [line.split(",")[0] for line in failures(study)] == [
        f"trial {t.number} failed" for t in trials if t.state is TrialState.FAIL
    ]


def test_parameters_of_any_weight_space_come_back():
    made = {"fingerprint": "f", "seeds": {}, "versions": {}, "timings": {}, "worker": "host:1"}
    # Another package's space may name its parameters as we name our fields.
    for parameters in ({"a": 0.5, "b": -1.0}, {"end": 3.0, "device": 2.0}):
        result = TrialResult(value=2.5, device="a CPU", parameters=parameters, **made)
        assert TrialResult.of(2.5, result.attrs()) == result


def test_looking_writes_nothing(url, study):
    looking = Study.open(url, "digits", reading=True)
    assert summary_of(looking) == summary_of(study)
    assert looking.trials.running() == study.trials.running()
    refused = (StorageError, StorageInternalError, sa.exc.SQLAlchemyError)
    with pytest.raises(refused):
        looking.trials.record_change("budget", 1, 2)
    with pytest.raises(refused):
        looking.given.study.set_user_attr("note", "mine")
    assert study.trials.study.user_attrs.keys() & {"note", "changes"} == set()


def test_a_study_that_is_not_there_is_not_looked_at(url, study, tmp_path):
    with pytest.raises(UnknownStudyError, match=r"no study 'other'.*there: digits;"):
        Study.open(url, "other", reading=True)
    with pytest.raises(UnknownStudyError, match="no study 'other'"):
        study.trials.sibling("other")
    optuna.create_study(study_name="foreign", storage=open_storage(url))
    with pytest.raises(UnknownStudyError, match="'foreign' was not made by bdense-search"):
        Study.open(url, "foreign", reading=True)
    missing = tmp_path / "missing.db"
    with pytest.raises(UnknownStudyError, match="no study is there"):
        Study.open(f"sqlite:///{missing}", "digits", reading=True)
    assert not missing.exists()


@pytest.mark.postgres
def test_who_may_only_read_sees_status_and_best(postgres, tmp_path):
    url = postgres.new_database()
    of = normalised(plan__trials=100)
    study = Study.create(url, of)
    fill(study, open_storage(url), of, 5)
    grant(url, [Role(name="looker", access="read-only")])
    looker = Workplace(tmp_path, tmp_path, postgres.url(sa.make_url(url).database, user="looker"))
    shown = {}
    for verb in ("status", "best"):
        shown[verb] = looker.json(verb, "digits")
    assert shown["status"]["trials"]["complete"] == 5
    told = best_json(summary_of(study)) | {"storage": ANY}
    assert told.items() <= shown["best"].items()


@pytest.mark.postgres
def test_a_first_claim_reads_the_study_before_it_locks_it(postgres):
    """Under the lock all others would wait for the seconds that 10,000 trials take."""
    url = postgres.new_database()
    of = normalised(plan__trials=100)
    fill(Study.create(url, of), open_storage(url), of, 20)
    ledger = Ledger.open(url, "digits", budget=None)
    statements: list[tuple[str, int]] = []

    @event.listens_for(ledger.storage.engine, "after_cursor_execute")
    def note(connection, cursor, statement, *_) -> None:
        statements.append((statement, cursor.rowcount))

    assert isinstance(take(ledger, space=search_space(of)), Claim)
    locked = next(i for i, (text, _) in enumerate(statements) if "advisory" in text)
    reads = [(i, rows) for i, (text, rows) in enumerate(statements) if "FROM trial_params" in text]
    assert [rows for i, rows in reads if i < locked] == [20]
    assert max(rows for i, rows in reads if i > locked) <= 1
