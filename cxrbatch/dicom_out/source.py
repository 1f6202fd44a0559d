"""What a result takes over from the image it is about: patient, study, and the reference to it."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.multival import MultiValue

from cxrbatch import __version__
from cxrbatch.dicom_out.codes import plain
from cxrbatch.own_objects import MANUFACTURER, SERIES_DESCRIPTIONS, make_uid
from cxrbatch.store.reported import Reported

__all__ = ["IMPLEMENTATION", "Source", "inherit", "is_uid", "series_of"]

IMPLEMENTATION = "CXRBATCH"  #: ImplementationVersionName, SH

#: Copied as they are, so that the result is filed under the same patient and study (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2).
_INHERITED = (
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_UID = re.compile(r"(?=.{1,64}\Z)\d+(\.\d+)*", re.ASCII)
_OFFSET = re.compile(r"[+-](0\d|1[0-4])[0-5]\d")
#: Type 2: there, and empty where nothing is known.
_REQUIRED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)


@dataclass(frozen=True, slots=True)
class Source:
    """The few values of the source that the objects are built around; all plain text."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    burned_in_annotation: str
    image_laterality: str
    patient_orientation: tuple[str, ...]
    utc_offset: str = ""  # "+0100"; "": its times are local ones

    @classmethod
    def of(cls, header: Dataset) -> Source:
        orientation, instance = header.get("PatientOrientation"), _text(header, "SOPInstanceUID")
        series = _text(header, "SeriesInstanceUID")
        return cls(
            sop_class_uid=_text(header, "SOPClassUID"),
            sop_instance_uid=instance,
            # A report has to name the series of its image (PS3.3 C.17.2.1, Type 1), also where the image does not.
            series_instance_uid=series if is_uid(series) else make_uid("series of", instance),
            study_instance_uid=_text(header, "StudyInstanceUID"),
            burned_in_annotation=_text(header, "BurnedInAnnotation").upper(),
            image_laterality=(_text(header, "ImageLaterality") or _text(header, "Laterality")).upper(),
            patient_orientation=tuple(map(str, orientation)) if isinstance(orientation, MultiValue) else (),
            utc_offset=offset if _OFFSET.fullmatch(offset := _text(header, "TimezoneOffsetFromUTC")) else "",
        )

    def evidence(self) -> Dataset:
        """The source as highdicom wants it: what it is referenced by, and nothing of the patient (see `inherit`)."""
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = self.sop_class_uid, self.sop_instance_uid
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = self.series_instance_uid, self.study_instance_uid
        for keyword in _REQUIRED:
            setattr(dataset, keyword, None)
        dataset.PatientBirthDate = ""
        return dataset


def is_uid(text: str) -> bool:
    """Also with leading zeros (1.2.03), which are wrong and common: a PACS that has the image files its results."""
    return _UID.fullmatch(text) is not None


def series_of(reported: Reported, kind: str) -> dict[str, Any]:
    """The arguments of highdicom's constructors that say who made the object, and when."""
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": plain(reported.cascade)[:64],
        "software_versions": __version__,
        "series_description": SERIES_DESCRIPTIONS[kind],
        "instance_number": 1,
    }


def inherit(dataset: Dataset, header: Dataset) -> None:
    """Put patient and study of the source into an object, character set included."""
    for keyword in _INHERITED:
        element = _element(header, keyword)
        if element is not None and (element.value or keyword in _REQUIRED):
            dataset[keyword] = element
        elif keyword in dataset and keyword not in _REQUIRED:
            del dataset[keyword]
    for keyword in _REQUIRED:
        if keyword not in dataset:
            setattr(dataset, keyword, "")
    dataset.file_meta.ImplementationVersionName = IMPLEMENTATION
    # pydicom writes bytes as they are only into what it takes for read in the encoding in which it is written.
    correct_ambiguous_vr(dataset, True)
    dataset.set_original_encoding(False, True, dataset._character_set)


def set_times(dataset: Dataset, source: Source, moment: datetime) -> None:
    """The same moment in every copy of the object: highdicom puts the time of the call everywhere.

    In the time zone of the source if it names one, else in that of this machine, as are the times of the study.
    """
    local = moment.astimezone(datetime.strptime(source.utc_offset, "%z").tzinfo if source.utc_offset else None)
    if source.utc_offset:
        dataset.TimezoneOffsetFromUTC = source.utc_offset  # of the times of the study too (PS3.3 C.12.1.1.8)
    date, time = local.strftime("%Y%m%d"), local.strftime("%H%M%S")
    for what in ("InstanceCreation", "Series", "Content"):
        setattr(dataset, f"{what}Date", date)
        setattr(dataset, f"{what}Time", time)
    for item in dataset.get("ContributingEquipmentSequence", []):
        item.ContributionDateTime = f"{date}{time}{local:%z}"


def _element(header: Dataset, keyword: str) -> DataElement | RawDataElement | None:
    """The bytes of the file where they can be had: to decode them and encode them again may change letters."""
    try:
        element = header.get_item(keyword)
        if isinstance(element, RawDataElement) and element.value is not None:
            padded = element.value + b" " * (len(element.value) % 2)
            return element._replace(VR=dictionary_VR(element.tag), value=padded, length=len(padded))
        element = element and header[keyword]
    except Exception:  # unreadable
        return None
    return None if element is None else deepcopy(element)


def _text(header: Dataset, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None or isinstance(value, MultiValue) else str(value).strip("\x00 ")
