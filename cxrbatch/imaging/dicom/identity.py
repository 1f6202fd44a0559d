"""The text columns of a DICOM file, with identifiers protected as the settings say."""

from __future__ import annotations

import re

from pydicom.dataset import Dataset
from pydicom.uid import UID

from cxrbatch.deidentify import Identifiers

__all__ = ["describe", "is_child", "text"]

#: 18 years in the units of an age.
_ADULT = {"D": 6574, "W": 939, "M": 216, "Y": 18}

_AGE = re.compile(r"([DWMY]?) *(\d{1,9}) *([DWMY]?)")
_KEPT_CHARACTERS = 64


def describe(dataset: Dataset, syntax: UID, identifiers: Identifiers) -> dict[str, str]:
    """The text columns of ImageFacts, by name; empty where the file has no readable value."""
    keep_uids = identifiers.mode != "drop"
    return {
        "transfer_syntax_uid": str(syntax),
        "modality": text(dataset, "Modality"),
        "body_part_examined": text(dataset, "BodyPartExamined"),
        "view_position": text(dataset, "ViewPosition"),
        "manufacturer": text(dataset, "Manufacturer"),
        "study_date": _iso_date(text(dataset, "StudyDate")) if identifiers.mode != "drop" else "",
        "sop_class_uid": text(dataset, "SOPClassUID"),
        "sop_instance_uid": text(dataset, "SOPInstanceUID") if keep_uids else "",
        "series_instance_uid": text(dataset, "SeriesInstanceUID") if keep_uids else "",
        "study_instance_uid": text(dataset, "StudyInstanceUID") if keep_uids else "",
        "patient_id_hash": identifiers.protect(text(dataset, "PatientID")),
        "accession_number_hash": identifiers.protect(text(dataset, "AccessionNumber")),
    }


def text(dataset: Dataset, keyword: str) -> str:
    """A value as one printable line of at most 64 characters; empty if absent or unreadable."""
    try:
        value = dataset.get(keyword)
    except Exception:
        return ""
    if value is None:
        return ""
    return "".join(c for c in str(value) if c.isprintable()).strip()[:_KEPT_CHARACTERS]


def _iso_date(value: str) -> str:
    """DA (PS3.5 6.2) `YYYYMMDD` or its retired form with dots -> `YYYY-MM-DD`."""
    digits = value.replace(".", "")
    if len(digits) != 8 or not (digits.isascii() and digits.isdigit()):
        return ""
    return f"{digits[:4]}-{digits[4:6]}-{digits[6:]}"


def is_child(age: str) -> bool:
    """Whether PatientAge (PS3.5 6.2, AS: three digits and D, W, M or Y) is below 18 years. Unknown: False.

    Spaces, a unit before the number, and other numbers of digits are read too; 1 to 17 of no unit are below in each.
    """
    found = _AGE.fullmatch(age.upper())
    if found is None:
        return False
    unit, number = found[1] + found[3], int(found[2])
    return number < _ADULT[unit] if unit in _ADULT else not unit and 0 < number < 18
