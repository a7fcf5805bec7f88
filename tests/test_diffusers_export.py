"""Students of progressive distillation as pipelines of diffusers, against diffusers alone."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdense.diffusion.branches import widen_head
from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.pictures import to_uint8
from bdense.diffusion.preconditioning import Cosine, native_schedule
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.solvers import DDIM, Euler
from bdense.errors import InputError
from bdense.models.diffusers_export import export_pipeline
from bdense.models.diffusers_teacher import read_diffusers
from bdense.models.store import denoiser_sha256
from tests.small import small_teacher
from tests.test_diffusers_teacher import new_scheduler, new_unet, save

diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")

T, N = 50, 5
# Mild noise, so that an untrained network's images are not all black and white.
MILD = {"num_train_timesteps": T, "beta_start": 1e-3, "beta_end": 0.02}


def student_of(folder: Path, unet: Mapping[str, Any] | None = None, **scheduler: Any) -> Any:
    """A denoiser whose network diffusers made and whose process is that of its scheduler."""
    made = new_unet(**(unet or {})), new_scheduler(**MILD | scheduler)
    return read_diffusers(save(folder, *made))[0]


def own(student: NetworkDenoiser, steps: int = N, *, clip: bool = False) -> Sampler:
    schedule = native_schedule(student.precond)
    return Sampler(num_intervals=steps, afs=False, schedule=schedule, solver=DDIM(clip=clip))


def metadata_of(sampler: Sampler, **more: object) -> dict[str, Any]:
    return {"kind": "student", "method": "pd-bdense", "sampler": sampler.describe(), **more}


def noise_of(seed: int, count: int) -> torch.Tensor:
    """What a pipeline draws from that generator."""
    return torch.randn((count, 1, 8, 8), generator=torch.manual_seed(seed))


def drawn_here(student: NetworkDenoiser, sampler: Sampler, noise: torch.Tensor) -> np.ndarray:
    """[B, 8, 8] bytes."""
    return to_uint8(sampler(student, noise)).numpy()[:, 0]


def drawn_there(pipeline: Any, count: int, seed: int, **call: object) -> np.ndarray:
    images = pipeline(batch_size=count, generator=torch.manual_seed(seed), **call).images
    return np.stack([np.asarray(image) for image in images])


def assert_same_pictures(found: np.ndarray, expected: np.ndarray) -> None:
    """One level apart in a pixel of a thousand at most; most pixels neither black nor white."""
    assert found.shape == expected.shape
    apart = np.abs(found.astype(int) - expected.astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() <= 1e-3
    assert ((expected > 0) & (expected < 255)).mean() > 0.3


def load(folder: Path) -> Any:
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- the same images ----

ALONE = """
import json, sys
import numpy as np

card = open("student/README.md").read()
exec(card.split("```python\\n")[1].split("```")[0])
found = {"by_card": np.stack([np.asarray(image) for image in images])}

plain = pipeline(
    batch_size=2, num_inference_steps=5, eta=0.0, generator=torch.manual_seed(1)
).images
found["plain"] = np.stack([np.asarray(image) for image in plain])

z = torch.from_numpy(np.load("noise.npy"))
pipeline.scheduler.set_timesteps(5)
with torch.no_grad():
    for t in pipeline.scheduler.timesteps:
        z = pipeline.scheduler.step(pipeline.unet(z, t).sample, t, z).prev_sample
found["by_hand"] = z.numpy()
np.savez("found.npz", **found)
assert not [name for name in sys.modules if name.split(".")[0] == "bdense"]
"""


def test_diffusers_alone_draws_the_students_images(tmp_path):
    """By the card's own lines, by a plain call, and through scheduler and network by hand."""
    student = student_of(tmp_path / "teacher", prediction_type="v_prediction")
    sampler = own(student)
    export_pipeline(tmp_path / "student", student, metadata_of(sampler))
    noise = noise_of(2, 4)
    np.save(tmp_path / "noise.npy", noise.numpy())
    command = [sys.executable, "-c", ALONE]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    found = np.load(tmp_path / "found.npz")
    assert_same_pictures(found["by_card"], drawn_here(student, sampler, noise_of(0, 64)))
    assert_same_pictures(found["plain"], drawn_here(student, sampler, noise_of(1, 2)))
    by_hand, expected = torch.from_numpy(found["by_hand"]), sampler(student, noise)
    torch.testing.assert_close(by_hand, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    "scheduler",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": [0.0005 * (1 + i % 7) for i in range(T)]},
    ],
    ids=lambda options: "-".join(map(str, options)) + "-" + str(next(iter(options.values())))[:13],
)
def test_every_process_is_the_pipelines(tmp_path, scheduler, clip):
    student = student_of(tmp_path / "teacher", **scheduler)
    sampler = own(student, clip=clip)
    export_pipeline(tmp_path / "student", student, metadata_of(sampler))
    call = json.loads((tmp_path / "student" / "bdense.json").read_text())["pipeline_call"]
    found = drawn_there(load(tmp_path / "student"), 32, 3, **call)
    assert_same_pictures(found, drawn_here(student, sampler, noise_of(3, 32)))
    assert call.get("use_clipped_model_output", False) == clip
    settings = ", ".join(f"{key}={value!r}" for key, value in call.items())
    assert f"batch_size=64, {settings}, " in (tmp_path / "student" / "README.md").read_text()


