"""Study files: what is wrong in one is named, and what changes its numbers changes its mark."""

import dataclasses
import math
import re
from typing import get_args

import pytest
import yaml
from search.spec.study_file import as_yaml, parse_spec, read_spec
from search.spec.study_spec import StudySpec
from search.worker.engine import (
    check,
    student_grid,
    student_sampler,
    teacher_config,
    teacher_solver,
    training_config,
)

from bdense.diffusion.snr_weights import LOSSES
from bdense.diffusion.solver_names import SOLVERS
from bdense.diffusion.solvers import DPM2, IPNDM, DPMSolverPP, Euler, Heun
from bdense.execution import PRECISIONS
from bdense.weights.spaces import RULES
from bdense.weights.weighting import LearnedWeights
from search.errors import SpecError
from tests.studies import LEARNED, NORMALISED, REMOVED, STUDIES, changed, spec

TRAINED = {"kimg": 1}


ONE_POINT = {"rules": ["uncertainty"], "strength": {"low": 1.0, "high": 1.0}}


def message(**keys) -> str:
    with pytest.raises(SpecError) as error:
        check(parse_spec(changed(**keys), source="study.yaml"))
    return str(error.value)


NAMED = {
    "teacher": {"checkpoint": "edm-cifar10-32x32-uncond-vp"},
    "evaluation__reference": "cifar10-32x32",
}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"budgett": 3}, "study.yaml: budgett: unknown key; check the spelling"),
        ({"budget__trails": 3}, "budget.trails: unknown key"),
        ({"student__schedule": {"sigma": 1}}, "student.schedule.sigma: unknown key"),
        ({"budget": REMOVED}, "study.yaml: budget: this key is missing"),
        ({"student__nfe": REMOVED}, "student.nfe: this key is missing"),
        ({"student__substeps": 0}, "student.substeps: .* greater than or equal to 1, got 0"),
        ({"student__nfe": 0}, "student.nfe: .* greater than or equal to 1, got 0"),
        ({"student__nfe": 2.5}, "student.nfe: .* integer.*, got 2.5"),
        ({"student__method": "pd"}, "student.method: .*'sfd-bdense', got 'pd'"),
        (
            {"student__solver": {"order": 4}},
            "student.solver.order: dpmpp has orders 1, 2 and 3, got 4; leave it out for 3$",
        ),
        (
            {"student__solver": {"name": "ipndm", "order": 1}},
            "student.solver.order: ipndm has orders 2, 3 and 4, got 1",
        ),
        (
            {"student__solver": {"name": "heun", "order": 3}},
            "student.solver.order: heun has order 2 alone, got 3; leave it out, or take ipndm or",
        ),
        ({"student__solver": {"order": 2.5}}, "student.solver.order: .* integer.*, got 2.5"),
        (
            {"student__solver": {"name": "heun", "thresholding": True}},
            "student.solver.thresholding: heun has no thresholding; leave it out, or take dpmpp$",
        ),
        (
            {"student__solver": {"name": "dpm", "order": 9, "thresholding": True}},
            "^study.yaml: student.solver.name: .*'euler', 'ddim', 'heun', .*, got 'dpm'$",
        ),
        (
            {"student__schedule": {"sigma_min": 90.0}},
            "student.schedule: sigma_min 90.0 must be below sigma_max 80.0",
        ),
        ({"student__schedule": {"rho": 0}}, "student.schedule.rho: .* greater than 0, got 0"),
        (
            {"weights__a": {"low": 3.0, "high": 1.0}},
            "weights.a: low 3.0 is above high 1.0; swap them",
        ),
        ({"weights__b__high": -7.0}, "weights.b: low -6.0 is above high -7.0; swap them"),
        ({"weights__a__low": math.nan}, "weights.a.low: .* finite number, got nan"),
        ({"weights__b__high": math.inf}, "weights.b.high: .* finite number, got inf"),
        ({"weights__largest": math.nan}, "weights.largest: .* finite number, got nan"),
        (
            {"weights__parameterisation": "linear"},
            "weights.parameterisation: .* 'log-linear', 'normalised', 'learned', got 'linear'",
        ),
        ({"weights__parameterisation": REMOVED}, "weights.parameterisation: this key is missing"),
        ({"weights__b": REMOVED}, "weights.b: this key is missing"),
        ({"weights__c": 1}, "weights.c: unknown key"),
        (
            {"weights__parameterisation": "normalised"},
            "weights: normalised weights have no b; drop it or use log-linear",
        ),
        (
            {"weights": {**LEARNED, "largest": 2.0}},
            "weights: learned weights have no largest; drop it or use log-linear or normalised",
        ),
        (
            {"weights": {**NORMALISED, "rules": ["uncertainty"]}},
            "weights: normalised weights have no rules; drop it or use learned",
        ),
        ({"weights": "uniform"}, "weights: 'uniform' alone says too little; .* the word learned"),
        ({"weights": 3}, "weights: .* dictionary .*, got 3"),
        (
            {"weights": {**LEARNED, "rules": ["loss"]}},
            "weights.rules.0: .* 'uncertainty' or 'gradient-norm', got 'loss'",
        ),
        ({"weights": {**LEARNED, "rules": []}}, r"weights.rules: \[\] must name one rule or more"),
        (
            {"weights": {**LEARNED, "rules": ["uncertainty"] * 2}},
            r"weights.rules: \['uncertainty', 'uncertainty'\] must name .* each once",
        ),
        ({"weights": {**LEARNED, "memory": 0}}, "weights.memory: .* equal to 1, got 0"),
        (
            {"weights": {**LEARNED, "strength": {"low": 1.0, "high": -1.0}}},
            "weights.strength: low 1.0 is above high -1.0; swap them",
        ),
        (
            {"weights": {**LEARNED, "strength": {"low": 0.0, "high": 12.0}}},
            "weights.strength: .* must lie in -10..10, got 12.0",
        ),
        (
            {"weights": {**LEARNED, **ONE_POINT}},
            "4 trials .* would all be the same, rule uncertainty at strength 1; run 1, or give",
        ),
        (
            {"weights": LEARNED, "resources": {"compile": True}},
            "gradient-norm looks into the network, which resources.compile closes; drop one",
        ),
        (
            {"weights": {**NORMALISED, "largest": 0.5}},
            "weights.largest 0.5 rules out the whole space, whose smallest largest weight is 1;",
        ),
        # The least of max w_k is w_1 at the lower bounds: exp(-0.5 - 6).
        (
            {"weights__largest": 1e-3},
            "weights.largest 0.001 rules out .* smallest largest weight is 0.001503;",
        ),
        ({"teacher": {}}, "teacher: give either checkpoint: FILE or train: {...}, one of the two"),
        (
            {"teacher": {"checkpoint": "x.pkl", "train": TRAINED}},
            "teacher: give either checkpoint: FILE or train",
        ),
        ({"teacher__train__kimg": 0}, "teacher.train.kimg: .* equal to 0.001, got 0"),
        ({"teacher__train__warmup_kimg": math.inf}, "teacher.train.warmup_kimg: .* got inf"),
        (
            {"teacher__train__network": {"depth": 3}},
            r"teacher.train.network \{'depth': 3\}: .*'depth'",
        ),
        (
            {"teacher__train__network": {"model_channels": 6}},
            r"teacher.train.network \{'model_channels': 6\}: .* a multiple of 4",
        ),
        ({"teacher__train__loss": "mse"}, "teacher.train.loss: .* 'constant', .*, got 'mse'"),
        ({"teacher__train__loss": "v"}, "teacher.train: teacher loss 'v' is for a process"),
        ({"teacher__train__clip": 0}, "teacher.train.clip: .* greater than 0, got 0"),
        (
            {"teacher__train__precond": {"name": "vp"}},
            "teacher.train: teacher precond needs the name cosine or ddpm, got 'vp'",
        ),
        (
            {"teacher__train__precond": {"name": "cosine", "timesteps": 64}},
            "teacher.train: the options do not fit precond='cosine': .*'timesteps'",
        ),
        (
            {"teacher__train__precond": {"name": "ddpm", "num_train_timesteps": "many"}},
            "teacher.train: the options do not fit precond='ddpm'",
        ),
        ({"budget__trials": 0}, "budget.trials: .* equal to 1, got 0"),
        ({"budget__kimg": 1e-5}, "budget.kimg: .* equal to 0.001, got 1e-05"),
        ({"budget__lr": math.nan}, "budget.lr: .* finite number, got nan"),
        ({"budget__lr": "fast"}, "budget.lr: .* got 'fast'"),
        ({"evaluation__images": 1}, "evaluation.images: .* equal to 2, got 1"),
        ({"evaluation__metrics": ["fid", "is"]}, "evaluation.metrics.1: .* got 'is'"),
        ({"evaluation__metrics": ["kid"]}, r"evaluation: metrics \['kid'\] lack fid"),
        (
            {"evaluation__metrics": ["fid", "prc"], "evaluation__reference": "refs.npz"},
            "evaluation: metrics .* need single reference images, .* drop reference to compare",
        ),
        ({"sampler": {"name": "cma"}}, "sampler.name: .* got 'cma'"),
        ({"seeds": {"training": -1}}, "seeds.training: .* equal to 0, got -1"),
        ({"seeds": {"training": 2**31}}, "seeds.training: .* got 2147483648"),
        ({"trajectories": {"dtype": "int8"}}, "trajectories.dtype: .* got 'int8'"),
        ({"resources": {"lease_seconds": 1}}, "resources.lease_seconds: .* equal to 10, got 1"),
        ({"resources": {"gpus": -1}}, "resources.gpus.* equal to 0, got -1"),
        (
            {"resources": {"gpus": 1.5}},
            "resources.gpus: 1.5 is neither a share of one GPU nor a whole number of them; give 0 "
            "to 1, 1 or 2$",
        ),
        (
            {"resources": {"gpus": 3}},
            "budget.batch 64 cannot be shared equally by resources.gpus 3; choose a multiple",
        ),
        ({"precision": "float8"}, "precision: .* 'bfloat16' or 'float16', got 'float8'"),
        (
            {"precision": "float16", "resources": {"gpus": 0}},
            "precision float16 needs a CUDA device, not cpu; use float32 or bfloat16",
        ),
        ({"data": REMOVED}, "data is missing; .* evaluation.reference .missing: teacher.checkp"),
        (
            {"data": REMOVED, "teacher": {"checkpoint": "edm-cifar10-32x32-uncond-vp"}},
            "data is missing; .* evaluation.reference .missing: evaluation.reference.",
        ),
        ({"name": "Digits NFE 2"}, "name: .* pattern .* got 'Digits NFE 2'"),
        ({"name": "cache"}, "name: 'cache' is a folder under the runs that all studies share;"),
        ({"name": "artifacts"}, "name: 'artifacts' is a folder under the runs that all"),
        ({"name": "digits.baselines"}, "name: .* pattern .* got 'digits.baselines'"),
    ],
)
def test_a_mistake_is_named_by_its_key_and_value(keys, expected):
    assert re.search(expected, message(**keys))


