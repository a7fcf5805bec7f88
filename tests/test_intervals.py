"""Grids of one length and of several; trajectories on them, with and without classes."""

import collections
import dataclasses
import itertools

import pytest
import torch

from bdense.diffusion.intervals import IntervalGrid, VariableGrid
from bdense.diffusion.solvers import Euler
from bdense.diffusion.step_condition import with_step_condition
from bdense.errors import InputError
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.trajectories import LiveTrajectories
from tests.small import same_weights, sfd, sfd_stage, small_teacher, small_trajectories

DRAWN = VariableGrid(num_intervals=(2, 3, 4), substeps=2)


def drawn_trajectories(count: int, seed: int = 3) -> LiveTrajectories:
    return LiveTrajectories(
        teacher=small_teacher(), grid=DRAWN, solver=Euler(), batch=2, count=count, seed=seed
    )


def test_n_is_drawn_evenly_and_by_iteration_alone():
    found = [DRAWN.at(i, seed=5).num_intervals for i in range(600)]
    assert found == [DRAWN.at(i, seed=5).num_intervals for i in range(600)]
    assert found != [DRAWN.at(i, seed=6).num_intervals for i in range(600)]
    share = collections.Counter(found)
    assert all(160 < share[n] < 240 for n in (2, 3, 4))


def test_a_fixed_grid_is_itself_at_every_iteration():
    grid = IntervalGrid(num_intervals=3, substeps=4)
    assert grid.at(17, seed=1) is grid
    assert (grid.num_points, grid.nfe, grid.num_rows) == (4, 2, 8)


@pytest.mark.parametrize("numbers", [(), (3, 3)])
def test_numbers_to_draw_from_must_differ(numbers):
    with pytest.raises(InputError, match="must be different numbers to draw from"):
        VariableGrid(num_intervals=numbers, substeps=2)


def test_an_interval_too_few_is_refused():
    with pytest.raises(InputError, match="NFE must be at least 1"):
        VariableGrid(num_intervals=(1, 3), substeps=2, afs=True)


def test_recorded_rows_of_different_numbers_are_the_live_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("bdense.methods.recordings.MIN_SHARDS", 3)
    live = drawn_trajectories(count=7)
    store = TrajectoryStore(live, tmp_path)
    recorded = store.record()
    rows = [recorded[i].grid.num_rows for i in range(7)]
    assert len(set(rows)) > 1
    assert store.nbytes == sum(rows) * 2 * 64 * 4
    assert store.num_shards == 3
    for i in range(7):
        assert torch.equal(recorded[i].states, live[i].states)
        assert recorded[i].grid == live[i].grid
        part = recorded.part(i, slice(1, 2))
        assert torch.equal(part.states, live[i].states[:, 1:2])
        assert torch.equal(part.start, live[i].start[1:2])


def test_a_variable_student_is_told_its_number_of_points():
    """N + 1 of the batch's own grid, in every interval."""
    live = drawn_trajectories(count=4)
    stage = sfd_stage(live, images=8, start=with_step_condition(live.teacher, seed=0))
    for i in range(4):
        grid = live.grid_at(i)
        heard = []
        for update in stage.updates(i, stage.batch(i, slice(None))):
            heard.append(update.told["num_points"])
            update(stage.start.branches)
        assert heard == [grid.num_points] * len(grid.trained)
    with pytest.raises(InputError, match=r"\[2, 3, 4\] is told which; start it from with_step"):
        sfd_stage(live, images=8)


def test_another_start_is_another_run(tmp_path):
    """A checkpoint of a student that started elsewhere is not taken for this run's."""
    live = small_trajectories(small_teacher(), count=2)
    short = {"images": 8, "dropout": False}
    checkpoint = tmp_path / "run.safetensors"
    options = {"checkpoint": checkpoint, "checkpoint_seconds": 0.0}
    one = sfd(live, torch.ones(1), start=small_teacher(seed=5), **short, **options)
    assert not same_weights(one, sfd(live, torch.ones(1), **short))
    with pytest.raises(InputError, match=r"belongs to another run .*start"):
        sfd(live, torch.ones(1), **short, **options)


def test_a_teacher_that_is_a_student_may_begin_with_afs_too():
    """Second stage: the first teacher state is the analytical step's, without the network."""
    grid = IntervalGrid(num_intervals=2, substeps=3, afs=True)
    base = LiveTrajectories(
        teacher=small_teacher(), grid=grid, solver=Euler(), batch=2, count=1, seed=0
    )
    after = dataclasses.replace(base, teacher_afs=True)
    teacher = base.teacher
    assert base.describe() != after.describe()
    t = grid.fine()
    x = after[0].start
    first = x + (t[1] - t[0]) * x / (1 + t[0] ** 2).sqrt()
    step = first
    for now, then in itertools.pairwise(t[1:]):
        denoised = teacher(step, now)
        step = step + (then - now) * (step - denoised) / now
    torch.testing.assert_close(after[0].states[-1], step, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(base[0].states[-1], step, rtol=1e-5, atol=1e-4)
