"""Between images and the space that a denoiser works in: pixels, or latents of an autoencoder.

B batch, C channels, H x W pixels; [B, c, h, w] latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from bdense.errors import is_out_of_memory


class Codec(Protocol):
    """Images in [-1, 1] to a denoiser's space and back."""

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, c, h, w]."""

    def decode(self, latents: Tensor) -> Tensor:
        """[B, c, h, w] to [B, C, H, W], nominally in [-1, 1]."""

    def to(self, device: torch.device) -> Self:
        """The same, there."""

    def describe(self) -> dict[str, Any]:
        """JSON values for people."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """A denoiser of the images themselves."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def to(self, device: torch.device) -> "Pixels":
        return self

    def describe(self) -> dict[str, Any]:
        return {"class": "pixels"}


@dataclass(eq=False)
class Autoencoder:
    """Latents of a variational or quantising autoencoder of diffusers, scaled for the denoiser.

    Attributes:
        model: ``AutoencoderKL`` or ``VQModel``, in eval mode.
        scaling_factor, shift_factor: z = (latents - shift) * scale.
        slice: Images at a time, which bounds the memory; halved where it is not enough.
    """

    model: Any
    scaling_factor: float
    shift_factor: float = 0.0
    slice: int = 8

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The mean of the latents' distribution, or the latents before they are quantised."""
        found = self._in_slices(self._encoded, images)
        return (found - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """A quantising autoencoder quantises first."""
        unscaled = latents / self.scaling_factor + self.shift_factor
        return self._in_slices(lambda part: self.model.decode(part).sample, unscaled)

    def to(self, device: torch.device) -> "Autoencoder":
        self.model.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        return {
            "class": type(self.model).__name__,
            "scaling_factor": self.scaling_factor,
            **({"shift_factor": self.shift_factor} if self.shift_factor else {}),
        }

    def _encoded(self, images: Tensor) -> Tensor:
        out = self.model.encode(images)
        latents: Tensor = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return latents

    def _in_slices(self, call: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """The call on some images at a time; of fewer, if the memory is not enough for them."""
        values = values.to(next(self.model.parameters()))
        while True:
            try:
                return torch.cat([call(part) for part in torch.split(values, self.slice)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.slice == 1:
                    raise
            self.slice //= 2
            if values.device.type == "cuda":
                torch.cuda.empty_cache()
