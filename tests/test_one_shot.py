"""A student that is told its branch weights: draws, losses, its start, resuming."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import draw_images
from bdense.diffusion.step_condition import with_step_condition
from bdense.errors import InputError, ShapeError
from bdense.methods import METHODS
from bdense.methods.distill import distill
from bdense.methods.method import Inputs
from bdense.methods.one_shot import Coordinates, OneShot, OneShotDenoiser, OneShotStage
from bdense.training.loop import train
from bdense.weights.free import FreeSpace, PerIntervalSpace
from bdense.weights.log_linear import LogLinearSpace, NormalisedSpace
from bdense.weights.space import Range, WeightSpace
from bdense.weights.weighting import FixedWeights
from tests.contracts.methods import ALL, TWO_CPUS, KilledError, assert_no_waits
from tests.networks import image, tiny_denoiser
from tests.pd_nets import small_conv
from tests.small import noise_images, same_weights, small_teacher

SPACES = (
    NormalisedSpace(),
    LogLinearSpace(a=Range(low=-0.5, high=2.0)),
    FreeSpace(branches=2),
    FreeSpace(branches=4),
    PerIntervalSpace(intervals=2),
)
EACH_SPACE = pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{s.name}{len(s.axes)}")
KNOBS: dict[str, dict[str, Any]] = {
    "sfd": {"kimg": 0.03, "batch": 6, "lr": 1e-3, "substeps": 4},
    "progressive": {
        "steps": 16,
        "until": 4,
        "substeps": 4,
        "updates": 5,
        "batch": 6,
        "lr": 1e-3,
        "schedule": "polynomial",
    },
}
EACH_METHOD = pytest.mark.parametrize("name", ["sfd", "progressive"])


def inputs(seed: int = 5) -> Inputs:
    return Inputs(dataset=noise_images(name="sha"), seed=seed)


def method_of(name: str, space: WeightSpace = SPACES[0]) -> OneShot:
    return OneShot(METHODS[name](), Coordinates(space, 4, space.box))


def uniform() -> FixedWeights:
    """What scales the images' own weights by 1."""
    return FixedWeights(torch.ones(4))


def stage_of(
    name: str,
    space: WeightSpace = SPACES[0],
    *,
    double: bool = False,
    seed: int = 5,
    **changes: Any,
) -> OneShotStage:
    """The first stage on a small teacher."""
    method, config = method_of(name, space), METHODS[name].Config(**KNOBS[name] | changes)
    teacher = small_teacher(dropout=0.3)
    stage = method.stage(
        method.plan(config)[0], teacher.double() if double else teacher, config, inputs(seed)
    )
    assert isinstance(stage, OneShotStage)
    return stage


def in_float64(batch: Any) -> Any:
    """A batch with its images in float64."""
    found = {each.name: getattr(batch, each.name) for each in dataclasses.fields(batch)}
    single = {k: v for k, v in found.items() if getattr(v, "dtype", None) == torch.float32}
    return dataclasses.replace(batch, **{name: each.double() for name, each in single.items()})


@EACH_METHOD
def test_no_update_waits_for_its_device(name):
    assert_no_waits(stage_of(name), uniform())


# ---- coordinates ----


@EACH_SPACE
def test_a_draw_is_of_seed_and_index_alone_and_covers_each_coordinate_evenly(space):
    coordinates, count = Coordinates(space, 4, space.box), 16
    points = coordinates.draw(count, 3, 0, 7)
    assert points.shape == (count, len(space.axes))
    torch.randn(5)  # the global generator has no part in it
    assert torch.equal(points, coordinates.draw(count, 3, 0, 7))
    for others in ((4, 0, 7), (3, 1, 7), (3, 0, 8)):
        assert not torch.equal(points, coordinates.draw(count, *others))
    for column, bounds in zip(points.T, space.box, strict=True):
        share = (column - bounds.low) / (bounds.high - bounds.low)
        assert sorted((share * count).floor().int().tolist()) == list(range(count))
    told = coordinates.embedded(points)
    assert bool((told >= 2).all() and (told <= 8).all())


