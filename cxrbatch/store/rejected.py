"""Files without a score: a page of them, how many of each reason, another try."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.errors import ReasonCode
from cxrbatch.store.connection import connect
from cxrbatch.store.presence import FROM_THE_WALK
from cxrbatch.store.schema import FileState, files
from cxrbatch.store.sql import AnyRow
from cxrbatch.store.store import Store

__all__ = ["rejected_page", "retry_file", "retry_now"]

_STATES = (str(FileState.REJECTED), str(FileState.RETRY))


def rejected_page(
    connection: Connection, reason: str, after_id: int, size: int
) -> tuple[list[AnyRow], list[tuple[str, int]], bool]:
    """(rows after a file's id, (reason, files) most frequent first, whether more rows follow)."""
    here = [files.c.state.in_(_STATES), files.c.reason_code.is_not(None)]
    chosen = [*here, files.c.id > after_id] + ([files.c.reason_code == reason] if reason else [])
    columns = (files.c.id, files.c.path, files.c.state, files.c.reason_code, files.c.reason, files.c.attempts)
    query = select(*columns, files.c.processed_at, files.c.next_attempt_at).where(*chosen).order_by(files.c.id)
    rows = list(connection.execute(query.limit(size + 1)))
    number = sa.func.count()
    counts = select(files.c.reason_code, number).where(*here).group_by(files.c.reason_code).order_by(number.desc())
    return rows[:size], [(row[0], row[1]) for row in connection.execute(counts)], len(rows) > size


def retry_file(store: Store, file_id: int) -> int:
    """Let one file wait for another try; 0 where it is not rejected (any more), or only a walk can clear it."""
    return _retry(store, files.c.id == file_id)


def retry_now(store: Store, reason_code: ReasonCode | None) -> int:
    """Let failed files (all, or with one reason code) wait for another try; returns how many. Raises StoreDown."""
    return _retry(store, *([] if reason_code is None else [files.c.reason_code == str(reason_code)]))


def _retry(store: Store, *chosen: sa.ColumnElement[bool]) -> int:
    # Only a walk can clear a problem of a name (a link that leaves the root, a folder that cannot be listed).
    rejected = sa.and_(
        files.c.state == str(FileState.REJECTED),
        files.c.reason_code.not_in([str(code) for code in FROM_THE_WALK]),
    )
    scheduled = sa.and_(files.c.state == str(FileState.RETRY), files.c.next_attempt_at.is_not(None))
    waits: dict[str, Any] = {"state": str(FileState.WAITING), "attempts": 0}
    waits |= dict.fromkeys(("next_attempt_at", "reason_code", "reason", "processed_at"))
    with connect(store.engine, write=True) as connection:
        return connection.execute(sa.update(files).where(sa.or_(rejected, scheduled), *chosen).values(waits)).rowcount
