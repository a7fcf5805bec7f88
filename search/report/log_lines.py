"""A row's log for people: one line an event, the losses of a training in columns."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

HEADER = "time      attempt  event"
# Before the first event that has some.
LOSSES = (
    "Losses of branches k = 1 .. K after each trained interval [1], [2] .. (AFS leaves the first "
    "one out): as the method defines them, before the branch weights, mean over the batch."
)
_QUIET = ("time", "level", "study", "trial", "attempt", "worker", "event")


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
