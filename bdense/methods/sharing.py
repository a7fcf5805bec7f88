"""A distillation shared by several devices of one machine.

Apart from ``bdense.training.parallel``, which knows no distillation.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.methods.sfd import IterationReport, SFDConfig, distill
from bdense.methods.sfd_run import Looks
from bdense.methods.trajectories import Trajectories
from bdense.training.parallel import Team, team_of
from bdense.weights.weighting import BranchWeighting


def distill_on(
    devices: Sequence[torch.device],
    teacher: NetworkDenoiser,
    trajectories: Trajectories,
    config: SFDConfig,
    weights: Tensor | BranchWeighting,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_iteration: Callable[[IterationReport], None] | None = None,
    on_save: Callable[[int], None] | None = None,
    looks: Looks | None = None,
    **options: Any,  # noqa: ANN401  those of distill
) -> NetworkDenoiser:
    """``distill``, each batch shared equally by the devices.

    The result is that of one device but for rounding and, where dropout is on, other masks. What
    another process raises is raised here, and the iteration it failed in is not saved.

    Args:
        devices: The first is where teacher and trajectories are.
        teacher, trajectories, config, weights, options: As of ``distill``.
        checkpoint, checkpoint_seconds: Written by this process alone.
        on_iteration, on_save: Called in this process.
        looks: In this process, while the others wait.

    Raises:
        InputError: The batch is no multiple of the devices.
    """
    team = Team(0, len(devices))
    team.share_of(trajectories.batch)
    # The others are told when there are looks, to wait then.
    waits = Looks(tuple(looks.after), _nobody_looks) if looks is not None else None
    job = (trajectories, config, weights, {"checkpoint": checkpoint, "looks": waits, **options})

    def lead(team: Team) -> NetworkDenoiser:
        def end_iteration(done: IterationReport) -> None:
            team.miss()  # before it is reported or saved
            if on_iteration is not None:
                on_iteration(done)

        return distill(
            teacher,
            trajectories,
            config,
            weights,
            team=team,
            checkpoint=checkpoint,
            checkpoint_seconds=checkpoint_seconds,
            on_iteration=end_iteration,
            on_save=on_save,
            looks=looks,
            **options,
        )

    if len(devices) == 1:
        return lead(team)
    with team_of(devices, _follow, job) as team:
        return lead(team)


def _nobody_looks(after: int, student: NetworkDenoiser) -> None:
    raise AssertionError(f"a follower was to look at its student after {after} iterations")


def _follow(
    team: Team,
    device: torch.device,
    job: tuple[Trajectories, SFDConfig, Tensor | BranchWeighting, dict[str, Any]],
) -> None:
    trajectories, config, weights, options = job
    moved = trajectories.on(device)
    if (start := options.get("start")) is not None:
        options = options | {"start": start.on(device)}
    distill(moved.teacher, moved, config, weights, team=team, **options)
