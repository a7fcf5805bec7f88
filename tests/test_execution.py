"""Number format, memory layout, compilation: they change how a network is computed, not what."""

import copy
import shutil
import sysconfig
from pathlib import Path
from typing import get_args

import pytest
import torch

from bdense.data.datasets import load_dataset
from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.execution import CompileMode, Execution, Precision, exact_products
from bdense.models.store import denoiser_sha256, load_tensors
from bdense.training.loop import train
from bdense.training.teacher import TeacherConfig, train_teacher
from bdense.weights.log_linear import LogLinearWeights
from bdense.weights.weighting import FixedWeights, LearnedWeights
from tests.contracts.methods import KilledError, Steep, dying_in
from tests.goldens import discover, golden_network
from tests.pd_nets import small_conv
from tests.precisions import assert_within_bounds
from tests.small import same_weights, sfd, sfd_stage, small_teacher, small_trajectories

CPU = torch.device("cpu")
BFLOAT16 = Execution(precision="bfloat16")
NHWC = Execution(channels_last=True)
WEIGHTS = LogLinearWeights(a=1.0)(4)


def state(sigma: float, channels: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, channels, 8, 8, generator=draw) for _ in range(2))
    return 0.5 * clean + sigma * noise


def outputs(denoiser: NetworkDenoiser) -> torch.Tensor:
    """[3, B, C, H, W] at three levels."""
    channels = denoiser.image_shape[0]
    with torch.no_grad():
        return torch.stack(
            [denoiser(state(s, channels), torch.tensor(s)) for s in (0.02, 0.7, 40.0)]
        )


