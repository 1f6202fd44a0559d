"""How a decoded image and its prediction become rows of `images`, `predictions` and `scores`, repeated in `files`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.store.paths import plain
from cxrbatch.store.schema import FileState, predictions
from cxrbatch.store.sql import AnyRow, execute_for, in_keys
from cxrbatch.types import DecodedImage, ImageFacts, Prediction

__all__ = ["image_columns", "image_row", "prediction_columns", "prediction_row", "predictions_of", "score_rows"]

_HEADER_CHARACTERS = 300  # kept of one header field
_HEADER_TEXTS = (
    "photometric_interpretation",
    "transfer_syntax_uid",
    "modality",
    "body_part_examined",
    "view_position",
    "sop_class_uid",
    "sop_instance_uid",
    "series_instance_uid",
    "study_instance_uid",
    "patient_id_hash",
    "accession_number_hash",
    "manufacturer",
    "study_date",
    "decoder",
    "grey_path",
)


def image_columns(image_id: int, image: DecodedImage) -> dict[str, Any]:
    """What files repeats of images."""
    uids = ("sop_instance_uid", "study_instance_uid")
    copied: dict[str, Any] = {name: plain(getattr(image.facts, name), _HEADER_CHARACTERS) for name in uids}
    return copied | {"image_id": image_id, "sha256": image.sha256}


def prediction_columns(prediction: AnyRow) -> dict[str, Any]:
    """What files repeats of predictions."""
    return {
        "state": str(FileState.DONE),
        "prediction_id": prediction.id,
        "label": prediction.label,
        "confidence": prediction.confidence,
        "decision": prediction.decision,
        "processed_at": prediction.processed_at,
    }


def image_row(sha256: str, facts: ImageFacts, now: datetime) -> dict[str, Any]:
    return {
        "sha256": sha256,
        "format": facts.format,
        "rows": facts.rows,
        "columns": facts.columns,
        "bits_stored": facts.bits_stored,
        "number_of_frames": facts.number_of_frames,
        **{name: plain(getattr(facts, name), _HEADER_CHARACTERS) for name in _HEADER_TEXTS},
        "inverted": bool(facts.inverted),
        "grey_mean": facts.grey_mean,
        "quality_flags": plain(",".join(facts.quality_flags), _HEADER_CHARACTERS),
        "first_seen": now,
    }


def prediction_row(prediction: Prediction) -> dict[str, Any]:
    """Raises ValueError for a number that is not finite."""
    return {
        "gate_probability": _finite(prediction.gate_probability),
        "is_chest": prediction.is_chest,
        "label": prediction.label,
        "confidence": _finite(prediction.confidence),
        "decision": str(prediction.decision),
        "ood_score": _finite(prediction.ood_score),
        "review_reasons": ",".join(prediction.review_reasons),
        "label_set": "|".join(prediction.label_set) or None,
        "abnormal_probability": _finite(prediction.abnormal_probability),
        "scores_json": _scores_json(prediction.probabilities),
    }


def _scores_json(probabilities: dict[str, float]) -> str | None:
    """The calibrated probabilities as JSON, in the bundle's order of classes; None where there are none."""
    if not probabilities:
        return None
    return json.dumps({label: round(_finite(p) or 0.0, 6) for label, p in probabilities.items()})


@cache
def _select_predictions(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return select(predictions).where(
        in_keys(dialect, predictions.c.image_id), predictions.c.cascade_id == sa.bindparam("cascade")
    )


def predictions_of(connection: Connection, image_ids: Iterable[int | None], cascade_id: int) -> dict[int, AnyRow]:
    """The rows of `predictions` of this cascade for these contents, by image id."""
    query = _select_predictions(connection.dialect.name)
    return {row.image_id: row for row in execute_for(connection, query, image_ids, cascade=cascade_id)}


def score_rows(prediction_id: int, prediction: Prediction) -> list[dict[str, Any]]:
    return [
        {
            "prediction_id": prediction_id,
            "label": label,
            "logit": _finite(prediction.logits.get(label)),
            "probability": _finite(prediction.probabilities.get(label)),
        }
        for label in sorted(prediction.logits.keys() | prediction.probabilities.keys())
    ]


def _finite(number: float | None) -> float | None:
    if number is None:
        return None
    if not math.isfinite(number):
        raise ValueError("a prediction holds a number that is not finite")
    return float(number)  # psycopg does not accept numpy numbers
