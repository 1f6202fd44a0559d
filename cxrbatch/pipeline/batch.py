"""Stage 3, batch: group single outcomes into lists, by count or by age."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from cxrbatch.failpoints import failpoint
from cxrbatch.types import Outcome

__all__ = ["in_batches"]


def in_batches(
    outcomes: Iterator[Outcome | None],
    size: int,
    age_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Outcome]]:
    """Group `outcomes` into lists of `size` decoded images, or of whatever arrived within `age_s` seconds.

    Rejected files do not count towards the batch size. A list holds at most 64 * size outcomes, so that a folder of
    junk is recorded as the scan proceeds. A None means that nothing is ready right now: the current batch is passed
    on as it is, or an empty list as a clock tick where there is none.
    """
    batch: list[Outcome] = []
    accepted = 0
    oldest = 0.0
    for outcome in outcomes:
        if outcome is not None:
            failpoint("pipeline.decoded")
            if not batch:
                oldest = clock()
            batch.append(outcome)
            accepted += outcome.rejected is None
        if batch and (outcome is None or accepted >= size or len(batch) >= 64 * size or clock() - oldest >= age_s):
            yield batch
            batch, accepted = [], 0
        elif outcome is None:
            yield []
    if batch:
        yield batch
