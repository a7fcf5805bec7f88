"""Promotions: what is wrong in a file is named, and what changes a chain's numbers its mark."""

import math
import re
from typing import get_args

import pytest
import torch
import yaml
from search.spec.promotion_spec import PromotionSpec, RoundSpec
from search.spec.study_file import as_yaml, parse_promotion, read_promotion
from search.worker.chain_engine import (
    chain_of,
    chain_schedule,
    chain_weights,
    check_promotion,
    round_config,
)

from bdense.diffusion.preconditioning import PREDICTIONS, Cosine
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.snr_weights import LOSSES
from bdense.diffusion.vp import CosineSchedule
from bdense.methods.progressive import Optimizer, PDConfig, WeightsSpace
from search.errors import SpecError
from search.study.arms import UNIFORM, Arm
from tests.small import small_teacher
from tests.studies import CHAIN, PROMOTIONS, REMOVED, STUDIES, changed, promotion

EDM = {"checkpoint": "edm-cifar10-32x32-uncond-vp"}
DDPM = {"checkpoint": "google/ddpm-cifar10-32"}
LEVELS = {"kind": "polynomial", "sigma_max": 40.0}


def message(**keys) -> str:
    with pytest.raises(SpecError) as error:
        check_promotion(parse_promotion(changed(CHAIN, **keys), source="promotion.yaml"))
    return str(error.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rounds": 3}, "^promotion.yaml: rounds: unknown key; check the spelling$"),
        ({"student": {"nfe": 2}}, "^promotion.yaml: student: unknown key"),
        ({"chain__middle": 4}, "chain.middle: unknown key"),
        ({"chain": REMOVED}, "^promotion.yaml: chain: this key is missing$"),
        ({"chain__last": REMOVED}, "chain.last: this key is missing"),
        ({"round__updates": REMOVED}, "round.updates: this key is missing"),
        ({"chain": 8}, "chain: Input should be a mapping of first, last, substeps, got 8"),
        ({"chain__substeps": 1}, "chain.substeps: .* equal to 2, got 1"),
        ({"chain__last": 0}, "chain.last: .* equal to 1, got 0"),
        (
            {"chain__last": 3},
            "8 steps do not become 3 by dividing by K=2 .*; end at 4 or 2, or start at 6$",
        ),
        ({"chain__first": 2}, "a chain goes down from the teacher's steps .* got 2 to 2"),
        ({"round__updates": 0}, "round.updates: .* equal to 1, got 0"),
        ({"precision": "float16"}, "precision float16: the gradients .* use bfloat16$"),
        (
            {"evaluation__metrics": ["fid", "kid"]},
            r"evaluation.metrics \['fid', 'kid'\]: .* alone",
        ),
        ({"round__lr": math.inf}, "round.lr: .* finite number, got inf"),
        ({"round__optimizer": "lion"}, "round.optimizer: .* 'adam', 'adamw' or 'sgd', got 'lion'"),
        ({"round__loss": "l1"}, "round.loss: .* 'snr_trunc' or 'v', got 'l1'"),
        ({"round__clip_norm": 0}, "round.clip_norm: .* greater than 0, got 0"),
        ({"round__weight_decay": -1}, "round.weight_decay: .* equal to 0, got -1"),
        (
            {"round__weight_decay": 0.1},
            "^promotion promote-digits: weight_decay=0.1 with optimizer='adam': only adamw",
        ),
        (
            {"prediction_type": "eps"},
            "prediction_type: .* 'epsilon', 'sample' or 'v_prediction', got 'eps'",
        ),
        ({"weights_space": "latent"}, "weights_space: .* 'clean' or 'state', got 'latent'"),
        (
            {"schedule": "nativ"},
            "^promotion.yaml: schedule: Input should be 'native' or a mapping of kind, rho, "
            "sigma_min, sigma_max, got 'nativ'$",
        ),
        ({"schedule": 3}, "^promotion.yaml: schedule: .* 'native' or a mapping of kind.*, got 3$"),
        (
            {"schedule": {"kind": "linear"}},
            "^promotion.yaml: schedule.kind: Input should be 'polynomial', .*, got 'linear'$",
        ),
        ({"schedule": {"sigma": 1}}, "^promotion.yaml: schedule.sigma: unknown key; check the sp"),
        (
            {"schedule": {"sigma_min": 90.0}},
            "^promotion.yaml: schedule: sigma_min 90.0 must be below sigma_max 80.0$",
        ),
        (
            {"seeds": {"training": []}},
            r"seeds.training: \[\] must name one seed or more, each once",
        ),
        ({"seeds": {"training": [1, 1]}}, r"seeds.training: \[1, 1\] must name .* each once"),
        ({"seeds": {"training": [-1]}}, "seeds.training.0: .* equal to 0, got -1"),
        ({"seeds": {"sampler": 1}}, "seeds.sampler: unknown key"),
        (
            {"resources": {"gpus": 2}},
            "^promotion.yaml: promotion: resources.gpus 2: a chain .* runs on one GPU; give 1, a",
        ),
        (
            {"data": REMOVED},
            "^promotion.yaml: promotion: data is missing; name the data set whose images are le",
        ),
        (
            {"data": REMOVED, "teacher": DDPM, "evaluation__reference": "cifar10-32x32"},
            "promotion: data is missing; name the data set whose images are learned from",
        ),
        ({"teacher": {}}, "teacher: give either checkpoint: FILE or train: {...}, one of the two"),
        ({"data": "digitz"}, "data: unknown data set 'digitz'; known are"),
        ({"evaluation__extractor": "inceptoin"}, "evaluation.extractor: there is no 'inceptoin'"),
        (
            {"teacher__train__network": {"model_channels": 6}},
            r"teacher.train.network \{'model_channels': 6\}: .* a multiple of 4",
        ),
        (
            {"precision": "tf32", "resources": {"gpus": 0}},
            "^promotion promote-digits: precision tf32 needs a CUDA device",
        ),
        (
            {"teacher__train__precond": REMOVED},
            "^promotion promote-digits: schedule: native: the teacher has precond edm, which has "
            r"no process of its own; give a schedule \(kind, sigma_min, sigma_max\), or train a",
        ),
        (
            {"teacher": EDM, "data": "cifar10"},
            "schedule: native: the teacher has precond edm, which has no process of its own",
        ),
        (
            {
                "teacher__train__precond": REMOVED,
                "schedule": LEVELS,
                "prediction_type": "sample",
            },
            "prediction_type sample: the teacher has precond edm, which has no prediction type; "
            "leave it out",
        ),
    ],
)
def test_a_mistake_is_named_by_its_key_and_value(keys, expected):
    told = message(**keys)
    assert re.search(expected, told)
    assert "\n" not in told


