"""A trial's intermediate FIDs, and pruning by them.

An intermediate FID is written to the trial's folder before the database, so that a worker that
takes the trial over reports the same one.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler
from bdense.errors import NonFiniteError
from bdense.files import atomic_write
from bdense.methods.method import Stage
from bdense.training.loop import Evaluations
from bdense.training.tracking import Tracking
from search.study.folders import GRID
from search.study.progress_text import measuring
from search.study.results import IntermediateFID
from search.study.retention import INTERMEDIATE_FILE
from search.worker.assets import Assets
from search.worker.judge import Judge, PrunedError


class IntermediateFIDs:
    """Measures one row's student while it trains, or after each stage, and asks the judge.

    Args:
        assets: Of the row.
        folder: The row's.
        judge: Gets each FID; None for no intermediate FIDs.
        seed: The row's training seed.
        check: Called for every batch of images drawn or measured; an error of its ends the work.
        report: Called with a short text on the progress.
        tracking: Gets each FID that is measured now.
    """

    def __init__(
        self,
        assets: Assets,
        folder: Path,
        judge: Judge | None,
        *,
        seed: int,
        check: Callable[[], None],
        report: Callable[[str], None],
        tracking: Tracking,
    ) -> None:
        self._tracking = tracking
        self._assets, self._judge, self._seed = assets, judge, seed
        self._path, self._grid = folder / INTERMEDIATE_FILE, folder / GRID
        self._check, self._report = check, report
        self._after = self._asked_for()
        self._found = self._before()
        self._last = ""
        self.seconds = 0.0

    def of(self, stage: Stage) -> Evaluations | None:
        """Those of a stage, for ``distill``; None where the plan has none."""
        if not self._after:
            return None
        return Evaluations(tuple(self._after), partial(self._evaluate, stage))

    @property
    def found(self) -> list[IntermediateFID]:
        """Each so far."""
        return [self._found[after] for after in sorted(self._found)]

    def note_stage(self, step: int, fid: float, *, is_last: bool = False) -> None:
        """Report the FID after a stage; stage 0 is the teacher.

        Raises:
            PrunedError: The judge ends the row there, which is not its last stage.
        """
        if self._judge is None:
            return
        self._last = f"FID {fid:.3f} after stage {step}"
        if self._judge(step, fid) and not is_last and step > 0:
            raise PrunedError

    def ended(self) -> dict[str, Any]:
        """Where and why the row was pruned, as its result holds it."""
        pruner = self._assets.spec.search.pruner
        name = "pruner" if pruner is None else pruner.name
        at = {"pruned_at": self.found[-1].fraction} if self._found else {}
        return {**at, "reason": f"{name}: {self._last}"}

    def _asked_for(self) -> dict[int, float]:
        """Updates after which a student is measured, and their fractions."""
        spec = self._assets.spec
        if self._judge is None or not self._judge.prunes:
            return {}
        total = spec.resolved.stages[0].num_updates
        return {round(fraction * total): fraction for fraction in spec.search.at}

    def _images(self) -> int:
        return self._assets.spec.search.images or self._assets.spec.evaluation.num_images

    def _before(self) -> dict[int, IntermediateFID]:
        """Those of a worker before, as far as they are still asked for."""
        if not self._path.exists():
            return {}
        stored = map(IntermediateFID.read, json.loads(self._path.read_text()))
        batch = self._assets.spec.resolved.batch
        kept = {each.trained_images // batch: each for each in stored}
        return {
            after: each
            for after, each in kept.items()
            if after in self._after and each.fid.images == self._images()
        }

    def _evaluate(self, stage: Stage, after: int, student: NetworkDenoiser) -> None:
        started = time.perf_counter()
        if after not in self._found:
            # A stage may train its sampler: as it is now.
            self._found[after] = self._measured(stage.sampler, after, student)
            value = self._found[after].fid.value
            self._tracking.evaluation("", {"intermediate_fid": value})
            with atomic_write(self._path) as scratch:
                scratch.write_text(json.dumps([each.as_dict() for each in self.found]))
        each = self._found[after]
        self._last = (
            f"FID {each.fid.value:.3f} of {each.fid.images} images at {each.fraction:g} of the "
            "budget"
        )
        assert self._judge is not None
        ends = self._judge(each.trained_images, each.fid.value)
        self.seconds += time.perf_counter() - started
        if ends:
            # An earlier run may have got further.
            self._found = {at: each for at, each in self._found.items() if at <= after}
            raise PrunedError

    def _measured(self, sampler: Sampler, after: int, student: NetworkDenoiser) -> IntermediateFID:
        assets, images = self._assets, self._images()
        total = assets.spec.resolved.stages[0].num_updates
        fid = assets.evaluator.measure(
            student,
            sampler,
            images=images,
            training_seed=self._seed,
            on_image=lambda done: self._report(measuring(after, total, done, images)),
            check=self._check,
            # The only picture of a student that is pruned here; later ones replace it.
            grid_path=self._grid,
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
