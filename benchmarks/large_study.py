"""Studies of any size, written by a few SQL statements; Optuna takes minutes for 10,000 trials.

The rows are as Optuna and a search would write them; tests compare them with what Optuna reads.
"""

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage

from bdense.weights.log_linear import normalised_weights
from search.spec.space import search_space
from search.spec.study import StudySpec
from search.study.study import Study

TABLES = ("studies", "trials", "trial_values", "trial_params", "trial_user_attributes")
BATCH = 1000
# The bowl that the values lie on, about that of the digits, and what they scatter by.
_BEST_A, _BEST_FID, _SCATTER = 1.0, 12.4, 0.15
_SECONDS_A_TRIAL = 15


def fill(study: Study, storage: RDBStorage, spec: StudySpec, count: int) -> None:
    """Add complete trials to a search over a alone; no worker may be at work on it.

    Args:
        study: Where to; its budget stays as it is.
        storage: Its database.
        spec: Its spec, of normalised weights.
        count: How many.
    """
    distribution = distribution_to_json(search_space(spec)["a"])
    draw = random.Random(0)
    begun = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=_SECONDS_A_TRIAL * count)
    metadata = sa.MetaData()
    metadata.reflect(storage.engine, only=TABLES)
    studies, trials, *_ = (metadata.tables[name] for name in TABLES)
    with storage.engine.begin() as connection:
        study_id = connection.execute(
            sa.select(studies.c.study_id).where(studies.c.study_name == study.name)
        ).scalar_one()
        of_study = sa.select(sa.func.count()).where(trials.c.study_id == study_id)
        number = connection.execute(of_study).scalar_one()
        key = connection.execute(sa.select(sa.func.max(trials.c.trial_id))).scalar() or 0
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES[1:]}
        for done in range(1, count + 1):
            key, a = key + 1, draw.uniform(-1.0, 2.0)
            value = _BEST_FID + (a - _BEST_A) ** 2 + draw.gauss(0.0, _SCATTER)
            ended = begun + timedelta(seconds=_SECONDS_A_TRIAL)
            own = {
                "trials": {
                    "number": number,
                    "study_id": study_id,
                    "state": "COMPLETE",
                    "datetime_start": begun,
                    "datetime_complete": ended,
                },
                "trial_values": {"objective": 0, "value": value, "value_type": "FINITE"},
                "trial_params": {
                    "param_name": "a",
                    "param_value": a,
                    "distribution_json": distribution,
                },
            }
            for name, columns in own.items():
                rows[name].append({"trial_id": key, **columns})
            rows["trial_user_attributes"] += [
                {"trial_id": key, "key": name, "value_json": json.dumps(stored)}
                for name, stored in _stored(spec, number, a, value).items()
            ]
            number, begun = number + 1, ended
            if done % BATCH == 0 or done == count:
                for name, made in rows.items():
                    connection.execute(metadata.tables[name].insert(), made)
                    made.clear()
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.setval("trials_trial_id_seq", key)))
    if storage.engine.dialect.name == "postgresql":
        # As the server does by itself within a minute.
        own_engine = storage.engine.execution_options(isolation_level="AUTOCOMMIT")
        with own_engine.connect() as connection:
            connection.execute(sa.text("VACUUM ANALYZE"))


def _stored(spec: StudySpec, number: int, a: float, value: float) -> dict[str, Any]:
    """What a trial of that slope stores, as of ``search.study.results``."""
    substeps = spec.resolved.num_branches
    weights = normalised_weights(a, substeps)
    return {
        "weights": weights.values(substeps),
        "fid": {
            "value": value,
            "images": spec.evaluation.images,
            "reference": "digits",
            "reference_images": 1797,
            "extractor": spec.evaluation.extractor,
            "extractor_sha256": "0" * 64,
            "nfe": spec.resolved.stages[-1].nfe,
            "seeds": {"training": 0, "evaluation": 0},
        },
        "fingerprint": spec.fingerprint(),
        "seeds": {"training": 0, "evaluation": 0, "sampler": number},
        "versions": {"bdense": "0.1.0", "torch": "2.13.0", "optuna": "5.0.0", "ray": "2.60.0"},
        "timings": {
            "student_seconds": 11.2,
            "evaluation_seconds": 3.4,
            "service_seconds": 0.2,
        },
        "student": f"{spec.name}/{number:05d}/student.safetensors",
        "device": "x86_64 CPU, 1 threads",
        "worker": "host:1234",
        "a": a,
        "b": weights.b,
        "tries": 1,
    }
