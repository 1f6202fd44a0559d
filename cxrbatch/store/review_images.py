"""What the review shows of one image, and what it writes beside the reviews: leases and the audit of views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.store.connection import connect
from cxrbatch.store.paths import plain
from cxrbatch.store.review_schema import NO_ROUND, review_leases, round_items, round_readers, rounds
from cxrbatch.store.schema import FileState, audit, files, images, models, predictions, runs, scores
from cxrbatch.store.sql import AnyRow, insert
from cxrbatch.store.store import Store
from cxrbatch.store.work_list import hidden_from

__all__ = [
    "LEASE_S",
    "ReviewImage",
    "Source",
    "hidden_images",
    "in_round",
    "is_hidden",
    "newest_cascade",
    "related",
    "review_image",
    "source_of",
    "take_lease",
    "write_audit",
]

LEASE_S = 300


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of an image lie."""

    path: str  # as the store keeps it (paths.py)
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ReviewImage:
    """An image and what is known of it; the prediction is the one that its file shows."""

    image: AnyRow  # of images
    file: AnyRow | None  # of files: the first one that is done, else any; None: pruned
    prediction: AnyRow | None  # of predictions
    scores: Sequence[AnyRow]  # of scores
    cascade: AnyRow | None  # of models
    run: AnyRow | None  # of runs


def review_image(connection: Connection, image_id: int) -> ReviewImage | None:
    """None where the store knows no such image."""
    image = connection.execute(select(images).where(images.c.id == image_id)).first()
    if image is None:
        return None
    file = _file_of(connection, image_id)
    if file is None or file.prediction_id is None:
        return ReviewImage(image, file, None, [], None, None)
    prediction = connection.execute(select(predictions).where(predictions.c.id == file.prediction_id)).one()
    scored = select(scores).where(scores.c.prediction_id == prediction.id).order_by(scores.c.label)
    return ReviewImage(
        image,
        file,
        prediction,
        connection.execute(scored).all(),
        connection.execute(select(models).where(models.c.id == prediction.cascade_id)).first(),
        connection.execute(select(runs).where(runs.c.id == prediction.run_id)).first(),
    )


def source_of(connection: Connection, image_id: int) -> Source | None:
    """A file that holds the image; None where none is there any more."""
    row = _file_of(connection, image_id)
    if row is None or row.state == str(FileState.MISSING):
        return None
    sha256 = connection.execute(select(images.c.sha256).where(images.c.id == image_id)).scalar_one()
    return Source(row.path, row.size, row.mtime_ns, sha256)


def _file_of(connection: Connection, image_id: int) -> AnyRow | None:
    there = sa.case((files.c.state == str(FileState.DONE), 0), (files.c.state != str(FileState.MISSING), 1), else_=2)
    query = select(files).where(files.c.image_id == image_id).order_by(there, files.c.id).limit(1)
    return connection.execute(query).first()


def related(connection: Connection, image: AnyRow, reader: str, most: int = 20) -> list[AnyRow]:
    """Other images of the study, then other images of the patient, newest study first; none of a blinded round."""
    of: list[sa.ColumnElement[bool]] = []
    if image.study_instance_uid:
        of.append(images.c.study_instance_uid == image.study_instance_uid)
    if image.patient_id_hash:
        of.append(images.c.patient_id_hash == image.patient_id_hash)
    if not of:
        return []
    path = select(sa.func.min(files.c.path)).where(files.c.image_id == images.c.id).scalar_subquery()
    same_study = images.c.study_instance_uid == (image.study_instance_uid or "-")
    query = (
        select(
            images.c.id, path.label("path"), images.c.study_date, images.c.view_position, same_study.label("same_study")
        )
        .where(sa.or_(*of), images.c.id != image.id, sa.not_(hidden_from(reader, images.c.id)))
        .order_by(sa.desc(same_study), images.c.study_date.desc(), images.c.id)
        .limit(most)
    )
    return list(connection.execute(query))


def is_hidden(connection: Connection, reader: str, image_id: int) -> bool:
    """Whether what is known of an image has to be kept from a reader (see work_list.hidden_from)."""
    query = select(images.c.id).where(images.c.id == image_id, hidden_from(reader, images.c.id))
    return connection.execute(query).first() is not None


def hidden_images(connection: Connection, reader: str) -> set[int]:
    """Ids of all images of open blinded rounds that a reader reads in."""
    query = (
        select(round_items.c.image_id)
        .join(rounds, rounds.c.id == round_items.c.round_id)
        .join(round_readers, round_readers.c.round_id == rounds.c.id)
        .where(rounds.c.blinded, rounds.c.closed_at.is_(None), round_readers.c.reader == reader)
    )
    return set(connection.execute(query).scalars())


def in_round(connection: Connection, round_id: int, image_id: int) -> bool:
    query = select(round_items.c.id).where(round_items.c.round_id == round_id, round_items.c.image_id == image_id)
    return connection.execute(query.limit(1)).first() is not None


def newest_cascade(connection: Connection) -> AnyRow | None:
    """The bundle that was first used last; None: nothing was ever scored."""
    return connection.execute(select(models).order_by(models.c.id.desc()).limit(1)).first()


def take_lease(connection: Connection, store: Store, image_id: int, reader: str, round_id: int = NO_ROUND) -> str:
    """Note that a reader has an image open; returns who else had it open until now, or "".

    The lease passes to who opened it last: it informs and never blocks.
    """
    now = store.now(connection)
    key = {"image_id": image_id, "round_id": round_id}
    held = connection.execute(
        select(review_leases).where(*(review_leases.c[name] == value for name, value in key.items()))
    ).first()
    taken = {"reader": reader, "until": now + timedelta(seconds=LEASE_S)}
    written = insert(connection.dialect.name, review_leases).values(key | taken)
    connection.execute(written.on_conflict_do_update(index_elements=list(key), set_=taken))
    return held.reader if held is not None and held.reader != reader and held.until > now else ""


def write_audit(store: Store, actor: str, event: str, *, path: str | None = None, detail: str = "") -> None:
    """Append what somebody did to `audit`."""
    with connect(store.engine, write=True) as connection:
        said = plain(detail, 8000)  # it may name a file of the user's, and such a name is bytes
        row: dict[str, Any] = {"at": store.now(connection), "event": event, "path": path, "detail": said}
        connection.execute(sa.insert(audit), row | {"actor": actor})
