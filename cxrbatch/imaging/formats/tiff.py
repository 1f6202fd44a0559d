"""Read the stored samples of TIFF files (first page)."""

from __future__ import annotations

import io
import itertools
import logging
import math
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.formats.codecs import strict_jpeg8
from cxrbatch.imaging.formats.codestream import jpeg_header
from cxrbatch.imaging.formats.raster import flatten_alpha, upright
from cxrbatch.imaging.formats.stored import StoredImage, require_size
from cxrbatch.imaging.greyscale import GreyScale
from cxrbatch.imaging.limits import Limits
from cxrbatch.types import ImageFacts

__all__ = ["read_tiff"]

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_NAMES = {0: "MONOCHROME1", 1: "MONOCHROME2", 2: "RGB", 3: "PALETTE COLOR", 5: "CMYK", 6: "YBR_FULL"}
_PHOTOMETRIC, _ORIENTATION = 262, 274
_COMPLEX = (5, 6)  # SampleFormat
_EXTRA_SAMPLES, _UNASSOCIATED_ALPHA = 338, 2
_LZW, _JPEG = 5, 7
# Uncompressed, LZW, JPEG, deflate (both numbers), PackBits, Zstandard. tifffile supports dozens of others, but rare
# codecs tend to crash the process on damaged data.
_COMPRESSIONS = (1, _LZW, _JPEG, 8, 32946, 32773, 50000)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8, 18: 8}

#: Damage raises none of these (tried with 60,000 damaged files): a bug, which the caller reports (imaging/decode.py).
_BUGS = (AttributeError, NameError, AssertionError, ImportError)


def read_tiff(data: bytes, limits: Limits) -> StoredImage:
    """Read a grey, palette, RGB or CMYK TIFF of 1 to 64 bits, integer or float.

    Raises Rejected: TRUNCATED, CORRUPT_PIXELS, UNSUPPORTED_PIXELS, TOO_MANY_PIXELS, TOO_SMALL.
    """
    _require_directory(data)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            rows, columns = page.imagelength, page.imagewidth
            require_size(rows, columns, limits)
            _require_known_layout(page)
            _require_whole(page, len(data))
            if page.compression == _LZW:
                _require_sound_lzw(page, data)
            suspect = page.compression == _JPEG and _require_sound_jpeg(page, data)
            samples, scale, flags = _samples(page)
            if samples.shape[:2] != (rows, columns):
                raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "The TIFF file has a pixel layout that is not read.")
            if suspect:
                flags.append("decoder_warning")
            if _has_second_page(file) or _is_stack(page):
                flags.append("multi_frame")
            orientation = page.tags.valueof(_ORIENTATION, 1)
            bits, photometric = page.bitspersample, int(page.photometric)
    except (Rejected, MemoryError, *_BUGS):
        raise
    except Exception as error:  # tags of another type or number than the format has raise nearly anything
        raise Rejected(ReasonCode.CORRUPT_PIXELS, f"The TIFF file does not decode ({type(error).__name__}).") from error
    if orientation in range(2, 9):
        flags.append("rotated")
        samples = upright(samples, int(orientation))
    facts = ImageFacts(
        format="tiff",
        rows=rows,
        columns=columns,
        bits_stored=int(bits),
        photometric_interpretation=_NAMES.get(photometric, ""),
        decoder=f"tifffile {tifffile.__version__}",
        quality_flags=tuple(flags),
    )
    return StoredImage(samples, scale, facts)


def _require_directory(data: bytes) -> None:
    """Check that the first directory and what it points to are inside the file; many writers put them last.

    Raises Rejected: TRUNCATED.
    """
    order, big = ("<" if data[:2] == b"II" else ">"), 0x2B in data[2:4]
    head, word, entry = (8, "Q", 20) if big else (4, "I", 12)
    try:
        (start,) = struct.unpack_from(order + word, data, head)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        first = start + (8 if big else 2)
        end = first + count * entry
        for position in range(first, min(end, len(data)), entry):
            kind, values, offset = struct.unpack_from(order + "xxH" + word * 2, data, position)
            size = values * _TYPE_BYTES.get(kind, 0)
            end = max(end, offset + size if size > struct.calcsize(word) else 0)
    except (struct.error, OverflowError):  # also an offset beyond what an index can be
        end = len(data) + 1
    if end > len(data):
        raise Rejected(ReasonCode.TRUNCATED, "The TIFF file ends before its directory does.")


def _require_known_layout(page: Any) -> None:
    if page.compression not in _COMPRESSIONS:
        raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, f"TIFF compression {int(page.compression)} is not read.")
    if _PHOTOMETRIC not in page.tags:  # readers differ in whether 0 is then black or white
        raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "The TIFF file does not say which of its values are white.")
    is_complex = page.sampleformat in _COMPLEX
    if page.samplesperpixel > 5 or page.imagedepth != 1 or page.fillorder != 1 or is_complex:
        raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "The TIFF file has a pixel layout that is not read.")


def _require_sound_lzw(page: Any, data: bytes) -> None:
    """Check each LZW strip or tile, because imagecodecs checks it only if it has to determine the length itself.

    Given the length, as tifffile does, it reads beyond its buffer on damaged data and crashes the process.
    """
    parts = zip(page.dataoffsets, page.databytecounts, strict=True)
    for (offset, count), (least, most) in zip(parts, _part_lengths(page), strict=False):  # further parts are not read
        try:
            length = len(imagecodecs.lzw_decode(data[offset : offset + count]))
        except imagecodecs.LzwError as error:
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "A strip of the TIFF file does not decode.") from error
        if not least <= length <= most:
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "A strip of the TIFF file has another length than its rows.")


