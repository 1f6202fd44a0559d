"""The store as the road sees it: what is known already, what was found out, what has gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, select, update

from cxrbatch.crash import crash_point
from cxrbatch.nouns import Decision, FoundFile, Outcome
from cxrbatch.store import migrate, presence
from cxrbatch.store.engine import connect, make_engine, network_warning, parse_url
from cxrbatch.store.keys import AnyRow, among, bound, chunks, insert_new
from cxrbatch.store.leases import Waits
from cxrbatch.store.paths import plain
from cxrbatch.store.presence import Reprocess
from cxrbatch.store.queries import Film, below, everything_about, stream_results
from cxrbatch.store.recording import Recorded, write_outcomes
from cxrbatch.store.schema import FileState, ReviewAction, files, images, models, predictions, reviews, runs

__all__ = ["CascadeIdentity", "Counts", "Reprocess", "Run", "Store"]

_LOOK_UP = 4000  # paths a statement: most of the gain, little memory


@dataclass(frozen=True, slots=True)
class CascadeIdentity:
    """What makes a cascade this cascade. The sha256 of the manifest tells it from any other."""

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


@dataclass(frozen=True, slots=True)
class Counts:
    """How many paths stand where; labels and decisions of what is `done`, reasons of what is not."""

    by_state: dict[str, int] = field(default_factory=dict)
    by_label: dict[str, int] = field(default_factory=dict)
    by_decision: dict[str, int] = field(default_factory=dict)
    by_reason: dict[str, int] = field(default_factory=dict)
    to_review: dict[str, int] = field(default_factory=dict)  # of each label, those that need review


class Store:
    """An open store. Methods raise StoreDown when the database is away or busy: call again with the same batch.

    May be used from several threads.
    """

    def __init__(
        self, engine: Engine, warnings: Sequence[str] = (), clock: Callable[[], datetime] | None = None
    ) -> None:
        self.engine = engine
        self.warnings = tuple(warnings)  # sentences for the user
        self._given_clock = clock
        self._clock = clock or (lambda: datetime.now(UTC))

    @classmethod
    def open(cls, url: str, *, may_create: bool = True, clock: Callable[[], datetime] | None = None) -> Store:
        """Open a store; a SQLite file that is new or empty is set up, unless `may_create` is False.

        Raises Fatal: bad URL, unreachable, not a store, not at head (exit 10).
        """
        engine = make_engine(url, may_create=may_create)
        try:
            with connect(engine) as connection:
                fresh = may_create and engine.dialect.name == "sqlite" and migrate.is_empty(connection)
                if not fresh:
                    migrate.demand_head(connection)
            if fresh:
                with connect(engine, write=True) as connection:
                    migrate.apply(connection)  # where a second program was quicker, nothing is left to do
        except BaseException:
            engine.dispose()
            raise
        warning = network_warning(parse_url(url))
        return cls(engine, [warning] if warning else [], clock)

    def now(self, connection: Connection) -> datetime:
        """The time that leases go by: the server's on Postgres, so that several hosts share one clock."""
        if self._given_clock is not None or connection.dialect.name != "postgresql":
            return self._clock()
        moment: datetime = connection.execute(select(sa.func.clock_timestamp())).scalar_one()
        return moment

    def close(self) -> None:
        """Let go of the database. What was recorded is on its disk already."""
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
        """Write down that a run starts, and with what. `version` is that of cxrbatch."""
        now = self._clock()
        model: dict[str, Any] = {
            "name": cascade.name,
            "version": cascade.version,
            "manifest_sha256": cascade.manifest_sha256,
            "stages": ",".join(cascade.stages),
            "weights_sha256": ",".join(cascade.weights_sha256),
            "manifest_json": cascade.manifest_json,
            "first_used": now,
        }
        with connect(self.engine, write=True) as connection:
            insert_new(connection, models, [model])
            ours = select(models.c.id).where(models.c.manifest_sha256 == cascade.manifest_sha256)
            cascade_id = connection.execute(ours).scalar_one()
            run: dict[str, Any] = {"host": host, "version": version, "device": device, "engine": engine}
            run |= {"cascade_id": cascade_id, "started_at": now, "settings_json": settings_json}
            run_id = connection.execute(sa.insert(runs).returning(runs.c.id), run).scalar_one()
        return Run(run_id, cascade_id)

    def end_run(self, run_id: int, counts: Mapping[str, Any]) -> None:
        """Write down that a run came to its end, and what it counted (as JSON)."""
        ended = {"finished_at": self._clock(), "counts_json": json.dumps(dict(counts))}
        with connect(self.engine, write=True) as connection:
            connection.execute(update(runs).where(runs.c.id == run_id).values(ended))

    def cascade_id_of(self, manifest_sha256: str) -> int | None:
        """The id of a cascade that has recorded here before; None where it has not."""
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
        """The paths (as in FoundFile) that need nothing: size and mtime as recorded, an outcome that stands.

        What stands: a verdict of this cascade; a final rejection, unless `reprocess` is "failed". With "all",
        nothing does. A path that was `missing`, or that shows another cascade's verdict while this cascade's
        is known too, is set right on the way (not with `look_only`).
        """
        if reprocess == "all":
            return set()
        paths: set[str] = set()
        for chunk in chunks(found, _LOOK_UP):
            with connect(self.engine) as connection:
                standing = presence.look_up(connection, chunk, cascade_id, reprocess)
            paths |= standing.paths
            if (standing.returned or standing.shown_by_another) and not look_only:
                with connect(self.engine, write=True) as connection:
                    presence.set_right(connection, standing, cascade_id, self._clock())
        return paths

    def verdicts_of(self, sha256s: Sequence[str], cascade_id: int) -> set[str]:
        """Which of these contents this cascade has scored: link them (an Outcome with only `image`)."""
        with connect(self.engine) as connection:
            query = _select_scored(connection.dialect.name)
            keys = {"keys": bound(connection, sha256s), "cascade": cascade_id}
            return set(connection.execute(query, keys).scalars())

    def record(
        self,
        run_id: int,
        cascade_id: int,
        outcomes: Sequence[Outcome],
        *,
        replace: bool = False,
        owner: str | None = None,
        waits: Waits | None = None,
    ) -> Recorded:
        """Write a batch in one transaction; the same batch again changes nothing (but `last_seen`).

        An outcome with neither verdict nor rejection, but an image, means known content: the path is linked
        to the verdict that this cascade has for it, or left `waiting` where there is none. A content that
        this cascade has scored before keeps its numbers, unless `replace` (for `--reprocess all`). With `owner`,
        files whose lease is another's by now are left alone; with `waits`, what may heal is due again (leases.py).
        """
        with connect(self.engine, write=True) as connection:
            now = self.now(connection)
            recorded = write_outcomes(
                connection, run_id, cascade_id, outcomes, now, replace=replace, owner=owner, waits=waits
            )
            crash_point("record.before_commit")
        crash_point("record.committed")
        return recorded

    def mark_missing(self, run_id: int, roots: Sequence[str], seen: Container[str]) -> int:
        """Set paths below `roots` whose text (path_to_text) is not in `seen` to `missing`; deletes nothing.

        Only for folders that were read to their end: a share that dropped out looks like an empty folder.
        Returns how many it set.
        """
        return presence.mark_missing(self.engine, run_id, roots, seen, self._clock())

    def add_review(
        self, prediction_id: int, reviewer: str, action: ReviewAction, label: str | None, comment: str = ""
    ) -> int:
        """Append what a reader says of a prediction; the newest review shows in `results`. Returns its id."""
        review = {
            "prediction_id": prediction_id,
            "reviewer": plain(reviewer, 200),
            "action": str(action),
            "label": label,
            "comment": plain(comment, 4000),
            "at": self._clock(),
        }
        with connect(self.engine, write=True) as connection:
            made: int = connection.execute(sa.insert(reviews).returning(reviews.c.id), review).scalar_one()
        return made

    def present(self) -> int:
        """How many paths are not `missing`."""
        query = select(sa.func.count()).where(files.c.state != str(FileState.MISSING))
        with connect(self.engine) as connection:
            return int(connection.execute(query).scalar_one())

    def counts(self, roots: Sequence[str] = ()) -> Counts:
        """How many paths stand where, of the whole store or below some folders."""
        result = Counts()
        with connect(self.engine) as connection:
            if roots:
                elsewhere = select(files.c.id).where(sa.not_(below(files.c.path, roots))).limit(1)
                # Nothing elsewhere: the walk along the indexes says the same, ten times as fast.
                roots = roots if connection.execute(elsewhere).first() else ()
            rows = [row for query in _count_queries(roots) for row in connection.execute(query)]
            for state, label, decision, reason_code, paths in rows:
                _add(result.by_state, state, paths)
                if state == FileState.DONE:
                    _add(result.by_label, label, paths)
                    _add(result.by_decision, decision, paths)
                    if decision == Decision.NEEDS_REVIEW:
                        _add(result.to_review, label, paths)
                elif state in (FileState.REJECTED, FileState.RETRY):
                    _add(result.by_reason, reason_code, paths)
        return result

    def results(self, **filters: Any) -> Iterator[AnyRow]:
        """Rows of the view `results`, streamed; the filters are those of queries.stream_results."""
        return stream_results(self.engine, **filters)

    def everything_about(self, path_or_sha256: str) -> list[Film]:
        """All that is known of a path, or of every path with a content: see queries.everything_about."""
        return everything_about(self.engine, path_or_sha256)


