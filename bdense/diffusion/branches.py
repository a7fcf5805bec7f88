"""The branched student: widen the last layer K-fold, and take branch K out again."""

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.networks import Network


def widen_head(teacher: NetworkDenoiser, num_branches: int) -> NetworkDenoiser:
    """A copy of the teacher with K branches, each of which equals it.

    Args:
        teacher: A denoiser with one branch.
        num_branches: K; 1 gives a plain copy.

    Raises:
        InputError: K is below 1, or the teacher has branches already.
        ShapeError: The network's last layer cannot be widened.
    """
    return _with_model(teacher, teacher.model.widen(num_branches))


def export_branch(student: NetworkDenoiser, branch: int | None = None) -> NetworkDenoiser:
    """One branch as a denoiser of the teacher's own architecture and size.

    Args:
        student: A branched denoiser; it is not changed.
        branch: k, counted from 1; None is K, the interval's end point.

    Raises:
        InputError: There is no such branch.
    """
    k = student.num_branches if branch is None else branch
    return _with_model(student, student.model.select(k))


def _with_model(denoiser: NetworkDenoiser, model: Network) -> NetworkDenoiser:
    """A denoiser of another network, with the same preconditioning, mode and execution."""
    changed = NetworkDenoiser(model, denoiser.precond).train(denoiser.training)
    return changed.execute(denoiser.execution)
