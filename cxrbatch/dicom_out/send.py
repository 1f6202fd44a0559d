"""Objects to a PACS: C-STORE (pynetdicom) or STOW-RS (dicomweb-client). What counts is the answer, object by object.

Nothing that a destination says goes any further than its status number: its words may quote a header.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at import
    Comprehensive3DSRStorage,
    SecondaryCaptureImageStorage,
)

from cxrbatch.dicom_out.objects import MadeObject
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.settings import AE_TITLE, AE_TITLE_RULE

__all__ = ["Destination", "Sending", "Status", "open_destination", "parse_destination"]

_STORED: tuple[UID, ...] = (SecondaryCaptureImageStorage, Comprehensive3DSRStorage)
_SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
_HTTP_MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Destination:
    """Where to send to. DICOM: `ae_title`, `host`, `port`; DICOMweb: `base_url`."""

    base_url: str = ""
    ae_title: str = ""
    host: str = ""
    port: int = 0
    calling: str = "CXRBATCH"
    tls: bool = False
    tls_ca: str = ""  # PEM file: who may have signed the destination's certificate; empty: the system's
    tls_certificate: str = ""  # PEM files: ours, where the destination asks for one
    tls_key: str = ""
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Status:
    """The answer to one object."""

    code: str  # "0x0000", "0xB000", "http 200", "no_connection", ...
    stored: bool
    may_pass: bool = False  # not stored, and another try may help
    warned: bool = False  # stored, but coerced, cut or not understood: their log says what


class Sending(Protocol):
    """An open way to a destination."""

    def send(self, made: MadeObject) -> Status: ...

    def close(self) -> None: ...


def parse_destination(url: str, tls_ca: str = "", tls_certificate: str = "", tls_key: str = "") -> Destination:
    """dicom://AET@HOST:PORT[?calling=AET], dicoms:// with TLS, or the address of a DICOMweb service (https, http).

    Raises Fatal (exit 2). Passwords belong into ~/.netrc.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as the look-up of the name does: "10.0.0..5" is a UnicodeError there
    except ValueError:
        raise _no_destination(url) from None
    if parts.password is not None:
        raise Fatal("Keep the password of a destination in ~/.netrc, not in its address.", ExitCode.USAGE)
    if parts.scheme in ("http", "https") and parts.hostname:
        base_url = url.rstrip("/").removesuffix("/studies")
        return Destination(base_url=base_url, tls_ca=tls_ca, tls_certificate=tls_certificate, tls_key=tls_key)
    if parts.scheme not in ("dicom", "dicoms") or not parts.hostname or port is None or not parts.username:
        raise _no_destination(url)
    calling = parse_qs(parts.query).get("calling", ["CXRBATCH"])[0]
    if not all(AE_TITLE.fullmatch(title) for title in (parts.username, calling)):
        raise Fatal(f"{AE_TITLE_RULE}.", ExitCode.USAGE)
    return Destination(
        ae_title=parts.username,
        host=parts.hostname,
        port=port,
        calling=calling,
        tls=parts.scheme == "dicoms",
        tls_ca=tls_ca,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
    )


def _no_destination(url: str) -> Fatal:
    shown = url.partition("://")[0][:20]
    return Fatal(
        f"'{shown}…' is no destination; write dicom://AET@HOST:PORT, dicoms://AET@HOST:PORT or https://HOST/dicom-web.",
        ExitCode.USAGE,
    )


def open_destination(destination: Destination) -> Sending:
    """Raises Fatal where a TLS file cannot be used; that nobody answers is told by the first `send`."""
    return _Stow(destination) if destination.base_url else _Store(destination)


