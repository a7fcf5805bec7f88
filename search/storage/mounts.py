"""The kind of file system that holds a path."""

import os
import re
from pathlib import Path

from search.errors import StorageRefusedError

# SQLite's locks do not hold on these, so two workers could write to one page. They include folders
# that a virtual machine or container shares with its host.
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "coda", "ceph", "lustre", "beegfs"),
    *("fhgfs", "gpfs", "gfs2", "ocfs2", "glusterfs", "orangefs", "pvfs2", "panfs", "wekafs"),
    *("9p", "virtiofs", "vboxsf", "vmhgfs", "prl_fs", "drvfs", "fakeowner"),
)
# File systems served by a program (fuse.NAME) that are local; any other may be on a network.
_LOCAL_FUSE = (
    *("fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.bindfs", "fuse.gocryptfs", "fuse.encfs"),
    *("fuse.ext2", "fuse.ext4", "fuse.exfat", "fuse.ntfs-3g", "fuse.zfs"),
)
MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


def file_system(path: Path) -> str:
    """Linux's name for the file system that holds a path, which need not exist; "" if unknown."""
    try:
        lines = MOUNTS.read_bytes().rstrip(b"\n").split(b"\n")
    except OSError:
        return ""
    found: dict[Path, str] = {}
    for line in lines:
        before, _, after = line.partition(b" - ")
        # Blanks in names are octal escapes; later mounts cover earlier ones.
        point = _OCTAL.sub(lambda code: bytes([int(code[1], 8)]), before.split(b" ")[4])
        found[Path(os.fsdecode(point))] = os.fsdecode(after.split(b" ")[0])
    place = path.resolve()
    return next((found[each] for each in (place, *place.parents) if each in found), "")


def refuse_network_file_system(path: Path) -> None:
    """Refuse a SQLite database on a file system where its locks do not hold.

    Raises:
        StorageRefusedError: The file system is, or may be, on a network.
    """
    kind = file_system(path)
    is_served = kind.partition(".")[0] == "fuse"
    if kind in _NETWORK or (is_served and kind not in _LOCAL_FUSE):
        raise StorageRefusedError(
            f"{path} lies on a network file system ({kind}), where SQLite's locks do not hold; "
            "take a PostgreSQL server as the storage, or a SQLite file on a disk of "
            "this machine"
        )
