"""LPIPS as a loss: how unlike two images look to people (Zhang et al. 2018, arXiv 1801.03924).

piq's, as in SFD's second stage: VGG16 with average instead of maximum pooling. Images are scaled
to [0, 1], as piq and VGG16 expect; ``as_reference`` keeps [-1, 1], as the SFD reference does.

B batch, C channels, H x W pixels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdense.errors import ShapeError, extra
from bdense.files import sha256_file
from bdense.models.torch_weights import downloaded_checkpoint, reading_checkpoint

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
# The linear layers on top; the address is piq's own.
LPIPS_URL = (
    "https://github.com/photosynthesis-team/photosynthesis.metrics/releases/download/v0.4.0/"
    "lpips_weights.pt"
)
# Entries of VGG16's features whose outputs are compared: relu1_2, 2_2, 3_3, 4_3, 5_3; and their
# channels.
_LAYERS = {"3": 64, "8": 128, "15": 256, "22": 512, "29": 512}
_FEATURES = "features."
_SIDE = 224


class LPIPS:
    """The distance of two batches of images in [-1, 1], mean over the batch.

    Gradients flow to the first batch; the network's own weights are fixed.
    """

    def __init__(self, *, as_reference: bool = False) -> None:
        """Read the weights, fetched once by way of ``downloaded_checkpoint``.

        Args:
            as_reference: Leave the images in [-1, 1], as SFD's second stage does, to compare
                with its figures.

        Raises:
            InputError: piq is missing, or the weights can be neither found nor fetched nor read.
        """
        with extra("lpips", "LPIPS"):
            from piq import ContentLoss
        self.as_reference = as_reference
        linear, self._linear_sha256 = _linear_weights()
        vgg, self._vgg_sha256 = _vgg16_features()
        # piq.LPIPS is this very loss; but it unpickles its files without restriction, and asks
        # torchvision in a way that is going to be removed.
        self._loss: nn.Module = ContentLoss(
            vgg,
            layers=tuple(_LAYERS),
            weights=linear,
            replace_pooling=True,
            normalize_features=True,
        )

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """0-dim distance of [B, C, H, W] images in [-1, 1] from their targets; C is 1 or 3."""
        distance: Tensor = self._loss(self._prepared(images), self._prepared(targets))
        return distance

    def _prepared(self, images: Tensor) -> Tensor:
        """[B, 3, 224, 224] in the range that the network is given."""
        if images.shape[1] not in (1, 3):
            raise ShapeError(
                f"LPIPS compares images of 1 or 3 channels, got {images.shape[1]}; distil "
                "without it"
            )
        resized = F.interpolate(images, size=_SIDE, mode="bilinear")
        ranged = resized if self.as_reference else (resized + 1) / 2
        return ranged.expand(-1, 3, -1, -1)

    def describe(self) -> dict[str, Any]:
        """JSON values; equal descriptions make equal losses."""
        return {
            "name": "lpips",
            "network": "vgg16, average pooling",
            "side": _SIDE,
            "range": [-1, 1] if self.as_reference else [0, 1],
            "vgg16_sha256": self._vgg_sha256,
            "lpips_sha256": self._linear_sha256,
        }


def _linear_weights() -> tuple[list[Tensor], str]:
    """[1, c, 1, 1] weights of each layer's c channels, and their file's digest."""
    path = downloaded_checkpoint(LPIPS_URL, "LPIPS")
    with reading_checkpoint("LPIPS", path, LPIPS_URL):
        weights = _load(path)
        if [tuple(w.shape) for w in weights] != [(1, c, 1, 1) for c in _LAYERS.values()]:
            raise TypeError("not one weight for each channel of five layers")
    return [w.detach() for w in weights], sha256_file(path)


def _vgg16_features() -> tuple[nn.Module, str]:
    """VGG16 up to its last pooling, and the digest of its file."""
    from torchvision.models import vgg16

    path = downloaded_checkpoint(VGG16_URL, "VGG16")
    with reading_checkpoint("VGG16", path, VGG16_URL):
        weights = _load(path)
        # The classifier, nine tenths of the file, is not needed; nor are weights drawn only to
        # be replaced.
        with torch.device("meta"):
            features: nn.Module = vgg16(init_weights=False).features
        features.load_state_dict(
            {
                name.removeprefix(_FEATURES): value
                for name, value in weights.items()
                if name.startswith(_FEATURES)
            },
            assign=True,
        )
    return features, sha256_file(path)


def _load(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds; the caller looks
    return torch.load(path, map_location="cpu", weights_only=True)
