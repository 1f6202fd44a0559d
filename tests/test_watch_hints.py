"""The folder watcher checks the path of an event, and walks the whole folder only on schedule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cxrbatch.store import Run, Store
from store_images import CASCADE
from test_mounts import Watcher


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/s.db") as opened:
        yield opened


@pytest.fixture
def run(store: Store) -> Run:
    return store.begin_run("{}", CASCADE, device="cpu", engine="torch", host="here", version="0.1.0")


def test_an_event_is_answered_without_a_walk_and_a_deletion_by_one(tmp_path: Path, store: Store, run: Run) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "old").write_text("old")
    watcher = Watcher(root, store, run)
    watcher.walk()
    look, schedule = watcher.watcher._look_where_it_changed, watcher.watcher.schedule

    (root / "new").write_text("new")
    look(frozenset({str(root / "new"), str(root / ".new.part")}))
    assert {row.path: row.state for row in store.results()}[str(root / "new")] == "waiting"
    assert schedule.due_in() > 50  # the walk stays where it was: rescan_s is 60

    (root / "old").unlink()
    look(frozenset({str(root / "old")}))
    assert schedule.due_in() < 50
    watcher.walk()
    assert {row.path: row.state for row in store.results()}[str(root / "old")] == "missing"
    look(None)
    assert schedule.due_in() < 50
