"""Inotify reports where something changed in a folder, so that the path is checked before the next walk.

Events may be redundant or lost (a burst of files overflows the queue), so the walk decides. The kernel does not see
what other machines write to network and host file systems, and it limits the number of watches. Without events, the
folder is walked every `poll_s` instead.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
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

from cxrbatch.intake.remote import is_remote
from cxrbatch.mounts import MOUNTINFO, hides_changes, mount_of, mount_points_below, read_mounts

__all__ = ["InotifyTrigger", "Poll", "silent_mounts"]

Poll = Literal["auto", "always", "never"]

_IN_DELETE_SELF = 0x400  # inotify(7)
_MOST_PATHS = 10_000  # kept between two checks; above that, a walk is cheaper
_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileDeletedEvent,
    DirCreatedEvent,
    DirMovedEvent,
]


def silent_mounts(root: str, mountinfo: str = MOUNTINFO) -> list[str]:
    """The file-system types at and below `root` whose changes inotify may not report; empty: all are reliable.

    ["unknown"] where there is no mountinfo (not Linux).
    """
    if is_remote(root):
        return ["bucket"]
    mounts = read_mounts(mountinfo)
    if mounts is None:
        return ["unknown"]
    real = os.path.realpath(root)
    own = mount_of(root, mounts)
    kinds = {own.kind if own else "unknown"}
    kinds |= {mount.kind for mount in mounts if mount.point.startswith(real.rstrip("/") + "/")}
    return sorted(kind for kind in kinds if hides_changes(kind))


class InotifyTrigger:
    """Sets `fired` when something changes in one folder, and keeps the paths. `why_not` says why it cannot."""

    def __init__(self, root: str, poll: Poll = "auto", mountinfo: str = MOUNTINFO) -> None:
        self.root = root
        self.fired = threading.Event()
        self.silent = silent_mounts(root, mountinfo)  # also says whether inode numbers can be trusted
        self.why_not: str | None = None
        self._poll, self._mountinfo = poll, mountinfo
        self._armed_for: object = None
        self._observer: InotifyObserver | None = None
        self._lock = threading.Lock()
        self._changed: set[str] = set()
        self._anywhere = False

    def changed(self) -> frozenset[str] | None:
        """The paths that appeared, changed or vanished since the last call; None: a walk is needed."""
        with self._lock:
            changed = None if self._anywhere else frozenset(self._changed)
            self._changed, self._anywhere = set(), False
        return changed

    def notify(self, path: str | None) -> None:
        """Record an event for `path`; None: an event that needs a walk."""
        with self._lock:
            if path is None or len(self._changed) >= _MOST_PATHS:
                self._anywhere = True
            else:
                self._changed.add(path)
        self.fired.set()

    def arm(self) -> bool:
        """Start listening; False (and `why_not`) if the folder has to be polled."""
        self.disarm()
        self.why_not = None
        self.silent = silent_mounts(self.root, self._mountinfo)
        if self._poll == "always":
            self.why_not = "poll is set to always"
        elif self._poll == "auto" and self.silent:
            self.why_not = f"changes on {', '.join(self.silent)} may come without an event"
        else:
            try:
                self._observer = InotifyObserver()
                inside = os.path.join(self.root, "")  # of a link, the folder that it leads to: watchdog follows none
                self._observer.schedule(_EventHandler(self), inside, recursive=True, event_filter=_EVENTS)
                self._observer.start()
            except OSError as error:
                self.why_not = _limit(error)
                self.disarm()
        self._armed_for = self._look()
        if self._observer is not None and _out_of_watches(self.root):
            self.why_not = _limit(OSError(errno.ENOSPC, ""))  # the events that do come are used all the same
        return self.why_not is None

    def is_stale(self) -> bool:
        """Whether `arm` is due again: another folder has this name, a mount came or went, or watches did."""
        if self._observer is not None and not all(emitter.is_alive() for emitter in self._observer.emitters):
            return True  # they end with their folder; a new one may have its inode number
        return self._armed_for is not None and self._armed_for != self._look()

    def _look(self) -> object:
        try:
            info = None if is_remote(self.root) else os.stat(self.root)
        except OSError:
            return "away"
        mounts = frozenset() if info is None else mount_points_below(self.root, self._mountinfo)
        out_of_watches = self._observer is not None and _out_of_watches(self.root)
        return info and (info.st_dev, info.st_ino), mounts, out_of_watches

    def disarm(self) -> None:
        """Stop listening; the folder may be unavailable."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            if observer.is_alive():
                observer.join(5)


def _out_of_watches(folder: str) -> bool:
    """Whether the kernel watches no further folder for this user. watchdog then passes over folders without a word."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_CLOEXEC)
    if descriptor < 0:
        return False  # no further instance, which says nothing of watches
    try:
        watch = libc.inotify_add_watch(descriptor, os.fsencode(folder), _IN_DELETE_SELF)
        return bool(watch < 0 and ctypes.get_errno() == errno.ENOSPC)
    finally:
        os.close(descriptor)


class _EventHandler(FileSystemEventHandler):
    def __init__(self, trigger: InotifyTrigger) -> None:
        self._trigger = trigger

    def on_any_event(self, event: FileSystemEvent) -> None:
        for path in (event.src_path, event.dest_path):
            if path:
                self._trigger.notify(os.fsdecode(path))
        if isinstance(event, DirMovedEvent):  # its contents moved too
            self._trigger.notify(None)


def _limit(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC:  # not a full disk, as watchdog and strerror claim
            return "this user may watch no more folders; raise the sysctl fs.inotify.max_user_watches"
        case errno.EMFILE:
            return "this user may open no more inotify instances; raise the sysctl fs.inotify.max_user_instances"
        case _:
            return f"inotify does not work here ({errno.errorcode.get(error.errno or 0, 'unknown error')})"
