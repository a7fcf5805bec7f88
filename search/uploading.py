"""Copy model folders to any URL of fsspec: s3://, gs://, file:// and others."""

from pathlib import Path

import fsspec

from bdense.errors import InputError

# Readers of a model folder look for it first: with it the folder is whole.
_LAST = "config.json"


def is_url(place: str) -> bool:
    """Whether it is a URL, not a local path."""
    return "://" in place


class Place:
    """A folder behind a URL.

    Args:
        url: Such as s3://bucket/model. Credentials are those of the protocol's own library.

    Raises:
        InputError: No library for it is installed, or it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self._files, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise InputError(
                f"{url}: fsspec needs another package for {protocol}:// ({error}); install it, or "
                "export to a local folder and copy that"
            ) from error
        except (ValueError, TypeError) as error:
            raise InputError(f"{url} leads nowhere: {error}") from error
        self._path = str(path).rstrip("/")

    def require_new(self) -> None:
        """Refuse a place that exists.

        Raises:
            InputError: It exists, or cannot be read.
        """
        try:
            taken = self._files.exists(self._path)
        except Exception as error:
            raise InputError(f"{self.url} cannot be read: {error}") from error
        if taken:
            raise InputError(f"{self.url} exists already; choose another place or delete it")

    def take(self, folder: Path) -> None:
        """Copy a folder there, its ``config.json`` last: with it the copy is whole.

        Raises:
            InputError: It cannot be written.
        """
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files.sort(key=lambda path: path == folder / _LAST)
        try:
            for file in files:
                target = f"{self._path}/{file.relative_to(folder).as_posix()}"
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(file), target)
        except Exception as error:
            raise InputError(f"{self.url} cannot be written: {error}") from error