def teacher_config() -> TeacherConfig:
    network = {
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (),
        "dropout": 0.0,
    }
    return TeacherConfig(kimg=0.048, batch=16, network=network)


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_are_chosen_by_time_unless_two_runs_must_choose_alike(deterministic, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    torch.use_deterministic_algorithms(deterministic)
    try:
        small_teacher().execute(Execution())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.backends.cudnn.benchmark is not deterministic


# ---- precision ----


def test_the_preconditioning_stays_in_float32():
    """At sigma -> 0 D is x itself, which bfloat16 would round by up to 0.4 %."""
    exact, rounded = small_teacher(), small_teacher().execute(BFLOAT16)
    x, low = state(0.0), torch.tensor(1e-6)
    with torch.no_grad():
        denoised = rounded(x, low)
    assert denoised.dtype == torch.float32
    assert (denoised - x).abs().max() < 1e-5
    assert (x.bfloat16() - x).abs().max() > 1e-3
    # The network itself was computed in bfloat16.
    assert (outputs(rounded) - outputs(exact)).abs().max() > 1e-3


@pytest.mark.golden
@pytest.mark.parametrize("path", discover("edm-song-tiny.nosrc.pkl"))
def test_bfloat16_is_as_close_as_the_reference_says(path):
    assert_within_bounds(golden_network("edm-song-tiny"), BFLOAT16)


def test_updates_are_made_in_float32_whatever_the_network_computes_in():
    exact = sfd(small_trajectories(small_teacher()), WEIGHTS)
    teacher = small_teacher().execute(BFLOAT16)
    student = sfd(small_trajectories(teacher), WEIGHTS)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert not same_weights(student, exact)
    untrained = outputs(teacher.execute(Execution()))
    learned = (outputs(export_branch(exact)) - untrained).abs().mean()
    student.execute(Execution())
    assert (outputs(export_branch(student)) - outputs(export_branch(exact))).abs().mean() < learned


def test_students_compute_as_their_teacher_does():
    execution = Execution(precision="bfloat16", channels_last=True)
    teacher = small_teacher().execute(execution)
    student = widen_head(teacher, 4)
    assert student.execution == execution
    assert export_branch(student).execution == execution
    assert copy.deepcopy(teacher).execution == execution
    assert small_trajectories(teacher).on(CPU).teacher.execution == execution


def test_trajectories_of_another_precision_are_other_trajectories():
    """A layout or a compiler changes rounding alone: what was recorded before stays good."""
    described = small_trajectories(small_teacher()).describe()
    other = small_trajectories(small_teacher().execute(BFLOAT16)).describe()
    assert {key for key in described if described[key] != other[key]} == {"precision"}
    assert small_trajectories(small_teacher(channels=3).execute(NHWC)).describe() == (
        small_trajectories(small_teacher(channels=3)).describe()
    )


@pytest.mark.parametrize("execution", [BFLOAT16, NHWC], ids=["bfloat16", "channels_last"])
def test_a_teacher_is_averaged_in_float32(tmp_path, execution):
    """Only another precision makes it another teacher."""
    digits, path = load_dataset("digits"), tmp_path / "teacher.safetensors"
    keep = {"device": CPU, "checkpoint": path, "checkpoint_seconds": 0}
    exact = train_teacher(digits, teacher_config(), **keep)
    assert "precision" not in load_tensors(path)[1]["identity"]
    teacher = train_teacher(digits, teacher_config(), device=CPU, execution=execution)
    assert teacher.execution == Execution()
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    # Layout is rounding; a format is more, but no other training.
    bound = 0.05 if execution == BFLOAT16 else 1e-4
    assert (outputs(teacher) - outputs(exact)).abs().max() < bound
    if execution == NHWC:
        train_teacher(digits, teacher_config(), execution=execution, **keep)
        return
    with pytest.raises(CheckpointError, match="another run"):
        train_teacher(digits, teacher_config(), execution=execution, **keep)


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_what_only_a_gpu_computes_is_refused(precision):
    teacher = small_teacher()
    with pytest.raises(InputError, match=f"precision {precision} needs a CUDA device, not cpu"):
        teacher.execute(Execution(precision=precision))
    assert teacher.execution == Execution()


def test_products_are_rounded_to_tf32_for_that_precision_alone():
    """A setting of the process: each precision makes its own, and measuring puts it back."""
    with exact_products():
        for precision in get_args(Precision):
            Execution(precision=precision).set_products()
            rounded = precision == "tf32"
            assert (torch.get_float32_matmul_precision() == "high") == rounded
            assert torch.backends.cudnn.allow_tf32 == rounded
            with exact_products():
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.allow_tf32 == rounded


# ---- memory layout ----


def test_a_layout_is_no_other_network():
    plain, other = small_teacher(channels=3), small_teacher(channels=3).execute(NHWC)
    first = next(p for p in other.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert denoiser_sha256(other) == denoiser_sha256(plain)
    torch.testing.assert_close(outputs(other), outputs(plain), rtol=1e-5, atol=1e-5)


def test_stopped_and_resumed_is_never_stopped_in_any_layout(tmp_path):
    """Files have no layout; Adam's moments must get the parameters' back."""
    teacher = small_teacher(channels=3).execute(NHWC)
    trajectories = small_trajectories(teacher)
    whole = sfd(trajectories, WEIGHTS)

    keep = {"checkpoint": tmp_path / "checkpoint.safetensors", "checkpoint_seconds": 0}
    with pytest.raises(KilledError):
        sfd(trajectories, WEIGHTS, on_iteration=dying_in(2), **keep)
    assert same_weights(sfd(trajectories, WEIGHTS, **keep), whole)


# ---- compilation ----

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    reason="torch.compile needs g++ and Python's headers (Debian: g++, python3-dev)",
)


def test_a_student_whose_activations_are_computed_again_is_the_same():
    """Its teacher's execution is the student's; dropout and gradients at the head included."""
    students = []
    for recomputes in (False, True):
        teacher = small_teacher(dropout=0.2)
        teacher.execute(Execution(gradient_checkpointing=recomputes))
        rule = LearnedWeights(4, rule="gradient-norm")
        student = sfd(small_trajectories(teacher), rule, images=8)
        assert student.execution.gradient_checkpointing == recomputes
        students.append(student)
    assert same_weights(*students)


def test_what_excludes_gradient_checkpointing_is_refused():
    with pytest.raises(InputError, match=r"compile_mode reduce-overhead needs `compile`"):
        small_teacher().execute(Execution(compile_mode="reduce-overhead"))
    both = Execution(compile=True, gradient_checkpointing=True)
    with pytest.raises(InputError, match=r"compile .*gradient_checkpointing"):
        small_teacher().execute(both)
    with pytest.raises(InputError, match=r"gradient_checkpointing .*TinyConv"):
        small_conv().execute(Execution(gradient_checkpointing=True))


def test_compilation_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(InputError, match=r"compile .*no-such-compiler"):
        small_teacher().execute(Execution(compile=True))
    small_teacher().execute(Execution())


@NEEDS_COMPILER
def test_fast_is_three_settings_at_once():
    teacher = small_teacher().execute(Execution(precision="fast"))
    three = Execution(precision="bfloat16", compile=True, channels_last=True)
    own = teacher.execution
    assert own.autocast(CPU).fast_dtype == three.autocast(CPU).fast_dtype == torch.bfloat16
    assert teacher.model._compiled_call_impl is not None
    first = next(p for p in teacher.model.parameters() if p.dim() == 4 and min(p.shape[:2]) > 1)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert not first.is_contiguous()


@NEEDS_COMPILER
@pytest.mark.parametrize("mode", get_args(CompileMode))
def test_the_mode_is_torchs_own(mode):
    """Copies and students have it too."""
    teacher = small_teacher().execute(Execution(compile=True, compile_mode=mode))
    for network in (teacher.model, teacher.on(CPU).model):
        told = network._compiled_call_impl.get_compiler_config()
        assert told["triton.cudagraphs"] == (mode == "reduce-overhead")
    assert widen_head(teacher, 4).execution.compile_mode == mode


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_compiled_network_computes_the_same():
    """Minutes where nothing is cached. Outputs only: L1's signs flip on rounding.

    On a CPU the mode changes nothing.
    """
    teacher = small_teacher()
    before = outputs(teacher)
    short = {"images": 8, "lr": 1e-4}
    student = sfd(small_trajectories(teacher), WEIGHTS, **short)
    teacher.execute(Execution(compile=True))
    torch.testing.assert_close(outputs(teacher), before, rtol=1e-5, atol=1e-5)
    compiled = sfd(small_trajectories(teacher), WEIGHTS, **short)
    learned = (outputs(student) - before).abs().mean()
    assert (outputs(compiled) - outputs(student)).abs().mean() < 0.01 * learned


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_compiled_network_names_the_branch_too():
    """A compiled graph is walked back once; finding the branch takes a walk for each."""
    teacher = small_teacher().execute(Execution(compile=True))
    stage = Steep(sfd_stage(small_trajectories(teacher)), branch=3, first=0)
    with pytest.raises(NonFiniteLossError, match="iteration 0, interval 1, branch 3"):
        train(stage, FixedWeights(WEIGHTS))
