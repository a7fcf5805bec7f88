"""Diffusion: noise levels, denoisers, solvers and samplers; importing this loads no torch."""

from typing import TYPE_CHECKING, Literal

from bdense.registry import Registry

if TYPE_CHECKING:
    from bdense.diffusion.solvers import Solver

# Images drawn at a time.
BATCH = 128

# How ``bdense.diffusion.schedules.Schedule`` spaces levels.
ScheduleKind = Literal["polynomial", "logsnr", "time_uniform", "discrete"]

# What ``bdense.diffusion.vp.snr_weight`` takes.
LevelWeight = Literal["constant", "snr", "snr_trunc", "v"]

_HERE = "bdense.diffusion.solvers"
SOLVERS: "Registry[type[Solver]]" = Registry(
    "solver",
    "bdense.solvers",
    {
        "euler": f"{_HERE}:Euler",
        "ddim": f"{_HERE}:DDIM",
        "heun": f"{_HERE}:Heun",
        "dpm2": f"{_HERE}:DPM2",
        "ipndm": f"{_HERE}:IPNDM",
        "dpmpp": f"{_HERE}:DPMSolverPP",
        "epd": "bdense.diffusion.epd:EPD",
    },
)
# These draw noise in each interval: for samplers, not for trajectories.
STOCHASTIC_SOLVERS: "Registry[type[Solver]]" = Registry(
    "stochastic solver",
    "bdense.stochastic_solvers",
    {"consistency": "bdense.methods.consistency:MultistepConsistency"},
)
