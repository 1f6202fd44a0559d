"""Stage 3, batch: single outcomes in, lists of them out, filled by count or by age."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from cxrbatch.crash import crash_point
from cxrbatch.nouns import Outcome

__all__ = ["in_batches"]


def in_batches(
    outcomes: Iterator[Outcome | None],
    size: int,
    age_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Outcome]]:
    """Group `outcomes` into lists that hold `size` decoded images, or whatever came within `age_s`.

    Rejected files ride along without taking a seat (at most 64 seats' worth, so that a folder of junk is recorded
    as it goes). A None means that nothing more is coming just now: the batch leaves as it is, and where there is none,
    an empty list goes on down the road as a tick of the clock.
    """
    batch: list[Outcome] = []
    seats = 0
    oldest = 0.0
    for outcome in outcomes:
        if outcome is not None:
            crash_point("road.decoded")
            if not batch:
                oldest = clock()
            batch.append(outcome)
            seats += outcome.rejected is None
        if batch and (outcome is None or seats >= size or len(batch) >= 64 * size or clock() - oldest >= age_s):
            yield batch
            batch, seats = [], 0
        elif outcome is None:
            yield []
    if batch:
        yield batch
