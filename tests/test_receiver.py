"""The C-STORE receiver: what it acknowledges is on disk, and nothing else appears."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import MPEG2MPML, ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
    Verification,
)

from cxrbatch.errors import Fatal
from cxrbatch.intake.instance_files import ReceivedInstance
from cxrbatch.intake.receiver import ACCEPTED_SYNTAXES, STORAGE_CLASSES, Listen, Receiving, Tls, file_name, receive
from cxrbatch.ops.receive import listen_of
from cxrbatch.own_objects import make_uid
from cxrbatch.settings import Settings
from mounting import tmpfs

CLASSES = [
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
]


def instance(uid: str | None = None, *, sop_class: str = CLASSES[0], side: int = 64, seed: int = 0) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = uid or generate_uid()
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    dataset.PatientName, dataset.PatientID = "PLANTED^NAME", "PLANTED-ID"
    dataset.Modality, dataset.PhotometricInterpretation = "CR", "MONOCHROME2"
    dataset.Rows = dataset.Columns = side
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelData = np.random.default_rng(seed).integers(0, 256, side * side, dtype=np.uint8).tobytes()
    return dataset


class Heard(list[tuple[str, dict[str, object]]]):
    def __call__(self, event: str, **values: object) -> None:
        self.append((event, values))


@contextmanager
def listening(
    folder: Path, tell: Callable[..., None] = lambda event, **values: None, **more: Any
) -> Iterator[Receiving]:
    given = {"host": "127.0.0.1", "port": 0, "min_free_bytes": 0, "idle_s": 10.0} | more
    with receive(folder, Listen(**given), tell) as receiver:
        yield receiver


@contextmanager
def sender(receiver: Receiving, contexts: list[Any] | None = None, title: str = "SENDER", **more: Any) -> Iterator[Any]:
    entity = AE(ae_title=title)
    entity.requested_contexts = contexts or [build_context(c, ExplicitVRLittleEndian) for c in CLASSES]
    association = entity.associate(receiver.host, receiver.port, **more)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def stored(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_a_file_system_without_hard_links_will_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "injected")

    monkeypatch.setattr(os, "link", refuse)
    with listening(folder) as receiver, sender(receiver) as association:
        for seed in (1, 2, 1, 2):
            assert association.send_c_store(instance("1.2.3.4", seed=seed)).Status == 0x0000
    assert len(stored(folder)) == 2


def test_echo_and_each_storage_class(folder: Path) -> None:
    sent = [instance(sop_class=c, seed=i) for i, c in enumerate(CLASSES)]
    with listening(folder) as receiver:
        with sender(receiver, [build_context(Verification)]) as association:
            assert association.send_c_echo().Status == 0x0000
        with sender(receiver) as association:
            assert [association.send_c_store(dataset).Status for dataset in sent] == [0x0000] * 4
    assert stored(folder) == sorted(folder / file_name(d.SOPInstanceUID) for d in sent)
    for dataset in sent:
        kept = pydicom.dcmread(folder / file_name(dataset.SOPInstanceUID))
        assert kept.PixelData == dataset.PixelData and kept.preamble == b"\0" * 128
        assert kept.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


def test_all_syntaxes_are_accepted_and_what_we_do_not_read_is_not(folder: Path) -> None:
    wanted = [build_context(STORAGE_CLASSES[0], syntax) for syntax in ACCEPTED_SYNTAXES]
    refused = [build_context(STORAGE_CLASSES[0], MPEG2MPML), build_context(CTImageStorage)]
    with listening(folder) as receiver, sender(receiver, wanted + refused) as association:
        assert {c.transfer_syntax[0] for c in association.accepted_contexts} == set(ACCEPTED_SYNTAXES)
        assert len(association.rejected_contexts) == 2


@pytest.mark.parametrize("uid", ["../../escape", "/etc/passwd", "1.2.3\0", "..", "a/b", "1.2." + "9" * 58])
def test_a_uid_never_becomes_a_path(folder: Path, uid: str) -> None:
    name = file_name(uid)
    assert len(name) == 47 and name[3:5] == name[:2] and set(name) <= set("0123456789abcdef/.dcm")
    event = type("Event", (), {})()
    event.request = type("Request", (), {"AffectedSOPInstanceUID": uid})()
    event.encoded_dataset = lambda: b"data"
    assert Receiving(folder, Listen("", 0, min_free_bytes=0), Heard()).store(event) == 0x0000
    assert stored(folder) == [folder / name]
    assert stored(folder.parent) == [folder / name]


def test_an_instance_that_is_sent_again_is_kept_once(folder: Path) -> None:
    dataset, heard = instance("1.2.3.4"), Heard()
    with listening(folder, heard) as receiver, sender(receiver) as association:
        assert [association.send_c_store(dataset).Status for _ in range(3)] == [0x0000] * 3
    (kept,) = stored(folder)
    assert pydicom.dcmread(kept).PixelData == dataset.PixelData and not heard


def test_a_resend_is_recognised_whoever_wrote_the_file_meta_information(folder: Path) -> None:
    """A newer version of the DICOM library writes another version name into it."""
    dataset = instance("1.2.3.4")
    with listening(folder) as receiver, sender(receiver) as association:
        association.send_c_store(dataset)
        (kept,) = stored(folder)
        older = pydicom.dcmread(kept)
        older.file_meta.ImplementationVersionName = "OLDER"
        older.save_as(kept)
        assert association.send_c_store(dataset).Status == 0x0000
    assert stored(folder) == [kept]


def test_another_data_set_with_the_same_uid_is_kept_beside_the_first(folder: Path) -> None:
    heard = Heard()
    sent = [instance("1.2.3.4", seed=seed) for seed in range(3)]
    with listening(folder, heard) as receiver, sender(receiver) as association:
        for dataset in [*sent, *sent]:
            assert association.send_c_store(dataset).Status == 0x0000
    kept = stored(folder)
    assert {pydicom.dcmread(path).PixelData for path in kept} == {dataset.PixelData for dataset in sent}
    assert len(kept) == 3 and folder / file_name("1.2.3.4") in kept
    assert pydicom.dcmread(folder / file_name("1.2.3.4")).PixelData == sent[0].PixelData
    assert heard == [("duplicate_instance", {"state": "kept"})] * 2


def test_two_receivers_on_one_folder_overwrite_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other receiver puts its file there between our check and our rename."""
    first, second = instance("1.2.3.4", seed=1), instance("1.2.3.4", seed=2)
    real, calls = os.fsync, list[int]()
    with listening(folder) as one, listening(folder) as two, sender(one) as to_one, sender(two) as to_two:

        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == 1:
                assert to_two.send_c_store(second).Status == 0x0000
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        assert to_one.send_c_store(first).Status == 0x0000
    assert {pydicom.dcmread(path).PixelData for path in stored(folder)} == {first.PixelData, second.PixelData}


