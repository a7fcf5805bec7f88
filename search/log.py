"""The service's own log, on stderr: text for people, or with ``BDENSE_LOG=json`` a JSON object a
line, which says of what study, trial and attempt it speaks.
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
from search.storage.engine import redact

LOG = "BDENSE_LOG"
TEXT, JSON = "text", "json"
# Attributes of a record that were given by ``extra=``, which is kept apart under this name.
FIELDS = "fields"
_KEYS = ("study", "trial", "attempt")

_log = logging.getLogger(__name__)

# Of this thread, and of those that copy its context.
_about: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "about", default=MappingProxyType({})
)


def about(**keys: Any) -> None:  # noqa: ANN401  JSON-able
    """What this thread's records are about from now on: study, trial, attempt."""
    _about.set({**_about.get(), **keys})


@contextlib.contextmanager
def speaking_of(**keys: Any) -> Iterator[None]:  # noqa: ANN401  JSON-able
    """What this thread's records are about within the block."""
    token = _about.set({**_about.get(), **keys})
    try:
        yield
    finally:
        _about.reset(token)


def spoken_of() -> dict[str, Any]:
    """What this thread's records are about."""
    return dict(_about.get())


def is_json() -> bool:
    """Whether the log is JSON.

    Raises:
        InputError: ``BDENSE_LOG`` says neither.
    """
    given = os.environ.get(LOG) or TEXT
    if given not in (TEXT, JSON):
        raise InputError(f"{LOG}={given} is no form of the log; set it to {TEXT} or {JSON}")
    return given == JSON


def start_logging() -> None:
    """Log to stderr as ``BDENSE_LOG`` says, from now on.

    As text warnings alone, as JSON what happens to trials too.
    """
    root = logging.getLogger()
    as_json = is_json()
    handler = next((each for each in root.handlers if isinstance(each, _Handler)), None)
    if handler is None:
        handler = _Handler()
        root.addHandler(handler)
    handler.setFormatter(JsonLines() if as_json else Text("%(message)s"))
    logging.getLogger("search").setLevel(logging.INFO if as_json else logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)


def say(line: str, stream: TextIO | None = None) -> None:
    """A line for whoever started the command: on ``stream``, or in the log where that is JSON.

    The stream is stderr where none is given.
    """
    with contextlib.suppress(InputError):
        if is_json():
            _log.info(line.strip())
            return
    stream = stream or sys.stderr
    stream.write(line + "\n")
    stream.flush()


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is stderr at the time, and remembers what each record is about."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Where to."""
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        """All of them; here still in the thread that speaks."""
        record.about = spoken_of()
        return super().filter(record)


class Text(logging.Formatter):
    """Lines for people, without passwords, those of exceptions included."""

    def format(self, record: logging.LogRecord) -> str:
        """As logging has it."""
        return redact(super().format(record))


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, logger, study, trial, attempt, message, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Without a newline, whatever the message holds, and without passwords."""
        own: Mapping[str, Any] = getattr(record, "about", None) or spoken_of()
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


def json_line(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """One JSON object without passwords: the entry, and fields under names that it leaves."""
    rest = {key: value for key, value in fields.items() if key not in entry}
    return json.dumps(_plain({**entry, **rest}), allow_nan=False)


def _plain(value: Any) -> Any:  # noqa: ANN401  whatever is logged
    """As JSON has it; what it has no number for is a word: nan, inf."""
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
