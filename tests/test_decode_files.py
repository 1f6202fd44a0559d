"""Rasters, junk and the file system: the content decides, and every failure has a reason code."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from cxrbatch.errors import ReasonCode, Rejected, Retry
from cxrbatch.imaging import decode
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes, decode_file, read_grey
from cxrbatch.imaging.formats import raster
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, colour_pattern, draw_chest
from cxrbatch.types import ModelInputSpec

IMAGE = draw_chest(Chest(rows=160, columns=144))
GREY = np.rint(IMAGE * 255).astype(np.uint8)
WIDE = np.rint(IMAGE * 65535).astype(np.uint16)
COLOUR = colour_pattern(rows=120, columns=160)
LIMITS = Limits()
WHO = Identifiers("hash", b"key")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(samples: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, **options)
    return buffer.getvalue()


def png(depth: int, colour_type: int, rows: list[bytes], width: int, *extra: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\x00" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *(chunk(e[:4], e[4:]) for e in extra), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def luma(rgb: Any) -> Any:
    return np.asarray(Image.fromarray(rgb).convert("L"))


def test_pydicom_is_loaded_with_the_first_dicom_file(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "b.dcm").write_bytes(write_dicom(as_dicom(GREY)))
    program = (
        "import sys; from pathlib import Path; from cxrbatch.imaging.decode import read_grey\n"
        "for name in ('a.png', 'b.dcm'):\n"
        "    read_grey((Path(sys.argv[1]) / name).read_bytes()); print('pydicom' in sys.modules)"
    )
    reported = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert reported.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(GREY), "PNG"),
        saved(Image.fromarray(GREY).convert("RGB"), "PNG"),
        saved(Image.fromarray(GREY).convert("RGBA"), "PNG"),
        saved(Image.fromarray(GREY).convert("LA"), "PNG"),
        saved(Image.fromarray(GREY), "TIFF"),
        saved(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
        saved(Image.fromarray(GREY), "TIFF", compression="packbits"),
        tiff(GREY, compression="zlib", predictor=True),
        tiff(GREY, byteorder=">"),
        tiff(GREY, bigtiff=True, tile=(64, 64)),
        tiff(255 - GREY, photometric="miniswhite"),
        tiff(np.stack([GREY] * 3, axis=-1), photometric="rgb"),
        tiff(np.stack([GREY] * 3), photometric="rgb", planarconfig="separate"),
        imagecodecs.jpegls_encode(GREY),
        imagecodecs.jpeg8_encode(GREY, lossless=True),
    ],
)
def test_lossless_8_bit_files_come_through_bit_identical(data: bytes) -> None:
    grey, facts = read_grey(data)
    np.testing.assert_array_equal(grey, GREY)
    assert facts.quality_flags == ()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_grey_jpeg_equals_pillow(options: dict[str, Any]) -> None:
    data = saved(Image.fromarray(GREY), "JPEG", **options)
    np.testing.assert_array_equal(read_grey(data)[0], np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_colour_jpeg_becomes_luma(mode: str) -> None:
    data = saved(Image.fromarray(COLOUR).convert(mode), "JPEG", quality=90)
    grey, facts = read_grey(data)
    expected = luma(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(grey.astype(int) - expected).max() <= 1
    assert "colour" in facts.quality_flags


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(GREY), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        from PIL import ImageOps

        expected = np.asarray(ImageOps.exif_transpose(image))
    grey, facts = read_grey(data)
    np.testing.assert_array_equal(grey, expected)
    assert ("rotated" in facts.quality_flags) == (orientation > 1)
    assert (facts.rows, facts.columns) == GREY.shape


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_png_of_few_bits(depth: int) -> None:
    levels = GREY >> (8 - depth)
    padded = levels.reshape(160, -1, 8 // depth)
    shifts = np.arange(8 // depth)[::-1] * depth
    rows = [(row << shifts).sum(axis=1).astype(np.uint8).tobytes() for row in padded.astype(int)]
    expected = levels * (255 // (2**depth - 1))
    np.testing.assert_array_equal(read_grey(png(depth, 0, rows, 144))[0], expected)
    keyed, facts = read_grey(png(depth, 0, rows, 144, b"tRNS\x00\x00"))  # as it is: composited on black
    np.testing.assert_array_equal(keyed, expected)
    assert "alpha" in facts.quality_flags
    if depth > 1:
        keyed, facts = read_grey(png(depth, 0, rows, 144, b"tRNS\x00" + bytes([levels.max()])))
        np.testing.assert_array_equal(keyed, np.where(levels == levels.max(), 0, expected))
        assert "alpha" in facts.quality_flags


def test_png_of_16_bits() -> None:
    grey, facts = read_grey(imagecodecs.png_encode(WIDE))
    np.testing.assert_allclose(grey, WIDE / 257, atol=0.5 + 1e-6)
    assert (facts.bits_stored, facts.grey_path) == (16, "whole_range")
    same, _ = read_grey(imagecodecs.png_encode(np.stack([WIDE] * 3, axis=-1)))
    np.testing.assert_array_equal(same, grey)
    twelve, facts = read_grey(imagecodecs.png_encode(WIDE >> 4))
    assert facts.grey_path == "percentile 0.5-99.5"
    assert twelve.min() == 0
    assert twelve.max() == 255


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
def test_png_of_8_bits_is_what_pillow_makes_of_it(mode: str) -> None:
    image = Image.fromarray(GREY if mode in ("L", "LA") else COLOUR).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(np.roll(GREY, 9, 0)[: image.height, : image.width]).resize(image.size))
    data = saved(image, "PNG", dpi=(300, 300), icc_profile=b"none that could be read")
    by_pillow, flags = raster.flatten_alpha(np.asarray(Image.open(io.BytesIO(data)).convert(mode)))
    grey, facts = read_grey(data)
    np.testing.assert_array_equal(grey, luma(by_pillow) if by_pillow.ndim == 3 else by_pillow)
    assert facts.decoder.startswith("imagecodecs")
    assert set(flags) <= set(facts.quality_flags)


def test_png_with_more_than_samples_is_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<rdf:Description tiff:Orientation="6"/>'
    rows = [row.tobytes() for row in GREY]
    turned = [
        saved(Image.fromarray(GREY), "PNG", exif=exif),
        png(8, 0, rows, 144, b"iTXt" + xmp),
        png(8, 0, rows, 144, b"eXIf" + exif.tobytes()[6:]),
    ]
    for data in turned:
        grey, facts = read_grey(data)
        np.testing.assert_array_equal(grey, np.rot90(GREY, -1))
        assert "rotated" in facts.quality_flags
    keyed, facts = read_grey(png(8, 0, rows, 144, b"tRNS\x00" + bytes([GREY.max()])))
    assert keyed.max() < GREY.max()
    assert facts.quality_flags == ("alpha",)
    whole = png(8, 0, rows, 144)
    start = whole.index(b"IDAT")
    unchecked = whole[start:-20]  # all but the zlib stream's own checksum, which libpng insists on
    length, crc = struct.pack(">I", len(unchecked) - 4), struct.pack(">I", zlib.crc32(unchecked))
    grey, facts = read_grey(whole[: start - 4] + length + unchecked + crc + whole[-12:])
    np.testing.assert_array_equal(grey, GREY)
    assert facts.decoder.startswith("pillow")


def test_interlaced_png() -> None:
    header = struct.pack(">IIBBBBB", 144, 160, 8, 0, 0, 0, 1)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [row.tobytes() for top, left, down, right in passes for row in GREY[top::down, left::right]]
    plain = png(8, 0, rows, 144)
    body = b"IHDR" + header
    interlaced = plain[:12] + body + struct.pack(">I", zlib.crc32(body)) + plain[33:]
    np.testing.assert_array_equal(read_grey(interlaced)[0], GREY)


def test_png_palette_and_animation() -> None:
    palette = Image.fromarray(COLOUR).quantize(64)
    expected = luma(np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(read_grey(saved(palette, "PNG"))[0], expected)
    second = Image.fromarray(GREY[::-1].copy())
    animated = saved(Image.fromarray(GREY), "PNG", save_all=True, append_images=[second])
    grey, facts = read_grey(animated)
    np.testing.assert_array_equal(grey, GREY)
    assert "multi_frame" in facts.quality_flags


@pytest.mark.parametrize("depth", [8, 16])
def test_alpha_is_composited_on_black_and_flagged(depth: int) -> None:
    grey = GREY if depth == 8 else WIDE
    alpha = np.full_like(grey, np.iinfo(grey.dtype).max)
    alpha[:80] = 0
    grey_out, facts = read_grey(imagecodecs.png_encode(np.stack([grey, alpha], axis=-1)))
    assert grey_out[:80].max() == 0
    np.testing.assert_allclose(grey_out[80:], grey[80:] / (1 if depth == 8 else 257), atol=0.5 + 1e-6)
    assert "alpha" in facts.quality_flags


def test_a_tiff_stack_in_one_directory_goes_to_review() -> None:
    stack = np.stack([GREY, 255 - GREY, GREY])
    imagej = tiff(GREY, photometric="minisblack", metadata=None, description="ImageJ=1.53t\nimages=3\nslices=3\n")
    for data in (
        tiff(stack, photometric="minisblack", truncate=True),
        tiff(stack, photometric="minisblack", planarconfig="separate"),
        imagej + stack[1:].tobytes(),
    ):
        grey, facts = read_grey(data)
        np.testing.assert_array_equal(grey, GREY)
        assert facts.quality_flags == ("multi_frame",)
    junk = [
        tiff(GREY, metadata=None, description=text)
        for text in ("ImageJ=\nimages=x", '{"shape": [160,}', '{"shape": 3}')
    ]
    for one in (tiff(GREY), tiff(GREY, imagej=True), *junk):
        assert read_grey(one)[1].quality_flags == ()


def test_extra_samples_of_a_tiff_are_alpha_only_if_they_say_so() -> None:
    other = np.roll(GREY, 40, 0)
    for kind, expected, flags in (
        ("unspecified", GREY, ()),
        ("assocalpha", GREY, ()),  # composited already
        ("unassalpha", (GREY.astype(int) * other + 127) // 255, ("alpha",)),
    ):
        for colours, photometric in ((1, "minisblack"), (3, "rgb")):
            samples = np.dstack([GREY] * colours + [other])
            grey, facts = read_grey(tiff(samples, photometric=photometric, planarconfig="contig", extrasamples=[kind]))
            np.testing.assert_array_equal(grey, expected)
            assert facts.quality_flags == flags


def test_a_fourth_sample_of_rgb_that_a_tiff_says_nothing_of_is_alpha() -> None:
    other = np.roll(GREY, 40, 0)
    data = bytearray(tiff(np.dstack([GREY] * 3 + [other]), photometric="rgb", extrasamples=["unassalpha"]))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        entry = file.pages.first.tags[338].offset
    data[entry : entry + 2] = (337).to_bytes(2, "little")  # another tag
    grey, facts = read_grey(bytes(data))
    np.testing.assert_array_equal(grey, (GREY.astype(int) * other + 127) // 255)
    assert facts.quality_flags == ("alpha",)


def test_png_of_16_bits_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, _ = read_grey(saved(Image.fromarray(WIDE), "PNG"))
    grey, facts = read_grey(saved(Image.fromarray(WIDE), "PNG", exif=exif))
    np.testing.assert_array_equal(grey, np.rot90(upright, -1))
    assert "rotated" in facts.quality_flags


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_more_than_8_bits(order: Any) -> None:
    grey, _ = read_grey(tiff(WIDE, byteorder=order))
    np.testing.assert_allclose(grey, WIDE / 257, atol=0.5 + 1e-6)
    white_is_zero, facts = read_grey(tiff(65535 - WIDE, byteorder=order, photometric="miniswhite"))
    np.testing.assert_array_equal(white_is_zero, grey)
    assert facts.inverted
    as_float, _ = read_grey(tiff(WIDE.astype(np.float32), byteorder=order))
    expected, _ = read_grey(write_dicom(as_dicom(WIDE, bits=16)))
    np.testing.assert_array_equal(as_float, expected)


def test_complex_numbers_are_no_greys() -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, WIDE.astype(np.complex64), photometric="minisblack")
    with pytest.raises(Rejected) as caught:
        read_grey(buffer.getvalue())
    assert caught.value.reason_code == ReasonCode.UNSUPPORTED_PIXELS


def test_tiff_pages_and_jpeg_strips() -> None:
    grey, facts = read_grey(tiff(np.stack([GREY, GREY[::-1]]), photometric="minisblack"))
    np.testing.assert_array_equal(grey, GREY)
    assert "multi_frame" in facts.quality_flags
    jpeg, _ = read_grey(saved(Image.fromarray(GREY), "TIFF", compression="jpeg"))
    assert np.abs(jpeg.astype(int) - GREY).mean() < 4


def bit_packed(samples: Any, bits: int, rows_in_strip: int, planar: int = 1) -> bytes:
    """A TIFF file of LZW strips: rows start on a byte; the last strip of each component has the remaining rows."""
    height, width = samples.shape[:2]
    count = 1 if samples.ndim == 2 else samples.shape[2]
    flat = [samples.reshape(height, -1)] if planar == 1 else list(np.moveaxis(samples, -1, 0))
    body, offsets, counts = bytearray(b"II*\0\0\0\0\0"), [], []
    for model_input in flat:
        bit_rows = (model_input[..., None] >> np.arange(bits)[::-1]) & 1
        rows = np.packbits(bit_rows.reshape(height, -1).astype(np.uint8), axis=1)
        for first in range(0, height, rows_in_strip):
            packed = bytes(imagecodecs.lzw_encode(rows[first : first + rows_in_strip].tobytes()))
            offsets.append(len(body))
            counts.append(len(packed))
            body += packed + b"\0" * (len(packed) % 2)
    tags = {256: [width], 257: [height], 258: [bits] * count, 259: [5], 262: [1 if count == 1 else 2], 273: offsets}
    tags |= {277: [count], 278: [rows_in_strip], 279: counts, 284: [planar]}
    entries = b""
    for tag, values in tags.items():
        raw = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            raw, body = struct.pack("<I", len(body)), body + raw
        entries += struct.pack("<HHI", tag, 4, len(values)) + raw
    body[4:8] = struct.pack("<I", len(body))
    return bytes(body + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("rows_in_strip", [7, 101, 200])
def test_lzw_rows_that_end_within_a_byte(bits: int, rows_in_strip: int) -> None:
    levels = GREY[:101, :91] >> (8 - bits)
    data = bit_packed(levels, bits, rows_in_strip)
    np.testing.assert_array_equal(read_grey(data)[0], levels.astype(int) * 255 // (2**bits - 1))
    by_libtiff = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    np.testing.assert_array_equal(by_libtiff, levels.astype(int) * 255 // (2**bits - 1))


@pytest.mark.parametrize("planar", [1, 2])
def test_lzw_colour_whose_last_strips_are_short(planar: int) -> None:
    rgb = np.stack([GREY[:101, :91], GREY[100::-1, :91], GREY[:101, 90::-1]], axis=-1)
    data = bit_packed(rgb, 8, 7, planar)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), rgb)
    np.testing.assert_array_equal(read_grey(data)[0], luma(rgb))
    # A strip in the middle that lacks a row is damage, even if it is as long as the last strip of a component.
    cut = bit_packed(rgb[:-1], 8, 7, planar).replace(
        struct.pack("<HHII", 257, 4, 1, 100), struct.pack("<HHII", 257, 4, 1, 101)
    )
    with pytest.raises(Rejected, match="another length"):
        read_grey(cut)


JUNK = {
    "empty": (b"", ReasonCode.EMPTY_FILE),
    "text": (b"not an image\n" * 50, ReasonCode.NOT_AN_IMAGE),
    "utf16": ("not an image\n".encode("utf-16") * 50, ReasonCode.NOT_AN_IMAGE),
    "html": (b"<html><body>502</body></html>", ReasonCode.NOT_AN_IMAGE),
    "pdf": (b"%PDF-1.7\n" + bytes(500), ReasonCode.NOT_AN_IMAGE),
    "elf": (b"\x7fELF\x02\x01\x01" + bytes(500), ReasonCode.NOT_AN_IMAGE),
    "gzip": (b"\x1f\x8b\x08" + bytes(500), ReasonCode.NOT_AN_IMAGE),
    "zeros": (bytes(5000), ReasonCode.NOT_AN_IMAGE),
    "noise": (np.random.default_rng(3).bytes(5000), ReasonCode.NOT_AN_IMAGE),
    "bmp": (saved(Image.fromarray(GREY), "BMP"), ReasonCode.UNSUPPORTED_FORMAT),
    "gif": (saved(Image.fromarray(GREY), "GIF"), ReasonCode.UNSUPPORTED_FORMAT),
    "webp": (saved(Image.fromarray(COLOUR), "WEBP"), ReasonCode.UNSUPPORTED_FORMAT),
    "jp2": (imagecodecs.jpeg2k_encode(GREY), ReasonCode.UNSUPPORTED_FORMAT),
    "magic only": (b"\x89PNG\r\n\x1a\n", ReasonCode.TRUNCATED),
    "jpeg magic only": (b"\xff\xd8\xff", ReasonCode.TRUNCATED),
    "tiff magic only": (b"II*\x00", ReasonCode.TRUNCATED),
    "preamble only": (bytes(128) + b"DICM", ReasonCode.CORRUPT_DICOM),
    "constant": (saved(Image.new("L", (99, 99), 5), "PNG"), ReasonCode.CONSTANT_IMAGE),
    "small": (saved(Image.fromarray(GREY[:20]), "PNG"), ReasonCode.TOO_SMALL),
    "png bomb": (png(8, 0, [b"\x00"], 1).replace(b"\x00\x00\x00\x01\x00\x00\x00\x01", b"\x00\x00N \x00\x00N "), None),
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_gets_a_reason_and_a_sentence(kind: str) -> None:
    data, expected = JUNK[kind]
    with pytest.raises(Rejected) as caught:
        read_grey(data)
    assert caught.value.reason.endswith(".")
    assert not isinstance(caught.value, Retry)
    if expected is not None:
        assert caught.value.reason_code == expected


def test_an_error_of_our_own_leaves_its_type_and_place_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> bool:
        raise ZeroDivisionError("DOE^JANE")

    monkeypatch.setattr(decode, "looks_negative", broken)
    with pytest.raises(Rejected, match="ZeroDivisionError") as caught:
        read_grey(saved(Image.fromarray(GREY), "PNG"))
    assert caught.value.reason_code is ReasonCode.CORRUPT_PIXELS
    assert "ZeroDivisionError" in caplog.text and "test_decode_files.py:" in caplog.text
    assert "DOE" not in caplog.text


def test_a_zip_archive_is_no_image() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", saved(Image.fromarray(GREY), "PNG"))
    with pytest.raises(Rejected, match="not_an_image"):
        read_grey(buffer.getvalue())


def big_png() -> bytes:
    rows = [bytes(20_000 // 8)] * 20_000
    return png(1, 0, rows, 20_000)


@pytest.mark.parametrize(
    "data",
    [
        big_png(),
        tiff(np.zeros((32, 20_000), np.uint8)),
        saved(Image.fromarray(np.zeros((40, 20_000), np.uint8)), "JPEG"),
    ],
)
def test_sizes_are_refused_before_decoding(data: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        read_grey(data, Limits(max_pixels_mpx=0.5))
    assert caught.value.reason_code == ReasonCode.TOO_MANY_PIXELS


def read(path: Path, **changes: int) -> Any:
    status = os.stat(path) if os.path.exists(path) else None
    size = changes.get("size", status.st_size if status else 0)
    mtime_ns = changes.get("mtime_ns", status.st_mtime_ns if status else 0)
    return decode_file(str(path), size, mtime_ns, (ModelInputSpec(64), ModelInputSpec(32, fit="stretch")), LIMITS, WHO)


def test_a_file_gives_hash_facts_and_model_inputs(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "image named wrongly.dcm"
    data = saved(Image.fromarray(GREY), "PNG")
    path.write_bytes(data)
    image = read(path)
    assert image.sha256 == hashlib.sha256(data).hexdigest()
    assert image.facts.format == "png"
    assert {spec.size: model_input.shape for spec, model_input in image.model_inputs.items()} == {
        64: (64, 64),
        32: (32, 32),
    }
    assert decode_bytes(data, (), LIMITS, WHO).facts == image.facts


def test_the_file_system_s_troubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(path: Path, **changes: int) -> tuple[ReasonCode, bool]:
        with pytest.raises(Rejected) as caught:
            read(path, **changes)
        assert str(tmp_path) not in str(caught.value)
        return caught.value.reason_code, isinstance(caught.value, Retry)

    image = tmp_path / "image.png"
    image.write_bytes(saved(Image.fromarray(GREY), "PNG"))
    assert reason(tmp_path / "gone.png") == (ReasonCode.VANISHED, True)
    assert reason(image, size=1) == (ReasonCode.CHANGED_WHILE_READ, True)
    assert reason(image, mtime_ns=1) == (ReasonCode.CHANGED_WHILE_READ, True)
    os.utime(image, ns=(0, 2**63 + 10**18))  # the year 2294, which the job queue cannot hold
    assert read(image).facts == read(image, mtime_ns=2**63 - 1).facts
    assert reason(image, mtime_ns=1) == (ReasonCode.CHANGED_WHILE_READ, True)
    os.mkfifo(tmp_path / "fifo.dcm")
    assert reason(tmp_path / "fifo.dcm") == (ReasonCode.NOT_A_REGULAR_FILE, False)
    assert reason(Path("/dev/zero")) == (ReasonCode.NOT_A_REGULAR_FILE, False)
    assert reason(tmp_path) == (ReasonCode.NOT_A_REGULAR_FILE, False)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert reason(tmp_path / "loop") == (ReasonCode.SYMLINK_LOOP, False)

    def denied(*_: Any) -> int:
        raise PermissionError(13, "Permission denied", "/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(decode.os, "open", denied)
        assert reason(image) == (ReasonCode.PERMISSION_DENIED, True)

        def broken(*_: Any) -> int:
            raise OSError(5, "Input/output error", "/secret/path")

        patch.setattr(decode.os, "open", broken)
        assert reason(image) == (ReasonCode.UNREADABLE, True)


def test_files_over_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.dcm"
    with path.open("wb") as file:
        file.truncate(3 * 1024 * 1024)
    with pytest.raises(Rejected) as caught:
        decode_file(str(path), path.stat().st_size, path.stat().st_mtime_ns, (), Limits(max_file_mib=2), WHO)
    assert caught.value.reason_code == ReasonCode.FILE_TOO_LARGE
