"""Write outcomes: one transaction per batch; writing the same batch again changes nothing.

Rows are written in the order images, predictions, scores, files, each sorted by its key, so that two programs that
write to one Postgres wait for each other and never deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.errors import TRANSIENT_REASONS, Retry
from cxrbatch.failpoints import failpoint
from cxrbatch.instance_names import first_name_of
from cxrbatch.store.content_rows import (
    image_columns,
    image_row,
    prediction_columns,
    prediction_row,
    predictions_of,
    score_rows,
)
from cxrbatch.store.leases import Backoff, file_columns, owned
from cxrbatch.store.paths import path_to_text
from cxrbatch.store.rows import file_row, replace_images, replace_predictions, upsert_files
from cxrbatch.store.schema import FileState, audit, files, images, predictions, runs, scores
from cxrbatch.store.sql import AnyRow, execute_for, in_keys, insert_new
from cxrbatch.types import FoundFile, Outcome, Prediction, to_int64

__all__ = ["Recorded", "write_outcomes"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """Numbers of paths of a batch by result, and those without one."""

    done: int = 0
    rejected: int = 0
    retry: int = 0
    late: int = 0  # dropped: another owner took over the lease, or the file has changed since
    unscored: tuple[FoundFile, ...] = ()  # left `waiting`: this cascade's prediction of their content is not there

    @property
    def waiting(self) -> int:
        return len(self.unscored)


def write_outcomes(
    connection: Connection,
    run_id: int,
    cascade_id: int,
    outcomes: Sequence[Outcome],
    now: datetime,
    *,
    replace: bool = False,
    owner: str | None = None,
    backoff: Backoff | None = None,
) -> Recorded:
    """Write a batch inside the caller's transaction; with `owner`, only files that it still holds, as it claimed them.

    With `backoff`, a file that failed for a transient reason is scheduled for a retry (next_attempt_at). Of a path that
    occurs twice, only the last outcome counts. Raises ValueError for a prediction with a non-finite number: the cascade
    has to reject it with a reason code.
    """
    late = 0
    if owner is not None:
        held = owned(connection, owner, [outcome.file for outcome in outcomes])
        late = sum(outcome.file not in held for outcome in outcomes)
        outcomes = [outcome for outcome in outcomes if outcome.file in held]
    by_path = {path_to_text(outcome.file.path): outcome for outcome in outcomes}
    by_path = {path: by_path[path] for path in sorted(by_path)}
    failpoint("record.begun")
    before = _known(connection, by_path, lock=owner is None)
    shared = connection.dialect.name == "postgresql"  # SQLite has one writer, and its clock may be set back
    if shared and owner is None and backoff is None and before:
        started_at = connection.execute(select(runs.c.started_at).where(runs.c.id == run_id)).scalar_one()
        known_better = partial(_is_late, started_at=started_at, cascade_id=cascade_id, now=now, replace=replace)
        for path in [path for path, row in before.items() if known_better(by_path[path], row)]:
            del by_path[path], before[path]
            late += 1
    image_ids, met = _write_images(connection, by_path.values(), now, replace)
    new_predictions: dict[int, Prediction | None] = {}  # by content; None: known content, to be linked
    for outcome in by_path.values():
        if outcome.image is not None and outcome.rejected is None:
            image_id = image_ids[outcome.image.sha256]
            new_predictions[image_id] = new_predictions.get(image_id) or outcome.prediction
    failpoint("record.images")
    reported = _write_predictions(connection, run_id, cascade_id, new_predictions, now, replace)
    failpoint("record.predictions")
    rows = []
    for path, outcome in by_path.items():
        row = file_row(path, outcome, before.get(path), now, backoff) | {"run_id": run_id, "cascade_id": cascade_id}
        if outcome.image is not None:
            row |= image_columns(image_ids[outcome.image.sha256], outcome.image)
            old = before.get(path)
            same = old is not None and old.sha256 == outcome.image.sha256
            row["is_copy"] = old.is_copy if old is not None and same else row["image_id"] in met
            met.add(row["image_id"])
            if outcome.rejected is None and row["image_id"] in reported:
                row |= prediction_columns(reported[row["image_id"]])
        rows.append(row)
    if rows:
        connection.execute(upsert_files(connection.dialect.name), rows)
    failpoint("record.files")
    _write_changes(connection, run_id, by_path, before, now)
    contents = {
        path: outcome.image.sha256 if outcome.image else None
        for path, outcome in by_path.items()
        if not isinstance(outcome.rejected, Retry)
    }
    _write_duplicate_instances(connection, run_id, contents, now)
    states = [row["state"] for row in rows]
    counted = {str(state): states.count(state) for state in ("done", "rejected", "retry")}
    unscored = (by_path[row["path"]].file for row in rows if row["state"] == FileState.WAITING)
    return Recorded(**counted, late=late, unscored=tuple(unscored))


@cache
def _select_known(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return (
        select(
            files.c.path,
            files.c.size,
            files.c.mtime_ns,
            files.c.reason_code,
            files.c.processed_at,
            files.c.attempts,
            files.c.is_copy,
            files.c.version,
            files.c.state,
            files.c.cascade_id,
            files.c.lease_until,
            files.c.last_seen,
            images.c.sha256,
        )
        .outerjoin_from(files, images)
        .where(in_keys(dialect, files.c.path))
    )


def _known(connection: Connection, paths: Iterable[str], *, lock: bool) -> dict[str, AnyRow]:
    dialect = connection.dialect.name
    if lock and dialect == "postgresql":  # a transaction of SQLite is the only one that writes
        in_order = select(files.c.id).where(in_keys(dialect, files.c.path)).order_by(files.c.path)
        execute_for(connection, in_order.with_for_update(), paths).all()
    return {row.path: row for row in execute_for(connection, _select_known(dialect), paths)}


def _is_late(
    outcome: Outcome, old: AnyRow, *, started_at: datetime, cascade_id: int, now: datetime, replace: bool
) -> bool:
    """Whether a watcher beside this scan knows better (`old`): a newer file, or one that did not fail for it."""
    file, failed = outcome.file, outcome.rejected is not None and outcome.rejected.reason_code in TRANSIENT_REASONS
    now_there = file_columns(file)
    same_file = all(getattr(old, name) == now_there[name] for name in ("size", "mtime_ns", "version"))
    if not same_file:  # times have whole seconds: what was seen as this scan began is older than it
        is_newer = old.mtime_ns > to_int64(file.mtime_ns) or old.state in (FileState.WAITING, FileState.CLAIMED)
        return bool(old.last_seen > started_at and (failed or is_newer))
    if replace or not failed:
        return False
    is_done = old.state == FileState.DONE and old.cascade_id == cascade_id
    is_claimed = old.state == FileState.CLAIMED and old.lease_until >= now
    return bool(is_done or is_claimed)


@cache
def _select_images(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return select(images.c.sha256, images.c.id).where(in_keys(dialect, images.c.sha256))


@cache
def _select_held(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    held = select(files.c.id).where(files.c.image_id == images.c.id)
    return select(images.c.id).where(in_keys(dialect, images.c.id), held.exists())


def _write_images(
    connection: Connection, outcomes: Iterable[Outcome], now: datetime, replace: bool
) -> tuple[dict[str, int], set[int]]:
    """The ids of these contents by sha256, and which of them already existed."""
    facts = {outcome.image.sha256: outcome.image.facts for outcome in outcomes if outcome.image is not None}
    if not facts:
        return {}, set()
    query = _select_images(connection.dialect.name)
    ids = {row.sha256: row.id for row in execute_for(connection, query, facts)}
    met = set(ids.values())
    if replace:
        replace_images(connection, [image_row(sha256, facts[sha256], now) for sha256 in sorted(ids)])
    if new := sorted(facts.keys() - ids.keys()):
        insert_new(connection, images, [image_row(sha256, facts[sha256], now) for sha256 in new])
        ids = {row.sha256: row.id for row in execute_for(connection, query, facts)}
        # Another program may have inserted one first: our INSERT has waited for its commit.
        made = [ids[sha256] for sha256 in new]
        met |= set(execute_for(connection, _select_held(connection.dialect.name), made).scalars())
    return ids, met


def _write_predictions(
    connection: Connection,
    run_id: int,
    cascade_id: int,
    new_predictions: dict[int, Prediction | None],
    now: datetime,
    replace: bool,
) -> dict[int, AnyRow]:
    """The rows of this cascade for these contents, by image id; inserted for a prediction without a row."""
    if not new_predictions:
        return {}
    found = predictions_of(connection, new_predictions, cascade_id)
    made = {image_id: prediction for image_id, prediction in sorted(new_predictions.items()) if prediction is not None}
    fixed = {"cascade_id": cascade_id, "run_id": run_id, "processed_at": now}
    rows = {image_id: prediction_row(made[image_id]) | {"image_id": image_id} | fixed for image_id in made}
    new = [image_id for image_id in made if image_id not in found]
    if replace:
        again = [(found[image_id], rows[image_id]) for image_id in made if image_id in found]
        new += replace_predictions(connection, again, now)
    if new:
        insert_new(connection, predictions, [rows[i] for i in new if i not in found])
        found = predictions_of(connection, new_predictions, cascade_id)
        # Another program may have inserted a prediction first: all of its numbers are kept.
        insert_new(connection, scores, [row for i in new for row in score_rows(found[i].id, made[i])])
    return found


def _write_changes(
    connection: Connection,
    run_id: int,
    by_path: dict[str, Outcome],
    before: dict[str, AnyRow],
    now: datetime,
) -> None:
    """Write to audit the paths of a batch whose content has changed."""
    rows = []
    for path, old in sorted(before.items()):
        image, file = by_path[path].image, by_path[path].file
        new = image.sha256 if image is not None else None
        same_file = (old.size, old.mtime_ns) == (to_int64(file.size), to_int64(file.mtime_ns))
        if old.sha256 is None or old.sha256 == new or (new is None and same_file):
            continue  # first content, same content, or unreadable this time
        rows.append({"at": now, "event": "image_changed", "path": path, "old": old.sha256, "new": new})
    if rows:
        connection.execute(sa.insert(audit), [row | {"run_id": run_id} for row in rows])


def _write_duplicate_instances(
    connection: Connection, run_id: int, contents: Mapping[str, str | None], now: datetime
) -> None:
    """Write one audit row for each path that the receiver made for another data set with a known SOP Instance UID.

    `contents`: sha256 by path text, None if the file could not be decoded. The column `old` is the content of the first
    data set, if it is known by now.
    """
    first_of = {path: first for path in contents if (first := first_name_of(path)) is not None}
    if not first_of:
        return
    dialect = connection.dialect.name
    noted = select(audit.c.path).where(in_keys(dialect, audit.c.path), audit.c.event == "duplicate_instance")
    noted_paths = set(execute_for(connection, noted, first_of).scalars())
    known = select(files.c.path, images.c.sha256).join_from(files, images).where(in_keys(dialect, files.c.path))
    first_contents = {row.path: row.sha256 for row in execute_for(connection, known, set(first_of.values()))}
    rows = [
        {
            "at": now,
            "event": "duplicate_instance",
            "path": path,
            "run_id": run_id,
            "old": contents.get(first) or first_contents.get(first),
            "new": contents[path],
            "detail": "the same SOP Instance UID as " + first.rpartition("/")[2],
        }
        for path, first in sorted(first_of.items())
        if path not in noted_paths
    ]
    if rows:
        connection.execute(sa.insert(audit), rows)
