"""What `cxrbatch drift` asks of the store: outcomes of a span of days, and which days were accepted as normal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from cxrbatch.store.connection import connect
from cxrbatch.store.queries import OTHER_FILE, repeats
from cxrbatch.store.review_schema import reads, round_items, rounds
from cxrbatch.store.schema import FileState, audit, files, images, predictions
from cxrbatch.store.store import Store

__all__ = ["Span", "accept_days", "accepted_days", "read_outcomes", "read_overrides"]

_EVENT = "drift_accepted"


@dataclass(frozen=True, slots=True)
class Span:
    """From `since` on, before `until`; both aware."""

    since: datetime
    until: datetime


def read_outcomes(store: Store, cascade_id: int, span: Span, limit: int) -> Sequence[Any]:
    """Rows (processed_at, label, confidence, ood_score, grey_mean, gate_probability) of files with a final outcome.

    Of what this cascade scored in `span`, and of files that its runs rejected (label None). Copies of a content count
    once. The newest `limit` rows. Raises StoreDown.
    """
    # The || keeps SQLite from the index that goes by the state: a span of days is a small part of the store.
    state = files.c.state.concat("")
    rejected = sa.and_(state == str(FileState.REJECTED), files.c.cascade_id == cascade_id)
    scored = sa.and_(
        state == str(FileState.DONE),
        files.c.cascade_id == cascade_id,
        # Not the mark alone: files that were moved to an archive are all marked.
        sa.not_(repeats(OTHER_FILE.c.cascade_id == cascade_id)),
    )
    query = (
        select(
            files.c.processed_at,
            files.c.label,
            files.c.confidence,
            predictions.c.ood_score,
            images.c.grey_mean,
            predictions.c.gate_probability,
        )
        .outerjoin_from(files, predictions, files.c.prediction_id == predictions.c.id)
        .outerjoin(images, files.c.image_id == images.c.id)
        .where(files.c.processed_at >= span.since, files.c.processed_at < span.until, sa.or_(rejected, scored))
        .order_by(files.c.processed_at.desc())
        .limit(limit)
    )
    with connect(store.engine) as connection:
        return connection.execute(query).all()


def accept_days(store: Store, span: Span, images: int) -> None:
    """Write down that these days are normal: later ones are compared with them. Raises StoreDown."""
    row = {
        "event": _EVENT,
        "old": span.since.isoformat(),
        "new": span.until.isoformat(),
        "detail": json.dumps({"images": images}),
    }
    with connect(store.engine, write=True) as connection:
        connection.execute(sa.insert(audit), row | {"at": store.now(connection)})


def accepted_days(store: Store) -> Span | None:
    """The span that was accepted last; None where there is none. Raises StoreDown."""
    query = select(audit.c.old, audit.c.new).where(audit.c.event == _EVENT).order_by(audit.c.id.desc()).limit(1)
    with connect(store.engine) as connection:
        row = connection.execute(query).first()
    return None if row is None else Span(datetime.fromisoformat(row.old), datetime.fromisoformat(row.new))


def read_overrides(store: Store, cascade_id: int, span: Span) -> tuple[int, int]:
    """Current blinded reads with a label in `span`, and how many of them differ from the model's label.

    Only of rounds drawn at random from all images: what was filtered or stratified is another mix than what arrives.
    Raises StoreDown.
    """
    query = (
        select(rounds.c.filter_json, reads.c.label, round_items.c.model_label)
        .join_from(reads, rounds, reads.c.round_id == rounds.c.id)
        .join(
            round_items,
            sa.and_(
                round_items.c.round_id == reads.c.round_id,
                round_items.c.image_id == reads.c.image_id,
                round_items.c.repeat == 0,
            ),
        )
        .where(
            reads.c.at >= span.since,
            reads.c.at < span.until,
            reads.c.repeat == 0,
            reads.c.blinded,
            reads.c.label.is_not(None),
            round_items.c.model_cascade_id == cascade_id,
        )
    )
    with connect(store.engine) as connection:
        rows = connection.execute(query).all()
    drawn = [row for row in rows if _at_random(json.loads(row.filter_json))]
    return len(drawn), sum(row.label != row.model_label for row in drawn)


def _at_random(chosen: dict[str, Any]) -> bool:
    return not chosen.get("query") and not chosen.get("stratified")
