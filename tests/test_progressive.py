"""Progressive distillation: what any method promises, and what is its own."""

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bdense.data.datasets import Dataset, to_float
from bdense.diffusion.conditions import Unconditional
from bdense.diffusion.denoiser import Denoiser, NetworkDenoiser
from bdense.diffusion.preconditioning import DDPM, Cosine
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import DDIM, trajectory
from bdense.diffusion.vp import CosineSchedule, Levels
from bdense.errors import InputError, NonFiniteLossError
from bdense.execution import Execution
from bdense.methods.images import ImageBatch
from bdense.methods.method import Inputs
from bdense.methods.progressive import (
    PDConfig,
    PDStage,
    Progressive,
    dense_targets,
    image_weights,
    reparameterised,
)
from bdense.training.loop import train
from bdense.weights.weighting import FixedWeights
from tests.contracts.methods import ALL, ONE, MethodContract
from tests.networks import image, tiny_denoiser
from tests.pd_nets import TinyConv, small_conv
from tests.small import noise_images, same_weights
from tests.written_out import plain_round

COSINE = CosineSchedule()
TWO = torch.tensor([0.3, 0.7], dtype=torch.float64)
IMAGES = noise_images(channels=2, classes=3)


def config(**changes: Any) -> PDConfig:
    """A round to 4 steps."""
    usual = {"steps": 8, "until": 4, "updates": 3, "batch": 4, "lr": 1e-3}
    return PDConfig(**usual | changes)


def stage_on(
    teacher: NetworkDenoiser, *, seed: int = 5, dataset: Dataset | None = None, **changes: Any
) -> PDStage:
    """The first round on images of a set."""
    method, chosen = Progressive(), config(**changes)
    plan = method.plan(chosen, teacher)[0]
    return method.stage(plan, teacher, chosen, Inputs(dataset=dataset or IMAGES, seed=seed))


def conv(prediction: str = "v_prediction", hidden: int = 4, channels: int = 1) -> NetworkDenoiser:
    """Float64, 8 x 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyConv(img_channels=channels, img_resolution=8, hidden=hidden)
    return NetworkDenoiser(model.double(), Cosine(prediction_type=prediction)).eval()


@dataclass(frozen=True, eq=False, kw_only=True)
class OnNoise(PDStage):
    """Float64 batches of 8 images for ``conv``."""

    def batch(self, iteration: int, images: slice) -> ImageBatch:
        draw = torch.Generator().manual_seed(iteration)
        clean, noise = torch.randn(2, 8, 1, 8, 8, generator=draw, dtype=torch.float64)
        return ImageBatch(0.5 * clean, noise, torch.arange(8) % self.steps, Unconditional())


def on_noise(teacher: NetworkDenoiser, steps: int = 2, **changes: Any) -> OnNoise:
    """A round to ``steps``."""
    start = changes.pop("start", teacher)
    substeps = changes.get("substeps", 2)
    chosen = config(**{"steps": steps * substeps, "until": steps, "batch": 8} | changes)
    return OnNoise(
        config=chosen,
        teacher=teacher,
        start=start,
        levels=COSINE,
        steps=steps,
        dataset=noise_images(channels=1, classes=3),
        seed=5,
        substeps=substeps,
        conditions=teacher.conditions,
    )


class TestProgressive(MethodContract):
    method = Progressive
    knobs = {"steps": 8, "until": 2, "updates": 5, "batch": 4, "lr": 1e-3}  # noqa: RUF012
    others = {"steps": (16,), "until": (4,), "substeps": (4,)}  # noqa: RUF012
    rate = 1e-3

    def teacher(self):
        return small_conv("cosine")

    def inputs(self, seed=5):
        return Inputs(dataset=noise_images(classes=3), seed=seed)

    @pytest.mark.slow  # another process starts; by default SFD's shows it
    def test_two_devices_equal_one_to_rounding(self):
        super().test_two_devices_equal_one_to_rounding()

    def learning(self, seed=5, **changes):
        return super().learning(seed, **{"dropout": True} | changes)

    def written_out(self):
        stage = self.learning(dropout=False, clip_norm=0.05)
        student, norms = plain_round(stage)
        assert max(norms) > stage.config.clip_norm  # clipping was at work
        return stage, student


# ---- a round ----


def test_a_conditional_teacher_and_its_student_are_told_the_classes():
    stage = stage_on(tiny_denoiser(precond="cosine", label_dim=3))
    assert stage.batch(0, ALL).condition.name == "class_labels"
    student = train(stage, FixedWeights(ONE))
    plain, norms = plain_round(stage)
    assert max(norms) > stage.config.clip_norm
    assert same_weights(student, plain)
    assert not same_weights(student, stage.start)


def test_weights_are_rescaled_to_sum_1_unless_asked_not_to():
    """A clipped gradient would see their scale."""
    first = conv()
    one, scaled = (train(on_noise(first), FixedWeights(factor * TWO)) for factor in (1, 2.0**40))
    assert same_weights(one, scaled)
    reports = []
    raw = on_noise(first, rescale_weights=False)
    train(raw, FixedWeights(4 * TWO), on_iteration=reports.append)
    assert reports[0].weights.tolist() == [pytest.approx([1.2, 2.8])]


# ---- targets ----


def gauss(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact D where every pixel is N(0.2, 0.5^2)."""
    variance = sigma.to(x).view(-1, 1, 1, 1) ** 2
    return 0.2 + 0.25 * (x - 0.2) / (0.25 + variance)


