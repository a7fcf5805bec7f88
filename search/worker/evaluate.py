"""One row's work: branch weights -> students, stage by stage -> FID.

A row's folder holds its training checkpoint, then pictures, students and ``result.json``. The
result is written there first, so that a worker that takes a finished row over only stores it.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from bdense.diffusion.sampling import SETUP
from bdense.errors import InputError
from bdense.files import plain_json, write_json
from bdense.methods.distill import TrainedStage, distill
from bdense.methods.method import Stage, StagePlan
from bdense.metrics.records import FID, Metrics
from bdense.models.card import write_card
from bdense.models.store import save_denoiser
from bdense.training.loop import Evaluations, IterationReport
from bdense.training.tracking import Tracking
from bdense.weights import space_of
from bdense.weights.space import BASELINE, UNIFORM
from bdense.weights.weighting import BranchWeighting
from search.study.arms import OneShotTask
from search.study.folders import WEIGHTS_PLOT, grid_name
from search.study.plot import draw_history
from search.study.progress_text import evaluating, in_stage, training
from search.study.results import IntermediateFID, TrialResult
from search.study.retention import CHECKPOINT, STUDENT, student_files
from search.study.trial_log import is_noted, shortened
from search.worker.assets import Assets
from search.worker.judge import PrunedError
from search.worker.one_shot import measure_curve
from search.worker.pruning import IntermediateFIDs
from search.worker.result import below_runs, provenance, stored_or_made
from search.worker.traced_weights import TracedWeights
from search.worker.trainer import Attempt

_log = logging.getLogger(__name__)


def evaluate(assets: Assets, attempt: Attempt) -> TrialResult:
    """Train a row's students and measure each.

    Args:
        assets: What the study's rows share.
        attempt: At the row. Its ``check`` is called every update and for every batch of images
            drawn or measured, its judge gets the intermediate FIDs.

    Returns:
        The result; read from the folder if an earlier attempt wrote it.
    """
    one_shot = OneShotTask.of(attempt.task.params)

    def make() -> TrialResult:
        row = Row(assets.of(attempt.task), attempt)
        return row.run() if one_shot is None else measure_curve(row, one_shot.points)

    result = stored_or_made(attempt, assets.fingerprint, make)
    if one_shot is not None:
        for path in student_files(attempt.folder):  # of rounds, kept to resume from
            path.unlink()
    return result


@dataclass(eq=False)
class Row:
    """One row while a worker trains and measures it."""

    assets: Assets
    attempt: Attempt
    weighting: TracedWeights | None = None
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        spec, attempt = self.assets.spec, self.attempt
        self.task, self.folder, self.log = attempt.task, attempt.folder, attempt.log
        # A one-shot training's images have weights of their own, which these do not change.
        is_one_shot = OneShotTask.of(self.task.params) is not None
        self.params = {BASELINE: UNIFORM} if is_one_shot else self.task.params
        own = spec.weight_space if spec.is_search else None
        self.space = space_of(self.params, own)
        self.branches = spec.resolved.num_branches
        self.stages = self.assets.method.plan(self.assets.config, self.assets.teacher)
        self.seeds = {"training": self.task.seed, "evaluation": self.task.latents}
        self.seconds = {"student_seconds": 0.0, "evaluation_seconds": 0.0}

    def run(self) -> TrialResult:
        """Train and measure every stage, recorded by the study's trackers."""
        with self._tracked() as self.tracking:
            return self._run()

    def _tracked(self) -> Tracking:
        """The study's trackers; none if one cannot start, which must not cost the trial."""
        run = "/".join(self.folder.parts[-2:])
        settings = {"params": dict(self.task.params), "seeds": self.seeds, "arm": self.task.arm}
        try:
            places = self.assets.spec.resources.log
            return Tracking(places, run, plain_json(settings), knob="resources.log")
        except InputError as error:
            _log.warning("%s is not tracked: %s", run, error)
            return Tracking()

    def _run(self) -> TrialResult:
        assets, stages = self.assets, self.stages
        fids: dict[str, FID] = {}
        measured: Metrics | None = None
        reason: str | None = None
        pruned_at: float | None = None
        path = self.folder / STUDENT
        intermediate = IntermediateFIDs(self)
        if assets.teacher_fid is not None:
            intermediate.note_stage(0, assets.teacher_fid.value)
        started = time.perf_counter()
        try:
            for index, stage in enumerate(self.distilled(intermediate.of), 1):
                trained = time.perf_counter()
                self.seconds["student_seconds"] += trained - started
                path = stage.path or self.folder / STUDENT
                measured = self._measured(stage, path)
                fids[str(stage.plan.nfe)] = fid = measured.fid
                started = time.perf_counter()
                self.seconds["evaluation_seconds"] += started - trained
                if len(stages) > 1:
                    intermediate.note_stage(index, fid.value, is_last=index == len(stages))
        except PrunedError as error:
            self.seconds["student_seconds"] += time.perf_counter() - started
            reason, pruned_at, measured = error.reason, error.at, None
        self.seconds["student_seconds"] -= intermediate.seconds
        if intermediate.seconds:
            self.seconds["intermediate_seconds"] = intermediate.seconds
        result = self._result(measured, fids, path, intermediate.found)
        return replace(result, reason=reason, pruned_at=pruned_at)

    def distilled(
        self, evaluations: Callable[[Stage], Evaluations | None]
    ) -> Iterator[TrainedStage]:
        """Train the row's students stage by stage, with the intermediate evaluations of each."""
        assets = self.assets
        return distill(
            assets.method,
            assets.teacher,
            assets.config,
            self._new_weighting,
            assets.inputs(self.task.seed),
            folder=self.folder if len(self.stages) > 1 else None,
            # A method of one stage keeps its checkpoint, which holds the weights' history, until
            # the result is there.
            checkpoint=self.folder / CHECKPOINT if len(self.stages) == 1 else None,
            devices=assets.devices,
            metadata={
                **assets.terms,
                "arm": self.task.params.get(BASELINE) or "bdense",
                "study": assets.spec.name,
                "params": dict(self.task.params),
                "seeds": self.seeds,
                "fingerprint": assets.fingerprint,
            },
            checkpoint_seconds=assets.spec.resources.checkpoint_seconds,
            on_iteration=self._on_iteration,
            on_save=lambda plan, done: self.log("checkpoint", **_named(plan), iteration=done),
            evaluations=evaluations,
        )

    def _new_weighting(self) -> BranchWeighting:
        """The row's weighting, at the start of a stage."""
        self.weighting = TracedWeights(self.space.weighting(self.params, self.branches))
        return cast("BranchWeighting", self.weighting)

    def _on_iteration(self, plan: StagePlan, done: IterationReport) -> None:
        if self.weighting is not None and plan.branched:
            self.weighting.note(done)
        if is_noted(done.iteration, done.iterations):
            self.log(
                "training",
                **_named(plan),
                iteration=done.iteration + 1,
                iterations=done.iterations,
                loss=shortened(done.loss),
                branch_losses=shortened(done.branch_losses),
                weights=shortened(done.weights),
                lr=done.lr,
            )
        self.tracking.iteration(plan.name, done)
        self.tell(plan, training(done.iteration + 1, done.iterations, done.loss))
        self.attempt.check()  # last: a checkpoint for a stop holds this iteration too

    def tell(self, plan: StagePlan, text: str) -> None:
        """Report the progress of a stage."""
        place, stages = self.stages.index(plan) + 1, len(self.stages)
        self.attempt.report(text if stages == 1 else in_stage(place, stages, text))

    def _measured(self, stage: TrainedStage, path: Path) -> Metrics:
        """A stage's metrics, kept in a file where the method has several stages."""
        count = self.assets.spec.evaluation.num_images
        named = _named(stage.plan)
        kept = path.with_suffix(".fid.json")
        if stage.plan.name and kept.exists():
            return Metrics.read(json.loads(kept.read_text()))
        self.log("evaluating", **named, images=count)
        measured = self.assets.evaluator.measure(
            stage.student,
            stage.sampler,
            training_seed=self.task.seed,
            on_image=lambda done: self.tell(stage.plan, evaluating(done, count)),
            check=self.attempt.check,
            grid_path=self.folder / grid_name(stage.plan.name),
        )
        if stage.plan.name:
            write_json(kept, measured.as_dict())
            self.log("stage", **named, fid=measured.fid.value)
        setup = self.assets.evaluator.setup(stage.student).as_dict()
        self.tracking.evaluation(stage.plan.name, {"fid": measured.fid.value})
        metadata = {**stage.metadata, "fid": measured.fid.as_dict(), SETUP: setup}
        if measured.clip_score is not None:
            metadata["clip_score"] = measured.clip_score.as_dict()
        save_denoiser(path, stage.student, metadata)  # again, now with its FID
        write_card(path, stage.student, metadata)
        return measured

    def _result(
        self,
        measured: Metrics | None,
        fids: dict[str, FID],
        path: Path,
        intermediate: list[IntermediateFID],
    ) -> TrialResult:
        assets, task = self.assets, self.task
        history, weights = None, []
        if (weighting := self.weighting) is not None:
            history = weighting.history()
            weights = assets.config.scaled(weighting.weights()).tolist()
        plot = self.folder / WEIGHTS_PLOT
        if history is not None:
            draw_history(history, self.space.label(task.params), plot)
        metrics = {} if measured is None else vars(measured)
        stored = {} if BASELINE in task.params else self.space.stored(task.params, self.branches)
        return TrialResult(
            value=None if measured is None else measured.fid.value,
            weights=weights,
            parameters=stored,
            fids=fids if len(self.stages) > 1 else {},
            teacher_fid=assets.teacher_fid,
            intermediate=intermediate,
            weights_over_time=history,
            weights_plot=None if history is None else below_runs(plot),
            student=None if measured is None else below_runs(path),
            drawing_options=assets.drawing_options,
            prompts=[] if measured is None else assets.grid_prompts,
            arm=task.arm,
            variant=dict(task.variant),
            timings={name: round(value, 3) for name, value in self.seconds.items()},
            **metrics,
            **provenance(assets.fingerprint, self.seeds, assets.device_name),
        )


def _named(plan: StagePlan) -> dict[str, Any]:
    """The stage's field in the row's log; none where there is one stage."""
    return {"stage": plan.name} if plan.name else {}
