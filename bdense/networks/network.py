"""What every network promises, and how its last layer branches.

B batch, K branches, C image channels, P channels of one prediction, H x W pixels.
"""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bdense.errors import InputError, ShapeError

# A block's call whose activations are computed again when going backwards.
checkpointed = functools.partial(checkpoint, use_reentrant=False)

# Of the largest output: what rounding may move between a network and its branches.
_ROUNDING = 0.01


class Network(nn.Module, abc.ABC):
    """F(x; c_noise) of a ``NetworkDenoiser``: K predictions in K groups of P output channels.

    A member gives ``build``, ``describe`` and ``forward``, sets the attributes, and is named in
    ``bdense.networks.NETWORKS`` or in an entry point of the group ``bdense.networks``.

    Attributes:
        img_channels: C.
        img_resolution: Side of the square image in pixels.
        label_dim: Number of classes; 0 is unconditional.
        text_dim: Channels of an embedded token of its text, which ``forward`` then needs as
            ``text``; 0 takes none.
        has_null_class: Whether it was trained with hidden classes, so that labels of zeros stand
            for none in particular.
        step_condition: Whether ``forward`` takes, and needs, ``num_points``.
        step_values: Numbers that ``num_points`` gives for each image.
        latent: Whether what it denoises are always latents.
        num_branches: K.
        prediction_channels: P: C, or more where each prediction has a variance behind it.
        head_name: Dotted name of the last layer, whose weight and bias have a row for each output.
        conditions: Its kind of condition (``bdense.diffusion.conditions.Conditions``), if it is
            another than its classes; ``forward`` takes the condition's arguments by name.
        head_layout: (outer, inner): the head's rows are [outer, K P, inner] in this order. (1, 1)
            is a convolution's. A head of patches of p x p pixels has (p * p, 1) where its rows are
            in the order (p, p, channels), and (1, p * p) in the order (channels, p, p).
    """

    img_channels: int
    img_resolution: int
    label_dim: int = 0
    text_dim: int = 0
    has_null_class: bool = False
    step_condition: bool = False
    step_values: int = 1
    latent: ClassVar[bool] = False
    conditions: Any = None
    num_branches: int
    prediction_channels: int
    head_name: str
    head_layout: tuple[int, int] = (1, 1)

    @classmethod
    @abc.abstractmethod
    def build(cls, options: Mapping[str, Any], *, num_branches: int, outputs: int) -> Self:
        """A network with initial weights.

        Args:
            options: What ``describe`` wrote as ``config``.
            num_branches: K.
            outputs: P / C.

        Raises:
            InputError: The options do not fit together.
            TypeError: One is missing, unknown or of the wrong type.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """``network``, its name in ``NETWORKS``, and the ``config`` from which it is built."""

    @abc.abstractmethod
    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        num_points: int | Tensor | None = None,
    ) -> Tensor:
        """F(x; c_noise).

        Args:
            x: [B, C, H, W] preconditioned input.
            noise_labels: [B] or [1] c_noise.
            class_labels: [B, label_dim] or [1, label_dim], one-hot; None is all zeros.
            augment_labels: [B, augment_dim]; None switches them off.
            num_points: N + 1 time stamps of the sampler that asks, one number or [B]; or what a
                one-shot student is told, [B] or [B, step_values].

        Returns:
            [B, K P, H, W].

        Raises:
            ShapeError: Images or labels do not fit the network.
            InputError: A condition is given that the network does not have, or one is missing.
        """

    def example(self) -> dict[str, Any]:
        """What a call of ``forward`` needs beside images and levels, for any number of images."""
        points = torch.full((1, self.step_values), 4.0)
        return {"num_points": points} if self.step_condition else {}

    def checkpoint_blocks(self, on: bool) -> None:
        """Keep only what enters the blocks for going backwards, or everything again.

        Raises:
            InputError: This network has no such blocks.
        """
        if on:
            raise InputError(
                f"gradient_checkpointing is not known of a {type(self).__name__}; leave it out"
            )

    @property
    def out_channels(self) -> int:
        """Channels of all predictions together, K P."""
        return self.num_branches * self.prediction_channels

    def widen(self, num_branches: int) -> Self:
        """A copy with K branches, each of which equals this network.

        Raises:
            InputError: K is below 1, or the network has branches already.
            ShapeError: The head does not match ``head_layout``.
        """
        if num_branches < 1:
            raise InputError(f"num_branches (K) must be at least 1, got {num_branches}")
        if self.num_branches != 1:
            raise InputError(
                f"the network has {self.num_branches} branches already; take one of them out "
                "first with export_branch"
            )
        widened = self._with_branches(
            num_branches, lambda rows: rows.repeat_interleave(num_branches, dim=1)
        )
        widened._require_copies_of(self)
        return widened

    def select(self, branch: int) -> Self:
        """A copy with branch k only, k in 1..K.

        Raises:
            InputError: There is no such branch.
        """
        if not 1 <= branch <= self.num_branches:
            raise InputError(f"branch must lie in 1..{self.num_branches}, got {branch}")
        return self._with_branches(1, lambda rows: rows[:, branch - 1 : branch])

    def combine(self, coefficients: Sequence[float]) -> Self:
        """A copy whose one branch is sum_k c_k F^k; exact, because the head is affine."""

        def combined(rows: Tensor) -> Tensor:
            c = rows.new_tensor(coefficients, dtype=torch.float64)
            return torch.einsum("k,ok...->o...", c, rows.double())[:, None].to(rows)

        return self._with_branches(1, combined)

    def _with_branches(self, num_branches: int, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with that many branches and other rows of the head.

        Args:
            change: Of a weight or bias from [outer, K, P inner, ...] to [outer, K', P inner, ...].
        """
        # Weights follow from a checkpoint or an explicit seed, never from the global generator.
        with torch.random.fork_rng(devices=[]):
            built = self.build(
                self.describe()["config"],
                num_branches=num_branches,
                outputs=self.prediction_channels // self.img_channels,
            )
        built.to(next(self.parameters())).train(self.training)
        state = self.state_dict()
        for name in ("weight", "bias"):
            key = f"{self.head_name}.{name}"
            if key in state or name == "weight":
                state[key] = change(self._rows(key, state[key])).flatten(0, 2)
        built.load_state_dict(state)
        return built

    def _rows(self, name: str, head: Tensor) -> Tensor:
        """[outer, K, P inner, ...] view of the head's weight or bias."""
        outer, inner = self.head_layout
        if len(head) != outer * self.out_channels * inner:
            raise ShapeError(
                f"{name} has {len(head)} rows, and a {type(self).__name__} of "
                f"{self.out_channels} output channels with head_layout {self.head_layout} has "
                f"{outer * self.out_channels * inner}: its branches cannot be told apart; set "
                "head_layout"
            )
        rows_of_one = self.prediction_channels * inner
        return head.reshape(outer, self.num_branches, rows_of_one, *head.shape[1:])

    @torch.no_grad()
    def _require_copies_of(self, original: "Network") -> None:
        """Refuse branches that differ from the original's prediction of a random image."""
        like = next(self.parameters())
        if like.is_meta:
            return
        draw = torch.Generator().manual_seed(0)
        side = self.img_resolution
        x = torch.randn(1, self.img_channels, side, side, generator=draw).to(like)
        inputs = {
            name: value.to(like) if isinstance(value, Tensor) else value
            for name, value in original.example().items()
        }

        def predict(network: Network) -> Tensor:
            """[K, P, H, W] without dropout; not by a compiled call."""
            is_training = network.training
            out = network.eval().forward(x, x.new_full((1,), 0.5), **inputs)
            network.train(is_training)
            return out.view(network.num_branches, -1, side, side)

        expected = predict(original)
        off = (predict(self) - expected).abs().max()
        # Weights that are not finite compare as equal here: training reports them.
        if bool(off > _ROUNDING * expected.abs().max()):
            raise ShapeError(
                f"the branches of a widened {type(self).__name__} differ from the network by "
                f"{float(off):.3g}: its head {self.head_name} does not have the layout "
                f"{self.head_layout} of its rows; set head_layout"
            )


