"""The pixel policy of training, evaluation and inference: stored values -> one small grey model input.

The grey scale is one table from every stored value to a grey level (greyscale.py). docs/pixels.md describes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.greyscale import GreyScale, grey_table, spread
from cxrbatch.types import ModelInputSpec

__all__ = ["MEAN_ROOM", "Rendered", "fit_model_input", "luma", "render", "shrink_factor", "stored_values"]

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}
_NEAR_CONSTANT_LEVELS = 16
_SATURATED_SHARE = 0.6
_TINY_PX = 128
_EXTREME_ASPECT = 3.0

# Pixels of a shrunk image per pixel of the model input, along a side: 2 if a codec shrinks with the filters of its
# transform, 3 if blocks are averaged, which with 2 is off by up to 10 grey levels at sharp edges.
_CODEC_ROOM, MEAN_ROOM = 2, 3
_SAMPLE = 1 << 20  # pixels: enough for percentiles and quality flags
_AS_STORED = np.arange(256, dtype=np.uint8)
_TILE = 1 << 17  # pixels: numpy widens an index to 64 bits, which is faster when the tile fits the CPU cache

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A grey image and how it came about."""

    grey: NDArray[np.uint8]  # (rows, columns)
    grey_path: str
    grey_mean: float  # 0..255, of the whole image
    inverted: bool
    quality_flags: tuple[str, ...]


