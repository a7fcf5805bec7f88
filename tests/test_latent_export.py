"""Students of latents as pipelines of diffusers, against diffusers alone."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import bdense
from bdense.diffusion.branches import widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.guidance import null_for
from bdense.diffusion.pictures import to_uint8
from bdense.diffusion.preconditioning import native_schedule
from bdense.diffusion.sampling import SETUP, Sampler, served_metadata
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import DDIM, DPMSolverPP, make_solver
from bdense.errors import CheckpointError, InputError
from bdense.models.card import inherited
from bdense.models.diffusers_export import export_pipeline
from bdense.models.diffusers_files import PIPELINE
from bdense.models.folder import export_folder
from bdense.models.store import denoiser_sha256, load_model, load_stored, save_denoiser
from tests import commands
from tests.features import ColourMeans, random_images, scripted, write_images

diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")
pytest.importorskip("transformers", reason="needs the diffusers extra")

from tests.latent_folders import new_dit, new_ldm, new_stable_diffusion  # noqa: E402
from tests.test_folder import block  # noqa: E402

TEXTS = ["a three", "a seven"]


@pytest.fixture(autouse=True)
def _modules_elsewhere(monkeypatch, tmp_path):
    """diffusers copies a folder's own files to a cache of modules before it runs them."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Teachers by what they are."""
    place = tmp_path_factory.mktemp("teachers")
    return {
        "epsilon": new_stable_diffusion(place / "epsilon"),
        "v": new_stable_diffusion(place / "v", "v_prediction"),
        "dit": new_dit(place / "dit"),
        "ldm": new_ldm(place / "ldm"),
    }


