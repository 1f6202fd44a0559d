"""Sending beside the pipeline of `watch`: a thread for each destination, so that a slow one holds up nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta

from cxrbatch.dicom_out.send import open_destination
from cxrbatch.ops.logs import log
from cxrbatch.ops.send import explain_of
from cxrbatch.ops.sender import Round, Sender, destination_of, sender_of
from cxrbatch.settings import Settings
from cxrbatch.store import RetryPolicy, Store, StoreDown

__all__ = ["Dispatch", "pause_after"]

_LOOK_S = 2.0  # between two looks for what is new; longer where a look takes long: it reads every scored row
_LONGEST_LOOK_S = 60.0
#: What was recorded may have been given its time a while before its transaction ended.
_OVERLAP = timedelta(minutes=10)


def pause_after(look_s: float) -> float:
    """Seconds to wait after a look that took `look_s`, so that looking takes a twentieth of a core at most."""
    return min(max(_LOOK_S, 20 * look_s), _LONGEST_LOOK_S)


class Dispatch:
    """The threads of all destinations. Raises Fatal where an address or a TLS file cannot be used."""

    def __init__(
        self, settings: Settings, store: Store, stop: threading.Event, fail: Callable[[BaseException], None]
    ) -> None:
        explain = explain_of(settings)
        retry = RetryPolicy(forever=True, stop=stop)
        senders = [sender_of(settings, store, to, explain, retry, stop) for to in settings.send_to]
        for sender in senders:
            open_destination(destination_of(sender.to)).close()
        self._stop, self._fail = stop, fail
        self._last_pass = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(sender,), name=f"send to {sender.to.name}", daemon=True)
            for sender in senders
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def drain(self) -> None:
        """Send what is due by now, then end: for `watch --once`, when everything has its outcome."""
        self._last_pass.set()
        for thread in self._threads:
            while thread.is_alive() and not self._stop.is_set():
                thread.join(0.2)

    def join(self, timeout_s: float) -> None:
        """After `stop`: give what is in hand a moment to be written down."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _guarded(self, sender: Sender) -> None:
        try:
            with suppress(StoreDown):  # only when stopped meanwhile
                self._run(sender)
        except BaseException as error:
            self._fail(error)
        finally:
            with suppress(Exception):
                sender.close()

    def _run(self, sender: Sender) -> None:
        since: datetime | None = None  # the first look sees everything
        failures = 0
        while not self._stop.is_set():
            last = self._last_pass.is_set()
            looked = sender.retry(sender.outbox.now)
            began = time.monotonic()
            sender.fill(changed_since=since)
            to_next_look = pause_after(time.monotonic() - began)
            since = looked - _OVERLAP
            done = self._send_due(sender)
            failures = self._outage(sender, done, failures)
            sender.close()
            if last:
                return
            backoff = sender.outbox.backoff.before(failures).total_seconds() if failures else to_next_look
            self._pause(backoff)

    def _send_due(self, sender: Sender) -> Round:
        total = Round()
        while not self._stop.is_set():
            done = sender.round()
            for name in ("tried", "sent", "refused", "waiting", "warned"):
                setattr(total, name, getattr(total, name) + getattr(done, name))
            if done.unreachable or not done.tried:
                total.unreachable = done.unreachable
                break
        if total.sent or total.refused:
            log.info("results_sent", destination=sender.to.name, sent=total.sent, refused=total.refused)
        if total.warned:  # which, and with which status: `cxrbatch outbox list`
            log.warning("stored_with_warning", destination=sender.to.name, sent=total.warned)
        return total

    def _outage(self, sender: Sender, done: Round, failures: int) -> int:
        if done.unreachable:
            if not failures:
                log.warning("destination_unreachable", destination=sender.to.name)
            return 1 if done.sent else failures + 1
        if failures and done.sent:
            log.warning("destination_back", destination=sender.to.name)
        return failures if failures and not done.tried else 0

    def _pause(self, seconds: float) -> None:
        waited = 0.0
        while waited < seconds and not self._stop.is_set() and not self._last_pass.is_set():
            step = min(0.5, seconds - waited)
            self._stop.wait(step)
            waited += step
