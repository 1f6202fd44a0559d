"""The daemon's pulse: called by the road many times a second, it tells systemd that we live, and hears SIGHUP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cxrbatch.bundles import Bundle
from cxrbatch.errors import Fatal
from cxrbatch.ops.logs import log
from cxrbatch.ops.service_manager import tell_service_manager, watchdog_s
from cxrbatch.settings import Settings

__all__ = ["Pulse"]


class Pulse:
    """`beat` comes from the road itself: a road that hangs stops it, and systemd starts us anew."""

    def __init__(self, stop: threading.Event, read_settings: Callable[[], tuple[Settings, Bundle]]) -> None:
        self.renewed: tuple[Settings, Bundle] | None = None
        self._stop, self._read_settings = stop, read_settings
        self._asked = False
        self._every_s = watchdog_s()
        self._next = 0.0
        self._main = threading.get_ident()

    def ask_for_settings(self) -> None:
        """SIGHUP: at the next beat."""
        self._asked = True

    def beat(self) -> None:
        if self._asked and threading.get_ident() == self._main:
            self._asked = False
            self._renew()
        now = time.monotonic()
        if self._every_s is not None and now >= self._next:
            self._next = now + self._every_s / 3
            tell_service_manager("WATCHDOG=1")

    def _renew(self) -> None:
        """Valid settings end this life of the daemon, and the next one begins with them."""
        tell_service_manager(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            self.renewed = self._read_settings()
        except Fatal as fatal:
            log.error("settings_refused", why=str(fatal))
            tell_service_manager("READY=1")
            return
        self._stop.set()
