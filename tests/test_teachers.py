"""Training a teacher: it learns, its average and first step by hand, and it may be stopped."""

import math

import pytest
import torch

from bdense.checkpoints import load_tensors
from bdense.data import Dataset, load_dataset
from bdense.denoiser import NetworkDenoiser
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.networks import SongUNet, SongUNetConfig
from bdense.teachers import TeacherConfig, denoising_loss, new_denoiser, train_teacher
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


class StopHereError(Exception):
    """Stands for a kill at that point."""


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def config(images: int = 80, **options) -> TeacherConfig:
    network = {**NETWORK, **options.pop("network", {})}
    return TeacherConfig(**{"images": images, "batch": 16, "network": network, **options})


def silent_denoiser() -> NetworkDenoiser:
    """A network whose output is 0: D = c_skip x."""
    model = SongUNet(SongUNetConfig(img_resolution=8, img_channels=1, **NETWORK))
    head = model.get_submodule(model.head_name)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return NetworkDenoiser(model)


# ---- the loss ----


def test_the_loss_by_hand():
    """sigma = sigma_data = 0.5: c_skip = 1/2, weight (1/2) / (1/16) = 8, y = 0.2, n = 1."""
    clean, noise = torch.full((2, 1, 8, 8), 0.2), torch.ones(2, 1, 8, 8)
    loss = denoising_loss(silent_denoiser(), clean, noise, torch.tensor([0.5, 0.5]))
    # D = (0.2 + 0.5) / 2 = 0.35, error 0.15.
    assert loss.tolist() == pytest.approx([8 * 0.15**2] * 2, rel=1e-5)


def test_the_loss_of_an_untrained_network_is_one_at_every_level():
    """In expectation, on data of standard deviation sigma_data."""
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(64, 1, 8, 8, generator=draw) for _ in range(2))
    for sigma in (0.02, 0.5, 20.0):
        loss = denoising_loss(silent_denoiser(), 0.5 * clean, noise, torch.full((64,), sigma))
        assert loss.mean().item() == pytest.approx(1.0, abs=0.08)


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
    clean = digits.float_images()[:256]
    noise = torch.randn(clean.shape, generator=draw)
    sigma = (-1.2 + 1.2 * torch.randn(256, generator=draw)).exp()
    with torch.no_grad():
        before = denoising_loss(new_denoiser(learning, SHAPE), clean, noise, sigma).mean()
        after = denoising_loss(teacher, clean, noise, sigma).mean()
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


def test_the_average_and_the_warm_up_by_hand(digits, tmp_path):
    """A halflife of one batch halves every share: ema_2 = w_0 / 4 + w_1 / 4 + w_2 / 2."""
    path, saved = tmp_path / "teacher.safetensors", []
    averaging = config(images=32, ema_halflife_images=16, warmup_images=64, lr=0.01)
    teacher = train_teacher(
        digits,
        averaging,
        device=CPU,
        checkpoint=path,
        checkpoint_seconds=0,
        on_iteration=lambda done, total, loss: saved.append(load_tensors(path)[0]),
    )
    start = new_denoiser(averaging, SHAPE)
    for name, w_0 in start.named_parameters():
        w_1, w_2 = (tensors[name] for tensors in saved)
        average = w_0.detach() / 4 + w_1 / 4 + w_2 / 2
        torch.testing.assert_close(teacher.get_parameter(name), average)
        # Adam's first step is lr times the gradient's sign; a quarter of the warm-up is over.
        assert (w_1 - w_0).abs().max() <= 0.01 / 4 * 1.001
    head = f"model.{start.model.head_name}.bias"
    moved = (saved[0][head] - start.get_parameter(head)).abs()
    assert moved.item() == pytest.approx(0.01 / 4, rel=1e-3)


def test_the_step_size_rises_with_the_images_seen():
    """64 images of warm-up, 16 an iteration; without a warm-up it is whole from the start."""
    rising = config(lr=0.4, warmup_images=64)
    assert [rising.lr_at(i) for i in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert config(lr=0.4, warmup_images=0).lr_at(0) == 0.4


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


@pytest.mark.parametrize("stop_after", [1, 3])
def test_stopped_and_resumed_is_never_stopped(digits, tmp_path, stop_after):
    """Bit for bit, dropout included, whatever the new process' random state."""
    training = config(network={"dropout": 0.3})
    whole = train_teacher(digits, training, device=CPU)

    def stop(done, total, loss):
        if done == stop_after:
            raise StopHereError

    path = tmp_path / "teacher.safetensors"
    with pytest.raises(StopHereError):
        train_teacher(
            digits, training, device=CPU, checkpoint=path, checkpoint_seconds=0, on_iteration=stop
        )
    torch.manual_seed(99)
    seen = []
    resumed = train_teacher(
        digits,
        training,
        device=CPU,
        checkpoint=path,
        on_iteration=lambda done, total, loss: seen.append(done),
    )
    assert seen == list(range(stop_after + 1, 6))
    assert same_weights(resumed, whole)


def test_a_checkpoint_of_another_teacher_is_refused(digits, tmp_path):
    path = tmp_path / "teacher.safetensors"
    keep = {"device": CPU, "checkpoint": path, "checkpoint_seconds": 0}
    train_teacher(digits, config(images=16), **keep)
    few = Dataset("few", digits.images[:100], "another hash")
    for data, training in ((digits, config(images=16, lr=0.1)), (few, config(images=16))):
        with pytest.raises(CheckpointError, match=r"teacher\.safetensors belongs to another"):
            train_teacher(data, training, **keep)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.nan}, "teacher lr must be positive and finite, got nan"),
        ({"lr": 0.0}, "got 0.0"),
        ({"lr": math.inf}, "got inf"),
        ({"images": 0}, "teacher images must be at least 1, got 0"),
        ({"batch": 0}, "teacher batch must be at least 1, got 0"),
        ({"ema_halflife_images": 0}, "teacher ema_halflife_images must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        config(**options)


def test_a_network_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"do not fit a SongUNet: .*'depth'"):
        new_denoiser(config(network={"depth": 3}), SHAPE)
    with pytest.raises(InputError, match="cannot be halved 4 times"):
        new_denoiser(config(network={"channel_mult": (1, 1, 1, 1, 1)}), SHAPE)
    with pytest.raises(InputError, match="square images, got 8 x 6; pad or crop"):
        new_denoiser(config(), torch.Size((1, 8, 6)))
    with pytest.raises(InputError, match="seed must not be negative, got -1"):
        new_denoiser(config(seed=-1), SHAPE)


def test_a_loss_that_is_not_finite_stops_the_run_by_name(digits):
    seen = []
    with pytest.raises(NonFiniteLossError, match="the teacher's loss is not finite at iter") as at:
        train_teacher(
            digits,
            config(lr=1e30, warmup_images=0),
            device=CPU,
            on_iteration=lambda done, total, loss: seen.append(loss),
        )
    assert at.value.iteration == len(seen) == 1
    assert math.isfinite(seen[0])


def test_a_gradient_that_is_not_finite_makes_no_update(digits, tmp_path, monkeypatch):
    """The square root's slope at 0 is infinite, its value is not."""

    def rootish_loss(denoiser, clean, noise, sigma):
        return (denoiser(clean, sigma) - denoiser(clean, sigma).detach()).square().sum().sqrt()

    monkeypatch.setattr("bdense.teachers.denoising_loss", rootish_loss)
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(NonFiniteLossError, match="the teacher's gradient is not finite") as at:
        train_teacher(digits, config(), device=CPU, checkpoint=path, checkpoint_seconds=0)
    assert at.value.iteration == 0
    assert not path.exists()