def test_a_teacher_of_other_images_is_refused():
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    assert re.search(
        r"teacher.checkpoint: google/ddpm-cifar10-32 makes images of \(3, 32, 32\) .* and data "
        r"digits holds \(1, 8, 8\); choose another of the two$",
        message(teacher=DDPM),
    )


def test_every_mistake_has_a_line():
    lines = message(schedule={"kind": 1, "rho": 0}, round__lr="fast", colour="red").splitlines()
    keys = [line.split(": ")[1] for line in lines]
    assert sorted(keys) == ["colour", "round.lr", "schedule.kind", "schedule.rho"]


def test_what_is_left_out_has_the_references_values():
    """But for its number of updates, those of ``PDConfig``."""
    left_out = RoundSpec(updates=10)
    assert round_config(promotion(round={"updates": 10}), 2, seed=0) == PDConfig(
        updates=10, num_branches=2
    )
    assert (left_out.batch, left_out.lr, left_out.loss) == (128, 5e-5, "snr_trunc")
    given = promotion()
    assert (given.chain.substeps, given.schedule, given.seeds.training) == (2, "native", (0, 1, 2))
    assert (given.weights_space, given.clip_samples, given.study) == ("clean", False, None)


def test_the_choices_of_the_spec_are_the_engines():
    """Spelt out in the spec, which a launcher reads without torch."""
    fields = RoundSpec.model_fields
    assert get_args(fields["optimizer"].annotation) == get_args(Optimizer)
    assert get_args(fields["loss"].annotation) == LOSSES
    fields = PromotionSpec.model_fields
    assert get_args(fields["weights_space"].annotation) == get_args(WeightsSpace)
    assert get_args(get_args(fields["prediction_type"].annotation)[0]) == PREDICTIONS


def test_a_promotion_in_the_engines_terms():
    spec = promotion(round__flip=True, round__clip_norm=None, weights_space="state")
    assert chain_of(spec).students == spec.chain.steps[1:] == (4, 2)
    config = round_config(spec, 1, seed=5)
    assert (config.updates, config.batch, config.lr, config.seed) == (10, 64, 3e-4, 5)
    assert (config.flip, config.clip_norm, config.weights_space) == (True, None, "state")
    assert (config.substeps, config.num_branches) == (2, 1)
    teacher = small_teacher()
    given = promotion(schedule=LEVELS)
    assert chain_schedule(given, teacher) == Schedule(kind="polynomial", sigma_max=40.0)
    teacher.precond = Cosine(logsnr_max=10.0)
    assert chain_schedule(spec, teacher) == CosineSchedule(logsnr_max=10.0)


def test_an_arms_weights_sum_to_one():
    """Clipped gradients see the scale."""
    given = Arm(name="promoted", params={"a": math.log(4), "b": -4.274})
    assert chain_weights(given, 2).tolist() == pytest.approx([0.2, 0.8])
    assert chain_weights(UNIFORM, 4).tolist() == [0.25] * 4
    assert torch.equal(
        chain_weights(Arm(name="plain", params={"method": "pd"}), 2), torch.ones(1).double()
    )


