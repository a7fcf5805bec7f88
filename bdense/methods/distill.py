"""Run a method: train its stages one after the other, each student the next stage's teacher."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bdense.diffusion.branches import export_branch
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, samplers_from
from bdense.errors import CheckpointError, InputError
from bdense.files import UNFINISHED, plain_json, require_plain
from bdense.methods.method import Inputs, Method, MethodConfig, Stage, StagePlan
from bdense.models.card import write_card
from bdense.models.store import (
    denoiser_sha256,
    load_denoiser,
    other_run,
    save_denoiser,
)
from bdense.training.loop import Evaluations, IterationReport, train
from bdense.training.lora import require_adaptable
from bdense.weights.weighting import BranchWeighting, FixedWeights


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedStage:
    """A stage that is done.

    Attributes:
        student: One branch, the teacher's size, in eval mode.
        weighting: The branch weights as they ended; None where the student was read from its file.
        path: Its file; None where none is kept.
        branched: The student with all its branches, where these are kept and it was trained now.
    """

    plan: StagePlan
    student: NetworkDenoiser
    sampler: Sampler
    weighting: BranchWeighting | None
    metadata: Mapping[str, Any]
    path: Path | None
    branched: NetworkDenoiser | None = None


@dataclass(frozen=True)
class _Run:
    """What the stages of one run share; most fields as of ``distill``.

    Attributes:
        train: Trains a stage, with its checkpoint.
        identity: What kept students say of their run; empty where none are kept.
        replace: Whether students of other runs may be replaced.
    """

    method: Method
    config: MethodConfig
    weighting: Callable[[], BranchWeighting]
    inputs: Inputs
    folder: Path | None
    name: str
    checkpoint: Path | None
    metadata: Mapping[str, Any]
    train: Callable[[StagePlan, Stage, BranchWeighting, Path | None], NetworkDenoiser]
    identity: Mapping[str, Any]
    keep_branches: bool
    replace: bool

    def path(self, plan: StagePlan) -> Path | None:
        """The file of that stage's student."""
        if self.folder is None:
            return None
        return self.folder / f"{plan.name or self.name}.safetensors"

    def is_kept(self, plan: StagePlan) -> bool:
        """Whether that stage was done before."""
        path = self.path(plan)
        if path is None or not path.exists() or self._lacks_branches(plan, path):
            return False
        return not other_run(path, self.identity)

    def stages(
        self, plans: Sequence[StagePlan], teacher: NetworkDenoiser, first: Stage | None
    ) -> Iterator[TrainedStage]:
        """Each from its file, or trained and kept now; ``first`` is the first, if not kept."""
        for plan in plans:
            path = self.path(plan)
            unfinished = self.checkpoint
            if path is not None and unfinished is None:
                unfinished = path.with_suffix(UNFINISHED)
            if path is not None and self.is_kept(plan):
                done = self._kept(plan, path, teacher)
            else:
                stage = first or self.method.stage(plan, teacher, self.config, self.inputs)
                done = self._trained(plan, stage, path, unfinished)
            first = None
            if path is not None and unfinished is not None:
                unfinished.unlink(missing_ok=True)
            yield done
            teacher = done.student

    def require_own(self, plan: StagePlan, path: Path) -> None:
        """Refuse to replace another file than a student of this run with what is to be kept."""
        keeps = self.keep_branches and plan.branched
        for each in (path, branches_path(path)) if keeps else (path,):
            require_plain(each)
            if not self.replace and each.exists() and (reason := other_run(each, self.identity)):
                raise CheckpointError(
                    f"{each} {reason}; choose another place, delete that file, or replace it "
                    "(--force)"
                )
        if not self.replace and path.exists() and self._lacks_branches(plan, path):
            raise InputError(
                f"{path} was kept without its branches; delete it, choose another place, or "
                "replace it (--force)"
            )

    def _lacks_branches(self, plan: StagePlan, path: Path) -> bool:
        if not (self.keep_branches and plan.branched):
            return False
        beside = branches_path(path)
        return not beside.exists() or bool(other_run(beside, self.identity))

    def _kept(self, plan: StagePlan, path: Path, teacher: NetworkDenoiser) -> TrainedStage:
        """A stage that was done before."""
        student, metadata = load_denoiser(path)
        student.to(next(teacher.parameters()).device).execute(teacher.execution)
        return TrainedStage(
            plan=plan,
            student=student,
            sampler=samplers_from(metadata)[0],
            weighting=None,
            metadata=metadata,
            path=path,
        )

    def _trained(
        self, plan: StagePlan, stage: Stage, path: Path | None, unfinished: Path | None
    ) -> TrainedStage:
        """A stage that is trained, resumed from its checkpoint, and kept."""
        weighting = self.weighting() if plan.branched else FixedWeights(torch.ones(1))
        trained = self.train(plan, stage, weighting, unfinished)
        student = export_branch(trained)
        branched = trained if self.keep_branches and plan.branched else None
        metadata = self._metadata(stage, weighting)
        student.samplers = tuple(samplers_from(metadata))
        if path is not None:
            if self.replace:  # delete the branches of the previous student
                branches_path(path).unlink(missing_ok=True)
            keep_student(path, student, branched, metadata)
        return TrainedStage(
            plan=plan,
            student=student,
            sampler=stage.sampler,
            weighting=weighting,
            metadata=metadata,
            path=path,
            branched=branched,
        )

    def _metadata(self, stage: Stage, weighting: BranchWeighting) -> dict[str, Any]:
        """Metadata of the student's file."""
        return {
            "kind": "student",
            "paper": self.method.paper,
            "method": stage.kind if weighting.num_branches == 1 else f"{stage.kind}-bdense",
            "weights": stage.optimisation.scaled(weighting.weights()).tolist(),
            **({"weighting": weighting.describe()} if weighting.learns else {}),
            "training": asdict(self.config) | {"seed": self.inputs.seed},
            **self.metadata,
            **stage.metadata(),
            **({"identity": dict(self.identity)} if self.identity else {}),
        }


