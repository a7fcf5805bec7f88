"""The branched student: widen the last layer K-fold, and take branch K out again.

Output channels are K consecutive groups of C; group k - 1 is branch k.
"""

import copy

from torch import nn

from bdense.denoiser import NetworkDenoiser, build_denoiser
from bdense.errors import InputError
from bdense.networks.layers import Conv2d


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
    student = copy.deepcopy(teacher)
    if num_branches > 1:
        head = _head(student)
        assert head.weight is not None
        assert head.bias is not None
        head.weight = nn.Parameter(head.weight.detach().repeat(num_branches, 1, 1, 1))
        head.bias = nn.Parameter(head.bias.detach().repeat(num_branches))
        head.out_channels *= num_branches
        student.model.out_channels *= num_branches
    return student


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
    plain = build_denoiser(student.describe() | {"num_branches": 1})
    channels = student.image_shape[0]
    group = slice((k - 1) * channels, k * channels)
    state = student.state_dict()
    for name in ("weight", "bias"):
        key = f"model.{student.model.head_name}.{name}"
        state[key] = state[key][group]
    plain.load_state_dict(state)
    return plain.to(next(student.parameters()).device).train(student.training)


def _head(denoiser: NetworkDenoiser) -> Conv2d:
    head = denoiser.model.get_submodule(denoiser.model.head_name)
    assert isinstance(head, Conv2d)
    return head
