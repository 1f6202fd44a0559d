"""Notify systemd (sd_notify(3)): one datagram per message; does nothing without systemd."""

from __future__ import annotations

import os
import socket

__all__ = ["sd_notify", "watchdog_s"]


def sd_notify(message: str) -> bool:
    """Send e.g. "READY=1" to $NOTIFY_SOCKET; False if there is none or sending fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux' abstract sockets
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(1)  # the socket's queue may be full
            manager.sendto(message.encode(), address)
    except OSError:
        return False
    return True


def watchdog_s() -> float | None:
    """How often systemd wants a WATCHDOG=1, in seconds (WatchdogSec=); None: never."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    meant_for = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not wanted.isdigit() or meant_for != str(os.getpid()):
        return None
    return int(wanted) / 1e6
