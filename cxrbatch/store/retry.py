"""Retry while the store is down, with growing delays."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cxrbatch.errors import Fatal
from cxrbatch.store.connection import StoreDown

__all__ = ["RetryPolicy"]

T = TypeVar("T")
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_STEADY_S = 5.0  # Cap the delay so that recovery is noticed quickly.
_JITTER = 0.5  # each delay varies by up to this share, so that the clients of a server do not all return at once


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Call it with an action that may raise StoreDown; it retries the action and returns its result.

    With `forever`, it retries until the action succeeds, or raises StoreDown once `stop` is set. Otherwise it raises
    Fatal after a minute. `tell` is called with a sentence at each failed try, and with None when the store is back.
    """

    forever: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    tell: Callable[[str | None], None] = lambda sentence: None
    heartbeat: Callable[[], None] = lambda: None  # called before each try: waiting for the store is not a hang

    def __call__(self, action: Callable[[], T]) -> T:
        down = False
        backoff = itertools.chain((0.5, 1.0, 2.0), itertools.repeat(_STEADY_S)) if self.forever else iter(_WAITS_S)
        while True:
            self.heartbeat()
            try:
                result = action()
            except StoreDown as error:
                wait_s = next(backoff, None)
                if wait_s is None:
                    raise Fatal(
                        f"The store did not come back within a minute ({error}); what is committed is kept. "
                        "Repair it, then run the same command again."
                    ) from None
                self.tell(str(error))
                down = True
                if self.stop.wait(wait_s * random.uniform(1 - _JITTER, 1 + _JITTER)):
                    raise
            else:
                if down:
                    self.tell(None)
                return result
