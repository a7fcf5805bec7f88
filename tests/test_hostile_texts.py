"""Texts in the database are not trusted: they stay text, and files stay in their folder.

A study's name, a value of its spec, attributes of trials, a failure's message, an arm's name.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from wsgiref.simple_server import make_server

import pytest
from optuna_dashboard import get_note

from bdense.errors import InputError
from bdense.metrics.records import FID
from search.report.dashboard import HOST, _QuietHandler, _Server, dashboard_application
from search.report.document import Table, as_html
from search.report.live import write_note
from search.report.report_files import write_report
from search.spec.study import StudySpec
from search.storage.engine import open_reading
from search.storage.ledger import Claim, Ledger
from search.study.arms import ROW_SPACE, Arm
from search.study.folders import named_file, row_folder
from search.study.markdown import escaped, fenced, markdown_table
from search.study.study import FINGERPRINT, SPEC, Study
from tests.measured import created, fid, finish, open_once, search
from tests.reported import POINTS, fail, read_html, shown, spec_of, take

RUN = "document.documentElement.setAttribute('data-ran','yes')"
SCRIPT = f"<script>{RUN}</script>"
PICTURE = f'"><img src=x onerror="{RUN}">'
LINK = f"[here](javascript:{RUN}) ![x](https://example.org/x.png) <https://example.org>"
FENCE = f"```\n\n{SCRIPT}\n\n````\n{PICTURE}"
LINES = f"one\ntwo\r\n# {SCRIPT}\n| a | b |"
NAME = f"mine'{PICTURE}&lt;`$x$`"  # no slash: such a study has no folder, see below


@dataclasses.dataclass
class Scene:
    """A study whose every text is hostile, its report and where its files may lie."""

    study: Study
    folder: Path
    pictures: list[str]

    @property
    def page(self) -> str:
        return (self.folder / "shown/report.html").read_text()

    def outside(self, text: str) -> str:
        """Markdown without its blocks of code."""
        return re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module", params=["sfd-search", "progressive-arms"])
def scene(request, tmp_path_factory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDENSE_RUNS", str(folder / "runs"))
        patch.delenv("BDENSE_ARTIFACTS", raising=False)
        open_once(patch)
        of = dataclasses.replace(spec_of(request.param), name=NAME)
        make = hostile_search if of.is_search else hostile_arms
        study = make(f"sqlite:///{folder / 'study.db'}", of)
        evil = study.spec.as_dict() | {"data": SCRIPT + FENCE}
        study.main.study.set_user_attr(SPEC, json.dumps(evil))
        study.main.study.set_user_attr(FINGERPRINT, PICTURE)
        study.main.record_change(f"budget{SCRIPT}", PICTURE, LINES)
        write_note(study)
        write_report(study, folder / "shown")
        plots = ["fid-over-a.png", "samples-best.png"] if of.is_search else ["fid.png"]
        yield Scene(study, folder, [*plots, *([] if of.is_search else ["samples-0.png"])])


def hostile_search(url: str, of: StudySpec) -> Study:
    study = created(url, of)
    finish(study, lambda arm, row: 13.0)
    tell(study, study.search, take(study, POINTS[1][0]))
    failing = take(study, POINTS[2][0])
    study.search.fail(failing, "error", f"{SCRIPT}{LINK}{LINES}{FENCE}", {})
    return study


def hostile_arms(url: str, of: StudySpec) -> Study:
    study = Study.create(url, of, of=SCRIPT + LINES)
    study.plan([Arm(name=PICTURE + LINES, params=POINTS[1][0])], [1, 2])
    tell(study, study.given, study.given.claim(ROW_SPACE, None), arm=LINES + SCRIPT)
    fail(study.given, study.given.claim(ROW_SPACE, None))
    return study


def tell(study: Study, ledger: Ledger, claim: Claim, **changes: object) -> None:
    """Complete it as a worker of theirs would."""
    theirs = {"extractor": SCRIPT, "reference": PICTURE}
    measured = FID.read(fid(11.0, training=0, evaluation=0) | theirs)
    if len(study.spec.resolved.stages) > 1:
        changes |= {"fids": {"4": measured, "2": measured}, "teacher_fid": measured}
    changes |= {"fid": measured, "student": "../../etc/passwd", "worker": PICTURE}
    shown(study, ledger, claim, 11.0, **changes)


def test_the_html_report_has_no_tag_but_its_own(scene):
    """The parser refuses scripts and handlers; what they were is there as text."""
    found = read_html(scene.page)
    assert NAME in found.text
    assert SCRIPT in found.text
    assert RUN in found.text
    assert found.links == []
    assert all(each.startswith("data:image/png;base64,") for each in found.pictures)


def test_the_markdown_has_no_tag_link_or_picture_of_theirs(scene):
    outside = scene.outside((scene.folder / "shown/report.md").read_text())
    assert re.findall(r"(?<!\\)!\[.*?\]\((.*?)\)", outside) == scene.pictures
    assert not re.search(r"(?<!\\)<", outside)


def test_the_notes_hold_them_as_words(scene):
    note = get_note(scene.study.main.study)
    outside = scene.outside(note)
    assert "\\<script\\>" in outside
    assert not re.search(r"(?<!\\)<", outside)
    # The only pictures are the dashboard's own.
    assert re.findall(r"(?<!\\)\]\((.*?)\)", outside) == re.findall(
        r"/artifacts/\d+/\d+/[0-9a-f-]{36}", outside
    )
    # The spec's block ends where we end it.
    (block,) = re.findall(r"^(`{3,})yaml\n(.*?)^\1$", note, flags=re.DOTALL | re.MULTILINE)
    assert "document.documentElement" in block[1]
    assert len(block[0]) > 4


def test_nothing_lies_outside_the_folders_that_were_asked_for(scene):
    below = {path.relative_to(scene.folder).parts[0] for path in scene.folder.rglob("*")}
    assert below <= {"runs", "shown", "study.db", "study.db.lock", "study.db-wal", "study.db-shm"}
    written = {path.name for path in (scene.folder / "shown").iterdir()}
    assert written == {"report.md", "report.html", *scene.pictures}
    runs = {path.name for path in (scene.folder / "runs").iterdir()}
    assert runs == {NAME, "artifacts"}


def test_no_name_leads_out_of_the_runs(monkeypatch):
    for name in ("../escaped", "a/../../b", "..", ".", "", "/etc", "a\\b", "a\0b"):
        with pytest.raises(InputError, match="has no folder of its own under the runs"):
            row_folder(name, 0)
    for file in ("../../etc", "/etc/passwd", "digits/../../etc", "a/b/c/d", "student", "a/b/\0"):
        with pytest.raises(InputError, match="not one of its own"):
            named_file(file)
    monkeypatch.setenv("BDENSE_RUNS", "/runs")
    assert named_file("digits/00001/x.safetensors") == Path("/runs/digits/00001/x.safetensors")


def test_a_study_of_such_a_name_has_no_report(url, tmp_path):
    secret = tmp_path / "other" / "00000" / "samples.png"
    secret.parent.mkdir(parents=True)
    secret.write_bytes(b"somebody else's")
    (tmp_path / "runs").mkdir()
    of = dataclasses.replace(spec_of("sfd-search"), name="../other")
    with pytest.raises(InputError, match="has no folder of its own"):
        write_report(search(url, POINTS, study=of), tmp_path / "shown")
    assert not list(tmp_path.rglob("samples-best.png"))


@pytest.mark.parametrize("text", [SCRIPT, PICTURE, LINK, FENCE, LINES, NAME])
def test_escaped_words_are_one_line_without_meaning(text):
    line = escaped(text)
    assert "\n" not in line
    assert not re.search(r"(?<!\\)[<>\[\]`|*_$]", line.replace("\\\\", ""))
    assert markdown_table([["x"], [text]]).count("\n") == 2
    rows = read_html(as_html(text, [Table([["x"], [text]])], Path())).rows
    assert [" ".join(cell.split()) for row in rows for cell in row] == [
        "x",
        " ".join(text.split()),
    ]


@pytest.mark.parametrize(
    "text",
    ["see https://example.org/x", "HTTP://example.org", "www.example.org", "me@example.org"],
)
def test_bare_addresses_become_no_links(text):
    """By the patterns of GFM's readers, of which some look once marks were taken away."""
    line = escaped(text)
    assert not re.search(r"https?://|www\.|[-.\w+]@", line, re.IGNORECASE)
    assert line.replace("\u2060", "").replace("\\", "") == text


