"""Operating points that a calibration writes into a bundle, from probabilities on validation images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.inference.decision import normal_class
from cxrbatch.training.conformal import operating_point, source_weights

__all__ = ["COVERAGE", "abnormal_block", "confidence_threshold", "review_thresholds", "rounded_down", "sureness"]

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
    normal = normal_class(classes)
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
    return confidence_threshold(confidence, distance > far, review_share), far


def confidence_threshold(confidence: NDArray[np.float64], unlike: NDArray[np.bool_], review_share: float) -> float:
    """The confidence below which images go to review, together with those `unlike` training `review_share` of them."""
    spare = int(review_share * len(confidence)) - int(unlike.sum())
    near = np.sort(confidence if unlike.all() else confidence[~unlike])
    return float(near[min(max(spare, 0), len(near) - 1)])


def sureness(classes: Sequence[str], p: NDArray[np.float64], other: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """(n,) what the threshold of confidence is compared with (decision.py)."""
    found: NDArray[np.float64] = p.max(1)
    normal = normal_class(classes)
    if other is not None and normal is not None:
        found = np.where(p.argmax(1) == normal, found * (1 - other), found)
    return found
