"""Simple and Fast Distillation, plain or with dense branch supervision (B-DENSE).

Zhou et al. 2024 (arXiv 2409.19681), algorithm 1; B-DENSE (arXiv 2602.15971), section 3.

B batch, K branches, C channels, H x W pixels, S trained intervals.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.branches import widen_head
from bdense.checkpoints import adam_tensors, load_tensors, restore_adam, save_tensors
from bdense.denoiser import NetworkDenoiser
from bdense.errors import CheckpointError, InputError, NonFiniteLossError
from bdense.randomness import Stream, seeded
from bdense.solvers import analytical_slope
from bdense.trajectories import IntervalGrid, Trajectories, Walk


@dataclass(frozen=True, slots=True, kw_only=True)
class SFDConfig:
    """How long and how fast a student learns.

    Attributes:
        num_branches: K for B-DENSE; 1 for plain SFD, supervised at each interval's end alone.
        images: Training images in all; iterations = ceil(images / batch).
        lr: Adam's step size; a tenth of it from the middle of the run on.
        dropout: Keep the checkpoint's dropout on while training, as the reference does.
        seed: Seeds dropout; the noise is the trajectories' own.
    """

    num_branches: int
    images: int
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    dropout: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_branches < 1:
            raise InputError(f"num_branches (K) must be at least 1, got {self.num_branches}")
        if self.images < 1:
            raise InputError(f"images must be at least 1, got {self.images}")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"lr must be positive and finite, got {self.lr}")

    def iterations(self, batch: int) -> int:
        """Iterations of that batch size that see all ``images``."""
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        return -(-self.images // batch)

    def lr_at(self, iteration: int, batch: int) -> float:
        """lr, or lr / 10 after the first iteration that began with half of the images seen."""
        past_the_middle = iteration > 0 and (iteration - 1) * batch * 2 >= self.images
        return self.lr / 10 if past_the_middle else self.lr


@dataclass(frozen=True, slots=True)
class IterationReport:
    """What one iteration did.

    Attributes:
        iteration: 0-based.
        iterations: Of the whole run.
        lr: Step size used.
        branch_losses: [S, K] float64 on the CPU: L1 summed over pixels, mean over the batch,
            unweighted.
    """

    iteration: int
    iterations: int
    lr: float
    branch_losses: Tensor

    def loss(self, weights: Tensor) -> float:
        """The weighted loss, mean over the trained intervals."""
        return float((self.branch_losses * weights).sum(-1).mean())


def distill(
    teacher: NetworkDenoiser,
    trajectories: Trajectories,
    config: SFDConfig,
    weights: Tensor,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_iteration: Callable[[IterationReport], None] | None = None,
) -> NetworkDenoiser:
    """Train a student on the teacher's trajectories.

    Stopped anywhere and called again with the same ``checkpoint``, it ends with the same weights.

    Args:
        teacher: The student starts as a copy of it, on its device.
        trajectories: Batches by iteration, all of ``config.iterations``.
        config: Length, step size, branches.
        weights: [num_branches] w_1..w_K.
        checkpoint: File to resume from and to save to; None keeps nothing.
        checkpoint_seconds: Save at the first iteration that ends this long after the last save.
        on_iteration: Called after every iteration; what it raises ends the run.

    Returns:
        The branched student, in eval mode; ``export_branch`` makes it the teacher's size.

    Raises:
        InputError: Branches, weights and trajectories do not fit together.
        NonFiniteLossError: A loss or gradient is not finite; no update was made from it.
    """
    grid, batch = trajectories.grid, trajectories.batch
    iterations = config.iterations(batch)
    _check(config, grid, weights, iterations, len(trajectories))
    student = widen_head(teacher, config.num_branches).train(config.dropout)
    optimizer = torch.optim.Adam(
        student.parameters(), lr=config.lr, betas=config.betas, fused=True
    )
    identity = _identity(config, weights, trajectories)
    first = _resume(checkpoint, student, optimizer, identity) if checkpoint else 0
    last_save = time.monotonic()

    for iteration in range(first, iterations):
        lr = config.lr_at(iteration, batch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = _train_on(
            student, optimizer, trajectories[iteration], grid, weights, config.seed, iteration
        )
        # Before the save: a caller that is no longer entitled to the checkpoint ends the run here.
        if on_iteration is not None:
            on_iteration(IterationReport(iteration, iterations, lr, losses))
        if checkpoint and time.monotonic() - last_save >= checkpoint_seconds:
            _save(checkpoint, student, optimizer, iteration + 1, identity)
            last_save = time.monotonic()
    return student.eval()


def _train_on(
    student: NetworkDenoiser,
    optimizer: torch.optim.Optimizer,
    walk: Walk,
    grid: IntervalGrid,
    weights: Tensor,
    seed: int,
    iteration: int,
) -> Tensor:
    """One optimiser step for each trained interval, along the student's own path: [S, K]."""
    report = []
    x = walk.start
    if grid.afs:
        x = first_interval_without_network(x, grid.interval(0))
    for row, n in enumerate(grid.trained):
        levels = grid.interval(n)
        targets = walk.states[row * grid.substeps : (row + 1) * grid.substeps]
        with seeded(x.device, seed, Stream.DROPOUT, iteration, n):
            states = branch_states(student, x, levels)
        losses = branch_losses(states, targets)
        optimizer.zero_grad(set_to_none=True)
        (weights.to(losses) * losses).sum().backward()  # type: ignore[no-untyped-call]
        report.append(_finite(losses, student, iteration, n))
        optimizer.step()
        x = states[:, -1].detach()
    return torch.stack(report)


