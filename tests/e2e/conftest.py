"""Places to run the command in; studies of one file share teacher and features."""

from pathlib import Path

import pytest

from tests.e2e.study import Workplace


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workplace(tmp_path, cache) -> Workplace:
    return Workplace(tmp_path, cache)
