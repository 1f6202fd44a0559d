"""From folders into the ledger, and from the ledger onto the road.

A Lookout is one thread a watched folder: it walks when the schedule or the bell says so and offers what is new
and whole. `claims` is the beginning of the road: what this daemon took from the ledger, for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from cxrbatch.bell import Bell
from cxrbatch.crash import crash_point
from cxrbatch.nouns import FoundFile
from cxrbatch.store import Patience, StoreDown, Work
from cxrbatch.watch import Folder, Paused, Schedule

__all__ = ["Lookout", "Outage", "Say", "claims"]

_OFFER = 1_000  # files in one transaction
_LONGEST_NAP_S = 1.0
_PAUSED_S = 5.0  # between two looks at a share that is away; at most rescan_s


class Say(Protocol):
    """One event of the log: a name, and values under the keys that ops/logs.py allows."""

    def __call__(self, event: str, **values: object) -> None: ...


class Outage:
    """Says when something goes and when it is back. Of what comes and goes it speaks once in `rest_s`."""

    def __init__(
        self,
        gone: Callable[[str], None],
        back: Callable[[], None],
        rest_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gone, self._back, self._rest_s, self._clock = gone, back, rest_s, clock
        self._told, self._not_before = False, clock()

    def __call__(self, why: str | None) -> None:
        """At each try: a sentence when it failed, None when it worked."""
        if why is None and self._told:
            self._told = False
            self._back()
        elif why is not None and not self._told and self._clock() >= self._not_before:
            self._told, self._not_before = True, self._clock() + self._rest_s
            self._gone(why)


class Lookout(threading.Thread):
    """Keeps one folder's new files coming into the ledger until `stop` is set."""

    def __init__(
        self,
        folder: Folder,
        schedule: Schedule,
        work: Work,
        *,
        patience: Patience,
        news: threading.Event,
        say: Say,
        fail: Callable[[BaseException], None],
        bell: Bell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="lookout", daemon=True)
        self.folder, self.schedule, self.work = folder, schedule, work
        self.bell = bell
        self.last_beat = clock()  # the loop's heartbeat
        self.paused = self._idle = False
        self._patience, self._stop_event, self._news = patience, patience.stop, news
        self._say, self._fail, self._clock = say, fail, clock
        self._outage = Outage(
            lambda why: say("folder_paused", folder=folder.root, why=why),
            lambda: say("folder_back", folder=folder.root),
        )

    @property
    def idle(self) -> bool:
        """Everything that was in the folder has been offered (or the folder is away)."""
        return self._idle

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                self._turn()
        except StoreDown:
            pass  # only when stopped: Patience lets it out then
        except BaseException as error:
            self._fail(error)

    def _turn(self) -> None:
        self.last_beat = self._clock()
        if self.schedule.due_in() <= 0:
            self._walk()
        self._offer(self.folder.look_again())
        self._idle = self.folder.idle or self.paused
        young_in = self.folder.next_look_in()
        nap_s = min(self.schedule.due_in(), _LONGEST_NAP_S, _LONGEST_NAP_S if young_in is None else young_in)
        if self.bell.rung.wait(max(nap_s, 0.01)):
            self.bell.rung.clear()
            self.schedule.ring()
            self._stop_event.wait(0.05)  # a burst rings once

    def _walk(self) -> None:
        started = self._clock()
        self.schedule.begin()
        try:
            self._offer(self.folder.walk())
        except Paused as pause:
            self._outage(str(pause))
            if not self.paused:
                self.bell.disarm()
            self.paused = True
            self.schedule.paused(_PAUSED_S)
            return
        self._outage(None)
        if self.paused:
            self.bell.arm()
        self.paused = False
        crash_point("walk.ended")
        if self.folder.gone is not None and not self._stop_event.is_set():
            missing = self._patience(partial(self.work.mark_missing, [self.folder.root], self.folder.gone.seen))
            if missing:
                self._say("files_missing", folder=self.folder.root, files=missing)
        self.schedule.ended(self._clock() - started)

    def _offer(self, found: Iterator[FoundFile]) -> None:
        some: list[FoundFile] = []
        for file in found:
            self.last_beat = self._clock()
            some.append(file)
            if len(some) == _OFFER:
                self._commit(some)
                some = []
            if self._stop_event.is_set():
                return
        if some:
            self._commit(some)

    def _commit(self, some: Sequence[FoundFile]) -> None:
        crash_point("walk.offers")
        self._patience(partial(self.work.offer, some, inodes_tell=self.folder.inodes_tell))
        self.folder.noted(some)
        self._news.set()


def claims(
    work: Work,
    roots: Callable[[], Sequence[str]],
    most: int,
    *,
    patience: Patience,
    news: threading.Event,
    long_paths: Callable[[], Mapping[str, str]] = dict,
    enough: Callable[[], bool] = lambda: False,
    pause_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[FoundFile | None]:
    """Files in this daemon's hands, at most `most` taken at a time; None while there is nothing to do.

    `roots` are the folders that are there just now: what lies in a share that is away would only fail.
    The ledger is asked when `news` is set, and every `pause_s` (another daemon's files, retries, leases that ran
    out). Ends when `patience.stop` is set, and when there is nothing to do and `enough()` was true before asking.
    """
    ask_at = clock()
    while not patience.stop.is_set():
        last_round = enough()
        if not news.is_set() and clock() < ask_at and not last_round:
            yield None
            continue
        news.clear()
        try:
            claimed = patience(partial(work.claim, roots(), most))
        except StoreDown:
            return
        ask_at = clock() + (0.0 if claimed else pause_s)
        if not claimed and last_round:
            return
        for one in claimed:
            if patience.stop.is_set():
                return
            path = one.file.path or long_paths().get(one.text)
            if path is None:  # a name too long to keep, not seen here yet: our own walk will bring it
                patience(partial(work.release, [one.text], for_s=60.0))
                continue
            yield replace(one.file, path=path)
