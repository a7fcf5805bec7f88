"""Studies of each kind with something to report, and how a test reads a page."""

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from search.report.overview import Overview
from search.spec.space import search_space
from search.spec.study import StudySpec
from search.storage.ledger import Claim, Ledger
from search.study.arms import ROW_SPACE
from search.study.folders import row_folder
from search.study.notes import attach_pictures
from search.study.study import Study
from tests.measured import created, finish, result, search
from tests.studies import LEARNED, METHODS, of_kind, spec

# Over a (and b), of two equal trials the earlier one is the best; and as learned weights.
POINTS = [({"a": a, "b": -1.0}, value) for a, value in ((1.0, 12.5), (0.5, 11.0), (2.0, 11.0))]
RULES = [
    ({"rule": rule, "strength": strength}, value)
    for rule, strength, value in (("uncertainty", 1.0, 12.0), ("gradient-norm", -0.5, 11.0))
]
SPECS: dict[str, StudySpec] = {}
# What is plotted of each kind of study.
PLOTS = {
    "sfd-search": "fid-over-a",
    "progressive-search": "fid-over-a",
    "learned-search": "fid-over-strength",
    "sfd-arms": "arms-0",
    "progressive-arms": "fid",
}


def spec_of(kind: str) -> StudySpec:
    """The spec of that kind of study."""
    if kind not in SPECS:
        method, _, plan = kind.partition("-")
        tree = of_kind(method if method in METHODS else "sfd", plan)
        weights = LEARNED if method == "learned" else {"name": "log-linear"}
        SPECS[kind] = spec(tree, name=kind, weights=weights)
    return SPECS[kind]


def reported(url: str, kind: str) -> Study:
    """A study with results, one of its rows failed; a search also with one pruned and running."""
    of = spec_of(kind)
    if not of.is_search:
        study = created(url, of)
        study.plan([dataclasses.replace(study.arms[0], name="given", params=POINTS[1][0])], [0, 1])
        finish(study, lambda arm, row: {"plain": 12.0, "uniform": 11.0}.get(arm.baseline, 10.0))
        study.plan(study.arms[:1], [7])
        fail(study.given, study.given.claim(ROW_SPACE, None))
        return study
    points = RULES if kind == "learned-search" else POINTS
    study = search(url, points, study=of, plain=12.5, uniform=13.28)
    plan = dataclasses.replace(of.search, trials=len(points) + 3)
    study = Study.create(url, dataclasses.replace(of, plan=plan))
    taken = [take(study, {**points[0][0], name: value}) for name, value in EXTRA[kind]]
    study.search.prune(taken[0], {})
    fail(study.search, taken[1])
    return study


EXTRA = {
    "sfd-search": [("a", 0.1), ("a", 2.9), ("a", -0.2)],
    "progressive-search": [("a", 0.1), ("a", 2.9), ("a", -0.2)],
    "learned-search": [("strength", 0.1), ("strength", 1.4), ("strength", -0.2)],
}


def take(study: Study, params: dict[str, object]) -> Claim:
    """A running trial of a search."""
    study.search.enqueue(params)
    claim = study.search.claim(search_space(study.spec), None)
    assert isinstance(claim, Claim)
    assert dict(claim.params) == params
    return claim


def fail(ledger: Ledger, claim: object) -> None:
    """Finish a claimed row without a result."""
    assert isinstance(claim, Claim)
    ledger.fail(claim, "diverged", "the loss is not finite at iteration 3", {})


def shown(study: Study, ledger: Ledger, claim: Claim, value: float, **changes: object) -> None:
    """Complete a row as a worker does, with a picture of its samples."""
    folder = row_folder(ledger.study.study_name, claim.number)
    folder.mkdir(parents=True)
    (folder / "samples.png").write_bytes(b"grid of %d" % claim.number)
    found = dataclasses.replace(result(study, ledger, claim, value), **changes)
    attach_pictures(ledger, claim, folder, found)
    ledger.complete(claim, value, found.attrs())


class Page(HTMLParser):
    """Texts of the cells of every table, addresses of every picture; no script may be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")
        if tag == "img":
            self.pictures.append(str(found["src"]))
        self.links += [str(found[name]) for name in ("href", "action", "data") if name in found]
        assert tag not in ("script", "iframe", "object", "link", "form")
        assert not [name for name in found if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self._in_cell and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False


def read_html(text: str) -> Page:
    """A page's contents."""
    page = Page()
    page.feed(text)
    return page


def is_plot(path: Path) -> bool:
    """Whether a file is a picture of the size that plots have."""
    with Image.open(path) as picture:
        return picture.size == (1050, 630)


def remarks(overview: Overview) -> list[str]:
    """All sentences on a result; the recommendation is a heading, and its reasons a line below."""
    found = overview.remarks()
    if (use := overview.recommended) is not None:
        found.remove(use.text())
        head, _, why = use.text().partition("; ")
        found += [head[0].upper() + head[1:], why]
    return found
