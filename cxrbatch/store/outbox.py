"""The outbox: what is to be sent where, who is at it, and what became of it.

    enqueue   what a selection holds and the outbox does not -> waiting; so does what was superseded and is said again
    claim     waiting and due                                -> still waiting, but in one sender's hand for lease_s
    record    an answer                                      -> sent, refused, or waiting with a later next_attempt_at
    retry     a person asks for another try                  -> waiting
    drop      a person gives up on it                        -> dropped

A sender that dies leaves its claim to run out; another one then sends the same object under the same UID, which a PACS
stores once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select, update

from cxrbatch.failpoints import failpoint
from cxrbatch.store.connection import connect
from cxrbatch.store.leases import Backoff
from cxrbatch.store.outbox_schema import SUPERSEDED, OutboxState, outbox
from cxrbatch.store.paths import plain
from cxrbatch.store.reported import Reported, Selection, reported_image_ids, reported_of
from cxrbatch.store.schema import images
from cxrbatch.store.sql import AnyRow, chunks, execute_for, in_keys, insert
from cxrbatch.store.store import Store

__all__ = ["Answer", "Outbox", "OutboxItem", "Progress", "drop", "listed", "of_image", "retry"]

_PAGE = 500  # images of a transaction that fills the outbox


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """An object in a sender's hand."""

    id: int
    kind: str
    attempts: int  # before this one
    reported: Reported | None  # None: its prediction is gone or another one, or the readers say something else by now


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one attempt."""

    state: OutboxState  # SENT, REFUSED, DROPPED; WAITING: it may pass
    status: str  # see outbox.last_status
    sop_instance_uid: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How many objects of a destination stand where."""

    waiting: int = 0
    in_hand: int = 0  # of those that wait: held by a sender, this one or another
    sent: int = 0
    refused: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Outbox:
    """The outbox as a sender to one destination sees it. Each call is one transaction; methods raise StoreDown."""

    store: Store
    destination: str
    lease_s: float
    backoff: Backoff

    def enqueue(self, selection: Selection, kinds: Sequence[str]) -> int:
        """Let what the selection holds wait, unless it is there already; returns how many objects that adds.

        What was superseded waits again if it is said again.
        """
        with connect(self.store.engine) as connection:
            wanted = list(reported_image_ids(connection, selection))
        return sum(self._enqueue(page, kinds) for page in chunks(wanted, _PAGE))

    def _enqueue(self, image_ids: list[int], kinds: Sequence[str]) -> int:
        with connect(self.store.engine, write=True) as connection:
            now = self.store.now(connection)
            current = reported_of(connection, image_ids)
            rows = [
                {
                    "destination": self.destination,
                    "image_id": reported.image_id,
                    "cascade_id": reported.cascade_id,
                    "kind": kind,
                    "revision": plain(reported.revision, 200),
                    "state": str(OutboxState.WAITING),
                    "created_at": now,
                }
                for reported in current.values()
                for kind in kinds
            ]
            before = self._count(connection)
            if rows:
                connection.execute(insert(connection.dialect.name, outbox).on_conflict_do_nothing(), rows)
            added = self._count(connection) - before
            added += self._revive(connection, current, kinds)
            failpoint("outbox.enqueue.before_commit")
        failpoint("outbox.enqueue.committed")
        return added

    def _revive(self, connection: Connection, current: dict[int, Reported], kinds: Sequence[str]) -> int:
        """Let what was superseded, and is said again by now, wait as if it were new; returns how many objects."""
        superseded = (
            outbox.c.destination == self.destination,
            outbox.c.state == str(OutboxState.DROPPED),
            outbox.c.last_status == SUPERSEDED,
        )
        query = select(outbox).where(*superseded, in_keys(connection.dialect.name, outbox.c.image_id))
        rows = execute_for(connection, query, current).all()
        ids = [row.id for row in rows if row.kind in kinds and _still(row, current[row.image_id])]
        if not ids:
            return 0
        again = {"state": str(OutboxState.WAITING), "attempts": 0, "last_status": ""}
        again |= dict.fromkeys(("lease_until", "next_attempt_at"))
        return connection.execute(update(outbox).where(*superseded, outbox.c.id.in_(ids)).values(again)).rowcount

    def _count(self, connection: Connection) -> int:
        query = select(sa.func.count()).where(outbox.c.destination == self.destination)
        return int(connection.execute(query).scalar_one())

    def now(self) -> datetime:
        """The time that the store's rows go by."""
        with connect(self.store.engine) as connection:
            return self.store.now(connection)

    def make_due(self) -> None:
        """Whatever waits for its next try is due now: a person asks for it."""
        with connect(self.store.engine, write=True) as connection:
            waiting = (outbox.c.destination == self.destination, outbox.c.state == str(OutboxState.WAITING))
            connection.execute(update(outbox).where(*waiting).values(next_attempt_at=None))

    def claim(self, most: int) -> list[OutboxItem]:
        """Take up to `most` objects that are due in hand for lease_s: those tried least, of them the oldest."""
        with connect(self.store.engine, write=True) as connection:
            now = self.store.now(connection)
            chosen = (
                select(outbox.c.id)
                .where(
                    outbox.c.destination == self.destination,
                    outbox.c.state == str(OutboxState.WAITING),
                    sa.or_(outbox.c.lease_until.is_(None), outbox.c.lease_until < now),
                    sa.or_(outbox.c.next_attempt_at.is_(None), outbox.c.next_attempt_at <= now),
                )
                .order_by(outbox.c.attempts, outbox.c.id)
                .limit(most)
            )
            ids = list(connection.execute(chosen.with_for_update(skip_locked=True)).scalars())
            rows: Sequence[AnyRow] = ()
            if ids:
                later = {"lease_until": now + timedelta(seconds=self.lease_s)}
                connection.execute(update(outbox).where(outbox.c.id.in_(ids)).values(later))
                rows = connection.execute(
                    select(outbox).where(outbox.c.id.in_(ids)).order_by(outbox.c.attempts, outbox.c.id)
                ).all()
            reported = reported_of(connection, sorted({row.image_id for row in rows})) if rows else {}
            failpoint("outbox.claim.before_commit")
        failpoint("outbox.claim.committed")
        return [OutboxItem(row.id, row.kind, row.attempts, _still(row, reported.get(row.image_id))) for row in rows]

    def record(self, item: OutboxItem, answer: Answer) -> None:
        """What became of an object in hand. One that a person dropped meanwhile stays dropped, unless it was sent."""
        with connect(self.store.engine, write=True) as connection:
            now = self.store.now(connection)
            attempts = item.attempts + 1
            values: dict[str, Any] = {
                "state": str(answer.state),
                "last_status": plain(answer.status, 64),
                "attempts": attempts,
                "lease_until": None,
                "next_attempt_at": None,
                "sent_at": now if answer.state == OutboxState.SENT else None,
            }
            if answer.sop_instance_uid:
                values["sop_instance_uid"] = answer.sop_instance_uid
            if answer.state == OutboxState.WAITING:
                values["next_attempt_at"] = now + self.backoff.before(attempts)
            statement = update(outbox).where(outbox.c.id == item.id).values(values)
            if answer.state != OutboxState.SENT:
                statement = statement.where(outbox.c.state == str(OutboxState.WAITING))
            connection.execute(statement)
            failpoint("outbox.record.before_commit")
        failpoint("outbox.record.committed")

    def release(self, items: Sequence[OutboxItem]) -> None:
        """Give back what was not tried."""
        with connect(self.store.engine, write=True) as connection:
            held = update(outbox).where(
                outbox.c.id.in_([item.id for item in items]), outbox.c.state == str(OutboxState.WAITING)
            )
            connection.execute(held.values(lease_until=None))

    def progress(self) -> Progress:
        """How many stand where."""
        with connect(self.store.engine) as connection:
            now = self.store.now(connection)
            mine = outbox.c.destination == self.destination
            counted = select(outbox.c.state, sa.func.count()).where(mine).group_by(outbox.c.state)
            states = {str(state): int(number) for state, number in connection.execute(counted)}
            held = select(sa.func.count()).where(
                mine, outbox.c.state == str(OutboxState.WAITING), outbox.c.lease_until >= now
            )
            return Progress(**states, in_hand=int(connection.execute(held).scalar_one()))


