"""Notes and pictures in optuna-dashboard: what a finished row shows there.

A note is Markdown, stored in pieces among a study's system attributes. The dashboard's own
functions read all notes of a study to write one, are not atomic, and import scikit-learn (150 MB
in every worker). Tests read with them what is written here.

Every text from the database is escaped: anyone with write access may have chosen it.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa
from optuna.storages import RDBStorage

from bdense.weights import space_of
from bdense.weights.space import by_interval
from search.errors import LeaseLostError, StorageError
from search.storage.engine import exclusive, one_line, retrying
from search.storage.ledger import Claim, Ledger
from search.storage.tables import STUDY_SYSTEM_ATTRIBUTES
from search.study.artifacts import artifact_store, attach
from search.study.curve import curve_line, curve_rows
from search.study.folders import GRID, pictures
from search.study.markdown import escaped, fenced, markdown_table, paragraphs
from search.study.results import TrialResult, sample_command
from search.study.wording import grid_legend, timings_text

_log = logging.getLogger(__name__)

_PIECE = 2045  # characters, as the dashboard has it


def trial_note(title: str, result: TrialResult, pictures: Sequence[tuple[str, str]]) -> str:
    """A finished row: weights, its figure and conditions or why it was pruned, timings, pictures.

    ``pictures`` are pairs of file name and address.
    """
    lines = [f"## {escaped(title)}"]
    if result.value is not None and (figure := result.figure) is not None:
        value = escaped(f"{figure.metric} {result.value:.4f}")
        lines.append(f"**{value}** {escaped(figure.in_full())}")
        if (clip := result.clip_score) is not None:
            lines.append(escaped(f"{clip.text()}."))
    elif result.reason is not None:
        at = f" at {result.pruned_at:g} of its budget" if result.pruned_at is not None else ""
        lines.append(f"**Pruned{at}**: {escaped(result.reason)}")
    if result.curve is not None:
        lines += [escaped(curve_line(result.curve)), markdown_table(curve_rows(result.curve))]
    if result.weights:
        weights = [[f"{w:.4g}" for w in row] for row in by_interval(result.weights)]
        header = [f"w_{k}" for k in range(1, len(weights[0]) + 1)]
        lines.append(markdown_table([header, *weights]))
    if result.parameters and result.weights:
        lines.append(escaped(space_of(result.parameters).label(result.parameters)))
    elif result.parameters:
        named = [(name, f"{value:.4g}") for name, value in result.parameters.items()]
        lines.append(markdown_table(list(zip(*named, strict=True))))
    if result.fids:
        rows = [("NFE", "FID"), *((nfe, f"{fid.value:.3f}") for nfe, fid in result.fids.items())]
        lines.append(markdown_table(rows))
    lines.append(escaped(timings_text(result.timings)))
    if command := sample_command(result):
        lines += ["Its student, while it is among those kept:", fenced(command, "sh")]
    for name, address in pictures:
        legend = escaped(grid_legend(result.prompts)) if name.endswith(GRID) else ""
        lines.append(f"{escaped(name)}: {legend}".rstrip() + f"\n\n![]({address})")
    return paragraphs(lines)


def attach_pictures(ledger: Ledger, claim: Claim, folder: Path, result: TrialResult) -> None:
    """Make a trial's pictures its artifacts and write its note, before it is finished.

    A store that cannot be written to costs the pictures, never the result.

    Raises:
        LeaseLostError: Another worker took it over.
        StorageError: The database stayed away.
    """
    files = pictures(folder)
    ids: dict[str, str] = {}
    if files:
        with errors_logged(f"pictures of trial {claim.number}"):
            ids = attach(ledger.storage, claim.trial_id, files, artifact_store())
    addresses = [(name, address(ledger, claim.trial_id, each)) for name, each in ids.items()]
    with errors_logged(f"note of trial {claim.number}"):
        arm = result.arm
        title = f"trial {claim.number}" if arm is None else f"{arm}, seed {claim.params['seed']}"
        note = trial_note(title, result, addresses)
        save_note(ledger.storage, ledger.key, note, trial_id=claim.trial_id)


def save_note(
    storage: RDBStorage, study_id: int, note: str, *, trial_id: int | None = None
) -> None:
    """Replace the note (Markdown) of a trial, or of the study, atomically.

    Raises:
        StorageError: The database stayed away.
    """
    of = "dashboard:" if trial_id is None else f"dashboard:{trial_id}:"
    version_key, mine = f"{of}note_ver", STUDY_SYSTEM_ATTRIBUTES.c.study_id == study_id
    start = f"{of}note_str:"
    starts = range(0, len(note), _PIECE)
    pieces = {f"{start}{i}": note[at : at + _PIECE] for i, at in enumerate(starts)}
    old = sa.or_(
        STUDY_SYSTEM_ATTRIBUTES.c.key == version_key,
        STUDY_SYSTEM_ATTRIBUTES.c.key.startswith(start, autoescape=True),
    )

    def write() -> None:
        # The lock keeps two launchers of a study from both inserting the version.
        with (
            exclusive(storage.engine, f"texts of study {study_id}"),
            storage.engine.begin() as connection,
        ):
            found = connection.scalar(
                sa.select(STUDY_SYSTEM_ATTRIBUTES.c.value_json).where(
                    mine, STUDY_SYSTEM_ATTRIBUTES.c.key == version_key
                )
            )
            stored: dict[str, int | str] = {version_key: json.loads(found or "0") + 1, **pieces}
            connection.execute(sa.delete(STUDY_SYSTEM_ATTRIBUTES).where(mine, old))
            connection.execute(
                sa.insert(STUDY_SYSTEM_ATTRIBUTES),
                [
                    {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
                    for key, value in stored.items()
                ],
            )

    retrying(write)


def address(ledger: Ledger, trial_id: int, artifact_id: str) -> str:
    """Where the dashboard serves an artifact."""
    return f"/artifacts/{ledger.key}/{trial_id}/{artifact_id}"


@contextlib.contextmanager
def errors_logged(
    what: str, reraise: tuple[type[Exception], ...] = (LeaseLostError, StorageError)
) -> Iterator[None]:
    """Store what can be done without: errors are logged, except those in ``reraise``."""
    try:
        yield
    except reraise:
        raise
    except Exception as error:  # noqa: BLE001  a picture must not cost a result
        _log.warning("%s could not be stored: %s", what, one_line(error))
