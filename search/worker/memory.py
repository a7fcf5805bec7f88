"""What one row, trial or chain, takes of its device's memory, foretold before anything is spent.

Parameters, gradients and Adam's moments are a multiplication; what a batch takes on its way
through the network, ``search.worker.student_calls`` finds out.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bdense.data.names import split_side
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.methods.sfd import branch_losses, branch_states
from search.spec.model_spec import ModelSpec
from search.spec.study_spec import StudySpec
from search.worker.engine import student_grid
from search.worker.free_memory import free_bytes
from search.worker.row_words import words_of
from search.worker.student_calls import StudentCalls, Update

_MIB, _GIB = 2**20, 2**30
_FLOAT = 4  # bytes
# A process that has loaded all it computes with, measured (resident, torch 2.15); for a GPU, not
# measured, its context and the libraries' workspaces.
_RUNTIME = {"cpu": 870 * _MIB, "cuda": 800 * _MIB}
# bdense.metrics.references.features_of and measure_images take that many at a time.
_FEATURES_BATCH = 256


@dataclass(frozen=True, slots=True)
class ExtractorSize:
    """An extractor in MiB: its weights, and an image on its way; and its features."""

    weights: float
    image: float
    features: int


# Counted as a student's activations are (torch 2.15), in float32 at 299 or 224 pixels a side.
_EXTRACTORS: Mapping[str, ExtractorSize] = MappingProxyType(
    {
        "inception": ExtractorSize(91, 13.2, 2048),
        "dinov2-vit-s-14": ExtractorSize(84, 4.9, 384),
        "dinov2-vit-b-14": ExtractorSize(330, 10.3, 768),
        "dinov2-vit-l-14": ExtractorSize(1161, 16.5, 1024),
        "dinov2-vit-g-14": ExtractorSize(4335, 38.9, 1536),
    }
)
# The small classifiers; a TorchScript file's network is the user's, and taken for one of them.
_SMALL_EXTRACTOR = ExtractorSize(2, 0.3, 64)
# Images of the sets that are known by name; a set of files is taken for one of the larger.
_REFERENCE_IMAGES: Mapping[str, int] = MappingProxyType(
    {
        "digits": 1797,
        "cifar10": 50_000,
        "cifar10-test": 10_000,
        "fashion-mnist": 60_000,
        "fashion-mnist-test": 10_000,
    }
)
_REFERENCE_OF_FILES = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one row, on its device or on each of its GPUs.

    Attributes:
        runtime: What a process takes before it computes.
        teacher: Parameters.
        student: Parameters, all branches.
        gradients: Of the student; those of a team twice, as it exchanges them.
        adam: Two moments of each parameter.
        activations: What training takes on a batch's way forth and back.
        evaluation: What drawing and judging images takes, once Adam has gone.
        look: What it takes on the way, beside Adam, with a copy of one branch; 0 without looks.
    """

    runtime: int
    teacher: int
    student: int
    gradients: int
    adam: int
    activations: int
    evaluation: int
    look: int = 0

    @property
    def total(self) -> int:
        """The most at any time."""
        held = self.runtime + self.teacher + self.student + self.gradients
        return held + max(self._phases.values())

    @property
    def at_the_most(self) -> str:
        """What takes it: training, a look or evaluation."""
        return max(self._phases, key=self._phases.__getitem__)

    @property
    def _phases(self) -> dict[str, int]:
        return {
            "training": self.adam + self.activations,
            "look": self.adam + self.look,
            "evaluation": self.evaluation,
        }

    def line(self, spec: ModelSpec) -> str:
        """For people."""
        row = words_of(spec)
        each = " on each of its GPUs" if spec.resources.team > 1 else ""
        parts = {
            "teacher": self.teacher,
            "parameters": self.student,
            "Adam": self.adam,
            "gradients": self.gradients,
            f"activations of batch {row.batch // spec.resources.team}": self.activations,
            "evaluation, after Adam and activations": self.evaluation,
            **({"a look on the way, after activations": self.look} if self.look else {}),
            "runtime": self.runtime,
        }
        told = ", ".join(f"{what} {_size(size)}" for what, size in parts.items())
        return f"memory: about {_size(self.total)} for one {row.name}{each} ({told})"

    def shortage(self, spec: ModelSpec, device: torch.device, together: int) -> str:
        """Why there is too little room for ``together`` rows on this machine; "" if there is.

        What is lacking comes with the way out.
        """
        row, free = words_of(spec), free_bytes(device)
        gpus = spec.resources.gpus
        if device.type == "cuda":
            # Rows with GPUs of their own do not share one.
            sharing = 1 if gpus == "auto" or gpus >= 1 else int(1 / gpus)
            together = min(together, sharing)
        if free is None or together * self.total <= free:
            return ""
        ways = [self._smaller(spec)]
        if together > 1:
            ways.append(f"run fewer {row.name}s at once ({together} now) by --workers")
            if device.type == "cuda":
                ways.append(f"give each more of a GPU by resources.gpus ({gpus:g} now)")
        elif device.type == "cuda" and self.at_the_most == "training" and row.can_share:
            ways.append(f"share each batch by resources.gpus: {2 * spec.resources.team}")
        where = "the GPU" if device.type == "cuda" else "this machine"
        share = f" for each of {together} {row.name}s at once" if together > 1 else ""
        return (
            f"a {row.name} needs about {_size(self.total)} and {where} has "
            f"{_size(free / together)} free{share}; {', or '.join(ways)}"
        )

    def _smaller(self, spec: ModelSpec) -> str:
        """What to lower."""
        if self.at_the_most == "training":
            row = words_of(spec)
            return f"lower {row.key} ({row.batch} now)"
        key, images = "evaluation.images", spec.evaluation.images
        if self.at_the_most == "look":
            assert isinstance(spec, StudySpec)  # a chain is not looked at on its way
            key, images = "pruning.images", spec.look_images
        return f"lower evaluation.batch ({spec.evaluation.batch} now) or {key} ({images} now)"

    def require_room(self, spec: ModelSpec, device: torch.device, together: int) -> None:
        """Refuse rows that would run out of memory.

        Raises:
            InputError: ``shortage`` has something to say.
        """
        if lacking := self.shortage(spec, device, together):
            raise InputError(f"{words_of(spec).kind} {spec.name}: {lacking}")


