"""EPD: learning a table, its file, and where solvers are chosen."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import Tensor

from bdense.cli import main
from bdense.diffusion.denoiser import NetworkDenoiser, call_for_states
from bdense.diffusion.epd import EPD, Table, read_table, write_table
from bdense.diffusion.sampling import Sampler, samplers_from
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import DPM2, trajectory
from bdense.errors import InputError
from bdense.knobs import KnobError
from bdense.methods.epd import EPDConfig, EPDMethod, EPDStage, RawTable, TabledNetwork
from bdense.methods.method import Inputs
from bdense.methods.sfd import SFD, SFDConfig
from bdense.models.store import denoiser_sha256, load_denoiser, save_denoiser
from bdense.training.loop import train
from bdense.weights.weighting import FixedWeights
from tests.contracts.methods import ONE, MethodContract
from tests.small import same_weights, small_teacher

KNOBS = {"steps": 2, "points": 2, "substeps": 2, "kimg": 0.03, "batch": 6}


def stage_of(seed: int = 3, **knobs) -> EPDStage:
    method, config = EPDMethod(), EPDConfig(**KNOBS | knobs)
    (plan,) = method.plan(config)
    return method.stage(plan, small_teacher(), config, Inputs(seed=seed))


def raw_of(student: NetworkDenoiser) -> Tensor:
    """[4, N, P] the numbers that are trained."""
    assert isinstance(student.model, TabledNetwork)
    parameters = student.model.table.parameters()
    return torch.stack([each.detach() for each in parameters])


def learned(stage: EPDStage) -> NetworkDenoiser:
    """With AFS and a squared error: the paper's formulas, row by row, in a plain loop."""
    config, teacher = stage.config, stage.trajectories.teacher
    student = copy.deepcopy(stage.start)
    table = student.model.table
    adam = torch.optim.Adam(table.parameters(), lr=config.lr, fused=True)
    levels = config.levels.grid(config.steps)
    for iteration in range(stage.num_updates):
        for group in adam.param_groups:
            group["lr"] = config.lr * (1 - iteration / stage.num_updates)
        batch = stage.trajectories[iteration]
        fine = config.levels.grid(config.steps * config.substeps)
        ends = trajectory(DPM2(), teacher, batch.start, fine)[config.substeps :: config.substeps]
        x = batch.start
        for n, (t, u) in enumerate(itertools.pairwise(levels)):
            rows = {name: value[n].double() for name, value in table.named_parameters()}
            w, r = rows["w"].softmax(0), rows["r"].sigmoid()
            b_o, b_s = config.bound_o, config.bound_s
            o = 1 - b_o + 2 * b_o * (rows["o"] / 2).sigmoid()
            s = 1 - b_s + 2 * b_s * (rows["s"] / 2).sigmoid()
            d = (x - teacher(x, t)) / t
            if n == 0 and config.afs:
                d = x / (1 + t**2).sqrt()
            ahead = []
            for j in range(config.points):
                at = u ** r[j] * t ** (1 - r[j])
                state = x + (at - t).float() * d
                slope = (state - teacher(state, s[j] * at)) / at.float()
                ahead.append((w[j] * o[j]).float() * slope)
            x = x + (u - t) * torch.stack(ahead).sum(0)
            loss = (x - ends[n]).square().sum() / len(x)
            adam.zero_grad()
            loss.backward(retain_graph=True)
            adam.step()
    return student


class TestEPD(MethodContract):
    method = EPDMethod
    knobs = KNOBS | {"dropout": True}
    others = {"order": (3,)}  # noqa: RUF012
    rate = 1e-3

    def teacher(self) -> NetworkDenoiser:
        return small_teacher(dropout=0.2)

    def learning(self, seed: int = 5, **changes) -> EPDStage:
        method, config = self.method(), self.config(**changes)
        (plan,) = method.plan(config)
        return method.stage(plan, self.teacher(), config, self.inputs(seed))

    def outputs(self, student: NetworkDenoiser) -> Tensor:
        return raw_of(student)

    def written_out(self) -> tuple[EPDStage, NetworkDenoiser]:
        raise NotImplementedError

    def test_one_branch_equals_a_loop_written_out_bit_for_bit(self):
        """To rounding: the points are one batch here."""
        for knobs in ({}, {"afs": False, "points": 1, "steps": 3, "bound_o": 0.2}):
            stage = stage_of(**knobs)
            student, expected = train(stage, FixedWeights(ONE)), learned(stage_of(**knobs))
            moved = (raw_of(expected) - raw_of(stage.start)).abs().max()
            assert moved > 0.05
            assert (raw_of(student) - raw_of(expected)).abs().max() < 1e-3 * moved

    def test_the_average_of_the_weights_is_what_is_returned(self):
        with pytest.raises(KnobError, match="ema averages"):
            self.config(ema=8.0)

    def test_the_mean_over_the_last_half_is_what_is_returned(self):
        with pytest.raises(KnobError, match="tail averages"):
            self.config(tail=0.5)


# ---- learning ----


def test_the_network_is_the_teachers_and_the_table_brings_it_nearer_to_the_teachers_states():
    stage = stage_of(kimg=0.3, lr=0.1)
    teacher = stage.trajectories.teacher
    first = stage.sampler
    reports = []
    student = train(stage, FixedWeights(ONE), on_iteration=reports.append)
    assert same_weights(student.model.network, teacher.model)
    assert stage.sampler != first
    losses = torch.stack([done.branch_losses.sum() for done in reports])
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()


def test_scales_stay_in_their_bounds_and_weights_add_up():
    stage = stage_of(bound_o=0.1, bound_s=0.0, last_scale=False, lr=3.0)
    train(stage, FixedWeights(ONE))
    solver = stage.sampler.solver
    assert all(0 < number < 1 for row in solver.r for number in row)
    assert all(sum(row) == pytest.approx(1) for row in solver.w)
    assert all(0.9 <= number <= 1.1 for row in solver.o for number in row)
    assert solver.o[-1] == (1, 1)
    assert solver.o[0] != (1, 1)
    assert solver.s == ((1, 1), (1, 1))


def test_a_student_may_not_be_the_teacher_and_levels_must_be_the_teachers():
    config, teacher = EPDConfig(**KNOBS), small_teacher()
    known = {"sampler": stage_of().sampler.describe()}
    with pytest.raises(InputError, match="give its own teacher"):
        EPDMethod().check(config, teacher, known)


# ---- conditions ----


def test_conditions_repeat_in_the_order_of_images_and_points():
    asked = {}

    def call(x, sigma, **given):
        asked.update(given)
        return x

    label = torch.eye(3)[:2]
    call_for_states(call, {"class_labels": label, "num_points": 4}, torch.zeros(6, 1, 2, 2), ONE)
    assert torch.equal(asked["class_labels"], label[[0, 0, 0, 1, 1, 1]])
    assert asked["num_points"] == 4


def test_a_table_of_several_points_sees_each_images_own_class():
    from tests.test_class_conditions import small_conditional  # noqa: F401


# ---- the file ----


def table_file(folder, steps: int = 3, afs: bool = True, **levels) -> str:
    rows = {name: ((0.3, 0.7),) * steps for name in ("r", "w")}
    scales = {name: ((1.0, 1.02),) * steps for name in ("o", "s")}
    solver = EPD(**rows, **scales)
    sampler = Sampler(num_intervals=steps, afs=afs, solver=solver, schedule=Schedule(**levels))
    path = folder / f"{steps}-{afs}.epd.json"
    write_table(path, sampler, {"guidance": 1.0})
    assert read_table(path) == sampler
    return str(path)
