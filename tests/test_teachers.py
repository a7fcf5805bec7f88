"""Training a teacher: it learns, its average and first step by hand, and it may be stopped."""

import copy
import math
import re

import pytest
import torch

from bdense.data.datasets import Dataset, load_dataset, to_float
from bdense.diffusion.conditions import Unconditional
from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import (
    DDPM,
    EDM,
    PREDICTIONS,
    Cosine,
    Preconditioning,
    native_schedule,
)
from bdense.diffusion.snr_weights import LOSSES, snr_weight
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.execution import Execution
from bdense.models.store import load_denoiser
from bdense.networks import SongUNet, SongUNetConfig
from bdense.randomness import Stream, generator
from bdense.training.loop import train
from bdense.training.teacher import (
    DenoisingUpdate,
    NoisyBatch,
    TeacherConfig,
    TeacherStage,
    new_denoiser,
    teacher_data,
    train_teacher,
)
from bdense.verbs.options import ModelOptions
from bdense.verbs.teacher import process, scaled_betas
from bdense.weights.weighting import FixedWeights
from tests.commands import TINY, bdense, refused
from tests.contracts.methods import ALL, ONE, KilledError, TrainingContract, Watched
from tests.small import same_weights

CPU = torch.device("cpu")
SHAPE = torch.Size((1, 8, 8))
NETWORK = {
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (),
    "dropout": 0.0,
}


COSINE = {"name": "cosine", "prediction_type": "v_prediction"}
# DDPM's process in 64 steps.
DDPM_64 = {
    "name": "ddpm",
    "num_train_timesteps": 64,
    "beta_start": 0.1 / 64,
    "beta_end": 20 / 64,
    "prediction_type": "epsilon",
}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def config(images: int = 80, **options) -> TeacherConfig:
    network = {**NETWORK, **options.pop("network", {})}
    return TeacherConfig(**{"images": images, "batch": 16, "network": network, **options})


def stage_of(training: TeacherConfig, dataset: Dataset) -> TeacherStage:
    start = new_denoiser(training, dataset.images.shape[1:])
    return TeacherStage(config=training, dataset=dataset, start=start)


def losses_of(
    denoiser: NetworkDenoiser,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    loss: str | None = None,
) -> torch.Tensor:
    """[B], of an update on these images; EDM's without ``loss``."""
    batch = NoisyBatch(clean=clean, noise=noise, sigma=sigma, condition=Unconditional())
    update = DenoisingUpdate(stream=(0,), batch=batch, loss=loss, sigma_data=0.5)
    return update(denoiser.branches).per_image[0]


class TestTeacher(TrainingContract):
    """A teacher is a stage of one branch, whose weights are averaged."""

    rate = 2e-3

    def learning(self, seed=5, dropout=True, lr=0.01, **changes):
        network = NETWORK | {"dropout": 0.3 if dropout else 0.0}
        averaged = {"warmup_images": 40, "ema_halflife_images": 30, "clip": 1.0}
        training = config(seed=seed, lr=lr, **averaged | {"network": network} | changes)
        return stage_of(training, load_dataset("digits"))

    def written_out(self):
        """EDM's loss, Adam with a warm-up, and the running average."""
        stage = self.learning(dropout=False)
        plain = copy.deepcopy(stage.start)
        average = copy.deepcopy(plain)
        optimizer = torch.optim.Adam(plain.parameters(), lr=0.01, fused=True)
        for iteration in range(5):
            optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, 16 * (iteration + 1) / 40)
            batch = stage.batch(iteration, ALL)
            sigma = batch.sigma
            denoised = plain(batch.clean + sigma.view(-1, 1, 1, 1) * batch.noise, sigma)
            error = (denoised - batch.clean).square().mean(dim=(1, 2, 3))
            loss = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * error).mean()
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in plain.parameters()]
            norm = torch.nn.utils.get_total_norm(gradients)
            for gradient in gradients:
                gradient.mul_(min(1.0, 1.0 / float(norm)))
            optimizer.step()
            with torch.no_grad():
                for mean, p in zip(average.parameters(), plain.parameters(), strict=True):
                    mean.lerp_(p, 1 - 0.5 ** (16 / 30))
        return stage, average


