"""The branched student: widen the last layer K-fold, and take branch K out again.

Output channels are K consecutive groups of equal width; group k - 1 is branch k.
"""

from collections.abc import Callable

from torch import Tensor

from bdense.diffusion.denoiser import NetworkDenoiser, build_denoiser
from bdense.errors import InputError


def widen_head(teacher: NetworkDenoiser, num_branches: int) -> NetworkDenoiser:
    """A copy of the teacher whose head is repeated K times, so that every branch equals it.

    Args:
        teacher: A denoiser with one branch.
        num_branches: K; 1 gives a plain copy.

    Raises:
        InputError: K is below 1, or the teacher has branches already.
    """
    if num_branches < 1:
        raise InputError(f"num_branches (K) must be at least 1, got {num_branches}")
    if teacher.num_branches != 1:
        raise InputError(
            f"the teacher has {teacher.num_branches} branches already; "
            "take one of them out first with export_branch"
        )

    def repeat(head: Tensor) -> Tensor:
        return head.repeat(num_branches, *[1] * (head.dim() - 1))

    return _with_head(teacher, num_branches, repeat)


def export_branch(student: NetworkDenoiser, branch: int | None = None) -> NetworkDenoiser:
    """One branch as a denoiser of the teacher's own architecture and size.

    Args:
        student: A branched denoiser; it is not changed.
        branch: k, counted from 1; None is K, the interval's end point.
    """
    total = student.num_branches
    k = total if branch is None else branch
    if not 1 <= k <= total:
        raise InputError(f"branch must lie in 1..{total}, got {branch}")
    width = student.group_channels
    return _with_head(student, 1, lambda head: head[(k - 1) * width : k * width])


def _with_head(
    denoiser: NetworkDenoiser, num_branches: int, change: Callable[[Tensor], Tensor]
) -> NetworkDenoiser:
    """The same denoiser with that many branches and a changed weight and bias of the head."""
    built = build_denoiser(denoiser.describe() | {"num_branches": num_branches})
    built.to(next(denoiser.parameters())).train(denoiser.training)
    state = denoiser.state_dict()
    for name in ("weight", "bias"):
        key = f"model.{denoiser.model.head_name}.{name}"
        state[key] = change(state[key])
    built.load_state_dict(state)
    return built.execute(denoiser.execution)
