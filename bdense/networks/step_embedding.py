"""SFD-v's embedding of N + 1, the number of time stamps of a student of N intervals.

B batch, E embedding channels.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bdense.execution import moved
from bdense.networks.layers import XAVIER, Init, Linear, PositionalEmbedding


class TakesSteps(nn.Module):
    """A network that may have the layers from N + 1 to an embedding (Zhou et al. 2024)."""

    step_values: int
    map_step: PositionalEmbedding
    map_step_layer0: Linear
    map_step_layer1: Linear

    def _build_step_embedding(
        self, embedding: PositionalEmbedding, emb_channels: int, init: Init = XAVIER
    ) -> None:
        self.map_step = embedding
        channels = self.step_values * embedding.num_channels
        self.map_step_layer0 = Linear(channels, emb_channels, init=init)
        self.map_step_layer1 = Linear(emb_channels, emb_channels, init=init)

    def _embed_step(self, num_points: int | Tensor | None, x: Tensor) -> Tensor | None:
        """[1 or B, E], or None for a network without step condition."""
        if num_points is None:
            return None
        if isinstance(num_points, Tensor):
            points = moved(num_points, x).reshape(-1)
        else:
            points = x.new_full((1,), num_points)
        emb = self._arrange(self.map_step(points)).view(-1, self.map_step_layer0.in_features)
        emb = F.silu(self.map_step_layer0(emb))
        return F.silu(self.map_step_layer1(emb))

    def _arrange(self, embedding: Tensor) -> Tensor:
        """The order in which this network takes cosines and sines."""
        return embedding


class StepShift(Linear):
    """What N + 1 adds to an embedding of the time; nothing before it is trained.

    Args:
        emb_channels: E of the step's embedding.
        embedding: Makes the time's.
        out_features: Its channels.

    Attributes:
        emb: [1 or B, E] of the next call; None adds nothing.
    """

    def __init__(self, emb_channels: int, embedding: nn.Module, out_features: int) -> None:
        super().__init__(emb_channels, out_features, init=Init(weight=0.0))
        self.emb: Tensor | None = None
        embedding.register_forward_hook(self._shift)  # a method, so that a copy has its own

    def __getstate__(self) -> dict[str, Any]:
        # Each copy has its own input; and torch copies no tensor that has a gradient's history.
        return {**self.__dict__, "emb": None}

    def draw(self) -> None:
        """Start at random instead."""
        XAVIER.fill(self.weight, self.bias, fan_in=self.in_features, fan_out=len(self.weight))

    def _shift(self, embedding: nn.Module, given: object, output: Tensor) -> Tensor:
        return output if self.emb is None else output + self(self.emb).to(output)
