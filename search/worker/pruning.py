"""A trial's intermediate FIDs, and pruning by them.

An intermediate FID is written to the trial's folder before the database, so that a worker that
takes the trial over reports the same one.
"""

import json
import math
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler
from bdense.errors import NonFiniteError
from bdense.files import write_json
from bdense.methods.method import Stage
from bdense.training.loop import Evaluations
from search.study.folders import GRID
from search.study.progress_text import measuring
from search.study.results import IntermediateFID
from search.study.retention import INTERMEDIATE_FILE
from search.worker.judge import PrunedError

if TYPE_CHECKING:
    from search.worker.evaluate import Row


class IntermediateFIDs:
    """Measures one row's student while it trains, or after each stage, and asks the judge."""

    def __init__(self, row: "Row") -> None:
        self._row, self._assets = row, row.assets
        self._path = row.folder / INTERMEDIATE_FILE
        spec = row.assets.spec
        self._images = spec.plan.images or spec.evaluation.num_images
        self._total = spec.resolved.stages[0].num_updates
        # Updates after which a student is measured, and their fractions.
        at = spec.plan.at if row.attempt.judge.prunes else ()
        self._after = {round(fraction * self._total): fraction for fraction in at}
        self._found = self._stored()
        self.seconds = 0.0

    def of(self, stage: Stage) -> Evaluations | None:
        """The evaluations that ``distill`` runs in this stage, or None."""
        if not self._after:
            return None
        return Evaluations(tuple(self._after), partial(self._evaluate, stage))

    @property
    def found(self) -> list[IntermediateFID]:
        """The intermediate FIDs so far."""
        return [self._found[after] for after in sorted(self._found)]

    def note_stage(self, step: int, fid: float, *, is_last: bool = False) -> None:
        """Report the FID after a stage; stage 0 is the teacher.

        Raises:
            PrunedError: The judge ends the row there, which is not its last stage.
        """
        if self._row.attempt.judge(step, fid) and not is_last and step > 0:
            raise self._pruned(f"FID {fid:.3f} after stage {step}")

    def _pruned(self, why: str) -> PrunedError:
        pruner = self._assets.spec.search.pruner
        name = "pruner" if pruner is None else pruner.name
        return PrunedError(f"{name}: {why}", self.found[-1].fraction if self._found else None)

    def _stored(self) -> dict[int, IntermediateFID]:
        """What an earlier attempt stored and the plan still wants."""
        if not self._path.exists():
            return {}
        stored = map(IntermediateFID.read, json.loads(self._path.read_text()))
        batch = self._assets.spec.resolved.batch
        kept = {each.trained_images // batch: each for each in stored}
        return {
            after: each
            for after, each in kept.items()
            if after in self._after and each.fid.images == self._images
        }

    def _evaluate(self, stage: Stage, after: int, student: NetworkDenoiser) -> None:
        started = time.perf_counter()
        if after not in self._found:
            # A stage may train its sampler: as it is now.
            self._found[after] = self._measured(stage.sampler, after, student)
            value = self._found[after].fid.value
            self._row.tracking.evaluation("", {"intermediate_fid": value})
            write_json(self._path, [each.as_dict() for each in self.found])
        each = self._found[after]
        ends = self._row.attempt.judge(each.trained_images, each.fid.value)
        self.seconds += time.perf_counter() - started
        if ends:
            # An earlier run may have got further.
            self._found = {at: each for at, each in self._found.items() if at <= after}
            raise self._pruned(
                f"FID {each.fid.value:.3f} of {each.fid.images} images at {each.fraction:g} of "
                "the budget"
            )

    def _measured(self, sampler: Sampler, after: int, student: NetworkDenoiser) -> IntermediateFID:
        assets, attempt = self._assets, self._row.attempt
        images, total = self._images, self._total
        fid = assets.evaluator.measure(
            student,
            sampler,
            images=images,
            training_seed=attempt.task.seed,
            on_image=lambda done: attempt.report(measuring(after, total, done, images)),
            check=attempt.check,
            # The only picture of a student that is pruned here; later ones replace it.
            grid_path=attempt.folder / GRID,
        ).fid
        if not math.isfinite(fid.value):
            raise NonFiniteError(
                f"the FID after {after} of {total} updates is {fid.value}; the model diverged"
            )
        return IntermediateFID(
            fraction=self._after[after],
            trained_images=after * assets.spec.resolved.batch,
            # A row is read whole by every look at the study, and stays small.
            fid=replace(fid, noise=None, effects=[]),
        )
