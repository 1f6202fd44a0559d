"""The bell: inotify says that something happened in a folder, so that the next walk comes sooner. Nothing else.

It may ring too often or miss things (a burst of files overflows its queue): the walk is the truth. Where the
kernel cannot see what others write (network and host file systems), and where its limits are used up, there is
no bell, and the folder is walked every `poll_s` instead.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Literal

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

__all__ = ["Bell", "Poll", "silent_mounts"]

Poll = Literal["auto", "always", "never"]

#: File systems where others can write without this kernel noticing; fuse covers sshfs, rclone, gvfs and their like.
_SILENT = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs"),
        *("overlay", "vboxsf", "virtiofs", "prl_fs", "drvfs"),
    }
)
_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileDeletedEvent,
    DirCreatedEvent,
    DirMovedEvent,
]


def silent_mounts(root: str, mountinfo: str = "/proc/self/mountinfo") -> list[str]:
    """The file-system types at and below `root` whose changes inotify may not see; empty: all can be trusted.

    Where there is no mountinfo (not Linux), that is ["unknown"].
    """
    try:
        lines = Path(mountinfo).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ["unknown"]
    real = os.path.realpath(root)
    mounts = [_mount(line) for line in lines]
    holding = [(len(point), index, kind) for index, (point, kind) in enumerate(mounts) if _holds(point, real)]
    kinds = [max(holding)[2]] if holding else ["unknown"]  # the last one at a place covers the others
    kinds += [kind for point, kind in mounts if point != real and _holds(real, point)]
    return sorted({kind for kind in kinds if kind in _SILENT or kind.startswith("fuse") or kind == "unknown"})


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mount(line: str) -> tuple[str, str]:
    """A line of mountinfo (proc(5)): its mount point and type. Spaces and the like are written as octal there."""
    before, _, after = line.partition(" - ")
    point = before.split(" ")[4]
    for octal, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        point = point.replace(octal, character)
    return point, after.split(" ")[0]


class Bell:
    """Rings `rung` for one folder. `why_not` is a sentence where it cannot."""

    def __init__(self, root: str, poll: Poll = "auto", mountinfo: str = "/proc/self/mountinfo") -> None:
        self.root = root
        self.rung = threading.Event()
        self.silent = silent_mounts(root, mountinfo)  # also says whether inode numbers can be trusted
        self.why_not: str | None = None
        self._poll = poll
        self._observer: InotifyObserver | None = None

    def arm(self) -> bool:
        """Begin to listen; False (and `why_not`) where the folder has to be polled."""
        self.disarm()
        self.why_not = None
        if self._poll == "always":
            self.why_not = "poll is set to always"
        elif self._poll == "auto" and self.silent:
            self.why_not = f"changes on {', '.join(self.silent)} may come without an event"
        else:
            try:
                self._observer = InotifyObserver()
                self._observer.schedule(_Ringer(self.rung), self.root, recursive=True, event_filter=_EVENTS)
                self._observer.start()
            except OSError as error:
                self.why_not = _limit(error)
                self.disarm()
        return self.why_not is None

    def disarm(self) -> None:
        """Stop listening; the folder may be away."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            if observer.is_alive():
                observer.join(5)


class _Ringer(FileSystemEventHandler):
    def __init__(self, rung: threading.Event) -> None:
        self._rung = rung

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._rung.set()


def _limit(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC:  # not the disk: watchdog and strerror say so, wrongly
            return "this user may watch no more folders; raise the sysctl fs.inotify.max_user_watches"
        case errno.EMFILE:
            return "this user may open no more inotify instances; raise the sysctl fs.inotify.max_user_instances"
        case _:
            return f"inotify does not work here ({errno.errorcode.get(error.errno or 0, 'unknown error')})"
