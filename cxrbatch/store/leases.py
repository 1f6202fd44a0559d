"""The ledger of `watch`: which files wait, who has which in hand, and until when.

    offer      a whole file was found, new or changed       -> waiting
    claim      waiting, due for a retry, or a lease ran out -> claimed by one owner for lease_s
    renew      the owner lives                              -> a later lease_until
    (record)   an outcome, from the owner only              -> done, rejected, retry   (recording.py)
    release    the owner stops                              -> waiting
    retry_now  a person asks for another try                -> waiting

A lease that ran out may be taken over; a late outcome of its first owner is dropped. On Postgres the clock is the
server's, so that hosts need not agree about the time. Each function works inside the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select, update

from cxrbatch.errors import ReasonCode
from cxrbatch.nouns import FoundFile, to_int64
from cxrbatch.store import presence
from cxrbatch.store.columns import from_unsigned
from cxrbatch.store.keys import AnyRow, among, bound, insert
from cxrbatch.store.paths import path_to_text, text_to_path
from cxrbatch.store.queries import below
from cxrbatch.store.schema import FileState, files

__all__ = ["Claimed", "Waits", "claim", "held", "offer", "owned", "release", "renew", "retry_now"]

_OUTCOME = ("prediction_id", "label", "confidence", "decision", "processed_at")


@dataclass(frozen=True, slots=True)
class Waits:
    """When a file that failed for a passing reason is tried again: after first_s, then twice as long each time."""

    first_s: float = 5.0
    most_s: float = 3600.0
    truncated_tries: int = 5  # a file that ends too early may still be on its way; after so many tries it is final

    def before(self, attempt: int) -> timedelta:
        """The wait after the `attempt`-th failure in a row (from 1)."""
        return timedelta(seconds=min(self.most_s, self.first_s * 2.0 ** min(attempt - 1, 30)))


@dataclass(frozen=True, slots=True)
class Claimed:
    """A file of the ledger in this owner's hands, as it was offered."""

    text: str  # the key of its row
    file: FoundFile


def offer(
    connection: Connection, found: Sequence[FoundFile], cascade_id: int, now: datetime, *, inodes_tell: bool
) -> int:
    """Make whole files `waiting` unless what is known of them stands; returns how many.

    Files in hand or waiting for their next try keep their place while their bytes are the same. With `inodes_tell`,
    another inode means another file, even of the same size and mtime (a replacement by rename).
    """
    standing = presence.look_up(connection, found, cascade_id, "none")
    kept = standing.paths
    if inodes_tell:
        kept = kept - _other_inodes(connection, [file for file in found if file.path in kept])
        standing = replace_paths(standing, kept)
    if standing.returned or standing.shown_by_another:
        presence.set_right(connection, standing, cascade_id, now)
    new = [file for file in found if file.path not in kept]
    rows = [
        {
            "path": path_to_text(file.path),
            "size": to_int64(file.size),
            "mtime_ns": to_int64(file.mtime_ns),
            "inode": from_unsigned(file.inode),
            "state": str(FileState.WAITING),
            "first_seen": now,
            "last_seen": now,
        }
        for file in new
    ]
    rows.sort(key=lambda row: str(row["path"]))  # two daemons that offer the same files wait, and never deadlock
    if rows:
        connection.execute(_offer(connection.dialect.name, inodes_tell), rows)
    return len(rows)


def replace_paths(standing: presence.Standing, paths: set[str]) -> presence.Standing:
    """`standing` for some of its paths only."""
    texts = {path_to_text(path) for path in paths}
    return replace(
        standing,
        paths=paths,
        returned=[row for row in standing.returned if row.path in texts],
        shown_by_another=[pair for pair in standing.shown_by_another if pair[0].path in texts],
    )


def _other_inodes(connection: Connection, found: Sequence[FoundFile]) -> set[str]:
    by_text = {path_to_text(file.path): file for file in found}
    query = select(files.c.path, files.c.inode).where(among(connection.dialect.name, files.c.path))
    known = connection.execute(query, {"keys": bound(connection, by_text)})
    return {by_text[path].path for path, inode in known if inode != from_unsigned(by_text[path].inode)}


@cache
def _offer(dialect: str, inodes_tell: bool) -> Any:
    statement = insert(dialect, files)
    offered = statement.excluded
    same = sa.and_(files.c.size == offered.size, files.c.mtime_ns == offered.mtime_ns)
    if inodes_tell:
        same = sa.and_(same, files.c.inode == offered.inode)
    keeps_its_place = sa.and_(
        same,
        sa.or_(
            files.c.state == str(FileState.WAITING),
            files.c.state == str(FileState.CLAIMED),
            sa.and_(files.c.state == str(FileState.RETRY), files.c.next_attempt_at.is_not(None)),
        ),
    )
    taken: dict[str, Any] = {name: offered[name] for name in ("size", "mtime_ns", "inode", "state")}
    # The same bytes, for another cascade: what is known of them still shows until the new verdict is there.
    taken |= {name: sa.case((same, files.c[name]), else_=sa.null()) for name in _OUTCOME}
    taken["attempts"] = sa.case((same, files.c.attempts), else_=0)
    cleared = ("reason_code", "reason", "lease_owner", "lease_until", "next_attempt_at", "missing_since")
    taken |= {name: sa.null() for name in cleared}
    return statement.on_conflict_do_update(index_elements=[files.c.path], set_=taken, where=sa.not_(keeps_its_place))


