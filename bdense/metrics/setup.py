"""What a FID was measured with, beside its conditions: so that it can be measured again."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import torch

from bdense.arguments import require_types
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.metrics.references import Reference
from bdense.models.store import denoiser_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a FID was measured. None: a file of an earlier version does not say.

    Attributes:
        weights_sha256: ``denoiser_sha256`` of the model.
        data_sha256: Digest of the reference set's pixels; None for a file of statistics, whose
            name has its digest.
        batch: Images drawn at a time.
        device: Name of the GPU, or kind of the CPU.
        guidance: When sampling, of a student that was distilled without; None is its own.

    Raises:
        InputError: A value has another type, or a count is below 1.
    """

    weights_sha256: str | None = None
    data_sha256: str | None = None
    numerics: int | None = None
    batch: int | None = None
    execution: Execution = field(default_factory=Execution)
    device: str | None = None
    threads: int | None = None
    guidance: float | None = None
    torch: str | None = None

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("batch", "threads"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise InputError(f"Setup: {name} must be at least 1, got {count}")

    @classmethod
    def of(cls, model: NetworkDenoiser, reference: Reference, batch: int, numerics: int) -> Self:
        """Of a model on its device, in this process."""
        device = next(model.parameters()).device
        names = {"cpu": f"{platform.machine()} CPU", "mps": "Apple GPU"}
        return cls(
            weights_sha256=denoiser_sha256(model),
            data_sha256=reference.data_sha256,
            numerics=numerics,
            batch=batch,
            # Gradient checkpointing does not change the images.
            execution=replace(model.execution, gradient_checkpointing=False),
            device=names.get(device.type) or torch.cuda.get_device_name(device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """From ``as_dict``, of another version too: what is not known here is dropped."""
        known = {each.name: stored[each.name] for each in fields(cls) if each.name in stored}
        return cls(**known | {"execution": Execution.read(known.get("execution", {}))})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def differing(self, other: "Setup") -> list[str]:
        """Names of what differs, where both say it."""
        names = [each.name for each in fields(self)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return [name for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]]
