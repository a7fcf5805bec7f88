"""Metrics of real studies, read back by the parser of Prometheus's own library."""

import math
from collections.abc import Iterator

import optuna
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.large_study import fill
from search.report.dashboard import dashboard_application
from search.report.prometheus import mount
from search.spec.space import search_space
from search.storage.engine import open_reading, open_storage, sqlite_file
from search.storage.ledger import Ledger
from search.storage.own_study import BASELINES_SUFFIX
from search.storage.tables import ENDED, OUT_OF_BOUNDS
from search.study.catalogue import list_studies
from search.study.study import Study
from tests.contracts.scene import take
from tests.measured import created, finish
from tests.pages import answer_of
from tests.studies import NORMALISED, of_kind, spec

SPACE = search_space(spec())
# What a label has to escape, and what would be a line of its own.
AWKWARD = 'quoted " back\\slash\nbdense_best_fid{study="forged"} 0'


def get(application, path: str = "/metrics", method: str = "GET") -> tuple[int, dict, str]:
    """Status, headers and text of one request."""
    status, headers, content = answer_of(application, method, path)
    return status, headers, content.decode()


def elsewhere(environ, start_response) -> Iterator[bytes]:
    start_response("418 teapot", [])
    return iter([environ["PATH_INFO"].encode()])


