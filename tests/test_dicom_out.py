"""Captures and reports: valid DICOM, of the right study, the same object for the same result; never taken as input."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from time import tzset

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from cxrbatch import unexpected
from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes
from cxrbatch.own_objects import is_own_uid, make_uid
from cxrbatch.samples.dicom import write_dicom
from cxrbatch.store import Store
from cxrbatch.store.reported import Reported, Selection, all_reported
from dicom_results import record_files, source, written

pytest.importorskip("highdicom")

from cxrbatch.dicom_out.codes import finding_of
from cxrbatch.dicom_out.drawing import draw_capture
from cxrbatch.dicom_out.objects import KINDS, NotMade, make_objects

HEAT = np.linspace(0, 1, 49, dtype=np.float32).reshape(7, 7)
READER_MOMENT = datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC)
#: Of SOP classes that hold words about images: Basic Text, Comprehensive 3D, and a dose report.
REPORTS = ["1.2.840.10008.5.1.4.1.1.88.11", "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.67"]


@pytest.fixture
def reported(tmp_path: Path) -> Reported:
    return stored(tmp_path, written(tmp_path / "in", ReferringPhysicianName="REFERRER^R"))


def stored(folder: Path, paths: list[Path], **more: object) -> Reported:
    with Store.open(f"sqlite:///{folder / 'store.db'}") as store:
        record_files(store, paths, **more)  # type: ignore[arg-type]
        return next(all_reported(store.engine, Selection()))


def made_of(reported: Reported, with_map: bool = True) -> dict[str, Dataset]:
    explain = (lambda data, said: HEAT) if with_map else (lambda data, said: None)
    return {one.kind: pydicom.dcmread(_bytes(one.encoded)) for one in make_objects(reported, KINDS, Limits(), explain)}


def _bytes(data: bytes) -> pydicom.filebase.DicomBytesIO:
    return pydicom.filebase.DicomBytesIO(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["PNEUMONIA", "NOT_CHEST", "SOMETHING_NEW", "PLEURAL_EFFUSION_LEFT"])
def test_objects_are_valid(tmp_path: Path, kind: str, label: str) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("needs the Debian package dicom3tools")
    said = stored(tmp_path, written(tmp_path / "in"), label=label)
    file = tmp_path / "object.dcm"
    file.write_bytes(next(one.encoded for one in make_objects(said, KINDS, Limits()) if one.kind == kind))
    checked = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, errors="replace")
    errors = [line for line in (checked.stdout + checked.stderr).splitlines() if line.startswith("Error")]
    assert not errors and checked.returncode == 0


def test_a_report_can_be_read_by_dsrdump(reported: Reported, tmp_path: Path) -> None:
    if shutil.which("dsrdump") is None:
        pytest.skip("needs the Debian package dcmtk")
    file = tmp_path / "object.dcm"
    file.write_bytes(make_objects(reported, ["sr"], Limits())[0].encoded)
    shown = subprocess.run(["dsrdump", "+Pl", str(file)], capture_output=True, text=True, check=True).stdout
    for words in (
        '(233604007,SCT,"Pneumonia")',
        '"Certainty of Finding")="87.31" (%',
        '"Threshold for reporting")="91.0" (%',
        f'"manifest sha256 {reported.manifest_sha256}"',
        '(NEEDS_REVIEW,99CXRBATCH,"Needs review by a reader")',
        '(POSSIBLE,99CXRBATCH,"Not chosen, not ruled out (label set)")',
        '(CHOSEN,99CXRBATCH,"Chosen")',
        '"Probability of any abnormality")="90.0"',
        '"Image quality: polarity_suspect"',
        "For research use; decision support only, not a diagnosis.",
        "Verification Flag   : UNVERIFIED",
        "Preliminary Flag    : PRELIMINARY",
        "Completion Flag     : COMPLETE",
    ):
        assert words in shown


def test_objects_belong_to_the_sources_patient_and_study(reported: Reported) -> None:
    original = pydicom.dcmread(reported.paths[0])
    for dataset in made_of(reported).values():
        for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
            assert dataset[keyword].value == original[keyword].value, keyword
        assert dataset.ReferringPhysicianName == "REFERRER^R"
        assert dataset.SeriesInstanceUID != original.SeriesInstanceUID
        assert is_own_uid(dataset.SOPInstanceUID) and not is_own_uid(original.SOPInstanceUID)
        assert "not for diagnosis" in dataset.SeriesDescription
    capture, report = made_of(reported).values()
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == original.SOPInstanceUID
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    referenced = study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert referenced == original.SOPInstanceUID
    assert capture.BurnedInAnnotation == "YES" and capture.ImageLaterality == "U"


def test_a_source_without_burned_in_names_gives_a_capture_without(tmp_path: Path) -> None:
    said = stored(tmp_path, written(tmp_path / "in", BurnedInAnnotation="NO", ImageLaterality="L"))
    assert made_of(said)["sc"].BurnedInAnnotation == "NO"
    assert made_of(said)["sc"].ImageLaterality == "L"


def test_names_keep_their_letters(tmp_path: Path) -> None:
    names = {"SpecificCharacterSet": "ISO_IR 144", "PatientName": "Люкceмбypг"}
    said = stored(tmp_path, written(tmp_path / "in", **names))
    assert {str(dataset.PatientName) for dataset in made_of(said).values()} == {"Люкceмбypг"}


def test_names_keep_their_bytes_where_the_source_names_another_character_set(tmp_path: Path) -> None:
    (path,) = written(tmp_path / "in", SpecificCharacterSet="ISO_IR 192", PatientName="M_ller^J_rg", PatientID="N_1")
    path.write_bytes(path.read_bytes().replace(b"M_ller^J_rg", b"M\xfcller^J\xf6rg").replace(b"N_1", b"N\xb01"))
    for dataset in made_of(stored(tmp_path, [path])).values():
        assert dataset.get_item("PatientName").value == b"M\xfcller^J\xf6rg "
        assert dataset.get_item("PatientID").value == b"N\xb01 "


def test_a_label_of_any_letters_is_the_same_words_in_every_character_set(tmp_path: Path) -> None:
    names = {"SpecificCharacterSet": "ISO_IR 144", "PatientName": "Люкceмбypг"}
    said = stored(tmp_path, written(tmp_path / "in", **names), label="RÖ\\NT")
    report = made_of(said, with_map=False)["sr"]
    assert "'RU00D6U005CNT'" in str(report)
    assert report.PatientName == "Люкceмбypг"


@pytest.mark.parametrize("series", ["", "1.2..3"])
def test_a_report_names_a_series_where_the_source_names_none(tmp_path: Path, series: str) -> None:
    said = stored(tmp_path, written(tmp_path / "in", SeriesInstanceUID=series))
    (study,) = made_of(said, with_map=False)["sr"].CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert is_own_uid(series.SeriesInstanceUID) and len(series.ReferencedSOPSequence) == 1


def test_an_empty_character_set_is_not_passed_on_and_two_studies_are_none(tmp_path: Path) -> None:
    said = stored(tmp_path, written(tmp_path / "in", SpecificCharacterSet=""))
    assert all("SpecificCharacterSet" not in dataset for dataset in made_of(said, with_map=False).values())
    (path,) = written(tmp_path / "two", StudyInstanceUID=["1.2.3", "1.2.4"])
    with pytest.raises(NotMade, match="no_study"):
        make_objects(replace(said, paths=(str(path),), sha256=sha256(path.read_bytes()).hexdigest()), KINDS, Limits())


def test_a_study_uid_with_leading_zeros_is_passed_on(tmp_path: Path) -> None:
    said = stored(tmp_path, written(tmp_path / "in", StudyInstanceUID="1.2.03"))
    assert {str(dataset.StudyInstanceUID) for dataset in made_of(said).values()} == {"1.2.03"}


def test_the_same_result_is_the_same_object_and_another_one_is_not(reported: Reported) -> None:
    first = make_objects(reported, KINDS, Limits())
    assert [one.encoded for one in make_objects(reported, KINDS, Limits())] == [one.encoded for one in first]
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    others = [
        replace(reported, manifest_sha256="d" * 64),
        replace(reported, final_label="NORMAL", reviewed_at=moment),
        replace(reported, final_label="COVID19", reviewed_at=moment),
        replace(reported, final_label="NORMAL", reviewed_at=moment + timedelta(seconds=1)),
    ]
    uids = {one.sop_instance_uid for said in (reported, *others) for one in make_objects(said, KINDS, Limits())}
    uids |= {one.sop_instance_uid for one in make_objects(reported, ["sc"], Limits(), lambda data, said: HEAT)}
    assert len(uids) == 2 * 5 + 1


def test_the_readers_label_is_in_the_report(reported: Reported) -> None:
    read = replace(reported, final_label="TUBERCULOSIS", reviewed_at=READER_MOMENT)
    report = made_of(read)["sr"]
    groups = report.ContentSequence[-1].ContentSequence
    found = [
        item.ConceptCodeSequence[0].CodeValue for item in groups[-1].ContentSequence if "ConceptCodeSequence" in item
    ]
    assert finding_of("TUBERCULOSIS").value in found and "READER" in found
    assert datetime.strptime(report.ContentDate + report.ContentTime, "%Y%m%d%H%M%S").astimezone() == READER_MOMENT


@pytest.mark.parametrize(
    ("offset", "date", "time"),
    [("", "21000102", "120405"), ("-0330", "21000101", "233405"), ("+9900", "21000102", "120405")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_times_are_in_the_zone_of_the_source_or_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, offset: str, date: str, time: str
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    tzset()
    try:
        elements = {"TimezoneOffsetFromUTC": offset, "StudyTime": "070809"} if offset else {"StudyTime": "070809"}
        said = replace(stored(tmp_path, written(tmp_path / "in", **elements)), reviewed_at=READER_MOMENT)
        made = made_of(said)[kind]
    finally:
        monkeypatch.undo()
        tzset()
    assert made.get("TimezoneOffsetFromUTC", "") == offset.replace("+9900", "") and made.StudyTime == "070809"
    assert {(made[f"{what}Date"].value, made[f"{what}Time"].value) for what in ("Content", "Series")} == {(date, time)}


def test_labels_that_begin_alike_are_two_findings(reported: Reported) -> None:
    sides = ("PLEURAL_EFFUSION_LEFT", "PLEURAL_EFFUSION_RIGHT")
    said = replace(reported, label=sides[0], probabilities=((sides[0], 0.6), (sides[1], 0.4)))
    codes = [element.value for element in made_of(said)["sr"].iterall() if element.keyword == "LongCodeValue"]
    assert set(codes) == set(sides)


def test_a_source_that_changed_is_refused_and_one_that_is_gone_may_come_back(reported: Reported) -> None:
    path = Path(reported.paths[0])
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(NotMade, match="source_changed") as caught:
        make_objects(reported, ["sr"], Limits())
    assert not caught.value.may_pass
    path.unlink()
    with pytest.raises(NotMade, match="source_missing") as caught:
        make_objects(reported, ["sr"], Limits())
    assert caught.value.may_pass


def test_a_source_in_a_bucket_is_refused_and_not_called_missing(reported: Reported) -> None:
    with pytest.raises(NotMade, match="source_in_bucket") as caught:
        make_objects(replace(reported, paths=("s3://bucket/in/a.dcm",)), KINDS, Limits())
    assert not caught.value.may_pass


def test_a_source_without_a_study_is_refused_with_a_reason(tmp_path: Path) -> None:
    said = stored(tmp_path, written(tmp_path / "in", StudyInstanceUID=""))
    with pytest.raises(NotMade, match="no_study"):
        make_objects(said, KINDS, Limits())


def test_text_stays_in_its_bands(reported: Reported) -> None:
    """The images are pasted, not drawn on: what is between the bands is the image and nothing else."""
    black = np.zeros((512, 400), np.uint8)
    capture = draw_capture(reported, black, None)
    assert capture[70:860].max() == 0  # 64 rows of header, 800 of image
    assert capture[:64].max() > 200 and capture[870:].max() > 200


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_objects_are_no_input(reported: Reported, kind: str) -> None:
    dataset = made_of(reported)[kind]
    assert reason(dataset) == ReasonCode.OWN_OUTPUT
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"  # copied under new UIDs
    assert reason(dataset) == ReasonCode.OWN_OUTPUT
    dataset.Manufacturer = "somebody's gateway"
    assert reason(dataset) == ReasonCode.OWN_OUTPUT  # by its series
    dataset.SeriesDescription = "X"
    dataset.SOPInstanceUID = make_uid("anything")
    assert reason(dataset) == ReasonCode.OWN_OUTPUT  # by its UID


@pytest.mark.parametrize("sop_class", REPORTS)
def test_reports_of_others_are_no_input(sop_class: str) -> None:
    dataset = source(SOPClassUID=sop_class)
    del dataset.PixelData
    assert reason(dataset) == ReasonCode.STRUCTURED_REPORT


def test_other_images_are_input_still() -> None:
    data = write_dicom(source(Manufacturer="cxrbatch samples (synthetic)", SeriesDescription="chest pa"))
    assert decode_bytes(data, (), Limits(), Identifiers("drop")).facts.format == "dicom"


def reason(dataset: Dataset) -> ReasonCode:
    with pytest.raises(Rejected) as caught:
        decode_bytes(write_dicom(dataset), (), Limits(), Identifiers("drop"))
    return caught.value.reason_code


@pytest.mark.parametrize(
    "uid", ["", "1.2.3", "2.25.", "2.25.-1", "2.25.1", f"2.25.{2**128}", "2.25.9" + "9" * 60, "2.25.x"]
)
def test_no_other_uid_passes_for_ours(uid: str) -> None:
    assert not is_own_uid(uid)


def test_uids_are_valid_and_known_again() -> None:
    for number in range(200):
        uid = make_uid("a", str(number))
        assert is_own_uid(uid) and len(uid) <= 64 and pydicom.uid.UID(uid).is_valid
        last = uid[:-1] + ("0" if uid[-1] != "0" else "1")
        assert not is_own_uid(last)


@pytest.mark.parametrize("bug", [RuntimeError, ValueError, AttributeError])
def test_a_bug_of_ours_is_reported_and_tried_again_and_not_said_of_the_header(
    reported: Reported, bug: type[Exception]
) -> None:
    def explain(data: bytes, said: Reported) -> None:
        raise bug("CUDA error at REFERRER^R")

    before = unexpected.total()
    with pytest.raises(NotMade, match="unexpected_error") as caught:
        make_objects(reported, KINDS, Limits(), explain)
    assert caught.value.may_pass and unexpected.total() == before + 1
    assert "REFERRER" not in str(caught.value)


@pytest.mark.parametrize(
    ("elements", "why"),
    [
        ({"SOPClassUID": "1.2.840.99"}, "SOP class"),
        ({"StudyInstanceUID": "1.2.abc"}, "digits and dots"),
        ({"StudyInstanceUID": "1." + "2" * 70}, "digits and dots"),
        ({"SOPInstanceUID": "1..2"}, "digits and dots"),
        ({"SOPInstanceUID": "1.2²"}, "digits and dots"),
    ],
)
def test_a_bad_header_is_a_final_reason_and_no_bug(tmp_path: Path, elements: dict[str, str], why: str) -> None:
    said = stored(tmp_path, written(tmp_path / "in", **elements))
    before = unexpected.total()
    with pytest.raises(NotMade, match=f"header_unusable.*{why}") as caught:
        make_objects(said, KINDS, Limits())
    assert not caught.value.may_pass and unexpected.total() == before
