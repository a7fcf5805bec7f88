"""Model cards, and ``bdense convert``, which writes one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from bdense.diffusion.sampling import SETUP, Sampler, as_measured, samplers_from, served_metadata
from bdense.files import sha256_file
from bdense.models.card import folder_card, inherited, model_card
from bdense.models.store import denoiser_sha256, load_denoiser, load_model, save_denoiser
from tests.commands import bdense, done, refused
from tests.goldens import discover
from tests.small import same_weights, small_teacher

STUDENT = {
    "kind": "student",
    "method": "sfd-bdense",
    "paper": "SFD (arXiv 2409.19681)",
    "weights": [0.25, 0.5, 1.0],
    "teacher": "edm-cifar10-32x32-uncond-vp",
    "teacher_sha256": "cd" * 32,
    "licence": "CC-BY-NC-SA-4.0",
    "sampler": Sampler(num_intervals=3, afs=True).describe(),
    "fid": {
        "value": 4.4012,
        "images": 50_000,
        "reference": "cifar10",
        "reference_images": 50_000,
        "extractor": "inception",
        "extractor_sha256": "ab" * 32,
        "nfe": 2,
        "seeds": {"evaluation": 0},
    },
}


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", card, re.MULTILINE))


def convert(source: Path, out: Path) -> dict[str, str]:
    """The facts that the command prints."""
    *facts, written = done("convert", source, "--out", out).splitlines()
    assert written == f"wrote {out}, {out.with_suffix('.json')}, {out.with_suffix('.md')}"
    return dict(line.split(": ", 1) for line in facts)


def test_a_students_card_carries_its_teachers_terms():
    card = model_card("student.safetensors", small_teacher(), STUDENT)
    assert front_matter(card) == {
        "license": "cc-by-nc-sa-4.0",
        "library_name": "bdense",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "distillation"],
    }
    assert "Licence: CC-BY-NC-SA-4.0, its teacher's" in card
    assert "A few-step student of a diffusion model, distilled by SFD (arXiv 2409" in card
    assert "bdense sample student.safetensors --images 64 --out samples.png" in card
    expected = {
        "images": "1 x 8 x 8",
        "method": "sfd-bdense",
        "branch weights": "0.25, 0.5, 1",
        "teacher": "edm-cifar10-32x32-uncond-vp",
        "teacher's sha256": f"`{'cd' * 32}`",
        "network evaluations an image (NFE)": "2",
        "sampler": "3 Euler steps, the first analytical, polynomial levels from 80 to 0.006",
        "FID": "4.401 (images 50000, reference cifar10, reference images 50000, extractor "
        "inception, extractor sha256 abababababababab, nfe 2)",
    }
    assert rows(card).items() >= expected.items()


@pytest.mark.parametrize("nfe", [(2,), (2, 4)])
def test_a_student_is_read_with_the_guidance_of_its_fid(tmp_path, nfe):
    """Its samplers, their NFE and its card; the file keeps those it was distilled for."""
    own = [Sampler(num_intervals=each + 1, afs=True) for each in nfe]
    stored = STUDENT | served_metadata(own) | {SETUP: {"guidance": 3.0}}
    path = tmp_path / "s.safetensors"
    save_denoiser(path, small_teacher(), stored)
    student, metadata = load_model(path)
    assert [each.guidance for each in student.samplers] == [3] * len(nfe)
    assert [each.nfe for each in student.samplers] == [2 * each for each in nfe]
    assert [each.num_intervals for each in student.samplers] == [each + 1 for each in nfe]
    assert list(student.samplers) == samplers_from(metadata)
    assert as_measured(metadata) == metadata
    assert samplers_from(load_denoiser(path)[1]) == own
    for told in (stored, metadata):
        facts = rows(folder_card("student", small_teacher(), told))
        assert facts["network evaluations an image (NFE)"] == ", ".join(str(2 * n) for n in nfe)
        assert facts["sampler"].endswith("guidance 3")
    for setup in ({"guidance": None}, {}):
        save_denoiser(path, small_teacher(), stored | {SETUP: setup})
        assert list(load_model(path)[0].samplers) == own


def test_a_teachers_card_does_not_mention_students():
    card = model_card("t.safetensors", small_teacher(), {"kind": "teacher", "source": "x.pkl"})
    assert (front_matter(card)["tags"], front_matter(card)["license"]) == (
        ["diffusion"],
        "unknown",
    )
    assert rows(card)["source"] == "x.pkl"
    assert "student" not in card


def test_what_students_inherit():
    teacher = {"source": "edm-x", "licence": "MIT", "citation": "A 2020", "data": "digits"}
    expected = {"teacher": "edm-x", "licence": "MIT", "citation": "A 2020"}
    expected |= {"data": "digits"}
    assert inherited(teacher, "edm-x.safetensors") == expected
    assert inherited({"kind": "teacher"}, "t.safetensors") == {"teacher": "t.safetensors"}


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("edm-song-tiny.nosrc.pkl"))
def test_an_edm_pickle_is_converted(file, tmp_path):
    # By the name of a published file, with that file's terms.
    source = tmp_path / "edm-cifar10-32x32-uncond-vp.pkl"
    shutil.copy(file, source)
    out = tmp_path / "made" / "teacher.safetensors"
    facts = convert(source, out)
    foreign = load_denoiser(file)[0]
    assert same_weights(load_denoiser(out)[0], foreign)
    assert re.fullmatch(r"\d+ bytes, not executed", facts.pop("program text in the file"))
    assert facts == {
        "source": "edm-cifar10-32x32-uncond-vp.pkl",
        "class": "EDMPrecond",
        "network": "SongUNet",
        "preconditioning": "edm (sigma_data 0.5)",
        "parameters": f"{sum(p.numel() for p in foreign.parameters()):,}",
        "images": "3 x 16 x 16",
        "classes": "none",
        "licence": "CC-BY-NC-SA-4.0",
        "sha256 of the source": sha256_file(source),
        "sha256 of architecture and weights": denoiser_sha256(foreign),
    }
    readable = json.loads(out.with_suffix(".json").read_text())
    assert readable["image_shape"] == [3, 16, 16]
    assert readable["architecture"] == json.loads(json.dumps(foreign.describe()))
    assert readable["weights_sha256"] == denoiser_sha256(foreign)
    assert front_matter(out.with_suffix(".md").read_text())["license"] == "cc-by-nc-sa-4.0"
    assert load_model(out)[1]["licence"] == readable["licence"] == "CC-BY-NC-SA-4.0"


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("sfd-ckpt-tiny.pkl"))
def test_an_sfd_student_stays_a_student(file, tmp_path):
    convert(file, tmp_path / "student.safetensors")
    metadata = load_denoiser(tmp_path / "student.safetensors")[1]
    assert (metadata["kind"], metadata["method"]) == ("student", "sfd")
    card = (tmp_path / "student.md").read_text()
    assert front_matter(card)["license"] == "unknown"
    assert "student of a diffusion model, distilled by Simple and Fast Distillation" in card


def test_a_diffusers_folder_is_converted(tmp_path):
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    from tests.test_diffusers_teacher import new_scheduler, new_unet, save

    folder = save(tmp_path / "ddpm", new_unet(num_class_embeds=3), new_scheduler(clip_sample=True))
    facts = convert(folder, tmp_path / "ddpm.safetensors")
    expected = {
        "class": "UNet2DModel",
        "classes": "3",
        "licence": "not known",
        "preconditioning": "ddpm (num_train_timesteps 50, beta_schedule linear, "
        "beta_start 0.0001, beta_end 0.2, prediction_type epsilon)",
    }
    assert facts.items() >= expected.items()
    assert facts["predictions clipped by the scheduler"].startswith("to +-1; not by")
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(2.0)
    loaded, foreign = load_denoiser(tmp_path / "ddpm.safetensors")[0], load_model(folder)[0]
    assert torch.equal(loaded(x, sigma), foreign(x, sigma))


def test_only_safetensors_are_written(tmp_path):
    path = tmp_path / "t.safetensors"
    save_denoiser(path, small_teacher(), {})
    message = refused(bdense("convert", path, "--out", tmp_path / "x.pkl"))
    assert "x.pkl must end in .safetensors" in message
