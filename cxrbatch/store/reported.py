"""What an output says of one image: the prediction of its current cascade and the readers' final label."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, select

from cxrbatch.store.connection import connect
from cxrbatch.store.queries import below
from cxrbatch.store.review_schema import ReviewAction, ReviewStatus, review_status, reviews
from cxrbatch.store.schema import FileState, files, images, models, predictions, scores
from cxrbatch.store.sql import AnyRow, chunks, execute_for, in_keys, utc_text

__all__ = ["Reported", "Selection", "all_reported", "not_dicom", "reported_image_ids", "reported_of"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which images: all conditions hold; an empty one holds for every image."""

    decisions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    reviewed_only: bool = False  # only with a final label of a reader
    roots: tuple[str, ...] = ()  # folders or files
    changed_since: datetime | None = None  # scored, linked, back, or read from this time on


@dataclass(frozen=True, slots=True)
class Reported:
    """One image that came as DICOM and has a prediction. Probabilities are calibrated, 0..1."""

    image_id: int
    cascade_id: int
    sha256: str  # of the file's bytes
    paths: tuple[str, ...]  # where these bytes lie, as the store keeps them (paths.py)
    cascade: str  # name and version of the bundle
    manifest_sha256: str  # with " exact" behind it where every pixel was decoded
    label: str
    confidence: float
    decision: str
    is_chest: bool | None
    gate_probability: float | None
    probabilities: tuple[tuple[str, float], ...]  # the likeliest first; empty where the disease model did not run
    label_set: tuple[str, ...]  # labels that are not ruled out; empty where the bundle does not say
    abnormal_probability: float | None
    threshold: float | None  # of `confidence`: below it the decision is needs_review
    gate_threshold: float | None
    ood_score: float | None
    review_reasons: tuple[str, ...]
    quality_flags: tuple[str, ...]
    processed_at: datetime
    final_label: str | None  # of the readers; None: not read, or they do not agree
    reviewed_at: datetime | None
    withdrawn_at: datetime | None = None  # a read that counted was taken back, and none was added since

    @property
    def revision(self) -> str:
        """Changes when what is said does: numbers, reasons, the readers' answer. Another revision is another object."""
        said = (
            self.label,
            self.label_set,
            self.decision,
            self.review_reasons,
            self.quality_flags,
            self.threshold,
            self.gate_threshold,
        )
        numbers = [
            self.confidence,
            self.abnormal_probability,
            self.gate_probability,
            self.ood_score,
            *dict(self.probabilities).values(),
        ]
        rounded = [None if number is None else f"{number:.4f}" for number in numbers]
        digest = hashlib.sha256(repr((said, [name for name, _ in self.probabilities], rounded)).encode()).hexdigest()
        read = "" if self.reviewed_at is None else f" {utc_text(self.reviewed_at)} {self.final_label or ''}".rstrip()
        # What a withdrawal leaves was said before, but a PACS that has the withdrawn read as its newest object must get
        # it once more, as a newer one.
        undone = "" if self.withdrawn_at is None else f" withdrawn {utc_text(self.withdrawn_at)}"
        return digest[:16] + read + undone

    @property
    def content_time(self) -> datetime:
        """When what is said became true: the same for every copy of an object, whenever it is made."""
        times = (self.processed_at, self.reviewed_at, self.withdrawn_at)
        return max(time for time in times if time is not None)


def reported_image_ids(connection: Connection, selection: Selection) -> Iterator[int]:
    """The images of a selection, each once, in the order in which they were first seen."""
    conditions = [files.c.state == str(FileState.DONE), images.c.format == "dicom"]
    if selection.decisions:
        conditions.append(files.c.decision.in_(selection.decisions))
    if selection.labels:
        conditions.append(files.c.label.in_(selection.labels))
    if selection.roots:
        conditions.append(below(files.c.path, selection.roots))
    if selection.reviewed_only:
        read = review_status.c.image_id == files.c.image_id
        conditions.append(select(review_status.c.image_id).where(read, review_status.c.label.is_not(None)).exists())
    if selection.changed_since is not None:
        # Not processed_at: a path that came back, or a copy, has a prediction that may be much older.
        conditions.append(sa.or_(files.c.last_seen >= selection.changed_since, _read_since(selection.changed_since)))
    query = (
        select(files.c.image_id)
        .join(images, images.c.id == files.c.image_id)
        .where(*conditions)
        .distinct()
        .order_by(files.c.image_id)
    )
    yield from connection.execution_options(yield_per=1000).execute(query).scalars()


def _read_since(moment: datetime) -> sa.ColumnElement[bool]:
    return files.c.image_id.in_(select(reviews.c.image_id).where(reviews.c.at >= moment))


def reported_of(connection: Connection, image_ids: Sequence[int]) -> dict[int, Reported]:
    """What is to be said of these images now, by id; those that have no prediction any more are left out."""
    dialect = connection.dialect.name
    paths: dict[int, list[AnyRow]] = {}
    for row in execute_for(connection, _select_files(dialect), image_ids):
        paths.setdefault(row.image_id, []).append(row)
    # Copies have one content and one cascade; while a new cascade is at work the newest answer counts.
    newest = {image_id: max(rows, key=lambda row: row.prediction_id) for image_id, rows in paths.items()}
    prediction_ids = [row.prediction_id for row in newest.values()]
    probabilities: dict[int, list[tuple[str, float]]] = {}
    for score in execute_for(connection, _select_scores(dialect), prediction_ids):
        probabilities.setdefault(score.prediction_id, []).append((score.label, score.probability))
    return {
        image_id: _reported(row, paths[image_id], probabilities.get(row.prediction_id, []))
        for image_id, row in newest.items()
    }


