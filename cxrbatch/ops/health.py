"""Is the daemon alive, and can it work? Asked by systemd's watchdog, /healthz, /readyz.

Alive means that each part gave a sign of life lately. It never asks the store: a store that is down is no reason to
restart the daemon.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["BEAT_LIMIT_S", "ROOT_LIMIT_S", "Health"]

BEAT_LIMIT_S = 120.0  # the pipeline beats ten times a second; a slow batch on a CPU takes seconds
#: A walk over millions of known files on a slow share gives no sign of life in between.
ROOT_LIMIT_S = 600.0


@dataclass(slots=True)
class Health:
    """Parts by name, each with the monotonic time of its last sign of life. Names hold no path."""

    clock: Callable[[], float] = time.monotonic
    ready: dict[str, bool] = field(default_factory=dict)  # what must be true before it can work
    _parts: dict[str, tuple[Callable[[], float], float]] = field(default_factory=dict)
    _last_beat: float = 0.0
    last_beat_at: float = 0.0  # Unix seconds

    def __post_init__(self) -> None:
        self.heartbeat()

    def heartbeat(self) -> None:
        """The part that `runs` named is alive."""
        self._last_beat, self.last_beat_at = self.clock(), time.time()

    def runs(self, name: str) -> None:
        """From now on this part has to beat: the pipeline, or the receiver where there is no pipeline."""
        self.heartbeat()
        self.add(name, lambda: self._last_beat, BEAT_LIMIT_S)

    def add(self, name: str, last_heartbeat: Callable[[], float], limit_s: float) -> None:
        """Another part: `last_heartbeat()` says when it was last seen alive (monotonic seconds)."""
        self._parts[name] = (last_heartbeat, limit_s)

    def begin(self, *needed: str) -> None:
        """A daemon begins, maybe anew with other settings: what it needs is not there yet."""
        self._parts.clear()
        self.ready = dict.fromkeys(needed, False)
        self.heartbeat()

    def ages_s(self) -> dict[str, float]:
        """Seconds since each part was last seen alive."""
        now = max(self.clock(), self._last_beat)
        return {name: max(0.0, now - last_heartbeat()) for name, (last_heartbeat, _) in list(self._parts.items())}

    def stale(self) -> list[str]:
        """The parts that have been silent for too long."""
        limits = {name: limit_s for name, (_, limit_s) in list(self._parts.items())}
        return [name for name, age_s in self.ages_s().items() if age_s > limits.get(name, math.inf)]

    @property
    def alive(self) -> bool:
        return not self.stale()

    @property
    def is_ready(self) -> bool:
        return self.alive and bool(self.ready) and all(self.ready.values())
