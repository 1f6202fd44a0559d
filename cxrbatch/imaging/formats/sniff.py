"""Recognise a file's format by its first bytes, never by its name."""

from __future__ import annotations

import struct
from typing import Literal

from cxrbatch.errors import ReasonCode, Rejected

__all__ = ["ImageFormat", "sniff"]

ImageFormat = Literal["dicom", "png", "jpeg", "tiff"]

#: Image formats that are recognised but not read.
_OTHER_PICTURES: tuple[tuple[bytes, str], ...] = (
    (b"BM", "BMP"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"\x00\x00\x01\x00", "icon"),
    (b"\x5c\x01\x00\x00", "NIfTI"),
    (b"NRRD", "NRRD"),
    (b"\x93NUMPY", "NumPy"),
    (b"P5", "PGM"),
    (b"P6", "PPM"),
)
_NOT_PICTURES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\x00", "xz data"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"SQLite format 3\x00", "a database"),
)
_VALUE_REPRESENTATIONS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_FIRST_GROUPS = frozenset((0x0000, 0x0002, 0x0004, 0x0008, 0x0010, 0x0018, 0x0020, 0x0028))
_UNDEFINED_LENGTH = 0xFFFFFFFF
_ELEMENTS_TO_BELIEVE = 3


def sniff(data: bytes) -> ImageFormat:
    """Which of the four formats `data` (the whole file) has.

    Raises Rejected: EMPTY_FILE, UNSUPPORTED_FORMAT (another image format), NOT_AN_IMAGE.
    DICOM without the 128-byte preamble (PS3.10 7.1) is accepted if its first elements parse.
    """
    if not data:
        raise Rejected(ReasonCode.EMPTY_FILE, "The file has no bytes.")
    if data[128:132] == b"DICM":
        return "dicom"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return "tiff"
    if _looks_like_bare_dicom(data):
        return "dicom"
    raise _refusal(data)


def _refusal(data: bytes) -> Rejected:
    for magic, name in _OTHER_PICTURES:
        if data.startswith(magic):
            return Rejected(ReasonCode.UNSUPPORTED_FORMAT, f"The file is a {name} image, which is not read.")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return Rejected(ReasonCode.UNSUPPORTED_FORMAT, "The file is a WebP image, which is not read.")
    if data[4:8] == b"ftyp":
        return Rejected(ReasonCode.UNSUPPORTED_FORMAT, "The file is an HEIF, AVIF or video file, which is not read.")
    return Rejected(ReasonCode.NOT_AN_IMAGE, f"The file is {_describe(data)}, not an image.")


def _describe(data: bytes) -> str:
    for magic, name in _NOT_PICTURES:
        if data.startswith(magic):
            return name
    head = data[:4096]
    if not head.strip(b"\x00"):
        return "filled with zeros"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if start.startswith(b"<?xml"):
        return "XML"
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        return "text"
    return "of an unknown kind"


def _looks_like_bare_dicom(data: bytes) -> bool:
    return any(_elements_parse(data, little, explicit) for little, explicit in ((1, 1), (1, 0), (0, 1)))


def _elements_parse(data: bytes, little_endian: int, explicit: int) -> bool:
    """Whether the first elements have rising tags, known VRs (if explicit) and lengths inside the file."""
    order = "<" if little_endian else ">"
    position, previous, good = 0, -1, 0
    while good < _ELEMENTS_TO_BELIEVE and position + 8 <= len(data):
        group, element = struct.unpack_from(order + "HH", data, position)
        tag = group << 16 | element
        if (previous < 0 and group not in _FIRST_GROUPS) or tag <= previous:
            return False
        header, length = 8, 0
        if explicit or group == 0x0002:
            vr = data[position + 4 : position + 6]
            if vr not in _VALUE_REPRESENTATIONS:
                return False
            if vr in _LONG_VRS:
                if position + 12 > len(data):
                    return False
                header, (length,) = 12, struct.unpack_from(order + "I", data, position + 8)
            else:
                (length,) = struct.unpack_from(order + "H", data, position + 6)
        else:
            (length,) = struct.unpack_from(order + "I", data, position + 4)
        good += 1
        if length == _UNDEFINED_LENGTH:
            return good > 1
        position += header + length
        if position > len(data):
            return False
        previous = tag
    return good >= _ELEMENTS_TO_BELIEVE
