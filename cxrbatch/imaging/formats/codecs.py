"""Decode one compressed image to its samples, as strictly as the codec libraries allow.

Used for DICOM frames and for JPEG files. There is no colour conversion unless the caller requests it.
"""

from __future__ import annotations

import io
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import imagecodecs
import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.formats.codestream import (
    J2kHeader,
    JpegHeader,
    j2k_codestream,
    j2k_header,
    jpegls_near,
    require_whole_j2k,
)

__all__ = ["SIMPLEJPEG", "CodecOutput", "decode_j2k", "decode_jpeg", "decode_rle", "jpeg_shrink", "strict_jpeg8"]

_IMAGECODECS = f"imagecodecs {imagecodecs.__version__}"
_PILLOW = f"pillow {PIL.__version__}"
SIMPLEJPEG = f"simplejpeg {simplejpeg.__version__}"
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker")
_HARMLESS_EXTRANEOUS_BYTES = 2


@dataclass(frozen=True, slots=True, eq=False)
class CodecOutput:
    """Samples (rows, columns) or (rows, columns, components), unsigned unless the stream is signed J2K."""

    samples: NDArray[Any]
    decoder: str
    precision: int  # bits per sample that the decoder guarantees
    lossy: bool = False  # the coding may change samples
    suspect: bool = False  # decoded, but with a warning that is often harmless, or unverified
    shrunk: int = 1  # stream pixels per sample along each side: 1, or a power of two


def decode_jpeg(data: bytes, header: JpegHeader, most: int = 1) -> CodecOutput:
    """Decode a JPEG or JPEG-LS stream of 1 or 3 components, without colour conversion.

    8-bit grey is shrunk by a power of two, at most `most`.
    Raises Rejected: TRUNCATED, CORRUPT_PIXELS, UNSUPPORTED_PIXELS.
    """
    if header.components not in (1, 3) or header.rows == 0 or header.columns == 0:
        raise Rejected(
            ReasonCode.UNSUPPORTED_PIXELS,
            f"JPEG of {header.columns} x {header.rows} x {header.components} samples is not read.",
        )
    if header.process == 0xF7:
        require_end_marker(data)  # without one, CharLS searches for many seconds
        lossy = jpegls_near(data) > 0
        return CodecOutput(_run(imagecodecs.jpegls_decode, data), f"{_IMAGECODECS} jpegls", header.precision, lossy)
    suspect = False
    if header.precision == 8:
        shrunk = jpeg_shrink(header, most)
        grey, suspect = strict_jpeg8(data, "GRAY" if header.components == 1 else "RGB", header, shrunk)
        if header.components == 1 and grey is not None:
            return CodecOutput(grey, SIMPLEJPEG, 8, header.lossy, suspect, shrunk)
    else:
        require_end_marker(data)
    space = {1: "GRAYSCALE", 3: "YCBCR"}[header.components]
    samples = _run(imagecodecs.jpeg8_decode, data, colorspace=space, outcolorspace=space)
    # A lossless stream may exceed the range that it declares; decoders do not check.
    precision = header.precision if header.lossy else samples.dtype.itemsize * 8
    return CodecOutput(samples, f"{_IMAGECODECS} jpeg8", precision, header.lossy, suspect)


def jpeg_shrink(header: JpegHeader, most: int) -> int:
    """The power of two, up to `most`, by which the decoder can shrink; it still reads every coefficient."""
    return 1 if header.process == 0xC3 else min(8, 1 << most.bit_length() - 1)


