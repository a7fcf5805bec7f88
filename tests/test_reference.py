"""The study file's reference page is made from the declarations."""

from search.spec.reference import page
from tests.goldens import ROOT


def test_the_tables_are_those_of_the_code():
    """Else put what `python -m search.spec.reference` prints below the line in docs/study.md."""
    _, _, tables = (ROOT / "docs/study.md").read_text().partition("\n---\n\n")
    assert tables == page()
