"""The migrations make exactly what schema.py and views.py say, on both stores, there and back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.store import RESULT_COLUMNS, Store, migrate
from cxrbatch.store.engine import connect, make_engine
from cxrbatch.store.schema import metadata
from cxrbatch.store.views import make_results, results
from store_films import begin, film, reject


def everything(connection: Connection) -> set[str]:
    """Every definition in the database, in the database's own words."""
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master").all()
    else:
        rows = connection.exec_driver_sql(
            """
            SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
             WHERE connamespace = 'public'::regnamespace
            UNION ALL SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
            UNION ALL SELECT viewname, definition FROM pg_views WHERE schemaname = 'public'
            UNION ALL SELECT table_name || '.' || column_name,
                             concat_ws(' ', ordinal_position, data_type, is_nullable, column_default, collation_name)
                        FROM information_schema.columns WHERE table_schema = 'public'
            """
        ).all()
    # The order in which a table's constraints are written down says nothing.
    lines = {str(name): sorted(re.split(r"[,\s]*\n\s*|, ", sql or "")) for name, sql in rows}
    return {f"{name}: {parts}" for name, parts in lines.items() if "alembic" not in name}


def test_migrations_make_what_the_schema_says(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    assert migrate.check(empty_url) == []
    engine = make_engine(empty_url)
    with connect(engine) as connection:
        migrated = everything(connection)
    migrate.downgrade(empty_url, "base")
    with connect(engine, write=True) as connection:
        metadata.create_all(connection)
        connection.exec_driver_sql(make_results(connection.dialect.name))
        assert everything(connection) == migrated
    engine.dispose()


def test_there_and_back_and_there_again(empty_url: str) -> None:
    assert migrate.current(make(empty_url)) is None
    assert migrate.upgrade(empty_url) == migrate.head() == migrate.current(empty_url)
    assert migrate.downgrade(empty_url, "base") is None
    engine = make_engine(empty_url)
    with connect(engine) as connection:
        assert migrate.is_empty(connection) or sa.inspect(connection).get_table_names() == ["alembic_version"]
        assert sa.inspect(connection).get_view_names() == []
    engine.dispose()
    assert migrate.upgrade(empty_url) == migrate.head()
    assert migrate.check(empty_url) == []


@pytest.mark.parametrize("step", ["0001", "0002"])
def test_rows_live_through_each_step_there_and_back(store_url: str, step: str) -> None:
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [film("/a"), film("/b", content="/a"), reject("/c")])
        before = list(store.results())
    assert migrate.downgrade(store_url, step) == step
    with pytest.raises(Fatal, match="run `cxrbatch db upgrade`"):
        Store.open(store_url)
    assert migrate.upgrade(store_url) == migrate.head()
    assert migrate.check(store_url) == []
    with Store.open(store_url) as store:
        assert list(store.results()) == before
        with connect(store.engine) as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM files WHERE is_copy").scalar_one() == 2
        assert len(before) == 3


def make(url: str) -> str:
    make_engine(url, may_create=True).connect().close()
    return url


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE files ADD COLUMN mood TEXT",
        "DROP INDEX ix_files_processed_at",
        "DROP VIEW results",
        "UPDATE alembic_version SET version_num = '0000'",
    ],
)
def test_check_finds_what_was_changed_by_hand(empty_url: str, change: str) -> None:
    migrate.upgrade(empty_url)
    engine = make_engine(empty_url)
    with connect(engine, write=True) as connection:
        connection.exec_driver_sql(change)
    engine.dispose()
    assert len(migrate.check(empty_url)) == 1


def test_the_view_has_the_columns_of_the_exports(store_url: str) -> None:
    with Store.open(store_url) as store, connect(store.engine) as connection:
        columns = sa.inspect(connection).get_columns("results")
        assert tuple(column["name"] for column in columns) == RESULT_COLUMNS
        names = ", ".join(RESULT_COLUMNS)  # unquoted, as people type them
        assert connection.exec_driver_sql(f"SELECT {names} FROM results").all() == []
        assert connection.execute(sa.select(results)).all() == []


def test_a_new_sqlite_file_is_set_up_by_opening_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    Store.open(url).close()
    assert migrate.current(url) == migrate.head()
    with pytest.raises(Fatal, match="There is no store"):
        Store.open(f"sqlite:///{tmp_path / 'no.db'}", may_create=False)
    assert not (tmp_path / "no.db").exists()


def test_a_store_at_head_is_opened_without_alembic(store_url: str) -> None:
    Store.open(store_url).close()
    code = (
        "import sys; from cxrbatch.store import Store; Store.open(sys.argv[1]).close(); print('alembic' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code, store_url], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "False"


def test_the_files_of_the_steps_are_named_after_their_revisions() -> None:
    steps = ScriptDirectory.from_config(migrate._config())
    assert migrate._steps() == {step.revision for step in steps.walk_revisions()}
    assert migrate.head() == steps.get_current_head()


def test_an_empty_postgres_is_refused_with_the_command_to_run(empty_url: str) -> None:
    if empty_url.startswith("sqlite"):
        pytest.skip("a new SQLite file is set up at once")
    with pytest.raises(Fatal, match="is empty: run `cxrbatch db upgrade`") as refused:
        Store.open(empty_url)
    assert refused.value.exit_code == ExitCode.STORE_NOT_AT_HEAD
    migrate.upgrade(empty_url)
    Store.open(empty_url).close()


def test_a_store_of_a_newer_program_is_refused(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    engine = make_engine(empty_url)
    with connect(engine, write=True) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(Fatal, match="newer than this program") as refused:
        Store.open(empty_url)
    assert refused.value.exit_code == ExitCode.STORE_NOT_AT_HEAD
    with pytest.raises(Fatal, match="cannot be moved"):
        migrate.upgrade(empty_url)


def test_an_unknown_revision_is_a_sentence(store_url: str) -> None:
    Store.open(store_url).close()
    with pytest.raises(Fatal, match="cannot be moved to schema 'nonsense'"):
        migrate.upgrade(store_url, "nonsense")


def test_two_programs_may_open_a_new_store_at_once(tmp_path: Path) -> None:
    code = "import sys; from cxrbatch.store import Store; Store.open(sys.argv[1]).close()"
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path / 'both.db'}"]
    programs = [subprocess.Popen(command) for _ in range(2)]
    assert [program.wait() for program in programs] == [0, 0]
    assert migrate.check(command[-1]) == []


def test_the_migrations_import_nothing_of_ours() -> None:
    versions = Path(migrate._folder()) / "versions"
    for step in versions.glob("*.py"):
        assert "cxrbatch" not in re.sub(r'^""".*?"""', "", step.read_text(), flags=re.DOTALL)