def student_of(folder: Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """The teacher itself as a student, and what it knows of its teacher."""
    teacher, known = load_model(folder)
    return teacher, {"kind": "student", "method": "sfd", **inherited(known, folder.name)}


def sampler_on(student: NetworkDenoiser, **options: object) -> Sampler:
    levels = Schedule(sigma_min=0.1, sigma_max=student.precond.sigma_max)
    return Sampler(**{"num_intervals": 3, "afs": False, "schedule": levels} | options)


def exported(folder: Path, out: Path, sampler: Sampler) -> NetworkDenoiser:
    student, metadata = student_of(folder)
    export_pipeline(out, student, metadata | served_metadata([sampler]), teacher=folder)
    return student


def opened(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_here(
    student: NetworkDenoiser, sampler: Sampler, conditions: Any, count: int, seed: int
) -> torch.Tensor:
    """Latents from the draws that a pipeline makes with that seed."""
    draw = torch.manual_seed(seed)
    shape = (count, *student.image_shape)
    noise = torch.randn(shape, generator=draw)
    null = null_for(sampler.guidance, conditions)
    given = student.given(
        conditions.evaluation(0, range(count)), guidance=sampler.guidance, null=null
    )
    return sampler(given, noise, lambda interval: torch.randn(shape, generator=draw))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the rounding of float32."""
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


# ---- the same images ----

SAMPLERS = {
    "euler-afs": {"afs": True},
    "dpmpp": {"solver": DPMSolverPP(), "num_intervals": 4},
    "epd": {"solver": make_solver("epd"), "num_intervals": 2},
    "consistency": {"solver": make_solver("consistency")},
}


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_is_the_pipelines(folders, tmp_path, options):
    """Also under another guidance than the student's own, as users sample it."""
    name = "v" if options in (SAMPLERS["euler-afs"], SAMPLERS["epd"]) else "epsilon"
    sampler = sampler_on(load_model(folders[name])[0], **options, guidance=4.0)
    student = exported(folders[name], tmp_path / "student", sampler)
    call = json.loads((tmp_path / "student/bdense.json").read_text())["pipeline_call"]
    assert call["guidance_scale"] == 4
    pipeline = opened(tmp_path / "student")
    prompts = bdense.load_text_encoder(folders[name]).prompts(TEXTS)
    for guidance in (4.0, 1.0):
        given = call | {"guidance_scale": guidance, "output_type": "latent"}
        found = pipeline(TEXTS, **given, generator=torch.manual_seed(3)).images
        at = replace(sampler, guidance=guidance)
        assert_same(found, drawn_here(student, at, prompts, 2, 3))


def test_a_pipeline_draws_at_the_guidance_of_the_fid(folders, tmp_path):
    """As a study measures that guides its students when sampling alone."""
    out = tmp_path / "student"
    student, known = student_of(folders["epsilon"])
    own = sampler_on(student, afs=True)
    metadata = known | served_metadata([own]) | {SETUP: {"guidance": 3.0}}
    export_pipeline(out, student, metadata, teacher=folders["epsilon"])
    call = json.loads((out / "bdense.json").read_text())["pipeline_call"]
    assert call == {"num_inference_steps": 2, "guidance_scale": 3.0}
    card = (out / "README.md").read_text()
    assert card.count("num_inference_steps=2, guidance_scale=3.0") == 2
    assert "guidance_scale=1.0" not in card
    assert "| network evaluations an image (NFE) | 4 |" in card
    draw = {"generator": torch.manual_seed(3), "output_type": "latent"}
    found = opened(out)(TEXTS, **call, **draw).images
    prompts = bdense.load_text_encoder(out).prompts(TEXTS)
    assert_same(found, drawn_here(student, replace(own, guidance=3.0), prompts, 2, 3))
    unguided = drawn_here(student, own, prompts, 2, 3)
    assert (found - unguided).abs().max() > 1e-3 * unguided.abs().max()
    # Here it draws so as well.
    assert load_model(out)[0].samplers == (replace(own, guidance=3.0),)
    assert load_stored(out)[0].samplers == (own,)  # what training goes on from

    weak = metadata | {SETUP: {"guidance": 0.5}}
    assert_refused("guided by 0.5", tmp_path / "weak", student, weak, teacher=folders["epsilon"])


@pytest.mark.parametrize("clip", [False, True])
def test_a_grid_down_to_no_noise_is_exported_and_clipping_is_refused(folders, tmp_path, clip):
    """A student of progressive distillation ends at D itself."""
    student, metadata = student_of(folders["epsilon"])
    schedule = native_schedule(student.precond)
    sampler = Sampler(num_intervals=4, afs=False, schedule=schedule, solver=DDIM(clip=clip))
    given = (tmp_path / "student", student, metadata | served_metadata([sampler]))
    if clip:
        with pytest.raises(InputError, match=r"ddim .*'clip': True.* are not sums"):
            export_pipeline(*given, teacher=folders["epsilon"])
        assert not list(tmp_path.iterdir())
        return
    export_pipeline(*given, teacher=folders["epsilon"])
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    found = opened(tmp_path / "student")(TEXTS, **call, generator=torch.manual_seed(0)).images
    prompts = bdense.load_text_encoder(folders["epsilon"]).prompts(TEXTS)
    assert_same(found, drawn_here(student, sampler, prompts, 2, 0))


@pytest.mark.parametrize("options", [{}, {"afs": True, "guidance": 3.0}], ids=["plain", "guided"])
def test_a_dit_draws_classes(folders, tmp_path, options):
    sampler = sampler_on(load_model(folders["dit"])[0], **options)
    student = exported(folders["dit"], tmp_path / "student", sampler)
    pipeline = opened(tmp_path / "student")
    assert type(pipeline).__name__ == "DiTPipeline"
    found = pipeline(
        [5, 5], num_inference_steps=3 - sampler.afs, guidance_scale=sampler.guidance,
        generator=torch.manual_seed(1), output_type="pt",
    ).images  # fmt: skip
    latents = drawn_here(student, sampler, student.conditions_of(5), 2, 1)
    images = bdense.load_codec(folders["dit"]).decode(latents)
    torch.testing.assert_close(found, (images / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5)


def test_an_unconditional_latent_model_draws(folders, tmp_path):
    sampler = sampler_on(load_model(folders["ldm"])[0], afs=True)
    student = exported(folders["ldm"], tmp_path / "student", sampler)
    pipeline = opened(tmp_path / "student")
    assert type(pipeline).__name__ == "LDMPipeline"
    found = pipeline(
        batch_size=2, num_inference_steps=2, generator=torch.manual_seed(1), output_type="np"
    ).images
    latents = drawn_here(student, sampler, student.conditions, 2, 1)
    images = bdense.load_codec(folders["ldm"]).decode(latents).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, (images / 2 + 0.5).clamp(0, 1).numpy(), atol=2e-5)


def test_a_student_takes_its_own_number_of_steps(folders, tmp_path):
    exported(folders["epsilon"], tmp_path / "s", sampler_on(load_model(folders["epsilon"])[0]))
    pipeline = opened(tmp_path / "s")
    with pytest.raises(ValueError, match=r"takes 3 steps, got num_inference_steps=50; give"):
        pipeline("a three")
    call = {"num_inference_steps": 3, "generator": torch.manual_seed(0), "output_type": "latent"}
    once = pipeline("a three", **call).images
    again = pipeline("a three", **call | {"generator": torch.manual_seed(0)}).images
    assert torch.equal(once, again)


def test_half_precision_is_stepped_in_float32(folders, tmp_path):
    sampler = sampler_on(load_model(folders["epsilon"])[0])
    exported(folders["epsilon"], tmp_path / "s", sampler)
    scheduler = opened(tmp_path / "s").scheduler
    scheduler.set_timesteps(3)
    x = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    halves = x.bfloat16(), torch.ones_like(x).bfloat16()
    stepped = scheduler.step(halves[1], scheduler.timesteps[0], halves[0]).prev_sample
    scheduler.set_timesteps(3)
    exact = scheduler.step(halves[1].float(), None, halves[0].float(), return_dict=False)[0]
    assert stepped.dtype == torch.bfloat16
    assert torch.equal(stepped, exact.bfloat16())


# ---- a user's way: distil, export, draw ----

ALONE = """
import os, sys
import numpy as np

card = open("last/README.md").read()
exec(card.split("```python\\n")[1].split("```")[0])
np.savez("found.npz", *[np.asarray(image) for image in images])
assert not [name for name in sys.modules if name.split(".")[0] == "bdense"]
"""


@pytest.fixture(scope="module")
def distilled(folders, tmp_path_factory) -> Path:
    """A B-DENSE student with its branches, guided as its teacher is."""
    place = tmp_path_factory.mktemp("distilled")
    (place / "prompts.txt").write_text("\n".join(TEXTS))
    commands.done(
        "distill", folders["epsilon"], "--prompts", place / "prompts.txt", "--keep-branches",
        "--nfe", 2, "--substeps", 3, "--a", 1, "--batch", 4, "--kimg", 0.016, "--lr", 1e-3,
        "--guidance-teacher", 2, "--guidance-student", 2, "--out", place / "last.safetensors",
    )  # fmt: skip
    commands.done(
        "recombine", place / "last.branches.safetensors", "--c=0.1,-0.3,1.2",
        "--out", place / "recombined.safetensors",
    )  # fmt: skip
    return place


@pytest.mark.parametrize("name", ["last", "recombined"])
def test_a_branched_student_is_exported_and_read_back(folders, distilled, tmp_path, name):
    file, out = distilled / f"{name}.safetensors", tmp_path / name
    teacher = ("--pipeline", folders["epsilon"])
    assert commands.done("export", file, *teacher, "--out", out) == f"{out}\n"
    student, metadata = load_model(file)
    found, known = load_model(out)
    assert denoiser_sha256(found) == denoiser_sha256(student)
    assert denoiser_sha256(found) != denoiser_sha256(load_model(folders["epsilon"])[0])
    metadata.pop("identity", None)
    assert known == metadata
    assert found.samplers == student.samplers

    # The command, on the folder alone and on the file with the teacher's.
    asked = ("--prompt", TEXTS[0], "--images", 2, "--columns", 2, "--out")
    commands.done("sample", out, *asked, tmp_path / "folder.png")
    commands.done("sample", file, *teacher, *asked, tmp_path / "file.png")
    pictures = [np.asarray(Image.open(tmp_path / f"{each}.png")) for each in ("folder", "file")]
    assert np.array_equal(*pictures)

    # diffusers, which draws as we do from the same latents.
    call = json.loads((out / "bdense.json").read_text())["pipeline_call"]
    assert call == {"num_inference_steps": 2, "guidance_scale": 2.0}
    drawn = opened(out)(TEXTS, **call, generator=torch.manual_seed(5), output_type="pt").images
    prompts = bdense.load_text_encoder(out).prompts(TEXTS)
    latents = drawn_here(student, student.samplers[0], prompts, 2, 5)
    images = bdense.load_codec(out).decode(latents)
    torch.testing.assert_close(drawn, (images / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "inside"), [("epsilon", True), ("epsilon", False), ("dit", True), ("ldm", False)]
)
def test_the_lines_of_a_folders_card_draw_as_its_fid_was_measured(
    folders, tmp_path, monkeypatch, name, inside
):
    """Its Python and its command, as they stand, with a pipeline in it or the teacher's."""
    teacher = folders[name]
    student, known = student_of(teacher)
    own, guidance = sampler_on(student), 3.0 if name == "epsilon" else None
    metadata = known | served_metadata([own]) | {SETUP: {"guidance": guidance}}
    given = tmp_path / "student", student, metadata
    with pytest.raises(InputError, match=r"latents.*samples\.png in pictures"):
        export_folder(*given)

    def finish(folder: Path) -> None:
        if inside:
            export_pipeline(folder / PIPELINE, student, metadata, teacher=teacher)

    pictures = {"samples.png": lambda path: path.touch()}
    export_folder(*given, pictures=pictures, prompts=TEXTS, finish=finish)
    card = (tmp_path / "student/README.md").read_text()
    assert ("FOLDER_OF_TEACHER" in card) != inside
    card = card.replace("FOLDER_OF_TEACHER", str(teacher))
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(block(card, "python"), found)
    sampler = replace(own, guidance=guidance or 1.0)

    def drawn(texts: list[str]) -> torch.Tensor:
        encoder = bdense.load_text_encoder(teacher) if student.model.text_dim else None
        return bdense.draw_images(
            student, sampler, 64, seed=0, codec=bdense.load_codec(teacher),
            conditions=None if encoder is None else encoder.prompts(texts),
        )  # fmt: skip

    assert torch.equal(found["images"], drawn(TEXTS))
    assert found["images"].float().std() > 1
    channels, *size = found["images"].shape[1:]
    latents = " x ".join(map(str, student.image_shape))
    assert f"| latents | {latents} |" in card
    assert f"| images | {channels} x {size[0]} x {size[1]} |" in card
    readable = json.loads(Path("student/config.json").read_text())
    assert readable["latent_shape"] == list(student.image_shape)
    assert readable["image_shape"] == [channels, *size]

    program, *arguments = shlex.split(block(card, "sh"))
    assert program == "bdense"
    assert commands.done(*arguments) == "samples.png\n"
    bdense.save_grid(drawn(TEXTS[:1]), Path("expected.png"))
    assert Path("samples.png").read_bytes() == Path("expected.png").read_bytes()
    if guidance is not None:
        assert "| network evaluations an image (NFE) | 6 |" in card
        told = (*arguments[:-1], "told.png", "--guidance")
        commands.done(*told, "3", "--nfe", "6")
        assert Path("told.png").read_bytes() == Path("samples.png").read_bytes()
        commands.done(*told, "1", "--nfe", "3")
        assert Path("told.png").read_bytes() != Path("samples.png").read_bytes()
        assert "(NFE 3)" in commands.refused(commands.bdense(*told, "1", "--nfe", "6"))


def test_an_exported_students_fid_is_measured_again(folders, tmp_path):
    """On the pipeline's own parts, under the prompts that it was measured under."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    write_images(tmp_path / "images", random_images(8, side=16))
    scripted(ColourMeans(), tmp_path)
    prompts = ("--prompts", tmp_path / "prompts.txt")
    judge = (
        "--extractor", f"torchscript:{tmp_path / 'features.pt'}", "--cache", tmp_path / "cache",
        "--data", f"folder:{tmp_path / 'images'}",
    )  # fmt: skip
    commands.done(
        "distill", folders["epsilon"], *prompts, *judge, "--nfe", 1, "--substeps", 2, "--batch", 2,
        "--kimg", 0.002, "--images", 12, "--out", tmp_path / "s.safetensors",
    )  # fmt: skip
    file, out = tmp_path / "s.safetensors", tmp_path / "out"
    commands.done("export", file, "--pipeline", folders["epsilon"], "--out", out)
    asked = ("verify", out, *judge, "--json")
    assert json.loads(commands.done(*asked, *prompts))["verdict"] == "equal"
    needed = commands.refused(commands.bdense(*asked))
    assert needed.startswith("--prompts are needed: the FID was measured under 2 prompts of")
    missing = ("verify", file, *judge, *prompts)
    assert "--pipeline is needed" in commands.refused(commands.bdense(*missing))
    recorded = load_model(out)[1]["fid"]["prompts"]
    digest = hashlib.sha256(b"a three\na seven\n").hexdigest()
    assert recorded == {"file": "prompts.txt", "sha256": digest, "count": 2}
    card = (tmp_path / "s.md").read_text()
    assert f"2 prompts of prompts.txt, prompts sha256 {digest[:16]}" in card
    # The prompts count, not how they are written down.
    (tmp_path / "same.csv").write_text("id,text\n1,a three\n2,a seven\n")
    same = commands.done(*asked, "--prompts", tmp_path / "same.csv")
    assert json.loads(same)["verdict"] == "equal"
    told = json.loads(commands.done("fid", out, *judge, *prompts, "--images", 12))
    assert told["prompts"] == recorded
    (tmp_path / "prompts.txt").write_text("a nine")
    message = commands.refused(commands.bdense(*asked, *prompts))
    assert re.match(r"--prompts .*prompts\.txt is different: .* 2 prompts .* 1 prompt of", message)
    # A record of before does not say its prompts: its FID is another one.
    student, known = load_model(file)
    del known["fid"]["prompts"]
    save_denoiser(tmp_path / "before.safetensors", student, known)
    before = ("verify", tmp_path / "before.safetensors", *judge, "--pipeline", folders["epsilon"])
    answer = commands.bdense(*before, *prompts, "--json")
    assert (answer.status, json.loads(answer.out)["verdict"]) == (1, "different")


@pytest.mark.slow
def test_the_cards_lines_draw_with_diffusers_alone(folders, distilled, tmp_path):
    student, metadata = load_model(distilled / "last.safetensors")
    metadata |= {"teacher": "someone/stable-diffusion", "licence": "creativeml-openrail-m"}
    export_pipeline(tmp_path / "last", student, metadata, teacher=folders["epsilon"])
    card = (tmp_path / "last/README.md").read_text()
    front = card.split("---\n")[1].splitlines()
    assert "base_model: someone/stable-diffusion" in front
    assert "license: creativeml-openrail-m" in front
    assert "pipeline_tag: text-to-image" in front
    assert "trust_remote_code=True" in card
    assert "no safety checker" in card
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with np.load(tmp_path / "found.npz") as file:
        found = np.stack(list(file.values()))
    told = re.search(r"prompt=(\[.*?\])", card)[1].replace("'", '"')
    encoder, codec = (
        bdense.load_text_encoder(tmp_path / "last"),
        bdense.load_codec(tmp_path / "last"),
    )
    latents = drawn_here(student, student.samplers[0], encoder.prompts(json.loads(told)), 2, 0)
    expected = to_uint8(codec.decode(latents)).permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert (found != expected).mean() < 1e-2
    assert found.std() > 1


def test_the_folder_holds_no_pickle_and_nothing_of_this_machine(folders, distilled, tmp_path):
    student, metadata = load_model(distilled / "last.safetensors")
    files = export_pipeline(tmp_path / "out", student, metadata, teacher=folders["epsilon"])
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == set(files)
    kinds = {path.suffix for path in files}
    assert kinds == {".json", ".safetensors", ".py", ".md"}
    texts = [path.read_text() for path in files if path.suffix != ".safetensors"]
    assert not any(str(folders["epsilon"].parent) in text for text in texts)
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False


# ---- what is refused, before anything is written ----


def assert_refused(message: str, out: Path, student: Any, metadata: Any, **given: Any) -> None:
    with pytest.raises(InputError, match=message):
        export_pipeline(out, student, metadata, **given)
    assert not out.exists()
    assert not list(out.parent.glob(".*partial"))


def test_samplers_and_conditions_without_a_pipeline_are_named(folders, tmp_path):
    out, folder = tmp_path / "out", folders["epsilon"]
    student, known = student_of(folder)

    def told(**options: object) -> dict[str, Any]:
        return known | served_metadata([sampler_on(student, **options)])

    assert_refused("give the folder of the teacher's pipeline", out, student, told())
    wide = widen_head(student, 2)
    assert_refused("2 branches", out, wide, told(), teacher=folder)
    thresholded = told(solver=DPMSolverPP(thresholding=True))
    assert_refused("dpmpp .* thresholds", out, student, thresholded, teacher=folder)
    weak = told(guidance=0.5)
    assert_refused("guided by 0.5, .*guidance_student", out, student, weak, teacher=folder)
    several = known | served_metadata([sampler_on(student, num_intervals=n) for n in (2, 3)])
    assert_refused(r"several NFE, \[2, 3\]", out, student, several, teacher=folder)
    assert_refused("no sampler", out, student, known, teacher=folder)


def test_parts_that_do_not_fit_are_named(folders, tmp_path):
    out = tmp_path / "out"
    student, known = student_of(folders["epsilon"])
    known |= served_metadata([sampler_on(student)])
    assert_refused("has no text_encoder", out, student, known, teacher=folders["dit"])
    with pytest.raises(CheckpointError, match="no autoencoder"):
        export_pipeline(out, student, known, teacher=folders["epsilon"] / "unet")
    dit = new_dit(tmp_path / "dit", classes=7)
    student, known = student_of(dit)
    known |= served_metadata([sampler_on(student, guidance=2.0)])
    assert_refused("guided by 2 and has 7 classes", out, student, known, teacher=dit)
    ldm = new_ldm(tmp_path / "ldm", classes=3)
    student, known = student_of(ldm)
    known |= served_metadata([sampler_on(student)])
    assert_refused("3 classes, but LDMPipeline", out, student, known, teacher=ldm)


@pytest.mark.parametrize(
    ("changed", "told", "exported"),
    [
        ({"scaling_factor": 0.5}, "scaling_factor 0.5, not 0.18215", "scaling_factor 0.5"),
        ({"shift_factor": 0.5}, "shift_factor 0.5, not 0.0", "shifts its latents by 0.5"),
    ],
)
def test_another_teachers_pipeline_is_refused(folders, tmp_path, changed, told, exported):
    """Its autoencoder would make other images of the same latents, silently."""
    student, known = student_of(folders["epsilon"])
    known |= served_metadata([sampler_on(student)])
    save_denoiser(tmp_path / "s.safetensors", student, known)
    other = new_stable_diffusion(tmp_path / "other")
    config = other / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    assert_refused(exported, tmp_path / "out", student, known, teacher=other)
    sample = ("sample", tmp_path / "s.safetensors", "--prompt", "a", "--out", tmp_path / "s.png")
    assert told in commands.refused(commands.bdense(*sample, "--pipeline", other))
    commands.done(*sample, "--pipeline", folders["epsilon"], "--images", 2)
    with pytest.raises(CheckpointError, match="tokens of 32 channels, and the network takes 16"):
        bdense.load_text_encoder(other, 16)


def test_the_command_names_what_is_missing(folders, distilled, tmp_path):
    last, out = distilled / "last.safetensors", tmp_path / "out"
    teacher = ("--pipeline", folders["epsilon"], "--out", out)
    assert commands.refused(commands.bdense("export", last, "--out", out)).startswith("--pipeline")
    assert "is a teacher; draw with" in commands.refused(
        commands.bdense("export", folders["epsilon"], *teacher)
    )
    branched = distilled / "last.branches.safetensors"
    assert "3 branches" in commands.refused(commands.bdense("export", branched, *teacher))
    out.mkdir()
    assert "exists already" in commands.refused(commands.bdense("export", last, *teacher))
