"""Read the store without SQL: rows of the view `results`, and everything that is known about one image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, RowMapping, select

from cxrbatch.store.connection import connect
from cxrbatch.store.paths import TextRange, path_to_text, under
from cxrbatch.store.schema import FileState, audit, files, images, models, predictions, reviews, runs, scores
from cxrbatch.store.sql import AnyRow, chunks
from cxrbatch.store.views import results, whole_results
from cxrbatch.types import Decision

__all__ = [
    "OTHER_FILE",
    "ROOTS_AT_ONCE",
    "FileHistory",
    "PathCounts",
    "StoredPrediction",
    "below",
    "count_paths",
    "everything_about",
    "in_range",
    "repeats",
    "stream_results",
]

_PAGE = 1000  # rows fetched at a time, and held in memory
ROOTS_AT_ONCE = 200  # in one statement. SQLite nests conditions at most 1,000 deep, and a shell's * names any number.
#: Sort column, and whether descending; the order of equal values is undefined.
_ORDERS = {"surest": ("confidence", True), "least sure": ("confidence", False), "newest": ("processed_at", True)}
_SHA256 = re.compile(r"[0-9a-f]{6,64}")


@dataclass(frozen=True, slots=True)
class StoredPrediction:
    """What one cascade said of a content, and what made it."""

    prediction: RowMapping  # columns of predictions
    scores: list[RowMapping]  # of scores
    cascade: RowMapping  # of models
    run: RowMapping  # of runs


@dataclass(frozen=True, slots=True)
class FileHistory:
    """Everything that is known about one path."""

    result: RowMapping  # its row of the view
    file: RowMapping  # columns of files
    image: RowMapping | None  # of images
    predictions: list[StoredPrediction]  # newest first; of every cascade that scored this content
    reviews: list[RowMapping]  # of reviews: what readers said of this content, oldest first
    same_image: list[str]  # other paths with the same bytes
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
    """Rows of the view that match all filters (named tuples in the order of RESULT_COLUMNS), by root and path.

    `min_confidence` is of `label`, 0..1; `since` is timezone-aware and compared with processed_at; `roots` are folders
    or files. The other orders are for the first `limit` rows of a filter, without roots: an index finds these rows
    directly, whereas sorting by path has to find all rows first. The rows are one consistent snapshot (on Postgres, one
    per root), fetched a thousand at a time.
    """
    rows = whole_results(engine.dialect.name)
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
    sorted_by: sa.ColumnElement[Any] = rows.c.path
    if indexed:
        # First the paths, by the filter's index. Then whole rows are read in path order and never sorted.
        indexed += [] if min_confidence is None else [files.c.confidence >= min_confidence]
        chosen = select(files.c.path).where(*indexed)
        if order != "path":
            key, from_the_top = _ORDERS[order]
            direction = sa.desc if from_the_top else sa.asc
            sorted_by = direction(rows.c[key])
            chosen = chosen.order_by(direction(files.c[key])).limit(limit)
        conditions.append(rows.c.path.in_(chosen))
    elif min_confidence is not None:  # it has no index of its own, but many rows match: the first ones come soon
        conditions.append(rows.c.confidence >= min_confidence)
    query = select(rows).where(*conditions).order_by(sorted_by, rows.c.path).limit(limit)
    # One query per range of each root: SQLite would sort all rows of an OR, possibly a million.
    pieces = [piece for root in sorted(roots) for piece in _pieces(rows.c.path, root)]
    with connect(engine) as connection:
        streaming = connection.execution_options(yield_per=_PAGE)
        queries = [query.where(piece) for piece in pieces] if roots else [query]
        yield from islice((row for each in queries for row in streaming.execute(each)), limit)


def everything_about(engine: Engine, path_or_sha256: str) -> list[FileHistory]:
    """The history of a path (as os.fsdecode gives it), or of all paths whose sha256 starts with 6 or more digits.

    The list is empty if nothing is known. Raises ValueError if the digits match more than one content.
    """
    with connect(engine) as connection:
        exact = select(files).where(files.c.path == path_to_text(path_or_sha256))
        rows = connection.execute(exact).mappings().all()
        digits = path_or_sha256.lower()
        if not rows and _SHA256.fullmatch(digits):
            rows = _of_image(connection, digits)
        return [_image(connection, row) for row in rows]


OTHER_FILE = files.alias("other")


def repeats(*of_other: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Whether the image of a file counts at another file, so that each image counts once.

    `of_other` says of OTHER_FILE what is asked of the files themselves: an image must not count at a file that is left
    out. Every file of an image but one is marked as a copy, and the one without the mark may be gone: then the first
    copy counts. Few files are marked, so few are looked up.
    """
    first = sa.or_(sa.not_(OTHER_FILE.c.is_copy), OTHER_FILE.c.id < files.c.id)
    same = (OTHER_FILE.c.image_id == files.c.image_id, OTHER_FILE.c.state == str(FileState.DONE))
    elsewhere = select(OTHER_FILE.c.id).where(*same, OTHER_FILE.c.id != files.c.id, first, *of_other)
    return sa.and_(files.c.is_copy, elsewhere.correlate(files).exists())


