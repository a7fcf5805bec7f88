"""Where a study stands and what is reported of it, for every kind of study."""

import base64
import dataclasses
import json
import re

import pytest

from bdense.errors import InputError
from search.analysis.plans import plan_confirmation
from search.report.overview import overview_of
from search.report.report_files import write_report
from search.study.markdown import escaped
from search.study.summary import copy_baselines, failures, headline, summary_of, table
from search.study.wording import duration
from tests.goldens import ROOT
from tests.measured import command, created, finish, result, search
from tests.reported import (
    PLOTS,
    POINTS,
    RULES,
    is_plot,
    read_html,
    remarks,
    reported,
    spec_of,
    take,
)

# What commit 3f7be1a printed of a database that it made, but for the storage's URL.
BEFORE = json.loads((ROOT / "tests/data/version-3f7be1a/expected.json").read_text())
each_kind = pytest.mark.parametrize("kind", PLOTS)


def shape(value):
    """Keys all the way down, in place of what they lead to."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else None


def printed(*arguments: str) -> dict:
    answer = command(*arguments, "--json")
    assert answer.status == 0, answer.err
    return json.loads(answer.out)


# ---- for scripts ----


def test_best_and_status_have_the_keys_that_they_had(url):
    """Of a search of SFD, confirmed, as it was when both were promised to stay."""
    study = search(url, POINTS, study=spec_of("sfd-search"))
    finish(plan_confirmation(study, method={}, seeds=3, count=1), lambda arm, row: 9.0 + row.seed)
    told, before = printed("best", "sfd-search"), BEFORE["best"]["small"]
    assert told.pop("storage") == url
    assert (told.pop("noise")["seeds"], told.pop("recommended")["arm"]) == (None, "plain")
    assert shape(told) == shape(before)
    assert list(told) == list(before)
    assert [arm["params"] for arm in told["confirmed"]["arms"][:2]] == [
        arm["params"] for arm in before["confirmed"]["arms"][:2]
    ]
    assert shape(printed("status", "sfd-search")) == shape(BEFORE["status"]["small"])


def test_best_of_learned_weights_has_them_too(url):
    """No (a, b), which they do not have, and no memory, which is the study's."""
    study = created(url, spec_of("learned-search"))
    finish(study, lambda arm, row: 12.0)
    for params, value in RULES:
        claim = take(study, params)
        plot = f"learned-search/{claim.number:05d}/weights.png"
        found = dataclasses.replace(result(study, study.search, claim, value), weights_plot=plot)
        study.search.complete(claim, value, found.attrs())
    told = printed("best", "learned-search")
    assert {key: told["best"][key] for key in ("rule", "strength", "weights_plot")} == {
        "rule": "gradient-norm",
        "strength": -0.5,
        "weights_plot": "learned-search/00001/weights.png",
    }
    for name in ("storage", "noise", "recommended"):
        del told[name]
    assert shape(told) == shape(BEFORE["best"]["learned"])


@pytest.mark.parametrize("method", ["sfd", "progressive"])
def test_best_of_a_search_in_numbers(url, method):
    """Of two equal trials the earlier one; baselines count in none of the search's figures."""
    kind = f"{method}-search"
    reported(url, kind)
    told = printed("best", kind)
    counts = {"planned": 6, "complete": 3, "pruned": 1, "failed": 1, "running": 1}
    assert told["trials"] == printed("status", kind)["trials"] == counts
    best = told["best"]
    assert (best["number"], best["a"], best["b"], best["fid"]) == (1, 0.5, -1.0, 11.0)
    assert best["seeds"] == {"training": 0, "evaluation": 0}
    assert {name: each["fid"] for name, each in told["baselines"].items()} == {
        method: 12.5,
        "uniform": 13.28,
    }
    assert told["baselines"][method]["weights"] == [1.0]


def test_best_of_nothing(url):
    study = created(url, spec_of("sfd-search"))
    assert " ".join(table(summary_of(study)).split()) == "FID vs plain SFD a b w_1 .. w_K"
    told = printed("best", "sfd-search")
    assert (told["best"], told["baselines"], told["confirmed"]) == (None, {}, None)
    assert told["recommended"] is None
    assert "no trial is complete yet\n" in command("best", "sfd-search").out


# ---- for people ----


def test_the_table(url):
    study = reported(url, "sfd-search")
    assert table(summary_of(study)).splitlines()[:4] == [
        "                        FID  vs plain SFD      a       b  w_1 .. w_K",
        "plain SFD            12.500             -      -       -  end point alone",
        "uniform weights      13.280        +6.2 %  0.000       -  1 1 1 1",
        "best of 3 (trial 1)  11.000       -12.0 %  0.500  -1.000  0.607 1 1.65 2.72",
    ]
    remarks = table(summary_of(study)).splitlines()[4:]
    assert "best of n, not confirmed" in remarks[0]
    assert "256 images at NFE 2, features of digits-classifier" in remarks[1]
    assert headline(study) == (
        "study sfd-search: 3 of 6 trials complete, 1 pruned, 1 failed, 1 running"
    )


def test_the_table_of_learned_weights(url):
    lines = table(summary_of(reported(url, "learned-search"))).splitlines()
    assert " ".join(lines[0].split()) == "FID vs plain SFD rule strength w_1 .. w_K"
    assert lines[2].split()[:7] == ["uniform", "weights", "13.280", "+6.2", "%", "-", "-"]
    assert lines[3].split()[5:9] == ["11.000", "-12.0", "%", "gradient-norm"]


