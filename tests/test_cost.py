"""What a dry run says of a study's cost, and a launch that would run out of memory."""

import dataclasses
import functools
import itertools
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bdense.diffusion.denoiser import build_denoiser
from bdense.diffusion.sampling import Sampler
from bdense.errors import InputError
from bdense.models.store import save_denoiser
from bdense.models.zoo import (
    CHECKPOINTS,
    CONVERTED_CHECKPOINTS,
    EDM_LICENCE,
    HUB_CHECKPOINTS,
)
from search.places import cache_folder
from search.spec.file import parse, read_tree
from search.spec.resolve import describe_teacher, resolve
from search.spec.study import StudySpec
from search.storage.engine import resolve_storage_url
from search.study.study import GPU_BYTES, Study
from search.verbs.launch import dry_run
from search.worker import cost
from search.worker.cost import TrialCost, cost_lines, measure, require_gpu, require_room
from search.worker.distillation import Distillation
from search.worker.ray_tasks import WorkerConfig, WorkerError, prepare_task
from tests.measured import created
from tests.programs import end_of_work
from tests.small import small_teacher
from tests.studies import (
    CONSISTENCY,
    REMOVED,
    STUDIES,
    STUDY,
    changed,
    promotion,
    spec,
)

GIB = 2**30
CUDA = TrialCost(
    recording_seconds=2.0,
    update_seconds=10.0,
    draw_seconds=0.5,
    feature_seconds=0.25,
    peak_bytes=3 * GIB,
    free_bytes=8 * GIB,
    device="cuda",
)
CPU = dataclasses.replace(CUDA, peak_bytes=GIB // 4, free_bytes=GIB, device="cpu")
WIDE = {"teacher__train__network": {"model_channels": 128, "channel_mult": [1, 2]}}


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    monkeypatch.delenv("BDENSE_CACHE", raising=False)
    for variable in ("BDENSE_CHECKPOINTS", "BDENSE_RUNS", "BDENSE_DATA", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(cost, "PATIENCE_SECONDS", 0.0)


def read(path: Path) -> StudySpec:
    """As ``read_spec`` does, in this process."""
    return resolve(parse(read_tree(path), source=str(path)), source=path.name)


def mib(study, students: int) -> str:
    """Of so many students' parameters."""
    with torch.device("meta"):
        teacher = build_denoiser(describe_teacher(study)[0])
    return f"{4 * sum(p.numel() for p in teacher.parameters()) * students / 2**20:,.0f} MiB"


# The measurement.


@functools.cache
def measured(made: Callable[..., StudySpec]) -> TrialCost:
    """In a process of its own, which loads torch."""
    found = measure(made(resources={"gpus": 0}))
    assert found is not None
    return found


@pytest.mark.parametrize("made", [spec, promotion], ids=["sfd", "progressive"])
def test_an_update_and_a_batch_of_images_are_measured_for_real(made):
    found = measured(made)
    assert found.device == "cpu"
    assert found.update_seconds > 0
    assert found.draw_seconds > 0
    assert (found.recording_seconds > 0) == (made is spec)
    assert found.feature_seconds == 0.0  # a small classifier
    # Python with torch, and not much more.
    assert 2**27 < found.peak_bytes < 2 * GIB < found.free_bytes


def test_a_larger_batch_takes_more_memory():
    live = {"mode": "live"}
    large = measure(spec(resources={"gpus": 0}, trajectories=live, method__batch=512))
    assert large.recording_seconds == 0.0
    # Each layer keeps its input: 8 channels of 8 x 8 floats in some tens of them, per image.
    assert large.peak_bytes - measured(spec).peak_bytes > (512 - 64) * 20 * 8 * 64 * 4


def test_whoever_does_not_wait_is_told_nothing():
    assert measure(spec(), patience=0) is None


def test_what_this_machine_cannot_compute_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="precision float16 needs a CUDA device, not cpu"):
        measure(spec(precision="float16", resources={"gpus": 0}))


@pytest.fixture
def student_file(tmp_path) -> str:
    """A student of SFD for 6 NFE."""
    metadata = {"kind": "student", "sampler": Sampler(num_intervals=6, afs=False).describe()}
    save_denoiser(tmp_path / "student.safetensors", small_teacher(), metadata)
    return str(tmp_path / "student.safetensors")


def test_a_student_is_distilled_further(student_file, monkeypatch):
    """The dry run's cost too is that of a teacher with a student's first step."""
    monkeypatch.setattr(cost, "PATIENCE_SECONDS", 600.0)
    options = {"second_stage": True, "nfe": 1, "batch": 4, "kimg": 0.02}
    own = spec(teacher={"checkpoint": student_file}, method={"name": "sfd", **options})
    assert own.resolved.num_branches == 3
    *_, time = cost_lines(own)
    assert "measured on " in time


def test_a_student_is_no_teacher_of_another_method(student_file):
    for tree in (STUDY, changed(method=CONSISTENCY)):
        with pytest.raises(InputError, match=r"method: .* is a student"):
            spec(tree, teacher={"checkpoint": student_file})


# Too little memory.


def test_memory_that_runs_out_on_the_way_is_refused(monkeypatch):
    """Really: the process has one GiB, half of which Python with torch takes."""
    monkeypatch.setattr(cost, "free_memory", lambda: GIB)
    study = spec(resources={"gpus": 0}, method__batch=2**18, method__kimg=2**18 / 1000)
    with pytest.raises(InputError, match="one trial alone runs out of memory") as error:
        require_room(study, 1)
    assert "lower method.batch (262144 now) or evaluation.batch (128 now)" in str(error.value)


def test_a_launch_that_goes_on_asks_only_what_is_free(monkeypatch):
    study = spec(resources={"gpus": 0})
    monkeypatch.setattr(cost, "measure", lambda *_, **__: CPU)
    require_room(study, 1)
    monkeypatch.setattr(cost, "measure", lambda *_, **__: pytest.fail("measured again"))
    require_room(spec(name="other", resources={"gpus": 0}, plan={"trials": 9}), 1)
    monkeypatch.setattr(cost, "free_memory", lambda: 2**20)
    with pytest.raises(InputError, match="1 trial of study digits at once need"):
        require_room(study, 1)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        require_room(spec(resources={"gpus": 0}, method__batch=32), 1)


def test_a_kept_cost_of_another_form_is_measured_again(monkeypatch):
    measured = []
    monkeypatch.setattr(cost, "measure", lambda *_, **__: measured.append(CPU) or CPU)
    study = spec(resources={"gpus": 0})
    for number in (1, 2, 2):
        require_room(study, 1)
        assert len(measured) == number
        if number == 1:
            (kept,) = (cache_folder() / "costs").iterdir()
            kept.write_text("{}")


def test_a_preparation_on_a_gpu_tells_workers_what_a_trial_takes_of_one(url, monkeypatch):
    study = created(url, spec())
    monkeypatch.setattr(cost, "measure", lambda *_, **__: CUDA)
    monkeypatch.setattr(cost, "_free_bytes", lambda _: CUDA.free_bytes)

    def loaded(*_: object) -> None:
        raise InputError("there is nothing to load here")

    monkeypatch.setattr("search.worker.distillation.load", loaded)
    with pytest.raises(InputError, match="nothing to load"):
        next(Distillation.prepare(study, 1, lambda *_: None))
    assert study.main.attribute(GPU_BYTES) == CUDA.peak_bytes


@pytest.mark.parametrize(
    ("gpus", "size", "said"),
    [
        ("auto", 2.5, "needs 3.00 GiB, and the GPU there has 2.50 GiB"),
        (0.25, 10, "needs 3.00 GiB, and resources.gpus=0.25 of the GPU there has 2.50 GiB"),
    ],
)
def test_a_worker_with_a_smaller_gpu_takes_no_trial(url, monkeypatch, gpus, size, said):
    study = created(url, spec(resources={"gpus": gpus}))
    study.main.change(GPU_BYTES, lambda _: CUDA.peak_bytes)
    monkeypatch.setattr("search.worker.distillation.use_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    card = SimpleNamespace(total_memory=round(size * GIB))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    error = end_of_work(study)
    assert error.is_input_error
    assert said in error.message
    assert all(ledger.counts().running == 0 for ledger in study.ledgers)
    require_gpu(study.spec, round(CUDA.peak_bytes * 0.8))


def test_what_is_refused_is_not_kept(monkeypatch):
    monkeypatch.setattr(cost, "measure", lambda *_, **__: CUDA)
    with pytest.raises(InputError, match="3 trials of study digits at once"):
        require_room(spec(resources={"gpus": 0.25}), 3)
    assert not (cache_folder() / "costs").exists()


def test_a_batch_is_timed_apart_from_the_rest_of_its_update(monkeypatch):
    """By a clock that gives 1, 2, ...: of the second update the batch has 5, the rest 6."""
    study = spec(resources={"gpus": 0})
    described, known = describe_teacher(study)
    stage = cost._first_stage(study, build_denoiser(described), known)
    assert cost._update_seconds(stage, itertools.count(1).__next__) == (5, 6)


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_that_the_system_ends_is_one_without_memory(monkeypatch):
    monkeypatch.setattr(cost, "_measure", killed)
    with pytest.raises(
        InputError, match=r"alone runs out of memory .*lower method.batch \(64 now"
    ):
        require_room(promotion(), 1)


@pytest.mark.parametrize(
    ("gpus", "together", "expected"),
    [
        ("auto", 4, None),
        (2, 4, None),
        (0.5, 4, None),
        (0.25, 2, None),
        (
            0.25,
            4,
            "4 trials of study digits at once need 12.00 GiB and the GPU has 8.00 GiB free; run "
            "fewer than 4 on a machine by --workers, or lower method.batch (64 now) or "
            "evaluation.batch (128 now)",
        ),
    ],
)
def test_trials_that_share_a_gpu_have_to_fit_together(monkeypatch, gpus, together, expected):
    monkeypatch.setattr(cost, "measure", lambda *_, **__: CUDA)
    study = spec(resources={"gpus": gpus})
    if expected is None:
        require_room(study, together)
        return
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        require_room(study, together)


def test_a_launch_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    for variable in ("BDENSE_RUNS", "BDENSE_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    url = resolve_storage_url(f"sqlite:///{tmp_path}/study.db")
    Study.create(url, spec(resources={"gpus": 0}))
    monkeypatch.setattr(cost, "measure", lambda *_, **__: CPU)
    runs, cache = (str(tmp_path / name) for name in ("BDENSE_RUNS", "BDENSE_CACHE"))
    worker = WorkerConfig(study="digits", storage=url, runs=runs, cache=cache)
    *_, last = prepare_task(worker, 9)
    assert isinstance(last, WorkerError)
    assert last.is_input_error
    assert last.message.startswith("9 trials of study digits at once need ")
    assert not (tmp_path / "BDENSE_CACHE").exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "5000"}, None),
        (
            {
                "memory.max": "9000",
                "memory.current": "5000",
                "memory.stat": "anon 3000\nactive_file 500\ninactive_file 1500",
            },
            6000,
        ),
        (
            {
                "memory.max": "4000",
                "memory.current": "5000",
                "memory.stat": "active_file 0\ninactive_file 0",
            },
            0,
        ),
    ],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(cost, "_CGROUP", tmp_path)
    free = cost.free_memory()
    assert free == expected if expected is not None else free > 2**20


