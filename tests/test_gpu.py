"""What a GPU must agree on; skipped where torch sees none."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from bdense.data.datasets import Dataset, load_dataset
from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, draw_images
from bdense.errors import NonFiniteLossError
from bdense.execution import Execution, exact_products
from bdense.methods.method import Inputs
from bdense.methods.progressive import PDConfig, Progressive
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.sfd import branch_losses, branch_states
from bdense.metrics.metrics import frechet_distance, image_effects
from bdense.metrics.references import statistics_of
from bdense.training.loop import train
from bdense.training.parallel import Team, team_of
from bdense.training.teacher import TeacherConfig, train_teacher
from bdense.weights.log_linear import LogLinearWeights
from bdense.weights.weighting import FixedWeights
from search.worker.cost import _CONTEXT, measure
from tests.contracts.methods import KilledError, dying_in
from tests.goldens import discover, golden_network
from tests.networks import tiny_denoiser
from tests.precisions import assert_within_bounds
from tests.small import same_weights, sfd, sfd_stage, small_teacher, small_trajectories
from tests.studies import spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def student_on(device: str) -> NetworkDenoiser:
    return student_of(small_teacher().to(device))


def student_of(teacher: NetworkDenoiser) -> NetworkDenoiser:
    return export_branch(sfd(small_trajectories(teacher), LogLinearWeights(a=1.0)(4), lr=1e-4))


def test_students_of_cpu_and_gpu_agree_to_rounding():
    """Noise is drawn on the CPU, so both see the same batches; L1 signs may flip at kinks."""
    sampler = Sampler(num_intervals=3, afs=True)
    drawn = [draw_images(student_on(device), sampler, 16, seed=0) for device in ("cpu", "cuda")]
    difference = (drawn[0].int() - drawn[1].int()).abs().float()
    assert difference.mean() < 1.0


def test_a_deterministic_gpu_repeats_itself_bit_for_bit(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        assert same_weights(student_on("cuda"), student_on("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- precision, layout, compilation ----


def outputs(denoiser: NetworkDenoiser) -> torch.Tensor:
    """[3, B, C, H, W] at three levels, on the CPU."""
    device = next(denoiser.parameters()).device
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(4, *denoiser.image_shape, generator=draw).to(device)
    with torch.no_grad(), exact_products():
        levels = map(torch.tensor, (0.02, 0.7, 40.0))
        return torch.stack([denoiser((0.5 + s) * noise, s) for s in levels]).cpu()


@pytest.mark.golden
@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("path", discover("edm-song-tiny.nosrc.pkl"))
def test_precisions_are_as_close_as_the_reference_says(path, precision):
    with exact_products():
        net = golden_network("edm-song-tiny").to("cuda")
        assert_within_bounds(net, Execution(precision=precision))


@pytest.mark.parametrize(
    "execution",
    [
        Execution(channels_last=True),
        Execution(compile=True),
        Execution(compile=True, compile_mode="reduce-overhead"),
    ],
    ids=["channels_last", "compile", "reduce-overhead"],
)
def test_layout_and_compiler_change_rounding_alone(execution):
    """Teacher and a student's gradient; sums of many terms, some of which cancel."""
    plain, other = small_teacher(channels=3).to("cuda"), small_teacher(channels=3).to("cuda")
    other.execute(execution)
    torch.testing.assert_close(outputs(other), outputs(plain), rtol=1e-4, atol=1e-5)
    with exact_products():
        expected, found = first_gradient(plain), first_gradient(other)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def first_gradient(teacher: NetworkDenoiser) -> torch.Tensor:
    """Of a new student's branches, at targets so far away that no L1 sign flips on rounding."""
    student = widen_head(teacher, 4)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4, *teacher.image_shape, generator=draw).to("cuda")
    levels = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    states = branch_states(student.branches, 4 * x, levels)
    branch_losses(states, x.expand(4, -1, -1, -1, -1) + 100).sum().backward()
    return torch.cat([p.grad.flatten().cpu() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_students_of_any_precision_learn_the_same(precision):
    """Images of two trainings that differ in the format differ less than training changed."""
    with exact_products():
        teacher = small_teacher().to("cuda")
        exact = student_of(teacher)
        untrained = outputs(teacher)
        student = student_of(teacher.execute(Execution(precision=precision)))
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        learned = (outputs(exact) - untrained).abs().mean()
        off = (outputs(student.execute(Execution())) - outputs(exact)).abs().mean()
    # What is so small may be computed without tensor cores, which leaves tf32 nothing to round.
    assert off < learned
    assert off > 0 or precision == "tf32"


def test_an_overflow_names_iteration_and_branch():
    """float16 ends at 65504, where bfloat16 goes on."""
    with exact_products():
        trajectories = small_trajectories(small_teacher().to("cuda"))
        teacher = small_teacher().to("cuda")
        with torch.no_grad():
            next(p for p in teacher.parameters() if p.dim() == 4).mul_(1e7)
        weights, short = LogLinearWeights(a=1.0)(4), {"images": 4, "lr": 5e-5, "start": teacher}
        teacher.execute(Execution(precision="bfloat16"))
        sfd(trajectories, weights, **short)
        teacher.execute(Execution(precision="float16"))
        with pytest.raises(NonFiniteLossError, match="iteration 0, interval 1, branch 1"):
            sfd(trajectories, weights, **short)


def test_a_teacher_is_averaged_in_float32():
    network = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "dropout": 0.0}
    config = TeacherConfig(kimg=1.024, batch=64, network=network)
    digits, device = load_dataset("digits"), torch.device("cuda")
    with exact_products():
        exact = train_teacher(digits, config, device=device)
        execution = Execution(precision="bfloat16", channels_last=True)
        teacher = train_teacher(digits, config, device=device, execution=execution)
        assert {p.dtype for p in teacher.parameters()} == {torch.float32}
        off = (outputs(teacher) - outputs(exact)).abs().mean()
    assert 0 < off < 0.05


# ---- progressive distillation ----


def halved(device: str, knobs: dict[str, Any], **options: Any) -> NetworkDenoiser:
    """A branched student of 4 steps, its teacher of 8 on the same device."""
    teacher = tiny_denoiser(precond="cosine", img_channels=1, dropout=0.3).to(device)
    method, config = Progressive(), PDConfig(steps=8, until=4, batch=16, **knobs)
    inputs = Inputs(dataset=load_dataset("digits"))
    stage = method.stage(method.plan(config)[0], teacher, config, inputs)
    return train(stage, FixedWeights(torch.tensor([0.3, 0.7])), **options)


def test_a_round_on_the_gpu_is_the_cpus_to_rounding():
    """By plain gradients: Adam makes steps of the noise that branch 1's are at first."""
    config = {"updates": 4, "lr": 1e-2, "optimizer": "sgd"}
    with exact_products():
        cpu, cuda = (outputs(export_branch(halved(device, config))) for device in ("cpu", "cuda"))
        untrained = outputs(tiny_denoiser(precond="cosine", img_channels=1, dropout=0.3))
    assert (cuda - cpu).abs().max() < 1e-3 * (cpu - untrained).abs().max()


def test_a_round_resumes_bit_for_bit_on_a_deterministic_gpu(tmp_path, monkeypatch):
    config = {"updates": 5, "lr": 1e-3, "dropout": True, "flip": True}
    path = tmp_path / "round.safetensors"

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        whole = halved("cuda", config)
        with pytest.raises(KilledError):
            halved("cuda", config, checkpoint=path, checkpoint_seconds=0, on_iteration=dying_in(3))
        torch.manual_seed(99)
        seen = []
        resumed = halved("cuda", config, checkpoint=path, on_iteration=seen.append)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [done.iteration for done in seen] == [3, 4]
    assert same_weights(resumed, whole)


# ---- waits ----


def test_no_update_waits_for_the_gpu():
    """What the contract of stages shows on torch's meta device."""
    stage = sfd_stage(small_trajectories(small_teacher().to("cuda")))
    student = widen_head(stage.start, 4)
    weights = torch.ones(4, dtype=torch.float64)
    for mode in ("default", "error"):  # the first may copy what is kept for all others
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for update in stage.updates(0, stage.batch(0, slice(None))):
                update(student.branches).weighted(weights).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- recorded trajectories ----


def test_a_student_learns_the_same_from_rows_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        store = TrajectoryStore(small_trajectories(small_teacher().to("cuda")), tmp_path)
        ahead, at_once = store.record(), store.open()
        object.__setattr__(at_once, "_rows_ahead", at_once._rows)
        weights = LogLinearWeights(a=1.0)(4)
        assert same_weights(sfd(ahead, weights, lr=1e-4), sfd(at_once, weights, lr=1e-4))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- statistics ----


def test_a_distance_of_sums_on_the_gpu_is_the_cpus_to_rounding():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(9000, 64, generator=draw) + 10 for _ in range(2))
    reference, gpu = statistics_of(b), torch.device("cuda")
    own, summed = statistics_of(a), statistics_of(a, gpu)
    np.testing.assert_allclose(summed.sigma, own.sigma, rtol=1e-10, atol=1e-13)
    expected = frechet_distance(own, reference)
    assert frechet_distance(summed, reference) == pytest.approx(expected, rel=1e-6)
    effects = image_effects(a, own, reference)
    found = image_effects(a, summed, reference, gpu)
    np.testing.assert_allclose(found, effects, rtol=1e-6, atol=1e-9)


