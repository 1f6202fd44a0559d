"""Stage 1, discover: walk folders and yield one FoundFile per name, without opening, sorting or collecting files.

A name that can never become an image (a FIFO, a broken link, a folder without read permission) is yielded too, with
its problem attached: everything in the folder gets a row.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from cxrbatch.errors import ExitCode, Fatal, ReasonCode, Rejected, Retry
from cxrbatch.intake.remote import check_remote, is_remote, list_objects, normal_path
from cxrbatch.types import FoundFile

__all__ = ["Wanted", "count_names", "discover", "look_at", "roots_of"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which names are included. Names that begin with a dot or end in `ignore_suffixes` never are.

    `include` applies to files only, `exclude` to folders too.
    """

    include: tuple[str, ...] = ()  # globs on the name or on the path below the root; empty: all
    exclude: tuple[str, ...] = ()
    ignore_suffixes: tuple[str, ...] = ()
    ignore_paths: frozenset[str] = frozenset()  # our own store and exports, if they are in the folder

    def wants(self, path: str, root: str, *, folder: bool = False) -> bool:
        name = path.rpartition("/")[2]  # called a million times per scan: os.path.basename is four times slower
        if name.startswith(".") or name.endswith(self.ignore_suffixes) or path in self.ignore_paths:
            return False
        if not (self.include or self.exclude):
            return True
        below_root = os.path.relpath(path, root)
        if self.include and not folder and not _matches(self.include, name, below_root):
            return False
        return not _matches(self.exclude, name, below_root)


def _matches(globs: tuple[str, ...], name: str, below_root: str) -> bool:
    return any(fnmatch(name, glob) or fnmatch(below_root, glob) for glob in globs)


def roots_of(paths: Sequence[str | Path]) -> list[str]:
    """The absolute paths to walk, without those that lie inside another one.

    Raises Fatal (exit 1) for a path that does not exist or is not readable.
    """
    texts = [os.fspath(path) for path in paths]
    # Sorted by their parts, a path directly follows the folder that it lies in: a shell may have named 50,000 files.
    absolute = sorted({normal_path(text) for text in texts}, key=lambda path: path.split("/"))
    roots: list[str] = []
    for path in absolute:
        if roots and path.startswith(roots[-1].rstrip("/") + "/"):
            continue
        try:
            if is_remote(path):
                check_remote(path)
            elif os.path.isdir(path):
                os.scandir(path).close()
            else:
                os.stat(path)
        except OSError as error:
            raise Fatal(
                f"{path} cannot be read ({os.strerror(error.errno or 0)}); check the path and the mount.",
                ExitCode.FATAL,
            ) from None
        roots.append(path)
    return roots


def discover(
    roots: Sequence[str],
    wanted: Wanted,
    unlisted: list[str] | None = None,
    excluded: Callable[[str], object] = lambda path: None,
) -> Iterator[FoundFile]:
    """Walk `roots` (files or folders) depth first.

    Links to files inside the root are followed. Links to folders inside it are not, since their files are found at
    their own place. Links that leave the root, form a loop or are broken are yielded with that problem. Folders that
    could not be listed completely are also added to `unlisted`: their contents are unknown. `excluded` is called with
    the path of each object of a bucket that is there and not wanted: unlike a file, it cannot be looked at later.
    """
    for root in roots:
        if is_remote(root):
            yield from _objects(root, wanted, unlisted, excluded)
            continue
        if not os.path.isdir(root):
            yield _look_at(root)
            continue
        yield from _walk(root, root, wanted, unlisted)


def _objects(
    root: str, wanted: Wanted, unlisted: list[str] | None, excluded: Callable[[str], object]
) -> Iterator[FoundFile]:
    for file in list_objects(root):
        if file.problem is not None and unlisted is not None:
            unlisted.append(root)
        ends = (i for i, character in enumerate(file.path) if character == "/" and i > len(root))
        folders_wanted = all(wanted.wants(file.path[:end], root, folder=True) for end in ends)
        if file.path == root or file.problem is not None or (folders_wanted and wanted.wants(file.path, root)):
            yield file
        else:
            excluded(file.path)


