"""Weights of feature networks in torch's cache: fetched once, read with errors in words."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

from bdense.downloads import fetch
from bdense.errors import InputError, is_out_of_memory
from bdense.files import require_no_page

_LONGEST_REASON = 300


def downloaded_checkpoint(url: str, what: str, sha256: str | None = None) -> Path:
    """A weights file in torch's cache, downloaded if missing.

    Raises:
        InputError: See ``fetch``.
    """
    try:
        return fetch(url, checkpoint_path(url), what=f"the {what} weights", sha256=sha256)
    except InputError as error:
        raise InputError(f"{error} (TORCH_HOME names another folder)") from error


def checkpoint_path(url: str) -> Path:
    """Path of an address's file in torch's cache, whether it exists or not."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


@contextlib.contextmanager
def reading_checkpoint(whose: str, path: Path, url: str) -> Iterator[None]:
    """Turn errors of reading weights into one that names the file and the right address."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {whose} weights {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        require_no_page(path)
        raise InputError(
            f"{path} does not hold {whose} weights ({last_line(error)}); give the file of {url}"
        ) from error


def last_line(error: BaseException) -> str:
    """The last line of an error: torch puts a stack in front of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Torch lists all names of a state dict that does not fit.
    said = lines[-1] if lines else type(error).__name__
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]} ..."
