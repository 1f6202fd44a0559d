"""Damage: truncated, flipped and hostile bytes become reasons, never a crash and never a silent half image."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cxrbatch import unexpected
from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging import decode
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes, read_grey
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.types import ModelInputSpec

GREY = np.rint(draw_chest(Chest(rows=160, columns=144)) * 255).astype(np.uint8)
SYNTAXES = [
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
]
HALF_PICTURES = {ReasonCode.TRUNCATED, ReasonCode.CORRUPT_PIXELS, ReasonCode.CORRUPT_DICOM}


def saved(kind: str, mode: str = "L", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GREY).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {uid.keyword: write_dicom(as_dicom(GREY, uid)) for uid in SYNTAXES} | {
    "png": saved("PNG"),
    "png 16": bytes(imagecodecs.png_encode(GREY.astype(np.uint16) * 257)),
    "jpeg": saved("JPEG"),
    "jpeg progressive": saved("JPEG", progressive=True),
    "jpeg colour": saved("JPEG", "RGB"),
    "jpeg cmyk": saved("JPEG", "CMYK"),
    "tiff": saved("TIFF"),
    "tiff lzw": saved("TIFF", compression="tiff_lzw"),
    "tiff jpeg": saved("TIFF", compression="jpeg"),
    "tiff packbits": saved("TIFF", compression="packbits"),
    "tiff deflate": saved("TIFF", compression="tiff_adobe_deflate"),
}


def read_cheaply(data: bytes) -> None:
    """Like read_grey, for a model input so small that codecs shrink by four."""
    decode_bytes(data, (ModelInputSpec(16),), Limits(), Identifiers(mode="drop"))


@pytest.mark.parametrize("read", [read_grey, read_cheaply], ids=["exact", "cheap"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.25, 0.5, 0.75, 0.95, 0.999])
def test_a_truncated_file_is_never_an_image(name: str, part: float, read: Callable[[bytes], object]) -> None:
    data = FILES[name]
    read(data)
    with pytest.raises(Rejected) as caught:
        read(data[: int(len(data) * part)])
    assert caught.value.reason_code in HALF_PICTURES | {ReasonCode.NO_PIXEL_DATA}
    if part >= 0.5:
        assert caught.value.reason_code == ReasonCode.TRUNCATED


def test_a_file_cut_by_one_byte_is_noticed() -> None:
    ends = {"ExplicitVRLittleEndian": 1, "DeflatedExplicitVRLittleEndian": 2, "png": 1, "jpeg": 1}  # 2: may be padded
    ends |= dict.fromkeys(("JPEGLSLossless", "JPEG2000Lossless", "RLELossless"), 9)  # a delimiter of 8 bytes follows
    for name, cut in ends.items():
        for read in (read_grey, read_cheaply):
            with pytest.raises(Rejected) as caught:
                read(FILES[name][:-cut])
            assert caught.value.reason_code == ReasonCode.TRUNCATED, name


def test_a_truncated_codestream_in_a_whole_dicom_file_is_noticed() -> None:
    for syntax in (JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, HTJ2KLossless, RLELossless):
        dataset = as_dicom(GREY, syntax)
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        dataset.PixelData = encapsulate([frame[: len(frame) * 2 // 3]])
        for read in (read_grey, read_cheaply):
            with pytest.raises(Rejected) as caught:
                read(write_dicom(dataset))
            assert caught.value.reason_code in {ReasonCode.TRUNCATED, ReasonCode.CORRUPT_PIXELS}


@pytest.mark.parametrize("read", [read_grey, read_cheaply], ids=["exact", "cheap"])
@pytest.mark.parametrize("open_ended", [False, True], ids=["length given", "up to the end"])
@pytest.mark.parametrize("part", [0.5, 0.97])
def test_jpeg_2000_that_ends_in_zeros_is_truncated(
    part: float, open_ended: bool, read: Callable[[bytes], object]
) -> None:
    """A copy that ended before the space reserved for it: the decoder alone returns an image without an error."""
    frame = bytearray(imagecodecs.jpeg2k_encode(GREY, level=0, reversible=True, codecformat="j2k"))
    if open_ended:
        tile_part = frame.index(b"\xff\x90")
        frame[tile_part + 6 : tile_part + 10] = bytes(4)
    dataset = as_dicom(GREY, JPEG2000Lossless)
    dataset.PixelData = encapsulate([bytes(frame)])
    read(write_dicom(dataset))
    zeroed = bytes(frame[: int(len(frame) * part)]).ljust(len(frame), b"\0")
    assert imagecodecs.jpeg2k_decode(zeroed).shape == GREY.shape
    dataset.PixelData = encapsulate([zeroed])
    with pytest.raises(Rejected) as caught:
        read(write_dicom(dataset))
    assert caught.value.reason_code == ReasonCode.TRUNCATED


@pytest.mark.parametrize("name", ["png", "png 16", "JPEGLSLossless"])
def test_formats_that_can_tell_never_let_a_flipped_bit_pass(name: str) -> None:
    data, expected = FILES[name], read_grey(FILES[name])[0]
    chance = random.Random(5)
    start = 41 if name.startswith("png") else len(data) // 3
    for _ in range(40):
        damaged = bytearray(data)
        damaged[chance.randrange(start, len(data) - 20)] ^= 1 << chance.randrange(8)
        try:
            grey, _ = read_grey(bytes(damaged))
        except Rejected:
            continue
        np.testing.assert_array_equal(grey, expected)


def deflated_bomb(inflated_bytes: int) -> bytes:
    """A deflated DICOM file whose dataset ends in zeros without end."""
    whole = write_dicom(as_dicom(GREY, DeflatedExplicitVRLittleEndian))
    (group_length,) = struct.unpack_from("<I", whole, 140)
    start = 144 + group_length
    dataset = zlib.decompress(whole[start:], -zlib.MAX_WBITS)
    squeeze = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = [whole[:start], squeeze.compress(dataset)]
    block = bytes(1024 * 1024)
    parts += [squeeze.compress(block) for _ in range(inflated_bytes // len(block))]
    return b"".join([*parts, squeeze.flush()])


def test_deflate_bombs_are_stopped_at_the_cap() -> None:
    bomb = deflated_bomb(160 * 1024 * 1024)
    assert len(bomb) < 2 * 1024 * 1024
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(decode.__file__).parents[2])!r})
from cxrbatch.imaging.decode import Limits, read_grey
from cxrbatch.errors import Rejected
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_grey(data, Limits(max_inflated_mib=32))
except Rejected as problem:
    print(problem.reason_code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    answer = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, check=True)
    reason, grown_mib = answer.stdout.split()
    assert reason == b"inflates_too_far"
    assert int(grown_mib) < 32 + 64


def test_sequences_nested_hundreds_deep_are_refused() -> None:
    whole = write_dicom(as_dicom(GREY))
    opening = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000
    start = whole.index(b"\x08\x00\x16\x00UI")
    with pytest.raises(Rejected) as caught:
        read_grey(whole[:start] + opening + whole[start:])
    assert caught.value.reason_code in HALF_PICTURES


@pytest.mark.parametrize("tag", [b"\x40\x00\x75\x02", b"\x28\x00\x00\x30"], ids=["any", "modality lut"])
@pytest.mark.parametrize("defined", [False, True])
def test_a_sequence_of_very_many_items_costs_little(tag: bytes, defined: bool) -> None:
    items = b"\xfe\xff\x00\xe0\x00\x00\x00\x00" * 150_000
    length = len(items) if defined else 0xFFFFFFFF
    sequence = tag + b"SQ\x00\x00" + struct.pack("<I", length) + items
    whole = write_dicom(as_dicom(GREY))
    start = whole.index(b"\xe0\x7f\x10\x00O")
    data = whole[:start] + sequence + (b"" if defined else b"\xfe\xff\xdd\xe0" + bytes(4)) + whole[start:]
    if defined and tag[0] == 0x40:  # not read, so it costs nothing
        np.testing.assert_array_equal(read_grey(data)[0], GREY)
        return
    with pytest.raises(Rejected, match="items") as caught:
        read_grey(data)
    assert caught.value.reason_code is ReasonCode.CORRUPT_DICOM


def test_a_decoder_that_panics_or_runs_out_of_memory_costs_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicError(BaseException):
        pass

    for raised, expected in (
        (PanicError("SYNTH-001"), ReasonCode.CORRUPT_PIXELS),
        (MemoryError(), ReasonCode.DECODER_OUT_OF_MEMORY),
        (RecursionError(), ReasonCode.CORRUPT_DICOM),
    ):

        def fail(*_: object, problem: BaseException = raised) -> None:
            raise problem

        monkeypatch.setattr(decode, "read_png", fail)
        with pytest.raises(Rejected) as caught:
            read_grey(FILES["png"])
        assert caught.value.reason_code == expected
        assert "SYNTH" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.fuzz
def test_mutated_files_end_in_a_image_or_a_reason() -> None:
    """CXRBATCH_FUZZ_N mutations over all formats; the seed is in the message of a failure."""
    count = int(os.environ.get("CXRBATCH_FUZZ_N", "200"))
    seed = int(os.environ.get("CXRBATCH_FUZZ_SEED", "1"))
    chance = random.Random(seed)
    names = list(FILES)
    limits = Limits(max_pixels_mpx=4, max_inflated_mib=32)
    for number in range(count):
        name = names[number % len(names)]
        damaged = bytearray(FILES[name])
        reach = len(damaged) if chance.random() < 0.5 else min(1500, len(damaged))  # headers deserve half of it
        for _ in range(chance.choice((1, 1, 4, 30))):
            damaged[chance.randrange(reach)] = chance.choice((0, 255, 127, chance.randrange(256)))
        if chance.random() < 0.1:
            cut = chance.randrange(reach)
            del damaged[cut : cut + chance.randrange(1, 60)]
        try:
            grey, facts = read_grey(bytes(damaged), limits)
        except Rejected as problem:
            assert problem.reason.endswith("."), (seed, number, name)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, mutation {number} of {name}: {error!r}") from error
        else:
            assert grey.dtype == np.uint8, (seed, number, name)
            assert facts.grey_path, (seed, number, name)


def test_reading_does_not_leak_memory() -> None:
    for _ in range(5):
        read_grey(FILES["JPEGBaseline8Bit"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        read_grey(FILES["JPEGBaseline8Bit"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024


@pytest.mark.parametrize(
    ("place", "error"), [("formats.tiff._samples", NameError), ("dicom.frames._require_size", TypeError)]
)
def test_a_bug_of_a_reader_is_counted_and_not_taken_for_damage_alone(
    monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception]
) -> None:
    def broken(*args: object) -> None:
        raise error("ours")

    data = saved("TIFF") if "tiff" in place else write_dicom(as_dicom(GREY, syntax=JPEGBaseline8Bit))
    before = unexpected.total()
    decode_bytes(data, (), Limits(), Identifiers("drop"))
    monkeypatch.setattr(f"cxrbatch.imaging.{place}", broken)
    with pytest.raises(Rejected):
        decode_bytes(data, (), Limits(), Identifiers("drop"))
    assert unexpected.total() == before + 1


def test_a_directory_beyond_all_numbers_is_damage() -> None:
    before = unexpected.total()
    data = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 2**63) + bytes(100)
    with pytest.raises(Rejected) as caught:
        decode_bytes(data, (), Limits(), Identifiers("drop"))
    assert caught.value.reason_code == ReasonCode.TRUNCATED and unexpected.total() == before


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_a_png_whose_data_end_properly_before_its_last_row_is_truncated(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(160 * 144, dtype=np.uint32).astype(np.uint8).reshape(160, 144)).convert(mode).save(
        buffer, "PNG"
    )
    whole = buffer.getvalue()
    read_grey(whole)
    header = whole[12:20] + struct.pack(">I", 176) + whole[24:29]
    with pytest.raises(Rejected) as caught:
        read_grey(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    assert caught.value.reason_code == ReasonCode.TRUNCATED
