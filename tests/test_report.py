"""Where a study stands: from a real database, filled through the ledger, to JSON and a table."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest
from PIL import Image

from bdense.errors import InputError
from bdense.metrics.metrics import FID
from search.report.plots import fid_over
from search.report.render import picture
from search.report.report_files import write_report
from search.spec.space import baseline_space, search_space
from search.storage.ledger import Claim, Ledger
from search.study.study import Study
from search.study.summary import (
    baseline_results,
    best_json,
    complete_trials,
    copy_baselines,
    failures,
    headline,
    in_short,
    standing,
    status_json,
    table,
)
from search.study.wording import duration
from tests.studies import spec

WEIGHTS = {1.0: [0.5, 1.5, 4.0, 10.0], 0.5: [1.0, 1.6, 2.7, 4.5], 2.0: [0.1, 1.0, 7.4, 55.0]}

# What a script may count on, and what an honest number comes with.
CONDITIONS = {
    "nfe": 2,
    "images": 4096,
    "extractor": "digits-classifier",
    "extractor_sha256": "0" * 64,
    "reference": "digits",
    "reference_images": 1797,
    "seeds": {"training": 0, "evaluation": 0},
}


# Of one trial alone: metrics may be added to a study that has begun.
KID = {"mean": 0.01, "std": 0.002, "subsets": 100, "subset_size": 1000, "images": 4096}


def attributes(value: float, weights: list[float]) -> dict:
    fid = FID(
        value=value,
        images=4096,
        reference="digits",
        reference_images=1797,
        extractor="digits-classifier",
        extractor_sha256="0" * 64,
        nfe=2,
        seeds={"training": 0, "evaluation": 0},
    )
    return {"fid": fid.as_dict(), "weights": weights}


def take(ledger: Ledger, space: dict, params: dict) -> Claim:
    ledger.enqueue(params)
    claim = ledger.claim(space, lambda offset: optuna.samplers.RandomSampler(seed=offset))
    assert isinstance(claim, Claim)
    assert dict(claim.params) == params
    return claim


def trial(ledger: Ledger, a: float) -> Claim:
    return take(ledger, search_space(spec()), {"a": a, "b": -1.0})


def finish(ledger: Ledger, a: float, value: float) -> None:
    claim = trial(ledger, a)
    attrs = attributes(value, WEIGHTS[a]) | {"a": a, "b": -1.0}
    if a == 0.5:
        attrs["kid"] = KID
    attrs["student"] = f"digits/{claim.number:05d}/student.safetensors"
    ledger.complete(claim, value, attrs)


@dataclasses.dataclass
class Scene:
    """A study of 6 trials: 3 complete, 1 pruned, 1 failed, 1 running; and its baselines."""

    url: str
    ledger: Ledger

    @property
    def study(self) -> Study:
        return Study.open(self.url, "digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def scene(folder) -> Scene:
    url = f"sqlite:///{folder / 'study.db'}"
    ledger = Ledger.open(url, "digits", budget=6)
    finish(ledger, 1.0, 12.5)
    finish(ledger, 0.5, 11.0)
    finish(ledger, 2.0, 11.0)
    ledger.prune(trial(ledger, 0.1), {})
    ledger.fail(trial(ledger, 2.9), "diverged", "the loss is not finite at iteration 3", {})
    trial(ledger, -0.2)
    baselines = Ledger.open(url, "digits.baselines", budget=2)
    # The order in which they end is not the order in which they are shown.
    for method, value, weights in (("uniform", 13.28, [1.0] * 4), ("sfd", 12.5, [1.0])):
        claim = take(baselines, baseline_space(), {"method": method})
        baselines.complete(claim, value, attributes(value, weights))
    return Scene(url, ledger)


@pytest.fixture(scope="module")
def empty(folder) -> Scene:
    url = f"sqlite:///{folder / 'empty.db'}"
    return Scene(url, Ledger.open(url, "digits", budget=4))


TRIALS = {"planned": 6, "complete": 3, "pruned": 1, "failed": 1, "running": 1}
SFD = {"fid": 12.5, **CONDITIONS, "weights": [1.0], "number": 1}
UNIFORM = {"fid": 13.28, **CONDITIONS, "weights": [1.0] * 4, "number": 0}
BEST = {
    "number": 1,
    "a": 0.5,
    "b": -1.0,
    "weights": [1.0, 1.6, 2.7, 4.5],
    "fid": 11.0,
    **CONDITIONS,
    "kid": KID,
    "confirmed": False,
    "student": "digits/00001/student.safetensors",
}


def test_status_for_scripts(scene):
    now = standing(scene.study)
    assert json.loads(json.dumps(status_json(now))) == {"study": "digits", "trials": TRIALS}


def test_best_for_scripts(scene):
    """Of two equal trials the earlier one."""
    now = standing(scene.study)
    assert json.loads(json.dumps(best_json(now))) == {
        "study": "digits",
        "storage": scene.url,
        "trials": TRIALS,
        "best": BEST,
        "baselines": {"sfd": SFD, "uniform": UNIFORM},
    }
    assert list(now.baselines) == ["sfd", "uniform"]


def test_best_of_nothing(empty):
    assert best_json(standing(empty.study)) == {
        "study": "digits",
        "storage": empty.url,
        "trials": {"planned": 4, "complete": 0, "pruned": 0, "failed": 0, "running": 0},
        "best": None,
        "baselines": {},
    }


def test_what_is_left_of_a_study_counts_its_baselines(scene, empty):
    assert scene.study.left() == 1
    assert scene.study.has_started()
    assert empty.study.left() == 4
    assert not empty.study.has_started()


def test_the_table(scene):
    text = table(standing(scene.study))
    assert text == "\n".join(
        [
            "                        FID  vs plain SFD      a       b  w_1 .. w_K",
            "plain SFD            12.500             -      -       -  end point alone",
            "uniform weights      13.280        +6.2 %      0       0  1 1 1 1",
            "best of 3 (trial 1)  11.000       -12.0 %  0.500  -1.000  1 1.6 2.7 4.5",
            "The best is the lowest of several noisy values from one training seed: "
            "best of n, not confirmed.",
            "FID: 4096 images at NFE 2, features of digits-classifier, against digits.",
        ]
    )


def test_fids_of_other_conditions_are_not_compared(scene):
    now = standing(scene.study)
    now.baselines["sfd"]["images"] = 1024
    *rows, remark, _ = table(now).splitlines()
    assert "%" not in "".join(rows)
    assert remark == (
        "These FIDs were measured under different conditions (images): no comparison where they "
        "differ."
    )


LEARNED_BEST = {
    **{key: value for key, value in BEST.items() if key not in ("a", "b")},
    "rule": "gradient-norm",
    "strength": -0.5,
    "weights_plot": "digits/00001/weights.png",
}


@pytest.fixture(scope="module")
def learned(folder) -> Scene:
    """Two trials of learned weights, of which the later is better."""
    url = f"sqlite:///{folder / 'learned.db'}"
    ledger = Ledger.open(url, "digits", budget=2)
    baselines = Ledger.open(url, "digits.baselines", budget=2)
    for method, value, weights in (("sfd", 12.5, [1.0]), ("uniform", 13.28, [1.0] * 4)):
        claim = take(baselines, baseline_space(), {"method": method})
        baselines.complete(claim, value, attributes(value, weights))
    space = search_space(spec(weights="learned"))
    for rule, strength, value in (("uncertainty", 1.0, 12.0), ("gradient-norm", -0.5, 11.0)):
        claim = take(ledger, space, {"rule": rule, "strength": strength})
        files = f"digits/{claim.number:05d}"
        stored = {
            "rule": rule,
            "strength": strength,
            "weights_over_time": {"iterations": [0], "weights": [WEIGHTS[0.5]]},
            "weights_plot": f"{files}/weights.png",
            "student": f"{files}/student.safetensors",
        }
        ledger.complete(claim, value, attributes(value, WEIGHTS[0.5]) | {"kid": KID} | stored)
    return Scene(url, ledger)


def test_the_best_learned_weights_for_scripts(learned):
    """No (a, b), which they do not have."""
    best = json.loads(json.dumps(best_json(standing(learned.study))))["best"]
    assert best == LEARNED_BEST


def test_the_table_of_learned_weights(learned):
    lines = table(standing(learned.study)).splitlines()
    assert lines[:4] == [
        "                        FID  vs plain SFD           rule  strength  final w_1 .. w_K",
        "plain SFD            12.500             -              -         -  end point alone",
        "uniform weights      13.280        +6.2 %            any         0  1 1 1 1",
        "best of 2 (trial 1)  11.000       -12.0 %  gradient-norm    -0.500  1 1.6 2.7 4.5",
    ]


def test_where_the_best_lies_in_short(scene, learned):
    assert in_short(standing(scene.study).best) == "a 0.500"
    assert in_short(standing(learned.study).best) == "gradient-norm, strength -0.500"


def test_the_table_while_only_baselines_are_measured(scene):
    now = dataclasses.replace(standing(scene.study), best=None)
    lines = table(now).splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["plain SFD", "uniform weights"]
    assert lines[3:] == [
        "FID: 4096 images at NFE 2, features of digits-classifier, against digits."
    ]


def test_the_table_of_an_untouched_study_is_its_head(empty):
    head = table(standing(empty.study))
    assert " ".join(head.split()) == "FID vs plain SFD a b w_1 .. w_K"


def test_the_headline(scene):
    assert headline(standing(scene.study)) == (
        "study digits: 3 of 6 trials complete, 1 pruned, 1 failed, 1 running"
    )


def test_failures_say_why(scene):
    assert failures(scene.study) == [
        "trial 4 failed, diverged: the loss is not finite at iteration 3"
    ]


def test_baselines_are_copied_to_the_study_and_count_in_none_of_its_figures(scene):
    copy_baselines(scene.study)
    assert scene.ledger.study.user_attrs["baselines"] == {"sfd": SFD, "uniform": UNIFORM}
    assert standing(scene.study).trials() == TRIALS


def test_a_study_without_baselines_has_none(empty):
    assert baseline_results(empty.study) == {}
    copy_baselines(empty.study)
    assert "baselines" not in empty.ledger.study.user_attrs


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
        (float("inf"), "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_report_is_a_page_with_its_pictures(scene, folder, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(folder / "runs"))
    grid = folder / "runs" / "digits" / "00001" / "samples.png"
    grid.parent.mkdir(parents=True)
    grid.write_bytes(b"the best trial's grid")
    page = write_report(scene.study, folder / "shown")
    text = page.read_text()
    assert table(standing(scene.study)) in text
    # The best first, and of two equal ones the earlier.
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["| trial", "| ---", "| 1", "| 2", "| 0"]
    assert "| 1 | 0.500 | -1.000 | 11.000 | 1 1.6 2.7 4.5 |" in text
    # The baselines' grids are not there, the best trial's is.
    assert (folder / "shown" / "samples-best.png").read_bytes() == b"the best trial's grid"
    plots = ["fid-over-a", "fid-over-a-b", "weights", "fid-over-time"]
    assert re.findall(r"\]\((.*?)\)", text) == [
        *(f"{name}.png" for name in plots),
        "samples-best.png",
    ]
    for name in plots:
        with Image.open(folder / "shown" / f"{name}.png") as picture:
            assert picture.size == (1050, 630)


class Cells(HTMLParser):
    """Texts of the cells of every table, and addresses of every picture."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.pictures, self.links, self.text = [], [], [], ""
        self._in_cell = False

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")
        if tag == "img":
            self.pictures.append(found["src"])
        self.links += [found[name] for name in ("href", "action", "data") if name in found]
        assert tag not in ("script", "iframe", "object", "link", "form")
        assert not [name for name in found if name.startswith("on")]

    def handle_data(self, data):
        if self._in_cell and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()
        self.text += data

    def handle_endtag(self, tag):
        self._in_cell = False


