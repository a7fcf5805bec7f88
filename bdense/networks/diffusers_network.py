"""What the networks F(x; c_noise) of diffusers share; they need the ``diffusers`` extra.

B batch, K branches, C image channels, H x W pixels.
"""

import inspect
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from bdense.errors import CheckpointError, InputError
from bdense.networks.network import Network, checkpointed

# What diffusers writes about a file rather than about a network, or what we choose ourselves.
_NOT_OPTIONS = ("num_train_timesteps", "out_channels")
_MOST_PIXELS = 4096  # a side; some networks keep values for each place


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


class DiffusersNetwork(Network):
    """A model class of diffusers by its options; weights keep its names below ``part``.

    Args:
        options: As in its ``config.json``.
        num_branches: K.
        outputs: P / C.

    Attributes:
        kind: diffusers' name of the class, and ours in ``NETWORKS``.
        part: What pipelines call the model: its attribute, and its folder.

    Raises:
        CheckpointError: The options do not fit, or need more than a denoiser here can give.
    """

    kind: ClassVar[str]
    part: ClassVar[str]

    def __init__(
        self, options: Mapping[str, Any], *, num_branches: int = 1, outputs: int = 1
    ) -> None:
        import diffusers

        super().__init__()
        self.options = self.accepted(options, outputs=outputs)
        self.img_channels = int(self.options["in_channels"])
        self.img_resolution = int(self.options["sample_size"])
        self.num_branches = num_branches
        self.prediction_channels = outputs * self.img_channels
        try:
            model = getattr(diffusers, self.kind)(**self.options, out_channels=self.out_channels)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise CheckpointError(f"the options do not fit a {self.kind}: {error}") from error
        setattr(self, self.part, model)

    @classmethod
    def accepted(cls, config: Mapping[str, Any], *, outputs: int = 1) -> dict[str, Any]:
        """The options in a ``config.json``, as plain values.

        Raises:
            CheckpointError: It needs more than this project gives a network.
        """
        import diffusers

        known = inspect.signature(getattr(diffusers, cls.kind)).parameters
        found = {
            name: value
            for name, value in config.items()
            # Options of former versions are left out where they are off.
            if not name.startswith("_") and name not in _NOT_OPTIONS and (name in known or value)
        }
        options: dict[str, Any] = json.loads(json.dumps(found))
        side = options.get("sample_size")
        if isinstance(side, list) and len(set(side)) == 1:
            options["sample_size"] = side = side[0]
        channels = options.setdefault("in_channels", cls._channels)
        predicted = config.get("out_channels") or outputs * channels
        refused = {
            f"sample_size={side!r} (images here are square)": not isinstance(side, int),
            f"sample_size={side!r} (at most {_MOST_PIXELS})": isinstance(side, int)
            and side > _MOST_PIXELS,
            f"out_channels={predicted}, not in_channels={channels} times {outputs}": (
                predicted != outputs * channels
            ),
            **cls._refused(options),
        }
        for reason, is_so in refused.items():
            if is_so:
                raise CheckpointError(f"this {cls.kind} cannot be a denoiser here: {reason}")
        return options

    # diffusers' default of in_channels.
    _channels: ClassVar[int] = 4

    @classmethod
    def _refused(cls, options: Mapping[str, Any]) -> dict[str, bool]:
        """Reasons against these options, and whether each holds."""
        return {}

    @classmethod
    def build(cls, options: Mapping[str, Any], *, num_branches: int, outputs: int) -> Self:
        """As in ``Network``."""
        require_diffusers()
        if set(options) != {"img_channels", cls.part}:
            raise CheckpointError(
                f"a {cls.kind} is described by img_channels and {cls.part}, got {sorted(options)}"
            )
        network = cls(options[cls.part], num_branches=num_branches, outputs=outputs)
        if network.img_channels != options["img_channels"]:
            raise CheckpointError(
                f"a {cls.kind} of {network.img_channels} image channels predicts as many, not "
                f"{options['img_channels']}"
            )
        return network

    def checkpoint_blocks(self, on: bool) -> None:
        """As in ``Network``, by the model's own switch."""
        model = getattr(self, self.part)
        if on:
            # diffusers' default is no function that travels to other processes.
            model.enable_gradient_checkpointing(checkpointed)
        else:
            model.disable_gradient_checkpointing()

    def describe(self) -> dict[str, Any]:
        config = {"img_channels": self.img_channels, self.part: self.options}
        return {"network": self.kind, "config": config}


def halved(options: Mapping[str, Any], sizes: str = "block_out_channels") -> dict[str, bool]:
    """Whether the blocks of a U-Net cannot halve its images, with the reason."""
    side, levels = options.get("sample_size"), len(options.get(sizes, ()))
    halvings = max(0, levels - 1)
    reason = f"sample_size={side} cannot be halved {halvings} times, as its {levels} blocks do"
    return {reason: isinstance(side, int) and side % 2**halvings != 0}


def times_of(noise_labels: Tensor, x: Tensor) -> Tensor:
    """One time for each image, in a floating type: diffusers takes whole numbers for indices."""
    return noise_labels.to(x).expand(len(x))
