"""Running a process tree and seeing what it costs: wall and CPU seconds, memory, when its rows come."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Cost", "committed", "run_tree", "scan_command"]

_SAMPLE_S = 0.1


@dataclass(frozen=True)
class Cost:
    """What one run of a process tree took."""

    code: int
    wall_s: float
    cpu_s: float  # user + system of the tree, by wait4: what was waited for
    rss_mib: float  # peak of the sum over the tree: pages that processes share count for each
    first_row_s: float | None
    going: tuple[float, int] | None  # seconds and rows when it was well under way
    out: dict[str, Any]  # the last line of its stdout, as JSON


def scan_command(folder: Path, place: Path, *more: str) -> list[str]:
    """`cxrbatch scan` of a folder into a store of its own in `place`, and a CSV."""
    store = f"sqlite:///{place}/scan.db"
    return [sys.executable, "-m", "cxrbatch", "--db", store, "scan", str(folder), "--csv", f"{place}/scan.csv", *more]


def committed(store: Path) -> int:
    """Rows of a scan's store that hold an outcome; 0 while there is no store."""
    try:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
            query = "SELECT count(*) FROM files WHERE state IN ('done', 'rejected')"
            return int(connection.execute(query).fetchone()[0])
    except sqlite3.Error:
        return 0


def run_tree(
    command: Sequence[str],
    place: Path,
    *,
    env: dict[str, str] | None = None,
    rows: Callable[[], int] | None = None,
    under_way: int = 1,
    kill_when: Callable[[], bool] | None = None,
) -> Cost:
    """Run it in a process group of its own, to its end or, once `kill_when`, to its kill -9. Its stderr goes to
    stderr.txt in `place`.

    With `rows`, asks for them every 20 ms until there are `under_way`.
    """
    with (place / "stdout.txt").open("w") as out, (place / "stderr.txt").open("w") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=place, stdout=out, stderr=err, env={**os.environ, **(env or {})}, start_new_session=True
        )
        watcher = _Watcher(process.pid, started, rows, under_way)
        watcher.start()
        try:
            if kill_when is not None:
                while not (kill_when() or _ended(process.pid)):
                    time.sleep(0.005)
                os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # a Ctrl-C does not reach it: it has a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.over.set()
        watcher.join()
    lines = (place / "stdout.txt").read_text().splitlines()
    report = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    cpu_s = usage.ru_utime + usage.ru_stime
    return Cost(process.returncode, wall_s, cpu_s, watcher.rss / 2**20, watcher.first_row_s, watcher.going, report)


def _ended(pid: int) -> bool:
    """Whether the child has; it stays there for wait4 to ask about."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class _Watcher(threading.Thread):
    """Looks at the tree's memory every 0.1 s, and for its first row every 20 ms."""

    def __init__(self, pid: int, started: float, rows: Callable[[], int] | None, under_way: int) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.rss = 0
        self.first_row_s: float | None = None
        self.going: tuple[float, int] | None = None
        self._under_way = under_way
        self._root, self._since, self._rows = psutil.Process(pid), started, rows

    def run(self) -> None:
        look_at = 0.0
        while not self.over.wait(0.02):
            now = time.perf_counter()
            if self._rows and self.going is None:
                self._look_at_rows(self._rows())
            if now >= look_at:
                look_at = now + _SAMPLE_S
                self.rss = max(self.rss, self._tree_rss())

    def _look_at_rows(self, rows: int) -> None:
        now_s = time.perf_counter() - self._since
        if rows and self.first_row_s is None:
            self.first_row_s = now_s
        if rows >= self._under_way:
            self.going = now_s, rows

    def _tree_rss(self) -> int:
        total = 0
        try:
            for process in (self._root, *self._root.children(recursive=True)):
                total += process.memory_info().rss
        except psutil.Error:  # one ended while we looked
            pass
        return total
