"""Batches are passed on when full or old, and committed in groups; `prefetch` passes on items, errors and the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.pipeline.batch import in_batches
from cxrbatch.pipeline.prefetch import prefetch
from cxrbatch.pipeline.record import record
from cxrbatch.store import RetryPolicy
from cxrbatch.types import FoundFile, Outcome

FILE = FoundFile("/x", 1, 1, 1)
IMAGE = Outcome(FILE)
JUNK = Outcome(FILE, rejected=Rejected(ReasonCode.EMPTY_FILE, ""))


def sizes(outcomes: list[Outcome | None], clock: Iterator[float]) -> list[int]:
    return [len(b) for b in in_batches(iter(outcomes), 4, 1.0, clock=lambda: next(clock))]


def test_full_batches_leave_and_the_rest_leaves_at_the_end() -> None:
    assert sizes([IMAGE] * 9, iter([0.0] * 99)) == [4, 4, 1]


def test_rejected_files_take_no_seat() -> None:
    assert sizes([JUNK, IMAGE, JUNK, IMAGE, IMAGE, JUNK, IMAGE], iter([0.0] * 99)) == [7]


def test_an_old_batch_leaves() -> None:
    assert sizes([IMAGE, IMAGE, IMAGE], iter([0.0, 0.0, 1.5, 2.0, 2.0])) == [2, 1]


def test_a_batch_leaves_when_nothing_more_is_coming() -> None:
    assert sizes([IMAGE, None, IMAGE], iter([0.0] * 99)) == [1, 1]


def test_a_tick_goes_on_down_the_pipeline() -> None:
    assert sizes([None, IMAGE, None, None], iter([0.0] * 99)) == [0, 1, 0]


def groups(batches: list[int], times: list[float], age_s: float = 0.2) -> list[int]:
    """The sizes of the committed groups, for batches of these sizes at these times; a full batch has four."""
    committed: list[int] = []
    now = [0.0]

    def coming() -> Iterator[list[Outcome]]:
        for size, now[0] in zip(batches, times, strict=True):
            yield [IMAGE] * size

    passed = record(
        coming(), lambda group: committed.append(len(group)), RetryPolicy(), full=4, age_s=age_s, clock=lambda: now[0]
    )
    assert [len(group) for group, _ in passed] == committed
    return committed


def test_full_batches_share_a_transaction_until_it_is_old() -> None:
    assert groups([4, 4, 4, 4], [0.0, 0.1, 0.25, 0.3]) == [12, 4]
    assert groups([4, 4, 4], [0.0, 0.1, 0.15], age_s=0) == [4, 4, 4]


def test_a_batch_that_was_not_full_is_committed_at_once() -> None:
    assert groups([3, 4, 1, 4], [0.0, 0.0, 0.0, 0.0]) == [3, 5, 4]


def test_a_tick_lets_an_old_group_be_committed() -> None:
    assert groups([4, 0, 0, 0, 4], [0.0, 0.1, 0.2, 0.3, 0.4]) == [4, 4]


def test_a_group_does_not_grow_for_ever() -> None:
    assert groups([100] * 5, [0.0] * 5) == [300, 200]


def test_ahead_keeps_order_and_bounds() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    items = prefetch(numbers(), depth=3)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(made) <= 6
    assert list(items) == list(range(1, 100))


def test_ahead_raises_what_happened_behind_it() -> None:
    def breaks() -> Iterator[int]:
        yield 1
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(prefetch(breaks(), 2))


def test_closing_prefetch_closes_what_it_iterates_and_its_thread() -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    items = prefetch(endless(), 2)
    next(items)
    items.close()
    assert closed == ["prefetch"]
    assert "prefetch" not in [t.name for t in threading.enumerate()]
