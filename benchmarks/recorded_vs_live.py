"""One trial's training with recorded and with live teacher trajectories, measured in turns."""

import math
import tempfile
import time
from pathlib import Path

from bdense.diffusion.intervals import IntervalGrid
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.sfd import SFDConfig
from bdense.methods.trajectories import Trajectories
from benchmarks.common import DIGITS_STUDY, parser, publish, table
from benchmarks.timing import (
    Paired,
    interleave,
    pick_device,
    seconds_per_call,
    seconds_per_iteration,
    untrained_teacher,
)
from search.spec.file import read_spec
from search.spec.study import StudySpec


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument(
        "--study", type=Path, default=DIGITS_STUDY, metavar="FILE", help="default: %(default)s"
    )
    options.add_argument(
        "--pairs", type=int, default=15, help="blocks of each side that count (default: 15)"
    )
    options.add_argument(
        "--iterations", type=int, default=5, help="training iterations a block (default: 5)"
    )
    given = options.parse_args()

    spec = read_spec(given.study)
    device = pick_device(spec.resources.threads)
    config = SFDConfig.read(spec.method.options)
    teacher = untrained_teacher(spec, device)
    live = Trajectories(
        teacher=teacher,
        grid=config.grid(),
        solver=config.make_solver(),
        batch=config.batch,
        count=given.iterations + 1,
        seed=spec.seeds.training,
        conditions=teacher.conditions,
    )
    substeps = config.substeps
    with tempfile.TemporaryDirectory() as folder:
        live[0]  # the first use of a network is slow and belongs to neither side
        started = time.perf_counter()
        recorded = TrajectoryStore(live, Path(folder), spec.trajectories.dtype).record()
        recording = (time.perf_counter() - started) / live.count

        training = interleave(
            lambda: seconds_per_iteration(live.teacher, live, substeps, given.iterations),
            lambda: seconds_per_iteration(live.teacher, recorded, substeps, given.iterations),
            given.pairs,
        )
        serving = interleave(
            lambda: seconds_per_call(lambda: live[0], given.iterations, device),
            lambda: seconds_per_call(lambda: recorded[0], given.iterations, device),
            given.pairs,
        )
    publish("recorded_vs_live", _body(spec, live, training, serving, recording), write=given.write)


def _body(
    spec: StudySpec, live: Trajectories, training: Paired, serving: Paired, recording: float
) -> str:
    grid = live.grid
    assert isinstance(grid, IntervalGrid)  # of a study with one NFE
    walked = live.solver.nfe(grid.num_intervals * grid.substeps)
    # Forward and backward cost about three forwards.
    student = 3 * len(grid.trained)
    iterations = spec.resolved.stages[0].num_updates
    saved = training.difference * iterations
    pays_after = math.ceil(recording * iterations / saved) if saved > 0 else None
    sides = zip(("live", "recorded"), training.seconds, serving.seconds, strict=True)
    rows = [
        [name, f"{1e3 * whole:.1f}", f"{1e3 * walk:.2f}", f"{1e3 * (whole - walk):.1f}"]
        for name, whole, walk in sides
    ]
    pays = f"from trial {pays_after} on" if pays_after else "never here"
    header = ["trajectories", "ms an iteration", "of it to serve the batch", "rest"]
    return f"""\
B-DENSE, NFE {grid.nfe}, K = {grid.substeps}, batch {live.batch}, images of \
{list(live.teacher.image_shape)}; the network of study {spec.name}
with untrained weights, which cost what trained ones do.

{table(header, rows)}

**live / recorded = {training.ratio:.2f}** (median of {len(training.first)} pairs; \
{training.spread})

Ideal: {walked} teacher evaluations beside {len(grid.trained)} student updates of about three \
evaluations each,
({walked} + {student}) / {student} = {(walked + student) / student:.2f}. Training alone; a trial \
also draws and judges its images, which costs
the same on both sides.

Recording costs {1e3 * recording:.1f} ms an iteration, {recording * iterations:.1f} s for the \
study's {iterations} iterations by one worker; each trial
then saves {saved:.1f} s: it pays {pays}."""


if __name__ == "__main__":
    main()
