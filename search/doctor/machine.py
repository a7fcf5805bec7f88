"""What the doctor looks at on this machine: room on its disks, Ray, GPUs that torch sees."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLateError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

from search.doctor.finding import Finding, ok, problem, warning
from search.storage.engine import cache_folder, runs_folder

_T = TypeVar("_T")

SCARCE_BYTES, FULL_BYTES = 2**30, 64 * 2**20
APART_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What the trials of a study ask of one machine."""

    study: str
    cpus: float
    gpus: float


def wants_of(name: str, spec: dict[str, Any]) -> Wants | None:
    """From a spec as JSON has it; None where it tells nothing."""
    resources = spec.get("resources")
    if not resources:
        return None
    gpus = resources["gpus"]
    return Wants(study=name, cpus=resources["cpus"], gpus=0.0 if gpus == "auto" else gpus)


def check_machine(wants: list[Wants]) -> Iterator[Finding]:
    """Disks, Ray and GPUs, held against what the studies' trials ask for."""
    yield from _disks()
    machines: list[tuple[float, float]] | None = None
    if address := os.environ.get("RAY_ADDRESS"):
        found, machines = _cluster(address)
        yield found
    else:
        yield ok("Ray", "no RAY_ADDRESS is set: a launch starts its own on this machine")
    gpus = _apart(_gpus)
    if isinstance(gpus, str):
        yield problem("GPUs", f"torch cannot be used: {gpus}", "install bdense and torch anew")
        return
    yield ok("GPUs", ", ".join(gpus) if gpus else "torch sees none on this machine")
    if machines is None and not os.environ.get("RAY_ADDRESS"):
        machines = [(float(os.cpu_count() or 1), float(len(gpus)))]
    for want in wants if machines else ():
        assert machines is not None
        if not any(cpus >= want.cpus and own >= want.gpus for cpus, own in machines):
            have = " or ".join(f"{cpus:g} CPUs and {own:g} GPUs" for cpus, own in machines)
            yield problem(
                "resources",
                f"a trial asks for {want.cpus:g} CPUs and {want.gpus:g} GPUs of one machine; "
                f"there are {have}",
                "lower resources in the study file, or add machines to the cluster",
            ).of(want.study)


def _disks() -> Iterator[Finding]:
    for name, folder in (("runs", runs_folder()), ("cache", cache_folder())):
        place = folder.resolve()
        there = next(each for each in (place, *place.parents) if each.is_dir())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"\0")
        except OSError as error:
            yield problem(
                "disk",
                f"{name} cannot be written at {there}: {error.strerror}",
                f"make room or mend its rights, or set BDENSE_{name.upper()} to another folder",
            )
            continue
        free = shutil.disk_usage(there).free
        text = f"{free / 2**30:.1f} GiB are free where {name} lie, {place}"
        advice = "make room: bdense-search clean STUDY deletes recorded trajectories"
        if free < FULL_BYTES:
            yield problem("disk", text, advice)
        elif free < SCARCE_BYTES:
            yield warning("disk", text, advice)
        else:
            yield ok("disk", text)


def _cluster(address: str) -> tuple[Finding, list[tuple[float, float]] | None]:
    """The cluster of RAY_ADDRESS, and CPUs and GPUs of each of its machines."""
    nodes = _apart(_nodes)
    if isinstance(nodes, str):
        return problem("Ray", nodes, "check RAY_ADDRESS, or unset it for this machine alone"), None
    alive = [(cpus, gpus) for is_alive, cpus, gpus in nodes if is_alive]
    lost = len(nodes) - len(alive)
    text = (
        f"the cluster at {address} has {len(alive)} machines, {sum(c for c, _ in alive):g} CPUs "
        f"and {sum(g for _, g in alive):g} GPUs"
    )
    if lost:
        return warning(
            "Ray", f"{text}; {lost} more are gone", "see to them, if they should be"
        ), alive
    return ok("Ray", text), alive


def _apart(call: Callable[[], _T]) -> _T | str:
    """Call in a process of its own, which what hangs or needs much memory dies with.

    Returns:
        What it answers, or why there is no answer.
    """
    spawn = multiprocessing.get_context("spawn")
    apart = ProcessPoolExecutor(max_workers=1, mp_context=spawn)
    try:
        return apart.submit(call).result(timeout=APART_SECONDS)
    except TooLateError:
        return f"no answer within {APART_SECONDS:g} seconds"
    except BrokenProcessPool:
        return "it ended the process that asked"
    except Exception as error:  # noqa: BLE001  whatever it is, it is what was asked for
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        for process in list((apart._processes or {}).values()):
            process.kill()
        apart.shutdown(wait=True, cancel_futures=True)


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"{name} with {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    return names


def _nodes() -> list[tuple[bool, float, float]]:
    """Each machine of the cluster: is it alive, its CPUs and GPUs."""
    import ray

    from search.run.runner import quiet, ray_session
    from search.storage.engine import resolve_storage_url

    with quiet(), ray_session(resolve_storage_url(None)):
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        (
            bool(node["Alive"]),
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in nodes
    ]
