"""A study of any method: a mistake is named by file and key, and what is left out is filled in."""

import json
import math

import pytest
import yaml
from PIL import Image

from bdense.errors import InputError
from bdense.knobs import knobs_of
from bdense.methods import METHODS
from bdense.methods.progressive import PDConfig
from bdense.methods.sfd import SFDConfig
from bdense.weights import WEIGHT_SPACES
from search.errors import SpecError
from search.spec.distillation import _YOUNGER
from search.spec.file import as_yaml, parse, read_tree
from search.spec.resolve import resolve, teacher_config, variant
from search.spec.study import StudySpec
from tests.studies import (
    KINDS,
    LEARNED,
    NORMALISED,
    PROMOTION,
    REMOVED,
    STUDIES,
    STUDY,
    of_kind,
    promotion,
    spec,
)

EDM = {"checkpoint": "edm-cifar10-32x32-uncond-vp"}
DDPM = {"checkpoint": "google/ddpm-cifar10-32"}
REFERENCE = "cifar10-32x32"
ONE_POINT = {**LEARNED, "rules": ["uncertainty"], "strength": {"low": 1.0, "high": 1.0}}
ARMS = PROMOTION["plan"]
PER_INTERVAL = {"name": "per-interval"}
SLOPES = {"a_1": 0.5, "a_2": 0.25}


def message(tree, **keys) -> str:
    with pytest.raises(SpecError) as error:
        spec(tree, **keys)
    return str(error.value)