@cache
def _select_files(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return (
        select(
            *(files.c[name] for name in ("image_id", "prediction_id", "path", "label", "confidence", "decision")),
            *(predictions.c[name] for name in ("is_chest", "gate_probability", "ood_score", "review_reasons")),
            predictions.c.label_set,
            predictions.c.abnormal_probability,
            predictions.c.processed_at,
            predictions.c.cascade_id,
            images.c.sha256,
            images.c.quality_flags,
            models.c.name,
            models.c.version,
            models.c.manifest_sha256,
            models.c.manifest_json,
            review_status.c.label.label("final_label"),
            review_status.c.decided_at,
            _withdrawn_at().label("withdrawn_at"),
        )
        .join_from(files, images, images.c.id == files.c.image_id)
        .join(predictions, predictions.c.id == files.c.prediction_id)
        .join(models, models.c.id == predictions.c.cascade_id)
        .outerjoin(review_status, review_status.c.image_id == files.c.image_id)
        .where(in_keys(dialect, files.c.image_id), files.c.state == str(FileState.DONE), images.c.format == "dicom")
    )


def _withdrawn_at() -> sa.ScalarSelect[datetime]:
    """When the readers' answer was last changed by a withdrawal: after an adjudication only by one of adjudications.

    A withdrawal changes nothing where its reader had said nothing before: one that takes back a skip.
    """
    said = reviews.alias("said")
    took_back = select(said.c.id).where(
        said.c.image_id == reviews.c.image_id,
        said.c.reviewer == reviews.c.reviewer,
        said.c.id < reviews.c.id,
        said.c.action.not_in((str(ReviewAction.SKIP), str(ReviewAction.WITHDRAW))),
    )
    return (
        select(sa.func.max(reviews.c.at))
        .where(
            reviews.c.image_id == files.c.image_id,
            reviews.c.action == str(ReviewAction.WITHDRAW),
            reviews.c.repeat == 0,
            sa.or_(
                reviews.c.adjudication,
                review_status.c.status.is_(None),
                review_status.c.status != str(ReviewStatus.ADJUDICATED),
            ),
            took_back.exists(),
        )
        .correlate(files, review_status)
        .scalar_subquery()
    )


@cache
def _select_scores(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return (
        select(scores.c.prediction_id, scores.c.label, scores.c.probability)
        .where(in_keys(dialect, scores.c.prediction_id), scores.c.probability.is_not(None))
        .order_by(scores.c.prediction_id, scores.c.probability.desc(), scores.c.label)
    )


def _reported(row: AnyRow, copies: Sequence[AnyRow], probabilities: list[tuple[str, float]]) -> Reported:
    withdrawn_at = row.withdrawn_at
    if withdrawn_at is not None and row.decided_at is not None and withdrawn_at < row.decided_at:
        withdrawn_at = None  # the newer read is an object of its own
    return Reported(
        image_id=row.image_id,
        cascade_id=row.cascade_id,
        sha256=row.sha256,
        paths=tuple(copy.path for copy in copies),
        cascade=f"{row.name} {row.version}",
        manifest_sha256=row.manifest_sha256,
        label=row.label,
        confidence=row.confidence,
        decision=row.decision,
        is_chest=row.is_chest,
        gate_probability=row.gate_probability,
        probabilities=tuple(probabilities),
        label_set=tuple(row.label_set.split("|")) if row.label_set else (),
        abnormal_probability=row.abnormal_probability,
        threshold=_threshold(row.manifest_json, "disease"),
        gate_threshold=_threshold(row.manifest_json, "gate"),
        ood_score=row.ood_score,
        review_reasons=_words(row.review_reasons),
        quality_flags=_words(row.quality_flags),
        processed_at=row.processed_at,
        final_label=row.final_label,
        reviewed_at=row.decided_at,
        withdrawn_at=withdrawn_at,
    )


@cache
def _threshold(manifest_json: str, role: str) -> float | None:
    stages = json.loads(manifest_json).get("stages", [])
    return next((float(stage["threshold"]) for stage in stages if stage.get("role") == role), None)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def all_reported(engine: Engine, selection: Selection, page: int = 100) -> Iterator[Reported]:
    """`reported_of` for a whole selection, a page at a time."""
    with connect(engine) as connection:
        ids = list(reported_image_ids(connection, selection))
    for some in chunks(ids, page):
        with connect(engine) as connection:
            yield from reported_of(connection, some).values()


def not_dicom(engine: Engine, roots: tuple[str, ...]) -> int:
    """How many scored images came as something else: they have no study to file a result in."""
    query = (
        select(sa.func.count(files.c.image_id.distinct()))
        .join(images, images.c.id == files.c.image_id)
        .where(files.c.state == str(FileState.DONE), images.c.format != "dicom")
    )
    with connect(engine) as connection:
        return int(connection.execute(query.where(below(files.c.path, roots)) if roots else query).scalar_one())
