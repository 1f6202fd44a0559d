"""What every format reader returns: samples as stored, their intended grey scale, the facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.greyscale import GreyScale
from cxrbatch.imaging.limits import Limits
from cxrbatch.types import ImageFacts

__all__ = ["StoredImage", "require_size"]


@dataclass(frozen=True, slots=True, eq=False)
class StoredImage:
    """One decoded image before the pixel policy."""

    samples: NDArray[Any]  # (rows, columns), or (rows, columns, 3) uint8 or uint16 RGB
    scale: GreyScale
    facts: ImageFacts  # grey_path and inverted still empty
    shrunk: int = 1  # file pixels per sample along each side, if the codec shrank the image

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns in full size, upright. An image that has to be rotated is never shrunk."""
        rows, columns = self.samples.shape[:2]
        return (rows, columns) if self.shrunk == 1 else (self.facts.rows, self.facts.columns)


def require_size(rows: int, columns: int, limits: Limits) -> None:
    """Check a claimed size before anything is allocated. Raises Rejected: TOO_MANY_PIXELS, TOO_SMALL."""
    if rows * columns > limits.max_pixels:
        raise Rejected(
            ReasonCode.TOO_MANY_PIXELS,
            f"The image has {columns} x {rows} pixels, more than {limits.max_pixels_mpx:g} megapixels.",
        )
    if min(rows, columns) < limits.min_side_px:
        raise Rejected(
            ReasonCode.TOO_SMALL,
            f"The image has {columns} x {rows} pixels; at least {limits.min_side_px} a side are needed.",
        )
