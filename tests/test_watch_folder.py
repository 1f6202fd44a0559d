"""The known state of a watched folder; the tests control the time."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import pytest

from cxrbatch.errors import ReasonCode
from cxrbatch.intake import folder_state as watch_module
from cxrbatch.intake.discover import Wanted
from cxrbatch.intake.folder_state import FolderState, Paused, Schedule
from cxrbatch.intake.watcher import Outage
from cxrbatch.types import FoundFile

QUIET_S = 2.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A folder whose offers are always accepted."""

    def __init__(self, root: Path, **more: object) -> None:
        self.clock, self.wall = Clock(), Clock()
        self.folder = FolderState(
            str(root),
            Wanted(ignore_suffixes=(".part",)),
            QUIET_S,
            clock=self.clock,
            wall_clock=self.wall,
            **more,  # type: ignore[arg-type]
        )

    def walk(self, after_s: float = 0.0) -> list[str]:
        self.clock.now += after_s
        return self._taken(list(self.folder.walk()))

    def look_again(self, after_s: float) -> list[str]:
        self.clock.now += after_s
        return self._taken(list(self.folder.look_again()))

    def _taken(self, files: list[FoundFile]) -> list[str]:
        self.folder.noted(files)
        return sorted(os.path.basename(file.path) for file in files)


def put(path: Path, content: bytes = b"x", mtime: float = 500.0) -> Path:
    path.write_bytes(content)
    os.utime(path, (mtime, mtime))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def watched(root: Path) -> Watched:
    return Watched(root)


def test_what_was_there_before_us_is_whole_and_what_comes_later_has_to_stand_still(
    watched: Watched, root: Path
) -> None:
    put(root / "old")
    put(root / "unstable", mtime=999.5)
    assert watched.walk() == ["old"]
    assert not watched.folder.idle
    put(root / "later")  # its mtime is old, as `cp -p` and an unpacked archive have it; it is still new to us
    assert watched.walk(1.0) == []
    assert watched.folder.next_look_in() == 1.0
    assert watched.look_again(0.5) == []
    assert watched.look_again(0.5) == ["unstable"]
    assert watched.walk(1.0) == ["later"]
    assert watched.folder.idle and watched.walk(100) == []


def test_a_growing_file_starts_again_with_each_change(watched: Watched, root: Path) -> None:
    assert watched.walk() == []
    put(root / "a", b"1")
    watched.walk()
    for content in (b"12", b"123", b"1234"):
        put(root / "a", content)
        assert watched.look_again(1.9) == []
    put(root / "a", b"4321", mtime=501)  # rewritten in the same size
    assert watched.look_again(2.0) == []
    assert watched.look_again(2.0) == ["a"]


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_jump_of_the_wall_clock_makes_no_unstable_file_old(watched: Watched, root: Path, jump_s: float) -> None:
    watched.walk()
    put(root / "a")
    watched.walk()
    watched.wall.now += jump_s
    put(root / "b")
    assert watched.walk(1.9) == []
    assert watched.walk(0.1) == ["a"]
    assert watched.walk(2.0) == ["b"]


def test_changed_renamed_replaced_and_reappearing_files(watched: Watched, root: Path) -> None:
    for name in ("grows", "renamed", "replaced", "leaves", "same"):
        put(root / name)
    assert len(watched.walk()) == 5
    put(root / "grows", b"xx")
    (root / "renamed").rename(root / "new name")
    put(root / "replaced.part")
    (root / "replaced.part").rename(root / "replaced")  # same size and mtime: only the inode tells
    (root / "leaves").rename(root.parent / "elsewhere")
    assert watched.walk() == []
    assert watched.folder.gone is not None
    assert str(root / "renamed") not in watched.folder.gone.seen and str(root / "same") in watched.folder.gone.seen
    assert watched.walk(2.0) == ["grows", "new name", "replaced"]
    assert watched.folder.gone is None
    (root.parent / "elsewhere").rename(root / "leaves")
    watched.walk()
    assert watched.walk(2.0) == ["leaves"]


def test_inodes_that_mean_nothing_are_not_compared(root: Path) -> None:
    watched = Watched(root, inodes_tell=False)
    put(root / "a")
    assert watched.walk() == ["a"]
    put(root / "b.part").rename(root / "a")
    assert watched.walk() == watched.walk(5.0) == []


