"""Files and folders that appear whole or not at all, and locks that die with their holder."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bdense.errors import InputError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``path``; on success it is synced and renamed onto ``path``.

    A reader sees the old file or the new one, never half of one. On an error the scratch file
    is removed and ``path`` is left as it was.
    """
    path = Path(path)
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
    finally:
        scratch.unlink(missing_ok=True)


def require_new(path: Path) -> None:
    """Refuse a path at which something lies already.

    Raises:
        InputError: Something does.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; choose another folder or delete it")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a scratch folder beside ``path``; on success it is synced and renamed to ``path``.

    A reader sees the whole folder or none. On an error the scratch folder is removed with all
    that is in it.

    Raises:
        InputError: Something lies at ``path``, at the start or by the time that all is written.
    """
    path = Path(path)
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    scratch = Path(name)
    try:
        yield scratch
        _settle(scratch)
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
    """Hold an exclusive lock on ``path``; the kernel frees it however the holder dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_folder(variable: str, name: str) -> Path:
    """The folder that an environment variable names, or one of that name in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(variable) or Path(cache) / "bdense" / name).expanduser()


def _settle(folder: Path) -> None:
    """Everything in a folder gets the permissions of new files and is on the disk, itself last."""
    mask = _umask()
    for entry in [*folder.rglob("*"), folder]:
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
        _sync(entry)


def _sync(path: Path) -> None:
    """Have a file's contents, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
