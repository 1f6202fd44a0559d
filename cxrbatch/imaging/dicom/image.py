"""Read a DICOM file: its first frame, and the grey scale and polarity that its header defines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from cxrbatch.deidentify import Identifiers
from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.dicom.frames import FirstFrame, decode_first_frame
from cxrbatch.imaging.dicom.identity import describe, is_child, text
from cxrbatch.imaging.dicom.look_up_tables import palette_colours, read_table
from cxrbatch.imaging.dicom.read import PIXEL_KEYWORDS, read_dicom
from cxrbatch.imaging.formats.stored import StoredImage, require_size
from cxrbatch.imaging.greyscale import GreyScale, LookUpTable, Window
from cxrbatch.imaging.limits import Limits
from cxrbatch.imaging.normalize import shrink_factor
from cxrbatch.types import ImageFacts, ModelInputSpec

__all__ = ["read_dicom_image"]

_ITEMS, _MOST_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"), 100_000
_MOST_FRAMES = 2**31 - 1  # of an IS (PS3.5 6.2), and of the column in the store
_GREY = ("MONOCHROME1", "MONOCHROME2")
_NUMBERS = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth")
_MOST_OBLONG = 1.1  # training squashes images by more
_UNREADABLE = Window(math.nan, math.nan)  # shows that there is one, which is then flagged `window_unusable`


def read_dicom_image(
    data: bytes, limits: Limits, identifiers: Identifiers, specs: Sequence[ModelInputSpec] = ()
) -> StoredImage:
    """Read, check and decode; smaller if the codec can and `specs` allow it (see `normalize.shrink_factor`).

    Raises Rejected (see dicom.read and dicom.frames; TOO_MANY_PIXELS, TOO_SMALL).
    """
    dataset, syntax, is_cut = read_dicom(data, limits)
    rows, columns = (_positive(dataset, keyword) for keyword in ("Rows", "Columns"))
    require_size(rows, columns, limits)
    frames = max(1, int(_number(dataset, "NumberOfFrames") or 1))
    if frames > _MOST_FRAMES:
        raise Rejected(ReasonCode.CORRUPT_DICOM, "The header has no usable NumberOfFrames.")
    bits_stored = int(_number(dataset, "BitsStored") or _number(dataset, "BitsAllocated") or 0)
    if PIXEL_KEYWORDS[1] in dataset:
        bits_stored = 32
    elif PIXEL_KEYWORDS[2] in dataset:
        bits_stored = 64
    little_endian = syntax != ExplicitVRBigEndian  # the property of a UID raises for one that is no transfer syntax
    photometric = text(dataset, "PhotometricInterpretation")
    if photometric:
        dataset.add_new("PhotometricInterpretation", "CS", photometric)  # without spaces before it, which pydicom keeps
    frame = decode_first_frame(dataset, syntax, shrink_factor(rows, columns, specs))
    samples, scale = _seen(frame, dataset, photometric, bits_stored, little_endian)
    seen = {
        "multi_frame": frames > 1,
        "decoder_warning": frame.suspect or is_cut,
        "paediatric": is_child(text(dataset, "PatientAge")),
        "above_bits_stored": frame.above_bits_stored,
        "polarity_suspect": _contradicts_itself(dataset, photometric),
        "extreme_aspect": _has_oblong_pixels(dataset),
    }
    facts = ImageFacts(
        format="dicom",
        rows=rows,
        columns=columns,
        bits_stored=bits_stored,
        number_of_frames=frames,
        photometric_interpretation=photometric,
        decoder=frame.decoder,
        quality_flags=tuple(flag for flag, is_so in seen.items() if is_so),
        **describe(dataset, syntax, identifiers),  # type: ignore[arg-type]
    )
    return StoredImage(samples, scale, facts, frame.shrunk)


def _seen(
    frame: FirstFrame, dataset: Dataset, photometric: str, bits: int, little_endian: bool
) -> tuple[NDArray[Any], GreyScale]:
    """Samples and grey scale by PhotometricInterpretation (PS3.3 C.7.6.3.1.2)."""
    samples = frame.samples
    if photometric == "PALETTE COLOR":
        colours = palette_colours(samples, dataset, little_endian)
        return colours, GreyScale(colours.dtype.itemsize * 8, may_fill_range=True)
    if samples.ndim == 3:
        if photometric == "MONOCHROME1" or samples.dtype.kind != "u" or samples.dtype.itemsize > 4:
            raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "The colour pixels have a layout that nobody defines.")
        if samples.dtype.itemsize == 4:
            samples = (samples >> np.uint32(max(0, bits - 16))).astype(np.uint16)
            bits = min(bits, 16)
        return samples, GreyScale(bits, may_fill_range=True)
    if photometric not in _GREY:
        raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, f"One sample a pixel cannot be {photometric[:16] or 'nothing'}.")
    return samples, _grey_scale(dataset, photometric, bits, little_endian, samples.dtype.kind == "i")


def _grey_scale(dataset: Dataset, photometric: str, bits: int, little_endian: bool, signed: bool) -> GreyScale:
    """Modality LUT (C.11.1), VOI LUT (C.11.2), padding (C.7.5.1.1.2) and polarity of a grey image.

    MONOCHROME1 and Presentation LUT Shape INVERSE state the same fact (C.8.11.3 requires them together), so either
    or both invert once, after VOI (C.7.6.3.1.2).
    """
    places = list(_places(dataset))
    slope, intercept, _ = _pair(places, "RescaleSlope", "RescaleIntercept")
    half = slope == 0 or (None in (slope, intercept) and (slope or 1.0, intercept or 0.0) != (1.0, 0.0))
    modality_lut = _look_up_table(places, "ModalityLUTSequence", little_endian, signed)
    after_modality_signed = signed if modality_lut is None else False
    center, width, place = _pair(places, "WindowCenter", "WindowWidth")
    function = _voi_function(place) or "LINEAR"
    window = None if center is None and width is None else _UNREADABLE
    if center is not None and width is not None and function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        window = Window(center, width, function)
    voi_lut = _look_up_table(places, "VOILUTSequence", little_endian, after_modality_signed or (intercept or 0) < 0)
    if voi_lut is None and any(_items(one, "VOILUTSequence") for one in places):
        window = window or _UNREADABLE
    if any(_is_unreadable(places, keyword) for keyword in _NUMBERS) or (
        modality_lut is None and (half or any(_items(one, "ModalityLUTSequence") for one in places))
    ):
        window, voi_lut = _UNREADABLE, None  # each of them means something only together with the others
    if slope is None or intercept is None or slope == 0:
        slope, intercept = 1.0, 0.0
    padding = None
    if (low := _stored_number(dataset, "PixelPaddingValue", signed)) is not None:
        limit = _stored_number(dataset, "PixelPaddingRangeLimit", signed)
        padding = (low, low) if limit is None else (min(low, limit), max(low, limit))
    inverse = any(text(one, "PresentationLUTShape").upper() == "INVERSE" for one in places)
    return GreyScale(
        bits_stored=bits,
        slope=slope,
        intercept=intercept,
        modality_lut=modality_lut,
        voi_lut=voi_lut,
        window=window,
        padding=padding,
        inverted=photometric == "MONOCHROME1" or inverse,
    )


def _contradicts_itself(dataset: Dataset, photometric: str) -> bool:
    """Whether PresentationLUTShape is that of the other polarity (C.8.11.3.1.2). Viewers then differ."""
    other = {"MONOCHROME1": "IDENTITY", "MONOCHROME2": "INVERSE"}.get(photometric)
    return any(text(place, "PresentationLUTShape").upper() == other for place in _places(dataset))


def _has_oblong_pixels(dataset: Dataset) -> bool:
    """Whether pixels are clearly not square (10.7.1.3, C.7.6.3.1.7): the model input would show a squashed chest."""
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        try:
            height, width = (float(side) for side in dataset.get(keyword) or ())
        except Exception:  # not two numbers; what pydicom raises for values of another kind is open
            continue
        if min(height, width) > 0 and max(height, width) > _MOST_OBLONG * min(height, width):
            return True
    return False


def _places(dataset: Dataset) -> Iterator[Dataset]:
    """Where a grey-scale attribute may be: the dataset, then the functional groups of frame 0 and the shared ones."""
    yield dataset
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for item in _items(dataset, groups)[:1]:
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                yield from _items(item, macro)[:1]


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    try:
        # pydicom parses a sequence of defined length only at this point.
        raw = dataset.get_item(keyword)
        value = raw.value or b"" if isinstance(raw, RawDataElement) else b""
        if max(value.count(item) for item in _ITEMS) > _MOST_ITEMS:
            raise Rejected(ReasonCode.CORRUPT_DICOM, f"The {keyword} has more than {_MOST_ITEMS} items.")
        return [item for item in dataset.get(keyword) or [] if isinstance(item, Dataset)]
    except (RecursionError, Rejected):
        raise
    except Exception:
        return []


def _look_up_table(places: list[Dataset], keyword: str, little_endian: bool, signed_input: bool) -> LookUpTable | None:
    """The first item of a LUT sequence, or None if none parses."""
    item = next((item for place in places for item in _items(place, keyword)[:1]), None)
    return None if item is None else read_table(item, "LUT", little_endian, signed_input)


def _voi_function(place: Dataset) -> str:
    """Of several, as writers of several windows name, the first; empty if none."""
    said = text(place, "VOILUTFunction").upper()
    return said.split("'")[1] if said.startswith("['") else said  # pydicom's text of several values


def _is_unreadable(places: list[Dataset], keyword: str) -> bool:
    """Whether there is a value, but no number, such as one with a decimal comma."""
    return all(_number(place, keyword) is None for place in places) and any(text(place, keyword) for place in places)


def _pair(places: list[Dataset], first: str, second: str) -> tuple[float | None, float | None, Dataset]:
    """Two numbers that mean something only together, and their place: the first with both, else the first with one."""
    pairs = [(_number(place, first), _number(place, second), place) for place in places]
    return min(pairs, key=lambda pair: pair[:2].count(None))


def _number(dataset: Dataset, keyword: str) -> float | None:
    """The first value as a finite float; None if absent or unreadable."""
    try:
        value = dataset.get(keyword)
        if value is None or isinstance(value, bytes | str):
            value = None if not value else float(value)
        elif not isinstance(value, int | float):
            value = value[0] if len(value) else None
        number = None if value is None else float(value)
    except Exception:
        return None
    return number if number is not None and np.isfinite(number) else None


def _stored_number(dataset: Dataset, keyword: str, signed: bool) -> float | None:
    """A US or SS value, read as signed or unsigned like the pixels, whatever VR the writer chose."""
    number = _number(dataset, keyword)
    if number is None:
        return None
    if signed and number > 32767:
        return number - 65536
    return number + 65536 if not signed and number < 0 else number


def _positive(dataset: Dataset, keyword: str) -> int:
    number = _number(dataset, keyword)
    if number is None or number < 1:
        raise Rejected(ReasonCode.CORRUPT_DICOM, f"The header has no usable {keyword}.")
    return int(number)
