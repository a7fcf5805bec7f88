"""SFD, plain and B-DENSE: what any method promises, and what is its own."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bdense.diffusion.branches import export_branch
from bdense.diffusion.conditions import Classes
from bdense.diffusion.intervals import IntervalGrid, VariableGrid
from bdense.diffusion.solvers import Euler
from bdense.diffusion.step_condition import with_step_condition
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import CheckpointError, InputError
from bdense.methods.method import Inputs, Recordings
from bdense.methods.progressive import pd_sampler
from bdense.methods.sfd import SFD, SFDConfig, SFDStage
from bdense.training.loop import train
from bdense.weights.log_linear import LogLinearWeights
from bdense.weights.weighting import FixedWeights
from tests.contracts.methods import (
    ALL,
    HalfSquare,
    KilledError,
    MethodContract,
    assert_no_waits,
    dying_in,
)
from tests.networks import tiny_denoiser
from tests.pd_nets import small_conv
from tests.small import same_weights, sfd, small_teacher, small_trajectories


class TestSFD(MethodContract):
    method = SFD
    knobs = {"kimg": 0.03, "batch": 6, "lr": 1e-3, "substeps": 2}  # noqa: RUF012
    others = {"nfe": (3,), "epd_table": ("missing.json",)}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _without_a_download(self, monkeypatch):
        monkeypatch.setattr("bdense.methods.sfd.LPIPS", HalfSquare)

    def teacher(self):
        return small_conv()

    def written_out(self):
        """Euler along the student's own path, L1 at the ends of the intervals alone."""
        stage = self.learning(dropout=False, substeps=4)
        plain = copy.deepcopy(stage.start)
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, fused=True)
        t = stage.trajectories.grid.student()
        for iteration in range(5):
            # 30 images in all: iteration 3 is the first that begins with half of them seen.
            optimizer.param_groups[0]["lr"] = 1e-4 if iteration == 4 else 1e-3
            batch = stage.batch(iteration, ALL)
            ends = {1: batch.states[3], 2: batch.states[7]}
            x = batch.start
            x = x + (t[1] - t[0]) * (x / (1 + t[0] ** 2).sqrt())
            for n in (1, 2):
                x_next = x + (t[n + 1] - t[n]) * ((x - plain(x, t[n])) / t[n])
                loss = (x_next - ends[n]).abs().sum() / len(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                x = x_next.detach()
        return stage, plain


def several_nfe(seed: int = 5, **changes: Any) -> SFDStage:
    """SFD-v on a network with a step condition and dropout."""
    usual = {"nfe": (1, 2, 3), "kimg": 0.024, "batch": 4, "lr": 1e-3, "substeps": 2}
    method, teacher = SFD(), small_teacher(dropout=0.3)
    config = SFDConfig(**usual | changes)
    return method.stage(method.plan(config)[0], teacher, config, Inputs(seed=seed))


def test_several_nfe_resume_bit_for_bit(tmp_path):
    """The N of each iteration is drawn as if never stopped."""
    intervals, rest = [], []
    weights = FixedWeights(torch.tensor([0.5, 1.5]))
    whole = train(
        several_nfe(), weights, on_iteration=lambda done: intervals.append(len(done.weights))
    )

    path = tmp_path / "checkpoint.safetensors"
    keep = {"checkpoint": path, "checkpoint_seconds": 0}
    with pytest.raises(KilledError):
        train(several_nfe(), weights, **keep, on_iteration=dying_in(3))
    torch.manual_seed(99)
    resumed = train(
        several_nfe(),
        weights,
        checkpoint=path,
        on_iteration=lambda done: rest.append(len(done.weights)),
    )
    assert same_weights(resumed, whole)
    assert rest == intervals[3:]


@pytest.mark.parametrize("precond", ["iddpm", "ddpm"])
def test_no_update_waits_for_its_device_whatever_the_network(precond):
    """Of any preconditioning, conditional and guided, for several NFE."""
    teacher = tiny_denoiser(precond=precond, label_dim=3)
    config = SFDConfig(
        nfe=(1, 2), batch=4, substeps=2, sigma_min=0.05, sigma_max=50, guidance_student=1.5
    )
    method = SFD()
    # A kind of its own, as SongUNet has no null class that it is known to have learned.
    inputs = Inputs(conditions=Classes(3, has_null=True))
    stage = method.stage(method.plan(config)[0], teacher, config, inputs)
    assert_no_waits(stage, FixedWeights(torch.ones(2)))


def test_the_start_and_the_trajectories_must_fit_the_run(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    several = VariableGrid(
        (IntervalGrid(num_intervals=2, substeps=2), IntervalGrid(num_intervals=3, substeps=2))
    )
    live = replace(small_trajectories(small_teacher()), grid=several)
    one, other = (with_step_condition(live.teacher, start="random", seed=s) for s in (1, 2))
    weights = torch.ones(2)
    sfd(live, weights, start=one, checkpoint=path)
    with pytest.raises(CheckpointError, match="differs in: start"):
        sfd(live, weights, start=other, checkpoint=path)
    with pytest.raises(InputError, match="exceed those that this ddpm teacher was trained for"):
        SFD().check(SFDConfig(), tiny_denoiser(precond="ddpm"), {})


def test_b_is_inert_under_adam():
    """Scaling all weights by 8, an exact power of two, moves no float64 student by 1e-6."""
    teacher = small_teacher().double()
    trajectories = small_trajectories(teacher)
    students = [
        sfd(trajectories, LogLinearWeights(a=0.8, b=b)(4), lr=5e-5)
        for b in (-2.0, -2.0 + 3 * math.log(2))
    ]
    for p, q in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert (p - q).abs().max() < 1e-6
    moved = max(
        (p - q).abs().max()
        for p, q in zip(export_branch(students[0]).parameters(), teacher.parameters(), strict=True)
    )
    assert moved > 1e-4


def test_the_second_stage_walks_as_its_teacher_draws():
    """Euler on the teacher's own grid; its first step is analytical where the teacher's is."""
    known = {"sampler": SFDConfig(nfe=5).samplers()[0].describe()}
    method = SFD()
    config = SFDConfig.read({**SFDConfig.usual(known, small_teacher()), "second_stage": True})
    assert (config.nfe, config.substeps, config.solver) == (1, 3, "euler")
    assert (config.kimg, config.lr) == (2000, 5e-4)
    teacher = small_teacher()
    method.check(config, teacher, known)
    stage = method.stage(method.plan(config)[0], teacher, config, Inputs(metadata=known))
    assert stage.trajectories.teacher_afs
    assert stage.trajectories.solver == Euler()
    assert stage.metadata()["stage"] == 2
    for changes, message in (
        ({"nfe": 2}, "distilled for 6 intervals, .* is 9 here"),
        ({"sigma_max": 40.0}, "keeps the teacher's noise levels"),
    ):
        with pytest.raises(InputError, match=message):
            method.check(SFDConfig.read(config.as_dict() | changes), teacher, known)
    jumps = {"sampler": known["sampler"] | {"solver": "consistency"}}
    with pytest.raises(InputError, match="draws by consistency"):
        method.check(config, teacher, jumps)
    rounds = {"sampler": pd_sampler(CosineSchedule(), 2).describe()}
    with pytest.raises(InputError, match="walks students of SFD, and the teacher draws by cosine"):
        method.check(config, teacher, rounds)
    with pytest.raises(InputError, match="and this teacher is not a student"):
        method.check(config, teacher, {})
    with pytest.raises(InputError, match="a student, which only knows the levels it was"):
        method.check(SFDConfig(), teacher, known)


def test_a_student_learns_from_recorded_trajectories(tmp_path):
    """The same student as from live ones; without a recording it says what to do."""
    method, teacher = SFD(), small_teacher()
    config = SFDConfig(kimg=0.016, batch=4, substeps=2, lr=1e-3)
    (plan,) = method.plan(config)
    recorded = Inputs(seed=7, recordings=Recordings(tmp_path))
    assert method.recording(config, teacher, Inputs(seed=7)) is None
    with pytest.raises(CheckpointError, match="record them first"):
        method.stage(plan, teacher, config, recorded)
    method.recording(config, teacher, recorded).record()
    assert_no_waits(method.stage(plan, teacher, config, recorded), FixedWeights(torch.ones(2)))
    one, other = (
        train(method.stage(plan, teacher, config, inputs), FixedWeights(torch.ones(2)))
        for inputs in (recorded, Inputs(seed=7))
    )
    assert same_weights(one, other)


def test_usual_values_depend_on_what_is_made():
    """Zhou et al. 2024: one NFE, several, and a second stage."""
    one, several = SFDConfig.read({}), SFDConfig.read({"nfe": [2, 3]})
    assert (one.nfe, one.kimg, one.lr, one.substeps) == (2, 200, 5e-5, 4)
    assert (several.nfe, several.kimg, several.lr) == ((2, 3), 800, 5e-5)
    assert SFDConfig.read({"nfe": [3], "kimg": 7}).kimg == 7
    assert SFDConfig.read({"nfe": [3]}) == SFDConfig(nfe=3)
    assert several.samplers()[1].nfe == 3
    assert SFDConfig(order=3) == SFDConfig() != SFDConfig(order=2)
    assert SFDConfig(solver="heun", order=2) == SFDConfig(solver="heun")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"nfe": (2, 2)}, "nfe must be one number or several different ones"),
        ({"solver": "euler", "order": 2}, "euler only has order 1, got 2"),
        ({"step_condition": "random"}, "step_condition random is for a student of several NFE"),
        ({"second_stage": True}, "solver must be euler with `second_stage`"),
        ({"second_stage": True, "nfe": (1, 2)}, "second_stage is for one NFE"),
    ],
)
def test_bad_settings_are_named(knobs, message):
    with pytest.raises(InputError, match=message):
        SFDConfig(**knobs)
