"""Heat maps from a process of their own, which alone loads torch: started at the first question, killed when it stalls.

The process is named by its module and never imported here (cxrbatch/training/heat_map.py is its other side).
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import Any

from cxrbatch import unexpected
from cxrbatch.errors import Fatal
from cxrbatch.unexpected import UnexpectedError

__all__ = ["HeatMaps"]

_MODULE = "cxrbatch.training.heat_map"
_ANSWER_S = 180.0  # loading torch from a cold disk included
_KEPT = 500
_MOST_WAITING = 8  # each waits in one of the 40 threads that serve all readers; torch may take a minute to load
_CLOSED = ""


class HeatMaps:
    """Asks the process, one question at a time, and keeps the answers."""

    def __init__(self, bundle: str) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(_MOST_WAITING)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._cache: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()

    def heat_map(self, path: str, sha256: str, manifest_sha256: str) -> dict[str, Any]:
        """{"rows", "columns", "values" (0..1, row by row), "label", "fit"} of one file under one bundle.

        Raises Fatal where there is none: another bundle, no torch, an unreadable file, too many questions at a time.
        """
        if not self._room.acquire(blocking=False):
            raise Fatal("The heat map is not available: others are being made, try again in a minute.")
        try:
            return self._answer(path, sha256, manifest_sha256)
        finally:
            self._room.release()

    def _answer(self, path: str, sha256: str, manifest_sha256: str) -> dict[str, Any]:
        key = (sha256, manifest_sha256)
        with self._lock:
            if key not in self._cache:
                question = {"path": path, "sha256": sha256, "manifest_sha256": manifest_sha256, "bundle": self._bundle}
                answer = self._ask(json.dumps(question))
                if "problem" in answer:
                    raise Fatal(f"The heat map is not available: {answer['problem']}")
                self._cache[key] = answer
                if len(self._cache) > _KEPT:
                    self._cache.popitem(last=False)
            return self._cache[key]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, question: str) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=_ANSWER_S)
        except (OSError, queue.Empty):
            line = _CLOSED
        if line == _CLOSED:
            self.close()
            raise Fatal("The heat map is not available: the process that makes it has ended or takes too long.")
        answer: dict[str, Any] = json.loads(line)
        if "unexpected" in answer:
            unexpected.record(UnexpectedError(*answer.pop("unexpected")))
        return answer

    def _start(self) -> None:
        self._answers = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        threading.Thread(target=_listen, args=(self._process, self._answers), name="heat-maps", daemon=True).start()


def _listen(process: subprocess.Popen[str], answers: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(_CLOSED)
