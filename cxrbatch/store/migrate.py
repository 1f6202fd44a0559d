"""Moving a store between schema versions, and telling where it stands.

The steps are in migrations/ at the top of a checkout, and in cxrbatch/migrations/ of an install. Alembic, which takes
them, is loaded when a store has to be moved or compared: opening one that is at head needs a SELECT.
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
from cxrbatch.store.engine import connect, make_engine
from cxrbatch.store.schema import metadata
from cxrbatch.store.views import RESULT_COLUMNS, make_results

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["apply", "check", "current", "demand_head", "downgrade", "drift", "head", "is_empty", "upgrade"]

_ADVISORY_LOCK = 0x637872626174  # "cxrbat": two programs that upgrade one Postgres take turns
_FOREIGN = "The database holds tables that are not ours: name another with --db."


def upgrade(url: str, revision: str = "head") -> str:
    """Bring a store up to `revision`; returns where it now stands. All steps are kept or none.

    Raises Fatal for a bad URL, an unreachable store, an unknown revision.
    """
    with _for_moving(url) as connection:
        apply(connection, revision)
        return current_of(connection) or ""


def downgrade(url: str, revision: str) -> str | None:
    """Take a store back to `revision` ("base": nothing left). What only newer schemas hold is lost."""
    with _for_moving(url) as connection:
        _run("downgrade", connection, revision)
        return current_of(connection)


def current(url: str) -> str | None:
    """The revision that a store stands at; None for an empty one. Changes nothing."""
    engine = make_engine(url)
    try:
        with connect(engine) as connection:
            return current_of(connection)
    finally:
        engine.dispose()


def check(url: str) -> list[str]:
    """What in a store differs from the schema of this program, one sentence each."""
    engine = make_engine(url)
    try:
        with connect(engine) as connection:
            return drift(connection)
    finally:
        engine.dispose()


@cache
def head() -> str:
    """The revision that this program works with: the number of the last step."""
    return max(_steps())


def current_of(connection: Connection) -> str | None:
    """The revision that the store behind an open connection stands at."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
    return found


def is_empty(connection: Connection) -> bool:
    """Whether nothing is there that we would have to reckon with: of anybody in a SQLite file, of ours in Postgres.

    A store that was taken back to "base" is empty too.
    """
    there = set(inspect(connection).get_table_names()) - {"alembic_version"}
    ours = there & metadata.tables.keys() if connection.dialect.name == "postgresql" else there
    return not ours and current_of(connection) is None


def apply(connection: Connection, revision: str = "head") -> None:
    """`upgrade` inside a transaction that the caller owns."""
    if current_of(connection) is None and not is_empty(connection):
        raise Fatal(_FOREIGN)
    _run("upgrade", connection, revision)


def demand_head(connection: Connection) -> None:
    """Raises Fatal (exit 10) unless the store is at the revision that this program works with."""
    found = current_of(connection)
    if found == head():
        return
    if found is None and not is_empty(connection):
        raise Fatal(_FOREIGN)
    if found is None:
        state = "is empty"
    elif found in _steps():
        state = f"is at schema {found}, and this program needs {head()}"
    else:
        raise Fatal(
            f"The store is at schema {found}, which is newer than this program (schema {head()}): "
            "upgrade cxrbatch, or name another store with --db.",
            ExitCode.STORE_NOT_AT_HEAD,
        )
    raise Fatal(f"The store {state}: run `cxrbatch db upgrade`.", ExitCode.STORE_NOT_AT_HEAD)


def drift(connection: Connection) -> list[str]:
    """`check` on an open connection."""
    from alembic.migration import MigrationContext

    found = current_of(connection)
    wrong = [] if found == head() else [f"The store is at schema {found or 'none'}, not {head()}."]
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    wrong += [f"The tables differ from the schema: {difference}." for difference in _plain(context)]
    wrong += _view_drift(connection)
    return wrong


def _plain(context: Any) -> Iterator[str]:
    from alembic.autogenerate import compare_metadata

    for difference in compare_metadata(context, metadata):
        yield " ".join(str(part) for part in difference if part is not None)


def _view_drift(connection: Connection) -> list[str]:
    inspector = inspect(connection)
    if "results" not in inspector.get_view_names():
        return ["The view results is not there."]
    if connection.dialect.name == "sqlite":
        same = inspector.get_view_definition("results") == make_results("sqlite")
    else:  # Postgres keeps its own wording of a view
        same = tuple(column["name"] for column in inspector.get_columns("results")) == RESULT_COLUMNS
    return [] if same else ["The view results is not the one of this program."]


@contextmanager
def _for_moving(url: str) -> Iterator[Connection]:
    engine = make_engine(url, may_create=True)
    try:
        with connect(engine, write=True) as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
            yield connection
    finally:
        engine.dispose()


def _run(step: Literal["upgrade", "downgrade"], connection: Connection, revision: str) -> None:
    from alembic import command
    from alembic.util import CommandError

    config = _config()
    config.attributes["connection"] = connection
    try:
        getattr(command, step)(config, revision)
    except CommandError as error:
        raise Fatal(f"The store cannot be moved to schema {revision!r}: {error}.") from error


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _steps() -> set[str]:
    """The revisions there are: a step's file is named 0001_what_it_does.py after its revision."""
    return {path.name.partition("_")[0] for path in (_folder() / "versions").glob("[0-9]*_*.py")}


def _folder() -> Path:
    package = Path(cxrbatch.__file__).parent
    for folder in (package / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise Fatal("This installation of cxrbatch lacks its migrations: install it again.")
