"""A distillation beside its method: what fits together, which run it is, when it is looked at."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.intervals import VariableGrid
from bdense.errors import InputError
from bdense.methods.trajectories import Trajectories
from bdense.models.store import denoiser_sha256
from bdense.training.parallel import Team
from bdense.weights.weighting import BranchWeighting


@dataclass(frozen=True, slots=True)
class Looks:
    """When a student is looked at while it learns, and by whom; training takes no notice.

    Attributes:
        after: Numbers of iterations, each from 1 to one less than all.
        look: Called after so many, with that number and branch K as ``export_branch`` makes it, in
            eval mode: a copy. What it raises ends the run. A run that is resumed just there is
            looked at again.
    """

    after: Collection[int]
    look: Callable[[int, NetworkDenoiser], None]

    def on_the_way(self, iterations: int) -> frozenset[int]:
        """``after``, of a run of that many iterations.

        Raises:
            InputError: One is not on its way.
        """
        after = frozenset(self.after)
        if beyond := sorted(number for number in after if not 0 < number < iterations):
            raise InputError(
                f"looks after {beyond} iterations lie outside 1..{iterations - 1}: on the way of "
                f"{iterations} iterations"
            )
        return after


def require_fitting(
    trajectories: Trajectories,
    weighting: BranchWeighting,
    start: NetworkDenoiser,
    *,
    num_branches: int,
    images: int,
    iterations: int,
) -> None:
    """Refuse parts that make no run together.

    Raises:
        InputError: Branches, weights, trajectories and the network do not fit together.
    """
    grid, available = trajectories.grid, len(trajectories)
    if isinstance(grid, VariableGrid) and not start.step_condition:
        raise InputError(
            f"a student for several numbers of intervals {list(grid.num_intervals)} is told "
            "which; start it from with_step_condition(teacher, seed=...)"
        )
    if weighting.needs_gradients and start.execution.compile:
        # A compiled graph hands out no tensor from its middle that gradients can be asked for.
        raise InputError(
            "weights learned by gradient norms need the input of the network's head, which a "
            "compiled network hides; drop compile, or learn them by the rule uncertainty"
        )
    if num_branches not in (1, grid.substeps):
        raise InputError(
            f"num_branches={num_branches} fits neither plain SFD (1) nor the teacher's "
            f"sub-steps (substeps={grid.substeps})"
        )
    if weighting.num_branches != num_branches:
        raise InputError(
            f"there are {weighting.num_branches} branch weights for "
            f"num_branches={num_branches}; give one for each branch"
        )
    if iterations > available:
        raise InputError(
            f"{images} images make {iterations} iterations, and the trajectories hold "
            f"{available}; record more or train on fewer images"
        )


def run_identity(
    config: Mapping[str, Any],
    weighting: BranchWeighting,
    trajectories: Trajectories,
    start: NetworkDenoiser,
    perceptual: Mapping[str, Any] | None,
    team: Team,
) -> dict[str, Any]:
    """What must agree for a checkpoint to be the same run, one level deep."""
    fields = {f"config.{name}": value for name, value in config.items()}
    fields["config.betas"] = list(config["betas"])
    served = {f"trajectories.{name}": value for name, value in trajectories.describe().items()}
    fields["start"] = denoiser_sha256(start)
    if perceptual is not None:
        fields["perceptual"] = dict(perceptual)
    if team.size > 1:
        # Each device draws dropout of its own.
        fields["devices"] = team.size
    return {"weights": weighting.describe(), **fields, **served}
