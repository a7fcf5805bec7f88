"""diffusers' ``DiTTransformer2DModel`` as a network F(x; c_noise) (Peebles & Xie 2022).

B batch, C image channels, p pixels a side of a patch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from bdense.errors import CheckpointError
from bdense.networks.diffusers_network import DiffusersNetwork


class DiT(DiffusersNetwork):
    """A DiT whose class labels are one-hot rows; a row of zeros is its null class.

    Labels are never dropped at random: diffusers' model does so in training, in every block
    another, by the global generator. The head is a linear layer with rows (p, p, channels).
    """

    kind: ClassVar[str] = "DiTTransformer2DModel"
    part: ClassVar[str] = "transformer"
    latent: ClassVar[bool] = True
    head_name = "transformer.proj_out_2"
    has_null_class = True
    transformer: Any

    def __init__(self, options: Mapping[str, Any], **sizes: int) -> None:
        super().__init__(options, **sizes)
        self.label_dim = int(self.options["num_embeds_ada_norm"])
        self.head_layout = (int(self.options.get("patch_size", 2)) ** 2, 1)
        for block in self.transformer.transformer_blocks:
            embedder = block.norm1.emb.class_embedder
            embedder.dropout_prob = 0.0
            table = embedder.embedding_table.weight
            if len(table) != self.label_dim + 1:
                raise CheckpointError(
                    f"this {self.kind} embeds {len(table)} classes, not {self.label_dim} and none"
                )
            embedder.embedding_table = _OneHotOrNull(table)

    @classmethod
    def _refused(cls, options: Mapping[str, Any]) -> dict[str, bool]:
        side, patch = options.get("sample_size"), options.get("patch_size", 2)
        classes = options.get("num_embeds_ada_norm")
        return {
            f"num_embeds_ada_norm={classes!r} (its number of classes)": (
                not isinstance(classes, int)
            ),
            f"sample_size={side} cannot be cut into patches of {patch}": (
                isinstance(side, int) and side % patch != 0
            ),
        }

    def _conditions(self, x: Tensor, labels: Tensor | None) -> dict[str, Tensor | None]:
        assert labels is not None
        return {"class_labels": labels.expand(len(x), -1)}


class _OneHotOrNull(nn.Module):
    """``nn.Embedding`` for rows instead of indices; its last row is that of no class."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, labels: Tensor) -> Tensor:
        """[B, label_dim] -> [B, E]."""
        null = 1 - labels.sum(1, keepdim=True)
        return labels @ self.weight[:-1] + null * self.weight[-1]