def shrink_factor(rows: int, columns: int, specs: Iterable[ModelInputSpec], room: int = _CODEC_ROOM) -> int:
    """The largest whole factor that leaves `room` times the pixels of each model input; 1 without model inputs."""
    sides = ((max if spec.fit == "pad" else min)(rows, columns) // (room * spec.size) for spec in specs)
    return max(1, min(sides, default=1))


def render(
    samples: NDArray[Any], scale: GreyScale, *, shrink: int = 1, size: tuple[int, int] | None = None
) -> Rendered:
    """Stored values (rows, columns) of any real dtype, or (rows, columns, 3) uint8/uint16 RGB -> grey.

    The order is that of PS3.3 C.7.6.3 and C.11: modality (LUT before rescale), VOI (LUT before window, the first of
    several), then inversion once. Without a usable VOI, values of more than 8 bits are windowed between their 0.5 and
    99.5 percentiles; 8-bit values are kept.

    With `shrink` the grey image is the mean of blocks of `shrink` pixels a side (partial at the edges), and with more
    than 8 bits only a grid of pixels is counted for percentiles and flags. `size` is the full (rows, columns) of an
    image that a decoder has already shrunk.

    Raises Rejected: CONSTANT_IMAGE, CORRUPT_PIXELS (no finite value).
    """
    flags: list[str] = []
    if samples.ndim == 3:
        if _is_coloured(samples, 2**scale.bits_stored - 1):
            flags.append("colour")
        samples = luma(samples)
    stored, index, counts = stored_values(samples, sampled=shrink > 1, trimmed=not scale.may_fill_range)
    if np.count_nonzero(counts) < 2 and index.min() == index.max():
        raise Rejected(ReasonCode.CONSTANT_IMAGE, "Every pixel has the same value.")
    table, path, table_flags = grey_table(stored, counts, scale)
    flags += table_flags
    histogram = np.bincount(table, weights=counts, minlength=256)
    flags += _quality(histogram, size or samples.shape[:2])
    grey = _look_up(table, index)
    if shrink > 1:
        grey = np.asarray(Image.fromarray(grey).reduce(shrink))
    mean = float(histogram @ np.arange(256) / histogram.sum())
    return Rendered(grey, path, mean, scale.inverted, tuple(flags))


def fit_model_input(
    grey: NDArray[np.uint8], spec: ModelInputSpec, extent: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Resize one grey image (rows, columns) uint8 to the model input (size, size) uint8 of a network.

    Pillow antialiases (the filter's support grows with the reduction). With `fit="pad"` the longer side becomes `size`
    and the image is centred on black. `extent` is the exact (rows, columns) of the image, if shrinking left a partial
    pixel at the edge.
    """
    rows, columns = extent or grey.shape
    if spec.fit == "stretch":
        height = width = spec.size
    else:
        scale = spec.size / max(rows, columns)
        height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    box = (0, 0, columns, rows)
    resized = np.asarray(Image.fromarray(grey).resize((width, height), _RESAMPLING[spec.interpolation], box))
    if (height, width) == (spec.size, spec.size):
        return resized
    model_input = np.zeros((spec.size, spec.size), np.uint8)
    top, left = (spec.size - height) // 2, (spec.size - width) // 2
    model_input[top : top + height, left : left + width] = resized
    return model_input


def stored_values(
    samples: NDArray[Any], *, sampled: bool, trimmed: bool
) -> tuple[Floats, NDArray[Any], NDArray[np.int64]]:
    """The domain of the grey table: (stored values, each pixel's index into them, number of pixels of each).

    `sampled`: only a grid of pixels is counted. `trimmed`: unsigned values end at the largest that occurs.
    """
    if samples.dtype.kind in "iu" and samples.dtype.itemsize <= 2:
        native = samples.astype(samples.dtype.newbyteorder("="), copy=False)
        unsigned = np.uint8 if native.itemsize == 1 else np.uint16
        index = np.ascontiguousarray(native).view(unsigned)  # two's complement: negative values come last
        stored = np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned).view(native.dtype)
        if native.itemsize == 1:
            return stored.astype(np.float64), index, np.array(Image.fromarray(index).histogram(), np.int64)
        if trimmed and native.dtype.kind == "u":
            stored = stored[: int(index.max()) + 1]
        step = max(1, math.isqrt(index.size // _SAMPLE)) if sampled else 1
        return stored.astype(np.float64), index, _count(index[::step, ::step], len(stored))
    values = samples.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        if not finite.any():
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "No pixel has a finite value.")
        values[~finite] = values[finite].min()
    stored, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return stored, index.reshape(values.shape), counts


def _count(index: NDArray[Any], length: int) -> NDArray[np.int64]:
    """How often each of `length` values occurs."""
    flat = index.reshape(-1)
    counts = np.zeros(length, np.int64)
    for start in range(0, flat.size, _TILE):
        counts += np.bincount(flat[start : start + _TILE], minlength=length)
    return counts


def _look_up(table: NDArray[np.uint8], index: NDArray[Any]) -> NDArray[np.uint8]:
    """`table[index]`, with the shape of `index`."""
    if index.dtype == np.uint8 and np.array_equal(table, _AS_STORED):
        return index
    if index.dtype == np.uint8:
        return np.asarray(Image.fromarray(index).point(table.tolist()))
    flat = index.reshape(-1)
    grey = np.empty(flat.size, np.uint8)
    for start in range(0, flat.size, _TILE):
        np.take(table, flat[start : start + _TILE], out=grey[start : start + _TILE], mode="clip")
    return grey.reshape(index.shape)


def _quality(histogram: NDArray[Any], size: tuple[int, ...]) -> list[str]:
    """Quality flags from the grey histogram (256) and the rows and columns of an image."""
    flags = []
    if spread(histogram, 0.01) < _NEAR_CONSTANT_LEVELS:
        flags.append("near_constant")
    if (histogram[0] + histogram[255]) / histogram.sum() > _SATURATED_SHARE:
        flags.append("saturated")
    rows, columns = size
    if min(rows, columns) < _TINY_PX:
        flags.append("tiny")
    if max(rows, columns) > _EXTREME_ASPECT * min(rows, columns):
        flags.append("extreme_aspect")
    return flags


def luma(rgb: NDArray[Any]) -> NDArray[Any]:
    """ITU-R BT.601 luma of (rows, columns, 3), same dtype, with Pillow's integer weights: grey stays unchanged."""
    if rgb.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"))
    red, green, blue = (rgb[..., i].astype(np.uint64) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).astype(rgb.dtype)


def _is_coloured(rgb: NDArray[Any], top: int) -> bool:
    """Whether the channels, up to `top`, differ by more than JPEG chroma noise, on a coarse grid of pixels."""
    coarse = rgb[:: max(1, rgb.shape[0] // 256), :: max(1, rgb.shape[1] // 256)]
    red, green, blue = (coarse[..., i] for i in range(3))
    highest, lowest = (pick(pick(red, green), blue) for pick in (np.maximum, np.minimum))
    distance = highest - lowest
    return bool(np.mean(distance > top * 0.08) > 0.01)
