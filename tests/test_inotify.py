"""The inotify trigger fires when something changes, says why if it cannot, and knows which mounts send no events."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watchdog.observers import inotify_c

from cxrbatch.intake.inotify import InotifyTrigger, silent_mounts

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/images rw - nfs4 server:/images rw
31 22 0:41 / /mnt/with\\040space rw - cifs //server/share rw
32 22 0:42 / /data rw - ext4 /dev/sdb1 rw
33 32 0:43 / /data/below rw - fuse.sshfs host:/x rw
34 22 0:44 / /covered rw - nfs4 server:/old rw
35 22 8:3 / /covered rw - xfs /dev/sdc1 rw
36 22 0:45 / /container rw - overlay overlay rw
37 22 0:46 / /mnt/filmstore rw - ext4 /dev/sdd1 rw
"""


@pytest.mark.parametrize(
    ("root", "kinds"),
    [
        ("/home/images", []),
        ("/mnt/images", ["nfs4"]),
        ("/mnt/images/2026/11", ["nfs4"]),
        ("/mnt/filmstore", []),
        ("/mnt/with space", ["cifs"]),
        ("/data", ["fuse.sshfs"]),
        ("/data/local", []),
        ("/covered", []),
        ("/container/in", ["overlay"]),
        ("/mnt", ["cifs", "nfs4"]),
    ],
)
def test_silent_mounts_at_and_below_a_root(tmp_path: Path, root: str, kinds: list[str]) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS)
    assert silent_mounts(root, str(mountinfo)) == kinds


def test_without_mountinfo_nothing_is_trusted(tmp_path: Path) -> None:
    assert silent_mounts("/", str(tmp_path / "none")) == ["unknown"]


def test_it_rings_for_a_file_in_a_new_folder(tmp_path: Path) -> None:
    trigger = InotifyTrigger(str(tmp_path), "never")
    assert trigger.arm() and trigger.why_not is None
    try:
        (tmp_path / "new").mkdir()
        assert trigger.fired.wait(60)
        trigger.fired.clear()
        (tmp_path / "new" / "file").write_bytes(b"x")
        assert trigger.fired.wait(60)
    finally:
        trigger.disarm()


def test_it_says_where_something_happened(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    trigger = InotifyTrigger(str(tmp_path), "never")
    assert trigger.arm()
    heard: set[str] = set()

    def hear(*paths: Path) -> None:
        while not {str(path) for path in paths} <= heard:
            assert trigger.fired.wait(60)
            trigger.fired.clear()
            heard.update(trigger.changed() or ())

    try:
        (tmp_path / "sub" / "file.part").write_bytes(b"x")
        (tmp_path / "sub" / "file.part").rename(tmp_path / "sub" / "file")
        hear(tmp_path / "sub" / "file")
        (tmp_path / "sub" / "file").unlink()
        (tmp_path / "sub" / "new").mkdir()
        hear(tmp_path / "sub" / "new")
        (tmp_path / "sub").rename(tmp_path / "moved")
        for _ in range(100):
            trigger.fired.wait(0.1)
            if trigger.changed() is None:
                break
        else:
            raise AssertionError("a folder that was moved asks for a walk")
    finally:
        trigger.disarm()


def test_too_many_changes_ask_for_a_walk(tmp_path: Path) -> None:
    trigger = InotifyTrigger(str(tmp_path), "always")
    for number in range(20_000):
        trigger.notify(str(number))
    assert trigger.changed() is None and trigger.changed() == frozenset()


def test_polling_is_explained(tmp_path: Path) -> None:
    trigger = InotifyTrigger(str(tmp_path), "always")
    assert not trigger.arm() and trigger.why_not == "poll is set to always"
    (tmp_path / "mountinfo").write_text(f"1 1 0:1 / {tmp_path} rw - nfs4 server:/images rw\n")
    silent = InotifyTrigger(str(tmp_path), "auto", mountinfo=str(tmp_path / "mountinfo"))
    assert not silent.arm() and silent.why_not == "changes on nfs4 may come without an event"


@pytest.mark.parametrize(
    ("code", "setting"), [(errno.ENOSPC, "max_user_watches"), (errno.EMFILE, "max_user_instances"), (errno.EINVAL, "")]
)
def test_the_limits_of_inotify_are_explained_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, setting: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, "injected")

    name = "inotify_init" if code == errno.EMFILE else "inotify_add_watch"
    monkeypatch.setattr(inotify_c, name, refuse)
    trigger = InotifyTrigger(str(tmp_path), "never")
    assert not trigger.arm()
    assert trigger.why_not and setting in trigger.why_not
    trigger.disarm()


@pytest.mark.parametrize("how", ["moved", "deleted", "away for a while"])
def test_a_folder_that_was_replaced_is_listened_to_anew(how: str, tmp_path: Path) -> None:
    """The watch of the kernel went away with the old one, whose inode number the new one may have."""
    root = tmp_path / "in"
    root.mkdir()
    trigger = InotifyTrigger(str(root), "never")
    try:
        assert trigger.arm() and not trigger.is_stale()
        root.rename(tmp_path / "of yesterday") if how == "moved" else root.rmdir()
        if how == "away for a while":
            assert trigger.is_stale() and not trigger.arm() and not trigger.is_stale()
        root.mkdir()
        deadline = time.monotonic() + 20
        while not trigger.is_stale():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert trigger.arm() and not trigger.is_stale()
        (root / "new").write_text("new")
        assert trigger.fired.wait(10) and str(root / "new") in (trigger.changed() or ())
    finally:
        trigger.disarm()


def test_a_link_to_a_folder_is_listened_to_as_the_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "in").symlink_to("disk")
    trigger = InotifyTrigger(str(tmp_path / "in"), "never")
    try:
        assert trigger.arm()
        (tmp_path / "disk" / "new").write_text("new")
        assert trigger.fired.wait(10) and trigger.changed() == {str(tmp_path / "in" / "new")}
        (tmp_path / "other").mkdir()
        (tmp_path / "in").unlink()
        (tmp_path / "in").symlink_to("other")
        assert trigger.is_stale()
    finally:
        trigger.disarm()


_UP_TO_THE_LIMIT = """
import sys, time
from pathlib import Path
from cxrbatch.intake.inotify import InotifyTrigger

limit, root = Path("/proc/sys/user/max_inotify_watches"), Path(sys.argv[1])
limit.write_text("4")
trigger = InotifyTrigger(str(root), "never")
assert trigger.arm() and not trigger.is_stale()
for number in range(5):
    (root / str(number)).mkdir()
deadline = time.monotonic() + 20
while not trigger.is_stale():
    assert time.monotonic() < deadline
    time.sleep(0.05)
assert not trigger.arm() and "max_user_watches" in trigger.why_not and not trigger.is_stale()
limit.write_text("100")
assert trigger.is_stale() and trigger.arm() and trigger.why_not is None
"""


def test_a_tree_that_outgrows_the_limit_of_inotify_is_polled(tmp_path: Path) -> None:
    in_a_namespace = ["unshare", "--user", "--map-root-user"]  # which has a limit of its own
    if shutil.which("unshare") is None or subprocess.run([*in_a_namespace, "true"], capture_output=True).returncode:
        pytest.skip("this user may make no user namespace")
    ran = subprocess.run(
        [*in_a_namespace, sys.executable, "-c", _UP_TO_THE_LIMIT, str(tmp_path)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
