"""The training loop and what it needs: checkpoints, several devices, teachers, trackers."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from bdense.registry import Registry

if TYPE_CHECKING:
    from bdense.training.tracking import Tracker

_HERE = "bdense.training.trackers"
# What records a run; each is made with the PLACE of NAME[:PLACE].
TRACKERS: "Registry[Callable[[str], Tracker]]" = Registry(
    "tracker",
    "bdense.trackers",
    {
        "tensorboard": f"{_HERE}:TensorBoard",
        "wandb": f"{_HERE}:WandB",
        "mlflow": f"{_HERE}:MLflow",
    },
)
