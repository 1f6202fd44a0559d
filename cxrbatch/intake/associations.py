"""The receiver's connections, before and around pynetdicom: admission, deadlines and shutdown.

pynetdicom starts two threads for each connection and keeps one that never asks for an association until acse_timeout.
So a connection is checked first. It is closed if it does not begin like an A-ASSOCIATE-RQ within `pdu_s`. A connection
over a limit is answered with a transient rejection and closed. A PDU that has begun must be complete within `pdu_s`.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu_primitives import A_P_ABORT
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

__all__ = ["ConnectionLimits", "serve"]

_ASSOCIATE_RQ = 0x01
_HEADER = 6  # bytes: type, reserved, length
_LARGEST_NEGOTIATION = 1 << 20  # bytes of one A-ASSOCIATE-RQ; real ones have a few thousand
_REJECT_FOR_NOW = bytes([3, 0, 0, 0, 0, 4, 0, 2, 3, 2])  # A-ASSOCIATE-RJ: transient, local limit exceeded
_ABORT = bytes([7, 0, 0, 0, 0, 4, 0, 0, 2, 1])  # A-ABORT: by the service provider, unrecognised PDU
_PDU_S_BYTES = 128 * 1024  # a larger PDU gets pdu_s for each so many bytes
_PEEK_EVERY_MS = 20
_LINGER_S = 1.0  # for an answer to reach the peer before the connection is reset


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many associations one peer and all peers may hold open, and the deadlines in seconds."""

    max_associations: int
    max_associations_per_peer: int  # of one IP address; 0: only max_associations counts
    max_pdu_bytes: int
    idle_s: float  # between two PDUs
    pdu_s: float  # from the first byte of a PDU to its last
    drain_s: float  # for messages in progress when the block of `serve` ends


