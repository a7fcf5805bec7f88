"""EPD: learning a table, its file, and where solvers are chosen."""

import copy
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdense.diffusion.branches import widen_head
from bdense.diffusion.conditions import Classes, TensorCondition
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.epd import EPD, read_table, write_table
from bdense.diffusion.preconditioning import levels_on
from bdense.diffusion.sampling import Sampler, samplers_from
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import DPM2, analytical_first_step, trajectory
from bdense.errors import InputError
from bdense.knobs import KnobError
from bdense.methods.epd import EPDConfig, EPDMethod, EPDStage, TabledNetwork
from bdense.methods.method import Inputs
from bdense.methods.sfd import SFD, SFDConfig
from bdense.models.store import denoiser_sha256, load_denoiser, save_denoiser
from bdense.training.loop import train
from bdense.weights.weighting import FixedWeights
from tests.commands import DIGITS, bdense, done, refused
from tests.contracts.methods import ONE, MethodContract
from tests.networks import tiny_denoiser
from tests.pd_nets import small_conv
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


@pytest.mark.slow  # half a minute
class TestEPD(MethodContract):
    method = EPDMethod
    knobs = KNOBS | {"dropout": True}
    others = {"order": (3,)}  # noqa: RUF012
    rate = 1e-3
    keeps_graphs = True

    def teacher(self) -> NetworkDenoiser:
        return small_conv(dropout=0.2)

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
        with pytest.raises(KnobError, match="ema does not apply to epd"):
            self.config(ema=8.0)

    def test_the_mean_over_the_last_half_is_what_is_returned(self):
        with pytest.raises(KnobError, match="tail does not apply to epd"):
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


def test_a_table_is_learned_and_used_under_guidance(tmp_path, caplog):
    """Teacher and student are mixed of two predictions each, as written out here."""
    teacher = tiny_denoiser(label_dim=4).eval()
    both = {"guidance_teacher": 3.0, "guidance_student": 3.0}
    method, config = EPDMethod(), EPDConfig(**KNOBS | both)
    (plan,) = method.plan(config)
    inputs = Inputs(seed=3, conditions=Classes(4, has_null=True))
    stage = method.stage(plan, teacher, config, inputs)
    assert (plan.nfe, stage.sampler.nfe, stage.sampler.sequential_nfe) == (10, 10, 3)
    batch = stage.batch(0, slice(None))
    labels = batch.condition.arguments()["class_labels"]

    def mixed(x, sigma):
        told = labels.repeat_interleave(len(x) // len(labels), 0)
        null = teacher(x, sigma)
        return null + 3 * (teacher(x, sigma, told) - null)

    fine = config.levels.grid(config.steps * config.substeps)
    close = {"rtol": 1e-4, "atol": 1e-3}
    walked = trajectory(DPM2(), mixed, batch.start, fine)[1:]
    torch.testing.assert_close(batch.states, walked, **close)
    student = widen_head(stage.start, 1)
    stage.begin(student)
    update = next(stage.updates(0, batch))
    update(student.branches)
    levels = config.levels.grid(config.steps)
    model = analytical_first_step(mixed, levels[0])
    (first, _) = stage.sampler.solver.steps(model, batch.start, levels)
    torch.testing.assert_close(update.end.detach(), first, **close)

    path = tmp_path / "table.json"
    write_table(path, stage.sampler, {})
    assert read_table(path) == stage.sampler
    assert not caplog.records
    assert read_table(path, guidance=1.0).nfe == 5
    assert "learned at guidance 3, and is used at 1" in caplog.text
    with pytest.raises(KnobError, match="guidance_student must be `guidance_teacher` 3"):
        EPDConfig(guidance_teacher=3.0)
    with pytest.raises(KnobError, match="guidance_teacher 3 needs a network"):
        method.check(config, small_teacher(), {})


def test_a_table_of_levels_even_in_a_ddpms_times_serves_sfds_teacher(tmp_path):
    teacher = tiny_denoiser(precond="ddpm")
    bounds = {"schedule": "discrete", "sigma_min": 0.1, "sigma_max": teacher.precond.sigma_max}
    method, config = EPDMethod(), EPDConfig(**KNOBS | {"steps": 4}, **bounds)
    method.check(config, teacher, {})
    (plan,) = method.plan(config)
    stage = method.stage(plan, teacher, config, Inputs(seed=3))
    student = train(stage, FixedWeights(ONE))
    assert not torch.equal(raw_of(student), raw_of(stage.start))
    levels = levels_on(config.levels, teacher.precond).grid(4)
    grid = stage.sampler.schedule.grid(4)
    assert torch.equal(grid, levels)
    assert not torch.allclose(grid, Schedule(sigma_min=0.1, sigma_max=grid[0].item()).grid(4))
    assert (plan.nfe, stage.sampler.nfe) == (11, 11)
    path = tmp_path / "table.json"
    write_table(path, stage.sampler, {})
    assert read_table(path) == stage.sampler
    sfd = SFDConfig(nfe=1, substeps=2, solver="epd", epd_table=str(path), kimg=0.006, **bounds)
    walked = SFD().stage(SFD().plan(sfd)[0], teacher, sfd, Inputs(seed=3)).batch(0, slice(2))
    assert torch.equal(walked.grid.fine(), levels)
    other = SFDConfig(nfe=1, substeps=2, solver="epd", epd_table=str(path))
    with pytest.raises(InputError, match=r"epd_table .*learn a table for these"):
        SFD().check(other, small_teacher(), {})
    with pytest.raises(InputError, match="needs a network of a DDPM"):
        method.check(config, small_teacher(), {})


def test_an_image_of_a_class_does_not_depend_on_its_batch():
    """Each point of an image sees that image's class."""
    denoiser, sampler = tiny_denoiser(label_dim=4).eval(), read_rows(steps=2)
    one_hot, noise = torch.eye(4)[[3, 0, 2]], torch.randn(3, *denoiser.image_shape)
    whole = sampler(denoiser.given(TensorCondition("class_labels", one_hot)), noise)
    for i in range(3):
        alone = sampler(
            denoiser.given(TensorCondition("class_labels", one_hot[i : i + 1])), noise[i : i + 1]
        )
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-4, atol=1e-4)
    others = sampler(denoiser.given(TensorCondition("class_labels", one_hot.flip(0))), noise)
    assert (others[0] - whole[0]).abs().max() > 1e-3