def claim(
    connection: Connection, owner: str, roots: Sequence[str], most: int, lease_s: float, now: datetime
) -> list[Claimed]:
    """Take at most `most` files below `roots` that wait, are due, or whose lease ran out. Others' are skipped.

    A path too long for the store to keep whole (paths.py) comes with an empty FoundFile.path: the caller may know it.
    """
    if not roots or most <= 0:
        return []
    due = sa.and_(files.c.state == str(FileState.RETRY), files.c.next_attempt_at <= now)
    expired = sa.and_(files.c.state == str(FileState.CLAIMED), files.c.lease_until < now)
    waiting = sa.and_(
        files.c.state == str(FileState.WAITING),
        sa.or_(files.c.next_attempt_at.is_(None), files.c.next_attempt_at <= now),
    )
    ours = below(_not_by_its_index(files.c.path), roots)
    ids: list[int] = []
    for condition, share in ((due, most // 4 or 1), (expired, most), (waiting, most)):
        room = min(share, most - len(ids))
        if room > 0:
            query = select(files.c.id).where(condition, ours).limit(room).with_for_update(skip_locked=True)
            ids += connection.execute(query).scalars()
    if not ids:
        return []
    leased = {
        "state": str(FileState.CLAIMED),
        "lease_owner": owner,
        "lease_until": now + timedelta(seconds=lease_s),
        "next_attempt_at": None,
    }
    statement = (
        update(files)
        .where(files.c.id.in_(ids))
        .values(leased)
        .returning(files.c.path, files.c.size, files.c.mtime_ns, files.c.inode)
    )
    return [Claimed(row.path, _found(row)) for row in connection.execute(statement)]


def held(connection: Connection, owner: str) -> list[Claimed]:
    """All that `owner` has in hand, as the ledger sees it."""
    query = select(files.c.path, files.c.size, files.c.mtime_ns, files.c.inode).where(*_held_by(owner))
    return [Claimed(row.path, _found(row)) for row in connection.execute(query)]


def _not_by_its_index(column: sa.Column[Any]) -> Any:
    # The few that wait are found by their state; a walk along all paths below a root would cost a million rows.
    return column.concat("")


def _found(row: AnyRow) -> FoundFile:
    try:
        path = text_to_path(row.path)
    except ValueError:
        path = ""
    return FoundFile(path, row.size, row.mtime_ns, row.inode & (2**64 - 1))


def renew(connection: Connection, owner: str, lease_s: float, now: datetime) -> int:
    """Push the end of all leases of `owner`; returns how many it holds."""
    later = {"lease_until": now + timedelta(seconds=lease_s)}
    return connection.execute(update(files).where(*_held_by(owner)).values(later)).rowcount


def release(
    connection: Connection, owner: str | None, texts: Sequence[str] | None = None, not_before: datetime | None = None
) -> int:
    """Give back what `owner` holds (None: anybody), all or some; it waits, until `not_before` if given."""
    waits: dict[str, Any] = {"state": str(FileState.WAITING), "next_attempt_at": not_before}
    waits |= dict.fromkeys(("lease_owner", "lease_until", "reason_code", "reason"))
    statement = update(files).where(*_held_by(owner)).values(waits)
    if texts is None:
        return connection.execute(statement).rowcount
    keys = {"keys": bound(connection, texts)}
    return connection.execute(statement.where(among(connection.dialect.name, files.c.path)), keys).rowcount


def _held_by(owner: str | None) -> list[sa.ColumnElement[bool]]:
    held = [files.c.state == str(FileState.CLAIMED)]
    return held if owner is None else [*held, files.c.lease_owner == owner]


def owned(connection: Connection, owner: str, texts: Sequence[str]) -> set[str]:
    """Which of these rows `owner` still holds, locked until the transaction ends."""
    query = select(files.c.path).where(*_held_by(owner), among(connection.dialect.name, files.c.path))
    keys = {"keys": bound(connection, sorted(texts))}
    return set(connection.execute(query.order_by(files.c.path).with_for_update(), keys).scalars())


def retry_now(connection: Connection, reason_code: ReasonCode | None) -> int:
    """Make files with a reason (all, or of one code) wait for another try; returns how many."""
    # What the walk says of a name (a link that leaves the root, a folder that may not be listed) only the walk heals.
    rejected = sa.and_(
        files.c.state == str(FileState.REJECTED),
        files.c.reason_code.not_in([str(code) for code in presence.TOLD_BY_THE_WALK]),
    )
    scheduled = sa.and_(files.c.state == str(FileState.RETRY), files.c.next_attempt_at.is_not(None))
    which = [sa.or_(rejected, scheduled)]
    if reason_code is not None:
        which.append(files.c.reason_code == str(reason_code))
    waits: dict[str, Any] = {"state": str(FileState.WAITING), "attempts": 0}
    waits |= dict.fromkeys(("next_attempt_at", "reason_code", "reason", "processed_at"))
    return connection.execute(update(files).where(*which).values(waits)).rowcount
