"""Run one part of the pipeline ahead of the next: in its own thread, with a bounded queue between them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")
_END = object()


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Iterate `items` in a thread that starts at once, at most `depth` items ahead of the consumer.

    An exception in the thread is raised here after the items that came before it. Closing this generator stops the
    thread and closes `items` there, so that its resources (processes, files) are released before close() returns.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as error:
            put(error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
            put(_END)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()

    def consume() -> Generator[T, None, None]:
        try:
            yield None  # type: ignore[misc]  # consumed by next() below: from here on, close() runs the finally
            while True:
                item = ready.get()
                if item is _END:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item  # type: ignore[misc]  # T by construction
        finally:
            stop.set()
            thread.join()

    consumer = consume()
    next(consumer)
    return consumer