def test_every_mistake_has_a_line():
    lines = message(student__nfe=0, budget__kimg="many", colour="red").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["student.nfe", "budget.kimg", "colour"]


def test_what_is_left_out_has_the_papers_values():
    minimal = spec(student={"nfe": 2}, budget={"trials": 4, "kimg": 200}, evaluation={})
    assert (minimal.student.substeps, minimal.student.afs) == (4, True)
    assert (minimal.budget.images, minimal.budget.batch, minimal.budget.lr) == (200_000, 128, 5e-5)
    assert (minimal.evaluation.images, minimal.evaluation.extractor) == (50_000, "inception")
    schedule = minimal.student.schedule
    assert (schedule.kind, schedule.rho) == ("polynomial", 7.0)
    assert (schedule.sigma_min, schedule.sigma_max) == (0.006, 80.0)
    solver = minimal.student.solver
    assert (solver.name, solver.order, solver.thresholding) == ("dpmpp", 3, False)
    assert minimal.sampler.name == "tpe"


def test_learned_in_a_word_is_every_rule_with_the_engines_memory():
    learned = spec(weights="learned").weights
    assert learned.rules == RULES
    assert (learned.strength.low, learned.strength.high) == (-1.0, 1.5)
    assert learned.memory == LearnedWeights(4, rule="uncertainty").memory
    assert spec(weights=LEARNED).weights == learned


