"""The N-th call of something fails, once or for a while. TEST_FAULT="scandir:EIO:3:2": calls 3 and 4 of os.scandir.

Calls of the file system count when they are about the watched folder (a name with "/in" in it) or have no name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

__all__ = ["CALLS", "ERRORS", "install"]

CALLS = ("scandir", "stat", "fsync", "commit", "connect", "execute")
ERRORS = ("EIO", "ENOSPC", "EACCES", "ESTALE", "EMFILE", "MemoryError", "OperationalError")


def install(plan: str) -> None:
    """Break the calls of this process that `plan` names."""
    call, error, first, *times = plan.split(":")
    trip = _Trip(error, int(first), int(times[0]) if times else 1)
    if call in ("commit", "execute", "connect"):
        _break_database(call, trip)
    else:
        setattr(os, call, trip.around(getattr(os, call)))


class _Trip:
    def __init__(self, error: str, first: int, times: int) -> None:
        self.error, self.failing, self.calls = error, range(first, first + times), 0

    def step(self) -> None:
        self.calls += 1
        if self.calls in self.failing:
            if self.error == "MemoryError":
                raise MemoryError("injected")
            if self.error == "OperationalError":
                raise OperationalError("injected", None, Exception("disk I/O error: server closed the connection"))
            raise OSError(getattr(errno, self.error), "injected")

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **more: Any) -> Any:
            if not args or not isinstance(args[0], (str, os.PathLike)) or "/in/" in f"{args[0]}/":
                self.step()
            return real(*args, **more)

        return failing


def _break_database(call: str, trip: _Trip) -> None:
    if call == "commit":
        event.listen(sa.Engine, "commit", lambda connection: trip.step())
    elif call == "execute":
        event.listen(sa.Engine, "before_cursor_execute", lambda *_: trip.step())
    else:
        event.listen(sa.Engine, "do_connect", lambda *_: trip.step())
