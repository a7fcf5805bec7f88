"""Progressive Distillation, plain or with dense branch supervision (B-DENSE).

Salimans & Ho 2022 (arXiv 2202.00512), algorithm 2; B-DENSE (arXiv 2602.15971), section 3. A step
of the student lands where K DDIM steps of the teacher land; then the student, by branch K, is the
next round's teacher.

In our coordinates, x = z / alpha and sigma = 1 / sqrt(SNR), for any parameterisation of either
network. B batch, K branches, C channels, H x W pixels, N student steps.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from bdense import NUMERICS
from bdense.data.datasets import Dataset, to_float
from bdense.diffusion.branches import widen_head
from bdense.diffusion.denoiser import Denoiser, NetworkDenoiser
from bdense.diffusion.preconditioning import DDPM, Cosine
from bdense.diffusion.schedules import Levels
from bdense.diffusion.snr_weights import LOSSES, Loss, snr_weight
from bdense.errors import InputError, NonFiniteLossError, StoppedError
from bdense.models.store import denoiser_sha256
from bdense.randomness import Stream, generator, seeded
from bdense.training.checkpoint import Keeper

Optimizer = Literal["adam", "adamw", "sgd"]
WeightsSpace = Literal["clean", "state"]
_KIND = "pd-training"


@dataclass(frozen=True, slots=True, kw_only=True)
class PDConfig:
    """How a round is trained; the defaults are the reference's for CIFAR-10.

    Attributes:
        updates: Optimiser steps of a round.
        substeps: K, the teacher's steps in one of the student's.
        num_branches: K for B-DENSE; 1 for plain PD, supervised at the step's end alone.
        batch: Images an update.
        lr: Step size of the first update.
        anneal: Let it fall linearly, to lr / updates at the last; else it is constant.
        optimizer: ``adamw`` decouples ``weight_decay``; ``adam`` has none; ``sgd`` is plain.
        clip_norm: The gradient is scaled down to this norm; None lets it be. Unlike Adam's, the
            clipped update sees the scale of the branch weights.
        loss: Weight of |D^k - D*^k|^2: ``constant`` 1, ``snr``, ``snr_trunc`` max(SNR, 1), ``v``
            SNR + 1, of the step's beginning for all branches.
        clip_targets: Clamp the teacher's predictions to [-1, 1], which keeps the targets there.
        weights_space: ``clean`` takes w_k as they are; ``state`` multiplies them by
            1 - t_{n,k} / t_n, as SFD's loss does by itself, and keeps their sum.
        dropout: Keep the teacher's dropout on while training.
        flip: Mirror each image with probability 1/2.
        seed: Of images, noise, times, flips and dropout.
    """

    updates: int
    substeps: int = 2
    num_branches: int = 1
    batch: int = 128
    lr: float = 5e-5
    anneal: bool = True
    optimizer: Optimizer = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    loss: Loss = "snr_trunc"
    clip_targets: bool = False
    weights_space: WeightsSpace = "clean"
    dropout: bool = False
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "substeps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices = {
            "optimizer": get_args(Optimizer),
            "loss": LOSSES,
            "weights_space": get_args(WeightsSpace),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(known)}"
                )
        if self.num_branches not in (1, self.substeps):
            raise InputError(
                f"num_branches={self.num_branches} fits neither plain PD (1) nor the teacher's "
                f"sub-steps (substeps={self.substeps})"
            )
        if not 0 < self.lr < float("inf"):
            raise InputError(f"lr must be positive and finite, got {self.lr}")
        decay = self.weight_decay
        if not 0 <= decay < float("inf") or (decay and self.optimizer != "adamw"):
            raise InputError(
                f"weight_decay={decay} with optimizer={self.optimizer!r}: only adamw has any, a "
                "finite number from 0 up"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm must be positive, got {self.clip_norm}; None clips not")

    def lr_at(self, iteration: int) -> float:
        """lr (1 - j / S) at update j of S, or lr."""
        return self.lr * (1 - iteration / self.updates) if self.anneal else self.lr

    def make_optimizer(self, student: NetworkDenoiser) -> torch.optim.Optimizer:
        """One of the student's parameters, anew for each round as in the reference."""
        parameters = student.parameters()
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr)
        decay = self.weight_decay
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, weight_decay=decay, fused=True
        )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one update learns from.

    Attributes:
        clean: [B, C, H, W] images in [-1, 1].
        noise: [B, C, H, W], unit.
        interval: [B] int64 n in 0..N - 1, counted from the noisy end.
        labels: [B, label_dim] one-hot classes, or None.
    """

    clean: Tensor
    noise: Tensor
    interval: Tensor
    labels: Tensor | None = None


class Batches(Protocol):
    """Where a round's batches come from; any is reached without those before it."""

    def __call__(self, iteration: int, num_steps: int) -> Batch:
        """The batch of that update of the round to ``num_steps``."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able; equal descriptions give equal batches."""
        ...


