"""Migrate a store between schema versions, and read its current version.

The migrations are in migrations/ at the top of a checkout, and in cxrbatch/migrations/ of an install. Alembic, which
runs them, is imported only to migrate or compare a store: opening a store that is at head needs one SELECT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Connection, inspect

import cxrbatch
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.store.connection import connect, make_engine
from cxrbatch.store.schema import metadata
from cxrbatch.store.views import VIEWS, make_view

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["apply", "check", "current", "demand_head", "downgrade", "drift", "head", "is_empty", "upgrade"]

_ADVISORY_LOCK = 0x637872626174  # "cxrbat": two programs that upgrade one Postgres take turns
_FOREIGN = "The database holds tables that are not ours: name another with --db."


def upgrade(url: str, revision: str = "head") -> str:
    """Upgrade a store to `revision`; returns its new revision. Either all steps are committed or none.

    Raises Fatal for a bad URL, an unreachable store, an unknown revision.
    """
    with _for_moving(url) as connection:
        apply(connection, revision)
        return current_of(connection) or ""


def downgrade(url: str, revision: str) -> str | None:
    """Downgrade a store to `revision` ("base": no tables). Data that only newer schemas hold is lost."""
    with _for_moving(url) as connection:
        _run("downgrade", connection, revision)
        return current_of(connection)


def current(url: str) -> str | None:
    """The revision of a store; None for an empty one. Changes nothing."""
    engine = make_engine(url, read_only=True)
    try:
        with connect(engine) as connection:
            return current_of(connection)
    finally:
        engine.dispose()


def check(url: str) -> list[str]:
    """The differences between a store and the schema of this program, one sentence each."""
    engine = make_engine(url, read_only=True)
    try:
        with connect(engine) as connection:
            return drift(connection)
    finally:
        engine.dispose()


@cache
def head() -> str:
    """The revision that this program needs: the number of the last migration."""
    return max(_steps())


def current_of(connection: Connection) -> str | None:
    """The revision of the store behind an open connection."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
    return found


def is_empty(connection: Connection) -> bool:
    """Whether a SQLite file has no tables at all, or a Postgres database has none of ours.

    A store that was downgraded to "base" is empty too.
    """
    there = set(inspect(connection).get_table_names()) - {"alembic_version"}
    ours = there & metadata.tables.keys() if connection.dialect.name == "postgresql" else there
    return not ours and current_of(connection) is None


def apply(connection: Connection, revision: str = "head") -> None:
    """`upgrade` inside a transaction that the caller owns."""
    if current_of(connection) is None:
        if not is_empty(connection):
            raise Fatal(_FOREIGN)
        _demand_utf8(connection)
    _run("upgrade", connection, revision)


def _demand_utf8(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding != "UTF8":
        raise Fatal(
            f"The encoding of the database is {encoding}, which cannot hold every file name: "
            "create it with ENCODING 'UTF8' TEMPLATE template0."
        )


def demand_head(connection: Connection) -> None:
    """Raise Fatal (exit 10) unless the store is at the revision that this program needs."""
    found = current_of(connection)
    if found == head():
        return
    if found is None and not is_empty(connection):
        raise Fatal(_FOREIGN)
    _demand_known(found)
    state = "is empty" if found is None else f"is at schema {found}, and this program needs {head()}"
    raise Fatal(f"The store {state}: run `cxrbatch db upgrade`.", ExitCode.STORE_NOT_AT_HEAD)


def _demand_known(found: str | None) -> None:
    if found is not None and found not in _steps():
        raise Fatal(
            f"The store is at schema {found}, which is newer than this program (schema {head()}): "
            "upgrade cxrbatch, or name another store with --db.",
            ExitCode.STORE_NOT_AT_HEAD,
        )


def drift(connection: Connection) -> list[str]:
    """`check` on an open connection."""
    from alembic.migration import MigrationContext

    found = current_of(connection)
    if found != head():  # explains all other differences
        what_to_do = "upgrade cxrbatch" if found and found not in _steps() else "run `cxrbatch db upgrade`"
        return [f"The store is at schema {found or 'none'}, not {head()}: {what_to_do}."]
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    wrong = [f"The tables differ from the schema: {difference}." for difference in _plain(context)]
    wrong += _view_drift(connection)
    return wrong


def _plain(context: Any) -> Iterator[str]:
    from alembic.autogenerate import compare_metadata

    for difference in compare_metadata(context, metadata):
        yield " ".join(str(part) for part in difference if part is not None)


def _view_drift(connection: Connection) -> Iterator[str]:
    inspector = inspect(connection)
    there = inspector.get_view_names()
    for name, columns in VIEWS.items():
        if name not in there:
            yield f"The view {name} is not there."
            continue
        if connection.dialect.name == "sqlite":
            same = inspector.get_view_definition(name) == make_view(name, "sqlite")
        else:  # Postgres keeps its own wording of a view
            same = tuple(column["name"] for column in inspector.get_columns(name)) == columns
        if not same:
            yield f"The view {name} is not the one of this program."


@contextmanager
def _for_moving(url: str) -> Iterator[Connection]:
    engine = make_engine(url, may_create=True)
    try:
        with connect(engine, write=True, may_be_long=True) as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
            yield connection
    finally:
        engine.dispose()


def _run(step: Literal["upgrade", "downgrade"], connection: Connection, revision: str) -> None:
    from alembic import command
    from alembic.util import CommandError

    _demand_known(current_of(connection))
    config = _config()
    config.attributes["connection"] = connection
    try:
        getattr(command, step)(config, revision)
    except CommandError as error:
        why = f"The store cannot be moved to schema {revision!r} ({error}): write head, base, -1, or 0001 to {head()}."
        raise Fatal(why, ExitCode.USAGE) from error


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _steps() -> set[str]:
    """All revisions. A migration's file name begins with its revision: 0001_what_it_does.py."""
    return {path.name.partition("_")[0] for path in (_folder() / "versions").glob("[0-9]*_*.py")}


def _folder() -> Path:
    package = Path(cxrbatch.__file__).parent
    for folder in (package / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise Fatal("This installation of cxrbatch lacks its migrations: install it again.")
