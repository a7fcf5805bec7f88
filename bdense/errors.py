"""The tree of errors; each class has the exit status of a command that ends with it."""

import contextlib
import difflib
import pickle
import traceback
from collections.abc import Iterable, Iterator, Sequence


class BdenseError(Exception):
    """Base of every error this project raises on purpose."""

    exit_status = 1


class InputError(BdenseError, ValueError):
    """Something given cannot be used; the message names the knob, the value and the way out."""

    exit_status = 2


class StoppedError(BdenseError):
    """The work was asked to stop: its state is saved, and a second call continues it."""

    exit_status = 130


class ShapeError(InputError):
    """A tensor, image or head has a shape that the operation does not accept."""


class CheckpointError(InputError):
    """A file is not a checkpoint that this project can read, or not the expected one."""


class UnsafePickleError(CheckpointError):
    """A pickle needs more than an EDM network does; nothing in it was executed."""


class NonFiniteError(BdenseError, ArithmeticError):
    """Images, features or a distance hold NaN or infinity: the model diverged."""


def did_you_mean(given: object, known: Iterable[object]) -> str:
    """The end of a message on an unknown name: the nearest known one, or nothing."""
    close = difflib.get_close_matches(str(given), list(map(str, known)), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def listed(names: Sequence[object], most: int = 3) -> str:
    """The first few names: ``a, b, c, ...``."""
    return ", ".join([*map(str, names[:most]), *(["..."] if len(names) > most else [])])


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Turn the error of a missing package into one that names the extra that installs it.

    Raises:
        InputError: ``what`` needs a package that is missing.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{what} needs a package ({error}); pip install 'bdense[{name}]'"
        ) from error


def portable(error: Exception, where: str) -> Exception:
    """The error, or its text in the nearest base class that can be pickled, for other processes.

    A note on it has ``where`` and its traceback.
    """
    note = f"{where}:\n{''.join(traceback.format_exception(error))}"
    for kind in type(error).__mro__:
        with contextlib.suppress(Exception):
            found: Exception = error if kind is type(error) else kind(str(error))
            found.add_note(note)
            pickle.loads(pickle.dumps(found))  # noqa: S301  bytes of its own
            return found
    raise AssertionError("Exception can be pickled")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU or torch's CPU allocator ran out of memory.

    Torch's errors are recognised by name, because importing torch is slow.
    """
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and torchs)


class NonFiniteLossError(NonFiniteError):
    """A loss or a gradient is not finite; the run stops instead of repairing it."""

    def __init__(
        self,
        what: str,
        *,
        iteration: int,
        interval: int | None = None,
        branch: int | None = None,
    ) -> None:
        where, remedy = f"iteration {iteration}", "lower the learning rate"
        if interval is not None:
            where += f", interval {interval}"
            remedy += " or the largest branch weight"
        if branch is not None:
            where += f", branch {branch}"
        super().__init__(f"{what} is not finite at {where}; {remedy}")
        self.iteration = iteration
        self.interval = interval
        self.branch = branch
