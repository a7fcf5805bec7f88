"""A chain of rounds of progressive distillation, N -> N / K -> ..: each student the next teacher.

Each round is kept as soon as it is done, and a round that was stopped goes on where it was: the
same call with the same folder carries on.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.preconditioning import DDPM, Cosine
from bdense.diffusion.sampling import Sampler
from bdense.diffusion.schedules import Levels
from bdense.diffusion.solvers import DDIM
from bdense.errors import CheckpointError, InputError
from bdense.methods.progressive import (
    Batches,
    PDConfig,
    UpdateReport,
    distill_round,
    reparameterised,
    run_identity,
)
from bdense.models.cards import write_card
from bdense.models.store import load_denoiser, load_tensors, save_denoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Numbers of steps, each the one before divided by K.

    Attributes:
        first: N of the teacher.
        last: N of the last student.
        substeps: K.
    """

    first: int
    last: int
    substeps: int = 2

    def __post_init__(self) -> None:
        if self.substeps < 2:
            raise InputError(f"substeps (K) of a chain must be at least 2, got {self.substeps}")
        if not 1 <= self.last < self.first:
            raise InputError(
                f"a chain goes down from the teacher's steps to 1 or more, got {self.first} to "
                f"{self.last}"
            )
        reached = [self.first]
        while reached[-1] > self.last and reached[-1] % self.substeps == 0:
            reached.append(reached[-1] // self.substeps)
        if reached[-1] != self.last:
            usable = [n for n in reached[1:] if n >= 1]
            ways = f"end at {' or '.join(map(str, usable))}, or " if usable else ""
            power = max(1, round(math.log(self.first / self.last, self.substeps)))
            fitting = self.last * self.substeps**power
            raise InputError(
                f"{self.first} steps do not become {self.last} by dividing by "
                f"K={self.substeps} again and again; {ways}start at {fitting}"
            )

    @property
    def students(self) -> tuple[int, ...]:
        """N of each round's student, from first / K down to last."""
        steps = [self.first // self.substeps]
        while steps[-1] > self.last:
            steps.append(steps[-1] // self.substeps)
        return tuple(steps)


@dataclass(frozen=True, eq=False)
class Round:
    """One finished round.

    Attributes:
        steps: N of its student.
        student: The teacher's size, in eval mode.
        path: Its file.
    """

    steps: int
    student: NetworkDenoiser
    path: Path


def pd_sampler(schedule: Levels, steps: int, *, clip: bool = False) -> Sampler:
    """How a teacher or student of progressive distillation draws images in that many steps."""
    return Sampler(num_intervals=steps, afs=False, schedule=schedule, solver=DDIM(clip=clip))


def distill_chain(
    teacher: NetworkDenoiser,
    batches: Batches,
    schedule: Levels,
    chain: Chain,
    config: PDConfig,
    weights: Tensor,
    folder: Path,
    *,
    prediction_type: str | None = None,
    clip_samples: bool = False,
    metadata: Mapping[str, Any] | None = None,
    checkpoint_seconds: float = 60.0,
    on_update: Callable[[int, UpdateReport], None] | None = None,
    on_save: Callable[[int, int], None] | None = None,
) -> Iterator[Round]:
    """Distil round by round, and yield each student as it is done.

    What cannot be is refused at once, before the first round is asked for.

    Args:
        teacher: One branch, on the device to train on.
        batches: What to learn from; the rounds draw their own.
        schedule: Levels of all grids.
        chain: Numbers of steps.
        config: Of each round; its ``substeps`` are the chain's.
        weights: [num_branches] of each round.
        folder: Where rounds are kept, as 00032.safetensors with its model card.
        prediction_type: What the students' networks predict, where it is not what the teacher's
            does: a round without fewer steps first converts it, and is yielded too.
        clip_samples: Whether the students draw with clipped predictions.
        metadata: What else the students' files say.
        checkpoint_seconds: Of the round that is under way.
        on_update: Called after every update with the round's steps; what it raises ends the
            run, as of ``distill_round``.
        on_save: Called with the round's steps and the updates done, after each of its saves.

    Raises:
        InputError: Something does not fit together.
        CheckpointError: The folder holds rounds of another chain; says which.
        NonFiniteLossError: A round diverged; those before it stay.
    """
    if config.substeps != chain.substeps:
        raise InputError(
            f"the rounds' substeps={config.substeps} are not the chain's K={chain.substeps}"
        )
    teacher.require_levels(schedule)
    predicted = prediction_type or prediction_of(teacher)
    converts = predicted != prediction_of(teacher)
    start = reparameterised(teacher, str(predicted)) if converts else None
    rounds = _Rounds(
        batches=batches,
        schedule=schedule,
        folder=folder,
        # Not the last number of steps: a chain that goes on further keeps its rounds.
        identity={
            **run_identity(teacher, batches, schedule, config, weights),
            "first": chain.first,
            "prediction_type": predicted,
            "clip_samples": clip_samples,
        },
        clip_samples=clip_samples,
        metadata=metadata or {},
        checkpoint_seconds=checkpoint_seconds,
        on_update=on_update,
        on_save=on_save,
    )
    for steps in ((chain.first,) if converts else ()) + chain.students:
        rounds.require_own(steps)
    return _distilled(rounds, teacher, start, chain, config, weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rounds:
    """What the rounds of one chain share."""

    batches: Batches
    schedule: Levels
    folder: Path
    identity: Mapping[str, Any]
    clip_samples: bool
    metadata: Mapping[str, Any]
    checkpoint_seconds: float
    on_update: Callable[[int, UpdateReport], None] | None
    on_save: Callable[[int, int], None] | None

    def path(self, steps: int) -> Path:
        """Of the student of that many steps."""
        return self.folder / f"{steps:05d}.safetensors"

    def require_own(self, steps: int) -> None:
        """Refuse a file of another chain's.

        Raises:
            CheckpointError: It is one; says in what they differ.
        """
        path = self.path(steps)
        if not path.exists():
            return
        stored = load_tensors(path)[1].get("identity", {})
        keys = stored.keys() | self.identity.keys()
        if differing := sorted(key for key in keys if stored.get(key) != self.identity.get(key)):
            raise CheckpointError(
                f"{path} is a round of another chain (differs in: {', '.join(differing)}); give "
                "this one a folder of its own or delete that one's files"
            )

    def bring(
        self,
        teacher: NetworkDenoiser,
        steps: int,
        config: PDConfig,
        weights: Tensor,
        start: NetworkDenoiser,
    ) -> Round:
        """A round from its file, or trained and kept now."""
        path = self.path(steps)
        unfinished = path.with_suffix(".training.safetensors")
        self.require_own(steps)
        if path.exists():
            student, _ = load_denoiser(path)
            student.to(next(teacher.parameters()).device).execute(teacher.execution)
        else:
            student = self._train(path, unfinished, teacher, steps, config, weights, start)
        unfinished.unlink(missing_ok=True)
        return Round(steps, student, path)

    def _train(
        self,
        path: Path,
        unfinished: Path,
        teacher: NetworkDenoiser,
        steps: int,
        config: PDConfig,
        weights: Tensor,
        start: NetworkDenoiser,
    ) -> NetworkDenoiser:
        def on_update(done: UpdateReport) -> None:
            if self.on_update is not None:
                self.on_update(steps, done)

        def on_save(done: int) -> None:
            if self.on_save is not None:
                self.on_save(steps, done)

        branched = distill_round(
            teacher,
            self.batches,
            self.schedule,
            steps,
            config,
            weights,
            start=start,
            checkpoint=unfinished,
            checkpoint_seconds=self.checkpoint_seconds,
            on_update=on_update,
            on_save=on_save,
        )
        student = export_branch(branched)
        about = {
            "kind": "student",
            "method": "pd" if config.num_branches == 1 else "pd-bdense",
            "weights": weights.tolist(),
            "training": asdict(config),
            **self.metadata,
            "sampler": pd_sampler(self.schedule, steps, clip=self.clip_samples).describe(),
            "identity": self.identity,
        }
        # The weights last: a round that has them is done.
        write_card(path, student, about)
        save_denoiser(path, student, about)
        return student


def _distilled(
    rounds: _Rounds,
    teacher: NetworkDenoiser,
    start: NetworkDenoiser | None,
    chain: Chain,
    config: PDConfig,
    weights: Tensor,
) -> Iterator[Round]:
    """The rounds one by one; ``start`` of the converting one, where there is one."""
    if start is not None:
        alone = replace(config, substeps=1, num_branches=1)
        converted = rounds.bring(teacher, chain.first, alone, torch.ones(1), start)
        yield converted
        teacher = converted.student
    for steps in chain.students:
        done = rounds.bring(teacher, steps, config, weights, teacher)
        yield done
        teacher = done.student


def prediction_of(denoiser: NetworkDenoiser) -> str | None:
    """What a network on a VP process predicts; None for others."""
    precond = denoiser.precond
    return precond.prediction_type if isinstance(precond, Cosine | DDPM) else None
