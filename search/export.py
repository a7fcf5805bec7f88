"""Export a study's students as model folders: weights, card, pictures, figures."""

import contextlib
import itertools
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense.errors import InputError
from bdense.knobs import KnobError
from bdense.methods import StagePlan
from bdense.metrics.classifiers import add_classifier
from bdense.metrics.records import FID
from bdense.models.card import EXAMPLE_PROMPTS
from bdense.models.diffusers_export import add_pipeline
from bdense.models.diffusers_files import PIPELINE
from bdense.models.folder import CONFIG, SAMPLES, Picture, export_folder
from bdense.models.latents import draws_latents
from bdense.models.store import load_denoiser
from search.analysis.comparison import compare, comparison_rows, comparisons_of, teacher_of
from search.analysis.confirmation import confirmation_of, judged_summary, verdict
from search.analysis.recommendation import recommend
from search.places import cache_folder
from search.report.overview import overview_of
from search.report.plots import study_plots
from search.storage.ledger import Ledger
from search.storage.queries import StoredTrial
from search.study.arms import ArmRow
from search.study.folders import PROGRAM_FOLDER, grid_name, named_file, study_folder
from search.study.results import Judged, TrialResult
from search.study.study import FINGERPRINT, JUDGED, Study
from search.study.summary import baselines_of, headline
from search.study.wording import align
from search.worker.assets import CUT
from search.worker.teachers import pipeline_of

