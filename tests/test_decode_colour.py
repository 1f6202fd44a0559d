"""Colour whose header and codestream disagree, or that no reader here understands: read right, or refused."""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.decode import read_grey
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest

EIGHT = np.rint(draw_chest(Chest(rows=160, columns=144)) * 255).astype(np.uint8)
GREY_AS_RGB = np.stack([EIGHT] * 3, axis=-1)


def coloured(photometric: str, pixels: bytes, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    """A DICOM file of three samples a pixel: native pixels, or one frame of a compressed `syntax`."""
    dataset = as_dicom(EIGHT, SamplesPerPixel=3, PhotometricInterpretation=photometric, PlanarConfiguration=0)
    dataset.PixelData = pixels if syntax == ExplicitVRLittleEndian else encapsulate([pixels])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    return write_dicom(dataset)


def jpeg(**how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GREY_AS_RGB).save(buffer, "JPEG", quality=95, **how)
    return buffer.getvalue()


def without_jfif(stream: bytes) -> bytes:
    assert stream[2:4] == b"\xff\xe0"
    return stream[:2] + stream[4 + int.from_bytes(stream[4:6], "big") :]


def refusal(data: bytes) -> ReasonCode:
    with pytest.raises(Rejected) as caught:
        read_grey(data)
    return caught.value.reason_code


@pytest.mark.parametrize("photometric", ["CMYK", "HSV", "MONOCHROME1", "MONOCHROME2", "YBR_PARTIAL_422"])
def test_three_samples_of_a_colour_space_that_is_not_read_are_refused(photometric: str) -> None:
    assert refusal(coloured(photometric, GREY_AS_RGB.tobytes())) == ReasonCode.UNSUPPORTED_PIXELS


def test_uncompressed_pixels_of_thinned_chroma_are_read_where_their_range_is_known() -> None:
    thinned = np.full((EIGHT.size // 2, 4), 128, np.uint8)
    thinned[:, :2] = EIGHT.reshape(-1, 2)
    np.testing.assert_array_equal(read_grey(coloured("YBR_FULL_422", thinned.tobytes()))[0], EIGHT)
    assert refusal(coloured("YBR_PARTIAL_422", thinned.tobytes())) == ReasonCode.UNSUPPORTED_PIXELS


def test_ybr_of_16_bits_is_refused_and_not_called_damaged() -> None:
    wide = as_dicom(EIGHT, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=0)
    wide.BitsAllocated, wide.BitsStored, wide.HighBit = 16, 16, 15
    wide.PixelData, wide["PixelData"].VR = (GREY_AS_RGB.astype(np.uint16) << 8).tobytes(), "OW"
    assert refusal(write_dicom(wide)) == ReasonCode.UNSUPPORTED_PIXELS


def test_colour_of_12_bits_is_flagged_as_that_of_8_is() -> None:
    for stored in (np.stack([EIGHT // 2, EIGHT, EIGHT], axis=-1), GREY_AS_RGB):
        for values, bits in ((stored, 8), (stored.astype(np.uint16) << 4, 12)):
            dataset = as_dicom(EIGHT, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * values.itemsize, bits, bits - 1
            dataset.PixelData, dataset["PixelData"].VR = values.tobytes(), "OW"
            assert ("colour" in read_grey(write_dicom(dataset))[1].quality_flags) == (stored is not GREY_AS_RGB)


@pytest.mark.parametrize("photometric", ["YBR_RCT", "YBR_ICT"])
def test_the_names_that_jpeg_2000_leaves_on_decompressed_pixels_are_rgb(photometric: str) -> None:
    np.testing.assert_array_equal(read_grey(coloured(photometric, GREY_AS_RGB.tobytes()))[0], EIGHT)


def test_three_samples_are_no_monochrome1_that_could_be_inverted() -> None:
    assert refusal(coloured("MONOCHROME1", jpeg(), JPEGBaseline8Bit)) == ReasonCode.UNSUPPORTED_PIXELS


@pytest.mark.parametrize(
    ("photometric", "stream"),
    [
        ("YBR_PARTIAL_422", jpeg()),
        ("YBR_ICT", jpeg()),
        ("RGB", without_jfif(jpeg(subsampling="4:2:0"))),
        ("YBR_FULL_422", jpeg(keep_rgb=True)),
    ],
    ids=["JFIF is YBR", "and no ICT", "chroma of fewer samples is YBR", "Adobe's RGB is RGB"],
)
def test_a_jpeg_stream_says_better_than_the_header_what_its_components_are(photometric: str, stream: bytes) -> None:
    grey, facts = read_grey(coloured(photometric, stream, JPEGBaseline8Bit))
    assert np.abs(grey.astype(int) - EIGHT).max() <= 8
    assert "colour" not in facts.quality_flags


def test_a_colour_transform_of_jpeg_2000_is_undone_once() -> None:
    stream = imagecodecs.jpeg2k_encode(GREY_AS_RGB, level=0, reversible=True, mct=True, codecformat="j2k")
    np.testing.assert_array_equal(read_grey(coloured("YBR_FULL", stream, JPEG2000Lossless))[0], EIGHT)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_ycbcr_of_a_tiff_that_no_decoder_turns_to_rgb_is_refused(compression: str | None) -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, GREY_AS_RGB, photometric="ycbcr", compression=compression)
    assert refusal(buffer.getvalue()) == ReasonCode.UNSUPPORTED_PIXELS


def test_a_colour_jpeg_of_12_bits_is_refused() -> None:
    wide = GREY_AS_RGB.astype(np.uint16) * 16
    assert refusal(imagecodecs.jpeg8_encode(wide, bitspersample=12)) == ReasonCode.UNSUPPORTED_PIXELS


@pytest.mark.parametrize(("tag", "at", "value"), [(262, 0, 263), (284, 8, 8)], ids=["no polarity", "no layout"])
def test_a_tiff_that_does_not_say_what_its_pixels_mean_is_refused(tag: int, at: int, value: int) -> None:
    buffer = io.BytesIO()
    samples = np.dstack([EIGHT] * 4)
    tifffile.imwrite(buffer, samples, byteorder="<", photometric="minisblack", extrasamples=["unspecified"] * 3)
    data = bytearray(buffer.getvalue())
    np.testing.assert_array_equal(read_grey(bytes(data))[0], EIGHT)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        entry = file.pages.first.tags[tag].offset
    data[entry + at : entry + at + 2] = value.to_bytes(2, "little")
    assert refusal(bytes(data)) == ReasonCode.UNSUPPORTED_PIXELS


def with_palette(indices: Any, entries: bytes, bits: int, syntax: UID = ExplicitVRLittleEndian, **more: Any) -> bytes:
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR", **more}
    for colour in ("Red", "Green", "Blue"):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [len(CURVE) % 65536, 0, bits]
        elements[f"{colour}PaletteColorLookupTableData"] = entries
    return write_dicom(as_dicom(indices, syntax, **elements))


CURVE = np.rint(np.linspace(0, 1, 4096) ** 2 * 65535).astype(np.uint16)
TWELVE = EIGHT.astype(np.uint16) * 16


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_palettes_of_more_than_256_colours_in_both_byte_orders(syntax: UID) -> None:
    order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
    expected = np.rint(CURVE[TWELVE] / 257)
    packed = (CURVE >> 8).astype(np.uint8).view("<u2").astype(order).tobytes()  # two entries of 8 bits in a word
    for entries, bits in ((CURVE.astype(order).tobytes(), 16), ((CURVE >> 8).astype(order).tobytes(), 8), (packed, 8)):
        grey, facts = read_grey(with_palette(TWELVE, entries, bits, syntax, BitsStored=12, HighBit=11))
        assert np.abs(grey - expected).max() <= 1
        assert facts.quality_flags == ()


def test_a_palette_of_bytes_that_is_said_to_have_16_bits() -> None:
    entries = (CURVE >> 8).astype(np.uint8)
    grey, _ = read_grey(with_palette(TWELVE, entries.tobytes(), 16, BitsStored=12, HighBit=11))
    assert np.array_equal(grey, entries[TWELVE])


@pytest.mark.parametrize("words", [0, 150, 4000])
def test_a_palette_that_lacks_a_colour_is_a_reason(words: int) -> None:
    broken = with_palette(TWELVE, CURVE[:words].tobytes(), 16, BitsStored=12, HighBit=11)
    assert refusal(broken) == ReasonCode.CORRUPT_DICOM
