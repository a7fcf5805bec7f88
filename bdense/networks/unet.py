"""What the two U-Nets of EDM share: sizes and their checks, labels, the step condition.

B batch, K branches, C image channels, E embedding channels, N student intervals.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.networks.layers import Init, Linear, PositionalEmbedding


class Network(Protocol):
    """F(x; c_noise) as ``NetworkDenoiser`` takes it: a ``torch.nn.Module`` of whatever making.

    Attributes:
        img_channels: C.
        img_resolution: Side of the square image in pixels.
        label_dim: Number of classes; 0 is unconditional.
        step_condition: Whether ``forward`` takes, and needs, ``num_points``.
        out_channels: Of all predictions together, K equal groups.
        head_name: Dotted name of the layer whose weight and bias end in ``out_channels``, which
            branches widen.
    """

    @property
    def img_channels(self) -> int: ...
    @property
    def img_resolution(self) -> int: ...
    @property
    def label_dim(self) -> int: ...
    @property
    def step_condition(self) -> bool: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def head_name(self) -> str: ...

    def describe(self) -> dict[str, Any]:
        """``network``, a key of ``bdense.networks.NETWORKS``, and the ``config`` for it."""
        ...

    def __call__(
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
            num_points: N + 1 time stamps of the sampler that asks, one number or [B].

        Returns:
            [B, out_channels, H, W].
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """Size and options of a U-Net; field names are EDM's.

    Attributes:
        img_resolution: Side of the square image in pixels.
        img_channels: C.
        label_dim: Number of classes; 0 is unconditional.
        augment_dim: Width of EDM's augmentation labels; 0 has none.
        model_channels: Channels at full resolution before ``channel_mult``.
        channel_mult: Channel multiplier of each level, full resolution first.
        channel_mult_emb: E in multiples of ``model_channels``.
        num_blocks: Residual blocks a level (the decoder has one more).
        attn_resolutions: Image sides at which blocks attend.
        dropout: Probability in every block, active in training only.
        label_dropout: Probability that an image's class is hidden, in training only.
        step_condition: Take the student's number of time stamps as a second input (SFD-v).
    """

    network: ClassVar[str]

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_emb: int = 4
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float = 0.1
    label_dropout: float = 0.0
    step_condition: bool = False

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        least = {"img_resolution": 1, "img_channels": 1, "model_channels": 1, "num_blocks": 1}
        least |= {"label_dim": 0, "augment_dim": 0, "channel_mult_emb": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(
                    f"{self.network} {name} must be at least {bound}, got {getattr(self, name)}"
                )
        if self.model_channels % 4 or not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(
                f"{self.network} model_channels must be a multiple of 4 and channel_mult one or "
                f"more numbers from 1 up, got {self.model_channels} and {list(self.channel_mult)}"
            )
        for name in ("dropout", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"{self.network} {name} must lie in 0..1, got {getattr(self, name)}"
                )
        halvings = 2 ** (len(self.channel_mult) - 1)
        if self.img_resolution % halvings:
            raise InputError(
                f"img_resolution={self.img_resolution} cannot be halved "
                f"{len(self.channel_mult) - 1} times; pad the images to a "
                f"multiple of {halvings} or shorten channel_mult"
            )

    def options(self) -> dict[str, Any]:
        """The fields, JSON-able.

        Optional ones are left out where they are off: the fields are part of the digest of a
        denoiser, by which recorded trajectories and runs to resume know their teacher.
        """
        options = asdict(self)
        for name in ("label_dropout", "step_condition"):
            if not options[name]:
                del options[name]
        return options


class UNet(nn.Module):
    """Base of EDM's networks: embeddings are made here, ``enc`` and ``dec`` in the subclass.

    Args:
        config: Size and options.
        num_branches: K, groups of output channels.
        prediction_channels: Channels of one group; None is C. Improved DDPM's networks predict
            a variance besides, in 2 C.
    """

    config_class: ClassVar[type[UNetConfig]]

    def __init__(
        self,
        config: UNetConfig,
        *,
        num_branches: int = 1,
        prediction_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.num_branches = num_branches
        self.prediction_channels = prediction_channels or config.img_channels

    @classmethod
    def build(
        cls, options: Mapping[str, Any], *, num_branches: int, prediction_channels: int
    ) -> Self:
        """The network of ``config.options()``, with initial weights.

        Raises:
            CheckpointError: An option is missing, unknown or of the wrong type.
        """
        try:
            config = cls.config_class(**options)
        except TypeError as error:
            name = cls.config_class.network
            raise CheckpointError(f"the network options do not fit a {name}: {error}") from error
        return cls(config, num_branches=num_branches, prediction_channels=prediction_channels)

    def describe(self) -> dict[str, Any]:
        """``network`` and ``config``, from which ``build`` makes the same architecture."""
        return {"network": self.config.network, "config": self.config.options()}

    @property
    def head_name(self) -> str:
        """Dotted name of the last convolution, the layer that branches widen."""
        raise NotImplementedError

    @property
    def img_channels(self) -> int:
        """C."""
        return int(self.config.img_channels)

    @property
    def img_resolution(self) -> int:
        """Side of the image in pixels."""
        return int(self.config.img_resolution)

    @property
    def label_dim(self) -> int:
        """Number of classes; 0 is unconditional."""
        return int(self.config.label_dim)

    @property
    def step_condition(self) -> bool:
        """Whether the network is told the student's number of time stamps."""
        return bool(self.config.step_condition)

    @property
    def out_channels(self) -> int:
        """Channels of all predictions together."""
        return self.num_branches * self.prediction_channels

    def _build_step_embedding(
        self, embedding: PositionalEmbedding, emb_channels: int, init: Init
    ) -> None:
        """SFD-v's layers from N + 1 to the embedding that every block gets (Zhou et al. 2024)."""
        self.map_step = embedding
        self.map_step_layer0 = Linear(embedding.num_channels, emb_channels, init=init)
        self.map_step_layer1 = Linear(emb_channels, emb_channels, init=init)

    def _embed_step(self, num_points: int | Tensor | None, x: Tensor) -> Tensor | None:
        """[1 or B, E], or None for a network without step condition."""
        if num_points is None:
            return None
        points = torch.as_tensor(num_points, dtype=x.dtype, device=x.device).reshape(-1)
        emb = self._arrange(self.map_step(points))
        emb = F.silu(self.map_step_layer0(emb))
        return F.silu(self.map_step_layer1(emb))

    def _arrange(self, embedding: Tensor) -> Tensor:
        """The order in which this network takes cosines and sines."""
        return embedding

    def _labels(self, class_labels: Tensor | None, x: Tensor) -> Tensor:
        """[B or 1, label_dim] class labels, zeros where none are given or where hidden."""
        if class_labels is None:
            class_labels = x.new_zeros(1, self.label_dim)
        labels = class_labels.to(x)
        if self.training and self.config.label_dropout:
            shown = torch.rand(len(x), 1, device=x.device) >= self.config.label_dropout
            labels = labels * shown.to(labels)
        return labels

    def _check(
        self,
        x: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        num_points: int | Tensor | None,
    ) -> None:
        check_inputs(self, x, class_labels, num_points)
        check_labels("augment_labels", augment_labels, self.config.augment_dim, len(x))


def check_inputs(
    network: Network, x: Tensor, class_labels: Tensor | None, num_points: int | Tensor | None
) -> None:
    """Refuse what the network cannot take, in the user's words.

    Raises:
        ShapeError: Images or labels are of another size.
        InputError: ``num_points`` is given or missing against the network's step condition.
    """
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
        if num_points.dim() > 1 or num_points.numel() not in (1, len(x)):
            raise ShapeError(
                f"num_points must be one number or [{len(x)}], got {list(num_points.shape)}"
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
