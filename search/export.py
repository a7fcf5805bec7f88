"""Students of a study as folders to hand on: weights, card, pictures, figures."""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from bdense.errors import InputError
from bdense.models.diffusers_export import export_pipeline
from bdense.models.folders import CONFIG, Picture, export_folder
from bdense.models.store import load_denoiser
from bdense.networks.diffusers_unet import DiffusersUNet
from search.analysis.comparison import comparisons_of, table_rows, teacher_of
from search.analysis.confirmation import CONFIRM_SUFFIX, verdict
from search.report.overview import overview_of
from search.storage.ledger import Ledger
from search.storage.queries import StoredTrial
from search.study.arms import ArmRow
from search.study.folders import GRID, named_file
from search.study.results import MeasuredFID, TrialResult
from search.study.study import FINGERPRINT, Study
from search.study.summary import baselines_of, headline
from search.study.wording import align

if TYPE_CHECKING:
    from bdense.diffusion.denoiser import NetworkDenoiser

PIPELINE, FIGURE = "diffusers", "fid.png"
_MADE_FROM = "made_from"  # in the metadata of what is handed on


def export_trial(
    study: Study,
    folder: Path,
    *,
    number: int | None = None,
    nfe: int | None = None,
    baseline: str | None = None,
) -> list[Path]:
    """Write a kept student as a model folder.

    Args:
        study: Of any kind.
        folder: Where it will lie; it must not exist.
        number: Of the row; None is, of a search, the confirmed winner's under the first fresh
            seed, else the best trial's, and of given arms the first seed's of the one arm that is
            no baseline.
        nfe: Of a method of several stages, which student; None is the last.
        baseline: Of a search, ``plain`` or ``uniform`` instead of a trial.

    Returns:
        The folder, and the diffusers pipeline in it where the network is a diffusers one.

    Raises:
        InputError: There is no such row, it has not ended well, or its student was not kept.
    """
    if baseline is not None:
        ledger, number = _baseline(study, baseline)
    else:
        if number is None:
            study, number = _best_of(study) if study.is_search else (study, arm_row(study))
        ledger = study.main
    trial = _complete(ledger, number)
    result = TrialResult.of(trial.value, trial.user_attrs)
    path = _student(study, ledger, trial, nfe)
    denoiser, metadata = load_denoiser(path)
    metadata.pop("identity", None)
    fid = result.fids.get(str(nfe)) if nfe is not None else result.fid
    if fid is not None:
        metadata["fid"] = fid.as_dict()
    pictures: dict[str, Picture] = {}
    extra = ""
    if not study.is_search:
        metadata["fid_table"] = fid_table(study)
        metadata[_MADE_FROM] = made_from(study, number)
        pictures |= _pictures(study, trial, path)
        rows = align(table_rows(comparisons_of(study), teacher_of(study)))
        extra = "All arms of the study:\n\n```\n" + "\n".join(rows) + "\n```"
    pipeline = _pipeline_of(denoiser, metadata)
    export_folder(folder, denoiser, metadata, pictures=pictures, extra_card=extra, finish=pipeline)
    return [path for path in (folder, folder / PIPELINE) if path.is_dir()]


def fid_table(study: Study) -> list[dict[str, Any]]:
    """The FIDs of given arms as rows for a model card."""
    table = []
    if (teacher := teacher_of(study)) is not None:
        latents = {"evaluation_seed": teacher.seeds["evaluation"]}
        told = {"nfe": teacher.nfe, "arm": "teacher", "fid": teacher.value}
        table.append({**told, **_alike(teacher), **latents})
    for comparison in comparisons_of(study):
        for each in comparison.results:
            found = each.summary()
            table.append(
                {
                    "nfe": each.conditions.nfe,
                    **comparison.variant,
                    "arm": each.arm.name,
                    "fid": found.mean,
                    "std_err": found.standard_error,
                    "n": found.n,
                    **_alike(each.conditions),
                    "training_seeds": " ".join(map(str, sorted(each.fids))),
                }
            )
    return table


def _alike(fid: MeasuredFID) -> dict[str, Any]:
    """What a FID in a model card is told with."""
    return {
        "images": fid.images,
        "extractor": fid.extractor,
        "extractor_sha256": fid.extractor_sha256,
        "reference": fid.reference,
        "reference_images": fid.reference_images,
    }


def made_from(study: Study, number: int) -> dict[str, Any]:
    """Whose student a model folder has, and what its figures rest on."""
    return {
        "study": study.name,
        "fingerprint": study.main.attribute(FINGERPRINT),
        "row": number,
        "rows": [trial.number for trial in _complete_rows(study.main)],
        **study.facts,
    }


def is_current(folder: Path, study: Study, number: int) -> bool:
    """Whether a folder is the model of that row, made of all that the study has measured."""
    return _stored_origin(folder) == made_from(study, number)


def is_of(folder: Path, name: str) -> bool:
    """Whether a folder is a model of the study of that name, of whatever age."""
    return _stored_origin(folder).get("study") == name


def _stored_origin(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text()).get(_MADE_FROM, {})
        return found
    return {}


def put_aside(folder: Path) -> None:
    """Make room where an older model lies, which keeps its files under another name."""
    if not folder.exists():
        return
    older = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    aside = next(path for path in older if not path.exists())
    folder.rename(aside)
    sys.stderr.write(f"the model that was there is now {aside}\n")


