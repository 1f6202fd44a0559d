"""Files of an unmounted share are hidden, not missing. Files that are gone elsewhere are still found missing."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from cxrbatch.intake.discover import Wanted
from cxrbatch.intake.folder_state import FolderState, Schedule
from cxrbatch.intake.inotify import InotifyTrigger, Poll
from cxrbatch.intake.watcher import FolderWatcher
from cxrbatch.mounts import hides_changes, is_shared, mount_of, mount_points_below, read_mounts
from cxrbatch.store import Backoff, JobQueue, RetryPolicy, Run, Store
from factories import make_bundle
from mounting import bind, tmpfs, unmount
from pipelines import Pipeline
from pipelines import image as write_image
from store_images import CASCADE, scored_file

TABLE = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt rw - nfs4 server:/x rw
31 30 0:41 / /mnt/with\\040space rw - cifs //server/share rw
32 22 0:42 / /data/a rw - ext4 /dev/sdb1 rw
33 22 0:43 / /data rw - fuse.sshfs host:/x rw
34 33 0:44 / /data/b rw - tmpfs none rw
"""


@pytest.fixture
def table(tmp_path: Path) -> str:
    (tmp_path / "mountinfo").write_text(TABLE)
    return str(tmp_path / "mountinfo")


def test_which_mount_holds_a_path(table: str) -> None:
    mounts = read_mounts(table)
    assert mounts is not None
    kinds = {path: getattr(mount_of(path, mounts), "kind", None) for path in ("/mnt/x", "/mntx", "/mnt/with space/y")}
    assert kinds == {"/mnt/x": "nfs4", "/mntx": "ext4", "/mnt/with space/y": "cifs"}
    assert getattr(mount_of("/data/a/x", mounts), "kind", None) == "fuse.sshfs"  # a later mount lies over /data/a
    assert mount_points_below("/data", table) == {"/data", "/data/b"}
    assert read_mounts(table + " that is not there") is None
    assert mount_points_below("/data", table + " that is not there") == frozenset()


def test_kinds_of_file_systems() -> None:
    assert all(is_shared(kind) and hides_changes(kind) for kind in ("nfs4", "cifs", "fuse.sshfs", "fuse", "virtiofs"))
    assert not any(is_shared(kind) for kind in ("ext4", "overlay", "fuseblk", "tmpfs"))
    assert hides_changes("overlay") and hides_changes("unknown") and not hides_changes("xfs")