@cache
def _select_scored(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    # EXISTS, not a join: SQLite would begin the join with all that this cascade has ever scored.
    told = select(predictions.c.id).where(
        predictions.c.image_id == images.c.id, predictions.c.cascade_id == sa.bindparam("cascade")
    )
    return select(images.c.sha256).where(among(dialect, images.c.sha256), told.exists())


def _count_queries(roots: Sequence[str]) -> list[sa.Select[*tuple[Any, ...]]]:
    """Of state, label, decision, reason_code and a number of paths, which together count every path once."""
    keys, paths = (files.c.state, files.c.label, files.c.decision, files.c.reason_code), sa.func.count()
    if roots:
        return [select(*keys, paths).where(below(files.c.path, roots)).group_by(*keys)]
    # The whole store: two walks along indexes that hold all that is asked.
    explained = files.c.state.in_([str(FileState.REJECTED), str(FileState.RETRY)])
    why = select(keys[0], sa.null(), sa.null(), keys[3], paths).where(explained, keys[3].is_not(None))
    rest = select(*keys[:3], sa.null(), paths).where(sa.not_(explained))
    return [rest.group_by(*keys[:3]), why.group_by(keys[0], keys[3])]


def _add(counts: dict[str, int], key: str, number: int) -> None:
    counts[key] = counts.get(key, 0) + number
