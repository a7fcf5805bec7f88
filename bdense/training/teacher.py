"""Train a small teacher by denoising score matching, and average its weights.

As EDM's (Karras et al. 2022, section 5), or on a variance-preserving process, as progressive
distillation needs it (Salimans & Ho 2022).

B batch, C channels, H x W pixels.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bdense.data.datasets import Dataset, to_float
from bdense.diffusion import LevelWeight
from bdense.diffusion.conditions import Condition
from bdense.diffusion.denoiser import NetworkDenoiser, without_memory
from bdense.diffusion.preconditioning import (
    EDM,
    Preconditioning,
    make_preconditioning,
    native_schedule,
)
from bdense.diffusion.vp import snr_weight
from bdense.errors import CheckpointError, InputError
from bdense.execution import Execution, moved
from bdense.knobs import KnobError, Knobs, knob, knob_of
from bdense.networks.song_unet import SongUNet, SongUNetConfig
from bdense.randomness import Stream, derive_seed, generator
from bdense.training.loop import IterationReport, train
from bdense.training.optimisation import OptimisationConfig
from bdense.training.stage import Branches, ImageLosses, Stateless
from bdense.training.teacher_knobs import TeacherKnobs
from bdense.weights.weighting import BranchWeighting, FixedWeights

# Of a network by what it predicts: as the reference for images, else the network's own error.
DEFAULT_LOSS: dict[str, LevelWeight] = {
    "sample": "snr_trunc",
    "epsilon": "snr",
    "v_prediction": "v",
}
# Fields that are left out of the digest where they are off.
_OPTIONAL = ("precond", "loss", "flip", "clip")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig(TeacherKnobs):
    """The knobs of a teacher, with those of EDM's noise levels."""

    kimg: float = knob_of(TeacherKnobs, "kimg", 250.0)
    p_mean: float = knob(-1.2, "mean of ln sigma, the log noise level, with EDM's preconditioning")
    p_std: float = knob(1.2, "standard deviation of ln sigma", low=0)

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.loss is not None and self.precond is None:
            raise KnobError(
                "loss",
                f"{self.loss} is for a process, and EDM's preconditioning has its own; leave it "
                "out, or choose precond cosine or ddpm",
            )
        _ = self.preconditioning  # which refuses bad options

    @property
    def preconditioning(self) -> Preconditioning:
        """What turns the network into a denoiser.

        Raises:
            InputError: No teacher is trained with ``precond``.
        """
        if self.precond is None:
            return EDM()
        options = dict(self.precond)
        name = options.pop("name", None)
        if name not in ("cosine", "ddpm"):
            raise KnobError(
                "precond",
                f"needs the name cosine or ddpm, got {name!r}; leave precond out for EDM's",
            )
        return make_preconditioning(name, options)

    @property
    def vp_loss(self) -> LevelWeight | None:
        """``loss`` or its default; None with EDM's preconditioning, which has its own."""
        prediction = self.preconditioning.options().get("prediction_type")
        return self.loss or (DEFAULT_LOSS[prediction] if prediction is not None else None)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma) of the loss, of the shape of ``sigma``."""
        if (loss := self.vp_loss) is not None:
            return snr_weight(sigma, loss)
        return edm_weight(sigma, EDM().sigma_data)

    @property
    def iterations(self) -> int:
        """ceil(images / batch)."""
        return -(-_images(self.kimg) // self.batch)

    @property
    def label_dim(self) -> int:
        """Number of classes; 0 is unconditional."""
        return int(self.network.get("label_dim", 0))

    @property
    def optimisation(self) -> OptimisationConfig:
        """Adam, a warm-up, clipping, and the average of the weights."""
        return OptimisationConfig(
            lr=self.lr,
            warmup_images=_images(self.warmup_kimg),
            clip_norm=self.clip,
            ema=float(_images(self.ema_halflife_kimg)),
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields, as files hold them: numbers of images, not of thousands.

        Optional ones are left out where they are off: the digest of the rest names the teachers
        that are kept.
        """
        options = asdict(self)
        for name in _OPTIONAL:
            if not options[name]:
                del options[name]
        options["images"] = _images(options.pop("kimg"))
        for name in ("warmup", "ema_halflife"):
            options[f"{name}_images"] = _images(options.pop(f"{name}_kimg"))
        return options