def silent_denoiser(precond: Preconditioning | None = None) -> NetworkDenoiser:
    """A network whose output is 0: D = c_skip x."""
    model = SongUNet(SongUNetConfig(img_resolution=8, img_channels=1, **NETWORK))
    head = model.get_submodule(model.head_name)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return NetworkDenoiser(model, precond)


# ---- the loss ----


def test_the_loss_by_hand():
    """sigma = sigma_data = 0.5: c_skip = 1/2, weight (1/2) / (1/16) = 8, y = 0.2, n = 1."""
    clean, noise = torch.full((2, 1, 8, 8), 0.2), torch.ones(2, 1, 8, 8)
    loss = losses_of(silent_denoiser(), clean, noise, torch.tensor([0.5, 0.5]))
    # D = (0.2 + 0.5) / 2 = 0.35, error 0.15.
    assert loss.tolist() == pytest.approx([8 * 0.15**2] * 2, rel=1e-5)


def test_the_loss_of_an_untrained_network_is_one_at_every_level():
    """In expectation, on data of standard deviation sigma_data."""
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(64, 1, 8, 8, generator=draw) for _ in range(2))
    for sigma in (0.02, 0.5, 20.0):
        loss = losses_of(silent_denoiser(), 0.5 * clean, noise, torch.full((64,), sigma))
        assert loss.mean().item() == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_weights_of_a_process_by_hand(kind):
    """SNR = 1 / sigma^2 = 4, 1 and 1/4."""
    expected = {
        "constant": [1, 1, 1],
        "snr": [4, 1, 0.25],
        "snr_trunc": [4, 1, 1],
        "v": [5, 2, 1.25],
    }
    for dtype in (torch.float32, torch.float64):
        weight = snr_weight(torch.tensor([[0.5, 1.0, 2.0]], dtype=dtype), kind)
        assert weight.tolist() == [expected[kind]]
        assert weight.dtype == dtype


def test_an_unknown_weight_is_named():
    with pytest.raises(InputError, match="one of constant, snr, snr_trunc, v, got 'mse'"):
        snr_weight(torch.ones(1), "mse")


@pytest.mark.parametrize(
    ("prediction", "loss"), [("epsilon", "snr"), ("sample", "constant"), ("v_prediction", "v")]
)
def test_the_loss_of_a_process_is_the_networks_own_error(prediction, loss):
    """|F - eps|^2, |F - x_0|^2, |F - v|^2 with v = alpha eps - s x_0, for F = 0."""
    denoiser = silent_denoiser(Cosine(prediction_type=prediction)).double()
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 1, 8, 8, generator=draw).double() for _ in range(2))
    sigma = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    alpha = (1 / (1 + sigma**2).sqrt()).view(-1, 1, 1, 1)
    s = sigma.view(-1, 1, 1, 1) * alpha
    target = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - s * clean}
    expected = target[prediction].square().mean(dim=(1, 2, 3))
    actual = losses_of(denoiser, clean, noise, sigma, loss)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


# ---- learning ----


def test_training_lowers_the_loss(digits):
    """Measured with the averaged weights on noise that training never saw."""
    losses = []
    learning = config(images=2560, batch=32, warmup_images=320, ema_halflife_images=320)
    teacher = train_teacher(
        digits, learning, device=CPU, on_iteration=lambda done, total, loss: losses.append(loss)
    )
    assert len(losses) == learning.iterations == 80
    assert sum(losses[-10:]) / 10 < 0.7 * sum(losses[:10]) / 10

    draw = torch.Generator().manual_seed(1)
    clean = to_float(digits.images)[:256]
    noise = torch.randn(clean.shape, generator=draw)
    sigma = (-1.2 + 1.2 * torch.randn(256, generator=draw)).exp()
    with torch.no_grad():
        before = losses_of(new_denoiser(learning, SHAPE), clean, noise, sigma).mean()
        after = losses_of(teacher, clean, noise, sigma).mean()
    assert after < 0.7 * before
    assert not teacher.training


