"""Open a database: URLs, SQLite's pragmas, transactions.

Nothing here prints a password or a value of a row.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, StatementError

from cxrbatch.errors import ExitCode, Fatal, StoreDown
from cxrbatch.mounts import MOUNTINFO, is_shared, mount_of, read_mounts
from cxrbatch.store.database_errors import translated

__all__ = ["StoreDown", "connect", "make_engine", "network_warning", "parse_url", "store_file"]

_BUSY_S = 30  # how long a writer waits for another one, and on Postgres every statement for a lock
_FROZEN_S = 60  # how long Postgres waits for the next statement of a transaction that writes
_LONGEST_S = 300  # a whole transaction that writes, from Postgres 17 on
_SQLITE_MAGIC = b"SQLite format 3\0"
#: Parameters of libpq, unless the URL or libpq's own environment sets them. A server or network that is lost without a
#: message is detected within a minute, both while waiting for an answer and while sending.
_LIBPQ = {
    "connect_timeout": "10",
    "keepalives": "1",
    "keepalives_idle": "20",
    "keepalives_interval": "10",
    "keepalives_count": "4",
    "tcp_user_timeout": "60000",  # ms
    "application_name": "cxrbatch",
}
_LIBPQ_ENVIRONMENT = {"connect_timeout": "PGCONNECT_TIMEOUT", "application_name": "PGAPPNAME"}
_READ_ONLY = "25006"  # after a failover: this server is a standby now
_HINT = "use sqlite:///cxrbatch.db or postgresql+psycopg://user@host/database"


def parse_url(url: str) -> URL:
    """The URL for SQLAlchemy; postgres:// and postgresql:// get the driver that we ship.

    Raises Fatal for anything but a SQLite file or Postgres.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise Fatal(f"The database URL cannot be read: {_HINT}.", ExitCode.USAGE) from None
    if parsed.password is not None and "@" in f"{parsed.host}/{parsed.database}":
        # Half of it would be taken for the host, and be in every message that names the host.
        raise Fatal(
            "The password in the database URL has an @: write it as %40, or keep it in ~/.pgpass.", ExitCode.USAGE
        )
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if parsed.host:
            raise Fatal(f"A SQLite URL has three slashes, or four before an absolute path: {_HINT}.", ExitCode.USAGE)
        if not parsed.database or parsed.database == ":memory:":
            raise Fatal(f"The store must be a file, for its rows are to stay: {_HINT}.", ExitCode.USAGE)
        return parsed
    raise Fatal(f"No store of the kind {parsed.drivername!r}: {_HINT}.", ExitCode.USAGE)


def sqlite_file(url: URL) -> Path:
    """The file of a SQLite URL."""
    return Path(str(url.database))


def store_file(url: str) -> Path | None:
    """The file of a SQLite store; None of Postgres. Raises Fatal for a URL that is of neither."""
    parsed = parse_url(url)
    return sqlite_file(parsed) if parsed.drivername.startswith("sqlite") else None


def make_engine(url: str, *, may_create: bool = False, read_only: bool = False) -> Engine:
    """An engine for a store. SQLite: WAL, synchronous=FULL, foreign keys on, waiting for other writers.

    With `read_only`, a SQLite file on a file system that is mounted read-only can be read too.

    Raises Fatal where the file or its folder can't be used, or Postgres' driver is not installed.
    """
    parsed = parse_url(url)
    if parsed.drivername.startswith("sqlite"):
        if read_only and (frozen := _on_read_only_file_system(parsed)) is not None:
            return frozen
        _look_at_file(sqlite_file(parsed), may_create)
        engine = sa.create_engine(parsed, connect_args={"timeout": _BUSY_S}, hide_parameters=True)
        same_file = _SameFile(parsed)
        event.listen(engine, "do_connect", same_file.before_connect)
        event.listen(engine, "connect", _pragmas)
        event.listen(engine, "begin", _begin)
        event.listen(engine, "begin", same_file)
        return engine
    try:
        given = parsed.query.keys() | {name for name, variable in _LIBPQ_ENVIRONMENT.items() if variable in os.environ}
        asked = {name: value for name, value in _LIBPQ.items() if name not in given}
        # Behind a lock of a program that stands still, reading too would wait for ever, without a word.
        waiting = f"-c lock_timeout={_BUSY_S * 1000:.0f}"
        asked_for = parsed.query.get("options") or os.environ.get("PGOPTIONS", "")  # as libpq has it
        options = f"{waiting} {asked_for} -c timezone=UTC"
        engine = sa.create_engine(
            parsed,
            pool_pre_ping=True,
            hide_parameters=True,
            # A file name is any text; PGCLIENTENCODING, or a database in SQL_ASCII, would have psycopg take some only.
            connect_args={**asked, "options": options, "client_encoding": "utf8"},
        )
    except ImportError:
        raise Fatal("A Postgres store needs an extra: pip install 'cxrbatch[postgres]'.") from None
    event.listen(engine, "begin", _limit_write_transactions)
    event.listen(engine, "after_cursor_execute", _end_with_a_statement)
    return engine