def read_html(path: Path) -> Cells:
    found = Cells()
    found.feed(path.read_text())
    return found


def test_the_html_report_holds_all_there_is(scene, folder, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(folder / "runs"))
    write_report(scene.study, folder / "html")
    found = read_html(folder / "html" / "report.html")
    assert ["plain SFD", "12.500", "-", "-", "-", "end point alone"] in found.rows
    assert ["uniform weights", "13.280", "+6.2 %", "0", "0", "1 1 1 1"] in found.rows
    assert ["1", "0.500", "-1.000", "11.000", "1 1.6 2.7 4.5"] in found.rows
    assert "3 of 6 trials complete, 1 pruned, 1 failed, 1 running" in found.text
    assert "trial 1, a 0.500: w_1 .. w_K = 1 1.6 2.7 4.5" in found.text
    assert "one training seed, not confirmed" in found.text
    assert "trial 4 failed, diverged: the loss is not finite at iteration 3" in found.text
    assert "3 complete trials say too little, 20 are needed" in found.text
    # No request to anywhere: each picture is in the page, as it is in the folder.
    assert found.links == []
    assert [
        base64.b64decode(each.removeprefix("data:image/png;base64,")) for each in (found.pictures)
    ] == [
        (folder / "html" / f"{name}.png").read_bytes()
        for name in (
            "fid-over-a",
            "fid-over-a-b",
            "weights",
            "fid-over-time",
            *(["samples-best"] if (folder / "html" / "samples-best.png").exists() else []),
        )
    ]
    text = (folder / "html" / "report.html").read_text()
    assert "default-src 'none'; img-src data:;" in text
    assert not re.search(r"(src|href)=\"?(http|/|\.)|url\(|@import", text)


