"""Coded concepts (PS3.16) of the report, each with where it is defined.

SNOMED CT codes are those of the International Edition. DICOM may use a code without a context group that lists it
(TID 1501 leaves "Finding" open).
"""

from __future__ import annotations

from pydicom.sr.coding import Code

__all__ = ["CHEST", "PRIVATE_SCHEME", "finding_of", "plain", "private"]

PRIVATE_SCHEME = "99CXRBATCH"  #: PS3.16 section 8: designators of private schemes begin with 99

CHEST = Code("816094009", "SCT", "Chest")  # PS3.16 CID 4031 "Common Anatomic Region"; pydicom: codes.SCT.Chest

#: The labels of the shipped bundles.
_FINDINGS = {
    # PS3.16 CID 222 "Normality Code"; pydicom: codes.SCT.Normal
    "NORMAL": Code("17621005", "SCT", "Normal"),
    # SNOMED CT 233604007 |Pneumonia (disorder)|; in no context group of PS3.16
    "PNEUMONIA": Code("233604007", "SCT", "Pneumonia"),
    # SNOMED International's list of COVID-19 content: 840539006 |Disease caused by severe acute respiratory syndrome
    # coronavirus 2 (disorder)|, preferred term COVID-19
    "COVID19": Code("840539006", "SCT", "COVID-19"),
    # SNOMED CT 154283005 |Pulmonary tuberculosis (disorder)|; WHO's map to ICD-10 has it at A15
    "TUBERCULOSIS": Code("154283005", "SCT", "Pulmonary tuberculosis"),
}


def finding_of(label: str) -> Code:
    """The code of a label; one of our own scheme where no SNOMED code was verified (labels of other bundles)."""
    return _FINDINGS.get(label) or private(plain(label), plain(label.replace("_", " ").capitalize()))


def plain(words: str) -> str:
    """Words of a bundle in the letters that every character set has: the objects have that of their source.

    A backslash separates values; it and other letters become "U" and their number in hex.
    """
    return "".join(c if " " <= c <= "~" and c != "\\" else f"U{ord(c):04X}" for c in words)


def private(value: str, meaning: str) -> Code:
    """A code of our own scheme. A value of more than 16 characters becomes a Long Code Value (PS3.3 8.8)."""
    return Code(value, PRIVATE_SCHEME, meaning[:64])
