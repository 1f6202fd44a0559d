"""40 names and IDs that must not appear in a log, an error, an export or the store (phi = "hash")."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom
import pytest
import structlog
from pynetdicom import AE, build_context

from cxrbatch import unexpected
from cxrbatch.errors import ExitCode
from cxrbatch.ops import logs
from cxrbatch.ops.key_file import identifiers_of
from cxrbatch.settings import Settings
from factories import make_bundle
from test_metrics import free_port, get, value
from test_receiver import CLASSES, instance, listening
from watchers import Place

pytestmark = pytest.mark.timeout(600)

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def planted() -> list[str]:
    chance = random.Random(40)
    return ["".join(chance.choices(LETTERS, k=12)) for _ in range(40)]


def with_names(dataset: pydicom.FileDataset, names: Iterator[str]) -> pydicom.FileDataset:
    """Each of the eight places for an identity gets its own name."""
    dataset.PatientName, dataset.PatientID = next(names), next(names)
    dataset.AccessionNumber = next(names)
    dataset.ReferringPhysicianName, dataset.OperatorsName = next(names), next(names)
    dataset.OtherPatientIDs = next(names)
    dataset.InstitutionName, dataset.PatientAddress = next(names), next(names)
    return dataset


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", make_bundle(tmp_path / "bundle"), ("-v",))
    yield made
    made.clean_up()


def test_no_planted_name_leaves_by_any_path(place: Place) -> None:
    names = planted()
    queue = iter(names)
    images = [with_names(instance(seed=seed), queue) for seed in range(4)]
    images[0].save_as(place.incoming / "good.dcm", enforce_file_format=True)
    images[1].save_as(place.incoming / "cut.dcm", enforce_file_format=True)
    with open(place.incoming / "cut.dcm", "r+b") as file:
        file.truncate(2000)
    images[2].BitsAllocated = 13  # nobody defines such pixels
    images[2].save_as(place.incoming / "odd.dcm", enforce_file_format=True)
    for name in queue:
        if name == names[32]:  # of the four places that are left for the network
            break
        (place.incoming / f"{name[:1]}.txt").write_text(f"Patient: {name}")
    metrics = free_port()
    options = ("--listen", "127.0.0.1:0", "--poll", "always", "--metrics", f"127.0.0.1:{metrics}")
    daemon = place.start(*options, command="watch", CXRBATCH_TRUNCATED_TRIES="1")
    place.wait(lambda: "receiving" in place.log and place.settled(), daemon)
    port = int(place.log.partition("port=")[2].split()[0])
    entity = AE(ae_title=names[33])  # the calling title is a name as well
    entity.requested_contexts = [build_context(CLASSES[0], "1.2.840.10008.1.2.1")]
    association = entity.associate("127.0.0.1", port, ae_title=names[34])
    assert association.is_established
    assert association.send_c_store(images[3]).Status == 0
    association.release()
    place.wait(lambda: len(place.rows()) > 3 and place.settled(), daemon)
    for page in ("metrics", "healthz", "readyz"):
        (place.cwd / page).write_text(get(metrics, f"/{page}")[1])
    assert value((place.cwd / "metrics").read_text(), "received_instances_total", result="stored") == 1
    assert place.stop(daemon) == 0
    assert place.run(command="status") == ExitCode.OK  # into log.txt
    assert place.run("all.csv", command="export") == ExitCode.OK
    assert place.run("all.jsonl", command="export") == ExitCode.OK
    assert place.run(place.incoming / "odd.dcm", command="show") == ExitCode.OK
    kept = {path.name: path.read_bytes() for path in place.cwd.iterdir() if path.is_file()}
    assert {"log.txt", "store.db", "all.csv", "all.jsonl", "metrics", "healthz", "readyz"} <= kept.keys()
    for file, content in kept.items():
        for name in names:
            assert name.encode() not in content, (name, file)
            assert name.encode("utf-16-le") not in content, (name, file)


def test_the_log_prints_listed_keys_and_nothing_a_library_says(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    before = (sys.excepthook, logging.root.handlers[:], logging.root.level, structlog.get_config())
    name = "DOE^JANE"
    try:
        for format in ("console", "json"):
            logs.listen_to_everything(format, logging.DEBUG)  # type: ignore[arg-type]
            logs.log.info("progress", done=3, patient=name, path=f"/in/{name}.dcm")
            for library in ("pydicom", "pynetdicom", "pynetdicom.acse", "PIL", "sqlalchemy.engine", "nobody"):
                logging.getLogger(library).critical("Invalid value for %s", name)
            warnings.warn(f"The value {name!r} is odd", stacklevel=1)
            try:
                raise ValueError(name)
            except ValueError as error:
                sys.excepthook(ValueError, error, error.__traceback__)
                logging.getLogger("nobody").exception(error)
                unexpected.report(error)
    finally:
        sys.excepthook = before[0]
        logging.captureWarnings(False)
        logging.root.handlers[:], level = before[1], before[2]
        logging.root.setLevel(level)
        structlog.configure(**before[3])
    said = capsys.readouterr().err
    assert name not in said and "DOE" not in said
    assert "progress done=3" in said and '"event": "progress"' in said
    assert "library=nobody" in said and "uncaught error=ValueError" in said
    assert "unexpected_error error=ValueError where=test_watch_privacy.py:" in said


def test_a_receiver_at_debug_says_nothing_of_its_peers(folder_in: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with listening(folder_in) as receiver:
        entity = AE(ae_title="JANE DOE")
        entity.requested_contexts = [build_context(CLASSES[0], "1.2.840.10008.1.2.1")]
        association = entity.associate(receiver.host, receiver.port)
        association.send_c_store(with_names(instance(), iter(planted())))
        association.release()
    assert not [record for record in caplog.records if record.name.startswith(("pynetdicom", "pydicom"))]


@pytest.fixture
def folder_in(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_programs_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    settings = Settings(id_key_file=str(tmp_path / "key"))
    with ThreadPoolExecutor(16) as pool:
        keys = {future.result().key for future in [pool.submit(identifiers_of, settings) for _ in range(64)]}
    assert len(keys) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