def look_at(path: str, root: str, wanted: Wanted) -> Iterator[FoundFile]:
    """What `discover` finds at a path below `root` (not a link) that is reported to have changed."""
    folder = os.path.dirname(path)
    while len(folder) > len(root):
        if os.path.islink(folder) or not wanted.wants(folder, root, folder=True):
            return
        folder = os.path.dirname(folder)
    is_folder = os.path.isdir(path) and not os.path.islink(path)
    if not path.startswith(root.rstrip("/") + "/") or not wanted.wants(path, root, folder=is_folder):
        return
    if is_folder:
        yield from _walk(path, root, wanted, None)
    elif os.path.islink(path):
        yield from _look_at_link(path, os.path.realpath(root))
    elif os.path.lexists(path):
        yield _look_at(path)


def count_names(roots: Sequence[str], wanted: Wanted, quit: threading.Event) -> int:
    """How many files `discover` will find, counted by name only: without a stat call it finishes sooner."""
    number, folders = 0, [(root, root) for root in roots if not is_remote(root)]
    while folders and not quit.is_set():
        folder, root = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if wanted.wants(entry.path, root, folder=is_folder):
                        if is_folder:
                            folders.append((entry.path, root))
                        else:
                            number += 1
        except OSError:
            number += 1  # a root that is a file, or a folder that cannot be listed: one row
    return number


def _walk(top: str, root: str, wanted: Wanted, unlisted: list[str] | None) -> Iterator[FoundFile]:
    """Everything below `top`, a folder at or below `root`."""
    real_root = os.path.realpath(root)
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if not wanted.wants(entry.path, root, folder=is_folder):
                        continue
                    if is_folder:
                        folders.append(entry.path)
                    elif entry.is_symlink():
                        yield from _look_at_link(entry.path, real_root)
                    else:
                        yield _look_at(entry.path)
        except OSError as error:
            if unlisted is not None:
                unlisted.append(folder)
            yield _with_problem(folder, _os_problem(error, "folder"))


def _look_at_link(path: str, real_root: str) -> Iterator[FoundFile]:
    target = os.path.realpath(path)
    inside = target == real_root or target.startswith(real_root.rstrip("/") + "/")
    try:
        info = os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            problem = Rejected(ReasonCode.SYMLINK_LOOP, "The link goes in circles; remove it.")
        elif error.errno == errno.ENOENT:
            problem = Rejected(ReasonCode.SYMLINK_BROKEN, "The link leads to nothing; remove or repair it.")
        else:
            problem = _os_problem(error, "link")
        yield _with_problem(path, problem)
        return
    if not inside:
        yield _with_problem(
            path,
            Rejected(
                ReasonCode.SYMLINK_OUTSIDE_ROOT,
                "The link leaves the scanned folder and is not followed; scan its target's folder instead.",
            ),
        )
    elif stat.S_ISDIR(info.st_mode):
        here = os.path.realpath(os.path.dirname(path))
        if (here + "/").startswith(target.rstrip("/") + "/"):
            yield _with_problem(
                path,
                Rejected(ReasonCode.SYMLINK_LOOP, "The link leads back to a folder above it and is not followed."),
            )
    else:
        yield _look_at(path)


def _look_at(path: str) -> FoundFile:
    try:
        info = os.stat(path)
    except OSError as error:
        return _with_problem(path, _os_problem(error, "file"))
    problem = None
    if not stat.S_ISREG(info.st_mode):
        problem = Rejected(
            ReasonCode.NOT_A_REGULAR_FILE, "This is a pipe, socket or device, not a file; it is not opened."
        )
    return FoundFile(path, info.st_size, info.st_mtime_ns, info.st_ino, problem)


def _with_problem(path: str, problem: Rejected) -> FoundFile:
    """A FoundFile for a name whose target cannot be read: with the link's own stat where there is one."""
    try:
        info = os.lstat(path)
    except OSError:
        return FoundFile(path, 0, 0, 0, problem)
    return FoundFile(path, info.st_size, info.st_mtime_ns, info.st_ino, problem)


def _os_problem(error: OSError, what: str) -> Rejected:
    name = errno.errorcode.get(error.errno or 0, "EIO")
    if error.errno == errno.ENOENT:
        return Retry(ReasonCode.VANISHED, f"The {what} was gone before it could be looked at.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Retry(ReasonCode.PERMISSION_DENIED, f"The {what} may not be read by this user; allow it and scan again.")
    return Retry(ReasonCode.UNREADABLE, f"The {what} could not be read ({name}); it is tried again by the next scan.")