FIGURE = "fid.png"
_MADE_FROM = "made_from"  # in the metadata of what is handed on


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A model folder, and the row whose student it holds.

    Attributes:
        folder: The model folder.
        pipeline: The diffusers pipeline in it; None where the network is not a diffusers one.
        study: Name of the row's study: a search, its confirmation, or one of given arms.
        number: The row's number in its ledger.
        label: Its weights or arm, and the training seed of an arm.
        fid: The student's; None where its stage was not measured.
    """

    folder: Path
    pipeline: Path | None
    study: str
    number: int
    label: str
    fid: FID | None

    @classmethod
    def of(
        cls, study: Study, ledger: Ledger, number: int, folder: Path, nfe: int | None = None
    ) -> "Exported":
        """The folder of a complete row's student, or of its student of another stage.

        Raises:
            InputError: There is no such row, or it is not complete.
        """
        trial = _complete(ledger, number)
        if ledger is study.trials:
            label = f"trial {number}, {study.spec.space.label(trial.params)}"
        else:
            row = ArmRow(**trial.params)
            kind = "baseline" if ledger is study.baselines else f"row {number}"
            label = f"{kind}, {study.arms[row.arm].name}, seed {row.seed}"
        result = TrialResult.of(trial.value, trial.user_attrs)
        return cls(
            folder=folder,
            pipeline=pipeline if (pipeline := folder / PIPELINE).is_dir() else None,
            study=study.name,
            number=number,
            label=label,
            fid=result.fid_at(nfe),
        )

    @property
    def paths(self) -> list[Path]:
        """The folder, and the pipeline in it."""
        return [path for path in (self.folder, self.pipeline) if path is not None]

    def text(self) -> str:
        """Whose student it is, as text for people."""
        figure = "" if self.fid is None else f": FID {self.fid.value:.3f} at NFE {self.fid.nfe}"
        return f"student of study {self.study}, {self.label}{figure}"


def export_trial(
    study: Study,
    folder: Path,
    *,
    number: int | None = None,
    nfe: int | None = None,
    baseline: str | None = None,
) -> Exported:
    """Write a kept student as a model folder, see ``search.api.OpenStudy.export``.

    Raises:
        InputError: There is no such row, it is not complete, or its student was not kept, or the
            sample grid of a student of latents is missing; or the study's trials are runs of a
            program.
    """
    require_students(study)
    if baseline is not None:
        if number is not None:
            raise KnobError(
                "baseline", f"{baseline} and `trial` {number} are two; drop one of them"
            )
        ledger, number = _baseline(study, baseline)
    else:
        if number is None:
            study, number = _best_of(study)
        ledger = study.main
    trial = _complete(ledger, number)
    result = TrialResult.of(trial.value, trial.user_attrs)
    path = _student(study, ledger, trial, nfe)
    denoiser, metadata = load_denoiser(path)
    metadata.pop("identity", None)
    fid = result.fid_at(nfe)
    if fid is not None:
        metadata["fid"] = fid.as_dict()
    pictures: dict[str, Picture] = {}
    if draws_latents(denoiser, metadata):  # not drawn anew, which takes the teacher's folder
        grid = path.with_name(grid_name(_stage(study, nfe).name))
        if not grid.is_file():
            again = ["bdense", "sample", str(path), *result.drawing_options, "--out", str(grid)]
            raise InputError(
                f"the sample grid of trial {number}, {grid}, is missing, and the card shows it; "
                f"draw it again: {shlex.join(again)}"
            )
        pictures[SAMPLES] = grid
    whole_prompts = [prompt for prompt in result.prompts if not prompt.endswith(CUT)]
    extra = ""
    if not study.is_search:
        metadata["fid_table"] = fid_table(study)
        metadata[_MADE_FROM] = made_from(study, number)
        pictures |= _pictures(study, trial, nfe)
        rows = align(comparison_rows(comparisons_of(study), teacher_of(study)))
        extra = "All arms of the study:\n\n```\n" + "\n".join(rows) + "\n```"

    def finish(folder: Path) -> None:
        teacher = pipeline_of(study.spec) if draws_latents(denoiser, metadata) else None
        add_pipeline(folder, denoiser, metadata, teacher=teacher)
        if fid is not None:
            add_classifier(folder, fid, cache_folder())

    export_folder(
        folder,
        denoiser,
        metadata,
        pictures=pictures,
        extra_card=extra,
        prompts=whole_prompts[:2] or EXAMPLE_PROMPTS,
        finish=finish,
    )
    return Exported.of(study, ledger, number, folder, nfe)


def require_students(study: Study) -> None:
    """Refuse a study whose models are its program's own.

    Raises:
        InputError: Says where they are.
    """
    if not study.spec.workload.has_students:
        place = study_folder(study.name) / "NUMBER" / PROGRAM_FOLDER
        raise InputError(
            f"the models of {study.name} are its program's own, where that put them, such as in "
            f"{place}; take them from there"
        )


def fid_table(study: Study) -> list[dict[str, Any]]:
    """The FIDs of given arms as rows for a model card."""
    table = []
    if (teacher := teacher_of(study)) is not None:
        latents = {"evaluation_seed": teacher.seeds["evaluation"]}
        own = {"nfe": teacher.nfe, "arm": "teacher", "fid": teacher.value}
        table.append({**own, **_conditions(teacher), **latents})
    for comparison in comparisons_of(study):
        for each in comparison.results:
            found = each.mean()
            table.append(
                {
                    "nfe": each.figure.nfe,
                    **comparison.variant,
                    "arm": each.arm.name,
                    "fid": found.mean,
                    "std_err": found.standard_error,
                    "n": found.n,
                    **_conditions(each.figure),
                    "training_seeds": " ".join(map(str, sorted(each.figures))),
                }
            )
    return table


def _conditions(fid: Judged) -> dict[str, Any]:
    named = ("images", "extractor", "extractor_sha256", "reference", "reference_images")
    found = fid.conditions()
    return {name: found[name] for name in named}


def made_from(study: Study, number: int) -> dict[str, Any]:
    """The row of a model folder's student, and the rows behind its figures."""
    return {
        "study": study.name,
        "fingerprint": study.main.attribute(FINGERPRINT),
        "row": number,
        "rows": [trial.number for trial in _complete_rows(study.main)],
        **({} if study.of is None else {"of": study.of}),
    }


def origin_of(folder: Path) -> dict[str, Any]:
    """What ``made_from`` said of a model folder as it was written; else empty."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text()).get(_MADE_FROM, {})
        return found
    return {}


def put_aside(folder: Path) -> None:
    """Rename the folder of an older model."""
    if not folder.exists():
        return
    older = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    aside = next(path for path in older if not path.exists())
    folder.rename(aside)
    sys.stderr.write(f"the model that was there is now {aside}\n")


def arm_row(study: Study, *, arm: str | None = None, variant: int | None = None) -> int:
    """The row of an arm under the first seed.

    Args:
        study: A study of given arms.
        arm: Its name, or ``plain`` or ``uniform``; None is the recommended one.
        variant: Index of the method's settings; None is the one that a confirmation judged, or
            the first.

    Raises:
        InputError: No such row is complete, or no arm is recommended.
    """
    _complete_rows(study.main)
    if variant is None:
        variant = int(study.main.attribute(JUDGED) or 0)
    comparison = compare(study, variant=variant)
    results = comparison.results
    if arm is None and len(results) > 1:
        found = recommend(comparison)
        if found is None:
            names = ", ".join(each.arm.name for each in results)
            raise KnobError(
                "trial",
                f"must name a row, as {study.name} has no complete baseline to judge its arms by "
                f"({names})",
            )
        arm = found.arm.name
    for each in results:
        if arm in (None, each.arm.name, each.arm.baseline):
            return each.rows[min(each.rows)]
    raise InputError(
        f"{headline(study)}: no row of {arm or 'these settings'} is complete; run the same "
        "command again"
    )


def _baseline(study: Study, name: str) -> tuple[Ledger, int]:
    """Ledger and number of a search's baseline."""
    if study.baselines is None:
        raise KnobError("baseline", f"{name} is for a search; name a row by `trial` instead")
    if (found := baselines_of(study).get(name)) is None:
        raise InputError(f"study {study.name} has no complete baseline {name}; launch it first")
    return study.baselines, found.number


