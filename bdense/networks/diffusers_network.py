"""What the networks F(x; c_noise) of diffusers share; they need the ``diffusers`` extra.

B batch, K branches, C image channels, H x W pixels.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from bdense.errors import CheckpointError, extra
from bdense.files import plain_json
from bdense.networks.layers import PositionalEmbedding
from bdense.networks.network import Network, check_inputs, check_labels, checkpointed
from bdense.networks.step_embedding import StepShift, TakesSteps

# What diffusers writes about a file rather than about a network, or what we choose ourselves.
_NOT_OPTIONS = ("num_train_timesteps", "out_channels")
_MOST_PIXELS = 4096  # a side; some networks keep values for each place


def require_diffusers() -> None:
    """Say how to install diffusers where it is missing.

    Raises:
        InputError: It is missing.
    """
    with extra("diffusers", "this model"):
        import diffusers  # noqa: F401


class DiffusersNetwork(TakesSteps, Network):
    """A model class of diffusers by its options; weights keep its names below ``part``.

    Args:
        options: As in its ``config.json``.
        num_branches: K.
        outputs: P / C.
        step_values: Numbers of the step condition, which is added to each of the model's time
            embeddings; 0 has none.

    Attributes:
        kind: diffusers' name of the class, and ours in ``NETWORKS``.
        part: What pipelines call the model: its attribute, and its folder.

    Raises:
        CheckpointError: The options do not fit, or need more than a denoiser here can give.
    """

    kind: ClassVar[str]
    part: ClassVar[str]

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        num_branches: int = 1,
        outputs: int = 1,
        step_values: int = 0,
    ) -> None:
        import diffusers
        from diffusers.models.embeddings import TimestepEmbedding

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
        self.step_condition, self.step_values = step_values > 0, step_values or 1
        if self.step_condition:
            times = [each for each in model.modules() if isinstance(each, TimestepEmbedding)]
            first = times[0].linear_1
            embedding = PositionalEmbedding(first.in_features, endpoint=True)
            self._build_step_embedding(embedding, first.out_features)
            width = first.out_features
            shifts = [StepShift(width, each, each.linear_2.out_features) for each in times]
            self.affine_step = nn.ModuleList(shifts)

    @property
    def inner(self) -> Any:  # noqa: ANN401  a model class of diffusers
        """diffusers' own model."""
        return getattr(self, self.part)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        num_points: int | Tensor | None = None,
        **given: Tensor | None,
    ) -> Tensor:
        """``noise_labels`` are times in 0..T - 1, or between them."""
        check_inputs(self, x, class_labels, num_points)
        check_labels("augment_labels", augment_labels, 0, len(x))
        if self.label_dim and class_labels is None:
            class_labels = x.new_zeros(1, self.label_dim)
        labels = None if class_labels is None else class_labels.to(x)
        conditions = self._conditions(x, labels, **given)
        if self.step_condition:  # what this call adds to its time embeddings
            emb = self._embed_step(num_points, x)
            for shift in self.affine_step:
                assert isinstance(shift, StepShift)
                shift.emb = emb
        # One time for each image, in a floating type: diffusers takes whole numbers for indices.
        times = noise_labels.to(x).expand(len(x))
        sample: Tensor = self.inner(x, timestep=times, return_dict=False, **conditions)[0]
        return sample

    def _conditions(self, x: Tensor, labels: Tensor | None) -> dict[str, Tensor | None]:
        """Arguments of diffusers' model; ``labels`` are None where there are no classes."""
        return {"class_labels": labels}

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
        options = plain_json(found)
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
        require_diffusers()
        steps = {"step_condition", "step_values"} & set(options)
        if set(options) - steps != {"img_channels", cls.part}:
            raise CheckpointError(
                f"a {cls.kind} is described by img_channels and {cls.part}, got {sorted(options)}"
            )
        values = int(options.get("step_values", 1)) if options.get("step_condition") else 0
        network = cls(
            options[cls.part], num_branches=num_branches, outputs=outputs, step_values=values
        )
        if network.img_channels != options["img_channels"]:
            raise CheckpointError(
                f"a {cls.kind} of {network.img_channels} image channels predicts as many, not "
                f"{options['img_channels']}"
            )
        return network

    def checkpoint_blocks(self, on: bool) -> None:
        if on:
            # diffusers' default function cannot be pickled.
            self.inner.enable_gradient_checkpointing(checkpointed)
        else:
            self.inner.disable_gradient_checkpointing()

    def describe(self) -> dict[str, Any]:
        config = {"img_channels": self.img_channels, self.part: self.options}
        if self.step_condition:
            several = {"step_values": self.step_values} if self.step_values > 1 else {}
            config |= {"step_condition": True, **several}
        return {"network": self.kind, "config": config}


def halved(options: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the blocks of a U-Net cannot halve its images, with the reason."""
    side, levels = options.get("sample_size"), len(options.get("block_out_channels", ()))
    halvings = max(0, levels - 1)
    reason = f"sample_size={side} cannot be halved {halvings} times, as its {levels} blocks do"
    return {reason: isinstance(side, int) and side % 2**halvings != 0}
