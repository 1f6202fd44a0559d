"""No database error reveals a value: not in a sentence, not in a traceback, not in a log."""

from __future__ import annotations

import sqlite3
import traceback
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from cxrbatch.errors import Fatal, StoreDown
from cxrbatch.store import Store
from cxrbatch.store.connection import connect, make_engine
from cxrbatch.store.schema import files, images
from factories import make_bundle
from fork_server import cxrbatch
from pipelines import image as write_image
from store_images import begin, scored_file

NAME = "DOE^JANE"

Trouble = Callable[[Connection], object]


def run(sql: str, **values: object) -> Trouble:
    return lambda connection: connection.execute(sa.text(sql), values or {"name": NAME}).all()


def file_row(**values: object) -> Trouble:
    row: dict[str, Any] = {"path": f"/in/{NAME}.dcm", "size": 1, "mtime_ns": 1, "inode": 1, "state": "waiting"}
    moment = datetime.fromisoformat("2026-11-24T00:00:00+00:00")
    row |= {"first_seen": moment, "last_seen": moment} | values
    return lambda connection: connection.execute(sa.insert(files), row)


def twice(connection: Connection) -> None:
    file_row()(connection)
    file_row()(connection)


#: Of both stores; a word of the sentence that each becomes.
BOTH: dict[str, tuple[Trouble, type[Exception], str]] = {
    "the same path twice": (twice, Fatal, "refused"),
    "a check": (file_row(state=NAME), Fatal, "refused"),
    "not null": (file_row(reason=NAME, size=None), Fatal, "refused"),
    "no such column": (run(f'SELECT "{NAME}".x FROM files WHERE path = :name'), Fatal, "db check"),
    "no such table": (run(f'SELECT * FROM "{NAME}" WHERE :name = :name'), Fatal, "db check"),
    "syntax": (run(f"SELECT FROM WHERE '{NAME}' :name"), Fatal, "refused"),
    "a value that the driver does not know": (run("SELECT :name", name=type(NAME, (), {})()), Fatal, "refused"),
    "a time without a zone": (file_row(first_seen=datetime(2026, 1, 1), reason=NAME), Fatal, "refused"),
}
SQLITE: dict[str, tuple[Trouble, type[Exception], str]] = {
    "a foreign key": (file_row(image_id=77), Fatal, "refused"),
    "no JSON": (run("SELECT * FROM json_each(:name)"), Fatal, "refused"),
    "too large": (run("SELECT zeroblob(99999999999), :name"), Fatal, "refused"),
    "a decimal": (run("SELECT :name, :number", name=NAME, number=Decimal(1)), Fatal, "refused"),
}
POSTGRES: dict[str, tuple[Trouble, type[Exception], str]] = {
    "a foreign key": (file_row(image_id=77), StoreDown, "ForeignKeyViolation"),
    "no number": (run("SELECT CAST(CAST(:name AS text) AS integer)"), Fatal, "refused"),
    "no time": (run("SELECT CAST(CAST(:name AS text) AS timestamptz)"), Fatal, "refused"),
    "no JSON": (run("SELECT CAST(CAST(:name AS text) AS json)"), Fatal, "refused"),
    "a NUL": (run("SELECT CAST(:name AS text)", name=f"{NAME}\0"), Fatal, "refused"),
    "out of range": (run("SELECT CAST(length(:name) * 3000000000 AS integer)"), Fatal, "refused"),
    "a sentence of a trigger": (
        lambda connection: connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION '{NAME}'; END $$"),
        Fatal,
        "refused",
    ),
    "deadlock": (
        lambda connection: connection.exec_driver_sql(
            f"DO $$ BEGIN RAISE EXCEPTION '{NAME}' USING ERRCODE = '40P01'; END $$"
        ),
        StoreDown,
        "DeadlockDetected",
    ),
    "disk full": (
        lambda connection: connection.exec_driver_sql(
            f"DO $$ BEGIN RAISE EXCEPTION '{NAME}' USING ERRCODE = '53100'; END $$"
        ),
        StoreDown,
        "DiskFull",
    ),
    "read only": (
        lambda connection: (
            connection.exec_driver_sql("SET TRANSACTION READ ONLY"),
            run("DELETE FROM files WHERE path = :name RETURNING 1")(connection),
        ),
        StoreDown,
        "ReadOnlySqlTransaction",
    ),
    "too slow": (
        lambda connection: (
            connection.exec_driver_sql("SET LOCAL statement_timeout = 50"),
            run("SELECT pg_sleep(60), CAST(:name AS text)")(connection),
        ),
        StoreDown,
        "QueryCanceled",
    ),
    "terminated": (run("SELECT pg_terminate_backend(pg_backend_pid()), CAST(:name AS text)"), StoreDown, "cannot"),
    "not allowed": (
        lambda connection: (
            connection.exec_driver_sql("CREATE ROLE nobody_at_all"),
            connection.exec_driver_sql("SET LOCAL ROLE nobody_at_all"),
            run("SELECT * FROM files WHERE path = :name")(connection),
        ),
        Fatal,
        "may not do that",
    ),
}


