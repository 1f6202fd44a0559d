"""Decoding for the web process: requests go to the killable workers of `decode_all`, one thread keeps them apart."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from cxrbatch.decoding.decode_pool import decode_all
from cxrbatch.errors import Fatal, ReasonCode, Rejected
from cxrbatch.imaging.limits import Limits
from cxrbatch.review.pixels import DecodeForViewer, ViewedImage, ViewRequest, as_body
from cxrbatch.types import FoundFile

__all__ = ["ImageDecoder"]

_TICK_S = 0.01  # a request that comes while another one is decoded waits at most so long
_CACHED_BYTES = 256 * 2**20
_MOST_WAITING = 64  # then requests are refused: a browser that asks for more is broken or hostile
_KEY = tuple[str, bool]


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class ImageDecoder:
    """Bodies for the viewer, from a small cache or from a worker. Methods may be called from several threads."""

    def __init__(self, limits: Limits, *, workers: int, timeout_s: float, memory_mib: int) -> None:
        self._requests: queue.SimpleQueue[ViewRequest | _Stop] = queue.SimpleQueue()
        self._waiting: dict[ViewRequest, Future[bytes]] = {}
        self._cache: OrderedDict[_KEY, bytes] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()
        self._failure: Fatal | None = None
        self._stopped = False
        self._timeout_s = timeout_s
        self._options = {"workers": workers, "timeout_s": timeout_s, "memory_mib": memory_mib, "tick_s": _TICK_S}
        self._task = DecodeForViewer(limits)
        self._thread = threading.Thread(target=self._run, name="image-decoder", daemon=True)
        self._thread.start()
        self._seen_alive = time.monotonic()

    def body(self, request: ViewRequest) -> bytes:
        """The answer for the viewer (pixels.as_body). Raises Rejected; Fatal where workers cannot start."""
        key = (request.sha256, request.reduced)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            future = self._waiting.get(request)
            if future is None:
                if len(self._waiting) >= _MOST_WAITING or self._stopped:
                    raise Rejected(ReasonCode.DECODE_TIMEOUT, "Too many images are being decoded: try again.")
                future = self._waiting[request] = Future()
                self._requests.put(request)
        return future.result(2 * self._timeout_s + 240)

    def last_alive(self) -> float:
        """When the thread was last known to run (monotonic seconds): now, unless it has ended."""
        if self._thread.is_alive():
            self._seen_alive = time.monotonic()
        return self._seen_alive

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            self._stopped = True
        self._requests.put(_Stop())
        self._thread.join(10)

    def _run(self) -> None:
        try:
            for outcome in decode_all(self._files(), self._task, **self._options):  # type: ignore[arg-type]
                if outcome is None:
                    continue
                assert isinstance(outcome.file, ViewRequest)
                with self._lock:
                    future = self._waiting.pop(outcome.file)
                if outcome.rejected is not None:
                    future.set_exception(outcome.rejected)
                else:
                    assert isinstance(outcome.image, ViewedImage)
                    body = as_body(outcome.image)
                    self._keep((outcome.file.sha256, outcome.file.reduced), body)
                    future.set_result(body)
        except Fatal as failure:
            self._fail(failure)
        except BaseException:
            self._fail(Fatal("The image decoder has stopped; start the review again."))
            raise

    def _files(self) -> Iterator[FoundFile | None]:
        while True:
            with self._lock:
                idle = not self._waiting
            try:
                request = self._requests.get(block=idle)
            except queue.Empty:
                yield None
                continue
            if isinstance(request, _Stop):
                return
            yield request

    def _keep(self, key: _KEY, body: bytes) -> None:
        with self._lock:
            self._cache[key] = body
            self._cached += len(body)
            while self._cached > _CACHED_BYTES and len(self._cache) > 1:
                self._cached -= len(self._cache.popitem(last=False)[1])

    def _fail(self, failure: Fatal) -> None:
        with self._lock:
            self._failure = failure
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(failure)
