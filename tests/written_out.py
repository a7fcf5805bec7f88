"""Methods with one branch, written out."""

import copy

import torch

from bdense.diffusion.conditions import Condition
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.guidance import guided
from bdense.methods.progressive import PDStage
from tests.contracts.methods import ALL


def four(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values.to(like).view(-1, 1, 1, 1)


def plain_round(
    stage: PDStage,
    scales: tuple[float, float] = (1.0, 1.0),
    null: Condition | None = None,
) -> tuple[NetworkDenoiser, list[float]]:
    """A round of progressive distillation, K = 2: the student and the norms of its gradients.

    ``scales`` are the guidance of teacher and student.
    """
    student, grid = copy.deepcopy(stage.start), stage.levels.grid(2 * stage.steps)
    ask = guided(stage.teacher, scales[0], null)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
    norms = []
    for j in range(stage.num_updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - j / stage.num_updates)
        batch = stage.batch(j, ALL)
        told, like = batch.condition.arguments(), batch.clean
        t_0, t_1, t_2 = (grid[2 * batch.interval + k] for k in range(3))
        x = batch.clean + four(t_0, like) * batch.noise
        with torch.no_grad():
            D_0 = ask(x, t_0, **told)
            D_1 = ask(D_0 + four(t_1 / t_0, like) * (x - D_0), t_1, **told)
        # r = 1 / t; numerator and denominator times t_2, which may be 0.
        scale = 1 - t_2 / t_0
        share_0, share_1 = (t_2 / t_1 - t_2 / t_0) / scale, (1 - t_2 / t_1) / scale
        target = four(share_0, like) * D_0 + four(share_1, like) * D_1
        predicted = guided(student, scales[1], null)(x, t_0, **told)
        error = (predicted - target).square().mean(dim=(1, 2, 3))
        loss = ((t_0**-2).clamp(min=1).to(like) * error).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        if norms[-1] > stage.config.clip_norm:
            for g in gradients:
                g.mul_(stage.config.clip_norm / norms[-1])
        optimizer.step()
    return student, norms
