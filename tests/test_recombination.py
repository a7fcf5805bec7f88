"""Branches combined after the training: kept by distill, combined and searched by recombine."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from bdense.diffusion.branches import export_branch, recombine_branches, widen_head
from bdense.diffusion.sampling import draw_images
from bdense.errors import InputError, NonFiniteError
from bdense.methods.distill import branches_path
from bdense.metrics.recombination import search_coefficients
from bdense.models.store import load_denoiser
from tests.commands import DIGITS, SHORT, TINY, bdense, done, refused
from tests.disks import names
from tests.small import same_weights, small_teacher
from tests.test_distill import run

# ---- the search ----


@pytest.mark.parametrize("best", [[0.0, 0.05, -0.3, 1.25], [0.0, 0.0, 0.0, 1.0]])
def test_the_search_finds_the_lowest_point_of_a_bowl(best):
    asked = []

    def bowl(c):
        asked.append(list(c))
        return sum(w * (a - b) ** 2 for w, a, b in zip((9, 4, 1, 1), c, best, strict=True))

    found = search_coefficients(bowl, 4, 80)
    assert found == pytest.approx(best, abs=0.02)
    assert asked[0] == [0.0, 0.0, 0.0, 1.0]
    assert len(asked) <= 80
    assert all(math.fsum(c) == pytest.approx(1, abs=1e-12) for c in asked)


@pytest.mark.parametrize("evaluations", [1, 3])
def test_a_search_keeps_to_its_evaluations_and_its_best_point(evaluations):
    asked = []

    def falling(c):
        asked.append(c)
        return c[0]

    found = search_coefficients(falling, 4, evaluations)
    assert len(asked) == evaluations
    assert found == list(min(asked))


def test_coefficients_that_diverge_are_never_the_best():
    def measure(c):
        if c[-1] > 1.05:
            raise NonFiniteError("the model diverged")
        return (c[0] - 0.5) ** 2

    assert search_coefficients(measure, 2, 40) == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([0.5, 0.6, 0.0], r"c must sum to 1, got 0\.5, 0\.6, 0, whose sum is 1\.1"),
        ([0.0, 1.0], "3 branches need as many coefficients c, got 2: 0, 1"),
        ([math.nan, 0.0, 1.0], "coefficients c must be finite, got nan, 0, 1"),
        ([math.inf, -math.inf, 1.0], "coefficients c must be finite, got inf, -inf, 1"),
    ],
)
def test_coefficients_that_make_no_denoiser_are_refused(coefficients, message):
    with pytest.raises(InputError, match=message):
        recombine_branches(widen_head(small_teacher(), 3), coefficients)


# ---- branches that are kept ----


def test_rounds_keep_their_branches(tmp_path):
    """Branch K is the student, and a round that goes on needs what it has kept."""
    stages = list(run(tmp_path, options={"keep_branches": True}))
    assert len(stages) == 2
    for stage in stages:
        kept, metadata = load_denoiser(branches_path(stage.path))
        assert kept.num_branches == 2
        assert same_weights(kept, stage.branched)
        assert same_weights(export_branch(kept), stage.student)
        assert metadata["sampler"] == stage.metadata["sampler"]
        images = draw_images(recombine_branches(kept, [-0.2, 1.2]), stage.sampler, 2, seed=0)
        assert not torch.equal(images, draw_images(stage.student, stage.sampler, 2, seed=0))
    (again, _) = run(tmp_path, options={"keep_branches": True})
    assert same_weights(again.student, stages[0].student)
    branches_path(stages[0].path).unlink()
    with pytest.raises(InputError, match="was kept without its branches"):
        next(run(tmp_path, options={"keep_branches": True}))


def test_branches_are_kept_only_where_asked_for_and_where_there_are_some(tmp_path):
    (stage, _) = run(tmp_path)
    assert stage.branched is None
    assert not any("branches" in name for name in names(tmp_path))
    plain = torch.ones(1)
    with pytest.raises(InputError, match=r"keep_branches .* plain distillation has one"):
        run(tmp_path / "plain", weights=plain, options={"keep_branches": True})


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_cache) -> Path:
    path = tmp_path_factory.mktemp("recombine")
    (path / "cache").symlink_to(shared_cache)
    return path


@pytest.fixture(scope="module")
def branched(folder) -> Path:
    teacher, student = folder / "teacher.safetensors", folder / "student.safetensors"
    done("teacher", "--data", "digits", *TINY, "--out", teacher)
    done("distill", teacher, *SHORT, "--substeps", 2, "--keep-branches", "--out", student)
    return branches_path(student)


def test_branches_go_with_their_student(branched, tmp_path):
    teacher, out = branched.parent / "teacher.safetensors", tmp_path / "s.safetensors"
    short = ("distill", teacher, *SHORT, "--substeps", 2, "--out", out)
    done(*short, "--keep-branches")
    kept = branches_path(out).read_bytes()
    out.unlink()
    # Those of another run are not replaced, though their student is gone.
    line = refused(bdense(*short, "--seed", 1, "--keep-branches"))
    assert str(branches_path(out)) in line
    assert branches_path(out).read_bytes() == kept
    done(*short, "--seed", 1, "--force")
    assert out.exists()
    assert not branches_path(out).exists()


def combined(branched: Path, out: Path, *options: object) -> list[str]:
    cache = ("--cache", branched.parent / "cache")
    return done("recombine", branched, "--out", out, *cache, *options).splitlines()


def test_given_coefficients_make_an_ordinary_student(branched, tmp_path):
    out = tmp_path / "combined.safetensors"
    assert combined(branched, out, "--c=-0.25,1.25") == [str(out)]
    found, metadata = load_denoiser(out)
    student, known = load_denoiser(branched)
    assert found.num_branches == 1
    assert same_weights(found, recombine_branches(student, [-0.25, 1.25]))
    assert metadata["coefficients"] == [-0.25, 1.25]
    # The run's identity is that of the branched student alone.
    del known["identity"], metadata["coefficients"]
    assert metadata == known
    assert "| branches combined by | -0.25, 1.25 |" in out.with_suffix(".md").read_text()
    done("sample", out, "--images", 2, "--out", tmp_path / "x.png")
    combined(branched, out, "--c", "0,1", "--force")
    assert same_weights(load_denoiser(out)[0], export_branch(student))


def test_given_coefficients_are_measured_beside_the_last_branch(branched, tmp_path):
    """On the latents of --seed, as ``bdense fid`` measures them."""
    out = tmp_path / "combined.safetensors"
    told, verdict, path = combined(
        branched, out, "--c", "0.5,0.5", *DIGITS, "--images", 64, "--seed", 3
    )
    record = json.loads(told)
    assert (record["c"], path) == ([0.5, 0.5], str(out))
    measure = ("--cache", branched.parent / "cache", *DIGITS, "--images", 64, "--seed", 3)
    for name, file in (("combined", out), ("last_branch", branched)):
        assert json.loads(done("fid", file, *measure))["value"] == record[name]["value"]
    values = record["combined"]["value"], record["last_branch"]["value"]
    assert record["difference"] == values[0] - values[1]
    assert 0 < record["noise"] < record["combined"]["noise"]
    is_better = record["difference"] < -2 * record["noise"]
    assert verdict.startswith("better than branch 2" if is_better else "no better than branch 2")
    assert load_denoiser(out)[1]["fid"] == record["combined"]


def test_searched_coefficients_win_on_latents_that_they_have_not_seen(branched, tmp_path):
    """Else branch K is written; either way the file is what its own record says."""
    out = tmp_path / "combined.safetensors"
    told, verdict, _ = combined(branched, out, *DIGITS, "--images", 64, "--evaluations", 6)
    record = json.loads(told)
    assert sum(record["c"]) == pytest.approx(1)
    assert record["combined"]["seeds"] == {"evaluation": 0}
    found, metadata = load_denoiser(out)
    is_better = record["difference"] < -2 * record["noise"]
    c = record["c"] if is_better else [0.0, 1.0]
    assert verdict.startswith("better" if is_better else "no better")
    assert metadata["coefficients"] == c
    assert metadata["fid"] == record["combined" if is_better else "last_branch"]
    assert same_weights(found, recombine_branches(load_denoiser(branched)[0], c))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--c", "nan,1"), "--c .* got nan 1"),
        ((), "--extractor is missing: c is searched by FID; give it, or --c"),
        (("--c", "0,1", "--images", 8), "--images needs --extractor"),
        ((*DIGITS, "--evaluations", 0), "--evaluations .* at least 1, got 0"),
    ],
)
def test_what_cannot_be_combined_is_refused(branched, tmp_path, options, message):
    answer = bdense("recombine", branched, "--out", tmp_path / "x.safetensors", *options)
    assert re.search(message, refused(answer))
    assert list(tmp_path.iterdir()) == []


def test_a_student_without_its_branches_is_refused(branched, tmp_path):
    student = branched.parent / "student.safetensors"
    answer = bdense("recombine", student, "--c", "1", "--out", tmp_path / "x.safetensors")
    assert "has one branch; give a student that bdense distill wrote with" in refused(answer)
