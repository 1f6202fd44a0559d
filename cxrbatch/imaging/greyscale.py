"""The grey scale: one table that maps every stored value to a grey level. MONOCHROME1 is inverted here.

DICOM PS3.3 C.7.6.3 (pixels), C.11.1 (Modality LUT), C.11.2 (VOI LUT); docs/pixels.md describes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GreyScale", "LookUpTable", "Window", "grey_table", "spread"]

_PERCENTILES = (0.5, 99.5)
_UNUSABLE_LEVELS = 10  # a window that leaves fewer grey levels than this shows nothing

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LookUpTable:
    """A Modality or VOI LUT (PS3.3 C.11.1, C.11.2): `entries[i]` is the output for the input `first_mapped + i`."""

    first_mapped: int
    entries: Floats
    bits: int  # of an entry

    def apply(self, values: Floats) -> Floats:
        """Map values; values below or above the table get its first or last entry."""
        index = np.clip(np.trunc(values - self.first_mapped), 0, len(self.entries) - 1)
        return self.entries[index.astype(np.intp)]


@dataclass(frozen=True, slots=True)
class Window:
    """A VOI window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""

    center: float
    width: float
    function: str = "LINEAR"  # LINEAR, LINEAR_EXACT or SIGMOID

    @property
    def valid(self) -> bool:
        if not (np.isfinite(self.center) and np.isfinite(self.width)):
            return False
        least = 1 if self.function == "LINEAR" else 0
        return self.width >= least and self.width > 0

    def apply(self, values: Floats) -> Floats:
        """Map values to 0..1."""
        if self.function == "SIGMOID":
            exponent = np.clip(-4 * (values - self.center) / self.width, -700, 700)
            return np.asarray(1 / (1 + np.exp(exponent)))
        center, width = self.center, self.width
        if self.function == "LINEAR":
            center, width = center - 0.5, width - 1
        if width <= 0:  # LINEAR of width 1 is a threshold
            return (values > center).astype(np.float64)
        return np.clip((values - center) / width + 0.5, 0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class GreyScale:
    """How the stored values of one image are to be displayed."""

    bits_stored: int
    slope: float = 1.0
    intercept: float = 0.0
    modality_lut: LookUpTable | None = None
    voi_lut: LookUpTable | None = None
    window: Window | None = None
    padding: tuple[float, float] | None = None  # range of stored values outside the image, inclusive
    inverted: bool = False  # low values are bright
    may_fill_range: bool = False  # PNG and TIFF: 16-bit values may mean the whole range


def grey_table(stored: Floats, counts: NDArray[np.int64], scale: GreyScale) -> tuple[NDArray[np.uint8], str, list[str]]:
    """The table from stored value, by position in `stored` (n), to grey (n) uint8; the path taken; flags.

    `counts` (n) is the number of pixels with each value, for percentiles and for the check that a window is usable.
    The order is modality (LUT before rescale), VOI (LUT before window), then inversion once. Without a usable VOI,
    values of more than 8 bits are windowed between their 0.5 and 99.5 percentiles, without padding; 8-bit values are
    kept.
    """
    physical = scale.modality_lut.apply(stored) if scale.modality_lut else stored * scale.slope + scale.intercept
    path = []
    if scale.modality_lut:
        path.append("modality_lut_sequence")
    elif (scale.slope, scale.intercept) != (1.0, 0.0):
        path.append("rescale")
    if scale.padding is not None:
        low, high = scale.padding
        without = np.where((stored >= low) & (stored <= high), 0, counts)
        if np.count_nonzero(without) > 1:
            counts = without
    part, step, flags = _voi(physical, counts, scale)
    return _to_grey(part, scale.inverted), "; ".join([*path, step]), flags


def spread(histogram: NDArray[Any], tail: float) -> int:
    """Grey levels between the `tail` and 1 - `tail` quantiles of a grey histogram (256)."""
    cumulative = np.cumsum(histogram)
    low, high = np.searchsorted(cumulative, [tail * cumulative[-1], (1 - tail) * cumulative[-1]])
    return int(high - low)


def _voi(physical: Floats, counts: NDArray[np.int64], scale: GreyScale) -> tuple[Floats, str, list[str]]:
    """The table from stored value, by position, to 0..1; the path taken; flags for a VOI that was not usable."""
    flags: list[str] = []
    if scale.voi_lut is not None:
        part = scale.voi_lut.apply(physical) / _lut_top(scale.voi_lut)
        if _shows_something(part, counts):
            return part, "voi_lut_sequence", flags
        flags = ["window_unusable"]
    if scale.window is not None:
        if scale.window.valid:
            part = scale.window.apply(physical)
            if _shows_something(part, counts):
                return part, f"window {scale.window.function.lower()}", flags
        flags = ["window_unusable"]
    bits = scale.modality_lut.bits if scale.modality_lut else scale.bits_stored
    if bits <= 8 and not flags:
        return _whole_range(physical, bits, scale), "as_stored", flags
    unsigned16 = len(physical) == 65536 and physical[-1] == 65535
    if scale.may_fill_range and unsigned16 and _percentile(physical, counts, _PERCENTILES[1]) >= 32768:
        return physical / 65535, "whole_range", flags
    return _percentile_window(physical, counts), "percentile 0.5-99.5", flags


def _whole_range(physical: Floats, bits: int, scale: GreyScale) -> Floats:
    """0..1 over the whole range of `bits`: for 8 unsigned bits, the stored value / 255."""
    if scale.modality_lut:
        return np.asarray(physical / _lut_top(scale.modality_lut))
    stored = (physical - scale.intercept) / scale.slope
    lowest = -(2 ** (bits - 1)) if stored.min() < 0 else 0
    part = (stored - lowest) / (2**bits - 1)
    return np.asarray(part if scale.slope > 0 else 1 - part)


def _percentile_window(values: Floats, counts: NDArray[np.int64]) -> Floats:
    low, high = (_percentile(values, counts, q) for q in _PERCENTILES)
    if high <= low:
        present = values[counts > 0]
        low, high = float(present.min()), float(present.max())
    return np.clip((values - low) / max(high - low, np.finfo(np.float64).tiny), 0, 1)


def _percentile(values: Floats, counts: NDArray[np.int64], q: float) -> float:
    """The percentile of a histogram, linear between order statistics (as numpy's default)."""
    present = np.flatnonzero(counts)
    order = present[np.argsort(values[present], kind="stable")]
    ranks = np.cumsum(counts[order])
    rank = q / 100 * (ranks[-1] - 1)
    floor, ceil = np.floor(rank), np.ceil(rank)
    below, above = (values[order[np.searchsorted(ranks, r, side="right")]] for r in (floor, ceil))
    return float(below + (above - below) * (rank - floor))


def _to_grey(part: Floats, inverted: bool = False) -> NDArray[np.uint8]:
    """0..1 -> 0..255, clipped and rounded half up; `inverted` -> 255..0.

    Values are inverted before rounding, without their last float digits, so that an image and its negative tagged
    MONOCHROME1 give equal results even for values between two grey levels.
    """
    level = np.round(np.clip(part, 0, 1) * 255, 6)
    return np.floor((255 - level if inverted else level) + 0.5).astype(np.uint8)


def _lut_top(lut: LookUpTable) -> float:
    """The white level of a LUT's output. Some writers declare 16 bits and use 12: then the used bits count."""
    declared, used = 2**lut.bits - 1, max(1, int(lut.entries.max()))
    if declared / 2 <= used <= declared:
        return float(declared)
    return float(2 ** used.bit_length() - 1)


def _shows_something(part: Floats, counts: NDArray[np.int64]) -> bool:
    histogram = np.bincount(_to_grey(part), weights=counts, minlength=256)
    return spread(histogram, 0.002) >= _UNUSABLE_LEVELS
