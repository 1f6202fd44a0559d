"""Waiting for a store that is down: again and again, with growing waits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cxrbatch.errors import Fatal
from cxrbatch.store.engine import StoreDown

__all__ = ["Patience"]

T = TypeVar("T")
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_STEADY_S = 5.0  # for ever: a store that is back should not find everybody asleep


@dataclass(frozen=True, slots=True)
class Patience:
    """Call it with what may raise StoreDown.

    With `forever`, it tries until it works or `stop` is set, and then lets StoreDown out; otherwise it gives up
    after a minute with Fatal. `tell` hears a sentence at each try that fails, and None when the store is back.
    """

    forever: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    tell: Callable[[str | None], None] = lambda sentence: None
    beat: Callable[[], None] = lambda: None  # called before each try: whoever waits here is alive

    def __call__(self, action: Callable[[], T]) -> T:
        down = False
        waits = itertools.chain((0.5, 1.0, 2.0), itertools.repeat(_STEADY_S)) if self.forever else iter(_WAITS_S)
        while True:
            self.beat()
            try:
                result = action()
            except StoreDown as error:
                wait_s = next(waits, None)
                if wait_s is None:
                    raise Fatal(
                        f"The store did not come back within a minute ({error}); what is committed is kept. "
                        "Repair it, then run the same command again."
                    ) from None
                self.tell(str(error))
                down = True
                if self.stop.wait(wait_s):
                    raise
            else:
                if down:
                    self.tell(None)
                return result
