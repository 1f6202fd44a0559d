"""Files of a run and of a bundle: written whole or not at all, and by one program at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cxrbatch.errors import Fatal
from cxrbatch.output_file import new_file

__all__ = ["locked", "write_whole"]


def write_whole(file: Path, data: bytes) -> None:
    """Write a file or replace it, with one rename. Raises Fatal: a full disk, a folder that is not writable."""
    with new_file(file, lambda first, last: True) as whole:
        whole.write(data)


@contextmanager
def locked(path: Path, busy: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, or of a file that is made and left, until the block ends.

    Where another process holds it, raises Fatal with the sentence `busy`, or with `wait` prints it and waits. The
    processes that load images for a run do not inherit the lock of a file: a run that was killed can be gone on with
    while they still end.
    """
    is_folder = path.is_dir()
    descriptor = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT), 0o644)
    take = fcntl.flock if is_folder else fcntl.lockf
    try:
        try:
            take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not wait:
                raise Fatal(busy) from None
            print(busy, flush=True)
            take(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
