"""Whether the trials of a study used different versions of their packages."""

import json
from collections import defaultdict

import sqlalchemy as sa

from search.storage.leases import TRIALS, USER_ATTRIBUTES


def differing(engine: sa.Engine, study_id: int) -> list[str]:
    """A line for each package of which the study's trials used different versions.

    Args:
        engine: The study's database.
        study_id: Optuna's key of the study.
    """
    query = (
        sa.select(
            USER_ATTRIBUTES.c.value_json,
            sa.func.min(TRIALS.c.number).label("first"),
            sa.func.count().label("trials"),
        )
        .select_from(TRIALS.join(USER_ATTRIBUTES, USER_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id))
        .where(TRIALS.c.study_id == study_id, USER_ATTRIBUTES.c.key == "versions")
        .group_by(USER_ATTRIBUTES.c.value_json)
        .order_by(sa.literal_column("first"))
    )
    counted: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    with engine.connect() as connection:
        for row in connection.execute(query):
            for package, version in json.loads(row.value_json).items():
                counted[package][version] += row.trials
    return [
        f"{package} differs between trials: "
        + ", ".join(f"{version} in {number}" for version, number in versions.items())
        for package, versions in counted.items()
        if len(versions) > 1
    ]
