"""Read the stored samples of PNG and JPEG files. Sizes and checksums are verified before decoding."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import imagecodecs
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.formats.codecs import SIMPLEJPEG, decode_jpeg, jpeg_shrink, strict_jpeg8
from cxrbatch.imaging.formats.codestream import jpeg_header
from cxrbatch.imaging.formats.stored import StoredImage, require_size
from cxrbatch.imaging.greyscale import GreyScale
from cxrbatch.imaging.limits import Limits
from cxrbatch.imaging.normalize import shrink_factor
from cxrbatch.types import ImageFacts, ModelInputSpec

__all__ = ["flatten_alpha", "read_jpeg", "read_png", "upright"]

_PILLOW = f"pillow {PIL.__version__}"
_ORIENTATION = 0x0112
# PNG chunks that do not change samples, and keywords of text chunks (at most 79 bytes) that Pillow interprets.
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD"}
_TELLING, _KEYWORD = re.compile(rb"exif|xmp|transparency", re.IGNORECASE), 4 + 79
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG colour type
#: Of each pass of an interlaced PNG: first column, first row, and the steps across and down.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_STEP = 1 << 20  # bytes that are inflated at once
# Sizes are checked against `Limits` before decoding; Pillow's own limit would be lower.
Image.MAX_IMAGE_PIXELS = None


def read_png(data: bytes, limits: Limits) -> StoredImage:
    """Read a PNG of any depth and colour type; the first image of an APNG.

    Raises Rejected: TRUNCATED, CORRUPT_PIXELS, TOO_MANY_PIXELS, TOO_SMALL.
    """
    png = _png_chunks(data)
    require_size(png.rows, png.columns, limits)
    decoder, orientation = f"imagecodecs {imagecodecs.__version__} png", 1
    try:
        if png.depth != 16 and not (png.plain and png.depth == 8 and not png.interlaced):
            raise ValueError("more in it than samples")
        samples, flags = flatten_alpha(np.asarray(imagecodecs.png_decode(data)))
        if not png.plain:
            orientation = _exif_orientation(data, "PNG")
    except MemoryError:
        raise
    except Exception as error:
        if png.depth == 16:
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "The PNG data do not decode.") from error
        decoder = _PILLOW  # supports the remaining layouts and reports damage, but not rows that are missing
        _require_all_rows(png)
        samples, flags, orientation = _by_pillow(data, "PNG", png.depth)
    if png.animated:
        flags.append("multi_frame")
    names = {0: "MONOCHROME2", 2: "RGB", 3: "PALETTE COLOR", 4: "MONOCHROME2", 6: "RGB"}
    return _image("png", samples, orientation, png.depth, flags, names.get(png.colour_type, ""), decoder)


def read_jpeg(data: bytes, limits: Limits, specs: Sequence[ModelInputSpec] = ()) -> StoredImage:
    """Read a JPEG: baseline, extended, progressive, lossless, LS; grey, colour, CMYK; EXIF orientation applied.

    The image is shrunk if the codec can and `specs` allow it: see `normalize.shrink_factor`.
    Raises Rejected: TRUNCATED, CORRUPT_PIXELS, UNSUPPORTED_PIXELS, TOO_MANY_PIXELS, TOO_SMALL.
    """
    header = jpeg_header(data)
    require_size(header.rows, header.columns, limits)
    orientation = _exif_orientation(data, "JPEG")
    most = 1 if orientation in range(2, 9) else shrink_factor(header.rows, header.columns, specs)
    shrunk = 1
    flags: list[str] = []
    photometric = {1: "MONOCHROME2", 3: "YBR_FULL"}.get(header.components, "CMYK")
    if header.components == 4 and header.precision == 8:
        _, suspect = strict_jpeg8(data, "CMYK", header)
        samples, _, _ = _by_pillow(data, "JPEG")
        decoder = _PILLOW
    elif header.components == 3 and header.precision == 8 and header.process != 0xF7:
        shrunk = jpeg_shrink(header, most)
        colour, suspect = strict_jpeg8(data, "RGB", header, shrunk)
        if colour is not None:
            samples, decoder = colour, SIMPLEJPEG
        else:
            samples, _, _ = _by_pillow(data, "JPEG")
            decoder, shrunk = _PILLOW, 1
    else:
        if header.components == 3 and header.lossy:
            raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "JPEG of more than 8 bits in colour is not read.")
        output = decode_jpeg(data, header, most)
        samples, decoder, suspect, shrunk = output.samples, output.decoder, output.suspect, output.shrunk
    if suspect:
        flags.append("decoder_warning")
    image = _image("jpeg", samples, orientation, header.precision, flags, photometric, decoder)
    whole = replace(image.facts, rows=header.rows, columns=header.columns)
    return replace(image, facts=whole, shrunk=shrunk)


def upright(samples: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF or TIFF Orientation (1-8) of (rows, columns, ...)."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return np.ascontiguousarray(samples)


def _image(
    format_: Any,
    samples: NDArray[Any],
    orientation: int,
    bits: int,
    flags: list[str],
    photometric: str,
    decoder: str,
) -> StoredImage:
    rows, columns = samples.shape[:2]
    if orientation in range(2, 9):
        flags = [*flags, "rotated"]
        samples = upright(samples, orientation)
    facts = ImageFacts(
        format=format_,
        rows=rows,
        columns=columns,
        bits_stored=bits,
        photometric_interpretation=photometric,
        decoder=decoder,
        quality_flags=tuple(flags),
    )
    depth = 8 if samples.dtype.itemsize == 1 else max(bits, 9)
    return StoredImage(samples, GreyScale(depth, may_fill_range=bits == 16), facts)


def _by_pillow(data: bytes, format_: str, depth: int = 8) -> tuple[NDArray[Any], list[str], int]:
    """8-bit samples, flags and orientation, by Pillow; `depth` is that of the file."""
    try:
        with Image.open(io.BytesIO(data), formats=(format_,)) as image:
            image.load()
            orientation = int(image.getexif().get(_ORIENTATION, 1))
            if (
                image.mode == "L" and "transparency" in image.info
            ):  # Pillow widens samples of 2 and 4 bits, not this one
                top = 2**depth - 1
                image.info["transparency"] = (image.info["transparency"] & top) * (255 // top)
            if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
                samples, flags = flatten_alpha(np.asarray(image.convert("RGBA")))
                return samples, flags, orientation
            grey = image.mode in ("L", "1")
            return np.asarray(image.convert("L" if grey else "RGB")), [], orientation
    except MemoryError:
        raise
    except Exception as error:
        code = ReasonCode.TRUNCATED if "truncated" in str(error).lower() else ReasonCode.CORRUPT_PIXELS
        raise Rejected(code, f"The {format_} data do not decode ({type(error).__name__}).") from error


def flatten_alpha(samples: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
    """Composite (rows, columns, 2 or 4) on black, exactly: colour x alpha / maximum, rounded."""
    if samples.ndim == 2 or samples.shape[2] == 3:
        return samples, []
    colour, alpha = samples[..., :-1], samples[..., -1:]
    full = np.iinfo(samples.dtype).max
    flags = []
    if not (alpha == full).all():
        flags = ["alpha"]
        colour = ((colour.astype(np.uint64) * alpha + full // 2) // full).astype(samples.dtype)
    return (colour[..., 0] if colour.shape[2] == 1 else colour), flags


def _exif_orientation(data: bytes, format_: str) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=(format_,)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


@dataclass(frozen=True, slots=True)
class _Png:
    """The contents of a PNG file's chunks."""

    columns: int
    rows: int
    depth: int  # bits of a sample
    colour_type: int
    animated: bool
    interlaced: bool
    plain: bool  # no chunk that changes the image: no palette, key, EXIF or XMP
    deflated: tuple[memoryview, ...]  # the parts of the pixel data


