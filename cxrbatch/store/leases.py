"""The job queue of `watch`: which files wait, who has which in hand, and until when.

    offer      a complete file is new or changed            -> waiting
    claim      waiting, due for a retry, or lease expired   -> claimed by one owner for lease_s
    renew      the owner is alive                           -> a later lease_until
    (record)   an outcome, from the owner only              -> done, rejected, retry   (recording.py)
    release    the owner stops                              -> waiting
    (retry)    a user requests another try                  -> waiting                (rejected.py)

An expired lease may be taken over; a late outcome of its first owner is dropped. On Postgres the server's clock is
used, so that the hosts' clocks need not agree. Each function works inside the caller's transaction.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select, update

from cxrbatch.store import presence
from cxrbatch.store.paths import path_to_text, text_to_path
from cxrbatch.store.queries import ROOTS_AT_ONCE, below
from cxrbatch.store.schema import FileState, files
from cxrbatch.store.sql import AnyRow, chunks, execute_for, from_unsigned, in_keys, insert, is_one_of
from cxrbatch.types import FoundFile, to_int64

__all__ = [
    "Backoff",
    "Claimed",
    "claim",
    "file_columns",
    "held",
    "offer",
    "owned",
    "release",
    "renew",
    "unfinished",
]

_FOUND = (files.c.path, files.c.size, files.c.mtime_ns, files.c.inode, files.c.version)
_OUTCOME = ("prediction_id", "label", "confidence", "decision", "processed_at")
#: The order of the index of states. Without it Postgres reads the table from its beginning, because nearly every row
#: waits by its statistics: past all rows that are done by now, for each claim.
_BY_STATE = (files.c.label, files.c.decision)


@dataclass(frozen=True, slots=True)
class Backoff:
    """When a file that failed for a transient reason is retried: after first_s, then after twice as long each time."""

    first_s: float = 5.0
    most_s: float = 3600.0
    truncated_tries: int = 5  # a truncated file may still be arriving; after this many tries the rejection is final

    def before(self, attempt: int) -> timedelta:
        """The delay after the `attempt`-th consecutive failure (from 1)."""
        return timedelta(seconds=min(self.most_s, self.first_s * 2.0 ** min(attempt - 1, 30)))


@dataclass(frozen=True, slots=True)
class Claimed:
    """A file of the job queue that this owner has leased, as it was offered."""

    text: str  # the key of its row
    file: FoundFile


def file_columns(file: FoundFile) -> dict[str, Any]:
    """What a row has of a file as it was listed: with other values it is another file."""
    return {
        "size": to_int64(file.size),
        "mtime_ns": to_int64(file.mtime_ns),
        "inode": from_unsigned(file.inode),
        "version": file.version or None,
    }


def offer(
    connection: Connection,
    found: Sequence[FoundFile],
    cascade_id: int,
    now: datetime,
    *,
    inodes_tell: bool,
    retry_at_once: bool = False,
) -> int:
    """Make complete files `waiting` unless their known outcome is valid; returns how many.

    Files that are claimed or waiting for a retry keep their state while size and mtime are the same; with
    `retry_at_once`, those waiting for a retry do not. With `inodes_tell`, another inode means another file, even with
    the same size and mtime (a replacement by rename).
    """
    up_to_date = presence.look_up(connection, found, cascade_id, inodes_tell=inodes_tell)
    if up_to_date.returned or up_to_date.shown_by_another:
        presence.repair(connection, up_to_date, cascade_id, now)
    rows = [
        {
            "path": path_to_text(file.path),
            **file_columns(file),
            "state": str(FileState.WAITING),
            "first_seen": now,
            "last_seen": now,
        }
        for file in found
        if file.path not in up_to_date.paths
    ]
    rows.sort(key=lambda row: str(row["path"]))  # one order for all daemons, so that they never deadlock
    if rows:
        connection.execute(_offer(connection.dialect.name, inodes_tell, retry_at_once), rows)
    return len(rows)


@cache
def _offer(dialect: str, inodes_tell: bool, retry_at_once: bool) -> Any:
    statement = insert(dialect, files)
    offered = statement.excluded
    same = sa.and_(
        files.c.size == offered.size,
        files.c.mtime_ns == offered.mtime_ns,
        files.c.version.is_not_distinct_from(offered.version),
    )
    if inodes_tell:
        same = sa.and_(same, files.c.inode == offered.inode)
    in_place = [files.c.state == str(FileState.WAITING), files.c.state == str(FileState.CLAIMED)]
    if not retry_at_once:
        in_place.append(sa.and_(files.c.state == str(FileState.RETRY), files.c.next_attempt_at.is_not(None)))
    keeps_its_place = sa.and_(same, sa.or_(*in_place))
    taken: dict[str, Any] = {
        name: offered[name] for name in ("size", "mtime_ns", "inode", "version", "state", "last_seen")
    }
    # Same bytes, another cascade: the known outcome stays visible until the new prediction exists.
    taken |= {name: sa.case((same, files.c[name]), else_=sa.null()) for name in _OUTCOME}
    taken["attempts"] = sa.case((same, files.c.attempts), else_=0)
    cleared = ("reason_code", "reason", "lease_owner", "lease_until", "next_attempt_at", "missing_since")
    taken |= {name: sa.null() for name in cleared}
    return statement.on_conflict_do_update(index_elements=[files.c.path], set_=taken, where=sa.not_(keeps_its_place))


def claim(
    connection: Connection,
    owner: str,
    roots: Sequence[str],
    most: int,
    lease_s: float,
    now: datetime,
    retries_due_by: datetime | None = None,
    *,
    named: Collection[str] = (),
) -> list[Claimed]:
    """Lease up to `most` files below `roots` that wait, are due for a retry, or have an expired lease.

    With `retries_due_by`, a file in `retry` is due only if it was at that time. Of `roots`, those that are `named` are
    files, with nothing below them: any number of them is one query.

    Rows that another owner is claiming are skipped. A path that is too long to be stored completely (paths.py) comes
    with an empty FoundFile.path: the caller may know it.
    """
    if not roots or most <= 0:
        return []
    due = sa.and_(files.c.state == str(FileState.RETRY), files.c.next_attempt_at <= (retries_due_by or now))
    expired = sa.and_(files.c.state == str(FileState.CLAIMED), files.c.lease_until < now)
    waiting = sa.and_(
        files.c.state == str(FileState.WAITING),
        sa.or_(files.c.next_attempt_at.is_(None), files.c.next_attempt_at <= now),
    )
    pages = _pages_of(connection, roots, named)
    random.shuffle(pages)  # so that no folder is always the last
    ids: list[int] = []
    first_due = (files.c.next_attempt_at,)
    for condition, order, share in (
        (due, first_due, most // 4 or 1),
        (expired, _BY_STATE, most),
        (waiting, _BY_STATE, most),
    ):
        enough = min(len(ids) + share, most)
        for ours in pages:
            if len(ids) < enough:
                query = select(files.c.id).where(condition, ours).order_by(*order).limit(enough - len(ids))
                ids += connection.execute(query.with_for_update(skip_locked=True)).scalars()
    if not ids:
        return []
    leased = {
        "state": str(FileState.CLAIMED),
        "lease_owner": owner,
        "lease_until": now + timedelta(seconds=lease_s),
        "next_attempt_at": None,
    }
    statement = update(files).where(files.c.id.in_(ids)).values(leased).returning(*_FOUND)
    return [Claimed(row.path, _found(row)) for row in connection.execute(statement)]


def held(connection: Connection, owner: str) -> list[Claimed]:
    """All files that `owner` has leased."""
    query = select(*_FOUND).where(*_held_by(owner))
    return [Claimed(row.path, _found(row)) for row in connection.execute(query)]


def unfinished(connection: Connection, roots: Sequence[str], named: Collection[str] = ()) -> bool:
    """Whether a file below `roots` (see `claim`) waits or is claimed."""
    for ours in _pages_of(connection, roots, named):
        first = [
            select(select(files.c.id).where(files.c.state == state, ours).order_by(*_BY_STATE).limit(1).subquery())
            for state in (str(FileState.WAITING), str(FileState.CLAIMED))
        ]
        if connection.execute(sa.union_all(*first)).first() is not None:
            return True
    return False


def _pages_of(connection: Connection, roots: Sequence[str], named: Collection[str]) -> list[sa.ColumnElement[bool]]:
    """The condition that a file is below one of `roots`, in as many parts as databases take."""
    folders = [root for root in roots if root not in named]
    pages = [below(_not_by_its_index(files.c.path), page) for page in chunks(folders, ROOTS_AT_ONCE)]
    if len(folders) < len(roots):
        texts = [path_to_text(root) for root in roots if root in named]
        pages.append(is_one_of(connection.dialect.name, files.c.path, texts))
    return pages


def _not_by_its_index(column: sa.Column[Any]) -> Any:
    # The few unfinished rows are found by their state; a scan of the path index could read a million rows.
    return column.concat("")


def _found(row: AnyRow) -> FoundFile:
    try:
        path = text_to_path(row.path)
    except ValueError:
        path = ""
    return FoundFile(path, row.size, row.mtime_ns, row.inode & (2**64 - 1), version=row.version or "")


def renew(connection: Connection, owner: str, lease_s: float, now: datetime) -> int:
    """Extend all leases of `owner`; returns how many it holds."""
    later = {"lease_until": now + timedelta(seconds=lease_s)}
    return connection.execute(update(files).where(*_held_by(owner)).values(later)).rowcount


def release(
    connection: Connection, owner: str | None, texts: Sequence[str] | None = None, not_before: datetime | None = None
) -> int:
    """Release leases of `owner` (None: of any owner), all or some; the files wait, until `not_before` if given."""
    waits: dict[str, Any] = {"state": str(FileState.WAITING), "next_attempt_at": not_before}
    waits |= dict.fromkeys(("lease_owner", "lease_until", "reason_code", "reason"))
    statement = update(files).where(*_held_by(owner)).values(waits)
    if texts is None:
        return connection.execute(statement).rowcount
    return execute_for(connection, statement.where(in_keys(connection.dialect.name, files.c.path)), texts).rowcount


def _held_by(owner: str | None) -> list[sa.ColumnElement[bool]]:
    held = [files.c.state == str(FileState.CLAIMED)]
    return held if owner is None else [*held, files.c.lease_owner == owner]


def owned(connection: Connection, owner: str, found: Collection[FoundFile]) -> set[FoundFile]:
    """Those of these claimed files that `owner` still holds as they were then; locked until the transaction ends.

    A file that changes in hand may be claimed a second time by the same owner: only its new version is owned.
    """
    texts = {path_to_text(file.path) for file in found}
    query = select(*_FOUND).where(*_held_by(owner), in_keys(connection.dialect.name, files.c.path))
    rows = execute_for(connection, query.order_by(files.c.path).with_for_update(), texts)
    held = {row["path"]: row for row in rows.mappings()}
    return {
        file
        for file in found
        if (row := held.get(path_to_text(file.path))) and all(row[k] == v for k, v in file_columns(file).items())
    }
