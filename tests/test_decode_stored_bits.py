"""Values beyond BitsStored: clamped if a lossy codec made them, flagged if the file stores them."""

from __future__ import annotations

import tracemalloc
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes, read_grey
from cxrbatch.imaging.dicom.stored_bits import StoredBits
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.types import ModelInputSpec

CHEST = draw_chest(Chest(rows=264, columns=240))
#: 10 bits, with many values at both ends, so that lossy codecs overshoot.
TEN = np.clip(np.rint(CHEST * 1400 - 150), 0, 1023).astype(np.uint16)
SIGNED = TEN.astype(np.int16) - 512
TWELVE = np.rint(CHEST * 3600 + 200).astype(np.uint16)
SPECS = (ModelInputSpec(48), ModelInputSpec(32, fit="stretch"))
WINDOW: dict[str, Any] = {"WindowCenter": "512", "WindowWidth": "1024"}
SIGNED_WINDOW: dict[str, Any] = {"WindowCenter": "0", "WindowWidth": "1024", "PixelRepresentation": 1}


def in_dicom(frame: bytes, syntax: UID, bits: int = 10, **elements: Any) -> bytes:
    dataset = as_dicom(TEN, ExplicitVRLittleEndian, bits=bits, **elements)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    return write_dicom(dataset)


def native(values: Any, bits: int = 10, **elements: Any) -> bytes:
    return write_dicom(as_dicom(values.view(np.uint16), bits=bits, **elements))


def jpeg12(values: Any) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(values, bitspersample=12, level=60))


def near_lossless(values: Any) -> bytes:
    return bytes(imagecodecs.jpegls_encode(values, level=4))


def j2k(values: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(values, level=45, bitspersample=12, codecformat="j2k"))


def j2k_cut_short(values: Any) -> bytes:
    """The reversible transform, truncated, so that it is lossy."""
    return bytes(imagecodecs.jpeg2k_encode(values, level=45, reversible=True, bitspersample=12, codecformat="j2k"))


LOSSY = {
    "jpeg extended": (jpeg12, imagecodecs.jpeg8_decode, JPEGExtended12Bit),
    "jpeg-ls near-lossless": (near_lossless, imagecodecs.jpegls_decode, JPEGLSNearLossless),
    "jpeg 2000": (j2k, imagecodecs.jpeg2k_decode, JPEG2000),
    "jpeg 2000 reversible": (j2k_cut_short, imagecodecs.jpeg2k_decode, JPEG2000),
}


def model_inputs(data: bytes, exact: bool) -> tuple[dict[ModelInputSpec, Any], tuple[str, ...]]:
    image = decode_bytes(data, SPECS, Limits(), Identifiers(mode="drop"), exact)
    return image.model_inputs, image.facts.quality_flags


def assert_same(data: bytes, expected: bytes, most: int = 0) -> None:
    """The grey image and the model inputs, read exactly and cheaply, are those of the other file, and unflagged."""
    grey, facts = read_grey(data)
    reference, _ = read_grey(expected)
    assert np.abs(grey.astype(int) - reference).max() <= most
    assert facts.quality_flags == ()
    for exact in (True, False):
        (found, flags), (wanted, _) = model_inputs(data, exact), model_inputs(expected, exact)
        assert flags == ()
        for spec in SPECS:
            assert np.abs(found[spec].astype(int) - wanted[spec]).max() <= max(most, 12 * (not exact))


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_overshoot_is_clamped(name: str, window: bool) -> None:
    encode, decode, syntax = LOSSY[name]
    frame = encode(TEN)
    decoded = decode(frame)
    assert decoded.max() > 1023
    elements = WINDOW if window else {}
    assert_same(in_dicom(frame, syntax, **elements), native(np.minimum(decoded, 1023), **elements))


def test_signed_jpeg_2000_is_clamped_at_both_ends() -> None:
    frame = j2k(SIGNED)
    decoded = imagecodecs.jpeg2k_decode(frame)
    assert decoded.max() > 511 and decoded.min() < -512
    assert_same(in_dicom(frame, JPEG2000, **SIGNED_WINDOW), native(np.clip(decoded, -512, 511), **SIGNED_WINDOW))