def first_interval_without_network(x: Tensor, levels: Tensor) -> Tensor:
    """AFS: the whole first interval along the analytical slope; [B, C, H, W] to the same."""
    return x + (levels[-1] - levels[0]) * analytical_slope(x, levels[0])


def branch_states(student: NetworkDenoiser, x: Tensor, levels: Tensor) -> Tensor:
    """Where each branch says the teacher is: x^k = x + (t_{n,k} - t_n) (x - D^k) / t_n.

    Args:
        student: Its K branches stand for t_{n,1}..t_{n,K}; a single one for t_{n,K}.
        x: [B, C, H, W] the student's state at t_n.
        levels: [K + 1] float64, t_{n,0} = t_n down to t_{n,K}.

    Returns:
        [B, K, C, H, W]; index -1 is the end of the interval.
    """
    t = levels[0]
    slopes = (x[:, None] - student.branches(x, t)) / t
    steps = (levels[1:] - t)[-student.num_branches :]
    return x[:, None] + steps.to(x).view(-1, 1, 1, 1) * slopes


def branch_losses(states: Tensor, targets: Tensor) -> Tensor:
    """|x^k - x^T_{n,k}|, summed over pixels, mean over the batch.

    Args:
        states: [B, K, C, H, W] from ``branch_states``.
        targets: [K', B, C, H, W] teacher states, K' >= K; the last K are meant.

    Returns:
        [K].
    """
    targets = targets[-states.shape[1] :].transpose(0, 1)
    return (states - targets).abs().sum(dim=(0, 2, 3, 4)) / len(states)


def _finite(losses: Tensor, student: NetworkDenoiser, iteration: int, n: int) -> Tensor:
    """The losses as float64 on the CPU, once they and the gradients are known to be finite."""
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    values = torch.cat([losses.detach(), norm.to(losses)[None]]).double().cpu()
    finite = values.isfinite()
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        if bad < len(losses):
            raise NonFiniteLossError("the loss", iteration=iteration, interval=n, branch=bad + 1)
        raise NonFiniteLossError("the gradient", iteration=iteration, interval=n)
    return values[:-1]


def _check(
    config: SFDConfig, grid: IntervalGrid, weights: Tensor, iterations: int, available: int
) -> None:
    if config.num_branches not in (1, grid.substeps):
        raise InputError(
            f"num_branches={config.num_branches} fits neither plain SFD (1) nor the teacher's "
            f"sub-steps (substeps={grid.substeps})"
        )
    if tuple(weights.shape) != (config.num_branches,) or not bool((weights >= 0).all()):
        raise InputError(
            f"weights must be {config.num_branches} numbers >= 0, one for each branch, got "
            f"{weights.tolist()}"
        )
    if iterations > available:
        raise InputError(
            f"{config.images} images make {iterations} iterations, and the trajectories hold "
            f"{available}; record more or train on fewer images"
        )


def _identity(config: SFDConfig, weights: Tensor, trajectories: Trajectories) -> dict[str, Any]:
    """What must agree for a checkpoint to be the same run, one level deep."""
    fields = {f"config.{name}": value for name, value in asdict(config).items()}
    fields["config.betas"] = list(config.betas)
    served = {f"trajectories.{name}": value for name, value in trajectories.describe().items()}
    return {"weights": weights.tolist(), **fields, **served}


def _save(
    path: Path,
    student: NetworkDenoiser,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    identity: Mapping[str, Any],
) -> None:
    tensors = student.state_dict() | adam_tensors(student, optimizer)
    save_tensors(
        path, tensors, {"kind": "sfd-training", "iteration": iteration, "identity": dict(identity)}
    )


def _resume(
    path: Path,
    student: NetworkDenoiser,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> int:
    """Load a saved run, if there is one, and say at which iteration it goes on."""
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path)
    stored = metadata.get("identity", {})
    differing = sorted(
        key for key in stored.keys() | identity.keys() if stored.get(key) != identity.get(key)
    )
    if metadata.get("kind") != "sfd-training" or differing:
        raise CheckpointError(
            f"{path} belongs to another run (differs in: {', '.join(differing) or 'kind'}); "
            "give this run a folder of its own or delete the file"
        )
    student.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("adam.")})
    restore_adam(student, optimizer, tensors)
    return int(metadata["iteration"])