def test_one_trial_of_fixed_learned_weights_repeats_nothing():
    check(spec(weights={**LEARNED, **ONE_POINT}, budget__trials=1))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_the_studies_that_come_along_are_in_order(path):
    """A teacher of theirs may be a file that the user has to fetch."""
    tree = yaml.safe_load(path.read_text())
    study = parse_spec(tree, source=path.name)
    check(study)
    assert study.name == path.stem
    assert student_grid(study).nfe == study.student.nfe


def test_the_learned_digits_study_shares_all_but_the_weights():
    """So that its cached teacher and trajectories serve both, and their FIDs compare."""
    by_name = {path.stem: path for path in STUDIES}
    one, other = (read_spec(by_name[name]) for name in ("digits-nfe2", "digits-learned"))
    before, after = one.conditions(), other.conditions()
    differing = {key for key in before | after if before.get(key) != after.get(key)}
    assert {key.split(".")[0] for key in differing} == {"weights"}


def test_a_study_in_the_engines_terms():
    study = spec(
        student__schedule={"kind": "logsnr", "sigma_min": 0.01},
        student__solver={"name": "dpmpp", "order": 2, "thresholding": True},
        seeds={"training": 5, "evaluation": 6},
    )
    grid, sampler = student_grid(study), student_sampler(study)
    assert (grid.num_intervals, grid.substeps, grid.afs, grid.nfe) == (3, 4, True, 2)
    assert (grid.schedule.kind, grid.schedule.sigma_min) == ("logsnr", 0.01)
    assert (sampler.num_intervals, sampler.afs, sampler.nfe) == (3, True, 2)
    assert sampler.schedule == grid.schedule
    solver = teacher_solver(study)
    assert dataclasses.asdict(solver) == {
        "max_order": 2,
        "prediction": "data",
        "lower_order_final": True,
        "thresholding": True,
    }
    training = training_config(study, 4)
    assert (training.num_branches, training.images, training.seed) == (4, 2560, 5)
    assert (training.lr, training.iterations(64)) == (5e-4, 40)
    teacher = teacher_config(study.teacher.train)
    assert (teacher.images, teacher.warmup_images, teacher.batch) == (10_000, 10_000, 256)
    assert (teacher.precond, teacher.loss, teacher.flip, teacher.clip) == (None, None, False, None)


