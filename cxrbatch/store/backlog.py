"""How much waits, for how long, and who works on it: the figures of `cxrbatch status` and of the metrics.

Every query here goes along an index and stays cheap in a store of a million rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select, update

from cxrbatch.store.connection import connect
from cxrbatch.store.outbox_schema import OutboxState, outbox
from cxrbatch.store.review_schema import ReviewAction, review_status, reviews
from cxrbatch.store.schema import FileState, files, runs
from cxrbatch.store.store import Store
from cxrbatch.types import Decision

__all__ = ["Backlog", "Daemon", "read_backlog", "read_daemons", "read_rates", "write_heartbeat"]

QUEUE_STATES = (FileState.WAITING, FileState.CLAIMED, FileState.RETRY)
_OLDEST_OF = 20_000  # waiting files whose age is compared; they are claimed in about the order of their ids
_RUNS = 200  # the newest runs that may be daemons


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is still to be done."""

    queue: dict[str, int]  # files by state: waiting, claimed, retry
    oldest_age_s: float  # since the oldest file that waits or is claimed was queued; 0 where there is none
    review_waiting: int  # images that need review and have none
    reviews: dict[str, int]  # rows by action
    outbox: dict[str, int] = field(default_factory=dict)  # objects for a PACS, by state


@dataclass(frozen=True, slots=True)
class Daemon:
    """One `cxrbatch watch`, as its last heartbeat described it."""

    run_id: int
    host: str
    version: str
    started_at: datetime
    age_s: float  # since its last heartbeat, by the clock of the store
    finished: bool  # it stopped and said so
    processed: int
    roots: list[Mapping[str, Any]] = field(default_factory=list)  # folder, mode, paused, walk_age_s


def read_backlog(store: Store) -> Backlog:
    """Raises StoreDown."""
    with connect(store.engine) as connection:
        now = store.now(connection)
        in_queue = files.c.state.in_([str(state) for state in QUEUE_STATES])
        by_state = select(files.c.state, sa.func.count()).where(in_queue).group_by(files.c.state)
        queue = {str(state): 0 for state in QUEUE_STATES}
        queue |= dict(connection.execute(by_state).all())
        needs_review = select(sa.func.count()).where(
            files.c.decision == str(Decision.NEEDS_REVIEW), files.c.state == str(FileState.DONE)
        )
        unread = needs_review.where(~_reviewed().exists())
        by_action = select(reviews.c.action, sa.func.count()).group_by(reviews.c.action)
        acts = {str(action): 0 for action in ReviewAction}
        acts |= dict(connection.execute(by_action).all())
        by_fate = select(outbox.c.state, sa.func.count()).group_by(outbox.c.state)
        objects = {str(state): 0 for state in OutboxState}
        objects |= dict(connection.execute(by_fate).all())
        unread_files = int(connection.execute(unread).scalar_one())
        return Backlog(queue, _oldest_s(connection, now), unread_files, acts, objects)


def _reviewed() -> sa.Select[Any]:
    return select(review_status.c.image_id).where(review_status.c.image_id == files.c.image_id)


def _oldest_s(connection: Connection, now: datetime) -> float:
    ages = [0.0]
    for state in (FileState.WAITING, FileState.CLAIMED):
        # last_seen of a file in the queue is the time when it was queued.
        some = select(files.c.last_seen).where(files.c.state == str(state)).limit(_OLDEST_OF).subquery()
        oldest = connection.execute(select(sa.func.min(some.c.last_seen, type_=files.c.last_seen.type))).scalar_one()
        if oldest is not None:
            ages.append((now - oldest).total_seconds())
    return max(ages)


def read_rates(store: Store, hours: float) -> tuple[int, dict[str, int]]:
    """Files that got an outcome within the last `hours`, and how many of them by reason code. Raises StoreDown."""
    with connect(store.engine) as connection:
        since = store.now(connection) - timedelta(hours=hours)
        recent = files.c.processed_at >= since
        total = connection.execute(select(sa.func.count()).where(recent)).scalar_one()
        why = (
            select(files.c.reason_code, sa.func.count())
            .where(recent, files.c.reason_code.is_not(None))
            .group_by(files.c.reason_code)
            .order_by(sa.func.count().desc(), files.c.reason_code)
        )
        return int(total), {str(code): number for code, number in connection.execute(why)}


def write_heartbeat(store: Store, run_id: int, *, processed: int, roots: Sequence[Mapping[str, Any]]) -> None:
    """Say in the row of a run that its daemon lives, and how its folders are. Raises StoreDown."""
    with connect(store.engine, write=True) as connection:
        reported = {"heartbeat": store.now(connection).isoformat(), "processed": processed, "roots": list(roots)}
        ours = sa.and_(runs.c.id == run_id, runs.c.finished_at.is_(None))
        connection.execute(update(runs).where(ours).values(counts_json=json.dumps(reported)))


def read_daemons(store: Store) -> list[Daemon]:
    """The daemons among the newest runs, the newest first. Raises StoreDown."""
    query = select(runs).order_by(runs.c.id.desc()).limit(_RUNS)
    with connect(store.engine) as connection:
        now = store.now(connection)
        rows = connection.execute(query).all()
    found = []
    for row in rows:
        reported = json.loads(row.counts_json or "{}")
        heartbeat = reported.get("heartbeat")
        if heartbeat is None:
            continue
        age_s = (now - datetime.fromisoformat(heartbeat)).total_seconds()
        finished = row.finished_at is not None
        found.append(
            Daemon(
                row.id,
                row.host,
                row.version,
                row.started_at,
                age_s,
                finished,
                reported["processed"],
                reported.get("roots", []),
            )
        )
    return found
