"""The paths that a walk saw, and those that are really gone."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from cxrbatch.intake.path_set import PathHashSet


def test_what_was_seen_or_is_there_is_not_gone(tmp_path: Path) -> None:
    seen = PathHashSet({"cut\\x#1": f"{tmp_path}/long"})
    for text in ("/b", "/a"):
        seen.add(text)
    assert "/a" in seen and "/b" in seen
    seen.add("/c")  # after the first question
    assert "/c" in seen and "/d" not in seen
    for name in ("unseen", "long"):
        (tmp_path / name).touch()
    assert f"{tmp_path}/unseen" in seen, "it came after the walk, or is not wanted now"
    assert "cut\\x#1" in seen and "cut\\x#2" not in seen
    assert str(tmp_path) not in seen, "a folder is no file"
    assert len(seen) == 3


def test_which_numbers_a_walk_lacks() -> None:
    seen = PathHashSet()
    assert seen.lacks([3, -4]) == [3, -4]
    seen.add("/a")
    assert seen.lacks([hash("/a"), 5]) == [5]
    assert seen.lacks([]) == []


def test_a_name_takes_eight_bytes() -> None:
    seen = PathHashSet()
    tracemalloc.start()
    for number in range(20_000):
        seen.add(f"/a/rather/long/name/of/a/image/{number}")
    assert "/a/rather/long/name/of/a/image/7" in seen
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / 20_000 < 16
