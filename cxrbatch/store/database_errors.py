"""Translate database errors to one sentence without values.

Databases quote their input: Postgres prints the failing row under DETAIL, SQLAlchemy the parameters. These include
paths and, with `phi = "keep"`, patient IDs. So an error's text is passed on only if it is about the server and cannot
be about a row. For any other error, the sentence gives the kind, the code and the constraint.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, StatementError

from cxrbatch.errors import Fatal, StoreDown

__all__ = ["translated"]

#: Classes of SQLSTATE (its first two characters) after which the server may accept the same transaction later:
#: connection, rollback (deadlock, serialization), resources, object not ready, operator, system.
_TRANSIENT_CLASSES = frozenset({"08", "40", "53", "55", "57", "58"})
#: A server that is a standby at the moment (failover), a transaction that was frozen for too long (idle, or in all),
#: and a row that `db prune` removed meanwhile.
_TRANSIENT_STATES = frozenset({"25006", "25P03", "25P04", "23503"})
_NOT_OUR_TABLES = "The tables of the store are not those of this program: `cxrbatch db check` says how they differ."


def translated(error: StatementError, url: URL, busy_s: float) -> Fatal | StoreDown:
    """The error to raise instead, `from None`: StoreDown if the same transaction may succeed later, else Fatal."""
    if url.drivername.startswith("sqlite"):
        return _sqlite(error, str(url.database), busy_s)
    return _postgres(error, url)


def _sqlite(error: StatementError, path: str, busy_s: float) -> Fatal | StoreDown:
    message = str(error.orig).lower()
    if not isinstance(error, DBAPIError):
        return _refused(error)
    if "locked" in message or "busy" in message:
        return StoreDown(f"Another program has been writing to {path} for over {busy_s:g} s.")
    if "full" in message:
        return StoreDown(f"The store {path} cannot be written: its disk is full.")
    if "disk i/o" in message:
        return StoreDown(f"The store {path} cannot be read or written: its disk reports errors (disk I/O error).")
    if "readonly" in message or "unable to open" in message:
        return Fatal(
            f"The store {path} cannot be opened for writing: this user must be allowed to write it, the files beside "
            "it (-wal, -shm) and their folder."
        )
    if "not a database" in message or "disk image is malformed" in message:
        return Fatal(f"{path} is damaged or no SQLite store: restore a backup.")
    if "no such table" in message or "no such column" in message:
        return Fatal(_NOT_OUR_TABLES)
    return _refused(error)


def _postgres(error: StatementError, url: URL) -> Fatal | StoreDown:
    where = f"Postgres at {url.host or url.query.get('host', 'localhost')}"
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        if lost or isinstance(error, (OperationalError, InterfaceError)):
            return _not_connected(error, url, where)
        return _refused(error)
    kind = type(error.orig).__name__
    if state == "55P03":
        return StoreDown(f"Another program has held a lock in {where} for too long.")
    if state[:2] in _TRANSIENT_CLASSES or state in _TRANSIENT_STATES:
        return StoreDown(f"{where} cannot take this now: {kind} (SQLSTATE {state}).")
    if state == "42501":  # "permission denied for table files": names an object, never a row
        return Fatal(f"The database user may not do that: {_first_line(error)}.")
    if state == "22P05":  # a letter that the database's encoding does not have
        return Fatal("The database cannot hold every file name: move it to one with ENCODING 'UTF8' (pg_dump).")
    if state in ("42P01", "42703"):
        return Fatal(_NOT_OUR_TABLES)
    return _refused(error)


def _not_connected(error: StatementError, url: URL, where: str) -> Fatal | StoreDown:
    """Translate libpq's connection errors, which name only host, user and database."""
    message = str(error.orig).lower()
    if "password" in message or "authentication" in message or "role" in message:
        return Fatal(f"{where} does not let this user in: check user and password of --db.")
    if "database" in message and "does not exist" in message:
        return Fatal(f"{where} has no database {url.database!r}: create it, or name another with --db.")
    return StoreDown(f"{where} cannot take this now: {_first_line(error)}.")


def _refused(error: StatementError) -> Fatal:
    """A refused statement is a bug in cxrbatch; it is described without anything that may contain a value."""
    orig: Any = error.orig
    code = getattr(orig, "sqlstate", None) or getattr(orig, "sqlite_errorname", None)
    diagnosis = getattr(orig, "diag", None)
    constraint = getattr(diagnosis, "constraint_name", None)
    known = [type(orig).__name__ if isinstance(error, DBAPIError) else "value", code, constraint]
    about = ", ".join(str(part) for part in known if part)
    return Fatal(
        f"The store refused a statement ({about}), which is a fault of cxrbatch: what is committed is kept. Report it "
        "with this line, and look at the store with `cxrbatch db check`."
    )


def _first_line(error: StatementError) -> str:
    lines = str(error.orig).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error.orig).__name__
