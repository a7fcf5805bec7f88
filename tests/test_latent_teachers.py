"""Teachers of latents as users meet them: what is found, what is refused, the command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bdense
from bdense.errors import CheckpointError, InputError
from bdense.methods.distill import distill
from bdense.methods.method import Inputs
from bdense.methods.sfd import SFD, SFDConfig
from bdense.models.latents import drawn_shape
from bdense.models.store import load_model, save_denoiser
from bdense.weights.weighting import FixedWeights
from search.spec.file import read_here
from search.worker.teachers import load_teacher
from search.worker.trainer import Step
from tests import commands
from tests.features import ColourMeans, random_images, scripted, write_images
from tests.latent_goldens import LATENT

pytest.importorskip("diffusers", reason="needs the diffusers extra")
pytest.importorskip("transformers", reason="needs the diffusers extra")
pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(not LATENT.is_dir(), reason=f"no folder {LATENT} (BDENSE_GOLDENS)"),
]
WEIGHTS = "diffusion_pytorch_model.safetensors"
LDM_CODEC = {"class": "VQModel", "scaling_factor": 1.0, "image_channels": 3, "enlarges": 2}


@pytest.fixture
def copied(tmp_path):
    """A copy of a folder of the golden files, which a test may damage."""

    def copy(name: str) -> Path:
        # The files' modes are read-only there.
        shutil.copytree(LATENT / name, tmp_path / name, copy_function=shutil.copyfile)
        for folder in [tmp_path / name, *(tmp_path / name).rglob("*")]:
            folder.chmod(0o755 if folder.is_dir() else 0o644)
        return tmp_path / name

    return copy


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


# ---- what is found ----


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("unet-a-epsilon", {"condition": "text", "guidance": True}),
        ("dit-a", {"condition": "classes", "guidance": True}),
        ("ldm-a", {"guidance": False, "codec": LDM_CODEC}),
    ],
)
def test_a_model_says_what_it_is(name, found):
    metadata = load_model(LATENT / name)[1]
    assert {key: metadata[key] for key in found} == found
    assert ("condition" in metadata) == ("condition" in found)


def test_the_safety_checker_is_never_loaded(copied, tmp_path):
    folder = copied("pipeline-a")
    assert "ignored" not in load_model(folder)[1]
    change(folder / "model_index.json", safety_checker=["stable_diffusion", "Checker"])
    assert load_model(folder)[1]["ignored"] == ["safety_checker"]
    (tmp_path / "p.txt").write_text("a red cat\n")
    short = ("--nfe", 1, "--substeps", 2, "--batch", 2, "--kimg", 0.002)
    given = ("--prompts", tmp_path / "p.txt", "--cache", tmp_path, "--out")
    answer = commands.bdense("distill", folder, *short, *given, tmp_path / "s.safetensors")
    assert "its safety_checker is not loaded" in answer.err
    told = []
    spec = read_here(
        {
            "name": "safe",
            "teacher": {"checkpoint": str(folder)},
            "prompts": str(tmp_path / "p.txt"),
            "method": {"name": "sfd", "nfe": 1, "substeps": 2, "kimg": 0.002, "batch": 2},
            "weights": {"name": "normalised", "a": {"low": 0, "high": 1}},
            "plan": {"trials": 1},
            "evaluation": {"reference": "ms-coco-val2014", "images": 2},
        },
        {},
    )
    load_teacher(spec, None, torch.device("cpu"), lambda *step: told.append(step))
    ((step, _, _, said),) = told
    assert step == Step.LOADING
    assert "safety_checker" in said


# ---- what is refused ----


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("conv_in.weight"), r"missing: conv_in\.weight"),
        (lambda w: w.update({"foo": torch.zeros(1)}), "not expected: foo"),
        (lambda w: w.update({f"module.{k}": w.pop(k) for k in list(w)}), r"module\."),
        (lambda w: w.update({"conv_in.bias": torch.zeros(3)}), r"conv_in\.bias"),
    ],
)
def test_weights_are_all_there_and_no_others(copied, damage, message):
    folder = copied("unet-a-epsilon")
    weights = load_file(folder / "unet" / WEIGHTS)
    damage(weights)
    save_file(weights, folder / "unet" / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_file_that_was_cut_short_is_named_with_a_way_out(copied):
    file = copied("unet-a-epsilon") / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"cannot load .*unet.* fetch it again"):
        load_model(file.parents[1])


def test_an_autoencoder_that_does_not_say_its_scale_has_diffusers_own(copied):
    folder = copied("pipeline-a")
    config = folder / "vae/config.json"
    known = json.loads(config.read_text())
    del known["scaling_factor"]
    config.write_text(json.dumps(known))
    assert load_model(folder)[1]["codec"]["scaling_factor"] == 0.18215
    assert bdense.load_codec(folder).scaling_factor == 0.18215


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_git_lfs_pointer_is_no_weights(copied, part):
    folder = copied("pipeline-a")
    (folder / part / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=f"{part}/.* is a Git LFS pointer"):
        bdense.load_codec(folder) if part == "vae" else load_model(folder)


def test_pickles_are_not_read(copied):
    folder = copied("unet-a-epsilon")
    torch.save(load_file(folder / "unet" / WEIGHTS), folder / "unet/diffusion_pytorch_model.bin")
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="only safetensors are read, not diffusion_pytorch"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "file", "keys", "message"),
    [
        (
            "unet-a-epsilon",
            "scheduler/scheduler_config.json",
            {"prediction_type": "sample"},
            "sam",
        ),
        ("dit-a", "scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "'sigmoid'"),
        ("dit-a", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "pure"),
        ("pipeline-a", "model_index.json", {"_class_name": "FluxPipeline"}, "DiTPipeline"),
        ("pipeline-a", "vae/config.json", {"_class_name": "AutoencoderDC"}, "AutoencoderKL and"),
        ("pipeline-a", "vae/config.json", {"latent_channels": 16}, "of 16 channels"),
        ("unet-a-epsilon", "unet/config.json", {"sample_size": 9}, "cannot be halved 1 times"),
        ("unet-a-epsilon", "unet/config.json", {"in_channels": 9}, "out_channels=4"),
        ("unet-a-epsilon", "unet/config.json", {"addition_embed_type": "text"}, "addition_embed"),
        ("dit-a", "transformer/config.json", {"sample_size": 9}, "patches of 2"),
    ],
)
def test_pipelines_that_are_not_read_are_named(copied, name, file, keys, message):
    folder = copied(name)
    change(folder / file, **keys)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_the_published_dits_former_class_is_read(copied):
    folder = copied("dit-a")
    expected = load_model(folder)[0].state_dict()
    file = folder / "transformer/config.json"
    off = {
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    change(file, _class_name="Transformer2DModel", norm_type="ada_norm_zero", **off)
    found = load_model(folder)[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    change(file, num_vector_embeds=8)
    with pytest.raises(CheckpointError, match="num_vector_embeds"):
        load_model(folder)
    change(file, norm_type="ada_norm_single")
    with pytest.raises(CheckpointError, match="Transformer2DModel"):
        load_model(folder)


def test_latents_without_an_autoencoder_are_no_images():
    with pytest.raises(CheckpointError, match="no autoencoder"):
        bdense.load_codec(LATENT / "unet-a-epsilon")
    with pytest.raises(CheckpointError, match="no text_encoder"):
        bdense.load_text_encoder(LATENT / "unet-a-epsilon")


def test_text_needs_prompts():
    text, known = load_model(LATENT / "unet-a-epsilon")
    plain = SFDConfig(nfe=2, batch=2, kimg=0.002, **known["levels"])
    with pytest.raises(InputError, match="give prompts"):
        list(distill(SFD(), text, plain, lambda: FixedWeights(torch.ones(1)), Inputs()))


# ---- a student ----


@pytest.mark.parametrize(
    ("teacher", "student", "nfe"), [(1.0, 1.0, 2), (4.0, 1.0, 2), (4.0, 4.0, 4)]
)
def test_a_student_knows_its_guidance_and_what_it_costs(tmp_path, teacher, student, nfe):
    dit, known = load_model(LATENT / "dit-a")
    config = SFDConfig(
        nfe=2,
        substeps=2,
        batch=2,
        kimg=0.002,
        guidance_teacher=teacher,
        guidance_student=student,
        **known["levels"],
    )
    (done,) = distill(SFD(), dit, config, lambda: FixedWeights(torch.ones(2)), Inputs())
    assert done.sampler.nfe == done.plan.nfe == nfe
    assert bdense.samplers_from(done.metadata) == [done.sampler]
    calls = []
    done.student.model.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    bdense.draw_images(done.student, done.sampler, 3, seed=0)
    assert sum(calls) == 3 * nfe
    save_denoiser(tmp_path / "s.safetensors", done.student, done.metadata)
    asked = commands.bdense(
        "sample", tmp_path / "s.safetensors", "--guidance", 3, "--images", 2,
        "--out", tmp_path / "a.png",
    )  # fmt: skip
    # Without its teacher's folder its latents are no images; what was learned comes first.
    expected = "has learned its teacher's 4" if (teacher, student) == (4, 1) else "--pipeline"
    assert expected in commands.refused(asked)


# ---- the command ----


def test_a_student_of_latents_is_measured_by_its_decoded_images(tmp_path):
    """The same FID from ``distill``, from ``fid``, and from the images by hand."""
    folder, out = LATENT / "pipeline-a", tmp_path / "s.safetensors"
    prompts, images = (
        tmp_path / "p.txt",
        write_images(tmp_path / "images", random_images(12, side=16)),
    )
    prompts.write_text("a red cat\nthe dog\n")
    extractor = scripted(ColourMeans(), tmp_path)
    judge = (
        "--extractor", f"torchscript:{tmp_path / 'features.pt'}", "--images", 12,
        "--data", f"folder:{images}", "--cache", tmp_path / "cache",
    )  # fmt: skip
    short = ("--nfe", 1, "--substeps", 2, "--batch", 2, "--kimg", 0.002, "--keep-branches")
    done = commands.done("distill", folder, *short, "--prompts", prompts, *judge, "--out", out)
    at_once = json.loads(done.splitlines()[-1])
    asked = ("fid", out, "--pipeline", folder, "--prompts", prompts, *judge)
    later = json.loads(commands.done(*asked))
    assert at_once["value"] == pytest.approx(later["value"], rel=1e-9)
    # Decoded is x, as the SFD reference does, and not z.
    assert at_once["decoded"] == later["decoded"] == "x"
    assert "guidance" not in later
    guided = json.loads(commands.done(*asked, "--guidance", 4))
    assert (guided["guidance"], guided["nfe"], guided["decoded"]) == (4, 2, "x")

    student, metadata = load_model(out)
    assert not student.samplers[0].afs  # unless it is asked for
    drawn = bdense.draw_images(
        student,
        count=12,
        seed=0,
        conditions=bdense.load_text_encoder(folder).prompts(["a red cat", "the dog"]),
        codec=bdense.load_codec(folder),
    )
    assert drawn.shape == (12, *drawn_shape(student, metadata)) == (12, 3, 16, 16)
    data = bdense.load_dataset(f"folder:{images}")
    reference = bdense.dataset_reference(data, extractor, cache=tmp_path / "cache")
    found = bdense.measure_images(drawn, extractor, reference, nfe=1, seeds={})
    assert found.fid.value == pytest.approx(later["value"], rel=1e-9)

    told = ("fid", out, "--pipeline", folder, *judge)
    assert "--prompts are needed" in commands.refused(commands.bdense(*told))
    branched = out.with_suffix(".branches.safetensors")
    asked = commands.bdense("recombine", branched, *judge, "--out", tmp_path / "c.safetensors")
    assert commands.refused(asked).startswith("--extractor measures images")


def test_sample_draws_decoded_images_of_prompts(tmp_path):
    folder, out = LATENT / "pipeline-a", tmp_path / "grid.png"
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat\n\n" + "the dog " * 20 + "\n")
    common = ("--images", 2, "--columns", 2, "--nfe", 4, "--guidance", 7.5, "--out", out)
    asked = commands.bdense("sample", folder, "--prompts", file, *common)
    assert asked.status == 0, asked.err
    assert "prompt 2 is longer than 12 tokens" in asked.err
    # Images of 16 pixels a side, enlarged to 32, and 2 between them.
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (32, 66, 3)

    model, known = load_model(folder)
    prompts = bdense.load_text_encoder(folder).prompts(["a red cat", "the dog " * 20])
    sampler = bdense.Sampler(
        num_intervals=2, afs=False, schedule=bdense.Schedule(**known["levels"]), guidance=7.5
    )
    assert sampler.nfe == 4
    images = bdense.draw_images(
        model, sampler, 2, seed=0, conditions=prompts, codec=bdense.load_codec(folder)
    )
    wide = torch.cat(list(images), dim=2).permute(1, 2, 0).numpy()
    assert np.array_equal(np.delete(pixels, [32, 33], axis=1)[::2, ::2], wide)
    negative = bdense.load_text_encoder(folder).prompts(["a red cat", "the dog " * 20], "a cat")
    other = bdense.draw_images(
        model, sampler, 2, seed=0, conditions=negative, codec=bdense.load_codec(folder)
    )
    assert not torch.equal(other, images)


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("pipeline-a", [], "--prompts are needed"),
        ("pipeline-a", ["--prompt", "a", "--prompts", "EMPTY"], "two sources"),
        ("ldm-a", ["--prompt", "a"], "takes no text"),
        ("ldm-a", ["--guidance", "2"], "guidance 2 needs"),
        ("ldm-a", ["--negative-prompt", "a"], "--negative-prompt cannot be given"),
        # It would be without effect.
        ("pipeline-a", ["--prompt", "a", "--negative-prompt", "b"], "changes nothing at guidance"),
        ("dit-a", ["--class", "7"], "class 7 is not one of"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, folder, options, message):
    (tmp_path / "empty.txt").write_text("\n")
    given = [tmp_path / "empty.txt" if option == "EMPTY" else option for option in options]
    asked = commands.bdense(
        "sample", LATENT / folder, *given, "--images", 2, "--out", tmp_path / "a.png"
    )
    assert message in commands.refused(asked)