def test_progress_counts_iterations(digits):
    seen = []
    train_teacher(
        digits,
        config(images=33),
        device=CPU,
        on_iteration=lambda done, total, loss: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_average_and_the_warm_up_by_hand(digits):
    """A halflife of one batch halves every share: ema_2 = w_0 / 4 + w_1 / 4 + w_2 / 2."""
    averaging = config(images=32, ema_halflife_images=16, warmup_images=64, lr=0.01)
    stage = Watched(stage_of(averaging, digits))
    steps: list[dict[str, torch.Tensor]] = []

    def note(done) -> None:
        steps.append(copy.deepcopy(stage.student.state_dict()))

    teacher = train(stage, FixedWeights(ONE), on_iteration=note)
    start = stage.start
    for name, w_0 in start.named_parameters():
        w_1, w_2 = (tensors[name] for tensors in steps)
        average = w_0.detach() / 4 + w_1 / 4 + w_2 / 2
        torch.testing.assert_close(teacher.get_parameter(name), average)
        # Adam's first step is lr times the gradient's sign; a quarter of the warm-up is over.
        assert (w_1 - w_0).abs().max() <= 0.01 / 4 * 1.001
    head = f"model.{start.model.head_name}.bias"
    moved = (steps[0][head] - start.get_parameter(head)).abs()
    assert moved.item() == pytest.approx(0.01 / 4, rel=1e-3)


def test_the_step_size_rises_with_the_images_seen():
    """64 images of warm-up, 16 an iteration; without a warm-up it is whole from the start."""
    rising = config(lr=0.4, warmup_images=64).optimisation
    lrs = [rising.lr_at(i, 5, 16) for i in range(5)]
    assert lrs == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert config(lr=0.4, warmup_images=0).optimisation.lr_at(0, 5, 16) == 0.4


@pytest.mark.parametrize("precond", [COSINE, DDPM_64], ids=["cosine-v", "ddpm-eps"])
def test_training_on_a_process_lowers_its_loss(digits, precond):
    """Measured with the averaged weights on noise that training never saw."""
    learning = config(
        images=1920, batch=32, warmup_images=320, ema_halflife_images=320, precond=precond
    )
    teacher = train_teacher(digits, learning, device=CPU)
    assert teacher.precond == learning.preconditioning
    clean = to_float(digits.images)[:256]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    sigma = native_schedule(teacher.precond).draw(torch.arange(256) / 256).float()
    with torch.no_grad():
        before, after = (
            losses_of(denoiser, clean, noise, sigma, learning.vp_loss).mean()
            for denoiser in (new_denoiser(learning, SHAPE), teacher)
        )
    assert after < 0.7 * before


def batches(training: TeacherConfig, dataset: Dataset) -> list[NoisyBatch]:
    """Those of every iteration."""
    stage = stage_of(training, dataset)
    return [stage.batch(i, ALL) for i in range(stage.num_updates)]


def test_the_levels_are_those_of_the_process(digits):
    """DDPM's are those of its 64 times; the angle of the cosine's is uniform."""
    drawn = {}
    for precond in (COSINE, DDPM_64):
        training = config(images=1024, batch=256, precond=precond)
        drawn[precond["name"]] = torch.cat([b.sigma for b in batches(training, digits)])
    assert all(sigma.dtype == torch.float32 for sigma in drawn.values())
    process = DDPMSchedule(num_train_timesteps=64, beta_start=0.1 / 64, beta_end=20 / 64)
    known = process.sigma(torch.arange(64)).float()
    assert bool(torch.isin(drawn["ddpm"], known).all())
    assert len(drawn["ddpm"].unique()) == 64
    angle = drawn["cosine"].atan() / (math.pi / 2)
    assert angle.histc(4, min=0, max=1).tolist() == pytest.approx([256] * 4, abs=60)


def test_images_and_noise_do_not_depend_on_the_levels_or_mirrors(digits):
    """Levels are drawn after them, mirrors last; a mirrored image keeps its noise."""
    plain, process, mirrored = (
        batches(config(images=64, batch=64, **options), digits)[0]
        for options in ({}, {"precond": COSINE}, {"precond": COSINE, "flip": True})
    )
    for other in (process, mirrored):
        assert torch.equal(plain.noise, other.noise)
    assert torch.equal(plain.clean, process.clean)
    assert torch.equal(process.sigma, mirrored.sigma)
    turned = (mirrored.clean == plain.clean.flip(-1)).flatten(1).all(dim=1)
    kept = (mirrored.clean == plain.clean).flatten(1).all(dim=1)
    assert bool((turned | kept).all())
    assert 16 < turned.sum() < 48


def test_the_first_batch_of_an_edm_teacher_by_hand(digits):
    """Teachers that are kept must come out again, bit for bit."""
    batch = batches(config(images=16), digits)[0]
    draw = generator(0, Stream.TEACHER_BATCH, 0)
    index = torch.randint(len(digits.images), (16,), generator=draw)
    assert torch.equal(batch.clean, to_float(digits.images[index]))
    assert torch.equal(batch.noise, torch.randn(16, 1, 8, 8, generator=draw))
    assert torch.equal(batch.sigma, (-1.2 + 1.2 * torch.randn(16, generator=draw)).exp())


def test_a_long_gradient_is_shortened_to_the_norm_asked_for(digits, monkeypatch):
    norms = []
    real = torch.optim.Adam.step

    def spy(self, *args):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return real(self, *args)

    monkeypatch.setattr("torch.optim.Adam.step", spy)
    train_teacher(digits, config(images=32), device=CPU)
    free, least = norms[:2], min(norms)
    norms.clear()
    # The first gradient is of the same weights, whatever is done with it.
    train_teacher(digits, config(images=32, clip=least / 2), device=CPU)
    assert norms == pytest.approx([least / 2] * 2, rel=1e-5)
    norms.clear()
    train_teacher(digits, config(images=32, clip=1e6), device=CPU)
    assert norms == free


# ---- the same again ----


def test_the_seed_decides_everything(digits):
    with_dropout = {"network": {"dropout": 0.2}}
    torch.manual_seed(1)
    first = train_teacher(digits, config(seed=5, **with_dropout), device=CPU)
    expected = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(2)
    assert same_weights(first, train_teacher(digits, config(seed=5, **with_dropout), device=CPU))
    other = train_teacher(digits, config(seed=6, **with_dropout), device=CPU)
    assert not same_weights(first, other)


@pytest.mark.parametrize(
    "options",
    [{"precond": COSINE, "loss": "snr_trunc", "flip": True}, {"precond": DDPM_64}],
    ids=["cosine", "ddpm"],
)
def test_a_teacher_of_a_process_resumes_bit_for_bit(digits, tmp_path, options):
    """Dropout included, whatever the new process' random state."""
    training = config(network={"dropout": 0.3}, **options)
    keep = {"device": CPU, "checkpoint": tmp_path / "teacher.safetensors"}
    whole = train_teacher(digits, training, device=CPU)

    def kill(done, total, loss):
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train_teacher(digits, training, **keep, checkpoint_seconds=0, on_iteration=kill)
    torch.manual_seed(99)
    seen = []
    resumed = train_teacher(
        digits, training, **keep, on_iteration=lambda done, total, loss: seen.append(done)
    )
    assert seen == [3, 4, 5]
    assert same_weights(resumed, whole)


def test_a_checkpoint_of_another_teacher_is_refused(digits, tmp_path):
    path = tmp_path / "teacher.safetensors"
    keep = {"device": CPU, "checkpoint": path, "checkpoint_seconds": 0}
    train_teacher(digits, config(images=16), **keep)
    few = Dataset("few", digits.images[:100], "another hash")
    for data, training in ((digits, config(images=16, lr=0.1)), (few, config(images=16))):
        with pytest.raises(CheckpointError, match=r"teacher\.safetensors belongs to another run"):
            train_teacher(data, training, **keep)


def test_what_is_off_leaves_no_trace_in_the_recipe():
    """Teachers and half-trained ones from before there was a choice keep their names."""
    assert set(config().as_dict()) == {
        *("images", "batch", "lr", "warmup_images", "ema_halflife_images", "p_mean", "p_std"),
        *("seed", "network"),
    }
    options = {"precond": COSINE, "loss": "snr", "flip": True, "clip": 1.0}
    training = config(**options)
    assert training.as_dict() == config().as_dict() | options
    assert TeacherConfig(**training.as_dict()) == training


def test_another_process_is_another_teacher(digits, tmp_path):
    path = tmp_path / "teacher.safetensors"
    keep = {"device": CPU, "checkpoint": path, "checkpoint_seconds": 0}
    train_teacher(digits, config(images=16), **keep)
    for options in ({"precond": COSINE}, {"flip": True}, {"clip": 1.0}):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            train_teacher(digits, config(images=16, **options), **keep)


# ---- classes ----


def conditional(images: int = 80, label_dim: int = 10, **options) -> TeacherConfig:
    return config(images, network={"label_dim": label_dim}, **options)


def shades() -> Dataset:
    """Class 0 is black, class 1 white: the class says all there is to say."""
    labels = torch.tensor([0, 1])
    images = (255 * labels).to(torch.uint8).view(2, 1, 1, 1).expand(2, *SHAPE).contiguous()
    return Dataset("shades", images, "a hash", labels)


def test_a_batch_goes_with_the_classes_of_its_images(digits):
    """Every image finds itself in the set again, and its class is the one that went with it."""
    known = to_float(digits.images)
    for batch in batches(conditional(images=48, label_dim=12), digits):
        classes = batch.condition.one_hot
        assert classes.shape == (16, 12)
        assert torch.equal(classes.sum(dim=1), torch.ones(16))
        for image, label in zip(batch.clean, classes, strict=True):
            (index,) = (known == image).flatten(1).all(dim=1).nonzero()
            assert digits.labels[index] == label.argmax()


def test_a_conditional_teacher_learns_what_a_class_looks_like():
    """At a level that drowns the image, only the class tells black from white."""
    fast = {"lr": 0.01, "warmup_images": 1, "ema_halflife_images": 64}
    learning = conditional(640, label_dim=2, p_mean=3.0, p_std=0.1, **fast)
    teacher = train_teacher(shades(), learning, device=CPU)
    noisy = 20 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        black, white = teacher(noisy, torch.tensor(20.0), torch.eye(2)).mean(dim=(1, 2, 3))
    assert black < -0.8
    assert white > 0.8


def test_the_first_batches_do_not_depend_on_the_condition(digits):
    """Labels take no draw of their own: images, noise and levels are the same."""
    (plain,), (told,) = (
        batches(training, digits) for training in (config(images=16), conditional(images=16))
    )
    for name in ("clean", "noise", "sigma"):
        assert torch.equal(getattr(plain, name), getattr(told, name))
    assert plain.condition.arguments() == {}
    assert told.condition.one_hot.shape == (16, 10)


def test_labels_that_are_missing_or_too_many_are_refused(digits):
    bare = Dataset("bare", digits.images, digits.sha256)
    with pytest.raises(InputError, match="'bare' has no labels"):
        train_teacher(bare, conditional(), device=CPU)
    with pytest.raises(InputError, match=r"'digits' has 10 classes .*label_dim=9"):
        train_teacher(digits, conditional(label_dim=9), device=CPU)


def test_labels_make_another_teacher_only_where_they_are_told(digits, tmp_path):
    shuffled = Dataset("shuffled", digits.images, digits.sha256, digits.labels.flip(0))
    digest = {"data": digits.sha256}
    assert teacher_data(config(), digits) == teacher_data(config(), shuffled) == digest
    assert teacher_data(conditional(), digits) == digest | {"labels": digits.labels_sha256}
    assert teacher_data(conditional(), digits) != teacher_data(conditional(), shuffled)

    keep = {"device": CPU, "checkpoint_seconds": 0}
    for training in (config(images=16), conditional(images=16)):
        path = tmp_path / f"{training.label_dim}.safetensors"
        train_teacher(digits, training, checkpoint=path, **keep)
    train_teacher(shuffled, config(images=16), checkpoint=tmp_path / "0.safetensors", **keep)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train_teacher(
            shuffled, conditional(images=16), checkpoint=tmp_path / "10.safetensors", **keep
        )


def test_cached_teachers_keep_their_names(digits, monkeypatch):
    """Of the digits study: hours of work elsewhere must not be lost to a field of a hash."""
    import search.worker.assets
    from search.spec.study import TeacherTraining

    network = {"model_channels": 24, "channel_mult": [1, 2], "num_blocks": 1}
    network |= {"attn_resolutions": [], "dropout": 0.0}

    def name(dataset: Dataset, **more: int) -> str:
        training = TeacherTraining(
            network=network | more, kimg=250, batch=256, lr=2e-3, ema_halflife_kimg=20, threads=2
        )
        return search.worker.assets._teacher_path(training, dataset).name

    monkeypatch.setattr(search.worker.assets, "NUMERICS", 1)
    bare = Dataset("digits", digits.images, digits.sha256)
    assert name(digits) == name(bare) == "digits-e9b1ea5afac09230.safetensors"
    assert name(digits, label_dim=10) != name(bare, label_dim=10)


# ---- the verb ----


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        (("--precond", "cosine"), {"precond": {"name": "cosine"}}),
        (
            ("--precond", "cosine", "--prediction", "sample", "--loss", "v"),
            {"precond": {"name": "cosine", "prediction_type": "sample"}, "loss": "v"},
        ),
        (
            ("--precond", "ddpm", "--prediction", "epsilon", "--timesteps", 64),
            {"precond": DDPM_64},
        ),
        (("--flip", "--clip", 1), {"flip": True, "clip": 1.0}),
        ((), {}),
    ],
)
def test_a_teacher_of_a_process_is_written_with_its_recipe(tmp_path, options, recipe):
    path = tmp_path / "teacher.safetensors"
    answer = bdense("teacher", "--data", "digits", *TINY, *options, "--out", path)
    assert answer.status == 0, answer.err
    loaded, metadata = load_denoiser(path)
    later = ("precond", "loss", "flip", "clip")
    assert {k: v for k, v in metadata["training"].items() if k in later} == recipe
    assert loaded.precond == config(precond=recipe.get("precond")).preconditioning