@contextmanager
def serve(
    entity: AE,
    address: tuple[str, int],
    limits: ConnectionLimits,
    handlers: Sequence[Any],
    *,
    tls: ssl.SSLContext | None,
    refused: Callable[[], None],
    heartbeat: Callable[[], None],
) -> Iterator[int]:
    """Accept associations until the block ends; yields the port. Raises OSError if the address cannot be used.

    `heartbeat` is called twice a second while connections can be accepted.
    At the end, idle associations are aborted at once, others when their message is complete or drain_s is over.
    """
    own: list[Any] = [
        (evt.EVT_CONN_OPEN, lambda event: _set_deadlines(event, limits)),
        (evt.EVT_FSM_TRANSITION, lambda event: _end_without_request(event, refused)),
    ]
    server: Any = entity.make_server(
        address,
        evt_handlers=[*own, *handlers],
        server_class=_Server,
        request_handler=_Handler,
        limits=limits,
        tls=tls,
        refused=refused,
        heartbeat=heartbeat,
    )
    entity._servers.append(server)
    threading.Thread(target=server.serve_forever, name="dicom-server", daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        _drain(server, limits.drain_s)


class _Server(ThreadedAssociationServer):
    """Accepts without waiting for a peer: each connection's TLS handshake and first bytes have their own thread."""

    daemon_threads = True  # a stuck peer or disk does not keep the process alive
    request_queue_size = 128

    def __init__(
        self,
        *args: Any,
        limits: ConnectionLimits,
        tls: ssl.SSLContext | None,
        refused: Callable[[], None],
        heartbeat: Callable[[], None],
        **more: Any,
    ) -> None:
        self.limits, self.tls, self.refused, self.heartbeat = limits, tls, refused, heartbeat
        self.lock = threading.Lock()  # one admission at a time
        self._unproven: Counter[str] = Counter()  # connections that have not yet requested an association, by address
        super().__init__(*args, **more)

    def service_actions(self) -> None:
        """Called between two connections, and every half second without one."""
        self.heartbeat()
        super().service_actions()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether another connection may be checked; False closes it."""
        peer = client_address[0]
        with self.lock:
            each = self.limits.max_associations_per_peer or self.limits.max_associations
            if self._unproven[peer] >= 2 * each or self._unproven.total() >= 4 * self.limits.max_associations:
                return False
            self._unproven[peer] += 1
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request(request, client_address)
        except BaseException:  # no more threads
            self.looked_at(client_address)
            raise

    def looked_at(self, client_address: Any) -> None:
        """Undo the count of a `verify_request` that returned True."""
        with self.lock:
            self._unproven[client_address[0]] -= 1
            self._unproven += Counter()  # drops the zeros

    def is_full_for(self, peer: str) -> bool:
        """Whether `peer` is over a limit. Call it with `lock` held."""
        peers = [association.requestor.address for association in self.active_associations]
        each = self.limits.max_associations_per_peer
        return len(peers) >= self.limits.max_associations or bool(each and peers.count(peer) >= each)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: the traceback would quote the peer."""


class _Handler(RequestHandler):
    """One connection, in its own thread, until it becomes an association."""

    server: _Server

    def handle(self) -> None:
        connection = self.request
        try:
            connection.settimeout(self.server.limits.pdu_s)
            if self.server.tls is not None:
                connection = self.request = self.server.tls.wrap_socket(connection, server_side=True)
            elif not _asks_for_an_association(connection, self.server.limits.pdu_s):
                _answer(connection, _ABORT)
                return
            with self.server.lock:
                if not self.server.is_full_for(self.client_address[0]):
                    self._start()
                    return
            self.server.refused()
            _answer(connection, _REJECT_FOR_NOW)
        except (OSError, ValueError):  # reset, timed out, no TLS
            _close(connection)
        finally:
            self.server.looked_at(self.client_address)

    def _start(self) -> None:
        association = self._create_association()
        association.dul.daemon = True
        evt.trigger(association, evt.EVT_CONN_OPEN, {"address": self.client_address})
        association.start()


def _asks_for_an_association(connection: socket.socket, within_s: float) -> bool:
    """Whether the first PDU is an A-ASSOCIATE-RQ of a plausible length. Only peeks: no byte is consumed."""
    until = time.monotonic() + within_s
    hang_up = select.poll()
    hang_up.register(connection, select.POLLRDHUP)
    has_gone = False
    while time.monotonic() < until:
        header = connection.recv(_HEADER, socket.MSG_PEEK)
        if not header or header[0] != _ASSOCIATE_RQ:
            return False
        if len(header) == _HEADER:
            return int.from_bytes(header[2:], "big") <= _LARGEST_NEGOTIATION
        if has_gone:
            return False
        # Part of the PDU is there, so the peek does not block, and it does not tell that the peer has closed.
        has_gone = bool(hang_up.poll(_PEEK_EVERY_MS))
    return False


def _answer(connection: socket.socket, pdu: bytes) -> None:
    """Send a last PDU and close. Unread bytes of the peer are read first: else the kernel resets the connection."""
    with suppress(OSError, ValueError):
        connection.sendall(pdu)
        connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + _LINGER_S
        while (left_s := until - time.monotonic()) > 0:
            connection.settimeout(left_s)
            if not connection.recv(1 << 16):
                break
    _close(connection)


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        connection.close()


def _set_deadlines(event: Event, limits: ConnectionLimits) -> None:
    """EVT_CONN_OPEN: limit the length of a PDU (its length field may claim 4 GB) and its duration."""
    connection = event.assoc.dul.socket
    assert isinstance(connection, AssociationSocket)
    most = max(limits.max_pdu_bytes, _LARGEST_NEGOTIATION)

    def recv(nr_bytes: int) -> bytearray:
        raw = connection.socket
        if raw is None or nr_bytes > most:
            raise OSError("a PDU longer than agreed")
        data = bytearray()
        until = time.monotonic() + limits.pdu_s * max(1.0, nr_bytes / _PDU_S_BYTES)
        while len(data) < nr_bytes:
            raw.settimeout(max(0.001, until - time.monotonic()))
            received = raw.recv(min(1 << 16, nr_bytes - len(data)))
            if not received:
                break
            data += received
        raw.settimeout(limits.idle_s)  # for sending
        return data

    connection.recv = recv  # type: ignore[method-assign]


def _end_without_request(event: Event, refused: Callable[[], None]) -> None:
    """EVT_FSM_TRANSITION: end an association whose first PDU is not an A-ASSOCIATE-RQ; it would wait for one."""
    if event.current_state == "Sta2" and event.fsm_event != "Evt6":
        if event.fsm_event == "Evt19":  # a request that cannot be read, such as one with an umlaut in a title
            refused()
        event.assoc.is_aborted = True
        event.assoc.dul.to_user_queue.put(A_P_ABORT())


def _is_busy(association: Association) -> bool:
    return bool(getattr(association, "_cxrbatch_busy", False))


def _drain(server: _Server, drain_s: float) -> None:
    until = time.monotonic() + drain_s
    idle_before: set[Association] = set()
    while live := server.active_associations:
        late = time.monotonic() >= until
        idle = {association for association in live if not _is_busy(association)}
        for association in live if late else idle & idle_before:  # idle at two checks: an answer may be in transit
            _end(association)
        if late:
            time.sleep(0.1)  # for the A-ABORT
            for association in server.active_associations:
                _close_transport(association)
            return  # threads that are stuck are daemon threads
        idle_before = idle
        time.sleep(0.05)


def _end(association: Association) -> None:
    if association.dul.state_machine.current_state in ("Sta1", "Sta2", "Sta13"):  # states without an abort
        _close_transport(association)
    else:
        association.abort(block=False)


def _close_transport(association: Association) -> None:
    if association.dul.socket is not None:
        association.dul.socket._shutdown_socket()
