"""`cxrbatch show --json`: everything from the file to the result and where it was sent, for programs.

Keys are added, never renamed or taken away, while `trace_version` stays the same (docs/howto/pacs.md).
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import RowMapping

from cxrbatch.errors import Fatal
from cxrbatch.intake.remote import normal_path
from cxrbatch.ops.progress import NOT_A_DIAGNOSIS
from cxrbatch.settings import Settings
from cxrbatch.store import Store, outbox
from cxrbatch.store.queries import FileHistory, StoredPrediction
from cxrbatch.store.sql import utc_text

__all__ = ["TRACE_VERSION", "is_path", "print_trace", "trace_of"]

TRACE_VERSION = 1
# fmt: off
_FILE = (
    "path", "state", "label", "confidence", "decision", "reason_code", "reason", "processed_at", "size", "mtime_ns",
    "attempts", "next_attempt_at", "first_seen", "last_seen", "missing_since",
)
_PREDICTION = (
    "label", "confidence", "decision", "is_chest", "gate_probability", "ood_score", "review_reasons", "label_set",
    "abnormal_probability", "scores_json", "processed_at",
)
_CASCADE = ("name", "version", "manifest_sha256", "stages", "weights_sha256", "first_used")
_RUN = ("id", "started_at", "finished_at", "host", "version", "device", "engine")
_REVIEW = (
    "reviewer", "action", "label", "comment", "at", "shown_label", "shown_confidence", "blinded", "adjudication",
)
_SENT = (
    "destination", "kind", "revision", "sop_instance_uid", "state", "attempts", "last_status", "next_attempt_at",
    "created_at", "sent_at",
)
# fmt: on


def print_trace(settings: Settings, what: str) -> None:
    """The trace of one path or content as JSON on standard output. Raises Fatal when nothing is known of it."""
    path = normal_path(what) if is_path(what) else what
    with Store.open(settings.db, may_create=False, read_only=True) as store:
        print(json.dumps(trace_of(store, path), indent=2, allow_nan=False))


def is_path(what: str) -> bool:
    """Whether this means a file, not the digits of a content."""
    return "/" in what or Path(what).exists()


def trace_of(store: Store, path_or_sha256: str) -> dict[str, Any]:
    """The document, with values that JSON has. Raises Fatal when nothing is known of the file."""
    try:
        found = store.everything_about(path_or_sha256)
    except ValueError as error:
        raise Fatal(f"{error}.") from None
    if not found:
        raise Fatal("The store knows no such file or content; `cxrbatch scan` its folder first.")
    return {
        "trace_version": TRACE_VERSION,
        "note": NOT_A_DIAGNOSIS,
        "files": [_file(store, history) for history in found],
    }


def _file(store: Store, history: FileHistory) -> dict[str, Any]:
    image = history.image
    sent = [] if image is None else outbox.of_image(store, image["id"])
    return {
        "file": _chosen(history.file, _FILE),
        "image": None if image is None else _chosen(image, tuple(name for name in image if name != "id")),
        "current": {
            name: _plain(history.result[name])
            for name in ("cascade", "review_label", "review_status", "reviewed_by", "reviewed_at")
        },
        "predictions": [_prediction(stored) for stored in history.predictions],
        "reviews": [_chosen(row, _REVIEW) for row in history.reviews],
        "sent": [_chosen(row._mapping, _SENT) for row in sent],
        "same_content": list(history.same_image),
        "history": [_chosen(row, ("at", "event", "old", "new", "detail")) for row in history.history],
    }


def _prediction(stored: StoredPrediction) -> dict[str, Any]:
    return {
        **_chosen(stored.prediction, _PREDICTION),
        "scores": [_chosen(row, ("label", "probability", "logit")) for row in stored.scores],
        "cascade": _chosen(stored.cascade, _CASCADE),
        "run": _chosen(stored.run, _RUN),
    }


def _chosen(row: RowMapping, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: _plain(row[name]) for name in names}


def _plain(value: Any) -> Any:
    return utc_text(value) if isinstance(value, datetime) else value
