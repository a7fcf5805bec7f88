"""The service's log on stderr: text, or with ``BDENSE_LOG=json`` a JSON object per line that names
study, trial and attempt.
"""

import contextlib
import contextvars
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TextIO

from bdense.errors import InputError
from search.redaction import redact

LOG = "BDENSE_LOG"
TEXT, JSON = "text", "json"
# Name of the record's attribute with what was given by ``extra=``.
FIELDS = "fields"
_KEYS = ("study", "trial", "attempt")

_log = logging.getLogger(__name__)

# Study, trial and attempt of this thread, and of threads that copy its context.
_context: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "context", default=MappingProxyType({})
)


def set_context(**keys: Any) -> None:  # noqa: ANN401  JSON values
    """Set study, trial or attempt of this thread's records from now on."""
    _context.set({**_context.get(), **keys})


@contextlib.contextmanager
def log_context(**keys: Any) -> Iterator[None]:  # noqa: ANN401  JSON values
    """Set study, trial or attempt of this thread's records inside the block."""
    token = _context.set({**_context.get(), **keys})
    try:
        yield
    finally:
        _context.reset(token)


def current_context() -> dict[str, Any]:
    """Study, trial and attempt of this thread's records."""
    return dict(_context.get())


def is_json() -> bool:
    """Whether the log is JSON.

    Raises:
        InputError: ``BDENSE_LOG`` has another value.
    """
    given = os.environ.get(LOG) or TEXT
    if given not in (TEXT, JSON):
        raise InputError(f"{LOG}={given} is unknown; set it to {TEXT} or {JSON}")
    return given == JSON


def start_logging() -> None:
    """Start logging to stderr as ``BDENSE_LOG`` says: text has warnings only, JSON all events."""
    root = logging.getLogger()
    as_json = is_json()
    handler = next((each for each in root.handlers if isinstance(each, _Handler)), None)
    if handler is None:
        handler = _Handler()
        root.addHandler(handler)
    handler.setFormatter(JsonLines() if as_json else Text("%(message)s"))
    logging.getLogger("search").setLevel(logging.INFO if as_json else logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)


@contextlib.contextmanager
def optuna_says(level: int) -> Iterator[None]:
    """Optuna's log has only records of this level and above."""
    log = logging.getLogger("optuna")
    before = log.getEffectiveLevel()
    log.setLevel(max(before, level))
    try:
        yield
    finally:
        log.setLevel(before)


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line for the user: on ``stream`` (None: stderr), or in the log if that is JSON."""
    with contextlib.suppress(InputError):
        if is_json():
            _log.info(line.strip())
            return
    stream = stream or sys.stderr
    stream.write(line + "\n")
    stream.flush()


def json_line(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """One JSON object without passwords: the entry, and fields that it does not have."""
    rest = {key: value for key, value in fields.items() if key not in entry}
    return json.dumps(_plain({**entry, **rest}), allow_nan=False)


def _plain(value: Any) -> Any:  # noqa: ANN401  whatever is logged
    """A value for JSON; nan and inf become words."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Mapping):
        return {redact(str(key)): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return redact(str(value))


def timestamp(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the current stderr and notes study, trial and attempt of each record."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The current stderr."""
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass; called in the thread that logs."""
        record.about = current_context()
        return super().filter(record)


class Text(logging.Formatter):
    """Text lines and tracebacks without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record."""
        return redact(super().format(record))


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, logger, study, trial, attempt, message, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line without passwords."""
        own: Mapping[str, Any] = getattr(record, "about", None) or current_context()
        entry: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            **{key: own.get(key) for key in _KEYS},
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json_line(entry, getattr(record, FIELDS, {}))
