"""A trial's FIDs on the way, and whether they are worth going on for.

A look is kept in the trial's folder before it is told, so that whoever takes the trial over tells
the same; the verdict on it is kept in the database before it is acted on. FIDs on the way compare
with one another alone: at the same fraction of the budget, of as many images.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import NonFiniteError
from bdense.files import atomic_write
from bdense.training.loop import Evaluations
from search.spec.space import make_pruner
from search.spec.study_spec import StudySpec
from search.storage.ledger import Claim, Ledger
from search.storage.verdicts import verdict_of
from search.study.folders import GRID
from search.study.progress_text import looking
from search.worker.assets import Assets
from search.worker.engine import student_sampler
from search.worker.evaluation import measure

LOOKS_FILE = "looks.json"
# What is told of a look: images trained on so far and the FID; answered by whether to end.
Judge = Callable[[int, float], bool]


class PrunedError(Exception):
    """A trial is not worth going on with; ends its training, and reaches nobody else."""


def judge_of(spec: StudySpec, ledger: Ledger, claim: Claim) -> Judge | None:
    """Who stores the FIDs on the way of a claimed trial and asks the study's pruner.

    None where the study has no looks.
    """
    if not spec.pruning.at:
        return None
    pruner = make_pruner(spec)

    def judge(images: int, fid: float) -> bool:
        ledger.report(claim, images, fid)
        return verdict_of(
            ledger.study,
            claim.number,
            images,
            lambda study: is_poor(spec, pruner, study, claim.number),
        )

    return judge


def is_poor(spec: StudySpec, pruner: BasePruner, study: Study, number: int) -> bool:
    """Whether a trial is to end at its last look.

    Args:
        spec: The study's.
        pruner: Of ``make_pruner``.
        study: Where the FIDs on the way are stored, by images trained on.
        number: The trial's.
    """
    trials = study.get_trials(deepcopy=False)
    trial = trials[number]
    if spec.pruning.factor is not None:
        trial = _by_rung(trial, spec)
    # Asked in any case: halving notes what it saw.
    poor = pruner.prune(study, trial)
    complete = sum(other.state is TrialState.COMPLETE for other in trials)
    return poor and complete >= (spec.pruning.startup_trials or 0)


def _by_rung(trial: FrozenTrial, spec: StudySpec) -> FrozenTrial:
    """The trial with its looks counted as halving counts resources: factor^i at look i."""
    assert spec.pruning.factor is not None
    counted, told = copy.copy(trial), trial.intermediate_values
    steps = [after * spec.budget.batch for after in spec.looks]
    counted.intermediate_values = {
        spec.pruning.factor**rung: told[step] for rung, step in enumerate(steps) if step in told
    }
    return counted


class OnTheWay:
    """Looks at one trial's student.

    Args:
        assets: What the study's trials share.
        folder: The trial's.
        judge: Whom the FIDs are told.
        check: Called for every batch of images drawn or judged; what it raises ends the work.
        report: Called with a short text on the progress.
    """

    def __init__(
        self,
        assets: Assets,
        folder: Path,
        judge: Judge,
        *,
        check: Callable[[], None],
        report: Callable[[str], None],
    ) -> None:
        self._assets = assets
        self._path = folder / LOOKS_FILE
        self._grid = folder / GRID
        self._judge = judge
        self._check = check
        self._report = report
        self._found = self._before()
        self.seconds = 0.0

    @property
    def looks(self) -> Evaluations:
        """For ``train``."""
        return Evaluations(self._assets.spec.looks, self._look)

    @property
    def found(self) -> list[dict[str, Any]]:
        """Each look so far: fraction, images trained on, FID with its conditions."""
        return [self._found[after] for after in sorted(self._found)]

    def ended(self) -> dict[str, Any]:
        """What a trial that was pruned at its last look says of itself."""
        last, pruner = self.found[-1], self._assets.spec.pruning.pruner
        return {
            "pruned_at": last["fraction"],
            "reason": f"{pruner}: FID {last['fid']:.3f} of {last['images']} images at "
            f"{last['fraction']:g} of the budget",
        }

    def _before(self) -> dict[int, dict[str, Any]]:
        """Looks of a worker before, as far as they are still asked for."""
        if not self._path.exists():
            return {}
        stored: list[dict[str, Any]] = json.loads(self._path.read_text())
        batch, looks = self._assets.spec.budget.batch, self._assets.spec.looks
        kept = {look["trained_images"] // batch: look for look in stored}
        return {
            after: look
            for after, look in kept.items()
            if after in looks and look["images"] == self._assets.spec.look_images
        }

    def _look(self, after: int, student: NetworkDenoiser) -> None:
        started = time.perf_counter()
        if after not in self._found:
            self._found[after] = self._measured(after, student)
            with atomic_write(self._path) as scratch:
                scratch.write_text(json.dumps(self.found))
        look = self._found[after]
        ends = self._judge(look["trained_images"], look["fid"])
        self.seconds += time.perf_counter() - started
        if ends:
            # A later look may have been kept by a run that had got further.
            self._found = {at: look for at, look in self._found.items() if at <= after}
            raise PrunedError

    def _measured(self, after: int, student: NetworkDenoiser) -> dict[str, Any]:
        spec = self._assets.spec
        total = spec.budget.iterations
        fid = measure(
            self._assets,
            student,
            student_sampler(spec),
            images=spec.look_images,
            training_seed=spec.seeds.training,
            on_image=lambda done: self._report(looking(after, total, done, spec.look_images)),
            check=self._check,
            # All that is seen of a student that ends here; the last one's takes its place.
            grid_path=self._grid,
        ).fid
        if not math.isfinite(fid.value):
            raise NonFiniteError(
                f"the FID after {after} of {total} iterations is {fid.value}; the model diverged"
            )
        conditions: Mapping[str, Any] = fid.as_dict()
        return {
            "fraction": spec.looks[after],
            "trained_images": after * spec.budget.batch,
            "fid": fid.value,
            **{key: value for key, value in conditions.items() if key != "value"},
        }