# What a dry run says.


def test_a_searchs_cost_counted_by_hand(monkeypatch):
    """40 updates; an image is drawn at NFE 2. 4 trials and 2 baselines; 3 + 2 are kept."""
    monkeypatch.setattr(cost, "measure", lambda *_, **__: CUDA)
    work, disk, memory, time, teacher = cost_lines(spec(**WIDE), workers=2)
    assert work == "rows: 6, each of a student, 40 updates and 256 images"
    assert disk.endswith(f" of trajectories a seed, {mib(spec(**WIDE), 5)} of kept students")
    assert memory == "memory: 3.00 GiB a trial, of 8.00 GiB that are free"
    each = 40 * 10 + 256 * (2 * 0.5 + 0.25)
    assert each == 12 * 60
    assert (40 * 2 + 6 * each) / 2 == 36 * 60 + 40
    assert time.startswith("time: 12 min 00 s a trial, 36 min 40 s in all with 2 workers, ")
    assert teacher == "teacher: trained on 10,000 images, once, which is not counted"


def test_intermediate_images_are_drawn_too_and_live_trajectories_are_part_of_an_update(
    monkeypatch,
):
    monkeypatch.setattr(cost, "measure", lambda *_, **__: CUDA)
    plan = {"trials": 4, "replicates": 1, "at": [0.25, 0.5], "images": 100}
    work, disk, _, time, _ = cost_lines(spec(trajectories={"mode": "live"}, plan=plan))
    assert work.endswith(" 40 updates and 456 images")
    assert disk.startswith("disk: 0 MiB of trajectories")
    each = 40 * 10 + 456 * (2 * 0.5 + 0.25)
    assert each == 16 * 60 + 10
    assert time.startswith("time: 16 min 10 s a trial, 1 h 37 min in all with 1 worker, ")