@pytest.mark.parametrize("space", [SPACES[0], SPACES[1], SPACES[3]], ids=lambda s: s.name)
def test_weights_of_each_image_are_the_space_s_own_with_sum_k(space):
    coordinates = Coordinates(space, 4, space.box)
    points = coordinates.draw(6, 0)
    weights = coordinates.weights(points)
    for point, own in zip(points.tolist(), weights.T, strict=True):
        given = space.weighting(space.at(point), 4).weights()
        assert space.coordinates(space.at(point)) == tuple(point)
        assert torch.allclose(own / own[-1], given / given[-1], rtol=1e-12)
    assert torch.allclose(weights.sum(0), torch.full((6,), 4.0, dtype=torch.float64))


def test_weights_that_differ_between_intervals_are_each_interval_s_own():
    stage = stage_of("sfd", PerIntervalSpace(intervals=2))
    batch, points = stage.batch(0, ALL)
    alike = Coordinates(NormalisedSpace(), 4, NormalisedSpace().box)
    student = widen_head(stage.start, 4)
    for update, slopes in zip(stage.updates(0, (batch, points)), points.T, strict=True):
        update(student.branches)  # the next begins where it ends
        assert torch.equal(update.weights, alike.weights(slopes[:, None]))


# ---- losses ----


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sfd", {}),
        ("progressive", {}),
        ("progressive", {"weights_space": "state"}),
        ("progressive", {"rescale_weights": False, "clip_norm": None}),
    ],
)
def test_images_that_are_told_one_point_have_the_gradient_of_its_fixed_weights(name, changes):
    """To rounding in float64, with the optimiser's own scaling of the weights."""
    stage = stage_of(name, double=True, **changes)
    coordinates, scaled = stage.coordinates, stage.optimisation.scaled
    point = torch.full((6, 1), 0.7, dtype=torch.float64)
    fixed = coordinates.weights(point)[:, 0]
    own_batch = in_float64(stage.batch(0, ALL)[0])
    student = widen_head(stage.start, 4).train()
    told = coordinates.embedded(point)

    def gradients(update: Any, branches: Any, weights: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(1)  # the same dropout
        loss = update(branches).weighted(scaled(weights))
        return torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)

    def tell(x: torch.Tensor, sigma: torch.Tensor, **given: Any) -> torch.Tensor:
        return student.branches(x, sigma, num_points=told[:, 0], **given)

    one_shot = stage.updates(0, (own_batch, point))
    ordinary = stage.stage.updates(0, own_batch)
    for own, usual in zip(one_shot, ordinary, strict=True):
        found = gradients(own, student.branches, torch.ones(4))
        wanted = gradients(usual, tell, fixed)
        pairs = [pair for pair in zip(found, wanted, strict=True) if pair[1] is not None]
        largest = max(float(b.abs().max()) for _, b in pairs)
        assert largest > 0
        for a, b in pairs:
            assert float((a - b).abs().max()) <= 1e-12 * largest


@EACH_METHOD
def test_an_image_s_loss_has_its_own_weights(name):
    """Images weighted one at a time make up the whole loss, and each has its own part in it."""
    stage = stage_of(name, double=True, dropout=False)
    student = widen_head(stage.start, 4)
    batch, points = stage.batch(0, ALL)
    update = next(stage.updates(0, (in_float64(batch), points)))
    losses = update(student.branches).losses
    alone = torch.eye(6, dtype=torch.float64)
    apart = [losses.weighted(one.expand(4, 6)).item() for one in alone]
    whole = losses.weighted(torch.ones(4, 6, dtype=torch.float64)).item()
    assert sum(apart) == pytest.approx(whole, rel=1e-12)
    assert whole == pytest.approx(losses.per_branch.sum().item(), rel=1e-12)
    assert len({round(each, 9) for each in apart}) == 6


# ---- the student ----


