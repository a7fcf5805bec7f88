"""A student that is looked at while it learns ends as one that is not."""

import pytest
import torch

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, draw_images
from bdense.errors import InputError
from bdense.methods.sfd import IterationReport, Looks, SFDConfig, distill
from bdense.models.store import load_tensors
from bdense.weights.spaces import uniform_weights
from bdense.weights.weighting import LearnedWeights
from tests.small import same_weights, small_teacher, small_trajectories

TRAIN = SFDConfig(num_branches=4, images=24, lr=1e-3)  # 6 iterations of 4


class StopHereError(Exception):
    pass


def learning():
    """A teacher with dropout, its trajectories, and weights with a memory: all with a state."""
    teacher = small_teacher(dropout=0.3)
    trajectories = small_trajectories(teacher, count=6)
    return teacher, trajectories, TRAIN, LearnedWeights(4, rule="gradient-norm")


def nosy(seen: dict[int, torch.Tensor], stop_after: int | None = None) -> Looks:
    """Draws images, uses up the global random state, and ruins what it was given."""

    def look(after: int, student: NetworkDenoiser) -> None:
        assert not student.training
        assert student.num_branches == 1
        seen[after] = draw_images(student, Sampler(num_intervals=3, afs=True), 4, seed=3)
        torch.randn(7)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.fill_(7.0)
        if after == stop_after:
            raise StopHereError

    return Looks((2, 4), look)


def test_a_run_with_looks_ends_as_one_without_bit_for_bit():
    seen: dict[int, torch.Tensor] = {}
    whole = distill(*learning())
    assert same_weights(distill(*learning(), looks=nosy(seen)), whole)
    assert sorted(seen) == [2, 4]
    assert not torch.equal(seen[2], seen[4])


@pytest.mark.parametrize("looked", [True, False])
def test_it_does_so_also_when_it_is_stopped_between_looks_and_resumed(tmp_path, looked):
    whole, seen = distill(*learning()), {}
    keep = {"checkpoint": tmp_path / "checkpoint.safetensors", "checkpoint_seconds": 0.0}

    def stop(done: IterationReport) -> None:
        if done.iteration == 3:
            raise StopHereError

    with pytest.raises(StopHereError):
        distill(*learning(), **keep, looks=nosy({}), on_iteration=stop)
    torch.manual_seed(99)
    resumed = distill(*learning(), **keep, looks=nosy(seen) if looked else None)
    assert same_weights(resumed, whole)
    assert sorted(seen) == ([4] if looked else [])


def test_a_run_that_ends_in_a_look_is_saved_there_and_looked_at_again(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    first, second = {}, {}
    with pytest.raises(StopHereError):
        distill(*learning(), checkpoint=path, looks=nosy(first, stop_after=4))
    assert load_tensors(path)[1]["iteration"] == 4
    iterations = []
    resumed = distill(
        *learning(),
        checkpoint=path,
        looks=nosy(second),
        on_iteration=lambda done: iterations.append(done.iteration),
    )
    assert iterations == [4, 5]
    assert sorted(second) == [4]
    assert torch.equal(first[4], second[4])
    assert same_weights(resumed, distill(*learning()))


def test_a_run_is_saved_at_its_end_and_resumed_there_does_nothing_more(tmp_path):
    path, saves = tmp_path / "checkpoint.safetensors", []
    whole = distill(*learning(), checkpoint=path, on_save=saves.append)
    assert saves == [6]
    assert load_tensors(path)[1]["iteration"] == 6

    def never(done: IterationReport) -> None:
        raise StopHereError

    seen = {}
    again = distill(*learning(), checkpoint=path, on_iteration=never, looks=nosy(seen))
    assert same_weights(again, whole)
    assert not again.training
    assert seen == {}


def test_a_look_sees_the_student_of_that_many_iterations():
    """After half of the run the step size is still the first: a run half as long is the same."""
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, count=6)
    half = SFDConfig(num_branches=1, images=12, lr=1e-3)
    weights = uniform_weights()(1)
    seen: list[NetworkDenoiser] = []
    looks = Looks([2], lambda _, student: seen.append(student))
    distill(
        teacher, trajectories, SFDConfig(num_branches=1, images=24, lr=1e-3), weights, looks=looks
    )
    stopped: list[NetworkDenoiser] = []
    distill(teacher, trajectories, half, weights, looks=Looks([2], lambda _, s: stopped.append(s)))
    assert same_weights(seen[0], stopped[0])
    assert not same_weights(seen[0], teacher)


@pytest.mark.parametrize("after", [0, 6, -1])
def test_looks_off_the_way_are_refused(after):
    looks = Looks([2, after], lambda *_: None)
    with pytest.raises(InputError, match=rf"looks after \[{after}\] iterations lie outside 1..5"):
        distill(*learning(), looks=looks)