def test_the_usual_times_of_ddpm_are_the_published_ones():
    asked = ModelOptions(precond="ddpm")
    assert config(precond=process(asked)).preconditioning == DDPM()


@pytest.mark.parametrize("timesteps", [21, 64, 1000, 4096])
def test_ddpm_ends_in_noise_in_any_number_of_times(timesteps):
    schedule = DDPMSchedule(**scaled_betas(timesteps))
    assert schedule.sigma_max > 150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "v"), "--loss v is for a process, .* choose precond cosine or ddpm"),
        (("--prediction", "sample"), "--prediction sample does nothing with --precond edm"),
        (
            ("--precond", "cosine", "--timesteps", 64),
            "--timesteps 64 does nothing with --precond cosine; drop it, or add --precond ddpm",
        ),
        (
            ("--precond", "ddpm", "--timesteps", 20),
            "--timesteps must be a whole number of at least 21, or none, got 20",
        ),
        (("--clip", 0), "--clip must be a number above 0, or none, got 0"),
    ],
)
def test_options_of_another_process_are_refused(tmp_path, options, message):
    answer = bdense("teacher", *TINY, *options, "--out", tmp_path / "teacher.safetensors")
    assert re.search(message, refused(answer))
    assert list(tmp_path.iterdir()) == []


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.nan}, "lr must be .* got nan"),
        ({"lr": 0.0}, "lr must be .* got 0.0"),
        ({"lr": math.inf}, "lr must be .* got inf"),
        ({"images": 0}, "images must be"),
        ({"batch": 0}, "batch must be"),
        ({"ema_halflife_images": 0}, "ema_halflife_images must be"),
        ({"clip": 0.0}, "clip must be .* got 0.0"),
        ({"clip": math.nan}, "clip must be .* got nan"),
        ({"loss": "snr"}, "loss snr is for a process, .* choose precond cosine or ddpm"),
        ({"loss": "mse", "precond": COSINE}, "loss must be one of constant, .* got 'mse'"),
        ({"precond": {}}, "precond needs the name cosine or ddpm, got None; leave precond out"),
        ({"precond": {"name": "edm"}}, "got 'edm'; leave precond out for EDM's"),
        ({"precond": {"name": "vp"}}, "precond needs the name cosine or ddpm, got 'vp'"),
        ({"precond": COSINE | {"beta_end": 0.1}}, "do not fit precond='cosine': .*'beta_end'"),
        ({"precond": COSINE | {"prediction_type": "eps"}}, "prediction_type must be one of"),
        ({"precond": {"name": "ddpm", "num_train_timesteps": 1}}, "must be at least 2, got 1"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        config(**options)


def test_the_loss_follows_from_what_the_network_predicts():
    """The reference's for images, the network's own error otherwise; EDM's is none of these."""
    default = {
        prediction: config(precond=COSINE | {"prediction_type": prediction}).vp_loss
        for prediction in PREDICTIONS
    }
    assert default == {"epsilon": "snr", "sample": "snr_trunc", "v_prediction": "v"}
    assert config(precond={"name": "ddpm"}).vp_loss == "snr"
    assert config(precond={"name": "cosine"}).vp_loss == "v"
    assert config(precond=COSINE, loss="constant").vp_loss == "constant"
    assert config().vp_loss is None
    assert config().preconditioning == EDM()


def test_a_network_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"do not fit a SongUNet: .*'depth'"):
        new_denoiser(config(network={"depth": 3}), SHAPE)
    with pytest.raises(InputError, match="cannot be halved 4 times"):
        new_denoiser(config(network={"channel_mult": (1, 1, 1, 1, 1)}), SHAPE)
    with pytest.raises(InputError, match=r"square images, got 20 x 28; @32 after the data set's"):
        new_denoiser(config(), torch.Size((1, 20, 28)))
    with pytest.raises(InputError, match="seed must be"):
        config(seed=-1)


