"""``bdense-search list``: the studies of a storage, a line each."""

import json
from datetime import UTC, datetime

import optuna
import pytest

from search import cli
from search.storage.engine import open_reading, open_storage
from search.storage.ledger import Ledger
from search.storage.own_study import BASELINES_SUFFIX
from search.storage.studies import read_studies
from search.study.study import ARMS, SPEC
from tests.contracts.scene import take


@pytest.fixture
def url(either_url) -> str:
    return either_url


def fill(url: str) -> None:
    """A search under way with its baselines, a promotion, a half-made study, a stranger's."""
    search = Ledger.open(url, "digits", budget=5)
    search.study.set_user_attr(SPEC, json.dumps({"method": {"name": "sfd"}}))
    for value in (3.5, 2.25):
        search.complete(take(search), value, {})
    search.fail(take(search), "diverged", "loss inf", {})
    take(search)
    Ledger.open(url, f"digits{BASELINES_SUFFIX}", budget=2)
    promotion = Ledger.open(url, "chain", budget=6)
    promotion.study.set_user_attr(ARMS, [])
    promotion.study.set_user_attr(SPEC, json.dumps({"method": {"name": "progressive"}}))
    Ledger.open(url, "new", budget=1)
    stranger = optuna.create_study(study_name="stranger", storage=open_storage(url))
    stranger.tell(stranger.ask(), 1.0)


def run(url: str, capsys, *options: str) -> str:
    assert cli.main(["list", "--storage", url, *options]) == 0
    return capsys.readouterr().out


def test_each_study_with_its_counts_and_lowest_fid(url, capsys):
    before = datetime.now(UTC).replace(microsecond=0)
    fill(url)
    chain, digits, new = json.loads(run(url, capsys, "--json"))
    assert digits | {"started": None, "changed": None} == {
        "study": "digits",
        "kind": "search",
        "method": "sfd",
        "trials": {"planned": 5, "complete": 2, "pruned": 0, "failed": 1, "running": 1},
        "best_fid": 2.25,
        "started": None,
        "changed": None,
    }
    started, changed = (datetime.fromisoformat(digits[key]) for key in ("started", "changed"))
    assert before <= started <= changed <= datetime.now(UTC)
    assert [chain[key] for key in ("study", "kind", "method")] == ["chain", "arms", "progressive"]
    assert (chain["best_fid"], chain["started"], chain["changed"]) == (None, None, None)
    assert (new["study"], new["method"], new["trials"]["planned"]) == ("new", None, 1)


def test_a_line_for_people(url, capsys):
    fill(url)
    for study in read_studies(open_reading(url).engine):  # counts are those of status
        assert study.counts == Ledger.open(url, study.name, budget=None).counts()
    header, *lines = run(url, capsys).splitlines()
    assert [line.split()[0] for line in lines] == ["chain", "digits", "new"]
    assert lines[1].split()[1:8] == ["search", "sfd", "2/5", "1", "1", "FID", "2.250"]
    assert lines[2].split()[1:] == ["search", "-", "0/1", "0", "0", "-", "-"]
    assert header.split()[:3] == ["study", "kind", "method"]


def test_a_storage_without_studies(tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'none.db'}"
    assert "no studies" in run(url, capsys)
    assert json.loads(run(url, capsys, "--json")) == []
    assert not (tmp_path / "none.db").exists()
