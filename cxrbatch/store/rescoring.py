"""`--reprocess all`: a newer program may read the same bytes differently, and replaces the numbers.

Nothing is lost by it: what was replaced goes to audit, as JSON, under the event "rescored".
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.store.columns import utc_text
from cxrbatch.store.keys import AnyRow
from cxrbatch.store.schema import audit, files, images, predictions, scores

__all__ = ["replace_images", "replace_predictions"]

_NOISE = 1e-6  # of a confidence: less is another order of additions


def replace_images(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Overwrite what is known of these contents (rows of images), but not when they were first seen."""
    for row in rows:
        facts = {name: value for name, value in row.items() if name not in ("sha256", "first_seen")}
        connection.execute(sa.update(images).where(images.c.sha256 == row["sha256"]).values(facts))


def replace_predictions(connection: Connection, pairs: list[tuple[AnyRow, dict[str, Any]]], now: datetime) -> list[int]:
    """Replace rows of predictions (old, new) that differ; returns their image ids, whose scores are gone."""
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
        paths = connection.execute(select(files.c.path).where(files.c.prediction_id == old.id)).scalars()
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
