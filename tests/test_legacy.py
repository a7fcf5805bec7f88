"""Study files of before there was one form: each is read as what it says today, in one line."""

import pytest
import yaml

from search.errors import SpecError
from search.spec.file import parse, read_spec, read_tree
from search.spec.legacy import translated
from search.spec.resolve import resolve
from tests.goldens import ROOT
from tests.studies import STUDIES, STUDY

# As commit 3f7be1a had them.
OLD = sorted((ROOT / "tests/data/studies-3f7be1a").glob("*.yaml"))
BUDGET = {"trials": 4, "kimg": 2.56, "batch": 64, "lr": 5e-4}
SEARCH = {
    "student": {"method": "sfd-bdense", "nfe": 2, "substeps": 4},
    "weights": {"parameterisation": "normalised", "a": {"low": -0.5, "high": 3.0}},
    "budget": BUDGET,
}
CHAIN = {"chain": {"first": 8, "last": 2}, "round": {"updates": 10}}
SFD = {"name": "sfd", "nfe": 2, "substeps": 4, "kimg": 2.56, "batch": 64, "lr": 5e-4}
PD = {"name": "progressive", "steps": 8, "until": 2, "updates": 10}
MEDIAN = {"name": "MedianPruner", "n_startup_trials": 5}
STARTUP = {"n_startup_trials": 3}
PERCENTILE = {"name": "PercentilePruner", "percentile": 10.0, "n_startup_trials": 5}
HALVING = {"name": "SuccessiveHalvingPruner", "reduction_factor": 2}
HYPERBAND = {"name": "HyperbandPruner", "reduction_factor": 3}
PATIENT = {"name": "PatientPruner", "wrapped_pruner": MEDIAN, "patience": 1}
UNSET = dict.fromkeys(("startup_trials", "percentile", "factor", "patience"))


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.name)
def test_a_study_of_then_is_the_study_of_that_name_today(path):
    (today,) = (each for each in STUDIES if each.name == path.name)
    tree, told = translated(read_tree(path))
    assert told.startswith("this is the old form of a ")
    assert "\n" not in told
    now, nothing = translated(read_tree(today))
    assert nothing == ""
    if "google/" in str(now["teacher"]):
        pytest.importorskip("diffusers", reason="needs the diffusers extra")
    if "trials" in now["plan"]:
        now["plan"].setdefault("replicates", 1)  # there were none
    for name in ("tail", "lr_schedule"):  # recipes that were found better since
        now["method"].pop(name, None)
    if path.stem == "promote-fashion-mnist":
        now["method"] |= {"updates": 40, "batch": 128}
    if tree.get("precision") is None:
        now.pop("precision", None)  # all computed in float32
    if tree != now:
        then = resolve(parse(tree, source=path.name))
        assert then == resolve(parse(now, source=path.name))


def test_all_of_them_are_there():
    assert len(OLD) == 15


def test_a_search_in_todays_form():
    found, _ = translated({**SEARCH, "keep_students": 2})
    assert found["method"] == SFD
    assert found["weights"] == {"name": "normalised", "a": {"low": -0.5, "high": 3.0}}
    assert (found["plan"], found["keep_students"]) == ({"trials": 4, "replicates": 1}, 2)
    student = {
        "nfe": 3,
        "solver": {"name": "heun", "order": None},
        "schedule": {"kind": "logsnr", "sigma_min": 0.01},
    }
    pruning = {"pruner": "none", "at": [0.5], "images": 64, **UNSET}
    other = {"student": student, "weights": "learned", "pruning": pruning, "stop": {"patience": 5}}
    found, _ = translated({**other, "confirm": {"kimg": 200, "candidates": 2}})
    levels = {"schedule": "logsnr", "sigma_min": 0.01}
    assert found == {
        "method": {"name": "sfd", "nfe": 3, "solver": "heun", "order": None, **levels},
        "weights": "learned",
        "plan": {"replicates": 1, "at": [0.5], "images": 64},
        "confirm": {"candidates": 2, "method": {"kimg": 200}},
    }


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        ({"name": "tpe"}, "sampler", {"name": "TPESampler"}),
        ({"name": "gp", "startup_trials": 3}, "sampler", {"name": "GPSampler", **STARTUP}),
        ({"name": "random", "startup_trials": 3}, "sampler", {"name": "RandomSampler"}),
        ({"pruner": "median", **UNSET}, "pruner", MEDIAN),
        ({"pruner": "median", "startup_trials": 3}, "pruner", MEDIAN | STARTUP),
        ({"pruner": "percentile", "percentile": 10.0}, "pruner", PERCENTILE),
        ({"pruner": "successive-halving"}, "pruner", HALVING),
        ({"pruner": "hyperband", "factor": 3}, "pruner", HYPERBAND),
        ({"pruner": "patient-median"}, "pruner", PATIENT),
    ],
)
def test_samplers_and_pruners_are_optunas_classes(section, key, expected):
    found, _ = translated({"budget": {}, "pruning" if "pruner" in section else key: section})
    assert found["plan"][key] == expected


def test_a_promotion_in_todays_form():
    seeds = {"training": [0, 1], "evaluation": 3}
    found, _ = translated({**CHAIN, "study": "digits", "seeds": seeds, "schedule": "native"})
    assert found == {
        "method": {**PD, "schedule": "native"},
        "plan": {"arms": ["plain", "uniform", {"winner_of": "digits"}], "seeds": [0, 1]},
        "seeds": {"evaluation": 3},
    }
    settings = {"prediction_type": "sample", "clip_samples": False, "weights_space": "state"}
    update = {"updates": 10, "anneal": False}
    found, _ = translated({**CHAIN, **settings, "round": update, "schedule": {"rho": 5}})
    assert found["method"] == {
        **PD,
        "prediction_type": "sample",
        "weights_space": "state",
        "lr_schedule": "constant",
        "schedule": "polynomial",
        "rho": 5,
    }
    assert found["plan"] == {"arms": ["plain", "uniform"]}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"student": {"nfee": 2}}, "method.nfee"),
        ({"student": {"solver": {"nam": "heun"}}}, "method.nam"),
        ({"pruning": {"bound": 3}}, "plan.bound"),
        ({"stopp": {}}, "stopp"),
        # Half rewritten: nothing of today's sections is lost, and nothing else taken for them.
        ({"method": {"name": "progressive", "steps": 8, "until": 4}}, "student"),
    ],
)
def test_a_key_that_neither_form_has_is_refused(changes, key):
    rest = {name: STUDY[name] for name in ("name", "data", "teacher", "evaluation")}
    tree, _ = translated({**rest, **SEARCH, **changes})
    with pytest.raises(SpecError) as error:
        resolve(parse(tree, source="study.yaml"), source="study.yaml")
    assert f"study.yaml: {key}" in str(error.value)


def test_a_launch_says_once_how_to_write_it_now(tmp_path, capfd):
    path = tmp_path / "study.yaml"
    rest = {name: STUDY[name] for name in ("name", "data", "teacher", "evaluation")}
    path.write_text(yaml.safe_dump({**rest, **SEARCH}))
    study = read_spec(path)
    assert (study.method.name, study.search.trials) == ("sfd", 4)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"bdense-search: {path}: this is the old form of a study; write `method:"
    )
    path.write_text(yaml.safe_dump({**rest, **SEARCH, "student": 3}))
    with pytest.raises(SpecError, match="student: must be a mapping") as error:
        read_spec(path)
    assert str(error.value).startswith(str(path))