# ---- the fingerprint ----


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "another"},
        {"study": "digits-nfe2"},
        {"seeds": {"training": [7]}},
        {"chain__substeps": 2},  # the default, spelt out
        {"schedule": "native"},
        {"round__optimizer": "adam"},
        {"resources": {"cpus": 2, "threads": 2, "gpus": 0.5, "compile": True, "max_attempts": 5}},
        {"evaluation__batch": 32},
    ],
)
def test_what_leaves_the_numbers_alone_leaves_the_fingerprint_alone(keys):
    assert promotion(**keys).conditions() == promotion().conditions()
    assert promotion(**keys).fingerprint() == promotion().fingerprint()


@pytest.mark.parametrize(
    ("keys", "differs"),
    [
        ({"data": "cifar10"}, {"data"}),
        ({"precision": "bfloat16"}, {"precision"}),
        ({"teacher__train__seed": 1}, {"teacher.train.seed"}),
        ({"chain__first": 16}, {"chain.first"}),
        ({"chain__last": 4}, {"chain.last"}),
        ({"prediction_type": "sample"}, {"prediction_type"}),
        ({"clip_samples": True}, {"clip_samples"}),
        ({"weights_space": "state"}, {"weights_space"}),
        ({"seeds": {"evaluation": 1}}, {"seeds.evaluation"}),
        ({"evaluation__images": 512}, {"evaluation.images"}),
        *(
            ({f"round__{key}": value}, {f"round.{key}"})
            for key, value in {
                "updates": 11,
                "batch": 32,
                "lr": 1e-4,
                "anneal": False,
                "optimizer": "adamw",
                "weight_decay": 0.1,
                "clip_norm": None,
                "loss": "v",
                "clip_targets": True,
                "dropout": True,
                "flip": True,
            }.items()
        ),
    ],
)
def test_what_changes_the_numbers_changes_the_fingerprint(keys, differs):
    before, after = promotion().conditions(), promotion(**keys).conditions()
    assert {key for key in before | after if before.get(key) != after.get(key)} == differs
    assert promotion(**keys).fingerprint() != promotion().fingerprint()


def test_another_schedule_is_another_condition():
    before, after = promotion().conditions(), promotion(schedule=LEVELS).conditions()
    assert before["schedule"] == "native"
    assert {key for key in after if key.startswith("schedule")} == {
        "schedule.kind",
        "schedule.rho",
        "schedule.sigma_min",
        "schedule.sigma_max",
    }


def test_a_round_has_no_key_that_is_no_condition():
    """A new one is a condition by itself."""
    conditions = promotion().conditions()
    assert {f"round.{name}" for name in RoundSpec.model_fields} <= set(conditions)


def test_a_hub_model_stands_for_itself():
    conditions = promotion(teacher=DDPM, data="cifar10").conditions()
    assert conditions["teacher.checkpoint"] == "google/ddpm-cifar10-32"
    assert "teacher.checkpoint_sha256" not in conditions


# ---- those that come along ----


@pytest.mark.parametrize("path", PROMOTIONS, ids=lambda path: path.name)
def test_the_promotions_that_come_along_are_in_order(path, tmp_path):
    spec = read_promotion(path)
    if spec.teacher.checkpoint is not None:
        pytest.importorskip("diffusers", reason="needs the diffusers extra")
    check_promotion(spec)
    assert spec.name == path.stem
    assert spec.study in {study.stem for study in STUDIES}
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml(spec))
    assert read_promotion(again) == spec
    # What a user copies from the file's head is this file.
    head = path.read_text().splitlines()[1]
    assert head.startswith(f"# bdense-search promote {spec.study} --to studies/{path.name}")


def test_the_paper_promotes_at_512_256_and_128_steps():
    (path,) = (path for path in PROMOTIONS if "cifar10" in path.name)
    spec = read_promotion(path)
    assert chain_of(spec).students == spec.chain.steps[1:] == (512, 256, 128)
    round_ = spec.round
    assert (round_.updates, round_.batch, round_.lr) == (50_000, 128, 5e-5)
    assert (round_.optimizer, round_.weight_decay, round_.flip) == ("adamw", 0.0, True)
    assert (spec.evaluation.images, spec.evaluation.extractor) == (50_000, "inception")


def test_the_digits_teacher_is_the_studys_but_for_its_process():
    by_name = {path.stem: yaml.safe_load(path.read_text()) for path in (*PROMOTIONS, *STUDIES)}
    ours, theirs = by_name["promote-digits"]["teacher"], by_name["digits-nfe2"]["teacher"]
    process = ours["train"].pop("precond")
    assert process == {"name": "cosine", "prediction_type": "v_prediction"}
    assert ours == theirs
