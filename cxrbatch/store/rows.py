"""How an outcome becomes the row of a path in `files`, and how `--reprocess all` replaces rows.

A newer program may decode the same bytes differently. Nothing is lost: the replaced values go to audit, as JSON, with
the event "rescored".
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.errors import TRANSIENT_REASONS, ReasonCode
from cxrbatch.store.leases import Backoff, file_columns
from cxrbatch.store.paths import plain
from cxrbatch.store.schema import FileState, audit, files, images, predictions, scores
from cxrbatch.store.sql import AnyRow, insert, utc_text
from cxrbatch.types import Outcome

__all__ = ["file_row", "replace_images", "replace_predictions", "upsert_files"]

#: What a row of files has of its content.
IMAGE_COLUMNS = ("image_id", "sha256", "sop_instance_uid", "study_instance_uid")

_REASON_CHARACTERS = 1000
_NOISE = 1e-6  # of a confidence. Smaller differences are floating-point noise.
#: How a file that is still being copied is rejected.
_MAY_BE_ON_ITS_WAY = frozenset({ReasonCode.TRUNCATED, ReasonCode.EMPTY_FILE})


def file_row(path: str, outcome: Outcome, old: AnyRow | None, now: datetime, backoff: Backoff | None) -> dict[str, Any]:
    """A row of files without the columns from other tables: waiting, or rejected with the reason."""
    row: dict[str, Any] = {
        "path": path,
        **file_columns(outcome.file),
        "state": str(FileState.WAITING),
        "first_seen": now,
        "last_seen": now,
        "attempts": 0,
        "is_copy": False,
    }
    nothing = (*IMAGE_COLUMNS, "prediction_id", "label", "confidence", "decision", "processed_at")
    row |= dict.fromkeys((*nothing, "reason_code", "reason", "next_attempt_at"))
    if outcome.rejected is None:
        return row
    same = old is not None and (old.size, old.mtime_ns) == (row["size"], row["mtime_ns"])
    row["reason_code"] = str(outcome.rejected.reason_code)
    row["reason"] = plain(outcome.rejected.reason, _REASON_CHARACTERS)
    row["processed_at"] = now
    attempt = old.attempts + 1 if old is not None and same else 1
    if outcome.rejected.reason_code in TRANSIENT_REASONS or (
        backoff is not None and outcome.rejected.reason_code in _MAY_BE_ON_ITS_WAY and attempt < backoff.truncated_tries
    ):
        row["state"] = str(FileState.RETRY)
        row["attempts"] = attempt
        if outcome.file.problem is None:  # only a walk can clear a problem of the name
            row["next_attempt_at"] = now if backoff is None else now + backoff.before(attempt)
    else:
        row["state"] = str(FileState.REJECTED)
        if old is not None and same and old.reason_code == row["reason_code"]:
            row["processed_at"] = old.processed_at  # same bytes, same outcome: nothing has changed
    return row


@cache
def upsert_files(dialect: str) -> Any:
    statement = insert(dialect, files)
    kept = ("id", "path", "first_seen")
    cleared = ("lease_owner", "lease_until", "missing_since")
    taken = {c.name: statement.excluded[c.name] for c in files.c if c.name not in kept + cleared}
    taken |= {name: sa.null() for name in cleared}
    return statement.on_conflict_do_update(index_elements=[files.c.path], set_=taken)


def replace_images(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Overwrite these rows of images, except the time of first_seen."""
    for row in rows:
        facts = {name: value for name, value in row.items() if name not in ("sha256", "first_seen")}
        connection.execute(sa.update(images).where(images.c.sha256 == row["sha256"]).values(facts))
        repeated = {name: row[name] for name in ("sop_instance_uid", "study_instance_uid")}
        connection.execute(sa.update(files).where(files.c.sha256 == row["sha256"]).values(repeated))


def replace_predictions(connection: Connection, pairs: list[tuple[AnyRow, dict[str, Any]]], now: datetime) -> list[int]:
    """Replace rows of predictions (old, new) that differ; returns their image ids. Their scores are deleted."""
    replaced = []
    for old, new in pairs:
        same = (old.label, old.decision, old.review_reasons) == tuple(
            new[name] for name in ("label", "decision", "review_reasons")
        )
        if same and abs(old.confidence - new["confidence"]) < _NOISE:
            continue
        replaced.append(old.image_id)
        numbers = connection.execute(select(scores).where(scores.c.prediction_id == old.id)).all()
        before = {
            "run_id": old.run_id,
            "label": old.label,
            "confidence": old.confidence,
            "decision": old.decision,
            "gate_probability": old.gate_probability,
            "processed_at": utc_text(old.processed_at),
            "probabilities": {row.label: row.probability for row in numbers},
        }
        shown = select(files.c.path).where(files.c.prediction_id == old.id).order_by(files.c.path)
        paths = connection.execute(shown).scalars()
        entries = [
            {
                "at": now,
                "event": "rescored",
                "path": path,
                "run_id": new["run_id"],
                "old": old.label,
                "new": new["label"],
                "detail": json.dumps(before),
            }
            for path in paths
        ]
        if entries:
            connection.execute(sa.insert(audit), entries)
        connection.execute(sa.delete(scores).where(scores.c.prediction_id == old.id))
        connection.execute(sa.update(predictions).where(predictions.c.id == old.id).values(new))
        copied = {name: new[name] for name in ("label", "confidence", "decision", "processed_at")}
        connection.execute(sa.update(files).where(files.c.prediction_id == old.id).values(copied))
    return replaced
