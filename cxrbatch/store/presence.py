"""What is still as it was, what has come back, and what has gone from the folders."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, select, update

from cxrbatch.crash import crash_point
from cxrbatch.errors import PASSING_REASONS, ReasonCode
from cxrbatch.nouns import FoundFile, to_int64
from cxrbatch.store.engine import connect
from cxrbatch.store.keys import AnyRow, among, bound
from cxrbatch.store.paths import TextRange, path_to_text, under
from cxrbatch.store.queries import in_range
from cxrbatch.store.schema import FileState, audit, files, predictions

__all__ = ["TOLD_BY_THE_WALK", "Reprocess", "Standing", "look_up", "mark_missing", "set_right"]

Reprocess = Literal["none", "failed", "all"]

_PAGE = 4000  # paths

#: Found by the directory walk each time (FoundFile.problem), not by opening the file.
TOLD_BY_THE_WALK = frozenset(
    {
        ReasonCode.NOT_A_REGULAR_FILE,
        ReasonCode.SYMLINK_OUTSIDE_ROOT,
        ReasonCode.SYMLINK_LOOP,
        ReasonCode.SYMLINK_BROKEN,
        ReasonCode.FILE_TOO_LARGE,
    }
)
#: Said by one cascade; another one may do better.
_TOLD_BY_THE_CASCADE = frozenset({ReasonCode.NON_FINITE_OUTPUT})


class Known(NamedTuple):
    """What a look-up takes of a row of files."""

    path: str
    size: int
    mtime_ns: int
    prediction_id: int | None
    cascade_id: int | None
    state: str
    reason_code: str | None
    image_id: int | None
    id: int


@dataclass(slots=True)
class Standing:
    """Of some found files: those that need nothing, and what has to be set right in their rows."""

    paths: set[str] = field(default_factory=set)  # as in FoundFile
    returned: list[Known] = field(default_factory=list)  # were missing
    shown_by_another: list[tuple[Known, AnyRow]] = field(default_factory=list)  # (row, our prediction)


@cache
def _select_known(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return select(*(files.c[name] for name in Known._fields)).where(among(dialect, files.c.path))


@cache
def _select_ours(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return select(predictions).where(
        among(dialect, predictions.c.image_id), predictions.c.cascade_id == sa.bindparam("cascade")
    )


def look_up(connection: Connection, found: Sequence[FoundFile], cascade_id: int, reprocess: Reprocess) -> Standing:
    """Which of these files are as recorded (size, mtime) and have an outcome that stands (Store.unchanged)."""
    texts = [path_to_text(file.path) for file in found]
    query = _select_known(connection.dialect.name)
    # The driver's own tuples: a second scan of a million files spends its time here.
    cursor: Any = connection.execute(query, {"keys": bound(connection, texts)}).cursor
    known = {row[0]: row for row in cursor.fetchall()}
    standing, elsewhere = Standing(), dict[str, Known]()
    if not known:
        return standing
    for text, file in zip(texts, found, strict=True):
        row = known.get(text)
        if row is None:
            continue
        _, size, mtime_ns, prediction_id, by_cascade, state, _, _, _ = row
        if size != file.size or (mtime_ns != file.mtime_ns and mtime_ns != to_int64(file.mtime_ns)):
            continue
        if prediction_id is not None:
            if file.problem is not None:
                continue
            if by_cascade != cascade_id:
                elsewhere[file.path] = Known._make(row)
                continue
        elif not _rejection_stands(Known._make(row), file, cascade_id, reprocess):
            continue
        standing.paths.add(file.path)
        if state == "missing":
            standing.returned.append(Known._make(row))
    if elsewhere:
        keys = bound(connection, {row.image_id for row in elsewhere.values()})
        told = connection.execute(_select_ours(connection.dialect.name), {"keys": keys, "cascade": cascade_id})
        ours = {row.image_id: row for row in told}
        for path, row in elsewhere.items():
            if row.image_id in ours:
                standing.paths.add(path)
                standing.shown_by_another.append((row, ours[row.image_id]))
    return standing


def _rejection_stands(row: Known, file: FoundFile, cascade_id: int, reprocess: Reprocess) -> bool:
    code = row.reason_code
    if code is None or code in PASSING_REASONS or row.state == FileState.RETRY or reprocess == "failed":
        return False
    if file.problem is not None or code in TOLD_BY_THE_WALK:
        return file.problem is not None and bool(code == file.problem.reason_code)
    return code not in _TOLD_BY_THE_CASCADE or bool(row.cascade_id == cascade_id)


def set_right(connection: Connection, standing: Standing, cascade_id: int, now: datetime) -> None:
    """Give paths that are back their old state; show this cascade's verdict where another's was."""
    for row in standing.returned:
        state = FileState.DONE if row.prediction_id is not None else FileState.REJECTED
        connection.execute(
            update(files)
            .where(files.c.id == row.id, files.c.state == str(FileState.MISSING))
            .values(state=str(state), missing_since=None, last_seen=now)
        )
    for row, prediction in standing.shown_by_another:
        connection.execute(
            update(files)
            .where(files.c.id == row.id, files.c.image_id == row.image_id)
            .values(
                prediction_id=prediction.id,
                cascade_id=cascade_id,
                label=prediction.label,
                confidence=prediction.confidence,
                decision=prediction.decision,
                processed_at=prediction.processed_at,
                state=str(FileState.DONE),
                missing_since=None,
                last_seen=now,
            )
        )
    back = [row.path for row in standing.returned]
    back += [row.path for row, _ in standing.shown_by_another if row.state == FileState.MISSING]
    if back:
        connection.execute(sa.insert(audit), [{"at": now, "event": "returned", "path": path} for path in back])


def mark_missing(engine: Engine, run_id: int, roots: Sequence[str], seen: Container[str], now: datetime) -> int:
    """See Store.mark_missing. A page is a transaction."""
    marked = 0
    for span in (span for root in roots for span in under(root)):
        for page in _pages(engine, span):
            gone = [path for path in page if path not in seen]
            if gone:
                with connect(engine, write=True) as connection:
                    marked += _mark(connection, run_id, gone, now)
                    crash_point("missing.before_commit")
                crash_point("missing.committed")
    return marked


def _pages(engine: Engine, span: TextRange) -> Iterator[list[str]]:
    """The present paths of a range, a page at a time; no transaction stays open between two."""
    last = span.low
    while True:
        query = (
            select(files.c.path)
            .where(files.c.path > last, in_range(files.c.path, span))
            .where(files.c.state != str(FileState.MISSING))
            .order_by(files.c.path)
            .limit(_PAGE)
        )
        with connect(engine) as connection:
            page = list(connection.execute(query).scalars())
        if not page:
            return
        yield page
        last = page[-1]


def _mark(connection: Connection, run_id: int, paths: list[str], now: datetime) -> int:
    ended = {"lease_owner": None, "lease_until": None, "next_attempt_at": None}
    result = connection.execute(
        update(files)
        .where(among(connection.dialect.name, files.c.path), files.c.state != str(FileState.MISSING))
        .values(state=str(FileState.MISSING), missing_since=now, **ended),
        {"keys": bound(connection, paths)},
    )
    connection.execute(
        sa.insert(audit), [{"at": now, "event": "missing", "path": path, "run_id": run_id} for path in paths]
    )
    return result.rowcount
