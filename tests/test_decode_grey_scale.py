"""Headers that say how grey is to be shown, but not in the way of the standard: read, or sent to review."""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000, JPEGBaseline8Bit, JPEGLSNearLossless

from cxrbatch.imaging.decode import read_grey
from cxrbatch.samples.dicom import as_dicom, encode_frame, write_dicom
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


@pytest.mark.parametrize(
    "half",
    [
        {"WindowCenter": "2000"},
        {"WindowWidth": "3000"},
        {"RescaleSlope": "-1"},
        {"RescaleIntercept": "-1024", "WindowCenter": "900", "WindowWidth": "3000"},
        {"RescaleSlope": "0", "RescaleIntercept": "0"},
        {"VOILUTFunction": "LOG", "WindowCenter": "2000", "WindowWidth": "3000"},
    ],
)
def test_a_header_that_says_half_of_it_is_not_guessed_from(half: dict[str, str]) -> None:
    _, facts = read_grey(write_dicom(as_dicom(TWELVE, bits=12, **half)))
    assert (facts.grey_path, facts.quality_flags) == ("percentile 0.5-99.5", ("window_unusable",))


@pytest.mark.parametrize("neutral", [{"RescaleSlope": "1"}, {"RescaleIntercept": "0"}, {"VOILUTFunction": "LOG"}])
def test_a_half_that_changes_nothing_is_no_reason_for_review(neutral: dict[str, str]) -> None:
    assert read_grey(write_dicom(as_dicom(TWELVE, bits=12, **neutral)))[1].quality_flags == ()


def test_of_several_windows_with_a_function_each_the_first_counts() -> None:
    several = {"WindowCenter": ["2000", "900"], "WindowWidth": ["3000", "500"], "VOILUTFunction": ["SIGMOID", "LINEAR"]}
    _, facts = read_grey(write_dicom(as_dicom(TWELVE, bits=12, **several)))
    assert (facts.grey_path, facts.quality_flags) == ("window sigmoid", ())


@pytest.mark.parametrize(("photometric", "shape"), [("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")])
def test_a_header_that_names_both_polarities_goes_to_review(photometric: str, shape: str) -> None:
    ramp = np.tile(np.linspace(100, 3000, 144).astype(np.uint16), (160, 1))  # neither like a chest nor its negative
    other = {"IDENTITY": "INVERSE", "INVERSE": "IDENTITY"}[shape]
    for said, flags in ((shape, ("polarity_suspect",)), (other, ())):
        elements = {"PhotometricInterpretation": photometric, "PresentationLUTShape": said}
        _, facts = read_grey(write_dicom(as_dicom(ramp, bits=12, **elements)))
        assert facts.quality_flags == flags
        assert facts.inverted == (photometric == "MONOCHROME1" or said == "INVERSE")


@pytest.mark.parametrize(
    ("oblong", "flagged"),
    [
        ({"PixelAspectRatio": ["2", "1"]}, True),
        ({"PixelSpacing": ["0.1", "0.2"]}, True),
        ({"ImagerPixelSpacing": ["0.2", "0.1"]}, True),
        ({"PixelSpacing": ["0.143", "0.139"], "PixelAspectRatio": ["1", "1"]}, False),
        ({"PixelSpacing": ["0", "0"], "ImagerPixelSpacing": "0.1"}, False),
    ],
)
def test_pixels_that_are_not_square_go_to_review(oblong: dict[str, Any], flagged: bool) -> None:
    flags = read_grey(write_dicom(as_dicom(TWELVE, bits=12, **oblong)))[1].quality_flags
    assert flags == (("extreme_aspect",) if flagged else ())


@pytest.mark.parametrize(
    ("above", "path"),
    [
        ({}, "rescale; window sigmoid"),
        ({"WindowCenter": "", "WindowWidth": ""}, "rescale; window sigmoid"),
        ({"WindowCenter": 2000, "WindowWidth": 3000}, "rescale; window linear"),
        ({"WindowCenter": 90000}, "rescale; window sigmoid"),
        ({"RescaleIntercept": -90000}, "rescale; window sigmoid"),
    ],
)
def test_numbers_that_belong_together_are_of_one_place(above: dict[str, Any], path: str) -> None:
    window, values, groups = Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth, window.VOILUTFunction = 4000, 6000, "SIGMOID"
    values.RescaleSlope, values.RescaleIntercept = 2, 100
    groups.FrameVOILUTSequence, groups.PixelValueTransformationSequence = Sequence([window]), Sequence([values])
    dataset = as_dicom(TWELVE, bits=12, SharedFunctionalGroupsSequence=Sequence([groups]), **above)
    facts = read_grey(write_dicom(dataset))[1]
    assert (facts.grey_path, facts.quality_flags) == (path, ())


@pytest.mark.parametrize("coded", ["jpeg", "jpegls", "jpeg2k"])
def test_a_window_of_12_bits_over_a_lossy_stream_of_8_goes_to_review(coded: str) -> None:
    syntax = {"jpeg": JPEGBaseline8Bit, "jpegls": JPEGLSNearLossless, "jpeg2k": JPEG2000}[coded]
    eight = (TWELVE >> 4).astype(np.uint8)
    stream = {
        "jpeg": lambda: encode_frame(eight, JPEGBaseline8Bit),
        "jpegls": lambda: imagecodecs.jpegls_encode(eight, level=2),
        "jpeg2k": lambda: encode_frame(eight, JPEG2000),
    }[coded]()
    dataset = as_dicom(TWELVE, bits=12, WindowCenter=300, WindowWidth=800)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    assert read_grey(write_dicom(dataset))[1].quality_flags == ("decoder_warning",)
