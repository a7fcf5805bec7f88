"""The one training loop: of teachers, and of every stage of every distillation method.

S updates an iteration, K branches.
"""

import contextlib
import functools
import math
import time
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

# Reading losses makes a GPU idle, so those of up to UNREAD iterations are read at once; of fewer
# where they take more than UNREAD_SECONDS, so that a stop is seen soon and few batches are kept.
UNREAD = 16
UNREAD_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class IterationReport:
    """What one iteration did.

    Attributes:
        iteration: 0-based.
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
    unread: int | None = None,
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
        on_iteration: Called with every iteration's report once it is read; an exception ends the
            run, a ``StoppedError`` after a save.
        on_save: Called after each save with the iterations done.
        evaluations: Intermediate evaluations; each is saved before.
        unread: Iterations whose losses are read together, at most; None is ``UNREAD`` on a GPU,
            else 1. They are read before each save.

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
        unread=unread,
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
    unread: int | None = None,
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
    reports = _Reports(stage, step, on_iteration, unread)
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
        reports.add(iteration, lr, steps)
        if iteration == first:
            _require_used(weighting, len(steps))
        del steps, updates  # with the graphs that they may hold
        if average is not None:
            where = iteration, stage.num_updates, stage.batch_size
            average.add(student, stage.optimisation.share_at(*where))
        done = iteration + 1
        is_saved = done in evaluated or done == stage.num_updates or kept.is_due
        # Before the save: a caller that has lost its right to the checkpoint ends the run here.
        try:
            team.raise_peer_error()
            if is_saved or reports.are_due:
                reports.read()
        except StoppedError:
            kept.save(done)
            raise
        if is_saved:
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
    if weighting.needs_gradients and stage.start.execution.is_compiled:
        raise InputError(
            "weights learned by gradients need the input of the network's head, which a compiled "
            "network hides; drop compile (and precision fast, which compiles), or learn them by "
            "the rule uncertainty or anneal"
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
class _Updated:
    """What one update did, before it is read.

    Attributes:
        parts: The update, for each part of its batch.
        branch_losses, weights: [K] on the device.
        figures: [2K + 2] on the device: these two, the loss, the norm of the gradient.
        keeps_graph: Whether the update holds a graph, with its memory.
    """

    parts: Sequence[Update]
    branch_losses: Tensor
    weights: Tensor
    figures: Tensor
    keeps_graph: bool


@dataclass(eq=False)
class _Reports:
    """Reports of iterations whose figures are still on the device."""

    stage: Training
    step: "_Step"
    on_iteration: Callable[[IterationReport], None] | None
    unread: int | None

    def __post_init__(self) -> None:
        on_gpu = self.step.device.type == "cuda"
        self._most = self.unread or (UNREAD if on_gpu else 1)
        self._due = 1  # until the time of an iteration is known
        self._waiting: list[tuple[int, float, list[_Updated]]] = []
        self._last = time.monotonic()

    def add(self, iteration: int, lr: float, updates: list[_Updated]) -> None:
        """Keep what that iteration did."""
        self._waiting.append((iteration, lr, updates))

    @property
    def are_due(self) -> bool:
        """Whether it is time to read them, or they hold too much memory to wait."""
        *_, last = self._waiting[-1]
        return len(self._waiting) >= self._due or any(each.keeps_graph for each in last)

    def read(self) -> None:
        """Read them, and pass each on.

        Raises:
            NonFiniteLossError: By the first update whose figures are not finite.
        """
        waiting, self._waiting = self._waiting, []
        # The only wait for a GPU.
        figures = torch.stack([each.figures for *_, steps in waiting for each in steps]).tolist()
        now = time.monotonic()
        seconds, self._last = (now - self._last) / len(waiting), now
        self._due = max(1, min(self._most, int(UNREAD_SECONDS / max(seconds, 1e-9))))
        stopped: StoppedError | None = None
        rows = iter(figures)
        for iteration, lr, updates in waiting:
            read = [next(rows) for _ in updates]
            for row, updated in zip(read, updates, strict=True):
                if not all(map(math.isfinite, row)):
                    raise self.step.diagnose(updated, iteration)
            try:
                if self.on_iteration is not None:
                    self.on_iteration(_report(iteration, self.stage.num_updates, lr, read))
            except StoppedError as error:
                stopped = error  # not yet: a run that is not finite further on is not saved
        if stopped is not None:
            raise stopped


def _report(
    iteration: int, iterations: int, lr: float, figures: Sequence[Sequence[float]]
) -> IterationReport:
    table = torch.tensor(figures, dtype=torch.float64)
    branches = (table.shape[1] - 2) // 2
    return IterationReport(
        iteration=iteration,
        iterations=iterations,
        lr=lr,
        branch_losses=table[:, :branches],
        weights=table[:, branches:-2],
        loss=sum(row[-2] for row in figures) / len(figures),
        gradient_norm=max(row[-1] for row in figures),
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
        self.device = self._parameters[0].device
        # torch's own switch: from the first update that is not finite, steps are left out, and
        # the weights stay as they were before it.
        self._failed = torch.zeros((), device=self.device)
        self.optimizer.found_inf = self._failed  # type: ignore[attr-defined]
        self._branches: Branches = self.student.branches
        if self.team.size > 1:
            self._branches = self.team.wrap(_Branches(self.student))

    def __call__(self, iteration: int, index: int, parts: Sequence[Update]) -> _Updated:
        """Make an iteration's update, unless a loss or gradient is not finite.

        Nothing here waits for a GPU.

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
        figures = torch.hstack((seen, moved(weights, seen), total, norm.to(seen)))
        self._failed.logical_or_(~figures.isfinite().all())
        optimisation.clip(gradients, norm)
        self.optimizer.step()
        return _Updated(parts, seen, weights, figures, losses.keeps_graph)

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
        own = [self.team.rank] if self.team.size > 1 else []
        own += [part] if count > 1 else []
        return seeded(self.device, self.stage.seed, Stream.DROPOUT, *update.stream, *own)

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

    def diagnose(self, updated: _Updated, iteration: int) -> NonFiniteLossError:
        """What is not finite and by which branch; each is tried alone, with the same draws.

        A stage that goes on by itself, as consistency distillation's target does, has done so.
        """
        parts, weights = updated.parts, updated.weights
        where = {"iteration": iteration, **parts[0].where}
        for k, loss in enumerate(updated.branch_losses, 1):
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
                for k, loss in enumerate(weights.to(losses.per_branch) * losses.per_branch, 1):
                    alone = torch.autograd.grad(
                        loss, self._parameters, retain_graph=True, allow_unused=True
                    )
                    if not all(bool(g.isfinite().all()) for g in alone if g is not None):
                        return NonFiniteLossError("the gradient", **where, branch=k)
        return NonFiniteLossError("the gradient", **where)