# What is changed, the key that is named, and what is said of it.
OF_ANY_METHOD = [
    ({"method": ["sfd"]}, "method", "a mapping with a name and its settings, got ['sfd']"),
    ({"method__name": REMOVED}, "method", "a mapping with a name"),
    ({"method__name": "sdf"}, "method", "'sdf'; there are sfd, .*; did you mean sfd?"),
    ({"method__substepp": 2}, "method.substepp", "did you mean substeps?"),
    ({"method__sampler": 2}, "method.sampler", "is unknown"),
    ({"method__lr": math.nan}, "method.lr", "above 0, got nan"),
    ({"method__batch": 0}, "method.batch", "at least 1, got 0"),
    ({"method__optimizer": "adma"}, "method.optimizer", "adam, adamw, sgd, .* mean adam"),
    ({"method__weight_decay": 0.1}, "method.weight_decay", "0.1 needs `optimizer` adamw"),
    ({"method__schedule": "logsn"}, "method.schedule", "did you mean logsnr?"),
    ({"resources": {"gpus": 3}}, "method.batch", "64 .* resources.gpus 3"),
    ({"confirm": {"method": {"lrs": 3}}}, "confirm.method.lrs", "did you mean lr?"),
    ({"plan": {**ARMS, "variants": [{}, {"lr": 0}]}}, "plan.variants.1.lr", "got 0"),
]
OF_ANY = [
    ({"budgett": 3}, "budgett", "is unknown"),
    ({"method": REMOVED}, "method", "is missing"),
    ({"weights": "lerned"}, "weights", "did you mean learned?"),
    ({"weights": {"name": "linear"}}, "weights", "did you mean log-linear?"),
    ({"weights": 3}, "weights", "a mapping with a name and its settings, got 3"),
    ({"weights": {**NORMALISED, "larges": 1}}, "weights.larges", "did you mean largest?"),
    ({"weights": {"name": "normalised", "a": {"low": math.nan}}}, "weights.a.low", "got nan"),
    ({"plan": REMOVED}, "plan", "missing"),
    ({"plan": 7}, "plan", "a mapping with trials or arms, got 7"),
    ({"plan": {"trials": 1, "sampler": ["GPSampler"]}}, "plan.sampler", "with a name"),
    ({"plan": {"trials": 1, "sampler": "GPSample"}}, "plan.sampler.name", "mean GPSampler?"),
    ({"plan": {"trials": 1, "images": 64}}, "plan.images", "64 .* at: [...]"),
    ({"plan": {"trials": 1, "at": [0.5, 0.25]}}, "plan.at", "[0.5, 0.25] must ascend"),
    ({"plan": {"trials": 1, "at": [1.0]}}, "plan.at", "below 1, got [1.0]"),
    ({"plan": {**ARMS, "trials": 3}}, "plan", "arms, .* trials of a search"),
    ({"plan": {**ARMS, "arms": ["plaim"]}}, "plan.arms", "plain, uniform .*'plaim'"),
    ({"plan": {**ARMS, "arms": ["plain", {"c": 1}]}}, "plan.arms.1", "the parameters c"),
    ({"plan": {**ARMS, "arms": [{"a": "x"}]}}, "plan.arms.0", ""),
    ({"plan": {**ARMS, "seeds": []}}, "plan.seeds", "[] must name one seed or more"),
    ({"plan": {**ARMS, "seeds": [1, 1]}}, "plan.seeds", "[1, 1] must .* each once"),
    ({"plan": {**ARMS, "latents": "own"}}, "plan.latents", "shared, fresh, got own"),
    ({"teacher": {}}, "teacher", "got none of them"),
    ({"teacher__checkpoint": "x.pkl"}, "teacher", "got checkpoint and train"),
    ({"teacher": {"recipe": "latent-digitz"}}, "teacher.recipe", "latent-digits"),
    ({"teacher": {"recipe": "latent-digits"}}, "prompts", "give a file of prompts"),
    ({"prompts": __file__}, "prompts", "takes no text"),
    ({"teacher__train__kimg": 0}, "teacher.train.kimg", "got 0"),
    ({"teacher__train__network__model_channels": 6}, "teacher.train.network", "multiple of 4"),
    (
        {"teacher__train__network": {"num_blok": 3}},
        "teacher.train.network.num_blok",
        "mean num_blocks",
    ),
    ({"evaluation__metrics": ["fid", "is"]}, "evaluation.metrics", "got ['fid', 'is']"),
    ({"evaluation__metrics": ["kid"]}, "evaluation", "['kid'] lack fid"),
    (
        {"evaluation__metrics": ["fid", "prc"], "evaluation__reference": REFERENCE},
        "evaluation",
        "drop reference",
    ),
    ({"seeds": {"sampler": 2**31}}, "seeds.sampler", "got 2147483648"),
    ({"resources": {"gpus": -1}}, "resources.gpus", "auto or a number .* 0, got -1"),
    ({"resources": {"gpus": 1.5}}, "resources.gpus", "give 0 to 1, 1 or 2"),
    (
        {"resources": {"compile": True, "gradient_checkpointing": True}},
        "resources.compile",
        "gradient_checkpointing",
    ),
    ({"resources": {"log": ["tensorboard:~nosuchuser/x"]}}, "resources.log", "~nosuchuser/x"),
    ({"data": "folder:~nosuchuser/x"}, "data", "~nosuchuser/x"),
    ({"prompts": "~nosuchuser/x"}, "prompts", "~nosuchuser/x"),
    ({"resources": {"log": ["mine:x"]}}, "resources.log", "tensorboard.* mine"),
    ({"resources": {"log": ["tensorboard"]}}, "resources.log", "tensorboard:DIR"),
    (
        {"resources": {"log": ["mlflow:https://me:secret@host/x"]}},
        "resources.log",
        r"mlflow:https://me:***@host/x .* MLFLOW_TRACKING_PASSWORD",
    ),
    (
        {"resources": {"log": ["mlflow:postgresql://host/x?password=secret"]}},
        "resources.log",
        r"mlflow:postgresql://host/x?password=*** .* MLFLOW_TRACKING_URI",
    ),
    ({"precision": "float8"}, "precision", "float16, fast, got 'float8'"),
    ({"precision": "tf32", "resources": {"gpus": 0}}, "precision", "tf32 needs a CUDA device"),
    ({"data": REMOVED}, "data", "missing"),
    ({"name": "Digits NFE 2"}, "name", "'Digits NFE 2'"),
    ({"name": "cache"}, "name", "'cache' is a folder"),
    ({"name": "digits.baselines"}, "name", "'digits.baselines'"),
]
SFD_ALONE = [
    ({"method__solver": "dpm"}, "method.solver", "did you mean dpm2?"),
    ({"method__order": 4}, "method", "dpmpp.* order .* 1 to 3, got 4"),
    ({"weights": ONE_POINT}, "plan.trials", "4 trials would all be the same"),
    ({"weights": {**NORMALISED, "largest": 0.5}}, "weights.largest", "0.5 rules out .* is 1;"),
    (
        {"weights": LEARNED, "resources": {"compile": True}},
        "weights",
        "gradients .* resources.compile",
    ),
    ({"weights": {**PER_INTERVAL, "intervals": 3}}, "weights.intervals", "3, .* trains 2 inter"),
    ({"weights": PER_INTERVAL, "method__nfe": [2, 3]}, "weights", "the same intervals, 2 or more"),
    (
        {"weights": PER_INTERVAL, "confirm": {"method": {"nfe": 3}}},
        "confirm.method",
        "intervals .* of per-interval weights",
    ),
    ({"plan__trails": 3}, "plan.trails", "did you mean trials?"),
    ({"plan__at": [0.01]}, "plan.at", "[0.01] of 40 updates .* after [0]"),
    ({"plan__at": [0.5, 0.501]}, "plan.at", "after [20, 20]"),
    ({"plan__at": [0.5], "plan__images": 512}, "plan.images", "512 .* evaluation.images 256"),
    ({"plan__sampler": {"name": "TPESampelr"}}, "plan.sampler.name", "did you mean TPESampler?"),
    ({"plan__sampler": {"name": "BaseSampler"}}, "plan.sampler.name", "no class BaseSampler"),
    ({"plan__sampler": {"name": "TPESampler", "trials": 3}}, "plan.sampler", "n_startup_trials"),
    ({"plan__sampler": {"name": "TPESampler", "seed": 3}}, "plan.sampler", "seeds.sampler"),
    (
        {
            "weights": NORMALISED,
            "plan__sampler": {"name": "GridSampler", "search_space": {"a": [0.0, 1.0, 2.0]}},
        },
        "plan.trials",
        "4 .* the 3 points",
    ),
    ({"plan__sampler": {"name": "BruteForceSampler"}}, "plan.sampler", "step"),
    ({"plan__pruner": {"name": "MedianPruner"}}, "plan.pruner", "MedianPruner .* plan.at"),
    ({"plan__pruner": {"name": "MedianPrune"}}, "plan.pruner.name", "did you mean MedianPruner?"),
    ({"plan__pruner": {"name": "MedianPruner", "factor": 3}}, "plan.pruner", "n_warmup_steps"),
    (
        {"plan__pruner": {"name": "PatientPruner", "wrapped_pruner": {"name": "Median"}}},
        "plan.pruner.wrapped_pruner.name",
        "no class Median",
    ),
    ({"teacher": EDM, "data": REMOVED}, "data", "missing: evaluation.reference"),
    ({"teacher": EDM}, "teacher", "(3, 32, 32) .* digits holds (1, 8, 8)"),
    ({"teacher__train__loss": "v"}, "teacher.train.loss", "v is for a process"),
]
PD_ALONE = [
    ({"method__until": REMOVED}, "method.until", "missing"),
    ({"plan": {**ARMS, "arms": [SLOPES]}}, "plan.arms.0", "of 2 intervals .* that trains 1 in"),
    ({"method__prediction_type": "eps"}, "method.prediction_type", "did you mean epsilon?"),
    ({"precision": "float16"}, "method", "bfloat16"),
    ({"plan": {"trials": 3, "at": [0.5]}}, "plan.at", "2 stages"),
    ({"data": REMOVED, "teacher": DDPM, "evaluation__reference": REFERENCE}, "data", "missing"),
    # Before anything is spent.
    ({"teacher__train__precond": REMOVED}, "method", "precond='edm' .* choose another"),
]


