"""Simple and Fast Distillation, plain or with dense branch supervision (B-DENSE).

Zhou et al. 2024 (arXiv 2409.19681), algorithm 1; B-DENSE (arXiv 2602.15971), section 3.

B batch, K branches, C channels, H x W pixels, S trained intervals.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.solvers import analytical_slope
from bdense.errors import InputError, NonFiniteLossError, StoppedError
from bdense.methods.sfd_run import Looks as Looks
from bdense.methods.sfd_run import require_fitting, run_identity
from bdense.methods.trajectories import Trajectories, Walk
from bdense.randomness import Stream, seeded
from bdense.training.checkpoint import Keeper
from bdense.training.parallel import Team
from bdense.weights.weighting import BranchWeighting, FixedWeights

_KIND = "sfd-training"


class PerceptualLoss(Protocol):
    """How unlike images look to people."""

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """0-dim distance of [B, C, H, W] images in [-1, 1] from where they ought to be."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able; equal descriptions make equal losses."""
        ...


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
        weights: [S, K] float64 branch weights used.
    """

    iteration: int
    iterations: int
    lr: float
    branch_losses: Tensor
    weights: Tensor

    @property
    def loss(self) -> float:
        """The weighted branch losses, mean over the trained intervals."""
        return float((self.branch_losses * self.weights).sum(-1).mean())


def distill(
    teacher: NetworkDenoiser,
    trajectories: Trajectories,
    config: SFDConfig,
    weights: Tensor | BranchWeighting,
    *,
    start: NetworkDenoiser | None = None,
    perceptual: PerceptualLoss | None = None,
    team: Team | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_iteration: Callable[[IterationReport], None] | None = None,
    on_save: Callable[[int], None] | None = None,
    looks: Looks | None = None,
) -> NetworkDenoiser:
    """Train a student on the teacher's trajectories.

    Stopped anywhere and called again with the same ``checkpoint``, it ends with the same weights.

    Args:
        teacher: The student starts as a copy of it, on its device.
        trajectories: Batches by iteration, all of ``config.iterations``.
        config: Length, step size, branches.
        weights: [num_branches] w_1..w_K, or what learns them.
        start: Another student to start from, such as the teacher ``with_step_condition``.
        perceptual: Added at the end of the last interval, C * H * W times, as in the reference's
            second stage; ``bdense.methods.perceptual.LPIPS`` is one.
        team: The processes that share each batch; None is this one alone.
        checkpoint: File to resume from and to save to; None keeps nothing.
        checkpoint_seconds: Save at the first iteration that ends this long after the last save; at
            the end in any case.
        on_iteration: Called after every iteration; what it raises ends the run, a
            ``StoppedError`` with a save.
        on_save: Called after each save with the iterations done.
        looks: At the student on its way; saved before each.

    Returns:
        The branched student, in eval mode; ``export_branch`` makes it the teacher's size.

    Raises:
        InputError: Branches, weights and trajectories do not fit together.
        NonFiniteLossError: A loss or gradient is not finite; no update was made from it.
    """
    batch = trajectories.batch
    iterations = config.iterations(batch)
    weighting = FixedWeights(weights) if isinstance(weights, Tensor) else weights
    start = start or teacher
    require_fitting(
        trajectories,
        weighting,
        start,
        num_branches=config.num_branches,
        images=config.images,
        iterations=iterations,
    )
    looked_at = looks.on_the_way(iterations) if looks is not None else frozenset()
    start.execution.set_products()
    student = widen_head(start, config.num_branches).train(config.dropout)
    optimizer = torch.optim.Adam(
        student.parameters(), lr=config.lr, betas=config.betas, fused=True
    )
    team = team or Team.alone()
    keeper = Keeper(
        checkpoint,
        _KIND,
        student,
        optimizer,
        run_identity(
            asdict(config),
            weighting,
            trajectories,
            start,
            perceptual.describe() if perceptual is not None else None,
            team,
        ),
        seconds=checkpoint_seconds,
        weighting=weighting,
        writes=team.leads,
        on_save=on_save,
    )
    first = keeper.resume()
    update = _Update(student, optimizer, weighting, perceptual, team, config.seed)
    images = team.share_of(batch)
    for iteration in range(first, iterations):
        if looks is not None and iteration in looked_at:
            look = functools.partial(_look, looks, iteration, student)
            team.while_others_wait(f"look {iteration}", look)
        lr = config.lr_at(iteration, batch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses, used = _walk_along(update, trajectories.part(iteration, images), iteration)
        done = iteration + 1
        # Before the save: a caller that is no longer entitled to the checkpoint ends the run here.
        if on_iteration is not None:
            try:
                on_iteration(IterationReport(iteration, iterations, lr, losses, used))
            except StoppedError:
                keeper.save(done)
                raise
        if done in looked_at or done == iterations or keeper.is_due:
            keeper.save(done)
    return student.eval()


def _look(looks: Looks, after: int, student: NetworkDenoiser) -> None:
    """At a copy of branch K."""
    looks.look(after, export_branch(student).eval())


def _walk_along(update: "_Update", walk: Walk, iteration: int) -> tuple[Tensor, Tensor]:
    """An update for each trained interval, on the student's own path: [S, K] losses, weights."""
    grid, report = walk.grid, []
    x = walk.start
    if grid.afs:
        x = first_interval_without_network(x, grid.interval(0))
    for row, n in enumerate(grid.trained):
        targets = walk.states[row * grid.substeps : (row + 1) * grid.substeps]
        x, losses, weights = update(walk, n, x, targets, iteration)
        report.append((losses, weights))
    losses_of, weights_of = zip(*report, strict=True)
    return torch.stack(losses_of), torch.stack(weights_of)


