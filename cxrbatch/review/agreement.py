"""Agreement and accuracy of readers, in numpy. Labels are text; a figure that is undefined is NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Figure", "cohen_kappa", "fleiss_kappa", "numbered", "proportion", "with_interval"]

_DRAWS = 1000
_SEED = 1
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 95 % interval and how many images it is of."""

    value: float
    low: float
    high: float
    number: int


def cohen_kappa(first: Ints, second: Ints, classes: int) -> float:
    """Cohen 1960, for two readers' class numbers (n,); NaN where chance alone would agree always."""
    if len(first) == 0:
        return float("nan")
    table = np.bincount(first * classes + second, minlength=classes * classes).reshape(classes, classes) / len(first)
    observed = float(np.trace(table))
    expected = float(table.sum(1) @ table.sum(0))
    return float("nan") if expected >= 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(counts: Ints) -> float:
    """Fleiss 1971. counts (n, k): how many readers gave image i the class j, each row with the same sum m > 1."""
    if len(counts) == 0:
        return float("nan")
    readers = int(counts[0].sum())
    shares = counts.sum(0) / counts.sum()
    expected = float((shares**2).sum())
    observed = float(((counts**2).sum(1) - readers).mean() / (readers * (readers - 1)))
    return float("nan") if expected >= 1 else (observed - expected) / (1 - expected)


def with_interval(rows: int, figure: Callable[[Ints], float], draws: int = _DRAWS) -> Figure:
    """A figure of row numbers, with the percentile interval of a bootstrap over images."""
    everything = np.arange(rows)
    value = figure(everything) if rows else float("nan")
    if rows < 2 or np.isnan(value):
        return Figure(value, float("nan"), float("nan"), rows)
    chance = np.random.default_rng(_SEED)
    drawn = np.array([figure(chance.integers(0, rows, rows)) for _ in range(draws)])
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) == 0:
        return Figure(value, float("nan"), float("nan"), rows)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Figure(value, float(low), float(high), rows)


def proportion(hits: int, number: int) -> Figure:
    """A share with the Wilson interval, which holds also near 0 and 1."""
    if number == 0:
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    z, share = 1.959964, hits / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * (share * (1 - share) / number + z * z / (4 * number**2)) ** 0.5
    return Figure(share, max(0.0, middle - half), min(1.0, middle + half), number)


def numbered(labels: Sequence[str], names: Sequence[str]) -> Ints:
    """Class numbers (n,) of labels."""
    place: dict[str, Any] = {name: number for number, name in enumerate(names)}
    return np.array([place[label] for label in labels], np.int64)