class _Store:
    """C-STORE over one association, opened at the first object and again after it was lost."""

    def __init__(self, destination: Destination) -> None:
        self._to = destination
        self._context = _ssl_context(destination) if destination.tls else None
        self._association: Any = None

    def send(self, made: MadeObject) -> Status:
        association = self._open()
        if isinstance(association, Status):
            return association
        try:
            answer = association.send_c_store(made.dataset)
        except ValueError:  # no context for this class, or none with a syntax that the object has
            return Status("context_refused", stored=False)
        except RuntimeError:  # the association was lost between two objects
            self._drop()
            return Status("association_lost", stored=False, may_pass=True)
        if "Status" not in answer:
            self._drop()
            return Status("no_answer", stored=False, may_pass=True)
        code = int(answer.Status)
        shown = f"0x{code:04X}"
        # PS3.4 B.2.3: success, the warnings of the storage service; A7xx: out of resources; the rest is a refusal.
        stored = code == 0 or code & 0xF000 == 0xB000 or code in (0x0001, 0x0107, 0x0116)
        return Status(shown, stored=stored, may_pass=code & 0xFF00 == 0xA700, warned=stored and code != 0)

    def _open(self) -> Any:
        if self._association is not None and self._association.is_established:
            return self._association
        entity = AE(ae_title=self._to.calling)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = self._to.timeout_s
        entity.connection_timeout = self._to.timeout_s
        for storage_class in _STORED:
            entity.add_requested_context(storage_class, _SYNTAXES)
        tls = (self._context, self._to.host) if self._context is not None else None
        association = entity.associate(self._to.host, self._to.port, ae_title=self._to.ae_title, tls_args=tls)
        if association.is_established:
            # pynetdicom's timeouts are for answers: to a peer that stops reading it would wait for ever.
            connected: Any = association.dul.socket
            with suppress(OSError, AttributeError):  # closed already: the first object finds that out
                connected.socket.settimeout(self._to.timeout_s)
            self._association = association
            return association
        if association.is_rejected:
            return Status("association_rejected", stored=False, may_pass=True)
        if association.acceptor.primitive is not None and not association.accepted_contexts:
            return Status("context_refused", stored=False)
        return Status("no_connection", stored=False, may_pass=True)

    def _drop(self) -> None:
        association, self._association = self._association, None
        if association is not None:
            with suppress(Exception):
                association.abort()

    def close(self) -> None:
        association, self._association = self._association, None
        if association is not None and association.is_established:
            association.release()


class _Stow:
    """STOW-RS (PS3.18 10.5), one object a request."""

    def __init__(self, destination: Destination) -> None:
        import requests
        from dicomweb_client.web import DICOMwebClient

        self._requests = requests
        session = requests.Session()  # reads ~/.netrc
        _look_at_tls_files(destination)
        if destination.tls_ca:
            session.verify = destination.tls_ca
        if destination.tls_certificate:
            session.cert = (destination.tls_certificate, destination.tls_key or destination.tls_certificate)
        session.hooks["response"].append(self._note)
        self._session, self._http, self._page = session, 0, False
        self._client = DICOMwebClient(destination.base_url, session=session)
        self._client.set_http_retry_params(retry=False)  # the outbox knows when
        self._client._timeout = destination.timeout_s

    def _note(self, response: Any, *_args: Any, **_more: Any) -> None:
        # A redirect to a login page makes a GET of the POST: whatever that is answered, nothing was stored.
        if response.request.method == "POST":
            self._http = response.status_code
            self._page = response.headers.get("Content-Type", "").lower().startswith("text/html")

    def send(self, made: MadeObject) -> Status:
        self._http = 0
        try:
            answer = self._client.store_instances([made.dataset])
        except self._requests.HTTPError:
            return Status(f"http {self._http}", stored=False, may_pass=self._http in _HTTP_MAY_PASS)
        except self._requests.exceptions.SSLError:
            return Status("tls_failed", stored=False, may_pass=True)
        except self._requests.exceptions.JSONDecodeError:
            return Status("answer_unreadable", stored=False, may_pass=True)
        except (self._requests.RequestException, OSError):
            return Status("no_connection", stored=False, may_pass=True)
        except (ValueError, KeyError, TypeError, SyntaxError):  # an answer that is no STOW-RS answer
            return Status("answer_unreadable", stored=False, may_pass=True)
        for item in answer.get("FailedSOPSequence") or []:
            code = int(item.get("FailureReason") or 0)
            return Status(f"0x{code:04X}", stored=False, may_pass=code & 0xFF00 == 0xA700)
        for item in answer.get("ReferencedSOPSequence") or []:
            if str(item.get("ReferencedSOPInstanceUID")) == made.sop_instance_uid:
                warning = int(item.get("WarningReason") or 0)  # PS3.18 10.5.3
                return Status(f"0x{warning:04X}" if warning else f"http {self._http}", stored=True, warned=warning > 0)
        if self._http == 200 and self._page:  # of a proxy in between: no PACS answers so
            return Status("answer_unreadable", stored=False, may_pass=True)
        # 200 says that all was stored, and this client reads only some kinds of bodies; 202 leaves it open.
        return Status(f"http {self._http}", stored=self._http == 200)

    def close(self) -> None:
        self._session.close()


def _ssl_context(destination: Destination) -> ssl.SSLContext:
    _look_at_tls_files(destination)
    try:
        context = ssl.create_default_context(cafile=destination.tls_ca or None)
        if destination.tls_certificate:
            context.load_cert_chain(destination.tls_certificate, destination.tls_key or None)
    except (OSError, ssl.SSLError):
        raise _tls_unusable() from None
    return context


def _look_at_tls_files(destination: Destination) -> None:
    for path in filter(None, (destination.tls_ca, destination.tls_certificate, destination.tls_key)):
        try:
            with open(path, "rb"):
                pass
        except OSError:
            raise _tls_unusable() from None


def _tls_unusable() -> Fatal:
    return Fatal("A TLS file of the destination cannot be used: check tls_ca, tls_certificate and tls_key.")