def test_a_side_that_cannot_be_halved_says_how_to_pad():
    deep, fashion = {"channel_mult": (1, 1, 1, 1)}, torch.Size((1, 28, 28))
    message = (
        r"=28 cannot be halved 3 times; .*; @32 after the data set's name pads its images to 32"
    )
    with pytest.raises(InputError, match=message):
        new_denoiser(config(network=deep), fashion)
    assert new_denoiser(config(), fashion).image_shape == (1, 28, 28)
    assert new_denoiser(config(network=deep), torch.Size((1, 32, 32))).image_shape == (1, 32, 32)


def test_other_mistakes_are_not_blamed_on_the_side():
    with pytest.raises(InputError, match=r"dropout must lie in 0\.\.1, got 2\.0") as caught:
        new_denoiser(config(network={"dropout": 2.0}), torch.Size((1, 28, 28)))
    assert "@" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be halved 4 times") as caught:
        new_denoiser(config(network={"channel_mult": (1, 1, 1, 1, 1)}), SHAPE)
    assert "@" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run_by_name(digits):
    seen = []
    with pytest.raises(NonFiniteLossError, match="the loss is not finite at iter") as at:
        train_teacher(
            digits,
            config(lr=1e30, warmup_images=0),
            device=CPU,
            on_iteration=lambda done, total, loss: seen.append(loss),
        )
    assert at.value.iteration == len(seen) == 1
    assert math.isfinite(seen[0])


def test_float16_is_no_format_to_train_in():
    with pytest.raises(InputError, match=r"not trained in float16.*; use bfloat16"):
        train_teacher(
            load_dataset("digits"),
            TeacherConfig(images=1),
            device=CPU,
            execution=Execution(precision="float16"),
        )
