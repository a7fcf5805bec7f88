"""What a dry run says: the cost of a study, and what a launch would download or be refused for."""

import dataclasses
import re

import pytest
import search.worker.estimate
import search.worker.memory
import torch
from search.spec.study_file import read_spec
from search.worker.engine import architecture, check
from search.worker.estimate import _affordable, estimate, trials_work
from search.worker.memory import Memory

import bdense.models.public
import bdense.models.sources
from bdense.diffusion.denoiser import build_denoiser
from bdense.models.public import CHECKPOINTS, EDM_LICENCE
from bdense.models.store import save_denoiser
from search.verbs.launch import _dry_run
from tests.small import small_teacher
from tests.studies import REMOVED, STUDIES, spec

NAME = "edm-cifar10-32x32-uncond-vp"


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """Empty folders, plenty of room, and no time to lose."""
    for variable in ("BDENSE_CHECKPOINTS", "BDENSE_RUNS", "BDENSE_DATA", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: 2**50)
    monkeypatch.setattr(search.worker.estimate, "MEASURE_SECONDS", 0.01)


@pytest.fixture
def published(monkeypatch):
    """The table's entry with a small network."""
    small = dataclasses.replace(
        CHECKPOINTS[NAME],
        architecture=small_teacher().describe(),
        url=CHECKPOINTS[NAME].url.replace(".pkl", ".safetensors"),
        sha256=None,
    )
    for module in (bdense.models.public, search.worker.estimate, bdense.models.sources):
        monkeypatch.setattr(module, "CHECKPOINTS", {NAME: small})
    return small


def test_the_cost_is_known_without_the_file(published):
    cost = estimate(spec(teacher={"checkpoint": NAME}))
    students, evaluations, disk, memory, time, download = cost.lines()
    assert students == "students: 6 (baselines included)"
    # NFE 2 with AFS at K = 4: two trained intervals of three; 12 teacher steps.
    assert evaluations == (
        "network evaluations, in images: 30,720 of the teacher for trajectories; 5,120 "
        "forward+backward and 512 forward for each student"
    )
    assert (cost.work.updates, cost.work.evaluations) == (6 * 5120, 30_720 + 6 * 512)
    assert disk.startswith("disk: ")
    assert memory.startswith("memory: about ")
    assert time.startswith("time: at most ")
    assert cost.forward_seconds > 0
    assert cost.update_seconds > 0
    assert download == (
        f"download: the launch fetches {published.url} to {published.path} (about 0 MiB)"
    )
    assert not published.path.exists()


def test_what_a_trial_of_a_study_counts_for():
    """Looks are drawn too; live, each student has the teacher walk for it; 2 + 3 are kept."""
    study = spec(
        trajectories={"mode": "live"},
        pruning={"at": [0.25, 0.5], "images": 100},
        teacher__train__network={"model_channels": 64, "channel_mult": [1, 2]},
    )
    with torch.device("meta"):
        teacher = build_denoiser(architecture(study))
    work = trials_work(study, teacher)
    drawn = (256 + 2 * 100) * 2
    assert work.updates == 10_000 + 6 * 5120
    assert work.evaluations == 6 * 2560 * 12 + 6 * drawn
    assert f" and {drawn} forward for each student; 10,000 forward+backward " in work.lines[1]
    mib = 4 * sum(p.numel() for p in teacher.parameters()) * (3 + 2) / 2**20
    assert mib > 10
    assert work.lines[2] == f"disk: 0 MiB of trajectories, {mib:,.0f} MiB of kept students"


def test_once_it_is_here_nothing_is_said(published):
    save_denoiser(published.path, small_teacher(), {})
    cost = estimate(spec(teacher={"checkpoint": NAME}))
    assert cost.remarks == ()
    assert cost.lines()[-1].startswith("time: ")


def test_all_that_is_downloaded_is_named_with_its_size(published, tmp_path):
    study = spec(
        data=REMOVED,
        teacher={"checkpoint": NAME},
        evaluation={"images": 256, "extractor": "inception", "reference": "cifar10-32x32"},
    )
    *_, reference, weights = estimate(study).lines()
    assert reference.endswith("/cifar10-32x32.npz (about 32 MiB)")
    assert "/fid-refs/cifar10-32x32.npz to " in reference
    assert weights.startswith("download: the launch fetches https://github.com/toshas/torch-fidel")
    assert weights.endswith("weights-inception-2015-12-05-6726825d.pth (about 91 MiB)")
    assert str(tmp_path) in weights


