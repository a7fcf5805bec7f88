"""One training shared by two processes: gloo on the CPU."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import bdense.sharing
from bdense.branches import widen_head
from bdense.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.parallel import Team, team_of
from bdense.recordings import TrajectoryStore
from bdense.sfd import IterationReport, Looks, SFDConfig
from bdense.sharing import distill_on
from bdense.weighting import LearnedWeights
from bdense.weights import LogLinearWeights
from tests.small import small_teacher, small_trajectories

ONE, TWO = [torch.device("cpu")], [torch.device("cpu")] * 2
TRAIN = SFDConfig(num_branches=4, images=12, lr=1e-4, dropout=False)


@torch.no_grad()
def outputs(student: NetworkDenoiser) -> torch.Tensor:
    """Every branch at four noise levels."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.01, 0.5, 5.0, 40.0])
    return student.branches(x * sigma.view(-1, 1, 1, 1), sigma)


def follow_in_haste(team: Team, device: torch.device, job: Any) -> None:
    """From the first look on, two seconds are enough; until then both processes still load."""
    wait = Team.while_others_wait

    def in_haste(self: Team, name: str, work: Callable[[], object]) -> None:
        dist.set_timeout(timedelta(seconds=2))
        wait(self, name, work)

    Team.while_others_wait = in_haste
    bdense.sharing._follow(team, device, job)


@pytest.mark.parametrize("rule", [None, pytest.param("gradient-norm", marks=pytest.mark.slow)])
def test_two_processes_equal_one_to_rounding(tmp_path, monkeypatch, rule):
    """Outputs, not weights: Adam makes steps of rounding noise where a gradient cancels."""
    monkeypatch.setattr(bdense.sharing, "_follow", follow_in_haste)
    teacher = small_teacher()
    live = small_trajectories(teacher, count=3, batch=4)
    trajectories = TrajectoryStore(live, tmp_path).record()
    reports: list[list[IterationReport]] = []
    students, looked = [], []

    def look(after: int, student: NetworkDenoiser) -> None:
        looked.append(outputs(student))
        if len(looked) == 3:
            time.sleep(3)  # longer than the other process waits for a gradient

    for devices in (ONE, TWO):
        # A rule has a state: each run begins with one of its own.
        weights = LearnedWeights(4, rule=rule) if rule else LogLinearWeights(a=1.0)(4)
        reports.append([])
        report = reports[-1].append
        students.append(
            distill_on(
                devices,
                teacher,
                trajectories,
                TRAIN,
                weights,
                on_iteration=report,
                looks=Looks([1, 2], look),
            )
        )
    for alone, shared in zip(*reports, strict=True):
        torch.testing.assert_close(alone.branch_losses, shared.branch_losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(alone.weights, shared.weights, rtol=1e-4, atol=0)
    alone, shared = map(outputs, students)
    trained = (alone - outputs(widen_head(teacher, 4))).abs().max()
    assert (alone - shared).abs().max() < 1e-3 * trained
    # The leader alone looks, at branch K, while the other waits.
    for first, second in zip(looked[:2], looked[2:], strict=True):
        assert first.shape[1] == 1
        assert (first - second).abs().max() < 1e-3 * trained


def test_a_team_that_cannot_be_is_refused():
    trajectories = small_trajectories(small_teacher(), batch=3)
    with pytest.raises(InputError, match="batch=3 cannot be shared by 2 devices"):
        distill_on(TWO, trajectories.teacher, trajectories, TRAIN, torch.ones(4))
    with (
        pytest.raises(InputError, match="devices of one kind"),
        team_of([torch.device("cpu"), torch.device("cuda", 0)], print, None),
    ):
        pass


def note_settings(team: Team, device: torch.device, path: Path) -> None:
    path.write_text(f"{team.rank} {torch.are_deterministic_algorithms_enabled()}")


def test_followers_are_as_deterministic_as_the_leader(tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        with team_of(TWO, note_settings, tmp_path / "noted"):
            pass
    finally:
        torch.use_deterministic_algorithms(False)
    assert (tmp_path / "noted").read_text() == "1 True"


def test_a_follower_starts_on_its_own_device(monkeypatch):
    trajectories = small_trajectories(small_teacher())
    noted = {}
    monkeypatch.setattr(bdense.sharing, "distill", lambda *_, **options: noted.update(options))
    job = (trajectories, TRAIN, torch.ones(4), {"start": small_teacher()})
    bdense.sharing._follow(Team(1, 2), torch.device("meta"), job)
    assert {p.device.type for p in noted["start"].parameters()} == {"meta"}
    assert {p.device.type for p in job[3]["start"].parameters()} == {"cpu"}


def test_shares_of_a_batch_cover_it():
    shares = [Team(rank, 4).share_of(8) for rank in range(4)]
    assert [list(range(8))[share] for share in shares] == [[0, 1], [2, 3], [4, 5], [6, 7]]
