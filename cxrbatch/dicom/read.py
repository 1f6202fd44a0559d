"""Bytes to a DICOM dataset with its true transfer syntax, and nothing inflated beyond its cap."""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from io import BytesIO

from pydicom import config
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import dcmread, read_dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.formats.limits import Limits

__all__ = ["PIXEL_KEYWORDS", "read_dicom"]

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"

# Its messages quote element values, names and identifiers among them; none may reach a log.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
config.settings.reading_validation_mode = config.IGNORE


def read_dicom(data: bytes, limits: Limits) -> tuple[Dataset, UID]:
    """Parse a DICOM file, with or without preamble and file meta information (PS3.10 7.1).

    Returns the dataset, which holds exactly one kind of pixel data, and the transfer syntax of those.
    Raises Rejected: DICOMDIR, NO_PIXEL_DATA, TRUNCATED, CORRUPT_DICOM, INFLATES_TOO_FAR.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset, syntax, length = _parse(data, limits)
        except (Rejected, MemoryError):
            raise
        except (EOFError, struct.error) as error:
            raise Rejected(ReasonCode.TRUNCATED, "The DICOM file ends inside an element.") from error
        except Exception as error:
            raise Rejected(ReasonCode.CORRUPT_DICOM, f"The DICOM header does not parse ({_name(error)}).") from error
    ended_early = any("end of file" in str(w.message).lower() or "EOF" in str(w.message) for w in caught)
    _require_pixels(dataset, ended_early or _is_cut(dataset, length))
    return dataset, syntax


def _parse(data: bytes, limits: Limits) -> tuple[Dataset, UID, int]:
    """Dataset, transfer syntax of the pixel data, and the length of what was parsed in bytes."""
    declared, start = _file_meta(data)
    if declared == DeflatedExplicitVRLittleEndian:
        inflated = _inflate(data[start:], limits.max_inflated_bytes)
        dataset = read_dataset(BytesIO(inflated), is_implicit_VR=False, is_little_endian=True)
        dataset.set_original_encoding(False, True, "iso8859")
        return dataset, ExplicitVRLittleEndian, len(inflated)
    dataset = dcmread(BytesIO(data), force=True)
    meta = getattr(dataset, "file_meta", FileMetaDataset())
    if _text(meta, "MediaStorageSOPClassUID") == _MEDIA_STORAGE_DIRECTORY or "DirectoryRecordSequence" in dataset:
        raise Rejected(ReasonCode.DICOMDIR, "The file is a DICOMDIR, a table of contents without pictures.")
    syntax = UID(_text(meta, "TransferSyntaxUID"))
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = ExplicitVRBigEndian if not little else ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset, syntax, len(data)


def _file_meta(data: bytes) -> tuple[str, int]:
    """The TransferSyntaxUID as group 2 declares it, and where group 2 ends; ("", 0) without group 2."""
    position = 132 if data[128:132] == b"DICM" else 0
    syntax = ""
    while data[position : position + 2] == b"\x02\x00" and position + 8 <= len(data):
        long_form = data[position + 4 : position + 6] in (b"OB", b"OW", b"UN", b"UT", b"SQ")
        if long_form and position + 12 > len(data):
            break
        (length,) = struct.unpack_from("<I" if long_form else "<H", data, position + (8 if long_form else 6))
        value = position + (12 if long_form else 8)
        if data[position + 2 : position + 4] == b"\x10\x00":
            syntax = data[value : value + length].rstrip(b"\x00 ").decode("ascii", "replace")
        position = value + length
    return syntax, position


def _inflate(deflated: bytes, cap: int) -> bytes:
    """Inflate a deflated dataset (PS3.5 A.5). Raises Rejected: INFLATES_TOO_FAR, TRUNCATED, CORRUPT_DICOM."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    chunks: list[bytes] = []
    total, rest = 0, memoryview(deflated)
    step = 16 * 1024 * 1024
    try:
        while not inflater.eof:
            feed, rest = (inflater.unconsumed_tail, rest) if inflater.unconsumed_tail else (rest[:65536], rest[65536:])
            if not feed:
                raise Rejected(ReasonCode.TRUNCATED, "The deflated DICOM file ends early.")
            chunks.append(inflater.decompress(feed, min(step, cap - total + 1)))
            total += len(chunks[-1])
            if total > cap:
                raise Rejected(
                    ReasonCode.INFLATES_TOO_FAR,
                    f"The deflated DICOM file inflates beyond {cap // 2**20} MiB.",
                )
    except zlib.error as error:
        raise Rejected(ReasonCode.CORRUPT_DICOM, "The deflated DICOM file does not inflate.") from error
    return b"".join(chunks)


def _is_cut(dataset: Dataset, length: int) -> bool:
    """Whether the last element ends after the file does, or stray bytes of another element follow it."""
    tags = list(dataset.keys())
    if not tags:
        return False
    last = dataset.get_item(tags[-1])
    if not isinstance(last, RawDataElement) or last.length == 0xFFFFFFFF:
        return False
    end = last.value_tell + last.length
    return end > length or 0 < length - end < 8


def _require_pixels(dataset: Dataset, cut: bool) -> None:
    present = [keyword for keyword in PIXEL_KEYWORDS if keyword in dataset]
    if len(present) > 1:
        raise Rejected(ReasonCode.CORRUPT_DICOM, "The DICOM file has more than one kind of pixel data.")
    if present:
        value = dataset.get_item(present[0])
        if value is not None and value.value:
            return
    if cut:
        raise Rejected(ReasonCode.TRUNCATED, "The DICOM file ends before its pixel data do.")
    if len(dataset) == 0:
        raise Rejected(ReasonCode.CORRUPT_DICOM, "The DICOM file has no elements.")
    raise Rejected(ReasonCode.NO_PIXEL_DATA, "The DICOM file holds no picture.")


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return str(value).strip("\x00 ") if value is not None else ""


def _name(error: BaseException) -> str:
    return type(error).__name__