# ---- several GPUs ----


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than 2 GPUs")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_gpus_equal_one_to_rounding(precision):
    teacher = small_teacher().to("cuda:0").execute(Execution(precision=precision))
    weights, short = LogLinearWeights(a=1.0)(4), {"images": 12, "lr": 1e-4, "dropout": False}
    devices = [torch.device("cuda", index) for index in range(2)]
    students = [
        sfd(small_trajectories(teacher), weights, devices=devices[:count], **short)
        for count in (1, 2)
    ]
    alone, shared = (outputs(export_branch(student)) for student in students)
    trained = (alone - outputs(teacher)).abs().max()
    # In bfloat16 half a batch may take another kernel, and its rounding is no longer small.
    assert (alone - shared).abs().max() < (1e-2 if precision == "float32" else 0.5) * trained


def follow_out_of_memory(team: Team, device: torch.device, job: object) -> None:
    team.mean(torch.ones(1, device=device))
    torch.empty(2**50, dtype=torch.uint8, device=device)


def test_images_that_lie_on_a_gpu_are_the_same_batches():
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    plain = Dataset("noise", images, "")
    there, index = plain.on(torch.device("cuda")), torch.randint(64, (16,))
    assert there.images.is_cuda
    assert torch.equal(there.clean(index).cpu(), plain.clean(index))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than 2 GPUs")
