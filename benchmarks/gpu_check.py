"""What a GPU makes of the settings for it: each line prints both sides; meant for ten minutes.

``make gpu-check`` writes a dated file. ``--cpu`` runs every line on a tiny network on the CPU, to
see that it runs.
"""

import argparse
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bdense.data.datasets import Dataset
from bdense.diffusion.branches import widen_head
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.execution import CompileMode, Execution, Precision, moved
from bdense.methods.method import Inputs
from bdense.methods.progressive import PDConfig, Progressive
from bdense.methods.recordings import TrajectoryStore
from bdense.methods.sfd import SFDConfig, SFDStage
from bdense.metrics.metrics import frechet_distance, image_effects
from bdense.metrics.references import statistics_of
from bdense.training.loop import IterationReport, train
from bdense.training.stage import Training
from bdense.training.teacher import TeacherConfig, TeacherStage, new_denoiser
from bdense.weights.weighting import FixedWeights
from benchmarks.common import parser, publish, table
from benchmarks.gpu_precision import NETWORK, live_trajectories, measured
from benchmarks.latent import guided_calls, memory, trajectories
from benchmarks.timing import (
    Paired,
    interleave,
    seconds_per_call,
    synchronise,
)

K = 4
# All ways to compute would take an hour to compile; ``gpu_precision`` has them.
EXECUTIONS = (
    Execution(),
    Execution(precision="tf32"),
    Execution(precision="tf32", channels_last=True),
    Execution(precision="bfloat16"),
    Execution(precision="bfloat16", channels_last=True),
    Execution(precision="fast"),
    Execution(
        precision="bfloat16", channels_last=True, compile=True, compile_mode="reduce-overhead"
    ),
)
# Of digits: so small that a GPU waits for its kernels to be launched.
SMALL = {"model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "dropout": 0.0}
PAIRS = 3


def main() -> int:
    """Measure and print; 2 without a GPU."""
    given = _options()
    if not (given.cpu or torch.cuda.is_available()):
        sys.stderr.write("gpu-check needs a GPU, and torch sees none; --cpu shows that it runs\n")
        return 2
    device = torch.device("cpu" if given.cpu else "cuda")
    lines: dict[str, Callable[[argparse.Namespace, torch.device], str]] = {
        "Waits for the GPU": waits,
        "Images on the GPU": images,
        "Statistics of features": statistics,
        "Launches": launches,
        "Choice of kernels (cudnn.benchmark)": kernel_choice,
        "Recorded trajectories": recordings,
        "Stable Diffusion 1.5": latents,
        "Several GPUs": several,
        "Number formats, layout, compilation": formats,
    }
    parts, failed = [], False
    for title, line in lines.items():
        started = time.monotonic()
        try:
            found = line(given, device)
        except Exception as error:  # noqa: BLE001  one line must not cost the others
            found, failed = f"failed: {type(error).__name__}: {error}", True
        parts.append(f"## {title}\n\n{found}\n\n({time.monotonic() - started:.0f} s)")
        sys.stderr.write(parts[-1] + "\n\n")
    publish("gpu_check", "\n\n".join(parts), write=given.write)
    return int(failed)


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--cpu", action="store_true", help="a tiny network on the CPU")
    options.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    given = options.parse_args()
    given.network, given.rounds, given.iterations = NETWORK, 1, 3
    if given.cpu:
        given.network, given.rounds, given.iterations, given.batch = "tiny", 1, 1, 4
    return given


# ---- waits ----


def waits(given: argparse.Namespace, device: torch.device) -> str:
    """Synchronisations that torch notices, in the parts of an iteration and in whole ones."""
    rows = []
    for name, stage in _stages(given, device).items():
        student = widen_head(stage.start, stage.num_branches)
        stage.begin(student)
        _iteration(stage, student)  # what is kept for all iterations is copied once
        rows.append((name, _refused(stage, student, device), _counted(stage, device)))
    return (
        table(("stage", "of batch, updates and gradients", "of an update in the loop"), rows)
        + "\n\nThe first under `torch.cuda.set_sync_debug_mode('error')`, where one is an error. "
        "The loop reads its losses together, of up to 16 iterations within a quarter of a second: "
        "well below 1 is what to expect there."
    )


def _stages(given: argparse.Namespace, device: torch.device) -> dict[str, Training]:
    live = live_trajectories(given, device, 8)
    live.teacher.execute(Execution(precision=_tensor(device)))
    draw = torch.Generator().manual_seed(0)
    shape = (64, *live.teacher.image_shape)
    images = Dataset("noise", torch.randint(256, shape, generator=draw, dtype=torch.uint8), "")
    small = new_denoiser(TeacherConfig(network=SMALL), images.images.shape[1:]).to(device)
    pd = PDConfig(steps=8, until=4, updates=8, batch=given.batch, schedule="polynomial")
    method, inputs = Progressive(), Inputs(dataset=images)
    return {
        "sfd": SFDStage(
            config=SFDConfig(kimg=8 * given.batch / 1000, batch=given.batch),
            trajectories=live,
            start=live.teacher,
        ),
        "progressive": method.stage(method.plan(pd)[0], live.teacher, pd, inputs),
        "teacher": TeacherStage(
            config=TeacherConfig(
                kimg=8 * given.batch / 1000, batch=given.batch, network=SMALL, warmup_kimg=0
            ),
            dataset=images,
            start=small,
        ),
    }


def _iteration(stage: Training, student: NetworkDenoiser) -> None:
    """All of one but what the loop does with the losses."""
    weights = torch.ones(stage.num_branches, dtype=torch.float64)
    for update in stage.updates(0, stage.batch(0, slice(None))):
        update(student.branches).weighted(weights).backward()


def _refused(stage: Training, student: NetworkDenoiser, device: torch.device) -> str:
    """The first wait of an iteration, where a wait is an error."""
    if device.type != "cuda":
        return "-"
    torch.cuda.set_sync_debug_mode("error")
    try:
        _iteration(stage, student)
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [each for each in frames if "bdense" in each.filename] or list(frames)
        return f"{Path(own[-1].filename).name}:{own[-1].lineno}: {error}".partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def _counted(stage: Training, device: torch.device) -> str:
    """Waits an update, over iterations 2 to 8 of the loop."""
    if device.type != "cuda":
        return "-"
    seen: list[int] = []
    updates = 1
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")

        def report(done: IterationReport) -> None:
            nonlocal updates
            seen.append(len([each for each in noted if "synchroniz" in str(each.message)]))
            updates = len(done.weights)

        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(stage, FixedWeights(torch.ones(stage.num_branches)), on_iteration=report)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return f"{(seen[-1] - seen[0]) / (len(seen) - 1) / updates:.2f}"


# ---- images ----


def images(given: argparse.Namespace, device: torch.device) -> str:
    """A batch of CIFAR-10's size from images on the device against images on the CPU."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (50_000, 3, 32, 32), generator=draw, dtype=torch.uint8)
    plain, like = Dataset("noise", pixels, ""), torch.empty(0, device=device)
    index = torch.randint(len(pixels), (given.batch,), generator=draw)

    def seconds(data: Dataset) -> float:
        return seconds_per_call(lambda: moved(data.clean(index), like), 100, device)

    there = plain.on(device)
    found = interleave(lambda: seconds(plain), lambda: seconds(there), PAIRS)
    return table(
        ("milliseconds of a batch", "on the CPU", "on the device", "CPU / it"),
        [_both(f"{given.batch} images", found, scale=1e3)],
    )


# ---- statistics ----


def statistics(given: argparse.Namespace, device: torch.device) -> str:
    """Mean, covariance and effects of features: on the CPU as numpy has them, and on the GPU."""
    count, d = (500, 64) if given.cpu else (10_000, 2048)
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=draw) / d**0.5
    features = (torch.randn(count, d, generator=draw) @ mix).relu()
    reference = statistics_of((torch.randn(count, d, generator=draw) @ mix).relu() + 0.1)
    cpu = torch.device("cpu")
    own = statistics_of(features)
    image_effects(features, own, reference)  # the reference's root is computed once

    def seconds(
        what: Callable[[torch.device], object], where: torch.device
    ) -> Callable[[], float]:
        return lambda: seconds_per_call(lambda: what(where), 1, where)

    parts: dict[str, Callable[[torch.device], object]] = {
        "mean and covariance": lambda where: statistics_of(features, where),
        "effects of the images": lambda where: image_effects(features, own, reference, where),
    }
    rows = [
        _both(name, interleave(seconds(part, cpu), seconds(part, device), PAIRS))
        for name, part in parts.items()
    ]
    summed = statistics_of(features, device)
    apart = np.abs(summed.sigma - own.sigma).max() / np.abs(own.sigma).max()
    fids = [frechet_distance(each, reference) for each in (own, summed)]
    return (
        f"{count} images of {d} features; seconds, medians of {PAIRS} pairs.\n\n"
        + table(("what", "CPU", str(device), "CPU / it"), rows)
        + f"\n\nCovariances differ by {apart:.1e} of their largest entry; FID {fids[0]:.12g} and "
        f"{fids[1]:.12g}."
    )


def _both(name: str, found: Paired, scale: float = 1.0) -> tuple[str, str, str, str]:
    first, second = (scale * each for each in found.seconds)
    return name, f"{first:.4f}", f"{second:.4f}", f"{found.ratio:.2f}"


# ---- launches ----


def launches(given: argparse.Namespace, device: torch.device) -> str:
    """A digits-sized network: eager, compiled, and replayed as CUDA graphs."""
    modes: dict[str, CompileMode] = {"compiled": "default", "CUDA graphs": "reduce-overhead"}
    rows = []
    for mode, name in modes.items():
        eager = _small(device)
        other = _small(device).execute(Execution(compile=True, compile_mode=name))
        for what, work in {"call": _call, "gradients": _gradients}.items():
            found = interleave(
                lambda work=work, eager=eager: work(eager, device),
                lambda work=work, other=other: work(other, device),
                PAIRS,
            )
            rows.append(_both(f"{mode}, {what}", found))
    return (
        "Seconds of a call without gradients, and of one with its gradients; batch 128.\n\n"
        + table(("eager against", "eager", "it", "eager / it"), rows)
        + "\n\nCUDA graphs are `compile` with `compile_mode` reduce-overhead."
    )


def _small(device: torch.device) -> NetworkDenoiser:
    denoiser = new_denoiser(TeacherConfig(network=SMALL), torch.Size((1, 8, 8)))
    return denoiser.to(device).eval().execute(Execution())


def _call(denoiser: NetworkDenoiser, device: torch.device) -> float:
    x, sigma = torch.randn(128, 1, 8, 8).to(device), torch.tensor(2.0)
    with torch.no_grad():
        return seconds_per_call(lambda: denoiser(x, sigma), 20, device)


def _gradients(denoiser: NetworkDenoiser, device: torch.device) -> float:
    x, sigma = torch.randn(128, 1, 8, 8).to(device), torch.tensor(2.0)

    def step() -> None:
        denoiser.zero_grad(set_to_none=True)
        denoiser(x, sigma).square().mean().backward()

    return seconds_per_call(step, 20, device)


# ---- choice of kernels ----


def kernel_choice(given: argparse.Namespace, device: torch.device) -> str:
    """A call of the teacher with cuDNN's guess, and with the kernels that it has timed."""
    teacher = live_trajectories(given, device, 1).teacher.execute(
        Execution(precision=_tensor(device))
    )
    x, sigma = torch.randn(given.batch, *teacher.image_shape).to(device), torch.tensor(2.0)

    def seconds(timed: bool) -> float:
        torch.backends.cudnn.benchmark = timed
        with torch.no_grad():
            teacher(x, sigma)  # chooses
            return seconds_per_call(lambda: teacher(x, sigma), given.iterations, device)

    found = interleave(lambda: seconds(False), lambda: seconds(True), PAIRS)
    return table(
        ("call of the teacher", "guessed", "timed", "guessed / timed"),
        [_both(given.network, found)],
    )


def _tensor(device: torch.device) -> Precision:
    return "tf32" if device.type == "cuda" else "float32"


# ---- recorded trajectories ----


def recordings(given: argparse.Namespace, device: torch.device) -> str:
    """Recording against its walks alone, and an iteration against reading its rows.

    What is between them is the most that doing both at once could save.
    """
    live = live_trajectories(given, device, 4)
    live.teacher.execute(Execution(precision=_tensor(device)))

    def walks() -> float:
        return seconds_per_call(lambda: [live[i] for i in range(len(live))], 1, device)

    def record() -> float:
        with tempfile.TemporaryDirectory() as folder:
            store = TrajectoryStore(live, Path(folder))
            return seconds_per_call(store.record, 1, device)

    recorded = interleave(record, walks, PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        store = TrajectoryStore(live, Path(folder)).record()
        reading = seconds_per_call(lambda: [store[i] for i in range(len(store))], 1, device)
        stamps: list[float] = []

        def stamp(_: IterationReport) -> None:
            synchronise(device)
            stamps.append(time.perf_counter())

        kimg = len(store) * given.batch / 1000
        config = SFDConfig(kimg=kimg, batch=given.batch)
        stage = SFDStage(config=config, trajectories=store, start=live.teacher)
        train(stage, FixedWeights(torch.ones(K)), on_iteration=stamp)
    iteration = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    rows = [
        _both("recording against the walks alone", recorded),
        (
            "an iteration against reading its rows",
            f"{iteration:.4f}",
            f"{reading / len(store):.4f}",
            f"{iteration * len(store) / reading:.2f}",
        ),
    ]
    return f"Seconds, {_tensor(device)}, batch {given.batch}.\n\n" + table(
        ("what", "first", "second", "first / second"), rows
    )


# ---- Stable Diffusion 1.5 ----


def latents(given: argparse.Namespace, device: torch.device) -> str:
    """A guided evaluation of its U-Net, and a student's memory with each way to save some."""
    own = argparse.Namespace(network="sd15", batch=16, precision="bfloat16", device=device)
    if given.cpu:
        own = argparse.Namespace(network="tiny", batch=4, precision="float32", device=device)
    live = trajectories(own.network, device, own.batch, 1, own.precision)
    calls = guided_calls(live, PAIRS, device)
    del live  # the memory of its teacher
    return f"Batch {own.batch}, {own.precision}, random weights.\n\n{calls}\n\n{memory(own)}"


# ---- several GPUs ----


def several(given: argparse.Namespace, device: torch.device) -> str:
    """SFD's iterations on two GPUs against one."""
    if torch.cuda.device_count() < 2 or given.cpu:
        return "Not measured: it needs two GPUs."
    live = live_trajectories(given, device, 5)
    live.teacher.execute(Execution(precision="tf32"))
    stage = SFDStage(
        config=SFDConfig(kimg=5 * given.batch / 1000, batch=given.batch),
        trajectories=live,
        start=live.teacher,
    )

    def seconds(count: int) -> float:
        stamps: list[float] = []
        devices = [torch.device("cuda", index) for index in range(count)]
        train(
            stage,
            FixedWeights(torch.ones(K)),
            devices=devices,
            on_iteration=lambda _: stamps.append(time.perf_counter()),
        )
        return (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    found = interleave(lambda: seconds(1), lambda: seconds(2), 1)
    return table(
        ("an iteration", "1 GPU", "2 GPUs", "1 / 2"), [_both(f"batch {given.batch}", found)]
    )


# ---- number formats ----


def formats(given: argparse.Namespace, device: torch.device) -> str:
    """As ``gpu_precision``, for the ways that a study would choose from."""
    chosen = [each for each in EXECUTIONS if not given.cpu or _on_cpu(each)]
    return measured(chosen, given, device)


def _on_cpu(execution: Execution) -> bool:
    return execution.precision != "tf32" and not execution.is_compiled


if __name__ == "__main__":
    sys.exit(main())
