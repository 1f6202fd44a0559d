"""From folders into the job queue, and from the job queue into the pipeline.

A FolderWatcher is one thread per watched folder. It walks when the schedule says so, checks the paths of events, and
offers each new file to the job queue once it is complete. `claims` is the source of the daemon's pipeline: the files
that this daemon takes from the job queue, until it stops.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from cxrbatch.failpoints import failpoint
from cxrbatch.intake.folder_state import FolderState, Paused, Schedule
from cxrbatch.intake.inotify import InotifyTrigger
from cxrbatch.mounts import mount_points_below
from cxrbatch.store import JobQueue, RetryPolicy, StoreDown
from cxrbatch.types import FoundFile

__all__ = ["FolderWatcher", "LogEvent", "Outage", "claims"]

_OFFER = 1_000  # files in one transaction
_LONGEST_NAP_S = 1.0
_PAUSED_S = 5.0  # between two checks of an unavailable share; at most rescan_s


class LogEvent(Protocol):
    """Log one event: a name, and values under the keys that ops/logs.py allows."""

    def __call__(self, event: str, **values: object) -> None: ...


class Outage:
    """Reports when something becomes unavailable and when it is back. Logs transitions, at most one per rest_s."""

    def __init__(
        self,
        gone: Callable[[str], None],
        back: Callable[[], None],
        rest_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gone, self._back, self._rest_s, self._clock = gone, back, rest_s, clock
        self._reported, self._not_before = False, clock()

    def __call__(self, why: str | None) -> None:
        """Call it after each try: with a sentence if it failed, None if it worked."""
        if why is None and self._reported:
            self._reported = False
            self._back()
        elif why is not None and not self._reported and self._clock() >= self._not_before:
            self._reported, self._not_before = True, self._clock() + self._rest_s
            self._gone(why)


class FolderWatcher(threading.Thread):
    """Offers one folder's new files to the job queue until `stop` is set."""

    def __init__(
        self,
        folder: FolderState,
        schedule: Schedule,
        job_queue: JobQueue,
        *,
        retry: RetryPolicy,
        work_available: threading.Event,
        log_event: LogEvent,
        fail: Callable[[BaseException], None],
        trigger: InotifyTrigger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="watcher", daemon=True)
        self.folder, self.schedule, self.job_queue = folder, schedule, job_queue
        self.trigger = trigger
        self.paused = self._idle = False
        self._noted_mounts: frozenset[str] | None = None  # as the store has them
        self._unmounted = self._unlisted = 0  # mount points away and unreadable folders at the last log message
        self.last_heartbeat = clock()  # of its loop, also while it waits for the store (ops/health.py)
        self.last_walk_at = 0.0  # Unix seconds; 0: none has ended yet
        self.free_bytes: int | None = None  # on the disk of the folder, at the last walk
        self._retry = replace(retry, heartbeat=self._beat)
        self._stop_event, self._work_available = retry.stop, work_available
        self._log_event, self._fail, self._clock = log_event, fail, clock
        self._outage = Outage(
            lambda why: log_event("folder_paused", folder=folder.root, why=why),
            lambda: log_event("folder_back", folder=folder.root),
        )

    @property
    def idle(self) -> bool:
        """Everything in the folder has been offered, or the folder is unavailable."""
        return self._idle

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                self._turn()
        except StoreDown:
            pass  # RetryPolicy raises it only when stopped
        except BaseException as error:
            self._fail(error)

    def _beat(self) -> None:
        self.last_heartbeat = self._clock()

    def _turn(self) -> None:
        self._beat()
        if self.schedule.due_in() <= 0:
            self._walk()
        self._offer(self.folder.look_again())
        self._idle = self.folder.idle or self.paused
        unstable_in = self.folder.next_look_in()
        nap_s = min(self.schedule.due_in(), _LONGEST_NAP_S, _LONGEST_NAP_S if unstable_in is None else unstable_in)
        if self.trigger.fired.wait(max(nap_s, 0.01)):
            self._stop_event.wait(0.05)  # handle a burst of events together
            self.trigger.fired.clear()
            self._look_where_it_changed(self.trigger.changed())

    def _look_where_it_changed(self, paths: frozenset[str] | None) -> None:
        """Check the paths of events now; everything else is checked by the next scheduled walk."""
        if paths is None or self.paused or not self.folder.walked:
            self.schedule.notify()
            return
        self._offer(self.folder.look_at(paths))
        if self.folder.walk_wanted:
            self.schedule.notify()

    def _walk(self) -> None:
        started = self._clock()
        self.schedule.begin()
        self._note_mounts()
        began = self._retry(self.job_queue.store.time)
        try:
            self._offer(self.folder.walk())
        except Paused as pause:
            self._outage(str(pause))
            if not self.paused:
                self.trigger.disarm()
            self.paused = True
            self.schedule.paused(_PAUSED_S)
            return
        self._outage(None)
        if self.paused or self.trigger.is_stale():
            self._listen_again()
        self.paused = False
        self.last_walk_at = time.time()
        self.free_bytes = self._free_bytes()
        failpoint("walk.ended")
        if self.folder.unlisted != self._unlisted:
            self._unlisted = self.folder.unlisted
            event = "folders_unreadable" if self._unlisted else "folders_readable"
            self._log_event(event, folder=self.folder.root, held=self._unlisted)
        gone = self.folder.gone
        if gone is not None and not self._stop_event.is_set():
            if len(gone.unmounted) != self._unmounted:
                self._unmounted = len(gone.unmounted)
                self._log_event(
                    "mounts_away" if gone.unmounted else "mounts_back", folder=self.folder.root, held=self._unmounted
                )
            mark = partial(self.job_queue.mark_missing, unlisted=gone.unlisted, unmounted=gone.unmounted, since=began)
            missing = self._retry(partial(mark, [self.folder.root], gone.seen))
            if missing:
                self._log_event("files_missing", folder=self.folder.root, files=missing)
        self.schedule.ended(self._clock() - started)

    def _listen_again(self) -> None:
        """The folder is back, or another one, and walked: listen to events, or poll it."""
        armed = self.trigger.arm()
        self.folder.inodes_tell = not self.trigger.silent
        if armed != self.schedule.events:
            poll = "never" if armed else f"{self.schedule.poll_s:g} s"
            self._log_event("watching", folder=self.folder.root, poll=poll, why=self.trigger.why_not or "")
        self.schedule.events = armed
        if armed:
            self.schedule.notify()  # this walk may have passed a folder that changed before its events were listened to

    def _free_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self.folder.root).free
        except OSError:  # away, or a bucket
            return None

    def _note_mounts(self) -> None:
        """Store the mount points, so that a later run can tell an unmounted share from an emptied folder."""
        mounted = self.folder.known_mounts | mount_points_below(self.folder.root)
        if mounted != self._noted_mounts:
            note = partial(self.job_queue.store.note_mounts, [self.folder.root], mounted)
            self._noted_mounts = self.folder.known_mounts = self._retry(note)

    def _offer(self, found: Iterator[FoundFile]) -> None:
        some: list[FoundFile] = []
        for file in found:
            self._beat()
            some.append(file)
            if len(some) == _OFFER:
                self._commit(some)
                some = []
            if self._stop_event.is_set():
                return
        if some:
            self._commit(some)

    def _commit(self, some: Sequence[FoundFile]) -> None:
        failpoint("walk.offers")
        self._retry(partial(self.job_queue.offer, some, inodes_tell=self.folder.inodes_tell))
        self.folder.noted(some)
        self._work_available.set()


