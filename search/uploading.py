"""Copy model folders to any URL of fsspec: s3://, gs://, file:// and others."""

from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from bdense.errors import InputError

# Readers of a model folder look for it first: with it the folder is whole.
_LAST = "config.json"


def is_url(place: str) -> bool:
    """Whether it is a URL, not a local path."""
    return "://" in place


def require_new_url(url: str) -> None:
    """Refuse a URL where there is something already.

    Args:
        url: Such as s3://bucket/model. Credentials are those of the protocol's own library.

    Raises:
        InputError: It exists, cannot be read, or no library for it is installed.
    """
    files, path = _opened(url)
    try:
        taken = files.exists(path)
    except Exception as error:
        raise InputError(f"{url} cannot be read: {error}") from error
    if taken:
        raise InputError(f"{url} exists already; choose another place or delete it")


def upload(folder: Path, url: str) -> None:
    """Copy a folder to a URL, its ``config.json`` last: with it the copy is whole.

    Raises:
        InputError: It cannot be written, or no library for it is installed.
    """
    files, path = _opened(url)
    sources = [each for each in folder.rglob("*") if each.is_file()]
    sources.sort(key=lambda each: (each == folder / _LAST, each))
    try:
        for source in sources:
            target = f"{path}/{source.relative_to(folder).as_posix()}"
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
            files.put_file(str(source), target)
    except Exception as error:
        raise InputError(f"{url} cannot be written: {error}") from error


def _opened(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it."""
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(
            f"{url}: fsspec needs another package for {url.partition('://')[0]}:// ({error}); "
            "install it, or export to a local folder and copy that"
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{url} leads nowhere: {error}") from error
    return files, str(path).rstrip("/")