@pytest.mark.parametrize(
    ("tree", "keys", "key", "said"),
    [
        *((of_kind("sfd", "search"), *each) for each in OF_ANY),
        *((of_kind(name, "search"), *each) for name in METHODS for each in OF_ANY_METHOD),
        *((STUDY, *each) for each in SFD_ALONE),
        *((PROMOTION, *each) for each in PD_ALONE),
    ],
)
def test_a_mistake_is_named_by_file_and_key(tree, keys, key, said):
    told = message(tree, **keys)
    assert told.startswith(f"study.yaml: {key}")
    assert told.removeprefix(f"study.yaml: {key}")[0] in ": "
    place = 0
    for words in said.split(".*"):
        assert words.strip() in told[place:], told
        place = told.index(words.strip(), place)
    assert "\n" not in told


def test_mistakes_of_several_sections_are_told_at_once():
    told = message(
        STUDY,
        data="digitz",
        method__nfee=2,
        method__lr=-1,
        weights={**NORMALISED, "a": {"low": 2, "high": 1}},
        evaluation__extractor="vgg",
        resources={"compile_mode": "reduce-overhead", "log": ["nowhere"]},
    )
    assert [line.split()[1].rstrip(":") for line in told.splitlines()] == [
        "data",
        "weights.a.low",
        "method.nfee",
        "method.lr",
        "resources.compile_mode",
        "evaluation.extractor",
        "resources.log",
    ]


