"""Errors of the service, in the project's one tree of errors."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Self

from bdense.errors import BdenseError, InputError
from bdense.knobs import KnobError, KnobsError

INTERRUPTED = "interrupted; nothing is lost: run the same command again to continue"


class StorageError(InputError):
    """The study database cannot be reached, opened or written; the message holds no password."""


class StorageRefusedError(StorageError):
    """The study database refuses the connection, user or version; waiting does not help."""


class StorageFullError(StorageError):
    """The disk of the study database is full; earlier results stay."""


class UnknownStudyError(InputError):
    """No study of that name is in the storage."""


class UnconfirmedError(InputError):
    """A search has no confirmed winner yet."""


class NoSearchError(InputError):
    """Something that only a search has is asked of a study of given arms."""


class OutdatedStudyError(InputError):
    """An older version made the study; `storage upgrade` brings it over."""


class UnpreparedError(InputError):
    """This machine lacks something that a row needs; another worker must take the row."""


class LeaseLostError(BdenseError):
    """Another worker has taken the trial over; this one must not store its result."""


class SpecError(InputError):
    """A study file is wrong; one line for each mistake, naming the key."""

    @classmethod
    def of_lines(cls, source: str, problems: Iterable[str]) -> Self:
        """A line for each problem, with the file in front."""
        return cls("\n".join(f"{source}: {problem}" for problem in problems))

    @staticmethod
    def under(key: str, error: Exception) -> InputError:
        """An error of a section, with the section's key in front unless it has that already."""
        if isinstance(error, KnobsError):
            return KnobsError([SpecError._under(key, each) for each in error.errors])
        if not isinstance(error, KnobError):
            return SpecError(f"{key}: {error}")
        return SpecError._under(key, error)

    @staticmethod
    def _under(key: str, error: KnobError) -> KnobError:
        if f"{error.name}.".startswith(f"{key}."):
            return error
        return KnobError(f"{key}.{error.name}", error.problem)


@contextlib.contextmanager
def under(key: str, *also: type[Exception]) -> Iterator[None]:
    """Put a section's key in front of the block's input errors, and of ``also``."""
    caught: tuple[type[Exception], ...] = (InputError, *also)
    try:
        yield
    except caught as error:
        raise SpecError.under(key, error) from error


class SpecChangedError(InputError):
    """A study exists with conditions that make its numbers incomparable with the given ones."""


class DiskFullError(InputError):
    """No space is left for a row's files; what was saved before stays."""


class NoAccessError(InputError):
    """A worker may not read or write a file on its machine; what was saved before stays."""


class ArtifactError(BdenseError):
    """A picture could not be stored; nothing else is lost."""


class WorkersFailedError(BdenseError):
    """Workers die before they reach a trial; the launch ends instead of restarting for ever."""


class ClusterLostError(BdenseError):
    """Ray's head is gone; the same command continues once it is back."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: docker/launch.sh joins again on it alone