def test_fids_of_other_conditions_are_not_compared(url):
    study = search(url, POINTS, study=spec_of("sfd-search"))
    now = summary_of(study)
    plain = now.baselines["plain"]
    fid = dataclasses.replace(plain.result.fid, images=1024)
    other = dataclasses.replace(plain, result=dataclasses.replace(plain.result, fid=fid))
    now = dataclasses.replace(now, baselines=now.baselines | {"plain": other})
    *rows, remark, _ = table(now).splitlines()
    assert "%" not in "".join(rows)
    assert "different conditions (images)" in remark


@each_kind
def test_failures_say_why(url, kind):
    (line,) = failures(reported(url, kind))
    assert line.endswith("failed, diverged: the loss is not finite at iteration 3")
    title = {"sfd-arms": "row 6 (plain SFD, seed 7", "progressive-arms": "row 6 (plain PD, seed 7"}
    assert line.startswith(title.get(kind, "trial "))


def test_baselines_are_copied_to_the_search_where_the_dashboard_shows_them(url):
    study = created(url, spec_of("sfd-search"))
    copy_baselines(study)
    assert study.search.attribute("baselines") is None
    finish(study, lambda arm, row: 12.0 + row.arm)
    copy_baselines(study)
    stored = study.search.attribute("baselines")
    assert {name: each["fid"] for name, each in stored.items()} == {"plain": 12.0, "uniform": 13.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
        (float("nan"), "unknown"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# ---- the report ----


@each_kind
def test_both_pages_hold_all_there_is(url, kind, tmp_path):
    """No request to anywhere: each picture is in the page of HTML, as it is in the folder."""
    study = reported(url, kind)
    number = 1 if study.is_search else 4  # the best; the given arm under the first seed
    grid = "samples.png" if kind != "progressive-arms" else "00002-samples.png"
    sampled = tmp_path / f"runs/{kind}/{number:05d}" / grid
    sampled.parent.mkdir(parents=True)
    sampled.write_bytes(b"a grid")
    folder = tmp_path / "shown"
    page, overview = write_report(study, folder), overview_of(study)
    plot = f"{PLOTS[kind]}.png"
    assert is_plot(folder / plot)
    # The grids of others are not there, this one is.
    copied = "samples-best.png" if study.is_search else "samples-2.png"
    assert (folder / copied).read_bytes() == b"a grid"

    text = page.read_text()
    assert re.findall(r"\]\((.*?)\)", text) == [plot, copied]
    html = (folder / "report.html").read_text()
    found = read_html(html)
    for row in overview.table():
        assert " | ".join(map(escaped, row)) in text
        assert [" ".join(cell.split()) for cell in row] in found.rows
    for line in (overview.headline(), *overview.failures, *remarks(overview)):
        assert line in found.text
    assert found.links == []
    assert [base64.b64decode(each.partition("base64,")[2]) for each in found.pictures] == [
        (folder / name).read_bytes() for name in (plot, copied)
    ]
    assert "default-src 'none'; img-src data:;" in html
    assert not re.search(r"(src|href)=\"?(http|/|\.)|url\(|@import", html)


def test_trials_are_listed_the_best_first_and_changes_of_settings(url, tmp_path):
    text = write_report(reported(url, "sfd-search"), tmp_path / "shown").read_text()
    assert re.search(r"\d\d:\d\d.*: budget from 3 to 6", text)
    _, _, trials = text.partition("| trial | ")
    rows = [line.split(" | ")[0] for line in trials.splitlines() if line.startswith("| ")]
    assert rows == ["| ---", "| 1", "| 2", "| 0"]
    assert "| 1 | 0.500 | -1.000 | 11.000 | 0.607 1 1.65 2.72 |" in text


def test_rows_at_two_budgets_have_a_plot_and_a_line_each(url, tmp_path):
    study = created(url, spec_of("sfd-arms"))
    study.plan(study.arms, [0], [{"kimg": 5.0}])
    finish(study, lambda arm, row: 10.0 + row.arm + row.variant)
    text = write_report(study, tmp_path / "shown").read_text()
    assert re.findall(r"\]\((.*?)\)", text) == ["arms-0.png", "arms-1.png"]
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| plain")] == [
        "as the study",
        "kimg 5.0",
    ]


@pytest.mark.parametrize("kind", ["sfd-search", "progressive-arms"])
def test_there_is_no_report_of_nothing(url, kind, tmp_path):
    study = created(url, spec_of(kind))
    with pytest.raises(InputError, match="nothing to report yet; run bdense-search launch"):
        write_report(study, tmp_path / "shown")
    assert not (tmp_path / "shown").exists()


def test_a_report_replaces_its_own_files_alone(url, tmp_path):
    study, folder = reported(url, "sfd-search"), tmp_path / "shown"
    folder.mkdir()
    notes = folder / "report.md"
    notes.write_text("my notes")
    with pytest.raises(InputError, match=r"report\.md that is not of this study's report"):
        write_report(study, folder)
    assert notes.read_text() == "my notes"
    write_report(study, folder, force=True)
    first = notes.read_text()
    write_report(study, folder)
    assert notes.read_text() == first
    page = folder / "report.html"
    page.write_text(page.read_text().replace(f"bdense: {study.name}", "bdense: another"))
    with pytest.raises(InputError, match="not of this study's report"):
        write_report(study, folder)