def test_what_the_job_queue_did_not_take_comes_again(watched: Watched, root: Path) -> None:
    put(root / "a")
    assert len(list(watched.folder.walk())) == 1
    assert len(list(watched.folder.walk())) == 0  # it is unstable now: the first walk is over
    watched.clock.now += QUIET_S
    assert len(list(watched.folder.walk())) == len(list(watched.folder.look_again())) == 1
    assert watched.walk() == ["a"] and watched.walk() == []


def test_half_written_names_are_left_alone_until_they_are_renamed(watched: Watched, root: Path) -> None:
    put(root / "a.dcm.part")
    put(root / ".hidden")
    assert watched.walk() == []
    (root / "a.dcm.part").rename(root / "a.dcm")
    watched.walk()
    assert watched.walk(2.0) == ["a.dcm"]


def test_names_with_a_problem_come_once_and_when_it_changes(watched: Watched, root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "link").symlink_to("nowhere")
    assert watched.walk() == ["fifo", "link"]
    assert watched.walk() == []
    put(root / "nowhere")
    watched.walk()
    assert watched.walk(2.0) == ["link", "nowhere"]


def test_a_share_that_drops_out_pauses_and_forgets_nothing(watched: Watched, root: Path) -> None:
    put(root / "a")
    assert watched.walk() == ["a"]
    root.rename(root.parent / "away")
    with pytest.raises(Paused, match="ENOENT"):
        watched.walk()
    assert watched.folder.gone is None
    (root.parent / "away").rename(root)
    assert watched.walk(2.0) == [] and watched.folder.gone is None


