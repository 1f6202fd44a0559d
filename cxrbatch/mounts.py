"""Mount points (Linux: /proc/self/mountinfo, see proc(5)), and which types of file system are shared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "MOUNTINFO",
    "Mount",
    "MountedFolder",
    "hides_changes",
    "is_shared",
    "mount_of",
    "mount_points_below",
    "read_mounts",
]

MOUNTINFO = "/proc/self/mountinfo"
#: File systems that other machines, or the host of a virtual machine or container, can write.
_SHARED = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs"),
        *("vboxsf", "virtiofs", "prl_fs", "drvfs", "fuse"),
    }
)


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of mountinfo."""

    id: int
    parent_id: int
    point: str  # absolute real path
    kind: str  # "ext4", "nfs4", "fuse.sshfs", ...


def is_shared(kind: str) -> bool:
    """Whether other machines may write the files: locks and inode numbers may then be unreliable here."""
    return kind in _SHARED or kind.startswith("fuse.")


def hides_changes(kind: str) -> bool:
    """Whether files may change without an event from this kernel; also True for "unknown"."""
    return is_shared(kind) or kind in ("overlay", "fuseblk", "unknown")


def read_mounts(mountinfo: str = MOUNTINFO) -> list[Mount] | None:
    """The mounts that no later mount covers; None if there is no mountinfo (not Linux)."""
    try:
        lines = Path(mountinfo).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    mounts = [_parsed(line) for line in lines]
    parents = {mount.id: mount.parent_id for mount in mounts}

    def covers(later: Mount, earlier: Mount) -> bool:
        above, seen = earlier.parent_id, {earlier.id}
        while above in parents and above not in seen:
            if above == later.id:
                return False  # it was mounted inside the later one
            seen.add(above)
            above = parents[above]
        return _holds(later.point, earlier.point)

    visible: list[Mount] = []
    for mount in mounts:
        visible = [earlier for earlier in visible if not covers(mount, earlier)]
        visible.append(mount)
    return visible


def mount_of(path: str, mounts: list[Mount]) -> Mount | None:
    """The mount that holds `path` (links followed)."""
    real = os.path.realpath(path)
    return max((mount for mount in mounts if _holds(mount.point, real)), key=lambda m: len(m.point), default=None)


def mount_points_below(root: str, mountinfo: str = MOUNTINFO) -> frozenset[str]:
    """Mount points at and below `root`, as paths that begin with `root`; empty if unknown."""
    real = os.path.realpath(root)
    points = (mount.point for mount in read_mounts(mountinfo) or () if _holds(real, mount.point))
    return frozenset(root.rstrip("/") + point[len(real.rstrip("/")) :] if point != real else root for point in points)


class MountedFolder:
    """A folder that may lie on a share which is unmounted later, or was mounted only after the start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._device, self._point = self._look()

    def is_gone(self) -> bool:
        """Whether the share of the folder was unmounted. Raises OSError if there is no folder."""
        info = os.stat(self._folder)
        if (info.st_dev, info.st_ino) == self._device:
            return False  # the same folder as before; reading all mounts may take long
        device, point = self._look()
        if len(point) < len(self._point):
            return True
        self._device, self._point = device, point
        return False

    def _look(self) -> tuple[tuple[int, int], str]:
        info, mount = os.stat(self._folder), mount_of(os.fspath(self._folder), read_mounts() or [])
        return (info.st_dev, info.st_ino), mount.point if mount else ""


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _parsed(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    point = fields[4]
    for octal, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        point = point.replace(octal, character)
    return Mount(int(fields[0]), int(fields[1]), point, after.split(" ")[0])
