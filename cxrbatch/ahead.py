"""Let one part of the road work ahead of the next, in a thread of its own, with a bounded queue between."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")
_END = object()


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Iterate `items` in a thread that starts at once, at most `depth` of them ahead of the consumer.

    An exception in the thread is raised here, in its turn. Closing this generator stops the thread and closes
    `items` there, so that what `items` holds (processes, files) is let go before close() returns.
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

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()

    def consume() -> Generator[T, None, None]:
        try:
            yield None  # type: ignore[misc]  # the start below: from here on close() runs the finally
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
