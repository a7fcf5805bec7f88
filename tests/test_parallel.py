"""One training shared by two processes: gloo on the CPU."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import bdense.methods.sharing
import pytest
import torch
import torch.distributed as dist
from bdense.methods.sharing import distill_on

import bdense.training.parallel
from bdense.diffusion.branches import widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError, NonFiniteError, NonFiniteLossError
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.sfd import IterationReport, Looks, SFDConfig
from bdense.training.parallel import Follow, Team, team_of
from bdense.weights.spaces import LogLinearWeights
from bdense.weights.weighting import LearnedWeights
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
    """From the first look on, five seconds are enough; until then both processes still load."""
    wait = Team.while_others_wait

    def in_haste(self: Team, name: str, work: Callable[[], object]) -> None:
        dist.set_timeout(timedelta(seconds=5))
        wait(self, name, work)

    Team.while_others_wait = in_haste
    bdense.methods.sharing._follow(team, device, job)


@pytest.mark.parametrize("rule", [None, pytest.param("gradient-norm", marks=pytest.mark.slow)])
def test_two_processes_equal_one_to_rounding(tmp_path, monkeypatch, rule):
    """Outputs, not weights: Adam makes steps of rounding noise where a gradient cancels."""
    monkeypatch.setattr(bdense.methods.sharing, "_follow", follow_in_haste)
    teacher = small_teacher()
    live = small_trajectories(teacher, count=3, batch=4)
    trajectories = TrajectoryStore(live, tmp_path).record()
    reports: list[list[IterationReport]] = []
    students, looked = [], []

    def look(after: int, student: NetworkDenoiser) -> None:
        looked.append(outputs(student))
        if len(looked) == 3:
            time.sleep(7)  # longer than the other process waits for a gradient

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
    monkeypatch.setattr(
        bdense.methods.sharing, "distill", lambda *_, **options: noted.update(options)
    )
    job = (trajectories, TRAIN, torch.ones(4), {"start": small_teacher()})
    bdense.methods.sharing._follow(Team(1, 2), torch.device("meta"), job)
    assert {p.device.type for p in noted["start"].parameters()} == {"meta"}
    assert {p.device.type for p in job[3]["start"].parameters()} == {"cpu"}


def test_shares_of_a_batch_cover_it():
    shares = [Team(rank, 4).share_of(8) for rank in range(4)]
    assert [list(range(8))[share] for share in shares] == [[0, 1], [2, 3], [4, 5], [6, 7]]


# Processes that end before their time.


def lead(
    devices: list[torch.device], follow: Follow, job: object, work: Callable[[Team], None]
) -> None:
    with team_of(devices, follow, job) as team:
        work(team)


def follow_and_fail(team: Team, device: torch.device, how: str) -> None:
    """The first follower in its second sum, in which the others wait for it."""
    team.mean(torch.ones(1))
    if team.rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if team.rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    team.mean(torch.ones(1))


@pytest.mark.parametrize(
    ("how", "size", "kind", "words"),
    [
        # The second follower misses the first, as the leader does.
        ("raised", 3, torch.OutOfMemoryError, "^CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("killed", 2, RuntimeError, r"^the process that shared .* on cpu was ended by signal 9 "),
    ],
)
def test_what_ends_a_follower_ends_the_leader_within_seconds(how, size, kind, words):
    began = []

    def two_sums(team: Team) -> None:
        team.mean(torch.ones(1))
        began.append(time.monotonic())
        team.mean(torch.ones(1))

    with pytest.raises(RuntimeError, match=words) as caught:
        lead([torch.device("cpu")] * size, follow_and_fail, how, two_sums)
    assert time.monotonic() - began[0] < 20
    assert type(caught.value) is kind
    if how == "raised":
        assert str(caught.value) == "CUDA out of memory. Tried to allocate 2.00 GiB"
        (note,) = caught.value.__notes__
        assert note.startswith("on cpu:\nTraceback")
        assert "in follow_and_fail" in note


def test_the_first_to_fail_is_blamed():
    """Not who missed it in a sum, though both have told by the time that the leader looks."""
    followers = bdense.training.parallel._Followers([torch.device("cpu")] * 3, None)
    for when, words in ((2.0, "connection closed"), (1.0, "no memory")):
        end, outcome = multiprocessing.Pipe(duplex=False)
        outcome.send((when, RuntimeError(words)))
        followers._ends[end] = 1
    followers._watch()
    with pytest.raises(RuntimeError, match="no memory"):
        followers.miss()


def gone() -> None:
    raise InputError("a shard is gone")


class Unreadable:
    """What can be sent and not be received."""

    def __reduce__(self) -> tuple:
        return gone, ()


def test_a_follower_that_does_not_come_is_not_waited_for():
    began = time.monotonic()
    with (
        pytest.raises(RuntimeError, match="on cpu ended with exit code 1; if it said why"),
        team_of(TWO, print, Unreadable()),
    ):
        pytest.fail("there is no team")
    assert time.monotonic() - began < 60


def follow_out_of_memory(team: Team, device: torch.device, job: Any) -> None:
    mean, means = Team.mean, []

    def third_fails(self: Team, values: torch.Tensor) -> torch.Tensor:
        means.append(values)
        if len(means) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean(self, values)

    Team.mean = third_fails
    bdense.methods.sharing._follow(team, device, job)


def test_a_distillation_ends_by_what_a_follower_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(bdense.methods.sharing, "_follow", follow_out_of_memory)
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, count=3, batch=4)
    reports = []
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory"):
        distill_on(
            TWO,
            teacher,
            trajectories,
            TRAIN,
            torch.ones(4),
            checkpoint=tmp_path / "training.safetensors",
            on_iteration=reports.append,
        )
    assert len(reports) < 3
    assert not (tmp_path / "training.safetensors").exists()


def test_an_iteration_in_which_a_follower_failed_is_not_reported(monkeypatch):
    """NCCL's sums, once ended, give numbers and raise nothing."""

    def miss() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    @contextlib.contextmanager
    def team(*_: object) -> Iterator[Team]:
        yield Team(0, 2, miss=miss)

    def distill(*_: object, on_iteration: Callable[[object], None], **__: object) -> None:
        on_iteration("garbage")

    monkeypatch.setattr(bdense.methods.sharing, "team_of", team)
    monkeypatch.setattr(bdense.methods.sharing, "distill", distill)
    trajectories = small_trajectories(small_teacher(), batch=4)
    reports = []
    with pytest.raises(torch.OutOfMemoryError):
        distill_on(
            TWO,
            trajectories.teacher,
            trajectories,
            TRAIN,
            torch.ones(4),
            on_iteration=reports.append,
        )
    assert reports == []


