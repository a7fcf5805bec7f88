"""The study file's reference page is made from the declarations."""

import os

from tests.goldens import ROOT
from tests.study_reference import page

STUDY = ROOT / "docs/study.md"


def test_the_tables_are_those_of_the_code():
    """To renew the page: BDENSE_WRITE_DOCS=1 pytest tests/test_reference.py."""
    text, line, tables = STUDY.read_text().partition("\n---\n\n")
    if os.environ.get("BDENSE_WRITE_DOCS"):
        tables = page()
        STUDY.write_text(text + line + tables)
    assert tables == page()