@pytest.mark.parametrize("steps", [1, 2, 8, 1000])
def test_the_levels_are_those_of_our_grid(tmp_path, steps):
    """DDPM's own thousand, down to every single one of them."""
    student = student_of(tmp_path / "teacher", num_train_timesteps=1000, beta_start=1e-4)
    sampler = own(student, steps)
    export_pipeline(tmp_path / "student", student, metadata_of(sampler))
    scheduler = load(tmp_path / "student").scheduler
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    assert times == [1000 * i // steps - 1 for i in range(steps, 0, -1)]
    alpha_bar = scheduler.alphas_cumprod[times].double()
    levels = sampler.schedule.grid(steps)[:-1]
    torch.testing.assert_close(((1 - alpha_bar) / alpha_bar).sqrt(), levels, rtol=1e-3, atol=0)


# ---- what is in it ----


def test_the_folder_is_diffusers_and_a_card(tmp_path):
    student = student_of(tmp_path / "teacher")
    before = denoiser_sha256(student)
    metadata = metadata_of(
        own(student), licence="Apache-2.0", fid_table=[{"steps": 5, "fid": 9.25}]
    )
    folder = tmp_path / "made" / "student"
    paths = export_pipeline(folder, student, metadata)
    assert sorted(path.relative_to(folder).as_posix() for path in paths) == [
        "README.md",
        "bdense.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert {path for path in folder.rglob("*") if path.is_file()} == set(paths)
    assert [path.name for path in folder.parent.iterdir()] == ["student"]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert {key: scheduler[key] for key in (*MILD, "beta_schedule", "trained_betas")} == {
        **MILD,
        "beta_schedule": "linear",
        "trained_betas": None,
    }
    assert (scheduler["timestep_spacing"], scheduler["steps_offset"]) == ("trailing", 0)
    assert (scheduler["set_alpha_to_one"], scheduler["clip_sample"]) == (True, False)
    readable = json.loads((folder / "bdense.json").read_text())
    assert readable.items() >= metadata.items()
    assert readable["pipeline_call"] == {"num_inference_steps": 5, "eta": 0.0}
    assert readable["weights_sha256"] == before
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: diffusers\n")
    assert "| sampler | 5 DDIM steps, ddpm levels, even in time |" in card
    assert card.endswith("\n\n## FID\n\n| steps | FID |\n|---|---|\n| 5 | 9.25 |\n")
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.rglob("*.json"))
    # It is still a teacher for this project, and the student is as it was.
    assert denoiser_sha256(read_diffusers(folder)[0]) == before == denoiser_sha256(student)


# ---- what is refused ----


def assert_refused(folder: Path, student: NetworkDenoiser, metadata: Any, message: str) -> None:
    there = sorted(folder.parent.iterdir())
    with pytest.raises(InputError, match=message):
        export_pipeline(folder, student, metadata)
    assert sorted(folder.parent.iterdir()) == there


INSTEAD = ".*export_folder"


def test_networks_that_no_pipeline_calls(tmp_path):
    plain, out = student_of(tmp_path / "teacher"), tmp_path / "student"
    metadata = metadata_of(own(plain))
    message = f"UNet2DModel .* SongUNet; {INSTEAD}"
    assert_refused(out, small_teacher(), metadata, message)
    message = "2 branches, .* export_branch"
    assert_refused(out, widen_head(plain, 2), metadata, message)
    classes = student_of(tmp_path / "classes", {"num_class_embeds": 3})
    message = f"3 classes, .*; {INSTEAD}"
    assert_refused(out, classes, metadata, message)
    cosine = NetworkDenoiser(plain.model, Cosine())
    message = f"precond='cosine'; {INSTEAD}"
    assert_refused(out, cosine, metadata_of(own(cosine)), message)


def test_samplers_that_no_pipeline_has(tmp_path):
    student, out = student_of(tmp_path / "teacher"), tmp_path / "student"
    schedule = native_schedule(student.precond)
    euler = Sampler(num_intervals=N, afs=False, schedule=schedule, solver=Euler())
    message = f"distilled for Euler steps; {INSTEAD}"
    assert_refused(out, student, metadata_of(euler), message)
    afs = Sampler(num_intervals=N, afs=True, schedule=schedule, solver=DDIM())
    assert_refused(out, student, metadata_of(afs), "for DDIM with afs steps")
    other = DDPMSchedule(num_train_timesteps=T, beta_end=0.03)
    another = Sampler(num_intervals=N, afs=False, schedule=other, solver=DDIM())
    message = r"\(ddpm levels, even in time\); distil it on its teacher's"
    assert_refused(out, student, metadata_of(another), message)
    assert_refused(out, student, {"kind": "student"}, "no sampler")
    message = f"64 steps do not divide .* {T} .*; distil to 50 steps, or {INSTEAD}"
    assert_refused(out, student, metadata_of(own(student, 64)), message)


def test_a_folder_that_exists_is_refused_and_a_failure_leaves_none(tmp_path, monkeypatch):
    student = student_of(tmp_path / "teacher")
    message = re.escape(f"{tmp_path / 'teacher'} exists already")
    assert_refused(tmp_path / "teacher", student, metadata_of(own(student)), message)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("bdense.models.diffusers_export.pipeline_card", fail)
    with pytest.raises(OSError, match="no space left"):
        export_pipeline(tmp_path / "student", student, metadata_of(own(student)))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
