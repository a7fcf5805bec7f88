"""How much memory a device has left, in a container too."""

from pathlib import Path

import torch

# A container's limit and what is taken of it: cgroup v2, then v1; its files' cache is given back.
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_CGROUP_CACHE = ("active_file", "inactive_file")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not say."""
    if device.type == "cuda":
        # What a measurement took and torch has kept for this process is free too.
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if not known.exists():
        return None
    lines = dict(line.split(":", 1) for line in known.read_text().splitlines())
    return min([int(lines["MemAvailable"].split()[0]) * 1024, *_left_to_container()])


def _left_to_container() -> list[int]:
    """Bytes that this container's limits leave; none where there is no limit."""
    left = []
    for limit, taken in _CGROUP_FILES:
        most, now = _CGROUP / limit, _CGROUP / taken
        if not (most.is_file() and now.is_file()) or (text := most.read_text().strip()) == "max":
            continue
        stat = now.with_name("memory.stat")
        lines = stat.read_text().splitlines() if stat.is_file() else []
        known = dict(line.split() for line in lines)
        # v1 counts the groups below in names of their own.
        cache = sum(int(known.get(f"total_{key}", known.get(key, 0))) for key in _CGROUP_CACHE)
        left.append(max(0, int(text) - int(now.read_text()) + cache))
    return left