@contextmanager
def connect(engine: Engine, *, write: bool = False, may_be_long: bool = False) -> Iterator[Connection]:
    """One transaction: committed when the block ends, rolled back when it raises.

    On Postgres a transaction with `write` is ended when its program is silent for _FROZEN_S, or when it lasts longer
    than _LONGEST_S, unless it `may_be_long`.

    Raises StoreDown if the database is unreachable, busy, full, a standby or in conflict with another writer, and
    Fatal if waiting does not help (no such database, wrong password, a refused statement). The database's own errors
    are never passed on, because their text may contain values.
    """
    try:
        options = {"cxrbatch_write": write, "cxrbatch_may_be_long": may_be_long}
        with engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection
    except StatementError as error:  # the base class of SQLAlchemy's wrappers of driver errors
        if getattr(getattr(error, "orig", None), "sqlstate", None) == _READ_ONLY:
            engine.dispose()  # the next try may reach the new primary, by DNS or from the list of hosts in the URL
        raise translated(error, engine.url, _BUSY_S) from None


def network_warning(url: URL, mountinfo: str = MOUNTINFO) -> str | None:
    """A warning if a SQLite store is on a network file system; else None."""
    if not url.drivername.startswith("sqlite"):
        return None
    mount = mount_of(str(sqlite_file(url).parent), read_mounts(mountinfo) or [])
    if mount is None or not is_shared(mount.kind):
        return None
    return f"The SQLite store lies on {mount.kind}, whose locks can lose rows: put it on a local disk or use Postgres."


def _on_read_only_file_system(url: URL) -> Engine | None:
    """A read-only engine; None if the file does not exist or its file system is writable."""
    path = sqlite_file(url)
    try:
        if not os.statvfs(path).f_flag & os.ST_RDONLY:
            return None
    except OSError:
        return None
    # If there is a write-ahead log, the store is open elsewhere (the file system is read-only only for us), or it was
    # copied while open. SQLite then reads the log through the index beside it. Without a log, the file is complete.
    mode = "mode=ro" if os.path.exists(f"{path}-wal") else "immutable=1"
    name = f"file:{quote(os.path.abspath(path))}?{mode}"
    engine = sa.create_engine(url, creator=lambda: sqlite3.connect(name, uri=True), hide_parameters=True)
    event.listen(engine, "connect", _no_implicit_transactions)
    event.listen(engine, "begin", _begin)
    return engine


def _no_implicit_transactions(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None


def _pragmas(connection: sqlite3.Connection, _record: object) -> None:
    # _begin issues BEGIN: by its own rules, the driver would commit before DDL and begin too late.
    connection.isolation_level = None
    _set_wal(connection)
    for pragma in (
        "synchronous = FULL",  # a commit is on disk when it returns
        "foreign_keys = ON",
        "cache_size = -16384",  # KiB
    ):
        connection.execute(f"PRAGMA {pragma}")


def _set_wal(connection: sqlite3.Connection) -> None:
    # When two programs make a new file at once, SQLite refuses one of them immediately instead of waiting.
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.01, 0.05))


class _SameFile:
    """Whether the file of a store is still the one that was opened, asked by each transaction.

    SQLite in WAL mode goes on in a file that was deleted or replaced, and all that it writes is lost.
    """

    def __init__(self, url: URL) -> None:
        self._path = os.path.abspath(sqlite_file(url))
        self._inodes_tell = network_warning(url) is None  # elsewhere inode numbers may change
        self._opened: tuple[int, int] | None = None

    def before_connect(self, *_: object) -> None:
        """SQLite would make an empty file where the store was deleted."""
        if self._opened is not None:
            self()

    def __call__(self, *_: object) -> None:
        try:
            info = os.stat(self._path)
        except OSError as error:
            raise StoreDown(f"The store {self._path} is no longer there ({error.strerror}).") from None
        found = (info.st_dev, info.st_ino) if self._inodes_tell else (0, 0)
        self._opened = self._opened or found
        if found != self._opened:
            raise Fatal(
                f"The store {self._path} was replaced by another file while it was open: start this program again."
            )


def _begin(connection: Connection) -> None:
    # A transaction that starts as a reader and writes later fails with "locked" at once; BEGIN IMMEDIATE waits.
    writes = connection.get_execution_options().get("cxrbatch_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _limit_write_transactions(connection: Connection) -> None:
    # A program that is frozen in a transaction (a suspended machine) keeps its locks, and all others wait for it.
    # Reading is not limited: an export may be read slowly, and nobody waits for it.
    options = connection.get_execution_options()
    if not options.get("cxrbatch_write", False):
        return
    limits = {"idle_in_transaction_session_timeout": _FROZEN_S}
    # Frozen while it sends the rows of a statement, a program is not idle to Postgres: only this limit ends that.
    if (connection.dialect.server_version_info or (0,)) >= (17,) and not options.get("cxrbatch_may_be_long", False):
        limits["transaction_timeout"] = _LONGEST_S
    connection.exec_driver_sql("SELECT " + ", ".join(f"set_config('{n}', '{s}s', true)" for n, s in limits.items()))


def _end_with_a_statement(
    connection: Connection, _cursor: object, _statement: str, _parameters: object, _context: object, executemany: bool
) -> None:
    # psycopg ends an executemany with a Flush, at which Postgres stops the timer above and does not start it again.
    if executemany and connection.get_execution_options().get("cxrbatch_write", False):
        connection.connection.cursor().execute("SELECT 1")


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
