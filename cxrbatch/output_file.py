"""Write a file that the user has named; every command uses this module.

An existing file is replaced only if it is empty or an earlier output of the same kind, because a shell glob after an
option (`--csv *.dcm`) may name an image. Anything but a regular file (a symlink, a FIFO, a device) is refused and never
opened. The new file is written as `.NAME.part`, flushed to disk and renamed, so it is never incomplete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from typing import IO

from cxrbatch.errors import Fatal

__all__ = ["EarlierOutput", "check_target", "earlier_plot", "new_file", "starts_with"]

#: Takes the first and the last bytes of a file (at most `_LOOKED_AT` each): whether it is an earlier output.
EarlierOutput = Callable[[bytes, bytes], bool]

_LOOKED_AT = 65_536
_KINDS = {
    stat.S_IFLNK: "a symlink",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


def starts_with(*beginnings: bytes) -> EarlierOutput:
    """A check that treats files beginning with one of these as earlier outputs."""
    return lambda first, last: first.startswith(beginnings)


def earlier_plot(first: bytes, last: bytes) -> bool:
    """An EarlierOutput: a PNG that Matplotlib has written. Images of patients may be PNG files too."""
    return first.startswith(b"\x89PNG") and b"tEXtSoftware\0Matplotlib" in first


def check_target(path: str | PathLike[str], earlier: EarlierOutput) -> None:
    """Raise Fatal, before any work is done, if `new_file` would refuse or fail."""
    target = os.path.abspath(path)
    _check(target, earlier)
    with _part_of(target) as (_, part):
        os.unlink(part)


@contextmanager
def new_file(path: str | PathLike[str], earlier: EarlierOutput) -> Iterator[IO[bytes]]:
    """A binary file to write; it gets its name when the block ends without an error.

    Raises Fatal if `path` must not be replaced, cannot be written, or is being written by another program.
    """
    target = os.path.abspath(path)
    _check(target, earlier)
    with _part_of(target) as (file, part):
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _check(target, earlier)  # it may have been created meanwhile
            os.replace(part, target)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(part)
            if isinstance(error, OSError):
                raise _not_written(target, error) from None
            raise
    with suppress(OSError):  # some network file systems do not do this
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check(target: str, earlier: EarlierOutput) -> None:
    try:
        kind = stat.S_IFMT(os.lstat(target).st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _not_written(target, error) from None
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "no regular file")
        raise Fatal(f"{target} cannot be written: it is {what}, and only regular files are. Name another file.")
    try:
        # The flags keep the open from following a link or blocking on a FIFO that has replaced the file.
        with os.fdopen(os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(_LOOKED_AT)
            file.seek(max(0, size - _LOOKED_AT))
            last = file.read(_LOOKED_AT)
    except OSError as error:
        raise _not_written(target, error) from None
    if first and not earlier(first, last):
        raise Fatal(f"{target} is there already, and this command has not written it: name another file or remove it.")


@contextmanager
def _part_of(target: str) -> Iterator[tuple[IO[bytes], str]]:
    """An empty, locked file beside `target`; a leftover of a killed program with this name is overwritten."""
    folder, base = os.path.split(target)
    # A file name has at most 255 bytes, and this one is longer than the target's.
    part = os.path.join(folder, "." + os.fsdecode(os.fsencode(base)[:240]) + ".part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(part, flags, 0o666), "wb")
    except OSError as error:
        raise _not_written(target, error) from None
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Fatal(f"{target} cannot be written: {part} is in the way, remove it.")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        except OSError:
            ours = True  # a file system without locks
        if not ours:  # also if the other program renamed it between our open and our lock
            raise Fatal(f"{target} is being written by another program.")
        file.truncate(0)
        yield file, part
    finally:
        with suppress(OSError):  # closing flushes again; a full disk has been reported before
            file.close()


def _not_written(target: str, error: OSError) -> Fatal:
    advice = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name another file"
    return Fatal(f"{target} cannot be written ({error.strerror or error}): {advice}.")
