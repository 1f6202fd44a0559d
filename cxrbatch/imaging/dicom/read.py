"""Parse bytes to a DICOM dataset and its true transfer syntax; inflating is limited."""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from io import BytesIO

from pydicom import config
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.limits import Limits
from cxrbatch.own_objects import is_own_object

__all__ = ["PIXEL_KEYWORDS", "read_dicom"]

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_STRUCTURED_REPORTS = "1.2.840.10008.5.1.4.1.1.88."  # PS3.6 A: all storage classes of SR begin so
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"

_DELIMITERS = 0xFFFE
#: What decides how an image is read: pixels, polarity, functional groups; ViewPosition and pixel spacings.
_DECIDING_GROUPS, _DECIDING_TAGS = (0x0028, 0x2050, 0x5200, 0x7FE0), (0x00185101, 0x00181164, 0x00182010)
#: Each element or item takes one to three reads, also when nested; an enhanced CT of 5,000 frames takes about 300,000.
#: A read costs memory and 7 microseconds: a small file of empty items could otherwise block a worker for minutes.
_MOST_READS = 300_000

# pydicom's messages quote element values, including names and identifiers; none may reach a log.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
config.settings.reading_validation_mode = config.IGNORE


def read_dicom(data: bytes, limits: Limits) -> tuple[Dataset, UID, bool]:
    """Parse a DICOM file, with or without preamble and file meta information (PS3.10 7.1).

    Returns the dataset, which has exactly one kind of pixel data, the transfer syntax of that, and whether the file
    ends inside its last element.
    Raises Rejected: DICOMDIR, STRUCTURED_REPORT, OWN_OUTPUT, NO_PIXEL_DATA, TRUNCATED, CORRUPT_DICOM, INFLATES_TOO_FAR.
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
            if isinstance(error.__context__, Rejected):  # raised by _BoundedReader, wrapped by pydicom
                raise error.__context__ from None
            raise Rejected(ReasonCode.CORRUPT_DICOM, f"The DICOM header does not parse ({_name(error)}).") from error
    for tag in [tag for tag in dataset.keys() if tag.group == _DELIMITERS]:  # noqa: SIM118
        del dataset[tag]  # a stray delimiter between or after the elements, which pydicom reads as an element
    _refuse_output(dataset)
    ended_early = any("end of file" in str(w.message).lower() or "EOF" in str(w.message) for w in caught)
    left = _bytes_behind(dataset, length)
    _require_pixels(dataset, ended_early or left < 0 or 0 < left < 8)
    return dataset, syntax, ended_early or left < 0


class _BoundedReader(BytesIO):
    """A BytesIO for pydicom that limits the number of reads, and so of elements and items."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _MOST_READS
        self._values: dict[BaseTag, memoryview] = {}

    def refuse_second(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        """Raise Rejected for an element with two values: PS3.5 7.1 allows one, and readers differ in which they take.

        pydicom calls it before each value of the dataset, and at first with no length to see the VR of the first one.
        """
        if (tag.group in _DECIDING_GROUPS or tag in _DECIDING_TAGS) and (length or self._values):
            value = self.getbuffer()[self.tell() : self.tell() + length]
            if self._values.setdefault(tag, value) != value:
                raise Rejected(ReasonCode.CORRUPT_DICOM, f"The element {tag} occurs twice, with different values.")
        return False

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise Rejected(ReasonCode.CORRUPT_DICOM, "The DICOM file has too many elements and items to be an image.")
        return super().read(size)


def _parse(data: bytes, limits: Limits) -> tuple[Dataset, UID, int]:
    """The dataset, the transfer syntax of the pixel data, and the number of bytes parsed."""
    declared, start = _file_meta(data)
    if declared == DeflatedExplicitVRLittleEndian:
        inflated = _inflate(data[start:], limits.max_inflated_bytes)
        reader = _BoundedReader(inflated)
        dataset = read_dataset(reader, is_implicit_VR=False, is_little_endian=True, stop_when=reader.refuse_second)
        dataset.set_original_encoding(False, True, "iso8859")
        return dataset, ExplicitVRLittleEndian, len(inflated)
    reader = _BoundedReader(data)
    dataset = read_partial(reader, reader.refuse_second, force=True)
    meta = getattr(dataset, "file_meta", FileMetaDataset())
    if _text(meta, "MediaStorageSOPClassUID") == _MEDIA_STORAGE_DIRECTORY or "DirectoryRecordSequence" in dataset:
        raise Rejected(ReasonCode.DICOMDIR, "The file is a DICOMDIR, a table of contents without images.")
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


def _bytes_behind(dataset: Dataset, length: int) -> int:
    """The bytes behind the last element; negative where it ends after the file does, 0 where nobody knows."""
    tags = list(dataset.keys())
    last = dataset.get_item(tags[-1]) if tags else None
    if not isinstance(last, RawDataElement) or last.length == 0xFFFFFFFF:
        return 0
    return length - (last.value_tell + last.length)


def _refuse_output(dataset: Dataset) -> None:
    """What reports on images is no image to report on. Ours first: a PACS sends them back."""
    if is_own_object(*(_text(dataset, name) for name in ("Manufacturer", "SeriesDescription", "SOPInstanceUID"))):
        raise Rejected(ReasonCode.OWN_OUTPUT, "The object was written by cxrbatch.")
    if _text(dataset, "SOPClassUID").startswith(_STRUCTURED_REPORTS):
        raise Rejected(ReasonCode.STRUCTURED_REPORT, "The DICOM file is a structured report.")


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
    raise Rejected(ReasonCode.NO_PIXEL_DATA, "The DICOM file holds no image.")


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return str(value).strip("\x00 ") if value is not None else ""


def _name(error: BaseException) -> str:
    return type(error).__name__
