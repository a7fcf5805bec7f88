"""What a student's calls take of memory: measured on a GPU, counted on tensors without numbers.

On a GPU small batches are measured, and the slope between them carries to the whole one; on a CPU
each operation's tensors are counted as they come and go.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.errors import InputError
from bdense.execution import Execution
from search.spec.model_spec import ModelSpec
from search.worker.engine import execution
from search.worker.row_words import words_of

# A student's way forth and back, with images [B, C, H, W].
Update = Callable[[NetworkDenoiser, Tensor], None]

# glibc keeps blocks up to this size in heaps that stay with the process, and with holes: resident
# memory grew by 1.53 times the live bytes, for 8 x 8 and 32 x 32 networks at batches 16 to 4096,
# and by 1.0 where MALLOC_MMAP_THRESHOLD_ was 64 KiB.
_HEAP_BLOCK, _HEAP_SHARE = 32 * 2**20, 1.55
# Batches that are small enough for any GPU, and far enough apart to tell the slope.
_SMALL, _LARGER = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentCalls:
    """A student's calls, on a GPU for real, else on tensors without numbers.

    Attributes:
        spec: What it is trained and judged for.
        architecture: The teacher's, as ``build_denoiser`` takes it.
        device: Where it runs.
        num_branches: K.
        update: One of its training.
    """

    spec: ModelSpec
    architecture: Mapping[str, Any]
    device: torch.device
    num_branches: int
    update: Update

    @property
    def batch(self) -> int:
        """Training images on one device."""
        return words_of(self.spec).batch // self.spec.resources.team

    @property
    def image(self) -> int:
        """Values of one image."""
        with torch.device("meta"):
            return int(torch.Size(build_denoiser(dict(self.architecture)).image_shape).numel())

    def parameters(self, num_branches: int) -> int:
        """Bytes of a network's parameters and buffers."""
        network = self._network(num_branches, torch.device("meta"))
        tensors = [*network.parameters(), *network.buffers()]
        return sum(tensor.nbytes for tensor in tensors)

    def training(self) -> int:
        """Bytes on the way forth and back, beside parameters and gradients."""
        return self._peak(self.update, self.batch)

    def sampling(self, count: int) -> int:
        """Bytes of a call without gradients, where so many images are drawn."""

        def call(student: NetworkDenoiser, x: Tensor) -> None:
            with torch.no_grad():
                student(x, torch.tensor(1.0))

        return self._peak(call, min(self.spec.evaluation.batch, count))

    def _peak(self, call: Update, batch: int) -> int:
        if self.device.type == "cuda":
            return self._measured(call, batch)
        student = self._network(self.num_branches, torch.device("meta")).train()
        student.execution = Execution(precision=self.spec.precision)
        # A process's levels are numbers that it looks up, and keeps: not in what has none.
        student.precond(torch.ones(1, 1, 1, 1))
        with FakeTensorMode(allow_non_fake_inputs=True):
            student.to_empty(device="cpu")
            live = _LiveBytes()
            # Gradients that are there already are no part of what a call takes.
            for parameter in student.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with live:
                call(student, torch.zeros(batch, *student.image_shape))
        return live.peak

    def _measured(self, call: Update, batch: int) -> int:
        # Compiling takes minutes, and saves memory if anything.
        student = self._network(self.num_branches, torch.device("cpu")).train().to(self.device)
        student.execute(dataclasses.replace(execution(self.spec), compile=False))

        def peak(images: int) -> int:
            x = torch.zeros(images, *student.image_shape, device=self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            call(student, x)
            return torch.cuda.max_memory_allocated(self.device) - before

        try:
            peak(_SMALL)  # makes the gradients, and whatever the libraries keep
            few, more = peak(_SMALL), peak(_LARGER)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{words_of(self.spec).kind} {self.spec.name}: the GPU has no room for {_LARGER} "
                "images; free it, or take a larger one"
            ) from error
        slope = max(0, more - few) / (_LARGER - _SMALL)
        return int(few + slope * max(0, batch - _SMALL))

    def _network(self, num_branches: int, device: torch.device) -> NetworkDenoiser:
        with device:
            return build_denoiser({**self.architecture, "num_branches": num_branches})


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Counts the memory of the tensors that are made while it is on, as they come and go.

    Attributes:
        peak: The most at any time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  an overload of torch's
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._see(given, size=0)
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._see(made, size=_resident(made.untyped_storage().nbytes()))
        return out

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: object) -> None:
            self._now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


def _resident(size: int) -> int:
    """What a block of the CPU's memory takes."""
    return int(_HEAP_SHARE * size) if size <= _HEAP_BLOCK else size