def claims(
    job_queue: JobQueue,
    roots: Callable[[], Sequence[str]],
    most: int,
    *,
    retry: RetryPolicy,
    work_available: threading.Event,
    long_paths: Callable[[], Mapping[str, str]] = dict,
    enough: Callable[[], bool] = lambda: False,
    pause_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[FoundFile | None]:
    """Claim files from the job queue, at most `most` at a time, and yield them; None while there is nothing to do.

    `roots` are the folders that are available now: files in an unavailable share would only fail.
    The job queue is queried when `work_available` is set, and every `pause_s` seconds (for another daemon's files,
    retries and expired leases). Ends when `retry.stop` is set, or when there was nothing to claim and `enough()` was
    true before the query.
    """
    ask_at = clock()
    while not retry.stop.is_set():
        last_round = enough()
        if not work_available.is_set() and clock() < ask_at and not last_round:
            yield None
            continue
        work_available.clear()
        try:
            claimed = retry(partial(job_queue.claim, roots(), most))
        except StoreDown:
            return
        ask_at = clock() + (0.0 if claimed else pause_s)
        if not claimed and last_round:
            return
        for one in claimed:
            if retry.stop.is_set():
                return
            path = one.file.path or long_paths().get(one.text)
            if path is None:  # the stored path was cut, and this daemon's walk has not found the file yet
                retry(partial(job_queue.release, [one.text], for_s=60.0))
                continue
            yield replace(one.file, path=path)
