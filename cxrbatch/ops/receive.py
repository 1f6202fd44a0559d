"""`cxrbatch receive`; `watch --listen` uses the same receiver."""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.intake.receiver import Listen, Receiving, Tls, receive
from cxrbatch.ops.health import Health
from cxrbatch.ops.logs import listen_to_everything, log
from cxrbatch.ops.metrics import ReceiverMetrics
from cxrbatch.ops.monitor import free_bytes, serve_monitor
from cxrbatch.ops.sd_notify import sd_notify, watchdog_s
from cxrbatch.ops.setup import stopping
from cxrbatch.settings import Settings

__all__ = ["listen_of", "receiving", "run_receive"]

_EVERY_S = 10.0  # between two looks at the disk
_ADDRESS = re.compile(r"^(?:(?P<ae>[^@]{1,16})@)?(?P<host>.*):(?P<port>\d{1,5})$")


def run_receive(settings: Settings, folder: Path, *, verbose: bool = False) -> ExitCode:
    """Receive until SIGTERM or SIGINT. Raises Fatal if the folder or the address cannot be used."""
    if not settings.listen:
        raise Fatal("Say where to listen: --listen [AET@]HOST:PORT, e.g. CXR@0.0.0.0:11112.", ExitCode.USAGE)
    if not folder.is_dir():
        raise Fatal(f"{folder} is not a folder; make it first.")
    listen_to_everything(settings.log_format, logging.DEBUG if verbose else logging.INFO)
    stop, metrics, health = threading.Event(), ReceiverMetrics(), Health()
    health.begin("disk")
    with ExitStack() as stack:
        caught = stack.enter_context(stopping(stop))
        if settings.metrics:
            stack.enter_context(serve_monitor(settings.metrics, metrics, health))
        receiver = stack.enter_context(receiving(settings, folder, metrics, health.heartbeat))
        health.runs("receiver")
        log.info("receiving", host=receiver.host, port=receiver.port, folder=str(folder))
        sd_notify("READY=1")
        _look_after(folder, settings.min_free_mib * 2**20, metrics, health, stop)
        sd_notify("STOPPING=1")
    return ExitCode.INTERRUPTED if caught.get("signal") == signal.SIGINT else ExitCode.OK


def _look_after(
    folder: Path, min_free_bytes: int, metrics: ReceiverMetrics, health: Health, stop: threading.Event
) -> None:
    """Until `stop` is set: look at the disk, and tell systemd's watchdog while connections are accepted."""
    every_s = min(_EVERY_S, (watchdog_s() or math.inf) / 3)
    while not stop.is_set():
        free = free_bytes(str(folder))
        metrics.show_disk("root0", free)
        health.ready["disk"] = free is not None and free >= min_free_bytes
        if health.alive:
            sd_notify("WATCHDOG=1")
        stop.wait(every_s)


@contextmanager
def receiving(
    settings: Settings, folder: Path, metrics: ReceiverMetrics, heartbeat: Callable[[], None]
) -> Iterator[Receiving]:
    """A receiver into `folder` with the limits of the settings; `heartbeat` is called while it accepts connections."""

    def tell(event: str, **values: object) -> None:
        metrics.receiver_events.labels(event).inc()
        log.warning(event, **values)

    with receive(folder, listen_of(settings), tell, metrics.answered, heartbeat) as receiver:
        yield receiver


def listen_of(settings: Settings) -> Listen:
    """The receiver's settings. Raises Fatal (exit 2) for an invalid address."""
    match = _ADDRESS.match(settings.listen)
    if match is None or int(match["port"]) > 65_535:
        raise Fatal(f"'{settings.listen}' is no address to listen on; write [AET@]HOST:PORT.", ExitCode.USAGE)
    tls = None
    if settings.tls_certificate:
        tls = Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    elif settings.tls_key or settings.tls_client_ca:
        raise Fatal("tls_certificate is empty while another tls_ setting is not; set it too.", ExitCode.USAGE)
    return Listen(
        host=match["host"].removeprefix("[").removesuffix("]") or "127.0.0.1",
        port=int(match["port"]),
        ae_title=match["ae"] or "",
        calling_ae_titles=tuple(settings.calling_ae_titles),
        duplicate_instances=settings.duplicate_instances,
        max_associations=settings.max_associations,
        max_pdu_bytes=settings.max_pdu_kib * 1024,
        max_object_bytes=settings.max_file_mib * 2**20,
        min_free_bytes=settings.min_free_mib * 2**20,
        max_associations_per_peer=settings.max_associations_per_peer,
        idle_s=settings.idle_association_s,
        pdu_s=settings.pdu_timeout_s,
        drain_s=settings.drain_s,
        tls=tls,
    )
