"""The rows behind the reports: every current read with a label, beside the model's answer and the final label."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from cxrbatch.store.review_schema import NO_ROUND, reads, review_status, reviews, round_items

__all__ = ["ReadRow", "read_rows"]


@dataclass(frozen=True, slots=True)
class ReadRow:
    """One current read."""

    image_id: int
    reader: str
    repeat: int
    label: str
    blinded: bool
    model_label: str | None  # that was shown, or that the round keeps where the reader was blinded
    active_ms: int | None
    final_label: str | None


def read_rows(connection: Connection, round_id: int = NO_ROUND) -> list[ReadRow]:
    """The labelled reads of a round, or those outside rounds; adjudications are no reads."""
    query = (
        select(
            reads.c.image_id,
            reads.c.reader,
            reads.c.repeat,
            reads.c.label,
            reads.c.blinded,
            reviews.c.shown_label,
            round_items.c.model_label,
            reviews.c.active_ms,
            review_status.c.label.label("final_label"),
        )
        .select_from(reads)
        .join(reviews, reviews.c.id == reads.c.review_id)
        .outerjoin(
            round_items,
            (round_items.c.round_id == reads.c.round_id)
            & (round_items.c.image_id == reads.c.image_id)
            & (round_items.c.repeat == reads.c.repeat),
        )
        .outerjoin(review_status, review_status.c.image_id == reads.c.image_id)
        .where(reads.c.round_id == round_id, reads.c.label.is_not(None), reviews.c.adjudication.is_(False))
        .order_by(reads.c.image_id, reads.c.reader, reads.c.repeat)
    )
    return [
        ReadRow(
            row.image_id,
            row.reader,
            row.repeat,
            row.label,
            bool(row.blinded),
            row.model_label if row.blinded else row.shown_label,
            row.active_ms,
            row.final_label,
        )
        for row in connection.execute(query)
    ]
