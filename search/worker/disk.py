"""Recognise a full disk or missing permissions, and say what to do."""

import errno
import platform

from bdense.errors import InputError
from search.errors import DiskFullError, NoAccessError
from search.places import cache_folder, runs_folder
from search.redaction import redact

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def disk_error(error: BaseException) -> InputError | None:
    """An error for the user if every row would meet the same; None for other errors."""
    if not isinstance(error, OSError):
        return None
    places = " or ".join(sorted({str(runs_folder().resolve()), str(cache_folder().resolve())}))
    if error.errno in _FULL:
        return DiskFullError(
            f"no space is left where runs are kept ({places}): {redact(str(error))}; "
            "free some and run the same command again: it continues from what was saved last"
        )
    if error.errno in _CLOSED:
        return NoAccessError(
            f"on {platform.node()} a worker may not use {error.filename or 'a file'} "
            f"({error.strerror}): let its user read what the study names and write where runs "
            f"are kept ({places}), or set BDENSE_RUNS and BDENSE_CACHE to folders where it may, "
            "and run the same command again: it continues from what was saved last"
        )
    return None
