"""A transformer of patches in miniature, as another package may bring it: its head is linear."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from bdense.networks import Network
from bdense.networks.network import check_inputs, check_labels


class PatchNetwork(Network):
    """Patches of p x p pixels, a linear layer each way, and the noise level between them.

    Args:
        order: Of the head's rows: ``ppc`` (p, p, channels), as DiT's, or ``cpp``.
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