def first_interval_without_network(x: Tensor, levels: Tensor) -> Tensor:
    """AFS: the whole first interval along the analytical slope; [B, C, H, W] to the same."""
    return x + (levels[-1] - levels[0]) * analytical_slope(x, levels[0])


def branch_states(
    student: NetworkDenoiser,
    x: Tensor,
    levels: Tensor,
    labels: Tensor | None = None,
    num_points: int | None = None,
) -> Tensor:
    """Where each branch says the teacher is: x^k = x + (t_{n,k} - t_n) (x - D^k) / t_n.

    Args:
        student: Its K branches stand for t_{n,1}..t_{n,K}; a single one for t_{n,K}.
        x: [B, C, H, W] the student's state at t_n.
        levels: [K + 1] float64, t_{n,0} = t_n down to t_{n,K}.
        labels: [B, label_dim] classes, for a conditional student.
        num_points: N + 1, for a step-conditional student.

    Returns:
        [B, K, C, H, W]; index -1 is the end of the interval.
    """
    t = levels[0]
    denoised = student.branches(x, t, class_labels=labels, num_points=num_points)
    slopes = (x[:, None] - denoised) / t
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


class _Branches(nn.Module):
    """From a state to the branches' states and losses: what a team's gradients flow through."""

    def __init__(self, student: NetworkDenoiser) -> None:
        super().__init__()
        self.student = student

    def forward(
        self, x: Tensor, levels: Tensor, targets: Tensor, labels: Tensor | None, points: int
    ) -> tuple[Tensor, Tensor]:
        """[B, K, C, H, W] states and [K] losses."""
        told = points if self.student.step_condition else None
        states = branch_states(self.student, x, levels, labels, told)
        return states, branch_losses(states, targets)


class _Update:
    """One optimiser step on one interval."""

    def __init__(
        self,
        student: NetworkDenoiser,
        optimizer: torch.optim.Optimizer,
        weighting: BranchWeighting,
        perceptual: PerceptualLoss | None,
        team: Team,
        seed: int,
    ) -> None:
        self._branches = _Branches(student)
        self._forward = team.wrap(self._branches)
        self._optimizer = optimizer
        self._weighting = weighting
        self._perceptual = perceptual
        self._team = team
        self._seed = seed

    def __call__(
        self, walk: Walk, n: int, x: Tensor, targets: Tensor, iteration: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Learn interval ``n`` from the state ``x`` [B, C, H, W].

        Returns:
            Where the student itself ends [B, C, H, W], detached; [K] losses and [K] weights,
            float64 on the CPU.
        """
        grid = walk.grid
        inputs = (x, grid.interval(n), targets, walk.labels, grid.num_points)
        with self._shared_features() as shared, self._dropout(x.device, iteration, n):
            states, losses = self._forward(*inputs)
        seen = self._team.mean(losses.detach())
        self._weighting.observe(seen, self._gradient_norms(losses, shared))
        weights = self._weighting.weights().to(losses)
        loss = (weights * losses).sum()
        if self._perceptual is not None and n == grid.num_intervals - 1:
            loss = loss + x[0].numel() * self._perceptual(states[:, -1], targets[-1])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self._branches.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        # The one place where a GPU is waited for.
        *values, last = torch.cat([seen, weights, norm.to(weights)[None]]).double().cpu()
        if not all(value.isfinite() for value in (*values, last)):
            # Eagerly: a compiled graph is walked back once, and each branch wants its own.
            eager = torch.compiler.set_stance("force_eager")
            with eager, self._dropout(x.device, iteration, n):
                raise self._named(seen, weights, inputs, iteration, n)
        self._optimizer.step()
        k = len(losses)
        return states[:, -1].detach(), torch.stack(values[:k]), torch.stack(values[k:])

    def _dropout(
        self, device: torch.device, iteration: int, n: int
    ) -> contextlib.AbstractContextManager[None]:
        """The random state that dropout draws from in this update, whoever repeats it."""
        own = self._team.own_index
        return seeded(device, self._seed, Stream.DROPOUT, iteration, n, *own)

    @contextlib.contextmanager
    def _shared_features(self) -> Iterator[list[Tensor]]:
        """The head's input, which all branches share, once the network has been called."""
        kept: list[Tensor] = []
        if not self._weighting.needs_gradients:
            yield kept
            return
        model = self._branches.student.model
        head = model.get_submodule(model.head_name)
        hook = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            yield kept
        finally:
            hook.remove()

    def _gradient_norms(self, losses: Tensor, shared: list[Tensor]) -> Tensor | None:
        """[K] |d loss_k / d shared|, each by a walk back through the head alone."""
        if not shared:
            return None
        norms = [
            torch.autograd.grad(loss, shared[0], retain_graph=True)[0].norm() for loss in losses
        ]
        # Of the whole batch: the squares add up over the shares, each a mean over its own images.
        return (self._team.mean(torch.stack(norms).square()) / self._team.size).sqrt()

    def _named(
        self, losses: Tensor, weights: Tensor, inputs: tuple[Any, ...], iteration: int, n: int
    ) -> NonFiniteLossError:
        """What is not finite and which branch caused it: each alone, from the same draws."""
        where = {"iteration": iteration, "interval": n}
        for k, loss in enumerate(losses, 1):
            if not bool(loss.isfinite()):
                return NonFiniteLossError("the loss", **where, branch=k)
        _, losses = self._branches(*inputs)
        parameters = list(self._branches.parameters())
        # Weighted, as in the update: a large weight may be what overflows.
        for k, loss in enumerate(weights * losses, 1):
            alone = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            if not all(bool(g.isfinite().all()) for g in alone if g is not None):
                return NonFiniteLossError("the gradient", **where, branch=k)
        return NonFiniteLossError("the gradient", **where)
