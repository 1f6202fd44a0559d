"""How the DICOM objects that cxrbatch writes are recognised when they come back as input.

A PACS forwards what it stores: without this, a capture would be scored, and its result sent, for ever. Needs no DICOM
library.
"""

from __future__ import annotations

import hashlib
import uuid

__all__ = ["MANUFACTURER", "SERIES_DESCRIPTIONS", "is_own_object", "is_own_uid", "make_uid"]

MANUFACTURER = "cxrbatch"  #: of every object that we write; the samples have another one
#: By kind of object. LO, at most 64 characters.
SERIES_DESCRIPTIONS = {
    "sc": "cxrbatch capture (research use, not for diagnosis)",
    "sr": "cxrbatch report (research use, not for diagnosis)",
}


def make_uid(*parts: str) -> str:
    """A UID below 2.25 (PS3.5 B.2) that follows from `parts`: the same parts give the same UID.

    The last 4 of the UUID's 16 bytes are a checksum of the other 12, by which `is_own_uid` knows it again.
    """
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    body = bytearray(digest[:12])
    body[6] = body[6] & 0x0F | 0x80  # version 8 of RFC 9562: made by a rule of our own
    body[8] = body[8] & 0x3F | 0x80  # its variant
    return f"2.25.{uuid.UUID(bytes=bytes(body) + _checksum(bytes(body))).int}"


def is_own_uid(uid: str) -> bool:
    """Whether `make_uid` made this UID; of others, one in 2**32 would pass for it."""
    number = uid.strip(" \0").removeprefix("2.25.")
    if not uid.startswith("2.25.") or not (number.isascii() and number.isdigit()) or len(number) > 39:
        return False
    value = int(number)
    if value >> 128:
        return False
    octets = value.to_bytes(16, "big")
    return octets[6] >> 4 == 8 and octets[12:] == _checksum(octets[:12])


def is_own_object(manufacturer: str, series_description: str, sop_instance_uid: str) -> bool:
    """Whether we wrote the object of which these are values. A copy under new UIDs still says who made it."""
    return (
        manufacturer == MANUFACTURER
        or series_description in SERIES_DESCRIPTIONS.values()
        or is_own_uid(sop_instance_uid)
    )


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"cxrbatch" + body).digest()[:4]
