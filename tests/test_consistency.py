"""Consistency distillation, against its algorithm written out and a Gaussian's exact solution."""

import copy
from dataclasses import replace

import pytest
import torch

from bdense.data.datasets import Dataset, to_float
from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.solvers import Euler, Heun, trajectory
from bdense.errors import InputError
from bdense.methods import METHODS
from bdense.methods.consistency import (
    Consistency,
    ConsistencyConfig,
    ConsistencyStage,
    MultistepConsistency,
    consistency_targets,
    towards,
)
from bdense.methods.method import Inputs
from bdense.randomness import Stream, generator
from bdense.training.loop import train
from bdense.weights.weighting import FixedWeights
from tests.contracts.methods import HalfSquare, MethodContract
from tests.pd_nets import small_conv
from tests.small import GaussianDenoiser, same_weights, small_teacher

IMAGES = torch.randint(256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(5))
DATA = Dataset("noise", IMAGES.to(torch.uint8), "", None)


def stage_of(**knobs) -> ConsistencyStage:
    settings = {"steps": 6, "substeps": 1, "kimg": 0.024, "batch": 8, "lr": 1e-3} | knobs
    teacher = small_teacher()
    return ConsistencyStage(
        config=ConsistencyConfig(**settings),
        teacher=teacher,
        dataset=DATA,
        seed=3,
        conditions=teacher.conditions,
    )


def algorithm_2(stage: ConsistencyStage) -> NetworkDenoiser:
    """Song et al. 2023, algorithm 2; with K sub-steps plain learns from the interval's end."""
    config, teacher, count = stage.config, stage.teacher, stage.batch_size
    k, data = stage.num_branches, stage.dataset.images
    online = copy.deepcopy(teacher)
    target = copy.deepcopy(teacher).requires_grad_(False)
    adam = torch.optim.Adam(online.parameters(), lr=config.lr, fused=True)
    fine = config.levels.grid(6 * k)
    for iteration in range(stage.num_updates):
        draw = generator(stage.seed, Stream.IMAGES, 0, iteration)
        clean = to_float(data[torch.randint(len(data), (count,), generator=draw)])
        noise = torch.randn(clean.shape, generator=draw)
        n = torch.randint(6, (count,), generator=draw)
        grid = [fine[k * n + j].float()[:, None, None, None] for j in range(k + 1)]
        x = clean + grid[0] * noise
        state = trajectory(Heun(), teacher, x, torch.stack(grid))[-1]
        with torch.no_grad():
            end = target(state, grid[-1].flatten())
            wanted = end + 0.006 / grid[-1] * (state - end)
        denoised = online(x, grid[0].flatten())
        found = denoised + 0.006 / grid[0] * (x - denoised)
        if config.loss == "l2":
            value = (found - wanted).square().mean()
        else:
            c = 0.00054 * 8
            value = (((found - wanted).square().flatten(1).sum(1) + c * c).sqrt() - c).mean()
        adam.zero_grad()
        value.backward()
        adam.step()
        with torch.no_grad():
            pairs = list(target.parameters()), list(online.parameters())
            torch._foreach_lerp_(*pairs, 1 - config.target_decay)
    return online


class TestConsistency(MethodContract):
    method = Consistency
    knobs = {"steps": 6, "substeps": 2, "kimg": 0.03, "batch": 6, "lr": 1e-3}  # noqa: RUF012
    others = {"nfe": (2,)}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _without_a_download(self, monkeypatch):
        monkeypatch.setattr("bdense.methods.consistency.LPIPS", HalfSquare)

    def teacher(self):
        return small_conv()

    def inputs(self, seed=5):
        return Inputs(dataset=DATA, seed=seed)

    @pytest.mark.slow  # another process starts; by default SFD's shows it
    def test_two_devices_equal_one_to_rounding(self):
        super().test_two_devices_equal_one_to_rounding()

    def learning(self, seed=5, **changes):
        return super().learning(seed, **{"dropout": True} | changes)

    def written_out(self):
        stage = self.learning(dropout=False)
        return stage, algorithm_2(stage)


@pytest.mark.parametrize("loss", ["pseudo-huber", "l2"])
@pytest.mark.parametrize("substeps", [1, 2])
def test_plain_is_algorithm_2_bit_for_bit(loss, substeps):
    stage = stage_of(loss=loss, substeps=substeps, target_decay=0.9)
    assert same_weights(train(stage, FixedWeights(torch.ones(1))), algorithm_2(stage))


