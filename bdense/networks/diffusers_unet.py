"""diffusers' ``UNet2DModel`` and ``UNet2DConditionModel`` as networks F(x; c_noise).

B batch, L tokens, E channels of a token.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdense.errors import InputError, ShapeError
from bdense.networks.diffusers_network import DiffusersNetwork, halved


class DiffusersUNet(DiffusersNetwork):
    """A ``UNet2DModel`` whose class labels are one-hot rows; the head is its ``conv_out``."""

    kind: ClassVar[str] = "UNet2DModel"
    part: ClassVar[str] = "unet"
    head_name = "unet.conv_out"
    _channels: ClassVar[int] = 3

    def __init__(self, options: Mapping[str, Any], **sizes: int) -> None:
        super().__init__(options, **sizes)
        self.unet: Any
        self.label_dim = int(self.options.get("num_class_embeds") or 0)
        if self.label_dim:
            self.unet.class_embedding = _OneHotEmbedding(self.unet.class_embedding.weight)

    @classmethod
    def _refused(cls, options: Mapping[str, Any]) -> dict[str, bool]:
        blocks = [*options.get("down_block_types", ()), *options.get("up_block_types", ())]
        return {
            **_other_times(options),
            f"class_embed_type={options.get('class_embed_type')!r} (known is null)": bool(
                options.get("class_embed_type")
            ),
            "blocks that add to the output image (Skip...)": any(
                "Skip" in name for name in blocks
            ),
            **halved(options),
        }


def _other_times(options: Mapping[str, Any]) -> dict[str, bool]:
    kind = options.get("time_embedding_type", "positional")
    return {f"time_embedding_type={kind!r} (a DDPM's is positional)": kind != "positional"}


class _OneHotEmbedding(nn.Module):
    """``nn.Embedding`` for rows instead of indices, so that no class is a row of zeros."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, labels: Tensor) -> Tensor:
        """[B, label_dim] -> [B, E]."""
        return labels @ self.weight


# Options of a UNet2DConditionModel for conditions beside its text, which must be off.
_OTHER_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class DiffusersTextUNet(DiffusersNetwork):
    """A ``UNet2DConditionModel``, as of Stable Diffusion 1 and 2: conditioned on text."""

    kind: ClassVar[str] = "UNet2DConditionModel"
    part: ClassVar[str] = "unet"
    latent: ClassVar[bool] = True
    head_name = "unet.conv_out"
    unet: Any

    def __init__(self, options: Mapping[str, Any], **sizes: int) -> None:
        super().__init__(options, **sizes)
        self.text_dim = int(self.options["cross_attention_dim"])

    @classmethod
    def _refused(cls, options: Mapping[str, Any]) -> dict[str, bool]:
        width = options.get("cross_attention_dim")
        others = [name for name in _OTHER_CONDITIONS if options.get(name) is not None]
        return {
            f"cross_attention_dim={width!r} (known is one number)": not isinstance(width, int),
            f"{', '.join(others)} (conditions beside the text)": bool(others),
            **_other_times(options),
            **halved(options),
        }

    def _conditions(
        self, x: Tensor, labels: Tensor | None, *, text: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """``text`` is [B, L, E] or [1, L, E], embeddings of the prompts."""
        if text is None:
            raise InputError(
                "the network is conditioned on text and none is given; give prompts, or the "
                "embedding of the empty one"
            )
        width = self.text_dim
        if text.dim() != 3 or text.shape[2] != width or len(text) not in (1, len(x)):
            raise ShapeError(
                f"text must be [{len(x)}, L, {width}] for {len(x)} images, got {list(text.shape)}"
            )
        return {"encoder_hidden_states": text.to(x).expand(len(x), -1, -1)}

    def example(self) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(1)
        return {"text": torch.randn(1, 2, self.text_dim, generator=draw), **super().example()}
