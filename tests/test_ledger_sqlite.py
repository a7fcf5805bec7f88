"""The ledger on SQLite: one machine, no server."""

from pathlib import Path

import pytest

from search.errors import UnknownStudyError
from search.storage.ledger import Ledger
from tests.contracts.ledger import LedgerContract


class TestLedgerOnSqlite(LedgerContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'made' / 'study.db'}"

    def test_looking_for_a_study_makes_no_file(self, url, tmp_path):
        with pytest.raises(UnknownStudyError, match="no study 'digits' in sqlite:///"):
            Ledger.open(url, "digits", budget=None)
        assert not (tmp_path / "made").exists()
