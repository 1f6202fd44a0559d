"""Films come in over the network while the receiver is killed: what was acknowledged is there, and nothing else."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pydicom
import pytest
from pynetdicom import AE, build_context
from test_kill_points import RECEIVER_POINTS

from cxrbatch.dicom.receiver import file_name
from test_receiver import CLASSES, instance
from watching import CRASH_N, Place, kill_group

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

ENV = {"CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_MAX_ASSOCIATIONS": "64", "CXRBATCH_MIN_FREE_MIB": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def send(port: int, dataset: pydicom.FileDataset, acknowledged: list[str]) -> None:
    entity = AE()
    entity.requested_contexts = [build_context(CLASSES[0], "1.2.840.10008.1.2.1")]
    entity.acse_timeout = entity.dimse_timeout = entity.connection_timeout = 20
    try:
        association = entity.associate("127.0.0.1", port)
        if association.is_established:
            answer = association.send_c_store(dataset)
            if "Status" in answer and answer.Status == 0x0000:
                acknowledged.append(str(dataset.SOPInstanceUID))
            association.release()
    except (OSError, RuntimeError):
        pass  # the peer was killed


def send_all(port: int, datasets: list[pydicom.FileDataset]) -> list[str]:
    acknowledged: list[str] = []
    threads = [threading.Thread(target=send, args=(port, dataset, acknowledged)) for dataset in datasets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return acknowledged


def check(place: Place, sent: list[pydicom.FileDataset], acknowledged: list[str], port: int) -> None:
    """Start again, and look: every acknowledged film is on the disk, whole, and scored; nothing half is left."""
    daemon = place.start("--listen", f"127.0.0.1:{port}", **ENV)
    place.wait(lambda: "receiving" in place.log and listens(port), daemon)
    place.wait(place.settled, daemon)
    assert place.stop(daemon) == 0
    by_name = {file_name(str(dataset.SOPInstanceUID)): dataset for dataset in sent}
    rows = place.rows()
    assert {file_name(uid) for uid in acknowledged} <= rows.keys() <= by_name.keys()
    for name, row in rows.items():
        assert row[0] == "done"
        assert pydicom.dcmread(place.incoming / name).PixelData == by_name[name].PixelData
    place.check(rows)


@pytest.fixture
def empty_place(new_place: Callable[[str], Place]) -> Place:
    place = new_place("sqlite")
    for path in sorted(place.incoming.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    return place


@pytest.mark.parametrize("point", RECEIVER_POINTS if CRASH_N else RECEIVER_POINTS[3:4])
def test_kill_at(empty_place: Place, point: str) -> None:
    port = free_port()
    daemon = empty_place.start("--listen", f"127.0.0.1:{port}", **ENV, CXRBATCH_CRASH_AT=f"{point}:3")
    empty_place.wait(lambda: listens(port), daemon)
    sent = [instance(seed=seed) for seed in range(5)]
    acknowledged: list[str] = []
    for dataset in sent:
        if daemon.poll() is None:
            send(port, dataset, acknowledged)
    assert daemon.wait(60) == -9
    assert len(acknowledged) == 2
    check(empty_place, sent, acknowledged, port)


def test_many_associations_killed_half_way(empty_place: Place) -> None:
    """And a port scanner at the same time."""
    port = free_port()
    daemon = empty_place.start("--listen", f"127.0.0.1:{port}", **ENV)
    empty_place.wait(lambda: listens(port), daemon)
    sent = [instance(seed=seed, side=128) for seed in range(200 if CRASH_N else 20)]
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(os.urandom(200))
    killer = threading.Timer(0.0, lambda: _kill_when_half_is_there(empty_place, daemon, len(sent)))
    killer.start()
    acknowledged = send_all(port, sent)
    killer.join(60)
    kill_group(daemon)
    empty_place.no_orphans()
    check(empty_place, sent, acknowledged, port)


def _kill_when_half_is_there(place: Place, daemon: Any, sent: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(place.incoming.rglob("*.dcm"))) < sent // 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_group(daemon)
