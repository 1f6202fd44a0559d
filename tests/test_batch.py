"""Batches leave when they are full or old; `ahead` passes on everything, errors and the end included."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cxrbatch.ahead import ahead
from cxrbatch.batch import in_batches
from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.nouns import FoundFile, Outcome

FILE = FoundFile("/x", 1, 1, 1)
IMAGE = Outcome(FILE)
JUNK = Outcome(FILE, rejected=Rejected(ReasonCode.EMPTY_FILE, ""))


def sizes(outcomes: list[Outcome | None], clock: Iterator[float]) -> list[int]:
    return [len(b) for b in in_batches(iter(outcomes), 4, 1.0, clock=lambda: next(clock))]


def test_full_batches_leave_and_the_rest_leaves_at_the_end() -> None:
    assert sizes([IMAGE] * 9, iter([0.0] * 99)) == [4, 4, 1]


def test_rejected_files_take_no_seat() -> None:
    assert sizes([JUNK, IMAGE, JUNK, IMAGE, IMAGE, JUNK, IMAGE], iter([0.0] * 99)) == [7]


def test_a_tick_lets_an_old_batch_leave() -> None:
    assert sizes([IMAGE, None, IMAGE], iter([0.0, 0.0, 1.5, 2.0, 2.0, 2.0])) == [1, 1]


def test_ahead_keeps_order_and_bounds() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    items = ahead(numbers(), depth=3)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(made) <= 6
    assert list(items) == list(range(1, 100))


def test_ahead_raises_what_happened_behind_it() -> None:
    def breaks() -> Iterator[int]:
        yield 1
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(ahead(breaks(), 2))


def test_closing_ahead_closes_what_it_iterates_and_its_thread() -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    items = ahead(endless(), 2)
    next(items)
    items.close()
    assert closed == ["ahead"]
    assert "ahead" not in [t.name for t in threading.enumerate()]
