"""What readers say: one act, one row of `reviews`, and the current state that follows from it, in one transaction.

The same act twice (a lost answer, a second tab, the back key) is one row: its id is the client's. Two readers who act
on one image at once take turns, and each finds the other's read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.errors import Fatal
from cxrbatch.failpoints import failpoint
from cxrbatch.store.connection import connect
from cxrbatch.store.paths import plain
from cxrbatch.store.review_schema import (
    ADJUDICATION,
    NO_ROUND,
    ReviewAction,
    ReviewStatus,
    reads,
    review_status,
    reviews,
)
from cxrbatch.store.schema import images
from cxrbatch.store.sql import AnyRow, insert
from cxrbatch.store.store import Store

__all__ = ["SPECIAL_LABELS", "Act", "Recorded", "current_reads", "history", "record_act", "refresh_status", "status_of"]

#: Labels that a reader may give beyond those of the bundle.
SPECIAL_LABELS = ("OTHER_ABNORMAL", "NOT_CHEST", "UNREADABLE")

_LABELLED = (str(ReviewAction.ACCEPT), str(ReviewAction.OVERRIDE))


@dataclass(frozen=True, slots=True)
class Act:
    """What a reader did with an image, and what was shown at that moment."""

    act_id: str  # made by the client, up to 64 characters
    image_id: int
    reviewer: str
    action: ReviewAction
    label: str | None = None  # of an override; an accept takes the shown one
    comment: str = ""
    shown_label: str | None = None
    shown_confidence: float | None = None
    shown_cascade_id: int | None = None
    blinded: bool = False
    adjudication: bool = False
    round_id: int = NO_ROUND
    repeat: int = 0
    opened_at: datetime | None = None
    active_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of an act."""

    review_id: int
    again: bool  # the act was there before: nothing was written
    status: str | None  # of the image, now; None: unreviewed
    label: str | None  # the final one
    others: tuple[str, ...]  # readers with a current read of the image, the acting one left out


def record_act(store: Store, act: Act) -> Recorded:
    """Write an act and bring `reads` and `review_status` up to date.

    Raises Fatal for an act that says nothing (an accept where no label was shown, an override without one) and for an
    image that the store does not know.
    """
    if act.blinded:
        act = _without_what_was_hidden(act)
    label = _label(act)
    with connect(store.engine, write=True) as connection:
        now = store.now(connection)
        # Readers of one image take turns, so that each sees the other's read when the status is made.
        known = select(images.c.id).where(images.c.id == act.image_id).with_for_update(key_share=True)
        if connection.execute(known).first() is None:
            raise Fatal("The store knows no such image; it may have been pruned.")
        written = insert(connection.dialect.name, reviews).values(_row(act, label, now))
        written = written.on_conflict_do_nothing(index_elements=["act_id"]).returning(reviews.c.id)
        review_id = connection.execute(written).scalar_one_or_none()
        again = review_id is None
        if review_id is None:
            review_id = connection.execute(select(reviews.c.id).where(reviews.c.act_id == act.act_id)).scalar_one()
        else:
            failpoint("review.written")
            _set_read(connection, act, label, review_id, now)
            refresh_status(connection, act.image_id)
        status = status_of(connection, act.image_id)
        current = select(reads.c.reader).where(reads.c.image_id == act.image_id, reads.c.action.in_(_LABELLED))
        others = {name for name in connection.execute(current).scalars() if name != act.reviewer}
        failpoint("review.before_commit")
    failpoint("review.committed")
    return Recorded(
        review_id,
        again,
        status.status if status else None,
        status.label if status else None,
        tuple(sorted(others)),
    )


def history(connection: Connection, image_id: int) -> Sequence[AnyRow]:
    """Every act on an image, oldest first."""
    return connection.execute(select(reviews).where(reviews.c.image_id == image_id).order_by(reviews.c.id)).all()


def current_reads(connection: Connection, image_id: int) -> Sequence[AnyRow]:
    """The current read of each reader and round, oldest first."""
    return connection.execute(select(reads).where(reads.c.image_id == image_id).order_by(reads.c.review_id)).all()


