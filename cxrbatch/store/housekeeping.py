"""Looking after a store: a copy of it, a check of it, and forgetting what has long been gone."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.errors import Fatal
from cxrbatch.store import migrate
from cxrbatch.store.engine import connect, make_engine, parse_url, sqlite_file
from cxrbatch.store.keys import among, bound, chunks
from cxrbatch.store.ledger import Store
from cxrbatch.store.schema import FileState, audit, files, images, predictions, reviews, scores
from cxrbatch.store.views import results

__all__ = ["Pruned", "backup", "check", "prune"]

_PAGE = 2000  # rows forgotten in one transaction: other writers wait no longer than that


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows went, or would go."""

    files: int
    images: int


def backup(url: str, target: Path) -> None:
    """Write a consistent copy of a SQLite store to a new file, also while it is in use.

    Raises Fatal for Postgres (whose own tool does this), or where the file is there or can't be written.
    """
    parsed = parse_url(url)
    if not parsed.drivername.startswith("sqlite"):
        raise Fatal("A Postgres store is backed up by Postgres: pg_dump --format=custom --file=FILE DATABASE.")
    make_engine(url).dispose()  # says what is wrong with the store, if anything is
    if os.path.lexists(target):
        raise Fatal(f"The backup {target} is there already: name a new file.")
    part = target.with_name(f".{target.name}.part")
    try:
        part.unlink(missing_ok=True)
        with closing(sqlite3.connect(sqlite_file(parsed), isolation_level=None)) as connection:
            connection.execute("VACUUM INTO ?", (os.fspath(part),))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(target)
    except (OSError, sqlite3.Error) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Fatal(f"The backup {target} cannot be written: {reason}.") from error


def check(url: str) -> list[str]:
    """What is wrong with a store, a sentence each: damage, dangling keys, schema, the view, stale copies.

    An empty list is a healthy store.
    """
    engine = make_engine(url)
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


def prune(store: Store, days: int, *, really: bool, now: datetime | None = None) -> Pruned:
    """Forget paths missing for `days`, and contents (with their predictions) that are left without a path.

    A content that a reader has reviewed is kept. So is audit, which is append-only. Without `really`, only
    counts.
    """
    moment = now or datetime.now(UTC)
    gone = sa.and_(files.c.state == str(FileState.MISSING), files.c.missing_since <= moment - timedelta(days=days))
    with connect(store.engine) as connection:
        file_ids = list(connection.execute(select(files.c.id).where(gone)).scalars())
        image_ids = list(connection.execute(_orphans(except_for=gone)).scalars())
    pruned = Pruned(len(file_ids), len(image_ids))
    if not really or pruned == Pruned(0, 0):
        return pruned
    for page in chunks(file_ids, _PAGE):
        with connect(store.engine, write=True) as connection:
            # Asked again: a file may have come back since we looked.
            _delete(connection, files, files.c.id, page, gone)
    for page in chunks(image_ids, _PAGE):
        with connect(store.engine, write=True) as connection:
            _forget_images(connection, page)
    with connect(store.engine, write=True) as connection:
        detail = json.dumps(asdict(pruned) | {"days": days})
        connection.execute(sa.insert(audit), {"at": moment, "event": "pruned", "detail": detail})
    return pruned


def _orphans(except_for: sa.ColumnElement[bool]) -> sa.Select[int]:
    """Ids of contents that no path holds, other than paths for which `except_for` is true, nor any review."""
    held = select(files.c.id).where(files.c.image_id == images.c.id, sa.not_(except_for))
    judged = select(reviews.c.id).join_from(reviews, predictions).where(predictions.c.image_id == images.c.id)
    return select(images.c.id).where(~held.exists(), ~judged.exists())


def _forget_images(connection: Connection, page: list[int]) -> None:
    keys = {"keys": bound(connection, page)}
    dialect = connection.dialect.name
    still = select(images.c.id).where(among(dialect, images.c.id), images.c.id.in_(_orphans(sa.false())))
    ids = list(connection.execute(still, keys).scalars())
    told = select(predictions.c.id).where(among(dialect, predictions.c.image_id))
    prediction_ids = list(connection.execute(told, {"keys": bound(connection, ids)}).scalars())
    _delete(connection, scores, scores.c.prediction_id, prediction_ids)
    _delete(connection, predictions, predictions.c.id, prediction_ids)
    _delete(connection, images, images.c.id, ids)


def _delete(
    connection: Connection,
    table: sa.Table,
    column: sa.Column[int],
    keys: list[int],
    condition: sa.ColumnElement[bool] | None = None,
) -> None:
    statement = sa.delete(table).where(among(connection.dialect.name, column))
    if condition is not None:
        statement = statement.where(condition)
    connection.execute(statement, {"keys": bound(connection, keys)})


def _damage(connection: Connection) -> list[str]:
    wrong = [
        f"SQLite finds damage: {row[0]}."
        for row in connection.exec_driver_sql("PRAGMA integrity_check")
        if row[0] != "ok"
    ]
    dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return wrong + ([f"{len(dangling)} rows refer to rows that are not there."] if dangling else [])


def _stale(connection: Connection) -> list[str]:
    """Whether what files repeats of predictions is still the same, and what it says of copies holds."""
    different = sa.or_(
        files.c.label != predictions.c.label,
        files.c.confidence != predictions.c.confidence,
        files.c.decision != predictions.c.decision,
        files.c.cascade_id != predictions.c.cascade_id,
        files.c.image_id.is_distinct_from(predictions.c.image_id),
    )
    joined = sa.join(files, predictions, files.c.prediction_id == predictions.c.id)
    count = connection.execute(select(sa.func.count()).select_from(joined).where(different)).scalar_one()
    wrong = [f"{count} files show another verdict than their prediction's row."] if count else []
    shared = select(files.c.image_id).where(files.c.image_id.is_not(None)).group_by(files.c.image_id)
    marked = select(files.c.image_id).where(files.c.is_copy)
    unmarked = shared.having(sa.func.count() > 1, files.c.image_id.not_in(marked)).subquery()
    count = connection.execute(select(sa.func.count()).select_from(unmarked)).scalar_one()
    return wrong + ([f"{count} contents have several paths, and none of them is marked as a copy."] if count else [])