def test_mistakes_in_one_section_are_told_at_once():
    told = message(STUDY, name="My_Study", plan={"trials": 0, "raze": 1}, evaluation__batch=0)
    keys = [line.split()[1] for line in told.splitlines()]
    assert keys == ["name", "plan.raze", "plan.trials", "evaluation.batch"]


def test_there_is_a_slope_for_each_interval_that_the_method_trains():
    space = spec(weights=PER_INTERVAL, method__nfe=3).space
    assert [*space.distributions()] == ["a_1", "a_2", "a_3"]
    arms = {"arms": ["plain", SLOPES], "seeds": [0]}
    assert spec(plan=arms).given.arms == ("plain", SLOPES)


def test_intermediate_fids_of_a_round_that_needs_no_conversion():
    """The teacher predicts v as asked, so that the one round may be measured on its way."""
    plan = {"trials": 3, "at": [0.5]}
    method = {"method__until": 4, "method__prediction_type": "v_prediction"}
    found = spec(PROMOTION, plan=plan, **method)
    assert [stage.nfe for stage in found.resolved.stages] == [4]


def test_every_mistake_of_the_form_has_a_line():
    lines = message(STUDY, plan__trials=0, evaluation__images="many", colour="red").splitlines()
    keys = [line.removeprefix("study.yaml: ").split(" ")[0] for line in lines]
    assert sorted(keys) == ["colour", "evaluation.images", "plan.trials"]
    assert not any("facts" in line for line in lines)  # no user may write them


@pytest.mark.parametrize(
    ("section", "registry", "wrong"),
    [("method", METHODS, {"x": 1}), ("weights", WEIGHT_SPACES, "x")],
    ids=["methods", "weight spaces"],
)
def test_every_knob_of_every_member_is_named_where_it_is_wrong(section, registry, wrong):
    for name in registry:
        tree = of_kind(name if section == "method" else "sfd", "search")
        known = knobs_of(getattr(registry[name], "Config", registry[name]))
        settings = tree["method"] if section == "method" else {}
        usual = {key: value for key, value in settings.items() if key in known}
        for knob in known:
            given = {**usual, "name": name, knob: wrong}
            told = message(tree, **{section: given})
            assert told.startswith(f"study.yaml: {section}.{knob} must be")


# ---- what is left out ----


