"""The N-th call of something fails. TEST_FAULT="scandir:EIO:3": the third call of os.scandir.

Or TEST_FAULT_FILE names a file that contains such a plan after a name ("7:scandir:EIO:3"). A new plan in the file
starts counting from one, so that one process gets many faults. Each process counts separately; the first one that
reaches the N-th call fails and creates the file `<TEST_FAULT_FILE>.<name>`, after which no process fails.

File-system calls count if they concern the watched folder (a name or descriptor below "/in"). "read" is the reading of
a file, "getdents" each name of a listing, "committed" a commit that succeeds but whose answer is lost.
"""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["DATABASE_CALLS", "FILE_CALLS", "RECEIVER_CALLS", "install"]

FILE_CALLS = ("open", "read", "stat", "scandir", "getdents")
RECEIVER_CALLS = ("fsync", "write", "rename")
DATABASE_CALLS = ("commit", "committed", "connect", "execute")


def install() -> None:
    """Inject the fault that the environment names into this process."""
    if "TEST_FAULT" in os.environ:
        plan = f"0:{os.environ['TEST_FAULT']}"
        mark = os.path.join(os.getcwd(), f"fault-{os.getpid()}")
        trip = _Trip(lambda: plan, mark)
    elif "TEST_FAULT_FILE" in os.environ:
        place = Path(os.environ["TEST_FAULT_FILE"])
        trip = _Trip(lambda: _read(str(place)), str(place))
    else:
        return
    os.open = trip.around("open", os.open)
    os.stat = trip.around("stat", os.stat)
    os.scandir = _listing(trip.around("scandir", os.scandir), trip)
    os.fsync = trip.around("fsync", os.fsync)
    os.link = trip.around("rename", os.link)
    builtins.open = _opening(builtins.open, trip)
    if any(f"{call}:" in os.environ.get("TEST_FAULT", "") for call in DATABASE_CALLS) or "TEST_FAULT" not in os.environ:
        _break_database(trip)


_real_open, _real_readlink = os.open, os.readlink


def _read(path: str) -> str:
    try:
        descriptor = _real_open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 200).decode()
    finally:
        os.close(descriptor)


class _Trip:
    def __init__(self, plan: Callable[[], str], mark: str) -> None:
        self._plan, self._mark = plan, mark
        self._counting, self._calls = "", 0

    def step(self, call: str) -> None:
        plan = self._plan()
        if not plan:
            return
        name, planned, error, nth = plan.split(":")
        if planned != call:
            return
        if plan != self._counting:
            self._counting, self._calls = plan, 0
        self._calls += 1
        if self._calls != int(nth):
            return
        try:
            os.close(_real_open(f"{self._mark}.{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
        if error == "MemoryError":
            raise MemoryError("injected")
        if error == "OperationalError":
            from sqlalchemy.exc import OperationalError

            raise OperationalError("injected", None, Exception("disk I/O error: server closed the connection"))
        raise OSError(getattr(errno, error), "injected")

    def around(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **more: Any) -> Any:
            if args and _below_in(args[0]):
                self.step(call)
            return real(*args, **more)

        return failing


def _below_in(name: object) -> bool:
    if isinstance(name, int):
        try:
            name = _real_readlink(f"/proc/self/fd/{name}")
        except OSError:
            return False
    return isinstance(name, (str, os.PathLike)) and "/in/" in f"{name}/"


class _Listing:
    """The result of os.scandir, with a fault point for each name."""

    def __init__(self, real: Any, trip: _Trip) -> None:
        self._real, self._trip = real, trip

    def __enter__(self) -> _Listing:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def close(self) -> None:
        self._real.close()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._trip.step("getdents")
        return next(self._real)


def _listing(scandir: Callable[..., Any], trip: _Trip) -> Callable[..., Any]:
    def listing(*args: Any) -> Any:
        real = scandir(*args)
        return _Listing(real, trip) if args and _below_in(args[0]) else real

    return listing


class _File:
    """A file object whose reads and writes may fail."""

    def __init__(self, real: Any, trip: _Trip) -> None:
        self._real, self._trip = real, trip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def read(self, *args: Any) -> Any:
        self._trip.step("read")
        return self._real.read(*args)

    def write(self, data: Any) -> Any:
        self._trip.step("write")
        return self._real.write(data)


def _opening(real: Callable[..., Any], trip: _Trip) -> Callable[..., Any]:
    def opening(file: Any, *args: Any, **more: Any) -> Any:
        opened = real(file, *args, **more)
        return _File(opened, trip) if _below_in(file) else opened

    return opening


def _break_database(trip: _Trip) -> None:
    import sqlalchemy as sa
    from sqlalchemy import event
    from sqlalchemy.engine.default import DefaultDialect

    event.listen(sa.Engine, "commit", lambda connection: trip.step("commit"))
    event.listen(sa.Engine, "before_cursor_execute", lambda *_: trip.step("execute"))
    event.listen(sa.Engine, "do_connect", lambda *_: trip.step("connect"))
    commit = DefaultDialect.do_commit

    def do_commit(self: Any, connection: Any) -> None:
        commit(self, connection)
        trip.step("committed")

    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]
