"""Read JPEG and JPEG 2000 headers without decoding, and detect truncation from the structure.

ITU-T T.81 (JPEG), T.87 (JPEG-LS), T.800 (JPEG 2000). Decoders tolerate different damage; these checks do not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from cxrbatch.errors import ReasonCode, Rejected

__all__ = ["J2kHeader", "JpegHeader", "j2k_codestream", "j2k_header", "jpeg_header", "jpegls_near", "require_whole_j2k"]

_SOF_MARKERS = frozenset((*range(0xC0, 0xD0), 0xF7)) - {0xC4, 0xC8, 0xCC}
_LOSSLESS_PROCESSES = frozenset((0xC3, 0xC7, 0xCB, 0xCF, 0xF7))
_BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xD9)))


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The frame header of a JPEG or JPEG-LS stream."""

    process: int  # the SOF marker's second byte: 0xC0 baseline, 0xC1 extended, 0xC3 lossless, 0xF7 JPEG-LS, ...
    precision: int  # bits
    rows: int
    columns: int
    components: int
    colours: Literal["RGB", "YBR_FULL", ""] = ""  # of three components, where the stream itself says so

    @property
    def kind(self) -> str:
        names = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive", 0xC3: "lossless", 0xF7: "ls"}
        return names.get(self.process, f"process 0x{self.process:02x}")

    @property
    def lossy(self) -> bool:
        """Whether a cosine transform changes samples; for JPEG-LS, see `jpegls_near`."""
        return self.process not in _LOSSLESS_PROCESSES


@dataclass(frozen=True, slots=True)
class J2kHeader:
    """The SIZ marker of a JPEG 2000 or HTJ2K codestream."""

    rows: int
    columns: int
    components: int
    precision: int  # bits, of the first component
    is_signed: bool
    lossy: bool  # by its transform (9-7); a reversible one may still have lost bits by truncation
    reductions: int  # how often its sides can be halved without decoding everything; 0 unless it is plain grey
    is_rgb: bool  # a colour transform is undone by decoding, whatever a header says of the colours


def jpeg_header(data: bytes) -> JpegHeader:
    """Read marker segments up to the start of frame. Raises Rejected: TRUNCATED, CORRUPT_PIXELS."""
    position, jfif, adobe = 2, False, None
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            raise Rejected(ReasonCode.TRUNCATED, "The JPEG stream ends before its frame header.")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in _BARE_MARKERS or marker == 0:
            position += 2
            continue
        if marker in (0xD9, 0xDA):
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "The JPEG stream has no frame header.")
        (length,) = struct.unpack_from(">H", data, position + 2)
        segment = data[position + 4 : position + 2 + length]
        jfif = jfif or (marker == 0xE0 and segment.startswith(b"JFIF\0"))
        if marker == 0xEE and segment[:5] == b"Adobe" and len(segment) >= 12:
            adobe = segment[11]
        if marker in _SOF_MARKERS:
            if len(segment) < 6:
                raise Rejected(ReasonCode.TRUNCATED, "The JPEG stream ends inside its frame header.")
            precision, rows, columns, components = struct.unpack_from(">BHHB", segment)
            return JpegHeader(marker, precision, rows, columns, components, _jpeg_colours(jfif, adobe, segment[6:]))
        position += 2 + length


def _jpeg_colours(is_jfif: bool, adobe_transform: int | None, components: bytes) -> Literal["RGB", "YBR_FULL", ""]:
    """What three components (9 bytes of the SOF) are, in the order of libjpeg, but for names R, G, B; "" is unknown."""
    if len(components) != 9:
        return ""
    if components[::3].upper() == b"RGB":
        return "RGB"
    if is_jfif or adobe_transform is not None:
        return "RGB" if adobe_transform == 0 and not is_jfif else "YBR_FULL"
    return "YBR_FULL" if len(set(components[1::3])) > 1 else ""  # only chroma has fewer samples