class LocalWordsError(OSError):
    """Travels by pickle no better than an error of two arguments that are one text."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: no memory"), RuntimeError),
        (InputError("a shard is gone"), InputError),
        (NonFiniteLossError("the loss", iteration=3, branch=2), NonFiniteError),
        (LocalWordsError("a", "b"), OSError),
    ],
)
def test_errors_travel_with_their_words(error, kind):
    found = bdense.training.parallel._portable(error, torch.device("cuda", 1))
    assert (type(found), str(found)) == (kind, str(error))
    assert found.__notes__[-1].startswith("on cuda:1:\n")


def sleep_for_long(team: Team, device: torch.device, path: Path) -> None:
    """In no sum, whose connection would end it."""
    path.write_text(str(os.getpid()))
    time.sleep(600)


def lead_for_long(path: str) -> None:
    with team_of(TWO, sleep_for_long, Path(path)):
        time.sleep(600)


def follower(path: Path) -> int:
    """The process that says so in that file."""
    last = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < last
        time.sleep(0.05)
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not end them")
def test_no_follower_outlives_a_leader_that_is_killed(tmp_path):
    code = "import sys; from tests.test_parallel import lead_for_long; lead_for_long(sys.argv[1])"
    leader = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "pid"], cwd=Path(__file__).parent.parent
    )
    try:
        pid = follower(tmp_path / "pid")
        assert is_alive(pid)
    finally:
        leader.kill()
        leader.wait()
    last = time.monotonic() + 30
    while is_alive(pid):
        if time.monotonic() > last:
            os.kill(pid, signal.SIGKILL)
            pytest.fail("it outlived its leader")
        time.sleep(0.05)


def test_no_follower_outlives_the_block(tmp_path):
    seen: dict[str, float] = {}

    def fail(team: Team) -> None:
        seen["pid"] = follower(tmp_path / "pid")
        seen["began"] = time.monotonic()
        raise KeyError

    with pytest.raises(KeyError):
        lead(TWO, sleep_for_long, tmp_path / "pid", fail)
    assert time.monotonic() - seen["began"] < 30
    assert not is_alive(seen["pid"])


def test_a_follower_whose_leader_ended_before_does_not_begin():
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=bdense.training.parallel._end_with, args=(os.getppid(),))
    process.start()
    process.join()
    assert process.exitcode == 1
