"""Stage 5, record: outcomes into the store, one transaction a group, again and again until the store takes it.

A row costs less than half as much in a group of 256 as in one of 8. So batches that come thick and fast share a
transaction, for `age_s` at most; a batch that was not full has nothing coming behind it and is committed at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from cxrbatch.nouns import Outcome
from cxrbatch.store.patience import Patience

__all__ = ["record"]

_ROWS = 256  # a transaction: more gains nothing


def record(
    batches: Iterator[list[Outcome]],
    commit: Callable[[list[Outcome]], object],
    patience: Patience,
    *,
    full: int,
    age_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Outcome]]:
    """Commit batches, several together while they hold `full` outcomes, and pass them on. What comes out is on disk.

    An empty batch is a tick of the clock: it lets a group that has grown old be committed.
    A store that is down is tried again with growing waits. Nothing is lost when the patience ends: what was not
    committed is found again by the next scan.
    """
    group: list[Outcome] = []
    oldest = 0.0
    for batch in batches:
        if not group:
            oldest = clock()
        group += batch
        more_is_coming = not batch or len(batch) >= full
        if group and not (more_is_coming and len(group) < _ROWS and clock() - oldest < age_s):
            patience(partial(commit, group))
            yield group
            group = []
    if group:
        patience(partial(commit, group))
        yield group