def branches_path(path: Path) -> Path:
    """Where the branches of the student ``path`` are kept."""
    return path.with_suffix(".branches.safetensors")


def keep_student(
    path: Path,
    student: NetworkDenoiser,
    branched: NetworkDenoiser | None,
    metadata: Mapping[str, Any],
) -> None:
    """Write a student with its card and, unless None, its branches.

    The weights come last: a stage that has them is done.
    """
    if branched is not None:
        save_denoiser(branches_path(path), branched, metadata)
    write_card(path, student, metadata)
    save_denoiser(path, student, metadata)


def distill(
    method: Method,
    teacher: NetworkDenoiser,
    config: MethodConfig,
    weighting: Callable[[], BranchWeighting],
    inputs: Inputs,
    *,
    folder: Path | None = None,
    name: str = "student",
    replace: bool = False,
    checkpoint: Path | None = None,
    keep_branches: bool = False,
    devices: Sequence[torch.device] | None = None,
    checkpoint_seconds: float = 60.0,
    metadata: Mapping[str, Any] | None = None,
    on_iteration: Callable[[StagePlan, IterationReport], None] | None = None,
    on_save: Callable[[StagePlan, int], None] | None = None,
    evaluations: Callable[[Stage], Evaluations | None] | None = None,
) -> Iterator[TrainedStage]:
    """Distil stage by stage, and yield each student as it is done.

    What does not fit together is refused at once, before the first stage is asked for. Stopped
    anywhere and called again with the same folder or checkpoint, it ends with the same students.

    Args:
        method: An instance of one of ``bdense.methods.METHODS``.
        teacher: One branch, on the device to train on.
        weighting: Makes the branch weights of a stage, new ones for each.
        folder: Where each student is kept with its model card as soon as it is done, and the
            checkpoint of the stage that is under way; None keeps no students.
        name: What the file of a method of one stage is called, without its ending.
        replace: Whether files of those names from other runs may be replaced.
        checkpoint: File for the checkpoint of a method of one stage, in place of one in the
            folder; it is left there where no student is kept.
        keep_branches: Keep each branched student too, for ``recombine_branches``.
        devices: Devices of this machine that share each batch; the first is the teacher's.
        checkpoint_seconds: As in ``train``.
        metadata: Additional metadata of the students' files.
        on_iteration: Called with the stage after every iteration; an exception ends the run, as
            of ``train``.
        on_save: Called with the stage and the iterations done, after each save.
        evaluations: Evaluations of a stage on its way.

    Raises:
        InputError: Something does not fit together.
        CheckpointError: The folder holds other files of those names, such as students of another
            run; names the differing keys.
        NonFiniteLossError: A stage diverged; those before it stay.
    """
    plans = _plans(method, teacher, config, inputs)
    if len(plans) > 1 and (folder is None or checkpoint is not None):
        raise InputError(
            f"{method.name} has {len(plans)} stages here, each with a student and a checkpoint of "
            "its own; give a folder, and no checkpoint"
        )
    if keep_branches and weighting().num_branches == 1:
        raise InputError(
            "keep_branches is for a student with branches, and plain distillation has one; drop it"
        )
    identity = {}
    if folder is not None:
        identity = plain_json(method.identity(config, teacher, inputs, weighting()))

    def trained(
        plan: StagePlan, stage: Stage, weighting: BranchWeighting, checkpoint: Path | None
    ) -> NetworkDenoiser:
        return train(
            stage,
            weighting,
            devices=devices,
            checkpoint=checkpoint,
            checkpoint_seconds=checkpoint_seconds,
            on_iteration=on_iteration and functools.partial(on_iteration, plan),
            on_save=on_save and functools.partial(on_save, plan),
            evaluations=evaluations and evaluations(stage),
        )

    terms = {
        "teacher_sha256": denoiser_sha256(teacher),
        "precision": teacher.execution.precision,
        **(metadata or {}),
    }
    run = _Run(
        method=method,
        config=config,
        weighting=weighting,
        inputs=inputs,
        folder=folder,
        name=name,
        checkpoint=checkpoint,
        metadata=terms,
        train=trained,
        identity=identity,
        keep_branches=keep_branches,
        replace=replace,
    )
    for plan in plans:
        if (path := run.path(plan)) is not None:
            run.require_own(plan, path)
    first = None if run.is_kept(plans[0]) else method.stage(plans[0], teacher, config, inputs)
    return run.stages(plans, teacher, first)


def _plans(
    method: Method, teacher: NetworkDenoiser, config: MethodConfig, inputs: Inputs
) -> Sequence[StagePlan]:
    """The stages, after the refusal of a config, teacher or data that do not fit the method."""
    if not isinstance(config, method.Config):
        raise InputError(
            f"config must be a {method.Config.__name__} of the method {method.name}, got "
            f"{type(config).__name__}; {method.Config.__name__}.read takes a mapping"
        )
    method.check(config, teacher, inputs.metadata)
    require_adaptable(teacher.model, config)
    plans = method.plan(config, teacher)
    if len({plan.nfe for plan in plans}) < len(plans):
        raise InputError(
            f"method {method.name} plans stages of {[plan.nfe for plan in plans]} NFE; give each "
            "another number, as results are kept by NFE"
        )
    return plans
