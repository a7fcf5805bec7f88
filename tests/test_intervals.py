"""Grids of one length and of several; trajectories on them, with and without classes."""

import collections

import pytest
import torch

from bdense.diffusion.intervals import VariableGrid
from bdense.diffusion.solvers import Euler
from bdense.diffusion.step_condition import with_step_condition
from bdense.errors import InputError
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.trajectories import LiveTrajectories
from tests.small import sfd_stage, small_teacher

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


@pytest.mark.parametrize("numbers", [(), (3, 3)])
def test_numbers_to_draw_from_must_differ(numbers):
    with pytest.raises(InputError, match="must be different numbers to draw from"):
        VariableGrid(num_intervals=numbers, substeps=2)
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
            heard.append(update.given["num_points"])
            update(stage.start.branches)
        assert heard == [grid.num_points] * len(grid.trained)
    with pytest.raises(InputError, match=r"\[2, 3, 4\] is given which; start it from with_step"):
        sfd_stage(live, images=8)
