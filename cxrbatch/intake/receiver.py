"""The C-STORE receiver: what it acknowledges is on disk, under a file name that we choose.

There is one file per data set (instance_names.py). It is written under a temporary name, flushed and renamed; only then
the status 0x0000 is sent. A data set that is already there is acknowledged and not written again. Another one with the
same SOP Instance UID is kept under a second name. Data sets are not parsed here: the killable decode workers do that.
Of what a peer sends, only numbers are logged.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

from cxrbatch.errors import Fatal
from cxrbatch.failpoints import failpoint
from cxrbatch.instance_names import duplicate_file_name, file_name
from cxrbatch.intake.associations import ConnectionLimits, serve
from cxrbatch.intake.instance_files import NameLocks, ReceivedInstance, is_empty_file, sync_folder, write_new
from cxrbatch.mounts import MountedFolder
from cxrbatch.own_objects import is_own_uid

__all__ = ["ACCEPTED_SYNTAXES", "STORAGE_CLASSES", "Listen", "Receiving", "Tls", "file_name", "receive"]

STORAGE_CLASSES: tuple[UID, ...] = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
)

#: The transfer syntaxes that decode.py reads, most likely first: the first one that the sender also offers is used.
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

_NOT_AUTHORIZED = 0x0124  # PS3.7 9.1.1.1.9: final, the sender does not try again
_SUCCESS, _OUT_OF_RESOURCES, _CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
_DUPLICATE_INSTANCE = 0x0111  # DICOM PS3.7, annex C


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. With `client_ca`, clients need a certificate that it signed."""

    certificate: str
    key: str
    client_ca: str = ""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen, and the limits. Port 0 takes any free port."""

    host: str
    port: int
    ae_title: str = ""  # empty: answer to any called title
    calling_ae_titles: tuple[str, ...] = ()  # empty: accept any
    max_associations: int = 32
    max_pdu_bytes: int = 128 * 1024
    max_object_bytes: int = 512 * 2**20
    min_free_bytes: int = 2**30
    max_associations_per_peer: int = 0  # of one IP address; 0: only max_associations counts
    idle_s: float = 30.0  # between two PDUs
    pdu_s: float = 10.0  # for a PDU that has begun, and for the first one
    drain_s: float = 8.0  # for messages in progress when it ends
    duplicate_instances: Literal["keep", "refuse"] = "keep"  # same SOP Instance UID, other bytes
    tls: Tls | None = None


class Receiving:
    """A running receiver. `tell` is called with each event: a name and numbers."""

    def __init__(self, folder: Path, listen: Listen, tell: Callable[..., None]) -> None:
        self.folder, self.listen = folder, listen
        self.host, self.port = listen.host, listen.port
        self._tell = tell
        self._names = NameLocks()
        self._mounted = MountedFolder(folder)

    def store(self, event: Event) -> int:
        """EVT_C_STORE: the status to answer with. Never raises: pynetdicom would log the exception's text."""
        try:
            return self._store(event)
        except (OSError, MemoryError) as error:
            self._tell("store_failed", error=type(error).__name__)
            return _OUT_OF_RESOURCES  # the sender keeps its image and tries again
        except Exception as error:
            self._tell("store_failed", error=type(error).__name__)
            return _CANNOT_UNDERSTAND

    def _store(self, event: Event) -> int:
        failpoint("receiver.received")
        uid = str(getattr(event.request, "AffectedSOPInstanceUID", None) or "")
        if not uid:
            return _CANNOT_UNDERSTAND
        if is_own_uid(uid):  # structured reports never come so far: no context for them is accepted
            self._tell("own_object_refused")
            return _NOT_AUTHORIZED
        free = shutil.disk_usage(self.folder).free  # before the next look: it mounts what autofs has let go
        if self._mounted.is_gone():  # what is written now would be hidden when the share is back
            self._tell("share_unmounted")
            return _OUT_OF_RESOURCES
        if free < self.listen.min_free_bytes:
            self._tell("disk_nearly_full", free_mib=free >> 20)
            return _OUT_OF_RESOURCES
        received = ReceivedInstance.of(event)
        first = self.folder / file_name(uid)
        second = self.folder / duplicate_file_name(file_name(uid), received.sha256)
        with self._names.only(first.name):
            if not (received.is_in(first) or received.is_in(second)):
                status = self._keep(received, first, second)
                if status != _SUCCESS:
                    return status
            # Also for an existing file: the process that renamed it may have ended before this flush.
            for folder in (first.parent, self.folder):  # the entry of the file, and that of its folder
                sync_folder(folder)
        failpoint("receiver.stored")
        return _SUCCESS

    def _keep(self, received: ReceivedInstance, first: Path, second: Path) -> int:
        """Write under the first name if it is free, else under the second. Raises OSError if both are taken."""
        first.parent.mkdir(exist_ok=True)
        if not os.path.lexists(first) or is_empty_file(first):
            with suppress(FileExistsError):  # another receiver was faster
                write_new(received.file_content, first)
                return _SUCCESS
        is_duplicate = first.is_file() and not first.is_symlink()
        if is_duplicate and self.listen.duplicate_instances == "refuse":
            self._tell("duplicate_instance", state="refused")
            return _DUPLICATE_INSTANCE
        write_new(received.file_content, second)
        self._tell("duplicate_instance" if is_duplicate else "name_taken", state="kept")
        return _SUCCESS

    def limit_object(self, event: Event) -> None:
        """EVT_PDU_RECV: end an association whose message exceeds max_object_bytes."""
        size = getattr(event.assoc, "_cxrbatch_bytes", 0) + _data_bytes(event.pdu)
        if size > self.listen.max_object_bytes:
            self._tell("object_too_large")
            event.assoc.abort()
        event.assoc._cxrbatch_bytes = size  # type: ignore[attr-defined]
        event.assoc._cxrbatch_busy = size > 0  # type: ignore[attr-defined]

    def message_ended(self, event: Event) -> None:
        """EVT_DIMSE_RECV: a message is complete; reset the byte count for the next one."""
        event.assoc._cxrbatch_bytes = 0  # type: ignore[attr-defined]

    def answered(self, event: Event) -> None:
        """EVT_DIMSE_SENT: no message is in progress on this association (associations.py)."""
        event.assoc._cxrbatch_busy = False  # type: ignore[attr-defined]