def check_inputs(
    network: Network, x: Tensor, class_labels: Tensor | None, num_points: int | Tensor | None
) -> None:
    """Refuse what the network cannot take."""
    side, channels = network.img_resolution, network.img_channels
    if tuple(x.shape[1:]) != (channels, side, side):
        raise ShapeError(
            f"the network takes images [B, {channels}, {side}, {side}], got {list(x.shape)}; "
            f"resize or pad them, or use a teacher of that size"
        )
    check_labels("class_labels", class_labels, network.label_dim, len(x))
    if num_points is None:
        if network.step_condition:
            raise InputError(
                "the network is conditioned on the number of time stamps and num_points is "
                "missing; give N + 1 for a sampler of N intervals, as in "
                "denoiser.given(num_points=4)"
            )
        return
    if not network.step_condition:
        raise InputError(
            f"num_points={num_points} is given to a network without step condition; leave it "
            "out, or add the layers with bdense.diffusion.step_condition.with_step_condition"
        )
    if isinstance(num_points, Tensor):
        values = network.step_values
        rows = num_points[..., None] if values == 1 and num_points.dim() < 2 else num_points
        if rows.shape[-1] != values or tuple(rows.shape[:-1]) not in ((), (1,), (len(x),)):
            wanted = f"one number or [{len(x)}]" if values == 1 else f"[{len(x)}, {values}]"
            raise ShapeError(f"num_points must be {wanted}, got {list(num_points.shape)}")
    elif network.step_values > 1:
        raise ShapeError(
            f"num_points must be [{len(x)}, {network.step_values}], got the number {num_points}"
        )
    elif num_points < 2:
        raise InputError(
            f"num_points counts the time stamps of a sampler, N + 1, at least 2; got {num_points}"
        )


def check_labels(name: str, labels: Tensor | None, width: int, batch: int) -> None:
    """Refuse labels that are not [batch, width] or [1, width]; None always passes."""
    if labels is None or tuple(labels.shape) in ((batch, width), (1, width)):
        return
    if not width:
        raise ShapeError(
            f"{name} {list(labels.shape)} are given to a network that takes none; leave them out"
        )
    raise ShapeError(
        f"{name} must be [{batch}, {width}] for {batch} images (one-hot rows), "
        f"got {list(labels.shape)}"
    )
