"""Weights that others publish, where torch keeps such files, read without running anything."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

from bdense.downloads import fetch
from bdense.errors import InputError

_LONGEST_REASON = 300


def downloaded_weights(url: str, what: str, sha256: str | None = None) -> Path:
    """The weights where torch keeps such files, fetched from their publisher if need be.

    Raises:
        InputError: As of ``fetch``.
    """
    return fetch(url, weights_path(url), what=f"the {what} weights", sha256=sha256)


def weights_path(url: str) -> Path:
    """Where torch keeps the file of an address, there already or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


@contextlib.contextmanager
def weights_of(whose: str, path: Path, url: str) -> Iterator[None]:
    """Name the file whose weights cannot be read or do not fit, and where the right one is."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {whose} weights {path}: {error.strerror}") from error
    except torch.OutOfMemoryError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} does not hold {whose} weights ({last_line(error)}); give the file of {url}"
        ) from error


def last_line(error: BaseException) -> str:
    """The reason itself: torch puts the interpreter's stack in front of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A state dict that does not fit is answered with all its names.
    return lines[-1][:_LONGEST_REASON] if lines else type(error).__name__
