"""The known state of a watched folder: which files are new, changed, complete or gone, and when to walk again.

Walks decide. Events are only hints where to look before the next walk; a lost share merely pauses the walks.
Memory use is two numbers per known file, plus a path while a file is unstable. Clocks are passed in; nothing here
sleeps, opens a file or uses the store.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cxrbatch.errors import ReasonCode, Retry
from cxrbatch.intake.discover import Wanted, discover, look_at
from cxrbatch.intake.path_set import PathHashSet
from cxrbatch.intake.remote import comes_whole, is_remote
from cxrbatch.intake.stability import look_again
from cxrbatch.mounts import mount_points_below
from cxrbatch.store.paths import CUT_MARK, path_to_text
from cxrbatch.types import FoundFile

__all__ = ["FolderState", "Gone", "Paused", "Schedule"]

_CALM = 5  # walks may take at most 1 / _CALM of the time, however many events arrive
_STAT_ERRORS_KEPT = 1_000  # names per walk whose stat failed
_DROPPED = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT}


class Paused(Exception):
    """The folder cannot be read now; its known state stays valid. `str(error)` is a sentence."""


@dataclass(frozen=True, slots=True)
class Gone:
    """After a walk: `path_text in gone.seen` tells whether a path still exists, except below unreadable folders."""

    seen: PathHashSet
    unlisted: tuple[str, ...] = ()  # could not be listed completely
    unmounted: tuple[str, ...] = ()  # former mount points


@dataclass(slots=True)
class Schedule:
    """When to walk: at once, then at intervals, and soon after an inotify event, with a pause between walks."""

    rescan_s: float
    clock: Callable[[], float] = time.monotonic
    poll_s: float = math.inf
    events: bool = True  # inotify works: walk every rescan_s; else every poll_s, if that is shorter
    _next: float = field(default=0.0, init=False)
    _not_before: float = field(default=0.0, init=False)
    _notified: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._next = self.clock()

    @property
    def every_s(self) -> float:
        return self.rescan_s if self.events else min(self.poll_s, self.rescan_s)

    def notify(self) -> None:
        """Walk soon: an event arrived for the folder, or may have been missed."""
        self._notified = True

    def due_in(self) -> float:
        """Seconds until the next walk; 0: now."""
        at = max(self._not_before, self.clock()) if self._notified else self._next
        return max(0.0, min(at, self._next) - self.clock())

    def begin(self) -> None:
        """A walk starts: events from now on request another one."""
        self._notified = False

    def paused(self, look_again_s: float) -> None:
        """The folder was unavailable: try again soon."""
        self._next = self._not_before = self.clock() + min(self.every_s, look_again_s)

    def ended(self, took_s: float) -> None:
        """A walk ended; the longer it took, the longer the pause before the next."""
        now = self.clock()
        self._next = now + self.every_s
        self._not_before = now + min(self.every_s, (_CALM - 1) * took_s)


class FolderState:
    """One watched folder, walked repeatedly."""

    def __init__(
        self,
        root: str,
        wanted: Wanted,
        quiet_s: float,
        *,
        inodes_tell: bool = True,
        mount_points: Callable[[str], frozenset[str]] = mount_points_below,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.inodes_tell = inodes_tell  # False on network mounts, whose inode numbers may change
        self.known_mounts = frozenset[str]()  # all mount points ever seen at or below the root
        self.unlisted = 0  # folders that the last walk could not list: nobody knows what is in them
        self.long_paths: dict[str, str] = {}  # path by its text, where the text was cut (store/paths.py)
        self._wanted, self._quiet_s = wanted, quiet_s
        self._mount_points, self._clock, self._wall_clock = mount_points, clock, wall_clock
        self._known: dict[int, int] = {}  # hash of the path's text: hash of size, mtime, ... as offered
        self._unstable: dict[str, tuple[float, FoundFile]] = {}  # (time of the last seen change, file)
        self._device: int | None = None  # st_dev of the root when it was last not empty
        self._walked = False
        self._unseen: frozenset[str] | None = None  # unreadable folders when all rows were last compared
        self.walk_wanted = False  # set by look_at, until the next walk
        self.gone: Gone | None = None

    @property
    def idle(self) -> bool:
        """Walked at least once, and no file is unstable."""
        return self._walked and not self._unstable

    @property
    def walked(self) -> bool:
        """Walked at least once."""
        return self._walked

    def next_look_in(self) -> float | None:
        """Seconds until the first unstable file may be stable; None: no file is unstable."""
        if not self._unstable:
            return None
        since = min(since for since, _ in self._unstable.values())
        return max(0.0, since + self._quiet_s - self._clock())

    def walk(self) -> Iterator[FoundFile]:
        """Walk the folder; yields files that are new or changed and complete, and names with a problem.

        Call `noted` for each file that the job queue has; until then it is yielded again. `gone` is set afterwards if
        files may be missing. Raises Paused when the root itself is unavailable, before or during the walk.
        """
        self.gone, self.walk_wanted = None, False
        device = self._root_device()
        self.known_mounts |= self._mount_points(self.root)
        seen, stat_errors, unlisted = PathHashSet(self.long_paths), list[FoundFile](), list[str]()
        for file in discover([self.root], self._wanted, unlisted, lambda path: seen.add(path_to_text(path))):
            if file.problem is not None and file.path in (self.root, self.root + "/"):
                raise Paused("The folder cannot be listed.")
            text = path_to_text(file.path)
            seen.add(text)
            if isinstance(file.problem, Retry) and file.problem.reason_code != ReasonCode.PERMISSION_DENIED:
                stat_errors = [*stat_errors, file] if len(stat_errors) < _STAT_ERRORS_KEPT else stat_errors
                continue
            if CUT_MARK in text:
                self.long_paths[text] = file.path
            if self._known.get(hash(text)) == self._fingerprint(file):
                continue
            if file.problem is not None or self._stands_still(file):
                yield file
        if not len(seen) and self._device is not None and self._root_device() != self._device:
            raise Paused("The folder is empty and lies on another device than before: its share is not mounted.")
        # A failed stat is a fact about that file only while the root is available.
        if self._root_device() != device:
            raise Paused("The folder was mounted or unmounted during the walk.")
        yield from (file for file in stat_errors if file.problem and file.problem.reason_code == ReasonCode.UNREADABLE)
        if len(seen):
            self._device = device
        vanished = {one.path for one in stat_errors if one.problem and one.problem.reason_code == ReasonCode.VANISHED}
        self._walked, self.unlisted = True, len(set(unlisted) - vanished)
        if self._device is not None:
            unmounted = self.known_mounts - self._mount_points(self.root)
            self._forget(Gone(seen, tuple(unlisted), tuple(sorted(unmounted))))

    def look_at(self, paths: Iterable[str]) -> Iterator[FoundFile]:
        """Like `walk`, but only for `paths` with an event: yields files that are new or changed and complete.

        Only a walk can tell which files are gone or unreadable; `walk_wanted` is set when there may be any.
        """
        for path in paths:
            nothing = True
            for file in look_at(path, self.root, self._wanted):
                nothing, text = False, path_to_text(file.path)
                if CUT_MARK in text:
                    self.long_paths[text] = file.path
                if isinstance(file.problem, Retry):
                    self.walk_wanted = True
                elif self._known.get(hash(text)) != self._fingerprint(file) and (
                    file.problem or self._stands_still(file)
                ):
                    yield file
            if nothing and (path in self._unstable or hash(path_to_text(path)) in self._known):
                self.walk_wanted = True

    def look_again(self) -> Iterator[FoundFile]:
        """Check the unstable files that are due again: yields those that have stopped changing."""
        for path, (since, file) in list(self._unstable.items()):
            if self._clock() - since < self._quiet_s:
                continue
            try:
                now = look_again(file)
            except OSError:
                del self._unstable[path]  # left to the next walk
                continue
            if self._fingerprint(now) == self._fingerprint(file):
                yield file
            else:
                self._unstable[path] = (self._clock(), now)

    def noted(self, files: Iterable[FoundFile]) -> None:
        """The job queue has these files: they are yielded again only when they change."""
        for file in files:
            self._known[hash(path_to_text(file.path))] = self._fingerprint(file)
            self._unstable.pop(file.path, None)

    def _stands_still(self, file: FoundFile) -> bool:
        unstable = self._unstable.get(file.path)
        if comes_whole(file.path):
            return True
        if unstable is None:
            if not self._walked and self._wall_clock() - file.mtime_ns / 1e9 >= self._quiet_s:
                return True  # older than this process
            self._unstable[file.path] = (self._clock(), file)
            return self._quiet_s == 0
        since, before = unstable
        if self._fingerprint(before) != self._fingerprint(file):
            self._unstable[file.path] = (self._clock(), file)
            return False
        return self._clock() - since >= self._quiet_s

    def _fingerprint(self, file: FoundFile) -> int:
        inode = file.inode if self.inodes_tell else 0
        return hash((file.size, file.mtime_ns, inode, file.version, file.problem and file.problem.reason_code))

    def _root_device(self) -> int:
        if is_remote(self.root):
            return 0  # the listing tells
        try:
            return os.stat(self.root).st_dev
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "EIO")
            if error.errno in _DROPPED:
                raise Paused(f"The folder is away ({name}): is its share mounted?") from None
            raise Paused(f"The folder cannot be looked at ({name}).") from None

    def _forget(self, walked: Gone) -> None:
        left = walked.seen.lacks(self._known)
        for key in left:
            del self._known[key]
        unstable = [hash(path_to_text(path)) for path in self._unstable]
        gone = set(walked.seen.lacks(unstable)) if unstable else set()
        self._unstable = {
            path: unstable for path, unstable in self._unstable.items() if hash(path_to_text(path)) not in gone
        }
        # Compare all rows after the first walk, and after one that could read folders that were unreadable before.
        unseen = frozenset((*walked.unlisted, *walked.unmounted))
        self.gone = walked if left or unseen != self._unseen else None
        self._unseen = unseen
