"""Keep freed memory in the process for the next image or training step, instead of returning it to the kernel."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)


def keep_freed_memory(largest: int, kept: int, prefetch: int = 128 * 2**10) -> bool:
    """Configure glibc's malloc; returns False, and does nothing, with another C library.

    Blocks of up to `largest` bytes come from the heap, `kept` free bytes of the heap are kept, and the kernel is asked
    for `prefetch` bytes more than needed. The kernel clears each page that it provides: this takes half of the time of
    a training step on a CPU, and a third of the time of decoding a large image.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, largest), mallopt(_TRIM_THRESHOLD, kept), mallopt(_TOP_PAD, prefetch)])
