"""Stage 1b, settle: is the file whole? A file is when its size, mtime and inode have stood still for `quiet_s`.

In one pass over a folder nearly every file is older than that and goes straight on; the few that are young are
put aside and looked at again, so that nobody waits for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from cxrbatch.errors import ReasonCode, Retry
from cxrbatch.nouns import FoundFile

__all__ = ["settle"]


def settle(
    found: Iterator[FoundFile],
    quiet_s: float,
    *,
    patience_s: float = 60.0,
    wall_clock: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[FoundFile]:
    """Pass on what stands still. What still grows after `patience_s` gets the problem CHANGED_WHILE_READ (tried again).

    The wall clock only tells old from young (a share's clock may be off; then a file is merely looked at twice);
    standing still is measured by the monotonic `clock`.
    """
    young: list[tuple[float, FoundFile]] = []  # (when it was last seen to change, file)
    for file in found:
        age_s = wall_clock() - file.mtime_ns / 1e9
        if file.problem is not None or age_s >= quiet_s:
            yield file
        else:
            young.append((clock(), file))
    give_up_at = clock() + patience_s
    while young:
        next_look = min(since for since, _ in young) + quiet_s
        sleep(max(0.0, next_look - clock()))
        still_young = []
        for since, file in young:
            if clock() - since < quiet_s:
                still_young.append((since, file))
                continue
            now = _look_again(file)
            if now == file or now.problem is not None:
                yield now
            elif clock() >= give_up_at:
                reason = "The file was still being written; the next scan reads it."
                yield replace(now, problem=Retry(ReasonCode.CHANGED_WHILE_READ, reason))
            else:
                still_young.append((clock(), now))
        young = still_young


def _look_again(file: FoundFile) -> FoundFile:
    try:
        info = os.stat(file.path)
    except OSError:
        return replace(file, problem=Retry(ReasonCode.VANISHED, "The file was gone before it could be read."))
    return replace(file, size=info.st_size, mtime_ns=info.st_mtime_ns, inode=info.st_ino)
