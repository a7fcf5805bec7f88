"""Which solvers there are and of which orders, for those who cannot wait for torch."""

from typing import Literal

from bdense.errors import InputError

SolverName = Literal["euler", "ddim", "heun", "dpm2", "ipndm", "dpmpp"]

# The orders that may be asked for; the last is what comes unasked.
SOLVERS: dict[str, tuple[int, ...]] = {
    "euler": (1,),
    "ddim": (1,),
    "heun": (2,),
    "dpm2": (2,),
    "ipndm": (2, 3, 4),
    "dpmpp": (1, 2, 3),
}


def solver_order(name: str, order: int | None = None) -> int:
    """The order asked for, or the solver's highest.

    Raises:
        InputError: There is no solver of that name, or none of that order.
    """
    if name not in SOLVERS:
        raise InputError(f"solver {name!r} is unknown; choose from {list(SOLVERS)}")
    *lower, highest = SOLVERS[name]
    if order is None:
        return highest
    if order in SOLVERS[name]:
        return order
    if lower:
        known = f"{', '.join(map(str, lower))} and {highest}"
        raise InputError(f"{name} has orders {known}, got {order}; leave it out for {highest}")
    choice = [other for other, orders in SOLVERS.items() if len(orders) > 1]
    raise InputError(
        f"{name} has order {highest} alone, got {order}; leave it out, or take "
        f"{' or '.join(choice)}"
    )


def refuse_thresholding(name: str) -> None:
    """Let pass the one solver that has dynamic thresholding.

    Raises:
        InputError: It is another.
    """
    if name != "dpmpp":
        raise InputError(f"{name} has no thresholding; leave it out, or take dpmpp")