def arm_row(study: Study, *, arm: str | None = None, variant: int | None = None) -> int:
    """The row of the first seed whose arm is no baseline.

    Args:
        study: Of given arms.
        arm: Name of the arm; needed where there are several but for a confirmation, whose winner
            is meant.
        variant: Index of the method's settings.

    Raises:
        InputError: None of them is complete, or it is not clear which arm is meant.
    """
    arms = study.arms
    searched = [each.name for each in arms if each.baseline is None]
    if arm is None and len(searched) > 1:
        arm = _winner_of(study, searched)
    rows = [(t.number, ArmRow.of(t.params)) for t in _complete_rows(study.main)]
    found = [
        (row.seed, number)
        for number, row in rows
        if arms[row.arm].name in ([arm] if arm else searched) and variant in (None, row.variant)
    ]
    if not found:
        raise InputError(
            f"{headline(study)}: no row of the promoted weights is complete; run the same command "
            "again, or name a row by --trial"
        )
    return min(found)[1]


def _winner_of(study: Study, names: list[str]) -> str:
    """Name of a confirmation's winner."""
    of = study.facts.get("of")
    if of is not None and study.name == of + CONFIRM_SUFFIX:
        found = verdict(Study.open(study.url, of))
        if found is not None:
            return found.winner.arm.name
    raise InputError(
        f"{study.name} has {len(names)} arms beside its baselines ({', '.join(names)}); name a "
        "row by --trial"
    )


def _baseline(study: Study, name: str) -> tuple[Ledger, int]:
    """Where a search's baseline is."""
    if not study.is_search or study.given is None:
        raise InputError(f"--baseline {name} is for a search; name a row by --trial instead")
    if (found := baselines_of(study).get(name)) is None:
        raise InputError(f"study {study.name} has no complete baseline {name}; launch it first")
    return study.given, found.number


def _best_of(study: Study) -> tuple[Study, int]:
    """Whose student a search hands on, and where it is."""
    found, confirmation = verdict(study), study.beside(study.name + CONFIRM_SUFFIX)
    if found is not None and found.ended and confirmation is not None:
        rows = found.winner.rows
        return confirmation, rows[min(rows)]
    best = study.search.best()
    return study, _complete_rows(study.search)[0].number if best is None else best.number


def _complete_rows(ledger: Ledger) -> list[StoredTrial]:
    trials = ledger.rows(TrialState.COMPLETE)
    if not trials:
        raise InputError(
            f"no row of {ledger.study.study_name} is complete, so there is no student to export"
        )
    return trials


def _complete(ledger: Ledger, number: int) -> StoredTrial:
    trials = {trial.number: trial for trial in _complete_rows(ledger)}
    if number not in trials:
        raise InputError(
            f"trial {number} of {ledger.study.study_name} is not complete, or there is none; "
            f"complete are {', '.join(map(str, sorted(trials)))}"
        )
    return trials[number]


def _student(study: Study, ledger: Ledger, trial: StoredTrial, nfe: int | None) -> Path:
    """The file of a row's student.

    Raises:
        InputError: It was not kept, or the row has no such stage.
    """
    path = named_file(trial.user_attrs["student"])
    if nfe is not None:
        stages = study.spec.resolved.stages
        if len(stages) == 1:
            raise InputError(
                f"--nfe {nfe}: {stages[0].label} is the only stage of {study.name}; leave it out, "
                "and name a row by --trial where there are several"
            )
        names = {stage.nfe: stage.name for stage in stages}
        if nfe not in names:
            raise InputError(
                f"--nfe {nfe}: the students of {study.name} take "
                f"{', '.join(map(str, names))} evaluations; choose one, or leave it out"
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
        "search keeps the students of its best trials alone (keep_students of its file: raise it "
        "before the next launch, or name a trial by `clean --keep`); kept are those of "
        f"{', '.join(kept) or 'none'}"
    )


def _pictures(study: Study, trial: StoredTrial, path: Path) -> dict[str, Picture]:
    """The figure, and the first images of this student and the baselines' at that stage."""
    plots = overview_of(study).plots()
    pictures: dict[str, Picture] = {FIGURE: plots[0].save} if plots else {}
    own, arms = ArmRow.of(trial.params), study.arms
    grid_name = GRID if path.stem == "student" else f"{path.stem}-{GRID}"
    searched = [index for index, arm in enumerate(arms) if arm.baseline is None]
    shown = own.arm if own.arm in searched else searched[0] if len(searched) == 1 else None
    for other in _complete_rows(study.main):
        row = ArmRow.of(other.params)
        grid = named_file(other.user_attrs["student"]).with_name(grid_name)
        name = arms[row.arm].baseline or ("promoted" if row.arm == shown else None)
        alike = (row.seed, row.variant) == (own.seed, own.variant)
        if name is not None and alike and grid.is_file():
            pictures[f"samples-{name}.png"] = grid
    return pictures


def _pipeline_of(
    denoiser: "NetworkDenoiser", metadata: Mapping[str, Any]
) -> Callable[[Path], None] | None:
    """What writes the same as a diffusers pipeline beside it, where the network is diffusers'."""
    if not isinstance(denoiser.model, DiffusersUNet):
        return None

    def write(folder: Path) -> None:
        try:
            export_pipeline(folder / PIPELINE, denoiser, metadata)
        except InputError as error:
            sys.stderr.write(f"no diffusers pipeline is written: {error}\n")

    return write
