"""Disks so small that they are full at once."""

import contextlib
import errno
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Disk:
    """A file system in memory, of a size that is changed at will."""

    place: Path

    def resize(self, kib: int) -> None:
        self._mount_again(f"size={kib}k")

    def make_read_only(self) -> None:
        self._mount_again("ro")

    def make_writable(self) -> None:
        self._mount_again("rw")

    def fill(self) -> Path:
        """A file that takes all the room there is."""
        filler = self.place / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"0" * 4096)
        with pytest.raises(OSError, match="No space left") as full:
            (self.place / "one-more").write_bytes(b"0" * 4096)
        assert full.value.errno == errno.ENOSPC
        (self.place / "one-more").unlink()
        return filler

    def _mount_again(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", self.place], check=True)


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[Disk]:
    """Mount one at a folder; skips the test where that is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", place],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than so many bytes to a file is an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    """Of what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
