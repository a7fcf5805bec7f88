"""SFD and B-DENSE: contracts that need no golden file."""

import copy
import math

import pytest
import torch

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.intervals import IntervalGrid, VariableGrid
from bdense.diffusion.solvers import DPMSolverPP, Euler, trajectory
from bdense.diffusion.step_condition import with_step_condition
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.methods.sfd import SFDConfig, branch_losses, branch_states, distill
from bdense.methods.trajectories import LiveTrajectories
from bdense.models.store import load_tensors
from bdense.training.parallel import Team
from bdense.weights.spaces import LogLinearWeights, normalised_weights, uniform_weights
from tests.networks import tiny_denoiser
from tests.small import same_weights, small_teacher, small_trajectories

ONE = torch.ones(1, dtype=torch.float64)


def config(num_branches: int = 4, images: int = 16, **kwargs) -> SFDConfig:
    return SFDConfig(num_branches=num_branches, images=images, lr=1e-3, **kwargs)


class StopHereError(Exception):
    """Stands for a kill at that point."""


def test_one_branch_with_weight_one_is_plain_sfd_bit_for_bit():
    """At K = 4 the teacher takes four sub-steps and only the end point supervises."""
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, count=4, batch=4)
    student = distill(teacher, trajectories, config(num_branches=1), ONE)

    # The plain method written out: Euler along the student's own path, L1 at interval ends.
    plain = copy.deepcopy(teacher).train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=True)
    t = trajectories.grid.student()
    for iteration in range(4):
        # 16 images in all: iterations 0, 4, 8, 12; half is passed at 8, so from 12 on lr / 10.
        optimizer.param_groups[0]["lr"] = 1e-4 if iteration == 3 else 1e-3
        walk = trajectories[iteration]
        ends = {1: walk.states[3], 2: walk.states[7]}
        x = walk.start
        x = x + (t[1] - t[0]) * (x / (1 + t[0] ** 2).sqrt())
        for n in (1, 2):
            x_next = x + (t[n + 1] - t[n]) * ((x - plain(x, t[n])) / t[n])
            loss = (x_next - ends[n]).abs().sum() / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = x_next.detach()
    assert same_weights(student, plain)
    assert not same_weights(student, teacher)


def test_b_is_inert_under_adam():
    """Scaling all weights by 8, an exact power of two, moves no float64 student by 1e-6."""
    teacher = small_teacher().double()
    trajectories = small_trajectories(teacher)
    train = SFDConfig(num_branches=4, images=16, lr=5e-5)
    students = [
        distill(teacher, trajectories, train, LogLinearWeights(a=0.8, b=b)(4))
        for b in (-2.0, -2.0 + 3 * math.log(2))
    ]
    for p, q in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert (p - q).abs().max() < 1e-6
    moved = max(
        (p - q).abs().max()
        for p, q in zip(export_branch(students[0]).parameters(), teacher.parameters(), strict=True)
    )
    assert moved > 1e-4


@pytest.mark.parametrize("afs", [True, False])
def test_large_a_alone_is_plain_distillation(afs):
    """a -> inf leaves the end point alone: branch K follows plain SFD's path."""
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, afs=afs)
    end_alone = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    branched = export_branch(distill(teacher, trajectories, config(), end_alone))
    plain = distill(teacher, trajectories, config(num_branches=1), ONE)
    for p, q in zip(branched.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-6)


def test_losses_by_hand():
    """x^k = x + (t_k - t_0)(x - D)/t_0; L1 over pixels, mean over the batch."""
    teacher = small_teacher()
    student = widen_head(teacher, 2)
    levels = torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    states = branch_states(student, x, levels)
    denoised = teacher(x, levels[0])
    for k, t in enumerate((3.0, 1.0)):
        expected = x + (t - 4.0) * (x - denoised) / 4.0
        assert torch.allclose(states[:, k], expected, atol=1e-6)
    losses = branch_losses(states, torch.stack([x, x]))
    expected = (denoised - x).abs().sum() / 3
    assert losses.tolist() == pytest.approx([0.25 * expected.item(), 0.75 * expected.item()])


def test_plain_sfd_with_classes_is_a_loop_written_out():
    """Teacher and student are told the same class of each image, drawn anew each iteration."""
    teacher = tiny_denoiser(label_dim=3)
    trajectories = small_trajectories(teacher, count=3, substeps=2)
    student = distill(teacher, trajectories, config(num_branches=1, images=12), ONE)

    plain = copy.deepcopy(teacher).train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=True)
    t, seen = trajectories.grid.student(), []
    for iteration in range(3):
        walk = trajectories[iteration]
        classes = walk.labels
        assert classes.sum(1).tolist() == [1.0] * 4
        seen.append(classes.argmax(1))
        # The teacher's walk: DPM-Solver++ on its six sub-steps, from the same noise.
        rows = trajectory(
            DPMSolverPP(),
            teacher.given(class_labels=classes),
            walk.start,
            trajectories.grid.fine(),
        )
        x = walk.start + (t[1] - t[0]) * (walk.start / (1 + t[0] ** 2).sqrt())
        for n in (1, 2):
            x_next = x + (t[n + 1] - t[n]) * ((x - plain(x, t[n], classes)) / t[n])
            loss = (x_next - rows[2 * (n + 1)]).abs().sum() / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = x_next.detach()
    assert not torch.equal(seen[0], seen[1])
    assert same_weights(student, plain)


