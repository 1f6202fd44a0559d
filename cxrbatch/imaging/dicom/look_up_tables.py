"""Read look-up tables: Modality and VOI LUTs (PS3.3 C.11.1, C.11.2), and palettes (C.7.6.3.1.5 and C.7.6.3.1.6)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.greyscale import LookUpTable

__all__ = ["palette_colours", "read_table"]

_PALETTES = tuple(f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue"))


def read_table(dataset: Dataset, name: str, little_endian: bool, signed_input: bool) -> LookUpTable | None:
    """The table of the elements `{name}Descriptor` and `{name}Data`, or None if it does not parse.

    The VR of both is US, SS or OW (C.11.1.1). The descriptor's second value is signed if its input is; the data are
    unsigned.
    """
    try:
        length, first, bits = (int(v) for v in dataset[f"{name}Descriptor"].value)
        length = (length & 0xFFFF) or 65536
        raw = dataset[f"{name}Data"].value
        if isinstance(raw, bytes):
            entries = np.frombuffer(raw, "<u2" if little_endian else ">u2")
        else:
            entries = np.atleast_1d(np.asarray(raw, np.int64) & 0xFFFF)
        if len(entries) == (length + 1) // 2:  # two in a word, the first in its lower byte
            entries = entries.astype("<u2").view(np.uint8)
    except Exception:  # what pydicom raises for values of another kind is open
        return None
    first = first - 65536 if signed_input and first > 32767 else first
    entries = entries[:length].astype(np.float64)
    if not len(entries) or not 1 <= bits <= 16:
        return None
    return LookUpTable(first, entries, bits)


def palette_colours(indices: NDArray[Any], dataset: Dataset, little_endian: bool) -> NDArray[Any]:
    """(rows, columns) integers -> (rows, columns, 3) uint8, or uint16 where an entry has more bits.

    Raises Rejected: CORRUPT_DICOM, UNSUPPORTED_PIXELS.
    """
    if indices.dtype.kind not in "iu" or indices.dtype.itemsize > 2:
        raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "The numbers of palette colours have more than 16 bits.")
    if f"Segmented{_PALETTES[0]}Data" in dataset:
        return _segmented(indices, dataset)
    # Not by pydicom, which reads 16-bit entries of big endian files as little endian ones, and cuts numbers to 8 bits
    # where the entries have 8.
    tables = [_palette(dataset, name, little_endian, indices.dtype.kind == "i") for name in _PALETTES]
    colours = np.stack([_entries(indices, table) for table in tables], axis=-1)
    small = all(table.entries.max() < 256 for table in tables)
    return colours.astype(np.uint8) if small else colours


def _palette(dataset: Dataset, name: str, little_endian: bool, signed_input: bool) -> LookUpTable:
    """All of its entries: numbers behind a table that ends early would get the last colour. Raises Rejected."""
    table = read_table(dataset, name, little_endian, signed_input)
    if table is None or len(table.entries) != (int(dataset[f"{name}Descriptor"].value[0]) & 0xFFFF or 65536):
        raise Rejected(ReasonCode.CORRUPT_DICOM, "The colour palette does not parse.")
    return table


def _entries(indices: NDArray[Any], table: LookUpTable) -> NDArray[np.uint16]:
    """Numbers below or above the table get its first or last entry."""
    position = np.clip(indices.astype(np.int32) - table.first_mapped, 0, len(table.entries) - 1)
    return table.entries.astype(np.uint16)[position]


def _segmented(indices: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    """By pydicom, except where it cuts numbers to 8 bits."""
    try:
        length, _, bits = (int(v) for v in dataset[f"{_PALETTES[0]}Descriptor"].value)
        if bits > 8 or 0 < length <= 256:
            return apply_color_lut(indices, dataset)[..., :3]
    except Exception as error:
        raise Rejected(ReasonCode.CORRUPT_DICOM, "The colour palette does not parse.") from error
    raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, "A segmented palette of so many colours of 8 bits is not read.")
