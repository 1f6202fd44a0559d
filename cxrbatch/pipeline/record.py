"""Stage 5, record: write outcomes to the store, one transaction per group, retried until the store accepts it.

A row in a group of 256 costs less than half of one in a group of 8. So batches that arrive quickly share a
transaction, for `age_s` seconds at most. After a batch that was not full, nothing is coming: it is committed at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from cxrbatch.store.retry import RetryPolicy
from cxrbatch.types import Outcome

__all__ = ["record"]

T = TypeVar("T")
_ROWS = 256  # per transaction: more is no faster


def record(
    batches: Iterator[list[Outcome]],
    commit: Callable[[list[Outcome]], T],
    retry: RetryPolicy,
    *,
    full: int,
    age_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[list[Outcome], T]]:
    """Commit batches and yield each committed group with what `commit` said of it.

    Full batches (`full` outcomes) may share a transaction.

    An empty batch is a clock tick: it lets a group that is older than `age_s` be committed.
    A store that is down is retried with growing delays. Nothing is lost when the retry policy gives up: the next scan
    finds again what was not committed.
    """
    group: list[Outcome] = []
    oldest = 0.0
    for batch in batches:
        if not group:
            oldest = clock()
        group += batch
        more_is_coming = not batch or len(batch) >= full
        if group and not (more_is_coming and len(group) < _ROWS and clock() - oldest < age_s):
            yield group, retry(partial(commit, group))
            group = []
    if group:
        yield group, retry(partial(commit, group))
