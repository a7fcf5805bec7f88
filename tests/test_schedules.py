"""Grids of noise levels against their formulas; intervals, of a fixed or a drawn number."""

import collections
import math

import numpy as np
import pytest
import torch

from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.intervals import IntervalGrid, VariableGrid
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import Euler
from bdense.diffusion.step_condition import with_step_condition
from bdense.diffusion.vp import CosineSchedule
from bdense.errors import InputError
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.trajectories import Trajectories
from tests.small import sfd_stage, small_teacher

SCHEDULES = [
    Schedule(),
    Schedule(kind="polynomial", rho=1.0, sigma_min=0.002),
    Schedule(kind="logsnr"),
    Schedule(kind="time_uniform", rho=1.0),
    Schedule(kind="time_uniform", rho=2.0, sigma_min=0.002),
]
PROCESSES = [
    CosineSchedule(),
    CosineSchedule(logsnr_min=-6.0, logsnr_max=9.0),
    DDPMSchedule(),
    DDPMSchedule(num_train_timesteps=3, trained_betas=(0.5, 0.5, 0.5)),
]
each_schedule = pytest.mark.parametrize("schedule", [*SCHEDULES, *PROCESSES], ids=lambda s: s.kind)


def levels(num_intervals: int, **options) -> list[float]:
    return Schedule(**options).grid(num_intervals).tolist()


@each_schedule
@pytest.mark.parametrize("num_intervals", [1, 2, 7, 1024])
def test_a_grid_goes_down_from_sigma_max_to_sigma_min_or_of_a_process_to_0(
    schedule, num_intervals
):
    grid = schedule.grid(num_intervals)
    assert grid.dtype == torch.float64
    assert grid.shape == (num_intervals + 1,)
    assert grid[0].item() == pytest.approx(schedule.sigma_max, rel=1e-11)
    end = 0 if schedule in PROCESSES else schedule.sigma_min
    assert grid[-1].item() == pytest.approx(end, rel=1e-9, abs=0)
    assert bool((grid.diff() < 0).all())


def test_polynomial_by_hand():
    """t_i^(1/rho) falls evenly."""
    line = levels(4, kind="polynomial", rho=1.0, sigma_min=1.0, sigma_max=5.0)
    assert line == [5.0, 4.0, 3.0, 2.0, 1.0]
    squares = levels(2, kind="polynomial", rho=2.0, sigma_min=1.0, sigma_max=9.0)
    assert squares == [9.0, 4.0, 1.0]
    # Karras et al.'s rho = 7: the middle of 80 and 0.006 is ((80^(1/7) + 0.006^(1/7)) / 2)^7.
    assert levels(2)[1] == pytest.approx(((80 ** (1 / 7) + 0.006 ** (1 / 7)) / 2) ** 7)


def test_logsnr_by_hand():
    """Equal ratios."""
    powers = levels(3, kind="logsnr", sigma_min=1.0, sigma_max=1000.0)
    assert powers == pytest.approx([1000.0, 100.0, 10.0, 1.0], rel=1e-14)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_time_uniform_is_the_vp_process_on_an_even_grid_of_times(rho):
    """Its betas are those that put sigma_max at t = 1 and sigma_min at t = 0.001."""
    schedule = Schedule(kind="time_uniform", rho=rho, sigma_min=0.01, sigma_max=50.0)
    ends, sigmas = np.array([1.0, 1e-3]), np.array([50.0, 0.01])
    unknowns = np.stack([ends**2 / 2, ends], axis=1)
    beta_d, beta_min = np.linalg.solve(unknowns, np.log1p(sigmas**2))
    assert beta_d > 0
    times = np.linspace(1.0, 1e-3 ** (1 / rho), 6) ** rho
    expected = np.sqrt(np.expm1(beta_d * times**2 / 2 + beta_min * times))
    np.testing.assert_allclose(schedule.grid(5).numpy(), expected, rtol=1e-9)


@each_schedule
@pytest.mark.parametrize(
    ("num_intervals", "substeps"), [(1, 4), (2, 2), (3, 7), (18, 5), (64, 3), (1000, 2), (1000, 7)]
)
def test_every_kth_level_of_the_teachers_grid_is_the_students_exactly(
    schedule, num_intervals, substeps
):
    fine = schedule.grid(num_intervals * substeps)
    assert fine.shape == (num_intervals * substeps + 1,)
    assert torch.equal(fine[::substeps], schedule.grid(num_intervals))


def test_an_interval_is_a_piece_of_the_teachers_grid():
    schedule = Schedule(kind="polynomial", rho=1.0, sigma_min=1.0, sigma_max=13.0)
    grid = IntervalGrid(num_intervals=3, substeps=4, afs=True, schedule=schedule)
    assert grid.student().tolist() == [13.0, 9.0, 5.0, 1.0]
    assert grid.interval(1).tolist() == [9.0, 8.0, 7.0, 6.0, 5.0]
    assert (grid.nfe, list(grid.trained), grid.num_rows) == (2, [1, 2], 8)
    without = IntervalGrid(num_intervals=3, substeps=4, afs=False, schedule=schedule)
    assert (without.nfe, list(without.trained), without.num_rows) == (3, [0, 1, 2], 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "karras"}, r"'karras' is unknown; choose from \['logsnr', 'polynomial', 'time"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max, got sigma_min=0.0, sigma_max=80.0"),
        ({"sigma_min": 90.0}, "got sigma_min=90.0, sigma_max=80.0"),
        ({"sigma_min": math.nan}, "got sigma_min=nan"),
        ({"sigma_max": math.inf}, "sigma_max=inf"),
        ({"rho": 0.0}, "rho must be positive and finite, got 0.0"),
        ({"rho": math.nan}, "got nan"),
    ],
)
def test_a_schedule_that_is_none_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Schedule(**options)


def test_a_grid_has_an_interval():
    for schedule in (Schedule(), CosineSchedule()):
        with pytest.raises(InputError, match="at least 1 interval, got 0"):
            schedule.grid(0)
    with pytest.raises(InputError, match="at most 100000 intervals, got 1000000000"):
        Schedule().grid(10**9)


# ---- N drawn for each batch ----

DRAWN = VariableGrid(tuple(IntervalGrid(num_intervals=n, substeps=2) for n in (2, 3, 4)))


def drawn_trajectories(count: int, seed: int = 3) -> Trajectories:
    teacher = small_teacher()
    return Trajectories(
        teacher=teacher,
        grid=DRAWN,
        solver=Euler(),
        batch=2,
        count=count,
        seed=seed,
        conditions=teacher.conditions,
    )


def test_n_is_drawn_evenly_and_by_iteration_alone():
    found = [DRAWN.at(i, seed=5).num_intervals for i in range(600)]
    assert found == [DRAWN.at(i, seed=5).num_intervals for i in range(600)]
    assert found != [DRAWN.at(i, seed=6).num_intervals for i in range(600)]
    share = collections.Counter(found)
    assert all(160 < share[n] < 240 for n in (2, 3, 4))


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


def test_a_schedule_beyond_float64_is_refused():
    with pytest.raises(InputError, match=r"rho=0\.001"):
        Schedule(rho=1e-3)
    with torch.device("meta"):  # as a study is checked
        assert Schedule().rho == 7
