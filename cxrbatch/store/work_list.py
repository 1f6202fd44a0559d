"""The work list: filters, key-set pages, and capped counts, each served by an index at a million files.

One row an image: of several files with one content the one that was found first, in the folder that is asked for.
Images of an open blinded round are not there for its readers, so that no list, count or neighbour tells them what the
model said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.store.queries import OTHER_FILE, below, repeats
from cxrbatch.store.review_schema import (
    ReviewAction,
    ReviewStatus,
    reads,
    review_status,
    round_items,
    round_readers,
    rounds,
)
from cxrbatch.store.schema import FileState, files, images, predictions
from cxrbatch.store.sql import AnyRow
from cxrbatch.types import Decision

__all__ = ["COUNT_CAP", "Cursor", "Filters", "Page", "candidates", "count", "hidden_from", "page", "rows_of"]

COUNT_CAP = 10_000  # a count stops here: "10,000 or more"

Sort = Literal["uncertain", "certain", "newest"]
Reviewed = Literal["", "no", "yes", "mine", "not_mine", "agreed", "disputed", "flagged", "adjudicated"]


@dataclass(frozen=True, slots=True)
class Filters:
    """What a work list is filtered by; empty means that it is not."""

    decision: str = ""
    label: str = ""
    label_set: str = ""  # a class that the label set holds
    reason: str = ""  # one of review_reasons
    flag: str = ""  # one of quality_flags
    min_confidence: float | None = None
    max_confidence: float | None = None
    since: datetime | None = None  # processed_at, aware
    until: datetime | None = None  # before it
    folder: str = ""  # absolute
    reader: str = ""  # has a current read by
    reviewed: Reviewed = ""
    disagreement: bool = False  # the final label is not the model's
    sort: Sort = "uncertain"


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a list: the sort key of a row, and its file's id."""

    key: float | datetime
    file_id: int


@dataclass(frozen=True, slots=True)
class Page:
    """Files of a work list, in its order."""

    file_ids: list[int] = field(default_factory=list)
    first: Cursor | None = None
    last: Cursor | None = None
    more_before: bool = False
    more_after: bool = False


def page(
    connection: Connection,
    filters: Filters,
    reader: str,
    size: int,
    *,
    after: Cursor | None = None,
    before: Cursor | None = None,
) -> Page:
    """The `size` rows after a place (or before it, or the first), as `reader` may see them."""
    backwards = before is not None
    found = _ids(connection, filters, reader, size + 1, before if backwards else after, backwards)
    more, found = len(found) > size, found[:size]
    if backwards:
        found.reverse()
    if not found:
        return Page()
    first, last = (Cursor(row[0], row[1]) for row in (found[0], found[-1]))
    earlier = more if backwards else after is not None
    return Page([row[1] for row in found], first, last, earlier, True if backwards else more)


def count(connection: Connection, filters: Filters, reader: str, cap: int = COUNT_CAP) -> int:
    """How many rows there are, up to `cap`."""
    total = 0
    for query in _queries(filters, reader, None, False):
        limited = query.order_by(None).limit(cap - total).subquery()
        total += int(connection.execute(select(sa.func.count()).select_from(limited)).scalar_one())
        if total >= cap:
            break
    return total


def candidates(connection: Connection, filters: Filters) -> list[tuple[int, str]]:
    """(image id, the model's label) of all rows, by image id: what a round is chosen from."""
    ids: set[tuple[int, str]] = set()
    for query in _queries(filters, "", None, False):
        chosen = query.order_by(None).with_only_columns(files.c.image_id, files.c.label)
        ids |= {(row[0], row[1]) for row in connection.execute(chosen)}
    return sorted(ids)


def rows_of(connection: Connection, file_ids: Sequence[int]) -> list[AnyRow]:
    """What a list shows of these files, in their order."""
    query = (
        select(
            files.c.id,
            files.c.image_id,
            files.c.path,
            files.c.label,
            files.c.confidence,
            files.c.decision,
            files.c.processed_at,
            files.c.cascade_id,
            images.c.study_date,
            images.c.view_position,
            images.c.quality_flags,
            predictions.c.review_reasons,
            predictions.c.label_set,
            review_status.c.status,
            review_status.c.label.label("final_label"),
            review_status.c.decided_by,
        )
        .select_from(files)
        .join(images, images.c.id == files.c.image_id)
        .outerjoin(predictions, predictions.c.id == files.c.prediction_id)
        .outerjoin(review_status, review_status.c.image_id == files.c.image_id)
        .where(files.c.id.in_(list(file_ids)))
    )
    by_id = {row.id: row for row in connection.execute(query)}
    return [by_id[file_id] for file_id in file_ids if file_id in by_id]


