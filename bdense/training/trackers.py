"""TensorBoard, Weights & Biases and MLflow as trackers; each needs its extra."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from bdense.errors import InputError


class TensorBoard:
    """Event files in a folder DIR/RUN; a run that is continued adds a file.

    Args:
        place: DIR.
    """

    package: ClassVar[str] = "tensorboard"

    def __init__(self, place: str) -> None:
        if not place:
            raise InputError("give a folder, tensorboard:DIR")
        self._folder = Path(os.path.expanduser(place))

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self._folder / run))
        self._writer.add_text("settings", f"```json\n{json.dumps(settings, indent=2)}\n```")

    def update(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in _named(stage, values).items():
            self._writer.add_scalar(name, value, iteration)

    evaluation = update

    def end(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline, WANDB_DIR and the like are its own.

    Args:
        place: PROJECT; empty is its default.
    """

    package: ClassVar[str] = "wandb"

    def __init__(self, place: str) -> None:
        self._project = place or None

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(project=self._project, name=run, config=dict(settings))

    def update(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        """Log by the iteration as an own axis: stages begin at 1 again."""
        axis = {f"{stage}/iteration" if stage else "iteration": iteration}
        self._run.log(_named(stage, values) | axis)

    evaluation = update

    def end(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow.

    Args:
        place: Tracking URI, as in sqlite:///mlflow.db; empty is MLFLOW_TRACKING_URI.
    """

    package: ClassVar[str] = "mlflow"

    def __init__(self, place: str) -> None:
        self._uri = place or None

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        """Open a run of the experiment in MLFLOW_EXPERIMENT_NAME, or else ``bdense``."""
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=self._uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "bdense")
        known = self._client.get_experiment_by_name(name)
        of = self._client.create_experiment(name) if known is None else known.experiment_id
        self._run = self._client.create_run(of, run_name=run).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run, key, json.dumps(value)[:6000])

    def update(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve, in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = _named(stage, values).items()
        metrics = [Metric(name, value, now, iteration) for name, value in found]
        self._client.log_batch(self._run, metrics=metrics)

    evaluation = update

    def end(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _named(stage: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{stage}/{name}" if stage else name: value for name, value in values.items()}