@pytest.mark.parametrize("teacher_afs", [True, False])
def test_the_second_stage_is_a_loop_written_out(teacher_afs):
    """The teacher is a student: Euler along six steps of its own, its first one analytical."""
    stage_one = small_teacher()
    grid = IntervalGrid(num_intervals=2, substeps=3)
    trajectories = LiveTrajectories(
        teacher=stage_one,
        grid=grid,
        solver=Euler(),
        batch=4,
        count=3,
        seed=7,
        teacher_afs=teacher_afs,
    )
    student = distill(stage_one, trajectories, config(num_branches=1, images=12), ONE)

    plain = copy.deepcopy(stage_one).train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=True)
    t = grid.fine()
    for iteration in range(3):
        start = x = trajectories[iteration].start
        with torch.no_grad():
            for i in range(6):
                if i == 0 and teacher_afs:
                    # As a denoiser's answer, the way a walk asks for it: equal but for rounding.
                    guess = x - t[0] * (x / (1 + t[0] ** 2).sqrt())
                    slope = (x - guess) / t[0]
                else:
                    slope = (x - stage_one(x, t[i])) / t[i]
                x = x + (t[i + 1] - t[i]) * slope
        end = x
        # The student: its first interval, of three sub-steps, analytical; one network call.
        x = start + (t[3] - t[0]) * (start / (1 + t[0] ** 2).sqrt())
        x = x + (t[6] - t[3]) * ((x - plain(x, t[3])) / t[3])
        optimizer.zero_grad()
        ((x - end).abs().sum() / len(x)).backward()
        optimizer.step()
    assert same_weights(student, plain)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_stopped_and_resumed_is_never_stopped(tmp_path, dropout, stop_after):
    teacher = small_teacher(dropout=dropout)
    trajectories = small_trajectories(teacher, count=5)
    weights = LogLinearWeights(a=1.0)(4)
    train = config(images=20)
    whole = distill(teacher, trajectories, train, weights)

    def stop(report):
        if report.iteration + 1 == stop_after:
            raise StopHereError

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(StopHereError):
        distill(
            teacher,
            trajectories,
            train,
            weights,
            checkpoint=path,
            checkpoint_seconds=0,
            on_iteration=stop,
        )
    assert load_tensors(path)[1]["iteration"] == stop_after - 1
    torch.manual_seed(99)  # the global state of the new process is another one
    seen = []
    resumed = distill(
        teacher, trajectories, train, weights, checkpoint=path, on_iteration=seen.append
    )
    assert same_weights(resumed, whole)
    assert [report.iteration for report in seen] == list(range(stop_after - 1, 5))


def test_a_student_for_several_numbers_of_steps_resumes_bit_for_bit(tmp_path):
    """SFD-v with branches and dropout: the N of each iteration is drawn as if never stopped."""
    teacher = small_teacher(dropout=0.3)
    trajectories = LiveTrajectories(
        teacher=teacher,
        grid=VariableGrid(num_intervals=(2, 3, 4), substeps=2),
        solver=DPMSolverPP(),
        batch=4,
        count=6,
        seed=7,
    )
    run = (teacher, trajectories, config(num_branches=2, images=24), torch.tensor([0.5, 1.5]))
    start = with_step_condition(teacher, start="random", seed=1)
    intervals = []
    whole = distill(
        *run, start=start, on_iteration=lambda done: intervals.append(len(done.weights))
    )
    # Trained intervals of an iteration: N - 1 with AFS.
    assert set(intervals) == {1, 2, 3}

    def stop(done):
        if done.iteration == 3:
            raise StopHereError

    keep = {"start": start, "checkpoint": tmp_path / "checkpoint.safetensors"}
    with pytest.raises(StopHereError):
        distill(*run, **keep, checkpoint_seconds=0, on_iteration=stop)
    torch.manual_seed(99)
    rest = []
    resumed = distill(*run, **keep, on_iteration=lambda done: rest.append(len(done.weights)))
    assert same_weights(resumed, whole)
    assert rest == intervals[3:]
    other = with_step_condition(teacher, start="random", seed=2)
    with pytest.raises(CheckpointError, match="differs in: start"):
        distill(*run, start=other, checkpoint=keep["checkpoint"])


