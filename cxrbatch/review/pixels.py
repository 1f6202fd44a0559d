"""An image for the viewer: its stored values as uint16, and the grey table of the pixel policy.

Reading and decoding happen in the killable workers of `scan` and `watch`; here is what they do for a viewer, and how
an answer travels to the browser.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.limits import Limits
from cxrbatch.types import DecodedImage, FoundFile, ModelInputSpec

__all__ = ["REDUCED_PX", "DecodeForViewer", "ViewRequest", "ViewedImage", "as_body"]

REDUCED_PX = 1024  # the longer side of what is sent first, about


@dataclass(frozen=True, slots=True)
class ViewRequest(FoundFile):
    """A file of the store, and the content that it has to have."""

    sha256: str = ""
    reduced: bool = True


@dataclass(frozen=True, slots=True)
class ViewedImage(DecodedImage):
    """What the viewer draws: `grey[samples]` is the image as the model's input was made from it."""

    samples: NDArray[np.uint16] = None  # type: ignore[assignment] # (rows, columns): monotonic in the stored values
    grey: NDArray[np.uint8] = None  # type: ignore[assignment] # (highest sample + 1,): grey level of each sample
    size: tuple[int, int] = (0, 0)  # rows and columns in full, upright
    step: int = 1  # pixels of the file along a side of one sample
    slope: float = 1.0  # physical value = slope * sample + intercept
    intercept: float = 0.0
    window: tuple[float, float] | None = None  # center and width of the header, in physical values


@dataclass(frozen=True, slots=True)
class DecodeForViewer:
    """The task of the viewer's workers: picklable; a ViewRequest in, a ViewedImage out, Rejected raised."""

    limits: Limits

    def __call__(self, file: FoundFile) -> DecodedImage:
        assert isinstance(file, ViewRequest)
        return view_file(file, self.limits)


def view_file(request: ViewRequest, limits: Limits) -> ViewedImage:
    """Read and decode one file for the viewer.

    Raises Rejected; its kind Retry (VANISHED, CHANGED_WHILE_READ) where the file is gone or has other bytes than the
    store knows.
    """
    from cxrbatch.imaging.decode import read_for_viewer
    from cxrbatch.imaging.greyscale import grey_table
    from cxrbatch.imaging.normalize import luma, stored_values

    stored = read_for_viewer(request.path, request.sha256, limits, _specs(request))

    samples = luma(stored.samples) if stored.samples.ndim == 3 else stored.samples
    step = stored.shrunk
    if request.reduced:
        more = max(1, max(samples.shape) // REDUCED_PX)
        samples, step = _mean(samples, more), step * more
    scale = stored.scale
    values, index, counts = stored_values(samples, sampled=samples.size > 1 << 21, trimmed=not scale.may_fill_range)
    if index.min() == index.max():
        raise Rejected(ReasonCode.CONSTANT_IMAGE, "Every pixel has the same value.")
    table, _, _ = grey_table(values, counts, scale)
    grid, grey, low, width = _monotonic(values, index, table)
    linear = scale.modality_lut is None
    slope = scale.slope * width if linear else 1.0
    intercept = scale.slope * low + scale.intercept if linear else 0.0
    window = (scale.window.center, scale.window.width) if linear and scale.window and scale.window.valid else None
    return ViewedImage(
        request.sha256,
        stored.facts,
        {},
        samples=grid,
        grey=grey,
        size=stored.size,
        step=step,
        slope=slope,
        intercept=intercept,
        window=window,
    )


def _specs(request: ViewRequest) -> tuple[ModelInputSpec, ...]:
    # A codec that shrinks leaves twice what is asked for.
    return (ModelInputSpec(REDUCED_PX // 2),) if request.reduced else ()


def _mean(samples: NDArray[Any], factor: int) -> NDArray[Any]:
    """Means of blocks of `factor` pixels a side; what is left over at the edge is cut off."""
    if factor == 1:
        return samples
    rows, columns = (side // factor * factor for side in samples.shape)
    blocks = samples[:rows, :columns].reshape(rows // factor, factor, columns // factor, factor)
    mean = blocks.mean((1, 3), dtype=np.float32)
    if samples.dtype.kind == "f":
        return np.asarray(mean)
    return np.asarray(np.floor(mean + 0.5)).astype(samples.dtype)


def _monotonic(
    values: NDArray[np.float64], index: NDArray[Any], table: NDArray[np.uint8]
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], float, float]:
    """(samples, grey level of each, stored value of sample 0, stored values a sample): low samples are low values."""
    if len(values) > 65536:  # floating point: 16 bits between the least and the greatest
        low, high = float(values[0]), float(values[-1])
        width = (high - low) / 65535
        place = np.round((values - low) / width).astype(np.uint16)
        grey = np.zeros(65536, np.uint8)
        grey[place] = table
        known = np.zeros(65536, bool)
        known[place] = True
        grey = grey[np.maximum.accumulate(np.where(known, np.arange(65536), 0))]
        return place[index], grey, low, width
    used_low, used_high = index.min(), index.max()
    if values[used_low] > values[used_high] or values[0] > values[-1]:  # two's complement: negative values come last
        half = len(values) // 2
        shifted = index.astype(np.uint16) ^ np.uint16(half)
        return shifted, np.roll(table, half), float(values[half]), 1.0
    if len(values) > 1 and values[1] - values[0] != 1:  # few floating values: their order is all there is
        return index.astype(np.uint16), table, 0.0, 1.0
    top = int(used_high) + 1
    return index.astype(np.uint16), table[:top], float(values[0]), 1.0


def as_body(image: ViewedImage) -> bytes:
    """The answer to the browser: length of the JSON (uint32), JSON, grey table, samples (uint16); little-endian."""
    rows, columns = image.samples.shape
    head = {
        "rows": rows,
        "columns": columns,
        "full_rows": image.size[0],
        "full_columns": image.size[1],
        "step": image.step,
        "slope": image.slope,
        "intercept": image.intercept,
        "window": image.window,
        "greys": len(image.grey),
    }
    document = json.dumps(head).encode()
    document += b" " * (-(len(document) + 4 + len(image.grey)) % 2)  # the samples begin at an even byte
    samples = np.ascontiguousarray(image.samples, "<u2")
    return struct.pack("<I", len(document)) + document + image.grey.tobytes() + samples.tobytes()