def _png_chunks(data: bytes) -> _Png:
    """Check every chunk's length and the CRC of the critical ones. Raises Rejected: TRUNCATED, CORRUPT_PIXELS."""
    position, header, animated, plain = 8, None, False, True
    pixels: list[memoryview] = []
    while True:
        if position + 12 > len(data):
            raise Rejected(ReasonCode.TRUNCATED, "The PNG file ends before its end chunk.")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise Rejected(ReasonCode.TRUNCATED, "The PNG file ends inside a chunk.")
        body = memoryview(data)[position + 4 : end - 4]
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(body) != struct.unpack_from(">I", data, end - 4)[0]:
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "A PNG chunk does not match its checksum.")
        if header is None:
            if kind != b"IHDR" or length != 13:
                raise Rejected(ReasonCode.CORRUPT_PIXELS, "The PNG file does not start with its header.")
            header = struct.unpack_from(">IIBBBBB", data, position + 8)
        if kind == b"IDAT":
            pixels.append(body[4:])
        animated = animated or kind == b"acTL"
        plain = plain and (kind in _PLAIN_CHUNKS or (kind == b"tEXt" and not _TELLING.search(body[:_KEYWORD])))
        if kind == b"IEND":
            break
        position = end
    if not pixels:
        raise Rejected(ReasonCode.CORRUPT_PIXELS, "The PNG file has no pixel data.")
    columns, rows, depth, colour_type, _, _, interlaced = header
    return _Png(columns, rows, depth, colour_type, animated, bool(interlaced), plain, tuple(pixels))


def _require_all_rows(png: _Png) -> None:
    """Raise Rejected (TRUNCATED) if the pixel data end before the last row: Pillow would fill it up with zeros."""
    bits, missing = png.depth * _CHANNELS.get(png.colour_type, 1), 0
    for left, top, across, down in _ADAM7 if png.interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(png.columns - left) // across), -(-(png.rows - top) // down)
        missing += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    inflater = zlib.decompressobj()
    for part in png.deflated:
        feed: bytes | memoryview = part
        while missing > 0:
            try:
                inflated = len(inflater.decompress(feed, min(missing, _STEP)))
            except zlib.error:  # Pillow says so
                return
            feed = inflater.unconsumed_tail
            missing -= inflated
            if not inflated:
                break
    if missing > 0:
        raise Rejected(ReasonCode.TRUNCATED, "The PNG data end before the image does.")