def test_a_gpu_without_memory_ends_the_training_on_the_other_within_seconds():
    devices = [torch.device("cuda", index) for index in range(2)]
    began = []

    def lead() -> None:
        with team_of(devices, follow_out_of_memory, None) as team:
            began.append(time.monotonic())
            while True:  # a sum that is ended has a result like any other
                team.mean(torch.ones(1, device=devices[0])).cpu()

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        lead()
    assert time.monotonic() - began[0] < 60
    # And a team can be formed anew.
    with team_of(devices, follow_one_sum, None) as team:
        assert float(team.mean(torch.ones(1, device=devices[0]))) == 1


def follow_one_sum(team: Team, device: torch.device, job: object) -> None:
    team.mean(torch.ones(1, device=device))


def test_a_trial_is_measured_in_a_process_of_its_own():
    """Its memory against that of a training here; loosely, as torch reserves more than it uses."""
    study = spec(method__batch=1024, method__kimg=1.024, trajectories={"mode": "live"})
    found = measure(study)
    assert found.device == "cuda"
    assert 0 < found.update_seconds < 60
    teacher = small_teacher().to("cuda")
    trajectories = small_trajectories(teacher, count=2, batch=1024)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sfd(trajectories, LogLinearWeights(a=1.0)(4), images=2048, lr=1e-4)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.8 * taken < found.peak_bytes - _CONTEXT < 4 * taken
    assert found.peak_bytes < found.free_bytes