def test_branch_k_learns_from_the_teachers_kth_sub_step():
    """With a weight on branch k alone, branch K is left where it began, and k follows."""
    stage = stage_of(substeps=3, kimg=0.008)
    for k in range(3):
        weights = torch.zeros(3, dtype=torch.float64)
        weights[k] = 1
        student = train(stage, FixedWeights(weights))
        reports = [export_branch(student, branch) for branch in (1, 2, 3)]
        head = [r.model.get_submodule(r.model.head_name).weight for r in reports]
        start = stage.teacher.model.get_submodule(stage.teacher.model.head_name).weight
        assert [bool(torch.equal(h, start)) for h in head] == [j != k for j in range(3)]


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_on_a_gaussian_the_exact_consistency_function_is_the_fixed_point(std):
    """f(x, t) = x sqrt((s^2 + e^2) / (s^2 + t^2)): each target equals f of the state before."""
    end = 0.006
    fine = ConsistencyConfig().levels.grid(400)

    def exact(x, t):
        """The denoiser whose ``towards`` is the exact f."""
        f = x * ((std**2 + end**2) / (std**2 + t**2)).sqrt()
        return (f - end / t * x) / (1 - end / t) if bool((t > end).all()) else x

    gaussian = GaussianDenoiser(std)
    x0 = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    for n in (0, 50, 150, 198):
        levels = fine[2 * n : 2 * n + 3].view(3, 1, 1, 1, 1)
        x = levels[0] * x0
        states = trajectory(Heun(), lambda y, t: gaussian_of(gaussian, y, t), x, levels)
        targets = consistency_targets(
            lambda y, t: exact(y, t.view(-1, 1, 1, 1)), states[1:], levels[1:], end
        )
        own = towards(exact(x, levels[0]), x, end / levels[0])
        for target in targets:
            torch.testing.assert_close(target, own, rtol=2e-4, atol=1e-8)


def gaussian_of(denoiser, x, t):
    return x * denoiser.std**2 / (denoiser.std**2 + t**2)


def test_one_step_is_eulers_and_two_steps_add_noise_up_to_the_level_between():
    teacher, levels = small_teacher(), ConsistencyConfig().levels
    one = Sampler(num_intervals=1, afs=False, schedule=levels, solver=MultistepConsistency())
    euler = Sampler(num_intervals=1, afs=False, schedule=levels, solver=Euler())
    noise = torch.randn(2, 1, 8, 8)
    # Euler's sum cancels at t = 80, where the state is some hundreds.
    torch.testing.assert_close(one(teacher, noise), euler(teacher, noise), rtol=0, atol=1e-4)
    two = Sampler(num_intervals=2, afs=False, schedule=levels, solver=MultistepConsistency())
    z = torch.randn(2, 1, 8, 8)
    t0, t1, end = levels.grid(2)
    with torch.no_grad():
        first = teacher(t0 * noise, t0)
        first = first + end / t0 * (t0 * noise - first)
        x = first + (t1**2 - end**2).sqrt() * z
        last = teacher(x, t1)
        expected = last + end / t1 * (x - last)
    torch.testing.assert_close(
        two(teacher, noise, lambda i: z), expected.float(), rtol=1e-4, atol=1e-4
    )
    assert (one.nfe, two.nfe) == (1, 2)


def test_the_progressive_schedule_ends_at_all_steps_and_the_given_decay_of_two():
    config = ConsistencyConfig(steps=18, target_schedule="progressive", kimg=12.8)
    numbers = [config.intervals_at(i) for i in range(config.num_updates)]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (2, 18)
    assert config.decay_at(0) == pytest.approx(0.95)
    assert config.decay_at(config.num_updates - 1) == pytest.approx(0.95 ** (2 / 18))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="huber_c"):
        ConsistencyConfig(loss="l2", huber_c=0.1)
    with pytest.raises(InputError, match="solver"):
        ConsistencyConfig.read({"solver": "dpmpp"})
    method = METHODS["consistency"]()
    known = {"sampler": stage_of().sampler.describe()}
    with pytest.raises(InputError, match="teacher"):
        method.check(ConsistencyConfig(), small_teacher(), known)
    with pytest.raises(InputError, match="1 x 8 x 8"):
        replace(stage_of(), teacher=small_teacher(channels=3))
