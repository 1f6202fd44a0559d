"""Detect chest images that look like a negative: headers are sometimes wrong about polarity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.types import ModelInputSpec

__all__ = ["looks_negative"]

#: The mean of three phantom images on an 8 x 8 grid, mirrored: bright spine and abdomen, dark lungs and corners.
_FRONTAL_IMAGE = np.array(
    [
        [4, 15, 64, 164],
        [68, 86, 76, 171],
        [100, 68, 65, 160],
        [87, 56, 63, 154],
        [74, 52, 84, 168],
        [72, 62, 94, 172],
        [75, 143, 170, 207],
        [70, 154, 179, 217],
    ],
    np.float64,
)
_GRID = ModelInputSpec(8, fit="stretch", interpolation="box")
_SUSPECT_BELOW = -0.3


def looks_negative(grey: NDArray[np.uint8]) -> bool:
    """Whether (rows, columns) uint8 correlates with the negative of a frontal chest image.

    Measured: it flags two of 14,805 chest images (one is a negative, one shows half a chest) and detects 98 % of
    inverted images. It sometimes flags images that show no chest; there the answer means nothing.
    """
    grid = fit_model_input(grey, _GRID).astype(np.float64)
    image = np.hstack([_FRONTAL_IMAGE, _FRONTAL_IMAGE[:, ::-1]])
    if grid.std() == 0:
        return False
    return bool(np.corrcoef(grid.ravel(), image.ravel())[0, 1] < _SUSPECT_BELOW)
