"""One contract for every teacher and student: D(x; sigma), the expected clean image.

B batch, K branches, C image channels, H x W pixels, N student intervals.
"""

import contextlib
import copy
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from bdense.diffusion.conditions import (
    Classes,
    Condition,
    Conditions,
    NeedsText,
    OneClass,
    Unconditional,
)
from bdense.diffusion.guidance import guided
from bdense.diffusion.preconditioning import (
    EDM,
    PRECONDITIONINGS,
    Preconditioning,
    make_preconditioning,
)
from bdense.diffusion.vp import Levels
from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.execution import Execution, moved
from bdense.knobs import KnobError
from bdense.networks import NETWORKS, Network

if TYPE_CHECKING:
    from bdense.diffusion.sampling import Sampler


class Denoiser(Protocol):
    """Anything that maps a noisy image and its noise level to the expected clean image."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; sigma).

        Args:
            x: [B, C, H, W] image plus sigma times unit noise.
            sigma: 0-dim or [B], any floating dtype and device.

        Returns:
            [B, C, H, W].
        """


class NetworkDenoiser(nn.Module):
    """D^k = c_skip x + c_out F^k(c_in x, c_noise) (Karras et al. 2022, table 1).

    A network with K groups of output channels is a branched denoiser: ``branches`` gives all K
    predictions, calling the module gives branch K, the only one that inference keeps.

    Args:
        model: F.
        precond: c_skip, c_out, c_in and c_noise; None is EDM's.

    Attributes:
        samplers: Those that a student was distilled for, by NFE; none for a teacher.
    """

    model: Network
    samplers: "tuple[Sampler, ...]" = ()

    def __init__(self, model: Network, precond: Preconditioning | None = None) -> None:
        super().__init__()
        self.precond = precond or EDM()
        self.model = model
        self.execution = Execution()
        if model.prediction_channels != model.img_channels * self.precond.outputs:
            raise ShapeError(
                f"the network predicts {model.prediction_channels} channels an image, and "
                f"precond={self.precond.name!r} takes {self.precond.outputs} for each of the "
                f"{model.img_channels} image channels"
            )

    @property
    def num_branches(self) -> int:
        """K, the number of predictions a call makes."""
        return self.model.num_branches

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        side = self.model.img_resolution
        return self.model.img_channels, side, side

    @property
    def label_dim(self) -> int:
        """Number of classes; 0 is unconditional."""
        return self.model.label_dim

    @property
    def step_condition(self) -> bool:
        """Whether every call needs ``num_points`` (SFD-v)."""
        return self.model.step_condition

    def require_levels(self, schedule: Levels) -> None:
        """Raise an ``InputError`` for noise levels that it was not trained for."""
        trained, rounding = self.precond, 1 + 1e-9
        if (
            schedule.sigma_min * rounding < trained.sigma_min
            or schedule.sigma_max > trained.sigma_max * rounding
        ):
            raise InputError(
                f"{schedule.text()} exceed those that this {trained.name} teacher was trained "
                f"for, {trained.sigma_min:.4g} to {trained.sigma_max:.4g}; choose a schedule "
                "inside them (sigma_min, sigma_max)"
            )

    def branches(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        **given: Any,  # noqa: ANN401  of the network
    ) -> Tensor:
        """All K predictions at once.

        Args:
            x: [B, C, H, W].
            sigma: 0-dim or [B].
            class_labels: [B, label_dim] one-hot, only for a conditional network; None is zeros,
                which EDM's networks take for no class in particular.
            given: Other conditions of the network by name, as of ``Network.forward``.

        Returns:
            [B, K, C, H, W]; index K - 1 is the interval's end point.

        Raises:
            ShapeError: Images or labels do not fit the network.
            InputError: ``num_points`` is given or missing against ``step_condition``.
        """
        sigma = moved(sigma, x).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.precond(sigma)
        with self.execution.autocast(x.device):
            out = self.model(c_in * x, c_noise.flatten(), class_labels, **given)
        out = out.to(x.dtype)
        b, c, h, w = x.shape
        # Of each group, only the prediction of the image: improved DDPM's has a variance after it.
        out = out.view(b, self.num_branches, -1, h, w)[:, :, :c]
        denoised: Tensor = (c_skip * x)[:, None] + c_out[:, None] * out
        return denoised

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        **given: Any,  # noqa: ANN401  of the network
    ) -> Tensor:
        """D(x; sigma) of branch K: [B, C, H, W]; arguments as of ``branches``."""
        return self.branches(x, sigma, class_labels, **given)[:, -1]

    @property
    def conditions(self) -> Conditions:
        """The kind of condition that the network takes."""
        return self.conditions_of(None)

    def conditions_of(self, class_index: int | None) -> Conditions:
        """The kind of condition, with that class for all images.

        Raises:
            InputError: The network does not know the class.
        """
        network, has_null = self.model, self.model.has_null_class
        if class_index is not None:
            if not self.label_dim:
                raise InputError(
                    f"class {class_index} was asked of an unconditional network; leave it out"
                )
            return OneClass(self.label_dim, class_index, has_null=has_null)
        if network.conditions is not None or network.text_dim:
            return network.conditions or NeedsText()
        return Classes(self.label_dim, has_null=has_null) if self.label_dim else Unconditional()

    def given(
        self,
        condition: Condition | None = None,
        num_points: int | None = None,
        *,
        guidance: float = 1.0,
        null: Condition | None = None,
    ) -> Denoiser:
        """D(x; sigma) of branch K with its conditions bound, as solvers and samplers take it.

        Args:
            condition: Of the B images that it will be called with; None is unconditional. Called
                with P states of each image, it repeats the condition, see ``call_for_states``.
            num_points: N + 1 of the sampler; passed on where there is a step condition.
            guidance: s of ``guided``, with ``null`` where it is not 1.
            null: What stands for no condition.
        """
        given: dict[str, Any] = {} if condition is None else dict(condition.arguments())
        if self.step_condition:
            given["num_points"] = num_points
        predict = guided(self.forward, guidance, null)
        return functools.partial(call_for_states, predict, given)

    def execute(self, execution: Execution) -> Self:
        """Compute the network this way from now on, in place; copies and students inherit it."""
        execution.require(next(self.parameters()).device)
        self.model.checkpoint_blocks(execution.gradient_checkpointing)
        execution.prepare(self.model)
        self.execution = execution
        return self

    def on(self, device: torch.device) -> Self:
        """A copy on another device, with the same execution."""
        copied = copy.deepcopy(self).to(device)
        if copied.execution != Execution():
            # A copy is not compiled, and tf32 is a setting of each process.
            copied.execute(copied.execution)
        return copied

    def describe(self) -> dict[str, Any]:
        """Plain values, from which ``build_denoiser`` builds the same architecture."""
        return {
            "precond": self.precond.name,
            **self.precond.options(),
            **self.model.describe(),
            "num_branches": self.num_branches,
        }


