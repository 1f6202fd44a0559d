"""Opening a database: URLs, SQLite's pragmas, and database errors as sentences.

Nothing here prints a password.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from cxrbatch.errors import Fatal, StoreDown

__all__ = ["StoreDown", "connect", "make_engine", "network_warning", "parse_url", "sqlite_file"]

_BUSY_S = 30  # how long a writer waits for another one
_SQLITE_MAGIC = b"SQLite format 3\0"
_NETWORK_TYPES = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "fuse.sshfs",
)
_HINT = "use sqlite:///cxrbatch.db or postgresql+psycopg://user@host/database"


def parse_url(url: str) -> URL:
    """The URL as SQLAlchemy wants it; postgres:// and postgresql:// get the driver that we ship.

    Raises Fatal for anything but a SQLite file or Postgres.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise Fatal(f"The database URL cannot be read: {_HINT}.") from None
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if parsed.host:
            raise Fatal(f"A SQLite URL has three slashes, or four before an absolute path: {_HINT}.")
        if not parsed.database or parsed.database == ":memory:":
            raise Fatal(f"The store must be a file, for its rows are to stay: {_HINT}.")
        return parsed
    raise Fatal(f"No store of the kind {parsed.drivername!r}: {_HINT}.")


def sqlite_file(url: URL) -> Path:
    """The file of a SQLite URL."""
    return Path(str(url.database))


def make_engine(url: str, *, may_create: bool = False) -> Engine:
    """An engine for a store. SQLite: WAL, synchronous=FULL, foreign keys on, waiting for other writers.

    Raises Fatal where the file or its folder can't be used, or Postgres' driver is not installed.
    """
    parsed = parse_url(url)
    if parsed.drivername.startswith("sqlite"):
        _look_at_file(sqlite_file(parsed), may_create)
        engine = sa.create_engine(parsed, connect_args={"timeout": _BUSY_S})
        event.listen(engine, "connect", _pragmas)
        event.listen(engine, "begin", _begin)
        return engine
    try:
        return sa.create_engine(
            parsed,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": 10,
                "options": "-c timezone=UTC",
                "application_name": "cxrbatch",
            },
        )
    except ImportError:
        raise Fatal("A Postgres store needs an extra: pip install 'cxrbatch[postgres]'.") from None


@contextmanager
def connect(engine: Engine, *, write: bool = False) -> Iterator[Connection]:
    """One transaction: kept when the block ends, undone when it raises.

    Raises StoreDown when the database is not there, busy, full or out of step with another writer, and Fatal
    when waiting won't help (no such database, wrong password, read-only).
    """
    try:
        with engine.connect().execution_options(cxrbatch_write=write) as connection, connection.begin():
            yield connection
    except (OperationalError, InterfaceError) as error:
        raise _sentence(error, engine) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise _sentence(error, engine) from error
        if "file is not a database" in str(error.orig) or "malformed" in str(error.orig):
            raise Fatal(f"{sqlite_file(engine.url)} is damaged or no SQLite store: restore a backup.") from error
        if "permission denied" in str(error.orig):
            raise Fatal(f"The database user may not do that: {_first_line(error)}.") from error
        raise


def network_warning(url: URL, mountinfo: str = "/proc/self/mountinfo") -> str | None:
    """A sentence where a SQLite store lies on a network file system; else None."""
    if not url.drivername.startswith("sqlite"):
        return None
    folder = os.path.realpath(sqlite_file(url).parent)
    try:
        mounts = [_mount(line) for line in Path(mountinfo).read_text().splitlines()]
    except OSError:
        return None  # not Linux
    below = [(point, kind) for point, kind in mounts if os.path.commonpath([point, folder]) == point]
    kind = max(below, key=lambda mount: len(mount[0]), default=("/", ""))[1]
    if kind not in _NETWORK_TYPES:
        return None
    return f"The SQLite store lies on {kind}, whose locks can lose rows: put it on a local disk or use Postgres."


def _mount(line: str) -> tuple[str, str]:
    before, _, after = line.partition(" - ")
    point = before.split(" ")[4].replace(r"\040", " ")
    return point, after.split(" ")[0]


def _pragmas(connection: sqlite3.Connection, _record: object) -> None:
    # We say BEGIN ourselves (_begin): the driver's own rules would commit before DDL and begin too late.
    connection.isolation_level = None
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",  # a commit is on the disk when it returns
        "foreign_keys = ON",
        "cache_size = -16384",  # KiB
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # A reader that turns writer later is told "locked" at once; one that says so at the start waits its turn.
    writes = connection.get_execution_options().get("cxrbatch_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _look_at_file(path: Path, may_create: bool) -> None:
    folder = path.parent
    try:
        if not folder.is_dir():
            raise Fatal(f"The folder of the store is not there: make {folder}, or name another with --db.")
        if path.is_dir():
            raise Fatal(f"The store {path} is a folder: name a file with --db.")
        if path.exists():
            with path.open("rb") as file:
                start = file.read(len(_SQLITE_MAGIC))
            if start not in (b"", _SQLITE_MAGIC):
                raise Fatal(f"{path} is not a SQLite store: name another file with --db.")
            if not os.access(path, os.W_OK):
                raise Fatal(f"The store {path} is read-only: change its permissions, or name another with --db.")
        elif not may_create:
            raise Fatal(f"There is no store {path} yet: `cxrbatch scan` or `cxrbatch db upgrade` makes it.")
        if not os.access(folder, os.W_OK):
            raise Fatal(f"The folder {folder} is read-only, and SQLite writes beside its file: change that.")
    except OSError as error:
        raise Fatal(f"The store {path} cannot be opened: {error.strerror}.") from error


def _sentence(error: DBAPIError, engine: Engine) -> Exception:
    message = str(error.orig).lower()
    if engine.dialect.name == "sqlite":
        path = sqlite_file(engine.url)
        if "locked" in message or "busy" in message:
            return StoreDown(f"Another program has been writing to {path} for over {_BUSY_S} s.")
        if "full" in message or "disk i/o" in message:
            return StoreDown(f"The store {path} cannot be written: {_first_line(error)}.")
        if "readonly" in message or "unable to open" in message:
            return Fatal(f"The store {path} cannot be opened for writing: check its folder and permissions.")
        return error  # "no such table" and the like: a bug, and it may look like one
    where = f"Postgres at {engine.url.host or engine.url.query.get('host', 'localhost')}"
    if "password" in message or "authentication" in message or "role" in message:
        return Fatal(f"{where} does not let this user in: check user and password of --db.")
    if "database" in message and "does not exist" in message:
        return Fatal(f"{where} has no database {engine.url.database!r}: create it, or name another with --db.")
    return StoreDown(f"{where} cannot take this now: {_first_line(error)}.")


def _first_line(error: DBAPIError) -> str:
    # libpq repeats host and user, never the password.
    lines: list[Any] = str(error.orig).strip().splitlines()
    return str(lines[0]).rstrip(".") if lines else type(error.orig).__name__
