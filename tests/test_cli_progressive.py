"""Progressive distillation, and drawing from teachers of VP processes, by the command line."""

import json
import re
from pathlib import Path

import pytest
import torch

import bdense.verbs.distill
import bdense.verbs.evaluation
from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.preconditioning import native_schedule
from bdense.diffusion.sampling import draw_images, samplers_from
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.vp import CosineSchedule
from bdense.methods.progressive import pd_sampler
from bdense.models.store import denoiser_sha256, load_denoiser
from bdense.weights.weighting import FixedWeights
from tests.commands import DIGITS, SHORT, TINY, distilled, done, drawn, refused
from tests.commands import bdense as command

PD = ("--method", "progressive")
ROUND = (*PD, "--updates", 2, "--batch", 8, "--lr", 1e-3)
STEPS = ("--steps", 8, "--until", 2)
CONFIG = {"updates": 2, "batch": 8, "lr": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("progressive")


def made(folder: Path, name: str, *options: object) -> Path:
    path = folder / f"{name}.safetensors"
    done("teacher", *TINY, *options, "--out", path)
    return path


@pytest.fixture(scope="module")
def teacher(folder) -> Path:
    """One of the cosine process."""
    return made(folder, "cosine", "--precond", "cosine", "--kimg", 1)


@pytest.fixture(scope="module")
def ddpm(folder) -> Path:
    """Of 64 times, conditional, predicting the noise."""
    process = ("--precond", "ddpm", "--timesteps", 64)
    return made(folder, "ddpm", *process, "--conditional", "--kimg", 2)


@pytest.fixture(scope="module")
def edm(folder) -> Path:
    """Without a process."""
    return made(folder, "edm")


@pytest.fixture(scope="module")
def chain(folder, teacher) -> Path:
    """8 -> 4 -> 2."""
    out = folder / "chain"
    lines = done("distill", teacher, *STEPS, *ROUND, "--out", out).splitlines()
    assert lines == [f"{steps} steps: {out / f'{steps:05d}.safetensors'}" for steps in (4, 2)]
    return out


@pytest.fixture(scope="module")
def last(chain) -> Path:
    """Its student of 2 steps."""
    return chain / "00002.safetensors"


def by_library(path: Path, folder: Path, until: int = 2) -> list[str]:
    """Hashes of the students of 8 -> 4 -> 2, with uniform weights."""
    knobs = {"steps": 8, "until": until, **CONFIG}
    weights = FixedWeights(torch.ones(2))
    return distilled("progressive", path, lambda: weights, folder=folder, **knobs)


def hashes(folder: Path, *steps: int) -> list[str]:
    paths = [folder / f"{each:05d}.safetensors" for each in steps]
    return [denoiser_sha256(load_denoiser(path)[0]) for path in paths]


# ---- chains ----


def test_a_chain_is_the_librarys(chain, teacher, tmp_path):
    assert hashes(chain, 4, 2) == by_library(teacher, tmp_path)
    student, metadata = load_denoiser(chain / "00002.safetensors")
    parent = load_denoiser(teacher)[0]
    assert student.describe() == parent.describe()
    assert samplers_from(metadata) == [pd_sampler(CosineSchedule(), 2)]
    assert metadata["kind"] == "student"
    assert (metadata["weights"], metadata["data"]) == ([0.5, 0.5], "digits")
    assert metadata["teacher"] == "cosine.safetensors"
    assert metadata["teacher_sha256"] == denoiser_sha256(parent)
    assert metadata["precision"] == "float32"
    assert metadata["training"] | CONFIG == metadata["training"]
    assert "| sampler | 2 DDIM steps, cosine" in (chain / "00002.md").read_text()


def test_every_round_is_measured_as_fid_measures_it(chain, teacher, tmp_path, shared_cache):
    """The teacher first; each file's own sampler and latents, the same conditions."""
    measure = (*DIGITS, "--images", 32, "--cache", shared_cache)
    out = tmp_path / "chain"
    made = ("distill", teacher, *STEPS, *ROUND, *measure, "--out", out)
    lines = done(*made).splitlines()
    assert lines[::2] == [
        f"teacher: {teacher}",
        *(f"{steps} steps: {out / f'{steps:05d}.safetensors'}" for steps in (4, 2)),
    ]
    fids = [json.loads(line) for line in lines[1::2]]
    native = ("--schedule", "native", "--solver", "ddim", "--nfe", 8, "--no-afs")
    assert fids[0] == json.loads(done("fid", teacher, *native, *measure))
    for fid, steps in zip(fids[1:], (4, 2), strict=True):
        path = out / f"{steps:05d}.safetensors"
        assert fid == json.loads(done("fid", path, *measure))
        assert (fid["nfe"], fid["images"], fid["seeds"]) == (steps, 32, {"evaluation": 0})
    assert hashes(out, 4, 2) == hashes(chain, 4, 2)
    # Under other conditions it is measured again, with these conditions.
    change = ("--until", 4, "--precision", "bfloat16", "--images", 16, "--out", tmp_path / "x")
    other = done(*made, *change)
    fid = json.loads(other.splitlines()[1])
    assert (fid["images"], fid["precision"]) == (16, "bfloat16")
    assert fid["value"] != fids[0]["value"]


def test_an_interrupted_chain_carries_on(chain, teacher, tmp_path, shared_cache, monkeypatch):
    """Without training or measuring again what is there."""
    out, drawings = tmp_path / "chain", []
    measure = (*DIGITS, "--images", 8, "--cache", shared_cache)
    made = ("distill", teacher, *STEPS, *ROUND, *measure, "--out", out)

    def draw(model, sampler, count, **options):
        drawings.append(sampler.num_intervals)
        return draw_images(model, sampler, count, **options)

    monkeypatch.setattr(bdense.verbs.evaluation, "draw_images", draw)
    trained = []

    def interrupt(self, plan, report):
        trained.append((plan.nfe, report.iteration))
        if trained[-1] == (2, 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(bdense.verbs.distill._StageProgress, "__call__", interrupt)
        answer = command(*made)
    assert answer.status == 130
    assert (out / "00004.safetensors").exists()
    assert not list(out.glob("*.training.safetensors"))
    assert "finished students are kept" in answer.err.splitlines()[-1]
    assert (trained, drawings) == ([(4, 0), (4, 1), (2, 0), (2, 1)], [8, 4])
    lines = done(*made).splitlines()
    assert drawings == [8, 4, 2]
    assert hashes(out, 4, 2) == hashes(chain, 4, 2)
    assert answer.out.splitlines() == lines[:4]
    # The same command prints the same lines and does no work.
    assert done(*made).splitlines() == lines
    assert drawings == [8, 4, 2]
    line = refused(command(*made, "--lr", 1e-4))
    assert "is the model of another run (differs in: lr); " in line


def test_weights_have_the_sum_1(teacher, tmp_path):
    """Whatever b: a clipped gradient would see it."""
    chosen = ("--a", 1.386294, "--b", -4.274, "--out", tmp_path)
    done("distill", teacher, "--steps", 8, "--until", 4, *ROUND, *chosen)
    weights = load_denoiser(tmp_path / "00004.safetensors")[1]["weights"]
    assert weights == pytest.approx([0.2, 0.8], abs=1e-6)


def test_a_teacher_of_noise_is_converted_first(ddpm, tmp_path):
    """It is conditional too, and keeps the 64 times that it was trained at."""
    out = tmp_path / "chain"
    change = ("--prediction-type", "v_prediction", "--clip-samples", "--flip")
    lines = done("distill", ddpm, *STEPS, *ROUND, *change, "--out", out).splitlines()
    assert [line.split(":")[0] for line in lines] == ["8 steps", "4 steps", "2 steps"]
    student, metadata = load_denoiser(out / "00002.safetensors")
    assert (student.precond.prediction_type, student.label_dim) == ("v_prediction", 10)
    knobs = {"prediction_type": "v_prediction", "clip_samples": True, "flip": True}
    assert metadata["training"] | knobs == metadata["training"]
    (sampler,) = samplers_from(metadata)
    schedule = DDPMSchedule(num_train_timesteps=64, beta_start=0.1 / 64, beta_end=20 / 64)
    assert sampler == pd_sampler(schedule, 2, clip=True)
    seven = drawn(tmp_path / "7.png", out / "00002.safetensors", "--class", 7)
    images = draw_images(student, sampler, 2, seed=0, class_index=7)
    assert torch.equal(seven, images[:, 0])


def test_a_teacher_without_a_process_is_given_levels(edm, tmp_path):
    out = tmp_path / "chain"
    levels = ("--schedule", "polynomial", "--rho", 5)
    done("distill", edm, *STEPS, *ROUND, *levels, "--out", out)
    (sampler,) = samplers_from(load_denoiser(out / "00002.safetensors")[1])
    assert sampler.schedule == Schedule(kind="polynomial", rho=5.0)


def test_a_student_is_distilled_further_on_its_own_levels(last, teacher, tmp_path):
    """In a chain of its own, which ends as a chain that had gone on would."""
    out = tmp_path / "more"
    done("distill", last, *ROUND, "--steps", 2, "--until", 1, "--out", out)
    expected = by_library(teacher, tmp_path / "whole", until=1)
    assert hashes(out, 1) == expected[-1:]


# ---- drawing ----


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("which", ["teacher", "ddpm"])
def test_a_teacher_draws_by_its_own_process(request, tmp_path, which, clip):
    path = request.getfixturevalue(which)
    loaded = load_denoiser(path)[0]
    picture, asked = tmp_path / "x.png", ("--schedule", "native", "--nfe", 4, "--no-afs")
    sampler = pd_sampler(native_schedule(loaded.precond), 4, clip=clip)
    expected = draw_images(loaded, sampler, 2, seed=0)[:, 0]
    flag = ("--clip-samples",) if clip else ()
    assert torch.equal(drawn(picture, path, *asked, "--solver", "ddim", *flag), expected)
    # There ddim is the usual solver.
    assert torch.equal(drawn(picture, path, *asked, *flag), expected)
    assert not torch.equal(drawn(picture, path, "--nfe", 4, "--no-afs"), expected)
    free = drawn(picture, path, "--schedule", "native", "--nfe", 3, *flag)
    assert not torch.equal(free, expected)


def test_a_student_draws_as_it_was_distilled_to(last, tmp_path):
    picture = tmp_path / "x.png"
    student, metadata = load_denoiser(last)
    expected = draw_images(student, samplers_from(metadata)[0], 2, seed=0)[:, 0]
    own = ("--schedule", "native", "--solver", "ddim", "--order", 1, "--nfe", 2, "--no-afs")
    assert torch.equal(drawn(picture, last), expected)
    assert torch.equal(drawn(picture, last, *own), expected)


# ---- SFD of such teachers ----


def test_a_teacher_of_a_process_is_distilled_with_sfd(teacher, ddpm, tmp_path):
    out = tmp_path / "s.safetensors"
    for path, given in ((teacher, ()), (ddpm, ("--sigma-min", 0.05))):
        done("distill", path, *SHORT, "--plain", *given, "--force", "--out", out)
        student, metadata = load_denoiser(out)
        assert student.precond == load_denoiser(path)[0].precond
        assert [each.nfe for each in samplers_from(metadata)] == [2]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distill TEACHER --steps 8 --until 3", "--steps 8 do not become --until 3 .* start at 6"),
        ("distill TEACHER --nfe 2 --steps 8 --until 2", "--nfe; --method sfd or consistency has"),
        ("distill EDM --steps 8 --until 2", "schedule native needs"),
        ("distill EDM --schedule logsnr --steps 8 --until 2 --out EDM", "--out .* is a file"),
        ("sample TEACHER --schedule native --rho 5 --out PICTURE", "--rho 5 is for another"),
        ("sample TEACHER --schedule logsnr --rho 5 --out PICTURE", "--rho 5 does nothing with"),
        ("sample TEACHER --schedule native --solver heun --clip-samples --out PICTURE", "no clip"),
        ("sample LAST --clip-samples --out PICTURE", r"\(NFE 2\), and --clip-samples asks"),
        ("sample LAST --nfe 4 --out PICTURE", r"\(NFE 2\), and --nfe 4 asks"),
        ("sample LAST --schedule logsnr --out PICTURE", r"\(NFE 2\), and --schedule logsnr asks"),
        ("sample LAST --solver euler --out PICTURE", r"\(NFE 2\), and --solver euler asks"),
    ],
)
def test_what_cannot_be_done_is_refused(refusal, words, message):
    if not words.startswith("distill"):
        assert re.search(message, refusal(words))
        return
    out = "" if "--out" in words else " --out HERE/chain"
    assert re.search(message, refusal(f"{words}{out}", *ROUND))