@EACH_SPACE
def test_a_student_starts_as_its_teacher_wherever_it_is_told_to_be(space):
    teacher = small_teacher()
    method = method_of("sfd", space)
    student = with_step_condition(teacher, seed=0, values=len(space.axes))
    x, sigma = image(channels=1), torch.tensor([0.1, 1.0, 20.0])
    for point in itertools.islice(Coordinates(space, 4, space.box).draw(4, 0).tolist(), 3):
        told = method.student_at(student, tuple(point))
        assert torch.equal(told(x, sigma), teacher(x, sigma))
    assert not told.step_condition


def test_a_trained_student_differs_by_what_it_is_told_and_draws_with_the_method_s_sampler():
    method, stage = method_of("sfd"), stage_of("sfd", kimg=0.12, lr=1e-2)
    student = export_branch(train(stage, uniform()))
    drawn = [
        draw_images(method.student_at(student, (a,)), stage.sampler, 2, seed=0) for a in (-1, 2)
    ]
    assert drawn[0].shape == (2, 1, 8, 8)
    assert not torch.equal(*drawn)


@EACH_METHOD
def test_a_training_resumes_bit_for_bit(tmp_path, name):
    """All stages: a later round's teacher is told the images' points too."""
    method, config = method_of(name, FreeSpace(branches=4)), METHODS[name].Config(**KNOBS[name])
    several = len(method.plan(config)) > 1

    def run(folder: Any, **options: Any) -> NetworkDenoiser:
        where = {"folder": folder} if several else {"checkpoint": folder / "c.safetensors"}
        folder.mkdir(exist_ok=True)
        teacher = small_teacher(dropout=0.3)
        options |= {"checkpoint_seconds": 0, **where}
        *_, last = distill(method, teacher, config, uniform, inputs(), **options)
        return last.student

    def kill(plan: Any, done: Any) -> None:
        if plan == method.plan(config)[-1] and done.iteration == 2:
            raise KilledError

    whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", on_iteration=kill)
    assert same_weights(run(tmp_path / "killed"), whole)


def test_two_devices_draw_what_one_does():
    stage = stage_of("sfd", dropout=False)
    whole = stage.batch(3, ALL)[1]
    halves = [stage.batch(3, slice(first, first + 3))[1] for first in (0, 3)]
    assert torch.equal(torch.cat(halves), whole)
    # Adam would make whole steps of rounding.
    stage = stage_of("sfd", dropout=False, optimizer="sgd", lr=1e-4)
    one, two = (train(stage, uniform(), devices=devices) for devices in (None, TWO_CPUS))
    pairs = list(zip(one.parameters(), two.parameters(), stage.start.parameters(), strict=True))
    moved = max(
        float((a - start).detach().abs().max()) for a, _, start in pairs if a.shape == start.shape
    )
    apart = max(float((a - b).abs().max()) for a, b, _ in pairs)
    assert apart < 1e-4 * moved


# ---- what cannot be told ----


def test_a_teacher_or_a_network_that_cannot_be_told_is_refused():
    sfd = METHODS["sfd"].Config(**KNOBS["sfd"])
    conditional = with_step_condition(small_teacher(), seed=0)
    with pytest.raises(InputError, match="step condition already"):
        method_of("sfd").check(sfd, conditional, {})
    with pytest.raises(InputError, match="TinyConv takes no step condition"):
        method_of("sfd").check(sfd, small_conv(), {})


def test_a_network_of_several_values_takes_no_single_number():
    x, sigma = image(), torch.tensor([0.1, 1.0, 20.0])
    student = with_step_condition(tiny_denoiser("SongUNet"), seed=0, values=2)
    for wrong in (4, torch.ones(3), torch.ones(3, 3), torch.ones(4, 2)):
        with pytest.raises(ShapeError, match=r"num_points must be \[3, 2\]"):
            student(x, sigma, num_points=wrong)
    one = student(x, sigma, num_points=torch.ones(1, 2))
    assert torch.equal(one, student(x, sigma, num_points=torch.ones(3, 2)))
    assert torch.equal(one, OneShotDenoiser(student, torch.ones(2))(x, sigma))
