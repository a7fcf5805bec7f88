"""The tiny network of PD's golden files as a ``bdense`` Network, known to ``build_denoiser``."""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.diffusion.preconditioning import Preconditioning
from bdense.networks import NETWORKS, Network


class TinyConv(Network):
    """conv3x3, SiLU, conv3x3 on the image and one channel of t = noise_labels / 1000.

    With the ``Cosine`` preconditioning t is the golden files' atan(sigma) / (pi / 2), whatever
    the process. Images need not be square; ``img_resolution`` is only told on. The goldens' have
    no dropout.
    """

    head_name = "conv2"

    def __init__(
        self,
        *,
        img_channels: int,
        img_resolution: int,
        hidden: int,
        dropout: float = 0.0,
        num_branches: int = 1,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.img_channels = img_channels
        self.img_resolution = img_resolution
        self.hidden = hidden
        self.dropout = dropout
        self.num_branches = num_branches
        self.prediction_channels = outputs * img_channels
        self.conv1 = nn.Conv2d(img_channels + 1, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, self.out_channels, 3, padding=1)

    @classmethod
    def build(cls, options: Mapping[str, Any], *, num_branches: int, outputs: int) -> Self:
        return cls(**options, num_branches=num_branches, outputs=outputs)

    def describe(self) -> dict[str, Any]:
        config = {
            "img_channels": self.img_channels,
            "img_resolution": self.img_resolution,
            "hidden": self.hidden,
            "dropout": self.dropout,
        }
        return {"network": "TinyConv", "config": config}

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        num_points: int | Tensor | None = None,
    ) -> Tensor:
        assert class_labels is None
        assert augment_labels is None
        assert num_points is None
        b, _, h, w = x.shape
        t = (noise_labels / 1000).view(-1, 1, 1, 1).expand(b, 1, h, w)
        hidden = F.silu(self.conv1(torch.cat([x, t.to(x)], dim=1)))
        return self.conv2(F.dropout(hidden, self.dropout, self.training))


# As an entry point would.
NETWORKS._builtin["TinyConv"] = f"{__name__}:TinyConv"


def small_conv(
    precond: str = "edm", *, dropout: float = 0.3, precond_options: Mapping[str, Any] | None = None
) -> NetworkDenoiser:
    """A float32 denoiser of 1 x 8 x 8 images that trains in milliseconds."""
    description = {
        "precond": precond,
        "network": "TinyConv",
        "config": {"img_channels": 1, "img_resolution": 8, "hidden": 4, "dropout": dropout},
        **(precond_options or {}),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build_denoiser(description)
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


def tiny_conv(
    tensors: dict[str, Tensor], prefix: str, precond: Preconditioning, num_branches: int = 1
) -> NetworkDenoiser:
    """A float64 denoiser of the weights ``prefix + "conv1.weight"`` and so on.

    Args:
        tensors: Of a golden file.
        prefix: Such as ``teacher/``.
        precond: What F predicts, and of which process.
        num_branches: K, by which the file's last layer has been widened.
    """
    names = [f"conv{layer}.{name}" for layer in (1, 2) for name in ("weight", "bias")]
    weights = {name: tensors[prefix + name].double() for name in names}
    hidden, inputs = weights["conv1.weight"].shape[:2]
    with torch.random.fork_rng(devices=[]):
        model = TinyConv(
            img_channels=inputs - 1,
            img_resolution=4,
            hidden=hidden,
            num_branches=len(weights["conv2.bias"]) // (inputs - 1),
        )
    model.double().load_state_dict(weights)
    denoiser = NetworkDenoiser(model, precond)
    assert denoiser.num_branches == num_branches
    return denoiser