def samples(url: str) -> dict[tuple[str, ...], float]:
    """(metric, study, other label) -> value, as a scraper reads them."""
    status, headers, text = get(mount(elsewhere, open_reading(url)))
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type == "gauge"
        for sample in family.samples:
            labels = dict(sample.labels)
            key = (sample.name.removeprefix("bdense_"), labels.pop("study"), *labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def of_study(found: dict, name: str) -> dict[tuple[str, ...], float]:
    return {(key[0], *key[2:]): value for key, value in found.items() if key[1] == name}


def test_every_state_and_figure_of_a_search(either_url):
    study = Study.create(either_url, spec(plan__trials=20))
    trials = study.search
    for value in (12.5, 11.25, 14.0):
        trials.complete(take(trials), value, {})
    trials.prune(take(trials), {})
    for _ in range(2):
        trials.fail(take(trials), "error", "no such file", {})
    # Counted nowhere.
    out = trials.study.ask(fixed_distributions=dict(SPACE))
    out.set_user_attr(OUT_OF_BOUNDS, True)
    trials.study.tell(out, state=optuna.trial.TrialState.PRUNED)
    running = [take(trials) for _ in range(3)]
    trials.release(running[0])
    for a in (0.25, 0.5, 0.75, 1.0):
        trials.enqueue({"a": a, "b": -1.0})
    finish(study, lambda arm, row: 13.5, most=1)

    found = samples(either_url)
    own = of_study(found, "digits")
    lease, since = own.pop(("oldest_lease_seconds",)), own.pop(("seconds_since_completion",))
    assert 0.0 <= lease < 60.0
    assert 0.0 <= since < 60.0
    assert own == {
        ("trials_planned",): 20,
        ("trials", "complete"): 3,
        ("trials", "pruned"): 1,
        ("trials", "failed"): 2,
        ("trials", "running"): 3,
        ("trials", "waiting"): 4,
        ("best_fid",): 11.25,
        ("baseline_fid", "plain"): 13.5,
        ("leases_overdue",): 0,
    }
    theirs = of_study(found, "digits.baselines")
    assert theirs[("trials", "complete")] == theirs[("trials", "waiting")] == 1
    assert ("best_fid",) not in theirs
    counts = trials.counts()
    assert (counts.planned, counts.complete, counts.running) == (20, 3, 3)


def test_of_replicates_the_one_under_the_trials_seed_is_shown(url):
    study = Study.create(url, spec(plan__replicates=3))
    finish(study, lambda arm, row: 10.0 + row.seed)
    own = of_study(samples(url), "digits")
    shown = {key[1]: value for key, value in own.items() if key[0] == "baseline_fid"}
    assert shown == {"plain": 10.0, "uniform": 10.0}


def test_a_lease_that_was_not_renewed_is_overdue(either_url):
    ledger = Ledger.open(either_url, "digits", budget=2, ttl=60)
    take(ledger)
    assert of_study(samples(either_url), "digits")[("leases_overdue",)] == 0
    with ledger.storage.engine.begin() as connection:
        connection.execute(sa.text("UPDATE bdense_lease SET expires = expires - 100"))
    assert of_study(samples(either_url), "digits")[("leases_overdue",)] == 1


def test_an_empty_database_and_an_empty_study(either_url):
    with_others = open_storage(either_url)
    Ledger.open(either_url, "digits", budget=4)
    optuna.create_study(study_name="foreign", storage=with_others).ask()
    # Baselines of an older form are left out until they are upgraded.
    old = Ledger.open(either_url, f"digits{BASELINES_SUFFIX}", budget=1)
    old.complete(take(old), 10.0, {})
    found = samples(either_url)
    assert {key[1] for key in found} == {"digits", "digits.baselines"}
    assert not [key for key in found if key[0] == "baseline_fid"]
    assert {key[0]: value for key, value in of_study(found, "digits").items() if value} == {
        "trials_planned": 4
    }


def test_a_database_of_optuna_alone_is_said_to_be_one(either_new_url):
    storage = open_storage(either_new_url)
    optuna.create_study(study_name="theirs", storage=storage).ask()
    application = mount(lambda *_: [], storage)
    status, _, said = answer_of(application, "GET", "/metrics")
    assert (status, b"no study" in said) == (404, True)
    assert list_studies(either_new_url) == []


@pytest.mark.parametrize("method", ["sfd", "progressive"])
def test_values_of_given_arms_are_no_best(url, method):
    study = created(url, spec(of_kind(method, "arms")))
    finish(study, lambda arm, row: 10.0)
    own = of_study(samples(url), study.name)
    assert own[("trials", "complete")] == 4
    assert ("best_fid",) not in own


def test_an_infinite_value_is_not_the_best(either_url):
    ledger = Ledger.open(either_url, "digits", budget=3)
    for value in (-math.inf, 12.0):
        own = {ENDED: True}
        ledger.study.add_trial(optuna.trial.create_trial(value=value, system_attrs=own))
    assert of_study(samples(either_url), "digits")[("best_fid",)] == 12.0


def test_a_name_stays_in_its_label(url):
    ledger = Ledger.open(url, AWKWARD, budget=1)
    ledger.complete(take(ledger), 10.0, {})
    found = samples(url)
    assert {key[1] for key in found} == {AWKWARD}
    assert of_study(found, AWKWARD)[("best_fid",)] == 10.0


def test_only_its_own_path_is_answered_and_only_read(url):
    Ledger.open(url, "digits", budget=1)
    application = mount(elsewhere, open_reading(url))
    assert get(application, "/metrics/x") == (418, {}, "/metrics/x")
    assert get(application, method="POST")[0] == 405
    # The dashboard has it, read-only and with its headers.
    dashboard = dashboard_application(open_reading(url), writable=False)
    status, headers, text = get(dashboard)
    assert (status, headers["x-content-type-options"]) == (200, "nosniff")
    assert 'bdense_trials_planned{study="digits"} 1.0' in text.splitlines()


@pytest.mark.postgres
def test_a_database_that_is_away_is_said_so_and_no_more(postgres):
    url = postgres.new_database()
    Ledger.open(url, "digits", budget=1)
    application = mount(elsewhere, open_reading(url))
    assert get(application)[0] == 200
    postgres.control("stop", "-m", "immediate")
    try:
        away = get(application)
    finally:
        postgres.control("start")
    assert (away[0], away[2]) == (503, "the study database does not answer\n")
    assert get(application)[0] == 200


def test_a_sqlite_file_that_is_deleted_is_away_and_is_not_made_anew(sqlite_url):
    Ledger.open(sqlite_url, "digits", budget=1)
    application = mount(elsewhere, open_reading(sqlite_url))
    sqlite_file(sqlite_url).unlink()
    assert get(application)[0] == 503
    assert not sqlite_file(sqlite_url).exists()


def test_a_scrape_asks_as_often_however_many_trials_there_are(either_url):
    of = spec(weights=NORMALISED, plan__trials=1000)
    study, storage, asked = Study.create(either_url, of), open_reading(either_url), []
    sa.event.listen(storage.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    application, times = mount(elsewhere, storage), []
    for count in (10, 300):
        fill(study, open_storage(either_url), of, count)
        asked.clear()
        _, _, text = get(application)
        times.append(len(asked))
    assert times[0] == times[1] > 0
    assert 'bdense_trials{state="complete",study="digits"} 310.0' in text.splitlines()
