"""Unexpected errors: a catch-all turned them into a reason code, but they are bugs, ours or a library's.

`report` logs and counts the type and the place. It never repeats the error's text, which may quote a file.
A decode worker sends its reports to the parent with the answer (decoding/decode_worker.py): its stderr is discarded.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

__all__ = ["UnexpectedError", "forward_to", "record", "report", "total", "where"]

_FRAMES = 4
_log = logging.getLogger("cxrbatch")
_lock = threading.Lock()
_counts: Counter[UnexpectedError] = Counter()


class UnexpectedError(NamedTuple):
    """The type of an exception and the last frames of its traceback, without any value."""

    error: str
    where: str


def where(trace: TracebackType | None) -> str:
    """The last few frames of a traceback as file:line, innermost first, without any value."""
    frames = traceback.extract_tb(trace)[-_FRAMES:]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))


def report(error: BaseException) -> None:
    """Report `error`, which a catch-all turns into a reason code."""
    _sink(UnexpectedError(type(error).__name__, where(error.__traceback__)))


def record(unexpected: UnexpectedError) -> None:
    """Count an error in this process. Only the 1st, 10th, 100th ... of a kind is logged, to keep the log short."""
    with _lock:
        _counts[unexpected] += 1
        times = _counts[unexpected]
    if str(times).strip("0") == "1":
        extra = {"event": "unexpected_error", "files": times, **unexpected._asdict()}
        _log.error("unexpected_error error=%s where=%s files=%d", *unexpected, times, extra=extra)


def total() -> int:
    """The number of errors counted in this process, including those of its decode workers."""
    with _lock:
        return _counts.total()


def forward_to(sink: Callable[[UnexpectedError], None]) -> None:
    """Hand reports to `sink` instead of counting them here."""
    global _sink
    _sink = sink


_sink: Callable[[UnexpectedError], None] = record
