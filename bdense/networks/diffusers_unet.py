"""diffusers' ``UNet2DModel`` as a network F(x; c_noise); needs the ``diffusers`` extra.

Its weights keep diffusers' names below ``unet.``. B batch, C image channels, H x W pixels.
"""

import json
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from bdense.errors import CheckpointError, InputError
from bdense.networks.network import Network, check_inputs, check_labels

# What diffusers writes about a file rather than about a network, or what we choose ourselves.
_NOT_OPTIONS = ("num_train_timesteps", "out_channels")


def require_diffusers() -> None:
    """Say how to install diffusers where it is missing.

    Raises:
        InputError: It is missing.
    """
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"this model needs the diffusers library ({error}); install it with "
            "pip install 'bdense[diffusers]'"
        ) from error


class DiffusersUNet(Network):
    """A ``UNet2DModel`` whose class labels are one-hot rows; the head is its ``conv_out``.

    Args:
        unet: Its options, under diffusers' names.
        num_branches: K.

    Raises:
        CheckpointError: The options do not fit, or need more than a denoiser here can give.
    """

    head_name = "unet.conv_out"

    def __init__(self, unet: Mapping[str, Any], *, num_branches: int = 1) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.options = unet_options(unet)
        self.img_channels = int(self.options["in_channels"])
        self.img_resolution = int(self.options["sample_size"])
        self.label_dim = int(self.options.get("num_class_embeds") or 0)
        self.num_branches = num_branches
        self.prediction_channels = self.img_channels
        try:
            self.unet: Any = UNet2DModel(**self.options, out_channels=self.out_channels)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the options do not fit a UNet2DModel: {error}") from error
        if self.label_dim:
            self.unet.class_embedding = _OneHotEmbedding(self.unet.class_embedding.weight)

    @classmethod
    def build(cls, options: Mapping[str, Any], *, num_branches: int, outputs: int) -> Self:
        """As in ``Network``; ``outputs`` is 1."""
        require_diffusers()
        if set(options) != {"img_channels", "unet"}:
            raise CheckpointError(
                f"a UNet2DModel is described by img_channels and unet, got {sorted(options)}"
            )
        network = cls(options["unet"], num_branches=num_branches)
        if outputs != 1 or network.img_channels != options["img_channels"]:
            raise CheckpointError(
                f"a UNet2DModel of {network.img_channels} image channels predicts as many, not "
                f"{outputs * options['img_channels']}"
            )
        return network

    def describe(self) -> dict[str, Any]:
        config = {"img_channels": self.img_channels, "unet": self.options}
        return {"network": "UNet2DModel", "config": config}

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        num_points: int | Tensor | None = None,
    ) -> Tensor:
        """As in ``Network``; ``noise_labels`` are times in 0..T - 1, or between them."""
        check_inputs(self, x, class_labels, num_points)
        check_labels("augment_labels", augment_labels, 0, len(x))
        if class_labels is None and self.label_dim:
            class_labels = x.new_zeros(1, self.label_dim)
        labels = None if class_labels is None else class_labels.to(x)
        # One for each image, in a floating type: the library takes whole numbers for indices.
        times = noise_labels.to(x).expand(len(x))
        sample: Tensor = self.unet(x, times, class_labels=labels, return_dict=False)[0]
        return sample


class _OneHotEmbedding(nn.Module):
    """``nn.Embedding`` for rows instead of indices, so that no class is a row of zeros."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, labels: Tensor) -> Tensor:
        """[B, label_dim] -> [B, E]."""
        return labels @ self.weight


def unet_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a ``UNet2DModel`` in its ``config.json``, as plain values.

    Raises:
        CheckpointError: It needs more than this project gives a network.
    """
    found = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in _NOT_OPTIONS
    }
    options: dict[str, Any] = json.loads(json.dumps(found))
    side = options.get("sample_size")
    if isinstance(side, list) and len(set(side)) == 1:
        options["sample_size"] = side = side[0]
    options.setdefault("in_channels", 3)
    blocks = [*options.get("down_block_types", ()), *options.get("up_block_types", ())]
    refused = {
        f"sample_size={side!r} (images here are square)": not isinstance(side, int),
        f"out_channels={config.get('out_channels')}, not in_channels={options['in_channels']} "
        "(a predicted variance is not read)": config.get("out_channels", options["in_channels"])
        != options["in_channels"],
        f"time_embedding_type={options.get('time_embedding_type')!r} (a DDPM's is positional)": (
            options.get("time_embedding_type", "positional") != "positional"
        ),
        f"class_embed_type={options.get('class_embed_type')!r} (known is null)": bool(
            options.get("class_embed_type")
        ),
        "blocks that add to the output image (Skip...)": any("Skip" in name for name in blocks),
    }
    for reason, is_so in refused.items():
        if is_so:
            raise CheckpointError(f"this UNet2DModel cannot be a denoiser here: {reason}")
    return options