def jpegls_near(data: bytes) -> int:
    """The largest error of a sample in a JPEG-LS stream: NEAR of its first scan (T.87 C.2.3); 0 is lossless."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker in _BARE_MARKERS:
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xDA:
            near = position + 5 + 2 * data[position + 4]
            return data[near] if near < len(data) else 0
        position += 2 + length
    return 0


def j2k_codestream(data: bytes) -> bytes:
    """The raw codestream, which some writers wrap in JP2 boxes (PS3.5 A.4.4 forbids it)."""
    if data.startswith(b"\xff\x4f"):
        return data
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0:
        raise Rejected(ReasonCode.CORRUPT_PIXELS, "The pixel data hold no JPEG 2000 codestream.")
    return data[start:]


def j2k_header(codestream: bytes) -> J2kHeader:
    """Read the SIZ segment. Raises Rejected: TRUNCATED, CORRUPT_PIXELS."""
    if codestream[:4] != b"\xff\x4f\xff\x51":
        raise Rejected(ReasonCode.CORRUPT_PIXELS, "The JPEG 2000 codestream does not start with its size.")
    if len(codestream) < 43:
        raise Rejected(ReasonCode.TRUNCATED, "The JPEG 2000 codestream ends inside its header.")
    right, bottom, left, top = struct.unpack_from(">4I", codestream, 8)
    (components,) = struct.unpack_from(">H", codestream, 40)
    depth = codestream[42]
    precision = (depth & 0x7F) + 1
    plain = components == 1 and precision <= 16 and (left, top) == (0, 0)
    levels, irreversible, is_rgb = _coding_style(codestream)
    signed, reductions = bool(depth & 0x80), levels if plain else 0
    return J2kHeader(bottom - top, right - left, components, precision, signed, irreversible, reductions, is_rgb)


def _coding_style(codestream: bytes) -> tuple[int, bool, bool]:
    """Decomposition levels, whether the transform is lossy, and whether there is one of colours (T.800 A.6.1, COD)."""
    position = 2
    while position + 14 <= len(codestream):
        marker, length = struct.unpack_from(">HH", codestream, position)
        if marker == 0xFF52:
            return min(codestream[position + 9], 32), codestream[position + 13] == 0, codestream[position + 8] == 1
        if marker < 0xFF00 or marker == 0xFF90:
            break
        position += 2 + length
    return 0, False, False


def require_whole_j2k(codestream: bytes) -> int:
    """Walk the marker segments and tile parts; returns the offset after the end marker.

    Raises Rejected: TRUNCATED, CORRUPT_PIXELS.

    The last tile part may have length 0 ("up to the end of codestream"); then only the end marker is checked.
    """
    position = 2
    while True:
        if position + 4 > len(codestream):
            if codestream[position : position + 2] == b"\xff\xd9":
                return position + 2
            raise Rejected(ReasonCode.TRUNCATED, "The JPEG 2000 codestream ends before its end marker.")
        marker, length = struct.unpack_from(">HH", codestream, position)
        if marker == 0xFFD9:
            return position + 2
        if marker < 0xFF00:
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "The JPEG 2000 codestream has no marker where one must be.")
        if marker != 0xFF90:
            position += 2 + length
            continue
        if position + 12 > len(codestream):
            raise Rejected(ReasonCode.TRUNCATED, "The JPEG 2000 codestream ends inside a tile part.")
        (tile_part_length,) = struct.unpack_from(">I", codestream, position + 6)
        if tile_part_length == 0:
            if b"\xff\xd9" in codestream[-4:]:
                return codestream.rindex(b"\xff\xd9") + 2
            raise Rejected(ReasonCode.TRUNCATED, "The JPEG 2000 codestream ends before its end marker.")
        if tile_part_length < 14:
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "A JPEG 2000 tile part has an impossible length.")
        position += tile_part_length
        if position > len(codestream):
            raise Rejected(ReasonCode.TRUNCATED, "The JPEG 2000 codestream ends inside a tile part.")
