"""Open a file that was found below some folders, and refuse a name that now leads elsewhere."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from cxrbatch.errors import ReasonCode, Retry

__all__ = ["open_inside"]

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK keeps a FIFO from hanging the open


def open_inside(path: str, roots: Sequence[str]) -> int:
    """A descriptor for reading `path`; its links may lead anywhere below `roots` (files or folders; empty: anywhere).

    Since the listing, the file or a folder above it may have been replaced by a link. So the name is resolved without
    opening it (O_PATH), the kernel reports its real path, and only then the file is opened.
    Raises OSError, and Retry if the target is outside: the next walk decides what the name is.
    """
    if not roots:
        return os.open(path, _FLAGS)
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        place = f"/proc/self/fd/{found}"
        real = os.fspath(Path(place).readlink())
        near = [root for root in roots if _holds(root, path)]  # one of these holds it unless a root is a link
        if not any(_holds(os.path.realpath(root), real) for root in chain(near, roots)):
            raise Retry(ReasonCode.CHANGED_WHILE_READ, "The name was changed to lead out of the scanned folder.")
        return os.open(place, _FLAGS)
    finally:
        os.close(found)


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