def strict_jpeg8(data: bytes, space: str, header: JpegHeader, shrunk: int = 1) -> tuple[NDArray[np.uint8] | None, bool]:
    """Decode 8-bit JPEG, shrunk by `shrunk` (1, 2, 4, 8). The library's warnings become errors or `suspect`.

    Returns (samples, suspect); samples are None if this decoder does not support the layout.
    Raises Rejected: TRUNCATED, CORRUPT_PIXELS.
    """
    size = {"min_height": -(-header.rows // shrunk), "min_width": -(-header.columns // shrunk)} if shrunk > 1 else {}
    try:
        samples = simplejpeg.decode_jpeg(data, space, strict=True, **size)
        return samples[..., 0] if space == "GRAY" else samples, False
    except ValueError as error:
        message = str(error)
    if "Premature end" in message or "premature end" in message:
        raise Rejected(ReasonCode.TRUNCATED, "The JPEG stream ends before its image does.")
    extraneous = _EXTRANEOUS.search(message)
    if message.startswith("Corrupt JPEG data") and not (
        extraneous and int(extraneous.group(1)) <= _HARMLESS_EXTRANEOUS_BYTES
    ):
        raise Rejected(ReasonCode.CORRUPT_PIXELS, "The JPEG stream is damaged.")
    require_end_marker(data)
    try:
        samples = simplejpeg.decode_jpeg(data, space, strict=False, **size)
    except ValueError:
        return None, True
    return samples[..., 0] if space == "GRAY" else samples, True


def decode_j2k(data: bytes, most: int = 1) -> CodecOutput:
    """Decode a JPEG 2000 or HTJ2K stream; OpenJPEG reads both and, unlike OpenJPH, reports damage.

    Grey is shrunk by a power of two, at most `most`, if the stream has that resolution.
    A colour transform inside the codestream is undone. Raises Rejected: TRUNCATED, CORRUPT_PIXELS.
    """
    codestream = j2k_codestream(data)
    header = j2k_header(codestream)
    end = require_whole_j2k(codestream)
    steps = min(most.bit_length() - 1, header.reductions)
    if steps:
        with suppress(Exception):  # damage is judged by the full decode below
            low = _reduced_j2k(codestream[:end], header, steps)
            return CodecOutput(low, f"{_PILLOW} jpeg2k", header.precision, header.lossy, shrunk=1 << steps)
    samples = _run(imagecodecs.jpeg2k_decode, codestream)
    return CodecOutput(samples, f"{_IMAGECODECS} jpeg2k", header.precision, header.lossy)


def _reduced_j2k(codestream: bytes, header: J2kHeader, steps: int) -> NDArray[Any]:
    """A grey image at 1 / 2**steps, decoded by OpenJPEG through Pillow.

    The low-pass samples of the transform are centred on every second pixel (T.800 F.3), not between two pixels like a
    mean. They are shifted by interpolation, so that positions agree for all formats.
    """
    rows, columns = (-(-side >> steps) for side in (header.rows, header.columns))
    with Image.open(io.BytesIO(codestream), formats=("JPEG2000",)) as image:
        image.reduce = steps  # type: ignore[method-assign,assignment]
        image._size = (columns << steps, rows << steps)  # Pillow rounds to the nearest size, OpenJPEG up
        image.load()
        low = np.asarray(image)
    if low.shape != (rows, columns) or low.dtype.kind != "u":
        raise ValueError("another size or layout than asked for")
    samples = (low >> (low.dtype.itemsize * 8 - header.precision)).astype(np.int32)  # Pillow fills 8 or 16 bits
    if header.is_signed:
        samples -= 1 << header.precision - 1
    part = ((1 << steps) - 1, 1 << steps + 1)  # of a sample to the right and down: 1/4, 3/8, 7/16, ...
    for axis in (0, 1):
        after = np.concatenate([samples, samples.take([-1], axis)], axis)
        samples += np.diff(after, axis=axis) * part[0] // part[1]
    kind = ("i" if header.is_signed else "u") + str(low.dtype.itemsize)
    return samples.astype(kind)


def decode_rle(data: bytes, pixels: int, samples_per_pixel: int, bytes_per_sample: int) -> tuple[bytes, bool]:
    """Decode one RLE frame (PS3.5 Annex G) to little-endian samples, planar configuration 1.

    Returns them and whether a segment held more than its pixels (some writers pad segments).

    Raises Rejected: TRUNCATED, CORRUPT_PIXELS.
    """
    header = np.frombuffer(data[:64], "<u4")
    if len(header) < 16:
        raise Rejected(ReasonCode.TRUNCATED, "The RLE frame ends inside its header.")
    segments = samples_per_pixel * bytes_per_sample
    if int(header[0]) != segments:
        raise Rejected(ReasonCode.CORRUPT_PIXELS, f"The RLE frame has {header[0]} segments instead of {segments}.")
    bounds = [int(offset) for offset in header[1 : segments + 1]] + [len(data)]
    excess = 0
    planes = np.empty((samples_per_pixel, pixels, bytes_per_sample), np.uint8)
    for number, (start, end) in enumerate(pairwise(bounds)):
        if not 64 <= start <= end:
            code = ReasonCode.TRUNCATED if end == len(data) else ReasonCode.CORRUPT_PIXELS
            raise Rejected(code, "An RLE segment lies outside its frame.")
        unpacked = _run(imagecodecs.packbits_decode, data[start:end])
        if len(unpacked) < pixels:
            code = ReasonCode.TRUNCATED if end == len(data) else ReasonCode.CORRUPT_PIXELS
            raise Rejected(code, "An RLE segment is shorter than the image.")
        excess = max(excess, len(unpacked) - pixels)
        byte = bytes_per_sample - 1 - number % bytes_per_sample  # most significant first
        planes[number // bytes_per_sample, :, byte] = np.frombuffer(unpacked, np.uint8, pixels)
    return planes.tobytes(), excess > 1


def require_end_marker(data: bytes) -> None:
    """A JPEG stream ends with EOI; padding may follow. Raises Rejected: TRUNCATED."""
    if data.rfind(b"\xff\xd9") < 0:
        raise Rejected(ReasonCode.TRUNCATED, "The JPEG stream ends before its end marker.")


def _run(codec: Any, data: bytes, **options: Any) -> Any:
    try:
        return codec(data, **options)
    except MemoryError:
        raise
    except Exception as error:
        kind = type(error).__name__.removesuffix("Error").lower()
        raise Rejected(ReasonCode.CORRUPT_PIXELS, f"The {kind} decoder cannot read the pixel data.") from error
