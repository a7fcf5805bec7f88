"""Methods that learn from images, with teachers of latents: guidance, captions, encoded images."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch

import bdense
from bdense.data.datasets import Dataset, to_float
from bdense.data.encoded import EncodedDataset, embed_prompts, encode_dataset
from bdense.diffusion.conditions import Condition, Prompts
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.guidance import guided
from bdense.errors import CheckpointError, InputError
from bdense.methods.consistency import Consistency, ConsistencyConfig, ConsistencyStage
from bdense.methods.distill import distill
from bdense.methods.images import ImageBatch
from bdense.methods.method import Inputs
from bdense.methods.progressive import PDConfig, PDStage, Progressive
from bdense.methods.sfd import SFD, SFDConfig
from bdense.models.latents import load_text_encoder
from bdense.models.store import load_model
from bdense.training.loop import train
from bdense.weights.weighting import FixedWeights
from tests import commands
from tests.contracts.methods import ALL, ONE
from tests.features import random_images, write_images
from tests.goldens import tensors
from tests.latent_goldens import LATENT
from tests.small import same_weights
from tests.written_out import plain_round

pytest.importorskip("diffusers", reason="needs the diffusers extra")
pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(not LATENT.is_dir(), reason=f"no folder {LATENT} (BDENSE_GOLDENS)"),
]
CPU = torch.device("cpu")
PD = {"steps": 4, "until": 2, "updates": 2, "batch": 4, "lr": 1e-3}
CD = {"steps": 3, "substeps": 2, "kimg": 0.008, "batch": 4, "lr": 1e-3, "sigma_min": 0.1}
# Of teacher and student.
SCALES = [(1.0, 1.0), (4.0, 1.0), (4.0, 4.0)]
TEACHERS = ["dit-a", "unet-a-epsilon"]
BOTH_GUIDED = pytest.mark.parametrize(
    ("name", "scales"), [*zip(TEACHERS, SCALES[1:], strict=True)]
)


def latents(count: int = 14) -> EncodedDataset:
    """Of noise, in seven classes."""
    draw = torch.Generator().manual_seed(3)
    pixels = torch.zeros(count, 3, 16, 16, dtype=torch.uint8)
    found = torch.randn(count, 4, 8, 8, generator=draw)
    return EncodedDataset("noise", pixels, "its-sha256", torch.arange(count) % 7, latents=found)


def teacher_of(name: str) -> tuple[NetworkDenoiser, Prompts | None]:
    """In float64, with prompts for the seven classes where it reads any."""
    teacher = load_model(LATENT / name)[0].double()
    if not teacher.model.text_dim:
        return teacher, None
    bank = tensors(LATENT / "guided-unet-a-epsilon.safetensors")
    texts = torch.cat([bank["text"], -bank["text"][:3]])
    return teacher, Prompts(texts, bank["null"])


class InFloat64:
    """A stage whose batches are of its teacher's type."""

    def batch(self, iteration: int, images: slice) -> ImageBatch:
        found = super().batch(iteration, images)
        return replace(found, clean=found.clean.double(), noise=found.noise.double())


@dataclass(frozen=True, eq=False, kw_only=True)
class Round(InFloat64, PDStage):
    pass


@dataclass(eq=False, kw_only=True)
class Consistent(InFloat64, ConsistencyStage):
    pass


def null_of(teacher: NetworkDenoiser, prompts: Prompts | None) -> Condition:
    return (teacher.conditions if prompts is None else prompts).null().to(torch.zeros(1).double())


def four(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def plain_consistency(stage: ConsistencyStage, scales: tuple[float, float]) -> NetworkDenoiser:
    """Consistency distillation by Euler steps with one branch, K = 2, written out."""
    student, null = copy.deepcopy(stage.teacher), null_of(stage.teacher, stage.conditions)
    target = copy.deepcopy(stage.teacher).requires_grad_(False)
    ask, aim = guided(stage.teacher, scales[0], null), guided(target, scales[1], null)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
    grid = stage.config.levels.grid(6)
    for j in range(stage.num_updates):
        batch = stage.batch(j, ALL)
        told = batch.condition.arguments()
        t_0, t_1, t_2 = (grid[2 * batch.interval + k] for k in range(3))
        start = x = batch.clean + four(t_0) * batch.noise
        with torch.no_grad():
            for t, after in ((t_0, t_1), (t_1, t_2)):
                x = x + four((after - t) / t) * (x - ask(x, t, **told))
            end = aim(x, t_2, **told)
            wanted = end + four(0.1 / t_2) * (x - end)
        predicted = guided(student, scales[1], null)(start, t_0, **told)
        found = predicted + four(0.1 / t_0) * (start - predicted)
        optimizer.zero_grad()
        (found - wanted).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 1 - 0.95)
    return student


