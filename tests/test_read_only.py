"""A finished study can be looked at by somebody who may only read its folder."""

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.report.overview import overview_of
from search.study.study import Study
from search.study.summary import headline, summary_of
from tests.reported import reported

NOBODY = 65534


@pytest.fixture
def shared(monkeypatch) -> Iterator[Path]:
    """A folder that others may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.chdir(folder)
        yield folder
        folder.chmod(0o755)


def look(url: str, answers: "multiprocessing.Queue[object]") -> None:
    """Everything that only reads, as another user."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    try:
        study = Study.open(url, "sfd-search", reading=True)
        best = summary_of(study).best
        assert best is not None
        answers.put(
            (headline(study), study.search.counts(), best.value, overview_of(study).table())
        )
    except Exception as error:
        answers.put(error)
        raise


@pytest.mark.skipif(os.getuid() != 0, reason="only root may act as another user")
def test_a_study_is_read_where_nothing_may_be_written(shared):
    url = f"sqlite:///{shared}/studies.db"
    study = reported(url, "sfd-search")
    best = summary_of(study).best
    assert best is not None
    expected = (headline(study), study.search.counts(), best.value, overview_of(study).table())
    study.search.storage.engine.dispose()
    del study
    gc.collect()
    for path in shared.iterdir():
        path.chmod(0o444)
    shared.chmod(0o555)
    forked = multiprocessing.get_context("fork")
    answers = forked.Queue()
    process = forked.Process(target=look, args=(url, answers))
    process.start()
    assert answers.get(timeout=60) == expected
    process.join()
