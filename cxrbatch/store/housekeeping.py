"""Maintain a store: back it up, check it, and prune rows of files that are long gone."""

from __future__ import annotations

import errno
import glob
import json
import os
import sqlite3
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.errors import Fatal
from cxrbatch.store import migrate
from cxrbatch.store.connection import connect, make_engine, store_file
from cxrbatch.store.review_schema import (
    reads,
    review_leases,
    review_status,
    reviews,
    round_assignments,
    round_items,
    rounds,
)
from cxrbatch.store.schema import FileState, audit, files, images, outbox, predictions, scores
from cxrbatch.store.sql import chunks, execute_for, in_keys
from cxrbatch.store.store import Store
from cxrbatch.store.views import results

__all__ = ["Pruned", "backup", "check", "prune"]

_PAGE = 2000  # rows deleted per transaction, so that other writers wait only briefly


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows were deleted, or would be."""

    files: int
    images: int
    reviews: int = 0  # of these images


def backup(url: str, target: Path) -> None:
    """Write a consistent copy of a SQLite store to a new file, even while it is in use.

    Raises Fatal for Postgres (use its own tool), or if the file exists or cannot be written.
    """
    store = store_file(url)
    if store is None:
        raise Fatal("A Postgres store is backed up by Postgres: pg_dump --format=custom --file=FILE DATABASE.")
    make_engine(url).dispose()  # raises Fatal if the store cannot be opened
    if os.path.lexists(target):
        raise Fatal(f"The backup {target} is there already: name a new file.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")  # not that of another backup to this name
    try:
        for left_over in target.parent.glob(f".{glob.escape(target.name)}.[0-9]*.part"):
            if not Path("/proc", left_over.suffixes[-2][1:]).exists():  # its process was killed
                left_over.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
        with closing(sqlite3.connect(store, isolation_level=None)) as connection:
            connection.execute("VACUUM INTO ?", (os.fspath(part),))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "another program has made it meanwhile")
        part.rename(target)
    except (OSError, sqlite3.Error) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Fatal(f"The backup {target} cannot be written: {reason}.") from error


def check(url: str) -> list[str]:
    """One sentence per problem of a store: damage, dangling keys, schema, the view, stale copies.

    The list is empty if the store is sound.
    """
    engine = make_engine(url, read_only=True)
    try:
        with connect(engine) as connection:
            wrong = _damage(connection) if connection.dialect.name == "sqlite" else []
            drift = migrate.drift(connection)
            if not drift:
                connection.execute(select(results).limit(1)).all()
                wrong += _stale(connection)
            return wrong + drift
    finally:
        engine.dispose()


def prune(
    store: Store, days: int, *, really: bool, include_reviewed: bool = False, now: datetime | None = None
) -> Pruned:
    """Forget paths missing for `days`, and contents (with their predictions) without a path for as long.

    A content that was overwritten is without one since then. One that a reader has reviewed, or that a round holds, is
    kept; with `include_reviewed` it goes with its reviews and its places in closed rounds, and only open rounds keep
    theirs. audit is append-only: nothing of it goes, and each transaction says there how many rows it deleted. Without
    `really`, only counts.
    """
    with connect(store.engine) as connection:
        moment = now or store.now(connection)
        before = moment - timedelta(days=days)
        gone = sa.and_(files.c.state == str(FileState.MISSING), files.c.missing_since <= before)
        file_ids = list(connection.execute(select(files.c.id).where(gone)).scalars())
        orphans = _orphans(connection.dialect.name, before, gone, include_reviewed)
        image_ids = list(connection.execute(orphans).scalars())
        judged = select(sa.func.count()).select_from(reviews).where(reviews.c.image_id.in_(orphans))
        pruned = Pruned(len(file_ids), len(image_ids), connection.execute(judged).scalar_one())
    if not really:
        return pruned
    deleted = []
    for page in chunks(file_ids, _PAGE):
        with connect(store.engine, write=True) as connection:
            # Check again: a file may have come back since the query.
            deleted.append(Pruned(_delete(connection, files, files.c.id, page, gone), 0))
            _note(connection, deleted[-1], days, moment)
    for page in chunks(image_ids, _PAGE):
        with connect(store.engine, write=True) as connection:
            deleted.append(_forget_images(connection, page, before, include_reviewed))
            _note(connection, deleted[-1], days, moment)
    return Pruned(
        sum(each.files for each in deleted), sum(each.images for each in deleted), sum(each.reviews for each in deleted)
    )


def _note(connection: Connection, pruned: Pruned, days: int, moment: datetime) -> None:
    if pruned != Pruned(0, 0):
        detail = json.dumps(asdict(pruned) | {"days": days})
        connection.execute(sa.insert(audit), {"at": moment, "event": "pruned", "detail": detail})


def _orphans(
    dialect: str, before: datetime, except_for: sa.ColumnElement[bool], include_reviewed: bool
) -> sa.Select[int]:
    """Ids of contents that no path has held since `before`, and that no reader needs.

    A path for which `except_for` is true does not count: it is about to be forgotten.
    """
    held = select(files.c.id).where(files.c.image_id == images.c.id, sa.not_(except_for))
    needed = select(round_items.c.id).where(round_items.c.image_id == images.c.id)
    if include_reviewed:
        in_open_round = needed.join(rounds, rounds.c.id == round_items.c.round_id).where(rounds.c.closed_at.is_(None))
        kept = [~in_open_round.exists()]
    else:
        kept = [~needed.exists(), ~select(reviews.c.id).where(reviews.c.image_id == images.c.id).exists()]
    overwritten = (audit.c.event == "image_changed", audit.c.at > before)
    if dialect == "postgresql":  # which reads a long NOT IN again for each image
        kept.append(~select(audit.c.id).where(*overwritten, audit.c.old == images.c.sha256).exists())
    else:  # which reads audit again for each image in a NOT EXISTS
        kept.append(images.c.sha256.not_in(select(audit.c.old).where(*overwritten, audit.c.old.is_not(None))))
    return select(images.c.id).where(~held.exists(), *kept, images.c.first_seen <= before)


def _forget_images(connection: Connection, page: list[int], before: datetime, include_reviewed: bool) -> Pruned:
    dialect = connection.dialect.name
    # Nobody can refer to them from now on. What another program is referring to just now is left to the next prune.
    locked = select(images.c.id).where(in_keys(dialect, images.c.id)).with_for_update(skip_locked=True)
    page = list(execute_for(connection, locked, page).scalars())
    still = _orphans(dialect, before, sa.false(), include_reviewed).where(in_keys(dialect, images.c.id))
    ids = list(execute_for(connection, still, page).scalars())
    judged = 0
    if include_reviewed:
        places = select(round_items.c.id).where(in_keys(dialect, round_items.c.image_id))
        item_ids = list(execute_for(connection, places, ids).scalars())
        _delete(connection, round_assignments, round_assignments.c.item_id, item_ids)
        for table in (round_items, review_status, reads):
            _delete(connection, table, table.c.image_id, ids)
        judged = _delete(connection, reviews, reviews.c.image_id, ids)
    reported = select(predictions.c.id).where(in_keys(dialect, predictions.c.image_id))
    prediction_ids = list(execute_for(connection, reported, ids).scalars())
    _delete(connection, outbox, outbox.c.image_id, ids)
    _delete(connection, scores, scores.c.prediction_id, prediction_ids)
    _delete(connection, predictions, predictions.c.id, prediction_ids)
    _delete(connection, review_leases, review_leases.c.image_id, ids)
    return Pruned(0, _delete(connection, images, images.c.id, ids), judged)


def _delete(
    connection: Connection,
    table: sa.Table,
    column: sa.Column[int],
    keys: list[int],
    condition: sa.ColumnElement[bool] | None = None,
) -> int:
    statement = sa.delete(table).where(in_keys(connection.dialect.name, column))
    if condition is not None:
        statement = statement.where(condition)
    return execute_for(connection, statement, keys).rowcount


def _damage(connection: Connection) -> list[str]:
    wrong = [
        f"SQLite finds damage: {row[0]}."
        for row in connection.exec_driver_sql("PRAGMA integrity_check")
        if row[0] != "ok"
    ]
    dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return wrong + ([f"{len(dangling)} rows refer to rows that are not there."] if dangling else [])


def _stale(connection: Connection) -> list[str]:
    """Check the columns of files that repeat predictions, and the marks of copies."""
    different = sa.or_(
        files.c.label != predictions.c.label,
        files.c.confidence != predictions.c.confidence,
        files.c.decision != predictions.c.decision,
        files.c.cascade_id != predictions.c.cascade_id,
        files.c.image_id.is_distinct_from(predictions.c.image_id),
    )
    joined = sa.join(files, predictions, files.c.prediction_id == predictions.c.id)
    count = connection.execute(select(sa.func.count()).select_from(joined).where(different)).scalar_one()
    wrong = [f"{count} files show another prediction than their prediction's row."] if count else []
    repeated = ("sha256", "sop_instance_uid", "study_instance_uid")
    different = sa.or_(*(files.c[name].is_distinct_from(images.c[name]) for name in repeated))
    joined = sa.join(files, images, files.c.image_id == images.c.id)
    count = connection.execute(select(sa.func.count()).select_from(joined).where(different)).scalar_one()
    wrong += [f"{count} files show another sha256 or UID than their image's row."] if count else []
    shared = select(files.c.image_id).where(files.c.image_id.is_not(None)).group_by(files.c.image_id)
    marks = sa.func.count(sa.case((files.c.is_copy, 1)))
    unmarked = shared.having(sa.func.count() > 1, marks == 0).subquery()
    count = connection.execute(select(sa.func.count()).select_from(unmarked)).scalar_one()
    return wrong + ([f"{count} contents have several paths, and none of them is marked as a copy."] if count else [])
