"""How a network is computed: number format, compilation, memory layout, copies to its device.

Preconditioning, solvers, losses and the optimiser always use float32.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from bdense.errors import InputError
from bdense.knobs import KnobError, Knobs, knob

# torch is imported where it is used: the command's help reads this module.
if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Precision = Literal["float32", "tf32", "bfloat16", "float16", "fast"]
CompileMode = Literal["default", "reduce-overhead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution(Knobs):
    """How a denoiser calls its network."""

    heading: ClassVar[str] = "hardware"

    precision: Precision = knob(
        "float32",
        "number format of the network's calls: tf32 is float32 whose products a GPU rounds to 10 "
        "bits; with bfloat16 and float16 the weights and their updates stay float32; tf32 and "
        "float16 need a GPU; fast is bfloat16 with compile and channels_last, which pay off on "
        "a GPU",
    )
    compile: bool = knob(
        False,
        "torch.compile the network: takes minutes, pays off in long runs, moves numbers by "
        "rounding",
    )
    compile_mode: CompileMode = knob(
        "default",
        "torch.compile's mode: reduce-overhead replays kernels as CUDA graphs, for networks so "
        "small that a GPU waits for their launches; takes more GPU memory, and does nothing on a "
        "CPU",
    )
    channels_last: bool = knob(
        False,
        "keep tensors in NHWC order, which a GPU's tensor cores prefer; slower on CPUs, moves "
        "numbers by rounding",
    )

    gradient_checkpointing: bool = knob(
        False,
        "keep only what enters a network's blocks in training, and compute them again when going "
        "backwards: less memory for about a third more time, the same numbers",
    )

    def require(self, device: "torch.device") -> None:
        """Refuse settings that the device does not support, or that exclude each other."""
        self.require_compatible()
        if self.is_compiled and not any(map(shutil.which, _compilers(device))):
            own, needed = self._compiling, " or ".join(_compilers(device))
            raise InputError(
                f"{own} needs the compiler {needed}, which is missing here; install it, or leave "
                f"{own} out"
            )
        if self.precision in ("tf32", "float16") and device.type != "cuda":
            raise InputError(
                f"precision {self.precision} needs a CUDA device, not {device.type}; use float32 "
                "or bfloat16"
            )

    def require_compatible(self) -> None:
        """Refuse settings that exclude each other on any device, by a ``KnobError``."""
        if self.compile_mode != "default" and not self.is_compiled:
            raise KnobError(
                "compile_mode", f"{self.compile_mode} needs `compile`; set it, or leave both out"
            )
        if self.is_compiled and self.gradient_checkpointing:
            raise KnobError(
                self._compiling,
                "decides itself what is kept for going backwards, and `gradient_checkpointing` "
                "decides it too; drop one of them",
            )

    def require_training(self, what: str) -> None:
        """Refuse to train in float16."""
        if self.precision == "float16":
            raise InputError(
                f"{what} is not trained in float16, whose small gradients vanish; use bfloat16"
            )

    @property
    def is_compiled(self) -> bool:
        """Whether the network is compiled."""
        return self.compile or self.precision == "fast"

    @property
    def _compiling(self) -> str:
        """The knob that compiles."""
        return "compile" if self.compile else "precision"

    @property
    def is_channels_last(self) -> bool:
        """Whether tensors are in NHWC order."""
        return self.channels_last or self.precision == "fast"

    @property
    def dtype(self) -> "torch.dtype | None":
        """Autocast's type; None without autocast."""
        import torch

        half = {"float16": torch.float16, "bfloat16": torch.bfloat16, "fast": torch.bfloat16}
        return half.get(self.precision)

    def prepare(self, network: "nn.Module") -> None:
        """Set the network's memory layout and compile it, in place; calls ``set_products``."""
        import torch

        self.set_products()
        # cuDNN times its kernels at each new shape, and takes the fastest: not always the same.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        if self.is_channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.is_compiled:
            network.compile(mode=self.compile_mode)

    def set_products(self) -> None:
        """Set whether a GPU rounds float32 products to tf32; holds for the whole process."""
        import torch

        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"

    def autocast(self, device: "torch.device") -> "torch.autocast":
        """The context of a network call."""
        import torch

        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None)


def moved(values: "Tensor", like: "Tensor") -> "Tensor":
    """``values`` in the type and on the device of another tensor, without a wait for a GPU.

    A plain copy from the CPU waits until the GPU has done all that it was given before.
    """
    if values.device.type != "cpu" or like.device.type in ("cpu", "mps"):
        return values.to(like)
    values = values.to(like.dtype)
    if like.device.type == "cuda":
        values = values.pin_memory()
    return values.to(like.device, non_blocking=True)


def kept_on(values: "Tensor", device: "torch.device") -> "Tensor":
    """``values`` on a GPU, if they take a quarter of its free memory or less; else as they are."""
    import torch

    if device.type != "cuda" or 4 * values.nbytes > torch.cuda.mem_get_info(device)[0]:
        return values
    return values.to(device)


def taken(values: "Tensor", index: "Tensor") -> "Tensor":
    """``values[index]`` by an index on the CPU, without a wait for a GPU that has the values."""
    if values.is_cuda:
        index = index.pin_memory().to(values.device, non_blocking=True)
    return values[index]


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 products exactly inside the context, whatever a denoiser has set."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    Execution().set_products()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _compilers(device: "torch.device") -> list[str]:
    """Compilers that torch.compile can use: C++ on a CPU, C for Triton's kernels on a GPU."""
    if device.type == "cuda":
        told, usual = os.environ.get("CC"), ["gcc", "clang"]
    else:
        told, usual = os.environ.get("CXX"), ["clang++" if sys.platform == "darwin" else "g++"]
    # The variable may hold a wrapper and options, such as "ccache g++".
    return told.split()[:1] if told else usual