# ---- tables and their files ----


def read_rows(steps: int, *, afs: bool = True, **levels: float) -> Sampler:
    """Two points around the midpoint, the same in every step."""
    rows = {"r": (0.3, 0.7), "w": (0.4, 0.6), "o": (1.0, 1.02), "s": (0.98, 1.0)}
    solver = EPD(**{name: (row,) * steps for name, row in rows.items()})
    return Sampler(num_intervals=steps, afs=afs, solver=solver, schedule=Schedule(**levels))


def write_rows(folder: Path, sampler: Sampler) -> str:
    path = folder / "table.json"
    write_table(path, sampler, {"guidance": 1.0})
    return str(path)


OTHER_SOLVER = {"sampler": Sampler(num_intervals=2, afs=True).describe()}
OTHER_GRID = {"sampler": read_rows(3).describe() | {"num_intervals": 4}}
OTHER_ROWS = {"sampler": read_rows(3).describe() | {"w": [[0.5], [0.5], [0.5]]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "") for text in ("", "[]", "{}", "[" * 100_000, '{"sampler": 3}', None)),
        ('{"sampler": {"solver": "epd"}}', ""),
        (json.dumps(OTHER_SOLVER), "not of epd"),
        (json.dumps(OTHER_GRID), "is for 3 intervals, and the grid has 4"),
        (json.dumps(OTHER_ROWS), "w must have a row for each step"),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_table_is_refused_by_its_name(tmp_path, text, message):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{message}"):
        read_table(path)


# ---- as SFD's teacher ----


def test_sfds_teacher_walks_by_a_table_of_its_own_grid(tmp_path):
    """NFE 1 with AFS and K = 2 are four steps; the table's own AFS saves the first evaluation."""
    table = write_rows(tmp_path, read_rows(4))
    knobs = {"nfe": 1, "substeps": 2, "kimg": 0.008, "batch": 8, "solver": "epd"}
    teacher, method = small_teacher(), SFD()
    told = []
    for epd_table in (None, table):
        config = SFDConfig(**knobs, epd_table=epd_table)
        (plan,) = method.plan(config)
        stage = method.stage(plan, teacher, config, Inputs())
        told.append(stage.describe(FixedWeights(torch.ones(2))))
        batch = stage.batch(0, slice(None))
    levels = Schedule().grid(4)
    model = analytical_first_step(teacher, levels[0])
    walked = trajectory(read_rows(4).solver, model, batch.start, levels)
    assert torch.equal(batch.states, walked[-len(batch.states) :])
    assert told[0] != told[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"substeps": 4}, "is for 4 steps, and the teacher takes 8"),
        ({"sigma_min": 0.1}, "walks along polynomial levels from 80 to 0.1"),
        ({"solver": "euler"}, "epd_table is for `solver` epd, got euler"),
        ({"order": 2}, "order 2 is the table's own"),
        ({"nfe": (1, 2)}, "is for 4 steps, and the teacher takes 4 or 6"),
    ],
)
def test_a_table_for_another_teacher_is_refused(tmp_path, changes, message):
    table = write_rows(tmp_path, read_rows(4))
    knobs = {"nfe": 1, "substeps": 2, "solver": "epd", "epd_table": table}
    with pytest.raises(InputError, match=message):
        SFD().check(SFDConfig(**knobs | changes), small_teacher(), {})


