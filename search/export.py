"""Students of a study or promotion as folders to hand on: weights, card, pictures, figures."""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from bdense.errors import InputError
from bdense.models.diffusers_export import export_pipeline
from bdense.models.folders import CONFIG, Picture, export_folder
from bdense.models.store import load_denoiser
from bdense.networks.diffusers_unet import DiffusersUNet
from search.analysis.comparison import compare
from search.analysis.confirmation import CONFIRM_SUFFIX, verdict
from search.report.chain_report import card_row, chain_chart, chain_table, fid_table, seeds_text
from search.report.render import DPI, picture
from search.storage.ledger import Ledger
from search.storage.rows import StoredTrial
from search.study.arms import Planned, PlannedRow
from search.study.folders import named_file
from search.study.study import FINGERPRINT, Study

if TYPE_CHECKING:
    from bdense.diffusion.denoiser import NetworkDenoiser

PIPELINE, FIGURE = "diffusers", "fid.png"
_MADE_FROM = "made_from"  # in the metadata of what is handed on


def export_trial(
    record: Study | Planned,
    folder: Path,
    *,
    number: int | None = None,
    steps: int | None = None,
    baseline: str | None = None,
) -> list[Path]:
    """Write a kept student as a model folder.

    Args:
        record: A search, confirmation, transfer or promotion.
        folder: Where it will lie; it must not exist.
        number: Of the trial or row; None is, of a search, the confirmed winner's under the first
            fresh seed, else the best trial's, and of planned rows the first seed's of the arm that
            is no baseline.
        steps: Of a chain's student; None is the last.
        baseline: Of a search, the method of the baseline that is meant instead.

    Returns:
        The folder, and the diffusers pipeline in it where the network is a diffusers one.

    Raises:
        InputError: There is no such trial, it has not ended well, or its student was not kept.
    """
    if baseline is not None:
        ledger, number = _baseline(record, baseline)
    else:
        if number is None:
            record, number = (
                _best_of(record) if isinstance(record, Study) else (record, promoted_row(record))
            )
        ledger = record.trials if isinstance(record, Study) else record.ledger
    trial = _complete(ledger, number)
    path = _student(ledger, trial, steps)
    denoiser, metadata = load_denoiser(path)
    metadata.pop("identity", None)
    pictures: dict[str, Picture] = {}
    extra = ""
    if isinstance(record, Planned) and record.kind == "progressive":
        metadata["fid"] = trial.user_attrs["fids"][str(_steps(trial, steps))]
        metadata["fid_table"] = fid_table(record)
        pictures |= _chain_pictures(record, trial, _steps(trial, steps))
        extra = f"All rounds of the promotion:\n\n```\n{chain_table(record)}\n```"
    elif isinstance(record, Planned):
        metadata["fid"] = trial.user_attrs["fid"]
        metadata["fid_table"] = _student_table(record, trial)
    if isinstance(record, Planned):
        metadata[_MADE_FROM] = made_from(record)
    pipeline = _pipeline_of(denoiser, metadata)
    export_folder(folder, denoiser, metadata, pictures=pictures, extra_card=extra, finish=pipeline)
    return [path for path in (folder, folder / PIPELINE) if path.is_dir()]


def made_from(planned: Planned) -> dict[str, Any]:
    """What a model folder's figures rest on: it is out of date once this has changed."""
    numbers = [trial.number for trial in _complete_trials(planned.ledger)]
    fingerprint = planned.ledger.attribute(FINGERPRINT)
    return {"study": planned.name, "fingerprint": fingerprint, "rows": numbers, **planned.facts}


def is_current(folder: Path, planned: Planned) -> bool:
    """Whether a model folder was made of all that the promotion has measured."""
    config = folder / CONFIG
    if not config.is_file():
        return False
    with contextlib.suppress(ValueError):
        return bool(json.loads(config.read_text()).get(_MADE_FROM) == made_from(planned))
    return False


def is_of(folder: Path, name: str) -> bool:
    """Whether a folder is a model of the promotion of that name, of whatever age."""
    config = folder / CONFIG
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads(config.read_text()).get(_MADE_FROM, {}).get("study") == name)
    return False


def put_aside(folder: Path) -> None:
    """Make room where an older model lies, which keeps its files under another name."""
    if not folder.exists():
        return
    older = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    aside = next(path for path in older if not path.exists())
    folder.rename(aside)
    sys.stderr.write(f"the model of fewer rows is now {aside}\n")


def _baseline(record: Study | Planned, method: str) -> tuple[Ledger, int]:
    """Where a search's baseline is."""
    if not isinstance(record, Study) or record.baselines is None:
        raise InputError(f"--baseline {method} is of a search; name a row by --trial instead")
    for trial in _complete_trials(record.baselines):
        if trial.params["method"] == method:
            return record.baselines, trial.number
    raise InputError(f"study {record.name} has no complete baseline {method}; launch it first")


