"""The job queue of one daemon: each call is one transaction on leases.py, as this owner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import update

from cxrbatch.errors import StoreDown
from cxrbatch.failpoints import failpoint
from cxrbatch.store import leases
from cxrbatch.store.connection import connect
from cxrbatch.store.leases import Backoff, Claimed
from cxrbatch.store.paths import path_to_text
from cxrbatch.store.recording import Recorded
from cxrbatch.store.schema import runs
from cxrbatch.store.store import Run, Store
from cxrbatch.types import FoundFile, Outcome

__all__ = ["JobQueue"]


@dataclass(frozen=True, slots=True)
class JobQueue:
    """What a daemon does with the store. A method that raises StoreDown committed nothing: call it again."""

    store: Store
    run: Run
    owner: str  # unique for each daemon and each start of it
    lease_s: float
    backoff: Backoff
    #: Called with what a transaction wrote, and the seconds that it took.
    recorded: Callable[[Sequence[Outcome], Recorded, float], None] = lambda outcomes, recorded, took_s: None
    #: `watch --once` tries no file twice: it claims only retries that were due when it started. None: all that are due.
    retries_due_by: datetime | None = None
    named: frozenset[str] = frozenset()  # roots that are files: see leases.claim
    in_hand: dict[str, FoundFile] = field(default_factory=dict)  # claimed and not yet recorded, by the key of its row
    doubt: threading.Event = field(default_factory=threading.Event)  # set while the result of the last claim is unknown

    def offer(self, found: Sequence[FoundFile], *, inodes_tell: bool, retry_at_once: bool = False) -> int:
        """Queue complete files that are new or changed, unless their known outcome is valid. Returns how many wait.

        With `retry_at_once`, a file that is due for another try later waits no longer.
        Names with a problem (a FIFO, a link out of the folder) get their outcome at once.
        """
        whole = [file for file in found if file.problem is None]
        known_by_name = [Outcome(file, rejected=file.problem) for file in found if file.problem is not None]
        offered = 0
        if whole:
            with connect(self.store.engine, write=True) as connection:
                offered = leases.offer(
                    connection,
                    whole,
                    self.run.cascade_id,
                    self.store.now(connection),
                    inodes_tell=inodes_tell,
                    retry_at_once=retry_at_once,
                )
                failpoint("offer.before_commit")
            failpoint("offer.committed")
        if known_by_name:
            started = time.perf_counter()
            recorded = self.store.record(self.run.run_id, self.run.cascade_id, known_by_name, backoff=self.backoff)
            self.recorded(known_by_name, recorded, time.perf_counter() - started)
        return offered

    def claim(self, roots: Sequence[str], most: int) -> list[Claimed]:
        """Lease up to `most` files below `roots` for lease_s seconds.

        If the store fails during the commit, the claim may have been committed: the next claim finds those files.
        """
        try:
            with connect(self.store.engine, write=True) as connection:
                now = self.store.now(connection)
                claimed = []
                if self.doubt.is_set():
                    held = leases.held(connection, self.owner)
                    claimed = [one for one in held if not self._has(one.text, one.file)]
                room = most - len(claimed)
                claimed += leases.claim(
                    connection, self.owner, roots, room, self.lease_s, now, self.retries_due_by, named=self.named
                )
                failpoint("claim.before_commit")
        except StoreDown:
            self.doubt.set()
            raise
        failpoint("claim.committed")
        self.doubt.clear()
        self.in_hand.update((one.text, one.file) for one in claimed)
        return claimed

    def _has(self, text: str, file: FoundFile) -> bool:
        """Whether this version of a file is in hand."""
        known = self.in_hand.get(text)
        return known is not None and leases.file_columns(known) == leases.file_columns(file)

    def renew(self) -> int:
        """Renew all leases of this owner for lease_s more seconds. Returns how many files that is."""
        with connect(self.store.engine, write=True) as connection:
            held = leases.renew(connection, self.owner, self.lease_s, self.store.now(connection))
            failpoint("renew.before_commit")
        failpoint("renew.committed")
        return held

    def record(self, outcomes: Sequence[Outcome]) -> Recorded:
        """Record outcomes in one transaction. Outcomes whose lease was lost meanwhile are dropped (`late`)."""
        started = time.perf_counter()
        recorded = self.store.record(
            self.run.run_id, self.run.cascade_id, outcomes, owner=self.owner, backoff=self.backoff
        )
        self.recorded(outcomes, recorded, time.perf_counter() - started)
        for outcome in outcomes:
            if self._has(text := path_to_text(outcome.file.path), outcome.file):
                self.in_hand.pop(text, None)
        return recorded

    def unfinished(self, roots: Sequence[str]) -> bool:
        """Whether a file below `roots` waits or is in anybody's hands (what is due for another try later does not)."""
        with connect(self.store.engine) as connection:
            return leases.unfinished(connection, roots, self.named)

    def describe_engine(self, device: str, engine: str) -> None:
        """Record the device and engine that the run really uses, once the engine is open."""
        with connect(self.store.engine, write=True) as connection:
            described = update(runs).where(runs.c.id == self.run.run_id).values(device=device, engine=engine)
            connection.execute(described)

    def release(self, texts: Sequence[str] | None = None, *, for_s: float | None = None) -> int:
        """Release leases, all or some, so that the files can be claimed again (after `for_s` seconds if given)."""
        with connect(self.store.engine, write=True) as connection:
            now = self.store.now(connection)
            later = None if for_s is None else now + timedelta(seconds=for_s)
            released = leases.release(connection, self.owner, texts, later)
            failpoint("release.before_commit")
        for text in list(self.in_hand) if texts is None else texts:
            self.in_hand.pop(text, None)
        return released

    def release_everybodys(self) -> int:
        """Release the leases of all owners. Requires the exclusive writer lock (SQLite, writer_lock.py)."""
        with connect(self.store.engine, write=True) as connection:
            return leases.release(connection, None)

    def mark_missing(
        self,
        roots: Sequence[str],
        seen: Container[str],
        *,
        unlisted: Collection[str] = (),
        unmounted: Collection[str] = (),
        since: datetime | None = None,
    ) -> int:
        """Mark paths below `roots` that are not in `seen` (path texts) as missing: see Store.mark_missing."""
        return self.store.mark_missing(
            self.run.run_id, roots, seen, unlisted=unlisted, unmounted=unmounted, since=since, watching=True
        )
