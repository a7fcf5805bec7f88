"""The teacher latent-digits, made short, and the study that distils it."""

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import bdense
from bdense.diffusion.denoiser import build_denoiser
from bdense.diffusion.sampling import SETUP
from bdense.errors import InputError
from bdense.models.store import load_denoiser, save_denoiser
from bdense.training.latent_digits import ARCHITECTURE, KNOWN, PROMPTS, latent_digits
from bdense.training.teacher import TeacherConfig
from search.errors import SpecError
from search.run.progress import Display
from search.spec.file import read_spec
from search.spec.resolve import filled_in
from search.storage.engine import resolve_storage_url
from search.study.notes import trial_note
from search.study.results import TrialResult
from search.study.study import Study
from search.worker.assets import load
from search.worker.cost import measure
from search.worker.ray_tasks import WorkerConfig, prepare_task
from search.worker.trainer import Preparation
from tests.clip import tiny_clip
from tests.e2e.study import Workplace
from tests.rows import CPU, run, task
from tests.studies import ROOT, resolve_here, spec

pytest.importorskip("diffusers", reason="needs the diffusers extra")
pytest.importorskip("transformers", reason="needs the diffusers extra")

SHORT = TeacherConfig(
    kimg=0.256,
    batch=32,
    ema_halflife_kimg=0.1,
    precond={"name": "ddpm", "beta_schedule": "scaled_linear"},
)
STUDY = ROOT / "studies/latent-digits.yaml"
CHANGES = {
    "method": {"kimg": 0.128, "batch": 32},
    "evaluation": {"images": 64, "batch": 32},
    "plan": {"trials": 2, "replicates": 1},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A study's cache with the teacher in its place."""
    cache = tmp_path_factory.mktemp("cache")
    latent_digits(cache, SHORT)
    return cache


@pytest.fixture
def folder(cache, monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("BDENSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BDENSE_CACHE", str(cache))
    resolve_here(monkeypatch)
    return latent_digits(cache)  # would take minutes if it were made again


def test_it_is_a_pipeline_of_stable_diffusion(folder):
    from diffusers import StableDiffusionPipeline

    teacher, known = bdense.load_model(folder)
    declared = build_denoiser(dict(ARCHITECTURE))
    shapes = {name: value.shape for name, value in declared.state_dict().items()}
    assert {name: value.shape for name, value in teacher.state_dict().items()} == shapes
    assert declared.precond == teacher.precond
    for name, value in KNOWN.items():
        assert (
            known[name] | value == known[name] if isinstance(value, dict) else value == known[name]
        )
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a three", num_inference_steps=2, output_type="pt").images
    assert drawn.shape[-2:] == (8, 8)


def test_each_prompt_is_another_condition(folder):
    encoder = bdense.load_text_encoder(folder)
    assert not encoder.too_long(PROMPTS)
    texts = encoder.embed([*PROMPTS, ""])
    assert min((a - b).abs().max() for a, b in itertools.combinations(texts, 2)) > 0.1
    teacher, known = bdense.load_model(folder)
    sampler = bdense.Sampler(
        num_intervals=2, afs=False, schedule=bdense.Schedule(**known["levels"]), guidance=2.0
    )
    one, other = (
        bdense.draw_images(
            teacher, sampler, 2, seed=0, conditions=encoder.prompts([prompt]),
            codec=bdense.load_codec(folder),
        )
        for prompt in PROMPTS[:2]
    )  # fmt: skip
    assert one.shape == (2, 1, 8, 8)
    assert not torch.equal(one, other)


def test_its_study_trains_and_judges_under_prompts(folder, cache, tmp_path):
    assert folder.is_dir()
    study = read_spec(STUDY, CHANGES)
    assets = load(study, CPU)
    assets.store(0).record()  # walks under the prompts, at the teacher's guidance
    result = run(assets, tmp_path / "row", task())
    # Prompts are embedded once, and a worker reads them from the cache.
    (kept,) = (cache / "prompts").glob("*.npy")
    encoder = bdense.load_text_encoder(folder)
    assert np.array_equal(np.load(kept), encoder.embed([*PROMPTS, ""]).numpy())
    assert result.fid is not None
    assert result.fid.images == 64
    prompts = str(STUDY.with_suffix(".txt"))
    assert result.drawing_options == ["--pipeline", str(folder), "--prompts", prompts]
    assert result.prompts == list(PROMPTS)
    live = read_spec(STUDY, CHANGES | {"trajectories": {"mode": "live"}})
    assert run(load(live, CPU), tmp_path / "live", task()).value == result.value


@pytest.mark.slow
def test_its_rows_go_by_guidance_and_by_prompts_of_their_own(folder, tmp_path):
    live = CHANGES | {"trajectories": {"mode": "live"}}
    study = read_spec(STUDY, live)
    result = run(load(study, CPU), tmp_path / "row", task())
    unguided = CHANGES["method"] | {"guidance_teacher": 1.0}
    guided = live | {"method": unguided, "evaluation": CHANGES["evaluation"] | {"guidance": 2}}
    row = run(load(read_spec(STUDY, guided), CPU), tmp_path / "guided", task())
    assert row.fid.nfe == 2 * result.fid.nfe  # each prediction with and without the prompt
    assert row.drawing_options == result.drawing_options
    student = tmp_path / "guided/student.safetensors"
    assert load_denoiser(student)[1][SETUP]["guidance"] == 2
    assert bdense.load_model(student)[0].samplers[0].nfe == row.fid.nfe
    with pytest.raises(SpecError, match="learn their teacher's"):
        read_spec(STUDY, guided | {"method": CHANGES["method"]})
    other = tmp_path / "other.txt"
    other.write_text("a nine\n")
    tiny_clip(tmp_path / "clip", folder / "tokenizer")
    evaluation = {**CHANGES["evaluation"], "prompts": str(other)}
    evaluation["clip_score"] = str(tmp_path / "clip")
    judged = read_spec(STUDY, live | {"evaluation": evaluation})
    row = run(load(judged, CPU), tmp_path / "judged", task())
    assert row.value != result.value
    assert (row.clip_score.images, row.clip_score.prompts) == (64, 1)
    assert TrialResult.of(row.value, row.attrs()).clip_score == row.clip_score
    assert "CLIP score" in trial_note("trial 0", row, [])
    assert "CLIP score" in (tmp_path / "judged/student.md").read_text()
    assert judged.fingerprint() != study.fingerprint()


@pytest.mark.slow
def test_its_study_trains_adapters(folder, tmp_path):
    pytest.importorskip("peft", reason="needs the lora extra")
    method = CHANGES["method"] | {"lora_rank": 2}
    study = read_spec(STUDY, CHANGES | {"method": method, "trajectories": {"mode": "live"}})
    assert study.fingerprint() != read_spec(STUDY, CHANGES).fingerprint()
    run(load(study, CPU), tmp_path / "row", task())
    student = load_denoiser(tmp_path / "row/student.safetensors")[0].state_dict()
    teacher = bdense.load_model(folder)[0].state_dict()
    changed = {name for name, value in teacher.items() if not torch.equal(value, student[name])}
    assert all("attn" in name or name.endswith("conv_out.weight") for name in changed)
    assert {"to_q", "to_k", "to_v", "to_out"} <= {
        part for name in changed for part in name.split(".")
    }


def test_a_study_needs_the_whole_pipeline(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "whole")
    given = CHANGES | {"teacher": {"recipe": None, "checkpoint": str(tmp_path / "whole")}}
    assert read_spec(STUDY, given).resolved.num_branches == 4
    shutil.rmtree(tmp_path / "whole/text_encoder")
    with pytest.raises(SpecError, match="no text_encoder beside it"):
        read_spec(STUDY, given)
    alone = tmp_path / "teacher.safetensors"
    save_denoiser(alone, *bdense.load_model(folder))
    with pytest.raises(SpecError, match="draws latents"):
        read_spec(STUDY, CHANGES | {"teacher": {"recipe": None, "checkpoint": str(alone)}})


@pytest.mark.parametrize("method", ["sfd", "epd"])
def test_the_first_step_of_latents_is_analytical_where_it_is_asked_for(folder, method):
    assert folder.is_dir()
    tree = yaml.safe_load(STUDY.read_text())
    tree |= {"prompts": str(STUDY.with_suffix(".txt")), "method": {"name": method}}
    tree |= {"plan": {"arms": ["plain"], "seeds": [0]}}
    del tree["weights"]
    found = spec(tree)
    assert found.method.options["afs"] is False
    asked = spec(tree | {"method": {"name": method, "afs": True}})
    assert asked.method.options["afs"] is True
    assert asked.fingerprint() != found.fingerprint()
    # As it was stored before latents had a default of their own: every knob is there.
    assert filled_in(asked).fingerprint() == asked.fingerprint()


def progressive(**knobs: object) -> dict[str, Any]:
    """The study, made short, by another method."""
    tree = yaml.safe_load(STUDY.read_text())
    tree |= {name: tree[name] | CHANGES[name] for name in ("evaluation", "plan")}
    short = {"name": "progressive", "steps": 4, "until": 2, "updates": 2, "batch": 32}
    return tree | {"prompts": str(STUDY.with_suffix(".txt")), "method": short | knobs}


def test_methods_of_images_learn_its_latents_under_their_prompts(folder, tmp_path):
    assert folder.is_dir()
    tree = progressive(guidance_teacher=1.5)
    assets = load(spec(tree), CPU)
    assert assets.dataset.shape == (4, 4, 4)
    assert assets.teacher_fid.nfe == 8  # 4 guided steps
    result = run(assets, tmp_path / "row", task())
    assert result.fid.nfe == 2
    few = tmp_path / "few.txt"
    few.write_text("a nine\n")
    with pytest.raises(InputError, match=r"1 prompts.* captions of digits"):
        load(spec(tree | {"prompts": str(few)}), CPU)
    tree["method"]["clip_targets"] = True
    with pytest.raises(SpecError, match=r"method\.clip_targets true is for pixels"):
        spec(tree)


def test_a_launch_shows_each_step_of_the_preparations(folder, cache, tmp_path):
    assert folder.is_dir()
    url = resolve_storage_url(f"sqlite:///{tmp_path}/study.db")
    Study.create(url, spec(progressive() | {"resources": {"gpus": 0}}))
    shutil.copytree(cache, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/latents", ignore_errors=True)
    worker = WorkerConfig(
        study="latent-digits",
        storage=url,
        runs=str(tmp_path / "runs"),
        cache=str(tmp_path / "cache"),
    )
    shown = io.StringIO()
    display = Display(lambda: pytest.fail("no row runs"), shown)
    for message in prepare_task(worker, 1):
        assert isinstance(message, Preparation), message
        display.preparing(message)
    assert "encoding the data set 1797/1797" in shown.getvalue()


@pytest.mark.slow
def test_its_study_says_what_it_costs(folder):
    assert folder.is_dir()
    cost = measure(read_spec(STUDY, CHANGES))
    assert cost is not None
    assert cost.recording_seconds > 0


@pytest.mark.slow
def test_its_study_runs_from_the_launch_to_the_report(cache, tmp_path):
    workplace = Workplace(tmp_path, cache)
    tree = yaml.safe_load(STUDY.read_text())
    tree |= {name: tree[name] | those for name, those in CHANGES.items()}
    shutil.copy(STUDY.with_suffix(".txt"), tmp_path)
    out = workplace.ran("launch", workplace.write(tree))
    assert out.startswith("study latent-digits: 2 of 2 trials complete")
    workplace.ran("confirm", "latent-digits", "--candidates", "1", "--seeds", "3")
    workplace.done("export", "latent-digits", "model")
    assert (tmp_path / "model/samples.png").is_file()
    assert (tmp_path / "model/diffusers/scheduler/student_scheduler.py").is_file()
    workplace.done("report", "latent-digits", "--out", "shown")
    assert (tmp_path / "shown/report.md").read_text().count("![") > 1
