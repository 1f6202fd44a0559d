"""What the image page gets of one image, as JSON: in full, or without anything that a blinded reader may not see."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import Connection

from cxrbatch.store.review_images import ReviewImage, related
from cxrbatch.store.review_schema import NO_ROUND
from cxrbatch.store.reviews import SPECIAL_LABELS, current_reads, history, status_of
from cxrbatch.store.sql import AnyRow, utc_text

__all__ = ["Shown", "blinded_state", "choices", "open_state", "parse_shown"]

_DEFAULT_CLASSES = ("NORMAL", "COVID19", "PNEUMONIA", "TUBERCULOSIS")
_SPECIAL_KEYS = dict(zip(SPECIAL_LABELS, "oxu", strict=True))
_PROVENANCE = ("decoder", "grey_path", "grey_mean", "inverted", "photometric_interpretation", "transfer_syntax_uid")
_HEADER = ("modality", "body_part_examined", "view_position", "manufacturer", "study_date")


@dataclass(frozen=True, slots=True)
class Shown:
    """What a page shows of an image: travels to the browser, signed, and comes back with the act."""

    image_id: int
    label: str | None
    confidence: float | None
    cascade_id: int | None
    blinded: bool
    round_id: int
    repeat: int
    opened_at: str  # ISO 8601
    adjudication: bool = False

    def text(self) -> str:
        return json.dumps([getattr(self, name) for name in self.__slots__], separators=(",", ":"))


def parse_shown(text: str) -> Shown:
    """Raises ValueError for what is no such text (its signature is checked before)."""
    values = json.loads(text)
    if not isinstance(values, list) or len(values) != len(Shown.__slots__):
        raise ValueError("not what a page shows")
    return Shown(*values)


def choices(cascade: AnyRow | None, scored: list[str]) -> list[dict[str, str]]:
    """The labels that a reader may give, each with its key."""
    classes = list(_disease_stage(cascade).get("classes", [])) or _in_usual_order(scored) or list(_DEFAULT_CLASSES)
    keyed = [{"key": str(number), "label": label} for number, label in enumerate(classes[:9], 1)]
    return keyed + [{"key": key, "label": label} for label, key in _SPECIAL_KEYS.items()]


def _in_usual_order(labels: list[str]) -> list[str]:
    place = {label: number for number, label in enumerate(_DEFAULT_CLASSES)}
    return sorted(labels, key=lambda label: (place.get(label, 99), label))


def blinded_state(image_id: int, newest: AnyRow | None, now: datetime) -> tuple[Shown, dict[str, Any]]:
    """What a blinded reader gets: nothing here depends on the image but its id.

    Its name and folder are left out too: people sort files into folders by their label.
    """
    shown = Shown(image_id, None, None, None, True, NO_ROUND, 0, now.isoformat())
    return shown, {"id": image_id, "blinded": True, "name": "", "choices": choices(newest, [])}


def open_state(connection: Connection, found: ReviewImage, reader: str, now: datetime) -> tuple[Shown, dict[str, Any]]:
    """Everything that is known of an image, for somebody who may see it."""
    image, file, prediction = found.image, found.file, found.prediction
    shown = Shown(
        image.id,
        None if prediction is None else prediction.label,
        None if prediction is None else prediction.confidence,
        None if prediction is None else prediction.cascade_id,
        False,
        NO_ROUND,
        0,
        now.isoformat(),
    )
    status = status_of(connection, image.id)
    path = PurePosixPath(file.path) if file is not None else None
    state: dict[str, Any] = {
        "id": image.id,
        "blinded": False,
        "name": path.name if path else f"image {image.id}",
        "folder": str(path.parent) if path else "",
        "there": file is not None and file.state != "missing",
        "label": shown.label,
        "confidence": shown.confidence,
        "decision": None if prediction is None else prediction.decision,
        "label_set": [] if prediction is None else [each for each in (prediction.label_set or "").split("|") if each],
        "why": _words(prediction.review_reasons if prediction is not None else ""),
        "flags": _words(image.quality_flags),
        "bars": _bars(found),
        "choices": choices(found.cascade, [row.label for row in found.scores]),
        "facts": _facts(found),
        "status": None if status is None else {"status": status.status, "label": status.label, "by": status.decided_by},
        "mine": next(
            (
                {"action": row.action, "label": row.label}
                for row in current_reads(connection, image.id)
                if row.reader == reader and row.round_id == NO_ROUND
            ),
            None,
        ),
        "history": [
            {
                "at": utc_text(row.at),
                "reader": row.reviewer,
                "action": row.action,
                "label": row.label,
                "comment": row.comment,
                "shown": row.shown_label,
                "shown_confidence": row.shown_confidence,
                "blinded": row.blinded,
                "adjudication": row.adjudication,
            }
            for row in reversed(history(connection, image.id))
        ],
        "related": [
            {
                "id": row.id,
                "name": PurePosixPath(row.path or "").name,
                "study_date": row.study_date,
                "view": row.view_position,
                "same_study": bool(row.same_study),
            }
            for row in related(connection, image, reader)
        ],
    }
    return shown, state


def _bars(found: ReviewImage) -> list[dict[str, Any]]:
    prediction = found.prediction
    if prediction is None:
        return []
    stage = _disease_stage(found.cascade)
    order = {label: number for number, label in enumerate(stage.get("classes", []))}
    rows = sorted(found.scores, key=lambda row: order.get(row.label, 99))
    threshold = stage.get("threshold")
    chosen = (prediction.label_set or "").split("|")
    bars = [
        {
            "label": row.label,
            "probability": row.probability,
            "threshold": threshold if row.label == prediction.label else None,
            "in_set": row.label in chosen,
        }
        for row in rows
        if row.probability is not None
    ]
    if prediction.abnormal_probability is not None:
        bars.append({"label": "any abnormality", "probability": prediction.abnormal_probability, "threshold": None})
    if prediction.gate_probability is not None:
        bars.append({"label": "chest image", "probability": prediction.gate_probability, "threshold": None})
    return bars


def _facts(found: ReviewImage) -> list[tuple[str, str]]:
    image, prediction, cascade, run = found.image, found.prediction, found.cascade, found.run
    rows = [(name, _shown(getattr(image, name))) for name in _HEADER]
    rows += [("format", f"{image.format}, {image.columns} × {image.rows}, {image.bits_stored} bits")]
    rows += [(name, _shown(getattr(image, name))) for name in _PROVENANCE]
    rows += [("sha256", image.sha256)]
    if prediction is not None:
        rows += [
            ("unlike training", "" if prediction.ood_score is None else f"{prediction.ood_score:.2f} (above 1: yes)")
        ]
        rows += [("scored", utc_text(prediction.processed_at))]
    if cascade is not None:
        rows += [("bundle", f"{cascade.name} {cascade.version} ({cascade.manifest_sha256[:12]})")]
    if run is not None:
        rows += [("run", f"{run.id}: cxrbatch {run.version}, {run.engine} on {run.device}, {run.host}")]
    return [(name.replace("_", " "), value) for name, value in rows if value]


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, "") if isinstance(value, bool) else str(value or "")


def _disease_stage(cascade: AnyRow | None) -> dict[str, Any]:
    try:
        stages = json.loads(cascade.manifest_json).get("stages", []) if cascade is not None else []
        return next((stage for stage in stages if stage.get("role") == "disease"), {})
    except (ValueError, AttributeError):
        return {}


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
