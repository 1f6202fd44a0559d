"""The daemon's heartbeat, called by the pipeline many times a second: notifies systemd and handles SIGHUP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import Bundle
from cxrbatch.ops.health import Health
from cxrbatch.ops.logs import log
from cxrbatch.ops.sd_notify import sd_notify, watchdog_s
from cxrbatch.settings import Settings

__all__ = ["Heartbeat"]


class Heartbeat:
    """The pipeline itself calls `heartbeat`: if the pipeline hangs, the calls stop and systemd restarts the daemon."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._asked = False
        self._every_s = watchdog_s()
        self._next = 0.0
        self._main = threading.get_ident()

    def begin(self, reload: Callable[[], None], read_settings: Callable[[], tuple[Settings, Bundle]]) -> None:
        """A daemon begins: `reload` stops it once `read_settings` has returned the settings of the next one."""
        self.renewed: tuple[Settings, Bundle] | None = None
        self._reload, self._read_settings = reload, read_settings

    def ask_for_settings(self) -> None:
        """SIGHUP: read the settings at the next heartbeat."""
        self._asked = True

    def heartbeat(self) -> None:
        if self._asked and self.renewed is None and threading.get_ident() == self._main:
            self._asked = False
            self._renew()
        self._health.heartbeat()
        now = time.monotonic()
        if self._every_s is not None and now >= self._next and self._health.alive:
            self._next = now + self._every_s / 3
            sd_notify("WATCHDOG=1")

    def _renew(self) -> None:
        """Read the settings; if they are valid, stop the daemon, so that it starts again with them."""
        sd_notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            self.renewed = self._read_settings()
        except Fatal as fatal:
            log.error("settings_refused", why=str(fatal))
            sd_notify("READY=1")
            return
        self._reload()
