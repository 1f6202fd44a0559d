"""A file goes on when it stands still, measured by a clock that the test moves."""

from __future__ import annotations

import os
from pathlib import Path

from cxrbatch.errors import ReasonCode
from cxrbatch.nouns import FoundFile
from cxrbatch.settle import settle


class Clock:
    """Time passes only when somebody sleeps; `then` happens at each sleep."""

    def __init__(self, then: object = None) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.then = then

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if callable(self.then):
            self.then()


def seen(path: Path) -> FoundFile:
    info = path.stat()
    return FoundFile(str(path), info.st_size, info.st_mtime_ns, info.st_ino)


def run(files: list[FoundFile], clock: Clock, wall: float) -> list[FoundFile]:
    return list(settle(iter(files), 2.0, patience_s=10, wall_clock=lambda: wall, clock=clock, sleep=clock.sleep))


def test_an_old_file_goes_straight_on_and_a_young_one_waits(tmp_path: Path) -> None:
    old, young = tmp_path / "old", tmp_path / "young"
    old.write_bytes(b"o")
    young.write_bytes(b"y")
    os.utime(old, (100, 100))
    os.utime(young, (999, 999))
    clock = Clock()
    files = [seen(young), seen(old)]
    assert [f.path for f in run(files, clock, wall=1000)] == [str(old), str(young)]
    assert sum(clock.slept) == 2.0


def test_a_file_that_grows_is_passed_on_with_its_last_size(tmp_path: Path) -> None:
    path = tmp_path / "grows"
    path.write_bytes(b"1")
    first = seen(path)
    more = iter([b"12", b"123"])

    def grow() -> None:
        if (data := next(more, None)) is not None:
            path.write_bytes(data)

    (settled,) = run([first], Clock(grow), wall=first.mtime_ns / 1e9)
    assert settled.size == 3 and settled.problem is None


def test_a_file_that_never_stops_growing_is_left_for_the_next_scan(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"1")
    first = seen(path)
    (settled,) = run([first], Clock(lambda: path.write_bytes(path.read_bytes() + b"x")), first.mtime_ns / 1e9)
    assert settled.problem and settled.problem.reason_code is ReasonCode.CHANGED_WHILE_READ


def test_a_share_whose_clock_is_ahead_only_costs_a_second_look(tmp_path: Path) -> None:
    path = tmp_path / "future"
    path.write_bytes(b"1")
    clock = Clock()
    (settled,) = run([seen(path)], clock, wall=seen(path).mtime_ns / 1e9 - 3600)
    assert settled.problem is None and sum(clock.slept) == 2.0


def test_a_file_that_goes_away_meanwhile_is_still_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.write_bytes(b"1")
    first = seen(path)
    (settled,) = run([first], Clock(lambda: path.unlink(missing_ok=True)), wall=first.mtime_ns / 1e9)
    assert settled.problem and settled.problem.reason_code is ReasonCode.VANISHED
