"""A link that replaces a file (or a folder above it) after the listing is not followed out of the folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cxrbatch.decoding.decode_pool import DecodeFile
from cxrbatch.errors import ReasonCode, Rejected, Retry
from cxrbatch.imaging.decode import Identifiers, Limits
from cxrbatch.intake.discover import Wanted, discover
from cxrbatch.ops import scan as ops_scan
from cxrbatch.settings import Settings
from cxrbatch.store import Store
from cxrbatch.types import DecodedImage, FoundFile, ModelInputSpec
from daemon import Arithmetic
from factories import make_bundle
from pipelines import image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`in/sub/a.png`, and `out/a.png` of the same size and time with another content."""
    inside, outside = image(tmp_path / "in" / "sub" / "a.png", 1), image(tmp_path / "out" / "a.png", 2)
    size = max(inside.stat().st_size, outside.stat().st_size)
    for path in (inside, outside):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return tmp_path / "in"


def found(root: Path) -> FoundFile:
    (file,) = discover([str(root)], Wanted(include=("*.png",)))
    return file


def decode(file: FoundFile, *roots: Path) -> DecodedImage:
    task = DecodeFile((ModelInputSpec(32),), Limits(), Identifiers("drop"), roots=tuple(map(str, roots)))
    return task(file)


def link_the_file(root: Path) -> None:
    (root / "sub" / "a.png").unlink()
    (root / "sub" / "a.png").symlink_to(root.parent / "out" / "a.png")


def link_the_folder(root: Path) -> None:
    (root / "sub").rename(root.parent / "old")
    (root / "sub").symlink_to(root.parent / "out")


SWAPS = [link_the_file, link_the_folder]


@pytest.mark.parametrize("swap", SWAPS)
def test_a_link_put_in_its_place_is_not_followed_out_of_the_root(root: Path, swap: Callable[[Path], None]) -> None:
    file = found(root)
    swap(root)
    with pytest.raises(Retry) as caught:
        decode(file, root)
    assert caught.value.reason_code == ReasonCode.CHANGED_WHILE_READ
    assert str(root) not in str(caught.value)


def test_links_inside_and_a_root_that_is_a_link_or_a_file_are_read(root: Path) -> None:
    content = hashlib.sha256((root / "sub" / "a.png").read_bytes()).hexdigest()
    (root.parent / "link").symlink_to(root)
    assert decode(found(root.parent / "link"), root.parent / "link").sha256 == content
    (root / "b.png").symlink_to("sub/a.png")
    for file in discover([str(root)], Wanted()):
        assert decode(file, root.parent / "elsewhere", root).sha256 == content
    assert decode(found(root / "b.png"), root / "b.png").sha256 == content


@pytest.mark.parametrize("there", ["fifo", "device", "folder", "nothing", "loop"])
def test_what_came_in_its_place_is_not_opened(root: Path, there: str) -> None:
    file, path = found(root), root / "sub" / "a.png"
    path.unlink()
    match there:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to("a.png")
    with pytest.raises(Rejected) as caught:
        decode(file, root)
    expected = {"nothing": ReasonCode.VANISHED, "loop": ReasonCode.SYMLINK_LOOP}
    assert caught.value.reason_code == expected.get(there, ReasonCode.NOT_A_REGULAR_FILE)


def test_a_scan_reads_nothing_outside_of_its_folders(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole scan, with the swap between listing and opening."""
    real = ops_scan.walk

    def walk(*args: Any) -> Iterator[FoundFile]:
        listed = list(real(*args))
        link_the_file(root)
        yield from listed

    monkeypatch.setattr(ops_scan, "walk", walk)
    monkeypatch.setattr(ops_scan, "open_engine", lambda *_: Arithmetic())
    monkeypatch.chdir(tmp_path)
    settings = Settings(db=f"sqlite:///{tmp_path}/s.db", cascade=str(make_bundle(tmp_path / "bundle")), workers=1)
    more: dict[str, Any] = {"reprocess": "none", "limit": None, "dry_run": False, "error_on_empty": False}
    ops_scan.run_scan(settings, [root], ops_scan.Exports(), **more, quiet=True)
    with Store.open(settings.db) as store:
        ((state, reason),) = [(row.state, row.reason_code) for row in store.results()]
    assert (state, reason) == ("retry", "changed_while_read")
