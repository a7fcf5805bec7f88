"""The running average of a student's weights."""

from dataclasses import dataclass
from typing import Self

import torch

from bdense.diffusion.denoiser import NetworkDenoiser


@dataclass(frozen=True, eq=False)
class Average:
    """A network in eval mode whose weights follow those of a student."""

    network: NetworkDenoiser

    @classmethod
    def of(cls, student: NetworkDenoiser) -> Self:
        """A new one, equal to the student."""
        copied = student.on(next(student.parameters()).device)
        return cls(copied.eval().requires_grad_(False))

    @torch.no_grad()
    def add(self, student: NetworkDenoiser, share: float) -> None:
        """Move by that share of the way to the student's weights."""
        torch._foreach_lerp_(list(self.network.parameters()), list(student.parameters()), share)
