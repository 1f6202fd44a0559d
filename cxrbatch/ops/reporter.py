"""What a daemon reports of itself beside its work: folders and drift as metrics, and its heartbeat in the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import Bundle
from cxrbatch.intake.watcher import FolderWatcher, Outage
from cxrbatch.ops.drift_comparison import measure_drift
from cxrbatch.ops.health import ROOT_LIMIT_S, Health
from cxrbatch.ops.logs import log
from cxrbatch.ops.metrics import Metrics
from cxrbatch.ops.monitor import StoreFigures, free_bytes
from cxrbatch.pipeline import Counts
from cxrbatch.settings import Settings, without_password
from cxrbatch.store import JobQueue, path_to_text
from cxrbatch.store.backlog import write_heartbeat
from cxrbatch.store.connection import store_file
from cxrbatch.store.drift import Span

__all__ = ["ProgressLog", "Reporter", "show_root", "store_outage"]

_FIRST_DRIFT_S, _DRIFT_S = 300.0, 3600.0
_DRIFT_DAYS = 30
_PROGRESS_S = 60.0


def show_root(index: int, watcher: FolderWatcher, metrics: Metrics, health: Health) -> None:
    """A folder is known by its index: its path may hold names."""
    health.add(f"root{index}", lambda: watcher.last_heartbeat, ROOT_LIMIT_S)
    metrics.walk.labels(str(index)).set_function(lambda: watcher.last_walk_at)
    metrics.paused.labels(str(index)).set_function(lambda: float(watcher.paused))
    metrics.unlisted.labels(str(index)).set_function(lambda: watcher.folder.unlisted)


@dataclass(slots=True)
class Reporter:
    """Reports every 20 s, drift every hour. `processed()` is the number of files so far."""

    settings: Settings
    bundle: Bundle
    watchers: Sequence[FolderWatcher]
    processed: Callable[[], int]
    job_queue: JobQueue
    metrics: Metrics
    health: Health
    _drift_at: float = field(default_factory=lambda: time.monotonic() + _FIRST_DRIFT_S)

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set."""
        tasks = (self._say_alive, self._measure_drift)
        StoreFigures(self.job_queue.store, self.metrics, self.health, self._disks(), tasks).run(stop)

    def _disks(self) -> dict[str, Callable[[], int | None]]:
        """Free space by label. A watcher looks at its own folder: a share that hangs must not silence this thread."""
        disks: dict[str, Callable[[], int | None]] = {}
        disks |= {f"root{index}": partial(_free, watcher) for index, watcher in enumerate(self.watchers)}
        if store := store_file(self.settings.db):
            disks["store"] = partial(free_bytes, str(store.absolute().parent))
        return disks

    def _say_alive(self) -> None:
        """For `cxrbatch status`."""
        roots = [
            {
                "folder": path_to_text(watcher.folder.root),
                "mode": "poll" if watcher.trigger.why_not else "events",
                "paused": watcher.paused,
                "last_walk": watcher.last_walk_at,
                "every_s": watcher.schedule.every_s,
                "unlisted": watcher.folder.unlisted,
            }
            for watcher in self.watchers
        ]
        write_heartbeat(self.job_queue.store, self.job_queue.run.run_id, processed=self.processed(), roots=roots)

    def _measure_drift(self) -> None:
        if time.monotonic() < self._drift_at:
            return
        self._drift_at = time.monotonic() + _DRIFT_S
        now = datetime.now(UTC)
        span = Span(now - timedelta(days=_DRIFT_DAYS), now)
        try:
            found = measure_drift(self.job_queue.store, self.bundle, self.settings.exact, span).findings
        except Fatal:  # neither a reference nor accepted days
            found = []
        self.metrics.show_drift({one.name: (one.score, one.threshold) for one in found})


def _free(watcher: FolderWatcher) -> int | None:
    return None if watcher.paused else watcher.free_bytes


def store_outage() -> Outage:
    """Says in the log when the store goes and when it is back."""
    return Outage(
        lambda why: log.error("store_down", why=without_password(why)),
        lambda: log.warning("store_back"),
    )


class ProgressLog:
    """A line a minute while there is something to tell."""

    def __init__(self) -> None:
        self._next = time.monotonic()

    def __call__(self, counts: Counts) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PROGRESS_S
            log.info("progress", done=counts.scored, rejected=counts.rejected.total())