def test_given_arms_of_two_stages_counted_by_hand(monkeypatch):
    """8 -> 4 -> 2 at K = 2: two rounds of 10 updates; two arms, two seeds."""
    monkeypatch.setattr(cost, "measure", lambda *_, **__: CUDA)
    work, disk, _, time, _ = cost_lines(promotion(**WIDE))
    assert work == "rows: 4, each of 2 students, 20 updates and 512 images"
    assert disk.endswith(f"{mib(promotion(**WIDE), 8)} of kept students")
    each = 2 * 10 * 10 + 256 * ((4 + 2) * 0.5 + 2 * 0.25)
    assert each == 18 * 60 + 16
    assert time.startswith("time: 18 min 16 s a trial, 1 h 13 min in all with 1 worker, ")


@pytest.mark.usefixtures("impatient")
def test_all_that_is_downloaded_is_named_with_its_size(tmp_path, monkeypatch):
    name = "edm-cifar10-32x32-uncond-vp"
    small = dataclasses.replace(CHECKPOINTS[name], architecture=small_teacher().describe())
    monkeypatch.setattr(cost, "PUBLIC_MODELS", {name: small})
    study = spec(
        data=REMOVED,
        teacher={"checkpoint": name},
        evaluation={"images": 256, "extractor": "inception", "reference": "cifar10-32x32"},
    )
    *_, told, teacher, reference, weights = cost_lines(study)
    assert told.endswith("longer than 0 s here")
    assert teacher.startswith(f"download: the launch fetches {small.url} to {small.path} (about ")
    assert reference.endswith("/cifar10-32x32.npz (about 32 MiB)")
    assert "/weights-inception-2015-12-05-6726825d.pth to " in weights
    assert str(tmp_path) in weights
    save_denoiser(small.path, small_teacher(), {})
    assert not any(str(small.path) in line for line in cost_lines(study))


