"""Training a teacher: it learns, its average and first step by hand, and it may be stopped."""

import copy
import itertools
import math
import re
from typing import get_args

import pytest
import torch

from bdense.data.datasets import Dataset, load_dataset, to_float
from bdense.diffusion import LevelWeight
from bdense.diffusion.conditions import Unconditional
from bdense.diffusion.ddpm import DDPMSchedule
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import (
    DDPM,
    EDM,
    PREDICTIONS,
    Preconditioning,
    native_schedule,
)
from bdense.diffusion.vp import snr_weight
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.models.store import load_denoiser
from bdense.networks.song_unet import SongUNet, SongUNetConfig
from bdense.randomness import Stream, generator
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
from tests.contracts.methods import ALL, ONE, TrainingContract

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
    return TeacherConfig(**{"kimg": images / 1000, "batch": 16, "network": network, **options})


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
    process = config() if loss is None else config(precond={"name": "cosine"}, loss=loss)
    update = DenoisingUpdate(stream=(0,), batch=batch, weight=process.loss_weight)
    return update(denoiser.branches).per_image[0]


class TestTeacher(TrainingContract):
    """A teacher is a stage of one branch, whose weights are averaged."""

    rate = 2e-3

    def learning(self, seed=5, dropout=True, lr=0.01, **changes):
        network = NETWORK | {"dropout": 0.3 if dropout else 0.0}
        averaged = {"warmup_kimg": 0.04, "ema_halflife_kimg": 0.03, "clip": 1.0}
        training = config(seed=seed, lr=lr, **averaged | {"network": network} | changes)
        return stage_of(training, load_dataset("digits"))

    @pytest.mark.slow  # another process starts; by default SFD's shows it
    def test_two_devices_equal_one_to_rounding(self):
        super().test_two_devices_equal_one_to_rounding()

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


def test_the_loss_of_an_untrained_network_is_one_at_every_level():
    """In expectation, on data of standard deviation sigma_data."""
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(64, 1, 8, 8, generator=draw) for _ in range(2))
    for sigma in (0.02, 0.5, 20.0):
        loss = losses_of(silent_denoiser(), 0.5 * clean, noise, torch.full((64,), sigma))
        assert loss.mean().item() == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("kind", get_args(LevelWeight))
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


# ---- learning ----


@pytest.mark.parametrize("precond", [None, COSINE, DDPM_64], ids=["edm", "cosine-v", "ddpm-eps"])
def test_training_lowers_the_loss(digits, precond):
    """Measured with the averaged weights on noise that training never saw."""
    losses = []
    learning = config(
        images=2560, batch=32, warmup_kimg=0.32, ema_halflife_kimg=0.32, precond=precond
    )
    teacher = train_teacher(
        digits, learning, device=CPU, on_iteration=lambda done, total, loss: losses.append(loss)
    )
    assert len(losses) == learning.iterations == 80
    assert teacher.precond == learning.preconditioning
    assert not teacher.training
    draw = torch.Generator().manual_seed(1)
    clean = to_float(digits.images)[:256]
    noise = torch.randn(clean.shape, generator=draw)
    if precond is None:
        sigma = (-1.2 + 1.2 * torch.randn(256, generator=draw)).exp()
    else:
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


def test_images_and_noise_do_not_depend_on_levels_mirrors_or_classes(digits):
    """Levels are drawn after them, mirrors last, classes not at all."""
    plain, process, mirrored, told = (
        batches(config(images=64, batch=64, **options), digits)[0]
        for options in (
            {},
            {"precond": COSINE},
            {"precond": COSINE, "flip": True},
            {"network": {"label_dim": 10}},
        )
    )
    for other in (process, mirrored, told):
        assert torch.equal(plain.noise, other.noise)
    for other in (process, told):
        assert torch.equal(plain.clean, other.clean)
    assert torch.equal(plain.sigma, told.sigma)
    assert plain.condition.arguments() == {}
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


# ---- the same again ----


def test_what_is_off_leaves_no_trace_in_the_recipe():
    """Teachers and half-trained ones from before there was a choice keep their names."""
    assert set(config().as_dict()) == {
        *("images", "batch", "lr", "warmup_images", "ema_halflife_images", "p_mean", "p_std"),
        *("seed", "network"),
    }
    options = {"precond": COSINE, "loss": "snr", "flip": True, "clip": 1.0}
    training = config(**options)
    assert training.as_dict() == config().as_dict() | options


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
        classes = batch.condition.values
        assert classes.shape == (16, 12)
        assert torch.equal(classes.sum(dim=1), torch.ones(16))
        for image, label in zip(batch.clean, classes, strict=True):
            (index,) = (known == image).flatten(1).all(dim=1).nonzero()
            assert digits.labels[index] == label.argmax()


def test_a_conditional_teacher_learns_what_a_class_looks_like():
    """At a level that drowns the image, only the class tells black from white."""
    fast = {"lr": 0.01, "warmup_kimg": 0.001, "ema_halflife_kimg": 0.064}
    learning = conditional(640, label_dim=2, p_mean=3.0, p_std=0.1, **fast)
    teacher = train_teacher(shades(), learning, device=CPU)
    noisy = 20 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        black, white = teacher(noisy, torch.tensor(20.0), torch.eye(2)).mean(dim=(1, 2, 3))
    assert black < -0.8
    assert white > 0.8


