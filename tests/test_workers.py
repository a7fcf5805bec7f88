"""How a search's worker asks for rows, on a real ledger; nothing is trained."""

from types import SimpleNamespace

import pytest
from optuna.samplers import RandomSampler
from search.worker.workers import RetrainWorker, SearchWorker, pause_after

from bdense.errors import InputError
from search.errors import SpecChangedError, UnpreparedError
from search.spec.space import baseline_space, search_space
from search.storage.ledger import Claim, Ledger
from search.study.arms import PLAIN, UNIFORM, Planned, PlannedRow
from search.study.study import Study
from search.worker import workers
from tests.small import small_teacher
from tests.studies import spec


@pytest.fixture
def study(tmp_path) -> Study:
    return Study.create(f"sqlite:///{tmp_path}/study.db", spec(budget__trials=2))


@pytest.fixture
def worker(study, monkeypatch) -> SearchWorker:
    have_teacher(monkeypatch, small_teacher())
    return SearchWorker(study)


def have_teacher(monkeypatch, teacher) -> None:
    """What a machine's cache holds."""
    assets = SimpleNamespace(store=None, teacher=teacher)
    monkeypatch.setattr(workers, "load", lambda *_, **__: assets)


def test_baselines_that_have_ended_are_asked_for_no_more(study, worker, monkeypatch):
    for _ in range(2):
        claimed = worker.claim()
        assert claimed.ledger is study.baselines
        claimed.ledger.complete(claimed.claim, 1.0, {})
    asked = []
    claim = Ledger.claim

    def counted(ledger, *given):
        asked.append(ledger.study.study_name)
        return claim(ledger, *given)

    monkeypatch.setattr(Ledger, "claim", counted)
    for _ in range(2):
        claimed = worker.claim()
        claimed.ledger.complete(claimed.claim, 1.0, {})
    assert worker.claim() is None
    assert asked == ["digits.baselines", "digits", "digits", "digits"]


def test_a_baseline_that_runs_elsewhere_is_taken_over_once_it_is_given_back(
    study, worker, monkeypatch
):
    held = [study.baselines.claim(baseline_space(), None) for _ in range(2)]
    taken = [study.trials.claim(search_space(spec()), RandomSampler) for _ in range(2)]
    assert all(isinstance(each, Claim) for each in [*held, *taken])
    for claim in taken:
        study.trials.complete(claim, 1.0, {})
    pauses = []

    def give_back(seconds: float) -> None:
        pauses.append(seconds)
        study.baselines.release(held[0])

    monkeypatch.setattr(workers.time, "sleep", give_back)
    claimed = worker.claim()
    assert (claimed.ledger, claimed.claim.number) == (study.baselines, held[0].number)
    assert len(pauses) == 1


def test_a_machine_with_another_teacher_takes_no_part(study, worker, monkeypatch):
    assert SearchWorker(study).claim() is not None
    have_teacher(monkeypatch, small_teacher(dropout=0.1))
    with pytest.raises(SpecChangedError, match=r"has other weights .*all machines one BDENSE_"):
        SearchWorker(study)
    assert study.baselines.counts().running == 1


def test_a_machine_that_cannot_load_gives_the_row_back(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    url = f"sqlite:///{tmp_path}/study.db"
    planned = Planned.create(url, "digits.confirm", "retrain", spec(), facts={"of": "digits"})
    planned.plan(
        [PLAIN, UNIFORM], [PlannedRow(arm=arm, seed=1, kimg=2.56, nfe=2) for arm in range(2)]
    )

    def refuse(*_, **__):
        raise InputError("the data set is not mounted here")

    monkeypatch.setattr(workers, "load", refuse)
    worker = RetrainWorker(planned)
    with pytest.raises(UnpreparedError, match=r"^on \S+: the data set is not mounted here$"):
        worker.work(worker.claim())
    counts = planned.ledger.counts()
    assert (counts.failed, counts.running, planned.left()) == (0, 1, 2)
    # A better machine has it next, as its first try.
    again = worker.claim().claim
    assert (again.number, again.attempt, again.tries) == (0, 2, 1)


def test_who_waits_long_asks_more_seldom_and_not_all_at_once():
    for waited, least, most in (
        (0.0, 0.8, 1.2),
        (9.0, 0.8, 1.2),
        (30.0, 2.4, 3.6),
        (1e6, 4.0, 6.0),
    ):
        pauses = [pause_after(waited) for _ in range(200)]
        assert least <= min(pauses) < max(pauses) <= most
        assert len(set(pauses)) > 100
