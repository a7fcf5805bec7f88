"""A row's log: which one is asked for, and one line an event for people."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bdense.errors import InputError
from bdense.knobs import KnobError
from search.storage.ledger import Ledger
from search.study.arms import ROW_SPACE, ArmRow
from search.study.study import Study

HEADER = "time      attempt  event"
# Before the first event that has some.
LOSSES = (
    "Losses of branches k = 1 .. K after each trained interval [1], [2] .. (AFS leaves the first "
    "one out): as the method defines them, before the branch weights, mean over the batch."
)
_QUIET = ("time", "level", "study", "trial", "attempt", "worker", "event")


def logged_row(study: Study, trial: int | None, baseline: str | None) -> tuple[Ledger, int]:
    """The row whose log is asked for: by its number, or of a search a baseline by name.

    Raises:
        InputError: Neither is given, or both are, or there is no such row, nor will there be one.
    """
    if (trial is None) == (baseline is None):
        raise KnobError("trial", "or `baseline` must be given, and not both")
    if trial is not None:
        _require_row(study.main, trial)
        return study.main, trial
    if (baselines := study.baselines) is None:
        raise InputError(f"{study.name} has no baselines of its own; give the number of a row")
    if baseline not in study.spec.baselines:
        known = " or ".join(study.spec.baselines)
        raise KnobError("baseline", f"must be {known} here, got {baseline}")
    seed = study.spec.seeds.training
    # The last one: a launch plans a failed baseline anew.
    arms, numbered = study.arms, list(enumerate(baselines.asked()))
    for number, params in reversed(numbered):
        if params.keys() != ROW_SPACE.keys():
            continue  # foreign
        row = ArmRow(**params)
        if (arms[row.arm].baseline, row.seed, row.variant) == (baseline, seed, 0):
            return baselines, number
    raise InputError(
        f"study {study.name} has no baseline {baseline} yet: its launch was killed before it was "
        "whole; launch it again"
    )


def _require_row(ledger: Ledger, number: int) -> None:
    if number in ledger.foreign():
        raise InputError(f"row {number} of {ledger.name} is another program's, and has no log")
    if ledger.state_of(number) is not None:
        return
    counts, there = ledger.counts(), ledger.size()
    to_come = max(counts.planned - counts.total, 0)
    if 0 <= number < there + to_come:
        return
    more = f", {to_come} more are to come" if to_come else ""
    raise InputError(
        f"study {ledger.name} has no trial {number}: there are {there} so far{more}, "
        "numbered from 0"
    )


def has_losses(event: Mapping[str, Any]) -> bool:
    """Whether it is a training event with the losses of branches."""
    return event["event"] == "training" and "branch_losses" in event


def log_line(event: Mapping[str, Any]) -> str:
    """An event as a line."""
    when = _time(event.get("time"))
    return f"{when:<8}  {event.get('attempt', ''):>7}  {_told(event)}"


def _told(event: Mapping[str, Any]) -> str:
    name = str(event["event"])
    if has_losses(event):
        return _training(event)
    if name in ("claimed", "adopted"):
        before = f" from attempt {event['from_attempt']}" if "from_attempt" in event else ""
        return f"{name}{before} by {event.get('worker', '?')}: {_fields(event.get('params', {}))}"
    rest = {key: value for key, value in event.items() if key not in _QUIET}
    return f"{name}  {_fields(rest)}".rstrip()


def _training(event: Mapping[str, Any]) -> str:
    stage = f"{event['stage']}, " if "stage" in event else ""
    intervals = "  ".join(
        f"[{n}] {' '.join(_cell(loss) for loss in losses)}"
        for n, losses in enumerate(event["branch_losses"], 1)
    )
    total = event["iterations"]
    place = f"{event['iteration']:>{len(str(total))}}/{total}"
    return f"training  {stage}{place}  loss {_cell(event['loss'])}  {intervals}"


def _cell(value: float | str) -> str:
    """A number; JSON stores nan and inf as words."""
    return f"{float(value):>8.4g}"


def _fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in fields.items()
    )


def _time(stored: object) -> str:
    """Local time of day."""
    try:
        return datetime.fromisoformat(str(stored)).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return "?"
