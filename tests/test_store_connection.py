"""Opening a store, errors, and the state after a kill."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import sqlalchemy as sa

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.store import Backoff, JobQueue, RetryPolicy, Store, StoreDown, migrate
from cxrbatch.store.connection import connect, make_engine, network_warning, parse_url
from cxrbatch.store.housekeeping import check, prune
from cxrbatch.store.recording import write_outcomes
from cxrbatch.store.schema import files, images, predictions, scores
from store_images import begin, found, linked, scored_file


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nonsense", "cannot be read"),
        ("", "cannot be read"),
        ("mysql://u:secret@h/d", "No store of the kind 'mysql'"),
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("sqlite://store.db", "three slashes"),
        ("postgresql://u:secret@h:port/d", "cannot be read"),
        ("sqlite:////nowhere/at/all/store.db", "folder of the store is not there"),
        ("sqlite:////tmp", "is a folder"),
        ("sqlite:////dev/null/store.db", "not there"),
        ("postgresql://u:secret@127.0.0.1:1/d", "Postgres at 127.0.0.1 cannot take this now"),
        ("postgres://u:secret@name.invalid/d", "Postgres at name.invalid cannot take this now"),
        ("postgres://u:my@secret@127.0.0.1:1/d", "write it as %40"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence_without_the_password(url: str, sentence: str) -> None:
    with pytest.raises((Fatal, StoreDown), match=sentence) as refused:
        Store.open(url)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("url", ["nonsense", "mysql://h/d", "sqlite://", "sqlite://store.db"])
def test_what_is_no_url_of_a_store_is_a_setting_that_cannot_be(url: str) -> None:
    with pytest.raises(Fatal) as refused:
        parse_url(url)
    assert refused.value.exit_code is ExitCode.USAGE


def test_postgres_urls_of_every_spelling_get_our_driver() -> None:
    for spelling in ("postgres", "postgresql", "postgresql+psycopg"):
        assert parse_url(f"{spelling}://u:p@h/d").drivername == "postgresql+psycopg"


def test_what_postgres_refuses_is_one_sentence(postgres_url: str) -> None:
    url = sa.make_url(postgres_url)
    with pytest.raises(Fatal, match="has no database 'nothing_here': create it"):
        Store.open(url.set(database="nothing_here").render_as_string(hide_password=False))
    with pytest.raises(Fatal, match="does not let this user in"):
        Store.open(url.set(username="nobody_here").render_as_string(hide_password=False))


def test_files_that_are_no_store_are_left_alone(tmp_path: Path) -> None:
    junk = tmp_path / "junk.db"
    junk.write_bytes(b"this is a letter, not a database" * 100)
    with pytest.raises(Fatal, match="is not a SQLite store"):
        Store.open(f"sqlite:///{junk}")
    half = tmp_path / "half.db"
    half.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(Fatal, match="damaged or no SQLite store"):
        Store.open(f"sqlite:///{half}")
    foreign = tmp_path / "foreign.db"
    sqlite3.connect(foreign).execute("CREATE TABLE files (a)").connection.commit()
    with pytest.raises(Fatal, match="holds tables that are not ours"):
        Store.open(f"sqlite:///{foreign}")
    assert junk.read_bytes().startswith(b"this is a letter")


def test_read_only_files_and_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, so the answer is faked.
    Store.open(f"sqlite:///{tmp_path / 's.db'}").close()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "s.db" and may(path, mode))
    with pytest.raises(Fatal, match="is read-only: change its permissions"):
        Store.open(f"sqlite:///{tmp_path / 's.db'}")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and may(path, mode))
    with pytest.raises(Fatal, match="SQLite writes beside its file"):
        Store.open(f"sqlite:///{tmp_path / 's.db'}")


def test_sqlite_is_set_to_keep_what_it_was_given(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 's.db'}", may_create=True)
    with connect(engine) as connection:
        answers = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert answers == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
    engine.dispose()


def _open_each(folder: Path, together: Barrier) -> None:
    for number in range(100):
        engine = make_engine(f"sqlite:///{folder / f'{number}.db'}", may_create=True)
        together.wait()
        engine.connect().close()
        engine.dispose()


def test_a_store_that_is_deleted_or_replaced_while_it_is_open_takes_no_more_rows(tmp_path: Path) -> None:
    """SQLite would go on in the file that has no name any more."""
    path, elsewhere = tmp_path / "store.db", tmp_path / "elsewhere.db"
    with Store.open(f"sqlite:///{path}") as store:
        run = begin(store)
        path.rename(elsewhere)
        with pytest.raises(StoreDown, match=r"store\.db is no longer there"):
            store.record(run.run_id, run.cascade_id, [scored_file("/in/a")])
        store.engine.dispose()  # as for one thread more than there are connections: it opens another one
        with pytest.raises(StoreDown, match=r"store\.db is no longer there"):
            store.record(run.run_id, run.cascade_id, [scored_file("/in/a")])
        assert not path.exists(), "SQLite would make an empty file, and the next start a new store"
        elsewhere.rename(path)
        store.record(run.run_id, run.cascade_id, [scored_file("/in/a")])
        shutil.copy(path, elsewhere)
        elsewhere.replace(path)
        with pytest.raises(Fatal, match="was replaced by another file"):
            store.record(run.run_id, run.cascade_id, [scored_file("/in/b")])


def test_two_programs_may_set_a_new_sqlite_file_to_wal_at_once(tmp_path: Path) -> None:
    """SQLite refuses one of such a pair at once, in one try of eight."""
    together = multiprocessing.Barrier(2, timeout=20)
    programs = [multiprocessing.Process(target=_open_each, args=(tmp_path, together)) for _ in range(2)]
    for program in programs:
        program.start()
    for program in programs:
        program.join()
    assert [program.exitcode for program in programs] == [0, 0]


def test_a_sqlite_store_on_a_network_mount_gets_a_warning(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    lines = ["22 1 8:1 / / rw - ext4 /dev/vda rw", f"40 22 0:50 / {tmp_path} rw shared:1 - nfs4 server:/x rw"]
    table.write_text("\n".join(lines))
    assert "nfs4" in (network_warning(parse_url(f"sqlite:///{tmp_path}/s.db"), str(table)) or "")
    assert network_warning(parse_url("sqlite:////s.db"), str(table)) is None
    assert network_warning(parse_url("postgres://h/d"), str(table)) is None


def test_nobody_waits_for_ever_behind_a_lock(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if store_url.startswith("sqlite"):
        pytest.skip("about Postgres")
    monkeypatch.setattr("cxrbatch.store.connection._BUSY_S", 0.2)
    with Store.open(store_url) as store:
        with psycopg.connect(store_url.replace("+psycopg", "")) as other:
            other.execute("LOCK TABLE files")
            for act in (store.counts, lambda: store.record(*begin_ids(store), [scored_file("/a")])):
                with pytest.raises(StoreDown, match=r"has held a lock in Postgres at .* for too long"):
                    act()
            with pytest.raises(StoreDown, match="has held a lock"):
                migrate.downgrade(store_url, "0005")
        assert store.counts().by_state == {}
    with connect(make_engine(f"{store_url}{'&' if '?' in store_url else '?'}options=-c%20lock_timeout%3D7s")) as own:
        assert own.exec_driver_sql("SHOW lock_timeout").scalar_one() == "7s", "who sets it in the URL knows better"
    for name, value in (("PGOPTIONS", "-c lock_timeout=8s"), ("PGAPPNAME", "ward 3"), ("PGCONNECT_TIMEOUT", "3")):
        monkeypatch.setenv(name, value)
    with connect(make_engine(store_url)) as own:
        assert own.exec_driver_sql("SHOW lock_timeout").scalar_one() == "8s"
        assert own.exec_driver_sql("SHOW application_name").scalar_one() == "ward 3"
        assert own.connection.dbapi_connection.info.get_parameters()["connect_timeout"] == "3"


def begin_ids(store: Store) -> tuple[int, int]:
    run = begin(store)
    return run.run_id, run.cascade_id


def test_every_letter_of_a_file_name_goes_into_postgres(
    store_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store_url.startswith("sqlite"):
        pytest.skip("about Postgres")
    for encoding in ("LATIN1", "SQL_ASCII"):
        monkeypatch.setenv("PGCLIENTENCODING", encoding)
        with Store.open(store_url) as store:
            assert store.record(*begin_ids(store), [scored_file("/日本")]).done == 1
            assert [row.path for row in store.results()] == ["/日本"]
    monkeypatch.delenv("PGCLIENTENCODING")
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        try:
            url = sa.make_url(postgres_url).set(database="latin").render_as_string(hide_password=False)
            with pytest.raises(Fatal, match=r"encoding of the database is LATIN1, .* ENCODING 'UTF8'"):
                migrate.upgrade(url)
        finally:
            connection.exec_driver_sql("DROP DATABASE latin WITH (FORCE)")
    admin.dispose()


def test_a_writer_waits_for_another_and_then_says_so(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not store_url.startswith("sqlite"):
        pytest.skip("Postgres has no single writer")
    monkeypatch.setattr("cxrbatch.store.connection._BUSY_S", 0.2)
    with Store.open(store_url) as store:
        run = begin(store)
        with (
            connect(make_engine(store_url), write=True),
            pytest.raises(StoreDown, match="Another program has been writing"),
        ):
            store.record(run.run_id, run.cascade_id, [scored_file("/a")])
        assert store.record(run.run_id, run.cascade_id, [scored_file("/a")]).done == 1


def test_a_lost_connection_is_store_down_and_the_batch_can_come_again(store_url: str, postgres_url: str) -> None:
    if store_url.startswith("sqlite"):
        pytest.skip("a file does not hang up")
    with Store.open(store_url) as store:
        run = begin(store)
        with pytest.raises(StoreDown), connect(store.engine, write=True) as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", [pid])
            connection.exec_driver_sql("SELECT 1")
        assert store.record(run.run_id, run.cascade_id, [scored_file("/a")]).done == 1


def test_a_failover_to_a_standby_is_waited_out(store_url: str, postgres_url: str) -> None:
    """The connected server stops accepting writes; later it, or another server of the same name, accepts them."""
    if store_url.startswith("sqlite"):
        pytest.skip("a file has no standby")
    name = sa.make_url(store_url).database
    with (
        Store.open(store_url) as store,
        psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as other,
    ):
        run = begin(store)
        other.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        store.engine.dispose()
        try:
            with pytest.raises(StoreDown, match="cannot take this now"):
                store.record(run.run_id, run.cascade_id, [scored_file("/a")])
            query = "SELECT pid FROM pg_stat_activity WHERE datname = %s"
            deadline = time.monotonic() + 30  # the server takes a moment to see that it is closed
            while (pids := other.execute(query, [name]).fetchall()) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert pids == [], "the connection to the standby is not kept"
        finally:
            other.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        assert store.record(run.run_id, run.cascade_id, [scored_file("/a")]).done == 1


def test_a_row_that_prune_took_meanwhile_makes_the_batch_come_again(store_url: str) -> None:
    """Another program deletes an image between our query and the row that refers to it."""
    if store_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    with Store.open(store_url) as store, Store.open(store_url) as pruner:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/a", content="x")])
        with connect(store.engine, write=True) as connection:
            for table in (scores, files, predictions):
                connection.execute(sa.delete(table))
        with pytest.raises(StoreDown), connect(store.engine, write=True) as connection:
            image_id = connection.execute(sa.select(images.c.id)).scalar_one()
            with connect(pruner.engine, write=True) as other:
                other.execute(sa.delete(images))
            row = {"path": "/a", "size": 1, "mtime_ns": 1, "inode": 1, "state": "waiting", "image_id": image_id}
            moment = datetime.now(UTC)
            connection.execute(sa.insert(files), row | {"first_seen": moment, "last_seen": moment})
        assert store.record(run.run_id, run.cascade_id, [scored_file("/a", content="x")]).done == 1


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_prune_leaves_what_another_program_is_recording(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxrbatch.store.connection._BUSY_S", 1)
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/a", content="x"), scored_file("/c")])
        store.mark_missing(run.run_id, ["/"], set())
        with connect(store.engine, write=True) as connection:
            write_outcomes(connection, run.run_id, run.cascade_id, [linked("/b", "x")], datetime.now(UTC))
            assert prune(store, 0, really=True).images == 1
        assert [(row.path, row.state) for row in store.results()] == [("/b", "done")]


def test_a_connection_notices_a_server_that_went_away_without_a_word(postgres_url: str) -> None:
    with connect(make_engine(postgres_url)) as connection:
        asked = connection.connection.dbapi_connection.info.get_parameters()  # type: ignore[union-attr]
    assert asked["keepalives_idle"] == "20" and asked["tcp_user_timeout"] == "60000"
    given = sa.make_url(postgres_url).update_query_dict({"keepalives_idle": "7", "options": "-c work_mem=8MB"})
    with connect(make_engine(given.render_as_string(hide_password=False))) as connection:
        asked = connection.connection.dbapi_connection.info.get_parameters()  # type: ignore[union-attr]
        assert asked["keepalives_idle"] == "7"
        assert [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in ("work_mem", "timezone")] == [
            "8MB",
            "UTC",
        ]


def test_clients_of_one_store_do_not_all_come_back_at_once() -> None:
    backoff: dict[int, list[float]] = {}
    for client in range(2):
        noted = backoff.setdefault(client, [])

        class Clock(threading.Event):
            def wait(self, timeout: float | None = None, noted: list[float] = noted) -> bool:
                noted.append(timeout or 0)
                return len(noted) == 4

        def down() -> None:
            raise StoreDown("It is away.")

        with pytest.raises(StoreDown):
            RetryPolicy(forever=True, stop=Clock())(down)
    assert all(one != two for one, two in zip(*backoff.values(), strict=True))
    for noted in backoff.values():
        assert all(plan / 2 <= wait <= plan * 1.5 for plan, wait in zip((0.5, 1, 2, 5), noted, strict=True))


def test_programs_that_record_the_same_contents_at_once_agree(store_url: str) -> None:
    """Four writers, the same forty contents in different orders: no deadlock, one prediction per content."""
    with Store.open(store_url) as store:
        run = begin(store)
        troubles: list[BaseException] = []

        def write(who: int) -> None:
            try:
                with Store.open(store_url) as mine:
                    for turn in range(5):
                        order = [(who * 7 + turn * 3 + i * (1 if who % 2 else -1)) % 40 for i in range(40)]
                        batch = [scored_file(f"/{i % 20}/{i}", content=str(i)) for i in order]
                        mine.record(run.run_id, run.cascade_id, batch)
            except BaseException as trouble:
                troubles.append(trouble)

        writers = [threading.Thread(target=write, args=[who]) for who in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert troubles == []
        assert store.counts().by_state == {"done": 40}
        with connect(store.engine) as connection:
            for table, number in ((images, 40), (predictions, 40), (scores, 160)):
                assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == number


KILLED = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
from store_images import begin, scored_file
from cxrbatch.store import Store

with Store.open(sys.argv[1]) as store:
    run = begin(store)
    print("ready", flush=True)
    for number in itertools.count():
        batch = [scored_file(f"/{number:05}/{i}", content=f"{number} {i}") for i in range(20)]
        store.record(run.run_id, run.cascade_id, batch)
        print(number, flush=True)
"""


