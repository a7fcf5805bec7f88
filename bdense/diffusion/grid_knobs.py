"""The knobs of a grid of noise levels; does not import torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from bdense.diffusion import ScheduleKind
from bdense.knobs import KnobError, Knobs, knob, knob_of, knobs_of

if TYPE_CHECKING:
    from bdense.diffusion.schedules import Schedule


# Without slots, so that it can be the second base of a class that has them.
@dataclass(frozen=True, kw_only=True)
class GridKnobs(Knobs):
    """Between which noise levels a grid lies, and how it spaces them."""

    heading: ClassVar[str] = "noise levels"

    schedule: ScheduleKind = knob(
        "polynomial",
        "spacing of the noise levels; discrete: even in the times that a network of a DDPM, such "
        "as Stable Diffusion, was trained at",
    )
    rho: float = knob(
        7.0, "exponent of the spacing, which logsnr and discrete do not have", above=0
    )
    sigma_min: float = knob(
        0.006,
        "last noise level, the lowest; not given, not below the teacher's own",
        above=0,
    )
    sigma_max: float = knob(
        80.0,
        "first noise level, the highest; not given, not above the teacher's own",
        above=0,
    )

    @property
    def levels(self) -> "Schedule":
        """The schedule; discrete is without its network's process (``levels_on``).

        Raises:
            InputError: The knobs do not fit together.
        """
        from bdense.diffusion.ddpm import DiscreteSchedule
        from bdense.diffusion.schedules import Schedule

        none = {"logsnr": (), "discrete": (1.0,)}.get(self.schedule)
        if none is not None and self.rho not in (knobs_of(GridKnobs)["rho"].default, *none):
            raise KnobError(
                "rho",
                f"{self.rho:g} does nothing with schedule={self.schedule}, which has no exponent; "
                "leave it out, or choose another schedule",
            )
        if self.schedule == "discrete":
            return DiscreteSchedule(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return Schedule(
            kind=self.schedule, rho=self.rho, sigma_min=self.sigma_min, sigma_max=self.sigma_max
        )


@dataclass(frozen=True, kw_only=True)
class NativeGridKnobs(Knobs):
    """As ``GridKnobs``, or the levels of the process that a network was trained on."""

    heading: ClassVar[str] = "noise levels"

    schedule: ScheduleKind | Literal["native"] | None = knob(
        None,
        "spacing of the noise levels; native: the process that the network was trained on, which "
        "has its own levels; discrete: even in the times of a DDPM",
        none="a student's own, else polynomial",
    )
    rho: float | None = knob_of(GridKnobs, "rho", None)
    sigma_min: float | None = knob_of(GridKnobs, "sigma_min", None)
    sigma_max: float | None = knob_of(GridKnobs, "sigma_max", None)

    @property
    def chosen_levels(self) -> "Schedule | None":
        """The schedule; None is native.

        Raises:
            InputError: The knobs do not fit together.
        """
        values = {name: getattr(self, name) for name in knobs_of(GridKnobs)}
        given = {name: value for name, value in values.items() if value is not None}
        if given.get("schedule") != "native":
            return GridKnobs.read(given).levels
        del given["schedule"]
        for name, value in given.items():
            raise KnobError(
                name,
                f"{value:g} is for another schedule: native has the levels of the network's own "
                "process; leave it out, or choose another schedule",
            )
        return None
