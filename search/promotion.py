"""Promotion: train a search's weights beside the baselines, and export the recommended student."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdense.errors import InputError
from bdense.files import require_new
from bdense.knobs import KnobError
from search.analysis.comparison import compare
from search.analysis.confirmation import confirmation_of, confirmed_arm
from search.analysis.plans import (
    PROMOTE_SUFFIX,
    PlannedArms,
    at_another_k,
    differing,
    fresh_seeds,
    other_budget,
)
from search.analysis.recommendation import Recommendation, recommend
from search.errors import UnconfirmedError
from search.export import (
    Exported,
    arm_row,
    export_trial,
    made_from,
    origin_of,
    put_aside,
    require_students,
)
from search.log import say
from search.places import runs_folder
from search.run.launch import run_rows
from search.spec.file import require_variants
from search.spec.sections import FRESH_SEEDS
from search.spec.study import StudySpec
from search.study.arms import Arm, arms_study, baseline_arms
from search.study.study import Study
from search.study.summary import headline


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a promotion is asked for, see ``search.api.OpenStudy.promote``.

    ``to`` is resolved. None of a setting is the other study's or the search's own.
    """

    to: StudySpec | None = None
    weights: Arm | None = None
    seeds: int | Sequence[int] | None = None
    nfe: Sequence[int] | None = None
    kimg: float | None = None
    arm: str | None = None
    out: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """A promoted model.

    Attributes:
        model: Its folder, and whose student it is.
        recommended: The arm to use at its settings; None where no baseline is complete.
        is_new: Whether it was written now; False where an earlier call did, and nothing is new
            since.
    """

    model: Exported
    recommended: Recommendation | None
    is_new: bool


