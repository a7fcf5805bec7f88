"""Time of a training iteration of this checkout against commit 3f7be1a, measured in turns.

``python -m benchmarks.iteration_time OLD``, where OLD is a checkout of 3f7be1a: one process a
side, which trains a block of iterations whenever it is asked to.
"""

import importlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTH, BATCH, ITERATIONS, PAIRS = 24, 64, 20, 12
KINDS = ("sfd", "progressive", "teacher")


def main() -> None:
    """Measure and print, or serve one side."""
    if sys.argv[1] == "--serve":
        return serve(sys.argv[2], is_old=sys.argv[3] == "old")
    sys.path.insert(0, str(ROOT))
    from benchmarks.common import parser, publish, table
    from benchmarks.timing import interleave

    options = parser(__doc__)
    options.add_argument("old", type=Path, help="checkout of 3f7be1a")
    given = options.parse_args()
    rows = []
    for kind in KINDS:
        with Side(given.old, kind, "old") as old, Side(ROOT, kind, "new") as new:
            found = interleave(new.block, old.block, PAIRS)
        after, before = (1000 * seconds for seconds in found.seconds)
        rows.append((kind, f"{before:.1f}", f"{after:.1f}", f"{found.ratio:.3f}", found.spread))
    head = ("iteration of", "3f7be1a, ms", "now, ms", "now / 3f7be1a", "spread of pairs")
    body = (
        f"SongUNet of {WIDTH} channels on 8 x 8 images, batch {BATCH}; CPU time of a process with "
        f"one thread, the median iteration of {ITERATIONS} in each of {PAIRS} blocks a side, "
        "taken in turns.\n\n"
    )
    shown = ["OLD", "--write"] if given.write else ["OLD"]
    publish("iteration_time", body + table(head, rows), write=given.write, arguments=shown)
    return None


class Side:
    """A process that trains with one checkout's code."""

    def __init__(self, checkout: Path, kind: str, name: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", kind, name]
        self._process = subprocess.Popen(
            command,
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def block(self) -> float:
        """CPU seconds of the median iteration of a block."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def serve(kind: str, *, is_old: bool) -> None:
    """Train a block for each line of stdin, and print the median iteration's CPU seconds."""
    import torch

    sys.path[0] = os.environ["PYTHONPATH"]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stamps: list[float] = []

    def tick(*_: object) -> None:
        stamps.append(time.process_time())

    block = block_of(kind, tick, is_old=is_old)
    for _ in sys.stdin:
        stamps.clear()
        block()
        pairs = itertools.pairwise(stamps[2:])
        print(statistics.median(after - before for before, after in pairs), flush=True)


# Where each commit has the names that both know; new names are imported where they are used.
MODULES = {
    "Cosine": ("preconditioning", "diffusion.preconditioning"),
    "DPMSolverPP": ("solvers", "diffusion.solvers"),
    "Dataset": ("data", "data.datasets"),
    "IntervalGrid": ("intervals", "diffusion.intervals"),
    "LiveTrajectories": ("trajectories", ""),
    "Trajectories": ("", "methods.trajectories"),
    "NetworkDenoiser": ("denoiser", "diffusion.denoiser"),
    "PDConfig": ("progressive", "methods.progressive"),
    "SFDConfig": ("sfd", "methods.sfd"),
    "SongUNet": ("networks", "networks.song_unet"),
    "SongUNetConfig": ("networks", "networks.song_unet"),
    "TeacherConfig": ("teachers", "training.teacher"),
    "TrajectoryStore": ("recordings", "methods.recordings"),
    "train_teacher": ("teachers", "training.teacher"),
}


def block_of(kind: str, tick: Callable[..., None], *, is_old: bool) -> Callable[[], object]:
    """What trains one block with the code of either commit."""
    import torch

    def of(name: str) -> Any:
        module = MODULES[name][0 if is_old else 1]
        return getattr(importlib.import_module(f"bdense.{module}"), name)

    data = of("Dataset")("x", torch.randint(256, (512, 1, 8, 8), dtype=torch.uint8), "x")
    cpu, images = torch.device("cpu"), BATCH * ITERATIONS
    shape = {"model_channels": WIDTH, "channel_mult": (1, 2), "num_blocks": 1}
    shape |= {"attn_resolutions": (), "dropout": 0.0}
    network = of("SongUNet")(of("SongUNetConfig")(img_resolution=8, img_channels=1, **shape))
    ones = torch.ones(4, dtype=torch.float64)
    if kind == "teacher":
        length = {"images": images} if is_old else {"kimg": images / 1000}
        config = of("TeacherConfig")(**length, batch=BATCH, network=shape)
        return lambda: of("train_teacher")(data, config, device=cpu, on_iteration=tick)
    if kind == "progressive":
        teacher = of("NetworkDenoiser")(network, of("Cosine")()).eval()
        if is_old:
            from bdense.preconditioning import native_schedule
            from bdense.progressive import DataBatches, distill_round

            batches, levels = DataBatches(data, BATCH, 0, cpu), native_schedule(teacher.precond)
            rounds = of("PDConfig")(updates=ITERATIONS, num_branches=2, batch=BATCH)
            weights = ones[:2] / 2
            return lambda: distill_round(
                teacher, batches, levels, 8, rounds, weights, on_update=tick
            )
        from bdense.methods.method import Inputs
        from bdense.methods.progressive import Progressive
        from bdense.training.loop import train
        from bdense.weights.weighting import FixedWeights

        method = Progressive()
        rounds = of("PDConfig")(steps=16, until=8, updates=ITERATIONS, batch=BATCH)
        stage = method.stage(method.plan(rounds)[0], teacher, rounds, Inputs(dataset=data))
        return lambda: train(stage, FixedWeights(ones[:2] / 2), on_iteration=tick)
    teacher = of("NetworkDenoiser")(network).eval()
    own = {} if is_old else {"conditions": teacher.conditions}
    live = of("LiveTrajectories" if is_old else "Trajectories")(
        teacher=teacher,
        grid=of("IntervalGrid")(num_intervals=3, substeps=4),
        solver=of("DPMSolverPP")(),
        batch=BATCH,
        count=ITERATIONS,
        seed=1,
        **own,
    )
    recorded = of("TrajectoryStore")(live, Path(tempfile.mkdtemp())).record()
    if is_old:
        from bdense.sfd import distill

        knobs = of("SFDConfig")(num_branches=4, images=images)
        return lambda: distill(teacher, recorded, knobs, ones, on_iteration=tick)
    from bdense.methods.sfd import SFDStage
    from bdense.training.loop import train
    from bdense.weights.weighting import FixedWeights

    knobs = of("SFDConfig")(kimg=images / 1000, batch=BATCH)
    return lambda: train(
        SFDStage(config=knobs, trajectories=recorded, start=teacher),
        FixedWeights(ones),
        on_iteration=tick,
    )


if __name__ == "__main__":
    main()
