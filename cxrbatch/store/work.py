"""The ledger (leases.py) as one daemon sees it: each call is one transaction, in this owner's name."""

from __future__ import annotations

import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from cxrbatch.crash import crash_point
from cxrbatch.errors import ReasonCode, StoreDown
from cxrbatch.nouns import FoundFile, Outcome
from cxrbatch.store import leases
from cxrbatch.store.engine import connect
from cxrbatch.store.leases import Claimed, Waits
from cxrbatch.store.ledger import Run, Store
from cxrbatch.store.paths import path_to_text
from cxrbatch.store.recording import Recorded

__all__ = ["Work", "retry_now"]


@dataclass(frozen=True, slots=True)
class Work:
    """What a daemon does with the store. Methods raise StoreDown: nothing was kept, call again."""

    store: Store
    run: Run
    owner: str  # differs between any two daemons, and between two starts of one
    lease_s: float
    waits: Waits
    in_hand: set[str] = field(default_factory=set)  # keys of the rows that were claimed and not yet recorded
    doubt: threading.Event = field(default_factory=threading.Event)  # set while nobody knows what the last claim took

    def offer(self, found: Sequence[FoundFile], *, inodes_tell: bool) -> int:
        """Whole files, new or changed: they wait now, unless what is known stands. Returns how many wait.

        Names with a problem of their own (a FIFO, a link out of the folder) get their outcome at once.
        """
        whole = [file for file in found if file.problem is None]
        known_by_name = [Outcome(file, rejected=file.problem) for file in found if file.problem is not None]
        offered = 0
        if whole:
            with connect(self.store.engine, write=True) as connection:
                now = self.store.now(connection)
                offered = leases.offer(connection, whole, self.run.cascade_id, now, inodes_tell=inodes_tell)
                crash_point("offer.before_commit")
            crash_point("offer.committed")
        if known_by_name:
            self.store.record(self.run.run_id, self.run.cascade_id, known_by_name, waits=self.waits)
        return offered

    def claim(self, roots: Sequence[str], most: int) -> list[Claimed]:
        """Take up to `most` files below `roots` in hand for lease_s.

        A store that goes away during the commit may have kept it: the next claim finds what was taken then.
        """
        try:
            with connect(self.store.engine, write=True) as connection:
                now = self.store.now(connection)
                claimed = []
                if self.doubt.is_set():
                    held = leases.held(connection, self.owner)
                    claimed = [one for one in held if one.text not in self.in_hand]
                claimed += leases.claim(connection, self.owner, roots, most - len(claimed), self.lease_s, now)
                crash_point("claim.before_commit")
        except StoreDown:
            self.doubt.set()
            raise
        crash_point("claim.committed")
        self.doubt.clear()
        self.in_hand.update(one.text for one in claimed)
        return claimed

    def renew(self) -> int:
        """A heartbeat: hold on to everything in hand for lease_s more. Returns how many files that is."""
        with connect(self.store.engine, write=True) as connection:
            held = leases.renew(connection, self.owner, self.lease_s, self.store.now(connection))
            crash_point("renew.before_commit")
        crash_point("renew.committed")
        return held

    def record(self, outcomes: Sequence[Outcome]) -> Recorded:
        """Outcomes of files in hand, in one transaction. Those whose lease was lost meanwhile are dropped (`late`)."""
        recorded = self.store.record(self.run.run_id, self.run.cascade_id, outcomes, owner=self.owner, waits=self.waits)
        self.in_hand.difference_update(path_to_text(outcome.file.path) for outcome in outcomes)
        return recorded

    def release(self, texts: Sequence[str] | None = None, *, for_s: float | None = None) -> int:
        """Give back what is in hand, all or some, to be claimed again (not within `for_s`)."""
        with connect(self.store.engine, write=True) as connection:
            now = self.store.now(connection)
            later = None if for_s is None else now + timedelta(seconds=for_s)
            released = leases.release(connection, self.owner, texts, later)
            crash_point("release.before_commit")
        self.in_hand.difference_update(list(self.in_hand) if texts is None else texts)
        return released

    def release_everybodys(self) -> int:
        """Give back what any owner holds: only for who has the store alone (SQLite, writer_lock.py)."""
        with connect(self.store.engine, write=True) as connection:
            return leases.release(connection, None)

    def mark_missing(self, roots: Sequence[str], seen: Container[str]) -> int:
        """What is not `seen` (path texts) any more below `roots` is missing; nothing is deleted."""
        return self.store.mark_missing(self.run.run_id, roots, seen)


def retry_now(store: Store, reason_code: ReasonCode | None) -> int:
    """Let what failed (for one reason, or all) be tried again; returns how many files that is."""
    with connect(store.engine, write=True) as connection:
        return leases.retry_now(connection, reason_code)
