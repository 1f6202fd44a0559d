"""Images come in over the network while the receiver is killed: what was acknowledged is there, and nothing else."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pydicom
import pytest
from pynetdicom import AE, build_context
from test_kill_points import RECEIVER_POINTS

from cxrbatch.intake.receiver import file_name
from test_receiver import CLASSES, MALFORMED, instance
from watchers import CRASH_N, WAIT_LIMIT_S, Place, Process, kill_group

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

ENV = {
    "CXRBATCH_TRUNCATED_TRIES": "1",
    "CXRBATCH_MAX_ASSOCIATIONS": "300",
    "CXRBATCH_MAX_ASSOCIATIONS_PER_PEER": "0",
    "CXRBATCH_MAX_FILE_MIB": "1",
    "CXRBATCH_MIN_FREE_MIB": "1",
}


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
    entity.acse_timeout = entity.dimse_timeout = entity.connection_timeout = 60
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
        thread.join(WAIT_LIMIT_S)
    return acknowledged


def check(place: Place, sent: list[pydicom.FileDataset], acknowledged: list[str], port: int) -> None:
    """Start again: every acknowledged image is on disk, complete and scored; no partial file is left."""
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


@pytest.mark.parametrize("occurrence", (1, 2, 3, 4, 5) if CRASH_N else (3,))
@pytest.mark.parametrize("point", RECEIVER_POINTS if CRASH_N else RECEIVER_POINTS[3:4])
def test_kill_at(empty_place: Place, point: str, occurrence: int) -> None:
    port = free_port()
    daemon = empty_place.start("--listen", f"127.0.0.1:{port}", **ENV, CXRBATCH_FAILPOINT=f"{point}:{occurrence}")
    empty_place.wait(lambda: listens(port), daemon)
    sent = [instance(seed=seed) for seed in range(occurrence + 2)]
    acknowledged: list[str] = []
    for dataset in sent:
        if daemon.poll() is None:
            send(port, dataset, acknowledged)
    assert daemon.wait(60) == -9
    assert len(acknowledged) == occurrence - 1
    check(empty_place, sent, acknowledged, port)


def test_many_associations_killed_half_way(empty_place: Place) -> None:
    """With a port scanner, malformed PDUs, objects over the limit and another sender at the same time."""
    port = free_port()
    daemon = empty_place.start("--listen", f"127.0.0.1:{port}", **ENV)
    empty_place.wait(lambda: listens(port), daemon)
    number = 200 if CRASH_N else 20
    sent = [instance(seed=seed, side=128) for seed in range(number)]
    dcmtk = [instance(seed=number + seed, side=128) for seed in range(number // 10)] if shutil.which("storescu") else []
    too_large = instance(seed=-1 % 2**32, side=1200)  # 1.4 MB; one MiB is allowed
    over = threading.Thread(target=lambda: [send(port, too_large, refused) for _ in range(3)])
    refused: list[str] = []
    others = [over, threading.Thread(target=_disturb, args=(port, daemon)), _Storescu(port, dcmtk, empty_place.cwd)]
    killer = threading.Thread(target=_kill_when_half_is_there, args=(empty_place, daemon, number + len(dcmtk)))
    for thread in (*others, killer):
        thread.start()
    acknowledged = send_all(port, sent)
    for thread in (*others, killer):
        thread.join(60)
    kill_group(daemon)
    empty_place.no_orphans()
    acknowledged += others[2].acknowledged  # type: ignore[union-attr]
    print(f"{len(acknowledged)} of {number} + {len(dcmtk)} acknowledged when it was killed")
    assert not refused
    check(empty_place, sent + dcmtk, acknowledged, port)
    # Unacknowledged images are sent again, as senders do; then all of them are there.
    daemon = empty_place.start("--listen", f"127.0.0.1:{port}", **ENV)
    empty_place.wait(lambda: listens(port), daemon)
    left = [dataset for dataset in sent + dcmtk if str(dataset.SOPInstanceUID) not in acknowledged]
    for dataset in left:
        send(port, dataset, acknowledged)
    all_names = {file_name(str(dataset.SOPInstanceUID)) for dataset in sent + dcmtk}
    empty_place.wait(lambda: empty_place.rows().keys() == all_names and empty_place.settled(), daemon)
    assert empty_place.stop(daemon) == 0
    empty_place.check(empty_place.rows())


def _disturb(port: int, daemon: Process) -> None:
    """Send noise and malformed PDUs and open silent connections, until the daemon is gone."""
    said = [os.urandom(200), b"", *MALFORMED.values()]
    for turn in range(200):
        if daemon.poll() is not None:
            return
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(said[turn % len(said)])


class _Storescu(threading.Thread):
    """dcmtk's sender, one association per image."""

    def __init__(self, port: int, datasets: list[pydicom.FileDataset], folder: Path) -> None:
        super().__init__()
        self.acknowledged: list[str] = []
        self._port, self._folder, self._by_name = port, folder / "dcmtk", dict[str, str]()
        self._folder.mkdir()
        for i, dataset in enumerate(datasets):
            dataset.save_as(self._folder / f"{i}.dcm", enforce_file_format=True)
            self._by_name[str(self._folder / f"{i}.dcm")] = str(dataset.SOPInstanceUID)

    def run(self) -> None:
        for name, uid in self._by_name.items():
            done = subprocess.run(
                ["storescu", "-to", "20", "-ta", "20", "-td", "20", "127.0.0.1", str(self._port), name],
                capture_output=True, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                self.acknowledged.append(uid)


def _kill_when_half_is_there(place: Place, daemon: Process, sent: int) -> None:
    deadline = time.monotonic() + WAIT_LIMIT_S
    while len(list(place.incoming.rglob("*.dcm"))) < sent // 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_group(daemon)
