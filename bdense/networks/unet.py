"""What the two U-Nets of EDM share: sizes and their checks, labels, the step condition.

B batch, K branches, C image channels, E embedding channels, N student intervals.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bdense.errors import InputError
from bdense.knobs import Knobs, knob
from bdense.networks.layers import UNetBlock
from bdense.networks.network import Network, check_inputs, check_labels
from bdense.networks.step_embedding import TakesSteps


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig(Knobs):
    """Size and options of a U-Net; field names are EDM's.

    Whole numbers for dropout stay whole: the fields are part of a denoiser's digest.
    """

    network: ClassVar[str]

    img_resolution: int = knob(help="side of the square image in pixels", low=1)
    img_channels: int = knob(help="C", low=1)
    label_dim: int = knob(0, "number of classes; 0 is unconditional", low=0)
    augment_dim: int = knob(0, "width of EDM's augmentation labels; 0 has none", low=0)
    model_channels: int = knob(help="channels at full resolution before channel_mult", low=1)
    channel_mult: tuple[int, ...] = knob(
        help="channel multiplier of each level, full resolution first", low=1
    )
    channel_mult_emb: int = knob(4, "E in multiples of model_channels", low=1)
    num_blocks: int = knob(help="residual blocks a level (the decoder has one more)", low=1)
    attn_resolutions: tuple[int, ...] = knob(help="image sides at which blocks attend")
    dropout: int | float = knob(
        0.1, "probability in every block, active in training only", low=0, high=1
    )
    label_dropout: int | float = knob(
        0.0, "probability that an image's class is hidden, in training only", low=0, high=1
    )
    step_condition: bool = knob(
        False, "take the student's number of time stamps as a second input (SFD-v)"
    )
    step_values: int = knob(
        1, "numbers in that input; above 1 for a one-shot student of several coordinates", low=1
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.model_channels % 4 or not self.channel_mult:
            raise InputError(
                f"{self.network} model_channels must be a multiple of 4 and channel_mult one or "
                f"more numbers from 1 up, got {self.model_channels} and {list(self.channel_mult)}"
            )
        halvings = 2 ** (len(self.channel_mult) - 1)
        if self.img_resolution % halvings:
            raise InputError(
                f"img_resolution={self.img_resolution} cannot be halved "
                f"{len(self.channel_mult) - 1} times; pad the images to a "
                f"multiple of {halvings} or shorten channel_mult"
            )

    def options(self) -> dict[str, Any]:
        """The fields as plain values.

        Optional ones are left out where they are off: the fields are part of the digest of a
        denoiser, by which recorded trajectories and runs to resume know their teacher.
        """
        options = asdict(self)
        for name, off in (("label_dropout", 0), ("step_condition", False), ("step_values", 1)):
            if options[name] == off:
                del options[name]
        return options


class UNet(TakesSteps, Network):
    """Base of EDM's networks.

    Args:
        config: Size and options.
        num_branches: K.
        prediction_channels: P; None is C. Improved DDPM's networks predict a variance too, in 2 C.
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
        self.img_channels = config.img_channels
        self.img_resolution = config.img_resolution
        self.label_dim = config.label_dim
        self.has_null_class = config.label_dim > 0 and config.label_dropout > 0
        self.step_condition = config.step_condition
        self.step_values = config.step_values
        self.num_branches = num_branches
        self.prediction_channels = prediction_channels or config.img_channels
        self._build()

    @classmethod
    def build(cls, options: Mapping[str, Any], *, num_branches: int, outputs: int) -> Self:
        """``options`` are ``config.options()``."""
        config = cls.config_class(**options)
        channels = outputs * config.img_channels
        return cls(config, num_branches=num_branches, prediction_channels=channels)

    def describe(self) -> dict[str, Any]:
        return {"network": self.config.network, "config": self.config.options()}

    # ---- construction, in EDM's order: a seed means the same network ----

    def _build(self) -> None:
        """Make all layers."""
        raise NotImplementedError

    def _attends(self, side: int, index: int) -> bool:
        """Whether that block of the decoder attends."""
        return side in self.config.attn_resolutions

    def _after_down(self, side: int, cout: int) -> None:
        """What follows the halving of the encoder's features to that side."""

    def _after_level(self, level: int, side: int, cout: int) -> None:
        """What follows a level of the decoder."""

    def _build_levels(self, first: nn.Module, cout: int, **options: Any) -> int:  # noqa: ANN401
        """Fill ``enc``, which begins with ``first``, and ``dec``; returns the last channels.

        ``options`` are those that all blocks of this network have.
        """
        config = self.config
        emb_channels = config.model_channels * config.channel_mult_emb
        options |= {"dropout": config.dropout, "step_condition": config.step_condition}

        def made(cin: int, cout: int, **place: Any) -> UNetBlock:  # noqa: ANN401
            return UNetBlock(cin, cout, emb_channels, **options, **place)

        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        skips = [cout]
        for level, mult in enumerate(config.channel_mult):
            side = config.img_resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = first
            else:
                self.enc[f"{side}x{side}_down"] = made(cout, cout, down=True)
                skips.append(cout)
                self._after_down(side, cout)
            for index in range(config.num_blocks):
                cin, cout = cout, config.model_channels * mult
                attention = side in config.attn_resolutions
                block = made(cin, cout, attention=attention)
                self.enc[f"{side}x{side}_block{index}"] = block
                skips.append(cout)
        last = len(config.channel_mult) - 1
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            side = config.img_resolution >> level
            if level == last:
                self.dec[f"{side}x{side}_in0"] = made(cout, cout, attention=True)
                self.dec[f"{side}x{side}_in1"] = made(cout, cout)
            else:
                self.dec[f"{side}x{side}_up"] = made(cout, cout, up=True)
            for index in range(config.num_blocks + 1):
                cin, cout = cout + skips.pop(), config.model_channels * mult
                block = made(cin, cout, attention=self._attends(side, index))
                self.dec[f"{side}x{side}_block{index}"] = block
            self._after_level(level, side, cout)
        return cout

    def checkpoint_blocks(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, UNetBlock):
                module.gradient_checkpointing = on

    # ---- a call ----

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        num_points: int | Tensor | None = None,
    ) -> Tensor:
        """F(x; c_noise); see ``Network``."""
        check_inputs(self, x, class_labels, num_points)
        check_labels("augment_labels", augment_labels, self.config.augment_dim, len(x))
        emb = self._embed(x, noise_labels, class_labels, augment_labels)
        emb_step = self._embed_step(num_points, x)
        return self._decode(*self._encode(x, emb, emb_step), emb, emb_step)

    def _embed(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """[B or 1, E] of noise level and labels."""
        raise NotImplementedError

    def _encode(
        self, x: Tensor, emb: Tensor, emb_step: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The encoder's last features and all its skip connections."""
        skips: list[Tensor] = []
        image = x
        for name, module in self.enc.items():
            if name.endswith("_aux_down"):
                image = module(image)
            elif name.endswith("_aux_skip"):
                x = skips[-1] = x + module(image)
            elif name.endswith("_aux_residual"):
                x = skips[-1] = image = (x + module(image)) / math.sqrt(2)
            else:
                x = module(x, emb, emb_step) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)
        return x, skips

    def _decode(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, emb_step: Tensor | None
    ) -> Tensor:
        """[B, out_channels, H, W]."""
        raise NotImplementedError

    def _labels(self, class_labels: Tensor | None, x: Tensor) -> Tensor:
        """[B or 1, label_dim] class labels, zeros where none are given or where hidden."""
        if class_labels is None:
            class_labels = x.new_zeros(1, self.label_dim)
        labels = class_labels.to(x)
        if self.training and self.config.label_dropout:
            shown = torch.rand(len(x), 1, device=x.device) >= self.config.label_dropout
            labels = labels * shown.to(labels)
        return labels
