"""Which files are unchanged, which have returned, and which are missing from the folders."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, select, update

from cxrbatch.errors import TRANSIENT_REASONS, ReasonCode
from cxrbatch.failpoints import failpoint
from cxrbatch.store.connection import connect
from cxrbatch.store.content_rows import prediction_columns, predictions_of
from cxrbatch.store.paths import TextRange, path_to_text, text_to_path, under
from cxrbatch.store.queries import ROOTS_AT_ONCE, below, in_range
from cxrbatch.store.schema import FileState, audit, files
from cxrbatch.store.sql import AnyRow, chunks, execute_for, from_unsigned, in_keys
from cxrbatch.types import FoundFile, to_int64

__all__ = [
    "FROM_THE_WALK",
    "Reprocess",
    "UpToDate",
    "look_up",
    "mark_missing",
    "note_mounts",
    "repair",
]

Reprocess = Literal["none", "failed", "all"]

_PAGE = 4000  # paths

#: Problems that each directory walk finds (FoundFile.problem), not the opening of the file.
FROM_THE_WALK = frozenset(
    {
        ReasonCode.NOT_A_REGULAR_FILE,
        ReasonCode.SYMLINK_OUTSIDE_ROOT,
        ReasonCode.SYMLINK_LOOP,
        ReasonCode.SYMLINK_BROKEN,
        ReasonCode.FILE_TOO_LARGE,
    }
)
#: What a row has beside its outcome only until it is done. Another program may have claimed it since the look-up.
_UNFINISHED = ("reason_code", "reason", "lease_owner", "lease_until", "next_attempt_at", "missing_since")
#: Rejections by one cascade; another cascade may succeed.
_TOLD_BY_THE_CASCADE = frozenset({ReasonCode.NON_FINITE_OUTPUT})


class Known(NamedTuple):
    """The columns of files that a look-up reads."""

    path: str
    size: int
    mtime_ns: int
    prediction_id: int | None
    cascade_id: int | None
    state: str
    reason_code: str | None
    image_id: int | None
    id: int
    version: str | None
    inode: int


@dataclass(slots=True)
class UpToDate:
    """Of some found files: those that are up to date, and the rows of theirs that need a repair, by path."""

    paths: set[str] = field(default_factory=set)  # as in FoundFile
    returned: dict[str, Known] = field(default_factory=dict)  # were missing
    shown_by_another: dict[str, tuple[Known, AnyRow]] = field(default_factory=dict)  # (row, our prediction)


@cache
def _select_known(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return select(*(files.c[name] for name in Known._fields)).where(in_keys(dialect, files.c.path))


def look_up(
    connection: Connection,
    found: Sequence[FoundFile],
    cascade_id: int,
    reprocess: Reprocess = "none",
    *,
    inodes_tell: bool = False,
) -> UpToDate:
    """Which of these files are as recorded (size, mtime) and have a valid outcome (Store.unchanged).

    With `inodes_tell`, another inode means another file (a replacement by rename).
    """
    texts = [path_to_text(file.path) for file in found]
    # The driver's own tuples are faster: a second scan of a million files spends its time here.
    cursor: Any = execute_for(connection, _select_known(connection.dialect.name), texts).cursor
    known = {row[0]: row for row in cursor.fetchall()}
    up_to_date, elsewhere = UpToDate(), dict[str, Known]()
    if not known:
        return up_to_date
    for text, file in zip(texts, found, strict=True):
        row = known.get(text)
        if row is None:
            continue
        _, size, mtime_ns, prediction_id, by_cascade, state, _, _, _, version, inode = row
        if (
            (version or "") != file.version
            or size != file.size
            or (mtime_ns != file.mtime_ns and mtime_ns != to_int64(file.mtime_ns))
            or (inodes_tell and inode != from_unsigned(file.inode))
        ):
            continue
        if prediction_id is not None:
            if file.problem is not None:
                continue
            if state == FileState.CLAIMED and by_cascade == cascade_id:
                continue  # another cascade is at it, or was: it is read again
            if by_cascade != cascade_id or state == FileState.WAITING:  # it waits for another cascade
                elsewhere[file.path] = Known._make(row)
                continue
        elif not _rejection_stands(Known._make(row), file, cascade_id, reprocess):
            continue
        up_to_date.paths.add(file.path)
        if state == "missing":
            up_to_date.returned[file.path] = Known._make(row)
    if elsewhere:
        ours = predictions_of(connection, {row.image_id for row in elsewhere.values()}, cascade_id)
        for path, row in elsewhere.items():
            if row.image_id in ours:
                up_to_date.paths.add(path)
                up_to_date.shown_by_another[path] = row, ours[row.image_id]
    return up_to_date


def _rejection_stands(row: Known, file: FoundFile, cascade_id: int, reprocess: Reprocess) -> bool:
    code = row.reason_code
    if code is None or code in TRANSIENT_REASONS or row.state == FileState.RETRY or reprocess == "failed":
        return False
    if file.problem is not None or code in FROM_THE_WALK:
        return file.problem is not None and bool(code == file.problem.reason_code)
    return code not in _TOLD_BY_THE_CASCADE or bool(row.cascade_id == cascade_id)


def repair(connection: Connection, up_to_date: UpToDate, cascade_id: int, now: datetime) -> None:
    """Restore the state of paths that are back; show this cascade's prediction instead of another's.

    A path whose row another program has changed or pruned since the look-up is not up to date any more.
    """
    repairs: dict[str, tuple[Known, sa.ColumnElement[bool], dict[str, Any]]] = {}
    for path, row in up_to_date.returned.items():
        state = FileState.DONE if row.prediction_id is not None else FileState.REJECTED
        back = {"state": str(state), "missing_since": None}
        repairs[path] = row, files.c.state == str(FileState.MISSING), back
    for path, (row, prediction) in up_to_date.shown_by_another.items():
        shown = prediction_columns(prediction) | {"cascade_id": cascade_id} | dict.fromkeys(_UNFINISHED)
        repairs[path] = row, files.c.image_id == row.image_id, shown
    returned = []
    for path, (row, condition, values) in repairs.items():
        statement = update(files).where(*_still(row), condition).values(values | {"last_seen": now})
        if not connection.execute(statement).rowcount:
            up_to_date.paths.discard(path)
        elif row.state == FileState.MISSING:
            returned.append({"at": now, "event": "returned", "path": row.path})
    if returned:
        connection.execute(sa.insert(audit), returned)


def _still(row: Known) -> list[sa.ColumnElement[bool]]:
    """That another program has not found another file under this name since the look-up."""
    version = files.c.version.is_not_distinct_from(row.version)
    return [files.c.id == row.id, files.c.size == row.size, files.c.mtime_ns == row.mtime_ns, version]


def note_mounts(engine: Engine, roots: Sequence[str], mounted: Collection[str], now: datetime) -> frozenset[str]:
    """Record the mount points `mounted`; returns all mount points ever seen at or below `roots`."""
    known, texts = set[str](), set[str]()
    query = select(audit.c.path).where(audit.c.event == "mounted")
    with connect(engine) as connection:
        for page in chunks(roots, ROOTS_AT_ONCE):
            texts.update(connection.execute(query.where(below(audit.c.path, page))).scalars())
    for text in texts:
        with suppress(ValueError):  # too long to be stored completely
            known.add(text_to_path(text))
    if new := sorted({path_to_text(point) for point in mounted} - texts):
        with connect(engine, write=True) as connection:
            connection.execute(sa.insert(audit), [{"at": now, "event": "mounted", "path": text} for text in new])
    return frozenset(known | set(mounted))


def mark_missing(
    engine: Engine,
    run_id: int,
    roots: Sequence[str],
    seen: Container[str],
    now: datetime,
    unlisted: Collection[str] = (),
    unmounted: Collection[str] = (),
    since: datetime | None = None,
    *,
    watching: bool = False,
) -> int:
    """See Store.mark_missing. Each page is one transaction."""
    marked = 0
    older = list[sa.ColumnElement[bool]]()
    # SQLite has one writer: nobody else records, and its clock may be set back.
    if since is not None and engine.dialect.name == "postgresql":
        # What was queued in the second in which the walk began is older: times have whole seconds.
        older.append(files.c.first_seen <= since if watching else _untouched(since, run_id))
    hidden = _Below([*unlisted, *(point for point in unmounted if not _shows_something(engine, point, seen))])
    for span in (span for root in roots for span in (_itself(root), *under(root))):
        for page in _pages(engine, span, *older):
            gone = [path for path in page if path not in hidden and path not in seen]
            if gone:
                with connect(engine, write=True) as connection:
                    marked += _mark(connection, run_id, gone, now, *older)
                    failpoint("missing.before_commit")
                failpoint("missing.committed")
    return marked


def _untouched(since: datetime, run_id: int) -> sa.ColumnElement[bool]:
    return sa.or_(files.c.last_seen <= since, files.c.run_id == run_id)


def _itself(root: str) -> TextRange:
    """The row of a root: the problem of a folder that could not be listed, or an object of this name."""
    text = path_to_text(root)
    return TextRange(text, text + "\x01", None)


class _Below:
    """The path texts below some folders, and those of the folders: the name of an object may be scanned as one."""

    def __init__(self, folders: Collection[str]) -> None:
        self._folders = {path_to_text(folder) for folder in folders}
        self._prefixes = {span.low: span.escaped for folder in folders for span in under(folder)}

    def __contains__(self, text: str) -> bool:
        if text in self._folders:
            return True
        end = len(text) if self._prefixes else 0
        while (end := text.rfind("/", 0, end)) >= 0:
            prefix = text[: end + 1]
            if prefix in self._prefixes and self._prefixes[prefix] in (None, "\\x" in text):
                return True
        return False


def _shows_something(engine: Engine, point: str, seen: Container[str]) -> bool:
    """Whether a scored image below this former mount point still exists: then the folder is a plain folder now."""
    scored = files.c.prediction_id.is_not(None)
    return any(text in seen for span in under(point) for page in _pages(engine, span, scored) for text in page)


def _pages(engine: Engine, span: TextRange, *conditions: sa.ColumnElement[bool]) -> Iterator[list[str]]:
    """The paths of a range that are not missing, page by page; no transaction stays open between pages."""
    while True:
        query = (
            select(files.c.path)
            .where(in_range(files.c.path, span))
            .where(files.c.state != str(FileState.MISSING), *conditions)
            .order_by(files.c.path)
            .limit(_PAGE)
        )
        with connect(engine) as connection:
            page = list(connection.execute(query).scalars())
        if not page:
            return
        yield page
        span = span._replace(low=page[-1] + "\x01")  # SQLite looks up one lower bound only; no text has a NUL


def _mark(
    connection: Connection, run_id: int, paths: list[str], now: datetime, *conditions: sa.ColumnElement[bool]
) -> int:
    ended = {"lease_owner": None, "lease_until": None, "next_attempt_at": None}
    statement = (
        update(files)
        .where(in_keys(connection.dialect.name, files.c.path), files.c.state != str(FileState.MISSING), *conditions)
        .values(state=str(FileState.MISSING), missing_since=now, **ended)
        .returning(files.c.path)  # not those that another daemon has marked meanwhile
    )
    marked = sorted(execute_for(connection, statement, paths).scalars())
    if marked:
        rows = [{"at": now, "event": "missing", "path": path, "run_id": run_id} for path in marked]
        connection.execute(sa.insert(audit), rows)
    return len(marked)