def test_what_this_machine_cannot_do_is_said_and_not_refused(published, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(search.worker.memory, "free_bytes", lambda _: 2**20)
    teacher = {"checkpoint": NAME}
    (crowded, *_) = estimate(spec(teacher=teacher)).remarks
    assert crowded.startswith("not on this machine: a trial needs about 0.")
    assert " and this machine has 1 MiB free; lower " in crowded
    half = estimate(spec(teacher=teacher, precision="float16", resources={"gpus": 2})).remarks
    assert half[:2] == (
        "not on this machine: it has no GPU, and a trial asks for resources.gpus 2",
        "not on this machine: precision float16 needs a CUDA device, not cpu; use float32 or "
        "bfloat16",
    )


def test_a_measurement_takes_no_more_images_than_a_gpu_has_room_for(monkeypatch):
    sizes = dict.fromkeys(("runtime", "teacher", "evaluation", "student", "gradients"), 2**30)
    memory = Memory(**sizes, adam=2**31, activations=2**34)  # 16 GiB for 128 images
    network, cuda = small_teacher(), torch.device("cuda")
    taken = {}
    for gib in (4, 12, 80):
        monkeypatch.setattr(search.worker.estimate, "free_bytes", lambda _, gib=gib: gib * 2**30)
        taken[gib] = _affordable(network, 128, memory, cuda)
    assert taken == {4: 1, 12: 64, 80: 128}


def test_a_network_without_room_is_not_measured(published, monkeypatch):
    monkeypatch.setattr(search.worker.estimate, "free_bytes", lambda _: 2**10)
    cost = estimate(spec(teacher={"checkpoint": NAME}, resources={"gpus": 0}))
    told = "time: not measured, the network alone has no room on 1 CPU thread(s)"
    assert told in cost.lines()


def test_a_trials_own_teacher_is_known_without_its_data():
    """Its shape is: neither the images nor the network are here."""
    study = spec(data="cifar10", evaluation__extractor="cifar10-classifier")
    told = "; 10,000 forward+backward to train the teacher"
    assert estimate(study).work.lines[1].endswith(told)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_that_comes_along_runs_dry(path, monkeypatch, capsys):
    """Without its checkpoint, its data, the internet, or a GPU."""
    monkeypatch.setattr(search.worker.estimate, "_measure", lambda *_: (1e-3, 3e-3))
    study = read_spec(path)
    check(study)
    _dry_run(study)
    out = capsys.readouterr().out
    assert out.startswith(f"name: {study.name}\n")
    assert f"# fingerprint {study.fingerprint()}\n" in out
    assert "# memory: about " in out
    if study.teacher.checkpoint in CHECKPOINTS:
        assert out.count("# download: ") == 3  # teacher, reference and Inception's weights
        assert CHECKPOINTS[study.teacher.checkpoint].licence == EDM_LICENCE
        # Recorded trajectories have room: a launch that found none would end there.
        (mib,) = re.findall(r"# disk: ([\d,]+) MiB of trajectories", out)
        assert 0.9 < int(mib.replace(",", "")) / 1024 / study.trajectories.max_gib < 1


PUBLISHED = [path for path in STUDIES if "teacher: {checkpoint: " in path.read_text()]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_studies_have_sfds_hyperparameters(path):
    """Zhou et al. 2024, as in the reference's launch script."""
    study = read_spec(path)
    student, budget, evaluation = study.student, study.budget, study.evaluation
    assert study.name.endswith(f"-nfe{student.nfe}")
    assert (student.substeps, student.afs) == (4, True)
    assert (student.solver.name, student.solver.order) == ("dpmpp", 3)
    assert student.schedule.model_dump() == {
        "kind": "polynomial",
        "rho": 7.0,
        "sigma_min": 0.006,
        "sigma_max": 80.0,
    }
    lr = 1e-5 if "imagenet" in path.name else 5e-5
    assert (budget.kimg, budget.batch, budget.lr) == (200, 128, lr)
    assert (evaluation.images, evaluation.extractor) == (50_000, "inception")
    dataset = {"cif": "cifar10-32x32", "ima": "imagenet-64x64", "ffh": "ffhq-64x64"}[path.name[:3]]
    assert evaluation.reference == dataset
    assert study.teacher.checkpoint.startswith(f"edm-{dataset}")
    # The paper's best weights are among those that are looked at.
    assert study.weights.a.low < 1.386 < study.weights.a.high
    assert study.weights.b.low < -4.274 < study.weights.b.high