# MiB of their networks.
SIZES = {
    "google/ddpm-cifar10-32": 136,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "3,279",
    "facebook/DiT-XL-2-256": "2,860",
}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
@pytest.mark.usefixtures("impatient")
def test_every_study_that_comes_along_runs_dry(path, tmp_path, monkeypatch, capsys):
    """Without its checkpoint, its data, the internet, or a GPU."""
    if any(name in path.read_text() for name in (*HUB_CHECKPOINTS, *CONVERTED_CHECKPOINTS)):
        pytest.importorskip("diffusers", reason="needs the diffusers extra")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    study = read(path)
    dry_run(study, None)
    out = capsys.readouterr().out
    assert re.match(r"# (with [^\n]+:\n#   )?rows: ", out)
    assert f"# fingerprint {study.fingerprint()}\nname: {study.name}\n" in out
    if study.teacher.checkpoint in CHECKPOINTS:
        assert out.count("# download: ") == 3  # teacher, reference and Inception's weights
        assert CHECKPOINTS[study.teacher.checkpoint].licence == EDM_LICENCE
        # Recorded trajectories have room: a launch that found none would end there.
        (size,) = re.findall(r"# disk: ([\d,]+) MiB of trajectories", out)
        assert 0.9 < int(size.replace(",", "")) / 1024 / study.trajectories.max_gib < 1
    elif study.teacher.checkpoint in CONVERTED_CHECKPOINTS:
        assert CONVERTED_CHECKPOINTS[study.teacher.checkpoint].text() in out
        assert out.count("# download: ") == 2
    elif study.teacher.checkpoint is not None:
        name, size = study.teacher.checkpoint, SIZES[study.teacher.checkpoint]
        assert f"# download: the launch fetches https://huggingface.co/{name}" in out
        assert f"(about {size} MiB)" in out
    if study.prompts == "ms-coco-val2014-30k":
        assert "MS-COCO_val2014_30k_captions.csv to " in out
        assert f"https://huggingface.co/{study.evaluation.clip_score}" in out
    assert not (tmp_path / "hub").exists()


PUBLISHED = [path for path in STUDIES if "teacher: {checkpoint: edm-" in path.read_text()]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_studies_have_sfds_hyperparameters(path):
    """Zhou et al. 2024, as in the reference's launch script."""
    study = read(path)
    method, evaluation = study.method.options, study.evaluation
    assert study.name.endswith(f"-nfe{method['nfe']}")
    assert (method["substeps"], method["afs"]) == (4, True)
    assert (method["solver"], method["order"]) == ("dpmpp", None)  # the highest, 3
    grid = {key: method[key] for key in ("schedule", "rho", "sigma_min", "sigma_max")}
    assert grid == {"schedule": "polynomial", "rho": 7, "sigma_min": 0.006, "sigma_max": 80}
    lr = 1e-5 if "imagenet" in path.name else 5e-5
    assert (method["kimg"], method["batch"], method["lr"]) == (200, 128, lr)
    assert (evaluation.images, evaluation.extractor) == (50_000, "inception")
    dataset = {"cif": "cifar10-32x32", "ima": "imagenet-64x64", "ffh": "ffhq-64x64"}[path.name[:3]]
    assert evaluation.reference == dataset
    assert study.teacher.checkpoint.startswith(f"edm-{dataset}")
    # The paper's best weights are among those that are looked at.
    space = study.space.distributions()
    assert space["a"].low < 1.386 < space["a"].high
    assert space["b"].low < -4.274 < space["b"].high
