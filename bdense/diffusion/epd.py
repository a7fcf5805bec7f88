"""EPD, an ensemble of parallel directions (Zhu et al. 2025, arXiv 2507.14797), and its plug-in.

A step averages the slopes at several points between its two levels, which are one batch. Where the
points lie and what they count is a table of learned numbers, made for one grid by
``bdense.methods.epd``. Importing this module loads no torch.

B batch, P points, C channels, H x W pixels, n intervals; t the level stepped from, t' to.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from bdense.diffusion.solvers import ADAMS_BASHFORTH, Solver, StepNoise, no_noise, slope
from bdense.errors import InputError
from bdense.execution import moved
from bdense.files import atomic_write, require_no_pipe
from bdense.knobs import KnobError, knob

if TYPE_CHECKING:
    from torch import Tensor

    from bdense.diffusion.denoiser import Denoiser
    from bdense.diffusion.sampling import Sampler

_log = logging.getLogger(__name__)

Rows = tuple[tuple[float, ...], ...]


class Table(NamedTuple):
    """The numbers of a walk [n, P], or of one of its steps [P]; float64.

    Attributes:
        r: Where in log t a point lies, 0 at t and 1 at t'.
        w: Its weight; the weights of a step add up to 1.
        o: What its slope is scaled by.
        s: What the level is scaled by that the network is told there.
    """

    r: Tensor
    w: Tensor
    o: Tensor
    s: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EPD(Solver):
    """EPD with given numbers, 1 + P NFE an interval, of which the P are one batch.

    A table of one row serves every step of any grid. The default is such a one, the midpoint, and
    with it EPD is DPM-Solver-2. A table of several rows has one for each interval of its grid.
    """

    name: ClassVar[str] = "epd"
    # The default's: a table for one grid has no order, and the plug-in may have more.
    order: ClassVar[int] = 2

    r: Rows = knob(((0.5,),), "where in log t each step's points lie")
    w: Rows = knob(((1.0,),), "weights of the points")
    o: Rows = knob(((1.0,),), "what their slopes are scaled by")
    s: Rows = knob(((1.0,),), "what the levels told to the network are scaled by")
    max_order: int = knob(
        1,
        "slopes of step starts that lead to the points: 1 is EPD, more are its plug-in for iPNDM",
        low=1,
        high=4,
    )

    def __post_init__(self) -> None:
        Solver.__post_init__(self)
        shape = [self.points] * len(self.r)
        for name in Table._fields:
            rows: Rows = getattr(self, name)
            if not shape or not self.points or [len(row) for row in rows] != shape:
                raise KnobError(
                    name,
                    f"must have a row for each step and in it a number for each point, as r has "
                    f"{shape}, got {[len(row) for row in rows]}",
                )
            for number in itertools.chain(*rows):
                if not math.isfinite(number) or (name == "s" and number <= 0):
                    raise KnobError(name, f"must hold finite numbers, s positive, got {number}")

    @property
    def points(self) -> int:
        """P."""
        return len(self.r[0]) if self.r else 0

    def nfe(self, num_intervals: int) -> int:
        return (1 + self.points) * num_intervals

    def sequential_nfe(self, num_intervals: int) -> int:
        return 2 * num_intervals

    def require_intervals(self, num_intervals: int) -> None:
        if len(self.r) not in (1, num_intervals):
            raise InputError(
                f"the EPD table is for {len(self.r)} intervals, and the grid has {num_intervals}; "
                "take its grid, or learn a table for this one (method epd)"
            )

    def steps(
        self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: StepNoise = no_noise
    ) -> Iterator[Tensor]:
        """``epd_step`` with the rows in turn."""
        import torch

        self.require_intervals(n := len(sigmas) - 1)
        rows = (torch.tensor(getattr(self, name), dtype=torch.float64) for name in Table._fields)
        table = Table(*(each.expand(n, -1) for each in rows))
        for state, _ in walk(denoise, x, sigmas, table, self.max_order):
            yield state

    def text(self) -> str:
        rows = zip(self.r, self.w, self.o, self.s, strict=True)
        return "; ".join(
            ", ".join(
                f"{name} {' '.join(f'{number:.4g}' for number in numbers)}"
                for name, numbers in zip(Table._fields, row, strict=True)
            )
            for row in rows
        )


def walk(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    table: Table,
    max_order: int,
    older: Sequence[Tensor] = (),
) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """``epd_step`` in each interval, whose gradient does not go through older slopes.

    Args:
        denoise, x, sigmas: As of ``Solver.steps``.
        table: [n, P].
        max_order: As of ``EPD``.
        older: Slopes at the starts of the intervals before, the newest first.

    Yields:
        The state after each interval, and ``older`` for the next.
    """
    for levels, *row in zip(itertools.pairwise(sigmas), *table, strict=True):
        x, d = epd_step(denoise, x, levels, Table(*row), older)
        older = (d.detach(), *older)[: max_order - 1]
        yield x, older


def epd_step(
    denoise: Denoiser,
    x: Tensor,
    levels: tuple[Tensor, Tensor],
    row: Table,
    older: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """x' = x + (t' - t) sum_j w_j o_j (x_j - D(x_j; s_j t_j)) / t_j, differentiable.

    The points are x_j = x + (t_j - t) e at t_j = t'^r_j t^(1 - r_j), and e is the slope at t, or
    that of Adams-Bashforth where there are older ones.

    Args:
        denoise: D(x; sigma), called at [B, ...] and at [B P, ...], in the order (image, point),
            with one level for each.
        x: [B, C, H, W].
        levels: t and t', 0-dim float64.
        row: [P].
        older: Slopes at the starts of earlier steps, the newest first.

    Returns:
        [B, C, H, W] state at t', and the slope at t.
    """
    t, t_next = levels
    d = slope(denoise, x, t)
    coefficients = ADAMS_BASHFORTH[len(older)]
    e = coefficients[0] * d
    for c, earlier in zip(coefficients[1:], older, strict=True):
        e = e + c * earlier
    t_point = t_next**row.r * t ** (1 - row.r)
    # [P] to [P, 1, 1, 1] on x's device and in its type
    at, step, weight = (
        moved(each, x).view(-1, 1, 1, 1)
        for each in (t_point, t_point - t, (t_next - t) * row.w * row.o)
    )
    x_point = x[:, None] + step * e[:, None]  # [B, P, C, H, W]
    scaled = moved(row.s * t_point, x).repeat(len(x))
    denoised = denoise(x_point.flatten(0, 1), scaled).view_as(x_point)
    return x + (weight * (x_point - denoised) / at).sum(1), d


def write_table(path: Path, sampler: Sampler, about: Mapping[str, Any]) -> None:
    """Write an EPD sampler, its grid and its table, as JSON that ``read_table`` reads.

    Args:
        about: JSON values of where it comes from, such as ``teacher_sha256``.
    """
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps({**about, "sampler": sampler.describe()}, indent=1) + "\n")


def no_table(path: Path) -> str:
    """Why an existing file is not what ``write_table`` writes; "" if it is."""
    try:
        read_table(path)
    except InputError:
        return "is not an EPD table"
    return ""


def read_table(path: Path | str, guidance: float | None = None) -> Sampler:
    """The sampler of a table's file: ``write_table``'s, or a student's ``config.json``.

    Args:
        guidance: Scale that it will be used at; a warning if it was learned at another. None is
            the one that it was learned at.

    Returns:
        The sampler, at that scale.

    Raises:
        InputError: There is no such file, or it does not hold an EPD sampler.
    """
    from bdense.diffusion.sampling import sampler_from

    try:
        require_no_pipe(Path(path))
        kept = json.loads(Path(path).read_text())
        sampler = sampler_from(kept["sampler"])
        learned_at = float(kept.get("guidance", sampler.guidance))
    except OSError as error:
        raise InputError(f"the EPD table {path} cannot be read ({error.strerror})") from error
    except InputError as error:
        raise InputError(f"the EPD table {path}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not an EPD table; give JSON that `bdense distill --method epd` wrote "
            f"({error!r})"
        ) from error
    if not isinstance(sampler.solver, EPD):
        raise InputError(f"{path} holds a sampler of {sampler.solver.name}, not of epd")
    own = replace(sampler, guidance=learned_at)
    return own if guidance is None else at_guidance(own, guidance, f"the EPD table {path}")


def at_guidance(sampler: Sampler, scale: float, what: str) -> Sampler:
    """A sampler at a guidance scale; a warning where its table was learned at another."""
    if isinstance(sampler.solver, EPD) and scale != sampler.guidance:
        learned = f"{what} was learned at guidance {sampler.guidance:g}, and is used at {scale:g}"
        _log.warning(learned)
    return replace(sampler, guidance=scale)
