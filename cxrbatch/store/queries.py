"""Reading the store without SQL: rows of the view `results`, and everything that is known of one film."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, RowMapping, select

from cxrbatch.nouns import Decision
from cxrbatch.store.engine import connect
from cxrbatch.store.keys import AnyRow
from cxrbatch.store.paths import TextRange, path_to_text, under
from cxrbatch.store.schema import audit, files, images, models, predictions, reviews, runs, scores
from cxrbatch.store.views import results

__all__ = ["Film", "Told", "below", "everything_about", "in_range", "stream_results"]

_PAGE = 1000  # rows fetched at a time: what a stream holds in memory
#: What rows are sorted by, and whether from the top; of equals it is left open which come first.
_ORDERS = {"surest": ("confidence", True), "least sure": ("confidence", False), "newest": ("processed_at", True)}
_SHA256 = re.compile(r"[0-9a-f]{6,64}")


@dataclass(frozen=True, slots=True)
class Told:
    """What one cascade said of a content, what made it, and what readers made of it (oldest first)."""

    prediction: RowMapping  # columns of predictions
    scores: list[RowMapping]  # of scores
    cascade: RowMapping  # of models
    run: RowMapping  # of runs
    reviews: list[RowMapping]  # of reviews


@dataclass(frozen=True, slots=True)
class Film:
    """All that is known of one path."""

    result: RowMapping  # its row of the view
    file: RowMapping  # columns of files
    image: RowMapping | None  # of images
    told: list[Told]  # newest first; by every cascade that has seen this content
    same_content: list[str]  # other paths with the same bytes
    history: list[RowMapping]  # of audit, oldest first


def stream_results(
    engine: Engine,
    *,
    label: str | None = None,
    min_confidence: float | None = None,
    decision: Decision | None = None,
    state: str | None = None,
    reason_code: str | None = None,
    since: datetime | None = None,
    roots: Sequence[str] = (),
    limit: int | None = None,
    order: Literal["path", "surest", "least sure", "newest"] = "path",
) -> Iterator[AnyRow]:
    """Rows of the view (named tuples in the order of RESULT_COLUMNS), root by root and by path; all filters hold.

    `min_confidence` is of `label`, 0..1; `since` is aware and compared with processed_at; `roots` are folders
    or files. The other orders are for the first `limit` rows of a filter, without roots: they are found at once
    where sorting by path has to find all of them. One consistent snapshot (on Postgres, one a root), fetched a
    thousand rows at a time.
    """
    conditions: list[sa.ColumnElement[bool]] = []
    indexed: list[sa.ColumnElement[bool]] = []
    for column, value in (
        (files.c.label, label),
        (files.c.decision, None if decision is None else str(decision)),
        (files.c.state, state),
        (files.c.reason_code, reason_code),
    ):
        if value is not None:
            indexed.append(column == value)
    if since is not None:
        indexed.append(files.c.processed_at >= since)
    sorted_by: sa.ColumnElement[Any] = results.c.path
    if indexed:
        # The paths first, by the filter's index: whole rows are then read in their order, and never sorted.
        indexed += [] if min_confidence is None else [files.c.confidence >= min_confidence]
        chosen = select(files.c.path).where(*indexed)
        if order != "path":
            key, from_the_top = _ORDERS[order]
            direction = sa.desc if from_the_top else sa.asc
            sorted_by = direction(results.c[key])
            chosen = chosen.order_by(direction(files.c[key])).limit(limit)
        conditions.append(results.c.path.in_(chosen))
    elif min_confidence is not None:  # no index for it alone, and many have it: the first rows come soon
        conditions.append(results.c.confidence >= min_confidence)
    query = select(results).where(*conditions).order_by(sorted_by, results.c.path).limit(limit)
    # A query for each piece of each root: SQLite would sort the whole rows of an OR, a million of them if need be.
    pieces = [piece for root in sorted(roots) for piece in _pieces(results.c.path, root)]
    with connect(engine) as connection:
        streaming = connection.execution_options(yield_per=_PAGE)
        queries = [query.where(piece) for piece in pieces] if roots else [query]
        yield from islice((row for each in queries for row in streaming.execute(each)), limit)


def everything_about(engine: Engine, path_or_sha256: str) -> list[Film]:
    """Every path that this names: a path (as os.fsdecode gives it), or 6 or more first digits of a sha256.

    An empty list where nothing is known of it. Raises ValueError where the digits begin more than one.
    """
    with connect(engine) as connection:
        exact = select(files).where(files.c.path == path_to_text(path_or_sha256))
        rows = connection.execute(exact).mappings().all()
        digits = path_or_sha256.lower()
        if not rows and _SHA256.fullmatch(digits):
            rows = _of_content(connection, digits)
        return [_film(connection, row) for row in rows]


def below(column: sa.ColumnElement[str], roots: Sequence[str]) -> sa.ColumnElement[bool]:
    """The stored paths below any of these folders, or named themselves."""
    return sa.or_(*(piece for root in roots for piece in _pieces(column, root)))


def _pieces(column: sa.ColumnElement[str], root: str) -> list[sa.ColumnElement[bool]]:
    return [column == path_to_text(root), *(in_range(column, span) for span in under(root))]


def in_range(column: sa.ColumnElement[str], span: TextRange) -> sa.ColumnElement[bool]:
    """A range of stored paths as a condition that the index on them serves."""
    condition = sa.and_(column >= span.low, column < span.high)
    if span.escaped is None:
        return condition
    without = sa.func.replace(column, "\\x", "")
    return sa.and_(condition, without != column if span.escaped else without == column)


def _of_content(connection: Connection, digits: str) -> Sequence[RowMapping]:
    # ':' follows '9' and 'g' follows 'f': all that starts with these digits lies below digits + 'g'.
    found = connection.execute(
        select(images.c.id).where(images.c.sha256 >= digits, images.c.sha256 < digits + "g").limit(2)
    ).all()
    if len(found) > 1:
        raise ValueError(f"more than one content begins with {digits}: give more digits")
    query = select(files).where(files.c.image_id.in_([row.id for row in found])).order_by(files.c.path)
    return connection.execute(query).mappings().all()


def _film(connection: Connection, file: RowMapping) -> Film:
    def rows(query: sa.Select[Any]) -> list[RowMapping]:
        return list(connection.execute(query).mappings())

    told = [
        Told(
            prediction,
            rows(select(scores).where(scores.c.prediction_id == prediction["id"]).order_by(scores.c.label)),
            rows(select(models).where(models.c.id == prediction["cascade_id"]))[0],
            rows(select(runs).where(runs.c.id == prediction["run_id"]))[0],
            rows(select(reviews).where(reviews.c.prediction_id == prediction["id"]).order_by(reviews.c.id)),
        )
        for prediction in rows(
            select(predictions).where(predictions.c.image_id == file["image_id"]).order_by(predictions.c.id.desc())
        )
    ]
    image = rows(select(images).where(images.c.id == file["image_id"]))
    twins = rows(
        select(files.c.path)
        .where(files.c.image_id == file["image_id"], files.c.path != file["path"])
        .order_by(files.c.path)
    )
    return Film(
        result=rows(select(results).where(results.c.path == file["path"]))[0],
        file=file,
        image=image[0] if image else None,
        told=told,
        same_content=[row["path"] for row in twins],
        history=rows(select(audit).where(audit.c.path == file["path"]).order_by(audit.c.id)),
    )
