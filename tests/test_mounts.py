"""Which file system holds a path, and SQLite kept off those whose locks do not hold."""

import os
from pathlib import Path

import pytest

from search.errors import StorageRefusedError
from search.storage.mounts import file_system, refuse_network_file_system

# As a kernel writes it: the optional fields before the dash vary in number.
MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
35 21 0:31 / /home rw,nosuid shared:14 master:2 - nfs4 server:/home rw,vers=4.2
36 35 8:2 / /home/me/scratch rw - xfs /dev/sdb1 rw
37 21 0:40 / /mnt/with\040blank rw shared:5 - cifs //server/share rw
38 21 0:41 / /data rw - ext4 /dev/sdc1 rw
39 21 0:42 / /data rw - fuse.sshfs me@host:/data rw
40 21 0:43 / /mnt/für\040Büro\134\012x rw - 9p host rw
41 21 0:44 / /mnt/one\rline rw - xfs /dev/sdd1 rw
""".lstrip().replace(r"\r", "\r")


@pytest.fixture
def mounts(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("search.storage.mounts.MOUNTS", tmp_path / "mountinfo")
    return tmp_path / "mountinfo"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/runs/bdense.db", "ext4"),
        ("/home/me/runs/bdense.db", "nfs4"),
        ("/home/me/scratch/runs/bdense.db", "xfs"),
        ("/homes/me/bdense.db", "ext4"),
        ("/mnt/with blank/bdense.db", "cifs"),
        ("/data/bdense.db", "fuse.sshfs"),
        ("/mnt/für Büro\\\nx/bdense.db", "9p"),
        ("/mnt/one\rline/bdense.db", "xfs"),
    ],
)
def test_the_innermost_and_last_mount_counts(mounts, path, kind):
    mounts.write_text(MOUNTS)
    assert file_system(Path(path)) == kind


def test_this_machines_own_mounts_are_understood(tmp_path):
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(tmp_path) not in ("", "proc")


def test_where_mounts_are_not_told_nothing_is_refused(tmp_path, mounts):
    assert not mounts.exists()
    assert file_system(tmp_path) == ""
    refuse_network_file_system(tmp_path)


def test_a_name_that_is_no_text_is_a_path_all_the_same(mounts):
    mounts.write_bytes(b"35 21 0:31 / /mnt/\xff\\040x rw - nfs server:/home rw\n")
    assert file_system(Path(os.fsdecode(b"/mnt/\xff x/bdense.db"))) == "nfs"


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        *((kind, True) for kind in ("9p", "virtiofs", "vboxsf", "wekafs", "cifs", "lustre")),
        *((f"fuse.{name}", True) for name in ("juicefs", "vmhgfs-fuse", "one-of-tomorrow")),
        ("fuse", True),
        *((kind, False) for kind in ("ext4", "btrfs", "overlay", "tmpfs", "fuseblk")),
        *((f"fuse.{name}", False) for name in ("fuse-overlayfs", "mergerfs")),
    ],
)
def test_what_may_be_on_a_network_is_refused(mounts, kind, refused):
    mounts.write_text(f"21 1 8:1 / / rw - {kind} none rw\n")
    if refused:
        with pytest.raises(StorageRefusedError, match=rf"system \({kind}\).*PostgreSQL server"):
            refuse_network_file_system(Path("/srv/bdense.db"))
    else:
        refuse_network_file_system(Path("/srv/bdense.db"))