def _images(kimg: float) -> int:
    return round(kimg * 1000)


@dataclass(frozen=True, eq=False, kw_only=True)
class TeacherStage(Stateless):
    """Denoising score matching.

    Attributes:
        dataset: uint8 images; with labels, if the network has a ``label_dim``.
        start: Initial weights, on the device to train on.
    """

    kind: ClassVar[str] = "teacher"
    num_branches: ClassVar[int] = 1
    dropout: ClassVar[bool] = True

    config: TeacherConfig
    dataset: Dataset
    start: NetworkDenoiser

    def __post_init__(self) -> None:
        self.start.conditions.require(self.dataset)

    @property
    def num_updates(self) -> int:
        return self.config.iterations

    @property
    def batch_size(self) -> int:
        return self.config.batch

    @property
    def seed(self) -> int:
        return self.config.seed

    @functools.cached_property
    def optimisation(self) -> OptimisationConfig:
        return self.config.optimisation

    @functools.cached_property
    def _data(self) -> Dataset:
        return self.dataset.on(next(self.start.parameters()).device)

    def batch(self, iteration: int, images: slice) -> "NoisyBatch":
        """Images, drawn with replacement, noise and noise levels."""
        config, like = self.config, next(self.start.parameters())
        draw = generator(config.seed, Stream.TEACHER_BATCH, iteration)
        index = torch.randint(len(self.dataset.images), (config.batch,), generator=draw)
        pixels = self._data.pixels(index)
        noise = torch.randn(pixels.shape, generator=draw)
        sigma = draw_levels(config, draw, like)
        if config.flip:
            mirrored = (torch.rand(config.batch, generator=draw) < 0.5).view(-1, 1, 1, 1)
            pixels = torch.where(moved(mirrored, pixels) > 0, pixels.flip(-1), pixels)
        return NoisyBatch(
            # Bytes until here: a whole set in float32 is four times as large.
            clean=moved(to_float(pixels[images]), like),
            noise=moved(noise[images], like),
            sigma=sigma[images],
            condition=self.start.conditions.of(self.dataset, index[images]).to(like),
        )

    def updates(self, iteration: int, batch: "NoisyBatch") -> Iterator["DenoisingUpdate"]:
        yield DenoisingUpdate(stream=(iteration,), batch=batch, weight=self.config.loss_weight)

    def describe(self, weighting: BranchWeighting) -> dict[str, Any]:
        # Checkpoints without it were made in float32.
        precision = self.start.execution.precision
        chosen = {} if precision == "float32" else {"precision": precision}
        return {
            "config": self.config.as_dict(),
            **teacher_data(self.config, self.dataset),
            **chosen,
        }

    def on(self, device: torch.device) -> Self:
        return replace(self, start=self.start.on(device))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NoisyBatch:
    """What one update of a teacher learns from.

    Attributes:
        clean: [B, C, H, W] y in [-1, 1].
        noise: [B, C, H, W], unit.
        sigma: [B] noise levels.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    condition: Condition


@dataclass(frozen=True, eq=False, kw_only=True)
class DenoisingUpdate:
    """One update: lambda(sigma) |D(y + n; sigma) - y|^2.

    Attributes:
        weight: lambda.
    """

    where: ClassVar[Mapping[str, int]] = {}

    stream: tuple[int, ...]
    batch: NoisyBatch
    weight: Callable[[Tensor], Tensor]

    def __call__(self, branches: Branches) -> ImageLosses:
        """[1, B] losses."""
        batch, sigma = self.batch, self.batch.sigma
        given = batch.condition.arguments()
        errors = squared_error(branches, batch.clean, batch.noise, sigma, **given)
        return ImageLosses((self.weight(sigma) * errors)[None])


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) of EDM's loss (Karras et al. 2022, table 1), of the shape of ``sigma``.

    The loss of an untrained network is 1 in expectation.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def squared_error(
    branches: Branches,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    **given: Any,  # noqa: ANN401  of branches
) -> Tensor:
    """|D(y + n; sigma) - y|^2 of branch K, mean over pixels.

    Args:
        clean: [B, C, H, W] y in [-1, 1].
        noise: [B, C, H, W], unit.
        sigma: [B].

    Returns:
        [B].
    """
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    denoised = branches(noisy, sigma, **given)[:, -1]
    return (denoised - clean).square().mean(dim=(1, 2, 3))


def train_teacher(
    dataset: Dataset,
    config: TeacherConfig,
    *,
    device: torch.device,
    execution: Execution | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    on_iteration: Callable[[int, int, float], None] | None = None,
) -> NetworkDenoiser:
    """Train a teacher and return the average of its weights.

    Args:
        dataset: uint8 images; with labels, if ``config.network`` has a ``label_dim``.
        config: Network, length, step size, seed.
        device: Where to train.
        execution: How the network is computed, not in float16; weights and their average stay
            float32.
        checkpoint: File to resume from and to save to.
        checkpoint_seconds: Save this long after the last save.
        on_iteration: Called with (iterations done, iterations in all, loss).

    Returns:
        The averaged denoiser, in eval mode.

    Raises:
        InputError: The network cannot take the images, or their labels.
        NonFiniteLossError: A loss or gradient is not finite; no update was made from it.
    """
    execution = execution or Execution()
    execution.require_training("a teacher")
    teacher = new_denoiser(config, dataset.images.shape[1:]).to(device)
    start = copy.deepcopy(teacher).execute(execution)

    def report(done: IterationReport) -> None:
        if on_iteration is not None:
            on_iteration(done.iteration + 1, done.iterations, done.loss)

    trained = train(
        TeacherStage(config=config, dataset=dataset, start=start),
        FixedWeights(torch.ones(1)),
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        on_iteration=report,
    )
    teacher.load_state_dict(trained.state_dict())
    return teacher.eval().requires_grad_(False)


def new_denoiser(config: TeacherConfig, image_shape: torch.Size) -> NetworkDenoiser:
    """A denoiser for images (C, H, W) with initial weights from ``config.seed``.

    Raises:
        InputError: The network's options do not fit together, or not these images.
    """
    channels, height, width = image_shape
    # The next power of two is a side that any number of levels can halve.
    padded = 1 << (max(height, width) - 1).bit_length()
    remedy = f"@{padded} after the data set's name pads its images to {padded} x {padded}"
    if height != width:
        raise InputError(f"teachers take square images, got {height} x {width}; {remedy}")
    try:
        network = _network_config(config, channels, height)
    except InputError as error:
        try:
            _network_config(config, channels, padded)
        except InputError:
            raise error from None
        raise InputError(f"{error}; {remedy}") from error
    try:
        with without_memory():
            SongUNet(network)
    except CheckpointError as error:
        raise InputError(f"{error}; take fewer blocks or channels") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, Stream.INITIALISATION))
        return NetworkDenoiser(SongUNet(network), config.preconditioning)


def teacher_data(config: TeacherConfig, dataset: Dataset) -> dict[str, str]:
    """Digests of what a teacher learns from: pixels, and classes where it is conditional."""
    digests = {"data": dataset.sha256}
    # Labels that an unconditional teacher never sees must not make it another one.
    if config.label_dim:
        digests["labels"] = dataset.labels_sha256
    return digests


def _network_config(config: TeacherConfig, channels: int, side: int) -> SongUNetConfig:
    images = {"img_resolution": side, "img_channels": channels}
    for name in images.keys() & config.network.keys():
        raise KnobError(f"network.{name}", "follows from the data set; leave it out")
    return SongUNetConfig.read(images | config.network, "network")


def draw_levels(config: TeacherConfig, draw: torch.Generator, like: Tensor) -> Tensor:
    """[B] noise levels to train at, in the type and on the device of ``like``."""
    if config.precond is None:
        normal = moved(torch.randn(config.batch, generator=draw), like)
        return (config.p_mean + config.p_std * normal).exp()
    u = torch.rand(config.batch, generator=draw, dtype=torch.float64)
    return moved(native_schedule(config.preconditioning).draw(u), like)
