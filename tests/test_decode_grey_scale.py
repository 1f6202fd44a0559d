"""Headers that say how grey is to be shown, but not in the way of the standard: read, or sent to review."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from cxrbatch.imaging.decode import read_grey
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest

TWELVE = np.rint(draw_chest(Chest(rows=160, columns=144)) * 3600 + 200).astype(np.uint16)
CURVE = np.rint(255 / (1 + np.exp((1800 - np.arange(4096)) / 500))).astype(np.uint8)


def look_up_table(vr: str, data: Any, bits: int = 8) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(CURVE), 0, bits])
    item.add_new("LUTData", vr, data)
    return Sequence([item])


def test_a_lut_of_8_bits_may_have_two_entries_in_a_word() -> None:
    expected = CURVE[TWELVE]
    for vr, data in (("US", CURVE.tolist()), ("OW", CURVE.tobytes()), ("US", CURVE.view("<u2").tolist())):
        grey, facts = read_grey(write_dicom(as_dicom(TWELVE, bits=12, VOILUTSequence=look_up_table(vr, data))))
        np.testing.assert_array_equal(grey, expected)
        assert facts.grey_path == "voi_lut_sequence"


@pytest.mark.parametrize("wrong", [b"2000.5", b"3000.5", b"1.50", b"0.25"])
def test_a_number_that_cannot_be_read_is_not_passed_over(wrong: bytes) -> None:
    elements = {"WindowCenter": "2000.5", "WindowWidth": "3000.5", "RescaleSlope": "1.50", "RescaleIntercept": "0.25"}
    data = write_dicom(as_dicom(TWELVE, bits=12, **elements))
    assert read_grey(data)[1].quality_flags == ()
    assert data.count(wrong) == 1
    _, facts = read_grey(data.replace(wrong, wrong.replace(b".", b",")))
    assert facts.quality_flags == ("window_unusable",)


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_table_that_cannot_be_read_is_not_passed_over(keyword: str) -> None:
    broken = {keyword: look_up_table("US", CURVE.tolist(), bits=99)}
    _, facts = read_grey(write_dicom(as_dicom(TWELVE, bits=12, **broken)))
    assert facts.quality_flags == ("window_unusable",)
    beside = read_grey(write_dicom(as_dicom(TWELVE, bits=12, **broken, WindowCenter=2000, WindowWidth=3000)))[1]
    assert ("window_unusable" in beside.quality_flags) == (keyword == "ModalityLUTSequence")


def test_empty_numbers_are_none() -> None:
    empty = dict.fromkeys(("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"))
    assert read_grey(write_dicom(as_dicom(TWELVE, bits=12, **empty)))[1].quality_flags == ()