def test_a_change_of_a_setting_is_in_the_report(folder, monkeypatch):
    monkeypatch.setenv("BDENSE_RUNS", str(folder / "runs"))
    url = f"sqlite:///{folder / 'changed.db'}"
    finish(Ledger.open(url, "digits", budget=2), 1.0, 12.5)
    Ledger.open(url, "digits", budget=8)
    write_report(Study.open(url, "digits"), folder / "changed")
    assert re.search(
        r"\d\d:\d\d.*: budget from 2 to 8", read_html(folder / "changed" / "report.html").text
    )


def test_the_curve_shows_every_trial_and_the_baselines(scene):
    trials = complete_trials(scene.study)
    (axes,) = picture(fid_over(trials, standing(scene.study).baselines, "a")).axes
    plain, uniform, dots, best = axes.get_lines()
    assert dots.get_xydata().tolist() == [[1.0, 12.5], [0.5, 11.0], [2.0, 11.0]]
    assert best.get_xydata().tolist() == [[0.5, 11.0]]
    assert {line.get_label(): line.get_ydata()[0] for line in (plain, uniform)} == {
        "plain SFD 12.500": 12.5,
        "uniform weights 13.280": 13.28,
    }


def test_there_is_no_report_of_nothing(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    Ledger.open(url, "empty", budget=1)
    with pytest.raises(InputError, match="nothing to report yet; run bdense-search launch"):
        write_report(Study.open(url, "empty"), tmp_path / "shown")
    assert not (tmp_path / "shown").exists()