# ---- the command line ----


def test_its_fid_is_measured_once(tmp_path, shared_cache, monkeypatch):
    teacher, student = tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"
    save_denoiser(teacher, small_teacher(), {"kind": "teacher"})
    small = ("--steps", 2, "--substeps", 2, "--kimg", 0.064, "--batch", 32)
    measure = (*DIGITS, "--images", 4, "--cache", shared_cache)
    made = ("distill", teacher, "--method", "epd", *small, *measure, "--out", student)
    printed = done(*made)
    monkeypatch.delattr("bdense.verbs.evaluation.draw_images")
    assert done(*made) == printed


def test_a_table_is_learned_written_and_used(tmp_path):
    """The student and the teacher with the table draw the same images."""
    teacher, student = tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"
    save_denoiser(teacher, small_teacher(), {"kind": "teacher"})
    small = ("--steps", 2, "--substeps", 2, "--kimg", 0.064, "--batch", 32)
    printed = done("distill", teacher, "--method", "epd", *small, "--out", student)
    assert printed == f"5 NFE, 3 one after another: {student}\n"
    table = student.with_suffix(".epd.json")
    kept, metadata = load_denoiser(student)
    assert read_table(table) == samplers_from(metadata)[0]
    assert same_weights(kept, load_denoiser(teacher)[0])
    assert json.loads(table.read_text())["teacher_sha256"] == denoiser_sha256(kept)
    card = student.with_suffix(".md").read_text()
    assert "| network calls one after another | 3 |" in card
    assert "| learned numbers of its steps | r " in card
    pictures = [tmp_path / f"{name}.png" for name in ("student", "teacher", "other")]
    done("sample", student, "--images", 4, "--out", pictures[0])
    chosen = ("--solver", "epd", "--epd-table", table)
    done("sample", teacher, *chosen, "--images", 4, "--out", pictures[1])
    done("sample", teacher, "--solver", "epd", "--nfe", 3, "--images", 4, "--out", pictures[2])
    drawn = [path.read_bytes() for path in pictures]
    assert drawn[0] == drawn[1] != drawn[2]
    told = json.loads(
        done(
            *("fid", teacher, *chosen, *DIGITS, "--data", "digits"),
            *("--images", 64, "--cache", tmp_path / "cache"),
        )
    )
    assert (told["nfe"], told["sequential_nfe"]) == (5, 3)
    out = ("--out", tmp_path / "x.png")
    line = refused(bdense("sample", teacher, "--epd-table", table, "--nfe", 8, *out))
    assert f"{table} holds a table for one sampler (NFE 5), and --nfe 8 asks for" in line
    assert "is for teachers" in refused(bdense("sample", student, "--epd-table", table, *out))


def test_sfds_table_is_held_to_the_levels_that_the_teacher_knows(tmp_path):
    """A table of a DDPM's own levels, which no option of either command names."""
    teacher, student = tmp_path / "teacher.safetensors", tmp_path / "epd.safetensors"
    save_denoiser(teacher, tiny_denoiser(precond="ddpm"), {"kind": "teacher"})
    small = ("--kimg", 0.004, "--batch", 4)
    steps = ("--steps", 2, "--substeps", 1)
    done("distill", teacher, "--method", "epd", *steps, *small, "--out", student)
    table = ("--solver", "epd", "--epd-table", student.with_suffix(".epd.json"))
    asked = ("distill", teacher, *table, "--nfe", 1, "--substeps", 1, *small)
    done(*asked, "--out", tmp_path / "student.safetensors")
    line = refused(bdense(*asked, "--sigma-max", 10, "--out", tmp_path / "other.safetensors"))
    assert "and the teacher walks along polynomial levels from 10 to" in line
