"""Students of a study or promotion as folders to hand on: weights, card, pictures, figures."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from bdense.checkpoints import load_denoiser
from bdense.diffusers_export import export_pipeline
from bdense.errors import InputError
from bdense.exports import Picture, export_folder
from bdense.networks.diffusers_unet import DiffusersUNet
from search.chain_report import chain_figure, chain_table, fid_table
from search.comparison import compare
from search.confirmation import SUFFIX, verdict
from search.ledger import Ledger
from search.planned import Planned, Row
from search.storage import retrying, runs_folder
from search.study import Study

if TYPE_CHECKING:
    from bdense.denoiser import NetworkDenoiser

PIPELINE, FIGURE = "diffusers", "fid.png"
_CONDITIONS = ("images", "extractor", "extractor_sha256", "reference", "reference_images")


def export_trial(
    record: Study | Planned, folder: Path, *, number: int | None, steps: int | None
) -> list[Path]:
    """Write a kept student as a model folder.

    Args:
        record: A search, confirmation, transfer or promotion.
        folder: Where it will lie; it must not exist.
        number: Of the trial or row; None is, of a search, the confirmed winner's under the first
            fresh seed, else the best trial's, and of planned rows the first seed's of the arm that
            is no baseline.
        steps: Of a chain's student; None is the last.

    Returns:
        The folder, and the diffusers pipeline in it where the network is a diffusers one.

    Raises:
        InputError: There is no such trial, it has not ended well, or its student was not kept.
    """
    if number is None and isinstance(record, Study):
        record, number = _best_of(record)
    ledger = record.trials if isinstance(record, Study) else record.ledger
    trial = _complete(ledger, _promoted_row(record) if number is None else number)
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
    export_folder(folder, denoiser, metadata, pictures=pictures, extra_card=extra)
    return [folder, *_pipeline(folder, denoiser, metadata)]


def row_of_nfe(planned: Planned, nfe: int) -> int:
    """The row of the promoted weights for that NFE, of the first seed.

    Raises:
        InputError: None of them is complete.
    """
    arms = planned.arms
    rows = [(t.number, Row.of(t.params)) for t in _complete_trials(planned.ledger)]
    found = [
        (row.seed, number)
        for number, row in rows
        if row.nfe == nfe and not arms[row.arm].is_baseline
    ]
    if not found:
        raise InputError(f"{planned.headline()}: no student of NFE {nfe} is complete")
    return min(found)[1]


def _best_of(study: Study) -> tuple[Study | Planned, int]:
    """Whose student a search hands on, and where it is."""
    found = verdict(study)
    if found is not None and found.ended:
        rows = found.winner.rows
        return Planned.open(study.url, study.name + SUFFIX), rows[min(rows)]
    trials = _complete_trials(study.trials)
    return study, min(trials, key=lambda t: (t.value or 0.0, t.number)).number


def _promoted_row(record: Study | Planned) -> int:
    """The row of the first seed whose arm is no baseline."""
    assert isinstance(record, Planned)
    arms = record.arms
    rows = [(t, Row.of(t.params)) for t in _complete_trials(record.ledger)]
    searched = [(row.seed, t.number) for t, row in rows if not arms[row.arm].is_baseline]
    if not searched:
        raise InputError(
            f"{record.headline()}: none of the promoted weights' rows is complete; run the same "
            "command again, or name a row by --trial"
        )
    return min(searched)[1]


def _complete_trials(ledger: Ledger) -> list[FrozenTrial]:
    complete = (TrialState.COMPLETE,)
    trials = retrying(lambda: ledger.study.get_trials(deepcopy=False, states=complete))
    if not trials:
        raise InputError(
            f"no row of {ledger.study.study_name} is complete, so there is no student to export"
        )
    return trials


def _complete(ledger: Ledger, number: int) -> FrozenTrial:
    trials = {trial.number: trial for trial in _complete_trials(ledger)}
    if number not in trials:
        raise InputError(
            f"trial {number} of {ledger.study.study_name} is not complete, or there is none; "
            f"complete are {', '.join(map(str, sorted(trials)))}"
        )
    return trials[number]


def _student(ledger: Ledger, trial: FrozenTrial, steps: int | None) -> Path:
    """The file of a trial's student.

    Raises:
        InputError: It was not kept, or the row has no such round.
    """
    last = runs_folder() / trial.user_attrs["student"]
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
        if (runs_folder() / other.user_attrs["student"]).is_file()
    ]
    raise InputError(
        f"the student of trial {trial.number} was not kept ({path} is gone; keep_students says "
        f"how many are); kept are those of {', '.join(kept) or 'none'}"
    )


def _steps(trial: FrozenTrial, steps: int | None) -> int:
    return min(int(name) for name in trial.user_attrs["fids"]) if steps is None else steps


def _chain_pictures(planned: Planned, trial: FrozenTrial, steps: int) -> dict[str, Picture]:
    """The figure, and each arm's first images at that number of steps, from the same latents."""
    figure = chain_figure(planned)
    pictures: dict[str, Picture] = {
        FIGURE: lambda path: figure.savefig(path, format="png", dpi=150)
    }
    seed, arms = Row.of(trial.params).seed, planned.arms
    for other in _complete_trials(planned.ledger):
        row = Row.of(other.params)
        student = runs_folder() / other.user_attrs["student"]
        grid = student.with_name(f"{steps:05d}-samples.png")
        if row.seed == seed and grid.is_file():
            name = arms[row.arm].name.split()[0] if arms[row.arm].is_baseline else "promoted"
            pictures[f"samples-{name}.png"] = grid
    return pictures


def _student_table(planned: Planned, trial: FrozenTrial) -> list[dict[str, Any]]:
    """The card's FIDs of students of SFD: every arm at this row's budget and NFE."""
    row = Row.of(trial.params)
    table = []
    for result in compare(planned, kimg=row.kimg, nfe=row.nfe).results:
        found, first = result.summary(), result.conditions
        table.append(
            {
                "nfe": row.nfe,
                "arm": result.arm.name,
                "fid": found.mean,
                "std_err": found.standard_error if found.n > 1 else None,
                "n": found.n,
                "kimg": row.kimg,
                **{key: first[key] for key in _CONDITIONS},
                "seeds": " ".join(map(str, sorted(result.fids))),
            }
        )
    return table


def _pipeline(
    folder: Path, denoiser: "NetworkDenoiser", metadata: Mapping[str, Any]
) -> list[Path]:
    """The same as a diffusers pipeline, where the network is a diffusers one and it can be."""
    if not isinstance(denoiser.model, DiffusersUNet):
        return []
    try:
        export_pipeline(folder / PIPELINE, denoiser, metadata)
    except InputError as error:
        sys.stderr.write(f"no diffusers pipeline is written: {error}\n")
        return []
    return [folder / PIPELINE]