def ideal(schedule: Levels, num_steps: int, substeps: int) -> Denoiser:
    """The student whose D is D*^K at every level of its grid."""
    fine = schedule.grid(num_steps * substeps)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        at = int((fine - sigma).abs().argmin())
        levels = fine[at : at + substeps + 1, None].expand(-1, len(x))
        return dense_targets(gauss, x, levels)[-1]

    return denoise


@pytest.mark.parametrize(
    "schedule",
    [COSINE, Schedule(), Schedule(kind="logsnr", sigma_max=20.0), Schedule(sigma_min=1.0)],
    ids=["cosine", "polynomial", "logsnr", "high-end"],
)
@pytest.mark.parametrize("substeps", [2, 3, 4])
def test_an_ideal_student_lands_where_the_teachers_steps_do(schedule, substeps):
    """Whether the last level is 0 or above it."""
    noise = torch.randn(
        4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    walk = trajectory(DDIM(), gauss, schedule.start(noise), schedule.grid(3 * substeps))
    sampler = Sampler(num_intervals=3, afs=False, schedule=schedule, solver=DDIM())
    end = sampler(ideal(schedule, 3, substeps), noise)
    torch.testing.assert_close(end, walk[-1], rtol=1e-10, atol=1e-11)
    # And each branch where as many steps do, in every interval.
    fine = schedule.grid(3 * substeps)
    for n in range(3):
        levels, x = fine[substeps * n : substeps * (n + 1) + 1], walk[substeps * n]
        targets = dense_targets(gauss, x, levels[:, None].expand(-1, len(x)))
        for k in range(1, substeps + 1):
            landed = targets[k - 1] + levels[k] / levels[0] * (x - targets[k - 1])
            expected = walk[substeps * n + k]
            torch.testing.assert_close(landed, expected, rtol=1e-10, atol=1e-10)


def test_clipped_predictions_keep_targets_between_minus_1_and_1():
    x = 3 * torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    levels = torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=torch.float64)[:, None].expand(-1, 6)

    def wide(x: Tensor, sigma: Tensor) -> Tensor:
        return 2 * x

    targets = dense_targets(wide, x, levels, clip=True)
    assert bool((targets.abs() <= 1).all())
    # The second state follows from the clipped prediction.
    first = (2 * x).clamp(-1, 1)
    second = (2 * (first + 0.5 * (x - first))).clamp(-1, 1)
    torch.testing.assert_close(targets[1], first / 3 + second * 2 / 3)
    assert float(dense_targets(wide, x, levels).abs().max()) > 1