def status_of(connection: Connection, image_id: int) -> AnyRow | None:
    """The image's row of `review_status`; None: unreviewed."""
    return connection.execute(select(review_status).where(review_status.c.image_id == image_id)).first()


def _without_what_was_hidden(act: Act) -> Act:
    return replace(act, shown_label=None, shown_confidence=None, shown_cascade_id=None)


def _label(act: Act) -> str | None:
    if act.action == ReviewAction.ACCEPT:
        if act.shown_label is None:
            raise Fatal("There is no label to accept: none was shown.")
        return act.shown_label
    if act.action == ReviewAction.OVERRIDE:
        if not act.label:
            raise Fatal("An override needs a label.")
        return act.label
    return None


def _row(act: Act, label: str | None, now: datetime) -> dict[str, Any]:
    return {
        "image_id": act.image_id,
        "reviewer": plain(act.reviewer, 200),
        "action": str(act.action),
        "label": label,
        "comment": plain(act.comment, 4000),
        "at": now,
        "shown_label": act.shown_label,
        "shown_confidence": act.shown_confidence,
        "shown_cascade_id": act.shown_cascade_id,
        "blinded": act.blinded,
        "adjudication": act.adjudication,
        "round_id": act.round_id or None,
        "repeat": act.repeat,
        "opened_at": act.opened_at,
        "active_ms": act.active_ms,
        "act_id": act.act_id,
    }


def _set_read(connection: Connection, act: Act, label: str | None, review_id: int, now: datetime) -> None:
    # An adjudication stands outside its round and beside the reads of the same person: nothing but its own withdrawal
    # or another adjudication replaces it.
    round_id = ADJUDICATION if act.adjudication else act.round_id
    key = {"image_id": act.image_id, "reader": act.reviewer, "round_id": round_id, "repeat": act.repeat}
    if act.action == ReviewAction.WITHDRAW:
        connection.execute(sa.delete(reads).where(*(reads.c[name] == value for name, value in key.items())))
        return
    said = {"review_id": review_id, "action": str(act.action), "label": label, "blinded": act.blinded, "at": now}
    written = insert(connection.dialect.name, reads).values(key | said)
    if act.action == ReviewAction.SKIP:  # says nothing, so it takes nothing back
        connection.execute(written.on_conflict_do_nothing())
    else:
        connection.execute(written.on_conflict_do_update(index_elements=list(key), set_=said))


def refresh_status(connection: Connection, image_id: int) -> None:
    """Make the row of `review_status` anew from the current reads of an image.

    Of each reader the newest read that is no skip counts. An adjudication that still stands decides; else a flag asks
    for another reader; else different labels are a dispute.
    """
    current = connection.execute(
        select(reads.c.reader, reads.c.action, reads.c.label, reads.c.at, reads.c.review_id, reviews.c.adjudication)
        .join(reviews, reviews.c.id == reads.c.review_id)
        .where(reads.c.image_id == image_id, reads.c.action != str(ReviewAction.SKIP), reads.c.repeat == 0)
        .order_by(reads.c.review_id)
    ).all()
    connection.execute(sa.delete(review_status).where(review_status.c.image_id == image_id))
    if not current:
        return
    decided = [row for row in current if row.adjudication and row.label is not None]
    newest = list({row.reader: row for row in current}.values())
    if decided:
        row = decided[-1]
        status, label, by, at = ReviewStatus.ADJUDICATED, row.label, row.reader, row.at
    else:
        labels = {row.label for row in newest if row.label is not None}
        flagged = any(row.action == str(ReviewAction.FLAG) for row in newest)
        status = ReviewStatus.FLAGGED if flagged else ReviewStatus.DISPUTED if len(labels) > 1 else ReviewStatus.AGREED
        label = labels.pop() if status == ReviewStatus.AGREED else None
        by, at = _names(row.reader for row in newest), max(row.at for row in newest)
    made = {"image_id": image_id, "status": str(status), "label": label, "decided_by": by, "decided_at": at}
    connection.execute(sa.insert(review_status), made)


def _names(readers: Iterable[str]) -> str:
    return ", ".join(sorted(readers))
