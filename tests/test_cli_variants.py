"""``bdense`` with classes, several NFE, a second stage, learned weights, other number formats."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from bdense.cli import make_parser
from bdense.diffusion.sampling import draw_images, samplers_from
from bdense.knob_options import from_options
from bdense.methods.sfd import SFDConfig
from bdense.models.store import load_denoiser, load_tensors
from bdense.weights.weighting import FixedWeights
from tests.commands import (
    DIGITS,
    SHORT,
    SHORT_CONFIG,
    TINY,
    bdense,
    distill,
    distilled,
    done,
    drawn,
    refused,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_cache) -> Path:
    path = tmp_path_factory.mktemp("variants")
    (path / "cache").symlink_to(shared_cache)
    return path


@pytest.fixture(scope="module")
def teacher(folder) -> Path:
    """Unconditional."""
    done("teacher", *TINY, "--out", folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


@pytest.fixture(scope="module")
def conditional(folder) -> Path:
    """A teacher of ten classes."""
    done("teacher", "--conditional", *TINY, "--out", folder / "conditional.safetensors")
    return folder / "conditional.safetensors"


@pytest.fixture(scope="module")
def variable(folder, conditional) -> Path:
    """A student of ten classes, for four NFE."""
    path = folder / "variable.safetensors"
    answer = done("distill", conditional, "--nfe", 2, 5, 4, 3, *SHORT, "--out", path)
    assert answer == f"2, 3, 4, 5 NFE: {path}\n"
    return path


# ---- classes ----


def test_a_conditional_teacher_makes_a_conditional_student(conditional, folder):
    path = folder / "classes.safetensors"
    distill(conditional, path)
    student, metadata = load_denoiser(path)
    assert student.label_dim == 10
    (sampler,) = samplers_from(metadata)
    picture = folder / "classes.png"
    at_random, seven = drawn(picture, path), drawn(picture, path, "--class", 7)
    assert torch.equal(at_random, draw_images(student, sampler, 2, seed=0)[:, 0])
    assert torch.equal(seven, draw_images(student, sampler, 2, seed=0, class_index=7)[:, 0])
    assert not torch.equal(seven, drawn(picture, path, "--class", 6))


def test_a_fid_of_one_class_says_so(variable, folder):
    options = (*DIGITS, "--images", 32, "--cache", folder / "cache", "--nfe", 3)
    out = done("fid", variable, *options, "--class", 7, "--precision", "bfloat16")
    assert '"nfe": 3' in out
    assert '"class": 7, "precision": "bfloat16"}' in out
    assert '"class"' not in done("fid", variable, *options)


# ---- several NFE ----


def test_several_nfe_are_one_student(variable):
    student, metadata = load_denoiser(variable)
    assert student.step_condition
    assert (metadata["nfe"], metadata["sampler"]["num_intervals"]) == ([2, 3, 4, 5], 3)
    card = variable.with_suffix(".md").read_text()
    assert "(NFE) | 2, 3, 4, 5 |" in card
    assert "| 3, 4, 5, 6 Euler steps, the first analytical, polynomial" in card


def test_a_student_for_several_nfe_draws_with_the_one_asked_for(variable, folder):
    student, metadata = load_denoiser(variable)
    picture = folder / "several.png"
    for nfe, sampler in zip((2, 3, 4, 5), samplers_from(metadata), strict=True):
        assert (sampler.nfe, sampler.num_points) == (nfe, nfe + 2)
        images = draw_images(student, sampler, 2, seed=0)[:, 0]
        assert torch.equal(drawn(picture, variable, "--nfe", nfe), images)
    assert torch.equal(drawn(picture, variable), drawn(picture, variable, "--nfe", 2))
    line = refused(bdense("sample", variable, "--nfe", 7, "--out", picture))
    assert "distilled for (NFE 2, 3, 4 or 5), and --nfe 7 asks for another" in line


def test_the_layers_for_the_number_of_steps_may_start_at_random(teacher, folder):
    path, several = folder / "random.safetensors", ("--nfe", 1, 2, "--plain")
    hashes = {
        distill(teacher, path, *several, *start)
        for start in ((), ("--step-condition", "teacher"), ("--step-condition", "random"))
    }
    assert len(hashes) == 2


def test_the_usual_length_depends_on_what_is_made():
    """200 kimg for one NFE, 800 for several, 2000 at another step size for a second stage."""

    def config(*arguments: object) -> SFDConfig:
        given = ["distill", "teacher", *map(str, arguments), "--out", "x"]
        return from_options(SFDConfig, make_parser(given).parse_args(given))

    assert config() == SFDConfig(kimg=200, lr=5e-5, substeps=4, dropout=True)
    several = config("--nfe", 2, 3, "--no-dropout")
    assert several == SFDConfig(nfe=(2, 3), kimg=800, substeps=4, dropout=False)
    second = config("--second-stage")
    assert (second.nfe, second.kimg, second.lr, second.substeps) == (1, 2000, 5e-4, 3)
    assert config("--second-stage", "--kimg", 1, "--nfe", 2).kimg == 1


# ---- the second stage ----


def test_a_student_is_distilled_into_one_evaluation(variable, folder):
    path = folder / "one.safetensors"
    digest = distill(variable, path, "--second-stage")
    metadata = load_denoiser(path)[1]
    (sampler,) = samplers_from(metadata)
    assert (sampler.nfe, sampler.num_intervals, sampler.num_points) == (1, 2, 3)
    assert (metadata["stage"], len(metadata["weights"]), "nfe" in metadata) == (2, 3, False)
    # The teacher walks the seven points it was trained for, its own first step analytical.
    wanted = distilled(
        "sfd", variable, lambda: FixedWeights(torch.ones(3)), second_stage=True, **SHORT_CONFIG
    )
    assert [digest] == wanted
    picture = folder / "one.png"
    images = draw_images(load_denoiser(path)[0], sampler, 2, seed=0)[:, 0]
    assert torch.equal(drawn(picture, path), images)
    assert "| stage | 2:" in path.with_suffix(".md").read_text()


def test_the_second_stage_keeps_the_levels_and_the_first_step_of_the_first(teacher, folder):
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    distill(teacher, first, "--nfe", 4, "--no-afs", "--schedule", "logsnr", "--sigma-max", 40)
    distill(first, second, "--second-stage", "--substeps", 2, "--plain")
    (sampler,) = samplers_from(load_denoiser(second)[1])
    assert (sampler.schedule.kind, sampler.schedule.sigma_max) == ("logsnr", 40.0)


# ---- learned weights ----


@pytest.mark.parametrize("rule", ["uncertainty", "gradient-norm"])
def test_weights_are_learned_and_written_down(teacher, folder, rule):
    path = folder / "learned.safetensors"
    distill(teacher, path, "--learn", rule, "--strength", 0.5)
    metadata = load_denoiser(path)[1]
    assert metadata["weighting"] == {"rule": rule, "strength": 0.5, "memory": 100}
    assert math.fsum(metadata["weights"]) == pytest.approx(4)
    spelt = ", ".join(f"{weight:.4g}" for weight in metadata["weights"])
    card = path.with_suffix(".md").read_text()
    assert f"{spelt} at the end, learned by {rule} (strength 0.5, memory 100) |" in card


# ---- how it is computed ----


def test_other_number_formats_leave_float32_weights(teacher, folder, tmp_path):
    path, options = folder / "format.safetensors", ("--precision", "bfloat16", "--channels-last")
    reduced, full = distill(teacher, path, *options), distill(teacher, tmp_path / "x.safetensors")
    assert reduced != full
    assert {tensor.dtype for tensor in load_tensors(path)[0].values()} == {torch.float32}
    assert load_denoiser(path)[1]["precision"] == "bfloat16"
    picture = folder / "format.png"
    assert not torch.equal(drawn(picture, path), drawn(picture, path, *options))


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learn", "loss"), "--learn must be one of uncertainty, .* got loss"),
        (("--learn", "uncertainty", "--a", 1), "has --a 1 --learn uncertainty; there are log-li"),
        (("--strength", 2), "--learn is missing: the weights learned need it"),
        (("--weights", "normalised", "--b", 2), "the weights normalised do not have --b 2"),
        (("--learn", "uncertainty", "--plain"), "--plain leaves one branch, .* --learn uncerta"),
        (("--learn", "gradient-norm", "--compile"), "a compiled network hides; drop compile"),
        (("--precision", "tf32", "--device", "cpu"), "use float32 or bfloat16"),
        pytest.param(
            ("--device", "mps"),
            "--device mps: torch sees no Apple GPU",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="has one"),
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused(teacher, tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("CXX", sys.executable)  # there may be no compiler here
    answer = bdense("distill", teacher, *SHORT, *options, "--out", tmp_path / "s.safetensors")
    assert re.search(message, refused(answer))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--second-stage", "--solver", "heun"), "--solver must be euler with --second-stage"),
        (
            ("--second-stage", "--nfe", 3),
            "distilled for 3 or 4 or 5 or 6 intervals, .* is 12 here",
        ),
    ],
)
def test_what_cannot_be_made_of_a_student_is_refused(variable, tmp_path, options, message):
    answer = bdense("distill", variable, *SHORT, *options, "--out", tmp_path / "s.safetensors")
    assert re.search(message, refused(answer))
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_is_none_is_refused(teacher, conditional, tmp_path):
    out, cache = ("--out", tmp_path / "x.png"), ("--cache", tmp_path / "cache")
    assert "class 10 is not" in refused(bdense("sample", conditional, "--class", 10, *out))
    assert "unconditional" in refused(bdense("fid", teacher, "--class", 0, *DIGITS, *cache))
    assert list(tmp_path.iterdir()) == []
