"""The one training loop: of teachers, and of every stage of every distillation method.

S updates an iteration, K branches.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError, NonFiniteLossError, StoppedError
from bdense.execution import moved
from bdense.randomness import Stream, seeded
from bdense.training.checkpoint import TrainingCheckpoint
from bdense.training.lora import add_adapters, merged
from bdense.training.optimisation import Average
from bdense.training.parallel import Team, team_of
from bdense.training.stage import Branches, BranchLosses, Training, Update
from bdense.weights.weighting import BranchWeighting, Observed


@dataclass(frozen=True, slots=True)
class IterationReport:
    """What one iteration did.

    Attributes:
        iteration: 0-based.
        iterations: Of the whole run.
        lr: Step size used.
        branch_losses: [S, K] float64 on the CPU: mean over the batch, unweighted.
        weights: [S, K] float64 branch weights used.
        loss: What was minimised, mean over the updates.
        gradient_norm: Before clipping, the largest of the updates.
    """

    iteration: int
    iterations: int
    lr: float
    branch_losses: Tensor
    weights: Tensor
    loss: float
    gradient_norm: float


@dataclass(frozen=True, slots=True)
class Evaluations:
    """Intermediate evaluations of the student; they do not change the training.

    Attributes:
        after: Iterations after which to evaluate, from 1 to one less than all.
        evaluate: Called with that number and a copy of branch K in eval mode. Its exceptions end
            the run. A run resumed at an evaluation repeats it. None in the processes that wait.
    """

    after: Collection[int] = ()
    evaluate: Callable[[int, NetworkDenoiser], None] | None = None

    def within(self, num_updates: int) -> frozenset[int]:
        """``after``, checked against the length of the run.

        Raises:
            InputError: A number lies outside the run.
        """
        if outside := sorted(number for number in self.after if not 0 < number < num_updates):
            raise InputError(
                f"evaluations after {outside} iterations lie outside 1..{num_updates - 1}, the "
                f"inside of a run of {num_updates} iterations"
            )
        return frozenset(self.after)


def train(
    stage: Training,
    weighting: BranchWeighting,
    *,
    devices: Sequence[torch.device] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_iteration: Callable[[IterationReport], None] | None = None,
    on_save: Callable[[int], None] | None = None,
    evaluations: Evaluations | None = None,
) -> NetworkDenoiser:
    """Train the student of one stage.

    Stopped anywhere and called again with the same ``checkpoint``, it ends with the same weights.

    Args:
        stage: What is learned.
        weighting: Source of w_1..w_K; one branch is plain training.
        devices: Devices of this machine that share each batch equally; the first is the stage's.
            They equal one device up to rounding and dropout masks.
        checkpoint: File to resume from and save to; None keeps nothing.
        checkpoint_seconds: Time between saves; the end is always saved.
        on_iteration: Called after every iteration; an exception ends the run, a ``StoppedError``
            after a save.
        on_save: Called after each save with the iterations done.
        evaluations: Intermediate evaluations; each is saved before.

    Returns:
        The branched student in eval mode, or the average of its weights if the stage has one.
        ``export_branch`` takes the teacher's size out of it.

    Raises:
        InputError: Branches, weights and devices do not fit the stage.
        NonFiniteLossError: A loss or gradient is not finite; no update was made from it.
        CheckpointError: The checkpoint belongs to another run.
    """
    evaluations = evaluations or Evaluations()
    lead = functools.partial(
        _train,
        stage=stage,
        weighting=weighting,
        checkpoint=checkpoint,
        evaluations=evaluations,
        checkpoint_seconds=checkpoint_seconds,
        on_iteration=on_iteration,
        on_save=on_save,
    )
    _require_fitting(stage, weighting)
    if devices is None or len(devices) == 1:
        return lead(Team())
    Team(0, len(devices)).parts_of(stage.batch_size, stage.optimisation.accumulate)
    waits = Evaluations(tuple(evaluations.after))
    with team_of(devices, _follow, (stage, weighting, checkpoint, waits)) as team:
        return lead(team)


def _follow(
    team: Team,
    device: torch.device,
    job: tuple[Training, BranchWeighting, Path | None, Evaluations],
) -> None:
    stage, weighting, checkpoint, waits = job
    _train(team, stage.on(device), weighting, checkpoint, waits)


def _train(
    team: Team,
    stage: Training,
    weighting: BranchWeighting,
    checkpoint: Path | None,
    evaluations: Evaluations,
    checkpoint_seconds: float = 60.0,
    on_iteration: Callable[[IterationReport], None] | None = None,
    on_save: Callable[[int], None] | None = None,
) -> NetworkDenoiser:
    """The loop in one process of a team."""
    evaluated = evaluations.within(stage.num_updates)
    stage.start.execution.set_products()
    student = widen_head(stage.start, weighting.num_branches).train(stage.dropout)
    if stage.optimisation.lora_rank:
        add_adapters(student, stage.optimisation, stage.seed)
    stage.begin(student)
    optimizer = stage.optimisation.make_optimizer(
        [p for p in student.parameters() if p.requires_grad]
    )
    average = Average.of(student) if stage.optimisation.averages else None
    trained = student if average is None else average.network
    kept = TrainingCheckpoint(
        path=checkpoint,
        stage=stage,
        weighting=weighting,
        student=student,
        optimizer=optimizer,
        average=None if average is None else average.network,
        # Each device draws its own dropout.
        identity=stage.describe(weighting) | ({"devices": team.size} if team.size > 1 else {}),
        seconds=checkpoint_seconds,
        writes=team.leads,
        on_save=on_save,
    )
    first = kept.resume()
    step = _Step(stage, weighting, student, optimizer, team)
    parts = team.parts_of(stage.batch_size, stage.optimisation.accumulate)
    for iteration in range(first, stage.num_updates):
        if iteration in evaluated:
            evaluate = functools.partial(_evaluate, evaluations, iteration, trained, stage)
            team.while_others_wait(f"evaluation {iteration}", evaluate)
        lr = stage.optimisation.lr_at(iteration, stage.num_updates, stage.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [stage.batch(iteration, images) for images in parts]
        updates = zip(*(stage.updates(iteration, batch) for batch in batches), strict=True)
        steps = [step(iteration, index, each) for index, each in enumerate(updates)]
        stage.end(iteration)
        if iteration == first:
            _require_used(weighting, len(steps))
        if average is not None:
            where = iteration, stage.num_updates, stage.batch_size
            average.add(student, stage.optimisation.share_at(*where))
        done = iteration + 1
        # Before the save: a caller that has lost its right to the checkpoint ends the run here.
        try:
            team.raise_peer_error()
            if on_iteration is not None:
                on_iteration(_report(iteration, stage.num_updates, lr, steps))
        except StoppedError:
            kept.save(done)
            raise
        if done in evaluated or done == stage.num_updates or kept.is_due:
            kept.save(done)
    return _without_adapters(trained, stage).eval()


def _without_adapters(student: NetworkDenoiser, stage: Training) -> NetworkDenoiser:
    """A student whose weights have taken up its adapters."""
    return merged(student) if stage.optimisation.lora_rank else student


def _require_fitting(stage: Training, weighting: BranchWeighting) -> None:
    """Refuse weights that the stage cannot use."""
    if weighting.num_branches not in (1, stage.num_branches):
        raise InputError(
            f"there are {weighting.num_branches} branch weights, and the stage has "
            f"{stage.num_branches} branches (substeps); give one for each branch, or a single one "
            "for plain training"
        )
    if weighting.needs_gradients and stage.start.execution.compile:
        raise InputError(
            "weights learned by gradients need the input of the network's head, which a compiled "
            "network hides; drop compile, or learn them by the rule uncertainty or anneal"
        )


def _require_used(weighting: BranchWeighting, updates: int) -> None:
    """Refuse weights for more updates than an iteration makes."""
    if (weights := weighting.weights()).dim() > 1 and len(weights) != updates:
        raise _other_updates(len(weights))


def _other_updates(weighted: int) -> InputError:
    return InputError(
        f"there are branch weights for {weighted} updates an iteration, and this stage makes "
        "another number; give as many, or the same for all"
    )


def _evaluate(
    evaluations: Evaluations, after: int, student: NetworkDenoiser, stage: Training
) -> None:
    if evaluations.evaluate is not None:
        evaluations.evaluate(after, export_branch(_without_adapters(student, stage)).eval())


@dataclass(frozen=True, slots=True)
class _UpdateResult:
    """What one update did; K losses and weights."""

    losses: list[float]
    weights: list[float]
    loss: float
    gradient_norm: float


def _report(
    iteration: int, iterations: int, lr: float, steps: Sequence[_UpdateResult]
) -> IterationReport:
    return IterationReport(
        iteration=iteration,
        iterations=iterations,
        lr=lr,
        branch_losses=torch.tensor([step.losses for step in steps], dtype=torch.float64),
        weights=torch.tensor([step.weights for step in steps], dtype=torch.float64),
        loss=sum(step.loss for step in steps) / len(steps),
        gradient_norm=max(step.gradient_norm for step in steps),
    )


class _Branches(nn.Module):
    """``student.branches`` as a module, for DistributedDataParallel."""

    def __init__(self, student: NetworkDenoiser) -> None:
        super().__init__()
        self.student = student

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """[B, K, C, H, W]; arguments as of ``branches``."""
        return self.student.branches(*args, **kwargs)


@dataclass(eq=False)
class _Step:
    """One step of the optimiser."""

    stage: Training
    weighting: BranchWeighting
    student: NetworkDenoiser
    optimizer: torch.optim.Optimizer
    team: Team

    def __post_init__(self) -> None:
        self._parameters = [p for p in self.student.parameters() if p.requires_grad]
        self._branches: Branches = self.student.branches
        if self.team.size > 1:
            self._branches = self.team.wrap(_Branches(self.student))

    def __call__(self, iteration: int, index: int, parts: Sequence[Update]) -> _UpdateResult:
        """Make an iteration's update, unless a loss or gradient is not finite.

        Args:
            iteration: Counted from 0.
            index: Of the update in the iteration.
            parts: The update for each part of the batch, whose gradients are added up.
        """
        optimisation, team, count = self.stage.optimisation, self.team, len(parts)
        progress = iteration / self.stage.num_updates
        if count > 1 and self.weighting.learns:  # from the whole batch, before its first gradient
            measured = [self._measure_part(*each, count) for each in enumerate(parts)]
            self._observe(measured, progress)
        self.optimizer.zero_grad(set_to_none=True)
        per_branch, minimised = [], []
        for part, update in enumerate(parts):
            with self._no_sync(count - 1 - part):
                with self._shared_features() as shared, self._dropout(update, part, count):
                    losses = update(self._branches)
                per_branch.append(losses.per_branch.detach())
                if count == 1 and self.weighting.learns:
                    self._observe([self._measure(losses.per_branch, shared)], progress)
                weights = optimisation.scaled(self._weights(index))
                loss = losses.weighted(weights) / count
                loss.backward(retain_graph=losses.keeps_graph)  # type: ignore[no-untyped-call]
            minimised.append(loss.detach())
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        seen = team.mean(torch.stack(per_branch).mean(0))
        total = team.mean(torch.stack(minimised).sum())
        # The only wait for a GPU.
        read = torch.hstack((seen, moved(weights, seen), total, norm.to(seen))).tolist()
        if not all(map(math.isfinite, read)):
            raise self._diagnose(parts, seen, weights, iteration)
        *branches, value, length = read
        optimisation.clip(gradients, length)
        self.optimizer.step()
        return _UpdateResult(branches[: len(seen)], branches[len(seen) :], value, length)

    def _measure_part(self, part: int, update: Update, count: int) -> tuple[Tensor, ...]:
        """What is seen of a part of the batch before it is trained on."""
        with self._shared_features() as shared, self._dropout(update, part, count):
            losses = update(self.student.branches)
        return self._measure(losses.per_branch, shared)

    def _no_sync(self, parts_left: int) -> contextlib.AbstractContextManager[None]:
        """Where more parts follow, gradients are not averaged over the team yet."""
        if self.team.size == 1 or not parts_left:
            return contextlib.nullcontext()
        no_sync: contextlib.AbstractContextManager[None] = self._branches.no_sync()  # type: ignore[attr-defined]
        return no_sync

    def _weights(self, index: int) -> Tensor:
        """[K] of that update of the iteration."""
        weights = self.weighting.weights()
        if weights.dim() == 1:
            return weights
        if index >= len(weights):
            raise _other_updates(len(weights))
        return weights[index]

    def _dropout(
        self, update: Update, part: int, count: int
    ) -> contextlib.AbstractContextManager[None]:
        """The random state of dropout in this update, the same on every call."""
        device = self._parameters[0].device
        own = (*self.team.own_index, *([part] if count > 1 else []))
        return seeded(device, self.stage.seed, Stream.DROPOUT, *update.stream, *own)

    @contextlib.contextmanager
    def _shared_features(self) -> Iterator[list[Tensor]]:
        """The head's input, shared by all branches, once the network has been called."""
        kept: list[Tensor] = []
        if not self.weighting.needs_gradients:
            yield kept
            return
        model = self.student.model
        head = model.get_submodule(model.head_name)
        hook = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            yield kept
        finally:
            hook.remove()

    def _measure(self, losses: Tensor, shared: list[Tensor]) -> tuple[Tensor, ...]:
        """Losses [K]; with shared features also |g_k|^2 and g_k . g_K.

        g_k = d loss_k / d features, backwards through the head alone.
        """
        if not shared:
            return (losses.detach(),)
        # In float32, and one at a time beside the last: they are as large as the features.
        last = torch.autograd.grad(losses[-1], shared[0], retain_graph=True)[0].float()
        squares, products = [], []
        for loss in losses:
            one = torch.autograd.grad(loss, shared[0], retain_graph=True)[0].float()
            squares.append(one.norm().square())
            products.append((one * last).sum())
        return losses.detach(), torch.stack(squares), torch.stack(products)

    def _observe(self, parts: Sequence[tuple[Tensor, ...]], progress: float) -> None:
        """Show the weighting what was measured of all parts of the batch."""
        losses, *rest = (
            self.team.mean(torch.stack(each).mean(0)) for each in zip(*parts, strict=True)
        )
        compared = {}
        if rest:
            # Products add up over the parts and shares, each a mean over its own images.
            norms, agreeing = (each / (self.team.size * len(parts)) for each in rest)
            norms = norms.sqrt()
            tiny = torch.finfo(norms.dtype).tiny
            cosines = agreeing / (norms * norms[-1]).clamp(min=tiny)
            compared = {"gradient_norms": norms, "cosines": cosines}
        self.weighting.observe(Observed(losses=losses, progress=progress, **compared))

    def _diagnose(
        self, parts: Sequence[Update], seen: Tensor, weights: Tensor, iteration: int
    ) -> NonFiniteLossError:
        """What is not finite and by which branch; each is tried alone, with the same draws."""
        where = {"iteration": iteration, **parts[0].where}
        for k, loss in enumerate(seen, 1):
            if not bool(loss.isfinite()):
                return NonFiniteLossError("the loss", **where, branch=k)
        for part, update in enumerate(parts):
            # Eagerly: a compiled graph allows one backward pass, and each branch needs its own.
            with (
                torch.compiler.set_stance("force_eager"),
                self._dropout(update, part, len(parts)),
            ):
                losses: BranchLosses = update(self.student.branches)
                # Weighted as in the update: a large weight may cause the overflow.
                for k, loss in enumerate(weights.to(seen) * losses.per_branch, 1):
                    alone = torch.autograd.grad(
                        loss, self._parameters, retain_graph=True, allow_unused=True
                    )
                    if not all(bool(g.isfinite().all()) for g in alone if g is not None):
                        return NonFiniteLossError("the gradient", **where, branch=k)
        return NonFiniteLossError("the gradient", **where)