def test_another_data_set_with_the_same_uid_is_refused_when_asked_to(folder: Path) -> None:
    heard, first, other = Heard(), instance("1.2.3.4"), instance("1.2.3.4", seed=9)
    with listening(folder, heard, duplicate_instances="refuse") as receiver, sender(receiver) as association:
        assert [association.send_c_store(d).Status for d in (first, other, first)] == [0x0000, 0x0111, 0x0000]
    (kept,) = stored(folder)
    assert pydicom.dcmread(kept).PixelData == first.PixelData
    assert heard == [("duplicate_instance", {"state": "refused"})]


@pytest.mark.parametrize("there", ["empty file", "folder", "link to a file", "broken link", "fifo", "truncated"])
@pytest.mark.parametrize("policy", ["keep", "refuse"])
def test_what_lies_under_the_name_and_is_not_the_instance_is_not_acknowledged_as_it(
    folder: Path, there: str, policy: str
) -> None:
    dataset, name = instance("1.2.3.4"), folder / file_name("1.2.3.4")
    if there == "truncated" and policy == "refuse":
        return  # another content under this UID
    name.parent.mkdir()
    (folder / "target").write_bytes(b"x")
    match there:
        case "empty file":
            name.touch()
        case "folder":
            name.mkdir()
        case "link to a file" | "broken link":
            name.symlink_to("../target" if there == "link to a file" else "nowhere")
        case "fifo":
            os.mkfifo(name)
        case "truncated":
            name.write_bytes(b"half")
    with listening(folder, duplicate_instances=policy) as receiver, sender(receiver) as association:
        for _ in range(2):
            assert association.send_c_store(dataset).Status == 0x0000
    whole = [path for path in stored(folder) if path.stat().st_size > 1000]
    assert [pydicom.dcmread(path).PixelData for path in whole] == [dataset.PixelData]
    assert (folder / "target").read_bytes() == b"x"