@pytest.mark.crash
@pytest.mark.parametrize("after_s", [0.05, 0.21, 0.4])
def test_a_kill_leaves_whole_batches_and_all_that_were_confirmed(store_url: str, after_s: float) -> None:
    command = [sys.executable, "-c", KILLED, store_url, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        time.sleep(after_s)
        program.send_signal(signal.SIGKILL)
        confirmed = len(program.stdout.read().splitlines())
    with Store.open(store_url) as store:
        with connect(store.engine) as connection:
            kept: dict[str, int] = {}
            for path in connection.execute(sa.select(files.c.path)).scalars():
                kept[path[:6]] = kept.get(path[:6], 0) + 1
            numbers = connection.execute(sa.select(sa.func.count()).select_from(scores)).scalar_one()
        assert set(kept.values()) <= {20}
        assert confirmed <= len(kept) <= confirmed + 1
        assert numbers == 4 * 20 * len(kept)
        assert check(store_url) == []
        run = begin(store)
        first = [found(f"/00000/{i}") for i in range(20)] if kept else []
        assert len(store.unchanged(first, run.cascade_id)) == len(first)


def test_a_checked_out_tree_and_an_install_both_find_the_migrations(tmp_path: Path, monkeypatch: Any) -> None:
    import cxrbatch

    package = tmp_path / "cxrbatch"
    (package / "migrations").mkdir(parents=True)
    (package / "migrations" / "env.py").touch()
    assert migrate._folder().name == "migrations"
    monkeypatch.setattr(cxrbatch, "__file__", str(package / "__init__.py"))
    assert migrate._folder() == package / "migrations"
    monkeypatch.setattr(cxrbatch, "__file__", str(tmp_path / "elsewhere" / "cxrbatch" / "__init__.py"))
    with pytest.raises(Fatal, match="install it again"):
        migrate._folder()


def test_one_that_is_frozen_while_it_sends_rows_stops_nobody(store_url: str) -> None:
    """The server does not count it as idle, and would wait for the rest of the rows without end."""
    if store_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    with Store.open(store_url) as store:
        begin(store)
        with connect(store.engine) as connection:
            if (connection.dialect.server_version_info or (0,)) < (17,):
                pytest.skip("the limit of a whole transaction came with Postgres 17")
        child = multiprocessing.get_context("spawn").Process(target=_offer_and_freeze, args=(store_url,))
        child.start()
        assert child.pid is not None
        while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
            assert child.is_alive()
            time.sleep(0.05)
        try:
            with connect(store.engine, write=True) as connection:  # waits for the first rows
                connection.exec_driver_sql("SET LOCAL lock_timeout = '60s'")
                row = {"path": "/in/0000", "size": 1, "mtime_ns": 1, "inode": 1, "state": "waiting"}
                moment = datetime.now(UTC)
                connection.execute(sa.insert(files), row | {"first_seen": moment, "last_seen": moment})
        finally:
            os.kill(child.pid, signal.SIGCONT)
            child.join()
        assert child.exitcode == 0


def _offer_and_freeze(url: str) -> None:
    import cxrbatch.store.connection

    cxrbatch.store.connection._LONGEST_S = 2
    with Store.open(url) as store:

        def rows(parameters: Any) -> Any:
            for n, row in enumerate(parameters):
                if n == 600:
                    os.kill(os.getpid(), signal.SIGSTOP)
                yield row

        def execute(cursor: Any, statement: str, parameters: Any, _context: Any) -> bool:
            cursor.executemany(statement, rows(parameters))
            return True

        sa.event.listen(store.engine, "do_executemany", execute)
        job_queue = JobQueue(store, begin(store), "one", 60, Backoff())
        with pytest.raises(StoreDown):
            job_queue.offer([found(f"/in/{n:04}") for n in range(1000)], inodes_tell=True)
