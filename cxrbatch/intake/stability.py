"""Stage 1b, settle: a file is complete when its size, mtime and inode have not changed for `quiet_s` seconds.

In one pass over a folder, nearly every file is older than that and passes at once. The few unstable files are set
aside and checked again later, so that no other file waits for them. Nothing here sleeps: while files are unstable,
None is yielded (nothing is ready right now), and the pipeline keeps running and responds to Ctrl-C.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from cxrbatch.errors import ReasonCode, Retry
from cxrbatch.intake.remote import comes_whole, is_remote, look_at_remote
from cxrbatch.types import FoundFile

__all__ = ["look_again", "settle"]


def settle(
    found: Iterator[FoundFile],
    quiet_s: float,
    *,
    max_wait_s: float = 60.0,
    wall_clock: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[FoundFile | None]:
    """Pass on stable files. A file that still changes after `max_wait_s` gets CHANGED_WHILE_READ and is retried.

    The wall clock only separates old files from unstable ones (if a share's clock is off, a file is just checked
    twice). Whether a file is stable is measured by the monotonic `clock`.
    """
    unstable: list[tuple[float, FoundFile]] = []  # (time of the last seen change, file)
    for file in found:
        age_s = wall_clock() - file.mtime_ns / 1e9
        if file.problem is not None or age_s >= quiet_s or comes_whole(file.path):
            yield file
        else:
            unstable.append((clock(), file))
    give_up_at = clock() + max_wait_s
    while unstable:
        if clock() < min(since for since, _ in unstable) + quiet_s:
            yield None
            continue
        still_unstable = []
        for since, file in unstable:
            if clock() - since < quiet_s:
                still_unstable.append((since, file))
                continue
            now = _look_again(file)
            if now == file or now.problem is not None:
                yield now
            elif clock() >= give_up_at:
                reason = "The file was still being written; the next scan reads it."
                yield replace(now, problem=Retry(ReasonCode.CHANGED_WHILE_READ, reason))
            else:
                still_unstable.append((clock(), now))
        unstable = still_unstable


def look_again(file: FoundFile) -> FoundFile:
    """The file as it is now. Raises OSError where it is gone or cannot be looked at."""
    if is_remote(file.path):
        return look_at_remote(file)
    info = os.stat(file.path)
    return replace(file, size=info.st_size, mtime_ns=info.st_mtime_ns, inode=info.st_ino)


def _look_again(file: FoundFile) -> FoundFile:
    try:
        return look_again(file)
    except OSError:
        return replace(file, problem=Retry(ReasonCode.VANISHED, "The file was gone before it could be read."))