def _best_of(study: Study) -> tuple[Study, int]:
    """Study and number of the row to export, where none is named."""
    if not study.is_search:
        return study, arm_row(study)
    found, confirmation = verdict(study), confirmation_of(study)
    if found is not None and found.ended and confirmation is not None:
        return confirmation, arm_row(confirmation)
    _complete_rows(study.search)
    now, _ = judged_summary(study)
    assert now.best is not None
    return study, now.best.number


def _complete_rows(ledger: Ledger) -> list[StoredTrial]:
    trials = ledger.rows()
    if not trials:
        raise InputError(f"no row of {ledger.name} is complete, so there is no student to export")
    return trials


def _complete(ledger: Ledger, number: int) -> StoredTrial:
    trials = {trial.number: trial for trial in _complete_rows(ledger)}
    if number not in trials:
        raise InputError(
            f"trial {number} of {ledger.name} is not complete, or there is none; "
            f"complete are {', '.join(map(str, sorted(trials)))}"
        )
    return trials[number]


def _student(study: Study, ledger: Ledger, trial: StoredTrial, nfe: int | None) -> Path:
    path = named_file(trial.user_attrs["student"])
    if nfe is not None:
        stages = study.spec.resolved.stages
        if len(stages) == 1:
            raise KnobError(
                "nfe",
                f"{nfe} has no meaning for {study.name}, whose only stage is {stages[0].label}; "
                "leave it out, and name a row by `trial` where there are several",
            )
        names = {stage.nfe: stage.name for stage in stages}
        if nfe not in names:
            raise KnobError(
                "nfe", f"must be one of {', '.join(map(str, names))} for {study.name}, got {nfe}"
            )
        path = path.with_name(f"{names[nfe]}.safetensors")
    if path.is_file():
        return path
    kept = [
        str(other.number)
        for other in _complete_rows(ledger)
        if named_file(other.user_attrs["student"]).is_file()
    ]
    raise InputError(
        f"the student of trial {trial.number} was not kept, only its result: {path} is gone, as a "
        "search keeps only the students of its best trials (keep_students of its file: raise it "
        "before the next launch, or name a trial by `clean --keep`); kept are those of "
        f"{', '.join(kept) or 'none'}"
    )


def _stage(study: Study, nfe: int | None) -> StagePlan:
    """The stage of that NFE; None is the last."""
    return next(s for s in reversed(study.spec.resolved.stages) if nfe in (None, s.nfe))


def _pictures(study: Study, trial: StoredTrial, nfe: int | None) -> dict[str, Picture]:
    """The figure, and image grids of this student and of the baselines at its stage."""
    stage = _stage(study, nfe)
    plots = study_plots(overview_of(study))
    pictures: dict[str, Picture] = {FIGURE: plots[0].save} if plots else {}
    own, arms = ArmRow(**trial.params), study.arms
    searched = [index for index, arm in enumerate(arms) if arm.baseline is None]
    shown = own.arm if own.arm in searched else searched[0] if len(searched) == 1 else None
    for other in _complete_rows(study.main):
        row = ArmRow(**other.params)
        grid = named_file(other.user_attrs["student"]).with_name(grid_name(stage.name))
        name = arms[row.arm].baseline or ("promoted" if row.arm == shown else None)
        is_beside = (row.seed, row.variant) == (own.seed, own.variant)
        if name is not None and is_beside and grid.is_file():
            pictures[f"samples-{name}.png"] = grid
    return pictures