def said_by(url: str, trouble: Trouble) -> tuple[Exception, str]:
    """The error that `connect` raises for a problem, and all that Python would print of it."""
    engine = make_engine(url)
    try:
        with connect(engine, write=True) as connection:
            trouble(connection)
    except Exception as error:
        return error, "".join(traceback.format_exception(error)) + repr(error)
    finally:
        engine.dispose()
    raise AssertionError("nothing went wrong")


def test_every_kind_of_database_error_is_a_sentence_without_values(store_url: str) -> None:
    own = SQLITE if store_url.startswith("sqlite") else POSTGRES
    for kind, (trouble, expected, word) in {**BOTH, **own}.items():
        error, printed = said_by(store_url, trouble)
        assert type(error) is expected, (kind, printed)
        assert word in str(error) and "\n" not in str(error), (kind, str(error))
        assert NAME not in printed, (kind, printed)


def test_a_full_a_busy_and_a_damaged_sqlite_file_say_nothing_of_its_rows(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Store.open(url) as store:
        ids = begin(store)
        store.record(ids.run_id, ids.cascade_id, [scored_file(f"/in/{NAME}/{n}") for n in range(40)])

    def fill(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        connection.execute(sa.update(images).values(manufacturer=NAME * 10_000))

    def damage(connection: Connection) -> None:
        connection.execute(sa.select(images)).all()

    error, printed = said_by(url, fill)
    assert type(error) is StoreDown and "full" in str(error) and NAME not in printed
    with open(tmp_path / "s.db", "r+b") as file:
        file.seek(4096)
        file.write(NAME.encode() * 20_000)
    error, printed = said_by(url, damage)
    assert type(error) is Fatal and "damaged" in str(error) and NAME not in printed


def test_statements_that_are_logged_or_printed_have_no_parameters(store_url: str) -> None:
    engine = make_engine(store_url)
    assert engine.hide_parameters
    engine.dispose()


def test_a_password_in_an_error_of_the_connection_is_hidden() -> None:
    url = "postgresql://u:hunter22@127.0.0.1:1/d?sslpassword=hunter33&passfile=/x"
    with pytest.raises(StoreDown) as down:
        Store.open(url)
    assert "hunter" not in "".join(traceback.format_exception(down.value))


def _refuse(url: str) -> None:
    """From here on, the store rejects rows of paths that contain the name, with an error that quotes the row."""
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            connection.execute(
                f"CREATE TRIGGER no BEFORE INSERT ON files WHEN NEW.path LIKE '%{NAME}%'"
                " BEGIN SELECT RAISE(ABORT, 'not that one'); END"
            )
    else:
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            connection.execute("ALTER TABLE files ADD CONSTRAINT no CHECK (path NOT LIKE '%DOE^JANE%')")


@pytest.mark.parametrize("command", [["scan"], ["watch", "--once"]])
def test_a_scan_and_a_watch_that_fail_in_the_store_print_no_file_name(
    store_url: str, tmp_path: Path, command: list[str], request: pytest.FixtureRequest
) -> None:
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / f"{NAME}.png", 1)
    _refuse(store_url)
    if not store_url.startswith("sqlite"):
        request.addfinalizer(lambda: _allow(store_url))
    bundle = make_bundle(tmp_path / "bundle")
    options = ["--db", store_url, "-v", *command, "in", f"--cascade={bundle}"]
    env = {"CXRBATCH_QUIET_S": "0", "CXRBATCH_WORKERS": "1", "CXRBATCH_PHI": "keep"}
    done = cxrbatch(*options, cwd=tmp_path, **env)
    assert done.returncode == 1, done.stderr
    assert "refused" in done.stderr and "Traceback" not in done.stderr
    assert NAME not in done.stdout + done.stderr and "JANE" not in done.stderr


def _allow(url: str) -> None:
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("ALTER TABLE files DROP CONSTRAINT no")
