"""The ledger on SQLite: one machine, no server."""

import pytest
from optuna.samplers import RandomSampler

from search.errors import StorageRefusedError, UnknownStudyError
from search.storage import leases
from search.storage.engine import sqlite_file
from search.storage.ledger import Ledger, Wait
from tests.contracts.ledger import LedgerContract
from tests.contracts.ledger_worker import SPACE
from tests.contracts.scene import complete, take, wait_until
from tests.measured import open_unchecked


class TestLedgerOnSqlite(LedgerContract):
    @pytest.fixture
    def url(self, sqlite_url, monkeypatch) -> str:
        open_unchecked(monkeypatch)
        return sqlite_url

    def test_looking_for_a_study_makes_no_file(self, tmp_path):
        with pytest.raises(UnknownStudyError, match="no study 'digits' in sqlite:///"):
            Ledger.open(f"sqlite:///{tmp_path / 'made' / 'study.db'}", "digits", budget=None)
        assert not (tmp_path / "made").exists()

    def test_a_clock_set_ahead_ends_no_lease(self, scene, monkeypatch):
        ledger = scene.open(budget=1)
        claim = take(ledger)
        monkeypatch.setattr(leases, "_WALL", leases._WALL + 7200)
        assert scene.open().claim(SPACE, RandomSampler) == Wait()
        (running,) = scene.open().running()
        assert (running.attempt, running.seconds < 60) == (1, True)
        complete(ledger, claim)

    @pytest.mark.parametrize("replaced", [False, True])
    def test_a_database_that_is_gone_ends_the_work(self, scene, url, tmp_path, replaced):
        ledger = scene.open(budget=2)
        claim, reader = take(ledger), Ledger.open_reading(url, ledger.name)
        path = sqlite_file(url)
        path.rename(tmp_path / "away")
        if replaced:
            path.write_bytes((tmp_path / "away").read_bytes())
        with ledger.holding(claim) as held:
            held.report("step 1")
            with pytest.raises(StorageRefusedError, match=str(path)):
                wait_until(lambda: held.check() is not None)
        for call in (lambda: ledger.complete(claim, 1.0, {}), ledger.counts, reader.counts):
            with pytest.raises(StorageRefusedError, match=str(path)):
                call()
        assert path.exists() == replaced
        # A connection of another thread must not make it anew, and empty.
        for each in (ledger, reader):
            each.storage.engine.dispose()
            with pytest.raises(StorageRefusedError, match=str(path)):
                each.counts()
            assert path.exists() == replaced