@pytest.mark.parametrize("inside", ["plain", "```", "`````\n# out\n```", "``"])
def test_a_block_is_not_left_from_inside(inside):
    first, *lines, last = fenced(inside, "yaml").split("\n")
    assert lines == inside.splitlines()
    assert first == last + "yaml"
    assert len(last) >= 3
    assert not any(line.startswith(last) for line in lines)


# ---- a real browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def in_browser(address: str, profile: Path) -> str:
    """The page as it is after its scripts have run, for some virtual seconds."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom"]
    command = [str(CHROMIUM), *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def ran(page: str) -> bool:
    return re.search(r"<html[^>]*data-ran", page) is not None


@pytest.fixture(scope="module")
def _browser_runs_scripts(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("control")
    for evil in (SCRIPT, PICTURE):
        (folder / "x.html").write_text(f"<!DOCTYPE html><html><body>{evil}</body></html>")
        assert ran(in_browser(f"file://{folder}/x.html", folder / "profile"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium in PATH")
@pytest.mark.usefixtures("_browser_runs_scripts")
def test_nothing_runs_in_a_real_browser(scene, tmp_path):
    page = in_browser(f"file://{scene.folder}/shown/report.html", tmp_path / "profile")
    assert not ran(page)
    assert "&lt;script&gt;document.documentElement" in page
    application = dashboard_application(open_reading(scene.study.url), writable=False)
    key = scene.study.main.storage.get_study_id_from_name(NAME)
    with make_server(HOST, 0, application, _Server, _QuietHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://{HOST}:{server.server_port}/dashboard"
        study = f"{base}/studies/{key}"
        shown = {
            base: "mine'",
            study: "mine'",
            f"{study}/note": "document.documentElement",
            f"{study}/trials?numbers=0": "0.5",
            f"{study}/trials?numbers=1": "document.documentElement",
        }
        for address, text in shown.items():
            page = in_browser(address, tmp_path / "profile")
            assert not ran(page), address
            assert text in page, address  # it was drawn at all
        server.shutdown()
