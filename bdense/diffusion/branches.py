"""The branched student: widen the last layer K-fold, and take one branch out again.

K branches.
"""

import math
from collections.abc import Sequence

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.networks import Network

# What rounding coefficients to a few digits may leave in their sum.
_SUM_ERROR = 1e-6


def widen_head(teacher: NetworkDenoiser, num_branches: int) -> NetworkDenoiser:
    """A copy of the teacher with K branches, each of which equals it.

    Raises:
        InputError: K is below 1, or the teacher has branches already.
        ShapeError: The network's last layer cannot be widened.
    """
    return _with_model(teacher, teacher.model.widen(num_branches))


def export_branch(student: NetworkDenoiser, branch: int | None = None) -> NetworkDenoiser:
    """One branch as a denoiser of the teacher's own architecture and size.

    Args:
        branch: k, counted from 1; None is K, the interval's end point.

    Raises:
        InputError: There is no such branch.
    """
    k = student.num_branches if branch is None else branch
    return _with_model(student, student.model.select(k))


def recombine_branches(student: NetworkDenoiser, coefficients: Sequence[float]) -> NetworkDenoiser:
    """D = sum_k c_k D^k as a denoiser of the teacher's own architecture and size.

    The head is affine, so that this is exact and costs no further network evaluation. c = (0, ..,
    0, 1) is ``export_branch``.

    Raises:
        InputError: There is another number of them, one is not finite, or their sum is not 1, so
            that D would not be a denoiser.
    """
    given = ", ".join(f"{c:g}" for c in coefficients)
    if len(coefficients) != student.num_branches:
        raise InputError(
            f"{student.num_branches} branches need as many coefficients c, got "
            f"{len(coefficients)}: {given}"
        )
    if not all(map(math.isfinite, coefficients)):
        raise InputError(f"coefficients c must be finite, got {given}")
    if abs(math.fsum(coefficients) - 1) > _SUM_ERROR:
        raise InputError(
            f"coefficients c must sum to 1, got {given}, whose sum is {math.fsum(coefficients):g}"
        )
    return _with_model(student, student.model.combine(coefficients))


def _with_model(denoiser: NetworkDenoiser, model: Network) -> NetworkDenoiser:
    """A denoiser of another network, with the same preconditioning, mode and execution."""
    changed = NetworkDenoiser(model, denoiser.precond).train(denoiser.training)
    return changed.execute(denoiser.execution)
