"""Every kind of directory entry is found once, and none blocks the walk."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from cxrbatch.errors import Fatal, ReasonCode
from cxrbatch.intake.discover import Wanted, count_names, discover, roots_of
from cxrbatch.ops.setup import wanted_of
from cxrbatch.settings import Settings

ALL = Wanted(ignore_suffixes=(".part",))


def found(root: Path, wanted: Wanted = ALL) -> dict[str, ReasonCode | None]:
    return {
        os.path.relpath(f.path, root): f.problem.reason_code if f.problem else None
        for f in discover([str(root)], wanted)
    }


def test_walks_subfolders_and_leaves_half_written_and_hidden_names(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("x.dcm", "a/y.png", "a/b/z", "a/w.dcm.part", ".hidden", "a/.DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    assert found(tmp_path) == {"x.dcm": None, "a/y.png": None, "a/b/z": None}


def test_what_is_no_file_is_a_problem_and_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.dcm")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket.png"))
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert found(tmp_path) == {
        "pipe.dcm": ReasonCode.NOT_A_REGULAR_FILE,
        "socket.png": ReasonCode.NOT_A_REGULAR_FILE,
        "zero": ReasonCode.SYMLINK_OUTSIDE_ROOT,
    }


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(b"x")
    (root / "sub/real.png").write_bytes(b"x")
    (root / "inside.png").symlink_to("sub/real.png")
    (root / "outside.png").symlink_to("../outside.png")
    (root / "nowhere.png").symlink_to("gone.png")
    (root / "ring1").symlink_to("ring2")
    (root / "ring2").symlink_to("ring1")
    (root / "sub/up").symlink_to("..")
    (root / "sideways").symlink_to("sub")
    assert found(root) == {
        "sub/real.png": None,
        "inside.png": None,
        "outside.png": ReasonCode.SYMLINK_OUTSIDE_ROOT,
        "nowhere.png": ReasonCode.SYMLINK_BROKEN,
        "ring1": ReasonCode.SYMLINK_LOOP,
        "ring2": ReasonCode.SYMLINK_LOOP,
        "sub/up": ReasonCode.SYMLINK_LOOP,
    }


def test_a_root_that_is_itself_a_link_is_walked(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.png").write_bytes(b"x")
    (tmp_path / "real/b.png").symlink_to("a.png")
    (tmp_path / "link").symlink_to("real")
    assert found(tmp_path / "link") == {"a.png": None, "b.png": None}


def test_odd_names_come_through(tmp_path: Path) -> None:
    names = [b"new\nline", b"quote'\"", b"=cmd|' calc'!A0", b"\x1b[31mred", b"x" * 255, b"\xff\xfe.dcm", b"\\x41"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"x")
    assert set(found(tmp_path)) == {os.fsdecode(name) for name in names}


def test_include_and_exclude_match_the_name_or_the_path_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("one.dcm", "a/two.dcm", "a/three.png"):
        (tmp_path / name).write_bytes(b"x")
    assert set(found(tmp_path, Wanted(include=("*.dcm",)))) == {"one.dcm", "a/two.dcm"}
    assert set(found(tmp_path, Wanted(exclude=("a/*",)))) == {"one.dcm"}


def test_what_we_write_ourselves_is_not_scanned_however_it_is_named() -> None:
    settings = Settings(db="sqlite://///in/x/../s.db", id_key_file="//in/key")
    wanted = wanted_of(settings, ["//in/x/../out.csv"])
    ours = ("out.csv", "key", "s.db", "s.db-wal")
    assert [name for name in (*ours, "a.dcm") if wanted.wants(f"/in/{name}", "/in")] == ["a.dcm"]


def test_a_file_can_be_a_root_and_nested_roots_count_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"x")
    assert roots_of([tmp_path, tmp_path / "a", tmp_path / "a/x.png"]) == [str(tmp_path)]
    assert [f.path for f in discover(roots_of([tmp_path / "a/x.png"]), ALL)] == [str(tmp_path / "a/x.png")]
    (tmp_path / "a-b").mkdir()  # sorts between a and what lies in it
    assert roots_of([tmp_path / "a", tmp_path / "a-b", f"/{tmp_path}/b/../a/x.png"]) == [
        str(tmp_path / "a"),
        str(tmp_path / "a-b"),
    ]
    with pytest.raises(Fatal, match="cannot be read"):
        roots_of([tmp_path / "gone"])


def test_a_folder_that_cannot_be_listed_is_a_row_and_the_rest_is_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "open.png").write_bytes(b"x")
    real = os.scandir

    def scandir(path: str) -> object:  # we may run as root, whom no permission bit stops
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert found(tmp_path) == {"locked": ReasonCode.PERMISSION_DENIED, "open.png": None}


def test_names_are_counted_as_they_are_found(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/one.dcm", "a/b/two.dcm", "a/.hidden", "three.part", "four.txt"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("four.txt")
    roots = [str(tmp_path), str(tmp_path / "four.txt")]
    for wanted in (Wanted(ignore_suffixes=(".part",)), Wanted(include=("*.dcm",))):
        number = sum(1 for _ in discover(roots[:1], wanted))
        assert count_names(roots[:1], wanted, threading.Event()) == number > 0
    assert count_names(roots[1:], Wanted(), threading.Event()) == 1
