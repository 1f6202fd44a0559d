"""The folder watcher checks the path of an event, and walks the whole folder only on schedule."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from watchdog.observers import inotify_c

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


def test_a_share_that_is_back_is_walked_once_more_for_what_came_before_the_first_event(
    tmp_path: Path, store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, away = tmp_path / "in", tmp_path / "away"
    root.mkdir()
    (root / "old").write_text("old")
    watcher = Watcher(root, store, run, "never")
    trigger, schedule = watcher.watcher.trigger, watcher.watcher.schedule
    watcher.walk()
    arm = trigger.arm

    def late() -> bool:
        (root / "late").write_text("late")  # the walk is past its folder
        return arm()

    root.rename(away)
    watcher.walk()
    assert watcher.watcher.paused
    away.rename(root)
    monkeypatch.setattr(trigger, "arm", late)
    try:
        watcher.walk()
        assert not watcher.watcher.paused and len(list(store.results())) == 1
        assert schedule.due_in() < 50  # rescan_s is 60
        watcher.walk()
        assert {row.path for row in store.results()} == {str(root / "old"), str(root / "late")}
        assert schedule.due_in() > 50
    finally:
        trigger.disarm()


def test_a_share_that_is_back_without_events_is_polled(
    tmp_path: Path, store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "injected")

    def away_and_back() -> None:
        root.rename(away)
        watcher.walk()
        away.rename(root)
        watcher.walk()
        watcher.walk()

    root, away = tmp_path / "in", tmp_path / "away"
    root.mkdir()
    watcher = Watcher(root, store, run, "never")
    schedule = watcher.watcher.schedule
    watcher.walk()
    with monkeypatch.context() as limited:
        limited.setattr(inotify_c, "inotify_add_watch", refuse)
        away_and_back()
        assert schedule.due_in() < 6  # poll_s is 5
        assert watcher.said == ["folder_paused", "folder_back", "watching"]
        away_and_back()
    assert schedule.due_in() < 6
    try:
        away_and_back()
        assert schedule.due_in() > 50
        assert watcher.said.count("watching") == 2
    finally:
        watcher.watcher.trigger.disarm()


def test_a_folder_that_was_replaced_between_two_walks_has_events_again(tmp_path: Path, store: Store, run: Run) -> None:
    root = tmp_path / "in"
    root.mkdir()
    watcher = Watcher(root, store, run, "never")
    trigger, schedule = watcher.watcher.trigger, watcher.watcher.schedule
    try:
        assert trigger.arm()
        watcher.walk()
        assert schedule.due_in() > 50  # rescan_s is 60
        root.rename(tmp_path / "of yesterday")
        root.mkdir()
        watcher.walk()
        assert schedule.due_in() < 50  # for what came before the first event
        (root / "new").write_text("new")
        assert trigger.fired.wait(10) and trigger.changed() == {str(root / "new")}
    finally:
        trigger.disarm()