def test_a_teacher_of_a_process_in_the_engines_terms():
    recipe = {
        "precond": {"name": "cosine", "prediction_type": "sample"},
        "loss": "constant",
        "flip": True,
        "clip": 1.0,
    }
    study = spec(**{f"teacher__train__{key}": value for key, value in recipe.items()})
    check(study)
    teacher = teacher_config(study.teacher.train)
    assert {key: teacher.as_dict()[key] for key in recipe} == recipe
    again = parse_spec(yaml.safe_load(as_yaml(study)), source="study.yaml")
    assert again.fingerprint() == study.fingerprint()


def test_the_losses_of_the_spec_are_the_engines():
    optional = type(spec().teacher.train).model_fields["loss"].annotation
    assert get_args(get_args(optional)[0]) == LOSSES


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("euler", Euler()),
        ("heun", Heun()),
        ("dpm2", DPM2()),
        ("ipndm", IPNDM(max_order=4)),
        ("dpmpp", DPMSolverPP(max_order=3)),
    ],
)
def test_every_solver_can_walk_the_teacher(name, solver):
    """At its highest order where none is asked for, which the resolved study spells out."""
    study = spec(student__solver={"name": name})
    assert teacher_solver(study) == solver
    assert study.student.solver.order == SOLVERS[name][-1]
    again = parse_spec(yaml.safe_load(as_yaml(study)), source="study.yaml")
    assert again.fingerprint() == study.fingerprint()


def test_without_afs_every_interval_costs_an_evaluation():
    grid = student_grid(spec(student__afs=False))
    assert (grid.num_intervals, grid.nfe) == (2, 2)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"data": "digitz"},
            "^study digits: data: unknown data set 'digitz'; known are cifar10, ",
        ),
        ({"data": "cifar10@16"}, "^study digits: data: data set cifar10@16: .* are larger; "),
        (
            {"evaluation__extractor": "inceptoin"},
            "^study digits: evaluation.extractor: there is no 'inceptoin'; known are inception",
        ),
        (
            {"evaluation__extractor": "torchscript"},
            "^study digits: evaluation.extractor: there is no 'torchscript'; known are inception",
        ),
        (
            {"teacher": {"checkpoint": "edm-cifar10-32x32-uncond-vp"}},
            r"^study digits: teacher.checkpoint: edm-cifar10-32x32-uncond-vp makes images of "
            r"\(3, 32, 32\) .* and data digits holds \(1, 8, 8\); choose another of the two$",
        ),
    ],
)
def test_what_is_known_by_name_is_refused_at_once(keys, expected):
    told = message(**keys)
    assert re.search(expected, told)
    assert "\n" not in told


def test_files_and_data_that_nothing_needs_are_not_looked_into(tmp_path):
    check(spec(data=f"zip:{tmp_path / 'none.zip'}"))
    public = {"checkpoint": "edm-cifar10-32x32-uncond-vp"}
    check(spec(data="cifar10", teacher=public))
    check(spec(teacher=public, evaluation__reference="cifar10-32x32"))


def test_the_precisions_are_the_engines():
    """Spelt out in the spec, which a launcher reads without torch."""
    known = StudySpec.model_fields["precision"].annotation
    assert get_args(known) == PRECISIONS


def test_a_finished_teacher_and_a_reference_need_no_data():
    study = spec(**NAMED, data=REMOVED)
    assert (study.data, study.uses_data) == (None, False)
    assert "data" not in study.conditions()
    assert spec(**NAMED).uses_data is False
    assert spec(teacher=NAMED["teacher"]).uses_data is True
    assert spec(evaluation__reference="cifar10-32x32").uses_data is True


@pytest.mark.parametrize(
    ("gpus", "team"), [("auto", 1), (0, 1), (0.25, 1), (1, 1), (2, 2), (4.0, 4)]
)
def test_whole_gpus_make_a_team(gpus, team):
    assert spec(resources={"gpus": gpus}).resources.team == team
