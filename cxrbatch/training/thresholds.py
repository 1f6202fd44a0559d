"""Operating points that a calibration writes into a bundle, from probabilities on validation images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.training.conformal import operating_point, source_weights

__all__ = ["COVERAGE", "abnormal_block", "review_thresholds", "rounded_down"]

COVERAGE = 0.9  #: of the label sets
_SENSITIVITIES = (0.9, 0.95, 0.99)  # of `abnormal_probability`, at its operating points


def rounded_down(threshold: float) -> float:
    return float(np.floor(threshold * 1e4) / 1e4)


def abnormal_block(
    classes: Sequence[str],
    p: NDArray[np.float64],
    y: NDArray[np.int64],
    sources: list[str],
    other: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Operating points of `abnormal_probability`; nothing where no class is NORMAL."""
    normal = next((c for c, name in enumerate(classes) if name.upper() == "NORMAL"), None)
    if normal is None:
        return {}
    weights = source_weights(y, sources)
    abnormal = 1 - p[:, normal] if other is None else 1 - p[:, normal] * (1 - other)
    points = []
    for sensitivity in _SENSITIVITIES:
        threshold, specificity = operating_point(abnormal, y != normal, weights, sensitivity)
        points.append(
            {"sensitivity": sensitivity, "specificity": round(specificity, 4), "threshold": rounded_down(threshold)}
        )
    return {"abnormal": {"operating_points": points, "chosen_on": "validation, every source of a class alike"}}


def review_thresholds(
    confidence: NDArray[np.float64], distance: NDArray[np.float64], review_share: float, unfamiliar_share: float
) -> tuple[float, float]:
    """(confidence below which, distance above which) images go to review, together `review_share` of them.

    What goes to review for its quality flags comes on top: a set full of flagged images must not leave the models
    without a threshold.
    """
    far = float(np.quantile(distance, 1 - unfamiliar_share))
    spare = int(review_share * len(confidence)) - int((distance > far).sum())
    near = np.sort(confidence[distance <= far])
    return float(near[min(max(spare, 0), len(near) - 1)]), far