def test_dropout_follows_the_checkpoint():
    teacher = small_teacher(dropout=0.5)
    trajectories = small_trajectories(teacher)
    weights = uniform_weights()(4)
    on, again = (distill(teacher, trajectories, config(), weights) for _ in range(2))
    off = distill(teacher, trajectories, config(dropout=False), weights)
    assert same_weights(on, again)
    assert not same_weights(on, off)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    teacher = small_teacher()
    trajectories = small_trajectories(teacher)
    path = tmp_path / "checkpoint.safetensors"
    keep = {"checkpoint": path, "checkpoint_seconds": 0}
    distill(teacher, trajectories, config(), uniform_weights()(4), **keep)
    with pytest.raises(CheckpointError, match="differs in: weights"):
        distill(teacher, trajectories, config(), LogLinearWeights(a=1.0)(4), **keep)
    with pytest.raises(CheckpointError, match=r"config\.images"):
        distill(teacher, trajectories, config(images=12), uniform_weights()(4), **keep)
    with pytest.raises(CheckpointError, match="differs in: devices"):
        distill(teacher, trajectories, config(), uniform_weights()(4), team=Team(0, 2), **keep)


def test_a_loss_that_is_not_finite_stops_the_run_before_an_update(tmp_path):
    teacher = small_teacher()
    with torch.no_grad():
        next(teacher.parameters()).fill_(float("nan"))
    trajectories = small_trajectories(small_teacher())
    with pytest.raises(NonFiniteLossError, match="iteration 0, interval 1, branch 1") as caught:
        distill(teacher, trajectories, config(), uniform_weights()(4))
    assert (caught.value.iteration, caught.value.interval, caught.value.branch) == (0, 1, 1)


def test_exported_student_has_the_teachers_size():
    teacher = small_teacher()
    student = distill(teacher, small_trajectories(teacher), config(), uniform_weights()(4))
    exported = export_branch(student)
    assert exported.describe() == teacher.describe()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(1.0)
    with torch.no_grad():
        assert torch.allclose(exported(x, sigma), student.branches(x, sigma)[:, 3], atol=1e-6)
        first = export_branch(student, branch=1)
        assert torch.allclose(first(x, sigma), student.branches(x, sigma)[:, 0], atol=1e-6)


def test_widened_branches_start_as_the_teacher():
    teacher = small_teacher(channels=3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.5, 20.0])
    branches = widen_head(teacher, 4).branches(x, sigma)
    assert branches.shape == (2, 4, 3, 8, 8)
    for k in range(4):
        assert torch.allclose(branches[:, k], teacher(x, sigma), atol=1e-6)


def test_learning_rate_drops_after_the_middle():
    """32 images, batch 4: iteration 4 is the first that begins with 16 seen; 5 is lowered."""
    run = SFDConfig(num_branches=1, images=32, lr=5e-5)
    assert [run.lr_at(i, 4) for i in range(8)] == [5e-5] * 5 + [5e-6] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_branches": 0, "images": 1}, r"num_branches \(K\) must be at least 1, got 0"),
        ({"num_branches": 1, "images": 0}, "images must be at least 1, got 0"),
        ({"num_branches": 1, "images": 1, "lr": float("nan")}, "lr must be positive"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(InputError, match=message):
        SFDConfig(**kwargs)


def test_what_does_not_fit_together_is_refused():
    teacher = small_teacher()
    trajectories = small_trajectories(teacher)
    with pytest.raises(InputError, match="num_branches=3 fits neither"):
        distill(teacher, trajectories, config(num_branches=3), torch.ones(3))
    with pytest.raises(InputError, match="3 branch weights for num_branches=4"):
        distill(teacher, trajectories, config(), torch.ones(3))
    with pytest.raises(InputError, match=r"must be finite numbers >= 0.*\[-1.0, 1.0\]"):
        distill(teacher, trajectories, config(), torch.tensor([-1.0, 1.0]))
    with pytest.raises(InputError, match="250 iterations, and the trajectories hold 4"):
        distill(teacher, trajectories, config(images=1000), torch.ones(4))
    with pytest.raises(InputError, match="NFE must be at least 1"):
        IntervalGrid(num_intervals=1, substeps=4, afs=True)
    with pytest.raises(InputError, match=r"substeps \(K\) must be at least 1, got 0"):
        IntervalGrid(num_intervals=2, substeps=0)
    with pytest.raises(InputError, match="4 branches already"):
        widen_head(widen_head(teacher, 4), 2)


def test_weights_in_closed_form():
    """The paper's best: a = ln 4 makes each weight four times the one before."""
    weights = LogLinearWeights(a=1.386, b=-4.274)(4)
    assert weights.tolist() == pytest.approx([0.0556875, 0.2226843, 0.8904752, 3.5608526])
    assert uniform_weights()(3).tolist() == [1.0, 1.0, 1.0]
    for a in (-0.5, 0.0, 1.3, 40.0):
        normalised = normalised_weights(a, 4)
        assert normalised(4).sum().item() == pytest.approx(4.0)
        ratio = normalised(4)[3] / normalised(4)[2]
        assert ratio.item() == pytest.approx(torch.tensor(a).double().exp().item(), rel=1e-6)
    assert normalised_weights(0.0, 4).b == pytest.approx(0.0)
    with pytest.raises(InputError, match="b must be a finite number, got nan"):
        LogLinearWeights(a=0.0, b=float("nan"))
