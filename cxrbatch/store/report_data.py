"""The rows behind the reports: every current read with a label, beside the model's answer and the adjudication."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, select

from cxrbatch.store.review_schema import NO_ROUND, ReviewStatus, reads, review_status, reviews, round_items

__all__ = ["ReadRow", "blinded_labels", "read_rows", "true_labels"]


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
    adjudicated_label: str | None  # of the image


def read_rows(connection: Connection, round_id: int | None = NO_ROUND) -> list[ReadRow]:
    """The labelled reads of a round, those outside rounds, or all (None); adjudications are no reads."""
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
            review_status.c.label.label("adjudicated_label"),
        )
        .select_from(reads)
        .join(reviews, reviews.c.id == reads.c.review_id)
        .outerjoin(
            round_items,
            (round_items.c.round_id == reads.c.round_id)
            & (round_items.c.image_id == reads.c.image_id)
            & (round_items.c.repeat == reads.c.repeat),
        )
        .outerjoin(
            review_status,
            (review_status.c.image_id == reads.c.image_id) & (review_status.c.status == str(ReviewStatus.ADJUDICATED)),
        )
        .where(reads.c.label.is_not(None), reviews.c.adjudication.is_(False))
        .order_by(reads.c.image_id, reads.c.reader, reads.c.repeat)
    )
    if round_id is not None:
        query = query.where(reads.c.round_id == round_id)
    return [
        ReadRow(
            row.image_id,
            row.reader,
            row.repeat,
            row.label,
            bool(row.blinded),
            row.model_label if row.blinded else row.shown_label,
            row.active_ms,
            row.adjudicated_label,
        )
        for row in connection.execute(query)
    ]


def true_labels(rows: Iterable[ReadRow]) -> dict[int, str]:
    """By image what these reads agree on, or what an adjudication says; images in dispute are left out.

    The final label of the store would not do: it follows later reads, where a reader may have seen the model's answer.
    """
    said: defaultdict[int, set[str]] = defaultdict(set)
    adjudicated: dict[int, str] = {}
    for row in rows:
        said[row.image_id].add(row.label)
        if row.adjudicated_label is not None:
            adjudicated[row.image_id] = row.adjudicated_label
    return {image_id: next(iter(labels)) for image_id, labels in said.items() if len(labels) == 1} | adjudicated


def blinded_labels(connection: Connection) -> dict[int, str]:
    """The true label of every image with a blinded read; repeats are left out."""
    return true_labels(row for row in read_rows(connection, None) if row.blinded and row.repeat == 0)
