"""Peers that are slow, silent, numerous or send garbage lose their own connection, and no other peer waits for them.

Limits that are not under test are an hour: what must end would outlast the test's own timeout.
"""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from pynetdicom import AE, build_context
from pynetdicom.association import Association

from cxrbatch.intake.receiver import Receiving, Tls
from test_receiver import CLASSES, MALFORMED, Heard, instance, listening, sender, stored

AN_HOUR = 3600.0
REQUEST = struct.pack(">BBL", 1, 0, 500)
REJECTED_FOR_NOW = struct.pack(">BBLBBBB", 3, 0, 4, 0, 2, 3, 2)  # PS3.8: transient, local limit exceeded
HEADER = {"association request": REQUEST, "nothing": b"", "half a header": REQUEST[:3]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stores(receiver: Receiving, seed: int = 0) -> bool:
    with sender(receiver) as association:
        return bool(association.is_established) and association.send_c_store(instance(seed=seed)).Status == 0x0000


def ended(connection: socket.socket) -> None:
    connection.settimeout(60)
    with suppress(ConnectionError):
        while connection.recv(1000):
            pass


@contextmanager
def trickle(connections: list[socket.socket]) -> Iterator[None]:
    """Send an occasional byte on each connection while the block runs."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.1):
            for connection in connections:
                with suppress(OSError):
                    connection.send(b"\0")

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("begins_with", HEADER)
def test_a_peer_that_trickles_its_first_pdu_is_ended(folder: Path, begins_with: str) -> None:
    with (
        listening(folder, idle_s=AN_HOUR, pdu_s=0.5) as receiver,
        socket.create_connection((receiver.host, receiver.port)) as slow,
    ):
        slow.sendall(HEADER[begins_with])
        with trickle([slow] if begins_with == "association request" else []):
            ended(slow)


def test_a_peer_that_trickles_the_pdu_of_an_object_is_ended(folder: Path) -> None:
    with listening(folder, idle_s=AN_HOUR, pdu_s=0.5) as receiver, sender(receiver) as association:
        association.network_timeout = None  # the sender does not end it
        raw = association.dul.socket.socket
        raw.sendall(struct.pack(">BBL", 4, 0, 10_000))
        with trickle([raw]):
            eventually(lambda: not association.is_established)
    assert not stored(folder)


def test_peers_that_trickle_hold_it_shut_no_longer_than_one_pdu_may_take(folder: Path) -> None:
    with listening(folder, max_associations=4, idle_s=AN_HOUR, pdu_s=1.0) as receiver, ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection((receiver.host, receiver.port))) for _ in range(4)]
        for connection in slow:
            connection.sendall(REQUEST)
        with trickle(slow):
            eventually(lambda: stores(receiver))


def test_connections_with_garbage_are_answered_at_once_and_take_nobodys_place(folder: Path) -> None:
    with listening(folder, max_associations=2, idle_s=AN_HOUR) as receiver, ExitStack() as stack:
        for number in range(30):
            stranger = stack.enter_context(socket.create_connection((receiver.host, receiver.port)))
            with suppress(ConnectionError):
                stranger.sendall(list(MALFORMED.values())[number % len(MALFORMED)])
        strangers = [stack.enter_context(socket.create_connection((receiver.host, receiver.port))) for _ in range(5)]
        for stranger in strangers:
            stranger.sendall(MALFORMED["http"])
            ended(stranger)
        eventually(lambda: stores(receiver))


@pytest.mark.parametrize("begins_with", HEADER)
def test_peers_that_go_before_they_ask_take_nobodys_place(folder: Path, begins_with: str) -> None:
    """One after the other, so that each is admitted and looked at: five are more than may be looked at together."""
    with listening(folder, max_associations=2, idle_s=AN_HOUR, pdu_s=AN_HOUR) as receiver:
        for _ in range(5):
            with socket.create_connection((receiver.host, receiver.port)) as gone:
                gone.sendall(HEADER[begins_with])
                time.sleep(0.05)
        eventually(lambda: stores(receiver))


def test_one_peer_that_takes_all_it_may_leaves_room_for_another(folder: Path) -> None:
    heard = Heard()
    with (
        listening(folder, heard, max_associations=4, max_associations_per_peer=2, idle_s=AN_HOUR) as receiver,
        sender(receiver) as one,
        sender(receiver) as two,
        socket.create_connection((receiver.host, receiver.port)) as three,
    ):
        assert one.is_established and two.is_established
        three.sendall(REQUEST)  # not pynetdicom's: it takes a rejection that comes at once for a failed connection
        assert three.recv(10) == REJECTED_FOR_NOW
        assert heard == [("association_refused", {})]
        with sender(receiver, bind_address=("127.0.0.2", 0)) as another:
            assert another.is_established
            assert another.send_c_store(instance()).Status == 0x0000
        one.release()
        eventually(lambda: stores(receiver))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_peer_that_never_begins_its_handshake_keeps_nobody_out(folder: Path, tmp_path: Path) -> None:
    import ssl

    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=server",
         "-keyout", "server.key", "-out", "server.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    tls = Tls(str(tmp_path / "server.pem"), str(tmp_path / "server.key"))
    context = ssl.create_default_context(cafile=tls.certificate)
    context.check_hostname = False
    with (
        listening(folder, tls=tls, idle_s=AN_HOUR, pdu_s=AN_HOUR) as receiver,
        socket.create_connection((receiver.host, receiver.port)),
        sender(receiver, tls_args=(context, None)) as association,
    ):
        assert association.send_c_store(instance()).Status == 0x0000


def test_sigterm_ends_it_while_associations_are_open(folder: Path, tmp_path: Path) -> None:
    """An idle association, one with half a PDU, one with half an object, and a connection without a request."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = tmp_path / "config.toml"
    settings.write_text("idle_association_s = 3600\npdu_timeout_s = 3600\ndrain_s = 0.5\n")
    command = [sys.executable, "-m", "cxrbatch", "--config", settings, "receive", folder, "--listen", f":{port}"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None and "receiving" in process.stderr.readline()
        half_an_object = struct.pack(">BBLLBB", 4, 0, 106, 102, 1, 0) + bytes(100)
        for begun in (b"", struct.pack(">BBL", 4, 0, 10_000) + bytes(10), half_an_object):
            entity = AE()
            entity.requested_contexts = [build_context(CLASSES[0], "1.2.840.10008.1.2.1")]
            association = entity.associate("127.0.0.1", port)
            assert association.is_established
            association.dul.socket.socket.sendall(begun)  # type: ignore[union-attr]
        with socket.create_connection(("127.0.0.1", port)):
            time.sleep(0.3)  # it has read all that by now, or it ends a little sooner
            process.terminate()
            assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_an_object_under_way_when_it_ends_is_stored_and_acknowledged(folder: Path) -> None:
    """The sender pauses before the second half; meanwhile the receiver is stopped."""
    with ExitStack() as receiving:
        receiver = receiving.enter_context(listening(folder, idle_s=AN_HOUR, drain_s=AN_HOUR))
        with sender(receiver) as association:
            begun, go_on = threading.Event(), threading.Event()
            send, sent = association.dul.socket.send, 0

            def slowly(data: bytes) -> None:
                nonlocal sent
                send(data)
                sent += 1
                if sent == 2:  # the command, and a part of the data set
                    begun.set()
                    go_on.wait(60)

            association.dul.socket.send = slowly
            statuses: list[int] = []
            store = threading.Thread(
                target=lambda: statuses.append(association.send_c_store(instance(side=1024)).Status)
            )
            store.start()
            assert begun.wait(60)
            end = threading.Thread(target=receiving.close)
            end.start()
            eventually(lambda: _refuses(receiver))
            go_on.set()
            store.join(60)
            end.join(60)
            assert statuses == [0x0000] and len(stored(folder)) == 1
            assert not [t for t in threading.enumerate() if isinstance(t, Association) and t.is_acceptor]


def _refuses(receiver: Receiving) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((receiver.host, receiver.port)) != 0