def _part_lengths(page: Any) -> Iterator[tuple[int, int]]:
    """The least and the most unpacked bytes of each strip or tile. Rows start on a byte (TIFF 6.0, BitsPerSample).

    The last strip (with planar samples, of each component) has only the remaining rows; some writers fill it up.
    """
    samples, planes = (page.samplesperpixel, 1) if page.planarconfig == 1 else (1, page.samplesperpixel)

    def bytes_of(columns: int) -> int:
        return -(-columns * samples * int(page.bitspersample) // 8)

    if page.is_tiled:
        size = bytes_of(page.tilewidth) * page.tilelength
        across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
        yield from itertools.repeat((size, size), across * down * planes)
        return
    row, rows = bytes_of(page.imagewidth), max(1, int(page.rowsperstrip))
    for _ in range(planes):
        for first in range(0, page.imagelength, rows):
            left = page.imagelength - first
            yield row * min(rows, left), row * rows


def _require_sound_jpeg(page: Any, data: bytes) -> bool:
    """Check each JPEG strip or tile as strictly as a JPEG file; returns whether one is suspect."""
    tables = bytes(page.jpegtables)[:-2] if page.jpegtables else b"\xff\xd8"
    suspect = False
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        stream = tables + data[offset + 2 : offset + count]
        header = jpeg_header(stream)
        if header.precision == 8 and header.components in (1, 3):
            _, warned = strict_jpeg8(stream, "GRAY" if header.components == 1 else "RGB", header)
            suspect = suspect or warned
    return suspect


def _require_whole(page: Any, size: int) -> None:
    """Check that every strip or tile is inside the file, and that there are as many as the size needs."""
    if not page.dataoffsets or len(page.dataoffsets) != len(page.databytecounts):
        raise Rejected(ReasonCode.CORRUPT_PIXELS, "The TIFF file has no consistent table of its pixel data.")
    if any(offset + count > size for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)):
        raise Rejected(ReasonCode.TRUNCATED, "The TIFF file ends before its pixel data do.")
    if not all(page.databytecounts) or len(page.dataoffsets) < math.prod(page.chunked):
        raise Rejected(ReasonCode.TRUNCATED, "The TIFF file lacks a part of its pixel data.")
    if page.compression == 1 and sum(page.databytecounts) * 8 < page.imagelength * page.imagewidth * page.bitspersample:
        raise Rejected(ReasonCode.TRUNCATED, "The TIFF file has fewer bytes of pixels than its size needs.")


def _samples(page: Any) -> tuple[NDArray[Any], GreyScale, list[str]]:
    samples = np.asarray(page.asarray())
    photometric, bits = int(page.photometric), int(page.bitspersample)
    if page.planarconfig == 2 and samples.ndim == 3:
        samples = np.moveaxis(samples, 0, -1)
    if samples.ndim == 4 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.dtype == np.bool_:
        samples = samples.astype(np.uint8)
    flags: list[str] = []
    # Only by unassociated alpha: colours of associated alpha are composited already, other extra samples are no alpha.
    # A fourth sample of RGB that the file says nothing of is alpha in practice.
    is_rgba = photometric == _RGB and samples.ndim == 3 and samples.shape[2] == 4 and _EXTRA_SAMPLES not in page.tags
    has_alpha = is_rgba or tuple(page.extrasamples) == (_UNASSOCIATED_ALPHA,)
    if photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
        if samples.ndim == 3:
            samples, flags = flatten_alpha(samples) if has_alpha else (samples[..., 0], [])
        scale = GreyScale(bits, inverted=photometric == _WHITE_IS_ZERO, may_fill_range=bits == 16)
        return samples, scale, flags
    if photometric == _PALETTE and samples.ndim == 2:
        colours = np.moveaxis(np.asarray(page.colormap), 0, -1)[samples]
        return colours.astype(np.uint16), GreyScale(16, may_fill_range=True), flags
    if samples.ndim != 3 or samples.shape[2] < 3 or samples.dtype.kind != "u" or samples.dtype.itemsize > 2:
        raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "The TIFF file has a pixel layout that is not read.")
    if photometric == _CMYK:
        top = int(np.iinfo(samples.dtype).max)
        inks = top - samples[..., :4].astype(np.uint64)
        rgb = (inks[..., :3] * inks[..., 3:] + top // 2) // top
        return rgb.astype(samples.dtype), GreyScale(bits, may_fill_range=bits == 16), flags
    if photometric != _RGB and (photometric, page.compression) != (_YCBCR, _JPEG):  # only of JPEG it is turned to RGB
        raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "The TIFF file has a colour space that is not read.")
    if has_alpha:
        samples, flags = flatten_alpha(samples)
    return samples[..., :3], GreyScale(bits, may_fill_range=bits == 16), flags


def _is_stack(page: Any) -> bool:
    """Whether one directory is of several images: grey samples side by side, or images that its description counts.

    ImageJ and tifffile write only the first image's directory where a stack is large; the others' pixels follow.
    """
    if page.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) and page.samplesperpixel > 2:  # one and alpha are no stack
        return True
    with suppress(ValueError, KeyError, TypeError):  # a description may say anything
        if page.is_shaped:
            shape = tifffile.tifffile.shaped_description_metadata(page.shaped_description)["shape"]
            return bool(math.prod(shape) > math.prod(page.shape))
    images = re.search(r"^images=(\d{1,18})$", page.description, re.MULTILINE) if page.is_imagej else None
    return images is not None and int(images[1]) > 1


def _has_second_page(file: Any) -> bool:
    try:
        return bool(file.pages[1])
    except Exception:
        return False
