"""One training shared by two processes: gloo on the CPU."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import bdense.training.loop
import bdense.training.parallel
from bdense.diffusion.branches import widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError, NonFiniteError, NonFiniteLossError, portable
from bdense.methods.recordings import TrajectoryStore
from bdense.training.loop import Evaluations, IterationReport
from bdense.training.parallel import Follow, Team, team_of
from bdense.weights.log_linear import LogLinearWeights
from bdense.weights.weighting import FixedWeights, LearnedWeights
from tests.contracts.methods import TWO_CPUS, outputs
from tests.networks import tiny_denoiser
from tests.small import sfd, sfd_stage, small_teacher, small_trajectories

SHORT = {"images": 12, "lr": 1e-4, "dropout": False}


def follow_in_haste(team: Team, device: torch.device, job: Any) -> None:
    """From the first evaluation on, two seconds are enough; before it both still load."""
    wait = Team.while_others_wait

    def in_haste(self: Team, name: str, work: Callable[[], object]) -> None:
        dist.set_timeout(timedelta(seconds=2))
        wait(self, name, work)

    Team.while_others_wait = in_haste
    bdense.training.loop._follow(team, device, job)


@pytest.mark.parametrize("rule", [None, pytest.param("gradient-norm", marks=pytest.mark.slow)])
def test_the_leader_alone_evaluates_while_the_others_wait(tmp_path, monkeypatch, rule):
    """For longer than they wait for a gradient; on recorded trajectories."""
    monkeypatch.setattr(bdense.training.loop, "_follow", follow_in_haste)
    teacher = small_teacher()
    live = small_trajectories(teacher, count=3, batch=4)
    trajectories = TrajectoryStore(live, tmp_path).record()
    reports: list[list[IterationReport]] = []
    students, seen = [], []

    def evaluate(after: int, student: NetworkDenoiser) -> None:
        seen.append(outputs(student))
        if len(seen) == 3:
            time.sleep(3)  # longer than the other process waits for a gradient

    for devices in (None, TWO_CPUS):
        # A rule has a state: each run begins with one of its own.
        weights = LearnedWeights(4, rule=rule) if rule else LogLinearWeights(a=1.0)(4)
        reports.append([])
        report = reports[-1].append
        students.append(
            sfd(
                trajectories,
                weights,
                devices=devices,
                on_iteration=report,
                evaluations=Evaluations([1, 2], evaluate),
                **SHORT,
            )
        )
    for alone, shared in zip(*reports, strict=True):
        torch.testing.assert_close(alone.branch_losses, shared.branch_losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(alone.weights, shared.weights, rtol=1e-4, atol=0)
    alone, shared = map(outputs, students)
    trained = (alone - outputs(widen_head(teacher, 4))).abs().max()
    assert (alone - shared).abs().max() < 1e-3 * trained
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert first.shape[1] == 1
        assert (first - second).abs().max() < 1e-3 * trained


@pytest.mark.slow  # two processes start
def test_two_devices_leave_a_layer_of_the_teacher_s_training_alone():
    """EDM's networks have one for augmentations, which gets no gradient in distillation."""
    teacher = tiny_denoiser(augment_dim=9)
    layer = teacher.model.map_augment.weight
    alone, shared = (
        sfd(small_trajectories(teacher), LogLinearWeights(a=1.0)(4), devices=devices, **SHORT)
        for devices in (None, TWO_CPUS)
    )
    trained = (outputs(alone) - outputs(widen_head(teacher, 4))).abs().max()
    assert (outputs(alone) - outputs(shared)).abs().max() < 1e-3 * trained
    assert torch.equal(shared.model.map_augment.weight, layer)


def test_a_team_that_cannot_be_is_refused():
    trajectories = small_trajectories(small_teacher(), count=6, batch=3)
    with pytest.raises(InputError, match="batch=3 cannot be shared by 2 devices"):
        sfd(trajectories, torch.ones(4), devices=TWO_CPUS)
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
        with team_of(TWO_CPUS, note_settings, tmp_path / "noted"):
            pass
    finally:
        torch.use_deterministic_algorithms(False)
    assert (tmp_path / "noted").read_text() == "1 True"


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
        followers.raise_peer_error()


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
        team_of(TWO_CPUS, print, Unreadable()),
    ):
        pytest.fail("there is no team")
    assert time.monotonic() - began < 60


def follow_out_of_memory(team: Team, device: torch.device, job: Any) -> None:
    mean, means = Team.mean, []

    def fails(self: Team, values: torch.Tensor) -> torch.Tensor:
        means.append(values)
        if len(means) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean(self, values)

    Team.mean = fails
    bdense.training.loop._follow(team, device, job)


def test_a_distillation_ends_by_what_a_follower_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(bdense.training.loop, "_follow", follow_out_of_memory)
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, count=3, batch=4)
    reports = []
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory"):
        sfd(
            trajectories,
            torch.ones(4),
            devices=TWO_CPUS,
            checkpoint=tmp_path / "training.safetensors",
            on_iteration=reports.append,
            **SHORT,
        )
    assert len(reports) < 3
    assert not (tmp_path / "training.safetensors").exists()


def test_an_iteration_in_which_a_follower_failed_is_not_reported(tmp_path):
    """NCCL's sums, once ended, give numbers and raise nothing."""

    def raise_peer_error() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stage = sfd_stage(small_trajectories(small_teacher()))
    path, reports = tmp_path / "training.safetensors", []
    with pytest.raises(torch.OutOfMemoryError):
        bdense.training.loop._train(
            Team(0, 1, raise_peer_error=raise_peer_error),
            stage,
            FixedWeights(torch.ones(4)),
            path,
            Evaluations(),
            checkpoint_seconds=0,
            on_iteration=reports.append,
        )
    assert reports == []
    assert not path.exists()


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
    found = portable(error, "on cuda:1")
    assert (type(found), str(found)) == (kind, str(error))
    assert found.__notes__[-1].startswith("on cuda:1:\n")


def sleep_for_long(team: Team, device: torch.device, path: Path) -> None:
    """In no sum, whose connection would end it."""
    path.write_text(str(os.getpid()))
    time.sleep(600)


def lead_for_long(path: str) -> None:
    with team_of(TWO_CPUS, sleep_for_long, Path(path)):
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


@pytest.mark.slow  # another process starts
def test_no_follower_outlives_the_block(tmp_path):
    seen: dict[str, float] = {}

    def fail(team: Team) -> None:
        seen["pid"] = follower(tmp_path / "pid")
        seen["began"] = time.monotonic()
        raise KeyError

    with pytest.raises(KeyError):
        lead(TWO_CPUS, sleep_for_long, tmp_path / "pid", fail)
    assert time.monotonic() - seen["began"] < 30
    assert not is_alive(seen["pid"])


@pytest.mark.slow  # another process starts
def test_a_follower_whose_leader_ended_before_does_not_begin():
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=bdense.training.parallel._end_with, args=(os.getppid(),))
    process.start()
    process.join()
    assert process.exitcode == 1
