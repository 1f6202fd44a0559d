"""Backup, check, prune."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from cxrbatch.cli import app
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.store import ReviewAction, Store
from cxrbatch.store.connection import connect
from cxrbatch.store.housekeeping import Pruned, _orphans, backup, check, prune
from cxrbatch.store.review_schema import reads, review_status, reviews, round_assignments, round_items, rounds
from cxrbatch.store.rounds import NewRound, close_round, create_round
from cxrbatch.store.schema import audit, images, metadata, predictions, scores
from cxrbatch.store.work_list import Filters
from fork_server import cxrbatch
from store_images import begin, found, linked, reject, review, scored_file

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store.open(store_url, clock=lambda: NOW) as opened:
        run = begin(opened)
        opened.record(
            run.run_id,
            run.cascade_id,
            [
                scored_file("/gone/1"),
                scored_file("/gone/2"),
                linked("/kept/2", "/gone/2"),
                scored_file("/gone/3"),
                reject("/gone/4"),
            ],
        )
        (reviewed,) = opened.everything_about("/gone/3")
        review(opened, reviewed.file["image_id"], "dr_a", ReviewAction.FLAG)
        opened.mark_missing(run.run_id, ["/gone"], set())
        yield opened


def number(store: Store, table: sa.Table) -> int:
    with connect(store.engine) as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_prune_forgets_what_has_long_been_gone_and_only_that(store: Store) -> None:
    later = NOW + timedelta(days=30)
    assert prune(store, 31, really=True, now=later) == Pruned(0, 0)
    # /gone/2 lives on as /kept/2; /gone/3 was reviewed.
    assert prune(store, 30, really=False, now=later) == Pruned(4, 1)
    assert len(list(store.results())) == 5
    assert prune(store, 30, really=True, now=later) == Pruned(4, 1)
    assert [row.path for row in store.results()] == ["/kept/2"]
    assert (number(store, images), number(store, predictions), number(store, scores)) == (2, 2, 8)
    assert prune(store, 30, really=True, now=later) == Pruned(0, 0)
    assert pruned_events(store) == [
        '{"files": 4, "images": 0, "reviews": 0, "days": 30}',
        '{"files": 0, "images": 1, "reviews": 0, "days": 30}',
    ]


def pruned_events(store: Store) -> list[str]:
    with connect(store.engine) as connection:
        query = sa.select(audit.c.detail).where(audit.c.event == "pruned").order_by(audit.c.id)
        return list(connection.execute(query).scalars())


def test_what_a_prune_deleted_before_it_ended_is_in_the_audit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cxrbatch.store.housekeeping._forget_images", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(store, 30, really=True, now=NOW + timedelta(days=30))
    assert pruned_events(store) == ['{"files": 4, "images": 0, "reviews": 0, "days": 30}']


def test_what_was_overwritten_is_looked_up_once_and_not_for_each_image(store: Store) -> None:
    if store.engine.dialect.name == "sqlite":
        pytest.skip("SQLite keeps a NOT IN in a tree")
    orphans = _orphans("postgresql", NOW, sa.false(), False)
    text = str(orphans.compile(store.engine, compile_kwargs={"literal_binds": True})).replace("%%", "%")
    with connect(store.engine) as connection:
        plan = "\n".join(connection.exec_driver_sql("EXPLAIN " + text).scalars())
    assert "SubPlan" not in plan and plan.count("Anti Join") == 4, plan


def test_prune_takes_reviews_along_only_when_told(store: Store) -> None:
    """What was reviewed goes with all that readers said of it, out of closed rounds too; audit stays whole."""
    later, run = NOW + timedelta(days=30), begin(store)
    store.unchanged([found("/gone/3")], run.cascade_id)
    ids = {path: store.everything_about(path)[0].file["image_id"] for path in ("/kept/2", "/gone/3")}
    read, unread = (make_round(store, name) for name in ("read", "unread"))  # both images
    for image_id in ids.values():
        review(store, image_id, "dr_a", ReviewAction.OVERRIDE, "COVID19", blinded=True, round_id=read)
    store.mark_missing(run.run_id, ["/gone"], set())
    events = number(store, audit)
    assert prune(store, 30, really=True, now=later) == Pruned(4, 1)
    close_round(store, read)
    assert prune(store, 30, really=True, include_reviewed=True, now=later) == Pruned(0, 0)  # a round is open
    close_round(store, unread)
    assert prune(store, 30, really=False, include_reviewed=True, now=later) == Pruned(0, 1, 2)
    assert (number(store, images), number(store, reviews)) == (2, 3)
    assert prune(store, 30, really=True, include_reviewed=True, now=later) == Pruned(0, 1, 2)
    left = (images, predictions, reviews, reads, review_status, rounds, round_items, round_assignments)
    assert [number(store, table) for table in left] == [1, 1, 1, 1, 1, 2, 2, 2]
    with connect(store.engine) as connection:
        assert connection.execute(sa.select(reads.c.image_id)).scalar_one() == ids["/kept/2"]
        assert [item.image_id for item in connection.execute(sa.select(round_items))] == 2 * [ids["/kept/2"]]
    assert pruned_events(store)[-1] == '{"files": 0, "images": 1, "reviews": 2, "days": 30}'
    assert number(store, audit) == events + 3


def make_round(store: Store, name: str) -> int:
    """All images that are there, read by dr_a."""
    return create_round(store, NewRound(name, ("dr_a",), Filters(), "{}", size=9, reads_per_image=1), "chief")


def test_prune_spares_what_has_returned(store: Store) -> None:
    run = begin(store)
    store.unchanged([found("/gone/1")], run.cascade_id)
    assert prune(store, 0, really=True, now=NOW) == Pruned(3, 0)
    assert [row.path for row in store.results()] == ["/gone/1", "/kept/2"]


def test_whatever_names_a_row_that_prune_deletes_has_an_index_for_it() -> None:
    """Else the database reads that whole table for each row that goes, to see that nothing names it any more."""
    for table in metadata.tables.values():
        unique = [each for each in table.constraints if isinstance(each, sa.UniqueConstraint | sa.PrimaryKeyConstraint)]
        served = {next(iter(each.columns)).name for each in (*table.indexes, *unique)}
        for key in table.foreign_keys:
            if key.column.table.name in ("files", "images", "predictions", "reviews", "round_items"):
                assert key.parent.name in served, f"{table.name}.{key.parent.name}"


def test_a_backup_is_a_store(store: Store, store_url: str, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    if not store_url.startswith("sqlite"):
        with pytest.raises(Fatal, match="pg_dump"):
            backup(store_url, target)
        return
    backup(store_url, target)
    assert check(f"sqlite:///{target}") == []
    with Store.open(f"sqlite:///{target}") as copy:
        assert list(copy.results()) == list(store.results())
    with pytest.raises(Fatal, match="is there already"):
        backup(store_url, target)
    with pytest.raises(Fatal, match="cannot be written"):
        backup(store_url, tmp_path / "no" / "copy.db")
    with pytest.raises(Fatal, match="There is no store"):
        backup(f"sqlite:///{tmp_path / 'none.db'}", tmp_path / "other.db")
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))


def test_check_finds_stale_copies_and_dangling_rows(store: Store, store_url: str) -> None:
    assert check(store_url) == []
    with connect(store.engine, write=True) as connection:
        connection.exec_driver_sql("UPDATE files SET label = 'COVID19' WHERE path = '/kept/2'")
    assert check(store_url) == ["1 files show another prediction than their prediction's row."]
    if store_url.startswith("sqlite"):
        with store.engine.connect() as raw:
            driver = raw.connection.driver_connection
            assert driver is not None
            driver.execute("PRAGMA foreign_keys = OFF")
            driver.execute("DELETE FROM images WHERE id = 1")
            driver.execute("PRAGMA foreign_keys = ON")
        assert "rows that are not there" in check(store_url)[0]


def test_a_backup_on_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file(f"/in/{k}") for k in range(500)])
    room = 64 * 1024  # bytes that a file may have: the kernel refuses the rest, as on a full disk
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "from cxrbatch.cli import main\n"
        f"sys.argv = ['cxrbatch', '--db', 'sqlite:///store.db', 'db', 'backup', 'copy.db']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*copy*"))


def backup_that_stops(url: str, target: Path, event: str, how: int = signal.SIGSTOP) -> None:
    """A backup whose process is stopped (or killed) at an audit event of Python."""
    sys.addaudithook(lambda name, _: os.kill(os.getpid(), how) if name == event else None)
    backup(url, target)


def test_two_backups_to_one_name_at_a_time_do_not_mix(tmp_path: Path) -> None:
    url, target = f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "copy.db"
    with Store.open(url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/in/1")])
    copied, ended = b"", []
    at = ("os.rename", "sqlite3.connect")  # one has everything but the name when the other begins
    both = [get_context("fork").Process(target=backup_that_stops, args=(url, target, event)) for event in at]
    try:
        for process in both:
            process.start()
            assert os.WIFSTOPPED(os.waitpid(process.pid or 0, os.WUNTRACED)[1])
        for process in both:
            os.kill(process.pid or 0, signal.SIGCONT)
            process.join()
            ended.append(process.exitcode)
            copied = copied or target.read_bytes()
    finally:
        for process in both:
            process.kill()
    assert ended == [0, 1] and target.read_bytes() == copied
    assert check(f"sqlite:///{target}") == []
    assert not list(tmp_path.glob(".*.part"))


def test_what_a_killed_backup_left_is_removed_by_the_next_to_that_name(tmp_path: Path) -> None:
    url, target = f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "copy.db"
    Store.open(url).close()
    killed = get_context("fork").Process(target=backup_that_stops, args=(url, target, "os.rename", signal.SIGKILL))
    killed.start()
    killed.join()
    assert [path.name for path in tmp_path.glob(".*.part")] == [f".copy.db.{killed.pid}.part"]
    backup(url, target)
    assert check(f"sqlite:///{target}") == [] and not list(tmp_path.glob(".*.part"))


def test_a_backup_beside_a_writer_is_whole(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with Store.open(url) as store:
        run, stop = begin(store), threading.Event()

        def write() -> None:
            for k in itertools.count():
                if stop.is_set():
                    return
                store.record(run.run_id, run.cascade_id, [scored_file(f"/in/{k}/{j}") for j in range(20)])

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for k in range(3):
                backup(url, tmp_path / f"{k}.db")
        finally:
            stop.set()
            writer.join()
    for k in range(3):
        assert check(f"sqlite:///{tmp_path / f'{k}.db'}") == []
        with Store.open(f"sqlite:///{tmp_path / f'{k}.db'}") as copy:
            assert len(list(copy.results())) % 20 == 0  # transactions, whole


def test_prune_goes_by_the_setting_and_says_so_where_there_is_none(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    now = [NOW - timedelta(days=100)]
    with Store.open(url, clock=lambda: now[0]) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/gone/1"), scored_file("/kept/1")])
        store.mark_missing(run.run_id, ["/gone"], set())
    (tmp_path / "config.toml").write_text("retention_days = 30\n")
    options = ["--db", url, "--config", str(tmp_path / "config.toml"), "db", "prune"]
    assert "1 file(s), 1 content(s)." in CliRunner().invoke(app, options).output
    assert "1 content(s), 0 review(s)." in CliRunner().invoke(app, [*options, "--include-reviewed"]).output
    assert CliRunner().invoke(app, [*options, "--yes"]).exit_code == 0
    with Store.open(url) as store:
        assert [row.path for row in store.results()] == ["/kept/1"]
    refused = CliRunner().invoke(app, ["--db", url, "db", "prune"])
    assert isinstance(refused.exception, Fatal) and refused.exception.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("command", [["watch", "."], ["scan", "."], ["status"]])
def test_every_daemon_refuses_a_store_of_a_newer_program(tmp_path: Path, command: list[str]) -> None:
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store, connect(store.engine, write=True) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    done = cxrbatch("--db", "sqlite:///store.db", *command, cwd=tmp_path)
    assert done.returncode == (3 if command == ["status"] else ExitCode.STORE_NOT_AT_HEAD), done.stderr
    assert "newer than this program" in done.stdout + done.stderr and "Traceback" not in done.stderr
