"""Whether the pictures that trials carry in the database are where they are said to be."""

import json
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from search.doctor.finding import Finding, first_of, problem, warning
from search.doctor.rows import Subject
from search.storage.leases import TRIALS
from search.storage.rows import SYSTEM_ATTRIBUTES
from search.study.artifacts import Store, artifact_store, artifacts_place, is_stored

# As Optuna stores what it knows of an artifact, in the trial's system attributes.
_PREFIX = "artifacts:"
# Of a bucket, where each is asked for by itself.
_ASKED_AT_MOST = 50


def check_artifacts(engine: sa.Engine, of: Subject) -> Iterator[Finding]:
    """Of a folder every artifact, of a bucket the last ones."""
    known = _known(engine, of)
    if not known:
        return
    place = artifacts_place()
    try:
        if "://" in place:
            missing = _missing_in(artifact_store(place), known[-_ASKED_AT_MOST:])
        else:
            folder = Path(place)
            names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            missing = [number for number, key in known if key not in names]
    except Exception as error:  # noqa: BLE001  the store's own, whichever it is
        yield problem("artifacts", f"{place}: {error}", "check BDENSE_ARTIFACTS and its rights")
        return
    if missing:
        yield warning(
            "artifacts",
            f"{first_of(sorted(set(missing)))} have pictures in the database that are not in "
            f"{place}",
            "the dashboard shows gaps; set BDENSE_ARTIFACTS to where they are, or restore them",
        )


def _known(engine: sa.Engine, of: Subject) -> list[tuple[int, str]]:
    """Number of the trial and id of each artifact, in order of their trials."""
    query = (
        sa.select(TRIALS.c.number, SYSTEM_ATTRIBUTES.c.value_json)
        .select_from(
            TRIALS.join(SYSTEM_ATTRIBUTES, SYSTEM_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id)
        )
        .where(
            TRIALS.c.study_id == of.key,
            SYSTEM_ATTRIBUTES.c.key.startswith(_PREFIX, autoescape=True),
        )
        .order_by(TRIALS.c.number)
    )
    with engine.connect() as connection:
        found = list(connection.execute(query))
    # Optuna stores its metadata as JSON in a string.
    return [(row.number, _decoded(row.value_json)["artifact_id"]) for row in found]


def _decoded(text: str) -> dict[str, str]:
    value = json.loads(text)
    metadata: dict[str, str] = json.loads(value) if isinstance(value, str) else value
    return metadata


def _missing_in(store: Store, known: list[tuple[int, str]]) -> list[int]:
    return [number for number, key in known if not is_stored(store, key)]
