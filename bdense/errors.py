"""One tree of errors, each with the exit status that a command ends with for it."""


class BdenseError(Exception):
    """Base of every error this project raises on purpose."""

    exit_status = 1


class InputError(BdenseError, ValueError):
    """Something given cannot be used; the message names the knob, the value and the way out."""

    exit_status = 2


class StoppedError(BdenseError):
    """Somebody asked the work to end: it was kept as it is, and the same call carries on."""

    exit_status = 130


class ShapeError(InputError):
    """A tensor, image or head has a size that the operation cannot take."""


class CheckpointError(InputError):
    """A file is not a checkpoint this project can read, or is not the one that was asked for."""


class UnsafePickleError(CheckpointError):
    """A pickle asks for more than an EDM network needs; nothing in it was run."""


class NonFiniteError(BdenseError, ArithmeticError):
    """Images, features or a distance hold NaN or infinity: the model diverged."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU or torch's allocator on the CPU had no memory to give.

    torch's are told by name and words: it is slow to import, and this module is for commands too.
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
