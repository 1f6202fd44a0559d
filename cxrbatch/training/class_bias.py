"""A constant for each class's logit, by which every folder of validation images counts alike.

Folders hold their classes in other shares than a clinic does, and a network learns the shares. A constant a class is
the least that can be changed about it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["balanced_bias"]

_STEP, _LARGEST = 0.25, 1.5  # of a logit
_GAIN = 0.002  # a step that wins less is not taken


def balanced_bias(
    logits: NDArray[np.float64], right: NDArray[np.bool_], folders: Sequence[str], labels: Sequence[str]
) -> NDArray[np.float64]:
    """The constants (k,) for logits (n, k), by steps from zero, each the best of one class's.

    `right` (n, k) says which answers are right for an image. What is made large is the mean over folders of the mean
    over their labels of the share of right answers. Labels that may be several classes do not count (one answer would
    always do), nor do folders with one label only.
    """
    keys = list(zip(folders, labels, strict=True))
    names = sorted({key for key, answers in zip(keys, right, strict=True) if answers.sum() == 1})
    several = [key for key in names if sum(folder == key[0] for folder, _ in names) > 1]
    rows = {key: np.array([i for i, k in enumerate(keys) if k == key]) for key in several}

    def worth(bias: NDArray[np.float64]) -> float:
        answer = (logits + bias).argmax(1)
        is_right = right[np.arange(len(answer)), answer]
        by_folder: dict[str, list[float]] = {}
        for (folder, _), those in rows.items():
            by_folder.setdefault(folder, []).append(float(is_right[those].mean()))
        return float(np.mean([np.mean(shares) for shares in by_folder.values()])) if by_folder else 0.0

    bias = np.zeros(logits.shape[1])
    steps = [sign * _STEP * row for row in np.eye(len(bias)) for sign in (1, -1)]
    while True:
        tried = [bias + step for step in steps if np.abs(bias + step).max() <= _LARGEST]
        best = max(tried, key=worth)
        if worth(best) < worth(bias) + _GAIN:
            break
        bias = best
    centred: NDArray[np.float64] = bias - bias.mean()
    return centred
