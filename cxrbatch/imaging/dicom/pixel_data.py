"""The bytes of Pixel Data: made what pydicom reads rightly, and looked at for more than the header declares."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import parse_basic_offsets, parse_fragments
from pydicom.uid import UID, ExplicitVRBigEndian

__all__ = ["ITEM", "begins_again", "has_excess", "mend_pixel_data"]

ITEM = b"\xfe\xff\x00\xe0"
_SINGLE = (None, "", 0, 1)  # NumberOfFrames of one frame
_FIRST_AT_ZERO = ITEM + b"\x04\0\0\0\0\0\0\0"
_NO_OFFSETS = ITEM + b"\0\0\0\0"


def mend_pixel_data(dataset: Dataset, syntax: UID) -> None:
    """Change the dataset where pydicom would misread its first frame."""
    value = dataset.get("PixelData")
    if not isinstance(value, bytes):
        return
    if syntax == ExplicitVRBigEndian and dataset.get("BitsAllocated") == 1 and dataset["PixelData"].VR == "OW":
        # Packed from the lowest bit of each 16-bit word (PS3.5 8.1.1 and 7.3), but pydicom takes its bytes in order.
        dataset["PixelData"].value = np.frombuffer(value[: len(value) // 2 * 2], "<u2").byteswap().tobytes()
    elif value.startswith(ITEM) and dataset.get("NumberOfFrames") in _SINGLE:
        # All fragments are of the one frame, whatever an offset table says. Some are wrong, or have one offset for
        # each fragment; viewers do without them.
        dataset.pop("ExtendedOffsetTable", None)
        end = 8 + int.from_bytes(value[4:8], "little")
        if end > 8 and not value.startswith(_FIRST_AT_ZERO) and not begins_again(dataset):
            dataset["PixelData"].value = _NO_OFFSETS + value[end:]


def has_excess(dataset: Dataset, frame_bytes: int) -> bool:
    """Whether uncompressed pixel data continue after the one frame that the header declares."""
    value = dataset.get("PixelData")
    whole_bytes = dataset.get("BitsAllocated") != 1 and isinstance(value, bytes)
    return whole_bytes and dataset.get("NumberOfFrames") in _SINGLE and len(value) > frame_bytes + 1


def begins_again(dataset: Dataset) -> bool:
    """Whether a later fragment begins like the first one: there is a second frame, though the header declares one."""
    if dataset.get("NumberOfFrames") not in _SINGLE:
        return False
    try:
        parse_basic_offsets(buffer := BytesIO(dataset.PixelData))
        offsets = parse_fragments(buffer)[1]
    except Exception:  # garbage behind the first frame, which an offset table kept pydicom from reading
        return True
    heads = [dataset.PixelData[at + 8 : at + 11] for at in offsets]
    return heads.count(heads[0]) > 1
