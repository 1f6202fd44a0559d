"""The C-STORE receiver: what it acknowledges is on the disk, under a name of our own making.

One file an instance: `ab/abcdef….dcm`, from the SHA-256 of its SOP Instance UID (a UID in a file name is a path
traversal). Written beside its name, flushed, renamed, and only then answered with 0x0000. Nothing of the data set is
parsed here: that is the killable workers' job. Nothing that a peer says is logged, but numbers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom.config
from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom import _config as pynetdicom_config
from pynetdicom.events import Event
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at import
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
    Verification,
)
from pynetdicom.transport import AssociationSocket

from cxrbatch.crash import crash_point
from cxrbatch.errors import Fatal

__all__ = ["ACCEPTED_SYNTAXES", "STORAGE_CLASSES", "Listen", "Receiving", "Tls", "file_name", "receive"]

STORAGE_CLASSES: tuple[UID, ...] = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
)

#: What decode.py reads, the likeliest first: an acceptor takes the first one that the sender offers too.
ACCEPTED_SYNTAXES: tuple[str, ...] = (
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
)

_SUCCESS, _OUT_OF_RESOURCES, _CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
_LARGEST_NEGOTIATION = 1 << 20  # bytes of one A-ASSOCIATE-RQ; real ones have a few thousand


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. With `client_ca`, clients need a certificate that it signed."""

    certificate: str
    key: str
    client_ca: str = ""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen, and the limits. Port 0 takes any that is free."""

    host: str
    port: int
    ae_title: str = ""  # empty: answer to any called title
    calling_ae_titles: tuple[str, ...] = ()  # empty: let everybody in
    max_associations: int = 32
    max_pdu_bytes: int = 128 * 1024
    max_object_bytes: int = 512 * 2**20
    min_free_bytes: int = 2**30
    idle_s: float = 30.0
    tls: Tls | None = None


class Receiving:
    """A running receiver. `tell` hears events: a name, and numbers."""

    def __init__(self, folder: Path, listen: Listen, tell: Callable[..., None]) -> None:
        self.folder, self.listen = folder, listen
        self.host, self.port = listen.host, listen.port
        self._tell = tell
        self._names = _OneAtATime()

    def store(self, event: Event) -> int:
        """EVT_C_STORE: the status to answer with. Never raises: an exception would be logged with its words."""
        try:
            return self._store(event)
        except OSError as error:
            self._tell("store_failed", error=type(error).__name__)
            return _OUT_OF_RESOURCES  # the sender keeps its film and tries again
        except Exception as error:
            self._tell("store_failed", error=type(error).__name__)
            return _CANNOT_UNDERSTAND

    def _store(self, event: Event) -> int:
        crash_point("receiver.received")
        uid = str(getattr(event.request, "AffectedSOPInstanceUID", None) or "")
        if not uid:
            return _CANNOT_UNDERSTAND
        if shutil.disk_usage(self.folder).free < self.listen.min_free_bytes:
            self._tell("disk_nearly_full", free_mib=shutil.disk_usage(self.folder).free >> 20)
            return _OUT_OF_RESOURCES
        final = self.folder / file_name(uid)
        with self._names.only(final.name):
            if not final.exists():
                final.parent.mkdir(exist_ok=True)
                self._write(event.encoded_dataset(), final)
            # Of one that is there already, too: the life that renamed it may have ended before it came here.
            for folder in (final.parent, self.folder):  # the name, and that of its folder
                _sync_folder(folder)
        crash_point("receiver.stored")
        return _SUCCESS

    def _write(self, data: bytes, final: Path) -> None:
        temporary = final.parent / f".{secrets.token_hex(8)}.part"  # a name that no walk looks at
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                crash_point("receiver.written")
                file.flush()
                os.fsync(file.fileno())
            crash_point("receiver.synced")
            temporary.rename(final)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        crash_point("receiver.renamed")

    def limit_object(self, event: Event) -> None:
        """EVT_PDU_RECV: ends an association whose message grows beyond max_object_bytes."""
        size = getattr(event.assoc, "_cxrbatch_bytes", 0) + _data_bytes(event.pdu)
        if size > self.listen.max_object_bytes:
            self._tell("object_too_large")
            event.assoc.abort()
        event.assoc._cxrbatch_bytes = size  # type: ignore[attr-defined]

    def message_ended(self, event: Event) -> None:
        """EVT_DIMSE_RECV: a whole message is there, and the next one is counted from nothing."""
        event.assoc._cxrbatch_bytes = 0  # type: ignore[attr-defined]


def file_name(sop_instance_uid: str) -> str:
    """`ab/abcdef….dcm`: where an instance goes below the folder."""
    digest = hashlib.sha256(sop_instance_uid.strip(" \0").encode("utf-8", "replace")).hexdigest()
    return f"{digest[:2]}/{digest[:40]}.dcm"


@contextmanager
def receive(
    folder: Path, listen: Listen, tell: Callable[..., None] = lambda event, **values: None
) -> Iterator[Receiving]:
    """Listen until the block ends. Temporary files of an earlier life are removed first.

    Raises Fatal where the folder cannot be written, the port is taken or a TLS file is unusable.
    """
    _quieten_libraries()
    _sweep(folder)
    receiving = Receiving(folder, listen, tell)
    entity = AE(ae_title=listen.ae_title or "CXRBATCH")
    entity.add_supported_context(Verification)
    for storage_class in STORAGE_CLASSES:
        entity.add_supported_context(storage_class, list(ACCEPTED_SYNTAXES))
    entity.maximum_associations = listen.max_associations
    entity.maximum_pdu_size = listen.max_pdu_bytes
    entity.network_timeout = entity.acse_timeout = entity.dimse_timeout = listen.idle_s
    entity.require_called_aet = bool(listen.ae_title)
    entity.require_calling_aet = list(listen.calling_ae_titles)
    handlers: list[Any] = [
        (evt.EVT_C_STORE, receiving.store),
        (evt.EVT_C_ECHO, lambda event: _SUCCESS),
        (evt.EVT_PDU_RECV, receiving.limit_object),
        (evt.EVT_DIMSE_RECV, receiving.message_ended),
        (evt.EVT_CONN_OPEN, lambda event: _limit_pdu(event, listen)),
        (evt.EVT_REJECTED, lambda event: tell("association_refused")),
    ]
    context = _tls_context(listen.tls) if listen.tls else None
    try:
        server = entity.start_server(
            (listen.host, listen.port), block=False, evt_handlers=handlers, ssl_context=context
        )
    except OSError as error:
        raise Fatal(f"The receiver cannot listen on {listen.host}:{listen.port}: {error.strerror}.") from None
    assert server is not None  # block=False
    receiving.port = server.server_address[1]
    try:
        yield receiving
    finally:
        server.shutdown()


def _limit_pdu(event: Event, listen: Listen) -> None:
    """Let the connection read no PDU longer than was agreed: its length field may claim 4 GB."""
    connection = event.assoc.dul.socket
    assert isinstance(connection, AssociationSocket)
    most = max(listen.max_pdu_bytes, _LARGEST_NEGOTIATION)
    unlimited = connection.recv

    def recv(nr_bytes: int) -> bytearray:
        if nr_bytes > most:
            raise OSError("a PDU longer than agreed")
        return unlimited(nr_bytes)

    connection.recv = recv  # type: ignore[method-assign]
    if connection.socket is not None:
        connection.socket.settimeout(listen.idle_s)  # half a PDU, and then silence


def _data_bytes(pdu: Any) -> int:
    items = getattr(pdu, "presentation_data_value_items", None)
    return sum(len(item.presentation_data_value or b"") for item in items) if items else 0


class _OneAtATime:
    """Two associations that send the same instance at once: the second waits, and finds it there."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: set[str] = set()

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        with self._changed:
            while name in self._busy:
                self._changed.wait()
            self._busy.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._busy.remove(name)
                self._changed.notify_all()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    try:
        for left_over in folder.glob("??/.*.part"):
            left_over.unlink(missing_ok=True)
        probe = folder / f".{secrets.token_hex(8)}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Fatal(
            f"The folder {folder} cannot be written ({error.strerror}); the receiver puts films there."
        ) from None


def _tls_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.certificate, tls.key or None)
        if tls.client_ca:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError):
        raise Fatal("A TLS file cannot be used: check tls_certificate, tls_key and tls_client_ca.") from None
    return context


def _quieten_libraries() -> None:
    pynetdicom_config.LOG_REQUEST_IDENTIFIERS = False
    pynetdicom_config.LOG_RESPONSE_IDENTIFIERS = False
    pynetdicom_config.LOG_HANDLER_LEVEL = "none"  # its handlers print AE titles, UIDs and addresses
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # whose warnings quote values
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
