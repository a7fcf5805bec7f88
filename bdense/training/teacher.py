"""Train a small teacher by denoising score matching, and average its weights.

As EDM's (Karras et al. 2022, section 5), or on a variance-preserving process, as progressive
distillation needs it (Salimans & Ho 2022).

B batch, C channels, H x W pixels.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.data.datasets import Dataset, to_float
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import (
    DDPM,
    EDM,
    Cosine,
    make_preconditioning,
    native_schedule,
)
from bdense.diffusion.snr_weights import LOSSES, Loss, snr_weight
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.execution import Execution
from bdense.models.store import adam_tensors, load_tensors, restore_adam, save_tensors
from bdense.networks import SongUNet, SongUNetConfig
from bdense.randomness import Stream, derive_seed, generator, seeded

# Of a network by what it predicts: as the reference for images, else the network's own error.
DEFAULT_LOSS: dict[str, Loss] = {"sample": "snr_trunc", "epsilon": "snr", "v_prediction": "v"}
# Fields that are left out of the digest where they are off.
_OPTIONAL = ("precond", "loss", "flip", "clip")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """A teacher's network and its training.

    Attributes:
        network: Options of the SongUNet beyond image size and channels. With ``label_dim``
            above 0 it is trained with the classes of the data set.
        images: Training images in all (with repetition).
        batch: Images an iteration.
        lr: Adam's step size after the warm-up.
        warmup_images: Images over which lr rises linearly from 0.
        ema_halflife_images: Images after which a weight's share in the average has halved.
        p_mean, p_std: ln sigma ~ N(p_mean, p_std^2), with EDM's preconditioning.
        seed: Of initial weights, batches, noise and dropout.
        precond: Name (cosine or ddpm) and options of a preconditioning whose process is trained
            on, at its own levels; None is EDM's.
        loss: How the levels of that process count, of ``LOSSES``; None is ``DEFAULT_LOSS``.
        flip: Mirror each image with probability 1/2.
        clip: Largest norm of the gradient, which is shortened to it; None leaves it as it is.
    """

    images: int
    batch: int = 256
    lr: float = 2e-3
    warmup_images: int = 10_000
    ema_halflife_images: int = 10_000
    p_mean: float = -1.2
    p_std: float = 1.2
    seed: int = 0
    network: dict[str, Any] = field(default_factory=dict)
    precond: dict[str, Any] | None = None
    loss: Loss | None = None
    flip: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("images", "batch", "ema_halflife_images"):
            if getattr(self, name) < 1:
                raise InputError(f"teacher {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"teacher lr must be positive and finite, got {self.lr}")
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise InputError(
                f"teacher clip must be positive and finite, got {self.clip}; leave it out for "
                "gradients as they are"
            )
        if self.loss is not None and self.loss not in LOSSES:
            raise InputError(f"teacher loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.loss is not None and self.precond is None:
            raise InputError(
                f"teacher loss {self.loss!r} is for a process, and EDM's preconditioning has its "
                "own; leave it out, or choose precond cosine or ddpm"
            )
        _ = self.preconditioning  # which refuses bad options

    @property
    def preconditioning(self) -> EDM | DDPM | Cosine:
        """What turns the network into a denoiser.

        Raises:
            InputError: No teacher is trained with ``precond``.
        """
        if self.precond is None:
            return EDM()
        options = dict(self.precond)
        name = options.pop("name", None)
        if name not in ("cosine", "ddpm"):
            raise InputError(
                f"teacher precond needs the name cosine or ddpm, got {name!r}; leave precond out "
                "for EDM's"
            )
        precond = make_preconditioning(name, options)
        assert isinstance(precond, DDPM | Cosine)
        return precond

    @property
    def vp_loss(self) -> Loss | None:
        """``loss`` or its default; None with EDM's preconditioning, which has its own."""
        precond = self.preconditioning
        if isinstance(precond, EDM):
            return None
        return self.loss or DEFAULT_LOSS[precond.prediction_type]

    @property
    def iterations(self) -> int:
        """ceil(images / batch)."""
        return -(-self.images // self.batch)

    @property
    def label_dim(self) -> int:
        """Classes that the network is told; 0 for an unconditional one."""
        return int(self.network.get("label_dim", 0))

    def lr_at(self, iteration: int) -> float:
        """The step size of that iteration, counted from 0."""
        seen = (iteration + 1) * self.batch
        return self.lr * min(1.0, seen / max(self.warmup_images, 1))

    def as_dict(self) -> dict[str, Any]:
        """The fields, as files hold them.

        Optional ones are left out where they are off: the digest of the rest names the teachers
        that are kept.
        """
        options = asdict(self)
        for name in _OPTIONAL:
            if not options[name]:
                del options[name]
        return options


def denoising_loss(
    denoiser: NetworkDenoiser,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    class_labels: Tensor | None = None,
) -> Tensor:
    """lambda(sigma) |D(y + n; sigma) - y|^2, mean over pixels (Karras et al. 2022, table 1).

    Args:
        denoiser: One branch.
        clean: [B, C, H, W] y in [-1, 1].
        noise: [B, C, H, W], unit.
        sigma: [B].
        class_labels: [B, label_dim] one-hot, for a conditional network.

    Returns:
        [B]; 1 in expectation for an untrained network.
    """
    sigma_data = denoiser.sigma_data
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * _squared_error(denoiser, clean, noise, sigma, class_labels)


def vp_denoising_loss(
    denoiser: NetworkDenoiser,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    class_labels: Tensor | None = None,
    *,
    loss: Loss,
) -> Tensor:
    """w(sigma) |D(y + n; sigma) - y|^2, mean over pixels (Salimans & Ho 2022, section 4).

    Args:
        denoiser: One branch.
        clean: [B, C, H, W] y in [-1, 1].
        noise: [B, C, H, W], unit.
        sigma: [B].
        class_labels: [B, label_dim] one-hot, for a conditional network.
        loss: w, as in ``snr_weight``.

    Returns:
        [B].
    """
    return snr_weight(sigma, loss) * _squared_error(denoiser, clean, noise, sigma, class_labels)


def _squared_error(
    denoiser: NetworkDenoiser,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    class_labels: Tensor | None,
) -> Tensor:
    """[B] |D(y + n; sigma) - y|^2, mean over pixels."""
    denoised = denoiser(clean + sigma.view(-1, 1, 1, 1) * noise, sigma, class_labels)
    error: Tensor = (denoised - clean).square().mean(dim=(1, 2, 3))
    return error


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
    if execution.precision == "float16":
        raise InputError(
            "a teacher is not trained in float16, whose small gradients vanish; use bfloat16"
        )
    denoiser = new_denoiser(config, dataset.images.shape[1:]).to(device)
    if config.label_dim:
        dataset.require_labels(config.label_dim)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    denoiser.execute(execution)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.lr, fused=True)
    identity = _identity(config, dataset, denoiser.execution)
    first = _resume(checkpoint, denoiser, ema, optimizer, identity) if checkpoint else 0
    decay = 0.5 ** (config.batch / config.ema_halflife_images)
    last_save = time.monotonic()

    denoiser.train()
    for iteration in range(first, config.iterations):
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(iteration)
        with seeded(device, config.seed, Stream.DROPOUT, iteration):
            loss = _loss(denoiser, config, *_batch(dataset, config, iteration, device)).mean()
        value = _update(denoiser, optimizer, loss, iteration, config.clip)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 1 - decay)
        if checkpoint and time.monotonic() - last_save >= checkpoint_seconds:
            _save(checkpoint, denoiser, ema, optimizer, iteration + 1, identity)
            last_save = time.monotonic()
        if on_iteration is not None:
            on_iteration(iteration + 1, config.iterations, value)
    return ema


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
        if not _fits(config, channels, padded):
            raise
        raise InputError(f"{error}; {remedy}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, Stream.INITIALISATION))
        return NetworkDenoiser(SongUNet(network), config.preconditioning)


def teacher_data(config: TeacherConfig, dataset: Dataset) -> dict[str, str]:
    """Digests of what a teacher learns from: pixels, and the classes that it is told."""
    digests = {"data": dataset.sha256}
    # Labels that an unconditional teacher never sees must not make it another one.
    if config.label_dim:
        digests["labels"] = dataset.labels_sha256
    return digests


def _network_config(config: TeacherConfig, channels: int, side: int) -> SongUNetConfig:
    try:
        return SongUNetConfig(img_resolution=side, img_channels=channels, **config.network)
    except TypeError as error:
        raise InputError(
            f"the teacher's network options do not fit a SongUNet: {error}"
        ) from error


def _fits(config: TeacherConfig, channels: int, side: int) -> bool:
    try:
        _network_config(config, channels, side)
    except InputError:
        return False
    return True


def _batch(
    dataset: Dataset, config: TeacherConfig, iteration: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Clean images, unit noise, noise levels and classes of one iteration."""
    draw = generator(config.seed, Stream.TEACHER_BATCH, iteration)
    index = torch.randint(len(dataset.images), (config.batch,), generator=draw)
    images = dataset.images[index]
    noise = torch.randn(images.shape, generator=draw).to(device)
    sigma = _levels(config, draw, device)
    if config.flip:
        mirrored = torch.rand(config.batch, generator=draw) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    # Bytes until here: a whole set in float32 is four times as large.
    clean = to_float(images).to(device)
    if not config.label_dim:
        return clean, noise, sigma, None
    return clean, noise, sigma, dataset.one_hot_labels(config.label_dim, index).to(device)


def _levels(config: TeacherConfig, draw: torch.Generator, device: torch.device) -> Tensor:
    """[B] noise levels to train at."""
    if config.precond is None:
        normal = torch.randn(config.batch, generator=draw).to(device)
        return (config.p_mean + config.p_std * normal).exp()
    u = torch.rand(config.batch, generator=draw, dtype=torch.float64)
    return native_schedule(config.preconditioning).draw(u).float().to(device)


def _loss(
    denoiser: NetworkDenoiser,
    config: TeacherConfig,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    class_labels: Tensor | None,
) -> Tensor:
    """[B], as the preconditioning asks."""
    loss = config.vp_loss
    if loss is None:
        return denoising_loss(denoiser, clean, noise, sigma, class_labels)
    return vp_denoising_loss(denoiser, clean, noise, sigma, class_labels, loss=loss)


def _update(
    denoiser: NetworkDenoiser,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    iteration: int,
    clip: float | None,
) -> float:
    """One step down the loss, if it and its gradient are finite; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    for what, value in (("loss", loss), ("gradient", norm)):
        if not bool(value.isfinite()):
            raise NonFiniteLossError(f"the teacher's {what}", iteration=iteration)
    if clip is not None:
        torch._foreach_mul_(gradients, clip / norm.clamp(min=clip))
    optimizer.step()
    return float(loss.detach())


def _identity(config: TeacherConfig, dataset: Dataset, execution: Execution) -> dict[str, Any]:
    """What must agree for a checkpoint to be the same run, as a checkpoint gives it back."""
    identity: dict[str, Any] = {"config": config.as_dict(), **teacher_data(config, dataset)}
    # Checkpoints from before there was a choice say nothing, and were made in float32.
    if execution.precision != "float32":
        identity["precision"] = execution.precision
    # In JSON a tuple, such as channel_mult's, is a list.
    return dict(json.loads(json.dumps(identity)))


def _save(
    path: Path,
    denoiser: NetworkDenoiser,
    ema: NetworkDenoiser,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    identity: dict[str, Any],
) -> None:
    tensors = denoiser.state_dict() | adam_tensors(denoiser, optimizer)
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    save_tensors(
        path, tensors, {"kind": "teacher-training", "iteration": iteration, "identity": identity}
    )


def _resume(
    path: Path,
    denoiser: NetworkDenoiser,
    ema: NetworkDenoiser,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
) -> int:
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "teacher-training" or metadata.get("identity") != identity:
        raise CheckpointError(
            f"{path} belongs to another teacher; delete it or choose another file"
        )
    own = {name: tensors[name] for name in denoiser.state_dict()}
    denoiser.load_state_dict(own)
    ema.load_state_dict({name: tensors[f"ema.{name}"] for name in own})
    restore_adam(denoiser, optimizer, tensors)
    return int(metadata["iteration"])
