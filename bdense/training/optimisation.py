"""How a stage is optimised: optimiser, step size, clipping, averaging of the weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.files import plain_json
from bdense.knobs import KnobError, Knobs, knob

Optimizer = Literal["adam", "adamw", "sgd"]
LRSchedule = Literal["constant", "linear", "step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimisationConfig(Knobs):
    """Optimiser, step size, clipping, averaging; every method's config has these knobs."""

    heading: ClassVar[str] = "training"

    optimizer: Optimizer = knob(
        "adam", "optimiser; adamw has a decoupled weight decay, sgd no momentum"
    )
    lr: float = knob(5e-5, "step size", above=0)
    betas: tuple[float, float] = knob(
        (0.9, 0.999), "decay of adam's and adamw's moments", low=0, below=1
    )
    weight_decay: float = knob(0.0, "weight decay of adamw", low=0)
    clip_norm: float | None = knob(
        None, "largest norm of the gradient, which is scaled down to it", above=0, none="no limit"
    )
    lr_schedule: LRSchedule = knob(
        "constant",
        "step size over each stage: constant, linear (falls to 0), or step (a tenth in the second "
        "half)",
    )
    warmup_images: int = knob(
        0, "images over which the step size first rises linearly from 0", low=0
    )
    ema: float | None = knob(
        None,
        "average the student's weights; images after which a weight's share has halved",
        above=0,
        none="no average",
    )
    tail: float | None = knob(
        None,
        "average the student's weights evenly over this last share of each stage, as in 0.25",
        above=0,
        high=1,
        none="no average",
    )
    rescale_weights: bool = knob(
        False, "divide the branch weights by their sum, as clipped gradients see their scale"
    )

    lora_rank: int = knob(
        0,
        "rank of low-rank adapters (LoRA), which are trained in place of a diffusers network's "
        "weights, with the head (needs the extra lora); 0 trains all weights",
        low=0,
    )
    lora_targets: tuple[str, ...] = knob(
        (),
        "layers that get adapters, by the ends of their names",
        metavar="NAME",
        none="attention's to_q, to_k, to_v and to_out.0",
    )
    accumulate: int = knob(
        1,
        "parts of each batch that are computed one after another to save memory; the update is "
        "the whole batch's, but for dropout's masks",
        low=1,
    )

    def __post_init__(self) -> None:
        Knobs.__post_init__(self)
        if self.lora_targets and not self.lora_rank:
            raise KnobError(
                "lora_targets",
                f"{', '.join(self.lora_targets)} need `lora_rank` above 0; give it, or drop them",
            )
        if self.weight_decay and self.optimizer != "adamw":
            raise KnobError(
                "weight_decay",
                f"{self.weight_decay:g} needs `optimizer` adamw; {self.optimizer} has none",
            )
        if self.optimizer == "sgd" and "betas" in self.changed():
            raise KnobError(
                "betas",
                f"{list(self.betas)} need `optimizer` adam or adamw; sgd has no moments",
            )
        if self.tail is not None and self.ema is not None:
            raise KnobError("tail", f"{self.tail:g} and `ema` are two averages; drop one of them")

    def lr_at(self, iteration: int, num_updates: int, batch: int) -> float:
        """The step size of that iteration, counted from 0."""
        lr = self.lr
        if self.lr_schedule == "linear":
            lr *= 1 - iteration / num_updates
        elif self.lr_schedule == "step" and 2 * (iteration - 1) >= num_updates:
            lr /= 10  # after the first iteration that began with half of the images seen
        if self.warmup_images:
            lr *= min(1.0, (iteration + 1) * batch / self.warmup_images)
        return lr

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of these parameters, fused: these alone know ``found_inf``."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, fused=True)
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas, fused=True)
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True
        )

    def clip(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Scale gradients of that 0-dim norm down to ``clip_norm``, in place."""
        if self.clip_norm is not None:
            # torch's own adds 1e-6 to the norm, which the reference of PD does not.
            wide = norm if norm.device.type == "mps" else norm.double()  # MPS has no float64
            factor = (self.clip_norm / wide).clamp(max=1)
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))

    def scaled(self, weights: Tensor) -> Tensor:
        """The branch weights [.., K] as the loss uses them."""
        return weights / weights.sum(-1, keepdim=True) if self.rescale_weights else weights

    @property
    def averages(self) -> bool:
        """Whether the result is an average of the iterates."""
        return self.ema is not None or self.tail is not None

    def share_at(self, iteration: int, num_updates: int, batch: int) -> float:
        """The share of the newest weights in the average, after that iteration.

        Until the tail begins the average is the student itself.
        """
        if self.ema is not None:
            return 1 - math.pow(0.5, batch / self.ema)
        assert self.tail is not None
        first = min(round((1 - self.tail) * num_updates), num_updates - 1)
        return 1 / max(1, iteration - first + 1)

    def changed(self) -> dict[str, Any]:
        """The knobs of optimisation that are off their default, as JSON values.

        A run made before a knob existed is a run at its default.
        """
        defaults = {each.name: each.default for each in fields(type(self))}
        found = {each.name: getattr(self, each.name) for each in fields(OptimisationConfig)}
        return plain_json({k: value for k, value in found.items() if value != defaults[k]})


@dataclass(frozen=True, eq=False)
class Average:
    """A network in eval mode whose weights follow those of a student."""

    network: NetworkDenoiser

    @classmethod
    def of(cls, student: NetworkDenoiser) -> Self:
        """A new one, equal to the student."""
        copied = student.on(next(student.parameters()).device)
        return cls(copied.eval().requires_grad_(False))

    @torch.no_grad()
    def add(self, student: NetworkDenoiser, share: float) -> None:
        """Move by that share of the way to the student's weights."""
        torch._foreach_lerp_(list(self.network.parameters()), list(student.parameters()), share)