def test_cached_teachers_keep_their_names(digits, monkeypatch):
    """Of the digits study: hours of work elsewhere must not be lost to a field of a hash."""
    import search.worker.teachers
    from search.spec.sections import TeacherTraining

    network = {"model_channels": 24, "channel_mult": [1, 2], "num_blocks": 1}
    network |= {"attn_resolutions": [], "dropout": 0.0}

    def name(dataset: Dataset, **more: int) -> str:
        training = TeacherTraining(
            network=network | more, kimg=250, batch=256, lr=2e-3, ema_halflife_kimg=20, threads=2
        )
        return search.worker.teachers._teacher_path(training, dataset).name

    monkeypatch.setattr(search.worker.teachers, "NUMERICS", 1)
    bare = Dataset("digits", digits.images, digits.sha256)
    assert name(digits) == name(bare) == "digits-e9b1ea5afac09230.safetensors"
    assert name(digits, label_dim=10) != name(bare, label_dim=10)


def test_a_study_that_fails_to_train_its_teacher_leaves_the_threads_as_they_were(
    digits, tmp_path, monkeypatch
):
    from search.worker.teachers import load_teacher
    from tests.rows import SFD, InterruptedRunError
    from tests.studies import spec

    monkeypatch.setenv("BDENSE_CACHE", str(tmp_path))
    before, during = torch.get_num_threads(), []

    def report(*_: object) -> None:
        during.append(torch.get_num_threads())
        raise InterruptedRunError

    own = spec(SFD, teacher__train__threads=before + 1)
    with pytest.raises(InterruptedRunError):
        load_teacher(own, digits, CPU, report)
    assert (during, torch.get_num_threads()) == ([before + 1], before)


# ---- the verb ----


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
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
            "--timesteps must be a whole number from 21 to 100000, or none \\(1000\\), got 20",
        ),
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
        ({"loss": "snr"}, "loss snr is for a process, .* choose precond cosine or ddpm"),
        ({"precond": {}}, "precond needs the name cosine or ddpm, got None; leave precond out"),
        ({"precond": {"name": "edm"}}, "got 'edm'; leave precond out for EDM's"),
        ({"precond": {"name": "vp"}}, "precond needs the name cosine or ddpm, got 'vp'"),
        ({"precond": COSINE | {"beta_end": 0.1}}, "do not fit precond='cosine': .*'beta_end'"),
        ({"precond": COSINE | {"prediction_type": "eps"}}, "prediction_type must be one of"),
        ({"precond": {"name": "ddpm", "num_train_timesteps": 1}}, "must be 2 to 1000000, got 1"),
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


def test_what_makes_another_teacher(digits):
    """Also data, and classes where they are told: runs of equal descriptions are one run."""
    few = Dataset("few", digits.images[:100], "another hash")
    shuffled = Dataset("shuffled", digits.images, digits.sha256, digits.labels.flip(0))
    told = {"network": {"label_dim": 10}}
    weights = FixedWeights(ONE)
    known = [
        stage_of(config(**options), data).describe(weights)
        for data, options in (
            (digits, {}),
            (few, {}),
            (digits, {"lr": 0.1}),
            (digits, {"precond": COSINE}),
            (digits, {"flip": True}),
            (digits, {"clip": 1.0}),
            (digits, told),
            (shuffled, told),
        )
    ]
    assert all(one != other for one, other in itertools.combinations(known, 2))
    assert stage_of(config(), shuffled).describe(weights) == known[0]
    assert teacher_data(config(), digits) == {"data": digits.sha256}
    labels = {"labels": digits.labels_sha256}
    assert teacher_data(conditional(), digits) == {"data": digits.sha256} | labels


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        ({"depth": 3}, (1, 8, 8), "network.depth is unknown"),
        ({"channel_mult": (1,) * 5}, (1, 8, 8), "cannot be halved 4 times[^@]*$"),
        ({"num_blocks": 10**9}, (1, 8, 8), "more than 10000 modules; take fewer blocks"),
        ({"model_channels": 10**9}, (1, 8, 8), "cannot be built"),
        (
            {"dropout": 2.0},
            (1, 28, 28),
            r"network\.dropout must be a number from 0 to 1, got 2\.0$",
        ),
        ({}, (1, 20, 28), "square images, got 20 x 28; @32 after the data set's"),
        ({"channel_mult": (1,) * 4}, (1, 28, 28), "=28 cannot be halved 3 times; .*@32"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(network, shape, message):
    """Where padding helps, it says so."""
    with pytest.raises(InputError, match=message):
        new_denoiser(config(network=network), torch.Size(shape))


def test_labels_or_formats_that_do_not_fit_are_refused(digits):
    bare = Dataset("bare", digits.images, digits.sha256)
    half = Execution(precision="float16")
    for data, training, execution, message in (
        (bare, conditional(), None, "'bare' has no labels"),
        (digits, conditional(label_dim=9), None, r"'digits' has 10 classes .*label_dim=9"),
        (digits, config(), half, "not trained in float16.*; use bfloat16"),
    ):
        with pytest.raises(InputError, match=message):
            train_teacher(data, training, device=CPU, execution=execution)
