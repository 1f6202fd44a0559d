"""DICOM: every transfer syntax and pixel layout, each compared with the image it was made from."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import fields
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes, read_grey
from cxrbatch.imaging.dicom.frames import decoder_table
from cxrbatch.samples.dicom import as_dicom, encode_frame, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.types import ModelInputSpec

IMAGE = draw_chest(Chest(rows=160, columns=144))
EIGHT = np.rint(IMAGE * 255).astype(np.uint8)
TWELVE = np.rint(IMAGE * 3600 + 200).astype(np.uint16)
LIMITS = Limits()
LOSSLESS = [
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
]


def refusal(data: bytes, limits: Limits = LIMITS) -> ReasonCode:
    with pytest.raises(Rejected) as caught:
        read_grey(data, limits)
    return caught.value.reason_code


def compressed(frame: bytes, like: np.ndarray[Any, Any], syntax: UID, **elements: Any) -> bytes:
    """A DICOM file around a ready codestream."""
    dataset = as_dicom(like, ExplicitVRLittleEndian, **elements)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    return write_dicom(dataset)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: uid.keyword)
def test_lossless_syntaxes_give_the_same_grey_as_the_uncompressed_original(syntax: UID) -> None:
    for stored, bits in ((EIGHT, 8), (TWELVE, 12)):
        expected, _ = read_grey(write_dicom(as_dicom(stored, bits=bits)))
        grey, facts = read_grey(write_dicom(as_dicom(stored, syntax, bits=bits)))
        np.testing.assert_array_equal(grey, expected)
        assert facts.quality_flags == ()
        assert facts.decoder
    np.testing.assert_array_equal(read_grey(write_dicom(as_dicom(EIGHT, syntax)))[0], EIGHT)


@pytest.mark.parametrize(
    ("syntax", "frame", "most"),
    [
        (JPEGBaseline8Bit, imagecodecs.jpeg8_encode(EIGHT, level=95), 12),
        (JPEGExtended12Bit, imagecodecs.jpeg8_encode(EIGHT, level=95), 12),
        (JPEGLossless, imagecodecs.jpeg8_encode(EIGHT, lossless=True, predictor=6), 0),
        (JPEGLSNearLossless, imagecodecs.jpegls_encode(EIGHT, level=2), 2),
        (JPEG2000, imagecodecs.jpeg2k_encode(EIGHT, level=40, codecformat="j2k"), 45),
        (JPEG2000Lossless, imagecodecs.jpeg2k_encode(EIGHT, level=0, reversible=True, codecformat="jp2"), 0),
        (HTJ2KLosslessRPCL, imagecodecs.htj2k_encode(EIGHT, reversible=True), 0),
        (HTJ2K, imagecodecs.htj2k_encode(EIGHT, reversible=True), 0),
    ],
)
def test_lossy_syntaxes_stay_near_the_original(syntax: UID, frame: bytes, most: int) -> None:
    grey, _ = read_grey(compressed(frame, EIGHT, syntax))
    assert np.abs(grey.astype(int) - EIGHT).max() <= most


def test_12_bit_jpeg_extended() -> None:
    frame = imagecodecs.jpeg8_encode(TWELVE, bitspersample=12, level=95)
    expected, _ = read_grey(write_dicom(as_dicom(TWELVE, bits=12)))
    grey, facts = read_grey(compressed(frame, TWELVE, JPEGExtended12Bit, bits=12))
    assert np.abs(grey.astype(int) - expected).max() <= 2
    assert "jpeg8" in facts.decoder


def test_the_codec_is_chosen_by_the_bytes_when_the_transfer_syntax_is_wrong() -> None:
    ls = imagecodecs.jpegls_encode(EIGHT)
    for frame, syntax in (
        (ls, JPEGBaseline8Bit),
        (ls, JPEGLosslessSV1),
        (imagecodecs.jpeg8_encode(EIGHT, lossless=True), JPEGBaseline8Bit),
        (imagecodecs.jpeg2k_encode(EIGHT, level=0, reversible=True, codecformat="j2k"), JPEGLosslessSV1),
        (imagecodecs.jpeg8_encode(EIGHT, lossless=True), UID("1.2.840.10008.1.2.4.65")),  # retired
    ):
        np.testing.assert_array_equal(read_grey(compressed(frame, EIGHT, syntax))[0], EIGHT)


@pytest.mark.parametrize("vr", ["OB", "OW"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_one_bit(syntax: UID, vr: str) -> None:
    bits = EIGHT[:, :133] > 100  # 2,660 bytes, the last row's end within one of them
    packed = np.packbits(bits, bitorder="little")
    dataset = as_dicom(bits.astype(np.uint8), syntax, bits=1)
    dataset.BitsAllocated = 1
    swapped = vr == "OW" and syntax == ExplicitVRBigEndian  # as dcmtk reads it
    dataset.PixelData = packed.view(np.uint16).byteswap().tobytes() if swapped else packed.tobytes()
    dataset["PixelData"].VR = vr
    np.testing.assert_array_equal(read_grey(write_dicom(dataset))[0], bits * np.uint8(255))


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: uid.keyword)
def test_signed_pixels(syntax: UID) -> None:
    expected, _ = read_grey(write_dicom(as_dicom(TWELVE, bits=12)))
    signed = (TWELVE.astype(np.int16) - 1024).view(np.uint16)
    data = write_dicom(as_dicom(signed, syntax, bits=16, PixelRepresentation=1))
    np.testing.assert_array_equal(read_grey(data)[0], expected)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLosslessSV1])
def test_signed_pixels_that_leave_the_upper_bits_empty(syntax: UID) -> None:
    expected, _ = read_grey(write_dicom(as_dicom(TWELVE, bits=12)))
    signed = (TWELVE.astype(np.int16) - 2048).view(np.uint16) & 0xFFF
    data = write_dicom(as_dicom(signed, syntax, bits=12, PixelRepresentation=1))
    np.testing.assert_array_equal(read_grey(data)[0], expected)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian])
def test_headerless_files_are_told_from_junk(syntax: UID) -> None:
    dataset = as_dicom(TWELVE, syntax, bits=12)
    expected, _ = read_grey(write_dicom(dataset))
    whole = write_dicom(dataset)
    np.testing.assert_array_equal(read_grey(whole[132:])[0], expected)  # file meta, but no preamble
    buffer = io.BytesIO()
    del dataset.file_meta
    dataset.save_as(
        buffer,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
        enforce_file_format=False,
        force_encoding=True,
    )
    bare = buffer.getvalue()
    assert bare[128:132] != b"DICM"
    np.testing.assert_array_equal(read_grey(bare)[0], expected)


def rgb_dataset(planar: int, syntax: UID = ExplicitVRLittleEndian, photometric: str = "RGB") -> tuple[Dataset, Any]:
    rgb = np.stack([EIGHT, EIGHT[::-1], EIGHT[:, ::-1]], axis=-1)
    dataset = as_dicom(
        EIGHT, syntax, SamplesPerPixel=3, PhotometricInterpretation=photometric, PlanarConfiguration=planar
    )
    dataset.PixelData = (rgb.transpose(2, 0, 1) if planar else rgb).tobytes()
    return dataset, rgb


def luma(rgb: Any) -> Any:
    return np.rint(rgb @ np.array([0.299, 0.587, 0.114])).astype(int)


@pytest.mark.parametrize("planar", [0, 1])
def test_rgb_becomes_luma(planar: int) -> None:
    dataset, rgb = rgb_dataset(planar)
    grey, facts = read_grey(write_dicom(dataset))
    assert np.abs(grey.astype(int) - luma(rgb)).max() <= 1
    assert "colour" in facts.quality_flags


def test_ybr_full_is_read_by_its_luma() -> None:
    dataset, ybr = rgb_dataset(0, photometric="YBR_FULL")
    ybr = ybr.copy()
    ybr[..., 1:] = 128
    dataset.PixelData = ybr.tobytes()
    np.testing.assert_array_equal(read_grey(write_dicom(dataset))[0], EIGHT)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_colour(syntax: UID) -> None:
    rgb = np.stack([EIGHT, EIGHT // 2 + 60, EIGHT // 3], axis=-1)
    if syntax == JPEGBaseline8Bit:
        frame, photometric = imagecodecs.jpeg8_encode(rgb, level=98, subsampling="422"), "YBR_FULL_422"
    elif syntax == JPEG2000Lossless:
        frame = imagecodecs.jpeg2k_encode(rgb, level=0, reversible=True, mct=True, codecformat="j2k")
        photometric = "YBR_RCT"
    else:
        frame, photometric = imagecodecs.jpegls_encode(rgb), "RGB"
    data = compressed(
        frame, EIGHT, syntax, SamplesPerPixel=3, PhotometricInterpretation=photometric, PlanarConfiguration=0
    )
    grey, facts = read_grey(data)
    assert np.abs(grey.astype(int) - luma(rgb)).max() <= (12 if syntax == JPEGBaseline8Bit else 1)
    assert "colour" in facts.quality_flags


def test_palette_colour_becomes_luma() -> None:
    ramp = np.arange(256, dtype=np.uint16) * 257
    palettes = {"Red": ramp, "Green": ramp[::-1], "Blue": ramp // 2}
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, values in palettes.items():
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{colour}PaletteColorLookupTableData"] = values.astype("<u2").tobytes()
    grey, _ = read_grey(write_dicom(as_dicom(EIGHT, **elements)))
    rgb = np.stack([values[EIGHT] for values in palettes.values()], axis=-1) / 257
    assert np.abs(grey.astype(int) - luma(rgb)).max() <= 1


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_segmented_palettes(syntax: UID) -> None:
    order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):  # one entry of 0, then a line of 255 entries up to 65535
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        segments = np.array([0, 1, 0, 1, 255, 65535], order)
        elements[f"Segmented{colour}PaletteColorLookupTableData"] = segments.tobytes()
    grey, _ = read_grey(write_dicom(as_dicom(EIGHT, syntax, **elements)))
    assert np.abs(grey.astype(int) - EIGHT).max() <= 1


def test_one_bit_pixels() -> None:
    mask = (EIGHT > 128).astype(np.uint8)
    dataset = as_dicom(mask, BitsAllocated=1, BitsStored=1, HighBit=0)
    dataset.PixelData = np.packbits(mask.ravel(), bitorder="little").tobytes()
    np.testing.assert_array_equal(read_grey(write_dicom(dataset))[0], mask * 255)


@pytest.mark.parametrize(("keyword", "kind"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_float_pixels(keyword: str, kind: str) -> None:
    dataset = as_dicom(TWELVE, BitsAllocated=int(kind[-1]) * 8)
    del dataset.PixelData
    setattr(dataset, keyword, TWELVE.astype(kind).tobytes())
    expected, _ = read_grey(write_dicom(as_dicom(TWELVE, bits=12)))
    np.testing.assert_array_equal(read_grey(write_dicom(dataset))[0], expected)


def test_32_bit_pixels() -> None:
    dataset = as_dicom(TWELVE, BitsAllocated=32, BitsStored=32, HighBit=31, PixelRepresentation=1)
    dataset.PixelData = (TWELVE.astype("<i4") - 1000).tobytes()
    expected, _ = read_grey(write_dicom(as_dicom(TWELVE, bits=12)))
    np.testing.assert_array_equal(read_grey(write_dicom(dataset))[0], expected)


def test_odd_length_and_unused_bits() -> None:
    odd = EIGHT[:75, :75]
    dataset = as_dicom(odd)
    dataset.PixelData = odd.tobytes() + b"\x00"
    np.testing.assert_array_equal(read_grey(write_dicom(dataset))[0], odd)
    overlaid = as_dicom(TWELVE | 0x8000, bits=12)  # an old overlay in bit 15
    expected, _ = read_grey(write_dicom(as_dicom(TWELVE, bits=12)))
    np.testing.assert_array_equal(read_grey(write_dicom(overlaid))[0], expected)


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, JPEGLSLossless],
    ids=lambda uid: uid.keyword,
)
def test_a_stray_sequence_delimiter_behind_the_pixels_is_passed_over(syntax: UID) -> None:
    stray = b"\xff\xfe\xe0\xdd" if syntax == ExplicitVRBigEndian else b"\xfe\xff\xdd\xe0"
    for tail in (stray + bytes(4), (stray + bytes(4)) * 2):
        grey, facts = read_grey(write_dicom(as_dicom(EIGHT, syntax)) + tail)
        np.testing.assert_array_equal(grey, EIGHT)
        assert facts.quality_flags == ()


@pytest.mark.parametrize("with_table", [True, False])
def test_of_many_frames_the_first_is_read_and_flagged(with_table: bool) -> None:
    frames = [imagecodecs.jpegls_encode(EIGHT), imagecodecs.jpegls_encode(EIGHT[::-1].copy())]
    dataset = as_dicom(EIGHT, JPEGLSLossless, NumberOfFrames=2)
    dataset.PixelData = encapsulate(frames, has_bot=with_table)
    grey, facts = read_grey(write_dicom(dataset))
    np.testing.assert_array_equal(grey, EIGHT)
    assert facts.number_of_frames == 2
    assert "multi_frame" in facts.quality_flags


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("syntax", [RLELossless, JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless])
def test_a_second_frame_that_the_header_does_not_declare_goes_to_review(syntax: UID, with_table: bool) -> None:
    big = np.kron(EIGHT, np.ones((4, 4), np.uint8))  # codecs shrink it
    frames = [encode_frame(image, syntax) for image in (big, 255 - big)]
    dataset = as_dicom(big, syntax)
    dataset.PixelData = encapsulate(frames, has_bot=with_table)
    _, facts = read_grey(write_dicom(dataset))
    assert facts.quality_flags == ("decoder_warning",)
    shrunk = decode_bytes(write_dicom(dataset), (ModelInputSpec(64),), LIMITS, Identifiers())
    assert shrunk.facts.quality_flags == ("decoder_warning",)


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("wrong", [(8,), (123456,), (0, 64, 128), (4, 0), ()])
def test_the_offset_table_of_one_frame_does_not_matter(wrong: tuple[int, ...], fragments: int) -> None:
    dataset = as_dicom(EIGHT, JPEGLSLossless)
    encoded = encode_frame(EIGHT, JPEGLSLossless)
    dataset.PixelData = encapsulate([encoded], fragments_per_frame=fragments, has_bot=False)
    table = struct.pack(f"<{len(wrong)}I", *wrong)
    dataset.PixelData = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(table)) + table + dataset.PixelData[8:]
    if not wrong:
        dataset.ExtendedOffsetTable = struct.pack("<Q", 50)
        dataset.ExtendedOffsetTableLengths = struct.pack("<Q", 7)
    grey, facts = read_grey(write_dicom(dataset))
    np.testing.assert_array_equal(grey, EIGHT)
    assert facts.quality_flags == ()


def test_garbage_behind_the_frame_that_an_offset_table_points_to_goes_to_review() -> None:
    dataset = as_dicom(EIGHT, JPEGLSLossless)
    dataset.PixelData = encapsulate([encode_frame(EIGHT, JPEGLSLossless), b"second frame"])
    data = write_dicom(dataset)
    item = b"\xfe\xff\x00\xe0\x0c\x00\x00\x00second"
    assert data.count(item) == 1
    _, facts = read_grey(data.replace(item, b"\xfe\xff\x99" + item[3:]))
    assert facts.quality_flags == ("decoder_warning",)


def test_a_frame_in_many_fragments() -> None:
    dataset = as_dicom(EIGHT, JPEGLSLossless)
    dataset.PixelData = encapsulate([imagecodecs.jpegls_encode(EIGHT)], fragments_per_frame=7, has_bot=False)
    grey, facts = read_grey(write_dicom(dataset))
    np.testing.assert_array_equal(grey, EIGHT)
    assert facts.quality_flags == ()


def test_j2k_whose_sign_differs_from_the_header() -> None:
    signed = TWELVE.astype(np.int16) - 2048
    frame = imagecodecs.jpeg2k_encode(signed, level=0, reversible=True, bitspersample=12, codecformat="j2k")
    data = compressed(frame, TWELVE, JPEG2000Lossless, bits=12)
    grey, _ = read_grey(data)
    unsigned = (signed.astype(np.int32) & 0xFFF).astype(np.uint16)
    np.testing.assert_array_equal(grey, read_grey(write_dicom(as_dicom(unsigned, bits=12)))[0])


def test_what_is_no_image_says_so() -> None:
    bare = as_dicom(EIGHT)
    del bare.PixelData
    assert refusal(write_dicom(bare)) == ReasonCode.NO_PIXEL_DATA
    directory = Dataset()
    directory.file_meta = as_dicom(EIGHT).file_meta
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    directory.FileSetID = "SYNTHETIC"
    directory.DirectoryRecordSequence = []
    assert refusal(write_dicom(directory)) == ReasonCode.DICOMDIR


def test_what_cannot_be_read_says_why() -> None:
    video = compressed(b"\x00\x00\x01\xb3" + bytes(64), EIGHT, UID("1.2.840.10008.1.2.4.100"))
    assert refusal(video) == ReasonCode.UNSUPPORTED_TRANSFER_SYNTAX
    for unknown in (b"1.2.840.10008.1.2.4.199", b"1.2.826.0.1.3680043.8.1"):
        assert refusal(video.replace(b"1.2.840.10008.1.2.4.100", unknown)) == ReasonCode.UNSUPPORTED_TRANSFER_SYNTAX
    assert refusal(write_dicom(as_dicom(EIGHT, PhotometricInterpretation="PUCE"))) == ReasonCode.UNSUPPORTED_PIXELS
    nameless = as_dicom(EIGHT)
    del nameless.PhotometricInterpretation
    assert refusal(write_dicom(nameless)) == ReasonCode.CORRUPT_DICOM
    misread = write_dicom(as_dicom(EIGHT)).replace(b"\x28\x00\x04\x00CS", b"\x28\x00\x04\x00FD")
    with pytest.raises(Rejected, match="The pixel data cannot be read"):  # and not as an error of ours
        read_grey(misread)
    flat = as_dicom(np.full((64, 64), 7, np.uint8))
    assert refusal(write_dicom(flat)) == ReasonCode.CONSTANT_IMAGE
    assert refusal(write_dicom(as_dicom(EIGHT[:16, :16].copy()))) == ReasonCode.TOO_SMALL


@pytest.mark.parametrize("frames", ["2147483648", "99999999999999999999", "9" * 200])
def test_a_number_of_frames_that_no_store_can_hold_is_a_reason(frames: str) -> None:
    data = write_dicom(as_dicom(EIGHT, JPEG2000Lossless))
    at = data.index(b"\x28\x00\x10\x00US")
    value = frames.ljust(len(frames) + len(frames) % 2).encode()
    element = b"\x28\x00\x08\x00IS" + struct.pack("<H", len(value)) + value
    assert refusal(data[:at] + element + data[at:]) == ReasonCode.CORRUPT_DICOM


def test_sizes_are_checked_before_anything_is_allocated() -> None:
    bomb = as_dicom(EIGHT)
    bomb.Rows = bomb.Columns = 65535
    assert refusal(write_dicom(bomb)) == ReasonCode.TOO_MANY_PIXELS
    small_limit = Limits(max_pixels_mpx=0.01)
    assert refusal(write_dicom(as_dicom(EIGHT)), small_limit) == ReasonCode.TOO_MANY_PIXELS
    for syntax in (JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless):
        lying = as_dicom(EIGHT, syntax)
        lying.Rows = 80
        assert refusal(write_dicom(lying)) == ReasonCode.CORRUPT_PIXELS


def test_identifiers_are_hashed_kept_or_dropped() -> None:
    data = write_dicom(as_dicom(EIGHT, patient=7))
    hashed = decode_bytes(data, (), LIMITS, Identifiers("hash", b"key")).facts
    other = decode_bytes(data, (), LIMITS, Identifiers("hash", b"another key")).facts
    kept = decode_bytes(data, (), LIMITS, Identifiers("keep")).facts
    dropped = decode_bytes(data, (), LIMITS, Identifiers("drop")).facts
    assert len(hashed.patient_id_hash) == 32
    assert hashed.patient_id_hash != other.patient_id_hash
    assert hashed.accession_number_hash not in ("", hashed.patient_id_hash)
    assert kept.patient_id_hash == "SYNTH-007"
    assert hashed.sop_instance_uid == kept.sop_instance_uid != ""
    assert (dropped.patient_id_hash, dropped.accession_number_hash, dropped.sop_instance_uid) == ("", "", "")
    assert kept.study_date == "2020-01-01"
    for facts in (hashed, dropped):
        shown = " ".join(str(getattr(facts, field.name)) for field in fields(facts))
        assert "SYNTH-" not in shown
        assert "PHANTOM" not in shown
    assert "key" not in repr(Identifiers("hash", b"key"))


@pytest.mark.parametrize(
    ("age", "flagged"),
    [
        *(("017Y", True), ("018Y", False), ("011M", True), ("216M", False), ("003D", True), ("", False), ("Y", False)),
        *(("17", True), ("18", False), ("0", False), ("Y17", True), ("Y18", False), ("17 y", True), ("Y17M", False)),
    ],
)
def test_a_child_is_flagged_by_the_age_in_its_header(age: str, flagged: bool) -> None:
    dataset = as_dicom(EIGHT)
    dataset.PatientAge = age
    facts = read_grey(write_dicom(dataset))[1]
    assert ("paediatric" in facts.quality_flags) is flagged


@pytest.mark.parametrize("spelled", [b" MONOCHROME1", b"MONOCHROME1\0", b"MONOCHROME1 "])
def test_spaces_around_a_code_string_mean_nothing(spelled: bytes) -> None:
    data = write_dicom(as_dicom(255 - EIGHT, PhotometricInterpretation="MONOCHROME1"))
    assert data.count(b"MONOCHROME1 ") == 1
    np.testing.assert_array_equal(read_grey(data.replace(b"MONOCHROME1 ", spelled))[0], EIGHT)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_an_element_that_occurs_twice_may_have_one_value(syntax: UID) -> None:
    """dcmtk takes the first, pydicom the last: of two polarities either might be meant."""
    data, deflated = write_dicom(as_dicom(EIGHT, syntax)), syntax == DeflatedExplicitVRLittleEndian
    meta_end = 144 + struct.unpack_from("<I", data, 140)[0]
    meta, body = data[:meta_end], zlib.decompress(data[meta_end:], -15) if deflated else data[meta_end:]

    def with_a_second(tag: bytes, value: bytes) -> bytes:
        size = (
            struct.pack("<I", len(value)) if syntax == ImplicitVRLittleEndian else b"CS" + struct.pack("<H", len(value))
        )
        at, packer = body.index(tag + size), zlib.compressobj(wbits=-15)
        twice = body[:at] + tag + size + value + body[at:]
        return meta + (packer.compress(twice) + packer.flush() if deflated else twice)

    photometric, body_part = b"\x28\x00\x04\x00", b"\x18\x00\x15\x00"
    np.testing.assert_array_equal(read_grey(with_a_second(photometric, b"MONOCHROME2 "))[0], EIGHT)
    np.testing.assert_array_equal(read_grey(with_a_second(body_part, b"SPINE "))[0], EIGHT)  # which decides nothing
    assert refusal(with_a_second(photometric, b"MONOCHROME1 ")) == ReasonCode.CORRUPT_DICOM


def test_a_file_that_ends_inside_its_last_element_goes_to_review() -> None:
    dataset = as_dicom(EIGHT)
    dataset.PixelData += bytes(100)
    for data in (write_dicom(dataset)[:-90], write_dicom(as_dicom(EIGHT, DataSetTrailingPadding=bytes(50)))[:-5]):
        grey, facts = read_grey(data)
        np.testing.assert_array_equal(grey, EIGHT)
        assert facts.quality_flags == ("decoder_warning",)


def test_every_transfer_syntax_has_a_decoder() -> None:
    assert len(decoder_table()) == 12
    assert all(decoder for _, decoder in decoder_table())
