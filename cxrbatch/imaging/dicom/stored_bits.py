"""Convert the samples of any decoder to values of BitsStored bits.

DICOM PS3.5 8.1.1: a value has BitsStored bits, the highest of them at HighBit. Other bits are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from cxrbatch.errors import ReasonCode, Rejected

__all__ = ["StoredBits"]

_OVERLAY_GROUPS = range(0x6000, 0x6020, 2)


@dataclass(frozen=True, slots=True)
class StoredBits:
    """The position of a value in its word, according to the header."""

    allocated: int
    stored: int
    high: int
    signed: bool
    overlays: int = 0  # bits outside the value that hold (retired) overlays

    @classmethod
    def of(cls, dataset: Dataset) -> StoredBits | None:
        """Read the header; None if it does not describe integers. pydicom checks the values themselves."""
        try:
            allocated = int(dataset.BitsAllocated)
            stored = int(dataset.get("BitsStored") or allocated)
            high = dataset.get("HighBit")
            high = stored - 1 if high is None or high == "" else int(high)
            signed = int(dataset.get("PixelRepresentation") or 0) == 1
        except Exception:  # what pydicom raises for values of another kind is open
            return None
        if not 1 < allocated <= 64 or not 0 < stored <= allocated:
            return None
        value = ((1 << stored) - 1) << min(max(0, high + 1 - stored), allocated)  # a header may claim billions
        return cls(allocated, stored, high, signed, _overlay_bits(dataset, allocated) & ~value)

    def fits(self, samples: NDArray[Any], precision: int) -> bool:
        """Whether `fit` would return the samples unchanged."""
        if (samples.dtype.kind == "i") != self.signed:
            return False
        if precision <= self.stored:
            return True
        top = 1 << self.stored - self.signed
        right = self.high == self.stored - 1 and not self.overlays
        return right and samples.max() < top and (not self.signed or samples.min() >= -top)

    def fit(
        self, samples: NDArray[Any], *, precision: int, lossy: bool = False, own_sign: bool = False
    ) -> tuple[NDArray[Any], bool]:
        """The values, unsigned or signed as the header says, and whether some clearly exceeded BitsStored.

        `samples` are integers of `precision` bits: BitsAllocated, or what the codestream declares. They are words in
        which the highest bit of the value is the sign, if the header declares signed values. With `own_sign` they are
        signed numbers already, which only JPEG 2000 encodes.

        Losslessly coded values beyond BitsStored lose the bits above. A lossy codec overshoots at sharp edges: such
        values are clamped, and only an excess of more than half the range is reported.

        Raises Rejected: CORRUPT_DICOM, UNSUPPORTED_PIXELS (HighBit).
        """
        if self.fits(samples, precision):
            return samples, False
        if samples.dtype.kind == "i" and not self.signed:  # codestream signed, header unsigned: reinterpret the words
            words = samples.view(f"u{samples.dtype.itemsize}")
            samples, own_sign = words & _word(words, (1 << precision) - 1), False
        samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
        if not lossy and self.overlays and precision == self.allocated:
            samples = samples & _word(samples, ~self.overlays)
        samples, precision = self._aligned(samples, precision)
        if not self.signed:
            return self._unsigned(samples, lossy)
        return self._signed(samples, precision, lossy, own_sign)

    def _aligned(self, samples: NDArray[Any], precision: int) -> tuple[NDArray[Any], int]:
        """Values shifted down to bit 0. HighBit is used unless the samples contradict it."""
        below = self.high + 1 - self.stored
        if below == 0 or precision <= self.stored:  # a value that fills its word has only one position
            return samples, precision
        if not 0 < below <= precision - self.stored:
            raise Rejected(
                ReasonCode.CORRUPT_DICOM,
                f"HighBit {self.high} does not fit BitsStored {self.stored} and {precision} bits a sample.",
            )
        if (samples & _word(samples, (1 << below) - 1)).any():
            raise Rejected(
                ReasonCode.UNSUPPORTED_PIXELS,
                f"HighBit {self.high} leaves the lowest {below} bits of a sample empty, but they are not.",
            )
        return samples >> below, precision - below

    def _unsigned(self, samples: NDArray[Any], lossy: bool) -> tuple[NDArray[Any], bool]:
        top = (1 << self.stored) - 1
        highest = int(samples.max())
        if highest <= top:
            return samples, False
        if lossy:
            return np.minimum(samples, _word(samples, top)), highest > top + top // 2
        return samples & _word(samples, top), True

    def _signed(self, samples: NDArray[Any], precision: int, lossy: bool, own_sign: bool) -> tuple[NDArray[Any], bool]:
        half = 1 << self.stored - 1
        if precision < self.stored:  # the sign is the highest bit of the codestream's samples
            return _extended(samples, precision), False
        values = samples if own_sign else _extended(samples, precision)
        low, high = int(values.min()), int(values.max())
        if low >= -half and high < half:
            return values, False
        # Words wider than the value are extended with the sign or with zeros. Only sign extension gives negative
        # numbers; an overshoot in a zero-extended word may look like a very negative one.
        filled = own_sign or bool(((values < 0) & (values >= -half)).any())
        if lossy and not filled and low >= 0 and high < half + half // 2:
            filled = True  # no negative number in either reading, but for a few beyond the highest positive one
        if not lossy:
            return _extended(samples, self.stored), filled or low < 0 or high >= 2 * half
        if filled:
            return np.clip(values, -half, half - 1), low < -2 * half or high >= 2 * half
        top = 2 * half - 1
        return _extended(np.minimum(samples, _word(samples, top)), self.stored), int(samples.max()) > top + half


def _overlay_bits(dataset: Dataset, allocated: int) -> int:
    """Bits of a word that hold an overlay (PS3.5 8.1.2, retired in 2004)."""
    bits = 0
    for group in _OVERLAY_GROUPS:
        if (group, 0x0102) not in dataset or (group, 0x3000) in dataset:
            continue
        try:
            position, own = int(dataset[group, 0x0102].value), int(dataset[group, 0x0100].value)
        except Exception:
            continue
        if own == allocated and 0 <= position < allocated:
            bits |= 1 << position
    return bits


def _word(samples: NDArray[Any], bits: int) -> Any:
    """`bits` as a scalar of the samples' type: two's complement, cut to its width."""
    width = samples.dtype.itemsize
    return np.frombuffer((bits & (1 << width * 8) - 1).to_bytes(width, "little"), f"<{samples.dtype.kind}{width}")[0]


def _extended(samples: NDArray[Any], bits: int) -> NDArray[Any]:
    """Signed numbers from words whose lowest `bits` are a two's complement."""
    signed = samples.view(f"i{samples.dtype.itemsize}")
    spare = signed.dtype.itemsize * 8 - bits
    return (signed << spare) >> spare if spare else signed
