"""What the doctor looks at in a study's rows: counts, leases, parameters, versions; by SQL."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from search.doctor.finding import Finding, first_of, ok, problem, warning
from search.storage.leases import (
    LEASE,
    RELEASED,
    STATE,
    STUDIES,
    STUDY_ATTRIBUTES,
    TRIALS,
    USER_ATTRIBUTES,
    Leases,
    RunningRow,
    database_clock,
)
from search.storage.rows import Rows
from search.storage.settings import DEFAULT_TTL_SECONDS
from search.storage.versions import differing
from search.study.study import ARMS, BASELINES_SUFFIX, FINGERPRINT, SPEC

_COMPLETE = TrialState.COMPLETE.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A study as it is stored, whoever made it.

    Attributes:
        key: Optuna's.
        parent: Of baselines, the attributes of the search that they belong to.
        has_baselines: Of a search, whether they are there.
    """

    key: int
    name: str
    attributes: Mapping[str, Any]
    parent: Mapping[str, Any] | None = None
    has_baselines: bool = False

    @property
    def is_baselines(self) -> bool:
        """Whether its rows are the baselines of a search."""
        return self.name.endswith(BASELINES_SUFFIX)

    @property
    def is_planned(self) -> bool:
        """Whether all its rows are known beforehand: what is there twice is a mistake."""
        return self.is_baselines or ARMS in self.attributes

    @property
    def is_whole(self) -> bool:
        """Whether its maker lived to write everything."""
        return "budget" in self.attributes and (SPEC in self.attributes or self.is_baselines)

    @property
    def spec(self) -> dict[str, Any]:
        """As JSON has it; of baselines, that of their search."""
        of = self.parent if self.is_baselines else self.attributes
        spec: dict[str, Any] = json.loads((of or {}).get(SPEC) or "{}")
        return spec


def subjects(engine: sa.Engine, name: str | None) -> list[Subject]:
    """A study and its baselines, or all studies, in order of their names."""
    attributes: dict[int, dict[str, Any]] = defaultdict(dict)
    asked = sa.select(STUDIES)
    if name is not None:
        asked = asked.where(STUDIES.c.study_name.in_([name, name + BASELINES_SUFFIX]))
    with engine.connect() as connection:
        keys = {row.study_name: row.study_id for row in connection.execute(asked)}
        of_them = sa.select(STUDY_ATTRIBUTES)
        if name is not None:
            of_them = of_them.where(STUDY_ATTRIBUTES.c.study_id.in_(list(keys.values())))
        for row in connection.execute(of_them):
            attributes[row.study_id][row.key] = json.loads(row.value_json)
    return [
        Subject(
            key=keys[each],
            name=each,
            attributes=attributes[keys[each]],
            parent=attributes.get(keys.get(each.removesuffix(BASELINES_SUFFIX), -1)),
            has_baselines=each + BASELINES_SUFFIX in keys,
        )
        for each in sorted(keys)
    ]


def names(engine: sa.Engine) -> list[str]:
    """Of all studies."""
    with engine.connect() as connection:
        return sorted(connection.execute(sa.select(STUDIES.c.study_name)).scalars())


def check_rows(engine: sa.Engine, of: Subject, *, has_leases: bool) -> Iterator[Finding]:
    """Everything about one study that its rows tell."""
    if not of.is_whole:
        yield _half_made(of)
        if "budget" not in of.attributes:
            return
    rows = Rows(engine, of.key)
    leases = Leases(engine, of.key, float(of.attributes.get("ttl", DEFAULT_TTL_SECONDS)))
    with engine.connect() as connection:
        states = leases.count_states(connection)
    yield from _counts(of, states)
    if has_leases:
        yield from _running(engine, leases)
        yield from _leftover_leases(engine, of, leases)
    yield from _twice(of, rows)
    yield from _conditions(engine, of)


def _half_made(of: Subject) -> Finding:
    if "budget" not in of.attributes:
        return warning(
            "study",
            "it was made by something else, or by a launch that was killed at once",
            "if it is one of bdense-search, launch it again",
        )
    return warning("study", "its maker was killed before it was whole", "launch it again")


def _counts(of: Subject, states: Mapping[str, int]) -> Iterator[Finding]:
    budget, waiting = int(of.attributes["budget"]), states["WAITING"]
    begun = sum(states.values()) - waiting
    left = max(budget - begun - waiting, 0)
    if begun > budget:
        yield warning(
            "budget",
            f"{begun} rows were begun and the budget is {budget}: it was lowered meanwhile",
            "nothing more starts; launch with --trials for more",
        )
    elif begun + waiting > budget:
        yield warning(
            "budget",
            f"{begun + waiting - budget} of {waiting} rows that wait lie beyond the budget of "
            f"{budget} and will not start",
            f"launch with --trials {begun + waiting}",
        )
    yield ok(
        "rows",
        f"{max(budget, begun + waiting)} planned = {states['COMPLETE']} complete + "
        f"{states['PRUNED']} pruned + {states['FAIL']} failed + {states['RUNNING']} running + "
        f"{waiting} waiting + {left} not asked for yet",
    )


