"""Disks without room for what a study writes, whichever of its files it was."""

import errno

from search.database.storage import cache_folder, redact, runs_folder
from search.errors import DiskFullError


def is_full_disk(error: BaseException) -> bool:
    """Whether there was no space left to write to."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_room(error: BaseException) -> DiskFullError:
    """The same for the user: where there is none, and what to do."""
    places = sorted({str(runs_folder().resolve()), str(cache_folder().resolve())})
    return DiskFullError(
        f"no space is left where runs are kept ({' or '.join(places)}): {redact(str(error))}; "
        "free some and give the same command again: it carries on from what was saved last"
    )