@BOTH_GUIDED
def test_a_plain_round_is_progressive_distillation_under_guidance(name, scales):
    teacher, prompts = teacher_of(name)
    stage = Round(
        config=PDConfig(**PD, guidance_teacher=scales[0], guidance_student=scales[1]),
        teacher=teacher,
        start=teacher,
        levels=PDConfig(**PD).levels(teacher),
        steps=2,
        dataset=latents(),
        seed=5,
        substeps=2,
        guidance=scales[0],
        conditions=prompts or teacher.conditions,
    )
    student = train(stage, FixedWeights(ONE))
    written, _ = plain_round(stage, scales, null_of(teacher, prompts))
    assert not same_weights(student, teacher)
    for found, expected in zip(student.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@BOTH_GUIDED
def test_one_branch_is_consistency_distillation_under_guidance(name, scales):
    teacher, prompts = teacher_of(name)
    highest = {"sigma_max": teacher.precond.sigma_max}
    ways = {"guidance_teacher": scales[0], "guidance_student": scales[1]}
    stage = Consistent(
        config=ConsistencyConfig(**CD, **highest, **ways, loss="l2", solver="euler"),
        teacher=teacher,
        dataset=latents(),
        seed=5,
        conditions=prompts or teacher.conditions,
    )
    student, written = train(stage, FixedWeights(ONE)), plain_consistency(stage, scales)
    assert not same_weights(student, teacher)
    for found, expected in zip(student.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("name", TEACHERS)
def test_students_say_what_they_cost_and_later_rounds_ask_them_as_they_draw(name, scales):
    teacher, prompts = teacher_of(name)
    teacher.float()
    if prompts is not None:
        prompts = Prompts(prompts.embeddings.float(), prompts.empty.float())
    twice = 1 if scales[1] == 1 else 2
    ways = {"guidance_teacher": scales[0], "guidance_student": scales[1]}
    inputs = Inputs(dataset=latents(), seed=5, conditions=prompts)
    method, config = Progressive(), PDConfig(**PD | {"until": 1, "updates": 1}, **ways)
    first, second = method.plan(config, teacher)
    assert [first.nfe, second.nfe] == [2 * twice, twice]
    assert [first.name, second.name] == ["00002", "00001"]
    assert method.teacher_sampler(config, teacher).nfe == (4 if scales[0] == 1 else 8)
    stage = method.stage(first, teacher, config, inputs)
    assert stage.guidance == scales[0]
    assert stage.sampler.nfe == first.nfe
    assert stage.steps == 2
    student = train(stage, FixedWeights(torch.ones(2)))
    student = bdense.export_branch(student)
    student.samplers = (stage.sampler,)
    after = method.stage(second, student, config, inputs)
    assert (after.guidance, after.steps, after.sampler.nfe) == (scales[1], 1, second.nfe)

    chosen = ConsistencyConfig(
        **CD | {"kimg": 0.004, "nfe": 2}, **ways, sigma_max=teacher.precond.sigma_max
    )
    (done,) = distill(Consistency(), teacher, chosen, lambda: FixedWeights(torch.ones(2)), inputs)
    assert done.sampler.nfe == done.plan.nfe == 2 * twice


def test_the_way_of_guidance_is_part_of_a_run():
    teacher, _ = teacher_of("dit-a")
    teacher.float()
    inputs, weights = Inputs(dataset=latents(), seed=5), FixedWeights(ONE)
    high = {"sigma_max": teacher.precond.sigma_max}
    for method, made in (
        (Progressive(), lambda **ways: PDConfig(**PD, **ways)),
        (Consistency(), lambda **ways: ConsistencyConfig(**CD, **high, **ways)),
    ):
        plain, *others = (
            method.identity(made(**ways), teacher, inputs, weights)
            for ways in ({}, {"guidance_teacher": 4.0}, {"guidance_student": 4.0})
        )
        # A run from before guidance is one at 1.
        assert not any("guidance" in name for name in plain)
        assert [each.keys() - plain.keys() for each in others] == [
            {"config.guidance_teacher"},
            {"config.guidance_student"},
        ]


# ---- captions and encoded images ----


def test_prompts_are_captions_of_each_image_or_each_class():
    found, index = latents(), torch.tensor([13, 0, 8])
    of_classes, of_images = (
        Prompts(torch.arange(float(count)).view(-1, 1, 1)) for count in (7, 14)
    )
    assert of_classes.of(found, index).values.flatten().tolist() == [6, 0, 1]
    assert of_images.of(found, index).values.flatten().tolist() == [13, 0, 8]
    with pytest.raises(InputError, match=r"3 prompts.* captions of noise, .*14 images and 7"):
        Prompts(torch.zeros(3, 1, 1)).require(found)
    unlabelled = replace(found, labels=None)
    with pytest.raises(InputError, match="14 images; give a prompt for each image, in their ord"):
        of_classes.require(unlabelled)


def test_a_data_set_is_encoded_once(tmp_path):
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (3, 3, 16, 16), generator=draw).to(torch.uint8)
    dataset, folder, counts = Dataset("noise", pixels, "abc"), LATENT / "pipeline-a", []
    found = encode_dataset(dataset, folder, tmp_path, CPU, counts.append)
    index = torch.tensor([2, 0])
    expected = bdense.load_codec(folder).encode(to_float(pixels[index]))
    torch.testing.assert_close(found.clean(index), expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (4, 8, 8)
    assert counts == [3]
    again = encode_dataset(dataset, folder, tmp_path, CPU, counts.append)
    assert counts == [3]
    assert torch.equal(again.latents, found.latents)
    assert again.sha256 == found.sha256 != dataset.sha256
    with pytest.raises(CheckpointError, match="no autoencoder"):
        encode_dataset(dataset, LATENT / "unet-a-epsilon", tmp_path, CPU)


def test_prompts_are_embedded_once(tmp_path):
    """By content of texts and encoder; a later call needs no encoder."""
    pytest.importorskip("transformers", reason="needs the diffusers extra")
    folder, texts, told = LATENT / "pipeline-a", ["a red cat", "the dog " * 20], []
    encoder = load_text_encoder(folder)

    def embedded(texts, **options):
        report = lambda *so_far: told.append(so_far)  # noqa: E731
        return embed_prompts(texts, folder, tmp_path, on_prompt=report, **options)

    found, expected = embedded(texts, negative="a dog"), encoder.prompts(texts, "a dog")
    assert torch.equal(found.embeddings, expected.embeddings)
    assert torch.equal(found.empty, expected.empty)
    assert told == [(3, 1)]
    assert embedded(texts, negative="a dog").describe() == found.describe()
    assert told == [(3, 1)]
    assert embedded(texts, encoder=encoder).describe() == encoder.prompts(texts).describe()
    assert len(told) == 2


@pytest.mark.parametrize(
    ("name", "method", "knobs", "message"),
    [
        (
            "dit-a",
            Progressive,
            PDConfig(**PD, clip_targets=True),
            "clip_targets true is for",
        ),
        (
            "dit-a",
            Progressive,
            PDConfig(**PD, clip_samples=True),
            "clip_samples true is for",
        ),
        ("dit-a", Progressive, PDConfig(**PD, flip=True), "flip true is for pixels"),
        ("dit-a", Consistency, ConsistencyConfig(**CD, flip=True), "flip true is for pixels"),
        ("dit-a", Consistency, ConsistencyConfig(**CD, loss="lpips"), "loss lpips is for pixels"),
        ("dit-a", SFD, SFDConfig(perceptual="lpips"), "perceptual lpips is for pixels"),
        # It has no null.
        ("ldm-a", SFD, SFDConfig(guidance_teacher=2.0), "guidance_teacher 2 needs a network"),
        ("ldm-a", Progressive, PDConfig(**PD, guidance_student=2.0), "guidance_student 2 needs"),
        ("ldm-a", Consistency, ConsistencyConfig(**CD, guidance_teacher=2.0), "2 needs a network"),
    ],
)
def test_knobs_that_do_not_fit_a_teacher_of_latents_are_refused(name, method, knobs, message):
    teacher, known = load_model(LATENT / name)
    with pytest.raises(InputError, match=message):
        method().check(knobs, teacher, known)


def test_a_student_is_distilled_further_as_it_draws():
    teacher, known = load_model(LATENT / "dit-a")
    student = Progressive().stage(
        Progressive().plan(PDConfig(**PD, guidance_student=3.0), teacher)[0],
        teacher,
        PDConfig(**PD, guidance_student=3.0),
        Inputs(dataset=latents()),
    )
    known = {**known, **student.metadata()}
    usual = PDConfig.usual(known, teacher)
    assert usual["guidance_teacher"] == 3
    goes_on = {"steps": 2, "until": 1, "updates": 1, "batch": 4}
    Progressive().check(PDConfig(**goes_on | usual), teacher, known)
    with pytest.raises(InputError, match=r"guidance_teacher 1: .* draws at guidance 3"):
        Progressive().check(PDConfig(**goes_on), teacher, known)


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_the_command_learns_from_captioned_images(tmp_path, method):
    pytest.importorskip("transformers", reason="needs the diffusers extra")
    folder, file = LATENT / "pipeline-a", tmp_path / "p.txt"
    photos = write_images(tmp_path / "photos", random_images(3, side=16))
    file.write_text("a red cat\nthe dog\na dog\n")
    small = {
        "progressive": ("--steps", 4, "--until", 2, "--updates", 2),
        "consistency": ("--steps", 2, "--substeps", 2, "--kimg", 0.004),
    }[method]
    common = ("--data", f"folder:{photos}", "--cache", tmp_path / "cache", "--batch", 2)
    asked = ("distill", folder, "--method", method, *small, *common, "--guidance-teacher", 3)
    out = tmp_path / ("out" if method == "progressive" else "student.safetensors")
    done = commands.bdense(*asked, "--prompts", file, "--out", out)
    assert done.status == 0, done.err
    student = out / "00002.safetensors" if method == "progressive" else out
    metadata = load_model(student)[1]
    assert metadata["training"]["guidance_teacher"] == 3
    assert metadata["data"] == "folder:photos"
    picture = tmp_path / "a.png"
    drawn = commands.bdense(
        "sample", student, "--pipeline", folder, "--prompt", "a dog", "--images", 1,
        "--out", picture,
    )  # fmt: skip
    assert drawn.status == 0, drawn.err
    file.write_text("a red cat\nthe dog\n")
    refused = commands.bdense(*asked, "--prompts", file, "--out", tmp_path / "other")
    assert "2 prompts cannot be the captions of folder:photos" in commands.refused(refused)


# ---- bad input ----


def test_what_does_not_fit_is_refused_before_images_are_encoded(tmp_path):
    common = ("--method", "progressive", "--steps", 4, "--until", 2, "--data", "digits")
    asked = ("distill", LATENT / "ldm-a", *common, "--out", tmp_path / "out")
    cache = ("--cache", tmp_path / "cache")
    shapes = commands.refused(commands.bdense(*asked, *cache))
    assert "data digits has images of 1 x 8 x 8, and the teacher is a network for 3 x 16 x 16" in (
        shapes
    )
    photos = write_images(tmp_path / "photos", random_images(1, side=16))
    untold = ("distill", LATENT / "pipeline-a", *common, "--data", f"folder:{photos}")
    line = commands.refused(commands.bdense(*untold, "--out", tmp_path / "out", *cache))
    assert "conditioned on text; give prompts" in line
    assert not (tmp_path / "cache").exists()


def test_decoding_takes_fewer_images_at_a_time_where_memory_is_short():
    codec, latents = bdense.load_codec(LATENT / "pipeline-a"), torch.randn(5, 4, 8, 8)
    expected, most = codec.decode(latents), 2

    def short(_, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    codec.model.decoder.register_forward_pre_hook(short)
    torch.testing.assert_close(codec.decode(latents), expected)
    assert codec.slice == 2
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        codec.decode(latents)