def test_mount_points_are_named_as_below_the_given_root(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    with tmpfs(tmp_path / "real" / "share"):
        assert mount_points_below(str(tmp_path / "link")) == {f"{tmp_path}/link/share"}
        assert mount_points_below(str(tmp_path / "link/share")) == {f"{tmp_path}/link/share"}
    assert mount_points_below(str(tmp_path / "link")) == frozenset()


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store.open(store_url) as opened:
        yield opened


@pytest.fixture
def run(store: Store) -> Run:
    return store.begin_run("{}", CASCADE, device="cpu", engine="torch", host="here", version="0.1.0")


def missing(store: Store) -> set[str]:
    return {row.path for row in store.results() if row.state == "missing"}


def test_what_lies_below_a_folder_that_nobody_could_see_is_not_missing(store: Store, run: Run) -> None:
    names = ["/in/a", "/in/b/c", "/in/b/c/d", "/in/bc", "/in/b\\x/e", "/in/b\udcff/f", "/in/g/h"]
    store.record(run.run_id, run.cascade_id, [scored_file(name) for name in names])
    hidden = ["/in/b", "/in/b\\x", "/in/b\udcff"]
    store.mark_missing(run.run_id, ["/in"], {"/in/a"}, unlisted=hidden)
    assert missing(store) == {"/in/bc", "/in/g/h"}
    store.mark_missing(run.run_id, ["/in"], {"/in/a"})
    assert len(missing(store)) == 6


def test_a_former_mount_point_that_shows_its_images_is_a_plain_folder(store: Store, run: Run) -> None:
    store.record(run.run_id, run.cascade_id, [scored_file("/in/a"), scored_file("/in/s/b"), scored_file("/in/s/c")])
    store.mark_missing(run.run_id, ["/in"], {"/in/a", "/in/s/NOT MOUNTED"}, unmounted=["/in/s"])
    assert missing(store) == set()
    store.mark_missing(run.run_id, ["/in"], {"/in/a", "/in/s/b"}, unmounted=["/in/s"])
    assert missing(store) == {"/in/s/c"}


def test_mounts_are_remembered(store: Store) -> None:
    assert store.note_mounts(["/in"], {"/in/a", "/in"}) == {"/in/a", "/in"}
    assert store.note_mounts(["/in"], {"/in/b"}) == {"/in/a", "/in", "/in/b"}
    assert store.note_mounts(["/in/a", "/elsewhere"], set()) == {"/in/a"}
    for _ in range(2):
        assert store.note_mounts(["/in"], set()) == {"/in/a", "/in", "/in/b"}


def test_a_scan_of_two_roots_with_one_unmounted_and_of_a_root_with_a_share_below_it(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, f"sqlite:///{tmp_path}/s.db", make_bundle(tmp_path / "bundle"))
    a, b, share = tmp_path / "a", tmp_path / "b", tmp_path / "a" / "share"
    behind_b, behind_share = tmp_path / "behind b", tmp_path / "behind share"
    for number, path in enumerate((a / "stays", a / "goes", behind_b / "b", behind_share / "s", behind_share / "t")):
        write_image(path.with_suffix(".png"), number).rename(path)
    share.mkdir()
    b.mkdir()
    (share / "NOT_MOUNTED").write_text("as administrators do")

    def states() -> dict[str, str]:
        return {os.path.relpath(path, tmp_path): state for path, state in pipeline.ask("SELECT path, state FROM files")}

    def is_done(*names: str) -> bool:
        return {states()[name] for name in names} == {"done"}

    with ExitStack() as stack:
        for behind, there in ((behind_b, b), (behind_share, share)):
            bind(behind, there)
            stack.callback(unmount, there)
        assert pipeline.run("scan", a, b).code == 0
        assert len(states()) == 5 and is_done(*states())
        (a / "goes").unlink()
        unmount(b)
        unmount(share)
        for _ in range(2):  # the file that says so is new once, and known the next time
            again = pipeline.run("scan", a, b)
            assert is_done("b/b", "a/share/s", "a/share/t", "a/stays") and states()["a/goes"] == "missing"
            assert f"{share} is not mounted any more" in again.err
        b.rmdir()
        assert pipeline.run("scan", a, b).code == 1
        assert is_done("b/b", "a/share/s")
        (behind_share / "t").unlink()
        bind(behind_share, share)
        pipeline.run("scan", a)
        assert is_done("b/b", "a/share/s") and states()["a/share/t"] == "missing"


class Watcher:
    """A folder watcher without its thread: the test starts each walk, and every file found is scored at once."""

    def __init__(self, root: Path, store: Store, run: Run, poll: Poll = "always") -> None:
        self.job_queue = JobQueue(store, run, "me", 60, Backoff())
        folder = FolderState(str(root), Wanted(), 0.0)
        trigger = InotifyTrigger(str(root), poll)
        self.said: list[str] = []
        self.watcher = FolderWatcher(
            folder,
            Schedule(60.0, poll_s=5.0),
            self.job_queue,
            retry=RetryPolicy(forever=True, stop=threading.Event()),
            work_available=threading.Event(),
            log_event=lambda event, **values: self.said.append(event),
            fail=lambda error: None,
            trigger=trigger,
        )
        self.root = str(root)

    def walk(self) -> None:
        self.watcher._walk()
        claimed = self.job_queue.claim([self.root], 100)
        self.job_queue.record([replace(scored_file(one.file.path), file=one.file) for one in claimed])


def test_a_watched_folder_with_a_share_below_it(tmp_path: Path, store: Store, run: Run) -> None:
    root, share = tmp_path / "in", tmp_path / "in" / "share"
    root.mkdir()
    for name in ("stays", "goes", "goes later"):
        (root / name).write_text(name)
    with ExitStack() as stack:
        mounted = stack.enter_context(ExitStack())
        mounted.enter_context(tmpfs(share))
        for name in ("s", "t"):
            (share / name).write_text(name)
        watcher = Watcher(root, store, run)
        watcher.walk()
        assert {row.state for row in store.results()} == {"done"} and len(list(store.results())) == 5
        mounted.close()
        (root / "goes").unlink()
        watcher.walk()
        assert missing(store) == {str(root / "goes")}
        assert watcher.said == ["mounts_away", "files_missing"]

        # Another daemon knows it from the store.
        (root / "goes later").unlink()
        successor = Watcher(root, store, run)
        successor.walk()
        assert missing(store) == {str(root / "goes"), str(root / "goes later")}

        # It is mounted again, and one of its files really is gone.
        mounted.enter_context(tmpfs(share))
        (share / "s").write_text("s")
        for one in (watcher, successor):
            one.walk()
            assert missing(store) == {str(root / "goes"), str(root / "goes later"), str(share / "t")}
        assert watcher.said == ["mounts_away", "files_missing", "mounts_back", "files_missing"]


def test_an_unreadable_subfolder_hides_only_what_lies_below_it(
    tmp_path: Path, store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "in"
    for name in ("shut/a", "shut/below/b", "c", "open/d"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    watcher = Watcher(root, store, run)
    watcher.walk()
    for name in ("shut/below/b", "c", "open/d"):
        (root / name).unlink()
    real = os.scandir

    def scandir(path: str) -> object:  # root may list everything: chmod would not do here
        if path.endswith("shut"):
            raise PermissionError(13, "injected")
        return real(path)

    with monkeypatch.context() as broken:
        broken.setattr(os, "scandir", scandir)
        for _ in range(2):
            watcher.walk()
            assert missing(store) == {str(root / "c"), str(root / "open/d")}
        assert watcher.watcher.folder.unlisted == 1
    watcher.walk()
    assert missing(store) == {str(root / name) for name in ("c", "open/d", "shut/below/b", "shut")}

    def rmdir_first(path: str) -> object:
        if path.endswith("open"):
            (root / "open").rmdir()
        return real(path)

    with monkeypatch.context() as busy:
        busy.setattr(os, "scandir", rmdir_first)
        watcher.walk()
    assert not (root / "open").exists() and watcher.watcher.folder.unlisted == 0, "gone is not unreadable"
    assert [event for event in watcher.said if event != "files_missing"] == ["folders_unreadable", "folders_readable"]