def _still(row: AnyRow, reported: Reported | None) -> Reported | None:
    if reported is None or reported.cascade_id != row.cascade_id or plain(reported.revision, 200) != row.revision:
        return None
    return reported


def listed(store: Store, destination: str | None, state: OutboxState | None, limit: int) -> list[AnyRow]:
    """Rows of the outbox with the sha256 of their image, the newest first."""
    conditions = _which(destination, state)
    query = (
        select(outbox, images.c.sha256)
        .join(images, images.c.id == outbox.c.image_id)
        .where(*conditions)
        .order_by(outbox.c.id.desc())
        .limit(limit)
    )
    with connect(store.engine) as connection:
        return list(connection.execute(query))


def of_image(store: Store, image_id: int) -> list[AnyRow]:
    """What was or is to be sent of an image, oldest first."""
    with connect(store.engine) as connection:
        return list(connection.execute(select(outbox).where(outbox.c.image_id == image_id).order_by(outbox.c.id)))


def retry(store: Store, destination: str | None, ids: Sequence[int] = ()) -> int:
    """Let objects wait for another try, from now on; returns how many.

    Those with these ids, whatever became of them (a PACS that lost an object gets it again); without ids, those that
    were refused or wait for a later try.
    """
    states = list(OutboxState) if ids else [OutboxState.WAITING, OutboxState.REFUSED]
    values = {"state": str(OutboxState.WAITING), "attempts": 0} | dict.fromkeys(("next_attempt_at", "sent_at"))
    return _change(store, destination, ids, states, values)


def drop(store: Store, destination: str | None, ids: Sequence[int] = ()) -> int:
    """Do not send these objects (all that wait or were refused, without `ids`); returns how many."""
    # A person's word is for good: it must not look like what waits again once it is said again.
    status = sa.case((outbox.c.last_status == SUPERSEDED, ""), else_=outbox.c.last_status)
    values = {"state": str(OutboxState.DROPPED), "next_attempt_at": None, "last_status": status}
    return _change(store, destination, ids, [OutboxState.WAITING, OutboxState.REFUSED], values)


def _change(
    store: Store, destination: str | None, ids: Sequence[int], states: Sequence[OutboxState], values: dict[str, Any]
) -> int:
    statement = update(outbox).where(*_which(destination), outbox.c.state.in_([str(s) for s in states]))
    with connect(store.engine, write=True) as connection:
        if not ids:
            return connection.execute(statement.values(values)).rowcount
        chosen = statement.where(in_keys(connection.dialect.name, outbox.c.id))
        return execute_for(connection, chosen.values(values), ids).rowcount


def _which(destination: str | None, state: OutboxState | None = None) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if destination is not None:
        conditions.append(outbox.c.destination == destination)
    if state is not None:
        conditions.append(outbox.c.state == str(state))
    return conditions or [sa.true()]
