"""The knobs of a grid of noise levels; does not import torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bdense.diffusion import ScheduleKind
from bdense.knobs import KnobError, Knobs, knob, knobs_of

if TYPE_CHECKING:
    from bdense.diffusion.schedules import Schedule


# Without slots, so that it can be the second base of a class that has them.
@dataclass(frozen=True, kw_only=True)
class GridKnobs(Knobs):
    """Between which noise levels a grid lies, and how it spaces them."""

    heading: ClassVar[str] = "noise levels"

    schedule: ScheduleKind = knob("polynomial", "spacing of the noise levels")
    rho: float = knob(7.0, "exponent of the spacing, which logsnr does not have", above=0)
    sigma_min: float = knob(0.006, "last noise level, the lowest", above=0)
    sigma_max: float = knob(80.0, "first noise level, the highest", above=0)

    @property
    def levels(self) -> "Schedule":
        """The schedule.

        Raises:
            InputError: The knobs do not fit together.
        """
        from bdense.diffusion.schedules import Schedule

        require_exponent(self.schedule, self.rho)
        return Schedule(
            kind=self.schedule, rho=self.rho, sigma_min=self.sigma_min, sigma_max=self.sigma_max
        )


def require_exponent(schedule: str | None, rho: float | None) -> None:
    """Refuse a ``rho`` that the schedule would ignore; None is the default."""
    if schedule == "logsnr" and rho not in (None, knobs_of(GridKnobs)["rho"].default):
        raise KnobError(
            "rho",
            f"{rho:g} does nothing with schedule=logsnr, which has no exponent; leave it out, or "
            "choose another schedule",
        )