def below(column: sa.ColumnElement[str], roots: Sequence[str]) -> sa.ColumnElement[bool]:
    """The condition that a stored path is below one of these folders, or is one of them."""
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


def _of_image(connection: Connection, digits: str) -> Sequence[RowMapping]:
    # 'g' follows 'f' (and ':' follows '9'): every sha256 with these first digits sorts before digits + 'g'.
    found = connection.execute(
        select(images.c.id).where(images.c.sha256 >= digits, images.c.sha256 < digits + "g").limit(2)
    ).all()
    if len(found) > 1:
        raise ValueError(f"more than one content begins with {digits}: give more digits")
    query = select(files).where(files.c.image_id.in_([row.id for row in found])).order_by(files.c.path)
    return connection.execute(query).mappings().all()


def _image(connection: Connection, file: RowMapping) -> FileHistory:
    def rows(query: sa.Select[Any]) -> list[RowMapping]:
        return list(connection.execute(query).mappings())

    reported = [
        StoredPrediction(
            prediction,
            rows(select(scores).where(scores.c.prediction_id == prediction["id"]).order_by(scores.c.label)),
            rows(select(models).where(models.c.id == prediction["cascade_id"]))[0],
            rows(select(runs).where(runs.c.id == prediction["run_id"]))[0],
        )
        for prediction in rows(
            select(predictions).where(predictions.c.image_id == file["image_id"]).order_by(predictions.c.id.desc())
        )
    ]
    image = rows(select(images).where(images.c.id == file["image_id"]))
    twins = select(files.c.path).where(files.c.image_id == file["image_id"], files.c.path != file["path"])
    return FileHistory(
        result=rows(select(results).where(results.c.path == file["path"]))[0],
        file=file,
        image=image[0] if image else None,
        predictions=reported,
        reviews=rows(select(reviews).where(reviews.c.image_id == file["image_id"]).order_by(reviews.c.id)),
        # without an image, `== None` would be IS NULL: every other rejected file
        same_image=[row["path"] for row in rows(twins.order_by(files.c.path))] if image else [],
        history=rows(select(audit).where(audit.c.path == file["path"]).order_by(audit.c.id)),
    )


@dataclass(frozen=True, slots=True)
class PathCounts:
    """Numbers of paths by state; labels and decisions of `done` paths, reason codes of the others."""

    by_state: dict[str, int] = field(default_factory=dict)
    by_label: dict[str, int] = field(default_factory=dict)
    by_decision: dict[str, int] = field(default_factory=dict)
    by_reason: dict[str, int] = field(default_factory=dict)
    to_review: dict[str, int] = field(default_factory=dict)  # of each label, those that need review


def count_paths(engine: Engine, roots: Sequence[str] = ()) -> PathCounts:
    """Numbers of paths by state, in the whole store or below some folders, none of which lies in another."""
    result = PathCounts()
    with connect(engine) as connection:
        if len(roots) <= ROOTS_AT_ONCE and roots:
            elsewhere = select(files.c.id).where(sa.not_(below(files.c.path, roots))).limit(1)
            # If no path is elsewhere, counting by the indexes gives the same result ten times as fast.
            roots = roots if connection.execute(elsewhere).first() else ()
        pages = list(chunks(roots, ROOTS_AT_ONCE)) or [[]]
        queries = [query for page in pages for query in _count_queries(page)]
        rows = [row for query in queries for row in connection.execute(query)]
        for state, label, decision, reason_code, paths in rows:
            _add(result.by_state, state, paths)
            if state == FileState.DONE:
                _add(result.by_label, label, paths)
                _add(result.by_decision, decision, paths)
                if decision == Decision.NEEDS_REVIEW:
                    _add(result.to_review, label, paths)
            elif state in (FileState.REJECTED, FileState.RETRY):
                _add(result.by_reason, reason_code, paths)
    return result


def _count_queries(roots: Sequence[str]) -> list[sa.Select[*tuple[Any, ...]]]:
    """Queries for (state, label, decision, reason_code, number of paths) that together count every path once."""
    keys, paths = (files.c.state, files.c.label, files.c.decision, files.c.reason_code), sa.func.count()
    if roots:
        # Grouped by the column itself, SQLite reads its index: the whole store for every few roots.
        state = files.c.state.concat(sa.literal_column("''"))
        return [select(state, *keys[1:], paths).where(below(files.c.path, roots)).group_by(state, *keys[1:])]
    # For the whole store: two scans of indexes that contain all these columns.
    explained = files.c.state.in_([str(FileState.REJECTED), str(FileState.RETRY)])
    why = select(keys[0], sa.null(), sa.null(), keys[3], paths).where(explained, keys[3].is_not(None))
    rest = select(*keys[:3], sa.null(), paths).where(sa.not_(explained))
    return [rest.group_by(*keys[:3]), why.group_by(keys[0], keys[3])]


def _add(counts: dict[str, int], key: str, number: int) -> None:
    counts[key] = counts.get(key, 0) + number
