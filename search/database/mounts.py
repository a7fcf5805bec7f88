"""What kind of file system a path lies on."""

from pathlib import Path

from search.errors import StorageError

# SQLite's locks do not hold on these, and two workers would write to one page.
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre", "beegfs", "gpfs"),
    *("gfs2", "ocfs2", "glusterfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs"),
    *("fuse.rclone", "fuse.gcsfuse"),
)
_MOUNTS = Path("/proc/self/mountinfo")


def file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """Type of the file system that holds ``path``, as Linux names it; empty where none is told.

    Args:
        path: It need not be there yet.
        mounts: What is mounted where, as in /proc/self/mountinfo.
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    found: dict[Path, str] = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        # A blank in a name is written as an octal escape; what is mounted later lies on top.
        point = before.split()[4].encode().decode("unicode_escape")
        found[Path(point)] = after.split()[0]
    place = path.resolve()
    return next((found[each] for each in (place, *place.parents) if each in found), "")


def refuse_network_file_system(path: Path, mounts: Path = _MOUNTS) -> None:
    """Refuse a SQLite database where its locks would not keep processes apart.

    Raises:
        StorageError: It lies on a network file system.
    """
    if (kind := file_system(path, mounts)) in _NETWORK:
        raise StorageError(
            f"{path} lies on a network file system ({kind}), where SQLite's locks do not hold; "
            "give --storage or BDENSE_STORAGE a PostgreSQL server, or a SQLite file on a disk of "
            "this machine"
        )
