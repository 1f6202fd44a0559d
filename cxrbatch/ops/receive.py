"""`cxrbatch receive`, put together; `watch --listen` uses the same receiver."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cxrbatch.dicom.receiver import Listen, Receiving, Tls, receive
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.ops.logs import listen_to_everything, log
from cxrbatch.ops.service_manager import tell_service_manager
from cxrbatch.pipeline import stopping
from cxrbatch.settings import Settings

__all__ = ["listen_of", "receiving", "run_receive"]

_ADDRESS = re.compile(r"^(?:(?P<ae>[^@]{1,16})@)?(?P<host>.*):(?P<port>\d{1,5})$")


def run_receive(settings: Settings, folder: Path, *, verbose: bool = False) -> ExitCode:
    """Receive until SIGTERM or SIGINT. Raises Fatal where the folder or the address cannot be used."""
    if not settings.listen:
        raise Fatal("Say where to listen: --listen [AET@]HOST:PORT, e.g. CXR@0.0.0.0:11112.", ExitCode.USAGE)
    if not folder.is_dir():
        raise Fatal(f"{folder} is not a folder; make it first.")
    listen_to_everything(settings.log_format, logging.DEBUG if verbose else logging.INFO)
    stop = threading.Event()
    with stopping(stop) as caught, receiving(settings, folder) as receiver:
        log.info("receiving", host=receiver.host, port=receiver.port, folder=str(folder))
        tell_service_manager("READY=1")
        stop.wait()
        tell_service_manager("STOPPING=1")
    return ExitCode.INTERRUPTED if caught.get("signal") == signal.SIGINT else ExitCode.OK


@contextmanager
def receiving(settings: Settings, folder: Path) -> Iterator[Receiving]:
    """A receiver into `folder` with the limits of the settings."""
    with receive(folder, listen_of(settings), tell=log.warning) as receiver:
        yield receiver


def listen_of(settings: Settings) -> Listen:
    """The settings that concern the receiver. Raises Fatal (exit 2) for an address that is none."""
    match = _ADDRESS.match(settings.listen)
    if match is None or int(match["port"]) > 65_535:
        raise Fatal(f"'{settings.listen}' is no address to listen on; write [AET@]HOST:PORT.", ExitCode.USAGE)
    tls = None
    if settings.tls_certificate:
        tls = Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    elif settings.tls_key or settings.tls_client_ca:
        raise Fatal("tls_certificate is empty while another tls_ setting is not; set it too.", ExitCode.USAGE)
    return Listen(
        host=match["host"] or "127.0.0.1",
        port=int(match["port"]),
        ae_title=match["ae"] or "",
        calling_ae_titles=tuple(settings.calling_ae_titles),
        max_associations=settings.max_associations,
        max_pdu_bytes=settings.max_pdu_kib * 1024,
        max_object_bytes=settings.max_file_mib * 2**20,
        min_free_bytes=settings.min_free_mib * 2**20,
        idle_s=settings.idle_association_s,
        tls=tls,
    )