def _running(engine: sa.Engine, leases: Leases) -> Iterator[Finding]:
    with engine.connect() as connection:
        running = leases.running(connection)
        overdue = {  # seconds
            row.trial_id: row.now - row.expires
            for row in connection.execute(
                sa.select(
                    LEASE.c.trial_id, LEASE.c.expires, database_clock(engine).label("now")
                ).where(LEASE.c.expires != RELEASED)
            )
        }
    unheld = [row.number for row in running if row.process is None]
    if unheld:
        yield warning(
            "leases",
            f"{first_of(unheld)} run and were never taken by a worker: their asker died",
            "a launch takes them over at once",
        )
    free = [row.number for row in running if row.process is not None and not row.owner]
    if free:
        yield ok("leases", f"{first_of(free)} were given back and wait for a worker")
    held = [row for row in running if row.process is not None and row.owner]
    for row in held:
        if row.adoptable or overdue.get(row.trial_id, 0.0) > 0:
            yield _dead_lease(engine, row, overdue.get(row.trial_id, 0.0))
    alive = [row.number for row in held if not (row.adoptable or overdue.get(row.trial_id, 0) > 0)]
    if alive:
        yield ok("leases", f"{first_of(alive)} are held by workers that renew their leases")


def _dead_lease(engine: sa.Engine, row: RunningRow, overdue: float) -> Finding:
    assert row.process is not None
    owner = f"{row.process.host}:{row.process.pid}"
    if row.process.is_seen_dead():
        why = f"its worker {owner} (attempt {row.attempt}) is dead"
    else:
        why = (
            f"its worker {owner} (attempt {row.attempt}) has not renewed its lease, which ended "
            f"{overdue:.0f} s ago"
        )
    if not row.adoptable:
        return warning(
            "leases",
            f"trial {row.number}: {why}, as seen since the database was last restarted",
            "look again in a minute: after a restart workers are given the time of a lease",
        )
    return warning(
        "leases",
        f"trial {row.number}: {why}",
        "a launch takes it over",
        partial(_release, engine, row),
    )


def _release(engine: sa.Engine, row: RunningRow) -> None:
    """Let anybody take it at once; a lease that was renewed or taken meanwhile stays."""
    with engine.begin() as connection:
        now = database_clock(engine)
        is_over = (
            sa.true() if row.process and row.process.is_seen_dead() else LEASE.c.expires < now
        )
        connection.execute(
            sa.update(LEASE)
            .values(expires=RELEASED, owner="")
            .where(
                LEASE.c.trial_id == row.trial_id,
                LEASE.c.owner == row.owner,
                LEASE.c.attempt == row.attempt,
                is_over,
            )
        )


def _leftover_leases(engine: sa.Engine, of: Subject, leases: Leases) -> Iterator[Finding]:
    query = (
        sa.select(TRIALS.c.number)
        .select_from(TRIALS.join(LEASE, LEASE.c.trial_id == TRIALS.c.trial_id))
        .where(TRIALS.c.study_id == of.key, STATE != "RUNNING")
        .order_by(TRIALS.c.number)
    )
    with engine.connect() as connection:
        ended = list(connection.execute(query).scalars())

    def sweep() -> None:
        with engine.begin() as connection:
            leases.sweep(connection)

    if ended:
        yield warning(
            "leases",
            f"{first_of(ended)} have ended and their leases are still there: their workers died "
            "just after they told",
            "the next claim deletes them",
            sweep,
        )


def _twice(of: Subject, rows: Rows) -> Iterator[Finding]:
    found: dict[str, list[tuple[int, str | None]]] = defaultdict(list)
    # Optuna numbers a study's trials without gaps.
    for number, (params, reason) in enumerate(rows.asked()):
        if params:
            found[json.dumps(params, sort_keys=True)].append((number, reason))
    for text_of_params, same in found.items():
        # One that failed is planned anew; all but the last may have.
        first = [(number, reason) for number, reason in same[:-1] if reason is None]
        if len(same) < 2 or not first:
            continue
        numbers = first_of([number for number, _ in same], "row")
        text = f"{numbers} have the same parameters {text_of_params}"
        if of.is_planned:
            yield problem("parameters", text, "each should be there once; report this as a bug")
        else:
            yield warning("parameters", text, "the later ones tell nothing new")


def _conditions(engine: sa.Engine, of: Subject) -> Iterator[Finding]:
    """Under what the trials were measured."""
    lines = differing(engine, of.key)
    for line in lines:
        yield warning(
            "versions", line, "FIDs may differ in their last digits; measure again what is close"
        )
    expected = ((of.parent if of.is_baselines else of.attributes) or {}).get(FINGERPRINT)
    if expected is None:
        return
    query = (
        sa.select(TRIALS.c.number)
        .select_from(TRIALS.join(USER_ATTRIBUTES, USER_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id))
        .where(
            TRIALS.c.study_id == of.key,
            STATE == _COMPLETE,
            USER_ATTRIBUTES.c.key == "fingerprint",
            USER_ATTRIBUTES.c.value_json != json.dumps(expected),
        )
        .order_by(TRIALS.c.number)
    )
    with engine.connect() as connection:
        others = list(connection.execute(query).scalars())
    if others:
        yield problem(
            "conditions",
            f"{first_of(others)} were measured under other conditions than the study's "
            f"({expected}): their FIDs do not compare",
            "launch the study under another name",
        )
