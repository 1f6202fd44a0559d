"""Backup, check, prune."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from cxrbatch.errors import Fatal
from cxrbatch.store import ReviewAction, Store
from cxrbatch.store.engine import connect
from cxrbatch.store.housekeeping import Pruned, backup, check, prune
from cxrbatch.store.schema import audit, images, predictions, scores
from store_films import begin, film, found, linked, reject

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store.open(store_url, clock=lambda: NOW) as opened:
        run = begin(opened)
        opened.record(
            run.run_id,
            run.cascade_id,
            [film("/gone/1"), film("/gone/2"), linked("/kept/2", "/gone/2"), film("/gone/3"), reject("/gone/4")],
        )
        (reviewed,) = opened.everything_about("/gone/3")
        opened.add_review(reviewed.file["prediction_id"], "dr_a", ReviewAction.FLAG, None)
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
    with connect(store.engine) as connection:
        last = connection.execute(sa.select(audit).order_by(audit.c.id.desc()).limit(1)).one()
    assert (last.event, last.detail) == ("pruned", '{"files": 4, "images": 1, "days": 30}')


def test_prune_spares_what_has_returned(store: Store) -> None:
    run = begin(store)
    store.unchanged([found("/gone/1")], run.cascade_id)
    assert prune(store, 0, really=True, now=NOW) == Pruned(3, 0)
    assert [row.path for row in store.results()] == ["/gone/1", "/kept/2"]


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
    assert check(store_url) == ["1 files show another verdict than their prediction's row."]
    if store_url.startswith("sqlite"):
        with store.engine.connect() as raw:
            driver = raw.connection.driver_connection
            assert driver is not None
            driver.execute("PRAGMA foreign_keys = OFF")
            driver.execute("DELETE FROM images WHERE id = 1")
            driver.execute("PRAGMA foreign_keys = ON")
        assert "rows that are not there" in check(store_url)[0]