def hidden_from(reader: str, image_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """Whether an image is in an open blinded round that `reader` reads in."""
    return (
        select(sa.literal(1))
        .select_from(round_items)
        .join(rounds, rounds.c.id == round_items.c.round_id)
        .join(round_readers, round_readers.c.round_id == rounds.c.id)
        .where(
            round_items.c.image_id == image_id,
            rounds.c.blinded,
            rounds.c.closed_at.is_(None),
            round_readers.c.reader == reader,
        )
        .exists()
    )


def _ids(
    connection: Connection, filters: Filters, reader: str, size: int, place: Cursor | None, backwards: bool
) -> list[AnyRow]:
    found: list[AnyRow] = []
    for query in _queries(filters, reader, place, backwards):
        found += connection.execute(query.limit(size)).all()
    found.sort(key=lambda row: (row[0], row[1]), reverse=(filters.sort != "uncertain") != backwards)
    return found[:size]


def _queries(filters: Filters, reader: str, place: Cursor | None, backwards: bool) -> list[sa.Select[*tuple[Any, ...]]]:
    """(sort key, file id) of the rows: a query for each walk along an index, to be merged."""
    if filters.disagreement or filters.reader or filters.reviewed not in ("", "no", "not_mine"):
        # Few images have been read: begin with those.
        return [_query(filters, reader, place, backwards, read=True)]
    if filters.sort != "newest" and not filters.decision and not filters.label:
        # No index goes by confidence alone: one walk for each decision.
        walks = [replace(filters, decision=str(decision)) for decision in Decision]
        return [_query(each, reader, place, backwards, read=False) for each in walks]
    return [_query(filters, reader, place, backwards, read=False)]


def _query(
    filters: Filters, reader: str, place: Cursor | None, backwards: bool, *, read: bool
) -> sa.Select[*tuple[Any, ...]]:
    key = files.c.processed_at if filters.sort == "newest" else files.c.confidence
    descending = (filters.sort != "uncertain") != backwards
    conditions = [*_of_files(filters), *_of_reads(filters, reader), sa.not_(hidden_from(reader, files.c.image_id))]
    if place is not None:
        there = sa.tuple_(sa.literal(place.key, key.type), sa.literal(place.file_id))
        here = sa.tuple_(key, files.c.id)
        conditions.append(here < there if descending else here > there)
    direction = sa.desc if descending else sa.asc
    query = select(key, files.c.id)
    if read:
        # The + keeps SQLite from beginning with the files and looking each of them up here.
        read_images = files.join(review_status, files.c.image_id == sa.literal_column("+review_status.image_id"))
        query = query.select_from(read_images)
    else:
        query = query.select_from(files)
    return query.where(*conditions).order_by(direction(key), direction(files.c.id))


def _of_files(filters: Filters) -> list[sa.ColumnElement[bool]]:
    # One row an image, but at a file in that folder.
    in_folder = (below(OTHER_FILE.c.path, [filters.folder]),) if filters.folder else ()
    found: list[sa.ColumnElement[bool]] = [
        # Nearly all files are done: the || keeps SQLite from an index that goes by the state.
        files.c.state.concat("") == str(FileState.DONE),
        sa.not_(repeats(*in_folder)),
    ]
    if filters.decision:
        found.append(files.c.decision == filters.decision)
    if filters.label:
        found.append(files.c.label == filters.label)
    if filters.min_confidence is not None:
        found.append(files.c.confidence >= filters.min_confidence)
    if filters.max_confidence is not None:
        found.append(files.c.confidence <= filters.max_confidence)
    if filters.since is not None:
        found.append(files.c.processed_at >= filters.since)
    if filters.until is not None:
        found.append(files.c.processed_at < filters.until)
    if filters.folder:
        found.append(below(files.c.path, [filters.folder]))
    said = select(predictions.c.id).where(predictions.c.id == files.c.prediction_id)
    if filters.reason:
        found.append(said.where(_has(predictions.c.review_reasons, filters.reason)).exists())
    if filters.label_set:
        found.append(said.where(_has(predictions.c.label_set, filters.label_set, "|")).exists())
    if filters.flag:
        flagged = select(images.c.id).where(images.c.id == files.c.image_id, _has(images.c.quality_flags, filters.flag))
        found.append(flagged.exists())
    return found


def _of_reads(filters: Filters, reader: str) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    status = select(review_status.c.image_id).where(review_status.c.image_id == files.c.image_id).correlate(files)
    mine = select(reads.c.image_id).where(
        reads.c.image_id == files.c.image_id, reads.c.reader == reader, reads.c.action != str(ReviewAction.SKIP)
    )
    match filters.reviewed:
        case "no":
            found.append(~status.exists())
        case "yes":
            found.append(status.exists())
        case "mine":
            found.append(mine.exists())
        case "not_mine":
            found.append(~mine.exists())
        case "agreed" | "disputed" | "flagged" | "adjudicated":
            found.append(status.where(review_status.c.status == str(ReviewStatus(filters.reviewed))).exists())
    if filters.reader:
        by = select(reads.c.image_id).where(reads.c.image_id == files.c.image_id, reads.c.reader == filters.reader)
        found.append(by.exists())
    if filters.disagreement:
        found.append(status.where(review_status.c.label != files.c.label).exists())
    return found


def _has(column: sa.ColumnElement[str], word: str, mark: str = ",") -> sa.ColumnElement[bool]:
    """`word` is one of the words of a column, which `mark` separates."""
    return (sa.literal(mark) + column + mark).contains(f"{mark}{word}{mark}", autoescape=True)
