"""Notes where optuna-dashboard reads them: in pieces, among a study's system attributes.

Its own functions for this read all notes of a study to write one, show readers half of it, and
draw in scikit-learn (150 MB in every worker); a test reads with them what is written here.
"""

import json

import sqlalchemy as sa
from optuna.storages import RDBStorage

from search.storage.engine import exclusive, retrying

# Optuna's own table.
ATTRIBUTES = sa.table(
    "study_system_attributes", *map(sa.column, ("study_id", "key", "value_json"))
)
PIECE = 2045  # characters, as the dashboard has it


def save_texts(
    storage: RDBStorage,
    study_id: int,
    note: str,
    *,
    trial_id: int | None = None,
) -> None:
    """Replace a note; a reader sees all of the old or all of the new.

    Args:
        storage: The study's.
        study_id: Optuna's key of it.
        note: Markdown.
        trial_id: Whose note it is; None is the study's.

    Raises:
        StorageError: The database stayed away.
    """
    of = "dashboard:" if trial_id is None else f"dashboard:{trial_id}:"
    version_key, mine = f"{of}note_ver", ATTRIBUTES.c.study_id == study_id
    start = f"{of}note_str:"
    pieces = {f"{start}{i}": piece for i, piece in _cut(note)}
    old = sa.or_(
        ATTRIBUTES.c.key == version_key, ATTRIBUTES.c.key.startswith(start, autoescape=True)
    )

    def write() -> None:
        # Two launchers of a study would both insert what neither has found.
        with (
            exclusive(storage.engine, f"texts of study {study_id}"),
            storage.engine.begin() as connection,
        ):
            found = connection.scalar(
                sa.select(ATTRIBUTES.c.value_json).where(mine, ATTRIBUTES.c.key == version_key)
            )
            stored: dict[str, int | str] = {version_key: json.loads(found or "0") + 1, **pieces}
            connection.execute(sa.delete(ATTRIBUTES).where(mine, old))
            connection.execute(
                sa.insert(ATTRIBUTES),
                [
                    {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
                    for key, value in stored.items()
                ],
            )

    retrying(write)


def _cut(text: str) -> list[tuple[int, str]]:
    starts = range(0, len(text), PIECE)
    return [(i, text[start : start + PIECE]) for i, start in enumerate(starts)]