def promoted_row(
    planned: Planned,
    *,
    arm: str | None = None,
    nfe: int | None = None,
    kimg: float | None = None,
) -> int:
    """The row of the first seed whose arm is no baseline.

    Args:
        planned: The study.
        arm: Name of the arm; needed where there are several but for a confirmation, whose winner
            is meant.
        nfe, kimg: Of a student of SFD.

    Raises:
        InputError: None of them is complete, or it is not clear which arm is meant.
    """
    arms = planned.arms
    searched = [each.name for each in arms if not each.is_baseline]
    if arm is None and len(searched) > 1:
        arm = _winner_of(planned, searched)
    rows = [(t.number, PlannedRow.of(t.params)) for t in _complete_trials(planned.ledger)]
    found = [
        (row.seed, number)
        for number, row in rows
        if arms[row.arm].name in ([arm] if arm else searched)
        and nfe in (None, row.nfe)
        and kimg in (None, row.kimg)
    ]
    if not found:
        at = "" if nfe is None or kimg is None else f" at NFE {nfe} and {kimg:g} kimg"
        raise InputError(
            f"{planned.headline()}: none of the promoted weights' rows{at} is complete; run the "
            "same command again, or name a row by --trial"
        )
    return min(found)[1]


def _winner_of(planned: Planned, names: Sequence[str]) -> str:
    """Name of a confirmation's winner."""
    of = planned.facts.get("of")
    if of is not None and planned.name == of + CONFIRM_SUFFIX:
        found = verdict(Study.open(planned.url, of))
        if found is not None:
            return found.winner.arm.name
    raise InputError(
        f"{planned.name} has {len(names)} arms beside its baselines ({', '.join(names)}); name a "
        "row by --trial"
    )


def _best_of(study: Study) -> tuple[Study | Planned, int]:
    """Whose student a search hands on, and where it is."""
    found = verdict(study)
    if found is not None and found.ended:
        rows = found.winner.rows
        return Planned.open(study.url, study.name + CONFIRM_SUFFIX), rows[min(rows)]
    best = study.trials.best()
    return study, _complete_trials(study.trials)[0].number if best is None else best.number


def _complete_trials(ledger: Ledger) -> list[StoredTrial]:
    trials = ledger.rows(TrialState.COMPLETE)
    if not trials:
        raise InputError(
            f"no row of {ledger.study.study_name} is complete, so there is no student to export"
        )
    return trials


def _complete(ledger: Ledger, number: int) -> StoredTrial:
    trials = {trial.number: trial for trial in _complete_trials(ledger)}
    if number not in trials:
        raise InputError(
            f"trial {number} of {ledger.study.study_name} is not complete, or there is none; "
            f"complete are {', '.join(map(str, sorted(trials)))}"
        )
    return trials[number]


def _student(ledger: Ledger, trial: StoredTrial, steps: int | None) -> Path:
    """The file of a trial's student.

    Raises:
        InputError: It was not kept, or the row has no such round.
    """
    last = named_file(trial.user_attrs["student"])
    if steps is not None and "fids" not in trial.user_attrs:
        raise InputError(
            f"--steps {steps} is of a promotion's chain, and this student is of SFD; leave it out"
        )
    path: Path = last if steps is None else last.with_name(f"{steps:05d}.safetensors")
    if path.is_file():
        return path
    if steps is not None:
        students = last.parent.glob("[0-9]*.safetensors")
        rounds = sorted((str(int(file.stem)) for file in students), key=int)
        raise InputError(
            f"row {trial.number} has no student of {steps} steps; choose from {', '.join(rounds)}"
        )
    kept = [
        str(other.number)
        for other in _complete_trials(ledger)
        if named_file(other.user_attrs["student"]).is_file()
    ]
    raise InputError(
        f"the student of trial {trial.number} was not kept, only its result: {path} is gone, as a "
        "search keeps the students of its best trials alone (keep_students of its file: raise it "
        "before the next launch, or name a trial by `clean --keep`); kept are those of "
        f"{', '.join(kept) or 'none'}"
    )


def _steps(trial: StoredTrial, steps: int | None) -> int:
    return min(int(name) for name in trial.user_attrs["fids"]) if steps is None else steps


def _chain_pictures(planned: Planned, trial: StoredTrial, steps: int) -> dict[str, Picture]:
    """The figure, and each arm's first images at that number of steps, from the same latents."""
    figure = picture(chain_chart(planned))
    pictures: dict[str, Picture] = {
        FIGURE: lambda path: figure.savefig(path, format="png", dpi=DPI)
    }
    seed, arms = PlannedRow.of(trial.params).seed, planned.arms
    for other in _complete_trials(planned.ledger):
        row = PlannedRow.of(other.params)
        student = named_file(other.user_attrs["student"])
        grid = student.with_name(f"{steps:05d}-samples.png")
        if row.seed == seed and grid.is_file():
            name = arms[row.arm].name.split()[0] if arms[row.arm].is_baseline else "promoted"
            pictures[f"samples-{name}.png"] = grid
    return pictures


def _student_table(planned: Planned, trial: StoredTrial) -> list[dict[str, Any]]:
    """The card's FIDs of students of SFD: every arm at this row's budget and NFE."""
    row = PlannedRow.of(trial.params)
    return [
        {"nfe": row.nfe, "kimg": row.kimg, **card_row(result), "seeds": seeds_text(result)}
        for result in compare(planned, kimg=row.kimg, nfe=row.nfe).results
    ]


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
