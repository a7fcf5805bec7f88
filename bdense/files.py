"""Files and folders that appear whole or not at all, and locks that end with their holder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bdense.errors import CheckpointError, InputError, is_out_of_memory
from bdense.knobs import KnobError

# What values of a wrong type in a header can raise.
_WRONG = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
# Ending of the file that keeps a training until its result is written.
UNFINISHED = ".training.safetensors"
LONG_WAIT_SECONDS = 10.0  # for a lock, after which its holder is logged

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``path``; on success it is synced and renamed onto ``path``.

    A reader sees the old file or the new one, never half of one. On an error the scratch file
    is removed and ``path`` is left as it was.

    Raises:
        InputError: As ``require_plain``.
    """
    path = Path(path)
    require_plain(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".partial"
    )
    os.close(descriptor)
    scratch = Path(name)
    try:
        yield scratch
        _sync(scratch)
        scratch.chmod(0o666 & ~_umask())
        scratch.replace(path)
        _sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(
    path: Path, value: object, *, indent: int | None = None, sort_keys: bool = False
) -> None:
    """Write plain values as JSON, whole or not at all."""
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(value, indent=indent, sort_keys=sort_keys))


def plain_json(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as JSON gives it back, where a tuple is a list."""
    return dict(json.loads(json.dumps(tree)))


def require_plain(path: Path) -> None:
    """Raise an InputError if the path is a link, a FIFO or a device, which a rename would end."""
    if path.is_symlink():
        raise InputError(f"{path} is a link to {path.readlink()}; name the file itself")
    require_no_pipe(path)


def require_no_pipe(path: Path) -> None:
    """Raise an InputError if the path is a device, or a FIFO, whose reader may wait for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a device or a pipe, not a file; choose another name")


def require_output(
    out: Path,
    *,
    problem: Callable[[Path], str] = lambda _: "",
    inputs: Iterable[str | Path] = (),
    force: bool = False,
    folder: bool = False,
) -> None:
    """Check, before hours of work, that ``out`` can be written and that nothing is lost by it.

    Args:
        out: File to write, or folder to write to; its parent is made.
        problem: Says why what is there must not be replaced; "" if it may be.
        inputs: Files and folders that the same command reads.
        force: Whether what is there may be replaced.
        folder: Whether ``out`` is a folder.
    """
    require_plain(out)
    if folder and out.exists() and not out.is_dir():
        raise KnobError("out", f"{out} is a file; give the name of a folder")
    if not folder and out.is_dir():
        raise KnobError("out", f"{out} is a folder; give the name of a file")
    if out.exists() and not force:
        read = [Path(each).resolve() for each in inputs if Path(each).exists()]
        is_read = any(map(out.resolve().is_relative_to, read))
        reason = "is read by this command" if is_read else problem(out)
        if reason:
            raise KnobError("out", f"{out} {reason}; choose another name, or give `force`")
    place = out if folder else out.parent
    _require_writable(place, "out", f"{out}: the folder", "choose another")


def _require_writable(folder: Path, knob: str, what: str, remedy: str) -> None:
    """Make a folder, and raise the knob's error if no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"{what} cannot be written ({error.strerror}); {remedy}"
        raise KnobError(knob, problem) from error


def require_cache(folder: Path) -> None:
    """Raise a KnobError if nothing can be written to a folder of cached results."""
    remedy = "name another folder (for bdense-search by BDENSE_CACHE)"
    _require_writable(folder, "cache", str(folder), remedy)


def require_new(path: Path) -> None:
    """Raise an InputError if the path exists."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; choose another folder or delete it")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a scratch folder beside ``path``; on success it is synced and renamed to ``path``.

    A reader sees the whole folder or none. On an error the scratch folder is removed.

    Raises:
        InputError: ``path`` exists, at the start or when everything is written.
    """
    path = Path(path)
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    scratch = Path(name)
    try:
        yield scratch
        mask = _umask()
        for entry in [*scratch.rglob("*"), scratch]:  # the folder last
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
            _sync(entry)
        try:
            scratch.rename(path)
        except OSError:
            require_new(path)
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, which the kernel frees when the holder dies.

    The file names its last holder as host:pid. A process that waits long logs one warning.

    Raises:
        InputError: ``path`` is a link, whose target would be emptied, or a device or a FIFO.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    require_no_pipe(path)
    # Opened without truncation: a waiting process must not erase the holder's name.
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"the lock {path} is a link, which is not followed; delete it") from error
    with os.fdopen(descriptor, "ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # The kernel's queue is fairer than retries.
            warning = threading.Timer(LONG_WAIT_SECONDS, _warn_of_waiting, (path,))
            warning.daemon = True
            warning.start()
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            finally:
                warning.cancel()
        # A full disk must not stop the holder because it cannot write its name.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"{platform.node()}:{os.getpid()}\n".encode())
        yield


@contextlib.contextmanager
def header_of(path: Path) -> Iterator[None]:
    """Turn errors of a damaged header into one that names the file."""
    try:
        yield
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except _WRONG as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} has a damaged header ({error!r}); fetch or make it again"
        ) from error


def require_no_page(path: Path) -> None:
    """Raise a CheckpointError if a file is what a download leaves in place of one.

    A Git LFS pointer (https://git-lfs.com), or an HTML page.

    Raises:
        InputError: As ``require_no_pipe``.
    """
    require_no_pipe(path)
    with Path(path).open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(
            f"{path} is a page of HTML, not the file itself; download the file that it links to"
        )


def unpacked_bound(packed: int) -> int:
    """The most bytes that a compressed file of that size may hold; bombs hold far more."""
    return max(2**26, 100 * packed)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_model(path: Path) -> str:
    """Hex digest of a model's file; of a folder, of the weights and configurations below it.

    Hidden folders and notes (.txt) do not count.
    """
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        is_read = file.suffix in (".json", ".safetensors") or file.name == "merges.txt"
        if is_read and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def user_folder(variable: str, name: str) -> Path:
    """The folder that an environment variable names, or one of that name in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.path.expanduser(os.environ.get(variable) or f"{cache}/bdense/{name}"))


def _warn_of_waiting(path: Path) -> None:
    try:
        holder = path.read_text(errors="replace").strip()
    except OSError:
        holder = ""
    _log.warning(
        "waiting for the lock %s, held by %s; if that process was stopped (Ctrl-Z), resume it or "
        "end it",
        path,
        holder or "another process",
    )


def _sync(path: Path) -> None:
    """Write a file's contents, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Permissions that new files do not get."""
    # os.umask reads by setting, and other threads may create files meanwhile.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask
