"""Notes where optuna-dashboard reads them: in pieces, among a study's system attributes.

Its own functions read all notes of a study to write one, are not atomic, and import scikit-learn
(150 MB in every worker). Tests read with them what is written here.
"""

import json

import sqlalchemy as sa
from optuna.storages import RDBStorage

from search.storage.engine import exclusive, retrying
from search.storage.tables import STUDY_SYSTEM_ATTRIBUTES

PIECE = 2045  # characters, as the dashboard has it


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
    starts = range(0, len(note), PIECE)
    pieces = {f"{start}{i}": note[at : at + PIECE] for i, at in enumerate(starts)}
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
