"""Stage 5, record: outcomes into the store, one transaction a group, again and again until the store takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cxrbatch.nouns import Outcome
from cxrbatch.store.patience import Patience

__all__ = ["record"]


def record(
    batches: Iterator[list[Outcome]], commit: Callable[[list[Outcome]], object], patience: Patience
) -> Iterator[list[Outcome]]:
    """Commit each batch and pass it on. What comes out is on disk.

    A store that is down is tried again with growing waits. Nothing is lost when the patience ends: what was not
    committed is found again by the next scan.
    """
    for batch in batches:
        patience(lambda batch=batch: commit(batch))  # type: ignore[misc]  # mypy cannot infer the default
        yield batch
