"""What guidance, recorded trajectories, accumulation and checkpointing cost a student of latents.

Networks of random weights, which cost what trained ones do. ``--network sd15`` is Stable Diffusion
1.5's U-Net, for a GPU; nothing is downloaded.
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bdense.diffusion.conditions import Prompts
from bdense.diffusion.denoiser import build_denoiser
from bdense.diffusion.guidance import guided
from bdense.errors import is_out_of_memory
from bdense.execution import Execution
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.sfd import SFDConfig, SFDStage
from bdense.methods.trajectories import Trajectories
from bdense.models.zoo import HUB_CHECKPOINTS
from bdense.training.latent_digits import ARCHITECTURE
from bdense.training.loop import IterationReport, train
from bdense.weights.log_linear import uniform_weights
from bdense.weights.weighting import FixedWeights
from benchmarks.common import parser, publish, table
from benchmarks.timing import Paired, interleave, pick_device, seconds_per_call, synchronise

K = 4
WAYS = {"unguided": (1.0, 1.0), "teacher alone": (7.5, 1.0), "both": (7.5, 7.5)}
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TOKENS = 77


def architecture(network: str) -> Mapping[str, Any]:
    """``tiny`` is latent-digits' U-Net at 16 x 16 latents."""
    if network == "sd15":
        return HUB_CHECKPOINTS[SD15].architecture
    config = ARCHITECTURE["config"]
    unet = config["unet"] | {"sample_size": 16}
    return {**ARCHITECTURE, "config": config | {"unet": unet}}


def trajectories(
    network: str, device: torch.device, batch: int, count: int, precision: Any = "float32"
) -> Trajectories:
    """The teacher's, under random prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = build_denoiser(dict(architecture(network))).to(device).eval()
        told = torch.randn(8, TOKENS, teacher.model.text_dim)
    teacher.execute(Execution(precision=precision))
    config = SFDConfig(nfe=2, substeps=K, sigma_min=0.1, sigma_max=teacher.precond.sigma_max)
    return Trajectories(
        teacher=teacher,
        grid=config.grid(),
        solver=config.make_solver(),
        batch=batch,
        count=count,
        seed=0,
        conditions=Prompts(told, torch.zeros(1, *told.shape[1:])),
    )


def seconds(served: Trajectories, student: float, **knobs: Any) -> float:
    """Median of an iteration, after one that does not count."""
    device = next(served.teacher.parameters()).device
    stamps: list[float] = []

    def on_iteration(done: IterationReport) -> None:
        synchronise(device)
        stamps.append(time.perf_counter())

    config = SFDConfig(
        nfe=2,
        substeps=K,
        batch=served.batch,
        kimg=len(served) * served.batch / 1000,
        guidance_student=student,
        **knobs,
    )
    stage = SFDStage(config=config, trajectories=served, start=served.teacher)
    train(stage, FixedWeights(uniform_weights()(K)), on_iteration=on_iteration)
    return statistics.median(b - a for a, b in itertools.pairwise(stamps))


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--network", choices=("tiny", "sd15"), default="tiny")
    options.add_argument("--precision", default="float32", help="default: %(default)s")
    options.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    options.add_argument("--pairs", type=int, default=7, help="that count (default: 7)")
    given = options.parse_args()
    given.device = device = pick_device(1)
    if given.network == "sd15" and device.type != "cuda":
        options.error("--network sd15 is for a GPU")
    live = trajectories(given.network, device, given.batch, 3, given.precision)
    teacher = live.teacher
    body = [
        f"SFD with B-DENSE, NFE 2, K = {K}, batch {given.batch}, latents of "
        f"{list(teacher.image_shape)}, {sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M "
        f"parameters, {given.precision}.",
        guided_calls(live, given.pairs, device),
        _ways(live, given.pairs),
        memory(given),
    ]
    publish("latent", "\n\n".join(body), write=given.write)


@torch.no_grad()
def guided_calls(live: Trajectories, pairs: int, device: torch.device) -> str:
    """A guided evaluation against two of the same network."""
    batch = live[0]
    told, sigma = batch.condition.arguments(), torch.tensor(2.0)
    null = live.conditions.null()
    assert null is not None
    ask = guided(live.teacher, 7.5, null.to(batch.start))
    one = lambda: live.teacher(batch.start, sigma, **told)  # noqa: E731
    measured = interleave(
        lambda: seconds_per_call(lambda: ask(batch.start, sigma, **told), 5, device),
        lambda: 2 * seconds_per_call(one, 5, device),
        pairs,
    )
    both, twice = measured.seconds
    return (
        f"A guided evaluation takes {1e3 * both:.1f} ms, two unguided ones {1e3 * twice:.1f} ms: "
        f"**{measured.ratio:.2f}** ({measured.spread}; {pairs} pairs)."
    )


def _ways(live: Trajectories, pairs: int) -> str:
    """Iterations by the way of guidance, recorded and live."""
    rows = []
    for way, (theirs, own) in WAYS.items():
        served = replace(live, guidance=theirs)
        with tempfile.TemporaryDirectory() as folder:
            recorded = TrajectoryStore(served, Path(folder)).record()
            found: Paired = interleave(
                lambda served=served, own=own: seconds(served, own),  # type: ignore[misc]
                lambda recorded=recorded, own=own: seconds(recorded, own),  # type: ignore[misc]
                pairs,
            )
        first, second = (f"{1e3 * each:.0f}" for each in found.seconds)
        # Forward and backward cost about three forwards.
        walked, trained = (
            live.solver.nfe(3 * K) * (2 if theirs != 1 else 1),
            6 * (2 if own != 1 else 1),
        )
        rows.append(
            [way, first, second, f"{found.ratio:.2f}", f"{(walked + trained) / trained:.2f}"]
        )
    header = ["guidance", "live, ms an iteration", "recorded", "live / recorded", "ideal"]
    return table(header, rows)


def memory(given: argparse.Namespace) -> str:
    """Peaks of one training each, in a process of its own.

    Args:
        given: ``network``, ``batch``, ``precision`` and ``device``.
    """
    context = multiprocessing.get_context("spawn")
    rows = []
    for recomputes, parts in itertools.product((False, True), (1, 4)):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_peak, args=(theirs, given, parts, recomputes))
        process.start()
        theirs.close()
        found = ours.recv()
        process.join()
        cells = (
            ["out of memory", "-"]
            if found is None
            else [f"{found[1] / 2**20:.0f}", f"{found[0]:.2f}"]
        )
        rows.append([parts, "yes" if recomputes else "no", *cells])
    header = ["parts (accumulate)", "gradient checkpointing", "peak MiB", "s an iteration"]
    return (
        f"{table(header, rows)}\n\nPeak memory of a training at guidance 7.5 for both, above what "
        "the process, with its teacher, holds before it: by the allocator of torch on a GPU, by "
        "resident pages on a CPU."
    )


def _peak(end: Any, given: argparse.Namespace, parts: int, recomputes: bool) -> None:
    device = given.device
    live = trajectories(given.network, device, given.batch, 3, given.precision)
    live = replace(live, guidance=7.5)
    execution = Execution(precision=given.precision, gradient_checkpointing=recomputes)
    live.teacher.execute(execution)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far
        before = _resident("VmRSS")
    try:
        taken = seconds(live, 7.5, accumulate=parts)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        end.send(None)
        return
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    end.send((taken, peak - before))


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
