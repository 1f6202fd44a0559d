"""Label sets with a stated coverage: class-conditional conformal prediction (Vovk 2012; Sadinle et al. 2019).

A class is in the set of an image when its calibrated probability reaches the class's threshold. On images that are
drawn as the calibration images are, the right class of at least `coverage` of each class's images is in the set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["class_thresholds", "operating_point", "source_weights"]


def class_thresholds(
    probabilities: NDArray[np.float64], y: NDArray[np.int64], weights: NDArray[np.float64], coverage: float
) -> NDArray[np.float64]:
    """Of each class the largest threshold (k,) that keeps `coverage` of its images' right label in the set.

    probabilities (n, k), y (n,), weights (n,) > 0: an image counts by its weight. With equal weights this is the
    finite-sample quantile; a class with too few images for it has the threshold 0 and is in every set.
    """
    found = np.zeros(probabilities.shape[1])
    for c in range(probabilities.shape[1]):
        rows = np.flatnonzero(y == c)
        if not len(rows):
            continue
        own = probabilities[rows, c]
        order = np.argsort(own, kind="stable")
        weight = weights[rows][order]
        missed = np.cumsum(weight)  # weight of the images up to each: those below the next one are missed
        allowed = (1 - coverage) * (weight.sum() + weight.mean())
        last = int(np.searchsorted(missed, allowed + 1e-12, side="right")) - 1
        found[c] = own[order][last] if last >= 0 else 0.0
    return found


def source_weights(y: NDArray[np.int64], sources: list[str]) -> NDArray[np.float64]:
    """Weights (n,) by which every source of a class counts alike: the next hospital is a new one."""
    keys = [f"{c} {source}" for c, source in zip(y.tolist(), sources, strict=True)]
    _, member, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    weights: NDArray[np.float64] = 1.0 / sizes[member]
    return weights


def operating_point(
    score: NDArray[np.float64], positive: NDArray[np.bool_], weights: NDArray[np.float64], sensitivity: float
) -> tuple[float, float]:
    """(threshold, specificity): the highest threshold at which `sensitivity` of the positives reach it.

    score (n,), positive (n,), weights (n,) > 0.
    """
    order = np.argsort(-score, kind="stable")
    found = np.cumsum(np.where(positive, weights, 0.0)[order])
    place = min(int(np.searchsorted(found, sensitivity * found[-1] - 1e-12)), len(order) - 1)
    threshold = float(score[order][place])
    below = (score < threshold) & ~positive
    return threshold, float(weights[below].sum() / weights[~positive].sum())
