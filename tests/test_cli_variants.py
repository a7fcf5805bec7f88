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
from bdense.models.store import load_denoiser
from bdense.weights.weighting import FixedWeights
from tests.commands import (
    DIGITS,
    SHORT,
    SHORT_CONFIG,
    TINY,
    distill,
    distilled,
    done,
    drawn,
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


def test_a_student_for_several_nfe_draws_with_the_one_asked_for(variable, folder):
    student, metadata = load_denoiser(variable)
    picture = folder / "several.png"
    for nfe, sampler in zip((2, 3, 4, 5), samplers_from(metadata), strict=True):
        assert (sampler.nfe, sampler.num_points) == (nfe, nfe + 2)
        images = draw_images(student, sampler, 2, seed=0)[:, 0]
        assert torch.equal(drawn(picture, variable, "--nfe", nfe), images)
    usual = drawn(picture, variable)
    assert torch.equal(usual, drawn(picture, variable, "--nfe", 2))
    assert not torch.equal(usual, drawn(picture, variable, "--precision", "bfloat16"))


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


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distill TEACHER --learn loss", "--learn must be one of uncertainty, .* got loss"),
        ("distill TEACHER --learn uncertainty --a 1", "has --a 1 --learn uncertainty; there are"),
        ("distill TEACHER --strength 2", "--learn is missing: the weights learned need it"),
        ("distill TEACHER --weights normalised --b 2", "normalised do not have --b 2"),
        ("distill TEACHER --learn uncertainty --plain", "--plain .* --learn uncertainty"),
        ("distill TEACHER --learn gradient-norm --compile", "drop compile"),
        ("distill TEACHER --precision tf32 --device cpu", "use float32 or bfloat16"),
        pytest.param(
            "distill TEACHER --device mps",
            "--device mps: torch sees no Apple GPU",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="has one"),
        ),
        ("distill VARIABLE --second-stage --solver heun", "--solver must be euler with --second"),
        ("distill VARIABLE --second-stage --nfe 3", "for 3 or 4 or 5 or 6 intervals, .* is 12"),
        ("sample VARIABLE --nfe 7", r"\(NFE 2, 3, 4 or 5\), and --nfe 7 asks for another"),
        ("sample CONDITIONAL --class 10", "class 10 is not"),
        ("sample TEACHER --class 0", "unconditional"),
    ],
)
def test_what_cannot_be_done_is_refused(refusal, monkeypatch, words, message):
    monkeypatch.setenv("CXX", sys.executable)  # there may be no compiler here
    more = SHORT if words.startswith("distill") else ()
    assert re.search(message, refusal(f"{words} --out OUT", *more))