def test_the_methods_defaults_are_filled_in():
    sfd = spec(method={"name": "sfd"}, evaluation={}, weights="normalised")
    assert sfd.method.options == SFDConfig().as_dict()
    assert (sfd.method.options["substeps"], sfd.method.options["lr"]) == (4, 5e-5)
    assert (sfd.evaluation.images, sfd.evaluation.extractor) == (50_000, "inception")
    assert sfd.search.sampler.name == "TPESampler"
    rounds = {"steps": 8, "until": 2}
    pd = promotion(method={"name": "progressive", **rounds}, plan={"arms": ["plain"]})
    assert pd.method.options == PDConfig(**rounds).as_dict()
    assert (pd.method.options["lr"], pd.method.options["batch"]) == (5e-5, 128)
    assert pd.plan.seeds == (0, 1, 2)
    assert pd.weights.name == "normalised"


@pytest.mark.parametrize(("method", "plan"), KINDS)
def test_what_is_resolved_is_read_as_the_same_study(method, plan):
    study = spec(of_kind(method, plan))
    again = resolve(parse(yaml.safe_load(as_yaml(study)), source="study.yaml"))
    assert again == study
    assert again.fingerprint() == study.fingerprint()
    assert StudySpec.read(json.loads(json.dumps(study.as_dict()))) == study
    assert study.is_search == (plan == "search")


def test_the_facts_are_known_without_the_engine():
    sfd, pd = spec().resolved, promotion().resolved
    assert (sfd.title, sfd.num_branches, sfd.batch, sfd.needs_data) == ("SFD", 4, 64, False)
    assert [(s.name, s.num_updates, s.nfe, s.branched) for s in sfd.stages] == [("", 40, 2, True)]
    assert (pd.num_branches, pd.batch, pd.needs_data) == (2, 64, True)
    assert [(s.name, s.num_updates, s.nfe) for s in pd.stages] == [
        ("00004", 10, 4),
        ("00002", 10, 2),
    ]


def test_a_round_converts_a_teacher_that_predicts_something_else_alone():
    kept = promotion(method__prediction_type="v_prediction").resolved.stages
    converted = promotion(method__prediction_type="sample").resolved.stages
    assert [stage.name for stage in kept] == ["00004", "00002"]
    assert [(stage.name, stage.branched) for stage in converted] == [
        ("00008", False),
        ("00004", True),
        ("00002", True),
    ]


def test_a_variant_has_its_own_facts():
    study = spec()
    assert variant(study, {}) is study
    longer = variant(study, {"kimg": 5.12, "nfe": 3})
    assert (longer.resolved.stages[0].num_updates, longer.resolved.stages[0].nfe) == (80, 3)
    assert longer.method.options == {**study.method.options, "kimg": 5.12, "nfe": 3}
    with pytest.raises(InputError, match=r"method\.kimgs is unknown; did you mean kimg"):
        variant(study, {"kimgs": 5})


# ---- teachers, data, machines ----


def test_a_teachers_recipe_in_the_engines_terms():
    recipe = {
        "precond": {"name": "cosine", "prediction_type": "sample"},
        "loss": "constant",
        "flip": True,
        "clip": 1.0,
    }
    study = spec(**{f"teacher__train__{key}": value for key, value in recipe.items()})
    teacher = teacher_config(study.teacher.train)
    assert {key: teacher.as_dict()[key] for key in recipe} == recipe
    assert (teacher.kimg, teacher.warmup_kimg, teacher.batch) == (10, 10, 256)


def test_a_finished_teacher_and_a_reference_need_no_data():
    of_32 = {"teacher": EDM, "evaluation__extractor": "inception"}
    study = spec(**of_32, evaluation__reference=REFERENCE, data=REMOVED)
    assert (study.data, study.uses_data) == (None, False)
    assert "data" not in study.conditions()
    assert spec(**of_32, evaluation__reference=REFERENCE).uses_data is False
    assert spec(**of_32, data="cifar10").uses_data is True
    assert spec(evaluation__reference=REFERENCE).uses_data is True
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    learns = promotion(
        **of_32 | {"teacher": DDPM}, data="cifar10", evaluation__reference=REFERENCE
    )
    assert learns.uses_data is True