def test_the_same_instance_from_many_at_once_is_kept_once(folder: Path) -> None:
    dataset = instance("1.2.3.4", side=256)
    statuses: list[int] = []

    def send(receiver: Receiving) -> None:
        with sender(receiver) as association:
            statuses.append(association.send_c_store(dataset).Status)

    with listening(folder) as receiver:
        threads = [threading.Thread(target=send, args=(receiver,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert statuses == [0x0000] * 8 and len(stored(folder)) == 1


def test_who_may_send_and_what_we_are_called(folder: Path) -> None:
    heard = Heard()
    with listening(folder, heard, calling_ae_titles=("FRIEND",), ae_title="CXR") as receiver:
        for title, called, let_in in [("FRIEND", "CXR", True), ("STRANGER", "CXR", False), ("FRIEND", "OTHER", False)]:
            answers: list[type] = []  # is_rejected misses a rejection that comes at once
            listen = [(evt.EVT_PDU_RECV, lambda event, answers=answers: answers.append(type(event.pdu)))]
            with sender(receiver, title=title, ae_title=called, evt_handlers=listen) as association:
                assert association.is_established == let_in
                assert (A_ASSOCIATE_RJ in answers) != let_in
    assert not stored(folder)


def test_a_title_that_is_no_ascii_is_refused_and_leaves_a_line_in_the_log(folder: Path) -> None:
    heard = Heard()
    request = struct.pack(">HH", 1, 0) + b"CXR".ljust(16) + "RÖNTGEN".encode("latin-1").ljust(16) + bytes(32)
    with listening(folder, heard) as receiver, socket.create_connection((receiver.host, receiver.port)) as peer:
        peer.sendall(struct.pack(">BBL", 1, 0, len(request)) + request)
        peer.settimeout(60)
        assert peer.recv(100)[:1] == b"\x07"  # A-ABORT
    assert heard == [("association_refused", {})]


def test_a_full_disk_is_said_so_that_the_sender_keeps_its_image(folder: Path) -> None:
    heard = Heard()
    with listening(folder, heard, min_free_bytes=2**60) as receiver, sender(receiver) as association:
        assert association.send_c_store(instance()).Status == 0xA700
    assert not stored(folder) and heard[0][0] == "disk_nearly_full"


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_write_that_fails_leaves_nothing_and_is_not_acknowledged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "injected")

    heard = Heard()
    with listening(folder, heard) as receiver, sender(receiver) as association:
        with monkeypatch.context() as broken:
            broken.setattr(f"os.{call}", fail)
            assert association.send_c_store(instance("1.2.3")).Status == 0xA700
        assert not stored(folder)
        assert association.send_c_store(instance("1.2.3")).Status == 0x0000
    assert heard == [("store_failed", {"error": "OSError"})]


def test_a_machine_without_memory_is_said_so_that_the_sender_keeps_its_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ReceivedInstance, "of", fail)
    heard = Heard()
    with listening(folder, heard) as receiver, sender(receiver) as association:
        assert association.send_c_store(instance()).Status == 0xA700
    assert heard == [("store_failed", {"error": "MemoryError"})]


def test_nothing_is_put_where_a_share_was_unmounted(folder: Path) -> None:
    heard = Heard()
    with listening(folder, heard) as receiver, sender(receiver) as association:
        with tmpfs(folder):
            assert association.send_c_store(instance(seed=1)).Status == 0x0000
            assert len(stored(folder)) == 1
        assert association.send_c_store(instance(seed=2)).Status == 0xA700
        assert not stored(folder) and heard == [("share_unmounted", {})]
        with tmpfs(folder):
            assert association.send_c_store(instance(seed=2)).Status == 0x0000


def test_what_is_there_already_is_acknowledged_once_its_folder_is_on_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier process may have ended between the rename and the folder's fsync."""
    real, synced = os.fsync, list[bool]()

    def fsync(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if synced == [False, True]:
            raise OSError(errno.EIO, "injected")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with listening(folder) as receiver, sender(receiver) as association:
        assert association.send_c_store(instance("1.2.3")).Status == 0xA700
        assert len(stored(folder)) == 1
        assert association.send_c_store(instance("1.2.3")).Status == 0x0000
    assert synced == [False, True, True, True]


def test_associations_over_the_limit_are_refused_and_later_let_in(folder: Path) -> None:
    with listening(folder, max_associations=2) as receiver:
        with sender(receiver) as first, sender(receiver) as second, sender(receiver) as third:
            assert first.is_established and second.is_established and not third.is_established
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with sender(receiver) as again:
                if again.is_established:
                    return
            time.sleep(0.1)
        raise AssertionError("nobody is let in any more")


def test_an_object_over_the_limit_ends_the_association(folder: Path) -> None:
    heard = Heard()
    with listening(folder, heard, max_object_bytes=100_000) as receiver:
        with sender(receiver) as association:
            assert association.send_c_store(instance(side=64)).Status == 0x0000
            assert association.send_c_store(instance(side=64)).Status == 0x0000  # the limit is of one object
            answer = association.send_c_store(instance(side=1024))
            assert "Status" not in answer
        with sender(receiver) as association:
            assert association.send_c_store(instance(side=64)).Status == 0x0000
    assert len(stored(folder)) == 3
    assert "object_too_large" in [event for event, _ in heard]


MALFORMED = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a PDU of 4 GB": struct.pack(">BBL", 1, 0, 0xFFFFFFFF) + b"\0" * 5000,
    "half a header": b"\x01\x00",
    "half a PDU": struct.pack(">BBL", 1, 0, 500) + b"\0" * 20,
    "an unknown type": struct.pack(">BBL", 0x77, 0, 4) + b"\0" * 4,
    "data before an association": struct.pack(">BBL", 4, 0, 10) + struct.pack(">LBB", 6, 1, 2) + b"\0" * 4,
    "noise": bytes(range(256)) * 40,
    "an empty request": struct.pack(">BBL", 1, 0, 68) + b"\0\1\0\0" + b"A" * 32 + b"\0" * 32,
    "an item that claims more than there is": struct.pack(">BBL", 1, 0, 72)
    + b"\0\1\0\0"
    + b"A" * 32
    + b"\0" * 32
    + struct.pack(">BBH", 0x10, 0, 60_000),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pdus_and_port_scanners_harm_nobody(folder: Path, name: str) -> None:
    with listening(folder, idle_s=1.0) as receiver:
        for _ in range(3):
            with socket.create_connection((receiver.host, receiver.port), 5) as stranger:
                stranger.sendall(MALFORMED[name])
        with sender(receiver) as association:
            assert association.send_c_store(instance()).Status == 0x0000
    assert len(stored(folder)) == 1


def test_a_connection_that_says_nothing_is_ended(folder: Path) -> None:
    with (
        listening(folder, idle_s=0.5) as receiver,
        socket.create_connection((receiver.host, receiver.port), 30) as silent,
    ):
        silent.settimeout(60)
        silent.sendall(b"\x01\x00\x00")
        with suppress(ConnectionResetError):  # closed or reset, as the kernel likes
            while silent.recv(100):
                pass


def test_left_over_temporary_files_are_swept(folder: Path) -> None:
    (folder / "ab").mkdir()
    (folder / "ab" / ".0123456789abcdef.part").write_bytes(b"half an image")
    (folder / "ab" / "keep.dcm").write_bytes(b"x")
    with listening(folder):
        assert stored(folder) == [folder / "ab" / "keep.dcm"]


@pytest.mark.parametrize(
    ("listen", "host"),
    [
        ("[::1]:104", "::1"),
        ("A@[::]:104", "::"),
        ("::1:104", "::1"),
        ("A@0.0.0.0:104", "0.0.0.0"),
        (":104", "127.0.0.1"),
    ],
)
def test_addresses(listen: str, host: str) -> None:
    found = listen_of(Settings(listen=listen))
    assert (found.host, found.port) == (host, 104)


def test_a_port_that_is_taken_and_a_folder_that_is_not_there_are_sentences(folder: Path) -> None:
    with (
        listening(folder) as receiver,
        pytest.raises(Fatal, match="cannot listen on"),
        listening(folder, port=receiver.port),
    ):
        pass
    with pytest.raises(Fatal, match="cannot be written"), listening(folder / "missing"):
        pass


def test_tls_lets_in_who_has_a_certificate(folder: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    for name in ("server", "client"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
             "-keyout", f"{name}.key", "-out", f"{name}.pem"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
    tls = Tls(str(tmp_path / "server.pem"), str(tmp_path / "server.key"), str(tmp_path / "client.pem"))
    known, unknown = ssl.create_default_context(cafile=tls.certificate), ssl.create_default_context()
    known.check_hostname = unknown.check_hostname = False
    unknown.verify_mode = ssl.CERT_NONE
    known.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
    with listening(folder, tls=tls) as receiver:
        with sender(receiver, tls_args=(known, None)) as association:
            assert association.send_c_store(instance()).Status == 0x0000
        with sender(receiver, tls_args=(unknown, None)) as association:
            assert not association.is_established
        with sender(receiver) as association:
            assert not association.is_established
    with pytest.raises(Fatal, match="TLS file"), listening(folder, tls=Tls("none.pem", "none.key")):
        pass


@pytest.mark.skipif(shutil.which("storescu") is None, reason="dcmtk's storescu is not installed")
def test_dcmtk_sends_to_it(folder: Path, tmp_path: Path) -> None:
    dataset = instance(seed=3)
    dataset.save_as(tmp_path / "image.dcm", enforce_file_format=True)
    with listening(folder, ae_title="CXR", calling_ae_titles=("DCMTK",)) as receiver:
        command = ["storescu", "-aet", "DCMTK", "-aec", "CXR", receiver.host, str(receiver.port)]
        subprocess.run([*command, str(tmp_path / "image.dcm")], check=True, capture_output=True, timeout=60)
        command[2] = "NOBODY"
        refused = subprocess.run([*command, str(tmp_path / "image.dcm")], capture_output=True, timeout=60)
        assert refused.returncode != 0
    (kept,) = stored(folder)
    assert pydicom.dcmread(kept).PixelData == dataset.PixelData


def test_jpeg_comes_as_it_was_sent(folder: Path, tmp_path: Path) -> None:
    from pydicom.encaps import encapsulate

    dataset = instance()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([b"\xff\xd8 not really \xff\xd9"])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "image.dcm", enforce_file_format=True)
    contexts = [build_context(CLASSES[0], JPEGBaseline8Bit)]
    with listening(folder) as receiver, sender(receiver, contexts) as association:
        assert association.send_c_store(tmp_path / "image.dcm").Status == 0x0000
    (kept,) = stored(folder)
    assert pydicom.dcmread(kept).PixelData == dataset.PixelData


def test_an_instance_without_a_uid_is_refused(folder: Path) -> None:
    event = type("Event", (), {"request": Dataset()})()
    assert Receiving(folder, Listen("", 0), Heard()).store(event) == 0xC000


def test_what_cxrbatch_sent_to_a_pacs_is_not_taken_back(folder: Path) -> None:
    heard = Heard()
    with listening(folder, heard) as receiver, sender(receiver) as association:
        assert association.send_c_store(instance(make_uid("a capture"))).Status == 0x0124
        assert association.send_c_store(instance()).Status == 0x0000
    assert len(stored(folder)) == 1
    assert [event for event, _ in heard] == ["own_object_refused"]


def test_a_structured_report_is_offered_no_context(folder: Path) -> None:
    report = "1.2.840.10008.5.1.4.1.1.88.34"
    with listening(folder) as receiver, sender(receiver, [build_context(report)]) as association:
        assert not association.accepted_contexts
