"""The store as the pipeline uses it: look up known files, record outcomes, mark missing files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, select, update

from cxrbatch.failpoints import failpoint
from cxrbatch.store import migrate, presence
from cxrbatch.store.connection import connect, make_engine, network_warning, parse_url
from cxrbatch.store.leases import Backoff
from cxrbatch.store.presence import Reprocess
from cxrbatch.store.queries import FileHistory, PathCounts, count_paths, everything_about, stream_results
from cxrbatch.store.recording import Recorded, write_outcomes
from cxrbatch.store.schema import FileState, files, images, models, predictions, runs
from cxrbatch.store.sql import AnyRow, chunks, execute_for, in_keys, insert_new
from cxrbatch.types import FoundFile, Outcome

__all__ = ["CascadeIdentity", "Reprocess", "Run", "Store"]

_LOOK_UP = 4000  # paths per statement: larger gains little


@dataclass(frozen=True, slots=True)
class CascadeIdentity:
    """The identity of a cascade: the sha256 of its manifest distinguishes it from any other."""

    name: str
    version: str
    manifest_sha256: str  # followed by " exact" where the setting was on: see Bundle.key
    manifest_json: str
    stages: tuple[str, ...]  # roles, in order: ("gate", "disease")
    weights_sha256: tuple[str, ...]  # one a stage


@dataclass(frozen=True, slots=True)
class Run:
    """The ids under which a run records."""

    run_id: int
    cascade_id: int


class Store:
    """An open store. Methods raise StoreDown if the database is unreachable or busy: call again with the same batch.

    It may be used from several threads.
    """

    def __init__(
        self, engine: Engine, warnings: Sequence[str] = (), clock: Callable[[], datetime] | None = None
    ) -> None:
        self.engine = engine
        self.warnings = tuple(warnings)  # sentences for the user
        self._clock = clock

    @classmethod
    def open(
        cls,
        url: str,
        *,
        may_create: bool = True,
        read_only: bool = False,
        clock: Callable[[], datetime] | None = None,
    ) -> Store:
        """Open a store; a new or empty SQLite file gets its tables, unless `may_create` is False.

        With `read_only`, a SQLite file on a read-only file system is accepted.

        Raises Fatal: bad URL, unreachable, not a store, not at head (exit 10).
        """
        engine = make_engine(url, may_create=may_create, read_only=read_only)
        try:
            with connect(engine) as connection:
                fresh = may_create and engine.dialect.name == "sqlite" and migrate.is_empty(connection)
                if not fresh:
                    migrate.demand_head(connection)
            if fresh:
                with connect(engine, write=True) as connection:
                    migrate.apply(connection)  # does nothing if another program was faster
        except BaseException:
            engine.dispose()
            raise
        warning = network_warning(parse_url(url))
        return cls(engine, [warning] if warning else [], clock)

    def now(self, connection: Connection) -> datetime:
        """The time of all rows: the server's on Postgres, so that several hosts share one clock."""
        if self._clock is not None:
            return self._clock()
        if connection.dialect.name != "postgresql":
            return datetime.now(UTC)
        moment: datetime = connection.execute(select(sa.func.clock_timestamp())).scalar_one()
        return moment

    def close(self) -> None:
        """Close the database. Everything recorded is already on disk."""
        self.engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_run(
        self,
        settings_json: str,
        cascade: CascadeIdentity,
        *,
        device: str,
        engine: str,
        host: str,
        version: str,
    ) -> Run:
        """Record that a run starts, with its settings and cascade. `version` is that of cxrbatch."""
        model: dict[str, Any] = {
            "name": cascade.name,
            "version": cascade.version,
            "manifest_sha256": cascade.manifest_sha256,
            "stages": ",".join(cascade.stages),
            "weights_sha256": ",".join(cascade.weights_sha256),
            "manifest_json": cascade.manifest_json,
        }
        with connect(self.engine, write=True) as connection:
            now = self.now(connection)
            insert_new(connection, models, [model | {"first_used": now}])
            ours = select(models.c.id).where(models.c.manifest_sha256 == cascade.manifest_sha256)
            cascade_id = connection.execute(ours).scalar_one()
            run: dict[str, Any] = {"host": host, "version": version, "device": device, "engine": engine}
            run |= {"cascade_id": cascade_id, "started_at": now, "settings_json": settings_json}
            run_id = connection.execute(sa.insert(runs).returning(runs.c.id), run).scalar_one()
        return Run(run_id, cascade_id)

    def end_run(self, run_id: int, counts: Mapping[str, Any]) -> None:
        """Record that a run ended, with its counts (as JSON)."""
        with connect(self.engine, write=True) as connection:
            ended = {"finished_at": self.now(connection), "counts_json": json.dumps(dict(counts))}
            connection.execute(update(runs).where(runs.c.id == run_id).values(ended))

    def cascade_id_of(self, manifest_sha256: str) -> int | None:
        """The id of a cascade that has recorded in this store; None if it has not."""
        query = select(models.c.id).where(models.c.manifest_sha256 == manifest_sha256)
        with connect(self.engine) as connection:
            return connection.execute(query).scalar_one_or_none()

    def unchanged(
        self,
        found: Sequence[FoundFile],
        cascade_id: int,
        reprocess: Reprocess = "none",
        *,
        look_only: bool = False,
    ) -> set[str]:
        """The paths (as in FoundFile) that are up to date: size and mtime as recorded, and a valid outcome.

        Valid are a prediction of this cascade, and a final rejection unless `reprocess` is "failed". With "all",
        nothing is valid. Unless `look_only`, this also repairs rows: of a path that was `missing`, and of a path that
        shows another cascade's prediction although this cascade's is known.
        """
        if reprocess == "all":
            return set()
        paths: set[str] = set()
        for chunk in chunks(found, _LOOK_UP):
            with connect(self.engine) as connection:
                up_to_date = presence.look_up(connection, chunk, cascade_id, reprocess)
            if (up_to_date.returned or up_to_date.shown_by_another) and not look_only:
                with connect(self.engine, write=True) as connection:
                    presence.repair(connection, up_to_date, cascade_id, self.now(connection))
            paths |= up_to_date.paths
        return paths

    def predicted(self, sha256s: Sequence[str], cascade_id: int) -> set[str]:
        """Which of these contents this cascade has scored. Record them as an Outcome with only `image`."""
        with connect(self.engine) as connection:
            query = _select_scored(connection.dialect.name)
            return set(execute_for(connection, query, sha256s, cascade=cascade_id).scalars())

    def record(
        self,
        run_id: int,
        cascade_id: int,
        outcomes: Sequence[Outcome],
        *,
        replace: bool = False,
        owner: str | None = None,
        backoff: Backoff | None = None,
    ) -> Recorded:
        """Write a batch in one transaction; the same batch again changes nothing (except `last_seen`).

        An outcome with an image, but no prediction and no rejection, means known content: the path is linked to this
        cascade's prediction for it, or left `waiting` if there is none. A content that this cascade has scored before
        keeps its numbers, unless `replace` (for `--reprocess all`). With `owner`, files that another owner has leased
        meanwhile are skipped; with `backoff`, transient failures are scheduled for a retry (leases.py).
        """
        with connect(self.engine, write=True) as connection:
            now = self.now(connection)
            recorded = write_outcomes(
                connection, run_id, cascade_id, outcomes, now, replace=replace, owner=owner, backoff=backoff
            )
            failpoint("record.before_commit")
        failpoint("record.committed")
        return recorded

    def mark_missing(
        self,
        run_id: int,
        roots: Sequence[str],
        seen: Container[str],
        *,
        unlisted: Collection[str] = (),
        unmounted: Collection[str] = (),
        since: datetime | None = None,
        watching: bool = False,
    ) -> int:
        """Set paths below `roots` whose text (path_to_text) is not in `seen` to `missing`; deletes nothing.

        Paths below a folder in `unlisted` are left unchanged, since it could not be read. So are paths below a former
        mount point in `unmounted`, unless a scored image is seen there, and those that another program has queued or
        recorded since `since`, the time when the walk began: an object may be gone while it is listed, and back. With
        `watching`, only those that it has for the first time: the next walk of a daemon would not ask for the others
        again. Returns how many paths were set.
        """
        now = self.time()
        return presence.mark_missing(
            self.engine, run_id, roots, seen, now, unlisted, unmounted, since, watching=watching
        )

    def note_mounts(self, roots: Sequence[str], mounted: Collection[str]) -> frozenset[str]:
        """Record the mount points `mounted`; returns all mount points ever seen at or below `roots`."""
        return presence.note_mounts(self.engine, roots, mounted, self.time())

    def time(self) -> datetime:
        """`now`, in a transaction of its own."""
        with connect(self.engine) as connection:
            return self.now(connection)

    def holds_identifiers(self) -> bool:
        """Whether any patient ID or accession number is stored, hashed or not."""
        some = sa.or_(images.c.patient_id_hash != "", images.c.accession_number_hash != "")
        with connect(self.engine) as connection:
            return connection.execute(select(images.c.id).where(some).limit(1)).first() is not None

    def present(self) -> int:
        """How many paths are not `missing`."""
        query = select(sa.func.count()).where(files.c.state != str(FileState.MISSING))
        with connect(self.engine) as connection:
            return int(connection.execute(query).scalar_one())

    def counts(self, roots: Sequence[str] = ()) -> PathCounts:
        """Numbers of paths by state, in the whole store or below some folders."""
        return count_paths(self.engine, roots)

    def results(self, **filters: Any) -> Iterator[AnyRow]:
        """Stream rows of the view `results`; the filters are those of queries.stream_results."""
        return stream_results(self.engine, **filters)

    def everything_about(self, path_or_sha256: str) -> list[FileHistory]:
        """All that is known about a path, or every path with a content: see queries.everything_about."""
        return everything_about(self.engine, path_or_sha256)


@cache
def _select_scored(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    # EXISTS, not a join: SQLite would start the join with everything that this cascade has ever scored.
    reported = select(predictions.c.id).where(
        predictions.c.image_id == images.c.id, predictions.c.cascade_id == sa.bindparam("cascade")
    )
    return select(images.c.sha256).where(in_keys(dialect, images.c.sha256), reported.exists())