# ---- weights ----


def test_the_space_of_states_multiplies_by_the_way_moved_and_keeps_the_sum():
    levels = torch.tensor([[4.0, 8.0], [3.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([2.0, 6.0])
    # 1 - t_k / t_0 is 1/4, 3/4 and 3/4, 1: 0.5 and 4.5, times 8 / 5; 1.5 and 6, times 8 / 7.5.
    moved = image_weights(weights, levels, "state")
    assert moved.flatten().tolist() == pytest.approx([0.8, 1.6, 7.2, 6.4])
    assert image_weights(weights, levels, "clean").tolist() == [[2.0, 2.0], [6.0, 6.0]]
    # One branch is the step's end, whatever the space.
    assert image_weights(torch.tensor([5.0]), levels, "state").tolist() == [[5.0, 5.0]]


# ---- failures, refusals ----


def test_a_finite_loss_whose_gradient_overflows_stops_the_run():
    first = conv()
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at iteration 0") as g:
        train(on_noise(first, rescale_weights=False), FixedWeights(1e200 * ONE))
    assert g.value.branch is None  # each number of it is


@pytest.mark.parametrize(
    ("first", "last", "substeps", "message"),
    [
        (64, 6, 3, r"steps 64 do not become `until` 6 by dividing by `substeps` 3 .*at 54"),
        (64, 6, 2, "start at 48"),
        (6, 4, 2, "start at 8"),
        (96, 1, 2, "start at 128"),
        (8, 8, 2, "until must be below `steps` 8, the teacher's, got 8"),
    ],
)
def test_steps_that_do_not_divide_are_refused_with_what_would(first, last, substeps, message):
    with pytest.raises(InputError, match=message):
        PDConfig(steps=first, until=last, substeps=substeps)


def test_a_teacher_that_does_not_fit_is_refused():
    method, ddpm = Progressive(), tiny_denoiser(precond="ddpm")
    polynomial = config(schedule="polynomial")
    with pytest.raises(
        InputError,
        match=r"polynomial levels from 80 to 0\.006 exceed those that this ddpm teacher was "
        r"trained for, 0\.01 to 157\.4; choose a schedule inside them",
    ):
        method.check(polynomial, ddpm, {})
    with pytest.raises(InputError, match=r"schedule native needs .*precond='edm'"):
        method.check(config(), tiny_denoiser(), {})
    method.check(polynomial, tiny_denoiser(), {})
    with pytest.raises(InputError, match=r"prediction_type sample needs .*precond='edm'"):
        method.check(config(schedule="polynomial", prediction_type="sample"), tiny_denoiser(), {})
    half = Execution(precision="float16")
    teacher = conv()
    object.__setattr__(teacher, "execution", half)
    with pytest.raises(InputError, match="not trained in float16"):
        on_noise(teacher)
    with pytest.raises(InputError, match="method progressive learns from images; give a data"):
        method.stage(method.plan(config())[0], ddpm, config(), Inputs())
    with pytest.raises(InputError, match="has images of 3 x 8 x 8, and the teacher is a network"):
        stage_on(tiny_denoiser(precond="cosine"), dataset=noise_images(channels=3))
    with pytest.raises(InputError, match=r"'noise' has 3 classes .*label_dim=2"):
        stage_on(tiny_denoiser(precond="cosine", label_dim=2))


def test_a_student_is_distilled_further_on_its_own_levels():
    method, teacher = Progressive(), conv()
    known = {"sampler": method.teacher_sampler(config(), teacher).describe()}
    method.check(config(), teacher, known)
    with pytest.raises(InputError, match=r"is a student of 8 steps at cosine levels.* with 4"):
        method.check(config(steps=4, until=2), teacher, known)
    with pytest.raises(InputError, match="with 8 steps at polynomial levels"):
        method.check(config(schedule="polynomial"), teacher, known)
    # Levels of a schedule are taken over.
    own = config(schedule="logsnr", sigma_max=20.0)
    known = {"sampler": method.teacher_sampler(own, teacher).describe()}
    assert config(**PDConfig.usual(known, teacher)).levels(teacher) == own.levels(teacher)
    euler = Sampler(num_intervals=8, afs=False)
    with pytest.raises(InputError, match="draws by euler"):
        method.check(config(), teacher, {"sampler": euler.describe()})


# ---- another prediction ----


def test_a_copy_is_taken_to_predict_something_else():
    first = tiny_denoiser(precond="cosine")
    taken = reparameterised(first, "sample")
    assert taken.precond == Cosine(prediction_type="sample")
    assert first.precond == Cosine(prediction_type="v_prediction")
    assert same_weights(taken, first)
    x, sigma = image(2), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        c = first.precond(sigma.view(-1, 1, 1, 1))
        raw = (first(x, sigma) - c.skip * x) / c.out
        torch.testing.assert_close(taken(x, sigma), raw, rtol=1e-4, atol=1e-5)
    assert reparameterised(tiny_denoiser(precond="ddpm"), "sample").precond == DDPM(
        prediction_type="sample"
    )
    with pytest.raises(InputError, match=r"prediction_type sample needs .*precond='edm'"):
        reparameterised(tiny_denoiser(), "sample")
    with pytest.raises(InputError, match=r"prediction_type must be one of .*, got 'score'"):
        reparameterised(first, "score")


# ---- batches ----


def test_batches_are_images_of_the_set_with_their_classes():
    dataset = IMAGES
    clean = to_float(dataset.images)
    stage = stage_on(tiny_denoiser(precond="cosine", label_dim=3))
    drawn = [stage.batch(j, ALL) for j in range(30)]
    seen = set()
    for batch in drawn:
        for pixels, label in zip(batch.clean, batch.condition.values, strict=True):
            (which,) = (clean == pixels).flatten(1).all(1).nonzero().flatten().tolist()
            assert label.tolist() == [float(c == which % 3) for c in range(3)]
            seen.add(which)
    assert seen == set(range(12))
    intervals = torch.cat([batch.interval for batch in drawn])
    assert intervals.unique().tolist() == [0, 1, 2, 3]
    noise = torch.stack([batch.noise for batch in drawn])
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    labels = hashlib.sha256(b"[12]" + dataset.labels.numpy().tobytes()).hexdigest()
    assert stage.describe(FixedWeights(TWO))["batches.labels"] == labels
    untold = stage_on(tiny_denoiser(precond="cosine"))
    assert "batches.labels" not in untold.describe(FixedWeights(TWO))
    # Each round draws its own.
    other = stage_on(tiny_denoiser(precond="cosine"), steps=16, until=8)
    assert not torch.equal(untold.batch(0, ALL).noise, other.batch(0, ALL).noise)


def test_flips_mirror_half_of_the_images_and_nothing_else():
    teacher = tiny_denoiser(precond="cosine")
    before, after = (
        stage_on(teacher, batch=64, flip=flip).batch(0, ALL) for flip in (False, True)
    )
    assert torch.equal(before.noise, after.noise)
    assert torch.equal(before.interval, after.interval)
    kept = (before.clean == after.clean).flatten(1).all(1)
    mirrored = (before.clean.flip(-1) == after.clean).flatten(1).all(1)
    assert bool((kept ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def test_steps_and_levels_of_a_config():
    """A schedule's own levels make the same config, given or not."""
    assert PDConfig(steps=64, until=4).rounds == (32, 16, 8, 4)
    assert PDConfig(steps=162, until=6, substeps=3).rounds == (54, 18, 6)
    assert PDConfig(steps=4, until=1, substeps=4).rounds == (1,)
    polynomial = config(schedule="polynomial")
    assert config(schedule="polynomial", rho=7.0, sigma_min=0.006, sigma_max=80.0) == polynomial
    assert config(schedule="polynomial", rho=5.0) != polynomial
    with pytest.raises(InputError, match="rho 5 is for another schedule: native"):
        config(rho=5.0)