def test_of_data_files_the_first_image_is_looked_at(tmp_path):
    """Reading all of them may take long."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    of_32 = {"teacher": EDM, "evaluation__extractor": "inception"}
    assert spec(**of_32, data=f"folder:{folder}").data == f"folder:{folder}"
    folder = folder.rename(tmp_path / "grey")
    Image.new("L", (32, 32)).save(folder / "a.png")
    told = message(STUDY, **of_32, data=f"folder:{folder}")
    assert "images of (3, 32, 32) (channels, height, width) and data folder" in told


def test_a_classifier_may_come_from_a_file(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    extractor = f"digits-classifier:{tmp_path / 'mine.safetensors'}"
    assert spec(evaluation__extractor=extractor).evaluation.extractor == extractor


def test_images_that_the_extractor_does_not_take_are_named():
    assert "evaluation: digits-classifier takes" in message(STUDY, teacher=EDM, data="cifar10")
    few = {"evaluation__images": 999, "evaluation__metrics": ["fid", "kid"]}
    assert "evaluation: kid needs at least 1000 images, got 999" in message(STUDY, **few)


@pytest.mark.parametrize(
    ("gpus", "team"), [("auto", 1), (0, 1), (0.25, 1), (1, 1), (2, 2), (4.0, 4)]
)
def test_whole_gpus_make_a_team(gpus, team):
    assert spec(resources={"gpus": gpus}).resources.team == team


# ---- the studies that come along ----


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_the_studies_that_come_along_are_in_order(path):
    tree = read_tree(path)
    if "google/" in str(tree["teacher"]):
        pytest.importorskip("diffusers", reason="needs the diffusers extra")
    study = resolve(parse(tree, source=str(path)))
    assert study.name == path.stem
    assert str(path.relative_to(path.parents[1])) in path.read_text().splitlines()[1]
    if not study.is_search:
        winners = {arm["winner_of"] for arm in study.plan.arms if "winner_of" in arm}
        assert winners <= {each.stem for each in STUDIES}


def test_digits_studies_share_all_but_what_they_are_about():
    """So that cached teachers and trajectories serve both, and their FIDs compare."""
    trees = {path.stem: read_tree(path) for path in STUDIES}
    searched, learned = trees["digits-nfe2"], trees["digits-learned"]
    differing = {key for key in searched if searched[key] != learned.get(key)}
    assert differing == {"name", "weights", "plan"}
    assert trees["digits-pd"]["teacher"] == trees["promote-digits"]["teacher"]
    process = trees["promote-digits"]["teacher"]["train"].pop("precond")
    assert process == {"name": "cosine", "prediction_type": "v_prediction"}
    assert trees["promote-digits"]["teacher"] == searched["teacher"]


def test_the_paper_promotes_at_512_256_and_128_steps():
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    (path,) = (path for path in STUDIES if path.stem == "promote-cifar10")
    study = resolve(parse(read_tree(path), source=path.name))
    assert [stage.nfe for stage in study.resolved.stages] == [512, 256, 128]
    settings = {
        "updates": 50_000,
        "batch": 128,
        "lr": 5e-5,
        "optimizer": "adamw",
        "weight_decay": 0.0,
        "flip": True,
    }
    assert study.method.options == {**study.method.options, **settings}
    assert (study.evaluation.images, study.evaluation.extractor) == (50_000, "inception")


def test_what_fingerprints_leave_out_is_each_knob_s_default():
    for name, method in METHODS.items():
        usual = knobs_of(method.Config)
        for knob in _YOUNGER.keys() & usual.keys():
            default = usual[knob].default
            default = list(default) if isinstance(default, tuple) else default
            assert default == _YOUNGER[knob], (name, knob)
    assert all(
        any(knob in knobs_of(each.Config) for each in METHODS.values()) for knob in _YOUNGER
    )
