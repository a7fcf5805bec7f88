"""How a network is computed: number format, compilation, memory layout.

Preconditioning, solvers, losses and the optimiser always use float32.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from bdense.errors import InputError

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a denoiser calls its network.

    Attributes:
        precision: ``float32``; ``tf32``, float32 whose products a GPU rounds to 10 bits; or
            autocast to ``bfloat16`` or ``float16``, parameters and their updates in float32.
        compile: Use torch.compile; it takes minutes, which long runs win back.
        channels_last: NHWC memory, which tensor cores prefer; slower on CPUs.
    """

    precision: Precision = "float32"
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(
                f"precision {self.precision!r} is unknown; choose from {list(PRECISIONS)}"
            )

    def require(self, device: torch.device) -> None:
        """Refuse settings that the device does not support.

        Raises:
            InputError: tf32 or float16 without a GPU, or compilation without a compiler.
        """
        if self.compile and not any(map(shutil.which, _compilers(device))):
            raise InputError(
                f"compile needs the compiler {' or '.join(_compilers(device))}, which is missing "
                "here; install it, or leave compile out"
            )
        if self.precision in ("tf32", "float16") and device.type != "cuda":
            raise InputError(
                f"precision {self.precision} needs a CUDA device, not {device.type}; use float32 "
                "or bfloat16"
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """Autocast's type; None without autocast."""
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision)

    def prepare(self, network: nn.Module) -> None:
        """Set the network's memory layout and compile it, in place; calls ``set_products``."""
        self.set_products()
        if self.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile:
            network.compile()

    def set_products(self) -> None:
        """Set whether a GPU rounds float32 products to tf32; holds for the whole process."""
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a network call."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 products exactly inside the context, whatever a denoiser has set."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    Execution().set_products()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _compilers(device: torch.device) -> list[str]:
    """Compilers that torch.compile can use: C++ on a CPU, C for Triton's kernels on a GPU."""
    if device.type == "cuda":
        told, usual = os.environ.get("CC"), ["gcc", "clang"]
    else:
        told, usual = os.environ.get("CXX"), ["clang++" if sys.platform == "darwin" else "g++"]
    # The variable may hold a wrapper and options, such as "ccache g++".
    return told.split()[:1] if told else usual