@contextmanager
def receive(
    folder: Path,
    listen: Listen,
    tell: Callable[..., None] = lambda event, **values: None,
    answered: Callable[[int], int] = lambda status: status,
    heartbeat: Callable[[], None] = lambda: None,
) -> Iterator[Receiving]:
    """Listen until the block ends. Temporary files of an earlier process are removed first.

    `answered` hears the status of each C-STORE request; `heartbeat` is called while it accepts connections. Raises
    Fatal where the folder cannot be written, the port is taken or a TLS file is unusable.
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
    entity.network_timeout = entity.dimse_timeout = listen.idle_s
    pdu_s = entity.acse_timeout = min(listen.pdu_s, listen.idle_s)
    entity.require_called_aet = bool(listen.ae_title)
    entity.require_calling_aet = list(listen.calling_ae_titles)
    handlers: list[Any] = [
        (evt.EVT_C_STORE, lambda event: answered(receiving.store(event))),
        (evt.EVT_C_ECHO, lambda event: _SUCCESS),
        (evt.EVT_PDU_RECV, receiving.limit_object),
        (evt.EVT_DIMSE_RECV, receiving.message_ended),
        (evt.EVT_DIMSE_SENT, receiving.answered),
        (evt.EVT_REJECTED, lambda event: tell("association_refused")),
    ]
    limits = ConnectionLimits(
        listen.max_associations,
        listen.max_associations_per_peer,
        listen.max_pdu_bytes,
        listen.idle_s,
        pdu_s,
        listen.drain_s,
    )
    context = _tls_context(listen.tls) if listen.tls else None
    with ExitStack() as stack:
        try:
            receiving.port = stack.enter_context(
                serve(
                    entity,
                    (listen.host, listen.port),
                    limits,
                    handlers,
                    tls=context,
                    refused=lambda: tell("association_refused"),
                    heartbeat=heartbeat,
                )
            )
        except OSError as error:
            raise Fatal(
                f"The receiver cannot listen on {listen.host}:{listen.port} ({error.strerror}): name another HOST:PORT."
            ) from None
        yield receiving


def _data_bytes(pdu: Any) -> int:
    items = getattr(pdu, "presentation_data_value_items", None)
    return sum(len(item.presentation_data_value or b"") for item in items) if items else 0


def _sweep(folder: Path) -> None:
    try:
        for left_over in folder.glob("??/.*.part"):
            left_over.unlink(missing_ok=True)
        probe = folder / f".{secrets.token_hex(8)}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Fatal(
            f"The folder {folder} cannot be written ({error.strerror}); the receiver puts images there."
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
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # its warnings quote values
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