@pytest.mark.parametrize("values", [SIGNED, np.maximum(SIGNED, 0)], ids=["both signs", "none below zero"])
def test_signed_near_lossless_jpeg_ls_is_clamped_at_both_ends(values: Any) -> None:
    frame = near_lossless(values.view(np.uint16))
    decoded = imagecodecs.jpegls_decode(frame).view(np.int16)
    assert decoded.max() > 511
    expected = np.clip(decoded, -512, 511)
    assert_same(in_dicom(frame, JPEGLSNearLossless, **SIGNED_WINDOW), native(expected, **SIGNED_WINDOW))


def test_signed_jpeg_extended_is_clamped_where_its_words_end() -> None:
    words = SIGNED.view(np.uint16) & 0x3FF
    frame = jpeg12(words)
    decoded = imagecodecs.jpeg8_decode(frame)
    assert decoded.max() > 1023
    assert_same(in_dicom(frame, JPEGExtended12Bit, **SIGNED_WINDOW), native(np.minimum(decoded, 1023), **SIGNED_WINDOW))


def test_8_bit_jpeg_under_fewer_bits_is_clamped() -> None:
    seven = np.clip(np.rint(CHEST * 180 - 20), 0, 127).astype(np.uint8)
    frame = bytes(imagecodecs.jpeg8_encode(seven, level=60))
    decoded = imagecodecs.jpeg8_decode(frame)
    assert decoded.max() > 127
    dataset = as_dicom(seven, ExplicitVRLittleEndian, bits=7)
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    expected = write_dicom(as_dicom(np.minimum(decoded, 127), bits=7))
    assert_same(write_dicom(dataset), expected)


def test_a_lossy_stream_of_many_more_bits_than_the_header_says_goes_to_review() -> None:
    for encode, _, syntax in LOSSY.values():
        for exact in (True, False):
            assert "above_bits_stored" in model_inputs(in_dicom(encode(TWELVE), syntax, **WINDOW), exact)[1]


def test_a_12_bit_stream_does_not_wrap_in_8_allocated_bits() -> None:
    grey = np.rint(CHEST * 255).astype(np.uint8)
    dataset = as_dicom(grey, ExplicitVRLittleEndian)
    dataset.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    dataset.PixelData = encapsulate([jpeg12(TWELVE)])
    dataset["PixelData"].VR = "OB"
    assert "above_bits_stored" in read_grey(write_dicom(dataset))[1].quality_flags


NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless]
CODED = [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("syntax", [*NATIVE, *CODED], ids=lambda uid: uid.keyword)
def test_values_above_bits_stored_are_flagged(syntax: UID, exact: bool) -> None:
    assert "above_bits_stored" in model_inputs(write_dicom(as_dicom(TWELVE, syntax, bits=10, **WINDOW)), exact)[1]
    assert model_inputs(write_dicom(as_dicom(TEN, syntax, bits=10, **WINDOW)), exact)[1] == ()


@pytest.mark.parametrize("syntax", [*NATIVE, *CODED], ids=lambda uid: uid.keyword)
def test_signed_values_beyond_bits_stored_are_flagged(syntax: UID) -> None:
    for values, flagged in (
        (SIGNED, False),
        (SIGNED & 0x3FF, False),  # the upper bits left empty
        (SIGNED * 2, True),
        (np.maximum(SIGNED, 0) * 3, True),
        (SIGNED - 1, True),  # -513 alone
        (SIGNED + 1, True),  # 512 alone, among words that are filled up with their sign
    ):
        data = write_dicom(as_dicom(values.astype(np.int16).view(np.uint16), syntax, bits=10, **SIGNED_WINDOW))
        assert ("above_bits_stored" in read_grey(data)[1].quality_flags) == flagged


@pytest.mark.parametrize("syntax", [*NATIVE, JPEGLSLossless], ids=lambda uid: uid.keyword)
def test_an_overlay_that_the_header_places_above_the_values_is_no_reason_for_review(syntax: UID) -> None:
    overlaid = TEN.copy()
    overlaid[40:60] |= 0x8000
    dataset = as_dicom(overlaid, syntax, bits=10, **WINDOW)
    assert "above_bits_stored" in read_grey(write_dicom(dataset))[1].quality_flags
    dataset.add_new(0x60000100, "US", 16)
    dataset.add_new(0x60000102, "US", 15)
    grey, facts = read_grey(write_dicom(dataset))
    np.testing.assert_array_equal(grey, read_grey(native(TEN, **WINDOW))[0])
    assert facts.quality_flags == ()


@pytest.mark.parametrize("syntax", [*NATIVE, *CODED], ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("high", [10, 13, 15])
def test_high_bit_is_honoured(syntax: UID, high: int) -> None:
    moved = TEN << (high - 9)
    data = write_dicom(as_dicom(moved, syntax, bits=10, HighBit=high, **WINDOW))
    assert_same(data, native(TEN, **WINDOW), most=0)


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.keyword)
def test_high_bit_of_signed_values_is_honoured(syntax: UID) -> None:
    for moved in (SIGNED << 4, (SIGNED & 0x3FF) << 4):
        words = moved.astype(np.int16).view(np.uint16)
        data = write_dicom(as_dicom(words, syntax, bits=10, HighBit=13, **SIGNED_WINDOW))
        assert_same(data, native(SIGNED, **SIGNED_WINDOW))


@pytest.mark.parametrize(
    ("values", "high", "code"),
    [
        (TEN, 15, ReasonCode.UNSUPPORTED_PIXELS),  # the values are at the right, whatever the header says
        (TEN, 11, ReasonCode.UNSUPPORTED_PIXELS),
        (TEN, 16, ReasonCode.CORRUPT_DICOM),
        (TEN, 5, ReasonCode.CORRUPT_DICOM),
    ],
)
def test_a_high_bit_that_contradicts_the_values_is_refused(values: Any, high: int, code: ReasonCode) -> None:
    with pytest.raises(Rejected, match="HighBit") as caught:
        read_grey(write_dicom(as_dicom(values, bits=10, HighBit=high, **WINDOW)))
    assert caught.value.reason_code is code


def test_a_header_that_claims_billions_of_bits_costs_nothing() -> None:
    data = write_dicom(as_dicom(TWELVE, bits=12, **WINDOW))
    at = data.index(b"\x28\x00\x02\x01US")
    for value in (b"9999999999", b"1e400 "):
        hostile = data[:at] + b"\x28\x00\x02\x01IS" + bytes([len(value), 0]) + value + data[at + 10 :]
        tracemalloc.start()
        try:
            read_grey(hostile)
        except Rejected as problem:
            assert problem.reason_code == ReasonCode.CORRUPT_DICOM
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 2**25


def test_a_high_bit_is_not_asked_where_values_fill_their_words() -> None:
    grey = np.rint(CHEST * 255).astype(np.uint8)
    np.testing.assert_array_equal(read_grey(write_dicom(as_dicom(grey, HighBit=11)))[0], grey)


@pytest.mark.parametrize(
    ("stored", "signed", "precision", "words", "values", "above"),
    [
        (10, False, 12, [0, 1023, 1024, 1534], [0, 1023, 1023, 1023], False),
        (10, False, 12, [0, 1023, 1024, 4095], [0, 1023, 1023, 1023], True),
        (10, True, 10, [0, 511, 512, 1023], [0, 511, -512, -1], False),
        (10, True, 12, [0, 511, 512, 1024], [0, 511, -512, -1], False),  # empty upper bits
        (10, True, 12, [0, 513, 4095, 3580], [0, 511, -1, -512], False),  # filled with the sign; 513 is too high
        (10, True, 12, [0, 300, 513, 515], [0, 300, 511, 511], False),  # nothing negative: an overshoot
        (11, True, 12, [0, 1023, 2047, 2049], [0, 1023, -1, -1], False),
    ],
)
def test_what_lossy_words_mean(
    stored: int, signed: bool, precision: int, words: list[int], values: list[int], above: bool
) -> None:
    fitted, found = StoredBits(16, stored, stored - 1, signed).fit(
        np.array(words, np.uint16), precision=precision, lossy=True
    )
    assert (fitted.tolist(), found) == (values, above)
