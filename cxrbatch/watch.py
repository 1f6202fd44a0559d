"""What a watched folder is known to hold: which files are new, changed, whole, gone; and when to look again.

The walk is the truth. Events only make the next one come sooner, and a share that drops out only makes it wait.
Memory holds two numbers a known file, and a path only while a file is young. Time comes from clocks that are
handed in; nothing here sleeps, opens a file or knows the store.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cxrbatch.discover import Wanted, discover
from cxrbatch.errors import ReasonCode, Retry
from cxrbatch.nouns import FoundFile
from cxrbatch.seen import Seen
from cxrbatch.store.paths import CUT_MARK, path_to_text

__all__ = ["Folder", "Gone", "Paused", "Schedule"]

_CALM = 5  # a walk may take one part in so many of the time, whatever the bell says
_SHAKY_KEPT = 1_000  # names that could not be looked at, of one walk
_DROPPED = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT}


class Paused(Exception):
    """The folder cannot be looked at now; what is known of it stands. `str(error)` is a sentence."""


@dataclass(frozen=True, slots=True)
class Gone:
    """After a whole walk: `path_text in gone.seen` says what is still there."""

    seen: Seen


@dataclass(slots=True)
class Schedule:
    """When to walk: at once, then every `rescan_s`, and soon after the bell, but never without a rest between."""

    rescan_s: float
    clock: Callable[[], float] = time.monotonic
    _next: float = field(default=0.0, init=False)
    _not_before: float = field(default=0.0, init=False)
    _rung: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._next = self.clock()

    def ring(self) -> None:
        """Something happened in the folder."""
        self._rung = True

    def due_in(self) -> float:
        """Seconds until the next walk; 0: now."""
        at = max(self._not_before, self.clock()) if self._rung else self._next
        return max(0.0, min(at, self._next) - self.clock())

    def begin(self) -> None:
        """A walk starts: events from now on ask for another one."""
        self._rung = False

    def paused(self, look_again_s: float) -> None:
        """The folder was away: look again soon."""
        self._next = self._not_before = self.clock() + min(self.rescan_s, look_again_s)

    def ended(self, took_s: float) -> None:
        """A walk came to its end; the longer it took, the longer the rest."""
        now = self.clock()
        self._next = now + self.rescan_s
        self._not_before = now + min(self.rescan_s, (_CALM - 1) * took_s)


class Folder:
    """One watched folder, walked again and again."""

    def __init__(
        self,
        root: str,
        wanted: Wanted,
        quiet_s: float,
        *,
        inodes_tell: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.inodes_tell = inodes_tell  # False on network mounts, which make inode numbers up
        self.long_paths: dict[str, str] = {}  # path by its text, where the text was cut (store/paths.py)
        self._wanted, self._quiet_s = wanted, quiet_s
        self._clock, self._wall_clock = clock, wall_clock
        self._known: dict[int, int] = {}  # hash of the path's text: hash of size, mtime, ... as offered
        self._young: dict[str, tuple[float, FoundFile]] = {}  # (when it was last seen to change, file)
        self._device: int | None = None  # st_dev of the root when it last held something
        self._walked = self._compared = False
        self.gone: Gone | None = None

    @property
    def idle(self) -> bool:
        """Walked at least once, and nothing is waiting to stand still."""
        return self._walked and not self._young

    def next_look_in(self) -> float | None:
        """Seconds until the first young file may have stood still long enough; None: there is none."""
        if not self._young:
            return None
        since = min(since for since, _ in self._young.values())
        return max(0.0, since + self._quiet_s - self._clock())

    def walk(self) -> Iterator[FoundFile]:
        """Go through the folder; yields what is new or changed and whole, and names with a problem.

        Say `noted` for each that the ledger has; until then it comes again. `gone` is set afterwards when the
        walk was whole and something is missing. Raises Paused when the root itself is away, before or during it.
        """
        self.gone = None
        device = self._root_device()
        seen, shaky, whole = Seen(self.long_paths), list[FoundFile](), True
        for file in discover([self.root], self._wanted):
            if file.path == self.root:
                raise Paused("The folder cannot be listed.")
            text = path_to_text(file.path)
            seen.add(text)
            if isinstance(file.problem, Retry):
                whole = False
                if file.problem.reason_code != ReasonCode.PERMISSION_DENIED:
                    shaky = [*shaky, file] if len(shaky) < _SHAKY_KEPT else shaky
                    continue
            if CUT_MARK in text:
                self.long_paths[text] = file.path
            if self._known.get(hash(text)) == self._print(file):
                continue
            if file.problem is not None or self._stands_still(file):
                yield file
        if not len(seen) and self._device is not None and self._root_device() != self._device:
            raise Paused("The folder is empty and lies on another device than before: its share is not mounted.")
        self._root_device()  # what could not be looked at says something of itself only while the root is there
        yield from (file for file in shaky if file.problem and file.problem.reason_code == ReasonCode.UNREADABLE)
        if len(seen):
            self._device = device
        self._walked = True
        if whole and self._device is not None:
            self._forget(seen)

    def look_again(self) -> Iterator[FoundFile]:
        """The young files whose time has come: yields those that stood still."""
        for path, (since, file) in list(self._young.items()):
            if self._clock() - since < self._quiet_s:
                continue
            try:
                info = os.stat(path)
            except OSError:
                del self._young[path]  # the next walk tells
                continue
            now = FoundFile(path, info.st_size, info.st_mtime_ns, info.st_ino)
            if self._print(now) == self._print(file):
                yield file
            else:
                self._young[path] = (self._clock(), now)

    def noted(self, files: Iterable[FoundFile]) -> None:
        """The ledger has these: they come again only when they change."""
        for file in files:
            self._known[hash(path_to_text(file.path))] = self._print(file)
            self._young.pop(file.path, None)

    def _stands_still(self, file: FoundFile) -> bool:
        young = self._young.get(file.path)
        if young is None:
            if not self._walked and self._wall_clock() - file.mtime_ns / 1e9 >= self._quiet_s:
                return True  # it was there before we were
            self._young[file.path] = (self._clock(), file)
            return self._quiet_s == 0
        since, before = young
        if self._print(before) != self._print(file):
            self._young[file.path] = (self._clock(), file)
            return False
        return self._clock() - since >= self._quiet_s

    def _print(self, file: FoundFile) -> int:
        inode = file.inode if self.inodes_tell else 0
        return hash((file.size, file.mtime_ns, inode, file.problem and file.problem.reason_code))

    def _root_device(self) -> int:
        try:
            return os.stat(self.root).st_dev
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "EIO")
            if error.errno in _DROPPED:
                raise Paused(f"The folder is away ({name}): is its share mounted?") from None
            raise Paused(f"The folder cannot be looked at ({name}).") from None

    def _forget(self, seen: Seen) -> None:
        left = seen.lacks(self._known)
        for key in left:
            del self._known[key]
        gone = set(seen.lacks(hash(path_to_text(path)) for path in self._young)) if self._young else set()
        self._young = {path: young for path, young in self._young.items() if hash(path_to_text(path)) not in gone}
        # After the first whole walk, what has gone while nobody watched is found too.
        self.gone = Gone(seen) if left or not self._compared else None
        self._compared = True
