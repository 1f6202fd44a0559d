"""The migrations make exactly what schema.py and views.py say, on both stores, there and back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.store import RESULT_COLUMNS, Act, ReviewAction, Store, migrate, record_act
from cxrbatch.store.connection import connect, make_engine
from cxrbatch.store.schema import metadata
from cxrbatch.store.views import STUDY_COLUMNS, VIEWS, make_view, results
from store_images import begin, reject, review, scored_file


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
        for view in VIEWS:
            connection.exec_driver_sql(make_view(view, connection.dialect.name))
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


def _without_label_sets(row: Any) -> dict[str, Any]:
    """0004 brought them; going back loses them, until the image is scored again."""
    lost = ("label_set", "abnormal_probability", "scores_json")
    return {name: value for name, value in row._mapping.items() if name not in lost}


@pytest.mark.parametrize("step", ["0001", "0002", "0003", "0004", "0006", "0007", "0008"])
def test_rows_live_through_each_step_there_and_back(store_url: str, step: str) -> None:
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/a"), scored_file("/b", content="/a"), reject("/c")])
        before = list(store.results())
    assert migrate.downgrade(store_url, step) == step
    with pytest.raises(Fatal, match="run `cxrbatch db upgrade`"):
        Store.open(store_url)
    assert migrate.upgrade(store_url) == migrate.head()
    assert migrate.check(store_url) == []
    with Store.open(store_url) as store:
        assert [_without_label_sets(row) for row in store.results()] == [_without_label_sets(row) for row in before]
        marked = 1 if step >= "0003" else 2  # 0003 marks all of a content
        with connect(store.engine) as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM files WHERE is_copy").scalar_one() == marked
        assert len(before) == 3


#: Rows of 0003: 10,000 images, each with a prediction by each of two cascades and reviews of the second one.
REVIEWED = 10_000
FILL_0003 = (
    "INSERT INTO models (id, name, version, manifest_sha256, stages, weights_sha256, manifest_json, first_used) "
    "SELECT i, 'm', '1', 'm' || i, '', '', '{}', '2026-01-01 00:00:00' FROM n WHERE i <= 2",
    "INSERT INTO runs (id, cascade_id, started_at, host, version, device, engine, settings_json) "
    "SELECT i, i, '2026-01-01 00:00:00', '', '', '', '', '' FROM n WHERE i <= 2",
    "INSERT INTO images (id, sha256, format, rows, columns, bits_stored, number_of_frames, inverted, first_seen) "
    "SELECT i, 's' || i, 'png', 9, 9, 8, 1, (1=0), '2026-01-01 00:00:00' FROM n",
    "INSERT INTO predictions (id, image_id, cascade_id, run_id, label, confidence, decision, processed_at) "
    f"SELECT i + {{k}} * {REVIEWED}, i, {{k}} + 1, {{k}} + 1, CASE WHEN i % 2 = 0 THEN 'NORMAL' ELSE 'COVID19' END, "
    "0.5, 'needs_review', '2026-01-01 00:00:00' FROM n",
    # Every image has one by dr_a; every 4th another label by dr_b; every 8th a flag by dr_c, of the first prediction.
    f"INSERT INTO reviews (prediction_id, reviewer, action, label, comment, at) "
    f"SELECT i + {REVIEWED}, 'dr_a', 'accept', CASE WHEN i % 2 = 0 THEN 'NORMAL' ELSE 'COVID19' END, 'c' || i, "
    "'2026-01-02 00:00:00' FROM n",
    f"INSERT INTO reviews (prediction_id, reviewer, action, label, at) "
    f"SELECT i + {REVIEWED}, 'dr_b', 'override', 'TUBERCULOSIS', '2026-01-03 00:00:00' FROM n WHERE i % 4 = 0",
    "INSERT INTO reviews (prediction_id, reviewer, action, at) "
    "SELECT i, 'dr_c', 'flag', '2026-01-04 00:00:00' FROM n WHERE i % 8 = 0",
)
NUMBERS = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {REVIEWED}) "


def fill_0003(url: str) -> None:
    engine = make_engine(url)
    with connect(engine, write=True) as connection:
        for statement in FILL_0003:
            for k in range(2) if "{k}" in statement else [0]:
                into, select, rest = statement.replace("{k}", str(k)).partition("SELECT")
                if connection.dialect.name == "postgresql":
                    rest = rest.replace("%", "%%")
                    rest = re.sub(r"'(2026-[^']*)'", r"TIMESTAMPTZ '\1+00'", rest)
                connection.exec_driver_sql(into + NUMBERS + select + rest)
        if connection.dialect.name == "postgresql":  # its ids go on after those that were given
            for table in ("models", "runs", "images", "predictions"):
                after = f"setval(pg_get_serial_sequence('{table}', 'id'), (SELECT max(id) FROM {table}))"
                connection.exec_driver_sql(f"SELECT {after} WHERE EXISTS (SELECT 1 FROM {table})")
    engine.dispose()


def ask(url: str, query: str) -> list[tuple[object, ...]]:
    engine = make_engine(url)
    with connect(engine) as connection:
        rows = [tuple(row) for row in connection.exec_driver_sql(query)]
    engine.dispose()
    return rows


def test_ten_thousand_reviews_move_to_their_images_and_back(empty_url: str) -> None:
    migrate.upgrade(empty_url, "0003")
    fill_0003(empty_url)
    before = ask(empty_url, "SELECT * FROM reviews ORDER BY id")
    assert len(before) == REVIEWED + REVIEWED // 4 + REVIEWED // 8
    migrate.upgrade(empty_url)
    assert migrate.check(empty_url) == []
    assert ask(empty_url, "SELECT count(*), count(DISTINCT act_id), min(shown_label) FROM reviews") == [
        (len(before), len(before), "COVID19")
    ]
    assert ask(empty_url, "SELECT shown_cascade_id, count(*) FROM reviews GROUP BY 1 ORDER BY 1") == [
        (1, REVIEWED // 8),
        (2, REVIEWED + REVIEWED // 4),
    ]
    assert ask(empty_url, "SELECT count(*) FROM reads") == [(len(before),)]
    assert ask(empty_url, "SELECT status, count(label), count(*) FROM review_status GROUP BY status ORDER BY 1") == [
        ("agreed", REVIEWED * 3 // 4, REVIEWED * 3 // 4),
        ("disputed", 0, REVIEWED // 8),
        ("flagged", 0, REVIEWED // 8),
    ]
    assert ask(empty_url, "SELECT decided_by FROM review_status WHERE image_id = 8") == [("dr_a, dr_b, dr_c",)]
    with Store.open(empty_url) as store:  # ids go on where they were
        made = record_act(store, Act("new", 1, "dr_d", ReviewAction.SKIP))
        assert made.review_id == len(before) + 1
    migrate.downgrade(empty_url, "0003")
    assert ask(empty_url, "SELECT * FROM reviews ORDER BY id") == before
    assert ask(empty_url, "SELECT count(*) FROM predictions") == [(2 * REVIEWED,)]


def test_what_was_withdrawn_stays_withdrawn_when_going_back_before_reviews_of_images(store_url: str) -> None:
    status = "SELECT image_id, status, label, decided_by FROM review_status ORDER BY image_id"
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file(f"/{k}") for k in range(3)])
        for image_id in (1, 2, 3):
            review(store, image_id, "a", ReviewAction.ACCEPT, shown_label="NORMAL")
            review(store, image_id, "a", ReviewAction.OVERRIDE, "PNEUMONIA")
        for image_id in (1, 2):
            review(store, image_id, "a", ReviewAction.WITHDRAW)
        review(store, 2, "b", ReviewAction.OVERRIDE, "COVID19")
    before = ask(store_url, status)
    assert before == [(2, "agreed", "COVID19", "b"), (3, "agreed", "PNEUMONIA", "a")]
    migrate.downgrade(store_url, "0003")
    assert ask(store_url, "SELECT reviewer, label FROM reviews ORDER BY id") == [("a", "PNEUMONIA"), ("b", "COVID19")]
    migrate.upgrade(store_url)
    assert ask(store_url, status) == before


def test_ten_thousand_images_get_a_mean_grey_and_lose_it_again(empty_url: str) -> None:
    """0007: rows from before have none; going back takes the column and nothing else."""
    migrate.upgrade(empty_url, "0003")
    fill_0003(empty_url)
    migrate.upgrade(empty_url, "0006")
    run_sql(
        empty_url,
        "INSERT INTO files (path, size, mtime_ns, inode, state, image_id, prediction_id, cascade_id, run_id, label, "
        "confidence, decision, processed_at, first_seen, last_seen, sha256) SELECT '/in/' || p.id, 1, p.id, p.id, "
        "'done', p.image_id, p.id, 1, 1, p.label, p.confidence, p.decision, p.processed_at, p.processed_at, "
        "p.processed_at, 's' || p.image_id FROM predictions p WHERE p.cascade_id = 1",
    )
    old_columns = ", ".join(name for name in RESULT_COLUMNS if name != "grey_mean")
    question = f"SELECT {old_columns} FROM results ORDER BY path"
    before, images = ask(empty_url, question), ask(empty_url, "SELECT * FROM images ORDER BY id")
    assert len(before) == len(images) == REVIEWED
    migrate.upgrade(empty_url)
    assert migrate.check(empty_url) == []
    assert ask(empty_url, question) == before
    assert ask(empty_url, "SELECT count(*), count(grey_mean) FROM results") == [(REVIEWED, 0)]
    with Store.open(empty_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/new", facts={"grey_mean": 131.25})])
        assert [row.grey_mean for row in store.results(roots=["/new"])] == [131.25]
    run_sql(empty_url, "DELETE FROM files WHERE path = '/new'")
    migrate.downgrade(empty_url, "0006")
    assert ask(empty_url, question) == before
    assert ask(empty_url, "SELECT * FROM images ORDER BY id")[:REVIEWED] == images


def test_adjudications_move_beside_the_reads_of_the_same_person_and_back(store_url: str) -> None:
    """0008. What older programs wrote is adjudicated, withdrawn and read over as if it were new."""
    current = "SELECT image_id, reader, round_id, action, label FROM reads ORDER BY image_id, reader, round_id"
    status = "SELECT image_id, status, label FROM review_status ORDER BY image_id"
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file(f"/{k}") for k in range(3)])
        for image_id in (1, 2, 3):
            review(store, image_id, "a", ReviewAction.OVERRIDE, "NORMAL")
            review(store, image_id, "b", ReviewAction.OVERRIDE, "COVID19")
        for image_id in (1, 2):
            review(store, image_id, "chief", ReviewAction.OVERRIDE, "PNEUMONIA", adjudication=True)
        review(store, 2, "chief", ReviewAction.OVERRIDE, "NORMAL")
        review(store, 3, "b", ReviewAction.SKIP, adjudication=True)
    others = [
        (k, reader, 0, "override", label) for k in (1, 2, 3) for reader, label in (("a", "NORMAL"), ("b", "COVID19"))
    ]
    decided = [(k, "chief", -1, "override", "PNEUMONIA") for k in (1, 2)]
    now = ask(store_url, status)
    assert now == [(1, "adjudicated", "PNEUMONIA"), (2, "adjudicated", "PNEUMONIA"), (3, "disputed", None)]
    migrate.downgrade(store_url, "0007")
    assert ask(store_url, current) == sorted([*others, *((k, who, 0, *said) for k, who, _, *said in decided)])
    assert ask(store_url, status) == now
    migrate.upgrade(store_url)
    assert migrate.check(store_url) == []
    assert ask(store_url, current) == sorted([*others, *decided])
    with Store.open(store_url) as store:
        review(store, 1, "chief", ReviewAction.OVERRIDE, "NORMAL")
        assert review(store, 2, "chief", ReviewAction.WITHDRAW, adjudication=True).status == "disputed"
        # A program between the two left the older row where it was.
        run_sql(store_url, "UPDATE reads SET review_id = 7, label = 'OLD' WHERE reader = 'chief' AND round_id = 0")
    migrate.downgrade(store_url, "0008")
    run_sql(store_url, "UPDATE alembic_version SET version_num = '0007'")
    migrate.upgrade(store_url)
    assert ask(store_url, current) == sorted([*others, decided[0]])
    assert ask(store_url, status)[0] == (1, "adjudicated", "PNEUMONIA")


def run_sql(url: str, statement: str) -> None:
    engine = make_engine(url)
    with connect(engine, write=True) as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


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
        columns = sa.inspect(connection).get_columns("studies")
        assert tuple(column["name"] for column in columns) == STUDY_COLUMNS


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
    reported = subprocess.run(
        [sys.executable, "-c", code, store_url], capture_output=True, text=True, check=True
    ).stdout
    assert reported.strip() == "False"


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
    for use in (Store.open, migrate.upgrade):
        with pytest.raises(Fatal, match="newer than this program") as refused:
            use(empty_url)
        assert refused.value.exit_code == ExitCode.STORE_NOT_AT_HEAD


def test_an_unknown_revision_is_a_sentence(store_url: str) -> None:
    Store.open(store_url).close()
    with pytest.raises(Fatal, match=f"cannot be moved to schema 'nonsense'.* {migrate.head()}") as refused:
        migrate.upgrade(store_url, "nonsense")
    assert refused.value.exit_code == ExitCode.USAGE


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
