"""The row of a path in `files`: how an outcome turns into one."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from cxrbatch.errors import PASSING_REASONS, ReasonCode
from cxrbatch.nouns import Outcome, to_int64
from cxrbatch.store.columns import from_unsigned
from cxrbatch.store.keys import AnyRow, insert
from cxrbatch.store.leases import Waits
from cxrbatch.store.paths import plain
from cxrbatch.store.schema import FileState, files

__all__ = ["file_row", "told_by", "upsert_files"]

_REASON_CHARACTERS = 1000
#: What a file that is still being copied looks like.
_MAY_BE_ON_ITS_WAY = frozenset({ReasonCode.TRUNCATED, ReasonCode.EMPTY_FILE})


def told_by(prediction: AnyRow) -> dict[str, Any]:
    return {
        "state": str(FileState.DONE),
        "prediction_id": prediction.id,
        "label": prediction.label,
        "confidence": prediction.confidence,
        "decision": prediction.decision,
        "processed_at": prediction.processed_at,
    }


def file_row(path: str, outcome: Outcome, old: AnyRow | None, now: datetime, waits: Waits | None) -> dict[str, Any]:
    """A row of files without what only other tables know: waiting, or why it was rejected."""
    size, mtime_ns = to_int64(outcome.file.size), to_int64(outcome.file.mtime_ns)
    row: dict[str, Any] = {
        "path": path,
        "size": size,
        "mtime_ns": mtime_ns,
        "inode": from_unsigned(outcome.file.inode),
        "state": str(FileState.WAITING),
        "first_seen": now,
        "last_seen": now,
        "attempts": 0,
        "is_copy": False,
    }
    nothing = ("image_id", "prediction_id", "label", "confidence", "decision", "processed_at")
    row |= dict.fromkeys((*nothing, "reason_code", "reason", "next_attempt_at"))
    if outcome.rejected is None:
        return row
    same = old is not None and (old.size, old.mtime_ns) == (size, mtime_ns)
    row["reason_code"] = str(outcome.rejected.reason_code)
    row["reason"] = plain(outcome.rejected.reason, _REASON_CHARACTERS)
    row["processed_at"] = now
    attempt = old.attempts + 1 if old is not None and same else 1
    if outcome.rejected.reason_code in PASSING_REASONS or (
        waits is not None and outcome.rejected.reason_code in _MAY_BE_ON_ITS_WAY and attempt < waits.truncated_tries
    ):
        row["state"] = str(FileState.RETRY)
        row["attempts"] = attempt
        if waits is not None and outcome.file.problem is None:  # a problem of the name is the walk's to heal
            row["next_attempt_at"] = now + waits.before(attempt)
    else:
        row["state"] = str(FileState.REJECTED)
        if old is not None and same and old.reason_code == row["reason_code"]:
            row["processed_at"] = old.processed_at  # the same answer to the same bytes: nothing has changed
    return row


@cache
def upsert_files(dialect: str) -> Any:
    statement = insert(dialect, files)
    kept = ("id", "path", "first_seen")
    cleared = ("lease_owner", "lease_until", "missing_since")
    taken = {c.name: statement.excluded[c.name] for c in files.c if c.name not in kept + cleared}
    taken |= {name: sa.null() for name in cleared}
    return statement.on_conflict_do_update(index_elements=[files.c.path], set_=taken)
