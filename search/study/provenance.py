"""Summarise when, where and by which versions a study's rows were made, and their cost."""

from collections import Counter
from collections.abc import Iterable

from optuna.trial import TrialState

from search.storage.engine import retrying
from search.storage.studies import read_studies
from search.study.study import Study
from search.study.wording import TIMINGS, timings_text

_KEYS = ("device", "worker", "versions", "timings")
_SHOWN = ("bdense", "torch", "python")


def provenance_of(study: Study) -> list[str]:
    """Lines about the rows that have a result, baselines included; none before there is one."""
    rows = [
        row.user_attrs
        for ledger in study.ledgers
        for state in (TrialState.COMPLETE, TrialState.PRUNED)
        for row in ledger.rows(_KEYS, state=state)
        if "worker" in row.user_attrs
    ]
    if not rows:
        return []
    engine, names = study.main.storage.engine, [each.name for each in study.ledgers]
    found = [each for each in retrying(lambda: read_studies(engine)) if each.name in names]
    begun = min(each.started for each in found if each.started is not None)
    ended = max((each.ended for each in found if each.ended is not None), default=begun)
    spent: Counter[str] = Counter()
    for row in rows:
        spent.update({key: row.get("timings", {}).get(key, 0.0) for key in TIMINGS})
    hosts = _listed(str(row["worker"]).rpartition(":")[0] for row in rows)
    versions = [
        f"{name} {_listed(row.get('versions', {}).get(name, '') for row in rows)}"
        for name in _SHOWN
    ]
    cost = timings_text({key: seconds for key, seconds in spent.items() if seconds})
    return [
        f"from {begun:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M} UTC",
        f"on {hosts}: {_listed(str(row.get('device', '')) for row in rows)}",
        f"by {'; '.join(versions)}",
        f"cost of {len(rows)} rows, all workers together: {cost or 'not measured'}",
    ]


def _listed(values: Iterable[str]) -> str:
    """The different values in their order."""
    return ", ".join(filter(None, dict.fromkeys(values)))
