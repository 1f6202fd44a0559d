"""Results that arrive: in the right study, each once, through kills and through a PACS that is away for a while."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.filebase import DicomBytesIO
from pynetdicom import AE, evt
from pynetdicom.events import Event
from sqlalchemy import update

from cxrbatch.errors import Fatal
from cxrbatch.imaging.limits import Limits
from cxrbatch.ops.dispatch import pause_after
from cxrbatch.ops.trace import print_trace
from cxrbatch.settings import SendTo, Settings
from cxrbatch.store import RetryPolicy, Store
from cxrbatch.store.reported import Selection, all_reported
from cxrbatch.store.schema import outbox
from dicom_results import OUTBOX_POINTS, record_files, written
from factories import make_bundle
from pacs import Pacs, free_port, needs_orthanc
from store_images import begin, scored_file
from test_watch_privacy import planted, with_names
from watchers import Place

pytest.importorskip("highdicom")
pytest.importorskip("dicomweb_client")

from cxrbatch.dicom_out.objects import MadeObject, make_objects
from cxrbatch.dicom_out.send import Status, open_destination, parse_destination
from cxrbatch.ops.sender import sender_of

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pacs]:
    made = Pacs.make(tmp_path_factory.mktemp("orthanc") / "pacs")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "no bundle")
    yield made
    made.clean_up()


def filled(place: Place, number: int, **elements: object) -> set[str]:
    """Sources that nobody else has, recorded; returns their studies."""
    import uuid

    study = f"2.25.{uuid.uuid4().int}"
    paths = written(place.incoming, number, StudyInstanceUID=study, **elements)
    with Store.open(place.url) as store:
        record_files(store, paths)
    return {study}


def send(place: Place, to: str, **env: str) -> int:
    return place.run(to, command="send", CXRBATCH_LEASE_S="2", CXRBATCH_SEND_GRADCAM="false", **env)


def of_study(pacs: Pacs, studies: set[str]) -> dict[str, dict[str, str]]:
    return {uid: tags for uid, tags in pacs.instances().items() if tags["StudyInstanceUID"] in studies}


def states(place: Place) -> list[tuple[str, str]]:
    return sorted(place.ask("SELECT state, last_status FROM outbox"))


@needs_orthanc
@pytest.mark.parametrize("way", ["dicom", "web"])
def test_captures_and_reports_arrive_in_their_study_once(pacs: Pacs, place: Place, way: str) -> None:
    studies = filled(place, 2)
    to = getattr(pacs, way)
    assert send(place, to) == 0, place.log
    arrived = of_study(pacs, studies)
    assert sorted(tags["Modality"] for tags in arrived.values()) == ["OT", "OT", "SR", "SR"]
    assert {uid for (uid,) in place.ask("SELECT sop_instance_uid FROM outbox")} == set(arrived)
    assert {state for state, _ in states(place)} == {"sent"}
    assert send(place, to) == 0 and place.log.splitlines()[-1].startswith("0 object(s) sent")
    ids = [str(row[0]) for row in place.ask("SELECT id FROM outbox")]
    assert place.run("retry", *ids, command="outbox") == 0
    assert send(place, to) == 0
    assert of_study(pacs, studies).keys() == arrived.keys()
    report = dcmread(DicomBytesIO(pacs.file(next(uid for uid, tags in arrived.items() if tags["Modality"] == "SR"))))
    assert report.VerificationFlag == "UNVERIFIED"


@needs_orthanc
@pytest.mark.parametrize("point", [*OUTBOX_POINTS, "outbox.answered:2", "outbox.record.before_commit:2"])
def test_a_kill_at_any_point_loses_and_doubles_nothing(pacs: Pacs, place: Place, point: str) -> None:
    studies = filled(place, 1)
    assert send(place, pacs.dicom, CXRBATCH_FAILPOINT=point) == -9
    assert send(place, pacs.dicom) == 0, place.log
    assert len(of_study(pacs, studies)) == 2
    assert states(place) == [("sent", "0x0000")] * 2
    assert place.ask("PRAGMA integrity_check") == [("ok",)]


@needs_orthanc
def test_a_pacs_that_is_away_gets_everything_when_it_is_back(tmp_path: Path, place: Place) -> None:
    pacs = Pacs.make(tmp_path / "pacs")
    studies = filled(place, 2)
    assert send(place, pacs.dicom) == 3
    assert "does not answer" in place.log
    assert {state for state, _ in states(place)} == {"waiting"}
    pacs.start()
    try:
        assert send(place, pacs.dicom) == 0, place.log
        assert len(of_study(pacs, studies)) == 4
    finally:
        pacs.stop()


@needs_orthanc
def test_watch_sends_as_it_goes_through_an_outage(tmp_path: Path) -> None:
    pacs = Pacs.make(tmp_path / "pacs")
    place = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", make_bundle(tmp_path / "bundle"))
    destination = {"name": "pacs", "url": pacs.dicom, "decisions": []}
    env = {"CXRBATCH_SEND_TO": json.dumps([destination]), "CXRBATCH_SEND_GRADCAM": "false"}
    daemon = place.start("--poll", "always", command="watch", **env)
    try:
        written(place.incoming, 2)
        place.wait(lambda: "destination_unreachable" in place.log and place.settled(), daemon)
        pacs.start()
        place.wait(lambda: states(place) == [("sent", "0x0000")] * 4, daemon)
        assert len(pacs.instances()) == 4
        # The results come back as files: refused, and nothing more is sent.
        for number, uid in enumerate(pacs.instances()):
            (place.incoming / f"back{number}.dcm").write_bytes(pacs.file(uid))
        place.wait(lambda: len(place.rows()) == 6 and place.settled(), daemon)
        reasons = sorted(str(row[3]) for row in place.rows().values())
        assert reasons == ["None", "None"] + ["own_output"] * 4
        assert place.stop(daemon) == 0
        assert len(pacs.instances()) == 4
    finally:
        place.clean_up()
        pacs.stop()


@needs_orthanc
def test_watch_once_ends_when_what_it_found_was_sent(pacs: Pacs, tmp_path: Path) -> None:
    place = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", make_bundle(tmp_path / "bundle"))
    written(place.incoming, 1, StudyInstanceUID="1.2.826.77")
    destination = {"name": "pacs", "url": pacs.web, "decisions": [], "kinds": ["sr"]}
    env = {"CXRBATCH_SEND_TO": json.dumps([destination])}
    try:
        assert place.run("--once", command="watch", **env) == 0, place.log
        assert [tags["Modality"] for tags in of_study(pacs, {"1.2.826.77"}).values()] == ["SR"]
    finally:
        place.clean_up()


class Answers:
    """A storage server that answers as it is told."""

    def __init__(self, status: int, classes: tuple[str, ...], tls: ssl.SSLContext | None = None) -> None:
        self.status, self.seen, self.port = status, 0, free_port()
        entity = AE(ae_title="ODD")
        for sop_class in classes:
            entity.add_supported_context(sop_class)
        self.server = entity.start_server(
            ("127.0.0.1", self.port),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, self.store)],
            ssl_context=tls,
        )

    def store(self, event: Event) -> int:
        self.seen += 1
        return self.status


CAPTURE, REPORT = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.34"


@pytest.mark.parametrize(
    ("status", "state"),
    [(0x0000, "sent"), (0xB000, "sent"), (0xA700, "waiting"), (0xA900, "refused"), (0xC001, "refused")],
)
def test_only_success_counts_as_sent(place: Place, status: int, state: str) -> None:
    filled(place, 1)
    pacs = Answers(status, (CAPTURE, REPORT))
    try:
        code = send(
            place, f"dicom://ODD@127.0.0.1:{pacs.port}", CXRBATCH_RETRY_FIRST_S="60", CXRBATCH_RETRY_MOST_S="60"
        )
    finally:
        assert pacs.server is not None
        pacs.server.shutdown()
    assert states(place) == [(state, f"0x{status:04X}")] * 2
    assert pacs.seen == 2 and code == (0 if state == "sent" else 3)
    assert ("2 of them stored with a warning" in place.log) == (status == 0xB000), place.log


def test_watch_logs_that_something_was_stored_with_a_warning(tmp_path: Path) -> None:
    place = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", make_bundle(tmp_path / "bundle"))
    filled(place, 1, PatientName="PLANTED^NAME")
    pacs = Answers(0xB007, (CAPTURE, REPORT))
    destination = {"name": "odd", "url": f"dicom://ODD@127.0.0.1:{pacs.port}", "decisions": []}
    env = {"CXRBATCH_SEND_TO": json.dumps([destination]), "CXRBATCH_SEND_GRADCAM": "false"}
    try:
        assert place.run("--once", command="watch", **env) == 0, place.log
    finally:
        pacs.server.shutdown()
        place.clean_up()
    lines = [line for line in place.log.splitlines() if "stored_with_warning" in line]
    assert lines and all("odd" in line for line in lines) and "PLANTED" not in place.log


UID_OF_OURS = re.compile(rb"(?<=\x08\x00\x18\x00UI..)2\.25\.\d+", re.S)  # SOPInstanceUID, explicit VR


class _Warns(BaseHTTPRequestHandler):
    """A DICOMweb service that stores everything, and coerces (WarningReason B000)."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        uid = UID_OF_OURS.search(body)
        assert uid is not None
        item = {"00081155": {"vr": "UI", "Value": [uid[0].decode()]}, "00081196": {"vr": "US", "Value": [0xB000]}}
        answer = json.dumps({"00081199": {"vr": "SQ", "Value": [item]}}).encode()
        self.send_response(202)
        self.send_header("Content-Type", "application/dicom+json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None: ...


def stowed(folder: Path, service: type[BaseHTTPRequestHandler], path: str) -> Status:
    """What is made of the answer of a DICOMweb service to one report."""
    paths = written(folder / "in")
    with Store.open(f"sqlite:///{folder / 'store.db'}") as store:
        record_files(store, paths)
        (made,) = make_objects(next(all_reported(store.engine, Selection())), ["sr"], Limits())
    with ThreadingHTTPServer(("127.0.0.1", 0), service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sending = open_destination(parse_destination(f"http://127.0.0.1:{server.server_port}/{path}"))
        status = sending.send(made)
        sending.close()
        server.shutdown()
    return status


def test_a_warning_of_stow_is_told_too(tmp_path: Path) -> None:
    status = stowed(tmp_path, _Warns, "dicom-web")
    assert status == Status("0xB000", stored=True, warned=True)


class _Login(BaseHTTPRequestHandler):
    """A proxy in front of a PACS that asks for a login first."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/redirected"):
            self.send_response(302)
            self.send_header("Location", "/login")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.do_GET()

    def do_GET(self) -> None:
        page = b"<html>Log in"
        self.send_response(200)
        kind = "application/dicom+json" if self.path.startswith("/json") else "text/html; charset=utf-8"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.parametrize(
    ("path", "code"), [("redirected", "http 302"), ("page", "answer_unreadable"), ("json", "answer_unreadable")]
)
def test_the_login_page_of_a_proxy_is_not_called_stored(tmp_path: Path, path: str, code: str) -> None:
    status = stowed(tmp_path, _Login, path)
    assert status == Status(code, stored=False, may_pass=code == "answer_unreadable")


def certificate(folder: Path, name: str) -> tuple[str, str]:
    """The paths of a key and of a certificate that it signed itself, for this machine."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{name}.key", "-out", f"{name}.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return str(folder / f"{name}.key"), str(folder / f"{name}.pem")


STORESCP = shutil.which("storescp", path="/usr/bin:/usr/local/bin")  # dcmtk's; pynetdicom installs one of that name
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@needs_openssl
@pytest.mark.skipif(STORESCP is None, reason="needs the Debian package dcmtk")
@pytest.mark.parametrize("scheme", ["dicom", "dicoms"])
def test_a_pacs_that_stops_reading_holds_nobody_up(tmp_path: Path, scheme: str) -> None:
    key, signed = certificate(tmp_path, "pacs")
    tls = ["+tls", key, signed, "--ignore-peer-cert"] if scheme == "dicoms" else []
    paths = written(tmp_path / "in")
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        record_files(store, paths)
        (made,) = make_objects(next(all_reported(store.engine, Selection())), ["sc"], Limits())
    made.dataset.PixelData = bytes(32 << 20)  # more than the sockets hold
    port = free_port()
    assert STORESCP is not None
    with subprocess.Popen([STORESCP, *tls, "--ignore", "--sleep-during", "600", str(port)]) as pacs:
        try:
            to = replace(parse_destination(f"{scheme}://ANY@127.0.0.1:{port}", tls_ca=signed), timeout_s=2)
            status = Status("no_connection", stored=False)
            while status.code == "no_connection" and pacs.poll() is None:  # it starts
                sending = open_destination(to)
                status = sending.send(made)
            sending.close()
        finally:
            pacs.kill()
    assert status == Status("no_answer", stored=False, may_pass=True)


@needs_openssl
def test_tls_sends_to_whom_it_knows_only(place: Place) -> None:
    for name in ("pacs", "stranger"):
        certificate(place.cwd, name)
    filled(place, 1)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(place.cwd / "pacs.pem"))
    context.load_cert_chain(place.cwd / "pacs.pem", place.cwd / "pacs.key")
    context.verify_mode = ssl.CERT_REQUIRED
    pacs = Answers(0, (CAPTURE, REPORT), context)
    files = {"tls_certificate": str(place.cwd / "pacs.pem"), "tls_key": str(place.cwd / "pacs.key")}
    known = {"name": "pacs", "url": f"dicoms://ODD@127.0.0.1:{pacs.port}", **files}
    try:
        for ca, code, seen in (("stranger.pem", 3, 0), ("pacs.pem", 0, 2)):
            to = json.dumps([known | {"tls_ca": str(place.cwd / ca)}])
            assert send(place, "pacs", CXRBATCH_SEND_TO=to) == code, place.log
            assert pacs.seen == seen
        to = json.dumps([known | {"tls_ca": "none.pem"}])
        assert send(place, "pacs", CXRBATCH_SEND_TO=to) == 0  # nothing is left to send
    finally:
        assert pacs.server is not None
        pacs.server.shutdown()


def test_a_class_that_the_destination_does_not_take_is_a_reason(place: Place) -> None:
    filled(place, 1)
    pacs = Answers(0, (CAPTURE,))
    try:
        assert send(place, f"dicom://ODD@127.0.0.1:{pacs.port}") == 3
    finally:
        assert pacs.server is not None
        pacs.server.shutdown()
    assert states(place) == [("refused", "context_refused"), ("sent", "0x0000")]


def test_no_planted_name_gets_into_the_log_the_outbox_or_the_terminal(place: Place) -> None:
    names = planted()
    queue = iter(names)
    paths = written(place.incoming, 5)
    for path in paths:
        with_names(dcmread(path), queue).save_as(path)
    with Store.open(place.url) as store:
        record_files(store, paths)
    paths[0].write_bytes(paths[0].read_bytes()[:-2] + b"\x07\x07")  # changed: refused
    pacs = Answers(0xC001, (CAPTURE,))
    try:
        for _ in range(2):
            send(place, f"dicom://ODD@127.0.0.1:{pacs.port}")
        send(place, f"http://127.0.0.1:{pacs.port}/dicom-web")  # no DICOMweb there
        place.run("list", command="outbox")
    finally:
        assert pacs.server is not None
        pacs.server.shutdown()
    assert {status for _, status in states(place)} >= {"0xC001", "context_refused", "source_changed"}
    kept = {path.name: path.read_bytes() for path in place.cwd.iterdir() if path.is_file()}
    assert {"log.txt", "store.db"} <= kept.keys()
    for file, content in kept.items():
        assert not [name for name in names if name.encode() in content], file


def test_images_without_a_study_are_a_sentence(place: Place) -> None:
    png = place.incoming / "a.png"
    png.write_bytes(b"x")
    with Store.open(place.url) as store:
        record_files(store, [png])
    assert send(place, "dicom://A@127.0.0.1:1") == 1
    assert place.run("--dicom", "out", command="export") == 1
    assert place.log.count("None of these images came as DICOM") == 2


def test_export_writes_both_kinds_and_says_what_is_left_out(place: Place) -> None:
    filled(place, 2)
    (place.incoming / "1.dcm").unlink()
    assert place.run("--dicom", "out", command="export", CXRBATCH_SEND_GRADCAM="false") == 3
    assert sorted(path.name[-7:] for path in (place.cwd / "out").rglob("*.dcm")) == ["-sc.dcm", "-sr.dcm"]
    assert "1 image(s) left out: The source is gone" in place.log


@pytest.mark.parametrize(("answers", "tried"), [("no no no no no no", 2), ("no yes no yes yes no", 6)])
def test_a_destination_that_answers_nothing_any_more_is_tried_later(place: Place, answers: str, tried: int) -> None:
    """One object that a PACS chokes on holds up no other one."""
    filled(place, 3)
    said = iter(answers.split())

    class Way:
        def send(self, made: MadeObject) -> Status:
            return Status("0x0000", stored=True) if next(said) == "yes" else Status("no_answer", False, may_pass=True)

        def close(self) -> None:
            pass

    stop, to = threading.Event(), SendTo(name="pacs", url="dicom://A@127.0.0.1:1")
    with Store.open(place.url) as store:
        sender = sender_of(Settings(), store, to, lambda data, reported: None, RetryPolicy(stop=stop), stop)
        sender.fill()
        sender._sending = Way()
        done = sender.round()
    assert (done.tried, done.sent, done.unreachable) == (tried, answers.count("yes"), tried == 2)
    assert sorted(state for state, _ in states(place)).count("waiting") == 6 - done.sent


def test_objects_that_are_never_answered_block_no_other_ones(place: Place) -> None:
    filled(place, 3)
    silent: list[str] = []

    class Way:
        def send(self, made: MadeObject) -> Status:
            if len(silent) < 2:
                silent.append(made.sop_instance_uid)
            is_silent = made.sop_instance_uid in silent
            return Status("no_answer", False, may_pass=True) if is_silent else Status("0x0000", stored=True)

        def close(self) -> None: ...

    stop, to = threading.Event(), SendTo(name="pacs", url="dicom://A@127.0.0.1:1")
    with Store.open(place.url) as store:
        sender = sender_of(Settings(), store, to, lambda data, reported: None, RetryPolicy(stop=stop), stop)
        sender.fill()
        sender._sending = Way()
        assert (sender.round().sent, len(silent)) == (0, 2)
        with store.engine.begin() as connection:  # their backoff is over before the destination is looked at again
            connection.execute(update(outbox).values(next_attempt_at=None))
        done = sender.round()
    assert (done.tried, done.sent, done.unreachable) == (6, 4, False)


@pytest.mark.parametrize(
    "url",
    ["", "pacs:104", "dicom://host:104", "dicom://AE@host", "ftp://AE@host:1", "dicom://A-TITLE-OF-17-XXX@h:1",
     "https://user:secret@host/dicom-web", "dicom://AE@host:99999999", "dicom://PÄCS@host:104", "dicom://A\\B@host:104",
     "dicom://AE@host:104?calling=Ä", "dicom://AE@10.0.0..5:104", "https://pacs..example/dicom-web"],
)  # fmt: skip
def test_an_address_that_is_none_is_a_sentence(url: str) -> None:
    with pytest.raises(Fatal) as caught:
        parse_destination(url)
    assert "secret" not in str(caught.value)


def test_looking_for_what_is_new_takes_a_twentieth_of_a_core_at_most() -> None:
    assert [pause_after(look_s) for look_s in (0.0, 0.01, 0.3, 1.0)] == [2.0, 2.0, 6.0, 20.0]
    assert pause_after(600.0) == 60.0  # the first look, which sees everything


def test_addresses() -> None:
    pacs = parse_destination("dicom://PACS@10.0.0.5:104?calling=ME")
    assert (pacs.ae_title, pacs.host, pacs.port, pacs.calling, pacs.tls) == ("PACS", "10.0.0.5", 104, "ME", False)
    assert parse_destination("dicoms://PACS@host:2762").tls
    assert parse_destination("https://host/dicom-web/studies").base_url == "https://host/dicom-web"


def test_a_show_json_tells_what_was_sent(place: Place) -> None:
    filled(place, 1)
    send(place, "dicom://A@127.0.0.1:1")
    (place.cwd / "log.txt").unlink()
    assert place.run("--json", place.incoming / "0.dcm", command="show") == 0
    trace = json.loads(place.log)
    (file,) = trace["files"]
    assert trace["trace_version"] == 1 and file["file"]["state"] == "done"
    assert [row["last_status"] for row in file["sent"]].count("no_connection") == 1
    assert file["predictions"][0]["cascade"]["manifest_sha256"] == "a" * 64
    said = file["predictions"][0]
    assert {row["label"] for row in said["scores"]} >= {"PNEUMONIA", "NORMAL"}
    assert (said["label_set"], said["abnormal_probability"]) == ("PNEUMONIA|COVID19", 0.9)
    assert json.loads(said["scores_json"]).keys() >= {"PNEUMONIA", "NORMAL"}


def test_a_show_json_knows_the_files_of_a_bucket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(db=f"sqlite:///{tmp_path / 'store.db'}")
    with Store.open(settings.db) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("s3://bucket/a/b.dcm")])
    print_trace(settings, "s3://bucket/a/b.dcm")
    assert json.loads(capsys.readouterr().out)["files"][0]["file"]["path"] == "s3://bucket/a/b.dcm"