def trial_memory(spec: StudySpec, architecture: Mapping[str, Any], device: torch.device) -> Memory:
    """Foretell one trial's memory.

    Args:
        spec: The study.
        architecture: The teacher's, as ``build_denoiser`` takes it.
        device: Where it runs.
    """
    plan = StudentCalls(
        spec=spec,
        architecture=architecture,
        device=device,
        num_branches=spec.student.substeps,
        update=interval_update(spec),
    )
    grid = student_grid(spec)
    # The walk of one batch: recorded rows, or a live teacher's whole path.
    rows = grid.num_rows + 1
    if spec.trajectories.mode == "live":
        rows += len(grid.fine())
    memory = row_memory(plan, images=rows * plan.batch)
    if not spec.looks:
        return memory
    look = memory.teacher + _judging(plan, spec.look_images, ("fid",))
    return dataclasses.replace(memory, look=look)


def row_memory(plan: StudentCalls, *, images: int, moments: int = 2, process: int = 0) -> Memory:
    """Foretell one row's memory.

    Args:
        plan: Its calls.
        images: Float images that wait beside those on their way through the network.
        moments: Of each parameter, kept by the optimiser.
        process: Bytes that its process holds besides.
    """
    team, evaluation = plan.spec.resources.team, plan.spec.evaluation
    teacher, student = plan.parameters(1), plan.parameters(plan.num_branches)
    return Memory(
        runtime=_RUNTIME[plan.device.type] + process,
        teacher=teacher,
        student=student,
        gradients=student * (2 if team > 1 else 1),
        adam=moments * student,
        activations=plan.training() + images * plan.image * _FLOAT,
        evaluation=teacher + _judging(plan, evaluation.images, evaluation.metrics),
    )


def interval_update(spec: StudySpec) -> Update:
    """A student's in one interval; what it costs follows from its shapes."""
    grid = student_grid(spec)

    def forth_and_back(student: NetworkDenoiser, x: Tensor) -> None:
        targets = x.expand(student.num_branches, *x.shape)
        states = branch_states(student.branches, x, grid.interval(grid.trained.start))
        losses = branch_losses(states, targets)
        losses.sum().backward()  # type: ignore[no-untyped-call]

    return forth_and_back


def dataset_bytes(spec: ModelSpec, image: int) -> int:
    """Of a data set of images of that many values, as it lies in memory."""
    return image * _REFERENCE_IMAGES.get(split_side(spec.data or "")[0], _REFERENCE_OF_FILES)


def extractor_size(name: str) -> ExtractorSize:
    """Of an extractor by its name in a study."""
    kind = name.partition(":")[0]
    return _EXTRACTORS.get("dinov2-vit-l-14" if kind == "dinov2" else kind, _SMALL_EXTRACTOR)


def _judging(plan: StudentCalls, count: int, metrics: Collection[str]) -> int:
    """Drawing so many images, and the extractor; they lie in the machine's memory."""
    spec = plan.spec
    extractor = extractor_size(spec.evaluation.extractor)
    weights = int(extractor.weights * _MIB)
    seen = int(extractor.image * _MIB) * min(_FEATURES_BATCH, count)
    if plan.device.type != "cpu":
        return weights + max(plan.sampling(count), seen)
    images = count * plan.image  # a byte each
    # Batches beside the whole they become; features in float32, in float64 and centred.
    features = count * extractor.features * (4 + 8 + 8)
    if set(metrics) != {"fid"}:
        # Those of each reference image beside them, in float32 and in float64.
        source = split_side(spec.data or "")[0]
        real = _REFERENCE_IMAGES.get(source, _REFERENCE_OF_FILES)
        features += real * extractor.features * (4 + 8)
    return weights + max(plan.sampling(count) + 2 * images, images + seen, images + features)


def _size(size: float) -> str:
    if size < _GIB / 10:
        return f"{size / _MIB:.0f} MiB"
    return f"{size / _GIB:.2f} GiB" if size < 10 * _GIB else f"{size / _GIB:.1f} GiB"
