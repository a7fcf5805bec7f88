"""The GPUs of this machine that a launch may use, counted without torch."""

import os
import re
import shutil
import subprocess
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from bdense.errors import InputError

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_DRIVER = Path("/proc/driver/nvidia/gpus")
_SECONDS = 30


def count_gpus() -> int:
    """Number of GPUs of this machine or container, as nvidia-smi counts them."""
    if (program := shutil.which("nvidia-smi")) is not None:
        try:
            listed = subprocess.run(
                [program, "-L"], capture_output=True, text=True, timeout=_SECONDS, check=True
            )
        except (OSError, subprocess.SubprocessError):
            pass  # without a driver it fails
        else:
            return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))
    return len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0


def use_gpus(
    chosen: Sequence[int] | None,
    environment: MutableMapping[str, str] = os.environ,
    *,
    there: int | None = None,
) -> None:
    """Restrict a local Ray to these GPUs; call before it starts.

    Args:
        chosen: nvidia-smi's numbers; None changes nothing.
        environment: Ray's environment.
        there: GPUs of this machine; None counts them.

    Raises:
        InputError: There are no such GPUs, this process may not use them, or Ray is not local.
    """
    if chosen is None:
        return
    asked = f"--gpus {','.join(map(str, chosen))}"
    if address := environment.get("RAY_ADDRESS"):
        raise InputError(
            f"{asked}: the workers are those of the cluster at RAY_ADDRESS={address}, whose "
            "machines were given their GPUs when they joined it (ray start --num-gpus, "
            f"{VISIBLE}); choose there, or unset RAY_ADDRESS to use this machine alone"
        )
    if len(set(chosen)) < len(chosen):
        raise InputError(f"{asked} names a GPU twice; name each once")
    there = count_gpus() if there is None else there
    if missing := [number for number in chosen if not 0 <= number < there]:
        has = {0: "no GPU", 1: "1 GPU: 0"}.get(there, f"{there} GPUs: 0 to {there - 1}")
        be = "is" if len(missing) == 1 else "are"
        remedy = "leave --gpus out to run on its CPUs" if there == 0 else "choose from them"
        raise InputError(
            f"{asked}: this machine has {has}, and {', '.join(map(str, missing))} {be} not there; "
            f"{remedy}"
        )
    given = environment.get(VISIBLE)
    if given is not None:
        allowed = {part.strip() for part in given.split(",")}
        if not all(part.isdigit() for part in allowed):
            raise InputError(
                f"{asked}: {VISIBLE}={given} does not name GPUs by nvidia-smi's numbers; "
                "unset it, or set it to numbers, as in 0,2"
            )
        if not set(map(str, chosen)) <= allowed:
            raise InputError(
                f"{asked}: {VISIBLE}={given} lets this process use others; choose from them, or "
                "unset it"
            )
    environment[VISIBLE] = ",".join(map(str, chosen))
    # CUDA orders GPUs by speed, nvidia-smi by bus.
    environment[ORDER] = "PCI_BUS_ID"