@dataclass(frozen=True, eq=False)
class DataBatches:
    """Images of a set, drawn with replacement; times uniform over the steps.

    Two runs of one seed see the same batches, whatever their weights.
    """

    dataset: Dataset
    batch: int
    seed: int
    device: torch.device
    flip: bool = False
    label_dim: int = 0

    def __post_init__(self) -> None:
        if self.label_dim:
            self.dataset.require_labels(self.label_dim)

    def __call__(self, iteration: int, num_steps: int) -> Batch:
        """The batch of that update of the round to ``num_steps``."""
        draw = generator(self.seed, Stream.PROGRESSIVE, num_steps, iteration)
        index = torch.randint(len(self.dataset.images), (self.batch,), generator=draw)
        clean = to_float(self.dataset.images[index])
        noise = torch.randn(clean.shape, generator=draw)
        interval = torch.randint(num_steps, (self.batch,), generator=draw)
        if self.flip:
            mirrored = torch.rand(self.batch, generator=draw) < 0.5
            clean[mirrored] = clean[mirrored].flip(-1)
        labels = None
        if self.label_dim:
            labels = self.dataset.one_hot_labels(self.label_dim, index).to(self.device)
        return Batch(clean.to(self.device), noise.to(self.device), interval, labels)

    def describe(self) -> dict[str, Any]:
        """JSON-able; equal descriptions give equal batches."""
        labels = {"labels": self.dataset.labels_sha256} if self.label_dim else {}
        drawn = {"batch": self.batch, "seed": self.seed, "flip": self.flip}
        return {"data": self.dataset.sha256, **drawn, **labels}


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update did.

    Attributes:
        iteration: 0-based, of this round.
        iterations: Of the whole round.
        lr: Step size used.
        branch_losses: [K] float64 on the CPU: by branch, SNR-weighted, without its branch weight.
        loss: Their weighted sum, which was minimised.
        gradient_norm: Before clipping.
    """

    iteration: int
    iterations: int
    lr: float
    branch_losses: Tensor
    loss: float
    gradient_norm: float


def distill_round(
    teacher: NetworkDenoiser,
    batches: Batches,
    schedule: Levels,
    num_steps: int,
    config: PDConfig,
    weights: Tensor,
    *,
    start: NetworkDenoiser | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_update: Callable[[UpdateReport], None] | None = None,
    on_save: Callable[[int], None] | None = None,
) -> NetworkDenoiser:
    """Train a student whose ``num_steps`` DDIM steps follow the teacher's K ``num_steps``.

    Stopped anywhere and called again with the same ``checkpoint``, it ends with the same weights.

    Args:
        teacher: One branch, on the device to train on.
        batches: What to learn from.
        schedule: Levels of both grids.
        num_steps: N of the student.
        config: Length, step size, loss, branches.
        weights: [num_branches] w_1..w_K, used as they are.
        start: Another network to start from, such as the teacher ``reparameterised``.
        checkpoint: File to resume from and to save to; None keeps nothing.
        checkpoint_seconds: Save at the first update that ends this long after the last save.
        on_update: Called after every update; what it raises ends the run, a ``StoppedError`` with
            a save.
        on_save: Called after each save with the updates done.

    Returns:
        The branched student, in eval mode; ``export_branch`` makes it the teacher's size.

    Raises:
        InputError: Weights, branches, levels or steps do not fit together.
        NonFiniteLossError: A loss or gradient is not finite; no update was made from it.
    """
    start = start or teacher
    _check(teacher, schedule, config, weights, num_steps)
    start.execution.set_products()
    student = widen_head(start, config.num_branches).train(config.dropout)
    optimizer = config.make_optimizer(student)
    identity = run_identity(teacher, batches, schedule, config, weights)
    identity["num_steps"] = num_steps
    if start is not teacher:
        identity["start"] = denoiser_sha256(start)
    keeper = Keeper(
        checkpoint,
        _KIND,
        student,
        optimizer,
        identity,
        seconds=checkpoint_seconds,
        on_save=on_save,
    )
    first = keeper.resume()
    fine = schedule.grid(num_steps * config.substeps)
    k = torch.arange(config.substeps + 1)[:, None]  # against every image
    for iteration in range(first, config.updates):
        lr = config.lr_at(iteration)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batches(iteration, num_steps)
        # t_{n,0}..t_{n,K} of each image's own interval.
        levels = fine[config.substeps * batch.interval + k]
        x = batch.clean + _per_image(levels[0], batch.clean) * batch.noise
        targets = dense_targets(teacher.given(batch.labels), x, levels, clip=config.clip_targets)
        with seeded(x.device, config.seed, Stream.DROPOUT, num_steps, iteration):
            errors = branch_errors(student, x, levels[0], targets, batch.labels)
        losses = snr_weight(levels[0], config.loss).to(errors) * errors
        weighting = image_weights(weights, levels, config.weights_space).to(losses)
        loss = (weighting * losses).sum(0).mean()
        norm = _update(optimizer, student, loss, losses, config.clip_norm, iteration)
        if on_update is not None:
            seen = losses.detach().mean(1).double().cpu()
            value = float(loss.detach())
            try:
                on_update(UpdateReport(iteration, config.updates, lr, seen, value, norm))
            except StoppedError:
                keeper.save(iteration + 1)
                raise
        if keeper.is_due:
            keeper.save(iteration + 1)
    return student.eval()


@torch.no_grad()
def dense_targets(denoise: Denoiser, x: Tensor, levels: Tensor, *, clip: bool = False) -> Tensor:
    """What each branch has to predict for one step to land where the teacher's first k steps do.

    D*^k = sum_{j<=k} (r_j - r_{j-1}) / (r_k - r_0) D(x_{j-1}), r = 1 / t: a convex combination, so
    that nothing cancels. D*^1 is the teacher's own prediction at x; where t_K = 0, r_K = infinity
    leaves the last prediction alone, the reference's rule for its last interval.

    Args:
        denoise: The teacher, its conditions bound.
        x: [B, C, H, W] states at t_0.
        levels: [K + 1, B] float64 t_0 > .. > t_K of each image; t_K may be 0.
        clip: Clamp the teacher's predictions to [-1, 1]; its steps follow from the clamped ones.

    Returns:
        [K, B, C, H, W] D*^1..D*^K.
    """
    predictions: list[Tensor] = []
    for t, t_next in itertools.pairwise(levels):
        denoised = denoise(x, t)
        predictions.append(denoised.clamp(-1, 1) if clip else denoised)
        # DDIM, x' = D + (t' / t) (x - D).
        x = predictions[-1] + _per_image(t_next / t, x) * (x - predictions[-1])
    return torch.stack(
        [
            sum(
                (_per_image(share, x) * predictions[j] for j, share in enumerate(shares)),
                start=torch.zeros_like(x),
            )
            for shares in target_shares(levels)
        ]
    )


def target_shares(levels: Tensor) -> list[Tensor]:
    """How much of each teacher prediction is in each target.

    Args:
        levels: [K + 1, B] float64, decreasing; the last may be 0.

    Returns:
        For k = 1..K, [k, B] shares of D(x_0)..D(x_{k-1}): not negative, sum 1.
    """
    shares = []
    for k in range(1, len(levels)):
        # r_j / r_k = t_k / t_j, and 1 for j = k, which t_k = 0 would not say.
        ratios = torch.cat([levels[k] / levels[:k], torch.ones_like(levels[:1])])
        shares.append(ratios.diff(dim=0) / (1 - ratios[0]))
    return shares


def branch_errors(
    student: NetworkDenoiser,
    x: Tensor,
    sigma: Tensor,
    targets: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """|D^k - D*^k|^2, mean over pixels.

    Args:
        student: Its K branches stand for D*^1..D*^K; a single one for D*^K.
        x: [B, C, H, W] states at ``sigma``.
        sigma: [B].
        targets: [K', B, C, H, W], K' >= K; the last K are meant.
        labels: [B, label_dim] classes, for a conditional student.

    Returns:
        [K, B].
    """
    denoised = student.branches(x, sigma, class_labels=labels)
    targets = targets[-student.num_branches :].transpose(0, 1)
    return (denoised - targets).square().mean(dim=(2, 3, 4)).T


def image_weights(weights: Tensor, levels: Tensor, space: WeightsSpace) -> Tensor:
    """Branch weights of each image.

    Args:
        weights: [K] w_1..w_K.
        levels: [K' + 1, B] t_{n,0}..t_{n,K'}, of which the last K are the branches'.
        space: As of ``PDConfig.weights_space``.

    Returns:
        [K, B] float64, each image's sum that of ``weights``.
    """
    own = weights.double().to(levels.device)[:, None].expand(-1, levels.shape[1])
    if space == "clean":
        return own
    moved = own * (1 - levels[-len(weights) :] / levels[0])
    return moved * (own.sum(0) / moved.sum(0))


def reparameterised(denoiser: NetworkDenoiser, prediction_type: str) -> NetworkDenoiser:
    """A copy whose network is taken to predict something else: a start for a converting round.

    A round with K = 1 at the teacher's own number of steps then makes it the teacher's equal:
    its only target is D*^1, the teacher's prediction.

    Args:
        denoiser: With the preconditioning of a VP process.
        prediction_type: One of ``bdense.diffusion.preconditioning.PREDICTIONS``.

    Raises:
        InputError: The network's preconditioning has no prediction type.
    """
    precond = denoiser.precond
    if not isinstance(precond, Cosine | DDPM):
        raise InputError(
            f"a network with precond={precond.name!r} is not converted to {prediction_type}; "
            "only those of VP processes (ddpm, cosine) have a prediction type"
        )
    copied = copy.deepcopy(denoiser)
    copied.precond = replace(precond, prediction_type=prediction_type)
    return copied


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """[B] float64 to [B, 1, 1, 1] in the images' type and on their device."""
    return values.to(images).view(-1, 1, 1, 1)


def _update(
    optimizer: torch.optim.Optimizer,
    student: NetworkDenoiser,
    loss: Tensor,
    losses: Tensor,
    clip_norm: float | None,
    iteration: int,
) -> float:
    """One step down the loss, if it and its gradient are finite; the norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients, foreach=True))
    if not (norm < float("inf") and bool(loss.isfinite())):
        finite = losses.detach().isfinite().all(dim=1).tolist()
        branch = finite.index(False) + 1 if False in finite else None
        what = "the gradient" if branch is None else "the loss"
        raise NonFiniteLossError(what, iteration=iteration, branch=branch)
    if clip_norm is not None and norm > clip_norm:
        # torch's own adds 1e-6 to the norm, which the reference does not.
        torch._foreach_mul_(gradients, clip_norm / norm)
    optimizer.step()
    return norm


def _check(
    teacher: NetworkDenoiser, schedule: Levels, config: PDConfig, weights: Tensor, num_steps: int
) -> None:
    if weights.shape != (config.num_branches,):
        raise InputError(
            f"there are {weights.numel()} branch weights for num_branches={config.num_branches}; "
            "give one for each branch"
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool(weights.any()):
        raise InputError(
            f"branch weights must be finite, not negative and not all 0, got {weights.tolist()}"
        )
    if num_steps < 1:
        raise InputError(f"a student takes at least 1 step, got {num_steps}")
    if teacher.execution.precision == "float16":
        raise InputError(
            "progressive distillation is not trained in float16, whose small gradients vanish; "
            "use bfloat16"
        )
    teacher.require_levels(schedule)


def run_identity(
    teacher: NetworkDenoiser,
    batches: Batches,
    schedule: Levels,
    config: PDConfig,
    weights: Tensor,
) -> dict[str, Any]:
    """What must agree for two trainings to be alike, whatever their steps; one level deep."""
    fields = {f"config.{name}": value for name, value in asdict(config).items()}
    fields["config.betas"] = list(config.betas)
    return {
        "numerics": NUMERICS,
        "teacher": denoiser_sha256(teacher),
        "precision": teacher.execution.precision,
        "schedule": schedule.describe(),
        "weights": weights.tolist(),
        **fields,
        **{f"batches.{name}": value for name, value in batches.describe().items()},
    }