def call_for_states(
    call: Callable[..., Tensor], given: Mapping[str, Any], x: Tensor, sigma: Tensor
) -> Tensor:
    """A network's call with conditions of B images, on P states of each of them.

    Args:
        call: ``NetworkDenoiser.branches`` or ``forward``.
        given: Conditions by name, tensors with B rows; other values go in as they are.
        x: [B P, C, H, W] in the order (image, state); usually P is 1.
        sigma: 0-dim or [B P].
    """
    repeated = {
        name: value.repeat_interleave(len(x) // len(value), 0)
        if isinstance(value, Tensor) and value.dim() and 0 < len(value) < len(x)
        else value
        for name, value in given.items()
    }
    return call(x, sigma, **repeated)


def build_denoiser(description: dict[str, Any]) -> NetworkDenoiser:
    """A freshly initialised denoiser of the described architecture.

    Raises:
        CheckpointError: There is no such network or preconditioning, or the options do not fit.
    """
    options = dict(description)
    precond, network = options.pop("precond", None), options.pop("network", None)
    config, num_branches = options.pop("config", {}), int(options.pop("num_branches", 1))
    if precond not in PRECONDITIONINGS or network not in NETWORKS:
        raise CheckpointError(
            f"no denoiser is built from precond={precond!r}, network={network!r}; this version "
            f"builds precond in {sorted(PRECONDITIONINGS)}, network in {sorted(NETWORKS)}"
        )
    column = make_preconditioning(precond, options)
    # Weights follow from a checkpoint or an explicit seed, never from the global generator.
    with torch.random.fork_rng(devices=[]):
        try:
            model = NETWORKS[network].build(
                config, num_branches=num_branches, outputs=column.outputs
            )
        except (TypeError, KnobError) as error:
            raise CheckpointError(
                f"the network options do not fit a {network}: {error}"
            ) from error
    return NetworkDenoiser(model, column)


def restore(
    description: dict[str, Any], tensors: dict[str, Tensor], source: str
) -> NetworkDenoiser:
    """The described denoiser with the weights of a file, in eval mode.

    Names and shapes are compared on torch's meta device, before a description can take memory.

    Raises:
        CheckpointError: They differ; names which.
    """
    with without_memory(2 * len(tensors) + 100):
        skeleton = build_denoiser(description)
    expected = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        missing = sorted(expected.keys() - found.keys())[:3]
        extra = sorted(found.keys() - expected.keys())[:3]
        shapes = sorted(k for k in expected.keys() & found.keys() if expected[k] != found[k])[:3]
        raise CheckpointError(
            f"the weights of {source} do not fit the network they describe: "
            f"missing {missing}, not expected {extra}, of another shape {shapes}"
        )
    denoiser = build_denoiser(description)
    denoiser.load_state_dict(tensors)
    return denoiser.eval()


@contextlib.contextmanager
def without_memory(most: int = 10_000) -> Iterator[None]:
    """Build only a network's shapes (torch's meta device), of at most ``most`` modules.

    Raises:
        CheckpointError: It has more, or sizes that no memory has.
    """
    thread, made = threading.get_ident(), itertools.count(1)

    def count(*_: object) -> None:
        if threading.get_ident() == thread and next(made) > most:
            raise CheckpointError(f"the described network has more than {most} modules")

    hook = torch.nn.modules.module.register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"the described network cannot be built ({reason})") from error
    finally:
        hook.remove()
