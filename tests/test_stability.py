"""A file is passed on once it has stopped changing, by a clock that the test controls."""

from __future__ import annotations

import os
from pathlib import Path

from cxrbatch.errors import ReasonCode
from cxrbatch.intake.stability import settle
from cxrbatch.types import FoundFile


class Clock:
    """Time passes only while no file is stable; `then` is called each time."""

    def __init__(self, then: object = None) -> None:
        self.now = 1000.0
        self.waited = 0.0
        self.then = then

    def __call__(self) -> float:
        return self.now

    def wait(self) -> None:
        self.waited += 0.5
        self.now += 0.5
        if callable(self.then):
            self.then()


def seen(path: Path) -> FoundFile:
    info = path.stat()
    return FoundFile(str(path), info.st_size, info.st_mtime_ns, info.st_ino)


def run(files: list[FoundFile], clock: Clock, wall: float) -> list[FoundFile]:
    settled = []
    for file in settle(iter(files), 2.0, max_wait_s=10, wall_clock=lambda: wall, clock=clock):
        if file is None:
            clock.wait()
        else:
            settled.append(file)
    return settled


def test_waiting_for_a_file_to_settle_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "unstable"
    path.write_bytes(b"1")
    assert next(settle(iter([seen(path)]), quiet_s=3600)) is None


def test_an_old_file_goes_straight_on_and_a_unstable_one_waits(tmp_path: Path) -> None:
    old, unstable = tmp_path / "old", tmp_path / "unstable"
    old.write_bytes(b"o")
    unstable.write_bytes(b"y")
    os.utime(old, (100, 100))
    os.utime(unstable, (999, 999))
    clock = Clock()
    files = [seen(unstable), seen(old)]
    assert [f.path for f in run(files, clock, wall=1000)] == [str(old), str(unstable)]
    assert clock.waited == 2.0


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
    assert settled.problem is None and clock.waited == 2.0


def test_a_file_that_goes_away_meanwhile_is_still_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.write_bytes(b"1")
    first = seen(path)
    (settled,) = run([first], Clock(lambda: path.unlink(missing_ok=True)), wall=first.mtime_ns / 1e9)
    assert settled.problem and settled.problem.reason_code is ReasonCode.VANISHED