def test_an_empty_mount_point_is_a_share_that_dropped_out(
    watched: Watched, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a")
    watched.walk()
    monkeypatch.setattr(watched.folder, "_device", -1)  # as it was on the share
    (root / "a").unlink()
    with pytest.raises(Paused, match="another device"):
        watched.walk()
    assert watched.folder.gone is None
    put(root / "a")  # mounted again, with a new device number
    watched.walk()
    assert watched.folder.gone is None or str(root / "a") in watched.folder.gone.seen


def test_a_folder_that_somebody_emptied_is_just_empty(watched: Watched, root: Path) -> None:
    put(root / "a")
    watched.walk()
    (root / "a").unlink()
    watched.walk()
    assert watched.folder.gone is not None and str(root / "a") not in watched.folder.gone.seen


def test_a_folder_that_was_always_empty_says_nothing_of_earlier_lives(watched: Watched) -> None:
    assert watched.walk() == [] and watched.folder.gone is None and watched.folder.idle


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTCONN, errno.EACCES])
def test_a_root_that_answers_with_an_error_is_paused(
    watched: Watched, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    put(root / "a")
    watched.walk()
    real = os.stat

    def stat(path: str, *args: object, **more: object) -> os.stat_result:
        if path == str(root):
            raise OSError(code, "injected")
        return real(path, *args, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(watch_module.os, "stat", stat)
        with pytest.raises(Paused, match=errno.errorcode[code]):
            watched.walk()
    assert watched.walk() == [] and watched.folder.gone is None


@pytest.mark.parametrize("call", ["scandir", "stat"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_call_that_fails_once_loses_nothing(
    watched: Watched, root: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, nth: int
) -> None:
    for folder in ("one", "two"):
        (root / folder).mkdir()
        for name in "abc":
            put(root / folder / f"{folder} {name}")
    expected = sorted(f"{folder} {name}" for folder in ("one", "two") for name in "abc")
    real, calls = getattr(os, call), 0

    def failing(*args: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(code, "injected")
        return real(*args, **more)

    got: set[str] = set()
    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing)
        try:
            got |= {f.path for f in watched.folder.walk() if f.problem is None}
            got |= {f.path for f in watched.folder.walk() if f.problem is None}
        except Paused:
            pass
    for _ in range(2):
        watched.clock.now += QUIET_S
        got |= {f.path for f in watched.folder.walk() if f.problem is None}
    assert sorted(os.path.basename(path) for path in got) == expected
    watched.folder.noted(watched.folder.walk())
    assert watched.folder.gone is None or all(path in watched.folder.gone.seen for path in got)


def test_a_folder_that_may_not_be_listed_is_found_with_that_problem(
    watched: Watched, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "shut").mkdir()
    put(root / "a")
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("shut"):
            raise PermissionError(errno.EACCES, "injected")
        return real(path)

    with monkeypatch.context() as broken:  # root may list everything: chmod would not do here
        broken.setattr(os, "scandir", scandir)
        files = list(watched.folder.walk())
    assert {os.path.basename(f.path): f.problem and f.problem.reason_code for f in files} == {
        "a": None,
        "shut": ReasonCode.PERMISSION_DENIED,
    }
    assert watched.folder.gone is not None  # what lies in there is not known to be gone
    assert watched.folder.gone.unlisted == (str(root / "shut"),)
    watched.folder.noted(files)
    assert watched.walk() == []
    assert watched.folder.gone is not None and str(root / "shut") not in watched.folder.gone.seen  # its row goes


def test_what_an_event_names_is_looked_at_and_nothing_is_listed(
    watched: Watched, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "old")
    (root / "sub").mkdir()
    (root / ".hidden").mkdir()
    assert watched.walk() == ["old"]

    def fail(path: str) -> None:
        raise AssertionError(path)

    def look_at(*names: str) -> list[str]:
        return watched._taken(list(watched.folder.look_at(str(root / name) for name in names)))

    with monkeypatch.context() as broken:
        broken.setattr(os, "scandir", fail)
        put(root / "sub" / "new")
        put(root / "half.part")
        put(root / ".hidden" / "x")
        os.mkfifo(root / "fifo")
        (root / "sub" / "out").symlink_to("/dev/zero")
        assert look_at("sub/new", "half.part", ".hidden/x", "fifo", "sub/out", "old", "gone.part") == ["fifo", "out"]
        assert not watched.folder.walk_wanted
        put(root / "sub" / "new", b"longer")
        assert look_at("sub/new") == [] and watched.look_again(1.9) == []
        assert watched.look_again(0.1) == ["new"]
        (root / "sub" / "new").unlink()
        assert look_at("sub/new") == [] and watched.folder.walk_wanted  # what is gone, the walk tells
    assert watched.walk() == [] and not watched.folder.walk_wanted
    assert watched.folder.gone is not None and str(root / "sub" / "new") not in watched.folder.gone.seen


def test_a_folder_that_an_event_names_is_walked(watched: Watched, root: Path) -> None:
    watched.walk()
    (root / "a" / "b").mkdir(parents=True)
    put(root / "a" / "b" / "c")
    put(root / "a" / "d")
    assert list(watched.folder.look_at([str(root / "a"), str(root.parent), "/"])) == []
    assert watched.look_again(QUIET_S) == ["c", "d"]


def test_memory_of_many_known_files(watched: Watched, root: Path) -> None:
    """Two numbers and their place in a dictionary, whatever the length of the names."""
    many = [FoundFile(f"{root}/{'long name ' * 10}{i}", 1, 2, 3) for i in range(20_000)]
    tracemalloc.start()
    watched.folder.noted(many)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / len(many) < 250  # bytes a file: 25 MB for 100,000


def test_the_schedule_walks_at_once_then_at_intervals_and_soon_after_the_trigger() -> None:
    clock = Clock()
    schedule = Schedule(60.0, clock)
    assert schedule.due_in() == 0
    schedule.begin()
    schedule.ended(took_s=0.1)
    assert schedule.due_in() == 60
    schedule.notify()
    assert schedule.due_in() == pytest.approx(0.4)
    clock.now += 0.4
    assert schedule.due_in() == pytest.approx(0, abs=1e-6)
    schedule.begin()
    schedule.notify()  # during the walk: what it saw may be old already
    schedule.ended(took_s=100.0)
    assert schedule.due_in() == pytest.approx(
        60
    )  # an inotify trigger that never stops does not make a slow share slower
    clock.now += 60
    assert schedule.due_in() == 0
    schedule.paused(5.0)
    assert schedule.due_in() == 5


def test_what_comes_and_goes_is_told_sparingly_and_what_stays_away_is_told() -> None:
    clock, reported = Clock(), list[str]()
    outage = Outage(reported.append, lambda: reported.append("back"), 30.0, clock)
    for _ in range(10):
        outage("gone")
        outage("gone")
        outage(None)
        outage(None)
        clock.now += 2
    assert reported == ["gone", "back"]
    clock.now += 5
    outage("gone again")  # 25 s after the last message
    clock.now += 5
    outage("gone for good")
    assert reported == ["gone", "back", "gone for good"]
