"""Downloads of public files: resumed, checked, and present whole or not at all."""

import errno
import http.client
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from bdense.errors import InputError
from bdense.files import file_lock, sha256_file
from bdense.progress import is_live, progress_bar

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without data
_ATTEMPTS = 5
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Seconds between updates: on a terminal or in a notebook a bar, in a log file a line now and then.
_SHOW_SECONDS = {True: 0.2, False: 15.0}


class _WrongFileError(Exception):
    """The download is complete but not the expected file."""


class _TryAgainError(Exception):
    """The connection ended early; the part that came is kept."""


def fetch(
    url: str, path: Path, *, what: str, sha256: str | None = None, size: int | None = None
) -> Path:
    """The file at ``path``, downloaded from ``url`` if it is not there.

    An incomplete download stays in ``path`` + ``.partial``, beside a note of its version. This or
    a later call continues it if the server supports that and still has the version. One process
    downloads, others wait for it.

    Args:
        what: What the file is, for messages.
        sha256: Its hex digest; None if unknown.
        size: Its bytes; None if unknown.

    Raises:
        InputError: It cannot be downloaded, or is another file; one line with the address and
            where to put the file by hand.
        OSError: The disk is full.
    """
    path = Path(path)
    by_hand = f"fetch {url} by hand and put it at {path}"
    if not path.is_file():
        try:
            with file_lock(path.with_name(f".{path.name}.lock")):
                if not path.is_file():
                    _fetch(url, path, what, sha256, size)
        except _WrongFileError as error:
            raise InputError(f"{url} is not {what}: {error}; {by_hand}") from error
        except (OSError, http.client.HTTPException, ValueError, _TryAgainError) as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise OSError(error.errno, f"{error.strerror} for {what}", str(path)) from error
            raise InputError(f"cannot download {what} ({_reason(error)}); {by_hand}") from error
    elif wrong := _difference(path, sha256, size):
        raise InputError(f"{path} is not {what}: {wrong}; delete it, or {by_hand}")
    return path


def _fetch(url: str, path: Path, what: str, sha256: str | None, size: int | None) -> None:
    partial = _Partial(path)
    for attempt in range(1, _ATTEMPTS + 1):
        before = partial.size
        try:
            _carry_on(url, partial, what, size)
            break
        except (_TryAgainError, TimeoutError, ConnectionError, http.client.HTTPException):
            # Try again only while data arrives.
            if attempt == _ATTEMPTS or partial.size <= before:
                raise
    if wrong := _difference(partial.data, sha256, size):
        partial.forget()
        raise _WrongFileError(wrong)
    partial.data.replace(path)
    partial.forget()


class _Partial:
    """An incomplete download and the version of the file that it is part of."""

    def __init__(self, path: Path) -> None:
        self.data = path.with_name(f"{path.name}.partial")
        self._note = path.with_name(f"{path.name}.partial.version")

    @property
    def size(self) -> int:
        """Bytes downloaded so far."""
        return self.data.stat().st_size if self.data.exists() else 0

    @property
    def version(self) -> str | None:
        """The server's tag of the version, if part of it is there."""
        return self._note.read_text() if self.size and self._note.exists() else None

    def start(self, version: str | None) -> None:
        """Start over, with a version that a later request can ask for."""
        self.forget()
        if version is not None:
            self._note.write_text(version)

    def forget(self) -> None:
        """Delete the part and its note."""
        self.data.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


def _carry_on(url: str, partial: _Partial, what: str, size: int | None) -> None:
    """One request: the rest of the file, or all of it if nothing is there yet."""
    # A compressed answer would have other bytes and another length.
    headers = {"Accept-Encoding": "identity", "User-Agent": "bdense"}
    have, version = partial.size, partial.version
    if version is not None:
        # The server sends the rest of this version, or all of a newer one.
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    request = urllib.request.Request(url, headers=headers)
    try:
        # A new opener: urlopen's keeps the proxy settings of the process's first download.
        response = urllib.request.build_opener().open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or version is None:
            raise
        # The part is complete or too long: start over to find out.
        partial.forget()
        return _carry_on(url, partial, what, size)
    with response:
        if response.status == http.client.PARTIAL_CONTENT:
            first, total = _content_range(response.headers.get("Content-Range", ""))
            if first != have:
                raise _TryAgainError(f"the server sent bytes from {first}, not from {have}")
        else:
            length = response.headers.get("Content-Length")
            have, total = 0, None if length is None else int(length)
            partial.start(_version(response))
        if size is not None and total is not None and total != size:
            partial.forget()
            raise _WrongFileError(f"it has {total} bytes, not {size}")
        bar = progress_bar(
            desc=what,
            initial=have,
            total=total,
            unit="B",
            unit_scale=True,
            mininterval=_SHOW_SECONDS[is_live(sys.stderr)],
        )
        with bar, partial.data.open("ab") as file:
            while chunk := response.read1(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and partial.size != total:
        raise _TryAgainError(
            f"the connection ended after {partial.size} of {total} bytes; the same command "
            "continues"
        )


def _version(response: http.client.HTTPResponse) -> str | None:
    """A strong tag or a date, which If-Range accepts."""
    if response.headers.get("Accept-Ranges", "bytes") == "none":
        return None
    tag: str | None = response.headers.get("ETag")
    if tag is not None and not tag.startswith("W/"):
        return tag
    return response.headers.get("Last-Modified")


def _content_range(header: str) -> tuple[int, int | None]:
    """First byte and total length in ``bytes 5-9/10`` or ``bytes 5-9/*``."""
    unit, _, rest = header.partition(" ")
    span, _, total = rest.partition("/")
    if unit != "bytes" or not total:
        raise ValueError(f"the server answered with Content-Range {header!r}")
    return int(span.partition("-")[0]), None if total == "*" else int(total)


def _difference(path: Path, sha256: str | None, size: int | None) -> str | None:
    """How a file differs from the expected one; None if it does not."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"it has {found} bytes, not {size}"
    if sha256 is not None and (digest := sha256_file(path)) != sha256:
        return f"its sha256 is {digest}, not {sha256}"
    return None


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        reason = error.reason
        if isinstance(reason, socket.gaierror):
            return "its host cannot be found; is there a network?"
        return _reason(reason) if isinstance(reason, BaseException) else str(reason)
    if isinstance(error, TimeoutError):
        return f"no answer for {_TIMEOUT:.0f} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
