"""Trackers: what records a run while it is under way, such as TensorBoard, W&B and MLflow.

``--log NAME[:PLACE]`` names one; another package adds its own by an entry point of the group
``bdense.trackers``. A tracker sees numbers and changes none. One that fails is dropped with a line
on stderr, as hours of training are worth more than their curves.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from bdense.errors import InputError, extra
from bdense.knobs import KnobError
from bdense.training import TRACKERS
from bdense.training.loop import IterationReport

# Updates of a stage that are passed on, at most about so many, and its last one.
POINTS = 1000


class Tracker(Protocol):
    """Made with the PLACE of --log; empty where none is given.

    Before a study starts, it looks for the package that the class names as ``package``, if any,
    and makes a tracker that it does not start, so that a place of no use is refused.
    """

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        """A run begins or is continued; ``settings`` are JSON values."""

    def update(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        """What an iteration, counted from 1, of a stage did; "" is a run's only stage."""

    def evaluation(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        """What was measured of the student after that iteration."""

    def end(self, *, failed: bool) -> None:
        """The run is over, or interrupted."""


class Tracking(contextlib.AbstractContextManager["Tracking"]):
    """All trackers of a run; without one it does nothing.

    Args:
        places: ``NAME[:PLACE]`` of each.
        run: Name of the run.
        settings: JSON values that made it.
        knob: What the places were given by, for errors.

    Raises:
        InputError: There is no such tracker, its package is missing, or it cannot start.
    """

    def __init__(
        self,
        places: Sequence[str] = (),
        run: str = "",
        settings: Mapping[str, Any] = types.MappingProxyType({}),
        *,
        knob: str = "log",
    ) -> None:
        self._knob = knob
        self._trackers: dict[str, Tracker] = {}
        self._iteration: dict[str, int] = {}
        try:
            for place in places:
                self._trackers[place] = self._started(place, run, settings)
        except BaseException:  # no run of the others stays open
            self._each(lambda tracker: tracker.end(failed=True))
            raise

    def _started(self, place: str, run: str, settings: Mapping[str, Any]) -> Tracker:
        name, _, where = place.partition(":")
        try:
            with extra(name, "it"):
                tracker = TRACKERS[name](where)
                tracker.start(run, settings)
        except InputError as error:
            raise KnobError(self._knob, f"{place}: {error}") from error
        except Exception as error:
            raise KnobError(self._knob, f"{place} cannot start: {_line(error)}") from error
        return tracker

    def update(self, stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        """Pass on what iteration ``done`` of ``total`` did, if it is one of ``POINTS``."""
        self._iteration[stage] = done
        if done == total or done % max(1, total // POINTS) == 0:
            self._each(lambda tracker: tracker.update(stage, done, values))

    def iteration(self, stage: str, done: IterationReport) -> None:
        """Pass on what an iteration did."""
        if self._trackers:
            self.update(stage, done.iteration + 1, done.iterations, values_of(done))

    def evaluation(self, stage: str, values: Mapping[str, float]) -> None:
        """Pass on what was measured after the last iteration of the stage."""
        at = self._iteration.get(stage, 0)
        self._each(lambda tracker: tracker.evaluation(stage, at, values))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._each(lambda tracker: tracker.end(failed=kind is not None))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for place, tracker in [*self._trackers.items()]:
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001  of any package; the training goes on
                del self._trackers[place]
                sys.stderr.write(f"{self._knob} {place} failed and is left out: {_line(error)}\n")


def values_of(done: IterationReport) -> dict[str, float]:
    """The figures of an iteration by name; losses and weights are means over its updates."""
    values = {"loss": done.loss, "lr": done.lr, "gradient_norm": done.gradient_norm}
    for name, each in (("branch_loss", done.branch_losses), ("weight", done.weights)):
        means = each.mean(dim=0).tolist()
        values |= {f"{name}/{k}": value for k, value in enumerate(means, 1)}
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
