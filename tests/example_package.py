"""Members that another package may bring: a network and a solver."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bdense.diffusion.denoiser import Denoiser
from bdense.diffusion.solvers import Solver, StepNoise, no_noise
from bdense.knobs import knob
from bdense.networks import Network
from bdense.networks.network import check_inputs, check_labels


class PatchNetwork(Network):
    """A transformer's patches in miniature: p x p pixels, and a linear layer each way.

    Args:
        order: Order of the head's rows: ``ppc`` (p, p, channels), as DiT's, or ``cpp``.
    """

    head_name = "head"

    def __init__(
        self,
        *,
        img_channels: int,
        img_resolution: int,
        label_dim: int = 0,
        patch: int = 2,
        order: str = "ppc",
        num_branches: int = 1,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.img_channels, self.img_resolution = img_channels, img_resolution
        self.label_dim, self.patch, self.order = label_dim, patch, order
        self.num_branches, self.prediction_channels = num_branches, outputs * img_channels
        self.head_layout = (patch**2, 1) if order == "ppc" else (1, patch**2)
        self.embed = nn.Linear(patch**2 * img_channels, 16)
        self.level = nn.Linear(1, 16)
        self.classes = nn.Linear(label_dim, 16, bias=False) if label_dim else None
        self.head = nn.Linear(16, patch**2 * self.out_channels)

    @classmethod
    def build(cls, options: Mapping[str, Any], *, num_branches: int, outputs: int) -> Self:
        return cls(**options, num_branches=num_branches, outputs=outputs)

    def describe(self) -> dict[str, Any]:
        names = ("img_channels", "img_resolution", "label_dim", "patch", "order")
        config = {name: getattr(self, name) for name in names}
        return {"network": "PatchNetwork", "config": config}

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        num_points: int | Tensor | None = None,
    ) -> Tensor:
        check_inputs(self, x, class_labels, num_points)
        check_labels("augment_labels", augment_labels, 0, len(x))
        (b, c, side, _), p = x.shape, self.patch
        n = side // p
        # [B, C, n p, n p] -> [B, n n, p p C]
        patches = x.view(b, c, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(b, n * n, -1)
        emb = self.level(noise_labels.to(x).view(-1, 1))
        if self.classes is not None and class_labels is not None:
            emb = emb + self.classes(class_labels.to(x))
        out = self.head(torch.tanh(self.embed(patches) + emb[:, None]))
        if self.order == "ppc":
            tiles = out.view(b, n, n, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        else:
            tiles = out.view(b, n, n, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(b, -1, side, side)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renoise(Solver):
    """Predicts the image and adds noise of the next level, none at the last."""

    name: ClassVar[str] = "renoise"

    strength: float = knob(1.0, "share of the level that is added", low=0)

    def steps(
        self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: StepNoise = no_noise
    ) -> Iterator[Tensor]:
        for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
            added = self.strength * (t_next**2 - sigmas[-1] ** 2).sqrt()
            x = denoise(x, t) + added * noise(i).to(x)
            yield x