class Promotion:
    """A promotion of a search, checked; nothing is planned before ``run``.

    Raises:
        InputError: Something asked for does not fit.
    """

    def __init__(self, study: Study, asked: Asked) -> None:
        require_students(study)
        if asked.to is not None and asked.to.is_search:
            raise KnobError(
                "to",
                f"names {asked.to.name}, a search; give a study of given arms (plan: arms, "
                "seeds), or measure weights under a search's conditions by `bdense-search "
                "transfer`",
            )
        self._study, self._asked = study, asked
        self._spec = asked.to or arms_study(study.spec, study.name + PROMOTE_SUFFIX)
        self._settings = self._asked_settings()
        self._variants = [differing(self._spec, each) for each in self._settings]
        require_variants(self._spec, self._variants)
        self._seeds = self._asked_seeds()

    def planned_spec(self) -> StudySpec:
        """The spec that a study file of this promotion would have.

        Raises:
            InputError: There is no confirmed winner.
        """
        spec = self._planned(self._promoted()).as_spec()
        if self._asked.weights is not None:
            return spec
        arms = (*spec.given.arms[:-1], {"winner_of": self._study.name})
        return replace(spec, plan=replace(spec.given, arms=arms))

    def run(
        self, workers: int | None, *, remark: Callable[[str], None] = say
    ) -> tuple[Study, Arm]:
        """Plan it and run what is left.

        Args:
            workers: Rows at once; None for as many as fit.
            remark: Takes a line on what the weights mean at another K.

        Returns:
            The promotion, and the promoted arm. A confirmation that runs meanwhile may choose
            another winner.

        Raises:
            InputError: There is no confirmed winner, weights do not fit, or ``out`` is taken.
        """
        study, asked, spec = self._study, self._asked, self._spec
        for folder in map(self._folder, self._settings) if asked.out is not None else ():
            # One that this promotion wrote is written anew.
            if origin_of(folder).get("study") != spec.name:
                require_new(folder)
        arm = self._promoted()
        if asked.weights is None and asked.to is None:
            for line in {other_budget(study, each) for each in self._settings} - {""}:
                say(line)
        planned = self._planned(arm).store(study.url)
        searched_at, num_branches = (s.resolved.num_branches for s in (study.spec, spec))
        if line := at_another_k(arm, searched_at, num_branches):
            remark(line)
        run_rows(planned, workers)
        return planned, arm

    def models(self, planned: Study, promoted: Arm) -> Iterator[Promoted]:
        """Write a model folder of what ``run`` returned for each setting, unless it is there.

        Raises:
            InputError: Rows are left, or no baseline is complete to judge the weights by.
        """
        for settings, changes in zip(self._settings, self._variants, strict=True):
            variant = planned.variants.index(changes)
            yield self._model(planned, promoted, self._folder(settings), variant)

    def _model(self, planned: Study, promoted: Arm, folder: Path, variant: int) -> Promoted:
        if planned.left():
            raise InputError(f"{headline(planned)}; run the same command again to continue")
        found = recommend(compare(planned, variant=variant).beside_baselines(promoted))
        choice, chosen = self._asked.arm, found.arm.name if found is not None else None
        arm = promoted.name if choice == "weights" else choice or chosen
        if arm is None:
            raise KnobError(
                "arm",
                f"must say whose student is exported, as no baseline is complete to judge "
                f"{promoted.name} by: {headline(planned)}; or run the same again",
            )
        number = arm_row(planned, arm=arm, variant=variant)
        if origin_of(folder) == made_from(planned, number):
            model = Exported.of(planned, planned.main, number, folder)
            return Promoted(model=model, recommended=found, is_new=False)
        put_aside(folder)
        model = export_trial(planned, folder, number=number)
        return Promoted(model=model, recommended=found, is_new=True)

    def _planned(self, arm: Arm) -> PlannedArms:
        return PlannedArms(
            spec=self._spec,
            arms=[*baseline_arms(self._spec), arm],
            seeds=self._seeds,
            variants=self._variants,
            of=self._study.name,
        )

    def _promoted(self) -> Arm:
        try:
            return self._asked.weights or confirmed_arm(self._study)
        except UnconfirmedError as error:
            raise KnobError("weights", f"is needed: {error}, or give it") from error

    def _asked_settings(self) -> list[dict[str, Any]]:
        """Settings of the method: variants of ``to`` or ``confirm.method``, changed as asked."""
        asked = self._asked
        named = [self._study.spec.confirm.method] if asked.to is None else asked.to.given.variants
        found = [dict(each) for each in named]
        if asked.kimg is not None:
            found = [{**each, "kimg": asked.kimg} for each in found]
        if asked.nfe:
            found = [{**each, "nfe": nfe} for each in found for nfe in asked.nfe]
        return found

    def _asked_seeds(self) -> list[int]:
        study, asked = self._study, self._asked.seeds
        if self._asked.to is None:
            number = FRESH_SEEDS if asked is None else asked
            if not isinstance(number, int) or number < 1:
                shown = asked if isinstance(asked, int) else ",".join(map(str, asked or ()))
                raise KnobError(
                    "seeds",
                    f"must be the number of fresh seeds, 1 or more, unless `to` is given, got "
                    f"{shown}",
                )
            # The seeds of the confirmation chose the winner, so they are left out.
            confirmation = confirmation_of(study)
            used = [] if confirmation is None else [row.seed for row, _ in confirmation.rows()]
            return fresh_seeds(study.spec, number, used)
        plan = self._asked.to.given
        if asked is None:
            return list(plan.seeds)
        seeds = range(asked) if isinstance(asked, int) else asked
        return list(replace(plan, seeds=tuple(seeds)).seeds)  # which refuses others

    def _folder(self, settings: Mapping[str, Any]) -> Path:
        """Folder for the model of these settings; models of other settings go beside it."""
        words = [
            f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"
            for name, value in sorted(settings.items())
        ]
        named, out = re.sub(r"[^\w.-]+", "-", "-".join(words)), self._asked.out
        if out is None:
            return runs_folder() / self._spec.name / ("model" + (f"-{named}" if named else ""))
        return Path(out if len(self._settings) == 1 else out / named)
